"""One tile of a map, from reading its pixels to its receipt: what a worker does.

A tile is a rectangle of pixels of one time, and exactly one shard of every variable of the map store, so that
no two tasks ever write to the same file. Doing a tile is idempotent: the same tile gives the same bytes, and
each file is replaced whole.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.core.sync import sync

from inn.checkpoint import Network, load_model, model_hash
from inn.latent import LatentKind
from inn.layout import QUANTITIES
from inn.novelty import Novelty
from inn.posterior import compile_draws, pixels_at_once, quantiles_and_misfit
from inn.precision import Precision, multiplies_bfloat16
from inn.preview import preview_quantiles, previewed_at_once, stated_disagreement
from pipeline.defects import Defect
from pipeline.devices import Device, array_library, to_torch
from pipeline.errors import ClusterError, MisuseError, ModelError, StoreError
from pipeline.replacement import opened_group
from pipeline.results import NOVELTY_LEVEL, VARIABLES, WITHOUT_ANSWER, Flag, count_flags
from pipeline.selection import EVERYTHING, Selection, selected_checksum
from pipeline.shards import ShardWriter
from pipeline.spectra import Interpolation, check_interpolation, covered, network_lines
from pipeline.storage import ROOT, AsListed, answering, array_in, out_of_space, place

KERNEL = 7
"""Version of what a tile's numbers depend on in this package; raised whenever they change."""

SPREAD = (0.16, 0.84)
"""Quantiles whose half distance is the spread that the rounding is measured by."""

ROUNDING = 1.0 / 16.0
"""Largest step of the stored values, in units of the posterior's spread over the root of the draws."""

PREVIEW_ROUNDING = 1.0 / 4.0
"""The same of a preview's, in units of its disagreement from the sampled posterior: the rounding error, the
root mean square of which is at most the step over the root of 12, is then below a tenth of it."""

SMALL_FILE = 1 << 16


# Descriptions: small, checked where they are made, trusted afterwards


@dataclass(frozen=True)
class Tile:
    """A rectangle of pixels of one time.

    Attributes
    ----------
    time : int
        Index of the time.
    row, column : int
        Place among the tiles of that time.
    y, x : tuple of int
        First pixel and the one after the last, along both axes.

    Raises
    ------
    MisuseError
        It holds no pixels.
    """

    time: int
    row: int
    column: int
    y: tuple[int, int]
    x: tuple[int, int]

    def __post_init__(self) -> None:
        if min(self.time, self.row, self.column) < 0 or not (
            0 <= self.y[0] < self.y[1] and 0 <= self.x[0] < self.x[1]
        ):
            raise MisuseError("a tile must hold pixels", found=self)

    @property
    def shape(self) -> tuple[int, int]:
        """Pixels along y and x."""
        return self.y[1] - self.y[0], self.x[1] - self.x[0]

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.shape[0] * self.shape[1]

    @property
    def region(self) -> tuple[slice, slice, slice]:
        """Its place in arrays over time, y, x."""
        return slice(self.time, self.time + 1), slice(*self.y), slice(*self.x)

    @property
    def indexers(self) -> dict[str, Any]:
        """Its place in xarray's objects, of one time."""
        return {"time": self.time, "y": slice(*self.y), "x": slice(*self.x)}

    def __str__(self) -> str:
        return f"time {self.time}, y {self.y[0]}:{self.y[1]}, x {self.x[0]}:{self.x[1]}"


