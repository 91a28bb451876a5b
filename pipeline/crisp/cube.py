"""Intensities of a scan that are read, and brought to physical units, only where they are indexed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import astropy.units as u
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError

DN = "DN"
"""Unit of a detector's numbers, whatever a file calls them."""
COUNTS = {
    **dict.fromkeys(("dn", "adu", "ct", "count", "counts"), DN),
    "electron": "electron",
    **dict.fromkeys(("ph", "photon"), "ph"),
}
"""Units, in lower case, of what detectors count, as astropy has them: no physical unit, and per no wavelength
interval. A number is some electrons, and an electron some photons: these are not comparable with one another.
"""

PER_ANGSTROM = u.Unit("erg s-1 cm-2 sr-1 Angstrom-1")
"""Intensity per wavelength interval, as the training grids have it."""


class Cube(Protocol):
    """Intensities (wavelength, y, x): an array, or something that is read as an array is.

    Indices and slices of all three axes may be given, and a mask over (y, x) in place of two: what is not
    indexed is not read. Iteration gives image by image.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Wavelengths, and pixels along y and x."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what indexing gives."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...  # noqa: ANN401

    def __iter__(self) -> Iterator[Any]: ...


class _Indexed(ABC):
    """A cube in single precision that is made as it is indexed."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Wavelengths, and pixels along y and x."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Single precision."""
        return np.dtype(np.float32)

    @property
    @abstractmethod
    def stored(self) -> Cube:
        """The same cube of the file's own numbers."""

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def __getitem__(self, key: Any, /) -> NDArray[np.float32]: ...  # noqa: ANN401

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return (self[index] for index in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:  # noqa: ANN401
        return np.asarray(self[:], dtype=dtype)


class ScaledCube(_Indexed):
    """A cube whose stored numbers become intensities as they are indexed: ``scale * number + offset``.

    Parameters
    ----------
    stored : Cube
        The numbers in the file (a memory-mapped array, a Zarr array).
    scale : ndarray, shape (wavelength,)
        Intensity of a step of one, at each wavelength.
    offset : ndarray, shape (wavelength,)
        Intensity of zero, at each wavelength.
    absent : sequence of tuple of float
        Numbers that stand for no intensity (FITS ``BLANK``, a pad), each with what a number may differ from
        it to be the same; they become NaN.
    full : tuple of float, optional
        The number from which on the detector is saturated, and the intensity that all such become.
    """

    def __init__(
        self,
        stored: Cube,
        scale: NDArray[np.float64],
        offset: NDArray[np.float64],
        absent: Sequence[tuple[float, float]] = (),
        full: tuple[float, float] | None = None,
    ) -> None:
        self._stored = stored
        # Single precision has all integers of 16 bits, and keeps them apart beside an offset of their size.
        short = stored.dtype.itemsize <= (4 if stored.dtype.kind == "f" else 2)
        enough = short and np.all(np.abs(offset) <= 2.0**16 * np.abs(scale))
        self._precision = np.dtype(np.float32 if enough else np.float64)
        self._scale = scale.astype(self._precision)
        self._offset = offset.astype(self._precision)
        self._absent = tuple(absent)
        self._full = full

    @property
    def shape(self) -> tuple[int, ...]:
        """Wavelengths, and pixels along y and x."""
        return self._stored.shape

    @property
    def stored(self) -> Cube:
        """The numbers in the file."""
        return stored_numbers(self._stored)

    def __getitem__(self, key: Any, /) -> NDArray[np.float32]:  # noqa: ANN401
        stored = np.asarray(self._stored[key])
        along = key[0] if isinstance(key, tuple) else key
        scale, offset = self._scale[along], self._offset[along]
        if scale.ndim:
            axes = (..., *([None] * (stored.ndim - 1)))
            scale, offset = scale[axes], offset[axes]
        with np.errstate(over="ignore"):  # what single precision cannot hold is infinite, and unusable
            values = (stored.astype(self._precision) * scale + offset).astype(np.float32, copy=False)
        if self._full is not None:
            values = np.where(stored >= self._full[0], np.float32(self._full[1]), values)
        for number, apart in self._absent:
            there = stored == number if apart == 0.0 else np.abs(stored - number) < apart
            values = np.where(there, np.float32(np.nan), values)
        return np.asarray(values)


class PlacedCube(_Indexed):
    """A cube in another frame of the same pixels, moved by whole pixels; NaN where it has none.

    Parameters
    ----------
    cube : Cube
        The cube.
    shape : tuple of int
        Pixels (y, x) of the other frame.
    corner : tuple of int
        Where its first pixel lies there, (y, x); it may be outside.
    """

    def __init__(self, cube: Cube, shape: tuple[int, int], corner: tuple[int, int]) -> None:
        self._cube, self._frame, self._corner = cube, shape, corner

    @property
    def shape(self) -> tuple[int, ...]:
        """Wavelengths, and pixels along y and x."""
        return (len(self._cube), *self._frame)

    @property
    def stored(self) -> Cube:
        """The file's own numbers, placed alike."""
        stored = stored_numbers(self._cube)
        return self if stored is self._cube else PlacedCube(stored, self._frame, self._corner)

    def __getitem__(self, key: Any, /) -> NDArray[np.float32]:  # noqa: ANN401
        along, *rest = key if isinstance(key, tuple) else (key,)
        if len(rest) == 1 and isinstance(rest[0], np.ndarray) and rest[0].ndim == 2:
            return self[along][..., rest[0]]
        wanted, inside, spans, own = [], [], [], []
        for axis, size in enumerate(self._frame):
            indices = np.arange(size)[rest[axis] if axis < len(rest) else slice(None)]
            moved = np.atleast_1d(indices) - self._corner[axis]
            there = np.flatnonzero((moved >= 0) & (moved < self._cube.shape[axis + 1]))
            first = int(moved[there].min(initial=self._cube.shape[axis + 1]))
            wanted.append(indices.shape)
            inside.append(there)
            spans.append(slice(first, int(moved[there].max(initial=first - 1)) + 1))
            own.append(moved[there] - first)
        part = np.asarray(self._cube[along, spans[0], spans[1]])
        wavelengths = part.shape[:-2]
        values = np.full((*wavelengths, *(int(np.prod(shape)) for shape in wanted)), np.nan, np.float32)
        here: tuple[Any, ...] = (..., *_grid(inside))
        source: tuple[Any, ...] = (..., *_grid(own))
        values[here] = part[source]
        return values.reshape((*wavelengths, *wanted[0], *wanted[1]))


def _grid(axes: Sequence[NDArray[np.intp]]) -> tuple[Any, ...]:
    """Indices of all combinations of places along axes; where they can be slices, which are copied sooner."""
    if all(places.size and (np.diff(places) == 1).all() for places in axes):
        return tuple(slice(int(places[0]), int(places[-1]) + 1) for places in axes)
    return np.ix_(*axes)


class IncompleteCube(_Indexed):
    """A cube that lacks the images at some wavelengths of an axis; these are NaN.

    Parameters
    ----------
    cube : Cube
        The images that there are.
    present : sequence of int
        Their places on the axis, ascending.
    wavelengths : int
        Length of the axis.
    """

    def __init__(self, cube: Cube, present: Sequence[int], wavelengths: int) -> None:
        self._cube, self._present = cube, tuple(present)
        self._own = {place: own for own, place in enumerate(present)}
        self._wavelengths = wavelengths

    @property
    def shape(self) -> tuple[int, ...]:
        """Wavelengths, and pixels along y and x."""
        return (self._wavelengths, *self._cube.shape[1:])

    @property
    def stored(self) -> Cube:
        """The file's own numbers where there are images."""
        stored = stored_numbers(self._cube)
        return self if stored is self._cube else IncompleteCube(stored, self._present, self._wavelengths)

    def __getitem__(self, key: Any, /) -> NDArray[np.float32]:  # noqa: ANN401
        along, *rest = key if isinstance(key, tuple) else (key,)
        places = np.arange(self._wavelengths)[along]
        if places.ndim:
            return np.stack([self[(int(place), *rest)] for place in places])
        own = self._own.get(int(places))
        image = np.asarray(self._cube[(own or 0, *rest)], dtype=np.float32)
        return image if own is not None else np.full_like(image, np.nan)


def stored_numbers(cube: Cube) -> Cube:
    """The numbers that a file holds, in place of intensities made of them.

    Images that are equal in a file are so no more once each is multiplied by a factor of its own.

    Parameters
    ----------
    cube : Cube, shape (wavelength, y, x)

    Returns
    -------
    Cube, shape (wavelength, y, x)
        The same one where the numbers are the intensities.
    """
    return cube.stored if isinstance(cube, _Indexed) else cube


def as_intensities(
    stored: Cube,
    factors: NDArray[np.float64],
    step: float,
    zero: float,
    blank: float | None,
    full: tuple[float, float] | None = None,
    padding: tuple[float, float] | None = None,
) -> Cube:
    """Make intensities of the numbers in a file; numbers that are intensities already stay as they are.

    Parameters
    ----------
    stored : Cube
        The numbers in the file.
    factors : ndarray, shape (wavelength,)
        What `intensity_scale` found.
    step, zero, blank
        The file's own scaling (`pipeline.crisp.fits_files.scaling`).
    full
        As `ScaledCube` has it.
    padding : tuple of float, optional
        A number that stands for no intensity, in the file's unit, and what others may differ from it to be
        the same.
    """
    if (step, zero, blank, padding) == (1.0, 0.0, None, None) and np.all(factors == 1.0):
        return stored
    absent = [] if blank is None else [(float(blank), 0.0)]
    if padding is not None and step != 0.0:
        absent.append(((padding[0] - zero) / step, padding[1] / abs(step)))
    return ScaledCube(stored, step * factors, zero * factors, absent, full)


def intensity_scale(
    unit: str, wavelength: NDArray[np.float64], where: str
) -> tuple[str, NDArray[np.float64]]:
    """Find what brings intensities to a unit in which two lines can be compared.

    Counts stay counts, electrons electrons, dimensionless (relative) intensities stay so; intensities per
    frequency or per any wavelength interval become those per Angstrom, `PER_ANGSTROM`: per frequency the
    factor depends on the wavelength, and the ratio of the two lines would be off by 1.69 without it.

    Parameters
    ----------
    unit : str
        What the file says.
    wavelength : ndarray, shape (wavelength,)
        In vacuum, Angstrom.
    where : str
        The file, for the error.

    Returns
    -------
    unit : str
        One of `COUNTS`, ``""``, or that of intensities per Angstrom.
    factors : ndarray, shape (wavelength,)
        What the file's numbers are multiplied by at each wavelength.

    Raises
    ------
    InputError
        The unit is not understood, or not one of intensity.
    """
    same = np.ones(len(wavelength))
    if (counted := COUNTS.get(unit.strip().lower())) is not None:
        return counted, same
    try:
        found = u.Unit(unit)
        if found.physical_type == "dimensionless":
            return "", same * found.to(u.dimensionless_unscaled)
        factors = (same * found).to_value(PER_ANGSTROM, u.spectral_density(wavelength * u.Angstrom))
    except (ValueError, TypeError) as failure:
        raise InputError(
            "the unit of the intensities is not known",
            where=where,
            found=repr(unit),
            expected="counts (DN), or an intensity per steradian and frequency or wavelength, "
            "for example W m-2 Hz-1 sr-1",
            remedy="mend the header",
        ) from failure
    return PER_ANGSTROM.to_string(), np.asarray(factors)
