"""One driver for every job on a cluster: many small tasks, a bounded number of them in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from distributed import Client, Future, as_completed

from pipeline.errors import ClusterError

Task = TypeVar("Task")
Result = TypeVar("Result")


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


def run_bounded(
    client: Client,
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    window: int | None = None,
    attempts: int = 3,
) -> Iterator[Outcome[Task, Result]]:
    """Run ``function(task)`` for each task on a cluster; yield each outcome as it comes, in any order.

    At most `window` tasks exist on the cluster at any time, so a million tasks need no more memory in
    client and scheduler than ten. Tasks are drawn from the iterable as room appears. A task that raises is
    submitted again until it has been tried `attempts` times. A task whose worker dies is rescheduled by
    Dask itself, as often as the cluster's ``allowed-failures`` says, before that counts as one attempt.

    Parameters
    ----------
    client : distributed.Client
        The cluster.
    function : callable
        Importable on the workers; its argument and result should be small (descriptions, not arrays).
    tasks : iterable
        What to do, one element a task.
    window : int, optional
        Tasks in flight; by default four for every thread of the cluster, counted at the start, at least 8.
    attempts : int
        Tries before a task is given up.

    Yields
    ------
    Outcome
        One for each task.

    Raises
    ------
    ClusterError
        If the scheduler is lost.
    """
    if window is None:
        window = max(8, 4 * sum(client.nthreads().values()))
    queue = iter(tasks)
    pending: dict[str, tuple[Task, int]] = {}

    def submit(task: Task, attempt: int) -> Future:
        future = client.submit(function, task, pure=False)
        pending[future.key] = (task, attempt)
        return future

    finished = as_completed([submit(task, 1) for task in islice(queue, window)])
    for future in finished:
        task, attempt = pending.pop(future.key)
        if future.status == "finished":
            outcome: Outcome[Task, Result] = Outcome(task, future.result(), None, attempt)
        elif future.status == "error":
            if attempt < attempts:
                finished.add(submit(task, attempt + 1))
                continue
            outcome = Outcome(task, None, future.exception(), attempt)
        else:
            raise ClusterError(
                "the cluster gave up a task without an answer; its scheduler was probably lost",
                where=client.scheduler.address if client.scheduler else None,
                found=f"task state {future.status!r}",
                remedy="run the same command again: it resumes from what is finished",
            )
        future.release()
        for task in islice(queue, 1):
            finished.add(submit(task, 1))
        yield outcome
