"""The map engine: resumes after any death, refuses what it should, and always makes the same map."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import disturbed
import numpy as np
import psutil
import pytest
import xarray as xr
from distributed import Client, LocalCluster
from small_disks import can_mount, on_a_small_disk
from toy_observation import toy_observation, write_store, write_toy_observation

import pipeline.invert
import pipeline.tiles as tiles
from inn.checkpoint import model_hash
from pipeline.check import check_map
from pipeline.errors import InputError, MisuseError, ModelError, StoreError
from pipeline.invert import invert, plan_inversion
from pipeline.journal import Journal, read_journal
from pipeline.results import VARIABLES, Flag, flagged, open_map, unwritten
from pipeline.storage import Directory, lock

PATIENCE = 240  # seconds that another process may take on a busy machine
SETTINGS = {"draws": 32, "tile": 8, "seed": 3}
QUANTITIES = ("electron_density", "temperature", "velocity")


@pytest.fixture
def settings(fake_model):
    return {"model": fake_model, **SETTINGS}


@pytest.fixture
def at_once(settings):
    """A time is a tile: where tiles are not what is looked at."""
    return {**settings, "tile": 20}


@pytest.fixture(scope="module")
def undisturbed(client, toy, fake_model, tmp_path_factory):
    """A map that was made in one go."""
    output = tmp_path_factory.mktemp("undisturbed") / "map.zarr"
    report = invert(toy, output, model=fake_model, cluster=client, **SETTINGS)
    assert not report.failed
    return output


def contents(store):
    """Bytes of every file of a map, but for what tells its run and its path."""
    files = {
        str(file.relative_to(store)): file.read_bytes() for file in Path(store).rglob("*") if file.is_file()
    }
    root = json.loads(files.pop("zarr.json"))
    for name in ("run", "call"):
        root["attributes"].pop(name)
    return {**files, "zarr.json": json.dumps(root).encode()}


def records(output):
    """What the journal says of tiles, and of the end."""
    return list(read_journal(Directory(output).journal)[1])


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# A map


def test_a_map_is_complete_and_says_what_it_was_made_from(undisturbed, toy, fake_model):
    dataset = open_map(undisturbed).load()
    observation = xr.open_zarr(toy, chunks=None)
    assert not flagged(dataset, "not_done", "failed").any()
    usable = ~flagged(dataset, "outside_field", "not_finite", "not_positive", "saturated")
    assert int((~usable).sum()) == 12 + 3
    for name in QUANTITIES:
        assert (np.isfinite(dataset[name]).all(("quantile", "height")) == usable).all()
        assert (dataset[name].diff("quantile").where(usable, 0) >= 0).all()
    for name in ("time", "x", "y", "longitude", "latitude", "mu", "time_ca8542"):
        np.testing.assert_array_equal(dataset[name], observation[name])
        assert dataset[name].attrs == observation[name].attrs
    assert dataset.sel(height=1.2, method="nearest").sel(quantile=0.5)["temperature"].shape == (2, 20, 18)
    attrs = dataset.attrs
    assert attrs["made_from"]["model"] == model_hash(fake_model) == attrs["model"]["sha256"]
    assert attrs["relative_calibration"] == "assumed"
    assert attrs["height_zero"] == "a test's own"
    assert attrs["statistical_equilibrium"] == "none: a test's random numbers"
    assert attrs["model"]["record"]["grid"]["height_zero"] == "a test's own"
    assert "metrics" not in attrs["model"]["record"]  # too long to repeat
    assert attrs["settings"]["draws"] == 32
    assert attrs["observation"]["made_from"] == observation.attrs["made_from"]
    assert attrs["flarefield_version"]
    assert attrs["call"].startswith("invert(")


def test_the_journal_holds_a_receipt_of_every_tile(undisturbed):
    *receipts, last = records(undisturbed)
    assert last == {"finished": True, "tiles": 18}
    assert sorted(receipt["tile"] for receipt in receipts) == list(range(2 * 3 * 3))
    assert all(len(receipt["sha256"]) == 64 and receipt["stored"] > 0 for receipt in receipts)


def test_the_report_counts_what_is_in_the_map(client, undisturbed, toy, settings):
    report = invert(toy, undisturbed, cluster=client, **settings)  # nothing to do: it only reads the journal
    dataset = open_map(undisturbed)
    assert (report.tiles, report.resumed, report.failed) == (18, 18, ())
    assert report.pixels == dataset["quality"].size
    assert report.answered == int(np.isfinite(dataset["temperature"][..., 0, 0]).sum())
    assert report.flags["outside_field"] == int(flagged(dataset, "outside_field").sum())
    assert report.flags["registration_uncertain"] == int(flagged(dataset, "registration_uncertain").sum())
    names = {variable.name for variable in VARIABLES}
    files = [file for name in names for file in (undisturbed / name / "c").rglob("*") if file.is_file()]
    assert report.stored == sum(file.stat().st_size for file in files)
    assert "18 of 18 tiles done, 18 of them by an earlier run" in report.summary()


def test_a_finished_map_needs_no_cluster(undisturbed, toy, settings, monkeypatch):
    monkeypatch.setattr(pipeline.invert, "opened", lambda config: pytest.fail("a cluster was started"))
    before = contents(undisturbed)
    assert invert(toy, undisturbed, **settings).resumed == 18
    assert contents(undisturbed) == before


# The same map, whatever way it is made


def assert_quantiles_alike(one, two, draws):
    """Quantiles of two maps differ by no more than their rounding."""
    for name in QUANTITIES:
        a, b = (np.log(m[name]) if name != "velocity" else m[name] for m in (one, two))
        spread = 0.5 * (a.sel(quantile=0.84) - a.sel(quantile=0.16))
        step = spread / 16 / np.sqrt(draws)
        assert (np.abs(a - b) <= 1.01 * step + 1e-3 * spread).where(np.isfinite(a), True).all()


@pytest.mark.parametrize(
    "way",
    [
        {"tile": 7, "window": 1},
        {"tile": 64},
        {"tile": 8, "workers": 1, "threads": 3},
        {"tile": 20, "workers": 1, "threads": 1},
    ],
    ids=str,
)
def test_the_map_is_the_same_to_a_step_of_its_rounding(
    tmp_path, undisturbed, toy, fake_model, way, monkeypatch
):
    workers, threads = way.get("workers", 2), way.get("threads", 1)
    monkeypatch.setattr(pipeline.invert, "threads_per_task", lambda client: 3 - workers)
    with (
        LocalCluster(
            processes=False, n_workers=workers, threads_per_worker=threads, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as other,
    ):
        output = tmp_path / "map.zarr"
        changed = {**SETTINGS, "tile": way["tile"]}
        invert(toy, output, model=fake_model, cluster=other, window=way.get("window"), **changed)
    one, two = open_map(undisturbed).load(), open_map(output).load()
    assert (one["quality"] == two["quality"]).all()
    np.testing.assert_allclose(one["novelty"], two["novelty"], atol=5e-3)
    np.testing.assert_allclose(one["misfit"], two["misfit"], rtol=1e-4)
    assert_quantiles_alike(one, two, SETTINGS["draws"])


# Death and resumption


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    preload = ["disturbed", "distributed.dashboard.scheduler", "dask.array", "scipy.fftpack"]
    context.set_forkserver_preload(preload)
    with pytest.MonkeyPatch.context() as patch:
        # the server that all of them are forked from begins with the first one
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        process = context.Process(target=os.getpid)
        process.start()
        process.join()
    return context


def run(processes, *args, **settings):
    process = processes.Process(target=disturbed.run, args=args, kwargs=settings)
    process.start()
    process.join(PATIENCE)
    code = process.exitcode
    process.kill()
    return code


APPEARED = ("pipeline.journal:Journal.open", 1)

MOMENTS = [
    ("pipeline.invert:lay_out", 1),
    ("zarr:consolidate_metadata", 1),  # the store is half laid out
    ("pipeline.storage:sync_directory", 1),  # it is laid out under another name, the journal is begun
    ("pathlib:Path.rename", 1),
    APPEARED,  # the store is there, and nothing was done with it
    ("pipeline.tiles:write_tile", 1),
    ("pathlib:Path.replace", 40),  # a file of a tile lies under a temporary name
    ("pipeline.tiles:stored_bytes", 3),  # tiles are written, the last one without a receipt
    ("torn record", 2),
    ("os:fsync", 6),
    ("pipeline.tiles:quantiles_and_misfit", 3),
]


def test_killed_at_any_moment_the_same_command_makes_the_same_map(
    processes, tmp_path, toy, undisturbed, settings
):
    output = tmp_path / "map.zarr"
    done = []
    for moment in MOMENTS:
        assert run(processes, toy, output, moment, **settings) == -signal.SIGKILL, moment
        if Directory(output).journal.exists():
            done.append(sum("tile" in record for record in read_journal(Directory(output).journal)[1]))
    assert done == sorted(done)
    assert 3 < done[-1] < 18
    assert run(processes, toy, output, **settings) == 0
    assert contents(output) == contents(undisturbed)
    assert sorted(os.listdir(tmp_path)) == ["map.zarr", "map.zarr.journal"]
    # what an earlier run had recorded was not done again
    tiles_done = [record["tile"] for record in records(output) if "tile" in record]
    assert len(tiles_done) == len(set(tiles_done)) == 18


def test_what_a_map_was_begun_with_is_known_from_the_moment_it_is_there(
    processes, tmp_path, toy, client, at_once
):
    output = tmp_path / "map.zarr"
    assert run(processes, toy, output, APPEARED, **at_once) == -signal.SIGKILL
    chunk = output / "x/c/0"
    content = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(StoreError, match="coordinates or metadata are damaged"):
        invert(toy, output, cluster=client, **at_once)
    chunk.write_bytes(content)
    assert not invert(toy, output, cluster=client, **at_once).failed
    # a journal of earlier maps has that in its second line, which may be damaged
    journal = Directory(output).journal
    first, *others = journal.read_text().splitlines()
    header = {**json.loads(first), "journal": 1}
    del header["crc32"]
    hashes = json.dumps({"coordinates": header.pop("begun_with")})
    journal.write_text("\n".join([json.dumps(header), hashes, *others, ""]))
    assert invert(toy, output, cluster=client, **at_once).resumed == 2
    assert check_map(output).sound
    journal.write_text("\n".join([json.dumps(header), hashes[:-9], *others, ""]))
    for action in (check_map, lambda path: invert(toy, path, cluster=client, **at_once)):
        with pytest.raises(StoreError, match="does not say what the map was begun with"):
            action(output)


def test_a_part_killed_between_the_two_places_that_say_what_it_leaves_out(
    processes, tmp_path, toy, client, settings
):
    output, expected = tmp_path / "map.zarr", tmp_path / "expected.zarr"
    part = {**settings, "region": "0:10,0:8"}
    invert(toy, expected, cluster=client, **part)
    moment = ("zarr:consolidate_metadata", 2)  # all tiles are done, quality/zarr.json says the rest
    assert run(processes, toy, output, moment, **part) == -signal.SIGKILL
    assert unwritten(Directory(output)) == {Flag.NOT_DONE, Flag.NOT_SELECTED}
    assert not check_map(output).finished
    assert invert(toy, output, cluster=client, **part).resumed == 4
    assert check_map(output).sound
    assert contents(output) == contents(expected)
    assert not flagged(open_map(output), "not_done").any()


def test_a_killed_worker_and_a_killed_command_change_nothing(
    processes, tmp_path, toy, fake_model, client, undisturbed
):
    output = tmp_path / "map.zarr"
    settings = {"model": fake_model, **SETTINGS, "tile": 5}
    command = processes.Process(target=disturbed.run, args=(toy, output), kwargs={"workers": 2, **settings})
    command.start()
    try:
        wait_until(lambda: Directory(output).journal.exists() and len(records(output)) >= 2)
        children = psutil.Process(command.pid).children(recursive=True)
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) >= 2
        workers[0].kill()
        seen = len(records(output))
        wait_until(lambda: len(records(output)) >= min(seen + 4, 32))
        command.kill()
        command.join(PATIENCE)
        # nobody is left who could write
        wait_until(lambda: not any(worker.is_running() for worker in workers))
    finally:
        command.kill()
    report = invert(toy, output, cluster=client, **settings)
    assert report.resumed >= 6
    expected = tmp_path / "expected.zarr"
    invert(toy, expected, cluster=client, **settings)
    assert contents(output) == contents(expected)


def test_tiles_that_are_gone_or_damaged_are_done_again(tmp_path, toy, client, undisturbed, settings):
    output = tmp_path / "map.zarr"
    shutil.copytree(undisturbed, output)
    shutil.copy(Directory(undisturbed).journal, Directory(output).journal)
    (output / "temperature/c/0/1/1/0/0").unlink()
    (output / "quality/c/1/2/0").write_bytes(b"")
    journal = Directory(output).journal
    incomplete = re.sub(r'(.*"tile":0,.*)"stored":\d+,(.*)', r"\1\2", journal.read_text())
    assert incomplete != journal.read_text()
    journal.write_text(incomplete)
    assert [one.fault for one in check_map(output).faults] == ["not recorded", "missing", "damaged"]
    assert invert(toy, output, cluster=client, **settings).resumed == 15
    assert contents(output) == contents(undisturbed)


# Refusals


@pytest.mark.parametrize(
    ("change", "recorded", "wanted"),
    [
        ({"draws": 64}, "draws: 32", "draws: 64"),
        ({"seed": 4}, "seed: 3", "seed: 4"),
        ({"tile": 9}, "tile: [8, 8]", "tile: [9, 9]"),
        ({"latent": "gaussian"}, "latent: sobol", "latent: gaussian"),
        ({"quantiles": (0.5,)}, "quantiles: [0.05, 0.16, 0.5, 0.84, 0.95]", "quantiles: [0.5]"),
        ({"calibration_error": 0.1}, "calibration_error: none", "calibration_error: 0.1"),
        ({"interpolation": "pchip"}, "interpolation: linear", "interpolation: pchip"),
        ({"precision": "bfloat16"}, "precision: float32", "precision: bfloat16"),
        ({"compiled": True}, "without --compile", "with --compile"),
        (
            {"compiled": True, "draws": 64},
            "draws: 32; without --compile",
            "draws: 64; with --compile",
        ),
    ],
)
def test_changed_settings_are_refused_and_named(undisturbed, toy, client, settings, change, recorded, wanted):
    before = contents(undisturbed)
    with pytest.raises(MisuseError, match="other settings") as refusal:
        invert(toy, undisturbed, cluster=client, **{**settings, **change})
    assert (refusal.value.expected, refusal.value.found) == (recorded, wanted)
    assert "--overwrite" in refusal.value.remedy
    assert contents(undisturbed) == before


def test_another_model_or_observation_is_refused(undisturbed, tmp_path, toy, client, settings, fake_model):
    shutil.copytree(fake_model, tmp_path / "model")
    description = tmp_path / "model" / "model.json"
    description.write_text(description.read_text().replace("a test's own", "another's"))
    with pytest.raises(MisuseError, match="other settings") as refusal:
        invert(toy, undisturbed, cluster=client, **{**settings, "model": tmp_path / "model"})
    assert refusal.value.found.startswith("model: ")
    other = write_toy_observation(tmp_path / "other.zarr", half_width=1.7)
    with pytest.raises(MisuseError, match="other settings") as refusal:
        invert(other, undisturbed, cluster=client, **settings)
    assert refusal.value.found.startswith("observation: ")


def test_a_model_whose_weights_were_changed_is_refused(tmp_path, toy, client, settings, fake_model):
    shutil.copytree(fake_model, tmp_path / "model")
    weights = bytearray((tmp_path / "model" / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model" / "weights.safetensors").write_bytes(weights)
    with pytest.raises(ModelError):
        invert(toy, tmp_path / "map.zarr", cluster=client, **{**settings, "model": tmp_path / "model"})
    assert sorted(os.listdir(tmp_path)) == ["model"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "directory", "observation", "dangling link"])
def test_an_output_that_is_something_else_is_left_alone(tmp_path, toy, client, settings, kind, overwrite):
    output = tmp_path / "map.zarr"
    if kind == "file":
        output.write_text("notes")
    elif kind == "directory":
        output.mkdir()
        (output / "notes").write_text("notes")
    elif kind == "observation":
        shutil.copytree(toy, output)
    else:
        output.symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MisuseError, match="not a map") as refusal:
        invert(toy, output, cluster=client, overwrite=overwrite, **settings)
    assert refusal.value.where == str(output)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "setting",
    [
        {"draws": 1},
        {"draws": 100_000_000},
        {"seed": 2**64},
        {"latent": "uniform"},
        {"tile": 0},
        {"quantiles": (0.5, 0.2)},
        {"calibration_error": -1.0},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_before_anything_is_made(
    tmp_path, toy, client, settings, setting
):
    with pytest.raises(MisuseError):
        invert(toy, tmp_path / "map.zarr", cluster=client, **{**settings, **setting})
    assert not os.listdir(tmp_path)


def test_a_map_inside_of_what_it_is_made_from_is_refused(tmp_path, toy, client, settings, fake_model):
    observation, model = tmp_path / "o.zarr", tmp_path / "model"
    shutil.copytree(toy, observation)
    shutil.copytree(fake_model, model)
    (tmp_path / "link").symlink_to(observation)
    before = sorted(tmp_path.rglob("*"))
    for folder in (observation, model, tmp_path / "link", observation / "halpha"):
        for work in (invert, plan_inversion):
            with pytest.raises(MisuseError, match="inside of what it is made from") as refusal:
                work(observation, folder / "map.zarr", cluster=client, **{**settings, "model": model})
            assert refusal.value.where == str(folder / "map.zarr")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_directory_is_named(tmp_path, toy, client, settings):
    with pytest.raises(MisuseError, match="directory") as refusal:
        invert(toy, tmp_path / "gone" / "map.zarr", cluster=client, **settings)
    assert refusal.value.where == str(tmp_path / "gone")


def test_a_map_without_its_journal_is_refused(tmp_path, undisturbed, toy, client, settings):
    shutil.copytree(undisturbed, tmp_path / "map.zarr")
    with pytest.raises(StoreError, match="journal is missing"):
        invert(toy, tmp_path / "map.zarr", cluster=client, **settings)
    settings_of = open_map(undisturbed).attrs["settings"]
    Journal.create(Directory(tmp_path / "map.zarr").journal, "0" * 32, settings_of).close()
    with pytest.raises(StoreError, match="different runs"):
        invert(toy, tmp_path / "map.zarr", cluster=client, **settings)


def test_a_second_command_on_the_same_map_is_refused(undisturbed, toy, client, settings):
    with lock(undisturbed), pytest.raises(MisuseError, match="another command"):
        invert(toy, undisturbed, cluster=client, **settings)


def test_wavelengths_that_do_not_reach_are_refused(tmp_path, client, settings):
    narrow = write_toy_observation(tmp_path / "narrow.zarr", half_width=1.2)
    with pytest.raises(InputError, match="halpha is too short") as refusal:
        invert(narrow, tmp_path / "map.zarr", cluster=client, **settings)
    assert "6563.410 to 6565.810" in refusal.value.found
    assert not (tmp_path / "map.zarr").exists()


def test_a_mu_that_cannot_be_is_refused(tmp_path, client, settings):
    observation = toy_observation()
    observation["mu"] = observation["mu"].copy(data=[0.5, np.nan])
    write_store(observation, tmp_path / "o.zarr")
    for times in ("1", "0,1"):
        if times != "1":
            observation["mu"] = observation["mu"].copy(data=[0.5, 1.5])
            shutil.rmtree(tmp_path / "o.zarr")
            write_store(observation, tmp_path / "o.zarr")
        with pytest.raises(InputError, match="mu"):
            invert(tmp_path / "o.zarr", tmp_path / "map.zarr", cluster=client, times=times, **settings)


def test_a_time_off_the_disc_is_flagged(tmp_path, client, at_once, caplog):
    observation = toy_observation()
    write_store(observation, tmp_path / "on.zarr")
    invert(tmp_path / "on.zarr", tmp_path / "whole.zarr", cluster=client, **at_once)
    observation["mu"] = observation["mu"].copy(data=[float(observation["mu"][0]), np.nan])
    write_store(observation, tmp_path / "off.zarr")
    invert(tmp_path / "off.zarr", tmp_path / "map.zarr", cluster=client, **at_once)
    expected, found = (open_map(tmp_path / name).load() for name in ("whole.zarr", "map.zarr"))
    np.testing.assert_array_equal(found.temperature[0], expected.temperature[0])
    assert np.isnan(found.temperature[1]).all()
    valid = observation["valid"].values[1]
    np.testing.assert_array_equal(flagged(found, "not_finite").values[1] & valid, valid)
    assert "at 1 of 2 times" in caplog.text


# Tiles that fail


def test_a_tile_whose_data_cannot_be_decoded_is_quarantined(tmp_path, client, settings):
    path = tmp_path / "o.zarr"
    chunks = {name: {"chunks": (1, 8, 8, n)} for name, n in (("halpha", 15), ("ca8542", 25))}
    write_store(toy_observation(), path, encoding=chunks)
    (path / "ca8542/c/1/0/1/0").write_bytes(b"not a chunk")
    report = invert(path, tmp_path / "map.zarr", cluster=client, **settings)
    (failed,) = report.failed
    assert (failed.tile.time, failed.tile.y, failed.tile.x, failed.attempts) == (1, (0, 8), (8, 16), 3)
    assert f"tile at {failed.tile}" in report.summary()
    dataset = open_map(tmp_path / "map.zarr")
    bad = np.zeros((2, 20, 18), dtype=bool)
    bad[failed.tile.region] = True
    np.testing.assert_array_equal(flagged(dataset, "failed"), bad)
    assert np.isnan(dataset["temperature"].values[bad]).all()
    assert (dataset["quality"].values[bad] == Flag.FAILED).all()
    (record,) = [record for record in records(tmp_path / "map.zarr") if "error" in record]
    assert record["error"] == failed.error
    assert report.flags["failed"] == 64


def test_a_failed_tile_is_tried_again_by_the_same_command(
    tmp_path, toy, client, undisturbed, settings, monkeypatch
):
    real = tiles.network_lines
    state = {"broken": True}

    def unreliable(halpha, *args, **keywords):
        if state["broken"] and len(halpha) == 16:  # the tiles at the right edge: 8 x 2 pixels
            raise OSError("a disk coughs")
        return real(halpha, *args, **keywords)

    monkeypatch.setattr(tiles, "network_lines", unreliable)
    output = tmp_path / "map.zarr"
    report = invert(toy, output, cluster=client, **settings)
    assert len(report.failed) == 4
    assert all("a disk coughs" in failed.error for failed in report.failed)
    state["broken"] = False
    report = invert(toy, output, cluster=client, **settings)
    assert (report.resumed, report.failed) == (14, ())
    assert "failed" not in report.flags
    assert contents(output) == contents(undisturbed)


def test_an_error_that_concerns_the_run_ends_it_and_keeps_what_is_done(
    tmp_path, toy, client, undisturbed, settings, monkeypatch
):
    real = tiles.write_tile

    def five_only(number):
        if number > 5:
            raise StoreError("no more")

    monkeypatch.setattr(tiles, "write_tile", disturbed.counted(real, five_only))
    output = tmp_path / "map.zarr"
    with pytest.raises(StoreError, match="no more"):
        invert(toy, output, cluster=client, window=4, **settings)
    kept = len(records(output))
    assert 5 - sum(client.nthreads().values()) <= kept <= 5  # all but what was in flight
    monkeypatch.setattr(tiles, "write_tile", real)
    assert invert(toy, output, cluster=client, **settings).resumed == kept
    assert contents(output) == contents(undisturbed)


# Starting over


def test_starting_over_keeps_the_old_map_until_the_new_one_is_finished(
    tmp_path, toy, client, undisturbed, settings, at_once, monkeypatch
):
    output = tmp_path / "map.zarr"
    invert(toy, output, cluster=client, **{**at_once, "draws": 16})
    before, old_run = contents(output), open_map(output).attrs["run"]
    seen = []
    real = tiles.write_tile

    def watching(store, *args):
        seen.append((Path(store) != output, contents(output) == before))
        return real(store, *args)

    monkeypatch.setattr(tiles, "write_tile", watching)
    report = invert(toy, output, cluster=client, overwrite=True, **settings)
    assert report.resumed == 0
    assert len(seen) == 18
    assert set(seen) == {(True, True)}
    assert contents(output) == contents(undisturbed)
    assert sorted(os.listdir(tmp_path)) == ["map.zarr", "map.zarr.journal"]
    # a worker that survived the old run finds that the store is another's
    with pytest.raises(StoreError, match="another run"):
        real(output, old_run, tiles.TileGrid((2, 20, 18), (8, 8))[0], {})
    assert invert(toy, output, cluster=client, **settings).resumed == 18


SWAP_MOMENTS = [
    ("pipeline.tiles:write_tile", 4),  # the new map is begun
    ("pipeline.invert:swap", 1),  # it is finished
    ("pathlib:Path.rename", 1),  # the old map is still there
    ("pathlib:Path.rename", 1),  # it has been moved away: nothing is at its place
    ("os:replace", 1),  # the new map is there, the old journal beside it
    ("shutil:rmtree", 1),  # the old map is still beside it
]


def test_starting_over_can_be_killed_at_any_moment(
    processes, tmp_path, toy, client, undisturbed, settings, at_once
):
    output = tmp_path / "map.zarr"
    invert(toy, output, cluster=client, **{**at_once, "draws": 16})
    replacing = {**settings, "overwrite": True}
    for moment in SWAP_MOMENTS:
        # the last rename is that of the new map when the old one has been moved already
        if output.exists() and moment == SWAP_MOMENTS[3]:
            moment = ("pathlib:Path.rename", 2)
        assert run(processes, toy, output, moment, **replacing) == -signal.SIGKILL, moment
    report = invert(toy, output, cluster=client, **settings)
    assert report.resumed == 18
    assert contents(output) == contents(undisturbed)
    assert sorted(os.listdir(tmp_path)) == ["map.zarr", "map.zarr.journal"]


def test_a_replacement_that_is_finished_is_not_made_once_more(processes, tmp_path, toy, client, settings):
    output, other = tmp_path / "map.zarr", {**settings, "draws": 16}
    invert(toy, output, cluster=client, **other)
    for moment in SWAP_MOMENTS[1:3]:
        assert run(processes, toy, output, moment, overwrite=True, **settings) == -signal.SIGKILL
    report = invert(toy, output, cluster=client, overwrite=True, **settings)
    assert report.resumed == 18
    assert open_map(output).attrs["settings"]["draws"] == settings["draws"]
    # As another map, or as what stands there already, it is.
    assert invert(toy, output, cluster=client, overwrite=True, **settings).resumed == 0
    assert run(processes, toy, output, SWAP_MOMENTS[1], overwrite=True, **settings) == -signal.SIGKILL
    assert invert(toy, output, cluster=client, overwrite=True, **other).resumed == 0
    assert sorted(os.listdir(tmp_path)) == ["map.zarr", "map.zarr.journal"]


def test_a_replacement_goes_on_where_it_was_killed(
    processes, tmp_path, toy, client, undisturbed, settings, at_once
):
    output = tmp_path / "map.zarr"
    invert(toy, output, cluster=client, **{**at_once, "draws": 16})
    moment = ("pipeline.tiles:write_tile", 6)
    assert run(processes, toy, output, moment, overwrite=True, **settings) == -signal.SIGKILL
    assert open_map(output).attrs["settings"]["draws"] == 16
    with pytest.raises(MisuseError, match="other settings"):
        invert(toy, output, cluster=client, **settings)
    assert 3 <= invert(toy, output, cluster=client, overwrite=True, **settings).resumed <= 5
    assert contents(output) == contents(undisturbed)
    assert sorted(os.listdir(tmp_path)) == ["map.zarr", "map.zarr.journal"]


# A full disk

FULL_DISK = """
    import json, logging, os, shutil, sys
    from pathlib import Path
    from distributed import Client, LocalCluster
    import pipeline.journal
    import pipeline.tiles
    from pipeline.errors import StoreError
    from pipeline.invert import invert
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    pipeline.journal.BATCH = 1
    small, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    cluster = LocalCluster(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=":0")
    client = Client(cluster)
    write, calls = pipeline.tiles.write_tile, []
    def fill_and_write(*given):
        calls.append(1)
        if len(calls) == 6:
            (small / "ballast").write_bytes(bytes(shutil.disk_usage(small).free))
        return write(*given)
    pipeline.tiles.write_tile = fill_and_write
    try:
        invert(output=small / "map.zarr", cluster=client, window=2, **settings)
    except StoreError as error:
        print(json.dumps([error.problem, error.remedy]))
    os.unlink(small / "ballast")
    report = invert(output=small / "map.zarr", cluster=client, **settings)
    print(json.dumps([report.resumed, len(report.failed)]))
