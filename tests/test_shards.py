"""Shards that are written whole are what Zarr itself writes."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, TransposeCodec

from pipeline.shards import ShardWriter


def sharded(path, dtype="float32", fill=np.nan, shuffle="bitshuffle"):
    """Two times of 40 x 53 pixels and 3 wavelengths, whose last shards and chunks go beyond the frame."""
    return zarr.create_array(
        str(path),
        shape=(2, 40, 53, 3),
        dtype=dtype,
        chunks=(1, 8, 8, 3),
        shards=(1, 16, 32, 3),
        fill_value=fill,
        compressors=BloscCodec(cname="zstd", clevel=3, shuffle=shuffle),
    )


def write_whole(array, values):
    writer = ShardWriter(array)
    for time in range(2):
        for y in range(3):
            for x in range(2):
                part = values[time : time + 1, 16 * y : 16 * (y + 1), 32 * x : 32 * (x + 1)]
                writer.write((time, y, x, 0), part)


@pytest.mark.parametrize(
    ("dtype", "fill", "shuffle"),
    [("float32", np.nan, "bitshuffle"), ("float64", 0.0, "shuffle"), ("int16", -1, "noshuffle")],
)
def test_zarr_reads_what_was_written(tmp_path, dtype, fill, shuffle):
    values = np.random.default_rng(1).normal(0.0, 1000.0, (2, 40, 53, 3)).astype(dtype)
    array = sharded(tmp_path / "ours", dtype, fill, shuffle)
    write_whole(array, values)
    read = zarr.open_array(str(tmp_path / "ours"), mode="r")
    np.testing.assert_array_equal(read[:], values)
    np.testing.assert_array_equal(read[1, 30:39, 25:50, 1], values[1, 30:39, 25:50, 1])


def test_the_files_are_as_long_as_zarrs_and_go_on_as_theirs(tmp_path):
    """The same chunks under the same codecs; Zarr can change a part of them."""
    values = np.rint(np.random.default_rng(2).normal(2000.0, 50.0, (2, 40, 53, 3))).astype(np.float32)
    ours, theirs = sharded(tmp_path / "ours"), sharded(tmp_path / "theirs")
    write_whole(ours, values)
    theirs[:] = values
    sizes = [
        {
            str(file.relative_to(tmp_path / name)): file.stat().st_size
            for file in (tmp_path / name / "c").rglob("*")
            if file.is_file()
        }
        for name in ("ours", "theirs")
    ]
    assert len(sizes[0]) == 12
    assert sizes[0] == sizes[1]
    ours[0, 3:20, 5:40] = 7.0
    values[0, 3:20, 5:40] = 7.0
    np.testing.assert_array_equal(ours[:], values)


def test_a_damaged_index_is_noticed(tmp_path):
    array = sharded(tmp_path / "ours")
    write_whole(array, np.ones((2, 40, 53, 3), np.float32))
    file = tmp_path / "ours" / "c" / "0" / "0" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        array[0, :16, :32]


def test_transposed_chunks_are_what_zarr_writes(tmp_path):
    """A map's shards: quantile by quantile, in each the heights one after the other."""
    values = np.rint(np.random.default_rng(4).normal(0.0, 50.0, (2, 16, 24, 5, 7))).astype(np.float32)
    whole = {}
    for name in ("ours", "theirs"):
        array = zarr.create_array(
            str(tmp_path / name),
            shape=values.shape,
            dtype="float32",
            chunks=(1, 8, 16, 1, 7),
            shards=(1, 8, 16, 5, 7),
            fill_value=np.nan,
            filters=[TransposeCodec(order=(0, 3, 4, 1, 2))],
            compressors=BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
        )
        if name == "theirs":
            array[:] = values
        else:
            writer = ShardWriter(array)
            for time, y, x in np.ndindex(2, 2, 2):
                part = values[time : time + 1, 8 * y : 8 * (y + 1), 16 * x : 16 * (x + 1)]
                writer.write((time, y, x, 0, 0), part)
        np.testing.assert_array_equal(zarr.open_array(str(tmp_path / name), mode="r")[:], values)
        files = (file for file in (tmp_path / name / "c").rglob("*") if file.is_file())
        whole[name] = {str(file.relative_to(tmp_path / name)): file.stat().st_size for file in files}
    assert whole["ours"] == whole["theirs"]
