"""A part of an observation: the bits of the whole map, nothing done for the rest, and honest about that."""

import binascii
import json
import shutil

import disturbed
import numpy as np
import pytest
import xarray as xr
import zarr
from toy_observation import toy_observation, write_store

import pipeline.invert
import pipeline.tiles as tiles
from pipeline.check import check_map
from pipeline.errors import MisuseError, StoreError
from pipeline.invert import invert
from pipeline.journal import read_journal
from pipeline.results import VARIABLES, Flag, flagged, open_map
from pipeline.selection import EVERYTHING, Selection, Skip, select
from pipeline.storage import Directory
from pipeline.tiles import Tile, TileGrid

SETTINGS = {"draws": 32, "tile": 8, "seed": 3}
GRID = TileGrid((2, 20, 18), (8, 8))


@pytest.fixture
def settings(fake_model):
    return {"model": fake_model, **SETTINGS}


@pytest.fixture(scope="module")
def whole(client, toy, fake_model, tmp_path_factory):
    """The map of everything."""
    output = tmp_path_factory.mktemp("whole") / "map.zarr"
    invert(toy, output, model=fake_model, cluster=client, **SETTINGS)
    return output


@pytest.fixture
def earlier(tmp_path, whole):
    """A copy of the map of everything, whose flags can be changed."""
    return shutil.copytree(whole, tmp_path / "earlier.zarr")


def flag(store, quality):
    """Write other flags into a map."""
    zarr.open_group(store, mode="r+")["quality"][...] = quality


def receipts(output):
    """Checksum of each tile, by the journal."""
    records = read_journal(Directory(output).journal)[1]
    return {record["tile"]: record["sha256"] for record in records if "sha256" in record}


def choose(**wanted):
    return select(toy_observation(), "an observation", **wanted)


# What is meant


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ("2:10,0:18", ((2, 10), (0, 18))),
        (":, 3:", ((0, 20), (3, 18))),
        # The toy's pixels are 0.057 arcsec wide and begin at 0: both ends count.
        ("0.1:0.3,0:0.057arcsec", ((2, 6), (0, 2))),
        (":0.06,0.9:arcsec", ((0, 2), (16, 18))),
        ("-5:0,:arcsec", ((0, 1), (0, 18))),
    ],
)
def test_regions_are_indices_or_arcsec(region, expected):
    assert choose(region=region) == Selection(region=expected)


@pytest.mark.parametrize(
    ("times", "expected"),
    [("0", (0,)), ("3,1", (1, 3)), ("2:5,4:", (2, 3, 4, 5, 6)), (":7:3", (0, 3, 6)), ("5:6, 0", (0, 5))],
)
def test_times_are_indices_and_ranges(times, expected):
    found = select(toy_observation(times=7, rows=2, columns=2), "an observation", times=times)
    assert found == Selection(times=expected)


def test_everything_is_the_same_however_it_is_asked_for():
    assert choose() == choose(region="0:20,:18", times="1,0") == choose(times=":") == EVERYTHING
    assert EVERYTHING.whole
    assert set(EVERYTHING.settings().values()) == {None}


def test_a_selection_says_what_it_is():
    selection = Selection(
        ((2, 10), (0, 18)), (0, 1, 2, 5, 7, 8), Skip("earlier.zarr", ("failed", "novel"), 96)
    )
    assert selection.settings() == {"region": "2:10,0:18", "times": "0:3,5,7:9", "skip": "failed,novel"}


