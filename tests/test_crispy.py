"""crispy's Zarr groups: the header, Stokes I, and every way in which a group can be unusable."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zarr
from astropy.wcs import WCS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.crisp import crispy, find_scans, open_intensity, read_headers, read_scans
from pipeline.crisp.headers import header_contradictions
from pipeline.crisp.scan import ForeignFileError, OtherKindError, OtherLineError
from pipeline.crisp.wavelengths import vacuum_to_air
from pipeline.errors import InputError, MisuseError
from pipeline.ingest import ingest
from pipeline.observation import fits_headers, open_observation
from pipeline.provenance import sha256_source
from tests.crispy_groups import write_crispy
from tests.fchroma_files import START, WAVELENGTH_CA8542, WAVELENGTH_HALPHA
from tests.known_series import in_crispy, known_series

POINTS, ROWS, COLUMNS = 15, 9, 13


@pytest.fixture
def cube():
    return np.random.default_rng(1).integers(100, 3000, (POINTS, ROWS, COLUMNS)).astype("<i2")


@pytest.fixture
def group(tmp_path, cube):
    return write_crispy(tmp_path / "00007.zarr", cube, WAVELENGTH_HALPHA, START)


@pytest.fixture
def whole(group):
    """The group's files, undamaged."""
    return {path: path.read_bytes() for path in group.rglob("*") if path.is_file()}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("parameters", [0, 4])
