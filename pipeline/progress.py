"""Progress of a long job: a live bar on a terminal, a plain log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

LOG_INTERVAL = 10.0
logger = logging.getLogger("flarefield")


class Progress:
    """Counts what is done of a job and shows it: done, rate and remaining time.

    On a terminal a bar is redrawn in place; elsewhere (a batch job's log) one plain line is logged every
    ten seconds and at the end. Used as a context manager.

    Parameters
    ----------
    title : str
        What the job does, for example ``"inverting"``.
    total : int
        Units of work in all.
    unit : str
        What is counted, in the plural, for example ``"pixels"``.
    done : int
        Units that an earlier run finished already; they do not count for the rate.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._first = self._said = done
        self._started = self._logged = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        self._started = self._logged = time.monotonic()
        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, rate="")
            self._bar.start()
        elif self.done:
            logger.info("%s: %s of %s %s done before", self.title, self.done, self.total, self.unit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._said != self.done:
            logger.info(self.line())
        sys.stderr.flush()

    @property
    def rate(self) -> float:
        """Units a second since this run began."""
        return (self.done - self._first) / max(time.monotonic() - self._started, 1e-9)

    @property
    def pace(self) -> str:
        """The rate as people read it: units a second, or a minute where that is less than one."""
        if self.rate >= 1.0:
            return f"{self.rate:,.1f} {self.unit}/s"
        return f"{60.0 * self.rate:,.1f} {self.unit}/min"

    def line(self) -> str:
        """State of the job in one line: done, rate, remaining time."""
        share = 100.0 * self.done / self.total if self.total else 100.0
        text = f"{self.title}: {self.done}/{self.total} {self.unit} ({share:.0f} %)"
        text += f", {self.pace}"
        if 0 < self.done < self.total and self.rate > 0:
            text += f", ETA {(self.total - self.done) / self.rate:,.0f} s"
        return text

    def advance(self, amount: int) -> None:
        """Count `amount` more units as done."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self.pace)
        elif time.monotonic() - self._logged >= LOG_INTERVAL:
            self._logged, self._said = time.monotonic(), self.done
            logger.info(self.line())
