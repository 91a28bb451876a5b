"""Recipes: which network is trained on a grid, how, and what it is scored on.

A `Recipe` is settings. A `Training` is a recipe at work on one grid: networks trained in stages, one after
the other, each by an `inn.training.Trainer`; then a novelty measure, and the scores on simulations that had
no part in it.
"""

from __future__ import annotations

import abc
import json
import logging
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from inn.calibration import held_out_metrics
from inn.checkpoint import Network
from inn.conditional import ConditionalNetwork
from inn.distillation import LatentSchedule, LatentTrainer, answered
from inn.emulator import Emulator
from inn.joint import JointNetwork
from inn.joint_training import JointSchedule, JointTrainer
from inn.latent import TunedLatents
from inn.layout import Layout
from inn.novelty import NOVEL, Novelty
from inn.sampling import Measurement, measured_sampling
from inn.training import (
    GlobalRandom,
    LeastSquaresTrainer,
    LikelihoodTrainer,
    Schedule,
    Trainer,
    on_device,
)
from pipeline.errors import InputError, MisuseError
from pipeline.grids.store import BUNDLED_GRID
from pipeline.training_set import Augmentation, Batch, TrainingSet, open_parts

logger = logging.getLogger("flarefield")

STATISTICS_EXAMPLES = 20_000
HELD_OUT_DRAWS = 8
TEST_DRAWS = 4
NOVELTY_REFERENCES = 8_192
PURPOSES = ("statistics", "held out", "test", "novelty", "calibration", "teaching", "sampling")
"""Of random numbers. One generator each: more held-out examples must not change what is learned."""


JOINT_MEASUREMENT = Measurement(observations=4, truth_draws=8192, seeds=2, half_precision=True)
"""A draw of the joint network takes eighty times the products of the conditional one's."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training besides the grid and the seed.

    Parameters
    ----------
    architecture, emulator : dict
        Constructor arguments of the network (`inn.conditional.ConditionalNetwork`, or with `joint_schedule`
        `inn.joint.JointNetwork`) and of `inn.emulator.Emulator`.
    flow_schedule, emulator_schedule : Schedule
        How long and how fast the conditional network's flow, and the emulator, are trained.
    latent_schedule : LatentSchedule
        How the conditional network's latents are tuned.
    joint_schedule : JointSchedule, optional
        With it the joint network is trained, so, and there is no flow.
    mu : float
        The joint network knows one viewing angle: the grid's that is nearest to this. The default is that of
        RADYN's rays which the paper took (0.9531; Osborne, Armstrong & Fletcher 2019, section 3.1).
    augmentation : Augmentation
        What an observation adds to a clean profile. The joint network learns from profiles at rest without
        noise, as the paper's did, but as CRISP delivers them: through its transmission profile and its
        wavelengths, because that is what it will be asked about. It is scored with what is said here.
    novelty_components : int
        Principal components of the profiles in the novelty measure.
    sampling : Measurement
        How well the errors of its quantiles are measured.
    """

    architecture: dict[str, Any] = field(default_factory=dict)
    emulator: dict[str, Any] = field(default_factory=dict)
    flow_schedule: Schedule = field(default_factory=Schedule)
    emulator_schedule: Schedule = field(default_factory=Schedule)
    latent_schedule: LatentSchedule = field(default_factory=LatentSchedule)
    joint_schedule: JointSchedule | None = None
    mu: float = 0.9531
    augmentation: Augmentation = field(default_factory=Augmentation)
    novelty_components: int = 12
    sampling: Measurement = field(default_factory=Measurement)

    def to_json(self) -> dict[str, Any]:
        """The settings that have an effect, as JSON holds them."""
        settings = asdict(self)
        joint, conditional = ("joint_schedule", "mu"), ("flow_schedule", "latent_schedule")
        for name in joint if self.joint_schedule is None else conditional:
            del settings[name]
        return dict(json.loads(json.dumps(settings)))

    def with_epochs(self, epochs: int) -> Recipe:
        """The same in another number of epochs.

        Of the flow and of the emulator (and of the latents, which do not get more than they had); or of the
        joint network, whose whole curriculum is scaled (`inn.joint_training.JointSchedule.scaled`) while its
        emulator's epochs stay.

        Raises
        ------
        MisuseError
            There is no epoch.
        """
        if epochs < 1:
            raise MisuseError("training takes at least one epoch", where="epochs", found=epochs)
        if self.joint_schedule is not None:
            return replace(self, joint_schedule=self.joint_schedule.scaled(epochs))
        return replace(
            self,
            flow_schedule=replace(self.flow_schedule, epochs=epochs),
            emulator_schedule=replace(self.emulator_schedule, epochs=epochs),
            latent_schedule=replace(self.latent_schedule, epochs=min(epochs, self.latent_schedule.epochs)),
        )


