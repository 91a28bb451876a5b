"""The paper's training recipe: its curriculum, one step written out, resuming, learning."""

import io
import json
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_losses import SMALL, curve_by_cdist, mmd2_by_loops

from inn.errors import MisuseError, ModelError
from inn.joint import JointNetwork
from inn.joint_training import JointSchedule, JointTrainer
from inn.losses import SEARCHED_BANDWIDTHS

PAPER = JointSchedule()


class Rows(NamedTuple):
    """Examples that hold what the joint network takes, and nothing in what it does not."""

    atmosphere: torch.Tensor
    lines: torch.Tensor

    @property
    def mu(self):
        return torch.zeros(len(self.lines))

    calibration_error = microturbulence = mu


class LinearGaussian:
    """Six independent normal numbers, of which eight measurements see three combinations, without noise.

    Given the measurements those combinations are known, and the rest is as it was before.
    """

    def __init__(self) -> None:
        generator = np.random.default_rng(20)
        basis = np.linalg.qr(generator.normal(size=(6, 6)))[0]
        self.seen, self.unseen = basis[:, :3], basis[:, 3:]
        self.response = np.linalg.qr(generator.normal(size=(8, 3)))[0] * [0.35, 0.3, 0.25]

    def draw(self, count, generator):
        atmosphere = torch.randn(count, 6, generator=generator)
        lines = 0.7 + atmosphere.numpy() @ self.seen @ self.response.T
        return Rows(atmosphere, torch.from_numpy(lines.astype(np.float32)))


def new_network(seed=1, dtype=torch.float32, latent_size=6, width=18):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return JointNetwork(SMALL, latent_size=latent_size, width=width, blocks=3).to(dtype)


def trainer(schedule, seed=3, dtype=torch.float32, held_out=200):
    problem = LinearGaussian()
    examples = [problem.draw(held_out, torch.Generator().manual_seed(5))]
    return JointTrainer(new_network(dtype=dtype), problem.draw, examples, schedule, seed)


def test_the_paper_s_constants():
    assert (PAPER.epochs, PAPER.steps, PAPER.batch) == (12_000, 20, 500)
    assert (PAPER.w_pred, PAPER.w_latent, PAPER.w_rev) == (4000, 900, 1000)
    group = trainer(None)._optimiser.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.8), 1e-6, 2e-5)
    assert isinstance(trainer(None)._optimiser, torch.optim.Adam)
    assert not group["amsgrad"]
    assert PAPER.clamp == 15.0
    json.dumps(PAPER.to_json())


def test_learning_rate_is_the_paper_s():
    # 1.5e-3, times 0.004^(1/1333) = 0.995866 every twelve epochs.
    assert PAPER.learning_rate_at(0) == PAPER.learning_rate_at(11) == 1.5e-3
    assert PAPER.learning_rate_at(12) == pytest.approx(1.4937996e-3, rel=1e-7)
    assert PAPER.learning_rate_at(24) == pytest.approx(1.4876249e-3, rel=1e-7)
    assert PAPER.learning_rate_at(12 * 1333) == pytest.approx(6e-6, rel=1e-12)
    # What the paper quotes for its chosen network.
    assert PAPER.learning_rate_at(11_000) == pytest.approx(3.38e-5, rel=2e-3)
    assert PAPER.learning_rate_at(11_399) == pytest.approx(2.944e-5, rel=1e-3)


def test_fade_in_and_padding_noise_are_the_paper_s():
    assert [PAPER.xi_at(n) for n in (0, 160, 320, 5000)] == [0.0, 0.125, 1.0, 1.0]
    assert [PAPER.padding_noise_at(n) for n in (0, 160, 320, 5000)] == pytest.approx(
        [0.05, 0.04375, 0.0, 0.0]
    )
    assert [n for n in range(1, 22) if PAPER.searches_at(n)] == [5, 10, 15, 20]
    weights = [PAPER.w_pred_at(n) for n in (0, 799, 800, 4799, 4800, 11_399, 11_400)]
    assert weights == [4000, 4000, 5000, 14_000, 15_000, 25_000, 26_000]


