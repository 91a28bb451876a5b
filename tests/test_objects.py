"""Observation, model and map on object stores: in memory, and on a local S3-compatible server.

Ingest writes there, inversion reads and writes there; what they leave is what they leave in a directory.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import disturbed
import fsspec
import pytest
import xarray as xr
from fsspec.implementations.memory import MemoryFileSystem
from test_plan import outcome
from toy_observation import toy_observation, write_store

import pipeline.storage as storage
import pipeline.tiles as tiles
from pipeline.check import check_map
from pipeline.cluster import LocalConfig
from pipeline.errors import InputError, MisuseError, ModelError, StoreError
from pipeline.ingest import ingest, ingest_pair
from pipeline.invert import invert, plan_inversion
from pipeline.journal import BATCH, Journal, read_journal
from pipeline.observation import is_observation, open_observation
from pipeline.results import open_map
from pipeline.storage import ObjectLog, lock, place
from pipeline.tiles import observation_hash
from tests.fchroma_files import write_pair

SETTINGS = {"draws": 8, "tile": 10}
NINE = {"draws": 8, "tile": 8}
"""Tiles enough to lose a store, or the command, among them."""


@pytest.fixture(scope="module")
def folder(client, fake_model, tmp_path_factory):
    """An observation and a map made of it, on disk."""
    folder = tmp_path_factory.mktemp("local")
    write_store(toy_observation(times=1), folder / "o.zarr")
    shutil.copytree(fake_model, folder / "model")
    invert(folder / "o.zarr", folder / "map.zarr", model=folder / "model", cluster=client, **SETTINGS)
    return folder


@pytest.fixture(scope="module")
def nine(folder, client):
    """Contents of the same map in nine tiles."""
    output = folder / "nine.zarr"
    invert(folder / "o.zarr", output, model=folder / "model", cluster=client, **NINE)
    return contents(output)


@pytest.fixture
def bucket(folder, request, monkeypatch):
    """URL of a folder in memory that holds the observation and the model."""
    monkeypatch.setattr(storage, "BEAT", 0.1)
    url = f"memory://{request.node.name.replace('[', '-').replace(']', '')}"
    put(folder, url)
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def put(folder, url):
    files, root = fsspec.url_to_fs(url)
    for name in ("o.zarr", "model"):
        for file in (folder / name).rglob("*"):
            if file.is_file():
                files.pipe_file(f"{root}/{file.relative_to(folder)}", file.read_bytes())


def contents(store):
    """Bytes of every file of a map, but for what tells its run and its call."""
    there = place(store)
    keys = sorted(there.sizes())
    files = dict(zip(keys, there.read(keys), strict=True))
    root = json.loads(files.pop("zarr.json"))
    for name in ("run", "call"):
        root["attributes"].pop(name)
    root["attributes"]["model"].pop("name")
    return {**files, "zarr.json": json.dumps(root).encode()}


def names(url):
    files, root = fsspec.url_to_fs(url, use_listings_cache=False)
    return sorted(path.rpartition("/")[2] for path in files.ls(root, detail=False))


def run(url, client, work=invert, **settings):
    return work(
        f"{url}/o.zarr", f"{url}/map.zarr", model=f"{url}/model", cluster=client, **{**SETTINGS, **settings}
    )


# Maps


def test_a_map_in_a_bucket_is_the_map_on_disk(bucket, folder, client):
    report = run(bucket, client)
    assert report.output == f"{bucket}/map.zarr"
    assert report.summary().startswith(f"{bucket}/map.zarr: 4 of 4 tiles done")
    assert names(bucket) == ["map.zarr", "map.zarr.journal", "model", "o.zarr"]
    assert contents(report.output) == contents(folder / "map.zarr")
    assert observation_hash(f"{bucket}/o.zarr") == observation_hash(folder / "o.zarr")
    assert run(bucket, client).resumed == 4
    checked = check_map(report.output)
    assert checked.sound
    xr.testing.assert_identical(
        open_map(report.output).drop_attrs(), open_map(folder / "map.zarr").drop_attrs()
    )
    with pytest.raises(MisuseError, match="other settings"):
        run(bucket, client, seed=2)


def test_damage_is_found_and_mended(bucket, folder, client):
    files = fsspec.filesystem("memory")
    run(bucket, client)
    store = f"{bucket}/map.zarr"
    files.rm(f"{store}/temperature/c/0/0/1/0/0")
    files.pipe_file(f"{store}/quality/c/0/1/0", b"")
    whole = files.cat_file(f"{store}/velocity/c/0/0/0/0/0")
    files.pipe_file(f"{store}/velocity/c/0/0/0/0/0", whole[:-1] + bytes([whole[-1] ^ 1]))
    assert [one.fault for one in check_map(store).faults] == ["damaged", "missing", "damaged"]
    assert run(bucket, client).resumed == 1
    assert contents(store) == contents(folder / "map.zarr")
    files.rm(f"{store}/longitude/c/0/0")
    with pytest.raises(StoreError, match="coordinates"):
        check_map(store)


@pytest.mark.parametrize("moment", ["put", "pipe_file", "cp_file", "rm"])
def test_starting_over_can_be_interrupted_anywhere(bucket, folder, client, monkeypatch, moment):
    """Each request of one kind in turn is the last one before the command ends."""
    run(bucket, client, draws=4)

    kind = type(fsspec.filesystem("memory"))
    owner, name = (storage._Objects, "put") if moment == "put" else (kind, moment)
    for number in (1, 2, 4, 7, 12, 40, 90):
        with monkeypatch.context() as patch:
            dying(patch, owner, name, number)
            try:
                run(bucket, client, overwrite=True)
            except Killed:
                free_lock(f"{bucket}/map.zarr")
                assert contents_are_of_a_run_or_nothing(f"{bucket}/map.zarr")
                continue
        break
    run(bucket, client, overwrite=True)
    assert contents(f"{bucket}/map.zarr") == contents(folder / "map.zarr")
    assert names(bucket) == ["map.zarr", "map.zarr.journal", "model", "o.zarr"]
    assert check_map(f"{bucket}/map.zarr").sound


def test_a_first_map_can_be_interrupted_anywhere(bucket, folder, client, monkeypatch):
    """Also while the objects of its layout are put, of which the root is the last one."""
    for number in (1, 2, 3, 5, 10, 20):
        with monkeypatch.context() as patch:
            dying(patch, storage._Objects, "put", number)
            with pytest.raises(Killed):
                run(bucket, client)
        free_lock(f"{bucket}/map.zarr")
    run(bucket, client)
    assert contents(f"{bucket}/map.zarr") == contents(folder / "map.zarr")
    assert check_map(f"{bucket}/map.zarr").sound


@pytest.mark.parametrize(
    ("owner", "name", "overwrite", "found"),
    [
        (storage._Objects, "put", False, (0, 1)),  # the first map is laid out
        (storage._Objects, "put", True, "the map was begun with other settings"),
        (MemoryFileSystem, "cp_file", True, (1, 0)),  # the replacement is on its way to its place
        (MemoryFileSystem, "rm", True, (1, 0)),
    ],
)
def test_a_plan_writes_nothing_to_a_bucket(bucket, client, monkeypatch, owner, name, overwrite, found):
    """Wherever a command was interrupted, and it says what the next one does."""
    # How long and how large is not looked at: a sample is as small as can be.
    for setting, least in (("SECONDS", 0.0), ("LAID_OUT", 1), ("TASKS", 1)):
        monkeypatch.setattr(f"pipeline.plan.{setting}", least)
    work = partial(run, tile=20)
    if overwrite:
        work(bucket, client, draws=4)
    begin = objects_below(bucket)
    with monkeypatch.context() as patch:
        calls = dying(patch, owner, name, 0)
        work(bucket, client, overwrite=overwrite)
        total = len(calls)
    said = []
    for number in (2, total // 2, total - 1, total):
        put_back(bucket, begin)
        with monkeypatch.context() as patch:
            dying(patch, owner, name, number)
            with pytest.raises(Killed):
                work(bucket, client, overwrite=overwrite)
        free_lock(f"{bucket}/map.zarr")
        for again in (False, True):
            before = objects_below(bucket)
            said.append(outcome(lambda over=again: work(bucket, client, plan_inversion, overwrite=over)))
            assert objects_below(bucket) == before
            assert said[-1] == outcome(lambda over=again: work(bucket, client, overwrite=over))
            put_back(bucket, before)
    assert found in said


def objects_below(url):
    """Every object by its name, itself (another one of the same content is another) and its content."""
    files = fsspec.filesystem("memory").store
    here = url.removeprefix("memory:/")
    return {path: (file, file.getvalue()) for path, file in files.items() if path.startswith(f"{here}/")}


def put_back(url, objects):
    files = fsspec.filesystem("memory").store
    for path in objects_below(url):
        del files[path]
    for path, (_, content) in objects.items():
        fsspec.filesystem("memory").pipe_file(path, content)


def test_a_map_without_its_root_is_not_begun_again(bucket, client):
    run(bucket, client)
    files = fsspec.filesystem("memory")
    files.rm(f"{bucket}/map.zarr/zarr.json")
    before = files.find(f"{bucket}/map.zarr")
    with pytest.raises(MisuseError, match="is not a map"):
        run(bucket, client)
    assert files.find(f"{bucket}/map.zarr") == before


class Killed(BaseException):
    """What ends a command at a request."""


def dying(patch, owner, name, number):
    """Let the request of a number be the last one; return a list that grows with every request."""
    calls = []
    real = getattr(owner, name)

    def deadly(self, *args, **kwargs):
        # workers and the lock's renewal are other threads: they live
        if threading.current_thread() is threading.main_thread():
            calls.append(1)
            if len(calls) == number:
                raise Killed
        return real(self, *args, **kwargs)

    patch.setattr(owner, name, deadly)
    return calls


def free_lock(store):
    files = fsspec.filesystem("memory")
    if files.exists(f"{store}.lock"):
        files.rm_file(f"{store}.lock")


def contents_are_of_a_run_or_nothing(store):
    """A map that can be opened is a whole one: the old, or the new."""
    if "zarr.json" not in place(store).sizes():
        return True
    dataset = open_map(store)
    return dataset.attrs["settings"]["draws"] in (4, 8) and dataset["time"].size == 1


# Observations


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Files of two scans of both lines, and the observation made of them on disk."""
    folder = tmp_path_factory.mktemp("series")
    for number in range(2):
        write_pair(folder, shape=(40, 50), angle=None, number=number, seed=number)
    observation = tmp_path_factory.mktemp("observation") / "obs.zarr"
    ingest([folder], observation, call="a test")
    return folder, stored(observation)


