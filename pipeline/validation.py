"""Whether a network's posteriors can be believed: its answers to simulated observations, beside the truth.

Every simulation of a grid is observed once, as in training (one angle, noise, calibration error, sampling).
A posterior is *calibrated* if intervals of any probability hold the truth as often as they say, which ranks
of the truth among independent draws show (simulation-based calibration: Talts et al. 2018, arXiv:1804.06788),
and *sharp* if it is narrow as well, which the continuous ranked probability score rewards. All scores are in
network units: dex of electron density and temperature, sign(v) log10(|v| + 1) of the velocity in km/s.

Scores are averaged over the heights where there is something to infer: below `CEILING`, and where the grid's
own atmospheres differ by more than `LEAST_SPREAD`. Elsewhere the truth is one number for all of them (the
photosphere's temperature, for one), which the network is made not to resolve.
"""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import xarray as xr
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import binom, chisquare

from inn.calibration import LEVELS, crps, normalised_ranks
from inn.checkpoint import load_model
from inn.layout import QUANTITIES, Layout
from inn.posterior import Network, sample
from inn.scaling import scale_atmosphere
from pipeline.errors import InputError, MisuseError
from pipeline.figures import ACCENT, LOOKS, NAMES, STYLE, TRUE
from pipeline.grids.store import open_grid, split
from pipeline.provenance import flarefield_version
from pipeline.training_set import Augmentation, Batch, TrainingSet, content_hash

logger = logging.getLogger("flarefield")

Array = NDArray[np.float64]

CEILING = 3.0
"""Height (Mm) up to which scores are averaged: the lines say nothing about what lies above."""
LEAST_SPREAD = 0.02
"""Standard deviation (network units) of the grid's atmospheres from which on a height is scored: 5 % in
electron density and temperature, and the least that the recommended network resolves."""
BINS = 16
"""Equal bins of the ranks in the uniformity test."""
LEAST_EXPECTED = 5.0
"""Ranks expected in a bin below which the test's distribution is not to be relied on."""
SIGNIFICANCE = 0.01
"""Probability of the uniformity test below which ranks are called not uniform."""
FARTHEST = 38.0
"""Draws of a badly trained network overflow in physical units; they count as this far out (network units)."""
DRAWS = 255
REPEATS = 1000
"""Resamplings of the simulations, for the sampling error."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What is kept of the ensembles that answer observations.

    Attributes
    ----------
    ranks : ndarray, shape (observations, atmosphere_size)
        `inn.calibration.normalised_ranks` of the truth.
    crps : ndarray, shape (observations, atmosphere_size)
        Network units.
    """

    ranks: Array
    crps: Array


