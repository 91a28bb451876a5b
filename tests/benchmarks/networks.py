"""How good networks' posteriors are on fresh simulations, beside a lookup of the nearest profiles.

    python -m tests.benchmarks.networks MODEL FRESH.zarr --grid GRID.zarr [--joint MODEL] [--output NAME]

FRESH.zarr is a grid store of simulations that no part of training or choosing has seen: another seed of the
same design (``flarefield grid lightweaver FRESH.zarr --seed 1``). Each is observed once, as in training. All
methods answer the same observations, and are scored as `pipeline.validation` documents.

The lookup is the best that could be made of one: for each observation, the training simulations are observed
at its mu and with its calibration error, several times over, each time with other bulk velocities, and the
atmospheres of the k whose lines are nearest (least squares) are the posterior. Whether they are observed with
noise, and k, are those of the lowest CRPS on the grid's validation part, for each quantity by itself.

Printed, and written to NAME.json and NAME.png.
"""

import argparse
import copy
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from inn.calibration import LEVELS, crps
from inn.checkpoint import load_model, model_hash
from inn.layout import QUANTITIES, Layout
from pipeline.errors import InputError
from pipeline.progress import Progress
from pipeline.training_set import Augmentation, Batch, TrainingSet, content_hash, open_parts
from pipeline.validation import (
    CEILING,
    DRAWS,
    Answers,
    Scores,
    calibration_figure,
    fresh_observations,
    judge,
    posteriors,
    prior,
    resampled_mean,
    score,
    scored_heights,
)

NEIGHBOURS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NOISELESS = 1e-6

Array = NDArray[np.float64]


def nearest(
    library: TrainingSet, observed: Batch, count: int, *, copies: int = 2, noisy: bool = True, seed: int = 0
) -> Iterator[NDArray[np.float32]]:
    """Atmospheres of the library's simulations whose lines are nearest to each observation's.

    Parameters
    ----------
    library : TrainingSet
    observed : Batch
    count : int
        Neighbours of each observation.
    copies : int
        Times that every simulation is observed, each time with another bulk velocity and noise.
    noisy : bool
        Whether the library's lines are noisy as the observations are.
    seed : int

    Yields
    ------
    ndarray, shape (count, atmosphere_size)
        Nearest first, network units; one observation after the other.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = torch.arange(len(library)).repeat(copies)
    # What an observation adds is drawn when it is made, so that it may differ from one to the next.
    observer = copy.copy(library)
    for lines, mu, error in zip(observed.lines, observed.mu, observed.calibration_error, strict=True):
        observer.augmentation = replace(
            library.augmentation,
            calibration_error=(float(error), float(error)),
            noise=library.augmentation.noise if noisy else (NOISELESS, NOISELESS),
        )
        made = observer.observe(samples, mu.expand(samples.numel()), generator)
        distance = (made.lines - lines).square().sum(dim=-1)
        yield made.atmosphere[distance.topk(count, largest=False).indices].numpy()


@dataclass(frozen=True)
class Choice:
    """A lookup's settings for one quantity, and its CRPS on the validation part."""

    neighbours: int
    noisy: bool
    crps: float


def choose(
    library: TrainingSet, held_out: Batch, layout: Layout, copies: int, seed: int
) -> dict[str, Choice]:
    """Settings of the lookup that are best on held-out observations, for each quantity."""
    counts = [count for count in NEIGHBOURS if count <= len(library) * copies]
    truth = held_out.atmosphere.numpy()
    scored = scored_heights(truth, layout)
    best: dict[str, Choice] = {}
    for noisy in (True, False):
        found = nearest(library, held_out, counts[-1], copies=copies, noisy=noisy, seed=seed)
        scores = np.zeros((len(counts), truth.shape[1]))
        for row, ensemble in enumerate(found):
            for number, count in enumerate(counts):
                scores[number] += crps(ensemble[None, :count], truth[row : row + 1])[0] / len(truth)
        means = scores.reshape(len(counts), len(QUANTITIES), -1)
        for place, quantity in enumerate(QUANTITIES):
            of_counts = means[:, place, scored[place]].mean(axis=1)
            least = int(of_counts.argmin())
            if quantity not in best or of_counts[least] < best[quantity].crps:
                best[quantity] = Choice(counts[least], noisy, float(of_counts[least]))
    return best


