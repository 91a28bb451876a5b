"""Tuned latents, for posteriors whose quantiles are known in closed form."""

import io

import numpy as np
import pytest
import torch
from fake_model import fake_network
from scipy.stats import norm
from torch import nn

from inn.checkpoint import load_model, save_model
from inn.distillation import LEVELS, Answered, LatentSchedule, LatentTrainer, answered
from inn.errors import MisuseError
from inn.latent import TunedLatents, draw_latent
from inn.layout import Layout, LineWindow
from inn.posterior import latents_of, order_statistics, posterior_quantiles

SMALL = Layout(
    np.linspace(0.0, 2.0, 2),
    (LineWindow("halpha", 6564.61, 1.4, 4), LineWindow("ca8542", 8544.44, 1.0, 4)),
)
SCHEDULE = LatentSchedule(
    draws=(12, 24), epochs=4, steps=60, rows=384, observations=256, held_out=64, teacher_draws=2048
)


class Gaussian(nn.Module):
    """Six numbers with a normal posterior: mean and covariance follow the lines."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layout, self.latent_size = SMALL, 6
        self.mixing = nn.Parameter(torch.randn(6, 6, generator=generator))
        self.spread = nn.Parameter(0.4 * torch.randn(8, 6, generator=generator))
        self.latents = TunedLatents(6, SCHEDULE.draws)

    def factors(self, lines):
        """Matrices (n, 6, 6) that take latents to atmospheres."""
        return self.mixing * (lines @ self.spread).exp()[:, None, :]

    def inverse_draws(self, lines, latent, mu, calibration_error):
        return lines[:, None, :6] + latent @ self.factors(lines).mT

    def quantiles(self, lines):
        deviation = self.factors(lines).square().sum(dim=-1).sqrt()
        return lines[:, None, :6] + torch.from_numpy(norm.ppf(LEVELS))[:, None] * deviation[:, None]


def observed(count: int, seed: int) -> Answered:
    lines = torch.rand(count, 8, generator=torch.Generator().manual_seed(seed))
    return Answered(lines, torch.ones(count), torch.zeros(count), torch.empty(count, 0, 6))


def trainer() -> LatentTrainer:
    network = Gaussian()
    taught, held_out = (
        answered(network, observed(count, seed), SCHEDULE.teacher_draws)
        for count, seed in ((SCHEDULE.observations, 0), (SCHEDULE.held_out, 1))
    )
    return LatentTrainer(network, taught, held_out, SCHEDULE)


def error(network, latent, lines):
    """Root mean square error of quantiles over the posterior's spread, against the closed form."""
    with torch.no_grad():
        ordered = network.inverse_draws(lines, latent, None, None).transpose(1, 2).sort(dim=-1).values
        truth = network.quantiles(lines)
        spread = 0.5 * (truth[:, LEVELS.index(0.84)] - truth[:, LEVELS.index(0.16)])
        return float(
            ((order_statistics(ordered, np.array(LEVELS)) - truth) / spread[:, None]).square().mean().sqrt()
        )


@pytest.fixture(scope="module")
def tuned():
    finished = trainer()
    finished.run()
    return finished


def test_the_teacher_knows_quantiles_in_closed_form():
    network, some = Gaussian(), observed(50, 2)
    found = answered(network, some, 4096).quantiles
    truth = network.quantiles(some.lines)
    spread = 0.5 * (truth[:, LEVELS.index(0.84)] - truth[:, LEVELS.index(0.16)])
    assert found.shape == (50, len(LEVELS), 6)
    # 4,096 independent draws would err by 1.25 / 64 at the median, twice that at 5 and 95 %.
    assert ((found - truth) / spread[:, None]).square().mean().sqrt() < 0.01


def test_tuned_latents_err_less_than_twice_as_many_drawn_ones(tuned):
    network = tuned._network
    lines = observed(400, 5).lines
    for draws in SCHEDULE.draws:
        mine = error(network, network.latents(draws), lines)
        for kind in ("balanced", "sobol", "gaussian"):
            drawn = [error(network, draw_latent(2 * draws, 6, seed, kind), lines) for seed in range(6)]
            assert mine < np.sqrt(np.mean(np.square(drawn)))


def test_the_held_out_error_falls_and_the_teacher_stays_as_it_was(tuned):
    losses = [epoch.held_out_loss for epoch in tuned.history]
    assert losses[-1] < 0.5 * losses[0] or losses[-1] < 1e-3
    fresh = Gaussian()
    assert torch.equal(tuned._network.mixing, fresh.mixing)
    assert torch.equal(tuned._network.spread, fresh.spread)
    assert not torch.equal(tuned._network.latents(12), fresh.latents(12))


def test_tuning_goes_on_bit_for_bit_from_its_state():
    whole, first = trainer(), trainer()
    for _ in range(70):
        whole.step()
    for _ in range(65):
        first.step()
    stored = io.BytesIO()
    torch.save(first.state(), stored)
    stored.seek(0)
    second = trainer()
    second.restore(torch.load(stored, weights_only=True))
    for _ in range(5):
        second.step()
    for draws in SCHEDULE.draws:
        assert torch.equal(whole.module(draws), second.module(draws))


def test_a_network_keeps_its_latents_in_its_directory(tmp_path):
    network = fake_network()
    network.latents = TunedLatents(network.latent_size, (8, 4))
    with torch.no_grad():
        for points in network.latents.parameters():
            points.add_(0.25)
    network.latents.half()
    save_model(network, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    for draws in (4, 8):
        expected = draw_latent(draws, network.latent_size, 0, "balanced") + 0.25
        found = latents_of(loaded, draws, 0, "tuned")
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    lines = torch.rand(3, network.layout.lines_size).numpy()
    one, two = (
        posterior_quantiles(loaded, lines, 0.7, draws=8, seed=seed, latent="tuned")["velocity"]
        for seed in (0, 1)
    )
    np.testing.assert_array_equal(one, two)  # tuned latents have no seed
    with pytest.raises(MisuseError, match="no tuned latents of this number"):
        latents_of(loaded, 16, 0, "tuned")
    with pytest.raises(MisuseError, match="brings no latents"):
        latents_of(fake_network(), 8, 0, "tuned")
