"""Alignment along time: known displacements of scenes that change, and links whose sums are known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import xarray as xr
from astropy.wcs import WCS
from scipy import ndimage
from typer.testing import CliRunner

from pipeline import ingest as engine
from pipeline.alignment import LARGEST_TURN, Link, links_of, positions
from pipeline.cli import app
from pipeline.crisp.fchroma import file_name, write_fchroma
from pipeline.crisp.wavelengths import vacuum_to_air
from pipeline.errors import MisuseError
from pipeline.figures import alignment_figure
from pipeline.ingest import ingest
from pipeline.motion import REGIONS, find_motion
from pipeline.observation import fits_headers, open_observation
from tests.fchroma_files import (
    BETWEEN_LINES,
    CADENCE,
    START,
    WAVELENGTH_CA8542,
    WAVELENGTH_HALPHA,
    displace,
    scene,
    smooth_noise,
)
from tests.known_series import COUNT, per_frequency
from tests.sstred_files import DAY, write_sstred

SHAPE = (110, 130)
MARGIN = 30
AXES = {"halpha": WAVELENGTH_HALPHA, "ca8542": WAVELENGTH_CA8542}
REST = 6564.61
TRACK = np.array([(0.0, 0.0), (1.3, -0.8), (2.9, -2.2), (2.4, -3.9), (5.6, -3.1), (7.7, -6.4)])
"""Pixels (y, x) by which the telescope has the scene displaced in each scan."""
LINES_APART = (2.6, -1.3)
RUINED = 3


@cache
def wide_scene(time: int) -> tuple[np.ndarray, np.ndarray]:
    """The Sun around the field: a tenth of the granules is new with each scan, ribbons brighten tenfold."""
    wide = (SHAPE[0] + 2 * MARGIN, SHAPE[1] + 2 * MARGIN)
    brightness = 0.3 * 10.0 ** (time / (len(TRACK) - 1))
    old, new = (scene(np.random.default_rng(seed), wide, brightness) for seed in (5, 6))
    share = 0.1 * time
    cubes = tuple((1.0 - share) * one + share * other for one, other in zip(old, new, strict=True))
    for cube in cubes:
        cube.flags.writeable = False
    return cubes


def seen(cube: np.ndarray, displacement: tuple[float, float], angle: float = 0.0) -> np.ndarray:
    """The field's part of a wide scene that the telescope has turned and then displaced."""
    inside = (slice(MARGIN, MARGIN + SHAPE[0]), slice(MARGIN, MARGIN + SHAPE[1]))
    turned = [turn(image, angle) if angle else image for image in cube]
    return np.stack([displace(image, *displacement)[inside] for image in turned])


def turn(image: np.ndarray, angle: float) -> np.ndarray:
    """Turn an image counterclockwise, where y points up, about its middle."""
    # scipy's angle is the other way round where the first axis points up.
    return ndimage.rotate(image, -angle, reshape=False, order=5, mode="grid-wrap")


