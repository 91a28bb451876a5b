"""A small network with random weights, a novelty measure and an emulator: fast, and the same every time."""

from pathlib import Path

import torch

from inn.checkpoint import save_model
from inn.conditional import ConditionalNetwork
from inn.emulator import Emulator
from inn.layout import Layout
from inn.novelty import Novelty


def fake_network() -> ConditionalNetwork:
    """A conditional network whose atmospheres are of a plausible size, whatever the lines."""
    layout = Layout()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        network = ConditionalNetwork(layout, components=6, steps=2, hidden=16, context=8, embedding=16)
        network.emulator = Emulator(layout, width=16, depth=1)
        with torch.no_grad():
            for values in network.parameters():
                values.add_(0.05 * torch.randn(values.shape))
            heights = torch.linspace(0, 1, layout.heights.size)
            network.atmosphere_mean.copy_(
                torch.cat((14.0 - 4.0 * heights, 3.7 + 2.3 * heights**2, 0.5 * heights))
            )
            network.atmosphere_scale.copy_(
                torch.cat((0.3 + heights, 0.05 + 0.3 * heights, 0.1 + 0.5 * heights))
            )
            network.component_scale.copy_(torch.linspace(1.0, 0.1, layout.atmosphere_size))
        training = torch.rand(800, layout.lines_size)
        held_out = torch.rand(300, layout.lines_size)
    network.novelty = Novelty.fitted(layout, training, held_out)
    network.record = {
        "grid": {"height_zero": "a test's own", "statistical_equilibrium": "none: a test's random numbers"},
        "metrics": list(range(1000)),
    }
    return network.eval()


def save_fake_model(path: Path) -> Path:
    """Write the fake network as a model directory."""
    network = fake_network()
    save_model(network, path, network.record)
    return path
