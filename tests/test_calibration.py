"""Calibration: posteriors known in closed form pass, too narrow ones do not; a lookup finds what is there."""

from __future__ import annotations

import json
from itertools import repeat

import numpy as np
import pytest
import torch
from benchmarks.networks import NEIGHBOURS, check_fresh, choose, lookup, nearest, relative_crps
from scipy.stats import kstest, norm
from toy_grid import toy_grid, write_toy_grid

import inn
from inn.calibration import LEVELS, normalised_ranks
from inn.conditional import ConditionalNetwork
from inn.layout import Layout
from pipeline.errors import InputError, MisuseError
from pipeline.grids.store import open_grid, split
from pipeline.training_set import Augmentation, content_hash, open_parts
from pipeline.validation import (
    BINS,
    CEILING,
    LEAST_SPREAD,
    Answers,
    calibration_figure,
    fresh_observations,
    judge,
    posteriors,
    prior,
    resampled_mean,
    score,
    uniformity,
    validate,
)

LAYOUT = Layout()
SIZE = LAYOUT.atmosphere_size
HEIGHTS = LAYOUT.heights.size


def gaussian(observations: int, width: float, seed: int, columns: int = 40, draws: int = 63):
    """Truths and draws of a standard Gaussian prior seen with unit noise: the posterior is N(y / 2, 1 / 2).

    `width` is that of the claimed posterior over the true one's.
    """
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=(observations, columns))
    seen = truth + generator.normal(size=truth.shape)
    spread = width * np.sqrt(0.5)
    return truth, 0.5 * seen[:, None] + spread * generator.normal(size=(observations, draws, columns))


def test_ranks_of_a_correct_posterior_are_uniform():
    truth, draws = gaussian(1000, 1.0, seed=1)
    ranks = normalised_ranks(draws, truth, np.random.default_rng(2))
    assert ((ranks > 0) & (ranks < 1)).all()
    _, probability = uniformity(ranks)
    # A hundredth of true hypotheses falls; of forty, none to three, nearly always.
    assert (probability >= 0.01).sum() >= 37
    assert kstest(probability, "uniform").pvalue > 0.01
    for level in LEVELS:
        inside = np.abs(ranks - 0.5) <= 0.5 * level
        np.testing.assert_allclose(inside.mean(), level, atol=4.0 * np.sqrt(level * (1 - level) / ranks.size))


def test_ranks_of_a_posterior_a_fifth_too_narrow_are_not():
    truth, draws = gaussian(1000, 0.8, seed=3)
    ranks = normalised_ranks(draws, truth, np.random.default_rng(4))
    histogram, probability = uniformity(ranks)
    assert (probability < 0.01).all()
    assert (histogram[:, 0] > 1000 / BINS).all()  # they crowd at the ends
    for level in LEVELS:
        expected = 2.0 * norm.cdf(0.8 * norm.ppf(0.5 + 0.5 * level)) - 1.0
        np.testing.assert_allclose((np.abs(ranks - 0.5) <= 0.5 * level).mean(), expected, atol=0.01)


def test_equal_draws_are_ranked_by_chance():
    draws, truth = np.zeros((4000, 7, 1)), np.zeros((4000, 1))
    assert kstest(normalised_ranks(draws, truth, np.random.default_rng(5))[:, 0], "uniform").pvalue > 0.01
    # Few draws give no steps: the rank of an atom among seven is one of eight, the result is not.
    truth, draws = gaussian(4000, 1.0, seed=6, columns=1, draws=7)
    assert kstest(normalised_ranks(draws, truth, np.random.default_rng(7))[:, 0], "uniform").pvalue > 0.01


def test_too_few_simulations_are_not_tested():
    _, probability = uniformity(np.random.default_rng(8).uniform(size=(5 * BINS - 1, 3)))
    assert np.isnan(probability).all()


def test_the_sampling_error_counts_simulations_not_snapshots():
    generator = np.random.default_rng(9)
    simulation = np.repeat(np.arange(400), 5)
    of_each = generator.normal(size=400)
    mean, error = resampled_mean(np.repeat(of_each, 5)[:, None], simulation, generator)
    assert mean[0] == pytest.approx(of_each.mean())
    # Five copies are one: sigma / sqrt(400), not sigma / sqrt(2000).
    assert error[0] == pytest.approx(of_each.std() / 20.0, rel=0.1)
    _, error = resampled_mean(generator.normal(size=(2000, 1)), np.arange(2000), generator)
    assert error[0] == pytest.approx(1.0 / np.sqrt(2000.0), rel=0.1)


