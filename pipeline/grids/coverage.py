"""What a training grid covers: its content in words, its profile families and atmospheres in a figure.

Profiles fall into families by their shape and by their asymmetry, at one value of mu, within the half-width
that the paper's networks see (`inn.layout`). Criteria, for intensities I over the offsets from rest:

*central reversal* - two or more peaks, and so a trough between them. A peak rises by at least
:data:`PROMINENCE` of the profile's maximum above what surrounds it.

*mixed* - one peak, and I rises as far above the mean of its two ends as it falls below it, within a factor of
two: a peak in one wing of an absorption core.

*emission* - otherwise, where I rises further above that mean than it falls below it.

*absorption* - all others.

*red asymmetry*, *blue asymmetry* - the mean of I on that side of rest exceeds the other side's by more than
:data:`ASYMMETRY` of the profile's range. A line core that is shifted to the red darkens an absorption
profile's red side and brightens an emission profile's: this names the brighter side, not the flow.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from scipy.signal import find_peaks

from inn.layout import CA8542, HALPHA, LineWindow
from pipeline.errors import MisuseError
from pipeline.figures import ACCENT, LINE_TITLES, LOOKS, NAMES, STYLE, TRUE, save_figure
from pipeline.grids.store import STATUS, open_grid, split
from pipeline.training_set import content_hash

Array = NDArray[np.float64]

SHAPES = ("absorption", "mixed", "central reversal", "emission")
"""Families of profiles by shape; see this module's head."""
ASYMMETRIES = ("blue", "none", "red")
"""Families of profiles by asymmetry: the side that is brighter."""
PROMINENCE = 0.05
"""Least height of a peak above its surroundings, as a share of the profile's maximum."""
ASYMMETRY = 0.1
"""Least difference between the means of a profile's two sides, as a share of its range."""
MOST_SAMPLES = 5000
"""Samples, evenly spread over the grid, that shares and bands are taken from: their error is below 0.7 %."""
TOP = 3.0
"""Highest height that a figure shows, Mm."""
_EXAMPLES = 18
_COMPARED = 200
_MEMBERS = 8
_COLOURS = {"blue": ACCENT, "none": "#8a8a8a", "red": TRUE}
_BAND, _BLACK = "#5b7083", "#1a1a1a"


class Families(NamedTuple):
    """Which family each profile belongs to.

    Attributes
    ----------
    shape : (n,) array of int
        Index into :data:`SHAPES`.
    asymmetry : (n,) array of int
        Index into :data:`ASYMMETRIES`.
    excess : (n,) array
        Mean of the red side less that of the blue side, in shares of the profile's range.
    """

    shape: NDArray[np.intp]
    asymmetry: NDArray[np.intp]
    excess: Array


def profile_families(profiles: Array, offsets: Array) -> Families:
    """Sort profiles into families by the criteria of this module's head.

    Parameters
    ----------
    profiles : array, shape (n, wavelengths)
        Intensities, in any unit, finite.
    offsets : array, shape (wavelengths,)
        Wavelengths from rest, Angstrom, ascending, on both sides of 0.

    Returns
    -------
    Families

    Raises
    ------
    MisuseError
        The wavelengths lie on one side of rest only.
    """
    if not offsets[0] < 0.0 < offsets[-1]:
        raise MisuseError(
            "profiles need wavelengths on both sides of rest",
            found=f"{offsets[0]:g} to {offsets[-1]:g} Angstrom",
        )
    profiles = np.asarray(profiles, dtype=np.float64)
    ends = 0.5 * (profiles[:, 0] + profiles[:, -1])
    high, low = profiles.max(axis=1), profiles.min(axis=1)
    peaks = np.array(
        [
            find_peaks(row, prominence=PROMINENCE * top)[0].size
            for row, top in zip(profiles, high, strict=True)
        ]
    )
    rise, fall = high - ends, ends - low
    mixed = (peaks == 1) & (rise < 2 * fall) & (fall < 2 * rise)
    shape = np.select(
        [peaks >= 2, mixed, rise > fall],
        [SHAPES.index("central reversal"), SHAPES.index("mixed"), SHAPES.index("emission")],
        SHAPES.index("absorption"),
    )
    red, blue = (_mean_over(profiles, offsets, side) for side in ((0.0, offsets[-1]), (offsets[0], 0.0)))
    excess = (red - blue) / np.maximum(high - low, np.finfo(float).tiny)
    asymmetry = 1 + (excess > ASYMMETRY).astype(np.intp) - (excess < -ASYMMETRY).astype(np.intp)
    return Families(shape.astype(np.intp), asymmetry, excess)


