"""What can go wrong goes wrong here, and ends in the undisturbed map, bit for bit, or in a refusal."""

import os
import re
import shutil
import signal
import threading
import warnings

import dask
import disturbed
import numpy as np
import pytest
import xarray as xr
from distributed import Client, LocalCluster
from test_invert import PATIENCE, contents, processes, records, wait_until  # noqa: F401
from toy_observation import toy_observation, write_store

import pipeline.invert
import pipeline.tiles as tiles
from pipeline.check import check_map
from pipeline.cluster import SCHEDULER_SETTINGS, WORKER_SETTINGS, AddressConfig
from pipeline.defects import Defect
from pipeline.errors import ClusterError, FlareFieldError, MisuseError, StoreError
from pipeline.invert import invert, plan_inversion
from pipeline.observation import open_observation
from pipeline.results import Flag, flagged, open_map
from pipeline.storage import Directory
from pipeline.tiles import TileGrid, tile_keys

GRID = TileGrid((1, 20, 18), (7, 7))
MEMORY = 1 << 30


@pytest.fixture(scope="module")
def observation(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "o.zarr"
    chunks = {name: {"chunks": (1, 7, 7, n)} for name, n in (("halpha", 15), ("ca8542", 25))}
    write_store(toy_observation(times=1), path, encoding=chunks)
    return path


@pytest.fixture(scope="module")
def settings(fake_model):
    return {"model": fake_model, "draws": 8, "tile": 7}


@pytest.fixture(scope="module")
def at_once(settings):
    """A time is a tile: for what goes wrong before tiles do."""
    return {**settings, "tile": 20}


@pytest.fixture(scope="module")
def undisturbed(observation, settings, client):
    output = observation.parent / "undisturbed.zarr"
    assert not invert(observation, output, cluster=client, **settings).failed
    return contents(output)


@pytest.fixture(scope="module")
def whole(observation, at_once, client):
    """A map of one tile. Copy it before changing it."""
    output = observation.parent / "whole.zarr"
    assert not invert(observation, output, cluster=client, **at_once).failed
    return output


def sound(output, undisturbed):
    return check_map(output).sound and contents(output) == undisturbed


@pytest.fixture(scope="module")
def start(processes):  # noqa: F811
    """Start a function of `disturbed` in a process of its own, which ends with the test at the latest."""
    started = []

    def start(function, *args, **kwargs):
        process = processes.Process(target=function, args=args, kwargs=kwargs)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


# Workers


@pytest.mark.usefixtures("processes")
def test_workers_killed_or_out_of_memory_on_one_tile_again_and_again(
    tmp_path, observation, settings, client, undisturbed
):
    """One tile kills two workers in a row, one fills the memory once, one kills every worker it meets."""
    ways = {GRID[3]: ("kill", 2), GRID[5]: ("memory", 1), GRID[7]: ("kill", 99)}
    deaths = disturbed.Deaths(tmp_path, ways, 2 * MEMORY)
    output = tmp_path / "map.zarr"
    with (
        dask.config.set(
            {
                "distributed.worker.multiprocessing-method": "forkserver",
                **WORKER_SETTINGS,
                **SCHEDULER_SETTINGS,
                "distributed.scheduler.allowed-failures": 3,
            }
        ),
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            memory_limit=MEMORY,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=50,
        ) as cluster,
        Client(cluster, set_as_default=False) as other,
    ):
        other.register_plugin(deaths)
        report = invert(observation, output, cluster=other, **settings)
    died = sorted(path.name for path in tmp_path.glob("0-*"))
    assert died == [
        "0-1-0-kill-0",
        "0-1-0-kill-1",
        "0-1-2-memory-0",
        *(f"0-2-1-kill-{count}" for count in range(4)),
    ]
    (failed,) = report.failed
    assert failed.tile == GRID[7]
    assert failed.error.startswith("KilledWorker")
    dataset = open_map(output)
    assert (dataset["quality"].values[GRID[7].region] == Flag.FAILED).all()
    assert int(flagged(dataset, "failed").sum()) == GRID[7].pixels
    assert [(one.tile, one.fault) for one in check_map(output).faults] == [(GRID[7], "failed")]
    assert invert(observation, output, cluster=client, **settings).resumed == len(GRID) - 1
    assert sound(output, undisturbed)


