"""The family of model flare atmospheres that `flarefield grid lightweaver` draws from.

Ten independent physical parameters (:data:`PARAMETERS`) describe one atmosphere, from the quiet Sun to a
strong flare. Sample ``i`` of the design is point ``i`` of a scrambled Sobol sequence with a fixed seed, so
that a grid can be stopped at any count, or enlarged later, and still fill the family evenly.

An atmosphere is built in geometric height, with zero at tau_500 = 1 of the photosphere it starts from. That
photosphere is FALC's (Fontenla, Avrett & Loeser 1993, ApJ 406, 319) as far as the heating reaches down. Above
it lie a heated chromosphere with a linear temperature, a thin transition region and a conductively stratified
corona. The density is hydrostatic with microturbulent pressure, times a departure that the heated
chromosphere carries. These are snapshots in mechanical near-balance and their populations are in statistical
equilibrium: they are not a radiation-hydrodynamic simulation's, and everything trained on them inherits that.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

Array = NDArray[np.float64]

BOLTZMANN = 1.380649e-16  # erg K-1
HYDROGEN_MASS = 1.6735575e-24  # g
GRAVITY = 2.74e4  # cm s-2
MASS_PER_HYDROGEN = 1.41  # mass of the solar mixture per hydrogen nucleus, in hydrogen masses
HEAVY_PARTICLES = 1.09  # atoms of every element per hydrogen nucleus

BOTTOM, TOP = -0.104, 10.5  # Mm
FAMILY_VERSION = 1
"""Raised whenever an atmosphere of given parameters would change."""
DESIGN_SEED = 20140906
"""Seed of the bundled grid's design: the date of the flare in the paper's section 5."""

# FALC below its temperature minimum: height (Mm, zero at tau_500 = 1), temperature (K), log10 n_H (cm-3).
_FALC = np.array(
    [
        (-0.1040, 9400, 17.123), (-0.0935, 9140, 17.118), (-0.0830, 8860, 17.114), (-0.0726, 8540, 17.111),
        (-0.0621, 8220, 17.109), (-0.0516, 7900, 17.105), (-0.0411, 7590, 17.100), (-0.0306, 7280, 17.096),
        (-0.0201, 6980, 17.089), (-0.0096, 6720, 17.080), (0.0009, 6520, 17.067), (0.0114, 6340, 17.052),
        (0.0219, 6180, 17.035), (0.0376, 5980, 17.006), (0.0533, 5790, 16.976), (0.0795, 5580, 16.915),
        (0.1057, 5410, 16.848), (0.1318, 5270, 16.776), (0.1580, 5150, 16.700), (0.1841, 5060, 16.620),
        (0.2103, 4990, 16.536), (0.2617, 4880, 16.362), (0.3131, 4780, 16.182), (0.3644, 4690, 15.997),
        (0.4157, 4610, 15.807), (0.4669, 4540, 15.613), (0.5081, 4510, 15.454), (0.5444, 4500, 15.312),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One axis of the family: its name, unit, range, what it is, and how points are spread over it.

    Attributes
    ----------
    name : str
        As in `AtmosphereParameters`, and with ``parameter_`` before it in a grid store.
    units : str
        As astropy parses them.
    low, high : float
        Its range, in `units`.
    long_name : str
        What it is.
    power : float
        Maps a unit coordinate ``u`` to ``low + (high - low) * u**power``: above 1 it puts more of the
        atmospheres near `low`.
    """

    name: str
    units: str
    low: float
    high: float
    long_name: str
    power: float = 1.0

    def at(self, unit: Array) -> Array:
        """Values at unit coordinates in [0, 1], any shape.

        Parameters
        ----------
        unit : array, any shape
            Unit coordinates, 0 to 1.

        Returns
        -------
        array, the same shape
            Values in `units`, from `low` to `high`.
        """
        return self.low + (self.high - self.low) * unit**self.power