RECIPES: dict[str, Recipe] = {
    "conditional": Recipe(
        architecture={
            "components": 64,
            "steps": 8,
            "hidden": 96,
            "context": 32,
            "normal_scores": True,
        },
        flow_schedule=Schedule(epochs=40, steps=120, weight_decay=0.42, blur=0.8),
        emulator_schedule=Schedule(epochs=60, steps=100, weight_decay=1e-3),
    ),
    "radynversion": Recipe(
        joint_schedule=JointSchedule(),
        emulator_schedule=Schedule(epochs=60, steps=100, weight_decay=1e-3),
        augmentation=Augmentation(calibration_error=(0.0, 0.0), doppler=0.0),
        sampling=JOINT_MEASUREMENT,
    ),
}
"""The recipes that `flarefield train --recipe` takes: the recommended network, and the paper's."""


def find_recipe(recipe: str | Recipe, epochs: int | None = None) -> tuple[str, Recipe]:
    """Name and settings of a recipe.

    Parameters
    ----------
    recipe : str or Recipe
        Name of one of `RECIPES`, or settings of one's own, whose name is ``"own"``.
    epochs : int, optional
        Fewer or more epochs than the recipe's; see `Recipe.with_epochs`.

    Raises
    ------
    MisuseError
        There is no such recipe, or no epoch.
    """
    if isinstance(recipe, Recipe):
        name, settings = "own", recipe
    elif recipe in RECIPES:
        name, settings = recipe, RECIPES[recipe]
    else:
        raise MisuseError("there is no such recipe", found=recipe, expected=" or ".join(sorted(RECIPES)))
    return name, settings if epochs is None else settings.with_epochs(epochs)


class Training(abc.ABC):
    """A recipe at work on a grid.

    Everything is made anew from grid, recipe and seed, in the same bits each time: what is worth keeping of a
    training under way is the states of its trainers.

    Parameters
    ----------
    recipe : Recipe
    grid : path
        A grid store. Samples that did not converge are left out.
    seed : int
        Seed of everything random.
    device : torch.device
        Where networks are trained.

    Attributes
    ----------
    network : Network
        With its emulator.
    parts : dict of str to TrainingSet
        ``"train"``, ``"validation"`` and ``"test"``.

    Raises
    ------
    StoreError, InputError
        The grid cannot be used.
    """

    stages: tuple[str, ...]
    """Names of what is trained, in order."""

    def __init__(self, recipe: Recipe, grid: str | Path, seed: int, device: torch.device) -> None:
        self.recipe, self.seed, self.device = recipe, seed, device
        self.parts = open_parts(grid, Layout(), recipe.augmentation)
        fewest = math.ceil(1.0 / NOVEL / HELD_OUT_DRAWS)
        if (
            len(self.parts["validation"]) < fewest
        ):  # conclude() could not measure novelty: say so before hours
            raise InputError(
                "the grid's validation part is too small",
                where=grid,
                found=f"{len(self.parts['validation'])} samples",
                expected=f"{fewest} or more",
                remedy="make a larger grid: a tenth of the simulations is set aside for it",
            )
        with GlobalRandom(seed, torch.device("cpu")).swapped_in():  # initial weights take no generator
            self.network = self._network(Layout())
            self.network.emulator = self.emulator = Emulator(Layout(), **recipe.emulator)

    @abc.abstractmethod
    def _network(self, layout: Layout) -> Network:
        """The network, with new weights."""

    @abc.abstractmethod
    def _observe(self, part: TrainingSet, generator: torch.Generator, count: int | None = None) -> Batch:
        """Observe so many random samples, or each one once, as the network's user will."""

    @property
    @abc.abstractmethod
    def mu(self) -> tuple[float, float]:
        """Lowest and highest mu that the network is trained for."""

    @abc.abstractmethod
    def epochs(self, stage: str) -> int:
        """Most epochs of a stage."""

    @abc.abstractmethod
    def trainer(self, stage: str) -> Trainer:
        """A trainer at the beginning of a stage; the stages before must have been finished."""

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + 1 + PURPOSES.index(purpose))

    def _emulator_trainer(self) -> Trainer:
        clean = self.parts["train"].clean()
        self.emulator.cpu().fit_statistics(clean.atmosphere, clean.microturbulence, clean.mu, clean.lines)
        return LeastSquaresTrainer(
            self.emulator.to(self.device),
            self.parts["train"].draw_clean,
            [self.parts["validation"].clean()],
            self.recipe.emulator_schedule,
            self.seed,
        )

    def sampling(self) -> dict[str, Any]:
        """Errors of the network's quantiles by number of draws and by precision, on the test part."""
        measurement = self.recipe.sampling
        observed = self._observe(self.parts["test"], self._generator("sampling"), measurement.observations)
        return measured_sampling(
            self.network.cpu().eval(),
            observed.lines.numpy(),
            observed.mu.numpy(),
            observed.calibration_error.numpy(),
            measurement,
        )

    def conclude(self) -> dict[str, Any]:
        """Add the novelty measure to the network, whose stages are finished, and score it.

        Returns
        -------
        dict
            `metrics` on the test part, each of whose samples is observed a few times.
        """
        network = self.network.cpu().eval()
        if isinstance(network.latents, TunedLatents):
            network.latents.half()  # a thousandth of a spread, and half of what they weigh
        generator = self._generator("novelty")
        training = self._observe(self.parts["train"], generator, NOVELTY_REFERENCES).lines
        held_out = [self._observe(self.parts["validation"], generator).lines for _ in range(HELD_OUT_DRAWS)]
        network.novelty = Novelty.fitted(
            Layout(), training, torch.cat(held_out), self.recipe.novelty_components
        )
        generator = self._generator("test")
        batches = [self._observe(self.parts["test"], generator) for _ in range(TEST_DRAWS)]
        observed = Batch(*(torch.cat(columns) for columns in zip(*batches, strict=True)))
        return metrics(network, observed, self.parts["test"].clean())


