"""The record of a map's finished tiles, beside the map: what makes a run resumable.

A journal is a log (`pipeline.storage.Log`: a file, or numbered objects) of JSON lines. The first states the
run: its identity, its fingerprint, which is everything that decides the map's numbers, and the hashes of what
the map was begun with, its coordinates and metadata. Every further line
is one record, of a finished tile or of one that was given up, and the last record of a tile counts. Only the
client writes, only at the end, in batches that are safe before `Journal.append` forgets them. Every line
ends with the CRC-32 of what stands before it, so that one that was changed is none. A process
killed at any moment therefore leaves a good journal, whose last line may be torn: its tile has no record and
is simply done again, which is harmless, for doing a tile is idempotent.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from zlib import crc32

from pipeline.errors import StoreError
from pipeline.storage import Log, log_at

FORMAT = 2
UNSEALED = 1
"""The format before, whose lines have no checksums; what is added to such a journal has."""
SEAL = b',"crc32":"'
"""What stands before a line's checksum: inside of JSON's strings it cannot."""
BATCH = 64
"""Records held back at most before they are written."""
INTERVAL = 1.0
"""Seconds after which a record is written with the next one, however few there are; a log may want more."""

Fingerprint = Mapping[str, Any]


def changes(recorded: Fingerprint, wanted: Fingerprint) -> dict[str, tuple[Any, Any]]:
    """Settings in which two fingerprints differ.

    Parameters
    ----------
    recorded, wanted : mapping
        Name of each setting and its value, as JSON holds it.

    Returns
    -------
    dict
        Name of each differing setting and the pair (recorded, wanted); None stands for a setting that one
        side does not have.
    """
    names = [*recorded, *(name for name in wanted if name not in recorded)]
    pairs = {name: (recorded.get(name), wanted.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def as_listed(settings: Fingerprint) -> str:
    """Settings in one line, hashes shortened."""
    return "; ".join(f"{name}: {short(value)}" for name, value in settings.items())


def short(value: object) -> str:
    """A setting's value as a person reads it."""
    text = "none" if value is None else str(value)
    return f"{text[:12]}..." if len(text) == 64 else text


HASH = re.compile("[0-9a-f]{1,64}")


