"""Maps: the schema of the map store, its quality flags, and how a map is opened.

A map store is a Zarr v3 group that `xarray.open_zarr` reads:

======================  ==============================  ==================================================
variable                dimensions                      meaning
======================  ==============================  ==================================================
``electron_density``    time, y, x, quantile, height    posterior quantiles, cm-3
``temperature``         time, y, x, quantile, height    posterior quantiles, K
``velocity``            time, y, x, quantile, height    posterior quantiles, km/s, vertical, upflow positive
``quality``             time, y, x                      flags, see `Flag`
``novelty``             time, y, x                      how usual the profiles are for the network, 0 to 1
``misfit``              time, y, x                      how well the posterior reproduces the profiles
======================  ==============================  ==================================================
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import warnings
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntFlag
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import ArrayLike, NDArray
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, TransposeCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

import pipeline.geometry  # noqa: F401  (gives datasets the accessor `flarefield`)
from pipeline.errors import FlareFieldError, MisuseError, StoreError
from pipeline.journal import Fingerprint, as_listed, changes
from pipeline.storage import ROOT, Place, kind_of, place

KIND = "map"
SCHEMA = 1

QUALITY = f"quality/{ROOT}"
"""The file that describes a map's ``quality``."""

SAMPLING, PREVIEW = "posterior sampling", "preview"
"""What a map's attribute ``method`` says: how its quantiles were found."""


class Flag(IntFlag):
    """Bits of a map's ``quality``: what is to be known about a pixel before its answer is used.

    Pixels with a flag of `WITHOUT_ANSWER` hold NaN; those with another flag hold an answer to be doubted.
    """

    OUTSIDE_FIELD = 1
    """Not in both lines' field of view."""
    NOT_FINITE = 2
    """An intensity, or a wavelength's correction, is not a number; or mu is not, off the disc."""
    NOT_POSITIVE = 4
    """An intensity is zero or negative."""
    SATURATED = 8
    """An intensity is at the detector's, or the file format's, largest value."""
    WAVELENGTH_NOT_COVERED = 16
    """The observed wavelengths do not reach the ends of the network's windows."""
    NOVEL = 32
    """The profiles are unlike those the network was trained on; the answer is an extrapolation."""
    FAILED = 64
    """The computation failed; the journal beside the map says how."""
    REGISTRATION_UNCERTAIN = 128
    """No reliable shift was found for this time, of the lines or along an aligned series; none applied."""
    NOT_DONE = 256
    """The run has not come to this pixel yet."""
    NOT_SELECTED = 512
    """The run was not asked for this pixel (`pipeline.selection`); nothing else is said of it."""
    SPIKE = 1024
    """A cosmic ray or a glitch at some wavelength (`pipeline.defects`); it was not repaired."""
    DEAD_PIXEL = 2048
    """A bad pixel of the detector."""
    WAVELENGTH_MISSING = 4096
    """The scan has no image at some wavelength."""
    POOR_SEEING = 8192
    """The scan's contrast is below what was asked for when the observation was made."""
    CHANGED_BETWEEN_LINES = 16384
    """The profiles changed between the two lines' times, by more than their calibration may be off."""
    HEADER_CONTRADICTION = 32768
    """The header of one of the scans contradicts itself or its wavelengths."""


WITHOUT_ANSWER = (
    Flag.OUTSIDE_FIELD
    | Flag.NOT_FINITE
    | Flag.NOT_POSITIVE
    | Flag.SATURATED
    | Flag.WAVELENGTH_NOT_COVERED
    | Flag.FAILED
    | Flag.NOT_DONE
    | Flag.NOT_SELECTED
    | Flag.DEAD_PIXEL
    | Flag.WAVELENGTH_MISSING
)


NOVELTY_LEVEL = 0.01
"""Tail probability below which a pixel is flagged as novel."""


