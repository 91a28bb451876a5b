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
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from inn.calibration import held_out_metrics
from inn.checkpoint import Network, load_model
from inn.conditional import ConditionalNetwork
from inn.distillation import LatentSchedule, LatentTrainer, PreviewSchedule, PreviewTrainer, answered
from inn.emulator import Emulator
from inn.joint import JointNetwork
from inn.joint_training import JointSchedule, JointTrainer
from inn.latent import TunedLatents
from inn.layout import Layout
from inn.novelty import NOVEL, Novelty
from inn.preview import Preview, disagreement, preview_of
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
from pipeline.training_set import Augmentation, Batch, TrainingSet, content_hash, open_parts

logger = logging.getLogger("flarefield")

STATISTICS_EXAMPLES = 20_000
HELD_OUT_DRAWS = 8
TEST_DRAWS = 4
NOVELTY_REFERENCES = 8_192
PURPOSES = ("statistics", "held out", "test", "novelty", "calibration", "teaching", "sampling", "preview")
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
    preview : dict
        Constructor arguments of the conditional network's `inn.preview.Preview`.
    preview_schedule : PreviewSchedule
        How it is taught.
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
    preview: dict[str, Any] = field(default_factory=dict)
    preview_schedule: PreviewSchedule = field(default_factory=PreviewSchedule)
    joint_schedule: JointSchedule | None = None
    mu: float = 0.9531
    augmentation: Augmentation = field(default_factory=Augmentation)
    novelty_components: int = 12
    sampling: Measurement = field(default_factory=Measurement)

    def to_json(self) -> dict[str, Any]:
        """The settings that have an effect, as JSON holds them."""
        settings = asdict(self)
        joint = ("joint_schedule", "mu")
        conditional = ("flow_schedule", "latent_schedule", "preview", "preview_schedule")
        for name in joint if self.joint_schedule is None else conditional:
            del settings[name]
        return dict(json.loads(json.dumps(settings)))

    def with_epochs(self, epochs: int) -> Recipe:
        """The same in another number of epochs.

        Of the flow and of the emulator (and of the latents and the preview, which do not get more than they
        had); or of the joint network, whose whole curriculum is scaled
        (`inn.joint_training.JointSchedule.scaled`) while its emulator's epochs stay.

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
            preview_schedule=replace(self.preview_schedule, epochs=min(epochs, self.preview_schedule.epochs)),
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
            if isinstance(self.network, ConditionalNetwork):
                self.network.preview = _preview(self.network, recipe)

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
        if isinstance(network.preview, Preview):
            network.preview.compact()
        generator = self._generator("novelty")
        training = self._observe(self.parts["train"], generator, NOVELTY_REFERENCES).lines
        held_out = [self._observe(self.parts["validation"], generator).lines for _ in range(HELD_OUT_DRAWS)]
        network.novelty = Novelty.fitted(
            Layout(), training, torch.cat(held_out), self.recipe.novelty_components
        )
        return metrics(network, self._test_observations(), self.parts["test"].clean())

    def _test_observations(self) -> Batch:
        """Each sample of the test part, a few times."""
        generator = self._generator("test")
        return _joined(self._observe(self.parts["test"], generator) for _ in range(TEST_DRAWS))

    def measured(self) -> dict[str, Any]:
        """What is to be known of how the finished network is used.

        Returns
        -------
        dict
            ``sampling``: `inn.sampling.measured_sampling`.
        """
        return {"sampling": self.sampling()}

    def _of_preview(self) -> dict[str, Any]:
        """How far the network's preview is off, on the test part."""
        network = self.network.cpu().eval()
        observed = self._test_observations()
        measured = disagreement(
            network,
            observed.atmosphere.numpy(),
            observed.lines.numpy(),
            observed.mu.numpy(),
            observed.calibration_error.numpy(),
            draws=self.recipe.preview_schedule.measured_draws,
        )
        return {"disagreement": measured}


