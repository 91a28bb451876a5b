"""NetCDF files as readers open them: damage becomes an error that names the file, numbers stay on disk.

NetCDF-3 is read by scipy; NetCDF-4, which is HDF5, by h5netcdf (extra ``netcdf``).
"""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pipeline.crisp.signatures import beginning
from pipeline.errors import InputError, MisuseError

SUFFIXES = (".nc", ".nc3", ".nc4", ".cdf")
SIGNATURES = {b"CDF": "scipy", b"\x89HDF": "h5netcdf"}
"""What NetCDF files begin with, and the library that xarray reads them with."""

# xarray and the libraries below it report damage with whichever of these the damaged number leads to
DAMAGE = (
    OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError,
    MemoryError, NotImplementedError, ZeroDivisionError, AssertionError, EOFError, ImportError,
)  # fmt: skip


def is_netcdf(start: bytes) -> bool:
    """Whether a file that begins with these bytes is NetCDF (or HDF5)."""
    return any(start.startswith(signature) for signature in SIGNATURES)


def opened(path: str | Path, group: str | None = None) -> xr.Dataset:
    """Open a NetCDF file: nothing but the metadata is read, and nothing that is read is kept.

    Parameters
    ----------
    path : str or Path
        The file; its name says nothing.
    group : str, optional
        A group within it.

    Returns
    -------
    xarray.Dataset
        Scaled numbers unscaled, fill values NaN; times as the numbers that they are in the file.

    Raises
    ------
    InputError
        It is not NetCDF, cannot be read, or is damaged.
    MisuseError
        It is NetCDF-4, and h5netcdf is not installed.
    """
    start = beginning(path)
    engine = next((name for signature, name in SIGNATURES.items() if start.startswith(signature)), None)
    if engine is None:
        raise InputError(
            "not a NetCDF file",
            where=path,
            found=f"it begins with {start[:8]!r}",
            expected=" or ".join(map(repr, SIGNATURES)),
            remedy="leave this file out",
        )
    if engine == "h5netcdf" and importlib.util.find_spec("h5netcdf") is None:
        raise MisuseError(
            "NetCDF-4 files need h5netcdf, which is not installed",
            where=path,
            remedy="pip install 'flarefield[netcdf]'",
        )
    try:
        return xr.open_dataset(
            path, engine=engine, group=group, decode_times=False, decode_coords=False, cache=False
        )
    except DAMAGE as failure:
        raise InputError(
            "a damaged NetCDF file" if group is None else "no such group, or a damaged NetCDF file",
            where=path,
            found=f"{type(failure).__name__}: {failure}",
            remedy="fetch the file again, or leave it out",
        ) from failure


class NetcdfArray:
    """A variable of a NetCDF file, read as it is indexed.

    Parameters
    ----------
    path : str or Path
        The file.
    name : str
        The variable; ``group/variable`` of one in a group.

    Raises
    ------
    InputError
        As `opened` raises it, or there is no such variable; when indexed: what is indexed is damaged.
    """

    def __init__(self, path: str | Path, name: str) -> None:
        group, _, last = name.rpartition("/")
        dataset = opened(path, group or None)
        if last not in dataset.variables:
            raise InputError(
                "no such variable",
                where=path,
                found=", ".join(f"{key} {found.dims}" for key, found in dataset.variables.items()) or "none",
                expected=name,
                remedy="mend the description",
            )
        self._path, self._name, self._group = path, name, group
        self._variable = dataset.variables[last]

    @property
    def name(self) -> str:
        """As it was asked for."""
        return self._name

    @property
    def shape(self) -> tuple[int, ...]:
        """Size along each dimension."""
        return self._variable.shape

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dimensions."""
        return tuple(map(str, self._variable.dims))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the numbers, unscaled."""
        dtype: np.dtype[Any] = self._variable.dtype
        return dtype

    @property
    def step(self) -> float:
        """Of numbers that the file has as integers: what one more is; 0 of floats."""
        packing = self._variable.encoding
        if np.dtype(packing.get("dtype", self.dtype)).kind not in "iu":
            return 0.0
        return float(np.squeeze(packing.get("scale_factor", 1.0)))

    def __getitem__(self, key: Any, /) -> NDArray[Any]:  # noqa: ANN401
        try:
            return np.asarray(self._variable[key])
        except DAMAGE as failure:
            raise InputError(
                "a damaged NetCDF file",
                where=self._path,
                found=f"{self._name}: {type(failure).__name__}: {failure}",
                remedy="fetch the file again, or leave it out",
            ) from failure

    def attribute(self, name: str) -> str:
        """An attribute, as text; empty if there is none."""
        return str(self._variable.attrs.get(name, "")).strip()

    def beside(self, name: str, absolute: bool = False) -> NetcdfArray | None:
        """Another variable of the same group, or (`absolute`) of any; None if there is none."""
        path = name if absolute or not self._group else f"{self._group}/{name}"
        try:
            return NetcdfArray(self._path, path)
        except InputError:
            return None

    @property
    def has_moments(self) -> bool:
        """Whether the numbers are times that count from a moment."""
        return " since " in str(self._variable.attrs.get("units", ""))

    def moments(self) -> NDArray[Any]:
        """The whole variable, as ``datetime64``."""
        try:
            return np.asarray(xr.decode_cf(xr.Dataset({"moments": self._variable})).variables["moments"])
        except DAMAGE as failure:
            raise InputError(
                "the times cannot be decoded",
                where=self._path,
                found=f"{self._name}: {type(failure).__name__}: {failure}",
                expected="units such as seconds since 2014-09-06T00:00:00",
            ) from failure


def header(path: str | Path) -> str:
    """What a NetCDF file says of itself: dimensions, variables and attributes, as ``ncdump -h`` shows them.

    Parameters
    ----------
    path : str or Path
        The file.

    Raises
    ------
    InputError
        It cannot be read.
    """
    text = io.StringIO()
    opened(path).info(text)
    return text.getvalue()