PARAMETERS = (
    Parameter(
        "chromospheric_temperature",
        "K",
        5500.0,
        10000.0,
        "temperature of the heated chromosphere at its foot",
        1.3,
    ),
    Parameter(
        "temperature_gradient", "K / Mm", 200.0, 2500.0, "temperature gradient of the heated chromosphere"
    ),
    Parameter("heating_depth", "Mm", 0.4, 1.0, "height at which half of the heating has set in"),
    Parameter("transition_region_height", "Mm", 1.0, 2.2, "height of the transition region", 0.6),
    Parameter(
        "log_coronal_temperature", "dex(K)", 6.0, 7.0, "log10 of the temperature at the top of the corona"
    ),
    Parameter(
        "density_departure",
        "dex",
        -0.6,
        0.6,
        "log10 of density over hydrostatic density, chromosphere and above",
    ),
    Parameter("condensation", "km / s", 0.0, 60.0, "peak downflow of the chromospheric condensation", 2.0),
    Parameter("evaporation", "km / s", 0.0, 200.0, "asymptotic upflow of the evaporating corona", 1.5),
    Parameter(
        "chromospheric_velocity",
        "km / s",
        -20.0,
        20.0,
        "peak velocity of the whole chromosphere, upflow positive",
    ),
    Parameter("microturbulence", "km / s", 1.0, 9.0, "microturbulent velocity of the chromosphere"),
)


@dataclass(frozen=True)
class AtmosphereParameters:
    """The ten parameters of one atmosphere; names, units and ranges as in :data:`PARAMETERS`.

    Attributes
    ----------
    chromospheric_temperature : float
        Temperature of the heated chromosphere at its foot, K.
    temperature_gradient : float
        Of the heated chromosphere, K / Mm.
    heating_depth : float
        Height at which half of the heating has set in, Mm.
    transition_region_height : float
        Mm.
    log_coronal_temperature : float
        log10 of the temperature (K) at the top of the corona.
    density_departure : float
        log10 of the density over the hydrostatic density, chromosphere and above.
    condensation : float
        Peak downflow of the chromospheric condensation, km/s, positive.
    evaporation : float
        Asymptotic upflow of the evaporating corona, km/s.
    chromospheric_velocity : float
        Peak velocity of the whole chromosphere, km/s, upflow positive.
    microturbulence : float
        Microturbulent velocity of the chromosphere, km/s.
    """

    chromospheric_temperature: float
    temperature_gradient: float
    heating_depth: float
    transition_region_height: float
    log_coronal_temperature: float
    density_departure: float
    condensation: float
    evaporation: float
    chromospheric_velocity: float
    microturbulence: float

    def values(self) -> tuple[float, ...]:
        """The parameters in the order of :data:`PARAMETERS`.

        Returns
        -------
        tuple of float
            Ten values, in the units of :data:`PARAMETERS`.
        """
        return tuple(getattr(self, parameter.name) for parameter in PARAMETERS)


@dataclass(frozen=True)
class SampledAtmosphere(AtmosphereParameters):
    """An atmosphere of the family of which temperature and velocity are known at some heights only.

    Between them the logarithm of the temperature and the velocity are linear, below the lowest both are
    constant. The density follows from that temperature by the family's law; it, and the microturbulence, are
    of the parameters.

    Attributes
    ----------
    heights : tuple of float, length n
        Mm, ascending.
    temperatures : tuple of float, length n
        K, at `heights`.
    velocities : tuple of float, length n
        km/s, upflow positive, at `heights`.
    """

    heights: tuple[float, ...]
    temperatures: tuple[float, ...]
    velocities: tuple[float, ...]


QUIET_SUN = AtmosphereParameters(5700.0, 1000.0, 0.80, 2.1, 6.0, 0.0, 0.0, 0.0, 0.0, 4.0)
"""A member of the family that lies close to FALC: H-alpha and Ca II 8542 in absorption."""


