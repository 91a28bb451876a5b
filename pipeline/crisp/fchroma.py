"""FITS files of the F-CHROMA flare database: one file is one CRISP scan of one line.

The primary HDU holds 16-bit integers (wavelength, y, x), in data numbers; the image extension
``lambda-coordinate`` the vacuum wavelengths in Angstrom. ``DATE-AVG`` is the only time. The field may lie
rotated within a pad of one constant value. The database: Cauzzi et al. 2014, "F-CHROMA flare database",
https://star.pst.qub.ac.uk/wiki/doku.php/public/solarflares/start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from numpy.typing import ArrayLike, NDArray

from pipeline.crisp import fits_files
from pipeline.crisp.cube import Cube, ScaledCube
from pipeline.crisp.fits_files import FETCH_AGAIN
from pipeline.crisp.scan import ForeignFileError, Frame, Scan, identify_line, vacuum_axis
from pipeline.crisp.wavelengths import Medium
from pipeline.errors import InputError, MisuseError

FORMAT = "fchroma"
AXIS_HDU = "lambda-coordinate"
UNITS = "DN"
SUFFIXES = fits_files.SUFFIXES

# What the database calls the lines: EXTNAME and WDESC1 of the primary header, and the part of a file's name.
DESIGNATIONS = {"halpha": ("H_I_6563", "H I 6563", "6563"), "ca8542": ("Ca_II_8542", "Ca II 8542", "8542")}


def read_scans(path: str | Path, medium: Medium | None = None) -> tuple[Scan, ...]:
    """Describe the one scan of an F-CHROMA file, from its headers and wavelength axis alone.

    Parameters
    ----------
    path : str or Path
        The file; its name says nothing.
    medium : {"vacuum", "air"}, optional
        What the wavelengths are measured in, if the caller knows better than the database's definition.

    Returns
    -------
    tuple of Scan
        One scan.

    Raises
    ------
    ForeignFileError
        The file is not FITS, is of another instrument, layout or line.
    InputError
        It is an F-CHROMA file, but cannot be read or is incomplete.
    """
    file = Path(path).absolute()
    with fits_files.opened(file) as hdus:
        return (_describe(hdus, file, medium),)


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
        data: NDArray[Any] | None = hdus[0].data
        if data is None or data.shape != (points, *scan.shape):
            raise scan.changed(None if data is None else data.shape)
        step, zero, blank = fits_files.scaling(hdus[0].header)
    if (step, zero, blank) == (1.0, 0.0, None):
        return data
    return ScaledCube(data, np.full(points, step), np.full(points, zero), blank)


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


def _describe(hdus: fits.HDUList, file: Path, medium: Medium | None) -> Scan:
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
    if len(axes) != 3:
        raise ForeignFileError(
            "a CRISP file of another layout than F-CHROMA's",
            where=file,
            found=f"a primary array of {len(axes)} axes {axes}",
            expected="three: (wavelength, y, x)",
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
    wavelength = np.asarray(hdus[names.index(AXIS_HDU)].data, dtype=np.float64)
    if wavelength.shape != axes[:1]:
        raise InputError(
            "the wavelength axis does not fit the intensities",
            where=file,
            found=f"{wavelength.shape} wavelengths, {axes[0]} images",
            expected="one wavelength for each image",
            remedy=FETCH_AGAIN,
        )
    vacuum, medium, stated_by = vacuum_axis(wavelength, ("vacuum", "format"), medium, str(file))
    return Scan(
        path=str(file),
        format=FORMAT,
        line=identify_line(vacuum, str(file)),
        time=_time(header, file),
        wavelength=tuple(vacuum.tolist()),
        medium=medium,
        medium_stated_by=stated_by,
        shape=(int(axes[1]), int(axes[2])),
        units=UNITS,
        units_of_file=UNITS,
        saturation=_saturation(header),
        frame=_frame(header, file),
    )


def _time(header: fits.Header, file: Path) -> np.datetime64:
    text = str(header.get("DATE-AVG", "")).strip()
    if not text:
        raise InputError(
            "the scan's time is missing",
            where=file,
            found="no DATE-AVG",
            expected="DATE-AVG, the mean time of the scan",
            remedy="add the card, or leave the file out",
        )
    return fits_files.utc(text, str(header.get("TIMESYS", "UTC")), file, "DATE-AVG")


def _frame(header: fits.Header, file: Path) -> Frame:
    missing = [
        name for name in ("CRPIX1", "CRPIX2", "CRVAL1", "CRVAL2", "CDELT1", "CDELT2") if name not in header
    ]
    types = [str(header.get(f"CTYPE{number}", "")).strip() for number in (1, 2)]
    if missing or types != ["HPLN-TAN", "HPLT-TAN"]:
        raise InputError(
            "the scan's pointing is missing",
            where=file,
            found=f"CTYPE1, CTYPE2 = {types}" + (f"; no {', '.join(missing)}" if missing else ""),
            expected="helioprojective axes HPLN-TAN, HPLT-TAN with CRPIX, CRVAL and CDELT",
            remedy="add the cards, or leave the file out",
        )
    return Frame.from_wcs(WCS(header).celestial)


def _saturation(header: fits.Header) -> float:
    if header["BITPIX"] < 0:
        return float("inf")
    largest = 2.0 ** (header["BITPIX"] - 1) - 1.0 if header["BITPIX"] > 8 else 255.0
    return float(header.get("BZERO", 0.0)) + float(header.get("BSCALE", 1.0)) * largest
