"""What is wrong with a scan: spikes, dead pixels, missing images; and how sharp it is.

A spike (a cosmic ray, an electronic glitch) is told from a structure of the Sun by three properties, none of
which depends on how bright the Sun is there:

- it is sharper than the telescope can make anything: L.A.Cosmic's principle (van Dokkum 2001,
  doi:10.1086/323894). CRISP's pixels sample the diffraction limit 2.4 (H-alpha) and 3.1 times (Ca II 8542),
  so that the neighbours of the brightest pixel of a point have two thirds of its excess over what surrounds
  it, and those beyond two pixels that share a point at least a third; of a spike they have little: of one
  of a single pixel at least along one axis, of one of up to 2 x 2 pixels along both. What lies beside a
  brighter pixel that is no spike is the flank of a structure;
- it is there at one wavelength, for the others were exposed at other times, and no line is as narrow: of heat
  alone H-alpha is 0.4 Angstrom wide, two of its steps, Ca II 0.2. A spike of a single pixel, whose sharpness
  nothing else has, may be there at two in turn. A pixel that sticks out at most wavelengths, towards the
  bright or the dark, is a bad one of the detector;
- it exceeds the noise, which is taken from the image itself by the median absolute deviation and grows with
  the root of the intensity, many times over.

A single pixel that drops out is found in the same way, where it is darker than four fifths of what is usual
in its image.

Unresolved points of light as the telescope shows them (Airy's disc), of a line's width or at one wavelength
alone, are not taken for spikes up to four times the continuum. Restoration may leave rings around them that
are as sharp as spikes are: where it raises all spatial frequencies up to the telescope's limit alike, a few
of a hundred points of two to four times the continuum, as wide as heat makes lines, have a pixel flagged in
their rings; most do that are there at one wavelength alone, as nothing on the Sun is.

Not found are half of the spikes of 10 noise levels; and, for nothing tells them from the Sun, those wider
than two pixels along both axes, which the telescope can make; those two wide along both that are there at two
wavelengths; those wider than one at the field's very edge, where one side is not seen. Nor are pixels that
drop out within two of the edge, where what lies outside may be mixed in, or that lose less than a fifth.
Nothing is repaired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntFlag
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from pipeline.compiled import compiled
from pipeline.crisp import Scan
from pipeline.crisp.cube import Cube, stored_numbers
from pipeline.crisp.wavelengths import LIGHT_SPEED
from pipeline.registration import NORMAL, Image, Mask, band_images, middle_box

SIGNIFICANT = 8.0
"""Noise levels by which a spike exceeds the brighter of two opposite neighbours."""
SHARP = 0.65
"""Share of a pixel's excess over its surroundings that both of two opposite neighbours lack."""
SHARP_BLOCK = 0.8
"""The same for a pixel that is one of two side by side along both axes, and those at their ends."""
DROPPED = 0.8
"""Of an image's usual intensity: a pixel that is darker may have dropped out."""
ISOLATED = 0.3
"""Largest sharpness of the same pixel at the next wavelengths, of that of the spike."""
ALWAYS = 0.8
"""Share of the wavelengths at which a bad pixel of the detector is sharp."""

FAR = 40.0
"""km/s from the line's rest: no mean profile of a field is moved so far."""
SHALLOW = 0.9
"""Of the brightest part of a mean profile: what is less deep may be noise."""

LARGE_SHIFT = 0.2
"""Angstrom: CRISP's cavity errors are some hundredths."""

SAMPLE = 128  # pixels of the field's middle from which the noise is taken
MIDDLE = 512  # and from which the contrast is
LARGE = 33  # pixels: what is larger than this, granulation is not
SEGMENT = 1 << 16  # pixels that are gone through at a time: they stay in the processor's cache

NO_INTENSITIES = "no image at any wavelength: nothing but zeros, values that are not finite, or one value"
"""What is said of a scan that holds nothing."""

RING = np.array([(y, x) for y in range(-2, 3) for x in range(-2, 3) if max(abs(y), abs(x)) == 2])
Numbers = NDArray[Any]
"""An image of the file's own whole numbers, or in single precision."""


