"""The part that all makers of grids share: tasks on a cluster, each finished one handed over as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from distributed import Client

from pipeline.driver import run_bounded
from pipeline.errors import ClusterError, FlareFieldError

Task = TypeVar("Task")
Result = TypeVar("Result")


def finished(
    client: Client,
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    name: Callable[[Task], str],
    where: Path,
    window: int | None = None,
    remedy: str = "run the same command again: it does these only",
) -> Iterator[tuple[Task, Result]]:
    """Run ``function(task)`` for each task; yield each with its result as it comes, in any order.

    Parameters
    ----------
    client : distributed.Client
        The cluster.
    function : callable
        Importable on the workers.
    tasks : iterable
        What to do.
    name : callable
        What a person calls a task.
    where : Path
        The grid store, for the error.
    window : int, optional
        Tasks in flight; see `pipeline.driver.run_bounded`.
    remedy : str
        What to do about tasks that were lost.

    Yields
    ------
    task, result

    Raises
    ------
    FlareFieldError
        A task's own, at once: it says what a person has to mend.
    ClusterError
        After all others, if tasks came to nothing: they raised something else each time, or their workers
        died again and again.
    """
    lost: list[str] = []
    count = 0
    for outcome in run_bounded(client, function, tasks, window=window):
        count += 1
        if outcome.result is not None:
            yield outcome.task, outcome.result
        elif isinstance(outcome.error, FlareFieldError):
            raise outcome.error
        else:
            lost.append(f"{name(outcome.task)} ({outcome.error!r})")
    if lost:
        raise ClusterError(
            f"{len(lost)} of {count} tasks came to nothing",
            where=where,
            found="; ".join(lost[:5]),
            remedy=remedy,
        )
