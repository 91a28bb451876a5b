"""What a run of the map engine will take: pixels, space on the disk, time; found by inverting a few pixels.

The pixels of the sample are read, inverted, rounded, compressed and written as the engine does it, into a
temporary map, where they take the places of pixels that are asked for: what lies between these is not free.
Nothing is known of the others but how many of them lie within both lines' field, and what is computed with
them.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from distributed import Client
from numpy.typing import NDArray
from rich.filesize import decimal

from inn.sampling import Sampling
from pipeline.cluster import threads_per_task
from pipeline.driver import run_bounded
from pipeline.errors import FlareFieldError, StoreError
from pipeline.results import VARIABLES, Flag, compressor, lay_out
from pipeline.storage import Directory, place
from pipeline.tiles import Tile, TileGrid, TileSpec, compute_tile, computed_pixels, within_field, write_tile

logger = logging.getLogger("flarefield")

SECONDS = 2.0
"""Time that a sample should take."""
FRAMES = 4
"""Times from which a sample is taken."""
SPOTS = 1024
"""Pixels among which the samples' patches are drawn."""
SIDES = (8, 64)
"""Pixels along the sides of a sample's patches: they begin small, and grow as the time allows."""
TILES = 4
"""Whole tiles that a sample comes to, at most."""
LAID_OUT = 16
"""Tiles in whose places a sample is laid out, at most."""
LARGEST = 1 << 14
"""Pixels of these, at most; larger tiles are laid out in part."""
TASKS = 256
"""Workers that take a sample at the same time, at most."""
BLOCK = 4096
"""Bytes by which a file system hands out space, as a rule; every file leaves a part of one unused."""
FILES_PER_TILE = sum(3 if variable.profile else 1 for variable in VARIABLES)
"""Files of a tile, and directories that hold nothing else: of each a file system has only so many."""
MARGIN = 1.1
"""Bytes that a disk must have for each that a sample lets expect."""


Spot = tuple[int, int, int]
"""Indices of a pixel: time, y, x."""


class Beside(NamedTuple):
    """What is still to be written beside the tiles: coordinates and attributes.

    Attributes
    ----------
    bytes : int
        Bytes of it.
    files : int
        Files and directories.
    """

    bytes: int
    files: int


@dataclass(frozen=True)
class Sample:
    """A few pixels that were really inverted.

    Attributes
    ----------
    pixels : int
        How many, within both lines' field.
    computed : int
        What was computed for them (`pipeline.tiles.computed_pixels`).
    stored : float
        Bytes that each adds to the files of its tile.
    empty : float
        Bytes of the files of a tile without any answer.
    seconds : float
        Time it took, without opening model and observation.
    """

    pixels: int
    computed: int
    stored: float
    empty: float
    seconds: float


