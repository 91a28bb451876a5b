"""The paper's released training data, ``DoublePicoGigaPickle50.pickle``, as a training grid.

The file is a pickle of what RADYN's F-CHROMA runs gave at the network's 50 heights: for every run its beam
(``beamSpectralIndex``, ``totalBeamEnergy``, ``cutoffEnergy``) and its number of snapshots (``nTime``); for
every snapshot ``temperature``, ``ne``, ``vel`` and the two lines, run after run. It was written by the public
code of Osborne, Armstrong & Fletcher 2019 (ApJ 873, 128, doi:10.3847/1538-4357/ab07b4): heights in cm,
velocities in cm/s (upflow positive), intensities in erg s-1 cm-2 sr-1 Angstrom-1 on RADYN's own wavelengths
(vacuum, Angstrom), cut to half-widths of 1.4 (H-alpha) and 1.0 Angstrom (Ca II 8542) and one point beyond
either end. Only one ray was kept, mu = 0.9531: a network trained on it alone knows no other angle.

A pickle can run any code. This one is read by an unpickler that knows the few names such a file holds, and
gives each a harmless stand-in of its own: nothing of torch's or NumPy's that a pickle can reach is called,
but for `torch.load` with ``weights_only=True`` on the storages that are nested in it.
"""

from __future__ import annotations

import copyreg
import io
import logging
import pickle
import re
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from distributed import Client
from numpy.typing import NDArray

from inn.layout import CA8542, HALPHA, HEIGHTS, LineWindow
from pipeline.cluster import ClusterConfig, LocalConfig, opened
from pipeline.errors import InputError
from pipeline.grids import store
from pipeline.grids.job import finished
from pipeline.grids.store import STATUS
from pipeline.progress import Progress
from pipeline.provenance import sha256_file

logger = logging.getLogger("flarefield")

Array = NDArray[np.float64]

PARAMETERS = (
    ("beam_spectral_index", "1", "spectral index of the electron beam"),
    ("beam_total_energy", "erg / cm2", "energy that the electron beam brings in all"),
    ("beam_cutoff_energy", "keV", "low-energy cutoff of the electron beam"),
    ("snapshot", "1", "number of the snapshot in its run, in the order of time"),
    ("microturbulence", "km / s", "microturbulent velocity"),
)
"""Name, units and meaning of what is stored with each sample."""
MICROTURBULENCE = 2.0
"""km/s, in all runs of RADYN (the paper, section 5); the file does not say it."""
_BEAM = ("beamSpectralIndex", "totalBeamEnergy", "cutoffEnergy")
_KEYS = ("line", "wavelength", "temperature", "ne", "vel", "z", "mu", "nTime", *_BEAM)
LINES = (HALPHA, CA8542)
"""The lines, in the file's order."""
HEIGHT_TOLERANCE = 1e-4
"""Mm within which the file's heights must be the network's: they are stored in single precision."""
REST_TOLERANCE = 0.01
"""Angstrom (0.5 km/s) within which all pairs of wavelengths must agree on the centre between them."""
LABORATORY_TOLERANCE = 0.5
"""Angstrom that a model atom's line may be off the laboratory's: less than from vacuum to air."""
LEAST_INTENSITY = 1e3
"""erg s-1 cm-2 sr-1 Angstrom-1 that every line of the Sun exceeds at some wavelength, by orders of magnitude:
profiles below it have been normalised."""


_MEMORY = "give the workers more memory (a few times the file's size), and run the same command again"


# What a pickle may hold


def _refused(found: str) -> InputError:
    return InputError(
        "the pickle holds more than data, and is not read: nothing in it was executed",
        found=found,
        expected="dictionaries, lists, texts, numbers, torch tensors and NumPy numbers",
        remedy="use the file as it was released with the paper",
    )


