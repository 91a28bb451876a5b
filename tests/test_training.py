"""Training: a posterior known in closed form is found; examples are what the instrument would deliver."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm
from toy_grid import LIGHT_SPEED, MU, REST, _line, toy_grid, write_toy_grid

import inn
from inn.calibration import coverage, crps, held_out_metrics
from inn.conditional import ConditionalNetwork
from inn.emulator import Emulator
from inn.layout import CA8542, HALPHA, Layout, LineWindow
from inn.scaling import scale_atmosphere, unscale
from inn.training import HELD_OUT_BLUR, Epoch, LeastSquaresTrainer, LikelihoodTrainer, Schedule
from pipeline.crisp.instrument import transmission
from pipeline.errors import InputError, MisuseError
from pipeline.grids.store import open_grid, split
from pipeline.recipes import shows_emission
from pipeline.training_set import CRISP_WAVELENGTHS, Augmentation, Batch, TrainingSet, open_parts

LAYOUT = Layout()
SMALL = Layout(
    np.linspace(0.0, 2.0, 2),
    (LineWindow("halpha", 6564.61, 1.4, 4), LineWindow("ca8542", 8544.44, 1.0, 4)),
)
STILL = Augmentation(noise=(1e-6, 1e-6), calibration_error=(0.0, 0.0), doppler=0.0, transmission=False)


class LinearGaussian:
    """Six numbers with a Gaussian prior, eight linear measurements with Gaussian noise."""

    def __init__(self) -> None:
        generator = np.random.default_rng(11)
        self.prior = np.diag(np.linspace(0.5, 1.5, 6) ** 2)
        self.response = 0.06 * generator.normal(size=(8, 6))
        self.noise = 0.05

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        unit = torch.randn(count, 6, generator=generator, dtype=torch.float64)
        atmosphere = unit @ torch.from_numpy(np.sqrt(self.prior))
        error = self.noise * torch.randn(count, 8, generator=generator, dtype=torch.float64)
        lines = 0.7 + atmosphere @ torch.from_numpy(self.response.T) + error
        mu = torch.rand(count, generator=generator)
        return Batch(atmosphere.float(), lines.float(), mu, 0.1 * mu, mu)

    def posterior(self, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance: Bayes' rule for Gaussians."""
        precision = np.linalg.inv(self.prior) + self.response.T @ self.response / self.noise**2
        covariance = np.linalg.inv(precision)
        return (lines - 0.7) @ self.response @ covariance.T / self.noise**2, covariance


@pytest.mark.parametrize(("blur", "tolerance"), [(0.0, 0.05), (1.0, 0.08)])
def test_the_flow_finds_a_posterior_that_is_known_in_closed_form(blur, tolerance):
    # Blurred by up to the posterior's own spread, a flow that were not told would be wider by a sixth.
    problem = LinearGaussian()
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    network = ConditionalNetwork(SMALL, components=6, steps=2, hidden=24, context=16, embedding=48)
    statistics = problem.draw(20_000, generator)
    network.fit_statistics(
        statistics.atmosphere, statistics.lines, statistics.mu, statistics.calibration_error
    )
    schedule = Schedule(epochs=10, steps=100, batch=384, learning_rate=6e-3, blur=blur)
    history = LikelihoodTrainer(
        network, problem.draw, [problem.draw(2000, generator)], schedule, seed=3
    ).run()
    test = problem.draw(200, generator)
    mean, covariance = problem.posterior(test.lines.double().numpy())
    latent = torch.randn(4000, 6, generator=generator)
    with torch.no_grad():
        drawn = network.inverse_draws(test.lines, latent, test.mu, test.calibration_error).double().numpy()
    spread = np.sqrt(np.diag(covariance))
    # The prior's spread is reduced by a third to four fifths: there is something to find.
    assert (spread / np.sqrt(np.diag(problem.prior))).min() < 0.6
    assert np.abs(drawn.mean(axis=1) - mean).mean() < 0.1 * spread.mean()
    np.testing.assert_allclose(drawn.std(axis=1).mean(axis=0), spread, rtol=tolerance)
    correlation = np.mean([np.corrcoef(pixel.T) for pixel in drawn], axis=0)
    np.testing.assert_allclose(correlation, covariance / np.outer(spread, spread), atol=0.07)
    assert history[-1].held_out_loss < history[0].held_out_loss