def noisy(cube: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.maximum(cube + np.sqrt(np.maximum(cube, 1.0)) * rng.standard_normal(cube.shape), 1.0)


TURNS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Degrees by which a telescope that turns the field has the scene turned in each scan."""


def taken(time: int, line: str, cube: np.ndarray, rng, turns=None, jump=None) -> np.ndarray:
    """A scan as the detector has it."""
    place = TRACK[time] + (np.array(jump[1]) if jump and time >= jump[0] else 0.0)
    own = place - (np.array(LINES_APART) if line == "ca8542" else 0.0)
    return noisy(seen(cube, tuple(own), turns[time] if turns else 0.0), rng)


def write_series(folder, ruined=(), jump=None, turns=None, pointing=None):
    rng = np.random.default_rng(11)
    for time in range(len(TRACK)):
        for line, cube in zip(AXES, wide_scene(time), strict=True):
            image = taken(time, line, cube, rng, turns, jump)
            if time in ruined and line == "halpha":
                image = noisy(np.full_like(image, 2000.0), rng)
            moment = START + time * CADENCE + (0 if line == "halpha" else BETWEEN_LINES)
            said = {} if pointing is None else {"pointing": pointing[time]}
            write_fchroma(folder / file_name(line, START, time), image, AXES[line], moment, **said)
    return folder


def where(point: np.ndarray, time: int) -> np.ndarray:
    """Pixel (y, x) of a scan with `TURNS` at which a pixel of the scene without them is seen."""
    middle = (np.array(SHAPE) - 1) / 2.0
    (y, x), angle = point - middle, np.radians(TURNS[time])
    turned = np.array([np.cos(angle) * y + np.sin(angle) * x, np.cos(angle) * x - np.sin(angle) * y])
    return turned + middle + TRACK[time]


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    return write_series(tmp_path_factory.mktemp("series"))


@pytest.fixture(scope="module")
def aligned(series, tmp_path_factory):
    path = tmp_path_factory.mktemp("aligned") / "obs.zarr"
    report = ingest([series], path, call="test", align_series=True)
    return path, report


def test_all_times_are_found_to_a_tenth_of_a_pixel_whatever_the_ribbons_do(aligned):
    path, report = aligned
    with open_observation(path) as observation:
        found = np.stack([observation.series_shift_y.values, observation.series_shift_x.values], axis=1)
        assert np.abs(found + TRACK).max() < 0.1
        assert observation.series_aligned.values.all()
        assert observation.shift_applied.values.all()
        assert (observation.series_residual.values < 0.1).all()
        assert (observation.series_confidence.values >= 0.6).all()
        assert observation.attrs["series_alignment"]["largest_jump_pixels"] == 40.0
    assert "aligned along time in 6 of 6 scans" in report.summary()


def test_both_lines_of_all_times_show_the_scene_where_the_first_does(aligned):
    with open_observation(aligned[0]) as observation:
        for time in range(len(TRACK)):
            here = observation.isel(time=time)
            valid = ndimage.binary_erosion(here.valid.values, iterations=3)
            assert 0.75 < valid.mean() < 1.0 or time == 0
            for line, cube in zip(AXES, wide_scene(time), strict=True):
                expected = np.moveaxis(seen(cube, (0.0, 0.0)), 0, -1)[valid]
                error = (here[line].values[valid] - expected) / np.sqrt(expected)
                # Photon noise, which splines make smoother, and what a hundredth of a pixel is off.
                assert np.sqrt(np.mean(error**2)) < 1.3
                assert abs(np.mean(error)) < 0.05


def test_pointing_is_that_of_each_header_for_the_frame_as_it_was_moved(series, aligned, tmp_path):
    ingest([series], tmp_path / "plain.zarr", call="test")
    with open_observation(tmp_path / "plain.zarr") as plain, open_observation(aligned[0]) as observation:
        assert "series_aligned" not in plain
        # All headers point at one place, so a scene moved up shows at a pixel what lies lower by its header.
        for axis, name in enumerate(("latitude", "longitude")):
            moved = (observation[f"pointing_{name}"] - plain[f"pointing_{name}"]).values
            np.testing.assert_allclose(moved, 0.057 * TRACK[:, axis], atol=0.01)
        np.testing.assert_array_equal(observation.longitude, plain.longitude)
        assert np.abs(observation.mu.values - plain.mu.values).max() < 1e-3


def test_a_ruined_scan_is_flagged_and_bridged(tmp_path, capsys):
    write_series(tmp_path, ruined=(RUINED,))
    report = ingest([tmp_path], tmp_path / "obs.zarr", call="test", align_series=True)
    known = [position.known for position in report.positions]
    assert known == [time != RUINED for time in range(len(TRACK))]
    assert "confidence of only" in report.positions[RUINED].refused
    assert "in 5 of 6 scans" in report.summary()
    with open_observation(tmp_path / "obs.zarr") as observation:
        found = np.stack([observation.series_shift_y.values, observation.series_shift_x.values], axis=1)
        assert np.isnan(found[RUINED]).all()
        assert np.abs(np.delete(found + TRACK, RUINED, axis=0)).max() < 0.15
        np.testing.assert_array_equal(observation.series_aligned, known)


def test_a_jump_is_refused_and_the_smaller_part_stays(tmp_path):
    write_series(tmp_path, jump=(4, (11.0, -9.0)))
    report = ingest([tmp_path], tmp_path / "obs.zarr", call="test", align_series=True, largest_jump=10.0)
    assert [position.known for position in report.positions] == [True] * 4 + [False] * 2
    assert "jump of" in report.positions[4].refused
    assert "more than 10" in report.positions[4].refused
    with open_observation(tmp_path / "obs.zarr") as observation:
        later = observation.isel(time=4)
        own = noisy(seen(wide_scene(4)[0], tuple(TRACK[4] + (11.0, -9.0))), np.random.default_rng(0))
        # As it was in its file: not moved at all.
        error = (later.halpha.values - np.moveaxis(own, 0, -1)) / np.sqrt(np.moveaxis(own, 0, -1))
        assert np.sqrt(np.mean(error**2)) < 2.0
    with pytest.raises(MisuseError, match="made from other files, or otherwise") as refusal:
        ingest([tmp_path / "*.fits"], tmp_path / "obs.zarr", call="test")
    assert "without --align-series" in str(refusal.value.found)


def test_links_are_not_searched_for_twice(series, aligned, tmp_path, monkeypatch):
    class Interrupted(Exception):
        """The command is killed before any pair is written."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "ingest_pair", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ingest([series], tmp_path / "obs.zarr", call="test", align_series=True)
    monkeypatch.undo()
    monkeypatch.setattr(engine, "find_link", interrupt)
    ingest([series], tmp_path / "obs.zarr", call="test", align_series=True)
    with open_observation(tmp_path / "obs.zarr") as resumed, open_observation(aligned[0]) as undisturbed:
        xr.testing.assert_identical(resumed.drop_attrs().load(), undisturbed.drop_attrs().load())


FEATURE = np.array([40.0, 90.0])
"""Pixel (y, x) of something on the Sun that all headers have at one place."""


@pytest.fixture(scope="module")
def turning_series(tmp_path_factory):
    """The header of each scan points such that the feature has the first one's coordinates."""
    steps = [(where(FEATURE, time) - FEATURE)[::-1] for time in range(len(TRACK))]
    pointing = [tuple(np.array((-729.826, -313.432)) - 0.057 * step) for step in steps]
    folder = tmp_path_factory.mktemp("turning")
    return write_series(folder, turns=TURNS, pointing=pointing)


@pytest.fixture(scope="module", params=[False, True], ids=["own times", "common time"])
def turned_back(request, turning_series, tmp_path_factory):
    path = tmp_path_factory.mktemp("turned") / "obs.zarr"
    report = ingest([turning_series], path, call="test", align_series=True, common_time=request.param)
    with open_observation(path) as observation:
        yield report, observation


def check_turned_back(observation: xr.Dataset) -> None:
    assert observation.attrs["series_alignment"]["turned"]
    assert observation.series_aligned.values.all()
    assert observation.series_turn.attrs["units"] == "degree"
    np.testing.assert_allclose(observation.series_turn, np.negative(TURNS), atol=0.1)
    middle = (np.array(SHAPE) - 1) / 2.0
    for time in range(len(TRACK)):
        here = observation.isel(time=time)
        # What was at the scan's middle goes to where the scene without turns has it.
        found = np.array([float(here.series_shift_y), float(here.series_shift_x)])
        np.testing.assert_allclose(where(middle + found, time), middle, atol=0.12)
        valid = ndimage.binary_erosion(here.valid.values, iterations=3)
        assert valid.mean() > 0.75
        for line, cube in zip(AXES, wide_scene(time), strict=True):
            if line == "ca8542" and bool(here.ca8542_interpolated):
                share = BETWEEN_LINES / CADENCE
                cube = (1.0 - share) * cube + share * wide_scene(time - 1)[1]
            expected = np.moveaxis(seen(cube, (0.0, 0.0)), 0, -1)[valid]
            error = (here[line].values[valid] - expected) / np.sqrt(expected)
            assert np.sqrt(np.mean(error**2)) < 1.4, (time, line)
            assert abs(np.mean(error)) < 0.05


def test_a_field_that_turns_is_turned_back_in_both_lines(turned_back):
    report, observation = turned_back
    check_turned_back(observation)
    most = float(np.abs(observation.series_turn).max())
    assert f"and turned by up to {most:.2f} degrees" in report.summary()
    assert observation.ca8542_interpolated.values[1:].all() == bool(report.interpolated)


def test_a_turned_field_is_valid_where_both_scans_saw_it_and_its_surroundings(turned_back):
    _, observation = turned_back
    point = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1).reshape(-1, 2)
    for time in (1, len(TRACK) - 1):
        inside = np.ones(len(point), dtype=bool)
        # Of Ca II interpolated in time two scans count, of which the earlier one was displaced otherwise.
        if observation.ca8542_interpolated[time]:
            continue
        pixels = np.array([where(one.astype(float), time) for one in point])
        for offset in ((0.0, 0.0), np.negative(LINES_APART)):
            there = pixels + offset
            # Splines take pixels from both sides.
            inside &= ((there > 1.5) & (there < np.array(SHAPE) - 2.5)).all(axis=1)
        differs = inside.reshape(SHAPE) != observation.valid.values[time]
        assert differs.mean() < 0.005  # at the very edge a tenth of a pixel decides


