"""A short series of a two-ribbon flare whose every atmosphere is known, in files like a telescope's.

The series looks like the F-CHROMA database's: one FITS file for each scan of each line, plain counts, Ca II
displaced against H-alpha, the field rotated inside a constant pad. Its physics is held out: every pixel shows
an atmosphere of the grid's test simulations, which no network trained on that grid has seen.

How the scene is painted
------------------------
The field is divided into small cells (a Voronoi diagram of jittered points), each painted with one
atmosphere. Held-out atmospheres with emission in a line core (`shows_emission`) paint the ribbons, all others
the quiet Sun (where these are fewer than the field needs, the faintest with emission join them). **Every**
held-out atmosphere is used if there are cells enough, and none is preferred: each of the quiet Sun's paints
the same area, each of the ribbons' the same number of cells. Only *where* each goes is arranged, so that the
images look like a flare: the brighter ones towards the ribbons' outer, leading edges and the later scans,
those of like contrast between the lines side by side. No atmosphere paints more than 2 % of the field.

Both lines are rendered from the same scene, Ca II at displaced coordinates, with every pixel collecting the
light that falls on it (no image is interpolated) through a point spread, and given photon noise. Pixels
beside a cell's border thus mix the light of neighbours, as real ones do; their truth is the atmosphere at
their centre.

Both lines share a granulation, one factor at all wavelengths: the grid's atmospheres have one and the same
photosphere, and without it the wings, on which real scans are registered, would show little. Dividing by the
joint maximum takes it out again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from inn.layout import CA8542, HALPHA, QUANTITIES, LineWindow
from pipeline.crisp.fchroma import file_name, write_fchroma
from pipeline.crisp.instrument import response_matrix
from pipeline.crisp.scan import cosine_of_pointing
from pipeline.errors import InputError
from pipeline.grids.store import split
from pipeline.training_set import CRISP_WAVELENGTHS, angle_weights

Array = NDArray[np.float64]

LARGEST_SHARE = 0.02
"""Largest share of the field that one atmosphere may paint in one scan."""
MOST_ATMOSPHERES = 256  # what the field has room for; the first of a design are spread as evenly as all
FEWEST_QUIET = 56  # atmospheres that share the two thirds of the field outside of the ribbons
BLOCK = 24  # atmospheres of similar brightness among which neighbours are chosen for their contrast
FEWEST_RIBBON = 24  # atmospheres that share the ribbons

POINTING = (-730.0, -313.0)
"""Helioprojective longitude and latitude of the field's centre, in arcsec: mu = 0.55, as in the paper."""

PIXEL_SCALE = 0.057  # arcsec, CRISP's
START = np.datetime64("2014-09-06T16:55:57.057")  # the paper's flare, section 5
CADENCE = np.timedelta64(11500, "ms")
LINE_DELAY = np.timedelta64(5000, "ms")  # from H-alpha to Ca II
BRIGHTEST = 22000.0  # counts of the brightest wavelength of the brightest atmosphere
ELECTRONS_PER_COUNT = 8.0
CORE = 0.6  # Angstrom either side of rest within which a displaced core lies
GRANULATION = 0.1  # contrast of the granulation
GRANULE = 1.5  # pixels: the inverse of its typical wave number, so that features are about five pixels wide
BEND = 1.0  # pixels by which the borders of cells are bent
POINT_SPREAD = 0.5  # pixels, standard deviation of the telescope's point spread
SUBPIXELS = 3  # light collected on 3 x 3 points of a pixel


@dataclass(frozen=True)
class DemoTruth:
    """What the demo's series was made from.

    Attributes
    ----------
    files : list of Path
        The FITS files, H-alpha and Ca II of each scan.
    dataset : xarray.Dataset
        ``electron_density``, ``temperature``, ``velocity`` over sample and height, of the held-out
        atmospheres. Over time, y and x: ``painted``, the pixel's atmosphere as a position along sample, -1
        outside of H-alpha's field; ``ribbon`` and ``overlap`` (both lines' fields cover it), bool. Over time:
        ``shift_y``, ``shift_x``, the pixels that bring Ca II onto H-alpha, as the observation store has them.
    """

    files: list[Path]
    dataset: xr.Dataset


