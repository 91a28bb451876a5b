"""How much changed between the lines: against changes of known size, and against what only looks like one."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from scipy import ndimage

import inn
from pipeline import changes
from pipeline.changes import CHANGED, BandImages, ChangeTask, departure_weights, lag_weights
from pipeline.crisp.scan import Frame, Scan
from pipeline.storage import place
from tests.fchroma_files import (
    START,
    WAVELENGTH_CA8542,
    WAVELENGTH_HALPHA,
    displace,
    smooth_noise,
)

SHAPE = (90, 110)
CADENCE = 11.5
LAG = 5.0
AXES = {"halpha": WAVELENGTH_HALPHA, "ca8542": WAVELENGTH_CA8542}
PROFILES = {
    "halpha": 2800.0 * (1 - 0.7 * np.exp(-(((WAVELENGTH_HALPHA - 6564.61) / 0.55) ** 2))),
    "ca8542": 1900.0 * (1 - 0.7 * np.exp(-(((WAVELENGTH_CA8542 - 8544.44) / 0.30) ** 2))),
}
BANDS = {
    # the outer 30 % of each wing, and a quarter of the way around the core
    "halpha": [np.abs(WAVELENGTH_HALPHA - 6564.61) > 0.95, np.abs(WAVELENGTH_HALPHA - 6564.61) < 0.35],
    "ca8542": [np.abs(WAVELENGTH_CA8542 - 8544.44) > 0.83, np.abs(WAVELENGTH_CA8542 - 8544.44) < 0.31],
}


def scan_of(line, second=0.0, shape=SHAPE):
    return Scan(
        path=f"{line} {second}",
        format="fchroma",
        line=line,
        time=moment(second),
        wavelength=tuple(AXES[line]),
        medium="vacuum",
        medium_stated_by="format",
        shape=shape,
        units="DN",
        units_of_file="DN",
        saturation=32767.0,
        frame=Frame((0.0, 0.0), (0.0, 0.0), (0.057, 0.057), ((1.0, 0.0), (0.0, 1.0))),
    )


def moment(second):
    return START.astype("M8[ns]") + np.timedelta64(round(1000 * second), "ms")


def seconds(count, lag=LAG):
    return {"halpha": CADENCE * np.arange(count), "ca8542": CADENCE * np.arange(count) + lag}


def estimates(folder, cubes, times, scales=(1.0, 1.0), weights=None):
    """The estimate (time, y, x) from scans {line: (time, wavelength, y, x)} at times in seconds."""
    count, _, *shape = cubes["halpha"].shape
    store, images = place(folder / "obs.zarr"), place(folder / "images")
    scans = [scan_of(line, shape=tuple(shape)) for line in AXES]
    changes.lay_out_images(images, scans, count)
    zarr.open_group(store.zarr, mode="w").create_array(
        changes.NAME, shape=(count, *shape), chunks=(1, *shape), dtype="float32", fill_value=np.nan
    )
    for time in range(count):
        collected = BandImages(scans, {"halpha": 2500.0, "ca8542": 1700.0})
        for line in AXES:
            block = np.moveaxis(cubes[line][time], 0, -1).astype(np.float32)
            for left in (0, 64):  # as ingest does, in blocks
                columns = slice(left, min(left + 64, shape[1]))
                collected.add(line, block[:, columns], slice(0, shape[0]), columns)
        collected.write(images, time)
    moments = {line: np.array([moment(second) for second in times[line]]) for line in AXES}
    everything = np.ones(count, dtype=bool)
    if weights is None:
        weights = {}
        for time in range(count):
            weights[time] = {
                line: [lag_weights(moments[line], time, moments[other][time], everything)]
                for line, other in (("halpha", "ca8542"), ("ca8542", "halpha"))
            }
    task = ChangeTask(str(store), str(images), weights, dict(zip(AXES, scales, strict=True)))
    records = changes.find_changes(task)
    assert isinstance(records, list), records
    assert [record["change"] for record in records] == list(weights)
    values = zarr.open_array(store.zarr, path=changes.NAME, mode="r")[:]
    for record in records:
        found = values[record["change"]]
        assert record["known"] == np.isfinite(found).sum()
        assert record["changed"] == (found > CHANGED).sum()
    return values


def granules(seed=0):
    return 1 + 0.07 * smooth_noise(np.random.default_rng(seed), SHAPE, 2.5)


def scene(line, brightness):
    """Cube (wavelength, y, x) of a field of one profile and a brightness (y, x)."""
    return PROFILES[line][:, None, None] * brightness


@pytest.fixture(scope="module")
def patches():
    """Rates of change of a field, per second."""
    rate = np.zeros(SHAPE)
    rate[20:40, 20:50], rate[50:80, 30:60], rate[15:30, 70:100] = 0.02, -0.004, 0.05
    return ndimage.gaussian_filter(rate, 2.0)


class TestClosedForms:
    """Patches of the field brighten, all others stay."""

    def bands(self, line):
        return np.array([PROFILES[line][chosen].mean() for chosen in BANDS[line]])

    @pytest.mark.parametrize("lag", [LAG, -3.0])
    def test_linear(self, tmp_path, patches, lag):
        """The change is rate times lag of the brightest band, over the joint maximum; the ends, too."""
        times = seconds(4, lag)
        now = granules()
        cubes = {
            line: np.stack([scene(line, now * (1 + patches * second)) for second in times[line]])
            for line in AXES
        }
        found = estimates(tmp_path, cubes, times)
        for time in range(4):
            brightest = np.maximum(*(cubes[line][time].max(axis=0) for line in AXES))
            expected = max(self.bands(line).max() for line in AXES) * now * np.abs(patches * lag) / brightest
            np.testing.assert_allclose(found[time], expected, rtol=0.01, atol=1e-3)
        assert (found[0] > CHANGED).mean() > 0.05
        assert not (found[:, np.abs(patches) < 1e-4] > CHANGED).any()

    def test_of_one_line_alone(self, tmp_path, patches):
        """Either line's change is one; and what is calibrated counts as it is calibrated."""
        times, now = seconds(3), granules()
        for line, scales in (("halpha", (1.0, 1.0)), ("ca8542", (1.0, 1.0)), ("ca8542", (1.0, 2.0))):
            folder = tmp_path / f"{line} {scales}"
            folder.mkdir()
            cubes = {
                other: np.stack(
                    [scene(other, now * (1 + patches * second * (other == line))) for second in times[other]]
                )
                for other in AXES
            }
            found = estimates(folder, cubes, times, scales)
            scale = dict(zip(AXES, scales, strict=True))
            brightest = np.maximum(*(scale[other] * cubes[other][1].max(axis=0) for other in AXES))
            expected = scale[line] * self.bands(line).max() * now * np.abs(patches * LAG) / brightest
            np.testing.assert_allclose(found[1], expected, rtol=0.01, atol=1e-3)

    def test_exponential(self, tmp_path, patches):
        """Linear between the scans: Ca II backwards, H-alpha forwards, whichever is more."""
        times, now = seconds(3), granules()
        cubes = {
            line: np.stack([scene(line, now * np.exp(patches * second)) for second in times[line]])
            for line in AXES
        }
        found = estimates(tmp_path, cubes, times)[1]
        brightest = np.maximum(*(cubes[line][1].max(axis=0) for line in AXES))
        share = LAG / CADENCE
        halpha = now * np.exp(patches * CADENCE) * np.abs(np.expm1(patches * CADENCE)) * share
        ca8542 = now * np.exp(patches * (CADENCE + LAG)) * np.abs(np.expm1(-patches * CADENCE)) * share
        expected = np.maximum(self.bands("halpha").max() * halpha, self.bands("ca8542").max() * ca8542)
        np.testing.assert_allclose(found, expected / brightest, rtol=0.01, atol=1e-3)
        # what truly happened to H-alpha meanwhile, in a patch that grows by 0.02 a second: to a tenth or two
        truth = np.expm1(0.02 * LAG)
        assert found[30, 35] == pytest.approx(truth, rel=0.2)

    def test_a_flash_in_one_scan(self, tmp_path):
        """Before and after it is as it was: a derivative over both neighbours would see nothing."""
        times, now = seconds(5), granules()
        flash = np.ones((5, *SHAPE))
        flash[2, 30:60, 40:70] = 2.0
        cubes = {line: np.stack([scene(line, now * one) for one in flash]) for line in AXES}
        found = estimates(tmp_path, cubes, times)
        # H-alpha falls by half of what it is, in the share of the interval that the lag is
        assert found[2, 45, 55] == pytest.approx(0.5 * LAG / CADENCE, rel=0.05)
        assert (found[1:4, 32:58, 42:68] > CHANGED).all()
        assert not (found[[0, 4]] > CHANGED).any()
        assert not (found[:, :25] > CHANGED).any()

    def test_departure_from_a_straight_line(self, tmp_path):
        """Of a parabola, the next term of Newton's formula is all that linear interpolation is wrong by."""
        times, now = seconds(5), granules()
        curve = np.zeros(SHAPE)
        curve[30:60, 40:80] = 0.002  # per second squared
        curve = ndimage.gaussian_filter(curve, 2.0)
        middle = times["halpha"][2]
        bright = {
            line: [now * (1 + curve * (second - middle) ** 2) for second in times[line]] for line in AXES
        }
        cubes = {line: np.stack([scene(line, one) for one in bright[line]]) for line in AXES}
        moments = {line: np.array([moment(second) for second in times[line]]) for line in AXES}
        bracket = (moments["ca8542"][1], moments["ca8542"][2])
        found = departure_weights(moments["ca8542"], 2, moments["halpha"][2], bracket, np.ones(5, bool))
        assert [sorted(one) for one in found] == [[0, 1, 2], [1, 2, 3]]
        change = estimates(tmp_path, cubes, times, weights={2: {"ca8542": found}})
        share = (times["halpha"][2] - times["ca8542"][1]) / CADENCE
        interpolated = (1 - share) * bright["ca8542"][1] + share * bright["ca8542"][2]
        wrong = self.bands("ca8542").max() * np.abs(interpolated - now)
        brightest = np.maximum(*(cubes[line][2].max(axis=0) for line in AXES))
        inner = (slice(2, -2), slice(2, -2))  # beside the edge of a scan that is moved nothing is known
        np.testing.assert_allclose(change[2][inner], (wrong / brightest)[inner], rtol=0.01, atol=1e-3)
        assert change[2][inner].max() > 0.03
        assert np.isnan(change[[0, 1, 3, 4]]).all()


