"""The preview: a posterior's quantiles at once, by a small network that was taught them by sampling.

To choose a region of a field before the real run, the posterior need not be drawn. The preview goes from what
the conditional network makes of the lines (its context) straight to the median of each number and to the
distances between its quantiles, some twenty times as fast as 64 draws on a CPU. It is an approximation of the
sampled posterior: how far it is off is measured on simulations that neither was taught on (`disagreement`),
and told with it. It knows each number by itself alone: there are no joint draws, hence no misfit and no
derived quantities.

Quantiles ascend with their level whatever the weights: the median comes first, and every further level is a
positive distance from the one before, outwards. Between the levels that were taught they are linear in the
normal deviate of the level, as those of a normal distribution are; levels beyond the outermost ones are
refused, for nothing was learned about them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional

from inn.calibration import FORMATION
from inn.calibration import LEVELS as COVERED
from inn.errors import MisuseError, ModelError
from inn.layout import QUANTITIES, Layout
from inn.marginals import FURTHEST, NormalScores
from inn.posterior import (
    QUANTILES,
    Network,
    check_arguments,
    check_levels,
    filled_batches,
    posterior_quantiles,
    to_physical,
)
from inn.sampling import FAR, SPREAD, TAILS
from inn.scaling import scale_atmosphere

LEVELS = (0.01, 0.05, 0.16, 0.3, 0.5, 0.7, 0.84, 0.95, 0.99)
"""Quantile levels that are taught, the median in their middle."""

BATCH = 512
"""Pixels in one batch: always as many, so that a pixel's numbers do not depend on its neighbours."""

DEVICE_BATCH = 1 << 15
"""The same on any device but the CPU (not measured)."""

FARTHEST = FURTHEST + 1.0
"""Normal score that quantiles are kept within: a little outside of the training set's range."""

CLOSEST, WIDEST = 1e-4, 2.0 * FARTHEST
"""Smallest and largest distance between neighbouring quantiles, in normal scores."""


