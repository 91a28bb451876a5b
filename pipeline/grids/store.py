"""The grid store: training atmospheres with their line profiles (Zarr v3); writing, opening, splitting."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from pipeline.errors import MisuseError, StoreError
from pipeline.journal import changes
from pipeline.provenance import flattened, provenance
from pipeline.storage import lock, out_of_space

Array = NDArray[np.floating[Any]]

STATUS = ("converged", "iteration_limit", "numerical_failure")
"""Meaning of each value of a grid's ``status``."""
BUNDLED_GRID = Path(__file__).parents[1] / "data" / "grid.zarr"
"""The grid that comes with FlareField, and that its bundled network was trained on."""
SCHEMA = 1
CHUNK = 1024
"""Samples in each chunk, which is one file: a bundled grid stays a few dozen files below a megabyte each."""
MANTISSA_BITS = 9
"""Bits kept of a float32 mantissa: values are stored to 1e-3 of themselves, less than the synthesis errs."""
_LINE_UNITS = "erg / (s cm2 sr Angstrom)"
_ATMOSPHERE = {
    "electron_density": ("cm-3", "electron density"),
    "temperature": ("K", "temperature"),
    "velocity": ("km / s", "vertical velocity, upflow positive"),
}
_LINES = {"halpha": "H-alpha", "ca8542": "Ca II 8542"}


