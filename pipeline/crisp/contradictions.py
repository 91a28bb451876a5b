"""What FITS and NetCDF files say of themselves, held against what a description states: they may not differ.

What a file does not say, or says in words that nobody defined, is not compared. Where the file is wrong the
description overrules it: `pipeline.crisp.generic.FileStatement.overrides` names the keys that are right.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import astropy.units as u
import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from numpy.typing import NDArray

from pipeline.crisp import fits_files
from pipeline.crisp.axes import Axis, Stored
from pipeline.crisp.cube import COUNTS
from pipeline.crisp.described import DescribedCube
from pipeline.crisp.headers import (
    FILTER,
    MEDIUM_CARDS,
    MEDIUM_OF_REFERENCE,
    OFF,
    other_line,
    wavelength_stated,
)
from pipeline.crisp.netcdf_files import NetcdfArray
from pipeline.crisp.scan import LINES, NEAR, Frame, Scan
from pipeline.crisp.statements import CONTINUUM
from pipeline.errors import InputError

SPECTRAL = ("WAVE", "AWAV", "FREQ", "ENER", "WAVN", "VRAD", "VOPT", "ZOPT", "VELO", "BETA")
TYPES: dict[Axis, tuple[str, ...]] = {
    "x": ("HPLN", "SOLARX", "SOLX"),
    "y": ("HPLT", "SOLARY", "SOLY"),
    "wavelength": SPECTRAL,
    "stokes": ("STOKES",),
    "time": ("UTC", "TAI", "TIME"),
}
"""How ``CTYPE`` begins, without punctuation (Greisen et al. 2006, doi:10.1051/0004-6361:20053818; Thompson
2006, doi:10.1051/0004-6361:20054262)."""
DIMENSIONS: dict[Axis, tuple[str, ...]] = {
    "x": ("x", "nx", "lon", "longitude", "hpln"),
    "y": ("y", "ny", "lat", "latitude", "hplt"),
    "wavelength": ("wavelength", "wavelengths", "wave", "lambda", "nw"),
    "stokes": ("stokes", "ns"),
    "time": ("time", "t", "nt"),
}
"""How the names of NetCDF's dimensions end, after the last underscore."""
MEDIUM_OF_TYPE = {"WAVE": "vacuum", "AWAV": "air"}
NAMES = ("standard_name", "long_name")
WAVELENGTH_CARDS = ("WAVELNTH", "LINEWAV", "WAVELEN", "WAVE_LEN", "WAVELENGTH", "WAVE", "TWAVE1")
"""The line's wavelength: by SOLARNET's recommendations (https://pypi.org/project/solarnet-metadata) and by
DKIST's (SPEC-214, https://pypi.org/project/dkist-fits-specifications); in FISS', TRACE's and CHASE's headers;
and in others. Where they hold words, these may name a line."""
DEFINED = WAVELENGTH_CARDS[:2]
"""Those whose definition says that they are wavelengths, and in which units: they need not be near a line."""
LINE_CARDS = ("WDESC1", "EXTNAME", "FILTER", "FILTER1", "WAVEBAND", "SPECLINE")
OTHER_LINES = (
    3933.7, 3968.5, 4340.5, 4861.3, 5172.7, 5183.6, 5250.2, 5434.5, 5576.1, 5875.6, 5890.0, 5895.9, 6149.3,
    6173.3, 6302.0, 6767.8, 7090.4, 7699.0, 8498.0, 8662.1, 10830.3, 15648.5,
)  # fmt: skip
"""What instruments for the Sun observe besides, Angstrom: a number near one of them is no other quantity."""
DATES = ("DATE-OBS", "DATE-BEG", "DATE-AVG", "DATE-END")
DAY = np.timedelta64(1, "D")
WHILE = np.timedelta64(5, "m")  # time scales, and what part of a scan its time is, make less than that
ALIKE = 0.01  # sizes of pixels: a thousand of them are ten pixels off
TURNED = 1.0  # degrees: at the end of a thousand pixels twenty
ELSEWHERE = 10.0  # arcsec: what telescopes' pointing is off by, and drifts in a series, is less


