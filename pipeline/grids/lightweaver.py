"""Training grids synthesised with Lightweaver: the physics of one atmosphere, and the Dask job over many.

Hydrogen (six levels) and Ca II (five levels and continuum) are solved together in statistical equilibrium
with charge conservation, complete redistribution and a microturbulent velocity, on two rays; carbon,
oxygen, silicon, aluminium, iron, helium, magnesium, nitrogen, sodium and sulphur are an LTE background. The
converged populations are then synthesised at nine values of mu. Lightweaver: Osborne & Milic 2021, ApJ 917,
14, doi:10.3847/1538-4357/ac02be.

The populations are in *statistical equilibrium*: ionisation follows the atmosphere at once. RADYN's, which
the paper used, follow it in time. A network trained on such a grid inherits that difference.

What was spared, and what it costs: two rays, two fifths of the wavelengths of hydrogen's lines (three fifths
of H-alpha's) and an iteration that ends with lines within 0.03 % of the converged ones take a third off the
time of three rays and all wavelengths. Between the two, over 40 atmospheres (root mean square over the line,
relative to its maximum, at the worst mu), H-alpha differs by at most 0.6 % (median 0.23 %) and Ca II by at
most 0.94 % (median 0.12 %; the largest in strong condensations). Against 320 depth points, five rays and all
wavelengths, over 12 other atmospheres, H-alpha is within 0.7 % (median 0.35 %) and Ca II within 0.5 % (median
0.2 %). An atmosphere takes 0.7 to 0.8 s on one core of an AMD EPYC.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from inn.layout import HEIGHTS
from pipeline.cluster import ClusterConfig, LocalConfig, opened
from pipeline.errors import MisuseError
from pipeline.grids import atmosphere, store
from pipeline.grids.atmosphere import DESIGN_SEED, AtmosphereParameters
from pipeline.grids.job import finished
from pipeline.grids.store import STATUS
from pipeline.progress import Progress

Array = NDArray[np.float64]

MU = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Cosines of the heliocentric angle at which every atmosphere is synthesised."""
HALPHA_OFFSETS = np.linspace(-1.8, 1.8, 73)
"""Wavelengths of H-alpha, Angstrom from its rest wavelength in the model atom."""
CA8542_OFFSETS = np.linspace(-1.4, 1.4, 113)
"""Wavelengths of Ca II 8542, Angstrom from its rest wavelength in the model atom."""
DEPTH_POINTS = 100
RAYS = 2
MAX_ITERATIONS = 300
POPULATION_TOLERANCE = 1e-3
RADIATION_TOLERANCE = 1e-2
HYDROGEN_WAVELENGTHS, HALPHA_WAVELENGTHS = 0.4, 0.6
"""Shares of the model atom's own number of wavelengths on which hydrogen's lines, and H-alpha, are solved."""
_LIGHT = 2.99792458e18  # Angstrom / s
_BACKGROUND = ("C", "O", "Si", "Al", "Fe", "He_9", "Mg", "N", "Na", "S")


@cache
def _lightweaver() -> ModuleType:
    """Lightweaver, with the vector instructions that give the same bits on every recent x86 machine."""
    try:
        with warnings.catch_warnings():
            # It recommends a benchmark of instruction sets; the choice is made below.
            warnings.simplefilter("ignore", UserWarning)
            import lightweaver
            import lightweaver.config
            import lightweaver.rh_atoms
            import lightweaver.utils
    except ImportError as error:
        raise MisuseError(
            "synthesis needs Lightweaver, which is not installed",
            remedy="pip install 'flarefield[physics]'",
        ) from error
    if "AVX2FMA" in lightweaver.simd_management.get_available_simd_suffixes():
        lightweaver.config.params["SimdImpl"] = "AVX2FMA"
    return lightweaver  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Synthesis:
    """One atmosphere and its lines.

    Attributes
    ----------
    electron_density, temperature, velocity : (50,) arrays
        At :data:`inn.layout.HEIGHTS`: cm-3, K, km/s (vertical, upflow positive).
    halpha, ca8542 : (9, 73) and (9, 113) arrays
        Intensity per Angstrom (erg s-1 cm-2 sr-1 Angstrom-1) at :data:`MU` and the offsets of this module.
    status : int
        Index into :data:`pipeline.grids.store.STATUS`; 0 is converged. Otherwise the lines are the last
        iterate's or NaN, and not to be used.
    iterations : int
        Iterations taken.
    reason : str
        Why it did not converge; empty if it did.
    """

    electron_density: Array
    temperature: Array
    velocity: Array
    halpha: Array
    ca8542: Array
    status: int
    iterations: int
    reason: str


