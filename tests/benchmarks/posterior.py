"""Pixels per second of the posterior at equal accuracy, as ratios against the published way, in one run.

The reference draws as the authors' tool does: FrEIA's network, two pixels a call, an inverse and a forward
pass for every one of 128 Gaussian draws, median and median absolute deviation in NumPy. Beside it stand the
same weights drawn by `inn.posterior_quantiles`, the recommended network, and a coupling flow of zuko with the
recommended network's sizes. All answer observations of the bundled grid's test part. Each is measured in one
process with all threads, and in a process for each core, as the map engine runs; the better one counts.

What draws cost means little without what they are worth. The quantile error is that of `inn.sampling`: root
mean square, over pixels, heights and quantities, of estimated minus true quantiles at 5, 50 and 95 %, in
units of half the distance between the true 16 and 84 % quantiles; the truth is 65,536 draws of the same
network. Numbers with two states far apart, whose 5 or 95 % quantile no number of draws finds, are left out of
the first table and are in the second one. The draws that a network needs are the fewest whose error is not
above that of 128 Gaussian draws, of the reference and of the network itself.

The ceiling is what a machine would reach that did nothing but the matrix products: random matrices of the
very same sizes and precision, multiplied as often, in the same run. Where there is a CUDA device, both
networks stand in the table once more, on it (those rows have never been filled).

The preview draws nothing; its error is how far its quantiles are from those of the same 65,536 draws.

Run with ``make bench``; ``--seconds`` bounds each measurement of speed.
"""

import argparse
import json
import math
import multiprocessing
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
from inn.posterior import BATCH_ROWS
from inn.precision import multiplies_bfloat16
from inn.preview import preview_quantiles
from inn.sampling import error_curves, precision_error, quantile_errors
from inn.scaling import scale_atmosphere
from pipeline.grids.store import BUNDLED_GRID
from pipeline.training_set import open_parts
from tests.benchmarks.training import peak, products

WIDTH = 384
DRAWS = 128
TRUTH_DRAWS = 65536
LADDER = (16, 32, 48, 64, 96, 128, 256, 512)
LEVELS = (0.05, 0.16, 0.5, 0.84, 0.95)
LOW, HIGH = 1, 3

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


def preview_error(model: nn.Module, observed: Observed, truth_draws: int) -> float:
    """Error of the preview's quantiles, against the sampled posterior."""

    def answer(draws: int, seed: int, kind: str, levels: Sequence[float]) -> Array:
        if draws > 1:
            found = ours(model, observed, draws=draws, seed=seed, latent=kind, quantiles=levels)
        else:
            found = preview_quantiles(model, *observed, quantiles=levels)
        return scale_atmosphere(*(found[quantity].astype(np.float64) for quantity in QUANTITIES))

    found = error_curves(answer, kinds=("sobol",), ladder=(1,), seeds=1, truth_draws=truth_draws)
    return found.curves["sobol"][1]


def draws_needed(errors: Mapping[int, float], wanted: float) -> int | None:
    """Fewest draws whose error is not above the one wanted; None if there are none."""
    return min((draws for draws, error in errors.items() if error <= wanted), default=None)