def test_training_repeats_itself_and_keeps_the_best_epoch():
    problem = LinearGaussian()
    held_out = [problem.draw(500, torch.Generator().manual_seed(1))]
    curves, networks = [], []
    for _ in range(2):
        torch.manual_seed(0)
        network = ConditionalNetwork(
            SMALL, components=6, steps=2, hidden=8, context=4, embedding=8, dropout=0.1
        )
        curves.append(
            LikelihoodTrainer(
                network, problem.draw, held_out, Schedule(epochs=6, steps=10, average=0.8, blur=0.0), seed=5
            ).run()
        )
        networks.append(network)
    losses = [[(entry.loss, entry.held_out_loss) for entry in curve] for curve in curves]
    assert losses[0] == losses[1]
    for first, second in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(first, second)
    with torch.no_grad():
        batch = held_out[0]
        blur = torch.full_like(batch.mu, HELD_OUT_BLUR)  # of which the schedule makes nothing
        context = networks[0].context(batch.lines, batch.mu, batch.calibration_error, blur)
        kept = -networks[0].components_log_prob(networks[0].to_components(batch.atmosphere), context).mean()
    assert float(kept) / 6 == pytest.approx(min(entry.held_out_loss for entry in curves[0]), abs=1e-5)


def _dropout_network() -> ConditionalNetwork:
    torch.manual_seed(0)
    return ConditionalNetwork(SMALL, components=6, steps=2, hidden=8, context=4, embedding=8, dropout=0.1)


def _figures(history: list[Epoch]) -> list[tuple[float, ...]]:
    return [(entry.loss, entry.held_out_loss, entry.learning_rate) for entry in history]


@pytest.mark.parametrize("steps", [7, 20])
def test_a_trainer_goes_on_bit_for_bit_from_its_state_in_a_file(steps):
    problem = LinearGaussian()
    held_out = [problem.draw(200, torch.Generator().manual_seed(1))]
    schedule = Schedule(epochs=3, steps=10, batch=32, average=0.8)

    def trainer() -> LikelihoodTrainer:
        return LikelihoodTrainer(_dropout_network(), problem.draw, held_out, schedule, seed=5)

    undisturbed, interrupted, resumed = trainer(), trainer(), trainer()
    undisturbed.run()
    for _ in range(steps):
        interrupted.step()
    file = io.BytesIO()
    torch.save(interrupted.state(), file)
    file.seek(0)
    resumed.restore(torch.load(file, weights_only=True))
    interrupted.step()  # a trainer that goes on shares nothing with one that took its state over
    torch.rand(100)
    assert _figures(resumed.run()) == _figures(undisturbed.history)
    for first, second in zip(resumed.module.parameters(), undisturbed.module.parameters(), strict=True):
        assert torch.equal(first, second)


def test_trainers_that_take_turns_do_not_disturb_each_other_or_global_random_numbers():
    problem = LinearGaussian()
    held_out = [problem.draw(200, torch.Generator().manual_seed(1))]
    schedule = Schedule(epochs=2, steps=5, batch=32)
    alone = LikelihoodTrainer(_dropout_network(), problem.draw, held_out, schedule, seed=5).run()
    first, second = (
        LikelihoodTrainer(_dropout_network(), problem.draw, held_out, schedule, seed=seed) for seed in (5, 6)
    )
    torch.manual_seed(3)
    before = torch.get_rng_state()
    while not first.finished:
        first.step()
        second.step()
    assert torch.equal(torch.get_rng_state(), before)
    assert _figures(first.finish()) == _figures(alone)
    assert _figures(second.finish()) != _figures(alone)
    with pytest.raises(MisuseError, match="finished"):
        first.step()


def test_training_stops_when_the_held_out_loss_no_longer_falls():
    problem = LinearGaussian()
    held_out = [problem.draw(200, torch.Generator().manual_seed(1))]
    # Steps this long lead nowhere: some epoch is the best, and so many later patience is exhausted.
    schedule = Schedule(epochs=200, steps=2, batch=16, learning_rate=0.3, average=0.5, patience=4)
    history = LikelihoodTrainer(_dropout_network(), problem.draw, held_out, schedule, seed=5).run()
    losses = [entry.held_out_loss for entry in history]
    assert len(history) < 200
    assert len(history) - 1 - int(np.argmin(losses)) == 4