@dataclass(frozen=True)
class TileGrid:
    """All tiles of a map, in the order in which they are done: time by time, row by row.

    Attributes
    ----------
    shape : tuple of int
        Times, and pixels along y and x.
    tile : tuple of int
        Pixels of a whole tile along y and x; tiles at the far edges are smaller.

    Raises
    ------
    MisuseError
        There are no pixels, or tiles have none.
    """

    shape: tuple[int, int, int]
    tile: tuple[int, int]

    def __post_init__(self) -> None:
        if min(*self.shape, *self.tile) < 1:
            raise MisuseError("a map and its tiles must hold pixels", found=self)

    @classmethod
    def square(cls, shape: tuple[int, int, int], tile: int) -> TileGrid:
        """Make square tiles, no larger than the field."""
        return cls(shape, (min(tile, shape[1]), min(tile, shape[2])))

    @property
    def counts(self) -> tuple[int, int, int]:
        """Times, rows and columns of tiles."""
        return self.shape[0], -(-self.shape[1] // self.tile[0]), -(-self.shape[2] // self.tile[1])

    @property
    def pixels(self) -> int:
        """Number of pixels of all times."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    def __len__(self) -> int:
        times, rows, columns = self.counts
        return times * rows * columns

    def __getitem__(self, index: int) -> Tile:
        """Tile by its place in the order."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        _, rows, columns = self.counts
        time, place = divmod(index, rows * columns)
        row, column = divmod(place, columns)
        y, x = row * self.tile[0], column * self.tile[1]
        return Tile(
            time,
            row,
            column,
            (y, min(y + self.tile[0], self.shape[1])),
            (x, min(x + self.tile[1], self.shape[2])),
        )

    def __iter__(self) -> Iterator[Tile]:
        return (self[index] for index in range(len(self)))

    def index(self, tile: Tile) -> int:
        """Place of a tile in the order."""
        _, rows, columns = self.counts
        return (tile.time * rows + tile.row) * columns + tile.column


@dataclass(frozen=True)
class TileSpec:
    """What all tiles of a run have in common.

    Attributes
    ----------
    observation : str
        Path of the observation store, as the workers see it.
    observation_hash : str
        What `observation_hash` says of it.
    store : str
        Path of the map store.
    run : str
        Identity of the run; the store carries it.
    model : str or None
        Path of the model directory; None for the bundled one.
    model_hash : str
        What `inn.model_hash` says of it.
    torch_version : str
        Version of torch, without its build.
    draws, seed, latent, quantiles, calibration_error
        As for `inn.posterior_quantiles`; of a preview, nothing is drawn, and `draws` is 0.
    threads : int
        Threads that torch may use for one tile.
    selection : Selection
        The pixels that are asked for.
    device : {"cpu", "cuda"}
        Where the workers compute.
    interpolation : {"linear", "pchip"}
        As for `pipeline.spectra.network_lines`.
    precision : {"float32", "bfloat16"}
        As for `inn.posterior_quantiles`.
    compiled : bool
        Whether torch compiles how the network draws (`inn.posterior.compile_draws`).
    preview : bool
        Whether the model's preview (`inn.preview`) answers, in place of its sampled posterior.
    """

    observation: str
    observation_hash: str
    store: str
    run: str
    model: str | None
    model_hash: str
    torch_version: str
    draws: int
    seed: int
    latent: LatentKind
    quantiles: tuple[float, ...]
    calibration_error: float | None
    threads: int
    selection: Selection = EVERYTHING
    device: Device = "cpu"
    interpolation: Interpolation = "linear"
    precision: Precision = "float32"
    compiled: bool = False
    preview: bool = False

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.quantiles, self.quantiles[1:], strict=False))
        if not self.quantiles or not ascending or self.quantiles[0] < 0 or self.quantiles[-1] > 1:
            raise MisuseError(
                "quantiles are increasing levels between 0 and 1",
                where="quantiles",
                found=self.quantiles,
                expected="for example 0.05 0.16 0.5 0.84 0.95",
            )
        check_interpolation(self.interpolation)
        if self.draws < 2 and not self.preview:
            raise MisuseError("a posterior needs two draws at least", where="draws", found=self.draws)
        if self.calibration_error is not None and not 0 <= self.calibration_error <= 1:
            raise MisuseError(
                "the calibration error is a relative error",
                where="calibration_error",
                found=self.calibration_error,
                expected="a number between 0 and 1, for example 0.05",
            )


@dataclass(frozen=True)
class TileResult:
    """Receipt of a finished tile.

    Attributes
    ----------
    tile : Tile
        Which.
    sha256 : str
        Checksum of its values, over the variables in the order of `pipeline.results.VARIABLES`, each as
        little-endian C-ordered bytes of the tile's pixels.
    stored : int
        Bytes of its files.
    answered : int
        Pixels that have an answer.
    flags : mapping of str to int
        Pixels with each flag.
    seconds : float
        Time it took.
    selected : int
        `pipeline.selection.selected_checksum` of the pixels that were asked for, as they were found to be.
    """

    tile: Tile
    sha256: str
    stored: int
    answered: int
    flags: Mapping[str, int]
    seconds: float
    selected: int


# What a worker opens once: under a lock, for its tasks may run in several threads

Place = TypeVar("Place", bound=str | None)
Opened = TypeVar("Opened")


