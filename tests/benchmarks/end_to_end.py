"""Pixels per second of a whole inversion against the sampler alone on the same cores, and where time goes.

    python -m tests.benchmarks.end_to_end [--rows N] [--draws N]

The observation holds random profiles, all of it on this machine's disk. The sampler alone is
`inn.posterior_quantiles` on as many pixels at once as a tile has, with the draws that `flarefield invert`
takes by itself, in the very workers that invert, before and after: on a machine that does other work besides,
both see the same of it. What is not spent in tiles is scheduling. What tiles spend is then measured with a
profiler in one process, by function.

A preview is bound by what it writes, so its map's bytes per second are compared with the disk's own: the same
bytes, in one file, brought to the disk (fsync); the median of five times.
"""

import argparse
import cProfile
import json
import os
import pstats
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
from distributed import Client
from rich.console import Console
from rich.table import Table

import inn
from inn.posterior import QUANTILES
from inn.sampling import choose_precision, choose_sampling
from pipeline import invert as engine
from pipeline.cluster import LocalConfig, connect
from pipeline.driver import Outcome
from tests.toy_observation import write_toy_observation

PARTS = {
    "open the store, read": ("isel", "values"),
    "judge": ("judge",),
    "interpolate": ("network_lines",),
    "sample, sort, misfit": ("quantiles_and_misfit",),
    "  of which drawing": ("draw_atmospheres",),
    "  of which sorting": ("sorted_draws",),
    "  of which misfit": ("_misfit",),
    "novelty": ("tail_probability",),
    "round": ("round_to_error",),
    "write": ("write_tile",),
    "checksum": ("checksum",),
}
"""Functions of `inn` and `pipeline` (and xarray's reading), by what they do."""


def sampler_seconds(model: str | None, pixels: int, draws: int, latent: str, repeats: int) -> float:
    """Time of the sampler alone for so many tiles of so many pixels, in a worker."""
    network = inn.load_model(model)
    lines = np.random.default_rng(0).uniform(0.2, 1.0, (pixels, network.layout.lines_size))
    torch.set_num_threads(1)
    started = time.perf_counter()
    for _ in range(repeats):
        inn.posterior_quantiles(
            network,
            lines.astype(np.float32),
            mu=0.55,
            draws=draws,
            latent=latent,
            precision=choose_precision(network, "cpu"),
        )
    return time.perf_counter() - started


def sampler_rate(client: Client, *arguments: object, pixels: int, repeats: int) -> float:
    """Pixels per second of all workers at once."""
    workers = list(client.scheduler_info(n_workers=-1)["workers"])
    started = time.perf_counter()
    client.gather(
        [
            client.submit(sampler_seconds, *arguments, repeats, workers=[worker], pure=False)
            for worker in workers
        ]
    )
    return len(workers) * pixels * repeats / (time.perf_counter() - started)


def profiled(profile: cProfile.Profile) -> Callable[..., Iterator[Outcome]]:
    """A driver that runs tiles here, one after the other, under a profiler."""

    def run(
        client: Client, function: Callable[[object], object], tasks: Iterable[object], **_: object
    ) -> Iterator[Outcome]:
        for number, task in enumerate(tasks):
            if number == 0:  # what is opened once
                yield Outcome(task, function(task), None, 1)
                continue
            profile.enable()
            result = function(task)
            profile.disable()
            yield Outcome(task, result, None, 1)

    return run


def seconds_by_part(profile: cProfile.Profile) -> tuple[dict[str, float], float]:
    """Seconds in each of `PARTS`, and in all."""
    statistics = pstats.Stats(profile)
    spent: dict[str, float] = {}
    for part, names in PARTS.items():
        spent[part] = sum(
            cumulative
            for (file, _, name), (_, _, _, cumulative, _) in statistics.stats.items()
            if name in names and ("/inn/" in file or "/pipeline/" in file or file.endswith("dataarray.py"))
        )
    return spent, statistics.total_tt


def disk_speed(folder: Path, count: int) -> float:
    """Bytes per second of so many bytes in one file, on the disk."""
    content = np.random.default_rng(0).bytes(min(count, 1 << 24))
    started = time.perf_counter()
    with (folder / "plain").open("wb") as file:
        for start in range(0, count, len(content)):
            file.write(content[: count - start])
        file.flush()
        os.fsync(file.fileno())
    return count / (time.perf_counter() - started)


