"""Where the field lies in a frame, how far one line's images are displaced from the other's, and resampling.

H-alpha and Ca II of one CRISP scan are displaced by pixels although their headers agree. The shift is found
between images formed alike in both lines (blue wing, core, red wing): first in whole pixels, by masked
normalised cross-correlation (Padfield 2012, doi:10.1109/TIP.2011.2181402), then to a hundredth of a pixel on
the apodised field common to both, by the upsampled matrix-multiply Fourier transform (Guizar-Sicairos et al.
2008, doi:10.1364/OL.33.000156). Both are scikit-image's. The second stage keeps the amplitudes of the
cross-power spectrum: whitened to pure phase it follows the photon noise instead (errors of half a pixel on
scenes where this one's are hundredths).
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from skimage.registration import phase_cross_correlation

from pipeline.crisp.cube import Cube
from pipeline.resampling import MARGIN, displace, fill, spectra_of
from pipeline.turning import (
    STRIP,
    Motion,
    nearest_good,
    surrounded,
    turned_block,
    turned_field,
    turned_flags,
    turned_mask,
    turning,
)

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]
Flags = TypeVar("Flags", NDArray[np.bool_], NDArray[np.uint8])

BANDS = ("blue wing", "core", "red wing")
"""The images from which shifts are found; each is independent of the others' noise."""

WING = 0.7  # wings begin at this share of the way from line centre to the nearer end of the axis
CORE = 0.25  # and the core ends here
ROUNDING = 1e-4  # Angstrom: wavelengths nearer to a band's end are at it

CONFIDENT = 0.6
"""Least confidence at which a shift is applied."""

AGREEMENT = 1.0  # pixels within which two estimates agree
NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
LARGEST = 384  # pixels: more of a large field adds time, not accuracy
LARGEST_SEARCH = 160  # of these, the search in whole pixels needs no more than
LARGEST_BLOCK = 96  # and a block on its own, which cannot see further than half its width
FINE_BLOCKS = 96  # fields at least so wide are checked on 3 x 3 blocks, smaller ones on 2 x 2
SMALLEST_BLOCK = 10
"""Pixels along each side of a block that counts: smaller ones of unrelated images agree by chance, in up to a
sixth of all cases; of these in less than a hundredth."""
FILLED = 0.4  # a block counts if at least this share of it lies in the field
OVERLAP = 0.5  # share of the field that a shift must leave in common
SMALLEST_DETAIL = 0.7  # pixels: below is photon noise, CRISP resolves about two pixels
LARGEST_DETAIL = 3.0  # pixels: above, the lines differ (ribbons, limb darkening)
TAPER = 8.0  # pixels over which the common field fades out
UPSAMPLING = 100
COARSE = 10  # upsampling of the first guess

NEGLIGIBLE = 0.02
"""Pixels to which displacements are found. To extrapolate over so little changes a granule by a part in a
thousand."""

NOTHING = np.empty((0, 3), dtype=np.intp)

PAD_LEAST = 8  # pixels of the frame's edge that must be of one spectrum for it to be a pad
PAD_SHARE = 0.005  # or this share of the edge


@dataclass(frozen=True)
class Shift:
    """How far Ca II has to be moved to lie on H-alpha, or one scan of a series to lie on another.

    Attributes
    ----------
    y, x : float
        Pixels. The point at ``(row, column)`` of H-alpha's frame is at ``(row - y, column - x)`` of Ca II's.
    confidence : float
        0 to 1: the share of the field's blocks that, searched on their own, give the whole field's shift to
        a pixel, in the band where most do; 0 where two bands each convince and contradict one another.
        Blocks see different parts of the Sun, so that neither chance nor a structure that the lines do not
        share makes them agree: unrelated images score 0. So do fields too small for blocks that tell
        (`SMALLEST_BLOCK`).
    turn : float
        Degrees by which the frame is turned about its middle before it is displaced, counterclockwise where y
        points up; none between the lines of one scan.
    """

    y: float
    x: float
    confidence: float
    turn: float = 0.0

    @property
    def applied(self) -> bool:
        """Whether the shift is trusted enough to be applied."""
        return self.confidence >= CONFIDENT

    @property
    def still(self) -> bool:
        """Whether it leaves everything where it is."""
        return self.y == self.x == self.turn == 0.0

    def after(self, first: Shift) -> Shift:
        """This one as it acts on what another has moved: the two as one, with the other's confidence."""
        y, x = turning(self.turn) @ (first.y, first.x)
        return Shift(self.y + float(y), self.x + float(x), first.confidence, self.turn + first.turn)

    def of_frame(self, shape: tuple[int, ...]) -> Motion:
        """What it does to the points of frames of these pixels (y, x)."""
        return Motion(self.turn, (self.y, self.x), (shape[0], shape[1]))


