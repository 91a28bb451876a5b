"""The plan before a run: what it counts and estimates, against the run; what does not fit is refused."""

import hashlib
import os
import re
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from small_disks import can_mount, on_a_small_disk
from test_invert import APPEARED, SWAP_MOMENTS, processes  # noqa: F401
from test_invert import run as run_and_kill
from toy_observation import toy_observation, write_store, write_toy_observation

import inn.posterior
import pipeline.invert
import pipeline.plan
from inn.posterior import draw_atmospheres
from inn.preview import Preview
from inn.sampling import Sampling
from pipeline.check import check_map
from pipeline.cli import main
from pipeline.errors import FlareFieldError, InputError, MisuseError, StoreError
from pipeline.invert import invert, plan_inversion
from pipeline.plan import Need, Plan, free_files, take_sample
from pipeline.results import VARIABLES, Flag, open_map
from pipeline.storage import Directory, lock
from pipeline.tiles import TileGrid, TileSpec, computed_pixels

SETTINGS = {"draws": 32, "tile": 8, "seed": 3}


@pytest.fixture
def settings(fake_model, monkeypatch):
    monkeypatch.setattr(pipeline.plan, "SECONDS", 0.1)
    return {"model": fake_model, **SETTINGS}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """An observation of one time. Copy it before changing it."""
    return write_toy_observation(tmp_path_factory.mktemp("single") / "o.zarr", times=1)


@pytest.fixture
def few(settings, monkeypatch):
    """Settings of 4 tiles a time; how large they get is not looked at: a sample is as small as can be."""
    for name, least in (("SECONDS", 0.0), ("LAID_OUT", 1), ("TASKS", 1)):
        monkeypatch.setattr(pipeline.plan, name, least)
    return {**settings, "tile": 10, "draws": 8}


@pytest.fixture
def disk(monkeypatch):
    """A disk with as much space as one says."""
    state = SimpleNamespace(free=10**12)
    monkeypatch.setattr(pipeline.plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=state.free))
    return state


def need(**changes):
    return replace(Need(10, 40_000, 30_000, 30_000, 300.0, 1000.0, bytes_beside=0, files=180), **changes)


def plan_of(needed, **changes):
    settings = {"tiles_done": 0, "pixels_done": 0, "free": 10**8, "sampled": 500}
    settings |= {"tasks": 4, "threads": 2, "rate": 100.0, "sampling": Sampling("tuned", 64, 0, 0.127)}
    return Plan("map.zarr", need=needed, **{**settings, **changes})


# Arithmetic


def test_time_goes_by_whole_tiles_and_space_by_whole_blocks():
    # 10 tiles of 3,000 pixels, each 30 s, 4 at a time: three rounds.
    assert plan_of(need()).seconds == pytest.approx(90.0)
    assert plan_of(need(), tasks=20).seconds == pytest.approx(30.0)
    assert need().stored == 9_000_000 + 10 * 1000
    # Each of the files and directories leaves as much as a block unused; a tenth more than expected.
    assert need().space == 1.1 * need().stored + 180 * 4096
    assert need(block=1 << 16).space == 1.1 * need().stored + 180 * 65536
    # Whole batches are computed, whatever is asked for of them.
    assert plan_of(need(computed=90_000)).seconds == pytest.approx(270.0)
    assert "0:04:30 (h:mm:ss), 133 pixels/s" in plan_of(need(computed=90_000)).summary()
    assert plan_of(need(), free=need().space).fits
    assert not plan_of(need(), free=need().space - 1).fits
    assert plan_of(need(), free=None).fits
    assert need(bytes_beside=500).space == need().space + 550
    assert "about 9.5 MB (225 bytes a pixel)" in plan_of(need(bytes_beside=500_000)).summary()


def test_a_plan_says_what_it_assumes():
    text = plan_of(need(), tiles_done=3, pixels_done=12_000).summary()
    assert text.splitlines() == [
        "map.zarr: 10 tiles (40,000 pixels) to do; 3 tiles (12,000 pixels) are done",
        "  about 30,000 of the pixels lie within both lines' field",
        "  size: about 9.0 MB (225 bytes a pixel); 100.0 MB are free",
        "  sampling: 64 tuned draws a pixel (which leaves the quantiles at 5, 50 and 95 % an error of 0.13 "
        "of the posterior's spread)",
        "  time: about 0:01:30 (h:mm:ss), 400 pixels/s",
        "  assuming 4 tiles at a time, on 2 cores each, at the pace of 500 pixels inverted just now",
    ]
    assert "IT DOES NOT FIT" in plan_of(need(), free=1000).summary()
    assert "free" not in plan_of(need(), free=None).summary()


