"""Observations: the schema of the observation store, how one is laid out, and how one is opened.

An observation store is a Zarr v3 group that `xarray.open_zarr` reads:

=================================================  ===========  ==============================================
variable                                           dimensions   meaning
=================================================  ===========  ==============================================
``halpha``, ``ca8542``                             time, y, x,  intensity; NaN outside of the line's field
                                                   wavelength_
``valid``                                          time, y, x   both lines' fields cover the pixel
``defects``                                        time, y, x   flags, see `pipeline.defects.Defect`
``change_between_lines``                           time, y, x   how much the profiles changed between the
                                                                lines' times, see `pipeline.changes`
``shift_y``, ``shift_x``                           time         pixels by which Ca II was found displaced
``placement_y``, ``placement_x``                   time         where Ca II's first pixel lies in H-alpha's
                                                                frame by the headers, before the shift; not
                                                                there if it is the first one throughout
``shift_confidence``                               time         0 to 1, see `pipeline.registration.Shift`
``shift_applied``                                  time         whether Ca II was moved by that shift
``series_shift_y``, ``series_shift_x``             time         pixels by which both lines were moved onto
                                                                the series' reference (`pipeline.alignment`);
                                                                this and what follows only in aligned series
``series_turn``, ``series_turn_error``             time         degrees by which they were found turned
                                                                against it, and the error; turned back, before
                                                                they are moved, if the attribute
                                                                ``series_alignment`` says ``turned``
``series_confidence``, ``series_residual``         time         how well that is known; pixels left over
``series_error``                                   time         standard error, pixels, from the reference on
``series_aligned``                                 time         whether it is known at all
``contrast_halpha``, ``contrast_ca8542``           time         contrast of the granulation in the wings
``poor_seeing``                                    time         a contrast is below what was asked for
``header_contradiction``                           time         a header contradicts itself or its wavelengths
``time``, ``time_halpha``                          time         mean time of the H-alpha scan, UTC
``time_ca8542``                                    time         mean time of the Ca II scan, UTC; H-alpha's
                                                                where Ca II is interpolated to it; NaT if
                                                                it is not known
``ca8542_interpolated``                            time         whether it is (`pipeline.common_time`)
``y``, ``x``                                       y; x         offset from the reference pixel, arcsec
``longitude``, ``latitude``                        y, x         helioprojective, at the first time, arcsec
``pointing_longitude``, ``pointing_latitude``      time         the same of the frame's middle, at each time
``mu``                                             time         cosine of the heliocentric angle
``wavelength_halpha``, ``wavelength_ca8542``       themselves   vacuum wavelengths, Angstrom
``wavelength_shift_halpha``,                       time, y, x   Angstrom to be added to the line's wavelengths
``wavelength_shift_ca8542``                        (or y, x)    at each pixel; not there if all have the same
=================================================  ===========  ==============================================

H-alpha's frame and time are the reference: Ca II is brought onto it. In an aligned series every time has the
pixels of the first time that is aligned, and the pointing, by its own header, of the frame moved there. What
every file says of itself is in the ``headers`` attribute of the line's variable, once for each file, and
``header_of_time`` says which of them a time came from; the function `fits_headers` reads both. Intensities
that were calibrated (`pipeline.calibration`) have a ``scale_factor``, by which xarray multiplies as it reads.

The group ``written``, which has no arrays, lists in its attribute ``absent`` the chunks that were never
written because they hold nothing: any other one that is not there has been lost. What xarray saves of an
observation has no such group; of its chunks less can be told (`see_that_it_is_whole`).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import astropy.units as u
import numpy as np
import xarray as xr
import zarr
from astropy.io import fits
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

import pipeline.geometry  # noqa: F401  (gives datasets the accessor `flarefield`)
from pipeline.changes import CHANGED, LONGEST, LONGEST_SECONDS, NAME, SIGNIFICANT
from pipeline.crisp import LINES, read_headers
from pipeline.crisp.scan import LONG_NAMES, Scan, cosine_of_pointing
from pipeline.defects import Defect
from pipeline.errors import FlareFieldError, MisuseError, StoreError
from pipeline.pairing import Pair
from pipeline.registration import STAYS, Shift
from pipeline.storage import AsListed, Place, array_in, kind_of, place

KIND = "observation"
SCHEMA = 1
FORMAT = 3
"""Zarr's."""

