"""What is wrong with a scan: spikes, dead pixels, missing images; and how sharp it is.

A spike (a cosmic ray, an electronic glitch) is told from a structure of the Sun by three properties, none of
which depends on how bright the Sun is there:

- it is sharper than the telescope can make anything: L.A.Cosmic's principle (van Dokkum 2001,
  doi:10.1086/323894). CRISP's pixels sample the diffraction limit 2.4 (H-alpha) and 3.1 times (Ca II 8542),
  so that the neighbours of the brightest pixel of a point have two thirds of its excess over what surrounds
  it; of a spike, at least along one axis, they have little;
- it is there at one wavelength, for the others were exposed at other times; a pixel that sticks out at most
  wavelengths, towards the bright or the dark, is a bad one of the detector;
- it exceeds the noise, which is taken from the image itself by the median absolute deviation and grows with
  the root of the intensity, many times over.

Spikes wider than a pixel along both axes are not found. Nothing is repaired.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from pipeline.crisp.cube import Cube
from pipeline.registration import NORMAL, Image, Mask, band_images, middle_box

SIGNIFICANT = 8.0
"""Noise levels by which a spike exceeds the brighter of two opposite neighbours."""
SHARP = 0.65
"""Share of a pixel's excess over its surroundings that both of two opposite neighbours lack."""
ISOLATED = 0.5
"""Largest sharpness of the same pixel at the next wavelengths, of that of the spike."""
ALWAYS = 0.8
"""Share of the wavelengths at which a bad pixel of the detector is sharp."""

SAMPLE = 160  # pixels of the field's middle from which the noise is taken
MIDDLE = 512  # and from which the contrast is
LARGE = 33  # pixels: what is larger than this, granulation is not
ROWS = 32  # rows that are gone through at a time: they stay in the processor's cache

RING = np.array([(y, x) for y in range(-2, 3) for x in range(-2, 3) if max(abs(y), abs(x)) == 2])
Positions = tuple[NDArray[np.intp], NDArray[np.intp]]
Numbers = NDArray[Any]
"""An image of the file's own whole numbers, or in single precision."""


class Defect(IntFlag):
    """Bits of an observation's ``defects``: what is wrong with a pixel in either line."""

    SPIKE = 1
    """A cosmic ray or a glitch at some wavelength."""
    DEAD_PIXEL = 2
    """One value at all wavelengths, or far brighter or darker than its neighbours at most of them."""
    WAVELENGTH_MISSING = 4
    """The scan has no image at some wavelength."""


@dataclass(frozen=True)
class Survey:
    """What was found in a scan.

    Attributes
    ----------
    spikes : ndarray of int, shape (n, 3)
        Wavelength, y, x of each.
    dead : ndarray of bool, shape (y, x)
        Bad pixels of the detector.
    missing : tuple of int
        Wavelengths at which there is no image: one value everywhere, none, or the image before once more.
    unusable : int
        Pixels of the field that are not finite, not positive or saturated at some other wavelength.
    wavelengths : int
        Wavelengths of the scan.
    """

    spikes: NDArray[np.intp]
    dead: Mask
    missing: tuple[int, ...]
    unusable: int
    wavelengths: int

    @property
    def defects(self) -> NDArray[np.uint8]:
        """Bits of `Defect` for each pixel (y, x)."""
        bits = np.where(self.dead, np.uint8(Defect.DEAD_PIXEL), np.uint8(0))
        bits[self.spikes[:, 1], self.spikes[:, 2]] |= np.uint8(Defect.SPIKE)
        if self.missing:
            bits |= np.uint8(Defect.WAVELENGTH_MISSING)
        return bits

    @property
    def spoilt(self) -> NDArray[np.intp]:
        """Wavelength, y, x of every number that says nothing of the Sun, shape (n, 3), but missing images."""
        y, x = np.nonzero(self.dead)
        at = np.arange(self.wavelengths)
        dead = np.column_stack([np.repeat(at, y.size), np.tile(y, at.size), np.tile(x, at.size)])
        return np.concatenate([self.spikes, dead.astype(np.intp)])

    def sentences(self, offset: ArrayLike) -> Iterator[str]:
        """Say what was found, a sentence each.

        Parameters
        ----------
        offset : array_like, shape (wavelength,)
            Wavelengths from the line's rest, Angstrom.
        """
        if self.missing:
            named = ", ".join(f"{np.asarray(offset)[index]:+.3f}" for index in self.missing)
            yield (
                f"no image at {named} Angstrom from the line's rest: one value everywhere, none, or a copy "
                "of the one before"
            )
        if self.unusable:
            yield f"{self.unusable} pixels of the field are not finite, not positive or saturated somewhere"
        if len(self.spikes):
            pixels = len(np.unique(self.spikes[:, 1:], axis=0))
            yield f"{len(self.spikes)} spikes (cosmic rays or glitches) in {pixels} pixels"
        if count := int(np.count_nonzero(self.dead)):
            yield f"{count} dead or hot pixels"


