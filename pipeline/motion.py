"""How one scan of a line is displaced and turned against another, whatever the ribbons do in between.

Between two times of a flare ribbons brighten and move, and would take the displacement with them. So it is
found from the photosphere, which a flare changes least: the mean of both far wings. Where the core is much
brighter than the quiet Sun's, or where structures are much stronger than granules, the wings do not count
either, and neither does what is so near to a ribbon that they show, or to the frame's edge, that these have a
part in its contrast: they would pull at the granules, a little in each scan. Of what is left the displacement
in whole pixels is searched for (`pipeline.registration`); then the rigid motion that most pixels follow is
found by iterated least squares, in which pixels that change otherwise lose their weight (robust estimation of
parametric motion: Odobez & Bouthemy 1995, doi:10.1006/jvci.1995.1029; weights of Beaton & Tukey 1974,
doi:10.1080/00401706.1974.10489171).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from pipeline.crisp.cube import Cube
from pipeline.registration import (
    AGREEMENT,
    LARGEST,
    LARGEST_DETAIL,
    NORMAL,
    SMALLEST_DETAIL,
    Image,
    Mask,
    Shift,
    band_images,
    blocks_of,
    depth,
    middle_box,
    smooth,
    whole_pixels,
)
from pipeline.turning import turning

Array = NDArray[np.float64]

LARGEST_SEARCH = 256
"""Pixels of the field's middle in which large jumps are searched."""

STRONG = 1.7
"""Times as strong as usual: structures from here on are hardly granules."""

BRIGHT = 2.0
"""Standard deviations of the quiet Sun's core above its mean, from which a pixel is taken for the flare's."""

RIBBON = 3.0
"""The same in the wings, from which a pixel's surroundings do not count either."""

REACH = round(2.0 * LARGEST_DETAIL)
"""Pixels to which a ribbon has a part in the contrast of what is beside it."""

CHANGED = 3.0
"""Standard deviations of what two scans differ by, from which a pixel does not count."""

LOWER = (5.0, 30.0)  # percentiles that tell the quiet Sun's brightness where much of the field is brighter
OF_NORMAL = (-1.6449, -0.5244)  # and where they are in a normal distribution
COUNTS = 0.3  # weight from which a pixel says how much the scans differ
STEPS = 12  # of least squares at most
SETTLED = 0.003  # pixels of the last one
LEAST_WEIGHT = 0.15  # mean weight of a block that can tell its displacement
ACROSS = 4  # regions of the field, each way
REGIONS = ACROSS**2
"""Regions that are left out in turn, to see how well a motion is known."""


@dataclass(frozen=True)
class FoundMotion:
    """How one scan has to be moved to lie on another, and how well that is known.

    Attributes
    ----------
    shift : Shift
        Displacement and turn. Its confidence is the share of the field's blocks that, searched on their own,
        give the same motion to a pixel, of those that the flare leaves alone.
    without : ndarray, shape (REGIONS, 3)
        What the displacement (y, x; pixels) and the turn (degrees) become more if a region of the field is
        left out, for each; NaN where there is nothing to find them from.
    """

    shift: Shift
    without: Array

    @property
    def error(self) -> float:
        """Standard error of the displacement, pixels."""
        return float(np.hypot(*spread(self.without[:, :2])))

    @property
    def turn_error(self) -> float:
        """Standard error of the turn, degrees."""
        return float(spread(self.without[:, 2]))


def spread(without: Array) -> Array:
    """Standard errors by the jackknife, from what numbers become without each region of the field.

    Regions see different granules, so what leaving them out changes tells the error whatever it comes from:
    granules that change, that move on their own, ribbons. It tells that of any combination of links too, if
    each region is left out of all of them: errors that links share are then not taken for independent ones.
    (Quenouille 1956, doi:10.1093/biomet/43.3-4.353; Cameron & Miller 2015, doi:10.3368/jhr.50.2.317, for
    groups that stay alike along time.)

    Parameters
    ----------
    without : ndarray, shape (REGIONS, ...)
        Differences that leaving out each region makes.

    Returns
    -------
    ndarray, shape (...)
    """
    return np.asarray(np.sqrt((REGIONS - 1) / REGIONS * np.sum(np.square(without), axis=0)))


@dataclass(frozen=True)
class _View:
    """A scan's photosphere: contrast of granules, how much each pixel counts, and where it is known."""

    contrast: Image
    weight: Image
    mask: Mask


