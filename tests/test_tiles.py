"""The kernel of a map: one tile, against numbers that are computed another way."""

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import disturbed
import numpy as np
import pytest
import torch
import xarray as xr
from distributed.core import error_message
from small_disks import can_mount
from toy_observation import FULL, NOT_A_NUMBER, OUTSIDE, ZERO, toy_observation, write_store
from zarr.storage import LocalStore

import pipeline.tiles as tiles
from inn.checkpoint import load_model, model_hash
from inn.posterior import sample
from inn.scaling import scale_atmosphere
from pipeline.driver import Attempt
from pipeline.errors import ClusterError, MisuseError, ModelError, StoreError
from pipeline.invert import _coordinates
from pipeline.results import VARIABLES, Flag, lay_out, open_map
from pipeline.tiles import (
    ROUNDING,
    Tile,
    TileGrid,
    TileSpec,
    compute_tile,
    invert_tile,
    judge,
    observation_hash,
    quarantine_tile,
    round_to_error,
    tile_keys,
    write_tile,
)

DRAWS = 64
GRID = TileGrid((2, 20, 18), (8, 8))
QUANTITIES = ("electron_density", "temperature", "velocity")


@pytest.fixture
def spec(tmp_path, toy, fake_model):
    """A run on the toy observation, with its map laid out."""
    store = tmp_path / "map.zarr"
    dataset = xr.open_zarr(toy, chunks=None)
    spec = TileSpec(
        observation=str(toy),
        observation_hash=observation_hash(toy),
        store=str(store),
        run="this run",
        model=str(fake_model),
        model_hash=model_hash(fake_model),
        torch_version=torch.__version__.split("+")[0],
        draws=DRAWS,
        seed=4,
        latent="sobol",
        quantiles=(0.05, 0.5, 0.9),
        calibration_error=None,
        threads=1,
    )
    lay_out(
        store,
        _coordinates(dataset),
        heights=load_model(fake_model).layout.heights,
        quantiles=spec.quantiles,
        tile=GRID.tile,
        attrs={"run": spec.run},
    )
    return spec


# Descriptions


@pytest.mark.parametrize(
    ("shape", "tile"),
    [((2, 20, 18), (8, 8)), ((1, 21, 21), (21, 21)), ((3, 1, 7), (1, 7)), ((1, 65, 64), (64, 64))],
)
def test_the_tiles_of_a_grid_hold_every_pixel_once(shape, tile):
    grid = TileGrid(shape, tile)
    seen = np.zeros(shape, dtype=int)
    for place, one in enumerate(grid):
        seen[one.region] += 1
        assert grid.index(one) == place
        assert grid[place] == one
        assert one.pixels == np.prod(seen[one.region].shape)
        # a tile is one shard: it begins at a multiple of the shard's size, and is no larger
        assert (one.y[0], one.x[0]) == (one.row * tile[0], one.column * tile[1])
    assert (seen == 1).all()
    assert len(grid) == len(list(grid))
    with pytest.raises(IndexError):
        grid[len(grid)]


def test_tiles_are_no_larger_than_the_field():
    assert TileGrid.square((2, 20, 100), 64).tile == (20, 64)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tile(0, 0, 0, (4, 4), (0, 8)),
        lambda: Tile(-1, 0, 0, (0, 4), (0, 8)),
        lambda: Tile(0, 0, 0, (0, 4), (-1, 8)),
        lambda: TileGrid((2, 20, 18), (0, 8)),
        lambda: TileGrid((0, 20, 18), (8, 8)),
    ],
)
def test_descriptions_are_checked_where_they_are_made(make):
    with pytest.raises(MisuseError):
        make()


