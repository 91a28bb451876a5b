"""Zarr groups of the Python package ``sst-crispy`` (Armstrong): one directory is one scan of one line.

The group holds the array ``data``, ((Stokes,) wavelength, y, x), in data numbers; its attributes are the
header: ``crpix`` and ``crval`` of those axes in this order (counted from 1 as in FITS; Angstrom, arcsec),
``pixel_scale`` (arcsec), ``date_obs`` and ``time_obs``, ``instrument`` and ``element``; wavelengths as
``wavels`` or ``spect_pos`` where they are not evenly spaced, else by ``wavel_scale``. Whether they are in air
or in vacuum it does not say: the caller has to. The layout is that of version 1.0.2 of the package
(https://pypi.org/project/sst-crispy), whose class ``CRISP`` reads it.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline.crisp import fits_files
from pipeline.crisp.axes import Axis, ScanOfArray
from pipeline.crisp.cube import DN, Cube
from pipeline.crisp.scan import (
    ForeignFileError,
    Frame,
    OtherKindError,
    OtherLineError,
    Scan,
    identify_line,
    vacuum_axis,
)
from pipeline.crisp.wavelengths import Medium
from pipeline.errors import InputError

FORMAT = "crispy"
SUFFIXES = (".zarr",)
DATA = "data"
KEYS = ("crpix", "crval", "pixel_scale", "date_obs", "time_obs")
"""What the header of a scan has."""
CROPPED = ("frame_dims", "x_min", "y_min", "angle")
"""What it has besides where the package has rotated and cropped the scan: its coordinates do not know."""

METADATA = (".zarray", ".zattrs", "zarr.json")
BLOSC = struct.Struct("<12xI")
"""Of a Blosc chunk's header: the number of bytes in the file."""

# zarr reports damage with whichever of these the damaged file leads to
DAMAGE = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError)


def read_scans(path: str | Path, medium: Medium | None = None) -> tuple[Scan, ...]:
    """Describe the one scan of a group, from its metadata alone.

    Parameters
    ----------
    path : str or Path
        The directory, of Zarr's version 2 or 3; its name says nothing.
    medium : {"vacuum", "air"}, optional
        What the wavelengths are measured in.

    Raises
    ------
    ForeignFileError
        It is no such group, or of wide-band images or another line (`OtherLineError`).
    InputError
        It is one, but is damaged or incomplete, or nobody says the medium.
    """
    file = Path(path).absolute()
    array = _array(file)
    header = dict(array.attrs)
    lacking = [key for key in KEYS if key not in header]
    if lacking:
        raise ForeignFileError(
            "a Zarr group of something else than crispy's scans",
            where=file,
            found=f"an array {DATA!r} without {', '.join(lacking)}",
            expected=f"the attributes {', '.join(KEYS)}",
            remedy="leave it out",
        )
    _axes(array, file)
    if array.dtype.kind not in "iuf":
        _refuse(file, "the data are no numbers", array.dtype, "integers or floats")
    if all(key in header for key in CROPPED):
        _refuse(
            file,
            "the scan was rotated and cropped out of its coordinates",
            f"angle {header['angle']}",
            "the full frame, as crispy's reconstruct_full_frame makes it",
        )
    _check_chunks(array, file)
    wavelength = _wavelengths(header, array.shape[-3], file)
    vacuum, medium, stated_by = vacuum_axis(wavelength, None, medium, str(file))
    return (
        Scan(
            path=str(file),
            format=FORMAT,
            line=identify_line(vacuum, str(file)),
            time=fits_files.utc(
                f"{header['date_obs']}T{header['time_obs']}", "UTC", file, "date_obs, time_obs"
            ),
            wavelength=tuple(vacuum.tolist()),
            medium=medium,
            medium_stated_by=stated_by,
            shape=(array.shape[-2], array.shape[-1]),
            units=DN,
            units_of_file=DN,
            saturation=float(np.iinfo(array.dtype).max) if array.dtype.kind in "iu" else float("inf"),
            frame=_frame(header, file),
        ),
    )


def holds_data(folder: Path) -> bool:
    """Whether a Zarr group has an array of the name that scans have, without opening it."""
    return any((folder / DATA / name).is_file() for name in ("zarr.json", ".zarray"))


def read_headers(path: str | Path) -> tuple[str, ...]:
    """The attributes, as JSON."""
    return (json.dumps(dict(_array(Path(path)).attrs), indent=1),)


def open_intensity(scan: Scan) -> Cube:
    """Intensities (Stokes I) of a scan, (wavelength, y, x): the chunks that are indexed are read.

    Parameters
    ----------
    scan : Scan
        As `read_scans` returned it.

    Raises
    ------
    InputError
        The group has changed or gone since it was described.
    """
    file = Path(scan.path)
    array = _array(file)
    axes = _axes(array, file)
    if array.shape[-3:] != (len(scan.wavelength), *scan.shape):
        raise scan.changed(array.shape)
    _check_chunks(array, file)
    return ScanOfArray(_Chunks(array, file), axes, {"stokes": 0})


