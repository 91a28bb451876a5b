"""Cubes that a person described (`pipeline.crisp.statements`), as scans: statements and files become one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import astropy.units as u
import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS
from numpy.typing import ArrayLike, NDArray

from pipeline.crisp import arrays, fits_files, netcdf_files, quiet_sun
from pipeline.crisp.axes import Axis, ScanOfArray, Stored
from pipeline.crisp.cube import PER_ANGSTROM, Cube, as_intensities, intensity_scale
from pipeline.crisp.instrument import Prefilter
from pipeline.crisp.scan import LINES, NEAR, Frame, Scan, vacuum_axis
from pipeline.crisp.statements import CONTINUUM, CubeStatement, Located, Times
from pipeline.crisp.wavelengths import Medium, air_to_vacuum, to_vacuum, vacuum_to_air
from pipeline.errors import InputError, MisuseError

Moments = NDArray[np.datetime64]

DAY, HALF_A_DAY = np.timedelta64(1, "D"), np.timedelta64(12, "h")
LEAST_TRANSMISSION = 0.01  # relative to the line's centre: what is left of less is noise
SINGLE = 2.0**-23  # numbers that single precision cannot tell apart, relative
LONGEST = 3.2e9  # s, a century: no count of seconds within an observation is larger


@dataclass(frozen=True)
class DescribedCube:
    """A cube, what is stated of it, and where.

    Attributes
    ----------
    file : Path
        The cube's own file.
    description : Path
        The YAML.
    statement : CubeStatement
        What it states of this cube.
    key : str
        Where in the YAML that stands: ``""``, or such as ``"cubes.0."``.
    axes : tuple of str
        What the cube's axes are, in the order of its array.
    shape : tuple of int
        The array's.
    dtype : numpy.dtype
        The array's.
    headers : tuple of fits.Header
        Of a FITS file: the header of the cube's HDU, then the primary one.
    overrides : tuple of str
        Keys of the statement that are right where the file says otherwise (`pipeline.crisp.contradictions`).
    part : str
        Where in the file its array is, if the statement says so.
    """

    file: Path
    description: Path
    statement: CubeStatement
    key: str
    axes: tuple[Axis, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    headers: tuple[fits.Header, ...] = ()
    overrides: tuple[str, ...] = ()
    part: str = ""

    def size(self, axis: Axis) -> int:
        """Size along an axis; 1 along one that the cube does not have."""
        return self.shape[self.axes.index(axis)] if axis in self.axes else 1

    def fits_number(self, axis: Axis) -> int:
        """The number that FITS gives an axis: ``NAXIS1`` is the array's last."""
        return len(self.axes) - self.axes.index(axis)

    def sky(self, named: bool = True) -> WCS:
        """Coordinates of x and y, as the header of the cube's HDU has them; wcslib's errors are its own.

        Parameters
        ----------
        named : bool
            Whether the header's names of the two axes count; helioprojective ones take their place otherwise,
            for under names that are no angles' wcslib passes over ``CROTAn``.

        Raises
        ------
        InputError
            A card of theirs states no number.
        """
        header = self.headers[0].copy()
        numbers = [self.fits_number("x"), self.fits_number("y")]
        fits_files.check_sky(header, numbers, self.file)
        if not named:
            header.update(
                {f"CTYPE{n}": name for n, name in zip(numbers, ("HPLN-TAN", "HPLT-TAN"), strict=True)}
            )
        for number in range(1, len(self.axes) + 1):
            if number not in numbers:  # tables and the like, which nobody asks for
                header.remove(f"CTYPE{number}", ignore_missing=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyWarning)
            wcs = WCS(header).sub(numbers)
            wcs.wcs.set()
        return wcs

    @property
    def sidecars(self) -> tuple[str, ...]:
        """The description, and every other file that it names."""
        parts = (self.statement.wavelength, self.statement.time, self.statement.cavity_map)
        named = [self._file(part) for part in parts if part is not None and part.file is not None]
        return tuple(dict.fromkeys(map(str, (self.description, *named))))

    def scans(self, format: str, medium: Medium | None, first: int = 0) -> tuple[Scan, ...]:
        """Describe the cube's scans.

        Parameters
        ----------
        format : str
            Name of the reader.
        medium : {"vacuum", "air"}, optional
            What the caller says of the wavelengths: the description may not say otherwise.
        first : int
            Index of the first of them.

        Raises
        ------
        InputError
            The description contradicts the cube, or what it refers to is not there.
        """
        stated = self.statement
        self._check_stokes()
        axis, _ = self._wavelengths()
        self._check_line(axis)
        vacuum, found, stated_by = vacuum_axis(
            axis, (stated.wavelength.medium, "file"), medium, str(self.file)
        )
        try:
            units, factors = self._intensity_scale(vacuum)
        except InputError as failure:
            self.refuse("unit", failure.problem, failure.found, failure.expected)
        factors = factors / self._prefilter(vacuum)
        times = self._times()
        frames = self._frames()
        if stated.cavity_map is not None:
            self._shift(0)
        padding = "nan" if isinstance(stated.padding, float) else stated.padding
        return tuple(
            Scan(
                path=str(self.file),
                format=format,
                index=first + index,
                part=self.part,
                line=stated.line,
                time=middle,
                begin=begin,
                end=end,
                wavelength=tuple(vacuum.tolist()),
                medium=found,
                medium_stated_by=stated_by,
                shape=(self.size("y"), self.size("x")),
                units=units,
                units_of_file=stated.unit,
                saturation=_brightest(self._saturation(), factors),
                frame=frame,
                padding=padding,
                has_wavelength_shift=stated.cavity_map is not None,
                sidecars=self.sidecars,
            )
            for index, ((begin, middle, end), frame) in enumerate(zip(times, frames, strict=True))
        )

    def stated_wavelengths(self) -> int | None:
        """How many wavelengths are stated; None where their number is that of the images."""
        stated = self.statement.wavelength
        if stated.values is not None:
            return len(stated.values)
        if stated.start is not None or stated.header:
            return None
        return self._numbers("wavelength", stated, "spect_pos").size

    def wavelengths_of_header(self) -> NDArray[np.float64] | None:
        """What the header says of the wavelengths, Angstrom, in the cube's order; None if it says nothing."""
        unit = str(self.headers[0].get(f"CUNIT{self.fits_number('wavelength')}", "")).strip()
        try:
            return self._header_axis() * float(u.Unit(unit).to(u.Angstrom))
        except (InputError, ValueError, TypeError):
            return None

    def wavelengths(self) -> NDArray[np.float64]:
        """The wavelengths that are stated, Angstrom, in their medium and in the cube's order."""
        axis, order = self._wavelengths()
        return axis[np.argsort(order)]

    def cube(self, stored: Stored, index: int, scan: Scan) -> Cube:
        """The intensities of one of the scans, in its units.

        Parameters
        ----------
        stored : Stored
            The whole array.
        index : int
            Which scan of this cube.
        scan : Scan
            Its description.
        """
        stokes = self.statement.stokes or ("I",)
        _, order = self._wavelengths()
        cube: Cube = ScanOfArray(stored, self.axes, {"time": index, "stokes": stokes.index("I")}, order)
        step, zero, blank = self._scaling()
        vacuum = np.array(scan.wavelength)
        factors = self._intensity_scale(vacuum)[1] / self._prefilter(vacuum)
        full = None
        scaled = (step, zero) != (1.0, 0.0) or not np.all(factors == 1.0)
        if np.isfinite(scan.saturation) and step > 0.0 and scaled:
            full = ((self._saturation() - zero) / step, scan.saturation)
        padding = None
        if isinstance(self.statement.padding, float):
            padding = (self.statement.padding, self._as_near(stored, step))
        return as_intensities(cube, factors, step, zero, blank, full, padding)

    def _as_near(self, stored: Stored, step: float) -> float:
        """What numbers may differ from a stated one to be the same: half a step, where they are integers."""
        if isinstance(stored, netcdf_files.NetcdfArray):
            step = stored.step
        elif stored.dtype.kind == "f":
            step = 0.0
        assert isinstance(self.statement.padding, float)
        return max(0.5 * abs(step), SINGLE * abs(self.statement.padding))

    def wavelength_shift(self, index: int) -> NDArray[np.float64] | None:
        """What has to be added to the wavelengths in vacuum at each pixel (y, x), Angstrom."""
        if self.statement.cavity_map is None:
            return None
        shift = self._shift(index)
        if self.statement.wavelength.medium == "vacuum":
            return shift
        middle = vacuum_to_air(LINES[self.statement.line].rest_wavelength)
        return np.asarray(air_to_vacuum(middle + shift) - air_to_vacuum(middle))

    def unit_said(self, part: Located) -> str:
        """The unit that the file says of what stands in it; empty if it says none, or cannot be read."""
        if not any(getattr(part, key) is not None for key in ("file", "hdu", "column", "variable")):
            return ""
        try:
            return arrays.unit(self._file(part), hdu=part.hdu, column=part.column, variable=part.variable)
        except InputError:
            return ""

    def refuse(
        self, key: str, problem: str, found: object, expected: object = None, cause: Exception | None = None
    ) -> NoReturn:
        """Raise an error that names the file and the key of its description."""
        raise InputError(
            problem,
            where=self.file,
            found=found,
            expected=expected,
            remedy=f"mend `{self.key}{key}` in {self.description}",
        ) from cause

    def _file(self, part: Located) -> Path:
        return self.file if part.file is None else self.description.parent / part.file

    def _open(self, key: str, part: Located, default: str | None = None) -> Stored:
        """What stands in a file; `default` is the variable that IDL save files have it in."""
        if part.file is None and self.headers and part.hdu is None:
            self.refuse(key, "the HDU is not named", "another HDU of the cube's own file", "hdu: its name")
        file = self._file(part)
        try:
            return arrays.open_array(
                file, hdu=part.hdu, column=part.column, variable=part.variable or default
            )
        except InputError as failure:
            found = failure.problem if failure.found is None else f"{failure.problem}: {failure.found}"
            self.refuse(
                key, "what it refers to cannot be read", f"{file}: {found}", failure.expected, failure
            )

    def _read(self, key: str, part: Located, default: str | None = None) -> NDArray[Any]:
        """The same, as a list: axes of one element removed."""
        return np.atleast_1d(np.squeeze(np.asarray(self._open(key, part, default)[...])))

    def _numbers(self, key: str, part: Located, default: str | None = None) -> NDArray[np.float64]:
        return self._as_numbers(key, self._read(key, part, default))

    def _as_numbers(self, key: str, values: NDArray[Any]) -> NDArray[np.float64]:
        if values.dtype.kind not in "iuf":
            self.refuse(key, "it refers to something else than numbers", f"{values.dtype}, {values.shape}")
        return values.astype(np.float64)

    def _check_stokes(self) -> None:
        held, stated = self.size("stokes"), self.statement.stokes
        if stated is None and "stokes" in self.axes:
            self.refuse(
                "stokes", "the Stokes parameters are not stated", f"{held} of them", "such as [I, Q, U, V]"
            )
        if stated is not None and (
            len(stated) != held or "I" not in stated or len(set(stated)) < len(stated)
        ):
            self.refuse(
                "stokes", "the Stokes parameters do not fit the cube", f"{list(stated)}, {held} in the cube",
                "each once, I among them",
            )  # fmt: skip

    def _intensity_scale(self, vacuum: NDArray[np.float64]) -> tuple[str, NDArray[np.float64]]:
        stated = self.statement
        if stated.unit != CONTINUUM:
            return intensity_scale(stated.unit, vacuum, str(self.file))
        return PER_ANGSTROM.to_string(), np.full(vacuum.size, quiet_sun.continuum(stated.line))

    def _prefilter(self, vacuum: NDArray[np.float64]) -> NDArray[np.float64]:
        """Transmission of the prefilter that is still in the intensities, relative to the line's centre."""
        stated = self.statement.prefilter
        if stated is None:
            return np.ones(vacuum.size)
        to_angstrom = u.Unit(stated.unit).to(u.Angstrom)
        centre = float(to_vacuum(stated.centre * to_angstrom, stated.medium))
        try:
            prefilter = Prefilter(
                self.statement.line,
                centre,
                stated.width * to_angstrom,
                stated.cavities,
                stated.slope,
                stated.cubic,
            )
        except MisuseError as failure:
            self.refuse("prefilter", failure.problem, failure.found, failure.expected, failure)
        transmission = prefilter.transmission(vacuum)
        if not np.all(transmission > LEAST_TRANSMISSION):
            self.refuse(
                "prefilter",
                "the prefilter lets no light through",
                f"{transmission.min():.2g} at the worst of the wavelengths, relative to the line's centre",
                f"more than {LEAST_TRANSMISSION}",
            )
        return transmission

    def _wavelengths(self) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Wavelengths in their medium, Angstrom, increasing; and the cube's indices in that order."""
        stated = self.statement.wavelength
        points = self.size("wavelength")
        if stated.values is not None:
            axis = np.array(stated.values)
        elif stated.start is not None and stated.step is not None:
            axis = stated.start + stated.step * np.arange(points)
        elif stated.header:
            axis = self._header_axis()
        else:
            axis = self._numbers("wavelength", stated, "spect_pos")
        if axis.shape != (points,):
            self.refuse(
                "wavelength",
                "the wavelengths do not fit the cube",
                f"{' x '.join(map(str, axis.shape))} wavelengths, {points} images",
                "one wavelength for each image",
            )
        to_angstrom = u.Unit(stated.unit).to(u.Angstrom)
        axis = np.asarray(axis * to_angstrom, dtype=np.float64)
        if stated.line_centre is not None:
            rest = LINES[self.statement.line].rest_wavelength
            centre = rest if stated.medium == "vacuum" else float(vacuum_to_air(rest))
            axis = axis - stated.line_centre * to_angstrom + centre
        if not np.all(np.isfinite(axis)) or len(np.unique(axis)) < max(2, points):
            self.refuse(
                "wavelength",
                "the wavelengths are no axis",
                np.array2string(axis, threshold=6, precision=3),
                "two or more, all finite and different",
            )
        order = np.argsort(axis)
        return axis[order], order

    def _header_axis(self) -> NDArray[np.float64]:
        if not self.headers:
            self.refuse("wavelength.header", "there is no FITS header", self.file.name)
        header, stated = self.headers[0], self.statement.wavelength
        number = self.fits_number("wavelength")
        cards = [f"CRVAL{number}", f"CRPIX{number}", f"CDELT{number}"]
        scale = float(header.get(f"PC{number}_{number}", 1.0))
        if f"CD{number}_{number}" in header:  # in place of the two
            cards[2], scale = f"CD{number}_{number}", 1.0
        try:
            value, pixel, step = (float(header[card]) for card in cards)
        except (KeyError, ValueError, TypeError) as failure:
            self.refuse(
                "wavelength.header", "the header has no wavelengths", failure, ", ".join(cards), failure
            )
        axis = value + (np.arange(self.size("wavelength")) + stated.first_pixel - pixel) * scale * step
        return np.asarray(axis, dtype=np.float64)

    def _check_line(self, axis: NDArray[np.float64]) -> None:
        centre, rest = 0.5 * (axis[0] + axis[-1]), LINES[self.statement.line].rest_wavelength
        if not abs(centre - rest) <= NEAR:
            self.refuse(
                "wavelength",
                "the wavelengths are not the line's",
                f"an axis centred on {centre:.2f} Angstrom",
                f"{self.statement.line}, {rest} in vacuum; of offsets from the line, or from a nominal "
                "wavelength, line_centre says from which",
            )

    def _times(self) -> list[tuple[np.datetime64 | None, np.datetime64, np.datetime64 | None]]:
        """Beginning, middle and end of each scan; beginning and end where they are known."""
        stated, scans = self.statement.time, self.size("time")
        half = None if stated.duration is None else _seconds(stated.duration / 2.0)
        if stated.key is not None and not isinstance(stated.key, str):
            first, last = self._moments("time.key", [self._card(key) for key in stated.key])
            moments = np.array([first + (last - first) // 2])
            half = (last - first) // 2 if half is None else half
            if last < first:
                self.refuse("time.key", "the scan ends before it begins", f"{first}, {last}")
        elif stated.key is not None:
            moments = self._moments("time.key", [self._card(stated.key)])
        elif stated.values is not None:
            moments = self._moments("time.values", stated.values)
        elif stated.start is not None and stated.step is not None:
            moments = self._moments("time.start", [stated.start]) + _seconds(stated.step * np.arange(scans))
        else:
            moments = self._moments_of_file(stated)
        moments = moments + _seconds(stated.offset)
        if moments.shape != (scans,) or np.isnat(moments).any():
            self.refuse(
                "time",
                "the times do not fit the cube",
                f"{' x '.join(map(str, moments.shape))} times, {np.isnat(moments).sum()} of them undefined",
                f"{scans}: one for each scan",
            )
        falls = np.flatnonzero(np.diff(moments) <= np.timedelta64(0))
        if falls.size and stated.step is None:
            self.refuse(
                "time",
                "the times do not increase",
                f"{moments[falls[0] + 1]} after {moments[falls[0]]}",
                "those of the scans, one after the other",
            )
        if half is None:
            return [(None, moment, None) for moment in moments]
        return [(moment - half, moment, moment + half) for moment in moments]

    def _card(self, key: str) -> str:
        header = next((header for header in self.headers if key in header), None)
        if header is None:
            self.refuse("time.key", "no such card", "a FITS file" if self.headers else "no FITS header", key)
        scale = str(header.get("TIMESYS", self.statement.time.scale)).strip()
        if scale.lower() != self.statement.time.scale:
            self.refuse("time.scale", "the header has another time scale", f"TIMESYS = {scale!r}")
        return fits_files.dated(header, key)

    def _moments(self, key: str, texts: Sequence[str], days: Sequence[str] | None = None) -> Moments:
        """Moments of texts: dates and times, or times of day, of the stated date or of `days`, one each.

        Times of day of one date that fall by more than half a day are those of the day after, from there on.
        """
        texts = [text.strip().replace(" ", "T") for text in texts]
        of_day = [fits_files.TIME_OF_DAY.fullmatch(text) is not None for text in texts]
        if days is None and self.statement.time.date is not None:
            days = [self.statement.time.date] * len(texts)
        if days is not None:
            texts = [
                f"{day.strip()}T{text}" if short else text
                for day, text, short in zip(days, texts, of_day, strict=True)
            ]
        moments = np.array([self._moment(key, text) for text in texts], dtype="datetime64[ns]")
        if all(of_day) and len(set(days or ())) == 1:
            moments = moments + DAY * np.cumsum(np.diff(moments, prepend=moments[:1]) < -HALF_A_DAY)
        return moments

    def _moment(self, key: str, text: str) -> np.datetime64:
        day, _, time_of_day = text.partition("T")
        if not time_of_day:
            self.refuse(key, "no date and time of day", repr(text), "such as 2014-09-06T15:27:24.3")
        # The pipelines of the SST write dates with points.
        moment = f"{day.replace('.', '-').replace('/', '-')}T{time_of_day}"
        try:
            return fits_files.utc(moment, self.statement.time.scale, self.file, key)
        except InputError as failure:
            self.refuse(key, "no date and time", repr(text), failure.expected, failure)

    def _moments_of_file(self, stated: Times) -> Moments:
        values = self._read("time", stated, "time")
        if values.dtype.kind == "M":
            known = ~np.isnat(values)
            moments = np.full(values.shape, np.datetime64("NaT", "ns"))
            moments[known] = self._moments("time", np.datetime_as_string(values[known]).tolist())
            return moments
        if values.dtype.kind in "iuf":
            if stated.since is None:
                self.refuse(
                    "time.since", "the times are numbers", f"{values[:3]} ...", "since: a date and time"
                )
            seconds = values.astype(np.float64) * u.Unit(stated.unit).to(u.s)
            if not np.all(np.abs(seconds) < LONGEST):
                self.refuse("time", "the times are no times", f"{np.abs(seconds).max():g} s after `since`")
            # They may count from a day, which begins at midnight.
            since = stated.since if "T" in stated.since.replace(" ", "T") else f"{stated.since}T00:00:00"
            return np.asarray(self._moments("time.since", [since]) + _seconds(seconds))
        if values.ndim != 1:
            self.refuse("time", "the times are no list", f"{values.shape}")
        texts = [text.decode("ascii", "replace") if isinstance(text, bytes) else str(text) for text in values]
        return self._moments("time", texts, self._days(stated, texts))

    def _days(self, stated: Times, texts: list[str]) -> list[str] | None:
        """Dates of times of day, which the SST's pipelines keep beside them, in the variable ``date``."""
        of_day = (fits_files.TIME_OF_DAY.fullmatch(text.strip()) for text in texts)
        if stated.date is not None or not any(of_day):
            return None
        if "date" not in arrays.variables(self._file(stated)):
            self.refuse("time.date", "the times have no date", repr(texts[0]), "date: such as 2014-09-06")
        dates = np.asarray(arrays.open_array(self._file(stated), variable="date")[...])
        days = [day.decode("ascii", "replace") if isinstance(day, bytes) else str(day) for day in dates.flat]
        days = days * len(texts) if len(days) == 1 else days
        if len(days) != len(texts):
            self.refuse("time", "dates and times do not fit", f"{len(days)} dates, {len(texts)} times")
        return days

    def _frames(self) -> list[Frame]:
        stated, scans = self.statement.pointing, self.size("time")
        if stated.header:
            return [self._header_frame()] * scans
        assert stated.reference_value is not None
        assert stated.scale is not None
        values = stated.reference_value
        pairs = values if isinstance(values[0], tuple) else (values,) * scans
        if len(pairs) != scans:
            self.refuse(
                "pointing.reference_value", "the pointing does not fit", f"{len(pairs)}, {scans} scans"
            )
        (x, y), angle = stated.scale, np.deg2rad(stated.rotation)
        if x == 0.0 or y == 0.0:
            self.refuse("pointing.scale", "pixels have a size", stated.scale)
        cosine, sine = float(np.cos(angle)), float(np.sin(angle))
        middle = ((self.size("x") - 1) / 2.0, (self.size("y") - 1) / 2.0)
        return [
            Frame(
                stated.reference_pixel or middle,
                pair,
                (x, y),
                ((cosine, -sine * y / x), (sine * x / y, cosine)),
            )
            for pair in pairs
        ]

    def _header_frame(self) -> Frame:
        if not self.headers:
            self.refuse("pointing.header", "there is no FITS header", self.file.name)
        numbers = [self.fits_number("x"), self.fits_number("y")]
        needed = [
            ("CDELT{0}", *(f"{matrix}{{0}}_{other}" for matrix in ("CD", "PC") for other in numbers)),
            ("CRPIX{0}",),
            ("CRVAL{0}",),
        ]
        missing = [
            names[0].format(number)
            for names in needed
            for number in numbers
            if not any(name.format(number) in self.headers[0] for name in names)
        ]
        try:
            wcs = self.sky()
            types = list(wcs.wcs.ctype)
            shape = (self.size("y"), self.size("x"))
            frame = Frame.from_wcs(wcs, shape, self.file) if types == ["HPLN-TAN", "HPLT-TAN"] else None
        except InputError:
            raise
        except Exception as failure:  # wcslib's, of many kinds
            fault = fits_files.wcs_fault(failure)
            self.refuse("pointing.header", "the header's coordinates cannot be read", fault, None, failure)
        if frame is None:
            self.refuse(
                "pointing.header",
                "the header has no helioprojective coordinates",
                f"CTYPE{numbers[0]}, CTYPE{numbers[1]} = {types}",
                "HPLN-TAN, HPLT-TAN; or the other keys stated",
            )
        if missing:  # FITS takes 0 or 1 for them
            self.refuse(
                "pointing.header",
                "the header's pointing is missing",
                f"no {', '.join(missing)}",
                "CRPIX, CRVAL and CDELT of both axes; or the other keys stated",
            )
        return frame

    def _shift(self, index: int) -> NDArray[np.float64]:
        stated = self.statement.cavity_map
        assert stated is not None
        maps = self._open("cavity_map", stated)
        several, frame = maps.shape[:-2], (self.size("y"), self.size("x"))
        if maps.shape[-2:] != frame or prod(several) not in (1, self.size("time")):
            self.refuse(
                "cavity_map", "the map does not fit the cube", maps.shape, f"{frame} (y, x), or one a scan"
            )
        image = maps[(*np.unravel_index(min(index, prod(several) - 1), several), slice(None), slice(None))]
        values = self._as_numbers("cavity_map", np.asarray(image))
        return np.asarray(values * stated.factor * u.Unit(stated.unit).to(u.Angstrom))

    def _scaling(self) -> tuple[float, float, int | None]:
        return fits_files.scaling(self.headers[0], self.file) if self.headers else (1.0, 0.0, None)

    def _saturation(self) -> float:
        """In the unit of the file, whatever the wavelength."""
        if self.statement.saturation is not None:
            return self.statement.saturation
        step, zero, _ = self._scaling()
        # Integers that are scaled span what the cube holds: their largest is no limit of the detector.
        return zero + np.iinfo(self.dtype).max if self.dtype.kind in "iu" and step == 1.0 else float("inf")


def _brightest(saturation: float, factors: NDArray[np.float64]) -> float:
    """What saturated numbers become, at all wavelengths: no other is as large."""
    # Single precision, as scaled cubes are; numbers that stay as they are may be larger integers.
    return saturation if np.all(factors == 1.0) else float(np.float32(saturation * factors.max()))


def _seconds(seconds: ArrayLike) -> Any:  # noqa: ANN401
    """A time span, or several, to the nanosecond; undefined where it is longer than an observation."""
    spans = np.asarray(seconds, dtype=np.float64)
    return np.rint(np.where(np.abs(spans) < LONGEST, spans, np.nan) * 1e9).astype("timedelta64[ns]")