def _joined(batches: Iterable[Batch]) -> Batch:
    """Several batches as one."""
    return Batch(*(torch.cat(columns) for columns in zip(*batches, strict=True)))


def _preview(network: ConditionalNetwork, recipe: Recipe) -> Preview:
    """A preview for a network, with new weights."""
    return Preview(network.layout, network.architecture()["context"], **recipe.preview)


class ConditionalTraining(Training):
    """The conditional network: flow, emulator, then latents and a preview for it, at all angles."""

    stages: tuple[str, ...] = ("flow", "emulator", "latents", "preview")

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
        schedules: dict[str, Schedule | LatentSchedule | PreviewSchedule] = {
            "flow": self.recipe.flow_schedule,
            "emulator": self.recipe.emulator_schedule,
            "latents": self.recipe.latent_schedule,
            "preview": self.recipe.preview_schedule,
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
        if stage == "preview":
            return self._preview_trainer(network)
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
        held = _joined(self._observe(self.parts["validation"], generator) for _ in range(HELD_OUT_DRAWS))
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

    def measured(self) -> dict[str, Any]:
        """What is to be known of how the finished network is used.

        Returns
        -------
        dict
            As `Training.measured` returns it, and ``preview``: `inn.preview.disagreement` by that name.
        """
        return {**super().measured(), "preview": self._of_preview()}

    def _preview_trainer(self, network: ConditionalNetwork) -> Trainer:
        schedule = self.recipe.preview_schedule
        held_out = self.parts["validation"].draw(schedule.held_out, self._generator("preview"))
        network.to(self.device).eval()
        return PreviewTrainer(network, self.parts["train"].draw, held_out, schedule, self.seed)


class PreviewTraining(ConditionalTraining):
    """A preview alone, for a conditional network that is finished and stays as it is, bit for bit.

    Parameters
    ----------
    recipe : Recipe
        What it says of the preview counts; observations are made as they were for the network, if its record
        tells how.
    grid, seed, device
        As for `Training`.
    model : path
        The network's model directory.

    Raises
    ------
    InputError
        It is not a conditional network, or was not trained on this grid.
    """

    stages = ("preview",)

    def __init__(
        self, recipe: Recipe, grid: str | Path, seed: int, device: torch.device, model: str | Path
    ) -> None:
        network = load_model(model)
        if not isinstance(network, ConditionalNetwork):
            raise InputError(
                "only a conditional network can be taught a preview",
                where=model,
                found=type(network).__name__,
                expected=ConditionalNetwork.__name__,
            )
        trained_on = network.record.get("grid", {}).get("sha256")
        if trained_on != content_hash(grid):
            # Its training simulations might be among those that the preview is measured on.
            raise InputError(
                "the network was not trained on this grid",
                where=grid,
                remedy="give the grid it was trained on",
            )
        observed = network.record.get("settings", {}).get("augmentation")
        if observed is not None:
            recipe = replace(recipe, augmentation=Augmentation.from_json(observed))
        super().__init__(recipe, grid, seed, device)
        with GlobalRandom(seed, torch.device("cpu")).swapped_in():
            network.preview = _preview(network, recipe)
        self.network = network

    def conclude(self) -> dict[str, Any]:
        """Finish the preview; the network's own scores remain what they were."""
        preview_of(self.network.cpu().eval()).compact()
        return dict(self.network.record.get("metrics", {}))

    def measured(self) -> dict[str, Any]:
        """As `ConditionalTraining.measured` returns it, ``preview`` alone."""
        return {"preview": self._of_preview()}


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


def make_training(
    recipe: Recipe, grid: str | Path, seed: int, device: torch.device, finished: str | Path | None = None
) -> Training:
    """Put a recipe to work on a grid, or what it says of a preview on a finished model.

    Parameters
    ----------
    recipe, grid, seed, device
        As for `Training`.
    finished : path, optional
        Model directory of the network that only gets a new preview.

    Returns
    -------
    Training
    """
    if finished is not None:
        return PreviewTraining(recipe, grid, seed, device, finished)
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
