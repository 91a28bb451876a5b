"""Training grids from RADYN: what its runs hold, as the F-CHROMA project distributes them, and the Dask job.

RADYN solves the hydrodynamics of a flare loop together with time-dependent populations and radiative transfer
(Carlsson & Stein 1992, ApJ 397, L59, doi:10.1086/186544; Allred et al. 2015, ApJ 809, 104,
doi:10.1088/0004-637X/809/1/104). A run is one CDF file, ``radyn_out.val3c_d3_1.0e11_t20s_10kev_fp``: an
atmosphere that an electron beam heats, 50 s of it every 0.1 s. Osborne, Armstrong & Fletcher 2019 (ApJ 873,
128, doi:10.3847/1538-4357/ab07b4) trained on 81 of them, at one ray. Files are read with `radynpy`, whose
``var_info`` explains every variable.

*Frequencies.* ``q`` counts them from the line's own frequency in typical Doppler widths, which are given as
a velocity, ``qnorm`` (km/s): ``nu = nu0 (1 + q qnorm / c)``. Hence the wavelength is
``alamb / (1 + q qnorm / c)``. ``q`` ascends, so wavelengths descend, and are reversed here.

*Intensities.* ``outint`` is per frequency, in cgs units. Times ``|d nu / d lambda| = c / lambda**2``, with
the wavelength in Angstrom and the speed of light in Angstrom per second, it is per Angstrom. Index 0 along
its frequencies is no frequency but the intensity of the continuum; 1 to ``nq`` are those of the line. The
paper's data are the sum of both, and so is a grid unless it is asked for without. If ``outint`` were the
whole intensity already, the sum would count the continuum twice. That would show: in the far wings of a quiet
atmosphere, which a run begins with, both would be alike. Their ratio is stored with each run, and reported if
it is so.

*Heights.* Depth index 0 is the top. Temperature, electron density and velocity are interpolated linearly in
height, as in the paper; a snapshot that does not reach all heights is not used. Velocities are along
the loop, positive upwards: the line of gas that moves with ``v`` lies at ``q = mu v / qnorm``, to the blue.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from distributed import Client
from numpy.typing import ArrayLike, NDArray

from inn.layout import CA8542, HALPHA, HEIGHTS, LineWindow
from pipeline.cluster import ClusterConfig, LocalConfig, opened
from pipeline.errors import InputError, MisuseError
from pipeline.grids import store
from pipeline.grids.job import finished
from pipeline.grids.store import STATUS
from pipeline.progress import Progress
from pipeline.provenance import sha256_file
from pipeline.spectra import sampling_matrix

Array = NDArray[np.float64]

TRANSITIONS: dict[str, tuple[int, LineWindow]] = {"halpha": (4, HALPHA), "ca8542": (20, CA8542)}
"""Index ``kr`` of each line among RADYN's transitions, counted from 0, and what line it has to be."""
PARAMETERS = (
    ("beam_spectral_index", "1", "spectral index of the electron beam"),
    ("beam_total_energy", "erg / cm2", "energy that the electron beam brings in all"),
    ("beam_cutoff_energy", "keV", "low-energy cutoff of the electron beam"),
    ("beam_duration", "s", "duration of the electron beam's pulse"),
    ("time", "s", "time since the run's beginning"),
    ("microturbulence", "km / s", "microturbulent velocity, the same at all heights"),
)
"""Name, units and meaning of what is stored with each sample; NaN where a file's name does not say it."""
MICROTURBULENCE = 2.0
"""km/s: RADYN's (Osborne, Armstrong & Fletcher 2019, section 5), where a file does not hold it."""
LABORATORY_TOLERANCE = 0.5
"""Angstrom that a model atom's line may be off the laboratory's: less than from vacuum to air."""
REST_TOLERANCE = 1e-3
"""Angstrom within which all runs of a grid must agree on the rest wavelength: they share the model atom."""
WAVELENGTH_TOLERANCE = 1e-4
"""Angstrom within which two wavelengths are the same."""
MU_TOLERANCE = 1e-4
"""Difference up to which two rays are the same."""
HEIGHT_TOLERANCE = 1e-3
"""Mm that a height may lie outside a snapshot; the value at its end is taken."""
DURATION = 50.0
"""Seconds that every run of F-CHROMA's lasts."""
FINISHED = 0.99
"""Share of the time that a run should last which it must reach to count as finished."""
SNAPSHOT_BITS = 20
"""Bits of a sample's number that count its snapshot; those above are its simulation."""
_NAME = re.compile(
    r"radyn_out\.[^_]+_d(?P<index>[\d.]+)_(?P<energy>[\d.]+(?:e[+-]?\d+)?)_t(?P<duration>[\d.]+)s"
    r"_(?P<cutoff>[\d.]+)kev_[^_]+",
    re.IGNORECASE,
)
_ONE_RUN = Lock()  # a run's intensities are hundreds of megabytes: a worker holds those of one at a time


