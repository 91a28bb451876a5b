"""Whether a map is what its journal says: every tile there, readable, and bit for bit as it was computed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from pipeline.errors import StoreError
from pipeline.journal import Journal, is_receipt, read_journal
from pipeline.progress import Progress
from pipeline.results import Flag, is_map, open_map, see_that_it_is_as_begun, unwritten
from pipeline.selection import EVERYTHING
from pipeline.storage import Place, log_at, place
from pipeline.tiles import Tile, TileGrid, checksum, missing_files, read_tile, written_files

logger = logging.getLogger("flarefield")

Fault = Literal["missing", "damaged", "not recorded", "failed"]

AT_ONCE = 1024
"""Tiles handed out to the threads at a time: a map of any size needs no more memory than these."""
NAMED = 20
"""Tiles of each fault that the summary names."""


@dataclass(frozen=True)
class FaultyTile:
    """A tile that is not as it should be.

    Attributes
    ----------
    index : int
        Its place in the order of tiles, by which the journal knows it.
    tile : Tile
        Which.
    fault : {"missing", "damaged", "not recorded", "failed"}
        ``missing``: the journal has it as done, but not all of its files are there. ``damaged``: its files
        cannot be read, or hold other values than were computed. ``not recorded``: the journal says nothing of
        it, so that it is still to be done. ``failed``: it was given up, and its pixels say so.
    detail : str
        What was found.
    """

    index: int
    tile: Tile
    fault: Fault
    detail: str


@dataclass(frozen=True)
class CheckReport:
    """What `check_map` found.

    Attributes
    ----------
    output : Path or str
        The map store, or its URL.
    tiles : int
        Tiles of the map.
    finished : bool
        Whether the journal says that the run has been through all tiles.
    faults : tuple of FaultyTile
        Every tile that is not as it should be, in order.
    seconds : float
        Time it took.
    unwritten : str or None
        What the pixels of tiles without files read as, if not as what they are.
    """

    output: Path | str
    tiles: int
    finished: bool
    faults: tuple[FaultyTile, ...]
    seconds: float
    unwritten: str | None = None

    @property
    def sound(self) -> bool:
        """Whether the map is finished and every tile is there, bit for bit as it was computed."""
        return self.finished and not self.faults and self.unwritten is None

    def of(self, fault: Fault) -> tuple[Tile, ...]:
        """Tiles with one kind of fault."""
        return tuple(faulty.tile for faulty in self.faults if faulty.fault == fault)

    def summary(self) -> str:
        """The report as a person reads it."""
        good = self.tiles - len(self.faults)
        lines = [f"{self.output}: {good} of {self.tiles} tiles are as they were computed"]
        kinds: tuple[Fault, ...] = ("missing", "damaged", "not recorded", "failed")
        for kind in kinds:
            here = [faulty for faulty in self.faults if faulty.fault == kind]
            if here:
                lines.append(f"  {kind}: {len(here)}")
            lines += [f"    tile at {faulty.tile}: {faulty.detail}" for faulty in here[:NAMED]]
            if len(here) > NAMED:
                lines.append(f"    and {len(here) - NAMED} more")
        if not self.finished:
            lines.append("  the run that makes it has not come to its end")
        if self.unwritten is not None:
            lines.append(f"  pixels of tiles without files: {self.unwritten}")
        if not self.sound:
            lines.append("  the command that made the map mends that, and does no other tiles again")
        return "\n".join(lines)


def check_map(path: str | Path) -> CheckReport:
    """Compare every tile of a map with its receipt in the journal.

    A receipt holds the SHA-256 of the tile's values (`pipeline.tiles.TileResult`), so all of the map is read.
    The map is left as it is. Tiles that are missing or damaged are noted in the journal, if it can be written
    to, so that `pipeline.invert.invert` does them again.

    Parameters
    ----------
    path : str or Path
        The map store, or its URL. Its journal must lie beside it.

    Returns
    -------
    CheckReport

    Raises
    ------
    StoreError
        There is no map, its metadata or coordinates cannot be read, or the journal is missing or another
        run's.
    MisuseError
        A command is working on the map.
    """
    store = place(path)
    if not is_map(path):
        open_map(path)  # says what it is
    with ExitStack() as stack:
        try:
            stack.enter_context(store.lock())
        except StoreError as error:
            logger.warning("what is found cannot be noted in the journal: %s", error.problem)
            return _checked(store)
        report = _checked(store)
        spoiled = [faulty for faulty in report.faults if faulty.fault in ("missing", "damaged")]
        if spoiled:
            with Journal.open(store.journal) as journal:
                for faulty in spoiled:
                    journal.append({"tile": faulty.index, "spoiled": faulty.detail})
        return report


def _checked(store: Place) -> CheckReport:
    started = time.monotonic()
    journal = store.journal
    if not log_at(journal).exists():
        raise StoreError(
            "the map's journal is missing, so there is nothing to check it against",
            where=journal,
            remedy="put the journal back beside the map",
        )
    header, records = read_journal(journal)
    group = zarr.open_group(store.zarr, mode="r")
    if header["run"] != group.attrs.get("run"):
        raise StoreError(
            "map and journal are of different runs",
            where=journal,
            remedy="put the right journal back beside the map",
        )
    begun_with, fingerprint = header.get("begun_with"), header["fingerprint"]
    see_that_it_is_as_begun(store, begun_with, read_journal(journal)[1], fingerprint)
    dataset = open_map(store.location)
    rows, columns = fingerprint["tile"]
    grid = TileGrid((dataset.sizes["time"], dataset.sizes["y"], dataset.sizes["x"]), (rows, columns))
    receipts = np.zeros((len(grid), 32), dtype=np.uint8)
    known = np.zeros(len(grid), dtype=np.uint8)
    finished, tiles = False, len(grid)
    for record in records:
        if "spoiled" in record:
            continue  # an earlier check's note: the receipt before it says what the tile should hold
        finished, tiles = bool(record.get("finished")), record.get("tiles", len(grid))
        if (index := record.get("tile", len(grid))) < len(grid):
            known[index] = _DONE if is_receipt(record) else _FAILED if "error" in record else 0
            receipt = record.get("sha256", record.get("quarantine", ""))
            receipts[index] = np.frombuffer(bytes.fromhex(receipt.zfill(64)), dtype=np.uint8)
    if finished:  # every tile that the run was asked for had a record: of lost ones, the files are there
        lost = tiles - np.count_nonzero(known)
        unrecorded = [int(index) for index in np.flatnonzero(known == 0)]
        left_out = [one for one in unrecorded if not lost or not written_files(group.store, grid[one])]
        if len(left_out) == len(unrecorded) - lost:
            known[left_out] = _NOT_SELECTED

    def judge(index: int) -> FaultyTile | None:
        tile = grid[index]
        verdict = _verdict(group, tile, int(known[index]), bytes(receipts[index]).hex())
        return None if verdict is None else FaultyTile(index, tile, *verdict)

    faults: list[FaultyTile] = []
    remaining = iter(range(len(grid)))
    with (
        Progress("checking", len(grid), "tiles") as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        while batch := list(islice(remaining, AT_ONCE)):
            for faulty in pool.map(judge, batch):
                if faulty is not None:
                    faults.append(faulty)
                progress.advance(1)
    return CheckReport(
        store.location,
        len(grid),
        finished,
        tuple(faults),
        time.monotonic() - started,
        _misread(store, fingerprint, finished=finished),
    )


def _misread(store: Place, fingerprint: Mapping[str, Any], *, finished: bool) -> str | None:
    """What pixels without files read as that should read as something else."""
    whole = all(fingerprint.get(name) is None for name in EVERYTHING.settings())
    if not (whole or finished):
        return None  # a command may have been killed on its way from one to the other
    expected = Flag.NOT_DONE if whole else Flag.NOT_SELECTED
    found = unwritten(store)
    if found == {expected}:
        return None
    return f"they read as {' or '.join(str(one) for one in sorted(found))}, not as {_named(expected)}"


def _named(flag: Flag) -> str:
    return f"{int(flag)} ({str(flag.name).lower()})"


_DONE, _FAILED, _NOT_SELECTED = 1, 2, 3
_NO_RECEIPT = "0" * 64  # of failed tiles in the journals of the first maps


def _verdict(group: zarr.Group, tile: Tile, known: int, expected: str) -> tuple[Fault, str] | None:
    if not known:
        return "not recorded", "the journal has no record of it that is whole"
    if known == _NOT_SELECTED:
        there = written_files(group.store, tile)
        return ("not recorded", f"it was not selected, but there is {', '.join(there)}") if there else None
    if gone := missing_files(group.store, tile):
        return "missing", f"no {', '.join(gone)}"
    try:
        found = checksum(read_tile(group, tile))
    except Exception as error:  # which one a damaged file raises is up to its codec
        return "damaged", f"it cannot be read: {type(error).__name__}: {error}"
    if found != expected and expected != _NO_RECEIPT:
        return "damaged", f"its values are others: sha256 {found}, not {expected}"
    if known == _FAILED:
        return "failed", "it was given up; the journal says why"
    return None
