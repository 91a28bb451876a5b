"""Training a network on a grid, as one task of a Dask cluster: watched, resumed, left alone, asked about.

The task writes into a folder beside the model (`pipeline.training_folder`), which all machines must see under
the same path, and which tells the command that watches, or another one later, all it shows. Nothing is lost
with a worker, a node or the command but the time since the last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from distributed import Client, Future, KilledWorker, fire_and_forget

from inn.checkpoint import model_hash
from pipeline.cluster import (
    AddressConfig,
    ClusterConfig,
    CudaConfig,
    LocalConfig,
    SlurmConfig,
    opened,
    threads_per_task,
)
from pipeline.driver import Manned
from pipeline.errors import ClusterError, MisuseError
from pipeline.provenance import flarefield_version, flattened
from pipeline.recipes import RECIPES, Recipe, find_recipe
from pipeline.training_display import TrainingDisplay, summary_line
from pipeline.training_folder import HISTORY_FILE, Standing, Submission, TrainingFolder
from pipeline.training_run import Order, finish, run, run_on_worker
from pipeline.training_set import content_hash

__all__ = ["HISTORY_FILE", "RECIPES", "Recipe", "TrainingStatus", "train", "training_status"]

logger = logging.getLogger("flarefield")

CHECKPOINT_SECONDS = 60.0
POLL = 0.3
"""Seconds between two looks at a training."""
DESERTED = 60.0
"""Seconds that a cluster of our own may be without a worker: one that died is replaced within a few."""
GRACE = 10.0
"""Seconds that a process, whose cluster was ended with its command, gets to end."""

TrainingState: TypeAlias = Literal["complete", "running", "waiting", "stopped", "dead", "failed"]
Cluster: TypeAlias = ClusterConfig | Client


def train(
    grid: str | Path,
    model_path: str | Path,
    *,
    recipe: str | Recipe = "conditional",
    seed: int = 0,
    epochs: int | None = None,
    preview_of: str | Path | None = None,
    call: str | None = None,
    cluster: Cluster | None = None,
    detach: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    checkpoint_epochs: int | None = None,
) -> dict[str, Any] | None:
    """Train a network, its emulator and its novelty measure on a grid, and save them as a model.

    Simulations are split 80/10/10: the first part is learned from, the second decides which weights are kept
    and calibrates the novelty measure, the third is used for nothing but the metrics in the record.

    The same call again goes on where an earlier one was interrupted, watches the training if it still runs on
    the same cluster, or returns the record if it is complete. The network is the same to the last bit: with
    the number of threads that the training was begun with, on the same kind of device.

    Parameters
    ----------
    grid : path
        A grid store. Samples that did not converge are left out.
    model_path : path
        Model directory to write. While training, a folder ``<model_path>.training`` lies beside it.
    recipe : str or Recipe
        Name of one of `pipeline.recipes.RECIPES`, or settings of one's own.
    seed : int
        Seed of everything random: the same grid, recipe, seed and number of threads give the same network.
    epochs : int, optional
        Fewer or more epochs than the recipe's; see `pipeline.recipes.Recipe.with_epochs`.
    preview_of : path, optional
        A finished model, whose conditional network and all it carries stay as they are but for its preview,
        which is taught anew; the recipe says how.
    call : str, optional
        The command, for the record.
    cluster : configuration or distributed.Client, optional
        Where to train: one task, on a worker with a resource ``GPU`` if there is one. On a GPU wherever torch
        can use it. In this process if left out.
    detach : bool
        Return when the task is submitted. The cluster must be one that goes on without this process.
    checkpoint_seconds : float
        Least time between two checkpoints, which are written after the step that is due.
    checkpoint_epochs : int, optional
        Number of epochs after which there is a checkpoint in any case.

    Returns
    -------
    dict or None
        The training record, as the model's ``record`` holds it; None if detached.

    Raises
    ------
    MisuseError
        The recipe is unknown, the output exists and is not of this training, another training of this model
        was begun or is under way, or the cluster would end with this process.
    StoreError, InputError
        The grid cannot be used, or nothing can be written.
    ModelError
        The loss is no longer a number.
    ClusterError
        The cluster cannot be used, or was lost.
    """
    name, settings = find_recipe(recipe, epochs)
    if detach and not isinstance(cluster, AddressConfig | Client):
        raise MisuseError(
            "a training can be left alone only on a cluster that goes on without this command",
            where="--detach",
            found="this process" if cluster is None else f"a cluster of kind {cluster.kind}",
            expected="the address of a scheduler, or a configuration of kind address",
            remedy="start a scheduler and workers (see deploy/address.yaml), or leave out --detach",
        )
    if preview_of is not None and settings.joint_schedule is not None:
        raise MisuseError(
            "this recipe teaches no preview", where="recipe", found=name, expected="conditional"
        )
    folder = TrainingFolder(model_path)
    fingerprint = {
        "grid": content_hash(grid),
        "recipe": name,
        "seed": seed,
        **flattened(settings.to_json()),
        "torch": torch.__version__,
        "flarefield": flarefield_version(),
        **({} if preview_of is None else {"preview_of": model_hash(preview_of)}),
    }
    identity = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    if (record := folder.record()) is not None:
        if record.get("run") != identity:
            raise MisuseError(
                "the output exists",
                where=folder.model,
                found="a model that was not trained so",
                remedy="remove it, or name another directory",
            )
        finish(folder)
        logger.info("%s: is complete", model_path)
        return record

    if folder.path.exists():
        folder.same(fingerprint)  # before a cluster is started for nothing

    def order(owner: str, threads: int, gpu: bool) -> Order:
        _see_that_nobody_else_trains(folder, owner)
        plan = folder.begin(fingerprint, threads)
        if plan.threads != threads:
            logger.info("going on with %d threads, as the training was begun", plan.threads)
        return Order(
            grid=str(Path(grid).absolute()),
            model=str(folder.model),
            name=name,
            recipe=settings,
            seed=seed,
            finished=None if preview_of is None else str(Path(preview_of).absolute()),
            finished_hash=fingerprint.get("preview_of"),
            run=identity,
            grid_hash=fingerprint["grid"],
            threads=plan.threads,
            gpu=gpu,
            call=call or f"pipeline.train_job.train({str(grid)!r}, {str(model_path)!r}, seed={seed})",
            cluster=owner,
            checkpoint_seconds=checkpoint_seconds,
            checkpoint_epochs=checkpoint_epochs,
        )

    if cluster is None:
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        planned = order(owner, torch.get_num_threads(), False)
        with _submitted(folder, owner, owner, detach):
            return _train_here(planned, folder)
    with opened(_enough(cluster)) as client:
        workers = client.scheduler_info(n_workers=-1)
        gpu = any(worker["resources"].get("GPU", 0) >= 1 for worker in workers["workers"].values())
        planned = order(str(workers["id"]), threads_per_task(client), gpu)
        with _submitted(folder, planned.cluster, str(workers["address"]), detach):
            return _train_there(
                client, planned, folder, detach=detach, own=isinstance(cluster, LocalConfig | CudaConfig)
            )


def _enough(cluster: Cluster) -> Cluster:
    """A cluster that is started for one task needs one worker, with all the cores."""
    if isinstance(cluster, LocalConfig) and "workers" not in cluster.model_fields_set:
        return cluster.model_copy(update={"workers": 1})
    if isinstance(cluster, SlurmConfig):
        return cluster.model_copy(update={"jobs": 1, "processes": 1})
    return cluster


def _see_that_nobody_else_trains(folder: TrainingFolder, owner: str) -> None:
    """Refuse a training that another cluster, or another process, is busy with."""
    until = time.monotonic() + GRACE
    while folder.is_running(standing := folder.standing()):
        if standing is None or standing.cluster == owner:
            return
        if standing.host != socket.gethostname() or time.monotonic() > until:
            raise folder.taken()
        time.sleep(POLL)


@contextmanager
def _submitted(folder: TrainingFolder, cluster: str, address: str, detach: bool) -> Iterator[None]:
    """Tell that a training waits to be begun, and if it never will be, why."""
    submission = folder.submit(cluster, address, detach)
    try:
        yield
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else ""
        folder.end_submission(reason, submission.identity)
        raise


def _train_here(order: Order, folder: TrainingFolder) -> dict[str, Any]:
    """Train in a thread of this process, and watch."""
    end = threading.Event()
    with ThreadPoolExecutor(1) as pool, _display(folder) as display:
        future: futures.Future[dict[str, Any]] = pool.submit(run, order, lambda: not end.is_set())
        try:
            _watch(folder, display, order.cluster, future.done)
            return future.result()
        finally:
            end.set()


def _train_there(
    client: Client, order: Order, folder: TrainingFolder, *, detach: bool, own: bool
) -> dict[str, Any] | None:
    """Train in a task of a cluster, perhaps one that was started for it, and watch unless detached."""
    # The same training has the same key: who asks for it again has the same task, if it is still there.
    key = f"flarefield-train-{hashlib.sha256(f'{order.model} {order.run}'.encode()).hexdigest()[:32]}"
    _forget_failure(client, key)
    future = client.submit(
        run_on_worker, order, key=key, pure=False, resources={"GPU": 1} if order.gpu else None
    )
    if detach:
        fire_and_forget(future)
        _see_that_it_arrived(client, key)
        if future.status == "error":
            failure = future.exception()
            _forget_failure(client, key)
            raise failure.with_traceback(None) from None
        return None
    with _display(folder) as display:
        _watch(folder, display, order.cluster, _watched(client, future.done) if own else future.done)
    if future.status == "finished":
        record: dict[str, Any] = future.result()
        return record
    error = future.exception() if future.status == "error" else None
    if error is None or isinstance(error, CancelledError):
        raise ClusterError(
            "the cluster gave up the training without an answer; its scheduler was probably lost",
            where=client.scheduler.address if client.scheduler else None,
            remedy="run the same command again: it goes on from the last checkpoint",
        )
    if isinstance(error, KilledWorker):
        raise ClusterError(
            "the training lost its worker again and again",
            where=folder.path,
            found=f"{error.last_worker.address if error.last_worker else 'a worker'} died last",
            remedy="see the workers' logs (memory?), then run the same command again: it goes on from the "
            "last checkpoint",
        ) from None
    # What the worker raised says what to mend; its traceback does not.
    raise error.with_traceback(None) from None


def _forget_failure(client: Client, key: str) -> None:
    """Have the scheduler forget a task that failed: a detached one would answer in place of a new attempt."""

    def failed(dask_scheduler: Any = None) -> bool:  # noqa: ANN401
        task = dask_scheduler.tasks.get(key)
        return task is not None and task.state == "erred"

    while client.run_on_scheduler(failed):
        client.cancel([Future(key, client=client)], force=True)
        time.sleep(POLL)


def _see_that_it_arrived(client: Client, key: str) -> None:
    """Make sure that the scheduler will keep a task without us, or that it has ended already."""

    def known(dask_scheduler: Any = None) -> bool:  # noqa: ANN401
        task = dask_scheduler.tasks.get(key)
        return (
            task is None
            or task.state in ("erred", "memory")
            or any(client.client_key == "fire-and-forget" for client in task.who_wants)
        )

    while not client.run_on_scheduler(known):
        time.sleep(POLL)


def _watched(client: Client, done: Callable[[], bool]) -> Callable[[], bool]:
    """See also, each time it is asked whether a task is done, that its cluster has workers.

    Others may join a cluster that others run; nobody joins one of our own.
    """
    manned = Manned(client, DESERTED)

    def answer() -> bool:
        if done():
            return True
        manned.see()
        return False

    return answer


def _display(folder: TrainingFolder) -> TrainingDisplay:
    return TrainingDisplay(f"training {folder.model.name}")


def _watch(folder: TrainingFolder, display: TrainingDisplay, owner: str, done: Callable[[], bool]) -> None:
    while not done():
        folder.wait()
        standing = folder.standing()
        if standing is not None and standing.cluster == owner:  # not an earlier one's
            display.update(standing)
        time.sleep(POLL)


@dataclass(frozen=True)
class TrainingStatus:
    """How a training is doing.

    Attributes
    ----------
    state : str
        ``"complete"``: the model is there. ``"running"``; ``"waiting"``: submitted and not begun.
        ``"stopped"``: nobody wanted it any more. ``"dead"``: who trained, or waited for that to begin, gives
        no sign of life. ``"failed"``: `submission` or `standing` says why.
    model : Path
    standing : Standing or None
        What is told by the last process that trained; None where there was none.
    submission : Submission or None
        That somebody was asked since, who has not begun.
    record : dict or None
        The complete model's.
    """

    state: TrainingState
    model: Path
    standing: Standing | None = None
    submission: Submission | None = None
    record: dict[str, Any] | None = None

    @property
    def good(self) -> bool:
        """Whether nothing needs to be done: it is complete, runs or waits."""
        return self.state in ("complete", "running", "waiting")

    def summary(self) -> str:
        """A few lines of text.

        Returns
        -------
        str
        """
        lines = [f"{self.model}: {self.state}"]
        if self.record is not None:
            epochs = ", ".join(f"{stage} {count}" for stage, count in self.record.get("epochs", {}).items())
            lines.append(f"  epochs: {epochs}" if epochs else "  not trained here")
        if (submission := self.submission) is not None:
            lines.append(f"  submitted {_ago(submission.when)} to {submission.address}; nobody has begun")
            if submission.error:
                lines.append(f"  error: {submission.error}")
            elif self.good:
                lines.append("  the same command without --detach waits for it, and tells what goes wrong")
        if (standing := self.standing) is not None:
            lines += [
                f"  {'before: ' if submission else ''}{summary_line(standing)}",
                f"  process {standing.process} on {standing.host}, {standing.device}, "
                f"{standing.threads} threads; start {standing.starts}",
                f"  sign of life {_ago(standing.beat)}; checkpoint "
                + (_ago(standing.checkpoint) if standing.checkpoint else "none since this start"),
            ]
            if standing.error:
                lines.append(f"  error: {standing.error}")
        if not self.good:
            lines.append("  remedy: run the same `flarefield train` command again: it goes on from there")
        return "\n".join(lines)


def _ago(when: float) -> str:
    return f"{max(time.time() - when, 0.0):.0f} s ago"


def training_status(model_path: str | Path) -> TrainingStatus:
    """How the training of a model is doing, by the files beside it, on whatever machine it runs.

    Parameters
    ----------
    model_path : path
        The model directory that was named for the training.

    Returns
    -------
    TrainingStatus

    Raises
    ------
    MisuseError
        There is neither a model nor a training.
    StoreError
        The training's folder is damaged.
    """
    folder = TrainingFolder(model_path)
    # In this order: it is begun with before the submission is taken back, and complete before all this goes.
    submission, standing = folder.submission(), folder.standing()
    running, there = folder.is_running(standing), folder.path.is_dir()
    if (record := folder.record()) is not None:
        return TrainingStatus("complete", folder.model, record=record)
    if not there:
        raise MisuseError(
            "there is no such model, nor a training of it",
            where=folder.model,
            remedy="begin one with `flarefield train GRID.zarr MODEL`",
        )
    folder.plan()
    state: TrainingState = "stopped"
    if running:
        state, submission = "running", None
    elif submission is not None and submission.error:
        state = "failed"
    elif submission is not None:
        state = "waiting" if folder.is_waited_for(submission) else "dead"
    elif standing is not None:
        state = standing.state if standing.state in ("failed", "stopped") else "dead"
    return TrainingStatus(state, folder.model, standing, submission)
