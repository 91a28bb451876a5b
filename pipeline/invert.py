"""The map engine: from an observation and a network to a map of posterior quantiles, tile by tile.

A run is made to be killed. The map store is laid out whole before anything is computed; each tile is one task
and one shard; a journal beside the store says which tiles are done. The same command again does what is
missing, and the finished map is bit for bit that of a run which was never disturbed.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import xarray as xr
import zarr
from distributed import Client
from numpy.typing import NDArray

from inn.checkpoint import Network, load_model, model_hash
from inn.latent import LatentKind
from inn.layout import QUANTITIES
from inn.posterior import QUANTILES, latents_of
from inn.precision import Precision
from inn.preview import check_taught, preview_of, stated_disagreement
from inn.sampling import Sampling, choose_precision, choose_sampling
from pipeline.cluster import (
    ClusterConfig,
    SlurmConfig,
    best_config,
    device_of,
    opened,
    see_that_it_can_be_had,
    see_that_workers_find,
    threads_per_task,
)
from pipeline.devices import Device
from pipeline.driver import run_bounded
from pipeline.errors import FlareFieldError, InputError, MisuseError, StoreError
from pipeline.journal import Journal, as_listed, changes, is_receipt, read_journal, short
from pipeline.observation import open_observation, see_that_it_is_one, see_that_it_is_whole
from pipeline.plan import Beside, Plan, make_plan, see_that_it_fits
from pipeline.progress import Progress
from pipeline.provenance import provenance
from pipeline.replacement import as_swapped, discard, finish_swaps, replacement, replacements, swap
from pipeline.results import (
    PREVIEW,
    SAMPLING,
    Flag,
    is_map,
    lay_out,
    mark_unwritten,
    see_that_it_is_as_begun,
)
from pipeline.selection import select
from pipeline.spectra import Interpolation, shortfall
from pipeline.storage import Place, gone, lies_in, log_at, place, space
from pipeline.tiles import (
    KERNEL,
    Tile,
    TileGrid,
    TileResult,
    TileSpec,
    fetched_model,
    invert_tile,
    observation_hash,
    quarantine_tile,
    tile_keys,
)

logger = logging.getLogger("flarefield")

ERROR_LENGTH = 2000
RECORD_LENGTH = 2000
"""Characters (as JSON) of an entry of a model's record that a map repeats; the model keeps longer ones."""

METADATA = 50_000
"""Bytes of a map's attributes and of what describes its variables, about."""
METADATA_FILES = 32
"""Their files and directories, and those of heights, quantiles and the journal."""

PREVIEW_COMMENTS = {
    **dict.fromkeys(QUANTITIES, "a preview of the posterior, not sampled: see the store's comment"),
    "misfit": "not known of a preview: to re-compute profiles takes joint draws of whole atmospheres",
}
"""What the variables of a preview say of themselves."""