def test_a_disk_that_runs_out_of_files_is_as_full_as_one_without_space(tmp_path, monkeypatch):
    assert plan_of(need(), free_files=180).fits
    assert not plan_of(need(), free_files=179).fits
    assert "179 more files" in plan_of(need(), free_files=179).summary()
    for files, free in ((1000, 77), (0, None)):  # file systems that have no such limit say 0
        monkeypatch.setattr(
            pipeline.plan.os, "statvfs", lambda path, n=files: SimpleNamespace(f_files=n, f_favail=77)
        )
        assert free_files(tmp_path / "map.zarr") == free
    assert free_files("memory://bucket/map.zarr") is None


# Against the run


def test_a_plan_foretells_the_map(tmp_path, toy, client, settings):
    output = tmp_path / "map.zarr"
    plan = plan_inversion(toy, output, cluster=client, **settings)
    assert not os.listdir(tmp_path)
    report = invert(toy, output, cluster=client, **settings)
    assert (plan.need.tiles, plan.need.pixels, plan.tiles_done) == (report.tiles, report.pixels, 0)
    assert plan.need.answerable == report.pixels - report.flags["outside_field"]
    assert plan.need.stored == pytest.approx(report.stored, rel=0.15)
    there = [*output.rglob("*"), output, Directory(output).journal]
    assert len(there) <= plan.need.files <= 1.1 * len(there)
    assert sum(512 * path.stat().st_blocks for path in there) <= plan.need.space
    whole = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    assert plan.need.bytes_beside == pytest.approx(whole - report.stored, rel=0.5)
    assert plan.fits
    assert plan.tasks == 2
    assert plan.seconds > 0
    assert 0 < plan.sampled <= report.pixels
    again = plan_inversion(toy, output, **settings)  # no cluster is needed to know that nothing is to be done
    assert (again.need.tiles, again.tiles_done, again.pixels_done) == (0, 18, 720)
    assert again.seconds == again.need.stored == 0
    assert again.summary() == f"{output}: 0 tiles (0 pixels) to do; 18 tiles (720 pixels) are done"


def test_a_plan_changes_nothing_of_a_map_that_was_interrupted(tmp_path, toy, client, few):
    output = tmp_path / "map.zarr"
    invert(toy, output, cluster=client, **few)
    journal = Directory(output).journal
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:6]) + lines[6][:40])
    (output / "quality/c/0/0/0.1234.partial").write_bytes(b"half")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    plan = plan_inversion(toy, output, cluster=client, **few)
    assert (plan.tiles_done, plan.need.tiles) == (5, 3)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert invert(toy, output, cluster=client, **few).resumed == 5
    assert check_map(output).sound
    assert not (output / "quality/c/0/0/0.1234.partial").exists()


