"""What several test files share: a small cluster, a small model, a small observation."""

import os
from collections.abc import Iterator
from pathlib import Path

# Threads that wait for each other must not keep the cores busy that other processes of the tests need, and
# over arrays as small as those of tests several only wait. It is read when torch, NumPy and SciPy are loaded,
# here and in every process that is started from here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from distributed import Client, LocalCluster
from fake_model import save_fake_model
from threadpoolctl import threadpool_limits
from toy_observation import write_toy_observation

threadpool_limits(1, user_api="blas")  # NumPy may have been loaded before: Zarr brings a plugin of pytest

LONGEST = (
    "test_ingest",
    "test_objects",
    "test_invert",
    "test_plan",
    "test_alignment",
    "test_demo",
    "test_faults",
    "test_train_job",
    "test_common_time",
    "test_notebooks",
    "test_compiled_draws",
)
"""Files that take longest, the longest first."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: processes that share files out do not wait for one of them at the end."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """Two workers, each of one thread, inside this process: nothing has to be imported again."""
    with (
        LocalCluster(
            processes=False, n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="session")
def fake_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny network with random weights. Copy it before changing it."""
    return save_fake_model(tmp_path_factory.mktemp("model") / "fake")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny observation store. Copy it before changing it."""
    return write_toy_observation(tmp_path_factory.mktemp("observation") / "toy.zarr")
