"""How much the profiles changed between the times at which the two lines were taken, pixel by pixel.

The network takes both lines for one moment's, but H-alpha and Ca II of a pair are seconds apart. Each line's
own series says how it changed meanwhile: its images (blue wing, core, red wing) are interpolated linearly in
time from its own moment to that of the other line, between the two scans that bracket this moment (at an end
of the series they are extrapolated from the two nearest). The estimate is the largest change of any of the
three images of either line, as a share of the pixel's joint maximum over both lines, by which the network's
input is divided. A line that was interpolated to the other's time already has no lag left; it may be wrong in
that it did not change linearly. The usual estimate of this is the next term of Newton's interpolation
formula, once with the scan before the bracket and once with the one after it: the larger of the two.

Three things look like a change and are none:

- The image moves between the scans: they are brought onto one another first, by the wings of H-alpha.
- Photon noise: it is taken from the difference image itself, by its smallest structure, which no telescope
  resolves (Immerkaer 1996, doi:10.1006/cviu.1996.0060), and grows with the root of the intensity.
  `SIGNIFICANT` times its level is taken off in quadrature: of a smaller change nothing remains, one of three
  times as much is understated by 6 %.
- Bad pixels: where any of the scans has one, nothing is known, nor beside it in one that is moved.

Nothing is known, either, of a series of one pair, over gaps, and where displacements are not certain. Where
this is so of one line only, the other line's change is what is known. What comes and goes between two scans
of a line, nobody has seen.

While the scans are written each leaves its images in a store of its own (`BandImages`), a fifth of a scan's
numbers in 16 bits; from these the change is found, at a small part of the cost of reading scans again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from scipy import ndimage
from zarr.codecs import BloscCodec
from zarr.core.sync import sync

from pipeline.compiled import compiled
from pipeline.crisp import LINES, Scan
from pipeline.crisp.cube import Cube
from pipeline.errors import FlareFieldError
from pipeline.pairing import cadence
from pipeline.registration import (
    BANDS,
    NORMAL,
    Image,
    Mask,
    Shift,
    band_wavelengths,
    find_image_shift,
    middle_box,
)
from pipeline.replacement import opened_group
from pipeline.storage import Place, answering, array_in, place, space

NAME = "change_between_lines"
"""The observation's variable."""

CHANGED = 0.05
"""Share of the joint maximum above which a pixel counts as changed: the error between the lines that networks
are told to expect by default (``calibration_error``). A smaller change is within what the posterior allows
for in any case, a larger one is not. The photon noise that they were trained with ends at 0.02."""

SIGNIFICANT = 4.0
"""Noise levels that are taken off in quadrature."""
LONGEST = 2.5
"""Of a line's median interval: over longer ones nothing is interpolated. One scan may be missing."""
LONGEST_SECONDS = 120.0
"""And over none longer than this, whatever the cadence: a flare's kernels live for a minute."""

STEP = 2.0**-13
"""To which the estimate is rounded, so that it compresses."""
UNIT = 2.0**-12
"""Of a scan's `level`, to which its images are rounded: up to 16 times the level they are held."""
SAMPLE = 256  # pixels of the field's middle from which the noise is taken
LARGEST = np.float32(np.iinfo(np.uint16).max)  # in that unit
STRIP = 32  # rows of images that stay in the processor's cache
CERTAIN = 0.02  # pixels, to which displacements are found
SEARCHED = 256  # pixels of the field's middle by which scans are brought onto one another
LEVEL = 64  # pixels of the field's middle from which a scan's level is taken

Weights = Mapping[int, float]
"""By which a line's scans are multiplied and added up to give its change, by their places in the series."""


def within_reach(times: NDArray[np.datetime64], first: int, last: int) -> bool:
    """Whether a line may be interpolated between two of its scans: see `LONGEST`, `LONGEST_SECONDS`.

    Parameters
    ----------
    times : ndarray of datetime64, shape (scan,)
        Of the line's scans, in order.
    first, last : int
        The two scans.
    """
    interval = float((times[last] - times[first]) / np.timedelta64(1, "s"))
    return interval <= min(LONGEST * cadence(times), LONGEST_SECONDS)