UNSAID: Mapping[str, Any] = {"interpolation": "linear", "precision": "float32", "compiled": False}
"""What a map's settings leave out: maps that were begun before there was a choice go on."""

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
    output : Path or str
        The map store, or its URL.
    tiles : int
        Tiles of the map that hold selected pixels.
    resumed : int
        Tiles that an earlier run had done.
    failed : tuple of FailedTile
        Tiles that could not be done; their pixels are flagged ``failed``. The same command tries them again.
    pixels : int
        Selected pixels.
    answered : int
        Pixels that have an answer.
    flags : mapping of str to int
        Pixels of the whole map with each flag.
    stored : int
        Bytes of the map's tiles on disk.
    seconds : float
        Time this run took.
    sampling : Sampling or None
        What was drawn for each pixel; None for a preview.
    preview : str or None
        Of a preview: what it is, and how far it is off.
    """

    output: Path | str
    tiles: int
    resumed: int
    failed: tuple[FailedTile, ...]
    pixels: int
    answered: int
    flags: Mapping[str, int]
    stored: int
    seconds: float
    sampling: Sampling | None
    preview: str | None = None

    def summary(self) -> str:
        """The report as a person reads it."""
        before = f", {self.resumed} of them by an earlier run" if self.resumed else ""
        lines = [
            f"{self.output}: {self.tiles - len(self.failed)} of {self.tiles} tiles done{before}",
            f"  {self.answered} of {self.pixels} pixels have an answer; {self.stored / 1e6:.1f} MB on disk",
        ]
        if self.sampling is not None:
            lines.append(f"  {self.sampling}")
        if self.preview is not None:
            lines.append(f"  PREVIEW: {self.preview}")
        if self.flags:
            lines.append("  flags: " + ", ".join(f"{name} {count}" for name, count in self.flags.items()))
        for failed in self.failed[:20]:
            reason = failed.error.splitlines()[0]
            lines.append(f"  failed after {failed.attempts} attempts: tile at {failed.tile}: {reason}")
        if len(self.failed) > 20:
            lines.append(f"  and {len(self.failed) - 20} more, in {place(self.output).journal}")
        if self.failed:
            lines.append("  run the same command again to try the failed tiles once more")
        return "\n".join(lines)


def invert(
    observation: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    cluster: ClusterConfig | Client | None = None,
    draws: int | None = None,
    seed: int | None = None,
    latent: LatentKind | None = None,
    accuracy: float | None = None,
    precision: Precision | None = None,
    compiled: bool = False,
    quantiles: Sequence[float] = QUANTILES,
    tile: int = 64,
    calibration_error: float | None = None,
    interpolation: Interpolation = "linear",
    preview: bool = False,
    region: str | None = None,
    times: str | None = None,
    skip: Sequence[str] = (),
    skip_from: str | Path | None = None,
    overwrite: bool = False,
    call: str | None = None,
    window: int | None = None,
) -> InvertReport:
    """Invert every pixel of an observation or of a part of it, or what is missing of them.

    If `output` exists, it must have been made by the same call: what is missing is then done, and tiles that
    failed are tried again. The numbers do not depend on `tile`, `cluster` and `window`, but for rounding.

    Parameters
    ----------
    observation : str or Path
        The observation store, or its URL (`pipeline.storage.place`).
    output : str or Path
        The map store (`pipeline.results`), or its URL. The journal lies beside it, ``<output>.journal``.
    model : str or Path, optional
        The model directory, or its URL; the bundled model if left out.
    cluster : configuration or distributed.Client, optional
        Where to run; by default the GPUs of this machine, and all its cores where there are none.
    draws : int, optional
        Draws from each pixel's posterior; if left out, the fewest that reach `accuracy` of those measured for
        the network (`inn.sampling.choose_sampling`).
    seed : int, optional
        Seed of the latent draws, which all pixels share. The latents that a network brings with it have none:
        to name a seed is to ask for others.
    latent : {"sobol", "gaussian", "balanced", "tuned"}, optional
        Kind of latents; the best of this network for so many draws if left out.
    accuracy : float, optional
        Wanted error of the quantiles at 5, 50 and 95 % (root mean square), in units of the posterior's
        spread; `inn.sampling.DEFAULT_ERROR` if neither this nor `draws` is given.
    precision : {"float32", "bfloat16"}, optional
        Of the factors of matrix products; the network's own choice if left out, where this machine (or the
        GPU) can multiply such numbers. All workers must be able to.
    compiled : bool
        Have torch compile how the network draws, on every worker (`inn.posterior.compile_draws`).
    quantiles : sequence of float
        Levels between 0 and 1, increasing.
    tile : int
        Pixels along both sides of a tile.
    calibration_error : float, optional
        Relative error (one standard deviation) of the intensity of one line against the other's. If left out,
        what the observation says of it (``relative_calibration_uncertainty``), or else the network's own
        default.
    interpolation : {"linear", "pchip"}
        How profiles are brought to the network's points: linearly, or by monotone cubics. A network expects
        what it was trained with, the former unless its record says otherwise.
    preview : bool
        Answer with the model's preview (`inn.preview`), some twenty times as fast as sampling, and say so in
        the map. Nothing is drawn then, and there is no misfit.
    region, times, skip, skip_from
        The part to invert, as for `pipeline.selection.select`; by default all. The map has the dimensions of
        the whole observation; pixels that are not selected are flagged ``not_selected``, the others have the
        same bits as in the map of all.
    overwrite : bool
        Start over where a map exists. It stays as it is until the new one is finished; on an object store,
        which cannot rename, there is no map for as long as it takes to copy the new one to its place.
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
    cluster = best_config() if cluster is None else cluster
    see_that_it_can_be_had(cluster)
    see_that_workers_find(cluster, observation, output, model, skip_from)
    request = _settle(
        observation,
        output,
        device=device_of(cluster),
        model=model,
        draws=draws,
        seed=seed,
        latent=latent,
        accuracy=accuracy,
        precision=precision,
        compiled=compiled,
        quantiles=quantiles,
        tile=tile,
        calibration_error=calibration_error,
        interpolation=interpolation,
        preview=preview,
        region=region,
        times=times,
        skip=skip,
        skip_from=skip_from,
    )
    target, grid = request.output, request.grid
    make_store = partial(_make_store, request, call or f"invert({observation}, {output})")
    with target.lock(), space(target):
        swapped = finish_swaps(target)
        begun = _begun(target, request.fingerprint, overwrite=overwrite, swapped=swapped)
        if begun is None:
            _see_that_it_fits(request, np.zeros(len(grid), dtype=bool), _beside(request))
            begun = _begin(target, request.spec.run, request.fingerprint, make_store, overwrite=overwrite)
        store, journal = begun
        spec = replace(request.spec, store=str(store), run=journal.run)
        work = _Work(spec, grid, request.asked, request.selected, journal)
        with journal:
            work.take_up()
            if 0 < work.resumed < work.tiles:
                _see_that_it_fits(request, work.done, Beside(0, 0))
            if work.resumed < work.tiles:
                with opened(cluster) as client:
                    work.go_on(client, window)
            mark_unwritten(store.location, Flag.NOT_DONE if spec.selection.whole else Flag.NOT_SELECTED)
            journal.append({"finished": True, "tiles": work.tiles})
        if store is not target:
            swap(target, store)
    pixels = int(request.asked.sum())
    flags = work.flags | ({"not_selected": grid.pixels - pixels} if pixels < grid.pixels else {})
    return InvertReport(
        output=target.location,
        tiles=work.tiles,
        resumed=work.resumed,
        failed=tuple(work.failed),
        pixels=pixels,
        answered=work.answered,
        flags=dict(sorted(flags.items())),
        stored=work.stored,
        seconds=time.monotonic() - started,
        sampling=request.sampling,
        preview=preview_comment(request.network) if spec.preview else None,
    )


