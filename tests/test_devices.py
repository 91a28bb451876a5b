"""Where a tile's numbers are computed: zero copies on the CPU, none to the host on any other device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import inn
from inn.latent import draw_latent
from inn.posterior import _quantiles, posterior_quantiles

LEVELS = np.array([0.05, 0.5, 0.95])


@pytest.fixture(scope="module")
def network():
    return inn.load_model()


@pytest.fixture(scope="module")
def lines(network):
    values = np.random.default_rng(1).uniform(0.2, 1.0, (20, network.layout.lines_size))
    values[3, 5] = np.nan
    return (values / np.nanmax(values, axis=1, keepdims=True)).astype(np.float32)


def test_lines_are_used_where_they_are(network, lines):
    """Arrays and tensors give the same bits; memory that may not be written to is left alone."""
    expected = posterior_quantiles(network, lines, 0.7, draws=16)
    frozen = lines.copy()
    frozen.setflags(write=False)
    for same in (torch.from_dlpack(lines), frozen, lines[::-1][::-1]):
        found = posterior_quantiles(network, same, 0.7, draws=16)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
    assert np.isnan(expected["velocity"][3]).all()
    assert np.isfinite(np.delete(expected["velocity"], 3, axis=0)).all()


def test_nothing_comes_to_the_host_before_the_sorting_is_done(network, lines):
    """On torch's device without memory every copy to the host, and every look at a number, fails."""
    elsewhere = inn.load_model().to("meta")
    tensor = torch.from_numpy(lines).to("meta")
    with pytest.raises(NotImplementedError):
        tensor.cpu()
    with pytest.raises(RuntimeError, match="meta"):
        tensor.isfinite().any().item()
    angle = np.full(len(lines), 0.7)
    found = _quantiles(elsewhere, tensor, angle, None, draw_latent(16, network.latent_size, 0), LEVELS, 64)
    assert found.device.type == "meta"
    assert found.shape == (len(lines), LEVELS.size, network.layout.atmosphere_size)
