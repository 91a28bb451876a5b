"""Training: maximum likelihood for the conditional flow, least squares for the emulator.

Grids are small and overfitting is the enemy, not capacity: batches are augmented afresh by their source, the
weights that count are a running average, held-out simulations decide which average is kept, and when to stop.

A `Trainer` goes one optimiser step at a time and can be stopped after any of them: its `Trainer.state` holds
everything that the steps to come depend on, so that a training which was interrupted ends in the same bits as
one which was not (on the same device, with the same number of threads).
"""

from __future__ import annotations

import abc
import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from inn.conditional import ConditionalNetwork
from inn.errors import MisuseError, ModelError


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


HELD_OUT_BLUR = 0.15
"""Share of the most blur at which held-out examples are judged: without any, the likelihood of atmospheres on
a thin sheet is that of the sheet."""


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
    blur : float
        Most noise that is added to every number of an atmosphere, in units of what the lines leave open of
        it (`inn.conditional.ConditionalNetwork.fit_statistics`); flow only. Each example gets a share of it,
        evenly between nothing and all, and the flow is told how much.
    """

    epochs: int = 60
    steps: int = 100
    batch: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    average: float = 0.995
    patience: int = 15
    blur: float = 0.8

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
        After the epoch's last step; of the joint network, whose rate changes between epochs only, in it.
    seconds : float
        Spent on this and the epochs before, without what was spent and lost in an interruption.
    terms : dict of str to float
        Further figures by name: terms of the loss, their weights, bandwidths.
    """

    epoch: int
    loss: float
    held_out_loss: float
    learning_rate: float
    seconds: float
    terms: dict[str, float] = field(default_factory=dict)


Report = Callable[[Epoch], None]


Rows = TypeVar("Rows")


def on_device(rows: Rows, device: torch.device) -> Rows:
    """Bring a batch, a named tuple of tensors, to a device; a tensor that is there already is not copied.

    Random numbers are drawn on the CPU whatever the network runs on: the examples do not depend on it.
    """
    columns = cast(tuple[Tensor, ...], rows)
    return type(rows)(*(column.to(device) for column in columns))


class Trainer(abc.ABC):
    """A training that goes one optimiser step at a time, and can be taken up again after any of them.

    Attributes
    ----------
    history : list of Epoch
        Epochs that are finished.
    """

    history: list[Epoch]

    @property
    @abc.abstractmethod
    def finished(self) -> bool:
        """Whether all epochs are done, or patience is exhausted."""

    @abc.abstractmethod
    def step(self) -> Epoch | None:
        """Take one optimiser step.

        Returns
        -------
        Epoch or None
            What the epoch came to, where this step ended one.

        Raises
        ------
        ModelError
            The loss is no longer a number.
        MisuseError
            The training is finished.
        """

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything that the steps to come depend on.

        Returns
        -------
        dict
            Tensors and plain values only, nested: ``torch.save`` writes it and ``torch.load`` reads it with
            ``weights_only=True``. The tensors are the trainer's own, not copies: save them before the next
            step.
        """

    @abc.abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken.

        Parameters
        ----------
        state : mapping
            Of a trainer that was constructed with the same arguments.
        """

    @abc.abstractmethod
    def finish(self) -> list[Epoch]:
        """Put the best weights into the network, in evaluation mode, and return the history."""

    def run(self, report: Report | None = None) -> list[Epoch]:
        """Take all steps that are left, and `finish`.

        Parameters
        ----------
        report : callable, optional
            Called with each epoch's `Epoch`.

        Returns
        -------
        list of Epoch
        """
        while not self.finished:
            entry = self.step()
            if entry is not None and report is not None:
                report(entry)
        return self.finish()


_GLOBAL_RANDOM = threading.Lock()


