"""A small synthetic grid in the schema of a training grid: four parameters, profiles in closed form.

The atmospheres look like heated chromospheres and the lines respond to them as lines do (emission with
heating, width with density, Doppler shift with velocity and mu), but nothing here solves any transfer: tests
that need a grid quickly use it, and nothing else does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from inn.layout import HEIGHTS

LIGHT_SPEED = 299_792.458  # km/s
REST = {"halpha": 6564.69, "ca8542": 8544.44}
MU = np.array([0.3, 0.6, 0.9])


def _line(name, offsets, heating, density, velocity, mu):
    """Intensity, shape (samples, mu, wavelengths)."""
    rest = REST[name]
    width = (0.45 if name == "halpha" else 0.18) * (1.0 + 0.25 * density)
    depth = 0.7 if name == "halpha" else 0.8
    shift = -rest * velocity[:, None] * mu[None, :] / LIGHT_SPEED
    distance = (offsets[None, None, :] - shift[..., None]) / width[:, None, None]
    core = np.exp(-0.5 * distance**2)
    reversal = np.exp(-0.5 * (3.0 * distance) ** 2)
    strength = 3.0 * heating[:, None, None] - depth + 0.2 * (1.0 - mu)[None, :, None]
    continuum = (0.6 + 0.4 * mu)[None, :, None] * (3.0e6 if name == "halpha" else 1.6e6)
    return continuum * (1.0 + strength * core - 0.4 * heating[:, None, None] * reversal)


def toy_grid(samples: int = 300, seed: int = 0) -> xr.Dataset:
    """A grid of `samples` atmospheres of one simulation each, every fiftieth not converged."""
    generator = np.random.default_rng(seed)
    heating, density, height, direction = generator.uniform(0.0, 1.0, (4, samples))
    transition = 1.2 + 0.9 * height
    velocity_peak = 30.0 * (2.0 * direction - 1.0)
    z = HEIGHTS[None, :]
    step = 0.5 * (1.0 + np.tanh((z - transition[:, None]) / 0.08))
    chromosphere = 3.72 + (0.15 + 0.25 * heating[:, None]) / (1.0 + np.exp(-(z - 0.6) / 0.08))
    temperature = 10.0 ** (chromosphere * (1.0 - step) + 6.2 * step)
    log_density = (
        11.0
        + 1.5 * heating[:, None]
        + density[:, None]
        - 0.6 * z.clip(0, 3)
        + 1.0 * np.exp(-((z / 0.3) ** 2))
    )
    electron_density = 10.0 ** (log_density - 0.8 * step)
    velocity = velocity_peak[:, None] * np.exp(-0.5 * ((z - 1.0) / 0.4) ** 2)
    offsets = {"halpha": np.linspace(-2.0, 2.0, 161), "ca8542": np.linspace(-1.7, 1.7, 171)}
    profiles = {
        name: _line(name, offsets[name], heating, density, velocity_peak, MU).astype(np.float32)
        for name in REST
    }
    intensity = {"units": "erg s-1 cm-2 sr-1 Angstrom-1"}
    number = np.arange(samples)
    grid = xr.Dataset(
        {
            "electron_density": (("sample", "height"), electron_density, {"units": "cm-3"}),
            "temperature": (("sample", "height"), temperature, {"units": "K"}),
            "velocity": (("sample", "height"), velocity, {"units": "km s-1"}),
            "halpha": (("sample", "mu", "wavelength_halpha"), profiles["halpha"], intensity),
            "ca8542": (("sample", "mu", "wavelength_ca8542"), profiles["ca8542"], intensity),
            "simulation": (("sample",), number),
            "converged": (("sample",), number % 50 != 49),
            "parameter_heating": (("sample",), heating, {"units": ""}),
            "parameter_density": (("sample",), density, {"units": ""}),
            "parameter_transition_height": (("sample",), transition, {"units": "Mm"}),
            "parameter_velocity_peak": (("sample",), velocity_peak, {"units": "km s-1"}),
            "parameter_microturbulence": (("sample",), np.full(samples, 4.0), {"units": "km s-1"}),
        },
        coords={"height": ("height", HEIGHTS, {"units": "Mm"}), "mu": ("mu", MU)},
        attrs={
            "kind": "grid",
            "flarefield_version": "0",
            "call": "tests.toy_grid",
            "made_from": {},
            "height_zero": "arbitrary: a test's closed form",
            "equilibrium": "none: a test's closed form",
        },
    )
    for name, rest in REST.items():
        grid[f"wavelength_{name}"] = (
            (f"wavelength_{name}",),
            offsets[name],
            {"units": "Angstrom", "rest_wavelength": rest},
        )
    # What did not converge holds nothing that may be learned from.
    bad = ~grid["converged"].values
    for name in ("electron_density", "temperature", "velocity", "halpha", "ca8542"):
        grid[name].values[bad] = np.nan
    return grid


def write_toy_grid(path: str | Path, samples: int = 300, seed: int = 0) -> Path:
    """Write `toy_grid` as a Zarr store and return its path."""
    toy_grid(samples, seed).to_zarr(path, zarr_format=3, mode="w")
    return Path(path)
