"""Checkpoints in both published layouts, written by FrEIA from random weights."""

from pathlib import Path

import FrEIA.framework as framework
import FrEIA.modules as modules
import numpy as np
import torch
from torch import nn

BLOCKS = 5


class PublishedSubnet(nn.Module):
    """The fully connected network inside a coupling block, with the published names of its layers."""

    def __init__(self, size_in, size_out):
        super().__init__()
        hidden = 2 * size_out
        self.fc1 = nn.Linear(size_in, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc2b = nn.Linear(hidden, hidden)
        self.fc2d = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, size_out)

    def forward(self, x):
        for layer in (self.fc1, self.fc2, self.fc2b):
            x = nn.functional.leaky_relu(layer(x), 0.01)
        return self.fc3(nn.functional.relu(self.fc2d(x)))


class Sequence(nn.Module):
    """The network of releases 1.0.1 and 1.1.1: a FrEIA sequence."""

    def __init__(self, width):
        super().__init__()
        self.model = framework.SequenceINN(width)
        for index in range(BLOCKS):
            self.model.append(modules.RNVPCouplingBlock, subnet_constructor=PublishedSubnet, clamp=2.0)
            if index < BLOCKS - 1:
                self.model.append(modules.PermuteRandom, seed=index)

    def forward(self, x, rev=False):
        return self.model(x, rev=rev)[0]


class Graph(nn.Module):
    """The network of release 1.0.0: a FrEIA graph."""

    def __init__(self, width):
        super().__init__()
        nodes = [framework.InputNode(width)]
        for index in range(BLOCKS):
            coupling = {"subnet_constructor": PublishedSubnet, "clamp": 2.0}
            nodes.append(framework.Node(nodes[-1].out0, modules.RNVPCouplingBlock, coupling))
            if index < BLOCKS - 1:
                nodes.append(framework.Node(nodes[-1].out0, modules.PermuteRandom, {"seed": index}))
        nodes.append(framework.OutputNode(nodes[-1].out0))
        self.model = framework.ReversibleGraphNet(nodes, verbose=False)

    def forward(self, x, rev=False):
        return self.model(x, rev=rev)[0]


def reference(kind, width=384, seed=0):
    """A FrEIA network with random weights, large enough that every part of it shows in the result."""
    state = np.random.get_state()  # noqa: NPY002 - FrEIA seeds the global generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = kind(width)
    np.random.set_state(state)  # noqa: NPY002
    return network.eval()


def layout_a(network, *, latent, halpha, ca8542, heights=50, z=None, **entries):
    """What release 1.0.0 holds: no permutations, old names, sizes stated.

    FrEIA of that time counted the input as the first module.
    """
    state = {}
    for key, value in network.state_dict().items():
        index, _, name = key.removeprefix("model.module_list.").partition(".")
        if not name.startswith("perm"):
            state[f"module_list.{int(index) + 1}.{name.removeprefix('subnet_')}"] = value
    checkpoint = {
        "epoch": 11400,
        "state_dict": state,
        "inRepr": [("ne", heights), ("temperature", heights), ("vel", heights), ("!!PAD",)],
        "outRepr": [("LatentSpace", latent), ("!!PAD",), ("Halpha", halpha), ("Ca8542", ca8542)],
        **entries,
    }
    if z is not None:
        checkpoint["z"] = z
    return checkpoint


def layout_b(network):
    """What releases 1.0.1 and 1.1.1 hold."""
    return {"state_dict": network.state_dict()}


def write(checkpoint, path, **options) -> Path:
    """Save a checkpoint as the published ones were, and return its path."""
    torch.save(checkpoint, path, **options)
    return path