@dataclass(frozen=True)
class Axes:
    """Rays and wavelengths that all runs of a grid share.

    Attributes
    ----------
    mu : tuple of float
        Cosines of the heliocentric angle, ascending.
    offsets : dict of str to tuple of float
        Each line's wavelengths from rest, Angstrom, ascending.
    rest : dict of str to float
        Each line's rest wavelength in the model atom, vacuum, Angstrom.
    """

    mu: tuple[float, ...]
    offsets: dict[str, tuple[float, ...]]
    rest: dict[str, float]


@dataclass(frozen=True)
class RunTask:
    """One run to read; small enough to travel.

    Attributes
    ----------
    path : str
        Its file.
    axes : Axes
        The grid's.
    heights : tuple of float
        The grid's, Mm.
    stride : int
        Every how many snapshots one is taken, from the first.
    continuum : bool
        Whether the continuum term is added.
    known : str or None
        SHA-256 of the file when its run was read before: the same file is not read again.
    """

    path: str
    axes: Axes
    heights: tuple[float, ...]
    stride: int
    continuum: bool
    known: str | None


@dataclass(frozen=True)
class Run:
    """One run that was read.

    Attributes
    ----------
    facts : dict
        What the grid store keeps of it (JSON values).
    records : list of Record
        Its samples; empty if the file is the one that was read before.
    """

    facts: dict[str, Any]
    records: list[store.Record]


@dataclass(frozen=True)
class RunReport:
    """What became of one run.

    Attributes
    ----------
    name : str
        Its file's name, without ``.cdf``.
    state : str
        ``"read"``, ``"kept"`` (read by an earlier call) or ``"refused"``.
    snapshots, failed : int
        Snapshots in the grid, and those among them that cannot be used.
    ends : float
        Time of the last snapshot in the file, s.
    notes : tuple of str
        What a person should know of it.
    """

    name: str
    state: str
    snapshots: int
    failed: int
    ends: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class RadynReport:
    """What became of every run that was asked for.

    Attributes
    ----------
    path : Path
        The grid store.
    runs : tuple of RunReport
        By name.
    """

    path: Path
    runs: tuple[RunReport, ...]

    @property
    def complete(self) -> bool:
        """Whether no run was refused."""
        return all(run.state != "refused" for run in self.runs)

    def summary(self) -> str:
        """Some lines of text: totals, then every run that has something to say.

        Returns
        -------
        str
        """
        states = [run.state for run in self.runs]
        counts = ", ".join(f"{states.count(state)} {state}" for state in ("read", "kept", "refused"))
        snapshots = sum(run.snapshots for run in self.runs)
        failed = sum(run.failed for run in self.runs)
        lines = [
            f"{self.path}: {len(states)} runs ({counts}), {snapshots} snapshots, {failed} not to be used"
        ]
        for run in self.runs:
            notes = list(run.notes)
            if run.failed:
                notes.append(f"{run.failed} of {run.snapshots} snapshots are not to be used")
            lines += [f"  {run.name}: {'; '.join(notes)}"] if notes else []
        return "\n".join(lines)


# What a file holds


def run_name(path: str | Path) -> str:
    """Name of the run in a file: the file's own, without ``.cdf``.

    Parameters
    ----------
    path : str or Path
        The file; it need not exist.

    Returns
    -------
    str
    """
    return re.sub(r"\.cdf$", "", Path(path).name, flags=re.IGNORECASE)


def simulation_number(name: str) -> int:
    """A run's number in every grid, below ``2**32``: it follows from its name alone (BLAKE2b).

    It does not change as runs are added, left out or given in another order, and with it neither does the
    part of a split that the run belongs to.

    Parameters
    ----------
    name : str
        The run's, as `run_name` gives it.

    Returns
    -------
    int
        The grid's ``simulation``.
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")


def beam(name: str) -> tuple[float, float, float, float]:
    """Spectral index, total energy (erg cm-2), cutoff (keV) and duration (s) of a run's electron beam.

    Parameters
    ----------
    name : str
        The run's. Names of F-CHROMA's form, ``radyn_out.<atmosphere>_d<index>_<energy>_t<duration>s_
        <cutoff>kev_<kind>``, say them; for others they are NaN.

    Returns
    -------
    tuple of float
        Spectral index (power law), erg cm-2, keV, s.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return (np.nan,) * 4
    index, energy, cutoff, duration = (float(match[key]) for key in ("index", "energy", "cutoff", "duration"))
    return index, energy, cutoff, duration


