"""One page that shows a map: pictures, profiles, flags, what it means and what it cannot say.

The page is one HTML file with its pictures inside: it can be mailed, or put on a server, as it is.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from pipeline import figures
from pipeline.comparison import unmixed
from pipeline.errors import MisuseError
from pipeline.provenance import flarefield_version
from pipeline.results import WITHOUT_ANSWER, Flag, count_flags, is_preview

MEANINGS: dict[Flag, str] = {
    Flag.OUTSIDE_FIELD: "not in both lines' field of view",
    Flag.NOT_FINITE: "an intensity (or a wavelength's correction, or mu) is not a number",
    Flag.NOT_POSITIVE: "an intensity is zero or negative",
    Flag.SATURATED: "an intensity is at the largest value the file can hold",
    Flag.WAVELENGTH_NOT_COVERED: "the observed wavelengths do not reach the ends of the network's windows",
    Flag.NOVEL: "the profiles are unlike the training grid's: the answer is an extrapolation",
    Flag.FAILED: "the computation failed; the journal beside the map says how",
    Flag.REGISTRATION_UNCERTAIN: "no reliable shift between the lines was found, and none was applied",
    Flag.NOT_DONE: "the run has not come to this pixel yet",
    Flag.NOT_SELECTED: "the run was not asked for this pixel",
    Flag.SPIKE: "a cosmic ray or a glitch at some wavelength, not repaired",
    Flag.DEAD_PIXEL: "a bad pixel of the detector",
    Flag.WAVELENGTH_MISSING: "the scan has no image at some wavelength",
    Flag.POOR_SEEING: "the scan's contrast is below what was asked for",
    Flag.CHANGED_BETWEEN_LINES: "the profiles changed between the times of the two lines",
    Flag.HEADER_CONTRADICTION: "the header of a scan contradicts itself or its wavelengths",
}
"""What each quality flag says, in words."""

LIMITS = (
    "Whether the Sun's atmosphere was of the grid's kind. The grid's atmospheres are one-dimensional: light "
    "from the side, unresolved structure and whatever else the grid leaves out are not in it.",
    "More than both lines say. They form between about 0.3 and 1.5 Mm; elsewhere the interval is nearly the "
    "grid's own.",
    "How heights belong together. Quantiles are of each height by itself; for gradients, column masses or "
    "anything else that joins heights, draw whole atmospheres with inn.sample.",
    "How bright the lines are. Profiles are divided by the joint maximum of both; whether their relative "
    "calibration was measured or assumed, `relative_calibration` above says.",
    "What changes within a scan. H-alpha and Ca II are seconds apart, and a ribbon moves between them: where "
    "the series shows it, pixels are flagged `changed_between_lines`.",
)
"""What a map cannot say; the page lists it."""

SETTINGS = ("call", "flarefield_version", "method", "settings", "relative_calibration")
"""Attributes of a map that the page shows at once; the others are folded away."""

MOST = 40  # entries of one attribute that the page shows
LONG = 600  # characters of one value that it shows


@dataclass(frozen=True)
class Picture:
    """A figure as the page holds it: a name for its file, what it is, what it shows, its PNG."""

    name: str
    title: str
    caption: str
    data: bytes

    @classmethod
    def of(cls, figure: Figure, name: str, title: str, caption: str) -> Picture:
        """Draw a figure into the page's form."""
        stream = io.BytesIO()
        # Without the library's version, which matplotlib would write into it: the same map, the same bytes.
        figure.savefig(stream, format="png", metadata={"Software": None})
        return cls(name, title, caption, stream.getvalue())

    @property
    def png(self) -> str:
        """The picture as text, for the page."""
        return base64.b64encode(self.data).decode()


