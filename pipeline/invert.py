"""The map engine: from an observation and a network to a map of posterior quantiles, tile by tile.

A run is made to be killed. The map store is laid out whole before anything is computed; each tile is one task
and one shard; a journal beside the store says which tiles are done. The same command again does what is
missing, and the finished map is bit for bit that of a run which was never disturbed.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import xarray as xr
import zarr
from distributed import Client
from zarr.storage import LocalStore

from inn.checkpoint import Network, load_model, model_hash
from inn.latent import LatentKind, draw_latent
from inn.posterior import QUANTILES
from pipeline.cluster import AddressConfig, LocalConfig, SlurmConfig, opened, threads_per_task
from pipeline.driver import run_bounded
from pipeline.errors import FlareFieldError, InputError, MisuseError, StoreError
from pipeline.journal import Journal, changes, journal_path, lock, out_of_space, sync_directory
from pipeline.observation import open_observation
from pipeline.progress import Progress
from pipeline.provenance import provenance
from pipeline.results import is_map, lay_out
from pipeline.spectra import shortfall
from pipeline.tiles import (
    KERNEL,
    Tile,
    TileGrid,
    TileResult,
    TileSpec,
    invert_tile,
    observation_hash,
    quarantine_tile,
    stored_bytes,
)

logger = logging.getLogger("flarefield")

ERROR_LENGTH = 2000
RECORD_LENGTH = 2000
"""Characters (as JSON) of an entry of a model's record that a map repeats; the model keeps longer ones."""

HEIGHT_ZERO = "that of the grid the network was trained on: tau_500 = 1 of its starting atmosphere"


@dataclass(frozen=True)
class FailedTile:
    """A tile that was given up.

    Attributes
    ----------
    tile : Tile
        Which.
    error : str
        Its last error.
    attempts : int
        How often it was tried.
    """

    tile: Tile
    error: str
    attempts: int


@dataclass(frozen=True)
class InvertReport:
    """What a run of `invert` leaves behind.

    Attributes
    ----------
    output : Path
        The map store.
    tiles : int
        Tiles of the map.
    resumed : int
        Tiles that an earlier run had done.
    failed : tuple of FailedTile
        Tiles that could not be done; their pixels are flagged ``failed``. The same command tries them again.
    pixels : int
        Pixels of the map.
    answered : int
        Pixels that have an answer.
    flags : mapping of str to int
        Pixels with each flag.
    stored : int
        Bytes of the map's tiles on disk.
    seconds : float
        Time this run took.
    """

    output: Path
    tiles: int
    resumed: int
    failed: tuple[FailedTile, ...]
    pixels: int
    answered: int
    flags: Mapping[str, int]
    stored: int
    seconds: float

    def summary(self) -> str:
        """The report as a person reads it."""
        before = f", {self.resumed} of them by an earlier run" if self.resumed else ""
        lines = [
            f"{self.output}: {self.tiles - len(self.failed)} of {self.tiles} tiles done{before}",
            f"  {self.answered} of {self.pixels} pixels have an answer; {self.stored / 1e6:.1f} MB on disk",
        ]
        if self.flags:
            lines.append("  flags: " + ", ".join(f"{name} {count}" for name, count in self.flags.items()))
        for failed in self.failed[:20]:
            reason = failed.error.splitlines()[0]
            lines.append(f"  failed after {failed.attempts} attempts: tile at {failed.tile}: {reason}")
        if len(self.failed) > 20:
            lines.append(f"  and {len(self.failed) - 20} more, in {journal_path(self.output)}")
        if self.failed:
            lines.append("  run the same command again to try the failed tiles once more")
        return "\n".join(lines)


