"""Interpolation onto the network's points, against NumPy's and SciPy's, straight lines, hand-made numbers."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest
import torch
from scipy.interpolate import PchipInterpolator

from inn.layout import CA8542, HALPHA, HEIGHTS, Layout
from pipeline.errors import InputError, MisuseError
from pipeline.spectra import (
    covered,
    covers,
    interpolate,
    interpolate_shifted,
    monotone_slopes,
    network_lines,
    normalise,
    sampling_matrix,
    shortfall,
    window_matrix,
)

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


# Monotone cubics


def test_inside_the_axis_monotone_cubics_are_scipys():
    generator = np.random.default_rng(4)
    axis = np.cumsum(generator.uniform(0.05, 0.3, 20))
    spectra = generator.normal(size=(200, 20))
    spectra[:, 8] = spectra[:, 7]  # a plateau
    spectra[50:60] = np.sort(spectra[50:60], axis=1)
    spectra[60] = 1.0
    points = np.concatenate((axis, generator.uniform(axis[0], axis[-1], 51)))
    theirs = PchipInterpolator(axis, spectra, axis=1)
    np.testing.assert_allclose(
        monotone_slopes(spectra, axis), theirs.derivative()(axis), rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(
        interpolate(spectra, axis, points, "pchip"), theirs(points), rtol=1e-12, atol=1e-12
    )


def test_monotone_cubics_stay_between_the_values_they_join():
    generator = np.random.default_rng(5)
    axis = np.linspace(0.0, 1.0, 9)
    spectra = generator.exponential(size=(100, 9)).astype(np.float32)
    fine = np.linspace(0.0, 1.0, 321)
    found = interpolate(spectra, axis, fine, "pchip")
    left = np.clip(np.searchsorted(axis, fine, side="right") - 1, 0, 7)
    ends = np.stack((spectra[:, left], spectra[:, left + 1]))
    assert (found >= ends.min(axis=0) - 1e-5).all()
    assert (found <= ends.max(axis=0) + 1e-5).all()


def test_monotone_cubics_are_exact_on_straight_lines_and_leave_the_axis_straight():
    points = HALPHA.wavelengths
    line = 3.0 * (CRISP_HALPHA - 6564.0) + 1.0
    found = interpolate(line[None], CRISP_HALPHA, points, "pchip")[0]
    np.testing.assert_allclose(found, 3.0 * (points - 6564.0) + 1.0, rtol=0, atol=1e-9)
    axis = np.arange(4.0)
    values = np.array([[0.0, 1.0, 4.0, 9.0]])
    slope = PchipInterpolator(axis, values[0]).derivative()(3.0)
    found = interpolate(values, axis, [3.25, 3.5], "pchip")[0]
    np.testing.assert_allclose(found, 9.0 + slope * np.array([0.25, 0.5]))
    with pytest.raises(InputError, match="too short"):
        interpolate(values, axis, [3.6], "pchip")
    with pytest.raises(InputError, match="three"):
        interpolate(values[:, :2], axis[:2], [0.5], "pchip")


def test_monotone_cubics_follow_a_line_core_more_closely():
    """A Gaussian absorption line, half as wide again as CRISP's sampling: straight lines cut its core off."""

    def profile(wavelength):
        return 1.0 - 0.8 * np.exp(-0.5 * ((wavelength - 6564.61) / 0.3) ** 2)

    points = HALPHA.wavelengths
    spectra = profile(CRISP_HALPHA)[None]
    error = {
        kind: np.sqrt(np.mean((interpolate(spectra, CRISP_HALPHA, points, kind)[0] - profile(points)) ** 2))
        for kind in ("linear", "pchip")
    }
    assert error["pchip"] < 0.5 * error["linear"]


@pytest.mark.parametrize("kind", ["linear", "pchip"])
def test_no_wavelength_to_interpolate_to_is_refused(kind):
    spectra, axis = np.ones((2, 4)), np.arange(4.0)
    with pytest.raises(InputError, match="no wavelength to interpolate to"):
        interpolate(spectra, axis, [], kind)
    with pytest.raises(InputError, match="no wavelength to interpolate to"):
        interpolate_shifted(spectra, axis, [], np.zeros(2), kind)


def test_an_interpolation_that_does_not_exist_is_refused():
    with pytest.raises(MisuseError, match="interpolation") as refusal:
        interpolate(np.ones((1, 15)), CRISP_HALPHA, [6564.6], "cubic")
    assert refusal.value.expected == "linear or pchip"


# Pixels on wavelengths of their own


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("interpolation", ["linear", "pchip"])
def test_each_pixel_on_its_own_wavelengths_is_numpys_and_scipys(interpolation, dtype):
    generator = np.random.default_rng(7)
    axis = 6564.6 + np.cumsum(generator.uniform(0.1, 0.3, 15)) - 1.5
    spectra = generator.uniform(0.5, 2.0, (40, 15)).astype(dtype)
    shift = generator.uniform(-0.25, 0.25, 40)
    points = generator.uniform(axis[0] + 0.26, axis[-1] - 0.26, 31)
    found = interpolate_shifted(spectra, axis, points, shift.astype(dtype), interpolation)
    for pixel in range(40):
        own = axis + shift[pixel]
        expected = (
            np.interp(points, own, spectra[pixel])
            if interpolation == "linear"
            else PchipInterpolator(own, spectra[pixel])(points)
        )
        np.testing.assert_allclose(found[pixel], expected, rtol=2e-5 if dtype is np.float32 else 1e-10)
    assert found.dtype == dtype


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("interpolation", ["linear", "pchip"])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_pixel_is_interpolated_alike_whatever_is_beside_it(interpolation, dtype, shifted):
    """To the last bit: a part of a map has those of the whole."""
    generator = np.random.default_rng(9)
    lines = [
        generator.uniform(0.5, 2.0, (67, axis.size)).astype(dtype) for axis in (CRISP_HALPHA, CRISP_CA8542)
    ]
    shifts = generator.uniform(-0.02, 0.02, (2, 67)).astype(dtype) if shifted else (None, None)

    def of(pixels):
        some = [None if shift is None else shift[pixels] for shift in shifts]
        return network_lines(
            *(line[pixels] for line in lines),
            CRISP_HALPHA,
            CRISP_CA8542,
            LAYOUT,
            interpolation,
            shift_halpha=some[0],
            shift_ca8542=some[1],
        )[0]

    together = of(slice(None))
    for count in (1, 2, 3, 5, 16):
        for first in (0, 17, 40):
            some = slice(first, first + count)
            np.testing.assert_array_equal(of(some), together[some])