def survey(cube: Cube, field: Mask, saturation: float = np.inf) -> Survey:
    """Look for everything that is wrong with a scan's pixels, in one pass, image by image.

    Parameters
    ----------
    cube : Cube, shape (wavelength, y, x)
        The scan, as it is in the file: not resampled.
    field : ndarray of bool, shape (y, x)
        Its field of view; what lies outside is not looked at.
    saturation : float
        Intensity from which a pixel is saturated.

    Returns
    -------
    Survey
    """
    box = middle_box(field, SAMPLE)
    unusable = np.zeros(field.shape, dtype=np.bool_)
    constant: Positions | None = None
    often = np.zeros(field.shape, dtype=np.uint16)
    dark: Positions | None = None
    spikes: list[NDArray[np.intp]] = []
    missing: list[int] = []
    first: Numbers | None = None
    before: Numbers | None = None
    waiting: tuple[int, Positions, NDArray[np.float32]] | None = None

    def judge(after: Numbers | None) -> None:
        """Decide on the sharp pixels of the image before, now that those beside it are known."""
        if waiting is None:
            return
        index, where, excess = waiting
        alone = np.ones(excess.size, dtype=np.bool_)
        for beside in (before, after):
            if beside is not None:
                alone &= ~(_excess(beside, where) > ISOLATED * excess)
        found = np.column_stack([np.full(excess.size, index), *where])[alone]
        spikes.append(found.astype(np.intp))

    last: Numbers | None = None
    for index, values in enumerate(cube):
        image = _native(values)
        noise = _Noise.of(image, field, box)
        if noise is None or (
            last is not None
            and np.array_equal(image[box], last[box], equal_nan=image.dtype.kind == "f")
            and np.array_equal(image, last, equal_nan=image.dtype.kind == "f")
        ):
            missing.append(index)
            continue
        if first is None:
            first = image
            dark = _dark_candidates(image, field, noise.level * SIGNIFICANT)
            dark_often = np.zeros(dark[0].size, dtype=np.uint16)
        elif constant is None:
            constant = _positions(field & (image == first))
        else:
            same = image[constant] == first[constant]
            constant = (constant[0][same], constant[1][same])
        candidates = _candidates(image, saturation, noise.level * SIGNIFICANT, unusable)
        # What is saturated is known as that.
        kept = _inside(field, candidates) & (image[candidates] < saturation)
        where = (candidates[0][kept], candidates[1][kept])
        excess, around = _excess(image, where), _around(image, where)
        sharp = _sharp(excess, image[where], around, noise)
        where, excess = (where[0][sharp], where[1][sharp]), excess[sharp]
        often[where] += 1
        assert dark is not None
        lack, around = _excess(image, dark, dark=True), _around(image, dark)
        dark_often += _sharp(lack, image[dark], around, noise)
        judge(image)
        before, last, waiting = last, image, (index, where, excess)
    judge(None)
    images = len(cube) - len(missing)
    dead = often >= max(ALWAYS * images, 2)
    if dark is not None:
        dead[dark] |= dark_often >= max(ALWAYS * images, 2)
    if constant is not None:
        dead[constant] = True
    found = np.concatenate([np.empty((0, 3), dtype=np.intp), *spikes])
    return Survey(
        found[~dead[found[:, 1], found[:, 2]]],
        dead,
        tuple(missing),
        int(np.count_nonzero(unusable & field)),
        len(cube),
    )


def granulation_contrast(cube: Cube, wavelength: ArrayLike, rest_wavelength: float, field: Mask) -> float:
    """Contrast of the line's wings: what the seeing has left of the granulation.

    Parameters
    ----------
    cube : Cube, shape (wavelength, y, x)
        The scan; of a large field the middle is read.
    wavelength : array_like, shape (wavelength,)
        Angstrom.
    rest_wavelength : float
        Of the line, Angstrom.
    field : ndarray of bool, shape (y, x)
        Its field of view.

    Returns
    -------
    float
        Robust standard deviation (by the median absolute deviation, so that ribbons count little) of the
        mean of both wings over its local mean; NaN where there is nothing to measure. Noise is in it: compare
        scans of one series.
    """
    first, last = np.asarray(wavelength)[[0, -1]]
    if not first < rest_wavelength < last:
        return float("nan")
    box = middle_box(field, MIDDLE)
    bands = band_images(cube[:, box[0], box[1]], wavelength, rest_wavelength)
    image = 0.5 * (bands["blue wing"] + bands["red wing"])
    good = field[box] & np.isfinite(image) & (image > 0)
    if not good.any():
        return float("nan")
    weight = ndimage.uniform_filter(good.astype(np.float32), LARGE, mode="constant")
    mean = ndimage.uniform_filter(np.where(good, image, np.float32(0.0)), LARGE, mode="constant")
    return NORMAL * _deviation(image[good] * weight[good] / mean[good])