def test_a_feature_keeps_its_coordinates_when_headers_follow_it(turned_back):
    _, observation = turned_back
    y, x = FEATURE
    # Degrees, the first scan's as its header has them.
    header = fits_headers(observation, "halpha", 0)[0]
    first = WCS(header).celestial.wcs_pix2world([[x, y]], 0)[0]
    for time in range(len(TRACK)):
        here = observation.isel(time=time).flarefield.wcs.wcs_pix2world([[x, y]], 0)[0]
        assert np.abs(3600.0 * ((here - first + 180.0) % 360.0 - 180.0)).max() < 0.1


def test_two_files_of_many_scans_are_turned_back_too(tmp_path):
    rng = np.random.default_rng(12)
    for line, axis in AXES.items():
        cubes = [
            taken(time, line, wide_scene(time)[list(AXES).index(line)], rng, TURNS)
            for time in range(len(TRACK))
        ]
        first = (START - np.datetime64(DAY, "ms")) / np.timedelta64(1, "s")
        delay = 0.0 if line == "halpha" else BETWEEN_LINES / np.timedelta64(1, "s")
        middle = first + delay + np.arange(len(TRACK)) * (CADENCE / np.timedelta64(1, "s"))
        moments = middle[:, None] + 0.2 * (np.arange(len(axis)) - (len(axis) - 1) / 2)
        write_sstred(
            tmp_path / f"nb_{line}_im.fits",
            np.stack(cubes)[:, None] * per_frequency(line),
            vacuum_to_air(axis),
            moments,
            padding="nan",
        )
    ingest([tmp_path], tmp_path / "obs.zarr", call="test", align_series=True)
    with open_observation(tmp_path / "obs.zarr") as observation:
        scaled = observation.load().copy()
        for line in AXES:
            scaled[line] = observation[line] / COUNT
        check_turned_back(scaled)