def plan_inversion(
    observation: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    cluster: ClusterConfig | Client | None = None,
    draws: int | None = None,
    seed: int | None = None,
    latent: LatentKind | None = None,
    accuracy: float | None = None,
    precision: Precision | None = None,
    compiled: bool = False,
    quantiles: Sequence[float] = QUANTILES,
    tile: int = 64,
    calibration_error: float | None = None,
    interpolation: Interpolation = "linear",
    preview: bool = False,
    region: str | None = None,
    times: str | None = None,
    skip: Sequence[str] = (),
    skip_from: str | Path | None = None,
    overwrite: bool = False,
) -> Plan:
    """Say what `invert` would do with the same arguments, and what it would take; nothing is written.

    The cluster inverts a few pixels for that (a worker keeps them in its temporary files meanwhile); of a
    SLURM cluster, one job.

    Parameters
    ----------
    observation, output, model, cluster, draws, seed, latent, accuracy, precision, compiled
        As for `invert`.
    quantiles, tile, calibration_error, interpolation, preview
        As for `invert`.
    region, times, skip, skip_from, overwrite
        As for `invert`.

    Returns
    -------
    pipeline.plan.Plan
        Also when the map does not fit on the disk: see `Plan.fits`.

    Raises
    ------
    FlareFieldError
        Whatever `invert` would refuse, but for space, and for what only writing tells of an object store.
    """
    cluster = best_config() if cluster is None else cluster
    see_that_it_can_be_had(cluster)
    see_that_workers_find(cluster, observation, output, model, skip_from)
    request = _settle(
        observation,
        output,
        device=device_of(cluster),
        model=model,
        draws=draws,
        seed=seed,
        latent=latent,
        accuracy=accuracy,
        precision=precision,
        compiled=compiled,
        quantiles=quantiles,
        tile=tile,
        calibration_error=calibration_error,
        interpolation=interpolation,
        preview=preview,
        region=region,
        times=times,
        skip=skip,
        skip_from=skip_from,
    )
    done = np.zeros(len(request.grid), dtype=bool)
    request.output.see_that_it_is_free()
    begun = _begun(request.output, request.fingerprint, overwrite=overwrite)
    if begun is not None:
        store, journal = begun  # as they are: nothing is mended before the run itself
        spec = replace(request.spec, store=str(store))
        work = _Work(spec, request.grid, request.asked, request.selected, journal)
        work.take_up()
        done = work.done
    plan = partial(
        make_plan,
        spec=request.spec,
        grid=request.grid,
        asked=request.asked,
        done=done,
        dataset=request.dataset,
        beside=_beside(request) if begun is None else Beside(0, 0),
        sampling=request.sampling,
    )
    if done[request.asked > 0].all():
        return plan(None)
    tasks = None
    if isinstance(cluster, SlurmConfig):
        tasks, cluster = cluster.jobs * cluster.processes, cluster.model_copy(update={"jobs": 1})
    with opened(cluster) as client:
        return plan(client, tasks=tasks)