class TestWhatIsNoChange:
    def test_moving_granulation(self, tmp_path):
        """A field with ribbons that moves by pixels between scans, and is the same."""
        times = seconds(4)
        rows = np.arange(SHAPE[0])[:, None]
        bright = granules() + 0.8 * np.exp(-(((rows - 40.0) / 4.0) ** 2)) * granules(1)
        path = np.array([(0.0, 0.0), (1.4, -0.7), (-0.3, 0.9), (2.5, 1.2)])
        moved = [displace(bright, *step) for step in path]
        cubes = {line: np.stack([scene(line, one) for one in moved]) for line in AXES}
        found = estimates(tmp_path, cubes, times)[:, 4:-4, 4:-4]
        assert np.isfinite(found).all()
        assert found.max() < 0.3 * CHANGED
        # unless one image is brought onto the other this is what they differ by
        share = LAG / CADENCE
        unmoved = share * np.abs(moved[1] - moved[0]) / np.maximum(moved[0], moved[1])
        assert (unmoved > CHANGED).mean() > 0.05

    @pytest.mark.parametrize("noise", [0.005, 0.02])
    def test_noise(self, tmp_path, noise):
        """Photon noise up to what networks are trained with, in ribbons three times as bright, too."""
        rng = np.random.default_rng(3)
        times = seconds(3)
        bright = granules() + np.where(np.arange(SHAPE[0])[:, None] > 70, 2.0, 0.0)
        cubes = {}
        for line in AXES:
            still = scene(line, bright)
            level = noise * np.sqrt(still * PROFILES[line].max())
            cubes[line] = np.stack([still + level * rng.standard_normal(still.shape) for _ in range(3)])
        found = estimates(tmp_path, cubes, times)
        found = found[:, 2:-2, 2:-2]  # beside the edge of a scan that is moved nothing is known
        assert np.isfinite(found).all()
        assert (found == 0).mean() > 0.99
        assert found.max() < 0.5 * CHANGED

    def test_a_change_in_noise(self, tmp_path):
        rng = np.random.default_rng(4)
        times, now = seconds(3), granules()
        rate = np.zeros(SHAPE)
        rate[30:60, 40:70] = 0.02
        cubes = {}
        for line in AXES:
            still = np.stack([scene(line, now * (1 + rate * second)) for second in times[line]])
            cubes[line] = still + 0.005 * np.sqrt(still * PROFILES[line].max()) * rng.standard_normal(
                still.shape
            )
        found = estimates(tmp_path, cubes, times)[1]
        truth = 0.02 * LAG / (1 + 0.02 * CADENCE)
        assert np.median(found[32:58, 42:68]) == pytest.approx(truth, rel=0.1)
        changed = found > CHANGED
        assert changed[32:58, 42:68].mean() > 0.99
        assert not changed[:27].any()

    def test_bad_pixels(self, tmp_path):
        """What is not known of a scan is not known of its change, there and nowhere else."""
        times = seconds(3)
        still = {line: np.stack([scene(line, granules())] * 3) for line in AXES}
        still["halpha"][1, 7, 20, 30] = 40000.0
        still["ca8542"][0, 3, 40, 50] = np.nan
        still["halpha"][2, 0, 60, 70] = 0.0
        still["ca8542"][2, 5, 70, 80] = -1.0
        found = estimates(tmp_path, still, times)
        # of the scans beside it the other line says it
        assert np.isnan(found[:, 20, 30]).tolist() == [False, True, False]
        assert not np.isnan(found[1:, 40, 50]).any()
        assert np.isnan(found[1]).sum() == 1
        assert found[np.isfinite(found)].max() < 0.01


