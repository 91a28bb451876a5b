"""CRISP scans: one reader module for each file format, one `Scan` out of all of them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.crisp import crispy, fchroma, generic, lapalma, sstred
from pipeline.crisp.cube import Cube, IncompleteCube
from pipeline.crisp.generic import Description
from pipeline.crisp.scan import LINES, ForeignFileError, Frame, OtherKindError, OtherLineError, Scan
from pipeline.crisp.wavelengths import Medium
from pipeline.errors import InputError

__all__ = [
    "LINES",
    "Cube",
    "ForeignFileError",
    "Frame",
    "Look",
    "Medium",
    "Scan",
    "find_scans",
    "look_into",
    "open_intensity",
    "open_wavelength_shift",
    "read_headers",
    "read_scans",
]


class Opener(Protocol):
    """What every reader module offers: to open the scans that it has described."""

    def read_headers(self, path: str | Path) -> tuple[str, ...]:
        """What the file says of itself, whole, as text: of FITS every HDU's header, one card a line."""
        ...

    def open_intensity(self, scan: Scan) -> Cube:
        """Intensities of a scan that the module described, in its `units`, read as they are indexed."""
        ...

    def open_wavelength_shift(self, scan: Scan) -> NDArray[np.float64] | None:
        """Angstrom (y, x) to be added to each pixel's wavelengths in vacuum; None if all have the same."""
        ...


class Reader(Opener, Protocol):
    """What a module of a format that is known by content offers besides."""

    @property
    def SUFFIXES(self) -> tuple[str, ...]:
        """Names, in lower case, that are looked into when a directory is given; a named file always is."""
        ...

    def read_scans(self, path: str | Path, medium: Medium | None = None) -> tuple[Scan, ...]:
        """Describe a file's scans of the lines wanted, reading no intensities.

        `ForeignFileError` if the file is not of the module's format, `OtherLineError` if it is, but without
        such a scan; any other `InputError` if it should be usable and is not.
        """
        ...


READERS: dict[str, Reader] = {
    fchroma.FORMAT: fchroma,
    sstred.FORMAT: sstred,
    lapalma.FORMAT: lapalma,
    crispy.FORMAT: crispy,
}
"""The readers of formats known by content, by the name that a `Scan` carries as its `format`."""

OPENERS: dict[str, Opener] = {**READERS, generic.FORMAT: generic}
"""The readers of all formats; of the last one, files that a description describes."""

LISTED = 10  # files that an error names one by one


def read_scans(
    path: str | Path, medium: Medium | None = None, description: Description | None = None
) -> tuple[Scan, ...]:
    """Describe the scans that a file holds, whatever its format.

    Parameters
    ----------
    path : str or Path
        The file, or the directory of a format that is one. Its content decides what it is.
    medium : {"vacuum", "air"}, optional
        What the caller says of wavelengths, where file and format leave it open.
    description : Description, optional
        What was stated of files that it names (`pipeline.crisp.generic`); nothing else is asked of these.

    Returns
    -------
    tuple of Scan

    Raises
    ------
    ForeignFileError
        The file is of no format known here, or of other lines.
    InputError
        It holds scans, but cannot be used.
    """
    refusals: dict[str, ForeignFileError] = {}
    if description is not None:
        if description.describes(path):
            return generic.read_scans(path, description, medium)
        refusals["described"] = ForeignFileError(
            "its name is none that the description has", where=path, found=description.path
        )
    for name, reader in READERS.items():
        try:
            return reader.read_scans(path, medium)
        except OtherLineError:
            raise
        except ForeignFileError as refusal:
            refusals[name] = refusal
    told = {name: refusal for name, refusal in refusals.items() if not isinstance(refusal, OtherKindError)}
    problems = list(dict.fromkeys(refusal.problem for refusal in (told or refusals).values()))
    if not told or len(problems) == 1:
        first = next(iter((told or refusals).values()))
        raise type(first)(
            ", ".join(problems),
            where=first.where,
            found=first.found,
            expected=first.expected if told else None,
            remedy=first.remedy,
        )
    raise ForeignFileError(
        "a file of no format that is known",
        where=path,
        found="".join(
            f"\n    not {name}: {refusal.problem}" + (f" ({refusal.found})" if refusal.found else "")
            for name, refusal in told.items()
        ),
        remedy="leave this file out",
    )