def _beside(request: _Request) -> Beside:
    """What a map's coordinates, which the observation has too, and its metadata take; about."""
    there = place(request.spec.observation)
    sizes: dict[str, int] = {}
    for name in _coordinates(request.dataset).variables:
        sizes |= there.sizes(str(name))
    folders = {folder for key in sizes for folder in PurePosixPath(key).parents}
    return Beside(METADATA + sum(sizes.values()), METADATA_FILES + len(sizes) + len(folders))


def _see_that_it_fits(request: _Request, done: NDArray[np.bool_], beside: Beside) -> None:
    see_that_it_fits(
        request.spec,
        request.grid,
        request.asked,
        done,
        request.dataset,
        beside=beside,
        heights=request.network.layout.heights.size,
    )


@dataclass(frozen=True)
class _Request:
    """What is wanted, checked, before anything is made."""

    output: Place
    spec: TileSpec
    grid: TileGrid
    asked: NDArray[np.int64]
    selected: NDArray[np.uint32] | None
    fingerprint: dict[str, Any]
    dataset: xr.Dataset
    network: Network
    sampling: Sampling | None


def _settle(
    observation: str | Path,
    output: str | Path,
    *,
    device: Device,
    model: str | Path | None,
    draws: int | None,
    seed: int | None,
    latent: LatentKind | None,
    accuracy: float | None,
    precision: Precision | None,
    compiled: bool,
    quantiles: Sequence[float],
    tile: int,
    calibration_error: float | None,
    interpolation: Interpolation,
    preview: bool,
    region: str | None,
    times: str | None,
    skip: Sequence[str],
    skip_from: str | Path | None,
) -> _Request:
    """Check the arguments of `invert` against the observation and the model."""
    observation, target = str(place(observation)), place(output)
    model_path = None if model is None else str(place(model))
    for source in (observation, model_path, skip_from):
        if source is not None and lies_in(target, place(source)):
            raise MisuseError(
                "the map would lie inside of what it is made from",
                where=target,
                found=f"a place in {source}",
                remedy="choose an output beside it",
            )
    if not target.can_hold():
        raise MisuseError(
            "the output's directory does not exist",
            where=Path(target.location).parent,
            remedy="make it, or choose an output in one that exists",
        )
    with fetched_model(model_path) as folder:
        network, weights = load_model(folder), model_hash(folder)
    see_that_it_is_one(observation)
    sizes = place(observation).sizes()
    try:
        identity = observation_hash(observation, sizes)
    except FileNotFoundError as failure:
        raise gone(observation, failure) from failure
    dataset = open_observation(observation, listed=sizes)
    see_that_it_is_whole(dataset, observation, sizes)
    if calibration_error is None:
        calibration_error = dataset.attrs.get("relative_calibration_uncertainty")
    if tile < 1:
        raise MisuseError("a tile must hold pixels", where="tile", found=tile)
    grid = TileGrid.square((dataset.sizes["time"], dataset.sizes["y"], dataset.sizes["x"]), tile)
    selection = select(dataset, identity, region=region, times=times, skip=skip, skip_from=skip_from)
    _check_observation(dataset, network, observation, calibration_error, selection.times)
    if selection.skip is not None and selection.skip.earlier == str(target):
        raise MisuseError(
            "a map cannot be made from its own flags", where=target, remedy="choose another output"
        )
    wishes: dict[str, Any] = {"draws": draws, "seed": seed, "latent": latent, "accuracy": accuracy}
    if preview:
        _see_that_it_can_be_previewed(
            network, quantiles, wishes | {"precision": precision, "compile": compiled or None}
        )
        sampling = Sampling("sobol", 0, 0, None)
        precision = "float32"
    else:
        precision = precision or choose_precision(network, device)
        sampling = choose_sampling(network, **wishes, quantiles=quantiles).with_precision(network, precision)
        latents_of(network, sampling.draws, sampling.seed, sampling.latent)  # or every tile would refuse it
    spec = TileSpec(
        observation=observation,
        observation_hash=identity,
        store=str(target),
        run=uuid4().hex,
        model=model_path,
        model_hash=weights,
        torch_version=torch.__version__.split("+")[0],
        draws=sampling.draws,
        seed=sampling.seed,
        latent=sampling.latent,
        quantiles=tuple(float(level) for level in quantiles),
        calibration_error=None if calibration_error is None else float(calibration_error),
        threads=1,
        selection=selection,
        device=device,
        interpolation=interpolation,
        precision=precision,
        compiled=compiled,
        preview=preview,
    )
    if (trained := network.record.get("interpolation", "linear")) != interpolation:
        logger.warning("the network was trained with %s interpolation, not %s", trained, interpolation)
    if network.novelty is None:
        logger.warning("the model has no novelty measure: profiles unlike its training set are not flagged")
    asked, selected, skipped = selection.survey(grid)
    if not asked.any():
        raise MisuseError(
            "no pixel is selected", where=observation, remedy="skip fewer flags, or choose another region"
        )
    fingerprint = _fingerprint(spec, grid, network) | {"skip_from": skipped}
    drawn = None if preview else sampling
    return _Request(target, spec, grid, asked, selected, fingerprint, dataset, network, drawn)