def test_a_lost_scheduler_is_said_and_the_same_command_goes_on(
    tmp_path, observation, settings, client, undisturbed, start
):
    output = tmp_path / "map.zarr"
    server = start(disturbed.serve, tmp_path / "address", disturb=(disturbed.hold, tmp_path, 5))
    wait_until((tmp_path / "address").exists)
    errors = []

    def work():
        config = AddressConfig(address=(tmp_path / "address").read_text(), timeout=5)
        try:
            invert(observation, output, cluster=config, window=1, **settings)
        except ClusterError as error:
            errors.append(error)

    timeouts = {"distributed.comm.timeouts.connect": "1s", "distributed.comm.retry.count": 0}
    with dask.config.set(timeouts), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.journal.BATCH", 1)
        command = threading.Thread(target=work)
        command.start()
        wait_until(lambda: Directory(output).journal.exists() and len(records(output)) >= 3)
        server.kill()
        command.join(PATIENCE)
    assert not command.is_alive()
    assert "resumes" in errors[0].remedy
    assert 3 <= invert(observation, output, cluster=client, **settings).resumed < len(GRID)
    assert sound(output, undisturbed)


# Clients


def test_two_clients_on_one_map(tmp_path, observation, settings, client, undisturbed, start):
    output = tmp_path / "map.zarr"
    first = start(disturbed.run, observation, output, disturb=(disturbed.hold, tmp_path, 4), **settings)
    wait_until((tmp_path / "held").exists)
    for overwrite in (False, True):
        with pytest.raises(MisuseError, match="another command") as refusal:
            invert(observation, output, cluster=client, overwrite=overwrite, **settings)
        assert f"process {first.pid}" in refusal.value.found
    with pytest.raises(MisuseError, match="another command"):
        check_map(output)
    (tmp_path / "go_on").touch()
    first.join(PATIENCE)
    assert first.exitcode == 0
    assert sound(output, undisturbed)


def test_a_client_killed_among_its_tiles_is_resumed(
    tmp_path, observation, settings, client, undisturbed, start
):
    output = tmp_path / "map.zarr"
    first = start(disturbed.run, observation, output, disturb=(disturbed.hold, tmp_path, 6), **settings)
    wait_until((tmp_path / "held").exists)
    first.kill()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    assert not check_map(output).finished
    report = invert(observation, output, cluster=client, **settings)
    assert 3 <= report.resumed < 6
    assert sound(output, undisturbed)


def test_a_clock_that_jumps_changes_nothing(tmp_path, observation, settings, undisturbed, start):
    output = tmp_path / "map.zarr"
    command = start(disturbed.run, observation, output, disturb=(disturbed.shake_clock,), **settings)
    command.join(PATIENCE)
    assert command.exitcode == 0
    assert sound(output, undisturbed)
    assert all(0 <= record["seconds"] < PATIENCE for record in records(output) if "sha256" in record)


# Disks


def test_files_that_cannot_grow_end_the_run_with_a_remedy(
    tmp_path, observation, settings, client, undisturbed, start
):
    """The system refuses the write itself, as it does when a disk or a quota is full."""
    output = tmp_path / "map.zarr"
    limit = (disturbed.limit_files, 2048, 4)
    command = start(disturbed.refused, tmp_path / "refusal", observation, output, disturb=limit, **settings)
    command.join(PATIENCE)
    problem = (tmp_path / "refusal").read_text().splitlines()[0]
    assert problem.startswith(str(output))  # it may be a tile, or the journal
    assert problem.endswith("no space left to write to")
    assert not list(output.rglob("*.partial"))
    assert 1 <= invert(observation, output, cluster=client, **settings).resumed < len(GRID)
    assert sound(output, undisturbed)


