"""Monotone rational-quadratic splines: ascending curves of any shape with an inverse in closed form.

Durkan, Bekasov, Murray & Papamakarios (2019), "Neural spline flows", arXiv:1906.04032, section 3.1 and
appendix A; Gregory & Delbourgo (1982), IMA J. Numerical Analysis 2, 123, doi:10.1093/imanum/2.2.123.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

EDGE = 4.0
"""Between minus and plus this the curve bends; beyond, it is the identity."""

NARROWEST = 0.02
"""Smallest share of that range which a bin takes, along either axis."""

FLATTEST = 0.05
"""Smallest slope at a knot."""


class Spline(NamedTuple):
    """Curves through knots.

    Attributes
    ----------
    left, right : Tensor, shape (..., bins + 1)
        Coordinates of the knots, ascending from -EDGE to EDGE.
    slope : Tensor, shape (..., bins + 1)
        Slopes at the knots; 1 at the ends.
    """

    left: Tensor
    right: Tensor
    slope: Tensor

    @classmethod
    def parameters(cls, bins: int) -> int:
        """How many numbers describe a curve."""
        return 3 * bins - 1

    @classmethod
    def from_parameters(cls, raw: Tensor) -> Spline:
        """Make curves from any numbers; from zeros, the identity.

        Parameters
        ----------
        raw : Tensor, shape (..., 3 bins - 1)
            Widths and heights of the bins before their softmax, then slopes at inner knots before their
            softplus.
        """
        bins = (raw.shape[-1] + 1) // 3
        straight = math.log(math.expm1(1.0 - FLATTEST))  # the softplus of this is a slope of 1
        slope = FLATTEST + functional.softplus(raw[..., 2 * bins :] + straight)
        return cls(
            _knots(raw[..., :bins]),
            _knots(raw[..., bins : 2 * bins]),
            functional.pad(slope, (1, 1), value=1.0),
        )

    def forward(self, values: Tensor) -> Tensor:
        """Take values (..., n), n for each curve, through the curves."""
        left, width, right, height, first, last = self._bins(values, self.left)
        share = (values.clamp(-EDGE, EDGE) - left) / width
        mean = height / width
        both = share * (1.0 - share)
        rise = height * (mean * share.square() + first * both) / (mean + (first + last - 2.0 * mean) * both)
        return torch.where(values.abs() > EDGE, values, right + rise)

    def inverse(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Undo `forward`; also the logarithm of the inverse's slope, both of shape (..., n)."""
        left, width, right, height, first, last = self._bins(values, self.right)
        rise = values.clamp(-EDGE, EDGE) - right
        mean = height / width
        excess = first + last - 2.0 * mean
        # The root of a quadratic that lies in the bin, in the form without cancellation.
        square = height * (mean - first) + rise * excess
        linear = height * first - rise * excess
        constant = -mean * rise
        root = (linear.square() - 4.0 * square * constant).clamp_min(0.0).sqrt()
        share = (2.0 * constant / (-linear - root)).clamp(0.0, 1.0)
        both = share * (1.0 - share)
        slope = last * share.square() + 2.0 * mean * both + first * (1.0 - share).square()
        log_slope = 2.0 * (mean + excess * both).log() - 2.0 * mean.log() - slope.log()
        beyond = values.abs() > EDGE
        return torch.where(beyond, values, left + share * width), log_slope.masked_fill(beyond, 0.0)

    def _bins(self, values: Tensor, knots: Tensor) -> tuple[Tensor, ...]:
        """Left end, width, lower end, height and the slopes at both ends of each value's bin."""
        # Six times as fast as a binary search, with so few bins, on a CPU.
        counts = torch.zeros_like(values, dtype=torch.int8)
        for knot in knots[..., 1:-1, None].detach().unbind(dim=-2):
            counts += values.detach() >= knot
        place = counts.long()

        def at(table: Tensor) -> Tensor:
            return table.gather(-1, place)

        return (
            at(self.left[..., :-1]),
            at(self.left.diff(dim=-1)),
            at(self.right[..., :-1]),
            at(self.right.diff(dim=-1)),
            at(self.slope[..., :-1]),
            at(self.slope[..., 1:]),
        )


def _knots(raw: Tensor) -> Tensor:
    bins = raw.shape[-1]
    shares = NARROWEST + (1.0 - NARROWEST * bins) * functional.softmax(raw, dim=-1)
    inner = 2.0 * EDGE * shares.cumsum(dim=-1)[..., :-1] - EDGE
    # The ends are exact, whatever the rounding of the sums.
    ends = torch.full_like(inner[..., :1], EDGE)
    return torch.cat((-ends, inner, ends), dim=-1)
