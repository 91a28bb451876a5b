"""Training steps per second of both recipes, and the share of the machine's matrix multiplication they reach.

A step is what training does in one: examples drawn and augmented, both directions of the joint network or the
flow's likelihood, gradients, the optimiser, the running average. Its floating-point operations are those of
its matrix products (torch's own counter, drawing included). The peak is measured in the same run, by
multiplying random matrices of the very sizes that a step multiplies, as often; a second one, of square
matrices of 2,048, says what the machine can do at best. All times are the best of many: on a machine that
does other work besides, they still mean something.

Run with ``make bench``; ``--seconds`` bounds each measurement.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from inn.training import Trainer
from pipeline.grids.store import BUNDLED_GRID
from pipeline.recipes import RECIPES, make_training

Size = tuple[int, int, int, int, torch.dtype]
"""Matrices (or 1), rows, inner length, columns of a product, and the precision of its factors."""

aten = torch.ops.aten
LARGE: Size = (1, 2048, 2048, 2048, torch.float32)


def math_shape(left: torch.Tensor, right: torch.Tensor) -> tuple[int, int, int, int]:
    """Matrices, rows, inner length and columns of a product."""
    return math.prod(left.shape[:-2]), left.shape[-2], left.shape[-1], right.shape[-1]


def operations_of(size: Size) -> int:
    """Floating-point operations of a product."""
    batch, rows, inner, columns, _ = size
    return 2 * batch * rows * inner * columns


def products(step: Callable[[], object]) -> tuple[int, Counter[Size]]:
    """Floating-point operations of a step's matrix products, and their sizes."""
    sizes: Counter[Size] = Counter()

    def counting(skipped: int) -> Callable[..., int]:
        def operations(*factors: torch.Tensor, **_: object) -> int:
            left, right = factors[skipped : skipped + 2]
            size = (*math_shape(left, right), left.dtype)
            sizes[size] += 1
            return operations_of(size)

        operations._get_raw = True  # the counter passes tensors on, not their shapes alone
        return operations

    # What is added to a product comes first in the arguments of these.
    formulae = {
        aten.mm: counting(0),
        aten.bmm: counting(0),
        aten.addmm: counting(1),
        aten.baddbmm: counting(1),
    }
    with FlopCounterMode(display=False, custom_mapping=formulae) as counter:
        step()
    return counter.get_total_flops(), sizes


def product_seconds(size: Size, device: torch.device, seconds: float) -> float:
    """Best time of one product of random matrices, one after the other as in a step."""
    batch, rows, inner, columns, dtype = size
    left, right = torch.randn(batch, rows, inner).to(dtype), torch.randn(batch, inner, columns).to(dtype)
    if batch == 1:
        left, right = left[0], right[0]
    left, right = left.to(device), right.to(device)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or best == math.inf:
        started = time.perf_counter()
        for _ in range(10):
            left @ right
        synchronise(device)
        best = min(best, (time.perf_counter() - started) / 10)
    return best


def peak(sizes: Counter[Size], device: torch.device, seconds: float) -> float:
    """Floating-point operations per second of products of these sizes, as often as they occur."""
    # One product of many sizes in the time of all: what matters is the sum.
    each = seconds / len(sizes)
    spent = sum(count * product_seconds(size, device, each) for size, count in sizes.items())
    return sum(operations_of(size) * count for size, count in sizes.items()) / spent


def synchronise(device: torch.device) -> None:
    """Wait for what the device still does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_seconds(trainer: Trainer, device: torch.device, seconds: float) -> float:
    """Best time of a step that does not end an epoch."""
    best, end = math.inf, time.perf_counter() + seconds
    while (time.perf_counter() < end or best == math.inf) and not trainer.finished:
        started = time.perf_counter()
        entry = trainer.step()
        synchronise(device)
        if entry is None:
            best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each measurement")
    parser.add_argument("--grid", type=Path, default=BUNDLED_GRID, help="the grid to train on")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    table = Table(title=f"Training on this machine ({device}, {torch.get_num_threads()} threads)")
    for heading in (
        "what", "examples a step", "steps/s", "GFLOP a step", "GFLOP/s", "same sizes' peak", "share of it",
        "large matrices' peak", "share of it",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "what" else "right")
    measured: set[str] = set()
    for name, recipe in RECIPES.items():
        training = make_training(recipe, options.grid, seed=0, device=device)
        for stage in training.stages:
            if stage in measured:  # all recipes' emulators are trained alike
                continue
            measured.add(stage)
            trainer = training.trainer(stage)
            for _ in range(2):  # allocations, and what is set up once
                trainer.step()
            operations, sizes = products(trainer.step)
            taken = step_seconds(trainer, device, options.seconds)
            # Right after, so that a machine that is shared is the same one for both.
            same = peak(sizes, device, options.seconds)
            large = operations_of(LARGE) / product_seconds(LARGE, device, 0.1 * options.seconds)
            rate = operations / taken
            table.add_row(
                f"{name}: {stage}",
                str(trainer.schedule.batch),
                f"{1.0 / taken:.2f}",
                f"{1e-9 * operations:.2f}",
                f"{1e-9 * rate:.1f}",
                f"{1e-9 * same:.1f}",
                f"{100.0 * rate / same:.0f} %",
                f"{1e-9 * large:.1f}",
                f"{100.0 * rate / large:.0f} %",
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