def read_headers(scan: Scan) -> tuple[str, ...]:
    """What a scan's file says of itself, whole, as text: of FITS every HDU's header, one card a line.

    Where a description or a sidecar in YAML says more of it, that is the last of the texts.

    Parameters
    ----------
    scan : Scan
        Any of the file's scans.

    Raises
    ------
    InputError
        The file has changed or gone since it was described.
    """
    described = [Path(file) for file in scan.sidecars if Path(file).suffix.lower() in (".yaml", ".yml")]
    return (
        *OPENERS[scan.format].read_headers(scan.path),
        *(file.read_text(encoding="utf-8") for file in described),
    )


def open_intensity(scan: Scan) -> Cube:
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
    cube = OPENERS[scan.format].open_intensity(scan.as_filed)
    return cube if scan.present is None else IncompleteCube(cube, scan.present, len(scan.wavelength))


def open_wavelength_shift(scan: Scan) -> NDArray[np.float64] | None:
    """What has to be added to a scan's wavelengths at each pixel: CRISP's cavity errors, and its own drift.

    Parameters
    ----------
    scan : Scan
        The scan.

    Returns
    -------
    ndarray, shape (y, x), or None
        Angstrom, in vacuum; NaN where it is not known. None if all pixels have the axis' own wavelengths.

    Raises
    ------
    InputError
        The file has changed or gone since it was described.
    """
    shift = OPENERS[scan.format].open_wavelength_shift(scan.as_filed) if scan.has_wavelength_shift else None
    if scan.drift == 0.0:
        return shift
    return np.full(scan.shape, scan.drift) if shift is None else shift + scan.drift


