"""`--check` finds every kind of damage, names the tile, and finds none where there is none."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zarr
from toy_observation import toy_observation, write_store

import pipeline.tiles as tiles
from pipeline.check import check_map
from pipeline.cli import main
from pipeline.errors import MisuseError, StoreError
from pipeline.invert import invert
from pipeline.journal import Journal
from pipeline.results import VARIABLES, open_map
from pipeline.storage import Directory, lock
from pipeline.tiles import TileGrid, tile_keys

GRID = TileGrid((1, 20, 18), (8, 8))
SETTINGS = {"draws": 8, "tile": 8}


@pytest.fixture(scope="module")
def whole(client, fake_model, tmp_path_factory):
    """A finished map of nine tiles, with the observation it was made from."""
    folder = tmp_path_factory.mktemp("whole")
    write_store(toy_observation(times=1), folder / "o.zarr")
    report = invert(folder / "o.zarr", folder / "map.zarr", model=fake_model, cluster=client, **SETTINGS)
    assert not report.failed
    return folder / "map.zarr"


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(whole, tmp_path / "map.zarr")
    shutil.copy(Directory(whole).journal, Directory(tmp_path / "map.zarr").journal)
    return tmp_path / "map.zarr"


def files(store):
    return {str(path): path.read_bytes() for path in Path(store.parent).rglob("*") if path.is_file()}


def test_a_finished_map_is_sound_and_is_left_alone(whole):
    before = files(whole)
    report = check_map(whole)
    assert report.sound
    assert report.finished
    assert (report.tiles, report.faults) == (9, ())
    assert "9 of 9 tiles are as they were computed" in report.summary()
    assert files(whole) == before


@pytest.mark.parametrize("variable", [variable.name for variable in VARIABLES])
def test_a_file_that_is_gone_is_missing(copy, variable):
    (copy / tile_keys(GRID[4])[variable]).unlink()
    report = check_map(copy)
    assert not report.sound
    assert report.of("missing") == (GRID[4],)
    assert len(report.faults) == 1
    assert variable in report.faults[0].detail
    assert f"tile at {GRID[4]}" in report.summary()


def test_whatever_is_done_to_a_file_the_tile_is_as_it_was_or_not_sound(copy):
    """A file is cut, emptied, or has one bit turned over (a few bits of Blosc's headers mean nothing)."""
    file = copy / tile_keys(GRID[2])["temperature"]
    content = file.read_bytes()
    intact = temperature_of(copy)
    places = np.linspace(0, len(content) - 1, 12).astype(int)
    damaged = [content[:place] for place in places]
    damaged += [content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :] for place in places]
    harmless = 0
    for wrong in damaged:
        file.write_bytes(wrong)
        report = check_map(copy)
        if len(wrong) == len(content) and is_as(temperature_of(copy), intact):
            assert report.sound
            harmless += 1
        else:
            assert report.of("damaged") == (GRID[2],)
            assert len(report.faults) == 1
    assert harmless <= 2
    file.write_bytes(content)
    assert check_map(copy).sound


def is_as(found, intact):
    return found is not None and np.array_equal(found, intact, equal_nan=True)


def temperature_of(path):
    """A map's temperatures; None where they cannot be read."""
    try:
        return zarr.open_group(path, mode="r")["temperature"][:]
    except Exception:  # which one a damaged file raises is up to its codec
        return None


def test_values_that_were_changed_are_damage(copy):
    velocity = zarr.open_group(copy, mode="r+")["velocity"]
    velocity[0, 17, 17, 0, 30] = np.nextafter(velocity[0, 17, 17, 0, 30], np.float32(np.inf))
    report = check_map(copy)
    assert report.of("damaged") == (GRID[8],)
    assert "values are others" in report.faults[0].detail


@pytest.mark.parametrize("file", ["temperature/zarr.json", "quality/zarr.json", "zarr.json"])
@pytest.mark.parametrize("change", ["gone", "cut", "units"])
def test_metadata_that_changed_or_has_gone_is_damage(copy, file, change):
    path = copy / file
    if change == "gone":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:50])
    else:
        text = path.read_text()
        path.write_text(text.replace('"long_name"', '"other_name"', 1))
        assert path.read_text() != text
    with pytest.raises(StoreError, match=r"damaged|not a FlareField map|no such map") as refusal:
        check_map(copy)
    assert refusal.value.remedy


