"""The published network: its arithmetic by hand, and its inverse over the whole range of its inputs."""

import numpy as np
import pytest
import torch

from inn.coupling import AffineCoupling, FixedPermutation, soft_clamp
from inn.errors import MisuseError, ModelError
from inn.joint import JointNetwork
from inn.latent import draw_latent
from inn.layout import Layout


def scaled_atmospheres(count, dtype):
    """Evenly spread over the scaled range: log ne 8 to 15.5, log T 3.3 to 7.5, signed log v -3 to 3."""
    generator = torch.Generator().manual_seed(0)
    low = torch.tensor([8.0, 3.3, -3.0], dtype=torch.float64)[:, None]
    high = torch.tensor([15.5, 7.5, 3.0], dtype=torch.float64)[:, None]
    share = torch.rand(count, 3, 50, generator=generator, dtype=torch.float64)
    share[0], share[1] = 0.0, 1.0
    return (low + (high - low) * share).reshape(count, 150).to(dtype)


def network(output_weights, dtype, seed=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        joint = JointNetwork(Layout())
        with torch.no_grad():
            for name, values in joint.named_parameters():
                if name.endswith("8.weight"):
                    values.normal_(std=output_weights)
    return joint.to(dtype)


def test_size_of_the_published_network():
    joint = JointNetwork(Layout())
    assert sum(values.numel() for values in joint.parameters()) == pytest.approx(11.8e6, rel=5e-3)
    multiplications = sum(values.numel() for values in joint.parameters() if values.ndim == 2)
    assert 2 * multiplications == pytest.approx(23.7e6, rel=5e-3)
    assert (joint.latent_size, joint.width) == (150, 384)
    assert (joint.latent_slice, joint.lines_slice) == (slice(0, 150), slice(324, 384))


def test_soft_clamp_is_the_published_one():
    raw = torch.tensor([-1e9, -1.0, 0.0, 1.0, 1e9], dtype=torch.float64)
    expected = 2.0 * 0.636 * np.arctan(raw.numpy())
    np.testing.assert_allclose(soft_clamp(raw), expected, rtol=1e-15)
    assert abs(soft_clamp(raw)).max() < 2.0


def test_coupling_by_hand():
    torch.manual_seed(2)
    coupling = AffineCoupling(6).double()

    def subnet(layers, x):
        weights = [values.detach().numpy() for values in layers.parameters()]
        for index in range(0, 8, 2):
            x = x @ weights[index].T + weights[index + 1]
            x = np.where(x > 0.0, x, (0.0 if index == 6 else 0.01) * x)
        return x @ weights[8].T + weights[9]

    with torch.no_grad():
        for values in coupling.parameters():
            values.normal_(std=0.7)
    x = np.random.default_rng(0).normal(size=(9, 6))
    x1, x2 = x[:, :3], x[:, 3:]
    y1 = np.exp(2.0 * 0.636 * np.arctan(subnet(coupling.s2, x2))) * x1 + subnet(coupling.t2, x2)
    y2 = np.exp(2.0 * 0.636 * np.arctan(subnet(coupling.s1, y1))) * x2 + subnet(coupling.t1, y1)
    found = coupling(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, np.hstack([y1, y2]), rtol=1e-12)


def test_permutations_are_the_published_ones():
    vectors = torch.arange(384)[None]
    for index in range(4):
        expected = np.random.RandomState(index).permutation(384)
        permutation = FixedPermutation.published(index, 384)
        np.testing.assert_array_equal(permutation(vectors)[0], expected)
        assert torch.equal(permutation.inverse(permutation(vectors)), vectors)
    joint = JointNetwork(Layout())
    assert [type(step).__name__ for step in joint.steps] == (["AffineCoupling", "FixedPermutation"] * 5)[:9]
    np.testing.assert_array_equal(joint.steps[7].order, np.random.RandomState(3).permutation(384))


@torch.no_grad()
def test_new_weights_are_the_published_ones():
    torch.manual_seed(0)
    joint = JointNetwork(Layout())
    outputs = torch.cat([v.flatten() for n, v in joint.named_parameters() if n.endswith("8.weight")])
    assert outputs.std() == pytest.approx(1e-3, rel=0.01)
    biases = torch.cat([v.flatten() for n, v in joint.named_parameters() if n.endswith("8.bias")])
    assert biases.abs().max() > 0.04  # torch's own initial biases, up to 1 / sqrt(384) = 0.051


# From the published initial output weights to a hundred times larger ones, whose forward pass already
# reaches 130, ten times what its inputs do.
@pytest.mark.parametrize("output_weights", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@torch.no_grad()
def test_invertible_over_the_whole_range(output_weights, dtype, tolerance):
    joint = network(output_weights, dtype)
    generator = torch.Generator().manual_seed(4)
    noise = 0.05 * torch.randn(500, 234, generator=generator, dtype=dtype)
    for padding in (None, noise):
        x = joint.pad_atmosphere(scaled_atmospheres(500, dtype), padding)
        assert (joint.inverse_padded(joint.forward_padded(x)) - x).abs().max() < tolerance

    latent = draw_latent(500, 150, seed=0).to(dtype)
    latent[0], latent[1], latent[2] = 6.2, -6.2, 0.0
    lines = torch.rand(500, 60, generator=generator, dtype=dtype)
    lines[0], lines[1] = 0.0, 1.0
    y = joint.pad_lines(lines, latent)
    assert (joint.forward_padded(joint.inverse_padded(y)) - y).abs().max() < tolerance


@torch.no_grad()
def test_vectors_are_put_together_as_published():
    joint = network(1e-2, torch.float64)
    atmosphere = scaled_atmospheres(5, torch.float64)
    lines, latent = joint(atmosphere)
    assert (lines.shape, latent.shape) == ((5, 60), (5, 150))
    whole = joint.forward_padded(torch.cat((atmosphere, torch.zeros(5, 234, dtype=torch.float64)), dim=1))
    assert torch.equal(whole[:, :150], latent)
    assert torch.equal(whole[:, -60:], lines)
    padding = whole[:, 150:-60]
    again = joint.inverse_padded(joint.pad_lines(lines, latent, padding))[:, :150]
    torch.testing.assert_close(again, atmosphere, rtol=0.0, atol=1e-9)
    y = torch.cat((latent, torch.zeros(5, 174, dtype=torch.float64), lines), dim=1)
    assert torch.equal(joint.inverse(lines, latent), joint.inverse_padded(y)[:, :150])


@torch.no_grad()
def test_viewing_angle_and_calibration_have_no_effect():
    joint = network(1e-2, torch.float32)
    lines, latent = torch.rand(3, 60), torch.randn(3, 150)
    plain = joint.inverse(lines, latent)
    assert torch.equal(joint.inverse(lines, latent, torch.full((3,), 0.5), torch.full((3,), 0.1)), plain)


@torch.no_grad()
def test_gradients_reach_every_weight():
    joint = JointNetwork(Layout([0.0, 1.0, 2.0]), latent_size=9, width=70)
    with torch.enable_grad():
        lines, latent = joint(torch.rand(4, 9))
        (lines.square().sum() + latent.square().sum()).backward()
    assert all(values.grad is not None and torch.isfinite(values.grad).all() for values in joint.parameters())


@pytest.mark.parametrize("width", [71, 72])
@torch.no_grad()
def test_odd_and_even_widths(width):
    joint = JointNetwork(Layout([0.0, 1.0, 2.0]), latent_size=9, width=width, blocks=3).double()
    x = torch.randn(4, width, dtype=torch.float64)
    torch.testing.assert_close(joint.inverse_padded(joint.forward_padded(x)), x, rtol=0.0, atol=1e-12)


@torch.no_grad()
def test_no_pixels_give_no_atmospheres():
    joint = JointNetwork(Layout())
    assert joint.inverse(torch.empty(0, 60), torch.empty(0, 150)).shape == (0, 150)


def test_vectors_of_another_length_are_refused():
    joint = JointNetwork(Layout())
    with pytest.raises(MisuseError, match=r"lines: .*\n.*31"):
        joint.inverse(torch.zeros(2, 31), torch.zeros(2, 150))
    with pytest.raises(MisuseError, match="latent"):
        joint.inverse(torch.zeros(2, 60), torch.zeros(2, 60))
    with pytest.raises(MisuseError, match="atmosphere"):
        joint(torch.zeros(2, 384))


@pytest.mark.parametrize(
    "arguments", [{"width": 149}, {"latent_size": 325}, {"blocks": 0}, {"latent_size": 0}]
)
def test_sizes_that_do_not_fit(arguments):
    with pytest.raises(ModelError, match="width"):
        JointNetwork(Layout(), **arguments)
