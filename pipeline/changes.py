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

- The image moves between the scans: they are brought onto one another first.
- Photon noise: it is taken from the difference image itself, by its smallest structure, which no telescope
  resolves (Immerkaer 1996, doi:10.1006/cviu.1996.0060), and grows with the root of the intensity.
  `SIGNIFICANT` times its level is taken off in quadrature: of a smaller change nothing remains, one of three
  times as much is understated by 6 %.
- Bad pixels: where any of the scans has one, nothing is known.

Nothing is known, either, of a series of one pair, over gaps, and where displacements are not certain. Where
this is so of one line only, the other line's change is what is known. What comes and goes between two scans
of a line, nobody has seen.

While the scans are written each leaves its images in a store of its own (`BandImages`), a fifth of a scan's
numbers in half precision; from these the change is found, at a small part of the cost of reading scans again.
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

from pipeline.crisp import LINES, Scan
from pipeline.crisp.cube import Cube
from pipeline.errors import FlareFieldError, StoreError
from pipeline.pairing import cadence
from pipeline.registration import (
    BANDS,
    Image,
    Mask,
    Shift,
    band_wavelengths,
    find_shift,
    middle_box,
    resample,
)
from pipeline.storage import Place, out_of_space, place

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
SAMPLE = 256  # pixels of the field's middle from which the noise is taken
NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
STRIP = 256  # rows that are in memory in single precision at a time
ROWS = 8  # rows whose spectra stay in the processor's cache
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
        An intensity of each line's scan in whose units half precision holds its images: see `level`.
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
        self._images = {line: np.full((len(BANDS) + 1, *shape), np.nan, np.float16) for line in levels}

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
        out = self._images[line][:, rows, columns]
        scale = np.float32(1.0 / self._levels[line])
        for top in range(0, len(block), ROWS):
            spectra = np.ascontiguousarray(np.moveaxis(block[top : top + ROWS], -1, 0))
            brightest = spectra.max(axis=0)
            usable = (spectra.min(axis=0) > 0) & (brightest < self._saturation[line])
            for index, chosen in enumerate(self._chosen[line]):
                mean = np.asarray(np.mean(spectra[chosen], axis=0, dtype=np.float32))
                out[index, top : top + ROWS] = _half(mean * scale, usable)
            out[-1, top : top + ROWS] = _half(brightest * scale, usable)

    def brightest(self, line: str, block: Image, rows: slice, columns: slice) -> None:
        """Take a block's brightest intensities from other numbers than its images."""
        scale = np.float32(1.0 / self._levels[line])
        self._images[line][-1, rows, columns] = _half(block.max(axis=-1) * scale, True)

    def leave_out(self, where: Mask) -> None:
        """Say that nothing is known of some pixels (y, x)."""
        for images in self._images.values():
            images[:, where] = np.nan

    def write(self, images: Place, time: int) -> None:
        """Write all of it into the store of images, in place of what an earlier attempt has left there."""
        group = _opened(images, "r+")
        for line, values in self._images.items():
            _array(group, line)[time] = values
            _array(group, f"level_{line}")[time] = self._levels[line]
        for folder in image_folders(time):
            images.bring_to_disk(folder)


def _half(values: NDArray[np.floating[Any]], usable: Any) -> NDArray[np.float16]:  # noqa: ANN401
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large is infinite: not known
        return np.where(usable, values, np.float32(np.nan)).astype(np.float16)


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
                dtype="float16",
                chunks=(1, 1, *shape),
                fill_value=np.nan,
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
    """What a worker needs to estimate the change of one time.

    Attributes
    ----------
    store, images : str
        The observation, and the store of images.
    time : int
        Which time.
    weights : mapping of str to sequence of mappings
        Each line's changes: the largest one counts. None of a line of which nothing is known.
    scales : mapping of str to float
        By which each line's intensities are multiplied, where they are calibrated.
    aligned : bool
        Whether the scans lie on one another already. If not, it is found out how far they are displaced.
    """

    store: str
    images: str
    time: int
    weights: Mapping[str, Sequence[Weights]]
    scales: Mapping[str, float]
    aligned: bool = False


def find_change(task: ChangeTask) -> dict[str, Any] | FlareFieldError:
    """Estimate the change of one time and write it into the observation: what a worker does.

    Parameters
    ----------
    task : ChangeTask
        What is to be compared.

    Returns
    -------
    dict or FlareFieldError
        The journal's record: number of pixels of which the change is known, and of those that changed. What a
        user has to mend comes back as a value.
    """
    try:
        images, group = _opened(place(task.images), "r"), _opened(place(task.store), "r+")
        values = _round(_changes(task, images))
        # What an earlier attempt left behind would be read and merged, whatever state it is in.
        sync(group.store.delete_dir(folder(task.time)))
        _array(group, NAME).with_config({"write_empty_chunks": True})[task.time] = values
        place(task.store).bring_to_disk(folder(task.time))
    except FlareFieldError as refusal:
        return refusal
    except OSError as failure:
        if (full := out_of_space(failure, task.store)) is not None:
            return full
        raise
    return {
        "change": task.time,
        "known": int(np.count_nonzero(np.isfinite(values))),
        "changed": int(np.count_nonzero(values > CHANGED)),
    }


def folder(time: int) -> str:
    """Folder of an observation that holds the change of one time, and nothing else."""
    return f"{NAME}/c/{time}"