def test_a_disk_that_is_full_when_all_tiles_are_done_is_said(
    tmp_path, observation, settings, client, start, monkeypatch
):
    """What is left to write then is what the pixels of a part that were not asked for read as."""
    output, expected = tmp_path / "map.zarr", tmp_path / "expected.zarr"
    part = {**settings, "region": "0:10,0:10"}
    limit = (disturbed.limit_files, 100, 2, "pipeline.invert:mark_unwritten")
    command = start(disturbed.refused, tmp_path / "refusal", observation, output, disturb=limit, **part)
    command.join(PATIENCE)
    said = (tmp_path / "refusal").read_text().splitlines()
    assert said[0] == f"{output}: no space left to write to"
    assert "free some space and run the same command again" in said[-1]
    assert invert(observation, output, cluster=client, **part).resumed == 4
    invert(observation, expected, cluster=client, **part)
    assert sound(output, contents(expected))


def disturbed_at(monkeypatch, count, action):
    """Do something just before the n-th tile is written."""

    def act(number):
        if number == count:
            action()

    monkeypatch.setattr(tiles, "write_tile", disturbed.counted(tiles.write_tile, act))


@pytest.mark.parametrize("damage", ["emptied", "cut", "gone"])
def test_a_map_that_loses_tiles_while_it_is_made_is_not_called_finished(
    tmp_path, observation, settings, client, undisturbed, monkeypatch, damage
):
    output = tmp_path / "map.zarr"

    def spoil():
        files = [output / tile_keys(tile)["velocity"] for tile in GRID]
        file = next(file for file in files if file.exists())
        content = file.read_bytes()
        file.unlink() if damage == "gone" else file.write_bytes(content[: -9 if damage == "cut" else 0])

    disturbed_at(monkeypatch, 7, spoil)
    with pytest.raises(StoreError, match="1 finished tiles have gone from the map or changed") as refusal:
        invert(observation, output, cluster=client, window=1, **settings)
    assert "same command" in refusal.value.remedy
    assert not check_map(output).finished
    assert invert(observation, output, cluster=client, **settings).resumed == len(GRID) - 1
    assert sound(output, undisturbed)


def test_a_map_whose_description_is_cut_while_it_is_made_is_refused(
    tmp_path, observation, settings, client, undisturbed, monkeypatch
):
    output = tmp_path / "map.zarr"
    description = output / "zarr.json"
    disturbed_at(monkeypatch, 5, lambda: description.write_bytes(description.read_bytes()[:700]))
    with pytest.raises(StoreError, match="map store"):
        invert(observation, output, cluster=client, window=1, **settings)
    with pytest.raises(MisuseError, match="is not a map") as refusal:
        invert(observation, output, cluster=client, **settings)
    assert "no `zarr.json` that can be read" in refusal.value.found
    with pytest.raises(StoreError, match="not a FlareField map"):
        check_map(output)


@pytest.mark.parametrize("name", ["longitude/c/0/0", "y/c/0", "height/c/0", "height/zarr.json"])
@pytest.mark.parametrize("cut", [True, False])
def test_coordinates_that_are_cut_or_gone_are_noticed(
    tmp_path, observation, at_once, client, whole, name, cut
):
    """A chunk that is not there reads as its fill value: nothing but a comparison tells."""
    copy = tmp_path / "map.zarr"
    shutil.copytree(whole, copy)
    shutil.copy(Directory(whole).journal, Directory(copy).journal)
    (copy / name).write_bytes((copy / name).read_bytes()[:-3]) if cut else (copy / name).unlink()
    for action in (check_map, lambda path: invert(observation, path, cluster=client, **at_once)):
        with pytest.raises(StoreError, match="coordinates"):
            action(copy)
    invert(observation, copy, cluster=client, overwrite=True, **at_once)
    assert sound(copy, contents(whole))


