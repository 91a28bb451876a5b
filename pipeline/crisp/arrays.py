"""Small arrays (wavelengths, times, maps) out of whatever holds them: FITS, NetCDF, IDL save files, text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray
from scipy.io import readsav

from pipeline.crisp import fits_files, lapalma_files, netcdf_files
from pipeline.errors import InputError

IDL_SIGNATURE = b"SR\x00"
LONGEST_TEXT = 10_000_000  # bytes: text beyond is no list of wavelengths or times


def read_array(
    file: Path, *, hdu: str | int | None = None, column: str | None = None, variable: str | None = None
) -> NDArray[Any]:
    """Read an array, whole.

    Parameters
    ----------
    file : Path
        FITS, NetCDF, an IDL save file, a La Palma cube, or text; its content says which.
    hdu : str or int, optional
        Of FITS: name or number of the HDU; the first that holds an array if left out.
    column : str, optional
        Of a FITS table: the column.
    variable : str, optional
        Of a NetCDF or IDL save file: the variable.

    Returns
    -------
    ndarray
        Numbers, texts, or (of NetCDF, where the units say ``since``) ``datetime64``; axes of one element
        removed. A text is split at white space if all of it is numbers, at the ends of lines otherwise.

    Raises
    ------
    InputError
        It cannot be read, or does not hold what was asked for.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(lapalma_files.LENGTH)
    except OSError as failure:
        raise InputError("the file cannot be read", where=file, found=failure.strerror) from failure
    if start.startswith(fits_files.SIGNATURE):
        values = _from_fits(file, hdu, column)
    elif netcdf_files.is_netcdf(start):
        values = _from_netcdf(file, variable)
    elif start.startswith(IDL_SIGNATURE):
        values = _from_idl(file, variable)
    elif lapalma_files.is_cube(start):
        values = lapalma_files.mapped(file)
    else:
        values = _from_text(file)
    return np.atleast_1d(np.squeeze(values))


def variables(file: Path) -> list[str]:
    """Names of an IDL save file's variables; none of other files."""
    with file.open("rb") as stream:
        if not stream.read(16).startswith(IDL_SIGNATURE):
            return []
    return sorted(_idl(file))


def _from_fits(file: Path, hdu: str | int | None, column: str | None) -> NDArray[Any]:
    with fits_files.opened(file) as hdus:
        found = fits_files.find_hdu(hdus, hdu, file)
        if column is not None:
            names = found.columns.names if isinstance(found, fits.BinTableHDU | fits.TableHDU) else []
            if column not in names:
                raise InputError(
                    "no such column",
                    where=file,
                    found=", ".join(names) or f"{found.name or 'the primary HDU'} is no table",
                    expected=column,
                )
            return np.array(found.data[column])
        if not found.is_image or found.data is None:
            raise InputError(
                "the HDU holds no array",
                where=file,
                found=f"{found.name or 'the primary HDU'}: {type(found).__name__}",
                expected="an image, or the name of a table's column",
            )
        step, zero, blank = fits_files.scaling(found.header)
        values = step * np.asarray(found.data, dtype=np.float64) + zero
        return values if blank is None else np.where(found.data == blank, np.nan, values)


def _from_netcdf(file: Path, variable: str | None) -> NDArray[Any]:
    if variable is None:
        raise InputError("the variable is not named", where=file, expected="variable: its name")
    return netcdf_files.NetcdfArray(file, variable).moments()


def _from_idl(file: Path, variable: str | None) -> NDArray[Any]:
    held = _idl(file)
    if variable is None or variable.lower() not in held:
        raise InputError(
            "no such variable", where=file, found=", ".join(sorted(held)) or "none", expected=variable
        )
    return np.array(held[variable.lower()])


def _idl(file: Path) -> dict[str, Any]:
    try:
        return {str(name).lower(): value for name, value in readsav(file).items()}
    except Exception as failure:  # scipy's reader raises whatever the damaged byte leads to
        raise InputError(
            "a damaged IDL save file",
            where=file,
            found=f"{type(failure).__name__}: {failure}",
            remedy="fetch the file again",
        ) from failure


def _from_text(file: Path) -> NDArray[Any]:
    try:
        if file.stat().st_size > LONGEST_TEXT:
            raise ValueError(f"{file.stat().st_size} bytes")
        lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError as failure:
        raise InputError(
            "neither FITS, NetCDF, an IDL save file, a La Palma cube nor a short text",
            where=file,
            found=failure,
        ) from failure
    lines = [line for line in lines if line]
    try:
        return np.array([float(word) for line in lines for word in line.replace(",", " ").split()])
    except ValueError:
        return np.array(lines)