class TestMoved:
    @pytest.mark.parametrize("move", [(0.0, 0.0), (2.0, -3.0), (0.5, 0.25), (-7.3, 4.6), (120.0, 0.0)])
    def test_a_texture(self, move):
        """What the telescope resolves is moved to a tenth of a per cent of itself."""
        texture = smooth_noise(np.random.default_rng(1), SHAPE, 2.5)
        stored = np.rint(20000 + 1000 * texture).astype(np.uint16)[None]
        whole, block = (
            (changes.moved(stored, move, *part)[0] - 20000) / 1000
            for part in ((slice(0, SHAPE[0]), slice(0, SHAPE[1])), (slice(20, 52), slice(30, 90)))
        )
        np.testing.assert_array_equal(block, whole[20:52, 30:90])
        known = np.isfinite(whole)
        rows, columns = (
            max(size - int(np.ceil(abs(one))) - 3, 0) for one, size in zip(move, SHAPE, strict=True)
        )
        assert known.sum() >= rows * columns
        truth = displace(texture, *move)
        assert np.abs(whole - truth)[known].max(initial=0.0) < 0.02
        assert np.sqrt(np.mean((whole - truth)[known] ** 2)) < 0.003 if known.any() else rows == 0

    def test_what_is_not_known_stays_so(self):
        texture = np.ones((1, *SHAPE), np.uint16)
        texture[0, 40, 50] = 0
        whole = changes.moved(texture, (2.5, -1.0), slice(0, 90), slice(0, 110))[0]
        lost = np.argwhere(np.isnan(whole[6:-6, 6:-6])) + 6
        assert lost.tolist() == [[row, 49] for row in (41, 42, 43, 44)]
        assert np.nanmax(np.abs(whole - 1.0)) < 1e-6


