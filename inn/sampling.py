"""How a network's posterior is sampled: which latents, how many, and what error quantiles then have.

Every network has an error curve of its own, measured once on held-out simulations and kept in its record. How
many draws a wanted error takes is read from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Context
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from inn.errors import MisuseError
from inn.latent import LatentKind, TunedLatents
from inn.layout import QUANTITIES
from inn.posterior import BATCH_ROWS, QUANTILES, Network, check_levels, posterior_quantiles
from inn.precision import Precision, fastest
from inn.scaling import scale_atmosphere

Array = NDArray[np.floating]

PRECISION_ERROR = 0.02
"""Largest change of quantiles (root mean square, in units of the posterior's spread) for which products are
done in half precision: a fifth of the error at which networks are sampled, which grows by 2 % of itself."""

SCORED = (0.05, 0.5, 0.95)
"""Quantiles whose error is measured."""
SPREAD = (0.16, 0.84)
"""Quantiles whose half distance is the posterior's spread, the unit of errors."""
TAILS = (0.02, 0.98)
FAR = 10.0
"""Numbers whose `TAILS` lie further from the median than this (in units of the spread) are not scored: one of
two states far apart then holds about 5 %, and that quantile lies in the gap between them, where no number of
draws finds it."""
TRUTH_SEED = 10**6

LADDER = (16, 32, 64, 128, 256, 512)
"""Numbers of draws whose error is measured."""
DRAWN: tuple[LatentKind, ...] = ("balanced", "sobol", "gaussian")
"""Kinds of latents that are drawn, whatever the network."""
DEFAULT_ERROR = 0.13
"""Error of the quantiles at which networks are sampled by default, in units of the posterior's spread.

It adds less than one per cent to an interval's width (in quadrature), and there the bundled network's error
curve flattens."""
OUTERMOST = 0.05
"""Quantiles nearer to 0 or 1 than this are beyond what is measured, and what latents are tuned for."""
DRAWS_BEYOND = 8
"""Draws that then should lie beyond the outermost quantile."""
MOST_DRAWS = 16384
"""Draws that count as the truth when errors are measured: of more it is not known what error they leave."""
MOST_NAMED = 1 << 20
"""Draws that can be asked for at most: eight of them lie beyond a quantile at 1e-5, and the error that they
leave is about a thousandth of the posterior's spread."""
LAST_SEED = (1 << 64) - 1
"""The largest that torch's generators take."""
UNKNOWN: LatentKind = "sobol"
UNKNOWN_DRAWS = 256
"""Latents of a network whose error curve is not known."""


@dataclass(frozen=True)
class Sampling:
    """Latents to sample a posterior with.

    Attributes
    ----------
    latent : {"sobol", "gaussian", "balanced", "tuned"}
        Their kind.
    draws : int
        How many.
    seed : int
        Theirs; 0 for tuned ones, which have none.
    error : float or None
        Error of the quantiles at 5, 50 and 95 % that is to be expected, in units of the posterior's spread
        (root mean square over the numbers that `Truth` scores); None if it is not known.
    """

    latent: LatentKind
    draws: int
    seed: int
    error: float | None

    def __str__(self) -> str:
        text = f"{self.draws:,} {self.latent} draws a pixel"
        if self.error is None:
            return f"{text} (what error of the quantiles that leaves is not known)"
        return (
            f"{text} (which leaves the quantiles at 5, 50 and 95 % an error of {self.error:.2g} of the "
            "posterior's spread)"
        )

    def with_precision(self, model: Network, precision: Precision) -> Sampling:
        """The same with the error that products in a precision add, where it is known.

        Parameters
        ----------
        model : Network
            Its ``record["sampling"]["precision_error"]`` holds what half precision changes.
        precision : {"float32", "bfloat16"}
        """
        change = getattr(model, "record", {}).get("sampling", {}).get("precision_error")
        if precision == "float32" or self.error is None or change is None:
            return self
        return replace(self, error=math.hypot(self.error, change))


def choose_precision(model: Network, device: torch.device | str) -> Precision:
    """Choose the precision of matrix products: what the network's record says, where the device can.

    Parameters
    ----------
    model : Network
        Its ``record["sampling"]["precision"]`` holds what suits it.
    device : torch.device or str
        Where it will be sampled.
    """
    wanted = getattr(model, "record", {}).get("sampling", {}).get("precision", "float32")
    return fastest(device) if wanted == "bfloat16" else "float32"


@dataclass(frozen=True)
class QuantileErrors:
    """What the quantiles of few draws are worth.

    Attributes
    ----------
    curves : dict of dict of float
        Error by kind of latents and number of draws: root mean square over observations, numbers and the
        quantiles `SCORED`, in units of the posterior's spread.
    all_curves : dict of dict of float
        The same of all numbers, also those that `scored` leaves out.
    scored : float
        Share of the numbers that are scored.
    """

    curves: dict[str, dict[int, float]]
    all_curves: dict[str, dict[int, float]]
    scored: float

    def to_json(self) -> dict[str, Any]:
        """The errors, as JSON holds them."""

        def plain(curves: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, float]]:
            return {
                kind: {str(draws): round(error, 4) for draws, error in errors.items()}
                for kind, errors in curves.items()
            }

        return {
            "errors": plain(self.curves),
            "errors_of_all": plain(self.all_curves),
            "scored": round(self.scored, 4),
        }


