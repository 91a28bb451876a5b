"""Normal scores: each number of an atmosphere on a scale on which the training set is normally distributed.

At the height of a transition region the temperature is either a chromosphere's or a corona's, and hardly ever
between: two narrow peaks, two decades apart. A flow that starts from such numbers spends itself on their
shape. On the scale of normal scores (each number's rank in the training set, through the inverse of the
normal distribution) both peaks take the room that their share of the atmospheres deserves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

KNOTS = 113
FURTHEST = 3.5
"""Normal score of the outermost knots. Beyond them numbers grow with the logarithm of the score, so that a
rare draw that lies far out remains an atmosphere."""
FARTHEST_BEYOND = 30.0
"""How far beyond the outermost knots, in units of the scale there, a number still has a score of its own."""
FLATTEST = 0.01
"""Smallest change (network units) for a unit of normal score: what hardly varies is not blown up."""
EVERY = slice(None)
TAIL, TAIL_FLATTEST = 2.0, 0.2
"""Normal score beyond which the change for a unit is at least this share of that between -1 and 1: a number
just outside of the training set's range must not look as if it lay far out."""


class NormalScores(nn.Module):
    """Ascending scale of each of `size` numbers, piecewise linear within the examples, and back.

    A new one is the identity; `fit` takes the scale from a training set.

    Parameters
    ----------
    size : int
        How many numbers, each with a scale of its own.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(-FURTHEST, FURTHEST, KNOTS).repeat(size, 1))

    knots: Tensor

    def fit(self, values: Tensor) -> None:
        """Take the scale from examples, shape (n, size)."""
        scores = torch.linspace(-FURTHEST, FURTHEST, KNOTS, dtype=torch.float64)
        levels = torch.special.ndtr(scores)
        knots = torch.stack([torch.quantile(column, levels) for column in values.double().T])
        middle = knots[:, KNOTS // 2].clone()
        inner = (scores.abs() <= 1.0).nonzero().flatten()
        change = (knots[:, inner[-1]] - knots[:, inner[0]]) / (scores[inner[-1]] - scores[inner[0]])
        outside = (0.5 * (scores[1:] + scores[:-1])).abs() > TAIL
        least = torch.where(outside, TAIL_FLATTEST * change[:, None], 0.0).clamp_min(FLATTEST)
        steps = torch.maximum(knots.diff(dim=1), least * self._spacing)
        rising = torch.cat((torch.zeros_like(middle)[:, None], steps.cumsum(dim=1)), dim=1)
        self.knots.copy_(rising - rising[:, KNOTS // 2, None] + middle[:, None])

    def forward(self, values: Tensor) -> Tensor:
        """Normal scores of numbers, shape (..., size)."""
        segment, left, width, beyond = self._segments(values)
        inside = values.clamp(self.knots[:, 0], self.knots[:, -1])
        scores: Tensor = -FURTHEST + self._spacing * (segment + (inside - left) / width)
        return scores + beyond.sign() * beyond.abs().expm1()

    def inverse(self, scores: Tensor, numbers: slice = EVERY) -> Tensor:
        """Numbers of normal scores, shape (..., size), or of a slice of them alone."""
        return self.inverse_columns(scores[..., None], numbers)[..., 0]

    def inverse_columns(self, scores: Tensor, numbers: slice = EVERY) -> Tensor:
        """The same of scores (..., size, n): n of every number, or of a slice of them."""
        knots = self.knots[numbers]
        inside = scores.clamp(-FURTHEST, FURTHEST)
        position = (inside + FURTHEST) / self._spacing
        segment = position.detach().clamp(0, KNOTS - 2).floor()
        places = segment.long()

        def at(table: Tensor) -> Tensor:
            return table.expand(*places.shape[:-1], -1).gather(-1, places)

        share = position - segment
        # Hardly ever anything is beyond; but to look makes a device's host wait, and breaks a compiled graph.
        looks = scores.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (looks and torch.equal(inside, scores)):
            beyond = scores - inside
            share = share + beyond.abs().log1p().copysign(beyond) / self._spacing
        return at(knots[:, :-1]) + share * at(knots.diff(dim=1))

    def log_slope(self, values: Tensor) -> Tensor:
        """Logarithm of the scores' change with the numbers, shape (..., size)."""
        _, _, width, beyond = self._segments(values)
        return (self._spacing / width).log() + beyond.abs()

    @property
    def _spacing(self) -> float:
        return 2.0 * FURTHEST / (KNOTS - 1)

    def _ends(self, segment: Tensor) -> tuple[Tensor, Tensor]:
        """Left end and width of each number's segment (..., size)."""
        rows = segment.reshape(-1, self.knots.shape[0]).T
        left, right = self.knots.gather(1, rows), self.knots.gather(1, rows + 1)
        return left.T.reshape(segment.shape), (right - left).T.reshape(segment.shape)

    def _segments(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each number's segment, its left end and width, and how far beyond the outermost knot it lies."""
        rows = values.detach().reshape(-1, self.knots.shape[0]).T.contiguous()
        segment = (torch.searchsorted(self.knots, rows) - 1).clamp(0, KNOTS - 2).T.reshape(values.shape)
        left, width = self._ends(segment)
        outside = values - values.clamp(self.knots[:, 0], self.knots[:, -1])
        beyond = (outside * self._spacing / width).clamp(-FARTHEST_BEYOND, FARTHEST_BEYOND)
        return segment, left, width, beyond
