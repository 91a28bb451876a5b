"""Runs of the map engine in processes of their own, which are killed or disturbed at a chosen moment."""

import logging
import os
import resource
import signal
import sys
import time
from functools import partial
from itertools import cycle
from pathlib import Path
from pkgutil import resolve_name

from distributed import Client, LocalCluster, WorkerPlugin

import pipeline.journal
import pipeline.tiles
from pipeline.cluster import LocalConfig
from pipeline.errors import FlareFieldError
from pipeline.ingest import ingest
from pipeline.invert import invert


def counted(function, before):
    """The same function, after a call of another one with the number of the call."""
    calls = []

    def disturbed(*args, **kwargs):
        calls.append(1)
        before(len(calls))
        return function(*args, **kwargs)

    return disturbed


def replaced(name, before):
    """Replace ``module:attribute`` by itself, `counted`."""
    module, _, attribute = name.partition(":")
    *path, last = attribute.split(".")
    owner = resolve_name(f"{module}:{'.'.join(path)}" if path else module)
    setattr(owner, last, counted(getattr(owner, last), before))


def kill_before(name, count):
    """End this process as ``kill -9`` does, at the n-th call of ``module:attribute``."""
    replaced(name, lambda number: number == count and os.kill(os.getpid(), signal.SIGKILL))


def tear_record(count):
    """End this process when half of the n-th write to the journal is on disk."""
    real, calls = os.pwrite, []

    def deadly(descriptor, data, offset):
        if data.startswith(b'{"tile"'):
            calls.append(1)
            if len(calls) == count:
                real(descriptor, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
        return real(descriptor, data, offset)

    os.pwrite = deadly


def hold(folder, count):
    """Wait at the n-th tile: say so by a file `held` in the folder, and go on when there is one `go_on`."""

    def wait(number):
        if number == count:
            (folder / "held").touch()
            while not (folder / "go_on").exists():
                time.sleep(0.01)

    replaced("pipeline.tiles:write_tile", wait)


def limit_files(size, count, name="pipeline.tiles:write_tile"):
    """From the n-th tile on, or the n-th call of something else, no file can be larger than `size` bytes."""

    def limit(number):
        if number == count:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    replaced(name, limit)


def shake_clock():
    """Set the clock of all that asks for the time forward by up to an hour, or back, at every tile.

    Not back by an hour: where that happens between two of its messages, Dask waits until the clock has come
    to where it was, and then goes on.
    """
    real, offset = time.time, [0.0]
    jumps = cycle((3600.0, -10.0, 40.0, -3.0, 0.5))
    for module in list(sys.modules.values()):
        for name in ("time", "_time", "wall_clock"):
            if getattr(module, name, None) is real:
                setattr(module, name, lambda: real() + offset[0])

    def jump(_):
        offset[0] += next(jumps)

    replaced("pipeline.tiles:write_tile", jump)


def run(observation, output, kill=None, workers=0, disturb=None, **settings):
    """Call `invert` on a cluster inside this process, or on one of worker processes."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    pipeline.journal.BATCH = 1  # every tile is recorded at once, so that there is something to resume
    if workers:
        invert(observation, output, cluster=LocalConfig(workers=workers, dashboard=None), **settings)
        return
    if disturb is not None:
        disturb[0](*disturb[1:])
    if kill is not None and kill[0] == "torn record":
        tear_record(kill[1])
    elif kill is not None:
        kill_before(*kill)
    with (
        LocalCluster(
            processes=False, n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        invert(observation, output, cluster=client, **settings)


def run_ingest(sources, output, kill, **settings):
    """Call `ingest` in this process, which is killed."""
    kill_before(*kill)
    ingest(sources, output, **settings)


def refused(answer, *args, **settings):
    """As `run`, but write the error that ends it to a file."""
    try:
        run(*args, **settings)
    except FlareFieldError as error:
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        answer.write_text(str(error))


def serve(address, disturb):
    """Be a cluster, scheduler and workers, whose address is written to a file, until killed."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    disturb[0](*disturb[1:])
    with LocalCluster(
        processes=False,
        n_workers=2,
        threads_per_worker=1,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    ) as cluster:
        beginning = address.with_suffix(".new")
        beginning.write_text(cluster.scheduler_address)
        beginning.rename(address)
        time.sleep(600)


class Deaths(WorkerPlugin):
    """On every worker, restarted ones too: some tiles are not written, but end their worker.

    Parameters
    ----------
    folder : Path
        Where deaths are counted.
    deaths : dict
        For a tile: ``"kill"`` (this process, with half a file written) or ``"memory"`` (more of it than there
        is), and how often.
    memory : int
        Bytes that are more than there are.
    """

    name = "deaths"

    def __init__(self, folder, deaths, memory):
        self.folder, self.deaths, self.memory = folder, deaths, memory

    def setup(self, worker):
        real = pipeline.tiles.write_tile

        def deadly(store, run, tile, values):
            way, times = self.deaths.get(tile, ("", 0))
            name = f"{tile.time}-{tile.row}-{tile.column}-{way}"
            count = len(list(self.folder.glob(f"{name}-*")))
            if count < times:
                (self.folder / f"{name}-{count}").touch()
                half = Path(store) / pipeline.tiles.tile_keys(tile)["temperature"]
                half.parent.mkdir(parents=True, exist_ok=True)
                half.write_bytes(b"half a tile")
                if way == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                too_much = bytearray(os.urandom(1 << 20)) * (self.memory >> 20)
                time.sleep(60)
                del too_much
            return real(store, run, tile, values)

        pipeline.tiles.write_tile = deadly


class DiesOnce(WorkerPlugin):
    """On every worker, restarted ones too: the very first call of each of some functions ends its worker.

    Parameters
    ----------
    folder : Path
        Where deaths are noted, by the function's name.
    names : sequence of str
        The functions, as ``module:attribute``.
    """

    name = "dies once"

    def __init__(self, folder, names):
        self.folder, self.names = folder, names

    def setup(self, worker):
        for name in self.names:
            replaced(name, partial(self.die, name))

    def die(self, name, number):
        try:
            (self.folder / name).touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