def invert(
    observation: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    cluster: LocalConfig | AddressConfig | SlurmConfig | Client | None = None,
    draws: int = 256,
    seed: int = 0,
    latent: LatentKind = "sobol",
    quantiles: Sequence[float] = QUANTILES,
    tile: int = 64,
    calibration_error: float | None = None,
    overwrite: bool = False,
    call: str | None = None,
    window: int | None = None,
) -> InvertReport:
    """Invert every pixel of an observation, or what is missing of it.

    If `output` exists, it must have been made by the same call: what is missing is then done, and tiles that
    failed are tried again. The numbers do not depend on `tile`, `cluster` and `window`, but for rounding.

    Parameters
    ----------
    observation : str or Path
        The observation store.
    output : str or Path
        The map store (`pipeline.results`). The journal lies beside it, ``<output>.journal``.
    model : str or Path, optional
        The model directory; the bundled model if left out.
    cluster : configuration or distributed.Client, optional
        Where to run; by default all cores of this machine.
    draws : int
        Draws from each pixel's posterior.
    seed : int
        Seed of the latent draws, which all pixels share.
    latent : {"sobol", "gaussian"}
        Kind of latent draws.
    quantiles : sequence of float
        Levels between 0 and 1, increasing.
    tile : int
        Pixels along both sides of a tile.
    calibration_error : float, optional
        Relative error (one standard deviation) of the intensity of one line against the other's; the
        network's own default if left out.
    overwrite : bool
        Start over where a map exists. It stays as it is until the new one is finished.
    call : str, optional
        The command that the map records as its origin; by default this call.
    window : int, optional
        Tiles in flight at most.

    Returns
    -------
    InvertReport
        Also when tiles failed: see `InvertReport.failed`.

    Raises
    ------
    MisuseError
        The settings contradict themselves or those the map was begun with, the output is something else, or
        another command is working on it.
    InputError
        The observation does not cover the network's wavelengths, or lacks something.
    ModelError, StoreError, ClusterError
        The model, a store or the cluster cannot be used, or was lost; no space is left. What is done is kept.
    """
    started = time.monotonic()
    observation, output = Path(observation).absolute(), Path(output).absolute()
    model_path = None if model is None else str(Path(model).absolute())
    network = load_model(model_path)
    dataset = open_observation(observation)
    _check_observation(dataset, network, observation, calibration_error)
    if tile < 1:
        raise MisuseError("a tile must hold pixels", where="tile", found=tile)
    grid = TileGrid.square((dataset.sizes["time"], dataset.sizes["y"], dataset.sizes["x"]), tile)
    spec = TileSpec(
        observation=str(observation),
        observation_hash=observation_hash(observation),
        store=str(output),
        run=uuid4().hex,
        model=model_path,
        model_hash=model_hash(model_path),
        torch_version=torch.__version__.split("+")[0],
        draws=draws,
        seed=seed,
        latent=latent,
        quantiles=tuple(float(level) for level in quantiles),
        calibration_error=None if calibration_error is None else float(calibration_error),
        threads=1,
    )
    if network.novelty is None:
        logger.warning("the model has no novelty measure: profiles unlike its training set are not flagged")
    draw_latent(draws, network.latent_size, seed, latent)  # refuses here what it would refuse in every tile
    fingerprint = _fingerprint(spec, grid, network)
    attrs = _attributes(spec, dataset, network, fingerprint, call or f"invert({observation}, {output})")
    if not output.parent.is_dir():
        raise MisuseError("the output's directory does not exist", where=output.parent)

    def make_store(path: Path) -> None:
        lay_out(
            path,
            _coordinates(dataset),
            heights=network.layout.heights,
            quantiles=spec.quantiles,
            tile=grid.tile,
            attrs=attrs,
        )

    with lock(output):
        store, journal = _begin(output, spec.run, fingerprint, make_store, overwrite=overwrite)
        spec = replace(spec, store=str(store), run=journal.run)
        work = _Work(spec, grid, journal)
        with journal:
            work.take_up()
            if work.resumed < len(grid):
                with opened(cluster or LocalConfig()) as client:
                    work.go_on(client, window)
            journal.append({"finished": True})
        if store != output:
            _swap(output, store)
    return InvertReport(
        output=output,
        tiles=len(grid),
        resumed=work.resumed,
        failed=tuple(work.failed),
        pixels=grid.pixels,
        answered=work.answered,
        flags=dict(sorted(work.flags.items())),
        stored=work.stored,
        seconds=time.monotonic() - started,
    )