def test_scores_of_a_known_posterior():
    truth, draws = gaussian(600, 1.0, seed=10, columns=SIZE)
    truth[:, HEIGHTS + 3] = draws[:, :, HEIGHTS + 3] = 3.7  # a temperature that never varies
    answers = judge(draws, truth, seed=11)
    scores = score(answers, truth, np.arange(600), LAYOUT, seed=12)
    below = LAYOUT.heights <= CEILING
    assert not scores.scored[:, ~below].any()
    assert scores.scored[0, below].all()
    assert LAYOUT.heights[~scores.scored[1] & below].tolist() == [LAYOUT.heights[3]]
    assert scores.worst < 0.01
    assert scores.uniform_overall > 0.95
    # The CRPS of N(m, s) averaged over truths of that distribution is s / sqrt(pi).
    np.testing.assert_allclose(scores.mean_crps, np.sqrt(0.5 / np.pi), rtol=0.03)
    # Heights here are independent, observations too.
    cells = 600 * scores.scored[0].sum()
    np.testing.assert_allclose(scores.coverage_error[0, 0], np.sqrt(0.25 / cells), rtol=0.15)
    stored = json.loads(json.dumps(scores.to_json()))
    assert stored["temperature"]["heights_left_out_Mm"] == [LAYOUT.heights[3]]
    assert stored["velocity"]["coverage"]["0.90"]["share"] == pytest.approx(0.9, abs=0.01)
    assert stored["simulations"] == 600


def test_ensembles_of_other_sizes_can_be_judged():
    truth = np.random.default_rng(13).normal(size=(5, SIZE))
    certain = judge((row[None] for row in truth), truth)
    assert (certain.crps == 0.0).all()
    climatology = judge(prior(truth, 5, draws=3), truth)
    assert climatology.crps.mean() > 0.1
    with pytest.raises(ValueError, match="zip"):
        judge(repeat(truth[:1], 4), truth)


@pytest.fixture(scope="module")
def grid_path(tmp_path_factory):
    return write_toy_grid(tmp_path_factory.mktemp("toy") / "grid.zarr", samples=120)


def test_of_the_training_grid_only_the_test_part_is_observed(grid_path):
    whole, simulation = fresh_observations(grid_path, LAYOUT, seed=1)
    grid = open_grid(grid_path)
    assert simulation.tolist() == grid["simulation"].values[grid["converged"].values].tolist()
    assert len(np.unique(whole.mu)) == simulation.size  # an angle for each
    again, _ = fresh_observations(grid_path, LAYOUT, trained_on={"sha256": "of another grid"}, seed=1)
    assert torch.equal(again.lines, whole.lines)
    _, kept = fresh_observations(grid_path, LAYOUT, trained_on={"sha256": content_hash(grid_path)})
    assert set(split(kept)) == {"test"}
    assert 2 <= kept.size < 0.25 * simulation.size


def test_a_grid_of_one_simulation_is_refused(tmp_path):
    with pytest.raises(InputError, match="too little"):
        fresh_observations(write_toy_grid(tmp_path / "grid.zarr", samples=1), LAYOUT)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return ConditionalNetwork(LAYOUT, components=8, steps=2, hidden=16, context=8, embedding=16).eval()


def test_each_observation_has_draws_of_its_own(network, grid_path):
    observed, _ = fresh_observations(grid_path, LAYOUT, Augmentation(), seed=2)
    same = type(observed)(*(values[:1].repeat(3, *[1] * (values.ndim - 1)) for values in observed))
    first, second, third = posteriors(network, same, draws=200, seed=3)
    assert first.shape == (200, SIZE)
    assert not np.isclose(first, second).any(axis=1).all()
    assert abs(np.corrcoef(first[:, 60], third[:, 60])[0, 1]) < 0.25
    # An untrained network answers with a Gaussian whose components are independent: mean 0, variance 1.
    np.testing.assert_allclose([first.std(), second.std()], 1.0, atol=0.1)
    (one,) = posteriors(network, type(observed)(*(values[:1] for values in same)), draws=200, seed=3)
    np.testing.assert_allclose(one, first)


def test_a_network_is_validated_on_a_page_with_its_numbers(network, grid_path, tmp_path):
    page = tmp_path / "reports" / "network.html"
    scores = validate(network, grid_path, page, draws=31, seed=4, call="a test")
    text = page.read_text(encoding="utf-8")
    assert "<img src=" in text
    for quantity in inn.QUANTITIES:
        assert quantity.replace("_", " ") in text
    stored = json.loads(page.with_suffix(".json").read_text())
    assert stored["call"] == "a test"
    assert stored["grid_sha256"] == content_hash(grid_path)
    assert stored["network"]["observations"] == scores.observations == 118
    # Standard Gaussians are far from any atmosphere: worse than not observing, and every truth outside.
    assert (
        stored["network"]["temperature"]["crps"]["mean"]
        > stored["grid's own spread"]["temperature"]["crps"]["mean"]
    )
    assert stored["network"]["temperature"]["coverage"]["0.90"]["share"] < 0.05
    spread = np.array(stored["network"]["temperature"]["by_height"]["spread"])
    left_out = [
        height
        for height, s in zip(LAYOUT.heights, spread, strict=True)
        if s < LEAST_SPREAD and height <= CEILING
    ]
    assert stored["network"]["temperature"]["heights_left_out_Mm"] == left_out
    with pytest.raises(MisuseError, match="exists"):
        validate(network, grid_path, page)
    assert len(calibration_figure({"network": scores}).axes) == 9 + 3  # and the colour bars