def lookup(
    library: TrainingSet, observed: Batch, choices: dict[str, Choice], copies: int, seed: int
) -> Answers:
    """Answers of the chosen lookups: each quantity from its own number of neighbours."""
    truth = observed.atmosphere.numpy()
    ranks, scores = np.empty(truth.shape), np.empty(truth.shape)
    heights = truth.shape[1] // len(QUANTITIES)
    for setting in {(choice.neighbours, choice.noisy) for choice in choices.values()}:
        found = nearest(library, observed, setting[0], copies=copies, noisy=setting[1], seed=seed)
        answers = judge(found, truth, seed)
        for place, quantity in enumerate(QUANTITIES):
            if (choices[quantity].neighbours, choices[quantity].noisy) == setting:
                columns = slice(place * heights, (place + 1) * heights)
                ranks[:, columns] = answers.ranks[:, columns]
                scores[:, columns] = answers.crps[:, columns]
    return Answers(ranks, scores)


def relative_crps(
    first: Answers, other: Answers, scored: NDArray[np.bool_], simulation: NDArray[np.generic], seed: int
) -> tuple[Array, Array]:
    """CRPS of the first answers over the others' for each quantity, and its sampling error.

    Both answer the same observations, so that what makes one harder than another mostly cancels.
    """
    ratio, error = np.empty((2, len(QUANTITIES)))
    heights = scored.shape[1]
    for row in range(len(QUANTITIES)):
        columns = row * heights + np.flatnonzero(scored[row])
        own, others = (answers.crps[:, columns].mean(axis=1) for answers in (first, other))
        ratio[row] = own.mean() / others.mean()
        # The ratio's error to first order is that of the mean of these.
        departures = (own - ratio[row] * others) / others.mean()
        _, spread = resampled_mean(departures[:, None], simulation, np.random.default_rng(seed))
        error[row] = spread[0]
    return ratio, error


