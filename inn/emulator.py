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
    say it. `distance` therefore takes the best of a few values that span the training grid's. Lines change
    smoothly with it: each point follows a parabola, whose three coefficients the network gives, so that one
    pass serves all values (a network that sees it among its inputs needs one for each, and is 4 % closer).

    Parameters
    ----------
    layout : Layout
        Heights and line windows.
    width : int
        Width of the hidden layers.
    depth : int
        Number of hidden layers.
    """

    def __init__(self, layout: Layout, width: int = 224, depth: int = 3) -> None:
        super().__init__()
        self.layout = layout
        self._architecture = {"width": width, "depth": depth}
        inputs = layout.atmosphere_size + 2
        layers: list[nn.Module] = []
        for index in range(depth):
            layers += [nn.Linear(inputs - 1 if index == 0 else width, width), nn.SiLU()]
        layers.append(nn.Linear(width, 3 * layout.lines_size))
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
        powers = self._powers(microturbulence)
        standard = (powers[:, None] @ self._coefficients(atmosphere, mu))[:, 0]
        return self.lines_mean + self.lines_scale * standard

    def distance(self, atmosphere: Tensor, lines: Tensor, mu: Tensor) -> Tensor:
        """How far the lines of atmospheres lie from given ones, at the best microturbulence.

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
        residual = self.lines_scale * self._coefficients(atmosphere, mu)
        residual[:, 0] += self.lines_mean - lines
        with in_full(lines.device):
            products = residual @ residual.mT / lines.shape[-1]
            powers = self._powers(self.microturbulence_levels)
            square = ((powers @ products) * powers).sum(dim=-1)
        return square.amin(dim=1).clamp_min(0.0).sqrt()

    def _coefficients(self, atmosphere: Tensor, mu: Tensor) -> Tensor:
        """Parabolas (n, 3, lines_size) of the standardised lines in the standardised microturbulence."""
        mean, scale = (
            torch.cat((values[:-2], values[-1:])) for values in (self.input_mean, self.input_scale)
        )
        inputs = torch.cat((atmosphere, mu[:, None]), dim=-1)
        found: Tensor = self.layers((inputs - mean) / scale)
        return found.to(inputs.dtype).reshape(len(mu), 3, -1)

    def _powers(self, microturbulence: Tensor) -> Tensor:
        """Powers 0 to 2 (n, 3) of the standardised microturbulence."""
        standard = (microturbulence - self.input_mean[-2]) / self.input_scale[-2]
        return torch.stack((torch.ones_like(standard), standard, standard.square()), dim=-1)
