"""Where a tile's numbers are computed: zero copies on the CPU, none to the host on any other device."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import array_api_strict
import numpy as np
import pytest
import torch
import xarray as xr
from test_invert import assert_quantiles_alike
from torch.profiler import ProfilerActivity, profile

import inn
import pipeline.tiles as tiles
from inn.checkpoint import model_hash
from inn.latent import draw_latent
from inn.layout import QUANTITIES
from inn.posterior import _sampled, posterior_quantiles, quantiles_and_misfit
from inn.scaling import scale_atmosphere
from pipeline.cluster import CudaConfig, LocalConfig
from pipeline.devices import array_library, gpus, to_torch
from pipeline.errors import ClusterError, MisuseError
from pipeline.invert import invert, plan_inversion
from pipeline.results import open_map
from pipeline.spectra import network_lines
from pipeline.tiles import Tile, TileSpec, compute_tile, observation_hash

LEVELS = np.array([0.05, 0.5, 0.95])
TILE = Tile(0, 0, 0, (0, 20), (0, 18))
CRISP_HALPHA = 6564.584 + 0.2 * np.arange(-7, 8)
CRISP_CA8542 = 8544.44 + 0.1 * np.arange(-12, 13)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def network():
    return inn.load_model()


@pytest.fixture(scope="module")
def lines(network):
    values = np.random.default_rng(1).uniform(0.2, 1.0, (20, network.layout.lines_size))
    values[3, 5] = np.nan
    return (values / np.nanmax(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def spec(toy, fake_model):
    """A run on the toy observation."""
    return TileSpec(
        observation=str(toy),
        observation_hash=observation_hash(toy),
        store="",
        run="",
        model=str(fake_model),
        model_hash=model_hash(fake_model),
        torch_version=torch.__version__.split("+")[0],
        draws=16,
        seed=4,
        latent="sobol",
        quantiles=(0.05, 0.5, 0.9),
        calibration_error=None,
        threads=1,
    )


# Sampling


def test_lines_are_used_where_they_are(network, lines):
    """Arrays and tensors give the same bits; memory that may not be written to is left alone."""
    expected = posterior_quantiles(network, lines, 0.7, draws=16)
    frozen = lines.copy()
    frozen.setflags(write=False)
    for same in (torch.from_dlpack(lines), frozen, lines[::-1][::-1]):
        found = posterior_quantiles(network, same, 0.7, draws=16)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
    assert np.isnan(expected["velocity"][3]).all()
    assert np.isfinite(np.delete(expected["velocity"], 3, axis=0)).all()


def test_nothing_comes_to_the_host_before_the_sorting_is_done(network, lines):
    """On torch's device without memory every copy to the host, and every look at a number, fails."""
    elsewhere = inn.load_model().to("meta")
    tensor = torch.from_numpy(lines).to("meta")
    with pytest.raises(NotImplementedError):
        tensor.cpu()
    with pytest.raises(RuntimeError, match="meta"):
        tensor.isfinite().any().item()
    angle = np.full(len(lines), 0.7)
    latent = draw_latent(16, network.latent_size, 0)
    found, misfit = _sampled(elsewhere, tensor, angle, None, latent, LEVELS, 64, checked=4)
    assert misfit.device.type == "meta"
    assert found.device.type == "meta"
    assert found.shape == (len(lines), LEVELS.size, network.layout.atmosphere_size)


# The kernel


def test_torch_takes_an_array_over_without_a_copy():
    values = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    tensor = to_torch(values)
    assert tensor.data_ptr() == values.ctypes.data
    tensor[0, 0] = 7.0
    assert values[0, 0] == 7.0


