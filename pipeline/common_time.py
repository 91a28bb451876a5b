"""Ca II at H-alpha's times: interpolated linearly in time between the two scans around each.

Both scans are moved onto the same H-alpha scan first, each by its own displacement, so that a pixel is the
same place in all three; they have the same wavelengths. Where the series does not allow it a time keeps the
Ca II scan of its pair as it is: at the ends, over intervals longer than `pipeline.changes.LONGEST` says, and
where a displacement is not certain. How wrong the straight line may be, `pipeline.changes` estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.changes import within_reach
from pipeline.crisp import Scan
from pipeline.errors import InputError
from pipeline.pairing import Pair, check_alike
from pipeline.registration import Image


@dataclass(frozen=True)
class Other:
    """The scan of Ca II on the other side of a pair's H-alpha than the pair's own.

    Attributes
    ----------
    scan : Scan, optional
        The scan, of another pair or of none.
    refused : str
        Why there is none to be used; empty where there is, and where the pair has one time anyway.
    """

    scan: Scan | None
    refused: str = ""


def other_scans(pairs: Sequence[Pair], unpaired: Sequence[Scan]) -> list[Other]:
    """Find the scans between which, and each pair's own, Ca II can be interpolated to H-alpha's time.

    Parameters
    ----------
    pairs : sequence of Pair
        In order.
    unpaired : sequence of Scan
        Scans without a partner; those of Ca II serve as well, where they are of the series' kind.

    Returns
    -------
    list of Other
        One for each pair.
    """
    spare = [scan for scan in unpaired if scan.line == "ca8542" and _fits(scan, pairs[0])]
    scans = sorted([*(pair.ca8542 for pair in pairs), *spare], key=lambda scan: scan.time)
    times = np.array([scan.time for scan in scans])
    found = []
    for pair in pairs:
        moment, own = pair.halpha.time, pair.ca8542.time
        if own == moment:
            found.append(Other(None))
            continue
        # the first scan at or after H-alpha, or the last one at or before it
        index = (
            int(np.searchsorted(times, moment, "left"))
            if own < moment
            else int(np.searchsorted(times, moment, "right")) - 1
        )
        if not 0 <= index < len(scans):
            found.append(Other(None, f"there is no Ca II scan {'after' if own < moment else 'before'} it"))
            continue
        first, last = sorted((index, int(np.searchsorted(times, own))))
        if not within_reach(times, first, last):
            interval = (times[last] - times[first]) / np.timedelta64(1, "s")
            found.append(Other(None, f"the Ca II scans around it are {interval:.1f} s apart"))
            continue
        found.append(Other(scans[index]))
    return found


def _fits(scan: Scan, pair: Pair) -> bool:
    try:
        check_alike((pair, Pair(pair.halpha, scan)), calibrated=True)  # the pair itself has been looked at
    except InputError:
        return False
    return True


def share_of_other(pair: Pair, other: Scan) -> float:
    """How far from the pair's own Ca II scan to the other one H-alpha's time is, 0 to 1."""
    return float((pair.halpha.time - pair.ca8542.time) / (other.time - pair.ca8542.time))


def between(own: Image, other: Image, share: float, saturation: float) -> Image:
    """Interpolate between two blocks.

    A number that cannot be used (not finite, not positive, saturated) in either of them is not interpolated:
    the result has it, and is flagged as that scan would be.

    Parameters
    ----------
    own, other : ndarray of float32, shape (rows, columns, wavelength)
        Of the pair's own scan and of the other one, in the same frame.
    share : float
        Weight of the other one.
    saturation : float
        Intensity from which a number is saturated.

    Returns
    -------
    ndarray of float32, shape (rows, columns, wavelength)
    """
    with np.errstate(invalid="ignore"):
        result = np.asarray(np.float32(1.0 - share) * own + np.float32(share) * other, dtype=np.float32)
        for block in (other, own):
            bad = ~((block > 0) & (block < saturation))
            result[bad] = block[bad]
    result[~np.isfinite(own) | ~np.isfinite(other)] = np.nan
    return result
