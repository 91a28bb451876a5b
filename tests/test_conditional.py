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
    network.calibrate(*(values.to(dtype) for values in (atmosphere, lines, mu, 0.2 * mu)))
    return network.eval()


def conditions(layout: Layout, count: int, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    lines = torch.rand(count, layout.lines_size, generator=generator, dtype=torch.float64).to(dtype)
    mu = (0.2 + 0.8 * torch.rand(count, generator=generator, dtype=torch.float64)).to(dtype)
    latent = torch.randn(count, layout.atmosphere_size, generator=generator, dtype=torch.float64).to(dtype)
    return lines, mu, 0.1 * mu, latent


SHAPES = [{}, {"normal_scores": True}, {"bins": 3}, {"components": 41, "steps": 5}]


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


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_log_prob_is_the_normal_density_times_the_jacobian(shape):
    sizes = {"components": 7, "steps": 4, "hidden": 16, "context": 6, "embedding": 16}
    network = scrambled(SMALL, **sizes | shape)
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


def test_what_the_lines_know_comes_first():
    # Of two numbers of one variance, one is a function of the lines but for a tenth of its spread, the other
    # of nothing: the regression must leave a tenth of the one and all of the other.
    generator = torch.Generator().manual_seed(5)
    lines, mu, error, _ = conditions(SMALL, 4000)
    atmosphere = torch.randn(4000, SMALL.atmosphere_size, generator=generator, dtype=torch.float64)
    known = (lines[:, 0] - 0.5) * (lines[:, 3] - 0.5)
    atmosphere[:, 2] = known / known.std() + 0.1 * atmosphere[:, 2]
    network = ConditionalNetwork(SMALL, components=6, hidden=8, context=4, embedding=8).double()
    network.fit_statistics(atmosphere, lines, mu, error)
    expected = torch.ones(SMALL.atmosphere_size, dtype=torch.float64)
    expected[2] = 0.1
    torch.testing.assert_close(network.atmosphere_scale, expected, rtol=0.08, atol=0)
    assert network.rotation[2, 0].abs() > 0.99


def test_electron_pressure_is_density_times_temperature():
    network = scrambled(SMALL, normal_scores=True, components=6, steps=2, hidden=8, context=4, embedding=8)
    generator = torch.Generator().manual_seed(6)
    atmosphere = torch.randn(9, SMALL.atmosphere_size, generator=generator, dtype=torch.float64) + 5.0
    warmer = atmosphere.clone()
    warmer[:, 4:8] += 0.1  # dex
    warmer[:, :4] -= 0.1
    before, after = network.to_scores(atmosphere), network.to_scores(warmer)
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-9)
    assert (after[:, 4:8] > before[:, 4:8]).all()
    torch.testing.assert_close(before[:, 8:], after[:, 8:], rtol=0, atol=0)


def test_calibration_brings_held_out_latents_to_unit_width():
    network = scrambled(SMALL, components=6, steps=2, hidden=8, context=4, embedding=8)
    lines, mu, error, latent = conditions(SMALL, 3000)
    with torch.no_grad():
        truth = network.inverse(lines, latent * 1.3, mu, error)
        before = network.latent_scale.clone()
        network.calibrate(truth, lines, mu, error)
    ratio = (network.latent_scale / before).numpy()
    np.testing.assert_allclose(ratio, 1.3, rtol=0.06)  # of 3,000 examples: 2 % standard error
    with torch.no_grad():
        again = network.latent(truth, lines, mu, error)[:, :6].numpy()
    low, high = np.quantile(again, norm.cdf([-1.0, 1.0]), axis=0)
    np.testing.assert_allclose(0.5 * (high - low), 1.0, atol=1e-6)


def test_the_flow_is_told_the_blur_and_asked_without():
    network = scrambled(SMALL, components=6, steps=2, hidden=8, context=4, embedding=8)
    lines, mu, error, _ = conditions(SMALL, 4)
    with torch.no_grad():
        sharp = network.context(lines, mu, error)
        assert torch.equal(sharp, network.context(lines, mu, error, torch.zeros(4, dtype=torch.float64)))
        assert not torch.equal(sharp, network.context(lines, mu, error, torch.ones(4, dtype=torch.float64)))


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