def test_a_tile_goes_from_interpolation_to_sorting_in_the_same_memory(spec, monkeypatch):
    """What is sampled, measured for novelty and for misfit lies where the interpolation left it."""
    left, sampled = [], []

    def interpolated(*args, **shifts):
        lines, scale = network_lines(*args, **shifts)
        left.append((lines, lines.ctypes.data))
        return lines, scale

    def handed_over(array):
        tensor = to_torch(array)
        assert tensor.data_ptr() == left[-1][1]
        sampled.append(tensor)
        return tensor

    monkeypatch.setattr(tiles, "network_lines", interpolated)
    monkeypatch.setattr(tiles, "to_torch", handed_over)
    monkeypatch.setattr(
        tiles,
        "quantiles_and_misfit",
        lambda model, lines, *rest, **settings: (
            sampled.append(lines),
            quantiles_and_misfit(model, lines, *rest, **settings),
        )[1],
    )
    compute_tile(spec, TILE)
    assert len(left) == 1
    assert [type(values) for values in sampled] == [torch.Tensor, torch.Tensor]


@pytest.mark.parametrize("interpolation", ["linear", "pchip"])
def test_a_tile_needs_no_more_of_its_array_library_than_the_standard(spec, monkeypatch, interpolation):
    """A strict library's arrays, on a device that NumPy cannot look at, give the bits of NumPy's."""
    spec = replace(spec, interpolation=interpolation)
    expected = compute_tile(spec, TILE)
    elsewhere = array_api_strict.Device("device1")
    made = []

    def asarray(values, dtype=None):
        made.append(array_api_strict.asarray(values, dtype=dtype, device=elsewhere))
        return made[-1]

    strict = SimpleNamespace(asarray=asarray, float32=array_api_strict.float32)
    monkeypatch.setattr(tiles, "array_library", lambda device: strict)
    found = compute_tile(spec, TILE)
    assert len(made) == 2  # both lines' intensities, each once
    with pytest.raises(RuntimeError, match="device"):
        np.asarray(made[0])
    assert np.isfinite(expected["temperature"]).any()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_a_tile_is_interpolated_as_its_run_says(spec):
    linear, cubic = (
        compute_tile(replace(spec, interpolation=kind), TILE)["misfit"] for kind in ("linear", "pchip")
    )
    answered = np.isfinite(linear)
    np.testing.assert_array_equal(answered, np.isfinite(cubic))
    assert answered.any()
    assert not np.array_equal(linear[answered], cubic[answered])
    with pytest.raises(MisuseError, match="interpolation"):
        replace(spec, interpolation="cubic")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_worker_without_a_gpu_refuses_to_compute_on_one(spec):
    assert array_library("cpu") is np
    with pytest.raises(ClusterError, match="no GPU"):
        compute_tile(replace(spec, device="cuda"), TILE)


# Runs


def test_only_what_is_not_the_default_is_among_a_runs_settings(client, toy, fake_model, tmp_path, caplog):
    """Maps that were begun before there was a choice of interpolation go on; others are refused."""
    settings = {"model": fake_model, "cluster": client, "draws": 8, "tile": 20, "times": "0"}
    output = tmp_path / "map.zarr"
    invert(toy, output, **settings)
    recorded = open_map(output).attrs["settings"]
    assert "interpolation" not in recorded
    assert recorded["device"] == "cpu"
    assert "trained with" not in caplog.text
    with pytest.raises(MisuseError, match="other settings") as refusal:
        invert(toy, output, interpolation="pchip", **settings)
    assert refusal.value.found == "interpolation: pchip"
    assert "trained with linear interpolation" in caplog.text
    invert(toy, tmp_path / "cubic.zarr", interpolation="pchip", **settings)
    assert open_map(tmp_path / "cubic.zarr").attrs["settings"]["interpolation"] == "pchip"