class Contradiction(NamedTuple):
    """A key of the description, what is wrong, what the file says, and what is stated."""

    key: str
    problem: str
    said: object
    stated: object


def check_file(cube: DescribedCube, stored: Stored) -> None:
    """Hold line, unit, axes and wavelengths of a file against what is stated of it.

    Parameters
    ----------
    cube : DescribedCube
        The cube and what is stated of it.
    stored : Stored
        Its array.

    Raises
    ------
    InputError
        They differ, and the description does not say that it is right.
    """
    if isinstance(stored, NetcdfArray):
        _check(cube, _of_netcdf(cube, stored))
    if cube.headers:
        _check(cube, _of_header(cube, cube.headers[0]))
    _check(cube, _of_units(cube))


def check_scans(cube: DescribedCube, stored: Stored, scans: Sequence[Scan]) -> None:
    """Hold pixels, pointing and times of a file against those of the scans that were made of it.

    Pixels have the same size and run the same way, to a degree; the reference pixel lies within 10 arcsec.
    Dates in FITS headers are a day apart at most, times in NetCDF files five minutes.

    Parameters
    ----------
    cube : DescribedCube
        The cube and what is stated of it.
    stored : Stored
        Its array.
    scans : sequence of Scan
        Its scans.

    Raises
    ------
    InputError
        They differ, and the description does not say that it is right.
    """
    first, last = min(scan.time for scan in scans), max(scan.time for scan in scans)
    frames = [scan.frame for scan in scans]
    if isinstance(stored, NetcdfArray):
        _check(cube, _of_coordinates(cube, stored, frames[0]))
        _check(cube, _of_moments(cube, stored, first, last))
    if cube.headers:
        _check(cube, _of_pixels(cube, cube.headers[0], frames))
    _check(cube, _of_dates(cube, first, last))


def _check(cube: DescribedCube, contradictions: Iterable[Contradiction]) -> None:
    for key, problem, said, stated in contradictions:
        part = key.partition(".")[0]
        if part not in cube.overrides:
            raise InputError(
                problem,
                where=cube.file,
                found=f"{said}, in the file",
                expected=f"{stated}, as stated in {cube.description}",
                remedy=f"mend `{cube.key}{key}` in {cube.description}; or, if it is the file that is wrong, "
                f"add `overrides: [{part}]` to the cube's other keys there",
            )


def _of_header(cube: DescribedCube, header: fits.Header) -> Iterator[Contradiction]:
    stated = cube.statement
    unit = _card(header, "BUNIT")
    if _differ(unit, stated.unit):
        yield Contradiction("unit", "the header has another unit", f"BUNIT = {unit!r}", repr(stated.unit))
    for axis in cube.axes:
        card = f"CTYPE{cube.fits_number(axis)}"
        kind = _card(header, card)
        letters = re.sub("[^A-Z]", "", kind.upper())
        found = next((name for name, starts in TYPES.items() if letters.startswith(starts)), axis)
        if found != axis:
            yield Contradiction("axes", "the header has other axes", f"{card} = {kind!r}", _listed(cube))
    yield from _of_line(cube, header)
    yield from _of_wavelengths(cube, header)


