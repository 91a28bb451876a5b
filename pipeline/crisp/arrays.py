"""Small arrays (wavelengths, times, maps) out of whatever holds them: FITS, NetCDF, IDL save files, text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray
from scipy.io import readsav

from pipeline.crisp import fits_files, lapalma_files, netcdf_files
from pipeline.crisp.axes import Stored
from pipeline.crisp.signatures import beginning
from pipeline.errors import InputError

IDL_SIGNATURE = b"SR\x00"
LONGEST_TEXT = 10_000_000  # bytes: text beyond is no list of wavelengths or times


class Scaled:
    """An array of a FITS file, its numbers unscaled as it is indexed; NaN where the file has ``BLANK``."""

    def __init__(self, stored: Stored, step: float, zero: float, blank: int | None) -> None:
        self._stored, self._step, self._zero, self._blank = stored, step, zero, blank

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size along each axis."""
        return self._stored.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Double precision."""
        return np.dtype(np.float64)

    def __getitem__(self, key: Any, /) -> NDArray[np.float64]:  # noqa: ANN401
        values = np.asarray(self._stored[key])
        return np.where(values == self._blank, np.nan, self._step * values.astype(np.float64) + self._zero)


def open_array(
    file: Path, *, hdu: str | int | None = None, column: str | None = None, variable: str | None = None
) -> Stored:
    """Open an array; of images no more is read than is indexed.

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
    Stored
        Numbers, texts, or (of NetCDF, where the units say ``since``) ``datetime64``. A text is split at
        white space if all of it is numbers, at the ends of lines otherwise.

    Raises
    ------
    InputError
        It cannot be read, or does not hold what was asked for.
    """
    start = beginning(file)
    if start.startswith(fits_files.SIGNATURE):
        return _from_fits(file, hdu, column)
    if netcdf_files.is_netcdf(start):
        return _from_netcdf(file, variable)
    if start.startswith(IDL_SIGNATURE):
        return _from_idl(file, variable)
    if lapalma_files.is_cube(start):
        return lapalma_files.mapped(file)
    return _from_text(file)


def unit(
    file: Path, *, hdu: str | int | None = None, column: str | None = None, variable: str | None = None
) -> str:
    """The unit that a file says an array has: ``BUNIT``, ``TUNIT`` or ``units``; empty if it does not say.

    Parameters
    ----------
    file, hdu, column, variable
        As for `open_array`.

    Raises
    ------
    InputError
        It cannot be read, or does not hold what was asked for.
    """
    start = beginning(file)
    if start.startswith(fits_files.SIGNATURE):
        with fits_files.opened(file) as hdus:
            found = fits_files.find_hdu(hdus, hdu, file)
            said = found.header.get("BUNIT") if column is None else found.columns[column].unit
            return str(said or "").strip()
    if netcdf_files.is_netcdf(start) and variable is not None:
        return netcdf_files.NetcdfArray(file, variable).attribute("units")
    return ""


def variables(file: Path) -> list[str]:
    """Names of an IDL save file's variables; none of other files."""
    if not beginning(file).startswith(IDL_SIGNATURE):
        return []
    return sorted(_idl(file))


def _from_fits(file: Path, hdu: str | int | None, column: str | None) -> Stored:
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
        return Scaled(found.data, *fits_files.scaling(found.header, file))


def _from_netcdf(file: Path, variable: str | None) -> Stored:
    if variable is None:
        raise InputError("the variable is not named", where=file, expected="variable: its name")
    array = netcdf_files.NetcdfArray(file, variable)
    return array.moments() if array.has_moments else array


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