def test_an_observation_that_loses_data_meanwhile_spoils_nothing_silently(
    tmp_path, observation, settings, client, undisturbed, monkeypatch
):
    copy = tmp_path / "o.zarr"
    shutil.copytree(observation, copy)
    chunk, content = copy / "halpha/c/0/2/2/0", (copy / "halpha/c/0/2/2/0").read_bytes()
    disturbed_at(monkeypatch, 2, chunk.unlink)
    output = tmp_path / "map.zarr"
    with pytest.raises(StoreError, match="observation has changed"):
        invert(copy, output, cluster=client, window=1, **settings)
    with pytest.raises(StoreError, match="parts of the observation are not there"):
        invert(copy, output, cluster=client, **settings)
    chunk.write_bytes(content)
    invert(copy, output, cluster=client, **settings)
    assert sound(output, undisturbed)


@pytest.mark.parametrize("name", ["halpha/c/0/1/1/0", "ca8542/c/0/0/2/0", "valid/c/0/0/0"])
def test_an_observation_that_has_lost_data_is_not_inverted(
    tmp_path, observation, settings, client, monkeypatch, name
):
    monkeypatch.setattr("pipeline.plan.SECONDS", 0.1)  # how long and how large is not looked at
    copy = tmp_path / "o.zarr"
    dataset = open_observation(observation).load()
    dataset["valid"][0, :5, :5] = False
    sizes = {"halpha": (1, 5, 5, 15), "ca8542": (1, 5, 5, 25), "valid": (1, 5, 5)}
    encoding = {variable: {"chunks": size, "shards": size} for variable, size in sizes.items()}
    write_store(dataset.drop_encoding(), copy, encoding=encoding, write_empty_chunks=True)
    (copy / "halpha/c/0/0/0/0").unlink()  # where nothing is valid
    plan_inversion(copy, tmp_path / "map.zarr", cluster=client, **settings)
    (copy / name).unlink()
    for work in (invert, plan_inversion):
        with pytest.raises(StoreError, match="parts of the observation are not there") as refusal:
            work(copy, tmp_path / "map.zarr", cluster=client, **settings)
        assert refusal.value.found == f"no {name}"
    assert not (tmp_path / "map.zarr").exists()


@pytest.fixture(scope="module")
def flagged_observation(tmp_path_factory, settings, client):
    """An observation with a flag everywhere, and what its map holds. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("flagged")
    dataset = toy_observation(times=1)
    dataset["defects"] = ("time", "y", "x"), np.full((1, 20, 18), int(Defect.SPIKE), "u1")
    chunks = {"halpha": (1, 7, 7, 15), "ca8542": (1, 7, 7, 25), "defects": (1, 7, 7)}
    encoding = {name: {"chunks": size} for name, size in chunks.items()}
    write_store(dataset, folder / "o.zarr", encoding=encoding)
    invert(folder / "o.zarr", folder / "map.zarr", cluster=client, **settings)
    return folder / "o.zarr", contents(folder / "map.zarr")


@pytest.mark.parametrize(
    ("chunk", "first", "last"),
    [("halpha/c/0/2/2/0", 2, 9), ("defects/c/0/2/0", 2, 8), ("ca8542/c/0/1/1/0", 2, 6)],
)
def test_data_that_are_away_for_a_while_spoil_nothing_silently(
    tmp_path, flagged_observation, settings, client, monkeypatch, chunk, first, last
):
    """They are back before the run looks at the observation once more."""
    undamaged, expected = flagged_observation
    observation = tmp_path / "o.zarr"
    shutil.copytree(undamaged, observation)
    away = tmp_path / "away"

    def move(number):
        if number == first:
            (observation / chunk).rename(away)
        elif number == last:
            away.rename(observation / chunk)

    real = tiles.write_tile
    monkeypatch.setattr(tiles, "write_tile", disturbed.counted(real, move))
    output = tmp_path / "map.zarr"
    with pytest.raises(StoreError, match="observation has changed") as refusal:
        invert(observation, output, cluster=client, window=1, **settings)
    assert refusal.value.found == f"no {chunk}"
    monkeypatch.setattr(tiles, "write_tile", real)
    away.rename(observation / chunk)
    assert 0 < invert(observation, output, cluster=client, **settings).resumed < len(GRID)
    assert sound(output, expected)


def with_coordinates_lost(observation, copy, name, how):
    """A copy that xarray has saved, of which a coordinate's only chunk is gone or is no chunk any more."""
    shutil.copytree(observation, copy)
    file = copy / name / ("c/0/0" if name == "longitude" else "c/0")
    file.unlink() if how == "gone" else file.write_bytes(b"not a chunk")
    return copy


