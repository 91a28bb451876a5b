"""From FITS files to an observation store: its content, what is refused, what an interruption leaves."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import warnings
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import astropy.units as u
import dask
import disturbed
import numpy as np
import pytest
import xarray as xr
import yaml
import zarr
from astropy.io import fits
from astropy.wcs import WCS, FITSFixedWarning
from distributed import Client, LocalCluster
from scipy import ndimage
from test_invert import PATIENCE, processes  # noqa: F401

import pipeline.ingest
from pipeline import changes
from pipeline.changes import CHANGED
from pipeline.cluster import SCHEDULER_SETTINGS, WORKER_SETTINGS
from pipeline.crisp import find_scans, read_scans
from pipeline.crisp.fchroma import write_fchroma
from pipeline.crisp.scan import Frame, Scan, cosine_of_pointing
from pipeline.crisp.wavelengths import vacuum_to_air
from pipeline.defects import Defect
from pipeline.errors import FlareFieldError, InputError, MisuseError, StoreError
from pipeline.ingest import ingest
from pipeline.inspect import inspect
from pipeline.invert import invert
from pipeline.observation import CONTRACT, chunks_and_shards, fits_headers, open_observation, validate
from pipeline.pairing import Pair, check_alike, pair_scans
from pipeline.provenance import sha256_file
from pipeline.registration import Shift, move_field, resample
from pipeline.results import flagged, open_map
from pipeline.storage import Directory, lock
from tests.fchroma_files import (
    CADENCE,
    PAD,
    START,
    WAVELENGTH_CA8542,
    WAVELENGTH_HALPHA,
    displace,
    rotated_field,
    scene,
    write_pair,
)
from tests.known_series import FORMATS, known_series
from tests.lapalma_files import write_cube
from tests.quiet_scene import quiet_scene, write_scene

REAL = Path(__file__).parents[2] / "shared" / "data" / "crisp"
SHIFTS = ((2.3, -1.4), (5.6, 3.2), (-0.4, -5.8))
SHAPE = (90, 110)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Three scans of both lines, and what they were made with."""
    folder = tmp_path_factory.mktemp("series")
    truths = [
        write_pair(folder, shape=SHAPE, shift=shift, number=number, seed=number)[2]
        for number, shift in enumerate(SHIFTS)
    ]
    return folder, truths


def test_every_chunk_that_goes_is_missed(observation, tmp_path, fake_model, client):
    """Of each variable one chunk in turn; what xarray has saved of it may lack those that hold nothing."""
    copy, output = tmp_path / "o.zarr", tmp_path / "map.zarr"
    shutil.copytree(observation[0], copy)
    settings = {"model": fake_model, "cluster": client, "draws": 4}
    names = [name for name in sorted(os.listdir(copy)) if (copy / name / "c").exists()]
    assert {*names} >= {*CONTRACT, "defects", "poor_seeing", "change_between_lines"}
    for name in names:
        chunk = next(file for file in sorted((copy / name / "c").rglob("*")) if file.is_file())
        content = chunk.read_bytes()
        chunk.unlink()
        with pytest.raises(StoreError, match=r"not there|damaged") as refusal:
            invert(copy, output, **settings)
        assert name in refusal.value.found
        chunk.write_bytes(content)
    saved = tmp_path / "saved.zarr"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        open_observation(copy).isel(time=[1]).drop_encoding().to_zarr(saved, zarr_format=3)
    assert not (saved / "poor_seeing" / "c").exists()
    assert not invert(saved, output, **settings).failed


def test_what_xarray_writes_into_an_observation_is_told_from_what_was_lost_as_the_error_says(
    observation, tmp_path, fake_model, client
):
    copy = tmp_path / "o.zarr"
    shutil.copytree(observation[0], copy)
    settings = {"model": fake_model, "cluster": client, "draws": 4}
    dataset = open_observation(copy).load()
    dataset["halpha"][1] = dataset["ca8542"][1] = np.nan
    moments = dataset["time_ca8542"].values.copy()
    moments[1] = np.datetime64("NaT")
    dataset["time_ca8542"] = "time", moments, dataset["time_ca8542"].attrs
    blanked = dataset[["halpha", "ca8542"]]
    blanked.to_zarr(copy, mode="a")
    with pytest.raises(StoreError, match="not there") as refusal:
        invert(copy, tmp_path / "map.zarr", **settings)
    assert "once more with `to_zarr(..., write_empty_chunks=True)`" in refusal.value.remedy
    assert "valid" not in refusal.value.remedy  # what ingest wrote is known, wherever it lies
    blanked.to_zarr(copy, mode="a", write_empty_chunks=True)
    assert not invert(copy, tmp_path / "map.zarr", **settings).failed
    found = open_map(tmp_path / "map.zarr").load()
    np.testing.assert_array_equal(flagged(found, "not_finite").values[1], dataset["valid"][1])
    np.testing.assert_array_equal(found.time_ca8542, moments)


@pytest.fixture(scope="module")
def observation(series, tmp_path_factory):
    path = tmp_path_factory.mktemp("observation") / "obs.zarr"
    report = ingest([series[0]], path, call="flarefield ingest series obs.zarr")
    return path, report


@pytest.fixture
def pair(tmp_path):
    halpha, ca8542, _ = write_pair(tmp_path, shape=(40, 50), angle=None)
    return halpha, ca8542


def change_header(path, **cards):
    with fits.open(path, mode="update") as hdus:
        for name, value in cards.items():
            hdus[0].header[name.replace("_", "-") if name == "DATE_AVG" else name] = value


def change_data(path, change):
    with fits.open(path, memmap=False) as hdus:
        hdus = fits.HDUList([hdu.copy() for hdu in hdus])
    hdus[0].data = change(hdus[0].data)
    hdus.writeto(path, overwrite=True)


def contents(store):
    """Every file of a store with its bytes."""
    return {
        str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()
    }


def leftovers(path):
    return [
        other.name for other in path.parent.iterdir() if other.name.startswith(path.name) and other != path
    ]


@pytest.mark.parametrize(("line", "lost"), [("halpha", (14,)), ("ca8542", (0, 12))])
def test_a_scan_that_lacks_wavelengths_is_taken_and_they_are_flagged(
    series, observation, tmp_path, fake_model, client, line, lost
):
    folder = Path(shutil.copytree(series[0], tmp_path / "series"))
    whole, report = observation
    path = folder / Path(getattr(report.pairs[1], line).path).name
    with fits.open(path, memmap=False) as hdus:
        cube, axis = np.delete(hdus[0].data, lost, 0), np.delete(hdus[1].data, lost)
        parts = [fits.PrimaryHDU(cube, hdus[0].header), fits.ImageHDU(axis, hdus[1].header)]
        fits.HDUList(parts).writeto(path, overwrite=True)
    ingest([folder], tmp_path / "obs.zarr", call="ingest")
    expected, found = (open_observation(store).load() for store in (whole, tmp_path / "obs.zarr"))
    there = np.delete(np.arange(expected.sizes[f"wavelength_{line}"]), lost)
    for time in range(3):
        # The search for the displacement sees fewer images.
        tolerance = 0.0 if time != 1 else 60.0
        for name in ("halpha", "ca8542"):
            wanted, values = (ds[name][time].where(ds["valid"][time]) for ds in (expected, found))
            if name == line and time == 1:
                assert values[..., list(lost)].isnull().all()
                wanted, values = wanted[..., there], values[..., there]
            difference = np.abs(wanted - values).values[10:-10, 10:-10]
            assert np.nanquantile(difference, 0.99) <= tolerance
    invert(tmp_path / "obs.zarr", tmp_path / "map.zarr", model=fake_model, draws=4, cluster=client)
    missing = flagged(open_map(tmp_path / "map.zarr"), "wavelength_missing").values
    np.testing.assert_array_equal(missing[1], found["valid"][1])
    assert not missing[[0, 2]].any()