@dataclass(frozen=True)
class Variable:
    """One variable of the map store.

    Attributes
    ----------
    name : str
        Its name.
    dtype : str
        Its NumPy type.
    fill : float
        Its value where nothing has been written.
    profile : bool
        Whether it has the dimensions quantile and height beside time, y and x.
    attrs : mapping
        Its attributes.
    """

    name: str
    dtype: str
    fill: float
    profile: bool
    attrs: Mapping[str, Any]


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "electron_density",
        "float32",
        np.nan,
        True,
        {
            "units": "cm-3",
            "long_name": "electron density",
        },
    ),
    Variable(
        "temperature",
        "float32",
        np.nan,
        True,
        {"units": "K", "long_name": "temperature"},
    ),
    Variable(
        "velocity",
        "float32",
        np.nan,
        True,
        {
            "units": "km/s",
            "long_name": "vertical velocity, upflow positive",
        },
    ),
    Variable(
        "novelty",
        "float32",
        np.nan,
        False,
        {
            "units": "1",
            "long_name": "share of held-out profiles that lie at least as far out as this pixel's",
        },
    ),
    Variable(
        "misfit",
        "float32",
        np.nan,
        False,
        {
            "units": "1",
            "long_name": "root mean square of observed minus emulated profiles, median over posterior draws",
            "comment": "profiles in units of the joint maximum of both lines",
        },
    ),
    Variable(
        "quality",
        "uint16",
        int(Flag.NOT_DONE),
        False,
        {
            "long_name": "quality flags",
            "flag_masks": [int(flag) for flag in Flag],
            "flag_meanings": " ".join(str(flag.name).lower() for flag in Flag),
        },
    ),
)
"""The map store's variables. A receipt's checksum is over their bytes in this order. They are written in this
order, too: what `quality` does not call undone is all there."""


@contextmanager
def _unspecified_metadata() -> Iterator[None]:
    # Consolidated metadata is not yet in Zarr's specification: xarray reads it, others may ignore it.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        yield


def lay_out(
    path: str | Path,
    coordinates: xr.Dataset,
    *,
    heights: ArrayLike,
    quantiles: Sequence[float],
    tile: tuple[int, int],
    attrs: Mapping[str, Any],
    comments: Mapping[str, str] | None = None,
    announce: Callable[[Mapping[str, str]], object] | None = None,
) -> None:
    """Make a whole map store, with nothing in it yet, so that tasks only ever fill in what exists.

    One tile of one time is one shard of every variable: two tasks never write to the same file. Inside a
    shard each quantile is a chunk of its own, so that a map of the median reads no more than the median.

    Parameters
    ----------
    path : str or Path
        Where, or its URL; it appears whole or not at all.
    coordinates : xarray.Dataset
        The observation's coordinates over time, y and x, with `time`, `y` and `x` among them.
    heights : array_like, shape (height,)
        Heights of the network's grid, Mm.
    quantiles : sequence of float
        Levels between 0 and 1, increasing.
    tile : tuple of int
        Pixels of a tile along y and x.
    attrs : mapping
        Attributes of the store.
    comments : mapping of str to str, optional
        What is to be said of single variables, by name.
    announce : callable, optional
        Is told what `begun_with` says of the store, before the store appears: nothing can come between, and
        be taken for what the map was begun with.

    Raises
    ------
    StoreError
        The fields of the store do not agree.
    """
    template = coordinates.assign_coords(
        quantile=xr.Variable("quantile", np.asarray(quantiles, dtype=np.float64)),
        height=xr.Variable("height", np.asarray(heights, dtype=np.float64)),
    )
    template["quantile"].attrs = {"units": "1", "long_name": "quantile of the posterior"}
    template["height"].attrs = {
        "units": "Mm",
        "long_name": "height",
        "positive": "up",
        "comment": attrs.get("height_zero", ""),
    }
    template.attrs = {"Conventions": "CF-1.11", "kind": KIND, "schema": SCHEMA, **attrs}
    for name in template.variables:
        # Chunks and codecs of the observation's store mean nothing here.
        template[name].encoding = {
            key: value
            for key, value in template[name].encoding.items()
            if key in ("units", "calendar", "dtype")
        }
    with place(path).appearing() as store:
        template.to_zarr(store, mode="w", zarr_format=3, consolidated=False)
        group = zarr.open_group(store, mode="r+")
        _lay_out_variables(group, template.sizes, len(quantiles), tile, comments or {})
        with _unspecified_metadata():
            zarr.consolidate_metadata(store)
        if announce is not None:
            announce(begun_with(store))


def compressor(numbers: int) -> BloscCodec:
    """Compressor of chunks of so many numbers.

    Blosc shuffles bits, which is quickest and smallest, only where there are whole bytes of them.
    """
    return BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle" if numbers % 8 == 0 else "shuffle")


def _lay_out_variables(
    group: zarr.Group,
    sizes: Mapping[Hashable, int],
    quantiles: int,
    tile: tuple[int, int],
    comments: Mapping[str, str],
) -> None:
    shards = (1, tile[0], tile[1])
    for variable in VARIABLES:
        dimensions = ("time", "y", "x", "quantile", "height") if variable.profile else ("time", "y", "x")
        levels = (quantiles, sizes["height"]) if variable.profile else ()
        name = variable.name
        chunks = (*shards, 1, sizes["height"]) if variable.profile else shards
        group.create_array(
            name,
            shape=tuple(sizes[dimension] for dimension in dimensions),
            dtype=variable.dtype,
            chunks=chunks,
            shards=(*shards, *levels) if variable.profile else None,
            # Height by height, neighbouring pixels side by side: a sixth smaller, written in half the time.
            filters=[TransposeCodec(order=(0, 3, 4, 1, 2))] if variable.profile else [],
            compressors=compressor(math.prod(chunks)),
            fill_value=variable.fill,
            dimension_names=dimensions,
            attributes={**variable.attrs, **({"comment": comments[name]} if name in comments else {})},
        )