def find_motion(
    cubes: tuple[Cube, Cube],
    wavelengths: tuple[ArrayLike, ArrayLike],
    rest_wavelengths: tuple[float, float],
    fields: tuple[Mask, Mask],
) -> FoundMotion:
    """Find the rigid motion that brings one scan onto another of the same line.

    Parameters
    ----------
    cubes : tuple of Cube, shape (wavelength, y, x)
        The scan that stays, and the one to be moved; frames of one size.
    wavelengths, rest_wavelengths, fields
        Theirs, as for `pipeline.registration.find_shift`.

    Returns
    -------
    FoundMotion
    """
    box = middle_box(fields[0] & fields[1], LARGEST)
    still, moving = (
        _view(cube[:, *box], wavelength, rest, field[box])
        for cube, wavelength, rest, field in zip(cubes, wavelengths, rest_wavelengths, fields, strict=True)
    )
    nothing = FoundMotion(Shift(0.0, 0.0, 0.0), np.full((REGIONS, 3), np.nan))
    search = middle_box(still.mask & moving.mask, LARGEST_SEARCH)
    start = _searched(still, moving, search)
    if start is None:
        return nothing
    # A frame's middle is what it is turned about.
    first = np.array([span.start for span in box], dtype=np.float64)
    middle = (np.array(fields[0].shape) - 1.0) / 2.0 - first
    fitted = _fitted(still, moving, start, middle)
    if fitted is None:
        return nothing
    angle, displacement, without = fitted
    confidence = _agreement(still, moving, angle, displacement, middle)
    shift = Shift(float(displacement[0]), float(displacement[1]), confidence, float(np.degrees(angle)))
    return FoundMotion(shift, without)


def _view(cube: Cube, wavelength: ArrayLike, rest_wavelength: float, field: Mask) -> _View:
    images = band_images(cube, wavelength, rest_wavelength)
    wings, known = np.zeros(field.shape, np.float32), np.zeros(field.shape, np.float32)
    flare, ribbon = np.zeros(field.shape, np.float32), np.zeros(field.shape, np.float32)
    for band, image in images.items():
        good = field & np.isfinite(image) & (image > 0)
        if not good.any():
            continue
        brightness = _brightness(image, good)
        flare = np.maximum(flare, brightness)
        if band != "core":
            ribbon = np.maximum(ribbon, brightness)
            wings[good] += image[good] / np.median(image[good])
            known += good
    good = known > 0
    # Bad pixels in the field take what their neighbours show; as holes they would break it up.
    mask = np.asarray(ndimage.binary_fill_holes(good), dtype=np.bool_)
    if not good.any():
        return _View(wings, np.zeros_like(wings), mask)
    level = np.where(good, wings / np.maximum(known, 1.0) - 1.0, 0.0).astype(np.float32)
    details = smooth(level, good, SMALLEST_DETAIL) - smooth(level, good, LARGEST_DETAIL)
    contrast = np.where(mask, details, np.float32(0.0))
    strength = np.sqrt(smooth(contrast * contrast, mask, LARGEST_DETAIL))
    usual = max(float(np.median(strength[mask])), float(np.finfo(np.float32).tiny))
    weight = mask / (1.0 + (strength / (STRONG * usual)) ** 4) / (1.0 + (flare / BRIGHT) ** 4)
    # The frame's edge, where smoothing ends, stays where it is, and a ribbon's skirts move with it.
    weight[depth(mask) <= LARGEST_DETAIL] = 0.0
    weight[ndimage.maximum_filter(ribbon, 2 * REACH + 1) >= RIBBON] = 0.0
    return _View(np.asarray(contrast / usual, np.float32), weight.astype(np.float32), mask)


def _brightness(image: Image, good: Mask) -> Image:
    """Standard deviations of the quiet Sun by which surroundings are brighter than it; none if they are not.

    The quiet Sun is what the lower part of the field's brightness belongs to, where the median does not: the
    smaller of two estimates is not carried away by spots on one side or by ribbons on the other.
    """
    surroundings = smooth(np.where(good, image, np.float32(0.0)), good, LARGEST_DETAIL)
    values = surroundings[good]
    median = float(np.median(values))
    low, high = np.percentile(values, LOWER)
    spread = (high - low) / (OF_NORMAL[1] - OF_NORMAL[0])
    level = min(median, high - OF_NORMAL[1] * spread)
    spread = min(spread, NORMAL * float(np.median(np.abs(values - median))))
    excess = (surroundings - level) / max(spread, float(np.finfo(np.float32).tiny))
    return np.asarray(np.where(good, np.clip(excess, 0.0, 1e6), 0.0), dtype=np.float32)


