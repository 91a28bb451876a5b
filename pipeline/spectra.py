"""From a line's own wavelength axis to the network's points, and the normalisation both lines share.

Linear interpolation, as in the paper (Osborne, Armstrong & Fletcher 2019, ApJ 873, 128, section 4), is a
matrix: it is made once per axis, and a whole block of pixels is one matrix product. The monotone cubic one
takes two such products, of the intensities and of their slopes, which are found for all pixels at once. Where
each pixel has wavelengths of its own (CRISP's cavity errors) each is interpolated on them, all at once too.

The code is written to the array API standard (2024.12), and the arrays may be of any library that follows it,
on any device: NumPy's, CuPy's, torch's. They stay where they are; only the two short wavelength axes are
handled on the host. (With CuPy it has never been run: it is checked with `array-api-strict`, on a device from
which nothing may be read.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import ArrayLike, NDArray

from inn.layout import Layout, LineWindow
from pipeline.errors import InputError, MisuseError

# Any array of the array-API kind: NumPy's, CuPy's, torch's.
Array = Any

Interpolation = Literal["linear", "pchip"]
"""How profiles are brought to the network's points: linearly, or by monotone cubics."""

SLACK = 1e-9  # Angstrom: wavelength axes are sums of decimal steps, equal only to rounding
COARSE = 1e-5  # Angstrom: the same in single precision, which `covered` has decided before


def _axis(wavelength: ArrayLike) -> NDArray[np.float64]:
    axis = np.asarray(wavelength, dtype=np.float64)
    if axis.ndim != 1 or axis.size < 2 or not np.all(np.diff(axis) > 0):
        raise InputError(
            "a wavelength axis must hold at least two values and increase",
            found=f"shape {axis.shape}, {axis.ravel()[:4]}...",
            remedy="sort the spectral axis and remove repeated wavelengths",
        )
    return axis


def _points(wavelength: ArrayLike) -> NDArray[np.float64]:
    points = np.atleast_1d(np.asarray(wavelength, dtype=np.float64))
    if points.size == 0:
        raise InputError(
            "there is no wavelength to interpolate to", found=f"shape {points.shape}", expected="one at least"
        )
    return points


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
    low, high = _reach(axis)
    missing = float(max(low - points[0], points[-1] - high))
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


def covered(wavelength: ArrayLike, window: LineWindow, shift: ArrayLike) -> NDArray[np.bool_]:
    """Which pixels' own wavelengths serve every point of a window, as `covers` says of one axis.

    Parameters
    ----------
    wavelength : array_like, shape (n,)
        Vacuum wavelengths of the observed line, Angstrom, increasing.
    window : LineWindow
        The network's window around the same line.
    shift : array_like
        What is added to the wavelengths at each pixel, Angstrom.

    Returns
    -------
    ndarray of bool, shape as `shift`
        False where the shift is not known (NaN).
    """
    axis, points, moved = _axis(wavelength), window.wavelengths, np.asarray(shift, dtype=np.float64)
    low, high = _reach(axis)
    return np.asarray((points[0] - moved >= low - SLACK) & (points[-1] - moved <= high + SLACK))