def _see_that_it_can_be_previewed(
    network: Network, quantiles: Sequence[float], wishes: Mapping[str, Any]
) -> None:
    stated_disagreement(network)
    check_taught(preview_of(network), quantiles)
    wished = [name for name, wish in wishes.items() if wish is not None]
    if wished:
        raise MisuseError(
            "a preview draws nothing from the posterior",
            found=" and ".join(wished),
            remedy="leave that out, or sample the posterior (without --preview)",
        )


def preview_comment(network: Network) -> str:
    """What a map made by a network's preview is, and how far it is off.

    Parameters
    ----------
    network : Network
        With its preview.

    Returns
    -------
    str
        Sentences.

    Raises
    ------
    ModelError
        It has none, or it has not been measured.
    """
    stated = stated_disagreement(network)
    off = ", ".join(
        f"{np.sqrt(np.mean(np.square(list(stated[quantity]['rms'].values())))):.2f} "
        f"({quantity.replace('_', ' ')})"
        for quantity in QUANTITIES
    )
    low, high = stated["heights"]
    return (
        f"Quantiles of a network that was taught by the sampled posterior, for choosing what to invert. On "
        f"{stated['examples']:,} held-out observations they differ from the sampled ones by {off} of the "
        f"posterior's spread: root mean square, {low:g} to {high:g} Mm, without the "
        f"{100 * stated['left_out']:.0f} % of the numbers whose posterior has two states far apart. How far "
        "they are off where profiles are novel is not known."
    )


def _make_store(
    request: _Request, call: str, store: Place, announce: Callable[[Mapping[str, str]], object]
) -> None:
    lay_out(
        store.location,
        _coordinates(request.dataset),
        heights=request.network.layout.heights,
        quantiles=request.spec.quantiles,
        tile=request.grid.tile,
        attrs=_attributes(request, call),
        comments=PREVIEW_COMMENTS if request.spec.preview else None,
        announce=announce,
    )