class _Type:
    """Stands in for a NumPy dtype: plain numbers only."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or re.fullmatch(r"[fiu][1248]|b1", code) is None:
            raise _refused(f"numpy.dtype({code!r})")
        self._code, self._order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise _refused(f"numpy.dtype with state {state!r}")
        self._order = state[1]

    def values(self, content: object) -> NDArray[Any]:
        """Numbers of this type from their bytes."""
        if not isinstance(content, bytes):
            raise _refused(f"NumPy values from {type(content).__name__}")
        return np.frombuffer(content, np.dtype(self._order + self._code))


class _Values:
    """Stands in for a NumPy array."""

    values: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _Type):
            raise _refused("a NumPy array without its type")
        self.values = kind.values(content).reshape(shape, order="F" if fortran else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:  # noqa: ANN401
        return np.array(self.values, dtype=dtype, copy=copy)


def _values(*_: object) -> _Values:
    return _Values()


def _number(kind: object, content: object) -> object:
    """A NumPy number."""
    if not isinstance(kind, _Type):
        raise _refused("a NumPy number without its type")
    (value,) = kind.values(content)
    return value


def _listed(kind: type[np.floating[Any]], values: object) -> NDArray[Any]:
    """A storage as torch before 1.0 pickled it: a list of its numbers."""
    if not isinstance(values, list):
        raise _refused(f"a torch storage of {type(values).__name__}")
    return np.array(values, kind)


def _float_storage(values: object) -> NDArray[Any]:
    return _listed(np.float32, values)


def _double_storage(values: object) -> NDArray[Any]:
    return _listed(np.float64, values)


def _nested_storage(content: object) -> NDArray[Any]:
    """A storage as torch from 1.0 pickles it: a file of its own, which torch would open without a check."""
    if not isinstance(content, bytes):
        raise _refused(f"a torch storage of {type(content).__name__}")
    try:
        storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as failure:
        # Damaged and hostile storages fail in as many ways as a pickle has; all of them mean the same here.
        named = re.search(r"GLOBAL ([\w.]+)", str(failure))
        raise _refused(
            f"{named[1]} in a nested torch storage" if named else "a nested torch storage that is none"
        ) from failure
    if not isinstance(storage, torch.TypedStorage) or storage.dtype not in (torch.float32, torch.float64):
        raise _refused(f"{type(storage).__name__} where a torch storage of floating-point numbers belongs")
    values: NDArray[Any] = torch.tensor([], dtype=storage.dtype).set_(storage).numpy()
    return values


def _tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> NDArray[Any]:
    """A tensor of one dimension: the file holds no others."""
    if not isinstance(storage, np.ndarray) or not isinstance(offset, int) or not isinstance(size, tuple):
        raise _refused("a torch tensor without a storage")
    if len(size) != 1 or stride != (1,) or not 0 <= offset <= offset + size[0] <= storage.size:
        raise _refused(f"a torch tensor of shape {size}, stride {stride} from {offset} of {storage.size}")
    return storage[offset : offset + size[0]]


_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): dict,  # a tensor's hooks, of which there are none
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Values,
    ("numpy.core.multiarray", "_reconstruct"): _values,
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy._core.multiarray", "_reconstruct"): _values,
    ("numpy._core.multiarray", "scalar"): _number,
    ("torch", "DoubleStorage"): _double_storage,
    ("torch", "FloatStorage"): _float_storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _nested_storage,
}


class _Unpickler(pickle.Unpickler):
    """Builds what :data:`_ADMITTED` names, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - what the pickle calls
        if (module, name) not in _ADMITTED:
            raise _refused(f"{module}.{name}")
        return _ADMITTED[module, name]


def _unpickle(path: Path) -> Any:  # noqa: ANN401 - the file may hold anything
    # Numbers may stand for names; those that some library has registered, and that were used before, would
    # bypass find_class.
    copyreg.clear_extension_cache()
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, of its own typed storages
            return _Unpickler(file).load()
    except InputError as error:
        raise InputError(
            error.problem, where=path, found=error.found, expected=error.expected, remedy=error.remedy
        ) from error
    except OSError as error:
        raise InputError("the file cannot be read", where=path, found=error) from error
    except Exception as failure:
        # Damaged files fail in as many ways as a pickle has.
        raise InputError(
            "the file is cut short, or is not a pickle",
            where=path,
            found=f"{path.stat().st_size} bytes; {type(failure).__name__}: {failure}",
            expected="DoublePicoGigaPickle50.pickle as it was released",
            remedy="download it again and compare its size",
        ) from failure