def lag_weights(
    times: NDArray[np.datetime64], scan: int, moment: np.datetime64, comparable: NDArray[np.bool_]
) -> Weights | None:
    """Weights that give a line's change from the time of one of its scans to another moment.

    Parameters
    ----------
    times : ndarray of datetime64, shape (scan,)
        Of the line's scans, in order.
    scan : int
        Which of them.
    moment : datetime64
        The other moment.
    comparable : ndarray of bool, shape (scan,)
        Scans whose images can be brought onto this one's.

    Returns
    -------
    mapping of int to float, or None
        None where no neighbour is there, near enough and comparable. Nothing changes in no time.
    """
    lag = (moment - times[scan]) / np.timedelta64(1, "s")
    if lag == 0.0:
        return {}
    towards = 1 if lag > 0.0 else -1
    for neighbour in (scan + towards, scan - towards):
        if 0 <= neighbour < len(times) and comparable[neighbour] and comparable[scan]:
            first, last = sorted((scan, neighbour))
            if within_reach(times, first, last):
                share = float(lag / ((times[neighbour] - times[scan]) / np.timedelta64(1, "s")))
                return {scan: -share, neighbour: share}
    return None


def departure_weights(
    times: NDArray[np.datetime64],
    scan: int,
    moment: np.datetime64,
    bracket: tuple[np.datetime64, np.datetime64],
    comparable: NDArray[np.bool_],
) -> list[Weights]:
    """Weights that give how far a line may have been from its linear interpolation to a moment.

    Parameters
    ----------
    times, scan, moment, comparable
        As for `lag_weights`; `scan` is one end of the bracket.
    bracket : pair of datetime64
        The times between which the line was interpolated.

    Returns
    -------
    list of mappings of int to float
        One for each neighbour of the bracket that is there, near enough and comparable.
    """
    other = scan + (1 if moment > times[scan] else -1)
    first = min(scan, other)
    reach = float(np.prod([(moment - end) / np.timedelta64(1, "s") for end in bracket]))
    found: list[Weights] = []
    for start in (first - 1, first):
        three = range(start, start + 3)
        if start < 0 or three[-1] >= len(times) or not comparable[list(three)].all():
            continue
        if within_reach(times, three[0], three[1]) and within_reach(times, three[1], three[2]):
            seconds = [float((times[one] - times[scan]) / np.timedelta64(1, "s")) for one in three]
            found.append(
                {
                    one: reach / float(np.prod([own - other for other in seconds if other != own]))
                    for one, own in zip(three, seconds, strict=True)
                }
            )
    return found


class BandImages:
    """Images of one time's scans, block by block as they go into the observation, in H-alpha's frame.

    Parameters
    ----------
    scans : sequence of Scan
        One of each line.
    levels : mapping of str to float
        An intensity of each line's scan, `UNIT` of which its images hold as one: see `level`.
    """

    def __init__(self, scans: Sequence[Scan], levels: Mapping[str, float]) -> None:
        shape = scans[0].shape
        self._levels = dict(levels)
        self._saturation = {scan.line: scan.saturation for scan in scans}
        self._chosen = {
            scan.line: [
                slice(int(points[0]), int(points[-1]) + 1)
                for points in map(
                    np.flatnonzero, band_wavelengths(scan.wavelength, scan.window.rest_wavelength)
                )
            ]
            for scan in scans
        }
        self._images = {line: np.zeros((len(BANDS) + 1, *shape), np.uint16) for line in levels}

    def add(self, line: str, block: Image, rows: slice, columns: slice) -> None:
        """Take a block's images in all bands, and its brightest intensities.

        Parameters
        ----------
        line : str
            Name of the line.
        block : ndarray of float32, shape (rows, columns, wavelength)
            Its intensities. A pixel of which any cannot be used has no image.
        rows, columns : slice
            Where the block is.
        """
        _collect(
            block,
            np.array([(chosen.start, chosen.stop) for chosen in self._chosen[line]]),
            np.float32(1.0 / (self._levels[line] * UNIT)),
            np.float32(self._saturation[line]),
            self._images[line][:, rows, columns],
        )

    def brightest(self, line: str, block: Image, rows: slice, columns: slice) -> None:
        """Take a block's brightest intensities from other numbers than its images."""
        scale = np.float32(1.0 / (self._levels[line] * UNIT))
        values = block.max(axis=-1) * scale
        self._images[line][-1, rows, columns] = _whole(values, values > 0)

    def leave_out(self, where: Mask) -> None:
        """Say that nothing is known of some pixels (y, x)."""
        for images in self._images.values():
            for image in images:
                np.copyto(image, np.uint16(0), where=where)

    def write(self, images: Place, time: int) -> None:
        """Write all of it into the store of images, in place of what an earlier attempt has left there."""
        group = opened_group(images)
        for line, values in self._images.items():
            # Zarr compares with nothing else, chunk by chunk, to find out whether one is empty.
            array_in(group, line).with_config({"write_empty_chunks": True})[time] = values
            array_in(group, f"level_{line}")[time] = self._levels[line]
        for folder in image_folders(time):
            images.bring_to_disk(folder)


