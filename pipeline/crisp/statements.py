"""What a person states of files that do not say it themselves, in YAML: wavelengths, times, unit, pointing.

Each class is a part of the YAML, its attributes are the keys. Nothing is guessed: a number is stated, or it
is said where it stands (a card of a FITS header, another HDU, a variable, another file).
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, TypeVar

import astropy.units as u
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from pipeline.crisp.wavelengths import Medium
from pipeline.errors import InputError

LISTED = 12  # faults that an error names one by one
WORDS = {"missing": "missing", "extra_forbidden": "unknown key"}  # in place of pydantic's
CONTINUUM = "continuum"  # a unit


def _length(text: str) -> str:
    return _unit(text, u.Angstrom)


def _duration(text: str) -> str:
    return _unit(text, u.s)


def _unit(text: str, like: u.Unit) -> str:
    try:
        u.Unit(text).to(like)
    except (ValueError, TypeError) as failure:
        raise ValueError(f"{text!r} is no unit of {like.physical_type}, as {like} is") from failure
    return text


def _moment(value: object) -> str:
    """YAML makes a date of what looks like one, and a number of what looks like a time of day."""
    if isinstance(value, datetime.datetime):
        if value.tzinfo is not None:
            value = value.astimezone(datetime.UTC).replace(tzinfo=None)
        return value.isoformat()
    if isinstance(value, datetime.date):
        return value.isoformat()
    if not isinstance(value, str):
        raise ValueError('no date and time such as 2014-09-06T15:27:24.3 (a time of day needs "quotes")')
    return value


def _pair(value: object) -> object:
    return [value, value] if isinstance(value, int | float) else value


LengthUnit = Annotated[str, AfterValidator(_length)]
TimeUnit = Annotated[str, AfterValidator(_duration)]
Moment = Annotated[str, BeforeValidator(_moment)]
Pair = tuple[FiniteFloat, FiniteFloat]


class Statement(BaseModel):
    """A part of a description; keys that are not known are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    WAYS: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Ways to state the same thing, of which one has to be taken: all keys of each."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        taken = [keys for keys in self._ways() if any(map(self._is_given, keys))]
        if len(taken) != min(1, len(self._ways())):
            ways = "; or ".join(" and ".join(keys) for keys in self.WAYS)
            found = ", ".join(key for keys in taken for key in keys if self._is_given(key))
            raise ValueError(f"stated by {found or 'nothing'}, not in one way of: {ways}")
        missing = [key for keys in taken if keys in self.WAYS for key in keys if not self._is_given(key)]
        if missing:
            raise ValueError(f"{' and '.join(missing)} missing")
        return self

    def _ways(self) -> tuple[tuple[str, ...], ...]:
        return self.WAYS

    def _is_given(self, key: str) -> bool:
        return getattr(self, key) not in (None, False)


class Located(Statement):
    """Numbers that may stand in a file: the cube's own, or another one."""

    file: str | None = None
    """Another file than the cube's own, its path from the description's folder: FITS, NetCDF, an IDL save
    file, or text (numbers or times, separated by white space)."""
    hdu: str | int | None = None
    """Of a FITS file: name or number of the HDU; of another file than the cube's, the first that holds
    anything if left out."""
    column: str | None = None
    """Of a FITS table: the column."""
    variable: str | None = None
    """Of a NetCDF or IDL save file: the variable."""

    def _ways(self) -> tuple[tuple[str, ...], ...]:
        return (*self.WAYS, ("file", "hdu", "column", "variable"))


class Wavelengths(Located):
    """Wavelengths, in the order in which the cube has them: values, or start and step, or those of a header,
    or those that stand in a file, hdu or variable."""

    WAYS: ClassVar[tuple[tuple[str, ...], ...]] = (("values",), ("start", "step"), ("header",))

    unit: LengthUnit
    """Their unit, such as Angstrom or nm."""
    medium: Medium
    """What they are measured in: ``vacuum`` or ``air``."""
    values: tuple[FiniteFloat, ...] | None = None
    """The wavelengths themselves."""
    start: FiniteFloat | None = None
    """The first wavelength."""
    step: FiniteFloat | None = None
    """From one wavelength to the next; negative if they decrease."""
    header: bool = False
    """As CRVAL, CRPIX and CDELT of the wavelength's axis say, in the header of the cube's HDU."""
    first_pixel: Literal[0, 1] = 1
    """The number of the first pixel in that header: 1, as FITS has it, or 0 (FISS)."""
    line_centre: FiniteFloat | None = None
    """Where this axis has the line's laboratory wavelength, if not at that wavelength: 0 if it holds offsets
    from the line; 6563 or 8542 in spectfiles, which count from the prefilter's nominal wavelength."""