class RunFile:
    """One RADYN run, read as it is asked for.

    Parameters
    ----------
    path : str or Path
        The CDF file.

    Raises
    ------
    MisuseError
        `radynpy` is not installed.
    InputError
        The file cannot be read or is not a RADYN run.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from radynpy.cdf import LazyRadynData
        except ImportError as error:
            raise MisuseError(
                "RADYN runs are read with radynpy, which is not installed",
                remedy="pip install 'flarefield[radyn]'",
            ) from error
        self.path = path
        try:
            # Names are read by `beam`: radynpy refuses those that have another form.
            self._data: Any = LazyRadynData(str(path), parseFilenameParams=False)
        except MemoryError:
            raise
        except Exception as error:
            raise self._damaged("it", error) from error
        self.time: Array = np.atleast_1d(self._read("time")).astype(np.float64)
        self.mu: Array = np.atleast_1d(self._read("zmu")).astype(np.float64)
        if not ((self.mu > 0) & (self.mu <= 1)).all() or np.unique(self.mu).size != self.mu.size:
            raise self._refused("its rays are not what they should be", self.mu, "different mu in (0, 1]")

    def _refused(self, problem: str, found: object, expected: object) -> InputError:
        return InputError(problem, where=self.path, found=found, expected=expected)

    def _damaged(self, what: str, error: Exception) -> InputError:
        return InputError(
            f"{what} cannot be read: the file is cut short, damaged, or not of RADYN",
            where=self.path,
            found=f"{type(error).__name__}: {error}",
            expected="RADYN's output as a CDF file",
            remedy="copy or download the file again",
        )

    def _read(self, name: str) -> NDArray[Any]:
        """A variable; its first dimension is time where it has one."""
        try:
            return np.asarray(getattr(self._data, name))
        except MemoryError:
            raise
        except Exception as error:
            # Damaged files fail in as many ways as the format has.
            raise self._damaged(f"variable {name}", error) from error

    def _with_time(self, name: str, dimensions: int) -> NDArray[Any]:
        """A variable (time, ...) of some dimensions; versions of cdflib drop those of length one."""
        values = self._read(name)
        return values[None] if self.time.size == 1 and values.ndim < dimensions else values

    def wavelengths(self, line: str) -> tuple[Array, float]:
        """Wavelengths of a line, ascending, and its rest wavelength: vacuum, Angstrom.

        Parameters
        ----------
        line : str
            ``"halpha"`` or ``"ca8542"``.

        Returns
        -------
        (wavelengths,) array, float

        Raises
        ------
        InputError
            The transition is not this line, or its frequencies are not what they should be.
        """
        kr, window = TRANSITIONS[line]
        rests, bound_free, numbers = (np.atleast_1d(self._read(name)) for name in ("alamb", "cont", "nq"))
        if kr >= rests.size:
            raise self._refused(
                f"it has no transition kr = {kr}, {line}",
                f"{rests.size} transitions",
                f"{window.rest_wavelength} Angstrom",
            )
        rest = float(rests[kr])
        if bound_free[kr] or not abs(rest - window.rest_wavelength) <= LABORATORY_TOLERANCE:
            raise self._refused(
                f"transition kr = {kr} is not {line}",
                f"{rest:.2f} Angstrom" + (", a continuum" if bound_free[kr] else ""),
                f"{window.rest_wavelength} Angstrom (vacuum)",
            )
        q = self._read("q")[: int(numbers[kr]), kr].astype(np.float64)
        if q.size < 3 or not (np.diff(q) > 0).all() or not q[0] < 0 < q[-1]:
            raise self._refused(
                f"the frequencies of {line} are not what they should be",
                f"{q.size} from {q.min(initial=np.inf):g} to {q.max(initial=-np.inf):g} Doppler widths",
                "three or more, ascending, on both sides of the line",
            )
        wavelength = rest / (q * self._data.qnorm * 1e5 / self._data.cc + 1.0)
        return wavelength[::-1], rest

    def axes(self) -> Axes:
        """The run's own rays and wavelengths.

        Returns
        -------
        Axes
            mu ascending; wavelengths in Angstrom from each line's rest wavelength in the model atom.

        Raises
        ------
        InputError
            A transition is not the line it has to be.
        """
        offsets, rest = {}, {}
        for line in TRANSITIONS:
            wavelength, rest[line] = self.wavelengths(line)
            offsets[line] = tuple(float(offset) for offset in wavelength - rest[line])
        return Axes(tuple(float(mu) for mu in np.sort(self.mu)), offsets, rest)

    def intensities(self, chosen: slice, continuum: bool = True) -> tuple[dict[str, Array], dict[str, float]]:
        """Both lines at the run's own wavelengths.

        Parameters
        ----------
        chosen : slice
            Snapshots.
        continuum : bool
            Whether ``outint[:, 0]`` is added.

        Returns
        -------
        dict of str to (time, mu, wavelength) array
            erg s-1 cm-2 sr-1 Angstrom-1; mu and wavelengths ascending.
        dict of str to float
            Each line's continuum term over its intensity without it in the far wings, nearest disc centre, in
            the first snapshot.
        """
        outint = self._with_time("outint", 4)
        if self.mu.size == 1 and outint.ndim < 4:
            outint = outint[:, :, None]
        order = np.argsort(self.mu)
        lines, shares = {}, {}
        for line, (kr, _) in TRANSITIONS.items():
            wavelength = self.wavelengths(line)[0]
            frequencies, rays, transitions = outint.shape[1:] if outint.ndim == 4 else (0, 0, 0)
            if frequencies <= wavelength.size or rays != self.mu.size or transitions <= kr:
                raise self._refused(
                    "outint is not what it should be",
                    f"dimensions {outint.shape}",
                    f"time, {wavelength.size + 1} frequencies or more, {self.mu.size} rays, transitions",
                )
            # (time, frequency, mu) -> (time, mu, wavelength)
            per_frequency = np.moveaxis(outint[chosen, : wavelength.size + 1, :, kr], 1, 2)
            per_frequency = per_frequency[:, order].astype(np.float64)
            term, profile = per_frequency[..., :1], per_frequency[..., :0:-1]
            with np.errstate(all="ignore"):  # a first snapshot may hold anything
                shares[line] = float(term[0, -1, 0] / profile[0, -1, [0, -1]].mean())
            light = self._data.cc * 1e8  # Angstrom / s
            lines[line] = (profile + term if continuum else profile) * light / wavelength**2
        return lines, shares

    def atmospheres(self, chosen: slice) -> tuple[Array, Array, Array, Array]:
        """The atmosphere at the run's own depths, which move with time.

        Parameters
        ----------
        chosen : slice
            Snapshots.

        Returns
        -------
        height, electron_density, temperature, velocity : (time, depth) arrays
            Mm, cm-3, K and km/s (upflow positive); bottom first.

        Raises
        ------
        InputError
            The variables have other dimensions.
        """
        scales = {"z1": 1e-8, "ne1": 1.0, "tg1": 1.0, "vz1": 1e-5}
        shapes = {name: self._with_time(name, 2).shape[1:] for name in scales}
        if len(set(shapes.values())) > 1 or len(shapes["z1"]) != 1:
            raise self._refused("its atmosphere is not what it should be", shapes, "(time, depth) each")
        z, ne, t, v = (
            self._with_time(name, 2)[chosen, ::-1].astype(np.float64) * scale
            for name, scale in scales.items()
        )
        return z, ne, t, v

    def snapshots(self) -> int:
        """Snapshots that every variable holds: a run that was stopped while it wrote may lack some.

        Returns
        -------
        int
            The first so many are whole.
        """
        dimensions = {"time": 1, "z1": 2, "ne1": 2, "tg1": 2, "vz1": 2, "outint": 4}
        return min(len(self._with_time(name, number)) for name, number in dimensions.items())

    def microturbulence(self) -> tuple[float, str | None]:
        """Microturbulent velocity (km/s), the median over depth, and what there is to say of it.

        Returns
        -------
        velocity : float
            km/s; :data:`MICROTURBULENCE` where the file does not hold it.
        note : str or None
        """
        try:
            values = np.atleast_1d(getattr(self._data, "vturb")) * 1e-5  # noqa: B009 - it may be missing
        except ValueError:  # cdflib's, of a name that is not in the file
            return (
                MICROTURBULENCE,
                f"the file does not hold vturb: RADYN's {MICROTURBULENCE:g} km/s is stored",
            )
        value = float(np.median(values))
        return value, None if np.allclose(values, value) else "vturb varies with height: its median is stored"

    def iterations(self) -> NDArray[np.int64]:
        """Iterations that each snapshot took; zeros where the file does not say.

        Returns
        -------
        (time,) array of int
        """
        try:
            return np.atleast_1d(getattr(self._data, "iiter")).astype(np.int64)  # noqa: B009
        except ValueError:
            return np.zeros(self.time.size, np.int64)


def _same_rays(one: Axes, other: Axes) -> bool:
    return len(one.mu) == len(other.mu) and np.allclose(one.mu, other.mu, rtol=0, atol=MU_TOLERANCE)


def _same_atoms(one: Axes, other: Axes) -> bool:
    return all(abs(one.rest[line] - other.rest[line]) <= REST_TOLERANCE for line in TRANSITIONS)


def _same_wavelengths(one: Axes, other: Axes) -> bool:
    return all(_same_points(one.offsets[line], other.offsets[line]) for line in TRANSITIONS)


def _same_points(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and np.allclose(one, other, rtol=0, atol=WAVELENGTH_TOLERANCE)


def common_axes(runs: Sequence[Axes]) -> Axes:
    """Axes that most runs have: the rays of most; among these runs, the model atoms, then the wavelengths.

    Parameters
    ----------
    runs : sequence of Axes
        One or more. Where two kinds are equally common, the one that comes first counts.

    Returns
    -------
    Axes
        Those of one of the runs.
    """
    left = list(runs)
    for same in (_same_rays, _same_atoms, _same_wavelengths):
        kinds: list[list[Axes]] = []
        for axes in left:
            for kind in kinds:
                if same(kind[0], axes):
                    kind.append(axes)
                    break
            else:
                kinds.append([axes])
        left = max(kinds, key=len)
    return left[0]


# One run, on a worker


def _onto(axes: Axes, own: Axes, path: str) -> tuple[dict[str, Array], list[str]]:
    """Matrices from a run's wavelengths to the grid's (none where they are the same), and what to note."""

    def refused(problem: str, found: object, expected: object) -> InputError:
        return InputError(
            problem,
            where=path,
            found=found,
            expected=expected,
            remedy="make a grid of its own from such runs",
        )

    if not _same_rays(own, axes):
        told = (f"mu = {', '.join(f'{mu:.4f}' for mu in rays.mu)}" for rays in (own, axes))
        raise refused("its rays are not the grid's", *told)
    matrices, notes = {}, []
    for line, rest in axes.rest.items():
        if abs(own.rest[line] - rest) > REST_TOLERANCE:
            raise refused(
                f"its {line} is another model atom's", f"{own.rest[line]:.4f}", f"{rest:.4f} Angstrom"
            )
        theirs, ours = np.array(own.offsets[line]), np.array(axes.offsets[line])
        if _same_points(own.offsets[line], axes.offsets[line]):
            continue
        if theirs[0] > ours[0] + WAVELENGTH_TOLERANCE or theirs[-1] < ours[-1] - WAVELENGTH_TOLERANCE:
            raise refused(
                f"its wavelengths of {line} do not cover the grid's",
                f"{theirs[0]:.3f} to {theirs[-1]:.3f}",
                f"{ours[0]:.3f} to {ours[-1]:.3f} Angstrom from rest",
            )
        matrices[line] = sampling_matrix(theirs, ours)
        notes.append(f"{line} was interpolated from {theirs.size} wavelengths of its own")
    return matrices, notes


def _unusable(
    heights: Array, time: float, z: Array, atmosphere: Sequence[Array], lines: Sequence[Array]
) -> str:
    """Why a snapshot cannot be used; empty if it can."""
    quantities = ("electron density", "temperature", "velocity")
    named: dict[str, Array] = {"time": np.array(time), "heights": z}
    named |= zip(quantities, atmosphere, strict=True)
    named |= zip(TRANSITIONS, lines, strict=True)
    not_finite = [name for name, values in named.items() if not np.isfinite(values).all()]
    if not_finite:
        return "not finite: " + ", ".join(not_finite)
    for name in ("electron density", "temperature", *TRANSITIONS):
        if not (named[name] > 0).all():
            return f"not positive: {name}"
    if not (np.diff(z) > 0).all():
        return "heights do not ascend"
    if z[0] > heights[0] + HEIGHT_TOLERANCE or z[-1] < heights[-1] - HEIGHT_TOLERANCE:
        return f"it reaches from {z[0]:.3f} to {z[-1]:.3f} Mm only"
    return ""


def read_run(task: RunTask) -> Run:
    """Read one run; on a worker, which does one at a time.

    Parameters
    ----------
    task : RunTask
        Which run, and what the grid holds.

    Returns
    -------
    Run
        Snapshots that cannot be used are among its samples, with their reason and NaN.

    Raises
    ------
    InputError
        The file cannot be read, is not a RADYN run, or its rays or wavelengths are not the grid's.
    """
    path = Path(task.path)
    with _ONE_RUN:
        status = path.stat()
        digest = sha256_file(path)
        name = run_name(path)
        facts: dict[str, Any] = {
            "simulation": simulation_number(name),
            "sha256": digest,
            "bytes": status.st_size,
            "modified": status.st_mtime_ns,
        }
        if digest == task.known:
            return Run(facts, [])
        run = RunFile(path)
        matrices, notes = _onto(task.axes, run.axes(), task.path)
        count = run.snapshots()
        if count == 0:
            raise InputError("it holds no snapshot", where=path, expected="one at least")
        if count < run.time.size:
            notes.append(f"{run.time.size - count} of {run.time.size} snapshots are incomplete and left out")
        chosen = slice(0, count, task.stride)
        lines, shares = run.intensities(chosen, task.continuum)
        for line, matrix in matrices.items():
            lines[line] = lines[line] @ matrix.T
        # About 1 where outint is the whole intensity; small where the term is negligible, large where needed.
        if task.continuum and any(0.5 < share < 2.0 for share in shares.values()):
            told = ", ".join(f"{line} {share:.2f}" for line, share in shares.items())
            notes.append(
                f"the continuum may be counted twice: outint[:, 0] over the far wings is {told}, as if "
                "outint were the whole intensity; compare with a grid made without the continuum term"
            )
        microturbulence, note = run.microturbulence()
        notes += [note] if note else []
        z, *atmosphere = run.atmospheres(chosen)
        heights, iterations, parameters = np.array(task.heights), run.iterations(), beam(name)
        records = []
        for i, snapshot in enumerate(range(count)[chosen]):
            profiles = [lines[line][i] for line in TRANSITIONS]
            time = float(run.time[snapshot])
            reason = _unusable(heights, time, z[i], [quantity[i] for quantity in atmosphere], profiles)
            if reason:
                values = [np.full(heights.size, np.nan)] * 3
                profiles = [np.full_like(profile, np.nan) for profile in profiles]
            else:
                values = [np.interp(heights, z[i], quantity[i]) for quantity in atmosphere]
            # Single precision: that is what is stored, and a run's samples travel together.
            ne, t, v, halpha, ca8542 = (array.astype(np.float32) for array in (*values, *profiles))
            records.append(
                store.Record(
                    sample=(facts["simulation"] << SNAPSHOT_BITS) + snapshot,
                    simulation=facts["simulation"],
                    parameters=(*parameters, time, microturbulence),
                    electron_density=ne,
                    temperature=t,
                    velocity=v,
                    halpha=halpha,
                    ca8542=ca8542,
                    status=STATUS.index("numerical_failure" if reason else "converged"),
                    iterations=int(iterations[snapshot]) if snapshot < iterations.size else 0,
                    reason=reason,
                )
            )
        facts |= {
            "snapshots": count,
            "failed": sum(bool(record.reason) for record in records),
            "ends": float(np.max(run.time[:count], where=np.isfinite(run.time[:count]), initial=0.0)),
            "continuum_share": {
                line: share if np.isfinite(share) else None for line, share in shares.items()
            },
            "notes": notes,
        }
    return Run(facts, records)


def _read_or_refuse(task: RunTask) -> Run | InputError:
    """`read_run`, whose refusals are results: Dask would log them with a traceback."""
    try:
        return read_run(task)
    except InputError as error:
        return error


def _axes_or_refuse(path: Path) -> Axes | InputError:
    """A run's axes; see `_read_or_refuse`."""
    try:
        return RunFile(path).axes()
    except InputError as error:
        return error


