"""Ca II at H-alpha's times: exact for what changes linearly, refused where the series does not allow it."""

from __future__ import annotations

import dask
import numpy as np
import pytest
import xarray as xr
from astropy.io import fits
from distributed import Client, LocalCluster
from test_invert import processes  # noqa: F401

import pipeline.ingest
from pipeline.changes import CHANGED
from pipeline.common_time import between, other_scans, share_of_other
from pipeline.crisp.fchroma import write_fchroma
from pipeline.crisp.wavelengths import vacuum_to_air
from pipeline.defects import Defect
from pipeline.errors import MisuseError
from pipeline.ingest import ingest
from pipeline.observation import open_observation
from pipeline.pairing import Pair
from pipeline.storage import place
from pipeline.tiles import judge
from tests.fchroma_files import START, WAVELENGTH_CA8542, WAVELENGTH_HALPHA, displace, scene
from tests.sstred_files import DAY, write_sstred
from tests.test_changes import scan_of

SHAPE = (66, 78)
HALPHA = [0.0, 11.5, 23.0, 34.5]
CA8542 = [5.0, 16.5, 28.0, 39.5]
MOVES = [(2.3, -1.4), (1.1, 0.8), (-2.6, 0.3), (0.7, 2.2), (1.9, -2.4)]
"""(y, x) pixels that bring Ca II's scans onto H-alpha, each its own."""


def moment(second):
    return START + np.timedelta64(round(1000 * second), "ms")


def write(folder, line, second, cube, move=(0.0, 0.0)):
    """Write a scan whose content is displaced by minus `move`, with some of the photons' noise."""
    seen = np.stack([displace(image, -move[0], -move[1]) for image in cube])
    rng = np.random.default_rng(round(1000 * second))
    seen += 0.2 * np.sqrt(np.maximum(seen, 1.0)) * rng.standard_normal(seen.shape)
    axis = WAVELENGTH_HALPHA if line == "halpha" else WAVELENGTH_CA8542
    path = folder / f"{line}_{second:07.3f}.fits"
    write_fchroma(path, np.maximum(seen, 1.0), axis, moment(second), start=START)


@pytest.fixture(scope="module")
def bright():
    """Both lines' cubes (wavelength, y, x) of a field whose ribbons have a brightness."""
    ends = [scene(np.random.default_rng(7), SHAPE, brightness) for brightness in (0.0, 1.0)]

    def cubes(brightness):
        return [dark + brightness * (one - dark) for dark, one in zip(*ends, strict=True)]

    return cubes


def write_series(folder, bright, brightness, halpha=HALPHA, ca8542=CA8542):
    """Scans of a field whose ribbons have a brightness that depends on the time."""
    for second in halpha:
        write(folder, "halpha", second, bright(brightness(second))[0])
    for second, move in zip(ca8542, MOVES, strict=False):
        write(folder, "ca8542", second, bright(brightness(second))[1], move)


def contents(store):
    """Bytes of every file of a store, wherever it is."""
    there = place(store)
    keys = sorted(there.sizes())
    return dict(zip(keys, there.read(keys), strict=True))


def linear(second):
    return 0.5 + 0.02 * second


