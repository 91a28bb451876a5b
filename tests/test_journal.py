"""The journal survives being killed at any moment, and says what is done and nothing else."""

import binascii
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from pipeline.errors import MisuseError, StoreError
from pipeline.journal import BATCH, Journal, changes
from pipeline.storage import Directory, lock

SETTINGS = {"draws": 256, "quantiles": [0.05, 0.5], "model": "ab" * 32, "calibration_error": None}


def lines(path):
    return path.read_bytes().splitlines()


def test_it_lies_beside_its_store(tmp_path):
    assert Directory(tmp_path / "map.zarr").journal == tmp_path / "map.zarr.journal"


def test_what_is_appended_is_read_back_in_order(tmp_path):
    path = tmp_path / "j"
    with Journal.create(path, "a run", SETTINGS) as journal:
        journal.append({"tile": 3, "sha256": "00"})
        journal.append({"tile": 1, "error": "line one\nline two, \u00b5"})
    with Journal.open(path) as journal:
        assert (journal.run, journal.fingerprint) == ("a run", SETTINGS)
        assert list(journal.records()) == [
            {"tile": 3, "sha256": "00"},
            {"tile": 1, "error": "line one\nline two, \u00b5"},
        ]
        assert not journal.finished
        journal.append({"finished": True})
    with Journal.open(path) as journal:
        assert journal.finished
        journal.append({"tile": 1, "sha256": "11"})
        journal.flush()
        assert not journal.finished


def test_every_line_is_json_on_its_own(tmp_path):
    path = tmp_path / "j"
    with Journal.create(path, "a run", SETTINGS) as journal:
        journal.append({"tile": 3})
    header, record = (json.loads(line) for line in lines(path))
    assert header.pop("crc32")
    assert record.pop("crc32")
    assert header == {"journal": 2, "run": "a run", "fingerprint": SETTINGS}
    assert record == {"tile": 3}


def added_to(path, record):
    """The bytes that a record adds to a journal, which stays as it is."""
    before = path.read_bytes()
    with Journal.open(path) as journal:
        journal.append(record)
    added = path.read_bytes()[len(before) :]
    path.write_bytes(before)
    return added


def test_a_line_ends_with_the_checksum_of_what_stands_before_it(tmp_path):
    path = tmp_path / "j"
    Journal.create(path, "a run", SETTINGS).close()
    body, seal = path.read_bytes().rsplit(b',"crc32":', 1)
    assert seal == f'"{binascii.crc32(body):08x}"}}\n'.encode()


@pytest.mark.parametrize("bit", range(8))
def test_whatever_bit_is_changed_the_line_is_none_and_the_settings_are_refused(tmp_path, bit):
    path = tmp_path / "j"
    records = [{"tile": 0, "answered": 24}, {"tile": 1, "answered": 24}, {"finished": True}]
    with Journal.create(path, "a run", SETTINGS) as journal:
        for record in records:
            journal.append(record)
    whole = path.read_bytes()
    begins = len(lines(path)[0]) + 1
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        if place < begins:
            with pytest.raises(StoreError, match=r"first line|format") as refusal:
                Journal.open(path)
            assert "--overwrite" in refusal.value.remedy
        else:
            found = list(Journal.open(path).records())
            assert len(found) < len(records)
            assert all(record in records for record in found)


def test_a_journal_without_checksums_is_gone_on_with(tmp_path):
    path = tmp_path / "j"
    header = {"journal": 1, "run": "a run", "fingerprint": SETTINGS}
    path.write_text(f'{json.dumps(header)}\n{{"tile":0}}\n')
    with Journal.open(path) as journal:
        assert (journal.run, journal.fingerprint) == ("a run", SETTINGS)
        journal.append({"tile": 1})
        journal.append({"tile": 2})
    assert [entry["tile"] for entry in Journal.open(path).records()] == [0, 1, 2]
    path.write_bytes(path.read_bytes().replace(b'"tile":2', b'"tile":3'))
    assert [entry["tile"] for entry in Journal.open(path).records()] == [0, 1]


