"""What each way of making the posterior faster pays, against the present one, in one run.

    python -m tests.benchmarks.levers [--seconds N] [--model MODEL]

Rows per batch, threads, one sort against partitioning or torch's own quantiles, products in bfloat16, and
torch's compiler. Each is measured on the recommended network (or MODEL) and observations of the bundled
grid's test part, and beside the speed stands what it does to the quantiles: the largest change and the root
mean square, in units of each posterior's spread.

The published network's time goes into its products alone. A second table has what could be done about these:
other precisions, the two first products of a block's scale and shift as one, what does not depend on the
pixel once for all of them, and the columns that are zero left out.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import inn
from inn.latent import draw_latent
from inn.layout import QUANTITIES
from inn.posterior import compile_draws
from inn.scaling import scale_atmosphere
from tests.benchmarks.posterior import (
    HIGH,
    LEVELS,
    LOW,
    WIDTH,
    Array,
    Observed,
    observations,
    random_joint,
)

LATENT = 150
ROWS = (1024, 2048, 4096, 8192, 16384)


def quantiles(model: torch.nn.Module, observed: Observed, **settings: Any) -> Array:
    """Quantiles in network units."""
    found = inn.posterior_quantiles(
        model, observed.lines, observed.mu, observed.calibration_error, **settings
    )
    return scale_atmosphere(*(found[quantity] for quantity in QUANTITIES))


def best_seconds(work: Callable[[], object], seconds: float) -> float:
    """Best time of the repeats, after one to warm up."""
    work()
    best, end = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or best == np.inf:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def change(found: Array, present: Array) -> tuple[float, float]:
    """Root mean square and largest change of quantiles, in units of the posterior's spread."""
    spread = 0.5 * (present[:, HIGH] - present[:, LOW])[:, None]
    relative = np.abs(found - present) / spread
    return float(np.sqrt(np.mean(relative**2))), float(relative.max())


def ways_to_quantiles(pixels: int, draws: int) -> dict[str, Callable[[], object]]:
    """Ways from draws (pixels, numbers, draws) to quantiles; the present one first."""
    generator = np.random.default_rng(0)
    drawn = generator.standard_normal((pixels, 150, draws)).astype(np.float32)
    positions = np.array(LEVELS) * (draws - 1)
    wanted = sorted({int(place) for place in (*np.floor(positions), *np.ceil(positions))})
    tensor, levels = torch.from_numpy(drawn), torch.tensor(LEVELS)
    weights = torch.from_numpy(generator.random((draws, len(LEVELS))).astype(np.float32))

    def smoothed() -> object:
        return torch.from_numpy(np.sort(drawn, axis=-1)) @ weights

    return {
        "NumPy sort": lambda: np.sort(drawn, axis=-1),
        "NumPy sort, then a product (smoothed quantiles)": smoothed,
        "NumPy partition": lambda: np.partition(drawn, wanted, axis=-1),
        "torch sort": lambda: tensor.sort(dim=-1),
        "torch quantile": lambda: torch.quantile(tensor, levels, dim=-1),
    }


