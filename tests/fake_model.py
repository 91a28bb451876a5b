"""A small network with random weights and all that one carries: fast, and the same every time."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from inn.checkpoint import save_model
from inn.conditional import ConditionalNetwork
from inn.distillation import PreviewSchedule, PreviewTrainer
from inn.emulator import Emulator
from inn.layout import Layout
from inn.novelty import Novelty
from inn.preview import Preview, disagreement
from pipeline.training_set import Batch


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
        "preview": {"disagreement": _taught(network)},
    }
    return network.eval()


def _observed(network: ConditionalNetwork, count: int, generator: torch.Generator) -> Batch:
    """Random lines with atmospheres drawn from their posteriors."""
    lines = 0.2 + 0.8 * torch.rand(count, network.layout.lines_size, generator=generator)
    mu, error = (torch.rand(count, generator=generator) for _ in range(2))
    latent = torch.randn(count, network.latent_size, generator=generator)
    with torch.no_grad():
        return Batch(network.inverse(lines, latent, mu, error), lines, mu, error, torch.zeros(count))


def _taught(network: ConditionalNetwork) -> dict[str, Any]:
    """Teach the network a preview, and say how far it is off."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(21)
        network.preview = Preview(network.layout, 8, width=24, depth=2, rank=8)
    held_out = _observed(network, 100, torch.Generator().manual_seed(22))
    schedule = PreviewSchedule(
        epochs=2, steps=40, batch=64, average=0.9, observations=256, teacher_draws=64, held_out_draws=64
    )
    draw, threads = partial(_observed, network), torch.get_num_threads()
    torch.set_num_threads(1)  # several only wait for each other, over products this small
    PreviewTrainer(network, draw, held_out, schedule, seed=23).run()
    torch.set_num_threads(threads)
    network.preview.compact()
    columns = [column.numpy() for column in held_out[:4]]
    return disagreement(network, *columns, draws=256)


def save_fake_model(path: Path) -> Path:
    """Write the fake network as a model directory."""
    network = fake_network()
    save_model(network, path, network.record)
    return path