STAYS = Shift(0.0, 0.0, 0.0)
"""What a scan that is not moved is moved by."""


def field_of_view(cube: Cube) -> Mask:
    """Pixels of a frame that show the Sun, not the pad around a rotated field.

    The pad is the region at the frame's edge that has one and the same spectrum. A pixel of the Sun that
    happens to have the pad's value at some wavelengths, or that is surrounded by the Sun, is not pad; nor is
    an area of zeros inside the field.

    Parameters
    ----------
    cube : Cube, shape (wavelength, y, x)
        Intensities; NaN is a value like others here.

    Returns
    -------
    ndarray of bool, shape (y, x)
        True inside the field; everywhere if there is no pad.
    """
    edge = np.zeros(cube.shape[1:], dtype=np.bool_)
    edge[[0, -1], :] = True
    edge[:, [0, -1]] = True
    # Infinity stands for NaN, which is equal to nothing, while candidates for the pad's spectrum are counted.
    spectra = np.nan_to_num(np.asarray(cube[:, edge], dtype=np.float64).T, nan=np.inf)
    ((commonest, count),) = Counter(spectrum.tobytes() for spectrum in spectra).most_common(1)
    if count < max(PAD_LEAST, PAD_SHARE * len(spectra)):
        return np.ones(cube.shape[1:], dtype=np.bool_)
    constant = np.ones(cube.shape[1:], dtype=np.bool_)
    for image, value in zip(cube, np.frombuffer(commonest, dtype=np.float64), strict=True):
        constant &= np.isnan(image) if np.isinf(value) else _equal(image, value)
    labels, regions = ndimage.label(constant)
    seen = np.ones(regions + 1, dtype=np.bool_)
    seen[labels[edge & constant]] = False
    field: Mask = seen[labels]
    return field


def _equal(image: NDArray[Any], value: float) -> Mask:
    if image.dtype.kind in "iu":
        # Whether numbers are equal can be told in any byte order, and files have the slow one.
        native = image.dtype.newbyteorder("=")
        return np.asarray(image.view(native) == np.array(value, dtype=image.dtype).view(native))
    return np.asarray(image == value)


def band_wavelengths(wavelength: ArrayLike, rest_wavelength: float) -> tuple[Mask, Mask, Mask]:
    """Which wavelengths of a line each of `BANDS` takes: the same shares of its range, whichever the line.

    Parameters
    ----------
    wavelength : array_like, shape (wavelength,)
        Angstrom, increasing.
    rest_wavelength : float
        Of the line, Angstrom; inside the axis.

    Returns
    -------
    tuple of ndarray of bool, shape (wavelength,)
    """
    offset = np.asarray(wavelength, dtype=np.float64) - rest_wavelength
    reach = min(-offset[0], offset[-1])
    # A wavelength at a band's end belongs to it, whatever the last digits of a conversion from air.
    least = WING * reach - ROUNDING
    core = max(CORE * reach, np.abs(offset).min()) + ROUNDING
    return offset <= -least, np.abs(offset) <= core, offset >= least


