"""The driver: a bounded number of tasks in flight, each tried as often as it was said, none lost."""

import threading
import time
from collections import Counter
from types import SimpleNamespace

import dask
import pytest
from distributed import Client, KilledWorker, LocalCluster

from pipeline import driver
from pipeline.driver import run_bounded
from pipeline.errors import ClusterError

tries: Counter[int] = Counter()
under_way: Counter[int] = Counter()
at_once: Counter[int] = Counter()
guard = threading.Lock()


def double(number):
    return 2 * number


def fail_thrice(number):
    with guard:
        tries[number] += 1
        count = tries[number]
    if number % 3 == 0 and count <= 3:
        raise ValueError(f"{number}, try {count}")
    return count


@pytest.fixture(autouse=True)
def _no_tries():
    for counter in (tries, under_way, at_once):
        counter.clear()


def test_every_task_has_one_outcome(client):
    outcomes = list(run_bounded(client, double, range(150)))
    assert sorted((outcome.task, outcome.result) for outcome in outcomes) == [(n, 2 * n) for n in range(150)]
    assert all(outcome.error is None and outcome.attempts == 1 for outcome in outcomes)


def test_no_tasks_have_no_outcomes(client):
    assert list(run_bounded(client, double, [])) == []


@pytest.mark.parametrize("window", [1, 7])
def test_no_more_tasks_are_drawn_than_fit_the_window(client, window):
    drawn = []
    most = 0

    def tasks():
        for number in range(40):
            drawn.append(number)
            yield number

    done = 0
    for _ in run_bounded(client, double, tasks(), window=window):
        most = max(most, len(drawn) - done)
        done += 1
    assert (done, most) == (40, window)


def test_a_task_that_fails_is_tried_again(client):
    outcomes = {outcome.task: outcome for outcome in run_bounded(client, fail_thrice, range(7), attempts=4)}
    assert {number: outcomes[number].attempts for number in range(7)} == {
        0: 4, 1: 1, 2: 1, 3: 4, 4: 1, 5: 1, 6: 4
    }  # fmt: skip
    assert all(outcome.result == outcome.attempts for outcome in outcomes.values())


def test_a_task_that_fails_for_good_comes_with_its_last_error(client):
    outcomes = {outcome.task: outcome for outcome in run_bounded(client, fail_thrice, range(4), attempts=2)}
    assert outcomes[1].error is None
    for number in (0, 3):
        assert outcomes[number].result is None
        assert outcomes[number].attempts == 2
        assert isinstance(outcomes[number].error, ValueError)
        assert str(outcomes[number].error) == f"{number}, try 2"
    assert tries == {0: 2, 1: 1, 2: 1, 3: 2}


def kill_workers(number):
    with guard:
        tries[number] += 1
    raise KilledWorker("a task", SimpleNamespace(address="tcp://a-dead-worker"), 3)


def test_a_task_that_has_killed_its_workers_is_not_tried_again(client):
    (outcome,) = run_bounded(client, kill_workers, [1])
    assert isinstance(outcome.error, KilledWorker)
    assert tries[1] == 1


def test_tasks_that_end_early_let_what_is_in_flight_come_home(client):
    enough = []

    def tasks():
        for number in range(1000):
            if enough:
                return
            yield number

    outcomes = []
    for outcome in run_bounded(client, double, tasks(), window=8):
        outcomes.append(outcome)
        if len(outcomes) == 3:
            enough.append(True)
    assert 8 <= len(outcomes) < 32
    assert sorted(outcome.task for outcome in outcomes) == list(range(len(outcomes)))


def wait(number):
    with guard:
        tries[number] += 1
    time.sleep(0.05)


def test_leaving_early_takes_back_what_is_in_flight(client):
    for _ in run_bounded(client, wait, range(64), window=64):
        break
    deadline = time.monotonic() + 20
    while client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(tries) < 64


def test_nothing_is_left_on_the_cluster_afterwards(client):
    list(run_bounded(client, fail_thrice, range(20), attempts=1))
    deadline = time.monotonic() + 20
    while client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def try_slowly(number):
    with guard:
        under_way[number] += 1
        at_once[number] = max(at_once[number], under_way[number])
        tries[number] += 1
    time.sleep(0.3)
    with guard:
        under_way[number] -= 1
    return tries[number]