def test_a_map_begun_on_the_cpu_does_not_go_on_on_a_gpu(client, toy, fake_model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("pipeline.devices.find_spec", lambda name: object())
    settings = {"model": fake_model, "draws": 8, "tile": 20, "times": "0"}
    invert(toy, tmp_path / "map.zarr", cluster=client, **settings)
    with pytest.raises(MisuseError, match="other settings") as refusal:
        invert(toy, tmp_path / "map.zarr", cluster=CudaConfig(), **settings)
    assert (refusal.value.found, refusal.value.expected) == ("device: cuda", "device: cpu")


def test_where_there_is_no_gpu_nothing_is_laid_out_and_the_remedy_can_be_followed(
    client, toy, fake_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    settings = {"model": fake_model, "draws": 8, "tile": 20, "times": "0"}
    for ask in (invert, plan_inversion):
        with pytest.raises(ClusterError, match="no GPU") as refusal:
            ask(toy, tmp_path / "map.zarr", cluster=CudaConfig(), **settings)
        assert "--cluster local" in refusal.value.remedy
        assert list(tmp_path.iterdir()) == []
    invert(toy, tmp_path / "map.zarr", cluster=client, **settings)
    assert open_map(tmp_path / "map.zarr").attrs["settings"]["device"] == "cpu"


# On a GPU


def network_units(posterior):
    return scale_atmosphere(*(posterior[name].astype(np.float64) for name in QUANTITIES))


@pytest.mark.gpu
@needs_gpu
def test_quantiles_on_a_gpu_are_the_cpus(network, lines):
    """To three times what the network itself loses, at worst, on the way to a latent and back on the CPU."""
    good = torch.from_numpy(np.delete(lines, 3, axis=0)).repeat_interleave(256, dim=0)
    latent = draw_latent(256, network.latent_size, 0).repeat(len(lines) - 1, 1)
    with torch.inference_mode():
        atmosphere = network.inverse(good, latent, 0.7)
        again = network.inverse(good, network.latent(atmosphere, good, 0.7), 0.7)
    tolerance = 3.0 * float((again - atmosphere).abs().max())
    expected = network_units(posterior_quantiles(network, lines, 0.7))
    cuda = inn.load_model().to("cuda")
    found = network_units(posterior_quantiles(cuda, torch.from_numpy(lines).to("cuda"), 0.7))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("interpolation", ["linear", "pchip"])
def test_on_a_gpu_nothing_is_copied_to_the_host_between_reading_and_sorting(network, interpolation, shifted):
    """By CUDA's own record, which has the copies of every library in this process."""
    cupy = pytest.importorskip("cupy")
    generator = np.random.default_rng(8)
    halpha = generator.uniform(0.5, 2.0, (300, 15)).astype(np.float32)
    ca8542 = generator.uniform(0.2, 1.0, (300, 25)).astype(np.float32)
    shift = generator.uniform(-0.02, 0.02, 300).astype(np.float32)
    cuda = inn.load_model().to("cuda")
    latent = draw_latent(64, network.latent_size, 0)

    def sort():
        there = array_library("cuda").asarray
        shifts = {"shift_halpha": there(shift), "shift_ca8542": there(-shift)} if shifted else {}
        values, _ = network_lines(
            there(halpha), there(ca8542), CRISP_HALPHA, CRISP_CA8542, network.layout, interpolation, **shifts
        )
        assert isinstance(values, cupy.ndarray)
        tensor = to_torch(values)
        assert tensor.is_cuda
        assert tensor.data_ptr() == values.data.ptr
        found, _ = _sampled(cuda, tensor, np.full(300, 0.7), None, latent, LEVELS, None)
        torch.cuda.synchronize()
        return found

    sort()  # libraries are loaded, and kernels compiled

    def copies_to_the_host(work):
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            work()
        return [event.name for event in seen.events() if "DtoH" in event.name]

    assert copies_to_the_host(sort) == []
    assert copies_to_the_host(lambda: sort().cpu()) != []


@pytest.mark.gpu
@needs_gpu
def test_a_map_made_on_gpus_is_the_cpus_to_a_step_of_its_rounding(toy, fake_model, tmp_path):
    pytest.importorskip("dask_cuda")
    settings = {"model": fake_model, "draws": 32, "tile": 8}
    invert(toy, tmp_path / "cpu.zarr", cluster=LocalConfig(workers=1, dashboard=None), **settings)
    invert(toy, tmp_path / "gpu.zarr", cluster=CudaConfig(dashboard=None), **settings)
    one, two = (open_map(tmp_path / name).load() for name in ("cpu.zarr", "gpu.zarr"))
    assert two.attrs["settings"]["device"] == "cuda"
    assert gpus() >= 1
    xr.testing.assert_equal(one["quality"], two["quality"])
    # Its products may be in half precision on one of them alone, which changes it by 0.4 % (`inn.posterior`).
    np.testing.assert_allclose(one["misfit"], two["misfit"], rtol=0.02)
    assert_quantiles_alike(one, two, settings["draws"])
