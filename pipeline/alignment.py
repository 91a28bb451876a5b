"""How the scans of a series are displaced along time, from H-alpha.

Scans are linked to their neighbours in time and to scans further away by the granulation that both show
(`pipeline.motion`), so that ribbons which brighten and move do not count. A link is refused where too few
parts of the field agree, where the displacement is too large to be the telescope's guiding, or where the
field seems turned. The positions of all times follow from all accepted links together, by least squares.
Links between neighbours alone would let their errors add up over hundreds of scans; links over a few scans
hold that down, bridge single bad scans, and contradict a link that went wrong, which is then left out. Times
that no accepted link joins to the reference stay where they are, and are flagged.
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

STRIDES = (1, 2, 8)
"""Scans between those that are linked."""

LARGEST_JUMP = 40.0
"""Pixels between two linked scans at most, by default: 2.4 arcsec of CRISP's, a few times the guiding's."""

LARGEST_TURN = 0.1
"""Degrees by which a field may seem turned against another: half a pixel at 300 pixels from its middle."""

LEAST_ERROR = 1e-4  # pixels: nothing is known better


@dataclass(frozen=True)
class Link:
    """How one H-alpha scan of a series is displaced from an earlier one.

    Attributes
    ----------
    earlier, later : int
        Numbers of their times.
    y, x : float
        Pixels by which the later scan has to be moved to lie on the earlier one.
    confidence : float
        As of `pipeline.motion.Motion`.
    error : float
        Standard error of the displacement, pixels.
    turn, turn_error : float
        Degrees by which it seems turned, counterclockwise, and the error of that (NaN where it is not known);
        nothing is turned back.
    """

    earlier: int
    later: int
    y: float
    x: float
    confidence: float
    error: float = 0.0
    turn: float = np.nan
    turn_error: float = np.nan

    def refusal(self, largest_jump: float) -> str | None:
        """Why the link is not to be believed; None if it is."""
        if self.confidence < CONFIDENT:
            return f"confidence of only {self.confidence:.2f}"
        if (length := float(np.hypot(self.y, self.x))) > largest_jump:
            return f"a jump of {length:.1f} pixels, more than {largest_jump:g}"
        if abs(self.turn) > LARGEST_TURN + 3.0 * self.turn_error:
            return f"turned by {self.turn:+.2f} degrees"
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
    refused : str
        Why its links were refused, where none is left that leads to the reference; empty where it is known.
    """

    y: float
    x: float
    confidence: float
    residual: float
    error: float = np.nan
    refused: str = ""

    @property
    def known(self) -> bool:
        """Whether the time can be brought onto the reference."""
        return bool(np.isfinite(self.y))

    @property
    def shift(self) -> Shift:
        """What to move the scan by; not at all where that is not known."""
        return Shift(self.y, self.x, self.confidence) if self.known else STAYS


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


def positions(times: int, links: Iterable[Link], largest_jump: float = LARGEST_JUMP) -> tuple[Position, ...]:
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

    Returns
    -------
    tuple of Position
        One for each time; that of the reference is (0, 0).
    """
    asked = sorted(links, key=lambda link: (link.earlier, link.later))
    refusals = {(link.earlier, link.later): link.refusal(largest_jump) for link in asked}
    accepted = [link for link in asked if refusals[link.earlier, link.later] is None]
    while True:
        inside = _largest_part(times, accepted)
        y, x = _solved(times, accepted, inside)
        over = np.array([np.hypot(*_leftover(link, y, x)) for link in accepted])
        over[~np.isfinite(over)] = 0.0
        if over.size == 0 or over.max() <= AGREEMENT:
            break
        worst = accepted.pop(int(over.argmax()))
        refusals[worst.earlier, worst.later] = f"{over.max():.1f} pixels at odds with the others"
    error = _errors(times, accepted, int(np.flatnonzero(inside)[0]))
    return tuple(_position(time, y, x, error, inside, accepted, refusals) for time in range(times))


def _position(
    time: int,
    y: NDArray[np.float64],
    x: NDArray[np.float64],
    error: NDArray[np.float64],
    inside: NDArray[np.bool_],
    accepted: Sequence[Link],
    refusals: dict[tuple[int, int], str | None],
) -> Position:
    own = [link for link in accepted if time in (link.earlier, link.later)]
    if not inside[time]:
        said = [why for times, why in refusals.items() if time in times and why is not None]
        refused = said[0] if said else "nothing links it to the others"
        return Position(np.nan, np.nan, 0.0, np.nan, refused=refused)
    over = np.array([_leftover(link, y, x) for link in own])
    residual = float(np.sqrt(np.mean(np.sum(over**2, axis=1)))) if own else np.nan
    confidence = max((link.confidence for link in own), default=1.0)
    return Position(float(y[time]), float(x[time]), confidence, residual, float(error[time]))


def _errors(times: int, links: Sequence[Link], reference: int) -> NDArray[np.float64]:
    """Standard error of each time's position, along the best chain of links to the reference.

    Links one after another add their variances. Those side by side see the same granules change, and are no
    better together than the best of them.
    """
    ends = np.array([(link.earlier, link.later) for link in links], dtype=np.intp).reshape(-1, 2)
    variances = np.array([max(link.error, LEAST_ERROR) ** 2 for link in links])
    graph = coo_array((variances, (ends[:, 0], ends[:, 1])), shape=(times, times)).tocsr()
    return np.asarray(np.sqrt(dijkstra(graph, directed=False, indices=reference)))


def _largest_part(times: int, links: Sequence[Link]) -> NDArray[np.bool_]:
    """Times of the largest part that links hold together."""
    ends = np.array([(link.earlier, link.later) for link in links], dtype=np.intp).reshape(-1, 2)
    graph = coo_array((np.ones(len(links)), (ends[:, 0], ends[:, 1])), shape=(times, times))
    _, part = connected_components(graph, directed=False)
    return np.asarray(part == np.bincount(part).argmax())


def _solved(
    times: int, links: Sequence[Link], inside: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions along y and x by least squares; the first inside is at zero, and those outside are NaN."""
    places = np.full((times, 2), np.nan)
    places[np.flatnonzero(inside)[0]] = 0.0
    unknown = np.flatnonzero(inside)[1:]
    column = np.full(times, -1)
    column[unknown] = np.arange(unknown.size)
    used = [link for link in links if inside[link.earlier]]
    if used:
        ends = column[np.array([(link.later, link.earlier) for link in used])]
        rows, which = np.nonzero(ends >= 0)  # the reference has no column
        shape = (len(used), unknown.size)
        matrix = coo_array((np.array([1.0, -1.0])[which], (rows, ends[rows, which])), shape=shape).tocsc()
        measured = np.array([(link.y, link.x) for link in used])
        normal = splu((matrix.T @ matrix).tocsc())
        places[unknown] = normal.solve(np.asarray(matrix.T @ measured))
    return places[:, 0], places[:, 1]


def _leftover(link: Link, y: NDArray[np.float64], x: NDArray[np.float64]) -> tuple[float, float]:
    """By how much a link differs from the positions of its ends, pixels."""
    return (
        float(link.y - (y[link.later] - y[link.earlier])),
        float(link.x - (x[link.later] - x[link.earlier])),
    )
