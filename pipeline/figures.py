"""Pictures of a map: its medians and widths, one pixel's profiles, and how far the answers can be trusted.

Every function takes xarray datasets and returns a matplotlib `Figure` of its own, made without pyplot:
nothing global is touched and no display is needed. ``figure.savefig(path)`` writes it; a notebook shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from inn.layout import CA8542, HALPHA
from pipeline.errors import MisuseError
from pipeline.registration import CONFIDENT
from pipeline.results import NOVELTY_LEVEL, Flag, count_flags, is_preview

Array = NDArray[np.float64]

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "#444444",
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "figure.titlesize": 11.0,
    "savefig.dpi": 130,
    "savefig.facecolor": "white",
}

MISSING = "#d9d9d9"
"""Colour of pixels without a value."""

ACCENT, TRUE = "#20639b", "#d1495b"
"""Colours of the posterior and of a known truth."""

OK_COLOUR = "#3b7f5c"
FLAG_COLOURS = {
    Flag.OUTSIDE_FIELD: MISSING,
    Flag.NOT_DONE: "#f2f2f2",
    Flag.NOT_SELECTED: "#fafafa",
    Flag.FAILED: "#b2182b",
    Flag.NOT_FINITE: "#5e4b8b",
    Flag.NOT_POSITIVE: "#9e80c2",
    Flag.SATURATED: "#e7298a",
    Flag.WAVELENGTH_NOT_COVERED: "#80b1d3",
    Flag.WAVELENGTH_MISSING: "#1f5f8b",
    Flag.DEAD_PIXEL: "#3a3a3a",
    Flag.SPIKE: "#ff6f59",
    Flag.NOVEL: "#f0a202",
    Flag.REGISTRATION_UNCERTAIN: "#8d6e4b",
    Flag.CHANGED_BETWEEN_LINES: "#b5e550",
    Flag.POOR_SEEING: "#b9c0a8",
    Flag.HEADER_CONTRADICTION: "#c9a9d6",
}
"""Colour of every quality flag in pictures, what says most first: a pixel of several flags shows that one."""


@dataclass(frozen=True)
class _Look:
    """How a quantity is drawn."""

    symbol: str
    unit: str
    logarithmic: bool
    colours: str

    @property
    def label(self) -> str:
        return f"{self.symbol} [{self.unit}]"

    @property
    def level(self) -> str:
        """Label of a value in the space in which intervals are compared."""
        return f"log₁₀ {self.label}" if self.logarithmic else self.label

    @property
    def width(self) -> str:
        return "dex" if self.logarithmic else self.unit

    def level_of(self, values: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log10(values) if self.logarithmic else values


LOOKS = {
    "electron_density": _Look("$n_e$", "cm⁻³", True, "viridis"),
    "temperature": _Look("$T$", "K", True, "inferno"),
    "velocity": _Look("$v$", "km s⁻¹", False, "RdBu"),
}
NAMES = {"electron_density": "Electron density", "temperature": "Temperature", "velocity": "Velocity"}
LINE_TITLES = {HALPHA.name: "Hα", CA8542.name: "Ca II 8542"}


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(STYLE):
        yield


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a picture; the suffix decides the format (``.png``, ``.pdf``, ``.svg``).

    Raises
    ------
    MisuseError
        It cannot be written there, or there is no such format.
    """
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise MisuseError(
            "the picture cannot be written", where=path, found=error, expected="a .png, .pdf or .svg file"
        ) from error


@dataclass(frozen=True)
class _Frame:
    """The part of the sky that panels show: the rectangle around what was asked for, without the pad."""

    extent: tuple[float, float, float, float]
    window: tuple[float, float, float, float]

    @classmethod
    def of(cls, ds: xr.Dataset, time: int) -> _Frame:
        x, y = ds["x"].values, ds["y"].values
        inside = (ds["quality"].isel(time=time).values & (Flag.OUTSIDE_FIELD | Flag.NOT_SELECTED)) == 0
        if not inside.any():
            inside = np.ones_like(inside)
        window: list[float] = []
        for centres, occupied in ((x, inside.any(axis=0)), (y, inside.any(axis=1))):
            first, last = np.flatnonzero(occupied)[[0, -1]]
            window.extend(_edges(centres, int(first), int(last)))
        extent = (*_edges(x, 0, x.size - 1), *_edges(y, 0, y.size - 1))
        return cls(extent, (window[0], window[1], window[2], window[3]))

    def figure(self, rows: int, columns: int, width: float = 2.45) -> tuple[Figure, NDArray[np.object_]]:
        """Figure and axes of panels of `width` inches and of the frame's shape."""
        left, right, bottom, top = self.window
        height = width * min(max(abs(top - bottom) / abs(right - left), 0.45), 1.6)
        size = (columns * (width + 0.85) + 0.4, rows * (height + 0.42) + 0.65)
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)


