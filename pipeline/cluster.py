"""One configuration -> a Dask cluster and a verified client of it.

Whoever can talk to a Dask scheduler can run code on all its workers. Traffic between machines is therefore
always encrypted and authenticated (TLS); without TLS a cluster stays on this machine's loopback interface.

A cluster of GPUs (`CudaConfig`) has never been started: what it is started with is checked against
dask-cuda's own signature, and everything around it with a cluster of CPU workers in its place.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import multiprocessing
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, get_args
from urllib.parse import urlsplit
from uuid import uuid4

import dask
import yaml
from dask.system import CPU_COUNT, cpu_count
from dask.utils import key_split
from distributed import Client, LocalCluster, Scheduler, SchedulerPlugin, SpecCluster, Worker, WorkerPlugin
from distributed.security import Security
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.devices import INSTALL, Device, gpus, missing_packages
from pipeline.errors import ClusterError, MisuseError
from pipeline.provenance import flarefield_version
from pipeline.storage import Place, is_in_memory

logger = logging.getLogger("flarefield")

SCHEDULER_SETTINGS = {
    # Worker death is normal: a task may lose many workers before it counts as failed.
    "distributed.scheduler.allowed-failures": 10,
    # Tasks that wait at a worker are blamed for its death, too: none wait there.
    "distributed.scheduler.worker-saturation": 1.0,
}
WORKER_SETTINGS = {
    # Tasks return a few hundred bytes, so memory is the computation's own: moving results to disk would free
    # none of it.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": 0.85,
    "distributed.worker.memory.terminate": 0.95,
    # What Dask keeps for its developers (profiles of everything, the last thousand messages and events of
    # each kind) takes more memory than all tiles that are under way.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.low-level-log-length": 100,
}
# Dask has its workers give memory back to the system as soon as they can. With arrays of megabytes that come
# and go, most of their time then goes into getting it again: ingest takes twice the processor time.
NANNY_SETTINGS = {
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 64 << 20,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 32 << 20,
}

NO_DASHBOARD = "127.0.0.1:0"

FORGET = 60.0
"""Seconds after which Dask's processes forget the names of tasks that they have seen."""


class _UnsafeError(ValueError):
    remedy = (
        "start scheduler and workers with --tls-ca-file, --tls-cert and --tls-key, and give tls://host:port "
        "with tls_ca_file, tls_client_cert and tls_client_key in a configuration file"
    )


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LocalConfig(_Config):
    """Worker processes on this machine, reachable from this machine only."""

    kind: Literal["local"] = "local"
    workers: int = Field(default_factory=lambda: CPU_COUNT, ge=1)
    """Number of worker processes; by default one for every core this process may use."""
    threads: int = Field(default=1, ge=1)
    """Tasks that each worker runs at a time; the cores are shared out among all tasks."""
    memory_limit: str = "auto"
    """Memory of each worker, as Dask writes it (``"4GiB"``), or ``"auto"`` for its share of all."""
    dashboard: str | None = "127.0.0.1:0"
    """Address of the dashboard; port 0 takes a free one; None for none."""


class CudaConfig(_Config):
    """One worker process for each GPU of this machine, reachable from this machine only.

    Which GPUs is said by the environment variable ``CUDA_VISIBLE_DEVICES``; all of them by default. CuPy and
    torch share one pool of memory on each. Needs ``flarefield[cuda13]`` or ``flarefield[cuda12]``.
    """

    kind: Literal["cuda"] = "cuda"
    memory_limit: str = "auto"
    """Host memory of each worker, as Dask writes it (``"4GiB"``), or ``"auto"`` for its share of all."""
    dashboard: str | None = "127.0.0.1:0"
    """Address of the dashboard; port 0 takes a free one; None for none."""