def line_profiles(grid: xr.Dataset, mu: float) -> dict[str, Array]:
    """Profiles of a grid's atmospheres as CRISP measures them, seen at one inclination.

    Parameters
    ----------
    grid : xarray.Dataset
        A grid store; its wavelengths are offsets, placed here on the laboratory rest wavelengths.
    mu : float
        Cosine of the heliocentric angle, within the grid's range; a cubic spline between its values.

    Returns
    -------
    dict of str to array, shape (sample, wavelength)
        Of each line by its name, intensity per Angstrom in the grid's unit.

    Raises
    ------
    InputError
        The grid covers neither the inclination nor the wavelengths.
    """
    lowest, highest = float(grid.mu.min()), float(grid.mu.max())
    if not lowest <= mu <= highest:
        raise InputError(
            "the grid does not cover this inclination",
            found=f"mu = {mu:.3f}",
            expected=f"{lowest:.3f} to {highest:.3f}",
        )
    profiles = {}
    for line in (HALPHA, CA8542):
        name = f"wavelength_{line.name}"
        offsets = CRISP_WAVELENGTHS[line.name] - line.rest_wavelength
        covered = grid[name].values
        if offsets.min() < covered.min() or offsets.max() > covered.max():
            raise InputError(
                "the grid's wavelengths are too few",
                where=line.name,
                found=f"{covered.min():.3f} to {covered.max():.3f} Angstrom about the line",
                expected=f"{offsets.min():.3f} to {offsets.max():.3f}",
            )
        at_angle = grid[line.name].sortby("mu").transpose("sample", "mu", name).values.astype(np.float64)
        weights = angle_weights(np.sort(grid.mu.values), np.array([mu]))[0]
        seen = np.einsum("m,smw->sw", weights, at_angle)
        profiles[line.name] = seen @ response_matrix(line.name, covered, offsets).T
    return profiles


def _core(line: LineWindow) -> NDArray[np.bool_]:
    chosen: NDArray[np.bool_] = np.abs(CRISP_WAVELENGTHS[line.name] - line.rest_wavelength) <= CORE
    return chosen


def shows_emission(profiles: Mapping[str, Array]) -> NDArray[np.bool_]:
    """Which atmospheres paint ribbons: those whose H-alpha or Ca II core outshines the line's far wings.

    Parameters
    ----------
    profiles : mapping of str to array, shape (sample, wavelength)
        As `line_profiles` returns them.

    Returns
    -------
    array of bool, shape (sample,)
    """
    emission = []
    for line in (HALPHA, CA8542):
        intensity = profiles[line.name]
        wings = 0.5 * (intensity[:, 0] + intensity[:, -1])
        emission.append(intensity[:, _core(line)].max(axis=1) > wings)
    return np.asarray(emission[0] | emission[1])


@dataclass(frozen=True)
class Cast:
    """The atmospheres that paint one part of the scene, in blocks of similar brightness, the faintest first.

    Attributes
    ----------
    blocks : tuple of array of int
        Indices of samples; within a block in order of Ca II's brightness against H-alpha's.
    """

    blocks: tuple[NDArray[np.int64], ...]

    @property
    def samples(self) -> NDArray[np.int64]:
        """All of them."""
        return np.concatenate(self.blocks)

    def lay_out(self, brightness: Array, contrast: Array, weight: Array) -> NDArray[np.int64]:
        """Choose an atmosphere for each cell, so that neighbours are alike and all get the same weight.

        Parameters
        ----------
        brightness : array, shape (cell,)
            The brighter atmospheres go where this is large.
        contrast : array, shape (cell,)
            Those with the brighter Ca II go where this is large.
        weight : array, shape (cell,)
            What is shared out evenly: the cells' areas, or 1 for each that is seen.

        Returns
        -------
        array of int, shape (cell,)
        """
        block_of = np.repeat(np.arange(len(self.blocks)), [block.size for block in self.blocks])
        block = block_of[_even_classes(brightness, weight, block_of.size)]
        chosen = np.empty(block.size, dtype=np.int64)
        for number, samples in enumerate(self.blocks):
            here = block == number
            chosen[here] = samples[_even_classes(contrast[here], weight[here], samples.size)]
        return chosen