class Defect(IntFlag):
    """Bits of an observation's ``defects``: what is wrong with a pixel in either line."""

    SPIKE = 1
    """A cosmic ray or a glitch at some wavelength."""
    DEAD_PIXEL = 2
    """One value at all wavelengths, or far brighter or darker than its neighbours at most of them."""
    WAVELENGTH_MISSING = 4
    """The scan has no image at some wavelength, or at none."""


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
    profile : ndarray of float, shape (wavelength,)
        Mean of the field's intensities, of some hundred rows and columns; infinite where there is no image.
    """

    spikes: NDArray[np.intp]
    dead: Mask
    missing: tuple[int, ...]
    unusable: int
    profile: NDArray[np.float64]

    @property
    def empty(self) -> bool:
        """Whether the scan has no image at all."""
        return len(self.missing) == len(self.profile)

    @property
    def defects(self) -> NDArray[np.uint8]:
        """Bits of `Defect` for each pixel (y, x)."""
        bits = np.where(self.dead, np.uint8(Defect.DEAD_PIXEL), np.uint8(0))
        bits[self.spikes[:, 1], self.spikes[:, 2]] |= np.uint8(Defect.SPIKE)
        if self.missing:
            bits |= np.uint8(Defect.WAVELENGTH_MISSING)
        return bits

    @cached_property
    def spoilt(self) -> NDArray[np.intp]:
        """Wavelength, y, x of every number that says nothing of the Sun, shape (n, 3), but missing images."""
        y, x = np.nonzero(self.dead)
        at = np.arange(len(self.profile))
        dead = np.column_stack([np.repeat(at, y.size), np.tile(y, at.size), np.tile(x, at.size)])
        return np.concatenate([self.spikes, dead.astype(np.intp)])

    def sentences(self, offset: ArrayLike) -> Iterator[str]:
        """Say what was found, a sentence each.

        Parameters
        ----------
        offset : array_like, shape (wavelength,)
            Wavelengths from the line's rest, Angstrom.
        """
        if self.empty:
            yield NO_INTENSITIES
        elif self.missing:
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
    search = _Search.of(field)
    constant: NDArray[np.intp] | None = None
    often = np.zeros(field.shape, dtype=np.uint16)
    dark: _Places | None = None
    sharp: dict[int, list[_Sharp]] = {1: [], -1: []}
    missing: list[int] = []
    last: Numbers | None = None
    held = _Held(cube, box)
    profile = np.full(len(cube), np.inf)
    some = tuple(slice(None, None, max(size // SAMPLE, 1)) for size in field.shape)
    for index, values in enumerate(cube):
        image = _native(values)
        noise = _Noise.of(image, field, box)
        if noise is None or held.repeats(index, image):
            missing.append(index)
            continue
        least = noise.level * SIGNIFICANT
        seen = image[some][field[some] & np.isfinite(image[some])]
        if seen.size:
            profile[index] = seen.mean(dtype=np.float64)
        if last is None:
            dark = search.places(_negative(image), least)
            dark = dark.at(dark.inside & (dark.excess(image, sign=-1)[0] > least))
            dark_often = np.zeros(dark.own.size, dtype=np.uint16)
        elif constant is None:
            constant = np.flatnonzero(field & (held.numbers(index, image) == held.first))
        elif constant.size:
            constant = constant[held.numbers(index, image).ravel()[constant] == held.first.ravel()[constant]]
        bright = _Sharp.of(index, image, search.places(image, least, saturation, unusable), noise)
        often.ravel()[bright.places.own[bright.single & bright.places.inside]] += 1
        assert dark is not None
        dark_often += _stands_out(dark.excess(image, sign=-1)[0], SHARP, *dark.contrast(image), noise)
        dropped = search.dropped(image, DROPPED * noise.intensity, least)
        for found in (bright, _Sharp.of(index, image, dropped, noise, sign=-1)):
            alike = sharp[found.sign]
            if last is not None:
                found.before[:] = found.excess_in(last)
            for ago, earlier in enumerate(reversed(alike[-2:])):
                earlier.after[ago] = earlier.excess_in(image)
            alike.append(found)
        last = image
    images = len(cube) - len(missing)
    dead = often >= max(ALWAYS * images, 2)
    if dark is not None:
        dead.ravel()[dark.own] |= dark_often >= max(ALWAYS * images, 2)
    if constant is not None:
        dead.ravel()[constant] = True
    spikes = np.concatenate([_spikes(alike, field.shape) for alike in sharp.values()])
    return Survey(
        spikes[~dead[spikes[:, 1], spikes[:, 2]]],
        dead,
        tuple(missing),
        int(np.count_nonzero(unusable & field)),
        profile,
    )


def line_far_from_rest(profile: NDArray[np.floating], scan: Scan) -> Iterator[str]:
    """Say where a mean profile is darkest, if that is far from the line's rest wavelength.

    The quiet Sun's lines lie within some km/s of it. Wavelengths in air that were taken for vacuum, or the
    other way round, put H-alpha 83 km/s off.

    Parameters
    ----------
    profile : ndarray, shape (wavelength,)
        Of the field (`Survey.profile`).
    scan : Scan
        What it is of.

    Yields
    ------
    str
    """
    darkest = int(profile.argmin())
    rest = scan.window.rest_wavelength
    speed = (scan.wavelength[darkest] - rest) / rest * LIGHT_SPEED
    # A profile that is darkest at an end, or nearly as bright there, shows no line.
    brightest = profile.max(where=np.isfinite(profile), initial=0.0)
    if 0 < darkest < profile.size - 1 and profile[darkest] < SHALLOW * brightest and abs(speed) > FAR:
        yield (
            f"the mean profile is darkest {speed:+.0f} km/s from the line's rest: see whether its "
            f"wavelengths are in {scan.medium} as stated (air and vacuum are 83 km/s apart)"
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


def uncorrected_wavelengths(shift: NDArray[np.floating] | None, field: Mask) -> Iterator[str]:
    """Say in how many pixels of a field it is not known what their wavelengths are, or if that cannot be.

    Parameters
    ----------
    shift : ndarray, shape (y, x), or None
        What has to be added to them (`pipeline.crisp.open_wavelength_shift`).
    field : ndarray of bool, shape (y, x)

    Yields
    ------
    str
    """
    if shift is not None and (count := int(np.count_nonzero(field & ~np.isfinite(shift)))):
        yield f"{count} pixels in the field have no wavelength correction"
    if shift is not None and (known := field & np.isfinite(shift)).any():
        size = float(np.median(np.abs(shift[known])))
        if size > LARGE_SHIFT:
            yield (
                f"the wavelength corrections are {size:.2g} Angstrom in the median, many times what etalons' "
                "cavity errors are: see whether their unit is right"
            )


class _Held:
    """A file's own numbers, image by image as they are gone through: each is compared with earlier ones.

    Attributes
    ----------
    first : ndarray, shape (y, x)
        The first image.
    """

    def __init__(self, cube: Cube, box: tuple[slice, slice]) -> None:
        self._cube, self._box = stored_numbers(cube), box
        self._converted = self._cube is not cube
        self._part: Numbers | None = None
        self._last: Numbers | None = None  # of converted numbers, read again where it is needed
        self._index = 0
        self.first: Numbers = np.empty((0, 0), dtype=np.float32)

    def numbers(self, index: int, image: Numbers | None) -> Numbers:
        """What the file holds for an image (y, x), given that where it is what the file holds."""
        return np.asarray(self._cube[index]) if self._converted or image is None else image

    def repeats(self, index: int, image: Numbers) -> bool:
        """Whether an image is the one before once more; if it is not, the next is compared with it."""
        part = np.asarray(self._cube[index, *self._box]) if self._converted else image[self._box]
        if self._part is None:
            self.first = self.numbers(index, image)
        elif _equal(part, self._part) and _equal(
            self.numbers(index, image), self.numbers(self._index, self._last)
        ):
            return True
        self._part, self._index = part, index
        self._last = None if self._converted else image
        return False


def _equal(one: Numbers, other: Numbers) -> bool:
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


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
        with np.errstate(invalid="ignore"):  # infinities, which are not good
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
    return np.ascontiguousarray(values, dtype=kind)


@dataclass(frozen=True)
class _Search:
    """Where in a field to look for what exceeds its neighbours, at every wavelength.

    Attributes
    ----------
    deep : ndarray of bool, shape (y, x)
        Pixels from which the field reaches two further in all four directions.
    rim : _Places
        All others of the field.
    near : ndarray of int, shape (4, n)
        Of the rim, the neighbours in the field, and the pixel itself for those that are not.
    """

    deep: Mask
    rim: _Places
    near: NDArray[np.intp]

    @classmethod
    def of(cls, field: Mask) -> _Search:
        rows, columns = field.shape
        deep = np.zeros_like(field)
        inner = deep[2 : rows - 2, 2 : columns - 2]
        inner[:] = field[2 : rows - 2, 2 : columns - 2]
        if inner.size:
            for start in (0, 1, 3, 4):
                inner &= field[start : start + len(inner), 2 : columns - 2]
                inner &= field[2 : rows - 2, start : start + inner.shape[1]]
        rim = _Places.of(field, np.flatnonzero(field & ~deep))
        near = np.where(rim.known[:, :2], rim.beside[:, :2], rim.own)
        return cls(deep, rim, near.reshape(4, -1))

    def places(
        self, image: Numbers, least: float, saturation: float = np.inf, unusable: Mask | None = None
    ) -> _Places:
        """Pixels of the field that may exceed what surrounds them; none is missed.

        On the way those whose values are of no use are marked.
        """
        values = image.ravel()
        if unusable is not None:
            for start in range(0, values.size, SEGMENT):
                part = values[start : start + SEGMENT]
                # Whatever is not a number is not positive either.
                if not (part.min() > 0 and part.max() < saturation):
                    unusable.ravel()[start : start + SEGMENT] |= ~((part > 0) & (part < saturation))
        hits = _candidates(image, self.deep, _step(image, least))
        rim = self.rim.own[
            np.fmin.reduce(values[self.near], axis=0) < values[self.rim.own] - np.float32(least)
        ]
        own = np.concatenate([hits, rim])
        # What is saturated is known as that.
        return _Places.of(self.rim.field, own[values[own] < saturation])

    def dropped(self, image: Numbers, limit: float, least: float) -> _Places:
        """Pixels two from the field's edge, below a limit and by more than `least` below what is beside."""
        values, row = image.ravel(), image.shape[1]
        # A whole number is below a limit if it is below the next whole one.
        below = image.dtype.type(np.ceil(limit) if image.dtype.kind in "iu" else limit)
        own = _dark(image, self.deep, _step(image, least), below)
        beside = values[own + np.array([[-row], [row], [-1], [1]])].astype(np.float32)
        brighter = np.fmax(np.minimum(*beside[:2]), np.minimum(*beside[2:]))
        return _Places.of(self.rim.field, own[brighter - values[own] > least])