def _check_observation(
    dataset: xr.Dataset, network: Network, path: Path, calibration_error: float | None
) -> None:
    for window in network.layout.lines:
        axis = dataset[f"wavelength_{window.name}"].values
        if (missing := shortfall(axis, window)) > 0:
            raise InputError(
                f"the wavelength range of {window.name} is too short for the network",
                where=path,
                found=f"{axis[0]:.3f} to {axis[-1]:.3f} Angstrom",
                expected=f"{window.wavelengths[0]:.3f} to {window.wavelengths[-1]:.3f} Angstrom, "
                f"less half a sampling step; {missing:.3f} Angstrom are missing",
                remedy="use scans that reach further into the wings, or a network with narrower windows",
            )
    mu = np.asarray(dataset["mu"].values if "mu" in dataset.variables else [1.0])
    if not np.all((mu > 0) & (mu <= 1)):
        raise InputError(
            "the observation's mu is not the cosine of an angle on the disc",
            where=path,
            found=mu[~((mu > 0) & (mu <= 1))][0],
            expected="above 0, at most 1",
            remedy="leave out the scans that point off the disc, or mend their headers",
        )
    # The novelty measure does not look at these: outside of what was trained, only this warning says so.
    conditions = network.record.get("conditions", {})
    for name, values in (("mu", mu), ("calibration_error", [calibration_error])):
        low, high = conditions.get(name, (-np.inf, np.inf))
        outside = [value for value in values if value is not None and not low <= value <= high]
        if outside:
            logger.warning(
                "%s is %.3g, outside of the %.3g to %.3g that the network was trained for",
                name,
                outside[0],
                low,
                high,
            )


def _fingerprint(spec: TileSpec, grid: TileGrid, network: Network) -> dict[str, Any]:
    """Everything that decides a map's bits, by the names of its settings, as JSON holds it."""
    weights = next(iter(network.parameters()))
    return {
        "observation": spec.observation_hash,
        "model": spec.model_hash,
        "draws": spec.draws,
        "seed": spec.seed,
        "latent": spec.latent,
        "quantiles": list(spec.quantiles),
        "calibration_error": spec.calibration_error,
        "tile": list(grid.tile),
        "kernel": KERNEL,
        "torch": spec.torch_version,
        "device": weights.device.type,
        "dtype": str(weights.dtype).removeprefix("torch."),
    }


def _attributes(
    spec: TileSpec, dataset: xr.Dataset, network: Network, fingerprint: Mapping[str, Any], call: str
) -> dict[str, Any]:
    """What the map store says of itself."""
    record = {
        name: value for name, value in network.record.items() if len(json.dumps(value)) <= RECORD_LENGTH
    }
    grid = record.get("grid")
    about = grid if isinstance(grid, dict) else record
    return {
        **provenance(call, {"observation": spec.observation_hash, "model": spec.model_hash}),
        "title": "Posterior quantiles of a flare atmosphere",
        "run": spec.run,
        "settings": dict(fingerprint),
        "height_zero": about.get("height_zero", HEIGHT_ZERO),
        **{name: about[name] for name in ("statistical_equilibrium",) if name in about},
        "relative_calibration": dataset.attrs.get("relative_calibration", "assumed"),
        "observation": {
            name: dataset.attrs[name]
            for name in ("flarefield_version", "call", "made_from")
            if name in dataset.attrs
        },
        "model": {
            "name": "the bundled model" if spec.model is None else Path(spec.model).name,
            "kind": type(network).__name__,
            "sha256": spec.model_hash,
            "record": record,
        },
    }


def _coordinates(dataset: xr.Dataset) -> xr.Dataset:
    """What places the observation's pixels in time and on the sun."""
    here = {"time", "y", "x"}
    names = [name for name, values in dataset.coords.items() if set(values.dims) <= here]
    if "mu" in dataset.variables and "mu" not in names:
        names.append("mu")
    return xr.Dataset(coords={name: dataset[name].reset_coords(drop=True) for name in names})


# The output: begun, resumed or replaced


