"""How close a map comes to a truth that is known, as the demo's is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import ndimage

from inn.layout import QUANTITIES
from pipeline.errors import InputError
from pipeline.results import flagged

HEIGHT_RANGE = (0.3, 1.5)
"""Heights, in Mm, where the two lines form and a comparison means something."""

LOGARITHMIC = ("electron_density", "temperature")
"""Quantities compared as log10; velocities are compared in km/s."""

Array = NDArray[np.float64]


def compare(
    map_store: xr.Dataset,
    truth: xr.Dataset,
    observation: xr.Dataset | None = None,
    *,
    heights: tuple[float, float] = HEIGHT_RANGE,
) -> xr.Dataset:
    """Compare a map with the atmospheres that its observation was painted with.

    A median error says little by itself: most of an atmosphere is known before anything is observed. So each
    error is given beside climatology's: what one would make by answering every pixel of the region with the
    median true profile of that region.

    Parameters
    ----------
    map_store : xarray.Dataset
        A map store (`pipeline.results.open_map`).
    truth : xarray.Dataset
        As `pipeline.demo.DemoTruth.dataset` holds it.
    observation : xarray.Dataset, optional
        The observation store that was inverted, for the registration's errors.
    heights : tuple of float
        Lowest and highest height that are compared, in Mm.

    Returns
    -------
    xarray.Dataset
        Over ``region`` (``ribbon``; ``ribbon, unmixed``: those of them whose neighbours show the same
        atmosphere, so that no light of another is mixed in; ``quiet``):
        ``pixels`` (painted, in both fields), ``answered`` (share of them with an answer) and ``novel`` (share
        flagged so). Over ``region`` and ``quantity``: ``error`` (median absolute error of the posterior's
        median, dex or km/s, over the answered pixels and the heights), ``climatology_error``, ``error_ratio``
        of the two, ``correlation`` (Pearson's, over the same). ``coverage`` has a further dimension
        ``interval``: the share of true values inside the interval of that nominal probability. With an
        observation also, over ``time``: ``shift_error_y``, ``shift_error_x`` (pixels), ``shift_applied``, and
        ``valid_error``: the greatest distance, in pixels, of a wrongly (in)valid pixel from where it would be
        right.

    Raises
    ------
    InputError
        Map and truth are not of the same pixels, times or heights.
    """
    for dimension in ("time", "y", "x"):
        if map_store.sizes[dimension] != truth.sizes[dimension]:
            raise InputError(
                f"the map is not of the truth's observation: {dimension} differs",
                found=map_store.sizes[dimension],
                expected=truth.sizes[dimension],
            )
    levels = np.flatnonzero((truth["height"].values >= heights[0]) & (truth["height"].values <= heights[1]))
    if map_store.sizes["height"] != truth.sizes["height"] or not np.allclose(
        map_store["height"].values, truth["height"].values, atol=1e-6
    ):
        raise InputError(
            "the map's heights are not the truth's",
            found=f"{map_store.sizes['height']} heights",
            expected=f"{truth.sizes['height']} heights",
            remedy="interpolate the truth onto the map's heights",
        )
    quantiles = map_store["quantile"].values
    middle, intervals = _intervals(quantiles)
    painted = truth["painted"].values
    overlap, ribbon = truth["overlap"].values, truth["ribbon"].values
    novel = flagged(map_store, "novel").transpose("time", "y", "x").values
    regions = {
        "ribbon": overlap & ribbon,
        "ribbon, unmixed": overlap & ribbon & unmixed(painted),
        "quiet": overlap & ~ribbon & (painted >= 0),
    }
    shape = (len(regions), len(QUANTITIES))
    error, climatology_error, correlation = (np.full(shape, np.nan) for _ in range(3))
    coverage = np.full((*shape, len(intervals)), np.nan)
    answered, novel_share = np.full((2, len(regions)), np.nan)
    finite = np.ones(painted.shape, dtype=np.bool_)
    for quantity in QUANTITIES:
        values = (
            map_store[quantity].isel(height=levels).transpose("time", "y", "x", "quantile", "height").values
        )
        finite &= np.isfinite(values).all(axis=(-2, -1))
    for row, region in enumerate(regions.values()):
        if region.any():
            answered[row], novel_share[row] = finite[region].mean(), novel[region].mean()
    for column, quantity in enumerate(QUANTITIES):
        posterior = (
            map_store[quantity].isel(height=levels).transpose("time", "y", "x", "quantile", "height").values
        )
        table = truth[quantity].isel(height=levels).transpose("sample", "height").values
        if quantity in LOGARITHMIC:
            posterior, table = np.log10(posterior), np.log10(table)
        for row, region in enumerate(regions.values()):
            chosen = region & finite
            if not chosen.any():
                continue
            found, true = posterior[chosen], table[painted[chosen]]
            median = found[:, middle]
            error[row, column] = np.median(np.abs(median - true))
            climatology_error[row, column] = np.median(np.abs(np.median(true, axis=0) - true))
            correlation[row, column] = _correlation(median, true)
            for number, (lower, upper) in enumerate(intervals):
                within = (found[:, lower] <= true) & (true <= found[:, upper])
                coverage[row, column, number] = within.mean()
    by_quantity = ("region", "quantity")
    result = xr.Dataset(
        {
            "pixels": ("region", [int(region.sum()) for region in regions.values()]),
            "answered": ("region", answered, {"long_name": "share of the pixels with an answer"}),
            "novel": ("region", novel_share, {"long_name": "share of the pixels flagged novel"}),
            "error": (by_quantity, error, {"long_name": "median absolute error (dex; velocity: km/s)"}),
            "climatology_error": (
                by_quantity,
                climatology_error,
                {"long_name": "the same of the region's median true profile"},
            ),
            "error_ratio": (by_quantity, _ratio(error, climatology_error)),
            "correlation": (by_quantity, correlation, {"long_name": "correlation of median and truth"}),
            "coverage": ((*by_quantity, "interval"), coverage, {"long_name": "truth inside the interval"}),
        },
        coords={
            "region": list(regions),
            "quantity": list(QUANTITIES),
            "interval": [round(float(quantiles[upper] - quantiles[lower]), 6) for lower, upper in intervals],
        },
        attrs={
            "kind": "comparison",
            "heights": [float(heights[0]), float(heights[1])],
            "held_out": bool(truth.attrs.get("held_out", False)),
        },
    )
    return (
        result
        if observation is None
        else result.merge(_registration(observation, truth), combine_attrs="override")
    )


def as_json(comparison: xr.Dataset) -> dict[str, Any]:
    """A comparison as nested mappings that JSON can hold, NaN as None.

    Parameters
    ----------
    comparison : xarray.Dataset
        As `compare` returns it.
    """
    regions: dict[str, Any] = {}
    for region in comparison["region"].values:
        here = comparison.sel(region=region)
        entry: dict[str, Any] = {name: _number(here[name].item()) for name in ("pixels", "answered", "novel")}
        for quantity in comparison["quantity"].values:
            values = here.sel(quantity=quantity)
            entry[str(quantity)] = {
                name: _number(values[name].item())
                for name in ("error", "climatology_error", "error_ratio", "correlation")
            } | {
                "coverage": {
                    f"{interval:g}": _number(values["coverage"].sel(interval=interval).item())
                    for interval in comparison["interval"].values
                }
            }
        regions[str(region)] = entry
    result: dict[str, Any] = {
        "heights_Mm": list(comparison.attrs["heights"]),
        "held_out": comparison.attrs["held_out"],
        "regions": regions,
    }
    if "shift_error_y" in comparison:
        result["registration"] = {
            name: [_number(value) for value in comparison[name].values.tolist()]
            for name in ("shift_error_y", "shift_error_x", "shift_applied", "valid_error")
        }
    return result


def valid_error(valid: NDArray[np.bool_], overlap: NDArray[np.bool_]) -> float:
    """Greatest distance of a wrong pixel from where it would be right, in pixels; 0 if none is wrong.

    Parameters
    ----------
    valid, overlap : array of bool, shape (y, x)
        What is claimed and what is true.
    """
    distances = [0.0]
    for wrong, right in ((valid & ~overlap, overlap), (overlap & ~valid, ~overlap)):
        if wrong.any():
            distances.append(float(ndimage.distance_transform_edt(~right)[wrong].max()))
    return max(distances)


def unmixed(painted: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Pixels that show the same atmosphere as all eight neighbours.

    Parameters
    ----------
    painted : array of int, shape (time, y, x)
        The truth's ``painted``.
    """
    around = (1, 3, 3)
    alike: NDArray[np.bool_] = ndimage.minimum_filter(painted, around) == ndimage.maximum_filter(
        painted, around
    )
    return alike


def _registration(observation: xr.Dataset, truth: xr.Dataset) -> xr.Dataset:
    valid, overlap = observation["valid"].values, truth["overlap"].values
    return xr.Dataset(
        {
            "shift_error_y": (
                "time",
                observation["shift_y"].values - truth["shift_y"].values,
                {"units": "pixel"},
            ),
            "shift_error_x": (
                "time",
                observation["shift_x"].values - truth["shift_x"].values,
                {"units": "pixel"},
            ),
            "shift_applied": ("time", observation["shift_applied"].values.astype(bool)),
            "valid_error": (
                "time",
                [valid_error(*pair) for pair in zip(valid, overlap, strict=True)],
                {"units": "pixel"},
            ),
        },
        coords={"time": truth["time"]},
    )


def _intervals(quantiles: Array) -> tuple[int, list[tuple[int, int]]]:
    """Index of the median, and the index pairs of the central intervals, narrowest first."""
    middle = int(np.argmin(np.abs(quantiles - 0.5)))

    def pairs() -> Iterator[tuple[int, int]]:
        for lower in range(middle - 1, -1, -1):
            for upper in range(middle + 1, quantiles.size):
                if np.isclose(quantiles[lower] + quantiles[upper], 1.0, atol=1e-6):
                    yield lower, upper

    return middle, list(pairs())


def _correlation(found: Array, true: Array) -> float:
    spread = found.std() * true.std()
    return float(((found - found.mean()) * (true - true.mean())).mean() / spread) if spread > 0.0 else np.nan


def _ratio(numerator: Array, denominator: Array) -> Array:
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0.0)


def _number(value: Any) -> Any:  # noqa: ANN401 (a scalar of any kind)
    return None if isinstance(value, float) and not np.isfinite(value) else value
