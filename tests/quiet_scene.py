"""A field of the quiet Sun with a ribbon, plage, a spot and a filament in it, whose calibration is known.

Spectra are made from the atlas's table with sums of their own, not with `pipeline.calibration`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from astropy.table import Table

import pipeline
from inn.layout import CA8542, HALPHA
from pipeline.crisp.fchroma import write_fchroma
from pipeline.crisp.instrument import transmission
from tests.fchroma_files import PAD, WAVELENGTH_CA8542, WAVELENGTH_HALPHA, smooth_noise

AXES = {"halpha": WAVELENGTH_HALPHA, "ca8542": WAVELENGTH_CA8542}
REST = {line.name: line.rest_wavelength for line in (HALPHA, CA8542)}
CONTINUUM = {"halpha": 2.8475e6, "ca8542": 1.7361e6}
"""Disc centre, erg s-1 cm-2 sr-1 Angstrom-1: 4.093e-8 and 4.228e-8 W m-2 Hz-1 sr-1 times c / wavelength^2."""
LIGHT_SPEED = 299792.458
PIXEL = 0.2


def quiet_spectrum(line, wavelength, mu, *, darkening=1.0):
    """The quiet Sun's mean profile through CRISP at vacuum wavelengths, `mu` one of the table's."""
    table = Table.read(Path(pipeline.__file__).parent / "data" / "quiet_sun.ecsv", format="ascii.ecsv")
    table = table[table["line"] == line]
    spectrum = np.asarray(table["intensity"])
    if mu < 1.0:
        spectrum = spectrum * np.asarray(table[f"darkening_{mu}"]) ** darkening
    around = np.linspace(-0.6, 0.6, 601)
    weights = transmission(line, around)
    offset = np.asarray(wavelength) - REST[line]
    seen = np.interp(offset[:, None] + around, np.asarray(table["offset"]), spectrum)
    # Allen's Astrophysical Quantities (4th edition, table 14.17): 1 - u - v + u mu + v mu^2
    u, v = {"halpha": (0.838, -0.228), "ca8542": (0.706, -0.215)}[line]
    return CONTINUUM[line] * (1.0 - u - v + u * mu + v * mu**2) * (seen @ weights) / weights.sum()


def quiet_scene(
    *,
    counts=None,
    velocity=None,
    mu=0.6,
    darkening=1.0,
    active=True,
    times=2,
    shape=(100, 120),
    seed=1,
    slope=0.0,
):
    """An observation in data numbers.

    `counts` are data numbers of each line for one of intensity; `velocity` (km/s, upflow positive) is what
    each line shows everywhere beside its own motions; `darkening` the power to which the lines' own is put;
    `slope` a tilt of H-alpha, per Angstrom.
    """
    counts = counts or {"halpha": 1.1e-3, "ca8542": 1.9e-3}
    velocity = velocity or {}
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]] / np.array(shape)[:, None, None]
    ribbon = np.abs(rows - 0.3) < 0.06
    plage = np.hypot(rows - 0.75, columns - 0.8) < 0.12
    spot = np.hypot(rows - 0.8, columns - 0.2) < 0.15
    filament = np.abs(rows - columns + 0.1) < 0.03
    pad = columns < 0.05
    data = {}
    for line, axis in AXES.items():
        # A line that moves up is seen at bluer wavelengths: at a fixed one, a redder part of it.
        seen = axis * (1.0 + velocity.get(line, 0.0) / LIGHT_SPEED)
        profile = quiet_spectrum(line, seen, mu, darkening=darkening) * counts[line]
        if line == "halpha":
            profile = profile * (1.0 + slope * (axis - REST[line]))
        core = np.exp(-(((axis - REST[line]) / 0.35) ** 2))
        cubes = []
        for _ in range(times):
            granules = smooth_noise(rng, shape, 2.0)[..., None]
            fibrils = smooth_noise(rng, shape, 2.5)[..., None]
            cube = profile * (1.0 + 0.06 * granules * (1.0 - core) + 0.12 * fibrils * core)
            if active:
                cube = np.where(filament[..., None], profile * (1.0 - 0.45 * core), cube)
                cube = np.where(plage[..., None], profile * (1.15 + 0.6 * core), cube)
                cube = np.where(spot[..., None], 0.25 * profile, cube)
                cube = np.where(ribbon[..., None], profile * (1.2 + 4.0 * core), cube)
            cube = cube + np.sqrt(np.maximum(cube, 1.0)) * rng.standard_normal(cube.shape)
            cubes.append(np.where(pad[..., None], np.nan, cube))
        data[line] = (
            ("time", "y", "x", f"wavelength_{line}"),
            np.array(cubes, dtype=np.float32),
            {"units": "DN"},
        )
        data[f"wavelength_{line}"] = (f"wavelength_{line}", axis, {"units": "Angstrom"})
    start = np.datetime64("2014-09-06T15:27:24", "ns")
    # On the Sun's equator, 952.6 arcsec from centre to limb on that day.
    x, y = PIXEL * np.arange(shape[1]), PIXEL * np.arange(shape[0])
    middle = 952.6 * np.sqrt(1.0 - mu**2)
    dataset = xr.Dataset(
        {**data, "valid": (("time", "y", "x"), np.broadcast_to(~pad, (times, *shape)))},
        coords={
            "time": start + np.arange(times) * np.timedelta64(60, "s"),
            "x": ("x", x, {"units": "arcsec"}),
            "y": ("y", y, {"units": "arcsec"}),
            "longitude": (("y", "x"), middle + x - x.mean() + 0 * y[:, None]),
            "latitude": (("y", "x"), y[:, None] - y.mean() + 0 * x),
            "mu": ("time", np.full(times, mu)),
        },
        attrs={"relative_calibration": "assumed"},
    )
    return dataset, (ribbon | plage | spot | filament | pad if active else pad)


def write_scene(folder, dataset, delay=0):
    """The scene's files as the F-CHROMA database has them, with a constant pad.

    Ca II is taken `delay` seconds after H-alpha.
    """
    folder.mkdir(exist_ok=True)
    rows, columns = dataset.sizes["y"], dataset.sizes["x"]
    middle = [float(dataset[name].mean()) for name in ("longitude", "latitude")]
    for line, axis in AXES.items():
        cube = dataset[line].isel(time=0).transpose(f"wavelength_{line}", "y", "x").to_numpy()
        write_fchroma(
            folder / f"{line}.fits",
            np.where(np.isnan(cube), PAD, np.clip(cube, 1, 32767)),
            axis,
            dataset.time.values[0] + np.timedelta64(delay if line == "ca8542" else 0, "s"),
            pointing=(middle[0], middle[1]),
            scale=PIXEL,
            reference_pixel=((columns - 1) / 2, (rows - 1) / 2),
        )
    return folder
