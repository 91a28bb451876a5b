"""Draws from the latent space: standard normal points, evenly spread or random, reproducible by seed.

A network may also carry latents of its own, `TunedLatents`: few points, chosen such that they give the
quantiles of that network's posteriors as many random ones do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import nn
from torch.quasirandom import SobolEngine

from inn.errors import MisuseError
from inn.layout import Layout

LatentKind = Literal["sobol", "gaussian", "balanced", "tuned"]
"""How latents are drawn: scrambled Sobol points, independent Gaussian ones, balanced Sobol points, or those
that a network brings with it."""


def draw_latent(draws: int, size: int, seed: int, kind: LatentKind = "sobol") -> torch.Tensor:
    """Draw points of a standard normal distribution.

    Scrambled Sobol points fill the cube more evenly than random ones, so that quantiles of a posterior need
    fewer of them for the same error. They serve best in powers of two. Few points of many dimensions still
    have means and covariances far from a normal distribution's. Balanced points have not: Sobol points are
    rotated and scaled until their leading dimensions, half as many as points, are uncorrelated with unit
    variance, and each comes with its opposite. Whatever is linear in those dimensions then has its exact mean
    and variance, and every odd moment of any linear form is zero. They serve best in even numbers. The result
    depends on the arguments alone: the generators are the function's own.

    Parameters
    ----------
    draws : int
        Number of points.
    size : int
        Dimensions of the latent space.
    seed : int
        Seed of the scrambling, or of the Gaussian generator.
    kind : {"sobol", "gaussian", "balanced"}
        Scrambled Sobol points taken through the inverse normal distribution function, independent draws, or
        balanced Sobol points. (Tuned ones are not drawn: `inn.posterior.latents_of` takes them from their
        network.)

    Returns
    -------
    torch.Tensor
        Shape (draws, size), float32, on the CPU, finite.

    Raises
    ------
    MisuseError
        If a number is below one, there are more dimensions than Sobol points have, or the kind is unknown.

    References
    ----------
    Owen (1998), "Scrambling Sobol' and Niederreiter-Xing points", J. Complexity 14, 466,
    doi:10.1006/jcom.1998.0487. Moments matched after drawing: Boyle, Broadie & Glasserman (1997), "Monte
    Carlo methods for security pricing", J. Economic Dynamics and Control 21, 1267, sections 2.2 and 2.3,
    doi:10.1016/S0165-1889(97)00028-6.
    """
    if draws < 1 or size < 1:
        raise MisuseError("a latent draw needs at least one point and one dimension", found=(draws, size))
    if kind == "gaussian":
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(draws, size, generator=generator, dtype=torch.float64)
    elif kind == "sobol":
        points = _sobol(draws, size, seed)
    elif kind == "balanced":
        points = _balanced(draws, size, seed)
    else:
        kinds = ", ".join(other for other in get_args(LatentKind) if other != "tuned")
        raise MisuseError("there is no such kind of latent draw", found=kind, expected=kinds)
    return points.to(torch.float32)


def _sobol(draws: int, size: int, seed: int) -> torch.Tensor:
    """Scrambled Sobol points as normal deviates, float64."""
    if size > SobolEngine.MAXDIM:
        raise MisuseError(
            "Sobol points have fewer dimensions than this",
            found=size,
            expected=f"at most {SobolEngine.MAXDIM}",
            remedy="draw Gaussian latents",
        )
    engine = SobolEngine(size, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    points = engine.draw(draws, dtype=torch.float64)
    # Coordinates are multiples of 2**-30, 0 among them, and the engine rounds its first point to float32,
    # where it may become 1: both are infinite as normal deviates. Half a step away from the edge is +-6.1.
    edge = 0.5 * 2.0**-SobolEngine.MAXBIT
    deviates: torch.Tensor = torch.special.ndtri(points.clamp(edge, 1.0 - edge))
    return deviates


def _balanced(draws: int, size: int, seed: int) -> torch.Tensor:
    """Sobol points and their opposites, the leading dimensions with unit covariance, float64."""
    pairs = (draws + 1) // 2
    points = _sobol(pairs, size, seed)
    leading = min(pairs, size)
    # Of all matrices with orthogonal columns, the nearest to these points.
    left, _, right = torch.linalg.svd(points[:, :leading], full_matrices=False)
    points[:, :leading] = math.sqrt(pairs) * left @ right
    return torch.cat((points, -points))[:draws]


class TunedLatents(nn.Module):
    """Latent points that suit one network: sets of a few numbers of points.

    Whatever points all pixels share, the quantiles of their posteriors err by how unevenly the points lie as
    that network sees them. Random points leave this to chance and need many; these were moved until
    quantiles came right for observations of training simulations (`inn.distillation.LatentTrainer`), as the
    representative points of a distribution are chosen (Flury 1990, Biometrika 77, 33,
    doi:10.1093/biomet/77.1.33), but for many distributions at once.

    They are for quantiles alone. Statistics that weigh every draw by itself, and estimates of the sampling
    error, want independent or Sobol points.

    Parameters
    ----------
    size : int
        Dimensions of the latent space.
    draws : sequence of int
        Number of points of each set.
    """

    def __init__(self, size: int, draws: Sequence[int]) -> None:
        super().__init__()
        self.size, self.draws = size, tuple(sorted(draws))
        # Before they are tuned, balanced ones.
        self.points = nn.ParameterDict(
            {str(count): nn.Parameter(draw_latent(count, size, 0, "balanced")) for count in self.draws}
        )

    def architecture(self) -> dict[str, Any]:
        """Constructor arguments, as JSON holds them."""
        return {"size": self.size, "draws": list(self.draws)}

    @classmethod
    def from_architecture(cls, layout: Layout, architecture: Mapping[str, Any]) -> Self:
        """Build points that are not tuned, for others to be loaded, from what `architecture` returned."""
        return cls(**architecture)

    def forward(self, draws: int) -> torch.Tensor:
        """Points of one set, shape (draws, size).

        Raises
        ------
        MisuseError
            There is no set of so many.
        """
        if draws not in self.draws:
            raise MisuseError(
                "the network has no tuned latents of this number",
                where="draws",
                found=draws,
                expected=", ".join(map(str, self.draws)),
                remedy="choose one of these, or another kind of latents",
            )
        points: torch.Tensor = self.points[str(draws)]
        return points
