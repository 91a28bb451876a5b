"""Draws from the latent space: standard normal points, evenly spread or random, reproducible by seed."""

from __future__ import annotations

from typing import Literal

import torch
from torch.quasirandom import SobolEngine

from inn.errors import MisuseError

LatentKind = Literal["sobol", "gaussian"]
"""How latents are drawn: scrambled Sobol points, or independent Gaussian ones."""


def draw_latent(draws: int, size: int, seed: int, kind: LatentKind = "sobol") -> torch.Tensor:
    """Draw points of a standard normal distribution.

    Scrambled Sobol points fill the cube more evenly than random ones, so that quantiles of a posterior need
    fewer of them for the same error. They serve best in powers of two. The result depends on the arguments
    alone: the generators are the function's own.

    Parameters
    ----------
    draws : int
        Number of points.
    size : int
        Dimensions of the latent space.
    seed : int
        Seed of the scrambling, or of the Gaussian generator.
    kind : {"sobol", "gaussian"}
        Scrambled Sobol points taken through the inverse normal distribution function, or independent draws.

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
    doi:10.1006/jcom.1998.0487.
    """
    if draws < 1 or size < 1:
        raise MisuseError("a latent draw needs at least one point and one dimension", found=(draws, size))
    if kind == "gaussian":
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(draws, size, generator=generator, dtype=torch.float64).to(torch.float32)
    if kind != "sobol":
        raise MisuseError("there is no such kind of latent draw", found=kind, expected="sobol or gaussian")
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
    return deviates.to(torch.float32)
