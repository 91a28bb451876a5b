"""How the scans of a series are displaced and turned along time, from H-alpha.

Scans are linked to their neighbours in time and to scans further away by the granulation that both show
(`pipeline.motion`), so that ribbons which brighten and move do not count. A link is refused where too few
parts of the field agree, or where the displacement or the turn is too large to be the telescope's guiding.
The positions of all times follow from all accepted links together, by least squares. Links between neighbours
alone would let their errors add up over hundreds of scans; links over a few scans hold that down, bridge
single bad scans, and contradict a link that went wrong.

What the granulation does between two scans is in all the links beside and across, and goes on in the next
ones. So the errors of the positions are not added up from those of links, but found by leaving out one region
of the field after another from all links at once (the jackknife). What the links leave over, compared with
what they should by the same errors, raises these if it is more (Birge 1932, doi:10.1103/PhysRev.40.207).
Positions are those of the field's granules: of a flow that is wider than a region, so that several go along
with it, the errors tell a part, and nothing of one that takes along all of the field.

A link at odds with the others beyond the errors is left out if without it they agree and confirm one another
(Baarda 1968, "A testing procedure for use in geodetic networks"); where nothing decides which of several is
wrong, none of them is used. Times that no accepted link joins to the reference, or only with an error of more
than a pixel, stay where they are, and are flagged.

A series is turned back only if the turns of its times are more than the errors of finding them: what granules
change of their own accord would turn small fields for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu

from pipeline.crisp import Scan, open_intensity
from pipeline.errors import FlareFieldError
from pipeline.motion import REGIONS, find_motion, spread
from pipeline.registration import AGREEMENT, CONFIDENT, STAYS, Shift, field_of_view
from pipeline.turning import turning

logger = logging.getLogger("flarefield")

STRIDES = (1, 2, 8)
"""Scans between those that are linked."""

LARGEST_JUMP = 40.0
"""Pixels between two linked scans at most, by default: 2.4 arcsec of CRISP's, a few times the guiding's."""

LARGEST_TURN = 1.5
"""Degrees between two linked scans at most: more than a telescope's mount turns the field in minutes."""

SIGNIFICANT = 5.0
"""Standard errors by which the turn of a time must differ from none for a series to be turned back, and by
which a link must differ from the others to contradict them."""

NOTICED = 0.1
"""Pixels that they must differ by, too: a turn at the frame's corners."""

NOTHING = 1e-6  # of a link, a pixel or a degree: rounding


@dataclass(frozen=True)
class Link:
    """How one H-alpha scan of a series lies against an earlier one.

    Attributes
    ----------
    earlier, later : int
        Numbers of their times.
    y, x : float
        Pixels by which the later scan has to be moved, once it is turned, to lie on the earlier one.
    confidence : float
        As of `pipeline.motion.FoundMotion`.
    turn : float
        Degrees by which it has to be turned about its middle, counterclockwise where y points up.
    without : sequence, REGIONS times 3
        What (y, x, turn) become more without each region of the field, as of `pipeline.motion.FoundMotion`.
    """

    earlier: int
    later: int
    y: float
    x: float
    confidence: float
    turn: float = 0.0
    without: Sequence[Sequence[float]] = ()

    def refusal(self, largest_jump: float) -> str | None:
        """Why the link is not to be believed; None if it is."""
        if self.confidence < CONFIDENT:
            return f"confidence of only {self.confidence:.2f}"
        if (length := float(np.hypot(self.y, self.x))) > largest_jump:
            return f"a jump of {length:.1f} pixels, more than {largest_jump:g}"
        if abs(self.turn) > LARGEST_TURN:
            return f"turned by {self.turn:+.2f} degrees, more than {LARGEST_TURN:g}"
        return None


@dataclass(frozen=True)
class LinkTask:
    """What a worker needs to find one link."""

    earlier: int
    later: int
    scans: tuple[Scan, Scan]


@dataclass(frozen=True)
class Position:
    """Where one time of a series lies.

    Attributes
    ----------
    y, x : float
        Pixels by which its H-alpha scan has to be moved to lie on the reference; NaN where that is not known.
    confidence : float
        The best of its accepted links'; 0 without any, 1 for a series of a single time.
    residual : float
        Root mean square of what its links leave over, pixels; NaN without any.
    error : float
        Standard error of the position against the reference, pixels.
    turn, turn_error : float
        Degrees by which it has to be turned, as a `Link`'s, and the error of that.
    turned : bool
        Whether the series is turned back; if not, its turns are not more than their errors.
    refused : str
        Why its links were refused, where none is left that leads to the reference; empty where it is known.
    """

    y: float
    x: float
    confidence: float
    residual: float
    error: float = np.nan
    turn: float = np.nan
    turn_error: float = np.nan
    turned: bool = False
    refused: str = ""

    @property
    def known(self) -> bool:
        """Whether the time can be brought onto the reference."""
        return bool(np.isfinite(self.y))

    @property
    def shift(self) -> Shift:
        """What to move the scan by; not at all where that is not known."""
        if not self.known:
            return STAYS
        return Shift(self.y, self.x, self.confidence, self.turn if self.turned else 0.0)