class TestWeights:
    times = np.array([moment(second) for second in (0.0, 10.0, 20.0, 50.0, 60.0, 90.0)])
    everything = np.ones(6, dtype=bool)

    @pytest.mark.parametrize(
        ("scan", "second", "expected"),
        [
            (1, 14.0, {1: -0.4, 2: 0.4}),
            (1, 6.0, {1: -0.4, 0: 0.4}),
            (0, -3.0, {0: 0.3, 1: -0.3}),  # before the first: from the two nearest
            (2, 24.0, {2: 0.4, 1: -0.4}),  # after it is a gap of three intervals
            (4, 60.0, {}),
            (5, 91.0, None),
            (4, 63.0, {4: 0.3, 3: -0.3}),
        ],
    )
    def test_lag(self, scan, second, expected):
        found = lag_weights(self.times, scan, moment(second), self.everything)
        if expected is None:
            assert found is None
        else:
            assert found == pytest.approx(expected)

    def test_what_is_not_comparable_takes_no_part(self):
        comparable = self.everything.copy()
        comparable[2] = False
        assert lag_weights(self.times, 1, moment(14.0), comparable) == pytest.approx({1: 0.4, 0: -0.4})
        assert lag_weights(self.times, 2, moment(14.0), comparable) is None

    def test_no_interval_is_short_by_the_others(self):
        """Two scans ten minutes apart say nothing about seconds, although that is their cadence."""
        far = np.array([moment(0.0), moment(600.0)])
        assert lag_weights(far, 0, moment(5.0), np.ones(2, bool)) is None
        assert lag_weights(far[:1], 0, moment(5.0), np.ones(1, bool)) is None

    def test_departure_over_gaps(self):
        bracket = (self.times[1], self.times[2])
        for scan in (1, 2):
            (found,) = departure_weights(self.times, scan, moment(15.0), bracket, self.everything)
            # the second difference, times a half of the distances from both ends
            assert found == pytest.approx({0: -0.125, 1: 0.25, 2: -0.125})
        bracket = (self.times[3], self.times[4])
        assert departure_weights(self.times, 3, moment(55.0), bracket, self.everything) == []


def test_the_threshold_is_the_error_that_networks_expect():
    assert inn.load_model().default_calibration_error == CHANGED