def mark_unwritten(path: str | Path, flag: Flag) -> None:
    """Say what all pixels are whose tiles have no files: not done yet, or not asked for.

    One flag for all of them, in the store's metadata, costs the same for one tile and for a million.

    Parameters
    ----------
    path : str or Path
        A map store, or its URL.
    flag : Flag
        What their ``quality`` reads as.
    """
    store = place(path)
    if unwritten(store) == {flag}:
        return
    group = zarr.open_group(store.zarr, mode="r+", use_consolidated=False)
    (content,) = store.read([QUALITY])
    description = {**json.loads(content), "fill_value": int(flag)}
    text = json.dumps(description, indent=2).encode()
    sync(group.store.set(QUALITY, default_buffer_prototype().buffer.from_bytes(text)))
    with _unspecified_metadata():
        zarr.consolidate_metadata(group.store)


def unwritten(store: Place) -> set[int]:
    """What the ``quality`` of pixels reads as whose tiles have no files, in the two places that say so.

    Parameters
    ----------
    store : Place
        A map store.

    Returns
    -------
    set of int
        One flag; two if a command was killed between the two places.
    """
    root, quality = (json.loads(content) for content in store.read([ROOT, QUALITY]))
    return {
        int(description["fill_value"])
        for description in (quality, root["consolidated_metadata"]["metadata"]["quality"])
    }


def begun_with(store: Store) -> dict[str, str]:
    """SHA-256 of the files of each of a map's coordinates, by name, and of its metadata (`ROOT`).

    Parameters
    ----------
    store : Store
        The map, as Zarr takes it.
    """
    ours = {ROOT, *(variable.name for variable in VARIABLES)}
    names = sorted(set(sync(_all(store.list_dir("")))) - ours)
    return {name: _files_hash(store, name) for name in (ROOT, *names)}


async def _all(keys: AsyncIterator[str]) -> list[str]:
    return sorted([key async for key in keys])


async def _contents(store: Store, keys: Sequence[str]) -> list[bytes | None]:
    found = await asyncio.gather(*(store.get(key, default_buffer_prototype()) for key in keys))
    return [None if content is None else content.to_bytes() for content in found]


def _metadata_hash(store: Store) -> str:
    """Of what describes the store and its variables, but for how pixels read that were not written."""
    keys = [ROOT, *(f"{variable.name}/{ROOT}" for variable in VARIABLES)]
    try:
        contents = sync(_contents(store, keys))
        found = {key: json.loads(content or b"") for key, content in zip(keys, contents, strict=True)}
        found[QUALITY].pop("fill_value")
        found[ROOT]["consolidated_metadata"]["metadata"]["quality"].pop("fill_value")
    except (ValueError, KeyError, TypeError, AttributeError) as damage:
        return f"{type(damage).__name__}: {damage}"
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _files_hash(store: Store, name: str) -> str:
    if name == ROOT:
        return _metadata_hash(store)
    keys = sync(_all(store.list_prefix(f"{name}/")))
    digest = hashlib.sha256()
    for key, content in zip(keys, sync(_contents(store, keys)), strict=True):
        content = content or b""
        digest.update(f"{key}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def see_that_it_is_as_begun(
    store: Place,
    recorded: Mapping[str, str] | None,
    records: Iterable[Mapping[str, Any]],
    fingerprint: Fingerprint,
) -> None:
    """Compare a map's coordinates and metadata with what they were when it was laid out.

    A part of them that has gone would be read as numbers that nobody has written. The settings are in both,
    the map's attributes and its journal.

    Parameters
    ----------
    store : Place
        The map store.
    recorded : mapping of str to str, optional
        What `begun_with` said of it, by the first line of its journal.
    records : iterable of mapping
        Its journal's records: of the first maps, the first of them holds that in its place.
    fingerprint : mapping
        The settings, by the first line of its journal.

    Raises
    ------
    StoreError
        Some are not what they were, the journal does not say, or its settings are not the map's.
    """
    if recorded is None:
        recorded = next(iter(records), {}).get("coordinates")
    if recorded is None:
        raise StoreError(
            "the journal does not say what the map was begun with",
            where=store.journal,
            expected="hashes of the map's coordinates and metadata in its first lines",
            remedy="put the whole journal back, or start over with --overwrite",
        )
    changed = [name for name, known in recorded.items() if _files_hash(store.zarr, name) != known]
    if changed:
        raise StoreError(
            "the map's coordinates or metadata are damaged",
            where=store,
            found=f"other contents of {', '.join(changed)} than the map was begun with",
            remedy="start over with --overwrite",
        )
    settings = zarr.open_group(store.zarr, mode="r").attrs.get("settings")
    if isinstance(settings, Mapping) and (differing := changes(fingerprint, settings)):
        raise StoreError(
            "the journal's settings are not those that the map was begun with",
            where=store.journal,
            found=as_listed({name: pair[0] for name, pair in differing.items()}),
            expected=as_listed({name: pair[1] for name, pair in differing.items()}),
            remedy="put the right journal back beside the map, or start over with --overwrite",
        )