@pytest.mark.parametrize("epochs", [12_000, 1200, 240, 60])
def test_a_scaled_schedule_goes_through_the_whole_curriculum(epochs):
    short, ratio = PAPER.scaled(epochs), 12_000 // epochs
    assert short.epochs == epochs
    for n in range(epochs):
        assert short.learning_rate_at(n) == pytest.approx(PAPER.learning_rate_at(ratio * n), rel=1e-12)
        assert short.w_pred_at(n) == PAPER.w_pred_at(ratio * n)
        assert short.xi_at(n) == pytest.approx(PAPER.xi_at(ratio * n), rel=1e-12)
        searched = any(PAPER.searches_at(m) for m in range(ratio * n + 1, ratio * (n + 1) + 1))
        assert short.searches_at(n + 1) == searched
    assert (short.steps, short.batch, short.learning_rate) == (20, 500, 1.5e-3)
    with pytest.raises(MisuseError, match="epoch"):
        PAPER.scaled(0)


@pytest.mark.parametrize("weight", [1.0, 1e4])
def test_a_step_is_that_of_the_summed_loss_clamped(weight):
    schedule = replace(
        PAPER.scaled(10), batch=40, w_pred=4.0 * weight, w_latent=0.9 * weight, w_rev=weight, fade_epochs=10.0
    )
    trained = trainer(schedule, dtype=torch.float64)
    # As if two epochs were over: xi and the padding noise are both at work.
    trained.history = [None, None]
    reference = new_network(dtype=torch.float64)
    state = {name: values.clone() for name, values in reference.state_dict().items()}
    trained.step()

    xi = (2 / 4.0) ** 3
    noise = 0.05 * (1 - xi)
    random = torch.Generator().manual_seed(3)

    def normal(columns):
        return torch.randn(40, columns, generator=random).double()

    examples = LinearGaussian().draw(40, random)
    x = torch.cat((examples.atmosphere.double(), noise * normal(12)), dim=1)
    lines, latent = examples.lines.double(), normal(6)
    target = torch.cat((latent, noise * normal(4), lines), dim=1)
    padding, drawn, last = normal(4), normal(6), normal(4)
    out = reference.forward_padded(x)
    back = reference.inverse_padded(torch.cat((out[:, :6].detach(), noise * padding, lines), dim=1))
    sampled = reference.inverse_padded(torch.cat((drawn, noise * last, lines), dim=1))

    def mmd(first, second, widths):
        pairs = ((first, first, 1), (second, second, 1), (first, second, -2))
        return sum(
            share * (a**2 / (a**2 + (p[:, None] - q[None]).square().sum(-1))).mean()
            for a in widths
            for p, q, share in pairs
        )

    terms = [
        (out[:, 6:] - target[:, 6:]).square().mean(),
        mmd(
            torch.cat((out[:, -8:].detach(), out[:, :6]), dim=1),
            torch.cat((lines, latent), dim=1),
            (8.0, 11.0),
        ),
        (back - x).square().mean(),
        mmd(sampled[:, :6], x[:, :6], (1.4, 2.0, 5.5, 7.0)),
    ]
    total = sum(w * term for w, term in zip((4.0, 0.9, 2.0, xi), terms, strict=True)) * weight
    total.backward()
    sums = [term.item() for term in terms]
    np.testing.assert_allclose(trained._sums, sums, rtol=1e-9)
    clamped = 0
    for name, values in reference.named_parameters():
        gradient = values.grad.clamp(-15.0, 15.0)
        clamped += int((values.grad.abs() > 15.0).sum())
        found = dict(trained.network.named_parameters())[name]
        torch.testing.assert_close(found.grad, gradient, rtol=1e-7, atol=1e-9 * weight)
        # Adam's first step: the gradient with the weight decay, over its own modulus. Of a curriculum of ten
        # epochs two are 2,400 of the paper's, and the learning rate has fallen 200 times.
        gradient = gradient + 2e-5 * state[name]
        expected = state[name] - 1.5e-3 * 0.004 ** (200 / 1333) * gradient / (gradient.abs() + 1e-6)
        torch.testing.assert_close(found.data, expected, rtol=0.0, atol=1e-10)
    assert (clamped > 0) == (weight > 1.0)


SHORT = replace(PAPER.scaled(6), steps=2, batch=60)


