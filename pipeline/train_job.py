"""Training a network on a grid: recipe in, model directory with its record and history out."""

from __future__ import annotations

import csv
import logging
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from inn.calibration import held_out_metrics
from inn.checkpoint import save_model
from inn.conditional import ConditionalNetwork
from inn.emulator import Emulator
from inn.layout import Layout
from inn.novelty import NOVEL, Novelty
from inn.training import Epoch, Schedule, fit_emulator, fit_flow
from pipeline.errors import MisuseError
from pipeline.progress import Progress
from pipeline.training_set import (
    Augmentation,
    Batch,
    TrainingSet,
    content_hash,
    grid_description,
    open_parts,
)

logger = logging.getLogger("flarefield")

HISTORY_FILE = "history.csv"
STATISTICS_EXAMPLES = 20_000
HELD_OUT_DRAWS = 8
TEST_DRAWS = 4
NOVELTY_REFERENCES = 8_192


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run besides the grid and the seed.

    Parameters
    ----------
    architecture, emulator : dict
        Constructor arguments of `inn.ConditionalNetwork` and `inn.Emulator`.
    flow_schedule, emulator_schedule : Schedule
        How long and how fast each is trained.
    augmentation : Augmentation
        What an observation adds to a clean profile.
    novelty_components : int
        Principal components of the profiles in the novelty measure.
    """

    architecture: dict[str, Any] = field(default_factory=dict)
    emulator: dict[str, Any] = field(default_factory=dict)
    flow_schedule: Schedule = field(default_factory=Schedule)
    emulator_schedule: Schedule = field(default_factory=Schedule)
    augmentation: Augmentation = field(default_factory=Augmentation)
    novelty_components: int = 12


RECIPES: dict[str, Recipe] = {
    "conditional": Recipe(
        architecture={"components": 32, "dropout": 0.1},
        flow_schedule=Schedule(epochs=40, steps=100),
        emulator_schedule=Schedule(epochs=60, steps=100, weight_decay=1e-3),
    )
}
"""The recipes that `flarefield train --recipe` takes."""


def train(
    grid: str | Path,
    model_path: str | Path,
    *,
    recipe: str | Recipe = "conditional",
    seed: int = 0,
    epochs: int | None = None,
    call: str | None = None,
) -> dict[str, Any]:
    """Train a network, its emulator and its novelty measure on a grid, and save them as a model.

    Simulations are split 80/10/10: the first part is learned from, the second decides which weights are kept
    and calibrates the novelty measure, the third is used for nothing but the metrics in the record.

    Parameters
    ----------
    grid : path
        A grid store. Samples that did not converge are left out.
    model_path : path
        Model directory to write; it must not exist.
    recipe : str or Recipe
        Name of one of `RECIPES`, or settings of one's own.
    seed : int
        Seed of everything random: the same grid, recipe, seed and number of threads give the same network.
    epochs : int, optional
        Fewer or more epochs than the recipe's, for both the flow and the emulator.
    call : str, optional
        The command, for the record.

    Returns
    -------
    dict
        The training record, as the model's ``record`` holds it.

    Raises
    ------
    MisuseError
        The recipe is unknown, or the output exists.
    StoreError, InputError
        The grid cannot be used.
    """
    settings, name = _recipe(recipe, epochs)
    path = Path(model_path)
    if path.exists():
        raise MisuseError("the output exists", where=path, remedy="remove it, or name another directory")
    started = time.monotonic()
    layout = Layout()
    sets = open_parts(grid, layout, settings.augmentation)
    logger.info("training on %s", ", ".join(f"{len(part)} {name}" for name, part in sets.items()))
    # One generator for each purpose: more held-out examples must not change what is learned.
    generators = {
        purpose: torch.Generator().manual_seed(1000 * seed + number)
        for number, purpose in enumerate(("statistics", "held out", "test", "novelty"), start=1)
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ConditionalNetwork(layout, **settings.architecture)
        network.emulator = Emulator(layout, **settings.emulator)
    flow_history = _train_flow(network, sets, settings.flow_schedule, seed, generators)
    emulator_history = _train_emulator(network.emulator, sets, settings.emulator_schedule, seed)
    network.novelty = _novelty(sets, settings.novelty_components, generators["novelty"])
    record = {
        "recipe": name,
        "settings": asdict(settings),
        "seed": seed,
        "call": call or f"pipeline.train_job.train({str(grid)!r}, {str(model_path)!r}, seed={seed})",
        "grid": {
            "sha256": content_hash(grid),
            "samples": {part: len(examples) for part, examples in sets.items()},
            "split": "by simulation, 80/10/10 (pipeline.grids.store.split)",
            **grid_description(grid),
        },
        "conditions": {
            "mu": [round(float(edge(sets["train"].mu)), 6) for edge in (min, max)],
            "calibration_error": list(settings.augmentation.calibration_error),
        },
        "epochs": {"flow": len(flow_history), "emulator": len(emulator_history)},
        "torch": torch.__version__,
        "metrics": metrics(network, sets["test"], generators["test"]),
    }
    record["wall_time_seconds"] = round(time.monotonic() - started, 1)
    network.record = record
    save_model(network, path, record)
    _write_history(path / HISTORY_FILE, {"flow": flow_history, "emulator": emulator_history})
    return record


def _recipe(recipe: str | Recipe, epochs: int | None) -> tuple[Recipe, str]:
    if isinstance(recipe, Recipe):
        settings, name = recipe, "own"
    elif recipe in RECIPES:
        settings, name = RECIPES[recipe], recipe
    else:
        raise MisuseError("there is no such recipe", found=recipe, expected=" or ".join(sorted(RECIPES)))
    if epochs is not None:
        if epochs < 1:
            raise MisuseError("training takes at least one epoch", where="epochs", found=epochs)
        settings = replace(
            settings,
            flow_schedule=replace(settings.flow_schedule, epochs=epochs),
            emulator_schedule=replace(settings.emulator_schedule, epochs=epochs),
        )
    return settings, name


def _train_flow(
    network: ConditionalNetwork,
    sets: dict[str, TrainingSet],
    schedule: Schedule,
    seed: int,
    generators: dict[str, torch.Generator],
) -> list[Epoch]:
    examples = sets["train"].draw(STATISTICS_EXAMPLES, generators["statistics"])
    network.fit_statistics(examples.atmosphere, examples.lines, examples.mu, examples.calibration_error)
    held_out = [sets["validation"].draw_each(generators["held out"]) for _ in range(HELD_OUT_DRAWS)]
    with Progress("training the flow", schedule.epochs, "epochs") as progress:
        return fit_flow(
            network, sets["train"].draw, held_out, schedule, seed, report=lambda _: progress.advance(1)
        )


def _train_emulator(
    emulator: Emulator, sets: dict[str, TrainingSet], schedule: Schedule, seed: int
) -> list[Epoch]:
    clean = sets["train"].clean()
    emulator.fit_statistics(clean.atmosphere, clean.microturbulence, clean.mu, clean.lines)
    held_out = [sets["validation"].clean()]
    with Progress("training the emulator", schedule.epochs, "epochs") as progress:
        return fit_emulator(
            emulator, sets["train"].draw_clean, held_out, schedule, seed, report=lambda _: progress.advance(1)
        )


def _novelty(sets: dict[str, TrainingSet], components: int, generator: torch.Generator) -> Novelty:
    training = sets["train"].draw(NOVELTY_REFERENCES, generator).lines
    held_out = [sets["validation"].draw_each(generator).lines for _ in range(HELD_OUT_DRAWS)]
    return Novelty.fitted(Layout(), training, torch.cat(held_out), components)


def metrics(network: ConditionalNetwork, examples: TrainingSet, generator: torch.Generator) -> dict[str, Any]:
    """Score a network on simulations that had no part in its training.

    Parameters
    ----------
    network : ConditionalNetwork
        With its emulator and novelty measure.
    examples : TrainingSet
        The test part of a grid. Each sample is observed a few times, at angles, noise levels and calibration
        errors drawn as in training.
    generator : torch.Generator
        Source of the observations.

    Returns
    -------
    dict
        `inn.calibration.held_out_metrics` of ``all`` examples and of those in ``emission`` (a line's core
        brighter than its wings: what ribbons show), ``emulator_mse`` on clean lines, ``novel``: the share of
        examples that are flagged, which should be one per cent.
    """
    batches = [examples.draw_each(generator) for _ in range(TEST_DRAWS)]
    batch = Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    emission = shows_emission(batch.lines, network.layout)
    result: dict[str, Any] = {}
    for name, chosen in (("all", torch.ones_like(emission)), ("emission", emission)):
        if chosen.sum() > 1:
            result[name] = held_out_metrics(
                network,
                batch.atmosphere[chosen].numpy(),
                batch.lines[chosen].numpy(),
                batch.mu[chosen].numpy(),
                batch.calibration_error[chosen].numpy(),
            )
    clean = examples.clean()
    if isinstance(network.emulator, Emulator):
        with torch.no_grad():
            emulated = network.emulator(clean.atmosphere, clean.microturbulence, clean.mu)
        result["emulator_mse"] = float((emulated - clean.lines).square().mean())
    if isinstance(network.novelty, Novelty):
        novelty = network.novelty.tail_probability(batch.lines.numpy())
        result["novel"] = float((novelty < NOVEL).mean())
    return result


def shows_emission(lines: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Whether either line's core is brighter than the mean of its two wings.

    Parameters
    ----------
    lines : Tensor, shape (n, lines_size)
        Normalised lines.
    layout : Layout
        Where each line lies in them.

    Returns
    -------
    Tensor of bool, shape (n,)
    """
    emission = torch.zeros(lines.shape[0], dtype=torch.bool)
    for window in layout.lines:
        line = lines[:, layout.line_slice(window.name)]
        core = torch.from_numpy(abs(window.offsets) <= 0.5 * window.half_width)
        emission |= line[:, core].amax(dim=-1) > 0.5 * (line[:, 0] + line[:, -1])
    return emission


def _write_history(path: Path, histories: dict[str, list[Epoch]]) -> None:
    names = [entry.name for entry in fields(Epoch)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["network", *names])
        for network, history in histories.items():
            writer.writerows([network, *(getattr(entry, name) for name in names)] for entry in history)
