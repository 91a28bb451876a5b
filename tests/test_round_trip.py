"""A known scene through a format's files and ingest: the same spectra at every valid pixel, to the noise.

Then a line's shift, through files in air with cavity errors and the bundled network: an upflow, a blueshift,
a positive velocity.
"""

from __future__ import annotations

import functools
from pathlib import Path

import astropy.units as u
import numpy as np
import pytest
from scipy import ndimage

from pipeline.crisp.cube import PER_ANGSTROM
from pipeline.crisp.scan import cosine_of_pointing
from pipeline.crisp.wavelengths import vacuum_to_air
from pipeline.errors import InputError
from pipeline.grids.store import BUNDLED_GRID, open_grid, split
from pipeline.ingest import IngestReport, ingest
from pipeline.inspect import inspect
from pipeline.invert import invert
from pipeline.observation import open_observation
from pipeline.registration import move_field
from pipeline.results import open_map
from pipeline.training_set import CRISP_WAVELENGTHS, response_matrix
from tests.fchroma_files import CADENCE, START, displace, smooth_noise
from tests.known_series import (
    AXES,
    COUNT,
    FORMATS,
    SHAPE,
    SHIFTS,
    Series,
    known_series,
    per_frequency,
    seconds,
)
from tests.sstred_files import write_sstred
from tests.toy_observation import write_store

LIGHT_SPEED = 299_792.458  # km/s


@pytest.fixture(scope="module")
def series() -> Series:
    return known_series()


@pytest.fixture(scope="module")
def ingested(series, tmp_path_factory):
    """Give the series' observation out of a format's files, and its report; made once."""

    @functools.cache
    def of(name: str) -> tuple[Path, IngestReport]:
        write, _ = FORMATS[name]
        folder = tmp_path_factory.mktemp("files")
        keywords = write(folder, series)
        path = tmp_path_factory.mktemp("observation") / "obs.zarr"
        return path, ingest([folder], path, call="", **keywords)

    return of


@pytest.mark.parametrize("name", FORMATS)
def test_the_scene_comes_back(series, ingested, name):
    path, report = ingested(name)
    count = FORMATS[name][1]
    dataset = open_observation(path).load()
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
        valid = series.field["halpha"][number] & move_field(series.field["ca8542"][number], shift)
        np.testing.assert_array_equal(dataset.valid.values[number], valid)
        for line in AXES:
            stored = np.moveaxis(dataset[line].values[number], -1, 0)[:, valid] / count
            truth = series.truth[line][number][:, valid]
            deviation = (stored - truth) / np.sqrt(np.maximum(truth, 1.0))
            # interpolation averages neighbours' noise: less than one at any shift
            assert np.sqrt(np.mean(deviation**2)) < 1.1
            assert abs(np.mean(deviation)) < 0.05
            rim = (valid & ~ndimage.binary_erosion(valid))[valid]
            assert np.sqrt(np.mean(deviation[:, rim] ** 2)) < 1.1
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
        if line == "halpha":
            errors[line][0, 40:42, 50:53] = np.nan
        write_sstred(
            tmp_path / f"{line}.fits",
            np.where(inside[:, None], series.noisy[line] * per_frequency(line), np.nan)[:, None],
            vacuum_to_air(axis),
            seconds(len(axis), 0.0 if line == "halpha" else 5.015),
            cavity=np.where(inside, errors[line] if line == "halpha" else own, np.nan),
        )
    report = ingest([tmp_path], tmp_path / "obs.zarr", call="")
    assert report.found == (
        f"{tmp_path / 'halpha.fits'}: 6 pixels in the field have no wavelength correction",
    )
    dataset = open_observation(tmp_path / "obs.zarr").load()
    assert dataset.shift_applied.values.all()
    # A difference of wavelengths is larger in vacuum, by the refractive index.
    # Ca II's is interpolated: off by a hundredth of its variation, and more in the border's last pixel.
    for line, typical, worst in (("halpha", 1e-6, 1e-6), ("ca8542", 5e-4, 0.01)):
        found = dataset[f"wavelength_shift_{line}"]
        assert found.dims == ("time", "y", "x")
        assert u.Unit(found.attrs["units"]) == u.Angstrom
        valid = dataset.valid.values & np.isfinite(errors[line])
        assert np.isnan(found.values[dataset.valid.values & ~valid]).all()
        away = np.abs(found.values - 1.000275 * errors[line])[valid]
        assert np.sqrt(np.mean(away**2)) < typical
        assert away.max() < worst