def check_fresh(fresh: Batch, grid: dict[str, TrainingSet], path: Path) -> None:
    """Raise if the fresh grid holds an atmosphere that the network or the lookup was made with."""

    def rows(atmosphere: torch.Tensor) -> set[bytes]:
        # Densities and temperatures: a bulk velocity leaves them as they are.
        return {row.tobytes() for row in atmosphere[:, : 2 * atmosphere.shape[1] // 3].numpy()}

    known = rows(torch.cat([grid[part].atmospheres() for part in ("train", "validation")]))
    shared = known & rows(fresh.atmosphere)
    if shared:
        raise InputError(
            "the fresh grid holds simulations that were trained on",
            where=path,
            found=f"{len(shared)} atmospheres of the training grid's",
            remedy="make one with another seed: flarefield grid lightweaver FRESH.zarr --seed 1",
        )


def table(scores: dict[str, Scores], ratios: dict[str, tuple[Array, Array]]) -> Table:
    """All methods' scores; coverage and ranks where they mean something."""
    first = next(iter(scores.values()))
    shown = Table(title=f"{first.observations:,} observations of {first.simulations:,} fresh simulations")
    for heading in ("method", "quantity", *(f"{100 * level:.0f} %" for level in LEVELS)):
        shown.add_column(
            heading, justify="left" if heading in ("method", "quantity") else "right", no_wrap=True
        )
    for heading in ("uniform ranks", "CRPS", "the first's over it"):
        shown.add_column(heading, justify="right")
    for name, each in scores.items():
        for row, quantity in enumerate(QUANTITIES):
            ratio = ratios.get(name)
            shown.add_row(
                name if row == 0 else "",
                quantity.replace("_", " "),
                *(
                    f"{100 * share:.1f} ± {100 * error:.1f}"
                    for share, error in zip(each.mean_coverage[row], each.coverage_error[row], strict=True)
                ),
                f"{100 * each.uniform[row]:.0f} % of {each.scored[row].sum()}",
                f"{each.mean_crps[row]:.4f} ± {each.crps_error[row]:.4f}",
                "" if ratio is None else f"{ratio[0][row]:.3f} ± {ratio[1][row]:.3f}",
                end_section=row == len(QUANTITIES) - 1,
            )
    return shown


def main() -> None:
    """Score, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the recommended network")
    parser.add_argument("fresh", type=Path, help="a grid store of fresh simulations")
    parser.add_argument("--grid", type=Path, required=True, help="the grid that was trained on")
    parser.add_argument("--joint", type=Path, help="the joint network, or any other")
    parser.add_argument("--observations", type=int, help="score no more than these; all if left out")
    parser.add_argument("--held-out", type=int, default=300, help="observations that choose the lookup")
    parser.add_argument("--draws", type=int, default=DRAWS, help="posterior draws for each observation")
    parser.add_argument("--copies", type=int, default=2, help="times the lookup observes each simulation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("networks"), help="NAME of .json and .png")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    networks = {"recommended network": load_model(options.model)}
    if options.joint is not None:
        networks["joint network"] = load_model(options.joint)
    layout = networks["recommended network"].layout
    for path, network in zip((options.model, options.joint), networks.values(), strict=False):
        if network.layout != layout:
            raise InputError(
                "the networks do not take the same observations", where=path, found=network.layout,
                expected=layout,
            )  # fmt: skip
    augmentation = Augmentation()
    parts = open_parts(options.grid, layout, augmentation)
    fresh, simulation = fresh_observations(options.fresh, layout, augmentation, seed=options.seed)
    fresh = Batch(*(values[: options.observations] for values in fresh))
    simulation = simulation[: options.observations]
    check_fresh(fresh, parts, options.fresh)
    truth = fresh.atmosphere.numpy()

    def judged(ensembles: Iterator[NDArray[np.floating]], name: str) -> Answers:
        with Progress(name, len(truth), "observations") as progress:

            def counted() -> Iterator[NDArray[np.floating]]:
                for ensemble in ensembles:
                    yield ensemble
                    progress.advance(1)

            return judge(counted(), truth, options.seed)

    answers = {
        name: judged(posteriors(network, fresh, options.draws, options.seed), name)
        for name, network in networks.items()
    }
    generator = torch.Generator().manual_seed(options.seed + 1)
    validation = parts["validation"].draw_each(generator)
    held_out = Batch(*(values[: options.held_out] for values in validation))
    choices = choose(parts["train"], held_out, layout, options.copies, options.seed)
    answers["nearest profiles"] = lookup(parts["train"], fresh, choices, options.copies, options.seed)
    drawn = parts["train"].draw(32 * options.draws, generator).atmosphere.numpy()
    unconditional = prior(drawn, len(truth), options.draws, options.seed)
    answers["training atmospheres"] = judged(unconditional, "training atmospheres")

    scores = {name: score(each, truth, simulation, layout, options.seed) for name, each in answers.items()}
    first = scores["recommended network"]
    ratios = {
        name: relative_crps(
            answers["recommended network"], each, first.scored, simulation, options.seed
        )
        for name, each in answers.items()
        if name != "recommended network"
    }  # fmt: skip
    console = Console(width=140)
    console.print(table(scores, ratios))
    for row, quantity in enumerate(QUANTITIES):
        choice = choices[quantity]
        left_out = first.heights[~first.scored[row] & (first.heights <= CEILING)]
        console.print(
            f"{quantity.replace('_', ' ')}: not scored at {np.round(left_out, 2).tolist()} Mm; "
            f"the lookup takes {choice.neighbours} neighbours, {'with' if choice.noisy else 'without'} noise",
            highlight=False,
        )
    console.print(
        f"largest departure of the recommended network's coverage: {100 * first.worst:.1f} points; "
        f"ranks uniform in {100 * first.uniform_overall:.1f} % of {first.scored.sum()} (quantity, height)",
        highlight=False,
    )
    written = {
        "model": {"path": str(options.model), "sha256": model_hash(options.model)},
        "fresh": {"path": str(options.fresh), "sha256": content_hash(options.fresh)},
        "grid": {"path": str(options.grid), "sha256": content_hash(options.grid)},
        "draws": options.draws,
        "seed": options.seed,
        "lookup": {name: vars(choice) for name, choice in choices.items()} | {"copies": options.copies},
        "scores": {name: each.to_json() for name, each in scores.items()},
        "relative_crps": {
            name: {
                quantity: {"ratio": float(ratio[row]), "sampling_error": float(error[row])}
                for row, quantity in enumerate(QUANTITIES)
            }
            for name, (ratio, error) in ratios.items()
        },
    }
    if options.joint is not None:
        written["joint"] = {"path": str(options.joint), "sha256": model_hash(options.joint)}
    options.output.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")
    calibration_figure(scores).savefig(options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