def _once(opener: Callable[[Place, str], Opened]) -> Callable[[Place, str], Opened]:
    """Keep what was opened last in this process; only one thread at a time opens anything."""
    guard, cached = Lock(), lru_cache(maxsize=2)(opener)

    def guarded(place: Place, expected: str) -> Opened:
        with guard:
            return cached(place, expected)

    return guarded


@_once
def _model(path: str | None, expected: str) -> Network:
    with fetched_model(path) as folder:
        found = model_hash(folder)
        if found != expected:
            raise ModelError(
                "the model on this worker is not the run's",
                where=path or "the bundled model",
                found=f"sha256 {found}",
                expected=f"sha256 {expected}",
                remedy="leave the model alone while a map is being made; all workers must read the same one",
            )
        model = load_model(folder)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


@_once
def _compiled_model(path: str | None, expected: str) -> Network:
    model = copy.deepcopy(_model(path, expected))
    compile_draws(model)
    return model


def fetched_model(path: str | Path | None) -> AbstractContextManager[Path | None]:
    """Context in which a model is a directory here, by its path or URL; None for the bundled one."""
    return nullcontext() if path is None else place(path).fetched()


@_once
def _observation(path: str, expected: str) -> xr.Dataset:
    try:
        sizes = place(path).sizes()
        found = observation_hash(path, sizes)
        dataset: xr.Dataset = xr.open_zarr(AsListed(place(path).zarr, sizes), chunks=None)
    except FileNotFoundError as error:
        raise StoreError(
            "a worker cannot open the observation",
            where=path,
            found=error,
            remedy="use a file system that all workers see under the same path",
        ) from error
    if found != expected:
        raise StoreError(
            "the observation is not the one the run began with",
            where=path,
            remedy="leave the observation alone while a map is being made",
        )
    return dataset


def observation_hash(path: str | Path, sizes: Mapping[str, int] | None = None) -> str:
    """Identity of an observation store, wherever it lies, without reading all of it.

    Small files (metadata with the hashes of the FITS files it was made from, and the coordinates) count with
    their content, chunks of intensities with their names and sizes.

    Parameters
    ----------
    path : str or Path
        The store, or its URL.
    sizes : mapping of str to int, optional
        Bytes of each of its files, if they have been listed.

    Returns
    -------
    str
        SHA-256, 64 hexadecimal digits.

    Raises
    ------
    FileNotFoundError
        There is no store, or a file that was listed has gone.
    """
    store = place(path)
    sizes = store.sizes() if sizes is None else sizes
    if ROOT not in sizes:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{store}/{ROOT}")
    digest = hashlib.sha256()
    keys = sorted(sizes, key=lambda key: key.split("/"))
    small = store.read([key for key in keys if sizes[key] <= SMALL_FILE])
    for key in keys:
        digest.update(f"{key}\0{sizes[key]}\0".encode())
        if sizes[key] <= SMALL_FILE:
            digest.update(next(small))
    return digest.hexdigest()


# The kernel


def invert_tile(spec: TileSpec, tile: Tile) -> TileResult:
    """Read a tile's pixels, judge them, sample their posterior, write the answer.

    Parameters
    ----------
    spec : TileSpec
        The run.
    tile : Tile
        Which pixels.

    Returns
    -------
    TileResult
        Its receipt, once everything is written.

    Raises
    ------
    FlareFieldError
        The run cannot go on: another model, observation, torch or map store than it began with, or no space.
        Any other error concerns this tile alone.
    """
    started = time.monotonic()
    values = compute_tile(spec, tile)
    stored = write_tile(spec.store, spec.run, tile, values)
    return _receipt(tile, values, stored, started)


def compute_tile(spec: TileSpec, tile: Tile) -> dict[str, NDArray[Any]]:
    """Compute a rectangle of pixels of one time, and write nothing.

    Parameters
    ----------
    spec : TileSpec
        The run.
    tile : Tile
        Which pixels; any rectangle within the field.

    Returns
    -------
    dict of str to ndarray
        All variables, each of shape (y, x) or (y, x, quantile, height).

    Raises
    ------
    FlareFieldError
        As `invert_tile` raises it, but for space.
    """
    _prepare(spec)
    library = array_library(spec.device)
    opener = _compiled_model if spec.compiled else _model
    model = opener(spec.model, spec.model_hash).to(spec.device)
    try:
        with answering(spec.observation):
            observation = _observation(spec.observation, spec.observation_hash)
            return _compute(spec, library, model, observation, tile)
    except Exception as error:
        if spec.compiled and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise ClusterError(
                "a worker cannot compile the network",
                found=str(error).partition("\n")[0],
                expected="a C++ compiler (`g++`, or what the variable CXX names); on a GPU, Triton",
                remedy="install one on all workers, or leave --compile out",
            ) from error
        raise


