"""FITS and NetCDF cubes of other instruments, as the descriptions in deploy/ describe them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from astropy.io import fits
from numpy.typing import NDArray


def write_ibis(
    path: Path, cube: NDArray, wavelength: NDArray, begin: np.datetime64, compressed: bool = False
) -> Path:
    """One scan: (wavelength, y, x) of the cube's own number type, wavelengths (in air) in an extension."""
    header = fits.Header({"INSTRUME": "IBIS", "DATE-OBS": str(begin)})
    axis = fits.ImageHDU(np.asarray(wavelength, dtype=np.float64), name="WAVELENGTHS")
    if compressed:
        image = fits.CompImageHDU(cube, header, compression_type="RICE_1", tile_shape=(1, 16, 32))
        fits.HDUList([fits.PrimaryHDU(), image, axis]).writeto(path)
    else:
        fits.HDUList([fits.PrimaryHDU(cube, header), axis]).writeto(path)
    return path


def write_fiss(
    path: Path, cube: NDArray, wavelength: NDArray, begin: np.datetime64, end: np.datetime64
) -> Path:
    """One raster: (step, slit, wavelength), wavelengths (in air) in the header, CRPIX1 counted from 0."""
    header = fits.Header({"STRTIME": str(begin), "ENDTIME": str(end), "CRPIX1": 3.0})
    header["CDELT1"] = wavelength[1] - wavelength[0]
    header["CRVAL1"] = wavelength[3]
    fits.PrimaryHDU(np.transpose(cube, (2, 1, 0)), header).writeto(path)
    return path


def write_dkist(
    path: Path, lines: dict[str, tuple[NDArray, NDArray, NDArray]], engine: str = "h5netcdf"
) -> Path:
    """A series of each line: (stokes, time, wavelength, y, x), wavelengths (from Angstrom) in nm, times."""
    dataset = xr.Dataset()
    for line, (cube, wavelength, times) in lines.items():
        axes = ("stokes", f"{line}_time", f"{line}_wavelength", f"{line}_y", f"{line}_x")
        dataset[line] = (axes, cube)
        dataset[f"{line}_wavelength"] = (
            f"{line}_wavelength", np.asarray(wavelength) / 10.0, {"units": "nm"}
        )  # fmt: skip
        dataset[f"{line}_time"] = (f"{line}_time", times.astype("datetime64[ns]"))
        dataset[f"{line}_time"].encoding = {"units": "milliseconds since 2014-09-06", "dtype": "int64"}
        if engine == "scipy":  # NetCDF-3 has no integers of 64 bits
            dataset[f"{line}_time"].encoding = {"units": "seconds since 2014-09-06", "dtype": "float64"}
    dataset.to_netcdf(path, engine=engine)
    return path