@dataclass
class _Sharp:
    """Pixels that stand out of an image, sharper than what the telescope can make.

    Attributes
    ----------
    index : int
        The wavelength.
    places : _Places
        The pixels.
    single : ndarray of bool, shape (n,)
        Whether they are by themselves along an axis; the others are one of two along both.
    excess : ndarray of float32, shape (n,)
        By how much they stand out.
    before : ndarray of float32, shape (n,)
        By how much they do at the wavelength before.
    after : ndarray of float32, shape (2, n)
        And at the two that follow; minus infinity where there is none.
    sign : int
        1 for bright ones, -1 for dark ones.
    """

    index: int
    places: _Places
    single: Mask
    excess: Image
    before: Image
    after: Image
    sign: int

    @classmethod
    def of(cls, index: int, image: Numbers, places: _Places, noise: _Noise, sign: int = 1) -> _Sharp:
        single, block = places.excess(image, sign)
        own, around = places.contrast(image)
        alone = _stands_out(single, SHARP, own, around, noise)
        both = _stands_out(block, SHARP_BLOCK, own, around, noise) if sign == 1 else np.zeros_like(alone)
        # The flank of a bright point is sharp along one axis, too.
        alone &= ~places.beside_brighter(image, alone | both, sign)
        chosen = alone | both
        excess = np.where(alone, single, block)[chosen]
        none = np.full((3, excess.size), -np.inf, dtype=np.float32)
        return cls(index, places.at(chosen), alone[chosen], excess, none[0], none[1:], sign)

    def excess_in(self, image: Numbers) -> Image:
        """By how much the same pixels stand out of another image."""
        single, block = self.places.excess(image, self.sign)
        return np.where(self.single, single, block)


