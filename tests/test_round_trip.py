"""A known scene through a format's files and ingest: the same spectra at every valid pixel, to the noise.

Then a line's shift, through files in air with cavity errors and the bundled network: an upflow, a blueshift,
a positive velocity.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import astropy.units as u
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.crisp.cube import PER_ANGSTROM
from pipeline.crisp.fchroma import file_name, write_fchroma
from pipeline.crisp.scan import cosine_of_pointing
from pipeline.crisp.wavelengths import vacuum_to_air
from pipeline.grids.store import BUNDLED_GRID, open_grid, split
from pipeline.ingest import ingest
from pipeline.invert import invert
from pipeline.observation import open_observation
from pipeline.registration import move_mask
from pipeline.results import open_map
from pipeline.training_set import CRISP_WAVELENGTHS, response_matrix
from tests.fchroma_files import (
    CADENCE,
    PAD,
    START,
    WAVELENGTH_CA8542,
    WAVELENGTH_HALPHA,
    displace,
    rotated_field,
    scene,
    smooth_noise,
)
from tests.sstred_files import DAY, write_sstred
from tests.toy_observation import write_store

SHAPE = (90, 110)
SHIFTS = ((2.3, -1.4), (-4.6, 3.2))
"""(y, x) pixels that bring Ca II onto H-alpha, of the two scans."""
AXES = {"halpha": WAVELENGTH_HALPHA, "ca8542": WAVELENGTH_CA8542}
COUNT = 1e3
"""Intensity per Angstrom of one count of the scene, in `PER_ANGSTROM`, where files have physical units."""
LIGHT_SPEED = 299_792.458  # km/s


@dataclass(frozen=True)
class Series:
    """Two scans of both lines, in counts, as the detector has them.

    Attributes
    ----------
    truth, noisy : dict of str to ndarray, shape (scan, wavelength, y, x)
        Each line as it is on the Sun, in H-alpha's frame; and as it was taken, Ca II displaced, with noise.
    field : dict of str to ndarray of bool, shape (scan, y, x)
        Each line's field in its own frame.
    """

    truth: dict[str, NDArray[np.float64]]
    noisy: dict[str, NDArray[np.float64]]
    field: dict[str, NDArray[np.bool_]]


@pytest.fixture(scope="module")
def series() -> Series:
    rng = np.random.default_rng(5)
    field = rotated_field(SHAPE, 20.0)
    truth, noisy, fields = ({"halpha": [], "ca8542": []} for _ in range(3))
    for shift in SHIFTS:
        cubes = dict(zip(AXES, scene(rng, SHAPE), strict=True))
        seen = {
            "halpha": cubes["halpha"],
            "ca8542": np.stack([displace(image, -shift[0], -shift[1]) for image in cubes["ca8542"]]),
        }
        own = {"halpha": field, "ca8542": np.roll(field, [-round(value) for value in shift], (0, 1))}
        for line, cube in cubes.items():
            truth[line].append(cube)
            noise = np.sqrt(np.maximum(seen[line], 1.0)) * rng.standard_normal(cube.shape)
            noisy[line].append(np.rint(np.maximum(seen[line] + noise, 1.0)))
            fields[line].append(own[line])
    return Series(
        *({line: np.stack(parts) for line, parts in all_of.items()} for all_of in (truth, noisy, fields))
    )


def seconds(points: int, delay: float) -> NDArray[np.float64]:
    """Times of the exposures since midnight, (scan, tuning), about the scans' mean times."""
    first = (START - np.datetime64(DAY, "ms")) / np.timedelta64(1, "s")
    middle = first + delay + np.arange(2) * (CADENCE / np.timedelta64(1, "s"))
    return middle[:, None] + 0.2 * (np.arange(points) - (points - 1) / 2)


def in_fchroma(folder: Path, series: Series) -> None:
    """16-bit counts, one file a scan, wavelengths in vacuum, a constant pad."""
    for line, axis in AXES.items():
        for number in range(2):
            inside = series.field[line][number]
            moment = START + number * CADENCE + np.timedelta64(0 if line == "halpha" else 5015, "ms")
            write_fchroma(
                folder / file_name(line, START, number),
                np.where(inside, series.noisy[line][number], PAD),
                axis,
                moment,
            )


