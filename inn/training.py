"""Training loops: maximum likelihood for the conditional flow, least squares for the emulator.

Grids are small and overfitting is the enemy, not capacity: batches are augmented afresh by their source, the
weights that count are a running average, held-out simulations decide which average is kept, and when to stop.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from inn.conditional import ConditionalNetwork
from inn.emulator import Emulator
from inn.errors import ModelError


class Examples(Protocol):
    """One batch of examples, a row each."""

    @property
    def atmosphere(self) -> Tensor:
        """Network units, shape (n, atmosphere_size)."""

    @property
    def lines(self) -> Tensor:
        """Normalised lines, shape (n, lines_size)."""

    @property
    def mu(self) -> Tensor:
        """Cosine of the heliocentric angle, shape (n,)."""

    @property
    def calibration_error(self) -> Tensor:
        """Relative error between the lines, shape (n,)."""

    @property
    def microturbulence(self) -> Tensor:
        """Microturbulent velocity in km/s, shape (n,)."""


Draw = Callable[[int, torch.Generator], Examples]
"""Source of training batches: how many examples, and the generator that all random numbers come from."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Parameters
    ----------
    epochs : int
        Most epochs; the learning rate falls to nothing over them along a half cosine.
    steps : int
        Optimiser steps in an epoch.
    batch : int
        Examples in a step.
    learning_rate, weight_decay : float
        AdamW's.
    average : float
        Decay of the running average of the weights, per step.
    patience : int
        Epochs without a better held-out loss after which training stops.
    component_noise : float
        Noise added to whitened components, in their standard deviations (flow only).
    """

    epochs: int = 60
    steps: int = 100
    batch: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    average: float = 0.995
    patience: int = 15
    component_noise: float = 0.05

    def to_json(self) -> dict[str, Any]:
        """The settings, as JSON holds them."""
        return asdict(self)


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to.

    Parameters
    ----------
    epoch : int
        Counted from one.
    loss, held_out_loss : float
        Mean over the epoch's batches, and on the held-out examples with the averaged weights. Flow: negative
        log likelihood per component; emulator: mean squared error.
    learning_rate : float
    seconds : float
        Since training began.
    """

    epoch: int
    loss: float
    held_out_loss: float
    learning_rate: float
    seconds: float


Report = Callable[[Epoch], None]


def fit_flow(
    network: ConditionalNetwork,
    draw: Draw,
    held_out: Sequence[Examples],
    schedule: Schedule,
    seed: int = 0,
    report: Report | None = None,
) -> list[Epoch]:
    """Train the flow on its leading components by maximum likelihood.

    The principal components and the standardisation must have been set (`fit_statistics`). The network ends
    with the averaged weights of the epoch that was best on the held-out examples.

    Parameters
    ----------
    network : ConditionalNetwork
        Changed in place.
    draw : callable
        Returns freshly augmented examples.
    held_out : sequence of Examples
        Examples of simulations that `draw` never draws from.
    schedule : Schedule
    seed : int
        Seed of everything random here.
    report : callable, optional
        Called with each epoch's `Epoch`.

    Returns
    -------
    list of Epoch

    Raises
    ------
    ModelError
        The loss is no longer a number.
    """
    leading = network.components

    def loss(model: nn.Module, examples: Examples, generator: torch.Generator | None) -> Tensor:
        assert isinstance(model, ConditionalNetwork)
        components = model.to_components(examples.atmosphere)[:, :leading]
        if generator is not None:
            noise = torch.randn(components.shape, generator=generator).to(components)
            components = components + schedule.component_noise * noise
        context = model.context(examples.lines, examples.mu, examples.calibration_error)
        return -model.components_log_prob(components, context).mean() / leading

    return _fit(network, loss, draw, held_out, schedule, seed, report)


def fit_emulator(
    emulator: Emulator,
    draw: Draw,
    held_out: Sequence[Examples],
    schedule: Schedule,
    seed: int = 0,
    report: Report | None = None,
) -> list[Epoch]:
    """Train the emulator by least squares on clean lines; see `fit_flow` for the parameters."""

    def loss(model: nn.Module, examples: Examples, _: torch.Generator | None) -> Tensor:
        emulated: Tensor = model(examples.atmosphere, examples.microturbulence, examples.mu)
        return (emulated - examples.lines).square().mean()

    return _fit(emulator, loss, draw, held_out, schedule, seed, report)


def _fit(
    module: nn.Module,
    loss: Callable[[nn.Module, Examples, torch.Generator | None], Tensor],
    draw: Draw,
    held_out: Sequence[Examples],
    schedule: Schedule,
    seed: int,
    report: Report | None,
) -> list[Epoch]:
    generator = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    total = schedule.epochs * schedule.steps
    warm = min(200, max(total // 20, 1))
    rate = torch.optim.lr_scheduler.SequentialLR(
        optimiser,
        [
            torch.optim.lr_scheduler.LinearLR(optimiser, 0.01, 1.0, warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(total - warm, 1)),
        ],
        [warm],
    )
    share = 1.0 - schedule.average
    averaged = AveragedModel(module, avg_fn=lambda mean, weights, _: torch.lerp(mean, weights, share))
    best_state, best_loss, best_epoch = copy.deepcopy(module.state_dict()), float("inf"), 0
    history: list[Epoch] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for dropout, which takes no generator
        for number in range(1, schedule.epochs + 1):
            module.train()
            sum_of_losses = 0.0
            for _ in range(schedule.steps):
                optimiser.zero_grad(set_to_none=True)
                value = loss(module, draw(schedule.batch, generator), generator)
                if not torch.isfinite(value):
                    raise ModelError(
                        "the training loss is no longer a number",
                        found=f"epoch {number}",
                        remedy="train with a lower learning rate",
                    )
                torch.autograd.backward(value)
                nn.utils.clip_grad_norm_(module.parameters(), 5.0)
                optimiser.step()
                rate.step()
                averaged.update_parameters(module)
                sum_of_losses += value.item()
            averaged.module.eval()
            with torch.no_grad():
                held_out_losses = [loss(averaged.module, examples, None).item() for examples in held_out]
            entry = Epoch(
                number,
                sum_of_losses / schedule.steps,
                sum(held_out_losses) / len(held_out_losses),
                float(rate.get_last_lr()[0]),
                time.monotonic() - started,
            )
            history.append(entry)
            if report is not None:
                report(entry)
            if entry.held_out_loss < best_loss:
                best_loss, best_epoch = entry.held_out_loss, number
                best_state = copy.deepcopy(averaged.module.state_dict())
            elif number - best_epoch >= schedule.patience:
                break
    module.load_state_dict(best_state)
    module.eval()
    return history