# The job


def _axes_of(settings: dict[str, Any]) -> Axes:
    """Axes of a grid that exists."""
    return Axes(
        tuple(settings["mu"]),
        {line: tuple(settings[f"offsets_{line}"]) for line in TRANSITIONS},
        {line: settings[f"rest_{line}"] for line in TRANSITIONS},
    )


def _axes_of_most(client: Client, files: dict[str, Path], where: Path) -> tuple[Axes, dict[str, InputError]]:
    """Axes of a grid that is new, and the runs that tell none. The runs' order does not matter."""
    axes: dict[str, Axes] = {}
    refused: dict[str, InputError] = {}
    with Progress("comparing", len(files), "runs") as progress:
        for path, told in finished(client, _axes_or_refuse, files.values(), name=run_name, where=where):
            if isinstance(told, Axes):
                axes[run_name(path)] = told
            else:
                refused[run_name(path)] = told
            progress.advance(1)
    if not axes:
        error = refused[min(refused)]
        raise InputError(
            "no run can be read",
            where=error.where,
            found=f"{error.problem}; {error.found}",
            expected=error.expected,
            remedy=error.remedy,
        )
    return common_axes([axes[name] for name in sorted(axes)]), refused


def description(axes: Axes, heights: Sequence[float], stride: int, continuum: bool) -> store.Description:
    """What a RADYN grid holds and everything that decides its numbers.

    Parameters
    ----------
    axes : Axes
        Rays and wavelengths.
    heights : sequence of float
        Mm.
    stride : int
        Every how many snapshots one is taken.
    continuum : bool
        Whether the continuum term is added.

    Returns
    -------
    Description
    """
    return store.Description(
        parameters=PARAMETERS,
        heights=tuple(heights),
        mu=axes.mu,
        offsets_halpha=axes.offsets["halpha"],
        offsets_ca8542=axes.offsets["ca8542"],
        rest_halpha=axes.rest["halpha"],
        rest_ca8542=axes.rest["ca8542"],
        maker={"name": "radyn", "stride": stride, "continuum_added": continuum},
        height_zero="RADYN's own: tau_500 = 1 of the atmosphere that the runs start from",
        equilibrium=(
            "RADYN: radiation hydrodynamics with time-dependent populations, not statistical equilibrium; "
            "complete redistribution, microturbulence fixed."
        ),
    )


