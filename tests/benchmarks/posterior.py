"""Pixels per second of the posterior at equal accuracy, as ratios against the published way, in one run.

The reference draws as the authors' tool does: FrEIA's network, two pixels a call, an inverse and a forward
pass for every one of 128 Gaussian draws, median and median absolute deviation in NumPy. Beside it stand the
same weights drawn by `inn.posterior_quantiles`, the recommended network, and a coupling flow of zuko with the
recommended network's sizes. All answer observations of the bundled grid's test part, and each has its best
number of threads.

What draws cost means little without what they are worth. The quantile error is the root mean square, over
pixels, heights and quantities, of estimated minus true quantiles at 5, 50 and 95 %, in units of half the
distance between the true 16 and 84 % quantiles; the truth is 65,536 draws of the same network. Where a
posterior has two states far apart and one of them holds about 5 %, that quantile lies in the gap between
them, where no number of draws finds it: numbers whose true 2 or 98 % quantile is more than ten such units
from the median are left out, and their share is printed. The draws that a network needs are the fewest whose
error is not above that of 128 Gaussian draws, of the reference and of the network itself.

The ceiling is what a machine would reach that did nothing but the matrix products: random matrices of the
very same sizes, multiplied as often, in the same run. Where there is a CUDA device, both networks stand in
the table once more, on it (those rows have never been filled).

Run with ``make bench``; ``--seconds`` bounds each measurement of speed.
"""

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import FrEIA.framework as framework
import FrEIA.modules as modules
import numpy as np
import torch
import zuko
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn

import inn
from inn.conditional import ConditionalNetwork
from inn.joint import JointNetwork
from inn.layout import QUANTITIES, Layout
from inn.scaling import scale_atmosphere
from pipeline.grids.store import BUNDLED_GRID
from pipeline.training_set import open_parts
from tests.benchmarks.training import peak, products

WIDTH = 384
DRAWS = 128
TRUTH_DRAWS = 65536
LADDER = (16, 32, 48, 64, 96, 128, 256, 512)
KINDS = ("gaussian", "sobol", "balanced")
LEVELS = (0.05, 0.16, 0.5, 0.84, 0.95)
SCORED = [0, 2, 4]
LOW, MEDIAN, HIGH = 1, 2, 3
TAILS = (0.02, 0.98)
FAR = 10.0

Array = NDArray[np.floating]


class Observed(NamedTuple):
    """Normalised lines (pixels, 60), mu (pixels,) and calibration error (pixels,), float32."""

    lines: Array
    mu: Array
    calibration_error: Array

    def first(self, count: int) -> "Observed":
        """The first pixels, again and again if there are not enough of them."""
        chosen = np.arange(count) % len(self.lines)
        return Observed(*(values[chosen] for values in self))


def observations(count: int, seed: int = 0) -> Observed:
    """Simulated observations of atmospheres that no training has seen."""
    part = open_parts(BUNDLED_GRID, Layout())["test"]
    batch = part.draw(count, torch.Generator().manual_seed(seed))
    return Observed(batch.lines.numpy(), batch.mu.numpy(), batch.calibration_error.numpy())


# The reference: FrEIA, two pixels a call


def published_subnet(inputs: int, outputs: int) -> nn.Module:
    """Three leaky ReLU layers, then ReLU, then linear: the paper's section 2, figure 2."""
    layers: list[nn.Module] = [nn.Linear(inputs, WIDTH), nn.LeakyReLU(0.01)]
    for activation in (nn.LeakyReLU(0.01), nn.LeakyReLU(0.01), nn.ReLU()):
        layers += [nn.Linear(WIDTH, WIDTH), activation]
    return nn.Sequential(*layers, nn.Linear(WIDTH, outputs))