def _edges(centres: Array, first: int, last: int) -> tuple[float, float]:
    """Outer edges of two pixels of an evenly spaced axis."""
    half = 0.5 * (centres[-1] - centres[0]) / (centres.size - 1) if centres.size > 1 else 0.5
    return float(centres[first] - half), float(centres[last] + half)


def _limits(values: Array) -> tuple[float, float]:
    """Range of nearly all values, never empty."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.percentile(finite, (1, 99)).tolist()
    least = 1e-3 * max(abs(low), abs(high)) or 1.0
    return (low, high) if high - low > least else (low - least, high + least)


def _image(
    axes: Axes,
    frame: _Frame,
    values: Array,
    title: str,
    *,
    colours: str | ListedColormap = "cividis",
    limits: tuple[float, float] | None = None,
    norm: mpl.colors.Normalize | None = None,
    bar: str | None = None,
) -> None:
    """Draw one image on the sky's axes, with a colour bar if `bar` names what it shows."""
    finite = values[np.isfinite(values)]
    if norm is None:
        norm = mpl.colors.Normalize(*(_limits(values) if limits is None else limits))
    cmap = mpl.colormaps[colours] if isinstance(colours, str) else colours
    drawn = axes.imshow(
        np.ma.masked_invalid(values),
        origin="lower",
        extent=frame.extent,
        cmap=cmap.with_extremes(bad=MISSING),
        norm=norm,
        interpolation="nearest",
    )
    axes.set(xlim=frame.window[:2], ylim=frame.window[2:], title=title)
    axes.locator_params(nbins=5)
    if bar is not None:
        low = bool(finite.size and finite.min() < norm.vmin)
        high = bool(finite.size and finite.max() > norm.vmax)
        extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(
            (low, high), "neither"
        )
        beside = axes.inset_axes((1.035, 0.0, 0.045, 1.0))
        handle = axes.figure.colorbar(drawn, cax=beside, extend=extend, extendfrac=0.04)
        handle.set_label(bar, fontsize=8)
        if not isinstance(norm, LogNorm):
            handle.locator = MaxNLocator(6)
            handle.update_ticks()
        handle.outline.set_linewidth(0.5)
        beside.tick_params(labelsize=7.5)


def _signed(value: float, digits: int) -> str:
    """Format a number with a typographic minus."""
    return f"{value:.{digits}f}".replace("-", "−")


def _titles(ds: xr.Dataset, time: int) -> str:
    moment = np.datetime_as_string(ds["time"].values[time], unit="s").replace("T", " ")
    text = f"{'PREVIEW   ' if is_preview(ds) else ''}{moment} UTC"
    if "pointing_longitude" in ds:
        pointing = [float(ds[f"pointing_{axis}"].values[time]) for axis in ("longitude", "latitude")]
        text += f"   at ({_signed(pointing[0], 0)}″, {_signed(pointing[1], 0)}″)"
    if "mu" in ds:
        text += f"   μ = {float(np.atleast_1d(ds['mu'].values)[time if ds['mu'].ndim else 0]):.2f}"
    return text


def _label(axes: NDArray[np.object_]) -> None:
    """Put coordinates on the outer panels only."""
    for (row, column), panel in np.ndenumerate(axes):
        below = row + 1 < axes.shape[0] and axes[row + 1, column].axison
        panel.tick_params(labelbottom=not below, labelleft=column == 0)
        if not below:
            panel.set_xlabel("x offset [arcsec]")
        if column == 0:
            panel.set_ylabel("y offset [arcsec]")


