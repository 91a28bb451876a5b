"""One driver for every job on a cluster: many small tasks, a bounded number of them in flight."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from dask.utils import funcname
from distributed import CancelledError, Client, Future, KilledWorker, LocalCluster, as_completed

from pipeline.errors import ClusterError, FlareFieldError

Task = TypeVar("Task")
Result = TypeVar("Result")

logger = logging.getLogger("flarefield")

PAUSE = 0.02
"""Seconds to wait for more results before they are fetched, and new tasks submitted, together."""
DESERTED = 60.0
"""Seconds without any worker after which it is said, and a job on a cluster of this machine given up: one
that died is replaced within a few, and nobody else joins."""
PATIENCE = 600.0
"""Seconds without any worker after which a job is given up on a cluster that others run, and may mend."""


@dataclass(frozen=True)
class Outcome(Generic[Task, Result]):
    """How one task ended: its result, or the error of its last attempt.

    Attributes
    ----------
    task : Task
        What was asked for.
    result : Result or None
        What the task returned; None if it failed.
    error : BaseException or None
        Why the last attempt failed; None if it succeeded.
    attempts : int
        How often it was tried.
    """

    task: Task
    result: Result | None
    error: BaseException | None
    attempts: int


@dataclass(frozen=True)
class Attempt(Generic[Task, Result]):
    """A function as a worker calls it: what it says to a person arrives as it was said.

    Errors take their causes along when they are sent to another process, and some libraries' errors cannot be
    sent: what comes in their place would look like any other failure, and be tried again.

    Attributes
    ----------
    function : callable
        What is to be done.
    """

    function: Callable[[Task], Result]

    def __call__(self, task: Task) -> Result:
        """Do it."""
        try:
            return self.function(task)
        except FlareFieldError as error:
            error.__cause__ = error.__context__ = None
            raise


class Manned:
    """Asks, when nothing comes from a cluster, whether it has workers at all.

    A worker that is cut off from its scheduler, by a machine too busy to answer for half a minute, ends for
    good, and so does one whose batch job is over; a scheduler without workers waits for ever.

    Parameters
    ----------
    client : distributed.Client
        The cluster.
    patience : float
        Seconds that it may be without workers.
    """

    def __init__(self, client: Client, patience: float) -> None:
        self._client, self._patience = client, patience
        self._asked = time.monotonic()
        self._gone: float | None = None
        self._told = False

    def seen(self) -> None:
        """Note that something has come, so that there are workers."""
        self._gone, self._told = None, False

    def see(self) -> None:
        """Ask, if it is time to.

        Raises
        ------
        ClusterError
            There has been no worker for too long.
        """
        now = time.monotonic()
        if now - self._asked <= min(DESERTED, self._patience) / 10:
            return
        self._asked = now
        try:
            manned = bool(self._client.nthreads())
        except (OSError, TimeoutError, CancelledError):
            return  # a lost scheduler is noticed elsewhere
        if manned:
            self.seen()
            return
        # From when it was noticed: nobody asks while results come, or are dealt with.
        self._gone = now if self._gone is None else self._gone
        without = now - self._gone
        if without >= self._patience:
            raise ClusterError(
                "the cluster has no workers any more",
                where=self._client.scheduler.address if self._client.scheduler else None,
                found=f"none for {without:.0f} s",
                remedy="start workers, and run the same command again: it goes on from what is finished",
            )
        if without >= DESERTED and not self._told:
            self._told = True
            limit = "" if math.isinf(self._patience) else f", for {self._patience - without:.0f} s more"
            logger.warning(
                "the cluster has had no workers for %.0f s; waiting for some to join%s", without, limit
            )


def run_bounded(
    client: Client,
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    window: int | None = None,
    attempts: int = 3,
) -> Generator[Outcome[Task, Result], None, None]:
    """Run ``function(task)`` for each task on a cluster; yield each outcome as it comes, in any order.

    At most `window` tasks exist on the cluster at any time, so a million tasks need no more memory in
    client and scheduler than ten. Tasks are drawn from the iterable as room appears: an iterable that ends
    early lets the job run out in good order. Leaving the loop over the outcomes takes back what is still in
    flight.

    A task that raises is submitted again until it has been tried `attempts` times, unless it raises a
    `FlareFieldError`: those say what a person has to mend. A task whose worker dies
    is rescheduled by Dask itself, as often as the cluster's ``allowed-failures`` says; one that has killed
    that many workers is given up at once.

    Parameters
    ----------
    client : distributed.Client
        The cluster.
    function : callable
        Importable on the workers; its argument and result should be small (descriptions, not arrays).
    tasks : iterable
        What to do, one element a task.
    window : int, optional
        Tasks in flight; by default four for every thread of the cluster, counted at the start, at least 64.
    attempts : int
        Tries before a task is given up.

    Yields
    ------
    Outcome
        One for each task.

    Raises
    ------
    ClusterError
        The scheduler is lost, or all workers have been for `PATIENCE` and nobody is to replace them.
    """
    if window is None:
        window = max(64, 4 * sum(client.nthreads().values()))
    queue = iter(tasks)
    pending: dict[Future, tuple[Task, int]] = {}

    def submit(tasks: Iterable[tuple[Task, int]]) -> list[Future]:
        drawn = list(tasks)
        futures: list[Future] = client.map(
            Attempt(function), [task for task, _ in drawn], key=funcname(function), pure=False
        )
        pending.update(zip(futures, drawn, strict=True))
        return futures

    def more(room: int) -> list[Future]:
        return submit((task, 1) for task in islice(queue, room))

    # A batch's results are fetched together, and submissions go out in batches: a message for each task would
    # cost more than a small task does. Without a pause a batch of small tasks would hold one or two of them.
    # (`as_completed` could fetch results, but would wait for ever when the scheduler is lost meanwhile.)
    manned = Manned(client, _patience(client))
    in_flight = as_completed(more(window), loop=client.loop, raise_errors=False)
    try:
        for batch in _batches(in_flight, manned):
            again: list[tuple[Task, int]] = []
            lost: list[Future] = []
            results = _gathered(client, [future for future in batch if future.status == "finished"])
            # What is finished comes first: an error may be a reason for the caller to leave.
            for future in sorted(batch, key=lambda future: future.key not in results):
                task, attempt = pending.pop(future)
                if future.key in results:
                    yield Outcome(task, results[future.key], None, attempt)
                elif future.status == "error":
                    error: BaseException = future.exception()
                    if attempt < attempts and not isinstance(error, (KilledWorker, FlareFieldError)):
                        again.append((task, attempt + 1))
                    else:
                        yield Outcome(task, None, error, attempt)
                elif future.status == "cancelled" or client.status != "running":
                    raise _lost_cluster(client, f"task state {future.status!r}")
                else:
                    # The result has died with its worker, and Dask does the task again: submitted anew, it
                    # would be done twice at the same time.
                    pending[future] = task, attempt
                    lost.append(future)
            # Only now: what the caller learned from these outcomes may be that nothing more is to be done.
            in_flight.update(lost + submit(again) + more(len(batch) - len(lost) - len(again)))
            if len(pending) > 1:
                time.sleep(PAUSE)
    finally:
        if pending and client.status == "running":
            client.cancel(list(pending), force=True)


def _patience(client: Client) -> float:
    """Seconds that a cluster may be without workers."""
    if client.cluster is None:
        return PATIENCE
    # A batch system starts others in place of workers whose time is over, when it comes to that.
    return DESERTED if isinstance(client.cluster, LocalCluster) else math.inf


def _batches(in_flight: as_completed, manned: Manned) -> Iterator[list[Future]]:
    """Futures as they complete, as many at once as there are; meanwhile workers are looked for."""
    while not in_flight.is_empty():
        if in_flight.has_ready():
            manned.seen()
            yield in_flight.next_batch(block=False)
        else:
            manned.see()
            time.sleep(PAUSE)


def _gathered(client: Client, futures: list[Future]) -> dict[str, Any]:
    """Fetch results of finished tasks, by key; without those that are lost meanwhile."""
    try:
        results: dict[str, Any] = client.gather({future.key: future for future in futures}, errors="skip")
    except (OSError, TimeoutError, CancelledError) as error:
        raise _lost_cluster(client, f"{type(error).__name__}: {error}") from error
    bad = {future.key for future in futures if future.status in ("error", "cancelled")}
    return {key: result for key, result in results.items() if key not in bad}


def _lost_cluster(client: Client, found: str) -> ClusterError:
    return ClusterError(
        "the cluster gave up a task without an answer; its scheduler was probably lost",
        where=client.scheduler.address if client.scheduler else None,
        found=found,
        remedy="run the same command again: it resumes from what is finished",
    )