def band_images(cube: Cube, wavelength: ArrayLike, rest_wavelength: float) -> dict[str, Image]:
    """Images in `BANDS`: means over the wavelengths that `band_wavelengths` chooses.

    Parameters
    ----------
    cube : Cube, shape (wavelength, y, x)
        Intensities of one line.
    wavelength : array_like, shape (wavelength,)
        Angstrom, increasing.
    rest_wavelength : float
        Of the line, Angstrom; inside the axis.

    Returns
    -------
    dict of str to ndarray, shape (y, x)
    """
    chosen = band_wavelengths(wavelength, rest_wavelength)
    return {
        band: np.mean(cube[points], axis=0, dtype=np.float32)
        for band, points in zip(BANDS, chosen, strict=True)
    }


def find_shift(
    halpha: Cube,
    ca8542: Cube,
    wavelengths: tuple[ArrayLike, ArrayLike],
    rest_wavelengths: tuple[float, float],
    fields: tuple[Mask, Mask],
) -> Shift:
    """Find the shift that brings Ca II onto H-alpha.

    Parameters
    ----------
    halpha, ca8542 : Cube, shape (wavelength, y, x)
        One scan of each line, frames of one size; may be memory-mapped, of a large frame the middle is read.
    wavelengths : tuple of array_like
        Wavelength axis of each line, Angstrom.
    rest_wavelengths : tuple of float
        Rest wavelength of each line, Angstrom.
    fields : tuple of ndarray of bool, shape (y, x)
        Field of view of each line in its own frame.

    Returns
    -------
    Shift
        The mean over the bands that convince, weighted by how well the images correlate. If none does, over
        those that agree with one another and weigh most.
    """
    details = _details((halpha, ca8542), wavelengths, rest_wavelengths, fields)
    return _combined([_estimate(*images, *masks) for images, masks in details])


def find_image_shift(images: tuple[Image, Image], fields: tuple[Mask, Mask]) -> Shift:
    """Find the shift that brings one image onto another of the same kind, as `find_shift` does of each band.

    Parameters
    ----------
    images : tuple of ndarray, shape (y, x)
        The image that stays, and the one to be moved; as large as is to be searched.
    fields : tuple of ndarray of bool, shape (y, x)
        Where they show the Sun.
    """
    details, masks = _details_of_images(images, fields)
    estimate = _estimate(*details, *masks)
    return Shift(float(estimate.shift[0]), float(estimate.shift[1]), estimate.confidence)


def _details(
    cubes: tuple[Cube, Cube],
    wavelengths: tuple[ArrayLike, ArrayLike],
    rest_wavelengths: tuple[float, float],
    fields: tuple[Mask, Mask],
) -> list[tuple[tuple[Image, Image], tuple[Mask, Mask]]]:
    """Contrast of both scans' structures, and where it is known, in each of `BANDS`."""
    middle = middle_box(fields[0] & fields[1], LARGEST)
    bands = [
        band_images(cube[:, *middle], wavelength, rest)
        for cube, wavelength, rest in zip(cubes, wavelengths, rest_wavelengths, strict=True)
    ]
    inside = (fields[0][middle], fields[1][middle])
    return [_details_of_images((bands[0][band], bands[1][band]), inside) for band in BANDS]


def _details_of_images(
    images: tuple[Image, Image], fields: tuple[Mask, Mask]
) -> tuple[tuple[Image, Image], tuple[Mask, Mask]]:
    details, masks = [], []
    for image, field in zip(images, fields, strict=True):
        good = field & np.isfinite(image) & (image > 0)
        # Bad pixels in the field take what their neighbours show; as holes they would break it up.
        mask = np.asarray(ndimage.binary_fill_holes(good), dtype=np.bool_)
        details.append(_detail(image, good, mask))
        masks.append(mask)
    return (details[0], details[1]), (masks[0], masks[1])


def _combined(found: list[_Estimate]) -> Shift:
    """One shift of those that the bands give."""
    convincing = [estimate for estimate in found if estimate.confidence >= CONFIDENT]
    chosen = convincing or _best_supported(found)
    shifts = np.array([estimate.shift for estimate in chosen])
    contradiction = np.abs(shifts[:, None] - shifts[None]).max() > AGREEMENT
    confidence = 0.0 if contradiction else max(estimate.confidence for estimate in chosen)
    # Bands without any structure weigh nothing, even together.
    y, x = np.average(shifts, axis=0, weights=[estimate.weight + 1e-12 for estimate in chosen])
    return Shift(float(y), float(x), confidence)


