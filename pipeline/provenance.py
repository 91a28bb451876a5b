"""What every store says of its origin: version, the call that made it, hashes of its sources."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.errors import InputError


def flarefield_version() -> str:
    """Version of the installed `flarefield` distribution.

    Returns
    -------
    str
    """
    return version("flarefield")


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    str
        64 digits.

    Raises
    ------
    OSError
        It cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_source(path: str | Path) -> str:
    """SHA-256 of a file's bytes, or of a directory: of its files' names and hashes, in order.

    Parameters
    ----------
    path : path
        The file, or a directory such as a Zarr group.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    OSError
        It cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in _files(folder):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def stamp(path: str | Path) -> tuple[int, int]:
    """Size in bytes and time of the last change (nanoseconds) of a file, or of all files in a directory.

    Parameters
    ----------
    path : path
        The file or directory.

    Raises
    ------
    InputError
        It cannot be looked at.
    """
    files = _files(Path(path)) if Path(path).is_dir() else []
    try:
        found = [file.stat() for file in (Path(path), *files)]
    except OSError as failure:
        raise InputError(
            "the file cannot be read",
            where=failure.filename,
            found=failure.strerror,
            remedy="put it back, and run the command again",
        ) from failure
    return sum(each.st_size for each in found), max(each.st_mtime_ns for each in found)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def provenance(call: str, made_from: Mapping[str, str]) -> dict[str, Any]:
    """Attributes that every store carries.

    Parameters
    ----------
    call : str
        The command line or Python call that makes the store.
    made_from : mapping of str to str
        Name of each source and its SHA-256 (hexadecimal).

    Returns
    -------
    dict
        ``flarefield_version``, ``call`` and ``made_from``, ready for a store's attributes.
    """
    return {"flarefield_version": flarefield_version(), "call": call, "made_from": dict(made_from)}


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted names, so that those which differ can be told.

    Parameters
    ----------
    settings : mapping
        Values by name, mappings among them.
    prefix : str
        Put before every name.

    Returns
    -------
    dict
        ``{"a": {"b": 1}}`` as ``{"a.b": 1}``; an empty mapping leaves nothing.
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
