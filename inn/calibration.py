"""How good a posterior is on examples whose truth is known: coverage, ranks, sharpness and error."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from inn.layout import QUANTITIES
from inn.posterior import Network, sample
from inn.scaling import scale, unscale

LEVELS = (0.50, 0.68, 0.90)
"""Central intervals whose coverage is measured."""

FORMATION = (0.3, 1.5)
"""Heights (Mm) between which the two lines say something about the atmosphere."""


def coverage(draws: NDArray[Any], truth: NDArray[Any], level: float) -> NDArray[np.float64]:
    """Share of truths inside the central interval of the draws.

    Parameters
    ----------
    draws : ndarray, shape (pixels, draws, heights)
    truth : ndarray, shape (pixels, heights)
    level : float
        Nominal share, between 0 and 1.

    Returns
    -------
    ndarray, shape (heights,)
    """
    low, high = np.quantile(draws, (0.5 - 0.5 * level, 0.5 + 0.5 * level), axis=1)
    inside: NDArray[np.float64] = ((truth >= low) & (truth <= high)).mean(axis=0)
    return inside


def normalised_ranks(
    draws: NDArray[Any], truth: NDArray[Any], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Where truths lie among their draws, from 0 (below all) to 1 (above all).

    The rank of the truth among the draws, those that equal it counted or not by chance, plus a number drawn
    evenly between 0 and 1, over the number of draws plus one. If the truth and its independent draws come
    from one distribution, the result is uniform for any number of draws, without the steps of the rank
    itself: simulation-based calibration (Talts et al. 2018, arXiv:1804.06788, theorem 1).

    Parameters
    ----------
    draws : ndarray, shape (pixels, draws, heights)
        Independent of each other and between pixels: latents shared by all pixels would make every pixel err
        alike, and evenly spread ones (Sobol points) are not independent.
    truth : ndarray, shape (pixels, heights)
    generator : numpy.random.Generator
        Source of the random numbers.

    Returns
    -------
    ndarray, shape (pixels, heights)
        The truth lies inside the central interval of probability ``p`` where this is within ``p / 2`` of 0.5.
    """
    below = (draws < truth[:, None]).sum(axis=1)
    equal = (draws == truth[:, None]).sum(axis=1)
    ranks = below + generator.integers(0, equal + 1)
    share: NDArray[np.float64] = (ranks + generator.uniform(size=ranks.shape)) / (draws.shape[1] + 1)
    return share


def crps(draws: NDArray[Any], truth: NDArray[Any]) -> NDArray[np.float64]:
    """Continuous ranked probability score of an ensemble against the truth; smaller is better.

    ``E|X - truth| - E|X - X'| / 2``, both means over the ensemble (Gneiting & Raftery 2007, J. Am. Stat.
    Assoc. 102, 359, eq. 21, doi:10.1198/016214506000001437).

    Parameters
    ----------
    draws : ndarray, shape (pixels, draws, heights)
    truth : ndarray, shape (pixels, heights)

    Returns
    -------
    ndarray, shape (pixels, heights)
        In the unit of the draws.
    """
    ordered = np.sort(draws.astype(np.float64), axis=1)
    count = ordered.shape[1]
    error = np.abs(ordered - truth[:, None]).mean(axis=1)
    # The mean difference of all pairs, from the order statistics alone.
    weight = (2.0 * np.arange(count) + 1.0 - count) / count**2
    spread = np.einsum("pdh,d->ph", ordered, weight)
    score: NDArray[np.float64] = error - spread
    return score


def held_out_metrics(
    model: Network,
    atmosphere: NDArray[Any],
    lines: NDArray[Any],
    mu: NDArray[Any] | None = None,
    calibration_error: NDArray[Any] | None = None,
    draws: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Score a network on examples with known atmospheres, between the heights where the lines form.

    Parameters
    ----------
    model : Network
    atmosphere : ndarray, shape (n, atmosphere_size)
        Truth, network units.
    lines : ndarray, shape (n, lines_size)
    mu, calibration_error : ndarray, shape (n,), optional
    draws, seed : int
        Posterior draws per example.

    Returns
    -------
    dict
        ``examples``, ``heights`` (Mm), and for each quantity: ``coverage`` of the central intervals by level;
        ``error_ratio``, the median absolute error of the posterior's median over that of the examples' own
        median profile, which is the best constant answer, pooled over examples and heights; ``crps``;
        ``correlation`` of posterior median and truth. Electron density and temperature are scored in dex,
        velocity in km/s (its CRPS in network units as the others').
    """
    layout = model.layout
    heights = np.flatnonzero((layout.heights >= FORMATION[0]) & (layout.heights <= FORMATION[1]))
    drawn = sample(model, lines, mu, calibration_error, draws=draws, seed=seed)
    result: dict[str, Any] = {"examples": len(lines), "heights": list(FORMATION)}
    for number, quantity in enumerate(QUANTITIES):
        first = number * layout.heights.size
        truth = atmosphere[:, first + heights].astype(np.float64)
        ensemble = scale(quantity, drawn[quantity][:, :, heights].astype(np.float64))
        median = np.median(ensemble, axis=1)
        if quantity == "velocity":
            compared, wanted = np.median(drawn[quantity][:, :, heights], axis=1), unscale(quantity, truth)
        else:
            compared, wanted = median, truth
        error = np.median(np.abs(compared - wanted))
        climatology = np.median(np.abs(np.median(wanted, axis=0) - wanted))
        result[quantity] = {
            "coverage": {f"{level:.2f}": float(coverage(ensemble, truth, level).mean()) for level in LEVELS},
            "median_error": float(error),
            "error_ratio": float(error / climatology),
            "crps": float(crps(ensemble, truth).mean()),
            "correlation": float(np.corrcoef(compared.ravel(), wanted.ravel())[0, 1]),
        }
    return result
