"""What a training shows while it runs: a live table on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.training_folder import SILENCE, Standing

LOG_INTERVAL = 10.0
logger = logging.getLogger("flarefield")


def summary_line(standing: Standing) -> str:
    """Where a training stands, in one line: epoch, losses, learning rate and bandwidths.

    Parameters
    ----------
    standing : Standing

    Returns
    -------
    str
    """
    text = standing.stage
    if standing.epochs:
        text += f": epoch {standing.epoch}/{standing.epochs}"
    if last := standing.last:
        text += f", loss {last['loss']:.4g}, held out {last['held_out_loss']:.4g}"
        text += f" (best {standing.best['held_out_loss']:.4g} in epoch {standing.best['epoch']})"
        text += f", learning rate {last['learning_rate']:.2e}"
        for name, value in last["terms"].items():
            if name.startswith("bandwidth"):
                text += f", {name.replace('_', ' ')} {value:.3g}"
    return text


class TrainingDisplay:
    """Shows the standing of a training as it changes; a context manager.

    On a terminal a table is redrawn in place; elsewhere a line is logged for every stage, and every ten
    seconds if epochs were finished.

    Parameters
    ----------
    title : str
        What is trained.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._live: Live | None = None
        self._said: tuple[str, int] = ("", 0)
        self._logged = 0.0

    def __enter__(self) -> Self:
        console = Console(stderr=True)
        if console.is_terminal:
            self._live = Live(Text(f"{self._title}: waiting for a worker"), console=console)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, standing: Standing) -> None:
        """Show where the training stands now.

        Parameters
        ----------
        standing : Standing
            As the training's folder tells it.
        """
        if self._live is not None:
            self._live.update(_table(self._title, standing))
            return
        now, stage = (standing.stage, standing.epoch), self._said[0]
        if now != self._said and (standing.stage != stage or time.monotonic() - self._logged > LOG_INTERVAL):
            self._said, self._logged = now, time.monotonic()
            logger.info("%s, %s", self._title, summary_line(standing))


def _table(title: str, standing: Standing) -> Group:
    where = f"{standing.host}, {standing.device}, {standing.threads} threads"
    if standing.starts > 1:
        where += f", start {standing.starts}"
    if (silent := time.time() - standing.beat) > SILENCE / 2:
        where += f"; no sign of life for {silent:.0f} s"
    head = Table.grid(padding=(0, 1))
    head.add_row(
        f"{title}, {standing.stage}",
        ProgressBar(max(standing.epochs, 1), standing.epoch, width=40),
        f"epoch {standing.epoch}/{standing.epochs}" if standing.epochs else "",
        where,
    )
    table = Table()
    for heading in ("", "last epoch", "best"):
        table.add_column(heading, justify="right" if heading else "left")
    last, best = _figures(standing.last), _figures(standing.best)
    for name, value in last.items():
        table.add_row(name.replace("_", " "), f"{value:.5g}", f"{best[name]:.5g}" if name in best else "")
    return Group(head, table) if last else Group(head)


def _figures(entry: dict[str, Any]) -> dict[str, float]:
    """All numbers of an epoch, by name."""
    numbers = {name: float(value) for name, value in entry.items() if name != "terms"}
    return numbers | {name: float(value) for name, value in entry.get("terms", {}).items()}