QUIET = Augmentation(noise=(1e-6, 1e-6), calibration_error=(0.0, 0.0), doppler=0.0)


def test_the_nearest_profiles_are_those_that_were_observed(grid_path):
    library = open_parts(grid_path, LAYOUT, QUIET)["train"]
    samples = torch.tensor([4, 17, 30])
    observed = library.observe(samples, torch.tensor([0.4, 0.6, 0.85]), torch.Generator().manual_seed(1))
    found = list(nearest(library, observed, 3, copies=2, noisy=False))
    truth = library.atmospheres(samples).numpy()
    for ensemble, expected in zip(found, truth, strict=True):
        assert ensemble.shape == (3, SIZE)
        # Both copies first, then another atmosphere.
        np.testing.assert_array_equal(ensemble[:2], np.tile(expected, (2, 1)))
        assert not np.array_equal(ensemble[2], expected)


def test_a_calibration_error_is_looked_up_as_it_was_told(grid_path):
    """Lines whose ratio is uncertain by 20 % match a library of the same uncertainty, not an exact one."""
    uncertain = Augmentation(noise=(1e-6, 1e-6), calibration_error=(0.2, 0.2), doppler=0.0)
    library = open_parts(grid_path, LAYOUT, uncertain)["train"]
    samples = torch.arange(0, 60, 4)
    observed = library.observe(samples, torch.full((15,), 0.6), torch.Generator().manual_seed(2))
    truth = library.atmospheres(samples).numpy()

    def errors(batch):
        found = np.stack([ensemble[0] for ensemble in nearest(library, batch, 1, copies=40, noisy=False)])
        return np.abs(found - truth)[:, :HEIGHTS].mean()

    exact = observed._replace(calibration_error=torch.zeros(15))
    assert errors(observed) < 0.7 * errors(exact)


def test_a_lookup_takes_few_neighbours_where_profiles_tell_and_many_where_they_do_not(grid_path):
    library = open_parts(grid_path, LAYOUT, QUIET)["train"]
    held_out = library.draw_each(torch.Generator().manual_seed(3))
    held_out = type(held_out)(*(values[:30] for values in held_out))
    choices = choose(library, held_out, LAYOUT, copies=1, seed=4)
    for quantity in inn.QUANTITIES:  # the observed atmosphere is in the library
        assert choices[quantity].neighbours == 1
        assert choices[quantity].crps < 1e-6
    answers = lookup(library, held_out, choices, copies=1, seed=4)
    assert answers.crps.max() < 1e-6
    unrelated = held_out._replace(atmosphere=held_out.atmosphere.roll(1, dims=0))
    choices = choose(library, unrelated, LAYOUT, copies=1, seed=4)
    most = max(count for count in NEIGHBOURS if count <= len(library))
    assert all(choices[quantity].neighbours >= most // 2 for quantity in inn.QUANTITIES)


def test_the_ratio_of_two_methods_has_its_own_sampling_error():
    generator = np.random.default_rng(14)
    difficulty = generator.uniform(0.1, 3.0, 500)
    ranks = np.full((500, SIZE), 0.5)
    first, other = (Answers(ranks, np.outer(factor * difficulty, np.ones(SIZE))) for factor in (0.8, 1.0))
    scored = np.ones((3, HEIGHTS), dtype=bool)
    ratio, error = relative_crps(first, other, scored, np.arange(500), seed=0)
    np.testing.assert_allclose(ratio, 0.8)
    assert (error < 1e-12).all()  # what is hard is hard for both


def test_of_a_grid_that_has_grown_the_test_part_alone_is_scored(tmp_path):
    grid = toy_grid(120)
    grid.attrs["made_from"] = {"settings": "a design"}
    grid.to_zarr(tmp_path / "grown.zarr", zarr_format=3)
    record = {"sha256": "of the grid when it was smaller", "settings": "a design"}
    _, kept = fresh_observations(tmp_path / "grown.zarr", LAYOUT, trained_on=record)
    assert 0 < len(kept) < 40
    assert set(split(kept)) == {"test"}


def test_simulations_that_were_trained_on_are_not_fresh(grid_path, tmp_path):
    parts = open_parts(grid_path, LAYOUT)
    seen, _ = fresh_observations(grid_path, LAYOUT)
    with pytest.raises(InputError, match="trained on"):
        check_fresh(seen, parts, grid_path)
    other = write_toy_grid(tmp_path / "grid.zarr", samples=20, seed=1)
    check_fresh(fresh_observations(other, LAYOUT)[0], parts, other)