def move_field(field: Mask, shift: Shift) -> Mask:
    """Move a field of view with its frame; False comes in at the edges.

    A pixel is in it if all four by four are that surround the point it comes from, so that none is
    extrapolated; along an axis along which the field is moved by whole pixels (to `NEGLIGIBLE`), if that one
    pixel is.

    Parameters
    ----------
    field : ndarray of bool, shape (y, x)
        In Ca II's frame.
    shift : Shift
        The shift onto H-alpha.

    Returns
    -------
    ndarray of bool, shape (y, x)
        In H-alpha's frame.
    """
    if shift.turn:
        return turned_field(field, shift.of_frame(field.shape))
    return move_flags(_supported(field, shift), shift)


def _supported(field: Mask, shift: Shift) -> Mask:
    """Pixels of a field that, and whose neighbours, lie around a point after this shift: see `move_field`."""
    beyond = (along - round(along) for along in (shift.y, shift.x))
    # What comes from before a pixel lies between it and the one before.
    reach = ((2, 1) if part > NEGLIGIBLE else (1, 2) if part < -NEGLIGIBLE else (0, 0) for part in beyond)
    return surrounded(field, *reach)


def move_flags(flags: Flags, shift: Shift) -> Flags:
    """Move flags with their frame, to the nearest pixel; zero comes in at the edges.

    Parameters
    ----------
    flags : ndarray of bool or of integers, shape (y, x)
        In Ca II's frame.
    shift : Shift
        The shift onto H-alpha.

    Returns
    -------
    ndarray, shape (y, x)
        In H-alpha's frame.
    """
    if shift.turn:
        return turned_flags(flags, shift.of_frame(flags.shape))
    whole = (slice(0, flags.shape[0]), slice(0, flags.shape[1]))
    return _moved_part(flags, (round(shift.y), round(shift.x)), *whole)


def read_block(cube: Cube, field: Mask, rows: slice, columns: slice) -> Image:
    """Read one block of a scan, spectrum by spectrum as the store holds it.

    Parameters
    ----------
    cube : ndarray, shape (wavelength, y, x)
        The scan, perhaps memory-mapped; only the block is read.
    field : ndarray of bool, shape (y, x)
        Its field of view.
    rows, columns : slice
        The block.

    Returns
    -------
    ndarray of float32, shape (rows, columns, wavelength)
        A copy; NaN outside of the field.
    """
    return spectra_of(cube[:, rows, columns].astype(np.float32, order="C"), field[rows, columns])


def move_values(values: NDArray[np.floating[Any]], shift: Shift) -> NDArray[np.float64]:
    """Move a smooth map with its frame, by cubic splines; NaN comes in at the edges.

    Parameters
    ----------
    values : ndarray, shape (y, x)
        In Ca II's frame, of either sign; NaN where not known.
    shift : Shift
        The shift onto H-alpha.

    Returns
    -------
    ndarray, shape (y, x)
        In H-alpha's frame; NaN where the nearest value is.
    """
    known = np.isfinite(values)
    moved = np.full(values.shape, np.nan)
    if known.any():
        nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
        filled = values[tuple(nearest)].astype(np.float64)
        if shift.turn:
            motion = shift.of_frame(values.shape)
            whole, there = motion.image(filled, 3), turned_mask(known, motion)
        else:
            whole = ndimage.shift(filled, (shift.y, shift.x), order=3, mode="nearest")
            there = move_flags(known, shift)
        moved = np.where(there, whole, np.nan)
    return moved


