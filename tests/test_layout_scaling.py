"""Heights, windows and units against the published network's own numbers."""

import json

import astropy.units as u
import numpy as np
import pytest
import torch

from inn.errors import MisuseError, ModelError
from inn.layout import CA8542, HALPHA, HEIGHTS, QUANTITIES, Layout, LineWindow
from inn.scaling import SCALINGS, UNITS, scale, scale_atmosphere, unscale, unscale_atmosphere

# Every eleventh of the heights that the published code distributes (its `z.h5`), in Mm.
PUBLISHED_HEIGHTS = {
    0: -0.065,
    1: 0.016022727,
    11: 0.82625,
    22: 1.7175,
    33: 2.60875,
    44: 3.5,
    45: 4.3600583,
    46: 5.4314595,
    47: 6.766137,
    48: 8.428786,
    49: 10.5,
}


def test_heights_are_the_published_ones():
    assert HEIGHTS.shape == (50,)
    assert HEIGHTS.dtype == np.float64
    for index, height in PUBLISHED_HEIGHTS.items():
        assert HEIGHTS[index] == pytest.approx(height, abs=1e-6)
    np.testing.assert_allclose(np.diff(HEIGHTS[:45]), 3.565 / 44, rtol=1e-12)


def test_windows_are_the_published_ones():
    assert (HALPHA.rest_wavelength, CA8542.rest_wavelength) == (6564.61, 8544.44)
    np.testing.assert_allclose(HALPHA.offsets[[0, -1]], [-1.4, 1.4])
    np.testing.assert_allclose(CA8542.offsets[[0, -1]], [-1.0, 1.0])
    np.testing.assert_allclose(np.diff(HALPHA.offsets), 2.8 / 29)
    np.testing.assert_allclose(HALPHA.wavelengths - HALPHA.rest_wavelength, HALPHA.offsets, atol=1e-9)
    assert HALPHA.points == CA8542.points == CA8542.offsets.size == 30


def test_layout_sizes_and_places():
    layout = Layout()
    assert (layout.atmosphere_size, layout.lines_size) == (150, 60)
    assert [layout.atmosphere_slice(name) for name in QUANTITIES] == [
        slice(0, 50),
        slice(50, 100),
        slice(100, 150),
    ]
    assert layout.line_slice("halpha") == slice(0, 30)
    assert layout.line_slice("ca8542") == slice(30, 60)
    with pytest.raises(KeyError):
        layout.line_slice("mgii")


def test_layout_survives_json():
    layout = Layout([0.1, 0.30000000000000004, 2.0], (LineWindow("halpha", 6564.61, 1.4, 31), CA8542))
    again = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    assert hash(again) == hash(layout)
    assert again != Layout()
    assert layout != "layout"


def test_layout_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        Layout().heights[0] = 1.0
    with pytest.raises(AttributeError):
        Layout().lines = ()
    with pytest.raises(ValueError, match="read-only"):
        HEIGHTS[0] = 1.0


@pytest.mark.parametrize("heights", [[], [1.0], [1.0, 1.0], [2.0, 1.0], [0.0, np.nan], [[0.0, 1.0]]])
def test_heights_must_ascend(heights):
    with pytest.raises(ModelError, match="ascend"):
        Layout(heights)


@pytest.mark.parametrize(
    "stored", [{}, {"heights": {"values": [0, 1]}}, {"heights": None, "lines": []}, {"heights": 3}]
)
def test_unreadable_layout(stored):
    with pytest.raises(ModelError, match="not readable"):
        Layout.from_json(stored)


def test_a_window_needs_points_and_a_width():
    with pytest.raises(ModelError, match="halpha"):
        LineWindow("halpha", 6564.61, 1.4, 1)
    with pytest.raises(ModelError, match="positive"):
        LineWindow("halpha", 6564.61, -1.4, 30)


@pytest.mark.parametrize(
    ("quantity", "physical", "network"),
    [
        ("electron_density", [1.0, 1e8, 2e15], [0.0, 8.0, 15.301029995663981]),
        ("temperature", [1e4, 31622776.601683795], [4.0, 7.5]),
        ("velocity", [0.0, 9.0, -9.0, 99.0, -999.0], [0.0, 1.0, -1.0, 2.0, -3.0]),
    ],
)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_scaling_by_hand(quantity, physical, network, library):
    make = np.array if library == "numpy" else torch.tensor
    dtype = np.float64 if library == "numpy" else torch.float64
    physical, network = make(physical, dtype=dtype), make(network, dtype=dtype)
    scaled, unscaled = scale(quantity, physical), unscale(quantity, network)
    assert type(scaled) is type(unscaled) is type(physical)
    np.testing.assert_allclose(np.asarray(scaled), np.asarray(network), rtol=1e-14)
    np.testing.assert_allclose(np.asarray(unscaled), np.asarray(physical), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaling_returns_over_the_whole_range(dtype):
    tolerance = 2e-6 if dtype is torch.float32 else 1e-12
    ranges = {"electron_density": (5.0, 17.0), "temperature": (3.3, 7.5), "velocity": (-3.0, 3.0)}
    for quantity, (low, high) in ranges.items():
        network = torch.linspace(low, high, 4001, dtype=dtype)
        physical = unscale(quantity, network)
        assert physical.dtype == dtype
        assert torch.all(physical.diff() > 0.0)  # quantiles pass through
        torch.testing.assert_close(scale(quantity, physical), network, rtol=tolerance, atol=tolerance)


def test_slow_flows_keep_their_digits():
    slow = np.array([1e-12, -3e-9], dtype=np.float64)
    np.testing.assert_allclose(unscale("velocity", scale("velocity", slow)), slow, rtol=1e-12)


def test_atmospheres_are_joined_in_order():
    density, temperature, velocity = np.full((2, 50), 1e11), np.full((2, 50), 1e4), np.full((2, 50), -9.0)
    vectors = scale_atmosphere(density, temperature, velocity)
    assert vectors.shape == (2, 150)
    np.testing.assert_allclose(vectors[0, [0, 49, 50, 99, 100, 149]], [11, 11, 4, 4, -1, -1])
    split = unscale_atmosphere(torch.from_numpy(vectors))
    assert tuple(split) == QUANTITIES
    np.testing.assert_allclose(split["velocity"], velocity)
    with pytest.raises(MisuseError, match="three quantities"):
        unscale_atmosphere(vectors[:, :-1])


def test_unknown_quantity():
    with pytest.raises(MisuseError, match="pressure"):
        scale("pressure", np.ones(3))


def test_every_quantity_has_a_unit_and_a_pair():
    assert set(UNITS) == set(SCALINGS) == set(QUANTITIES)
    assert u.Unit(UNITS["electron_density"]) == u.cm**-3
    assert u.Unit(UNITS["temperature"]) == u.K
    assert u.Unit(UNITS["velocity"]) == u.km / u.s