class AddressConfig(_Config):
    """A cluster that is already running, by its scheduler's address.

    A scheduler on another machine must be reached by ``tls://``, with the certificates that its cluster was
    started with; ``tcp://`` is taken on this machine's loopback interface only.
    """

    kind: Literal["address"] = "address"
    address: str
    """The scheduler's address, ``tls://host:port``."""
    tls_ca_file: Path | None = None
    """Certificate of the authority that signed the cluster's certificates, PEM. A path in a configuration
    file is relative to that file. What is left out is taken from Dask's own configuration."""
    tls_client_cert: Path | None = None
    """This client's certificate, PEM."""
    tls_client_key: Path | None = None
    """This client's private key, PEM."""
    device: Device = "cpu"
    """Where its workers compute tiles: ``"cuda"`` for workers with a GPU and a single thread each, such as
    ``dask cuda worker --resources GPU=1`` starts."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds to wait for the scheduler, and for its first worker."""

    @model_validator(mode="after")
    def _safe(self) -> Self:
        parts = urlsplit(self.address)
        if parts.scheme not in ("tls", "tcp") or not parts.hostname or parts.port is None:
            raise ValueError(f"{self.address!r} is no scheduler's address; write tls://host:port")
        if parts.scheme == "tcp" and not is_loopback(self.address):
            raise _UnsafeError(
                f"{self.address!r} is reached over a network without encryption: anyone on it could run code "
                "on the cluster"
            )
        return self

    def security(self) -> Security | None:
        """Credentials of the client; None where the traffic stays on the loopback interface."""
        if not self.address.startswith("tls:"):
            return None
        files = {
            name: str(path)
            for name in ("tls_ca_file", "tls_client_cert", "tls_client_key")
            if (path := getattr(self, name)) is not None
        }
        for name, path in files.items():
            if not Path(path).is_file():
                raise ClusterError("a certificate file is missing", where=path, expected=f"{name}, PEM")
        return Security(require_encryption=True, **files)


class SlurmConfig(_Config):
    """Jobs of a SLURM cluster, submitted from this machine, which must be able to run ``sbatch``.

    The scheduler runs in the command itself. Its traffic with the workers is encrypted, with credentials that
    are made for this run and removed with it.
    """

    kind: Literal["slurm"] = "slurm"
    jobs: int = Field(default=1, ge=1)
    """Jobs to keep in the queue or running; one that ends before the work does is submitted anew."""
    cores: int = Field(ge=1)
    """Cores of each job."""
    memory: str
    """Memory of each job, as Dask writes it: ``"64GiB"``."""
    processes: int = Field(default=1, ge=1)
    """Worker processes in each job; each runs one task at a time on its share of the job's cores."""
    walltime: str = "01:00:00"
    """Time limit of each job, ``[days-]hours:minutes:seconds``. Workers leave shortly before it."""
    partition: str | None = None
    """Partition (queue); the site's default if left out."""
    account: str | None = None
    """Account to charge."""
    interface: str | None = None
    """Network interface that scheduler and workers share, for example ``"ib0"``."""
    shared_directory: Path | None = None
    """A directory that this machine and the workers see: the workers' credentials lie there while the command
    runs, readable by their owner only. By default the current directory."""
    local_directory: Path | None = None
    """Scratch directory on the nodes."""
    log_directory: Path | None = None
    """Where the jobs' logs go."""
    directives: tuple[str, ...] = ()
    """Further options of ``sbatch``, for example ``"--constraint=avx512"``."""
    prologue: tuple[str, ...] = ()
    """Shell commands before the worker starts, for example ``"module load python"``."""
    python: str | None = None
    """Interpreter on the nodes, with the same FlareField; by default this one."""
    dashboard: str | None = "127.0.0.1:0"
    """Address of the dashboard on this machine; None for none."""

    @field_validator("walltime")
    @classmethod
    def _readable(cls, value: str) -> str:
        _seconds(value)
        return value

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.processes > self.cores:
            raise ValueError(f"{self.processes} processes cannot share {self.cores} cores")
        return self


ClusterConfig: TypeAlias = LocalConfig | CudaConfig | AddressConfig | SlurmConfig
"""What `load_config` returns and `connect` takes."""

_ADAPTER: TypeAdapter[ClusterConfig] = TypeAdapter(Annotated[ClusterConfig, Field(discriminator="kind")])
_KINDS = {get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(ClusterConfig)}
_PATHS = ("tls_ca_file", "tls_client_cert", "tls_client_key", "shared_directory", "log_directory")


