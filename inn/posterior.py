"""Batched sampling of a network's posterior: draws, quantiles and misfit for many pixels.

Every pixel is given the same latent draws, so that two pixels with the same lines have the same posterior and
a map does not depend on how it was cut into tiles. Pixels are taken in batches of a fixed number of rows
(pixels times draws) that stay in the processor's cache; the last batch is filled up to the same size, so that
every matrix product has the same shape and a pixel's numbers do not depend on its neighbours.

Everything happens on the network's device. Lines that are a tensor there already stay there, and draws are
sorted there; only what is returned comes to the host. (On a GPU this has never been run: it is tested on the
CPU, and on a device without memory, where any copy to the host fails.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from inn.errors import MisuseError
from inn.latent import LatentKind, TunedLatents, draw_latent
from inn.layout import Layout
from inn.precision import Precision, fastest, products_in
from inn.scaling import unscale_atmosphere

QUANTILES = (0.05, 0.16, 0.5, 0.84, 0.95)
"""Default quantile levels: the median, and the central 68 and 90 % intervals."""

MISFIT_DRAWS = 4
"""Draws whose emulated profiles are compared with the observed ones, by default: of the bundled network's 64,
these tell the median over all to 14 %, eight to 10 %; it ranges over a factor of 3.5 from pixel to pixel."""

BATCH_ROWS = 4096
"""Pixels times draws in one batch: what a core's cache holds of the networks' hidden layers."""

MISFIT_ROWS = 1024
"""Pixels times draws whose emulated profiles are computed at once on a CPU: fewer have the emulator's weights
brought to half precision more often, more do not stay in a core's cache."""

DEVICE_BATCH_ROWS = 1 << 17
"""The same on any device but the CPU: enough to occupy a GPU (not measured), in a few GB of its memory."""


class Network(Protocol):
    """What a network must offer to be sampled: both kinds of `inn` do."""

    layout: Layout
    latent_size: int

    def inverse_draws(
        self, lines: Tensor, latent: Tensor, mu: Tensor | None, calibration_error: Tensor | None
    ) -> Tensor:
        """Atmospheres (n, draws, atmosphere_size): lines (n, lines_size) by latents (draws, latent_size)."""
        ...

    def parameters(self) -> Iterator[Tensor]:
        """The weights, whose device and dtype the computation takes."""
        ...


@runtime_checkable
class ScoreDraws(Protocol):
    """A network that draws on a scale of its own that ascends with the network units, number by number."""

    def score_draws(
        self, lines: Tensor, latent: Tensor, mu: Tensor | None, calibration_error: Tensor | None
    ) -> Tensor:
        """As `Network.inverse_draws`, on that scale."""
        ...

    def from_scores(self, scores: Tensor) -> Tensor:
        """Network units (..., atmosphere_size) of numbers on that scale."""
        ...


class Filled(NamedTuple):
    """A batch of pixels, filled up to a fixed number of rows.

    Attributes
    ----------
    pixels : slice
        Which they are among all.
    good : Tensor of bool, shape (pixels,)
        Those that can be used.
    lines : Tensor, shape (rows, lines_size)
        On the network's device, in its precision; any finite numbers where there is no pixel, or a bad one.
    mu, calibration_error : Tensor, shape (rows,), or None
    """

    pixels: slice
    good: Tensor
    lines: Tensor
    mu: Tensor | None
    calibration_error: Tensor | None


class _Batch(NamedTuple):
    pixels: slice
    good: Tensor
    atmosphere: Tensor


def draw_atmospheres(
    model: Network,
    lines: Tensor,
    latent: Tensor,
    mu: Tensor | None,
    calibration_error: Tensor | None,
    *,
    scores: bool = False,
    precision: Precision = "float32",
) -> Tensor:
    """Atmospheres of every pixel with every one of the same latents, all at once.

    Parameters
    ----------
    model : Network
    lines : Tensor, shape (pixels, lines_size)
    latent : Tensor, shape (draws, latent_size)
    mu, calibration_error : Tensor, shape (pixels,), optional
    scores : bool
        On the network's own scale, if it has one (`ScoreDraws`).
    precision : {"float32", "bfloat16"}
        Of the factors of matrix products; sums, and all else, are in the network's own.

    Returns
    -------
    Tensor, shape (pixels, draws, atmosphere_size)
        In network units, or on that scale.
    """
    with products_in(precision, lines.device):
        if scores and isinstance(model, ScoreDraws):
            return model.score_draws(lines, latent, mu, calibration_error)
        return model.inverse_draws(lines, latent, mu, calibration_error)


