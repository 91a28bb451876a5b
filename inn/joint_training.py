"""Training the joint network by the recipe it was published with.

Forward and backward losses alternate within every step, their weights and the padding follow a curriculum of
12,000 epochs, and the bandwidths of the discrepancies are found anew every few epochs (Osborne, Armstrong &
Fletcher 2019, ApJ 873, 128, section 3.3, doi:10.3847/1538-4357/ab07b4). `JointSchedule` holds the numbers,
`inn.losses` the terms.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inn.errors import MisuseError, ModelError
from inn.joint import JointNetwork
from inn.losses import (
    backward_losses,
    fade_in,
    forward_losses,
    mmd2,
    prediction_weight,
    turning_point,
    whole,
)
from inn.training import Draw, Epoch, Examples, Trainer, on_device

HELD_OUT_ROWS = 1_000
"""Held-out examples in one pass of the network: more serve no cache."""

TERMS = ("forward_mse", "latent_mmd", "backward_mse", "reverse_mmd")
"""The loss's terms in training, without their weights, as `Epoch.terms` names them."""


@dataclass(frozen=True)
class JointSchedule:
    """How the joint network is trained; the defaults are the paper's.

    Below, n is the number of finished epochs: 0 in the first one, as in the paper's public code.

    Parameters
    ----------
    epochs : int
        The whole curriculum.
    steps : int
        Optimiser steps (minibatches) in an epoch.
    batch : int
        Examples in a step.
    learning_rate : float
        Adam's, at first.
    decay : float
        The learning rate's factor every ``decay_epochs``.
    decay_epochs : float
        That is, the rate is ``learning_rate * decay ** floor(n / decay_epochs)``. (At the paper's chosen
        epoch 11,400 these numbers give 2.94e-5; the 3.38e-5 it quotes are those of epoch 11,000.)
    betas : tuple of float
        Adam's decays of both moments.
    epsilon : float
        Adam's guard against a division by zero.
    weight_decay : float
        Of the squared weights, as part of the gradient (Adam, not AdamW).
    clamp : float
        Largest modulus of a gradient's component, forward and backward losses together.
    w_pred, w_latent, w_rev : float
        Weights of the squared errors (at first), of the latent's discrepancy and of the reverse one.
    w_pred_increment : float
        What every stage after the first adds to ``w_pred``; see `inn.losses.prediction_weight`.
    fade_epochs : float
        Length of the first stage, N_fade. In its first two fifths xi = (n / (0.4 N_fade))^3 grows from 0 to 1
        as a factor of ``w_rev``, and the padding noise falls to nothing.
    early_epochs, early_until, late_epochs : float
        Length of the stages up to epoch ``early_until``, and of those after it.
    padding_noise : float
        Standard deviation of what replaces the zeros of all padding, on both sides, times 1 - xi.
    latent_bandwidths, reverse_bandwidths : tuple of float
        Of the discrepancies before their first search, as sums of kernels; and of the held-out discrepancies
        throughout, so that these can be compared between epochs.
    bandwidth_epochs : float
        Epochs between two searches; where it is below one, every epoch ends with a search.
    patience : int, optional
        Epochs, after the fade-in, without a better held-out loss after which training stops. The paper's
        curriculum knows none.
    """

    epochs: int = 12_000
    steps: int = 20
    batch: int = 500
    learning_rate: float = 1.5e-3
    decay: float = 0.004 ** (1.0 / 1333.0)
    decay_epochs: float = 12.0
    betas: tuple[float, float] = (0.8, 0.8)
    epsilon: float = 1e-6
    weight_decay: float = 2e-5
    clamp: float = 15.0
    w_pred: float = 4000.0
    w_latent: float = 900.0
    w_rev: float = 1000.0
    w_pred_increment: float = 1000.0
    fade_epochs: float = 800.0
    early_epochs: float = 400.0
    early_until: float = 4800.0
    late_epochs: float = 600.0
    padding_noise: float = 5e-2
    latent_bandwidths: tuple[float, ...] = (8.0, 11.0)
    reverse_bandwidths: tuple[float, ...] = (1.4, 2.0, 5.5, 7.0)
    bandwidth_epochs: float = 5.0
    patience: int | None = None

    def scaled(self, epochs: int) -> JointSchedule:
        """The same curriculum in another number of epochs.

        Every length that is counted in epochs changes in proportion: the first stage and with it fade-in and
        padding noise, the stages of ``w_pred``, the intervals of the learning rate's decay and of the
        bandwidths' search. All stages and the whole fall of the learning rate are thus gone through, by fewer
        optimiser steps; steps in an epoch, their batches, the learning rates' range and the weights stay. It
        is a shorter training, not an equivalent one.

        Parameters
        ----------
        epochs : int
            At least one.

        Returns
        -------
        JointSchedule

        Raises
        ------
        MisuseError
            If there is no epoch.
        """
        if epochs < 1:
            raise MisuseError("training takes at least one epoch", where="epochs", found=epochs)
        share = epochs / self.epochs
        return replace(
            self,
            epochs=epochs,
            decay_epochs=share * self.decay_epochs,
            fade_epochs=share * self.fade_epochs,
            early_epochs=share * self.early_epochs,
            early_until=share * self.early_until,
            late_epochs=share * self.late_epochs,
            bandwidth_epochs=share * self.bandwidth_epochs,
        )

    def learning_rate_at(self, elapsed: int) -> float:
        """The learning rate after so many epochs."""
        return self.learning_rate * self.decay ** whole(elapsed, self.decay_epochs)

    def xi_at(self, elapsed: int) -> float:
        """The reverse discrepancy's factor after so many epochs, 0 to 1."""
        return fade_in(elapsed, self.fade_epochs)

    def padding_noise_at(self, elapsed: int) -> float:
        """The padding's standard deviation after so many epochs."""
        return self.padding_noise * (1.0 - self.xi_at(elapsed))

    def w_pred_at(self, elapsed: int) -> float:
        """The squared errors' weight after so many epochs."""
        return prediction_weight(
            elapsed,
            self.w_pred,
            self.w_pred_increment,
            self.fade_epochs,
            self.early_epochs,
            self.early_until,
            self.late_epochs,
        )

    def searches_at(self, elapsed: int) -> bool:
        """Whether bandwidths are searched when so many epochs are finished."""
        return whole(elapsed, self.bandwidth_epochs) > whole(elapsed - 1, self.bandwidth_epochs)

    def to_json(self) -> dict[str, Any]:
        """The settings, as JSON holds them."""
        return asdict(self)