def _check_observation(
    dataset: xr.Dataset,
    network: Network,
    path: str,
    calibration_error: float | None,
    times: tuple[int, ...] | None,
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
    mu = mu[list(times)] if times is not None and "mu" in dataset.variables else mu
    on_disc = (mu > 0) & (mu <= 1)
    if not on_disc.any() or np.isfinite(mu[~on_disc]).any():
        raise InputError(
            "the observation's mu is not the cosine of an angle on the disc",
            where=path,
            found=mu[~on_disc][0],
            expected="above 0, at most 1",
            remedy="invert other times (--times), or mend the headers of the scans and ingest them again",
        )
    if not on_disc.all():
        logger.warning(
            "at %d of %d times the field's middle is off the disc, where mu is not defined: no answer there, "
            "flagged not_finite",
            np.count_nonzero(~on_disc),
            mu.size,
        )
    mu = mu[on_disc]
    if (unknown := int(dataset["time_ca8542"].isnull().sum())) > 0:
        logger.warning(
            "at %d of %d times it is not known when Ca II was taken", unknown, dataset.sizes["time"]
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
        **(
            {"method": PREVIEW}
            if spec.preview
            else {"draws": spec.draws, "seed": spec.seed, "latent": spec.latent}
        ),
        "quantiles": list(spec.quantiles),
        "calibration_error": spec.calibration_error,
        "tile": list(grid.tile),
        **spec.selection.settings(),
        **{name: getattr(spec, name) for name, usual in UNSAID.items() if getattr(spec, name) != usual},
        "kernel": KERNEL,
        "torch": spec.torch_version,
        "device": spec.device,
        "dtype": str(weights.dtype).removeprefix("torch."),
    }


def _said_of(request: _Request) -> dict[str, Any]:
    """How the quantiles were found, and how well."""
    network, sampling = request.network, request.sampling
    if sampling is None:
        return {
            "method": PREVIEW,
            "comment": preview_comment(network),
            "disagreement": stated_disagreement(network),
        }
    if sampling.error is None:
        return {"method": SAMPLING}
    scored = network.record["sampling"].get("scored")
    left_out = "" if scored is None else f"the {100 * (1 - scored):.1f} % of the "
    return {
        "method": SAMPLING,
        "sampling_error": sampling.error,
        "sampling_error_comment": "root mean square error, for the number of draws (and for products in half "
        "precision), of the quantiles 0.05, 0.5 and 0.95, whichever the map holds; in units of the "
        "posterior's spread (half of 0.84 less 0.16); measured on held-out simulations, without "
        f"{left_out}numbers whose posterior has two states far apart",
    }


def _attributes(request: _Request, call: str) -> dict[str, Any]:
    """What the map store says of itself."""
    spec, dataset, network = request.spec, request.dataset, request.network
    record = {
        name: value for name, value in network.record.items() if len(json.dumps(value)) <= RECORD_LENGTH
    }
    grid = record.get("grid")
    about = grid if isinstance(grid, dict) else record
    return {
        **provenance(call, {"observation": spec.observation_hash, "model": spec.model_hash}),
        "title": ("Preview of the posterior" if spec.preview else "Posterior")
        + " quantiles of a flare atmosphere",
        "run": spec.run,
        "settings": dict(request.fingerprint),
        **_said_of(request),
        "height_zero": about.get("height_zero", HEIGHT_ZERO),
        **{name: about[name] for name in ("statistical_equilibrium",) if name in about},
        "relative_calibration": dataset.attrs.get("relative_calibration", "assumed"),
        "observation": {
            name: dataset.attrs[name]
            for name in ("flarefield_version", "call", "made_from")
            if name in dataset.attrs
        },
        "model": {
            "name": "the bundled model" if spec.model is None else place(spec.model).name,
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

MakeStore = Callable[[Place, Callable[[Mapping[str, str]], object]], None]


def _begun(
    output: Place, fingerprint: Mapping[str, Any], *, overwrite: bool, swapped: bool = False
) -> tuple[Place, Journal] | None:
    """Find the store to go on with, the output itself or what is to replace it; None if it is to be made.

    Nothing is written: of a plan, what is there may still be on its way to the output. What has just come to
    its place is what a command that was to start over had finished.
    """
    standing, journal, unfinished = as_swapped(output)
    replaced = [(standing, journal)] if swapped or journal != output.journal else []
    exists = standing.exists() and not _half_laid_out(standing, journal)
    if exists and not is_map(standing.location):
        raise MisuseError(
            "the output exists and is not a map",
            where=output,
            found="a map's journal beside it, but no `zarr.json` that can be read"
            if log_at(journal).exists()
            else None,
            expected="nothing, or a map store made by `flarefield invert`",
            remedy="choose another output, or remove it yourself",
        )
    if overwrite:
        for store, location in (*replaced, *((store, store.journal) for store in unfinished)):
            try:
                return store, _resume(store, location, fingerprint)
            except FlareFieldError as error:
                logger.debug("%s is of no use: %s", store, error)
        return None
    if unfinished:
        logger.warning(
            "%s holds an unfinished replacement of the map; --overwrite goes on with it", unfinished[0]
        )
    return (standing, _resume(standing, journal, fingerprint)) if exists else None


def _half_laid_out(store: Place, journal: Path | str) -> bool:
    """Whether a run was killed before its map had appeared: one that has lost its root has tiles, too."""
    if not store.half_appeared() or not log_at(journal).exists():
        return False
    return next(read_journal(journal)[1], None) is None


def _begin(
    output: Place,
    run: str,
    fingerprint: Mapping[str, Any],
    make_store: MakeStore,
    *,
    overwrite: bool,
) -> tuple[Place, Journal]:
    """Make the store to work on: the output itself, or what is to replace it."""
    if overwrite:
        for store in replacements(output):
            discard(store)
    if _half_laid_out(output, output.journal):
        output.remove()
    store = replacement(output, run) if output.exists() else output
    return store, _fresh(store, run, fingerprint, make_store)


def _fresh(store: Place, run: str, fingerprint: Mapping[str, Any], make_store: MakeStore) -> Journal:
    # The journal first: a store without one could not be told from one whose journal was lost.
    make_store(store, partial(Journal.create, store.journal, run, fingerprint))
    return Journal.open(store.journal)


def _resume(store: Place, location: Path | str, fingerprint: Mapping[str, Any]) -> Journal:
    if not is_map(store.location) or not log_at(location).exists():
        raise StoreError(
            "the map's journal is missing, so it is unknown what is done of it",
            where=location,
            remedy="put the journal back beside the map, or start over with --overwrite",
        )
    journal = Journal.open(location)
    if journal.run != zarr.open_group(store.zarr, mode="r").attrs.get("run"):
        raise StoreError(
            "map and journal are of different runs",
            where=location,
            remedy="put the right journal back beside the map, or start over with --overwrite",
        )
    see_that_it_is_as_begun(store, journal.begun_with, journal.records(), journal.fingerprint)
    differing = changes(journal.fingerprint, fingerprint)
    if "method" in differing:
        previews = "a preview", "sampled from the posterior"
        before, now = previews if "method" in journal.fingerprint else reversed(previews)
        raise MisuseError(
            "a preview and a sampled map cannot go on with each other",
            where=store,
            found=f"a map that is {before}",
            expected=f"one that is {now}",
            remedy="choose another output, or start over with --overwrite",
        )
    if differing:
        raise MisuseError(
            "the map was begun with other settings",
            where=store,
            found=_as_asked({name: wanted for name, (_, wanted) in differing.items()}),
            expected=_as_asked({name: recorded for name, (recorded, _) in differing.items()}),
            remedy="repeat the settings it was begun with, choose another output, or start over with "
            "--overwrite",
        )
    return journal


def _as_asked(settings: Mapping[str, Any]) -> str:
    """Settings as one line says them, also those that a fingerprint leaves out."""
    said = {name: UNSAID.get(name) if value is None else value for name, value in settings.items()}
    compiled = [f"with{'' if said.pop('compiled') else 'out'} --compile"] if "compiled" in said else []
    return "; ".join([as_listed(said)] * bool(said) + compiled)


# The run


@dataclass
class _Work:
    """What is done of a map, and what is not."""

    spec: TileSpec
    grid: TileGrid
    asked: NDArray[np.int64]
    selected: NDArray[np.uint32] | None
    journal: Journal
    failed: list[FailedTile] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    flags: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    answered: int = 0
    stored: int = 0
    pixels: int = 0

    def __post_init__(self) -> None:
        self.done = np.zeros(len(self.grid), dtype=bool)
        self.before = self.done.copy()
        self.sizes = np.zeros(len(self.grid), dtype=np.int64)

    @property
    def tiles(self) -> int:
        """Tiles with selected pixels."""
        return int(np.count_nonzero(self.asked))

    def _count(self, tile: Tile, answered: int, flags: Mapping[str, int], stored: int) -> None:
        index = self.grid.index(tile)
        self.done[index] = True
        self.sizes[index] = stored
        self.pixels += int(self.asked[index])
        self.answered += answered
        self.flags.update(flags)
        self.stored += stored

    def take_up(self) -> None:
        """Read from the journal what earlier runs did, and see that it is still there."""
        store = place(self.spec.store)
        size = store.listing()
        last = np.full(len(self.grid), -1)
        for number, record in enumerate(self.journal.records()):
            if (index := record.get("tile", len(last))) < len(last):
                last[index] = number if is_receipt(record) else -1
        for number, record in enumerate(self.journal.records()):
            if (index := record.get("tile", len(last))) >= len(last) or last[index] != number:
                continue
            tile = self.grid[index]
            if _size(tile, size) == record["stored"]:
                self._count(tile, record["answered"], record["flags"], record["stored"])
            else:
                self.lost.append(index)
        self.before = self.done.copy()
        self.resumed = int(self.done.sum())
        if self.lost:
            logger.warning(
                "%d finished tiles are missing or damaged in the map, and are done again", len(self.lost)
            )

    def go_on(self, client: Client, window: int | None) -> None:
        """Do all tiles that are not done."""
        spec = replace(self.spec, threads=threads_per_task(client))
        place(spec.store).remove_leftovers()
        for index in self.lost:  # half done again, one may be as large as it was
            self.journal.append({"tile": index, "spoiled": "its files were not those that it had"})
        self.journal.flush()
        mark_unwritten(spec.store, Flag.NOT_DONE)  # it may have been finished, but for failed tiles
        missing = (self.grid[int(index)] for index in np.flatnonzero(~self.done & (self.asked > 0)))
        with (
            Progress("inverting", int(self.asked.sum()), "pixels", self.pixels) as progress,
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
                progress.advance(int(self.asked[self.grid.index(outcome.task)]))
        self._see_that_the_observation_is_the_same()
        self._see_that_all_is_there()

    def _see_that_the_observation_is_the_same(self) -> None:
        """Take back what was done meanwhile if data have gone: what is not there reads as not a number."""
        try:
            found = observation_hash(self.spec.observation)
        except FileNotFoundError:
            found = "nothing"
        if found != self.spec.observation_hash:
            for index in np.flatnonzero(self.done & ~self.before):
                self.journal.append({"tile": int(index), "withdrawn": "the observation changed meanwhile"})
            raise _changed(
                "the observation",
                self.spec.observation,
                short(found),
                short(self.spec.observation_hash),
                "it does once more what was done meanwhile",
            )

    def _see_that_it_is_what_was_asked(self, result: TileResult) -> None:
        """Refuse a tile for which the earlier map had other flags than in the beginning."""
        skip = self.spec.selection.skip
        if self.selected is None or skip is None:
            return
        if result.selected != self.selected[self.grid.index(result.tile)]:
            raise _changed(
                "the earlier map, whose flags say what to skip,",
                skip.earlier,
                f"other flags at {result.tile}",
                "those of the beginning",
                "it does what is missing",
            )

    def _see_that_all_is_there(self) -> None:
        """Refuse to call a map finished that has lost tiles while it was made."""
        size = place(self.spec.store).listing()
        done = (int(index) for index in np.flatnonzero(self.done))
        lost = sum(_size(self.grid[index], size) != self.sizes[index] for index in done)
        if lost:
            raise StoreError(
                f"{lost} finished tiles have gone from the map or changed while it was being made",
                where=self.spec.store,
                remedy="run the same command again: it does them once more",
            )

    def _finish(self, result: TileResult) -> None:
        self._see_that_it_is_what_was_asked(result)
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
        self._see_that_it_is_what_was_asked(result)
        self.failed.append(FailedTile(tile, text, attempts))
        self.flags.update(result.flags)
        self.stored += result.stored
        self.journal.append(
            {
                "tile": self.grid.index(tile),
                "quarantine": result.sha256,
                "error": text,
                "attempts": attempts,
            }
        )


def _changed(what: str, where: str, found: str, expected: str, then: str) -> StoreError:
    return StoreError(
        f"{what} has changed while the map was being made",
        where=where,
        found=found,
        expected=expected,
        remedy=f"put it back as it was and run the same command again: {then}; or start over with "
        "--overwrite",
    )


def _size(tile: Tile, size: Callable[[str], int | None]) -> int | None:
    """Bytes of a tile's files; None if one is missing."""
    found = [size(key) for key in tile_keys(tile).values()]
    return None if None in found else sum(one for one in found if one is not None)


def _concerns_run(error: BaseException | None) -> bool:
    """Whether an error means that no tile can be done: anything but what one tile's data can cause."""
    return isinstance(error, FlareFieldError) and not isinstance(error, InputError)