SHARD = 512
"""Pixels of a shard along y and x; one shard holds one time and the whole of a line."""
CHUNK = 64
"""Pixels of a chunk along y and x."""

HEADER_END = "\nEND\n"

WRITTEN = "written"
"""The group that tells chunks that were lost from those that were never written."""

# Units and dimensions that every observation has; what is not listed is an addition.
CONTRACT: Mapping[str, tuple[tuple[str, ...], str | None]] = {
    "halpha": (("time", "y", "x", "wavelength_halpha"), None),
    "ca8542": (("time", "y", "x", "wavelength_ca8542"), None),
    "valid": (("time", "y", "x"), None),
    "time": (("time",), None),
    "time_halpha": (("time",), None),
    "time_ca8542": (("time",), None),
    "y": (("y",), "arcsec"),
    "x": (("x",), "arcsec"),
    "longitude": (("y", "x"), "arcsec"),
    "latitude": (("y", "x"), "arcsec"),
    "mu": (("time",), ""),
    "wavelength_halpha": (("wavelength_halpha",), "Angstrom"),
    "wavelength_ca8542": (("wavelength_ca8542",), "Angstrom"),
    "shift_y": (("time",), "pixel"),
    "shift_x": (("time",), "pixel"),
    "shift_confidence": (("time",), ""),
    "shift_applied": (("time",), None),
}


OPTIONAL: Mapping[str, tuple[tuple[tuple[str, ...], ...], str]] = {
    **{f"wavelength_shift_{line}": ((("time", "y", "x"), ("y", "x")), "Angstrom") for line in LONG_NAMES},
    NAME: ((("time", "y", "x"),), "1"),
}
"""Units and dimensions of what an observation may have, and what is then used."""

TIMES = ("time", "time_halpha", "time_ca8542")
KNOWN = ("time", "time_halpha", "y", "x", "longitude", "latitude", "wavelength_halpha", "wavelength_ca8542")
"""Coordinates that every pixel has. (`mu` is not a number where a frame's middle is off the disc, and the
time of Ca II may be unknown: it is not needed.)"""
EPOCH = np.datetime64(0, "ns")
"""What the time of a chunk reads as that is not there."""


