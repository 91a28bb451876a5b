"""Displacements of images: against scenes that were displaced by Fourier's shift theorem, and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from pipeline.correlation import fine_displacement, whole_displacement
from tests.fchroma_files import displace, smooth_noise

SHAPE = (90, 75)
WHOLE = np.ones(SHAPE, bool)


@pytest.fixture(scope="module")
def scene():
    return smooth_noise(np.random.default_rng(1), SHAPE, 2.0)


class TestWhole:
    @pytest.mark.parametrize("shift", [(0, 0), (7, -12), (-30, 3), (1, 30)])
    def test_scene_that_goes_on_beyond_the_frame(self, shift):
        large = smooth_noise(np.random.default_rng(2), (160, 150), 2.0)
        reference = large[35:125, 35:110]
        moving = large[35 + shift[0] : 125 + shift[0], 35 + shift[1] : 110 + shift[1]]
        np.testing.assert_array_equal(whole_displacement(reference, moving, WHOLE, WHOLE, 0.5), shift)

    def test_is_the_best_correlation_of_what_is_common(self, scene):
        """The definition, displacement by displacement, over masks with holes."""
        rng = np.random.default_rng(3)
        first, second = scene[:24, :20], (scene[:24, :20] + rng.normal(0.0, 1.0, (24, 20))).astype(np.float32)
        masks = [rng.random((24, 20)) < 0.8 for _ in range(2)]
        scores = {}
        for y in range(-23, 24):
            for x in range(-19, 20):
                here = (slice(max(y, 0), 24 + min(y, 0)), slice(max(x, 0), 20 + min(x, 0)))
                there = (slice(max(-y, 0), 24 + min(-y, 0)), slice(max(-x, 0), 20 + min(-x, 0)))
                both = masks[0][here] & masks[1][there]
                if both.sum() > 2:
                    pair = np.corrcoef(first[here][both], second[there][both])[0, 1]
                    scores[y, x] = (int(both.sum()), pair)
        most = max(count for count, _ in scores.values())
        kept = {where: score for where, (count, score) in scores.items() if count >= 0.5 * most}
        found = whole_displacement(first, second, *masks, overlap=0.5)
        np.testing.assert_array_equal(found, max(kept, key=kept.__getitem__))

    def test_what_is_masked_decides_nothing(self, scene):
        mask = WHOLE.copy()
        mask[20:40, 30:50] = False
        moving = np.roll(scene, (3, -4), (0, 1))
        spoilt = np.where(mask, moving, np.float32(1e4))
        found = [whole_displacement(scene, image, WHOLE, mask, 0.5) for image in (moving, spoilt)]
        np.testing.assert_array_equal(found, [(-3, 4), (-3, 4)])

    def test_images_without_structure(self):
        flat = np.full(SHAPE, 5.0, np.float32)
        assert whole_displacement(flat, flat, WHOLE, WHOLE, 0.5) is None
        assert whole_displacement(flat, flat, ~WHOLE, WHOLE, 0.5) is None


class TestFine:
    @pytest.mark.parametrize("shift", [(0.0, 0.0), (0.37, -0.84), (-5.5, 11.23), (-0.06, 30.41)])
    def test_shift_theorem(self, scene, shift):
        moved = displace(scene, -shift[0], -shift[1]).astype(np.float64)
        found = fine_displacement(scene.astype(np.float64), moved)
        np.testing.assert_allclose(found, shift, atol=0.0051)

    def test_odd_and_even_sizes(self, scene):
        for shape in ((40, 40), (41, 40), (40, 41), (41, 41)):
            image = smooth_noise(np.random.default_rng(4), shape, 2.0).astype(np.float64)
            moved = ndimage.fourier_shift(np.fft.fft2(image), (-1.3, 2.7))
            found = fine_displacement(image, np.fft.ifft2(moved).real)
            np.testing.assert_allclose(found, (1.3, -2.7), atol=0.0051)

    def test_coarse(self, scene):
        moved = displace(scene, -0.37, 0.84).astype(np.float64)
        found = fine_displacement(scene.astype(np.float64), moved, (0.1,))
        np.testing.assert_allclose(found, (0.4, -0.8), atol=1e-9)