def _seconds(walltime: str) -> float:
    """Seconds of a SLURM time limit ``[days-]hours:minutes:seconds``."""
    days, _, clock = walltime.rpartition("-")
    parts = clock.split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in [*parts, days or "0"]):
        raise ValueError(f"{walltime!r} is no time limit; write [days-]hours:minutes:seconds")
    hours, minutes, seconds = map(int, parts)
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def is_loopback(address: str) -> bool:
    """Whether an address ``scheme://host:port`` can be reached from this machine only."""
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_config(cluster: str | Path) -> ClusterConfig:
    """Read what ``--cluster`` says.

    Parameters
    ----------
    cluster : str or Path
        ``"local"``, ``"cuda"``, the address of a scheduler (``tls://host:port``), or a YAML file such as
        those in ``deploy/``.

    Returns
    -------
    LocalConfig or CudaConfig or AddressConfig or SlurmConfig

    Raises
    ------
    MisuseError
        It is none of these, or the file's settings are not what they should be, or not safe.
    """
    text = str(cluster)
    if text == "local":
        return LocalConfig()
    if text == "cuda":
        return CudaConfig()
    if "://" in text:
        return _validate({"kind": "address", "address": text}, where=text)
    path = Path(text).expanduser()
    if not path.is_file():
        raise MisuseError(
            "there is no such cluster configuration",
            where=text,
            expected="local, cuda, a scheduler's address (tls://host:port) or a YAML file",
            remedy="see deploy/ for examples",
        )
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MisuseError("the cluster configuration is not YAML", where=path, found=error) from error
    if not isinstance(settings, dict):
        raise MisuseError(
            "the cluster configuration holds no settings",
            where=path,
            found=type(settings).__name__,
            expected=f"lines of the form `name: value`, the first one `kind: {'`, `'.join(_KINDS)}`",
        )
    for name in _PATHS:
        if isinstance(settings.get(name), str):
            settings[name] = path.parent / Path(os.path.expandvars(settings[name])).expanduser()
    return _validate(settings, where=path)


def best_config() -> LocalConfig | CudaConfig:
    """This machine's GPUs where it has any, and its cores where not; the log says so of GPUs."""
    if not (count := gpus()):
        return LocalConfig()
    found = f"{count} GPU{'s' if count > 1 else ''}"
    if missing := missing_packages():
        logger.warning(
            "found %s, but not %s, so tiles are computed on the CPU; to use them: %s",
            found,
            " and ".join(missing),
            INSTALL,
        )
        return LocalConfig()
    logger.info("found %s: tiles are computed there, one worker each (on the CPU: --cluster local)", found)
    return CudaConfig()


def device_of(cluster: ClusterConfig | Client) -> Device:
    """Where a cluster's workers compute tiles.

    Parameters
    ----------
    cluster : configuration or distributed.Client
        Of a client's cluster, all workers must offer a resource ``GPU`` for it to count as one of GPUs.

    Returns
    -------
    {"cpu", "cuda"}
    """
    if isinstance(cluster, Client):
        workers = cluster.scheduler_info(n_workers=-1)["workers"].values()
        offers = [worker["resources"].get("GPU", 0) >= 1 for worker in workers]
        return "cuda" if offers and all(offers) else "cpu"
    if isinstance(cluster, AddressConfig):
        return cluster.device
    return "cuda" if isinstance(cluster, CudaConfig) else "cpu"


def see_that_workers_find(cluster: ClusterConfig | Client, *locations: str | Path | Place | None) -> None:
    """Refuse places in this process's memory if workers are other processes, with memories of their own.

    Parameters
    ----------
    cluster : configuration or distributed.Client
        Where work is done.
    *locations : str, Path, Place or None
        Stores that it reads or writes.

    Raises
    ------
    MisuseError
        Workers would not find one of them.
    """
    if isinstance(cluster, Client):
        workers = cluster.scheduler_info(n_workers=-1)["workers"]
        if all(address.startswith("inproc://") for address in workers):
            return
    for location in locations:
        if location is not None and is_in_memory(location):
            raise MisuseError(
                "a store in memory is not there for workers in other processes",
                where=location,
                remedy="choose a directory or an object store; or, in Python, give a client whose workers "
                "are threads of this process: Client(processes=False)",
            )


