"""CRISP's transmission profile: what the instrument makes of a spectrum before anyone samples it.

CRISP is a dual Fabry-Perot system in a telecentric f/165 beam (Scharmer et al. 2008, ApJ 689, L69,
doi:10.1086/595744): a high-resolution etalon selects a narrow peak, a low-resolution one suppresses the
neighbouring orders, a prefilter the rest. The profile here is the product of the two etalons' Airy functions
with the nominal cavities and reflectivities that the instrument's reduction pipeline uses (CRISPRED, de la
Cruz Rodriguez et al. 2015, A&A 573, A40, doi:10.1051/0004-6361/201424319), averaged over the cone of the
beam. Cavity errors, which vary over the field, are the data reduction's to remove, and so is the prefilter,
whose peak is hardly ever at the line: `Prefilter` is for spectra whose reduction has left it in and gives it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inn.layout import CA8542, HALPHA
from pipeline.errors import MisuseError
from pipeline.spectra import sampling_matrix

Array = NDArray[np.float64]

CAVITIES = (787.0e4, 295.5e4)
"""Nominal separations of the plates, Angstrom: the high-resolution and the low-resolution etalon."""
REFLECTIVITIES = {"halpha": (0.9330, 0.8492), "ca8542": (0.9300, 0.8520)}
"""Reflectivities of the two etalons' plates at each line."""
FOCAL_RATIO = 165.0
REACH = 0.6
"""Angstrom from the peak beyond which the profile is cut.

Of the peak itself 0.2 % lie beyond at H-alpha, 0.5 % at Ca II 8542; the side orders of the high-resolution
etalon, which the prefilter dims, are left out, too.
"""
_NODES = 241
_REST = {line.name: line.rest_wavelength for line in (HALPHA, CA8542)}


def transmission(line: str, offset: ArrayLike) -> Array:
    """CRISP's transmission around the wavelength that it is tuned to.

    Parameters
    ----------
    line : str
        ``"halpha"`` or ``"ca8542"``.
    offset : array_like
        Angstrom from the wavelength that the instrument is tuned to.

    Returns
    -------
    array, shape as `offset`
        Relative to its peak, without the prefilter. Full width at half maximum: 0.066 Angstrom at H-alpha,
        0.111 Angstrom at Ca II 8542 (0.059 and 0.104 in parallel light).

    Raises
    ------
    MisuseError
        The line is another one.
    """
    if line not in REFLECTIVITIES:
        raise MisuseError("CRISP's profile is not known there", found=line, expected=list(REFLECTIVITIES))
    wavelength = _REST[line] + np.asarray(offset, dtype=np.float64)
    return _airy(line, wavelength) / _airy(line, np.array(_REST[line]))


def _airy(line: str, wavelength: Array) -> Array:
    """Product of the two etalons' Airy functions, averaged over the beam."""
    # A telecentric beam fills a cone evenly: its rays are spread evenly in the square of the angle.
    nodes, weights = np.polynomial.legendre.leggauss(5)
    cosine = np.cos(0.5 / FOCAL_RATIO * np.sqrt(0.5 * (nodes + 1.0)))
    cosine /= weights @ cosine / 2.0  # the instrument is tuned with that beam, not with its central ray
    product = np.ones((*wavelength.shape, nodes.size))
    for cavity, reflectivity in zip(CAVITIES, REFLECTIVITIES[line], strict=True):
        # The nominal separation holds a whole number of half wavelengths only nearly.
        separation = round(2.0 * cavity / _REST[line]) * _REST[line] / 2.0
        finesse = 4.0 * reflectivity / (1.0 - reflectivity) ** 2
        product /= 1.0 + finesse * np.sin(2.0 * np.pi * separation * cosine / wavelength[..., None]) ** 2
    return np.asarray(product @ weights / 2.0)


def response_matrix(line: str, wavelength_from: ArrayLike, wavelength_to: ArrayLike) -> Array:
    """Matrix from a spectrum to what CRISP measures of it.

    Parameters
    ----------
    line : str
        ``"halpha"`` or ``"ca8542"``.
    wavelength_from : array_like, shape (n,)
        Wavelengths at which the spectrum is known, Angstrom, increasing.
    wavelength_to : array_like, shape (m,)
        Wavelengths that the instrument is tuned to, on the same scale.

    Returns
    -------
    ndarray, shape (m, n)
        ``measured = matrix @ spectrum``. Rows sum to one: a flat spectrum stays as it is. Where the profile
        reaches beyond the spectrum's ends, their values go on.

    Raises
    ------
    InputError
        A wavelength itself lies more than half a sampling step beyond the spectrum.
    MisuseError
        The line is another one.
    """
    axis = np.asarray(wavelength_from, dtype=np.float64)
    wanted = np.atleast_1d(np.asarray(wavelength_to, dtype=np.float64))
    sampling_matrix(axis, wanted)  # refuses what lies outside
    offset = np.linspace(-REACH, REACH, _NODES)
    weight = transmission(line, offset)
    seen = np.clip(wanted[:, None] + offset, axis[0], axis[-1])
    matrix = sampling_matrix(axis, seen.ravel()).reshape(wanted.size, offset.size, axis.size)
    return np.asarray(np.einsum("k,mkn->mn", weight / weight.sum(), matrix))


@dataclass(frozen=True)
class Prefilter:
    """Transmission of the interference filter in front of the etalons, in the form that reductions fit.

    ``(1 + slope o + cubic o^3) / (1 + (2 (w - centre) / width)^(2 cavities))``, with the wavelength w and its
    offset o from the line's rest (de la Cruz Rodriguez et al. 2015, doi:10.1051/0004-6361/201424319). Spectra
    are divided by it before they are calibrated: across H-alpha's 2.8 Angstrom a filter of 4.9 Angstrom whose
    peak is 1 Angstrom off changes intensities by a third.

    Attributes
    ----------
    line : str
        ``"halpha"`` or ``"ca8542"``.
    centre : float
        Angstrom in vacuum.
    width : float
        Full width at half maximum, Angstrom.
    cavities : float
        Of the filter; CRISP's have two.
    slope, cubic : float
        Asymmetry, per Angstrom and per Angstrom cubed.

    Raises
    ------
    MisuseError
        The line is another one, or width or cavities are not positive.
    """

    line: str
    centre: float
    width: float
    cavities: float = 2.0
    slope: float = 0.0
    cubic: float = 0.0

    def __post_init__(self) -> None:
        if self.line not in _REST or not (self.width > 0.0 and self.cavities > 0.0):
            raise MisuseError(
                "not a prefilter of these lines",
                found=f"{self.line}, {self.width} Angstrom wide, {self.cavities} cavities",
                expected=f"{' or '.join(_REST)}, a positive width and number of cavities",
            )

    def transmission(self, wavelength: ArrayLike) -> Array:
        """Transmission relative to that at the line's rest wavelength.

        Parameters
        ----------
        wavelength : array_like
            Angstrom in vacuum.

        Returns
        -------
        ndarray, shape as `wavelength`
        """
        return self._curve(np.asarray(wavelength, dtype=np.float64)) / self._curve(np.array(_REST[self.line]))

    def _curve(self, wavelength: Array) -> Array:
        offset = wavelength - _REST[self.line]
        away = np.abs(2.0 * (wavelength - self.centre) / self.width) ** (2.0 * self.cavities)
        return np.asarray((1.0 + self.slope * offset + self.cubic * offset**3) / (1.0 + away))
