"""Which scans of the two lines belong together, and whether they fit into one observation."""

from __future__ import annotations

import filecmp
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from pipeline.crisp import LINES, Scan, open_intensity
from pipeline.crisp.cube import stored_numbers
from pipeline.crisp.wavelengths import air_to_vacuum, vacuum_to_air
from pipeline.errors import InputError, MisuseError
from pipeline.spectra import shortfall

logger = logging.getLogger("flarefield")

TOLERANCE = 15.0
"""Seconds between the scans of a pair at most, by default: the paper's series has a cadence of 11.5."""
SHARE_OF_CADENCE = 0.75
"""Of the slower line's median interval, the most that the scans of a pair may be apart: where no scan is
missing the nearest one is within half an interval; half of that more is left to intervals that vary."""
AS_GOOD = 1e-6  # seconds: of two choices that differ by less, the one with Ca II after H-alpha

SAME_WAVELENGTH = 1e-3  # Angstrom by which the axes of a series may differ
DRIFT = 0.02
"""Angstrom by which a scan's wavelengths may lie above or below those of its line's others, all by the same:
as large as CRISP's cavity errors, as which it is recorded and taken into account. More is another axis."""
SAMPLE = 8192  # bytes by which files of the same size are told apart before they are compared
SOME = 16  # pixels along y and x by which images are told apart before they are compared
LISTED = 3  # scans that a warning names one by one
SAME_SCALE = 1e-3  # relative difference of pixel sizes, and difference of rotation matrices


@dataclass(frozen=True)
class Pair:
    """The two scans of one time."""

    halpha: Scan
    ca8542: Scan

    @property
    def placement(self) -> tuple[int, int]:
        """Where Ca II's first pixel lies in H-alpha's frame by the headers, whole pixels (y, x).

        The middles of the frames decide. What the headers do not know, registration has to find.
        """
        rows, columns = self.ca8542.shape
        middle = (np.array([(columns - 1) / 2.0]), np.array([(rows - 1) / 2.0]))
        x, y = self.halpha.frame.pixels(*self.ca8542.frame.coordinates(*middle))
        return round(float(y[0] - middle[1][0])), round(float(x[0] - middle[0][0]))

    @property
    def placed(self) -> bool:
        """Whether Ca II's frame is not H-alpha's own."""
        return self.placement != (0, 0) or self.ca8542.shape != self.halpha.shape

    @property
    def apart(self) -> bool:
        """Whether the frames have no pixel in common by the headers."""
        sizes = zip(self.placement, self.halpha.shape, self.ca8542.shape, strict=True)
        return not all(-own < corner < size for corner, size, own in sizes)


def check_limits(**limits: float) -> None:
    """Refuse limits that are no finite numbers of 0 or more.

    Parameters
    ----------
    **limits : float
        By the names of the options that set them.

    Raises
    ------
    MisuseError
        One is none.
    """
    for name, value in limits.items():
        if not 0.0 <= value < np.inf:
            raise MisuseError(
                "the limit is no number",
                where=name,
                found=value,
                expected="a finite number of 0 or more",
                remedy="state a number, as large as need be",
            )


def completed(scans: Sequence[Scan]) -> list[Scan]:
    """Put scans on the axis of their line's other scans.

    Those lack wavelengths which most scans have, or their wavelengths have drifted: the commonest axis is the
    line's, and of as common ones the longest, then the first.

    Parameters
    ----------
    scans : sequence of Scan
        Of both lines, in any order.

    Returns
    -------
    list of Scan
        In the same order. Those whose wavelengths are neither a part of the others' nor moved from these by
        `DRIFT` at most are as they were.
    """
    axes: dict[str, tuple[float, ...]] = {}
    for line in LINES:
        times = Counter(scan.wavelength for scan in scans if scan.line == line)
        if times:
            axes[line] = max(times, key=lambda axis: (times[axis], len(axis)))
    return [
        scan.without_drift(axes[scan.line], SAME_WAVELENGTH, DRIFT).on_axis(axes[scan.line], SAME_WAVELENGTH)
        for scan in scans
    ]


