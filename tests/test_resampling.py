"""Spectra made of images, displaced on the way, against SciPy's splines."""

import numpy as np
import pytest
from scipy import ndimage

from pipeline.compiled import compiled
from pipeline.resampling import MARGIN, displace, fill, spectra_of


def images(shape=(3, 60, 71)):
    return np.random.default_rng(3).uniform(100.0, 3000.0, shape).astype(np.float32)


class TestDisplace:
    @pytest.mark.parametrize("displacement", [(0.0, 0.0), (0.3, -0.41), (-0.5, 0.5), (0.0, 0.07)])
    def test_is_the_cubic_spline_of_scipy(self, displacement):
        before = images()
        moved = np.zeros((60 - 2 * MARGIN, 71 - 2 * MARGIN, 3), np.float32)
        displace(before.copy(), displacement, np.ones(moved.shape[:2], bool), moved, (0, 0))
        for image, found in zip(before, np.moveaxis(moved, -1, 0), strict=True):
            expected = ndimage.shift(image.astype(float), displacement, order=3, mode="mirror")
            np.testing.assert_allclose(found, expected[MARGIN:-MARGIN, MARGIN:-MARGIN], rtol=1e-6, atol=2e-3)

    def test_into_a_part_of_a_block_and_only_where_there_is_something(self):
        before, inside = images(), np.ones((60 - 2 * MARGIN, 71 - 2 * MARGIN), bool)
        inside[5:9], inside[:, 30:] = False, False
        whole, block = (np.full((*shape, 3), 7.0, np.float32) for shape in (inside.shape, (50, 60)))
        displace(before.copy(), (0.2, 0.3), np.ones_like(inside), whole, (0, 0))
        displace(before.copy(), (0.2, 0.3), inside, block, (10, 15))
        part = block[10:, 15:][: inside.shape[0], : inside.shape[1]]
        np.testing.assert_array_equal(part, np.where(inside[..., None], whole, np.nan))
        assert (block[:10] == 7.0).all()
        assert (block[:, :15] == 7.0).all()
        assert (block[10 + inside.shape[0] :] == 7.0).all()
        assert (block[:, 15 + inside.shape[1] :] == 7.0).all()


def test_spectra():
    own = images()
    inside = own[0] > 500.0
    spectra = spectra_of(own, inside)
    np.testing.assert_array_equal(spectra, np.where(inside[..., None], np.moveaxis(own, 0, -1), np.nan))
    assert spectra.flags.c_contiguous


def test_fill():
    own = images()
    expected = own.copy()
    expected[:, [3, 5], [4, 70]] = own[:, [0, 59], [1, 2]]
    fill(own, (np.array([3, 5]), np.array([4, 70])), (np.array([0, 59]), np.array([1, 2])))
    np.testing.assert_array_equal(own, expected)


def test_compiled_where_nothing_can_be_kept():
    """Of a function without a file nothing can be kept for others: as where no folder can be written."""
    names = {}
    exec("def double(values):\n    return values + values", names)
    np.testing.assert_array_equal(compiled(names["double"])(np.arange(3)), [0, 2, 4])
