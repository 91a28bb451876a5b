"""What every network must obey, whatever it is."""

import json

import pytest
import torch

from inn.checkpoint import load_model, save_model
from inn.conditional import ConditionalNetwork
from inn.joint import JointNetwork
from inn.latent import draw_latent
from inn.layout import Layout, LineWindow
from inn.precision import products_in

ROWS = 64
OTHER_LAYOUT = Layout(
    [0.0, 0.4, 1.1, 2.5], (LineWindow("halpha", 6564.61, 1.4, 7), LineWindow("ca8542", 8544.44, 1.0, 5))
)


def joint():
    return JointNetwork(Layout())


def joint_of_another_layout():
    return JointNetwork(OTHER_LAYOUT, latent_size=9, width=31, blocks=3)


def conditional():
    return ConditionalNetwork(Layout())


def conditional_of_another_layout():
    return ConditionalNetwork(OTHER_LAYOUT, components=6, hidden=8, steps=2)


NETWORKS = [joint, joint_of_another_layout, conditional, conditional_of_another_layout]
PRECISIONS = [(torch.float32, 1e-4), (torch.float64, 1e-9)]


def trained(build, dtype=torch.float32):
    """A network whose weights are none of its initial ones, so that no part of it does nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = build()
        with torch.no_grad():
            for values in network.parameters():
                values.add_(0.03 * torch.randn(values.shape))
    return network.to(dtype).eval()


def inputs(network, dtype):
    generator = torch.Generator().manual_seed(8)
    lines = torch.rand(ROWS, network.layout.lines_size, generator=generator, dtype=torch.float64) + 0.01
    lines = lines / lines.amax(dim=1, keepdim=True)
    latent = draw_latent(ROWS, network.latent_size, seed=9)
    mu = torch.linspace(0.3, 1.0, ROWS)
    return lines.to(dtype), latent.to(dtype), mu.to(dtype)


def there_and_back(network, lines, latent, mu):
    """Latents taken to atmospheres and back to latents, with whatever else the network's bijection needs."""
    if isinstance(network, JointNetwork):
        y = network.pad_lines(lines, latent)
        return network.forward_padded(network.inverse_padded(y))[:, network.latent_slice]
    return network.latent(network.inverse(lines, latent, mu), lines, mu)


@pytest.mark.parametrize("build", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@torch.no_grad()
def test_invertible(build, dtype, tolerance):
    network = trained(build, dtype)
    lines, latent, mu = inputs(network, dtype)
    returned = there_and_back(network, lines, latent, mu)
    torch.testing.assert_close(returned, latent, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("build", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_shape_and_dtype(build, dtype):
    network = trained(build, dtype)
    lines, latent, mu = inputs(network, dtype)
    atmosphere = network.inverse(lines, latent, mu)
    assert atmosphere.shape == (ROWS, network.layout.atmosphere_size)
    assert atmosphere.dtype == dtype
    assert torch.isfinite(atmosphere).all()


def pairs(network, lines, latent, mu):
    """Every line with every latent, one call for each line."""
    return torch.stack(
        [
            network.inverse(one.expand(len(latent), -1), latent, angle.expand(len(latent)))
            for one, angle in zip(lines, mu, strict=True)
        ]
    )


@pytest.mark.parametrize("build", NETWORKS)
@torch.no_grad()
def test_draws_that_all_pixels_share_are_those_of_each_pixel(build):
    network = trained(build, torch.float64)
    lines, latent, mu = inputs(network, torch.float64)
    lines, mu, latent = lines[:5], mu[:5], latent[:7]
    torch.testing.assert_close(
        network.inverse_draws(lines, latent, mu), pairs(network, lines, latent, mu), rtol=0.0, atol=1e-10
    )


@pytest.mark.parametrize("build", NETWORKS)
@torch.no_grad()
def test_half_precision_keeps_its_last_products_in_full(build):
    """Whatever bfloat16 does inside coupling networks, an atmosphere far from zero is not rounded to it."""
    network = trained(build)
    lines, latent, mu = inputs(network, torch.float32)
    full = network.inverse_draws(lines[:9], latent[:8], mu[:9])
    with products_in("bfloat16", lines.device):
        half = network.inverse_draws(lines[:9], latent[:8], mu[:9])
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    spread = full.std(dim=1, keepdim=True)
    assert ((half - full) / spread).square().mean().sqrt() < 0.02
    if isinstance(network, JointNetwork):  # numbers that bfloat16 does not have
        assert (half != half.bfloat16().float()).float().mean() > 0.99


@pytest.mark.parametrize("build", NETWORKS)
@torch.no_grad()
def test_latent_and_lines_both_matter(build):
    network = trained(build)
    lines, latent, mu = inputs(network, torch.float32)
    atmosphere = network.inverse(lines, latent, mu)
    assert not torch.equal(network.inverse(lines.flip(0), latent, mu.flip(0)), atmosphere)
    assert not torch.equal(network.inverse(lines, latent.flip(0), mu), atmosphere)


@pytest.mark.parametrize("build", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_saved_and_loaded(build, dtype, tmp_path):
    network = trained(build, dtype).train()
    before = torch.get_rng_state()
    save_model(network, tmp_path / "model", {"epochs": 3})
    loaded = load_model(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded) is type(network)
    assert not loaded.training
    assert loaded.layout == network.layout
    assert loaded.latent_size == network.latent_size
    assert loaded.record == {"epochs": 3}
    assert loaded.novelty is None
    assert loaded.emulator is None
    network.eval()
    lines, latent, mu = inputs(network, dtype)
    assert torch.equal(loaded.inverse(lines, latent, mu), network.inverse(lines, latent, mu))
    assert {name: values.dtype for name, values in loaded.state_dict().items()} == {
        name: values.dtype for name, values in network.state_dict().items()
    }
    assert all(values.requires_grad for values in loaded.parameters())


@pytest.mark.parametrize("build", NETWORKS)
def test_architecture_rebuilds_the_network(build):
    network = build()
    stored = json.loads(json.dumps(network.architecture()))
    again = type(network).from_architecture(network.layout, stored)
    assert again.architecture() == network.architecture()
    assert {name: values.shape for name, values in again.state_dict().items()} == {
        name: values.shape for name, values in network.state_dict().items()
    }


@pytest.mark.parametrize("build", NETWORKS)
def test_repr_names_the_network(build):
    assert repr(build()).startswith(type(build()).__name__ + "(")