def resample(
    cube: Cube,
    field: Mask,
    shift: Shift,
    rows: slice,
    columns: slice,
    saturation: float = np.inf,
    spoilt: NDArray[np.intp] = NOTHING,
) -> Image:
    """One block of Ca II in H-alpha's frame, by cubic splines that know the field's edge.

    Pixels outside the field, and those that are not finite, not positive, saturated or spoilt, do not take
    part: before the splines are fitted each takes the value of its nearest good neighbour, so that nothing
    rings and nothing spreads. A bad pixel keeps its value, at the one pixel nearest to where it belongs.

    Parameters
    ----------
    cube : Cube, shape (wavelength, y, x)
        The whole scan of Ca II, perhaps memory-mapped; the block and a margin are read.
    field : ndarray of bool, shape (y, x)
        Ca II's field of view in its own frame.
    shift : Shift
        The shift onto H-alpha.
    rows, columns : slice
        The block in H-alpha's frame, with explicit start and stop.
    saturation : float
        Intensity from which a pixel is saturated.
    spoilt : ndarray of int, shape (n, 3)
        Wavelength, y, x of other numbers of the cube that say nothing of the Sun.

    Returns
    -------
    ndarray of float32, shape (rows, columns, wavelength)
        NaN outside of the moved field (`move_field`).
    """
    if shift.turn:
        motion = shift.of_frame(field.shape)
        return turned_block(cube, field, motion, rows, columns, saturation, spoilt)
    block = np.empty((rows.stop - rows.start, columns.stop - columns.start, len(cube)), np.float32)
    for first in range(rows.start, rows.stop, STRIP):
        last = min(first + STRIP, rows.stop)
        strip = block[first - rows.start : last - rows.start]
        _resample_into(strip, cube, field, shift, slice(first, last), columns, saturation, spoilt)
    return block


def _resample_into(
    block: Image,
    cube: Cube,
    field: Mask,
    shift: Shift,
    rows: slice,
    columns: slice,
    saturation: float,
    spoilt: NDArray[np.intp],
) -> None:
    whole = (round(shift.y), round(shift.x))
    seen = _moved_part(field, whole, rows, columns)
    if not seen.all():
        block[...] = np.nan
    if not seen.any():
        return
    # A block in a corner of a rotated field's frame is mostly pad.
    part = middle_box(seen, max(seen.shape))
    boxes, pads = [], []
    for span, inner, step, size in zip((rows, columns), part, whole, field.shape, strict=True):
        wanted = span.start - step + np.arange(inner.start - MARGIN, inner.stop + MARGIN)
        # Beyond the frame its edge is repeated; those pixels are outside of the field in any case.
        there = np.flatnonzero((wanted >= 0) & (wanted < size))
        boxes.append(slice(int(wanted[there[0]]), int(wanted[there[-1]]) + 1))
        pads.append((int(there[0]), len(wanted) - 1 - int(there[-1])))
    inside = np.pad(field[tuple(boxes)], pads)
    images: Image = cube[:, *boxes].astype(np.float32, order="C")
    if any(map(any, pads)):
        images = np.pad(images, ((0, 0), *pads), mode="edge")
    if not inside.all():
        fill(images, np.nonzero(~inside), nearest_good(inside))
    middle = (slice(MARGIN, inside.shape[0] - MARGIN), slice(MARGIN, inside.shape[1] - MARGIN))
    kept: dict[int, tuple[Mask, Image]] = {}
    place = spoilt[:, 1:] + [pad[0] - box.start for pad, box in zip(pads, boxes, strict=True)]
    here = ((place >= 0) & (place < inside.shape)).all(axis=1)
    # What is not finite is neither.
    if here.any() or not (images.min() > 0 and images.max() < saturation):
        bad = ~((images > 0) & (images < saturation))
        bad[spoilt[here, 0], place[here, 0], place[here, 1]] = True
        known, nearest = inside, None
        for index in np.flatnonzero(bad.any(axis=(1, 2))).tolist():
            image, good = images[index], ~bad[index]
            kept[index] = (~good[middle], image[middle][~good[middle]])
            if good.any():
                if nearest is None or not np.array_equal(good, known):  # mostly as at the wavelength before
                    known, nearest = good, nearest_good(good)
                image[~good] = image[nearest]
    corner = (part[0].start, part[1].start)
    supported = _supported(inside, shift)[middle]
    displace(images, (shift.y - whole[0], shift.x - whole[1]), supported, block, corner)
    for index, (where, values) in kept.items():
        block[part][where & supported, index] = values[supported[where]]


