"""Cubes as SSTRED's own procedures lay them out (red_fitscube_addwcs, _addcmap, _integer, _missing)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from astropy.io import fits
from numpy.typing import ArrayLike, NDArray

DAY = "2014-09-06T00:00:00.000000"
PHYSICAL = "W m^-2 Hz^-1 sr^-1"
CORNERS = ("HPLN", "HPLT", "WAVE", "TIME")


def corner_pointing(
    shape: tuple[int, int], pointing: ArrayLike, scale: float, angle: float
) -> NDArray[np.float64]:
    """Longitude and latitude of the corner pixels: (..., y, x, 2) for pointings (..., 2) of the middle."""
    rows, columns = shape
    x = np.array([-1.0, 1.0]) * (columns - 1) / 2
    y = np.array([-1.0, 1.0]) * (rows - 1) / 2
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    west, north = c * x[None] - s * y[:, None], s * x[None] + c * y[:, None]
    return np.asarray(pointing)[..., None, None, :] + scale * np.stack([west, north], axis=-1)


def write_sstred(
    path: Path,
    cube: ArrayLike,
    wavelength: ArrayLike,
    seconds: ArrayLike,
    *,
    pointing: ArrayLike = (-729.826, -313.432),
    scale: float = 0.057,
    angle: float = 0.0,
    unit: str = PHYSICAL,
    integers: bool = False,
    cavity: ArrayLike | None = None,
    tunings: slice | None = slice(None),
    steps: tuple[str, ...] = ("CONCATENATION", "CALIBRATION-INTENSITY-SPECTRAL"),
    padding: str | None = None,
    specsys: str | None = "TOPOCENT",
    wave: str = "WAVE",
    drop_single_axes: bool = False,
) -> Path:
    """Write one cube.

    Parameters
    ----------
    cube : array_like, shape (scan, Stokes, tuning, y, x)
        In `unit`.
    wavelength : array_like, shape (tuning,) or (scan, tuning)
        Angstrom, in air; the file has nm.
    seconds : array_like, shape (scan, tuning)
        Mean times of the exposures, since midnight.
    pointing : array_like, shape (2,) or (scan, 2)
        Of the field's middle, arcsec.
    angle : float
        Of the field, counterclockwise, degrees.
    integers : bool
        Scaled 16-bit integers, as SSTRED makes them from the cube's extremes.
    cavity : array_like, shape (scan, y, x), optional
        The cavity errors, Angstrom; the file has nm.
    tunings : slice, optional
        Those that the map is for; None leaves the header without a word of it, as of old.
    padding : {"nan", "median"}, optional
        What the last conversion of the pad says of itself; the cube is taken as it is.
    drop_single_axes : bool
        Leave out the last axes of the coordinate table that have one element, as IDL does.
    """
    data = np.asarray(cube, dtype=np.float32)
    scans, _, points, rows, columns = data.shape
    header = fits.Header()
    header["EXTNAME"] = "Main"
    header["DATE"] = "2021-03-05T12:00:00"
    header["DATEREF"] = (DAY, "Reference time in ISO-8601")
    header["TIMESYS"] = "UTC"
    header["SOLARNET"] = 1
    header["OBS_HDU"] = 1
    header["TELESCOP"], header["INSTRUME"] = "Swedish 1-meter Solar Telescope", "CRISP"
    header["OBSGEO-X"], header["OBSGEO-Y"], header["OBSGEO-Z"] = 5327403.0, -1718726.0, 3051730.0
    header["BUNIT"], header["BTYPE"] = unit, "Intensity"
    if specsys is not None:
        header["SPECSYS"] = specsys
    for axis in range(1, 6):
        header[f"PC{axis}_{axis}"] = (1.0, "No rotations")
    column = "HPLN+HPLT+WAVE+TIME"
    for number, (axis, kind, unit_of_axis) in enumerate(
        ((1, "HPLN", "arcsec"), (2, "HPLT", "arcsec"), (3, wave, "nm"), (5, "UTC-", "s")), start=1
    ):
        header[f"CTYPE{axis}"], header[f"CUNIT{axis}"] = f"{kind}-TAB", unit_of_axis
        header[f"PS{axis}_0"], header[f"PS{axis}_1"] = "WCS-TAB", column
        if axis < 3:
            header[f"PS{axis}_2"] = f"{kind}-INDEX"
        header[f"PV{axis}_3"] = number
        header[f"CRPIX{axis}"], header[f"CRVAL{axis}"], header[f"CDELT{axis}"] = 0, 0, 1
    header["CTYPE4"], header["CRPIX4"], header["CRVAL4"], header["CDELT4"] = "STOKES", 1, 1, 1
    for number, step in enumerate(steps, start=1):
        header[f"PRSTEP{number}"] = (step, "Processing step name")
    if padding is not None:
        number = len(steps) + 1
        header[f"PRSTEP{number}"] = "PADDING-CONVERSION"
        header[f"PRREF{number}"] = f"Padding set to {'NaN' if padding == 'nan' else padding}"
    if integers:
        low, high = float(np.nanmin(data)), float(np.nanmax(data))
        header["BSCALE"] = (high - low) / 64000.0
        header["BZERO"] = low + 32000.0 * header["BSCALE"]
        stored = np.rint((data - header["BZERO"]) / header["BSCALE"]).astype(">i2")
    else:
        stored = data.astype(">f4")
    maps = []
    if cavity is not None:
        errors = np.asarray(cavity, dtype=np.float32).reshape(scans, 1, 1, rows, columns) / 10.0
        header["CWERR3"] = (float(np.nanmax(np.abs(errors))), "[nm] Max total distortion")
        header["CWDIS3"] = "Lookup"
        records: list[tuple[str, float]] = [("EXTVER", 1), ("NAXES", 5)]
        records += [(f"AXIS.{axis}", axis) for axis in range(1, 6)]
        if tunings is not None:
            chosen = range(points)[tunings]
            first, last, margin = chosen[0] - 0.5, chosen[-1] + 0.5, 1e-3
            offset = (last * (0.5 + margin) - (1.5 - margin) * first) / (1.0 - 2.0 * margin)
            records += [("OFFSET.3", offset), ("SCALE.3", (1.0 - 2.0 * margin) / (last - first))]
        records += [("CWERR", header["CWERR3"]), ("CWDIS LOOKUP", 1), ("ASSOCIATE", 1), ("APPLY", 6)]
        for name, value in records:
            header.append(fits.Card("DW3", f"{name}: {value}"))
        extension = fits.ImageHDU(errors, name="WCSDVARR", ver=1)
        extension.header["DISTNAME"] = "Cavity error for 6563"
        maps.append(extension)

    table = np.empty((scans, points, 2, 2, 4))
    corners = corner_pointing((rows, columns), np.broadcast_to(pointing, (scans, 2)), scale, angle)
    table[..., :2] = corners[:, None]
    table[..., 2] = np.broadcast_to(np.asarray(wavelength) / 10.0, (scans, points))[..., None, None]
    table[..., 3] = np.asarray(seconds)[..., None, None]
    sizes = table.shape[::-1]
    while drop_single_axes and sizes[-1] == 1:
        sizes = sizes[:-1]
    coordinates = fits.BinTableHDU.from_columns(
        [
            fits.Column(
                column, f"{table.size}D", dim=str(sizes).replace(" ", ""), array=table.reshape(1, -1)
            ),
            fits.Column("HPLN-INDEX", "2E", array=np.array([[1.0, columns]])),
            fits.Column("HPLT-INDEX", "2E", array=np.array([[1.0, rows]])),
        ],
        name="WCS-TAB",
    )
    averages = np.datetime64(DAY, "us") + np.rint(1e6 * np.asarray(seconds)).astype("timedelta64[us]")
    dates = fits.BinTableHDU.from_columns(
        [fits.Column("DATE-AVG", f"{26 * averages.size}A", array=["".join(map(str, averages.ravel()))])],
        name="VAR-EXT-DATE-AVG",
    )
    primary = fits.PrimaryHDU(stored, header)
    if integers:  # as the cards say, not as astropy would have it
        primary = fits.PrimaryHDU()
        primary.header.extend(header, update=True)
        primary.data = stored
        primary.header["BSCALE"], primary.header["BZERO"] = header["BSCALE"], header["BZERO"]
    fits.HDUList([primary, coordinates, dates, *maps]).writeto(path)
    return path