def rest_wavelengths() -> tuple[float, float]:
    """Rest wavelengths (vacuum, Angstrom) of H-alpha and Ca II 8542 in the model atoms.

    They follow from the atoms' level energies and differ from the laboratory's by up to 0.08 Angstrom.

    Returns
    -------
    halpha, ca8542 : float
        Angstrom.

    Raises
    ------
    MisuseError
        Lightweaver is not installed.
    """
    atoms = _lightweaver().rh_atoms
    lines = {(line.j, line.i): line for line in atoms.H_6_atom().lines}
    calcium = {(line.j, line.i): line for line in atoms.CaII_atom().lines}
    return 10.0 * float(lines[2, 1].lambda0), 10.0 * float(calcium[4, 2].lambda0)


def intensity_per_angstrom(intensity: Array, wavelength: Array) -> Array:
    """Convert I_nu (W m-2 Hz-1 sr-1) to I_lambda (erg s-1 cm-2 sr-1 Angstrom-1).

    Parameters
    ----------
    intensity : array
        Per frequency; its last axis is wavelength.
    wavelength : (wavelength,) array
        Vacuum, Angstrom.

    Returns
    -------
    array
        ``I_nu c / lambda**2`` in the units above. The ratio of both lines changes by (8544 / 6565)**2 = 1.69.
    """
    return np.asarray(intensity * 1e3 * _LIGHT / wavelength**2)


def _hydrogen(sparse: bool) -> Any:  # noqa: ANN401  (Lightweaver has no types)
    """Hydrogen with fewer wavelengths to each line: they decide how long an atmosphere takes."""
    lw = _lightweaver()
    atom = lw.rh_atoms.H_6_atom()
    if sparse:
        for line in atom.lines:
            share = HALPHA_WAVELENGTHS if (line.j, line.i) == (2, 1) else HYDROGEN_WAVELENGTHS
            line.quadrature.Nlambda = max(round(share * line.quadrature.Nlambda), 9)
        lw.atomic_model.reconfigure_atom(atom)
    return atom


def _context(
    parameters: AtmosphereParameters, heights: Array, rays: int, accelerated: bool, sparse: bool
) -> Any:  # noqa: ANN401  (Lightweaver has no types)
    """Lightweaver's model of one atmosphere, before iteration; heights in Mm, top first."""
    lw = _lightweaver()
    atoms = lw.rh_atoms
    hot = atmosphere.temperature(parameters, heights)
    hydrogen = atmosphere.hydrogen_density(parameters, heights)
    # Only where iteration starts: helium adds electrons in the corona, metals keep the photosphere's.
    electrons = hydrogen * (atmosphere.ionisation(hot) * np.where(hot > 2e4, 1.15, 1.0) + 1e-4)
    model = lw.Atmosphere.make_1d(
        scale=lw.ScaleType.Geometric,
        depthScale=heights * 1e6,
        temperature=hot,
        vlos=atmosphere.velocity(parameters, heights) * 1e3,
        vturb=atmosphere.microturbulence(parameters, heights) * 1e3,
        ne=electrons * 1e6,
        nHTot=hydrogen * 1e6,
        convertScales=False,
    )
    model.quadrature(rays)
    background = [getattr(atoms, f"{name}_atom")() for name in _BACKGROUND]
    radiative = lw.RadiativeSet([_hydrogen(sparse), atoms.CaII_atom(), *background])
    radiative.set_active("H", "Ca")
    return lw.Context(
        model,
        radiative.compute_wavelength_grid(),
        radiative.compute_eq_pops(model),
        Nthreads=1,
        conserveCharge=True,
        ngOptions=lw.NgOptions(2, 6, 6) if accelerated else None,
    )


