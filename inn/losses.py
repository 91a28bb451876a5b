"""The terms of the joint network's loss, and how their weights change while it is trained.

The recipe is that of Osborne, Armstrong & Fletcher (2019), ApJ 873, 128, section 3.3 and appendix,
doi:10.3847/1538-4357/ab07b4, after Ardizzone et al. (2018), arXiv:1808.04730; what the text leaves open is as
in its public code. Squared errors make the network predict the lines and invert its own predictions; the
maximum mean discrepancy makes its latent normal and independent of the lines, and the atmosphere's
distribution that of the simulations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inn.joint import JointNetwork


def _searched() -> NDArray[np.float64]:
    bandwidths = np.logspace(np.log10(0.5), np.log10(500.0), 2000)
    bandwidths.setflags(write=False)
    return bandwidths


SEARCHED_BANDWIDTHS: NDArray[np.float64] = _searched()
"""The bandwidths that `turning_point` tries, shape (2000,), ascending from 0.5 to 500 in even steps of the
logarithm (public code of the paper)."""

NO_TURNING_POINT = 2.0
"""The bandwidth where the discrepancy has no turning point (public code of the paper)."""


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances between the rows of two matrices.

    Parameters
    ----------
    x : Tensor, shape (n, d)
    y : Tensor, shape (m, d)

    Returns
    -------
    Tensor, shape (n, m)
        Not below zero.
    """
    # One matrix product is many times faster than differences; what it loses where vectors are much longer
    # than their differences (log ne is 8 to 15) is won back by moving the origin among them.
    origin = y.detach().mean(dim=0)
    x, y = x - origin, y - origin
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return torch.addmm(squares, x, y.T, alpha=-2.0).clamp(min=0.0)


def inverse_multiquadric(squared_distance: Tensor, bandwidth: float) -> Tensor:
    """The kernel a^2 / (a^2 + |x - y|^2) (the paper's equation 7).

    Parameters
    ----------
    squared_distance : Tensor
        |x - y|^2, any shape.
    bandwidth : float
        a, in the units of x.

    Returns
    -------
    Tensor
        The same shape, in (0, 1].
    """
    return bandwidth**2 / (bandwidth**2 + squared_distance)


def mmd2(x: Tensor, y: Tensor, bandwidths: float | Sequence[float]) -> Tensor:
    """Biased estimate of the squared maximum mean discrepancy of two samples (the paper's appendix).

    The mean of the kernel within x plus that within y less twice that between them, each over all pairs, a
    vector with itself included: of two samples of one distribution the estimate is not zero but about 2 / n.

    Parameters
    ----------
    x : Tensor, shape (n, d)
    y : Tensor, shape (m, d)
    bandwidths : float or sequence of float
        Of the inverse multiquadric kernel; of several, the kernels are added.

    Returns
    -------
    Tensor
        Scalar, not below zero but for rounding.

    References
    ----------
    Gretton et al. (2012), J. Machine Learning Research 13, 723, equation 5.
    """
    chosen = [bandwidths] if isinstance(bandwidths, int | float) else list(bandwidths)
    total = x.new_zeros(())
    for first, second, share in ((x, x, 1.0), (y, y, 1.0), (x, y, -2.0)):
        distances = squared_distances(first, second)
        for bandwidth in chosen:
            total = total + share * inverse_multiquadric(distances, bandwidth).mean()
    return total


@torch.no_grad()
def turning_point(
    x: Tensor,
    y: Tensor,
    searched: Sequence[float] | NDArray[np.float64] = SEARCHED_BANDWIDTHS,
    otherwise: float = NO_TURNING_POINT,
) -> float:
    """The bandwidth at which two samples differ most: the turning point of `mmd2`, searched from above.

    The discrepancy goes to zero for wide kernels, and for narrow ones to 1 / n + 1 / m, where each vector
    knows itself alone; the maximum that is met first on the way down is the one that tells of the
    distributions.

    Parameters
    ----------
    x : Tensor, shape (n, d)
    y : Tensor, shape (m, d)
    searched : sequence of float
        Bandwidths to try.
    otherwise : float
        The answer if the discrepancy only ever rises or falls on the way down.

    Returns
    -------
    float
        One of `searched`: the first peak from above, a bandwidth at which the discrepancy is larger than at
        the wider and the narrower one beside it.
    """
    # In double precision: for wide kernels the discrepancy is a difference of numbers that are almost equal,
    # and rounding would make turning points of its own. Each pair counts once; a vector's with itself is
    # always 1.
    x, y = x.double(), y.double()
    pairs = [_pairs(x), _pairs(y), squared_distances(x, y).flatten()]
    counts = (0.5 * len(x) ** 2, 0.5 * len(y) ** 2, -0.5 * len(x) * len(y))
    distances = torch.cat(pairs)
    shares = torch.cat(
        [torch.full_like(pair, 1.0 / count) for pair, count in zip(pairs, counts, strict=True)]
    )
    itself = 1.0 / len(x) + 1.0 / len(y)
    wider, wider_discrepancy, rose = 0.0, math.inf, False
    for bandwidth in sorted((float(value) for value in searched), reverse=True):
        kernel = (distances + bandwidth**2).reciprocal_()
        discrepancy = itself + bandwidth**2 * float(kernel @ shares)
        if rose and discrepancy < wider_discrepancy:
            return wider
        rose = discrepancy > wider_discrepancy
        wider, wider_discrepancy = bandwidth, discrepancy
    return otherwise