def design(samples: int, first: int = 0, seed: int = DESIGN_SEED) -> list[AtmosphereParameters]:
    """Samples ``first`` to ``first + samples - 1`` of the scrambled Sobol design.

    Parameters
    ----------
    samples : int
        How many atmospheres.
    first : int
        Index of the first: sample ``i`` is always the sequence's point ``i``, whatever else is asked for.
    seed : int
        Seed of the scrambling. Grids of different seeds share no atmosphere.

    Returns
    -------
    list of AtmosphereParameters
    """
    sequence = qmc.Sobol(len(PARAMETERS), scramble=True, rng=np.random.default_rng(seed))
    if first:
        sequence.fast_forward(first)
    with warnings.catch_warnings():
        # A grid may stop at any count; SciPy recommends powers of two.
        warnings.filterwarnings("ignore", message="The balance properties of Sobol", category=UserWarning)
        points = sequence.random(samples) if samples else np.empty((0, len(PARAMETERS)))
    columns = [parameter.at(points[:, i]) for i, parameter in enumerate(PARAMETERS)]
    return [AtmosphereParameters(*(float(value) for value in row)) for row in np.stack(columns, axis=1)]


def _rise(height: Array, centre: float, width: float) -> Array:
    """Smooth step from 0 to 1 about ``centre`` (logistic)."""
    return 1.0 / (1.0 + np.exp(-np.clip((height - centre) / width, -60.0, 60.0)))


def temperature(parameters: AtmosphereParameters, height: Array) -> Array:
    """Temperature (K) at heights (Mm).

    FALC's (Fontenla, Avrett & Loeser 1993, ApJ 406, 319) below, a plateau that rises linearly above the
    heating, and a corona of constant conductive flux: T^(7/2) linear in height.

    Parameters
    ----------
    parameters : AtmosphereParameters
        The atmosphere; a `SampledAtmosphere` counts as what it holds.
    height : array, any shape
        Mm.

    Returns
    -------
    array, the same shape
        K.
    """
    if isinstance(parameters, SampledAtmosphere):
        return np.exp(np.interp(height, parameters.heights, np.log(parameters.temperatures)))
    photosphere = np.interp(height, _FALC[:, 0], _FALC[:, 1])
    # The foot of the plateau is where it leaves the photosphere; no gradient below it.
    above = (
        np.clip(height, parameters.heating_depth, parameters.transition_region_height)
        - parameters.heating_depth
    )
    plateau = parameters.chromospheric_temperature + parameters.temperature_gradient * above
    chromosphere = photosphere + (plateau - photosphere) * _rise(height, parameters.heating_depth, 0.09)
    # Constant conductive flux, T^(7/2) linear in height; the offset keeps the foot of the corona near 0.07
    # T_top, and the step, about 60 km wide from end to end, spreads the transition region over what a grid
    # can resolve.
    foot = parameters.transition_region_height
    climb = (np.maximum(height - foot, 0.0) + 1e-3) / (TOP - foot + 1e-3)
    corona = 10.0**parameters.log_coronal_temperature * climb ** (2.0 / 7.0)
    step = _rise(height, foot, 0.008)
    return np.asarray(np.exp(np.log(chromosphere) * (1.0 - step) + np.log(corona) * step))


def velocity(parameters: AtmosphereParameters, height: Array) -> Array:
    """Vertical velocity (km/s, upflow positive) at heights (Mm).

    Three smooth parts: the bulk of the chromosphere (Gaussian about 0.9 Mm, where the lines form), the
    condensation just below the transition region, and the evaporation, which grows with height in the corona.

    Parameters
    ----------
    parameters : AtmosphereParameters
        The atmosphere; a `SampledAtmosphere` counts as what it holds.
    height : array, any shape
        Mm.

    Returns
    -------
    array, the same shape
        km/s, upflow positive.
    """
    if isinstance(parameters, SampledAtmosphere):
        return np.interp(height, parameters.heights, parameters.velocities)
    foot = parameters.transition_region_height
    below = 1.0 - _rise(height, foot, 0.02)
    bulk = parameters.chromospheric_velocity * np.exp(-0.5 * ((height - 0.9) / 0.45) ** 2)
    condensation = parameters.condensation * np.exp(-0.5 * ((height - (foot - 0.12)) / 0.22) ** 2)
    evaporation = parameters.evaporation * (1.0 - np.exp(-np.maximum(height - foot, 0.0) / 3.0))
    return (bulk - condensation) * below + evaporation


def microturbulence(parameters: AtmosphereParameters, height: Array) -> Array:
    """Microturbulent velocity (km/s) at heights (Mm): 1 in the photosphere, the parameter above 0.8 Mm.

    Parameters
    ----------
    parameters : AtmosphereParameters
        The atmosphere.
    height : array, any shape
        Mm.

    Returns
    -------
    array, the same shape
        km/s.
    """
    return 1.0 + (parameters.microturbulence - 1.0) * _rise(height, 0.6, 0.08)


