"""Which scans of the two lines belong together, and whether they fit into one observation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from pipeline.crisp import LINES, Scan
from pipeline.crisp.wavelengths import air_to_vacuum, vacuum_to_air
from pipeline.errors import InputError
from pipeline.spectra import shortfall

TOLERANCE = 15.0
"""Seconds between the scans of a pair at most, by default: the paper's series has a cadence of 11.5."""

SAME_WAVELENGTH = 1e-3  # Angstrom by which the axes of a series may differ
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


def pair_scans(scans: Sequence[Scan], tolerance: float) -> tuple[tuple[Pair, ...], tuple[Scan, ...]]:
    """Pair scans of the two lines by their mean times.

    As many pairs are made as the tolerance allows, and of those choices the one with the smallest total of
    time differences: each scan belongs to one pair at most.

    Parameters
    ----------
    scans : sequence of Scan
        Of both lines, in any order.
    tolerance : float
        Seconds between the scans of a pair at most.

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
        line: sorted((scan for scan in scans if scan.line == line), key=lambda scan: scan.time)
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
                raise InputError(
                    "two files hold the same scan",
                    where=later.name,
                    found=f"{label(later)}, as {earlier.name}",
                    remedy="leave one of them out",
                )
    halpha, ca8542 = by_line["halpha"], by_line["ca8542"]
    apart = np.abs(
        np.subtract.outer(np.array([scan.time for scan in halpha]), np.array([scan.time for scan in ca8542]))
        / np.timedelta64(1, "s")
    )
    # No sum of allowed differences reaches the price of one that is not allowed.
    forbidden = (tolerance + 1.0) * (min(apart.shape) + 1)
    first, second = linear_sum_assignment(np.where(apart <= tolerance, apart, forbidden))
    chosen = [(i, j) for i, j in zip(first, second, strict=True) if apart[i, j] <= tolerance]
    if not chosen:
        raise InputError(
            "no scans of the two lines belong together",
            found=f"the nearest are {apart.min():.1f} s apart",
            expected=f"{tolerance:g} s or less",
            remedy="give scans of the same time, or a larger --tolerance",
        )
    pairs = tuple(Pair(halpha[i], ca8542[j]) for i, j in chosen)
    taken = {(scan.path, scan.index) for pair in pairs for scan in (pair.halpha, pair.ca8542)}
    return pairs, tuple(scan for scan in (*halpha, *ca8542) if (scan.path, scan.index) not in taken)


def check_alike(pairs: tuple[Pair, ...]) -> None:
    """Refuse scans that do not fit into one store, or not into the network's windows.

    Parameters
    ----------
    pairs : tuple of Pair
        In order.

    Raises
    ------
    InputError
        Scans differ in size, pixels, wavelengths or number format, or do not cover the lines' windows.
    """
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
                    expected=f"{_range(like)}, as {like.path}",
                    remedy="ingest them separately",
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


def _range(scan: Scan) -> str:
    axis = scan.wavelength
    return f"{len(axis)} wavelengths, {axis[0]:.3f} to {axis[-1]:.3f} Angstrom"


def label(scan: Scan) -> str:
    """Name a scan by its line and its mean time."""
    return f"{scan.line} of {np.datetime_as_string(scan.time, unit='ms')}"
