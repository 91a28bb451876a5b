"""Runs of the map engine in processes of their own, which kill themselves at a chosen moment."""

import logging
import os
import signal
from pkgutil import resolve_name

from distributed import Client, LocalCluster

import pipeline.journal
from pipeline.cluster import LocalConfig
from pipeline.invert import invert


def kill_before(name, count):
    """Replace ``module:attribute`` by itself, but end this process as ``kill -9`` does at its n-th call."""
    module, _, attribute = name.partition(":")
    *path, last = attribute.split(".")
    owner = resolve_name(f"{module}:{'.'.join(path)}" if path else module)
    real, calls = getattr(owner, last), []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, last, deadly)


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


def run(observation, output, kill=None, workers=0, **settings):
    """Call `invert` on a cluster inside this process, or on one of worker processes."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    pipeline.journal.BATCH = 1  # every tile is recorded at once, so that there is something to resume
    if workers:
        invert(observation, output, cluster=LocalConfig(workers=workers, dashboard=None), **settings)
        return
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
