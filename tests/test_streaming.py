"""A series goes through ingest time by time: what memory it takes does not depend on how long it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import dask
import distributed  # noqa: F401
import numpy as np
import pytest

from pipeline.observation import open_observation
from tests.benchmarks.ingest import write_series

SHAPE = (300, 320)
FEW, MANY = 2, 10
INTENSITIES = 40 * 4 * SHAPE[0] * SHAPE[1]
"""Bytes of one time's intensities in single precision, of both lines."""

SCRIPT = """
import json, resource, sys, threading
threading.stack_size(1 << 20)  # a stack counts as memory, used or not
from pipeline.ingest import ingest

def memory(name):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(name + ":"))

warm, series, output, limit = sys.argv[1:]
ingest([warm], output + ".warm", call="a test")
if int(limit):
    most = memory("VmData") + int(limit)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
before = memory("VmHWM")  # that of the resource module begins with the parent's
ingest([series], output, call="a test")
print(json.dumps(memory("VmHWM") - before))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Series of a few pixels, of few times, and of many."""
    found = {}
    for name, shape, pairs in (("warm", (40, 50), 2), ("few", SHAPE, FEW), ("many", SHAPE, MANY)):
        found[name] = tmp_path_factory.mktemp(name)
        write_series(found[name], shape, pairs)
    return found


def grown(folders, name, output, limit=0):
    """Bytes by which a process grows, at most, while it makes an observation of a series.

    As a worker of Dask's, which gives memory back that is freed.
    """
    of_workers = dask.config.get("distributed.nanny.pre-spawn-environ")
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, (folders["warm"], folders[name], output, limit))],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {name: str(value) for name, value in of_workers.items()},
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_a_series_larger_than_the_memory_streams_through(folders, tmp_path):
    """What the process may take beyond what it has is two thirds of the series: a short one takes as much."""
    limit = 2 * MANY * INTENSITIES // 3
    few = grown(folders, "few", tmp_path / "few.zarr")
    many = grown(folders, "many", tmp_path / "many.zarr", limit)
    assert few > INTENSITIES / 4  # that anything is measured at all
    assert many < few + INTENSITIES
    dataset = open_observation(tmp_path / "many.zarr")
    assert dataset.halpha.nbytes + dataset.ca8542.nbytes == MANY * INTENSITIES > limit
    for time in (0, MANY - 1):
        one = dataset.isel(time=time).load()
        valid = one.valid.values
        assert valid.mean() > 0.4
        assert np.isfinite(one.halpha.values[valid]).all()
        assert np.isfinite(one.change_between_lines.values[valid]).mean() > 0.9