class Preview(nn.Module):
    """Fully connected network from a pixel's context to quantiles of every number of its atmosphere.

    Parameters
    ----------
    layout : Layout
        Heights.
    context : int
        Length of the conditional network's context vector.
    width, depth : int
        Width and number of the hidden layers.
    rank : int
        Width of the layer between the last hidden one and the quantiles, which vary together.
    levels : sequence of float
        Levels that are taught: an odd number, ascending, the median in their middle.

    Notes
    -----
    The normal scores (`inn.marginals`) on which quantiles are formed, and the standardisation, are buffers
    that `fit_statistics` takes from the training set.
    """

    def __init__(
        self,
        layout: Layout,
        context: int,
        width: int = 256,
        depth: int = 3,
        rank: int = 96,
        levels: Sequence[float] = LEVELS,
    ) -> None:
        super().__init__()
        size = layout.atmosphere_size
        self.layout, self.levels, self.median = layout, tuple(levels), len(levels) // 2
        ascending = all(low < high for low, high in pairwise((0.0, *levels, 1.0)))
        if not ascending or len(levels) % 2 == 0 or self.levels[self.median] != 0.5:
            raise MisuseError(
                "a preview's levels ascend between 0 and 1, and have the median in their middle",
                where="levels",
                found=levels,
            )
        self.spread = tuple(int(np.abs(np.array(levels) - level).argmin()) for level in SPREAD)
        self._architecture = {
            "context": context,
            "width": width,
            "depth": depth,
            "rank": rank,
            "levels": list(levels),
        }
        inputs = [context, *[width] * (depth - 1)]
        self.hidden = nn.ModuleList(nn.Linear(count, width) for count in inputs)
        self.narrow = nn.Linear(width, rank)
        self.last = nn.Linear(rank, len(levels) * size)
        self.scores = NormalScores(size)
        self.register_buffer("context_mean", torch.zeros(context))
        self.register_buffer("context_scale", torch.ones(context))
        self.register_buffer("mean", torch.zeros(len(levels), size))
        self.register_buffer("scale", torch.ones(len(levels), size))

    context_mean: Tensor
    context_scale: Tensor
    mean: Tensor
    scale: Tensor

    def architecture(self) -> dict[str, Any]:
        """Constructor arguments besides the layout, as JSON holds them."""
        return dict(self._architecture)

    @classmethod
    def from_architecture(cls, layout: Layout, architecture: Mapping[str, Any]) -> Self:
        """Build an untrained preview from what `architecture` returned."""
        return cls(layout, **architecture)

    @torch.no_grad()
    def fit_statistics(self, atmosphere: Tensor, context: Tensor, quantiles: Tensor) -> None:
        """Take the normal scores and the standardisation from a training set.

        Parameters
        ----------
        atmosphere : Tensor, shape (n, atmosphere_size)
            Network units.
        context : Tensor, shape (m, context)
        quantiles : Tensor, shape (m, levels, atmosphere_size)
            Quantiles of the posteriors with these contexts, network units.
        """
        self.scores.fit(atmosphere)
        self.context_mean.copy_(context.mean(dim=0))
        self.context_scale.copy_(context.std(dim=0).clamp_min(1e-3))
        values = self.to_scores(quantiles)
        distance = values.diff(dim=1).clamp_min(CLOSEST).log()
        median = values[:, self.median, None]
        raw = torch.cat((distance[:, : self.median], median, distance[:, self.median :]), dim=1)
        self.mean.copy_(raw.mean(dim=0))
        self.scale.copy_(raw.std(dim=0).clamp_min(1e-2))

    def to_scores(self, quantiles: Tensor) -> Tensor:
        """Normal scores (..., atmosphere_size) of network units, kept within what the preview can say."""
        scores: Tensor = self.scores(quantiles)
        return scores.clamp(-FARTHEST, FARTHEST)

    def forward(self, context: Tensor) -> Tensor:
        """Quantiles of the levels that were taught.

        Parameters
        ----------
        context : Tensor, shape (n, context)

        Returns
        -------
        Tensor, shape (n, levels, atmosphere_size)
            Normal scores, never descending with the level.
        """
        return torch.stack(self._of(context, 0, len(self.levels) - 1), dim=1)

    def _of(self, context: Tensor, first: int, last: int) -> list[Tensor]:
        """Normal scores (n, atmosphere_size) of the taught levels first to last, the median among them."""
        values = (context - self.context_mean) / self.context_scale
        for number, layer in enumerate(self.hidden):
            changed = functional.silu(_linear(layer, values))
            values = changed if number == 0 else values + changed
        # The standardisation is undone in the weights, of which there are fewer than of quantiles.
        size = self.layout.atmosphere_size
        rows = slice(first * size, (last + 1) * size)
        scale, mean = self.scale.flatten()[rows], self.mean.flatten()[rows]
        weight = self.last.weight[rows].to(values.dtype) * scale[:, None]
        bias = self.last.bias[rows].to(values.dtype) * scale + mean
        flat = functional.linear(_linear(self.narrow, values), weight, bias)
        raw = flat.reshape(len(flat), -1, size).unbind(dim=1)
        middle = self.median - first
        below, above = [raw[middle]], [raw[middle]]
        for distance in reversed(raw[:middle]):
            below.append(below[-1] - _distance(distance))
        for distance in raw[middle + 1 :]:
            above.append(above[-1] + _distance(distance))
        return [*reversed(below), *above[1:]]

    def quantiles(self, context: Tensor, levels: NDArray[np.float64]) -> Tensor:
        """Quantiles of any levels, in network units.

        Parameters
        ----------
        context : Tensor, shape (n, context)
        levels : ndarray, shape (m,)
            Within those that were taught.

        Returns
        -------
        Tensor, shape (n, m, atmosphere_size)
        """
        places = np.interp(_deviates(levels), _deviates(self.levels), range(len(self.levels)))
        first = min(math.floor(places.min()), self.median)
        last = max(math.ceil(places.max()), self.median)
        taught = [scores.clamp(-FARTHEST, FARTHEST) for scores in self._of(context, first, last)]
        found = []
        for place in places.tolist():
            low, high = (taught[end(place) - first] for end in (math.floor, math.ceil))
            if low is not high:
                # Rounding must not lift it above its neighbour.
                low = torch.minimum(low + (place - math.floor(place)) * (high - low), high)
            found.append(self.scores.inverse(low))
        return torch.stack(found, dim=1)

    def compact(self) -> None:
        """Bring the weights to half precision, in which they are kept; what is computed with them is not."""
        for parameter in self.parameters():
            parameter.data = parameter.data.half()