def make_radyn_grid(
    sources: Sequence[str | Path],
    path: str | Path,
    *,
    stride: int = 1,
    heights: ArrayLike | None = None,
    continuum: bool = True,
    cluster: ClusterConfig | Client | None = None,
    call: str | None = None,
) -> RadynReport:
    """Make, resume or enlarge a grid of RADYN runs on a Dask cluster.

    One task reads one run, and a worker reads one at a time. A run that cannot be read, or that does not fit
    the others, is refused, reported, and named in the store with the reason; the others go on. A finished run
    is in a journal beside the store: the same call again, with more runs or the same, reads what is missing.
    A run whose file has changed (its hash has, which is looked at if its size or date have) is read again and
    replaces what was there. Runs that are in the grid and not asked for stay.

    All runs of a grid share rays, wavelengths and model atoms: those of the grid that is there, or of most
    runs (`common_axes`), which are compared before any is read. A run with other wavelengths is interpolated
    linearly where they cover the grid's; one with other rays, other rest wavelengths or a shorter range is
    refused, for nothing may be extrapolated, and reported with both.

    A run is reported as unfinished if it ends before the longest one does, or before a run with a name of
    F-CHROMA's form should (`DURATION`). Whether a single run of another name is finished cannot be told, and
    the report says so.

    Parameters
    ----------
    sources : sequence of str or Path
        CDF files, in any order. The workers must see them under the same paths.
    path : str or Path
        The grid store (Zarr v3). Its ``attrs["runs"]`` (JSON) tells for each run's name its number in
        ``simulation``, its file's SHA-256 and what is to be known of it.
    stride : int
        Takes every `stride`-th snapshot, from the first.
    heights : array_like, optional
        Heights of the grid, ascending, Mm; the published network's if left out.
    continuum : bool
        Whether the continuum term ``outint[:, 0]`` is added to the lines (see this module's head).
    cluster : ClusterConfig or distributed.Client, optional
        Where to run; by default one single-threaded worker for each core of this machine.
    call : str, optional
        The command or call, for the store's provenance.

    Returns
    -------
    RadynReport
        What became of each run. ``complete`` is False where one was refused.

    Raises
    ------
    MisuseError
        The request is empty or contradictory, `path` is something else, or its grid was made with other
        settings.
    InputError
        Not one run can be used.
    ClusterError
        Runs could not be read for reasons outside their files (their workers died again and again).
    """
    path = Path(path)
    files = _files(sources)
    levels = np.array(HEIGHTS if heights is None else heights, dtype=np.float64)
    if stride < 1 or levels.ndim != 1 or levels.size < 2 or not (np.diff(levels) > 0).all():
        raise MisuseError(
            "a grid needs a positive stride and heights that ascend",
            found=f"stride={stride}, heights={levels}",
        )
    call = (
        call or f"make_radyn_grid({[str(file) for file in files.values()]}, {str(path)!r}, stride={stride})"
    )
    settings = store.settings_of(path)
    known = settings is not None and settings.get("maker", {}).get("name") == "radyn"
    refused: dict[str, InputError] = {}
    kept: set[str] = set()
    with ExitStack() as stack:

        @cache
        def client() -> Client:  # not started where there is nothing to do
            return stack.enter_context(opened(cluster or LocalConfig()))

        if settings is not None and known:
            axes = _axes_of(settings)
        else:
            axes, refused = _axes_of_most(client(), files, path)
        about = description(axes, [float(height) for height in levels], stride, continuum)
        journal = stack.enter_context(store.Journal(path, about))
        _no_collision({*files, *journal.runs})
        todo: list[RunTask] = []
        for name, file in files.items():
            if name in refused:
                continue
            facts = journal.runs.get(name, {})
            status = file.stat()
            if "sha256" in facts and (facts["bytes"], facts["modified"]) == (
                status.st_size,
                status.st_mtime_ns,
            ):
                kept.add(name)
            else:
                todo.append(
                    RunTask(str(file), axes, about.heights, stride, continuum, facts.get("sha256"))
                )  # fmt: skip
        if todo:
            done = len(files) - len(todo)
            progress = stack.enter_context(Progress("reading", len(files), "runs", done=done))
            for task, told in finished(
                client(), _read_or_refuse, todo, name=lambda task: run_name(task.path), where=path
            ):
                name = run_name(task.path)
                if isinstance(told, Run):
                    _take(journal, name, told)
                    if not told.records:
                        kept.add(name)
                else:
                    refused[name] = told
                progress.advance(1)
        return _finish(journal, list(files), refused, kept, stride, call)


