"""The invertible pieces of the published network: affine coupling blocks and fixed permutations."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from inn.precision import linear_in_full

CLAMP = 2.0
"""The largest logarithm by which a coupling block stretches a component, to 1e-3."""


def soft_clamp(raw: torch.Tensor) -> torch.Tensor:
    """Bound a coupling block's logarithm of stretch: 2.0 x 0.636 atan(raw), within +-2.0.

    Parameters
    ----------
    raw : torch.Tensor
        Any shape: what a subnet returns.

    Returns
    -------
    torch.Tensor
        The same shape.
    """
    # 0.636, and not 2 / pi, because the published weights were trained with it.
    return CLAMP * 0.636 * torch.atan(raw)


class Subnet(nn.Sequential):
    """A fully connected network inside a coupling block, never itself inverted.

    Four hidden layers, the first three with leaky ReLU (slope 0.01) and the fourth with ReLU, then a linear
    layer whose weights start at 1e-3 N(0, 1), so that a new block is close to the identity (Osborne,
    Armstrong & Fletcher 2019, section 2, equations 5 and 6, doi:10.3847/1538-4357/ab07b4, and its public
    code).

    Parameters
    ----------
    size_in, size_out : int
        Components taken and returned. Hidden layers have twice ``size_out``.
    """

    def __init__(self, size_in: int, size_out: int) -> None:
        hidden = 2 * size_out
        output = nn.Linear(hidden, size_out)
        nn.init.normal_(output.weight, std=1e-3)
        super().__init__(
            nn.Linear(size_in, hidden),
            nn.LeakyReLU(0.01),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.01),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.01),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            output,
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Transform vectors (..., size_in); the last layer is in full precision: it adds to an atmosphere."""
        *hidden, output = self.children()
        assert isinstance(output, nn.Linear)
        for layer in hidden:
            values = layer(values)
        return linear_in_full(output, values)


class AffineCoupling(nn.Module):
    """An affine coupling block on the two halves of a vector.

    Forward, ``y1 = exp(s2(x2)) x1 + t2(x2)``, then ``y2 = exp(s1(y1)) x2 + t1(y1)``, the exponents softly
    clamped (Osborne, Armstrong & Fletcher 2019, section 2, doi:10.3847/1538-4357/ab07b4; Dinh et al. 2017,
    arXiv:1605.08803).

    Parameters
    ----------
    width : int
        Components of the vector; the first half is the smaller one if it is odd.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = width // 2, width - width // 2
        self.halves = [first, second]
        self.s1 = Subnet(first, second)
        self.t1 = Subnet(first, second)
        self.s2 = Subnet(second, first)
        self.t2 = Subnet(second, first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform vectors of shape (n, width)."""
        x1, x2 = torch.split(x, self.halves, dim=-1)
        y1 = torch.exp(soft_clamp(self.s2(x2))) * x1 + self.t2(x2)
        y2 = torch.exp(soft_clamp(self.s1(y1))) * x2 + self.t1(y1)
        return torch.cat((y1, y2), dim=-1)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """Undo `forward` on vectors of shape (n, width)."""
        return self.inverse_halves(*torch.split(y, self.halves, dim=-1))

    def inverse_halves(self, y1: torch.Tensor, y2: torch.Tensor) -> torch.Tensor:
        """Undo `forward` on the halves of vectors, either of which may be the same for many of the other.

        Parameters
        ----------
        y1, y2 : torch.Tensor
            Shapes (..., first) and (..., second), that can be broadcast against each other. What depends on
            ``y1`` alone is computed once for each of it.

        Returns
        -------
        torch.Tensor
            Shape (..., width).
        """
        x2 = (y2 - self.t1(y1)) * torch.exp(-soft_clamp(self.s1(y1)))
        x1 = (y1 - self.t2(x2)) * torch.exp(-soft_clamp(self.s2(x2)))
        return torch.cat((x1, x2), dim=-1)


class FixedPermutation(nn.Module):
    """A fixed reordering of a vector's components, so that the next block couples other halves.

    Parameters
    ----------
    order : torch.Tensor
        Shape (width,), int64: component i of the result is component ``order[i]`` of the input.
    """

    order: torch.Tensor
    inverse_order: torch.Tensor

    def __init__(self, order: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order.clone())
        self.register_buffer("inverse_order", torch.argsort(order))

    @classmethod
    def published(cls, index: int, width: int) -> FixedPermutation:
        """Return the permutation after the published network's block ``index``, counted from 0.

        NumPy's legacy generator seeded with the block's index made it; NumPy promises never to change it.
        """
        return cls(torch.from_numpy(np.random.RandomState(index).permutation(width)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reorder vectors of shape (n, width)."""
        return x[..., self.order]

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """Undo `forward` on vectors of shape (n, width)."""
        return y[..., self.inverse_order]
