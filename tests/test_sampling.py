"""Choice of latents and draws: by wish, by error curve, and refused where wishes contradict each other."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from test_distillation import Gaussian

from inn.errors import MisuseError
from inn.latent import TunedLatents, draw_latent
from inn.sampling import SCORED, SPREAD, TAILS, Sampling, Truth, choose_sampling, quantile_errors

CURVES = {
    "tuned": {"16": 0.2, "32": 0.12, "64": 0.08},
    "balanced": {"32": 0.25, "128": 0.15, "512": 0.07},
    "sobol": {"32": 0.35, "128": 0.16, "512": 0.08},
}


class Known:
    """A network that knows its error curves."""

    def __init__(self, **errors):
        self.record = {"sampling": {"errors": errors}} if errors else {}


KNOWN = Known(**CURVES)


@pytest.mark.parametrize(
    ("wishes", "chosen"),
    [
        ({}, Sampling("tuned", 32, 0, 0.12)),
        ({"accuracy": 0.1}, Sampling("tuned", 64, 0, 0.08)),
        ({"accuracy": 0.12}, Sampling("tuned", 32, 0, 0.12)),
        ({"accuracy": 0.5}, Sampling("tuned", 16, 0, 0.2)),
        ({"draws": 32}, Sampling("tuned", 32, 0, 0.12)),
        # No such tuned set: as 128 independent draws' error changes to that of 100.
        ({"draws": 100}, Sampling("balanced", 100, 0, pytest.approx(0.15 * np.sqrt(1.28)))),
        # A seed is of drawn latents.
        ({"seed": 3}, Sampling("balanced", 512, 3, 0.07)),
        ({"seed": 0, "accuracy": 0.2}, Sampling("balanced", 128, 0, 0.15)),
        ({"latent": "sobol"}, Sampling("sobol", 512, 0, 0.08)),
        ({"latent": "sobol", "draws": 128}, Sampling("sobol", 128, 0, 0.16)),
        ({"latent": "gaussian", "draws": 128}, Sampling("gaussian", 128, 0, None)),
        # Beyond what is measured, errors fall as those of independent draws.
        # Quantiles further out than 5 and 95 %: eight draws beyond them, and not of those tuned for others.
        ({"quantiles": (0.01, 0.5)}, Sampling("balanced", 800, 0, pytest.approx(0.07 * np.sqrt(0.64)))),
        (
            {"quantiles": (0.025, 0.5), "accuracy": 0.3},
            Sampling("balanced", 320, 0, pytest.approx(0.0885, rel=0.01)),
        ),
        # The outermost draws are no quantiles that anything was tuned for.
        ({"quantiles": (0.0, 0.5, 1.0)}, Sampling("balanced", 512, 0, 0.07)),
        ({"accuracy": 0.035}, Sampling("balanced", 2048, 0, pytest.approx(0.035))),
    ],
)
def test_the_fewest_draws_are_taken(wishes, chosen):
    assert choose_sampling(KNOWN, **wishes) == chosen


def test_without_an_error_curve_draws_are_many_and_sobol():
    assert choose_sampling(Known()) == Sampling("sobol", 256, 0, None)
    assert choose_sampling(Known(), draws=40, seed=2) == Sampling("sobol", 40, 2, None)
    with pytest.raises(MisuseError, match="not known"):
        choose_sampling(Known(), accuracy=0.1)


@pytest.mark.parametrize(
    ("wishes", "problem"),
    [
        ({"draws": 64, "accuracy": 0.1}, "decide the same"),
        ({"accuracy": 0.0}, "above zero"),
        ({"accuracy": float("nan")}, "above zero"),
        ({"accuracy": 0.01, "latent": "tuned"}, "no tuned latents"),
        ({"accuracy": 0.001}, "no number of draws is known"),
        ({"quantiles": (0.0001, 0.5)}, "very many draws"),
        ({"quantiles": (5e-324, 0.5)}, "very many draws"),
        ({"draws": 0}, "so many draws"),
        ({"draws": 2**20 + 1}, "so many draws"),
        ({"draws": 100_000_000, "latent": "gaussian"}, "so many draws"),
        ({"seed": -1}, "a seed is"),
        ({"seed": 2**64}, "a seed is"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(wishes, problem):
    with pytest.raises(MisuseError, match=problem):
        choose_sampling(KNOWN, **wishes)


@pytest.mark.parametrize("kind", ["sobol", "gaussian", "balanced"])
def test_the_last_seed_and_no_larger_one_can_be_drawn_with(kind):
    last = choose_sampling(KNOWN, seed=2**64 - 1, draws=16, latent=kind)
    assert draw_latent(16, 4, last.seed, kind).isfinite().all()
    with pytest.raises(ValueError, match="Overflow"):
        torch.Generator().manual_seed(last.seed + 1)
    with pytest.raises(MisuseError, match="seed") as refusal:
        choose_sampling(KNOWN, seed=last.seed + 1, draws=16, latent=kind)
    assert refusal.value.expected == "0 to 18446744073709551615"


def test_levels_however_far_out_are_said_in_a_line():
    for level in (1e-4, 1e-300, 5e-324):
        with pytest.raises(MisuseError, match="very many draws") as refusal:
            choose_sampling(KNOWN, quantiles=(level, 0.5))
        assert refusal.value.found.startswith(f"{level:g} from the end")
        assert len(refusal.value.found) < 80
    assert choose_sampling(KNOWN, quantiles=(1e-5, 0.5), draws=800_000).draws == 800_000


@pytest.mark.parametrize("refused", [0.01237, 0.001, 1e-300, 5e-324])
@pytest.mark.parametrize(
    ("wishes", "least"),
    [
        ({}, 0.07 * np.sqrt(512 / 16384)),  # at 512 draws, 16,384 against them
        ({"latent": "sobol"}, 0.08 * np.sqrt(512 / 16384)),
        ({"latent": "tuned"}, 0.08),
    ],
    ids=str,
)
def test_the_least_error_that_can_be_asked_for_is_said_and_can_be_asked_for(wishes, least, refused):
    with pytest.raises(MisuseError, match="the accuracy") as refusal:
        choose_sampling(KNOWN, accuracy=refused, **wishes)
    assert refusal.value.found == f"{refused:g}"
    told, rest = refusal.value.expected.split(" ", 1)
    assert rest.startswith("or more")
    assert least <= float(told) < 1.01 * least
    chosen = choose_sampling(KNOWN, accuracy=float(told), **wishes)
    assert chosen.draws <= 16384
    assert chosen.error <= float(told)


def test_half_precision_adds_its_error():
    network = Known(**CURVES)
    network.record["sampling"]["precision_error"] = 0.05
    chosen = choose_sampling(network)
    assert chosen.with_precision(network, "float32") == chosen
    assert chosen.with_precision(network, "bfloat16").error == pytest.approx(0.13)  # 5, 12, 13
    assert chosen.with_precision(KNOWN, "bfloat16") == chosen  # not known


def test_errors_of_gaussian_posteriors_are_those_of_their_order_statistics():
    network = Gaussian()
    network.latents = TunedLatents(6, (16,))
    lines = torch.rand(60, 8, generator=torch.Generator().manual_seed(1)).numpy()
    with torch.no_grad():
        # Physical units are far from these numbers' range: keep them within it.
        network.mixing.mul_(0.1)
    found = quantile_errors(
        network, lines, kinds=("gaussian",), ladder=(64, 256), seeds=24, truth_draws=16384
    )
    assert set(found.curves) == {"tuned", "gaussian"}
    assert found.scored == 1.0  # one state each
    for draws, error in found.curves["gaussian"].items():
        # Asymptotic variance of a normal sample's quantile p: p (1 - p) / (n phi(z_p)^2).
        levels = np.array([0.05, 0.5, 0.95])
        variance = levels * (1 - levels) / (draws * norm.pdf(norm.ppf(levels)) ** 2)
        spread = 0.5 * (norm.ppf(0.84) - norm.ppf(0.16))
        assert error == pytest.approx(np.sqrt(variance.mean()) / spread, rel=0.12)
    assert found.to_json()["errors"]["tuned"].keys() == {"16"}


def test_the_error_of_gaussian_draws_is_that_of_theory():
    # Normal posteriors of other means and spreads; a quantile's error is sqrt(p (1 - p) / n) / density.
    random = np.random.default_rng(0)
    mean, spread = random.normal(size=(1, 400)), np.exp(random.normal(size=(1, 400)))
    deviates = norm.ppf((*SCORED, *SPREAD, *TAILS))[:, None]
    truth = Truth.of(mean[:, None] + spread[:, None] * deviates)
    assert truth.scored.all()
    np.testing.assert_allclose(truth.spread, spread * norm.ppf(0.84))
    drawn = mean + spread * random.normal(size=(20, 256, 400))
    found = [np.quantile(values, SCORED, axis=0)[None] for values in drawn]
    level = np.array(SCORED)
    expected = np.sqrt(np.mean(level * (1.0 - level) / 256 / norm.pdf(norm.ppf(level)) ** 2)) / norm.ppf(0.84)
    scored, everything = truth.error(found)
    assert scored == everything == pytest.approx(expected, rel=0.05)


def test_posteriors_of_two_states_far_apart_are_not_scored():
    near, far = norm.ppf((*SCORED, *SPREAD, *TAILS)), np.full(7, 50.0)
    truth = Truth.of(np.stack((near, np.where(near > 1.5, far, near)), axis=-1)[None])
    assert truth.scored.tolist() == [[True, False]]
    scored, everything = truth.error([truth.quantiles + np.array([0.5, 100.0])])
    assert scored == pytest.approx(0.5 / norm.ppf(0.84))
    assert everything == pytest.approx(np.sqrt((0.5**2 + 100.0**2) / 2) / norm.ppf(0.84))