def test_the_emulator_learns_a_known_function():
    class Source:
        """Lines that depend on two numbers of the atmosphere, on microturbulence and on mu."""

        def draw(self, count: int, generator: torch.Generator) -> Batch:
            atmosphere = torch.randn(count, 6, generator=generator)
            mu = torch.rand(count, generator=generator)
            turbulence = 1.0 + 8.0 * torch.rand(count, generator=generator)
            x = torch.linspace(-1.0, 1.0, 8)
            core = torch.exp(-((x / (0.3 + 0.05 * turbulence[:, None])) ** 2))
            lines = 1.0 - (0.4 + 0.2 * torch.tanh(atmosphere[:, :1]) * mu[:, None]) * core
            return Batch(atmosphere, lines, mu, torch.zeros(count), turbulence)

    source, generator = Source(), torch.Generator().manual_seed(4)
    torch.manual_seed(1)
    emulator = Emulator(SMALL, width=32, depth=2)
    some = source.draw(2000, generator)
    emulator.fit_statistics(some.atmosphere, some.microturbulence, some.mu, some.lines)
    test = source.draw(500, generator)
    schedule = Schedule(epochs=8, steps=100, learning_rate=5e-3)
    LeastSquaresTrainer(emulator, source.draw, [test], schedule, seed=2).run()
    with torch.no_grad():
        error = (emulator(test.atmosphere, test.microturbulence, test.mu) - test.lines).square().mean()
        assert float(error) < 0.02 * float(test.lines.var(dim=0).mean())
        # Not told the microturbulence, it finds one among its levels that comes close.
        near = emulator.distance(test.atmosphere, test.lines, test.mu)
        wrong = emulator.distance(test.atmosphere, test.lines.flip(0), test.mu)
    assert float(near.median()) < 0.02
    assert float(near.median()) < 0.5 * float(wrong.median())
    np.testing.assert_allclose(emulator.microturbulence_levels, [1.8, 3.4, 5.0, 6.6, 8.2], atol=0.2)


@pytest.fixture(scope="module")
def grid_path(tmp_path_factory):
    return write_toy_grid(tmp_path_factory.mktemp("toy") / "grid.zarr")


def test_parts_share_no_simulation_and_leave_out_what_did_not_converge(grid_path):
    parts = open_parts(grid_path, LAYOUT)
    assert list(parts) == ["train", "validation", "test"]
    grid = open_grid(grid_path)
    names = split(grid["simulation"].to_numpy())
    seen: set[int] = set()
    for name, part in parts.items():
        simulations = set(part.simulation.tolist())
        assert simulations.isdisjoint(seen)
        seen |= simulations
        good = (names == name) & grid["converged"].to_numpy()
        assert len(part) == good.sum()
    assert torch.isfinite(parts["train"].draw(500, torch.Generator().manual_seed(0)).lines).all()