@dataclass(frozen=True)
class Description:
    """What every sample of a grid has in common, and everything that decides its numbers.

    Attributes
    ----------
    parameters : tuple of (name, units, long_name)
        The physical parameters stored with each sample.
    heights : tuple of float
        Mm.
    mu : tuple of float
        Cosines of the heliocentric angle.
    offsets_halpha, offsets_ca8542 : tuple of float
        Wavelengths, Angstrom from the grid's own rest wavelengths.
    rest_halpha, rest_ca8542 : float
        Those rest wavelengths, vacuum, Angstrom.
    maker : dict
        Everything else that decides the numbers (JSON values): the program that computed them with its
        version, and its settings. FlareField's own version is not among them: a release that changes numbers
        raises what is (`SCHEMA`, `pipeline.grids.atmosphere.FAMILY_VERSION`), others leave grids resumable.
    height_zero, equilibrium : str
        Where height zero is; how populations were found.
    """

    parameters: tuple[tuple[str, str, str], ...]
    heights: tuple[float, ...]
    mu: tuple[float, ...]
    offsets_halpha: tuple[float, ...]
    offsets_ca8542: tuple[float, ...]
    rest_halpha: float
    rest_ca8542: float
    maker: dict[str, Any]
    height_zero: str
    equilibrium: str

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the numbers, as JSON holds it; grids of equal fingerprints may be joined.

        Returns
        -------
        dict
            Schema and rounding of this version, parameters' names, axes and `maker`.
        """
        settings = {
            "schema": SCHEMA,
            "mantissa_bits": MANTISSA_BITS,
            "parameters": [name for name, _, _ in self.parameters],
            "heights": self.heights,
            "mu": self.mu,
            "offsets_halpha": self.offsets_halpha,
            "offsets_ca8542": self.offsets_ca8542,
            "rest_halpha": self.rest_halpha,
            "rest_ca8542": self.rest_ca8542,
            "maker": self.maker,
        }
        return dict(json.loads(json.dumps(settings)))


@dataclass(frozen=True)
class Record:
    """One sample, in physical units; arrays as :class:`pipeline.grids.lightweaver.Synthesis` has them.

    Attributes
    ----------
    sample : int
        Its number in the grid: of two records with the same one the later counts.
    simulation : int
        What it is a snapshot of; splits keep the samples of one together.
    parameters : sequence of float
        In the order and the units of `Description.parameters`.
    electron_density, temperature, velocity : (height,) arrays
        cm-3, K, km/s (vertical, upflow positive).
    halpha, ca8542 : (mu, wavelength) arrays
        erg s-1 cm-2 sr-1 Angstrom-1.
    status : int
        Index into :data:`STATUS`.
    iterations : int
        That its maker took; 0 where that is not known.
    reason : str
        Why it cannot be used; empty if it can. 160 bytes are stored.
    """

    sample: int
    simulation: int
    parameters: Sequence[float]
    electron_density: Array
    temperature: Array
    velocity: Array
    halpha: Array
    ca8542: Array
    status: int
    iterations: int
    reason: str


def round_mantissa(values: NDArray[Any], bits: int = MANTISSA_BITS) -> NDArray[np.float32]:
    """Round to float32 with a shorter mantissa, half to even, so that the rest compresses away.

    Parameters
    ----------
    values : array
        Any shape; NaN and infinities pass.
    bits : int
        Bits of the mantissa to keep, of float32's 23.

    Returns
    -------
    float32 array
        Within ``2**-(bits + 1)`` of the values, relatively. Rounding again changes nothing.
    """
    single = np.ascontiguousarray(values, dtype=np.float32)
    drop = 23 - bits
    integers = single.view(np.uint32)
    half = np.uint32((1 << (drop - 1)) - 1)
    odd = (integers >> np.uint32(drop)) & np.uint32(1)
    rounded = ((integers + half + odd) >> np.uint32(drop)) << np.uint32(drop)
    return np.where(np.isfinite(single), rounded.view(np.float32), single)


def _record_type(about: Description) -> np.dtype[np.void]:
    heights, rays = len(about.heights), len(about.mu)
    return np.dtype(
        [
            ("checksum", "<u4"),
            ("sample", "<i8"),
            ("simulation", "<i8"),
            ("status", "<i4"),
            ("iterations", "<i4"),
            ("reason", "S160"),
            ("parameters", "<f8", (len(about.parameters),)),
            ("electron_density", "<f4", (heights,)),
            ("temperature", "<f4", (heights,)),
            ("velocity", "<f4", (heights,)),
            ("halpha", "<f4", (rays, len(about.offsets_halpha))),
            ("ca8542", "<f4", (rays, len(about.offsets_ca8542))),
        ]
    )


def settings_of(path: Path) -> dict[str, Any] | None:
    """Settings that the grid at a path was made with, finished or under way.

    Parameters
    ----------
    path : Path
        A grid store, there or not.

    Returns
    -------
    dict or None
        Its :meth:`Description.fingerprint`; None if nothing is there yet.

    Raises
    ------
    MisuseError
        If `path` or its journal is something else.
    """
    for place in (path, _swapped_out(path)):
        if place.exists():
            return dict(json.loads(_own(place).attrs.get("fingerprint", "{}")))
    journal = _journal(path)
    if journal.exists():
        with journal.open("rb") as file:
            return _head(journal, file.readline())
    return None


def _journal(path: Path) -> Path:
    return path.with_name(path.name + ".journal")


def _swapped_out(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _own(path: Path) -> xr.Dataset:
    """The grid that is to be resumed or enlarged."""
    try:
        return open_grid(path)
    except StoreError as error:
        raise MisuseError(
            "the output exists and is not a grid",
            where=path,
            found=error.found,
            remedy="give another output path, or move it away",
        ) from error


def _head(path: Path, line: bytes) -> dict[str, Any] | None:
    """Settings in a journal's first line; None if it was killed while that line was written."""
    if not line.endswith(b"\n"):
        return None
    try:
        return dict(json.loads(line))
    except ValueError as error:
        raise MisuseError(
            "this is not a grid's journal",
            where=path,
            remedy="move it away, or choose another output",
        ) from error


