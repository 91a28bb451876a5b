"""Intensities read as they are indexed: the same as of the whole array, in units that astropy agrees with."""

from __future__ import annotations

import astropy.units as u
import numpy as np
import pytest
from astropy.modeling.models import BlackBody

from pipeline.crisp.cube import PER_ANGSTROM, PlacedCube, ScaledCube, as_intensities, intensity_scale
from pipeline.errors import InputError

SHAPE = (5, 7, 6)
MASK = np.random.default_rng(2).random(SHAPE[1:]) < 0.4


KEYS = [
    2,
    -1,
    slice(1, 4),
    slice(None, None, -1),
    [0, 3],
    np.array([True, False, True, True, False]),
    (slice(None), slice(2, 5), slice(1, 3)),
    (1, slice(2, 5)),
    (3, 4, 5),
    (slice(None), 4, 5),
    (slice(1, 3), MASK),
    (0, MASK),
    (slice(None), slice(None), 3),
]


class Watched:
    """An array that remembers how many numbers were read from it."""

    def __init__(self, values):
        self.values, self.read = values, 0
        self.shape, self.dtype = values.shape, values.dtype

    def __len__(self):
        return len(self.values)

    def __getitem__(self, key):
        part = self.values[key]
        self.read += np.size(part)
        return part


@pytest.fixture
def numbers():
    return np.random.default_rng(1).integers(-32000, 32000, SHAPE).astype(">i2")


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing_scales_what_was_indexed(numbers, key):
    scale, offset = np.linspace(0.5, 2.5, SHAPE[0]), np.linspace(-3.0, 40.0, SHAPE[0])
    watched = Watched(numbers)
    part = ScaledCube(watched, scale, offset)[key]
    whole = (numbers * scale[:, None, None] + offset[:, None, None])[key]
    np.testing.assert_allclose(part, whole, rtol=1e-5)
    assert part.shape == whole.shape
    assert part.dtype == np.float32
    assert watched.read == whole.size


def test_it_is_an_array_for_numpy(numbers):
    cube = ScaledCube(numbers, np.full(5, 2.0), np.zeros(5))
    np.testing.assert_array_equal(np.asarray(cube), 2.0 * numbers)
    np.testing.assert_array_equal(np.stack(list(cube)), 2.0 * numbers)
    assert (len(cube), cube.shape, cube.dtype) == (5, SHAPE, np.float32)


def test_blank_becomes_nan(numbers):
    numbers[1, 2, 3] = -32768
    cube = ScaledCube(numbers, np.ones(5), np.zeros(5), [(-32768, 0.0)])
    assert np.isnan(cube[1, 2, 3])
    assert np.argwhere(np.isnan(cube[:])).tolist() == [[1, 2, 3]]


def test_a_pad_of_scaled_integers_is_the_nearest_of_them(numbers):
    """-3.27 of steps of 0.5 from 100 is the integer -207, and nothing else."""
    numbers[1, 2, 3] = -207
    expected = np.where(numbers == -207, np.nan, 0.5 * numbers + 100.0)
    cube = as_intensities(numbers, np.ones(5), 0.5, 100.0, None, padding=(-3.27, 0.25))
    np.testing.assert_array_equal(cube[:], expected)


@pytest.mark.parametrize(
    ("kind", "step", "zero"),
    [
        (">i4", 1.0, 2**31),
        ("<i4", 0.125, 2**28),
        (">i4", -1.0, 0),
        (">i8", 1.0, -(2**40)),
        (">f8", 1.0, 2**31),
    ],
)
def test_an_offset_costs_no_digits(kind, step, zero):
    """Counts of up to 30,000, stored as numbers far from them: exact, as whole numbers and eighths are."""
    counts = np.random.default_rng(5).integers(0, 30_000, SHAPE)
    stored = (counts - int(zero / step)).astype(kind)
    cube = as_intensities(stored, np.ones(5), step, float(zero), None)
    np.testing.assert_array_equal(cube[:], step * counts)
    np.testing.assert_array_equal(cube[2, 1:3], step * counts[2, 1:3])
    assert cube[:].dtype == np.float32