@pytest.mark.parametrize(
    "setting",
    [
        {"quantiles": ()},
        {"quantiles": (0.5, 0.5)},
        {"quantiles": (0.9, 0.1)},
        {"quantiles": (0.5, 1.1)},
        {"draws": 1},
        {"calibration_error": -0.1},
        {"calibration_error": 1.5},
        {"calibration_error": float("nan")},
    ],
)
def test_settings_are_checked_where_they_are_made(spec, setting):
    with pytest.raises(MisuseError) as refusal:
        replace(spec, **setting)
    assert refusal.value.where == next(iter(setting))


# Judging pixels


def test_pixels_are_judged_by_their_intensities():
    halpha = np.full((2, 4, 3), 5.0, dtype=np.float32)
    ca8542 = np.full((2, 4, 2), 7.0, dtype=np.float32)
    valid = np.ones((2, 4), dtype=bool)
    halpha[0, 1, 2] = np.inf
    ca8542[0, 2, 0] = -1.0
    halpha[0, 3, 1] = 100.0
    ca8542[1, 0] = [np.nan, 0.0]
    valid[1, 1:3] = False
    halpha[1, 2] = np.nan
    quality = judge({"halpha": halpha, "ca8542": ca8542}, valid, {"halpha": 100.0, "ca8542": np.inf})
    assert quality.dtype == np.uint16
    assert quality.tolist() == [[0, 2, 4, 8], [6, 1, 1, 0]]


# Rounding


@pytest.fixture
def some_quantiles():
    """Quantiles (pixels, levels, heights) of log-normal posteriors of very different widths and sizes."""
    random = np.random.default_rng(5)
    centre = random.uniform(3, 15, (40, 1, 30))
    width = 10.0 ** random.uniform(-3, 0, (40, 1, 30))
    normal = np.array([-1.645, -0.9945, 0.0, 0.9945, 1.645])[None, :, None]
    return (10.0 ** (centre + width * normal)).astype(np.float32)


@pytest.mark.parametrize("draws", [16, 256, 4096])
def test_rounding_stays_far_below_the_sampling_error(some_quantiles, draws):
    values = some_quantiles
    rounded = round_to_error(values, values[:, 1], values[:, 3], ROUNDING / np.sqrt(draws), positive=True)
    # Sampling error of the median of a normal posterior: sqrt(pi/2) sigma / sqrt(N), here in the logarithm.
    sigma = 0.5 * np.log(values[:, 3].astype(float) / values[:, 1])[:, None]
    error = np.sqrt(np.pi / 2) * sigma / np.sqrt(draws)
    ratio = np.abs(np.log(rounded.astype(float) / values)) / error
    assert ratio.max() < 0.1
    assert np.sqrt(np.mean(ratio**2)) < 1 / 40
    assert (np.diff(rounded, axis=1) >= 0).all()
    # what it is for: most of the bits are zero
    bits = np.count_nonzero(np.unpackbits(rounded.view(np.uint8)))
    assert bits < 0.75 * np.count_nonzero(np.unpackbits(values.view(np.uint8)))


def test_rounding_of_signed_values_goes_by_their_spread():
    random = np.random.default_rng(6)
    spread = 10.0 ** random.uniform(-2, 2, (50, 1, 20))
    values = (random.normal(0, 3, (50, 1, 20)) + spread * np.array([-1.6, -1, 0, 1, 1.6])[:, None]).astype(
        np.float32
    )
    rounded = round_to_error(values, values[:, 1], values[:, 3], ROUNDING / 10, positive=False)
    assert (np.abs(rounded - values) <= 0.5 * spread / 16 / 10 * 1.001).all()
    assert (np.diff(rounded, axis=1) >= 0).all()
    again = round_to_error(rounded, values[:, 1], values[:, 3], ROUNDING / 10, positive=False)
    np.testing.assert_array_equal(again, rounded)


def test_where_all_draws_agree_nothing_is_rounded():
    values = np.array([[[3.14159274], [3.14159274]]], dtype=np.float32)
    for positive in (True, False):
        rounded = round_to_error(values, values[:, 0], values[:, 1], ROUNDING / 16, positive=positive)
        np.testing.assert_array_equal(rounded, values)