def pair_scans(scans: Sequence[Scan], tolerance: float) -> tuple[tuple[Pair, ...], tuple[Scan, ...]]:
    """Pair scans of the two lines by their mean times, each with the nearest.

    Scans that lack wavelengths of their line's others are brought onto the axis of these (`completed`). Each
    scan belongs to one pair at most. No two scans are a pair that are further apart than the tolerance, or
    than `SHARE_OF_CADENCE` of the interval between the slower line's scans: that far away is the partner of
    another scan, whether this is there or missing. Within this limit, where every scan's nearest one is a
    different one these are the pairs. Where two scans have the same nearest one, that choice is made whose
    total of time differences is the smallest, a pair that is not made counting as much as one at the limit:
    two scans that belong together are not torn apart to give two others a partner. What is left over has no
    partner.

    Parameters
    ----------
    scans : sequence of Scan
        Of both lines, in any order.
    tolerance : float
        Seconds between the scans of a pair at most; `SHARE_OF_CADENCE` may allow less.

    Returns
    -------
    pairs : tuple of Pair
        In order of H-alpha's times.
    unpaired : tuple of Scan

    Raises
    ------
    InputError
        A line is missing, a scan is there twice, or nothing fits within the tolerance.
    """
    by_line = {
        line: sorted((scan for scan in completed(scans) if scan.line == line), key=lambda scan: scan.time)
        for line in LINES
    }
    for line, of_line in by_line.items():
        if not of_line:
            raise InputError(
                f"only one line is given: there is no {line} scan",
                found=f"{len(scans)} scans, the first {scans[0].path}" if scans else "no scans",
                expected="scans of both H-alpha 6563 and Ca II 8542",
                remedy="give the files of both lines",
            )
        for earlier, later in itertools.pairwise(of_line):
            if earlier.time == later.time:
                alone = earlier.path == later.path
                raise InputError(
                    "two scans of a file have the same time" if alone else "two files hold the same scan",
                    where=later.name,
                    found=f"{label(later)}, as {earlier.name}",
                    remedy="mend the scans' times" if alone else "leave one of them out",
                )
    halpha, ca8542 = by_line["halpha"], by_line["ca8542"]
    times = [np.array([scan.time for scan in of_line]) for of_line in (halpha, ca8542)]
    after = -np.subtract.outer(*times) / np.timedelta64(1, "s")
    apart = np.abs(after)
    allowed = min(tolerance, SHARE_OF_CADENCE * max(cadence(own) for own in times))
    cost = np.where(apart <= allowed, apart + np.where(after < 0.0, AS_GOOD, 0.0), allowed + 2 * AS_GOOD)
    first, second = linear_sum_assignment(cost)
    chosen = [(i, j) for i, j in zip(first, second, strict=True) if apart[i, j] <= allowed]
    # Of choices with the same total, one in which the scans of both lines keep their order.
    chosen = list(zip(*map(sorted, zip(*chosen, strict=True)), strict=True))
    if not chosen:
        raise InputError(
            "no scans of the two lines belong together",
            found=f"the nearest are {apart.min():.1f} s apart",
            expected=f"{allowed:g} s or less"
            + ("" if allowed == tolerance else f", {SHARE_OF_CADENCE:g} of the slower line's interval"),
            remedy="give scans of the same time, or a larger --tolerance",
        )
    pairs = tuple(Pair(halpha[i], ca8542[j]) for i, j in chosen)
    taken = {(scan.path, scan.index) for pair in pairs for scan in (pair.halpha, pair.ca8542)}
    return pairs, tuple(scan for scan in (*halpha, *ca8542) if (scan.path, scan.index) not in taken)


def cadence(times: NDArray[np.datetime64]) -> float:
    """Median interval between a line's scans, seconds; infinite if there is only one.

    Parameters
    ----------
    times : ndarray of datetime64, shape (scan,)
        In order.
    """
    return float(np.median(np.diff(times)) / np.timedelta64(1, "s")) if len(times) > 1 else float("inf")