def _deviates(levels: ArrayLike) -> NDArray[np.float64]:
    deviates: NDArray[np.float64] = torch.special.ndtri(torch.as_tensor(levels, dtype=torch.float64)).numpy()
    return deviates


def _distance(raw: Tensor) -> Tensor:
    return raw.clamp(math.log(CLOSEST), math.log(WIDEST)).exp()


def _linear(layer: nn.Module, values: Tensor) -> Tensor:
    """A linear layer whose weights may be kept in less precision than its values have."""
    assert isinstance(layer, nn.Linear)
    return functional.linear(values, layer.weight.to(values.dtype), layer.bias.to(values.dtype))


class _WithContext(Protocol):
    """What a network must offer to be previewed: the conditional one does."""

    def context(self, lines: Tensor, mu: Tensor | None, calibration_error: Tensor | None) -> Tensor:
        """What the posterior depends on of each pixel, shape (n, context)."""
        ...


def preview_of(model: object) -> Preview:
    """The preview that a network carries.

    Raises
    ------
    ModelError
        It carries none.
    """
    preview = getattr(model, "preview", None)
    if not isinstance(preview, Preview):
        raise ModelError(
            "the model has no preview",
            found=f"a {type(model).__name__} without one",
            remedy="sample its posterior (without --preview); or, if it is a conditional network, teach it "
            "one: flarefield train GRID.zarr NEW --preview-of MODEL",
        )
    return preview


def check_taught(preview: Preview, quantiles: Sequence[float]) -> NDArray[np.float64]:
    """Check that a preview was taught about quantile levels, and return them as an array.

    Raises
    ------
    MisuseError
        Some are no levels, or lie beyond the outermost that were taught.
    """
    levels, (lowest, *_, highest) = check_levels(quantiles), preview.levels
    if beyond := [float(level) for level in levels if not lowest <= level <= highest]:
        raise MisuseError(
            "the preview was not taught about quantiles so far out",
            where="quantiles",
            found=", ".join(f"{level:g}" for level in beyond),
            expected=f"{lowest:g} to {highest:g}",
            remedy="choose levels between these, or sample the posterior (without --preview)",
        )
    return levels


def stated_disagreement(model: nn.Module) -> dict[str, Any]:
    """How far a network's preview is off, as its record tells.

    Parameters
    ----------
    model : nn.Module
        A network with its preview.

    Returns
    -------
    dict
        What `disagreement` returned when it was measured.

    Raises
    ------
    ModelError
        There is no preview, or it has not been measured.
    """
    preview_of(model)
    record: dict[str, Any] = getattr(model, "record", {})
    try:
        stated: dict[str, Any] = record["preview"]["disagreement"]
    except KeyError as missing:
        raise ModelError(
            "it is not known how far the model's preview is off",
            where=f"the model's record, {missing}",
            remedy="measure it with inn.preview.disagreement and save it in the record, or sample the "
            "posterior",
        ) from missing
    return stated


def previewed_at_once(device: str) -> int:
    """Pixels of a batch of a preview on a kind of device: ``"cpu"``, or any other."""
    return BATCH if device == "cpu" else DEVICE_BATCH


@torch.inference_mode()
def preview_quantiles(
    model: Network,
    lines: ArrayLike | Tensor,
    mu: ArrayLike | None = None,
    calibration_error: ArrayLike | None = None,
    quantiles: Sequence[float] = QUANTILES,
) -> dict[str, NDArray[Any]]:
    """Approximate quantiles of each pixel's posterior at every height, without drawing from it.

    Parameters
    ----------
    model : Network
        A conditional network with its `Preview`. The computation runs on its device.
    lines, mu, calibration_error
        As for `inn.posterior.posterior_quantiles`.
    quantiles : sequence of float
        Levels within those that were taught (`Preview.levels`).

    Returns
    -------
    dict of str to ndarray, shape (pixels, quantiles, heights)
        As `inn.posterior.posterior_quantiles` returns it.

    Raises
    ------
    ModelError
        The model has no preview.
    MisuseError
        Shapes or levels cannot be used, or `mu` is missing.
    """
    preview, with_context = preview_of(model), cast(_WithContext, model)
    tensor, angle, error = check_arguments(model, lines, mu, calibration_error)
    levels = check_taught(preview, quantiles)
    weights = next(iter(model.parameters()))
    shape = (tensor.shape[0], levels.size, model.layout.heights.size)
    found = {name: torch.full(shape, torch.nan, dtype=weights.dtype).numpy() for name in QUANTITIES}
    for batch in filled_batches(model, tensor, angle, error, previewed_at_once(weights.device.type)):
        context = with_context.context(batch.lines, batch.mu, batch.calibration_error)
        values = preview.quantiles(context, levels)[: batch.good.numel()]
        values = values.where(batch.good[:, None, None], torch.nan)
        for name, physical in to_physical(values).items():
            # Powers are not exact, and might turn the order of neighbours.
            for lower, upper in pairwise(np.argsort(levels, kind="stable")):
                np.maximum(physical[:, lower], physical[:, upper], out=physical[:, upper])
            found[name][batch.pixels] = physical
    return found


