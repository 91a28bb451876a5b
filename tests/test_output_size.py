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


def test_the_sampling_error_is_the_deviation_from_seed_to_seed():
    seeds = [normal_posteriors(pixels=400, off=off) for off in (0.0, 0.2)]
    found = sampling_errors(seeds)
    # Two values, one of which is off by 0.2 spreads times a normal number z: their deviation is
    # 0.2 |z| / sqrt(2), of which the median is taken; the spread is 0.994 standard deviations.
    expected = 0.2 * norm.ppf(0.75) / np.sqrt(2) / 0.994458
    for values in found.values():
        np.testing.assert_allclose(values, expected, rtol=0.1)


def test_every_encoding_gives_back_what_it_was_given_and_says_what_it_takes():
    exact = normal_posteriors(pixels=300)
    sizes = {}
    for encoding in ENCODINGS:
        kept = rounded(exact, encoding.rounding)
        size, writing, reading = stored(kept, replace(encoding, side=min(encoding.side, 16)))  # it compares
        assert writing > 0
        assert reading > 0
        sizes[encoding.name] = size
        if encoding.rounding is None:
            assert kept is exact
    assert sizes["no rounding"] > sizes["as the engine does it"] > sizes["steps of 1/2"]
    assert sizes["no rounding"] < 3 * 5 * 6 * 4 * 1.2