class TestContent:
    def test_schema(self, observation, recwarn):
        dataset = xr.open_zarr(observation[0])
        assert not [warning for warning in recwarn if "zarr" in str(warning.message).lower()]
        validate(dataset)
        assert dict(dataset.sizes) == {
            "time": 3,
            "y": 90,
            "x": 110,
            "wavelength_halpha": 15,
            "wavelength_ca8542": 25,
        }
        for name, (_, unit) in CONTRACT.items():
            attrs = dataset[name].attrs
            if name not in ("y", "x") and not name.startswith("time"):
                assert attrs["long_name"]
            if unit is not None:
                assert u.Unit(attrs["units"]) == u.Unit(unit)
        assert u.Unit(dataset.halpha.attrs["units"]) == u.DN
        assert dataset.halpha.dtype == dataset.ca8542.dtype == np.float32
        assert dataset.valid.dtype == bool
        assert dataset.attrs["kind"] == "observation"
        assert dataset.attrs["relative_calibration"] == "assumed"
        assert dataset.attrs["call"] == "flarefield ingest series obs.zarr"
        assert dataset.attrs["unpaired"] == []

    def test_halpha_is_what_the_files_hold(self, series, observation):
        dataset = open_observation(observation[0])
        for time, path in enumerate(sorted(series[0].glob("*6563*.fits"))):
            field = series[1][time].field_halpha
            stored = dataset.halpha.isel(time=time).transpose("wavelength_halpha", "y", "x").values
            np.testing.assert_array_equal(stored, np.where(field, fits.getdata(path), np.nan))

    def test_shifts_are_found_and_applied(self, observation):
        dataset = open_observation(observation[0])
        assert dataset.shift_applied.values.all()
        found = np.stack([dataset.shift_y.values, dataset.shift_x.values], axis=1)
        assert np.abs(found - SHIFTS).max() < 0.1
        assert observation[1].shifts == tuple(
            Shift(float(y), float(x), float(confidence))
            for (y, x), confidence in zip(found, dataset.shift_confidence.values, strict=True)
        )
        assert "in 3 of 3" in observation[1].summary()

    def test_ca8542_is_the_scene_in_halphas_frame(self, series, observation):
        """Where both fields are, the stored spectra are those of the scene, to the photon noise."""
        dataset = open_observation(observation[0])
        for time, truth in enumerate(series[1]):
            stored = dataset.ca8542.isel(time=time).transpose("wavelength_ca8542", "y", "x").values
            valid = dataset.valid.isel(time=time).values
            deviation = (stored - truth.ca8542)[:, valid] / np.sqrt(truth.ca8542[:, valid])
            # interpolation averages neighbours' noise: less than one at any shift
            assert np.sqrt(np.mean(deviation**2)) < 1.1
            assert abs(np.mean(deviation)) < 0.05

    def test_valid_is_the_overlap(self, series, observation):
        dataset = open_observation(observation[0])
        for time, truth in enumerate(series[1]):
            moved = move_field(truth.field_ca8542, observation[1].shifts[time])
            valid = dataset.valid.isel(time=time).values
            np.testing.assert_array_equal(valid, truth.field_halpha & moved)
            for line in ("halpha", "ca8542"):
                finite = np.isfinite(dataset[line].isel(time=time).values)
                assert finite[valid].all()
            np.testing.assert_array_equal(np.isfinite(dataset.ca8542.isel(time=time).values).all(-1), moved)

    def test_coordinates(self, series, observation):
        dataset = open_observation(observation[0])
        times = START + np.arange(3) * CADENCE
        np.testing.assert_array_equal(dataset.time.values, times)
        np.testing.assert_array_equal(dataset.time_halpha.values, times)
        np.testing.assert_array_equal(dataset.time_ca8542.values, times + np.timedelta64(5015, "ms"))
        np.testing.assert_array_equal(dataset.wavelength_halpha.values, WAVELENGTH_HALPHA)
        np.testing.assert_array_equal(dataset.wavelength_ca8542.values, WAVELENGTH_CA8542)
        assert dataset.wavelength_halpha.attrs["rest_wavelength"] == 6564.61
        np.testing.assert_allclose(np.diff(dataset.x.values), 0.057)
        np.testing.assert_allclose(dataset.y.values[[0, -1]], [-44.5 * 0.057, 44.5 * 0.057])
        # not rotated and small: the sky is flat to a hundredth of an arcsecond
        np.testing.assert_allclose(
            dataset.longitude.values, -729.826 + np.broadcast_to(dataset.x.values, SHAPE), atol=0.01
        )
        np.testing.assert_allclose(
            dataset.latitude.values, -313.432 + np.broadcast_to(dataset.y.values[:, None], SHAPE), atol=0.01
        )
        np.testing.assert_allclose(dataset.pointing_longitude.values, -729.826, atol=1e-3)
        # the paper's flare: mu = 0.55
        np.testing.assert_allclose(dataset.mu.values, 0.55, atol=0.005)

    def test_headers_are_kept_whole(self, series, observation):
        dataset = open_observation(observation[0])
        for line, pattern in (("halpha", "*_6563_r*"), ("ca8542", "*_8542_r*")):
            for time, path in enumerate(sorted(series[0].glob(pattern))):
                with fits.open(path) as hdus:
                    kept = fits_headers(dataset, line, time)
                    assert len(kept) == len(hdus)
                    for header, hdu in zip(kept, hdus, strict=True):
                        images = [card.image for card in header.cards]
                        assert images == [card.image for card in hdu.header.cards]
        with pytest.raises(MisuseError):
            fits_headers(dataset, "halpha", 3)

    def test_provenance(self, series, observation):
        made_from = open_observation(observation[0]).attrs["made_from"]
        assert made_from == {str(path): sha256_file(path) for path in series[0].glob("*.fits")}

    def test_layout_is_what_the_map_engine_reads(self, observation):
        group = zarr.open_group(observation[0], mode="r")
        assert group["halpha"].chunks == (1, 64, 64, 15)
        assert group["halpha"].shards == (1, 128, 128, 15)
        assert group["ca8542"].chunks == (1, 64, 64, 25)
        assert chunks_and_shards((1470, 1930), 15) == ((1, 64, 64, 15), (1, 512, 512, 15))
        assert chunks_and_shards((21, 21), None) == ((1, 21, 21), (1, 21, 21))
        assert leftovers(observation[0]) == []

    def test_deterministic_in_any_order(self, series, observation, tmp_path):
        files = sorted(series[0].glob("*.fits"))
        for name, sources in (("a.zarr", files[::-1]), ("b.zarr", [f"{series[0]}/*.fits", files[2]])):
            ingest(sources, tmp_path / name, call="flarefield ingest series obs.zarr")
            assert contents(tmp_path / name) == contents(observation[0])

    def test_through_dask(self, series, observation, tmp_path):
        with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            path = tmp_path / "obs.zarr"
            ingest([series[0]], path, cluster=client, call="flarefield ingest series obs.zarr")
            assert contents(path) == contents(observation[0])
            # No network is computed: torch would take each worker seconds, and memory.
            assert not any(client.run(lambda: "torch" in sys.modules).values())
            again = ingest([series[0]], path, cluster=client, call="again")
            assert again.complete_before
            with pytest.raises(MisuseError, match="other files"):
                ingest(sorted(series[0].glob("*.fits"))[:4:3], path, cluster=client, call="", tolerance=60.0)

    def test_fields_larger_than_a_shard(self, tmp_path, monkeypatch):
        """Shards fit together: the same as one piece."""
        monkeypatch.setattr("pipeline.ingest.SHARD", 64)
        monkeypatch.setattr("pipeline.observation.SHARD", 64)
        halpha, ca8542, truth = write_pair(tmp_path, shape=(100, 150), shift=(-3.3, 4.4), seed=3)
        report = ingest([halpha, ca8542], tmp_path / "obs.zarr", call="")
        dataset = open_observation(tmp_path / "obs.zarr")
        assert zarr.open_group(tmp_path / "obs.zarr", mode="r")["ca8542"].shards == (1, 64, 64, 25)
        whole = resample(
            fits.getdata(ca8542), truth.field_ca8542, report.shifts[0], slice(0, 100), slice(0, 150)
        )
        np.testing.assert_allclose(dataset.ca8542.isel(time=0).values, whole, rtol=1e-6)

    @pytest.mark.observation
    @pytest.mark.skipif(not REAL.is_dir(), reason="the real pair is not here")
    def test_real_pair(self, tmp_path, caplog):
        report = ingest([REAL], tmp_path / "obs.zarr", call="")
        dataset = open_observation(tmp_path / "obs.zarr")
        assert dataset.halpha.shape == (1, 21, 21, 15)
        assert dataset.ca8542.shape == (1, 21, 21, 25)
        assert dataset.valid.values.all()
        assert not dataset.shift_applied.values.any()
        assert round(float(dataset.shift_y[0])) == 3
        assert "not moved" in caplog.text
        assert "in 0 of 1" in report.summary()
        assert float(dataset.mu[0]) == pytest.approx(0.551, abs=0.002)
        for line, pattern in (("halpha", "*6563*.fits"), ("ca8542", "*8542_r*.fits")):
            (path,) = REAL.glob(pattern)
            np.testing.assert_array_equal(
                dataset[line].isel(time=0).transpose(f"wavelength_{line}", "y", "x"), fits.getdata(path)
            )


