"""Which part of an observation a run inverts: a rectangle, some times, not what an earlier map has flagged.

A selection leaves the map's dimensions as they are: a map of a part is a map of the whole field in which the
other pixels are flagged ``not_selected``, so that maps can be compared pixel by pixel. Selected pixels have
the bits of the whole map, and tiles without any are never looked at.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

from pipeline.errors import FlareFieldError, MisuseError, StoreError
from pipeline.results import Flag, count_flags, flag_bits, open_map
from pipeline.storage import place

if TYPE_CHECKING:
    from pipeline.tiles import Tile, TileGrid

logger = logging.getLogger("flarefield")

UNKNOWN = np.uint16(Flag.NOT_DONE | Flag.NOT_SELECTED)
"""Flags in place of all others, of pixels that a map says nothing about."""

Range = tuple[int, int]
"""First index, and the one after the last."""


@dataclass(frozen=True)
class Skip:
    """Pixels that are left out because of their flags in an earlier map of the same observation.

    Attributes
    ----------
    earlier : str
        The earlier map's store, as the workers see it, or its URL.
    flags : tuple of str
        Names of flags, as in the earlier map's ``flag_meanings``; one of them is enough.
    bits : int
        The same as bits of its ``quality``.
    """

    earlier: str
    flags: tuple[str, ...]
    bits: int

    def quality(self, pixels: tuple[slice, slice, slice]) -> NDArray[np.uint16]:
        """The earlier map's flags of pixels of the observation.

        Parameters
        ----------
        pixels : tuple of slice
            Their place along time, y and x.

        Returns
        -------
        ndarray of uint16

        Raises
        ------
        StoreError
            The earlier map cannot be read.
        """
        try:
            return np.asarray(zarr.open_array(place(self.earlier).zarr, path="quality", mode="r")[pixels])
        except FlareFieldError:
            raise
        except Exception as error:  # which one a damaged file raises is up to its codec
            raise StoreError(
                "the earlier map, whose flags say what to skip, cannot be read",
                where=self.earlier,
                found=f"{type(error).__name__}: {error}",
                remedy="keep it where all workers see it until the new map is finished",
            ) from error

    def passing(self, quality: NDArray[np.uint16]) -> NDArray[np.bool_]:
        """Whether pixels with some `quality` have none of the flags."""
        passing: NDArray[np.bool_] = (quality & self.bits) == 0
        return passing


@dataclass(frozen=True)
class Selection:
    """Part of an observation, in its own indices; by default all of it.

    Attributes
    ----------
    region : pair of tuples of int, optional
        Rows and columns of a rectangle, each the first and the one after the last; all if left out.
    times : tuple of int, optional
        Indices of the times, ascending; all if left out.
    skip : Skip, optional
        What is left out of these.
    """

    region: tuple[Range, Range] | None = None
    times: tuple[int, ...] | None = None
    skip: Skip | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self == EVERYTHING

    def asked(self, tile: Tile) -> NDArray[np.bool_]:
        """Which pixels of a tile are selected.

        Parameters
        ----------
        tile : Tile
            Where to look.

        Returns
        -------
        ndarray of bool, shape (y, x)

        Raises
        ------
        StoreError
            The earlier map cannot be read.
        """
        if self.times is not None and tile.time not in self.times:
            return np.zeros(tile.shape, dtype=bool)
        asked = np.ones(tile.shape, dtype=bool)
        if self.region is not None:
            y, x = np.arange(*tile.y)[:, None], np.arange(*tile.x)
            (y0, y1), (x0, x1) = self.region
            asked = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
        if self.skip is not None and asked.any():
            asked &= self.skip.passing(self.skip.quality(tile.region)[0])
        return asked

    def survey(self, grid: TileGrid) -> tuple[NDArray[np.int64], NDArray[np.uint32] | None, str | None]:
        """Count the selected pixels of every tile; the log says of how many the earlier map knows no flags.

        Parameters
        ----------
        grid : TileGrid
            All tiles.

        Returns
        -------
        counts : ndarray of int, shape (tiles,)
            Selected pixels of every tile, in the grid's order.
        checksums : ndarray of uint32, shape (tiles,), or None
            `selected_checksum` of every tile with such pixels; None without `skip`.
        sha256 : str or None
            Identity of what the earlier map leaves of the rectangle and the times; None without `skip`.

        Raises
        ------
        StoreError
            The earlier map cannot be read.
        """
        times, height, width = grid.shape
        y, x = (slice(*ends) for ends in self.region or ((0, height), (0, width)))
        chosen = list(range(times) if self.times is None else self.times)
        counts = np.zeros(grid.counts, dtype=np.int64)
        if self.skip is None:
            frame = np.zeros((height, width), dtype=bool)
            frame[y, x] = True
            counts[chosen] = count_by_tile(frame, grid.tile)
            return counts.ravel(), None, None
        checksums = np.zeros(grid.counts, dtype=np.uint32)
        digest = hashlib.sha256()
        unknown: Counter[str] = Counter()
        for time in chosen:  # one after the other: a series need not fit into memory
            quality = self.skip.quality((slice(time, time + 1), y, x))[0]
            passing = self.skip.passing(quality)
            unknown.update(count_flags(quality[passing] & UNKNOWN))
            frame = np.zeros((height, width), dtype=bool)
            frame[y, x] = passing
            counts[time] = count_by_tile(frame, grid.tile)
            for row, column in np.argwhere(counts[time]):
                y0, x0 = row * grid.tile[0], column * grid.tile[1]
                here = frame[y0 : y0 + grid.tile[0], x0 : x0 + grid.tile[1]]
                checksums[time, row, column] = selected_checksum(here)
            digest.update(np.packbits(passing).data)
        if unknown:
            logger.warning(
                "%s does not know the flags of %s pixels, so none of them is skipped (%s)",
                self.skip.earlier,
                f"{unknown.total():,}",
                ", ".join(f"{name}: {count:,}" for name, count in sorted(unknown.items())),
            )
        return counts.ravel(), checksums.ravel(), digest.hexdigest()

    def settings(self) -> dict[str, Any]:
        """The selection as a run's settings name it, by option; None for what was not asked for."""
        return {
            "region": None
            if self.region is None
            else ",".join(f"{first}:{last}" for first, last in self.region),
            "times": None if self.times is None else _as_ranges(self.times),
            "skip": None if self.skip is None else ",".join(self.skip.flags),
        }