def write_report(
    map_store: xr.Dataset,
    output: str | Path,
    *,
    observation: xr.Dataset | None = None,
    truth: xr.Dataset | None = None,
    comparison: xr.Dataset | None = None,
    time: int | None = None,
    height: float = 1.0,
    pictures: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a page about a map.

    Parameters
    ----------
    map_store : xarray.Dataset
        The map (`pipeline.results.open_map`).
    output : path
        The HTML file.
    observation : xarray.Dataset, optional
        The observation store that was inverted, for the lines' images and profiles.
    truth, comparison : xarray.Dataset, optional
        The demo's truth, and `pipeline.comparison.compare` of the map with it.
    time : int, optional
        The scan that is shown; the last one that has answers if left out.
    height : float
        Height of the maps, in Mm.
    pictures : path, optional
        A directory that gets the page's pictures as files too: ``maps.png``, ``profile_dense.png``,
        ``profile_tenuous.png``, ``trust.png``, and with a truth ``truth.png``. Existing ones are replaced.
    overwrite : bool
        Replace an existing page.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    MisuseError
        The file exists, or the map has no such scan.
    """
    path = Path(output)
    if path.exists() and not overwrite:
        raise MisuseError("the file exists", where=path, remedy="choose another name, or add --overwrite")
    scans = map_store.sizes["time"]
    quality = map_store["quality"].transpose("time", "y", "x").values
    answered = (quality & WITHOUT_ANSWER) == 0
    if time is None:
        done = np.flatnonzero(answered.any(axis=(1, 2)))
        time = int(done[-1]) if done.size else scans - 1
    if not 0 <= time < scans:
        raise MisuseError("the map has no such scan", found=time, expected=f"0 to {scans - 1}")
    maps = _maps(map_store, observation, time, height)
    profiles = _profiles(map_store, observation, truth, time, height, answered[time])
    trust = Picture.of(
        figures.trust_figure(map_store, time=time),
        "trust",
        "Novelty and misfit",
        "Where and how often profiles are unlike the training grid's (novelty near 0), and how well the "
        "posterior reproduces the observed lines (misfit near 0 is good).",
    )
    true_maps = None if truth is None else _true_maps(map_store, truth, time, height)
    environment = Environment(loader=PackageLoader("pipeline"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html").render(
        title=map_store.attrs.get("title", "Posterior map of a flare"),
        subtitle=_span(map_store),
        preview=map_store.attrs.get("comment", "") if is_preview(map_store) else None,
        key_figures=_key_figures(map_store, quality, answered),
        maps=maps,
        profiles=profiles,
        trust=trust,
        flags=_flags(quality),
        pixels=quality.size,
        comparison=None if comparison is None else _comparison(comparison),
        truth=true_maps,
        height_zero=map_store.attrs.get("height_zero", "that of the training grid"),
        limits=[*_special_limits(map_store), *LIMITS],
        settings=_rows({name: map_store.attrs[name] for name in SETTINGS if name in map_store.attrs}),
        record=_rows({name: value for name, value in map_store.attrs.items() if name not in SETTINGS}),
        version=flarefield_version(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    if pictures is not None:
        for picture in (maps, *profiles, trust, true_maps):
            if picture is not None:
                (Path(pictures) / f"{picture.name}.png").write_bytes(picture.data)
    return path


def _moment(value: np.datetime64) -> str:
    return str(np.datetime_as_string(value, unit="s")).replace("T", " ")


def _span(ds: xr.Dataset) -> str:
    times = ds["time"].values
    span = _moment(times[0]) if times.size == 1 else f"{_moment(times[0])} to {_moment(times[-1])[11:]}"
    text = f"{span} UTC"
    if "pointing_longitude" in ds:
        x, y = (float(ds[f"pointing_{axis}"].values.mean()) for axis in ("longitude", "latitude"))
        text += f", around ({x:.0f}″, {y:.0f}″)"
    if "mu" in ds:
        text += f", μ = {float(np.mean(ds['mu'].values)):.2f}"
    return text


def _key_figures(ds: xr.Dataset, quality: Any, answered: Any) -> list[tuple[str, str]]:  # noqa: ANN401
    count = int(answered.sum())
    novel = float(((quality & Flag.NOVEL) != 0)[answered].mean()) if count else 0.0
    plain = float((quality[answered] == 0).mean()) if count else 0.0
    entries = [
        ("scan" if ds.sizes["time"] == 1 else "scans", f"{ds.sizes['time']}"),
        ("pixels with an answer", f"{count:,}"),
        ("of them without any flag", f"{100 * plain:.1f} %"),
        ("of them novel", f"{100 * novel:.1f} %"),
    ]
    settings = ds.attrs.get("settings", {})
    if "draws" in settings:
        entries.append(("draws a pixel", f"{settings['draws']}"))
    return entries


def _maps(ds: xr.Dataset, observation: xr.Dataset | None, time: int, height: float) -> Picture:
    level = float(ds["height"].sel(height=height, method="nearest"))
    return Picture.of(
        figures.map_figure(ds, time=time, height=height, observation=observation),
        "maps",
        "Maps of one scan",
        f"Top: the observed line cores, novelty and misfit. Middle: posterior medians at {level:.2f} Mm, and "
        "quality flags. Bottom: the width of the posterior there, from its 16 % to its 84 % quantile. "
        "Velocity is vertical; blue is upflow. Grey: no value.",
    )


def _profiles(
    ds: xr.Dataset,
    observation: xr.Dataset | None,
    truth: xr.Dataset | None,
    time: int,
    height: float,
    answered: Any,  # noqa: ANN401
) -> list[Picture]:
    """Two pixels, of a dense and of a tenuous chromosphere, without a flag if there are such pixels."""
    quality = ds["quality"].isel(time=time).transpose("y", "x").values
    chosen, standing = answered & (quality == 0), "unflagged"
    if not chosen.any():
        chosen, standing = answered, "answered"
    if truth is not None:
        # A pixel that mixes the light of two atmospheres has no one truth to be shown beside.
        pure = chosen & unmixed(truth["painted"].values)[time]
        if pure.any():
            chosen, standing = pure, f"{standing}, unmixed"
    if not chosen.any():
        return []
    median = ds["electron_density"].sel(quantile=0.5, height=height, method="nearest").isel(time=time)
    where = np.argwhere(chosen)
    order = np.argsort(median.transpose("y", "x").values[chosen], kind="stable")
    pictures = []
    for share, name in ((0.95, "dense"), (0.3, "tenuous")):
        y, x = (int(index) for index in where[order[round(share * (order.size - 1))]])
        true = None
        if truth is not None and int(truth["painted"][time, y, x]) >= 0:
            true = truth.isel(sample=int(truth["painted"][time, y, x]))
        pictures.append(
            Picture.of(
                figures.profile_figure(ds, y, x, time=time, truth=true, observation=observation),
                f"profile_{name}",
                f"A {name} pixel",
                f"A {name} pixel: its electron density at {height:g} Mm is above that of {100 * share:.0f} % "
                f"of the scan's {standing} pixels. Bands hold 68 % and 90 % of the posterior at each height"
                + ("; dashed is the truth." if true is not None else "."),
            )
        )
    return pictures


def _true_maps(ds: xr.Dataset, truth: xr.Dataset, time: int, height: float) -> Picture:
    return Picture.of(
        figures.truth_figure(ds, truth, time=time, height=height),
        "truth",
        "Truth and posterior medians",
        "The true atmosphere of every pixel (above) and the posterior median (below), in the same colours.",
    )


def _flags(quality: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    none = int((quality == 0).sum())
    rows: list[dict[str, Any]] = [
        {
            "name": "no flag",
            "pixels": none,
            "answer": "yes",
            "meaning": "looks like the training grid",
            "code": False,
        }
    ]
    for name, count in count_flags(quality).items():
        flag = Flag[name.upper()]
        answer = "none" if flag & WITHOUT_ANSWER else "yes, with care"
        rows.append(
            {"name": name, "pixels": count, "answer": answer, "meaning": MEANINGS[flag], "code": True}
        )
    return [row | {"share": 100.0 * row["pixels"] / quality.size} for row in rows]


def _comparison(comparison: xr.Dataset) -> dict[str, Any]:
    rows = []
    for region in comparison["region"].values:
        here = comparison.sel(region=region)
        for number, quantity in enumerate(comparison["quantity"].values):
            values = here.sel(quantity=quantity)
            cells = [f"{float(values[name]):.3g}" for name in ("error", "climatology_error")]
            cells += [f"{float(values[name]):.2f}" for name in ("error_ratio", "correlation")]
            cells += [f"{100 * float(share):.0f} %" for share in values["coverage"].values]
            rows.append(
                {
                    "region": str(region) if number == 0 else "",
                    "pixels": f"{int(here['pixels']):,}" if number == 0 else "",
                    "quantity": str(quantity).replace("_", " "),
                    "cells": cells,
                }
            )
    registration = []
    if "shift_error_y" in comparison:
        for scan in range(comparison.sizes["time"]):
            at = comparison.isel(time=scan)
            registration.append(
                {
                    "time": _moment(comparison["time"].values[scan])[11:],
                    "y": f"{float(at['shift_error_y']):+.3f}",
                    "x": f"{float(at['shift_error_x']):+.3f}",
                    "applied": "yes" if bool(at["shift_applied"]) else "no",
                    "valid": f"{float(at['valid_error']):.1f}",
                }
            )
    low, high = comparison.attrs["heights"]
    return {
        "low": f"{low:g}",
        "high": f"{high:g}",
        "intervals": [f"{100 * float(interval):.0f}" for interval in comparison["interval"].values],
        "rows": rows,
        "registration": registration,
        "held_out": comparison.attrs["held_out"],
    }


def _special_limits(ds: xr.Dataset) -> list[str]:
    """What the map's model says of the limits of its grid."""
    statement = ds.attrs.get("statistical_equilibrium")
    return [f"What its training grid leaves out. {statement}"] if statement else []


def _rows(attrs: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Attributes as rows of text, nested ones under their joint name."""
    rows: list[tuple[str, str]] = []
    for number, (name, value) in enumerate(attrs.items()):
        if number == MOST:
            rows.append((f"{prefix}…", f"and {len(attrs) - MOST} more"))
            break
        if isinstance(value, Mapping):
            rows.extend(_rows(value, f"{prefix}{name}: "))
            continue
        text = json.dumps(value, default=str) if isinstance(value, (list, tuple)) else str(value)
        rows.append((f"{prefix}{name}", text if len(text) <= LONG else f"{text[:LONG]} …"))
    return rows