def links_of(times: int) -> list[tuple[int, int]]:
    """Pairs of times that are linked, in order.

    Parameters
    ----------
    times : int
        Times of the series.
    """
    return [
        (first, first + stride)
        for first in range(times)
        for stride in STRIDES
        if first + stride < times and (stride != STRIDES[-1] or first % STRIDES[-1] == 0)
    ]


def find_link(task: LinkTask) -> dict[str, Any] | FlareFieldError:
    """Find how one scan is displaced from another: what a worker does.

    Parameters
    ----------
    task : LinkTask
        The scans.

    Returns
    -------
    dict or FlareFieldError
        The fields of a `Link`, as a journal holds them; or why a file cannot be used.
    """
    try:
        cubes = tuple(open_intensity(scan) for scan in task.scans)
        found = find_motion(
            (cubes[0], cubes[1]),
            (task.scans[0].wavelength, task.scans[1].wavelength),
            (task.scans[0].window.rest_wavelength,) * 2,
            (field_of_view(cubes[0]), field_of_view(cubes[1])),
        )
    except FlareFieldError as refusal:
        return refusal
    shift = found.shift
    return {
        "earlier": task.earlier,
        "later": task.later,
        "y": shift.y,
        "x": shift.x,
        "confidence": shift.confidence,
        **({"turn": shift.turn, "without": found.without.tolist()} if np.isfinite(found.error) else {}),
    }


def positions(
    times: int, links: Iterable[Link], largest_jump: float = LARGEST_JUMP, corner: float = 0.0
) -> tuple[Position, ...]:
    """Positions of all times, from all accepted links together.

    Links are weighted alike: their errors are those of structures that change, much the same for all. Those
    that contradict the others are left out, the worst first, and the log says so. Of several parts of the
    series that no link connects the largest is aligned, and of equally large ones the first; its first time
    is the reference.

    Parameters
    ----------
    times : int
        Times of the series.
    links : iterable of Link
        In any order.
    largest_jump : float
        Pixels of a link at most.
    corner : float
        Pixels from the middle of a frame to its corners: what a turn does there decides whether the series is
        turned. Frames of no size are not.

    Returns
    -------
    tuple of Position
        One for each time; that of the reference is (0, 0), without a turn.

    Notes
    -----
    Errors are standard errors, along both axes together: of times whose error is a pixel, one of three is off
    by more. They are 1.2, 1.4 and 1.7 times too small where steady flows carry the granules whose structures
    are half as wide as a region of the field, as wide, and twice as wide (0.02 pixels a scan, over 40 scans
    of 96 x 96 pixels whose granules live for 26); and 1.4 times where granules live for six scans and nothing
    stays: of the times called known there, one of four is off by more than a pixel. Regions joined to larger
    blocks would raise them by less than a tenth, and links close around a flow that goes on.
    """
    asked = sorted(links, key=lambda link: (link.earlier, link.later))
    refusals = {(link.earlier, link.later): link.refusal(largest_jump) for link in asked}
    accepted = [link for link in asked if refusals[link.earlier, link.later] is None]
    turned = False
    while True:
        inside = _largest_part(times, accepted)
        used = [link for link in accepted if inside[link.earlier]]
        network = _Network(used, inside)
        without = np.array([link.without for link in used]).reshape(len(used), REGIONS, 3)
        turn = np.array([link.turn for link in used])
        turn_over = np.abs(network.left(turn))
        turn_doubt = _spread_of(network.left(without[..., 2]))
        turns = network.places(turn)
        turn_errors = _birge(turn_over, turn_doubt) * _spread_of(network.places(without[..., 2]))
        moved = np.deg2rad(np.abs(turns)) * corner
        # What is turned once stays so while links are left out: or it might go back and forth.
        turned |= bool((inside & (moved > NOTICED) & (np.abs(turns) > SIGNIFICANT * turn_errors)).any())
        moves = np.array(
            [turning(turns[link.earlier] if turned else 0.0) @ (link.y, link.x) for link in used]
        ).reshape(-1, 2)
        over = np.hypot(*network.left(moves).T)
        doubt = np.hypot(*(_spread_of(network.left(without[..., axis])) for axis in (0, 1)))
        contradicts = over > np.clip(SIGNIFICANT * doubt, NOTICED, AGREEMENT)
        if turned:
            moved = np.deg2rad(turn_over) * corner
            contradicts |= (moved > NOTICED) & (turn_over > SIGNIFICANT * turn_doubt)
        if not contradicts.any():
            break
        wrong = network.wrong(over, contradicts)
        for number in wrong:
            link = used[number]
            why = f"{over[number]:.1f} pixels at odds with the others"
            if len(wrong) > 1:
                why += ", and nothing decides which of them is wrong"
            logger.warning("times %d and %d of the series: their link is %s", link.earlier, link.later, why)
            refusals[link.earlier, link.later] = why
            accepted.remove(link)
    places = network.places(moves)
    place_errors = _birge(over, doubt) * np.hypot(
        *(_spread_of(network.places(without[..., axis])) for axis in (0, 1))
    )
    ends = np.array([(link.earlier, link.later) for link in used], dtype=np.intp).reshape(-1, 2)
    found = []
    for time in range(times):
        if not inside[time]:
            said = [why for pair, why in refusals.items() if time in pair and why is not None]
            refused = said[0] if said else "nothing links it to the others"
            found.append(Position(np.nan, np.nan, 0.0, np.nan, refused=refused))
            continue
        if place_errors[time] > AGREEMENT:
            refused = f"a standard error of {place_errors[time]:.1f} pixels against the reference"
            found.append(Position(np.nan, np.nan, 0.0, np.nan, float(place_errors[time]), refused=refused))
            continue
        own = np.flatnonzero((ends == time).any(axis=1))
        found.append(
            Position(
                float(places[time, 0]),
                float(places[time, 1]),
                max((used[number].confidence for number in own), default=1.0),
                float(np.sqrt(np.mean(over[own] ** 2))) if own.size else np.nan,
                float(place_errors[time]),
                float(turns[time]),
                float(turn_errors[time]),
                turned,
            )
        )
    return tuple(found)