class ConditionalTraining(Training):
    """The conditional network: its flow, its emulator, then latents for it, at all angles of the grid."""

    stages = ("flow", "emulator", "latents")

    def _network(self, layout: Layout) -> ConditionalNetwork:
        network = ConditionalNetwork(layout, **self.recipe.architecture)
        network.latents = TunedLatents(network.latent_size, self.recipe.latent_schedule.draws)
        return network

    def _observe(self, part: TrainingSet, generator: torch.Generator, count: int | None = None) -> Batch:
        return part.draw_each(generator) if count is None else part.draw(count, generator)

    @property
    def mu(self) -> tuple[float, float]:
        """Lowest and highest mu of the grid."""
        angles = self.parts["train"].mu
        return float(angles.min()), float(angles.max())

    def epochs(self, stage: str) -> int:
        """Most epochs of a stage."""
        schedules: dict[str, Schedule | LatentSchedule] = {
            "flow": self.recipe.flow_schedule,
            "emulator": self.recipe.emulator_schedule,
            "latents": self.recipe.latent_schedule,
        }
        return schedules[stage].epochs

    def trainer(self, stage: str) -> Trainer:
        """A trainer at the beginning of a stage; see `Training.trainer`."""
        if stage == "emulator":
            return self._emulator_trainer()
        network, train = self.network, self.parts["train"]
        assert isinstance(network, ConditionalNetwork)
        if stage == "latents":
            return self._latent_trainer(network)
        examples = train.draw(STATISTICS_EXAMPLES, self._generator("statistics"))
        network.fit_statistics(examples.atmosphere, examples.lines, examples.mu, examples.calibration_error)
        generator = self._generator("held out")
        held_out = [self.parts["validation"].draw_each(generator) for _ in range(HELD_OUT_DRAWS)]
        return LikelihoodTrainer(
            network.to(self.device), train.draw, held_out, self.recipe.flow_schedule, self.seed
        )

    def _latent_trainer(self, network: ConditionalNetwork) -> Trainer:
        """The flow is finished: its calibration comes first, for it moves what latents are tuned to."""
        generator = self._generator("calibration")
        drawn = [self._observe(self.parts["validation"], generator) for _ in range(HELD_OUT_DRAWS)]
        held = Batch(*(torch.cat(columns) for columns in zip(*drawn, strict=True)))
        network.cpu().eval().calibrate(held.atmosphere, held.lines, held.mu, held.calibration_error)
        schedule = self.recipe.latent_schedule
        network.to(self.device).eval()
        generator = self._generator("teaching")
        taught, held_out = (
            answered(
                network,
                on_device(self._observe(self.parts[part], generator, count), self.device),
                schedule.teacher_draws,
            )
            for part, count in (
                ("train", schedule.observations),
                ("validation", schedule.held_out),
            )
        )
        return LatentTrainer(network, taught, held_out, schedule, self.seed)