def compile_draws(model: Network) -> None:
    """Have torch compile how a network draws, at its first batch: once for each shape of batches.

    It then takes two thirds of the time on a CPU (`tests.benchmarks.levers`), since intermediate numbers stay
    in registers, and changes quantiles by a hundred-thousandth of a posterior's spread. The first batch takes
    seconds, and torch needs a C++ compiler for a CPU, Triton for a GPU.

    Parameters
    ----------
    model : Network
        It is changed.
    """
    name = "score_draws" if isinstance(model, ScoreDraws) else "inverse_draws"
    # A process for each of a worker's compilations would be one too many for the cluster that counts them.
    quick = torch.compile(getattr(model, name), dynamic=False, fullgraph=True, options={"compile_threads": 1})
    setattr(model, name, quick)


def _per_pixel(values: ArrayLike | None, name: str, pixels: int) -> NDArray[np.float64] | None:
    if values is None:
        return None
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0:
        return np.full(pixels, float(array))
    if array.shape != (pixels,):
        raise MisuseError(
            f"{name} must be one number, or one per pixel",
            where=name,
            found=f"shape {array.shape}",
            expected=f"() or ({pixels},)",
        )
    return array


def as_lines(lines: ArrayLike | Tensor, layout: Layout) -> Tensor:
    """Check that lines suit a network; a tensor stays on its device, any other array shares its memory.

    Parameters
    ----------
    lines : array_like or Tensor, shape (pixels, lines_size)
        Lines, as a network takes them.
    layout : Layout
        The network's.

    Returns
    -------
    Tensor, shape (pixels, lines_size)

    Raises
    ------
    MisuseError
        They have another shape.
    """
    if isinstance(lines, Tensor):
        tensor = lines.detach()
    else:  # torch takes neither arrays that must not be written to nor negative strides
        tensor = torch.from_numpy(np.require(lines, requirements=["C", "W"]))
    if tensor.ndim != 2 or tensor.shape[1] != layout.lines_size:
        raise MisuseError(
            "lines must hold one row per pixel, at the network's points",
            where="lines",
            found=f"shape {tuple(tensor.shape)}",
            expected=f"(pixels, {layout.lines_size})",
            remedy="bring observed profiles there with pipeline.spectra.network_lines",
        )
    return tensor


def filled_batches(
    model: Network,
    lines: Tensor,
    mu: NDArray[np.float64] | None,
    calibration_error: NDArray[np.float64] | None,
    size: int,
) -> Iterator[Filled]:
    """Go through pixels in batches of the same shape, so that none depends on its neighbours.

    Parameters
    ----------
    model : Network
        Batches are brought to its device and precision.
    lines, mu, calibration_error
        As `check_arguments` returns them.
    size : int
        Rows of a batch.

    Yields
    ------
    Filled
        On the CPU none without a pixel that can be used.
    """
    weights = next(iter(model.parameters()))
    lines = lines.to(weights.device)
    angle, error = (
        None if values is None else torch.from_numpy(values).to(weights.device)
        for values in (mu, calibration_error)
    )
    finite = lines.isfinite().all(dim=1)
    for extra in (angle, error):
        if extra is not None:
            finite &= extra.isfinite()

    def filled(values: Tensor, pixels: slice, good: Tensor) -> Tensor:
        # Any finite number will do where there is no pixel, or none that can be used.
        rows = values.new_full((size, *values.shape[1:]), 0.5)
        rows[: good.numel()] = values[pixels].where(_along(good, values), 0.5)
        return rows.to(weights)

    for start in range(0, lines.shape[0], size):
        pixels = slice(start, min(start + size, lines.shape[0]))
        good = finite[pixels]
        if good.device.type == "cpu" and not good.any():  # elsewhere, to look would make the host wait
            continue
        yield Filled(
            pixels,
            good,
            filled(lines, pixels, good),
            None if angle is None else filled(angle, pixels, good),
            None if error is None else filled(error, pixels, good),
        )


