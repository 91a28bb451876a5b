"""Interpolation onto the network's points, against numpy.interp, straight lines and hand-made numbers."""

from __future__ import annotations

import numpy as np
import pytest

from inn.layout import CA8542, HALPHA, HEIGHTS, Layout
from pipeline.errors import InputError
from pipeline.spectra import covers, network_lines, normalise, sampling_matrix, shortfall, window_matrix

# CRISP's own axes in the F-CHROMA database
CRISP_HALPHA = 6564.584 + 0.2 * np.arange(-7, 8)
CRISP_CA8542 = 8544.44 + 0.1 * np.arange(-12, 13)
LAYOUT = Layout(HEIGHTS, (HALPHA, CA8542))


def test_inside_the_axis_it_is_numpy_interp():
    generator = np.random.default_rng(1)
    axis = np.cumsum(generator.uniform(0.05, 0.3, 20))
    points = generator.uniform(axis[0], axis[-1], 31)
    spectrum = generator.normal(size=20)
    np.testing.assert_allclose(
        sampling_matrix(axis, points) @ spectrum, np.interp(points, axis, spectrum), rtol=0, atol=1e-13
    )


def test_a_straight_line_is_exact_and_extrapolated():
    matrix = window_matrix(CRISP_HALPHA, HALPHA)
    points = HALPHA.wavelengths
    assert points[-1] > CRISP_HALPHA[-1]  # the window overshoots CRISP's axis
    slope = 3.0 * (CRISP_HALPHA - 6564.0) + 1.0
    np.testing.assert_allclose(matrix @ slope, 3.0 * (points - 6564.0) + 1.0, rtol=0, atol=1e-9)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)


def test_half_a_step_is_covered_and_no_more():
    assert covers(CRISP_HALPHA, HALPHA)
    assert covers(CRISP_CA8542, CA8542)
    step = 0.2
    low, high = HALPHA.rest_wavelength - 1.4, HALPHA.rest_wavelength + 1.4
    inside = np.arange(low + 0.5 * step - 1e-6, high, step)
    assert covers(np.append(inside, high), HALPHA)
    outside = np.append(np.arange(low + 0.5 * step + 0.01, high, step), high)
    assert not covers(outside, HALPHA)
    assert shortfall(outside, HALPHA) == pytest.approx(0.01, abs=1e-9)
    with pytest.raises(InputError, match="too short"):
        window_matrix(outside, HALPHA)


def test_an_axis_that_decreases_is_refused():
    with pytest.raises(InputError, match="increase"):
        sampling_matrix(CRISP_HALPHA[::-1], [6564.6])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_network_lines_agree_with_interpolation_pixel_by_pixel(dtype):
    generator = np.random.default_rng(2)
    halpha = generator.uniform(0.5, 2.0, (7, 15)).astype(dtype)
    ca8542 = generator.uniform(0.2, 1.0, (7, 25)).astype(dtype)
    lines, scale = network_lines(halpha, ca8542, CRISP_HALPHA, CRISP_CA8542, LAYOUT)
    assert lines.shape == (7, 60)
    assert scale.shape == (7,)
    assert lines.dtype == dtype
    points_ca = CA8542.wavelengths
    points_ha = HALPHA.wavelengths
    within = points_ha <= CRISP_HALPHA[-1]
    for pixel in range(7):
        restored = lines[pixel] * scale[pixel]
        expected = np.interp(points_ca, CRISP_CA8542, ca8542[pixel])
        np.testing.assert_allclose(restored[30:], expected, rtol=1e-5)
        expected = np.interp(points_ha, CRISP_HALPHA, halpha[pixel])
        np.testing.assert_allclose(restored[:30][within], expected[within], rtol=1e-5)
    np.testing.assert_allclose(lines.max(axis=1), 1.0, rtol=1e-6)


def test_a_bad_pixel_leaves_its_neighbours_alone():
    generator = np.random.default_rng(3)
    halpha = generator.uniform(0.5, 2.0, (5, 15))
    ca8542 = generator.uniform(0.2, 1.0, (5, 25))
    clean, _ = network_lines(halpha, ca8542, CRISP_HALPHA, CRISP_CA8542, LAYOUT)
    halpha[2, 4] = np.nan
    ca8542[3] = np.inf
    halpha[4], ca8542[4] = 0.0, 0.0
    lines, scale = network_lines(halpha, ca8542, CRISP_HALPHA, CRISP_CA8542, LAYOUT)
    np.testing.assert_array_equal(lines[:2], clean[:2])
    assert np.isnan(lines[2:]).all()
    assert scale[4] == 0.0


def test_normalisation_is_by_the_joint_maximum():
    lines, scale = normalise(np.array([[1.0, 4.0, 2.0], [3.0, 1.0, 1.5]]))
    np.testing.assert_allclose(scale, [4.0, 3.0])
    np.testing.assert_allclose(lines, [[0.25, 1.0, 0.5], [1.0, 1.0 / 3.0, 0.5]])