class Times(Located):
    """Times of the scans, of their middle: values, or start and step, or key, or file, hdu or variable."""

    WAYS: ClassVar[tuple[tuple[str, ...], ...]] = (("values",), ("start", "step"), ("key",))

    values: tuple[Moment, ...] | None = None
    """Date and time of each scan."""
    start: Moment | None = None
    """Date and time of the first scan."""
    step: FiniteFloat | None = None
    """Seconds from one scan to the next."""
    key: str | tuple[str, str] | None = None
    """Card of the cube's FITS header that holds date and time; of two, the first and the last exposure, the
    middle is taken."""
    since: Moment | None = None
    """Date and time (of a date alone, its midnight) from which the numbers in a file count, where they are no
    dates and times themselves."""
    unit: TimeUnit = "s"
    """Unit of those numbers."""
    date: Moment | None = None
    """The date of the first of them, where a file holds times of day only."""
    scale: Literal["utc", "tai"] = "utc"
    """Time scale."""
    offset: FiniteFloat = 0.0
    """Seconds from what is stated to the middle of the scan."""
    duration: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Seconds that a scan takes."""


class Pointing(Statement):
    """Where the pixels lie on the sky: as a header says, or by the other keys."""

    WAYS: ClassVar[tuple[tuple[str, ...], ...]] = (("header",), ("reference_value", "scale"))

    header: bool = False
    """As the helioprojective coordinates (HPLN-TAN, HPLT-TAN) in the header of the cube's HDU say."""
    reference_value: Pair | Annotated[tuple[Pair, ...], Field(min_length=1)] | None = None
    """Helioprojective longitude and latitude of the reference pixel, arcsec; or such a pair for each scan."""
    reference_pixel: Pair | None = None
    """The reference pixel, ``[x, y]``, counted from 0; the frame's middle if left out."""
    scale: Annotated[Pair, BeforeValidator(_pair)] | None = None
    """Size of a pixel, arcsec; ``[x, y]`` where it differs."""
    rotation: FiniteFloat = 0.0
    """Degrees from solar north to the frame's y axis, counter-clockwise (FITS ``CROTA2``)."""


class CavityMap(Located):
    """What has to be added to the wavelengths at each pixel: an image (y, x), or one for each scan."""

    unit: LengthUnit
    """Its unit, such as Angstrom or mAngstrom."""
    factor: FiniteFloat = 1.0
    """What its numbers are multiplied by: -1 if they have to be subtracted."""


class PrefilterCurve(Statement):
    """The prefilter that a reduction has left in, in the form of `pipeline.crisp.instrument.Prefilter`.

    Intensities are divided by it.
    """

    unit: LengthUnit
    """Unit of centre and width."""
    medium: Medium
    """What the centre is measured in: ``vacuum`` or ``air``."""
    centre: FiniteFloat
    """Wavelength of its peak."""
    width: FiniteFloat
    """Full width at half maximum."""
    cavities: FiniteFloat = 2.0
    """Its cavities."""
    slope: FiniteFloat = 0.0
    """Asymmetry, per Angstrom from the line's rest wavelength."""
    cubic: FiniteFloat = 0.0
    """The same, per Angstrom cubed."""


class CubeStatement(Statement):
    """What is stated of a cube of scans of one line, whatever its format."""

    line: Literal["halpha", "ca8542"]
    """The line."""
    wavelength: Wavelengths
    """The wavelengths."""
    time: Times
    """The times."""
    pointing: Pointing
    """The pointing."""
    unit: str
    """Unit of the intensities: ``DN``; such as ``W m-2 Hz-1 sr-1``; ``continuum`` of ones relative to the
    quiet Sun's continuum near their own line at the disc's centre; ``""`` of ones relative to anything else,
    which has to be the same for both lines."""
    stokes: tuple[Literal["I", "Q", "U", "V"], ...] | None = None
    """The Stokes parameters that the cube has, in its order; intensity alone if left out."""
    padding: Literal["none", "nan", "constant"] | FiniteFloat | None = None
    """What surrounds the field: nothing, NaN, one value at each wavelength, or this number (in `unit`,
    wherever it stands); left out, the field is searched for."""
    saturation: FiniteFloat | None = None
    """Intensity at which the detector saturates, in `unit`; left out, the largest that integers can hold."""
    cavity_map: CavityMap | None = None
    """Wavelengths that differ from pixel to pixel."""
    prefilter: PrefilterCurve | None = None
    """The prefilter, if it is still in the intensities."""


Model = TypeVar("Model", bound=BaseModel)


def load(path: Path, model: type[Model], example: str) -> Model:
    """Read a description.

    Parameters
    ----------
    path : Path
        The YAML file.
    model : type
        What it has to state.
    example : str
        A whole one, for the error.

    Raises
    ------
    InputError
        It cannot be read, or states something else: every key that is missing, unknown or wrong is named.
    """
    try:
        stated = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError, OverflowError) as failure:
        raise InputError(
            "the description cannot be read",
            where=path,
            found=str(failure).replace("\n", " "),
            expected=f"YAML, for example\n{_indented(example)}",
            remedy="mend it",
        ) from failure
    try:
        return model.model_validate(stated)
    except ValidationError as failure:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'the whole'}: "
            + WORDS.get(fault["type"], fault["msg"].removeprefix("Value error, "))
            + ("" if fault["type"] in ("missing", "value_error") else f" (found {fault['input']!r:.60})")
            for fault in failure.errors()
        ]
        if len(faults) > LISTED:
            faults[LISTED:] = [f"and {len(faults) - LISTED} more"]
        raise InputError(
            "the description does not state what it has to",
            where=path,
            found="\n    ".join(["", *faults]),
            expected=f"for example\n{_indented(example)}",
            remedy="mend these keys",
        ) from failure


def _indented(example: str) -> str:
    return "\n".join(f"    {line}" for line in example.strip().split("\n"))
