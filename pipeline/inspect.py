"""What files are, what is wrong with them, and what ingest would make of them; nothing is written.

Scans that differ in their times alone (a series of files, or the scans of one) are told about together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline.crisp import (
    Cube,
    ForeignFileError,
    Medium,
    Scan,
    look_into,
    open_intensity,
    open_wavelength_shift,
)
from pipeline.crisp.headers import header_contradictions
from pipeline.crisp.scan import LONG_NAMES, cosine_of_pointing
from pipeline.crisp.wavelengths import LIGHT_SPEED, vacuum_to_air
from pipeline.defects import (
    NO_INTENSITIES,
    granulation_contrast,
    line_far_from_rest,
    survey,
    uncorrected_wavelengths,
)
from pipeline.errors import FlareFieldError, InputError
from pipeline.pairing import Pair, check_alike, check_images, check_limits, completed, label, pair_scans
from pipeline.progress import Progress
from pipeline.registration import Mask, field_of_view

Check: TypeAlias = Callable[[Scan, Cube, Mask], Iterable[str]]
"""Looks at a scan's intensities, and its field of view (y, x); says what is wrong, in a sentence each."""

SAMPLE = 3  # scans of a group whose intensities are looked at, unless all are asked for
GAP = 1.5  # of the median cadence: a longer interval is a gap
SAME_STEP = 1e-3  # Angstrom by which the steps of a uniform axis may differ
LISTED = 5  # files, gaps or scans that are named one by one


def unusable_numbers(scan: Scan, cube: Cube, field: Mask) -> Iterator[str]:
    """Say how many pixels of the field have numbers without meaning, where there is an image.

    Parameters
    ----------
    scan : Scan
        The scan.
    cube : Cube, shape (wavelength, y, x)
        Its intensities; gone through image by image.
    field : ndarray of bool, shape (y, x)
        True where the frame shows the Sun.

    Yields
    ------
    str
    """
    kinds = {"not finite": np.zeros(scan.shape, bool)}
    kinds |= {kind: np.zeros(scan.shape, bool) for kind in ("zero or negative", "saturated")}
    for image in cube:
        finite = np.isfinite(image)
        seen = image[field & finite]
        if seen.size == 0 or seen.min() == seen.max():
            continue
        kinds["not finite"] |= ~finite
        with np.errstate(invalid="ignore"):
            kinds["zero or negative"] |= finite & (image <= 0)
            kinds["saturated"] |= finite & (image >= scan.saturation)
    for kind, pixels in kinds.items():
        if count := int(np.count_nonzero(pixels & field)):
            yield f"{count} pixels of {int(field.sum())} in the field are {kind} at some wavelength"


def defects(scan: Scan, cube: Cube, field: Mask) -> Iterator[str]:
    """Say which images are missing, what spikes and bad pixels there are, and where the line lies if far off.

    Parameters
    ----------
    scan, cube, field
        As for `unusable_numbers`.

    Yields
    ------
    str
    """
    found = survey(cube, field, scan.saturation)
    # Of numbers without meaning `unusable_numbers` tells more.
    yield from replace(found, unusable=0).sentences(np.subtract(scan.wavelength, scan.window.rest_wavelength))
    yield from line_far_from_rest(found.profile, scan)


CHECKS: tuple[Check, ...] = (defects, unusable_numbers)
"""What is looked for in a scan's intensities."""


@dataclass(frozen=True)
class Group:
    """Scans that differ in their times alone, in order of time.

    Attributes
    ----------
    scans : tuple of Scan
        The scans.
    looked_at : tuple of Scan
        Those whose intensities were looked at.
    empty : tuple of Scan
        Those of them that have none.
    found : tuple of (Scan, str)
        What is wrong with them.
    field : float
        Share of the frame that shows the Sun, in the scans looked at.
    contrasts : tuple of (Scan, float)
        Contrast of the granulation in each of them; in every scan, if times of poor seeing are asked for.
    shift : tuple of float or None
        Root mean square, and largest, of what is added to the wavelengths pixel by pixel, Angstrom.
    """

    scans: tuple[Scan, ...]
    looked_at: tuple[Scan, ...]
    empty: tuple[Scan, ...]
    found: tuple[tuple[Scan, str], ...]
    field: float
    contrasts: tuple[tuple[Scan, float], ...]
    shift: tuple[float, float] | None


