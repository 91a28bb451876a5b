"""Making spectra of a scan's images, which are displaced by a fraction of a pixel on the way.

This is done by cubic B-splines: two recursions along each axis make their coefficients (Unser 1999,
doi:10.1109/79.799930), four of which are then added up.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.compiled import compiled

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]

MARGIN = 16
"""Pixels around a block that cubic splines need: what lies further weighs less than 1e-8."""

POLE = np.float32(np.sqrt(3.0) - 2.0)
"""Of the recursions that make cubic B-splines' coefficients."""


def spectra_of(images: Image, inside: Mask) -> Image:
    """Make spectra of images.

    Parameters
    ----------
    images : ndarray of float32, shape (wavelength, y, x)
    inside : ndarray of bool, shape (y, x)
        Where there is something to be seen.

    Returns
    -------
    ndarray of float32, shape (y, x, wavelength)
        NaN where there is nothing to be seen.
    """
    spectra = np.empty((*inside.shape, len(images)), np.float32)
    _turn_over(images, np.ascontiguousarray(inside), spectra)
    return spectra


@compiled
def _turn_over(images: Image, inside: Mask, spectra: Image) -> None:
    rows, columns = inside.shape
    for y in range(rows):
        for x in range(columns):
            for point in range(len(images)):
                spectra[y, x, point] = images[point, y, x] if inside[y, x] else np.float32(np.nan)


@compiled
def fill(images: Image, where: tuple[NDArray[np.intp], ...], source: tuple[NDArray[np.intp], ...]) -> None:
    """Give some pixels of images what other pixels have.

    Parameters
    ----------
    images : ndarray of float32, shape (wavelength, y, x)
        Changed.
    where, source : tuple of ndarray of int, shape (n,)
        Rows and columns of the pixels, and of those that they become like.
    """
    for image in images:
        for index in range(len(where[0])):
            image[where[0][index], where[1][index]] = image[source[0][index], source[1][index]]


def displace(
    images: Image,
    displacement: tuple[float, float],
    inside: Mask,
    moved: Image,
    corner: tuple[int, int],
) -> None:
    """Displace images by half a pixel at most along both axes, and take off the margin.

    The bits are the same whatever the block's place in memory.

    Parameters
    ----------
    images : ndarray of float32, shape (wavelength, y, x)
        Overwritten.
    displacement : tuple of float
        Along y and x, pixels.
    inside : ndarray of bool, shape (y - 2 MARGIN, x - 2 MARGIN)
        Where there is something to be seen.
    moved : ndarray of float32, shape (rows, columns, wavelength)
        Where the result goes; NaN where there is nothing to be seen. In one piece: the loops know then that
        a spectrum's numbers lie side by side.
    corner : tuple of int
        At which row and column of it the result begins.
    """
    (first_y, along_y), (first_x, along_x) = map(_weights, displacement)
    seen = np.ascontiguousarray(inside)
    _displace(images, first_y + MARGIN, along_y, first_x + MARGIN, along_x, POLE, seen, moved, *corner)


def _weights(displacement: float) -> tuple[int, NDArray[np.float32]]:
    """Step to the first of the four coefficients that count at a point, and their weights."""
    first = -2 if displacement > 0.0 else -1
    distance = np.abs(np.arange(first, first + 4) + displacement)
    near = (4.0 - 6.0 * distance**2 + 3.0 * distance**3) / 6.0
    far = np.maximum(2.0 - distance, 0.0) ** 3 / 6.0
    # The recursions leave a factor to their coefficients.
    return first, (-6.0 * float(POLE) * np.where(distance <= 1.0, near, far)).astype(np.float32)


@compiled
def _to_coefficients(values: Image, pole: np.float32) -> None:
    """Replace values (n, m) by their splines' coefficients along the first axis, but for a factor."""
    end = np.float32(1.0) - pole
    length, side_by_side = values.shape
    for column in range(side_by_side):
        values[0, column] /= end
    for row in range(1, length):
        for column in range(side_by_side):
            values[row, column] += values[row - 1, column] * pole
    for column in range(side_by_side):
        values[length - 1, column] /= end
    for row in range(length - 2, -1, -1):
        for column in range(side_by_side):
            values[row, column] += values[row + 1, column] * pole


@compiled
def _displace(
    images: Image,
    first_y: int,
    along_y: NDArray[np.float32],
    first_x: int,
    along_x: NDArray[np.float32],
    pole: np.float32,
    inside: Mask,
    moved: Image,
    top: int,
    left: int,
) -> None:
    """Displace images along y, and then along x, row by row."""
    points, _, width = images.shape
    for image in images:
        _to_coefficients(image, pole)
    row = np.empty((points, width), np.float32)
    spectra = np.empty((width, points), np.float32)
    for y in range(inside.shape[0]):
        if not inside[y].any():
            moved[top + y, left : left + inside.shape[1]] = np.nan
            continue
        for point in range(points):
            near = images[point, y + first_y : y + first_y + 4]
            for x in range(width):
                total = near[0, x] * along_y[0]
                total += near[1, x] * along_y[1]
                total += near[2, x] * along_y[2]
                total += near[3, x] * along_y[3]
                row[point, x] = total
        for x in range(width):
            for point in range(points):
                spectra[x, point] = row[point, x]
        _to_coefficients(spectra, pole)
        for x in range(inside.shape[1]):
            if not inside[y, x]:
                moved[top + y, left + x] = np.nan
                continue
            for point in range(points):
                total = spectra[x + first_x, point] * along_x[0]
                total += spectra[x + first_x + 1, point] * along_x[1]
                total += spectra[x + first_x + 2, point] * along_x[2]
                total += spectra[x + first_x + 3, point] * along_x[3]
                moved[top + y, left + x, point] = total
