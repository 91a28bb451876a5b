"""What every store says of its origin: version, the call that made it, hashes of its sources."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

BLOCK = 1 << 20


def flarefield_version() -> str:
    """Version of the installed `flarefield` distribution.

    Returns
    -------
    str
    """
    return version("flarefield")


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits, read in blocks.

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
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


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