@pytest.mark.parametrize(
    "wanted",
    [
        {"region": "2:10"},
        {"region": "2:10,3"},
        {"region": "a:b,3:4"},
        {"region": "1.5:3,3:4"},
        {"region": "10:2,3:4"},
        {"region": "0:21,3:4"},
        {"region": "-2:10,3:4"},
        {"region": "0.01:0.02,0:1arcsec"},
        {"region": "5:6,0:1arcsec"},
        {"times": "2"},
        {"times": "-1"},
        {"times": "0:3"},
        {"times": "0:100000000000"},
        {"times": "1:1"},
        {"times": "0:2:0"},
        {"times": "0:1:1:1"},
        {"times": ""},
        {"times": "now"},
        {"skip": [""], "skip_from": "map.zarr"},
        {"skip": ["novel,"], "skip_from": "map.zarr"},
        {"skip": ["novel", " "], "skip_from": "map.zarr"},
        {"skip": [",novel"]},
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(wanted):
    with pytest.raises(MisuseError) as refusal:
        choose(**wanted)
    assert refusal.value.where in wanted
    assert refusal.value.expected


@pytest.mark.parametrize("seed", range(4))
def test_the_survey_counts_what_tiles_select(seed, tmp_path, whole):
    random = np.random.default_rng(seed)
    (y0, y1), (x0, x1) = (np.sort(random.choice(size + 1, 2, replace=False)) for size in (20, 18))
    skip = Skip(str(whole), ("outside_field", "novel"), Flag.OUTSIDE_FIELD | Flag.NOVEL)
    for selection in (
        Selection(((y0, y1), (x0, x1)), (1,)),
        Selection(((y0, y1), (x0, x1)), None, skip),
        Selection(skip=skip),
        EVERYTHING,
    ):
        counts, checksums, identity = selection.survey(GRID)
        asked = [selection.asked(tile) for tile in GRID]
        assert counts.tolist() == [int(pixels.sum()) for pixels in asked]
        assert (identity is None) == (checksums is None) == (selection.skip is None)
        if checksums is not None:
            expected = [binascii.crc32(np.packbits(pixels).tobytes()) * pixels.any() for pixels in asked]
            assert checksums.tolist() == expected
    quality = open_map(whole)["quality"].values
    assert Selection(skip=skip).survey(GRID)[0].sum() == ((quality & skip.bits) == 0).sum()


# What comes of it


def assert_part_of(part, whole, asked):
    """Selected pixels have the whole map's bits, the others say that they were not selected."""
    for variable in VARIABLES:
        found, expected = part[variable.name].values, whole[variable.name].values
        np.testing.assert_array_equal(found[asked], expected[asked], err_msg=variable.name)
        if variable.name != "quality":
            assert np.isnan(found[~asked]).all()
    assert (part["quality"].values[~asked] == Flag.NOT_SELECTED).all()


def test_a_region_has_the_bits_of_the_whole_map_and_nothing_else_is_done(
    tmp_path, toy, client, whole, settings, monkeypatch
):
    done = []
    real = tiles._compute
    monkeypatch.setattr(tiles, "_compute", lambda *given: (done.append(given[-1]), real(*given))[1])
    output = tmp_path / "map.zarr"
    report = invert(toy, output, cluster=client, region="3:10,9:18", times="1", **settings)
    asked = np.zeros((2, 20, 18), dtype=bool)
    asked[1, 3:10, 9:18] = True
    part = open_map(output).load()
    assert_part_of(part, open_map(whole).load(), asked)
    assert part.sizes == open_map(whole).sizes
    assert {(tile.time, tile.row, tile.column) for tile in done} == {
        (1, 0, 1),
        (1, 0, 2),
        (1, 1, 1),
        (1, 1, 2),
    }
    assert (report.tiles, report.pixels, report.answered) == (4, 63, 63)
    assert report.flags["not_selected"] == int(flagged(part, "not_selected").sum()) == 720 - 63
    assert part.attrs["settings"]["region"] == "3:10,9:18"
    assert part.attrs["settings"]["times"] == "1"
    assert not (output / "quality/c/0").exists()
    assert check_map(output).sound
    # What was not selected is known from the metadata: with and without their consolidated copy.
    for consolidated in (True, False):
        assert int((xr.open_zarr(output, consolidated=consolidated)["quality"] == 512).sum()) == 657


def test_flags_of_an_earlier_map_leave_pixels_out(tmp_path, toy, client, whole, settings):
    before = open_map(whole).load()
    output = tmp_path / "map.zarr"
    wanted = {"skip": ("saturated,outside_field", "not_positive"), "skip_from": whole, "times": "0:1"}
    invert(toy, output, cluster=client, **wanted, **settings)
    asked = ~flagged(before, "saturated", "outside_field", "not_positive").values
    asked[1] = False
    part = open_map(output).load()
    assert_part_of(part, before, asked)
    assert int(flagged(part, "not_finite").sum()) == 1  # not named: it stays
    assert part.attrs["settings"]["skip"] == "not_positive,outside_field,saturated"


@pytest.mark.parametrize("region", ["4:5,9:10", "7:9,8:10"])
def test_single_pixels_of_tiles_have_the_bits_of_the_whole_map(
    tmp_path, toy, client, whole, settings, region
):
    """A pixel by itself, and the corners of four tiles."""
    output = tmp_path / "map.zarr"
    invert(toy, output, cluster=client, region=region, **settings)
    asked = np.zeros((2, 20, 18), dtype=bool)
    rows, columns = (slice(*map(int, part.split(":"))) for part in region.split(","))
    asked[:, rows, columns] = True
    assert_part_of(open_map(output).load(), open_map(whole).load(), asked)


def test_scattered_pixels_have_the_bits_of_the_whole_map(tmp_path, toy, client, whole, earlier, settings):
    novel = np.random.default_rng(1).random((2, 20, 18)) < 0.5
    flag(earlier, np.where(novel, np.uint16(Flag.NOVEL), np.uint16(0)))
    output = tmp_path / "map.zarr"
    invert(toy, output, cluster=client, skip=["novel"], skip_from=earlier, **settings)
    assert_part_of(open_map(output).load(), open_map(whole).load(), ~novel)


def test_pixels_of_which_the_earlier_map_knows_nothing_are_inverted_and_counted(
    tmp_path, toy, client, earlier, settings, caplog
):
    quality = np.zeros((2, 20, 18), dtype=np.uint16)
    quality[0, :, :4] = Flag.NOT_DONE
    quality[0, :3, 4:] = Flag.NOT_SELECTED
    quality[1] = Flag.NOVEL
    quality[1, 0, 0] = Flag.NOT_DONE  # at a time that is not asked for
    flag(earlier, quality)
    wanted = {"cluster": client, "skip_from": earlier, "times": "0", **settings}
    report = invert(toy, tmp_path / "map.zarr", skip=["novel"], **wanted)
    assert report.pixels == 20 * 18
    assert "not know the flags of 122 pixels" in caplog.text  # 20 x 4 and 3 x 14
    assert "not_done: 80, not_selected: 42" in caplog.text
    caplog.clear()
    # Who names these flags skips the pixels, and need not be told.
    report = invert(toy, tmp_path / "known.zarr", skip=["not_done,not_selected"], **wanted)
    assert report.pixels == 20 * 18 - 122
    assert "not know" not in caplog.text


def test_tiles_without_any_pixel_left_are_no_tasks(tmp_path, toy, client, earlier, settings):
    quality = np.full((2, 20, 18), Flag.FAILED, dtype=np.uint16)
    quality[1, 8:20, 0:8] = 0
    flag(earlier, quality)
    wanted = {"cluster": client, "skip": ["failed"], "skip_from": earlier, **settings}
    report = invert(toy, tmp_path / "map.zarr", **wanted)
    assert (report.tiles, report.pixels) == (2, 96)
    flag(earlier, np.uint16(Flag.FAILED))
    with pytest.raises(MisuseError, match="no pixel is selected"):
        invert(toy, tmp_path / "other.zarr", **wanted)
    assert not (tmp_path / "other.zarr").exists()


def test_until_it_is_finished_a_part_says_that_it_is_not(tmp_path, toy, client, whole, settings, monkeypatch):
    real = tiles.write_tile

    def two_only(number):
        if number > 2:
            raise StoreError("no more")

    monkeypatch.setattr(tiles, "write_tile", disturbed.counted(real, two_only))
    output = tmp_path / "map.zarr"
    wanted = {"cluster": client, "region": "0:20,0:6", "window": 1, **settings}
    with pytest.raises(StoreError, match="no more"):
        invert(toy, output, **wanted)
    quality = open_map(output)["quality"].values
    assert (quality[0, 16:] == Flag.NOT_DONE).all()
    assert (quality[0, :16, 6:8] == Flag.NOT_SELECTED).all()
    assert not check_map(output).finished
    monkeypatch.setattr(tiles, "write_tile", real)
    assert invert(toy, output, **wanted).resumed == 2
    asked = np.zeros((2, 20, 18), dtype=bool)
    asked[:, :, :6] = True
    assert_part_of(open_map(output).load(), open_map(whole).load(), asked)


def test_a_failed_tile_of_a_part_keeps_what_was_not_selected(
    tmp_path, toy, client, whole, settings, monkeypatch
):
    real, state = tiles.network_lines, {"broken": True}

    def unreliable(halpha, *rest, **shifts):
        if state["broken"] and len(halpha) == 8:  # what is asked of the tile at the right edge
            raise OSError("a disk coughs")
        return real(halpha, *rest, **shifts)

    monkeypatch.setattr(tiles, "network_lines", unreliable)
    output = tmp_path / "map.zarr"
    wanted = {"cluster": client, "region": "0:8,10:17", "times": "1", **settings}
    report = invert(toy, output, **wanted)
    assert len(report.failed) == 1
    part = open_map(output).load()
    assert (part["quality"][1, :8, 16] == Flag.FAILED).all()
    assert (part["quality"][1, :8, 17] == Flag.NOT_SELECTED).all()
    assert (part["quality"][0] == Flag.NOT_SELECTED).all()
    assert report.flags == {**report.flags, "failed": 8, "not_selected": 720 - 56}
    (faulty,) = check_map(output).faults
    assert faulty.fault == "failed"
    state["broken"] = False
    report = invert(toy, output, **wanted)
    assert (report.resumed, report.failed) == (1, ())
    assert check_map(output).sound
    asked = np.zeros((2, 20, 18), dtype=bool)
    asked[1, :8, 10:17] = True
    assert_part_of(open_map(output).load(), open_map(whole).load(), asked)


# Refusals


@pytest.fixture(scope="module")
def part(client, toy, fake_model, whole, tmp_path_factory):
    output = tmp_path_factory.mktemp("part") / "map.zarr"
    wanted = {"region": "0:8,0:8", "skip": ["outside_field"], "skip_from": whole}
    invert(toy, output, model=fake_model, cluster=client, **wanted, **SETTINGS)
    return output


@pytest.mark.parametrize(
    ("change", "recorded", "wanted"),
    [
        ({"region": "0:8,0:9"}, "region: 0:8,0:8", "region: 0:8,0:9"),
        ({"region": None}, "region: 0:8,0:8", "region: none"),
        ({"times": "0"}, "times: none", "times: 0"),
        ({"skip": ["saturated"]}, "skip: outside_field", "skip: saturated"),
        ({"skip": [], "skip_from": None}, "skip: outside_field", "skip: none"),
    ],
    ids=str,
)
def test_another_selection_is_refused_by_name(part, toy, client, settings, whole, change, recorded, wanted):
    first = {"region": "0:8,0:8", "skip": ["outside_field"], "skip_from": whole}
    with pytest.raises(MisuseError, match="other settings") as refusal:
        invert(toy, part, cluster=client, **{**settings, **first, **change})
    assert recorded in refusal.value.expected
    assert wanted in refusal.value.found
    assert invert(toy, part, cluster=client, **settings, **first).resumed == 2


def test_a_map_from_before_selections_is_gone_on_with(tmp_path, toy, client, whole, settings):
    output = tmp_path / "map.zarr"
    shutil.copytree(whole, output)
    first, *rest = Directory(whole).journal.read_text().splitlines()
    header = {**json.loads(first), "journal": 1}
    del header["crc32"]
    for name in ("region", "times", "skip", "skip_from"):
        del header["fingerprint"][name]
    Directory(output).journal.write_text("\n".join([json.dumps(header), *rest]) + "\n")
    assert invert(toy, output, cluster=client, **settings).resumed == 18


def test_an_earlier_map_that_changed_is_refused(tmp_path, toy, client, earlier, settings, monkeypatch):
    wanted = {"cluster": client, "skip": ["not_finite"], "skip_from": earlier, **settings}
    real = pipeline.invert.opened

    def changing(cluster):
        quality = open_map(earlier)["quality"].values
        quality[0, 0, 10] = Flag.NOT_FINITE
        flag(earlier, quality)
        return real(cluster)

    monkeypatch.setattr(pipeline.invert, "opened", changing)
    with pytest.raises(StoreError, match=r"earlier map.*has changed"):
        invert(toy, tmp_path / "map.zarr", **wanted)
    monkeypatch.setattr(pipeline.invert, "opened", real)
    with pytest.raises(MisuseError, match="other settings") as refusal:
        invert(toy, tmp_path / "map.zarr", **wanted)
    assert refusal.value.found.startswith("skip_from: ")
    shutil.rmtree(earlier)
    with pytest.raises(StoreError, match="cannot be read"):
        Skip(str(earlier), ("novel",), 32).quality((slice(0, 1), slice(0, 8), slice(0, 8)))


def test_an_earlier_map_whose_flags_moved_is_noticed_although_there_are_as_many(
    tmp_path, toy, client, earlier, settings, monkeypatch
):
    output = tmp_path / "map.zarr"
    wanted = {"cluster": client, "skip": ["not_finite"], "skip_from": earlier, **settings}
    before = open_map(earlier)["quality"].values
    moved = before.copy()
    moved[:, :8, :8] = np.roll(before, 1, axis=2)[:, :8, :8]
    assert ((moved & Flag.NOT_FINITE) != 0).sum() == ((before & Flag.NOT_FINITE) != 0).sum() > 0
    assert not np.array_equal(moved & Flag.NOT_FINITE, before & Flag.NOT_FINITE)
    real = pipeline.invert.opened
    monkeypatch.setattr(pipeline.invert, "opened", lambda cluster: (flag(earlier, moved), real(cluster))[1])
    with pytest.raises(StoreError, match=r"earlier map.*has changed while") as refusal:
        invert(toy, output, window=1, **wanted)
    assert refusal.value.where == str(earlier)
    assert f"{Tile(0, 0, 0, (0, 8), (0, 8))}" in refusal.value.found
    assert not check_map(output).sound
    # Put back, it is the map that it would have been, also if nobody was there to notice in the end.
    flag(earlier, before)
    monkeypatch.setattr(pipeline.invert, "opened", real)
    assert invert(toy, output, **wanted).resumed == 0
    invert(toy, tmp_path / "undisturbed.zarr", **wanted)
    assert check_map(output).sound
    assert (
        open_map(output)
        .load()
        .drop_attrs(deep=False)
        .identical(open_map(tmp_path / "undisturbed.zarr").load().drop_attrs(deep=False))
    )


def test_an_earlier_map_that_changes_late_costs_none_of_the_tiles_before(
    tmp_path, toy, client, earlier, settings, monkeypatch
):
    output = tmp_path / "map.zarr"
    wanted = {"cluster": client, "skip": ["not_finite"], "skip_from": earlier, **settings}
    before = open_map(earlier)["quality"].values
    moved = before.copy()
    moved[1, 12, 12] |= Flag.NOT_FINITE

    def move(number):
        if number == 5:
            flag(earlier, moved)

    with monkeypatch.context() as patch:
        patch.setattr(tiles, "compute_tile", disturbed.counted(tiles.compute_tile, move))
        with pytest.raises(StoreError, match=r"earlier map.*has changed while"):
            invert(toy, output, window=1, **wanted)
    flag(earlier, before)
    assert invert(toy, output, **wanted).resumed == GRID.index(Tile(1, 1, 1, (8, 16), (8, 16)))
    invert(toy, tmp_path / "undisturbed.zarr", **wanted)
    assert check_map(output).sound
    assert receipts(output) == receipts(tmp_path / "undisturbed.zarr")

    def remove(number):
        if number == 2:
            shutil.rmtree(earlier)

    monkeypatch.setattr(tiles, "compute_tile", disturbed.counted(tiles.compute_tile, remove))
    with pytest.raises(StoreError, match=r"earlier map.*cannot be read"):
        invert(toy, tmp_path / "other.zarr", window=1, **wanted)


def test_flags_come_by_name_from_a_map_of_the_same_observation(tmp_path, toy, client, whole, settings):
    output = tmp_path / "map.zarr"
    with pytest.raises(MisuseError, match="no such quality flag") as refusal:
        invert(toy, output, cluster=client, skip=["novelty > 0.1"], skip_from=whole, **settings)
    assert "outside_field, not_finite" in refusal.value.expected
    for half in ({"skip": ["novel"]}, {"skip_from": whole}):
        with pytest.raises(MisuseError, match="flags to skip"):
            invert(toy, output, cluster=client, **half, **settings)
    with pytest.raises(MisuseError, match="its own flags"):
        invert(toy, whole, cluster=client, skip=["novel"], skip_from=whole, overwrite=True, **settings)
    with pytest.raises(StoreError, match="no such map"):
        invert(toy, output, cluster=client, skip=["novel"], skip_from=tmp_path / "gone.zarr", **settings)
    other = tmp_path / "other.zarr"
    write_store(toy_observation(half_width=1.7), other)
    with pytest.raises(MisuseError, match="another observation"):
        invert(other, output, cluster=client, skip=["novel"], skip_from=whole, **settings)
    assert not output.exists()


def test_a_part_costs_what_its_pixels_cost(tmp_path, toy, client, settings, monkeypatch):
    asked, real = [], tiles.quantiles_and_misfit

    def counted(network, lines, *rest, **more):
        asked.append(len(lines))
        return real(network, lines, *rest, **more)

    monkeypatch.setattr(tiles, "quantiles_and_misfit", counted)
    report = invert(toy, tmp_path / "map.zarr", cluster=client, region="0:20,3:5", times="0", **settings)
    assert report.tiles == len(asked)
    assert sum(asked) == report.answered <= 40
