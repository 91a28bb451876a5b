"""What a trained network can be taught of its own posterior: quantiles of many draws, at fewer draws' cost.

The teacher is the network, sampled with many draws for observations of training simulations. It stays as it
is; what is trained beside it is to give the same quantiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from inn.conditional import ConditionalNetwork
from inn.latent import TunedLatents, draw_latent
from inn.posterior import BATCH_ROWS, Network, draw_atmospheres, order_statistics, sorted_draws
from inn.preview import Preview, preview_of
from inn.training import AveragingTrainer, Draw, Epoch, Examples, Schedule, on_device

LEVELS = (0.05, 0.1, 0.16, 0.25, 0.5, 0.75, 0.84, 0.9, 0.95)
"""Quantile levels that are taught."""

SPREAD = (LEVELS.index(0.16), LEVELS.index(0.84))
"""Those of them whose half distance is a posterior's spread."""

NARROWEST = 1e-4
"""Smallest spread that errors are measured by, in the units of the quantiles."""

NARROWEST_SCORE = 1e-3
"""The same in normal scores."""

STATISTICS_EXAMPLES = 8192
"""Atmospheres whose distribution is a preview's scale."""

FAR = 0.5
"""Errors, in units of the spread, beyond which they count by their size and not by their square: a quantile
between two states far apart is ill-determined, and must not decide where all others lie."""


class Answered(NamedTuple):
    """Observations with the quantiles of their posteriors, one row each.

    Attributes
    ----------
    lines : Tensor, shape (n, lines_size)
        Normalised lines.
    mu, calibration_error : Tensor, shape (n,)
    quantiles : Tensor, shape (n, levels, atmosphere_size)
        On the network's own scale (`inn.posterior.ScoreDraws`), or in network units where it has
        none.
    """

    lines: Tensor
    mu: Tensor
    calibration_error: Tensor
    quantiles: Tensor

    def drawn(self, count: int, generator: torch.Generator) -> Answered:
        """So many of them by chance, with replacement."""
        chosen = torch.randint(len(self.lines), (count,), generator=generator)
        return Answered(*(column[chosen] for column in self))


