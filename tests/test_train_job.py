"""The training job: killed, stopped, left alone or refused, it ends in the same network bit for bit."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from toy_grid import MU, write_toy_grid

import inn
from inn.conditional import ConditionalNetwork
from inn.distillation import LatentSchedule, PreviewSchedule
from inn.joint import JointNetwork
from inn.joint_training import JointSchedule
from inn.sampling import Measurement
from inn.training import Epoch, Schedule
from pipeline import train_job, training_run
from pipeline.cli import main
from pipeline.cluster import AddressConfig, LocalConfig, SlurmConfig
from pipeline.errors import ClusterError, InputError, MisuseError, ModelError, StoreError
from pipeline.history_figure import history_figure
from pipeline.recipes import RECIPES, Recipe
from pipeline.train_job import train, training_status
from pipeline.training_display import TrainingDisplay
from pipeline.training_folder import Standing, TrainingFolder, read_history
from pipeline.training_set import Augmentation

STEPS = 12
TINY = Recipe(
    architecture={
        "components": 8, "steps": 2, "hidden": 16, "context": 8, "embedding": 16, "dropout": 0.1,
    },
    emulator={"width": 16, "depth": 1},
    flow_schedule=Schedule(epochs=5, steps=STEPS, batch=32, average=0.9),
    emulator_schedule=Schedule(epochs=2, steps=10, batch=32, average=0.9),
    latent_schedule=LatentSchedule(
        draws=(4, 8), epochs=2, steps=4, rows=32, observations=16, held_out=8, teacher_draws=64
    ),
    preview={"width": 8, "depth": 1, "rank": 4},
    preview_schedule=PreviewSchedule(
        epochs=1, steps=3, batch=16, average=0.9, observations=16, held_out=8, teacher_draws=32,
        held_out_draws=32, measured_draws=32,
    ),
    augmentation=Augmentation(doppler=0.0),
    sampling=Measurement(observations=4, truth_draws=64, seeds=1),
)  # fmt: skip
SEED = 4


@pytest.fixture(autouse=True)
def _log_as_before():
    """`main` sends the log to what is standard error at the time, which lasts as long as a test."""
    logger = logging.getLogger("flarefield")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    return write_toy_grid(tmp_path_factory.mktemp("toy") / "grid.zarr", samples=200)


@pytest.fixture(scope="module")
def undisturbed(grid, tmp_path_factory) -> Path:
    """The model that a training in one go ends in."""
    path = tmp_path_factory.mktemp("undisturbed") / "model"
    with threads(1):
        train(grid, path, recipe=TINY, seed=SEED)
    return path


class threads:
    """Torch's threads, for a while."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def curve(model: Path) -> list[tuple[object, ...]]:
    """A model's history, to the last digit, but for the time."""
    history = read_history(model / "history.csv")
    return [
        (stage, entry.epoch, entry.loss, entry.held_out_loss, entry.learning_rate, entry.terms)
        for stage, entries in history.items()
        for entry in entries
    ]