@pytest.mark.parametrize("name", ["time", "time_halpha", "time_ca8542"])
def test_times_that_were_lost_are_refused_also_where_they_count_from_the_first(
    tmp_path, at_once, client, name
):
    """Zero is what xarray then writes for the first time, and what is read where there is no chunk."""
    dataset = toy_observation(times=3)
    write_store(dataset, tmp_path / "o.zarr", encoding={name: {"chunks": (1,)}})
    assert sorted(os.listdir(tmp_path / "o.zarr" / name / "c")) == ["1", "2"]
    invert(tmp_path / "o.zarr", tmp_path / "whole.zarr", cluster=client, **at_once)
    for number in (1, 2):
        shutil.copytree(tmp_path / "o.zarr", tmp_path / f"{number}.zarr")
        (tmp_path / f"{number}.zarr" / name / "c" / str(number)).unlink()
        with pytest.raises(StoreError, match=r"not there|not in order") as refusal:
            invert(tmp_path / f"{number}.zarr", tmp_path / "map.zarr", cluster=client, **at_once)
        assert refusal.value.where == str(tmp_path / f"{number}.zarr")
        assert refusal.value.found.startswith((f"no {name}/c/{number}", f"time {number} is "))
        assert "put" in refusal.value.remedy
    assert not (tmp_path / "map.zarr").exists()


def test_times_in_disorder_are_refused_until_they_are_in_order(tmp_path, at_once, client):
    dataset = toy_observation(times=3)
    write_store(dataset.isel(time=[1, 2, 0, 2]), tmp_path / "o.zarr")
    with pytest.raises(StoreError, match="not in order") as refusal:
        invert(tmp_path / "o.zarr", tmp_path / "map.zarr", cluster=client, **at_once)
    assert refusal.value.found.startswith("time 2 is 2014-09-06T15:27:24")
    for step in ("sortby('time')", "drop_duplicates('time')"):
        assert f"`{step}`" in refusal.value.remedy
    sorted_by_time = xr.open_zarr(tmp_path / "o.zarr").sortby("time").drop_duplicates("time")
    write_store(sorted_by_time, tmp_path / "sorted.zarr")
    invert(tmp_path / "sorted.zarr", tmp_path / "map.zarr", cluster=client, **at_once)
    np.testing.assert_array_equal(open_map(tmp_path / "map.zarr").time, dataset.time)


def test_one_scan_of_ca8542_may_serve_two_times(tmp_path, at_once, client):
    dataset = toy_observation(times=3)
    dataset["time_ca8542"] = dataset["time_ca8542"].isel(time=[0, 0, 2]).assign_coords(time=dataset.time)
    write_store(dataset, tmp_path / "o.zarr")
    invert(tmp_path / "o.zarr", tmp_path / "map.zarr", cluster=client, **at_once)
    np.testing.assert_array_equal(open_map(tmp_path / "map.zarr").time_ca8542, dataset.time_ca8542)


