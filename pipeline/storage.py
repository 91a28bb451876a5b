"""Where stores lie, and all that differs between a directory and an object store.

A store is named by a path, or by a URL of any file system that fsspec knows (``s3://bucket/map.zarr``). What
the map engine asks of it beside Zarr's own reading and writing is a `Place`: to appear whole, to be locked,
to be replaced, and to have a `Log` beside it that survives being killed.

A directory can rename and append, which makes all of this easy. An object store can do neither; its objects
appear whole or not at all, and most have writes that fail where there is an object already. There, a store
appears with its root object, which is written last; a log is a row of numbered objects, each written once;
and a lock is an object that its holder keeps renewing.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import fsspec
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore, MemoryStore, WrapperStore

from pipeline.errors import FlareFieldError, MisuseError, StoreError

logger = logging.getLogger("flarefield")

ROOT = "zarr.json"
"""The object of a Zarr store without which there is no store."""
AT_ONCE = 64
"""Objects that are asked for at a time."""
RUN = re.compile("[0-9a-f]{32}")


def place(location: str | Path | Place) -> Place:
    """Make a place of a path or a URL.

    Parameters
    ----------
    location : str, Path or Place
        A path, absolute or relative to the current directory, or a URL (``s3://bucket/name``).

    Raises
    ------
    MisuseError
        There is no software for the URL's kind.
    """
    if isinstance(location, Place):
        return location
    text = str(location)
    if is_url(text):
        return ObjectStore(text)
    return Directory(Path(text.removeprefix("file://").removeprefix("local://")))


def is_url(location: str | Path) -> bool:
    """Whether a location is that of an object store, or of anything else but a directory."""
    return "://" in str(location) and not str(location).startswith(("file://", "local://"))


def is_in_memory(location: str | Path | Place) -> bool:
    """Whether a location is in the memory of a process, where no other process finds it."""
    return str(location).startswith("memory://")


def lock(store: str | Path) -> AbstractContextManager[None]:
    """Hold a store for one client: see `Place.lock`."""
    return place(store).lock()


def log_at(location: str | Path) -> Log:
    """Make a log of a path or a URL."""
    return ObjectLog(str(location)) if is_url(location) else FileLog(Path(location))


def lies_in(inner: Place, outer: Place) -> bool:
    """Whether a place is inside another one, wherever links lead.

    Parameters
    ----------
    inner, outer : Place
        What need not be there yet.
    """
    if isinstance(inner, Directory) and isinstance(outer, Directory):
        return outer.location.resolve() in inner.location.resolve().parents
    return str(inner).startswith(f"{outer}/")


class Place(ABC):
    """Where a store lies, or may lie: `str` of it names it to other processes.

    Attributes
    ----------
    location : Path or str
        The directory, or the URL.
    """

    location: Path | str

    def __str__(self) -> str:
        return str(self.location)

    @property
    def name(self) -> str:
        """Its last part."""
        return str(self).rpartition("/")[2]

    @abstractmethod
    def beside(self, ending: str) -> Place:
        """Make the place whose name is this one's with something added."""

    @property
    @abstractmethod
    def journal(self) -> Path | str:
        """Where a store's journal lies: beside it, ``map.zarr.journal``."""

    @property
    @abstractmethod
    def zarr(self) -> Store:
        """The place as Zarr and xarray take it."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is anything at all."""

    @abstractmethod
    def half_appeared(self) -> bool:
        """Whether a writer was killed while what it had laid out appeared here, or the root has been lost."""

    @abstractmethod
    def can_hold(self) -> bool:
        """Whether something can be made here, as far as can be told without trying."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names of what is directly in it, sorted."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of each of its files below a folder, by their keys, all the way down."""

    @abstractmethod
    def listing(self) -> Callable[[str], int | None]:
        """Make a function that tells the bytes of a file by its key; None if it is not there.

        Meant for one sweep over many files, folder by folder: what it has listed it may not look at again.
        """

    @abstractmethod
    def read(self, keys: Collection[str]) -> Iterator[bytes]:
        """Read some small files, in order."""

    @abstractmethod
    def fetched(self) -> AbstractContextManager[Path]:
        """Context in which it is a directory of this machine, whose path it yields."""

    @abstractmethod
    def appearing(self) -> AbstractContextManager[Store]:
        """Context that yields an empty Zarr store; what is put into it appears here whole, or not at all."""

    @abstractmethod
    def bring_to_disk(self, prefix: str) -> None:
        """See that its files below a folder survive a crash of the machine."""

    @abstractmethod
    def remove(self) -> None:
        """Remove what is there, if anything."""

    @abstractmethod
    def remove_leftovers(self) -> None:
        """Remove what writers that were killed left behind under temporary names."""

    @abstractmethod
    def runs(self, ending: str) -> list[str]:
        """List the runs for which there is something beside it named ``<name>.<run><ending>``."""

    @abstractmethod
    def replace_with(self, store: Place, aside: Place) -> None:
        """Put another store and its journal in this one's place.

        It can be interrupted at any moment and done again.

        Parameters
        ----------
        store : Place
            The replacement, whole.
        aside : Place
            Where this one may be put meanwhile.
        """

    @abstractmethod
    def lock(self) -> AbstractContextManager[None]:
        """Context that holds the store for one client; a second one is refused.

        Raises
        ------
        MisuseError
            Another process works on this store.
        StoreError
            Nothing can be written there.
        """

    @abstractmethod
    def see_that_it_is_free(self) -> None:
        """Refuse what `lock` would refuse, as far as that can be told without writing.

        Raises
        ------
        MisuseError
            Another process works on this store.
        StoreError
            Nothing can be written there.
        """


class AsListed(WrapperStore[Store]):
    """A store of which no file may go: one that was listed and is not there is no chunk that holds nothing.

    Parameters
    ----------
    store : Store
        Where they are read from.
    listed : collection of str
        Names of the files that there are.
    """

    def __init__(self, store: Store, listed: Collection[str]) -> None:
        super().__init__(store)
        self._listed = frozenset(listed)

    def _with_store(self, store: Store) -> AsListed:
        return AsListed(store, self._listed)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        found = await super().get(key, prototype, byte_range)
        if found is None and key in self._listed:
            raise gone(self._store, f"no {key}")
        return found


def gone(observation: object, found: object) -> StoreError:
    """Say that a file of an observation that was there is there no more."""
    return StoreError(
        "the observation has changed while the map was being made",
        where=observation,
        found=found,
        expected="all files that were there when it was opened",
        remedy="put it back as it was and run the same command again: it does what is missing",
    )


class Log(ABC):
    """Lines that are only ever added, in blocks; a block is safe when `append` returns.

    Attributes
    ----------
    location : Path or str
        Its file, or the URL of its folder.
    interval : float
        Seconds that should lie between two blocks.
    """

    location: Path | str
    interval: float

    @abstractmethod
    def exists(self) -> bool:
        """Whether it has been begun."""

    @abstractmethod
    def begin(self, line: bytes) -> None:
        """Begin it with a line, in place of any other; it appears whole or not at all."""

    @abstractmethod
    def open(self) -> None:
        """Make ready to add to it, after its last whole line."""

    @abstractmethod
    def append(self, block: bytes) -> None:
        """Add whole lines. After an error it is as it was."""

    @abstractmethod
    def close(self) -> None:
        """End adding to it."""

    @abstractmethod
    def lines(self) -> Iterator[bytes]:
        """Read its lines, oldest first; the last one may be torn."""

    @abstractmethod
    def remove(self) -> None:
        """Remove it, if it is there."""


# A directory


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""How a file system says that it has no locks."""


class Directory(Place):
    """A place in a file system."""

    def __init__(self, path: Path) -> None:
        self.location: Path = path.absolute()

    def beside(self, ending: str) -> Directory:
        return Directory(self.location.with_name(self.location.name + ending))

    @property
    def journal(self) -> Path:
        return self.location.with_name(self.location.name + ".journal")

    @property
    def zarr(self) -> Store:
        return LocalStore(self.location)

    def exists(self) -> bool:
        return os.path.lexists(self.location)

    def half_appeared(self) -> bool:
        return False  # it appears at once; a directory without a root may be anybody's

    def can_hold(self) -> bool:
        return self.location.parent.is_dir()

    def names(self) -> list[str]:
        return sorted(os.listdir(self.location))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return {
            file.relative_to(self.location).as_posix(): file.stat().st_size
            for file in (self.location / prefix).rglob("*")
            if file.is_file()
        }

    def listing(self) -> Callable[[str], int | None]:
        root = str(self.location)

        def size(key: str) -> int | None:
            try:
                return os.stat(f"{root}/{key}").st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

        return size

    def read(self, keys: Collection[str]) -> Iterator[bytes]:
        return ((self.location / key).read_bytes() for key in keys)

    @contextmanager
    def fetched(self) -> Iterator[Path]:
        yield self.location

    @contextmanager
    def appearing(self) -> Iterator[Store]:
        beginning = self.beside(".layout")
        beginning.remove()
        yield beginning.zarr
        beginning.location.rename(self.location)

    def bring_to_disk(self, prefix: str) -> None:
        for key in self.sizes(prefix):
            descriptor = os.open(self.location / key, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def remove(self) -> None:
        shutil.rmtree(self.location, ignore_errors=True)

    def remove_leftovers(self) -> None:
        for leftover in self.location.rglob("*.partial"):
            leftover.unlink(missing_ok=True)

    def runs(self, ending: str) -> list[str]:
        name = self.location.name
        found = self.location.parent.glob(f"{glob.escape(name)}.{'[0-9a-f]' * 32}{ending}")
        return sorted(path.name[len(name) + 1 :].removesuffix(ending) for path in found)

    def replace_with(self, store: Place, aside: Place) -> None:
        # Each step can be the last one before a kill.
        assert isinstance(store, Directory)
        assert isinstance(aside, Directory)
        if store.exists():
            if self.exists():
                self.location.rename(aside.location)
            store.location.rename(self.location)
        os.replace(store.journal, self.journal)
        sync_directory(self.location.parent)
        aside.remove()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store by the operating system's lock on ``<store>.lock``.

        It ends with the process that holds it, however that ends, and a file left behind means nothing.
        """
        path = self._lock
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise _unwritable(path.parent, error) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                try:
                    raise self._held(descriptor) from error
                finally:
                    os.close(descriptor)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                # Some clusters' file systems are mounted so. A warning must do: refusing would help nobody.
                logger.warning("%s is on a file system without locks: see that one command works on it", self)
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
                os.pwrite(descriptor, _this_process().encode(), 0)
            except OSError as error:
                if out_of_space(error, path) is None:
                    raise
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def see_that_it_is_free(self) -> None:
        folder = self.location.parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise _unwritable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
        try:
            descriptor = os.open(self._lock, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unwritable(folder, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._held(descriptor) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        finally:
            os.close(descriptor)

    @property
    def _lock(self) -> Path:
        return self.location.with_name(self.location.name + ".lock")

    def _held(self, descriptor: int) -> MisuseError:
        return _held(self, os.pread(descriptor, 200, 0).decode(errors="replace") or None)


class FileLog(Log):
    """A file of lines, brought to disk after every block."""

    interval = 0.0

    def __init__(self, path: Path) -> None:
        self.location: Path = path
        self._file: int | None = None
        self._size = 0

    def exists(self) -> bool:
        return self.location.is_file()

    def begin(self, line: bytes) -> None:
        beginning = self.location.with_name(self.location.name + ".new")
        with space(self.location):
            with open(beginning, "wb") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beginning, self.location)
            sync_directory(self.location.parent)

    def open(self) -> None:
        self._size = sum(len(line) for line in self.lines() if line.endswith(b"\n"))
        self._file = os.open(self.location, os.O_WRONLY | os.O_CLOEXEC)
        # A torn last line would run into the next record.
        os.ftruncate(self._file, self._size)

    def append(self, block: bytes) -> None:
        assert self._file is not None
        with space(self.location):
            try:
                written = 0
                while written < len(block):
                    written += os.pwrite(self._file, block[written:], self._size + written)
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, self._size)
                raise
        self._size += len(block)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def lines(self) -> Iterator[bytes]:
        with open(self.location, "rb") as file:
            yield from file

    def remove(self) -> None:
        self.location.unlink(missing_ok=True)


# An object store


class _Objects:
    """The objects below a URL, by their keys."""

    def __init__(self, url: str) -> None:
        self.url = url if url.endswith("://") else url.rstrip("/")
        try:
            # What another process wrote a moment ago must be seen.
            self.files, root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise MisuseError(
                "URLs of this kind cannot be used",
                where=url,
                found=error,
                remedy="install what fsspec needs for it (flarefield[s3] for s3://), or use a local path",
            ) from error
        self.root = str(root).rstrip("/")

    def path(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    def names(self) -> list[str]:
        with _reached(self.url):
            try:
                found = self.files.ls(self.root, detail=False)
            except FileNotFoundError:
                return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        with _reached(self.url):
            try:
                found = self.files.find(self.path(prefix), detail=True)
            except FileNotFoundError:
                return {}
        if any(info["size"] is None for info in found.values()):
            raise MisuseError(
                "the server does not say how large its files are",
                where=self.url,
                found="a listing without sizes",
                expected="a directory, or an object store such as s3://",
                remedy="copy the store to one of these first",
            )
        start = len(self.root) + 1
        return {
            path[start:]: int(info["size"])
            for path, info in found.items()
            if path.startswith(f"{self.path(prefix)}/")
        }

    def read(self, keys: Collection[str]) -> Iterator[bytes]:
        waiting = list(keys)
        for first in range(0, len(waiting), AT_ONCE):
            paths = [self.path(key) for key in waiting[first : first + AT_ONCE]]
            with _reached(self.url):
                answers: Mapping[str, bytes] = self.files.cat(paths, on_error="raise")
            yield from (bytes(answers[path]) for path in paths)

    def get(self, key: str) -> bytes | None:
        with _reached(self.url):
            try:
                return bytes(self.files.cat_file(self.path(key)))
            except FileNotFoundError:
                return None

    def put(self, key: str, content: bytes) -> None:
        self.files.pipe_file(self.path(key), content)

    def create(self, key: str, content: bytes) -> bool:
        """Put an object where there is none; False if there is one, and another than this."""
        there = self.get(key)  # some stores would not refuse
        if there is None:
            try:
                self.files.pipe_file(self.path(key), content, mode="create")
                return True
            except OSError:
                # The store's refusal, in its own words; or of the repetition of a request that was heard.
                there = self.get(key)
                if there is None:
                    raise
        return there == content

    def excludes(self, key: str) -> bool:
        """Whether the store itself refuses to create an object where there is one; it is spoiled if not."""
        try:
            self.files.pipe_file(self.path(key), b"", mode="create")
        except OSError:
            return True
        return False

    def remove(self, keys: Collection[str]) -> None:
        if keys:
            self.files.rm([self.path(key) for key in keys])

    def take(self, source: _Objects, last: str) -> None:
        """Become a copy of other objects, which then are removed; `last` says that they are all there."""
        keys = source.sizes()
        if last in keys:
            self.remove(self.sizes())
            self._copy(source, [key for key in keys if key != last])
            self._copy(source, [last])
            source.remove([last])
        source.remove([key for key in keys if key != last])

    def _copy(self, source: _Objects, keys: Sequence[str]) -> None:
        for first in range(0, len(keys), AT_ONCE):
            some = keys[first : first + AT_ONCE]
            self.files.copy([source.path(key) for key in some], [self.path(key) for key in some])


class ObjectStore(Place):
    """A place in an object store, or in any other file system that fsspec knows.

    Parameters
    ----------
    url : str
        ``protocol://...``; credentials and endpoints come from where the protocol's own software takes them
        (for ``s3://`` the environment and the files of AWS), or from fsspec's configuration.
    """

    def __init__(self, url: str) -> None:
        self.objects = _Objects(url)
        self.location: str = self.objects.url

    def beside(self, ending: str) -> ObjectStore:
        return ObjectStore(self.location + ending)

    @property
    def journal(self) -> str:
        return self.location + ".journal"

    @property
    def zarr(self) -> Store:
        return FsspecStore.from_url(self.location, storage_options={"use_listings_cache": False})

    def exists(self) -> bool:
        return bool(self.objects.names())

    def half_appeared(self) -> bool:
        names = self.names()
        return bool(names) and ROOT not in names  # which is the last object

    def can_hold(self) -> bool:
        return True  # folders come with their objects; a bucket that is not there refuses the lock

    def names(self) -> list[str]:
        return self.objects.names()

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return self.objects.sizes(prefix)

    def listing(self) -> Callable[[str], int | None]:
        # One question a folder of a variable's one time (``temperature/c/17``), not one a file.
        folders = lru_cache(maxsize=32)(self.sizes)
        return lambda key: folders("/".join(key.split("/")[:3])).get(key)

    def read(self, keys: Collection[str]) -> Iterator[bytes]:
        return self.objects.read(keys)

    @contextmanager
    def fetched(self) -> Iterator[Path]:
        with TemporaryDirectory() as folder:
            # A listing of sizes does not tell a server that cannot be reached from one that has nothing.
            there = self.sizes() if self.exists() else {}
            keys = [key for key in there if "/" not in key]
            for key, content in zip(keys, self.read(keys), strict=True):
                (Path(folder) / key).write_bytes(content)
            try:
                yield Path(folder)
            except FlareFieldError as error:
                if error.where is not None:
                    error.where = error.where.replace(folder, self.location, 1)
                raise

    @contextmanager
    def appearing(self) -> Iterator[Store]:
        content: dict[str, Any] = {}
        yield MemoryStore(content)
        root = content.pop(ROOT)
        for key, value in content.items():
            self.objects.put(key, value.to_bytes())
        self.objects.put(ROOT, root.to_bytes())

    def bring_to_disk(self, prefix: str) -> None:
        """Do nothing: an object that has been put is safe."""

    def remove(self) -> None:
        keys = self.sizes()
        self.objects.remove([ROOT] if ROOT in keys else [])
        self.objects.remove([key for key in keys if key != ROOT])

    def remove_leftovers(self) -> None:
        """Do nothing: objects have no temporary names."""

    def runs(self, ending: str) -> list[str]:
        folder, name = _parted(self.location)
        found = (entry.removeprefix(f"{name}.") for entry in _Objects(folder).names())
        runs = (entry.removesuffix(ending) for entry in found if entry.endswith(ending))
        return sorted(run for run in runs if RUN.fullmatch(run))

    def replace_with(self, store: Place, aside: Place) -> None:
        # The replacement is copied, and there is no map here meanwhile. Each step can be the last one before
        # a kill: while the replacement's journal is there, this is done again.
        assert isinstance(store, ObjectStore)
        self.objects.take(store.objects, ROOT)
        _Objects(self.journal).take(_Objects(store.journal), ObjectLog.FIRST)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store by an object ``<store>.lock`` that says who holds it, renewed every `BEAT` seconds.

        One that is not renewed is a dead client's, and is taken over. A client that is thought dead but lives
        does no harm: its next block in the journal is refused, for that number is taken.
        """
        lease = _Lease(self.location + ".lock", self)
        lease.take()
        try:
            yield
        finally:
            lease.release()

    def see_that_it_is_free(self) -> None:
        _Lease(self.location + ".lock", self).left_behind()


BEAT = 5.0
"""Seconds after which the holder of an object store's lock renews it."""
DEAD = 4
"""Beats without a renewal after which the holder counts as dead."""


class _Lease:
    """A lock that lasts as long as its holder renews it. No clocks are compared: who waits sees it change."""

    def __init__(self, url: str, store: Place) -> None:
        folder, self._key = _parted(url)
        self._objects = _Objects(folder)
        self._store = store
        self._mine = {"holder": _this_process(), "token": uuid4().hex}
        self._beats = 0
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> None:
        try:
            while not self._objects.create(self._key, self._content()):
                if (left := self.left_behind()) is not None and self._objects.get(self._key) == left:
                    logger.warning(
                        "%s: %s has not renewed its lock, which is taken over", self._store, _holder(left)
                    )
                    self._objects.remove([self._key])
            if not self._objects.excludes(self._key):
                logger.warning(
                    "%s is on a store where commands cannot exclude each other: see that one works on it",
                    self._store,
                )
                self._objects.put(self._key, self._content())
        except OSError as error:
            raise _unwritable(self._store, error) from error
        self._renewal.start()

    def release(self) -> None:
        self._ended.set()
        self._renewal.join()
        if self._is_mine():
            self._objects.remove([self._key])

    def left_behind(self) -> bytes | None:
        """Wait to see whether a holder is alive: it is dead if it has not renewed the lock for long.

        Returns
        -------
        bytes or None
            What a dead one has left; None if the lock is free.

        Raises
        ------
        MisuseError
            The holder lives.
        """
        seen = self._objects.get(self._key)
        if seen is None:
            return None
        holder = _holder(seen)
        logger.info("%s: waiting to see whether %s, which holds it, is alive", self._store, holder)
        deadline = time.monotonic() + DEAD * BEAT
        while time.monotonic() < deadline:
            time.sleep(BEAT / 10)
            now = self._objects.get(self._key)
            if now is None:
                return None
            if now != seen:
                raise _held(self._store, holder)
        return seen

    def _content(self) -> bytes:
        return json.dumps({**self._mine, "beats": self._beats}).encode()

    def _is_mine(self) -> bool:
        there = self._objects.get(self._key)
        return there is not None and self._mine["token"].encode() in there

    def _renew(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                if not self._is_mine():
                    logger.warning("%s: another command has taken over the lock", self._store)
                    return
                self._beats += 1
                self._objects.put(self._key, self._content())
            except Exception as error:  # which one a store raises is up to its software
                # The next beat may get through; if none does, the journal does not either.
                logger.warning("%s: the lock could not be renewed: %s", self._store, error)


class ObjectLog(Log):
    """Numbered objects, each of one block, written once."""

    interval = 5.0
    FIRST = f"{0:08d}"

    def __init__(self, url: str) -> None:
        self._objects = _Objects(url)
        self.location: str = self._objects.url
        self._next = 0

    def exists(self) -> bool:
        return self._objects.get(self.FIRST) is not None

    def begin(self, line: bytes) -> None:
        self.remove()
        self._objects.put(self.FIRST, line)

    def open(self) -> None:
        self._next = 1 + max(int(key) for key in self._keys())

    def append(self, block: bytes) -> None:
        if not self._objects.create(f"{self._next:08d}", block):
            raise StoreError(
                "another command has written to this journal meanwhile",
                where=self.location,
                expected="one command at a time on a map",
                remedy="let the other one finish, or end it and run the same command again",
            )
        self._next += 1

    def close(self) -> None:
        """Do nothing: every block is an object of its own."""

    def lines(self) -> Iterator[bytes]:
        for block in self._objects.read(self._keys()):
            yield from block.splitlines(keepends=True)

    def remove(self) -> None:
        # The first one last: what is left of it says whose it was.
        for keys in (self._keys()[1:], self._keys()[:1]):
            self._objects.remove(keys)

    def _keys(self) -> list[str]:
        return sorted(key for key in self._objects.sizes() if key.isdecimal())


# Common


def _parted(url: str) -> tuple[str, str]:
    """The URL of what holds an object, and the object's name there."""
    folder, _, name = url.rpartition("/")
    return (f"{folder}/" if folder.endswith(":/") else folder), name


def array_in(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """Return an array of a group, where no other group can be."""
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def kind_of(store: Place) -> tuple[object, str]:
    """What kind of store something says it is, and the same in words, which say why if it says nothing.

    Parameters
    ----------
    store : Place
        What is there, whatever it is.
    """
    try:
        kind = zarr.open_group(store.zarr, mode="r").attrs.get("kind")
    except FlareFieldError:
        raise
    except Exception as failure:  # which one damaged metadata raise is up to what they describe
        return None, f"{ROOT} cannot be read: {type(failure).__name__}: {failure}"
    return kind, f"{ROOT} that says no kind" if kind is None else f"{ROOT} of kind {kind}"


def _holder(lock: bytes) -> str | None:
    try:
        return str(json.loads(lock)["holder"])
    except (ValueError, KeyError, TypeError):
        return None


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextmanager
def _reached(url: str) -> Iterator[None]:
    """Say of a store that does not answer, or refuses, which one it is: its software's errors need not."""
    try:
        yield
    except FileNotFoundError:
        raise  # an answer
    except Exception as error:
        raise StoreError(
            "the object store cannot be asked",
            where=url,
            found=f"{type(error).__name__}: {error}",
            remedy="check the URL, whether its server can be reached from here, and the credentials and the "
            "endpoint: for s3:// they are taken from AWS's environment variables and files "
            "(AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL); then run the same command again",
        ) from error


@contextmanager
def answering(store: str | Path | Place) -> Iterator[None]:
    """Context that tells one task's error from a store that does not answer: then no other could do better.

    Raises
    ------
    StoreError
        It does not answer any more.
    """
    try:
        yield
    except FlareFieldError:
        raise
    except Exception:
        place(store).exists()
        raise


def _held(store: Place, holder: str | None) -> MisuseError:
    return MisuseError(
        "another command is working on this store",
        where=store,
        found=holder,
        remedy="wait for it to end, or end it; the same command then goes on from there",
    )


def _unwritable(where: object, error: OSError) -> StoreError:
    return StoreError(
        "nothing can be written there",
        where=where,
        found=error.strerror or error,
        remedy="choose an output in a place that you may write to",
    )


def sync_directory(path: Path) -> None:
    """Bring a directory's entries to disk: a file made or renamed in it is safe only then."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def out_of_space(error: OSError, where: object) -> StoreError | None:
    """Say what to do about a disk, a quota or a file that is full; None for any other error."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    return StoreError(
        "no space left to write to",
        where=where,
        found=os.strerror(error.errno),
        remedy="free some space and run the same command again: it resumes, finished tiles are kept",
    )


@contextmanager
def space(where: object) -> Iterator[None]:
    """Context in which a disk, a quota or a file that is full is said as `out_of_space` says it."""
    try:
        yield
    except OSError as error:
        if (refusal := out_of_space(error, where)) is not None:
            raise refusal from error
        raise