# The kernel, on the toy observation


def by_hand(observation, network, time, y, x, spec):
    """Draws (scaled only where the network's own functions do it) of one pixel, from its raw intensities."""
    pixel = observation.isel(time=time, y=y, x=x)
    lines = []
    for window in network.layout.lines:
        wanted = window.rest_wavelength + np.linspace(-window.half_width, window.half_width, window.points)
        lines.append(np.interp(wanted, pixel[f"wavelength_{window.name}"], pixel[window.name]))
    lines = np.concatenate(lines)
    lines = (lines / lines.max())[None]
    mu = float(pixel["mu"])
    draws = sample(network, lines, mu=mu, draws=spec.draws, seed=spec.seed)
    return lines, mu, {name: values[0].astype(float) for name, values in draws.items()}


def misfit_by_hand(network, lines, mu, draws):
    chosen = np.arange(DRAWS // 8, DRAWS, DRAWS // 4)
    atmosphere = torch.from_numpy(scale_atmosphere(*(draws[name][chosen] for name in QUANTITIES))).float()
    distances = []
    for microturbulence in network.emulator.microturbulence_levels:
        with torch.no_grad():
            emulated = network.emulator(atmosphere, microturbulence.expand(4), torch.full((4,), mu))
        distances.append(np.sqrt(np.mean((emulated.numpy() - lines) ** 2, axis=1)))
    return np.median(np.min(distances, axis=0))


def test_a_tile_holds_the_quantiles_of_every_pixel(spec, toy, fake_model):
    tile = GRID[4]
    receipt = invert_tile(spec, tile)
    assert receipt.tile == tile
    dataset = open_map(spec.store)
    observation = xr.open_zarr(toy, chunks=None)
    network = load_model(fake_model)
    for y, x in ((8, 8), (12, 15)):
        lines, mu, draws = by_hand(observation, network, 0, y, x, spec)
        here = dataset.isel(time=0, y=y, x=x)
        for name, scale in (("electron_density", np.log), ("temperature", np.log), ("velocity", np.array)):
            values = scale(draws[name])
            spread = 0.5 * (np.quantile(values, 0.84, axis=0) - np.quantile(values, 0.16, axis=0))
            for level, stored in zip(spec.quantiles, scale(here[name].values), strict=True):
                # Quantiles lie between order statistics; the network's are interpolated on its own scale.
                below = np.quantile(values, level, axis=0, method="lower")
                above = np.quantile(values, level, axis=0, method="higher")
                allowed = 1e-3 * spread + spread / 16 / np.sqrt(DRAWS)
                assert (stored >= below - allowed).all()
                assert (stored <= above + allowed).all()
                linear = np.quantile(values, level, axis=0)
                assert (np.abs(stored - linear) <= allowed + 0.15 * (above - below)).all()
        np.testing.assert_allclose(
            here["novelty"], network.novelty.tail_probability(lines.astype(np.float32))[0], atol=5e-3
        )
        # Of four of the draws, spread evenly over all.
        np.testing.assert_allclose(here["misfit"], misfit_by_hand(network, lines, mu, draws), rtol=0.02)


def test_nan_only_where_quality_says_why(spec):
    receipts = [invert_tile(spec, tile) for tile in GRID]
    dataset = open_map(spec.store).load()
    quality = dataset["quality"].values
    expected = np.zeros(quality.shape, dtype=np.uint16)
    expected[NOT_A_NUMBER] = Flag.NOT_FINITE
    expected[ZERO] = Flag.NOT_POSITIVE
    expected[FULL] = Flag.SATURATED
    expected[1] |= np.uint16(Flag.REGISTRATION_UNCERTAIN)
    expected[OUTSIDE] = Flag.OUTSIDE_FIELD
    np.testing.assert_array_equal(quality & ~np.uint16(Flag.NOVEL), expected)
    novel = (quality & Flag.NOVEL) != 0
    np.testing.assert_array_equal(novel, dataset["novelty"].values < 0.01)
    answered = (expected & ~np.uint16(Flag.REGISTRATION_UNCERTAIN)) == 0
    for name in QUANTITIES:
        finite = np.isfinite(dataset[name].values)
        np.testing.assert_array_equal(finite.all(axis=(3, 4)), answered)
        np.testing.assert_array_equal(finite.any(axis=(3, 4)), answered)
        assert (np.diff(dataset[name].values[answered], axis=1) >= 0).all()
    np.testing.assert_array_equal(np.isfinite(dataset["misfit"].values), answered)
    assert sum(receipt.answered for receipt in receipts) == answered.sum()
    assert sum(receipt.flags.get("outside_field", 0) for receipt in receipts) == 12


def test_a_map_that_has_gone_is_said_across_processes(spec, tmp_path):
    gone = replace(spec, store=str(tmp_path / "gone.zarr"))
    with pytest.raises(StoreError, match="has gone") as refusal:
        Attempt(partial(invert_tile, gone))(GRID[0])
    sent = error_message(refusal.value)
    assert isinstance(pickle.loads(sent["exception"].data), StoreError)
    assert "all workers see" in refusal.value.remedy


def test_what_ingest_has_found_comes_into_quality(spec, tmp_path):
    observation = tmp_path / "found.zarr"
    dataset = toy_observation()
    defects = np.zeros((2, 20, 18), np.uint8)
    defects[0, 10, 11], defects[0, 12, 13], defects[1, 14, 15] = 1, 2, 4
    defects[0, 0, 0] = 1  # outside of the field
    dataset["defects"] = (("time", "y", "x"), defects)
    change = np.full((2, 20, 18), np.nan, np.float32)
    change[0, 8:12, 11], change[0, 0, 0] = [0.01, 0.05, 0.06, np.nan], 1.0
    dataset["change_between_lines"] = (("time", "y", "x"), change, {"units": "1", "threshold": 0.05})
    dataset["poor_seeing"] = ("time", np.array([False, True]))
    dataset["header_contradiction"] = ("time", np.array([True, False]))
    dataset["series_aligned"] = ("time", np.array([False, True]))
    write_store(dataset, observation)
    plain = tiles.compute_tile(spec, GRID[0])
    spec = replace(spec, observation=str(observation), observation_hash=observation_hash(observation))
    whole = TileGrid((2, 20, 18), (20, 18))
    first, second = (tiles.compute_tile(spec, tile) for tile in whole)
    everywhere = Flag.HEADER_CONTRADICTION | Flag.REGISTRATION_UNCERTAIN  # not aligned along time
    expected = np.where(dataset.valid[0], np.uint16(everywhere), np.uint16(0))
    expected[10, 11] |= np.uint16(Flag.SPIKE | Flag.CHANGED_BETWEEN_LINES)
    expected[12, 13] |= np.uint16(Flag.DEAD_PIXEL)
    said = (
        Flag.SPIKE
        | Flag.DEAD_PIXEL
        | Flag.WAVELENGTH_MISSING
        | Flag.POOR_SEEING
        | Flag.CHANGED_BETWEEN_LINES
        | everywhere
    )
    np.testing.assert_array_equal(first["quality"] & said, expected)
    assert np.isfinite(first["temperature"][10, 11]).all()
    assert np.isnan(first["temperature"][12, 13]).all()
    of_lines = Flag.REGISTRATION_UNCERTAIN
    assert second["quality"][14, 15] & said == Flag.WAVELENGTH_MISSING | Flag.POOR_SEEING | of_lines
    assert np.isnan(second["temperature"][14, 15]).all()
    assert (plain["quality"] & said == 0).all()


def test_a_pixel_that_a_network_answers_with_no_number_is_flagged(spec, monkeypatch):
    real = tiles.quantiles_and_misfit

    def spoiled(*args, **kwargs):
        posterior, reproduced = real(*args, **kwargs)
        posterior["temperature"][1, 0, 7] = np.inf
        return posterior, reproduced

    monkeypatch.setattr(tiles, "quantiles_and_misfit", spoiled)
    receipt = invert_tile(spec, GRID[4])
    assert receipt.flags["failed"] == 1
    pixel = open_map(spec.store).isel(time=0, y=8, x=9)
    assert int(pixel["quality"]) & Flag.FAILED
    assert np.isnan(pixel["velocity"].values).all()


def test_wavelengths_that_do_not_reach_are_flagged(spec, tmp_path, toy):
    narrow = xr.open_zarr(toy, chunks=None).load()
    narrow["wavelength_halpha"] = 6564.61 + 0.5 * (narrow["wavelength_halpha"] - 6564.61)
    for name in narrow.variables:
        narrow[name].encoding = {}
    write_store(narrow, tmp_path / "narrow.zarr")
    path = str(tmp_path / "narrow.zarr")
    receipt = invert_tile(replace(spec, observation=path, observation_hash=observation_hash(path)), GRID[0])
    assert receipt.answered == 0
    assert receipt.flags["wavelength_not_covered"] == 64 - receipt.flags["outside_field"]


@pytest.mark.parametrize("of_time", [True, False])
def test_a_pixel_is_interpolated_on_its_own_wavelengths(spec, tmp_path, toy, of_time):
    """The same numbers as of an observation whose axis is where that pixel's is, in that pixel."""
    observation = xr.open_zarr(toy, chunks=None).load()
    shift = np.random.default_rng(8).uniform(-0.1, 0.1, (2, 20, 18) if of_time else (20, 18))
    tile = Tile(1, 1, 1, (8, 16), (8, 16))

    def inverted(name, dataset):
        write_store(dataset, tmp_path / name)
        given = replace(
            spec, observation=str(tmp_path / name), observation_hash=observation_hash(tmp_path / name)
        )
        return tiles.compute_tile(given, tile)

    names = ("time", "y", "x") if of_time else ("y", "x")
    halpha = (names, shift, {"units": "Angstrom"})
    found = inverted("shifted.zarr", observation.assign(wavelength_shift_halpha=halpha))
    here = (shift[1] if of_time else shift)[8:, 8:]
    for row, column in ((0, 0), (3, 4)):
        axis = observation.wavelength_halpha + here[row, column]
        moved = observation.assign_coords(wavelength_halpha=axis.assign_attrs(units="Angstrom"))
        expected = inverted(f"{row}.zarr", moved)
        for quantity in QUANTITIES:
            np.testing.assert_allclose(
                found[quantity][row, column], expected[quantity][row, column], rtol=2e-2, atol=1e-2
            )


def test_wavelengths_of_a_pixel_that_do_not_reach_are_flagged(spec, tmp_path, toy):
    observation = xr.open_zarr(toy, chunks=None).load()
    shift = np.zeros((20, 18))
    shift[6, 5], shift[6, 6], shift[0, 0] = np.nan, 1.5, np.nan
    path = tmp_path / "shifted.zarr"
    write_store(observation.assign(wavelength_shift_ca8542=(("y", "x"), shift, {"units": "Angstrom"})), path)
    given = replace(spec, observation=str(path), observation_hash=observation_hash(path))
    values = tiles.compute_tile(given, Tile(0, 0, 0, (0, 8), (0, 8)))
    assert values["quality"][6, 5] & (Flag.NOT_FINITE | Flag.WAVELENGTH_NOT_COVERED) == Flag.NOT_FINITE
    assert values["quality"][6, 6] & Flag.WAVELENGTH_NOT_COVERED
    assert values["quality"][0, 0] == Flag.OUTSIDE_FIELD
    assert not values["quality"][5, 5] & (Flag.NOT_FINITE | Flag.WAVELENGTH_NOT_COVERED)
    assert np.isnan(values["velocity"][6, 5:7]).all()
    assert np.isfinite(values["velocity"][5, 5]).all()


def test_the_receipt_is_that_of_what_is_stored(spec):
    tile = GRID[-1 + len(GRID)]  # at the edge: smaller than a shard
    receipt = invert_tile(spec, tile)
    assert tile.shape == (4, 2)
    dataset = open_map(spec.store).isel(time=[tile.time], y=slice(*tile.y), x=slice(*tile.x))
    digest = hashlib.sha256()
    for variable in VARIABLES:
        digest.update(dataset[variable.name].values.tobytes())
    assert receipt.sha256 == digest.hexdigest()
    files = [Path(spec.store) / key for key in tile_keys(tile).values()]
    assert receipt.stored == sum(file.stat().st_size for file in files)


def chunk_files(store):
    names = {variable.name for variable in VARIABLES}
    return sorted(
        str(file.relative_to(store))
        for file in Path(store).rglob("*")
        if file.is_file() and "/c/" in str(file) and file.relative_to(store).parts[0] in names
    )


def test_a_tile_is_one_file_of_each_variable(spec):
    tile = GRID[7]
    invert_tile(spec, tile)
    assert chunk_files(spec.store) == sorted(tile_keys(tile).values())
    assert tile_keys(tile)["quality"] == f"quality/c/{tile.time}/{tile.row}/{tile.column}"


def test_doing_a_tile_again_gives_the_same_bytes_whatever_was_there(spec):
    tile = GRID[8]
    receipt = invert_tile(spec, tile)
    files = {key: (Path(spec.store) / key).read_bytes() for key in tile_keys(tile).values()}
    for key in files:
        (Path(spec.store) / key).write_bytes(b"half of something")
    again = invert_tile(spec, tile)
    assert replace(again, seconds=0) == replace(receipt, seconds=0)
    assert {key: (Path(spec.store) / key).read_bytes() for key in files} == files


def test_a_tile_that_is_done_again_is_there_meanwhile(spec, monkeypatch):
    """By a worker that was thought dead, for example: another one's receipt of it may be in the journal."""
    tile = GRID[8]
    values = compute_tile(spec, tile)
    stored = write_tile(spec.store, spec.run, tile, values)
    seen = []

    def look(_):
        seen.append(sum((Path(spec.store) / key).stat().st_size for key in tile_keys(tile).values()))

    monkeypatch.setattr(LocalStore, "set", disturbed.counted(LocalStore.set, look))
    write_tile(spec.store, spec.run, tile, values)
    assert seen == [stored] * len(VARIABLES)


def test_a_tile_given_up_is_nan_and_says_so(spec):
    tile = GRID[5]
    receipt = quarantine_tile(spec, tile)
    assert (receipt.answered, receipt.flags) == (0, {"failed": tile.pixels})
    here = open_map(spec.store).isel(time=0, y=slice(*tile.y), x=slice(*tile.x))
    assert (here["quality"] == Flag.FAILED).all()
    assert np.isnan(here["temperature"]).all()


def test_all_nan_tiles_are_written_too(spec):
    invert_tile(spec, GRID[0])  # its variables have chunks; those of a tile outside of the field must, too
    values = {
        variable.name: np.full(
            (8, 8, 3, 50) if variable.profile else (8, 8), variable.fill, dtype=variable.dtype
        )
        for variable in VARIABLES
    }
    stored = write_tile(Path(spec.store), spec.run, GRID[1], values)
    assert stored > 0
    assert len(chunk_files(spec.store)) == 2 * len(VARIABLES)


# What a run must not go on with


def test_a_worker_of_an_earlier_run_cannot_write(spec):
    with pytest.raises(StoreError, match="another run"):
        invert_tile(replace(spec, run="an earlier run"), GRID[0])
    assert not chunk_files(spec.store)
    shutil.rmtree(spec.store)
    with pytest.raises(StoreError, match="gone"):
        invert_tile(spec, GRID[0])


def test_a_changed_model_is_refused(spec, tmp_path, fake_model):
    changed = tmp_path / "changed"
    shutil.copytree(fake_model, changed)
    description = changed / "model.json"
    description.write_text(description.read_text().replace("a test's own", "another's"))
    with pytest.raises(ModelError) as refusal:
        invert_tile(replace(spec, model=str(changed)), GRID[0])
    assert spec.model_hash in refusal.value.expected


def test_a_changed_or_missing_observation_is_refused(spec, tmp_path, toy):
    with pytest.raises(StoreError, match="cannot open"):
        invert_tile(replace(spec, observation=str(tmp_path / "gone.zarr")), GRID[0])
    changed = tmp_path / "changed.zarr"
    shutil.copytree(toy, changed)
    assert observation_hash(changed) == spec.observation_hash
    xr.Dataset({"mu": ("time", [0.5, 0.6])}).to_zarr(changed, mode="r+", consolidated=False)
    assert observation_hash(changed) != spec.observation_hash
    with pytest.raises(StoreError, match="not the one"):
        invert_tile(replace(spec, observation=str(changed)), GRID[0])


def test_another_torch_is_refused(spec):
    with pytest.raises(ClusterError, match="torch"):
        invert_tile(replace(spec, torch_version="1.0.0"), GRID[0])


def test_torch_has_the_threads_of_the_worker_s_share(spec):
    before = torch.get_num_threads()
    try:
        invert_tile(replace(spec, threads=2), GRID[0])
        assert torch.get_num_threads() == 2
        invert_tile(spec, GRID[0])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_model_is_loaded_once_by_all_threads_of_a_process(spec, tmp_path, fake_model, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(fake_model, copy)
    loads = []
    real = tiles.load_model
    monkeypatch.setattr(tiles, "load_model", lambda path: (loads.append(path), real(path))[1])
    mine = replace(spec, model=str(copy))
    receipts = {}

    def work(index):
        receipts[index] = invert_tile(mine, GRID[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(receipts) == [0, 1, 2, 3]
    assert loads == [copy]


FULL_DISK = """
    import pickle, sys
    from pathlib import Path
    from pipeline.errors import StoreError
    from pipeline.tiles import invert_tile, tile_keys
    spec, tile = pickle.load(open(sys.argv[1], "rb"))
    try:
        invert_tile(spec, tile)
    except StoreError as error:
        left = [key for key in tile_keys(tile).values() if (Path(spec.store) / key).exists()]
        partial = list(Path(spec.store).rglob("*.partial"))
        print(error.problem, "|", error.remedy, "|", left + partial)
"""


@pytest.mark.skipif(not can_mount(), reason="no small file system can be mounted here")
def test_without_space_a_tile_leaves_nothing_behind(spec, tmp_path):
    import pickle

    small = tmp_path / "small"
    small.mkdir()
    shutil.copytree(spec.store, tmp_path / "laid_out")
    with open(tmp_path / "task", "wb") as file:
        pickle.dump((replace(spec, store=str(small / "map.zarr")), GRID[0]), file)
    (tmp_path / "script.py").write_text(textwrap.dedent(FULL_DISK))
    # room for the empty store (a 4 kB page for every small file and directory), not for the tile
    entries = 2 * sum(1 for _ in Path(spec.store).rglob("*")) + 16
    command = (
        f"mount -t tmpfs -o size={4 * entries}k tmpfs {small} && "
        f"cp -r {tmp_path}/laid_out {small}/map.zarr && "
        f"{{ head -c 100M /dev/zero > {small}/ballast 2>/dev/null; truncate -s -20000 {small}/ballast; "
        f"{sys.executable} {tmp_path}/script.py {tmp_path}/task; }}"
    )
    answer = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert answer.stdout.startswith("no space left to write to | free some space"), answer.stderr
    assert answer.stdout.rstrip().endswith("| []")
