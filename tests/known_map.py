"""A small map of a known truth, in closed form, for the tests of comparison, pictures and report."""

import numpy as np
import xarray as xr
from scipy.stats import norm

from inn.layout import CA8542, HALPHA
from pipeline.results import VARIABLES, Flag

QUANTILES = np.array([0.05, 0.16, 0.5, 0.84, 0.95])
HEIGHTS = np.array([0.1, 0.3, 0.6, 0.9, 1.2, 1.5, 2.0])
SCANS, ROWS, COLUMNS, SAMPLES = 2, 12, 15, 20
SPREAD = {"electron_density": 0.3, "temperature": 0.05, "velocity": 4.0}
FRAME = ("time", "y", "x")


def known_truth(seed: int = 0) -> xr.Dataset:
    """Every pixel painted with one of `SAMPLES` random atmospheres; one column outside the field."""
    random = np.random.default_rng(seed)
    shape = (SAMPLES, HEIGHTS.size)
    painted = random.integers(0, SAMPLES, (SCANS, ROWS, COLUMNS))
    painted[:, :, 0] = -1
    ribbon = np.zeros(painted.shape, dtype=bool)
    ribbon[:, 3:8, 1:] = True
    return xr.Dataset(
        {
            "electron_density": (("sample", "height"), 10 ** random.uniform(10, 14, shape)),
            "temperature": (("sample", "height"), 10 ** random.uniform(3.6, 4.2, shape)),
            "velocity": (("sample", "height"), random.uniform(-20, 20, shape)),
            "painted": (FRAME, painted.astype(np.int32)),
            "ribbon": (FRAME, ribbon),
            "overlap": (FRAME, painted >= 0),
            "shift_y": ("time", np.array([-1.0, 2.0])),
            "shift_x": ("time", np.array([0.5, 0.25])),
        },
        coords={
            "height": HEIGHTS,
            "time": np.array(["2014-09-06T16:55:57", "2014-09-06T16:56:08"], dtype="datetime64[ns]"),
        },
    )


def map_around(truth: xr.Dataset, error: float = 0.0, seed: int = 1) -> xr.Dataset:
    """A map whose posterior is Gaussian of the stated spread, off the truth by `error` spreads at random."""
    random = np.random.default_rng(seed)
    painted = truth["painted"].values
    outside = painted < 0
    variables = {}
    for name, spread in SPREAD.items():
        table = truth[name].values if name == "velocity" else np.log10(truth[name].values)
        centre = table[np.maximum(painted, 0)]
        centre = centre + error * spread * random.standard_normal(centre.shape)
        level = centre[..., None, :] + spread * norm.ppf(QUANTILES)[:, None]
        values = level if name == "velocity" else 10.0**level
        values[outside] = np.nan
        variables[name] = ((*FRAME, "quantile", "height"), values)
    novelty = random.uniform(0.02, 1.0, painted.shape)
    novelty[0, 5, 5] = 0.001
    quality = np.where(outside, Flag.OUTSIDE_FIELD, 0).astype(np.uint16)
    quality[0, 5, 5] |= Flag.NOVEL
    variables["quality"] = (FRAME, quality)
    variables["novelty"] = (FRAME, np.where(outside, np.nan, novelty))
    variables["misfit"] = (FRAME, np.where(outside, np.nan, random.uniform(0.02, 0.1, painted.shape)))
    dataset = xr.Dataset(
        variables,
        coords={
            "time": truth["time"],
            "y": ("y", 0.057 * (np.arange(ROWS) - 5.0), {"units": "arcsec"}),
            "x": ("x", 0.057 * (np.arange(COLUMNS) - 7.0), {"units": "arcsec"}),
            "quantile": QUANTILES,
            "height": HEIGHTS,
            "mu": ("time", np.array([0.55, 0.55])),
            "pointing_longitude": ("time", np.array([-730.0, -730.0])),
            "pointing_latitude": ("time", np.array([-313.0, -313.0])),
        },
        attrs={
            "kind": "map",
            "call": "flarefield invert <obs>.zarr map.zarr",
            "settings": {"draws": 64, "seed": 3},
            "made_from": {f"{number}.fits": "0" * 64 for number in range(60)},
            "height_zero": "somewhere",
            "statistical_equilibrium": "none: closed form",
        },
    )
    for variable in VARIABLES:
        dataset[variable.name].attrs.update(variable.attrs)
    return dataset


def observation_of(truth: xr.Dataset) -> xr.Dataset:
    """An observation store's part that pictures and comparison look at."""
    random = np.random.default_rng(2)
    shape = truth["painted"].shape
    axes = {
        line.name: line.rest_wavelength + np.linspace(-1.4, 1.4, points)
        for line, points in ((HALPHA, 15), (CA8542, 25))
    }
    lines = {
        name: (
            (*FRAME, f"wavelength_{name}"),
            random.uniform(100, 4000, (*shape, axis.size)),
            {"units": "DN"},
        )
        for name, axis in axes.items()
    }
    return xr.Dataset(
        {
            **lines,
            "valid": truth["overlap"],
            "shift_y": truth["shift_y"] + 0.04,
            "shift_x": truth["shift_x"] - 0.02,
            "shift_applied": ("time", np.array([True, False])),
        },
        coords={
            "time": truth["time"],
            "time_halpha": ("time", truth["time"].values),
            "time_ca8542": ("time", truth["time"].values + np.timedelta64(5, "s")),
            **{f"wavelength_{name}": axis for name, axis in axes.items()},
        },
    )
