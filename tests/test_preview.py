"""The preview: quantiles in order whatever the weights, taught what sampling gives, and maps that say so."""

import io
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from fake_model import fake_network
from scipy.stats import norm
from torch import nn

import inn.preview
from inn.checkpoint import load_model, save_model
from inn.conditional import ConditionalNetwork
from inn.distillation import PreviewSchedule, PreviewTrainer
from inn.errors import MisuseError, ModelError
from inn.joint import JointNetwork
from inn.layout import QUANTITIES, Layout, LineWindow
from inn.posterior import QUANTILES, posterior_quantiles
from inn.preview import (
    LEVELS,
    Preview,
    disagreement,
    preview_quantiles,
    stated_disagreement,
)
from inn.scaling import scale, scale_atmosphere, unscale_atmosphere
from pipeline import check, cli
from pipeline.figures import map_figure
from pipeline.invert import invert, plan_inversion
from pipeline.report import write_report
from pipeline.results import is_preview, open_map
from pipeline.tiles import PREVIEW_ROUNDING, TileSpec, rounding_steps
from pipeline.training_set import Batch

SMALL = Layout([0.5, 1.0], (LineWindow("halpha", 6564.61, 1.4, 4), LineWindow("ca8542", 8544.44, 1.0, 4)))


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small only wait for each other in several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def network():
    return fake_network()


def pixels(count: int, seed: int = 2):
    generator = np.random.default_rng(seed)
    return generator.uniform(0.2, 1.0, (count, 60)).astype(np.float32), generator.uniform(0.3, 1.0, count)