def per_frequency(line: str) -> NDArray[np.float64]:
    """Intensity per frequency, W m-2 Hz-1 sr-1, of one count of the scene, (wavelength, 1, 1)."""
    intensity = np.full(len(AXES[line]), COUNT) * PER_ANGSTROM
    equivalence = u.spectral_density(AXES[line] * u.Angstrom)
    return intensity.to_value("W m-2 Hz-1 sr-1", equivalence)[:, None, None]


def in_sstred(folder: Path, series: Series) -> None:
    """Floats per frequency, one file a line, wavelengths in air, a pad of NaN."""
    for line, axis in AXES.items():
        cube = np.where(series.field[line][:, None], series.noisy[line] * per_frequency(line), np.nan)
        write_sstred(
            folder / f"nb_{line}_im.fits",
            cube[:, None],
            vacuum_to_air(axis),
            seconds(len(axis), 0.0 if line == "halpha" else 5.015),
            padding="nan",
        )


def in_sstred_integers(folder: Path, series: Series) -> None:
    """The same in scaled integers, the pad each frame's median, and Stokes Q, U, V besides."""
    for line, axis in AXES.items():
        values = series.noisy[line] * per_frequency(line)
        inside = series.field[line][:, None]
        median = np.nanmedian(np.where(inside, values, np.nan), axis=(2, 3), keepdims=True)
        cube = np.where(inside, values, median)
        write_sstred(
            folder / f"nb_{line}_stokes_im.fits",
            np.stack([cube, 0.01 * cube, -0.01 * cube, 0.002 * cube], axis=1),
            vacuum_to_air(axis),
            seconds(len(axis), 0.0 if line == "halpha" else 5.015),
            padding="median",
            integers=True,
        )


