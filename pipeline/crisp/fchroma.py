"""FITS files of the F-CHROMA flare database: one file is one CRISP scan of one line, or several of them.

The primary HDU holds 16-bit integers (wavelength, y, x), in data numbers; the image extension
``lambda-coordinate`` the wavelengths in Angstrom, uniform or not: in vacuum, unless ``CTYPE3`` is ``AWAV``,
as FITS calls wavelengths in air (Greisen et al. 2006, A&A 446, 747, doi:10.1051/0004-6361:20053818).
``DATE-AVG`` is the only time. The field may lie rotated within a pad of one constant value. The database:
Cauzzi et al. 2014, "F-CHROMA flare database",
https://star.pst.qub.ac.uk/wiki/doku.php/public/solarflares/start.

Its layout is that of CRISPEX (Lofdahl et al. 2021, A&A 653, A68, doi:10.1051/0004-6361/202141326, table C.1),
which has two ways to put several scans into a file. ``NWIN`` lines may follow one another along the
wavelength axis, from ``WSTARTi`` (counted from 0) on, ``WWIDTHi`` wavelengths each: each is a scan of its
own, and other lines than the two are passed over. And there may be a fourth axis, of time: the extension
``time-coordinate`` then has a time for each scan, since ``STARTOBS``: in seconds, if it says no other unit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import astropy.units as u
import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from numpy.typing import ArrayLike, NDArray

from pipeline.crisp import fits_files
from pipeline.crisp.cube import COUNTS, DN, Cube, as_intensities, intensity_scale
from pipeline.crisp.fits_files import FETCH_AGAIN, MEND_CARD
from pipeline.crisp.scan import (
    ForeignFileError,
    Frame,
    OtherLineError,
    Scan,
    Stated,
    identify_line,
    vacuum_axis,
)
from pipeline.crisp.wavelengths import Medium
from pipeline.errors import InputError, MisuseError

FORMAT = "fchroma"
AXIS_HDU = "lambda-coordinate"
TIME_HDU = "time-coordinate"
TIMES = ("TIME", "UTC", "TAI")
"""What a fourth axis is called."""

SUFFIXES = fits_files.SUFFIXES

# What the database calls the lines: EXTNAME and WDESC1 of the primary header, and the part of a file's name.
DESIGNATIONS = {"halpha": ("H_I_6563", "H I 6563", "6563"), "ca8542": ("Ca_II_8542", "Ca II 8542", "8542")}


def read_scans(path: str | Path, medium: Medium | None = None) -> tuple[Scan, ...]:
    """Describe the scans of an F-CHROMA file, from its headers and axes alone.

    Parameters
    ----------
    path : str or Path
        The file; its name says nothing.
    medium : {"vacuum", "air"}, optional
        What the wavelengths are measured in, if the caller knows better than the database's definition.

    Returns
    -------
    tuple of Scan
        One, in the database's own files.

    Raises
    ------
    ForeignFileError
        The file is not FITS, is of another instrument, layout or line.
    InputError
        It is an F-CHROMA file, but cannot be read or is incomplete.
    """
    file = Path(path).absolute()
    with fits_files.opened(file) as hdus:
        return _describe(hdus, file, medium)


read_headers = fits_files.read_headers


def open_intensity(scan: Scan) -> Cube:
    """Intensities of a scan, shape (wavelength, y, x), memory-mapped: only what is indexed is read.

    Parameters
    ----------
    scan : Scan
        As `read_scans` returned it.

    Returns
    -------
    Cube
        An array of the file's own number type, not to be written to; where its integers are scaled
        (``BSCALE``, ``BZERO``), floats.

    Raises
    ------
    InputError
        The file has changed or gone since it was described.
    """
    points = len(scan.wavelength)
    with fits_files.opened(scan.path) as hdus:
        header = hdus[0].header
        data: NDArray[Any] | None = hdus[0].data
        found = None if data is None else data.shape
        windows = _windows(header, 0 if data is None else data.shape[-3] if data.ndim > 2 else 0, scan.path)
        moment, window = divmod(scan.index, len(windows))
        if data is not None and data.ndim == 4 and moment < len(data):
            data, moment = data[moment], 0
        if data is None or data.ndim != 3 or moment > 0:
            raise scan.changed(found)
        stored = data[windows[window]]
        if stored.shape != (points, *scan.shape):
            raise scan.changed(found)
        scaling = fits_files.scaling(header, scan.path)
    _, factors = intensity_scale(scan.units_of_file, np.array(scan.wavelength), scan.path)
    return as_intensities(stored, factors, *scaling)


def open_wavelength_shift(scan: Scan) -> NDArray[np.float64] | None:
    """None: the database's files have one wavelength axis for all pixels."""
    return None