def check_alike(pairs: tuple[Pair, ...], *, calibrated: bool = False) -> None:
    """Refuse scans that do not fit into one store, or not into the network's windows.

    A file is of one line and, but for its own scans, of one time: copies of it and links to it are refused.
    Of a file with several arrays each may be another scan, as a description says.

    Where the intensities of both lines are relative a warning says that their ratio is not known.

    Parameters
    ----------
    pairs : tuple of Pair
        In order.
    calibrated : bool
        Whether the intensities of both lines will be brought to one scale by what they show.

    Raises
    ------
    InputError
        Scans differ in size, pixels, wavelengths or number format, or do not cover the lines' windows; two
        files are one and the same; or the two lines have intensities that cannot be compared.
    """
    _check_copies(pairs)
    reference = pairs[0].halpha
    first = {"halpha": reference, "ca8542": pairs[0].ca8542}
    for pair in pairs:
        for scan in (pair.halpha, pair.ca8542):
            like = first[scan.line]
            if scan.shape != like.shape:
                raise InputError(
                    "the scans of one line are of different size",
                    where=scan.name,
                    found=f"{scan.shape} pixels (y, x)",
                    expected=f"{like.shape}, as {like.path}",
                    remedy="ingest scans of different size separately",
                )
            scale = np.abs(np.divide(scan.frame.scale, reference.frame.scale) - 1.0).max()
            rotation = np.abs(np.subtract(scan.frame.rotation, reference.frame.rotation)).max()
            if max(scale, rotation) > SAME_SCALE:
                raise InputError(
                    "the scans' pixels are of different size or orientation",
                    where=scan.name,
                    found=f"{scan.frame.scale} arcsec, PC {scan.frame.rotation}",
                    expected=f"{reference.frame.scale} arcsec, PC {reference.frame.rotation}, "
                    f"as {reference.path}",
                    remedy="ingest them separately",
                )
            if len(scan.wavelength) != len(like.wavelength) or (
                np.abs(np.subtract(scan.wavelength, like.wavelength)).max() > SAME_WAVELENGTH
            ):
                raise InputError(
                    "the scans of one line have different wavelengths",
                    where=scan.name,
                    found=_range(scan),
                    expected=f"{_range(like)}, as {like.path}; moved by {DRIFT} Angstrom at most",
                    remedy="ingest them separately"
                    if scan.path != like.path
                    else "split the file: its scans have to be ingested separately",
                )
            if (scan.units, scan.saturation) != (like.units, like.saturation):
                raise InputError(
                    "the scans of one line have different number formats",
                    where=scan.name,
                    found=f"{scan.units}, largest {scan.saturation:g}",
                    expected=f"{like.units}, largest {like.saturation:g}, as {like.path}",
                    remedy="ingest them separately",
                )
    for scan in first.values():
        _check_window(scan)
    if first["halpha"].units != first["ca8542"].units and not calibrated:
        raise InputError(
            "the intensities of the two lines cannot be compared",
            where=first["ca8542"].name,
            found=_unit(first["ca8542"]),
            expected=f"{_unit(reference)}, as {reference.path}: the network is asked about their ratio",
            remedy="calibrate both with --calibrate quiet-sun, or mend the units in the files",
        )

    if first["halpha"].units == first["ca8542"].units == "" and not calibrated:
        logger.warning(
            "%s: the intensities of both lines are relative to something that is not said: their relative "
            "calibration, which the network relies on, is not known; --calibrate quiet-sun measures it",
            reference.path,
        )