def _solve(
    parameters: AtmosphereParameters,
    heights: Array,
    rays: int,
    max_iterations: int,
    accelerated: bool,
    sparse: bool,
) -> tuple[Array, Array, Array, int, str]:
    """Electron density at heights (cm-3), both lines, iterations, why it did not converge (or "").

    Raises ArithmeticError, ValueError or an error of Lightweaver's or NumPy's linear algebra if numbers fail.
    """
    context = _context(parameters, heights, rays, accelerated, sparse)
    change = (np.inf, np.inf)
    iterations, converged = 0, False
    while iterations < max_iterations and not converged:
        iterations += 1
        radiation = context.formal_sol_gamma_matrices()
        if iterations <= 3:  # the background's J settles before populations move
            continue
        populations = context.stat_equil()
        change = (float(radiation.dJMax), float(populations.dPopsMax))
        if not np.all(np.isfinite(change)):
            raise ArithmeticError(f"no finite numbers after {iterations} iterations")
        converged = change[0] < RADIATION_TOLERANCE and change[1] < POPULATION_TOLERANCE
    rest = rest_wavelengths()
    wavelength = np.concatenate([rest[0] + HALPHA_OFFSETS, rest[1] + CA8542_OFFSETS])
    per_frequency = context.compute_rays(wavelength / 10.0, mus=list(MU), squeeze=False)
    lines = intensity_per_angstrom(np.asarray(per_frequency).reshape(wavelength.size, len(MU)).T, wavelength)
    electrons = np.asarray(context.atmos.ne) * 1e-6
    for name, values in (("intensities", lines), ("electron densities", electrons)):
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ArithmeticError(f"{name} are not positive")
    reason = f"{iterations} iterations: J still changes by {change[0]:.1e}, populations by {change[1]:.1e}"
    halpha, ca8542 = np.split(lines, [HALPHA_OFFSETS.size], axis=1)
    return electrons, halpha, ca8542, iterations, "" if converged else reason


def synthesise(
    parameters: AtmosphereParameters,
    *,
    depth_points: int = DEPTH_POINTS,
    rays: int = RAYS,
    max_iterations: int = MAX_ITERATIONS,
    sparse: bool = True,
) -> Synthesis:
    """Solve one atmosphere and synthesise both lines.

    Parameters
    ----------
    parameters : AtmosphereParameters
        The atmosphere.
    depth_points : int
        Points in height, placed by :func:`pipeline.grids.atmosphere.depth_points`.
    rays : int
        Gauss-Legendre rays of the solution (not of the output, which is at :data:`MU`).
    max_iterations : int
        Limit after which the atmosphere is recorded as not converged.
    sparse : bool
        Whether hydrogen is solved on a share of its model atom's wavelengths (see this module's head).

    Returns
    -------
    Synthesis
        Numerical failures are returned with their reason, not raised.
    """
    lw = _lightweaver()
    heights = atmosphere.depth_points(parameters, depth_points)
    temperature = atmosphere.temperature(parameters, HEIGHTS)
    velocity = atmosphere.velocity(parameters, HEIGHTS)
    reason = ""
    # Ng's acceleration halves the iterations, but can overshoot into a singular matrix; then go without.
    for accelerated in (True, False):
        try:
            with np.errstate(all="ignore"):
                electrons, halpha, ca8542, iterations, reason = _solve(
                    parameters, heights, rays, max_iterations, accelerated, sparse
                )
        except (lw.utils.ExplodingMatrixError, np.linalg.LinAlgError, ValueError, ArithmeticError) as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            return Synthesis(
                electron_density=np.exp(np.interp(HEIGHTS, heights[::-1], np.log(electrons[::-1]))),
                temperature=temperature,
                velocity=velocity,
                halpha=halpha,
                ca8542=ca8542,
                status=STATUS.index("iteration_limit" if reason else "converged"),
                iterations=iterations,
                reason=reason,
            )
    return Synthesis(
        electron_density=np.full(HEIGHTS.size, np.nan),
        temperature=temperature,
        velocity=velocity,
        halpha=np.full((len(MU), HALPHA_OFFSETS.size), np.nan),
        ca8542=np.full((len(MU), CA8542_OFFSETS.size), np.nan),
        status=STATUS.index("numerical_failure"),
        iterations=0,
        reason=reason,
    )


@dataclass(frozen=True)
class AtmosphereTask:
    """One sample of a design; small enough to travel by the thousand.

    Attributes
    ----------
    sample : int
        Its index in the design.
    seed : int
        The design's.
    """

    sample: int
    seed: int


def run_task(task: AtmosphereTask) -> store.Record:
    """Synthesise one sample of the design; runs on a worker.

    Parameters
    ----------
    task : AtmosphereTask
        Which.

    Returns
    -------
    Record
        Also where numbers failed: its ``status`` and ``reason`` say so.

    Raises
    ------
    MisuseError
        Lightweaver is not installed there.
    """
    (parameters,) = atmosphere.design(1, first=task.sample, seed=task.seed)
    made = synthesise(parameters)
    return store.Record(
        sample=task.sample,
        simulation=task.sample,
        parameters=parameters.values(),
        electron_density=made.electron_density,
        temperature=made.temperature,
        velocity=made.velocity,
        halpha=made.halpha,
        ca8542=made.ca8542,
        status=made.status,
        iterations=made.iterations,
        reason=made.reason,
    )