def error_table(title: str, curves: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Table:
    """Quantile error by draws."""
    ladder = sorted({draws for kinds in curves.values() for errors in kinds.values() for draws in errors})
    table = Table(title=title)
    for heading in ("network", "draws of kind", *map(str, ladder)):
        table.add_column(heading, justify="left" if heading in ("network", "draws of kind") else "right")
    for name, kinds in curves.items():
        for row, (kind, errors) in enumerate(kinds.items()):
            shown = (f"{errors[draws]:.3f}" if draws in errors else "" for draws in ladder)
            table.add_row("" if row else name, kind, *shown, end_section=row == len(kinds) - 1)
    return table


# Speed


@dataclass(frozen=True)
class Job:
    """What is timed; a process makes its own.

    Attributes
    ----------
    what : {"reference", "published", "recommended", "preview", "zuko"}
    pixels : int
        In one call: whole batches, so that nothing is computed to fill one up.
    draws, latent, precision
        As for `inn.posterior_quantiles`.
    device : str
    joint : Path or None
        A trained joint network in place of random weights.
    """

    what: str
    pixels: int
    draws: int
    latent: str
    precision: str = "float32"
    device: str = "cpu"
    joint: Path | None = None

    def work(self) -> Callable[[], object]:
        """Make what is timed."""
        observed = observations(min(self.pixels, 256)).first(self.pixels)
        if self.what == "zuko":
            flow = ZukoPosterior(inn.load_model()).eval()
            return partial(flow.quantiles, observed, draws=self.draws)
        if self.what == "preview":
            return partial(preview_quantiles, inn.load_model(), *observed)
        if self.what == "recommended":
            model: nn.Module = inn.load_model()
        else:
            model = random_joint() if self.joint is None else inn.load_model(self.joint)
        if self.what == "reference":
            assert isinstance(model, JointNetwork)
            return partial(reference, freia_network(model), observed.lines)
        settings = {"draws": self.draws, "latent": self.latent, "precision": self.precision}
        return partial(ours, model.to(self.device), observed, **settings)


def pixels_per_second(work: Callable[[], object], pixels: int, threads: int, seconds: float) -> float:
    """Rate of `work`, after one call to warm up; the best of the repeats."""
    torch.set_num_threads(threads)
    work()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or best == 0.0:
        start = time.perf_counter()
        work()
        best = max(best, pixels / (time.perf_counter() - start))
    return best


def _alone(job: Job, seconds: float, barrier: Any, answers: Any) -> None:
    """Work in a process of its own, with one thread, while others do the same."""
    torch.set_num_threads(1)
    work = job.work()
    work()
    barrier.wait()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or best == 0.0:
        start = time.perf_counter()
        work()
        best = max(best, job.pixels / (time.perf_counter() - start))
    answers.put(best)


def pixels_per_second_of_processes(job: Job, processes: int, seconds: float) -> float:
    """Rate of as many processes at once, one thread each: the sum of their best."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=_alone, args=(job, seconds, barrier, answers)) for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    rate = sum(answers.get() for _ in workers)
    for worker in workers:
        worker.join()
    return float(rate)


@dataclass(frozen=True)
class Speed:
    """One line of the table: draws, their error, and what they cost."""

    what: str
    draws: int
    latent: str
    error: float
    ran: str
    rate: float
    operations: float
    """Floating-point operations of the matrix products, per pixel."""
    peak: float
    """Operations per second of the same products alone."""

    @property
    def ceiling(self) -> float:
        """Pixels per second if the products were all."""
        return self.peak / self.operations


def speed(what: str, job: Job, seconds: float, error: float) -> Speed:
    """Measure a job in one process and in one for each core, and the products it consists of."""
    cores = os.cpu_count() or 1
    work = job.work()
    rates = {f"{cores} threads": pixels_per_second(work, job.pixels, cores, seconds)}
    if job.device == "cpu" and cores > 1:
        rates[f"{cores} processes"] = pixels_per_second_of_processes(job, cores, seconds)
    ran = max(rates, key=rates.__getitem__)
    torch.set_num_threads(1 if ran.endswith("processes") else cores)
    operations, sizes = products(work)
    highest = peak(sizes, torch.device(job.device), seconds) * (cores if ran.endswith("processes") else 1)
    return Speed(what, job.draws, job.latent, error, ran, rates[ran], operations / job.pixels, highest)


def whole_batches(draws: int, pixels: int) -> int:
    """About so many pixels, in whole batches."""
    batch = max(1, BATCH_ROWS // draws)
    return batch * max(1, round(pixels / batch))


def speed_table(speeds: Sequence[Speed]) -> Table:
    """Rates, as ratios over the first."""
    table = Table(title="Speed (the first row is the reference)")
    for heading in (
        "what", "draws", "error", "ran in", "pixels/s", "over the reference", "MFLOP/pixel", "GFLOP/s",
        "peak, same sizes", "share of it", "ceiling over the reference",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for each in speeds:
        achieved = each.rate * each.operations
        table.add_row(
            each.what,
            f"{each.draws} {each.latent}",
            f"{each.error:.3f}",
            each.ran,
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
    flow = ZukoPosterior(recommended).eval()

    torch.set_num_threads(os.cpu_count() or 1)
    measuring: dict[str, Any] = {
        "seeds": options.seeds, "truth_draws": options.truth_draws, "ladder": LADDER
    }  # fmt: skip
    errors = {
        "published": quantile_errors(joint, *observed.first(options.joint_pixels), **measuring),
        "recommended": quantile_errors(recommended, *observed, **measuring),
        "zuko": error_curves(
            lambda draws, seed, _, levels: flow.quantiles(observed, draws, seed, tuple(levels)),
            kinds=("gaussian",),
            truth_kind="gaussian",
            **measuring,
        ),
    }
    console = Console(width=170)
    unit = "quantile error (5, 50 and 95 %) over the posterior's own spread"
    console.print(
        error_table(f"{unit}, without two states far apart", {n: e.curves for n, e in errors.items()})
    )
    console.print("left out: " + ", ".join(f"{n} {100 * (1 - e.scored):.1f} %" for n, e in errors.items()))
    console.print(error_table(f"{unit}, all numbers", {n: e.all_curves for n, e in errors.items()}))
    changed = {
        "published": precision_error(joint, *observed.first(options.joint_pixels)),
        "recommended": precision_error(recommended, *observed),
    }
    console.print(
        "change by products in bfloat16, in the same units: "
        + ", ".join(f"{name} {change:.4f}" for name, change in changed.items())
    )

    known = errors["published"].curves["gaussian"][DRAWS]
    speeds = [
        speed(
            "FrEIA, two pixels a call, round trips",
            Job("reference", 8, DRAWS, "gaussian", joint=options.joint), options.seconds, known,
        )
    ]  # fmt: skip
    half = multiplies_bfloat16("cpu")
    places = [("published", 42, "cpu", half), ("recommended", 512, "cpu", half)]
    if torch.cuda.is_available():
        places += [
            (name, pixels, "cuda", True) for name, pixels in (("published", 4096), ("recommended", 32768))
        ]
    for name, pixels, device, halves in places:
        # No worse than the reference, and no worse than its number of draws would be here.
        curves = errors[name].curves
        wanted = min(known, curves["gaussian"][DRAWS])
        chosen = {(DRAWS, "gaussian", "float32")}
        for kind, by_draws in curves.items():
            if (needed := draws_needed(by_draws, wanted)) is not None:
                chosen.add((needed, kind, "float32"))
        if halves:
            fewest = min(chosen - {(DRAWS, "gaussian", "float32")}, default=(DRAWS, "gaussian", "float32"))
            chosen.add((fewest[0], fewest[1], "bfloat16"))
        for draws, kind, precision in sorted(chosen, reverse=True):
            error = curves[kind][draws]
            if precision == "bfloat16":  # independent errors
                error = math.hypot(error, changed[name])
            speeds.append(
                speed(
                    f"{name} network" + (", one GPU" if device == "cuda" else "")
                    + (", bfloat16 products" if precision == "bfloat16" else ""),
                    Job(name, whole_batches(draws, pixels), draws, kind, precision, device, options.joint),
                    options.seconds, error,
                )
            )  # fmt: skip
    if recommended.preview is not None:
        speeds.append(
            speed(
                "preview of the recommended network", Job("preview", 8192, 0, "none"), options.seconds,
                preview_error(recommended, observed, options.truth_draws),
            )
        )  # fmt: skip
    speeds.append(
        speed(
            "zuko, the recommended network's sizes", Job("zuko", 128, DRAWS, "gaussian"), options.seconds,
            errors["zuko"].curves["gaussian"][DRAWS],
        )
    )  # fmt: skip
    console.print(speed_table(speeds))
    if options.output is not None:
        written = {
            "errors": {name: error.to_json() for name, error in errors.items()},
            "bfloat16": changed,
            "speeds": [asdict(each) for each in speeds],
        }
        options.output.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