def independent(rng: np.random.Generator, error: float) -> np.ndarray:
    """What (y, x, turn) become more without each region, where each of them has this standard error."""
    return error / np.sqrt(REGIONS - 1) * rng.standard_normal((REGIONS, 3))


def walk(rng: np.random.Generator, times: int, error: float) -> np.ndarray:
    """The same for each time against the first, where granules walk by this error from each to the next."""
    steps = [independent(rng, error) for _ in range(times - 1)]
    return np.concatenate((np.zeros((1, REGIONS, 3)), np.cumsum(steps, axis=0)))


@pytest.mark.parametrize("seed", range(3))
def test_noise_does_not_turn_a_series(seed):
    rng = np.random.default_rng(seed)
    turns = 0.05 * np.cumsum(rng.standard_normal(60))
    without = walk(rng, 60, 0.05)
    found = [
        Link(first, second, 0.0, 0.0, 0.9, turns[second] - turns[first], without[second] - without[first])
        for first, second in links_of(60)
    ]
    placed = positions(60, found, corner=68.0)
    assert not placed[0].turned
    assert placed[59].shift.turn == 0.0
    # The same turns, if they are known ten times as well.
    known = [replace(link, without=0.1 * link.without) for link in found]
    placed = positions(60, known, corner=68.0)
    assert placed[0].turned
    np.testing.assert_allclose([position.shift.turn for position in placed], turns - turns[0], atol=1e-6)
    assert placed[59].turn_error == pytest.approx(0.005 * np.sqrt(59), rel=0.5)