def _searched(still: _View, moving: _View, part: tuple[slice, slice]) -> Array | None:
    """Displacement in whole pixels; None if there is nothing to see."""
    images = [(view.contrast * view.weight)[part] for view in (still, moving)]
    return whole_pixels(images[0], images[1], still.mask[part], moving.mask[part])


def _fitted(still: _View, moving: _View, start: Array, middle: Array) -> tuple[float, Array, Array] | None:
    """Turn about the middle (rad), displacement, and what both become more without each region of the field.

    None if nothing is left to tell them.
    """
    y, x = (line - centre for line, centre in zip(np.indices(still.mask.shape), middle, strict=True))
    splines = ndimage.spline_filter(moving.contrast.astype(np.float64), 3, mode="mirror")
    angle, displacement = 0.0, start.astype(np.float64)
    for _ in range(STEPS):
        back = turning(-np.degrees(angle))
        corner = middle - back @ (middle + displacement)
        moved = ndimage.affine_transform(splines, back, corner, prefilter=False, mode="mirror")
        counts = ndimage.affine_transform(moving.weight, back, corner, order=1, mode="constant")
        counts = np.minimum(counts, still.weight)
        left = moved - still.contrast
        known = counts > COUNTS
        if not known.any():
            return None
        scale = max(NORMAL * float(np.median(np.abs(left[known]))), 1e-3)
        weight = counts * np.square(np.clip(1.0 - np.square(left / (CHANGED * scale)), 0.0, None))
        design = _slopes(0.5 * (moved + still.contrast), y, x).reshape(3, -1)
        weighted = design * weight.ravel()
        normal = weighted @ design.T
        if not np.linalg.cond(normal) < 1e12:
            return None
        step = np.linalg.solve(normal, weighted @ left.ravel())
        displacement = turning(np.degrees(step[0])) @ displacement + step[1:]
        angle += float(step[0])
        reach = np.abs(step[0]) * max(still.mask.shape) / 2.0
        if max(reach, np.abs(step[1:]).max()) < SETTLED:
            break
    # What a displacement changes of the scores. Slopes and weights of pixels change with it, too, so that
    # slopes which both scans have in common are what counts: the fewer, the more granules have changed.
    off = np.square(left / (CHANGED * scale))
    counted = counts * np.where(off < 1.0, (1.0 - off) * (1.0 - 5.0 * off), 0.0)
    slopes = [_slopes(image, y, x) for image in (moved, still.contrast)]
    common = slopes[0][:, None] * slopes[1][None] * counted
    response = _of_regions(0.5 * (common + common.swapaxes(0, 1)))
    others = response.sum(axis=0) - response
    if not (np.linalg.cond(others) < 1e12).all():
        return None
    scores = _of_regions(weighted.reshape(3, *left.shape) * left)
    angles, *steps = np.linalg.solve(others, -scores[..., None])[..., 0].T
    return angle, displacement, np.stack((*steps, np.degrees(angles)), axis=1)


def _slopes(image: NDArray[np.floating[Any]], y: Array, x: Array) -> Array:
    """What an image changes when it is turned by a small angle about the middle, and moved: (3, y, x)."""
    slope_y, slope_x = np.gradient(image)
    # What is turned by a small angle is moved by it times (x, -y), along (y, x).
    return np.stack((slope_y * x - slope_x * y, slope_y, slope_x))


def _of_regions(values: Array) -> Array:
    """Sums (REGIONS, ...) of values (..., y, x) over each region of the field."""
    for axis in (-2, -1):
        edges = np.linspace(0, values.shape[axis], ACROSS, endpoint=False).astype(int)
        values = np.add.reduceat(values, edges, axis=axis)
    return np.moveaxis(values.reshape(*values.shape[:-2], REGIONS), -1, 0)


def _agreement(still: _View, moving: _View, angle: float, displacement: Array, middle: Array) -> float:
    """Share of the blocks that give the same motion when searched on their own."""
    votes = []
    for block in blocks_of(still.mask & moving.mask):
        if min(float(view.weight[block].mean()) for view in (still, moving)) < LEAST_WEIGHT:
            continue
        found = _searched(still, moving, block)
        centre = np.array([0.5 * (span.start + span.stop - 1) for span in block]) - middle
        there = displacement + angle * np.array([centre[1], -centre[0]])
        votes.append(found is not None and np.abs(found - there).max() <= AGREEMENT)
    return float(np.mean(votes)) if len(votes) > 2 else 0.0