@pytest.mark.parametrize("interpolation", ["linear", "pchip"])
def test_no_shift_is_the_common_axis(interpolation):
    """Beyond the ends, too: the window overshoots CRISP's H-alpha axis."""
    spectra = np.random.default_rng(8).uniform(0.5, 2.0, (9, 15))
    expected = interpolate(spectra, CRISP_HALPHA, HALPHA.wavelengths, interpolation)
    found = interpolate_shifted(spectra, CRISP_HALPHA, HALPHA.wavelengths, np.zeros(9), interpolation)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("interpolation", ["linear", "pchip"])
def test_a_shifted_straight_line_is_exact_and_extrapolated(interpolation):
    shift = np.array([-0.06, 0.0, 0.03, 0.12])
    own = CRISP_HALPHA + shift[:, None]
    spectra = 3.0 * (own - 6564.0) + 10.0
    points = HALPHA.wavelengths
    found = interpolate_shifted(spectra, CRISP_HALPHA, points, shift, interpolation)
    np.testing.assert_allclose(found, np.broadcast_to(3.0 * (points - 6564.0) + 10.0, (4, 30)), rtol=1e-12)


def test_a_pixel_whose_wavelengths_do_not_reach_has_no_profile():
    """The window ends 0.026 Angstrom beyond the axis, which serves 0.1; to the blue 0.126 are to spare."""
    shift = np.array([-0.0741, -0.0739, 0.0, 0.1259, 0.1261, np.nan])
    reached = np.array([False, True, True, True, False, False])
    np.testing.assert_array_equal(covered(CRISP_HALPHA, HALPHA, shift), reached)
    spectra = np.ones((6, 15))
    found = interpolate_shifted(spectra, CRISP_HALPHA, HALPHA.wavelengths, shift)
    np.testing.assert_array_equal(np.isfinite(found).all(axis=1), reached)
    assert np.isnan(found[~reached]).all()
    assert covers(CRISP_HALPHA, HALPHA)


def test_shifted_lines_beside_lines_that_are_not():
    generator = np.random.default_rng(9)
    halpha = generator.uniform(0.5, 2.0, (7, 15))
    ca8542 = generator.uniform(0.2, 1.0, (7, 25))
    halpha[2, 0] = np.nan
    shift = generator.uniform(-0.05, 0.05, 7)
    lines, scale = network_lines(halpha, ca8542, CRISP_HALPHA, CRISP_CA8542, LAYOUT, shift_ca8542=shift)
    unshifted, _ = network_lines(halpha, ca8542, CRISP_HALPHA, CRISP_CA8542, LAYOUT)
    assert np.isnan(lines[2]).all()
    good = np.delete(np.arange(7), 2)
    for pixel in good:
        expected = np.interp(CA8542.wavelengths, CRISP_CA8542 + shift[pixel], ca8542[pixel])
        np.testing.assert_allclose(lines[pixel, 30:] * scale[pixel], expected, rtol=1e-10)
    np.testing.assert_allclose((lines * scale[:, None])[good, :30], (unshifted * scale[:, None])[good, :30])


# Other array libraries

# Its arrays lie on a device that is not the host, as far as the standard allows anyone to see.
ELSEWHERE = array_api_strict.Device("device1")


def on_strict_device(values):
    return array_api_strict.asarray(values, device=ELSEWHERE)


@pytest.mark.parametrize("interpolation", ["linear", "pchip"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("convert", [on_strict_device, torch.from_numpy])
def test_any_array_library_will_do_and_nothing_comes_to_the_host(convert, dtype, interpolation):
    generator = np.random.default_rng(6)
    halpha = generator.uniform(0.5, 2.0, (7, 15)).astype(dtype)
    ca8542 = generator.uniform(0.2, 1.0, (7, 25)).astype(dtype)
    halpha[3, 5] = np.nan
    axes = CRISP_HALPHA, CRISP_CA8542, LAYOUT, interpolation
    # one line on the axis that all pixels share, the other on each pixel's own
    shift = generator.uniform(-0.05, 0.05, 7).astype(dtype)
    expected = network_lines(halpha, ca8542, *axes, shift_ca8542=shift)
    assert [values.dtype for values in expected] == [dtype, dtype]
    arrays = convert(halpha), convert(ca8542)
    if convert is on_strict_device:
        with pytest.raises(RuntimeError, match="device"):
            np.asarray(arrays[0])
    for wanted, found in zip(
        expected, network_lines(*arrays, *axes, shift_ca8542=convert(shift)), strict=True
    ):
        assert type(found) is type(arrays[0])
        assert found.device == arrays[0].device
        assert found.dtype == arrays[0].dtype
        host = (
            found
            if isinstance(found, torch.Tensor)
            else found.to_device(array_api_strict.Device("CPU_DEVICE"))
        )
        np.testing.assert_allclose(np.asarray(host), wanted, rtol=20 * np.finfo(dtype).eps)