def _check_copies(pairs: tuple[Pair, ...]) -> None:
    scans: dict[tuple[str, str], Scan] = {}  # of files with several scans the first
    for scan in itertools.chain.from_iterable((pair.halpha, pair.ca8542) for pair in pairs):
        scans.setdefault((scan.path, scan.part), scan)
    alike: dict[tuple[str, int, bytes], list[Scan]] = {}
    for (path, part), scan in scans.items():
        # What is a directory says itself which line and time it is of.
        if not (file := Path(path)).is_file():
            continue
        size = file.stat().st_size
        with file.open("rb") as stream:
            some = stream.read(SAMPLE)
            stream.seek(size // 2)
            some += stream.read(SAMPLE)
        alike.setdefault((part, size, some), []).append(scan)
    for several in alike.values():
        for one, other in itertools.combinations(several, 2):
            if filecmp.cmp(one.path, other.path, shallow=False) and not _blank(one):
                raise InputError(
                    "two files have the same content"
                    + ("" if one.line == other.line else ", but are given for different lines"),
                    where=other.path,
                    found=f"a copy of {one.path}, or a link to it: {label(other)}, and {label(one)}",
                    expected="each scan in a file, HDU or variable of its own",
                    remedy="give the scan's own file, or leave the copy out",
                )


def _blank(scan: Scan) -> bool:
    """Whether a scan has no image at any wavelength."""
    return all(np.min(image) == np.max(image) or np.isnan(image).all() for image in open_intensity(scan))


def check_images(pairs: tuple[Pair, ...]) -> None:
    """Refuse images of one line that are given for the other; warn of those that are given for two times.

    Noise makes any two images differ. What is compared is the first one of each scan, as it is in the file; a
    scan whose first image is one value, or cannot be read, is passed over.

    Parameters
    ----------
    pairs : tuple of Pair
        In order.

    Raises
    ------
    InputError
        The two lines have the same image.
    """
    scans = {
        (scan.path, scan.part, scan.index): scan for pair in pairs for scan in (pair.halpha, pair.ca8542)
    }
    first: dict[bytes, Scan] = {}
    again: list[tuple[Scan, Scan]] = []
    for scan in scans.values():
        try:
            image = stored_numbers(open_intensity(scan))[0]
        except InputError:
            continue
        middle = tuple(slice(size // 2 - SOME // 2, size // 2 + SOME // 2) for size in image.shape)
        some = np.ascontiguousarray(image[middle], dtype=np.float64)
        if some.size == 0 or not np.ptp(some) > 0:
            continue
        one = first.setdefault(some.tobytes(), scan)
        if one is scan or not np.array_equal(image, stored_numbers(open_intensity(one))[0], equal_nan=True):
            continue
        if one.line != scan.line:
            raise InputError(
                "two scans have the same image, but are given for different lines",
                where=scan.name,
                found=f"the first image of {one.name}: {label(scan)}, and {label(one)}",
                expected="intensities of each line",
                remedy="give the line's own file",
            )
        again.append((scan, one))
    if again:
        named = [
            f"{scan.name} ({label(scan)}) that of {one.name} ({label(one)})" for scan, one in again[:LISTED]
        ]
        more = f", and {len(again) - LISTED} more" if len(again) > LISTED else ""
        logger.warning(
            "images are there twice, as no two exposures are: a camera that stood still, or copies under "
            "other times, which should be left out: %s%s",
            "; ".join(named),
            more,
        )


def _check_window(scan: Scan) -> None:
    window = scan.window
    missing = shortfall(scan.wavelength, window)
    if missing == 0.0:
        return
    wanted = window.wavelengths
    other, as_other = (
        ("air", air_to_vacuum(scan.wavelength))
        if scan.medium == "vacuum"
        else ("vacuum", vacuum_to_air(scan.wavelength))
    )
    mistaken = shortfall(as_other, window) == 0.0
    raise InputError(
        f"the wavelengths seem to be those in {other}" if mistaken else "the wavelength range is too short",
        where=scan.name,
        found=_range(scan),
        expected=f"{wanted[0]:.2f} to {wanted[-1]:.2f} Angstrom in vacuum, less half a sampling step "
        f"({missing:.2f} Angstrom are missing)",
        remedy=f"say --medium {other}, or mend the file"
        if mistaken
        else "use scans that cover the line's window",
    )


def _unit(scan: Scan) -> str:
    return f"{scan.units} (in the file: {scan.units_of_file!r})" if scan.units else "relative intensities"


def _range(scan: Scan) -> str:
    axis = scan.wavelength
    return f"{len(axis)} wavelengths, {axis[0]:.3f} to {axis[-1]:.3f} Angstrom"


def label(scan: Scan) -> str:
    """Name a scan by its line and its mean time."""
    return f"{scan.line} of {np.datetime_as_string(scan.time, unit='ms')}"