class JointTrainer(Trainer):
    """Trains the joint network as it was published; see `JointSchedule`.

    One step draws a minibatch, accumulates the gradients of the forward loss and then of the backward loss,
    which takes the latent that the forward pass predicted, clamps them, and lets Adam go one step.

    The held-out loss is the paper's: the mean squared error of the lines that the network predicts, from
    atmospheres padded with zeros. The weights that `finish` keeps are those of the epoch that is best by it,
    of the epochs whose xi is 1: before, a network may predict lines well and have learned nothing of the
    inverse. If there was no such epoch the last weights stay.

    Bandwidths are found on a minibatch drawn for it from the training examples (held-out ones should do
    nothing but choose the weights), with zero padding, and used from the next epoch on.

    `Epoch.loss` is the sum of all weighted terms. `Epoch.terms` holds, each without its weight, the means
    over the epoch's steps ``forward_mse`` (lines and padding), ``latent_mmd``, ``backward_mse`` (atmosphere
    and padding), ``reverse_mmd``; ``held_out_forward_mse`` (lines alone), ``held_out_latent_mmd`` and
    ``held_out_reverse_mmd``, at the schedule's fixed bandwidths, on the same examples with the same latents
    each time; ``bandwidth_latent`` and ``bandwidth_reverse`` as the epoch used them, the geometric mean where
    kernels were added; ``w_pred``, ``w_latent``, ``w_rev``, ``xi`` and ``padding_noise``. Discrepancies are
    squared (`inn.losses.mmd2`) and never below about 2 / batch, even between samples of one distribution.

    Parameters
    ----------
    network : JointNetwork
        Changed in place, on its own device.
    draw : callable
        Returns training examples; of these only atmosphere and lines are used.
    held_out : sequence of Examples
        Examples of simulations that `draw` never draws from.
    schedule : JointSchedule
    seed : int
        Seed of everything random here. Random numbers are drawn on the CPU, so that a training can change
        its device.

    Raises
    ------
    MisuseError
        There are no held-out examples.
    """

    def __init__(
        self,
        network: JointNetwork,
        draw: Draw,
        held_out: Sequence[Examples],
        schedule: JointSchedule | None = None,
        seed: int = 0,
    ) -> None:
        self.network = network
        self.schedule = schedule = JointSchedule() if schedule is None else schedule
        self.history = []
        weights = next(network.parameters())
        self._device, self._dtype = weights.device, weights.dtype
        self._draw = draw
        self._generator = torch.Generator().manual_seed(seed)
        self._optimiser = torch.optim.Adam(
            network.parameters(),
            lr=schedule.learning_rate,
            betas=schedule.betas,
            eps=schedule.epsilon,
            weight_decay=schedule.weight_decay,
            fused=self._device.type in ("cpu", "cuda"),  # one pass over the weights instead of ten
        )
        self._latent_bandwidths: tuple[float, ...] = schedule.latent_bandwidths
        self._reverse_bandwidths: tuple[float, ...] = schedule.reverse_bandwidths
        self._best: dict[str, Tensor] | None = None
        self._best_loss, self._best_epoch = math.inf, 0
        self._steps, self._seconds = 0, 0.0
        self._sums = torch.zeros(len(TERMS), dtype=torch.float64, device=self._device)
        if not sum(len(examples.lines) for examples in held_out):
            raise MisuseError("the weights to keep are chosen on held-out examples, and there are none")
        self._held_out = [self._prepared(examples) for examples in held_out]
        atmosphere, lines = (torch.cat(parts) for parts in zip(*self._held_out, strict=True))
        # Enough to see a trend: the discrepancies' cost grows with the square.
        rows = torch.linspace(0, len(lines) - 1, min(schedule.batch, len(lines))).round().long()
        self._compared = atmosphere[rows], lines[rows]
        fixed = torch.Generator().manual_seed(seed)
        self._compared_latent, self._drawn_latent = (
            torch.randn(len(rows), network.latent_size, generator=fixed).to(atmosphere) for _ in range(2)
        )

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or patience is exhausted."""
        done, patience = len(self.history), self.schedule.patience
        exhausted = patience is not None and self._best is not None and done - self._best_epoch >= patience
        return done >= self.schedule.epochs or exhausted

    def step(self) -> Epoch | None:
        """Take one optimiser step; see `Trainer.step`. What is no number is found when the epoch ends."""
        if self.finished:
            raise MisuseError("the training is finished", found=f"{len(self.history)} epochs")
        started = time.monotonic()
        self._learn()
        self._steps += 1
        if self._steps < self.schedule.steps:
            self._seconds += time.monotonic() - started
            return None
        terms = self._terms()
        if self.schedule.searches_at(len(self.history) + 1):
            self._search()
        self._seconds += time.monotonic() - started
        return self._end_epoch(terms)

    def _learn(self) -> None:
        """Accumulate both directions' gradients on one minibatch, clamp them, and move the weights."""
        network, schedule, done = self.network, self.schedule, len(self.history)
        weight, noise = schedule.w_pred_at(done), schedule.padding_noise_at(done)
        network.train()
        self._optimiser.param_groups[0]["lr"] = schedule.learning_rate_at(done)
        self._optimiser.zero_grad(set_to_none=True)
        atmosphere, lines = self._prepared(self._draw(schedule.batch, self._generator))
        padded = network.pad_atmosphere(
            atmosphere, self._padding(len(lines), network.width - network.layout.atmosphere_size, noise)
        )
        error, discrepancy, latent = forward_losses(
            network, padded, self._target(lines, self._normal(lines), noise), self._latent_bandwidths
        )
        torch.autograd.backward(weight * error + schedule.w_latent * discrepancy)
        back_error, back_discrepancy = backward_losses(
            network,
            padded,
            self._target(lines, latent, noise),
            self._target(lines, self._normal(lines), noise),
            self._reverse_bandwidths,
        )
        reverse_weight = schedule.w_rev * schedule.xi_at(done)
        torch.autograd.backward(0.5 * weight * back_error + reverse_weight * back_discrepancy)
        nn.utils.clip_grad_value_(network.parameters(), schedule.clamp)
        self._optimiser.step()
        # Left on the device: to look at them would make the CPU wait in every step.
        self._sums += torch.stack((error, discrepancy, back_error, back_discrepancy)).detach()

    @torch.no_grad()
    def _terms(self) -> dict[str, float]:
        """What `Epoch.terms` holds of the epoch whose steps are done."""
        network, schedule, done = self.network, self.schedule, len(self.history)
        terms = dict(zip(TERMS, (self._sums / self._steps).tolist(), strict=True))
        if not all(math.isfinite(value) for value in terms.values()):
            raise ModelError(
                "the training loss is no longer a number",
                found=f"epoch {done + 1}: {terms}",
                remedy="train with a lower learning rate",
            )
        network.eval()
        squares, count = 0.0, 0
        for atmospheres, spectra in self._held_out:
            for atmosphere, lines in zip(
                torch.split(atmospheres, HELD_OUT_ROWS), torch.split(spectra, HELD_OUT_ROWS), strict=True
            ):
                squares += float((network(atmosphere)[0] - lines).double().square().sum())
                count += lines.numel()
        atmosphere, lines = self._compared
        generated, target, sampled = self._compare(
            atmosphere, lines, self._compared_latent, self._drawn_latent
        )
        return terms | {
            "held_out_forward_mse": squares / count,
            "held_out_latent_mmd": float(mmd2(generated, target, schedule.latent_bandwidths)),
            "held_out_reverse_mmd": float(mmd2(sampled, atmosphere, schedule.reverse_bandwidths)),
            "bandwidth_latent": _geometric_mean(self._latent_bandwidths),
            "bandwidth_reverse": _geometric_mean(self._reverse_bandwidths),
            "w_pred": schedule.w_pred_at(done),
            "w_latent": schedule.w_latent,
            "w_rev": schedule.w_rev,
            "xi": schedule.xi_at(done),
            "padding_noise": schedule.padding_noise_at(done),
        }

    @torch.no_grad()
    def _search(self) -> None:
        """Find both bandwidths anew."""
        self.network.eval()
        atmosphere, lines = self._prepared(self._draw(self.schedule.batch, self._generator))
        generated, target, sampled = self._compare(
            atmosphere, lines, self._normal(lines), self._normal(lines)
        )
        self._latent_bandwidths = (turning_point(generated, target),)
        self._reverse_bandwidths = (turning_point(sampled, atmosphere),)

    def _compare(
        self, atmosphere: Tensor, lines: Tensor, compared: Tensor, drawn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lines with latent: predicted, and true ones with `compared`; atmospheres inferred with `drawn`."""
        predicted, latent = self.network(atmosphere)
        generated, target = torch.cat((predicted, latent), dim=1), torch.cat((lines, compared), dim=1)
        return generated, target, self.network.inverse(lines, drawn)

    def _end_epoch(self, terms: dict[str, float]) -> Epoch:
        schedule, done = self.schedule, len(self.history)
        loss = (
            terms["w_pred"] * (terms["forward_mse"] + 0.5 * terms["backward_mse"])
            + terms["w_latent"] * terms["latent_mmd"]
            + terms["w_rev"] * terms["xi"] * terms["reverse_mmd"]
        )
        held_out_loss = terms["held_out_forward_mse"]
        entry = Epoch(done + 1, loss, held_out_loss, schedule.learning_rate_at(done), self._seconds, terms)
        self.history.append(entry)
        if terms["xi"] == 1.0 and held_out_loss < self._best_loss:
            self._best_loss, self._best_epoch = held_out_loss, entry.epoch
            self._best = copy.deepcopy(self.network.state_dict())
        self._steps = 0
        self._sums = torch.zeros_like(self._sums)
        return entry

    def _prepared(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Atmospheres and lines as the network takes them."""
        moved = on_device(examples, self._device)
        return moved.atmosphere.to(self._dtype), moved.lines.to(self._dtype)

    def _normal(self, like: Tensor) -> Tensor:
        """Standard normal latents for as many rows."""
        return self._padding(len(like), self.network.latent_size, 1.0)

    def _padding(self, rows: int, columns: int, deviation: float) -> Tensor:
        """Normal numbers of some standard deviation, drawn on the CPU whatever the device."""
        if deviation == 0.0:
            return torch.zeros(rows, columns, device=self._device, dtype=self._dtype)
        drawn = torch.randn(rows, columns, generator=self._generator)
        return deviation * drawn.to(self._device, self._dtype)

    def _target(self, lines: Tensor, latent: Tensor, deviation: float) -> Tensor:
        """Padded vectors of the lines' side."""
        free = self.network.width - self.network.latent_size - self.network.layout.lines_size
        return self.network.pad_lines(lines, latent, self._padding(len(lines), free, deviation))

    def state(self) -> dict[str, Any]:
        """Everything that the steps to come depend on; see `Trainer.state`."""
        return {
            "module": self.network.state_dict(),
            "best": self._best,
            "best_loss": self._best_loss,
            "best_epoch": self._best_epoch,
            "optimiser": self._optimiser.state_dict(),
            "generator": self._generator.get_state(),
            "latent_bandwidths": list(self._latent_bandwidths),
            "reverse_bandwidths": list(self._reverse_bandwidths),
            "history": [asdict(entry) for entry in self.history],
            "steps": self._steps,
            "sums": self._sums,
            "seconds": self._seconds,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken; see `Trainer.restore`."""
        self.network.load_state_dict(state["module"])
        self._best = copy.deepcopy(state["best"])
        self._best_loss, self._best_epoch = state["best_loss"], state["best_epoch"]
        # The optimiser keeps and changes what it is given.
        self._optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self._generator.set_state(state["generator"].cpu())
        self._latent_bandwidths = tuple(state["latent_bandwidths"])
        self._reverse_bandwidths = tuple(state["reverse_bandwidths"])
        self.history = [Epoch(**entry) for entry in state["history"]]
        self._steps, self._seconds = state["steps"], state["seconds"]
        self._sums = state["sums"].to(self._device, copy=True)

    def finish(self) -> list[Epoch]:
        """Put the weights of the best epoch into the network; see `Trainer.finish`."""
        if self._best is not None:
            self.network.load_state_dict(self._best)
        self.network.eval()
        return self.history


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))