@dataclass(frozen=True)
class Measurement:
    """How well the errors of a network's quantiles are measured.

    Parameters
    ----------
    observations : int
        Observations of held-out simulations.
    truth_draws : int
        Sobol points that count as the truth.
    seeds : int
        Times that each number of draws is drawn.
    half_precision : bool
        Whether half precision is worth its error, if that is small: for networks whose time goes into large
        products.
    """

    observations: int = 96
    truth_draws: int = MOST_DRAWS
    seeds: int = 4
    half_precision: bool = False


Answer = Callable[[int, int, LatentKind, Sequence[float]], Array]
"""Quantiles (observations, levels, numbers) in network units by draws, seed, kind of latents and levels."""


class Truth(NamedTuple):
    """What estimates are held against.

    Attributes
    ----------
    quantiles : ndarray, shape (observations, scored levels, numbers)
    spread : ndarray, shape (observations, numbers)
        The posterior's.
    scored : ndarray of bool, shape (observations, numbers)
        Not where it has two states far apart (`FAR`).
    """

    quantiles: Array
    spread: Array
    scored: NDArray[np.bool_]

    @classmethod
    def of(cls, quantiles: Array) -> Truth:
        """Take quantiles at `SCORED`, `SPREAD`, `TAILS`, shape (observations, 7, numbers), for the truth."""
        found, spread, tails = np.split(quantiles, (len(SCORED), len(SCORED) + len(SPREAD)), axis=1)
        half = 0.5 * (spread[:, 1] - spread[:, 0])
        furthest = np.abs(tails - found[:, 1, None]).max(axis=1)
        return cls(found, half, np.asarray(furthest <= FAR * half))

    def error(self, found: Sequence[Array]) -> tuple[float, float]:
        """Error of estimates: root mean square in units of the spread.

        Parameters
        ----------
        found : sequence of ndarray, shape (observations, scored levels, numbers)
            With several seeds.

        Returns
        -------
        scored, all : float
            Of the numbers that are scored, and of all.
        """
        square = np.mean(np.square(np.stack(found) - self.quantiles), axis=(0, 2)) / self.spread**2
        return float(np.sqrt(square[self.scored].mean())), float(np.sqrt(square.mean()))