def _spikes(sharp: Sequence[_Sharp], shape: tuple[int, int]) -> NDArray[np.intp]:
    """Wavelength, y, x of what stands out at one wavelength only, or, of single pixels, at two in turn."""
    chosen = [
        ~(one.before > ISOLATED * one.excess) & ~(one.after[0] > ISOLATED * one.excess) for one in sharp
    ]
    for place, (one, following) in enumerate(pairwise(sharp)):
        _, here, there = np.intersect1d(
            one.places.own, following.places.own, assume_unique=True, return_indices=True
        )
        least = ISOLATED * np.minimum(one.excess[here], following.excess[there])
        both = one.single[here] & following.single[there]
        both &= ~(one.before[here] > least) & ~(one.after[1][here] > least)
        chosen[place][here[both]] = True
        chosen[place + 1][there[both]] = True
    found = [np.empty((0, 3), dtype=np.intp)]
    for one, those in zip(sharp, chosen, strict=True):
        own = one.places.own[those]
        found.append(np.column_stack([np.full(own.size, one.index), *np.unravel_index(own, shape)]))
    return np.concatenate(found)


def _stands_out(excess: Image, share: float, own: Image, around: Image, noise: _Noise) -> Mask:
    """Whether an excess is more than noise, and sharper than what the telescope can make."""
    # Of a pixel around which nothing is known nothing is said.
    with np.errstate(invalid="ignore"):
        more = excess > SIGNIFICANT * noise.at(around)
        return np.asarray(more & (excess > share * np.abs(own - around)))