def _even_classes(order: Array, weight: Array, count: int) -> NDArray[np.int64]:
    """Give each cell one of `count` classes, ascending with `order`; all classes get the same weight."""
    rank = np.argsort(order, kind="stable")
    middle = np.cumsum(weight[rank]) - 0.5 * weight[rank]
    position = middle / (weight.sum() or 1.0)
    classes = np.empty(order.size, dtype=np.int64)
    classes[rank] = np.minimum(position * count, count - 1).astype(np.int64)
    return classes


def casting(profiles: Mapping[str, Array]) -> tuple[Cast, Cast]:
    """Which atmospheres paint the ribbons and which the quiet Sun; each one does either.

    Parameters
    ----------
    profiles : mapping of str to array, shape (sample, wavelength)
        As `line_profiles` returns them.

    Returns
    -------
    ribbon, quiet : Cast

    Raises
    ------
    InputError
        There are too few atmospheres.
    """
    emission = shows_emission(profiles)
    # Logarithms of both cores' mean intensities, each in units of its spread.
    cores = []
    for line in (HALPHA, CA8542):
        core = np.log(profiles[line.name][:, _core(line)].mean(axis=1))
        cores.append(core / (core.std() or 1.0))
    brightness, contrast = cores[0] + cores[1], cores[1] - cores[0]
    # Those without emission first, whatever their brightness; then the faintest of the others.
    ranked = np.lexsort((brightness, emission))
    quiet = max(int((~emission).sum()), FEWEST_QUIET)
    if ranked.size < quiet + FEWEST_RIBBON:
        raise InputError(
            "the grid's held-out part is too small to paint the demo",
            found=f"{ranked.size} atmospheres, {int(emission.sum())} of them with emission",
            expected=f"{quiet + FEWEST_RIBBON} or more",
            remedy="use a larger grid",
        )

    def blocks(samples: NDArray[np.int64]) -> Cast:
        parts = np.array_split(samples, max(samples.size // BLOCK, 1))
        return Cast(tuple(part[np.argsort(contrast[part], kind="stable")] for part in parts))

    return blocks(ranked[quiet:]), blocks(ranked[:quiet])


@dataclass(frozen=True)
class Canvas:
    """The files' frame, ``shape`` pixels; in it a field of ``field`` pixels, rotated by ``angle`` degrees."""

    shape: tuple[int, int]
    field: tuple[int, int]
    angle: float

    @classmethod
    def around(cls, field: tuple[int, int], angle: float, margin: int = 4) -> Canvas:
        """Make the smallest canvas that holds the rotated field and a margin."""
        height, width = field
        cosine, sine = abs(np.cos(np.deg2rad(angle))), abs(np.sin(np.deg2rad(angle)))
        shape = (height * cosine + width * sine, height * sine + width * cosine)
        return cls((int(np.ceil(shape[0])) + 2 * margin, int(np.ceil(shape[1])) + 2 * margin), field, angle)

    def pixels(self) -> tuple[Array, Array]:
        """Positions of the pixels' centres, y and x, both of the canvas' shape."""
        y, x = np.mgrid[: self.shape[0], : self.shape[1]].astype(np.float64)
        return y, x

    def field_coordinates(self, y: Array, x: Array) -> tuple[Array, Array]:
        """Positions along the field's own axes, from its centre: v along its height, u along its width."""
        cosine, sine = np.cos(np.deg2rad(self.angle)), np.sin(np.deg2rad(self.angle))
        y, x = y - 0.5 * (self.shape[0] - 1), x - 0.5 * (self.shape[1] - 1)
        return -sine * x + cosine * y, cosine * x + sine * y

    def inside(self, y: Array, x: Array) -> NDArray[np.bool_]:
        """Whether positions of the canvas lie in the field."""
        v, u = self.field_coordinates(y, x)
        return np.asarray((np.abs(v) <= 0.5 * self.field[0]) & (np.abs(u) <= 0.5 * self.field[1]))


@dataclass(frozen=True)
class Texture:
    """Smooth random function of position, mean 0 and spread 1: a sum of waves of random direction.

    Attributes
    ----------
    number_v, number_u : array, shape (waves,)
        Wave numbers along the field's axes, radian per pixel.
    phase : array, shape (waves,)
        Phases, radian.
    """

    number_v: Array
    number_u: Array
    phase: Array

    @classmethod
    def random(cls, scale: float, random: np.random.Generator, waves: int = 24) -> Texture:
        """Draw a texture with features of about `scale` pixels."""
        direction, phase = random.uniform(0.0, 2.0 * np.pi, (2, waves))
        number = random.rayleigh(1.0, waves) / scale
        return cls(number * np.sin(direction), number * np.cos(direction), phase)

    def __call__(self, v: Array, u: Array) -> Array:
        """Values at positions, of their shape."""
        total = np.zeros(np.shape(v))
        for number_v, number_u, phase in zip(self.number_v, self.number_u, self.phase, strict=True):
            total += np.cos(number_v * v + number_u * u + phase)
        return np.asarray(np.sqrt(2.0 / self.phase.size) * total)


@dataclass(frozen=True)
class Scene:
    """The Sun behind the canvas: cells, and the atmosphere of each in every scan.

    Attributes
    ----------
    canvas : Canvas
    cells : array, shape (cell, 2)
        Positions (v, u) of the cells' points along the field's axes.
    sample : array of int, shape (scan, cell)
        The atmosphere that paints each cell.
    ribbon : array of bool, shape (scan, cell)
        Whether the cell belongs to a ribbon.
    granulation : Texture
        Contrast that both lines share at all wavelengths.
    bends : tuple of Texture
        What makes the cells' borders uneven.
    """

    canvas: Canvas
    cells: Array
    sample: NDArray[np.int64]
    ribbon: NDArray[np.bool_]

    granulation: Texture
    bends: tuple[Texture, Texture]

    def cell_at(self, y: Array, x: Array) -> NDArray[np.int64]:
        """Index of the cell that positions of the canvas lie in."""
        v, u = self.canvas.field_coordinates(y, x)
        bent = [axis + BEND * bend(v, u) for axis, bend in zip((v, u), self.bends, strict=True)]
        _, nearest = cKDTree(self.cells).query(np.stack(bent, axis=-1))
        return np.asarray(nearest, dtype=np.int64)

    def image(self, profiles: Array, scan: int, shift: tuple[float, float] = (0.0, 0.0)) -> Array:
        """Light of one scan on the canvas' pixels.

        Parameters
        ----------
        profiles : array, shape (sample, wavelength)
            What each atmosphere emits.
        scan : int
            Which scan.
        shift : tuple of float
            Displacement (y, x) of the scene on the canvas, in pixels.

        Returns
        -------
        array, shape (wavelength, y, x)
        """
        y, x = self.canvas.pixels()
        total = np.zeros((*self.canvas.shape, profiles.shape[1]))
        steps = (np.arange(SUBPIXELS) + 0.5) / SUBPIXELS - 0.5
        for dy in steps:
            for dx in steps:
                place = (y + dy - shift[0], x + dx - shift[1])
                gain = 1.0 + GRANULATION * self.granulation(*self.canvas.field_coordinates(*place))
                total += profiles[self.sample[scan][self.cell_at(*place)]] * gain[..., None]
        blurred = ndimage.gaussian_filter(total / SUBPIXELS**2, (POINT_SPREAD, POINT_SPREAD, 0.0))
        return np.moveaxis(blurred, -1, 0)


def make_scene(canvas: Canvas, ribbon: Cast, quiet: Cast, *, scans: int, cell: float, seed: int) -> Scene:
    """Arrange atmospheres into two ribbons, which brighten and separate, over quiet Sun.

    Parameters
    ----------
    canvas : Canvas
        The frame.
    ribbon, quiet : Cast
        The atmospheres of either.
    scans : int
        How many scans.
    cell : float
        Mean width of a cell, in pixels.
    seed : int
        Decides the arrangement.

    Returns
    -------
    Scene

    Raises
    ------
    InputError
        An atmosphere would paint more than 2 % of the field: the held-out part of the grid is too small.
    """
    random = np.random.default_rng([seed, 1])
    height, width = canvas.field
    # Beyond the field too: a displaced line sees past the edges of the other's field.
    reach = np.hypot(*canvas.shape) / 2.0
    grid_v, grid_u = np.meshgrid(*(np.arange(-reach, reach, cell),) * 2, indexing="ij")
    cells = np.stack([grid_v.ravel(), grid_u.ravel()], axis=-1)
    cells += random.uniform(-0.42 * cell, 0.42 * cell, cells.shape)
    v, u = cells.T

    bend = 0.05 * height * np.sin(2.2 * np.pi * u / width + 0.6)
    knots = Texture.random(0.06 * width, random)(v, u)
    ragged = 0.6 * Texture.random(0.04 * width, random)(v, u)
    depth = np.full(
        (scans, len(cells)), np.inf
    )  # from the leading edge inwards, in units of the ribbon's width
    for scan in range(scans):
        progress = scan / max(scans - 1, 1)
        for side in (-1.0, 1.0):
            edge = side * (0.27 + 0.06 * progress) * height + bend
            along = (u - side * 0.05 * width) / (0.43 * width)
            across = 0.2 * height * (0.85 + 0.3 * progress) * np.sqrt(np.clip(1.0 - along**2, 0.0, None))
            inwards = side * (edge - v) + ragged
            inside = (inwards >= 0.0) & (inwards <= across)
            depth[scan] = np.where(inside, inwards / np.maximum(across, 1e-9), depth[scan])
    within = np.isfinite(depth)
    growth = 0.85 + 0.3 * np.linspace(0.0, 1.0, scans)[:, None]
    activity = growth * np.exp(-1.2 * np.where(within, depth, 0.0)) * (1.0 + 0.2 * knots)

    scene = Scene(
        canvas,
        cells,
        np.zeros((scans, len(cells)), dtype=np.int64),
        within,
        Texture.random(GRANULE, random),
        (Texture.random(0.8 * cell, random), Texture.random(0.8 * cell, random)),
    )
    y, x = canvas.pixels()
    area = np.bincount(scene.cell_at(y, x)[canvas.inside(y, x)], minlength=len(cells)).astype(np.float64)
    network, contrast = (Texture.random(scale * width, random)(v, u) for scale in (0.07, 0.1))
    scene.sample[:] = quiet.lay_out(network, contrast, area * (~within).any(axis=0))
    # The ribbons are many atmospheres' on few cells: sharing out cells, not areas, forgets none of them.
    seen = (area > 0).astype(np.float64)
    scene.sample[within] = ribbon.lay_out(
        activity[within], *(np.broadcast_to(values, within.shape)[within] for values in (contrast, seen))
    )
    for scan in range(scans):
        painted = np.bincount(scene.sample[scan], weights=area) / area.sum()
        if painted.max() > LARGEST_SHARE:
            raise InputError(
                "one atmosphere would paint too much of the demo's field",
                found=f"{100 * painted.max():.1f} % by sample {painted.argmax()}",
                expected=f"at most {100 * LARGEST_SHARE:.0f} %",
                remedy="use a larger grid or smaller cells",
            )
    return scene


def held_out(grid: xr.Dataset) -> xr.Dataset:
    """Atmospheres of a grid that no network trained on it has seen: converged, of the test simulations.

    Parameters
    ----------
    grid : xarray.Dataset
        A grid store.
    """
    chosen = (split(grid["simulation"].values) == "test") & grid["converged"].values
    return grid.isel(sample=np.flatnonzero(chosen)).load()


def make_series(
    directory: str | Path,
    grid: xr.Dataset,
    *,
    seed: int = 0,
    scans: int = 3,
    field: tuple[int, int] = (96, 128),
    angle: float = 17.0,
    shift: tuple[float, float] = (-2.4, 5.3),
    drift: tuple[float, float] = (0.35, -0.25),
    cell: float = 6.5,
) -> DemoTruth:
    """Write a series of F-CHROMA-like files whose every pixel's atmosphere is known.

    Parameters
    ----------
    directory : path
        Where the FITS files go; made if it is not there.
    grid : xarray.Dataset
        A grid store; its held-out part paints the scene.
    seed : int
        Decides the scene and the photon noise.
    scans : int
        Scans of each line.
    field : tuple of int
        Height and width of the field, in pixels, before it is rotated into its canvas.
    angle : float
        Its rotation, in degrees.
    shift : tuple of float
        Pixels (y, x) that bring Ca II onto H-alpha in the middle of the series.
    drift : tuple of float
        By how much that changes from scan to scan.
    cell : float
        Mean width of the patches that one atmosphere paints, in pixels.

    Returns
    -------
    DemoTruth

    Raises
    ------
    InputError
        The grid cannot paint the scene (see `make_scene` and `line_profiles`).
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    mu = float(cosine_of_pointing(POINTING, START))
    atmospheres = held_out(grid).isel(sample=slice(MOST_ATMOSPHERES))
    profiles = line_profiles(atmospheres, mu)
    canvas = Canvas.around(field, angle)
    scene = make_scene(canvas, *casting(profiles), scans=scans, cell=cell, seed=seed)
    # One scale for both lines: their relative calibration, which ingest can only assume, is true here.
    counts = BRIGHTEST / max(intensity.max() for intensity in profiles.values())

    y, x = canvas.pixels()
    inside = canvas.inside(y, x)
    middle = 0.5 * (scans - 1)
    shifts = np.array(
        [[s + d * (scan - middle) for s, d in zip(shift, drift, strict=True)] for scan in range(scans)]
    )
    times = START + np.arange(scans) * CADENCE
    cell_seen = scene.cell_at(y, x)
    files = []
    for scan in range(scans):
        for number, (line, delay, moved) in enumerate(
            ((HALPHA, np.timedelta64(0), (0.0, 0.0)), (CA8542, LINE_DELAY, tuple(-shifts[scan])))
        ):
            photons = ELECTRONS_PER_COUNT * counts * scene.image(profiles[line.name], scan, moved)
            random = np.random.default_rng([seed, 2, scan, number])
            cube = random.poisson(photons) / ELECTRONS_PER_COUNT
            cube[:, ~inside] = np.rint(np.median(cube[:, inside]))
            files.append(
                write_fchroma(
                    folder / file_name(line.name, START, scan),
                    cube,
                    CRISP_WAVELENGTHS[line.name],
                    times[scan] + delay,
                    pointing=POINTING,
                    start=START,
                    overwrite=True,
                )
            )
    seen = np.stack([np.where(inside, scene.sample[scan][cell_seen], -1) for scan in range(scans)])
    ribbon = np.stack([inside & scene.ribbon[scan][cell_seen] for scan in range(scans)])
    overlap = np.stack([inside & canvas.inside(y - dy, x - dx) for dy, dx in shifts])
    return DemoTruth(files, _truth(atmospheres, times, seen, ribbon, overlap, shifts, mu))


def _truth(
    atmospheres: xr.Dataset,
    times: NDArray[np.datetime64],
    sample: NDArray[np.int64],
    ribbon: NDArray[np.bool_],
    overlap: NDArray[np.bool_],
    shifts: Array,
    mu: float,
) -> xr.Dataset:
    frame = ("time", "y", "x")
    dataset = atmospheres[[*QUANTITIES, "simulation"]].drop_vars("mu", errors="ignore")
    dataset = dataset.assign(
        painted=(
            frame,
            sample.astype(np.int32),
            {"long_name": "atmosphere of the pixel, -1 outside the field"},
        ),
        ribbon=(frame, ribbon, {"long_name": "pixel belongs to a flare ribbon"}),
        overlap=(frame, overlap, {"long_name": "pixel lies in the fields of both lines"}),
        shift_y=(
            "time",
            shifts[:, 0],
            {"units": "pixel", "long_name": "shift that brings Ca II onto H-alpha, y"},
        ),
        shift_x=(
            "time",
            shifts[:, 1],
            {"units": "pixel", "long_name": "shift that brings Ca II onto H-alpha, x"},
        ),
        mu=("time", np.full(len(times), mu), {"long_name": "cosine of the heliocentric angle"}),
    ).assign_coords(time=times.astype("datetime64[ns]"))
    dataset.attrs = {
        "kind": "truth",
        "title": "What the demo's series was painted with",
        **{
            name: atmospheres.attrs[name]
            for name in ("height_zero", "statistical_equilibrium")
            if name in atmospheres.attrs
        },
    }
    return dataset