def quarantine_tile(spec: TileSpec, tile: Tile) -> TileResult:
    """Write a tile that could not be done: all NaN, and flagged so."""
    started = time.monotonic()
    values = _empty(tile, len(spec.quantiles), _heights(spec))
    values["quality"] = np.where(
        spec.selection.asked(tile), np.uint16(Flag.FAILED), np.uint16(Flag.NOT_SELECTED)
    )
    return _receipt(tile, values, write_tile(spec.store, spec.run, tile, values), started)


def _heights(spec: TileSpec) -> int:
    return int(zarr.open_array(place(spec.store).zarr, path="height", mode="r").shape[0])


def _prepare(spec: TileSpec) -> None:
    found = torch.__version__.split("+")[0]
    if found != spec.torch_version:
        raise ClusterError(
            "a worker has another torch than the run", found=found, expected=spec.torch_version
        )
    if spec.precision == "bfloat16" and not multiplies_bfloat16(spec.device):
        raise ClusterError(
            "a worker's processor does not multiply bfloat16 numbers",
            found=platform.processor() or platform.machine(),
            expected="avx512_bf16, AMX or a GPU, as where the command was given",
            remedy="use workers of one kind, or --precision float32",
        )
    # A nanny starts its workers with OMP_NUM_THREADS=1, whatever their share of the cores.
    if torch.get_num_threads() != spec.threads:
        torch.set_num_threads(spec.threads)


def _receipt(tile: Tile, values: Mapping[str, NDArray[Any]], stored: int, started: float) -> TileResult:
    quality = values["quality"]
    return TileResult(
        tile,
        checksum(values),
        stored,
        int(np.count_nonzero((quality & WITHOUT_ANSWER) == 0)),
        count_flags(quality),
        round(time.monotonic() - started, 4),
        selected_checksum(quality != Flag.NOT_SELECTED),
    )


def checksum(values: Mapping[str, NDArray[Any]]) -> str:
    """Checksum of a tile's values, as `TileResult.sha256` defines it."""
    digest = hashlib.sha256()
    for variable in VARIABLES:
        little_endian = np.dtype(variable.dtype).newbyteorder("<")
        digest.update(np.ascontiguousarray(values[variable.name], dtype=little_endian).data)
    return digest.hexdigest()


def _empty(tile: Tile, levels: int, heights: int) -> dict[str, NDArray[Any]]:
    return {
        variable.name: np.full(
            (*tile.shape, levels, heights) if variable.profile else tile.shape,
            variable.fill,
            dtype=variable.dtype,
        )
        for variable in VARIABLES
    }