def stored(store):
    """Bytes of every file of an observation."""
    there = place(store)
    keys = sorted(there.sizes())
    return dict(zip(keys, there.read(keys), strict=True))


def test_an_observation_in_a_bucket_is_the_observation_on_disk(bucket, series):
    output = f"{bucket}/obs.zarr"
    report = ingest([series[0]], output, call="a test")
    assert report.path == output
    assert report.summary().startswith(f"{output}: 2 x 40 x 50 pixels")
    assert stored(output) == series[1]
    assert names(bucket) == ["model", "o.zarr", "obs.zarr"]
    assert ingest([series[0]], output, call="again").complete_before
    assert open_observation(output).sizes["time"] == 2
    files = sorted(series[0].glob("*_r00000.fits"))
    with pytest.raises(MisuseError, match="made from other files"):
        ingest(files, output, call="others")
    ingest(files, output, call="others", overwrite=True)
    assert open_observation(output).sizes["time"] == 1
    with pytest.raises(MisuseError, match="not an observation"):
        ingest(files, f"{bucket}/model", call="a test", overwrite=True)
    with pytest.raises(MisuseError, match="not from URLs"):
        ingest([f"{bucket}/scan.fits"], output, call="a test")


@pytest.mark.parametrize("moment", ["put", "pipe_file", "copy", "rm"])
def test_an_interrupted_ingest_goes_on_in_a_bucket(bucket, series, monkeypatch, moment):
    """Each request of one kind in turn is the last one before the command ends; nothing half appears."""
    output = f"{bucket}/obs.zarr"
    kind = type(fsspec.filesystem("memory"))
    owner, name = (storage._Objects, "put") if moment == "put" else (kind, moment)
    for number in (1, 2, 3, 5, 8, 13, 30, 100):
        with monkeypatch.context() as patch:
            calls = dying(patch, owner, name, number)
            try:
                ingest([series[0]], output, call="a test")
            except Killed:
                free_lock(output)
                assert not is_observation(output) or stored(output).items() >= series[1].items()
                continue
        break
    assert calls
    ingest([series[0]], output, call="a test")
    assert stored(output) == series[1]
    assert names(bucket) == ["model", "o.zarr", "obs.zarr"]