class Journal:
    """A journal opened by the one client that works on its map.

    Use `create` or `open`, then as a context manager: leaving it writes what is held back. It holds no
    records in memory but those of the next batch, however many tiles there are.

    Attributes
    ----------
    path : Path or str
        Where it lies.
    run : str
        Identity of the run, which the map store carries too.
    fingerprint : dict
        Everything that decides the map's numbers, by name.
    begun_with : dict or None
        SHA-256 of what the map was begun with, by name; None where the journal does not say.
    """

    def __init__(self, log: Log, header: Mapping[str, Any]) -> None:
        self.path = log.location
        self.run: str = header["run"]
        self.fingerprint: dict[str, Any] = header["fingerprint"]
        self.begun_with: dict[str, str] | None = header.get("begun_with")
        self._sealed = _is_sealed(header)
        self._held: list[dict[str, Any]] = []
        self._written = time.monotonic()
        self._log = log

    @classmethod
    def create(
        cls,
        path: str | Path,
        run: str,
        fingerprint: Fingerprint,
        begun_with: Mapping[str, str] | None = None,
    ) -> Self:
        """Begin a journal, in place of any other at this path; it appears whole or not at all.

        Parameters
        ----------
        path : str or Path
            Its file, or its URL.
        run : str
            Identity of the run.
        fingerprint : mapping
            Everything that decides the map's numbers; values that JSON can hold.
        begun_with : mapping of str to str, optional
            SHA-256 of what the map is begun with, by name.

        Raises
        ------
        StoreError
            There is no space for it.
        """
        header: dict[str, Any] = {"journal": FORMAT, "run": run, "fingerprint": dict(fingerprint)}
        if begun_with is not None:
            header["begun_with"] = dict(begun_with)
        line = _line(header)
        log = log_at(path)
        log.begin(line)
        return cls(log, json.loads(line))

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Find an existing journal. Nothing is written to it, or mended, before it is entered as a context.

        Parameters
        ----------
        path : str or Path
            Its file, or its URL.

        Raises
        ------
        StoreError
            It is not a journal of this version.
        """
        header, _ = read_journal(path)
        return cls(log_at(path), header)

    def records(self) -> Iterator[dict[str, Any]]:
        """Read the records on disk, oldest first; of several about one tile the last counts."""
        return _records(self._log, sealed=self._sealed)

    @property
    def finished(self) -> bool:
        """Whether the run has been through all tiles, by the last record on disk."""
        last: dict[str, Any] = {}
        for last in self.records():  # noqa: B007
            pass
        return bool(last.get("finished"))

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it is on disk after the next batch, at the latest when the journal is closed.

        Parameters
        ----------
        record : dict
            Values that JSON can hold. ``{"finished": True}`` says that all tiles have been done or given up.

        Raises
        ------
        StoreError
            There is no space for it. The journal stays good, and keeps the record for another attempt.
        """
        self._held.append(record)
        pause = max(INTERVAL, self._log.interval)
        if len(self._held) >= BATCH or time.monotonic() - self._written >= pause:
            self.flush()

    def flush(self) -> None:
        """Bring every record to disk.

        Raises
        ------
        StoreError
            There is no space for them, or another command has written to the journal.
        """
        if not self._held:
            return
        self._log.append(b"".join(_line(record) for record in self._held))
        self._held.clear()
        self._written = time.monotonic()

    def close(self) -> None:
        """Write what is held back and close the log."""
        try:
            self.flush()
        finally:
            self._log.close()

    def __enter__(self) -> Self:
        self._log.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: str | Path) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """Read a journal without working on it: nothing is written, and another process may.

    Parameters
    ----------
    path : str or Path
        Its file, or its URL.

    Returns
    -------
    header : dict
        ``run`` and ``fingerprint``, and of a map ``begun_with``.
    records : iterator of dict
        Oldest first; of several about one tile the last counts.

    Raises
    ------
    StoreError
        It is not a journal of this version.
    """
    log = log_at(path)
    line = next(log.lines(), b"")
    if not line:
        raise StoreError(
            "not a journal",
            where=path,
            found="nothing, or an empty file",
            expected="a first line with the settings",
            remedy="put the journal back as it was, or start over with --overwrite",
        )
    header = _parse(line, sealed=False)
    if header is not None and header.get("journal") not in (FORMAT, UNSEALED):
        raise StoreError(
            "not a journal that this version of FlareField can read",
            where=path,
            found=f"format {header.get('journal')}",
            expected=f"format {FORMAT}",
            remedy="start over with --overwrite",
        )
    if header is None or (_is_sealed(header) and SEAL not in line) or not _can_begin(header):
        raise StoreError(
            "the journal's first line, which holds the settings, is damaged",
            where=path,
            found="a line that is not what was written",
            remedy="put the journal back as it was, or start over with --overwrite",
        )
    return header, _records(log, sealed=_is_sealed(header))


def is_receipt(record: Mapping[str, Any]) -> bool:
    """Whether a record is that of a finished tile, with all that is to be known of it.

    Parameters
    ----------
    record : mapping
        One of a map's journal.
    """
    kinds = {"tile": int, "sha256": str, "stored": int, "answered": int, "flags": dict}
    return all(isinstance(record.get(name), kind) for name, kind in kinds.items())


def _records(log: Log, *, sealed: bool) -> Iterator[dict[str, Any]]:
    for line in islice(log.lines(), 1, None):
        # A line damaged by a crash of the machine counts as no record: its tile is done again.
        if (record := _parse(line, sealed=sealed)) is not None and _can_be(record):
            yield record


def _can_be(record: Mapping[str, Any]) -> bool:
    """Whether a record of a tile, if it is one, names one and has hashes that can be."""
    if "tile" not in record:
        return True
    hashes = (record[name] for name in ("sha256", "quarantine") if name in record)
    return (
        isinstance(record["tile"], int)
        and record["tile"] >= 0
        and all(isinstance(one, str) and HASH.fullmatch(one) for one in hashes)
    )


def _can_begin(header: Mapping[str, Any]) -> bool:
    kinds = {"run": str, "fingerprint": dict}
    return all(isinstance(header.get(name), kind) for name, kind in kinds.items())


def _is_sealed(header: Mapping[str, Any]) -> bool:
    return bool(header["journal"] != UNSEALED)


def _line(record: Mapping[str, Any]) -> bytes:
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode().removesuffix(b"}")
    return body + SEAL + _seal(body)


def _seal(body: bytes) -> bytes:
    return b'%08x"}\n' % crc32(body)


def _parse(line: bytes, *, sealed: bool) -> dict[str, Any] | None:
    """What a line says, without its checksum; None if it is not as it was written."""
    body, mark, seal = line.rpartition(SEAL)
    if (mark or sealed) and seal != _seal(body):
        return None
    line = body + b"}" if mark else line
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
