"""What is wrong with scans is found, and ribbons, however bright, are not among it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from scipy import ndimage
from scipy.special import j1

from inn.layout import HALPHA
from pipeline.crisp import find_scans, open_intensity, read_scans
from pipeline.crisp.cube import IncompleteCube, PlacedCube, ScaledCube
from pipeline.crisp.headers import header_contradictions
from pipeline.defects import Defect, granulation_contrast, survey
from pipeline.errors import InputError
from pipeline.registration import field_of_view
from tests.fchroma_files import (
    WAVELENGTH_HALPHA,
    rotated_field,
    scene,
    smooth_noise,
    write_pair,
)

REAL = Path(__file__).parents[2] / "shared" / "data" / "crisp"
SHAPE = (90, 110)
WHOLE = np.ones(SHAPE, bool)


def noisy(cube, seed=0):
    """Photon noise, and whole numbers, as in files."""
    rng = np.random.default_rng(seed)
    return np.rint(cube + np.sqrt(np.maximum(cube, 1.0)) * rng.standard_normal(cube.shape)).astype(">i2")


@pytest.fixture(scope="module")
def cube():
    return noisy(scene(np.random.default_rng(3), SHAPE)[0])


def turned(angle):
    """The matrix that is ``CROTA2`` for square pixels (Calabretta & Greisen 2002); minus it, mirrored."""
    cosine, sine = float(np.cos(np.deg2rad(angle))), float(np.sin(np.deg2rad(angle)))
    return {"PC1_1": cosine, "PC1_2": -sine, "PC2_1": sine, "PC2_2": cosine}


def positions(found):
    return sorted(map(tuple, found.spikes.tolist()))


class TestSpikes:
    def test_each_is_found_and_nothing_else(self, cube):
        rng = np.random.default_rng(1)
        spoilt = cube.copy()
        hits = set()
        for _ in range(60):
            index, y, x = rng.integers(0, 15), rng.integers(2, 88), rng.integers(2, 108)
            if not any(abs(y - other[1]) < 4 and abs(x - other[2]) < 4 for other in hits):
                hits.add((int(index), int(y), int(x)))
        for index, y, x in hits:
            # twenty times the photons' noise, on ribbons and on the quiet Sun alike
            spoilt[index, y, x] += int(20 * np.sqrt(spoilt[index, y, x]) + 400)
        found = survey(spoilt, WHOLE)
        assert positions(found) == sorted(hits)
        assert not found.dead.any()
        assert next(found.sentences(WAVELENGTH_HALPHA)).startswith(f"{len(hits)} spikes")
        bits = found.defects
        assert {(y, x) for y, x in np.argwhere(bits & Defect.SPIKE)} == {hit[1:] for hit in hits}

    @pytest.mark.parametrize("kind", [">i2", "<i2", ">u2", "<u2", "<i4", ">i8", "<u4", ">f4", "<f8"])
    def test_whatever_kind_of_numbers_a_file_holds(self, cube, kind):
        spoilt = cube.copy()
        spoilt[4, 30, 40:42] += 2500
        spoilt[9, 60, 70] += 2500
        spoilt[7, 20, 90] = 1  # a pixel that dropped out
        assert cube.min() > 0
        spikes = [(4, 30, 40), (4, 30, 41), (7, 20, 90), (9, 60, 70)]
        assert positions(survey(spoilt.astype(kind), WHOLE)) == spikes

    def test_beside_what_is_not_a_number(self, cube):
        spoilt = cube.astype(np.float32)
        spoilt[9, 60, 70] += 2500
        for y, x in ((62, 70), (60, 68), (60, 72), (59, 69)):
            spoilt[9, y, x] = np.nan
        # along x there is a structure as high, so that only y tells
        spoilt[9, 60, 71] = spoilt[9, 60, 70]
        assert (9, 60, 70) in positions(survey(spoilt, WHOLE))

    def test_tracks_along_an_axis(self, cube):
        spoilt = cube.copy()
        spoilt[4, 30, 40:43] += 2500
        spoilt[9, 60:62, 70] += 2500
        expected = [(4, 30, 40), (4, 30, 41), (4, 30, 42), (9, 60, 70), (9, 61, 70)]
        assert positions(survey(spoilt, WHOLE)) == expected

    def test_tracks_two_pixels_wide(self, cube):
        """Full and uneven blocks, corners, diagonals: all of each, and nothing beside it."""
        spoilt = cube.copy()
        tracks = [
            {(0, 0): 2500, (0, 1): 2500, (1, 0): 2500, (1, 1): 2500},
            {(0, 0): 5000, (0, 1): 2500, (1, 0): 2000, (1, 1): 1800},
            {(0, 0): 2500, (0, 1): 2500, (1, 1): 2500},
            {(0, 0): 2500, (1, 1): 2500},
            {(0, 0): 2500, (0, 1): 2500, (1, 1): 2500, (1, 2): 2500, (2, 2): 2500},
        ]
        hits = set()
        for place, track in enumerate(tracks):
            # quiet Sun between the ribbons and beyond
            for index, y, x in ((2, 5, 8), (7, 44, 14), (14, 78, 11)):
                for (down, aside), height in track.items():
                    hit = (index, y + down, x + aside + 20 * place)
                    spoilt[hit] += height
                    hits.add(hit)
        found = survey(spoilt, WHOLE)
        assert positions(found) == sorted(hits)
        assert not found.dead.any()

    def test_tracks_on_ribbons_too(self, cube):
        rng = np.random.default_rng(8)
        spoilt, hits = cube.astype(np.float32), set()
        for y in range(4, 84, 8):
            for x in range(4, 104, 8):
                index = int(rng.integers(0, 15))
                block = (index, slice(y, y + 2), slice(x, x + 2))
                spoilt[block] += 40 * np.sqrt(spoilt[block].max())
                hits |= {(index, row, column) for row in (y, y + 1) for column in (x, x + 1)}
        found = set(positions(survey(spoilt, WHOLE)))
        assert found <= hits
        assert len(found) > 0.9 * len(hits)

    @pytest.mark.parametrize("share", [1.0, 0.7])
    def test_the_same_pixel_at_two_wavelengths_in_turn(self, cube, share):
        spoilt = cube.copy()
        hits = set()
        for first, y, x in ((0, 20, 20), (6, 45, 70), (13, 70, 40), (9, 0, 55)):
            for index, height in ((first, 3000), (first + 1, 3000 * share)):
                spoilt[index, y, x] += int(height)
                hits.add((index, y, x))
        found = survey(spoilt, WHOLE)
        assert positions(found) == sorted(hits)
        assert not found.dead.any()

    def test_three_wavelengths_in_turn_are_the_suns_until_known_better(self, cube):
        spoilt = cube.copy()
        spoilt[5:8, 45, 60] += 3000
        assert positions(survey(spoilt, WHOLE)) == []

    def test_at_the_frames_edges(self, cube):
        spoilt = cube.copy()
        hits = [(2, 0, 30), (3, 89, 60), (4, 40, 0), (5, 50, 109), (6, 0, 0), (8, 89, 109), (9, 1, 60)]
        hits += [(11, y, x) for y in (1, 2) for x in (40, 41)]
        hits += [(12, y, x) for y in (20, 21) for x in (107, 108)]
        for hit in hits:
            spoilt[hit] += 3000
        found = survey(spoilt, WHOLE)
        assert positions(found) == sorted(hits)
        assert not found.dead.any()

    @pytest.mark.parametrize("pad", [0, 1480, 9000])
    def test_at_the_fields_edge(self, cube, pad):
        field = rotated_field(SHAPE, 20.0)
        inner = ndimage.binary_erosion(field)
        padded = np.where(field, cube, pad)
        rng = np.random.default_rng(4)
        hits: set[tuple[int, int, int]] = set()
        for y, x in rng.permutation(np.argwhere(field & ~inner)):
            if all(max(abs(y - hit[1]), abs(x - hit[2])) > 4 for hit in hits):
                hits.add((int(rng.integers(0, 15)), int(y), int(x)))
        for hit in hits:
            padded[hit] += 3000
        assert len(hits) > 20
        assert positions(survey(padded, field)) == sorted(hits)

    @pytest.mark.parametrize("pad", [0.0, 1480.0])
    def test_an_edge_that_was_interpolated_is_none(self, pad):
        """Frames turned into a pad: at its edge, pixels are part pad, part Sun, at every wavelength."""
        flagged = seen = 0
        for seed, angle in ((0, 20.0), (1, 27.0)):
            for line in scene(np.random.default_rng(seed), (150, 160), 3.0):
                turned = np.stack(
                    [
                        ndimage.rotate(np.pad(image, 10, constant_values=pad), angle, order=1, cval=pad)
                        for image in noisy(line, seed).astype(np.float64)
                    ]
                )
                cube = np.rint(turned).astype(">i2")
                field = field_of_view(cube)
                found = survey(cube, field)
                assert not found.dead.any()
                flagged += len(found.spikes)
                seen += len(cube) * int(field.sum())
        assert flagged <= 2e-6 * seen

    @pytest.mark.parametrize("brightness", [0.0, 1.0, 3.0, 6.0])
    def test_ribbons_are_none_however_bright(self, brightness):
        for seed in range(2):
            for line in scene(np.random.default_rng(seed), SHAPE, brightness):
                found = survey(noisy(line, seed), WHOLE)
                assert len(found.spikes) == 0
                assert not found.dead.any()

    def test_a_ribbon_that_brightens_during_the_scan_is_none(self):
        """Between two wavelengths the ribbons flare up threefold, and fade again two wavelengths later."""
        faint, bright = (scene(np.random.default_rng(5), SHAPE, brightness)[0] for brightness in (1.0, 4.0))
        flaring = faint.copy()
        flaring[6:8] = bright[6:8]
        assert len(survey(noisy(flaring), WHOLE).spikes) == 0

    @pytest.mark.parametrize("height", [1000.0, 10000.0])
    def test_what_the_telescope_can_make_is_none(self, cube, height):
        """A point of light at one wavelength only, at the diffraction limit: Airy's core, 2.4 pixels wide."""
        y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
        for centre in ((40.0, 50.0), (40.5, 50.5), (40.5, 50.0), (40.2, 50.4), (0.0, 50.3), (-0.4, 109.5)):
            point = height * np.exp(-4 * np.log(2) * ((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 2.4**2)
            lit = cube.astype(np.float32)
            for seen in ((7,), (7, 8)):
                lit[list(seen)] += point
                assert len(survey(lit, WHOLE).spikes) == 0
        lit = cube.astype(np.float32)
        lit[7, 40, 50] += height
        assert positions(survey(lit, WHOLE)) == [(7, 40, 50)]

    @pytest.mark.parametrize("wavelengths", [1, 2])
    @pytest.mark.parametrize("height", [1.0, 2.0, 4.0])
    @pytest.mark.parametrize(("line", "sampling"), [(0, 2.4), (1, 3.1)])
    def test_points_and_their_flanks_are_none(self, line, sampling, height, wavelengths):
        """Airy's disc with its rings, wherever it lies between pixels, as long as two exposures take."""
        rng = np.random.default_rng(12)
        cube = scene(np.random.default_rng(5), (150, 160))[line]
        y, x = np.mgrid[:150, :160].astype(float)
        for row in range(12, 140, 18):
            for column in range(12, 150, 18):
                apart = np.hypot(y - row - rng.uniform(-1, 1), x - column - rng.uniform(-1, 1)) + 1e-9
                first = rng.integers(0, len(cube) - 1)
                phase = np.pi * apart / sampling
                light = height * (2800.0, 1900.0)[line] * (2 * j1(phase) / phase) ** 2
                cube[first : first + wavelengths] += light
        found = survey(noisy(cube), np.ones((150, 160), bool))
        assert len(found.spikes) == 0
        assert not found.dead.any()

    def test_a_spike_on_a_bright_flank_is_found(self, cube):
        """It outshines what is beside it."""
        y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
        lit = cube + 6000 * np.exp(-4 * np.log(2) * ((y - 40.2) ** 2 + (x - 50.4) ** 2) / 4.8**2)
        for index, aside in ((3, 2), (8, 4)):
            lit[index, 40, 50 + aside] += 5000
        assert positions(survey(lit, WHOLE)) == [(3, 40, 52), (8, 40, 54)]

    @pytest.mark.parametrize("height", [10.0, 25.0])
    def test_kernels_of_a_restored_image_are_none(self, height):
        """Points restored beyond Airy's disc, all spatial frequencies up to 0.8 of the telescope's limit
        alike, with emission 0.6 Angstrom wide: sharper than any the telescope shows."""
        rng = np.random.default_rng(9)
        y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
        kernels = scene(np.random.default_rng(3), SHAPE)[0]
        for row in range(6, 84, 10):
            for column in range(6, 104, 10):
                apart = np.hypot(y - row - rng.uniform(-1, 1), x - column - rng.uniform(-1, 1)) + 1e-9
                phase = 2 * np.pi * 0.8 / 2.36 * apart
                middle = rng.choice(WAVELENGTH_HALPHA)
                profile = np.exp(-4 * np.log(2) * ((WAVELENGTH_HALPHA - middle) / 0.6) ** 2)
                image = np.where(apart < 12, height * np.sqrt(2800) * 2 * j1(phase) / phase, 0.0)
                kernels += profile[:, None, None] * image
        found = survey(noisy(np.maximum(kernels, 1.0)), WHOLE)
        assert len(found.spikes) == 0
        assert not found.dead.any()

    def test_the_field_and_its_pad(self, cube):
        """The step at the field's edge is none; one inside is found."""
        field = rotated_field(SHAPE, 20.0)
        padded = np.where(field, cube, 1480)
        padded[5, 45, 55] += 3000
        assert positions(survey(padded, field)) == [(5, 45, 55)]

    @pytest.mark.observation
    @pytest.mark.skipif(not REAL.is_dir(), reason="the real pair is not here")
    def test_the_real_ribbon_has_none(self):
        for scan in find_scans([REAL])[0]:
            cube = open_intensity(scan)
            field = field_of_view(cube)
            found = survey(cube, field, scan.saturation)
            assert found.defects.sum() == 0
            assert found.unusable == 0
            # and one that is put there is found, at any wavelength, on the ribbon's brightest pixel too
            core = len(scan.wavelength) // 2
            brightest = np.unravel_index(np.argmax(cube[core, 2:-2, 2:-2]), (17, 17))
            y, x = (int(index) + 2 for index in brightest)
            for index in (0, core, len(scan.wavelength) - 1):
                spoilt = cube.astype(np.float32)
                spoilt[index, y, x] *= 3.0
                assert positions(survey(spoilt, field)) == [(index, y, x)]


class TestPixels:
    def test_dead_and_hot(self, cube):
        spoilt = cube.copy()
        spoilt[:, 20, 30] = 0
        spoilt[:, 21, 60] = 1234
        spoilt[:, 50, 70] += 3000
        found = survey(spoilt, WHOLE)
        assert [tuple(place) for place in np.argwhere(found.dead)] == [(20, 30), (21, 60), (50, 70)]
        assert len(found.spikes) == 0
        assert found.unusable == 1
        assert len(found.spoilt) == 3 * 15
        assert list(found.sentences(WAVELENGTH_HALPHA)) == [
            "1 pixels of the field are not finite, not positive or saturated somewhere",
            "3 dead or hot pixels",
        ]

    @pytest.mark.parametrize("share", [0.1, 0.5])
    def test_dark_pixels(self, cube, share):
        """Less sensitive than the pixels around, with noise of their own."""
        spoilt = cube.copy()
        places = [(12, 80), (40, 50), (70, 20)]
        for place in places:
            level = share * cube[:, *place]
            spoilt[:, *place] = noisy(level, seed=7)
        found = survey(spoilt, WHOLE)
        assert [tuple(place) for place in np.argwhere(found.dead)] == places
        assert len(found.spikes) == 0

    @pytest.mark.parametrize("share", [0.05, 0.3, 0.55])
    def test_pixels_that_drop_out_at_one_wavelength(self, cube, share):
        spoilt = cube.copy()
        quiet = [(2, 12, 80), (2, 70, 20), (12, 48, 60), (14, 20, 30)]
        for place in quiet:
            spoilt[place] = int(share * spoilt[place])
        found = survey(spoilt, WHOLE)
        assert positions(found) == quiet
        assert not found.dead.any()
        scaled = ScaledCube(spoilt, np.full(15, 1e-3), np.zeros(15))
        assert positions(survey(scaled, WHOLE)) == quiet

    def test_what_is_dark_on_the_sun_does_not_drop_out(self):
        """A pore, and structures down to 0.8 of the telescope's limit, seen in cores or in wings alone."""
        shape = (150, 160)
        rng = np.random.default_rng(2)
        y, x = np.mgrid[:150, :160]
        frequency = np.hypot(np.fft.fftfreq(150)[:, None], np.fft.fftfreq(160))
        passed = np.where(frequency < 0.8 / 2.4, np.maximum(frequency, 0.02) ** -1.8, 0.0)
        pore = 1.0 - 0.8 * np.exp(-((np.hypot(y - 60.0, x - 70.0) / 9.0) ** 4))
        for line in range(2):
            cube = scene(rng, shape)[line]
            core = (cube.mean(axis=(1, 2)) / cube.mean(axis=(1, 2)).max())[:, None, None]
            for weight in (core, 1.0 - core):
                structure = np.fft.ifft2(np.fft.fft2(rng.standard_normal(shape)) * passed).real
                cube *= np.maximum(1.0 + 0.15 * weight * structure / structure.std(), 0.1)
            found = survey(noisy(cube * pore, line), np.ones(shape, bool))
            assert len(found.spikes) == 0
            assert not found.dead.any()

    def test_dark_points_that_the_telescope_can_make_are_none(self, cube):
        y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
        point = np.exp(-4 * np.log(2) * ((y - 40.2) ** 2 + (x - 50.4) ** 2) / 2.4**2)
        found = survey(noisy(cube * (1.0 - 0.9 * point)), WHOLE)
        assert not found.dead.any()

    def test_half_a_field_of_zeros_does_not_make_the_rest_noisy(self, cube):
        spoilt = cube.copy()
        spoilt[5, 45:] = 0
        found = survey(spoilt, WHOLE)
        assert len(found.spikes) == 0
        assert found.unusable == 45 * SHAPE[1]

    def test_an_image_that_is_there_twice_is_missing_once(self, cube):
        spoilt = cube.copy()
        spoilt[8] = spoilt[7]
        assert survey(spoilt, WHOLE).missing == (8,)

    def test_it_is_the_files_numbers_that_are_the_same(self, cube):
        """A factor that depends on the wavelength, as of units per frequency, hides no repetition."""
        spoilt = cube.copy()
        spoilt[8] = spoilt[7]
        spoilt[:, 40, 50] = 1500
        factors = 3e8 / np.square(WAVELENGTH_HALPHA)
        scaled = ScaledCube(spoilt, factors, 100.0 * factors)
        present = [index for index in range(len(cube) + 1) if index != 4]
        for numbers, field, missing, place in (
            (scaled, WHOLE, (8,), (40, 50)),
            (PlacedCube(scaled, SHAPE, (3, -7)), np.roll(WHOLE, 1), (8,), (43, 43)),
            (IncompleteCube(scaled, present, len(cube) + 1), WHOLE, (4, 9), (40, 50)),
        ):
            seen = field & np.isfinite(np.asarray(numbers[0]))
            found = survey(numbers, seen)
            assert found.missing == missing
            assert [tuple(at) for at in np.argwhere(found.dead)] == [place]
            assert len(found.spikes) == 0

    @pytest.mark.parametrize("value", [0.0, 1480.0, np.nan])
    def test_missing_images(self, cube, value):
        spoilt = cube.astype(np.float32)
        spoilt[[3, 11]] = value
        spoilt[6, 40, 50] += 4000
        found = survey(spoilt, WHOLE)
        assert found.missing == (3, 11)
        assert positions(found) == [(6, 40, 50)]
        assert found.unusable == 0
        assert (found.defects & Defect.WAVELENGTH_MISSING).all()
        offset = WAVELENGTH_HALPHA - HALPHA.rest_wavelength
        assert "no image at -0.826, +0.774 Angstrom" in next(found.sentences(offset))

    def test_numbers_without_meaning(self, cube):
        spoilt = cube.astype(np.float32)
        spoilt[2, :, :3] = np.nan  # a border, at one wavelength
        spoilt[4, 50, 60], spoilt[5, 51, 61], spoilt[6, 52, 62] = -1.0, np.inf, 40000.0
        found = survey(spoilt, WHOLE, saturation=32767.0)
        assert found.unusable == 3 * SHAPE[0] + 3
        assert not found.dead.any()
        assert len(found.spikes) == 0

    @pytest.mark.filterwarnings("error")
    def test_whatever_the_shape_and_the_numbers(self):
        """Frames of a few pixels, ragged fields, NaN and infinities: nothing is found outside the field."""
        rng = np.random.default_rng(6)
        for _ in range(400):
            shape = tuple(rng.integers(1, (6, 8, 8)))
            cube = rng.integers(-5, 3000, shape).astype(rng.choice([">i2", "<u2", ">f4", ">f8"]))
            if cube.dtype.kind == "f":
                for value in (np.nan, np.inf, -np.inf):
                    cube[rng.random(shape) < 0.1] = value
            field = rng.random(shape[1:]) < rng.choice([0.3, 0.8, 1.0])
            found = survey(cube, field, rng.choice([np.inf, 2900.0]))
            assert not (found.defects & (Defect.SPIKE | Defect.DEAD_PIXEL))[~field].any()

    def test_a_scan_of_nothing(self):
        for value in (0.0, np.nan, 7.0):
            found = survey(np.full((5, *SHAPE), value, np.float32), WHOLE)
            assert found.missing == (0, 1, 2, 3, 4)
            assert not found.dead.any()
        assert len(survey(np.ones((5, *SHAPE)), ~WHOLE).spikes) == 0


class TestContrast:
    def test_is_that_of_the_granulation(self):
        rng = np.random.default_rng(2)
        shape = (200, 220)
        for contrast in (0.03, 0.08):
            image = 2000.0 * (1.0 + contrast * smooth_noise(rng, shape, 3.5))
            slope = np.linspace(0.8, 1.2, shape[1])  # limb darkening
            cube = np.repeat((image * slope)[None], 15, axis=0)
            found = granulation_contrast(
                cube, WAVELENGTH_HALPHA, HALPHA.rest_wavelength, np.ones(shape, bool)
            )
            assert found == pytest.approx(contrast, rel=0.1)

    def test_poor_seeing_lowers_it(self):
        cube = scene(np.random.default_rng(1), SHAPE)[0]
        sharp, blurred = (
            granulation_contrast(noisy(one), WAVELENGTH_HALPHA, HALPHA.rest_wavelength, WHOLE)
            for one in (cube, ndimage.gaussian_filter(cube, (0, 5, 5)))
        )
        assert blurred < 0.6 * sharp

    def test_nothing_to_measure(self):
        nothing = np.zeros((15, *SHAPE))
        assert np.isnan(granulation_contrast(nothing, WAVELENGTH_HALPHA, HALPHA.rest_wavelength, WHOLE))


class TestHeaders:
    @pytest.mark.parametrize(
        ("cards", "words"),
        [
            ({"WDESC1": "Ca II 8542"}, "WDESC1 = 'Ca II 8542' names 8542"),
            ({"WAVEREF": "air"}, "WAVEREF = 'air', the wavelengths are taken to be in vacuum"),
            ({"AIRORVAC": "AIR"}, "AIRORVAC = 'AIR', the wavelengths are taken to be in vacuum"),
            ({"CROTA2": 30.0}, "CROTA2 = 30, but the frame's matrix turns it by 0 degrees"),
            ({"CROTA2": 30.0, **turned(-30.0)}, "turns it by -30 degrees"),
            ({"WWIDTH1": 25}, "WWIDTH1 = 25, but there are 15"),
            ({"TWAVE1": 8542.1}, "TWAVE1 = 8542.1"),
            ({"CDELT3": 0.1}, "up to 0.70 Angstrom off"),
            ({"CRVAL3": 6562.8}, "up to 1.78 Angstrom off"),
            ({"POINT_ID": "2014-09-07T15:27:24"}, "POINT_ID = 2014-09-07"),
            ({"DATE-END": "2014-09-06T15:00:00"}, "DATE-END = 2014-09-06T15:00:00 is before the scan"),
            ({"DATE-END": "2014-09-05"}, "DATE-END = 2014-09-05 is before the scan"),
            ({"DATE-END": "2016-09-06T15:30:00"}, "more than a day from the scan"),
            ({"DATE-BEG": "2014-09-06T15:30:00"}, "DATE-BEG = 2014-09-06T15:30:00 is after the scan"),
            ({"DATE-OBS": "2011-09-06T15:27:24"}, "DATE-OBS = 2011-09-06T15:27:24 is more than a day"),
            ({"DATE-OBS": "noon"}, "DATE-OBS = 'noon', time scale UTC, is no date"),
            ({"WAVELNTH": 8542.1}, "WAVELNTH = 8542.1, the wavelengths are around 6563"),
            ({"WAVELNTH": "8542"}, "WAVELNTH = 8542, the wavelengths are around 6563"),
            ({"TWAVE1": 8542.0}, "TWAVE1 = 8542.0"),
            ({"WAVELNTH": 854.2, "WAVEUNIT": -9}, "WAVELNTH = 854.2, the wavelengths"),
            ({"FILTER1": "8542"}, "FILTER1 = '8542' names 8542"),
            ({"CUNIT3": "kg", "CTYPE3": ""}, "CUNIT3 = 'kg' is no unit"),
            ({"CUNIT3": "nm", "CRVAL3": 656.4}, "off the wavelengths"),
        ],
    )
    def test_contradictions_are_said(self, tmp_path, cards, words):
        path, _, _ = write_pair(tmp_path, shape=(20, 30), angle=None)
        (scan,) = read_scans(path)
        assert header_contradictions(scan) == ()
        with fits.open(path, mode="update") as hdus:
            hdus[0].header.update(cards)
        (said,) = header_contradictions(read_scans(path)[0])
        assert words in said

    @pytest.mark.parametrize(
        "cards",
        [
            {"CUNIT3": "nm", "CRVAL3": 656.4584, "CDELT3": 0.02},
            {"CUNIT3": "nm", "CRVAL3": 656.4584, "CDELT3": 0.02, "TWAVE1": 656.4584},
            # TAI was 35 s ahead of UTC in September 2014.
            {
                "TIMESYS": "TAI",
                "DATE-BEG": "2014-09-06T15:27:22",
                "DATE-END": "2014-09-06T15:27:26",
                "POINT_ID": "2014-09-06T15:27:24",
            },
            {"TIMESYS": "UTC", "DATE-OBS": "2014-09-06", "DATE-END": "2014-09-06"},
            {"POINT_ID": "now"},
            {"POINT_ID": "flare of the 6th"},
            {"WAVELNTH": 656.3, "WAVEUNIT": -9},
            {"WAVELNTH": 656.3},
            {"WAVELNTH": "6563"},
            {"TWAVE1": 6563.0},
            {"WAVELNTH": 6563.0, "WAVEUNIT": "Angstrom"},
            {"FILTER1": "6563"},
            {"WAVEREF": "Vacuum"},
            {"WAVEREF": "the Sun"},
            {"AIRORVAC": "vac"},
            {"CROTA2": 0.2},
            {"CROTA2": 390.0, **turned(30.0)},
            {"CROTA2": -150.0, **turned(-150.0)},
            {"CROTA2": 30.0, **turned(-30.0), "CDELT1": -0.057},
        ],
    )
    def test_what_fits_is_no_contradiction(self, tmp_path, cards):
        path, _, _ = write_pair(tmp_path, shape=(20, 30), angle=None)
        with fits.open(path, mode="update") as hdus:
            hdus[0].header.update(cards)
        assert header_contradictions(read_scans(path)[0]) == ()

    @pytest.mark.parametrize("card", ["TWAVE1", "CRVAL3", "CRPIX3", "CDELT3", "WWIDTH1", "WAVELNTH"])
    @pytest.mark.parametrize("value", ["6563 A", None])
    def test_cards_that_are_no_numbers_are_named(self, tmp_path, card, value):
        path, _, _ = write_pair(tmp_path, shape=(20, 30), angle=None)
        with fits.open(path, mode="update") as hdus:
            hdus[0].header[card] = value
        with pytest.raises(InputError, match=card) as caught:
            header_contradictions(read_scans(path)[0])
        assert str(path) in str(caught.value)
        assert "a number" in str(caught.value.expected)

    @pytest.mark.observation
    @pytest.mark.skipif(not REAL.is_dir(), reason="the real pair is not here")
    def test_the_real_pair_has_none(self):
        assert [header_contradictions(scan) for scan in find_scans([REAL])[0]] == [(), ()]