@dataclass(frozen=True)
class _Noise:
    """Noise of an image, and the intensity at which it is so large."""

    level: float
    intensity: float

    @classmethod
    def of(cls, image: Numbers, field: Mask, box: tuple[slice, slice]) -> _Noise | None:
        """Take it from the differences of neighbours in a part; None if all values of the image are one."""
        part = image[box].astype(np.float32)
        good = field[box] & np.isfinite(part) & (part > 0)
        if not good.any() or np.ptp(part[good]) == 0.0:
            part = image.astype(np.float32)
            good = field & np.isfinite(part) & (part > 0)
            if not good.any() or np.ptp(part[good]) == 0.0:
                return None
        between = part[1:-1] - 0.5 * (part[:-2] + part[2:])
        known = good[1:-1] & good[:-2] & good[2:]
        values = between[known] if known.any() else part[good]
        # A third of the variance of the difference is that of the two neighbours' mean.
        level = NORMAL * _deviation(values) / np.sqrt(1.5)
        return cls(float(level), float(np.median(part[good])))

    def at(self, intensity: Image) -> Image:
        """Noise at other intensities, by their photons; never less than usual."""
        brighter = np.maximum(intensity / self.intensity, 1.0) if self.intensity > 0 else 1.0
        return np.asarray(self.level * np.sqrt(brighter), dtype=np.float32)


def _deviation(values: NDArray[np.floating]) -> float:
    return float(np.median(np.abs(values - np.median(values))))


def _native(values: NDArray[Any]) -> Numbers:
    """Whole numbers as they are, in the processor's byte order; all others in single precision."""
    kind = values.dtype.newbyteorder("=") if values.dtype.kind in "iu" else np.dtype(np.float32)
    return np.asarray(values).astype(kind, copy=False)


def _candidates(image: Numbers, saturation: float, least: float, unusable: Mask) -> Positions:
    """Pixels that may exceed two opposite neighbours; on the way mark those whose values are of no use.

    None is missed. Whole numbers overflow, if ever, in darkness, whose pixels are then candidates in vain.
    """
    step = image.dtype.type(
        min(np.floor(least), np.iinfo(image.dtype).max) if image.dtype.kind in "iu" else least
    )
    rows: list[NDArray[np.intp]] = []
    columns: list[NDArray[np.intp]] = []
    for top in range(0, len(image), ROWS):
        own = image[top : top + ROWS]
        # Whatever is not a number is not positive either.
        if not (own.min() > 0 and own.max() < saturation):
            unusable[top : top + ROWS] |= ~((own > 0) & (own < saturation))
        block = image[max(top - 1, 0) : top + ROWS + 1, 1:-1]
        inside = block[1:-1]
        first = 1 if top == 0 else 0
        beside = image[top + first : top + first + len(inside)]
        higher = np.fmin(np.maximum(block[:-2], block[2:]), np.maximum(beside[:, :-2], beside[:, 2:]))
        hit = higher < inside - step
        if hit.any():
            y, x = _positions(hit)
            rows.append(y + top + first)
            columns.append(x + 1)
    empty = [np.empty(0, dtype=np.intp)]
    return np.concatenate(rows or empty), np.concatenate(columns or empty)


def _dark_candidates(image: Numbers, field: Mask, least: float) -> Positions:
    """Pixels of the field that two opposite neighbours may exceed."""
    negative = -image.astype(np.int32 if image.dtype.kind in "iu" else np.float32)
    y, x = _candidates(negative, np.inf, least, np.zeros(field.shape, dtype=np.bool_))
    inside = _inside(field, (y, x))
    return y[inside], x[inside]


def _sharp(excess: Image, own: Numbers, around: Image, noise: _Noise) -> Mask:
    """Whether what sticks out is more than noise, and sharper than what the telescope can make."""
    return np.asarray(
        (excess > SIGNIFICANT * noise.at(around)) & (excess > SHARP * np.abs(own - around)), dtype=np.bool_
    )


def _positions(where: Mask) -> Positions:
    y, x = np.nonzero(where)
    return y, x


def _inside(field: Mask, where: Positions) -> Mask:
    """Whether pixels, none of them at the frame's edge, and their four neighbours are in the field."""
    y, x = where
    return field[y, x] & field[y - 1, x] & field[y + 1, x] & field[y, x - 1] & field[y, x + 1]


def _excess(image: Numbers, where: Positions, *, dark: bool = False) -> Image:
    """How far pixels exceed the brighter of two opposite neighbours, along the axis where it is more.

    Or, if they are `dark`, how far they lie below the darker one.
    """
    y, x = where
    above, below, left, right, own = (
        image[y + down, x + aside].astype(np.float32)
        for down, aside in ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))
    )
    if dark:
        return np.asarray(np.fmax(np.minimum(above, below) - own, np.minimum(left, right) - own))
    return np.asarray(np.fmax(own - np.maximum(above, below), own - np.maximum(left, right)))


def _around(image: Numbers, where: Positions) -> Image:
    """Median of the ring two pixels away."""
    rows, columns = image.shape
    y = np.clip(where[0] + RING[:, 0, None], 0, rows - 1)
    x = np.clip(where[1] + RING[:, 1, None], 0, columns - 1)
    return np.asarray(np.median(image[y, x].astype(np.float32), axis=0))