def error_curves(
    answer: Answer,
    *,
    kinds: Sequence[LatentKind] = DRAWN,
    ladder: Sequence[int] = LADDER,
    tuned: Sequence[int] = (),
    seeds: int = 4,
    truth_draws: int = MOST_DRAWS,
    truth_kind: LatentKind = "sobol",
) -> QuantileErrors:
    """Measure the error of quantiles against those of very many draws.

    Parameters
    ----------
    answer : callable
        Makes the quantiles.
    kinds, ladder : sequence
        Kinds of latents and numbers of draws.
    tuned : sequence of int
        Numbers of draws of which there are tuned latents.
    seeds : int
        Times that each is drawn.
    truth_draws, truth_kind
        Draws that count as the truth.
    """
    truth = Truth.of(answer(truth_draws, TRUTH_SEED, truth_kind, (*SCORED, *SPREAD, *TAILS)))
    curves: dict[str, dict[int, float]] = {}
    all_curves: dict[str, dict[int, float]] = {}
    for kind, numbers, times in (("tuned", tuned, 1), *((kind, ladder, seeds) for kind in kinds)):
        for draws in numbers:
            error = truth.error([answer(draws, seed, kind, SCORED) for seed in range(times)])
            curves.setdefault(kind, {})[draws], all_curves.setdefault(kind, {})[draws] = error
    return QuantileErrors(curves, all_curves, float(truth.scored.mean()))


def quantile_errors(
    model: Network,
    lines: Array,
    mu: Array | None = None,
    calibration_error: Array | None = None,
    *,
    kinds: Sequence[LatentKind] = DRAWN,
    ladder: Sequence[int] = LADDER,
    seeds: int = 4,
    truth_draws: int = MOST_DRAWS,
) -> QuantileErrors:
    """Measure the error of a network's quantiles against those of very many of its own draws.

    Parameters
    ----------
    model : Network
        If it has tuned latents, all their sets are measured, too.
    lines, mu, calibration_error : ndarray
        Observations, as for `inn.posterior.posterior_quantiles`.
    kinds, ladder, seeds, truth_draws
        As for `error_curves`.
    """

    def answer(draws: int, seed: int, kind: LatentKind, levels: Sequence[float]) -> Array:
        found = posterior_quantiles(
            model,
            lines,
            mu,
            calibration_error,
            draws=draws,
            quantiles=levels,
            seed=seed,
            latent=kind,
            # Batches are filled up, which is dear for few observations.
            batch_rows=max(draws, min(BATCH_ROWS, draws * len(lines))),
        )
        return scale_atmosphere(*(found[quantity].astype(np.float64) for quantity in QUANTITIES))

    tuned = getattr(model, "latents", None)
    sets = tuned.draws if isinstance(tuned, TunedLatents) else ()
    return error_curves(answer, kinds=kinds, ladder=ladder, tuned=sets, seeds=seeds, truth_draws=truth_draws)


def precision_error(
    model: Network,
    lines: Array,
    mu: Array | None = None,
    calibration_error: Array | None = None,
    *,
    draws: int = 128,
) -> float:
    """How much quantiles change when products are done in half precision.

    Parameters
    ----------
    model, lines, mu, calibration_error
        As for `quantile_errors`.
    draws : int
        Sobol points.

    Returns
    -------
    float
        Root mean square over observations, all numbers (also those that `Truth` does not score: these change
        most) and the quantiles `SCORED`, in units of the posterior's spread.
    """

    def answer(precision: Precision) -> Array:
        found = posterior_quantiles(
            model,
            lines,
            mu,
            calibration_error,
            draws=draws,
            quantiles=(*SCORED, *SPREAD),
            precision=precision,
        )
        return scale_atmosphere(*(found[quantity].astype(np.float64) for quantity in QUANTITIES))

    full, half = answer("float32"), answer("bfloat16")
    spread = 0.5 * (full[:, -1] - full[:, -2])[:, None]
    change = (half - full)[:, : len(SCORED)] / spread
    return float(np.sqrt(np.mean(np.square(change))))


