"""The field in its pad, the displacement between the lines, and resampling at the field's edges."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from inn.layout import CA8542, HALPHA
from pipeline.crisp import find_scans, open_intensity, read_scans
from pipeline.registration import (
    BANDS,
    CONFIDENT,
    Shift,
    band_images,
    field_of_view,
    find_shift,
    move_field,
    resample,
)
from tests.fchroma_files import (
    PAD,
    WAVELENGTH_CA8542,
    WAVELENGTH_HALPHA,
    displace,
    rotated_field,
    smooth_noise,
    write_pair,
)

REAL = Path(__file__).parents[2] / "shared" / "data" / "crisp"
AXES = (WAVELENGTH_HALPHA, WAVELENGTH_CA8542)
RESTS = (HALPHA.rest_wavelength, CA8542.rest_wavelength)
WHOLE = (slice(0, 60), slice(0, 70))


def cubes_of(tmp_path, **keywords):
    halpha, ca8542, truth = write_pair(tmp_path, **keywords)
    return open_intensity(read_scans(halpha)[0]), open_intensity(read_scans(ca8542)[0]), truth


def found(halpha, ca8542, fields=None):
    return find_shift(halpha, ca8542, AXES, RESTS, fields or (field_of_view(halpha), field_of_view(ca8542)))


def images_moved(*arguments, **keywords):
    """What `resample` makes, image by image."""
    return np.moveaxis(resample(*arguments, **keywords), -1, 0)


class TestFieldOfView:
    @pytest.mark.parametrize("angle", [0.0, 3.0, 17.0, 45.0, -30.0, 90.0, 178.0])
    def test_rotated_field_in_any_orientation(self, angle):
        rng = np.random.default_rng(1)
        inside = rotated_field((90, 120), angle)
        cube = np.where(inside, rng.integers(900, 3000, (15, 90, 120)), PAD).astype(">i2")
        np.testing.assert_array_equal(field_of_view(cube), inside)

    def test_field_that_touches_the_edges(self):
        # a field so large that its corners are cut: only triangles of pad are left
        rng = np.random.default_rng(1)
        inside = rotated_field((90, 120), 30.0, fill=1.1)
        assert inside[:, 0].any()
        assert not inside.all()
        cube = np.where(inside, rng.integers(900, 3000, (15, 90, 120)), PAD).astype(">i2")
        np.testing.assert_array_equal(field_of_view(cube), inside)

    def test_pad_on_one_side_only(self):
        cube = np.random.default_rng(1).integers(900, 3000, (15, 40, 50))
        cube[:, :, :2] = PAD
        np.testing.assert_array_equal(field_of_view(cube), np.arange(50) > 1 + np.zeros((40, 1)))

    def test_no_pad(self):
        cube = np.random.default_rng(1).integers(900, 3000, (15, 21, 21))
        assert field_of_view(cube).all()

    def test_pixels_of_the_sun_with_the_pads_value_stay(self):
        rng = np.random.default_rng(2)
        inside = rotated_field((60, 70), 20.0)
        cube = np.where(inside, rng.integers(PAD - 2, PAD + 3, (15, 60, 70)), PAD)  # a fifth has it anywhere
        cube[:, 30, 35] = PAD  # and one at all wavelengths, surrounded by the Sun
        np.testing.assert_array_equal(field_of_view(cube), inside)

    def test_zeros_inside_a_field_padded_with_zeros_stay(self):
        inside = rotated_field((60, 70), 20.0)
        cube = np.where(inside, np.random.default_rng(2).integers(900, 3000, (15, 60, 70)), 0)
        cube[:, 28:33, 30:36] = 0
        np.testing.assert_array_equal(field_of_view(cube), inside)

    @pytest.mark.parametrize("pad", [np.nan, 7.5, "median of each image"])
    def test_pads_of_other_kinds(self, pad):
        inside = rotated_field((60, 70), -12.0)
        cube = np.random.default_rng(2).normal(2000.0, 100.0, (15, 60, 70)).astype(np.float32)
        cube[:, ~inside] = np.median(cube, axis=(1, 2))[:, None] if isinstance(pad, str) else pad
        cube[3, 30, 30] = np.nan
        np.testing.assert_array_equal(field_of_view(cube), inside)

    def test_constant_frame_has_no_field(self):
        assert not field_of_view(np.full((15, 20, 20), 5)).any()

    def test_dead_column_is_not_a_pad(self):
        cube = np.random.default_rng(1).integers(900, 3000, (15, 40, 50))
        cube[:, :, 20] = 0
        assert field_of_view(cube).all()


class TestShift:
    @pytest.mark.parametrize(
        ("shift", "angle", "seed"),
        [
            ((0.0, 0.0), 20.0, 0),
            ((6.0, -6.0), -33.0, 1),
            ((-5.5, 0.45), 74.0, 2),
            ((2.31, 3.77), None, 3),
            ((0.25, -0.75), 5.0, 4),
        ],
    )
    def test_found_to_a_tenth_of_a_pixel(self, tmp_path, shift, angle, seed):
        halpha, ca8542, _ = cubes_of(tmp_path, shift=shift, angle=angle, seed=seed)
        result = found(halpha, ca8542)
        assert result.applied
        assert abs(result.y - shift[0]) < 0.1
        assert abs(result.x - shift[1]) < 0.1

    @pytest.mark.parametrize("keywords", [{"brightness": 0.0}, {"noise": 3.0}, {"shape": (90, 100)}])
    def test_found_in_harder_scenes(self, tmp_path, keywords):
        halpha, ca8542, _ = cubes_of(tmp_path, shift=(-3.4, 4.6), seed=5, **keywords)
        result = found(halpha, ca8542)
        assert result.applied
        assert np.hypot(result.y + 3.4, result.x - 4.6) < 0.1

    def test_bad_pixels_do_no_harm(self, tmp_path):
        halpha, ca8542, _ = cubes_of(tmp_path, shift=(1.6, -2.3), seed=6)
        fields = field_of_view(halpha), field_of_view(ca8542)
        rng = np.random.default_rng(1)
        damaged = []
        for cube in (halpha, ca8542):
            cube = cube.astype(np.float32)
            bad = rng.random(cube.shape[1:]) < 0.02
            cube[:, bad] = rng.choice([0.0, np.nan], bad.sum())
            damaged.append(cube)
        result = found(*damaged, fields)
        assert result.applied
        assert np.hypot(result.y - 1.6, result.x + 2.3) < 0.1

    def test_unrelated_images_are_not_moved(self, tmp_path):
        for seed in range(3):
            halpha, _, _ = cubes_of(tmp_path, seed=seed, number=2 * seed, brightness=0.0)
            _, ca8542, _ = cubes_of(tmp_path, seed=seed + 10, number=2 * seed + 1, brightness=0.0)
            result = found(halpha, ca8542)
            assert not result.applied
            assert result.confidence < 0.3

    @pytest.mark.parametrize("size", [3, 6, 10, 16])
    def test_fields_too_small_to_tell_are_not_moved(self, tmp_path, size):
        """Not even where both lines show the same: unrelated ones agree by chance in so few pixels."""
        halpha, ca8542, _ = cubes_of(tmp_path, shift=(0.0, 0.0), angle=None, seed=7)
        part = np.s_[:, 30 : 30 + size, 40 : 40 + size]
        assert found(halpha[part], ca8542[part]).confidence == 0.0

    def test_photon_noise_alone_convinces_nobody(self):
        rng = np.random.default_rng(1)
        result = found(rng.poisson(2000, (15, 100, 110)), rng.poisson(1500, (25, 100, 110)))
        assert not result.applied

    def test_images_without_structure(self):
        result = found(np.full((15, 40, 50), 5.0), np.full((25, 40, 50), 7.0), (np.ones((40, 50), bool),) * 2)
        assert result.confidence == 0.0
        assert not result.applied

    def test_contradicting_bands_are_not_believed(self, tmp_path):
        halpha, ca8542, _ = cubes_of(tmp_path, shift=(2.0, 1.0), angle=None, seed=7)
        ca8542 = ca8542.copy()
        core = np.abs(WAVELENGTH_CA8542 - CA8542.rest_wavelength) < 0.4
        ca8542[core] = np.roll(ca8542[core], (3, -2), (1, 2))
        result = found(halpha, ca8542)
        assert result.confidence == 0.0
        assert not result.applied

    def test_silent_wings_leave_it_to_the_core(self, tmp_path):
        halpha, ca8542, _ = cubes_of(tmp_path, shift=(2.4, 1.2), angle=None, seed=8)
        rng = np.random.default_rng(1)
        cubes = []
        for cube, axis, rest in zip((halpha, ca8542), AXES, RESTS, strict=True):
            cube = cube.copy()
            wings = np.abs(axis - rest) > 0.5
            cube[wings] = rng.poisson(2000, cube[wings].shape)
            cubes.append(cube)
        result = found(*cubes)
        assert result.applied
        assert np.hypot(result.y - 2.4, result.x - 1.2) < 0.2

    def test_bands_are_formed_alike(self):
        # a spectrum that is a function of the distance from rest in units of the axis' reach
        for axis, rest in zip(AXES, RESTS, strict=True):
            share = (axis - rest) / min(rest - axis[0], axis[-1] - rest)
            images = band_images(share[:, None, None] * np.ones((1, 2, 2)), axis, rest)
            assert tuple(images) == BANDS
            blue, core, red = (float(images[band][0, 0]) for band in BANDS)
            assert blue == pytest.approx(-0.86, abs=0.05)
            assert core == pytest.approx(0.0, abs=0.02)
            assert red == pytest.approx(0.86, abs=0.05)

    @pytest.mark.observation
    @pytest.mark.skipif(not REAL.is_dir(), reason="the real pair is not here")
    def test_real_pair_is_reported_but_not_moved(self):
        scans = {scan.line: scan for scan in find_scans([REAL])[0]}
        halpha, ca8542 = (open_intensity(scans[line]) for line in ("halpha", "ca8542"))
        assert field_of_view(halpha).all()
        assert field_of_view(ca8542).all()
        result = found(halpha, ca8542)
        # what the wings say; the cores say nothing, and 21 x 21 pixels are too few to be sure
        assert (round(result.y), abs(result.x) < 1.5) == (3, True)
        assert result.confidence < CONFIDENT


class TestResampling:
    @pytest.fixture
    def cube(self):
        rng = np.random.default_rng(3)
        return np.stack([1000.0 + 200.0 * smooth_noise(rng, (60, 70), 2.5) for _ in range(3)])

    @pytest.mark.parametrize("shift", [(2.3, -1.4), (-0.5, 0.5), (0.1, 5.9)])
    def test_is_the_cubic_spline_of_scipy(self, cube, shift):
        inner = (slice(20, 40), slice(20, 50))
        ours = images_moved(cube, np.ones((60, 70), bool), Shift(*shift, 1.0), *inner)
        theirs = np.stack([ndimage.shift(image, shift, order=3) for image in cube])[:, *inner]
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)

    def test_brings_a_displaced_scene_back(self, cube):
        moved = np.stack([displace(image, -2.3, 1.4) for image in cube])
        inner = (slice(10, 50), slice(10, 60))
        back = images_moved(moved, np.ones((60, 70), bool), Shift(2.3, -1.4, 1.0), *inner)
        assert np.abs(back - cube[:, *inner]).max() < 2.0  # of a spread of 200

    def test_blocks_fit_together(self, cube):
        field = rotated_field((60, 70), 20.0, 0.9)
        shift = Shift(-1.7, 2.6, 1.0)
        whole = images_moved(cube, field, shift, *WHOLE)
        for rows, columns in [(slice(0, 17), slice(31, 70)), (slice(17, 60), slice(0, 31))]:
            part = images_moved(cube, field, shift, rows, columns)
            np.testing.assert_allclose(part, whole[:, rows, columns], rtol=1e-6)

    @pytest.mark.parametrize("pad", [0.0, 1480.0, np.nan, 30000.0])
    def test_the_pad_neither_rings_nor_leaks(self, cube, pad):
        field = rotated_field((60, 70), 20.0, 0.9)
        shift = Shift(1.5, -2.4, 1.0)
        padded = np.where(field, cube, pad)
        result = images_moved(padded, field, shift, *WHOLE)
        np.testing.assert_array_equal(np.isfinite(result).all(axis=0), move_field(field, shift))
        # the pad's value decides nothing
        np.testing.assert_array_equal(result, images_moved(np.where(field, cube, 5.0), field, shift, *WHOLE))
        # and up to the edge the result is the scene, since nothing is extrapolated
        expected = np.stack([ndimage.shift(image, (1.5, -2.4), order=3) for image in cube])
        inside = move_field(field, shift)
        assert np.abs(result - expected)[:, inside].max() < 20.0
        deep = ndimage.binary_erosion(inside, iterations=4)
        assert np.abs(result - expected)[:, deep].max() < 1.0

    def test_a_constant_field_stays_constant_up_to_its_edge(self):
        field = rotated_field((60, 70), -35.0, 0.8)
        cube = np.where(field, 1234.0, 0.0)[None]
        result = images_moved(cube, field, Shift(0.37, -0.49, 1.0), *WHOLE)[0]
        np.testing.assert_allclose(result[np.isfinite(result)], 1234.0, rtol=1e-6)

    @pytest.mark.parametrize("value", [np.nan, 0.0, -3.0, np.inf, 32767.0])
    def test_bad_pixels_stay_bad_and_do_not_spread(self, cube, value):
        field = np.ones((60, 70), bool)
        shift = Shift(3.4, -1.3, 1.0)
        damaged = cube.copy()
        damaged[1, 30, 35] = value
        result = images_moved(damaged, field, shift, *WHOLE, saturation=32767.0)
        clean = images_moved(cube, field, shift, *WHOLE, saturation=32767.0)
        np.testing.assert_equal(result[1, 33, 34], np.float32(value))
        np.testing.assert_array_equal(result[[0, 2]], clean[[0, 2]])
        elsewhere = np.ones((60, 70), bool)
        elsewhere[33, 34] = False
        elsewhere &= move_field(field, shift)
        assert np.isfinite(result[1][elsewhere]).all()
        assert np.abs(result - clean)[1][elsewhere].max() < 60.0
        elsewhere[26:41, 27:42] = False
        assert np.abs(result - clean)[1][elsewhere].max() < 0.1

    def test_nothing_to_take_part(self, cube):
        shift = Shift(0.5, 0.5, 1.0)
        assert np.isnan(images_moved(cube, np.zeros((60, 70), bool), shift, *WHOLE)).all()
        zeros = images_moved(np.zeros_like(cube), np.ones((60, 70), bool), shift, *WHOLE)
        np.testing.assert_array_equal(zeros[:, move_field(np.ones((60, 70), bool), shift)], 0.0)

    @pytest.mark.parametrize("shift", [(2.0, -3.0), (5.6, -5.6), (0.4, 0.3), (-1.3, 4.0)])
    def test_valid_is_where_nothing_is_extrapolated(self, shift):
        rows, columns = np.mgrid[:80, :90].astype(float)
        angle = np.deg2rad(25.0)

        def inside(y, x):
            y, x = y - 39.5, x - 44.5
            return (np.abs(np.cos(angle) * x + np.sin(angle) * y) <= 30) & (
                np.abs(-np.sin(angle) * x + np.cos(angle) * y) <= 25
            )

        field = inside(rows, columns)
        moved = move_field(field, Shift(*shift, 1.0))
        exact = inside(rows - shift[0], columns - shift[1])
        assert not (moved & ~exact).any()
        assert not (ndimage.binary_erosion(exact, iterations=4) & ~moved).any()
        # The four by four pixels around a point, or the one that it is on along an axis, are in the field.
        for y, x in np.argwhere(np.ones_like(field)):
            around = []
            for place, along in zip((y, x), shift, strict=True):
                first = math.floor(place - along)
                taps = [first] if first == place - along else range(first - 1, first + 3)
                around.append(taps)
            ends = [(min(taps), max(taps)) for taps in around]
            there = all(low >= 0 and high < size for (low, high), size in zip(ends, (80, 90), strict=True))
            assert moved[y, x] == (there and field[np.ix_(*around)].all())
