"""The folder of a training under way, ``MODEL.training`` beside the model: all that is needed to go on.

``training.json`` says what is trained, ``checkpoint.pt`` and ``previous.pt`` hold how far it is,
``history.csv`` every finished epoch, ``progress.json`` the present state with a heartbeat;
``submission.json`` says that somebody was asked to train and has not begun. One process trains, which the
lock on ``lock`` sees to; it ends with that process, however that ends. Anyone may read: files are replaced
whole, and the history only grows between replacements. The folder is gone when the model is complete.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import logging
import os
import pickle
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch

from inn.checkpoint import DESCRIPTION_FILE
from inn.training import Epoch
from pipeline.errors import MisuseError, StoreError
from pipeline.journal import changes
from pipeline.storage import out_of_space, sync_directory

logger = logging.getLogger("flarefield")

FORMAT = 1
HISTORY_FILE, FIGURE_FILE = "history.csv", "history.png"
BEAT = 1.0
"""Seconds between two writings of the progress file."""
SILENCE = 60.0
"""Seconds without a heartbeat after which a training on another machine counts as dead."""
COLUMNS = ("network", *(entry.name for entry in fields(Epoch) if entry.name != "terms"))
"""Columns that every history has; those of `Epoch.terms` follow."""

State = Literal["running", "finished", "failed", "stopped"]
History = Mapping[str, list[Epoch]]
Told = TypeVar("Told")


@dataclass
class Standing:
    """Where a training stands, as its folder tells.

    Attributes
    ----------
    state : str
        ``"running"``; ``"finished"``; ``"failed"``, for a reason in `error`; ``"stopped"``, because nobody
        wanted it any more.
    stage : str
        Network that is trained, or what else is done.
    epoch, epochs : int
        Epochs that are finished of this stage, and most epochs that it can have.
    step : int
        Optimiser steps since the stage began or was taken up.
    last, best : dict
        The last epoch, and that with the lowest held-out loss, as `inn.training.Epoch`; empty before.
    error : str
        Why it failed.
    starts : int
        How often the training was begun or taken up.
    checkpoint : float
        When the last checkpoint was written, in seconds since 1970; 0 before.
    cluster, host, process, device, threads
        Who trains, where, and on what.
    beat : float
        When this was written, in seconds since 1970.
    """

    state: State = "running"
    stage: str = "preparation"
    epoch: int = 0
    epochs: int = 0
    step: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    starts: int = 1
    checkpoint: float = 0.0
    cluster: str = ""
    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)
    device: str = "cpu"
    threads: int = 1
    beat: float = 0.0


@dataclass(frozen=True)
class Submission:
    """That somebody was asked to train, and has not begun.

    Attributes
    ----------
    identity : str
        Tells it from another one of the same training.
    cluster : str
        Who was asked, as `Standing.cluster` has it.
    address : str
        Where that is.
    detached : bool
        Whether it will be done though nobody watches. Otherwise the command that waits for it shows that it
        does by the date of the file.
    when : float
        In seconds since 1970.
    error : str
        Why nobody will begin; empty as long as somebody may.
    """

    identity: str
    cluster: str
    address: str
    detached: bool
    when: float
    error: str = ""


@dataclass(frozen=True)
class Plan:
    """What is trained, as ``training.json`` tells.

    Attributes
    ----------
    fingerprint : dict
        Everything that decides the network, by name, but the number of threads.
    threads : int
        Threads that it was begun with, and goes on with wherever it does: sums in another order have other
        bits.
    begun : float
        When, in seconds since 1970.
    """

    fingerprint: dict[str, Any]
    threads: int
    begun: float


class TrainingFolder:
    """The folder of the training of one model.

    Parameters
    ----------
    model : Path
        The model directory, which need not exist.

    Attributes
    ----------
    path : Path
        The folder, which need not exist.
    """

    def __init__(self, model: str | Path) -> None:
        self.model = Path(model).absolute()
        self.path = self.model.with_name(self.model.name + ".training")

    # What is trained

    def begin(self, fingerprint: Mapping[str, Any], threads: int) -> Plan:
        """Make the folder, or find the one that is there to be of the same training.

        Parameters
        ----------
        fingerprint : mapping
            Everything that decides the network, by name; values that JSON can hold.
        threads : int
            To begin with, if it was not begun.

        Returns
        -------
        Plan

        Raises
        ------
        MisuseError
            Another training was begun there.
        StoreError
            Nothing can be written there.
        """
        plan = Plan(dict(json.loads(json.dumps(fingerprint))), threads, time.time())
        new = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        with _writing(self.path):
            new.mkdir(parents=True)
            _replace(new / "training.json", _json({"training": FORMAT, **asdict(plan)}))
            try:
                # In one step, and not if another command was faster.
                new.rename(self.path)
                sync_directory(self.path.parent)
                return plan
            except OSError as error:
                shutil.rmtree(new)
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
        return self.same(fingerprint)

    def same(self, fingerprint: Mapping[str, Any]) -> Plan:
        """See that the training that was begun is this one.

        Parameters
        ----------
        fingerprint : mapping
            As for `begin`.

        Returns
        -------
        Plan

        Raises
        ------
        MisuseError
            It is another one.
        StoreError
            The folder is not a training's.
        """
        found = self.plan()
        if differing := changes(found.fingerprint, json.loads(json.dumps(fingerprint))):
            raise MisuseError(
                f"another training of this model was begun: {', '.join(differing)} differ",
                where=self.path,
                found="; ".join(f"{name} {pair[0]}" for name, pair in differing.items()),
                expected="; ".join(f"{name} {pair[1]}" for name, pair in differing.items()),
                remedy="go on with the settings it was begun with, name another model, or remove the folder "
                "to start over",
            )
        return found

    def plan(self) -> Plan:
        """What is trained here.

        Returns
        -------
        Plan

        Raises
        ------
        StoreError
            The folder is not a training's.
        """
        where = self.path / "training.json"
        try:
            found = json.loads(where.read_bytes())
            if found.pop("training") != FORMAT:
                raise ValueError("another format")
            return Plan(**found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                "this is not the folder of a training that this version of FlareField can go on with",
                where=where,
                found=f"{type(error).__name__}: {error}",
                remedy="move it away, or name another model",
            ) from error

    def record(self) -> dict[str, Any] | None:
        """The finished model's record; None where there is no such model.

        Returns
        -------
        dict or None

        Raises
        ------
        MisuseError
            Something else is in the model's place.
        """
        if not os.path.lexists(self.model):
            return None
        try:
            return dict(json.loads((self.model / DESCRIPTION_FILE).read_bytes())["record"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MisuseError(
                "the output exists and is not a model",
                where=self.model,
                remedy="remove it, or name another directory",
            ) from error

    # Who was asked to train

    def submit(self, cluster: str, address: str, detached: bool) -> Submission:
        """Tell that somebody is asked to train, who ends this with `begun` or `end_submission`.

        Parameters
        ----------
        cluster, address, detached
            As in `Submission`. What was left alone once, on the same cluster, stays so.

        Returns
        -------
        Submission

        Raises
        ------
        StoreError
            Nothing can be written there.
        """
        before = self.submission()
        if before is not None and before.cluster == cluster and not before.error:
            detached = detached or before.detached
        submission = Submission(uuid.uuid4().hex, cluster, address, detached, time.time())
        with _writing(self.path):
            _replace(self._submission, _json(asdict(submission)), synced=False)
        return submission

    def submission(self) -> Submission | None:
        """Whether somebody was asked to train who has not begun; None also where nothing tells."""
        return _told(self._submission, Submission)

    def is_waited_for(self, submission: Submission) -> bool:
        """Whether a submission will be taken up: it was left alone, or its command gives signs of life.

        Parameters
        ----------
        submission : Submission
            The last one.

        Returns
        -------
        bool
        """
        try:
            return submission.detached or time.time() - self._submission.stat().st_mtime <= SILENCE
        except FileNotFoundError:  # it was taken up just now
            return True

    def wait(self) -> None:
        """Give a sign of life of a command that waits for its training to be begun."""
        with suppress(FileNotFoundError):  # it was
            os.utime(self._submission, (time.time(), time.time()))

    def begun(self) -> None:
        """Take back the submission: who calls this trains."""
        self._submission.unlink(missing_ok=True)

    def end_submission(self, error: str = "", identity: str | None = None) -> None:
        """Tell why nobody will begin, or without an error take a submission back that was not left alone.

        Parameters
        ----------
        error : str
            What went wrong.
        identity : str, optional
            Of the submission that is meant: another one stays as it is.
        """
        found = self.submission()
        if found is None or identity not in (None, found.identity):
            return
        try:
            if error:
                _replace(self._submission, _json(asdict(replace(found, error=error))), synced=False)
            elif not found.detached:
                self.begun()
        except OSError as failure:
            logger.warning("%s cannot be written: %s", self._submission, _first(failure))

    @property
    def _submission(self) -> Path:
        return self.path / "submission.json"

    # Who trains

    @contextmanager
    def locked(self, patience: float) -> Iterator[bool]:
        """Hold the folder for one process that trains.

        Parameters
        ----------
        patience : float
            Seconds to wait for another process to leave it.

        Yields
        ------
        bool
            Whether the folder is there; it is not when the other process has completed the model.

        Raises
        ------
        MisuseError
            Another process trains.
        """
        path, until = self.path / "lock", time.monotonic() + patience
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                yield False
                return
            taken = _lock(descriptor, path)
            if taken and _is(path, descriptor):
                break
            os.close(descriptor)
            if not taken and time.monotonic() > until:
                raise self.taken()
            time.sleep(0.1)
        try:
            yield True
        finally:
            os.close(descriptor)

    def taken(self) -> MisuseError:
        """The error that says who else trains.

        Returns
        -------
        MisuseError
            To be raised.
        """
        standing = self.standing()
        return MisuseError(
            "another command is training this model",
            where=self.model,
            found=None if standing is None else f"process {standing.process} on {standing.host}",
            remedy="wait for it to end, or end it; the same command then goes on from there",
        )

    def is_running(self, standing: Standing | None) -> bool:
        """Whether a process trains: its heart beats, and where that can be known, it holds the lock.

        Parameters
        ----------
        standing : Standing or None
            What it last told.

        Returns
        -------
        bool
        """
        if standing is None or standing.state not in ("running", "finished"):
            return False
        if time.time() - standing.beat > SILENCE:
            return False
        if standing.host != socket.gethostname():
            return True
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return not _lock(descriptor, self.path, doubt=False)
        finally:
            os.close(descriptor)

    def standing(self) -> Standing | None:
        """Where the training stands; None before a process has begun with it, or if nothing tells.

        Returns
        -------
        Standing or None
        """
        return _told(self.path / "progress.json", Standing)

    # How far it is

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write a checkpoint; the one before is kept until the next.

        Parameters
        ----------
        state : dict
            Tensors and plain values, nested.

        Raises
        ------
        StoreError
            There is no space for it.
        """
        new, last = self.path / "checkpoint.new", self.path / "checkpoint.pt"
        with _writing(self.path):
            with open(new, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            if last.exists():
                last.rename(self.path / "previous.pt")
            new.rename(last)
            sync_directory(self.path)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Read the last checkpoint that is whole, onto the CPU; None where there never was one.

        Nothing in it is executed: it is read with ``weights_only``. One that cannot be read is put aside, for
        the next one to be written must not take the place of the one before it.

        Returns
        -------
        dict or None
            As `save_checkpoint` was given it.

        Raises
        ------
        StoreError
            There are checkpoints, and none can be read. To start over would overwrite them, and the history;
            a disk that answers again, or a copy, may bring them back.
        """
        unreadable: dict[Path, str] = {}
        for path in (self.path / "checkpoint.pt", self.path / "previous.pt"):
            try:
                found = dict(torch.load(path, map_location="cpu", weights_only=True))
            except FileNotFoundError:
                continue
            except (OSError, EOFError, RuntimeError, ValueError, TypeError, pickle.UnpicklingError) as error:
                unreadable[path] = _first(error)
                continue
            for bad, reason in unreadable.items():
                aside = bad.with_name("unreadable.pt")
                logger.warning(
                    "%s cannot be read (%s) and is kept as %s; the one before it is taken: what came after "
                    "that is computed again",
                    bad,
                    reason,
                    aside.name,
                )
                bad.replace(aside)
            return found
        if unreadable:
            raise StoreError(
                "no checkpoint of this training can be read",
                where=self.path,
                found="; ".join(f"{path.name}: {reason}" for path, reason in unreadable.items()),
                expected=f"a checkpoint: {HISTORY_FILE} tells of {self._epochs()} finished epochs",
                remedy="bring one of these files back from a copy; or remove "
                + " and ".join(path.name for path in unreadable)
                + ", and the same command starts over: it computes those epochs again, to the same network",
            )
        return None

    def _epochs(self) -> int:
        """Finished epochs, by the lines of the history."""
        try:
            return max((self.path / HISTORY_FILE).read_bytes().count(b"\n") - 1, 0)
        except FileNotFoundError:
            return 0

    def remove(self) -> None:
        """Remove the folder: the model is complete."""
        shutil.rmtree(self.path, ignore_errors=True)


class Reporter:
    """Writes progress and history into a training's folder, by a thread of its own; a context manager.

    The thread's writings are the heartbeat: they go on while a step, or the scoring, takes long.

    Attributes
    ----------
    standing : Standing
        To be changed by the training.
    """

    def __init__(self, folder: TrainingFolder, standing: Standing) -> None:
        self.standing = standing
        self._folder = folder
        self._rows: list[tuple[str, Epoch]] = []
        self._written, self._columns = 0, list(COLUMNS)
        self._guard, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self.flush()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if kind is None or issubclass(kind, Exception):
            self.flush()

    def add(self, stage: str, entries: Iterable[Epoch]) -> None:
        """Add epochs to the history.

        Parameters
        ----------
        stage : str
            The network that was trained.
        entries : iterable of Epoch
            In order.
        """
        with self._guard:
            self._rows.extend((stage, entry) for entry in entries)

    def flush(self) -> None:
        """Write now."""
        with self._guard, _writing(self._folder.path):
            self._write_history()
            self.standing.beat = time.time()
            _replace(self._folder.path / "progress.json", _json(asdict(self.standing)), synced=False)

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            try:
                self.flush()
            except (OSError, StoreError) as error:
                # Perhaps the next time; a checkpoint that cannot be written ends the training.
                logger.warning("the progress of a training cannot be written: %s", _first(error))

    def _write_history(self) -> None:
        path = self._folder.path / HISTORY_FILE
        if not (missing := self._rows[self._written :]):
            return
        columns = self._columns + [
            name
            for name in dict.fromkeys(name for _, entry in missing for name in entry.terms)
            if name not in self._columns
        ]
        if self._written and columns == self._columns:
            with open(path, "a", newline="", encoding="utf-8") as file:
                file.write(_table(columns, missing))
        else:
            _replace(path, (",".join(columns) + "\n" + _table(columns, self._rows)).encode(), synced=False)
        self._written, self._columns = len(self._rows), columns


def _table(columns: list[str], rows: Iterable[tuple[str, Epoch]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    for stage, entry in rows:
        values = {name: getattr(entry, name) for name in COLUMNS[1:]}
        writer.writerow({"network": stage, **values, **entry.terms})
    return text.getvalue()


def read_history(path: str | Path) -> dict[str, list[Epoch]]:
    """Read a training's ``history.csv``.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    dict of str to list of Epoch
        By network; a last line that is still being written is left out.
    """
    history: dict[str, list[Epoch]] = {}
    text = Path(path).read_text(encoding="utf-8")
    for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])):
        terms = {name: float(value) for name, value in row.items() if name not in COLUMNS and value}
        loss, held_out_loss, learning_rate, seconds = (float(row[name]) for name in COLUMNS[2:])
        entry = Epoch(int(row["epoch"]), loss, held_out_loss, learning_rate, seconds, terms)
        history.setdefault(row["network"], []).append(entry)
    return history


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let a file be written under another name, and put it in place when it is whole.

    Parameters
    ----------
    path : Path
        The file.
    write : callable
        Writes to the path it is given, which has the same suffix.

    Raises
    ------
    StoreError
        It cannot be written.
    """
    new = path.with_name(f".{path.name}.new{path.suffix}")
    with _writing(path.parent):
        write(new)
        new.replace(path)


def _told(path: Path, kind: type[Told]) -> Told | None:
    """What a file says of a training; None where it is not there, or says nothing."""
    try:
        return kind(**json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError):
        # It is not synced to the disk: a node that dies may leave it empty. Checkpoints are what counts.
        logger.warning("%s: cannot be read, and is left out of account", path)
        return None


def _json(value: Any) -> bytes:  # noqa: ANN401
    return json.dumps(value, indent=1).encode() + b"\n"


def _replace(path: Path, content: bytes, synced: bool = True) -> None:
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        file.write(content)
        if synced:
            file.flush()
            os.fsync(file.fileno())
    new.replace(path)


def _lock(descriptor: int, path: Path, doubt: bool = True) -> bool:
    """Whether a file could be locked; what cannot be known counts as `doubt`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        if doubt:
            logger.warning("%s is on a file system without locks: see that one command trains", path)
        return doubt
    return True


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _writing(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if (refusal := out_of_space(error, where)) is not None:
            raise refusal from error
        raise StoreError(
            "the folder of a training cannot be written",
            where=where,
            found=error.strerror or error,
            remedy="choose an output in a directory that you may write to",
        ) from error