# What it means


@dataclass(frozen=True)
class Run:
    """One run of RADYN in the file.

    Attributes
    ----------
    simulation : int
        Number of its beam: runs of equal beams share it, so that a split never parts them.
    first, count : int
        Its snapshots, as positions in the file's lists.
    beam : tuple of float
        Spectral index, total energy (erg cm-2), cutoff energy (keV).
    """

    simulation: int
    first: int
    count: int
    beam: tuple[float, float, float]


@dataclass(frozen=True)
class Contents:
    """What the file says but its profiles and atmospheres.

    Attributes
    ----------
    sha256 : str
        Of the file.
    mu : float
        Cosine of the heliocentric angle of all profiles.
    wavelengths : pair of tuples of float
        Vacuum, Angstrom; H-alpha, Ca II 8542.
    rest : pair of float
        Rest wavelengths, vacuum, Angstrom.
    rest_from : str
        Where the rest wavelengths come from.
    runs : tuple of Run
    """

    sha256: str
    mu: float
    wavelengths: tuple[tuple[float, ...], tuple[float, ...]]
    rest: tuple[float, float]
    rest_from: str
    runs: tuple[Run, ...]

    @property
    def samples(self) -> int:
        """Number of snapshots."""
        return sum(run.count for run in self.runs)

    @property
    def simulations(self) -> int:
        """Number of different beams."""
        return len({run.simulation for run in self.runs})


@dataclass(frozen=True, eq=False)
class _Data:
    """The whole file, in the grid's units: atmospheres (samples, 50), lines (samples, wavelengths)."""

    contents: Contents
    electron_density: NDArray[np.float32]
    temperature: NDArray[np.float32]
    velocity: NDArray[np.float32]
    lines: tuple[NDArray[np.float32], NDArray[np.float32]]


def _unlike(path: Path, key: str, found: object, expected: str) -> InputError:
    return InputError(
        "this is not the paper's training data",
        where=f"{path}: {key}",
        found=found,
        expected=expected,
        remedy="use DoublePicoGigaPickle50.pickle as it was released",
    )


def _rows(path: Path, key: str, values: object, width: int) -> NDArray[np.float32]:
    """A list of tensors as rows of one array."""
    if not isinstance(values, list) or {np.shape(value) for value in values} != {(width,)}:
        raise _unlike(path, key, type(values).__name__, f"a list of tensors of {width} numbers")
    return np.stack(values).astype(np.float32)


def _numbers(path: Path, key: str, values: object) -> Array:
    """A list of numbers, or of texts that begin with one (``"20kev"``)."""
    found = []
    for value in values if isinstance(values, list | tuple) else np.atleast_1d(np.asarray(values)):
        match = re.match(r"\s*([-+.\deE]+)", str(value))
        try:
            found.append(float(match[1].rstrip("eE") if match else ""))
        except ValueError as error:
            raise _unlike(path, key, repr(value), "a list of numbers") from error
    return np.array(found)


def rest_wavelength(wavelengths: Array, line: LineWindow) -> tuple[float, str]:
    """Rest wavelength of a line on RADYN's own wavelength axis, and where it is from.

    RADYN's frequencies lie evenly on both sides of the line's. Where the file's do, their centre is the model
    atom's rest wavelength; it may differ from the laboratory's by some km/s. Where they do not, it is the
    laboratory's.

    Parameters
    ----------
    wavelengths : array, shape (n,)
        Vacuum, Angstrom, ascending.
    line : LineWindow
        The line, for its laboratory wavelength.

    Returns
    -------
    rest : float
        Vacuum, Angstrom.
    origin : str
        ``"centre of the file's frequencies"`` or ``"laboratory"``.
    """
    centres = 2.0 / (1.0 / wavelengths + 1.0 / wavelengths[::-1])
    if np.ptp(centres) < REST_TOLERANCE:
        return float(np.mean(centres)), "centre of the file's frequencies"
    return line.rest_wavelength, "laboratory"