def _files(sources: Sequence[str | Path]) -> dict[str, Path]:
    """Files by the name of their run, sorted."""
    files: dict[str, Path] = {}
    for source in sorted((Path(source).absolute() for source in sources), key=run_name):
        if source.is_dir():
            raise MisuseError("this is a directory", where=source, remedy=f"name its files: '{source}/*.cdf'")
        if not source.is_file():
            raise MisuseError("there is no such file", where=source, expected="a CDF file of RADYN's")
        if source != files.setdefault(run_name(source), source):
            raise MisuseError(
                "two runs have the same name",
                where=source,
                found=files[run_name(source)],
                remedy="give each run once, or rename one of the files",
            )
    if not files:
        raise MisuseError("a grid needs at least one run", expected="CDF files of RADYN's")
    return files


def _no_collision(names: set[str]) -> None:
    taken: dict[int, str] = {}
    for name in sorted(names):
        other = taken.setdefault(simulation_number(name), name)
        if other != name:
            raise MisuseError(
                "two runs' names give the same number", found=f"{other}, {name}", remedy="rename one of them"
            )


def _take(journal: store.Journal, name: str, run: Run) -> None:
    """Put a run into the journal; its facts come last, for they say that it is whole."""
    before = journal.runs.get(name, {})
    if run.records:
        journal.extend(run.records)
        journal.add_run(name, run.facts)
    else:  # the same file, with another date
        journal.add_run(name, {**before, **run.facts})