def see_that_it_can_be_had(cluster: ClusterConfig | Client) -> None:
    """Refuse a cluster that cannot be started or reached for what lacks on this machine; nothing is started.

    Parameters
    ----------
    cluster : configuration or distributed.Client
        A client's cluster is there already.

    Raises
    ------
    ClusterError
        There is no GPU for a cluster of GPUs, a package is not installed, or a certificate file is missing.
    """
    if isinstance(cluster, CudaConfig):
        if not gpus():
            import torch

            raise ClusterError(
                "no GPU is found on this machine",
                found=f"torch {torch.__version__}, built for {torch.version.cuda or 'the CPU'}",
                expected="a GPU with its driver, and a torch that was built for its CUDA",
                remedy="compute on the CPU with --cluster local, or mend the driver or torch",
            )
        if missing := missing_packages():
            raise ClusterError("GPUs need packages that are not installed", found=missing, remedy=INSTALL)
    elif isinstance(cluster, SlurmConfig):
        _jobqueue()
    elif isinstance(cluster, AddressConfig):
        cluster.security()


def _validate(settings: dict[str, Any], where: object) -> ClusterConfig:
    try:
        return _ADAPTER.validate_python(settings)
    except ValidationError as error:
        kind = _KINDS.get(str(settings.get("kind")))
        problems, remedy = [], None
        for detail in error.errors():
            name = ".".join(str(part) for part in detail["loc"][1:])
            message = detail["msg"].removeprefix("Value error, ")
            problems.append(f"{name}: {message}" if name else message)
            remedy = getattr(detail.get("ctx", {}).get("error"), "remedy", remedy)
        raise MisuseError(
            "the cluster configuration cannot be used",
            where=where,
            found="; ".join(problems),
            expected=f"kind: {', '.join(_KINDS)}"
            if kind is None
            else f"settings: {', '.join(kind.model_fields)}",
            remedy=remedy or "see deploy/ for examples",
        ) from error


@contextmanager
def connect(config: ClusterConfig) -> Iterator[Client]:
    """Start or reach the configured cluster, yield a verified client of it, and close both at the end.

    A cluster that is already running is left as it was found. The dashboard's address goes to the log.

    Parameters
    ----------
    config : LocalConfig or CudaConfig or AddressConfig or SlurmConfig
        Which cluster.

    Yields
    ------
    distributed.Client
        Its workers have the client's version of FlareField, and so will those that join later.

    Raises
    ------
    ClusterError
        The cluster cannot be started or reached, is not safe, or has other software.
    MisuseError
        A worker of a cluster imports a script that would start another one.
    """
    see_that_it_can_be_had(config)
    _see_that_this_is_no_import()
    with ExitStack() as stack:
        stack.enter_context(dask.config.set({**SCHEDULER_SETTINGS, **WORKER_SETTINGS, **NANNY_SETTINGS}))
        if isinstance(config, LocalConfig):
            client = stack.enter_context(_local(config))
        elif isinstance(config, CudaConfig):
            client = stack.enter_context(_cuda(config))
        elif isinstance(config, SlurmConfig):
            client = stack.enter_context(_slurm(config))
        else:
            client = stack.enter_context(_running(config))
        stack.enter_context(verified(client))
        if client.dashboard_link and (isinstance(config, AddressConfig) or config.dashboard is not None):
            logger.info("dashboard: %s", client.dashboard_link)
        yield client


@contextmanager
def opened(cluster: ClusterConfig | Client) -> Iterator[Client]:
    """Yield a verified client: of the configured cluster, which is closed at the end, or the one given.

    Parameters
    ----------
    cluster : configuration or distributed.Client

    Raises
    ------
    ClusterError
        As `connect` and `verified` raise it.
    """
    if isinstance(cluster, Client):
        with verified(cluster):
            yield cluster
    else:
        with connect(cluster) as client:
            yield client