def _nearest(values: Array, wanted: float) -> int:
    return int(np.argmin(np.abs(values - wanted)))


def _median_index(ds: xr.Dataset) -> int:
    return _nearest(ds["quantile"].values, 0.5)


def _interval(ds: xr.Dataset, probability: float) -> tuple[int, int] | None:
    """Indices of the central interval's ends; None if the map does not hold it."""
    quantiles = ds["quantile"].values
    ends = tuple(
        np.flatnonzero(np.isclose(quantiles, q, atol=1e-6))
        for q in (0.5 - probability / 2, 0.5 + probability / 2)
    )
    return (int(ends[0][0]), int(ends[1][0])) if all(end.size for end in ends) else None


def _velocity_limits(values: Array) -> tuple[float, float]:
    finite = np.abs(values[np.isfinite(values)])
    reach = float(np.percentile(finite, 98)) if finite.size else 1.0
    return -max(reach, 0.5), max(reach, 0.5)


def _median_panel(
    axes: Axes, frame: _Frame, quantity: str, values: Array, title: str, like: Array | None = None
) -> None:
    """Draw a quantity's values at one height; colours span those of `like`, or of the values themselves."""
    look = LOOKS[quantity]
    shown, scale = look.level_of(values), look.level_of(values if like is None else like)
    limits = _velocity_limits(scale) if quantity == "velocity" else _limits(scale)
    _image(axes, frame, shown, title, colours=look.colours, limits=limits, bar=look.level)


def map_figure(
    ds: xr.Dataset, *, time: int = 0, height: float = 1.0, observation: xr.Dataset | None = None
) -> Figure:
    """Draw one scan of a map: medians at one height, the posterior's width, and where to trust it.

    Parameters
    ----------
    ds : xarray.Dataset
        A map store.
    time : int
        Which scan, by its index.
    height : float
        Height in Mm; the nearest one of the map is shown.
    observation : xarray.Dataset, optional
        The observation store that was inverted, for the images in the line cores.

    Returns
    -------
    matplotlib.figure.Figure
        Three rows: the observed line cores, novelty and misfit; the medians and the quality flags; the widths
        of the 68 % intervals. Velocity is positive (blue) for upflow.
    """
    scan = ds.isel(time=time)
    level = _nearest(ds["height"].values, height)
    here = scan.isel(height=level)
    middle, interval = _median_index(ds), _interval(ds, 0.68)
    frame = _Frame.of(ds, time)
    with _style():
        figure, axes = frame.figure(3, 4)
        for panel, line in zip(axes[0, :2], LINE_TITLES, strict=True):
            _core_panel(panel, frame, ds, observation, line, time)
        _novelty_panel(axes[0, 2], frame, scan)
        _misfit_panel(axes[0, 3], frame, scan)
        for column, (quantity, look) in enumerate(LOOKS.items()):
            values = here[quantity].transpose("quantile", "y", "x").values
            _median_panel(axes[1, column], frame, quantity, values[middle], NAMES[quantity])
            width = np.full(values.shape[1:], np.nan)
            if interval is not None:
                levels = look.level_of(values)
                width = levels[interval[1]] - levels[interval[0]]
            title = f"68 % interval of {look.symbol}"
            _image(axes[2, column], frame, width, title, bar=f"width [{look.width}]")
        _quality_panel(axes[1, 3], axes[2, 3], frame, scan)
        _label(axes)
        figure.suptitle(
            f"{_titles(ds, time)}   height {float(ds['height'][level]):.2f} Mm", x=0.01, ha="left"
        )
    return figure


def _core_panel(
    axes: Axes, frame: _Frame, ds: xr.Dataset, observation: xr.Dataset | None, line: str, time: int
) -> None:
    title = f"{LINE_TITLES[line]}, line core"
    if observation is None:
        _image(axes, frame, np.full((ds.sizes["y"], ds.sizes["x"]), np.nan), f"{title} (not at hand)")
        return
    rest = {HALPHA.name: HALPHA, CA8542.name: CA8542}[line].rest_wavelength
    index = _nearest(observation[f"wavelength_{line}"].values, rest)
    image = observation[line].isel({"time": time, f"wavelength_{line}": index}).values.astype(np.float64)
    unit = observation[line].attrs.get("units", "")
    # A square root, so that the quiet Sun is seen beside ribbons ten times as bright.
    norm = PowerNorm(0.5, *_limits(image))
    _image(axes, frame, image, title, colours="gray", norm=norm, bar=f"$I$ [{unit}]" if unit else "$I$")


