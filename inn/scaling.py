"""Physical units to network units and back, one named pair per quantity.

The network's units are log10 of the electron density in cm-3, log10 of the temperature in K, and
sign(v) log10(|v| + 1) of the velocity in km/s (Osborne, Armstrong & Fletcher 2019, section 3.1,
doi:10.3847/1538-4357/ab07b4, whose v is in cm/s and divided by 1e5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from inn.errors import MisuseError
from inn.layout import QUANTITIES

Array = TypeVar("Array", NDArray[Any], torch.Tensor)

UNITS: Mapping[str, str] = {"electron_density": "cm-3", "temperature": "K", "velocity": "km s-1"}
"""The physical unit of each quantity, as astropy reads it."""

_LN10 = math.log(10.0)


def _library(values: NDArray[Any] | torch.Tensor) -> ModuleType:
    # The few functions needed here have the same names and meanings in both libraries.
    return torch if isinstance(values, torch.Tensor) else np


def _log10(values: Array) -> Array:
    scaled: Array = _library(values).log10(values)
    return scaled


def _power_of_ten(values: Array) -> Array:
    physical: Array = 10.0**values
    return physical


def _signed_log10(values: Array) -> Array:
    library = _library(values)
    # log1p: near rest, log10(|v| + 1) would lose the velocity to the 1.
    scaled: Array = library.sign(values) * (library.log1p(library.abs(values)) / _LN10)
    return scaled


def _signed_power_of_ten(values: Array) -> Array:
    library = _library(values)
    physical: Array = library.sign(values) * library.expm1(library.abs(values) * _LN10)
    return physical


@dataclass(frozen=True)
class Scaling:
    """One quantity's pair: to network units and back.

    Parameters
    ----------
    name : str
        What model files call the pair.
    scale, unscale : callable
        From physical to network units, and the inverse.
    """

    name: str
    scale: Callable[[Any], Any]
    unscale: Callable[[Any], Any]


SCALINGS: Mapping[str, Scaling] = {
    "electron_density": Scaling("log10", _log10, _power_of_ten),
    "temperature": Scaling("log10", _log10, _power_of_ten),
    "velocity": Scaling("signed_log10", _signed_log10, _signed_power_of_ten),
}
"""The pair of each quantity."""


def _pair(quantity: str) -> Scaling:
    try:
        return SCALINGS[quantity]
    except KeyError:
        raise MisuseError(
            "there is no such quantity", found=quantity, expected=" or ".join(QUANTITIES)
        ) from None


def scale(quantity: str, values: Array) -> Array:
    """Bring a quantity from physical units to network units.

    Parameters
    ----------
    quantity : str
        ``"electron_density"``, ``"temperature"`` or ``"velocity"``.
    values : numpy.ndarray or torch.Tensor
        Any shape, in cm-3, K or km/s. Densities and temperatures must be positive: others become NaN or
        minus infinity.

    Returns
    -------
    numpy.ndarray or torch.Tensor
        The same shape and library.

    Raises
    ------
    MisuseError
        If the quantity is unknown.
    """
    scaled: Array = _pair(quantity).scale(values)
    return scaled


def unscale(quantity: str, values: Array) -> Array:
    """Bring a quantity from network units to physical units: the inverse of `scale`.

    Every pair ascends, so that quantiles taken in network units are the quantiles in physical units.

    Parameters
    ----------
    quantity : str
        ``"electron_density"``, ``"temperature"`` or ``"velocity"``.
    values : numpy.ndarray or torch.Tensor
        Any shape, in network units.

    Returns
    -------
    numpy.ndarray or torch.Tensor
        The same shape and library, in cm-3, K or km/s.

    Raises
    ------
    MisuseError
        If the quantity is unknown.
    """
    physical: Array = _pair(quantity).unscale(values)
    return physical


def scale_atmosphere(electron_density: Array, temperature: Array, velocity: Array) -> Array:
    """Join three physical quantities into atmosphere vectors in network units.

    Parameters
    ----------
    electron_density, temperature, velocity : numpy.ndarray or torch.Tensor
        Each of shape (..., heights), in cm-3, K and km/s (upflow positive).

    Returns
    -------
    numpy.ndarray or torch.Tensor
        Shape (..., 3 heights): all densities, then all temperatures, then all velocities.
    """
    parts = [
        scale(quantity, values)
        for quantity, values in zip(QUANTITIES, (electron_density, temperature, velocity), strict=True)
    ]
    joined: Array = _library(parts[0]).concatenate(parts, -1)
    return joined


def unscale_atmosphere(atmosphere: Array) -> dict[str, Array]:
    """Split atmosphere vectors into named quantities in physical units: the inverse of `scale_atmosphere`.

    Parameters
    ----------
    atmosphere : numpy.ndarray or torch.Tensor
        Shape (..., 3 heights), in network units.

    Returns
    -------
    dict
        For each of `inn.layout.QUANTITIES` an array of shape (..., heights), in cm-3, K and km/s.

    Raises
    ------
    MisuseError
        If the last dimension does not hold three quantities.
    """
    size = atmosphere.shape[-1]
    if size % len(QUANTITIES):
        raise MisuseError(
            "an atmosphere vector holds three quantities at every height",
            found=f"{size} numbers",
            expected=f"a multiple of {len(QUANTITIES)}",
        )
    heights = size // len(QUANTITIES)
    return {
        quantity: unscale(quantity, atmosphere[..., index * heights : (index + 1) * heights])
        for index, quantity in enumerate(QUANTITIES)
    }