@dataclass(frozen=True, eq=False)
class Scores:
    """How good answers are, at each height and averaged over the heights that are scored.

    Attributes
    ----------
    heights : ndarray, shape (heights,)
        Mm.
    observations, simulations : int
    scored : ndarray of bool, shape (quantities, heights)
        Below `CEILING`, and where atmospheres differ by `LEAST_SPREAD` or more.
    spread : ndarray, shape (quantities, heights)
        Standard deviation of the true atmospheres, network units.
    coverage : ndarray, shape (quantities, heights, levels)
        Share of truths inside the central intervals of `inn.calibration.LEVELS`.
    histogram : ndarray of int, shape (quantities, heights, BINS)
        Ranks in each bin, of one observation from each simulation.
    probability : ndarray, shape (quantities, heights)
        Of ranks at least as uneven, were they uniform (chi-squared test of the histogram). NaN if there are
        too few simulations for it.
    crps : ndarray, shape (quantities, heights)
    mean_coverage, coverage_error : ndarray, shape (quantities, levels)
        Average over the scored heights, and its sampling error: the standard deviation over resampled
        simulations.
    uniform : ndarray, shape (quantities,)
        Share of the scored heights whose ranks pass the test at `SIGNIFICANCE`.
    mean_crps, crps_error : ndarray, shape (quantities,)
    """

    heights: Array
    observations: int
    simulations: int
    scored: NDArray[np.bool_]
    spread: Array
    coverage: Array
    histogram: NDArray[np.int64]
    probability: Array
    crps: Array
    mean_coverage: Array
    coverage_error: Array
    uniform: Array
    mean_crps: Array
    crps_error: Array

    @property
    def worst(self) -> float:
        """Largest departure of a quantity's mean coverage from what its interval states."""
        return float(np.abs(self.mean_coverage - np.array(LEVELS)).max())

    @property
    def uniform_overall(self) -> float:
        """Share of all scored (quantity, height) whose ranks pass the test."""
        return _share_uniform(self.probability[self.scored])

    def to_json(self) -> dict[str, Any]:
        """The scores as JSON holds them, NaN as None."""
        result: dict[str, Any] = {
            "observations": self.observations,
            "simulations": self.simulations,
            "ceiling_Mm": CEILING,
            "least_spread": LEAST_SPREAD,
            "significance": SIGNIFICANCE,
            "uniform": _number(self.uniform_overall),
            "largest_coverage_error": self.worst,
            "height_Mm": self.heights.tolist(),
        }
        for row, quantity in enumerate(QUANTITIES):
            below = self.heights <= CEILING
            result[quantity] = {
                "coverage": {
                    f"{level:.2f}": {"share": float(share), "sampling_error": float(error)}
                    for level, share, error in zip(
                        LEVELS, self.mean_coverage[row], self.coverage_error[row], strict=True
                    )
                },
                "uniform": _number(self.uniform[row]),
                "crps": {"mean": float(self.mean_crps[row]), "sampling_error": float(self.crps_error[row])},
                "heights_left_out_Mm": self.heights[below & ~self.scored[row]].tolist(),
                "by_height": {
                    "scored": self.scored[row].tolist(),
                    "spread": self.spread[row].tolist(),
                    "coverage": self.coverage[row].tolist(),
                    "ranks": self.histogram[row].tolist(),
                    "probability": [_number(value) for value in self.probability[row]],
                    "crps": self.crps[row].tolist(),
                },
            }
        return result


