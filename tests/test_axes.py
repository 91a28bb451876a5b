"""A scan within an array: the same as numpy's own transposing and indexing, and little more is read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.crisp.axes import ScanOfArray
from tests.test_cube import MASK, Watched

SIZES = {"time": 3, "stokes": 4, "wavelength": 5, "y": 7, "x": 6}
KEYS = [
    2,
    -1,
    slice(1, 4),
    slice(None, None, -2),
    [0, 3],
    np.array([True, False, True, True, False]),
    (slice(None), slice(2, 5), slice(1, 3)),
    (1, slice(2, 5)),
    (3, 4, 5),
    (slice(None), 4, -1),
    (slice(1, 3), MASK),
    (0, MASK),
    (slice(2, 2), MASK),
    (slice(4, 1), slice(2)),
    (slice(None), slice(None), 3),
]


def array(axes):
    shape = tuple(SIZES[axis] for axis in axes)
    return np.arange(np.prod(shape), dtype=">i4").reshape(shape)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing_is_numpys(key):
    stored = array(tuple(SIZES))
    order = np.array([4, 0, 3, 1, 2])
    cube = ScanOfArray(stored, tuple(SIZES), {"time": 1, "stokes": 2}, order)
    expected = stored[1, 2][order]
    np.testing.assert_array_equal(cube[key], expected[key])
    assert np.shape(cube[key]) == expected[key].shape


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    axes=st.sampled_from(
        [p for n in (3, 4, 5) for p in itertools.permutations(SIZES, n) if {"wavelength", "y", "x"} <= {*p}]
    ),
    key=st.sampled_from(KEYS),
    at=st.tuples(st.integers(0, 2), st.integers(0, 3)),
)
def test_axes_in_any_order(axes, key, at):
    stored = array(axes)
    cube = ScanOfArray(stored, axes, dict(zip(("time", "stokes"), at, strict=True)))
    others = [axis for axis in ("time", "stokes") if axis in axes]
    whole = np.transpose(stored, [axes.index(axis) for axis in (*others, "wavelength", "y", "x")])
    expected = whole[tuple(at[("time", "stokes").index(axis)] for axis in others)]
    assert cube.shape == expected.shape
    assert len(cube) == 5
    np.testing.assert_array_equal(cube[key], expected[key])
    np.testing.assert_array_equal(np.asarray(cube), expected)
    for found, image in zip(cube, expected, strict=True):
        np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize(
    ("key", "numbers"),
    [((slice(None), slice(2, 5), slice(1, 3)), 30), (2, 42), ((1, 3, 4), 1), ((slice(1, 3), MASK), 84)],
)
def test_only_what_is_indexed_is_read(key, numbers):
    watched = Watched(array(tuple(SIZES)))
    ScanOfArray(watched, tuple(SIZES), {"time": 1, "stokes": 0})[key]
    assert watched.read == numbers
