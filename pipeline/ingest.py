"""From CRISP scans to an observation store: pair in time, mask the pad, bring Ca II onto H-alpha, write.

One task handles one pair of scans and writes one time of the store, so that the series is never in memory:
a task maps its two files and goes through them shard by shard. The store is made beside its final name, and
put there when it is whole (`pipeline.replacement`); a journal says which times are done, so that the same
command resumes what was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import zarr
from distributed import Client
from numpy.typing import ArrayLike
from zarr.core.sync import sync

from pipeline import changes
from pipeline.alignment import (
    LARGEST_JUMP,
    LARGEST_TURN,
    SIGNIFICANT,
    STRIDES,
    Link,
    LinkTask,
    Position,
    find_link,
    links_of,
    positions,
)
from pipeline.calibration import QuietSunCalibration, Reference, calibrate_store, write_calibration
from pipeline.changes import BandImages, ChangeTask, Weights
from pipeline.cluster import ClusterConfig, opened, see_that_workers_find
from pipeline.common_time import Other, between, other_scans, share_of_other
from pipeline.crisp import LINES, Medium, Scan, find_scans, open_intensity
from pipeline.crisp.headers import header_contradictions
from pipeline.defects import NO_INTENSITIES
from pipeline.driver import Outcome, run_bounded
from pipeline.errors import FlareFieldError, InputError, MisuseError, StoreError
from pipeline.journal import Journal
from pipeline.moved_scan import MovedScan
from pipeline.observation import SHARD, finish, is_observation, lay_out, microseconds, pointing_of
from pipeline.pairing import TOLERANCE, Pair, check_alike, check_images, check_limits, label, pair_scans
from pipeline.progress import Progress
from pipeline.provenance import flarefield_version, provenance, sha256_source, stamp
from pipeline.registration import BANDS, CONFIDENT, STAYS, Mask, Shift
from pipeline.replacement import discard, finish_swaps, opened_group, replacement, replacements, scratch, swap
from pipeline.shards import ShardWriter
from pipeline.storage import Place, answering, array_in, is_url, log_at, place, space

logger = logging.getLogger("flarefield")

KERNEL = 12
"""Version of what an observation's numbers depend on in this package; raised whenever they change."""

THREADS = 2
"""Of a task: lines are looked through side by side, and blocks resampled, compressed and written."""

COMPARED = 8
"""Times that are compared in one task: neighbours share what is read and found out."""

LISTED = 10  # files that an error names one by one

Task = TypeVar("Task")
Result = TypeVar("Result")
Cluster: TypeAlias = ClusterConfig | Client | None


@dataclass(frozen=True)
class PairTask:
    """What a worker needs to write one time of a store; `unhashed` are the files whose SHA-256 it finds.

    `images` is the store of images that `pipeline.changes` compares, None if there is nothing to compare.
    `position` is what both lines are moved by to lie on the series' reference, if it is aligned along time.
    `other` is a second scan of Ca II, if it is to be interpolated in time to H-alpha's.
    """

    store: str
    images: str | None
    time: int
    pair: Pair
    unhashed: tuple[str, ...]
    position: Shift = STAYS
    other: Scan | None = None


@dataclass(frozen=True)
class _Series:
    """What was found: `others` are what Ca II is interpolated with, None if that is not asked for."""

    pairs: tuple[Pair, ...]
    others: tuple[Other, ...] | None
    unpaired: tuple[Scan, ...]
    passed_over: tuple[str, ...]

    @property
    def scans(self) -> list[tuple[Scan, ...]]:
        """All scans that each time may come from."""
        of_times: list[tuple[Scan, ...]] = [(pair.halpha, pair.ca8542) for pair in self.pairs]
        for time, other in enumerate(self.others or ()):
            if other.scan is not None:
                of_times[time] += (other.scan,)
        return of_times