def pixels_at_once(draws: int, device: str, batch_rows: int | None = None) -> int:
    """Pixels of a batch of draws on a kind of device: ``"cpu"``, or any other."""
    if batch_rows is None:
        batch_rows = BATCH_ROWS if device == "cpu" else DEVICE_BATCH_ROWS
    return max(1, batch_rows // draws)


def _batches(
    model: Network,
    lines: Tensor,
    mu: NDArray[np.float64] | None,
    calibration_error: NDArray[np.float64] | None,
    latent: Tensor,
    batch_rows: int | None,
    precision: Precision = "float32",
    scores: bool = False,
) -> Iterator[_Batch]:
    """Sample every pixel, batch by batch, all batches of the same shape (`scores`: on its own scale)."""
    weights = next(iter(model.parameters()))
    latent = latent.to(weights)
    size = pixels_at_once(latent.shape[0], weights.device.type, batch_rows)
    for pixels, good, observed, cosine, error in filled_batches(model, lines, mu, calibration_error, size):
        atmosphere = draw_atmospheres(
            model, observed, latent, cosine, error, scores=scores, precision=precision
        )
        yield _Batch(pixels, good, atmosphere[: good.numel()])


def _along(good: Tensor, values: Tensor) -> Tensor:
    """Booleans (pixels,) in a shape that goes with values (pixels, ...)."""
    return good.reshape(-1, *[1] * (values.ndim - 1))


def sorted_draws(atmosphere: Tensor) -> Tensor:
    """Sort draws (pixels, draws, size), number by number: (pixels, size, draws).

    Without gradients. Draws whose memory is laid out that way already are sorted in place.
    """
    columns = atmosphere.transpose(1, 2).contiguous()
    if columns.device.type == "cpu":
        # NumPy sorts contiguous rows with vector instructions: 35 times faster than torch, measured.
        array = columns.numpy()
        array.sort(axis=-1)
        return columns
    return columns.sort(dim=-1).values


def order_statistics(ordered: Tensor, quantiles: NDArray[np.float64]) -> Tensor:
    """Quantiles of sorted draws, linear between order statistics as NumPy's.

    Parameters
    ----------
    ordered : Tensor, shape (pixels, size, draws)
    quantiles : ndarray, shape (quantiles,)
        Levels between 0 and 1.

    Returns
    -------
    Tensor, shape (pixels, quantiles, size)
    """
    position = quantiles * (ordered.shape[-1] - 1)
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, ordered.shape[-1] - 1)
    weight = torch.from_numpy(position - below).to(ordered)
    low = ordered[..., torch.from_numpy(below).to(ordered.device)]
    high = ordered[..., torch.from_numpy(above).to(ordered.device)]
    return (low + weight * (high - low)).transpose(1, 2)


