"""A forward surrogate: from an atmosphere and mu to both lines, for posterior predictive checks.

It answers at once what a radiative transfer code answers in seconds: which lines an atmosphere would show. A
posterior whose atmospheres do not show the observed lines is not to be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from inn.layout import Layout
from inn.precision import in_full

LEVELS = 5
"""Values of the microturbulence among which the best is taken when it is not known."""


class Emulator(nn.Module):
    """Fully connected network from a scaled atmosphere, microturbulence and mu to both normalised lines.

    Microturbulence shapes the lines but is no part of an atmosphere's 150 numbers, so a posterior does not
    say it. `distance` therefore takes the best of a few values that span the training grid's.

    Parameters
    ----------
    layout : Layout
        Heights and line windows.
    width : int
        Width of the hidden layers.
    depth : int
        Number of hidden layers.
    """

    def __init__(self, layout: Layout, width: int = 192, depth: int = 3) -> None:
        super().__init__()
        self.layout = layout
        self._architecture = {"width": width, "depth": depth}
        inputs = layout.atmosphere_size + 2
        layers: list[nn.Module] = []
        for index in range(depth):
            layers += [nn.Linear(inputs if index == 0 else width, width), nn.SiLU()]
        layers.append(nn.Linear(width, layout.lines_size))
        self.layers = nn.Sequential(*layers)
        self.register_buffer("input_mean", torch.zeros(inputs))
        self.register_buffer("input_scale", torch.ones(inputs))
        self.register_buffer("lines_mean", torch.zeros(layout.lines_size))
        self.register_buffer("lines_scale", torch.ones(layout.lines_size))
        self.register_buffer("microturbulence_levels", torch.zeros(LEVELS))

    input_mean: Tensor
    input_scale: Tensor
    lines_mean: Tensor
    lines_scale: Tensor
    microturbulence_levels: Tensor

    def architecture(self) -> dict[str, Any]:
        """Constructor arguments besides the layout, as JSON holds them."""
        return dict(self._architecture)

    @classmethod
    def from_architecture(cls, layout: Layout, architecture: Mapping[str, Any]) -> Self:
        """Build an untrained emulator from what `architecture` returned."""
        return cls(layout, **architecture)

    def fit_statistics(self, atmosphere: Tensor, microturbulence: Tensor, mu: Tensor, lines: Tensor) -> None:
        """Take the standardisation of all numbers, and the microturbulence's range, from a training set.

        Parameters
        ----------
        atmosphere : Tensor, shape (n, atmosphere_size)
            Network units.
        microturbulence : Tensor, shape (n,)
            km/s.
        mu : Tensor, shape (n,)
        lines : Tensor, shape (n, lines_size)
            Clean normalised lines.
        """
        inputs = torch.cat((atmosphere, microturbulence[:, None], mu[:, None]), dim=-1)
        self.input_mean.copy_(inputs.mean(dim=0))
        # Numbers that hardly vary must not be blown up into noise.
        self.input_scale.copy_(inputs.std(dim=0).clamp_min(0.02))
        self.lines_mean.copy_(lines.mean(dim=0))
        self.lines_scale.copy_(lines.std(dim=0).clamp_min(1e-3))
        middle = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
        self.microturbulence_levels.copy_(torch.quantile(microturbulence.double(), middle))

    def forward(self, atmosphere: Tensor, microturbulence: Tensor, mu: Tensor) -> Tensor:
        """Lines of given atmospheres.

        Parameters
        ----------
        atmosphere : Tensor, shape (n, atmosphere_size)
            Network units.
        microturbulence : Tensor, shape (n,)
            km/s.
        mu : Tensor, shape (n,)
            Cosine of the heliocentric angle.

        Returns
        -------
        Tensor, shape (n, lines_size)
            H-alpha, then Ca II 8542, divided by their joint maximum.
        """
        inputs = torch.cat((atmosphere, microturbulence[:, None], mu[:, None]), dim=-1)
        standard: Tensor = self.layers((inputs - self.input_mean) / self.input_scale)
        return self.lines_mean + self.lines_scale * standard

    def distance(self, atmosphere: Tensor, lines: Tensor, mu: Tensor) -> Tensor:
        """How far the lines of atmospheres lie from given ones, at the best microturbulence.

        Lines change smoothly with the microturbulence. They are emulated at three of its values, and follow a
        parabola through these, point by point, at the others: distances change by 3 % (root mean square; most
        of them not at all), and two fifths of the work are saved. The first layer sees the microturbulence
        as one number among 150 that do not change with it.

        Parameters
        ----------
        atmosphere : Tensor, shape (n, atmosphere_size)
            Network units.
        lines : Tensor, shape (n, lines_size)
            Observed.
        mu : Tensor, shape (n,)

        Returns
        -------
        Tensor, shape (n,)
            Root mean square over all points of both lines, in units of the joint maximum.
        """
        levels = self.microturbulence_levels
        nodes = levels[[0, LEVELS // 2, LEVELS - 1]]
        inputs = torch.cat((atmosphere, nodes[:1].expand(len(mu), 1), mu[:, None]), dim=-1)
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        lowest = first((inputs - self.input_mean) / self.input_scale)
        change = first.weight[:, -2] / self.input_scale[-2]
        hidden = lowest[:, None] + (nodes - nodes[0])[:, None] * change
        standard: Tensor = self.layers[1:](hidden)
        residual = self.lines_mean + self.lines_scale * standard - lines[:, None]
        with in_full(lines.device):
            products = residual @ residual.mT / lines.shape[-1]
            weights = _parabola(nodes, levels)
            square = ((weights @ products) * weights).sum(dim=-1)
        return square.amin(dim=1).clamp_min(0.0).sqrt()


def _parabola(nodes: Tensor, places: Tensor) -> Tensor:
    """Weights (places, 3) that take a parabola's values at three nodes to its values elsewhere.

    Nodes may fall together (in a new emulator, or without microturbulence in the grid): they share a weight.
    """
    basis = (places.double()[:, None], nodes.double()[:, None])
    powers = torch.arange(3, device=nodes.device)
    at_places, at_nodes = (values**powers for values in basis)
    weights: Tensor = (at_places @ torch.linalg.pinv(at_nodes)).to(nodes)
    return weights
