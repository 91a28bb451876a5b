"""Networks whose drawing torch has compiled: the same answer, and what happens where there is no compiler."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch

from inn.checkpoint import load_model
from inn.joint import JointNetwork
from inn.layout import QUANTITIES, Layout
from inn.posterior import QUANTILES, compile_draws, posterior_quantiles
from pipeline.cli import main
from pipeline.errors import MisuseError
from pipeline.invert import invert, plan_inversion
from pipeline.results import open_map
from tests.toy_observation import write_toy_observation

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler here"
)
SETTINGS = {"draws": 16, "tile": 8, "quantiles": (0.05, 0.16, 0.5, 0.84)}


@needs_compiler
def test_a_compiled_joint_network_draws_the_same():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = JointNetwork(Layout(), blocks=1).eval()
    lines = np.random.default_rng(1).random((5, network.layout.lines_size), dtype=np.float32)
    plain = posterior_quantiles(network, lines, draws=16)
    compile_draws(network)
    compiled = posterior_quantiles(network, lines, draws=16)
    for quantity in QUANTITIES:
        np.testing.assert_allclose(compiled[quantity], plain[quantity], rtol=1e-4, atol=1e-4)


@needs_compiler
def test_the_bundled_network_can_be_compiled_too():
    """Its draws are normal scores, which those of the other networks here are not."""
    network = load_model()
    lines = np.random.default_rng(1).uniform(0.2, 1.0, (32, network.layout.lines_size)).astype(np.float32)
    plain = posterior_quantiles(network, lines, 0.7, draws=64)
    compile_draws(network)
    compiled = posterior_quantiles(network, lines, 0.7, draws=64)
    for quantity in QUANTITIES:
        low, high = (plain[quantity][:, QUANTILES.index(level)] for level in (0.16, 0.84))
        change = np.abs(compiled[quantity] - plain[quantity]) / (0.5 * (high - low))[:, None]
        assert change.max() < 0.01
        assert np.sqrt(np.mean(np.square(change))) < 1e-3


@needs_compiler
def test_a_map_by_a_compiled_network_is_the_same_to_its_rounding(tmp_path, client, fake_model):
    observation = write_toy_observation(tmp_path / "toy.zarr", times=1, rows=8, columns=16)
    maps = []
    for compiled in (False, True):
        output = tmp_path / f"{compiled}.zarr"
        settings = {"model": fake_model, "cluster": client, "compiled": compiled, **SETTINGS}
        plan = plan_inversion(observation, output, **settings)
        report = invert(observation, output, **settings)
        assert (report.tiles, report.failed, plan.need.pixels) == (2, (), 128)
        maps.append(open_map(output).load())
    plain, quick = maps
    np.testing.assert_array_equal(quick["quality"], plain["quality"])
    np.testing.assert_allclose(quick["misfit"], plain["misfit"], rtol=1e-4)
    for quantity in QUANTITIES:
        change = np.abs(quick[quantity] - plain[quantity])
        spread = 0.5 * np.abs(plain[quantity].sel(quantile=0.84) - plain[quantity].sel(quantile=0.16))
        # At most the next multiple of the step of 1/16 spread over the root of the draws, twice in factors.
        assert float((change / spread).max()) < 2 / 16 / 4
    with pytest.raises(MisuseError, match="other settings") as refusal:
        invert(observation, tmp_path / "True.zarr", model=fake_model, cluster=client, **SETTINGS)
    assert (refusal.value.found, refusal.value.expected) == ("without --compile", "with --compile")


def test_a_preview_has_nothing_to_compile(tmp_path, toy, fake_model, client):
    with pytest.raises(MisuseError, match="draws nothing") as refusal:
        invert(toy, tmp_path / "map.zarr", model=fake_model, cluster=client, preview=True, compiled=True)
    assert refusal.value.found == "compile"


def test_without_a_compiler_the_command_says_so(tmp_path, fake_model, monkeypatch, capsys):
    """The variable names a compiler that is not there when torch is loaded by the worker, a new process."""
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "one.yaml").write_text("kind: local\nworkers: 1\ndashboard: null\n")
    where = ["--cluster", tmp_path / "one.yaml", "--model", fake_model]
    observation = write_toy_observation(tmp_path / "toy.zarr", times=1, rows=8, columns=16)
    arguments = [observation, tmp_path / "map.zarr", *where, "--draws", 16, "--compile"]
    with pytest.raises(SystemExit) as end:
        main(["invert", *map(str, arguments)])
    said = " ".join("".join(capsys.readouterr()).split())
    assert end.value.code == 1, said
    assert "cannot compile the network" in said
    assert "/nowhere/g++" in said
    assert "leave --compile out" in said
