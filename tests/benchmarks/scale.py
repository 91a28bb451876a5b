"""Memory of client, scheduler and workers while many tiles are done, and tiles per second of the driver.

    python -m tests.benchmarks.scale [--output NAME: build/scale]

Two runs on a cluster of two processes with one thread each. In the first a tile's kernel does nothing, so
that 200,000 tiles measure the client, with its journal, and the scheduler (one process here) alone. In the
second a thousand small tiles of random profiles are inverted and written by the real command. Memory
(resident set) is sampled all along; it is flat if from the tenth tile on no process exceeds what it had then
by a tenth. Processor time of each process tells what a tile costs on a machine that does other work besides.

Printed, and drawn in NAME.png.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from unittest import mock

import numpy as np
import psutil
from distributed import Client
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import pipeline.invert as engine
from inn.posterior import QUANTILES
from pipeline.cluster import LocalConfig, connect
from pipeline.invert import invert
from pipeline.journal import BATCH, Journal
from pipeline.tiles import Tile, TileGrid, TileResult, TileSpec
from tests.toy_observation import write_toy_observation

FLAT = 1.1
SETTLED = 10


def receipt(spec: TileSpec, tile: Tile) -> TileResult:
    """What a tile's kernel returns, and nothing else."""
    return TileResult(tile, "0" * 64, 0, tile.pixels, {}, 0.0, 0)


@dataclass
class Curve:
    """Memory by tiles done.

    Attributes
    ----------
    names : list of str
        The processes.
    tiles : list of int
        Tiles done at each sample.
    seconds : list of float
        When.
    memory : list of list of int
        Bytes of each process at each sample.
    processor : list of list of float
        Processor time of each process at each sample, seconds.
    """

    names: list[str]
    tiles: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[list[int]] = field(default_factory=list)
    processor: list[list[float]] = field(default_factory=list)

    @property
    def cost(self) -> list[float]:
        """Processor time of each process for one tile, seconds."""
        first = int(np.searchsorted(self.tiles, 1))
        spent = np.array(self.processor[-1]) - np.array(self.processor[first])
        return (spent / (self.tiles[-1] - self.tiles[first])).tolist()

    @property
    def rate(self) -> float:
        """Tiles per second, from the first sample with a tile to the last."""
        first = int(np.searchsorted(self.tiles, 1))
        return (self.tiles[-1] - self.tiles[first]) / (self.seconds[-1] - self.seconds[first])

    def at(self, tiles: int) -> list[int]:
        """Memory when so many tiles were done."""
        return self.memory[min(int(np.searchsorted(self.tiles, tiles)), len(self.tiles) - 1)]

    @property
    def growth(self) -> list[float]:
        """Most memory of each process from `SETTLED` tiles on, over what it had then."""
        first = int(np.searchsorted(self.tiles, SETTLED))
        later = np.array(self.memory[first:], dtype=float)
        return (later.max(axis=0) / later[0]).tolist()


@contextmanager
def sampled(client: Client, done: Callable[[], int], every: float = 0.2) -> Iterator[Curve]:
    """Sample the memory of this process and of all workers while the block runs."""
    processes = [psutil.Process(), *map(psutil.Process, client.run(os.getpid).values())]
    curve = Curve(["client and scheduler", *(f"worker {index}" for index in range(len(processes) - 1))])
    started, end = time.perf_counter(), Event()

    def sample() -> None:
        curve.tiles.append(done())
        curve.seconds.append(time.perf_counter() - started)
        curve.memory.append([process.memory_info().rss for process in processes])
        curve.processor.append([sum(process.cpu_times()[:2]) for process in processes])

    def watch() -> None:
        while not end.wait(every):
            sample()

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield curve
    finally:
        end.set()
        watcher.join()
        sample()


