"""Batched sampling: against numpy.quantile, the normal distribution, and pixels taken one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from inn import posterior
from inn.checkpoint import load_model
from inn.conditional import ConditionalNetwork
from inn.emulator import Emulator
from inn.errors import MisuseError
from inn.joint import JointNetwork
from inn.latent import draw_latent
from inn.layout import QUANTITIES, Layout
from inn.posterior import misfit, posterior_quantiles, sample
from inn.scaling import scale, unscale_atmosphere

LAYOUT = Layout()


@pytest.fixture(scope="module")
def network() -> ConditionalNetwork:
    torch.manual_seed(0)
    model = ConditionalNetwork(LAYOUT, components=20, steps=4, hidden=48, context=16, embedding=32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.05 * torch.randn(weights.shape, generator=generator))
    centre = torch.cat([torch.full((50,), level) for level in (12.0, 4.0, 0.3)])
    atmosphere = centre + 0.3 * torch.randn(500, 150, generator=generator)
    lines = torch.rand(500, 60, generator=generator)
    mu = torch.rand(500, generator=generator)
    model.fit_statistics(atmosphere, lines, mu, 0.2 * mu)
    return model.eval()


def pixels(count: int, seed: int = 2):
    generator = np.random.default_rng(seed)
    return generator.uniform(0.1, 1.0, (count, 60)).astype(np.float32), generator.uniform(0.3, 1.0, count)


def test_quantiles_are_numpy_s_of_the_draws(network):
    lines, mu = pixels(9)
    levels = (0.0, 0.05, 0.16, 0.5, 0.84, 0.95, 1.0)
    found = posterior_quantiles(network, lines, mu, 0.05, draws=100, quantiles=levels, seed=4)
    draws = sample(network, lines, mu, 0.05, draws=100, seed=4)
    for quantity in QUANTITIES:
        assert found[quantity].shape == (9, 7, 50)
        assert draws[quantity].shape == (9, 100, 50)
        expected = np.quantile(scale(quantity, draws[quantity].astype(np.float64)), levels, axis=1)
        np.testing.assert_allclose(
            scale(quantity, found[quantity].astype(np.float64)), expected.swapaxes(0, 1), atol=3e-6
        )
        # In physical units, too, whatever order of interpolation and scaling.
        physical = np.quantile(draws[quantity].astype(np.float64), levels, axis=1).swapaxes(0, 1)
        spread = physical[:, -1:] - physical[:, :1]
        assert (np.abs(found[quantity] - physical) / spread).max() < 0.02


def test_a_gaussian_posterior_has_the_normal_distribution_s_quantiles():
    model = ConditionalNetwork(LAYOUT).double().eval()  # untrained: standard normal in network units
    levels = (0.05, 0.16, 0.5, 0.84, 0.95)
    found = posterior_quantiles(model, np.full((1, 60), 0.5), 0.5, draws=4096, quantiles=levels)
    for quantity in QUANTITIES:
        scaled = scale(quantity, found[quantity])[0]
        np.testing.assert_allclose(scaled, np.tile(norm.ppf(levels)[:, None], 50), atol=0.02)


def test_a_pixel_s_numbers_do_not_depend_on_its_neighbours(network):
    lines, mu = pixels(70)
    whole = posterior_quantiles(network, lines, mu, draws=64, batch_rows=1024)
    order = np.random.default_rng(5).permutation(70)[:23]
    some = posterior_quantiles(network, lines[order], mu[order], draws=64, batch_rows=1024)
    other = posterior_quantiles(network, lines, mu, draws=64, batch_rows=320)
    for quantity in QUANTITIES:
        np.testing.assert_array_equal(some[quantity], whole[quantity][order])
        np.testing.assert_allclose(other[quantity], whole[quantity], rtol=2e-4, atol=1e-4)


def test_bad_pixels_are_nan_and_leave_the_others_alone(network):
    lines, mu = pixels(40)
    clean = posterior_quantiles(network, lines, mu, draws=32)
    spoiled, angle = lines.copy(), mu.copy()
    spoiled[3, 7], spoiled[11] = np.nan, np.inf
    angle[20] = np.nan
    found = posterior_quantiles(network, spoiled, angle, draws=32)
    drawn = sample(network, spoiled, angle, draws=32)
    bad = np.isin(np.arange(40), (3, 11, 20))
    for quantity in QUANTITIES:
        assert np.isnan(found[quantity][bad]).all()
        assert np.isnan(drawn[quantity][bad]).all()
        np.testing.assert_array_equal(found[quantity][~bad], clean[quantity][~bad])


def test_pixels_left_out_keep_their_places_and_whole_batches_of_them_cost_nothing(network, monkeypatch):
    network.emulator = Emulator(LAYOUT, width=8, depth=1).eval()
    lines, mu = pixels(40)
    some = lines.copy()
    some[5:33] = np.nan  # batches of eight pixels: three of the five have none left
    try:
        whole = misfit(network, lines, mu, draws=32, batch_rows=256)
        passes = []
        real = network.score_draws
        monkeypatch.setattr(network, "score_draws", lambda *given: (passes.append(1), real(*given))[1])
        found = misfit(network, some, mu, draws=32, batch_rows=256)
    finally:
        network.emulator = None
    left = np.isfinite(some[:, 0])
    np.testing.assert_array_equal(found[left], whole[left])
    assert np.isnan(found[~left]).all()
    assert len(passes) == 2


def test_the_joint_network_is_sampled_alike():
    torch.manual_seed(3)
    model = JointNetwork(LAYOUT).eval()
    lines, _ = pixels(3)
    drawn = sample(model, lines, draws=16, seed=9, batch_rows=32)
    latent = draw_latent(16, model.latent_size, 9)
    with torch.no_grad():
        row = model.inverse(torch.from_numpy(lines[1:2]).expand(16, -1), latent)
    expected = unscale_atmosphere(row.numpy())
    for quantity in QUANTITIES:
        np.testing.assert_allclose(drawn[quantity][1], expected[quantity], rtol=1e-4, atol=1e-5)


def test_a_seed_decides_the_draws_and_kinds_differ(network):
    lines, mu = pixels(2)
    first = sample(network, lines, mu, draws=8, seed=1)["velocity"]
    np.testing.assert_array_equal(first, sample(network, lines, mu, draws=8, seed=1)["velocity"])
    assert not np.array_equal(first, sample(network, lines, mu, draws=8, seed=2)["velocity"])
    gaussian = sample(network, lines, mu, draws=8, seed=1, latent="gaussian")["velocity"]
    assert not np.array_equal(first, gaussian)


def test_the_misfit_is_the_distance_of_emulated_lines(network):
    lines, mu = pixels(5)
    lines[4, 0] = np.nan
    assert np.isnan(misfit(network, lines, mu)).all()  # no emulator yet
    emulator = Emulator(LAYOUT, width=8, depth=1)
    with torch.no_grad():
        for weights in emulator.parameters():
            weights.zero_()
        emulator.lines_mean.fill_(0.4)  # whatever the atmosphere, it emulates 0.4 everywhere
    network.emulator = emulator.eval()
    try:
        found = misfit(network, lines, mu)
    finally:
        network.emulator = None
    expected = np.sqrt(((lines - 0.4) ** 2).mean(axis=1))
    np.testing.assert_allclose(found[:4], expected[:4], rtol=1e-5)
    assert np.isnan(found[4])


def test_the_misfit_hardly_depends_on_the_precision_of_products(monkeypatch):
    network = load_model()
    random = torch.Generator().manual_seed(6)
    flat = torch.full((1, 60), 0.6)
    with torch.no_grad():  # lines that some atmospheres show, with noise
        atmosphere = network.inverse_draws(flat, torch.randn(40, 150, generator=random), mu=0.55)[0]
        lines = network.emulator(atmosphere, torch.full((40,), 5.0), torch.full((40,), 0.55))
    lines = (lines + 0.02 * torch.randn(lines.shape, generator=random)).numpy()
    found = []
    for precision in ("float32", "bfloat16"):
        monkeypatch.setattr(posterior, "fastest", lambda _, answer=precision: answer)
        found.append(misfit(network, lines, 0.55))
    assert np.quantile(found[0], 0.9) < 0.2  # profiles that mean something
    assert not np.array_equal(*found)
    np.testing.assert_allclose(found[1], found[0], rtol=0.02)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lines": np.zeros((3, 59))}, "one row per pixel"),
        ({"lines": np.zeros((3, 60)), "mu": np.zeros(2)}, "mu"),
        ({"lines": np.zeros((3, 60)), "mu": 0.5, "quantiles": (0.5, 1.5)}, "between 0 and 1"),
        ({"lines": np.zeros((3, 60)), "mu": 0.5, "draws": 0}, "at least one point"),
        ({"lines": np.zeros((3, 60)), "mu": 55.0}, "mu lies between"),
        (
            {"lines": np.zeros((3, 60)), "mu": 0.5, "calibration_error": -0.1},
            "calibration_error lies between",
        ),
        ({"lines": np.zeros((3, 60))}, "conditioned on mu"),
    ],
)
def test_misuse_is_told(network, arguments, words):
    with pytest.raises(MisuseError, match=words):
        posterior_quantiles(network, **arguments)


def test_no_pixels_give_empty_arrays(network):
    found = posterior_quantiles(network, np.zeros((0, 60)), np.zeros(0))
    assert found["velocity"].shape == (0, 5, 50)