@pytest.fixture(scope="module")
def interpolated(bright, tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear")
    write_series(folder, bright, linear)
    output = tmp_path_factory.mktemp("common") / "obs.zarr"
    return folder, output, ingest([folder], output, call="a test", common_time=True)


INNER = (slice(8, -8), slice(8, -8))
"""What is in all fields, however they are moved."""


class TestSeries:
    def test_what_changes_linearly_is_exact(self, interpolated, bright):
        """Each time has the Ca II of its H-alpha's own time; what is left is the resampling's error."""
        dataset = open_observation(interpolated[1]).load()
        assert dataset.ca8542_interpolated.values.tolist() == [False, True, True, True]
        assert dataset.attrs["common_time"]
        for time in (1, 2, 3):
            truth = np.moveaxis(bright(linear(HALPHA[time]))[1], 0, -1)[INNER]
            stored = dataset.ca8542[time].values[INNER]
            late = np.moveaxis(bright(linear(CA8542[time]))[1], 0, -1)[INNER]
            off = np.sqrt(np.mean((stored - truth) ** 2)) / truth.mean()
            assert off < 0.005
            assert off < 0.5 * np.sqrt(np.mean((late - truth) ** 2)) / truth.mean()
            # where the ribbons are, which change, it is not off to one side
            ribbons = (late - truth).max(axis=-1) > 100.0
            core = slice(10, 15)
            assert (
                abs((stored - truth)[ribbons][:, core].mean() / (late - truth)[ribbons][:, core].mean())
                < 0.02
            )

    def test_times(self, interpolated):
        dataset = open_observation(interpolated[1])
        expected = [moment(CA8542[0]), *(moment(second) for second in HALPHA[1:])]
        np.testing.assert_array_equal(dataset.time_ca8542.values, np.array(expected, "M8[ns]"))
        np.testing.assert_array_equal(
            dataset.time_halpha.values, np.array([moment(second) for second in HALPHA], "M8[ns]")
        )
        assert "ca8542_interpolated" in dataset.coords

    def test_the_first_time_keeps_its_own(self, interpolated, tmp_path):
        """As without the option."""
        ingest([interpolated[0]], tmp_path / "plain.zarr", call="")
        plain, dataset = open_observation(tmp_path / "plain.zarr"), open_observation(interpolated[1])
        np.testing.assert_array_equal(dataset.ca8542[0], plain.ca8542[0])
        np.testing.assert_array_equal(dataset.halpha, plain.halpha)
        assert not plain.ca8542_interpolated.values.any()
        for name in ("shift_y", "shift_x", "shift_applied"):
            np.testing.assert_array_equal(dataset[name], plain[name])
        assert "interpolated to H-alpha's time in 3 of 4 scans" in interpolated[2].summary()
        assert interpolated[2].interpolated == (False, True, True, True)

    def test_nothing_is_left_of_the_lag(self, interpolated):
        """A straight line has no second difference: nothing changed, but where the lag remains."""
        change = open_observation(interpolated[1]).change_between_lines.values[:, 8:-8, 8:-8]
        assert (change[0] > CHANGED).mean() > 0.05
        assert np.isfinite(change[1:]).all()
        assert change[1:].max() < 0.4 * CHANGED

    def test_the_departure_from_a_straight_line_is_its_change(self, bright, tmp_path):
        """A flash in one scan of Ca II: what is between it and its neighbours is flagged."""

        def flash(second):
            return 2.0 if second == CA8542[2] else 0.5

        write_series(tmp_path, bright, flash, [*HALPHA, 46.0], [*CA8542, 51.0])
        ingest([tmp_path], tmp_path / "obs.zarr", call="", common_time=True)
        change = open_observation(tmp_path / "obs.zarr").change_between_lines.values[:, 8:-8, 8:-8]
        flagged = [(one > CHANGED).mean() for one in change]
        # the third time lies between the second scan and the flash, the fourth between it and the next
        assert flagged[2] > 0.1
        assert flagged[3] > 0.1
        # of the second time's three points the last one is the flash; the first time keeps its own, steady
        assert flagged[1] > 0.02
        assert flagged[0] == 0.0

    def test_resumes_and_knows_the_option(self, interpolated, tmp_path, monkeypatch):
        folder, output, _ = interpolated
        again = ingest([folder], output, call="again", common_time=True)
        assert again.complete_before
        with pytest.raises(MisuseError, match="with --common-time, now otherwise"):
            ingest([folder], output, call="")
        work = pipeline.ingest.ingest_pair

        done = []

        def stop(task):
            if task.time == 2:
                raise KeyboardInterrupt
            return work(task)

        def counted(task):
            done.append(task.time)
            return work(task)

        # what was begun without the option is no use with it
        for common_time in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr("pipeline.ingest.ingest_pair", stop)
                with pytest.raises(KeyboardInterrupt):
                    ingest([folder], tmp_path / "obs.zarr", call="a test", common_time=common_time)
        monkeypatch.setattr("pipeline.ingest.ingest_pair", counted)
        assert ingest([folder], tmp_path / "obs.zarr", call="a test", common_time=True).resumed == 2
        assert done == [2, 3]
        xr.testing.assert_identical(xr.open_zarr(tmp_path / "obs.zarr").load(), xr.open_zarr(output).load())

    @pytest.mark.usefixtures("processes")
    def test_through_dask_and_into_a_bucket(self, interpolated, tmp_path):
        """The same bytes, with numbers of what changed in them."""
        folder, output, _ = interpolated
        bucket = "memory://common-time/obs.zarr"
        with (
            dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            ingest([folder], tmp_path / "obs.zarr", cluster=client, call="a test", common_time=True)
        ingest([folder], bucket, call="a test", common_time=True)
        undisturbed = contents(output)
        assert sum(name.startswith("change_between_lines/c/") for name in undisturbed) == len(HALPHA)
        for store in (tmp_path / "obs.zarr", bucket):
            assert contents(store) == undisturbed

    def test_cavity_maps_are_interpolated_with_it(self, bright, tmp_path):
        """Each Ca II scan has cavity errors of its own, displaced with it: those of H-alpha's time result."""
        y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
        midnight = (START - np.datetime64(DAY, "ms")) / np.timedelta64(1, "s")

        def errors(second, move=(0.0, 0.0)):
            """Angstrom, of the pixels that are moved by `move` to where H-alpha has them."""
            return 1e-4 * (y + move[0]) - 2e-4 * (x + move[1]) + 1e-3 * second

        for line, seconds, axis in (
            ("halpha", HALPHA, WAVELENGTH_HALPHA),
            ("ca8542", CA8542, WAVELENGTH_CA8542),
        ):
            moves = MOVES if line == "ca8542" else [(0.0, 0.0)] * len(seconds)
            rng = np.random.default_rng(3)
            cubes = []
            for second, move in zip(seconds, moves, strict=False):
                cube = bright(linear(second))[line == "ca8542"]
                seen = np.stack([displace(image, -move[0], -move[1]) for image in cube])
                cubes.append(seen + 0.2 * np.sqrt(np.maximum(seen, 1.0)) * rng.standard_normal(seen.shape))
            write_sstred(
                tmp_path / f"{line}.fits",
                1e-12 * np.maximum(cubes, 1.0)[:, None],
                vacuum_to_air(axis),
                midnight + np.repeat(np.array(seconds)[:, None], len(axis), axis=1),
                cavity=[errors(*one) for one in zip(seconds, moves, strict=False)]
                if line == "ca8542"
                else None,
            )
        ingest([tmp_path], tmp_path / "obs.zarr", call="", common_time=True)
        dataset = open_observation(tmp_path / "obs.zarr").load()
        assert dataset.ca8542_interpolated.values.tolist() == [False, True, True, True]
        for time, second in enumerate([CA8542[0], *HALPHA[1:]]):
            away = dataset.wavelength_shift_ca8542.values[time] - 1.000275 * errors(second)
            # what is a tenth of a pixel off is off by a tenth of the gradient
            assert np.abs(away[INNER]).max() < 3e-5
            truth = np.moveaxis(bright(linear(second))[1], 0, -1)[INNER]
            ratio = dataset.ca8542.values[time][INNER] / truth
            assert np.std(ratio / np.median(ratio, axis=(0, 1))) < 0.02

    def test_bad_numbers_of_either_scan_are_flagged(self, interpolated, tmp_path):
        """What one scan has, the time has, as if it were that scan."""
        for path in interpolated[0].glob("*.fits"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        for second, (y, x), value in ((16.5, (40, 50), 0), (28.0, (50, 60), -3), (5.0, (30, 62), 20000)):
            with fits.open(tmp_path / f"ca8542_{second:07.3f}.fits", mode="update") as hdus:
                hdus[0].data[6, y, x] = value
        ingest([tmp_path], tmp_path / "obs.zarr", call="", common_time=True)
        dataset = open_observation(tmp_path / "obs.zarr").load()
        place = [(40 + 1, 50 + 1), (50 - 3, 60), (30 + 2, 62 - 1)]  # as the scans are moved
        intensity = dataset.ca8542.values[..., 6]
        for time, (none, negative) in enumerate([(False, False), (True, False), (True, True), (False, True)]):
            assert bool(intensity[time][place[0]] == 0.0) == none
            assert bool(intensity[time][place[1]] == -3.0) == negative
        spikes = dataset.defects.values[:, place[2][0], place[2][1]] & Defect.SPIKE
        assert spikes.tolist() == [Defect.SPIKE, Defect.SPIKE, 0, 0]
        assert np.count_nonzero(dataset.defects) == 2
        for time in (1, 2):
            line = {"ca8542": dataset.ca8542.values[time]}
            quality = judge(line, dataset.valid.values[time], {"ca8542": np.inf})
            assert np.count_nonzero(quality[INNER]) == 1 + (time == 2)

    def test_uncertain_displacement(self, bright, tmp_path, caplog):
        """A scan that does not fit H-alpha's serves no other time either."""
        write_series(tmp_path, bright, linear)
        rng = np.random.default_rng(1)
        unlike = rng.uniform(1000.0, 2000.0, (25, *SHAPE))
        write_fchroma(
            tmp_path / "ca8542_016.500.fits",
            unlike,
            WAVELENGTH_CA8542,
            moment(16.5),
            start=START,
            overwrite=True,
        )
        ingest([tmp_path], tmp_path / "obs.zarr", call="", common_time=True)
        dataset = open_observation(tmp_path / "obs.zarr")
        assert dataset.ca8542_interpolated.values.tolist() == [False, False, False, True]
        said = "halpha_000.000.fits: Ca II is not interpolated to its time: there is no Ca II scan before"
        assert said in caplog.text
        assert caplog.text.count("the displacement of a Ca II scan around it is not certain") == 2

    def test_a_scan_without_a_partner_serves(self, bright, tmp_path):
        """The first time lies between its own scan and one whose H-alpha is missing."""
        write_series(tmp_path, bright, linear, HALPHA[1:], CA8542)
        report = ingest([tmp_path], tmp_path / "obs.zarr", call="", common_time=True)
        dataset = open_observation(tmp_path / "obs.zarr").load()
        assert dataset.ca8542_interpolated.values.all()
        assert [str(path).endswith("ca8542_005.000.fits") for path in dataset.attrs["made_from"]].count(
            True
        ) == 1
        assert len(report.unpaired) == 1
        truth = np.moveaxis(bright(linear(HALPHA[1]))[1], 0, -1)[INNER]
        stored = dataset.ca8542[0].values[INNER]
        assert abs((stored - truth).mean()) < 0.002 * truth.mean()
        assert ingest([tmp_path], tmp_path / "obs.zarr", call="", common_time=True).complete_before


class TestOthers:
    def pairs(self, halpha, ca8542):
        return [
            Pair(scan_of("halpha", one), scan_of("ca8542", other))
            for one, other in zip(halpha, ca8542, strict=True)
        ]

    def seconds(self, others):
        return [other.scan and float(other.scan.path.split()[1]) for other in others]

    def test_the_one_on_the_other_side(self):
        pairs = self.pairs([10.0, 20.0, 30.0, 40.0], [12.0, 17.0, 30.0, 43.0])
        others = other_scans(pairs, [])
        assert self.seconds(others) == [None, 30.0, None, 30.0]
        assert others[0].refused
        assert not others[2].refused  # it is of one time as it is
        assert share_of_other(pairs[1], others[1].scan) == pytest.approx(3.0 / 13.0)
        assert share_of_other(pairs[3], others[3].scan) == pytest.approx(3.0 / 13.0)

    def test_gaps(self):
        halpha = [10.0, 20.0, 30.0, 60.0, 70.0]
        others = other_scans(self.pairs(halpha, np.add(halpha, 3.0)), [])
        assert self.seconds(others) == [None, 13.0, 23.0, None, 63.0]
        assert others[3].refused == "the Ca II scans around it are 30.0 s apart"

    def test_scans_without_a_partner(self):
        pairs = self.pairs([20.0, 30.0], [23.0, 33.0])
        spare = [scan_of("ca8542", 13.0), scan_of("halpha", 11.0), scan_of("ca8542", 15.0, shape=(80, 110))]
        assert self.seconds(other_scans(pairs, spare)) == [13.0, 23.0]


def test_between_blocks():
    own = np.array([[[1.0, np.nan, -1.0, 50.0, 2.0, 0.0]]], np.float32)
    other = np.array([[[3.0, 5.0, 2.0, 1.0, np.inf, 99.0]]], np.float32)
    found = between(own, other, 0.25, 40.0)
    np.testing.assert_array_equal(found, np.array([[[1.5, np.nan, -1.0, 50.0, np.nan, 0.0]]], np.float32))
