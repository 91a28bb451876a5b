"""Wavelengths in air and in vacuum.

What a file holds is one of the two, and nothing in the numbers says which: at H-alpha the difference, 1.8
Angstrom, is a Doppler shift of 83 km/s. Everything after the readers is in vacuum.

The refractive index of standard air (15 degrees C, 101325 Pa, dry, 450 ppm CO2) is Ciddor's, 1996, Applied
Optics 35, 1566, doi:10.1364/AO.35.001566, equation 1; the inverse is found by iteration, so that the two are
one another's inverses to rounding.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

LIGHT_SPEED = 299_792.458  # km/s

Medium = Literal["vacuum", "air"]
"""What wavelengths are measured in."""


def refractive_index(wavelength: ArrayLike) -> NDArray[np.float64]:
    """Refractive index of standard air.

    Parameters
    ----------
    wavelength : array_like
        In vacuum, Angstrom, from 2,300 to 16,900.

    Returns
    -------
    ndarray
        Of the same shape.
    """
    squared = (1e4 / np.asarray(wavelength, dtype=np.float64)) ** 2  # wavenumber squared, 1/micron^2
    return np.asarray(1.0 + 0.05792105 / (238.0185 - squared) + 0.00167917 / (57.362 - squared))


def vacuum_to_air(wavelength: ArrayLike) -> NDArray[np.float64]:
    """Wavelengths in air, Angstrom, from those in vacuum."""
    return np.asarray(np.asarray(wavelength, dtype=np.float64) / refractive_index(wavelength))


def air_to_vacuum(wavelength: ArrayLike) -> NDArray[np.float64]:
    """Wavelengths in vacuum, Angstrom, from those in air."""
    air = np.asarray(wavelength, dtype=np.float64)
    vacuum = air
    for _ in range(4):  # the index changes by 1e-9 over its own effect: each pass gains six digits
        vacuum = air * refractive_index(vacuum)
    return vacuum


def to_vacuum(wavelength: ArrayLike, medium: Medium) -> NDArray[np.float64]:
    """Wavelengths in vacuum, Angstrom, from those in a medium."""
    return air_to_vacuum(wavelength) if medium == "air" else np.asarray(wavelength, dtype=np.float64)
