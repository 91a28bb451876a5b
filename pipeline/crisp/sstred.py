"""Cubes of the SST's reduction pipeline, SSTRED: one file holds the scans of one line, often a whole series.

The primary HDU is (scan, Stokes, tuning, y, x): floats, or integers scaled by ``BSCALE`` and ``BZERO``, in
counts or in intensity per frequency. Coordinates are tabulated (FITS ``-TAB``, Greisen et al. 2006, A&A 446,
747, doi:10.1051/0004-6361:20053818) in the extension ``WCS-TAB``, whose column ``HPLN+HPLT+WAVE+TIME`` is
(scan, tuning, y, x, coordinate): helioprojective longitude and latitude of the field's corners, the tuning's
wavelength, and the mean time of its exposures since ``DATEREF``. The wavelengths are in air: they are fitted
to an atlas in air (Neckel 1999). (``CTYPE3`` is ``WAVE-TAB`` all the same, which would mean vacuum; a file
that has ``AWAV-TAB`` says it itself.)

The extension ``WCSDVARR`` has CRISP's cavity errors: wavelengths, in the unit of the axis, to be added to the
tuning's at each pixel. The cards ``DW3`` say for which tunings. A file whose profiles were interpolated to
one axis names ``SPECTRAL-DISTORTION-CORRECTION`` among its processing steps; the map is not applied again.

The pipeline: de la Cruz Rodriguez et al. 2015, A&A 573, A40, doi:10.1051/0004-6361/201424319; Lofdahl et al.
2021, A&A 653, A68, doi:10.1051/0004-6361/202141326, which defines the layout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import astropy.units as u
import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from pipeline.crisp import fits_files
from pipeline.crisp.cube import COUNTS, Cube, as_intensities, intensity_scale
from pipeline.crisp.fits_files import FETCH_AGAIN
from pipeline.crisp.scan import (
    ANOTHER_PLACE,
    ForeignFileError,
    Frame,
    OtherLineError,
    Padding,
    Scan,
    Stated,
    identify_line,
    vacuum_axis,
)
from pipeline.crisp.wavelengths import Medium, air_to_vacuum, vacuum_to_air
from pipeline.errors import InputError

FORMAT = "sstred"
SUFFIXES = fits_files.SUFFIXES
TABLE = "WCS-TAB"
CAVITY = "WCSDVARR"
CORRECTED = "SPECTRAL-DISTORTION-CORRECTION"
CONVERTED_PADDING = "PADDING-CONVERSION"

TABULATED = (1, 2, 3, 5)
"""The axes whose coordinates are in the table: x, y, tuning, scan, as FITS numbers them."""

LAYOUTS = [{"HPLN", "HPLT", wave, "STOKES", time} for wave in ("WAVE", "AWAV") for time in ("UTC", "TIME")]
"""What the five axes are."""

CENTURY = 3.2e9  # s
SAME_WAVELENGTH = 1e-3  # Angstrom
FLAT = 1e-3  # of the other side, or arcsec: what pixels have at least


@dataclass(frozen=True)
class _Coordinates:
    """What the table says of every scan."""

    wavelength: NDArray[np.float64]  # (scan, tuning), Angstrom, in the medium of the file
    seconds: NDArray[np.float64]  # (scan, tuning), since DATEREF
    pointing: NDArray[np.float64]  # (scan, knot along y, knot along x, 2), arcsec
    knots: tuple[NDArray[np.float64], NDArray[np.float64]]  # zero-based pixels along x and y


def read_scans(path: str | Path, medium: Medium | None = None) -> tuple[Scan, ...]:
    """Describe the scans of a cube, from its headers and tables alone.

    Parameters
    ----------
    path : str or Path
        The file; its name says nothing.
    medium : {"vacuum", "air"}, optional
        What the wavelengths are measured in, if the caller knows better than the pipeline's definition.

    Returns
    -------
    tuple of Scan
        In the file's order.

    Raises
    ------
    ForeignFileError
        The file is not FITS or of another layout, or of one wavelength or another line (`OtherLineError`).
    InputError
        It is such a cube, but cannot be read, or contradicts itself.
    """
    file = Path(path).absolute()
    with fits_files.opened(file) as hdus:
        return _describe(hdus, file, medium)


read_headers = fits_files.read_headers


def open_intensity(scan: Scan) -> Cube:
    """Intensities (Stokes I) of a scan, (wavelength, y, x), memory-mapped: only what is indexed is read.

    Parameters
    ----------
    scan : Scan
        As `read_scans` returned it.

    Returns
    -------
    Cube
        Per Angstrom where the file has them per frequency; counts stay counts.

    Raises
    ------
    InputError
        The file has changed or gone since it was described.
    """
    with fits_files.opened(scan.path) as hdus:
        header, data = hdus[0].header, hdus[0].data
        shape = (len(scan.wavelength), *scan.shape)
        if data is None or data.ndim != 5 or data.shape[2:] != shape or scan.index >= len(data):
            raise scan.changed(None if data is None else f"{data.shape} (scan, Stokes, tuning, y, x)")
        stored: NDArray[Any] = data[scan.index, _stokes_i(header, scan.path)]
        scaling = fits_files.scaling(header, scan.path)
    _, factors = intensity_scale(scan.units_of_file, np.array(scan.wavelength), scan.path)
    return as_intensities(stored, factors, *scaling)


def open_wavelength_shift(scan: Scan) -> NDArray[np.float64] | None:
    """CRISP's cavity errors: Angstrom, in vacuum, to be added to each pixel's wavelengths.

    Parameters
    ----------
    scan : Scan
        As `read_scans` returned it.

    Returns
    -------
    ndarray, shape (y, x), or None
        NaN where the map has none. None if there is no map, or the profiles have been corrected for it.

    Raises
    ------
    InputError
        The file has changed or gone since it was described, or the map does not fit the cube.
    """
    with fits_files.opened(scan.path) as hdus:
        extension = _cavity_map(hdus, scan.path)
        if extension is None:
            return None
        # One scan of (scan, 1, 1, y, x), of which axes of one element may have been left out.
        maps = extension.data.reshape(-1, *extension.data.shape[-2:])
        if scan.index >= len(maps) or maps.shape[1:] != scan.shape:
            raise scan.changed(f"{extension.data.shape} numbers in {CAVITY}")
        step, zero, blank = fits_files.scaling(extension.header, scan.path)
        stored = maps[scan.index]
        shift: NDArray[np.float64] = step * stored.astype(np.float64) + zero
        if blank is not None:
            shift[stored == blank] = np.nan
        shift *= _unit(hdus[0].header, 3, u.Angstrom, scan.path)
    if scan.medium == "vacuum":
        return shift
    middle = vacuum_to_air(0.5 * (scan.wavelength[0] + scan.wavelength[-1]))
    return np.asarray(air_to_vacuum(middle + shift) - air_to_vacuum(middle))


def _describe(hdus: fits.HDUList, file: Path, medium: Medium | None) -> tuple[Scan, ...]:
    header = hdus[0].header
    axes = [str(header.get(f"CTYPE{number}", "")).strip() for number in range(1, header["NAXIS"] + 1)]
    kinds = [axis.split("-")[0] for axis in axes]
    if set(kinds) not in LAYOUTS:
        raise ForeignFileError(
            "a FITS file of another layout than SSTRED's",
            where=file,
            found=f"axes {axes}" if any(axes) else f"{len(axes)} axes of no known kind",
            expected="HPLN, HPLT, wavelength, STOKES, UTC",
            remedy="leave this file out",
        )
    if kinds[0] != "HPLN" or kinds[3] != "STOKES":
        raise ForeignFileError(
            "an SSTRED cube of spectra, not of images",
            where=file,
            found=f"axes {axes}",
            expected="HPLN, HPLT, wavelength, STOKES, UTC",
            remedy="take the cube of images of the same data (its name ends in _im.fits)",
        )
    scans, _, points, rows, columns = (int(header[f"NAXIS{number}"]) for number in range(5, 0, -1))
    if points < 2:
        raise OtherLineError(
            "an SSTRED cube of one wavelength",
            where=file,
            found=f"{scans} scans of one tuning",
            expected="scans of a line",
            remedy="leave wide-band cubes out",
        )
    table = _table(hdus, (columns, rows, points, scans), str(file))
    stated: tuple[Medium, Stated] = ("air", "file" if kinds[2] == "AWAV" else "format")
    reference = _time(header, axes[4], str(file))
    times = reference + np.rint(table.seconds * 1e9).astype("timedelta64[ns]")
    _stokes_i(header, str(file))
    units_of_file = str(header.get("BUNIT", "")).strip()
    if not units_of_file:
        raise InputError(
            "the intensities have no unit",
            where=file,
            found="no BUNIT",
            expected="BUNIT, such as 'W m-2 Hz-1 sr-1' or 'DN'; '1' if they are relative",
            remedy="add the card",
        )
    units, _ = intensity_scale(units_of_file, table.wavelength[0], str(file))
    padding = _padding(header)
    shifted = _cavity_map(hdus, str(file)) is not None
    described = []
    for index in range(scans):
        vacuum, found, stated_by = vacuum_axis(table.wavelength[index], stated, medium, str(file))
        line = identify_line(vacuum, str(file))
        begin, end = times[index].min(), times[index].max()
        described.append(
            Scan(
                path=str(file),
                format=FORMAT,
                index=index,
                line=line,
                time=begin + (times[index] - begin).sum() // points,
                begin=begin,
                end=end,
                wavelength=tuple(vacuum.tolist()),
                medium=found,
                medium_stated_by=stated_by,
                shape=(rows, columns),
                units=units,
                units_of_file=units_of_file,
                saturation=fits_files.saturation(header, file) if units in COUNTS.values() else float("inf"),
                frame=_frame(table, index, (columns, rows), str(file)),
                padding=padding,
                has_wavelength_shift=shifted,
            )
        )
    return tuple(described)


def _table(hdus: fits.HDUList, sizes: tuple[int, int, int, int], where: str) -> _Coordinates:
    """Read the coordinate table: `sizes` are those of x, y, tuning and scan.

    wcslib reads such tables, too, but none whose last axes of one element were left out, as IDL does.
    """
    header = hdus[0].header
    rotated = [name for name in header["PC*_*"] if name[2:3] != name[4:5] and header[name] != 0.0]
    names, columns = (
        {str(header.get(f"PS{axis}_{part}", "")).strip() for axis in TABULATED} for part in (0, 1)
    )
    numbers = [fits_files.whole_number(header, f"PV{axis}_3", where, 0) for axis in TABULATED]
    present = {hdu.name: hdu for hdu in hdus[1:] if isinstance(hdu, fits.BinTableHDU)}
    if rotated or len(names) != 1 or len(columns) != 1 or sorted(numbers) != [1, 2, 3, 4]:
        raise InputError(
            "the coordinates are not tabulated as SSTRED does it",
            where=where,
            found=f"tables {sorted(names)}, columns {sorted(columns)}, coordinates {numbers}"
            + (f", turned by {rotated}" if rotated else ""),
            expected=f"longitude, latitude, wavelength and time in one column of {TABLE}",
            remedy=FETCH_AGAIN,
        )
    (name,), (column,) = names, columns
    hdu = present.get(name)
    if hdu is None or column not in hdu.columns.names or len(hdu.data) != 1:
        raise InputError(
            "the coordinates are missing",
            where=where,
            found=f"tables {sorted(present)}" if hdu is None else f"{name} with columns {hdu.columns.names}",
            expected=f"one row in the column {column} of the table {name}",
            remedy=FETCH_AGAIN,
        )
    values = np.asarray(hdu.data[column][0], dtype=np.float64)
    # The table's axes are numbered from the last; those of one element at the front may have been left out.
    values = values.reshape((*[1] * (5 - values.ndim), *values.shape))
    if values.ndim != 5 or values.shape[-1] != 4 or not np.all(np.isfinite(values)):
        raise InputError(
            "the table of coordinates is damaged",
            where=where,
            found=f"{values.shape}, {np.count_nonzero(~np.isfinite(values))} numbers not finite",
            expected="(scan, tuning, y, x, 4), all finite",
            remedy=FETCH_AGAIN,
        )
    values = np.moveaxis(values, [4 - number for number in numbers], [3, 2, 1, 0])
    values = values[..., [number - 1 for number in numbers]]
    indices = []
    for axis, size, knots in zip(TABULATED, sizes, values.shape[3::-1], strict=True):
        label = str(header.get(f"PS{axis}_2", "")).strip()
        given = hdu.data[label][0] if label in hdu.columns.names else np.arange(1, knots + 1)
        index = np.atleast_1d(np.asarray(given, dtype=np.float64))
        step, zero, first = (
            fits_files.number(header, f"{card}{axis}", where, default)
            for card, default in (("CDELT", 1.0), ("CRVAL", 0.0), ("CRPIX", 0.0))
        )
        if index.shape != (knots,) or step == 0.0 or not np.all(np.diff(index) * step > 0):
            raise InputError(
                "the index of the table of coordinates does not fit it",
                where=where,
                found=f"{label or 'no index'}: {index}, CDELT{axis} = {step}",
                expected=f"{knots} increasing numbers",
                remedy=FETCH_AGAIN,
            )
        pixels = (index - zero) / step + first - 1.0
        if knots > 1 and (pixels[0] > 0.5 or pixels[-1] < size - 1.5):
            raise InputError(
                "the table of coordinates does not cover the cube",
                where=where,
                found=f"pixels {pixels[0]:g} to {pixels[-1]:g} of axis {axis}",
                expected=f"0 to {size - 1}",
                remedy=FETCH_AGAIN,
            )
        indices.append(pixels)
    for place, size, pixels in ((1, sizes[2], indices[2]), (0, sizes[3], indices[3])):
        values = _between(values, place, pixels, size)
    wavelength = values[..., 2] * _unit(header, 3, u.Angstrom, where)
    if (across := float(np.ptp(wavelength, axis=(2, 3)).max())) > SAME_WAVELENGTH:
        raise InputError(
            "the wavelengths differ between the field's corners",
            where=where,
            found=f"by {across:.3g} Angstrom",
            expected=f"{SAME_WAVELENGTH} Angstrom at most: pixels have their own by {CAVITY} alone",
            remedy=FETCH_AGAIN,
        )
    seconds = values[..., 3].mean(axis=(2, 3)) * _unit(header, 5, u.s, where)
    if not np.all(np.abs(seconds) < CENTURY):
        raise InputError(
            "the table's times are no times",
            where=where,
            found=f"{np.abs(seconds).max():g} s from DATEREF",
            expected="seconds of the day of the observation",
            remedy=FETCH_AGAIN,
        )
    to_arcsec = [_unit(header, axis, u.arcsec, where) for axis in (1, 2)]
    return _Coordinates(
        wavelength.mean(axis=(2, 3)),
        seconds,
        values[..., :2].mean(axis=1) * to_arcsec,
        (indices[0], indices[1]),
    )


def _between(
    values: NDArray[np.float64], axis: int, knots: NDArray[np.float64], size: int
) -> NDArray[np.float64]:
    """Interpolate a table linearly along an axis, from its knots to pixels 0 to `size` - 1."""
    if len(knots) == 1:
        return np.repeat(values, size, axis)
    place = np.clip(np.searchsorted(knots, np.arange(size), side="right") - 1, 0, len(knots) - 2)
    weight = (np.arange(size) - knots[place]) / (knots[place + 1] - knots[place])
    weight = weight.reshape([-1 if number == axis else 1 for number in range(values.ndim)])
    return (1.0 - weight) * values.take(place, axis) + weight * values.take(place + 1, axis)


def _frame(table: _Coordinates, index: int, size: tuple[int, int], where: str) -> Frame:
    x, y = (values.ravel() for values in np.meshgrid(*table.knots))
    longitude, latitude = table.pointing[index].reshape(-1, 2).T
    if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        raise InputError(
            "the table of coordinates does not say how the field lies on the sky",
            where=where,
            found=f"{len(table.knots[0])} x {len(table.knots[1])} points of the field (x, y)",
            expected="its corners",
            remedy=FETCH_AGAIN,
        )
    frame = Frame.through(x, y, longitude, latitude, ((size[0] - 1) / 2.0, (size[1] - 1) / 2.0))
    away = np.hypot(*np.subtract(frame.coordinates(x, y), (longitude, latitude)))
    if not away.max() <= ANOTHER_PLACE:
        raise InputError(
            "the field's corners contradict one another",
            where=where,
            found=f"{away.max():.2f} arcsec from a plane image of the sky in scan {index}",
            expected=f"{ANOTHER_PLACE} arcsec at most",
            remedy=FETCH_AGAIN,
        )
    if not np.linalg.svd(frame.matrix, compute_uv=False)[1] > FLAT * max(1.0, *np.abs(frame.scale)):
        raise InputError(
            "the field's corners lie on one line, or all at one place",
            where=where,
            found=f"longitudes {longitude}, latitudes {latitude} arcsec in scan {index}",
            expected="those of a field",
            remedy=FETCH_AGAIN,
        )
    return frame


def _time(header: fits.Header, axis: str, where: str) -> np.datetime64:
    text = str(header.get("DATEREF", "")).strip()
    if not text:
        raise InputError(
            "the times have no reference",
            where=where,
            found="no DATEREF",
            expected="DATEREF, from which the table's times count",
            remedy="add the card, or leave the file out",
        )
    scale = "UTC" if axis.startswith("UTC") else str(header.get("TIMESYS", "UTC"))
    return fits_files.utc(text, scale, where, "DATEREF")


def _stokes_i(header: fits.Header, where: str) -> int:
    """Index of the intensity along the Stokes axis."""
    first, value, step = (
        fits_files.number(header, f"{card}4", where, 1.0) for card in ("CRPIX", "CRVAL", "CDELT")
    )
    index = (1.0 - value) / step + first - 1.0 if step else np.nan
    if not (0 <= index < header["NAXIS4"] and index == int(index)):
        raise InputError(
            "the cube has no Stokes I",
            where=where,
            found=f"{header['NAXIS4']} components, CRPIX4 = {first:g}, CRVAL4 = {value:g}, CDELT4 = {step:g}",
            expected="the component number 1 among them",
            remedy="leave the file out",
        )
    return int(index)


def _cavity_map(hdus: fits.HDUList, where: str) -> fits.ImageHDU | None:
    """The extension with the wavelengths' corrections; None if there is none to be applied."""
    header = hdus[0].header
    steps = [step.strip() for _, text in _steps(header) for step in text.split(",")]
    maps = [hdu for hdu in hdus[1:] if hdu.name == CAVITY]
    versions = _versions(header)
    if CORRECTED in steps or not (maps or versions):
        return None
    chosen = [hdu for hdu in maps if hdu.ver in versions] if versions else maps
    points, shape = header["NAXIS3"], (header["NAXIS2"], header["NAXIS1"])
    if not chosen:
        raise InputError(
            "the map of the wavelengths' corrections is missing",
            where=where,
            found=f"HDUs {', '.join(repr(hdu.name) for hdu in hdus)}",
            expected=f"an image extension named {CAVITY}, of which the header's DW3 speaks",
            remedy=FETCH_AGAIN,
        )
    if len(chosen) != 1 or (versions and not versions[chosen[0].ver].issuperset(range(points))):
        raise InputError(
            "the wavelengths' corrections differ between the tunings of the line",
            where=where,
            found=f"{len(chosen)} maps, for tunings "
            + "; ".join(f"{sorted(tunings)}" for tunings in versions.values()),
            expected=f"one map for all {points} tunings",
            remedy="correct the cube for them first (SSTRED's fitscube_cmapcorr)",
        )
    (hdu,) = chosen
    data_shape = tuple(hdu.header[f"NAXIS{number}"] for number in range(hdu.header["NAXIS"], 0, -1))
    if data_shape[-2:] != shape or np.prod(data_shape[:-2]) != header["NAXIS5"]:
        raise InputError(
            "the map of the wavelengths' corrections does not fit the cube",
            where=where,
            found=f"{data_shape} numbers in {CAVITY}",
            expected=f"({header['NAXIS5']}, 1, 1, *{shape}): scan, tuning, Stokes, y, x",
            remedy=FETCH_AGAIN,
        )
    return hdu