def test_resuming_repeats_every_bit():
    whole, first = trainer(SHORT), trainer(SHORT)
    for _ in range(6):
        whole.step()
    for _ in range(3):  # in the middle of an epoch, after the first search
        first.step()
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = trainer(SHORT)
    second.network.load_state_dict(new_network(seed=7).state_dict())
    second.step()  # nothing of this is left when the state is restored
    second.restore(torch.load(file, weights_only=True))
    for _ in range(3):
        first.step()
        second.step()
    for other in (first, second):
        for one, two in zip(whole.network.parameters(), other.network.parameters(), strict=True):
            assert torch.equal(one, two)
        assert [entry.epoch for entry in other.history] == [1, 2, 3]
        assert [entry.terms for entry in other.history][:2] == [entry.terms for entry in whole.history][:2]
        assert other.history[2].loss == whole.history[2].loss
    assert second.history[2].seconds >= second.history[1].seconds


def test_the_best_epoch_after_the_fade_in_is_kept():
    schedule = replace(PAPER.scaled(12), steps=2, batch=60, fade_epochs=10.0, learning_rate=0.02)
    training = trainer(schedule)
    states = []
    while not training.finished:
        if training.step() is not None:
            states.append({name: values.clone() for name, values in training.network.state_dict().items()})
    losses = [entry.held_out_loss for entry in training.history]
    assert [entry.terms["xi"] for entry in training.history[:6]] == [0.0, 1 / 64, 1 / 8, 27 / 64, 1.0, 1.0]
    best = 4 + int(np.argmin(losses[4:]))
    history = training.finish()
    assert history is training.history
    assert not training.network.training
    for name, values in training.network.state_dict().items():
        assert torch.equal(values, states[best][name])
    examples = LinearGaussian().draw(200, torch.Generator().manual_seed(5))
    with torch.no_grad():
        error = (training.network(examples.atmosphere)[0] - examples.lines).square().mean()
    assert float(error) == pytest.approx(losses[best], rel=1e-5)
    with pytest.raises(MisuseError, match="finished"):
        training.step()


def test_patience_is_counted_after_the_fade_in():
    schedule = replace(
        PAPER.scaled(40),
        steps=1,
        batch=20,
        fade_epochs=10.0,
        patience=3,
        learning_rate=1e-30,
        weight_decay=0.0,
    )
    history = trainer(schedule).run()
    assert len(history) == 5 + 3  # nothing is learned: the first epoch that counts stays the best


def test_terms_of_an_epoch():
    training = trainer(replace(SHORT, epochs=3, bandwidth_epochs=2.0, steps=1))
    first = training.step()
    network, problem = training.network, LinearGaussian()
    examples = problem.draw(200, torch.Generator().manual_seed(5))
    rows = np.linspace(0, 199, 60).round().astype(int)
    fixed = torch.Generator().manual_seed(3)
    normal, drawn = (torch.randn(60, 6, generator=fixed) for _ in range(2))
    with torch.no_grad():
        lines, latent = network(examples.atmosphere[rows])
        generated = torch.cat((lines, latent), dim=1).double().numpy()
        target = torch.cat((examples.lines[rows], normal), dim=1).double().numpy()
        sampled = network.inverse(examples.lines[rows], drawn).double().numpy()
    assert first.terms["held_out_latent_mmd"] == pytest.approx(
        mmd2_by_loops(generated, target, (8.0, 11.0)), rel=1e-4
    )
    expected = mmd2_by_loops(sampled, examples.atmosphere[rows].double().numpy(), (1.4, 2.0, 5.5, 7.0))
    assert first.terms["held_out_reverse_mmd"] == pytest.approx(expected, rel=1e-4)
    assert first.held_out_loss == first.terms["held_out_forward_mse"]
    assert first.terms["bandwidth_latent"] == pytest.approx(math.sqrt(88.0))
    assert first.loss == pytest.approx(
        4000.0 * (first.terms["forward_mse"] + 0.5 * first.terms["backward_mse"])
        + 900.0 * first.terms["latent_mmd"]
    )  # xi is 0 in the first epoch
    assert (first.epoch, first.learning_rate, first.terms["w_rev"]) == (1, 1.5e-3, 1000.0)

    # The second epoch ends with a search, on the examples drawn next; the third uses what it found.
    second = training.step()
    assert second.terms["bandwidth_latent"] == first.terms["bandwidth_latent"]
    ahead = torch.Generator()
    ahead.set_state(training._generator.get_state())
    training._search()
    examples = problem.draw(60, ahead)
    normal, drawn = (torch.randn(60, 6, generator=ahead) for _ in range(2))
    with torch.no_grad():
        lines, latent = network(examples.atmosphere)
        generated = torch.cat((lines, latent), dim=1).double().numpy()
        target = torch.cat((examples.lines, normal), dim=1).double().numpy()
        sampled = network.inverse(examples.lines, drawn).double().numpy()
    pairs = ((generated, target), (sampled, examples.atmosphere.double().numpy()))
    searched = [curve_by_cdist(*pair, SEARCHED_BANDWIDTHS) for pair in pairs]
    third = training.step()
    for curve, name in zip(searched, ("latent", "reverse"), strict=True):
        peaks = np.flatnonzero((curve[1:-1] > curve[:-2]) & (curve[1:-1] > curve[2:])) + 1
        value = SEARCHED_BANDWIDTHS[peaks[-1]] if peaks.size else 2.0
        assert third.terms[f"bandwidth_{name}"] == pytest.approx(value)
    assert training.finished


