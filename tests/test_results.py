"""The map store: whole before anything is in it, readable by xarray, and saying what it does not know."""

import json
import os

import astropy.units as u
import numpy as np
import pytest
import xarray as xr
from toy_observation import toy_observation, write_store

from inn.layout import HEIGHTS
from inn.novelty import NOVEL
from pipeline.errors import MisuseError, StoreError
from pipeline.results import (
    NOVELTY_LEVEL,
    VARIABLES,
    WITHOUT_ANSWER,
    Flag,
    count_flags,
    flagged,
    lay_out,
    open_map,
)

QUANTILES = (0.05, 0.5, 0.95)
PROFILES = ("electron_density", "temperature", "velocity")


@pytest.fixture
def empty_map(tmp_path):
    observation = toy_observation()
    path = tmp_path / "map.zarr"
    lay_out(
        path,
        observation.coords.to_dataset().drop_dims(
            ["wavelength_halpha", "wavelength_ca8542"], errors="ignore"
        ),
        heights=HEIGHTS,
        quantiles=QUANTILES,
        tile=(8, 18),
        attrs={"run": "a run", "height_zero": "the grid's own"},
    )
    return path


def test_a_map_has_the_schema_before_anything_is_done(empty_map):
    dataset = xr.open_zarr(empty_map)
    for name in PROFILES:
        assert dataset[name].dims == ("time", "y", "x", "quantile", "height")
        assert dataset[name].shape == (2, 20, 18, 3, 50)
        assert dataset[name].dtype == np.float32
        assert np.isnan(dataset[name].values).all()
    for name in ("quality", "novelty", "misfit"):
        assert dataset[name].dims == ("time", "y", "x")
    np.testing.assert_allclose(dataset["height"], HEIGHTS)
    np.testing.assert_allclose(dataset["quantile"], QUANTILES)
    assert {"time", "x", "y", "longitude", "latitude", "mu"} <= set(dataset.coords)
    assert (dataset["time"].values == toy_observation()["time"].values).all()
    assert dataset.attrs["kind"] == "map"
    assert os.listdir(empty_map.parent) == ["map.zarr"]


def test_every_unit_is_one_that_astropy_knows(empty_map):
    dataset = open_map(empty_map)
    units = {
        "electron_density": u.cm**-3,
        "temperature": u.K,
        "velocity": u.km / u.s,
        "height": u.Mm,
        "x": u.arcsec,
        "y": u.arcsec,
        "longitude": u.arcsec,
        "latitude": u.arcsec,
        "novelty": u.dimensionless_unscaled,
        "misfit": u.dimensionless_unscaled,
        "quantile": u.dimensionless_unscaled,
    }
    for name, unit in units.items():
        assert u.Unit(dataset[name].attrs["units"]) == unit
        assert name in ("longitude", "latitude") or dataset[name].attrs["long_name"]


def test_pixels_that_are_not_done_say_so(empty_map):
    dataset = open_map(empty_map)
    assert (dataset["quality"].values == Flag.NOT_DONE).all()
    assert flagged(dataset, "not_done").all()
    assert not flagged(dataset, "failed", "novel").any()


def test_flags_are_written_as_the_conventions_want_them(empty_map):
    # CF conventions 1.11, section 3.5: as many meanings as masks, every mask its own bit.
    attrs = open_map(empty_map)["quality"].attrs
    masks, meanings = attrs["flag_masks"], attrs["flag_meanings"].split()
    assert dict(zip(meanings, masks, strict=True)) == {
        "outside_field": 1,
        "not_finite": 2,
        "not_positive": 4,
        "saturated": 8,
        "wavelength_not_covered": 16,
        "novel": 32,
        "failed": 64,
        "registration_uncertain": 128,
        "not_done": 256,
        "not_selected": 512,
        "spike": 1024,
        "dead_pixel": 2048,
        "wavelength_missing": 4096,
        "poor_seeing": 8192,
        "changed_between_lines": 16384,
        "header_contradiction": 32768,
    }


def test_flagged_reads_the_flags_of_the_map(empty_map):
    dataset = open_map(empty_map).load()
    dataset["quality"][:] = 0
    dataset["quality"][0, 1, 2] = Flag.NOVEL | Flag.SATURATED
    dataset["quality"][1, 3, 4] = Flag.NOVEL
    assert np.argwhere(flagged(dataset, "novel").values).tolist() == [[0, 1, 2], [1, 3, 4]]
    assert np.argwhere(flagged(dataset, "saturated", "failed").values).tolist() == [[0, 1, 2]]
    with pytest.raises(MisuseError, match="flag") as refusal:
        flagged(dataset, "novelty")
    assert "novel" in refusal.value.expected


def test_only_doubtful_pixels_keep_an_answer():
    assert set(Flag) - {flag for flag in Flag if flag & WITHOUT_ANSWER} == {
        Flag.NOVEL,
        Flag.REGISTRATION_UNCERTAIN,
        Flag.SPIKE,
        Flag.POOR_SEEING,
        Flag.CHANGED_BETWEEN_LINES,
        Flag.HEADER_CONTRADICTION,
    }
    assert NOVELTY_LEVEL == NOVEL


def test_flags_are_counted():
    quality = np.array([0, 1, 33, 32, 256], dtype=np.uint16)
    assert count_flags(quality) == {"outside_field": 2, "novel": 2, "not_done": 1}


def test_metadata_are_consolidated_and_a_tile_is_one_shard(empty_map):
    root = json.loads((empty_map / "zarr.json").read_text())
    arrays = root["consolidated_metadata"]["metadata"]
    for variable in VARIABLES:
        shape = arrays[variable.name]["chunk_grid"]["configuration"]["chunk_shape"]
        assert shape[:3] == [1, 8, 18]
        assert shape[3:] == ([3, 50] if variable.profile else [])


@pytest.mark.parametrize("kind", ["nothing", "a directory", "a file", "another store"])
def test_what_is_not_a_map_is_not_opened_as_one(tmp_path, kind):
    path = tmp_path / "map.zarr"
    if kind == "a directory":
        path.mkdir()
    elif kind == "a file":
        path.write_text("hello")
    elif kind == "another store":
        write_store(toy_observation(), path)
    with pytest.raises(StoreError, match="map"):
        open_map(path)