def _versions(header: fits.Header) -> dict[int, set[int]]:
    """Tunings that each map is for, by the map's EXTVER; empty where the header does not say.

    A map is for the tunings whose index, plus the offset, times the scale, rounds to one.
    """
    records: list[dict[str, float]] = []
    for card in header["DW3.*"].cards:
        name = card.keyword.split(".", 1)[1]
        if name == "EXTVER":
            records.append({})
        if records:
            records[-1][name] = float(card.value)
    tunings = np.arange(header["NAXIS3"])
    return {
        int(record["EXTVER"]): set(
            np.flatnonzero(np.rint((tunings + record["OFFSET.3"]) * record["SCALE.3"]) == 1).tolist()
            if "OFFSET.3" in record and "SCALE.3" in record
            else tunings.tolist()
        )
        for record in records
    }


def _padding(header: fits.Header) -> Padding | None:
    """What the last conversion of the pad has made of it; None where there was none."""
    found: Padding | None = None
    for number, step in _steps(header):
        if step == CONVERTED_PADDING:
            reference = str(header.get(f"PRREF{number}", "")).lower()
            found = "nan" if reference.endswith("nan") else "constant" if "median" in reference else found
    return found


def _steps(header: fits.Header) -> list[tuple[int, str]]:
    """Steps of processing, by number: one text may name several, separated by commas."""
    found = []
    for name in header["PRSTEP*"]:
        if match := re.fullmatch(r"PRSTEP(\d+)", name):
            found.append((int(match[1]), str(header[name]).strip()))
    return sorted(found)


def _unit(header: fits.Header, axis: int, wanted: u.UnitBase, where: str) -> float:
    """What a coordinate of the table is multiplied by to be in the unit wanted."""
    text = str(header.get(f"CUNIT{axis}", "")).strip()
    return fits_files.unit_factor(text, wanted, f"CUNIT{axis}", where)