def without_kernel(client: Client, tiles: int) -> Curve:
    """Have the engine do tiles whose kernel does nothing: there is neither observation nor map to check."""
    grid = TileGrid((tiles, 64, 64), (64, 64))
    spec = TileSpec(
        observation="/somewhere/observation.zarr",
        observation_hash="0" * 64,
        store="/somewhere/map.zarr",
        run="0" * 32,
        model=None,
        model_hash="0" * 64,
        torch_version="0",
        draws=256,
        seed=0,
        latent="sobol",
        quantiles=QUANTILES,
        calibration_error=None,
        threads=1,
    )
    asked = np.full(tiles, 64 * 64)
    with (
        TemporaryDirectory() as folder,
        Journal.create(Path(folder) / "map.zarr.journal", spec.run, {}) as journal,
        mock.patch.multiple(
            engine._Work,
            _see_that_the_observation_is_the_same=lambda self: None,
            _see_that_all_is_there=lambda self: None,
        ),
        mock.patch.multiple(engine, invert_tile=receipt, mark_unwritten=lambda *_: None),
    ):
        work = engine._Work(spec, grid, asked, None, journal)
        with sampled(client, lambda: int(work.pixels) // (64 * 64)) as curve:
            work.go_on(client, None)
        assert work.done.all()
        assert sum("sha256" in record for record in journal.records()) > tiles - BATCH
    return curve


def with_kernel(client: Client, tiles: int, draws: int, model: Path | None) -> Curve:
    """Invert small tiles of random profiles."""
    with TemporaryDirectory() as folder:
        side = 4
        rows = 32 * side
        columns = side * -(-tiles // 32)
        observation = write_toy_observation(Path(folder) / "toy.zarr", times=1, rows=rows, columns=columns)
        output = Path(folder) / "map.zarr"
        journal = output.with_name("map.zarr.journal")

        def done() -> int:
            return journal.read_bytes().count(b'"sha256"') if journal.exists() else 0

        with sampled(client, done) as curve:
            report = invert(observation, output, model=model, cluster=client, draws=draws, tile=side)
        assert report.tiles == tiles
        assert not report.failed
    return curve


def table(title: str, curve: Curve) -> Table:
    """Memory at tens, hundreds, thousands of tiles."""
    shown = Table(title=title)
    for heading in ("tiles", "tiles/s so far", *(f"{name}, MB" for name in curve.names)):
        shown.add_column(heading, justify="right")
    last = curve.tiles[-1]
    marks = [mark for power in range(1, 7) for mark in (10**power, 3 * 10**power) if mark < last]
    for mark in [*marks, last]:
        index = min(int(np.searchsorted(curve.tiles, mark)), len(curve.tiles) - 1)
        shown.add_row(
            f"{curve.tiles[index]:,}",
            f"{curve.tiles[index] / curve.seconds[index]:,.0f}",
            *(f"{1e-6 * each:,.1f}" for each in curve.memory[index]),
        )
    shown.add_row("most over the first", "", *(f"{growth:.3f}" for growth in curve.growth))
    shown.add_row("processor ms a tile", "", *(f"{1e3 * cost:.2f}" for cost in curve.cost))
    return shown


def figure(curves: dict[str, Curve]) -> Figure:
    """Memory by tiles done, a panel for each run."""
    drawn = Figure(figsize=(10, 4), layout="constrained")
    axes = drawn.subplots(1, len(curves))
    for axis, (title, curve) in zip(np.atleast_1d(axes), curves.items(), strict=True):
        for name, values in zip(curve.names, np.array(curve.memory).T, strict=True):
            axis.plot(curve.tiles, 1e-6 * values, label=name)
        axis.set_xscale("symlog", linthresh=10)
        axis.set(xlabel="tiles done", ylabel="resident memory (MB)", title=title, ylim=(0, None))
        axis.set_xlim(0, max(curve.tiles))
        axis.axvline(SETTLED, color="0.7", lw=0.8)
        axis.legend(loc="lower right")
    return drawn


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiles", type=int, default=200_000, help="tiles without a kernel")
    parser.add_argument("--real-tiles", type=int, default=1024, help="tiles that are inverted; 32 a row")
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--model", type=Path, help="a model directory; the bundled one if left out")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("build/scale"), help="NAME of the picture")
    options = parser.parse_args()
    console = Console(width=120)
    config = LocalConfig(workers=options.workers, dashboard=None)
    curves: dict[str, Curve] = {}
    with connect(config) as client:
        curve = without_kernel(client, options.tiles)
    title = f"{options.tiles:,} tiles without a kernel"
    curves[title] = curve
    console.print(table(f"{title}: {curve.rate:,.0f} tiles/s", curve))
    with connect(config) as client:
        curve = with_kernel(client, options.real_tiles, options.draws, options.model)
    title = f"{options.real_tiles:,} tiles inverted"
    curves[title] = curve
    console.print(table(f"{title}: {curve.rate:,.1f} tiles/s", curve))
    for title, curve in curves.items():
        flat = all(growth <= FLAT for growth in curve.growth)
        console.print(f"{title}: memory {'is flat' if flat else 'GROWS'}: {max(curve.growth):.3f} at most")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure(curves).savefig(options.output.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    # Workers import the kernel by its module's name; one of `__main__` would travel whole with every task.
    from tests.benchmarks import scale

    scale.main()