class JointTraining(Training):
    """The paper's joint network, at one angle and from clean lines; then an emulator, at all angles."""

    stages = ("joint", "emulator")

    def _network(self, layout: Layout) -> JointNetwork:
        return JointNetwork(layout, **self.recipe.architecture)

    @property
    def mu(self) -> tuple[float, float]:
        """The grid's mu that is nearest to the recipe's, twice."""
        angles = self.parts["train"].mu
        nearest = float(angles[(angles - self.recipe.mu).abs().argmin()])
        return nearest, nearest

    @property
    def _schedule(self) -> JointSchedule:
        assert self.recipe.joint_schedule is not None
        return self.recipe.joint_schedule

    def _observe(self, part: TrainingSet, generator: torch.Generator, count: int | None = None) -> Batch:
        samples = (
            torch.arange(len(part))
            if count is None
            else torch.randint(len(part), (count,), generator=generator)
        )
        return part.observe(samples, torch.full((len(samples),), self.mu[0]), generator)

    def _clean(self, part: str) -> Batch:
        """Every sample of a part at the network's angle, without noise, at rest."""
        clean = self.parts[part].clean()
        chosen = clean.mu == clean.mu[(clean.mu - self.recipe.mu).abs().argmin()]
        return Batch(*(column[chosen] for column in clean))

    def epochs(self, stage: str) -> int:
        """Most epochs of a stage."""
        return {"joint": self._schedule.epochs, "emulator": self.recipe.emulator_schedule.epochs}[stage]

    def trainer(self, stage: str) -> Trainer:
        """A trainer at the beginning of a stage; see `Training.trainer`."""
        if stage == "emulator":
            return self._emulator_trainer()
        assert isinstance(self.network, JointNetwork)
        train = self._clean("train")

        def draw(count: int, generator: torch.Generator) -> Batch:
            chosen = torch.randint(len(train.mu), (count,), generator=generator)
            return Batch(*(column[chosen] for column in train))

        return JointTrainer(
            self.network.to(self.device), draw, [self._clean("validation")], self._schedule, self.seed
        )


def make_training(recipe: Recipe, grid: str | Path, seed: int, device: torch.device) -> Training:
    """Put a recipe to work on a grid; see `Training` for the parameters."""
    kind = ConditionalTraining if recipe.joint_schedule is None else JointTraining
    return kind(recipe, grid, seed, device)


def measure_imported(network: Network, grid: str | Path = BUNDLED_GRID) -> None:
    """Measure how an imported network is best sampled, on observations of a grid; its record keeps it.

    Parameters
    ----------
    network : Network
    grid : path
        A grid store, the bundled one by default. Where its heights are others than the network's nothing is
        measured: without observations that make sense to it, the network is sampled as any other.
    """
    try:
        part = open_parts(grid, network.layout)["test"]
    except InputError as error:
        logger.warning("%s: it is not measured how this network is best sampled: %s", grid, error)
        return
    angle = part.mu[(part.mu - Recipe.mu).abs().argmin()]
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(len(part), (JOINT_MEASUREMENT.observations,), generator=generator)
    observed = part.observe(samples, angle.expand(len(samples)), generator)
    network.record["sampling"] = measured_sampling(
        network,
        observed.lines.numpy(),
        observed.mu.numpy(),
        observed.calibration_error.numpy(),
        JOINT_MEASUREMENT,
    )


def metrics(network: Network, observed: Batch, clean: Batch) -> dict[str, Any]:
    """Score a network on simulations that had no part in its training.

    Parameters
    ----------
    network : Network
        With its emulator and novelty measure.
    observed : Batch
        Examples at angles, noise levels and calibration errors as they will be met.
    clean : Batch
        Examples without noise, for the emulator.

    Returns
    -------
    dict
        `inn.calibration.held_out_metrics` of ``all`` examples and of those in ``emission`` (a line's core
        brighter than its wings: what ribbons show), ``emulator_mse`` on clean lines, ``novel``: the share of
        examples that are flagged, which should be one per cent.
    """
    emission = shows_emission(observed.lines, network.layout)
    result: dict[str, Any] = {}
    for name, chosen in (("all", torch.ones_like(emission)), ("emission", emission)):
        if chosen.sum() > 1:
            result[name] = held_out_metrics(
                network,
                observed.atmosphere[chosen].numpy(),
                observed.lines[chosen].numpy(),
                observed.mu[chosen].numpy(),
                observed.calibration_error[chosen].numpy(),
            )
    if isinstance(network.emulator, Emulator):
        with torch.no_grad():
            emulated = network.emulator(clean.atmosphere, clean.microturbulence, clean.mu)
        result["emulator_mse"] = float((emulated - clean.lines).square().mean())
    if isinstance(network.novelty, Novelty):
        novelty = network.novelty.tail_probability(observed.lines.numpy())
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