def test_wavelengths_that_drift(tmp_path, series):
    """The second scan's, by 5 mA in H-alpha, and by -3 mA in Ca II beside its cavity errors; not by 50."""
    drift = {"halpha": 0.005, "ca8542": -0.003}
    for line, axis in AXES.items():
        own = vacuum_to_air(axis) + np.array([[0.0], [drift[line]]])
        errors = np.full((2, *SHAPE), 0.02) if line == "ca8542" else None
        cube = np.where(series.field[line][:, None], series.noisy[line] * per_frequency(line), np.nan)
        write_sstred(tmp_path / f"{line}.fits", cube[:, None], own, seconds(len(axis), 0.0), cavity=errors)
    ingest([tmp_path], tmp_path / "obs.zarr", call="")
    found = open_observation(tmp_path / "obs.zarr").load()
    for line, axis in AXES.items():
        np.testing.assert_allclose(found[f"wavelength_{line}"], axis, rtol=0, atol=1e-6)
        for time in (0, 1):
            shift = found[f"wavelength_shift_{line}"].values[time][found.valid.values[time]]
            expected = time * drift[line] + (0.02 if line == "ca8542" else 0.0)
            np.testing.assert_allclose(shift, 1.000275 * expected, rtol=0, atol=2e-6)
    write_sstred(
        tmp_path / "again.fits",
        (series.noisy["halpha"] * per_frequency("halpha"))[:, None],
        vacuum_to_air(AXES["halpha"]) + np.array([[0.0], [0.05]]),
        seconds(len(AXES["halpha"]), 0.0),
    )
    with pytest.raises(InputError, match="different wavelengths") as refusal:
        ingest([tmp_path / "again.fits", tmp_path / "ca8542.fits"], tmp_path / "other.zarr", call="")
    assert "split the file" in str(refusal.value)


def test_lines_in_frames_of_their_own(tmp_path, series):
    """As SSTRED cuts them: Ca II's frame has other rows and columns, and its header says where they are."""
    top, left, rows, columns = 6, -5, 80, 112
    y, x = np.mgrid[:rows, :columns]
    y, x = y + top, x + left  # Ca II's pixels in H-alpha's frame, before the shift
    there = (y >= 0) & (y < SHAPE[0]) & (x >= 0) & (x < SHAPE[1])
    tilted = np.stack([1e-4 * (y + dy) - 2e-4 * (x + dx) for dy, dx in SHIFTS])  # Angstrom
    pointing = np.array([-729.826, -313.432])
    middle = np.array([left + (columns - 1) / 2, top + (rows - 1) / 2]) - (np.array(SHAPE[::-1]) - 1) / 2
    for line, axis in AXES.items():
        cube = np.where(series.field[line][:, None], series.noisy[line] * per_frequency(line), np.nan)
        if line == "ca8542":
            cut = np.full((*cube.shape[:2], rows, columns), np.nan)
            cut[..., there] = cube[..., y[there], x[there]]
            cube = cut
        write_sstred(
            tmp_path / f"{line}.fits",
            cube[:, None],
            vacuum_to_air(axis),
            seconds(len(axis), 0.0 if line == "halpha" else 5.015),
            pointing=pointing + (0.057 * middle if line == "ca8542" else 0.0),
            cavity=tilted if line == "ca8542" else None,
        )
    report = ingest([tmp_path], tmp_path / "obs.zarr", call="")
    dataset = open_observation(tmp_path / "obs.zarr").load()
    assert dataset.placement_y.values.tolist() == [top, top]
    assert dataset.placement_x.values.tolist() == [left, left]
    cut = np.zeros(SHAPE, dtype=bool)
    cut[y[there], x[there]] = True
    for number, shift in enumerate(report.shifts):
        assert np.abs(np.subtract((shift.y, shift.x), SHIFTS[number])).max() < 0.1
        valid = series.field["halpha"][number] & move_field(series.field["ca8542"][number] & cut, shift)
        np.testing.assert_array_equal(dataset.valid.values[number], valid)
        stored = np.moveaxis(dataset.ca8542.values[number], -1, 0)[:, valid] / COUNT
        truth = series.truth["ca8542"][number][:, valid]
        deviation = (stored - truth) / np.sqrt(np.maximum(truth, 1.0))
        assert np.sqrt(np.mean(deviation**2)) < 1.1
        assert abs(np.mean(deviation)) < 0.05
        errors = 1e-4 * np.arange(SHAPE[0])[:, None] - 2e-4 * np.arange(SHAPE[1])
        away = dataset.wavelength_shift_ca8542.values[number][valid] - 1.000275 * errors[valid]
        assert np.sqrt(np.mean(away**2)) < 1e-4  # Angstrom: of a gradient times a tenth of a pixel