def _changes(task: ChangeTask, images: zarr.Group) -> Image:
    """Estimate of the change (y, x); NaN where it is not known."""
    reference = np.asarray(_array(images, "halpha")[task.time])
    largest = np.full(reference.shape[1:], np.nan, np.float32)
    others = {time for several in task.weights.values() for weights in several for time in weights}
    moves = {task.time: Shift(0.0, 0.0, 1.0)}
    for time in sorted(others - {task.time}):
        moves[time] = moves[task.time]
        if not task.aligned:
            moves[time] = _displacement(reference, np.asarray(_array(images, "halpha")[time]))
    brightest = np.zeros_like(largest)
    for line in LINES:
        series = _Series(images, line, task, moves)
        np.maximum(brightest, series.brightest, out=brightest)
        for weights in task.weights.get(line, ()):
            if all(moves[time].applied for time in weights):
                np.fmax(largest, series.changes(weights), out=largest)
    with np.errstate(invalid="ignore"):
        return np.asarray(largest / brightest, dtype=np.float32)


AXIS = (-1.0, 0.0, 1.0)
"""Wavelengths, in units of the bands' own, of images that are bands already."""


def _displacement(reference: NDArray[np.float16], moving: NDArray[np.float16]) -> Shift:
    """By how many pixels H-alpha's images of another time have to be moved to lie on the reference's."""
    known = (np.asarray(np.isfinite(one).all(axis=0)) for one in (reference, moving))
    bands = [np.nan_to_num(one[:-1].astype(np.float32)) for one in (reference, moving)]
    return find_shift(bands[0], bands[1], (AXIS, AXIS), (0.0, 0.0), (next(known), next(known)))


class _Series:
    """Images of one line at several times, brought onto those of the task's."""

    def __init__(self, images: zarr.Group, line: str, task: ChangeTask, moves: Mapping[int, Shift]) -> None:
        self._moves = moves
        self._time = task.time
        self._array = _array(images, line)
        self._level = _array(images, f"level_{line}")
        self._scale = task.scales[line]
        self._read: dict[int, NDArray[np.float16]] = {}
        self.shape = (int(self._array.shape[2]), int(self._array.shape[3]))
        self.brightest = self._images(self._time)[-1].astype(np.float32) * self._factor(self._time)

    def _factor(self, time: int) -> np.float32:
        return np.float32(self._scale * float(np.asarray(self._level[time])))

    def _images(self, time: int) -> NDArray[np.float16]:
        if time not in self._read:
            self._read[time] = np.asarray(self._array[time])
        return self._read[time]

    def changes(self, weights: Weights) -> Image:
        """Largest change (y, x) in any band, in the units of intensity, less the noise."""
        known = np.isfinite(self._images(self._time)[0])
        middle = middle_box(known, SAMPLE)
        noise = [
            _noise(change, intensity) for change, intensity in zip(*self._sums(weights, *middle), strict=True)
        ]
        largest = np.empty(self.shape, np.float32)
        for top in range(0, self.shape[0], STRIP):
            rows = slice(top, min(top + STRIP, self.shape[0]))
            changes, intensities = self._sums(weights, rows, slice(0, self.shape[1]))
            squares = (
                changes**2 - (SIGNIFICANT * np.array(noise, np.float32)[:, None, None]) ** 2 * intensities
            )
            largest[rows] = np.sqrt(np.maximum(squares, np.float32(0.0))).max(axis=0)
        return largest

    def _sums(self, weights: Weights, rows: slice, columns: slice) -> tuple[Image, Image]:
        """Change of each band (band, rows, columns), and the mean intensity of what it was found from."""
        shape = (len(BANDS), rows.stop - rows.start, columns.stop - columns.start)
        change, intensity = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        total = sum(map(abs, weights.values()))
        if not weights:
            intensity[:] = self._images(self._time)[:-1, rows, columns] * self._factor(self._time)
            change[~np.isfinite(intensity)] = np.nan
        for time, weight in weights.items():
            values = self._moved(time, rows, columns)
            change += np.float32(weight) * values
            intensity += np.float32(abs(weight) / total) * values
        return change, intensity

    def _moved(self, time: int, rows: slice, columns: slice) -> Image:
        images = self._images(time)[:-1]
        move = self._moves[time]
        if (move.y, move.x) == (0.0, 0.0):
            part = images[:, rows, columns].astype(np.float32)
        else:
            known = np.asarray(np.isfinite(images).all(axis=0))
            part = np.moveaxis(resample(images, known, move, rows, columns), -1, 0)
        part[~np.isfinite(part)] = np.nan
        return part * self._factor(time)


LAPLACIAN = np.outer((1.0, -2.0, 1.0), (1.0, -2.0, 1.0)).astype(np.float32) / 6.0
"""Gives white noise its own standard deviation, and of anything that a telescope resolves next to nothing."""


def _noise(change: Image, intensity: Image) -> float:
    """Noise of a difference image over the root of the intensity; NaN where nothing tells it."""
    with np.errstate(invalid="ignore", divide="ignore"):
        roughness = ndimage.convolve(change / np.sqrt(intensity), LAPLACIAN)[1:-1, 1:-1]
    known = np.abs(roughness[np.isfinite(roughness)])
    return NORMAL * float(np.median(known)) if known.size else float("nan")


def _round(values: Image) -> Image:
    return np.asarray(np.rint(values / np.float32(STEP)) * np.float32(STEP), dtype=np.float32)


def _opened(store: Place, mode: Any) -> zarr.Group:  # noqa: ANN401
    try:
        return zarr.open_group(store.zarr, mode=mode, use_consolidated=False)
    except (FileNotFoundError, ValueError, KeyError) as failure:
        raise StoreError(
            "a worker cannot open the store that is being made",
            where=store,
            found=failure,
            remedy="use a place that all workers see under the same name",
        ) from failure


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array