def _see_that_this_is_no_import() -> None:
    """Refuse a cluster in a process that multiprocessing still prepares, where it would wait without end."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as `multiprocessing.spawn` sees it
        raise MisuseError(
            "a script that starts a cluster is imported by the cluster's workers, which are new processes",
            expected="what starts it under `if __name__ == '__main__':`",
            remedy="put it there",
        )


@contextmanager
def _local(config: LocalConfig) -> Iterator[Client]:
    try:
        cluster = LocalCluster(
            n_workers=config.workers,
            threads_per_worker=config.threads,
            **_here(config),
        )
    except RuntimeError as error:  # "Nanny failed to start.", and why
        raise ClusterError(
            "a worker has died, or could not be started, while the cluster was being set up",
            found=error.__cause__ or error,
            remedy="run the same command again; if that does not help, look for what ends processes (too "
            "little memory, a limit on processes; a script must do this under `if __name__ == '__main__':`, "
            "for workers are new processes that import it)",
        ) from error
    with _closing(cluster), Client(cluster, set_as_default=False) as client:
        yield client


def _here(config: LocalConfig | CudaConfig) -> dict[str, Any]:
    """Arguments that every cluster on this machine is started with."""
    return {
        "memory_limit": config.memory_limit,
        "scheduler_kwargs": _scheduler(config.dashboard),
        "host": "127.0.0.1",
        # Dask would raise its log to warnings where its user has turned it lower.
        "silence_logs": max(logging.WARNING, logging.getLogger("distributed").level),
    }


def cuda_arguments(config: CudaConfig) -> dict[str, Any]:
    """Arguments of `dask_cuda.LocalCUDACluster`: one worker with one thread for each GPU.

    CUDA's own asynchronous pool grows as it is needed, and RMM makes both libraries draw from it: two pools
    would each keep what the other lacks.
    """
    return {
        "threads_per_worker": 1,
        "rmm_async": True,
        "rmm_allocator_external_lib_list": ["torch", "cupy"],
        # What trainings ask for, and what `device_of` looks at.
        "resources": {"GPU": 1},
        **_here(config),
    }


@contextmanager
def _cuda(config: CudaConfig) -> Iterator[Client]:
    from dask_cuda import LocalCUDACluster

    cluster = LocalCUDACluster(**cuda_arguments(config))
    with _closing(cluster), Client(cluster, set_as_default=False) as client:
        yield client


def _forgetting() -> Callable[[], Coroutine[None, None, None]]:
    """A coroutine that keeps the names of finished tasks from piling up in a process of Dask's.

    Dask remembers what it made of the last 100,000 names: some 30 MB in every process. It is made here,
    inside another function, because it travels by value: see `_inspection`.
    """

    async def forget() -> None:
        while True:
            await asyncio.sleep(FORGET)
            key_split.cache_clear()

    return forget


class ManySmallTasks(SchedulerPlugin):  # type: ignore[misc]
    """Fit a scheduler to many small tasks, a few at a time.

    Dask lets five milliseconds pass between two messages to a worker, to send the tasks of large graphs
    together. Here a worker has nothing to do until its next task comes: one is enough.
    """

    name = "many-small-tasks"
    interval = 0.001

    async def start(self, scheduler: Scheduler) -> None:
        """Begin to forget the names of tasks."""
        self.forgetting = asyncio.create_task(_forgetting()())

    async def close(self) -> None:
        """End with the scheduler."""
        self.forgetting.cancel()

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Set the time between two messages to a worker that has just joined."""
        scheduler.stream_comms[worker].interval = self.interval


def _scheduler(dashboard: str | None) -> dict[str, Any]:
    """Arguments of every scheduler that is started here."""
    return {
        # Without a dashboard Dask still serves some pages, and to everybody unless told where.
        "dashboard": dashboard is not None,
        "dashboard_address": dashboard or NO_DASHBOARD,
        "plugins": [ManySmallTasks()],
    }


@contextmanager
def _closing(cluster: SpecCluster) -> Iterator[None]:
    try:
        yield
    finally:
        try:
            cluster.close()
        except TimeoutError:
            # The work is done, or its own error is on the way; workers that are slow to end are killed.
            logger.warning("some workers did not end in time, and were ended by force")