def _mean_over(profiles: Array, offsets: Array, span: tuple[float, float]) -> Array:
    """Mean over a span of wavelengths of profiles that are straight between their points."""
    inside = offsets[(offsets > span[0]) & (offsets < span[1])]
    points = np.concatenate([[span[0]], inside, [span[1]]])
    values = np.stack([np.interp(points, offsets, row) for row in profiles])
    mean: Array = np.trapezoid(values, points, axis=1) / (span[1] - span[0])
    return mean


class _Sampled(NamedTuple):
    """Converged samples of a grid at one angle, loaded."""

    grid: xr.Dataset
    mu: float

    def line(self, window: LineWindow) -> tuple[Array, Array]:
        """Profiles and offsets within a line's window."""
        offsets = self.grid[f"wavelength_{window.name}"].to_numpy().astype(np.float64)
        seen = np.abs(offsets) <= window.half_width + 1e-6
        return self.grid[window.name].to_numpy()[:, seen].astype(np.float64), offsets[seen]


def _sampled(grid: xr.Dataset, mu: float | None) -> _Sampled:
    converged = np.flatnonzero(grid["converged"].to_numpy())
    if converged.size == 0:
        raise MisuseError("the grid has no converged samples", found=f"{grid.sizes['sample']} samples")
    if converged.size > MOST_SAMPLES:
        converged = converged[np.linspace(0, converged.size - 1, MOST_SAMPLES).astype(int)]
    angles = grid["mu"].to_numpy()
    index = int(np.argmax(angles)) if mu is None else int(np.argmin(np.abs(angles - mu)))
    return _Sampled(grid.isel(mu=index, sample=converged).load(), float(angles[index]))


def _share(part: NDArray[np.bool_]) -> str:
    share = 100 * float(np.mean(part))
    return "<1 %" if 0.0 < share < 1.0 else f"{share:.0f} %"


# In a figure


def coverage_figure(grid: xr.Dataset, *, mu: float | None = None, top: float = TOP) -> Figure:
    """Draw what a grid covers: families of both lines' profiles, and its atmospheres against height.

    Parameters
    ----------
    grid : xarray.Dataset
        A training grid, as `pipeline.grids.store.open_grid` opens it. Samples that did not converge are left
        out, and of more than :data:`MOST_SAMPLES` that many are taken.
    mu : float, optional
        Cosine of the heliocentric angle of the profiles; the grid's nearest is shown, by default its largest.
    top : float
        Highest height shown, Mm.

    Returns
    -------
    matplotlib.figure.Figure
        A row for each line: examples of every shape, each divided by its maximum and coloured by its
        asymmetry, in black the one nearest to all others, with the family's share; beside them the shares of
        the asymmetries in each shape. Below: median, 68 and 90 % ranges of electron density, temperature and
        velocity, and some members.

    Raises
    ------
    MisuseError
        The grid has no converged samples.
    """
    sampled = _sampled(grid, mu)
    with mpl.rc_context(STYLE | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12.4, 9.0), layout="constrained")
        above, below = np.array(figure.subfigures(2, 1, height_ratios=(1.7, 1.0)), dtype=object)
        axes = above.subplots(2, 5)
        for row, window in zip(axes, (HALPHA, CA8542), strict=True):
            _family_row(row, window, *sampled.line(window))
        for panel, quantity in zip(below.subplots(1, 3), LOOKS, strict=True):
            _height_panel(panel, sampled.grid, quantity, top)
        total, usable = grid.sizes["sample"], int(grid["converged"].sum())
        shown = "" if usable <= MOST_SAMPLES else f", {MOST_SAMPLES:,} of them shown"
        simulations = np.unique(grid["simulation"].to_numpy()).size
        figure.suptitle(
            f"{_maker(grid)} grid   {total:,} samples of {simulations:,} simulations, {usable:,} converged"
            f"{shown}   profiles at μ = {sampled.mu:.2f}",
            x=0.01,
            ha="left",
        )
    return figure