def open_wavelength_shift(scan: Scan) -> NDArray[np.float64] | None:
    """None: all pixels of the format have the same wavelengths."""
    return None


class _Chunks:
    """A Zarr array whose damage is an error that names its directory."""

    def __init__(self, array: zarr.Array[Any], file: Path) -> None:
        self._array, self._file = array, file
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, key: Any, /) -> NDArray[Any]:  # noqa: ANN401
        try:
            return np.asarray(self._array[key])
        except DAMAGE as failure:
            _refuse(self._file, "the data are damaged", f"{type(failure).__name__}: {failure}", cause=failure)


def _array(file: Path) -> zarr.Array[Any]:
    if not any((file / name).is_file() for name in ("zarr.json", ".zgroup")):
        raise OtherKindError("not a Zarr group", where=file, remedy="leave it out")
    try:
        found = zarr.open_group(file, mode="r").get(DATA)
    except DAMAGE as failure:
        _refuse(file, "a damaged Zarr group", f"{type(failure).__name__}: {failure}", cause=failure)
    if not isinstance(found, zarr.Array):
        raise ForeignFileError(
            "a Zarr group of something else than crispy's scans",
            where=file,
            found=f"no array {DATA!r}",
            remedy="leave it out",
        )
    return found


def _check_chunks(array: zarr.Array[Any], file: Path) -> None:
    """See to it that nothing is missing: Zarr gives its fill value for a chunk that is not there, and Blosc
    goes on reading in whatever memory lies behind one that is cut short."""
    if array.nchunks_initialized < array.nchunks:
        _refuse(file, "chunks are missing", f"{array.nchunks_initialized} of {array.nchunks}")
    if array.shards is not None or not any(
        "blosc" in type(each).__name__.lower() for each in array.compressors
    ):
        return
    for chunk in (file / DATA).rglob("*"):
        if chunk.is_dir() or chunk.name in METADATA:
            continue
        with chunk.open("rb") as stream:
            head = stream.read(BLOSC.size)
        needed = BLOSC.unpack(head)[0] if len(head) == BLOSC.size else BLOSC.size
        if chunk.stat().st_size < needed:
            _refuse(file, "a chunk is truncated", f"{chunk.name}: {chunk.stat().st_size} bytes", needed)


def _axes(array: zarr.Array[Any], file: Path) -> tuple[Axis, ...]:
    if array.ndim == 2:
        raise OtherLineError(
            "a wide-band image",
            where=file,
            found=array.shape,
            expected="a scan of a line",
            remedy="leave it out",
        )
    if array.ndim not in (3, 4) or 0 in array.shape:
        _refuse(file, "the data have other axes", array.shape, "((Stokes,) wavelength, y, x)")
    axes: tuple[Axis, ...] = ("stokes", "wavelength", "y", "x")
    return axes[4 - array.ndim :]


def _wavelengths(header: dict[str, Any], points: int, file: Path) -> NDArray[np.float64]:
    listed = next((header[key] for key in ("wavels", "spect_pos") if header.get(key) is not None), None)
    if listed is not None:
        wavelength = _numbers({"wavelengths": listed}, "wavelengths", file)
    elif "wavel_scale" in header:
        value, pixel = (_along(header, key, -3, file) for key in ("crval", "crpix"))
        (step,) = _numbers(header, "wavel_scale", file)
        wavelength = value + (np.arange(points) + 1.0 - pixel) * step
    else:
        _refuse(file, "the wavelengths are missing", "no wavels, spect_pos or wavel_scale")
    if wavelength.shape != (points,):
        _refuse(file, "the wavelengths do not fit the data", f"{wavelength.size}, {points} images")
    return wavelength


def _frame(header: dict[str, Any], file: Path) -> Frame:
    (scale,) = _numbers(header, "pixel_scale", file)
    pixel, value = ([_along(header, key, axis, file) for axis in (-1, -2)] for key in ("crpix", "crval"))
    return Frame(
        (pixel[0] - 1.0, pixel[1] - 1.0), (value[0], value[1]), (float(scale),) * 2, ((1.0, 0.0), (0.0, 1.0))
    )


def _along(header: dict[str, Any], key: str, axis: int, file: Path) -> float:
    values = _numbers(header, key, file)
    if len(values) < -axis:
        _refuse(file, "the header does not fit the data", f"{key} = {header[key]}", "a number for each axis")
    return float(values[axis])


def _numbers(header: dict[str, Any], key: str, file: Path) -> NDArray[np.float64]:
    try:
        values = np.atleast_1d(np.asarray(header[key], dtype=np.float64))
    except (ValueError, TypeError) as failure:
        _refuse(file, "the header holds no numbers", f"{key} = {header[key]!r}", cause=failure)
    if values.ndim != 1 or (key in ("pixel_scale", "wavel_scale") and len(values) != 1):
        _refuse(file, "the header holds no list of numbers", f"{key} = {header[key]!r}")
    return values


def _refuse(
    file: Path, problem: str, found: object, expected: object = None, cause: Exception | None = None
) -> NoReturn:
    raise InputError(
        problem, where=file, found=found, expected=expected, remedy="write the group again, or leave it out"
    ) from cause
