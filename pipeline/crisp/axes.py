"""A scan within an array of more axes than its three, or of axes in another order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Axis = Literal["time", "stokes", "wavelength", "y", "x"]
"""What an axis of an array can be."""

OF_A_CUBE: tuple[Axis, ...] = ("wavelength", "y", "x")


class Stored(Protocol):
    """An array in a file: whole numbers and slices index it, and only what is indexed is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size along each axis."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its numbers."""
        ...

    def __getitem__(self, key: Any, /) -> Any: ...  # noqa: ANN401


class ScanOfArray:
    """One scan of an array, read as a cube (wavelength, y, x) is; see `pipeline.crisp.cube.Cube`.

    Parameters
    ----------
    stored : Stored
        The array: mapped, or read as it is indexed.
    axes : sequence of str
        What the array's axes are, in their order; ``wavelength``, ``y`` and ``x`` among them.
    at : mapping
        Index along each of the other axes.
    order : sequence of int, optional
        The array's indices of the cube's wavelengths, where the array has them in another order.

    Notes
    -----
    What is read is the smallest block that holds what was indexed, or, for a mask, image by image.
    """

    def __init__(
        self,
        stored: Stored,
        axes: Sequence[Axis],
        at: Mapping[Axis, int],
        order: Sequence[int] | NDArray[np.integer] | None = None,
    ) -> None:
        self._stored = stored
        self._axes = tuple(axes)
        self._at = dict(at)
        points = stored.shape[self._axes.index("wavelength")]
        self._order = np.arange(points) if order is None else np.asarray(order)

    @property
    def shape(self) -> tuple[int, ...]:
        """Wavelengths, and pixels along y and x."""
        rows, columns = (self._stored.shape[self._axes.index(axis)] for axis in OF_A_CUBE[1:])
        return len(self._order), rows, columns

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of the array."""
        return self._stored.dtype

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[index] for index in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:  # noqa: ANN401
        return np.asarray(self[:], dtype=dtype)

    def __getitem__(self, key: Any, /) -> NDArray[Any]:  # noqa: ANN401
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) == 2 and np.ndim(keys[1]) == 2:
            points, mask = self._order[keys[0]], keys[1]
            if np.ndim(points) == 0:
                return self._image(int(points))[mask]
            images = [self._image(int(point))[mask] for point in points]
            return np.stack(images) if images else np.empty((0, int(np.sum(mask))), self.dtype)
        numbers = (self._order, np.arange(self.shape[1]), np.arange(self.shape[2]))
        wanted = [
            axis[along] for axis, along in zip(numbers, keys + (slice(None),) * (3 - len(keys)), strict=True)
        ]
        if any(np.size(indices) == 0 for indices in wanted):
            return np.empty([np.size(indices) for indices in wanted if np.ndim(indices)], self.dtype)
        first = [int(np.min(indices)) for indices in wanted]
        block = self._block(*(slice(low, int(np.max(i)) + 1) for low, i in zip(first, wanted, strict=True)))
        # From the last axis to the first: an axis that a number takes away does not renumber those before.
        for number in (2, 1, 0):
            block = np.asarray(block[(*[slice(None)] * number, wanted[number] - first[number])])
        return block

    def _image(self, point: int) -> NDArray[Any]:
        image: NDArray[Any] = self._block(slice(point, point + 1), slice(None), slice(None))[0]
        return image

    def _block(self, *along: slice) -> NDArray[Any]:
        """A block (wavelength, y, x), by slices of the array's own indices."""
        at = {**self._at, **dict(zip(OF_A_CUBE, along, strict=True))}
        block = np.asarray(self._stored[tuple(at[axis] for axis in self._axes)])
        left = [axis for axis in self._axes if axis in OF_A_CUBE]
        return np.transpose(block, [left.index(axis) for axis in OF_A_CUBE])
