"""What a run of the map engine will take: pixels, space on the disk, time; found by inverting a few pixels.

The pixels of the sample are read, inverted, rounded, compressed and written as the engine does it, into a
temporary map. Nothing is known of the others but how many of them lie within both lines' field.
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
from typing import Any

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
from pipeline.tiles import Tile, TileGrid, TileSpec, compute_tile, write_tile

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
TASKS = 256
"""Workers that take a sample at the same time, at most."""
BLOCK = 4096
"""Bytes by which a file system hands out space, as a rule; every file leaves a part of one unused."""
BLOCKS_PER_TILE = 3 * len(VARIABLES)
"""Of each variable a file, and at most two directories that hold nothing else, each of which takes one."""
FILES_PER_TILE = sum(3 if variable.profile else 1 for variable in VARIABLES)
"""Files of a tile, and directories that hold nothing else: of each a file system has only so many."""
MARGIN = 1.1
"""Bytes that a disk must have for each that a sample lets expect."""


Spot = tuple[int, int, int]
"""Indices of a pixel: time, y, x."""


@dataclass(frozen=True)
class Sample:
    """A few pixels that were really inverted.

    Attributes
    ----------
    pixels : int
        How many, within both lines' field.
    stored : int
        Bytes that they add to the files of their tiles.
    empty : int
        Bytes of the files of a tile without any answer.
    seconds : float
        Time it took, without opening model and observation.
    """

    pixels: int
    stored: int
    empty: int
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
    bytes_per_pixel : float
        Bytes that one of the latter takes in the store, by a sample.
    bytes_per_tile : float
        Bytes that a tile takes without them.
    bytes_beside : int
        Bytes of coordinates and attributes, if they are still to be written.
    """

    tiles: int
    pixels: int
    answerable: int
    bytes_per_pixel: float
    bytes_per_tile: float
    bytes_beside: int

    @property
    def stored(self) -> int:
        """Bytes of their tiles."""
        return round(self.answerable * self.bytes_per_pixel + self.tiles * self.bytes_per_tile)

    @property
    def space(self) -> int:
        """Bytes that the disk must have: a margin, directories, and what files' last blocks leave unused."""
        return round(MARGIN * (self.stored + self.bytes_beside)) + self.tiles * BLOCKS_PER_TILE * BLOCK

    @property
    def files(self) -> int:
        """Files and directories that the disk must have room for."""
        return self.tiles * FILES_PER_TILE


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
        Pixels per second of one of them, with all of them at work.
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
        if not self.need.answerable:
            return 0.0
        return math.ceil(self.need.tiles / self.tasks) * self.need.answerable / self.need.tiles / self.rate

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
                f"{self.rate * self.tasks:,.0f} pixels/s",
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


def make_plan(
    client: Client | None,
    spec: TileSpec,
    grid: TileGrid,
    asked: NDArray[np.int64],
    done: NDArray[np.bool_],
    dataset: xr.Dataset,
    *,
    beside: int,
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
    beside : int
        Bytes of coordinates and attributes that are still to be written.
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
    answerable, spots = _spots(spec, grid, missing, dataset)
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
        need=_need(missing, answerable, samples, beside),
        free=free_space(spec.store),
        free_files=free_files(spec.store),
        sampled=sum(sample.pixels for sample in samples),
        tasks=tasks or started,
        threads=threads,
        rate=float(np.mean([sample.pixels / sample.seconds for sample in samples])) if samples else 0.0,
        sampling=sampling,
    )


