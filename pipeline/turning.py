"""Turning a frame about its middle and displacing it: where points go, and resampling by cubic splines.

A point of the frame is turned by an angle, counterclockwise where y points up, about the frame's middle, and
then displaced. Displacements alone are `pipeline.registration`'s, which knows faster ways for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.crisp.cube import Cube
from pipeline.resampling import MARGIN

Array = NDArray[np.float64]
Image = NDArray[np.float32]
Mask = NDArray[np.bool_]

STRIP = 256
"""Rows that are resampled at a time: what is in memory for it beside the block itself."""


def turning(degrees: float) -> Array:
    """Matrix that turns vectors (y, x) counterclockwise where y points up.

    Parameters
    ----------
    degrees : float

    Returns
    -------
    ndarray, shape (2, 2)
    """
    sine, cosine = np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))
    return np.array([[cosine, sine], [-sine, cosine]])


@dataclass(frozen=True)
class Motion:
    """A rigid motion of the points of a frame.

    Attributes
    ----------
    degrees : float
        By how much they are turned about the frame's middle, counterclockwise where y points up.
    displacement : tuple of float
        By how much they are then displaced, pixels (y, x).
    shape : tuple of int
        Pixels (y, x) of the frame.
    """

    degrees: float
    displacement: tuple[float, float]
    shape: tuple[int, int]

    @property
    def middle(self) -> Array:
        """The frame's middle, (y, x)."""
        return (np.array(self.shape) - 1) / 2.0

    def forth(self, points: Array) -> Array:
        """Where points (n, 2) of the frame go."""
        turned = (points - self.middle) @ turning(self.degrees).T
        return np.asarray(turned + self.middle + self.displacement)

    def back(self, points: Array) -> Array:
        """Where points (n, 2) come from."""
        return np.asarray((points - self.middle - self.displacement) @ turning(self.degrees) + self.middle)

    def image(
        self,
        image: NDArray[Any],
        order: int,
        corner: tuple[int, int] = (0, 0),
        onto: tuple[slice, slice] | None = None,
    ) -> NDArray[Any]:
        """An image after the motion, by splines; beyond its edges its last pixels come in (order 0: zero).

        Parameters
        ----------
        image : ndarray, shape (y, x)
            All of the frame, or a part.
        order : int
            Of the splines; 0 takes the nearest pixel.
        corner : tuple of int
            Where the image's first pixel lies in the frame.
        onto : tuple of slice, optional
            Which part of the frame is wanted; the image's own if left out.

        Returns
        -------
        ndarray
        """
        first = corner if onto is None else (onto[0].start, onto[1].start)
        shape = image.shape if onto is None else tuple(span.stop - span.start for span in onto)
        offset = self.back(np.array([first], dtype=np.float64))[0] - corner
        moved: NDArray[Any] = ndimage.affine_transform(
            image,
            turning(self.degrees).T,
            offset,
            output_shape=shape,
            order=order,
            mode="nearest" if order else "grid-constant",
        )
        return moved

    def source(self, part: tuple[slice, slice], margin: int = MARGIN) -> tuple[slice, slice]:
        """Where a part of the frame comes from, with a margin for splines; empty if beyond the frame.

        Parameters
        ----------
        part : tuple of slice
            Rows and columns, with explicit start and stop.
        margin : int
            Pixels.
        """
        corners = [
            (y, x) for y in (part[0].start, part[0].stop - 1) for x in (part[1].start, part[1].stop - 1)
        ]
        points = self.back(np.array(corners, dtype=np.float64))
        low = np.clip(np.floor(points.min(axis=0)).astype(int) - margin, 0, self.shape)
        high = np.clip(np.ceil(points.max(axis=0)).astype(int) + margin + 1, low, self.shape)
        return slice(int(low[0]), int(high[0])), slice(int(low[1]), int(high[1]))


def turned_mask(mask: Mask, motion: Motion) -> Mask:
    """Move a mask with its frame: each pixel's is that of the nearest one; False comes in at the edges.

    Parameters
    ----------
    mask : ndarray of bool, shape (y, x)
    motion : Motion
        Of frames of this shape.
    """
    return np.asarray(motion.image(mask, 0), dtype=np.bool_)