def measured_sampling(
    model: Network,
    lines: Array,
    mu: Array | None,
    calibration_error: Array | None,
    measurement: Measurement,
) -> dict[str, Any]:
    """Measure what `choose_sampling` and `choose_precision` want to know of a network.

    Parameters
    ----------
    model, lines, mu, calibration_error
        As for `quantile_errors`.
    measurement : Measurement

    Returns
    -------
    dict
        For the network's record, under ``sampling``.
    """
    observed = (lines, mu, calibration_error)
    errors = quantile_errors(model, *observed, seeds=measurement.seeds, truth_draws=measurement.truth_draws)
    change = precision_error(model, *observed)
    half = measurement.half_precision and change <= PRECISION_ERROR
    return {
        **errors.to_json(),
        "observations": len(lines),
        "precision": "bfloat16" if half else "float32",
        "precision_error": round(change, 4),
    }


def choose_sampling(
    model: Network,
    *,
    draws: int | None = None,
    seed: int | None = None,
    latent: LatentKind | None = None,
    accuracy: float | None = None,
    quantiles: Sequence[float] = QUANTILES,
) -> Sampling:
    """Choose latents for a network, by what it knows of their errors.

    Without any wish, the fewest draws that reach the error `DEFAULT_ERROR` are taken, of the numbers whose
    error is measured (`LADDER`, and the sets of tuned latents): fewer in between might reach it, too. Tuned
    latents, where the network has them, need the fewest; they have no seed, so that one who names a seed gets
    others. So does one who wants quantiles further out than 5 and 95 %, and enough of them to have some
    beyond.

    Parameters
    ----------
    model : Network
        Its ``record["sampling"]`` holds its error curves (`QuantileErrors.to_json`), if they are known.
    draws : int, optional
        Number of draws, at most `MOST_NAMED`.
    seed : int, optional
        Seed of the draws, at most `LAST_SEED`.
    latent : {"sobol", "gaussian", "balanced", "tuned"}, optional
        Kind of latents.
    accuracy : float, optional
        Wanted error of quantiles at 5, 50 and 95 %, in units of the posterior's spread, root mean square.
        Where no measured number of draws reaches it, errors are taken to fall on as those of independent
        draws.
    quantiles : sequence of float
        Levels that are wanted.

    Returns
    -------
    Sampling

    Raises
    ------
    MisuseError
        Wishes contradict each other, or the error curve is not known, or does not reach as far.
    """
    if draws is not None and accuracy is not None:
        raise MisuseError(
            "the number of draws and the accuracy decide the same",
            found=f"{draws} draws, accuracy {accuracy:g}",
            expected="one of them",
        )
    if accuracy is not None and not 0.0 < accuracy < math.inf:
        raise MisuseError("the accuracy is an error above zero", where="accuracy", found=accuracy)
    if draws is not None and not 1 <= draws <= MOST_NAMED:
        raise MisuseError(
            "so many draws of each pixel cannot be had",
            where="draws",
            found=f"{draws:,}",
            expected=f"1 to {MOST_NAMED:,}",
            remedy="draw less, or leave the number out: it is then what the accuracy takes",
        )
    if seed is not None and not 0 <= seed <= LAST_SEED:
        raise MisuseError(
            "a seed is a number from 0 that 64 bits hold",
            where="seed",
            found=seed,
            expected=f"0 to {LAST_SEED}",
            remedy="choose a smaller one",
        )
    tail = float(min(min(level, 1.0 - level) for level in check_levels(quantiles)))
    curves = _curves(model, latent, tuned=seed is None and tail >= OUTERMOST)
    if draws is not None:
        kind, error = _best_at(curves, draws, latent)
        return Sampling(kind, draws, seed or 0, error)
    # The outermost draws themselves (levels 0 and 1) have none beyond them.
    least = DRAWS_BEYOND / tail if 0.0 < tail < OUTERMOST else 0.0
    if least > MOST_DRAWS:
        raise MisuseError(
            "quantiles so far out take very many draws",
            where="quantiles",
            found=f"{tail:g} from the end, with {DRAWS_BEYOND} draws beyond it of {least:.6g}",
            expected=f"at least {DRAWS_BEYOND / MOST_DRAWS:.2g} from the ends",
            remedy="choose other levels, or name the number of draws",
        )
    beyond = math.ceil(least)
    if not curves:
        if accuracy is not None:
            raise MisuseError(
                "it is not known what error this network's quantiles have with how many draws",
                where="accuracy",
                found="no error curve in the model's record"
                + (f" for {latent} latents" if latent is not None else ""),
                remedy="name the number of draws instead",
            )
        return Sampling(latent or UNKNOWN, max(UNKNOWN_DRAWS, beyond), seed or 0, None)
    wanted = DEFAULT_ERROR if accuracy is None else accuracy
    needed = {kind: _draws_for(errors, wanted, kind) for kind, errors in curves.items()}
    reached = {kind: found for kind, found in needed.items() if found is not None}
    if not reached:
        smallest = min(_least_error(errors, kind) for kind, errors in curves.items())
        # Rounded up: what is told can be asked for.
        told = f"{Context(prec=3, rounding=ROUND_CEILING).create_decimal(repr(smallest)):f} or more"
        if set(curves) == {"tuned"}:
            raise MisuseError(
                "no tuned latents of this network reach the accuracy",
                where="accuracy",
                found=f"{wanted:g}",
                expected=told,
                remedy="leave the kind of latents out",
            )
        raise MisuseError(
            "no number of draws is known to reach the accuracy",
            where="accuracy",
            found=f"{wanted:g}",
            expected=f"{told}, for errors are measured against {MOST_DRAWS:,} draws",
            remedy="ask for less, or name the number of draws",
        )
    kind = min(reached, key=lambda kind: reached[kind][0])
    if reached[kind][0] >= beyond:
        return Sampling(kind, reached[kind][0], seed or 0, reached[kind][1])
    kind, error = _best_at(curves, beyond, latent)
    return Sampling(kind, beyond, seed or 0, error)


