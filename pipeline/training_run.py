"""One training, where it is done: on a worker of a cluster, or in this process.

Whoever is handed an `Order` looks into the training's folder, goes on from the last checkpoint there, and
ends in the same model, in the same bits, as one that was never interrupted.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from distributed import Reschedule, Status, get_worker
from threadpoolctl import threadpool_limits

from inn.checkpoint import model_hash, save_model
from inn.training import Epoch, Trainer
from pipeline.errors import ClusterError, InputError, MisuseError, StoreError
from pipeline.history_figure import history_figure
from pipeline.recipes import Recipe, make_training
from pipeline.training_folder import (
    FIGURE_FILE,
    HISTORY_FILE,
    Reporter,
    Standing,
    TrainingFolder,
    read_history,
    write_whole,
)
from pipeline.training_set import content_hash, grid_description

logger = logging.getLogger("flarefield")

PATIENCE = 120.0
"""Seconds to wait for a process that trains the same model and that its cluster has given up."""


@dataclass(frozen=True)
class Order:
    """All that a worker needs to know of a training.

    Attributes
    ----------
    grid, model : str
        Absolute paths of the grid store and of the model directory to write.
    name : str
        The recipe's.
    recipe : Recipe
    seed : int
    finished : str or None
        Absolute path of the model whose network only gets a new preview.
    finished_hash : str or None
        Its `inn.model_hash`.
    run : str
        Identity of the training: hash of everything that decides the network.
    grid_hash : str
        The grid's `content_hash`.
    threads : int
        Torch's.
    gpu : bool
        Whether the cluster promises a GPU.
    call : str
        For the record.
    cluster : str
        Who does it.
    checkpoint_seconds : float
        Least time between two checkpoints within a stage.
    checkpoint_epochs : int or None
        Epochs after which there is one in any case.
    """

    grid: str
    model: str
    name: str
    recipe: Recipe
    seed: int
    finished: str | None
    finished_hash: str | None
    run: str
    grid_hash: str
    threads: int
    gpu: bool
    call: str
    cluster: str
    checkpoint_seconds: float
    checkpoint_epochs: int | None


class Unwanted(Exception):
    """Nobody wants the training any more, here; its state is saved."""


def run_on_worker(order: Order) -> dict[str, Any]:
    """Do a training as a task of a Dask worker; see `run`.

    A task that was cancelled goes on in its thread, for no thread can be ended from outside: this one looks,
    after each step, whether it is still wanted, saves its state and leaves if it is not.

    Parameters
    ----------
    order : Order

    Returns
    -------
    dict
        The model's record.

    Raises
    ------
    distributed.Reschedule
        It is no longer wanted here.
    FlareFieldError
        As `run` raises it.
    """
    worker = get_worker()
    key = worker.get_current_task()

    def wanted() -> bool:
        task = worker.state.tasks.get(key)
        return (
            task is not None
            and task.state in ("executing", "long-running")
            and worker.status in (Status.running, Status.paused)
        )

    try:
        return run(order, wanted)
    except Unwanted:
        raise Reschedule from None


def run(order: Order, wanted: Callable[[], bool]) -> dict[str, Any]:
    """Do a training, or what is left of it.

    Parameters
    ----------
    order : Order
    wanted : callable
        Asked after each step whether to go on.

    Returns
    -------
    dict
        The model's record.

    Raises
    ------
    Unwanted
        It was not.
    FlareFieldError
        What a person has to mend; the training's folder tells it, too.
    """
    folder = TrainingFolder(order.model)
    try:
        return _run(order, folder, wanted)
    except Unwanted:
        raise
    except Exception as error:
        # Before the training was begun, nothing else would tell whoever asks how it is doing.
        folder.end_submission(f"{type(error).__name__}: {error}")
        raise


def _run(order: Order, folder: TrainingFolder, wanted: Callable[[], bool]) -> dict[str, Any]:
    with folder.locked(PATIENCE) as there:
        record = folder.record()
        complete = record is not None and record.get("run") == order.run
        if record is not None and not complete:
            raise MisuseError(
                "the output exists", where=folder.model, remedy="remove it, or name another directory"
            )
        if there and not complete:
            record = _go_on(order, folder, wanted)
        if there:
            _deliver(folder)
    if record is None:
        raise StoreError(
            "the folder of the training is not there",
            where=folder.path,
            remedy="name a model on a file system that all workers see under the same path; if the folder "
            "was removed, run the same command again: it starts over",
        )
    folder.remove()
    return record


def finish(folder: TrainingFolder) -> None:
    """Bring the history to a complete model, if a kill came between, and remove the training's folder.

    Parameters
    ----------
    folder : TrainingFolder
        Of a model that is complete.
    """
    with folder.locked(PATIENCE) as there:
        if there:
            _deliver(folder)
    folder.remove()


def _go_on(order: Order, folder: TrainingFolder, wanted: Callable[[], bool]) -> dict[str, Any]:
    """Train from the last checkpoint to the complete model."""
    before = folder.standing()
    standing = Standing(
        starts=1 if before is None else before.starts + 1, threads=order.threads, cluster=order.cluster
    )
    with Reporter(folder, standing) as reporter, _threads(order.threads):
        folder.begun()
        try:
            standing.device = _device(order.gpu).type
            return _Run(order, folder, reporter, wanted).complete()
        except Unwanted:
            standing.state = "stopped"
            raise
        except Exception as error:
            standing.state, standing.error = "failed", f"{type(error).__name__}: {error}"
            raise


@contextmanager
def _threads(count: int) -> Iterator[None]:
    # A Dask worker presets one; and sums in another order have other bits. NumPy's and SciPy's products, of
    # which examples are made, are small, and have one thread everywhere.
    before = torch.get_num_threads()
    with threadpool_limits(1, user_api="blas"):
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _device(gpu: bool) -> torch.device:
    if not torch.cuda.is_available():
        if gpu:
            raise ClusterError(
                "the worker offers a GPU that its torch cannot use",
                found=f"torch {torch.__version__}",
                remedy="install torch with CUDA there, or start the worker without --resources GPU=1",
            )
        return torch.device("cpu")
    # Without these, sums of the same numbers come in any order.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device("cuda")


class _Run:
    """A training under way in this process."""

    def __init__(
        self, order: Order, folder: TrainingFolder, reporter: Reporter, wanted: Callable[[], bool]
    ) -> None:
        self._order, self._folder, self._reporter, self._wanted = order, folder, reporter, wanted
        self._standing = reporter.standing
        self._started = time.monotonic()
        if content_hash(order.grid) != order.grid_hash:
            raise InputError(
                "the grid has changed since the training began",
                where=order.grid,
                remedy="train on it as another model, or bring the old grid back",
            )
        if order.finished is not None and model_hash(order.finished) != order.finished_hash:
            raise InputError(
                "the finished model has changed since the training began",
                where=order.finished,
                remedy="teach it a preview as another model, or bring the old one back",
            )
        device = torch.device(self._standing.device)
        self._training = make_training(order.recipe, order.grid, order.seed, device, order.finished)
        self._histories: dict[str, list[Epoch]] = {}
        self._network: dict[str, Any] | None = None
        self._saved = time.monotonic()
        self._checkpoint = folder.load_checkpoint() or {}
        self._before = float(self._checkpoint.get("seconds", 0.0))
        self._resume()

    def _resume(self) -> None:
        """Take over what the checkpoint says of finished stages."""
        if not self._checkpoint:
            return
        if self._checkpoint["device"] != self._standing.device:
            logger.warning(
                "the training goes on on %s, and was on %s: its numbers will differ in their last digits",
                self._standing.device,
                self._checkpoint["device"],
            )
        for stage, history in self._checkpoint["histories"].items():
            self._histories[stage] = [Epoch(**entry) for entry in history]
            self._reporter.add(stage, self._histories[stage])
        if (network := self._checkpoint["network"]) is not None:
            self._training.network.load_state_dict(network)
            self._network = network

    @property
    def _seconds(self) -> float:
        """Spent on all this, without what was lost."""
        return self._before + time.monotonic() - self._started

    def complete(self) -> dict[str, Any]:
        """Go through the stages that are left, score the network and save the model."""
        for stage in self._training.stages:
            if stage not in self._histories:
                self._go_through(stage)
        self._standing.stage = "scoring"
        self._reporter.flush()
        metrics = self._training.conclude()
        order, training = self._order, self._training
        recipe, network = training.recipe, training.network
        record = {
            "run": order.run,
            "recipe": order.name,
            "settings": recipe.to_json(),
            "seed": order.seed,
            "call": order.call,
            "grid": {
                "sha256": order.grid_hash,
                "samples": {part: len(examples) for part, examples in training.parts.items()},
                "split": "by simulation, 80/10/10 (pipeline.grids.store.split)",
                **grid_description(order.grid),
            },
            "conditions": {
                "mu": [round(edge, 6) for edge in training.mu],
                "calibration_error": list(recipe.augmentation.calibration_error),
            },
            "epochs": {stage: len(history) for stage, history in self._histories.items()},
            "torch": torch.__version__,
            "device": self._standing.device,
            "threads": order.threads,
            "starts": self._standing.starts,
            "metrics": metrics,
            **training.measured(),
            "wall_time_seconds": round(self._seconds, 1),
        }
        if order.finished is not None:
            record = _with_new_preview(network.record, record, order.finished_hash)
        network.record = record
        self._standing.state = "finished"
        self._reporter.flush()
        save_model(network, order.model, record)
        return record

    def _go_through(self, stage: str) -> None:
        """Do one stage, from its checkpoint if there is one."""
        standing = self._standing
        standing.stage, standing.epochs, standing.step = stage, self._training.epochs(stage), 0
        standing.last, standing.best = {}, {}
        trainer = self._training.trainer(stage)
        if self._checkpoint and self._checkpoint["stage"] == stage:
            trainer.restore(self._checkpoint["trainer"])
        # It can be large, and is not needed again.
        self._checkpoint = {}
        self._reporter.add(stage, trainer.history)
        self._show(trainer)
        while not trainer.finished:
            entry = trainer.step()
            standing.step += 1
            if entry is not None:
                self._reporter.add(stage, [entry])
                self._show(trainer)
            if not self._wanted():
                self._save(stage, trainer)
                raise Unwanted
            if self._is_due(entry):
                self._save(stage, trainer)
        self._histories[stage] = trainer.finish()
        # What later stages change of it, their own trainers' states hold.
        self._network = self._training.network.state_dict()
        self._save(None, None)

    def _show(self, trainer: Trainer) -> None:
        history = trainer.history
        self._standing.epoch = len(history)
        if history:
            best = min(history, key=lambda entry: entry.held_out_loss)
            self._standing.last, self._standing.best = asdict(history[-1]), asdict(best)

    def _is_due(self, entry: Epoch | None) -> bool:
        every = self._order.checkpoint_epochs
        if entry is not None and every is not None and entry.epoch % every == 0:
            return True
        return time.monotonic() - self._saved >= self._order.checkpoint_seconds

    def _save(self, stage: str | None, trainer: Trainer | None) -> None:
        self._folder.save_checkpoint(
            {
                "stage": stage,
                "trainer": None if trainer is None else trainer.state(),
                "network": self._network,
                "histories": {
                    name: [asdict(entry) for entry in history] for name, history in self._histories.items()
                },
                "device": self._standing.device,
                "seconds": self._seconds,
            }
        )
        self._saved, self._standing.checkpoint = time.monotonic(), time.time()


def _with_new_preview(
    finished: Mapping[str, Any], record: Mapping[str, Any], finished_hash: str | None
) -> dict[str, Any]:
    """Record of a finished network that got a new preview: all else stands as it was."""
    kept = ("recipe", "seed", "call", "epochs", "torch", "device", "threads", "starts", "wall_time_seconds")
    settings = {name: record["settings"][name] for name in ("preview", "preview_schedule", "augmentation")}
    preview = {
        **record["preview"],
        "taught_afterwards": {
            "network": finished_hash,
            "settings": settings,
            **{name: record[name] for name in kept},
        },
    }
    return {**finished, "run": record["run"], "preview": preview}


def _deliver(folder: TrainingFolder) -> None:
    """Put history and its figure into the finished model."""
    source = folder.path / HISTORY_FILE
    if not source.exists():
        return
    content = source.read_bytes()
    write_whole(folder.model / HISTORY_FILE, lambda path: _write(path, content))
    figure = history_figure(read_history(source))
    write_whole(folder.model / FIGURE_FILE, lambda path: figure.savefig(path))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