def untaught(weights: float = 0.0, seed: int = 0) -> ConditionalNetwork:
    """A network whose preview has random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ConditionalNetwork(Layout(), context=8, embedding=16, steps=1, hidden=8)
        model.preview = Preview(model.layout, 8, width=24, depth=3, rank=12)
        with torch.no_grad():
            for values in model.preview.parameters():
                values.add_(weights * torch.randn(values.shape))
    return model.eval()


# The network


@pytest.mark.parametrize("weights", [0.0, 0.3, 3.0, 100.0])
def test_quantiles_ascend_with_their_level_whatever_the_weights(weights):
    between = np.random.default_rng(0).uniform(LEVELS[0], LEVELS[-1], 30)
    levels = np.random.default_rng(1).permutation([*between, LEVELS[0], 0.5, LEVELS[-1], 0.5])
    lines, mu = pixels(40)
    found = preview_quantiles(untaught(weights), lines, mu, 0.05, levels)
    order = np.argsort(levels, kind="stable")
    for quantity in QUANTITIES:
        assert found[quantity].shape == (40, levels.size, 50)
        assert np.isfinite(found[quantity]).all()
        assert (np.diff(found[quantity][:, order], axis=1) >= 0).all()


def test_between_the_levels_that_are_taught_it_is_linear_in_the_normal_deviate():
    model = untaught()
    preview, spread, median = model.preview, 0.7, 0.2
    with torch.no_grad():  # whatever the context, a normal distribution in network units
        preview.last.weight.zero_()
        preview.last.bias.zero_()
        distance = np.log(spread * np.diff(norm.ppf(LEVELS)))
        middle = LEVELS.index(0.5)
        raw = [*distance[:middle], median, *distance[middle:]]
        preview.mean.copy_(torch.tensor(raw)[:, None].expand_as(preview.mean))
    levels = np.array([0.01, 0.013, 0.16, 0.25, 0.5, 0.6, 0.93, 0.99])
    lines, mu = pixels(1)
    found = preview_quantiles(model, lines, mu, quantiles=levels)
    for quantity in QUANTITIES:
        scaled = scale(quantity, found[quantity].astype(np.float64))[0]
        expected = median + spread * norm.ppf(levels)
        np.testing.assert_allclose(scaled, np.tile(expected[:, None], 50), atol=2e-5)


@pytest.mark.parametrize("level", [0.0, 0.009, 0.991, 1.0])
def test_nothing_is_said_of_levels_that_were_not_taught(level):
    lines, mu = pixels(1)
    with pytest.raises(MisuseError, match="not taught") as refusal:
        preview_quantiles(untaught(), lines, mu, quantiles=(0.5, level))
    assert (refusal.value.found, refusal.value.expected) == (f"{level:g}", "0.01 to 0.99")


def test_a_pixel_s_bits_do_not_depend_on_its_neighbours(network):
    lines, mu = pixels(1100)
    whole = preview_quantiles(network, lines, mu, mu / 5)
    for chosen in ([700], np.random.default_rng(5).permutation(1100)[:623]):
        some = preview_quantiles(network, lines[chosen], mu[chosen], mu[chosen] / 5)
        for quantity in QUANTITIES:
            np.testing.assert_array_equal(some[quantity], whole[quantity][chosen])


def test_bad_pixels_are_nan_and_leave_the_others_alone(network):
    lines, mu = pixels(40)
    clean = preview_quantiles(network, lines, mu)
    spoiled, angle = lines.copy(), mu.copy()
    spoiled[3, 7], spoiled[11], angle[20] = np.nan, np.inf, np.nan
    found = preview_quantiles(network, spoiled, angle)
    bad = np.isin(np.arange(40), (3, 11, 20))
    for quantity in QUANTITIES:
        assert np.isnan(found[quantity][bad]).all()
        np.testing.assert_array_equal(found[quantity][~bad], clean[quantity][~bad])
    assert preview_quantiles(network, lines[:0], mu[:0])["velocity"].shape == (0, 5, 50)


def test_misuse_is_told(network):
    lines, mu = pixels(3)
    for arguments, words in (
        ((lines[:, :59], mu), "one row per pixel"),
        ((lines, mu, None, (0.5, 1.5)), "between 0 and 1"),
        ((lines,), "conditioned on mu"),
    ):
        with pytest.raises(MisuseError, match=words):
            preview_quantiles(network, *arguments)
    with pytest.raises(MisuseError, match="the median in their middle"):
        Preview(Layout(), 8, levels=(0.05, 0.16, 0.5, 0.84))
    for bare in (ConditionalNetwork(Layout()), JointNetwork(Layout())):
        with pytest.raises(ModelError, match="no preview") as refusal:
            preview_quantiles(bare, lines, mu)
        assert "flarefield train" in refusal.value.remedy
    with pytest.raises(ModelError, match="not known how far"):
        stated_disagreement(untaught())


def test_it_is_stored_with_its_network_in_half_precision(network, tmp_path):
    save_model(network, tmp_path / "model", network.record)
    loaded = load_model(tmp_path / "model")
    lines, mu = pixels(30)
    before, after = (preview_quantiles(each, lines, mu) for each in (network, loaded))
    for quantity in QUANTITIES:
        np.testing.assert_array_equal(after[quantity], before[quantity])
    assert {values.dtype for values in loaded.preview.parameters()} == {torch.float16}
    assert stated_disagreement(loaded) == stated_disagreement(network)
    assert loaded.preview.levels == LEVELS


# Teaching


class Gaussian(nn.Module):
    """Six numbers whose posterior is normal: its means and spreads follow the lines."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layout, self.latent_size = SMALL, 6
        self.centre = nn.Parameter(torch.randn(8, 6, generator=generator))
        self.spread = nn.Parameter(0.5 * torch.randn(8, 6, generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.preview = Preview(SMALL, 8, width=32, depth=2, rank=16)

    def context(self, lines, mu, calibration_error):
        return lines

    def moments(self, lines):
        return lines @ self.centre, 0.3 * (lines @ self.spread).exp()

    def inverse_draws(self, lines, latent, mu, calibration_error):
        mean, spread = self.moments(lines)
        return mean[:, None] + spread[:, None] * latent

    def from_scores(self, scores):
        return scores


def observed(network: Gaussian, count: int, generator: torch.Generator) -> Batch:
    lines = torch.rand(count, 8, generator=generator)
    with torch.no_grad():
        mean, spread = network.moments(lines)
    atmosphere = mean + spread * torch.randn(count, 6, generator=generator)
    return Batch(atmosphere, lines, torch.ones(count), torch.zeros(count), torch.zeros(count))


def trainer(**changes) -> PreviewTrainer:
    settings = {"epochs": 4, "steps": 80, "batch": 256, "average": 0.97, "observations": 1024}
    schedule = PreviewSchedule(**{**settings, "learning_rate": 1e-2, "held_out": 100, **changes})
    network = Gaussian()
    held_out = observed(network, schedule.held_out, torch.Generator().manual_seed(5))
    return PreviewTrainer(network, partial(observed, network), held_out, schedule, seed=6)


def test_it_learns_quantiles_that_are_known_in_closed_form():
    finished = trainer()
    history = finished.run()
    network = finished._network.eval()
    lines = torch.rand(500, 8, generator=torch.Generator().manual_seed(7))
    mean, spread = (values.detach().numpy() for values in network.moments(lines))
    levels = (0.05, 0.16, 0.4, 0.5, 0.84, 0.9, 0.95)
    found = preview_quantiles(network, lines, 0.5, 0.05, levels)
    scaled = scale_atmosphere(*(found[quantity].astype(np.float64) for quantity in QUANTITIES))
    expected = mean[:, None] + spread[:, None] * norm.ppf(levels)[:, None]
    error = (scaled - expected) / spread[:, None]
    # Means and spreads follow the lines: there is something to learn.
    assert (mean.std(axis=0) > np.median(spread, axis=0)).all()
    assert (spread.max(axis=0) > 2 * spread.min(axis=0)).all()
    assert np.sqrt(np.mean(error**2)) < 0.15
    assert history[-1].held_out_loss < 0.2 * history[0].held_out_loss
    fresh = Gaussian()
    assert torch.equal(network.centre, fresh.centre)
    assert torch.equal(network.spread, fresh.spread)


@pytest.mark.parametrize("steps", [13, 20])
def test_teaching_goes_on_bit_for_bit_from_its_state(steps):
    short = {"epochs": 3, "steps": 10, "batch": 32, "observations": 64, "teacher_draws": 32}
    undisturbed, interrupted, resumed = (trainer(**short) for _ in range(3))
    undisturbed.run()
    for _ in range(steps):
        interrupted.step()
    file = io.BytesIO()
    torch.save(interrupted.state(), file)
    file.seek(0)
    resumed.restore(torch.load(file, weights_only=True))
    assert [entry.loss for entry in resumed.run()] == [entry.loss for entry in undisturbed.history]
    for first, second in zip(resumed.module.parameters(), undisturbed.module.parameters(), strict=True):
        assert torch.equal(first, second)


def test_its_disagreement_is_that_of_quantiles_a_known_distance_away(network, monkeypatch):
    lines, mu = pixels(30)
    error = np.full(30, 0.05)
    shift = 0.25  # spreads, up

    def shifted(model, lines, mu, error, levels):
        levels = [*levels, 0.16, 0.84]
        sampled = posterior_quantiles(model, lines, mu, error, draws=512, quantiles=levels)
        scaled = scale_atmosphere(*(sampled[quantity].astype(np.float64) for quantity in QUANTITIES))
        spread = 0.5 * (scaled[:, -1] - scaled[:, -2])
        return unscale_atmosphere(scaled[:, :-2] + shift * spread[:, None])

    monkeypatch.setattr(inn.preview, "preview_quantiles", shifted)
    truth = posterior_quantiles(network, lines, mu, error, draws=512, quantiles=(0.5,))
    atmosphere = scale_atmosphere(*(truth[quantity][:, 0] for quantity in QUANTITIES))
    found = disagreement(network, atmosphere, lines, mu, error, draws=512)
    for quantity in QUANTITIES:
        for measure in ("rms", "median"):
            assert list(found[quantity][measure]) == [f"{level:g}" for level in QUANTILES]
            np.testing.assert_allclose(list(found[quantity][measure].values()), shift, atol=2e-3)
        # Truths a quarter of a spread below the middle of every interval: inside them all.
        assert list(found[quantity]["coverage"].values()) == [1.0, 1.0, 1.0]
    assert (found["examples"], found["draws"], found["heights"]) == (30, 512, [0.3, 1.5])


def test_the_fake_network_s_preview_is_as_far_off_as_its_record_says(network):
    lines, mu = pixels(200, seed=8)
    sampled = posterior_quantiles(network, lines, mu, mu, draws=1024, latent="gaussian", seed=9)
    preview = preview_quantiles(network, lines, mu, mu)
    stated = stated_disagreement(network)
    inside = (network.layout.heights > 0.3) & (network.layout.heights < 1.5)
    for quantity in QUANTITIES:
        one, other = (scale(quantity, found[quantity][..., inside]) for found in (sampled, preview))
        difference = (other - one) / (0.5 * (one[:, 3] - one[:, 1]))[:, None]
        rms = np.sqrt(np.mean(difference**2, axis=(0, 2)))
        # Gaussian draws add their own error: 1.25 / 32 at the median, 2 / 32 at 5 and 95 %.
        assert (rms < 1.3 * np.array(list(stated[quantity]["rms"].values())) + 0.06).all()


# Maps


@pytest.fixture(scope="module")
def preview_map(client, toy, fake_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("preview") / "map.zarr"
    report = invert(toy, output, model=fake_model, cluster=client, tile=8, preview=True)
    return output, report


def test_a_preview_says_that_it_is_one(preview_map, fake_model):
    output, report = preview_map
    dataset = open_map(output).load()
    stated = stated_disagreement(load_model(fake_model))
    assert is_preview(dataset)
    assert dataset.attrs["method"] == "preview"
    assert dataset.attrs["disagreement"] == stated
    assert dataset.attrs["title"].startswith("Preview")
    off = np.sqrt(np.mean(np.square(list(stated["temperature"]["rms"].values()))))
    assert f"{off:.2f} (temperature)" in dataset.attrs["comment"]
    assert "PREVIEW" in report.summary()
    assert dataset.attrs["comment"] in report.summary()
    assert "draws" not in dataset.attrs["settings"]
    assert np.isnan(dataset["misfit"]).all()
    assert "joint draws" in dataset["misfit"].attrs["comment"]
    assert "preview" in dataset["velocity"].attrs["comment"]
    assert np.isfinite(dataset["novelty"]).sum() == report.answered
    assert check.check_map(output).sound


def test_it_is_what_the_network_says_to_a_step_of_the_rounding(preview_map, toy, fake_model):
    dataset, model = open_map(preview_map[0]).load(), load_model(fake_model)
    observation = xr.open_zarr(toy, chunks=None)
    time, y, x = 0, 12, 9
    pixel = observation.isel(time=time, y=y, x=x)
    lines = np.concatenate(
        [
            np.interp(window.wavelengths, pixel[f"wavelength_{window.name}"], pixel[window.name])
            for window in model.layout.lines
        ]
    )
    found = preview_quantiles(model, (lines / lines.max())[None], float(pixel["mu"]))
    stated = stated_disagreement(model)
    for quantity in QUANTITIES:
        exact = found[quantity][0].astype(np.float64)
        stored = dataset[quantity].values[time, y, x].astype(np.float64)
        if quantity != "velocity":
            exact, stored = np.log(exact), np.log(stored)
        spread = 0.5 * (exact[3] - exact[1])
        step = PREVIEW_ROUNDING * min(stated[quantity]["rms"].values()) * spread
        assert (np.abs(stored - exact) <= 0.51 * step + 1e-5 * np.abs(exact)).all()
        assert not np.array_equal(stored, exact)


def test_a_preview_and_a_sampled_map_are_never_mixed(preview_map, client, toy, fake_model, tmp_path):
    output, _ = preview_map
    here = {"model": fake_model, "cluster": client, "tile": 8}
    again = invert(toy, output, preview=True, **here)
    assert again.resumed == again.tiles
    assert again.preview is not None
    with pytest.raises(MisuseError, match="preview and a sampled map") as refusal:
        invert(toy, output, draws=32, **here)
    assert "is a preview" in refusal.value.found
    assert "choose another output" in refusal.value.remedy
    sampled = tmp_path / "sampled.zarr"
    report = invert(toy, sampled, draws=32, region="4:8,4:8", **here)
    assert report.preview is None
    assert open_map(sampled).attrs["method"] == "posterior sampling"
    with pytest.raises(MisuseError, match="preview and a sampled map"):
        invert(toy, sampled, preview=True, region="4:8,4:8", **here)


def test_a_part_of_a_preview_has_the_bits_of_the_whole(preview_map, client, toy, fake_model, tmp_path):
    whole = open_map(preview_map[0])
    part = tmp_path / "part.zarr"
    invert(toy, part, model=fake_model, cluster=client, tile=8, preview=True, region="6:14,3:12", times="1")
    some = {"time": slice(1, 2), "y": slice(6, 14), "x": slice(3, 12)}
    for quantity in QUANTITIES:
        np.testing.assert_array_equal(open_map(part)[quantity].isel(some), whole[quantity].isel(some))


def test_a_plan_of_a_preview_draws_nothing(client, toy, fake_model, tmp_path):
    plan = plan_inversion(toy, tmp_path / "map.zarr", model=fake_model, cluster=client, tile=8, preview=True)
    assert "a preview: nothing is drawn" in plan.summary()
    assert plan.rate > 0
    assert plan.need.bytes_per_pixel > 0


@pytest.mark.parametrize(
    "wish", [{"draws": 10}, {"seed": 1}, {"latent": "gaussian"}, {"accuracy": 0.1}], ids=str
)
def test_what_is_wished_of_draws_contradicts_a_preview(client, toy, fake_model, tmp_path, wish):
    with pytest.raises(MisuseError, match="draws nothing") as refusal:
        invert(toy, tmp_path / "map.zarr", model=fake_model, cluster=client, preview=True, **wish)
    assert refusal.value.found == next(iter(wish))
    assert not (tmp_path / "map.zarr").exists()


def test_a_model_without_a_preview_is_refused_with_the_remedy(client, toy, fake_model, tmp_path):
    bare = load_model(fake_model)
    bare.preview = None
    save_model(bare, tmp_path / "bare")
    with pytest.raises(ModelError, match="no preview") as refusal:
        invert(toy, tmp_path / "map.zarr", model=tmp_path / "bare", cluster=client, preview=True)
    assert "--preview-of" in refusal.value.remedy


def test_rounding_follows_the_disagreement(fake_model, toy):
    model = load_model(fake_model)
    spec = TileSpec(
        str(toy), "", "", "", str(fake_model), "", torch.__version__, 0, 0, "sobol", (0.5,), None, 1,
        preview=True,
    )  # fmt: skip
    stated = stated_disagreement(model)
    # Rounding to steps of s errs by s over the root of 12 (root mean square).
    for quantity, step in rounding_steps(spec, model).items():
        assert step / np.sqrt(12) < 0.1 * min(stated[quantity]["rms"].values())


def test_pictures_and_page_are_marked(preview_map, tmp_path):
    dataset = open_map(preview_map[0]).load()
    figure = map_figure(dataset)
    assert figure.get_suptitle().startswith("PREVIEW")
    assert any(axes.get_title(loc="left") == "Misfit (none in a preview)" for axes in figure.axes)
    page = write_report(dataset, tmp_path / "page.html").read_text()
    assert "A preview, not the posterior." in page
    assert "held-out observations" in page


def test_the_command_makes_previews(client, toy, fake_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.cluster.load_config", lambda text: client)
    arguments = ["invert", toy, tmp_path / "map.zarr", "--model", fake_model, "--preview"]
    arguments += ["--cluster", "local", "--region", "4:8,4:8", "--times", "0"]
    for more, code in (["--draws", "10"], 2), ([], 0):
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, arguments), *more])
        assert ended.value.code == code
    assert "PREVIEW: Quantiles of a network" in capsys.readouterr().out
    assert is_preview(open_map(tmp_path / "map.zarr"))