def posterior_quantiles(
    model: Network,
    lines: ArrayLike | Tensor,
    mu: ArrayLike | None = None,
    calibration_error: ArrayLike | None = None,
    draws: int = 256,
    quantiles: Sequence[float] = QUANTILES,
    seed: int = 0,
    latent: LatentKind = "sobol",
    precision: Precision = "float32",
    batch_rows: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Quantiles of each pixel's posterior at every height.

    Draws are sorted in network units, or on the network's own ascending scale, and the quantiles,
    interpolated linearly between neighbouring order statistics there, are brought to physical units. The
    scaling ascends, so that this is exact at the order statistics; what it does between two of them is far
    below the sampling error.

    Parameters
    ----------
    model : Network
        A conditional or a joint network. The computation runs on its device, in its dtype.
    lines : array_like or Tensor, shape (pixels, lines_size)
        H-alpha, then Ca II 8542, at the network's points and divided by their joint maximum. A tensor on the
        network's device is used where it is.
    mu : float or array_like, shape (pixels,), optional
        Cosine of the heliocentric angle. The joint network ignores it; the conditional one requires it.
    calibration_error : float or array_like, shape (pixels,), optional
        Relative error (one standard deviation) of the intensity of one line against the other's; the
        network's own default if left out. The joint network ignores it.
    draws : int
        Latent draws per pixel.
    quantiles : sequence of float
        Levels between 0 and 1.
    seed : int
        Seed of the latent draws, which all pixels share.
    latent : {"sobol", "gaussian", "balanced", "tuned"}
        How they are drawn: `latents_of`.
    precision : {"float32", "bfloat16"}
        Of the factors of matrix products (`inn.precision`).
    batch_rows : int, optional
        Pixels times draws computed at once; `BATCH_ROWS` or `DEVICE_BATCH_ROWS` if left out.

    Returns
    -------
    dict of str to ndarray, shape (pixels, quantiles, heights)
        ``electron_density`` (cm-3), ``temperature`` (K) and ``velocity`` (km/s, upflow positive). NaN for
        pixels whose lines, `mu` or `calibration_error` are not finite.

    Raises
    ------
    MisuseError
        Shapes, levels or the number of draws cannot be used.
    """
    tensor, angle, error = check_arguments(model, lines, mu, calibration_error)
    points = latents_of(model, draws, seed, latent)
    found, _ = _sampled(model, tensor, angle, error, points, check_levels(quantiles), batch_rows, precision)
    return to_physical(found)


def quantiles_and_misfit(
    model: Network,
    lines: ArrayLike | Tensor,
    mu: ArrayLike | None = None,
    calibration_error: ArrayLike | None = None,
    draws: int = 256,
    quantiles: Sequence[float] = QUANTILES,
    seed: int = 0,
    latent: LatentKind = "sobol",
    precision: Precision = "float32",
    batch_rows: int | None = None,
    checked: int = MISFIT_DRAWS,
) -> tuple[dict[str, NDArray[Any]], NDArray[Any]]:
    """Quantiles of each pixel's posterior, and how well it reproduces the profiles, from the same draws.

    Parameters
    ----------
    model, lines, mu, calibration_error, draws, quantiles, seed, latent, precision, batch_rows
        As in `posterior_quantiles`.
    checked : int
        Draws, spread evenly over all, whose profiles are compared with the observed ones.

    Returns
    -------
    quantiles : dict of str to ndarray, shape (pixels, quantiles, heights)
        As `posterior_quantiles` returns them.
    misfit : ndarray, shape (pixels,)
        As `misfit` returns it.

    Raises
    ------
    MisuseError
        As `posterior_quantiles` raises it.
    """
    tensor, angle, error = check_arguments(model, lines, mu, calibration_error)
    points = latents_of(model, draws, seed, latent)
    found, distance = _sampled(
        model, tensor, angle, error, points, check_levels(quantiles), batch_rows, precision, checked
    )
    return to_physical(found), distance.cpu().numpy()


def check_levels(quantiles: Sequence[float]) -> NDArray[np.float64]:
    """Check quantile levels, and return them as an array."""
    levels = np.asarray(quantiles, dtype=np.float64)
    if levels.ndim != 1 or levels.size == 0 or not np.all((levels >= 0.0) & (levels <= 1.0)):
        raise MisuseError(
            "quantiles are levels between 0 and 1", where="quantiles", found=quantiles, expected="e.g. 0.5"
        )
    return levels


def to_physical(found: Tensor) -> dict[str, NDArray[Any]]:
    """Named quantities in physical units, on the host, of atmospheres (..., atmosphere_size)."""
    if found.device.type == "cpu":
        return unscale_atmosphere(found.numpy())  # NumPy's powers and torch's differ in their last bits
    return {name: values.cpu().numpy() for name, values in unscale_atmosphere(found).items()}


@torch.inference_mode()
def _sampled(
    model: Network,
    lines: Tensor,
    mu: NDArray[np.float64] | None,
    calibration_error: NDArray[np.float64] | None,
    latent: Tensor,
    levels: NDArray[np.float64],
    batch_rows: int | None,
    precision: Precision = "float32",
    checked: int = 0,
) -> tuple[Tensor, Tensor]:
    """Quantiles (pixels, levels, atmosphere_size) in network units and misfits (pixels,), on its device."""
    weights = next(iter(model.parameters()))
    found = weights.new_full((lines.shape[0], levels.size, model.layout.atmosphere_size), torch.nan)
    emulator = getattr(model, "emulator", None) if checked and mu is not None else None
    checked = min(checked, len(latent))
    some = ((torch.arange(checked) + 0.5) * (len(latent) / max(checked, 1))).long().to(weights.device)
    chosen = found.new_zeros((len(lines) if emulator is not None else 0, checked, found.shape[-1]))
    for batch in _batches(model, lines, mu, calibration_error, latent, batch_rows, precision, scores=True):
        drawn = batch.atmosphere
        if emulator is not None:  # before they are sorted, which may happen in place
            chosen[batch.pixels] = drawn[:, some]
        values = order_statistics(sorted_draws(drawn), levels)
        if isinstance(model, ScoreDraws):
            values = model.from_scores(values)
        found[batch.pixels] = values.where(_along(batch.good, values), torch.nan)
    if emulator is None:
        return found, weights.new_full((len(lines),), torch.nan)
    return found, _misfit(model, emulator, chosen, lines, mu, calibration_error)


def _misfit(
    model: Network,
    emulator: Any,  # noqa: ANN401
    drawn: Tensor,
    lines: Tensor,
    mu: NDArray[np.float64] | None,
    calibration_error: NDArray[np.float64] | None,
) -> Tensor:
    """Median over draws (pixels, draws, atmosphere_size) of the distance of their lines, (pixels,).

    They are on the network's own scale, if it has one. Products are as fast as the device has them: half
    precision changes a misfit by 0.4 % (the bundled network, on held-out simulations), far less than the
    choice of the draws.
    """
    median = drawn.new_full((len(drawn),), torch.nan)
    draws = drawn.shape[1]
    device = drawn.device.type
    size = pixels_at_once(draws, device, MISFIT_ROWS if device == "cpu" else None)
    for batch in filled_batches(model, lines, mu, calibration_error, size):
        assert batch.mu is not None
        atmosphere = functional.pad(drawn[batch.pixels], (0, 0, 0, 0, 0, size - len(batch.good)))
        if isinstance(model, ScoreDraws):
            atmosphere = model.from_scores(atmosphere)
        with products_in(fastest(drawn.device), drawn.device):
            distance: Tensor = emulator.distance(
                atmosphere.flatten(0, 1),
                batch.lines.repeat_interleave(draws, dim=0),
                batch.mu.repeat_interleave(draws),
            )
        ordered = distance.reshape(size, draws).sort(dim=1).values  # a tenth of the time of torch's quantile
        middle = 0.5 * (ordered[:, (draws - 1) // 2] + ordered[:, draws // 2])
        median[batch.pixels] = middle[: len(batch.good)].where(batch.good, torch.nan)
    return median


def sample(
    model: Network,
    lines: ArrayLike | Tensor,
    mu: ArrayLike | None = None,
    calibration_error: ArrayLike | None = None,
    draws: int = 1000,
    seed: int = 0,
    latent: LatentKind = "sobol",
    precision: Precision = "float32",
    batch_rows: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Joint draws of each pixel's atmosphere, for gradients, column masses or any other derived quantity.

    Parameters
    ----------
    model, lines, mu, calibration_error, draws, seed, latent, precision, batch_rows
        As in `posterior_quantiles`.

    Returns
    -------
    dict of str to ndarray, shape (pixels, draws, heights)
        ``electron_density`` (cm-3), ``temperature`` (K) and ``velocity`` (km/s, upflow positive): draw i of
        all three belongs to one atmosphere. NaN for pixels whose input is not finite.

    Raises
    ------
    MisuseError
        Shapes or the number of draws cannot be used.
    """
    tensor, angle, error = check_arguments(model, lines, mu, calibration_error)
    points = latents_of(model, draws, seed, latent)
    shape = (tensor.shape[0], draws, model.layout.atmosphere_size)
    result = np.full(shape, np.nan, dtype=_dtype(model))
    with torch.inference_mode():
        for batch in _batches(model, tensor, angle, error, points, batch_rows, precision):
            good = batch.good.cpu().numpy()
            result[batch.pixels][good] = batch.atmosphere.cpu().numpy()[good]
    return unscale_atmosphere(result)


def misfit(
    model: Network,
    lines: ArrayLike | Tensor,
    mu: ArrayLike | None = None,
    calibration_error: ArrayLike | None = None,
    draws: int = MISFIT_DRAWS,
    seed: int = 0,
    latent: LatentKind = "sobol",
    precision: Precision = "float32",
    batch_rows: int | None = None,
) -> NDArray[Any]:
    """How well a pixel's posterior reproduces its profiles: a posterior predictive check.

    The network's emulator turns posterior draws back into profiles. The misfit of a draw is the root mean
    square of observed minus emulated over all points of both lines, in units of the joint maximum, at the
    microturbulence that suits it best; the median over the draws is returned.

    Parameters
    ----------
    model, lines, mu, calibration_error, draws, seed, latent, precision, batch_rows
        As in `posterior_quantiles`; a few draws suffice.

    Returns
    -------
    ndarray, shape (pixels,)
        NaN for pixels whose input is not finite, and everywhere if the model has no emulator or no `mu` is
        given.

    Raises
    ------
    MisuseError
        Shapes or the number of draws cannot be used.
    """
    _, distance = quantiles_and_misfit(
        model,
        lines,
        mu,
        calibration_error,
        draws,
        quantiles=(0.5,),
        seed=seed,
        latent=latent,
        precision=precision,
        batch_rows=batch_rows,
        checked=draws,
    )
    return distance


def latents_of(model: Network, draws: int, seed: int, kind: LatentKind) -> Tensor:
    """Draw latents for a network, or take those that it brings with it.

    Parameters
    ----------
    model : Network
        Its ``latents`` are its `inn.latent.TunedLatents`, if it has any.
    draws, seed, kind
        As for `inn.latent.draw_latent`; tuned latents have no seed, and it has no effect on them.

    Returns
    -------
    Tensor, shape (draws, latent_size)
        float32, on the CPU, finite.

    Raises
    ------
    MisuseError
        As `draw_latent` raises it, or the network has no such tuned latents.
    """
    if kind != "tuned":
        return draw_latent(draws, model.latent_size, seed, kind)
    tuned = getattr(model, "latents", None)
    if not isinstance(tuned, TunedLatents):
        raise MisuseError(
            "the network brings no latents with it", found=kind, expected="sobol, gaussian or balanced"
        )
    points: Tensor = tuned(draws)
    return points.detach().float().cpu()


def _dtype(model: Network) -> np.dtype[Any]:
    return torch.empty(0, dtype=next(iter(model.parameters())).dtype).numpy().dtype


def check_arguments(
    model: Network, lines: ArrayLike | Tensor, mu: ArrayLike | None, calibration_error: ArrayLike | None
) -> tuple[Tensor, NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Check `posterior_quantiles`' arguments: lines as a tensor, the others as one number for each pixel."""
    tensor = as_lines(lines, model.layout)
    angle = _per_pixel(mu, "mu", tensor.shape[0])
    error = _per_pixel(calibration_error, "calibration_error", tensor.shape[0])
    # Numbers that are missing (NaN) spoil their pixels alone; impossible ones are a mistake.
    for name, values in (("mu", angle), ("calibration_error", error)):
        if values is not None and ((values < 0.0) | (values > 1.0)).any():
            raise MisuseError(
                f"{name} lies between 0 and 1",
                where=name,
                found=f"{np.nanmin(values):g} to {np.nanmax(values):g}",
                remedy="mu is the cosine of the heliocentric angle; the error is relative, 0.05 for 5 %",
            )
    return tensor, angle, error
