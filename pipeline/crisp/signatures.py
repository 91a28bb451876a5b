"""What a file begins with: by it, and not by its name, readers know their files."""

from __future__ import annotations

from pathlib import Path

from pipeline.crisp.scan import OtherKindError
from pipeline.errors import InputError

LENGTH = 512
"""Bytes at the beginning of a file that are looked at."""


def beginning(path: str | Path) -> bytes:
    """The first bytes of a file, `LENGTH` of them at most.

    Parameters
    ----------
    path : str or Path
        The file.

    Raises
    ------
    OtherKindError
        It is a directory.
    InputError
        It cannot be read.
    """
    file = Path(path)
    if file.is_dir():
        raise OtherKindError("a directory, not a file", where=file, remedy="name the files that it holds")
    try:
        with file.open("rb") as stream:
            return stream.read(LENGTH)
    except OSError as failure:
        raise InputError(
            "the file cannot be read",
            where=file,
            found=failure.strerror,
            remedy="check the name and the permissions",
        ) from failure