def test_metadata_of_which_a_byte_changed_are_damage_that_says_where(copy, client, fake_model, whole):
    path = copy / "zarr.json"
    content = path.read_bytes()
    # keys of a codec's configuration that become others, and characters anywhere
    places = [content.index(b'"%s"' % key) + 5 for key in (b"level", b"shuffle", b"chunk_shape", b"codecs")]
    places += [content.index(b'"map"') + 1, *np.random.default_rng(3).integers(len(content), size=60)]
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
        with pytest.raises(StoreError) as refusal:
            check_map(copy)
        assert refusal.value.where == str(copy)
        assert "zarr.json" in refusal.value.found or "the map was begun with" in refusal.value.found
        assert refusal.value.remedy
    place = places[0]
    path.write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
    with pytest.raises(StoreError, match="not a FlareField map") as refusal:
        open_map(copy)
    assert "zarr.json cannot be read: TypeError" in refusal.value.found
    with pytest.raises(MisuseError, match="is not a map") as refusal:
        invert(whole.parent / "o.zarr", copy, model=fake_model, cluster=client, **SETTINGS)
    assert "zarr.json" in refusal.value.found


@pytest.mark.parametrize("region", [None, "0:16,0:8"])
@pytest.mark.parametrize("places", ["both", "quality/zarr.json", "zarr.json"])
def test_what_pixels_without_files_read_as_is_looked_at(whole, tmp_path, client, fake_model, region, places):
    copy = tmp_path / "map.zarr"
    again = {"model": fake_model, "cluster": client, "region": region, **SETTINGS}
    invert(whole.parent / "o.zarr", copy, **again)
    assert check_map(copy).sound
    before = files(copy)
    right, wrong = (512, 256) if region else (256, 512)
    for name in ("quality/zarr.json", "zarr.json"):
        if places in ("both", name):
            description = json.loads((copy / name).read_text())
            described = description
            if name == "zarr.json":
                described = description["consolidated_metadata"]["metadata"]["quality"]
            assert described["fill_value"] == right
            described["fill_value"] = wrong
            (copy / name).write_text(json.dumps(description))
    report = check_map(copy)
    assert (report.finished, report.faults, report.sound) == (True, (), False)
    assert f"not as {right}" in report.summary()
    invert(whole.parent / "o.zarr", copy, **again)
    assert check_map(copy).sound
    after = files(copy)
    assert after.pop(str(copy) + ".journal").startswith(before.pop(str(copy) + ".journal"))
    assert {name: json.loads(after.pop(name)) for name in [*after] if name.endswith("zarr.json")} == {
        name: json.loads(before.pop(name)) for name in [*before] if name.endswith("zarr.json")
    }
    assert after == before


def test_records_of_tiles_that_cannot_be_are_none(copy):
    with Journal.open(Directory(copy).journal) as journal:
        for record in (
            {"tile": 900, "sha256": "00"},
            {"tile": 0, "sha256": "zz"},
            {"tile": "0"},
            {"tile": -1},
            {"finished": True, "tiles": 9},
        ):
            journal.append(record)
    assert check_map(copy).sound


@pytest.mark.parametrize("number", range(1, 11))
def test_a_record_that_was_changed_is_none_and_its_tile_is_done_again(
    copy, whole, client, fake_model, number
):
    lines = Directory(copy).journal.read_text().splitlines(keepends=True)
    changed = lines[number].replace('"answered":', '"answered":1').replace('"tiles":9', '"tiles":8')
    assert changed != lines[number]
    Directory(copy).journal.write_text("".join([*lines[:number], changed, *lines[number + 1 :]]))
    report = check_map(copy)
    assert not report.sound
    tiles = () if number == 10 else (GRID[json.loads(lines[number])["tile"]],)
    assert (report.finished, report.of("not recorded"), len(report.faults)) == (
        number < 10,
        tiles,
        len(tiles),
    )
    again = invert(whole.parent / "o.zarr", copy, model=fake_model, cluster=client, **SETTINGS)
    assert (again.resumed, again.answered) == (9 - len(tiles), answered_in(copy))
    assert check_map(copy).sound