def find_scans(
    sources: Sequence[str | Path], medium: Medium | None = None, description: str | Path | None = None
) -> tuple[list[Scan], list[ForeignFileError]]:
    """Find the scans among files, directories and patterns, by the files' content.

    A file that is named, or matched by a pattern, has to be a scan. In a directory (looked through with its
    subdirectories) files that are something else are passed over, and reported. A file that is named twice
    is read once. Zarr groups count as files, wherever they are.

    Parameters
    ----------
    sources : sequence of str or Path
        Files, directories, and patterns such as ``"2014-09-06/*.fits"``, in any order.
    medium : {"vacuum", "air"}, optional
        As for `read_scans`; said of all files.
    description : str or Path, optional
        A description in YAML (`pipeline.crisp.generic`) of files that it names.

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
    for look in look_into(sources, medium, description):
        scans.extend(look.scans)
        if isinstance(look.refusal, ForeignFileError) and not look.named:
            passed_over.append(look.refusal)
        elif look.refusal is not None:
            refused.append(look.refusal)
    if refused:
        raise _together(refused)
    return sorted(scans, key=lambda scan: (scan.line, scan.time, scan.path, scan.index)), passed_over


def _together(refused: list[InputError]) -> InputError:
    """One error of several: what is wrong, of which files, and what to do about it, problem by problem."""
    if len(refused) == 1:
        return refused[0]
    alike: dict[str, list[InputError]] = {}
    for refusal in refused:
        alike.setdefault(refusal.problem, []).append(refusal)
    rows: list[str] = []
    for problem, refusals in alike.items():
        rows.append(
            f"\n    {problem}" + (f" ({len(refusals)} files)" if 1 < len(refusals) < len(refused) else "")
        )
        for refusal in refusals[:LISTED]:
            found = refusal.found or ""
            if "\n" in found:  # several lines of one file are enough
                found = " ".join(found.split()) if refusal is refusals[0] else ""
            rows.append(f"\n        {refusal.where}" + (f": {found}" if found else ""))
        if len(refusals) > LISTED:
            rows.append(f"\n        and {len(refusals) - LISTED} more")
        if len(alike) > 1:
            rows.append(f"\n        remedy: {_remedy(refusals)}")
    return InputError(
        f"{len(refused)} files cannot be used",
        found="".join(rows),
        expected=refused[0].expected if len({refusal.expected for refusal in refused}) == 1 else None,
        remedy=_remedy(refused) if len(alike) == 1 else "mend these files as said, or leave them out",
    )


def _remedy(refusals: list[InputError]) -> str:
    remedies = list(dict.fromkeys(refusal.remedy for refusal in refusals if refusal.remedy))
    first = remedies[0] if remedies else "mend these files or leave them out"
    return first if len(remedies) < 2 else f"{first}; and the others in the same way"


@dataclass(frozen=True)
class Look:
    """What a file turned out to be.

    Attributes
    ----------
    path : Path
        The file.
    named : bool
        Whether it was given by name or pattern, rather than found in a directory.
    scans : tuple of Scan
        Its scans; none if it was refused.
    refusal : InputError or None
        Why it was refused; a `ForeignFileError` if it is something else.
    """

    path: Path
    named: bool
    scans: tuple[Scan, ...]
    refusal: InputError | None


def look_into(
    sources: Sequence[str | Path], medium: Medium | None = None, description: str | Path | None = None
) -> Iterator[Look]:
    """Look into each file among files, directories and patterns once, and refuse none.

    Parameters
    ----------
    sources, medium, description
        As for `find_scans`.

    Yields
    ------
    Look

    Raises
    ------
    InputError
        A name or pattern that nothing has, or a description that cannot be used.
    """
    # A link counts as the file that it leads to, but under its own name: sidecars lie beside it, and a
    # description may have another cube under that name.
    found: dict[tuple[Path, tuple[int, ...]], tuple[Path, bool]] = {}
    described = None if description is None else generic.load_description(description)
    suffixes = {suffix for reader in READERS.values() for suffix in reader.SUFFIXES}
    if description is not None:
        suffixes |= set(generic.SUFFIXES)
    for source in sources:
        for path, named in _files(source, suffixes):
            key = (path.resolve(), () if described is None else described.cubes_in(path))
            first, already = found.get(key, (path.absolute(), False))
            found[key] = (first, already or named)
    for file, named in found.values():
        try:
            yield Look(file, named, read_scans(file, medium, described), None)
        except InputError as refusal:
            yield Look(file, named, (), refusal)


def _files(source: str | Path, suffixes: set[str]) -> Iterator[tuple[Path, bool]]:
    """Yield the files of one source, each with whether it was named (rather than found in a directory)."""
    path = Path(source)
    if path.exists():
        matches = [str(source)]
    else:
        matches = sorted(glob.glob(str(source), recursive=True))
        if not matches:
            raise InputError(
                "no such file, and no file matches",
                where=source,
                expected="files of scans, directories that hold them, or patterns",
                remedy="check the name; put a pattern in quotes if the shell should leave it alone",
            )
    for match in matches:
        file = Path(match)
        if file.is_dir() and not _is_group(file):
            yield from ((found, False) for found in _inside(file, suffixes))
        else:
            yield file, True


def _inside(folder: Path, suffixes: set[str]) -> Iterator[Path]:
    """Yield what may be a scan in a directory and its subdirectories."""
    for parent, folders, files in os.walk(folder):
        groups = [name for name in folders if _is_group(Path(parent, name))]
        folders[:] = sorted(set(folders) - set(groups))
        # A directory of files often holds the stores that were made of them, too: nothing to tell of.
        groups = [name for name in groups if crispy.holds_data(Path(parent, name))]
        for name in sorted([*groups, *files]):
            if Path(name).suffix.lower() in suffixes:
                yield Path(parent, name)


def _is_group(folder: Path) -> bool:
    """Whether a directory is one thing, a Zarr group, and nothing to look for files in."""
    return any((folder / name).is_file() for name in ("zarr.json", ".zgroup"))