def description(seed: int = DESIGN_SEED) -> store.Description:
    """What a Lightweaver grid holds and everything that decides its numbers.

    Parameters
    ----------
    seed : int
        The design's.

    Returns
    -------
    Description
        Lightweaver's version is part of it: another one may give other lines.

    Raises
    ------
    MisuseError
        Lightweaver is not installed.
    """
    from importlib.metadata import version

    rest = rest_wavelengths()
    return store.Description(
        parameters=tuple((item.name, item.units, item.long_name) for item in atmosphere.PARAMETERS),
        heights=tuple(float(height) for height in HEIGHTS),
        mu=MU,
        offsets_halpha=tuple(float(offset) for offset in HALPHA_OFFSETS),
        offsets_ca8542=tuple(float(offset) for offset in CA8542_OFFSETS),
        rest_halpha=rest[0],
        rest_ca8542=rest[1],
        maker={
            "name": "lightweaver",
            "lightweaver": version("lightweaver"),
            "family": atmosphere.FAMILY_VERSION,
            "seed": seed,
            "depth_points": DEPTH_POINTS,
            "rays": RAYS,
            "hydrogen_wavelengths": [HYDROGEN_WAVELENGTHS, HALPHA_WAVELENGTHS],
            "tolerances": [POPULATION_TOLERANCE, RADIATION_TOLERANCE],
            "ranges": {p.name: [p.low, p.high, p.power] for p in atmosphere.PARAMETERS},
        },
        height_zero="tau_500 = 1 of the starting photosphere: FALC (Fontenla et al. 1993, ApJ 406, 319)",
        equilibrium=(
            "Populations in statistical equilibrium with charge conservation, complete redistribution; "
            "density hydrostatic times a departure. Not a radiation-hydrodynamic simulation (RADYN)."
        ),
    )


def make_lightweaver_grid(
    path: str | Path,
    *,
    samples: int,
    first: int = 0,
    seed: int = DESIGN_SEED,
    cluster: ClusterConfig | Client | None = None,
    call: str | None = None,
) -> Path:
    """Make, resume or enlarge a grid of Lightweaver atmospheres on a Dask cluster.

    Finished atmospheres are appended to a journal beside the store, so that a killed job loses at most those
    in flight; the store is written at the end, from the journal. Running the same call again does what is
    missing. Asking for more samples continues the design's sequence and keeps what is there. The result does
    not depend on workers or order.

    Parameters
    ----------
    path : str or Path
        The grid store (Zarr v3).
    samples : int
        How many atmospheres, `first` to ``first + samples - 1`` of the design.
    first : int
        Index of the first.
    seed : int
        Seed of the design.
    cluster : ClusterConfig or distributed.Client, optional
        Where to run; by default one single-threaded worker for each core of this machine.
    call : str, optional
        The command or call, for the store's provenance.

    Returns
    -------
    Path
        The store.

    Raises
    ------
    MisuseError
        If the request is empty, `path` is something else, or its grid was made with other settings.
    ClusterError
        If atmospheres could not be computed for reasons outside physics (their workers died again and again).
    """
    path = Path(path)
    if samples < 1 or first < 0:
        raise MisuseError(
            "a grid needs at least one sample, from 0 up", found=f"samples={samples}, first={first}"
        )
    about = description(seed)
    call = call or f"make_lightweaver_grid({str(path)!r}, samples={samples}, first={first}, seed={seed})"
    wanted = range(first, first + samples)
    with ExitStack() as stack:
        journal = stack.enter_context(store.Journal(path, about))
        missing = [sample for sample in wanted if sample not in journal.samples]
        if missing:
            client = stack.enter_context(opened(cluster or LocalConfig()))
            done = samples - len(missing)
            progress = stack.enter_context(Progress("synthesising", samples, "atmospheres", done=done))
            tasks = (AtmosphereTask(sample, seed) for sample in missing)
            made = finished(client, run_task, tasks, name=lambda task: str(task.sample), where=path)
            for _, record in made:
                journal.append(record)
                progress.advance(1)
        journal.assemble(call)
    return path