def _novelty_panel(axes: Axes, frame: _Frame, scan: xr.Dataset) -> None:
    values = np.clip(scan["novelty"].values.astype(np.float64), 1e-3, None)
    _image(
        axes, frame, values, "Novelty (dark: unlike the grid)",
        colours="magma", norm=LogNorm(1e-3, 1.0), bar="tail probability",
    )  # fmt: skip


def _misfit_panel(axes: Axes, frame: _Frame, scan: xr.Dataset) -> None:
    missing = "none in a preview" if is_preview(scan) else "the model has no emulator"
    values = scan["misfit"].values.astype(np.float64)
    known = np.isfinite(values).any()
    limits = (0.0, float(np.nanpercentile(values, 99))) if known else (0.0, 1.0)
    _image(
        axes, frame, values, "Misfit" if known else f"Misfit ({missing})",
        colours="magma_r", limits=limits, bar="RMS [joint maximum]",
    )  # fmt: skip


def _quality_panel(axes: Axes, legend: Axes, frame: _Frame, scan: xr.Dataset) -> None:
    quality = scan["quality"].values
    names, colours = ["no flag"], [OK_COLOUR]
    shown = np.zeros(quality.shape)
    for flag, colour in reversed(FLAG_COLOURS.items()):
        shown[(quality & flag) != 0] = len(names)
        names.append(str(flag.name).lower().replace("_", " "))
        colours.append(colour)
    norm = BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names))
    _image(axes, frame, shown, "Quality", colours=ListedColormap(colours), norm=norm)
    legend.set_axis_off()
    handles = [
        Patch(color=colour, label=f"{name}  {100 * (shown == number).mean():.1f} %")
        for number, (name, colour) in enumerate(zip(names, colours, strict=True))
        if (shown == number).any()
    ]
    legend.legend(
        handles=handles, loc="upper left", title="Quality", alignment="left", fontsize=9, title_fontsize=9
    )


def profile_figure(
    ds: xr.Dataset,
    y: int,
    x: int,
    *,
    time: int = 0,
    truth: xr.Dataset | None = None,
    observation: xr.Dataset | None = None,
    top: float = 2.5,
) -> Figure:
    """Draw the posterior of one pixel against height, beside its observed lines.

    Parameters
    ----------
    ds : xarray.Dataset
        A map store.
    y, x : int
        The pixel, by its indices.
    time : int
        Which scan, by its index.
    truth : xarray.Dataset, optional
        ``electron_density``, ``temperature``, ``velocity`` over ``height`` of what the pixel really shows.
    observation : xarray.Dataset, optional
        The observation store that was inverted.
    top : float
        Highest height shown, in Mm.

    Returns
    -------
    matplotlib.figure.Figure
        Above: median, 68 and 90 % intervals of the three quantities. Below: both lines, and what the map says
        of the pixel.
    """
    pixel = ds.isel(time=time, y=y, x=x)
    heights = ds["height"].values
    seen = heights <= top
    with _style():
        figure = Figure(figsize=(11.0, 6.4), layout="constrained")
        axes = figure.subplots(2, 3)
        for panel, (quantity, look) in zip(axes[0], LOOKS.items(), strict=True):
            values = pixel[quantity].transpose("quantile", "height").values
            for probability, strength in ((0.9, 0.18), (0.68, 0.36)):
                ends = _interval(ds, probability)
                if ends is not None:
                    panel.fill_between(
                        heights[seen], values[ends[0]][seen], values[ends[1]][seen],
                        color=ACCENT, alpha=strength, linewidth=0, label=f"{100 * probability:.0f} %",
                    )  # fmt: skip
            panel.plot(
                heights[seen], values[_median_index(ds)][seen], color=ACCENT, linewidth=1.6, label="median"
            )
            if truth is not None:
                true = truth[quantity].values
                panel.plot(
                    heights[seen], true[seen], color=TRUE, linewidth=1.4, linestyle="--", label="truth"
                )
            if look.logarithmic and np.isfinite(values[:, seen]).any():
                panel.set_yscale("log")
            elif not look.logarithmic:
                panel.axhline(0.0, color="#999999", linewidth=0.6, zorder=0)
            panel.set(title=NAMES[quantity], xlabel="height [Mm]", ylabel=look.label, xlim=(heights[0], top))
            _open_frame(panel)
        axes[0, 0].legend(loc="upper right")
        axes[0, 2].text(
            0.02,
            0.97,
            "upflow positive",
            transform=axes[0, 2].transAxes,
            va="top",
            color="#666666",
            fontsize=8,
        )
        for panel, line in zip(axes[1, :2], (HALPHA, CA8542), strict=True):
            _line_panel(panel, observation, line.name, line.rest_wavelength, time, y, x)
        _facts(axes[1, 2], pixel, observation, time)
        position = f"x = {_signed(float(ds['x'][x]), 2)}″, y = {_signed(float(ds['y'][y]), 2)}″"
        figure.suptitle(f"{_titles(ds, time)}   {position}", x=0.01, ha="left")
    return figure