def _moved_part(flags: Flags, steps: tuple[int, int], rows: slice, columns: slice) -> Flags:
    """One block of flags that are moved by whole pixels; zero comes in at the edges."""
    source, target = [], []
    for span, step, size in zip((rows, columns), steps, flags.shape, strict=True):
        first = min(max(span.start - step, 0), size)
        last = max(min(span.stop - step, size), first)
        source.append(slice(first, last))
        target.append(slice(first + step - span.start, last + step - span.start))
    moved: Flags = np.zeros((rows.stop - rows.start, columns.stop - columns.start), dtype=flags.dtype)
    moved[tuple(target)] = flags[tuple(source)]
    return moved


@dataclass(frozen=True)
class _Estimate:
    """The shift between the images of one band, the blocks' agreement with it, and its weight."""

    shift: NDArray[np.float64]
    confidence: float
    weight: float


def _best_supported(found: list[_Estimate]) -> list[_Estimate]:
    """Return the estimates around that one with which the most weight agrees."""
    groups = [
        [other for other in found if np.abs(other.shift - one.shift).max() <= AGREEMENT / 2.0]
        for one in found
    ]
    return max(groups, key=lambda group: sum(estimate.weight for estimate in group))


def _estimate(reference: Image, moving: Image, reference_mask: Mask, moving_mask: Mask) -> _Estimate:
    common = reference_mask & moving_mask
    if not common.any():
        return _Estimate(np.zeros(2), 0.0, 0.0)
    search = middle_box(common, LARGEST_SEARCH)
    steps = whole_pixels(reference[search], moving[search], reference_mask[search], moving_mask[search])
    if steps is None:
        return _Estimate(np.zeros(2), 0.0, 0.0)
    overlap = reference_mask & ndimage.shift(moving_mask, steps, order=0, prefilter=False)
    if not overlap.any():
        return _Estimate(steps, 0.0, 0.0)
    window = np.square(np.sin(0.5 * np.pi * np.minimum(depth(overlap) / TAPER, 1.0))).astype(np.float32)
    shift = np.array(steps)
    # The window stays in place and pulls the result towards no shift: the second time there is none left.
    for order, upsampling in ((0, COARSE), (3, UPSAMPLING)):
        moved = ndimage.shift(moving, shift, order=order)
        apodised = [
            (image - np.average(image, weights=window)) * window.astype(np.float64)
            for image in (reference, moved)
        ]
        if not all(image.any() for image in apodised):
            return _Estimate(shift, 0.0, 0.0)
        shift = shift + _fraction(apodised[0], apodised[1], upsampling)
    power = [float(np.sum(image * image, dtype=np.float64)) for image in apodised]
    correlation = float(np.sum(apodised[0] * apodised[1], dtype=np.float64)) / np.sqrt(power[0] * power[1])
    # Inverse variance of a shift found from images of which this share of the variance is common.
    weight = correlation**2 / max(1.0 - correlation**2, 1e-6)
    return _Estimate(shift, _agreement(reference, moving, reference_mask, moving_mask, shift), weight)


def _agreement(
    reference: Image, moving: Image, reference_mask: Mask, moving_mask: Mask, shift: NDArray[np.float64]
) -> float:
    """Share of the common field's blocks that give the same shift when searched on their own."""
    votes = []
    for block in blocks_of(reference_mask & moving_mask):
        if min(span.stop - span.start for span in block) < SMALLEST_BLOCK:
            continue
        found = whole_pixels(reference[block], moving[block], reference_mask[block], moving_mask[block])
        votes.append(found is not None and np.abs(found - shift).max() <= AGREEMENT)
    return float(np.mean(votes)) if len(votes) > 2 else 0.0


