"""Normal scores: the normal distribution's own, an exact inverse, and no explosion outside the examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm

from inn.marginals import FURTHEST, NormalScores


def fitted(values):
    scale = NormalScores(values.shape[1]).double()
    scale.fit(values)
    return scale


def examples(count=20_000, seed=1):
    """A Gaussian, a lognormal, two narrow peaks far apart, and a number that never changes."""
    generator = np.random.default_rng(seed)
    peaks = np.where(generator.random(count) < 0.3, 6.2, 3.8) + 0.05 * generator.normal(size=count)
    columns = [3.0 * generator.normal(size=count) - 1.0, np.exp(generator.normal(size=count)), peaks]
    return torch.from_numpy(np.stack([*columns, np.full(count, 5.0)], axis=1))


def test_scores_of_other_examples_are_normally_distributed():
    scores = fitted(examples())(examples(5000, seed=2)).numpy()
    for column in range(3):
        assert kstest(scores[:, column], "norm").pvalue > 1e-3


def test_a_gaussian_is_standardised_and_a_lognormal_s_logarithm_taken():
    scale = fitted(examples(200_000))
    probability = np.array([0.02, 0.1, 0.3, 0.5, 0.8, 0.97])
    wanted = norm.ppf(probability)
    values = torch.from_numpy(np.stack([3.0 * wanted - 1.0, np.exp(wanted), wanted, wanted], axis=1))
    np.testing.assert_allclose(scale(values).numpy()[:, :2], np.stack([wanted, wanted], axis=1), atol=0.03)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_there_and_back(dtype, tolerance):
    scale = fitted(examples()).to(dtype)
    values = examples(3000, seed=3).to(dtype).reshape(3, 1000, 4)
    assert (scale.inverse(scale(values)) - values).abs().max() < tolerance
    scores = (6.0 * torch.rand(3000, 4, generator=torch.Generator().manual_seed(4)) - 3.0).to(dtype)
    assert (scale(scale.inverse(scores)) - scores).abs().max() < 100 * tolerance
    scores = torch.tensor([[-40.0] * 4, [-4.0] * 4, [5.0] * 4, [300.0] * 4], dtype=dtype)  # beyond the knots
    assert (scale(scale.inverse(scores)) / scores - 1.0).abs().max() < 100 * tolerance


def test_far_draws_remain_numbers_of_the_kind():
    scale = fitted(examples())
    values = scale.inverse(torch.tensor([[1e4] * 4, [-1e4] * 4], dtype=torch.float64))
    lowest, highest = (examples().amin(dim=0), examples().amax(dim=0))
    # A draw of ten thousand standard deviations, which no posterior should hold, stays within sight.
    beyond = torch.maximum(values[0] - highest, lowest - values[1])
    assert (beyond[:3] < 12.0 * (highest - lowest)[:3]).all()
    assert (values[0] > values[1]).all()


def test_it_ascends_and_its_slope_is_the_derivative():
    scale = fitted(examples())
    values = examples(500, seed=5).sort(dim=0).values
    assert (scale(values).diff(dim=0)[:, :3] >= 0.0).all()
    step = 1e-7
    slope = (scale(values + step) - scale(values - step)) / (2.0 * step)
    inside = (slope.log() - scale.log_slope(values)).abs() < 1e-4
    assert inside.double().mean() > 0.999  # all but points within a step of a knot


def test_what_lies_just_outside_of_the_examples_does_not_look_far_out():
    uniform = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    scale = fitted(uniform)
    beyond = scale(torch.tensor([[1.02], [-0.02]], dtype=torch.float64))
    assert beyond.abs().max() < FURTHEST + 0.5
    # A number that never changes keeps its place, and small departures stay small.
    constant = fitted(examples())(torch.tensor([[0.0, 1.0, 3.8, 5.001]], dtype=torch.float64))
    assert 0.0 < constant[0, 3] < 0.2


def test_a_new_one_is_the_identity_within_its_knots():
    values = 9.0 * torch.randn(50, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    inside = values.clamp(-FURTHEST, FURTHEST)
    torch.testing.assert_close(NormalScores(3).double()(inside), inside)
    torch.testing.assert_close(NormalScores(3).double().inverse(inside), inside)