def test_an_ingest_into_a_bucket_resumes(bucket, series, monkeypatch, caplog):
    output = f"{bucket}/obs.zarr"
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.ingest.finish", disturbed.counted(lambda *_: None, interrupt))
        with pytest.raises(KeyboardInterrupt):
            ingest([series[0]], output, call="a test")
    (unfinished,) = (name for name in names(bucket) if name.endswith(".new"))
    fsspec.filesystem("memory").rm(f"{bucket}/{unfinished}/valid/c/1", recursive=True)
    report = ingest([series[0]], output, call="a test")
    assert report.resumed == 1
    assert "1 finished times are missing or damaged" in caplog.text
    assert stored(output) == series[1]


def interrupt(number):
    raise KeyboardInterrupt


def test_bad_scans_leave_no_observation_in_a_bucket(bucket, series):
    with pytest.raises(InputError, match="only one line"):
        ingest([str(series[0] / "*6563*.fits")], f"{bucket}/obs.zarr", call="a test")
    assert names(bucket) == ["model", "o.zarr"]


# Locks and journals


def test_two_clients_exclude_each_other_and_a_dead_one_is_followed(bucket, monkeypatch, caplog):
    store = f"{bucket}/map.zarr"
    files = fsspec.filesystem("memory")
    with lock(store):
        with pytest.raises(MisuseError, match="another command") as refusal, lock(store):
            pass
        assert f"process {os.getpid()}" in refusal.value.found
        held = files.cat_file(f"{store}.lock")
    assert not files.exists(f"{store}.lock")
    files.pipe_file(f"{store}.lock", held)  # its holder is dead
    with caplog.at_level("INFO", logger="flarefield"), lock(store):
        assert files.cat_file(f"{store}.lock") != held
    assert "taken over" in caplog.text
    assert not files.exists(f"{store}.lock")