def _family_row(row: NDArray[np.object_], window: LineWindow, profiles: Array, offsets: Array) -> None:
    families = profile_families(profiles, offsets)
    scaled = profiles / profiles.max(axis=1, keepdims=True)
    for number, (panel, shape) in enumerate(zip(row[:-1], SHAPES, strict=True)):
        members = np.flatnonzero(families.shape == number)
        # From the bluest to the reddest: examples show asymmetries as often as they occur. They are drawn in
        # an order that puts neither on top of the other.
        ranked = members[np.argsort(families.excess[members], kind="stable")]
        for member in np.random.default_rng(0).permutation(_spread(ranked, _EXAMPLES)):
            colour = _COLOURS[ASYMMETRIES[families.asymmetry[member]]]
            panel.plot(offsets, scaled[member], color=colour, linewidth=0.8, alpha=0.55)
        if members.size:
            panel.plot(offsets, _typical(scaled[_spread(ranked, _COMPARED)]), color=_BLACK, linewidth=1.8)
        else:
            panel.text(0.5, 0.5, "none", transform=panel.transAxes, ha="center", color="#666666")
        panel.axvline(0.0, color="#999999", linewidth=0.6, zorder=0)
        panel.set(
            title=f"{LINE_TITLES[window.name]}: {shape}, {_share(families.shape == number)}",
            xlabel="Δλ from rest [Å]", xlim=(offsets[0], offsets[-1]), ylim=(0.0, 1.05),
        )  # fmt: skip
        panel.tick_params(labelleft=number == 0)
    row[0].set_ylabel("intensity / maximum")
    _share_panel(row[-1], window, families)


def _spread(members: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    """At most `count` of some samples, evenly spread over their order."""
    if not members.size:
        return members
    chosen: NDArray[np.intp] = members[np.unique(np.linspace(0, members.size - 1, count).astype(int))]
    return chosen


def _typical(profiles: Array) -> Array:
    """The profile that is nearest to all others: a mean of shifted profiles would look like none of them."""
    distances = np.abs(profiles[:, None] - profiles[None]).sum(axis=(1, 2))
    nearest: Array = profiles[np.argmin(distances)]
    return nearest


def _share_panel(panel: Axes, window: LineWindow, families: Families) -> None:
    """Bars of the shapes' shares, divided by asymmetry."""
    places = np.arange(len(SHAPES))[::-1]
    left = np.zeros(len(SHAPES))
    for side, asymmetry in enumerate(ASYMMETRIES):
        width = np.array(
            [100 * np.mean((families.shape == s) & (families.asymmetry == side)) for s in range(len(SHAPES))]
        )
        panel.barh(places, width, left=left, height=0.55, color=_COLOURS[asymmetry], alpha=0.85)
        for place, start, extent in zip(places, left, width, strict=True):
            if extent >= 4.0:
                panel.text(
                    start + 0.5 * extent,
                    place,
                    f"{extent:.0f}",
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=7.5,
                )
        left += width
    for place, shape in zip(places, SHAPES, strict=True):
        panel.text(0.0, place + 0.33, shape, va="bottom", fontsize=8)
    panel.set(
        title=f"{LINE_TITLES[window.name]}: shares",
        xlabel="share of profiles [%]",
        ylim=(-0.5, len(SHAPES) + 1.0),
        xlim=(0, None),
    )
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    names = {"blue": "blue side brighter", "none": "neither", "red": "red side brighter"}
    handles = [Line2D([], [], color=_COLOURS[side], linewidth=4, label=names[side]) for side in ASYMMETRIES]
    panel.legend(handles=handles, loc="upper right", handlelength=0.8, borderaxespad=0.0)


def _height_panel(panel: Axes, grid: xr.Dataset, quantity: str, top: float) -> None:
    heights = grid["height"].to_numpy()
    seen = heights <= top
    if seen.sum() < 2:
        seen[:] = True
    values = grid[quantity].to_numpy().astype(np.float64)[:, seen]
    for probability, strength in ((0.9, 0.18), (0.68, 0.36)):
        low, high = np.quantile(values, (0.5 - probability / 2, 0.5 + probability / 2), axis=0)
        panel.fill_between(
            heights[seen],
            low,
            high,
            color=_BAND,
            alpha=strength,
            linewidth=0,
            label=f"{100 * probability:.0f} %",
        )
    for number in _spread(np.arange(len(values)), _MEMBERS):
        panel.plot(heights[seen], values[number], color=_BAND, linewidth=0.7, alpha=0.9)
    panel.plot(heights[seen], np.median(values, axis=0), color=_BLACK, linewidth=1.6, label="median")
    if LOOKS[quantity].logarithmic:
        panel.set_yscale("log")
    else:
        panel.axhline(0.0, color="#999999", linewidth=0.6, zorder=0)
        panel.text(
            0.02, 0.97, "upflow positive", transform=panel.transAxes, va="top", color="#666666", fontsize=8
        )
    panel.set(
        title=NAMES[quantity], xlabel="height [Mm]", ylabel=LOOKS[quantity].label,
        xlim=(heights[seen][0], heights[seen][-1]),
    )  # fmt: skip
    if quantity == "electron_density":
        panel.legend(loc="upper right")


# In words


def _maker(grid: xr.Dataset) -> str:
    maker = grid.attrs.get("maker", {})
    return str(maker.get("name", "unknown maker")) if isinstance(maker, dict) else str(maker)


def describe_grid(path: str | Path, *, mu: float | None = None) -> RenderableType:
    """Describe a grid: samples, simulations and their split, axes, parameters, families, provenance.

    Parameters
    ----------
    path : str or Path
        A grid store.
    mu : float, optional
        Cosine of the heliocentric angle at which profiles are sorted into families; the grid's nearest is
        taken, by default its largest.

    Returns
    -------
    rich renderable
        For ``rich.console.Console().print``.

    Raises
    ------
    StoreError
        There is no grid.
    """
    path = Path(path)
    with open_grid(path) as grid:
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="bold", no_wrap=True)
        facts.add_column(overflow="fold")
        for name, value in _facts(path, grid):
            facts.add_row(name, escape(value))
        tables: list[RenderableType] = [facts, "", _parameter_table(grid)]
        if bool(grid["converged"].any()):
            tables += ["", _family_table(_sampled(grid, mu))]
    return Group(*tables)