def write_fchroma(
    path: str | Path,
    cube: ArrayLike,
    wavelength: ArrayLike,
    time: np.datetime64 | str,
    *,
    pointing: tuple[float, float] = (-729.826, -313.432),
    scale: float = 0.057,
    reference_pixel: tuple[float, float] | None = None,
    rotation: ArrayLike | None = None,
    start: np.datetime64 | str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one scan as the F-CHROMA database lays it out.

    Parameters
    ----------
    path : str or Path
        The file; `file_name` makes the database's own name.
    cube : array_like, shape (wavelength, y, x)
        Intensities in data numbers, rounded to 16-bit integers; the pad included.
    wavelength : array_like, shape (wavelength,)
        Vacuum wavelengths, Angstrom, increasing; they say which line it is.
    time : numpy.datetime64 or str
        Mean time of the scan, UTC (``DATE-AVG``).
    pointing : tuple of float
        Helioprojective longitude and latitude of the reference pixel, arcsec.
    scale : float
        Size of a pixel, arcsec.
    reference_pixel : tuple of float, optional
        Zero-based ``(x, y)`` of the reference pixel; the middle of the frame by default.
    rotation : array_like, shape (2, 2), optional
        The PC matrix; that of no rotation by default.
    start : numpy.datetime64 or str, optional
        Start of the series (``POINT_ID``); `time` by default.
    overwrite : bool
        Replace an existing file.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    MisuseError
        Sizes do not fit, numbers do not fit 16 bits, or the file exists.
    ForeignFileError
        The wavelengths are of neither line.
    """
    file = Path(path)
    axis = np.asarray(wavelength, dtype=np.float64)
    intensity = np.asarray(cube)
    if intensity.ndim != 3 or axis.shape != intensity.shape[:1] or axis.size < 2:
        raise MisuseError(
            "cube and wavelengths do not fit",
            where=file,
            found=f"cube {intensity.shape}, wavelengths {axis.shape}",
            expected="(wavelength, y, x) and (wavelength,)",
        )
    rounded = np.rint(intensity)
    limits = np.iinfo(np.int16)
    if not np.all((rounded >= limits.min) & (rounded <= limits.max)):
        raise MisuseError(
            "the intensities do not fit 16-bit integers",
            where=file,
            found=f"{np.min(intensity)} to {np.max(intensity)}",
            expected=f"finite numbers, {limits.min} to {limits.max}",
        )
    if file.exists() and not overwrite:
        raise MisuseError("the file exists", where=file, remedy="choose another name, or overwrite=True")
    name, description, _ = DESIGNATIONS[identify_line(axis, str(file))]
    rows, columns = intensity.shape[1:]
    centre = ((columns - 1) / 2.0, (rows - 1) / 2.0) if reference_pixel is None else reference_pixel
    matrix = np.eye(2) if rotation is None else np.asarray(rotation, dtype=np.float64)
    middle = axis.size // 2
    average = np.datetime64(time).astype("datetime64[ms]")

    header = fits.Header()
    header["DATE"] = str(average.astype("datetime64[D]"))
    header["EXTNAME"] = name
    header["SOLARNET"] = 0.5
    header["OBS_HDU"] = 1
    header["OBSRVTRY"] = "ORM"
    header["TELESCOP"] = "SST"
    header["INSTRUME"] = "CRISP"
    header["DATE-AVG"] = str(average)
    header["POINT_ID"] = str(np.datetime64(average if start is None else start).astype("datetime64[s]"))
    steps = (scale, scale, float(axis[-1] - axis[0]) / (axis.size - 1))
    pixels = (centre[0] + 1.0, centre[1] + 1.0, middle + 1.0)
    values = (pointing[0], pointing[1], float(axis[middle]))
    for number, (step, pixel, value) in enumerate(zip(steps, pixels, values, strict=True), start=1):
        header[f"CDELT{number}"], header[f"CRPIX{number}"], header[f"CRVAL{number}"] = step, pixel, value
    header["CTYPE1"], header["CTYPE2"], header["CTYPE3"] = "HPLN-TAN", "HPLT-TAN", "WAVE"
    header["CUNIT1"], header["CUNIT2"], header["CUNIT3"] = "arcsec", "arcsec", "Angstrom"
    for row in range(2):
        for column in range(2):
            if row == column or matrix[row, column] != 0.0:
                header[f"PC{row + 1}_{column + 1}"] = float(matrix[row, column])
    header["PC3_3"] = 1.0
    header["NWIN"], header["WSTART1"], header["WWIDTH1"] = 1, 0, axis.size
    header["WDESC1"] = description
    header["TWAVE1"] = float(axis[middle])

    extension = fits.ImageHDU(axis, name=AXIS_HDU)
    extension.header["EXTNAME"] = AXIS_HDU  # astropy would write it in capitals; the database does not
    extension.header["BTYPE"] = "lambda axis"
    extension.header["BUNIT"] = "Angstrom"
    primary = fits.PrimaryHDU(rounded.astype(">i2"), header)
    fits.HDUList([primary, extension]).writeto(file, overwrite=overwrite)
    return file


def file_name(line: str, start: np.datetime64 | str, number: int) -> str:
    """Name of a scan's file as the database gives it.

    Parameters
    ----------
    line : str
        ``"halpha"`` or ``"ca8542"``.
    start : numpy.datetime64 or str
        Start of the series, UTC.
    number : int
        The scan's number within the series.
    """
    moment = (
        str(np.datetime64(start).astype("datetime64[s]")).replace("-", "").replace(":", "").replace("T", "_")
    )
    return f"crisp_l2_{moment}_{DESIGNATIONS[line][2]}_r{number:05d}.fits"


def _describe(hdus: fits.HDUList, file: Path, medium: Medium | None) -> tuple[Scan, ...]:
    header = hdus[0].header
    instrument = str(header.get("INSTRUME", "")).strip()
    if instrument.upper() != "CRISP":
        raise ForeignFileError(
            "a FITS file of another instrument",
            where=file,
            found=f"INSTRUME = {instrument!r}",
            expected="'CRISP'",
            remedy="leave this file out",
        )
    axes = tuple(header.get(f"NAXIS{number}") for number in range(header["NAXIS"], 0, -1))
    fourth = str(header.get("CTYPE4", "")).strip().upper()
    if len(axes) not in (3, 4) or (len(axes) == 4 and fourth not in TIMES):
        raise ForeignFileError(
            "a CRISP file of another layout than F-CHROMA's",
            where=file,
            found=f"a primary array of {len(axes)} axes {axes}"
            + (f", the fourth {fourth!r}" if fourth else ""),
            expected="three, (wavelength, y, x), or a fourth of time",
            remedy="leave this file out",
        )
    names = [hdu.name.lower() for hdu in hdus]
    if AXIS_HDU not in names:
        raise InputError(
            "the wavelength axis is missing",
            where=file,
            found=f"HDUs {', '.join(repr(hdu.name) for hdu in hdus)}",
            expected=f"an image extension named {AXIS_HDU!r}",
            remedy=FETCH_AGAIN,
        )
    wavelength = fits_files.coordinates(hdus[names.index(AXIS_HDU)], "Angstrom", u.Angstrom, file)
    points, rows, columns = (int(size) for size in axes[-3:])
    if wavelength.shape != (points,):
        raise InputError(
            "the wavelength axis does not fit the intensities",
            where=file,
            found=f"{wavelength.shape} wavelengths, {points} images",
            expected="one wavelength for each image",
            remedy=FETCH_AGAIN,
        )
    times = _times(hdus, axes[0], file) if len(axes) == 4 else [_time(header, file)]
    windows = _windows(header, points, str(file))
    stated = _medium(header, file)
    units_of_file = str(header.get("BUNIT", "")).strip() or DN
    frame = _frame(header, file)
    described, others = [], []
    for number, window in enumerate(windows):
        vacuum, found, stated_by = vacuum_axis(wavelength[window], stated, medium, str(file))
        try:
            line = identify_line(vacuum, str(file))
        except OtherLineError as other:
            others.append(other)
            continue
        units, _ = intensity_scale(units_of_file, vacuum, str(file))
        described += [
            Scan(
                path=str(file),
                format=FORMAT,
                index=index * len(windows) + number,
                line=line,
                time=time,
                wavelength=tuple(vacuum.tolist()),
                medium=found,
                medium_stated_by=stated_by,
                shape=(rows, columns),
                units=units,
                units_of_file=units_of_file,
                saturation=fits_files.saturation(header, file) if units in COUNTS.values() else float("inf"),
                frame=frame,
            )
            for index, time in enumerate(times)
        ]
    if not described:
        raise others[0]
    return tuple(described)


def _medium(header: fits.Header, file: Path) -> tuple[Medium, Stated]:
    """What the wavelengths are measured in, by the header's name of their axis."""
    axis = str(header.get("CTYPE3", "")).strip().upper()
    kind = axis.split("-")[0]
    if kind not in ("", "WAVE", "AWAV"):
        raise InputError(
            "the third axis is not one of wavelengths",
            where=file,
            found=f"CTYPE3 = {axis!r}",
            expected="WAVE (in vacuum) or AWAV (in air)",
            remedy=MEND_CARD,
        )
    # The database writes WAVE everywhere, which therefore says no more than its definition does.
    return ("air", "file") if kind == "AWAV" else ("vacuum", "format")


def _windows(header: fits.Header, points: int, where: str) -> list[slice]:
    """Places of the lines along the wavelength axis."""
    count = fits_files.whole_number(header, "NWIN", where, 1)
    if count <= 1:
        return [slice(0, points)]
    numbers = range(1, min(count, points) + 1)
    starts = [fits_files.whole_number(header, f"WSTART{number}", where, -1) for number in numbers]
    widths = [fits_files.whole_number(header, f"WWIDTH{number}", where, 0) for number in numbers]
    windows = [slice(start, start + width) for start, width in zip(starts, widths, strict=True)]
    edges = [0, *(edge for window in windows for edge in (window.start, window.stop)), points]
    if len(windows) < count or min(widths) < 1 or sorted(edges) != edges:
        raise InputError(
            "the lines' places along the wavelength axis do not fit it",
            where=where,
            found=f"WSTART {starts}, WWIDTH {widths}",
            expected=f"{count} lines, one after the other, among {points} wavelengths",
            remedy=FETCH_AGAIN,
        )
    return windows


def _times(hdus: fits.HDUList, count: int, file: Path) -> list[np.datetime64]:
    """Times of the scans along the fourth axis."""
    header = hdus[0].header
    hdu = next((hdu for hdu in hdus[1:] if hdu.name.lower() == TIME_HDU and hdu.data is not None), None)
    since = next((name for name in ("STARTOBS", "DATE_OBS", "DATE-OBS") if header.get(name)), None)
    unit = str(header.get("CUNIT4") or "s").strip()
    seconds = np.zeros(0) if hdu is None else fits_files.coordinates(hdu, unit, u.s, file)
    if since is None or seconds.shape != (count,) or not np.all(np.abs(seconds) < 1e8):
        raise InputError(
            "the scans' times are missing",
            where=file,
            found=f"{seconds.shape} numbers in {TIME_HDU!r}, {since or 'no STARTOBS'}",
            expected=f"{count} times in seconds, and STARTOBS, from which they count",
            remedy="add them, or leave the file out",
        )
    scale = str(header.get("TIMESYS", "UTC"))
    start = fits_files.moment(header, since, scale, file)
    return list(start + np.rint(seconds * 1e9).astype("timedelta64[ns]"))


def _time(header: fits.Header, file: Path) -> np.datetime64:
    if not str(header.get("DATE-AVG", "")).strip():
        raise InputError(
            "the scan's time is missing",
            where=file,
            found="no DATE-AVG",
            expected="DATE-AVG, the mean time of the scan",
            remedy="add the card, or leave the file out",
        )
    return fits_files.moment(header, "DATE-AVG", str(header.get("TIMESYS", "UTC")), file)


def _frame(header: fits.Header, file: Path) -> Frame:
    step = "CD{0}_{0}" if "CD1_1" in header else "CDELT{0}"
    names = [name.format(axis) for name in ("CRPIX{0}", "CRVAL{0}", step, "CUNIT{0}") for axis in (1, 2)]
    missing = [name for name in names if header.get(name) in (None, "")]
    types = [str(header.get(f"CTYPE{number}", "")).strip() for number in (1, 2)]
    if missing or types != ["HPLN-TAN", "HPLT-TAN"]:
        raise InputError(
            "the scan's pointing is missing",
            where=file,
            found=f"CTYPE1, CTYPE2 = {types}" + (f"; no {', '.join(missing)}" if missing else ""),
            expected="helioprojective axes HPLN-TAN, HPLT-TAN with CRPIX, CRVAL, CDELT and CUNIT",
            remedy="add the cards, or leave the file out",
        )
    fits_files.check_sky(header, (1, 2, 3), file)
    for axis in (1, 2):
        fits_files.unit_factor(str(header[f"CUNIT{axis}"]).strip(), u.arcsec, f"CUNIT{axis}", file)
    return Frame.from_wcs(WCS(header).celestial, (header["NAXIS2"], header["NAXIS1"]), file)