def test_short_integers_far_from_zero_are_rounded_once():
    """Single precision has steps of 1 at 10,000,000, and nothing is lost before."""
    counts = np.random.default_rng(5).integers(-32_768, 32_768, SHAPE).astype(">i2")
    cube = as_intensities(counts, np.ones(5), 0.25, 1e7, None)
    np.testing.assert_array_equal(cube[:], (counts / 4.0 + 1e7).astype(np.float32))


@pytest.mark.parametrize("corner", [(0, 0), (2, 1), (-3, 2), (4, -2), (-2, -5), (20, 0), (-7, 1)])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_cube_in_another_frame(numbers, corner, key):
    """As if the whole had been copied into a larger or smaller array of NaN."""
    frame = (9, 8)
    whole = np.full((SHAPE[0], 40, 40), np.nan, dtype=np.float32)
    whole[:, 10 + corner[0] : 17 + corner[0], 10 + corner[1] : 16 + corner[1]] = numbers
    whole = whole[:, 10:19, 10:18]
    watched = Watched(numbers)
    placed = PlacedCube(watched, frame, corner)
    if isinstance(key, tuple) and isinstance(key[1], np.ndarray):
        key = (key[0], np.random.default_rng(4).random(frame) < 0.4)
    np.testing.assert_array_equal(placed[key], whole[key])
    assert placed[key].dtype == np.float32
    np.testing.assert_array_equal(np.asarray(placed), whole)
    np.testing.assert_array_equal(np.stack(list(placed)), whole)
    assert (len(placed), placed.shape) == (5, (5, 9, 8))
    fresh = Watched(numbers)
    PlacedCube(fresh, frame, corner)[1:3, 2:4, 1:3]
    assert fresh.read <= 8


@pytest.mark.parametrize(
    "unit", ["W m^-2 Hz^-1 sr^-1", "erg s-1 cm-2 Hz-1 sr-1", "W m-2 sr-1 nm-1", "kW m-2 sr-1 um-1"]
)
def test_physical_units_are_astropys(unit):
    """A black body of 5,800 K, given in the unit, comes out as Planck's law per Angstrom."""
    wavelength = np.array([6563.0, 6564.61, 8544.44, 8546.0])
    planck = BlackBody(5800 * u.K)
    per_frequency = planck(wavelength * u.Angstrom)
    numbers = per_frequency.to_value(unit, u.spectral_density(wavelength * u.Angstrom))
    given, factors = intensity_scale(unit, wavelength, "file")
    expected = BlackBody(5800 * u.K, scale=1.0 * PER_ANGSTROM)(wavelength * u.Angstrom)
    np.testing.assert_allclose(numbers * factors, expected.to_value(PER_ANGSTROM), rtol=1e-9)
    assert u.Unit(given) == PER_ANGSTROM


def test_the_two_lines_differ_by_their_wavelengths_squared():
    _, factors = intensity_scale("W m^-2 Hz^-1 sr^-1", np.array([6564.61, 8544.44]), "file")
    assert factors[0] / factors[1] == pytest.approx((8544.44 / 6564.61) ** 2)  # 1.69
    # c / lambda^2 by hand: W m-2 Hz-1 sr-1 are 1e3 erg s-1 cm-2 Hz-1 sr-1
    assert factors[0] == pytest.approx(1e3 * 299792458e10 / 6564.61**2)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        *(("dn", "DN"), ("DN", "DN"), ("counts", "DN"), ("adu", "DN"), ("", ""), ("1", "")),
        *(("electron", "electron"), ("Electron", "electron"), ("photon", "ph"), ("ph", "ph")),
    ],
)
def test_counts_and_relative_intensities_stay(unit, expected):
    given, factors = intensity_scale(unit, np.array([6563.0, 6564.0]), "file")
    assert given == expected
    assert u.Unit(given).to_string() == expected
    np.testing.assert_array_equal(factors, 1.0)


@pytest.mark.parametrize("unit", ["furlongs", "K", "W m-2", "erg s-1 cm-2 Angstrom-1", "km / s"])
def test_other_units_are_refused(unit):
    with pytest.raises(InputError, match=r"(?s)file\.fits.*unit") as caught:
        intensity_scale(unit, np.array([6563.0, 6564.0]), "file.fits")
    assert unit in str(caught.value)