def _facts(path: Path, grid: xr.Dataset) -> Iterator[tuple[str, str]]:
    yield "grid", f"{grid.attrs.get('title', 'training grid')}: {path}"
    maker = grid.attrs.get("maker", {})
    settings = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in (maker.items() if isinstance(maker, dict) else ())
        if name != "name" and not isinstance(value, dict | list)
    ]
    yield "maker", _maker(grid) + (f" ({', '.join(settings)})" if settings else "")
    yield "equilibrium", str(grid.attrs.get("statistical_equilibrium", "not stated"))
    yield "samples", _sample_counts(grid)
    if runs := json.loads(grid.attrs.get("runs", "{}")):
        yield "runs", _run_counts(runs)
    yield "simulations", _split_counts(grid)
    yield "mu", ", ".join(f"{value:.4g}" for value in grid["mu"].to_numpy())
    for window in (HALPHA, CA8542):
        axis = grid[f"wavelength_{window.name}"]
        offsets, rest = axis.to_numpy(), axis.attrs["rest_wavelength"]
        yield (
            LINE_TITLES[window.name],
            f"{offsets.size} wavelengths, {offsets[0]:+.3f} to {offsets[-1]:+.3f} Å, steps from "
            f"{np.diff(offsets).min():.3f} Å; rest {rest:.3f} Å ({axis.attrs.get('medium', 'vacuum')}); "
            f"{grid[window.name].attrs.get('units', 'no unit stated')}",
        )
    heights, zero = grid["height"].to_numpy(), grid.attrs.get("height_zero", "not stated")
    yield "heights", f"{heights.size}, {heights[0]:g} to {heights[-1]:g} Mm; zero: {zero}"
    files = [file for file in path.rglob("*") if file.is_file()]
    yield "on disk", f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB in {len(files)} files"
    yield (
        "made by",
        f"FlareField {grid.attrs.get('flarefield_version', 'unknown')}: {grid.attrs.get('call', '')}",
    )
    for name, digest in dict(grid.attrs.get("made_from", {})).items():
        yield "made from", f"{name}, SHA-256 {digest}"
    yield "content", f"SHA-256 {content_hash(path)}"