@contextmanager
def _writing(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise out_of_space(error, where) or StoreError(
            "the grid cannot be written",
            where=where,
            found=error.strerror or error,
            remedy="choose an output in a directory that you may write to",
        ) from error


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Journal:
    """Finished samples of a grid under way, in an append-only file beside the store and in the store itself.

    The file ``GRID.zarr.journal`` is one line of JSON (the grid's fingerprint), then records of fixed length,
    each with a checksum, each on disk before :meth:`append` or :meth:`extend` returns. A torn last record is
    dropped. Memory holds only where each sample lies, so that a grid may be larger than memory. A grid whose
    samples are snapshots of runs has beside it ``GRID.zarr.runs``, what is known of each run as a line of
    JSON. Both files are removed when the store that holds their content is in place.

    Parameters
    ----------
    path : Path
        The grid store, there or not.
    about : Description
        What the grid holds. An existing store or journal must have been made with the same settings.

    Attributes
    ----------
    runs : dict of str to dict
        What is known of each run by its name (JSON values), as :meth:`add_run` was told; in the store as
        ``attrs["runs"]``.

    Raises
    ------
    MisuseError
        If `path` is something else, or was made with other settings, or another command works on it.
    StoreError
        If nothing can be written there.
    """

    def __init__(self, path: Path, about: Description) -> None:
        self.path, self.about = path, about
        self.file_path = _journal(path)
        self.runs_path = path.with_name(path.name + ".runs")
        self.runs: dict[str, dict[str, Any]] = {}
        self._type = _record_type(about)
        self._grid: xr.Dataset | None = None
        self._reasons: dict[str, str] = {}
        self._stored: dict[int, int] = {}  # sample -> its place in the store
        self._written: dict[int, int] = {}  # sample -> its place in the journal's file, which goes before
        self._count = 0  # records in the file
        self._changed = False  # whether the store lacks anything
        with ExitStack() as stack:
            # Before anything is read, lest another command is just finishing.
            stack.enter_context(lock(path))
            if _swapped_out(path).exists() and not path.exists():  # killed between the two steps of a swap
                _swapped_out(path).rename(path)
            if path.exists():
                self._read_store()
            # Unbuffered: what could not be written must not be tried again when the file is closed.
            self._file = stack.enter_context(self.file_path.open("ab", buffering=0))
            self._read_journal()
            if self._file.tell() == 0:
                self._put(json.dumps(about.fingerprint()).encode() + b"\n")
            self._start = self._file.tell() - self._count * self._type.itemsize
            self._read_runs()
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._changed:
            self.file_path.unlink(missing_ok=True)
            self.runs_path.unlink(missing_ok=True)
        self._open.close()

    @property
    def samples(self) -> set[int]:
        """Samples that need no more work."""
        return self._stored.keys() | self._written.keys()

    def _refuse_other(self, where: Path, found: dict[str, Any]) -> None:
        changed = changes(flattened(found), flattened(self.about.fingerprint()))
        if changed:
            was, wanted = (
                "; ".join(f"{name} {_short(pair[side])}" for name, pair in changed.items()) for side in (0, 1)
            )
            raise MisuseError(
                f"the grid was made with other settings: {', '.join(changed)}",
                where=where,
                found=was,
                expected=wanted,
                remedy="go on with the settings and versions it was made with, or give another output path",
            )

    def _read_store(self) -> None:
        self._grid = _own(self.path)
        self._refuse_other(self.path, json.loads(self._grid.attrs.get("fingerprint", "{}")))
        self._reasons = json.loads(self._grid.attrs["failures"])
        self.runs = json.loads(self._grid.attrs.get("runs", "{}"))
        self._stored = {int(sample): place for place, sample in enumerate(self._grid["sample"].values)}

    def _read_journal(self) -> None:
        with self.file_path.open("rb") as file:
            line = file.readline()
            found = _head(self.file_path, line)
            if found is None:  # new, or killed while the first line was written: nothing is in it
                self._file.truncate(0)
                self._file.seek(0)
                return
            self._refuse_other(self.file_path, found)
            size = self._type.itemsize
            while len(content := file.read(size)) == size:
                record = np.frombuffer(content, self._type)[0]
                if zlib.crc32(content[4:]) != record["checksum"]:
                    break
                self._written[int(record["sample"])] = self._count
                self._count += 1
        self._file.truncate(len(line) + self._count * size)
        self._file.seek(0, os.SEEK_END)
        self._changed = self._changed or self._count > 0

    def _read_runs(self) -> None:
        if not self.runs_path.exists():
            return
        content = self.runs_path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        os.truncate(self.runs_path, len(whole))
        for line in whole.splitlines():
            self.runs.update(json.loads(line))
        self._changed = self._changed or bool(whole)

    def _put(self, block: bytes) -> None:
        """Append to the journal's file: on disk when this returns, or nothing of it."""
        size = self._file.tell()
        with _writing(self.file_path):
            try:
                left = memoryview(block)
                while left:
                    left = left[self._file.write(left) :]
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(size)
                self._file.seek(0, os.SEEK_END)
                raise

    def append(self, record: Record) -> None:
        """Add a finished sample; see `extend`."""
        self.extend([record])

    def extend(self, records: Iterable[Record]) -> None:
        """Add finished samples, each in place of an earlier one of its number; on disk when this returns.

        Parameters
        ----------
        records : iterable of Record
            Their arrays must have the shapes that `Description` says.

        Raises
        ------
        StoreError
            There is no space for them; then none was added.
        """
        added, block = [], bytearray()
        for record in records:
            row = np.zeros(1, self._type)[0]
            for name in ("sample", "simulation", "status", "iterations", "parameters"):
                row[name] = getattr(record, name)
            for name in (*_ATMOSPHERE, *_LINES):
                row[name] = round_mantissa(getattr(record, name))
            row["reason"] = record.reason.encode()[:160]
            row["checksum"] = zlib.crc32(row.tobytes()[4:])
            added.append(record.sample)
            block += row.tobytes()
        self._put(bytes(block))
        for sample in added:
            self._written[sample] = self._count
            self._count += 1
            self._changed = True

    def add_run(self, name: str, facts: dict[str, Any]) -> None:
        """Keep what is known of a run instead of what was; on disk when this returns.

        Parameters
        ----------
        name : str
            The run's.
        facts : dict
            JSON values. ``sha256`` goes into the store's provenance.

        Raises
        ------
        StoreError
            There is no space for it.
        """
        if self.runs.get(name) == facts:
            return
        with _writing(self.runs_path), self.runs_path.open("ab") as file:
            file.write(json.dumps({name: facts}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.runs[name] = facts
        self._changed = True

    def keep(self, samples: set[int]) -> None:
        """Leave all other samples out of the store when it is assembled next.

        Parameters
        ----------
        samples : set of int
            Their numbers; those that the journal does not hold count for nothing.
        """
        for places in (self._stored, self._written):
            for sample in places.keys() - samples:
                del places[sample]
                self._changed = True

    def assemble(self, call: str, path: Path | None = None) -> None:
        """Write every sample so far into the store, in the design's order, in one step.

        Parameters
        ----------
        call : str
            The command or call, for the store's provenance.
        path : Path, optional
            Another place, for a grid that is still growing; then the journal stays what it was.

        Raises
        ------
        StoreError
            If there is no sample, or no space for them.
        """
        samples = sorted(self.samples)
        if not samples:
            raise StoreError("a grid without samples cannot be written", where=self.path)
        target = path or self.path
        if path is None and not self._changed:
            return
        part, old = target.with_name(target.name + ".part"), _swapped_out(target)
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
        blocks = (samples[first : first + CHUNK] for first in range(0, len(samples), CHUNK))
        with _writing(target):
            _write(part, len(samples), map(self._rows, blocks), self.about, self.runs, call)
            if target.exists():
                target.rename(old)
            part.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        if path is None:
            self._changed = False

    def _rows(self, samples: list[int]) -> NDArray[np.void]:
        """Some samples' records, from the journal's file and the store."""
        rows = np.zeros(len(samples), self._type)
        is_new = np.array([sample in self._written for sample in samples])
        if is_new.any():
            records = np.memmap(self.file_path, self._type, "r", offset=self._start, shape=(self._count,))
            rows[is_new] = records[[self._written[sample] for sample in samples if sample in self._written]]
        if self._grid is not None and not is_new.all():
            old = [sample for sample in samples if sample not in self._written]
            grid = self._grid.isel(sample=[self._stored[sample] for sample in old]).load()
            for name in ("sample", "simulation", "status", "iterations", *_ATMOSPHERE, *_LINES):
                rows[name][~is_new] = grid[name].values
            for column, (name, _, _) in enumerate(self.about.parameters):
                rows["parameters"][~is_new, column] = grid[f"parameter_{name}"].values
            rows["reason"][~is_new] = [self._reasons.get(str(sample), "").encode() for sample in old]
        return rows


def _write(
    path: Path,
    samples: int,
    blocks: Iterator[NDArray[np.void]],
    about: Description,
    runs: dict[str, dict[str, Any]],
    call: str,
) -> None:
    """Write records, `CHUNK` of them at a time, as a Zarr v3 store with consolidated metadata."""
    settings = json.dumps(about.fingerprint(), sort_keys=True)
    sources = {name: run["sha256"] for name, run in sorted(runs.items()) if "sha256" in run}
    group = zarr.create_group(
        path,
        zarr_format=3,
        attributes={
            "kind": "grid",
            "schema": SCHEMA,
            "title": "FlareField training grid",
            "height_zero": about.height_zero,
            "statistical_equilibrium": about.equilibrium,
            "maker": about.maker,
            "fingerprint": settings,
            **({"runs": json.dumps(runs, sort_keys=True)} if runs else {}),
            **provenance(call, {"settings": hashlib.sha256(settings.encode()).hexdigest(), **sources}),
        },
    )
    codec = BloscCodec(cname="zstd", clevel=9, shuffle="shuffle")
    columns: list[tuple[zarr.Array[Any], Callable[[NDArray[np.void]], NDArray[Any]]]] = []

    def put(name: str, values: NDArray[Any], dims: tuple[str, ...], **attributes: Any) -> None:  # noqa: ANN401
        group.create_array(
            name, data=values, chunks=values.shape, compressors=codec, dimension_names=dims,
            attributes=attributes,
        )  # fmt: skip

    def column(
        name: str,
        values: Callable[[NDArray[np.void]], NDArray[Any]],
        dims: tuple[str, ...] = (),
        **attributes: Any,  # noqa: ANN401
    ) -> None:
        like = values(np.zeros(1, _record_type(about)))
        array = group.create_array(
            name, shape=(samples, *like.shape[1:]), dtype=like.dtype,
            chunks=(min(CHUNK, samples), *like.shape[1:]), compressors=codec,
            dimension_names=("sample", *dims), attributes=attributes,
        )  # fmt: skip
        columns.append((array, values))

    def parameter(number: int) -> Callable[[NDArray[np.void]], NDArray[Any]]:
        return lambda rows: rows["parameters"][:, number]

    column("sample", itemgetter("sample"), long_name="index in the design")
    put(
        "height", np.array(about.heights), ("height",), units="Mm", long_name="height", zero=about.height_zero
    )
    put("mu", np.array(about.mu), ("mu",), units="1", long_name="cosine of the heliocentric angle")
    for line, rest in (("halpha", about.rest_halpha), ("ca8542", about.rest_ca8542)):
        put(
            f"wavelength_{line}", np.array(getattr(about, f"offsets_{line}")), (f"wavelength_{line}",),
            units="Angstrom", long_name=f"{_LINES[line]} wavelength from rest", rest_wavelength=rest,
            rest_wavelength_units="Angstrom", medium="vacuum",
        )  # fmt: skip
        column(
            line, itemgetter(line), ("mu", f"wavelength_{line}"),
            units=_LINE_UNITS, long_name=f"{_LINES[line]} intensity per wavelength",
        )  # fmt: skip
    for name, (units, long_name) in _ATMOSPHERE.items():
        column(name, itemgetter(name), ("height",), units=units, long_name=long_name)
    for number, (name, units, long_name) in enumerate(about.parameters):
        column(f"parameter_{name}", parameter(number), units=units, long_name=long_name)
    column("simulation", itemgetter("simulation"), long_name="simulation that the sample is a snapshot of")
    column(
        "status", lambda rows: rows["status"].astype(np.int8), long_name="how the synthesis ended",
        flag_values=list(range(len(STATUS))), flag_meanings=" ".join(STATUS),
    )  # fmt: skip
    column(
        "converged", lambda rows: rows["status"] == 0,
        long_name="populations converged: the sample may be used",
    )  # fmt: skip
    column("iterations", itemgetter("iterations"), long_name="iterations taken")
    failures: dict[str, str] = {}
    first = 0
    for rows in blocks:
        for array, values in columns:
            array[first : first + rows.size] = values(rows)
        failures |= {str(int(row["sample"])): row["reason"].decode() for row in rows if row["status"] != 0}
        first += rows.size
    group.attrs["failures"] = json.dumps(failures)
    with warnings.catch_warnings():
        # Consolidated metadata is not yet in the Zarr 3 specification; readers without it ignore it.
        warnings.filterwarnings("ignore", category=zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(path, zarr_format=3)


_DIMENSIONS = {
    "electron_density": ("sample", "height"),
    "temperature": ("sample", "height"),
    "velocity": ("sample", "height"),
    "halpha": ("sample", "mu", "wavelength_halpha"),
    "ca8542": ("sample", "mu", "wavelength_ca8542"),
    "simulation": ("sample",),
    "converged": ("sample",),
}


def open_grid(path: str | Path) -> xr.Dataset:
    """Open a grid store and check that it is one.

    Parameters
    ----------
    path : str or Path
        The store.

    Returns
    -------
    xarray.Dataset
        Lazily read. Dimensions ``sample, height, wavelength_halpha, wavelength_ca8542, mu``; wavelengths are
        offsets (Angstrom) from each coordinate's ``attrs["rest_wavelength"]``. Samples with ``converged``
        False carry the reason in ``attrs["failures"]`` (JSON, by sample) and may hold NaN.

    Raises
    ------
    StoreError
        If it is missing, unreadable, another kind of store, or lacks a variable.
    """
    path = Path(path)
    if not path.exists():
        raise StoreError("there is no such grid", where=path, remedy="make one with `flarefield grid`")
    try:
        grid: xr.Dataset = xr.open_zarr(path, decode_times=False, chunks=None)
    except Exception as error:
        raise StoreError(
            "this is not a readable Zarr store", where=path, found=f"{type(error).__name__}: {error}",
            expected="a grid store",
        ) from error  # fmt: skip
    if grid.attrs.get("kind") != "grid":
        raise StoreError(
            "this is not a grid",
            where=path,
            found=grid.attrs.get("kind", "a store of no stated kind"),
            expected="grid",
        )
    for name, dimensions in _DIMENSIONS.items():
        if name not in grid or grid[name].dims != dimensions:
            found = grid[name].dims if name in grid else "missing"
            raise StoreError(
                f"the grid's {name} is not as it should be", where=path, found=found, expected=dimensions
            )
    for line in _LINES:
        if "rest_wavelength" not in grid[f"wavelength_{line}"].attrs:
            raise StoreError(
                f"wavelength_{line} lacks its rest wavelength",
                where=path,
                expected="attribute rest_wavelength (Angstrom)",
            )
    return grid


def split(simulation: NDArray[np.integer[Any]] | Sequence[int]) -> NDArray[np.str_]:
    """Assign each sample to training, validation or test by its simulation.

    A simulation's samples stay together, and a simulation's place never changes as a grid grows: it follows
    from a hash (BLAKE2b) of its number alone. 80 % train, 10 % validate, 10 % test.

    Parameters
    ----------
    simulation : (sample,) array of int
        A grid's ``simulation``.

    Returns
    -------
    (sample,) array of str
        ``"train"``, ``"validation"`` or ``"test"``.
    """

    def place(number: int) -> str:
        digest = hashlib.blake2b(str(number).encode(), digest_size=8).digest()
        share = int.from_bytes(digest, "big") / 2.0**64
        return "train" if share < 0.8 else "validation" if share < 0.9 else "test"

    return np.array([place(int(number)) for number in np.asarray(simulation)], dtype="<U10")