class GlobalRandom:
    """Torch's global random numbers for one trainer: dropout draws from them, and takes no generator.

    All threads of a process share them, so that trainers in several threads take their steps in turns.

    Parameters
    ----------
    seed : int
    device : torch.device
        Of the network.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._states = {
            kind: torch.Generator(kind).manual_seed(seed).get_state() for kind in {"cpu", device.type}
        }

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within, global draws go on from this object's last; outside, nobody notices."""
        cuda = self._device.type == "cuda"
        with _GLOBAL_RANDOM, torch.random.fork_rng(devices=[self._device] if cuda else []):
            torch.set_rng_state(self._states["cpu"])
            if cuda:
                torch.cuda.set_rng_state(self._states["cuda"], self._device)
            yield
            self._states["cpu"] = torch.get_rng_state()
            if cuda:
                self._states["cuda"] = torch.cuda.get_rng_state(self._device)

    def state(self) -> dict[str, Tensor]:
        """Where the draws have got to."""
        return dict(self._states)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there; what another kind of device drew means nothing here."""
        self._states.update({kind: state[kind] for kind in self._states if kind in state})


class AveragingTrainer(Trainer):
    """AdamW under a half cosine, with a running average of the weights; see `Schedule`.

    Subclasses say what the loss is. The network must be on its device, with its statistics set.

    Parameters
    ----------
    module : nn.Module
        Changed in place.
    draw : callable
        Returns freshly augmented examples.
    held_out : sequence of Examples
        Examples of simulations that `draw` never draws from.
    schedule : Schedule
    seed : int
        Seed of everything random here.
    """

    def __init__(
        self, module: nn.Module, draw: Draw, held_out: Sequence[Examples], schedule: Schedule, seed: int = 0
    ) -> None:
        self.module, self.schedule = module, schedule
        self.device = next(module.parameters()).device
        self.history = []
        self._draw = draw
        self._held_out = [on_device(examples, self.device) for examples in held_out]
        self._generator = torch.Generator().manual_seed(seed)
        self._random = GlobalRandom(seed, self.device)
        self._optimiser = torch.optim.AdamW(
            module.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
        )
        total = schedule.epochs * schedule.steps
        warm = min(200, max(total // 20, 1))
        self._rate = torch.optim.lr_scheduler.SequentialLR(
            self._optimiser,
            [
                torch.optim.lr_scheduler.LinearLR(self._optimiser, 0.01, 1.0, warm),
                torch.optim.lr_scheduler.CosineAnnealingLR(self._optimiser, max(total - warm, 1)),
            ],
            [warm],
        )
        share = 1.0 - schedule.average
        self._averaged = AveragedModel(
            module, avg_fn=lambda mean, weights, _: torch.lerp(mean, weights, share)
        )
        self._best = copy.deepcopy(module.state_dict())
        self._best_loss, self._best_epoch = float("inf"), 0
        self._steps, self._sum_of_losses, self._seconds = 0, 0.0, 0.0

    @abc.abstractmethod
    def loss(self, module: nn.Module, examples: Examples, generator: torch.Generator | None) -> Tensor:
        """Loss of a batch, a scalar; held-out examples come without a generator."""

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or patience is exhausted."""
        done = len(self.history)
        return done >= self.schedule.epochs or done - self._best_epoch >= max(self.schedule.patience, 1)

    def step(self) -> Epoch | None:
        """Take one optimiser step; see `Trainer.step`."""
        if self.finished:
            raise MisuseError("the training is finished", found=f"{len(self.history)} epochs")
        started = time.monotonic()
        with self._random.swapped_in():
            self.module.train()
            self._optimiser.zero_grad(set_to_none=True)
            examples = on_device(self._draw(self.schedule.batch, self._generator), self.device)
            value = self.loss(self.module, examples, self._generator)
            if not torch.isfinite(value):
                raise ModelError(
                    "the training loss is no longer a number",
                    found=f"epoch {len(self.history) + 1}",
                    remedy="train with a lower learning rate",
                )
            torch.autograd.backward(value)
            nn.utils.clip_grad_norm_(self.module.parameters(), 5.0)
            self._optimiser.step()
            self._rate.step()
            self._averaged.update_parameters(self.module)
        self._sum_of_losses += value.item()
        self._steps += 1
        held_out_loss = self._held_out_loss() if self._steps == self.schedule.steps else None
        self._seconds += time.monotonic() - started
        return None if held_out_loss is None else self._end_epoch(held_out_loss)

    def _held_out_loss(self) -> float:
        """Mean over the held-out examples, with the averaged weights."""
        module = self._averaged.module.eval()
        with self._random.swapped_in(), torch.no_grad():
            losses = [self.loss(module, examples, None).item() for examples in self._held_out]
        return sum(losses) / len(losses)

    def _end_epoch(self, held_out_loss: float) -> Epoch:
        entry = Epoch(
            len(self.history) + 1,
            self._sum_of_losses / self.schedule.steps,
            held_out_loss,
            float(self._rate.get_last_lr()[0]),
            self._seconds,
        )
        self.history.append(entry)
        if held_out_loss < self._best_loss:
            self._best_loss, self._best_epoch = held_out_loss, entry.epoch
            self._best = copy.deepcopy(self._averaged.module.state_dict())
        self._steps, self._sum_of_losses = 0, 0.0
        return entry

    def state(self) -> dict[str, Any]:
        """Everything that the steps to come depend on; see `Trainer.state`."""
        return {
            "module": self.module.state_dict(),
            "averaged": self._averaged.state_dict(),
            "best": self._best,
            "best_loss": self._best_loss,
            "best_epoch": self._best_epoch,
            "optimiser": self._optimiser.state_dict(),
            "rate": self._rate.state_dict(),
            "generator": self._generator.get_state(),
            "random": self._random.state(),
            "history": [asdict(entry) for entry in self.history],
            "steps": self._steps,
            "sum_of_losses": self._sum_of_losses,
            "seconds": self._seconds,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken; see `Trainer.restore`."""
        self.module.load_state_dict(state["module"])
        self._averaged.load_state_dict(state["averaged"])
        self._best = copy.deepcopy(state["best"])
        self._best_loss, self._best_epoch = state["best_loss"], state["best_epoch"]
        # These two keep and change what they are given.
        self._optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self._rate.load_state_dict(copy.deepcopy(state["rate"]))
        self._generator.set_state(state["generator"])
        self._random.restore(state["random"])
        self.history = [Epoch(**entry) for entry in state["history"]]
        self._steps, self._sum_of_losses = state["steps"], state["sum_of_losses"]
        self._seconds = state["seconds"]

    def finish(self) -> list[Epoch]:
        """Put the averaged weights of the best epoch into the network; see `Trainer.finish`."""
        self.module.load_state_dict(self._best)
        self.module.eval()
        return self.history


class LikelihoodTrainer(AveragingTrainer):
    """Maximum likelihood of the conditional flow's leading components.

    The principal components and the standardisation must have been set (`fit_statistics`). `run` ends with
    the averaged weights of the epoch that was best on the held-out examples.
    """

    def loss(self, module: nn.Module, examples: Examples, generator: torch.Generator | None) -> Tensor:
        """Negative log likelihood per component."""
        network = cast(ConditionalNetwork, module)
        leading, count = network.components, examples.mu.shape[0]
        components = network.to_components(examples.atmosphere)[:, :leading]
        if generator is None:  # held-out examples are blurred as well, little, and the same way each time
            generator = torch.Generator().manual_seed(0)
            blur = torch.full((count,), HELD_OUT_BLUR)
        else:
            blur = torch.rand(count, generator=generator)
        blur, noise = (
            values.to(components) for values in (blur, torch.randn(components.shape, generator=generator))
        )
        # The rotation leaves such noise as it is; whitening does not.
        spread = self.schedule.blur / network.component_scale[:leading]
        components = components + blur[:, None] * spread * noise
        context = network.context(examples.lines, examples.mu, examples.calibration_error, blur)
        return -network.components_log_prob(components, context).mean() / leading


class LeastSquaresTrainer(AveragingTrainer):
    """Least squares of the emulator's clean lines, whose standardisation must have been set."""

    def loss(self, module: nn.Module, examples: Examples, generator: torch.Generator | None) -> Tensor:
        """Mean squared error of the normalised lines."""
        emulated: Tensor = module(examples.atmosphere, examples.microturbulence, examples.mu)
        return (emulated - examples.lines).square().mean()