def fresh_observations(
    grid: str | Path,
    layout: Layout,
    augmentation: Augmentation | None = None,
    *,
    trained_on: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> tuple[Batch, NDArray[np.generic]]:
    """Observe every converged sample of a grid once, at an angle of its own, as training observes.

    Parameters
    ----------
    grid : path
        A grid store.
    layout : Layout
        The network's.
    augmentation : Augmentation, optional
        What an observation adds; training's default if left out.
    trained_on : mapping, optional
        What the network's record says of the grid it was trained on. If it is this one, or one of the same
        settings that may hold the same simulations, only those are observed that training kept aside for a
        test: a simulation's place in the split does not change as a grid grows.
    seed : int
        Seed of angles, noise and calibration errors.

    Returns
    -------
    Batch
        The observations, with their true atmospheres.
    simulation : ndarray, shape (observations,)
        The simulation each is of.

    Raises
    ------
    StoreError, InputError
        The grid cannot be used, or holds too little.
    """
    with open_grid(grid) as store:
        chosen = store["converged"].to_numpy().copy()
        if _shares_simulations(grid, store, trained_on or {}):
            logger.info("%s: the network was trained on such a grid; its test part alone is scored", grid)
            chosen &= split(store["simulation"].to_numpy()) == "test"
        samples = store.isel(sample=np.flatnonzero(chosen)).load()
    if np.unique(samples["simulation"].to_numpy()).size < 2:
        raise InputError(
            "the grid holds too little to score a network on",
            where=grid,
            found=f"{samples.sizes['sample']} converged samples that may be used",
            expected="two simulations or more; a thousand for a sampling error of a per cent or two",
        )
    examples = TrainingSet(samples, layout, augmentation)
    return examples.draw_each(torch.Generator().manual_seed(seed)), examples.simulation


def _shares_simulations(grid: str | Path, store: xr.Dataset, trained_on: Mapping[str, Any]) -> bool:
    settings = (store.attrs.get("made_from") or {}).get("settings")
    same = settings is not None and settings == trained_on.get("settings")
    return same or trained_on.get("sha256") == content_hash(grid)


def posteriors(model: Network, observed: Batch, draws: int = DRAWS, seed: int = 0) -> Iterator[Array]:
    """Independent draws of each observation's posterior.

    Parameters
    ----------
    model : Network
    observed : Batch
        `fresh_observations`.
    draws, seed : int
        Draws for each observation; each has Gaussian latents of its own.

    Yields
    ------
    ndarray, shape (draws, atmosphere_size)
        Network units, one observation after the other.
    """
    lines, mu, error = (
        values.numpy() for values in (observed.lines, observed.mu, observed.calibration_error)
    )
    for row in range(len(lines)):
        one = slice(row, row + 1)
        # A seed of its own for each observation, far from those of other runs.
        own = 1_000_003 * (seed + 1) + row
        drawn = sample(
            model, lines[one], mu[one], error[one], draws, own, latent="gaussian", batch_rows=draws
        )
        with np.errstate(divide="ignore"):
            scaled = scale_atmosphere(*(drawn[quantity][0].astype(np.float64) for quantity in QUANTITIES))
        yield np.clip(scaled, -FARTHEST, FARTHEST)


def judge(ensembles: Iterable[NDArray[Any]], truth: NDArray[Any], seed: int = 0) -> Answers:
    """Compare ensembles with truths.

    Parameters
    ----------
    ensembles : iterable of ndarray, shape (draws, atmosphere_size)
        One for each truth; their sizes may differ.
    truth : ndarray, shape (observations, atmosphere_size)
        In the same units.
    seed : int
        Seed of what is random in `inn.calibration.normalised_ranks`.

    Returns
    -------
    Answers
    """
    generator = np.random.default_rng(seed)
    ranks, scores = np.empty(truth.shape), np.empty(truth.shape)
    for row, ensemble in zip(range(len(truth)), ensembles, strict=True):
        ranks[row] = normalised_ranks(ensemble[None], truth[row : row + 1], generator)[0]
        scores[row] = crps(ensemble[None], truth[row : row + 1])[0]
    return Answers(ranks, scores)


def prior(
    atmospheres: NDArray[Any], observations: int, draws: int = DRAWS, seed: int = 0
) -> Iterator[NDArray[Any]]:
    """Answers that know nothing of the observations: some of many atmospheres, drawn anew for each.

    What any network must beat.

    Parameters
    ----------
    atmospheres : ndarray, shape (n, atmosphere_size)
    observations : int
    draws : int
        Atmospheres in each answer, at most.
    seed : int

    Yields
    ------
    ndarray, shape (draws, atmosphere_size)
    """
    generator = np.random.default_rng(seed)
    for _ in range(observations):
        yield atmospheres[generator.choice(len(atmospheres), min(draws, len(atmospheres)), replace=False)]


def scored_heights(truth: NDArray[Any], layout: Layout) -> NDArray[np.bool_]:
    """Which numbers of an atmosphere are scored, shape (quantities, heights); see `Scores`."""
    spread = truth.astype(np.float64).std(axis=0).reshape(len(QUANTITIES), -1)
    return np.asarray((spread >= LEAST_SPREAD) & (layout.heights <= CEILING))


def uniformity(ranks: Array) -> tuple[NDArray[np.int64], Array]:
    """Test whether normalised ranks are uniform: chi-squared of `BINS` equal bins.

    It is sensitive to posteriors that are too narrow or too wide, whose ranks crowd at both ends or in the
    middle: of 1,000 observations with Gaussian posteriors 10 % too narrow it rejects half at 1 %, 20 % too
    narrow all. The Kolmogorov-Smirnov test, which looks for the largest difference of two distribution
    functions, needs twice as many to see that, but only half as many to see a shifted posterior (one by a
    tenth of its standard deviation is rejected here in a quarter of all cases).

    Parameters
    ----------
    ranks : ndarray, shape (observations, columns)
        Between 0 and 1; observations independent of each other.

    Returns
    -------
    histogram : ndarray of int, shape (columns, BINS)
    probability : ndarray, shape (columns,)
        Of a histogram at least as uneven if ranks are uniform. NaN if fewer than `LEAST_EXPECTED` ranks are
        expected in a bin.
    """
    bins = np.minimum((ranks * BINS).astype(np.int64), BINS - 1)
    histogram = np.stack([(bins == number).sum(axis=0) for number in range(BINS)], axis=-1)
    if len(ranks) < LEAST_EXPECTED * BINS:
        return histogram, np.full(ranks.shape[1], np.nan)
    return histogram, np.asarray(chisquare(histogram, axis=-1).pvalue)


def score(
    answers: Answers,
    truth: NDArray[Any],
    simulation: NDArray[np.generic],
    layout: Layout,
    seed: int = 0,
) -> Scores:
    """Average answers over observations and heights.

    Parameters
    ----------
    answers : Answers
        `judge`.
    truth : ndarray, shape (observations, atmosphere_size)
        Network units.
    simulation : ndarray, shape (observations,)
        Snapshots of one simulation are not independent: the sampling error comes from resampling whole
        simulations, and the uniformity test takes one observation of each.
    layout : Layout
    seed : int
        Seed of the resampling and of that choice.

    Returns
    -------
    Scores
    """
    generator = np.random.default_rng(seed)
    shape = (len(QUANTITIES), layout.heights.size)
    scored = scored_heights(truth, layout)
    inside = np.stack([np.abs(answers.ranks - 0.5) <= 0.5 * level for level in LEVELS], axis=-1)
    order = generator.permutation(len(truth))
    names, firsts = np.unique(simulation[order], return_index=True)
    histogram, probability = uniformity(answers.ranks[order[firsts]])
    probability = probability.reshape(shape)
    coverage_mean, coverage_error = np.empty((2, len(QUANTITIES), len(LEVELS)))
    crps_mean, crps_error = np.empty((2, len(QUANTITIES)))
    for row in range(len(QUANTITIES)):
        columns = row * shape[1] + np.flatnonzero(scored[row])
        values = np.concatenate(
            (inside[:, columns].mean(axis=1), answers.crps[:, columns].mean(axis=1)[:, None]), axis=1
        )
        means, errors = resampled_mean(values, simulation, generator)
        coverage_mean[row], crps_mean[row] = means[:-1], means[-1]
        coverage_error[row], crps_error[row] = errors[:-1], errors[-1]
    return Scores(
        heights=layout.heights,
        observations=len(truth),
        simulations=names.size,
        scored=scored,
        spread=truth.astype(np.float64).std(axis=0).reshape(shape),
        coverage=inside.mean(axis=0).reshape(*shape, len(LEVELS)),
        histogram=histogram.reshape(*shape, BINS),
        probability=probability,
        crps=answers.crps.mean(axis=0).reshape(shape),
        mean_coverage=coverage_mean,
        coverage_error=coverage_error,
        uniform=np.array([_share_uniform(probability[row][scored[row]]) for row in range(len(QUANTITIES))]),
        mean_crps=crps_mean,
        crps_error=crps_error,
    )


def resampled_mean(
    values: Array, simulation: NDArray[np.generic], generator: np.random.Generator
) -> tuple[Array, Array]:
    """Means over observations, and their sampling errors from resampling whole simulations (bootstrap).

    Parameters
    ----------
    values : ndarray, shape (observations, columns)
    simulation : ndarray, shape (observations,)
    generator : numpy.random.Generator

    Returns
    -------
    mean, error : ndarray, shape (columns,)
        The error is the standard deviation of the mean over `REPEATS` resamplings.
    """
    names, place = np.unique(simulation, return_inverse=True)
    counts = np.bincount(place).astype(np.float64)
    sums = np.stack([np.bincount(place, column) for column in values.T], axis=-1)
    weights = generator.multinomial(names.size, np.full(names.size, 1.0 / names.size), REPEATS)
    means = (weights @ sums) / (weights @ counts)[:, None]
    return values.mean(axis=0), means.std(axis=0, ddof=1)


def validate(
    model: str | Path | Network,
    grid: str | Path,
    report_path: str | Path,
    *,
    augmentation: Augmentation | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    overwrite: bool = False,
    call: str | None = None,
) -> Scores:
    """Score a network on a grid's simulations, and write a page with the scores and their figure.

    Parameters
    ----------
    model : path or Network
        A model directory, or a network.
    grid : path
        A grid store. Of the grid that the network was trained on, its test part alone is used.
    report_path : path
        The HTML page to write. A file of the same name with ``.json`` holds every number.
    augmentation : Augmentation, optional
        What an observation adds; training's default if left out.
    draws : int
        Posterior draws for each observation.
    seed : int
        Seed of everything random.
    overwrite : bool
        Replace an existing page.
    call : str, optional
        The command, for the record.

    Returns
    -------
    Scores

    Raises
    ------
    MisuseError
        The page exists.
    StoreError, InputError, ModelError
        The grid or the model cannot be used.
    """
    page = Path(report_path)
    numbers = page.with_suffix(".json")
    if numbers == page:
        raise MisuseError("the page would be overwritten by its numbers", where=page, expected="NAME.html")
    for path in (page, numbers):
        if path.exists() and not overwrite:
            raise MisuseError("the file exists", where=path, remedy="choose another name, or add --overwrite")
    network = load_model(model) if isinstance(model, (str, Path)) else model
    record: Mapping[str, Any] = getattr(network, "record", {})
    trained_on: Mapping[str, Any] = record.get("grid", {})
    observed, simulation = fresh_observations(
        grid, network.layout, augmentation, trained_on=trained_on, seed=seed
    )
    with open_grid(grid) as store:
        test_part_only = _shares_simulations(grid, store, trained_on)
    truth = observed.atmosphere.numpy()
    answers = {
        "network": judge(posteriors(network, observed, draws, seed), truth, seed),
        "grid's own spread": judge(prior(truth, len(truth), draws, seed), truth, seed),
    }
    scores = {name: score(each, truth, simulation, network.layout, seed) for name, each in answers.items()}
    about = {
        "model": str(model) if isinstance(model, (str, Path)) else repr(type(model).__name__),
        "grid": str(grid),
        "grid_sha256": content_hash(grid),
        "test_part_only": test_part_only,
        "draws": draws,
        "seed": seed,
        "call": call or f"pipeline.validation.validate({str(model)!r}, {str(grid)!r}, {str(page)!r})",
        "flarefield_version": flarefield_version(),
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_text(
        json.dumps(about | {name: each.to_json() for name, each in scores.items()}, indent=1) + "\n",
        encoding="utf-8",
    )
    page.write_text(_page(about, scores, numbers.name), encoding="utf-8")
    return scores["network"]


def calibration_figure(scores: Mapping[str, Scores]) -> Figure:
    """Draw coverage and ranks of the first answers against height, and the CRPS of all.

    Parameters
    ----------
    scores : mapping of str to Scores
        By name, all of the same observations.

    Returns
    -------
    matplotlib.figure.Figure
    """
    first = next(iter(scores.values()))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 8.4), layout="constrained")
        axes = figure.subplots(len(QUANTITIES), 3, sharey=True)
        for row, quantity in enumerate(QUANTITIES):
            _coverage_panel(axes[row, 0], first, row)
            _ranks_panel(axes[row, 1], first, row)
            _crps_panel(axes[row, 2], scores, row)
            axes[row, 0].set_title(f"{NAMES[quantity]} {LOOKS[quantity].symbol}")
            axes[row, 0].set_ylabel("height [Mm]")
            axes[row, 0].set_ylim(first.heights[0], CEILING)
            for panel in axes[row]:
                # What is not scored is shaded: the prior hardly varies there.
                for height in first.heights[~first.scored[row] & (first.heights <= CEILING)]:
                    panel.axhspan(height - 0.04, height + 0.04, color="#eeeeee", linewidth=0, zorder=0)
        axes[0, 1].set_title("Ranks of the truth, relative to uniform")
        axes[0, 2].set_title("Error of the whole posterior (CRPS)")
        for column, label in enumerate(("share of truths inside", "normalised rank", "CRPS [network units]")):
            axes[-1, column].set_xlabel(label)
        axes[0, 2].legend(loc="upper right")
    return figure


