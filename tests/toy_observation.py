"""A tiny observation store in the schema of `pipeline.observation`, with a pixel of every kind."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

OUTSIDE = (slice(None), slice(0, 3), slice(0, 2))
"""Times, rows and columns outside of the common field."""
NOT_A_NUMBER = (0, 5, 6)
ZERO = (0, 7, 8)
FULL = (1, 9, 4)
SATURATION = 32767.0


def toy_observation(
    times: int = 2, rows: int = 20, columns: int = 18, *, half_width: float = 1.6
) -> xr.Dataset:
    """Smooth random emission and absorption profiles in counts, different in every pixel.

    The last time's shift was not applied. `half_width` is that of both wavelength axes, in Angstrom.
    """
    random = np.random.default_rng(11)
    shape = (times, rows, columns)
    data = {}
    for name, rest, points in (("halpha", 6564.61, 15), ("ca8542", 8544.44, 25)):
        offset = np.linspace(-half_width, half_width, points)
        depth = random.uniform(-0.6, 1.5, shape)[..., None]
        width = random.uniform(0.2, 0.6, shape)[..., None]
        shift = random.uniform(-0.2, 0.2, shape)[..., None]
        profile = 1.0 + depth * np.exp(-0.5 * ((offset - shift) / width) ** 2)
        level = random.uniform(800, 2000, shape)[..., None]
        data[name] = (
            ("time", "y", "x", f"wavelength_{name}"),
            (level * profile).astype(np.float32),
            {"units": "ct", "long_name": name, "rest_wavelength": rest, "saturation": SATURATION},
        )
        data[f"wavelength_{name}"] = (f"wavelength_{name}", rest + offset, {"units": "Angstrom"})
    valid = np.ones(shape, dtype=bool)
    halpha, ca8542 = data["halpha"][1], data["ca8542"][1]
    if rows > 9 and columns > 8:
        valid[OUTSIDE] = False
        halpha[OUTSIDE] = np.nan
        halpha[NOT_A_NUMBER][3] = np.nan
        ca8542[ZERO][7] = 0.0
        if times > FULL[0]:
            ca8542[FULL][2] = SATURATION
    start = np.datetime64("2014-09-06T15:27:24", "ns")
    moments = start + np.arange(times) * np.timedelta64(12, "s")
    y, x = 0.057 * np.arange(rows), 0.057 * np.arange(columns)
    per_time = np.ones(times)
    return xr.Dataset(
        {
            **data,
            "valid": (("time", "y", "x"), valid),
            "shift_y": ("time", 3.0 * per_time, {"units": "pixel"}),
            "shift_x": ("time", -1.0 * per_time, {"units": "pixel"}),
            "shift_confidence": ("time", 0.9 * per_time, {"units": "1"}),
            "shift_applied": ("time", np.arange(times) < max(times - 1, 1)),
        },
        coords={
            "time": moments,
            "time_halpha": ("time", moments),
            "time_ca8542": ("time", moments + np.timedelta64(5, "s")),
            "y": ("y", y, {"units": "arcsec", "long_name": "offset along y"}),
            "x": ("x", x, {"units": "arcsec", "long_name": "offset along x"}),
            "longitude": (("y", "x"), -732.0 + x + 0 * y[:, None], {"units": "arcsec"}),
            "latitude": (("y", "x"), -302.0 + y[:, None] + 0 * x, {"units": "arcsec"}),
            "mu": ("time", np.linspace(0.55, 0.56, times), {"units": "1"}),
        },
        attrs={
            "kind": "observation",
            "flarefield_version": "0",
            "call": "a test",
            "made_from": {"a.fits": "0" * 64},
            "relative_calibration": "assumed",
        },
    )


def write_store(dataset: xr.Dataset, path: Path, **settings: Any) -> None:
    """Write a dataset as a Zarr v3 store with consolidated metadata, as observations have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        dataset.to_zarr(path, zarr_format=3, **settings)


def write_toy_observation(path: Path, **shape: float) -> Path:
    """Write `toy_observation` as a store."""
    write_store(toy_observation(**shape), path)
    return path