def surrounded(field: Mask, along_y: tuple[int, int], along_x: tuple[int, int]) -> Mask:
    """Pixels around which all are in the field; beyond the frame none is.

    Parameters
    ----------
    field : ndarray of bool, shape (y, x)
    along_y, along_x : tuple of int
        How many before and after the pixel are asked for, along each axis.
    """
    for axis, (before, after) in enumerate((along_y, along_x)):
        known = np.pad(field.swapaxes(0, axis), ((before, after), (0, 0)))
        steps = range(before + after + 1)
        whole = np.logical_and.reduce([known[step : step + field.shape[axis]] for step in steps])
        field = whole.swapaxes(0, axis)
    return field


def turned_field(field: Mask, motion: Motion) -> Mask:
    """Move a field of view with its frame: a pixel is in it if all around the point it comes from are.

    Parameters
    ----------
    field : ndarray of bool, shape (y, x)
    motion : Motion
        Of frames of this shape.
    """
    return turned_mask(surrounded(field, (2, 2), (2, 2)), motion)


def turned_flags(flags: NDArray[Any], motion: Motion) -> NDArray[Any]:
    """Move flags with their frame, each to the pixel nearest to where it belongs: none is lost in between.

    Parameters
    ----------
    flags : ndarray of integers, shape (y, x)
        Where two meet, both are kept.
    motion : Motion
        Of frames of this shape.
    """
    moved = np.zeros_like(flags)
    raised = np.argwhere(flags != 0)
    place = np.rint(motion.forth(raised.astype(np.float64))).astype(np.intp)
    there = ((place >= 0) & (place < flags.shape)).all(axis=1)
    np.bitwise_or.at(moved, tuple(place[there].T), flags[tuple(raised[there].T)])
    return moved


def turned_block(
    cube: Cube,
    field: Mask,
    motion: Motion,
    rows: slice,
    columns: slice,
    saturation: float,
    spoilt: NDArray[np.intp],
) -> Image:
    """One block of a scan after a motion, by cubic splines that know the field's edge and bad pixels.

    Parameters and returns are those of `pipeline.registration.resample`, and so is what happens to pixels
    outside of the field and to bad ones.
    """
    block = np.full((rows.stop - rows.start, columns.stop - columns.start, len(cube)), np.nan, np.float32)
    for first in range(rows.start, rows.stop, STRIP):
        last = min(first + STRIP, rows.stop)
        strip = block[first - rows.start : last - rows.start]
        _turn_into(strip, cube, field, motion, (first, columns.start), saturation, spoilt)
    return block


def _turn_into(
    block: Image,
    cube: Cube,
    field: Mask,
    motion: Motion,
    corner: tuple[int, int],
    saturation: float,
    spoilt: NDArray[np.intp],
) -> None:
    size = block.shape[:2]
    part = (slice(corner[0], corner[0] + size[0]), slice(corner[1], corner[1] + size[1]))
    box = motion.source(part)
    low = (box[0].start, box[1].start)
    inside = field[box]
    if not inside.any():
        return
    seen = motion.image(surrounded(inside, (2, 2), (2, 2)), 0, low, part)
    if not seen.any():
        return
    outside = None if inside.all() else (~inside, nearest_good(inside))
    place = spoilt[:, 1:] - low
    here = ((place >= 0) & (place < inside.shape)).all(axis=1)
    known, nearest = inside, None
    for index in range(len(cube)):
        image = np.array(cube[index, box[0], box[1]], dtype=np.float32)
        if outside is not None:
            image[outside[0]] = image[outside[1]]
        bad = ~((image > 0) & (image < saturation))  # what is not finite is neither
        bad[tuple(place[here & (spoilt[:, 0] == index)].T)] = True
        kept = None
        if bad.any():
            where = np.argwhere(bad)
            kept = where, image[bad]
            good = ~bad
            if good.any():
                if nearest is None or not np.array_equal(good, known):  # mostly as at the wavelength before
                    known, nearest = good, nearest_good(good)
                image[bad] = image[nearest]
        moved = motion.image(image, 3, low, part)
        if kept is not None:
            target = np.rint(motion.forth((kept[0] + low).astype(np.float64))).astype(int) - corner
            there = ((target >= 0) & (target < size)).all(axis=1)
            moved[tuple(target[there].T)] = kept[1][there]
        block[..., index] = np.where(seen, moved, np.float32(np.nan))


def nearest_good(good: Mask) -> tuple[NDArray[np.intp], ...]:
    """Index of the nearest good pixel, for every pixel that is not good.

    Parameters
    ----------
    good : ndarray of bool, shape (y, x)
    """
    if good.all():
        return (np.empty(0, dtype=np.intp),) * 2
    indices = ndimage.distance_transform_edt(~good, return_distances=False, return_indices=True)
    return tuple(indices[:, ~good])