def test_a_turned_field_is_told_from_one_that_is_displaced():
    rng = np.random.default_rng(3)
    field = (np.ones((150, 170), dtype=bool),) * 2
    cube = wide_scene(0)[0]
    for angle in (0.0, 0.6, -0.4, 2.0):
        turned = np.stack([turn(image, angle) for image in cube])
        pair = tuple(noisy(one, rng)[:, 10:160, 10:180] for one in (cube, turned))
        found = find_motion(pair, (WAVELENGTH_HALPHA,) * 2, (REST,) * 2, field)
        shift = found.shift
        assert shift.applied
        # What brings it back is the opposite turn, about the middle of another frame than the scene's.
        assert abs(shift.turn + angle) < 0.02
        assert found.turn_error < 0.02
        link = Link(0, 1, shift.y, shift.x, 1.0, shift.turn, found.without)
        refusal = link.refusal(40.0)
        assert (refusal is None) == (abs(angle) < LARGEST_TURN)
        assert refusal is None or "turned" in refusal


THREE = np.array([REST - 1.3, REST, REST + 1.3])


def found_between(wings: list[np.ndarray], rng: np.random.Generator, by: tuple[float, float]) -> np.ndarray:
    """Where the granules of the second of two wide scenes are found, which is displaced by some pixels."""
    inside = (slice(16, -16),) * 2
    cubes = [
        noisy(np.stack([displace(wing, *place)[inside]] * 3), rng)
        for wing, place in zip(wings, ((0.0, 0.0), by), strict=True)
    ]
    field = (np.ones(cubes[0].shape[1:], dtype=bool),) * 2
    shift = find_motion((cubes[0], cubes[1]), (THREE,) * 2, (REST,) * 2, field).shift
    return -np.array([shift.y, shift.x])


def test_neither_the_frame_nor_a_ribbon_that_moves_pulls_at_the_granules():
    off_by_edge, off_by_ribbon = [], []
    rows = np.mgrid[:128, :128][0]
    for seed in range(12):
        rng = np.random.default_rng(seed)
        granules = 1.0 + 0.07 * smooth_noise(rng, (128, 128), 3.5)
        ribbons = [np.exp(-(((rows - crest) / 4.0) ** 2)) for crest in (60.0, 61.0)]
        place = np.array([3.0, -2.4])
        off_by_edge.append(
            (found_between([2800.0 * granules] * 2, rng, place) - place) @ place / (place @ place)
        )
        wings = [2800.0 * (granules + ribbon) for ribbon in ribbons]
        off_by_ribbon.append(found_between(wings, rng, (0.0, 0.0))[0])
    # An edge that takes part shortens displacements by 1 %, and a ribbon's skirts show 4 % of its motion.
    assert abs(np.mean(off_by_edge)) < 0.005
    assert abs(np.mean(off_by_ribbon)) < 0.02