@dataclass(frozen=True)
class Need:
    """Pixels that are still to be done, and the space they need.

    Attributes
    ----------
    tiles : int
        Tiles to be done.
    pixels : int
        Pixels to be done.
    answerable : int
        Those of them that lie within both lines' field, by a few times of the series.
    computed : int
        What is computed for them (`pipeline.tiles.computed_pixels`), by the same times.
    bytes_per_pixel : float
        Bytes that one of the latter takes in the store, by a sample.
    bytes_per_tile : float
        Bytes that a tile takes without them.
    bytes_beside : int
        Bytes of coordinates and attributes, if they are still to be written.
    files : int
        Files and directories to be made for all of this.
    block : int
        Bytes by which the file system hands out space.
    """

    tiles: int
    pixels: int
    answerable: int
    computed: int
    bytes_per_pixel: float
    bytes_per_tile: float
    bytes_beside: int
    files: int
    block: int = BLOCK

    @property
    def stored(self) -> int:
        """Bytes of their tiles."""
        return round(self.answerable * self.bytes_per_pixel + self.tiles * self.bytes_per_tile)

    @property
    def space(self) -> int:
        """Bytes that the disk must have: a margin, directories, and what files' last blocks leave unused."""
        return round(MARGIN * (self.stored + self.bytes_beside)) + self.files * self.block


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes
    ----------
    output : Path or str
        The map store, or its URL.
    tiles_done, pixels_done : int
        What an earlier run has done of the map.
    need : Need
        What is missing.
    free : int or None
        Bytes that are free where the map is to lie; None where there is no such limit.
    sampled : int
        Pixels that were inverted to find out.
    tasks : int
        Tiles that the cluster does at a time.
    threads : int
        Cores of each.
    rate : float
        Pixels per second that one of them computes, with all of them at work.
    sampling : Sampling or None
        What is drawn for each pixel; None for a preview.
    free_files : int or None
        Files that can still be made where the map is to lie; None where there is no such limit.
    """

    output: Path | str
    tiles_done: int
    pixels_done: int
    need: Need
    free: int | None
    sampled: int
    tasks: int
    threads: int
    rate: float
    sampling: Sampling | None
    free_files: int | None = None

    @property
    def fits(self) -> bool:
        """Whether there is space for what is missing, and room for its files."""
        return (self.free is None or self.need.space <= self.free) and not self.too_many_files

    @property
    def too_many_files(self) -> bool:
        """Whether the file system cannot have so many more files."""
        return self.free_files is not None and self.need.files > self.free_files

    @property
    def seconds(self) -> float:
        """Time that the cluster needs for what is missing."""
        if not self.need.computed:
            return 0.0
        return math.ceil(self.need.tiles / self.tasks) * self.need.computed / self.need.tiles / self.rate

    def summary(self) -> str:
        """The plan as a person reads it."""
        need = self.need
        lines = [f"{self.output}: {need.tiles:,} tiles ({need.pixels:,} pixels) to do"]
        if self.tiles_done:
            lines[0] += f"; {self.tiles_done:,} tiles ({self.pixels_done:,} pixels) are done"
        if not need.tiles:
            return lines[0]
        lines.append(f"  about {need.answerable:,} of the pixels lie within both lines' field")
        size = (
            f"  size: about {decimal(need.stored + need.bytes_beside)} "
            f"({need.stored / need.pixels:.0f} bytes a pixel)"
        )
        if self.free is not None:
            size += f"; {decimal(self.free)} are free"
            if self.need.space > self.free:
                size += f": IT DOES NOT FIT (with a margin and whole blocks it takes {decimal(need.space)})"
        lines.append(size)
        if self.too_many_files:
            lines.append(
                f"  IT DOES NOT FIT: the disk has room for {self.free_files:,} more files (inodes), and it "
                f"takes {need.files:,}; larger tiles (--tile) are fewer files"
            )
        drawn = "a preview: nothing is drawn" if self.sampling is None else f"sampling: {self.sampling}"
        lines.append(f"  {drawn}")
        if self.sampled:
            lines += [
                f"  time: about {timedelta(seconds=round(self.seconds))} (h:mm:ss), "
                f"{self.rate * self.tasks * need.answerable / max(need.computed, 1):,.0f} pixels/s",
                f"  assuming {self.tasks} tiles at a time, on {self.threads} cores each, at the pace of "
                f"{self.sampled:,} pixels inverted just now",
            ]
        return "\n".join(lines)


def free_space(store: Path | str) -> int | None:
    """Bytes that are free for a store; None on an object store. A user's quota is not looked at.

    Parameters
    ----------
    store : Path or str
        A path, whose parent exists, or a URL.
    """
    where = place(store)
    return shutil.disk_usage(where.location.parent).free if isinstance(where, Directory) else None


def free_files(store: Path | str) -> int | None:
    """Files that can still be made where a store lies; None on an object store, or if there is no such limit.

    Parameters
    ----------
    store : Path or str
        A path, whose parent exists, or a URL.
    """
    where = place(store)
    if not isinstance(where, Directory):
        return None
    status = os.statvfs(where.location.parent)
    return status.f_favail if status.f_files else None


def _block(store: Path | str) -> int:
    where = place(store)
    return os.statvfs(where.location.parent).f_frsize if isinstance(where, Directory) else BLOCK


def make_plan(
    client: Client | None,
    spec: TileSpec,
    grid: TileGrid,
    asked: NDArray[np.int64],
    done: NDArray[np.bool_],
    dataset: xr.Dataset,
    *,
    beside: Beside,
    sampling: Sampling | None,
    tasks: int | None = None,
) -> Plan:
    """Find out what is to be done of a map, and what it takes on a cluster.

    All workers invert a sample at the same time, as they will in the run.

    Parameters
    ----------
    client : distributed.Client, optional
        The cluster; not needed if nothing is to be done.
    spec : TileSpec
        The run.
    grid : TileGrid
        Its tiles.
    asked : ndarray of int, shape (tiles,)
        Selected pixels of each tile.
    done : ndarray of bool, shape (tiles,)
        Tiles that are done.
    dataset : xarray.Dataset
        The observation.
    beside : Beside
        Coordinates and attributes that are still to be written.
    sampling : Sampling or None
        What is drawn; None for a preview.
    tasks : int, optional
        Tiles that the whole cluster will do at a time, if it is larger than what has been started of it.

    Returns
    -------
    Plan

    Raises
    ------
    FlareFieldError
        What `take_sample` raises.
    """
    missing = np.where(done, 0, asked)
    answerable, computed, spots = _spots(spec, grid, missing, dataset)
    samples, started, threads = [], 1, 1
    if client is not None and spots:
        started, threads = sum(client.nthreads().values()), threads_per_task(client)
        number = min(started, TASKS)
        jobs = [spots[first::number] or spots for first in range(number)]
        work = partial(take_sample, replace(spec, threads=threads), grid, SECONDS)
        for outcome in run_bounded(client, work, jobs, window=number):
            if outcome.error is not None:
                raise outcome.error
            assert outcome.result is not None
            samples.append(outcome.result)
    return Plan(
        output=place(spec.store).location,
        tiles_done=int(np.count_nonzero(done)),
        pixels_done=int(asked[done].sum()),
        need=_need(spec, grid, missing, (answerable, computed), samples, beside),
        free=free_space(spec.store),
        free_files=free_files(spec.store),
        sampled=sum(sample.pixels for sample in samples),
        tasks=tasks or started,
        threads=threads,
        rate=float(np.mean([sample.computed / sample.seconds for sample in samples])) if samples else 0.0,
        sampling=sampling,
    )


def see_that_it_fits(
    spec: TileSpec,
    grid: TileGrid,
    asked: NDArray[np.int64],
    done: NDArray[np.bool_],
    dataset: xr.Dataset,
    *,
    beside: Beside,
    heights: int,
) -> None:
    """Refuse a run whose tiles the disk cannot hold.

    What fits without any compression costs no more than to ask the disk; otherwise a few pixels are inverted
    here, to learn how well they are compressed.

    Parameters
    ----------
    spec, grid, asked, done, dataset, beside
        As for `make_plan`.
    heights : int
        Heights of the network's grid.

    Raises
    ------
    StoreError
        It cannot fit.
    FlareFieldError
        What `take_sample` raises.
    """
    free = free_space(spec.store)
    missing = np.where(done, 0, asked)
    raw = sum(
        np.dtype(variable.dtype).itemsize * (len(spec.quantiles) * heights if variable.profile else 1)
        for variable in VARIABLES
    )
    # What lies between the pixels that are asked for is compressed, but not to nothing.
    most = _need(spec, grid, missing, (0, 0), [Sample(0, 0, 0, raw * math.prod(grid.tile), 0)], beside)
    room = free_files(spec.store)
    if room is not None and most.files > room:
        raise StoreError(
            "the map does not fit on the disk",
            where=spec.store,
            found=f"room for {room:,} more files (inodes)",
            expected=f"{most.files:,} for {most.tiles:,} tiles",
            remedy="remove some files, choose an output elsewhere or larger tiles (--tile), or invert a part "
            "(--region, --times)",
        )
    if free is None or most.space <= free:
        return
    *counts, spots = _spots(spec, grid, missing, dataset)
    # In this process, whatever the workers have.
    here = replace(spec, device="cpu", precision="float32", compiled=False)
    samples = [take_sample(here, grid, SECONDS, spots)] if spots else []
    need = _need(spec, grid, missing, counts, samples, beside)
    if need.space > free:
        raise StoreError(
            "the map does not fit on the disk",
            where=spec.store,
            found=f"{decimal(free)} free",
            expected=f"about {decimal(need.space)} for {need.tiles:,} tiles, by a sample of their pixels",
            remedy="free some space, choose an output elsewhere or fewer quantiles, or invert a part "
            "(--region, --times)",
        )


def _need(
    spec: TileSpec,
    grid: TileGrid,
    missing: NDArray[np.int64],
    counts: Sequence[int],
    samples: Sequence[Sample],
    beside: Beside,
) -> Need:
    """What is needed, with the counts of pixels that `_spots` gives."""
    answerable, computed = counts
    tiles = int(np.count_nonzero(missing))
    rows = missing.reshape(grid.counts).any(axis=2)
    folders = len(VARIABLES) * int(
        np.count_nonzero(rows) + np.count_nonzero(missing.reshape(grid.counts[0], -1).any(axis=1))
    )
    return Need(
        tiles=tiles,
        pixels=int(missing.sum()),
        answerable=answerable,
        computed=computed,
        bytes_per_pixel=float(np.mean([sample.stored for sample in samples])) if samples else 0.0,
        bytes_per_tile=float(np.mean([sample.empty for sample in samples])) if samples else 0.0,
        bytes_beside=beside.bytes,
        files=tiles * FILES_PER_TILE + folders + beside.files,
        block=_block(spec.store),
    )


def _spots(
    spec: TileSpec, grid: TileGrid, missing: NDArray[np.int64], dataset: xr.Dataset
) -> tuple[int, int, list[Spot]]:
    """Estimate how many missing pixels lie within both lines' field, what is computed, and draw some."""
    random = np.random.default_rng(spec.seed)
    per_time = missing.reshape(grid.counts)
    times = np.flatnonzero(per_time.any(axis=(1, 2)))
    wanted = usable = computed = 0
    spots: list[Spot] = []
    for index in times[np.linspace(0, times.size - 1, min(times.size, FRAMES)).round().astype(int)]:
        frame = Tile(int(index), 0, 0, (0, grid.shape[1]), (0, grid.shape[2]))
        here = np.repeat(np.repeat(per_time[index] > 0, grid.tile[0], axis=0), grid.tile[1], axis=1)
        here = here[: grid.shape[1], : grid.shape[2]] & spec.selection.asked(frame)
        wanted += int(np.count_nonzero(here))
        here &= dataset["valid"].isel(time=index).transpose("y", "x").values.astype(bool)
        found = np.argwhere(here)
        usable += len(found)
        for row, column in np.argwhere(per_time[index] > 0):
            y, x = (slice(n * size, (n + 1) * size) for n, size in zip((row, column), grid.tile, strict=True))
            computed += computed_pixels(spec, int(np.count_nonzero(here[y, x])))
        chosen = random.permutation(len(found))[: SPOTS // FRAMES]
        spots += [(int(index), int(y), int(x)) for y, x in found[chosen]]
    random.shuffle(spots)
    share = int(missing.sum()) / wanted if wanted else 0.0
    return round(share * usable), round(share * computed), spots


def take_sample(spec: TileSpec, grid: TileGrid, seconds: float, spots: Sequence[Spot]) -> Sample:
    """Invert small patches of pixels, as tiles are inverted, into a temporary map.

    Parameters
    ----------
    spec : TileSpec
        The run.
    grid : TileGrid
        Its tiles; no patch is larger than one.
    seconds : float
        Time to spend, about; after opening model and observation, and one patch of the smallest size.
    spots : sequence of tuple of int
        Time, y and x of pixels around which patches are laid, one at least.

    Returns
    -------
    Sample

    Raises
    ------
    FlareFieldError
        The run itself could not go on here (`pipeline.tiles.invert_tile`), or no pixel can be inverted.
    """
    _inverted(spec, _patch(grid, spots[0], SIDES[0]))  # opens what is needed by all
    parts: list[dict[str, NDArray[Any]]] = []
    side = kept = SIDES[0]
    pixels, computed, taken = 0, 0, 0.0
    most = TILES * grid.tile[0] * grid.tile[1]
    patches: list[Tile] = []
    for spot in spots:
        patch = _patch(grid, spot, side)
        if side == kept and any(_overlap(patch, other) for other in patches):
            continue  # the same pixels again would compress to nothing
        started = time.monotonic()
        values = _inverted(spec, patch)
        last = time.monotonic() - started
        if values is not None:
            if side > kept:  # larger patches say more of how tiles are compressed: the others are left out
                kept, parts, patches, pixels, taken = side, [], [], 0, 0.0
                computed = 0
            patches.append(patch)
            answerable = (values["quality"] & (Flag.OUTSIDE_FIELD | Flag.NOT_SELECTED)) == 0
            parts.append({name: array[answerable] for name, array in values.items()})
            pixels += values["quality"].size
            computed += computed_pixels(spec, int(np.count_nonzero(_asked(spec, patch))))
        taken += last
        if parts and (taken >= seconds or pixels >= most):
            break
        if 16 * last <= seconds and side < min(SIDES[-1], max(grid.tile)):
            side *= 2
    if not parts:
        raise StoreError("no pixel of a sample can be inverted", where=spec.observation)
    sample = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    stored, empty, writing = _sizes(spec, grid, spots, sample)
    return Sample(len(sample["quality"]), computed, stored, empty, taken + writing)


def _asked(spec: TileSpec, tile: Tile) -> NDArray[np.bool_]:
    """Pixels (y, x) that are asked for and lie within both lines' field."""
    return spec.selection.asked(tile) & within_field(spec, tile)


def _inverted(spec: TileSpec, patch: Tile) -> dict[str, NDArray[Any]] | None:
    try:
        return compute_tile(spec, patch)
    except FlareFieldError:
        raise
    except Exception as error:  # the run would give such a tile up and go on
        logger.warning("pixels at %s cannot be inverted: %s: %s", patch, type(error).__name__, error)
        return None


def _sizes(
    spec: TileSpec, grid: TileGrid, spots: Sequence[Spot], sample: Mapping[str, NDArray[Any]]
) -> tuple[float, float, float]:
    """Lay pixels out as tiles hold theirs: bytes that each adds, bytes of an empty tile, time of writing.

    A tile is taken as often as it has pixels among the spots: the mean over tiles is that over pixels.
    """
    count, heights, pixels = len(sample["quality"]), sample["temperature"].shape[-1], math.prod(grid.tile)
    # Parts of tiles are to be compressed as whole ones are.
    alike = [
        n
        for n in range(1, min(pixels, LARGEST) + 1)
        if compressor(n * heights) == compressor(pixels * heights)
    ]
    whole = width = alike[-1]
    chosen = spots[: min(LAID_OUT, LARGEST // whole)]
    places = [_places(spec, grid, spot, whole) for spot in chosen]
    if any(np.count_nonzero(asked) > max(count, whole // 2) for asked in places):
        # The same pixels again would compress to nothing: parts of tiles, for which there are enough.
        width = max((n for n in alike if n <= count), default=alike[0])
        places = [_places(spec, grid, spot, width) for spot in chosen]
    # Among many others, the same pixels in new order compress like new ones.
    random, most = np.random.default_rng(spec.seed), max(np.count_nonzero(asked) for asked in places)
    rounds = [np.arange(count), *(random.permutation(count) for _ in range(most // count))]
    sample = {name: array[np.concatenate(rounds)] for name, array in sample.items()}
    nothing = np.zeros(whole, dtype=bool)
    ((empty, _),) = _written(spec, sample, [nothing])
    (lost, _), *written = _written(spec, sample, [nothing[:width], *places])
    sizes = [np.count_nonzero(asked) for asked in places]
    added = [(stored - lost) / size for (stored, _), size in zip(written, sizes, strict=True)]
    seconds = sum(taken for _, taken in written) * count / sum(sizes)
    return float(np.mean(added)), empty * pixels / whole, float(seconds)


def _places(spec: TileSpec, grid: TileGrid, spot: Spot, width: int) -> NDArray[np.bool_]:
    """Pixels in a row of the tile of a spot, or so many of them around it, that are to be answered."""
    row, column = (n // size for n, size in zip(spot[1:], grid.tile, strict=True))
    tile = grid[(spot[0] * grid.counts[1] + row) * grid.counts[2] + column]
    asked = np.zeros(grid.tile, dtype=bool)  # tiles at the edges are filled up
    asked[: tile.shape[0], : tile.shape[1]] = _asked(spec, tile)
    middle = (spot[1] - tile.y[0]) * grid.tile[1] + spot[2] - tile.x[0]
    first = min(max(middle - width // 2, 0), asked.size - width)
    return asked.ravel()[first : first + width]


def _written(
    spec: TileSpec, sample: Mapping[str, NDArray[Any]], places: Sequence[NDArray[np.bool_]]
) -> list[tuple[int, float]]:
    """Write a tile for each row of places, with the sample's pixels there: bytes, and time."""
    width, heights = places[0].size, sample["temperature"].shape[-1]
    tiles = TileGrid((len(places), 1, width), (1, width))
    found = []
    with TemporaryDirectory(prefix="flarefield-") as folder:
        store = Path(folder) / "sample.zarr"
        lay_out(
            store,
            xr.Dataset(coords={"time": range(len(places)), "y": range(1), "x": range(width)}),
            heights=range(heights),
            quantiles=spec.quantiles,
            tile=tiles.tile,
            attrs={"run": spec.run},
        )
        for tile, asked in zip(tiles, places, strict=True):
            started = time.monotonic()
            values = {}
            for variable in VARIABLES:
                pixels = sample[variable.name]
                row = np.full((width, *pixels.shape[1:]), variable.fill, dtype=pixels.dtype)
                row[asked] = pixels[: np.count_nonzero(asked)]
                values[variable.name] = row[None]
            size = write_tile(store, spec.run, tile, values)
            found.append((size, time.monotonic() - started))
    return found


def _patch(grid: TileGrid, spot: Spot, side: int) -> Tile:
    """Square around a pixel, within the field and no larger than a tile."""
    when, *centre = spot
    sizes = [min(side, largest) for largest in grid.tile]
    first = [
        min(max(middle - size // 2, 0), whole - size)
        for middle, size, whole in zip(centre, sizes, grid.shape[1:], strict=True)
    ]
    y, x = ((begin, begin + size) for begin, size in zip(first, sizes, strict=True))
    return Tile(when, 0, 0, y, x)


def _overlap(one: Tile, other: Tile) -> bool:
    return one.time == other.time and all(
        max(first[0], second[0]) < min(first[1], second[1])
        for first, second in ((one.y, other.y), (one.x, other.x))
    )