def _step(image: Numbers, least: float) -> np.number[Any]:
    """By how much at least numbers of an image's kind differ that differ by more than this."""
    if image.dtype.kind in "iu":
        least = min(np.floor(least), np.iinfo(image.dtype).max)
    step: np.number[Any] = image.dtype.type(least)
    return step


@compiled
def _collected(hit: Mask, deep: Mask, first: int, found: NDArray[np.intp], count: int) -> int:
    """Add what is hit of a row's deep pixels to the places found, and say how many there are then."""
    for x in range(2, hit.size - 2):
        if hit[x] and deep[x]:
            found[count] = first + x
            count += 1
    return count


@compiled
def _candidates(image: Numbers, deep: Mask, step: np.number[Any]) -> NDArray[np.intp]:
    """Find where in an image pixels may exceed what surrounds them; none is missed.

    Along y the pixels at both ends of one or two, along x both neighbours. Whole numbers overflow, if ever,
    in darkness, whose pixels are then candidates in vain.
    """
    rows, columns = image.shape
    level, hit = np.empty(columns, image.dtype), np.empty(columns, np.bool_)
    found, count = np.empty(image.size, np.intp), 0
    for y in range(2, rows - 2):
        above, own, below = image[y - 1], image[y], image[y + 1]
        second_above, second_below = image[y - 2], image[y + 2]
        for x in range(columns):
            level[x] = own[x] - step
        some = False
        for x in range(2, columns - 2):
            up, down = above[x] < level[x], below[x] < level[x]
            ends = (up & down) | (up & (second_below[x] < level[x])) | (down & (second_above[x] < level[x]))
            hit[x] = ends | ((own[x - 1] < level[x]) & (own[x + 1] < level[x]))
            some |= hit[x]
        if some:
            count = _collected(hit, deep[y], y * columns, found, count)
    return found[:count]


@compiled
def _dark(image: Numbers, deep: Mask, step: np.number[Any], limit: np.number[Any]) -> NDArray[np.intp]:
    """Find where in an image pixels below a limit may lie below both neighbours along an axis, as above."""
    rows, columns = image.shape
    level, hit = np.empty(columns, image.dtype), np.empty(columns, np.bool_)
    found, count = np.empty(image.size, np.intp), 0
    for y in range(2, rows - 2):
        above, own, below = image[y - 1], image[y], image[y + 1]
        for x in range(columns):
            level[x] = own[x] + step
        some = False
        for x in range(2, columns - 2):
            between = (above[x] > level[x]) & (below[x] > level[x])
            between |= (own[x - 1] > level[x]) & (own[x + 1] > level[x])
            hit[x] = between & (own[x] < limit) & (own[x] > 0)
            some |= hit[x]
        if some:
            count = _collected(hit, deep[y], y * columns, found, count)
    return found[:count]


def _negative(image: Numbers) -> Numbers:
    return -image.astype(np.int32 if image.dtype.kind in "iu" else np.float32)