@contextmanager
def _running(config: AddressConfig) -> Iterator[Client]:
    try:
        client = Client(
            config.address, security=config.security(), timeout=config.timeout, set_as_default=False
        )
    except (OSError, TypeError, ValueError) as error:  # Dask refuses missing credentials with a TypeError
        raise ClusterError(
            "the scheduler cannot be reached",
            where=config.address,
            found=error,
            remedy="check that it runs, its address, and (for tls://) that the certificates are its own",
        ) from error
    with client:
        _wait_for_worker(client, config.timeout)
        yield client


def _wait_for_worker(client: Client, timeout: float) -> None:
    try:
        client.wait_for_workers(1, timeout=timeout)
    except TimeoutError as error:
        raise ClusterError(
            "the cluster has no workers",
            where=client.scheduler.address,
            found=f"none within {timeout:g} s",
            remedy="start some, for example with `dask worker`",
        ) from error


def _jobqueue() -> type[SpecCluster]:
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise ClusterError(
            "SLURM needs dask-jobqueue, which is not installed", remedy="pip install 'flarefield[slurm]'"
        ) from error
    slurm: type[SpecCluster] = SLURMCluster
    return slurm


def slurm_cluster(config: SlurmConfig) -> SpecCluster:
    """Make the Dask cluster of a SLURM configuration, with a scheduler here and no job submitted yet.

    Raises
    ------
    ClusterError
        ``dask-jobqueue`` is not installed.
    """
    slurm = _jobqueue()
    limit = _seconds(config.walltime)
    # A worker leaves before SLURM kills it, and hands its tasks back; not all at the same moment (Dask draws
    # each worker's time from lifetime - stagger to lifetime + stagger).
    stagger = 0.05 * limit
    lifetime = max(limit - stagger - max(120.0, 0.05 * limit), 0.5 * limit)
    settings = {
        key.replace(".", "__").replace("-", "_").upper(): value for key, value in WORKER_SETTINGS.items()
    }
    return slurm(
        queue=config.partition,
        account=config.account,
        # Dask gives a process as many task threads as its share of `cores`; we want one task a process, on as
        # many cores as it can have (see `threads_per_task`).
        cores=config.processes,
        job_cpu=config.cores,
        processes=config.processes,
        memory=config.memory,
        walltime=config.walltime,
        interface=config.interface,
        local_directory=None if config.local_directory is None else str(config.local_directory),
        log_directory=None if config.log_directory is None else str(config.log_directory),
        job_extra_directives=list(config.directives),
        job_script_prologue=[f"export DASK_{key}={value}" for key, value in settings.items()]
        + list(config.prologue),
        python=config.python,
        job_name="flarefield",
        security=Security.temporary(),
        protocol="tls://",
        shared_temp_directory=str(config.shared_directory or Path.cwd()),
        scheduler_options=_scheduler(config.dashboard),
        # A worker's own pages would be open to its network.
        worker_extra_args=[
            "--no-dashboard",
            "--dashboard-address",
            NO_DASHBOARD,
            "--lifetime",
            f"{lifetime:.0f}s",
            "--lifetime-stagger",
            f"{stagger:.0f}s",
        ],
    )


@contextmanager
def _slurm(config: SlurmConfig) -> Iterator[Client]:
    cluster = slurm_cluster(config)
    with _closing(cluster), Client(cluster, set_as_default=False) as client:
        cluster.adapt(minimum_jobs=config.jobs, maximum_jobs=config.jobs)
        logger.info("waiting for SLURM to start a worker (%d jobs submitted)", config.jobs)
        client.wait_for_workers(1)
        yield client


def _inspection(wanted: dict[str, str]) -> Callable[[], str | None]:
    """A function that says what is wrong with a worker's software, None if nothing is.

    It is made here, inside another one, because Dask sends such functions by value: a worker may have no
    FlareField to import it from, or another one.
    """

    def complaint() -> str | None:
        import importlib
        import json
        from importlib.metadata import PackageNotFoundError, distribution
        from pathlib import Path
        from urllib.parse import unquote, urlsplit

        for name, number in wanted.items():
            try:
                found = distribution(name).version.split("+")[0]
            except PackageNotFoundError:
                return f"{name} is not installed"
            if found != number:
                return f"{name} {found}"
        # `inn` and `pipeline` are names that other packages may bear.
        installed = distribution("flarefield")
        roots = [Path(str(installed.locate_file(""))).resolve()]
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            roots.append(Path(unquote(urlsplit(origin["url"]).path)).resolve())
        for name in ("inn", "pipeline"):
            folder = Path(str(importlib.import_module(name).__file__)).resolve().parent
            if folder not in [root / name for root in roots]:
                return f"package {name} from {folder}, which is not flarefield's"
        return None

    return complaint


