"""F-CHROMA-like files for the tests: a scene whose every property is known, written as the database does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from inn.layout import CA8542, HALPHA
from pipeline.crisp.fchroma import file_name, write_fchroma

START = np.datetime64("2014-09-06T15:27:24", "ms")
CADENCE = np.timedelta64(11540, "ms")
BETWEEN_LINES = np.timedelta64(5015, "ms")
WAVELENGTH_HALPHA = 6564.584 + 0.2 * np.arange(-7, 8)
WAVELENGTH_CA8542 = 8544.440 + 0.1 * np.arange(-12, 13)
PAD = 1480


@dataclass(frozen=True)
class Truth:
    """What a pair of scans was made with.

    Attributes
    ----------
    halpha, ca8542 : ndarray
        Intensities (wavelength, y, x) in H-alpha's frame, without noise or pad: both lines unshifted.
    field_halpha, field_ca8542 : ndarray of bool
        (y, x): inside the field, each line in its own frame.
    shift : tuple of float
        (y, x) pixels that bring Ca II onto H-alpha.
    """

    halpha: NDArray[np.float64]
    ca8542: NDArray[np.float64]
    field_halpha: NDArray[np.bool_]
    field_ca8542: NDArray[np.bool_]
    shift: tuple[float, float]


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], size: float) -> NDArray[np.float64]:
    """Gaussian texture with structures of `size` pixels, zero mean, unit variance, periodic."""
    texture = ndimage.gaussian_filter(rng.standard_normal(shape), size, mode="wrap")
    return (texture - texture.mean()) / texture.std()


def displace(image: NDArray[np.float64], dy: float, dx: float) -> NDArray[np.float64]:
    """Move an image's content by (dy, dx) pixels, exactly, as a periodic band-limited function."""
    return np.fft.ifft2(ndimage.fourier_shift(np.fft.fft2(image), (dy, dx))).real


def rotated_field(shape: tuple[int, int], angle: float, fill: float = 0.72) -> NDArray[np.bool_]:
    """A rectangle rotated by `angle` degrees in the middle of a canvas; `fill` of the canvas each way."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    y, x = rows - (shape[0] - 1) / 2, columns - (shape[1] - 1) / 2
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    inside_x = np.abs(c * x + s * y) <= fill * shape[1] / 2
    inside_y = np.abs(-s * x + c * y) <= fill * shape[0] / 2
    return inside_x & inside_y


def scene(
    rng: np.random.Generator, shape: tuple[int, int], brightness: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two ribbons over quiet Sun in both lines, (wavelength, y, x), in data numbers.

    Wings show granulation, cores show fibrils that the two lines share only in part; ribbons put emission
    into the cores, wider in H-alpha, and of different shape in the two lines.
    """
    granules = smooth_noise(rng, shape, 3.5)
    fibrils = smooth_noise(rng, shape, 2.5)
    own = [smooth_noise(rng, shape, 2.5) for _ in range(2)]
    rows, columns = np.mgrid[: shape[0], : shape[1]] / np.array(shape)[:, None, None]
    waves = 0.03 * np.sin(2 * np.pi * columns * np.array([3, 4])[:, None, None])
    ribbons = sum(
        np.exp(-(((rows - centre - wave) / 0.03) ** 2))
        for centre, wave in zip((0.38, 0.62), waves, strict=True)
    ) * (1 + 0.3 * smooth_noise(rng, shape, 4.0))
    cubes = []
    for line, (axis, rest, continuum, width) in enumerate(
        (
            (WAVELENGTH_HALPHA, HALPHA.rest_wavelength, 2800.0, 0.55),
            (WAVELENGTH_CA8542, CA8542.rest_wavelength, 1900.0, 0.30),
        )
    ):
        core = np.exp(-(((axis - rest) / width) ** 2))[:, None, None]
        chromosphere = np.sqrt(0.75) * fibrils + np.sqrt(0.25) * own[line]
        photosphere = continuum * (1 + 0.07 * granules) * (1 - 0.7 * core)
        cubes.append(
            photosphere + continuum * core * (0.05 * chromosphere + (0.9, 0.6)[line] * brightness * ribbons)
        )
    return cubes[0], cubes[1]


def write_pair(
    folder: Path,
    *,
    shape: tuple[int, int] = (160, 200),
    shift: tuple[float, float] = (0.0, 0.0),
    angle: float | None = 20.0,
    seed: int = 0,
    number: int = 0,
    brightness: float = 1.0,
    noise: float = 1.0,
    delay: np.timedelta64 = BETWEEN_LINES,
) -> tuple[Path, Path, Truth]:
    """Write one scan of each line; Ca II's field and content are displaced by minus `shift`.

    Parameters
    ----------
    angle : float or None
        Rotation of the field in its pad, degrees; None for a frame without a pad.
    noise : float
        Photon noise, in units of the square root of the data numbers.
    """
    rng = np.random.default_rng(seed)
    halpha, ca8542 = scene(rng, shape, brightness)
    field = np.ones(shape, bool) if angle is None else rotated_field(shape, angle)
    moved = np.stack([displace(image, -shift[0], -shift[1]) for image in ca8542])
    # The field moves rigidly with the content, by whole pixels: its border is a matter of a pixel anyway.
    offset = tuple(-round(value) for value in shift)
    field_moved = field if angle is None else np.roll(field, offset, (0, 1))
    time = START + number * CADENCE
    paths = []
    for line, cube, inside, axis, moment in (
        ("halpha", halpha, field, WAVELENGTH_HALPHA, time),
        ("ca8542", moved, field_moved, WAVELENGTH_CA8542, time + delay),
    ):
        noisy = cube + noise * np.sqrt(np.maximum(cube, 1.0)) * rng.standard_normal(cube.shape)
        counts = np.where(inside, np.clip(noisy, 1, 32767), PAD)
        path = folder / file_name(line, START, number)
        paths.append(write_fchroma(path, counts, axis, moment, start=START))
    return paths[0], paths[1], Truth(halpha, ca8542, field, field_moved, shift)