class TestPointing:
    def test_mu(self):
        time = np.datetime64("2014-09-06T16:56:00")
        # the Astronomical Almanac's semidiameter on that day: 15' 52.6" (IAU 1976 radius, 959.63" at 1 au)
        radius = 952.6
        assert cosine_of_pointing((0.0, 0.0), time) == 1.0
        assert cosine_of_pointing((radius * 0.6, radius * 0.8 * 0.5), time) == pytest.approx(
            np.sqrt(1 - 0.36 - 0.16), abs=2e-3
        )
        assert cosine_of_pointing((-732.0, -302.0), time) == pytest.approx(0.556, abs=0.005)
        assert np.isnan(cosine_of_pointing((0.0, 970.0), time))

    def test_rotated_and_moving_pointing(self, tmp_path):
        rng = np.random.default_rng(1)
        angle = np.deg2rad(30.0)
        matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        for number, pointing in enumerate([(200.0, 300.0), (203.5, 299.0)]):
            for line, axis in (("h", WAVELENGTH_HALPHA), ("c", WAVELENGTH_CA8542)):
                write_fchroma(
                    tmp_path / f"{line}{number}.fits",
                    rng.integers(1000, 2000, (axis.size, 30, 40)),
                    axis,
                    START + number * CADENCE,
                    pointing=pointing,
                    rotation=matrix,
                )
        ingest([tmp_path], tmp_path / "obs.zarr", call="")
        dataset = open_observation(tmp_path / "obs.zarr")
        x, y = np.meshgrid(np.arange(40) - 19.5, np.arange(30) - 14.5)
        offset = np.einsum("ij,jyx->iyx", matrix, 0.057 * np.stack([x, y]))
        np.testing.assert_allclose(dataset.longitude, 200.0 + offset[0], atol=0.01)
        np.testing.assert_allclose(dataset.latitude, 300.0 + offset[1], atol=0.01)
        np.testing.assert_allclose(dataset.pointing_longitude, [200.0, 203.5], atol=1e-6)
        np.testing.assert_allclose(dataset.pointing_latitude, [300.0, 299.0], atol=1e-6)


class TestMedium:
    @pytest.fixture
    def in_air(self, tmp_path):
        """A pair whose axes are in air, as a copy of the database's layout may be."""
        folder, vacuum = tmp_path / "air", tmp_path / "vacuum"
        folder.mkdir()
        vacuum.mkdir()
        for path in write_pair(vacuum, shape=(40, 50), angle=None)[:2]:
            with fits.open(path) as hdus:
                axis = vacuum_to_air(hdus[1].data)
                cube = hdus[0].data.copy()
                moment = hdus[0].header["DATE-AVG"]
            write_fchroma(folder / path.name, cube, axis, moment)
        return folder

    def test_a_mistaken_medium_is_told(self, in_air, pair, tmp_path):
        with pytest.raises(InputError, match=r"(?s)seem to be those in air.*--medium air"):
            ingest([in_air], tmp_path / "obs.zarr", call="")
        with pytest.raises(InputError, match=r"(?s)seem to be those in vacuum.*--medium vacuum"):
            ingest(pair, tmp_path / "obs.zarr", medium="air", call="")

    def test_the_statement_is_recorded(self, in_air, tmp_path):
        ingest([in_air], tmp_path / "obs.zarr", medium="air", call="")
        dataset = open_observation(tmp_path / "obs.zarr")
        for line, axis in (("halpha", WAVELENGTH_HALPHA), ("ca8542", WAVELENGTH_CA8542)):
            wavelength = dataset[f"wavelength_{line}"]
            np.testing.assert_allclose(wavelength, axis, rtol=0, atol=1e-9)
            assert wavelength.attrs["medium_of_files"] == "air"
            assert wavelength.attrs["medium_stated_by"] == "caller"
        assert ingest([in_air], tmp_path / "obs.zarr", medium="air", call="").complete_before


def scan_at(line, second):
    """A scan of which only the line and the time matter."""
    return Scan(
        path=f"{line} {second}",
        format="fchroma",
        line=line,
        time=START.astype("M8[ns]") + np.timedelta64(round(1000 * second), "ms"),
        wavelength=tuple(WAVELENGTH_HALPHA if line == "halpha" else WAVELENGTH_CA8542),
        medium="vacuum",
        medium_stated_by="format",
        shape=(8, 9),
        units="DN",
        units_of_file="DN",
        saturation=np.inf,
        frame=Frame((0.0, 0.0), (0.0, 0.0), (0.057, 0.057), ((1.0, 0.0), (0.0, 1.0))),
    )


class TestPairing:
    def scans(self, folder, halpha, ca8542):
        rng = np.random.default_rng(1)
        for line, axis, seconds in (("h", WAVELENGTH_HALPHA, halpha), ("c", WAVELENGTH_CA8542, ca8542)):
            for second in seconds:
                moment = START + np.timedelta64(round(1000 * second), "ms")
                cube = rng.integers(1000, 2000, (axis.size, 8, 9))
                write_fchroma(folder / f"{line}{second}.fits", cube, axis, moment)
        return find_scans([folder])[0]

    def seconds(self, pairs):
        return [
            tuple((scan.time - START) / np.timedelta64(1, "s") for scan in (pair.halpha, pair.ca8542))
            for pair in pairs
        ]

    @pytest.mark.parametrize(
        ("halpha", "ca8542", "expected", "left"),
        [
            ([0, 11.5, 23], [5, 16.5, 28], [(0, 5), (11.5, 16.5), (23, 28)], 0),
            ([0, 11.5, 23], [5, 28], [(0, 5), (23, 28)], 1),
            ([11.5, 23], [5, 16.5, 28], [(11.5, 16.5), (23, 28)], 1),
            # the single nearest two are not always a pair of the best choice
            ([0, 10, 20], [4.9, 15.1, 25], [(0, 4.9), (10, 15.1), (20, 25)], 0),
            ([0], [14.9], [(0, 14.9)], 0),
            ([0, 100], [1, 160], [(0, 1)], 2),
            # 11 s are within the tolerance, but nobody's nearest: two that belong together stay together
            ([0, 11.5], [11, 22.5], [(11.5, 11)], 2),
            # the partners of both are missing, and they are a cadence apart
            ([0, 11.5, 34.5, 46], [2, 25, 36.5, 48], [(0, 2), (34.5, 36.5), (46, 48)], 2),
            ([0, 11.5, 34.5, 46], [0, 23, 34.5, 46], [(0, 0), (34.5, 34.5), (46, 46)], 2),
            # two H-alpha scans for every one of Ca II
            ([0, 5, 20, 25, 40, 45], [10, 30, 50], [(5, 10), (25, 30), (45, 50)], 3),
            # halfway between: the one after, whichever end has one more
            ([0, 10, 20], [-5, 5, 15, 25], [(0, 5), (10, 15), (20, 25)], 1),
            ([0, 10, 20, 30], [5, 15, 25], [(0, 5), (10, 15), (20, 25)], 1),
        ],
    )
    def test_nearest_within_the_tolerance(self, tmp_path, halpha, ca8542, expected, left):
        pairs, unpaired = pair_scans(self.scans(tmp_path, halpha, ca8542), 15.0)
        assert self.seconds(pairs) == expected
        assert len(unpaired) == left

    @pytest.mark.parametrize("seed", range(4))
    def test_the_nearest_wherever_it_is_one_to_one(self, seed):
        """Series with drifting lags and missing scans: whoever has a nearest of its own gets that one."""
        rng = np.random.default_rng(seed)
        halpha = np.cumsum(rng.uniform(11.0, 12.0, 60))
        ca8542 = halpha + np.linspace(*rng.uniform(-1.5, 1.5, 2), 60)
        kept = [np.sort(rng.choice(60, 50, replace=False)) for _ in range(2)]
        pairs, unpaired = pair_scans(
            [
                scan_at(line, second)
                for line, times, some in zip(("halpha", "ca8542"), (halpha, ca8542), kept, strict=True)
                for second in times[some]
            ],
            15.0,
        )
        both = np.intersect1d(*kept)
        expected = np.round(1000 * np.stack([halpha[both], ca8542[both]], axis=1)) / 1000
        np.testing.assert_array_equal(self.seconds(pairs), expected)
        assert len(unpaired) == 100 - 2 * both.size

    def test_nothing_fits(self, tmp_path):
        scans = self.scans(tmp_path, [0], [15.5])
        with pytest.raises(InputError, match="belong together") as caught:
            pair_scans(scans, 15.0)
        assert "15.5 s" in str(caught.value)
        assert len(pair_scans(scans, 16.0)[0]) == 1

    def test_unpaired_scans_are_reported(self, tmp_path, caplog):
        self.scans(tmp_path, [0, 50], [5])
        report = ingest([tmp_path], tmp_path / "obs.zarr", call="")
        assert [Path(scan.path).name for scan in report.unpaired] == ["h50.fits"]
        assert "h50.fits" in caplog.text
        (listed,) = open_observation(tmp_path / "obs.zarr").attrs["unpaired"]
        assert listed["file"].endswith("h50.fits")
        assert listed["line"] == "halpha"
        assert "1 scans without a partner" in report.summary()


