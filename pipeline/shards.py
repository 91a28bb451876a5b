"""Writing an array's whole shards, one at a time.

Zarr's own writing takes a shard through its event loop chunk by chunk, with a thread's turn and several
copies for each: as much time again as their compression. Where a shard is whole and in memory none of it is
needed. The bytes are those of the sharding codec, version 1.0 (https://zarr-specs.readthedocs.io): compressed
chunks one after another, then where each begins and how long it is, and a checksum of this index.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr
from google_crc32c import value as crc32c
from numcodecs import Blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, ShardingCodec, TransposeCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.metadata import ArrayV3Metadata
from zarr.core.sync import sync

NO_CHUNK = 2**64 - 1
"""What the index says of chunks that are not there."""
SHUFFLES = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}


class ShardWriter:
    """Writes shards of one array, whose chunks are transposed at most, and compressed by Blosc.

    Parameters
    ----------
    array : zarr.Array
        Sharded, with the index at the end, as Zarr makes it.
    """

    def __init__(self, array: zarr.Array[Any]) -> None:
        assert isinstance(array.metadata, ArrayV3Metadata)
        (codec,) = array.metadata.codecs
        assert isinstance(codec, ShardingCodec)
        *filters, _, blosc = codec.codecs
        assert isinstance(blosc, BloscCodec)
        self._order: tuple[int, ...] = tuple(range(array.ndim))
        for transposition in filters:
            assert isinstance(transposition, TransposeCodec)
            self._order = tuple(self._order[axis] for axis in transposition.order)
        assert codec.index_location.value == "end"
        assert array.shards is not None
        self._array = array
        self._chunks = array.chunks
        self._grid = tuple(shard // chunk for shard, chunk in zip(array.shards, array.chunks, strict=True))
        self._blosc = Blosc(
            cname=blosc.cname.value,
            clevel=blosc.clevel,
            shuffle=SHUFFLES[blosc.shuffle.value],
            blocksize=blosc.blocksize,
            typesize=array.dtype.itemsize,
        )

    def write(self, place: tuple[int, ...], values: NDArray[Any]) -> None:
        """Write a shard, in place of what is there.

        Parameters
        ----------
        place : tuple of int
            Which one, counted along each dimension.
        values : ndarray
            All of it that lies within the array.

        Raises
        ------
        OSError
            It cannot be written.
        """
        data = default_buffer_prototype().buffer.from_bytes(self._encoded(values))
        key = self._array.metadata.encode_chunk_key(place)
        sync((self._array.store_path / key).set(data))

    def _encoded(self, values: NDArray[Any]) -> bytes:
        index = np.full((*self._grid, 2), NO_CHUNK, dtype="<u8")
        parts: list[bytes] = []
        begin = 0
        for where in np.ndindex(*self._grid):
            chunk = values[
                tuple(slice(n * size, (n + 1) * size) for n, size in zip(where, self._chunks, strict=True))
            ]
            if chunk.size == 0:  # beyond the array's end
                continue
            if chunk.shape != self._chunks:
                rest = [(0, size - length) for size, length in zip(self._chunks, chunk.shape, strict=True)]
                chunk = np.pad(chunk, rest, constant_values=self._array.fill_value)
            stored = chunk.transpose(self._order)
            part = self._blosc.encode(np.ascontiguousarray(stored, dtype=self._array.dtype.newbyteorder("<")))
            index[where] = begin, len(part)
            begin += len(part)
            parts.append(part)
        written = index.tobytes()
        return b"".join([*parts, written, crc32c(written).to_bytes(4, "little")])