def _sample_counts(grid: xr.Dataset) -> str:
    total, usable = grid.sizes["sample"], int(grid["converged"].sum())
    text = f"{total:,}, of which {usable:,} converged"
    if usable == total:
        return text
    if "status" in grid:
        kinds = Counter(STATUS[int(number)] for number in grid["status"].to_numpy() if number != 0)
        text += "; " + ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in kinds.most_common())
    # The reasons' numbers (iterations, changes) differ from sample to sample; what is before them does not.
    reasons = Counter(
        reason.partition(":")[0].strip() for reason in json.loads(grid.attrs.get("failures", "{}")).values()
    )
    if reasons:
        text += " (" + "; ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common(5)) + ")"
    return text


def _run_counts(runs: dict[str, dict[str, Any]]) -> str:
    text = f"{len(runs):,}"
    refused = {name: facts["refused"] for name, facts in runs.items() if facts.get("refused")}
    unfinished = [name for name, facts in runs.items() if facts.get("unfinished")]
    if unfinished:
        text += f"; {len(unfinished)} unfinished: {', '.join(unfinished[:3])}" + (
            "..." if unfinished[3:] else ""
        )
    if refused:
        shown = "; ".join(f"{name} ({reason})" for name, reason in list(refused.items())[:3])
        text += f"; {len(refused)} refused: {shown}" + ("..." if len(refused) > 3 else "")
    return text


def _split_counts(grid: xr.Dataset) -> str:
    simulation, usable = grid["simulation"].to_numpy(), grid["converged"].to_numpy()
    places = split(simulation)
    parts = []
    for part in ("train", "validation", "test"):
        here = places == part
        parts.append(f"{part} {np.unique(simulation[here]).size:,} ({int(usable[here].sum()):,} samples)")
    return f"{np.unique(simulation).size:,}: {', '.join(parts)}"


def _parameter_table(grid: xr.Dataset) -> Table:
    table = Table(
        "parameter", "from", "median", "to", "unit", "meaning", title="Parameters", title_justify="left"
    )
    for name in (str(name) for name in grid.data_vars if str(name).startswith("parameter_")):
        values = grid[name].to_numpy().astype(np.float64)
        unit, meaning = (str(grid[name].attrs.get(key, "")) for key in ("units", "long_name"))
        table.add_row(
            name.removeprefix("parameter_"), *_range(values[np.isfinite(values)]),
            "" if unit == "1" else escape(unit), escape(meaning),
        )  # fmt: skip
    return table


def _range(values: Array) -> tuple[str, str, str]:
    """Least, median and greatest value, to a thousandth of their range."""
    if not values.size:
        return ("unknown", "", "")
    low, middle, high = float(values.min()), float(np.median(values)), float(values.max())
    digits = 3 - int(np.floor(np.log10(high - low))) if high > low else 6
    return (f"{round(low, digits):.4g}", f"{round(middle, digits):.4g}", f"{round(high, digits):.4g}")


def _family_table(sampled: _Sampled) -> Table:
    table = Table(
        "line", *SHAPES, *(f"{side} side brighter" for side in ("blue", "red")),
        title=f"Profile families at mu = {sampled.mu:.4g}", title_justify="left",
    )  # fmt: skip
    for window in (HALPHA, CA8542):
        families = profile_families(*sampled.line(window))
        table.add_row(
            LINE_TITLES[window.name],
            *(_share(families.shape == number) for number in range(len(SHAPES))),
            *(_share(families.asymmetry == ASYMMETRIES.index(side)) for side in ("blue", "red")),
        )
    return table


def show_grid(
    path: str | Path,
    figure: str | Path | None = None,
    *,
    mu: float | None = None,
    console: Console | None = None,
) -> None:
    """Print what a grid holds, and write a picture of it.

    Parameters
    ----------
    path : str or Path
        A grid store.
    figure : str or Path, optional
        Where the picture goes; its suffix decides the format (``.png``, ``.pdf``, ``.svg``).
    mu : float, optional
        Cosine of the heliocentric angle of the profiles; the grid's nearest, by default its largest.
    console : rich.console.Console, optional
        Where the text goes; the terminal if left out.

    Raises
    ------
    StoreError
        There is no grid.
    MisuseError
        A picture is asked for and the grid has no converged samples, or it cannot be written there.
    """
    (console or Console()).print(describe_grid(path, mu=mu))
    if figure is not None:
        with open_grid(path) as grid:
            drawn = coverage_figure(grid, mu=mu)
        save_figure(drawn, figure)