def write_growing(folder, count, *, seconds=None, ca8542=None):
    """Scans at these seconds of each line: ribbons that brighten by 0.03 a second, in a field that drifts.

    What is returned makes both lines' cubes of a brightness: 0.6 at the start.
    """
    halpha = 11.54 * np.arange(count) if seconds is None else np.asarray(seconds)
    ca8542 = halpha + 5.015 if ca8542 is None else np.asarray(ca8542)
    dark, bright = (scene(np.random.default_rng(7), SHAPE, brightness) for brightness in (0.0, 1.0))
    field = rotated_field(SHAPE, 20.0)
    rng = np.random.default_rng(8)
    for line, axis in (("halpha", WAVELENGTH_HALPHA), ("ca8542", WAVELENGTH_CA8542)):
        index = 0 if line == "halpha" else 1
        for second in (halpha, ca8542)[index]:
            brightness = 0.6 + 0.03 * second
            cube = dark[index] + brightness * (bright[index] - dark[index])
            # the field drifts, and Ca II is displaced from H-alpha
            move = (0.06 * second - 2.3 * index, -0.04 * second + 1.4 * index)
            cube = np.stack([displace(image, *move) for image in cube])
            noisy = cube + 0.4 * np.sqrt(np.maximum(cube, 1.0)) * rng.standard_normal(cube.shape)
            write_fchroma(
                folder / f"{line}_{second:07.3f}.fits",
                np.where(field, np.clip(noisy, 1, 32767), PAD),
                axis,
                START + np.timedelta64(round(1000 * second), "ms"),
                start=START,
            )

    def truth(brightness):
        return tuple(one + brightness * (other - one) for one, other in zip(dark, bright, strict=True))

    return truth


def bands_of(cube, axis, rest, reach):
    offset = axis - rest
    chosen = (offset < -0.69 * reach, np.abs(offset) < 0.26 * reach, offset > 0.69 * reach)
    return np.stack([cube[points].mean(axis=0) for points in chosen])


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    """Files of four scans of both lines in which ribbons brighten, and the observation made of them."""
    folder = tmp_path_factory.mktemp("growing")
    truth = write_growing(folder, 4)
    output = tmp_path_factory.mktemp("grown") / "obs.zarr"
    return folder, truth, output, ingest([folder], output, call="a test")


@pytest.fixture(scope="module")
def dead_scans(tmp_path_factory):
    """Files of five times, the observation of them, and the files with no Ca II at one, no H-alpha at one."""
    folder = tmp_path_factory.mktemp("files")
    write_growing(folder, 5)
    output = tmp_path_factory.mktemp("observation") / "obs.zarr"
    ingest([folder], output, call="")
    change_data(next(folder.glob("ca8542_016*")), np.zeros_like)
    change_data(next(folder.glob("halpha_034*")), lambda data: np.full_like(data, 1234))
    return folder, open_observation(output)


class TestDeadScans:
    OTHERS = (0, 2, 4)

    @pytest.fixture
    def check(self, caplog):
        def check(report, found):
            assert report.blank == (1, 3)
            assert "at 2 of 5 times no pixel shows both lines" in report.summary()
            for time, line, other in ((1, "ca8542", "halpha"), (3, "halpha", "ca8542")):
                assert np.isnan(found[line][time]).all()
                assert not found.valid[time].any()
                seen = np.isfinite(found[other][time]).all(f"wavelength_{other}").values
                assert seen.mean() > 0.3
                flags = np.where(seen, Defect.WAVELENGTH_MISSING, 0)
                np.testing.assert_array_equal(found.defects[time], flags)
                assert np.isnan(found.change_between_lines[time]).all()
                (said,) = {one for one in report.found if f"{line}_0" in one}
                assert "no image at any wavelength" in said
                assert said in found.attrs["found"]
                assert said in caplog.text
            # Over the missing time the next one but one is near enough.
            change = found.change_between_lines[list(self.OTHERS)]
            assert np.isfinite(change).any(("y", "x")).all()

        return check

    def test_their_times_are_flagged_and_the_others_as_ever(
        self, dead_scans, tmp_path, check, fake_model, client
    ):
        output, others = tmp_path / "obs.zarr", list(self.OTHERS)
        report = ingest([dead_scans[0]], output, call="")
        found = open_observation(output).load()
        check(report, found)
        for name in ("valid", "halpha", "ca8542", "shift_y", "shift_x", "defects"):
            np.testing.assert_array_equal(found[name][others], dead_scans[1][name][others])
        invert(output, tmp_path / "map.zarr", model=fake_model, cluster=client, draws=4)
        answers = open_map(tmp_path / "map.zarr").load()
        missing = flagged(answers, "wavelength_missing").values
        np.testing.assert_array_equal(missing, found.defects == Defect.WAVELENGTH_MISSING)
        assert missing.any(axis=(1, 2)).tolist() == [False, True, False, True, False]
        assert flagged(answers, "outside_field").values[[1, 3]].all()
        answered = np.isfinite(answers.temperature).all(("quantile", "height"))
        np.testing.assert_array_equal(answered, found.valid)

    def test_aligned_and_at_a_common_time(self, dead_scans, tmp_path, check):
        output = tmp_path / "obs.zarr"
        report = ingest([dead_scans[0]], output, call="", align_series=True, common_time=True)
        found = open_observation(output).load()
        check(report, found)
        assert found.series_aligned.values.tolist() == [True, True, True, False, True]
        # The scene drifts by (0.06, -0.04) pixels a second.
        seconds = 11.54 * np.delete(np.arange(5), 3)
        for name, speed in (("series_shift_y", 0.06), ("series_shift_x", -0.04)):
            np.testing.assert_allclose(np.delete(found[name].values, 3), -speed * seconds, atol=0.2)
        # Before the first time there is no Ca II, before the third a dead one.
        assert found.ca8542_interpolated.values.tolist() == [False, False, False, False, True]


