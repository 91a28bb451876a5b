"""What the benchmark of the output's size measures with: sizes of files, errors in sampling errors."""

from dataclasses import replace

import numpy as np
import pytest
from benchmarks.output_size import (
    ENCODINGS,
    rounded,
    sampling_errors,
    scaled,
    stored,
    worst_error,
)
from scipy.stats import norm

from inn.layout import QUANTITIES
from inn.posterior import QUANTILES


def normal_posteriors(pixels=40, heights=6, off=0.0):
    """Quantiles of normal posteriors of spread 0.5 (of the logarithm), off by some spreads at random."""
    random = np.random.default_rng(3)
    centre = random.normal(8.0, 1.0, (pixels, 1, heights))
    moved = centre + 0.5 * off * np.random.default_rng(round(1e3 * off)).normal(size=(pixels, 5, heights))
    values = moved + 0.5 * norm.ppf(QUANTILES)[:, None]
    return {
        quantity: (values if quantity == "velocity" else np.exp(values)).astype(np.float32)
        for quantity in QUANTITIES
    }


def test_errors_are_in_units_of_the_sampling_error():
    exact = normal_posteriors()
    assert worst_error(exact, exact, {name: np.full(5, 0.05) for name in QUANTITIES}) == 0.0
    # In the logarithm, and in spreads (the 16 and 84 % quantiles lie 0.994 standard deviations off).
    wrong = {name: (scaled(name, values) + 0.01) for name, values in exact.items()}
    wrong = {name: values if name == "velocity" else np.exp(values) for name, values in wrong.items()}
    found = worst_error(wrong, exact, {name: np.array([0.05, 0.1, 0.1, 0.1, 0.1]) for name in QUANTITIES})
    assert found == pytest.approx(0.01 / (0.5 * 0.994458) / 0.05, rel=1e-3)


def test_the_sampling_error_is_the_deviation_from_many_draws():
    truth, drawn = (normal_posteriors(pixels=400, off=off) for off in (0.0, 0.2))
    found = sampling_errors(drawn, truth)
    # Off by 0.2 standard deviations times a normal number, of whose size the median is taken; the spread is
    # 0.994 standard deviations.
    expected = 0.2 * norm.ppf(0.75) / 0.994458
    for values in found.values():
        np.testing.assert_allclose(values, expected, rtol=0.1)


def test_every_encoding_gives_back_what_it_was_given_and_says_what_it_takes():
    exact = normal_posteriors(pixels=300)
    sizes = {}
    for encoding in ENCODINGS:
        kept = rounded(exact, encoding.rounding, draws=256)
        size, writing, reading = stored(kept, replace(encoding, side=min(encoding.side, 16)))  # it compares
        assert writing > 0
        assert reading > 0
        sizes[encoding.name] = size
        if encoding.rounding is None:
            assert kept is exact
    assert sizes["no rounding"] > sizes["as the engine does it"] > sizes["steps of 1/2"]
    assert sizes["no rounding"] < 3 * 5 * 6 * 4 * 1.2


def test_tiles_of_an_odd_number_of_pixels_compress_as_well():
    kept = rounded(normal_posteriors(pixels=882), ENCODINGS[0].rounding, draws=64)
    even, odd = (stored(kept, replace(ENCODINGS[0], side=side))[0] for side in (20, 21))
    assert 21**2 * 6 % 8 != 0  # for which Blosc shuffles no bits
    assert odd < 1.2 * even