def _begin(
    output: Path,
    run: str,
    fingerprint: Mapping[str, Any],
    make_store: Callable[[Path], None],
    *,
    overwrite: bool,
) -> tuple[Path, Journal]:
    """Find or make the store to work on: the output itself, or what is to replace it."""
    _finish_swaps(output)
    exists = os.path.lexists(output)
    if exists and not is_map(output):
        raise MisuseError(
            "the output exists and is not a map",
            where=output,
            expected="nothing, or a map store made by `flarefield invert`",
            remedy="choose another output, or remove it yourself",
        )
    replacements = _siblings(output, ".new")
    if overwrite:
        for store in replacements:
            try:
                return store, _resume(store, fingerprint)
            except FlareFieldError:
                _discard(store)
        if exists:
            store = output.with_name(f"{output.name}.{run}.new")
            return store, _fresh(store, run, fingerprint, make_store)
    elif replacements:
        logger.warning(
            "%s holds an unfinished replacement of the map; --overwrite goes on with it", replacements[0]
        )
    if exists:
        return output, _resume(output, fingerprint)
    return output, _fresh(output, run, fingerprint, make_store)


def _fresh(
    store: Path, run: str, fingerprint: Mapping[str, Any], make_store: Callable[[Path], None]
) -> Journal:
    # The journal first: a store without one could not be told from one whose journal was lost.
    journal = Journal.create(journal_path(store), run, fingerprint)
    try:
        make_store(store)
    except OSError as error:
        journal.close()
        if (refusal := out_of_space(error, store)) is not None:
            raise refusal from error
        raise
    return journal


def _resume(store: Path, fingerprint: Mapping[str, Any]) -> Journal:
    path = journal_path(store)
    if not is_map(store) or not path.is_file():
        raise StoreError(
            "the map's journal is missing, so it is unknown what is done of it",
            where=path,
            remedy="put the journal back beside the map, or start over with --overwrite",
        )
    journal = Journal.open(path)
    try:
        if journal.run != zarr.open_group(store, mode="r").attrs.get("run"):
            raise StoreError(
                "map and journal are of different runs",
                where=path,
                remedy="put the right journal back beside the map, or start over with --overwrite",
            )
        differing = changes(journal.fingerprint, fingerprint)
        if differing:
            raise MisuseError(
                "the map was begun with other settings",
                where=store,
                found="; ".join(f"{name}: {_short(wanted)}" for name, (_, wanted) in differing.items()),
                expected="; ".join(
                    f"{name}: {_short(recorded)}" for name, (recorded, _) in differing.items()
                ),
                remedy="repeat the settings it was begun with, choose another output, or start over with "
                "--overwrite",
            )
    except FlareFieldError:
        journal.close()
        raise
    return journal


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return f"{text[:12]}..." if len(text) == 64 else text


def _siblings(output: Path, ending: str) -> list[Path]:
    """Stores beside the output that are to replace it or were replaced: ``<output>.<run><ending>``."""
    found = output.parent.glob(f"{glob.escape(output.name)}.{'[0-9a-f]' * 32}{ending}")
    return sorted(found)


def _finish_swaps(output: Path) -> None:
    """Complete what a run that was killed between its last tile and its end left undone."""
    for path in _siblings(output, ".new.journal"):
        store = path.with_name(path.name.removesuffix(".journal"))
        try:
            with Journal.open(path) as journal:
                finished = journal.finished
        except StoreError:
            finished = False
        if finished:
            _swap(output, store)
        elif not store.exists():
            path.unlink()
    for store in _siblings(output, ".old"):
        shutil.rmtree(store, ignore_errors=True)