def answered_in(path):
    return int(np.isfinite(temperature_of(path)[..., 0, 0]).sum())


@pytest.mark.parametrize("sealed", [True, False], ids=["", "without checksums"])
@pytest.mark.parametrize(
    ("recorded", "changed"),
    [('"draws":8', '"draws":9'), ('"region":null', '"region":"0:1"'), ('"float32"', '"float64"')],
)
def test_settings_of_the_journal_that_are_not_the_maps_are_refused(
    copy, whole, client, fake_model, recorded, changed, sealed
):
    first, *rest = Directory(copy).journal.read_text().splitlines()
    if not sealed:  # as earlier versions wrote it
        first = first[: first.rindex(',"crc32"')].replace('"journal":2', '"journal":1') + "}"
        Directory(copy).journal.write_text("\n".join([first, *rest, ""]))
        assert check_map(copy).sound
    assert recorded in first
    Directory(copy).journal.write_text("\n".join([first.replace(recorded, changed), *rest, ""]))
    again = {"model": fake_model, "cluster": client, **SETTINGS}
    for action in (check_map, lambda path: invert(whole.parent / "o.zarr", path, **again)):
        with pytest.raises(StoreError, match="first line" if sealed else "not those") as refusal:
            action(copy)
        assert refusal.value.where == str(Directory(copy).journal)
        assert refusal.value.remedy


def test_what_the_journal_does_not_know_is_not_recorded(copy):
    lines = Directory(copy).journal.read_text().splitlines(keepends=True)
    unknown = json.loads(lines[3])["tile"]
    Directory(copy).journal.write_text("".join(lines[:3] + lines[4:]))
    report = check_map(copy)
    assert report.of("not recorded") == (GRID[unknown],)
    assert report.finished
    assert not report.sound


@pytest.mark.parametrize("lost", [("record",), ("record", "files")])
def test_a_part_that_lost_a_record_has_all_that_it_left_out_in_order(
    tmp_path, whole, client, fake_model, lost
):
    output = tmp_path / "part.zarr"
    again = {"model": fake_model, "cluster": client, **SETTINGS, "region": "0:10,0:8"}
    report = invert(whole.parent / "o.zarr", output, **again)
    assert 1 < report.tiles < len(GRID)
    lines = Directory(output).journal.read_text().splitlines(keepends=True)
    unknown = GRID[json.loads(lines[2])["tile"]]
    Directory(output).journal.write_text("".join(lines[:2] + lines[3:]))
    if "files" in lost:
        for key in tile_keys(unknown).values():
            (output / key).unlink()
    faulty = check_map(output).of("not recorded")
    if "files" in lost:  # nothing tells it from those that were left out
        assert unknown in faulty
    else:
        assert faulty == (unknown,)
    assert invert(whole.parent / "o.zarr", output, **again).resumed == report.tiles - 1
    assert check_map(output).sound


def test_a_map_that_is_not_finished_is_not_sound(copy):
    lines = Directory(copy).journal.read_text().splitlines(keepends=True)
    Directory(copy).journal.write_text("".join(lines[:-1]))
    report = check_map(copy)
    assert (report.finished, report.faults, report.sound) == (False, (), False)
    assert "has not come to its end" in report.summary()


def test_a_failed_tile_is_told_from_a_damaged_one(whole, tmp_path, client, fake_model):
    observation = toy_observation(times=1)
    chunks = {name: {"chunks": (1, 8, 8, n)} for name, n in (("halpha", 15), ("ca8542", 25))}
    write_store(observation, tmp_path / "o.zarr", encoding=chunks)
    (tmp_path / "o.zarr/ca8542/c/0/0/1/0").write_bytes(b"not a chunk")
    output = tmp_path / "map.zarr"
    invert(tmp_path / "o.zarr", output, model=fake_model, cluster=client, **SETTINGS)
    report = check_map(output)
    assert [(faulty.tile, faulty.fault) for faulty in report.faults] == [(GRID[1], "failed")]
    assert report.finished
    shutil.copy(whole / tile_keys(GRID[1])["misfit"], output / tile_keys(GRID[1])["misfit"])
    assert check_map(output).of("damaged") == (GRID[1],)