class TestChange:
    def test_ribbons_that_brighten(self, growing):
        """The estimate is what the scene did, and it is flagged in the ribbons and nowhere else."""
        _, truth, output, report = growing
        dataset = open_observation(output).load()
        change = dataset.change_between_lines
        assert change.attrs["threshold"] == CHANGED
        lag = 5.015
        for time in range(4):
            second = 11.54 * time
            whole = [truth(0.6 + 0.03 * second)[0], truth(0.6 + 0.03 * (second + lag))[1]]
            rate = [0.03 * (one - other) for one, other in zip(truth(1.0), truth(0.0), strict=True)]
            rate = np.concatenate(
                [
                    bands_of(rate[0], WAVELENGTH_HALPHA, 6564.61, 1.374),
                    bands_of(rate[1], WAVELENGTH_CA8542, 8544.44, 1.2),
                ]
            )
            brightest = np.maximum(*(cube.max(axis=0) for cube in whole))
            expected = displace((np.abs(rate) * lag).max(axis=0) / brightest, 0.06 * second, -0.04 * second)
            found = change[time].values
            known = np.isfinite(found)
            # beside the edge of a scan that is moved nothing is known: of so small a field a lot
            assert known[ndimage.binary_erosion(dataset.valid[time].values, iterations=3)].all()
            assert not known[~dataset.valid[time].values].any()
            inner = ndimage.binary_erosion(known, iterations=3)
            np.testing.assert_allclose(found[inner], expected[inner], atol=0.02)
            assert abs(np.median((found - expected)[inner & (expected > 0.06)])) < 0.003
            assert (found > CHANGED)[inner & (expected > 0.065)].all()
            assert not (found > CHANGED)[inner & (expected < 0.035)].any()
            assert 0.1 < (expected > CHANGED)[inner].mean() < 0.4
        share = float((change > CHANGED).sum() / np.isfinite(change).sum())
        assert report.changed == pytest.approx(share)
        assert f"{100 * share:.1f} % of the pixels changed" in report.summary()
        assert leftovers(output) == []

    def test_a_map_of_it_is_flagged(self, growing, fake_model, client, tmp_path):
        invert(growing[2], tmp_path / "map.zarr", model=fake_model, cluster=client, draws=8, times="1")
        change = open_observation(growing[2]).change_between_lines.values
        flags = flagged(open_map(tmp_path / "map.zarr"), "changed_between_lines").values
        np.testing.assert_array_equal(flags[1], change[1] > CHANGED)
        assert 100 < flags[1].sum() < flags[1].size / 4

    def test_a_single_pair_knows_nothing(self, pair, tmp_path):
        report = ingest(pair, tmp_path / "obs.zarr", call="")
        assert report.changed is None
        assert "how much changed between the two lines' times is not known" in report.summary()
        assert np.isnan(open_observation(tmp_path / "obs.zarr").change_between_lines.values).all()

    @pytest.mark.parametrize("card", ["CDELT1", "CDELT2"])
    def test_mirrored_images_are_read_right(self, tmp_path, card):
        """x or y of both lines runs the other way: pixels lie where astropy has them by the header."""
        paths = write_pair(tmp_path, shape=(60, 70), shift=(2.0, -3.0), angle=None)[:2]
        for path in paths:
            change_header(path, **{card: -0.057})
        ingest(paths, tmp_path / "obs.zarr", call="tests")
        y, x = np.mgrid[:60, :70].astype(float)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FITSFixedWarning)
            expected = WCS(fits.getheader(paths[0])).celestial.wcs_pix2world(x, y, 0)
        with open_observation(tmp_path / "obs.zarr") as observation:
            assert observation.shift_applied.values.all()
            for name, degrees in zip(("longitude", "latitude"), expected, strict=True):
                angle = (degrees + 180.0) % 360.0 * 3600.0 - 648000.0
                found = observation[name].values.reshape(60, 70)
                np.testing.assert_allclose(found, angle, rtol=0, atol=1e-6)
        change_header(paths[1], **{card: 0.057})
        with pytest.raises(InputError, match="different size or orientation"):
            ingest(paths, tmp_path / "other.zarr", call="tests")

    def test_gaps_and_scans_that_cannot_be_compared(self, tmp_path, caplog):
        """Over a gap nothing is known from that side, and a scan alone between gaps knows nothing."""
        write_growing(tmp_path, 0, seconds=[0.0, 10.0, 20.0, 60.0, 100.0, 110.0])
        ingest([tmp_path], tmp_path / "obs.zarr", call="")
        change = open_observation(tmp_path / "obs.zarr").change_between_lines.values
        known = np.isfinite(change).any(axis=(1, 2))
        assert known.tolist() == [True, True, True, False, True, True]
        assert "at 1 of 6 times it is not known" in caplog.text

    def test_resumes_and_compares_no_more_than_it_must(self, growing, tmp_path, monkeypatch):
        """What was compared is known to the journal; what is damaged, or calibrated otherwise, is not."""
        output = tmp_path / "obs.zarr"
        find, compared = changes.find_changes, []

        def stop(*arguments):
            raise KeyboardInterrupt

        def counted(task):
            compared.extend(task.weights)
            return find(task)

        monkeypatch.setattr("pipeline.changes.find_changes", counted)
        for damaged in ([], [2]):
            with monkeypatch.context() as patch:
                patch.setattr("pipeline.ingest.finish", stop)
                with pytest.raises(KeyboardInterrupt):
                    ingest([growing[0]], output, call="a test")
            (store,) = tmp_path.glob("obs.zarr.*.new")
            assert len(list(tmp_path.glob("obs.zarr.*.new.scratch"))) == 1
            for time in damaged:
                (store / f"change_between_lines/c/{time}/0/0").write_bytes(b"")
        assert compared == [0, 1, 2, 3]
        ingest([growing[0]], output, call="a test")
        assert compared == [0, 1, 2, 3, 2]
        assert contents(output) == contents(growing[2])
        assert leftovers(output) == []