def _of_line(cube: DescribedCube, header: fits.Header) -> Iterator[Contradiction]:
    """Cards that name another line, or its wavelength."""
    line = cube.statement.line
    for card in WAVELENGTH_CARDS:
        stated = _wavelength(header, card, cube.file)
        if stated is not None and abs(stated - LINES[line].rest_wavelength) > FILTER:
            said = f"{card} = {header[card]!r}"
            yield Contradiction("line", "the header has another wavelength", said, line)
    least, most = (_wavelength(header, card, cube.file) for card in ("WAVEMIN", "WAVEMAX"))
    rest = LINES[line].rest_wavelength
    if least is not None and most is not None and not least - FILTER < rest < most + FILTER:
        said = f"WAVEMIN, WAVEMAX = {header['WAVEMIN']!r}, {header['WAVEMAX']!r}"
        yield Contradiction("line", "the header has other wavelengths", said, line)
    words = [card for card in WAVELENGTH_CARDS if not _is_number(_card(header, card))]
    for card in (*LINE_CARDS, *words):
        if other_line(_card(header, card), line):
            said = f"{card} = {header[card]!r}"
            yield Contradiction("line", "the header names another line", said, line)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _wavelength(header: fits.Header, card: str, where: object) -> float | None:
    """The wavelength in a card, Angstrom; None if it has none, or one in a unit that is not known."""
    try:
        number = float(_card(header, card))
        if not 0.0 < number < np.inf:  # zero: it is not stated
            return None
        unit = re.match(r"\s*\[(.*?)\]", header.comments[card])
        if unit is not None:  # as FITS has it
            return number * float(u.Unit({"A": "Angstrom"}.get(unit[1], unit[1])).to(u.Angstrom))
        stated = wavelength_stated(header, number, where)
    except (ValueError, TypeError, InputError):
        return None
    lines = (*OTHER_LINES, *(line.rest_wavelength for line in LINES.values()))
    known = card in DEFINED or "WAVEUNIT" in header or np.min(np.abs(np.subtract(lines, stated))) < NEAR
    return stated if known else None


def _of_wavelengths(cube: DescribedCube, header: fits.Header) -> Iterator[Contradiction]:
    stated, number = cube.statement.wavelength, cube.fits_number("wavelength")
    kind, unit = _card(header, f"CTYPE{number}"), _card(header, f"CUNIT{number}")
    said = f"CTYPE{number} = {kind!r}"
    medium = MEDIUM_OF_TYPE.get(kind.upper().partition("-")[0])
    references = [(card, _card(header, card)) for card in MEDIUM_CARDS]
    for found, card in (
        (medium, said),
        *((MEDIUM_OF_REFERENCE.get(text.lower()), f"{card} = {text!r}") for card, text in references),
    ):
        if found not in (None, stated.medium):
            yield Contradiction(
                "wavelength.medium", f"the header's wavelengths are in {found}", card, stated.medium
            )
    if not stated.header:
        if kind.upper() in MEDIUM_OF_TYPE:
            yield from _of_other_wavelengths(cube, said)
        return
    if kind and kind.upper() not in MEDIUM_OF_TYPE:
        yield Contradiction(
            "wavelength.header",
            "the header's axis is none of wavelengths at even steps",
            said,
            "WAVE or AWAV; or the wavelengths themselves (values, or where they are)",
        )
    if unit and _differ(unit, stated.unit):
        yield Contradiction(
            "wavelength.unit", "the header has another unit", f"CUNIT{number} = {unit!r}", stated.unit
        )
    others = [
        f"{matrix}{one}_{two}"
        for matrix in ("PC", "CD")
        for other in range(1, len(cube.axes) + 1)
        for one, two in ((number, other), (other, number))
        if other != number
    ]
    mixed = [card for card in others if header.get(card, 0.0) != 0.0]
    if mixed:
        yield Contradiction(
            "wavelength.header",
            "the header's wavelengths depend on other axes",
            ", ".join(f"{card} = {header[card]}" for card in mixed),
            "one wavelength for each image",
        )


def _of_other_wavelengths(cube: DescribedCube, said: str) -> Iterator[Contradiction]:
    """A header's wavelengths beside those that are stated, which may be known better, or at uneven steps."""
    found, axis = cube.wavelengths_of_header(), cube.wavelengths()
    if found is None:
        return
    text = f"{said}: {found[0]:.2f} to {found[-1]:.2f} Angstrom"
    if np.abs(found - axis).min() > FILTER:
        yield Contradiction("wavelength", "the header has other wavelengths", text, _ends(axis))
    elif np.abs(found[::-1] - axis).max() < OFF <= np.abs(found - axis).max():
        yield Contradiction("wavelength", "the header's wavelengths run the other way", text, _ends(axis))


