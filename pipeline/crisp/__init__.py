"""CRISP scans: one reader module for each file format, one `Scan` out of all of them."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from pipeline.crisp import fchroma
from pipeline.crisp.scan import LINES, ForeignFileError, Frame, Scan
from pipeline.errors import InputError

__all__ = ["LINES", "ForeignFileError", "Frame", "Scan", "find_scans", "open_intensity", "read_scans"]


class Reader(Protocol):
    """What a reader module offers."""

    def read_scans(self, path: str | Path) -> tuple[Scan, ...]:
        """Describe the scans of a file; `ForeignFileError` if it is not of the module's format."""
        ...

    def open_intensity(self, scan: Scan) -> NDArray[Any]:
        """Intensities of a scan that the module described, (wavelength, y, x), read as they are indexed."""
        ...


READERS: dict[str, Reader] = {fchroma.FORMAT: fchroma}
"""The readers, by the name that a `Scan` carries as its `format`."""

SUFFIXES = (".fits", ".fit", ".fts")
"""Names that are looked into when a directory is given (a file given by name is always looked into)."""

LISTED = 10  # files that an error names one by one


def read_scans(path: str | Path) -> tuple[Scan, ...]:
    """Describe the scans that a file holds, whatever its format.

    Parameters
    ----------
    path : str or Path
        The file. Its content decides what it is.

    Returns
    -------
    tuple of Scan

    Raises
    ------
    ForeignFileError
        The file is of no format known here, or of other lines.
    InputError
        It is a scan, but cannot be used.
    """
    refusals = []
    for reader in READERS.values():
        try:
            return reader.read_scans(path)
        except ForeignFileError as refusal:
            refusals.append(refusal)
    raise refusals[-1]


def open_intensity(scan: Scan) -> NDArray[Any]:
    """Intensities of a scan, shape (wavelength, y, x), in the scan's units; read from disk as it is indexed.

    Parameters
    ----------
    scan : Scan
        The scan.

    Raises
    ------
    InputError
        The file has changed or gone since it was described.
    """
    return READERS[scan.format].open_intensity(scan)


def find_scans(sources: Sequence[str | Path]) -> tuple[list[Scan], list[ForeignFileError]]:
    """Find the scans among files, directories and patterns, by the files' content.

    A file that is named, or matched by a pattern, has to be a scan. In a directory (looked through with its
    subdirectories) files that are something else are passed over, and reported. A file that is named twice
    is read once.

    Parameters
    ----------
    sources : sequence of str or Path
        Files, directories, and patterns such as ``"2014-09-06/*.fits"``, in any order.

    Returns
    -------
    scans : list of Scan
        In order of line and time.
    passed_over : list of ForeignFileError
        The files of the directories that are not scans, each with the reason.

    Raises
    ------
    InputError
        Nothing is found, or files cannot be used: all of them are named.
    """
    scans: list[Scan] = []
    passed_over: list[ForeignFileError] = []
    refused: list[InputError] = []
    found: dict[Path, bool] = {}
    for source in sources:
        for path, named in _files(source):
            file = path.resolve()
            found[file] = found.get(file, False) or named
    for file, named in found.items():
        try:
            scans.extend(read_scans(file))
        except ForeignFileError as refusal:
            (refused if named else passed_over).append(refusal)
        except InputError as refusal:
            refused.append(refusal)
    if len(refused) == 1:
        raise refused[0]
    if refused:
        listed = [f"{refusal.where}: {refusal.problem}" for refusal in refused[:LISTED]]
        if len(refused) > LISTED:
            listed.append(f"and {len(refused) - LISTED} more")
        raise InputError(
            f"{len(refused)} files cannot be used",
            found="\n    ".join(["", *listed]),
            remedy="mend these files or leave them out",
        )
    return sorted(scans, key=lambda scan: (scan.line, scan.time, scan.path)), passed_over


def _files(source: str | Path) -> Iterator[tuple[Path, bool]]:
    """Yield the files of one source, each with whether it was named (rather than found in a directory)."""
    path = Path(source)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in SUFFIXES and file.is_file():
                yield file, False
    elif path.exists():
        yield path, True
    else:
        matches = sorted(glob.glob(str(source), recursive=True))
        if not matches:
            raise InputError(
                "no such file, and no file matches",
                where=source,
                expected="FITS files, directories that hold them, or patterns",
                remedy="check the name; put a pattern in quotes if the shell should leave it alone",
            )
        for match in matches:
            file = Path(match)
            if file.is_dir():
                yield from _files(file)
            else:
                yield file, True