def test_a_client_that_was_thought_dead_can_do_no_harm(bucket, client, monkeypatch):
    """Another one has taken over and written to the journal: the first one's next record is refused."""
    store = f"{bucket}/map.zarr"
    monkeypatch.setattr("pipeline.journal.BATCH", 1)
    real = tiles.write_tile

    def write_between(number):
        if number == 3:
            location = place(store).journal
            parts = place(location).names()
            part = f"{int(parts[-1]) + 1:08d}"
            fsspec.filesystem("memory").pipe_file(f"{location}/{part}", b'{"tile":3,"error":"x"}\n')

    monkeypatch.setattr(tiles, "write_tile", disturbed.counted(real, write_between))
    with pytest.raises(StoreError, match="another command has written to this journal"):
        run(bucket, client, window=1)
    monkeypatch.setattr(tiles, "write_tile", real)
    run(bucket, client)
    assert check_map(store).sound


def test_a_store_that_excludes_nobody_is_worked_on_with_a_warning(bucket, monkeypatch, caplog):
    kind = type(fsspec.filesystem("memory"))
    real = kind.pipe_file
    monkeypatch.setattr(kind, "pipe_file", lambda self, path, value, mode="": real(self, path, value))
    with lock(f"{bucket}/map.zarr"), pytest.raises(MisuseError), lock(f"{bucket}/map.zarr"):
        pass
    assert "cannot exclude each other" in caplog.text