def disagreement(
    model: Network,
    atmosphere: NDArray[Any],
    lines: NDArray[Any],
    mu: NDArray[Any],
    calibration_error: NDArray[Any],
    draws: int = 4096,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure how far the preview is from the sampled posterior, between the heights where the lines form.

    Parameters
    ----------
    model : Network
        A conditional network with its preview.
    atmosphere : ndarray, shape (n, atmosphere_size)
        Truth, network units.
    lines : ndarray, shape (n, lines_size)
        Of simulations that neither the network nor its preview was taught on.
    mu, calibration_error : ndarray, shape (n,)
    draws, seed : int
        Sobol draws of each posterior.

    Returns
    -------
    dict
        ``examples``, ``draws``, ``heights`` (Mm); ``left_out``: share of the numbers whose posterior has two
        states far apart, which are not scored (`inn.sampling.FAR`); and for each quantity ``rms`` and
        ``median``: root mean square and median absolute difference of each of the quantiles `QUANTILES`,
        by level, in units of the sampled posterior's spread (half of its 84 % less its 16 % quantile), taken
        in network units; and ``coverage``: share of true atmospheres inside the preview's central intervals.
    """
    layout = model.layout
    inside = (layout.heights >= FORMATION[0]) & (layout.heights <= FORMATION[1])
    bounds = sorted({0.5 + sign * 0.5 * level for level in COVERED for sign in (-1, 1)})

    def scaled(found: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        return scale_atmosphere(*(found[name][..., inside].astype(np.float64) for name in QUANTITIES))

    conditions = (lines, mu, calibration_error)
    truth = scaled(
        posterior_quantiles(
            model, *conditions, draws=draws, seed=seed, quantiles=(*QUANTILES, *SPREAD, *TAILS)
        )
    )
    preview = scaled(preview_quantiles(model, *conditions, (*QUANTILES, *bounds)))
    count = len(QUANTILES)
    low, high, *tails = np.moveaxis(truth[:, count:], 1, 0)
    spread, median = 0.5 * (high - low), truth[:, QUANTILES.index(0.5)]
    scored = (spread > 0) & np.all([np.abs(tail - median) <= FAR * spread for tail in tails], axis=0)
    difference = np.abs(preview[:, :count] - truth[:, :count])
    actual = atmosphere.reshape(len(atmosphere), len(QUANTITIES), -1)[..., inside].astype(np.float64)
    interval = dict(zip(bounds, np.moveaxis(preview[:, count:], 1, 0), strict=True))
    result: dict[str, Any] = {
        "examples": len(lines),
        "draws": draws,
        "heights": list(FORMATION),
        "left_out": round(1.0 - float(scored.mean()), 4),
    }
    heights = int(inside.sum())
    for number, name in enumerate(QUANTITIES):
        here = slice(number * heights, (number + 1) * heights)
        unit = np.where(scored, spread, np.nan)[:, None, here]
        relative = difference[..., here] / unit
        covers = {}
        for level in COVERED:
            low, high = (interval[0.5 + sign * 0.5 * level][:, here] for sign in (-1, 1))
            covers[f"{level:.2f}"] = float(((actual[:, number] >= low) & (actual[:, number] <= high)).mean())
        result[name] = {
            "rms": _by_level(np.sqrt(np.nanmean(relative**2, axis=(0, 2)))),
            "median": _by_level(np.nanmedian(relative, axis=(0, 2))),
            "coverage": {level: round(share, 4) for level, share in covers.items()},
        }
    return result


def _by_level(values: NDArray[np.float64]) -> dict[str, float]:
    return {f"{level:g}": round(float(value), 4) for level, value in zip(QUANTILES, values, strict=True)}