def _swap(output: Path, store: Path) -> None:
    """Put a finished replacement in the output's place. Each step can be the last one before a kill."""
    old = store.with_name(store.name.removesuffix(".new") + ".old")
    if store.exists():
        if output.exists():
            output.rename(old)
        store.rename(output)
    os.replace(journal_path(store), journal_path(output))
    sync_directory(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def _discard(store: Path) -> None:
    shutil.rmtree(store, ignore_errors=True)
    journal_path(store).unlink(missing_ok=True)


# The run


@dataclass
class _Work:
    """What is done of a map, and what is not."""

    spec: TileSpec
    grid: TileGrid
    journal: Journal
    failed: list[FailedTile] = field(default_factory=list)
    flags: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    answered: int = 0
    stored: int = 0
    pixels: int = 0

    def __post_init__(self) -> None:
        self.done = np.zeros(len(self.grid), dtype=bool)

    def _count(self, tile: Tile, answered: int, flags: Mapping[str, int], stored: int) -> None:
        self.done[self.grid.index(tile)] = True
        self.pixels += tile.pixels
        self.answered += answered
        self.flags.update(flags)
        self.stored += stored

    def take_up(self) -> None:
        """Read from the journal what earlier runs did, and see that it is still there."""
        store = LocalStore(self.spec.store)
        last = np.full(len(self.grid), -1)
        for number, record in enumerate(self.journal.records()):
            if "tile" in record:
                last[int(record["tile"])] = number if "sha256" in record else -1
        lost = 0
        for number, record in enumerate(self.journal.records()):
            if "tile" not in record or last[index := int(record["tile"])] != number:
                continue
            tile = self.grid[index]
            try:
                intact = stored_bytes(store, tile) == record["stored"]
            except FileNotFoundError:
                intact = False
            if intact:
                self._count(tile, record["answered"], record["flags"], record["stored"])
            else:
                lost += 1
        self.resumed = int(self.done.sum())
        if lost:
            logger.warning("%d finished tiles are missing or damaged in the map, and are done again", lost)
        if 0 < self.resumed < len(self.grid):
            # What writers that were killed left behind under temporary names.
            for leftover in Path(self.spec.store).rglob("*.partial"):
                leftover.unlink(missing_ok=True)

    def go_on(self, client: Client, window: int | None) -> None:
        """Do all tiles that are not done."""
        spec = replace(self.spec, threads=threads_per_task(client))
        missing = (self.grid[int(index)] for index in np.flatnonzero(~self.done))
        with (
            Progress("inverting", self.grid.pixels, "pixels", self.pixels) as progress,
            closing(run_bounded(client, partial(invert_tile, spec), missing, window=window)) as outcomes,
        ):
            for outcome in outcomes:
                if outcome.result is not None:
                    self._finish(outcome.result)
                elif _concerns_run(outcome.error):
                    # Nothing that is in flight could do better.
                    assert isinstance(outcome.error, FlareFieldError)
                    raise outcome.error
                else:
                    self._give_up(spec, outcome.task, outcome.error, outcome.attempts)
                progress.advance(outcome.task.pixels)
        self._see_that_all_is_there()

    def _see_that_all_is_there(self) -> None:
        """Refuse to call a map finished that has lost tiles while it was made."""
        store = LocalStore(self.spec.store)
        lost = 0
        for index in np.flatnonzero(self.done):
            try:
                stored_bytes(store, self.grid[int(index)])
            except FileNotFoundError:
                lost += 1
        if lost:
            raise StoreError(
                f"{lost} finished tiles have gone from the map while it was being made",
                where=self.spec.store,
                remedy="run the same command again: it does them once more",
            )

    def _finish(self, result: TileResult) -> None:
        self._count(result.tile, result.answered, result.flags, result.stored)
        self.journal.append(
            {
                "tile": self.grid.index(result.tile),
                "sha256": result.sha256,
                "stored": result.stored,
                "answered": result.answered,
                "flags": dict(result.flags),
                "seconds": result.seconds,
            }
        )

    def _give_up(self, spec: TileSpec, tile: Tile, error: BaseException | None, attempts: int) -> None:
        text = f"{type(error).__name__}: {error}"[:ERROR_LENGTH]
        logger.error("tile at %s failed: %s", tile, text.splitlines()[0])
        result = quarantine_tile(spec, tile)
        self.failed.append(FailedTile(tile, text, attempts))
        self.flags.update(result.flags)
        self.stored += result.stored
        self.journal.append({"tile": self.grid.index(tile), "error": text, "attempts": attempts})


def _concerns_run(error: BaseException | None) -> bool:
    """Whether an error means that no tile can be done: anything but what one tile's data can cause."""
    return isinstance(error, FlareFieldError) and not isinstance(error, InputError)