def _gate(wanted: dict[str, str]) -> WorkerPlugin:
    """A plugin that sends away workers which join later with other software; it travels by value, too.

    Those that stay forget the names of finished tasks.
    """
    complaint, forget = _inspection(wanted), _forgetting()

    class Gate(WorkerPlugin):  # type: ignore[misc]
        def setup(self, worker: Worker) -> None:
            self.forgetting = asyncio.get_running_loop().create_task(forget())
            if (found := complaint()) is not None:
                worker.loop.add_callback(worker.close, reason=f"wrong software: {found}")
                raise RuntimeError(f"this cluster works for {wanted}; this worker has {found}")

        def teardown(self, worker: Worker) -> None:
            self.forgetting.cancel()

    return Gate()


@contextmanager
def verified(client: Client) -> Iterator[None]:
    """Check a cluster's workers, and send away those that join later and do not pass.

    Checked are the `flarefield` distribution, its version, that the packages `inn` and `pipeline` are its own
    (their names are generic), the version of torch, and that no traffic leaves this machine unencrypted.

    Parameters
    ----------
    client : distributed.Client
        A client of the cluster.

    Raises
    ------
    ClusterError
        A worker does not pass.
    """
    addresses = [client.scheduler.address, *client.nthreads()]
    for address in addresses:
        if urlsplit(address).scheme not in ("tls", "inproc") and not is_loopback(address):
            raise ClusterError(
                "the cluster's traffic leaves this machine without encryption",
                where=address,
                expected="tls://, or an address of the loopback interface",
                remedy="start scheduler and workers with --tls-ca-file, --tls-cert and --tls-key, or on "
                "127.0.0.1 with --host",
            )
    wanted = {"flarefield": flarefield_version(), "torch": version("torch").split("+")[0]}
    for address, answer in client.run(_inspection(wanted), on_error="return").items():
        if answer is not None and not isinstance(answer, OSError):  # that one has gone meanwhile
            raise ClusterError(
                "a worker has other software than this command",
                where=address,
                found=answer,
                expected=", ".join(f"{name} {number}" for name, number in wanted.items()),
                remedy="install the same versions for all workers, and start them again",
            )
    name = f"flarefield-{uuid4().hex}"
    client.register_plugin(_gate(wanted), name=name)
    try:
        yield
    finally:
        if client.status == "running":
            # A scheduler that has gone meanwhile has taken it along.
            with suppress(OSError, TimeoutError):
                client.unregister_worker_plugin(name)


def _cores() -> tuple[str, tuple[int, ...], int]:
    """Host, allowed cores and how many of them the limits of the container leave, where it is run."""
    count = cpu_count()  # now: dask-cuda binds a worker to cores when it has started
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(count)
    return socket.gethostname(), tuple(sorted(allowed)), count


def threads_per_task(client: Client) -> int:
    """Cores that each task of a cluster can have to itself, at least 1.

    Every worker's allowed cores are counted (affinity, and the limits of its container), and shared out among
    the tasks that run at a time on the same cores; the smallest share is the answer.

    Parameters
    ----------
    client : distributed.Client
        A client of the cluster, with at least one worker.
    """
    tasks_at_once: dict[tuple[str, tuple[int, ...], int], int] = defaultdict(int)
    threads = client.nthreads()
    for address, place in client.run(_cores, on_error="return").items():
        if not isinstance(place, OSError):  # that worker has gone meanwhile
            tasks_at_once[place] += threads.get(address, 1)
    return max(1, min((place[2] // tasks for place, tasks in tasks_at_once.items()), default=1))