def blocks_of(common: Mask) -> list[tuple[slice, slice]]:
    """Parts of the common field that are compared on their own."""
    rows, columns = (np.flatnonzero(common.any(axis=axis)) for axis in (1, 0))
    count = 3 if min(np.ptp(rows), np.ptp(columns)) + 1 >= FINE_BLOCKS else 2
    edges = [np.linspace(line[0], line[-1] + 1, count + 1).astype(int) for line in (rows, columns)]
    blocks = [
        (slice(top, bottom), slice(left, right))
        for top, bottom in itertools.pairwise(edges[0].tolist())
        for left, right in itertools.pairwise(edges[1].tolist())
    ]
    return [
        _centre(block, LARGEST_BLOCK)
        for block in blocks
        if common[block].size and common[block].mean() >= FILLED
    ]


def whole_pixels(
    reference: Image, moving: Image, reference_mask: Mask, moving_mask: Mask
) -> NDArray[np.float64] | None:
    """Shift in whole pixels; None for images without any structure."""
    if not (reference[reference_mask].any() and moving[moving_mask].any()):
        return None
    shift, _, _ = phase_cross_correlation(
        reference,
        moving,
        reference_mask=reference_mask,
        moving_mask=moving_mask,
        overlap_ratio=OVERLAP,
    )
    return np.rint(np.asarray(shift, dtype=np.float64))


def _fraction(
    reference: NDArray[np.float64], moving: NDArray[np.float64], upsampling: int
) -> NDArray[np.float64]:
    """Shift to a fraction of a pixel.

    In double precision: on a grid this fine, single precision lets the number of threads decide.
    """
    shift, _, _ = phase_cross_correlation(reference, moving, upsample_factor=upsampling, normalization=None)
    return np.asarray(shift, dtype=np.float64)


def _detail(image: Image, good: Mask, mask: Mask) -> Image:
    """Contrast of structures between `SMALLEST_DETAIL` and `LARGEST_DETAIL`, zero outside of the mask.

    Where the contrast is larger than usual it is divided by its local strength: ribbons, which are of
    different width in the two lines, count no more than granules.
    """
    if not good.any():
        return np.zeros_like(image)
    level = np.where(good, image / np.median(image[good]) - 1.0, 0.0).astype(np.float32)
    details = smooth(level, good, SMALLEST_DETAIL) - smooth(level, good, LARGEST_DETAIL)
    contrast = np.where(mask, details, np.float32(0.0))
    strength = np.sqrt(smooth(contrast * contrast, mask, LARGEST_DETAIL))
    usual = np.sqrt(np.mean(np.square(contrast[mask]), dtype=np.float64))
    limited = contrast / np.maximum(np.maximum(strength, usual), np.finfo(np.float32).tiny)
    return np.asarray(limited, dtype=np.float32)


def smooth(image: Image, mask: Mask, width: float) -> Image:
    """Gaussian mean over a mask; outside of it too, as far as its neighbourhood reaches."""
    if mask.all():
        whole: Image = ndimage.gaussian_filter(image, width, mode="nearest")
        return whole
    weight = ndimage.gaussian_filter(mask.astype(np.float32), width, mode="constant")
    total = ndimage.gaussian_filter(np.where(mask, image, np.float32(0.0)), width, mode="constant")
    return np.asarray(total / np.maximum(weight, np.finfo(np.float32).tiny), dtype=np.float32)


def depth(mask: Mask) -> NDArray[np.float64]:
    """Distance of each pixel of a mask from the outside; beyond the frame is outside."""
    inside: NDArray[np.float64] = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    return inside


def middle_box(mask: Mask, largest: int) -> tuple[slice, slice]:
    """Return the box around a mask; of a large one its middle."""
    if not mask.any():
        return (slice(0, mask.shape[0]), slice(0, mask.shape[1]))
    spans = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return _centre(tuple(slice(int(span[0]), int(span[-1]) + 1) for span in spans), largest)


def _centre(box: tuple[slice, ...], largest: int) -> tuple[slice, slice]:
    rows, columns = (
        slice(
            start := span.start + max(0, span.stop - span.start - largest) // 2,
            min(span.stop, start + largest),
        )
        for span in box
    )
    return rows, columns
