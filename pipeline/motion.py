"""How one scan of a line is displaced and turned against another, whatever the ribbons do in between.

Between two times of a flare ribbons brighten and move, and would take the displacement with them. So it is
found from the photosphere, which a flare changes least: the mean of both far wings. Where the core is much
brighter than the quiet Sun's, or where structures are much stronger than granules, the wings do not count
either. Of what is left the displacement in whole pixels is searched for (`pipeline.registration`); then the
rigid motion that most pixels follow is found by iterated least squares, in which pixels that change otherwise
lose their weight (robust estimation of parametric motion: Odobez & Bouthemy 1995,
doi:10.1006/jvci.1995.1029; weights of Beaton & Tukey 1974, doi:10.1080/00401706.1974.10489171).
"""

from __future__ import annotations

from dataclasses import dataclass

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

CHANGED = 3.0
"""Standard deviations of what two scans differ by, from which a pixel does not count."""

LOWER = (5.0, 30.0)  # percentiles that tell the quiet Sun's brightness where much of the field is brighter
OF_NORMAL = (-1.6449, -0.5244)  # and where they are in a normal distribution
COUNTS = 0.3  # weight from which a pixel says how much the scans differ
STEPS = 12  # of least squares at most
SETTLED = 0.003  # pixels of the last one
LEAST_WEIGHT = 0.15  # mean weight of a block that can tell its displacement
CLUSTER = 16  # pixels, beyond which errors of structures are independent
UNDERSTATED = 1.4
"""Errors that synthetic granules of known displacements had, over those that least squares say: 1.3 to 1.6,
in fields of 96 and of 200 pixels, one to eight scans apart, with and without ribbons."""


@dataclass(frozen=True)
class FoundMotion:
    """How one scan has to be moved to lie on another, and how well that is known.

    Attributes
    ----------
    shift : Shift
        Displacement and turn. Its confidence is the share of the field's blocks that, searched on their own,
        give the same motion to a pixel, of those that the flare leaves alone.
    error : float
        Standard error of the displacement, pixels; NaN where there is nothing to find it from.
    turn_error : float
        The same of the turn, degrees.
    """

    shift: Shift
    error: float
    turn_error: float


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
    nothing = FoundMotion(Shift(0.0, 0.0, 0.0), np.nan, np.nan)
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
    angle, displacement, error, turn_error = fitted
    confidence = _agreement(still, moving, angle, displacement, middle)
    shift = Shift(float(displacement[0]), float(displacement[1]), confidence, float(np.degrees(angle)))
    return FoundMotion(shift, error, float(np.degrees(turn_error)))


def _view(cube: Cube, wavelength: ArrayLike, rest_wavelength: float, field: Mask) -> _View:
    images = band_images(cube, wavelength, rest_wavelength)
    wings, known = np.zeros(field.shape, np.float32), np.zeros(field.shape, np.float32)
    flare = np.zeros(field.shape, np.float32)
    for band, image in images.items():
        good = field & np.isfinite(image) & (image > 0)
        if not good.any():
            continue
        flare = np.maximum(flare, _brightness(image, good))
        if band != "core":
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


def _fitted(
    still: _View, moving: _View, start: Array, middle: Array
) -> tuple[float, Array, float, float] | None:
    """Turn about the middle (rad), displacement, and their errors; None if nothing is left to tell them."""
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
        slope_y, slope_x = np.gradient(0.5 * (moved + still.contrast))
        # What is turned by a small angle is moved by it times (x, -y), along (y, x).
        design = np.stack((slope_y * x - slope_x * y, slope_y, slope_x)).reshape(3, -1)
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
    # What a displacement changes of the scores: a pixel's weight changes with it, too.
    off = np.square(left / (CHANGED * scale))
    response = (
        design * (counts * np.where(off < 1.0, (1.0 - off) * (1.0 - 5.0 * off), 0.0)).ravel()
    ) @ design.T
    if not np.linalg.cond(response) < 1e12:
        return None
    inverse = np.linalg.inv(response)
    scatter = _scatter(weighted * left.ravel(), still.mask.shape)
    covariance = UNDERSTATED**2 * inverse @ scatter @ inverse
    error = float(np.sqrt(max(np.trace(covariance[1:, 1:]), 0.0)))
    return angle, displacement, error, float(np.sqrt(max(covariance[0, 0], 0.0)))


def _scatter(scores: Array, shape: tuple[int, int]) -> Array:
    """Covariance of the sum of scores that are alike within structures (cluster-robust)."""
    sums = [
        np.add.reduceat(
            np.add.reduceat(one.reshape(shape), range(0, shape[0], CLUSTER), axis=0),
            range(0, shape[1], CLUSTER),
            axis=1,
        ).ravel()
        for one in scores
    ]
    return np.asarray(np.stack(sums) @ np.stack(sums).T)


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