def preview_sentence(
    observation: Path, folder: Path, client: Client, model: str | None, tile: int, workers: int
) -> str:
    """What a preview of the observation writes a second, against the disk."""
    report = engine.invert(
        observation, folder / "preview.zarr", cluster=client, model=model, tile=tile, preview=True
    )
    written = sum(file.stat().st_size for file in (folder / "preview.zarr").rglob("*") if file.is_file())
    rate = written / report.seconds
    disk = float(np.median([disk_speed(folder, written) for _ in range(5)]))
    journal = (folder / "preview.zarr.journal").read_text().splitlines()
    in_tiles = sum(json.loads(line).get("seconds", 0.0) for line in journal if '"seconds"' in line)
    return (
        f"preview: {report.pixels / report.seconds:,.0f} pixels/s of {written / report.pixels:,.0f} bytes: "
        f"{rate / 1e6:,.0f} MB/s, {100 * rate / disk:.0f} % of the disk's {disk / 1e6:,.0f} MB/s; "
        f"{100 * in_tiles / workers / report.seconds:.0f} % of its {report.seconds:.2f} s in tiles"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=384, help="pixels of the observation along y")
    parser.add_argument("--columns", type=int, default=384, help="and along x")
    parser.add_argument("--tile", type=int, default=64)
    parser.add_argument("--draws", type=int, help="of the posterior; the network's own if left out")
    parser.add_argument("--latent", help="their kind; the network's own if left out")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="invert so; the sampler alone stays as it is")
    parser.add_argument("--model", help="a model directory; the bundled one if left out")
    options = parser.parse_args()
    console = Console(width=120)
    pixels = options.rows * options.columns
    sampling = choose_sampling(
        inn.load_model(options.model), draws=options.draws, latent=options.latent, quantiles=QUANTILES
    )
    console.print(f"{sampling.draws} {sampling.latent} draws", highlight=False)
    settings = {
        "model": options.model,
        "draws": sampling.draws,
        "latent": sampling.latent,
        "tile": options.tile,
        "compiled": options.compile,
    }
    with TemporaryDirectory() as folder:
        here = Path(folder)
        observation = write_toy_observation(
            here / "toy.zarr", times=1, rows=options.rows, columns=options.columns
        )
        small = write_toy_observation(
            here / "small.zarr", times=1, rows=options.tile, columns=2 * options.tile
        )
        with connect(LocalConfig(workers=options.workers, dashboard=None)) as client:
            # Every worker opens what it opens once.
            engine.invert(small, here / "warm.zarr", cluster=client, **settings)

            def alone() -> float:
                return sampler_rate(
                    client, options.model, options.tile**2, sampling.draws, sampling.latent,
                    pixels=options.tile**2, repeats=max(1, pixels // options.tile**2 // options.workers // 2),
                )  # fmt: skip

            before = alone()
            report = engine.invert(observation, here / "map.zarr", cluster=client, **settings)
            after = alone()
            engine.invert(
                small,
                here / "quick.zarr",
                cluster=client,
                model=options.model,
                tile=options.tile,
                preview=True,
            )
            preview = preview_sentence(
                observation, here, client, options.model, options.tile, options.workers
            )
        journal = (here / "map.zarr.journal").read_text().splitlines()
        in_tiles = sum(json.loads(line).get("seconds", 0.0) for line in journal if '"seconds"' in line)
        whole, sampler = report.pixels / report.seconds, 0.5 * (before + after)
        console.print(
            f"sampler alone {before:,.0f} and {after:,.0f} pixels/s; whole inversion {whole:,.0f}: "
            f"{100 * whole / sampler:.0f} % of it\n"
            f"of the inversion's {report.seconds:.2f} s, {options.workers} workers spent "
            f"{100 * in_tiles / options.workers / report.seconds:.0f} % in tiles; the rest is scheduling, "
            f"beginning and end\n{preview}",
            highlight=False,
        )
        profile = cProfile.Profile()
        with (
            patch.object(engine, "run_bounded", profiled(profile)),
            connect(LocalConfig(workers=1, dashboard=None)) as client,
        ):
            engine.invert(observation, here / "profiled.zarr", cluster=client, **settings)
    spent, total = seconds_by_part(profile)
    table = Table(title="Time in tiles, by a profiler, in one process")
    for heading in ("what", "share", "ms per 1,000 pixels"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    measured = pixels - options.tile**2
    named = sum(seconds for part, seconds in spent.items() if not part.startswith(" "))
    for part, seconds in {**spent, "the rest": total - named}.items():
        table.add_row(part, f"{100 * seconds / total:.1f} %", f"{1e6 * seconds / measured:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