def test_a_loss_that_is_no_number_is_reported():
    training = trainer(SHORT)
    with torch.no_grad():
        next(training.network.parameters()).fill_(math.inf)
    training.step()
    with pytest.raises(ModelError, match="no longer a number"):
        training.step()


def test_without_held_out_examples_nothing_could_be_chosen():
    with pytest.raises(MisuseError, match="held-out"):
        JointTrainer(new_network(), LinearGaussian().draw, [])


def test_every_term_improves_and_what_the_lines_tell_is_found():
    problem = LinearGaussian()
    held_out = [problem.draw(500, torch.Generator().manual_seed(5))]
    # As many latent numbers as the lines leave open, and bandwidths fit for a few dimensions.
    schedule = replace(
        PAPER.scaled(16),
        steps=30,
        batch=128,
        learning_rate=4e-3,
        fade_epochs=4.0,
        latent_bandwidths=(2.0,),
        reverse_bandwidths=(2.0,),
        bandwidth_epochs=5.0,
    )
    still = replace(schedule, epochs=1, learning_rate=1e-30, weight_decay=0.0)
    untrained, network = (new_network(latent_size=3, width=32) for _ in range(2))
    (before,) = JointTrainer(untrained, problem.draw, held_out, still, seed=3).run()
    reported = []
    history = JointTrainer(network, problem.draw, held_out, schedule, seed=3).run(reported.append)
    assert reported == history
    after = history[-1]
    shares = {
        "forward_mse": 0.05,
        "latent_mmd": 0.2,
        "backward_mse": 0.2,
        "reverse_mmd": 0.7,
        "held_out_forward_mse": 0.05,
        "held_out_latent_mmd": 0.2,
        "held_out_reverse_mmd": 0.7,
    }
    for name, share in shares.items():
        assert after.terms[name] < share * before.terms[name], name
    assert all(0.5 <= after.terms[f"bandwidth_{name}"] < 4.0 for name in ("latent", "reverse"))

    examples = problem.draw(100, torch.Generator().manual_seed(6))
    latent = torch.randn(100 * 200, 3, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        drawn = network.inverse(examples.lines.repeat_interleave(200, dim=0), latent).numpy()
    drawn, truth = drawn.reshape(100, 200, 6), examples.atmosphere.numpy()
    seen, unseen = drawn @ problem.seen, drawn @ problem.unseen
    # A standard normal number's median modulus is 0.67: that of the prior, and of what is not seen.
    assert np.median(np.abs(seen - (truth @ problem.seen)[:, None])) < 0.4
    assert np.median(np.abs(unseen - np.median(unseen, axis=1, keepdims=True))) > 0.4
    for number in range(3):
        found = np.median(seen[..., number], axis=1)
        assert np.corrcoef(found, truth @ problem.seen[:, number])[0, 1] > 0.75