def _compute(
    spec: TileSpec, library: ModuleType, model: Network, observation: xr.Dataset, tile: Tile
) -> dict[str, NDArray[Any]]:
    """All variables of a tile, each of shape (y, x) or (y, x, quantile, height), on the host.

    Arrays of the library, and the model, lie where the tile is computed: see `pipeline.devices`.
    """
    here = tile.indexers
    names = [window.name for window in model.layout.lines]
    intensity = {name: observation[name].isel(here).transpose("y", "x", ...).values for name in names}
    wavelength = {name: observation[f"wavelength_{name}"].values for name in names}
    valid = _valid(observation, tile)
    quality = judge(intensity, valid, {name: saturation(observation, name) for name in names})
    shifts = {name: _shift(observation, name, here) for name in names}
    for window in model.layout.lines:
        shift = shifts[window.name]
        moved = np.zeros(valid.shape) if shift is None else shift
        known = np.isfinite(moved)
        quality |= _where(valid & ~known, Flag.NOT_FINITE)
        missed = known & ~covered(wavelength[window.name], window, moved)
        quality |= _where(valid & missed, Flag.WAVELENGTH_NOT_COVERED)
    mu = float(observation["mu"].isel(time=tile.time)) if "mu" in observation.variables else None
    if mu is not None and not np.isfinite(mu):
        quality |= _where(valid, Flag.NOT_FINITE)
    for name in ("shift_applied", "series_aligned"):
        if name in observation and not bool(observation[name].isel(time=tile.time)):
            quality |= _where(valid, Flag.REGISTRATION_UNCERTAIN)
    # Beyond the field nothing is said of a pixel, but that a scan has no image with which there would be one.
    quality |= _known_defects(observation, here) & np.where(
        valid, np.uint16(0xFFFF), np.uint16(Flag.WAVELENGTH_MISSING)
    )

    values = _empty(tile, len(spec.quantiles), model.layout.heights.size)
    values["quality"] = quality
    quality[~spec.selection.asked(tile)] = Flag.NOT_SELECTED
    good = (quality & WITHOUT_ANSWER) == 0
    if not good.any():
        return values

    halpha, ca8542 = names
    moves = {name: None if shift is None else library.asarray(shift[good]) for name, shift in shifts.items()}
    normalised, _ = network_lines(
        # xarray reads a calibrated observation, which has a scale, in float64.
        library.asarray(intensity[halpha][good], dtype=library.float32),
        library.asarray(intensity[ca8542][good], dtype=library.float32),
        wavelength[halpha],
        wavelength[ca8542],
        model.layout,
        spec.interpolation,
        shift_halpha=moves[halpha],
        shift_ca8542=moves[ca8542],
    )
    lines = to_torch(normalised)
    levels = sorted({*spec.quantiles, *SPREAD})
    everything, reproduced = _answer(spec, model, lines, mu, levels)
    wanted = [levels.index(level) for level in spec.quantiles]
    low, high = (levels.index(level) for level in SPREAD)
    failed = np.zeros(len(reproduced), dtype=bool)
    for quantity in QUANTITIES:
        failed |= ~np.isfinite(everything[quantity]).all(axis=(1, 2))
    steps = rounding_steps(spec, model)
    for quantity in QUANTITIES:
        found = everything[quantity]
        found[failed] = np.nan
        rounded = round_to_error(
            found[:, wanted], found[:, low], found[:, high], steps[quantity], positive=quantity != "velocity"
        )
        values[quantity][good] = rounded

    flags = _where(failed, Flag.FAILED)
    if isinstance(model.novelty, Novelty):
        novelty = model.novelty.tail_probability(lines)
        values["novelty"][good] = novelty
        flags |= _where(novelty < NOVELTY_LEVEL, Flag.NOVEL)
    values["misfit"][good] = reproduced
    quality[good] |= flags
    return values


def _valid(observation: xr.Dataset, tile: Tile) -> NDArray[np.bool_]:
    """Pixels (y, x) of a rectangle that lie within both lines' field."""
    return np.asarray(observation["valid"].isel(tile.indexers).transpose("y", "x").values, dtype=bool)


def within_field(spec: TileSpec, tile: Tile) -> NDArray[np.bool_]:
    """Find which pixels of a rectangle lie within both lines' field.

    Parameters
    ----------
    spec : TileSpec
        The run.
    tile : Tile
        Any rectangle within the observation.

    Returns
    -------
    ndarray of bool, shape (y, x)

    Raises
    ------
    StoreError
        The observation cannot be opened, or is another one.
    """
    with answering(spec.observation):
        return _valid(_observation(spec.observation, spec.observation_hash), tile)


def _known_defects(observation: xr.Dataset, here: Mapping[str, Any]) -> NDArray[np.uint16]:
    """Flags (y, x) for what ingest has found, where the observation says."""
    shape = (here["y"].stop - here["y"].start, here["x"].stop - here["x"].start)
    quality = np.zeros(shape, dtype=np.uint16)
    if "defects" in observation:
        found = observation["defects"].isel(here).transpose("y", "x").values
        for defect in Defect:
            quality |= _where((found & defect) != 0, Flag[str(defect.name)])
    if "change_between_lines" in observation:
        change = observation["change_between_lines"]
        # Where it is not known it is NaN, which is not larger than anything.
        large = change.isel(here).transpose("y", "x").values > change.attrs["threshold"]
        quality |= _where(large, Flag.CHANGED_BETWEEN_LINES)
    for name in ("poor_seeing", "header_contradiction"):
        if name in observation and bool(observation[name].isel(time=here["time"])):
            quality |= np.uint16(Flag[name.upper()])
    return quality