def _coverage_panel(axes: Axes, scores: Scores, row: int) -> None:
    for number, level in enumerate(LEVELS):
        # Where 95 % of calibrated networks would lie, from as many independent observations.
        low, high = binom.interval(0.95, scores.simulations, level)
        axes.axvspan(
            low / scores.simulations, high / scores.simulations, color=ACCENT, alpha=0.12, linewidth=0
        )
        axes.axvline(level, color=ACCENT, linewidth=0.7, linestyle="--")
        axes.plot(scores.coverage[row, :, number], scores.heights, color=ACCENT, marker=".", markersize=3)
    axes.set_xlim(0.3, 1.0)


def _ranks_panel(axes: Axes, scores: Scores, row: int) -> None:
    below = scores.heights <= CEILING
    heights = scores.heights[below]
    middle = 0.5 * (heights[1:] + heights[:-1])
    edges = np.concatenate([[heights[0]], middle, [heights[-1]]])
    relative = scores.histogram[row][below] * BINS / scores.simulations
    relative[~scores.scored[row][below]] = np.nan
    drawn = axes.pcolormesh(
        np.linspace(0.0, 1.0, BINS + 1), edges, relative, cmap="RdBu_r", vmin=0.0, vmax=2.0
    )
    failed = scores.scored[row] & (scores.probability[row] < SIGNIFICANCE)
    axes.plot(
        np.full(failed.sum(), 1.03), scores.heights[failed], "<", color=TRUE, markersize=4, clip_on=False
    )
    axes.figure.colorbar(drawn, ax=axes, pad=0.06)