def _ends(axis: NDArray[np.float64]) -> str:
    return f"{axis[0]:.2f} to {axis[-1]:.2f} Angstrom"


def _of_units(cube: DescribedCube) -> Iterator[Contradiction]:
    """Units of the arrays that wavelengths, times and cavity errors stand in."""
    stated = cube.statement
    for key, part, unit in (
        ("wavelength", stated.wavelength, stated.wavelength.unit),
        ("time", stated.time, stated.time.unit),
        ("cavity_map", stated.cavity_map, stated.cavity_map.unit if stated.cavity_map else ""),
    ):
        said = cube.unit_said(part) if part is not None else ""
        if _differ(said, unit):
            yield Contradiction(f"{key}.unit", "what it refers to has another unit", repr(said), unit)


def _of_pixels(cube: DescribedCube, header: fits.Header, frames: Sequence[Frame]) -> Iterator[Contradiction]:
    if cube.statement.pointing.scale is None:
        return
    numbers = [cube.fits_number("x"), cube.fits_number("y")]
    planes = [_plane(cube, header, numbers, unit) for unit in (u.arcsec, u.deg)]
    found = [plane for plane in planes if plane is not None]
    if not found:
        return
    stated = frames[0].matrix
    scale = " x ".join(f"{size:g}" for size in cube.statement.pointing.scale)
    cards = [f"{name}{n}" for n in numbers for name in ("CDELT", "CUNIT")]
    cards += [f"{matrix}{one}_{two}" for matrix in ("PC", "CD") for one in numbers for two in numbers]
    said = ", ".join(f"{card} = {header[card]!r}" for card in cards if card in header)
    sizes = np.hypot(*stated)
    alike = [plane for plane in found if np.allclose(np.hypot(*plane.matrix), sizes, rtol=ALIKE, atol=0.0)]
    if not alike:
        yield Contradiction(
            "pointing.scale", "the header's pixels have another size", said, f"{scale} arcsec"
        )
    axes: tuple[Axis, ...] = ("x", "y")
    kinds = [re.sub("[^A-Z]", "", _card(header, f"CTYPE{number}").upper()) for number in numbers]
    if not all(not kind or kind.startswith(TYPES[axis]) for kind, axis in zip(kinds, axes, strict=True)):
        return
    for axis, own, other in zip(axes, found[0].matrix.T, stated.T, strict=True):
        if own @ other < 0.0:
            yield Contradiction(
                "pointing.scale",
                f"the header's {axis} runs the other way",
                said,
                f"{scale} arcsec; a negative size, or a rotation, says which way",
            )
    beside = [f"{matrix}{one}_{two}" for matrix in ("PC", "CD") for one, two in (numbers, numbers[::-1])]
    turn = f"CROTA{numbers[1]}"  # of the latitude's axis, which is not always the second
    # Where the header turns nothing, it may be that nobody has told it.
    if any(header.get(card, 0.0) != 0.0 for card in (*beside, turn)):
        apart = max(_angle(own, other) for own, other in zip(found[0].matrix.T, stated.T, strict=True))
        if apart > TURNED:
            yield Contradiction(
                "pointing.rotation",
                "the header's frame is turned otherwise",
                said + (f", {turn} = {header[turn]!r}" if turn in header else ""),
                f"{cube.statement.pointing.rotation:g} degrees, {apart:.1f} from that",
            )
    places = [plane.place(frames[0].reference_pixel) for plane in alike]
    known = [place for place in places if place is not None]
    away = [np.hypot(*np.subtract(place, frame.reference_value)) for place in known for frame in frames]
    if away and not min(away) <= ELSEWHERE:
        yield Contradiction(
            "pointing.reference_value",
            "the header points elsewhere",
            f"{min(away):.0f} arcsec away: "
            + ", ".join(
                f"{name}{n} = {header[f'{name}{n}']!r}" for n in numbers for name in ("CRPIX", "CRVAL")
            ),
            f"{cube.statement.pointing.reference_value} arcsec",
        )