def test_records_are_written_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.journal.INTERVAL", 1e9)
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), real(descriptor)))
    path = tmp_path / "j"
    with Journal.create(path, "a run", SETTINGS) as journal:
        synced.clear()
        for tile in range(BATCH - 1):
            journal.append({"tile": tile})
        assert len(lines(path)) == 1
        assert not synced
        journal.append({"tile": BATCH - 1})
        assert len(lines(path)) == 1 + BATCH
        assert len(synced) == 1
        journal.append({"tile": BATCH})
    assert len(lines(path)) == 2 + BATCH


def test_a_record_is_not_held_back_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.journal.INTERVAL", 0.0)
    path = tmp_path / "j"
    with Journal.create(path, "a run", SETTINGS) as journal:
        journal.append({"tile": 0})
        assert len(lines(path)) == 2


@pytest.mark.parametrize("kept", range(1, 42))
def test_a_torn_last_line_counts_as_nothing_and_does_no_harm(tmp_path, kept):
    path = tmp_path / "j"
    with Journal.create(path, "a run", SETTINGS) as journal:
        journal.append({"tile": 0})
    whole = path.read_bytes()
    record = added_to(path, {"tile": 1, "stored": 12})
    assert len(record) == 42
    path.write_bytes(whole + record[:kept])
    with Journal.open(path) as journal:
        assert [entry["tile"] for entry in journal.records()] == [0]
        journal.append({"tile": 2})
    again = path.read_bytes()
    path.write_bytes(whole)
    assert whole + added_to(path, {"tile": 2}) == again


def test_a_line_damaged_by_the_machine_counts_as_nothing(tmp_path):
    path = tmp_path / "j"
    with Journal.create(path, "a run", SETTINGS) as journal:
        journal.append({"tile": 0})
    path.write_bytes(path.read_bytes() + b"\0" * 40 + b"\n" + added_to(path, {"tile": 2}) + b"17\n")
    with Journal.open(path) as journal:
        assert [entry["tile"] for entry in journal.records()] == [0, 2]


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"no json\n", b"[1]\n", b'{"journal":99}\n', b'{"journal":1,"ru']
)
def test_another_file_is_not_taken_for_a_journal(tmp_path, content):
    path = tmp_path / "j"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="journal"):
        Journal.open(path)
    assert path.read_bytes() == content


def test_a_new_journal_replaces_an_old_one_whole(tmp_path):
    path = tmp_path / "j"
    with Journal.create(path, "old", SETTINGS) as journal:
        journal.append({"tile": 0})
    Journal.create(path, "new", SETTINGS).close()
    with Journal.open(path) as journal:
        assert journal.run == "new"
        assert not list(journal.records())
    assert os.listdir(tmp_path) == ["j"]


def test_without_space_a_journal_is_refused_with_a_remedy(tmp_path):
    path = tmp_path / "j"
    (tmp_path / "j.new").symlink_to("/dev/full")
    with pytest.raises(StoreError, match="space") as refusal:
        Journal.create(path, "a run", SETTINGS)
    assert "same command" in refusal.value.remedy
    assert not path.exists()


def test_changes_names_what_differs():
    other = {**SETTINGS, "draws": 128, "tile": [8, 8]}
    assert changes(SETTINGS, other) == {"draws": (256, 128), "tile": (None, [8, 8])}
    assert changes(other, SETTINGS) == {"draws": (128, 256), "tile": ([8, 8], None)}
    assert changes(SETTINGS, dict(SETTINGS)) == {}


HOLDER = """
import sys, time
from pathlib import Path
from pipeline.storage import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_clients_cannot_hold_one_map_and_a_killed_one_lets_go(tmp_path):
    store = tmp_path / "map.zarr"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(store)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(MisuseError, match="another command") as refusal, lock(store):
            pass
        assert f"process {holder.pid}" in refusal.value.found
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert (tmp_path / "map.zarr.lock").exists()
        with lock(store), pytest.raises(MisuseError), lock(store):  # not twice in one process either
            pass
        assert not os.listdir(tmp_path)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_file_system_without_locks_is_worked_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path / "map.zarr"):
        pass
    assert "without locks" in caplog.text
    assert not os.listdir(tmp_path)