def ionisation(temperature: Array) -> Array:
    """Rough ionised fraction of chromospheric hydrogen, for the mean particle mass and as a first guess.

    Parameters
    ----------
    temperature : array, any shape
        K.

    Returns
    -------
    array, the same shape
        From 0 to 1; one half at 9000 K.
    """
    return 1.0 / (1.0 + np.exp(-np.clip((temperature - 9000.0) / 900.0, -60.0, 60.0)))


def hydrogen_density(parameters: AtmosphereParameters, height: Array) -> Array:
    """Total hydrogen density (cm-3) at heights (Mm), any order.

    Hydrostatic from the bottom of FALC's photosphere with the pressure of gas and microturbulence, then times
    the density departure, which sets in smoothly from the heated foot of the chromosphere upward.

    Parameters
    ----------
    parameters : AtmosphereParameters
        The atmosphere.
    height : array, shape (n,)
        Mm, in any order, between :data:`BOTTOM` and :data:`TOP`.

    Returns
    -------
    array, shape (n,)
        Nuclei of hydrogen, cm-3.
    """
    fine = np.unique(
        np.concatenate([np.linspace(BOTTOM, 3.0, 3105), np.linspace(3.0, TOP, 751), np.ravel(height)])
    )
    hot = temperature(parameters, fine)
    particles = HEAVY_PARTICLES + ionisation(hot)
    turbulence = 0.5 * (microturbulence(parameters, fine) * 1e5) ** 2
    # pressure over density, cm2 s-2
    specific = BOLTZMANN * hot * particles / (MASS_PER_HYDROGEN * HYDROGEN_MASS) + turbulence
    inverse = GRAVITY / specific
    depth = np.concatenate([[0.0], np.cumsum(0.5 * (inverse[1:] + inverse[:-1]) * np.diff(fine) * 1e8)])
    log_density = -depth - np.log(specific)
    photospheric = fine <= 0.2
    falc = np.interp(fine, _FALC[:, 0], _FALC[:, 2]) * np.log(10.0)
    join = int(photospheric.sum()) - 1
    log_density += falc[join] - log_density[join]
    log_density = np.where(photospheric, falc, log_density)
    departure = parameters.density_departure * _rise(fine, parameters.heating_depth + 0.15, 0.08)
    return np.asarray(np.exp(np.interp(height, fine, log_density + departure * np.log(10.0))))


def depth_points(parameters: AtmosphereParameters, points: int) -> Array:
    """Heights (Mm, top first) that share temperature, density and velocity steps evenly.

    The heights equidistribute a monitor: relative temperature change, density scale heights, velocity change,
    and a floor that keeps no step of the chromosphere above 0.1 Mm.

    Parameters
    ----------
    parameters : AtmosphereParameters
        The atmosphere.
    points : int
        How many.

    Returns
    -------
    array, shape (points,)
        Mm, descending from :data:`TOP` to :data:`BOTTOM`.
    """
    fine = np.concatenate([np.linspace(BOTTOM, 2.6, 5409), np.linspace(2.6, TOP, 400)[1:]])
    flows = fine < parameters.transition_region_height  # no line sees the corona move
    change = [
        np.abs(np.gradient(np.log(temperature(parameters, fine)), fine)) / 0.16,
        np.abs(np.gradient(np.log(hydrogen_density(parameters, fine)), fine)) / 0.45,
        np.abs(np.gradient(velocity(parameters, fine), fine)) / 3.0 * flows,
        np.where(flows, 1.0 / 0.1, 1.0 / 2.0),
    ]
    monitor = np.sqrt(np.sum(np.square(change), axis=0))
    share = np.concatenate([[0.0], np.cumsum(0.5 * (monitor[1:] + monitor[:-1]) * np.diff(fine))])
    heights: Array = np.interp(np.linspace(0.0, share[-1], points), share, fine)
    heights[0], heights[-1] = BOTTOM, TOP
    return heights[::-1].copy()