@compiled
def _collect(
    block: Image, bands: NDArray[np.intp], scale: np.float32, saturation: np.float32, out: NDArray[np.uint16]
) -> None:
    """Means of spectra (y, x, wavelength) over bands, and their largest numbers, as whole numbers."""
    rows, columns, points = block.shape
    images = np.empty((points, columns), np.float32)
    usable = np.empty(columns, np.bool_)
    values = np.empty((len(out), columns), np.float32)
    for y in range(rows):
        for point in range(points):
            for x in range(columns):
                images[point, x] = block[y, x, point]
        usable[:] = True
        values[:] = np.float32(0.0)
        for point in range(points):
            for x in range(columns):
                value = images[point, x]
                # Comparisons with what is not a number are false.
                usable[x] &= (value > 0) & (value < saturation)
                values[-1, x] = max(values[-1, x], value)
        for band in range(len(bands)):
            first, last = bands[band]
            for point in range(first, last):
                for x in range(columns):
                    values[band, x] += images[point, x]
            for x in range(columns):
                values[band, x] *= scale / np.float32(last - first)
        for x in range(columns):
            values[-1, x] *= scale
        for band in range(len(out)):
            for x in range(columns):
                held = usable[x] and values[band, x] < LARGEST
                out[band, y, x] = np.uint16(values[band, x] + np.float32(0.5)) if held else np.uint16(0)


def _whole(values: Image, usable: Mask) -> NDArray[np.uint16]:
    """Round to whole numbers, overwriting what is given; zero, for what is not known, where too large."""
    # Comparisons with what is not a number are false.
    held = usable & (values < LARGEST)
    values += np.float32(0.5)
    np.copyto(values, np.float32(0.0), where=~held)
    return values.astype(np.uint16)


def level(cube: Cube, field: Mask) -> float:
    """An intensity that is usual in a scan: the median of its first image, in the field's middle.

    Parameters
    ----------
    cube : Cube, shape (wavelength, y, x)
        The scan.
    field : ndarray of bool, shape (y, x)
        Its field of view.
    """
    box = middle_box(field, LEVEL)
    image = np.asarray(cube[0, box[0], box[1]], dtype=np.float64)
    usable = field[box] & np.isfinite(image) & (image > 0)
    return float(np.median(image[usable])) if usable.any() else 1.0


def lay_out_images(images: Place, scans: Sequence[Scan], times: int) -> None:
    """Make the store of images, with nothing in it, if it is not there.

    Parameters
    ----------
    images : Place
        Where.
    scans : sequence of Scan
        One of each line; their frames are as large as H-alpha's, which is the first, by then.
    times : int
        Times of the series.
    """
    if images.exists():
        return
    shape = scans[0].shape
    with images.appearing() as store:
        group = zarr.open_group(store, mode="w")
        for scan in scans:
            group.create_array(
                scan.line,
                shape=(times, len(BANDS) + 1, *shape),
                dtype="uint16",
                chunks=(1, 1, *shape),
                fill_value=0,
                compressors=BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle"),
                dimension_names=("time", "band", "y", "x"),
            )
            group.create_array(
                f"level_{scan.line}", shape=(times,), dtype="float64", chunks=(1,), fill_value=np.nan
            )