def _shift(observation: xr.Dataset, line: str, here: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """What is added to a line's wavelengths at each pixel (y, x), Angstrom; None where all have the same."""
    name = f"wavelength_shift_{line}"
    if name not in observation.variables:
        return None
    shift = observation[name]
    part = shift.isel({axis: place for axis, place in here.items() if axis in shift.dims})
    return np.asarray(part.transpose("y", "x").values, dtype=np.float32)


def _answer(
    spec: TileSpec, model: Network, lines: torch.Tensor, mu: float | None, levels: list[float]
) -> tuple[dict[str, NDArray[Any]], NDArray[Any]]:
    """Quantiles (pixels, levels, heights) of each quantity, and misfits (pixels,)."""
    if spec.preview:
        found = preview_quantiles(model, lines, mu, spec.calibration_error, levels)
        # It takes joint draws of whole atmospheres to compare their profiles with the observed ones.
        return found, np.full(lines.shape[0], np.nan, dtype=np.float32)
    return quantiles_and_misfit(
        model,
        lines,
        mu,
        spec.calibration_error,
        draws=spec.draws,
        quantiles=levels,
        seed=spec.seed,
        latent=spec.latent,
        precision=spec.precision,
    )


def computed_pixels(spec: TileSpec, asked: int) -> int:
    """Count the pixels that the network is given for a tile, in whole batches.

    Parameters
    ----------
    spec : TileSpec
        The run.
    asked : int
        How many of the tile's good pixels are asked for.

    Returns
    -------
    int
        What a tile takes to compute, in pixels.
    """
    at_once = previewed_at_once(spec.device) if spec.preview else pixels_at_once(spec.draws, spec.device)
    return at_once * math.ceil(asked / at_once)


def rounding_steps(spec: TileSpec, model: Network) -> dict[str, float]:
    """Largest step of each quantity's stored values, in units of the posterior's spread.

    The median of N independent draws has a sampling error of 1.25 spreads over the root of N, other quantiles
    more; scrambled Sobol points have perhaps a third of that. A step of 1/16 spread over the root of N has a
    rounding error (root mean square) below 1/60 of independent draws' sampling error, below a tenth of any.
    A preview's error is its disagreement from the sampled posterior, that of its best quantile.
    """
    if spec.preview:
        stated = stated_disagreement(model)
        return {name: PREVIEW_ROUNDING * min(stated[name]["rms"].values()) for name in QUANTITIES}
    return dict.fromkeys(QUANTITIES, ROUNDING / math.sqrt(spec.draws))


def saturation(observation: xr.Dataset, line: str) -> float:
    """Largest intensity that the files of a line could hold; infinite where they had no limit."""
    return float(observation[line].attrs.get("saturation", np.inf))


def judge(
    intensity: Mapping[str, NDArray[Any]], valid: NDArray[np.bool_], largest: Mapping[str, float]
) -> NDArray[np.uint16]:
    """Flags that pixels get by their intensities alone.

    Parameters
    ----------
    intensity : mapping of str to ndarray, shape (y, x, wavelength)
        Each line's intensities.
    valid : ndarray of bool, shape (y, x)
        Where both lines' fields overlap.
    largest : mapping of str to float
        Each line's intensity of saturation.

    Returns
    -------
    ndarray of uint16, shape (y, x)
        Bits of `pipeline.results.Flag`. Nothing is said of a pixel outside of the field but that it is.
    """
    quality = np.zeros(valid.shape, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        for name, values in intensity.items():
            finite = np.isfinite(values)
            quality |= _where(~finite.all(axis=-1), Flag.NOT_FINITE)
            quality |= _where((finite & (values <= 0)).any(axis=-1), Flag.NOT_POSITIVE)
            quality |= _where((finite & (values >= largest[name])).any(axis=-1), Flag.SATURATED)
    return np.where(valid, quality, np.uint16(Flag.OUTSIDE_FIELD))


def _where(condition: NDArray[np.bool_], flag: Flag) -> NDArray[np.uint16]:
    return np.where(condition, np.uint16(flag), np.uint16(0))


def round_to_error(
    values: NDArray[Any], low: NDArray[Any], high: NDArray[Any], step: float, *, positive: bool
) -> NDArray[np.float32]:
    """Take from quantiles the digits that their error makes meaningless, so that they compress.

    The step is a power of two. A positive quantity is rounded in its significant bits, since its posterior is
    spread over factors; any other in its value. The step depends on the pixel's own posterior and on the
    height, not on the tile, and is the same for all quantiles, so that they stay in order.

    Parameters
    ----------
    values : ndarray, shape (pixels, quantiles, heights)
        Finite or NaN, which stays NaN.
    low, high : ndarray, shape (pixels, heights)
        The quantiles `SPREAD`: half their distance (for a positive quantity, of their logarithms) is the
        spread.
    step : float
        Largest step, in units of the spread: see `rounding_steps`.
    positive : bool
        Whether the quantity is positive.

    Returns
    -------
    ndarray of float32, shape (pixels, quantiles, heights)
    """
    values = np.asarray(values, dtype=np.float32)
    distance = np.log(high / low) if positive else high - low
    wanted = step * 0.5 * distance[:, None, :]
    _, exponent = np.frexp(wanted.astype(np.float32))  # 2**(exponent - 1) <= wanted
    if positive:
        exponent = exponent + np.frexp(values)[1] - 1
    # Below float32's own precision, and where all draws agree, there is nothing to round.
    finest = np.frexp(values)[1] - 24
    step = np.ldexp(np.float32(1), np.maximum(exponent - 1, finest))
    return np.where(wanted > 0, np.rint(values / step) * step, values).astype(np.float32)


def write_tile(store: str | Path, run: str, tile: Tile, values: Mapping[str, NDArray[Any]]) -> int:
    """Write all variables of a tile into a map store that has been laid out.

    Parameters
    ----------
    store : str or Path
        The map store, or its URL.
    run : str
        The run that the store must belong to.
    tile : Tile
        Which pixels.
    values : mapping of str to ndarray
        Each variable, of shape (y, x) or (y, x, quantile, height).

    Returns
    -------
    int
        Bytes of the tile's files.

    Raises
    ------
    StoreError
        The store belongs to another run or does not answer, or there is no space left.
    """
    with answering(store):
        return _write_tile(store, run, tile, values)


def _write_tile(store: str | Path, run: str, tile: Tile, values: Mapping[str, NDArray[Any]]) -> int:
    group = opened_group(place(store), what="map store")
    if group.attrs.get("run") != run:
        raise StoreError(
            "the map store belongs to another run", where=store, remedy="start the command again"
        )
    keys = tile_keys(tile)
    try:
        # Each file is replaced whole: if this worker was thought dead, another one may have done the tile.
        for name in keys:
            # An all-NaN tile is a finished tile, too.
            array = array_in(group, name).with_config({"write_empty_chunks": True})
            if array.shards is None:
                array[tile.region] = values[name][None]
            else:
                ShardWriter(array).write((tile.time, tile.row, tile.column, 0, 0), values[name][None])
        return stored_bytes(group.store, tile)
    except OSError as error:
        refusal = out_of_space(error, store)
        if refusal is None:
            raise
        for key in keys.values():  # what is there of this tile is no use, and its space is needed
            sync(group.store.delete(key))
        raise refusal from error


def tile_keys(tile: Tile) -> dict[str, str]:
    """Names of a tile's files in the map store, by variable."""
    place = f"{tile.time}/{tile.row}/{tile.column}"
    return {
        variable.name: f"{variable.name}/c/{place}" + ("/0/0" if variable.profile else "")
        for variable in VARIABLES
    }


def read_tile(group: zarr.Group, tile: Tile) -> dict[str, NDArray[Any]]:
    """Read all variables of a tile, each of shape (y, x) or (y, x, quantile, height), from a map's group.

    What has not been written reads as the variable's fill value: see `missing_files`.
    """
    values = {}
    for variable in VARIABLES:
        values[variable.name] = np.asarray(array_in(group, variable.name)[tile.region])[0]
    return values


def written_files(store: Any, tile: Tile) -> list[str]:  # noqa: ANN401
    """Names of a tile's files that are in a Zarr store."""
    return [key for key in tile_keys(tile).values() if sync(store.exists(key))]


def missing_files(store: Any, tile: Tile) -> list[str]:  # noqa: ANN401
    """Names of a tile's files that are not in a Zarr store."""
    written = written_files(store, tile)
    return [key for key in tile_keys(tile).values() if key not in written]


def stored_bytes(store: Any, tile: Tile) -> int:  # noqa: ANN401
    """Bytes of a tile's files in a Zarr store.

    Raises
    ------
    FileNotFoundError
        One of them is missing.
    """
    return sum(sync(store.getsize(key)) for key in tile_keys(tile).values())