def _finish(
    journal: store.Journal,
    names: list[str],
    refused: dict[str, InputError],
    kept: set[str],
    stride: int,
    call: str,
) -> RadynReport:
    """Compare the runs with each other, write the store, and say what became of each."""
    for name, error in refused.items():
        if "sha256" not in journal.runs.get(name, {}):
            found = f" (found {error.found}; expected {error.expected})"
            journal.add_run(name, {"simulation": simulation_number(name), "refused": error.problem + found})
    first: dict[str, str] = {}
    for name in sorted(journal.runs):
        facts = journal.runs[name]
        other = first.setdefault(facts.get("sha256", name), name)
        if other != name:  # one in training and one in validation would be a leak
            journal.add_run(name, {"simulation": facts["simulation"], "refused": f"the same file as {other}"})
    runs = {name: facts for name, facts in journal.runs.items() if "sha256" in facts}
    if not runs:
        name, error = next(iter(refused.items()))
        raise InputError(
            f"not one of {len(names)} runs can be used; {name}: {error.problem}",
            where=journal.path,
            found=error.found,
            expected=error.expected,
            remedy=error.remedy,
        )
    longest = max(facts["ends"] for facts in runs.values())
    for name, facts in runs.items():
        lasts = _lasts(name, longest, alone=len(runs) == 1)
        unfinished = None if lasts is None else facts["ends"] < FINISHED * lasts
        journal.add_run(name, {**facts, "unfinished": unfinished})
    # A run that has changed may have left snapshots that it no longer has; so may one that was cut off.
    journal.keep(
        {
            (facts["simulation"] << SNAPSHOT_BITS) + snapshot
            for facts in runs.values()
            for snapshot in range(0, facts["snapshots"], stride)
        }
    )
    journal.assemble(call)
    reports = []
    for name in names:
        facts = journal.runs[name]
        if name in refused or "refused" in facts:
            told = facts.get("refused") or f"{refused[name].problem}; what was read of it before stays"
            reports.append(RunReport(name, "refused", 0, 0, np.nan, (f"refused: {told}",)))
            continue
        notes = tuple(facts["notes"])
        ends = f"it ends at {facts['ends']:g} s"
        if facts["unfinished"]:
            short = facts["ends"] < FINISHED * longest
            than = f"the longest at {longest:g} s" if short else f"F-CHROMA's at {DURATION:g} s"
            notes = (f"unfinished: {ends}, {than}", *notes)
        elif facts["unfinished"] is None:
            notes = (f"{ends}; neither its name nor another run tells whether that is all of it", *notes)
        count = len(range(0, facts["snapshots"], stride))
        state = "kept" if name in kept else "read"
        reports.append(RunReport(name, state, count, facts["failed"], facts["ends"], notes))
    return RadynReport(journal.path, tuple(reports))


def _lasts(name: str, longest: float, alone: bool) -> float | None:
    """Seconds that a run should last, by its name and by the longest run; None where neither tells."""
    if _NAME.fullmatch(name):
        return max(longest, DURATION)
    return None if alone else longest