def published_products(seconds: float, rows: int = 4096) -> Table:
    """Times of the published network's products, as they are and as they might be."""
    wide, half = WIDTH, WIDTH // 2
    values = torch.randn(rows, wide)
    hidden, first = nn.Linear(wide, wide), nn.Linear(half, wide)
    both = nn.Linear(half, 2 * wide)
    nonzero = nn.Linear(LATENT, wide)  # of a first half: latent and padding
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(hidden)), {nn.Linear})
    joint = random_joint()
    lines = torch.rand(16, joint.layout.lines_size)
    latent = draw_latent(rows // 16, joint.latent_size, 0)
    pairs = lines.repeat_interleave(len(latent), dim=0), latent.repeat(len(lines), 1)

    def in_type(layer: nn.Linear, dtype: torch.dtype) -> Callable[[], object]:
        layer, some = copy.deepcopy(layer).to(dtype), values[:, : layer.in_features].to(dtype)
        return lambda: layer(some)

    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "hidden product in bfloat16": (in_type(hidden, torch.float32), in_type(hidden, torch.bfloat16)),
        "hidden product in float16": (in_type(hidden, torch.float32), in_type(hidden, torch.float16)),
        "hidden product in 8-bit integers (dynamic)": (
            in_type(hidden, torch.float32),
            lambda: quantized(values),
        ),
        "first products of scale and shift as one": (
            lambda: (first(values[:, :half]), first(values[:, :half])),
            lambda: both(values[:, :half]),
        ),
        "zeros of the first half left out of one": (
            in_type(first, torch.float32),
            in_type(nonzero, torch.float32),
        ),
        "whole inverse: first half-step once for all pixels": (
            lambda: joint.inverse(*pairs),
            lambda: joint.inverse_draws(lines, latent),
        ),
    }
    table = Table(title=f"Products of the published network, {rows:,} rows, 1 thread")
    for heading in ("what", "ms as it is", "ms so", "over", "relative error"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    with torch.inference_mode():
        for what, (plain, other) in ways.items():
            before, after = best_seconds(plain, seconds), best_seconds(other, seconds)
            exact, found = plain(), other()
            error = ""
            if "in " in what and isinstance(exact, torch.Tensor) and isinstance(found, torch.Tensor):
                error = f"{float((found.float() - exact).norm() / exact.norm()):.1e}"
            table.add_row(what, f"{1e3 * before:.2f}", f"{1e3 * after:.2f}", f"{before / after:.2f} x", error)
    return table


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each measurement")
    parser.add_argument("--model", type=Path, help="a model directory; the bundled one if left out")
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--pixels", type=int, default=512)
    options = parser.parse_args()
    model = inn.load_model(options.model)
    observed = observations(256).first(options.pixels)
    plain = partial(quantiles, model, observed, draws=options.draws)
    cores = os.cpu_count() or 1

    table = Table(title=f"{options.draws} draws of {options.pixels} pixels")
    for heading in ("what", "pixels/s", "over the present", "RMS change", "largest change"):
        table.add_column(heading, justify="left" if heading == "what" else "right")

    torch.set_num_threads(1)
    present = plain()
    base = best_seconds(plain, options.seconds)

    def row(what: str, work: Callable[[], Array]) -> None:
        taken = best_seconds(work, options.seconds)
        mean, most = change(work(), present)
        table.add_row(
            what, f"{options.pixels / taken:,.0f}", f"{base / taken:.2f} x", f"{mean:.2g}", f"{most:.2g}"
        )

    table.add_row("present, 1 thread", f"{options.pixels / base:,.0f}", "1.00 x", "", "")
    for rows in ROWS:
        row(f"{rows:,} rows a batch", partial(plain, batch_rows=rows))
    row("products in bfloat16", partial(plain, precision="bfloat16"))
    row("present again", plain)
    if cores > 1:
        torch.set_num_threads(cores)
        row(f"{cores} threads", plain)
        torch.set_num_threads(1)
    compiled = inn.load_model(options.model)
    compile_draws(compiled)
    quick = partial(quantiles, compiled, observed, draws=options.draws)
    started = time.perf_counter()
    try:
        quick()
    except torch._dynamo.exc.TorchDynamoException as failure:
        table.add_row(f"torch.compile does not work here: {str(failure).splitlines()[0][:60]}")
    else:
        row(f"torch.compile ({time.perf_counter() - started:.0f} s at first)", quick)
    console = Console(width=120)
    console.print(table)
    console.print(published_products(options.seconds))

    sorts = Table(title=f"From {options.draws} draws to quantiles, 1 thread")
    for heading in ("what", "ms a pixel", "over the present"):
        sorts.add_column(heading, justify="left" if heading == "what" else "right")
    taken = {
        what: best_seconds(work, options.seconds) / 64
        for what, work in ways_to_quantiles(64, options.draws).items()
    }
    first = next(iter(taken.values()))
    for what, seconds in taken.items():
        sorts.add_row(what, f"{1e3 * seconds:.3f}", f"{first / seconds:.2f} x")
    console.print(sorts)


if __name__ == "__main__":
    main()