@dataclass(frozen=True)
class _Wishes:
    """How an observation is to be made; `largest_jump` is None where the series is not to be aligned."""

    tolerance: float
    calibrate: Reference
    wavelength_zero: Reference
    min_contrast: float
    largest_jump: float | None


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did.

    Attributes
    ----------
    path : Path or str
        The observation store, or its URL.
    pairs : tuple of Pair
        The scans of each time.
    shifts : tuple of Shift
        Displacement of Ca II at each time; empty if nothing had to be done.
    unpaired : tuple of Scan
        Scans without a partner.
    passed_over : tuple of str
        Files of given directories that are not scans.
    found : tuple of str
        What is wrong with the scans: spikes, dead pixels, missing images, poor seeing, headers at odds.
    calibration : QuietSunCalibration, optional
        What the quiet Sun in the field said, if it was asked.
    changed : float, optional
        Share of the pixels that changed between the two lines' times (`pipeline.changes`), of those of which
        this is known; None if it is not known of any.
    resumed : int
        Times that an earlier run had finished.
    complete_before : bool
        The store was there already, made from the same files: nothing was done.
    positions : tuple of Position
        Where each time lies, if the series was aligned along time.
    interpolated : tuple of bool
        Whether Ca II is interpolated to H-alpha's time, at each time; empty if that was not asked for.
    blank : tuple of int
        Times of which no pixel shows both lines, by their numbers: a scan holds no intensities, or the fields
        have nothing in common.
    """

    path: Path | str
    pairs: tuple[Pair, ...]
    shifts: tuple[Shift, ...]
    unpaired: tuple[Scan, ...]
    passed_over: tuple[str, ...]
    found: tuple[str, ...] = ()
    calibration: QuietSunCalibration | None = None
    changed: float | None = None
    resumed: int = 0
    complete_before: bool = False
    positions: tuple[Position, ...] = ()
    interpolated: tuple[bool, ...] = ()
    blank: tuple[int, ...] = ()

    def summary(self) -> str:
        """Say it in a few lines."""
        rows, columns = self.pairs[0].halpha.shape
        first, last = (np.datetime_as_string(self.pairs[end].halpha.time, unit="s") for end in (0, -1))
        span = first if len(self.pairs) == 1 else f"{first} to {last}"
        lines = [f"{self.path}: {len(self.pairs)} x {rows} x {columns} pixels (time, y, x), {span} UTC"]
        if self.complete_before:
            lines.append("  complete already, made from the same files: nothing to do")
        if self.blank:
            lines.append(
                f"  at {len(self.blank)} of {len(self.pairs)} times no pixel shows both lines (`valid`), the "
                "log says why"
            )
        shifts = [shift for time, shift in enumerate(self.shifts) if time not in self.blank]
        if shifts:
            applied = [shift for shift in shifts if shift.applied]
            text = f"  Ca II moved onto H-alpha in {len(applied)} of {len(shifts)} scans"
            if applied:
                y, x = np.median([(shift.y, shift.x) for shift in applied], axis=0)
                text += f", by ({y:+.2f}, {x:+.2f}) pixels (y, x) in the median"
            if len(applied) < len(shifts):
                text += "; elsewhere its displacement is not certain (`shift_confidence`) and it stays"
            lines.append(text)
        if self.positions:
            known = [position for position in self.positions if position.known]
            reach = max(float(np.hypot(position.y, position.x)) for position in known)
            lines.append(
                f"  series aligned along time in {len(known)} of {len(self.positions)} scans, moved by up to "
                f"{reach:.1f} pixels"
            )
            if any(position.turned for position in known):
                turn = max(abs(position.turn) for position in known)
                lines[-1] += f" and turned by up to {turn:.2f} degrees"
            if len(known) < len(self.positions):
                lines[-1] += "; elsewhere nothing was moved (`series_aligned`), the log says why"
        if self.interpolated:
            lines.append(
                f"  Ca II interpolated to H-alpha's time in {sum(self.interpolated)} of "
                f"{len(self.interpolated)} scans"
            )
            others = [pair for pair, done in zip(self.pairs, self.interpolated, strict=True) if not done]
            if same := sum(pair.ca8542.time == pair.halpha.time for pair in others):
                lines[-1] += f"; {same} were taken at that time"
            if same < len(others):
                lines[-1] += "; elsewhere it keeps its own (`ca8542_interpolated`), the log says why"
        if self.changed is not None:
            lines.append(
                f"  {100.0 * self.changed:.1f} % of the pixels changed between the two lines' times by more "
                f"than {100.0 * changes.CHANGED:g} % (`change_between_lines`)"
            )
        elif not self.complete_before:
            lines.append("  how much changed between the two lines' times is not known")
        if self.found:
            lines.append(f"  something is wrong with scans (`defects`), {self.found[0]}")
            if len(self.found) > 1:
                lines[-1] += f"; and {len(self.found) - 1} more, see the log and the attribute `found`"
        if self.calibration is not None:
            lines.extend(f"  {line}" for line in self.calibration.summary().splitlines())
        if self.unpaired:
            lines.append(
                f"  {len(self.unpaired)} scans without a partner make no time (attribute `unpaired`)"
            )
        if self.passed_over:
            lines.append(f"  {len(self.passed_over)} other files passed over")
        return "\n".join(lines)


def ingest(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    cluster: Cluster = None,
    call: str,
    tolerance: float = TOLERANCE,
    medium: Medium | None = None,
    description: str | Path | None = None,
    calibrate: Reference = "none",
    wavelength_zero: Reference = "none",
    min_contrast: float = 0.0,
    align_series: bool = False,
    largest_jump: float = LARGEST_JUMP,
    common_time: bool = False,
    overwrite: bool = False,
) -> IngestReport:
    """Make an observation store from CRISP scans of both lines.

    H-alpha stays as it is; Ca II is moved onto it where the displacement is found with confidence, and stays
    as it is where not (``shift_applied``). Nothing is cropped; ``valid`` says where both lines see the Sun.

    Parameters
    ----------
    sources : sequence of str or Path
        Files, directories and patterns of this machine, in any order; scans are known by their content.
    output : str or Path
        The store, or its URL (`pipeline.storage.place`). If it was made from the same files nothing is done;
        an interrupted ingest is resumed.
    cluster : configuration or distributed.Client, optional
        Where to run; without one the work is done in this process. A configured cluster is started only when
        there is something to do.
    call : str
        The command line or Python call, for the record.
    tolerance : float
        Seconds between the mean times of a pair at most.
    medium : {"vacuum", "air"}, optional
        What the caller says of the files' wavelengths, where they leave it open; recorded.
    description : str or Path, optional
        A YAML file that describes FITS or NetCDF files of other instruments (`pipeline.crisp.generic`).
    calibrate : {"none", "quiet-sun"}
        Whether each line's intensities are compared with the quiet Sun's in the field
        (`pipeline.calibration`): the store is then in `pipeline.calibration.UNITS`, and says how well the
        lines are known against one another.
    wavelength_zero : {"none", "quiet-sun"}
        Whether each line's wavelengths are moved so that the quiet Sun's core is where the atlas has it.
    min_contrast : float
        Contrast of the granulation (`pipeline.defects.granulation_contrast`) below which the seeing has
        spoilt a scan. It is kept and flagged (``poor_seeing``, also in a map's quality).
    align_series : bool
        Whether all times are also brought onto one, by H-alpha (`pipeline.alignment`): both lines are moved,
        once. Times for which that cannot be found out stay as they are (``series_aligned`` is false, and a
        map's quality says ``registration_uncertain``).
    largest_jump : float
        Pixels between two scans that are linked; a larger displacement is not taken for the telescope's.
    common_time : bool
        Whether Ca II is interpolated to H-alpha's times (`pipeline.common_time`). Times for which that is not
        possible keep the pair's own scan: ``ca8542_interpolated`` is false, and ``time_ca8542`` is its time.
    overwrite : bool
        Replace an observation made from other files. It stays as it is until the new one is finished; on an
        object store, which cannot rename, there is no observation for as long as it takes to copy the new
        one to its place. Anything else than an observation is never replaced.

    Returns
    -------
    IngestReport

    Raises
    ------
    InputError
        Scans cannot be used, do not fit together, or are of one line only.
    MisuseError
        The output exists and is something else, another command is working on it, a source is a URL, or a
        limit is no finite number of 0 or more.
    StoreError
        There is no space left, or the store cannot be used. What is finished is kept for the next run.
    """
    for source in sources:
        if is_url(source):
            raise MisuseError(
                "scans are read from files of this machine, not from URLs",
                where=source,
                remedy="fetch the files first, or mount the store; only the output may be a URL",
            )
    check_limits(tolerance=tolerance, min_contrast=min_contrast, largest_jump=largest_jump)
    wishes = _Wishes(
        tolerance, calibrate, wavelength_zero, min_contrast, largest_jump if align_series else None
    )
    target = place(output)
    if not target.can_hold():
        raise MisuseError(
            "the output's directory does not exist",
            where=Path(target.location).parent,
            remedy="make it first",
        )
    if cluster is not None:
        see_that_workers_find(cluster, output)
    with target.lock(), space(target):
        finish_swaps(target)
        if target.exists() and not is_observation(target.location):
            raise MisuseError(
                "the output exists and is not an observation",
                where=target,
                expected="a new name, or an observation store",
                remedy="choose another name",
            )
        series = _find_series(sources, wishes, medium, description, common_time=common_time)
        if target.exists() and not overwrite:
            _check_same(target, series, wishes, cluster)
            log_at(target.journal).remove()
            return IngestReport(
                target.location,
                series.pairs,
                (),
                series.unpaired,
                series.passed_over,
                complete_before=True,
            )
        return _make(target, series, wishes, cluster, call)


def _find_series(
    sources: Sequence[str | Path],
    wishes: _Wishes,
    medium: Medium | None,
    description: str | Path | None,
    *,
    common_time: bool,
) -> _Series:
    """Find the scans' pairs, the scans without a partner, and what is not a scan; say what is left out."""
    scans, refusals = find_scans(sources, medium, description)
    passed_over = tuple(f"{refusal.where}: {refusal.problem}" for refusal in refusals)
    if not scans:
        raise InputError(
            "no scans found",
            where=", ".join(str(source) for source in sources),
            found="\n    ".join(["", *passed_over[:LISTED]]) if passed_over else "no files of a known format",
            expected="CRISP scans in H-alpha and Ca II 8542",
            remedy="check the names",
        )
    pairs, unpaired = pair_scans(scans, wishes.tolerance)
    check_alike(pairs, calibrated=wishes.calibrate != "none")
    check_images(pairs)
    for scan in unpaired:
        logger.warning(
            "%s: %s has no partner of its own within %g s", scan.name, label(scan), wishes.tolerance
        )
    for text in passed_over:
        logger.warning("%s, passed over", text)
    others = tuple(other_scans(pairs, unpaired)) if common_time else None
    return _Series(pairs, others, unpaired, passed_over)


def ingest_pair(task: PairTask) -> dict[str, Any] | FlareFieldError:
    """Write one time of an observation store: what a worker does.

    Parameters
    ----------
    task : PairTask
        The scans and their place.

    Returns
    -------
    dict or FlareFieldError
        The journal's record: displacement, confidence, contrasts, what is wrong with the scans, the bytes
        written, and the SHA-256 of the task's files. What a user has to mend comes back as a value: trying
        again would not help, and the worker has nothing to say about it.
    """
    try:
        with space(task.store), answering(task.store), ThreadPoolExecutor(THREADS) as threads:
            return _ingested(task, threads)
    except FlareFieldError as refusal:
        return refusal


def _ingested(task: PairTask, threads: ThreadPoolExecutor) -> dict[str, Any]:
    pair = task.pair
    store = place(task.store)
    group = opened_group(store)
    for folder in _folders(task.time):
        # What a killed worker was writing would be counted with what is written now.
        sync(group.store.delete_dir(folder))
    cubes = [open_intensity(getattr(pair, line)) for line in LINES]
    halpha, ca8542 = threads.map(MovedScan.looked_through, (pair, pair), LINES, cubes)
    halpha = halpha.moved(task.position)
    images = None
    if task.images is not None:
        images = BandImages(
            (halpha.scan, ca8542.scan),
            {one.scan.line: changes.level(one.cube, one.own_field) for one in (halpha, ca8542)},
        )
    written = _write_blocks(task, group, halpha, None, images, threads)
    hashes = threads.map(sha256_source, task.unhashed)
    sharpness = threads.map(lambda scan: scan.contrast, (halpha, ca8542))
    # Meanwhile this thread searches for the displacement.
    shift = ca8542.displacement(halpha)
    ca8542 = ca8542.moved(_total(task.position, shift))
    other, other_shift = None, STAYS
    if task.other is not None:
        both = Pair(pair.halpha, task.other)
        other = MovedScan.looked_through(both, "ca8542", open_intensity(task.other))
        other_shift = other.displacement(halpha)
        other = other.moved(_total(task.position, other_shift))
    interpolated = other is not None and shift.applied and other_shift.applied
    second = other if interpolated else None
    _see_through(written)
    written = _write_blocks(task, group, ca8542, second, images, threads)
    overlap, found = _write_maps(task, group, halpha, ca8542, second)
    _see_through(written)
    if images is not None and task.images is not None:
        images.leave_out(~overlap | found)
        images.write(place(task.images), task.time)
    for folder in _folders(task.time):
        store.bring_to_disk(folder)
    blank = None if overlap.any() else _why_blank(halpha, ca8542)
    contrasts = list(sharpness)
    if second is not None and (contrast := second.contrast) is not None:
        contrasts[1] = min(contrasts[1] or 0.0, contrast)
    return {
        "time": task.time,
        "shift_y": shift.y,
        "shift_x": shift.x,
        "confidence": shift.confidence,
        "interpolated": interpolated,
        "other_confidence": other_shift.confidence,
        "contrast": contrasts,
        "blank": blank,
        "found": [
            *([] if blank is None else [blank]),
            *halpha.sentences,
            *ca8542.sentences,
            *(other.sentences if other is not None else []),
        ],
        "stored": _stored(store, _folders(task.time)),
        "images": _images_stored(task.images, task.time),
        "sha256": dict(zip(task.unhashed, hashes, strict=True)),
    }


def _folders(time: int) -> list[str]:
    """Folders of a store that hold one time, and nothing else."""
    shifts = (f"wavelength_shift_{line}" for line in LINES)
    return [f"{name}/c/{time}" for name in (*LINES, "valid", "defects", *shifts)]


def _stored(store: Place, folders: Iterable[str]) -> int:
    """Bytes of the files in some folders of a store."""
    return sum(sum(store.sizes(folder).values()) for folder in folders)


def _images_stored(images: str | None, time: int) -> int:
    """Bytes of one time's files in the store of images."""
    return 0 if images is None else _stored(place(images), changes.image_folders(time))


def _write_blocks(
    task: PairTask,
    group: zarr.Group,
    scan: MovedScan,
    other: MovedScan | None,
    images: BandImages | None,
    threads: ThreadPoolExecutor,
) -> Iterator[None]:
    """Have a line's intensities written, between its two scans if there is another one; iterate to wait.

    As many blocks are in memory as there are threads.
    """
    line = scan.scan.line
    writer = ShardWriter(array_in(group, line))
    share = 0.0 if other is None else share_of_other(task.pair, other.scan)
    sizes = scan.own_field.shape

    def write(number: tuple[int, ...]) -> None:
        y, x = (
            slice(one * SHARD, min((one + 1) * SHARD, size)) for one, size in zip(number, sizes, strict=True)
        )
        block = scan.block(y, x)
        if images is not None:
            images.add(line, block, y, x)
        if other is not None:
            block = between(block, other.block(y, x), share, scan.scan.saturation)
            if images is not None:
                images.brightest(line, block, y, x)
        writer.write((task.time, *number, 0), block[None])

    return threads.map(write, np.ndindex(*(-(-size // SHARD) for size in sizes)))


def _see_through(written: Iterator[None]) -> None:
    """Wait for all blocks; where one fails those that have not begun are given up."""
    for _ in written:
        pass


def _write_maps(
    task: PairTask, group: zarr.Group, halpha: MovedScan, ca8542: MovedScan, other: MovedScan | None
) -> tuple[Mask, Mask]:
    """Write what a time has beside intensities. Return where it is valid, and where anything is wrong."""
    scans = (halpha, ca8542) if other is None else (halpha, ca8542, other)
    overlap: Mask = np.logical_and.reduce([one.field for one in scans])
    # Where one line has nothing at all, the other one's field says which pixels lack it.
    seen = np.logical_and.reduce([np.ones_like(overlap), *(one.field for one in scans if not one.empty)])
    found = np.where(seen, np.bitwise_or.reduce([one.defects for one in scans]), np.uint8(0))
    maps = {"valid": overlap, "defects": found}
    for one in (halpha, ca8542):
        # Where any scan of the series has such a map.
        if (name := f"wavelength_shift_{one.scan.line}") in group:
            maps[name] = one.wavelength_shift()
            if one is ca8542 and other is not None:
                share = share_of_other(task.pair, other.scan)
                maps[name] = (1.0 - share) * maps[name] + share * other.wavelength_shift()
    for name, values in maps.items():
        # Also where it holds nothing: a part that has gone can then be told from one never written.
        array_in(group, name).with_config({"write_empty_chunks": True})[task.time] = values
    return overlap, found != 0


def _total(position: Shift, shift: Shift) -> Shift:
    """What Ca II is moved by, once: onto H-alpha where that is known, and with it onto the reference."""
    return position.after(shift) if shift.applied else position


def _why_blank(halpha: MovedScan, ca8542: MovedScan) -> str:
    """Say why no pixel of a time shows both lines."""
    empty = [one.scan.name for one in (halpha, ca8542) if one.empty]
    if empty:
        return f"{' and '.join(empty)}: {NO_INTENSITIES}"
    y, x = ca8542.corner
    return (
        f"{halpha.scan.name}: no pixel in common with the field of {ca8542.scan.name}, which begins at "
        f"({y}, {x}) pixels (y, x) by the headers"
    )


def _make(output: Place, series: _Series, wishes: _Wishes, cluster: Cluster, call: str) -> IngestReport:
    pairs, others = series.pairs, series.others
    odd = _contradictions(series)
    store, journal = _begun(output, _fingerprint(series, wishes), pairs)
    images = scratch(store) if len(pairs) > 1 else None
    if images is not None:
        changes.lay_out_images(images, (pairs[0].halpha, pairs[0].ca8542), len(pairs))
    # One cluster for all that is to be done.
    with journal, nullcontext() if cluster is None else opened(cluster) as cluster:
        done = _taken_up(store, images, journal)
        resumed = len(done)
        files = _files_of_times(series)
        jump = wishes.largest_jump
        places = None if jump is None else _aligned(cluster, pairs, journal, jump)
        waiting = (
            PairTask(
                str(store),
                None if images is None else str(images),
                time,
                pair,
                files[time],
                places[time].shift if places else STAYS,
                others[time].scan if others else None,
            )
            for time, pair in enumerate(pairs)
            if time not in done
        )
        _write_pairs(waiting, len(pairs), cluster, journal, done)
        records = [done[time] for time in range(len(pairs))]
        blank = {time: record["blank"] for time, record in enumerate(records) if record["blank"] is not None}
        if len(blank) == len(pairs):
            raise _nothing(list(blank.values()), output)
        shifts = tuple(
            Shift(record["shift_y"], record["shift_x"], record["confidence"]) for record in records
        )
        _say_not_moved(pairs, shifts, places, blank)
        interpolated = [bool(record["interpolated"]) for record in records]
        if others is not None:
            _say_not_interpolated(pairs, others, records, blank)
        contrasts = np.array([record["contrast"] for record in records], dtype=np.float64)
        poor = [bool((both < wishes.min_contrast).any()) for both in contrasts]
        # A scan of Ca II may serve two times.
        found = list(dict.fromkeys(sentence for record in records for sentence in record["found"]))
        found += [f"{path}: {sentence}" for path, said in odd.items() for sentence in said]
        found += [
            f"{pair.halpha.name}: contrast of {both[0]:.3f} in H-alpha and {both[1]:.3f} in Ca II, less than "
            f"{wishes.min_contrast:g}"
            for pair, both, bad in zip(pairs, contrasts, poor, strict=True)
            if bad
        ]
        of_positions = {} if places is None else _of_positions(pairs, places)
        found += _off_the_disc(pairs, of_positions.get("mu") or zarr.open_array(store.zarr, path="mu")[:])
        for sentence in found:
            logger.warning("%s", sentence)
        scans = (pairs[0].halpha, pairs[0].ca8542)
        # As in the files, also where an earlier run of this store was cut off after it had calibrated.
        applied = write_calibration(store.location, scans)
        calibration = None
        if "quiet-sun" in (wishes.calibrate, wishes.wavelength_zero):
            lit = [time for time in range(len(pairs)) if time not in blank]
            calibration = calibrate_store(store.location, output, among=lit)
            for remark in calibration.remarks():
                logger.warning("%s: %s", output, remark)
            applied = write_calibration(
                store.location,
                scans,
                calibration,
                intensities=wishes.calibrate == "quiet-sun",
                wavelengths=wishes.wavelength_zero == "quiet-sun",
            )
        scales = dict.fromkeys(LINES, 1.0)
        if calibration is not None and wishes.calibrate == "quiet-sun":
            scales = {line: getattr(calibration, line).scale for line in LINES}
        changed = None
        if images is not None:
            used = [
                other.scan if common else None
                for other, common in zip(others or (), interpolated, strict=False)
            ]
            weights = _weights(pairs, shifts, places, used, blank)
            changed = _compare(store, images, journal, cluster, weights, places is not None, scales)
        _finish(
            store,
            shifts,
            records,
            {
                **{f"contrast_{line}": contrasts[:, index].tolist() for index, line in enumerate(LINES)},
                "poor_seeing": poor,
                "header_contradiction": [
                    any(scan.path in odd for scan in several) for several in series.scans
                ],
                **of_positions,
                "ca8542_interpolated": interpolated,
                "time_ca8542": [
                    microseconds(pair.halpha.time if common else pair.ca8542.time)
                    for pair, common in zip(pairs, interpolated, strict=True)
                ],
            },
            {
                **applied,
                "least_contrast": wishes.min_contrast,
                "found": found,
                "common_time": others is not None,
                **({} if jump is None else {"series_alignment": _alignment_record(jump, places or ())}),
                "pairing_tolerance_seconds": wishes.tolerance,
            },
            series,
            call,
        )
        journal.append({"finished": True})
    swap(output, store)
    log_at(output.journal).remove()
    return IngestReport(
        output.location,
        pairs,
        shifts,
        series.unpaired,
        series.passed_over,
        tuple(found),
        calibration,
        changed,
        resumed,
        positions=places or (),
        interpolated=tuple(interpolated) if others is not None else (),
        blank=tuple(blank),
    )


def _write_pairs(
    waiting: Iterable[PairTask],
    times: int,
    cluster: Cluster,
    journal: Journal,
    done: dict[int, dict[str, Any]],
) -> None:
    """Write the times that wait, and put each record into the journal and beside those of earlier runs."""
    failures: list[tuple[Pair, BaseException]] = []
    with Progress("ingesting", times, "scan pairs", done=len(done)) as progress:
        for outcome in _run(cluster, ingest_pair, waiting):
            answer = outcome.error or outcome.result
            if isinstance(answer, StoreError):
                raise answer
            if isinstance(answer, dict):
                journal.append(answer)
                done[outcome.task.time] = answer
            elif answer is not None:
                failures.append((outcome.task.pair, answer))
                logger.error("%s failed: %s", outcome.task.pair.halpha.path, answer)
            progress.advance(1)
    if failures:
        raise _failed(failures, times)


def _nothing(reasons: Sequence[str], output: Place) -> InputError:
    listed = list(reasons[:LISTED])
    if len(reasons) > LISTED:
        listed.append(f"and {len(reasons) - LISTED} more")
    return InputError(
        "no time of the series has pixels that show both lines",
        where=output,
        found="\n    ".join(["", *listed]),
        expected="positive intensities in both lines, in fields that overlap",
        remedy="fetch the files again, or mend the pointing in their headers",
    )


def _say_not_moved(
    pairs: Sequence[Pair],
    shifts: Sequence[Shift],
    places: Sequence[Position] | None,
    blank: Container[int],
) -> None:
    """Log which scans are not moved, and why; of blank times it is said already that they are."""
    for time, (pair, shift) in enumerate(zip(pairs, shifts, strict=True)):
        if not shift.applied and time not in blank:
            logger.warning(
                "%s: Ca II seems displaced by (%+.2f, %+.2f) pixels, but with a confidence of only %.2f; "
                "not moved",
                pair.halpha.path,
                shift.y,
                shift.x,
                shift.confidence,
            )
    for time, (pair, position) in enumerate(zip(pairs, places or (), strict=False)):
        if not position.known and time not in blank:
            logger.warning(
                "%s: its displacement along time is not known (%s); not moved",
                pair.halpha.name,
                position.refused,
            )


def _aligned(
    cluster: Cluster, pairs: tuple[Pair, ...], journal: Journal, largest_jump: float
) -> tuple[Position, ...]:
    """Positions of all times; links that an earlier run has found are taken from its journal."""
    known = {
        (record["link"]["earlier"], record["link"]["later"]): Link(**record["link"])
        for record in journal.records()
        if "link" in record
    }
    wanted = links_of(len(pairs))
    tasks = (
        LinkTask(first, second, (pairs[first].halpha, pairs[second].halpha))
        for first, second in wanted
        if (first, second) not in known
    )
    failures: list[tuple[Pair, BaseException]] = []
    with Progress("aligning", len(wanted), "links", done=len(known)) as progress:
        for outcome in _run(cluster, find_link, tasks):
            answer = outcome.error or outcome.result
            if isinstance(answer, dict):
                journal.append({"link": answer})
                known[answer["earlier"], answer["later"]] = Link(**answer)
            elif answer is not None:
                failures.append((pairs[outcome.task.later], answer))
            progress.advance(1)
    if failures:
        raise _failed(failures, len(wanted))
    corner = 0.5 * float(np.hypot(*pairs[0].halpha.shape))
    return positions(len(pairs), known.values(), largest_jump, corner)


def _of_positions(pairs: tuple[Pair, ...], places: tuple[Position, ...]) -> dict[str, list[Any]]:
    """What a store says of each time's position, and where its moved frame's middle points."""
    pointing = [
        pointing_of(pair.halpha, position.shift) for pair, position in zip(pairs, places, strict=True)
    ]
    return {
        "series_shift_y": [position.y for position in places],
        "series_shift_x": [position.x for position in places],
        "series_confidence": [position.confidence for position in places],
        "series_residual": [position.residual for position in places],
        "series_turn": [position.turn for position in places],
        "series_turn_error": [position.turn_error for position in places],
        "series_error": [position.error for position in places],
        "series_aligned": [position.known for position in places],
        "pointing_longitude": [longitude for longitude, _, _ in pointing],
        "pointing_latitude": [latitude for _, latitude, _ in pointing],
        "mu": [mu for _, _, mu in pointing],
    }


def _off_the_disc(pairs: Sequence[Pair], mu: ArrayLike) -> list[str]:
    """Say at how many times mu is not defined, if there are any."""
    off = np.flatnonzero(np.isnan(np.asarray(mu, dtype=np.float64)))
    if not off.size:
        return []
    return [
        f"{pairs[off[0]].halpha.name}: the frame's middle is off the disc, where mu is not defined, at "
        f"{off.size} of {len(pairs)} times, of which this is the first: they have no answer in a map"
    ]


def _alignment_record(largest_jump: float, places: Sequence[Position]) -> dict[str, Any]:
    return {
        "strides": list(STRIDES),
        "least_confidence": CONFIDENT,
        "largest_jump_pixels": largest_jump,
        "largest_turn_degrees": LARGEST_TURN,
        "turned": any(position.turned for position in places),
        "turned_from_standard_errors": SIGNIFICANT,
        "method": "links between H-alpha scans by robust least squares of the granulation in the wings; "
        "positions by least squares",
    }


def _compare(
    store: Place,
    images: Place,
    journal: Journal,
    cluster: Cluster,
    weights: Mapping[int, Mapping[str, Sequence[Weights]]],
    aligned: bool,
    scales: Mapping[str, float],
) -> float | None:
    """Estimate how much changed between the lines; return the share of the pixels that did."""
    journal.flush()
    done = {
        record["change"]: record
        for record in journal.records()
        if record.get("scales") == scales
        and _stored(store, [changes.folder(record["change"])]) == record["stored"]
    }
    wanted = {time: of_lines for time, of_lines in weights.items() if of_lines}
    waiting = [time for time in wanted if time not in done]
    tasks = (
        ChangeTask(
            str(store),
            str(images),
            {time: wanted[time] for time in waiting[first : first + COMPARED]},
            scales,
            aligned,
        )
        for first in range(0, len(waiting), COMPARED)
    )
    with Progress("comparing", len(wanted), "scan pairs", done=len(done)) as progress:
        for outcome in _run(cluster, changes.find_changes, tasks):
            answer = outcome.error or outcome.result
            if isinstance(answer, FlareFieldError):
                raise answer
            if not isinstance(answer, list):
                raise StoreError(
                    "what changed between the lines could not be found out",
                    where=outcome.task.images,
                    found=f"{type(answer).__name__}: {answer}",
                    remedy="run the same command again: it resumes, finished times are kept",
                ) from outcome.error
            for record in answer:
                done[record["change"]] = {**record, "scales": scales}
                journal.append(done[record["change"]])
            progress.advance(len(answer))
    unknown = [time for time in weights if time not in done or not done[time]["known"]]
    if unknown:
        logger.warning(
            "at %d of %d times it is not known how much changed between the lines: no neighbour in time that "
            "is near enough and lies on the scan with certainty",
            len(unknown),
            len(weights),
        )
    known = sum(record["known"] for record in done.values())
    return sum(record["changed"] for record in done.values()) / known if known else None


def _weights(
    pairs: tuple[Pair, ...],
    shifts: tuple[Shift, ...],
    places: tuple[Position, ...] | None,
    others: Sequence[Scan | None],
    blank: Container[int],
) -> dict[int, dict[str, list[Weights]]]:
    """What is to be compared at each time; `others` are the scans with which Ca II was interpolated.

    Blank times are left out, as if there had been no scans.
    """
    lit = [time for time in range(len(pairs)) if time not in blank]
    times = {line: np.array([getattr(pairs[time], line).time for time in lit]) for line in LINES}
    known = np.array([places[time].known if places else True for time in lit])
    comparable = {"halpha": known, "ca8542": known & [shifts[time].applied for time in lit]}
    found: dict[int, dict[str, list[Weights]]] = {time: {} for time in lit}
    for number, (time, of_lines) in enumerate(found.items()):
        several: dict[str, list[Weights]] = {}
        if others and (second := others[time]) is not None:
            ends = sorted((pairs[time].ca8542.time, second.time))
            several["ca8542"] = changes.departure_weights(
                times["ca8542"],
                number,
                times["halpha"][number],
                (ends[0], ends[1]),
                comparable["ca8542"],
            )
        else:
            for line, other in (("halpha", "ca8542"), ("ca8542", "halpha")):
                weights = changes.lag_weights(times[line], number, times[other][number], comparable[line])
                several[line] = [] if weights is None else [weights]
        for line, these in several.items():
            if these:
                of_lines[line] = [{lit[one]: weight for one, weight in each.items()} for each in these]
    return found


def _say_not_interpolated(
    pairs: tuple[Pair, ...],
    others: Sequence[Other],
    records: Sequence[Mapping[str, Any]],
    blank: Container[int],
) -> None:
    """Log at which times Ca II keeps its own time although another was asked for, and why."""
    for time, (pair, other, record) in enumerate(zip(pairs, others, records, strict=True)):
        if time in blank:
            continue
        why = other.refused
        if other.scan is not None and not record["interpolated"]:
            certain = min(record["confidence"], record["other_confidence"])
            why = f"the displacement of a Ca II scan around it is not certain ({certain:.2f})"
        if why:
            logger.warning("%s: Ca II is not interpolated to its time: %s", pair.halpha.name, why)


def _contradictions(series: _Series) -> dict[str, tuple[str, ...]]:
    """Files whose headers contradict themselves, and in what."""
    said: dict[str, dict[str, None]] = {}
    for several in series.scans:
        for scan in several:
            said.setdefault(scan.path, {}).update(dict.fromkeys(header_contradictions(scan)))
    return {path: tuple(sentences) for path, sentences in said.items() if sentences}


def _begun(output: Place, fingerprint: dict[str, Any], pairs: tuple[Pair, ...]) -> tuple[Place, Journal]:
    """Find the unfinished store of an interrupted run of the same files, or lay out a new one."""
    # A worker that outlives a killed run of other files writes to that run's own store.
    run = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:32]
    store = replacement(output, run)
    if is_observation(store.location) and log_at(store.journal).exists():
        try:
            return store, Journal.open(store.journal)
        except StoreError as failure:
            logger.warning("%s: %s, starting over", failure.where, failure.problem)
    for stale in replacements(output):
        discard(stale)
    journal = Journal.create(store.journal, run, fingerprint)
    try:
        halpha, ca8542 = ([getattr(pair, line) for pair in pairs] for line in LINES)
        lay_out(store.location, halpha, ca8542, {}, aligned=fingerprint["largest_jump"] is not None)
    except BaseException:
        journal.close()
        raise
    return store, journal


def _taken_up(store: Place, images: Place | None, journal: Journal) -> dict[int, dict[str, Any]]:
    """Records of the times that earlier runs have finished, and that are still there."""
    records = {record["time"]: record for record in journal.records() if "time" in record}
    done = {
        time: record
        for time, record in records.items()
        if _stored(store, _folders(time)) == record["stored"]
        and _images_stored(None if images is None else str(images), time) == record["images"]
    }
    if len(done) < len(records):
        logger.warning(
            "%d finished times are missing or damaged, and are done again", len(records) - len(done)
        )
    return done


def _fingerprint(series: _Series, wishes: _Wishes) -> dict[str, Any]:
    """Everything that decides the store's content, as far as it is known without reading the files."""
    files = []
    for several in series.scans:
        for scan in several:
            files.append([scan.path, scan.index, scan.medium, *stamp(scan.path)])
            files.extend([sidecar, *stamp(sidecar)] for sidecar in scan.sidecars)
    return {
        "files": files,
        "tolerance": wishes.tolerance,
        "common_time": series.others is not None,
        "largest_jump": wishes.largest_jump,
        "kernel": KERNEL,
        "flarefield": flarefield_version(),
        "libraries": {name: version(name) for name in ("numpy", "scipy", "scikit-image", "zarr")},
    }


def _finish(
    store: Place,
    shifts: tuple[Shift, ...],
    records: list[dict[str, Any]],
    of_times: dict[str, list[Any]],
    attrs: dict[str, Any],
    series: _Series,
    call: str,
) -> None:
    hashes = {path: digest for record in records for path, digest in record["sha256"].items()}
    finish(
        store.location,
        {
            "shift_y": [shift.y for shift in shifts],
            "shift_x": [shift.x for shift in shifts],
            "shift_confidence": [shift.confidence for shift in shifts],
            "shift_applied": [shift.applied for shift in shifts],
            **of_times,
        },
        {
            **provenance(call, hashes),
            **attrs,
            "reference_frame": "H-alpha, not resampled; Ca II 8542 moved onto it where shift_applied"
            if "series_alignment" not in attrs
            else "H-alpha of the first time that is aligned; both lines moved onto it where series_aligned, "
            "Ca II 8542 onto H-alpha where shift_applied",
            "unpaired": [
                {"file": scan.path, "line": scan.line, "time": str(scan.time)} for scan in series.unpaired
            ],
            "passed_over": list(series.passed_over),
            "registration": {
                "bands": list(BANDS),
                "least_confidence": CONFIDENT,
                "method": "masked normalised cross-correlation, then upsampled cross-correlation",
                "resampling": "cubic spline",
            },
        },
    )


def _failed(failures: list[tuple[Pair, BaseException]], count: int) -> FlareFieldError:
    if len(failures) == 1 and isinstance(failures[0][1], FlareFieldError):
        return failures[0][1]
    listed = [
        f"{error.where or pair.halpha.path}: {error.problem}"
        if isinstance(error, FlareFieldError)
        else f"{pair.halpha.path}: {type(error).__name__}: {error}"
        for pair, error in failures[:LISTED]
    ]
    if len(failures) > LISTED:
        listed.append(f"and {len(failures) - LISTED} more")
    refusal = InputError(
        f"{len(failures)} of {count} scan pairs failed",
        found="\n    ".join(["", *listed]),
        remedy="mend these files or leave them out, and run the command again",
    )
    refusal.__cause__ = failures[0][1]
    return refusal


def _run(
    cluster: Cluster, function: Callable[[Task], Result], tasks: Iterable[Task]
) -> Iterator[Outcome[Task, Result]]:
    """Run tasks on the cluster, or here if there is none."""
    if cluster is not None:
        with opened(cluster) as client:
            yield from run_bounded(client, function, tasks)
        return
    for task in tasks:
        try:
            result = function(task)
        except Exception as error:
            yield Outcome(task, None, error, 1)
        else:
            yield Outcome(task, result, None, 1)


def _files_of_times(series: _Series) -> list[tuple[str, ...]]:
    """Files (and sidecars) of each time that no earlier one came from: a file may hold many scans."""
    seen: set[str] = set()
    files = []
    for several in series.scans:
        new = dict.fromkeys(path for scan in several for path in (scan.path, *scan.sidecars))
        files.append(tuple(path for path in new if path not in seen))
        seen |= set(new)
    return files


def _check_same(output: Place, series: _Series, wishes: _Wishes, cluster: Cluster) -> None:
    """Accept an existing observation only if it was made from the same files in the same way."""
    attrs: dict[str, Any] = dict(zarr.open_group(output.zarr, mode="r").attrs.asdict())
    recorded = list(attrs.get("made_from", {}).values())
    paths = [path for files in _files_of_times(series) for path in files]
    differs = None
    if attrs.get("pairing_tolerance_seconds") != wishes.tolerance:
        differs = (
            f"made with a tolerance of {attrs.get('pairing_tolerance_seconds')} s, now {wishes.tolerance} s"
        )
    elif (made := _references(attrs)) != (wishes.calibrate, wishes.wavelength_zero):
        differs = (
            f"made with --calibrate {made[0]} and --wavelength-zero {made[1]}, now {wishes.calibrate} and "
            f"{wishes.wavelength_zero}"
        )
    elif attrs.get("least_contrast", 0.0) != wishes.min_contrast:
        differs = f"made with --min-contrast {attrs.get('least_contrast', 0.0)}, now {wishes.min_contrast}"
    elif (jump := attrs.get("series_alignment", {}).get("largest_jump_pixels")) != wishes.largest_jump:
        differs = f"made {_alignment_said(jump)}, now {_alignment_said(wishes.largest_jump)}"
    elif attrs.get("common_time", False) != (series.others is not None):
        differs = f"made {'with' if series.others is None else 'without'} --common-time, now otherwise"
    elif (media := _media(output)) != {getattr(series.pairs[0], line).medium for line in LINES}:
        differs = f"made with wavelengths in {' and '.join(sorted(media))}"
    elif len(recorded) != len(paths):
        differs = f"made from {len(recorded)} files, now {len(paths)}"
    else:
        given = []
        for outcome in _run(cluster, sha256_source, paths):
            if outcome.result is None:
                raise InputError(
                    "the file cannot be read", where=outcome.task, found=outcome.error
                ) from outcome.error
            given.append(outcome.result)
        # Files of the same content, such as lists of times, count each.
        unknown = (Counter(given) - Counter(recorded)).total()
        if unknown:
            differs = f"{unknown} of the {len(given)} files are not those that it was made from"
    if differs:
        raise MisuseError(
            "the output exists and was made from other files, or otherwise",
            where=output,
            found=differs,
            remedy="choose another name, or --overwrite to replace it",
        )


def _alignment_said(largest_jump: float | None) -> str:
    if largest_jump is None:
        return "without --align-series"
    return f"with --align-series and jumps of {largest_jump:g} pixels at most"


def _media(output: Place) -> set[str]:
    """What an observation's files have their wavelengths in."""
    names = [f"wavelength_{line}" for line in LINES]
    arrays = (zarr.open_array(output.zarr, path=name, mode="r") for name in names)
    return {str(array.attrs.get("medium_of_files", "vacuum")) for array in arrays}


def _references(attrs: dict[str, Any]) -> tuple[Reference, Reference]:
    """What an observation's intensities and wavelengths are referred to."""
    return (
        "quiet-sun" if attrs.get("relative_calibration") == "quiet_sun" else "none",
        "quiet-sun" if attrs.get("wavelength_zero") == "quiet_sun" else "none",
    )