EVERYTHING = Selection()


def selected_checksum(asked: NDArray[np.bool_]) -> int:
    """CRC-32 of which pixels of a tile (y, x) are selected, a bit each."""
    return crc32(np.packbits(asked).data)


def count_by_tile(frame: NDArray[np.bool_], tile: tuple[int, int]) -> NDArray[np.int64]:
    """Count what is set in every tile of a frame.

    Parameters
    ----------
    frame : ndarray of bool, shape (y, x)
        Pixels of one time.
    tile : tuple of int
        Pixels of a whole tile along y and x.

    Returns
    -------
    ndarray of int, shape (rows, columns)
    """
    rows = np.add.reduceat(frame, np.arange(0, frame.shape[0], tile[0]), axis=0, dtype=np.int64)
    counts: NDArray[np.int64] = np.add.reduceat(rows, np.arange(0, frame.shape[1], tile[1]), axis=1)
    return counts


def _as_ranges(indices: Sequence[int]) -> str:
    """Ascending indices, shortly: ``0:10,12,20:30``."""
    values = np.asarray(indices)
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return ",".join(f"{run[0]}" if run.size == 1 else f"{run[0]}:{run[-1] + 1}" for run in runs)


def select(
    dataset: xr.Dataset,
    identity: str,
    *,
    region: str | None = None,
    times: str | None = None,
    skip: Sequence[str] = (),
    skip_from: str | Path | None = None,
) -> Selection:
    """Find what is meant by a region, times and flags to skip.

    Parameters
    ----------
    dataset : xarray.Dataset
        The observation; only its coordinates are read.
    identity : str
        Its hash, which an earlier map must bear.
    region : str, optional
        A rectangle: ``"Y0:Y1,X0:X1"`` in indices of rows and columns, the second of each excluded; or
        ``"Y0:Y1,X0:X1arcsec"`` in values of the coordinates `y` and `x`, both ends included. An end that is
        left out is the field's.
    times : str, optional
        Indices and ranges of indices, separated by commas: ``"0:10"``, ``"3,5,8"``, ``"0:90:10"``.
    skip : sequence of str
        Names of flags, as in ``flag_meanings`` of `skip_from`: pixels with any of them are left out. Of
        those that it has not come to, or was not asked for, no other flags are known, and they stay in.
    skip_from : str or Path, optional
        An earlier map of the same observation, or its URL.

    Returns
    -------
    Selection
        What selects everything is left out of it: it is the same however it was asked for.

    Raises
    ------
    MisuseError
        It cannot be understood, selects nothing, or the earlier map is another observation's.
    StoreError
        There is no such map.
    """
    sizes = (dataset.sizes["time"], dataset.sizes["y"], dataset.sizes["x"])
    rectangle = None if region is None else _region(region, dataset)
    chosen = None if times is None else _times(times, sizes[0])
    skip = tuple(sorted({name for names in skip for name in names.split(",")}))
    if not all(name.strip() for name in skip):
        raise MisuseError(
            "an empty name is no quality flag",
            where="skip",
            expected="names of flags, several of them separated by commas",
            remedy="leave the empty name out: there is a comma too many, or nothing between the quotes",
        )
    if bool(skip) != (skip_from is not None):
        raise MisuseError(
            "flags to skip need a map to take them from" if skip else "no flags to skip were named",
            where="skip",
            remedy="give both --skip FLAG and --skip-from MAP.zarr, or neither",
        )
    return Selection(
        rectangle if rectangle != ((0, sizes[1]), (0, sizes[2])) else None,
        chosen if chosen != tuple(range(sizes[0])) else None,
        None if skip_from is None else _skip(skip, skip_from, identity, sizes),
    )