def _angle(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    cosine = one @ other / (np.hypot(*one) * np.hypot(*other))
    return float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))


class _Plane(NamedTuple):
    """What a header's pixels are on the sky, arcsec: the steps along x and y, and its reference point."""

    matrix: NDArray[np.float64]
    reference_pixel: NDArray[np.float64]
    reference_value: NDArray[np.float64] | None

    def place(self, pixel: tuple[float, float]) -> NDArray[np.float64] | None:
        """Where a zero-based pixel lies, but for the sphere's curvature; None if the header does not say."""
        if self.reference_value is None:
            return None
        return self.reference_value + self.matrix @ (np.array(pixel) + 1.0 - self.reference_pixel)


def _plane(
    cube: DescribedCube, header: fits.Header, numbers: list[int], default: u.UnitBase
) -> _Plane | None:
    """Place of the pixels along x and y, where the header's unit is `default` if none is there.

    None if the header does not say: no cards, no angles, or ones without a unit, as templates have.
    """
    units = [_card(header, f"CUNIT{number}") for number in numbers]
    steps = [header.get(f"CDELT{n}", header.get(f"CD{n}_{n}")) for n in numbers]
    if None in steps or (not all(units) and all(step in (0.0, 1.0) for step in steps)):
        return None
    try:
        wcs = cube.sky(named=False)
        # wcslib makes degrees of what it knows to be angles on the sky, where the header has their unit
        found = [str(unit) if said else str(default) for unit, said in zip(wcs.wcs.cunit, units, strict=True)]
        factors = np.array([u.Unit(unit).to(u.arcsec) for unit in found])
        matrix = factors[:, None] * np.asarray(wcs.pixel_scale_matrix)
        value = factors * np.asarray(wcs.wcs.crval)
    except Exception:  # wcslib's, of many kinds: coordinates that cannot be read say nothing
        return None
    stated = all(f"{name}{n}" in header for n in numbers for name in ("CRPIX", "CRVAL")) and value.any()
    turn = u.cycle.to(u.arcsec)
    value = (value + 0.5 * turn) % turn - 0.5 * turn
    return _Plane(matrix, np.asarray(wcs.wcs.crpix), value if stated else None)


def _of_dates(cube: DescribedCube, first: np.datetime64, last: np.datetime64) -> Iterator[Contradiction]:
    for header in cube.headers:
        for card in DATES:
            try:
                moment = fits_files.utc(fits_files.dated(header, card), "utc", cube.file, card)
            except InputError:
                continue
            if not first - DAY <= moment <= last + DAY:
                yield Contradiction(
                    "time", "the header has another date", f"{card} = {header[card]!r}", f"{first} to {last}"
                )


def _of_netcdf(cube: DescribedCube, stored: NetcdfArray) -> Iterator[Contradiction]:
    stated = cube.statement
    unit = stored.attribute("units")
    if _differ(unit, stated.unit):
        yield Contradiction("unit", "the variable has another unit", f"units = {unit!r}", repr(stated.unit))
    for said in (f"variable: {stored.name}", *(f"{key} = {stored.attribute(key)!r}" for key in NAMES)):
        if other_line(said, stated.line):
            yield Contradiction("line", "the variable is of another line", said, stated.line)
    for axis, name in zip(cube.axes, stored.dims, strict=True):
        last = re.split("[^a-z]", name.lower())[-1]
        found = next((kind for kind, names in DIMENSIONS.items() if last in names), axis)
        if found != axis:
            yield Contradiction("axes", "the variable has other axes", ", ".join(stored.dims), _listed(cube))
    dimension = stored.dims[cube.axes.index("wavelength")]
    of_the_cube = stated.wavelength.variable if stated.wavelength.file is None else None
    axis_of = stored.beside(of_the_cube or dimension, absolute=of_the_cube is not None)
    if axis_of is None:
        return
    for attribute in NAMES:
        text = axis_of.attribute(attribute)
        medium = re.search(r"(?:\b|_)(air|vacuum)(?:\b|_)", text.lower())
        if medium is not None and medium[1] != stated.wavelength.medium:
            yield Contradiction(
                "wavelength.medium",
                f"the file's wavelengths are in {medium[1]}",
                f"{attribute} = {text!r}",
                stated.wavelength.medium,
            )