def _open_frame(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _line_panel(
    axes: Axes, observation: xr.Dataset | None, line: str, rest: float, time: int, y: int, x: int
) -> None:
    axes.set(title=f"{LINE_TITLES[line]}, observed", xlabel=f"λ − {rest:.2f} [Å]")
    _open_frame(axes)
    if observation is None:
        axes.text(0.5, 0.5, "observation not at hand", transform=axes.transAxes, ha="center", color="#666666")
        return
    here = observation.isel(time=time, y=y, x=x)
    offsets = observation[f"wavelength_{line}"].values - rest
    if (shift := f"wavelength_shift_{line}") in here:
        offsets = offsets + float(here[shift])
    axes.plot(offsets, here[line].values, color="#333333", linewidth=1.0, marker="o", markersize=3.0)
    axes.axvline(0.0, color="#999999", linewidth=0.6, zorder=0)
    axes.set_ylim(bottom=0.0)
    axes.set_ylabel(f"$I$ [{observation[line].attrs.get('units', '')}]")


def _facts(axes: Axes, pixel: xr.Dataset, observation: xr.Dataset | None, time: int) -> None:
    axes.set_axis_off()
    raised = count_flags(pixel["quality"].values)
    novelty, misfit = float(pixel["novelty"]), float(pixel["misfit"])
    rows = [
        ("quality", ", ".join(raised).replace("_", " ") or "ok"),
        ("novelty", f"{novelty:.3f}" if np.isfinite(novelty) else "none"),
        ("misfit", f"{misfit:.3f}" if np.isfinite(misfit) else "none"),
    ]
    if observation is not None:
        scan = observation.isel(time=time)
        apart = (scan["time_ca8542"].values - scan["time_halpha"].values) / np.timedelta64(1, "s")
        shift = ", ".join(_signed(float(scan[f"shift_{axis}"]), 2) for axis in ("y", "x"))
        rows += [
            (
                "Ca II scan",
                f"{_signed(float(apart), 1)} s after Hα's" if np.isfinite(apart) else "not known when",
            ),
            (
                "Ca II moved",
                f"by ({shift}) pixels" if bool(scan["shift_applied"]) else "not: shift uncertain",
            ),
        ]
    for number, (name, value) in enumerate(rows):
        height = 0.92 - 0.12 * number
        axes.text(0.04, height, name, transform=axes.transAxes, color="#666666", fontsize=9)
        axes.text(0.36, height, value, transform=axes.transAxes, fontsize=9)


def trust_figure(ds: xr.Dataset, *, time: int = 0) -> Figure:
    """Draw novelty and misfit of one scan: where on the Sun, and how they are distributed.

    Parameters
    ----------
    ds : xarray.Dataset
        A map store.
    time : int
        Which scan, by its index.

    Returns
    -------
    matplotlib.figure.Figure
        Above: maps; below: histograms. Novelty of pixels that look like the training grid is spread evenly
        between 0 and 1; a peak at the left edge is what does not look like it.
    """
    scan = ds.isel(time=time)
    novelty = scan["novelty"].values[np.isfinite(scan["novelty"].values)]
    misfit = scan["misfit"].values[np.isfinite(scan["misfit"].values)]
    frame = _Frame.of(ds, time)
    with _style():
        figure, axes = frame.figure(2, 2, width=3.6)
        _novelty_panel(axes[0, 0], frame, scan)
        _misfit_panel(axes[0, 1], frame, scan)
        _label(axes[:1])
        unlike = float((novelty < NOVELTY_LEVEL).mean()) if novelty.size else 0.0
        counts, edges = np.histogram(novelty, bins=np.linspace(0.0, 1.0, 51))
        axes[1, 0].stairs(counts / max(novelty.size, 1), edges, fill=True, color=ACCENT, alpha=0.75)
        axes[1, 0].axhline(
            0.02, color=TRUE, linestyle="--", linewidth=1.0, label="spread evenly, as the grid's"
        )
        axes[1, 0].legend(loc="upper right")
        axes[1, 0].set(
            title=f"{100 * unlike:.1f} % below {NOVELTY_LEVEL}: flagged novel",
            xlabel="novelty (tail probability)", ylabel="share of pixels", xlim=(0.0, 1.0),
        )  # fmt: skip
        reach = float(np.percentile(misfit, 99.5)) if misfit.size else 1.0
        counts, edges = np.histogram(misfit, bins=np.linspace(0.0, max(reach, 1e-6), 51))
        axes[1, 1].stairs(counts / max(misfit.size, 1), edges, fill=True, color=ACCENT, alpha=0.75)
        axes[1, 1].set(
            title=f"median {np.median(misfit):.3f}" if misfit.size else "no misfit",
            xlabel="misfit [joint maximum]", ylabel="share of pixels", xlim=(0.0, max(reach, 1e-6)),
        )  # fmt: skip
        for panel in axes[1]:
            _open_frame(panel)
        figure.suptitle(_titles(ds, time), x=0.01, ha="left")
    return figure


def truth_figure(ds: xr.Dataset, truth: xr.Dataset, *, time: int = 0, height: float = 1.0) -> Figure:
    """Draw the demo's true maps above the posterior medians, in the same colours.

    Parameters
    ----------
    ds : xarray.Dataset
        A map store.
    truth : xarray.Dataset
        As `pipeline.demo.DemoTruth.dataset` holds it.
    time : int
        Which scan, by its index.
    height : float
        Height in Mm; the nearest one is shown.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MisuseError
        The truth is of another field than the map.
    """
    painted = truth["painted"].isel(time=time).values
    if painted.shape != (ds.sizes["y"], ds.sizes["x"]):
        raise MisuseError(
            "truth and map are of different fields", found=painted.shape, expected=dict(ds.sizes)
        )
    level = _nearest(ds["height"].values, height)
    here = ds.isel(time=time, height=level, quantile=_median_index(ds))
    frame = _Frame.of(ds, time)
    with _style():
        figure, axes = frame.figure(2, 3, width=3.0)
        for column, quantity in enumerate(LOOKS):
            table = truth[quantity].isel(height=_nearest(truth["height"].values, height)).values
            true = np.where(painted >= 0, table[np.maximum(painted, 0)], np.nan)
            found = here[quantity].values
            _median_panel(axes[0, column], frame, quantity, true, f"{NAMES[quantity]}, truth")
            _median_panel(axes[1, column], frame, quantity, found, "posterior median", like=true)
        _label(axes)
        figure.suptitle(
            f"{_titles(ds, time)}   height {float(ds['height'][level]):.2f} Mm", x=0.01, ha="left"
        )
    return figure


def alignment_figure(observation: xr.Dataset) -> Figure:
    """Draw how the scans of an observation lie: the lines, and all times along an aligned series.

    Parameters
    ----------
    observation : xarray.Dataset
        An observation store.

    Returns
    -------
    matplotlib.figure.Figure
        Displacements along y and x against time, in an aligned series with their standard errors and how much
        it is turned, and how far all of this is known. Open symbols, and vertical lines, are times at which
        nothing was moved.
    """
    minutes = (observation["time"].values - observation["time"].values[0]) / np.timedelta64(60, "s")
    series = "series_aligned" in observation
    with _style():
        rows = 4 if series else 2
        figure = Figure(figsize=(7.5, 2.2 * rows + 0.2), layout="constrained")
        axes = figure.subplots(rows, 1, sharex=True)
        _displacements(axes[0], minutes, observation, "shift", "shift_applied", "Ca II against Hα")
        last = axes[-1]
        last.plot(
            minutes, observation["shift_confidence"].values, "o", markersize=4, color=ACCENT, label="lines"
        )
        if series:
            _displacements(
                axes[1], minutes, observation, "series_shift", "series_aligned", "Hα along the series"
            )
            _turns(axes[2], minutes, observation)
            last.plot(
                minutes, observation["series_confidence"].values, "s", markersize=7, color=TRUE,
                markerfacecolor="none", label="series",
            )  # fmt: skip
            residual = observation["series_residual"].values
            beside = last.twinx()
            beside.plot(minutes, residual, ".-", linewidth=0.9, markersize=3, color="#666666")
            beside.set_ylabel("left over [pixel]", color="#666666")
            beside.set_ylim(
                0.0, max(0.02, 1.2 * float(np.nanmax(residual))) if np.isfinite(residual).any() else 1.0
            )
            beside.spines["top"].set_visible(False)
        last.axhline(CONFIDENT, color="#888888", linestyle="--", linewidth=0.9)
        last.set(
            title="Confidence (below the dashed line nothing is moved)",
            ylabel="confidence", ylim=(-0.03, 1.05),
            xlabel=f"minutes since {np.datetime_as_string(observation['time'].values[0], unit='s')} UTC",
        )  # fmt: skip
        last.legend(loc="lower left", ncols=2)
        for panel in axes:
            _open_frame(panel)
    return figure


def _displacements(
    axes: Axes, minutes: Array, observation: xr.Dataset, name: str, moved: str, title: str
) -> None:
    known = observation[moved].values.astype(bool)
    error = None if name == "shift" else observation["series_error"].values[known]
    for axis, colour, symbol in (("y", ACCENT, "o"), ("x", TRUE, "s")):
        values = observation[f"{name}_{axis}"].values
        axes.plot(minutes[known], values[known], symbol, markersize=4, color=colour, label=f"along {axis}")
        axes.plot(minutes[~known], values[~known], symbol, markersize=4, color=colour, markerfacecolor="none")
        if error is not None:
            axes.fill_between(
                minutes[known],
                values[known] - error,
                values[known] + error,
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
    if known.any():  # what is not trusted may lie anywhere
        moves = np.concatenate([observation[f"{name}_{axis}"].values[known] for axis in "yx"])
        room = max(0.5, 0.1 * float(np.ptp(moves)), 0.0 if error is None else float(np.max(error)))
        axes.set_ylim(float(moves.min()) - room, float(moves.max()) + room)
    _mark(axes, minutes[~known])
    axes.set(title=f"{title}: moved at {known.sum()} of {known.size} times", ylabel="displacement [pixel]")
    axes.legend(loc="best", ncols=2)


def _turns(axes: Axes, minutes: Array, observation: xr.Dataset) -> None:
    known = observation["series_aligned"].values.astype(bool)
    turn, error = (observation[f"series_turn{name}"].values[known] for name in ("", "_error"))
    axes.plot(minutes[known], turn, "o", markersize=4, color=ACCENT)
    axes.fill_between(minutes[known], turn - error, turn + error, color=ACCENT, alpha=0.2, linewidth=0)
    axes.axhline(0.0, color="#888888", linestyle="--", linewidth=0.9)
    _mark(axes, minutes[~known])
    turned = observation.attrs.get("series_alignment", {}).get("turned", False)
    said = (
        "turned back" if turned else "not turned back, it is no more than its error or too little to notice"
    )
    axes.set(title=f"Turn along the series: {said}", ylabel="turn [degree]")


def _mark(axes: Axes, minutes: Array) -> None:
    """Mark times at which nothing was moved."""
    for minute in minutes:
        axes.axvline(minute, color=MISSING, linewidth=1.0, zorder=0)
