"""What the benchmarks measure with: products are counted, lookups find, atmospheres come from points."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from benchmarks.emulator import (
    errors_by_mu,
    from_points,
    nearest_lines,
    nested,
    velocity_from_points,
    whole,
)
from benchmarks.posterior import (
    DRAWS,
    LEVELS,
    draws_needed,
    freia_network,
    random_joint,
    reference,
)
from benchmarks.scale import without_kernel
from benchmarks.training import products
from torch import nn

from inn.layout import HEIGHTS
from pipeline.grids import atmosphere
from pipeline.grids.store import BUNDLED_GRID, open_grid
from pipeline.training_set import Batch


def test_the_engine_goes_through_tiles_whose_kernel_does_nothing(client):
    curve = without_kernel(client, 30)
    assert curve.tiles[-1] == 30
    assert len(curve.names) == len(curve.memory[-1])


def test_the_operations_of_a_step_are_those_of_its_matrix_products():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    values = torch.randn(11, 7)
    stack = torch.randn(4, 6, 2)

    def step():
        model(values).sum().backward()
        torch.baddbmm(torch.zeros(4, 6, 9), stack, torch.randn(4, 2, 9))

    operations, sizes = products(step)
    # Forward; the gradients of both weights, and of the hidden layer. The input needs none.
    first, second, stacked = 2 * 11 * 7 * 5, 2 * 11 * 5 * 3, 2 * 4 * 6 * 2 * 9
    assert operations == 2 * first + 3 * second + stacked
    assert {size[:4]: count for size, count in sizes.items()} == {
        (1, 11, 7, 5): 1, (1, 11, 5, 3): 1, (1, 3, 11, 5): 1, (1, 11, 3, 5): 1, (1, 5, 11, 7): 1,
        (4, 6, 2, 9): 1,
    }  # fmt: skip


def grid_of(atmospheres: np.ndarray, microturbulence: np.ndarray, angles: int = 2) -> Batch:
    """Examples in the order of `TrainingSet.clean`; lines say which sample and angle they are of."""
    count = len(atmospheres)
    mu = torch.linspace(0.5, 1.0, angles).repeat(count)
    lines = torch.arange(count).repeat_interleave(angles)[:, None] + 0.1 * mu[:, None]
    return Batch(
        torch.from_numpy(atmospheres.repeat(angles, axis=0)).float(),
        lines.float().expand(-1, 4),
        mu,
        torch.zeros_like(mu),
        torch.from_numpy(microturbulence.repeat(angles)).float(),
    )


def test_the_nearest_atmosphere_counts_every_number_by_its_spread():
    # The first number varies a thousand times more than the second: both count alike.
    generator = np.random.default_rng(0)
    library = generator.normal(size=(50, 2)) * np.array([1000.0, 1.0])
    turbulence = np.full(50, 4.0)
    known = grid_of(library, turbulence)
    wanted = grid_of(library[[7, 31]] + np.array([30.0, 0.0]), turbulence[:2])
    found = nearest_lines(known, wanted)
    np.testing.assert_allclose(found[:, 0], [7.05, 7.1, 31.05, 31.1], rtol=1e-6)  # the same mu, too
    np.testing.assert_allclose(errors_by_mu(found, wanted), [(7.0**2 + 30.0**2) / 2] * 2, rtol=1e-5)
    # Alike but for the microturbulence.
    alike = np.zeros((3, 2))
    found = nearest_lines(grid_of(alike, np.array([2.0, 4.0, 8.0])), grid_of(alike[:1], np.array([7.0])))
    np.testing.assert_allclose(found[:, 0], [2.05, 2.1], rtol=1e-6)


def test_parts_of_the_learning_curve_are_nested_and_keep_simulations_whole():
    simulation = np.repeat(np.arange(40), 3)
    parts = nested(simulation, [0.125, 0.5, 1.0])
    assert [part.size for part in parts] == [15, 60, 120]
    for smaller, larger in pairwise(parts):
        assert set(smaller) <= set(larger)
    assert all(np.isin(simulation, simulation[part]).sum() == part.size for part in parts)


@pytest.fixture(scope="module")
def sample():
    return open_grid(BUNDLED_GRID).isel(sample=2).load()


def test_an_atmosphere_from_points_is_the_family_s_there_and_linear_between(sample):
    known, points = whole(sample), from_points(sample)
    assert points.values() == known.values()
    # The store keeps 1e-3 of a number.
    np.testing.assert_allclose(
        atmosphere.temperature(points, HEIGHTS), atmosphere.temperature(known, HEIGHTS), rtol=1e-3
    )
    np.testing.assert_allclose(
        atmosphere.velocity(points, HEIGHTS), atmosphere.velocity(known, HEIGHTS), rtol=1e-3, atol=1e-3
    )
    middle = 0.5 * (HEIGHTS[1:] + HEIGHTS[:-1])
    hot, flow = sample["temperature"].values.astype(float), sample["velocity"].values.astype(float)
    np.testing.assert_allclose(atmosphere.temperature(points, middle), np.sqrt(hot[1:] * hot[:-1]))
    np.testing.assert_allclose(atmosphere.velocity(points, middle), 0.5 * (flow[1:] + flow[:-1]))


def test_the_density_of_an_atmosphere_from_points_follows_from_its_temperature(sample):
    known, points = whole(sample), from_points(sample)
    heights = np.array([0.1, 0.5, 0.9])
    ratio = atmosphere.hydrogen_density(points, heights) / atmosphere.hydrogen_density(known, heights)
    assert ratio[0] == pytest.approx(1.0)  # the photosphere's is given
    np.testing.assert_allclose(ratio, 1.0, atol=0.02)
    assert not np.allclose(ratio[1:], 1.0, atol=1e-5)
    assert atmosphere.depth_points(points, 60).size == 60


def test_the_velocity_alone_can_come_from_points(sample):
    known, points = whole(sample), velocity_from_points(sample)
    heights = np.linspace(0.0, 3.0, 301)
    np.testing.assert_allclose(
        atmosphere.temperature(points, heights), atmosphere.temperature(known, heights), rtol=0.02
    )
    np.testing.assert_allclose(
        atmosphere.velocity(points, heights), atmosphere.velocity(from_points(sample), heights), atol=0.05
    )


def test_the_fewest_draws_that_are_good_enough():
    assert draws_needed({16: 0.4, 32: 0.2, 64: 0.1}, 0.2) == 32
    assert draws_needed({16: 0.4, 32: 0.2}, 0.1) is None


def test_the_reference_has_the_weights_of_our_network_and_its_statistics():
    joint = random_joint()
    network = freia_network(joint)  # compares both
    lines = np.random.default_rng(0).uniform(0.2, 1.0, (3, 60)).astype(np.float32)
    quantiles = reference(network, lines, statistics=False)
    statistics = reference(network, lines)
    assert quantiles.shape == (3, len(LEVELS), 150)
    np.testing.assert_allclose(statistics[:, 0], quantiles[:, 2], rtol=1e-5, atol=1e-6)
    latent = torch.randn(2 * DRAWS, 150, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drawn = joint.inverse(torch.from_numpy(lines[:1]).expand(DRAWS, -1), latent[:DRAWS])
    np.testing.assert_allclose(statistics[0, 0], np.median(drawn, axis=0), rtol=1e-4, atol=1e-5)