def test_a_time_of_ca8542_may_be_unknown(tmp_path, at_once, client, caplog):
    """Nothing is computed from it: its pixels are answered, or flagged if there are no intensities either."""
    dataset = toy_observation(times=3)
    write_store(dataset, tmp_path / "known.zarr")
    invert(tmp_path / "known.zarr", tmp_path / "expected.zarr", cluster=client, **at_once)
    moments = dataset["time_ca8542"].values.copy()
    moments[1:] = np.datetime64("NaT")
    dataset["time_ca8542"] = "time", moments
    dataset["ca8542"][2] = np.nan
    encoding = {"time_ca8542": {"chunks": (1,)}}
    write_store(dataset, tmp_path / "o.zarr", encoding=encoding, write_empty_chunks=True)
    invert(tmp_path / "o.zarr", tmp_path / "map.zarr", cluster=client, **at_once)
    assert "at 2 of 3 times it is not known when Ca II was taken" in caplog.text
    found, expected = (open_map(tmp_path / name).load() for name in ("map.zarr", "expected.zarr"))
    np.testing.assert_array_equal(found.time_ca8542, moments)
    xr.testing.assert_identical(
        found.temperature[:2].drop_vars("time_ca8542"), expected.temperature[:2].drop_vars("time_ca8542")
    )
    valid = dataset["valid"].values[2]
    np.testing.assert_array_equal(flagged(found, "not_finite").values[2], valid)
    (tmp_path / "o.zarr/time_ca8542/c/2").unlink()
    with pytest.raises(StoreError, match="not there"):
        invert(tmp_path / "o.zarr", tmp_path / "again.zarr", cluster=client, **at_once)


ONE_TIME = {"halpha": (1, 20, 18, 15), "ca8542": (1, 20, 18, 25), "valid": (1, 20, 18)}


def test_a_time_that_was_blanked_is_told_from_a_lost_one_as_the_error_says(tmp_path, at_once, client):
    """xarray writes no chunk of it, which is what a lost one looks like, too."""
    dataset = toy_observation(times=2)
    dataset["halpha"][1] = dataset["ca8542"][1] = np.nan
    encoding = {name: {"chunks": size} for name, size in ONE_TIME.items()}
    write_store(dataset, tmp_path / "o.zarr", encoding=encoding)
    with pytest.raises(StoreError, match="not there") as refusal:
        invert(tmp_path / "o.zarr", tmp_path / "map.zarr", cluster=client, **at_once)
    assert refusal.value.found == "no ca8542/c/1/0/0/0, and 1 more"
    assert "`to_zarr(..., write_empty_chunks=True)`, or with `valid` false there" in refusal.value.remedy
    blanked = xr.open_zarr(tmp_path / "o.zarr").load()
    write_store(blanked, tmp_path / "whole.zarr", write_empty_chunks=True)
    masked = blanked.copy(deep=True)
    masked["valid"][1] = False
    write_store(masked, tmp_path / "masked.zarr")
    for name, flag in (("whole", "not_finite"), ("masked", "outside_field")):
        invert(tmp_path / f"{name}.zarr", tmp_path / f"map of {name}.zarr", cluster=client, **at_once)
        found = flagged(open_map(tmp_path / f"map of {name}.zarr"), flag)
        np.testing.assert_array_equal(found[1], True if name == "masked" else dataset["valid"][1])


def test_an_observation_in_zarr_2_is_converted_as_the_error_says(
    tmp_path, observation, at_once, client, whole, monkeypatch
):
    old = tmp_path / "OLD.zarr"
    open_observation(observation).drop_encoding().to_zarr(old, zarr_format=2)
    for work in (invert, plan_inversion):
        with pytest.raises(StoreError, match="another of Zarr's formats") as refusal:
            work(old, tmp_path / "map.zarr", cluster=client, **at_once)
        assert (refusal.value.where, refusal.value.found) == (str(old), "format 2")
    assert os.listdir(tmp_path) == ["OLD.zarr"]
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        eval(refusal.value.remedy.removeprefix("convert it with xarray: "), {"xr": xr})
    invert(tmp_path / "NEW.zarr", tmp_path / "map.zarr", cluster=client, **at_once)
    found, expected = (open_map(path) for path in (tmp_path / "map.zarr", whole))
    xr.testing.assert_equal(found, expected)