def flaring(times: int, side: int, wing: float, rng: np.random.Generator, stays: float, life: float = 26.0):
    """An active region under a wandering telescope, scan by scan, and where the telescope has it.

    A share of its granulation's power stays, the rest lives for some scans (26: five minutes). A ribbon moves
    by half a pixel a scan and brightens tenfold, in the core, and in the wings by a share of that.
    """
    around = 16
    wide, inside = (side + 2 * around,) * 2, (slice(around, -around),) * 2
    keep = np.exp(-1.0 / life)
    staying, granules = smooth_noise(rng, wide, 3.0), smooth_noise(rng, wide, 3.5)
    fibrils, knots = smooth_noise(rng, wide, 2.5), smooth_noise(rng, wide, 2.5)
    rows, columns = np.mgrid[: wide[0], : wide[1]]
    track = np.zeros(2)
    for time in range(times):
        crest = 0.4 * side + 0.5 * time + 4.0 * np.sin(columns / 9.0)
        ribbon = np.exp(-(((rows - crest) / 4.0) ** 2))
        ribbon *= (
            0.5 * 10.0 ** (time / (times - 1)) * np.maximum(1.0 + 0.3 * displace(knots, 0.5 * time, 0.0), 0.0)
        )
        granulation = np.sqrt(stays) * staying + np.sqrt(1.0 - stays) * granules
        wings = 2800.0 * (1.0 + 0.07 * granulation + wing * ribbon)
        core = 900.0 * (1.0 + 0.15 * fibrils + 2.5 * ribbon)
        cube = np.stack([wings, core, 1.02 * wings])
        yield track, noisy(np.stack([displace(image, *track)[inside] for image in cube]), rng)
        track = np.clip(track + rng.normal(0.0, 0.5, 2), -8.0, 8.0)
        granules = keep * granules + np.sqrt(1.0 - keep**2) * smooth_noise(rng, wide, 3.5)
        fibrils = keep * fibrils + np.sqrt(1.0 - keep**2) * smooth_noise(rng, wide, 2.5)


def placed_by_scans(cubes, side: int):
    """Positions of scans at `THREE` wavelengths."""
    field = (np.ones((side, side), dtype=bool),) * 2
    found = []
    for first, second in links_of(len(cubes)):
        motion = find_motion((cubes[first], cubes[second]), (THREE,) * 2, (REST,) * 2, field)
        shift = motion.shift
        found.append(Link(first, second, shift.y, shift.x, shift.confidence, shift.turn, motion.without))
    return positions(len(cubes), found, corner=0.5 * np.hypot(side, side))


@pytest.mark.parametrize(("side", "wing"), [(96, 0.0), (96, 0.3), (120, 0.1)])
def test_a_ribbon_that_moves_and_brightens_does_not_take_the_series_with_it(side, wing):
    track, cubes = zip(*flaring(60, side, wing, np.random.default_rng(7), stays=0.5), strict=True)
    placed = placed_by_scans(cubes, side)
    assert not placed[0].turned
    assert all(position.known for position in placed)
    away = np.hypot(*errors(np.array(track), placed).T)
    # It moved by 30 pixels.
    assert away.max() < 0.8
    stated = np.array([position.error for position in placed])
    assert stated.max() < 0.6
    assert np.sqrt(np.mean((away[1:] / stated[1:]) ** 2)) < 2.0