def image_folders(time: int) -> list[str]:
    """Folders of a store of images that hold one time, and nothing else."""
    return [f"{name}/c/{time}" for line in LINES for name in (line, f"level_{line}")]


@dataclass(frozen=True)
class ChangeTask:
    """What a worker needs to estimate the changes of some times in a row.

    Attributes
    ----------
    store, images : str
        The observation, and the store of images.
    weights : mapping of int to mapping of str to sequence of mappings
        At each time, each line's changes: the largest one counts. None of a line of which nothing is known.
    scales : mapping of str to float
        By which each line's intensities are multiplied, where they are calibrated.
    aligned : bool
        Whether the scans lie on one another already. If not, it is found out how far they are displaced.
    """

    store: str
    images: str
    weights: Mapping[int, Mapping[str, Sequence[Weights]]]
    scales: Mapping[str, float]
    aligned: bool = False


def find_changes(task: ChangeTask) -> list[dict[str, Any]] | FlareFieldError:
    """Estimate the changes of some times and write them into the observation: what a worker does.

    Parameters
    ----------
    task : ChangeTask
        What is to be compared.

    Returns
    -------
    list of dict, or FlareFieldError
        For the journal, of each time: how many pixels' change is known, how many changed, and the bytes
        written. What a user has to mend comes back as a value.
    """
    try:
        with space(task.store), answering(task.store):
            return _found(task)
    except FlareFieldError as refusal:
        return refusal


def _found(task: ChangeTask) -> list[dict[str, Any]]:
    records = []
    store = place(task.store)
    scans = _Scans(opened_group(place(task.images), "r"), task.scales, task.aligned)
    group = opened_group(store)
    array = array_in(group, NAME).with_config({"write_empty_chunks": True})
    for time, weights in sorted(task.weights.items()):
        values = scans.change(time, weights)
        # What a killed worker was writing would be counted with what is written now.
        sync(group.store.delete_dir(folder(time)))
        array[time] = values
        store.bring_to_disk(folder(time))
        records.append(
            {
                "change": time,
                "known": int(np.count_nonzero(np.isfinite(values))),
                "changed": int(np.count_nonzero(values > CHANGED)),
                "stored": sum(store.sizes(folder(time)).values()),
            }
        )
    return records


def folder(time: int) -> str:
    """Folder of an observation that holds the change of one time, and nothing else."""
    return f"{NAME}/c/{time}"


