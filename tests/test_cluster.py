"""Clusters: what `--cluster` takes and refuses, and that nothing runs where it is not safe."""

import inspect
import os
import re
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import dask
import pytest
import torch
import yaml
from dask.system import CPU_COUNT
from dask.utils import key_split
from distributed import Client, LocalCluster, Nanny
from distributed.security import Security

from pipeline.cluster import (
    AddressConfig,
    CudaConfig,
    LocalConfig,
    SlurmConfig,
    _inspection,
    best_config,
    connect,
    cuda_arguments,
    device_of,
    is_loopback,
    load_config,
    see_that_it_can_be_had,
    slurm_cluster,
    threads_per_task,
    verified,
)
from pipeline.errors import ClusterError, MisuseError
from pipeline.provenance import flarefield_version

DEPLOY = Path(__file__).parents[1] / "deploy"
PATIENCE = 120  # seconds that another process may take to start or to end on a busy machine


def listeners():
    """Addresses on which this process waits for connections."""
    import psutil

    connections = psutil.Process().net_connections("tcp")
    return [tuple(one.laddr) for one in connections if one.status == psutil.CONN_LISTEN]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def pauses_between_messages(client):
    """Seconds that the scheduler lets pass at least between two messages to a worker."""
    return client.run_on_scheduler(
        lambda dask_scheduler: {comm.interval for comm in dask_scheduler.stream_comms.values()}
    )


# Configurations


def test_local_is_this_machine_with_one_worker_a_core():
    config = load_config("local")
    assert config == LocalConfig()
    assert (config.workers, config.threads) == (CPU_COUNT, 1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("local.yaml", LocalConfig),
        ("cuda.yaml", CudaConfig),
        ("address.yaml", AddressConfig),
        ("slurm.yaml", SlurmConfig),
    ],
)
def test_the_examples_can_be_used(name, kind):
    config = load_config(DEPLOY / name)
    assert type(config) is kind
    # every setting of the kind is shown, if only as a comment
    text = (DEPLOY / name).read_text()
    shown = set(re.findall(r"^#? ?(\w+):", text, flags=re.MULTILINE))
    assert set(kind.model_fields) - {"python", "dashboard"} <= shown
    assert set(yaml.safe_load(text)) <= set(kind.model_fields)


def test_paths_in_a_file_are_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYS", "secret")
    (tmp_path / "c.yaml").write_text(
        "kind: address\naddress: tls://host:1\ntls_ca_file: $KEYS/ca.pem\ntls_client_key: /abs/key.pem\n"
    )
    config = load_config(tmp_path / "c.yaml")
    assert config.tls_ca_file == tmp_path / "secret" / "ca.pem"
    assert config.tls_client_key == Path("/abs/key.pem")
    assert config.tls_client_cert is None


def test_an_address_is_a_configuration():
    assert load_config("tls://host.example:8786") == AddressConfig(address="tls://host.example:8786")
    assert load_config("tcp://127.0.0.1:8786").address == "tcp://127.0.0.1:8786"


@pytest.mark.parametrize(
    "address",
    ["tcp://192.168.1.4:8786", "tcp://host.example:8786", "tcp://0.0.0.0:8786", "tcp://[2001:db8::1]:1"],
)
def test_a_network_without_encryption_is_refused(address):
    with pytest.raises(MisuseError, match="configuration") as refusal:
        load_config(address)
    assert "without encryption" in refusal.value.found
    assert "--tls-ca-file" in refusal.value.remedy
    assert refusal.value.exit_code == 2