def test_round_trip(tmp_path, cube, zarr_format, uniform, parameters):
    numbers = np.stack([cube, *[cube // 10] * 3]) if parameters else cube
    path = tmp_path / "any name"
    write_crispy(path, numbers, WAVELENGTH_HALPHA, START, zarr_format=zarr_format, uniform=uniform)
    (scan,) = read_scans(path, "vacuum")
    assert (scan.format, scan.line, scan.time) == ("crispy", "halpha", START)
    assert (scan.medium, scan.medium_stated_by) == ("vacuum", "caller")
    assert (scan.units, scan.saturation, scan.shape) == ("DN", 32767, (ROWS, COLUMNS))
    np.testing.assert_allclose(scan.wavelength, WAVELENGTH_HALPHA, rtol=0, atol=1e-9)
    intensity = open_intensity(scan)
    np.testing.assert_array_equal(intensity, cube)
    np.testing.assert_array_equal(intensity[2:5, 3, ::2], cube[2:5, 3, ::2])
    (header,) = read_headers(scan)
    assert json.loads(header)["pixel_scale"] == 0.057


def test_coordinates_are_those_of_the_header(tmp_path, cube):
    """As the package makes a FITS WCS of the header (`crispy.io.zarr_header_to_wcs`)."""
    path = write_crispy(
        tmp_path / "a.zarr", cube, WAVELENGTH_HALPHA, START, pointing=(880.0, -350.0), crpix=[8.0, 2.0, 700.0]
    )
    header = dict(zarr.open_group(path)["data"].attrs)
    cards = {"CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN", "CUNIT1": "arcsec", "CUNIT2": "arcsec"}
    for number in (1, 2):
        cards |= {f"CRPIX{number}": header["crpix"][-number], f"CRVAL{number}": header["crval"][-number]}
        cards[f"CDELT{number}"] = header["pixel_scale"]
    y, x = np.mgrid[:1000:250, :1500:300].astype(float)
    longitude, latitude = read_scans(path, "vacuum")[0].frame.coordinates(x, y)
    expected = WCS(cards).all_pix2world(x, y, 0)
    np.testing.assert_allclose(longitude, expected[0] * 3600.0, rtol=0, atol=1e-6)
    np.testing.assert_allclose(latitude, expected[1] * 3600.0, rtol=0, atol=1e-6)


def test_what_helps_is_said_of_many_files_as_of_one(tmp_path, cube):
    """Twelve groups whose medium nobody says: one problem, its files, and what to do about it."""
    for number in range(12):
        write_crispy(tmp_path / f"{number:02}.zarr", cube, WAVELENGTH_HALPHA, START)
    with pytest.raises(InputError, match="12 files cannot be used") as caught:
        find_scans([tmp_path])
    assert caught.value.found.count("does not say whether its wavelengths are in air or in vacuum") == 1
    assert "09.zarr" in caught.value.found
    assert "10.zarr" not in caught.value.found
    assert "and 2 more" in caught.value.found
    assert caught.value.remedy == "say --medium air or --medium vacuum"
    assert "83 km/s" in caught.value.expected
    # beside a problem of another kind, each with its own remedy
    (tmp_path / "11.zarr" / "data" / "zarr.json").write_text("{")
    (tmp_path / "11.zarr" / "data" / ".zarray").write_text("{")
    with pytest.raises(InputError, match="12 files cannot be used") as caught:
        find_scans([tmp_path])
    assert "air or in vacuum (11 files)" in caught.value.found
    assert "remedy: say --medium air or --medium vacuum" in caught.value.found
    assert "(1 files)" not in caught.value.found


def test_the_medium_has_to_be_said(group, tmp_path, cube):
    with pytest.raises(InputError, match="does not say whether its wavelengths are in air"):
        read_scans(group)
    write_crispy(tmp_path / "air.zarr", cube, vacuum_to_air(WAVELENGTH_HALPHA), START)
    (scan,) = read_scans(tmp_path / "air.zarr", "air")
    np.testing.assert_allclose(scan.wavelength, WAVELENGTH_HALPHA, rtol=0, atol=1e-9)


def test_groups_are_found_in_directories(tmp_path, cube, group):
    (tmp_path / "deeper").mkdir()
    write_crispy(tmp_path / "deeper" / "a.zarr", np.repeat(cube, 2, 0)[:25], WAVELENGTH_CA8542, START)
    zarr.open_group(tmp_path / "a map.zarr", mode="w").create_array("halpha", shape=(3, 3, 3), dtype="f4")
    zarr.open_group(tmp_path / "array.zarr", mode="w").create_array("data", shape=(3, 3, 3), dtype="f4")
    scans, passed_over = find_scans([tmp_path], "vacuum")
    assert [scan.line for scan in scans] == ["ca8542", "halpha"]
    assert {refusal.where.rsplit("/")[-1] for refusal in passed_over} == {"array.zarr"}
    assert find_scans([str(group)], "vacuum")[0] == scans[1:]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wavels": None}, "wavelengths are missing"),
        ({"wavels": [1.0, 2.0]}, "wavelengths do not fit"),
        ({"wavels": "6563"}, "holds no numbers|do not fit"),
        ({"wavels": [None] * POINTS}, "holds no numbers|finite"),
        ({"wavels": WAVELENGTH_HALPHA[::-1].tolist()}, "increase"),
        ({"wavels": None, "wavel_scale": [0.1, 0.2]}, "no list of numbers"),
        ({"wavels": None, "wavel_scale": 0.2, "crval": [6564.0]}, "does not fit"),
        ({"crpix": "middle"}, "holds no numbers"),
        ({"crval": [6564.6, -313.4, float("nan")]}, "not a number"),
        ({"pixel_scale": 0.0}, "pixel size"),
        ({"pixel_scale": [0.1, 0.1]}, "no list of numbers"),
        ({"date_obs": "yesterday"}, "time cannot be read"),
        ({"time_obs": 5}, "time cannot be read"),
        ({"frame_dims": [9, 13], "x_min": 1, "y_min": 1, "angle": 0.3}, "rotated and cropped"),
    ],
)
def test_unusable_headers(tmp_path, cube, changes, words):
    path = write_crispy(tmp_path / "a.zarr", cube, WAVELENGTH_HALPHA, START, **changes)
    with pytest.raises(InputError, match=words) as caught:
        read_scans(path, "vacuum")
    assert type(caught.value) is InputError
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("key", crispy.KEYS)
def test_groups_of_something_else(tmp_path, cube, key):
    path = write_crispy(tmp_path / "a.zarr", cube, WAVELENGTH_HALPHA, START, **{key: None})
    with pytest.raises(ForeignFileError, match="something else") as caught:
        read_scans(path, "vacuum")
    assert key in str(caught.value)


def test_other_axes_lines_and_kinds(tmp_path, cube):
    path = write_crispy(tmp_path / "line.zarr", cube, WAVELENGTH_HALPHA - 260.0, START)
    with pytest.raises(OtherLineError, match="another line"):
        read_scans(path, "vacuum")
    group = zarr.open_group(tmp_path / "wb.zarr", mode="w", zarr_format=2)
    array = group.create_array("data", data=cube[0])
    array.attrs.update(dict.fromkeys(crispy.KEYS, 1.0))
    with pytest.raises(OtherLineError, match="wide-band"):
        read_scans(tmp_path / "wb.zarr", "vacuum")
    group = zarr.open_group(tmp_path / "five.zarr", mode="w", zarr_format=2)
    array = group.create_array("data", data=cube[None, None])
    array.attrs.update(dict.fromkeys(crispy.KEYS, 1.0))
    with pytest.raises(InputError, match="other axes"):
        read_scans(tmp_path / "five.zarr", "vacuum")
    with pytest.raises(OtherKindError, match="not a Zarr group"):
        crispy.read_scans(tmp_path)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_missing_and_damaged_chunks(tmp_path, cube, zarr_format):
    path = write_crispy(tmp_path / "a.zarr", cube, WAVELENGTH_HALPHA, START, zarr_format=zarr_format)
    chunk = path / ("data/0.0.0" if zarr_format == 2 else "data/c/0/0/0")
    (scan,) = read_scans(path, "vacuum")
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(InputError, match=r"damaged|truncated") as caught:
        open_intensity(scan)[0]
    assert str(path) in str(caught.value)
    chunk.unlink()
    with pytest.raises(InputError, match="chunks are missing") as caught:
        read_scans(path, "vacuum")
    assert "14 of 15" in str(caught.value)


def test_group_changed_after_it_was_described(group, cube):
    (scan,) = read_scans(group, "vacuum")
    write_crispy(group, cube[:, 1:], WAVELENGTH_HALPHA, START)
    with pytest.raises(InputError, match="has changed"):
        open_intensity(scan)


def test_a_group_is_hashed_whole(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    ingest([files], tmp_path / "obs.zarr", call="", **in_crispy(files, known_series()))
    dataset = open_observation(tmp_path / "obs.zarr")
    assert dataset.attrs["made_from"] == {str(path): sha256_source(path) for path in files.iterdir()}
    assert ingest([files], tmp_path / "obs.zarr", call="", medium="vacuum").complete_before
    with pytest.raises(MisuseError, match="no FITS headers"):
        fits_headers(dataset, "halpha", 0)
    before = sha256_source(files)
    (files / "halpha-00000.zarr" / "note").write_text("anything")
    assert sha256_source(files) != before


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damage_gives_typed_errors_only(group, whole, data):
    """Metadata changed or cut, chunks cut: a scan of the true shape, or an `InputError`."""
    for path, content in whole.items():
        path.write_bytes(content)
    path = data.draw(st.sampled_from(sorted(whole)))
    content = bytearray(whole[path])
    if path.name in crispy.METADATA:
        for _ in range(data.draw(st.integers(1, 4), label="changes")):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if path.name not in crispy.METADATA or data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(content)
    try:
        (scan,) = read_scans(group, "vacuum")
        intensity = open_intensity(scan)[:]
    except InputError as error:
        message = str(error)
    else:
        message = str(group)
        assert intensity.shape == (len(scan.wavelength), *scan.shape)
    assert str(group) in message


@pytest.mark.parametrize(
    ("element", "said"),
    [
        ("Ca II 8542", "names 8542, the wavelengths are around 6563"),
        ("H I 6563", ""),
        ("H-alpha", ""),
        (None, ""),
    ],
)
def test_what_the_line_is_called(tmp_path, cube, element, said):
    path = write_crispy(tmp_path / "a.zarr", cube, WAVELENGTH_HALPHA, START, element=element)
    (scan,) = read_scans(path, "vacuum")
    found = header_contradictions(scan)
    assert len(found) == bool(said)
    assert all(said in sentence for sentence in found)