def everything(folder):
    """All that tells whether something has been written in a folder, made, or removed."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        found[path] = (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


def outcome(work):
    """Tiles that are done, and those to do; or the refusal."""
    try:
        answer = work()
    except FlareFieldError as refusal:
        return refusal.problem
    if isinstance(answer, Plan):
        return answer.tiles_done, answer.need.tiles
    return answer.resumed, answer.tiles - answer.resumed


def foretold(folder, toy, client, settings):
    """See that a plan leaves a folder as it is, and says what a run does to a copy of it."""
    said = []
    for overwrite in (False, True):
        settings = {**settings, "cluster": client, "overwrite": overwrite}
        before = everything(folder)
        said.append(outcome(lambda given=settings: plan_inversion(toy, folder / "map.zarr", **given)))
        assert everything(folder) == before
        copy = folder.with_name(f"copy of {folder.name}")
        shutil.copytree(folder, copy)
        assert outcome(lambda given=settings, at=copy: invert(toy, at / "map.zarr", **given)) == said[-1]
        shutil.rmtree(copy)
    return said


@pytest.fixture
def folder(tmp_path):
    """For a map."""
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("moment", "done"),
    [
        (("zarr:consolidate_metadata", 1), 0),  # half laid out
        (("pathlib:Path.rename", 1), 0),  # laid out under another name, the journal is begun
        (APPEARED, 0),
        (("pathlib:Path.replace", 20), None),  # a file of a tile lies under a temporary name
        (("torn record", 3), 2),
    ],
)
def test_a_plan_writes_nothing_to_a_map_that_was_interrupted(
    processes,  # noqa: F811
    folder,
    single,
    client,
    few,
    moment,
    done,
):
    assert run_and_kill(processes, single, folder / "map.zarr", moment, **few) == -signal.SIGKILL
    assert (folder / "map.zarr.lock").exists()
    plain, over = foretold(folder, single, client, few)
    assert sum(plain) == sum(over) == 4
    assert done is None or plain[0] == done


def test_a_plan_writes_nothing_to_a_map_that_is_being_replaced(
    processes,  # noqa: F811
    folder,
    single,
    client,
    few,
):
    output = folder / "map.zarr"
    invert(single, output, cluster=client, **{**few, "draws": 4})
    said = []
    for moment in SWAP_MOMENTS:
        if output.exists() and moment == SWAP_MOMENTS[3]:
            moment = ("pathlib:Path.rename", 2)
        killed = run_and_kill(processes, single, output, moment, **few, overwrite=True)
        assert killed == -signal.SIGKILL, moment
        said.append(foretold(folder, single, client, few)[0])
    assert said == ["the map was begun with other settings"] + 5 * [(4, 0)]


def test_a_plan_for_a_map_that_is_being_made_is_refused_as_the_run_is(tmp_path, toy, client, settings):
    output = tmp_path / "map.zarr"
    with lock(output):
        before = everything(tmp_path)
        for work in (plan_inversion, invert):
            with pytest.raises(MisuseError, match="another command") as refusal:
                work(toy, output, cluster=client, **settings)
            assert f"process {os.getpid()}" in refusal.value.found
        assert everything(tmp_path) == before


READ_ONLY = """
    import json, sys
    from pathlib import Path
    from pipeline.errors import StoreError
    from pipeline.invert import invert, plan_inversion
    settings = json.loads(sys.argv[2])
    for work in (plan_inversion, invert):
        try:
            work(output=Path(sys.argv[1]) / "map.zarr", **settings)
        except StoreError as error:
            print(json.dumps([error.problem, error.remedy]))