def test_frames_that_do_not_meet(tmp_path, series):
    """A time at which the lines see different parts of the Sun is blank; a series of these is refused."""
    away = np.array([(0.0, 0.0), (29.0, 0.0)])
    for first in (0, 1):
        for line, axis in AXES.items():
            inside = series.field[line][:, None]
            (tmp_path / f"{line}.fits").unlink(missing_ok=True)
            write_sstred(
                tmp_path / f"{line}.fits",
                np.where(inside, series.noisy[line] * per_frequency(line), np.nan)[:, None],
                vacuum_to_air(axis),
                seconds(len(axis), 0.0),
                pointing=np.array([-729.0, -313.0]) + away[[first, 1]] * (line == "ca8542"),
            )
        inspection = inspect([tmp_path], tolerance=15.0)
        assert [pair.apart for pair in inspection.pairs] == [first == 1, True]
        if first == 0:
            report = ingest([tmp_path], tmp_path / "obs.zarr", call="")
            found = open_observation(tmp_path / "obs.zarr").load()
            assert report.blank == (1,)
            assert [sentence for sentence in report.found if "no pixel in common" in sentence]
            assert not [sentence for sentence in report.found if "no image" in sentence]
            assert found.valid[0].any()
            assert not found.valid[1].any()
            assert not found.defects[1].any()
            np.testing.assert_array_equal(np.isfinite(found.halpha[1, ..., 0]), series.field["halpha"][1])
        else:
            with pytest.raises(InputError, match="no time of the series") as refusal:
                ingest([tmp_path], tmp_path / "other.zarr", call="")
            assert "no pixel in common" in str(refusal.value)


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
    told, untold = (velocities[name][np.isfinite(velocities[name])] for name in ("told", "not told"))
    assert told.size > 150
    assert np.mean(told > 0) > 0.95
    # 4 km/s lie between the two; the grid's prior takes some of it back
    assert 2.0 < np.median(told) < 5.0
    assert np.mean(untold < 0) > 0.6


def same_bits(path, other):
    """Whether two observations have the same bits in all that a map depends on, but for wavelengths' last."""
    one, two = (open_observation(place).load() for place in (path, other))
    names = (*AXES, "valid", "mu", "shift_y", "shift_x", "shift_confidence", "time_halpha", "time_ca8542")
    same = all(one[name].values.tobytes() == two[name].values.tobytes() for name in names)
    axes = [f"wavelength_{line}" for line in AXES]
    return same and all(np.abs(one[axis].values - two[axis].values).max() < 1e-9 for axis in axes)


def test_all_formats_give_the_same_map(ingested, client, tmp_path):
    """The same scene has the same answer, to the rounding of the numbers, whatever the file."""
    draws = 32
    maps = {}
    for name in FORMATS:
        if name != "fchroma" and same_bits(ingested(name)[0], ingested("fchroma")[0]):
            continue  # and so is its map
        settings = {"draws": draws, "region": "34:44,40:60", "times": "0", "cluster": client}
        invert(ingested(name)[0], tmp_path / f"{name}.zarr", **settings)
        maps[name] = open_map(tmp_path / f"{name}.zarr").isel(time=0, y=slice(34, 44), x=slice(40, 60)).load()
    # files of counts, with wavelengths to the last digit: all of these
    assert not {"La Palma", "crispy", "crispy, Stokes", "IBIS"} & maps.keys()
    reference = maps.pop("fchroma")
    for name, dataset in maps.items():
        # Intensities are single precision, and differ in its last digit: a quantile comes out one step of the
        # map's rounding away now and then, 1/16 of the spread over the root of the number of draws. SSTRED's
        # integers are a further 1/64000 of the cube's range off, a tenth of a count, where the noise is 30:
        # the outer quantiles of 32 draws may then be other draws.
        allowed = 1e-3 if name == "sstred, integers" else 0.0
        for quantity in ("electron_density", "temperature", "velocity"):
            expected, found = (of[quantity].transpose(..., "quantile").values for of in (reference, dataset))
            if quantity != "velocity":
                expected, found = np.log(expected), np.log(found)
            assert np.isfinite(expected).all()
            spread = 0.5 * (expected[..., 3] - expected[..., 1])[..., None]
            step = spread / (16 * np.sqrt(draws)) + 2e-7 * np.abs(expected)
            assert np.mean(np.abs(found - expected) > 1.01 * step) <= allowed, (name, quantity)
