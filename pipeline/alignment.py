"""How the scans of a series are displaced and turned along time, from H-alpha.

Scans are linked to their neighbours in time and to scans further away by the granulation that both show
(`pipeline.motion`), so that ribbons which brighten and move do not count. A link is refused where too few
parts of the field agree, or where the displacement or the turn is too large to be the telescope's guiding.
The positions of all times follow from all accepted links together, by least squares. Links between neighbours
alone would let their errors add up over hundreds of scans; links over a few scans hold that down, bridge
single bad scans, and contradict a link that went wrong, which is then left out. Times that no accepted link
joins to the reference, or only with an error of more than a pixel, stay where they are, and are flagged.

A series is turned back only if the turns of its times are more than the errors of finding them: what granules
change of their own accord would turn small fields for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, dijkstra
from scipy.sparse.linalg import splu

from pipeline.crisp import Scan, open_intensity
from pipeline.errors import FlareFieldError
from pipeline.motion import find_motion
from pipeline.registration import AGREEMENT, CONFIDENT, STAYS, Shift, field_of_view
from pipeline.turning import turning

STRIDES = (1, 2, 8)
"""Scans between those that are linked."""

LARGEST_JUMP = 40.0
"""Pixels between two linked scans at most, by default: 2.4 arcsec of CRISP's, a few times the guiding's."""

LARGEST_TURN = 1.5
"""Degrees between two linked scans at most: more than a telescope's mount turns the field in minutes."""

SIGNIFICANT = 5.0
"""Standard errors by which the turn of a time must differ from none, for a series to be turned back."""

NOTICED = 0.1
"""Pixels by which that turn must move the frame's corners."""

LEAST_ERROR = 1e-4  # pixels, or degrees: nothing is known better


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
    error : float
        Standard error of the displacement, pixels.
    turn, turn_error : float
        Degrees by which it has to be turned about its middle, counterclockwise where y points up, and the
        error of that.
    """

    earlier: int
    later: int
    y: float
    x: float
    confidence: float
    error: float = 0.0
    turn: float = 0.0
    turn_error: float = 0.0

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
        Standard error of the position, pixels, from those of the links that lead to the reference.
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
        **(
            {"error": found.error, "turn": shift.turn, "turn_error": found.turn_error}
            if np.isfinite(found.error)
            else {}
        ),
    }


def positions(
    times: int, links: Iterable[Link], largest_jump: float = LARGEST_JUMP, corner: float = 0.0
) -> tuple[Position, ...]:
    """Positions of all times, from all accepted links together.

    Links are weighted alike: their errors are those of structures that change, much the same for all. One
    that contradicts the others by more than a pixel is left out, the worst first. Of several parts of the
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
    """
    asked = sorted(links, key=lambda link: (link.earlier, link.later))
    refusals = {(link.earlier, link.later): link.refusal(largest_jump) for link in asked}
    accepted = [link for link in asked if refusals[link.earlier, link.later] is None]
    turned = False
    while True:
        inside = _largest_part(times, accepted)
        reference = int(np.flatnonzero(inside)[0])
        used = [link for link in accepted if inside[link.earlier]]
        turns = _solved(used, np.array([[link.turn] for link in used]).reshape(-1, 1), inside)[:, 0]
        turn_errors = _errors(times, used, [link.turn_error for link in used], reference)
        moved = np.deg2rad(np.abs(turns)) * corner
        # What is turned once stays so while links are left out: or it might go back and forth.
        turned |= bool((inside & (moved > NOTICED) & (np.abs(turns) > SIGNIFICANT * turn_errors)).any())
        moves = np.array(
            [turning(turns[link.earlier] if turned else 0.0) @ (link.y, link.x) for link in used]
        ).reshape(-1, 2)
        places = _solved(used, moves, inside)
        ends = np.array([(link.earlier, link.later) for link in used], dtype=np.intp).reshape(-1, 2)
        over = np.hypot(*(moves - (places[ends[:, 1]] - places[ends[:, 0]])).T)
        if over.size == 0 or over.max() <= AGREEMENT:
            break
        worst = used[int(over.argmax())]
        accepted.remove(worst)
        refusals[worst.earlier, worst.later] = f"{over.max():.1f} pixels at odds with the others"
    place_errors = _errors(times, used, [link.error for link in used], reference)
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


def _errors(
    times: int, links: Sequence[Link], errors: Sequence[float], reference: int
) -> NDArray[np.float64]:
    """Standard error of each time, along the best chain of links to the reference.

    Links one after another add their variances. Those side by side see the same granules change, and are no
    better together than the best of them.
    """
    ends = np.array([(link.earlier, link.later) for link in links], dtype=np.intp).reshape(-1, 2)
    variances = np.square(np.maximum(np.array(errors, dtype=np.float64), LEAST_ERROR))
    graph = coo_array((variances, (ends[:, 0], ends[:, 1])), shape=(times, times)).tocsr()
    return np.asarray(np.sqrt(dijkstra(graph, directed=False, indices=reference)))


def _largest_part(times: int, links: Sequence[Link]) -> NDArray[np.bool_]:
    """Times of the largest part that links hold together."""
    ends = np.array([(link.earlier, link.later) for link in links], dtype=np.intp).reshape(-1, 2)
    graph = coo_array((np.ones(len(links)), (ends[:, 0], ends[:, 1])), shape=(times, times))
    _, part = connected_components(graph, directed=False)
    return np.asarray(part == np.bincount(part).argmax())


def _solved(
    links: Sequence[Link], measured: NDArray[np.float64], inside: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Places (time, n) by least squares, from what links measured (link, n).

    The first one inside is at zero, and those outside are NaN.
    """
    places = np.full((len(inside), measured.shape[1]), np.nan)
    places[np.flatnonzero(inside)[0]] = 0.0
    unknown = np.flatnonzero(inside)[1:]
    column = np.full(len(inside), -1)
    column[unknown] = np.arange(unknown.size)
    if links:
        ends = column[np.array([(link.later, link.earlier) for link in links])]
        rows, which = np.nonzero(ends >= 0)  # the reference has no column
        shape = (len(links), unknown.size)
        matrix = coo_array((np.array([1.0, -1.0])[which], (rows, ends[rows, which])), shape=shape).tocsc()
        normal = splu((matrix.T @ matrix).tocsc())
        places[unknown] = normal.solve(np.asarray(matrix.T @ measured))
    return places
