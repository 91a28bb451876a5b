"""CRISP's profile against textbook etalons and published widths; flat and sloping spectra stay."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq

from pipeline.crisp import instrument
from pipeline.crisp.instrument import (
    CAVITIES,
    REACH,
    REFLECTIVITIES,
    Prefilter,
    response_matrix,
    transmission,
)
from pipeline.errors import InputError, MisuseError

REST = {"halpha": 6564.61, "ca8542": 8544.44}


def half_width(line):
    return brentq(lambda offset: transmission(line, offset) - 0.5, 1e-4, 0.2, xtol=1e-8)


@pytest.mark.parametrize("line", REST)
def test_profile_is_that_of_two_lorentzians_seen_in_a_cone_of_light(line):
    # Near its peak an Airy function is a Lorentzian, whose width is the free spectral range over the finesse.
    widths = [
        REST[line] ** 2 / (2.0 * cavity) * (1.0 - reflectivity) / (np.pi * np.sqrt(reflectivity))
        for cavity, reflectivity in zip(CAVITIES, REFLECTIVITIES[line], strict=True)
    ]
    # A ray at angle a is tuned bluer by lambda a^2 / 2, evenly spread up to that of the f/165 cone's edge.
    edge = REST[line] * (0.5 / 165.0) ** 2 / 2.0
    shifts = np.linspace(-edge / 2.0, edge / 2.0, 2001)

    def expected(offset):
        return np.mean(np.prod([1.0 / (1.0 + (2.0 * (offset + shifts) / width) ** 2) for width in widths], 0))

    for offset in (0.01, 0.03, 0.06, 0.12, 0.3):
        assert transmission(line, offset) == pytest.approx(
            expected(offset) / expected(0.0), rel=0.02, abs=2e-4
        )


def test_widths_are_the_published_ones():
    # About 60 mA at H-alpha and 100 mA at 8542 in parallel light; the converging beam widens them a little.
    assert 2.0 * half_width("halpha") == pytest.approx(0.063, abs=0.004)
    assert 2.0 * half_width("ca8542") == pytest.approx(0.107, abs=0.006)


@pytest.mark.parametrize("line", REST)
def test_peak_stands_at_zero_and_little_lies_beyond(line):
    offset = np.linspace(-1.2, 1.2, 24001)
    profile = transmission(line, offset)
    assert abs(offset[profile.argmax()]) < 1e-3
    assert profile.max() == pytest.approx(1.0, abs=1e-6)
    assert abs((offset * profile).sum() / profile.sum()) < 2e-3
    assert profile[np.abs(offset) > REACH].sum() / profile.sum() < 0.006


@pytest.mark.parametrize("line", REST)
def test_flat_and_sloping_spectra_stay_and_a_narrow_line_is_smoothed(line):
    axis = np.linspace(-1.8, 1.8, 721)
    tuned = np.linspace(-1.0, 1.0, 21)
    matrix = response_matrix(line, axis, tuned)
    np.testing.assert_allclose(matrix @ np.ones(axis.size), 1.0, atol=1e-12)
    np.testing.assert_allclose(matrix @ axis, tuned, atol=1e-3)
    # A very narrow line becomes the profile itself.
    fine = np.linspace(-1.0, 1.0, 4001)
    spike = np.exp(-0.5 * (fine / 0.004) ** 2)
    seen = response_matrix(line, fine, np.array([0.0, half_width(line)])) @ spike
    assert seen[1] / seen[0] == pytest.approx(0.5, abs=0.02)


def test_what_cannot_be_measured_is_refused():
    axis = np.linspace(-1.4, 1.4, 113)
    with pytest.raises(InputError, match="too short"):
        response_matrix("ca8542", axis, [1.5])
    with pytest.raises(MisuseError, match="not known"):
        transmission("hbeta", 0.0)


def test_width_at_6302_is_the_designs(monkeypatch):
    """60 mA at 630 nm (doi:10.1051/0004-6361/202555819, table 1), with the same plates."""
    monkeypatch.setitem(REFLECTIVITIES, "fe6302", (0.935, 0.838))
    monkeypatch.setitem(instrument._REST, "fe6302", 6304.24)
    assert 2.0 * half_width("fe6302") == pytest.approx(0.060, abs=0.003)


def test_prefilter_is_half_at_half_its_width_and_tilts():
    wide = Prefilter("halpha", centre=6564.61, width=4.9)
    np.testing.assert_allclose(wide.transmission(6564.61 + np.array([-2.45, 0.0, 2.45])), [0.5, 1.0, 0.5])
    # A Butterworth curve's flat top: 1 - (2 x / width)^4 near the peak.
    assert wide.transmission(6564.61 + 0.5) == pytest.approx(1.0 - (1.0 / 4.9) ** 4, abs=1e-5)
    tilted = Prefilter("ca8542", centre=8544.44, width=9.3, slope=0.02, cubic=-0.001)
    offset = np.array([-1.0, 1.0])
    np.testing.assert_allclose(
        tilted.transmission(8544.44 + offset) * (1.0 + (2.0 / 9.3) ** 4), 1.0 + 0.019 * offset, rtol=1e-12
    )
    off = Prefilter("halpha", centre=6565.61, width=4.9).transmission(6564.61 + np.array([-1.4, 1.4]))
    assert off[1] / off[0] > 1.3
    for wrong in ({"line": "hbeta"}, {"width": 0.0}, {"cavities": -1.0}):
        with pytest.raises(MisuseError, match="not a prefilter"):
            Prefilter(**{"line": "halpha", "centre": 6564.61, "width": 4.9, **wrong})