Curves = dict[LatentKind, dict[int, float]]


def _curves(model: Network, latent: LatentKind | None, *, tuned: bool) -> Curves:
    """Known error curves of the kinds that may be taken, tuned ones first."""
    stored = getattr(model, "record", {}).get("sampling", {}).get("errors", {})
    kinds: tuple[LatentKind, ...] = ("tuned", *DRAWN)
    return {
        kind: {int(draws): float(error) for draws, error in stored[kind].items()}
        for kind in kinds
        if stored.get(kind) and latent in (None, kind) and (tuned or kind == latent or kind != "tuned")
    }


def _best_at(curves: Curves, draws: int, latent: LatentKind | None) -> tuple[LatentKind, float | None]:
    """Kind with the smallest error at a number of draws, and that error."""
    errors: dict[LatentKind, float] = {}
    for kind, known in curves.items():
        if draws in known:
            errors[kind] = known[draws]
        elif kind != "tuned":  # as that of independent draws changes, from the nearest that is known
            nearest = min(known, key=lambda count: abs(math.log(count / draws)))
            errors[kind] = known[nearest] * math.sqrt(nearest / draws)
    if not errors:
        return latent or "sobol", None
    kind = min(errors, key=errors.__getitem__)
    return kind, errors[kind]


def _least_error(errors: Mapping[int, float], kind: LatentKind) -> float:
    """Smallest error that any number of draws up to `MOST_DRAWS` is known to reach."""
    least, most = min(errors.values()), max(errors)
    # Beyond what was measured: as independent draws.
    return least if kind == "tuned" else min(least, errors[most] * math.sqrt(most / MOST_DRAWS))


def _draws_for(errors: Mapping[int, float], wanted: float, kind: LatentKind) -> tuple[int, float] | None:
    """Fewest measured draws that reach a wanted error, or more if none does, and their error; or None."""
    reached = [draws for draws, error in sorted(errors.items()) if error <= wanted]
    if reached:
        return reached[0], errors[reached[0]]
    if wanted < _least_error(errors, kind):
        return None
    most = max(errors)
    more = min(MOST_DRAWS, math.ceil(most * (errors[most] / wanted) ** 2))  # as for `_least_error`
    return more, errors[most] * math.sqrt(most / more)