def assert_same(first: Path, second: Path) -> None:
    """Two models have the same curve, weights and scores."""
    assert curve(first) == curve(second)
    weights = [(model / "weights.safetensors").read_bytes() for model in (first, second)]
    assert weights[0] == weights[1]
    assert inn.load_model(first).record["metrics"] == inn.load_model(second).record["metrics"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait for something that must happen; give up after minutes, or with the process."""
    until = time.monotonic() + 600.0
    while not condition():
        if process is not None and process.poll() is not None:
            pytest.fail(f"the command ended: {process.communicate()}")
        if time.monotonic() > until:
            pytest.fail("waited in vain")
        time.sleep(0.01)


def stopped_after(steps: int, grid: Path, model: Path, **settings: object) -> TrainingFolder:
    """The folder of a training that nobody wanted any more after some steps."""
    taken = 0

    def wanted() -> bool:
        nonlocal taken
        taken += 1
        return taken < steps

    def run(order: training_run.Order, _: Callable[[], bool]) -> dict[str, object]:
        return original(order, wanted)

    with pytest.MonkeyPatch.context() as patch:
        original = training_run.run
        patch.setattr("pipeline.train_job.run", run)
        with pytest.raises(training_run.Unwanted):
            train(grid, model, **{"recipe": TINY, "seed": SEED, **settings})
    return TrainingFolder(model)


def test_a_model_is_trained_saved_and_loaded(grid, undisturbed):
    model = inn.load_model(undisturbed)
    assert isinstance(model, ConditionalNetwork)
    assert model.novelty is not None
    assert model.emulator is not None
    record = model.record
    assert record["seed"] == SEED
    assert len(record["grid"]["sha256"]) == 64
    assert record["epochs"] == {"flow": 5, "emulator": 2, "latents": 2, "preview": 1}
    assert model.latents is not None
    assert set(record["sampling"]["errors"]["tuned"]) == {"4", "8"}
    assert record["settings"]["flow_schedule"]["steps"] == STEPS
    assert (record["threads"], record["device"], record["starts"]) == (1, "cpu", 1)
    assert record["conditions"]["mu"] == [MU.min(), MU.max()]
    assert record["wall_time_seconds"] > 0
    for quantity in inn.QUANTITIES:
        scores = record["metrics"]["all"][quantity]
        assert 0.0 < scores["error_ratio"] < 1.5
        assert 0.0 <= scores["coverage"]["0.90"] <= 1.0
    with open(undisturbed / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["network"] for row in rows] == ["flow"] * 5 + ["emulator"] * 2 + ["latents"] * 2 + ["preview"]
    assert float(rows[4]["held_out_loss"]) < float(rows[0]["held_out_loss"])
    assert (undisturbed / "history.png").read_bytes().startswith(b"\x89PNG")
    assert not TrainingFolder(undisturbed).path.exists()
    # Again: there is nothing to do. Otherwise: it is refused.
    assert train(grid, undisturbed, recipe=TINY, seed=SEED) == json.loads(json.dumps(record))
    with pytest.raises(MisuseError, match="exists"):
        train(grid, undisturbed, recipe=TINY, seed=SEED + 1)
    assert training_status(undisturbed).state == "complete"


COMMAND = """
    import time

    from pipeline.training_folder import TrainingFolder

    save = TrainingFolder.save_checkpoint

    def slowly(folder, state):  # so that it is not finished before it can be killed; on the workers, too
        save(folder, state)
        time.sleep(0.05)

    TrainingFolder.save_checkpoint = slowly
    if __name__ == "__main__":
        import sys
        sys.path.insert(0, {tests!r})
        from pipeline import train_job
        from pipeline.cluster import LocalConfig
        from test_train_job import SEED, TINY

        train_job.threads_per_task = lambda client: 1  # as the undisturbed one
        train_job.DESERTED = 600.0  # a busy machine takes its time to start a worker
        train_job.train({grid!r}, {model!r}, recipe=TINY, seed=SEED, checkpoint_seconds=0.0,
                        cluster=LocalConfig(dashboard=None))
"""


def test_the_worker_is_killed_and_then_the_command_and_not_a_bit_changes(grid, undisturbed, tmp_path):
    model = tmp_path / "model"
    script = tmp_path / "command.py"
    script.write_text(
        textwrap.dedent(COMMAND).format(tests=str(Path(__file__).parent), grid=str(grid), model=str(model))
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DASK_LOGGING__DISTRIBUTED": "critical"},
    )
    folder = TrainingFolder(model)
    checkpoint = folder.path / "checkpoint.pt"
    try:
        wait_for(checkpoint.exists, process)
        first = folder.standing()
        assert first is not None
        assert first.starts == 1
        os.kill(first.process, signal.SIGKILL)
        killed = time.time()

        def goes_on() -> bool:
            standing = folder.standing()
            if standing is None or standing.starts < 2:
                return False
            try:
                return checkpoint.stat().st_mtime > killed + 0.5
            except FileNotFoundError:  # between two renamings
                return False

        wait_for(goes_on, process)
        second = folder.standing()
        assert second is not None
        assert second.process != first.process
    finally:
        process.kill()
        process.communicate()
    assert folder.plan().threads == 1
    assert not model.exists()
    record = train(grid, model, recipe=TINY, seed=SEED)
    assert record is not None
    assert record["starts"] >= 3
    assert_same(model, undisturbed)
    assert not folder.path.exists()


def test_a_training_stopped_in_its_second_stage_goes_on_bit_for_bit(grid, undisturbed, tmp_path):
    with threads(1):
        folder = stopped_after(5 * STEPS + 3, grid, tmp_path / "model")
    status = training_status(tmp_path / "model")
    assert status.state == "stopped"
    assert not status.good
    assert [len(entries) for entries in read_history(folder.path / "history.csv").values()] == [5]
    train(grid, tmp_path / "model", recipe=TINY, seed=SEED)
    assert_same(tmp_path / "model", undisturbed)


@pytest.mark.parametrize("killed_at", [9, 30, 5 * STEPS - 1])
def test_a_kill_costs_one_checkpoint_interval_at_most(grid, tmp_path, monkeypatch, killed_at):
    # A step takes a second of this clock, and a checkpoint is due every seven.
    clock, taken = [0.0], 0
    monkeypatch.setattr(
        training_run, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time, sleep=time.sleep)
    )

    def killed() -> bool:
        nonlocal taken
        taken, clock[0] = taken + 1, clock[0] + 1.0
        if taken == killed_at:
            raise KeyboardInterrupt  # as sudden as a kill: nothing is saved any more
        return True

    original = training_run.run
    monkeypatch.setattr("pipeline.train_job.run", lambda order, _: original(order, killed))
    with threads(1), pytest.raises(KeyboardInterrupt):
        train(grid, tmp_path / "model", recipe=TINY, seed=SEED, checkpoint_seconds=7.0)
    found = TrainingFolder(tmp_path / "model").load_checkpoint()
    assert found is not None
    kept = STEPS * len(found["trainer"]["history"]) + found["trainer"]["steps"]
    assert 0 < killed_at - kept <= 7


def test_a_torn_checkpoint_is_replaced_by_the_one_before(grid, undisturbed, tmp_path, caplog):
    with threads(1):
        folder = stopped_after(STEPS + 6, grid, tmp_path / "model", checkpoint_seconds=0.0)
    torn = folder.path / "checkpoint.pt"
    whole = torn.read_bytes()
    for keep in (0.999, 0.5, 0.0):
        torn.write_bytes(whole[: int(keep * len(whole))])
        found = folder.load_checkpoint()
        assert found is not None
        assert found["trainer"]["steps"] == 5
        assert "checkpoint.pt cannot be read" in caplog.text
        caplog.clear()
    train(grid, tmp_path / "model", recipe=TINY, seed=SEED)
    assert_same(tmp_path / "model", undisturbed)


def test_the_checkpoint_before_a_torn_one_outlives_the_next(tmp_path):
    folder = TrainingFolder(tmp_path / "model")
    folder.begin({"seed": 0}, 1)
    assert folder.load_checkpoint() is None
    for step in range(2):
        folder.save_checkpoint({"step": step})
    os.truncate(folder.path / "checkpoint.pt", 10)
    assert folder.load_checkpoint() == {"step": 0}
    folder.save_checkpoint({"step": 2})
    (folder.path / "checkpoint.pt").unlink()  # a kill between two renamings
    assert folder.load_checkpoint() == {"step": 0}
    assert (folder.path / "unreadable.pt").stat().st_size == 10


def test_checkpoints_that_cannot_be_read_are_not_overwritten(grid, tmp_path):
    with threads(1):
        folder = stopped_after(STEPS + 6, grid, tmp_path / "model", checkpoint_seconds=0.0)
    files = [folder.path / name for name in ("checkpoint.pt", "previous.pt", "history.csv")]
    for file in files[:2]:
        os.truncate(file, 100)
    before = [file.read_bytes() for file in files]
    with pytest.raises(StoreError, match="no checkpoint") as refusal:
        train(grid, tmp_path / "model", recipe=TINY, seed=SEED)
    assert [file.read_bytes() for file in files] == before
    assert all(name in str(refusal.value.found) for name in ("checkpoint.pt", "previous.pt"))
    assert "1 finished epochs" in str(refusal.value.expected)
    assert "remove checkpoint.pt and previous.pt" in str(refusal.value.remedy)
    assert training_status(tmp_path / "model").state == "failed"


@pytest.mark.parametrize("left", ["", '{"state": "runn', "[1, 2]", '{"colour": "red"}'])
def test_a_torn_account_of_progress_stands_in_nobody_s_way(tmp_path, left):
    folder = TrainingFolder(tmp_path / "model")
    folder.path.mkdir()
    (folder.path / "progress.json").write_text(left)
    assert folder.standing() is None


def test_history_that_a_kill_kept_from_the_model_is_delivered_later(undisturbed, tmp_path):
    folder = TrainingFolder(tmp_path / "model")
    shutil.copytree(undisturbed, folder.model)
    folder.path.mkdir()
    (folder.model / "history.csv").rename(folder.path / "history.csv")
    (folder.model / "history.png").unlink()
    training_run.finish(folder)
    assert (folder.model / "history.csv").read_bytes() == (undisturbed / "history.csv").read_bytes()
    assert (folder.model / "history.png").exists()
    assert not folder.path.exists()


def test_a_validation_part_too_small_is_told_before_training(tmp_path):
    grid = write_toy_grid(tmp_path / "grid.zarr", samples=80)
    with pytest.raises(InputError, match="validation part is too small"):
        train(grid, tmp_path / "model", recipe=TINY, seed=SEED)


def test_one_training_asks_a_queue_for_one_process():
    asked = train_job._enough(SlurmConfig(jobs=4, cores=16, processes=4, memory="64GiB", walltime="01:00:00"))
    assert (asked.jobs, asked.processes, asked.cores) == (1, 1, 16)


def test_a_checkpoint_with_code_in_it_is_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    folder = TrainingFolder(tmp_path / "model")
    folder.begin({"seed": 0}, 1)
    torch.save({"stage": Hostile()}, folder.path / "checkpoint.pt")
    with pytest.raises(StoreError, match="no checkpoint of this training can be read"):
        folder.load_checkpoint()
    assert not (tmp_path / "executed").exists()


def test_other_settings_at_the_same_model_are_refused_by_name(grid, tmp_path):
    with threads(1):
        stopped_after(1, grid, tmp_path / "model")
    other = replace(TINY, emulator_schedule=replace(TINY.emulator_schedule, batch=16))
    with pytest.raises(MisuseError, match=r"emulator_schedule\.batch differ"):
        train(grid, tmp_path / "model", recipe=other, seed=SEED)
    with pytest.raises(MisuseError, match="seed differ") as refusal:
        train(grid, tmp_path / "model", recipe=TINY, seed=SEED + 1)
    assert (refusal.value.found, refusal.value.expected) == (f"seed {SEED}", f"seed {SEED + 1}")
    changed = write_toy_grid(tmp_path / "other.zarr", samples=200, seed=1)
    with pytest.raises(MisuseError, match="grid differ"):
        train(changed, tmp_path / "model", recipe=TINY, seed=SEED)


def test_unknown_recipes_and_no_epochs_are_refused(grid, tmp_path):
    with pytest.raises(MisuseError, match="recipe"):
        train(grid, tmp_path / "model", recipe="wishful")
    for recipe in RECIPES:
        with pytest.raises(MisuseError, match="epoch"):
            train(grid, tmp_path / "model", recipe=recipe, epochs=0)


def test_one_model_is_trained_by_one_process(grid, tmp_path, monkeypatch):
    with threads(1):
        folder = stopped_after(1, grid, tmp_path / "model")
    monkeypatch.setattr(training_run, "PATIENCE", 0.3)
    with folder.locked(0.0) as there:
        assert there
        with pytest.raises(MisuseError, match="another command"):
            train(grid, tmp_path / "model", recipe=TINY, seed=SEED)


def test_the_dead_are_told_from_the_living(tmp_path):
    folder = TrainingFolder(tmp_path / "model")
    with pytest.raises(MisuseError, match="no such model"):
        training_status(tmp_path / "model")
    folder.begin({"seed": 0}, 1)
    assert training_status(tmp_path / "model").state == "stopped"  # nobody was asked

    def write(**values: object) -> None:
        standing = vars(Standing(stage="flow", epochs=3, beat=time.time())) | values
        (folder.path / "progress.json").write_text(json.dumps(standing))

    write()
    # On this machine the lock tells, at once.
    assert training_status(tmp_path / "model").state == "dead"
    with folder.locked(0.0):
        assert training_status(tmp_path / "model").state == "running"
        write(beat=time.time() - 100.0)
        assert training_status(tmp_path / "model").state == "dead"
    # On another one, the heartbeat.
    write(host="elsewhere")
    assert training_status(tmp_path / "model").state == "running"
    write(host="elsewhere", beat=time.time() - 100.0)
    assert training_status(tmp_path / "model").state == "dead"
    # All is computed, but the model not yet there.
    write(state="finished")
    assert training_status(tmp_path / "model").state == "dead"
    with folder.locked(0.0):
        assert training_status(tmp_path / "model").state == "running"
    write(state="failed", error="ModelError: no numbers")
    status = training_status(tmp_path / "model")
    assert (status.state, status.good) == ("failed", False)
    assert "ModelError: no numbers" in status.summary()


def test_who_waits_for_a_training_to_be_begun_is_told_from_who_gave_up(tmp_path):
    folder = TrainingFolder(tmp_path / "model")
    folder.begin({"seed": 0}, 1)
    failed = Standing(state="failed", error="ModelError: no numbers", beat=time.time())
    (folder.path / "progress.json").write_text(json.dumps(vars(failed)))

    def told() -> tuple[str, bool]:
        status = training_status(tmp_path / "model")
        return status.state, "no numbers" in status.summary()

    # Submitted anew, what failed before is the past, and told as such.
    watched = folder.submit("a cluster", "tcp://127.0.0.1:1", False)
    assert told() == ("waiting", True)
    os.utime(folder.path / "submission.json", (0, time.time() - 100.0))
    assert told() == ("dead", True)
    folder.wait()
    assert told() == ("waiting", True)
    folder.end_submission(identity="another command's")
    assert told() == ("waiting", True)
    folder.end_submission(identity=watched.identity)
    assert told() == ("failed", True)
    # What was left alone waits without a sign of life, whoever else watches it, and goes.
    folder.submit("a cluster", "tcp://127.0.0.1:1", True)
    again = folder.submit("a cluster", "tcp://127.0.0.1:1", False)
    os.utime(folder.path / "submission.json", (0, time.time() - 100.0))
    folder.end_submission(identity=again.identity)
    assert told() == ("waiting", True)
    folder.end_submission("StoreError: no such folder there")
    assert "no such folder there" in training_status(tmp_path / "model").summary()
    assert told() == ("failed", True)
    folder.begun()
    folder.wait()
    assert training_status(tmp_path / "model").submission is None


@pytest.fixture(scope="module")
def running_cluster():
    """A cluster of two workers that outlives its clients, reached by its address."""
    with LocalCluster(
        processes=False,
        n_workers=2,
        threads_per_worker=1,
        protocol="tcp",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        worker_dashboard_address=None,
    ) as cluster:
        yield cluster.scheduler_address


def test_two_are_trained_at_once_with_nobody_watching(
    grid, undisturbed, running_cluster, tmp_path, monkeypatch
):
    monkeypatch.setattr("pipeline.train_job.threads_per_task", lambda client: 1)
    address = AddressConfig(address=running_cluster)
    models = {seed: tmp_path / f"model{seed}" for seed in (SEED, SEED + 1)}
    for seed, model in models.items():
        assert train(grid, model, recipe=TINY, seed=seed, cluster=address, detach=True) is None
    # Whoever asks again watches the same task, or has its result.
    record = train(grid, models[SEED], recipe=TINY, seed=SEED, cluster=address)
    assert record is not None
    assert record["starts"] == 1
    wait_for(lambda: training_status(models[SEED + 1]).state == "complete")
    assert_same(models[SEED], undisturbed)
    assert curve(models[SEED + 1]) != curve(undisturbed)


def test_a_training_whose_client_is_gone_stops_and_can_be_taken_up(
    grid, running_cluster, tmp_path, monkeypatch
):
    class GoneError(Exception):
        pass

    def watch(folder: TrainingFolder, *_: object) -> None:
        wait_for(lambda: (folder.path / "checkpoint.pt").exists())
        raise GoneError

    long = replace(TINY, flow_schedule=replace(TINY.flow_schedule, epochs=10_000, patience=10_000))
    settings = {"recipe": long, "seed": SEED, "cluster": AddressConfig(address=running_cluster)}
    monkeypatch.setattr("pipeline.train_job._watch", watch)
    for starts in (1, 2):
        with pytest.raises(GoneError):
            train(grid, tmp_path / "model", checkpoint_seconds=0.0, **settings)
        wait_for(lambda: training_status(tmp_path / "model").state == "stopped")
        standing = TrainingFolder(tmp_path / "model").standing()
        assert standing is not None
        assert standing.starts == starts


def test_a_training_that_fails_says_why_without_the_cluster_s_traceback(
    grid, running_cluster, tmp_path, capsys
):
    wild = replace(TINY, flow_schedule=replace(TINY.flow_schedule, learning_rate=1e30))
    with pytest.raises(ModelError, match="no longer a number") as failure:
        train(grid, tmp_path / "model", recipe=wild, cluster=AddressConfig(address=running_cluster))
    assert all("training_run" not in str(entry.path) for entry in failure.traceback)
    with pytest.raises(SystemExit) as exit:
        main(["train", "status", str(tmp_path / "model")])
    assert exit.value.code == 1
    assert "no longer a number" in capsys.readouterr().out


def test_a_detached_training_that_fails_is_attempted_anew_by_the_same_command(
    grid, running_cluster, tmp_path
):
    address = AddressConfig(address=running_cluster)
    wild = replace(TINY, flow_schedule=replace(TINY.flow_schedule, learning_rate=1e30))
    model = tmp_path / "model"
    for attempt in (1, 2):
        with contextlib.suppress(ModelError):  # it may fail while the command still looks
            train(grid, model, recipe=wild, cluster=address, detach=True)
        wait_for(lambda attempt=attempt: told(model) == ("failed", attempt))


def test_a_detached_training_in_the_queue_is_waiting_and_one_refused_has_failed(
    grid, running_cluster, tmp_path, monkeypatch
):
    address, model = AddressConfig(address=running_cluster), tmp_path / "model"
    with threads(1):
        folder = stopped_after(3, grid, model)
    monkeypatch.setattr("pipeline.train_job.threads_per_task", lambda client: 1)
    monkeypatch.setattr(training_run, "PATIENCE", 0.0)
    # Nobody can begin: another process has the lock, and gives no other sign.
    with folder.locked(0.0), contextlib.suppress(MisuseError):  # it may fail while the command still looks
        train(grid, model, recipe=TINY, seed=SEED, cluster=address, detach=True)
        wait_for(lambda: training_status(model).state == "failed")
    assert "another command is training" in training_status(model).summary()
    # Nobody can begin: all workers are busy.
    free = tmp_path / "free"
    with Client(running_cluster, set_as_default=False) as client:
        busy = client.map(partial(busy_until, str(free)), range(2), pure=False)
        assert train(grid, model, recipe=TINY, seed=SEED, cluster=address, detach=True) is None
        status = training_status(model)
        assert (status.state, status.good, told(model)) == ("waiting", True, ("stopped", 1))
        assert running_cluster in status.summary()
        free.touch()
        client.gather(busy)
    wait_for(lambda: training_status(model).state == "complete")


def busy_until(path: str, _: int) -> None:
    """Keep a worker busy until there is a file."""
    wait_for(Path(path).exists)


def told(model: Path) -> tuple[str, int] | None:
    """State and start of a training, as its folder tells them."""
    standing = TrainingFolder(model).standing()
    return None if standing is None else (standing.state, standing.starts)


def test_a_cluster_of_our_own_that_has_lost_its_workers_is_given_up(monkeypatch):
    monkeypatch.setattr(train_job, "DESERTED", 0.0)
    workers = {"tcp://127.0.0.1:1": 1}
    client = SimpleNamespace(nthreads=lambda: workers, scheduler=None)
    done = train_job._watched(client, lambda: False)
    time.sleep(0.01)
    assert not done()
    workers.clear()
    time.sleep(0.01)
    with pytest.raises(ClusterError, match="no workers any more"):
        done()


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="torch can use a GPU here, so that the refusal under test does not arise",
)
def test_a_worker_that_offers_a_gpu_gets_the_training(grid, tmp_path):
    with (
        LocalCluster(
            processes=False, n_workers=1, threads_per_worker=1, resources={"GPU": 1}, dashboard_address=None
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
        pytest.raises(ClusterError, match="offers a GPU"),
    ):
        train(grid, tmp_path / "model", recipe=TINY, cluster=client)


def test_the_joint_network_is_trained_at_one_angle(grid, tmp_path):
    recipe = Recipe(
        architecture={"latent_size": 16, "width": 224, "blocks": 2},
        emulator=TINY.emulator,
        emulator_schedule=TINY.emulator_schedule,
        joint_schedule=JointSchedule(steps=2, batch=16).scaled(3),
        augmentation=RECIPES["radynversion"].augmentation,
        sampling=TINY.sampling,
        mu=0.7,
    )
    record = train(grid, tmp_path / "model", recipe=recipe)
    assert record is not None
    model = inn.load_model(tmp_path / "model")
    assert isinstance(model, JointNetwork)
    assert model.emulator is not None
    assert model.novelty is not None
    assert record["conditions"] == {"mu": [0.6, 0.6], "calibration_error": [0.0, 0.0]}
    assert record["epochs"] == {"joint": 3, "emulator": 2}
    history = read_history(tmp_path / "model" / "history.csv")
    assert history["joint"][0].terms["bandwidth_latent"] > 0
    assert history["emulator"][0].terms == {}
    # The bandwidths have their own panel, and are in the line that is logged.
    titles = [axes.get_title(loc="left") for axes in history_figure(history).axes]
    assert titles[:3] == ["joint: loss", "joint: learning rate", "joint: terms"]
    assert "joint: bandwidths" in titles
    assert "emulator: loss" in titles


def test_the_paper_s_curriculum_is_scaled_to_the_epochs_asked_for():
    recipe = RECIPES["radynversion"].with_epochs(120)
    assert recipe.joint_schedule == JointSchedule().scaled(120)
    assert recipe.emulator_schedule == RECIPES["radynversion"].emulator_schedule
    assert RECIPES["conditional"].with_epochs(7).flow_schedule.epochs == 7


def test_the_display_logs_stages_and_epochs(caplog):
    entry = vars(Epoch(2, 0.5, 0.25, 1e-3, 9.0, {"bandwidth_latent": 3.0}))
    with caplog.at_level("INFO", "flarefield"), TrainingDisplay("training model") as display:
        display.update(Standing(stage="joint", epochs=9, epoch=2, last=entry, best=entry))
        display.update(Standing(stage="joint", epochs=9, epoch=3, last=entry, best=entry))
        display.update(Standing(stage="scoring"))
    assert [record.message for record in caplog.records] == [
        "training model, joint: epoch 2/9, loss 0.5, held out 0.25 (best 0.25 in epoch 2), "
        "learning rate 1.00e-03, bandwidth latent 3",
        "training model, scoring",
    ]


def test_the_best_epoch_is_marked_in_the_figure():
    history = {"flow": [Epoch(n, 1.0 / n, 1.0 + (n - 3) ** 2, 1e-3, float(n)) for n in range(1, 6)]}
    axes = history_figure(history).axes[0]
    marked = axes.lines[-1]
    assert (marked.get_xdata()[0], marked.get_ydata()[0]) == (3, 1.0)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [1.0 / n for n in range(1, 6)])


def test_the_commands(grid, undisturbed, tmp_path, capsys):
    for arguments, code, text in (
        (["train", "--help"], 0, "GRID.zarr"),
        (["train", "status", "--help"], 0, "Example: flarefield train status model"),
        (["train", "status", str(undisturbed)], 0, "complete"),
        (["train", "status", str(tmp_path / "nothing")], 2, "no such model"),
        (["train", str(grid), str(tmp_path / "model"), "--detach"], 2, "goes on without this command"),
        (["train", str(grid), str(tmp_path / "model"), "--seed", str(2**32)], 2, "equal to 4294967295"),
        (["train", str(grid), str(undisturbed)], 2, "the output exists"),
    ):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        said = capsys.readouterr()
        assert exit.value.code == code
        assert text in " ".join((said.out + said.err).split())
    with pytest.raises(MisuseError, match="goes on without"):
        train(grid, tmp_path / "model", recipe=TINY, cluster=LocalConfig(), detach=True)