@dataclass(frozen=True)
class _Places:
    """Some pixels, and where in a flattened image they and those around them are.

    Attributes
    ----------
    own : ndarray of int, shape (n,)
        The pixels.
    beside : ndarray of int, shape (2, 4, n)
        Along y and x: the pixels before and after, and those before and after these.
    known : ndarray of bool, as `beside`
        Whether those are in the field, and what lies between them too.
    field : ndarray of bool, shape (y, x)
    """

    own: NDArray[np.intp]
    beside: NDArray[np.intp]
    known: Mask
    field: Mask

    @classmethod
    def of(cls, field: Mask, own: NDArray[np.intp]) -> _Places:
        steps = np.array([-1, 1, -2, 2])[:, None]
        still = np.zeros_like(steps)
        along_y, along_x = (_neighbours(field, own, *step) for step in ((steps, still), (still, steps)))
        known = np.stack([along_y[1], along_x[1]])
        known[:, 2:] &= known[:, :2]
        return cls(own, np.stack([along_y[0], along_x[0]]), known, field)

    @property
    def inside(self) -> Mask:
        """Which are two from the field's edge, where what lies outside may be mixed in at all wavelengths."""
        return np.asarray(self.known.all(axis=(0, 1)))

    def at(self, chosen: Mask) -> _Places:
        """Some of them."""
        return _Places(self.own[chosen], self.beside[..., chosen], self.known[..., chosen], self.field)

    def excess(self, image: Numbers, sign: int = 1) -> tuple[Image, Image]:
        """How far the pixels exceed what surrounds them, or lie below it if `sign` is -1.

        Returns
        -------
        single : ndarray of float32, shape (n,)
            Above the brighter of two opposite neighbours, along the axis where it is more.
        block : ndarray of float32, shape (n,)
            Above the brighter of the pixels at both ends of one or two that the pixel is among, along the
            axis where it is less. Across the field's edge above the one neighbour that there is.
        """
        own = sign * image.ravel()[self.own].astype(np.float32)
        values = sign * image.ravel()[self.beside].astype(np.float32)
        known = self.known & np.isfinite(values)
        before, after, second_before, second_after = np.moveaxis(np.where(known, values, np.inf), 1, 0)
        brighter = np.maximum(before, after)
        ends = np.minimum(
            np.maximum(before, np.minimum(after, second_after)),
            np.maximum(after, np.minimum(before, second_before)),
        )
        ends = np.where(np.isinf(brighter), np.minimum(before, after), ends)
        with np.errstate(invalid="ignore"):
            return own - brighter.min(axis=0), own - ends.max(axis=0)

    def beside_brighter(self, image: Numbers, chosen: Mask, sign: int = 1) -> Mask:
        """Which of the pixels lie beside a brighter one (a darker one if `sign` is -1) that is not chosen."""
        own = sign * image.ravel()[self.own].astype(np.float32)
        values = sign * image.ravel()[self.beside[:, :2]].astype(np.float32)
        others = ~np.isin(self.beside[:, :2], self.own[chosen])
        return np.asarray((self.known[:, :2] & others & (values > own)).any(axis=(0, 1)))

    def contrast(self, image: Numbers) -> tuple[Image, Image]:
        """Intensities, and the median of what is known of the ring two pixels away."""
        ring, known = _neighbours(self.field, self.own, RING[:, 0, None], RING[:, 1, None])
        values = image.ravel()[ring].astype(np.float32)
        known &= np.isfinite(values)
        values = np.sort(np.where(known, values, np.float32(np.inf)), axis=0)
        count = np.count_nonzero(known, axis=0)[None]
        lower, upper = (np.take_along_axis(values, half // 2, axis=0)[0] for half in (count - 1, count))
        return image.ravel()[self.own].astype(np.float32), 0.5 * (lower + upper)


def _neighbours(
    field: Mask, own: NDArray[np.intp], down: NDArray[np.intp], aside: NDArray[np.intp]
) -> tuple[NDArray[np.intp], Mask]:
    """Flat positions of the pixels so many steps away, and whether they are in the field."""
    rows, columns = field.shape
    y, x = own // columns + down, own % columns + aside
    known = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    flat = np.where(known, y * columns + x, 0)
    known &= field.ravel()[flat]
    return flat, known