def _pairs(x: Tensor) -> Tensor:
    """Squared distances between each two rows, shape (n (n - 1) / 2,)."""
    row, column = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return squared_distances(x, x)[row, column]


def fade_in(elapsed: float, fade_epochs: float) -> float:
    """The factor xi of the reverse discrepancy: min(n / (0.4 N_fade), 1)^3 (the paper's section 3.3).

    Parameters
    ----------
    elapsed : float
        n: epochs that are finished, so 0 in the first (public code of the paper).
    fade_epochs : float
        N_fade: epochs of the first stage.

    Returns
    -------
    float
        From 0 to 1.
    """
    return min(elapsed / (0.4 * fade_epochs), 1.0) ** 3


def prediction_weight(
    elapsed: float,
    initial: float = 4000.0,
    increment: float = 1000.0,
    fade_epochs: float = 800.0,
    early_epochs: float = 400.0,
    early_until: float = 4800.0,
    late_epochs: float = 600.0,
) -> float:
    """The weight w_pred of the squared errors (the paper's section 3.3).

    It is raised when the first stage ends, and again after every early stage, then after every late one:
    4000 in the first 800 epochs, 5000 in the 400 after them, ... 14,000 in those up to 4,800, then 15,000 in
    600 epochs, ... 26,000 in the last ones up to 12,000.

    Parameters
    ----------
    elapsed : float
        Epochs that are finished.
    initial, increment : float
        The weight in the first stage, and what each later one adds.
    fade_epochs, early_epochs, late_epochs : float
        Epochs in the first stage, in each early one and in each late one.
    early_until : float
        Epochs after which stages are late ones.

    Returns
    -------
    float
    """
    if whole(elapsed, fade_epochs) == 0:
        return initial
    stages = 1 + whole(min(elapsed, early_until) - fade_epochs, early_epochs)
    if elapsed > early_until:
        stages += whole(elapsed - early_until, late_epochs)
    # The stage that begins at the end of the early ones is the first of the late ones, and counted above.
    return initial + increment * stages


def whole(elapsed: float, interval: float) -> int:
    """How many intervals have passed, though rounding may have made them a trifle longer."""
    return math.floor(elapsed / interval + 1e-9)


def forward_losses(
    network: JointNetwork, atmosphere: Tensor, target: Tensor, bandwidths: float | Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Both terms of the forward loss (the paper's equation 8), without their weights.

    Parameters
    ----------
    network : JointNetwork
    atmosphere : Tensor, shape (n, width)
        Padded vectors of the atmosphere's side.
    target : Tensor, shape (n, width)
        Padded vectors of the lines' side: the true lines, padding, and draws of the standard normal
        distribution where the latent is.
    bandwidths : float or sequence of float
        Of the discrepancy.

    Returns
    -------
    error : Tensor
        Scalar: mean squared error of lines and padding.
    discrepancy : Tensor
        Scalar: `mmd2` between lines with latent, predicted, and those of `target`. No gradient comes from it
        through the predicted lines: it must not spoil what they learn from the error.
    latent : Tensor, shape (n, latent_size)
        The latent predicted, without gradient.
    """
    predicted = network.forward_padded(atmosphere)
    latent, lines = network.latent_slice, network.lines_slice
    error = (predicted[:, latent.stop :] - target[:, latent.stop :]).square().mean()
    generated = torch.cat((predicted[:, lines].detach(), predicted[:, latent]), dim=1)
    discrepancy = mmd2(generated, torch.cat((target[:, lines], target[:, latent]), dim=1), bandwidths)
    return error, discrepancy, predicted[:, latent].detach()


def backward_losses(
    network: JointNetwork,
    atmosphere: Tensor,
    returned: Tensor,
    drawn: Tensor,
    bandwidths: float | Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Both terms of the backward loss (the paper's equation 9), without their weights.

    Parameters
    ----------
    network : JointNetwork
    atmosphere : Tensor, shape (n, width)
        The padded vectors that went forward.
    returned, drawn : Tensor, shape (n, width)
        Padded vectors of the lines' side, both with the true lines: with the latent that the forward pass
        predicted, without its gradient, and with draws of the standard normal distribution.
    bandwidths : float or sequence of float
        Of the discrepancy.

    Returns
    -------
    error : Tensor
        Scalar: mean squared error of the inverse of `returned`, padding included.
    discrepancy : Tensor
        Scalar: `mmd2` between the inverse of `drawn` and `atmosphere`, without padding.
    """
    # Rows do not know of each other, so one pass does for both.
    both = network.inverse_padded(torch.cat((returned, drawn)))
    found, sampled = both[: len(returned)], both[len(returned) :]
    physical = network.atmosphere_slice
    error = (found - atmosphere).square().mean()
    return error, mmd2(sampled[:, physical], atmosphere[:, physical], bandwidths)