def _closed_form(samples: np.ndarray, bulk: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """Network lines of toy atmospheres that move as a whole, from the toy's own formulae."""
    lines = _intensities(samples, bulk, mu)
    return lines / lines.max(axis=1, keepdims=True)


def _intensities(samples: np.ndarray, bulk: np.ndarray, mu: np.ndarray) -> np.ndarray:
    grid = toy_grid()
    heating = grid["parameter_heating"].to_numpy()[samples]
    density = grid["parameter_density"].to_numpy()[samples]
    velocity = grid["parameter_velocity_peak"].to_numpy()[samples] + bulk
    parts = []
    for window in (HALPHA, CA8542):
        axis = CRISP_WAVELENGTHS[window.name]
        rows = []
        for row in range(samples.size):
            one = slice(row, row + 1)
            fine = np.linspace(axis[0], axis[-1], axis.size)
            profile = _line(
                window.name, fine - window.rest_wavelength, heating[one], density[one], velocity[one], mu[one]
            )[0, 0]
            slope = (profile[-1] - profile[-2]) / (fine[-1] - fine[-2])
            beyond = np.maximum(window.wavelengths - fine[-1], 0.0)
            rows.append(np.interp(window.wavelengths, fine, profile) + slope * beyond)
        parts.append(np.array(rows))
    return np.concatenate(parts, axis=1)


def test_clean_examples_are_the_grid_at_the_instrument_s_wavelengths(grid_path):
    part = open_parts(grid_path, LAYOUT, STILL)["test"]
    clean = part.clean()
    samples = np.repeat(part.simulation, MU.size)
    expected = _closed_form(samples, np.zeros(samples.size), np.tile(MU, len(part)))
    np.testing.assert_allclose(clean.lines.numpy(), expected, atol=2e-3)
    grid = open_grid(grid_path).isel(sample=part.simulation)
    truth = scale_atmosphere(*(grid[name].to_numpy() for name in inn.QUANTITIES))
    np.testing.assert_allclose(clean.atmosphere.numpy()[:: MU.size], truth, rtol=1e-5, atol=1e-5)
    assert (clean.microturbulence == 4.0).all()


def test_profiles_pass_the_instrument(grid_path):
    part = open_parts(grid_path, LAYOUT, replace(STILL, transmission=True))["test"]
    sharp = open_parts(grid_path, LAYOUT, STILL)["test"].clean().lines
    samples, mu = np.repeat(part.simulation, MU.size), np.tile(MU, len(part))
    # What CRISP measures is the mean of what lies around a wavelength, weighted with its transmission; to
    # look beside the wavelength is to look at a line that moves.
    offset = np.linspace(-0.6, 0.6, 61)
    weight = {line: transmission(line, offset) for line in REST}
    expected = np.zeros((samples.size, 60))
    for number, beside in enumerate(offset):
        for line, points in (("halpha", slice(0, 30)), ("ca8542", slice(30, 60))):
            velocity = beside / REST[line] * LIGHT_SPEED / mu
            share = weight[line][number] / weight[line].sum()
            expected[:, points] += share * _intensities(samples, velocity, mu)[:, points]
    expected /= expected.max(axis=1, keepdims=True)
    np.testing.assert_allclose(part.clean().lines.numpy(), expected, atol=3e-3)
    assert np.abs(sharp.numpy() - expected).max() > 2e-2


def test_profiles_too_short_for_observations_that_move_are_refused():
    grid = toy_grid(20).isel(sample=slice(0, 10))
    short = grid.isel(wavelength_ca8542=np.flatnonzero(np.abs(grid["wavelength_ca8542"]) < 1.03))
    assert len(TrainingSet(short, LAYOUT, Augmentation(doppler=0.0))) == 10
    with pytest.raises(InputError, match=r"too short for observations that move(.|\n)*doppler"):
        TrainingSet(short, LAYOUT, Augmentation(doppler=3.0))


def test_a_bulk_velocity_moves_the_atmosphere_and_both_lines_together(grid_path):
    moving = replace(STILL, doppler=2.0)
    part = open_parts(grid_path, LAYOUT, moving)["test"]
    generator = torch.Generator().manual_seed(6)
    count = 60
    samples = torch.randint(len(part), (count,), generator=generator)
    angles = torch.from_numpy(MU[np.arange(count) % MU.size].astype(np.float32))
    batch = part.observe(samples, angles, generator)
    bulk = (
        unscale("velocity", batch.atmosphere.double())[:, 100:]
        - unscale("velocity", part.atmospheres(samples).double())[:, 100:]
    )
    assert (bulk.std(dim=1) < 1e-2).all()  # the same at every height
    bulk = bulk.mean(dim=1)
    assert bulk.abs().max() > 2.0
    lines = _closed_form(part.simulation[samples.numpy()], bulk.numpy(), angles.numpy().astype(np.float64))
    np.testing.assert_allclose(batch.lines.numpy(), lines, atol=3e-3)
    # A rising atmosphere is seen bluer: the toy's lines are symmetric, so the shift can be read off.
    assert (moving.velocities @ moving.velocity_weights) == pytest.approx(0.0, abs=1e-12)
    variance = (moving.velocities**2) @ moving.velocity_weights
    assert np.sqrt(variance) == pytest.approx(2.0, rel=0.1)
    assert REST["halpha"] * 2.0 / LIGHT_SPEED == pytest.approx(0.0438, abs=1e-4)


def test_noise_and_calibration_error_are_those_stated(grid_path):
    noisy = Augmentation(noise=(0.01, 0.01), calibration_error=(0.0, 0.0), doppler=0.0)
    part = open_parts(grid_path, LAYOUT, noisy)["train"]
    generator = torch.Generator().manual_seed(7)
    samples = torch.zeros(4000, dtype=torch.int64)
    mu = torch.full((4000,), float(MU[1]))
    lines = part.observe(samples, mu, generator).lines
    clean = part.clean().lines[1]
    # At a network point that coincides with one of CRISP's: no averaging, so the noise itself. The Ca II
    # window's outermost points do, at -1.0 and 1.0 Angstrom.
    peak_ca = clean[30:].max()
    ratio = float((lines[:, 30] / lines.amax(dim=1)).std() / peak_ca)
    assert ratio == pytest.approx(0.01, rel=0.15)
    miscalibrated = Augmentation(noise=(1e-6, 1e-6), calibration_error=(0.1, 0.1), doppler=0.0)
    part = open_parts(grid_path, LAYOUT, miscalibrated)["train"]
    batch = part.observe(samples, mu, generator)
    assert torch.allclose(batch.calibration_error, torch.tensor(0.1))
    factor = (batch.lines[:, 45] / batch.lines[:, 10]) / (clean[45] / clean[10])
    assert float(factor.log().std()) == pytest.approx(0.1, rel=0.05)
    assert float(factor.log().mean()) == pytest.approx(0.0, abs=0.01)


def test_angles_between_the_grid_s_are_interpolated(grid_path):
    part = open_parts(grid_path, LAYOUT, STILL)["test"]
    angles = part.draw_mu(5000, torch.Generator().manual_seed(8))
    assert angles.min() >= MU[0] - 1e-6
    assert angles.max() <= MU[-1] + 1e-6
    samples = torch.arange(len(part))
    halfway = torch.full((len(part),), 0.45)
    # The toy's intensity at fixed wavelength is smooth in mu, not linear: a few per cent for moving gas.
    found = part.observe(samples, halfway, torch.Generator().manual_seed(9)).lines.numpy()
    expected = _closed_form(part.simulation, np.zeros(len(part)), np.full(len(part), 0.45))
    assert np.abs(found - expected).mean() < 0.01


def test_a_grid_of_other_heights_is_refused(grid_path):
    grid = toy_grid(20).isel(height=slice(0, 40))
    with pytest.raises(InputError, match="heights"):
        TrainingSet(grid, LAYOUT)


def test_coverage_and_crps_of_a_gaussian():
    generator = np.random.default_rng(12)
    truth = generator.normal(size=(2000, 3))
    draws = generator.normal(size=(2000, 400, 3))
    for level in (0.5, 0.9):
        np.testing.assert_allclose(coverage(draws, truth, level), level, atol=0.04)
    # Gneiting & Raftery 2007, eq. 21's closed form for a normal forecast (Gneiting et al. 2005, eq. 5).
    expected = truth * (2 * norm.cdf(truth) - 1) + 2 * norm.pdf(truth) - 1 / np.sqrt(np.pi)
    np.testing.assert_allclose(crps(draws, truth).mean(), expected.mean(), rtol=0.02)


def test_a_perfect_network_scores_perfectly():
    class Oracle(ConditionalNetwork):
        """Returns the atmosphere that its lines spell out."""

        def inverse_draws(self, lines, latent, mu=None, calibration_error=None):
            return (lines[:, :1] * torch.ones(150))[:, None] + 1e-4 * latent

    generator = np.random.default_rng(13)
    lines = generator.uniform(0.2, 1.0, (40, 60)).astype(np.float32)
    scores = held_out_metrics(Oracle(LAYOUT).eval(), np.repeat(lines[:, :1], 150, axis=1), lines, draws=32)
    for quantity in inn.QUANTITIES:
        assert scores[quantity]["error_ratio"] < 0.01
        assert scores[quantity]["correlation"] > 0.999
    assert scores["examples"] == 40


def test_emission_is_a_core_above_its_wings():
    x = np.linspace(-1.0, 1.0, 30)
    absorption = np.tile(1.0 - 0.5 * np.exp(-((x / 0.3) ** 2)), 2)
    emission = absorption.copy()
    emission[30:] = 0.3 + 0.4 * np.exp(-((x / 0.3) ** 2))
    lines = torch.from_numpy(np.array([absorption, emission]))
    assert shows_emission(lines, LAYOUT).tolist() == [False, True]