def random_joint(seed: int = 0) -> JointNetwork:
    """The published architecture with random weights that mix all numbers, as training makes them do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = JointNetwork(Layout())
        with torch.no_grad():
            for name, values in network.named_parameters():
                if name.endswith("weight"):
                    nn.init.kaiming_normal_(values, nonlinearity="relu")
                if name.endswith("8.weight"):  # small exponents and shifts: ten of them follow one another
                    values.mul_(0.1)
    return network.eval()


def freia_network(joint: JointNetwork) -> framework.SequenceINN:
    """The published architecture in FrEIA, with the same weights."""
    state = np.random.get_state()  # noqa: NPY002 - FrEIA seeds the global generator
    network = framework.SequenceINN(WIDTH)
    for block in range(5):
        if block:
            network.append(modules.PermuteRandom, seed=block - 1)
        network.append(modules.RNVPCouplingBlock, subnet_constructor=published_subnet, clamp=2.0)
    np.random.set_state(state)  # noqa: NPY002
    own = network.state_dict()
    for name, values in joint.steps.named_parameters():
        index, subnet, rest = name.split(".", 2)
        own[f"module_list.{index}.subnet_{subnet}.{rest}"].copy_(values)
    network.eval()
    with torch.no_grad():
        rows = torch.randn(4, WIDTH)
        torch.testing.assert_close(network(rows, rev=True)[0], joint.inverse_padded(rows))
    return network


def reference(
    network: framework.SequenceINN, lines: Array, seed: int = 0, *, statistics: bool = True
) -> Array:
    """Two pixels a call, a round trip for every draw, statistics in NumPy.

    Returns
    -------
    ndarray, shape (pixels, levels, 150)
        Quantiles in network units; not `statistics`, that is, or nothing but the published median and median
        absolute deviation, shape (pixels, 2, 150).
    """
    generator = torch.Generator().manual_seed(seed)
    results = []
    for start in range(0, len(lines), 2):
        pair = torch.from_numpy(lines[start : start + 2])
        rows = torch.zeros(len(pair) * DRAWS, WIDTH)
        rows[:, :150] = torch.randn(len(rows), 150, generator=generator)
        rows[:, -60:] = pair.repeat_interleave(DRAWS, dim=0)
        with torch.no_grad():
            atmosphere, _ = network(rows, rev=True)
            network(atmosphere)
        drawn = atmosphere[:, :150].numpy().reshape(len(pair), DRAWS, 150)
        if statistics:
            median = np.median(drawn, axis=1)
            results.append(np.stack((median, np.median(np.abs(drawn - median[:, None]), axis=1)), axis=1))
        else:
            results.append(np.quantile(drawn, LEVELS, axis=1).swapaxes(0, 1))
    return np.concatenate(results)


# zuko: a coupling flow of the recommended network's sizes


class ZukoPosterior(nn.Module):
    """What the recommended network is made of, made of zuko's parts, with random weights.

    The context vector is computed once for each pixel, and only the leading components are drawn: the flow is
    all that is zuko's. Gaussian draws, as the library makes them.
    """

    def __init__(self, model: ConditionalNetwork) -> None:
        super().__init__()
        sizes = model.architecture()
        features = 2 * model.layout.lines_size + 2
        self.embed = zuko.nn.MLP(features, sizes["context"], [sizes["embedding"]] * 2)
        self.flow = zuko.flows.NICE(
            sizes["components"],
            sizes["context"],
            transforms=sizes["steps"],
            hidden_features=[sizes["hidden"]] * 2,
        )
        self.register_buffer("rotation", model.rotation[:, : sizes["components"]].T.clone())

    rotation: torch.Tensor

    def quantiles(
        self, observed: Observed, draws: int, seed: int = 0, levels: tuple[float, ...] = LEVELS
    ) -> Array:
        """Quantiles, shape (pixels, levels, 150)."""
        results = []
        size = max(1, 4096 // draws)
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed)
            for start in range(0, len(observed.lines), size):
                lines, mu, error = (torch.from_numpy(values[start : start + size]) for values in observed)
                features = (lines, lines.clamp_min(1e-3).log10(), mu[:, None], error[:, None])
                drawn = self.flow(self.embed(torch.cat(features, dim=-1))).sample((draws,)) @ self.rotation
                ordered = np.sort(drawn.permute(1, 2, 0).contiguous().numpy(), axis=-1)
                results.append(np.stack([_between(ordered, level) for level in levels], axis=1))
        return np.concatenate(results)


def _between(ordered: Array, level: float) -> Array:
    """A quantile of sorted draws (..., draws): linear between order statistics."""
    position = level * (ordered.shape[-1] - 1)
    below = math.floor(position)
    above = min(below + 1, ordered.shape[-1] - 1)
    return ordered[..., below] + (position - below) * (ordered[..., above] - ordered[..., below])


# Ours


def ours(model: nn.Module, observed: Observed, **settings: Any) -> dict[str, Array]:
    """Quantiles as the library gives them, in physical units."""
    return inn.posterior_quantiles(model, observed.lines, observed.mu, observed.calibration_error, **settings)


# Accuracy


class Truth(NamedTuple):
    """What estimates are held against.

    Attributes
    ----------
    quantiles : ndarray, shape (pixels, levels, numbers)
        Network units.
    scored : ndarray of bool, shape (pixels, numbers)
        Not where the posterior has two states far apart.
    """

    quantiles: Array
    scored: NDArray[np.bool_]

    @property
    def spread(self) -> Array:
        """Half the distance between the 16 and 84 % quantiles, shape (pixels, numbers)."""
        return 0.5 * (self.quantiles[:, HIGH] - self.quantiles[:, LOW])


def truth_of(quantiles: Array) -> Truth:
    """Take quantiles (pixels, levels and tails, numbers) of many draws for the truth."""
    found, tails = quantiles[:, : len(LEVELS)], quantiles[:, len(LEVELS) :]
    spread = 0.5 * (found[:, HIGH] - found[:, LOW])
    return Truth(found, (np.abs(tails - found[:, MEDIAN, None]) <= FAR * spread[:, None]).all(axis=1))


def quantile_error(found: Sequence[Array], truth: Truth) -> float:
    """Root mean square error at 5, 50 and 95 %, in units of the posterior's own spread.

    Parameters
    ----------
    found : sequence of ndarray, shape (pixels, levels, numbers)
        Estimates with several seeds, in network units.
    truth : Truth
    """
    errors = np.stack(found)[:, :, SCORED] - truth.quantiles[:, SCORED]
    relative = errors.swapaxes(1, 2)[..., truth.scored] / truth.spread[truth.scored]
    return float(np.sqrt(np.mean(np.square(relative))))


def draws_needed(errors: Mapping[int, float], wanted: float) -> int | None:
    """Fewest draws whose error is not above the one wanted; None if there are none."""
    return min((draws for draws, error in errors.items() if error <= wanted), default=None)


Answer = Callable[[int, int, str, tuple[float, ...]], Array]
"""Quantiles (pixels, levels, numbers) by draws, seed, kind of latent and levels."""


def answers(model: nn.Module, observed: Observed) -> Answer:
    """Quantiles of one of our networks, in network units."""

    def answer(draws: int, seed: int, latent: str, levels: tuple[float, ...]) -> Array:
        # Batches are filled up, which is dear for few pixels.
        rows = max(draws, min(4096, draws * len(observed.lines)))
        found = ours(
            model, observed, draws=draws, seed=seed, latent=latent, quantiles=levels, batch_rows=rows
        )
        return scale_atmosphere(*(found[quantity].astype(np.float64) for quantity in QUANTITIES))

    return answer


Curves = dict[str, dict[int, float]]
"""Quantile error by kind of latent and by number of draws."""


def error_curves(answer: Answer, kinds: Sequence[str], seeds: int, truth_draws: int) -> tuple[Curves, float]:
    """Quantile errors, and the share of numbers that is scored."""
    truth = truth_of(answer(truth_draws, 10**6, kinds[-1], LEVELS + TAILS))
    curves = {
        kind: {
            draws: quantile_error([answer(draws, seed, kind, LEVELS) for seed in range(seeds)], truth)
            for draws in LADDER
        }
        for kind in kinds
    }
    return curves, float(truth.scored.mean())


# Speed


def pixels_per_second(
    work: Callable[[Observed], object], observed: Observed, threads: int, seconds: float
) -> float:
    """Rate of `work`, after one call to warm up; the best of the repeats."""
    torch.set_num_threads(threads)
    work(observed)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or best == 0.0:
        start = time.perf_counter()
        work(observed)
        best = max(best, len(observed.lines) / (time.perf_counter() - start))
    return best


@dataclass(frozen=True)
class Speed:
    """One line of the table: draws, their error, and what they cost."""

    what: str
    draws: int
    latent: str
    error: float
    threads: int
    rate: float
    operations: float
    """Floating-point operations of the matrix products, per pixel."""
    peak: float
    """Operations per second of the same products alone."""

    @property
    def ceiling(self) -> float:
        """Pixels per second if the products were all."""
        return self.peak / self.operations


def speed(
    what: str,
    work: Callable[[Observed], object],
    observed: Observed,
    seconds: float,
    *,
    draws: int,
    latent: str,
    error: float,
    device: str = "cpu",
) -> Speed:
    """Measure `work` with one thread and with all, and the products it consists of."""
    rates = {
        threads: pixels_per_second(work, observed, threads, seconds)
        for threads in sorted({1, os.cpu_count() or 1})
    }
    threads = max(rates, key=rates.__getitem__)
    torch.set_num_threads(threads)
    operations, sizes = products(partial(work, observed))
    return Speed(
        what,
        draws,
        latent,
        error,
        threads,
        rates[threads],
        operations / len(observed.lines),
        peak(sizes, torch.device(device), seconds),
    )


def error_table(curves: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Table:
    """Quantile error by draws."""
    table = Table(title="Quantile error (5, 50 and 95 %) over the posterior's own spread")
    for heading in ("network", "draws of kind", *map(str, LADDER)):
        table.add_column(heading, justify="left" if heading in ("network", "draws of kind") else "right")
    for name, kinds in curves.items():
        for row, (kind, errors) in enumerate(kinds.items()):
            shown = (f"{errors[draws]:.3f}" if draws in errors else "" for draws in LADDER)
            table.add_row("" if row else name, kind, *shown, end_section=row == len(kinds) - 1)
    return table


def speed_table(speeds: Sequence[Speed]) -> Table:
    """Rates, as ratios over the first."""
    table = Table(title="Speed (the first row is the reference)")
    for heading in (
        "what", "draws", "error", "threads", "pixels/s", "over the reference", "MFLOP/pixel", "GFLOP/s",
        "peak, same sizes", "share of it", "ceiling over the reference",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for each in speeds:
        achieved = each.rate * each.operations
        table.add_row(
            each.what,
            f"{each.draws} {each.latent}",
            f"{each.error:.3f}",
            str(each.threads),
            f"{each.rate:,.1f}",
            f"{each.rate / speeds[0].rate:,.1f} x",
            f"{1e-6 * each.operations:,.1f}",
            f"{1e-9 * achieved:.1f}",
            f"{1e-9 * each.peak:.1f}",
            f"{100.0 * achieved / each.peak:.0f} %",
            f"{each.ceiling / speeds[0].rate:,.1f} x",
        )
    return table


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each measurement")
    parser.add_argument("--pixels", type=int, default=32, help="pixels that errors are measured on")
    parser.add_argument("--joint-pixels", type=int, default=4, help="the same, for the published network")
    parser.add_argument("--truth-draws", type=int, default=TRUTH_DRAWS, help="draws that are the truth")
    parser.add_argument("--seeds", type=int, default=6, help="times that each error is measured")
    parser.add_argument("--joint", type=Path, help="a trained joint network, in place of random weights")
    parser.add_argument("--output", type=Path, help="write what was measured here, as JSON")
    options = parser.parse_args()

    observed = observations(options.pixels)
    joint = random_joint() if options.joint is None else inn.load_model(options.joint)
    recommended = inn.load_model()
    freia = freia_network(joint)
    flow = ZukoPosterior(recommended).eval()

    torch.set_num_threads(os.cpu_count() or 1)
    truth_draws = options.truth_draws
    few = observed.first(options.joint_pixels)
    measured_on = {
        "published": (answers(joint, few), KINDS),
        "recommended": (answers(recommended, observed), KINDS),
        "zuko": (
            lambda draws, seed, _, levels: flow.quantiles(observed, draws, seed, levels),
            ("gaussian",),
        ),
    }
    curves: dict[str, Curves] = {}
    scored: dict[str, float] = {}
    for name, (answer, kinds) in measured_on.items():
        curves[name], scored[name] = error_curves(answer, kinds, options.seeds, truth_draws)
    console = Console(width=160)
    console.print(error_table(curves))
    console.print(
        "left out: " + ", ".join(f"{name} {100 * (1 - share):.1f} %" for name, share in scored.items())
    )

    def measured(what: str, work: Callable[[Observed], object], pixels: int, **told: object) -> Speed:
        return speed(what, work, observed.first(pixels), options.seconds, **told)

    known = curves["published"]["gaussian"][DRAWS]
    speeds = [
        measured(
            "FrEIA, two pixels a call, round trips",
            lambda block: reference(freia, block.lines), 8, draws=DRAWS, latent="gaussian", error=known,
        )
    ]  # fmt: skip
    places = [("published", joint, 64, "cpu"), ("recommended", recommended, 512, "cpu")]
    if torch.cuda.is_available():
        places += [
            (name, copy.deepcopy(model).to("cuda"), pixels, "cuda")
            for name, model, pixels in (("published", joint, 4096), ("recommended", recommended, 32768))
        ]
    for name, model, pixels, device in places:
        # No worse than the reference, and no worse than its number of draws would be here.
        wanted = min(known, curves[name]["gaussian"][DRAWS])
        chosen = {(DRAWS, "gaussian")}
        for kind, errors in curves[name].items():
            needed = draws_needed(errors, wanted)
            if needed is not None:
                chosen.add((needed, kind))
        for draws, kind in sorted(chosen, reverse=True):
            speeds.append(
                measured(
                    f"{name} network" + (", one GPU" if device == "cuda" else ""),
                    partial(ours, model, draws=draws, latent=kind), pixels,
                    draws=draws, latent=kind, error=curves[name][kind][draws], device=device,
                )
            )  # fmt: skip
    speeds.append(
        measured(
            "zuko, the recommended network's sizes", partial(flow.quantiles, draws=DRAWS), 128,
            draws=DRAWS, latent="gaussian", error=curves["zuko"]["gaussian"][DRAWS],
        )
    )  # fmt: skip
    console.print(speed_table(speeds))
    if options.output is not None:
        written = {"errors": curves, "scored": scored, "speeds": [asdict(each) for each in speeds]}
        options.output.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
