"""From a line's own wavelength axis to the network's points, and the normalisation both lines share.

Linear interpolation, as in the paper (Osborne, Armstrong & Fletcher 2019, ApJ 873, 128, section 4), is a
matrix: it is made once per axis, and a whole block of pixels is one matrix product. The arrays may be NumPy's
or CuPy's; only the two short wavelength axes are handled on the host.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inn.layout import Layout, LineWindow
from pipeline.errors import InputError

# Any array of the array-API kind: NumPy's or CuPy's.
Array = Any

SLACK = 1e-9  # Angstrom: wavelength axes are sums of decimal steps, equal only to rounding


def _namespace(array: Array) -> ModuleType:
    """Module whose functions work on `array`: NumPy or CuPy."""
    find = getattr(array, "__array_namespace__", None)
    module: ModuleType = np if find is None else find()
    return module


def _axis(wavelength: ArrayLike) -> NDArray[np.float64]:
    axis = np.asarray(wavelength, dtype=np.float64)
    if axis.ndim != 1 or axis.size < 2 or not np.all(np.diff(axis) > 0):
        raise InputError(
            "a wavelength axis must hold at least two values and increase",
            found=f"shape {axis.shape}, {axis.ravel()[:4]}...",
            remedy="sort the spectral axis and remove repeated wavelengths",
        )
    return axis


def shortfall(wavelength: ArrayLike, window: LineWindow) -> float:
    """How far the network's window lies outside of what an axis can serve.

    A window may overshoot the axis by half a sampling step, which linear extrapolation covers: CRISP's
    H-alpha axis is centred 0.03 Angstrom from the line's rest wavelength.

    Parameters
    ----------
    wavelength : array_like, shape (n,)
        Vacuum wavelengths of the observed line, Angstrom, increasing.
    window : LineWindow
        The network's window around the same line.

    Returns
    -------
    float
        Angstrom missing at the worse end; 0 where the window is covered.

    Raises
    ------
    InputError
        The axis is too short or does not increase.
    """
    axis = _axis(wavelength)
    points = window.wavelengths
    blue = axis[0] - 0.5 * (axis[1] - axis[0]) - points[0]
    red = points[-1] - axis[-1] - 0.5 * (axis[-1] - axis[-2])
    missing = float(max(blue, red))
    return missing if missing > SLACK else 0.0


def covers(wavelength: ArrayLike, window: LineWindow) -> bool:
    """Whether an axis serves every point of a window, extrapolating half a sampling step at most.

    Parameters
    ----------
    wavelength : array_like, shape (n,)
        Vacuum wavelengths of the observed line, Angstrom, increasing.
    window : LineWindow
        The network's window around the same line.
    """
    return shortfall(wavelength, window) == 0.0


def sampling_matrix(wavelength_from: ArrayLike, wavelength_to: ArrayLike) -> NDArray[np.float64]:
    """Linear interpolation from one wavelength axis to another, as a matrix.

    Parameters
    ----------
    wavelength_from : array_like, shape (n,)
        Wavelengths at which a spectrum is known, Angstrom, increasing.
    wavelength_to : array_like, shape (m,)
        Wavelengths at which it is wanted, Angstrom, in any order.

    Returns
    -------
    ndarray, shape (m, n), float64
        ``spectrum_to = matrix @ spectrum_from``. Every row sums to one and has at most two entries that are
        not zero. Points beyond the axis are extrapolated from its last two values.

    Raises
    ------
    InputError
        A point lies more than half a sampling step beyond the axis.
    """
    axis = _axis(wavelength_from)
    points = np.atleast_1d(np.asarray(wavelength_to, dtype=np.float64))
    lowest = axis[0] - 0.5 * (axis[1] - axis[0]) - SLACK
    highest = axis[-1] + 0.5 * (axis[-1] - axis[-2]) + SLACK
    if points.min() < lowest or points.max() > highest:
        raise InputError(
            "the wavelength range is too short",
            found=f"{axis[0]:.3f} to {axis[-1]:.3f} Angstrom",
            expected=f"{points.min():.3f} to {points.max():.3f} Angstrom, less half a sampling step",
            remedy="use scans that cover the network's windows, or a network with narrower ones",
        )
    left = np.clip(np.searchsorted(axis, points, side="right") - 1, 0, axis.size - 2)
    weight = (points - axis[left]) / (axis[left + 1] - axis[left])
    matrix = np.zeros((points.size, axis.size))
    rows = np.arange(points.size)
    matrix[rows, left] = 1.0 - weight
    matrix[rows, left + 1] = weight
    return matrix


def window_matrix(wavelength: ArrayLike, window: LineWindow) -> NDArray[np.float64]:
    """Matrix from a line's observed axis to the network's points of that line.

    Parameters
    ----------
    wavelength : array_like, shape (n,)
        Vacuum wavelengths of the observed line, Angstrom, increasing.
    window : LineWindow
        The network's window; its laboratory rest wavelength places it.

    Returns
    -------
    ndarray, shape (window.points, n), float64

    Raises
    ------
    InputError
        The axis does not cover the window (see `shortfall`).
    """
    try:
        return sampling_matrix(wavelength, window.wavelengths)
    except InputError as error:
        raise InputError(
            f"the {window.name} wavelength range is too short",
            where=window.name,
            found=error.found,
            expected=error.expected,
            remedy=error.remedy,
        ) from error


def normalise(lines: Array) -> tuple[Array, Array]:
    """Divide each pixel's lines by their joint maximum.

    Parameters
    ----------
    lines : array, shape (pixels, points)
        Both lines, one after the other, at the network's points.

    Returns
    -------
    lines : array, shape (pixels, points)
        Normalised; NaN where the maximum is not a positive number.
    scale : array, shape (pixels,)
        The joint maximum; multiplying by it restores the intensities.
    """
    xp = _namespace(lines)
    scale = lines.max(axis=-1)
    usable = xp.isfinite(scale) & (scale > 0)
    divisor = xp.where(usable, scale, xp.asarray(xp.nan, dtype=lines.dtype))
    return lines / divisor[..., None], scale


def network_lines(
    halpha: Array,
    ca8542: Array,
    wavelength_halpha: ArrayLike,
    wavelength_ca8542: ArrayLike,
    layout: Layout,
) -> tuple[Array, Array]:
    """Observed profiles as the network takes them.

    Parameters
    ----------
    halpha : array, shape (pixels, n)
        H-alpha intensities; NumPy or CuPy, float32 or float64.
    ca8542 : array, shape (pixels, m)
        Ca II 8542 intensities in the same unit.
    wavelength_halpha, wavelength_ca8542 : array_like, shapes (n,) and (m,)
        Vacuum wavelengths of the two axes, Angstrom, increasing.
    layout : Layout
        The network's; its windows say which points are wanted.

    Returns
    -------
    lines : array, shape (pixels, layout.lines_size)
        H-alpha, then Ca II 8542, divided by their joint maximum. A pixel with any value that is not finite
        becomes NaN throughout, without touching its neighbours.
    scale : array, shape (pixels,)
        The joint maximum, in the unit of the intensities.

    Raises
    ------
    InputError
        An axis does not cover its window.
    """
    xp = _namespace(halpha)
    parts = []
    with np.errstate(invalid="ignore"):  # values that are not finite are expected, and become NaN
        for spectra, wavelength, window in zip(
            (halpha, ca8542), (wavelength_halpha, wavelength_ca8542), layout.lines, strict=True
        ):
            matrix = xp.asarray(window_matrix(wavelength, window), dtype=spectra.dtype)
            parts.append(spectra @ matrix.T)
    return normalise(xp.concatenate(parts, axis=-1))