@dataclass(frozen=True)
class Inspection:
    """What was found of some files.

    Attributes
    ----------
    groups : tuple of Group
        The scans.
    refused : tuple of InputError
        What cannot be read, or is no scan although it was named.
    passed_over : tuple of ForeignFileError
        What is no scan in the directories that were given.
    pairs : tuple of Pair
        What ingest would bring together.
    unpaired : tuple of Scan
        What it would leave out.
    refusal : FlareFieldError or None
        Why it would refuse to.
    min_contrast : float
        Contrast of the granulation below which ingest would say that the seeing is poor.
    """

    groups: tuple[Group, ...]
    refused: tuple[InputError, ...]
    passed_over: tuple[ForeignFileError, ...]
    pairs: tuple[Pair, ...]
    unpaired: tuple[Scan, ...]
    refusal: FlareFieldError | None
    min_contrast: float = 0.0


def inspect(
    sources: Sequence[str | Path],
    *,
    medium: Medium | None = None,
    description: str | Path | None = None,
    tolerance: float,
    every: bool = False,
    min_contrast: float = 0.0,
) -> Inspection:
    """Look into files, as ingest would, and at the intensities of some of their scans.

    Parameters
    ----------
    sources : sequence of str or Path
        Files, directories and patterns, in any order.
    medium : {"vacuum", "air"}, optional
        What the caller says of wavelengths, where the files leave it open.
    description : str or Path, optional
        A YAML file that describes FITS or NetCDF files of other instruments (`pipeline.crisp.generic`).
    tolerance : float
        Seconds between the mean times of a pair at most.
    every : bool
        Look at the intensities of every scan, not of a few.
    min_contrast : float
        As ingest's: above zero, the contrast of every scan's granulation is measured.

    Raises
    ------
    InputError
        A name or pattern that nothing has.
    MisuseError
        A limit is no finite number of 0 or more.
    """
    check_limits(tolerance=tolerance, min_contrast=min_contrast)
    scans: list[Scan] = []
    refused: list[InputError] = []
    passed_over: list[ForeignFileError] = []
    for look in look_into(sources, medium, description):
        scans.extend(look.scans)
        if isinstance(look.refusal, ForeignFileError) and not look.named:
            passed_over.append(look.refusal)
        elif look.refusal is not None:
            refused.append(look.refusal)
    alike: dict[object, list[Scan]] = {}
    scans.sort(key=lambda scan: (scan.time, scan.path, scan.index))
    for scan, on_axis in zip(scans, completed(scans), strict=True):
        axis = (tuple(np.round(on_axis.wavelength, 3)), on_axis.present)
        key = (scan.format, scan.line, axis, scan.medium, scan.shape, scan.units_of_file, scan.padding)
        alike.setdefault(key, []).append(scan)
    chosen = [
        of_group
        if every or len(of_group) <= SAMPLE
        else [of_group[0], of_group[len(of_group) // 2], of_group[-1]]
        for of_group in alike.values()
    ]
    groups = []
    measured = list(alike.values()) if min_contrast > 0.0 else chosen
    with Progress("looking at", sum(map(len, measured)), "scans") as progress:
        for of_group, some, those in zip(alike.values(), chosen, measured, strict=True):
            group, unreadable = _group(of_group, some, those, progress)
            groups.append(group)
            refused.extend(unreadable)
    pairs: tuple[Pair, ...] = ()
    unpaired: tuple[Scan, ...] = ()
    refusal: FlareFieldError | None = None
    if scans:
        try:
            pairs, unpaired = pair_scans(scans, tolerance)
            check_alike(pairs)
            check_images(pairs)
        except FlareFieldError as error:
            refusal = error
    return Inspection(
        tuple(groups), tuple(refused), tuple(passed_over), pairs, unpaired, refusal, min_contrast
    )


def _group(
    scans: list[Scan], some: list[Scan], measured: list[Scan], progress: Progress
) -> tuple[Group, list[InputError]]:
    found: list[tuple[Scan, str]] = []
    refused: list[InputError] = []
    shares, contrasts, squares, largest = [], [], [], 0.0
    looked_at = {id(scan) for scan in some}
    said: set[tuple[str, str]] = set()
    for scan in scans:
        try:
            sentences = header_contradictions(scan)
        except InputError as refusal:
            refused.append(refusal)
            continue
        # What is wrong with a file is said once, not of each of its scans.
        found.extend((scan, sentence) for sentence in sentences if (scan.path, sentence) not in said)
        said.update((scan.path, sentence) for sentence in sentences)
    for scan in measured:
        progress.advance(1)
        try:
            cube = open_intensity(scan)
            field = field_of_view(cube)
            contrast = granulation_contrast(cube, scan.wavelength, scan.window.rest_wavelength, field)
            contrasts.append((scan, contrast))
            if id(scan) not in looked_at:
                continue
            shares.append(float(field.mean()))
            found.extend((scan, sentence) for check in CHECKS for sentence in check(scan, cube, field))
            shift = open_wavelength_shift(scan)
            if shift is not None:
                known = shift[field & np.isfinite(shift)]
                found.extend((scan, sentence) for sentence in uncorrected_wavelengths(shift, field))
                squares.append(float(np.mean(known**2)) if known.size else 0.0)
                largest = max(largest, float(np.abs(known).max(initial=0.0)))
        except InputError as refusal:
            refused.append(refusal)
    return (
        Group(
            tuple(scans),
            tuple(some),
            tuple(scan for scan, sentence in found if sentence == NO_INTENSITIES),
            tuple(found),
            float(np.mean(shares)) if shares else float("nan"),
            tuple(contrasts),
            (float(np.sqrt(np.mean(squares))), largest) if squares else None,
        ),
        refused,
    )


def show(inspection: Inspection, console: Console) -> None:
    """Print what was found.

    Parameters
    ----------
    inspection : Inspection
        What was found.
    console : rich.console.Console
        Where to.
    """
    for group in inspection.groups:
        console.print(_table(group, inspection.min_contrast))
    for title, refusals in (
        ("cannot be used", inspection.refused),
        ("no scans, passed over", inspection.passed_over),
    ):
        for refusal in refusals[:LISTED]:
            console.print(f"[bold]{title}[/]: {escape(str(refusal))}", highlight=False, soft_wrap=True)
        if len(refusals) > LISTED:
            console.print(f"[bold]{title}[/]: and {len(refusals) - LISTED} more files", highlight=False)
    console.print(_plan(inspection))


def _table(group: Group, min_contrast: float) -> Table:
    first = group.scans[0]
    files = list(dict.fromkeys(scan.path for scan in group.scans))
    count = f"{len(group.scans)} scan{'s' if len(group.scans) > 1 else ''}"
    table = Table(
        title=f"{LONG_NAMES[first.line]}: {count}, format {first.format}",
        title_justify="left",
        show_header=False,
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = [
        ("files", files[0] if len(files) == 1 else f"{len(files)}: {files[0]} to {files[-1]}"),
        ("wavelengths", _wavelengths(group.scans)),
        ("intensities", _intensities(first)),
        ("times", _times(group.scans)),
        ("frame", _frame(first)),
        ("field", _field(group)),
        ("contrast", _contrast(group, min_contrast)),
        ("pointing", _pointing(group.scans)),
        ("cavity map", _cavity(group)),
        ("found", _found(group)),
    ]
    for name, text in rows:
        table.add_row(name, Text(text))
    return table


def _wavelengths(scans: Sequence[Scan]) -> str:
    scan = scans[0]
    axis = np.array(scan.wavelength)
    steps = np.diff(axis)
    spacing = (
        f"every {steps.mean():.3f} Angstrom"
        if np.ptp(steps) <= SAME_STEP
        else f"{steps.min():.3f} to {steps.max():.3f} Angstrom apart"
    )
    said = {
        "file": "as the file says",
        "format": "as the format defines",
        "caller": "as you say",
    }[scan.medium_stated_by]
    rest = scan.window.rest_wavelength
    middle = 0.5 * (axis[0] + axis[-1]) - rest
    drift = float(np.ptp([other.wavelength[0] for other in scans]))
    in_file = f"in the file in {scan.medium}"
    if scan.medium == "air":
        ends = vacuum_to_air(axis[[0, -1]])
        in_file += f" ({ends[0]:.3f} to {ends[1]:.3f})"
    return (
        f"{len(axis)}, {spacing}, {axis[0]:.3f} to {axis[-1]:.3f} in vacuum\n{in_file}, {said}\n"
        f"middle {middle:+.3f} Angstrom ({middle / rest * LIGHT_SPEED:+.1f} km/s) from rest, {rest}"
        + (f"\nmoved by up to {1000 * drift:.1f} mA from scan to scan" if drift > SAME_STEP else "")
    )


def _intensities(scan: Scan) -> str:
    unit = scan.units or "relative"
    converted = (
        "" if scan.units_of_file in (scan.units, unit) else f", from {scan.units_of_file!r} in the file"
    )
    limit = f"; saturated at {scan.saturation:g}" if np.isfinite(scan.saturation) else ""
    return f"{unit}{converted}{limit}"


def _times(scans: tuple[Scan, ...]) -> str:
    first, last = (np.datetime_as_string(scans[end].time, unit="ms") for end in (0, -1))
    lines = [f"{first} UTC" if len(scans) == 1 else f"{first} to {last} UTC"]
    intervals = np.diff([scan.time for scan in scans]) / np.timedelta64(1, "s")
    if len(scans) > 1:
        cadence = float(np.median(intervals))
        lines.append(f"every {cadence:.2f} s in the median")
        gaps = np.flatnonzero(intervals > GAP * cadence)
        if gaps.size:
            named = ", ".join(
                f"{intervals[gap]:.1f} s after {np.datetime_as_string(scans[gap].time, unit='s')}"
                for gap in gaps[:LISTED]
            )
            more = f", and {gaps.size - LISTED} more" if gaps.size > LISTED else ""
            lines.append(f"{gaps.size} gap{'s' if gaps.size > 1 else ''}: {named}{more}")
    if (begin := scans[0].begin) is not None and (end := scans[0].end) is not None:
        lines.append(f"a scan takes {(end - begin) / np.timedelta64(1, 's'):.2f} s, first to last wavelength")
    return "\n".join(lines)


def _frame(scan: Scan) -> str:
    rows, columns = scan.shape
    x, y = scan.frame.scale
    turned = float(np.rad2deg(np.arctan2(scan.frame.matrix[1, 0], scan.frame.matrix[0, 0])))
    return (
        f"{rows} x {columns} pixels (y, x) of {abs(y):.4g} x {abs(x):.4g} arcsec, {abs(rows * y):.1f} x "
        f"{abs(columns * x):.1f} arcsec, turned by {turned:+.2f} degrees"
    )


def _field(group: Group) -> str:
    stated = {
        "nan": "; NaN around it, as the file says",
        "constant": "; one value around it, as the file says",
        "none": "; the file says that there is no pad",
        None: "",
    }[group.scans[0].padding]
    return f"{100 * group.field:.0f} % of the frame{stated}"


def _contrast(group: Group, min_contrast: float) -> str:
    known = [value for _, value in group.contrasts if np.isfinite(value)]
    if not known:
        return "not known"
    text = " to ".join(f"{value:.3f}" for value in sorted({min(known), max(known)}))
    if len(known) > 1:
        text += f", {np.median(known):.3f} in the median,"
    text += " in the wings (--min-contrast)"
    poor = [(scan, value) for scan, value in group.contrasts if value < min_contrast]
    if poor:
        named = ", ".join(
            f"{np.datetime_as_string(scan.time, unit='s')} ({value:.3f})" for scan, value in poor
        )
        count = f"{len(poor)} of {len(group.contrasts)} scans"
        text += f"\npoor seeing, less than {min_contrast:g}, in {count}: {named}"
    return text


def _pointing(scans: tuple[Scan, ...]) -> str:
    lines = []
    for scan in scans[:: max(len(scans) - 1, 1)]:
        middle = (np.array([(scan.shape[1] - 1) / 2.0]), np.array([(scan.shape[0] - 1) / 2.0]))
        longitude, latitude = (float(angle[0]) for angle in scan.frame.coordinates(*middle))
        mu = float(cosine_of_pointing((longitude, latitude), scan.time))
        on_disc = f"mu = {mu:.3f}" if np.isfinite(mu) else "off the disc"
        lines.append(f"({longitude:+.1f}, {latitude:+.1f}) arcsec, {on_disc}")
    return " to\n".join(lines)


def _cavity(group: Group) -> str:
    if group.shift is None:
        return "none: all pixels have the same wavelengths"
    rest = group.scans[0].window.rest_wavelength
    text = ", ".join(
        f"{kind} {1000 * value:.1f} mA ({value / rest * LIGHT_SPEED:.2f} km/s)"
        for kind, value in zip(("root mean square", "largest"), group.shift, strict=True)
    )
    return f"{text}; each pixel is interpolated on its own wavelengths"


def _found(group: Group) -> str:
    looked = len(group.looked_at)
    where = f"in the {looked} scans" if looked > 1 else "in the scan"
    where += " looked at (all: --all)" if looked < len(group.scans) else ""
    if not group.found:
        return f"nothing wrong {where}"
    lines = [
        f"{np.datetime_as_string(scan.time, unit='s')}: {sentence}"
        for scan, sentence in group.found[: 2 * LISTED]
    ]
    if len(group.found) > len(lines):
        lines.append(f"and {len(group.found) - len(lines)} more")
    return "\n".join(lines)


def _plan(inspection: Inspection) -> Table:
    table = Table(title="flarefield ingest", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    pairs = inspection.pairs
    if pairs:
        times = [(pair.halpha.time, pair.ca8542.time) for pair in pairs]
        apart = np.abs(np.diff(times, axis=1)) / np.timedelta64(1, "s")
        median, largest = np.median(apart), apart.max()
        text = f"{len(pairs)}, their lines {median:.2f} s apart in the median, {largest:.2f} at most"
        table.add_row("pairs", Text(text))
    if inspection.refusal is None and any(pair.placed for pair in pairs):
        corners = [f"({y}, {x})" for y, x in dict.fromkeys(pair.placement for pair in pairs)]
        more = f", and {len(corners) - LISTED} other places" if len(corners) > LISTED else ""
        text = (
            f"Ca II begins at {', '.join(corners[:LISTED])}{more} (y, x) of H-alpha's frame, by the headers"
        )
        table.add_row("placed", Text(text))
    if inspection.unpaired:
        named = ", ".join(label(scan) for scan in inspection.unpaired[:LISTED])
        more = f", and {len(inspection.unpaired) - LISTED} more" if len(inspection.unpaired) > LISTED else ""
        table.add_row("left out", Text(f"{len(inspection.unpaired)} scans without a partner: {named}{more}"))
    reasons = [] if inspection.refusal is None else [str(inspection.refusal)]
    if inspection.refused:
        reasons.append(f"what cannot be used of the files: {len(inspection.refused)}, see above")
    if not inspection.groups:
        reasons.append("no scans")
    empty = {(scan.path, scan.index) for group in inspection.groups for scan in group.empty}
    blank = [
        pair
        for pair in pairs
        if pair.apart or {(one.path, one.index) for one in (pair.halpha, pair.ca8542)} & empty
    ]
    why = "a scan holds no intensities, or the frames of the two have no pixel in common by their headers"
    if pairs and len(blank) == len(pairs):
        reasons.append(f"no pair of scans has a pixel with both lines: {why}")
    elif blank:
        named = ", ".join(np.datetime_as_string(pair.halpha.time, unit="s") for pair in blank[:LISTED])
        more = f", and {len(blank) - LISTED} more" if len(blank) > LISTED else ""
        text = f"{len(blank)} times without an answer: {named}{more}; {why}"
        table.add_row("blank", Text(text))
    if reasons:
        table.add_row("would refuse", Text("\n".join(reasons)))
    else:
        rows, columns = pairs[0].halpha.shape
        table.add_row(
            "would make", Text(f"an observation of {len(pairs)} x {rows} x {columns} pixels (time, y, x)")
        )
    return table