@pytest.mark.parametrize("wing", [0.0, 0.3])
def test_errors_are_as_large_as_stated_where_no_granule_stays(wing):
    ratios = []
    for seed in range(4):
        scans = flaring(16, 96, wing, np.random.default_rng(seed), stays=0.0, life=8.0)
        track, cubes = zip(*scans, strict=True)
        placed = placed_by_scans(cubes, 96)
        away = np.hypot(*errors(np.array(track), placed).T)
        ratios.append(away[1:] / [position.error for position in placed[1:]])
    # Of four series: each goes off by chance, and stays off.
    assert 0.6 < np.sqrt(np.nanmean(np.square(ratios))) < 1.5


# Positions


def links(
    track: np.ndarray, rng: np.random.Generator, error: float, strides=None, stated: float | None = None
) -> list[Link]:
    """Links with independent errors along each axis, as large as stated or not."""
    return [
        Link(
            first,
            second,
            *(track[first] - track[second] + error * rng.standard_normal(2)),
            0.9,
            without=independent(rng, error if stated is None else stated),
        )
        for first, second in links_of(len(track))
        if strides is None or second - first in strides
    ]


def errors(track: np.ndarray, found) -> np.ndarray:
    return np.array([(position.y, position.x) for position in found]) + (track - track[0])


def test_errors_do_not_add_up_over_a_long_series():
    rng = np.random.default_rng(4)
    track = np.cumsum(rng.normal(0.0, 0.5, (240, 2)), axis=0)
    joined = errors(track, positions(240, links(track, rng, 0.03)))
    alone = errors(track, positions(240, links(track, rng, 0.03, strides=(1,))))
    # A walk of 239 steps of 0.03 ends 0.46 off; over 30 links of eight steps, 0.16.
    assert np.sqrt(np.mean(joined[200:] ** 2)) < 0.25
    assert np.sqrt(np.mean(joined**2)) < 0.6 * np.sqrt(np.mean(alone**2))
    exact = errors(track, positions(240, links(track, rng, 0.0)))
    np.testing.assert_allclose(exact, 0.0, atol=1e-9)


def test_a_link_that_went_wrong_is_left_out():
    rng = np.random.default_rng(5)
    track = np.cumsum(rng.normal(0.0, 0.5, (20, 2)), axis=0)
    all_links = links(track, rng, 0.02)
    wrong = next(number for number, link in enumerate(all_links) if (link.earlier, link.later) == (9, 10))
    all_links[wrong] = replace(all_links[wrong], y=all_links[wrong].y + 7.0)
    found = positions(20, all_links)
    assert np.abs(errors(track, found)).max() < 0.1
    assert all(position.residual < 0.1 for position in found)


def wrong(link: Link, by: float) -> Link:
    return replace(link, y=link.y + by)


def test_what_nothing_decides_is_not_known_and_said(caplog):
    rng = np.random.default_rng(7)
    track = np.cumsum(rng.normal(0.0, 0.5, (20, 2)), axis=0)
    good = links(track, rng, 0.02)
    # Two links lead to the last time, and one of them is wrong.
    found = positions(
        20, [wrong(link, 3.0) if (link.earlier, link.later) == (18, 19) else link for link in good]
    )
    assert [position.known for position in found] == [True] * 19 + [False]
    assert "nothing decides" in found[19].refused
    assert np.abs(errors(track, found)[:19]).max() < 0.1
    assert caplog.text.count("nothing decides") == 2
    # A link over eight scans, of which six are joined in a single chain: any of the eight may be wrong.
    ring = [link for link in good if link.later - link.earlier != 2 or link.later > 8]
    found = positions(
        20, [wrong(link, 3.0) if (link.earlier, link.later) == (3, 4) else link for link in ring]
    )
    assert [position.known for position in found] == [False] * 7 + [True] * 13
    caplog.clear()
    # Less than a pixel, but many times the errors, and three others know better.
    found = positions(
        20, [wrong(link, 0.5) if (link.earlier, link.later) == (9, 10) else link for link in good]
    )
    assert all(position.known for position in found)
    assert np.abs(errors(track, found)).max() < 0.1
    (said,) = caplog.records
    assert said.name == "flarefield"
    assert "times 9 and 10 of the series: their link is" in said.message


