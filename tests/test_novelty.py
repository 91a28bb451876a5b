"""The novelty measure: tail probabilities of the family itself are uniform, those of outsiders small."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from inn.checkpoint import load_model
from inn.errors import MisuseError, ModelError
from inn.layout import Layout
from inn.novelty import NOVEL, Novelty

LAYOUT = Layout()


def family(count: int, seed: int, noise: float = 0.01) -> torch.Tensor:
    """Profiles of a three-parameter family with photon noise."""
    generator = np.random.default_rng(seed)
    x = np.linspace(-1.0, 1.0, 30)
    depth, width, shift = generator.uniform([[0.1], [0.2], [-0.2]], [[0.8], [0.5], [0.2]], (3, count))
    core = np.exp(-0.5 * ((x - shift[:, None]) / width[:, None]) ** 2)
    lines = np.concatenate([1.0 - depth[:, None] * core, 0.6 - 0.5 * depth[:, None] * core], axis=1)
    lines = lines + noise * generator.normal(size=lines.shape)
    return torch.from_numpy((lines / lines.max(axis=1, keepdims=True)).astype(np.float32))


@pytest.fixture(scope="module")
def novelty() -> Novelty:
    return Novelty.fitted(LAYOUT, family(4000, 1), family(2000, 2))


def test_fresh_profiles_of_the_family_have_uniform_probabilities(novelty):
    probability = novelty.tail_probability(family(2000, 3).numpy())
    assert probability.dtype == np.float32
    assert kstest(probability, "uniform").pvalue > 0.01
    assert (probability < NOVEL).mean() == pytest.approx(0.01, abs=0.008)
    assert probability.min() >= 1.0 / 2001.0 - 1e-7


def test_outsiders_are_novel(novelty):
    inside = family(50, 4).numpy()
    x = np.linspace(-1.0, 1.0, 30)
    emission = inside.copy()
    emission[:, 30:] += 0.8 * np.exp(-0.5 * (x / 0.2) ** 2)
    noisy = family(50, 5, noise=0.1).numpy()
    reversed_line = 1.2 - inside
    for outsiders in (emission, noisy, reversed_line):
        assert (novelty.tail_probability(outsiders) < NOVEL).all()


def test_what_the_components_do_not_see_is_not_hidden(novelty):
    inside = family(1, 6, noise=0.0).numpy()[0].astype(np.float64)
    # A direction that no component has: it moves the profile without moving its projection.
    direction = np.random.default_rng(7).normal(size=60)
    projection = novelty.projection.double().numpy()
    direction -= projection @ (projection.T @ direction)
    direction *= 0.1 / np.abs(direction).max()
    hidden = (inside + direction).astype(np.float32)
    moved = novelty.coordinates(torch.from_numpy(hidden)[None])[0, :-1]
    still = novelty.coordinates(torch.from_numpy(inside.astype(np.float32))[None])[0, :-1]
    torch.testing.assert_close(moved, still, atol=1e-2, rtol=0)
    assert novelty.tail_probability(hidden[None])[0] < NOVEL


def test_the_distance_is_that_of_a_brute_force_search(novelty):
    lines = family(20, 8)
    points = novelty.coordinates(lines).double().numpy()
    references = novelty.references.double().numpy()
    distance = np.sqrt(((points[:, None] - references) ** 2).sum(axis=-1))
    expected = np.sort(distance, axis=1)[:, :4].mean(axis=1)
    np.testing.assert_allclose(novelty.distance(lines).numpy(), expected, rtol=5e-3)


@pytest.mark.parametrize("references", [13, 300, 1024])
def test_the_nearest_are_found_however_many_references_there_are(references):
    measure = Novelty.fitted(LAYOUT, family(references, 11), family(100, 12))
    lines = family(70, 13)
    points, known = measure.coordinates(lines), measure.references.float()
    distance = torch.cdist(points.double(), known.double())
    expected = distance.sort(dim=1).values[:, :4].mean(dim=1)
    torch.testing.assert_close(measure.distance(lines).double(), expected, rtol=1e-2, atol=1e-3)


def test_bad_pixels_are_nan(novelty):
    lines = family(4, 9).numpy()
    clean = novelty.tail_probability(lines)
    lines[1, 3] = np.nan
    found = novelty.tail_probability(lines)
    assert np.isnan(found[1])
    np.testing.assert_array_equal(found[[0, 2, 3]], clean[[0, 2, 3]])


def test_it_is_rebuilt_from_its_architecture_and_weights(novelty):
    again = Novelty.from_architecture(LAYOUT, novelty.architecture())
    again.load_state_dict(novelty.state_dict())
    lines = family(30, 10).numpy()
    np.testing.assert_array_equal(again.tail_probability(lines), novelty.tail_probability(lines))


def test_errors(novelty):
    with pytest.raises(ModelError, match="too few"):
        Novelty.fitted(LAYOUT, family(100, 1), family(20, 2))
    with pytest.raises(MisuseError, match="one row per pixel"):
        novelty.tail_probability(np.zeros((2, 61)))


def test_the_novelty_of_a_profile_does_not_depend_on_the_others():
    measure = load_model().novelty
    lines = np.random.default_rng(8).uniform(0.2, 1.0, (300, 60)).astype(np.float32)
    whole = measure.tail_probability(lines)
    np.testing.assert_array_equal(measure.tail_probability(lines[17:19]), whole[17:19])
    np.testing.assert_array_equal(measure.tail_probability(lines[::-1]), whole[::-1])