def is_map(path: str | Path) -> bool:
    """Whether there is a map store (of any run, finished or not) at a path or a URL."""
    store = place(path)
    return store.exists() and kind_of(store)[0] == KIND


def open_map(path: str | Path, *, chunks: Any = None) -> xr.Dataset:  # noqa: ANN401
    """Open a map.

    Parameters
    ----------
    path : str or Path
        The map store, or its URL.
    chunks : optional
        As for `xarray.open_zarr`: None reads values when they are asked for, ``{}`` makes Dask arrays.

    Returns
    -------
    xarray.Dataset
        See the module's table. ``ds.sel(height=1.2, method="nearest")`` and ``ds.sel(quantile=0.5)`` work.

    Raises
    ------
    StoreError
        There is no map at this path.
    """
    store = place(path)
    if not store.exists():
        raise StoreError("there is no such map", where=path, remedy="make one with `flarefield invert`")
    if not is_map(path):
        raise StoreError(
            "not a FlareField map",
            where=path,
            found=kind_of(store)[1],
            expected="a Zarr store made by `flarefield invert`",
            remedy="check the name",
        )
    try:
        dataset: xr.Dataset = xr.open_zarr(store.zarr, chunks=chunks)
    except FlareFieldError:
        raise
    except Exception as failure:  # which one a damaged file raises is up to its codec
        raise StoreError(
            "the map is damaged",
            where=store,
            found=f"{type(failure).__name__}: {failure}",
            expected="what `flarefield invert` wrote",
            remedy="put its files back, or make it again with `flarefield invert --overwrite`",
        ) from failure
    return dataset


def is_preview(dataset: xr.Dataset) -> bool:
    """Whether a map's quantiles are a preview's (`inn.preview`), and not a sampled posterior's."""
    return dataset.attrs.get("method") == PREVIEW


def flagged(dataset: xr.Dataset, *names: str) -> xr.DataArray:
    """Where a map's pixels have any of some flags.

    Parameters
    ----------
    dataset : xarray.Dataset
        A map.
    *names : str
        Names as in ``quality``'s ``flag_meanings``, for example ``"novel"``.

    Returns
    -------
    xarray.DataArray
        Booleans over time, y, x.

    Raises
    ------
    MisuseError
        A name is not a flag of this map.
    """
    quality = dataset["quality"]
    wanted = flag_bits(quality.attrs, names)
    return ((quality & wanted) != 0).rename("flagged").assign_attrs(long_name=" or ".join(names))


def flag_bits(attrs: Mapping[str, Any], names: Iterable[str]) -> int:
    """Bits of some flags, by the attributes of a map's ``quality``.

    Parameters
    ----------
    attrs : mapping
        With ``flag_meanings`` and ``flag_masks``, as the CF conventions have them.
    names : iterable of str
        Names as in ``flag_meanings``.

    Raises
    ------
    MisuseError
        A name is not a flag of this map.
    """
    masks = dict(zip(attrs["flag_meanings"].split(), attrs["flag_masks"], strict=True))
    names = list(names)
    unknown = [name for name in names if name not in masks]
    if unknown:
        raise MisuseError(
            "no such quality flag",
            found=", ".join(unknown),
            expected=", ".join(masks),
            remedy="choose from these names: the map's, as it was made",
        )
    return reduce(or_, (int(masks[name]) for name in names), 0)


def count_flags(quality: NDArray[np.uint16]) -> dict[str, int]:
    """Number of pixels with each flag, for the flags that occur.

    Parameters
    ----------
    quality : ndarray of uint16
        Flags, any shape.
    """
    counts = {str(flag.name).lower(): int(np.count_nonzero(quality & flag)) for flag in Flag}
    return {name: count for name, count in counts.items() if count}
