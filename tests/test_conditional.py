"""The conditional flow: against autograd's Jacobian, a Gaussian's covariance, and its own inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from torch.utils.flop_counter import FlopCounterMode

from inn.conditional import ConditionalNetwork
from inn.errors import MisuseError
from inn.layout import Layout, LineWindow

SMALL = Layout(
    np.linspace(0.0, 2.0, 4),
    (LineWindow("halpha", 6564.61, 1.4, 5), LineWindow("ca8542", 8544.44, 1.0, 4)),
)


def scrambled(layout: Layout, dtype=torch.float64, strength=0.5, **settings) -> ConditionalNetwork:
    """A network whose every weight matters, as after training."""
    torch.manual_seed(7)
    network = ConditionalNetwork(layout, **settings).to(dtype)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, weights in network.named_parameters():
            if "last" in name or "guess" in name:
                noise = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
                weights.copy_(strength * noise / weights.shape[-1] ** 0.5)
    size = layout.atmosphere_size
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    atmosphere = torch.randn(400, size, generator=generator, dtype=torch.float64) @ mixing + 5.0
    lines = torch.rand(400, layout.lines_size, generator=generator, dtype=torch.float64)
    mu = torch.rand(400, generator=generator, dtype=torch.float64)
    network.fit_statistics(atmosphere, lines, mu, 0.2 * mu)
    return network.eval()


def conditions(layout: Layout, count: int, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    lines = torch.rand(count, layout.lines_size, generator=generator, dtype=torch.float64).to(dtype)
    mu = (0.2 + 0.8 * torch.rand(count, generator=generator, dtype=torch.float64)).to(dtype)
    latent = torch.randn(count, layout.atmosphere_size, generator=generator, dtype=torch.float64).to(dtype)
    return lines, mu, 0.1 * mu, latent


SHAPES = [{}, {"tails": True}, {"normal_scores": True}, {"tails": True, "normal_scores": True}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_it_is_a_bijection_of_150_numbers(dtype, tolerance, shape):
    layout = Layout()
    network = scrambled(layout, dtype, **shape)
    lines, mu, error, latent = conditions(layout, 200, dtype)
    with torch.no_grad():
        atmosphere = network.inverse(lines, latent, mu, error)
        assert atmosphere.shape == (200, 150)
        again = network.inverse(lines, network.latent(atmosphere, lines, mu, error), mu, error)
        assert (again - atmosphere).abs().max() < tolerance
        returned = network.latent(network.inverse(lines, latent, mu, error), lines, mu, error)
        assert (returned - latent).abs().max() < 10 * tolerance


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_prob_is_the_normal_density_times_the_jacobian(shape):
    network = scrambled(SMALL, components=7, steps=4, hidden=16, context=6, embedding=16, **shape)
    lines, mu, error, latent = conditions(SMALL, 5)
    atmosphere = network.inverse(lines, latent, mu, error).detach()
    found = network.log_prob(atmosphere, lines, mu, error).detach().numpy()
    for row in range(5):
        one = slice(row, row + 1)
        jacobian = torch.autograd.functional.jacobian(
            lambda x, one=one: network.latent(x[None], lines[one], mu[one], error[one])[0], atmosphere[row]
        )
        _, log_determinant = np.linalg.slogdet(jacobian.numpy())
        expected = norm.logpdf(latent[row].numpy()).sum() + log_determinant
        assert found[row] == pytest.approx(expected, abs=1e-7)


def test_an_untrained_flow_is_the_training_set_s_gaussian():
    generator = np.random.default_rng(5)
    size = SMALL.atmosphere_size
    rotation, _ = np.linalg.qr(generator.normal(size=(size, size)))
    mixing = np.linspace(0.3, 2.0, size)[:, None] * rotation
    training = torch.from_numpy(generator.normal(size=(3000, size)) @ mixing + 3.0)
    lines, mu, error, _ = conditions(SMALL, 3000)
    network = ConditionalNetwork(SMALL, components=6, hidden=8, context=4, embedding=8).double()
    network.fit_statistics(training, lines, mu, error)
    gaussian = multivariate_normal(training.numpy().mean(axis=0), np.cov(training.numpy().T))
    points = training[:50]
    with torch.no_grad():
        found = network.log_prob(points, lines[:50], mu[:50], error[:50]).numpy()
    np.testing.assert_allclose(found, gaussian.logpdf(points.numpy()), atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shared_draws_are_the_same_as_drawing_for_each_pixel(shape):
    layout = Layout()
    network = scrambled(layout, **shape)
    lines, mu, error, latent = conditions(layout, 6)
    with torch.no_grad():
        shared = network.inverse_draws(lines, latent[:4], mu, error)
        assert shared.shape == (6, 4, 150)
        for pixel in range(6):
            one = slice(pixel, pixel + 1)
            expected = network.inverse(
                lines[one].expand(4, -1), latent[:4], mu[one].expand(4), error[one].expand(4)
            )
            torch.testing.assert_close(shared[pixel], expected, rtol=0, atol=1e-10)


def test_mu_is_required_and_the_calibration_error_has_a_default():
    layout = Layout()
    network = scrambled(layout, default_calibration_error=0.08)
    lines, mu, _, latent = conditions(layout, 3)
    with pytest.raises(MisuseError, match="mu"):
        network.inverse(lines, latent)
    with torch.no_grad():
        given = network.inverse(lines, latent, mu, torch.full_like(mu, 0.08))
        torch.testing.assert_close(network.inverse(lines, latent, mu), given, rtol=0, atol=0)
        torch.testing.assert_close(network.inverse(lines, latent, mu, 0.08), given, rtol=0, atol=0)
        assert not torch.equal(network.inverse(lines, latent, mu, 0.01), given)
        assert not torch.equal(network.inverse(lines, latent, 0.5, 0.08), given)


def test_a_network_is_rebuilt_from_its_architecture_and_weights():
    network = scrambled(SMALL, components=5, steps=3, hidden=8, context=4, embedding=8)
    again = ConditionalNetwork.from_architecture(SMALL, network.architecture()).double()
    again.load_state_dict(network.state_dict())
    lines, mu, error, latent = conditions(SMALL, 4)
    torch.testing.assert_close(
        again.eval().inverse(lines, latent, mu, error), network.inverse(lines, latent, mu, error)
    )


def test_components_beyond_an_atmosphere_are_refused():
    with pytest.raises(MisuseError, match="components"):
        ConditionalNetwork(SMALL, components=13)


def test_a_draw_costs_little_and_the_weights_are_small():
    layout = Layout()
    network = ConditionalNetwork(layout).eval()
    lines, mu, error, latent = conditions(layout, 128, torch.float32)
    counts = []
    for draws in (64, 128):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.inverse_draws(lines[:16], latent[:draws], mu[:16], error[:16])
        counts.append(counter.get_total_flops())
    assert (counts[1] - counts[0]) / (16 * 64) < 0.4e6
    assert sum(weights.numel() for weights in network.parameters()) * 4 < 2e6