def _reach(axis: NDArray[np.float64]) -> tuple[float, float]:
    """What an axis can serve: half a sampling step beyond its ends."""
    return float(axis[0] - 0.5 * (axis[1] - axis[0])), float(axis[-1] + 0.5 * (axis[-1] - axis[-2]))


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
        There is no point, or one lies more than half a sampling step beyond the axis.
    """
    axis, points, left = _places(wavelength_from, wavelength_to)
    weight = (points - axis[left]) / (axis[left + 1] - axis[left])
    matrix = np.zeros((points.size, axis.size))
    rows = np.arange(points.size)
    matrix[rows, left] = 1.0 - weight
    matrix[rows, left + 1] = weight
    return matrix


def _places(
    wavelength_from: ArrayLike, wavelength_to: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """Axis, points, and the interval of the axis that serves each point; those beyond it have the last."""
    axis, points = _axis(wavelength_from), _points(wavelength_to)
    low, high = _reach(axis)
    if points.min() < low - SLACK or points.max() > high + SLACK:
        raise InputError(
            "the wavelength range is too short",
            found=f"{axis[0]:.3f} to {axis[-1]:.3f} Angstrom",
            expected=f"{points.min():.3f} to {points.max():.3f} Angstrom, less half a sampling step",
            remedy="use scans that cover the network's windows, or a network with narrower ones",
        )
    return axis, points, np.clip(np.searchsorted(axis, points, side="right") - 1, 0, axis.size - 2)


def _like(values: ArrayLike, array: Array) -> Array:
    """Numbers of the host beside an array: in its library, dtype and device."""
    return array_namespace(array).asarray(values, dtype=array.dtype, device=device(array))


def monotone_slopes(spectra: Array, wavelength: ArrayLike) -> Array:
    """Slopes with which cubics through a spectrum's values rise and fall only where the values do.

    In the interior the weighted harmonic mean of the two neighbouring differences, zero at an extremum; at
    the ends the parabola's through three values, limited likewise (Fritsch & Carlson 1980,
    doi:10.1137/0717021; Fritsch & Butland 1984, doi:10.1137/0905021): the same as SciPy's
    `PchipInterpolator`.

    Parameters
    ----------
    spectra : array, shape (pixels, n)
        Intensities.
    wavelength : array_like, shape (n,)
        Wavelengths, Angstrom, increasing; at least three.

    Returns
    -------
    array, shape (pixels, n)
        Intensity per Angstrom, in the library and on the device of `spectra`.

    Raises
    ------
    InputError
        The axis has fewer than three values or does not increase.
    """
    axis = _axis(wavelength)
    if axis.size < 3:
        raise InputError("monotone cubics need three wavelengths at least", found=f"{axis.size}")
    xp = array_namespace(spectra)
    steps = np.diff(axis)
    width = _like(steps, spectra)
    secant = (spectra[:, 1:] - spectra[:, :-1]) / width
    before, after = secant[:, :-1], secant[:, 1:]
    first, second = 2.0 * width[1:] + width[:-1], width[1:] + 2.0 * width[:-1]
    zero = xp.zeros_like(before)
    same = _agree(before, after)
    # Where the two differences disagree there is nothing to average, and a one keeps the division quiet.
    one = xp.ones_like(before)
    mean = (first + second) / (first / xp.where(same, before, one) + second / xp.where(same, after, one))
    # A value that is not finite disagrees with all: its pixel is spoilt through the values themselves.
    inner = xp.where(same, mean, zero)
    ends = (
        _end_slope(secant[:, 0], secant[:, 1], steps[0], steps[1]),
        _end_slope(secant[:, -1], secant[:, -2], steps[-1], steps[-2]),
    )
    return xp.concat((ends[0][:, None], inner, ends[1][:, None]), axis=-1)


def _agree(one: Array, other: Array) -> Array:
    """Where two slopes both rise or both fall.

    Their product might underflow. `sign` and `clip` are not used: array-api-compat's, around CuPy, copy the
    number of True values of a mask to the host.
    """
    return ((one > 0) & (other > 0)) | ((one < 0) & (other < 0))


def _end_slope(near: Array, far: Array, near_step: float, far_step: float) -> Array:
    """Slope (pixels,) at an end, from the last difference and the one before it."""
    xp = array_namespace(near)
    total = float(near_step + far_step)
    slope = (float(2.0 * near_step + far_step) / total) * near - (float(near_step) / total) * far
    slope = xp.where(_agree(slope, near), slope, xp.zeros_like(slope))
    overshoots = _agree(near, -far) & (xp.abs(slope) > 3.0 * xp.abs(near))
    return xp.where(overshoots, 3.0 * near, slope)


def check_interpolation(interpolation: str) -> None:
    """Refuse a name that is none of `Interpolation`.

    Raises
    ------
    MisuseError
        There is no such interpolation.
    """
    if interpolation not in get_args(Interpolation):
        raise MisuseError(
            "there is no such interpolation",
            where="interpolation",
            found=interpolation,
            expected=" or ".join(get_args(Interpolation)),
        )


def interpolate(
    spectra: Array,
    wavelength_from: ArrayLike,
    wavelength_to: ArrayLike,
    interpolation: Interpolation = "linear",
) -> Array:
    """Bring the spectra of many pixels from one wavelength axis to another.

    Parameters
    ----------
    spectra : array, shape (pixels, n)
        Intensities, float32 or float64, of any array-API library.
    wavelength_from, wavelength_to : array_like, shapes (n,) and (m,)
        As for `sampling_matrix`.
    interpolation : {"linear", "pchip"}
        Straight lines between neighbouring values, or monotone cubics (`monotone_slopes`).

    Returns
    -------
    array, shape (pixels, m)
        In the library, dtype and on the device of `spectra`; each pixel's does not depend, to the last bit,
        on the others that are there. NaN throughout for a pixel with a value that is not finite.

    Raises
    ------
    InputError
        There is no point, or one lies more than half a sampling step beyond the axis.
    MisuseError
        There is no such interpolation.
    """
    check_interpolation(interpolation)
    xp = array_namespace(spectra)
    axis, points, left = _places(wavelength_from, wavelength_to)
    width = axis[left + 1] - axis[left]
    # No product of matrices: how such a one rounds depends on how many pixels there are.
    ends = [xp.asarray(left + right, device=device(spectra)) for right in (0, 1)]

    def between(values: Array, at_left: NDArray[np.float64], at_right: NDArray[np.float64]) -> Array:
        before, after = (xp.take(values, end, axis=-1) for end in ends)
        return before * _like(at_left, spectra) + after * _like(at_right, spectra)

    if interpolation == "linear":
        weight = (points - axis[left]) / width
        found = between(spectra, 1.0 - weight, weight)
    else:
        t = (np.clip(points, axis[0], axis[-1]) - axis[left]) / width
        rising = t * t * (3.0 - 2.0 * t)
        found = between(spectra, 1.0 - rising, rising)
        # Beyond the ends a straight line with the slope there.
        at_left = width * t * (1.0 - t) ** 2 + np.minimum(points - axis[0], 0.0)
        at_right = width * t * t * (t - 1.0) + np.maximum(points - axis[-1], 0.0)
        found = found + between(monotone_slopes(spectra, wavelength_from), at_left, at_right)
    good = xp.isfinite(xp.sum(spectra, axis=-1))
    return xp.where(good[:, None], found, _like(xp.nan, spectra))


def interpolate_shifted(
    spectra: Array,
    wavelength_from: ArrayLike,
    wavelength_to: ArrayLike,
    shift: Array,
    interpolation: Interpolation = "linear",
) -> Array:
    """Bring the spectra of many pixels, each on wavelengths of its own, to one axis.

    Parameters
    ----------
    spectra : array, shape (pixels, n)
        Intensities, float32 or float64, of any array-API library.
    wavelength_from : array_like, shape (n,)
        Wavelengths at which the spectra would be known without the shift, Angstrom, increasing.
    wavelength_to : array_like, shape (m,)
        Wavelengths at which they are wanted, Angstrom, in any order.
    shift : array, shape (pixels,)
        What is added to `wavelength_from` at each pixel, Angstrom; in the library and on the device of
        `spectra`.
    interpolation : {"linear", "pchip"}
        As for `interpolate`.

    Returns
    -------
    array, shape (pixels, m)
        In the library, dtype and on the device of `spectra`. NaN throughout for a pixel with a value that is
        not finite, without a shift, or whose wavelengths do not reach a point to half a sampling step.

    Raises
    ------
    InputError
        The axis is too short or does not increase, or there is no point.
    MisuseError
        There is no such interpolation.
    """
    check_interpolation(interpolation)
    xp = array_namespace(spectra, shift)
    axis, points = _axis(wavelength_from), _points(wavelength_to)
    # Counted from the middle: single precision would leave a thousandth of an Angstrom of the whole number.
    middle = axis[axis.size // 2]
    knots, steps = _like(axis - middle, spectra), _like(np.diff(axis), spectra)
    wanted = _like(points - middle, spectra)[None, :] - xp.astype(shift, spectra.dtype)[:, None]
    left = xp.searchsorted(knots[1:-1], wanted, side="right")  # those beyond the axis have its last interval
    start, width = (xp.reshape(xp.take(part, xp.reshape(left, (-1,))), left.shape) for part in (knots, steps))
    before, after = (xp.take_along_axis(spectra, left + right, axis=-1) for right in (0, 1))
    t = (wanted - start) / width
    if interpolation == "linear":
        found = before + t * (after - before)
    else:
        slopes = monotone_slopes(spectra, wavelength_from)
        slope, next_slope = (xp.take_along_axis(slopes, left + right, axis=-1) for right in (0, 1))
        inside = xp.minimum(xp.maximum(t, _like(0.0, t)), _like(1.0, t))
        rising = inside * inside * (3.0 - 2.0 * inside)
        away = inside * (1.0 - inside)
        found = before + rising * (after - before)
        found = found + width * away * ((1.0 - inside) * slope - inside * next_slope)
        # Beyond the ends a straight line with the slope there.
        beyond = width * (t - inside)
        found = found + beyond * xp.where(t < 0.0, slope, next_slope)
    low, high = (bound - float(middle) for bound in _reach(axis))
    served = (wanted >= low - COARSE) & (wanted <= high + COARSE)
    good = xp.isfinite(xp.sum(spectra, axis=-1)) & xp.all(served, axis=-1)
    return xp.where(good[:, None], found, _like(xp.nan, spectra))


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
    with _named(window):
        return sampling_matrix(wavelength, window.wavelengths)


@contextmanager
def _named(window: LineWindow) -> Iterator[None]:
    """Say in an error of an axis which line's it is."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"the {window.name} profiles cannot be interpolated: {error.problem}",
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
        Both lines, one after the other, at the network's points; of any array-API library.

    Returns
    -------
    lines : array, shape (pixels, points)
        Normalised; NaN where the maximum is not a positive number.
    scale : array, shape (pixels,)
        The joint maximum; multiplying by it restores the intensities.
    """
    xp = array_namespace(lines)
    scale = xp.max(lines, axis=-1)
    usable = xp.isfinite(scale) & (scale > 0)
    divisor = xp.where(usable, scale, _like(xp.nan, lines))
    return lines / divisor[..., None], scale


def network_lines(
    halpha: Array,
    ca8542: Array,
    wavelength_halpha: ArrayLike,
    wavelength_ca8542: ArrayLike,
    layout: Layout,
    interpolation: Interpolation = "linear",
    *,
    shift_halpha: Array | None = None,
    shift_ca8542: Array | None = None,
) -> tuple[Array, Array]:
    """Observed profiles as the network takes them.

    Parameters
    ----------
    halpha : array, shape (pixels, n)
        H-alpha intensities; float32 or float64, of any array-API library.
    ca8542 : array, shape (pixels, m)
        Ca II 8542 intensities in the same unit.
    wavelength_halpha, wavelength_ca8542 : array_like, shapes (n,) and (m,)
        Vacuum wavelengths of the two axes, Angstrom, increasing.
    layout : Layout
        The network's; its windows say which points are wanted.
    interpolation : {"linear", "pchip"}
        As for `interpolate`. A network expects profiles that were brought to its points as its training
        profiles were: linearly, unless its record says otherwise.
    shift_halpha, shift_ca8542 : array, shape (pixels,), optional
        What is added to a line's wavelengths at each pixel, Angstrom (`interpolate_shifted`).

    Returns
    -------
    lines : array, shape (pixels, layout.lines_size)
        H-alpha, then Ca II 8542, divided by their joint maximum. A pixel with any value that is not finite,
        or whose own wavelengths do not cover a window, becomes NaN throughout, without touching its
        neighbours.
    scale : array, shape (pixels,)
        The joint maximum, in the unit of the intensities.

    Raises
    ------
    InputError
        An axis that all pixels share does not cover its window.
    MisuseError
        There is no such interpolation.
    """
    xp = array_namespace(halpha, ca8542)
    parts = []
    with np.errstate(invalid="ignore"):  # values that are not finite are expected, and become NaN
        for spectra, wavelength, shift, window in zip(
            (halpha, ca8542),
            (wavelength_halpha, wavelength_ca8542),
            (shift_halpha, shift_ca8542),
            layout.lines,
            strict=True,
        ):
            points = window.wavelengths
            with _named(window):
                parts.append(
                    interpolate(spectra, wavelength, points, interpolation)
                    if shift is None
                    else interpolate_shifted(spectra, wavelength, points, shift, interpolation)
                )
    return normalise(xp.concat(parts, axis=-1))