class _Scans:
    """Images of a series: those of a few times are in memory, as they are stored."""

    def __init__(self, images: zarr.Group, scales: Mapping[str, float], aligned: bool) -> None:
        self._group = images
        self._scales = scales
        self._aligned = aligned
        self._read: dict[tuple[str, int], tuple[NDArray[np.uint16], np.float32]] = {}
        self._moves: dict[tuple[int, int], Shift] = {}

    def change(self, time: int, weights: Mapping[str, Sequence[Weights]]) -> Image:
        """Estimate of a time's change (y, x); NaN where it is not known."""
        needed = {time}.union(*(one for several in weights.values() for one in several))
        self._read = {key: images for key, images in self._read.items() if key[1] in needed}
        brightest = np.maximum(*(self._brightest(line, time) for line in LINES))
        largest = np.full_like(brightest, np.nan)
        for line, several in weights.items():
            for one in several:
                if all(self._move(other, time).applied for other in one):
                    np.fmax(largest, self._largest(line, time, one), out=largest)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.rint(largest / brightest / STEP) * STEP, dtype=np.float32)

    def _images(self, line: str, time: int) -> tuple[NDArray[np.uint16], np.float32]:
        """A scan's images (band, y, x), its brightest intensities as the last one; and their unit."""
        if (line, time) not in self._read:
            level = float(np.asarray(array_in(self._group, f"level_{line}")[time]))
            images = np.asarray(array_in(self._group, line)[time])
            self._read[line, time] = (images, np.float32(self._scales[line] * level * UNIT))
        return self._read[line, time]

    def _brightest(self, line: str, time: int) -> Image:
        images, unit = self._images(line, time)
        return _known(images[-1]) * unit

    def _move(self, time: int, onto: int) -> Shift:
        """By how many pixels a time's images have to be moved to lie on another time's."""
        if self._aligned or time == onto:
            return Shift(0.0, 0.0, 1.0)
        earlier, later = sorted((time, onto))
        if (earlier, later) not in self._moves:
            self._moves[earlier, later] = self._displacement(earlier, later)
        move = self._moves[earlier, later]
        return move if time == later else Shift(-move.y, -move.x, move.confidence)

    def _displacement(self, earlier: int, later: int) -> Shift:
        """By the photosphere, which both wings of H-alpha show."""
        images = [self._images("halpha", time)[0] for time in (earlier, later)]
        known = [np.asarray(one[0] != 0) for one in images]
        box = middle_box(known[0] & known[1], SEARCHED)
        wings = [np.add(one[0][box], one[2][box], dtype=np.float32) for one in images]
        move = find_image_shift((wings[0], wings[1]), (known[0][box], known[1][box]))
        # What is not displaced, as far as can be told, is not interpolated either.
        y, x = (round(along / CERTAIN) * CERTAIN for along in (move.y, move.x))
        return Shift(y, x, move.confidence)

    def _largest(self, line: str, time: int, weights: Weights) -> Image:
        """Largest change (y, x) of a line in any band, in units of intensity, less the noise."""
        known = np.asarray(self._images(line, time)[0][0] != 0)
        sample = self._sums(line, time, weights, *middle_box(known, SAMPLE))
        noise = np.array([_noise(*of_band) for of_band in zip(*sample, strict=True)], np.float32)
        least = (SIGNIFICANT * noise) ** 2
        largest = np.empty(known.shape, np.float32)
        for top in range(0, len(known), STRIP):
            rows = slice(top, min(top + STRIP, len(known)))
            sums = self._sums(line, time, weights, rows, slice(0, known.shape[1]))
            _exceeding(*sums, least, largest[rows])
        return largest

    def _sums(
        self, line: str, time: int, weights: Weights, rows: slice, columns: slice
    ) -> tuple[Image, Image]:
        """Change in each band (band, rows, columns), and the mean intensity of what it was found from."""
        total = sum(map(abs, weights.values()))
        # A line that was not interpolated has not changed.
        parts = {other: (weight, abs(weight) / total) for other, weight in weights.items()} if total else {}
        shape = (len(BANDS), rows.stop - rows.start, columns.stop - columns.start)
        change, intensity = np.zeros((2, *shape), np.float32)
        for other, (weight, share) in (parts or {time: (0.0, 1.0)}).items():
            images, unit = self._images(line, other)
            move = self._move(other, time)
            factors = (unit, np.float32(weight), np.float32(share))
            corner = (rows.start, columns.start)
            _add_moved(images, *_taps(move.y), *_taps(move.x), *factors, *corner, change, intensity)
        return change, intensity


def _known(images: NDArray[np.uint16]) -> Image:
    """Images as they are stored, in single precision; NaN where nothing is known."""
    values: Image = images.astype(np.float32)
    np.copyto(values, np.float32(np.nan), where=images == 0)
    return values