def see_that_it_fits(
    spec: TileSpec,
    grid: TileGrid,
    asked: NDArray[np.int64],
    done: NDArray[np.bool_],
    dataset: xr.Dataset,
    *,
    beside: int,
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
    pixels = int(missing.sum())
    most = Need(int(np.count_nonzero(missing)), pixels, pixels, raw, bytes_per_tile=0, bytes_beside=beside)
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
    answerable, spots = _spots(spec, grid, missing, dataset)
    # In this process, whatever the workers have.
    here = replace(spec, device="cpu", precision="float32", compiled=False)
    need = _need(missing, answerable, [take_sample(here, grid, SECONDS, spots)] if spots else [], beside)
    if need.space > free:
        raise StoreError(
            "the map does not fit on the disk",
            where=spec.store,
            found=f"{decimal(free)} free",
            expected=f"about {decimal(need.space)} for {need.tiles:,} tiles, by a sample of their pixels",
            remedy="free some space, choose an output elsewhere or fewer quantiles, or invert a part "
            "(--region, --times)",
        )


def _need(missing: NDArray[np.int64], answerable: int, samples: Sequence[Sample], beside: int) -> Need:
    pixels = sum(sample.pixels for sample in samples)
    return Need(
        tiles=int(np.count_nonzero(missing)),
        pixels=int(missing.sum()),
        answerable=answerable,
        bytes_per_pixel=sum(sample.stored for sample in samples) / pixels if pixels else 0.0,
        bytes_per_tile=float(np.mean([sample.empty for sample in samples])) if samples else 0.0,
        bytes_beside=beside,
    )


def _spots(
    spec: TileSpec, grid: TileGrid, missing: NDArray[np.int64], dataset: xr.Dataset
) -> tuple[int, list[Spot]]:
    """Estimate how many missing pixels lie within both lines' field, and draw some of them."""
    random = np.random.default_rng(spec.seed)
    per_time = missing.reshape(grid.counts)
    times = np.flatnonzero(per_time.any(axis=(1, 2)))
    wanted = usable = 0
    spots: list[Spot] = []
    for index in times[np.linspace(0, times.size - 1, min(times.size, FRAMES)).round().astype(int)]:
        frame = Tile(int(index), 0, 0, (0, grid.shape[1]), (0, grid.shape[2]))
        here = np.repeat(np.repeat(per_time[index] > 0, grid.tile[0], axis=0), grid.tile[1], axis=1)
        here = here[: grid.shape[1], : grid.shape[2]] & spec.selection.asked(frame)
        wanted += int(np.count_nonzero(here))
        here &= dataset["valid"].isel(time=index).transpose("y", "x").values.astype(bool)
        found = np.argwhere(here)
        usable += len(found)
        # No more than it takes to invert them all.
        chosen = random.permutation(len(found))[: min(SPOTS // FRAMES, 1 + len(found) // SIDES[0] ** 2)]
        spots += [(int(index), int(y), int(x)) for y, x in found[chosen]]
    random.shuffle(spots)
    return round(int(missing.sum()) * usable / wanted) if wanted else 0, spots


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
    pixels, taken = 0, 0.0
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
            patches.append(patch)
            # All patches in a row: their shapes do not matter for the compression.
            parts.append({name: array.reshape(1, -1, *array.shape[2:]) for name, array in values.items()})
            pixels += values["quality"].size
        taken += last
        if parts and (taken >= seconds or pixels >= most):
            break
        if 16 * last <= seconds and side < min(SIDES[-1], max(grid.tile)):
            side *= 2
    if not parts:
        raise StoreError("no pixel of a sample can be inverted", where=spec.observation)
    sample = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    stored, empty, writing = _written(spec, sample, grid.tile[0] * grid.tile[1])
    answerable = (sample["quality"] & (Flag.OUTSIDE_FIELD | Flag.NOT_SELECTED)) == 0
    return Sample(int(np.count_nonzero(answerable)), stored, empty, taken + writing)


def _inverted(spec: TileSpec, patch: Tile) -> dict[str, NDArray[Any]] | None:
    try:
        return compute_tile(spec, patch)
    except FlareFieldError:
        raise
    except Exception as error:  # the run would give such a tile up and go on
        logger.warning("pixels at %s cannot be inverted: %s: %s", patch, type(error).__name__, error)
        return None


def _written(spec: TileSpec, sample: Mapping[str, NDArray[Any]], width: int) -> tuple[int, int, float]:
    """Write a row of pixels in tiles: bytes more than empty ones have, those of an empty one, time."""
    _, whole, _, heights = sample["temperature"].shape
    # Smaller tiles than the run's are to be compressed as its are.
    alike = compressor(width * heights)
    width = next((n for n in range(min(width, whole), 0, -1) if compressor(n * heights) == alike), whole)
    tiles = TileGrid((2, 1, whole), (1, width))
    with TemporaryDirectory(prefix="flarefield-") as folder:
        store = Path(folder) / "sample.zarr"
        lay_out(
            store,
            xr.Dataset(coords={"time": range(2), "y": range(1), "x": range(whole)}),
            heights=range(heights),
            quantiles=spec.quantiles,
            tile=tiles.tile,
            attrs={"run": spec.run},
        )

        def write(tile: Tile) -> int:
            values = {name: array[:, slice(*tile.x)] for name, array in sample.items()}
            if tile.time == 1:
                values = {
                    variable.name: np.full_like(values[variable.name], variable.fill)
                    for variable in VARIABLES
                }
            return write_tile(store, spec.run, tile, values)

        empty = write(replace(tiles[0], time=1))
        started = time.monotonic()
        number = len(tiles) // 2
        stored = sum(write(tiles[index]) for index in range(number))
        return stored - number * empty, empty, time.monotonic() - started


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