def test_a_journal_in_objects_is_a_journal(bucket, monkeypatch):
    monkeypatch.setattr(ObjectLog, "interval", 1e9)
    location = f"{bucket}/map.zarr.journal"
    with Journal.create(location, "0" * 32, {"draws": 4}) as journal:
        for tile in range(BATCH + 3):
            journal.append({"tile": tile})
    assert place(location).names() == ["00000000", "00000001", "00000002"]
    with Journal.open(location) as journal:
        assert journal.fingerprint == {"draws": 4}
        journal.append({"finished": True})
    header, records = read_journal(location)
    assert header["run"] == "0" * 32
    assert list(records) == [*({"tile": tile} for tile in range(BATCH + 3)), {"finished": True}]
    Journal.create(location, "1" * 32, {"draws": 4}).close()
    assert list(read_journal(location)[1]) == []
    with pytest.raises(StoreError, match="not a journal"):
        read_journal(f"{bucket}/other.journal")


def test_local_is_another_name_of_file(folder, client):
    url = f"local://{folder}"
    report = run(url, client)
    assert report.output == folder / "map.zarr"
    assert report.resumed == 4
    assert check_map(f"{url}/map.zarr").sound


def test_a_server_that_does_not_tell_sizes_is_refused(folder, client, tmp_path):
    """As web servers do: Python's own lists names alone."""
    pytest.importorskip("aiohttp")
    kind = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
        patch.setenv("NO_PROXY", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(MisuseError, match="does not say how large") as refusal:
                invert(
                    f"http://127.0.0.1:{server.server_port}/o.zarr",
                    tmp_path / "map.zarr",
                    model=folder / "model",
                    cluster=client,
                )
        finally:
            server.shutdown()
            thread.join()
    assert refusal.value.remedy


def test_a_server_that_does_not_answer_is_said(monkeypatch, client, tmp_path):
    kind = pytest.importorskip("s3fs").S3FileSystem
    kind.clear_instance_cache()  # which server they ask is asked once
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    for work in (
        check_map,
        open_map,
        open_observation,
        lambda store: invert(store, tmp_path / "map.zarr", cluster=client),
        lambda store: run("s3://bucket", client),
    ):
        with pytest.raises(StoreError, match="cannot be asked"):
            work("s3://bucket/map.zarr")
    kind.clear_instance_cache()


@pytest.mark.parametrize("which", ["observation", "output", "model"])
@pytest.mark.parametrize("server", ["http://127.0.0.1:9", "http://nowhere.invalid"])
def test_a_host_that_cannot_be_reached_is_said(folder, client, tmp_path, server, which):
    pytest.importorskip("aiohttp")
    places = {"observation": folder / "o.zarr", "output": tmp_path / "map.zarr", "model": folder / "model"}
    for work in (invert, plan_inversion):
        with pytest.raises(StoreError, match="cannot be asked") as refusal:
            work(**(places | {which: f"{server}/{which}"}), cluster=client, **SETTINGS)
        assert refusal.value.where.startswith(server)
        assert "Cannot connect to host" in refusal.value.found
        assert "whether its server can be reached" in refusal.value.remedy
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_there_is_named_as_it_was_asked_for(bucket, folder, client, tmp_path):
    for url in (f"{bucket}/other", f"{bucket}/o.zarr"):
        with pytest.raises(ModelError, match="not a model directory") as refusal:
            invert(folder / "o.zarr", tmp_path / "map.zarr", model=url, cluster=client)
        assert refusal.value.where == url


def test_what_cannot_be_used_is_said(folder, client):
    with pytest.raises(MisuseError, match="URLs of this kind"):
        place("nonsense://bucket/map.zarr")
    with pytest.raises(StoreError, match="no such observation"):
        invert("memory://nowhere/o.zarr", "memory://nowhere/map.zarr", cluster=client)
    with pytest.raises(MisuseError, match="inside of what it is made from"):
        invert(folder / "o.zarr", folder / "o.zarr" / "map.zarr", model=folder / "model", cluster=client)
    with pytest.raises(MisuseError, match="in other processes") as refusal:
        invert(folder / "o.zarr", "memory://nowhere/map.zarr", cluster=LocalConfig())
    assert refusal.value.where == "memory://nowhere/map.zarr"


def test_a_store_may_lie_at_the_root(folder, client, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    url = "memory://root.zarr"
    invert(folder / "o.zarr", url, model=folder / "model", cluster=client, **SETTINGS)
    assert contents(url) == contents(folder / "map.zarr")
    assert not list(tmp_path.iterdir())
    fsspec.filesystem("memory").rm("/root.zarr", recursive=True)
    fsspec.filesystem("memory").rm("/root.zarr.journal", recursive=True)


def test_a_store_that_cannot_be_asked_is_named(folder, client):
    class Unreachable(MemoryFileSystem):
        protocol = "unreachable"

        def ls(self, path, detail=True, **kwargs):
            raise RuntimeError("no credentials")  # as botocore's errors, no OSError

    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    with pytest.raises(StoreError, match="cannot be asked") as refusal:
        invert("unreachable://bucket/o.zarr", folder / "m.zarr", cluster=client)
    assert refusal.value.where == "unreachable://bucket/o.zarr"
    assert refusal.value.found == "RuntimeError: no credentials"
    assert "credentials" in refusal.value.remedy


class Losable(MemoryFileSystem):
    """Memory that may be lost, and found again."""

    protocol = "losable"
    lost = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("losable://", "memory://"))

    @classmethod
    def ask(cls):
        if cls.lost:
            raise RuntimeError("no route to host")  # as botocore's errors, no OSError

    def ls(self, path, **kwargs):
        self.ask()
        return super().ls(path, **kwargs)

    def cat_file(self, path, **kwargs):
        self.ask()
        return super().cat_file(path, **kwargs)

    def pipe_file(self, path, value, **kwargs):
        self.ask()
        return super().pipe_file(path, value, **kwargs)


@pytest.mark.parametrize("which", ["o.zarr", "map.zarr"])
def test_a_store_that_is_lost_ends_the_run_at_once(
    bucket, folder, nine, client, tmp_path, monkeypatch, which
):
    """Not when each of the tiles in flight has been tried three times: that may take hours."""
    fsspec.register_implementation("losable", Losable, clobber=True)
    away = bucket.replace("memory://", "losable://")
    places = {"o.zarr": folder / "o.zarr", "map.zarr": tmp_path / "map.zarr", which: f"{away}/{which}"}
    monkeypatch.setattr("pipeline.journal.BATCH", 1)
    real, tried = tiles.compute_tile, []

    def compute(spec, tile):
        tried.append(tile)
        Losable.lost = len(tried) > 3
        return real(spec, tile)

    monkeypatch.setattr(tiles, "compute_tile", compute)
    settings = {"model": folder / "model", "cluster": client, **NINE}
    try:
        with pytest.raises(StoreError, match="cannot be asked") as refusal:
            invert(places["o.zarr"], places["map.zarr"], window=2, **settings)
    finally:
        Losable.lost = False
    assert refusal.value.where.startswith(away)
    assert refusal.value.found == "RuntimeError: no route to host"
    assert refusal.value.remedy.endswith("run the same command again")
    assert len(tried) <= 6
    monkeypatch.setattr(tiles, "compute_tile", real)
    free_lock(f"{bucket}/map.zarr")
    assert invert(places["o.zarr"], places["map.zarr"], **settings).resumed > 0
    assert contents(places["map.zarr"]) == nine
    assert check_map(places["map.zarr"]).sound


def test_a_store_that_is_lost_ends_an_ingest_at_once(bucket, series, monkeypatch):
    fsspec.register_implementation("losable", Losable, clobber=True)
    output = f"{bucket}/lost.zarr"
    tried = []

    def work(task):
        tried.append(task)
        Losable.lost = True
        return ingest_pair(task)

    try:
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.ingest.ingest_pair", work)
            with pytest.raises(StoreError, match="cannot be asked") as refusal:
                ingest([series[0]], output.replace("memory://", "losable://"), call="a test")
    finally:
        Losable.lost = False
    assert refusal.value.where.startswith("losable://")
    assert refusal.value.found == "RuntimeError: no route to host"
    assert len(tried) == 1
    free_lock(output)
    ingest([series[0]], output, call="a test")
    assert stored(output) == series[1]


# A server


SERVER = """
import sys
from moto.server import main
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def s3(folder, tmp_path_factory):
    """URL of a bucket on an S3-compatible server on this machine, with the observation and the model."""
    pytest.importorskip("s3fs", reason="needs s3fs (flarefield[s3])")
    pytest.importorskip("moto", reason="needs moto, an S3-compatible server")
    pytest.importorskip("flask", reason="needs moto's server")
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        try:
            files = fsspec.filesystem("s3", use_listings_cache=False)
            deadline = time.monotonic() + 120
            while True:
                try:
                    files.mkdir("bucket")
                    break
                except Exception:
                    assert server.poll() is None, "the server ended"
                    assert time.monotonic() < deadline, "no server"
                    time.sleep(0.2)
            put(folder, "s3://bucket/here")
            yield "s3://bucket/here"
        finally:
            server.kill()
            server.wait()


def test_a_map_on_an_s3_server_is_the_map_on_disk(s3, folder, client):
    report = run(s3, client)
    assert contents(report.output) == contents(folder / "map.zarr")
    assert names(s3) == ["map.zarr", "map.zarr.journal", "model", "o.zarr"]
    assert check_map(report.output).sound
    assert run(s3, client).resumed == 4
    report = run(s3, client, draws=4, overwrite=True)
    assert open_map(report.output).attrs["settings"]["draws"] == 4
    assert check_map(report.output).sound
    assert names(s3) == ["map.zarr", "map.zarr.journal", "model", "o.zarr"]


def test_an_observation_on_an_s3_server_is_the_observation_on_disk(s3, series):
    output = f"{s3}/obs.zarr"
    ingest([series[0]], output, call="a test")
    assert stored(output) == series[1]
    assert not [name for name in names(s3) if name.startswith("obs.zarr.")]
    assert ingest([series[0]], output, call="again").complete_before


def test_an_s3_server_excludes_a_second_client(s3, monkeypatch, caplog):
    monkeypatch.setattr(storage, "BEAT", 0.2)
    with (
        lock(f"{s3}/locked.zarr"),
        pytest.raises(MisuseError, match="another command"),
        lock(f"{s3}/locked.zarr"),
    ):
        pass
    assert "cannot exclude" not in caplog.text
    assert "locked.zarr.lock" not in names(s3)


def test_workers_in_processes_of_their_own_and_a_killed_command(s3, nine, client, monkeypatch):
    """The command line, as it would be typed; killed when some tiles are recorded, and gone on with."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(storage, "BEAT", 0.5)
    output = f"{s3}/killed.zarr"
    command = [sys.executable, "-c", KILLABLE, f"{s3}/o.zarr", output]
    settings = ["--model", f"{s3}/model", "--draws", "8", "--tile", "8"]
    first = subprocess.Popen([*command, *settings], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while len(place(f"{output}.journal").names()) < 4 and first.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        first.kill()
        first.wait()
    assert "killed.zarr.lock" in names(s3)
    report = invert(f"{s3}/o.zarr", output, model=f"{s3}/model", cluster=client, **NINE)
    assert report.resumed >= 2
    assert contents(output) == nine
    assert check_map(output).sound


KILLABLE = """
import sys
import pipeline.journal, pipeline.storage
pipeline.journal.BATCH, pipeline.storage.BEAT = 1, 0.5
from pipeline.cli import main
if __name__ == "__main__":
    main(["invert", *sys.argv[1:]])
"""