def answered(
    network: Network, examples: Examples, draws: int, seed: int = 0, levels: Sequence[float] = LEVELS
) -> Answered:
    """Sample the posteriors of observations.

    Parameters
    ----------
    network : Network
    examples : Examples
        Their atmospheres are not looked at.
    draws : int
        Sobol points, of which the network's quantiles are taken.
    seed : int
        Theirs.
    levels : sequence of float
        Levels of the quantiles.

    Returns
    -------
    Answered
    """
    latent = draw_latent(draws, network.latent_size, seed)
    observed = (examples.lines, examples.mu, examples.calibration_error)
    found = []
    with torch.no_grad():
        for start, stop in _spans(len(examples.lines), max(1, BATCH_ROWS // draws)):
            lines, mu, error = (column[start:stop] for column in observed)
            drawn = draw_atmospheres(network, lines, latent.to(lines), mu, error, scores=True)
            found.append(order_statistics(sorted_draws(drawn), np.array(levels)))
    return Answered(*observed, torch.cat(found))


@dataclass(frozen=True)
class LatentSchedule:
    """How latents are tuned.

    Parameters
    ----------
    draws : tuple of int
        Numbers of points for which there is to be a set.
    epochs, steps : int
        As for `inn.training.Schedule`; each step moves one of the sets.
    rows : int
        Observations times points in a step.
    learning_rate : float
        Adam's, in units of the latents.
    average : float
        Decay of the running average of the points, per step of their set.
    observations, held_out : int
        Observations of training simulations from which is learned, and of validation simulations.
    teacher_draws : int
        Draws of which their quantiles are taken.
    """

    draws: tuple[int, ...] = (16, 24, 32, 48, 64, 96, 128)
    epochs: int = 14
    steps: int = 210
    rows: int = 3072
    learning_rate: float = 2e-2
    average: float = 0.98
    observations: int = 2048
    held_out: int = 256
    teacher_draws: int = 4096

    @property
    def schedule(self) -> Schedule:
        """The part that any training has."""
        return Schedule(
            epochs=self.epochs,
            steps=self.steps,
            batch=max(1, self.rows // min(self.draws)),
            learning_rate=self.learning_rate,
            weight_decay=0.0,
            average=self.average ** (1.0 / len(self.draws)),
            patience=self.epochs,
        )


class LatentTrainer(AveragingTrainer):
    """Least squares of the quantiles that a network's `TunedLatents` give, in units of each spread.

    Each step moves one set of points; the sets take turns.

    Parameters
    ----------
    network : Network
        The teacher, with its calibration done; it has ``latents``, which are tuned.
    train, held_out : Answered
        Observations of training and of validation simulations.
    schedule : LatentSchedule
    seed : int
        Seed of everything random here.
    """

    def __init__(
        self,
        network: Network,
        train: Answered,
        held_out: Answered,
        schedule: LatentSchedule,
        seed: int = 0,
    ) -> None:
        self._network, self._rows = network, schedule.rows
        latents = getattr(network, "latents", None)
        assert isinstance(latents, TunedLatents)
        for weights in network.parameters():  # the teacher stays as it is
            weights.requires_grad_(False)
        latents.requires_grad_(True)
        super().__init__(
            latents,
            lambda count, generator: cast(Examples, train.drawn(count, generator)),
            [cast(Examples, held_out)],
            schedule.schedule,
            seed,
        )

    def loss(self, module: nn.Module, examples: Examples, generator: torch.Generator | None) -> Tensor:
        """Error of one set's quantiles; of held-out observations, mean over all sets."""
        latents, observed = cast(TunedLatents, module), cast(Answered, examples)
        if generator is None:
            errors = [
                self._error(latents(draws), Answered(*(column[start:stop] for column in observed)))
                * ((stop - start) / len(observed.lines))
                for draws in latents.draws
                for start, stop in _spans(len(observed.lines), max(1, self._rows // draws))
            ]
            return torch.stack(errors).sum() / len(latents.draws)
        draws = latents.draws[self._steps % len(latents.draws)]
        count = max(1, self._rows // draws)
        return self._error(latents(draws), Answered(*(column[:count] for column in observed)))

    def _error(self, points: Tensor, observed: Answered) -> Tensor:
        drawn = draw_atmospheres(
            self._network, observed.lines, points, observed.mu, observed.calibration_error, scores=True
        )
        ordered = drawn.transpose(1, 2).sort(dim=-1).values
        found = order_statistics(ordered, np.array(LEVELS))
        low, high = (observed.quantiles[:, level, None] for level in SPREAD)
        error = (found - observed.quantiles) / (0.5 * (high - low)).clamp_min(NARROWEST)
        return nn.functional.huber_loss(error, torch.zeros_like(error), delta=FAR)


@dataclass(frozen=True)
class PreviewSchedule:
    """How a preview is taught.

    Parameters
    ----------
    epochs, steps, batch, learning_rate, weight_decay, average
        As for `inn.training.Schedule`.
    observations : int
        Observations of training simulations that an epoch learns from; each epoch has its own.
    held_out : int
        Observations of validation simulations.
    teacher_draws, held_out_draws : int
        Draws of which their quantiles are taken.
    measured_draws : int
        Draws of the posteriors from which the disagreement of the finished preview is measured.
    """

    epochs: int = 40
    steps: int = 200
    batch: int = 512
    learning_rate: float = 6e-3
    weight_decay: float = 1e-2
    average: float = 0.999
    observations: int = 4096
    held_out: int = 1024
    teacher_draws: int = 256
    held_out_draws: int = 1024
    measured_draws: int = 4096

    @property
    def schedule(self) -> Schedule:
        """The part that any training has."""
        return Schedule(
            epochs=self.epochs,
            steps=self.steps,
            batch=self.batch,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            average=self.average,
            patience=self.epochs,
        )


class PreviewTrainer(AveragingTrainer):
    """Huber's loss of the quantiles that a network's `Preview` gives, in units of each posterior's spread.

    Each epoch learns from observations of its own, which are drawn and sampled at its beginning: a training
    that is taken up in the middle of an epoch does this once more, and nothing of it needs to be kept.

    Parameters
    ----------
    network : ConditionalNetwork
        The teacher, with its calibration done; it has a ``preview``, which is taught.
    draw : callable
        Returns freshly augmented examples of training simulations.
    held_out : Examples
        Observations of validation simulations.
    schedule : PreviewSchedule
    seed : int
        Seed of everything random here.
    """

    def __init__(
        self,
        network: ConditionalNetwork,
        draw: Draw,
        held_out: Examples,
        schedule: PreviewSchedule,
        seed: int = 0,
    ) -> None:
        self._network, self._preview, self._examples = network, preview_of(network), draw
        self._teaching, self._own_seed = schedule, seed
        for weights in network.parameters():  # the teacher stays as it is
            weights.requires_grad_(False)
        self._preview.requires_grad_(True)
        first = self._sampled(0)
        atmosphere = draw(STATISTICS_EXAMPLES, torch.Generator().manual_seed(seed)).atmosphere
        self._preview.fit_statistics(atmosphere.to(first.lines.device), self._context(first), first.quantiles)
        self._lesson, self._lesson_of = self._in_scores(first), 0
        known = self._answers(held_out, schedule.held_out_draws, seed)
        super().__init__(
            self._preview,
            lambda count, generator: cast(Examples, self._lesson.drawn(count, generator)),
            [cast(Examples, self._in_scores(known))],
            schedule.schedule,
            seed,
        )

    def _sampled(self, epoch: int) -> Answered:
        """Observations that an epoch learns from, quantiles in network units."""
        seed = int(np.random.SeedSequence([self._own_seed, epoch]).generate_state(1)[0])
        examples = self._examples(self._teaching.observations, torch.Generator().manual_seed(seed))
        return self._answers(examples, self._teaching.teacher_draws, seed)

    def _answers(self, examples: Examples, draws: int, seed: int) -> Answered:
        # As many points cut a distribution into as many equal parts, and lie in the middle of theirs.
        levels = (np.array(self._preview.levels) * draws - 0.5) / (draws - 1)
        here = on_device(examples, next(self._preview.parameters()).device)
        found = answered(self._network, here, draws, seed, levels.clip(0.0, 1.0).tolist())
        return found._replace(quantiles=self._network.from_scores(found.quantiles))

    def _in_scores(self, known: Answered) -> Answered:
        return known._replace(quantiles=self._preview.to_scores(known.quantiles))

    def _context(self, known: Answered) -> Tensor:
        with torch.no_grad():
            return self._network.context(known.lines, known.mu, known.calibration_error)

    def step(self) -> Epoch | None:
        """Take one optimiser step; see `inn.training.Trainer.step`."""
        epoch = len(self.history)
        if epoch != self._lesson_of and not self.finished:
            self._lesson, self._lesson_of = self._in_scores(self._sampled(epoch)), epoch
        return super().step()

    def loss(self, module: nn.Module, examples: Examples, generator: torch.Generator | None) -> Tensor:
        """Mean over observations, levels and numbers."""
        preview, known = cast(Preview, module), cast(Answered, examples)
        low, high = (known.quantiles[:, level, None] for level in preview.spread)
        spread = (0.5 * (high - low)).clamp_min(NARROWEST_SCORE)
        error = (preview(self._context(known)) - known.quantiles) / spread
        return nn.functional.huber_loss(error, torch.zeros_like(error), delta=FAR)


def _spans(count: int, most: int) -> Sequence[tuple[int, int]]:
    return [(start, min(start + most, count)) for start in range(0, count, most)]