def test_loopback_is_recognised():
    assert all(
        map(is_loopback, ("tcp://127.0.0.1:1", "tcp://127.9.9.9:1", "tcp://localhost:1", "tcp://[::1]:1"))
    )
    assert not any(
        map(is_loopback, ("tcp://10.0.0.1:1", "tcp://[::]:1", "tcp://localhost.example:1", "tcp://:1"))
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("kind: local\nworker: 3\n", "worker: Extra inputs"),
        ("kind: local\nworkers: 0\n", "workers: Input should be greater"),
        ("kind: kubernetes\n", "'kubernetes'"),
        ("workers: 3\n", "kind"),
        ("kind: address\naddress: host:8786\n", "no scheduler's address"),
        ("kind: address\naddress: http://host:8786\n", "no scheduler's address"),
        ("kind: address\naddress: tls://host\n", "no scheduler's address"),
        ("kind: slurm\ncores: 4\n", "memory: Field required"),
        ("kind: slurm\ncores: 4\nmemory: 4GiB\nprocesses: 8\n", "8 processes"),
        ("kind: slurm\ncores: 4\nmemory: 4GiB\nwalltime: soon\n", "'soon'"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, text, complaint):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(MisuseError) as refusal:
        load_config(path)
    assert complaint in refusal.value.found
    assert refusal.value.where == str(path)
    assert refusal.value.expected


@pytest.mark.parametrize("text", ["{", "- local\n", "", "\x00"])
def test_a_file_that_holds_no_settings_is_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(MisuseError, match="cluster configuration"):
        load_config(path)


def test_a_missing_file_is_refused_with_what_would_do():
    with pytest.raises(MisuseError, match="no such") as refusal:
        load_config("deploy/kubernetes.yaml")
    assert "tls://" in refusal.value.expected


def names_remembered():
    """Tasks whose names Dask remembers in this process."""
    return key_split.cache_info().currsize


def test_a_local_cluster_is_seen_by_this_machine_only_and_fit_for_many_tasks(monkeypatch):
    monkeypatch.setattr("pipeline.cluster.FORGET", 0.1)
    assert LocalConfig().dashboard.startswith("127.0.0.1:")
    with connect(LocalConfig(workers=1, dashboard=None)) as client:
        listening = client.submit(listeners).result() + listeners()
        ports = set(re.findall(r":(\d+)", str(client.scheduler_info(n_workers=-1))))
        assert client.submit(dask.config.get, "distributed.worker.memory.spill").result() is False
        assert pauses_between_messages(client) == {0.001}
        wait_until(lambda: [*client.run(names_remembered).values(), names_remembered()] == [0, 0])
    ours = [(host, port) for host, port in listening if str(port) in ports]
    assert len(ours) >= 2
    assert {host for host, _ in ours} == {"127.0.0.1"}


# GPUs


def gpus_found(monkeypatch, count, *installed):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr("pipeline.devices.find_spec", lambda name: object() if name in installed else None)


def test_gpus_are_taken_where_they_are_found_and_the_log_says_so(monkeypatch, caplog):
    caplog.set_level("INFO", "flarefield")
    gpus_found(monkeypatch, 0, "cupy", "dask_cuda", "rmm")
    assert best_config() == LocalConfig()
    assert caplog.messages == []
    gpus_found(monkeypatch, 4, "cupy", "dask_cuda", "rmm")
    assert best_config() == load_config("cuda") == CudaConfig()
    assert "4 GPUs" in caplog.text
    assert "--cluster local" in caplog.text
    caplog.clear()
    gpus_found(monkeypatch, 1, "cupy")
    assert best_config() == LocalConfig()
    assert "1 GPU, but not dask_cuda and rmm" in caplog.text
    assert "cuda13" in caplog.text


def test_gpus_that_are_not_there_or_cannot_be_used_are_refused(monkeypatch):
    gpus_found(monkeypatch, 0)
    with pytest.raises(ClusterError, match="no GPU") as refusal, connect(CudaConfig()):
        pass
    assert "--cluster local" in refusal.value.remedy
    gpus_found(monkeypatch, 1, "cupy", "rmm")
    with pytest.raises(ClusterError, match="not installed") as refusal, connect(CudaConfig()):
        pass
    assert refusal.value.found == "['dask_cuda']"


def test_what_lacks_on_this_machine_is_told_without_starting_anything(monkeypatch, tmp_path):
    gpus_found(monkeypatch, 1, "cupy")
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    certificate = tmp_path / "ca.pem"
    for config, lacking in (
        (CudaConfig(), "rmm"),
        (slurm_config(), "dask-jobqueue"),
        (AddressConfig(address="tls://192.0.2.1:8786", tls_ca_file=certificate), "certificate"),
    ):
        with pytest.raises(ClusterError, match=lacking):
            see_that_it_can_be_had(config)
    gpus_found(monkeypatch, 1, "cupy", "dask_cuda", "rmm")
    certificate.touch()
    for config in (
        LocalConfig(),
        CudaConfig(),
        AddressConfig(address="tls://192.0.2.1:8786", tls_ca_file=certificate),
    ):
        see_that_it_can_be_had(config)


def test_dask_cuda_takes_what_a_cluster_of_gpus_is_started_with():
    """Held against the signatures of the installed dask-cuda, which needs no GPU to be asked."""
    ours = pytest.importorskip("dask_cuda").LocalCUDACluster
    arguments = cuda_arguments(CudaConfig())
    named = set(inspect.signature(ours).parameters)
    assert {"threads_per_worker", "rmm_async", "rmm_allocator_external_lib_list"} <= named
    # What it does not name goes on to Dask's own cluster, and from there to the workers.
    assert issubclass(ours, LocalCluster)
    passed_on = set(arguments) - named - set(inspect.signature(LocalCluster).parameters)
    assert passed_on <= set(inspect.signature(Nanny).parameters)
    inspect.signature(ours).bind(**arguments)
    supported = pytest.importorskip("dask_cuda.plugins").enable_rmm_memory_for_library.__doc__
    assert all(f'"{library}"' in supported for library in arguments["rmm_allocator_external_lib_list"])


def test_a_cluster_of_gpus_offers_them_and_is_seen_by_this_machine_only(monkeypatch):
    """With dask-cuda's part played by Dask's own cluster of one worker."""

    def stand_in(rmm_async, rmm_allocator_external_lib_list, **rest):
        assert rmm_async
        assert sorted(rmm_allocator_external_lib_list) == ["cupy", "torch"]
        return LocalCluster(n_workers=1, **rest)

    gpus_found(monkeypatch, 1, "cupy", "dask_cuda", "rmm")
    monkeypatch.setitem(sys.modules, "dask_cuda", SimpleNamespace(LocalCUDACluster=stand_in))
    with connect(CudaConfig(dashboard=None)) as client:
        assert device_of(client) == "cuda"
        assert client.scheduler.address.startswith("tcp://127.0.0.1:")
        assert list(client.nthreads().values()) == [1]
        assert client.submit(lambda: 42, resources={"GPU": 1}).result() == 42


def test_where_a_cluster_computes_is_known_before_it_is_started():
    assert device_of(CudaConfig()) == "cuda"
    assert device_of(LocalConfig()) == "cpu"
    assert device_of(SlurmConfig(cores=1, memory="1GiB")) == "cpu"
    address = "tcp://127.0.0.1:1"
    assert device_of(AddressConfig(address=address)) == "cpu"
    assert device_of(AddressConfig(address=address, device="cuda")) == "cuda"


# A running cluster, reached with certificates


@pytest.fixture
def certificates(tmp_path):
    """Credentials of a cluster as an administrator would hand them out: PEM files."""
    temporary = Security.temporary()
    files = {}
    for name in ("tls_ca_file", "tls_client_cert", "tls_client_key", "tls_worker_cert", "tls_worker_key"):
        path = tmp_path / f"{name}.pem"
        path.write_text(getattr(temporary, name))
        files[name] = str(path)
    scheduler = {"tls_scheduler_cert": files["tls_client_cert"], "tls_scheduler_key": files["tls_client_key"]}
    return files, Security(require_encryption=True, **files, **scheduler)


def local(**settings):
    return LocalCluster(
        processes=False, n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0", **settings
    )


def test_a_running_cluster_is_reached_by_tls_and_left_running(tmp_path, certificates):
    files, security = certificates
    with local(protocol="tls://", host="127.0.0.1", security=security) as cluster:
        settings = {"kind": "address", "address": cluster.scheduler_address}
        settings |= {
            name: Path(files[name]).name for name in ("tls_ca_file", "tls_client_cert", "tls_client_key")
        }
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
        config = load_config(tmp_path / "c.yaml")
        assert cluster.scheduler_address.startswith("tls://127.0.0.1:")
        for _ in range(2):
            with connect(config) as client:
                assert client.submit(lambda: 6 * 7).result() == 42
        others = Security.temporary()
        (tmp_path / "other.pem").write_text(others.tls_ca_file)
        stranger = AddressConfig(
            address=config.address,
            tls_ca_file=tmp_path / "other.pem",
            tls_client_cert=config.tls_client_cert,
            tls_client_key=config.tls_client_key,
            timeout=2,
        )
        with pytest.raises(ClusterError, match="cannot be reached") as refusal, connect(stranger):
            pass
        assert refusal.value.where == config.address


def test_certificates_that_are_not_there_are_named(tmp_path):
    config = AddressConfig(address="tls://127.0.0.1:1", tls_ca_file=tmp_path / "ca.pem")
    with pytest.raises(ClusterError, match="missing") as refusal, connect(config):
        pass
    assert refusal.value.where == str(tmp_path / "ca.pem")


def test_tls_without_any_certificates_is_refused():
    config = AddressConfig(address="tls://127.0.0.1:1", timeout=1)
    with pytest.raises(ClusterError, match="cannot be reached"), connect(config):
        pass


def test_a_cluster_that_is_not_there_is_refused():
    config = AddressConfig(address="tcp://127.0.0.1:9", timeout=1)
    with pytest.raises(ClusterError, match="cannot be reached") as refusal, connect(config):
        pass
    assert refusal.value.remedy


def test_a_cluster_without_workers_is_refused():
    with LocalCluster(
        n_workers=0, processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as cluster:
        config = AddressConfig(address=cluster.scheduler_address, timeout=1)
        with pytest.raises(ClusterError, match="no workers"), connect(config):
            pass


def test_a_cluster_that_listens_on_the_network_without_encryption_is_refused():
    with (
        local(protocol="tcp://", host="0.0.0.0") as cluster,
        Client(cluster, set_as_default=False) as client,
        pytest.raises(ClusterError, match="without encryption"),
        verified(client),
    ):
        pass


def test_a_worker_that_dies_while_the_cluster_is_set_up_is_an_error_with_a_remedy(monkeypatch):
    def dies(*_, **__):
        raise RuntimeError("Nanny failed to start.") from OSError("killed by signal 9")

    monkeypatch.setattr("pipeline.cluster.LocalCluster", dies)
    config = LocalConfig(dashboard=None)
    with pytest.raises(ClusterError, match="could not be started") as refusal, connect(config):
        pass
    assert "signal 9" in str(refusal.value.found)
    assert "same command again" in refusal.value.remedy


def test_a_script_that_its_workers_would_run_ends_and_says_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            from pipeline.cluster import LocalConfig, connect

            with connect(LocalConfig(workers=1, dashboard=None)) as client:
                client.submit(print, "done").result()
            """
        )
    )
    command = [sys.executable, script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode != 0
    assert "MisuseError: a script that starts a cluster is imported" in ended.stderr
    assert "could not be started" in ended.stderr


def test_a_scheduler_that_has_gone_at_the_end_spoils_nothing():
    with local() as cluster, Client(cluster, set_as_default=False) as client, verified(client):
        client.submit(lambda: 1).result()

        def gone(name):
            raise OSError(f"the scheduler has gone with {name}")

        client.unregister_worker_plugin = gone


# Workers' software


def wanted():
    return {"flarefield": flarefield_version(), "torch": torch.__version__.split("+")[0]}


def test_this_installation_passes():
    assert _inspection(wanted())() is None


def test_another_or_a_missing_version_is_named():
    assert _inspection({"torch": "1.0"})() == f"torch {wanted()['torch']}"
    assert _inspection({"no-such-distribution": "1"})() == "no-such-distribution is not installed"


def distribution(path, version):
    """Make a directory that claims, to whoever has it on the path, to be a release of FlareField."""
    info = path / f"flarefield-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flarefield\nVersion: {version}\n")
    return path


def inspect_elsewhere(path):
    """Send the inspection to a Python with `path` in front, the way Dask sends functions."""
    script = "import sys, cloudpickle; print(cloudpickle.load(sys.stdin.buffer)())"
    answer = subprocess.run(
        [sys.executable, "-c", script],
        input=cloudpickle.dumps(_inspection(wanted())),
        capture_output=True,
        check=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(path)},
    )
    return answer.stdout.decode().strip()


def test_an_older_flarefield_is_found_out(tmp_path):
    assert inspect_elsewhere(distribution(tmp_path, "0.0.1")) == "flarefield 0.0.1"


def test_another_package_of_the_same_name_is_found_out(tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").touch()
    answer = inspect_elsewhere(tmp_path)
    assert answer.startswith("package pipeline from")
    assert str(tmp_path) in answer


def worker_process(address, path):
    options = f"--no-nanny --nthreads 1 --no-dashboard --host 127.0.0.1 --local-directory {path}"
    return subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_worker", address, *options.split()],
        env={**os.environ, "PYTHONPATH": str(path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_workers_with_other_software_are_refused_and_late_ones_sent_away(tmp_path):
    older = distribution(tmp_path / "older", "0.0.1")
    with (
        local(protocol="tcp://", host="127.0.0.1") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        good = set(client.nthreads())
        process = worker_process(cluster.scheduler_address, older)
        try:
            wait_until(lambda: len(client.nthreads()) == 2)
            with pytest.raises(ClusterError, match="other software") as refusal, verified(client):
                pass
            assert refusal.value.where in set(client.nthreads()) - good
            assert refusal.value.found == "flarefield 0.0.1"
            assert f"flarefield {flarefield_version()}" in refusal.value.expected
        finally:
            process.kill()
            process.wait()
        wait_until(lambda: set(client.nthreads()) == good)
        with verified(client):
            process = worker_process(cluster.scheduler_address, older)
            try:
                wait_until(lambda: process.poll() is not None)
            finally:
                process.kill()
                process.wait()
            wait_until(lambda: set(client.nthreads()) == good)
            assert client.submit(lambda: 1).result() == 1


# Shares of the cores


@pytest.mark.parametrize(("workers", "threads"), [(1, 1), (2, 1), (1, 2), (4, 8)])
def test_the_cores_are_shared_out_among_the_tasks(workers, threads):
    with (
        LocalCluster(
            processes=False, n_workers=workers, threads_per_worker=threads, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        assert threads_per_task(client) == max(1, CPU_COUNT // (workers * threads))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_a_worker_is_asked_for_the_cores_that_it_has_not_for_those_of_the_client():
    with connect(LocalConfig(workers=1, dashboard=None)) as client:  # a process of its own
        assert threads_per_task(client) == CPU_COUNT
        client.run(os.sched_setaffinity, 0, {min(os.sched_getaffinity(0))})
        assert threads_per_task(client) == 1


# SLURM


def slurm_config(**settings):
    return SlurmConfig(**{"cores": 16, "memory": "32GiB", "processes": 4, **settings})


def test_the_slurm_job_is_as_configured(tmp_path):
    config = slurm_config(
        walltime="1-02:00:00",
        partition="normal",
        account="flares",
        directives=("--constraint=avx512",),
        prologue=("module load python",),
        shared_directory=tmp_path,
        python="/opt/python",
        log_directory=tmp_path / "logs",
    )
    cluster = slurm_cluster(config)
    try:
        script = cluster.job_script()
    finally:
        cluster.close()
    directives = {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {
        "-p normal",
        "-A flares",
        "--cpus-per-task=16",
        "--mem=32G",
        "-t 1-02:00:00",
        "--constraint=avx512",
        f"-o {tmp_path}/logs/flarefield-%J.out",
    } <= directives
    command = script.strip().splitlines()[-1]
    assert command.startswith("/opt/python -m distributed.cli.dask_worker tls://")
    options = dict(re.findall(r"--([\w-]+) ([^-\s]\S*)", command))
    assert (options["nworkers"], options["nthreads"], options["memory-limit"]) == ("4", "1", "8.00GiB")
    # before the 26 hours are over, with room for a random delay
    lifetime, stagger = (float(options[name].rstrip("s")) for name in ("lifetime", "lifetime-stagger"))
    assert 0.8 * 26 * 3600 < lifetime - stagger < lifetime + stagger < 26 * 3600
    assert options["protocol"] == "tls://"
    assert {"tls-ca-file", "tls-cert", "tls-key"} <= set(options)
    assert "--no-dashboard" in command
    assert options["dashboard-address"].startswith("127.0.0.1:")
    assert "export DASK_DISTRIBUTED__WORKER__MEMORY__SPILL=False" in script
    assert script.index("module load python") < script.index("dask_worker")


def test_credentials_of_slurm_workers_are_their_owner_s_alone_and_gone_afterwards(tmp_path):
    cluster = slurm_cluster(slurm_config(shared_directory=tmp_path))
    files = list(tmp_path.iterdir())
    assert len(files) == 3
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    cluster.close()
    del cluster
    import gc

    gc.collect()
    assert not list(tmp_path.iterdir())


SBATCH = """\
    #!/bin/sh
    # runs the job here and now, as its own process group; the script is the submitter's, who removes it
    cp "$1" "$0.job"
    setsid sh "$0.job" > "$0.log" 2>&1 &
    echo "Submitted batch job $!"
"""
SCANCEL = """\
    #!/bin/sh
    kill -TERM -- "-$1"
"""


def test_work_is_done_by_slurm_jobs_over_tls(tmp_path, monkeypatch):
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(textwrap.dedent(text))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    config = slurm_config(
        cores=2,
        memory="2GiB",
        processes=1,
        interface="lo",
        shared_directory=tmp_path,
        local_directory=tmp_path,
    )
    with connect(config) as client:
        (worker,) = client.nthreads()
        assert worker.startswith("tls://127.0.0.1:")
        spill, pid = client.submit(
            lambda: (dask.config.get("distributed.worker.memory.spill"), os.getpid())
        ).result()
        assert spill is False
        assert pid != os.getpid()
        assert pauses_between_messages(client) == {0.001}
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_slurm_without_its_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ClusterError, match="dask-jobqueue") as refusal:
        slurm_cluster(slurm_config())
    assert "flarefield[slurm]" in refusal.value.remedy