def _crps_panel(axes: Axes, scores: Mapping[str, Scores], row: int) -> None:
    for number, (name, each) in enumerate(scores.items()):
        colour = ACCENT if number == 0 else mpl.colormaps["Dark2"](number)
        axes.plot(each.crps[row], each.heights, label=name, color=colour, linewidth=1.2)
    axes.set_xlim(left=0.0)


def _page(about: Mapping[str, Any], scores: Mapping[str, Scores], numbers: str) -> str:
    stream = io.BytesIO()
    # Without the library's version, which matplotlib would write into it: the same scores, the same bytes.
    calibration_figure(scores).savefig(stream, format="png", metadata={"Software": None})
    environment = Environment(loader=PackageLoader("pipeline"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("validation.html").render(
        about=about,
        scores=scores,
        network=scores["network"],
        quantities=[name.replace("_", " ") for name in QUANTITIES],
        levels=LEVELS,
        ceiling=CEILING,
        least_spread=LEAST_SPREAD,
        significance=SIGNIFICANCE,
        numbers=numbers,
        figure=base64.b64encode(stream.getvalue()).decode(),
    )


def _share_uniform(probability: Array) -> float:
    if probability.size == 0 or np.isnan(probability).any():
        return float("nan")
    return float((probability >= SIGNIFICANCE).mean())


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