def chunks_and_shards(shape: tuple[int, int], points: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunks and shards of an array over time, y, x and, with `points`, wavelength.

    Parameters
    ----------
    shape : tuple of int
        Pixels (y, x).
    points : int or None
        Wavelengths, all of them in one chunk; None for an array without.

    Returns
    -------
    chunks, shards : tuple of int
        A field smaller than a chunk is one chunk; a shard is a whole number of chunks.
    """
    chunk = tuple(min(CHUNK, size) for size in shape)
    shard = tuple(min(SHARD, -(-size // edge) * edge) for size, edge in zip(shape, chunk, strict=True))
    spectral = () if points is None else (points,)
    return (1, *chunk, *spectral), (1, *shard, *spectral)


def lay_out(
    path: str | Path,
    halpha: Sequence[Scan],
    ca8542: Sequence[Scan],
    attrs: Mapping[str, Any],
    *,
    aligned: bool = False,
) -> None:
    """Make a whole observation store with no intensities in it yet, so that tasks only fill in what exists.

    Parameters
    ----------
    path : str or Path
        Where, or its URL; there must be nothing, and it appears whole or not at all.
    halpha, ca8542 : sequence of Scan
        The scans of each time, in order: frames, axes and times come from them.
    attrs : mapping
        Attributes of the store, beside its kind.
    aligned : bool
        Whether the series is to be aligned along time.
    """
    template = coordinates(halpha, ca8542).assign(_of_times(len(halpha)))
    if aligned:
        template = template.assign(_of_alignment(len(halpha)))
    template.attrs = {"Conventions": "CF-1.11", "kind": KIND, "schema": SCHEMA, **attrs}
    with place(path).appearing() as store:
        template.to_zarr(store, mode="w", zarr_format=3, consolidated=False)
        _lay_out_variables(zarr.open_group(store, mode="r+"), halpha, ca8542)


def _lay_out_variables(group: zarr.Group, halpha: Sequence[Scan], ca8542: Sequence[Scan]) -> None:
    frame = (len(halpha), *halpha[0].shape)
    for scans in (halpha, ca8542):
        scan = scans[0]
        chunks, shards = chunks_and_shards(scan.shape, len(scan.wavelength))
        attributes: dict[str, Any] = {
            "units": scan.units,
            "long_name": f"{LONG_NAMES[scan.line]} intensity",
            "rest_wavelength": scan.window.rest_wavelength,
            "units_of_files": scan.units_of_file,
            "format": scan.format,
            **_headers(scans),
        }
        if np.isfinite(scan.saturation):
            attributes["saturation"] = scan.saturation
        group.create_array(
            scan.line,
            shape=(*frame, len(scan.wavelength)),
            dtype="float32",
            chunks=chunks,
            shards=shards,
            fill_value=np.nan,
            compressors=_compressor(),
            dimension_names=("time", "y", "x", f"wavelength_{scan.line}"),
            attributes=attributes,
        )
    chunks, shards = chunks_and_shards(halpha[0].shape, None)
    group.create_array(
        "valid",
        shape=frame,
        dtype="bool",
        chunks=shards,  # flags compress to nothing: cut up, they would cost more than the intensities
        fill_value=False,
        compressors=_compressor(),
        dimension_names=("time", "y", "x"),
        attributes={"long_name": "both lines' fields of view cover the pixel"},
    )
    group.create_array(
        "defects",
        shape=frame,
        dtype="uint8",
        chunks=shards,
        fill_value=0,
        compressors=_compressor(),
        dimension_names=("time", "y", "x"),
        attributes={
            "long_name": "what is wrong with the pixel in either line",
            "flag_masks": [int(defect) for defect in Defect],
            "flag_meanings": " ".join(str(defect.name).lower() for defect in Defect),
        },
    )
    group.create_array(
        NAME,
        shape=frame,
        dtype="float32",
        chunks=shards,
        fill_value=np.nan,
        compressors=_compressor(),
        dimension_names=("time", "y", "x"),
        attributes={
            "units": "1",
            "long_name": "change of the profiles between the two lines' times, over their joint maximum",
            "threshold": CHANGED,
            "comment": "NaN where it is not known; above the threshold: changed_between_lines",
            "method": "largest of three images (blue wing, core, red wing) of either line, each interpolated "
            "linearly in time to the other line's; of an interpolated line, the next term of Newton's "
            f"interpolation; {SIGNIFICANT:g} noise levels taken off in quadrature; not over more than "
            f"{LONGEST:g} times the cadence or {LONGEST_SECONDS:g} s",
        },
    )
    for scans in (halpha, ca8542):
        if any(scan.has_wavelength_shift or scan.drift for scan in scans):
            group.create_array(
                f"wavelength_shift_{scans[0].line}",
                shape=frame,
                dtype="float32",
                chunks=chunks,
                shards=shards,
                fill_value=np.nan,
                compressors=_compressor(),
                dimension_names=("time", "y", "x"),
                attributes={
                    "units": "Angstrom",
                    "long_name": f"what is added to the wavelengths, {LONG_NAMES[scans[0].line]}",
                    "comment": "CRISP's cavity errors, and by how much a scan's own axis lies above the "
                    "store's: a pixel's true wavelengths are the axis plus this",
                },
            )


def coordinates(halpha: Sequence[Scan], ca8542: Sequence[Scan]) -> xr.Dataset:
    """Coordinates of an observation made from these scans.

    Parameters
    ----------
    halpha, ca8542 : sequence of Scan
        The scans of each time, in order.

    Returns
    -------
    xarray.Dataset
        Without data variables.
    """
    first = halpha[0]
    rows, columns = first.shape
    y, x = np.mgrid[:rows, :columns].astype(np.float64)
    longitude, latitude = first.frame.coordinates(x, y)
    pointing = np.array([pointing_of(scan) for scan in halpha])
    offsets = [
        (np.arange(size) - reference) * step
        for size, reference, step in zip(
            (columns, rows), first.frame.reference_pixel, first.frame.scale, strict=True
        )
    ]
    along = "arcsec along the frame's {} axis, from the reference pixel of the H-alpha header"
    dataset = xr.Dataset(
        coords={
            "time": (
                "time",
                [scan.time for scan in halpha],
                {"long_name": "mean time of the H-alpha scan, UTC"},
            ),
            "time_halpha": (
                "time",
                [scan.time for scan in halpha],
                {"long_name": "mean time of the H-alpha scan, UTC"},
            ),
            "time_ca8542": (
                "time",
                [scan.time for scan in ca8542],
                {
                    "long_name": "time of the Ca II 8542 intensities, UTC",
                    "comment": "the scan's mean time, or H-alpha's where ca8542_interpolated",
                },
            ),
            "ca8542_interpolated": (
                "time",
                np.zeros(len(ca8542), dtype=bool),
                {"long_name": "whether Ca II 8542 is interpolated in time, to H-alpha's, between two scans"},
            ),
            "y": (
                "y",
                offsets[1],
                {"units": "arcsec", "long_name": "offset along y", "comment": along.format("y")},
            ),
            "x": (
                "x",
                offsets[0],
                {"units": "arcsec", "long_name": "offset along x", "comment": along.format("x")},
            ),
            "longitude": (
                ("y", "x"),
                longitude,
                {
                    "units": "arcsec",
                    "long_name": "helioprojective longitude",
                    "comment": "at the first time; at another add the difference in pointing_longitude",
                    "pointing": float(pointing[0, 0]),
                },
            ),
            "latitude": (
                ("y", "x"),
                latitude,
                {
                    "units": "arcsec",
                    "long_name": "helioprojective latitude",
                    "comment": "at the first time; at another add the difference in pointing_latitude",
                    "pointing": float(pointing[0, 1]),
                },
            ),
            "pointing_longitude": (
                "time",
                pointing[:, 0],
                {"units": "arcsec", "long_name": "helioprojective longitude of the frame's middle"},
            ),
            "pointing_latitude": (
                "time",
                pointing[:, 1],
                {"units": "arcsec", "long_name": "helioprojective latitude of the frame's middle"},
            ),
            "mu": (
                "time",
                pointing[:, 2],
                {
                    "units": "1",
                    "long_name": "cosine of the heliocentric angle",
                    "comment": "of the frame's middle, seen from the Earth, nominal solar radius of 695.7 Mm",
                },
            ),
            **{
                f"wavelength_{scan.line}": (
                    f"wavelength_{scan.line}",
                    np.array(scan.wavelength),
                    {
                        "units": "Angstrom",
                        "long_name": f"vacuum wavelength, {LONG_NAMES[scan.line]}",
                        "rest_wavelength": scan.window.rest_wavelength,
                        "medium_of_files": scan.medium,
                        "medium_stated_by": scan.medium_stated_by,
                    },
                )
                for scan in (halpha[0], ca8542[0])
            },
        }
    )
    pairs = [Pair(*scans) for scans in zip(halpha, ca8542, strict=True)]
    if any(pair.placed for pair in pairs):
        for axis, corners in zip("yx", zip(*(pair.placement for pair in pairs), strict=True), strict=True):
            dataset[f"placement_{axis}"] = (
                "time",
                np.array(corners, dtype=np.int32),
                {
                    "units": "pixel",
                    "long_name": f"where Ca II's first pixel lies along {axis}, by the headers",
                },
            )
    for name in ("time", "time_halpha", "time_ca8542"):  # see `microseconds`
        dataset[name].encoding = {"units": "microseconds since 1970-01-01", "dtype": "int64"}
    return dataset


def microseconds(time: np.datetime64) -> int:
    """A time as an observation holds it: microseconds since 1970-01-01."""
    return int(time.astype("datetime64[us]").astype(np.int64))


def pointing_of(scan: Scan, shift: Shift = STAYS) -> tuple[float, float, float]:
    """Where the middle of a scan's frame points, by its own header, once the scan has been moved.

    Parameters
    ----------
    scan : Scan
    shift : Shift, optional
        What it is moved by.

    Returns
    -------
    longitude, latitude : float
        Helioprojective, arcsec.
    mu : float
        Cosine of the heliocentric angle.
    """
    rows, columns = scan.shape
    middle = np.array([[(rows - 1) / 2.0, (columns - 1) / 2.0]])
    y, x = shift.of_frame(scan.shape).back(middle).T
    longitude, latitude = (float(angle[0]) for angle in scan.frame.coordinates(x, y))
    return longitude, latitude, float(cosine_of_pointing((longitude, latitude), scan.time))


def finish(
    path: str | Path,
    of_times: Mapping[str, Sequence[float] | Sequence[int] | Sequence[bool]],
    attrs: Mapping[str, Any],
) -> None:
    """Write what is known only at the end, and consolidate the metadata.

    Parameters
    ----------
    path : str or Path
        A store that `lay_out` made, or its URL.
    of_times : mapping
        Variables over time alone that `lay_out` made, such as ``shift_y``, one value for each time.
    attrs : mapping
        More attributes of the store.
    """
    group = zarr.open_group(place(path).zarr, mode="r+")
    for name, values in of_times.items():
        array = array_in(group, name).with_config({"write_empty_chunks": True})
        array[:] = np.asarray(values, dtype=array.dtype)
    group.attrs.update(attrs)
    absent = [key for key, _, _ in _missing(group, place(path).sizes())]
    group.create_group(WRITTEN, attributes={"absent": absent}, overwrite=True)
    with warnings.catch_warnings():
        # Not yet in Zarr's specification; xarray reads it, and every reader may ignore it.
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(group.store)


def is_observation(path: str | Path) -> bool:
    """Whether a path holds an observation store."""
    store = place(path)
    return store.exists() and kind_of(store)[0] == KIND


def see_that_it_is_one(path: str | Path) -> None:
    """Refuse what is no observation.

    Parameters
    ----------
    path : str or Path
        Perhaps an observation store, or its URL.

    Raises
    ------
    StoreError
        There is no observation at this path, or it is in Zarr's format 2.
    """
    store = place(path)
    if not store.exists():
        raise StoreError(
            "there is no such observation", where=path, remedy="make one with `flarefield ingest`"
        )
    if not is_observation(path):
        raise StoreError(
            "not a FlareField observation",
            where=path,
            found=kind_of(store)[1],
            expected="a Zarr store made by `flarefield ingest`",
            remedy="check the name",
        )
    if (version := zarr.open_group(store.zarr, mode="r").metadata.zarr_format) != FORMAT:
        raise StoreError(
            "the observation is in another of Zarr's formats",
            where=path,
            found=f"format {version}",
            expected=f"format {FORMAT}",
            remedy="convert it with xarray: xr.open_zarr('OLD.zarr').drop_encoding().to_zarr('NEW.zarr', "
            f"zarr_format={FORMAT}, write_empty_chunks=True)",
        )


def open_observation(
    path: str | Path,
    *,
    chunks: Any = None,  # noqa: ANN401
    listed: Collection[str] | None = None,
) -> xr.Dataset:
    """Open an observation, and check that it has what one has.

    Parameters
    ----------
    path : str or Path
        The observation store, or its URL.
    chunks : optional
        As for `xarray.open_zarr`: None reads what is asked for when asked, ``{}`` makes Dask arrays.
    listed : collection of str, optional
        Its files, once `see_that_it_is_one` has been asked. None of them may go from now on: what should read
        one that has gone raises a StoreError.

    Returns
    -------
    xarray.Dataset
        See the module's table.

    Raises
    ------
    StoreError
        There is no observation at this path, or it lacks what an observation has.
    """
    if listed is None:
        see_that_it_is_one(path)
    store = place(path)
    source = store.zarr if listed is None else AsListed(store.zarr, listed)
    try:
        dataset: xr.Dataset = xr.open_zarr(source, chunks=chunks)
    except FlareFieldError:
        raise
    except Exception as failure:  # which one a damaged file raises is up to its codec
        raise _damaged(path, _unreadable(store) or f"{type(failure).__name__}: {failure}") from failure
    validate(dataset, path)
    return dataset


def see_that_it_is_whole(dataset: xr.Dataset, path: str | Path, listed: Collection[str]) -> None:
    """Refuse an observation that has lost chunks: they would be read as if nothing had been observed.

    Of what `pipeline.ingest` made, any chunk but those that it says were never written must be there. Whoever
    saves a part of an observation with xarray writes no chunks that hold nothing; of such a store, chunks of
    intensities may be missing where no pixel is valid, chunks of `valid` if they are no shards, the first one
    of times if it holds but one, and all of what is not needed to place and time a pixel.

    Parameters
    ----------
    dataset : xarray.Dataset
        The observation, opened. Its coordinates, and what else it has no more of than those, are read.
    path : str or Path
        Its store, or its URL.
    listed : collection of str
        Its files.

    Raises
    ------
    StoreError
        Chunks are not there, coordinates cannot be read or are not known, or times are not in order.
    """
    group = zarr.open_group(AsListed(place(path).zarr, listed), mode="r")
    missing = list(_missing(group, listed))
    written = group.get(WRITTEN)
    again = "write it once more with `to_zarr(..., write_empty_chunks=True)`"
    if written is not None:
        absent: Any = written.attrs["absent"]
        absent = frozenset(absent)
        lost = [key for key, _, _ in missing if key not in absent]
    else:
        valid = array_in(group, "valid")
        lost = [key for key, name, _ in missing if name == "valid" and valid.shards]
        # A time counted from the first one reads as that one if it is not there; none but the first is.
        lost += [key for key, name, region in missing if name in TIMES[1:] and region[0].stop > 1]
        dark = [key for key, name, region in missing if name in LINES and np.any(valid[region[:3]])]
        if dark and not lost:
            again += ", or with `valid` false there"
        lost += dark
    if lost:
        raise StoreError(
            "parts of the observation are not there",
            where=path,
            found=f"no {lost[0]}" + (f", and {len(lost) - 1} more" if len(lost) > 1 else ""),
            remedy="put them back, or make it again with `flarefield ingest --overwrite`; if xarray left them"
            f" out because they hold nothing, {again}",
        )
    unknown = []
    for name, variable in dataset.variables.items():
        if {"time", "y", "x"} <= set(variable.dims):
            continue
        try:
            variable.load()
        except FlareFieldError:
            raise
        except Exception as failure:  # which one a damaged file raises is up to its codec
            raise _damaged(path, f"{name} cannot be read: {type(failure).__name__}: {failure}") from failure
        if (name in KNOWN and variable.isnull().any()) or (name in TIMES and (variable == EPOCH).any()):
            unknown.append(str(name))
    if unknown:
        raise _damaged(path, f"nothing in {', '.join(unknown)}, at some places or at all")
    times = dataset["time"].values
    for number in 1 + np.flatnonzero(times[1:] <= times[:-1]):
        raise StoreError(
            "the observation's times are not in order",
            where=path,
            found=f"time {number} is {times[number]}, the one before it {times[number - 1]}",
            expected="each later than the one before it",
            remedy="put its files back (lost parts of `time` read so), or make it again with "
            "`flarefield ingest --overwrite`; times of your own are put in order by xarray's "
            "`sortby('time')` and `drop_duplicates('time')`",
        )


def _unreadable(store: Place) -> str | None:
    """Which of the axes, all of which are read as a store is opened, cannot be read, and why."""
    for name, array in zarr.open_group(store.zarr, mode="r").arrays():
        try:
            if array.ndim == 1:
                array[:]
        except Exception as failure:  # which one a damaged file raises is up to its codec
            return f"{name} cannot be read: {type(failure).__name__}: {failure}"
    return None


def _damaged(path: str | Path, found: str) -> StoreError:
    return StoreError(
        "the observation is damaged",
        where=path,
        found=found,
        expected="what `flarefield ingest` wrote",
        remedy="put its files back, or make it again with `flarefield ingest --overwrite`",
    )


def _missing(group: zarr.Group, there: Container[str]) -> Iterator[tuple[str, str, tuple[slice, ...]]]:
    """Chunks of a group's arrays that are not among the files that are there: file, array, place in it."""
    for name, array in group.arrays():
        sizes = array.shards or array.chunks
        parts = (-(-whole // size) for whole, size in zip(array.shape, sizes, strict=True))
        for index in np.ndindex(*parts):
            if (key := "/".join((name, "c", *map(str, index)))) not in there:
                starts = [number * size for number, size in zip(index, sizes, strict=True)]
                ends = (
                    min(start + size, whole)
                    for start, size, whole in zip(starts, sizes, array.shape, strict=True)
                )
                yield key, name, tuple(map(slice, starts, ends))


def validate(dataset: xr.Dataset, where: object = None) -> None:
    """Check that a dataset keeps the contract of observations.

    Parameters
    ----------
    dataset : xarray.Dataset
        What to check; its intensities are not read.
    where : object, optional
        What the error calls it.

    Raises
    ------
    StoreError
        A variable is missing, or has other dimensions or units; all of them are named.
    """
    faults = []
    for name, (dimensions, unit) in CONTRACT.items():
        if name not in dataset.variables:
            faults.append(f"no {name}")
            continue
        variable = dataset[name]
        if variable.dims != dimensions:
            faults.append(f"{name} is over {variable.dims}, not {dimensions}")
        if unit is not None and not _same_unit(variable.attrs.get("units"), unit):
            faults.append(f"{name} is in {variable.attrs.get('units')!r}, not {unit or '1'!r}")
    for name, (allowed, unit) in OPTIONAL.items():
        if name not in dataset.variables:
            continue
        variable = dataset[name]
        if variable.dims not in allowed:
            faults.append(f"{name} is over {variable.dims}, not {' or '.join(map(str, allowed))}")
        if not _same_unit(variable.attrs.get("units"), unit):
            faults.append(f"{name} is in {variable.attrs.get('units')!r}, not {unit!r}")
    if faults:
        raise StoreError(
            "the observation lacks what an observation has",
            where=where,
            found="; ".join(faults),
            expected="the variables, dimensions and units that `pipeline.observation` lists",
            remedy="make it again with `flarefield ingest --overwrite`",
        )


def fits_headers(dataset: xr.Dataset, line: str, time: int) -> list[fits.Header]:
    """FITS headers of the scan of one line and time, one for each HDU, as they were in the file.

    Parameters
    ----------
    dataset : xarray.Dataset
        An observation, not cut in time.
    line : str
        ``"halpha"`` or ``"ca8542"``.
    time : int
        Index of the time.

    Raises
    ------
    MisuseError
        There is no such line or time, or its scan is not of a FITS file.
    """
    of_time = dataset[line].attrs.get("header_of_time", []) if line in dataset else []
    if not 0 <= time < len(of_time):
        raise MisuseError(
            "no headers of this line and time",
            found=f"{line}, {time}",
            expected=f"halpha or ca8542, and a time of 0 to {dataset.sizes['time'] - 1}",
        )
    text = dataset[line].attrs["headers"][of_time[time]]
    # A description may follow; other formats have no FITS header at all.
    parts = [part for part in text.split(HEADER_END) if part.startswith(("SIMPLE ", "XTENSION"))]
    if not parts:
        raise MisuseError(
            "the scan's file has no FITS headers",
            found=f"format {dataset[line].attrs.get('format')}",
            remedy=f"see the attribute `headers` of {line}",
        )
    return [fits.Header.fromstring(part, sep="\n") for part in parts]


def _headers(scans: Sequence[Scan]) -> dict[str, Any]:
    """Attributes of a line's variable that hold its files' headers, each file's once."""
    place_of: dict[str, int] = {}
    texts: list[str] = []
    for scan in scans:
        if scan.path not in place_of:
            place_of[scan.path] = len(texts)
            texts.append(HEADER_END.join([*read_headers(scan), ""]))
    return {"headers": texts, "header_of_time": [place_of[scan.path] for scan in scans]}


def _same_unit(found: object, expected: str) -> bool:
    try:
        return bool(u.Unit(found) == u.Unit(expected))
    except (ValueError, TypeError):
        return False


def _compressor() -> BloscCodec:
    return BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle")


def _of_times(times: int) -> dict[str, tuple[str, NDArray[Any], dict[str, str]]]:
    move = "pixels along {} by which Ca II 8542 was found displaced from H-alpha"
    return {
        **{
            f"shift_{axis}": (
                "time",
                np.full(times, np.nan),
                {"units": "pixel", "long_name": move.format(axis)},
            )
            for axis in ("y", "x")
        },
        "shift_confidence": (
            "time",
            np.full(times, np.nan),
            {
                "units": "1",
                "long_name": "confidence of the shift",
                "comment": "share of the field's blocks that give the same shift on their own",
            },
        ),
        "shift_applied": (
            "time",
            np.zeros(times, dtype=bool),
            {"long_name": "whether Ca II 8542 was moved by the shift"},
        ),
        **{
            f"contrast_{line}": (
                "time",
                np.full(times, np.nan),
                {
                    "units": "1",
                    "long_name": f"contrast of the granulation in the wings, {name}",
                    "comment": "robust standard deviation of the mean of both wings over its local mean",
                },
            )
            for line, name in LONG_NAMES.items()
        },
        "poor_seeing": (
            "time",
            np.zeros(times, dtype=bool),
            {"long_name": "whether a contrast is below the attribute least_contrast"},
        ),
        "header_contradiction": (
            "time",
            np.zeros(times, dtype=bool),
            {"long_name": "whether a header contradicts itself or its wavelengths"},
        ),
    }


def _of_alignment(times: int) -> dict[str, tuple[str, NDArray[Any], dict[str, str]]]:
    along = "pixels along {} by which both lines were moved onto the series' reference"
    numbers = {
        **{f"series_shift_{axis}": ("pixel", along.format(axis)) for axis in ("y", "x")},
        "series_turn": ("degree", "counterclockwise turn about the frame's middle onto the reference"),
        "series_turn_error": ("degree", "standard error of the turn"),
        "series_confidence": ("1", "confidence of the best of the time's links along the series"),
        "series_residual": ("pixel", "root mean square of what the time's links leave over"),
        "series_error": ("pixel", "standard error of series_shift_y and _x against the reference, together"),
    }
    return {
        **{
            name: ("time", np.full(times, np.nan), {"units": unit, "long_name": text})
            for name, (unit, text) in numbers.items()
        },
        "series_aligned": (
            "time",
            np.zeros(times, dtype=bool),
            {"long_name": "whether the time was brought onto the series' reference"},
        ),
    }