def _runs(path: Path, content: dict[str, Any]) -> tuple[Run, ...]:
    counts = _numbers(path, "nTime", content["nTime"])
    beams = np.stack([_numbers(path, key, content[key]) for key in _BEAM], axis=-1)
    if len(beams) != counts.size or not counts.size or (counts < 1).any() or (counts % 1 != 0).any():
        raise _unlike(path, "nTime", f"{counts.size} runs", "each run's number of snapshots and its beam")
    # Numbered by their beams in ascending order: no matter in which order runs came into the file.
    _, simulation = np.unique(beams, axis=0, return_inverse=True)
    firsts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return tuple(
        Run(int(number), int(first), int(count), (float(beam[0]), float(beam[1]), float(beam[2])))
        for number, first, count, beam in zip(simulation.ravel(), firsts, counts, beams, strict=True)
    )


def _interpret(path: Path, sha256: str, content: object) -> _Data:
    if not isinstance(content, dict):
        raise _unlike(path, "the file", type(content).__name__, "a dictionary")
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise _unlike(path, "the file", f"no {', '.join(missing)}", ", ".join(_KEYS))
    heights = np.asarray(content["z"], dtype=np.float64) / 1e8
    if heights.shape != HEIGHTS.shape or not np.allclose(heights, HEIGHTS, rtol=0, atol=HEIGHT_TOLERANCE):
        raise _unlike(
            path, "z", f"{heights.size} heights, {heights.min():g} to {heights.max():g} Mm",
            f"the network's {HEIGHTS.size}, {HEIGHTS[0]:g} to {HEIGHTS[-1]:g} Mm, in cm",
        )  # fmt: skip
    mu = np.unique(_numbers(path, "mu", content["mu"]))
    if mu.size != 1 or not 0.0 < mu[0] <= 1.0:
        raise _unlike(path, "mu", mu, "one ray for both lines")
    wavelengths, rests = [], []
    for line, stored in zip(LINES, content["wavelength"], strict=True):
        axis = np.asarray(stored, dtype=np.float64)
        if axis.ndim != 1 or axis.size < 3 or not (np.diff(axis) > 0).all():
            raise _unlike(path, "wavelength", f"shape {axis.shape}", f"ascending wavelengths of {line.name}")
        rest = rest_wavelength(axis, line)
        if abs(rest[0] - line.rest_wavelength) > LABORATORY_TOLERANCE:
            raise _unlike(
                path, "wavelength", f"{line.name} at {rest[0]:.2f} Angstrom",
                f"{line.rest_wavelength:.2f} Angstrom, in vacuum",
            )  # fmt: skip
        wavelengths.append(axis)
        rests.append(rest)
    runs = _runs(path, content)
    data = _Data(
        Contents(
            sha256=sha256,
            mu=float(mu[0]),
            wavelengths=(tuple(wavelengths[0].tolist()), tuple(wavelengths[1].tolist())),
            rest=(rests[0][0], rests[1][0]),
            rest_from="; ".join(f"{line.name}: {rest[1]}" for line, rest in zip(LINES, rests, strict=True)),
            runs=runs,
        ),
        electron_density=_rows(path, "ne", content["ne"], HEIGHTS.size),
        temperature=_rows(path, "temperature", content["temperature"], HEIGHTS.size),
        velocity=_rows(path, "vel", content["vel"], HEIGHTS.size) / np.float32(1e5),
        lines=(
            _rows(path, "line", content["line"][0], wavelengths[0].size),
            _rows(path, "line", content["line"][1], wavelengths[1].size),
        ),
    )
    lengths = {len(data.electron_density), len(data.temperature), len(data.velocity), *map(len, data.lines)}
    if lengths != {data.contents.samples}:
        raise _unlike(path, "line, ne, temperature, vel", sorted(lengths), f"{data.contents.samples} of each")
    brightest = max(float(np.nanmax(values)) for values in data.lines)
    if not brightest > LEAST_INTENSITY:
        raise _unlike(
            path, "line", f"at most {brightest:g}", "intensities in erg s-1 cm-2 sr-1 Angstrom-1, as released"
        )
    return data


