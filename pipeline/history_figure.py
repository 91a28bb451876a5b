"""Picture of a training: losses, learning rate, and the further figures that its epochs tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from inn.training import Epoch
from pipeline.figures import ACCENT, STYLE, TRUE

GROUPS = {
    "bandwidths": ("bandwidth",),
    "weights": ("w_", "xi", "padding_noise", "weight"),
}
"""Panels of `Epoch.terms`, by how the terms' names begin; terms of the loss are the rest."""


def history_figure(history: Mapping[str, Sequence[Epoch]]) -> Figure:
    """Draw the history of a training, a row for each network.

    Parameters
    ----------
    history : mapping of str to sequence of Epoch
        Finished epochs by network.

    Returns
    -------
    matplotlib.figure.Figure
        Losses with the best held-out one, learning rate, and a panel for each group of further terms.
        Logarithmic where all values are positive and span a factor of five.
    """
    networks = {name: list(entries) for name, entries in history.items() if entries}
    panels = {name: _panels(entries) for name, entries in networks.items()}
    columns = max((len(named) for named in panels.values()), default=1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * columns, 2.8 * max(len(networks), 1)), layout="constrained")
        grid = figure.subplots(max(len(networks), 1), columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for row, (name, entries) in zip(grid, networks.items(), strict=False):
            for axes, (title, curves) in zip(row, panels[name].items(), strict=False):
                axes.set_axis_on()
                _panel(axes, [entry.epoch for entry in entries], curves)
                axes.set(title=f"{name}: {title}", xlabel="epoch")
            best = min(entries, key=lambda entry: entry.held_out_loss)
            row[0].plot(best.epoch, best.held_out_loss, "o", color=TRUE, markersize=4.0)
            row[0].annotate(
                f"{best.held_out_loss:.3g}",
                (best.epoch, best.held_out_loss),
                textcoords="offset points",
                xytext=(0, 5),
                ha="center",
                fontsize=8,
                color=TRUE,
            )
    return figure


def _panels(entries: list[Epoch]) -> dict[str, dict[str, list[float]]]:
    """Curves of each panel by title."""
    panels = {
        "loss": {
            "training": [entry.loss for entry in entries],
            "held out": [entry.held_out_loss for entry in entries],
        },
        "learning rate": {"": [entry.learning_rate for entry in entries]},
    }
    for name in dict.fromkeys(name for entry in entries for name in entry.terms):
        title = next((group for group, starts in GROUPS.items() if name.startswith(starts)), "terms")
        panels.setdefault(title, {})[name.replace("_", " ")] = [
            entry.terms.get(name, np.nan) for entry in entries
        ]
    return panels


def _panel(axes: Axes, epochs: list[int], curves: dict[str, list[float]]) -> None:
    for number, (name, values) in enumerate(curves.items()):
        colour = (ACCENT, TRUE)[number] if len(curves) <= 2 else None
        axes.plot(epochs, values, color=colour, linewidth=1.1, label=name or None)
    shown = np.concatenate([np.asarray(values, dtype=float) for values in curves.values()])
    shown = shown[np.isfinite(shown)]
    if shown.size and shown.min() > 0 and shown.max() > 5 * shown.min():
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if any(curves):
        axes.legend(loc="best")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
