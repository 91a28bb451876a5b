"""The record of a map's finished tiles, beside the map: what makes a run resumable.

A journal is a file of JSON lines. The first states the run: its identity and its fingerprint, which is
everything that decides the map's numbers. Every further line is one record, of a finished tile or of one that
was given up, and the last record of a tile counts. Only the client writes, only at the end, in batches that
are on disk before `Journal.append` forgets them. A process killed at any moment therefore leaves a good
journal, whose last line may be torn: its tile has no record and is simply done again, which is harmless, for
doing a tile is idempotent.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.errors import MisuseError, StoreError

logger = logging.getLogger("flarefield")

FORMAT = 1
BATCH = 64
"""Records held back at most before they are written."""
INTERVAL = 1.0
"""Seconds after which a record is written with the next one, however few there are."""

Fingerprint = Mapping[str, Any]


def journal_path(store: Path) -> Path:
    """Where the journal of a map store lies: beside it, ``map.zarr.journal``."""
    return store.with_name(store.name + ".journal")


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


class Journal:
    """A journal opened by the one client that works on its map.

    Use `create` or `open`, then as a context manager: leaving it writes what is held back. It holds no
    records in memory but those of the next batch, however many tiles there are.

    Attributes
    ----------
    path : Path
        The journal's file.
    run : str
        Identity of the run, which the map store carries too.
    fingerprint : dict
        Everything that decides the map's numbers, by name.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], size: int) -> None:
        self.path = path
        self.run: str = header["run"]
        self.fingerprint: dict[str, Any] = header["fingerprint"]
        self._held: list[dict[str, Any]] = []
        self._written = time.monotonic()
        self._file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._size = size
        # A torn last line would run into the next record.
        os.ftruncate(self._file, size)

    @classmethod
    def create(cls, path: Path, run: str, fingerprint: Fingerprint) -> Self:
        """Begin a journal, in place of any other at this path; it appears whole or not at all.

        Parameters
        ----------
        path : Path
            Its file.
        run : str
            Identity of the run.
        fingerprint : mapping
            Everything that decides the map's numbers; values that JSON can hold.

        Raises
        ------
        StoreError
            There is no space for it.
        """
        header = {"journal": FORMAT, "run": run, "fingerprint": dict(fingerprint)}
        line = _line(header)
        beginning = path.with_name(path.name + ".new")
        with _space(path):
            with open(beginning, "wb") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beginning, path)
            sync_directory(path.parent)
        return cls(path, json.loads(line), len(line))

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing journal.

        Parameters
        ----------
        path : Path
            Its file.

        Raises
        ------
        StoreError
            The file is not a journal of this version.
        """
        header, _ = read_journal(path)
        size = 0
        with open(path, "rb") as file:
            for line in file:
                size += len(line) if line.endswith(b"\n") else 0
        return cls(path, header, size)

    def records(self) -> Iterator[dict[str, Any]]:
        """Read the records on disk, oldest first; of several about one tile the last counts."""
        return _records(self.path)

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
        if len(self._held) >= BATCH or time.monotonic() - self._written >= INTERVAL:
            self.flush()

    def flush(self) -> None:
        """Bring every record to disk.

        Raises
        ------
        StoreError
            There is no space for them.
        """
        if not self._held:
            return
        block = b"".join(_line(record) for record in self._held)
        with _space(self.path):
            try:
                written = 0
                while written < len(block):
                    written += os.pwrite(self._file, block[written:], self._size + written)
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, self._size)
                raise
        self._size += len(block)
        self._held.clear()
        self._written = time.monotonic()

    def close(self) -> None:
        """Write what is held back and close the file."""
        try:
            self.flush()
        finally:
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: Path) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """Read a journal without working on it: nothing is written, and another process may.

    Parameters
    ----------
    path : Path
        Its file.

    Returns
    -------
    header : dict
        ``run`` and ``fingerprint``.
    records : iterator of dict
        Oldest first; of several about one tile the last counts.

    Raises
    ------
    StoreError
        The file is not a journal of this version.
    """
    with open(path, "rb") as file:
        header = _parse(file.readline())
    if header is None or header.get("journal") != FORMAT:
        raise StoreError(
            "not a journal that this version of FlareField can read",
            where=path,
            found="an unreadable first line" if header is None else f"format {header.get('journal')}",
            expected=f"format {FORMAT}",
            remedy="start over with --overwrite",
        )
    return header, _records(path)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        file.readline()
        for line in file:
            # A line damaged by a crash of the machine counts as no record: its tile is done again.
            if (record := _parse(line)) is not None:
                yield record


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def sync_directory(path: Path) -> None:
    """Bring a directory's entries to disk: a file made or renamed in it is safe only then."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def out_of_space(error: OSError, where: object) -> StoreError | None:
    """Say what to do about a disk or a quota that is full; None for any other error."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return StoreError(
        "no space left to write to",
        where=where,
        found=os.strerror(error.errno),
        remedy="free some space and run the same command again: it resumes, finished tiles are kept",
    )


@contextmanager
def _space(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if (refusal := out_of_space(error, where)) is not None:
            raise refusal from error
        raise


@contextmanager
def lock(store: Path) -> Iterator[None]:
    """Hold a map store for one client; a second one is refused.

    The lock is the operating system's, on ``<store>.lock``: it ends with the process that holds it, however
    that ends, and a file left behind means nothing.

    Parameters
    ----------
    store : Path
        The map store, which need not exist yet.

    Raises
    ------
    MisuseError
        Another process works on this map.
    StoreError
        The directory cannot be written to.
    """
    path = store.with_name(store.name + ".lock")
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StoreError(
                "nothing can be written there",
                where=path.parent,
                found=error.strerror,
                remedy="choose an output in a directory that you may write to",
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace")
            os.close(descriptor)
            raise MisuseError(
                "another command is working on this map",
                where=store,
                found=holder or None,
                remedy="wait for it to end, or end it; the same command then goes on from there",
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            # Some clusters' file systems are mounted so. A warning must do: refusing would help nobody.
            logger.warning("%s is on a file system without locks: see that one command works on it", store)
        # The holder before us removes the file when it is done: what we locked may be that one.
        try:
            current = os.stat(path).st_ino
        except FileNotFoundError:
            current = None
        if current == os.fstat(descriptor).st_ino:
            break
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        # A courtesy to whom we refuse; a full disk must not keep us from resuming.
        try:
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except OSError as error:
            if out_of_space(error, path) is None:
                raise
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
