"""What ingest costs beside plainly reading and writing the same bytes, and how much memory its workers need.

    python -m tests.benchmarks.ingest [--pairs 4] [--shape 1470 1930] [--workers 1]

A series of full CRISP frames is written to a temporary directory: two lines, a field rotated in its pad, Ca
II displaced by a fraction of a pixel, 16-bit integers. Then, in one run, on workers with one thread each,

plain    reads every file's numbers as the store holds them (single precision), and writes all arrays of the
         finished observation, which are in memory, in one task: with the chunks and the codec that Zarr
         chooses by itself;
tuned    does the same with the store's own chunks, shards and codecs, which were chosen for speed, too;
ingest   is the real command: reading twice, finding the displacement, resampling, hashing, and what is done
         once, however long the series (coordinates of all pixels, the layout of the store).

Compared are processor time (of client, scheduler and workers, for ingest) and wall time. Memory is the
resident set of each worker, less what it has before it begins; it must not depend on the number of pairs.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

import numpy as np
import psutil
import zarr
from astropy.io import fits
from distributed import Client
from rich.console import Console
from rich.table import Table

from inn.layout import CA8542, HALPHA
from pipeline.cluster import LocalConfig, connect
from pipeline.crisp.fchroma import file_name, write_fchroma
from pipeline.ingest import ingest
from tests.fchroma_files import (
    BETWEEN_LINES,
    CADENCE,
    PAD,
    START,
    WAVELENGTH_CA8542,
    WAVELENGTH_HALPHA,
    displace,
    rotated_field,
    smooth_noise,
)

SHIFT = (2.3, -1.4)
WANTED = 0.6


def write_series(folder: Path, shape: tuple[int, int], pairs: int) -> None:
    """Write scans of granulation and line cores, cheaply: two textures, weighted by wavelength, and noise."""
    rng = np.random.default_rng(0)
    whole = rotated_field(shape, 20.0)
    moved = np.roll(whole, [-round(step) for step in SHIFT], (0, 1))
    textures = [smooth_noise(rng, shape, size) for size in (3.5, 2.5)]
    for number in range(pairs):
        for name, axis, rest, inside, shift, delay in (
            ("halpha", WAVELENGTH_HALPHA, HALPHA.rest_wavelength, whole, (0.0, 0.0), np.timedelta64(0, "s")),
            ("ca8542", WAVELENGTH_CA8542, CA8542.rest_wavelength, moved, SHIFT, BETWEEN_LINES),
        ):
            seen = [displace(texture, -shift[0], -shift[1]) for texture in textures]
            cube = np.empty((axis.size, *shape), dtype=np.int16)
            for image, offset in zip(cube, axis - rest, strict=True):
                core = np.exp(-((offset / 0.5) ** 2))
                level = 2500.0 * (1.0 - 0.7 * core) * (1.0 + 0.07 * seen[0]) + 60.0 * core * seen[1]
                noisy = level + np.sqrt(np.maximum(level, 0.0)) * rng.standard_normal(shape, dtype=np.float32)
                image[:] = np.where(inside, np.rint(noisy), PAD)
            moment = START + number * CADENCE
            write_fchroma(folder / file_name(name, START, number), cube, axis, moment + delay)


@dataclass
class Usage:
    """Processor time, wall time and memory of processes while something is done.

    Attributes
    ----------
    processor, wall : float
        Seconds.
    memory : list of int
        Most bytes of each process beyond what it had at the beginning.
    """

    processor: float = 0.0
    wall: float = 0.0
    memory: list[int] = field(default_factory=list)

    @contextmanager
    def measured(self, processes: list[psutil.Process]) -> Iterator[None]:
        """Add what these processes use while the block runs; memory is of the last such block."""

        def spent() -> float:
            return sum(sum(process.cpu_times()[:2]) for process in processes)

        before, started = spent(), time.perf_counter()
        first = [process.memory_info().rss for process in processes]
        most, end = list(first), Event()

        def watch() -> None:
            while not end.wait(0.05):
                most[:] = map(max, most, (process.memory_info().rss for process in processes))

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            end.set()
            watcher.join()
            self.wall += time.perf_counter() - started
            self.processor += spent() - before
            self.memory = [high - low for high, low in zip(most, first, strict=True)]


def plain(folder: Path, observation: Path, copy: Path, tuned: bool) -> Usage:
    """Read all files, and write all arrays of the observation anew, in this process."""
    usage = Usage()
    source = zarr.open_group(observation, mode="r")
    target = zarr.open_group(copy, mode="w")
    pairs = source["valid"].shape[0]
    for name, own in source.arrays():
        as_stored = {"chunks": own.chunks, "shards": own.shards, "compressors": own.compressors}
        target.create_array(
            name,
            shape=own.shape,
            dtype=own.dtype,
            fill_value=own.fill_value,
            **(as_stored if tuned else {}),
        )
    of_times = [name for name, own in source.arrays() if own.ndim > 2]
    once = {name: own[...] for name, own in source.arrays() if own.ndim <= 2}
    with usage.measured([psutil.Process()]):
        for name, values in once.items():
            target[name][...] = values
    files = sorted(folder.glob("*.fits"))
    for pair in range(pairs):
        arrays = {name: source[name][pair] for name in of_times}
        with usage.measured([psutil.Process()]):
            for file in files[pair :: len(files) // 2]:
                fits.getdata(file, memmap=False).astype(np.float32)
            for name, values in arrays.items():
                target[name][pair] = values
    return usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--shape", type=int, nargs=2, default=(1470, 1930))
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    with TemporaryDirectory() as name, connect(LocalConfig(workers=arguments.workers)) as client:
        folder, observation = Path(name, "series"), Path(name, "obs.zarr")
        folder.mkdir()
        write_series(folder, tuple(arguments.shape), arguments.pairs)
        warm_up(Path(name, "warm"), client)
        workers = [psutil.Process(number) for number in client.run(os.getpid).values()]
        whole = Usage()
        with whole.measured([*workers, psutil.Process()]):
            ingest([folder], observation, cluster=client, call="the benchmark")
        references = {
            kind: client.submit(plain, folder, observation, Path(name, f"{kind}.zarr"), tuned).result()
            for kind, tuned in (("plain", False), ("tuned", True))
        }
        report(arguments.pairs, references, whole)


def warm_up(folder: Path, client: Client) -> None:
    """Let the workers import everything."""
    folder.mkdir()
    write_series(folder, (100, 120), 2 * len(client.nthreads()))
    ingest([folder], folder / "obs.zarr", cluster=client, call="the benchmark")


def report(pairs: int, references: dict[str, Usage], whole: Usage) -> None:
    table = Table(title=f"{pairs} pairs of scans")
    for heading in ("", "processor, s a pair", "wall, s a pair", "most memory, MB"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, usage in {**references, "ingest": whole}.items():
        # The last of ingest's processes is the client.
        of_workers = usage.memory[:-1] if usage is whole else usage.memory
        memory = " ".join(f"{bytes_ / 1e6:.0f}" for bytes_ in of_workers)
        table.add_row(name, f"{usage.processor / pairs:.2f}", f"{usage.wall / pairs:.2f}", memory)
    Console().print(table)
    for name, reference in references.items():
        ratio = reference.processor / whole.processor
        print(f"ingest reaches {100 * ratio:.0f} % of the throughput of {name} in processor time ", end="")
        print(f"({100 * WANTED:.0f} % wanted), {100 * reference.wall / whole.wall:.0f} % in wall time")


if __name__ == "__main__":
    main()