@lru_cache(maxsize=1)
def _read(path: Path, size: int, changed: int) -> _Data:
    """The file, once per process as long as it does not change."""
    digest = sha256_file(path)
    content = _unpickle(path)
    try:
        return _interpret(path, digest, content)
    except (TypeError, ValueError, IndexError, KeyError) as failure:
        raise _unlike(
            path, "the file", f"{type(failure).__name__}: {failure}", "lists as the paper's code writes them"
        ) from failure


_READING = Lock()


def _data(path: Path) -> _Data:
    with _READING:  # a worker's threads would each unpickle it
        status = path.stat()
        return _read(path, status.st_size, status.st_mtime_ns)


def read_contents(path: str | Path) -> Contents:
    """Read what the released file says of itself; the whole file is unpickled, safely.

    Parameters
    ----------
    path : str or Path
        The pickle.

    Returns
    -------
    Contents

    Raises
    ------
    InputError
        It is missing, cut short, holds anything that could be executed, or is not the paper's data.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise InputError("there is no such file", where=path, remedy="give DoublePicoGigaPickle50.pickle")
    return _data(path).contents


# The grid


def description(contents: Contents, name: str) -> store.Description:
    """What the grid holds and everything that decides its numbers.

    Parameters
    ----------
    contents : Contents
        Of the file.
    name : str
        The file's name.

    Returns
    -------
    Description
        Its wavelengths are the file's, from the rest wavelengths of `contents`.
    """
    offsets = [
        tuple(float(value) for value in np.asarray(axis) - rest)
        for axis, rest in zip(contents.wavelengths, contents.rest, strict=True)
    ]
    return store.Description(
        parameters=PARAMETERS,
        heights=tuple(float(height) for height in HEIGHTS),
        mu=(contents.mu,),
        offsets_halpha=offsets[0],
        offsets_ca8542=offsets[1],
        rest_halpha=contents.rest[0],
        rest_ca8542=contents.rest[1],
        maker={
            "name": "published",
            "source": "Osborne, Armstrong & Fletcher 2019, doi:10.3847/1538-4357/ab07b4",
            "file": name,
            "sha256": contents.sha256,
            "rest_wavelengths": contents.rest_from,
        },
        height_zero="RADYN's own: tau_500 = 1 of its starting atmosphere, VAL3C",
        equilibrium=(
            "Time-dependent populations of RADYN's radiation hydrodynamics (F-CHROMA grid, electron beams), "
            "complete redistribution."
        ),
    )


@dataclass(frozen=True)
class RunTask:
    """One run of the file; small enough to travel.

    Attributes
    ----------
    source : Path
        The file, where the worker sees it.
    sha256 : str
        What it must hold.
    run : Run
        Which.
    """

    source: Path
    sha256: str
    run: Run


def run_task(task: RunTask) -> list[store.Record]:
    """Samples of one run; runs on a worker, which unpickles the file once.

    Parameters
    ----------
    task : RunTask
        Which run of which file.

    Returns
    -------
    list of Record
        One for each snapshot. What is not physical is kept, marked as not converged.

    Raises
    ------
    InputError
        The worker sees another file, or none.
    """
    read_contents(task.source)
    data = _data(task.source)
    if data.contents.sha256 != task.sha256:
        raise InputError(
            "the file changed, or the worker sees another one",
            where=task.source,
            found=f"SHA-256 {data.contents.sha256}",
            expected=f"SHA-256 {task.sha256}",
            remedy="put it where all workers see the same, and leave it alone until the grid is made",
        )
    return [_record(data, task.run, snapshot) for snapshot in range(task.run.count)]


def _record(data: _Data, run: Run, snapshot: int) -> store.Record:
    sample = run.first + snapshot
    atmosphere = {
        name: getattr(data, name)[sample].astype(np.float64)
        for name in ("electron_density", "temperature", "velocity")
    }
    halpha, ca8542 = (values[sample : sample + 1].astype(np.float64) for values in data.lines)
    positive = (atmosphere["electron_density"], atmosphere["temperature"], halpha, ca8542)
    whole = np.isfinite(atmosphere["velocity"]).all() and all(
        bool((np.isfinite(values) & (values > 0)).all()) for values in positive
    )
    return store.Record(
        sample=sample,
        simulation=run.simulation,
        parameters=(*run.beam, float(snapshot), MICROTURBULENCE),
        halpha=halpha,
        ca8542=ca8542,
        status=STATUS.index("converged" if whole else "numerical_failure"),
        iterations=0,
        reason="" if whole else "the file holds values that are not finite, or not positive",
        **atmosphere,
    )


def make_published_grid(
    source: str | Path,
    path: str | Path,
    *,
    cluster: ClusterConfig | Client | None = None,
    call: str | None = None,
) -> Path:
    """Make a training grid of the paper's released training data, on a Dask cluster.

    Every worker unpickles the file once, and nothing in it is executed; each of its half a million nested
    storages is opened by itself, which takes some minutes. Finished samples are appended to a journal beside
    the store; running the same call again does what is missing. Snapshots of equal beams are one simulation,
    whatever their place in the file. Wavelengths and intensities are the file's: neither interpolated nor
    normalised.

    Parameters
    ----------
    source : str or Path
        ``DoublePicoGigaPickle50.pickle``, where all workers see it.
    path : str or Path
        The grid store (Zarr v3).
    cluster : ClusterConfig or distributed.Client, optional
        Where to run; by default one worker on this machine, because to read the file is nearly all the work.
    call : str, optional
        The command or call, for the store's provenance.

    Returns
    -------
    Path
        The store. Its wavelengths are offsets from the rest wavelengths of RADYN's atoms, where the file
        shows them (``rest_wavelength``), its only ``mu`` the file's, and its parameters are
        :data:`PARAMETERS`. Snapshots with values that are not physical are kept, marked as not converged.

    Raises
    ------
    InputError
        The file is missing, cut short, holds anything that could be executed, or is not the paper's data.
    MisuseError
        `path` is something else, or a grid that was made of another file.
    ClusterError
        Workers died again and again.
    """
    source, path = Path(source).resolve(), Path(path)
    if not source.is_file():
        raise InputError("there is no such file", where=source, remedy="give DoublePicoGigaPickle50.pickle")
    call = call or f"make_published_grid({str(source)!r}, {str(path)!r})"
    with ExitStack() as stack:
        client = stack.enter_context(opened(LocalConfig(workers=1) if cluster is None else cluster))
        logger.info("reading %s (%.0f MB)", source, source.stat().st_size / 1e6)
        ((_, contents),) = finished(client, read_contents, [source], name=str, where=source, remedy=_MEMORY)
        journal = stack.enter_context(store.Journal(path, description(contents, source.name)))
        journal.add_run(source.name, {"sha256": contents.sha256})
        missing = [
            run
            for run in contents.runs
            if not journal.samples.issuperset(range(run.first, run.first + run.count))
        ]
        done = contents.samples - sum(run.count for run in missing)
        progress = stack.enter_context(Progress("converting", contents.samples, "snapshots", done=done))
        tasks = (RunTask(source, contents.sha256, run) for run in missing)
        for task, records in finished(
            client,
            run_task,
            tasks,
            name=lambda task: f"run of {task.run.count} from {task.run.first}",
            where=source,
            window=2 * max(len(client.nthreads()), 1),
            remedy=_MEMORY,
        ):
            journal.extend(records)
            progress.advance(task.run.count)
        journal.assemble(call)
    return path
