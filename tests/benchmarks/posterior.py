"""Pixels per second of the posterior, as ratios against the published way of drawing it, in one run.

The reference draws as the authors' tool does: FrEIA's network, two pixels a call, an inverse and a forward
pass for every Gaussian draw, median and median absolute deviation in NumPy. It is given its best number of
threads.

Run with ``make bench``; ``--seconds`` bounds each measurement.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import FrEIA.framework as framework
import FrEIA.modules as modules
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import inn
from inn.joint import JointNetwork
from inn.layout import Layout

WIDTH = 384
DRAWS = 128


def published_subnet(inputs: int, outputs: int) -> nn.Module:
    """Three leaky ReLU layers, then ReLU, then linear: the paper's section 2, figure 2."""
    layers: list[nn.Module] = [nn.Linear(inputs, WIDTH), nn.LeakyReLU(0.01)]
    for activation in (nn.LeakyReLU(0.01), nn.LeakyReLU(0.01), nn.ReLU()):
        layers += [nn.Linear(WIDTH, WIDTH), activation]
    return nn.Sequential(*layers, nn.Linear(WIDTH, outputs))


def freia_network() -> framework.SequenceINN:
    """The published architecture in FrEIA, with random weights."""
    torch.manual_seed(0)
    network = framework.SequenceINN(WIDTH)
    for block in range(5):
        if block:
            network.append(modules.PermuteRandom, seed=block - 1)
        network.append(modules.RNVPCouplingBlock, subnet_constructor=published_subnet, clamp=2.0)
    return network.eval()


def reference(network: framework.SequenceINN, lines: np.ndarray) -> None:
    """Two pixels a call, a round trip for every draw, statistics in NumPy."""
    for start in range(0, len(lines), 2):
        pair = torch.from_numpy(lines[start : start + 2])
        rows = torch.zeros(len(pair) * DRAWS, WIDTH)
        rows[:, :150] = torch.randn(len(rows), 150)
        rows[:, -60:] = pair.repeat_interleave(DRAWS, dim=0)
        with torch.no_grad():
            atmosphere, _ = network(rows, rev=True)
            network(atmosphere)
        drawn = atmosphere[:, :150].numpy().reshape(len(pair), DRAWS, 150)
        median = np.median(drawn, axis=1)
        np.median(np.abs(drawn - median[:, None]), axis=1)


def pixels_per_second(work: Callable[[np.ndarray], object], block: int, seconds: float) -> float:
    """Rate of `work` on blocks of random profiles, after one block to warm up; the best of the repeats."""
    lines = np.random.default_rng(0).uniform(0.2, 1.0, (block, 60)).astype(np.float32)
    work(lines)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work(lines)
        best = max(best, block / (time.perf_counter() - start))
    return best


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each measurement")
    seconds = parser.parse_args().seconds
    cores = os.cpu_count() or 1

    rows: list[tuple[str, int, float]] = []
    freia = freia_network()
    for threads in sorted({1, cores}):
        torch.set_num_threads(threads)
        rate = pixels_per_second(lambda lines: reference(freia, lines), 8, seconds)
        rows.append((f"FrEIA, two pixels a call, round trips, {DRAWS} draws", threads, rate))
    best_reference = max(rate for _, _, rate in rows)

    torch.set_num_threads(cores)
    joint = JointNetwork(Layout()).eval()
    recommended = inn.load_model()
    for name, model, draws in (
        (f"published network, {DRAWS} draws", joint, DRAWS),
        (f"recommended network, {DRAWS} draws", recommended, DRAWS),
        ("recommended network, 256 draws (default)", recommended, 256),
    ):
        work = partial(inn.posterior_quantiles, model, mu=0.6, draws=draws)
        rate = pixels_per_second(work, 256, seconds)
        rows.append((name, cores, rate))

    table = Table(title="Posterior on this machine")
    for heading in ("what", "threads", "pixels/s", "over the reference"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, threads, rate in rows:
        table.add_row(name, str(threads), f"{rate:,.1f}", f"{rate / best_reference:,.1f} x")
    Console().print(table)


if __name__ == "__main__":
    main()
