"""One configuration -> a Dask cluster and a client of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import dask
from distributed import Client, LocalCluster
from pydantic import BaseModel, ConfigDict, Field


class LocalConfig(BaseModel):
    """Worker processes on this machine, reachable from this machine only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["local"] = "local"
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Number of worker processes."""
    threads: int = Field(default=1, ge=1)
    """Threads of each worker that run tasks."""
    memory_limit: str = "auto"
    """Memory of each worker, as Dask writes it (``"4GiB"``), or ``"auto"``."""
    dashboard: str | None = "127.0.0.1:0"
    """Address of the dashboard; port 0 takes a free one; None for none."""


@contextmanager
def connect(config: LocalConfig) -> Iterator[Client]:
    """Start the configured cluster, yield a client of it, and close both at the end."""
    # Worker death is normal: a task may lose many workers before it counts as failed.
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 10}),
        LocalCluster(
            n_workers=config.workers,
            threads_per_worker=config.threads,
            memory_limit=config.memory_limit,
            dashboard_address=config.dashboard,
            host="127.0.0.1",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client