def _of_coordinates(cube: DescribedCube, stored: NetcdfArray, frame: Frame) -> Iterator[Contradiction]:
    pixels: tuple[Axis, ...] = ("x", "y") if cube.statement.pointing.scale is not None else ()
    for axis, stated in zip(pixels, np.diag(frame.matrix) if pixels else (), strict=True):
        name = stored.dims[cube.axes.index(axis)]
        step = _spacing(stored.beside(name))
        if step is None:
            continue
        said = f"{name}: {step:g} arcsec from one to the next"
        scale = abs(frame.scale[pixels.index(axis)])
        if not np.isclose(abs(step), scale, rtol=ALIKE, atol=0.0):
            yield Contradiction(
                "pointing.scale", "the file's pixels have another size", said, f"{scale:g} arcsec"
            )
        if step * stated < 0.0:
            yield Contradiction(
                "pointing.scale",
                f"the file's {axis} runs the other way",
                said,
                f"{stated:+.3g} arcsec; a negative size, or a rotation, says which way",
            )


def _of_moments(
    cube: DescribedCube, stored: NetcdfArray, first: np.datetime64, last: np.datetime64
) -> Iterator[Contradiction]:
    name = stored.dims[cube.axes.index("time")] if "time" in cube.axes else "time"
    coordinate = stored.beside(name)
    if coordinate is None or not coordinate.has_moments:
        return
    try:
        moments = coordinate.moments()
    except InputError:
        return
    if moments.dtype.kind != "M" or np.isnat(moments).all():
        return
    earliest, latest = np.nanmin(moments), np.nanmax(moments)
    if earliest < first - WHILE or latest > last + WHILE:
        yield Contradiction(
            "time", "the file has other times", f"{name}: {earliest} to {latest}", f"{first} to {last}"
        )


def _spacing(coordinate: NetcdfArray | None) -> float | None:
    """From one coordinate along an axis to the next, arcsec; None if they are no angles."""
    if coordinate is None or len(coordinate.shape) != 1 or coordinate.dtype.kind not in "iuf":
        return None
    unit = _unit(coordinate.attribute("units"))
    if unit is None or unit.physical_type != "angle" or coordinate.shape[0] < 2:
        return None
    return float(np.median(np.diff(coordinate[:].astype(np.float64))) * unit.to(u.arcsec))


def _card(header: fits.Header, card: str) -> str:
    return str(header.get(card, "")).strip()


def _listed(cube: DescribedCube) -> str:
    return f"axes: [{', '.join(cube.axes)}]"


def _differ(said: str, stated: str) -> bool:
    """Whether units are of other kinds or scales; not if nothing is said, or in no words that are known."""
    unit, other = _unit(said) if said else None, _unit(stated)
    if unit is None or other is None:
        return False
    try:
        return bool(abs(unit.to(other) - 1.0) > 1e-9)
    except (ValueError, TypeError):
        return True


def _unit(text: str) -> u.UnitBase | None:
    text = COUNTS.get(text.strip().lower(), text)
    if text == CONTINUUM:
        return u.dimensionless_unscaled
    for word in (text, text.removesuffix("s")):  # CF has degrees and arcseconds
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AstropyWarning)
                return u.Unit(word)
        except (ValueError, TypeError):
            continue
    return None