def test_a_result_that_died_with_its_worker_is_made_anew_once(monkeypatch):
    """Two of one task at the same time would write to the same files."""
    lost = []

    async def remove(dask_scheduler, key):
        (worker,) = (state.address for state in dask_scheduler.tasks[key].who_has)
        await dask_scheduler.remove_worker(worker, stimulus_id="test")

    real = driver._batches

    def late(in_flight, manned):
        for batch in real(in_flight, manned):
            if not lost:
                lost.append(batch[0])
                client.run_on_scheduler(remove, key=batch[0].key)
                deadline = time.monotonic() + 20
                while batch[0].status == "finished" and time.monotonic() < deadline:
                    time.sleep(0.01)
            yield batch

    monkeypatch.setattr(driver, "_batches", late)
    with (
        LocalCluster(
            processes=False, n_workers=3, threads_per_worker=1, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        outcomes = list(run_bounded(client, try_slowly, range(2)))
    assert sorted(outcome.task for outcome in outcomes) == [0, 1]
    assert [outcome.attempts for outcome in outcomes] == [1, 1]
    assert (sorted(tries.values()), dict(at_once)) == ([1, 2], {0: 1, 1: 1})


def sleep_for_long(number):
    time.sleep(1.0)


def test_a_lost_scheduler_is_an_error_and_no_endless_wait():
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s", "distributed.comm.retry.count": 0}),
        LocalCluster(
            processes=False, n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False, timeout=2) as client,
    ):
        outcomes = run_bounded(client, sleep_for_long, range(50))
        next(outcomes)
        cluster.loop.add_callback(cluster.scheduler.close)
        with pytest.raises(ClusterError, match="scheduler") as refusal:
            list(outcomes)
        assert "resumes" in refusal.value.remedy


@pytest.fixture
def small_cluster():
    with (
        LocalCluster(
            processes=False, n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield cluster, client


def test_a_cluster_that_has_lost_all_workers_is_given_up(small_cluster, monkeypatch):
    monkeypatch.setattr(driver, "DESERTED", 0.3)
    cluster, client = small_cluster
    outcomes = run_bounded(client, double, range(1000), window=4)
    next(outcomes)
    cluster.scale(0)
    with pytest.raises(ClusterError, match="no workers any more") as refusal:
        list(outcomes)
    assert "same command again" in refusal.value.remedy


def test_workers_that_join_in_time_go_on_where_none_was_left(small_cluster, monkeypatch):
    monkeypatch.setattr(driver, "DESERTED", 0.2)
    cluster, _ = small_cluster
    with Client(cluster.scheduler_address, set_as_default=False) as client:  # of a cluster that others run
        _goes_on(client, cluster, monkeypatch)


def _goes_on(client, cluster, monkeypatch):
    outcomes = run_bounded(client, double, range(40), window=4)
    found = [next(outcomes).result]
    cluster.scale(0)
    told = threading.Event()
    monkeypatch.setattr(driver.logger, "warning", lambda *_: told.set())
    threading.Thread(target=lambda: told.wait(60.0) and cluster.scale(1), daemon=True).start()
    found += [outcome.result for outcome in outcomes]
    assert sorted(found) == [2 * number for number in range(40)]
    assert told.is_set()


def test_a_worker_that_is_being_replaced_after_a_long_time_is_waited_for(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(driver.time, "monotonic", lambda: clock[0])
    workers = {"tcp://127.0.0.1:1": 1}
    manned = driver.Manned(SimpleNamespace(nthreads=lambda: workers, scheduler=None), patience=60.0)
    clock[0] = 3600.0  # results came all the time, and nobody had to ask
    workers.clear()
    manned.see()
    clock[0] += 50.0
    manned.see()
    workers["tcp://127.0.0.1:2"] = 1
    clock[0] += 50.0
    manned.see()
    workers.clear()
    clock[0] += 50.0
    manned.see()
    clock[0] += 61.0
    with pytest.raises(ClusterError, match="no workers any more") as refusal:
        manned.see()
    assert refusal.value.found == "none for 61 s"
