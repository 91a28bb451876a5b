"""La Palma cubes as readers open them: a header of 512 bytes, then images."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.crisp.scan import OtherKindError
from pipeline.crisp.signatures import beginning
from pipeline.errors import InputError

SUFFIXES = (".icube", ".fcube")
HEADER = 512  # bytes

TYPES = {1: "u1", 2: "i2", 3: "i4", 4: "f4", 5: "f8", 12: "u2", 13: "u4"}
"""Numbers by IDL's codes for them."""

STATEMENT = re.compile(rb"\b(datatype|dims|nx|ny|nt|ns|endian)\s*=\s*(\w+)")
IN_WORDS = re.compile(r"\bdatatype\s*=\s*\d+\s*\((\w+)\)", re.IGNORECASE)
KINDS = {"float": "f", "double": "f", "byte": "iu", "integer": "iu", "long": "iu"}
"""Numpy's kinds of numbers by the words that stand beside IDL's code."""
STOKES = re.compile(r"\bstokes\s*=\s*\[([^\]]*)\]", re.IGNORECASE)


@dataclass(frozen=True)
class Header:
    """What a La Palma cube says of itself.

    Attributes
    ----------
    text : str
        The header, whole.
    dtype : numpy.dtype
        Of the numbers.
    shape : tuple of int
        ``(nt, ny, nx)``: images, and pixels of each.
    parameters : int, optional
        ``ns``, the number of Stokes parameters; None where the header does not say.
    stokes : tuple of str, optional
        Which they are; None where the header does not say.
    """

    text: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, int, int]
    parameters: int | None
    stokes: tuple[str, ...] | None


def is_cube(start: bytes) -> bool:
    """Whether a file that begins with these bytes (`HEADER` of them) is a La Palma cube."""
    return {b"datatype", b"nx", b"ny"} <= dict(STATEMENT.findall(start)).keys()


def read_header(file: Path) -> Header:
    """Read a cube's header, and check that the file is as long as it says.

    Parameters
    ----------
    file : Path
        The file.

    Raises
    ------
    OtherKindError
        It does not begin with such a header.
    InputError
        It cannot be read, says what cannot be, or is of another length.
    """
    start = beginning(file)
    present = file.stat().st_size
    if not is_cube(start):
        raise OtherKindError(
            "not a La Palma cube",
            where=file,
            found=f"it begins with {start[:24]!r}" if start else "an empty file",
            expected="datatype=..., dims=..., nx=..., ny=..., nt=..., endian=...",
            remedy="leave this file out",
        )
    text = start.split(b"\x00")[0].decode("ascii", "replace").strip()
    said = {key.decode(): value.decode() for key, value in STATEMENT.findall(start)}
    try:
        kind, nx, ny, nt = (int(said.get(key, "1")) for key in ("datatype", "nx", "ny", "nt"))
        parameters = int(said["ns"]) if "ns" in said else None
        named = STOKES.search(text)
        stokes = None if named is None else _stokes(named[1])
        if None not in (parameters, stokes) and len(stokes or ()) != parameters:
            raise ValueError("as many Stokes parameters as it names")
        word = IN_WORDS.search(text)
        dtype = np.dtype({"l": "<", "b": ">"}[said.get("endian", "")] + TYPES[kind])
        if word is not None and dtype.kind not in KINDS.get(word[1].lower(), dtype.kind):
            raise ValueError("a code and a word of one kind of numbers")
    except (KeyError, ValueError) as failure:
        raise InputError(
            "the header of the cube says what cannot be",
            where=file,
            found=text,
            expected=f"datatype one of {', '.join(map(str, TYPES))}, and its word; whole numbers; "
            "endian l or b; stokes a list of I, Q, U, V, ns of them",
            remedy="mend the header, or leave the file out",
        ) from failure
    needed = HEADER + nx * ny * nt * dtype.itemsize
    if min(nx, ny, nt) < 1 or present != needed:
        raise InputError(
            "the file is truncated" if present < needed else "the file is not as long as its header says",
            where=file,
            found=f"{present} bytes",
            expected=f"{needed} bytes: {nt} images of {ny} x {nx} pixels, {dtype.itemsize} bytes each",
            remedy="fetch the file again, or leave it out",
        )
    return Header(text, dtype, (nt, ny, nx), parameters, stokes)


def _stokes(text: str) -> tuple[str, ...]:
    """Of a list such as ``I,Q,U,V`` or ``'i', 'v'``."""
    names = tuple(re.findall(r"\w+", text.upper()))
    if not names or not set(names) <= set("IQUV"):
        raise ValueError(text)
    return names


def mapped(file: Path) -> NDArray[Any]:
    """A cube's images (image, y, x), memory-mapped.

    Parameters
    ----------
    file : Path
        The file.

    Raises
    ------
    OtherKindError, InputError
        As `read_header` raises them.
    """
    header = read_header(file)
    return np.memmap(file, header.dtype, "r", HEADER, header.shape)