@pytest.mark.parametrize(
    ("write", "count"),
    [(in_fchroma, 1.0), (in_sstred, COUNT), (in_sstred_integers, COUNT)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_scene_comes_back(tmp_path, series, write, count):
    write(tmp_path, series)
    report = ingest([tmp_path], tmp_path / "obs.zarr", call="")
    dataset = open_observation(tmp_path / "obs.zarr").load()
    assert dataset.shift_applied.values.all()
    for line, axis in AXES.items():
        np.testing.assert_allclose(dataset[f"wavelength_{line}"], axis, rtol=0, atol=1e-6)
    times = START + np.arange(2) * CADENCE
    apart = np.abs(dataset.time_halpha.values - times), np.abs(dataset.time_ca8542.values - times)
    assert max(apart[0]) < np.timedelta64(1, "ms")
    assert max(np.abs(apart[1] - np.timedelta64(5015, "ms"))) < np.timedelta64(1, "ms")
    np.testing.assert_allclose(dataset.mu, 0.55, atol=0.005)
    assert report.shifts
    for number, shift in enumerate(report.shifts):
        assert np.abs(np.subtract((shift.y, shift.x), SHIFTS[number])).max() < 0.1
        valid = series.field["halpha"][number] & move_mask(series.field["ca8542"][number], shift)
        np.testing.assert_array_equal(dataset.valid.values[number], valid)
        for line in AXES:
            stored = np.moveaxis(dataset[line].values[number], -1, 0)[:, valid] / count
            truth = series.truth[line][number][:, valid]
            deviation = (stored - truth) / np.sqrt(np.maximum(truth, 1.0))
            # interpolation averages neighbours' noise: less than one at any shift
            assert np.sqrt(np.mean(deviation**2)) < 1.1
            assert abs(np.mean(deviation)) < 0.05
            if line == "halpha":
                expected = series.noisy[line][number][:, valid]
                np.testing.assert_allclose(stored, expected, rtol=1e-5, atol=0.1)


def test_wavelength_shifts_come_along(tmp_path, series):
    """Cavity errors are in the store as they were in H-alpha's file, and moved with Ca II."""
    errors = {
        line: 0.05 * np.stack([smooth_noise(np.random.default_rng(seed), SHAPE, 6.0) for seed in (1, 2)])
        for line in AXES
    }
    for line, axis in AXES.items():
        inside = series.field[line]
        own = np.stack([displace(image, -y, -x) for image, (y, x) in zip(errors[line], SHIFTS, strict=True)])
        write_sstred(
            tmp_path / f"{line}.fits",
            np.where(inside[:, None], series.noisy[line] * per_frequency(line), np.nan)[:, None],
            vacuum_to_air(axis),
            seconds(len(axis), 0.0 if line == "halpha" else 5.015),
            cavity=np.where(inside, errors[line] if line == "halpha" else own, np.nan),
        )
    ingest([tmp_path], tmp_path / "obs.zarr", call="")
    dataset = open_observation(tmp_path / "obs.zarr").load()
    assert dataset.shift_applied.values.all()
    # A difference of wavelengths is larger in vacuum, by the refractive index.
    # Ca II's is interpolated: off by a hundredth of its variation, and more in the border's last pixel.
    for line, typical, worst in (("halpha", 1e-6, 1e-6), ("ca8542", 5e-4, 0.01)):
        found = dataset[f"wavelength_shift_{line}"]
        assert found.dims == ("time", "y", "x")
        assert u.Unit(found.attrs["units"]) == u.Angstrom
        valid = dataset.valid.values
        away = np.abs(found.values - 1.000275 * errors[line])[valid]
        assert np.sqrt(np.mean(away**2)) < typical
        assert away.max() < worst


def test_an_upflow_is_a_blueshift_is_a_positive_velocity(tmp_path, client):
    """Every atmosphere twice, rising and falling, below cavity errors that would turn both lines' shifts."""
    speed, cavity = 2.0, 0.07  # km/s, vertical; Angstrom: 3.2 km/s in H-alpha, 2.5 in Ca II
    grid = open_grid(BUNDLED_GRID)
    grid = grid.isel(sample=np.flatnonzero(split(grid["simulation"].values) == "test")[:160]).load()
    pointing = (-480.0, 310.0)
    mu = float(cosine_of_pointing(pointing, START))
    angle = int(np.abs(grid["mu"].values - mu).argmin())
    assert float(grid["mu"][angle]) == pytest.approx(mu, abs=0.03)
    for line, axis in CRISP_WAVELENGTHS.items():
        halves = []
        for rising in (1.0, -1.0):
            # An approaching source is seen to the blue of where it emits. The instrument looks where it says,
            # plus the cavity error, which is of the other sign.
            emitted = (axis - rising * cavity) * (1.0 + rising * speed * mu / LIGHT_SPEED)
            offsets = emitted - {"halpha": 6564.61, "ca8542": 8544.44}[line]
            weights = response_matrix(line, grid[f"wavelength_{line}"].values, offsets)
            seen = grid[line].isel(mu=angle).values @ weights.T
            halves.append(seen.T.reshape(len(axis), 10, 16))
        per_hertz = (np.ones(len(axis)) * PER_ANGSTROM).to_value(
            "W m-2 Hz-1 sr-1", u.spectral_density(axis * u.Angstrom)
        )
        write_sstred(
            tmp_path / f"{line}.fits",
            (np.concatenate(halves, axis=2) * per_hertz[:, None, None])[None, None],
            vacuum_to_air(axis),
            seconds(len(axis), 0.0)[:1],
            pointing=pointing,
            cavity=np.broadcast_to(np.repeat([-cavity, cavity], 16), (1, 10, 32)),
        )
    ingest([tmp_path], tmp_path / "obs.zarr", call="")
    velocities = {}
    for name in ("told", "not told"):
        observation = tmp_path / f"{name}.zarr"
        dataset = open_observation(tmp_path / "obs.zarr").load()
        if name == "not told":
            dataset = dataset.drop_vars([f"wavelength_shift_{line}" for line in CRISP_WAVELENGTHS])
        write_store(dataset.drop_encoding(), observation)
        invert(observation, tmp_path / f"{name}-map.zarr", draws=64, quantiles=(0.5,), cluster=client)
        velocity = open_map(tmp_path / f"{name}-map.zarr").velocity.isel(time=0, quantile=0)
        velocity = velocity.sel(height=0.9, method="nearest").values
        velocities[name] = velocity[:, :16].ravel() - velocity[:, 16:].ravel()
    told = velocities["told"][np.isfinite(velocities["told"])]
    assert told.size > 150
    assert np.mean(told > 0) > 0.95
    # 4 km/s lie between the two; the grid's prior takes some of it back
    assert 2.0 < np.median(told) < 5.0
    assert np.mean(velocities["not told"] < 0) > 0.6
