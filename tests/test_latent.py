"""Latent draws: normal, finite, reproducible, and worth more than random ones."""

import numpy as np
import pytest
import torch

from inn.errors import MisuseError
from inn.latent import draw_latent


@pytest.mark.parametrize("kind", ["sobol", "gaussian", "balanced"])
def test_shape_dtype_and_moments(kind):
    latent = draw_latent(4096, 150, seed=3, kind=kind)
    assert latent.shape == (4096, 150)
    assert latent.dtype == torch.float32
    assert torch.isfinite(latent).all()
    assert latent.abs().max() < 6.3
    # Standard errors of 4,096 independent draws are 0.016 in the mean and 0.011 in the deviation.
    assert latent.mean(dim=0).abs().max() < 0.08
    assert (latent.std(dim=0) - 1.0).abs().max() < 0.06
    correlation = torch.corrcoef(latent.T) - torch.eye(150)
    assert correlation.square().mean().sqrt() < 0.025


@pytest.mark.parametrize("kind", ["sobol", "gaussian", "balanced"])
def test_the_arguments_alone_decide(kind):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draw_latent(64, 7, seed=11, kind=kind)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the legacy global state is what must not matter
    assert torch.equal(draw_latent(64, 7, seed=11, kind=kind), first)
    assert not torch.equal(draw_latent(64, 7, seed=12, kind=kind), first)


def test_sobol_points_are_evenly_spread():
    # Scrambling keeps what makes a Sobol sequence: 256 points fall one into each of 256 equal slices of any
    # coordinate, and of the first two coordinates one into each of 16 x 16 equal boxes.
    cube = torch.special.ndtr(draw_latent(256, 150, seed=5).double())
    for coordinate in cube.T:
        counts = torch.bincount((coordinate * 64).long(), minlength=64)
        assert torch.equal(counts, torch.full((64,), 4))
    boxes = (cube[:, 0] * 16).long() * 16 + (cube[:, 1] * 16).long()
    assert torch.equal(torch.bincount(boxes, minlength=256), torch.ones(256, dtype=torch.long))


def root_mean_square_error(statistic, truth, kind):
    errors = [statistic(draw_latent(256, 150, seed, kind).double()) - truth for seed in range(40)]
    return float(torch.stack(errors).square().mean().sqrt())


def test_sobol_quantiles_are_better_than_random_ones():
    # A sum of all 150 latents, some of which matter more: its quantiles are a Gaussian's, exactly.
    weights = 0.8 ** torch.arange(150, dtype=torch.float64)
    levels = torch.tensor([0.05, 0.16, 0.5, 0.84, 0.95], dtype=torch.float64)
    truth = torch.special.ndtri(levels) * weights.norm()

    def quantiles(latent):
        return torch.quantile(latent @ weights, levels)

    sobol, gaussian = (root_mean_square_error(quantiles, truth, kind) for kind in ("sobol", "gaussian"))
    assert sobol < 0.75 * gaussian


def test_sobol_means_are_much_better_than_random_ones():
    # A lognormal's mean is exp(half its variance).
    weights = 0.3 * 0.8 ** torch.arange(150, dtype=torch.float64)
    truth = torch.exp(0.5 * weights.square().sum())

    def mean(latent):
        return torch.exp(latent @ weights).mean()

    sobol, gaussian = (root_mean_square_error(mean, truth, kind) for kind in ("sobol", "gaussian"))
    assert sobol < 0.25 * gaussian


@pytest.mark.parametrize("draws", [2, 64, 256, 1000])
def test_balanced_points_have_a_normal_distribution_s_mean_and_covariance(draws):
    latent = draw_latent(draws, 150, seed=4, kind="balanced").double()
    leading = latent[:, : draws // 2]
    covariance = leading.T @ leading / draws
    np.testing.assert_allclose(covariance, np.eye(len(covariance)), atol=1e-6)
    assert torch.equal(latent.sum(dim=0), torch.zeros(150, dtype=torch.float64))
    assert torch.equal(latent[: draws // 2], -latent[draws // 2 :])


def test_an_odd_number_of_balanced_points_lacks_one_opposite():
    whole, odd = (draw_latent(draws, 7, seed=4, kind="balanced") for draws in (10, 9))
    assert torch.equal(odd, whole[:9])
    assert torch.isfinite(draw_latent(1, 7, seed=4, kind="balanced")).all()


def test_balanced_points_serve_as_well_as_half_again_as_many_sobol_points():
    # Linear forms of 32 dimensions, with falling weights: their quantiles are a Gaussian's, exactly.
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(150, 50, generator=generator, dtype=torch.float64)
    weights *= (torch.arange(150) < 32)[:, None] / (1.0 + torch.arange(150))[:, None] ** 0.5
    weights /= weights.norm(dim=0)
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    truth = torch.special.ndtri(levels)[:, None]

    def error(kind, draws):
        found = [draw_latent(draws, 150, seed, kind).double() @ weights for seed in range(20)]
        errors = torch.stack([torch.quantile(values, levels, dim=0) - truth for values in found])
        return float(errors.square().mean().sqrt())

    assert error("balanced", 64) < error("sobol", 96)


def test_points_on_the_edge_stay_finite(monkeypatch):
    edges = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    monkeypatch.setattr("inn.latent.SobolEngine.draw", lambda self, n, dtype: edges)
    latent = draw_latent(2, 2, seed=0)
    assert torch.isfinite(latent).all()
    np.testing.assert_allclose(latent[0], [-6.1208, 6.1208], atol=1e-3)


@pytest.mark.parametrize("arguments", [(0, 5, 0), (5, 0, 0), (5, 5, 0, "halton"), (2, 21202, 0)], ids=str)
def test_misuse(arguments):
    with pytest.raises(MisuseError):
        draw_latent(*arguments)
