"""How far one image is displaced from another: the peaks of their cross-correlation.

Two searches, for images of one size. In whole pixels, over the pixels that two masks have in common, by
masked normalised cross-correlation (Padfield 2012, doi:10.1109/TIP.2011.2181402); and to a hundredth of a
pixel, by the upsampled matrix-multiply Fourier transform (Guizar-Sicairos et al. 2008,
doi:10.1364/OL.33.000156). scikit-image has both for images of any kind; these know that images are real, go
to a hundredth by way of a tenth, and take a quarter of the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]

STEPS = (0.1, 0.01)
"""Pixels between the displacements that are tried, one grid around the best of the one before."""
REACH = 0.7
"""Pixels from the best whole displacement to which the first of these grids goes."""


def whole_displacement(
    reference: Image, moving: Image, reference_mask: Mask, moving_mask: Mask, overlap: float
) -> NDArray[np.float64] | None:
    """Displacement in whole pixels, by masked normalised cross-correlation.

    Parameters
    ----------
    reference, moving : ndarray of float, shape (y, x)
        The images.
    reference_mask, moving_mask : ndarray of bool, shape (y, x)
        The pixels of each that take part.
    overlap : float
        Least share of the pixels that can overlap which a displacement must leave in common.

    Returns
    -------
    ndarray of float64, shape (2,), or None
        Pixels (y, x) by which `moving` has to be moved to lie on `reference`; None for images without any
        structure.
    """
    for image, mask in ((reference, reference_mask), (moving, moving_mask)):
        if not mask.any() or np.ptp(image[mask]) == 0.0:
            return None
    # No displacement may wrap around.
    size = [fft.next_fast_len(2 * length - 1, real=True) for length in reference.shape]

    def transform(image: NDArray[Any]) -> NDArray[np.complex64]:
        return np.asarray(fft.rfft2(image.astype(np.float32, copy=False), size))

    first = np.where(reference_mask, reference, np.float32(0.0))
    second = np.where(moving_mask, moving, np.float32(0.0))
    of_first, of_second = (
        (transform(mask), transform(image), transform(image * image))
        for mask, image in ((reference_mask, first), (moving_mask, second))
    )

    common = np.rint(_correlated(of_first[0], of_second[0], size))
    enough = common >= max(overlap * common.max(), 1.0)
    count = common[enough]

    def total(one: int, other: int) -> Image:
        return np.asarray(_correlated(of_first[one], of_second[other], size)[enough])

    sums = total(1, 0), total(0, 1)
    variances = [
        np.maximum(squares - own * own / count, 0.0)
        for squares, own in zip((total(2, 0), total(0, 2)), sums, strict=True)
    ]
    spread = np.sqrt(variances[0] * variances[1])
    # What is left of a difference of large numbers is no variance.
    least = 1e3 * np.finfo(spread.dtype).eps * spread.max(initial=0.0)
    covariance = total(1, 1) - sums[0] * sums[1] / count
    correlation = np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > least)
    best = np.flatnonzero(enough)[correlation.argmax()]
    return _signed(int(best), size)


def fine_displacement(
    reference: NDArray[np.float64], moving: NDArray[np.float64], steps: tuple[float, ...] = STEPS
) -> NDArray[np.float64]:
    """Displacement to a fraction of a pixel, by cross-correlation that wraps around at the edges.

    Parameters
    ----------
    reference, moving : ndarray of float64, shape (y, x)
        The images, faded out towards the edges. The amplitudes of their spectra count: whitened to pure phase
        the displacement follows the photons' noise instead.
    steps : tuple of float
        Pixels between the displacements that are tried, from coarse to fine.

    Returns
    -------
    ndarray of float64, shape (2,)
        Pixels (y, x) by which `moving` has to be moved to lie on `reference`.
    """
    # In double precision: on a grid this fine single precision lets the number of threads decide.
    product = fft.rfft2(reference) * np.conj(fft.rfft2(moving))
    whole = fft.irfft2(product, reference.shape)
    rows, columns = reference.shape
    along_y, along_x = fft.fftfreq(rows), fft.rfftfreq(columns)
    # Frequencies of a real image come in pairs, of which one is kept.
    pairs = np.where((along_x == 0.0) | (along_x == 0.5), 1.0, 2.0)
    best, reach = _signed(int(whole.argmax()), list(whole.shape)), REACH
    for step in steps:
        count = round(reach / step)
        tried = np.arange(-count, count + 1) * step
        y = np.exp(2j * np.pi * np.outer(best[0] + tried, along_y))
        x = np.exp(2j * np.pi * np.outer(along_x, best[1] + tried)) * pairs[:, None]
        values = (y @ product @ x).real
        peak = np.unravel_index(values.argmax(), values.shape)
        best, reach = best + tried[list(peak)], step
    return best


def _correlated(first: NDArray[np.complex64], second: NDArray[np.complex64], size: list[int]) -> Image:
    return np.asarray(fft.irfft2(first * np.conj(second), size))


def _signed(index: int, size: list[int]) -> NDArray[np.float64]:
    """Displacement at a place of a correlation: the later half of each axis are negative ones."""
    place = np.array(np.unravel_index(index, size))
    return np.where(2 * place > size, place - size, place).astype(np.float64)