class TestBadInput:
    def refuse(self, sources, output, kind=InputError, **keywords):
        with pytest.raises(kind) as caught:
            ingest(sources, output, call="", **keywords)
        assert type(caught.value) is kind or issubclass(kind, FlareFieldError)
        assert not output.exists()
        return str(caught.value)

    def test_one_line_only(self, pair, tmp_path):
        for path, missing in zip(pair, ("ca8542", "halpha"), strict=True):
            text = self.refuse([path], tmp_path / "obs.zarr")
            assert "only one line" in text
            assert missing in text
            assert str(path) in text

    def test_nothing_found(self, tmp_path):
        assert "no scans found" in self.refuse([tmp_path], tmp_path / "obs.zarr")

    def test_same_scan_twice(self, pair, tmp_path):
        shutil.copy(pair[0], tmp_path / "copy.fits")
        text = self.refuse([tmp_path], tmp_path / "obs.zarr")
        assert "same scan" in text
        assert "copy.fits" in text

    def test_different_size(self, pair, tmp_path):
        later, _, _ = write_pair(tmp_path, shape=(40, 50), angle=None, number=1)
        change_data(later, lambda data: data[:, 1:])
        text = self.refuse([tmp_path], tmp_path / "obs.zarr")
        assert "different size" in text
        assert "(39, 50)" in text
        assert "(40, 50)" in text

    def test_different_pixels(self, pair, tmp_path):
        change_header(pair[1], CDELT1=0.06)
        assert "different size or orientation" in self.refuse(pair, tmp_path / "obs.zarr")

    def test_different_wavelengths(self, tmp_path):
        rng = np.random.default_rng(1)
        for number in range(2):
            for line, axis in (("h", WAVELENGTH_HALPHA), ("c", WAVELENGTH_CA8542 - 0.05 * number)):
                write_fchroma(
                    tmp_path / f"{line}{number}.fits",
                    rng.integers(1000, 2000, (axis.size, 30, 40)),
                    axis,
                    START + number * CADENCE,
                )
        assert "different wavelengths" in self.refuse([tmp_path], tmp_path / "obs.zarr")

    def test_lines_in_different_units(self, pair, tmp_path):
        halpha, ca8542 = read_scans(pair[0]) + read_scans(pair[1])
        relative = replace(ca8542, units="", units_of_file="")
        with pytest.raises(InputError, match="cannot be compared") as refusal:
            check_alike((Pair(halpha, relative),))
        assert refusal.value.found == "relative intensities"
        assert refusal.value.expected.startswith("DN (in the file: 'DN')")
        assert "--calibrate quiet-sun" in refusal.value.remedy
        check_alike((Pair(halpha, relative),), calibrated=True)

    def test_lines_of_which_one_is_in_electrons(self, pair, tmp_path):
        """Of each number of the detector there are some electrons: how many, nobody has said."""
        change_header(pair[0], BUNIT="DN")
        change_header(pair[1], BUNIT="electron")
        said = self.refuse(pair, tmp_path / "obs.zarr")
        assert "cannot be compared" in said
        assert "electron" in said
        (scan,) = read_scans(pair[1])
        assert scan.saturation == read_scans(pair[0])[0].saturation
        check_alike((Pair(*read_scans(pair[0]), scan),), calibrated=True)

    def test_lines_that_are_both_relative_are_warned_of(self, pair, caplog):
        both = Pair(*(replace(read_scans(path)[0], units="", units_of_file="") for path in pair[:2]))
        check_alike((both,), calibrated=True)
        assert not caplog.records
        check_alike((both,))
        (warning,) = caplog.records
        assert warning.levelname == "WARNING"
        assert "their relative calibration, which the network relies on, is not known" in warning.message
        assert str(pair[0]) in warning.message

    @pytest.mark.parametrize(
        ("axis", "words"),
        [
            (WAVELENGTH_CA8542[3:-3], "too short"),
            (WAVELENGTH_CA8542[:-5], "too short"),
            (WAVELENGTH_CA8542 - 2.349, "air"),
        ],
    )
    def test_wavelength_range(self, pair, tmp_path, axis, words):
        rng = np.random.default_rng(1)
        cube = rng.integers(1000, 2000, (axis.size, 40, 50))
        write_fchroma(pair[1], cube, axis, START, overwrite=True)
        text = self.refuse(pair, tmp_path / "obs.zarr")
        assert words in text
        assert str(pair[1]) in text

    def test_truncated(self, pair, tmp_path):
        os.truncate(pair[1], pair[1].stat().st_size // 2)
        text = self.refuse(pair, tmp_path / "obs.zarr")
        assert "truncated" in text
        assert str(pair[1]) in text

    @pytest.mark.parametrize("value", [0, 1234, -5])
    def test_scan_without_intensities(self, pair, tmp_path, value):
        change_data(pair[1], lambda data: np.full_like(data, value))
        text = self.refuse(pair, tmp_path / "obs.zarr")
        assert "no image at any wavelength" in text
        assert str(pair[1]) in text

    def test_bad_pixels_are_kept(self, pair, tmp_path):
        def spoil(data):
            data = data.astype(np.float32)
            data[5, 10, 12], data[:, 20, 30], data[3, 7, 8] = np.nan, 0.0, -4.0
            return data

        for path in pair:
            change_data(path, spoil)
        ingest(pair, tmp_path / "obs.zarr", call="")
        halpha = open_observation(tmp_path / "obs.zarr").halpha.isel(time=0).values
        assert np.isnan(halpha[10, 12, 5])
        assert (halpha[20, 30] == 0.0).all()
        assert halpha[7, 8, 3] == -4.0
        assert np.isfinite(halpha).sum() == halpha.size - 1

    def test_defects_are_flagged_and_stay_as_they_are(self, tmp_path, caplog):
        """A spike in Ca II is where it belongs in H-alpha's frame, and its neighbours know nothing of it."""
        clean = write_pair(tmp_path, shape=(90, 110), shift=(2.3, -1.4), angle=None)[:2]
        ingest(clean, tmp_path / "clean.zarr", call="")
        expected = open_observation(tmp_path / "clean.zarr").load()
        assert not expected.defects.values.any()
        assert not expected.poor_seeing.values.any()
        assert not expected.header_contradiction.values.any()
        assert expected.attrs["found"] == []

        def spoil(data):
            data = data.copy()
            data[4, 40, 50] += 3000
            data[:, 60, 70] = 1111
            return data

        change_data(clean[1], spoil)
        change_header(clean[0], WDESC1="Ca II 8542")
        report = ingest(clean, tmp_path / "obs.zarr", call="", min_contrast=0.5)
        dataset = open_observation(tmp_path / "obs.zarr").load()
        found = {
            tuple(place): int(dataset.defects[0][tuple(place)])
            for place in np.argwhere(dataset.defects.values[0])
        }
        assert found == {(42, 49): Defect.SPIKE, (62, 69): Defect.DEAD_PIXEL}
        assert float(dataset.ca8542[0, 42, 49, 4]) == float(fits.getdata(clean[1])[4, 40, 50])
        near = {"y": slice(39, 46), "x": slice(46, 53)}
        change = np.abs(dataset.ca8542.isel(near) - expected.ca8542.isel(near)).values[0]
        change[3, 3, 4] = 0.0
        assert change.max() < 150.0  # of 3,000: what its neighbours' guess of its value is wrong by
        np.testing.assert_array_equal(dataset.halpha, expected.halpha)
        assert dataset.poor_seeing.values.all()
        assert dataset.header_contradiction.values.all()
        assert 0.05 < float(dataset.contrast_halpha[0]) < 0.1
        for words in ("1 spikes", "1 dead or hot", "names 8542", "less than 0.5"):
            assert any(words in sentence for sentence in report.found), words
            assert words in caplog.text
        assert dataset.attrs["found"] == list(report.found)
        assert "something is wrong with scans" in report.summary()
        with pytest.raises(MisuseError, match=r"--min-contrast 0\.5, now 0\.0"):
            ingest(clean, tmp_path / "obs.zarr", call="")

    def test_headers_are_read_before_anything_is_written(self, tmp_path):
        halpha, _, _ = write_pair(tmp_path, shape=(40, 50), angle=None)
        change_header(halpha, TWAVE1="6563 A")
        text = self.refuse([tmp_path], tmp_path / "obs.zarr")
        assert str(halpha) in text
        assert "TWAVE1 = '6563 A'" in text
        assert [path for path in tmp_path.iterdir() if path.suffix != ".fits"] == []

    def test_a_series_of_nothing(self, tmp_path):
        """All its scans are named, and once they are mended nothing is left of the attempt."""
        for number in range(2):
            write_pair(tmp_path, shape=(40, 50), angle=None, number=number, seed=number)
        bad = [tmp_path / f"crisp_l2_20140906_152724_{name}.fits" for name in ("6563_r00000", "8542_r00001")]
        good = [path.read_bytes() for path in bad]
        for path in bad:
            change_data(path, np.zeros_like)
        output = tmp_path / "obs.zarr"
        text = self.refuse([tmp_path], output)
        assert "no time of the series" in text
        for path, data in zip(bad, good, strict=True):
            assert f"{path}: no image at any wavelength" in text
            path.write_bytes(data)
        ingest([tmp_path], output, call="")
        assert open_observation(output).sizes["time"] == 2
        assert leftovers(output) == []

    def test_files_that_fail_meanwhile_are_all_named(self, tmp_path, monkeypatch):
        for number in range(3):
            write_pair(tmp_path, shape=(40, 50), angle=None, number=number, seed=number)
        lay_out, bad = pipeline.ingest.lay_out, sorted(tmp_path.glob("*6563_r0000[12].fits"))

        def cut_off(*arguments, **settings):
            lay_out(*arguments, **settings)
            for path in bad:
                os.truncate(path, 9000)

        monkeypatch.setattr(pipeline.ingest, "lay_out", cut_off)
        text = self.refuse([tmp_path], tmp_path / "obs.zarr")
        assert "2 of 3 scan pairs failed" in text
        assert all(path.name in text for path in bad)

    def test_output_is_something_else(self, pair, tmp_path):
        file, folder, other = tmp_path / "file.zarr", tmp_path / "folder.zarr", tmp_path / "map.zarr"
        file.write_text("mine")
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        zarr.open_group(other, mode="w").attrs["kind"] = "map"
        for output in (file, folder, other):
            for overwrite in (False, True):
                with pytest.raises(MisuseError, match="not an observation"):
                    ingest(pair, output, call="", overwrite=overwrite)
        assert file.read_text() == "mine"
        assert (folder / "notes.txt").read_text() == "mine"
        assert zarr.open_group(other, mode="r").attrs["kind"] == "map"
        with pytest.raises(MisuseError, match="does not exist"):
            ingest(pair, tmp_path / "nowhere" / "obs.zarr", call="")

    def test_observation_of_other_files(self, pair, tmp_path):
        output = tmp_path / "obs.zarr"
        ingest(pair, output, call="first")
        before = contents(output)
        assert ingest(pair, output, call="second").complete_before
        change_data(pair[0], lambda data: data + 1)
        with pytest.raises(MisuseError, match="other files"):
            ingest(pair, output, call="third")
        assert contents(output) == before
        ingest(pair, output, call="fourth", overwrite=True)
        dataset = open_observation(output)
        assert dataset.attrs["call"] == "fourth"
        np.testing.assert_array_equal(
            dataset.halpha.isel(time=0).transpose("wavelength_halpha", "y", "x"), fits.getdata(pair[0])
        )
        assert leftovers(output) == []


def test_sidecars_of_the_same_content(tmp_path):
    """Both lines' lists of times say the same: that the files are the same again is known all the same."""
    cubes = []
    for line, axis in (("halpha", WAVELENGTH_HALPHA), ("ca8542", WAVELENGTH_CA8542)):
        cube = np.random.default_rng(axis.size).integers(1000, 2000, (2, axis.size, 20, 30)).astype(np.int16)
        fits.PrimaryHDU(cube).writeto(tmp_path / f"{line}.fits")
        (tmp_path / f"{line}.txt").write_text("2014-09-06T15:27:24\n2014-09-06T15:27:35\n")
        cubes.append(
            {
                "files": f"{line}*",
                "axes": ["time", "wavelength", "y", "x"],
                "line": line,
                "wavelength": {"values": axis.tolist(), "unit": "Angstrom", "medium": "vacuum"},
                "time": {"file": f"{line}.txt"},
                "pointing": {"reference_value": [-300.0, 200.0], "scale": 0.06},
                "unit": "DN",
            }
        )
    (tmp_path / "cubes.yaml").write_text(yaml.safe_dump({"cubes": cubes}))
    files, output = sorted(tmp_path.glob("*.fits")), tmp_path / "obs.zarr"
    settings = {"call": "", "description": tmp_path / "cubes.yaml"}
    assert not ingest(files, output, **settings).complete_before
    assert ingest(files, output, **settings).complete_before
    (tmp_path / "ca8542.txt").write_text("2014-09-06T15:27:25\n2014-09-06T15:27:36\n")
    with pytest.raises(MisuseError, match="1 of the 5 files are not"):
        ingest(files, output, **settings)


def as_another(path, copy, how):
    copy.unlink(missing_ok=True)
    how(path, copy)


@pytest.mark.parametrize("value", [np.inf, np.nan, -1.0])
@pytest.mark.parametrize("name", ["tolerance", "min_contrast", "largest_jump"])
def test_limits_that_are_none(tmp_path, name, value):
    with pytest.raises(MisuseError, match="the limit is no number") as caught:
        ingest([tmp_path], tmp_path / "obs.zarr", call="test", **{name: value})
    assert caught.value.where == name
    if name != "largest_jump":
        with pytest.raises(MisuseError, match="the limit is no number"):
            inspect([tmp_path], **{"tolerance": 15.0, name: value})


@pytest.mark.parametrize("kind", [">i2", ">f4"])
def test_one_image_under_both_lines_headers(tmp_path, kind):
    halpha, ca8542, _ = write_pair(tmp_path, shape=(40, 50), angle=None)
    with fits.open(halpha) as one, fits.open(ca8542, mode="update") as other:
        other[0].data[:15] = one[0].data
        other[0].data = other[0].data.astype(kind)
    with pytest.raises(InputError, match="same image, but are given for different lines") as caught:
        ingest([tmp_path], tmp_path / "obs.zarr", call="test")
    assert str(halpha) in str(caught.value)
    assert str(ca8542) in str(caught.value)
    assert inspect([tmp_path], tolerance=15.0).refusal.problem == caught.value.problem


def test_one_image_at_two_times(tmp_path, caplog):
    write_pair(tmp_path, shape=(40, 50), angle=None)
    _, last, _ = write_pair(tmp_path, shape=(40, 50), angle=None, number=1, seed=1)
    ingest([tmp_path], tmp_path / "sound.zarr", call="test")
    assert "twice" not in caplog.text
    first = min(tmp_path.glob("*8542*.fits"))
    with fits.open(first) as one, fits.open(last, mode="update") as other:
        other[0].data[:] = one[0].data
    ingest([tmp_path], tmp_path / "obs.zarr", call="test")
    (said,) = [record.getMessage() for record in caplog.records if "twice" in record.getMessage()]
    assert str(first) in said
    assert str(last) in said
    caplog.clear()
    assert inspect([tmp_path], tolerance=15.0).refusal is None
    assert "images are there twice" in caplog.text


def test_scans_without_intensities_are_no_copies(tmp_path):
    """Files without headers are alike, byte by byte, where nothing is in them."""
    cubes = []
    for line, axis in (("halpha", WAVELENGTH_HALPHA), ("ca8542", WAVELENGTH_CA8542)):
        for time in range(3):
            cube = np.random.default_rng([time, axis.size]).integers(1000, 2000, (axis.size, 20, 30))
            if line == "halpha" and time > 0:
                cube[:] = 0
            fits.PrimaryHDU(cube.astype(np.int16)).writeto(tmp_path / f"{line}{time}.fits")
            cubes.append(
                {
                    "files": f"{line}{time}*",
                    "axes": ["wavelength", "y", "x"],
                    "line": line,
                    "wavelength": {"values": axis.tolist(), "unit": "Angstrom", "medium": "vacuum"},
                    "time": {"values": [f"2014-09-06T15:2{time}:35"]},
                    "pointing": {"reference_value": [-300.0, 200.0], "scale": 0.06},
                    "unit": "DN",
                }
            )
    (tmp_path / "cubes.yaml").write_text(yaml.safe_dump({"cubes": cubes}))
    files = sorted(tmp_path.glob("*.fits"))
    ingest(files, tmp_path / "obs.zarr", call="", description=tmp_path / "cubes.yaml")
    assert open_observation(tmp_path / "obs.zarr").valid.any(("y", "x")).values.tolist() == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("how", [shutil.copyfile, os.link, os.symlink])
@pytest.mark.parametrize("kind", ["fits", "netcdf", "netcdf, two variables", "fits, two HDUs", "La Palma"])
def test_one_file_given_for_both_lines(tmp_path, kind, how):
    """That the intensities are twice the same ones nothing shows but the files' content."""
    paths, statements = {}, {}
    axes = {"halpha": WAVELENGTH_HALPHA, "ca8542": np.linspace(*WAVELENGTH_CA8542[[0, -1]], 15)}
    rng = np.random.default_rng(1)
    cubes = {line: rng.integers(100, 2000, (2, 15, 20, 30), "i2") for line in axes}
    for line, axis in axes.items():
        place = {"fits": {"hdu": 0}, "netcdf": {"variable": "intensity"}, "La Palma": {}}
        place["netcdf, two variables"] = {"variable": line}
        place["fits, two HDUs"] = {"hdu": line.upper()}
        statements[line] = {
            "files": f"{line}*",
            "axes": ["time", "wavelength", "y", "x"],
            "line": line,
            "wavelength": {"values": axis.tolist(), "unit": "Angstrom", "medium": "vacuum"},
            "time": {"start": "2014-09-06T15:27:24", "step": 11.5},
            "pointing": {"reference_value": [-300.0, 200.0], "scale": 0.06},
            "unit": "DN",
            **place[kind],
        }
        paths[line] = tmp_path / f"{line}.{'icube' if kind == 'La Palma' else 'cube'}"
        if kind == "La Palma":
            write_cube(paths[line], cubes[line][:, None])
            del statements[line]["files"], statements[line]["axes"]
            paths[line].with_suffix(".yaml").write_text(yaml.safe_dump(statements[line] | {"stokes": ["I"]}))
        elif kind == "fits":
            fits.PrimaryHDU(cubes[line]).writeto(paths[line])
        elif kind == "fits, two HDUs":
            hdus = [fits.ImageHDU(cube, name=other) for other, cube in cubes.items()]
            fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(paths[line])
        else:
            names = cubes if "two" in kind else {"intensity": cubes[line]}
            variables = {name: (("time", "w", "y", "x"), cube) for name, cube in names.items()}
            xr.Dataset(variables).to_netcdf(paths[line], engine="h5netcdf")
    settings = {"call": "test"}
    if kind != "La Palma":
        (tmp_path / "cubes.yaml").write_text(yaml.safe_dump({"cubes": list(statements.values())}))
        settings["description"] = tmp_path / "cubes.yaml"
    if how is shutil.copyfile:  # whatever follows, nothing is wrong yet
        ingest(list(paths.values()), tmp_path / "sound.zarr", **settings)
    as_another(paths["halpha"], paths["ca8542"], how)
    if "two" in kind:
        ingest(list(paths.values()), tmp_path / "obs.zarr", **settings)
        for store in tmp_path.glob("*.zarr"):
            np.testing.assert_array_equal(
                open_observation(store).ca8542.transpose("time", "wavelength_ca8542", "y", "x"),
                cubes["ca8542"],
            )
        return
    # A link counts as its file: the sidecar that is found first says which line that is.
    linked = kind == "La Palma" and how is os.symlink
    words = "only one line is given" if linked else "same content, but are given for different lines"
    with pytest.raises(InputError, match=words) as caught:
        ingest(list(paths.values()), tmp_path / "obs.zarr", **settings)
    if linked:
        return
    assert str(paths["halpha"]) in str(caught.value)
    assert str(paths["ca8542"]) in str(caught.value)
    assert not (tmp_path / "obs.zarr").exists()
    refusal = inspect(list(paths.values()), description=settings.get("description"), tolerance=15.0).refusal
    assert refusal.problem == caught.value.problem


@pytest.mark.parametrize("name", FORMATS)
def test_formats_that_say_their_line_are_never_given_for_the_other(tmp_path, name):
    """A file, or group, in the place of the other line's; of DKIST one file holds both lines."""
    settings = FORMATS[name][0](tmp_path, known_series())
    scans, _ = find_scans([tmp_path], **settings)
    first, second = (next(scan for scan in scans if scan.line == line).path for line in ("halpha", "ca8542"))
    if first == second:
        assert {scan.line for scan in scans} == {"halpha", "ca8542"}
        ingest([first], tmp_path / "obs.zarr", call="test", **settings)
        return
    if Path(second).is_dir():
        shutil.rmtree(second)
        shutil.copytree(first, second)
    else:
        as_another(Path(first), Path(second), shutil.copyfile)
    with pytest.raises(InputError) as caught:
        ingest([first, second], tmp_path / "obs.zarr", call="test", **settings)
    assert first in str(caught.value) or second in str(caught.value)
    assert not (tmp_path / "obs.zarr").exists()


def test_a_common_time_that_the_lines_have_anyway(tmp_path, caplog):
    for number in range(2):
        write_pair(tmp_path, shape=(40, 50), angle=None, number=number, delay=np.timedelta64(0, "ms"))
    report = ingest([tmp_path], tmp_path / "obs.zarr", call="", common_time=True)
    assert "interpolated to H-alpha's time in 0 of 2 scans; 2 were taken at that time" in report.summary()
    assert "it keeps its own" not in report.summary()
    assert "not interpolated" not in caplog.text


def killed(processes, sources, output, name, call, **settings):  # noqa: F811
    """Ingest in a process that is killed at the n-th call of ``module:attribute``."""
    arguments = (sources, output, (name, call))
    said = {"call": "flarefield ingest series obs.zarr"}
    process = processes.Process(target=disturbed.run_ingest, args=arguments, kwargs={**said, **settings})
    process.start()
    process.join(PATIENCE)
    code = process.exitcode
    process.kill()
    assert code == -signal.SIGKILL


class TestInterruption:
    @pytest.mark.parametrize(
        ("what", "time_of"),
        [
            ("ShardWriter.write", lambda writer, place, values: place[0]),  # by one of several threads
            ("_write_maps", lambda task, *_: task.time),
        ],
    )
    def test_no_space_left(self, series, tmp_path, monkeypatch, what, time_of):
        output = tmp_path / "obs.zarr"
        write = attrgetter(what)(pipeline.ingest)

        def full(*arguments):
            if time_of(*arguments) == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(*arguments)

        monkeypatch.setattr(f"pipeline.ingest.{what}", full)
        with pytest.raises(StoreError, match="no space left") as caught:
            ingest([series[0]], output, call="")
        assert "free some space" in str(caught.value)
        assert not output.exists()
        monkeypatch.setattr(f"pipeline.ingest.{what}", write)
        assert ingest([series[0]], output, call="").resumed == 1

    def test_resumes_only_what_is_of_the_same_files(self, tmp_path, monkeypatch):
        for number in range(2):
            write_pair(tmp_path, shape=(40, 50), angle=None, number=number, seed=number)
        output = tmp_path / "obs.zarr"
        work = pipeline.ingest.ingest_pair

        def stop(task):
            if task.time == 1:
                raise KeyboardInterrupt
            return work(task)

        monkeypatch.setattr("pipeline.ingest.ingest_pair", stop)
        with pytest.raises(KeyboardInterrupt):
            ingest([tmp_path], output, call="")
        assert not output.exists()
        (changed,) = tmp_path.glob("*6563_r00000.fits")
        change_data(changed, lambda data: data + 1)
        monkeypatch.setattr("pipeline.ingest.ingest_pair", work)
        assert ingest([tmp_path], output, call="").resumed == 0
        stored = open_observation(output).halpha.isel(time=0).transpose("wavelength_halpha", "y", "x")
        np.testing.assert_array_equal(stored, fits.getdata(changed))
        assert leftovers(output) == []

    def interrupted(self, sources, output):
        """Leave an ingest whose times are all done; return its store and its journal."""

        def stop(*arguments):
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.ingest.finish", stop)
            with pytest.raises(KeyboardInterrupt):
                ingest(sources, output, call="")
        assert not output.exists()
        (store,) = output.parent.glob(f"{output.name}.*.new")
        return store, Directory(store).journal

    def test_damaged_journal_starts_over(self, pair, tmp_path, caplog):
        output = tmp_path / "obs.zarr"
        _, journal = self.interrupted(pair, output)
        journal.write_text("not a journal\n")
        assert ingest(pair, output, call="").resumed == 0
        assert "starting over" in caplog.text
        assert open_observation(output).sizes["time"] == 1
        assert leftovers(output) == []

    def test_what_is_damaged_meanwhile_is_done_again(self, series, observation, tmp_path, caplog):
        output = tmp_path / "obs.zarr"
        store, _ = self.interrupted([series[0]], output)
        os.truncate(store / "ca8542/c/1/0/0/0", 1000)
        (store / "valid/c/2/0/0").unlink()
        report = ingest([series[0]], output, call="flarefield ingest series obs.zarr")
        assert report.resumed == 1
        assert "2 finished times are missing or damaged" in caplog.text
        assert contents(output) == contents(observation[0])

    def test_a_file_that_goes_meanwhile(self, pair, tmp_path, monkeypatch):
        found = pipeline.ingest._contradictions

        def gone(series):
            answer = found(series)
            pair[1].unlink()
            return answer

        monkeypatch.setattr("pipeline.ingest._contradictions", gone)
        with pytest.raises(InputError, match="the file cannot be read") as caught:
            ingest(pair, tmp_path / "obs.zarr", call="")
        assert str(caught.value.where) == str(pair[1])

    def test_a_second_command_is_refused(self, pair, tmp_path):
        output = tmp_path / "obs.zarr"
        with lock(output), pytest.raises(MisuseError, match="another command"):
            ingest(pair, output, call="")
        ingest(pair, output, call="")
        assert leftovers(output) == []

    def test_killed_at_any_moment(self, processes, series, observation, tmp_path):  # noqa: F811
        """SIGKILL in the middle of a slice, before the end, in the renaming: then the same bytes."""
        output = tmp_path / "obs.zarr"
        for module, name, call in (
            ("pipeline.shards", "ShardWriter.write", 4),  # the second time is being written
            ("pipeline.storage", "Directory.bring_to_disk", 5),  # it is written, not recorded
            ("pipeline.ingest", "finish", 1),
            ("pipeline.ingest", "swap", 1),
            ("os", "replace", 1),  # the store has its name, the journal has not
        ):
            killed(processes, [series[0]], output, f"{module}:{name}", call)
            assert output.exists() == (module == "os")
        report = ingest([series[0]], output, call="flarefield ingest series obs.zarr")
        assert report.complete_before
        assert contents(output) == contents(observation[0])
        assert leftovers(output) == []

    def test_killed_while_calibrating_and_comparing(self, processes, tmp_path):  # noqa: F811
        """The second time is the first one, a fifth brighter everywhere: that much is known to change."""
        scenes = [quiet_scene(times=1)[0] for _ in range(2)]
        for line in ("halpha", "ca8542"):
            scenes[1][line] = 1.2 * scenes[1][line]
        scenes[1] = scenes[1].assign_coords(time=scenes[1].time + np.timedelta64(20, "s"))
        files = [write_scene(tmp_path / str(number), one, delay=5) for number, one in enumerate(scenes)]
        settings = {"calibrate": "quiet-sun", "wavelength_zero": "quiet-sun"}
        output, undisturbed = tmp_path / "obs.zarr", tmp_path / "undisturbed.zarr"
        for name, call in (
            ("pipeline.ingest:calibrate_store", 1),
            ("pipeline.ingest:write_calibration", 2),  # as in the files is written, what was found is not
            ("pipeline.changes:_Scans.change", 2),  # one time's change is written, not recorded
            ("pipeline.ingest:finish", 1),  # both are recorded, and calibrated again
        ):
            killed(processes, files, output, name, call, **settings)
            assert not output.exists()
        report = ingest(files, output, call="flarefield ingest series obs.zarr", **settings)
        assert report.resumed == 2
        ingest(files, undisturbed, call="flarefield ingest series obs.zarr", **settings)
        assert contents(output) == contents(undisturbed)
        assert leftovers(output) == []
        change = open_observation(output).change_between_lines.values
        assert np.isfinite(change).mean() > 0.8
        # a quarter of a fifth, in an image that is nearly as bright as the brightest
        assert 0.02 < np.nanmedian(change) < 0.05

    @pytest.mark.usefixtures("processes")
    def test_workers_killed_while_writing_and_comparing(self, growing, tmp_path):
        """What changed between the lines, too, is found by the workers as by one process alone."""
        deaths = ("pipeline.shards:ShardWriter.write", "pipeline.changes:_Scans.change")
        output = tmp_path / "obs.zarr"
        with (
            dask.config.set(
                {
                    "distributed.worker.multiprocessing-method": "forkserver",
                    **WORKER_SETTINGS,
                    **SCHEDULER_SETTINGS,
                }
            ),
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            client.register_plugin(disturbed.DiesOnce(tmp_path, deaths))
            ingest([growing[0]], output, cluster=client, call="a test")
        assert all((tmp_path / name).exists() for name in deaths)
        assert np.isfinite(open_observation(output).change_between_lines.values).any(axis=(1, 2)).all()
        assert contents(output) == contents(growing[2])
        assert leftovers(output) == []


class TestOpen:
    def test_missing(self, tmp_path):
        with pytest.raises(StoreError, match="no such observation"):
            open_observation(tmp_path / "obs.zarr")

    def test_something_else(self, tmp_path):
        (tmp_path / "obs.zarr").mkdir()
        with pytest.raises(StoreError, match="not a FlareField observation"):
            open_observation(tmp_path / "obs.zarr")

    def test_all_faults_are_named(self, observation):
        dataset = open_observation(observation[0])
        dataset = dataset.drop_vars("mu")
        dataset["shift_y"].attrs["units"] = "furlong"
        with pytest.raises(StoreError, match=r"no mu.*shift_y is in 'furlong'"):
            validate(dataset)
        with pytest.raises(StoreError, match="valid is over"):
            validate(dataset.assign(valid=dataset.valid.isel(time=0)))

    def test_damaged(self, observation, tmp_path):
        copy = tmp_path / "obs.zarr"
        shutil.copytree(observation[0], copy)
        text = (copy / "zarr.json").read_text()
        (copy / "zarr.json").write_text(text.replace('"float32"', '"float99"'))
        with pytest.raises(StoreError):
            open_observation(copy)