def moved(images: NDArray[np.uint16], move: tuple[float, float], rows: slice, columns: slice) -> Image:
    """One block of images that are moved, by cubic convolution (Keys 1981, doi:10.1109/TASSP.1981.1163711).

    A tenth of the time that splines take, which the store's intensities are worth. A difference image is not:
    of what CRISP resolves a thousandth is lost.

    Parameters
    ----------
    images : ndarray of uint16, shape (n, y, x)
        Whole images; zero where nothing is known.
    move : tuple of float
        By how many pixels along y and x they are moved.
    rows, columns : slice
        The block, with explicit start and stop.

    Returns
    -------
    ndarray of float32, shape (n, rows, columns)
        NaN where any of the four by four pixels that count is not known, or outside of the image.
    """
    shape = (len(images), rows.stop - rows.start, columns.stop - columns.start)
    result: Image = np.zeros(shape, np.float32)
    factors, corner = (np.float32(1.0),) * 3, (rows.start, columns.start)
    _add_moved(images, *_taps(move[0]), *_taps(move[1]), *factors, *corner, result, np.zeros_like(result))
    return result


@compiled
def _add_moved(
    images: NDArray[np.uint16],
    first_y: int,
    along_y: Image,
    first_x: int,
    along_x: Image,
    unit: np.float32,
    weight: np.float32,
    share: np.float32,
    top: int,
    left: int,
    change: Image,
    intensity: Image,
) -> None:
    """Add a block of moved images, times two factors, to two others (band, rows, columns)."""
    _, height, width = images.shape
    bands, rows, columns = change.shape
    reach = columns + len(along_x) - 1
    line, values = np.empty(reach, np.float32), np.empty(columns, np.float32)
    start = left + first_x
    first = min(max(0, -start), reach)
    last = max(min(reach, width - start), first)
    for band in range(bands):
        for y in range(rows):
            line[:] = np.float32(0.0)
            line[:first] = np.float32(np.nan)
            line[last:] = np.float32(np.nan)
            for step in range(len(along_y)):
                row = top + y + first_y + step
                if row < 0 or row >= height:
                    line[:] = np.float32(np.nan)
                    continue
                factor, part = along_y[step], line[first:last]
                source = images[band, row, start + first : start + last]
                for x in range(len(part)):
                    number = source[x]
                    part[x] += factor * (np.float32(number) if number != 0 else np.float32(np.nan))
            values[:] = np.float32(0.0)
            for step in range(len(along_x)):
                factor, part = along_x[step], line[step : step + columns]
                for x in range(columns):
                    values[x] += factor * part[x]
            changed, seen = change[band, y], intensity[band, y]
            for x in range(columns):
                value = values[x] * unit
                changed[x] += weight * value
                seen[x] += share * value


@compiled
def _exceeding(change: Image, intensity: Image, least: Image, largest: Image) -> None:
    """Largest of changes (band, rows, columns), of what their squares exceed of the noise's."""
    bands, rows, columns = change.shape
    for y in range(rows):
        for x in range(columns):
            most = np.float32(0.0)
            for band in range(bands):
                square = change[band, y, x] * change[band, y, x] - least[band] * intensity[band, y, x]
                # What is not a number in one is none in all.
                if square > most or square != square:
                    most = square
            largest[y, x] = np.sqrt(most)


def _taps(move: float) -> tuple[int, NDArray[np.float32]]:
    """Where, from a pixel, those begin that it is made of, and their weights."""
    whole = int(np.floor(-move))
    fraction = -move - whole
    if fraction == 0.0:
        return whole, np.ones(1, np.float32)
    distance = np.abs(np.arange(-1, 3) - fraction)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1.0
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4.0 * distance + 2.0
    return whole - 1, np.where(distance <= 1.0, near, far).astype(np.float32)


LAPLACIAN = np.outer((1.0, -2.0, 1.0), (1.0, -2.0, 1.0)).astype(np.float32) / 6.0
"""Gives white noise its own standard deviation, and of anything that a telescope resolves next to nothing."""


def _noise(change: Image, intensity: Image) -> float:
    """Noise of a difference image over the root of the intensity; NaN where nothing tells it."""
    with np.errstate(invalid="ignore", divide="ignore"):
        roughness = ndimage.convolve(change / np.sqrt(intensity), LAPLACIAN)[1:-1, 1:-1]
    known = np.abs(roughness[np.isfinite(roughness)])
    return NORMAL * float(np.median(known)) if known.size else float("nan")