def _largest_part(times: int, links: Sequence[Link]) -> NDArray[np.bool_]:
    """Times of the largest part that links hold together."""
    ends = np.array([(link.earlier, link.later) for link in links], dtype=np.intp).reshape(-1, 2)
    graph = coo_array((np.ones(len(links)), (ends[:, 0], ends[:, 1])), shape=(times, times))
    _, part = connected_components(graph, directed=False)
    return np.asarray(part == np.bincount(part).argmax())


def _spread_of(without: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard errors of links or times (n,), from what they become without each region (n, REGIONS)."""
    return spread(without.T)


def _birge(over: NDArray[np.float64], doubt: NDArray[np.float64]) -> float:
    """By how much errors are larger than stated, from what links leave over and what they are expected to.

    Links that nothing else confirms leave nothing over. Smaller than stated are errors never said to be.
    """
    tells = doubt > NOTHING
    return max(1.0, float(np.sqrt(np.mean(np.square(over[tells] / doubt[tells]))))) if tells.any() else 1.0


class _Network:
    """Links of times, as a network of differences that is solved by least squares, all weighted alike.

    Parameters
    ----------
    links : sequence of Link
    inside : ndarray of bool, shape (time,)
        Times that they hold together; the first of them is at zero.
    """

    def __init__(self, links: Sequence[Link], inside: NDArray[np.bool_]) -> None:
        self._inside = inside
        unknown = np.flatnonzero(inside)[1:]
        column = np.full(len(inside), -1)
        column[unknown] = np.arange(unknown.size)
        ends = column[np.array([(link.later, link.earlier) for link in links], dtype=np.intp).reshape(-1, 2)]
        rows, which = np.nonzero(ends >= 0)  # the reference has no column
        self._matrix = coo_array(
            (np.array([1.0, -1.0])[which], (rows, ends[rows, which])), shape=(len(links), unknown.size)
        ).tocsc()
        self._normal = splu((self._matrix.T @ self._matrix).tocsc()) if links else None

    def _solved(self, measured: NDArray[np.float64]) -> NDArray[np.float64]:
        if self._normal is None:
            return np.zeros((0, *measured.shape[1:]))
        return np.asarray(self._normal.solve(np.asarray(self._matrix.T @ measured)))

    def places(self, measured: NDArray[np.float64]) -> NDArray[np.float64]:
        """Places (time, ...) from what links measured (link, ...); NaN outside."""
        places = np.full((len(self._inside), *measured.shape[1:]), np.nan)
        places[self._inside] = np.concatenate((np.zeros((1, *measured.shape[1:])), self._solved(measured)))
        return places

    def left(self, measured: NDArray[np.float64]) -> NDArray[np.float64]:
        """What links (link, ...) leave over."""
        return np.asarray(measured - self._matrix @ self._solved(measured))

    def wrong(self, over: NDArray[np.float64], contradicts: NDArray[np.bool_]) -> list[int]:
        """Numbers of the link that is most likely wrong, and of those that are as likely.

        A link that is wrong leaves over a part only, the smaller the fewer others confirm it. Links that only
        confirm one another, as those of a single ring do, leave over the same: none of them is told apart.

        Parameters
        ----------
        over : ndarray, shape (link,)
            What they leave over.
        contradicts : ndarray of bool, shape (link,)
            Which of them to choose from.
        """
        confirmed = np.array([self._left_of(number)[number] for number in range(len(over))])
        chosen = np.flatnonzero(contradicts & (confirmed > NOTHING))
        worst = int(chosen[np.argmax(over[chosen] / np.sqrt(confirmed[chosen]))])
        without_it = confirmed - np.square(self._left_of(worst)) / confirmed[worst]
        return np.flatnonzero((confirmed > NOTHING) & (without_it < NOTHING)).tolist()

    def _left_of(self, number: int) -> NDArray[np.float64]:
        """What links leave over of an error of one of them."""
        error = np.zeros(self._matrix.shape[0])
        error[number] = 1.0
        return self.left(error)