"""


@pytest.mark.skipif(not can_mount(), reason="no small file system can be mounted here")
def test_a_plan_for_a_place_that_cannot_be_written_to_is_refused_as_the_run_is(tmp_path, toy, settings):
    said = on_a_small_disk(tmp_path, "ro", READ_ONLY, observation=str(toy), **settings)
    assert said == 2 * [["nothing can be written there", "choose an output in a place that you may write to"]]


def test_a_plan_for_the_rest_and_for_a_part(tmp_path, toy, client, settings):
    output = tmp_path / "map.zarr"
    part = {"region": "0:16,0:18", "times": "1"}
    invert(toy, output, cluster=client, **part, **settings)
    shutil.rmtree(output / "quality/c/1/0")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    plan = plan_inversion(toy, output, cluster=client, **part, **settings)
    assert (plan.need.tiles, plan.need.pixels) == (3, 8 * 18)
    assert (plan.tiles_done, plan.pixels_done) == (3, 8 * 18)
    assert plan.need.answerable == 8 * 18 - 6
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(MisuseError, match="other settings"):
        plan_inversion(toy, output, cluster=client, **settings)
    over = plan_inversion(toy, output, cluster=client, overwrite=True, **settings)
    assert (over.need.tiles, over.tiles_done) == (18, 0)


@pytest.fixture
def unhurried(monkeypatch):
    """Samples as large as they are on a machine with nothing else to do."""
    monkeypatch.setattr("pipeline.plan.SECONDS", 600.0)


def test_the_compression_is_that_of_larger_tiles_too(tmp_path, client, fake_model, unhurried):
    path = tmp_path / "o.zarr"
    write_store(toy_observation(times=1, rows=48, columns=64), path)
    settings = {"model": fake_model, "draws": 32, "tile": 64, "cluster": client}
    plan = plan_inversion(path, tmp_path / "map.zarr", **settings)
    report = invert(path, tmp_path / "map.zarr", **settings)
    assert plan.need.stored == pytest.approx(report.stored, rel=0.25)


def test_the_compression_is_that_of_odd_tiles_too(tmp_path, client, fake_model, unhurried):
    path = tmp_path / "o.zarr"
    write_store(toy_observation(times=1, rows=21, columns=21), path)
    settings = {"model": fake_model, "draws": 32, "cluster": client}
    plan = plan_inversion(path, tmp_path / "map.zarr", **settings)
    report = invert(path, tmp_path / "map.zarr", **settings)
    assert plan.need.stored == pytest.approx(report.stored, rel=0.15)


def test_pixels_among_others_take_more_of_the_disk_and_no_longer(tmp_path, client, fake_model, monkeypatch):
    monkeypatch.setattr(pipeline.plan, "SECONDS", 0.5)
    path, earlier = tmp_path / "o.zarr", tmp_path / "earlier.zarr"
    write_store(toy_observation(times=1, rows=64, columns=64), path)
    always = {"model": fake_model, "draws": 32, "tile": 64, "cluster": client}
    previewing = {**always, "draws": None, "preview": True}
    invert(path, earlier, **previewing)
    quality = zarr.open_array(earlier, path="quality", mode="r+")
    quality[:] = np.uint16(Flag.NOVEL) * (np.random.default_rng(5).random(quality.shape) < 0.9)
    asked = []

    def counted(model, lines, *given, **settings):
        asked.append(len(lines))
        return draw_atmospheres(model, lines, *given, **settings)

    def previewed(preview, context, levels):
        asked.append(len(context))
        return quantiles(preview, context, levels)

    quantiles = Preview.quantiles
    monkeypatch.setattr(inn.posterior, "draw_atmospheres", counted)
    monkeypatch.setattr(Preview, "quantiles", previewed)
    parts = {
        "columns": {"region": "0:64,30:34"},
        "rows": {"region": "30:34,0:64"},
        "one": {"region": "30:31,30:31"},
        "scattered": {"skip": ["novel"], "skip_from": earlier},
        "preview": {"region": "30:34,0:64", "draws": None, "preview": True},
    }
    for name, part in parts.items():
        output = tmp_path / f"{name}.zarr"
        plan = plan_inversion(path, output, **{**always, **part})
        asked.clear()
        report = invert(path, output, **{**always, **part})
        assert plan.need.computed == sum(asked) > 0, name
        assert plan.need.stored == pytest.approx(report.stored, rel=0.15), name
        there = [*output.rglob("*"), output, Directory(output).journal]
        assert sum(512 * path.stat().st_blocks for path in there) <= plan.need.space, name


@pytest.fixture
def hurried(monkeypatch):
    """Samples as small as they are where there is no time for any."""
    monkeypatch.setattr("pipeline.plan.SECONDS", 0.0)


def earlier_map(observation, path, client, flags):
    """A map with made flags, by which to skip: the bits that are not 0."""
    invert(observation, path, cluster=client, preview=True, region="0:1,0:1", times="0")
    quality = zarr.open_array(path, path="quality", mode="r+")
    quality[:] = np.uint16(Flag.NOVEL) * flags(quality.shape)
    return {"cluster": client, "skip": ["novel"], "skip_from": path}


@pytest.mark.parametrize("full", ["looked at", "others"])
def test_times_of_which_more_is_asked_count_as_what_they_are(tmp_path, client, monkeypatch, hurried, full):
    path, output, given = tmp_path / "o.zarr", tmp_path / "map.zarr", []
    write_store(toy_observation(times=7, rows=32, columns=32), path)
    looked_at = np.isin(np.arange(7), [0, 2, 4, 6])

    def flags(shape):
        skipped = np.ones(shape, dtype=bool)
        some = looked_at if full == "looked at" else ~looked_at
        skipped[some, :16, :16] = False  # a whole tile, with a corner outside of the field
        skipped[np.ix_(~some, [5, 21], [9, 25])] = False  # a pixel of every tile
        return skipped

    settings = {**earlier_map(path, tmp_path / "earlier.zarr", client, flags), "preview": True, "tile": 16}
    plan = plan_inversion(path, output, **settings)
    quantiles = Preview.quantiles

    def previewed(preview, context, levels):
        given.append(len(context))
        return quantiles(preview, context, levels)

    monkeypatch.setattr(Preview, "quantiles", previewed)
    report = invert(path, output, **settings)
    assert (plan.need.tiles, plan.need.pixels) == (report.tiles, report.pixels)
    assert plan.need.answerable == pytest.approx(report.pixels - report.flags["outside_field"], rel=0.03)
    assert plan.need.computed == sum(given) > 0
    assert plan.need.stored == pytest.approx(report.stored, rel=0.05)


def test_scattered_pixels_are_foretold_by_a_small_sample(tmp_path, client, fake_model, hurried):
    path, output = tmp_path / "o.zarr", tmp_path / "map.zarr"
    write_store(toy_observation(times=2, rows=48, columns=48), path)
    random = np.random.default_rng(5)
    skipping = earlier_map(path, tmp_path / "earlier.zarr", client, lambda shape: random.random(shape) < 0.9)
    settings = {**skipping, "model": fake_model, "draws": 16, "tile": 16}
    plan = plan_inversion(path, output, **settings)
    report = invert(path, output, **settings)
    assert plan.sampled < report.pixels
    assert plan.need.stored == pytest.approx(report.stored, rel=0.05)


def test_what_is_asked_for_is_computed_in_whole_batches():
    def spec(device="cpu", preview=False):
        return SimpleNamespace(device=device, draws=64, preview=preview)

    assert [computed_pixels(spec(), asked) for asked in (0, 1, 64, 65)] == [0, 64, 64, 128]
    assert computed_pixels(spec("cuda"), 3) == 2048
    assert computed_pixels(spec(preview=True), 513) == 2 * 512


def test_no_pixel_is_sampled_twice(monkeypatch):
    # Of a field of 20 x 20 pixels, squares around many spots: the same numbers again compress to nothing.
    seen = np.zeros((2, 20, 20), dtype=int)

    def inverted(spec, patch):
        shape = patch.shape
        if shape == (16, 16):  # the largest of which there are two; smaller ones are left out
            seen[patch.region] += 1
        return {
            variable.name: np.zeros((*shape, 5, 50) if variable.profile else shape, variable.dtype)
            for variable in VARIABLES
        }

    monkeypatch.setattr(pipeline.plan, "_inverted", inverted)
    monkeypatch.setattr(pipeline.plan, "within_field", lambda spec, tile: np.ones(tile.shape, dtype=bool))
    spec = TileSpec(
        observation="o.zarr",
        observation_hash="",
        store="map.zarr",
        run="a test",
        model=None,
        model_hash="",
        torch_version="",
        draws=32,
        seed=0,
        latent="sobol",
        quantiles=(0.05, 0.16, 0.5, 0.84, 0.95),
        calibration_error=None,
        threads=1,
    )
    grid = TileGrid((2, 20, 20), (16, 16))
    sample = take_sample(spec, grid, 3600.0, list(grid))
    assert seen.max() == 1
    assert seen[1].sum() > 0
    assert sample.pixels == seen.sum()


def test_pixels_that_cannot_be_read_do_not_keep_from_planning(tmp_path, client, few, monkeypatch):
    monkeypatch.setattr(pipeline.plan, "SPOTS", 64)
    path = tmp_path / "o.zarr"
    chunks = {name: {"chunks": (1, 8, 8, n)} for name, n in (("halpha", 15), ("ca8542", 25))}
    write_store(toy_observation(), path, encoding=chunks)
    (path / "ca8542/c/1/0/1/0").write_bytes(b"not a chunk")
    assert plan_inversion(path, tmp_path / "map.zarr", cluster=client, **few).sampled > 0
    for chunk in (path / "ca8542/c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"not a chunk")
    with pytest.raises(StoreError, match="no pixel of a sample"):
        plan_inversion(path, tmp_path / "map.zarr", cluster=client, **few)


# What does not fit


def test_what_surely_fits_is_not_even_sampled(tmp_path, toy, client, settings, disk, monkeypatch):
    monkeypatch.setattr(pipeline.plan, "take_sample", lambda *given: pytest.fail("pixels were inverted"))
    raw = 18 * 64 * (3 * 5 * 50 * 4 + 4 + 4 + 2)  # as whole tiles, beyond the edges, too
    disk.free = round(1.1 * (raw + 60_000)) + 400 * 4096  # with coordinates and attributes
    assert not invert(toy, tmp_path / "map.zarr", cluster=client, **settings).failed


def test_what_does_not_fit_is_refused_before_anything_is_made(tmp_path, toy, settings, disk, monkeypatch):
    monkeypatch.setattr(pipeline.invert, "opened", lambda config: pytest.fail("a cluster was started"))
    disk.free = 200_000
    with pytest.raises(StoreError, match="does not fit") as refusal:
        invert(toy, tmp_path / "map.zarr", **settings)
    assert refusal.value.found == "200.0 kB free"
    assert re.match(r"about [\d.]+ (kB|MB) for 18 tiles", refusal.value.expected)
    assert "--region" in refusal.value.remedy
    assert not os.listdir(tmp_path)


def test_what_is_compressed_enough_fits(tmp_path, toy, client, settings, disk):
    plan = plan_inversion(toy, tmp_path / "map.zarr", cluster=client, **settings)
    disk.free = round(1.2 * plan.need.space)
    assert not invert(toy, tmp_path / "map.zarr", cluster=client, **settings).failed


def test_only_what_is_left_has_to_fit(tmp_path, toy, client, settings, disk):
    output = tmp_path / "map.zarr"
    invert(toy, output, cluster=client, **settings)
    (output / "temperature/c/0/1/1/0/0").unlink()
    disk.free = 200_000  # enough for one tile without any compression, for all with none
    with pytest.raises(StoreError, match="does not fit"):
        invert(toy, output, cluster=client, overwrite=True, **settings)
    assert sorted(os.listdir(tmp_path)) == ["map.zarr", "map.zarr.journal"]
    disk.free = 100_000
    with pytest.raises(StoreError, match="does not fit"):
        invert(toy, output, cluster=client, **{**settings, "overwrite": True})
    disk.free = round(1.1 * 64 * 3010) + 24 * 4096
    assert invert(toy, output, cluster=client, **settings).resumed == 17
    disk.free = 0
    assert invert(toy, output, cluster=client, **settings).resumed == 18
    (output / "temperature/c/0/1/1/0/0").unlink()
    with pytest.raises(StoreError, match="does not fit"):
        invert(toy, output, cluster=client, **settings)
    assert open_map(output).attrs["run"]
    assert Directory(output).journal.exists()


def test_object_stores_have_no_such_limit(toy, client, settings, disk):
    disk.free = 0
    plan = plan_inversion(toy, "memory://a-plan/map.zarr", cluster=client, **settings)
    assert plan.fits
    assert plan.free is None


def test_a_plan_refuses_what_the_run_would(tmp_path, client, settings):
    narrow = tmp_path / "narrow.zarr"
    write_store(toy_observation(half_width=1.2), narrow)
    with pytest.raises(InputError, match="halpha is too short"):
        plan_inversion(narrow, tmp_path / "map.zarr", cluster=client, **settings)


# The command


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def test_the_command_plans_and_inverts_a_part(tmp_path, toy, client, settings, disk, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.cluster.load_config", lambda text: client)
    output = tmp_path / "map.zarr"
    always = ["--model", settings["model"], "--draws", 32, "--tile", 8, "--cluster", "local"]
    wanted = [*always, "--region", "-1:0.4,0:0.2arcsec"]
    assert run("invert", toy, output, *wanted, "--dry-run") == 0
    assert f"{output}: 2 tiles (64 pixels) to do" in capsys.readouterr().out
    assert not output.exists()
    assert run("invert", toy, output, *wanted) == 0
    later = ["--skip", "not_finite,outside_field", "--skip", "not_selected", "--skip-from", output]
    assert run("invert", toy, tmp_path / "b.zarr", *always, *later, "--times", "0") == 0
    part = open_map(tmp_path / "b.zarr").load()
    answered = np.isfinite(part["temperature"]).all(("quantile", "height"))
    assert int(answered.sum()) == 32 - 6
    assert not answered[1].any()
    capsys.readouterr()
    disk.free = 1000
    assert run("invert", toy, tmp_path / "c.zarr", *wanted, "--dry-run") == 1
    assert "IT DOES NOT FIT" in capsys.readouterr().out
    assert run("invert", toy, tmp_path / "c.zarr", *wanted) == 1
    assert "does not fit on the disk" in capsys.readouterr().err
    assert run("invert", toy, output, *always, "--region", "all") == 2
