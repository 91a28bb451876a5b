"""The page about a map: complete, self-contained, and careful with what it did not write itself."""

import base64
import re

import numpy as np
import pytest
from known_map import known_truth, map_around, observation_of

from pipeline.comparison import compare
from pipeline.errors import MisuseError
from pipeline.report import MEANINGS, Picture, write_report
from pipeline.results import Flag


@pytest.fixture(scope="module")
def truth():
    return known_truth()


@pytest.fixture(scope="module")
def ds(truth):
    return map_around(truth, error=1.0)


@pytest.fixture(scope="module")
def page(ds, truth, tmp_path_factory):
    """The whole page, of a map with a known truth."""
    folder = tmp_path_factory.mktemp("report")
    observation = observation_of(truth)
    return write_report(
        ds,
        folder / "map.html",
        observation=observation,
        truth=truth,
        comparison=compare(ds, truth, observation),
        pictures=folder,
    )


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the figures undrawn, where a test is about the text; returns the names they would have."""
    names = []

    def of(figure, name, title, caption):
        names.append((name, figure.get_suptitle()))
        return Picture(name, title, caption, b"")

    monkeypatch.setattr(Picture, "of", of)
    return names


def cells(text, flag):
    """Pixels and share of a flag's row."""
    row = re.search(rf"<tr><td>(?:<code>)?{flag}(?:</code>)?</td>(.*?)</tr>", text, re.S)
    return re.findall(r'<td class="n">(.*?)</td>', row.group(1))


def test_the_flags_are_counted(page):
    text = page.read_text()
    pixels = 2 * 12 * 15
    assert cells(text, "outside_field") == ["24", f"{100 * 24 / pixels:.1f} %"]
    assert cells(text, "novel") == ["1", f"{100 / pixels:.1f} %"]
    assert cells(text, "no flag") == ["335", f"{100 * 335 / pixels:.1f} %"]


def test_every_flag_has_a_meaning():
    assert set(MEANINGS) == set(Flag)


def test_the_page_needs_no_other_file(page):
    text = page.read_text()
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 5
    for source in sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert "<link" not in text
    assert "<script" not in text


def test_the_pictures_lie_beside_the_page_where_asked_for(page):
    names = {file.name for file in page.parent.glob("*.png")}
    assert names == {"maps.png", "profile_dense.png", "profile_tenuous.png", "trust.png", "truth.png"}


def test_the_comparison_is_in_the_page(page, ds, truth):
    text = page.read_text()
    ribbon = compare(ds, truth).sel(region="ribbon", quantity="electron_density")
    row = re.search(r"<tr><td>ribbon</td>(.*?)</tr>", text, re.S).group(1)
    assert f">{float(ribbon['error_ratio']):.2f}<" in row
    assert f">{float(ribbon['error']):.3g}<" in row
    assert f">{100 * float(ribbon['coverage'].sel(interval=0.9)):.0f} %<" in row
    assert "+0.040" in text
    assert "synthetic" in text


def test_what_the_map_cannot_say_is_said(page):
    text = page.read_text()
    assert "What it cannot say" in text
    assert "none: closed form" in text
    assert "Height zero: somewhere." in text
    assert "relative calibration" in text


def test_settings_and_origin_are_recorded_and_escaped(page):
    text = page.read_text()
    assert "flarefield invert &lt;obs&gt;.zarr map.zarr" in text
    assert "settings: draws" in text
    assert "made_from: 39.fits" in text
    assert "and 20 more" in text


@pytest.mark.usefixtures("undrawn")
def test_a_map_alone_makes_a_page(ds, tmp_path):
    text = write_report(ds, tmp_path / "new" / "map.html", time=0).read_text()
    assert "Against the truth" not in text
    assert "synthetic" not in text
    assert "2014-09-06 16:55:57" in text


def test_a_map_without_an_answer_makes_a_page(ds, undrawn, tmp_path):
    empty = ds.copy(deep=True)
    for name in ("electron_density", "temperature", "velocity", "misfit", "novelty"):
        empty[name].values[:] = np.nan
    empty["quality"].values[:] = Flag.NOT_DONE
    text = write_report(empty, tmp_path / "map.html").read_text()
    assert cells(text, "not_done") == ["360", "100.0 %"]
    assert [name for name, _ in undrawn] == ["maps", "trust"]


def test_the_last_scan_with_answers_is_shown(ds, undrawn, tmp_path):
    begun = ds.copy(deep=True)
    begun["quality"].values[1] = Flag.NOT_DONE
    write_report(begun, tmp_path / "map.html")
    assert all("16:55:57" in title for _, title in undrawn)
    undrawn.clear()
    write_report(ds, tmp_path / "whole.html")
    assert all("16:56:08" in title for _, title in undrawn)


@pytest.mark.usefixtures("undrawn")
def test_an_existing_page_is_kept_unless_asked(ds, tmp_path):
    path = tmp_path / "map.html"
    path.write_text("mine")
    with pytest.raises(MisuseError, match="the file exists"):
        write_report(ds, path)
    assert path.read_text() == "mine"
    write_report(ds, path, overwrite=True)
    assert path.read_text().startswith("<!DOCTYPE html>")


def test_a_scan_that_is_not_there_is_refused(ds, tmp_path):
    with pytest.raises(MisuseError, match="no such scan"):
        write_report(ds, tmp_path / "map.html", time=2)