"""


@pytest.mark.skipif(not can_mount(), reason="no small file system can be mounted here")
def test_a_full_disk_ends_the_run_with_a_remedy_and_loses_nothing(tmp_path, toy, undisturbed, settings):
    # room for the whole map, until something else fills the disk while it is made
    size = sum(4096 * (1 + len(content) // 4096) for content in contents(undisturbed).values())
    lines = on_a_small_disk(tmp_path, f"size={4 * size}", FULL_DISK, observation=str(toy), **settings)
    assert lines[0] == [
        "no space left to write to",
        "free some space and run the same command again: it resumes, finished tiles are kept",
    ]
    resumed, failed = lines[1]
    assert 0 < resumed < 18
    assert failed == 0
    assert contents(tmp_path / "copy/map.zarr") == contents(undisturbed)


# While it runs


def test_an_unfinished_map_can_be_looked_at(tmp_path, toy, client, settings, monkeypatch):
    reached, go_on = threading.Event(), threading.Event()

    def wait(number):
        if number == 6:
            reached.set()
            go_on.wait(PATIENCE)

    monkeypatch.setattr(tiles, "write_tile", disturbed.counted(tiles.write_tile, wait))
    output = tmp_path / "map.zarr"
    arguments = {"cluster": client, "window": 1, **settings}
    work = threading.Thread(target=invert, args=(toy, output), kwargs=arguments)
    work.start()
    try:
        assert reached.wait(PATIENCE)
        dataset = open_map(output).load()
        waiting_pixels = flagged(dataset, "not_done")
        assert int((~waiting_pixels).sum()) == 5 * 64 - 8 * 6  # the third tile of a row is narrower
        assert np.isnan(dataset["velocity"].where(waiting_pixels, drop=True)).all()
    finally:
        go_on.set()
        work.join()
    assert not flagged(open_map(output), "not_done").any()


def test_progress_and_dashboard_go_to_the_log(tmp_path, toy, client, at_once, caplog):
    with caplog.at_level("INFO", logger="flarefield"):
        invert(toy, tmp_path / "map.zarr", cluster=client, **at_once)
    assert any("inverting: 720/720 pixels (100 %)" in record.getMessage() for record in caplog.records)