def test_what_is_found_damaged_is_done_again_by_the_same_command(copy, whole, client, fake_model):
    again = {"model": fake_model, "cluster": client, **SETTINGS}
    damaged = copy / tile_keys(GRID[2])["temperature"]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the size that the journal knows
    (copy / tile_keys(GRID[5])["quality"]).unlink()
    for _ in range(2):
        assert [faulty.fault for faulty in check_map(copy).faults] == ["damaged", "missing"]
    assert invert(whole.parent / "o.zarr", copy, **again).resumed == 7
    assert check_map(copy).sound
    assert damaged.read_bytes() == content
    assert invert(whole.parent / "o.zarr", copy, **again).resumed == 9


def test_a_tile_that_was_half_done_again_is_not_taken_for_whole(copy, whole, client, fake_model, monkeypatch):
    """Of one file it was known that it had gone, of another one not that it was damaged."""
    keys = tile_keys(GRID[4])
    damaged, gone = copy / keys["temperature"], copy / keys["electron_density"]
    content = damaged.read_bytes()
    damaged.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    before = gone.read_bytes()
    gone.unlink()

    def die(*_):
        gone.write_bytes(before)
        raise StoreError("killed")

    settings = {"model": fake_model, "cluster": client, **SETTINGS}
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "write_tile", die)
        with pytest.raises(StoreError, match="killed"):
            invert(whole.parent / "o.zarr", copy, **settings)
    assert invert(whole.parent / "o.zarr", copy, **settings).resumed == 8
    assert damaged.read_bytes() == content
    assert check_map(copy).sound


def test_a_map_that_is_being_worked_on_is_not_judged(copy):
    with lock(copy), pytest.raises(MisuseError, match="another command"):
        check_map(copy)


def test_a_map_that_cannot_be_written_to_is_judged_all_the_same(copy, monkeypatch, caplog):
    (copy / tile_keys(GRID[5])["quality"]).unlink()
    before = files(copy)

    @contextmanager
    def refused(store):
        raise StoreError("nothing can be written there", where=store)
        yield

    monkeypatch.setattr("pipeline.storage.Directory.lock", refused)
    assert check_map(copy).of("missing") == (GRID[5],)
    assert "cannot be noted" in caplog.text
    assert files(copy) == before


def test_without_its_journal_there_is_nothing_to_check_a_map_against(copy, whole):
    journal = Directory(copy).journal
    Journal.create(journal, "0" * 32, zarr.open_group(copy).attrs["settings"]).close()
    with pytest.raises(StoreError, match="different runs"):
        check_map(copy)
    journal.unlink()
    with pytest.raises(StoreError, match="journal is missing"):
        check_map(copy)
    with pytest.raises(StoreError, match="no such map"):
        check_map(copy.parent / "nothing.zarr")
    with pytest.raises(StoreError, match="not a FlareField map"):
        check_map(whole.parent / "o.zarr")


def test_the_command_says_what_it_found_and_ends_accordingly(copy, capsys):
    for arguments in (["--check", copy], [copy, "--check"], ["nowhere.zarr", copy, "--check"]):
        with pytest.raises(SystemExit) as end:
            main(["invert", *map(str, arguments)])
        assert end.value.code == 0
        assert "9 of 9" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["invert", "--check", str(copy), "--skip-from", "map.zarr", "--dry-run"])
    assert end.value.code == 2
    assert "--dry-run, --skip-from" in capsys.readouterr().err
    (copy / tile_keys(GRID[0])["novelty"]).unlink()
    with pytest.raises(SystemExit) as end:
        main(["invert", "--check", str(copy)])
    assert end.value.code == 1
    assert "missing: 1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["invert", str(copy)])
    assert end.value.code == 2
    assert "no map to write" in capsys.readouterr().err
