"""What a run of the map engine will take: pixels, space on the disk, time; found by inverting a few pixels.

The pixels of the sample are read, inverted, rounded, compressed and written as the engine does it, into a
temporary map, where they take the places of pixels that are asked for: what lies between these is not free,
and a pixel takes more the fewer of its tile are asked for. How many those are is known of all tiles, but for
the share of them that lies within both lines' field, which is counted at a few times.
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
from pipeline.results import VARIABLES, WITHOUT_ANSWER, compressor, lay_out
from pipeline.selection import EVERYTHING, count_by_tile
from pipeline.storage import Directory, place
from pipeline.tiles import Tile, TileGrid, TileSpec, compute_tile, computed_pixels, within_field, write_tile

logger = logging.getLogger("flarefield")

SECONDS = 2.0
"""Time that a sample should take."""
FRAMES = 4
"""Times at which pixels within both lines' field are counted."""
SPOTS = 1024
"""Pixels around which a sample's patches are laid, at most."""
SIDES = (8, 64)
"""Pixels along the sides of a sample's patches: they begin small, and grow as the time allows."""
TILES = 4
"""Whole tiles that a sample comes to, at most."""
LEAST = 64
"""Pixels of a sample, at least, if there are as many. Where more are needed the same are taken in new order:
64 take 2 % less than as many different ones, 16 take 10 % less, 8 take 20 to 50 % less."""
LAID_OUT = 16
"""Tiles in whose places a sample is laid out, at most."""
AREA = 1 << 15
"""Pixels of these together, at most, if there are more than four."""
LARGEST = 1 << 14
"""Pixels of one of them, at most; larger tiles are laid out in part."""
TASKS = 256
"""Workers that take a sample at the same time, at most."""
BLOCK = 4096
"""Bytes by which a file system hands out space, as a rule; every file leaves a part of one unused."""
FILES_PER_TILE = sum(3 if variable.profile else 1 for variable in VARIABLES)
"""Files of a tile, and directories that hold nothing else: of each a file system has only so many."""
MARGIN = 1.1
"""Bytes that a disk must have for each that a sample lets expect."""


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
        How many.
    computed : int
        What was computed for them (`pipeline.tiles.computed_pixels`).
    added : tuple of tuple of int and float
        Bytes that each adds to the files of its tile, for some tiles, after the pixels of that tile.
    empty : float
        Bytes of the files of a tile without any answer.
    seconds : float
        Time it took, without opening model and observation.
    writing : float
        Time that it takes to write a tile, seconds.
    """

    pixels: int
    computed: int
    added: tuple[tuple[int, float], ...]
    empty: float
    seconds: float
    writing: float


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
        Those of them that lie within both lines' field, whose share is known of a few times of the series.
    computed : int
        What is computed for them (`pipeline.tiles.computed_pixels`).
    bytes_per_pixel : float
        Bytes that one of the answerable takes in the store, by a sample; the mean over all of them.
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
        Pixels per second that one of them computes, with all of them at work; 0 if it is not known.
    sampling : Sampling or None
        What is drawn for each pixel; None for a preview.
    free_files : int or None
        Files that can still be made where the map is to lie; None where there is no such limit.
    writing : float
        Seconds that it takes to write a tile.
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
    writing: float = 0.0

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
        return math.ceil(self.need.tiles / self.tasks) * self.seconds_per_tile

    @property
    def seconds_per_tile(self) -> float:
        """Time that a tile takes, on average over those that are missing."""
        if not (self.need.tiles and self.rate):
            return 0.0
        return self.need.computed / self.need.tiles / self.rate + self.writing

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
            pace = self.tasks * need.answerable / need.tiles / self.seconds_per_tile
            lines += [
                f"  time: about {timedelta(seconds=round(self.seconds))} (h:mm:ss), {pace:,.0f} pixels/s",
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
    usable = _usable(spec, grid, missing, dataset)
    samples, started, threads = [], 1, 1
    if client is not None and usable.any():
        started, threads = sum(client.nthreads().values()), threads_per_task(client)
        number = min(started, TASKS)
        tiles = _examples(spec, grid, usable, number)
        jobs = [tiles[first::number] or tiles for first in range(number)]
        work = partial(take_sample, replace(spec, threads=threads), grid, SECONDS)
        for outcome in run_bounded(client, work, jobs, window=number):
            if outcome.error is not None:
                raise outcome.error
            if outcome.result is not None:
                samples.append(outcome.result)
    return Plan(
        output=place(spec.store).location,
        tiles_done=int(np.count_nonzero(done)),
        pixels_done=int(asked[done].sum()),
        need=_need(spec, grid, missing, usable, samples, beside),
        free=free_space(spec.store),
        free_files=free_files(spec.store),
        sampled=sum(sample.pixels for sample in samples),
        tasks=tasks or started,
        threads=threads,
        rate=_mean([sample.computed / sample.seconds for sample in samples]),
        writing=_mean([sample.writing for sample in samples]),
        sampling=sampling,
    )


def _mean(numbers: Sequence[float]) -> float:
    """Mean of what samples say; 0 without any."""
    return float(np.mean(numbers)) if numbers else 0.0


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
    whole = Sample(0, 0, (), raw * math.prod(grid.tile), 0.0, 0.0)
    most = _need(spec, grid, missing, np.zeros_like(missing), [whole], beside)
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
    usable = _usable(spec, grid, missing, dataset)
    # In this process, whatever the workers have.
    here = replace(spec, device="cpu", precision="float32", compiled=False)
    sample = take_sample(here, grid, SECONDS, _examples(spec, grid, usable, 1)) if usable.any() else None
    need = _need(spec, grid, missing, usable, [] if sample is None else [sample], beside)
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
    usable: NDArray[np.int64],
    samples: Sequence[Sample],
    beside: Beside,
) -> Need:
    """What is needed, with the counts of pixels that `_usable` gives."""
    tiles = int(np.count_nonzero(missing))
    rows = missing.reshape(grid.counts).any(axis=2)
    folders = len(VARIABLES) * int(
        np.count_nonzero(rows) + np.count_nonzero(missing.reshape(grid.counts[0], -1).any(axis=1))
    )
    sizes, number = np.unique(usable[usable > 0], return_counts=True)
    known = [pair for sample in samples for pair in sample.added]
    per_pixel = 0.0
    if known and sizes.size:
        kinds, kind = np.unique([size for size, _ in known], return_inverse=True)
        added = np.bincount(kind, [each for _, each in known]) / np.bincount(kind)
        # To say how far apart pixels lie takes bits by the logarithm of that.
        each = np.interp(np.log(sizes), np.log(kinds), added)
        per_pixel = float(np.average(each, weights=sizes * number))
    return Need(
        tiles=tiles,
        pixels=int(missing.sum()),
        answerable=int(usable.sum()),
        computed=sum(
            computed_pixels(spec, int(size)) * int(alike) for size, alike in zip(sizes, number, strict=True)
        ),
        bytes_per_pixel=per_pixel,
        bytes_per_tile=_mean([sample.empty for sample in samples]),
        bytes_beside=beside.bytes,
        files=tiles * FILES_PER_TILE + folders + beside.files,
        block=_block(spec.store),
    )


def _usable(
    spec: TileSpec, grid: TileGrid, missing: NDArray[np.int64], dataset: xr.Dataset
) -> NDArray[np.int64]:
    """How many of each tile's missing pixels lie within both lines' field: estimated, but for a few times."""
    random = np.random.default_rng(spec.seed)
    per_time = missing.reshape(grid.counts)
    times = np.flatnonzero(per_time.any(axis=(1, 2)))
    looked_at = times[np.linspace(0, times.size - 1, min(times.size, FRAMES)).round().astype(int)]
    found, inside = np.zeros((2, looked_at.size, *grid.counts[1:]), dtype=np.int64)
    for here, index in enumerate(looked_at):
        frame = Tile(int(index), 0, 0, (0, grid.shape[1]), (0, grid.shape[2]))
        valid = dataset["valid"].isel(time=index).transpose("y", "x").values.astype(bool)
        inside[here] = count_by_tile(valid, grid.tile)
        found[here] = count_by_tile(valid & spec.selection.asked(frame), grid.tile) * (per_time[index] > 0)
    pixels = count_by_tile(np.ones(grid.shape[1:], dtype=bool), grid.tile)
    # By the pixels that were asked for at these times and, where there are none, by all of the tile.
    share = (found.sum(axis=0) + inside.sum(axis=0) / (pixels * max(looked_at.size, 1))) / (
        per_time[looked_at].sum(axis=0) + 1
    )
    # Rounded up or down by chance: tiles with a single pixel would be all counted otherwise, or none of them.
    usable: NDArray[np.int64] = np.floor(per_time * share + random.random(per_time.shape)).astype(np.int64)
    usable[looked_at] = found
    return usable.ravel()


def _examples(spec: TileSpec, grid: TileGrid, usable: NDArray[np.int64], workers: int) -> list[Tile]:
    """Choose tiles with few pixels and with many, for some workers: one half by tiles, one half by pixels."""
    number = workers * min(LAID_OUT, max(AREA // math.prod(grid.tile), 4))
    tiles = np.random.default_rng(spec.seed).permutation(np.flatnonzero(usable))
    tiles = tiles[np.argsort(usable[tiles], kind="stable")]
    ends = np.cumsum(usable[tiles])
    by_tiles = np.linspace(0, tiles.size - 1, number // 2).round().astype(int)
    middles = (np.arange(number - number // 2) + 0.5) / (number - number // 2)
    by_pixels = np.searchsorted(ends, ends[-1] * middles)
    return [grid[int(tiles[first])] for first in np.union1d(by_tiles, by_pixels)]


def take_sample(spec: TileSpec, grid: TileGrid, seconds: float, tiles: Sequence[Tile]) -> Sample | None:
    """Invert small patches of pixels, as tiles are inverted, into a temporary map.

    Parameters
    ----------
    spec : TileSpec
        The run.
    grid : TileGrid
        Its tiles; no patch is larger than one.
    seconds : float
        Time to spend, about; after opening model and observation, and as many patches of the smallest size as
        make `LEAST` pixels.
    tiles : sequence of Tile
        In these patches are laid, around pixels that are asked for, and such tiles are written.

    Returns
    -------
    Sample or None
        None if no pixel of these tiles is asked for and lies within both lines' field.

    Raises
    ------
    FlareFieldError
        The run itself could not go on here (`pipeline.tiles.invert_tile`), or no pixel can be inverted.
    """
    asked = [_asked(spec, tile) for tile in tiles]
    found = np.concatenate(
        [
            np.argwhere(pixels[None]) + np.array((tile.time, tile.y[0], tile.x[0]))
            for tile, pixels in zip(tiles, asked, strict=True)
        ]
    )
    if not found.size:
        return None
    spots = np.random.default_rng(spec.seed).permutation(found)[:SPOTS].tolist()
    # What is computed comes in whole batches: all of a patch takes no longer than a few of its pixels.
    everything = replace(spec, selection=EVERYTHING)
    _inverted(everything, _patch(grid, spots[0], SIDES[0]))  # opens what is needed by all
    parts: list[dict[str, NDArray[Any]]] = []
    others: list[dict[str, NDArray[Any]]] = []
    side = kept = SIDES[0]
    pixels, computed, taken = 0, 0, 0.0
    most = TILES * grid.tile[0] * grid.tile[1]
    patches: list[Tile] = []
    for spot in spots:
        patch = _patch(grid, spot, side)
        if side == kept and any(_overlap(patch, other) for other in patches):
            continue  # the same pixels again would compress to nothing
        started = time.monotonic()
        values = _inverted(everything, patch)
        last = time.monotonic() - started
        if values is not None:
            if side > kept:  # larger patches say more of how tiles are compressed: the others are left out
                kept, parts, others, patches, pixels, taken = side, [], [], [], 0, 0.0
                computed = 0
            patches.append(patch)
            here = _asked(spec, patch)
            answered = (values["quality"] & WITHOUT_ANSWER) == 0
            parts.append({name: array[here] for name, array in values.items()})
            others.append({name: array[answered & ~here] for name, array in values.items()})
            pixels += int(np.count_nonzero(answered | here))
            computed += computed_pixels(spec, int(np.count_nonzero(_asked(everything, patch))))
        taken += last
        if parts and ((taken >= seconds and pixels >= LEAST) or pixels >= most):
            break
        if 16 * last <= seconds and side < min(SIDES[-1], max(grid.tile)):
            side *= 2
    if not parts:
        raise StoreError("no pixel of a sample can be inverted", where=spec.observation)
    # Those that nobody asked for come last: to fill tiles for which there are not enough others.
    sample = {name: np.concatenate([part[name] for part in parts + others]) for name in parts[0]}
    wanted = sum(len(part["quality"]) for part in parts)
    added, empty, writing = _sizes(spec, grid, asked, sample, wanted)
    return Sample(len(sample["quality"]), computed, added, empty, taken, writing)


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
    spec: TileSpec,
    grid: TileGrid,
    tiles: Sequence[NDArray[np.bool_]],
    sample: Mapping[str, NDArray[Any]],
    first: int,
) -> tuple[tuple[tuple[int, float], ...], float, float]:
    """Lay pixels out as tiles hold those asked for: `Sample.added`, `Sample.empty` and `Sample.writing`.

    So many pixels that come first are taken, if they are enough for a tile.
    """
    count, heights, pixels = len(sample["quality"]), sample["temperature"].shape[-1], math.prod(grid.tile)
    # Parts of tiles are to be compressed as whole ones are.
    alike = [
        n
        for n in range(1, min(pixels, LARGEST) + 1)
        if compressor(n * heights) == compressor(pixels * heights)
    ]
    whole, part = alike[-1], max((n for n in alike if n <= count), default=alike[0])
    laid_out: dict[int, list[tuple[int, NDArray[np.bool_]]]] = {part: [], whole: []}
    for asked in (_filled_up(asked, grid) for asked in tiles):
        number = int(np.count_nonzero(asked))
        if not number:
            continue
        row = _around(asked, whole)
        # Neighbours are compressed better than the same pixels in new order: full tiles are laid out in part.
        full = np.count_nonzero(row) > max(count, whole // 2)
        width = part if full else whole
        laid_out[width].append((number, _around(row, width)))
    # Among many others, the same pixels in new order compress like new ones.
    random = np.random.default_rng(spec.seed)
    rounds = [np.arange(count), *(random.permutation(count) for _ in range(whole // count))]
    sample = {name: array[np.concatenate(rounds)] for name, array in sample.items()}
    added, writing, lost = [], [], 0
    for width in sorted(laid_out):
        rows = [row for _, row in laid_out[width]]
        (lost, _), *written = _written(spec, sample, [np.zeros(width, dtype=bool), *rows], first)
        for (number, row), (stored, taken) in zip(laid_out[width], written, strict=True):
            added.append((number, (stored - lost) / np.count_nonzero(row)))
            writing.append(taken * pixels / width)
    return tuple(added), lost * pixels / whole, _mean(writing)


def _filled_up(asked: NDArray[np.bool_], grid: TileGrid) -> NDArray[np.bool_]:
    """Pixels of a tile, in a row; tiles at the edges are filled up."""
    whole = np.zeros(grid.tile, dtype=bool)
    whole[: asked.shape[0], : asked.shape[1]] = asked
    return whole.ravel()


def _around(row: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """So many pixels in a row, around the middle one of those that are asked for."""
    places = np.flatnonzero(row)
    first = min(max(int(places[places.size // 2]) - width // 2, 0), row.size - width)
    return row[first : first + width]


def _written(
    spec: TileSpec, sample: Mapping[str, NDArray[Any]], places: Sequence[NDArray[np.bool_]], first: int
) -> list[tuple[int, float]]:
    """Write a tile for each row of places, with the sample's pixels there, in turn: bytes, and time."""
    width, heights = places[0].size, sample["temperature"].shape[-1]
    tiles = TileGrid((len(places), 1, width), (1, width))
    found, next_one = [], 0
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
            values, number = {}, int(np.count_nonzero(asked))
            chosen = (next_one + np.arange(number)) % max(number, first)
            next_one += number
            for variable in VARIABLES:
                pixels = sample[variable.name]
                row = np.full((width, *pixels.shape[1:]), variable.fill, dtype=pixels.dtype)
                row[asked] = pixels[chosen]
                values[variable.name] = row[None]
            size = write_tile(store, spec.run, tile, values)
            found.append((size, time.monotonic() - started))
    return found


def _patch(grid: TileGrid, spot: tuple[int, int, int], side: int) -> Tile:
    """Square around a pixel (time, y, x), within the field and no larger than a tile."""
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