@pytest.mark.parametrize(
    ("moment", "file"),
    [
        ("observation_hash", "mu/c/0"),  # listed, and not yet looked at
        ("open_observation", "time_ca8542/c/0"),
        ("see_that_it_is_whole", "mu/c/0"),
    ],
)
def test_what_goes_while_an_observation_is_opened_is_missed(
    tmp_path, at_once, client, monkeypatch, moment, file
):
    dataset = toy_observation(times=1)
    dataset["time_ca8542"].encoding = {"units": "seconds since 2014-09-06", "dtype": "int64"}
    write_store(dataset, tmp_path / "o.zarr")
    gone = disturbed.counted(
        getattr(pipeline.invert, moment), lambda _: (tmp_path / "o.zarr" / file).unlink()
    )
    monkeypatch.setattr(pipeline.invert, moment, gone)
    with pytest.raises(StoreError, match="observation has changed") as refusal:
        invert(tmp_path / "o.zarr", tmp_path / "map.zarr", cluster=client, **at_once)
    assert file in refusal.value.found
    assert "put it back" in refusal.value.remedy


@pytest.mark.parametrize("how", ["gone", "junk"])
@pytest.mark.parametrize("name", ["x", "longitude", "wavelength_halpha", "time_ca8542", "time", "mu"])
def test_coordinates_that_were_lost_are_refused_also_where_nothing_says_what_was_written(
    tmp_path, observation, settings, client, name, how
):
    dataset = toy_observation(times=2)
    for time in ("time", "time_halpha", "time_ca8542"):
        dataset[time].encoding = {"units": "microseconds since 1970-01-01", "dtype": "int64"}
    write_store(dataset, tmp_path / "whole.zarr")
    copy = with_coordinates_lost(tmp_path / "whole.zarr", tmp_path / "o.zarr", name, how)
    with pytest.raises(FlareFieldError, match=r"damaged|mu is not|not there") as refusal:
        invert(copy, tmp_path / "map.zarr", cluster=client, **settings)
    assert refusal.value.where == str(copy)
    assert re.search(rf"\b{name}\b", f"{refusal.value.problem} {refusal.value.found}")
    assert refusal.value.remedy
    assert not (tmp_path / "map.zarr").exists()


def test_a_part_that_xarray_saved_is_whole(tmp_path, at_once, client):
    """xarray leaves out what equals the fill value: here the first time, and flags that are not set."""
    dataset = toy_observation(times=2)
    dataset["defects"] = ("time", "y", "x"), np.zeros((2, 20, 18), "u1")
    dataset["poor_seeing"] = "time", np.zeros(2, dtype=bool)
    write_store(dataset.isel(time=[0]), tmp_path / "o.zarr")
    assert not (tmp_path / "o.zarr/time/c").exists()
    assert not (tmp_path / "o.zarr/defects/c").exists()
    assert not invert(tmp_path / "o.zarr", tmp_path / "map.zarr", cluster=client, **at_once).failed


def test_a_chunk_that_cannot_be_decoded_costs_its_tile_and_no_other(
    tmp_path, observation, settings, client, undisturbed
):
    copy = tmp_path / "o.zarr"
    shutil.copytree(observation, copy)
    chunk = copy / "ca8542/c/0/1/2/0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:20] + np.random.default_rng(1).bytes(len(content) - 20))
    output = tmp_path / "map.zarr"
    report = invert(copy, output, cluster=client, **settings)
    assert [failed.tile for failed in report.failed] == [GRID[5]]
    assert [(one.tile, one.fault) for one in check_map(output).faults] == [(GRID[5], "failed")]
    for tile in GRID:
        for key in tile_keys(tile).values():
            same = contents(output)[key] == undisturbed[key]
            assert same or tile == GRID[5]