def _numbers(text: str, kind: type[int] | type[float]) -> list[Any]:
    """Numbers between colons; None for one that is left out."""
    return [kind(part) if part.strip() else None for part in text.split(":")]


def _region(text: str, dataset: xr.Dataset) -> tuple[Range, Range]:
    arcsec = text.endswith("arcsec")
    kind = float if arcsec else int
    try:
        (y0, y1), (x0, x1) = (_numbers(part, kind) for part in text.removesuffix("arcsec").split(","))
    except ValueError:
        raise MisuseError(
            "this is no region",
            where="region",
            found=text,
            expected="rows and columns, 'Y0:Y1,X0:X1', or in arcsec, 'Y0:Y1,X0:X1arcsec'",
        ) from None
    find = _arcsec if arcsec else _indices
    return find(dataset, "y", y0, y1), find(dataset, "x", x0, x1)


def _indices(dataset: xr.Dataset, axis: str, first: int | None, last: int | None) -> Range:
    size = dataset.sizes[axis]
    found = (0 if first is None else first, size if last is None else last)
    if not 0 <= found[0] < found[1] <= size:
        raise MisuseError(
            f"the region's {axis} is not within the field",
            where="region",
            found=f"{found[0]}:{found[1]}",
            expected=f"ascending, within 0:{size}",
        )
    return found


def _arcsec(dataset: xr.Dataset, axis: str, first: float | None, last: float | None) -> Range:
    values = dataset[axis].values
    low, high = (values.min() if first is None else first, values.max() if last is None else last)
    inside = np.flatnonzero((values >= low) & (values <= high))
    if not inside.size:
        raise MisuseError(
            f"the region's {axis} holds no pixel of the field",
            where="region",
            found=f"{low:g}:{high:g} arcsec",
            expected=f"ascending, within {values.min():.2f}:{values.max():.2f} arcsec",
        )
    return int(inside[0]), int(inside[-1]) + 1


def _times(text: str, count: int) -> tuple[int, ...]:
    chosen: set[int] = set()
    for part in text.split(","):
        try:
            numbers = _numbers(part, int)
            if len(numbers) == 1:
                numbers.append(numbers[0] + 1)
            first, last, step = numbers if len(numbers) == 3 else (*numbers, 1)
            some = range(first or 0, count if last is None else last, 1 if step is None else step)
        except (ValueError, TypeError):
            raise MisuseError(
                "these are no times",
                where="times",
                found=text,
                expected="indices, '3,5,8', or ranges of them, '0:10' or '0:90:10'",
            ) from None
        if not some or not all(0 <= end < count for end in (some[0], some[-1])):
            raise MisuseError(
                "the observation has no such times",
                where="times",
                found=part,
                expected=f"0 to {count - 1}; the end of a range is not in it",
            )
        chosen.update(some)
    return tuple(sorted(chosen))


def _skip(flags: tuple[str, ...], earlier: str | Path, identity: str, sizes: tuple[int, ...]) -> Skip:
    with open_map(earlier) as found:
        bits = flag_bits(found["quality"].attrs, flags)
        other = found.attrs.get("made_from", {}).get("observation")
        if other != identity or found["quality"].shape != sizes:
            raise MisuseError(
                "the earlier map is of another observation",
                where=earlier,
                found=f"sha256 {other}",
                expected=f"sha256 {identity}",
                remedy="take flags from a map of this very observation",
            )
    return Skip(str(place(earlier)), flags, bits)