def test_links_that_scatter_more_than_their_errors_raise_those_of_the_positions():
    rng = np.random.default_rng(8)
    track = np.zeros((60, 2))
    honest, scattered = (
        np.array([position.error for position in positions(60, links(track, rng, error, stated=0.01))])
        for error in (0.01, 0.03)
    )
    assert np.mean(scattered[1:] / honest[1:]) == pytest.approx(3.0, rel=0.15)
    off = [errors(track, positions(60, links(track, rng, 0.03, stated=0.01))) for _ in range(30)]
    assert np.mean(
        scattered[1:] / np.sqrt(np.mean(np.sum(np.square(off), axis=2), axis=0))[1:]
    ) == pytest.approx(1.0, rel=0.15)


def test_times_that_are_known_to_more_than_a_pixel_only_are_not_moved():
    # Granules that walk by a tenth of a pixel a scan are off by a pixel after a hundred of them, and all
    # links over these walk with them: no number of links helps.
    without = walk(np.random.default_rng(9), 240, 0.1 / np.sqrt(2.0))
    drift = [
        Link(first, second, 0.1 * (second - first), 0.0, 0.9, without=without[second] - without[first])
        for first, second in links_of(240)
    ]
    found = positions(240, drift)
    expected = np.sqrt((REGIONS - 1) / REGIONS * np.sum(without[..., :2] ** 2, axis=(1, 2)))
    np.testing.assert_allclose([position.error for position in found], expected, atol=1e-9)
    assert expected[239] == pytest.approx(0.1 * np.sqrt(239), rel=0.3)
    assert [position.known for position in found] == (expected <= 1.0).tolist()
    assert not found[239].known
    assert f"standard error of {expected[239]:.1f} pixels" in found[239].refused


def test_what_no_link_holds_together_is_not_known():
    rng = np.random.default_rng(6)
    track = np.zeros((6, 2))
    broken = [
        replace(link, confidence=0.3) if link.earlier < 2 <= link.later else link
        for link in links(track, rng, 0.0)
    ]
    found = positions(6, broken)
    assert [position.known for position in found] == [False, False, True, True, True, True]
    assert (found[2].y, found[2].x) == (0.0, 0.0)
    assert "confidence of only 0.30" in found[0].refused
    assert found[0].shift.y == 0.0
    assert np.isnan(found[0].y)
    assert positions(1, [])[0].known
    assert [position.known for position in positions(2, [])] == [True, False]
    assert Link(0, 1, 0.0, 0.0, 1.0, LARGEST_TURN * 3).refusal(40.0) is not None
    assert Link(0, 1, 0.0, 0.0, 1.0).refusal(40.0) is None


# The picture


def test_the_picture_shows_both_displacements(aligned, series, tmp_path):
    with open_observation(aligned[0]) as observation:
        figure = alignment_figure(observation)
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        assert titles[:2] == [
            "Ca II against Hα: moved at 6 of 6 times",
            "Hα along the series: moved at 6 of 6 times",
        ]
        drawn = {line.get_label(): line.get_ydata() for line in figure.axes[1].lines}
        np.testing.assert_allclose(drawn["along y"], observation.series_shift_y)
        assert titles[2].startswith("Turn along the series: not turned back")
        np.testing.assert_allclose(figure.axes[2].lines[0].get_ydata(), observation.series_turn)
        lost = observation.load().copy(deep=True)
    lost["series_aligned"][:] = False
    lost["series_residual"][:] = np.nan
    assert "moved at 0 of 6" in alignment_figure(lost).axes[1].get_title(loc="left")


def test_the_command_draws_it(series, tmp_path):
    picture = tmp_path / "alignment.png"
    files = [str(series / file_name(line, START, time)) for time in range(2) for line in AXES]
    arguments = ["ingest", *files, str(tmp_path / "obs.zarr"), "--alignment-figure", str(picture)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
