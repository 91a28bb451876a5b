"""La Palma cubes: what header and sidecars say, and every way in which they can contradict one another."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.io import readsav

from pipeline.crisp import (
    find_scans,
    lapalma,
    open_intensity,
    open_wavelength_shift,
    read_headers,
    read_scans,
)
from pipeline.crisp.scan import LINES, OtherKindError, OtherLineError
from pipeline.crisp.statements import CubeStatement, load
from pipeline.crisp.wavelengths import air_to_vacuum, vacuum_to_air
from pipeline.errors import InputError, MisuseError
from pipeline.ingest import ingest
from pipeline.observation import open_observation
from pipeline.provenance import sha256_file
from tests.fchroma_files import CADENCE, START, WAVELENGTH_HALPHA
from tests.known_series import in_lapalma, known_series
from tests.lapalma_files import write_assoc, write_cube, write_idl, write_twin

SCANS, PARAMETERS, POINTS, ROWS, COLUMNS = 3, 4, 15, 9, 13


@pytest.fixture
def cube():
    numbers = np.random.default_rng(1).integers(100, 3000, (SCANS, PARAMETERS, POINTS, ROWS, COLUMNS))
    return numbers.astype("<i2")


@pytest.fixture
def statement():
    return {
        "line": "halpha",
        "wavelength": {"file": "spectfile.6563.idlsave", "unit": "Angstrom", "medium": "air"},
        "time": {"file": "tseries.6563.calib.sav"},
        "pointing": {"reference_value": [-729.8, -313.4], "scale": 0.059, "rotation": 30.0},
        "unit": "DN",
    }


@pytest.fixture
def file(tmp_path, cube, statement):
    write_idl(tmp_path / "spectfile.6563.idlsave", {"spect_pos": vacuum_to_air(WAVELENGTH_HALPHA)})
    days, moments = zip(*(str(START + k * CADENCE).split("T") for k in range(SCANS)), strict=True)
    write_idl(tmp_path / "tseries.6563.calib.sav", {"time": moments, "date": days, "scale": 17.0})
    path = write_cube(tmp_path / "crispex.6563.icube", cube, stokes=True)
    state(path, statement)
    return path


@pytest.fixture
def whole(file):
    """Cube and sidecars, undamaged."""
    return {path.name: path.read_bytes() for path in file.parent.iterdir()}


def state(path, statement):
    path.with_suffix(".yaml").write_text(yaml.safe_dump(statement))


def refused(path, words, kind=InputError):
    with pytest.raises(kind, match=words) as caught:
        read_scans(path)
    assert type(caught.value) is kind
    assert caught.value.found
    assert caught.value.remedy
    return str(caught.value)


def test_scans(file, cube, tmp_path):
    # what scipy's own reader of IDL's files says of those beside the cube
    times = readsav(tmp_path / "tseries.6563.calib.sav")["time"]
    scans = read_scans(file)
    assert [scan.index for scan in scans] == [0, 1, 2]
    assert [str(scan.time)[11:23] for scan in scans] == [time.decode() for time in times]
    for scan in scans:
        assert scan.format == "lapalma"
        assert scan.line == "halpha"
        assert scan.shape == (ROWS, COLUMNS)
        assert scan.units == scan.units_of_file == "DN"
        assert scan.saturation == 32767
        assert (scan.medium, scan.medium_stated_by) == ("air", "file")
        np.testing.assert_allclose(scan.wavelength, WAVELENGTH_HALPHA, rtol=0, atol=1e-8)
        assert scan.frame.reference_pixel == (6.0, 4.0)
        assert scan.frame.scale == (0.059, 0.059)
        assert {path.rsplit("/")[-1] for path in scan.sidecars} == {
            "crispex.6563.yaml", "spectfile.6563.idlsave", "tseries.6563.calib.sav"
        }  # fmt: skip
        np.testing.assert_array_equal(open_intensity(scan), cube[scan.index, 0])
        assert open_wavelength_shift(scan) is None
    header, sidecar = read_headers(scans[0])
    assert header.startswith("stokes=[I,Q,U,V], ns=4")
    assert yaml.safe_load(sidecar)["line"] == "halpha"


def test_a_night_in_the_arctic(file, statement):
    """Times of day of one date run on into the next."""
    times = {"time": ["23:59:31.0", "23:59:59.9", "00:00:29.0"], "date": "2022.06.05"}
    write_idl(file.parent / "night.sav", times)
    state(file, {**statement, "time": {"file": "night.sav"}})
    seconds = np.diff([scan.time for scan in read_scans(file)]) / np.timedelta64(1, "s")
    np.testing.assert_allclose(seconds, [28.9, 29.1])


def test_intensities_are_mapped_not_read(file):
    owner = open_intensity(read_scans(file)[1])._stored
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert isinstance(owner, mmap.mmap)


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "<i4", "<f4", ">f4", "<f8"])
def test_types_and_orders_of_bytes(file, cube, dtype):
    numbers = (cube // 16).astype(dtype)
    write_cube(file, numbers, stokes=True)
    scan = read_scans(file)[2]
    np.testing.assert_array_equal(open_intensity(scan), numbers[2, 0])
    assert scan.saturation == (np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else np.inf)


@pytest.mark.parametrize(
    "text",
    [
        "stokes=[I,Q,U,V], ns=4 :  datatype=2 (integer), dims=3, {}, endian=l",  # the SST's pipeline
        " datatype=2 (integer), dims=3, {}, endian=l : , stokes=[I,Q,U,V], ns=4",  # helita, ISPy
        "datatype=2 (integer), dims=3, {}, endian=l",  # the sidecar says it
    ],
)
def test_headers_as_programs_write_them(file, cube, statement, text):
    images = SCANS * PARAMETERS * POINTS
    head = text.format(f"nx={COLUMNS}, ny={ROWS}, nt={images}").encode()
    file.write_bytes(head.ljust(512, b"\0") + cube.tobytes())
    if b"stokes" not in head:
        refused(file, "times do not fit")
        statement["stokes"] = ["I", "Q", "U", "V"]
        state(file, statement)
    np.testing.assert_array_equal(open_intensity(read_scans(file)[2]), cube[2, 0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stokes=[i,q,u,v], ns=4 : {}", None),
        ("stokes=['I','Q','U','V'], ns=4 : {}", None),
        ('Stokes = [ "i" "q" "u" "v" ] : {}', None),
        ("ns=4 : {}", "another number of Stokes parameters"),
        ("{}, ns = 4", "another number of Stokes parameters"),
        ("stokes=IQUV, ns=4 : {}", "another number of Stokes parameters"),
        ("stokes=[I,Q,U,V], ns=1 : {}", "says what cannot be"),
        ("stokes=[I,Q,U,W], ns=4 : {}", "says what cannot be"),
        ("stokes=[], ns=4 : {}", "says what cannot be"),
    ],
)
def test_stokes_parameters_never_become_times(file, cube, statement, text, words):
    """With times by start and step, nothing but the header could tell 12 scans of I from 3 of I, Q, U, V."""
    statement["time"] = {"start": "2014-09-06T15:27:24", "step": 11.5}
    state(file, statement)
    said = (
        f"datatype=2 (integer), dims=3, nx={COLUMNS}, ny={ROWS}, nt={SCANS * PARAMETERS * POINTS}, endian=l"
    )
    file.write_bytes(text.format(said).encode().ljust(512, b"\0") + cube.tobytes())
    if words is not None:
        refused(file, words)
        if words == "says what cannot be":
            return
        for stated, message in ((["I", "V"], words), (["I", "Q", "U", "V"], None)):
            state(file, {**statement, "stokes": stated})
            if message is not None:
                refused(file, message)
    scans = read_scans(file)
    assert len(scans) == SCANS
    for scan in scans:
        np.testing.assert_array_equal(open_intensity(scan), cube[scan.index, 0])


def test_stokes_parameters_that_nobody_speaks_of(file, cube, statement):
    """12 scans of I or 3 of I, Q, U, V: refused, unless the sidecar, the times or the twin say which."""
    numbers = {line: value for line, value in statement.items() if line != "stokes"}
    stepped = {**numbers, "time": {"start": "2014-09-06T15:27:24", "step": 11.5}}
    write_cube(file, cube)
    state(file, stepped)
    assert "12 scans of I, or 3 of I, Q, U, V" in refused(file, "nothing says whether")
    for stokes, images in ((["I", "Q", "U", "V"], cube[:, 0]), (["I"], cube.reshape(-1, *cube.shape[2:]))):
        state(file, {**stepped, "stokes": stokes})
        scans = read_scans(file)
        assert len(scans) == len(images)
        np.testing.assert_array_equal(open_intensity(scans[2]), images[2])
    state(file, numbers)
    refused(file, "times do not fit")
    # Three scans cannot be fewer of four parameters.
    state(file, stepped)
    write_cube(file, cube[:, :1])
    assert len(read_scans(file)) == SCANS
    write_cube(file, cube)
    write_twin(file.with_name(f"{file.stem}_sp{file.suffix}"), cube.reshape(-1, 1, *cube.shape[2:]))
    assert len(read_scans(file)) == SCANS * PARAMETERS


def test_wavelengths_in_any_order(file, cube, statement):
    axis = vacuum_to_air(WAVELENGTH_HALPHA)
    order = np.random.default_rng(2).permutation(POINTS)
    statement["wavelength"] = {"values": axis[order].tolist(), "unit": "Angstrom", "medium": "air"}
    state(file, statement)
    write_cube(file, cube[:, :, order], stokes=True)
    scan = read_scans(file)[1]
    np.testing.assert_allclose(scan.wavelength, WAVELENGTH_HALPHA, rtol=0, atol=1e-8)
    np.testing.assert_array_equal(open_intensity(scan), cube[1, 0])
    np.testing.assert_array_equal(open_intensity(scan)[3:9, 2:4, 5], cube[1, 0, 3:9, 2:4, 5])


@pytest.mark.parametrize("medium", ["air", "vacuum"])
def test_offsets_from_the_line(file, statement, medium):
    """A tuning of zero is the laboratory's wavelength, in whichever medium."""
    rest = LINES["halpha"].rest_wavelength
    tunings = np.linspace(-1.4, 1.4, POINTS)
    in_medium = (vacuum_to_air(rest) if medium == "air" else rest) + tunings
    expected = air_to_vacuum(in_medium) if medium == "air" else in_medium
    statement["wavelength"] = {
        "values": (6563.0 + tunings).tolist(), "unit": "Angstrom", "medium": medium, "line_centre": 6563.0
    }  # fmt: skip
    state(file, statement)
    np.testing.assert_allclose(read_scans(file)[0].wavelength, expected, rtol=0, atol=1e-8)


def test_number_of_wavelengths_from_the_twin_or_the_note(file, cube, statement):
    axis = {"start": -1.4, "step": 0.2, "unit": "Angstrom", "medium": "air", "line_centre": 0.0}
    state(file, {**statement, "wavelength": axis})
    refused(file, "nothing says how many wavelengths")
    note = write_assoc(file.with_name("crispex.6563.assoc.pro"), cube)
    assert len(read_scans(file)) == SCANS
    note.unlink()
    twin = write_twin(file.with_name("crispex.6563_sp.icube"), cube, stokes=True)
    assert len(read_scans(file)) == SCANS
    # and they have to agree
    write_assoc(note, cube[:, :, :5])
    assert "5 wavelengths" in refused(file, "does not fit its crispex.6563.assoc.pro")
    note.unlink()
    write_twin(twin, cube[:2], stokes=True)
    refused(file, "does not fit its twin")
    write_twin(twin, cube[..., :5], stokes=True)
    refused(file, "does not fit its twin")


def test_cubes_of_spectra_are_told_from_cubes_of_images(file, cube):
    for images, spectra in (
        ("a.icube", "a_sp.icube"),
        ("b_im.icube", "b_sp.icube"),
        ("im_c.icube", "sp_c.icube"),
    ):
        write_twin(file.with_name(spectra), cube, stokes=True)
        refused(file.with_name(spectra), "without a sidecar")
        write_cube(file.with_name(images), cube, stokes=True)
        refused(file.with_name(spectra), "a La Palma cube of spectra", OtherLineError)


def test_in_a_directory(file, cube):
    write_twin(file.with_name("crispex.6563_sp.icube"), cube, stokes=True)
    scans, passed_over = find_scans([file.parent])
    assert len(scans) == SCANS
    assert [refusal.where.rsplit("/")[-1] for refusal in passed_over] == ["crispex.6563_sp.icube"]
    write_cube(file.with_name("wb.icube"), cube)
    with pytest.raises(InputError, match="without a sidecar"):
        find_scans([file.parent])


def test_a_sidecar_may_lie_beside_a_link(file, cube, tmp_path):
    """Archives cannot be written to: the sidecar is wherever the cube was linked to."""
    (tmp_path / "archive").mkdir()
    file.rename(tmp_path / "archive" / "cube.icube")
    file.symlink_to(tmp_path / "archive" / "cube.icube")
    scans, _ = find_scans([file, file])
    assert len(scans) == SCANS
    assert scans[0].path == str(file)
    np.testing.assert_array_equal(open_intensity(scans[0]), cube[0, 0])


def test_what_has_to_be_stated_is_said(file):
    file.with_suffix(".yaml").unlink()
    text = refused(file, "without a sidecar")
    for key in ("line: halpha", "medium: air", "time: ", "pointing: ", "unit: DN", "crispex.6563.yaml"):
        assert key in text


def test_the_example_is_one(tmp_path):
    (tmp_path / "example.yaml").write_text(lapalma.EXAMPLE)
    assert load(tmp_path / "example.yaml", CubeStatement, "").wavelength.line_centre == 6563.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("unit"), "unit: missing"),
        (lambda s: s.pop("line"), "line: missing"),
        (lambda s: s.update(colour="red"), "colour: unknown key"),
        (lambda s: s["wavelength"].pop("medium"), "wavelength.medium: missing"),
        (lambda s: s["wavelength"].update(unit="DN"), "'DN' is no unit of length"),
        (lambda s: s["wavelength"].update(values=[1.0, 2.0]), "stated by values, file, not in one way of"),
        (lambda s: s["wavelength"].pop("file"), "wavelength: stated by nothing"),
        (lambda s: s["wavelength"].update(file="nowhere"), "what it refers to cannot be read"),
        (lambda s: s["wavelength"].update(variable="lambda"), "no such variable: spect_pos"),
        (lambda s: s["wavelength"].update(line_centre=6563.0, unit="nm"), "not the line's"),
        (lambda s: s.update(line="ca8542"), "not the line's"),
        (lambda s: s.update(stokes=["I", "V"]), "the header says otherwise"),
        (lambda s: s["time"].update(variable="scale"), "the times are numbers"),
        (lambda s: s.update(time={"values": ["2014-09-06T15:27:24"]}), "the times do not fit"),
        (lambda s: s.update(time={"start": "2014-09-06T15:27:24"}), "time: step missing"),
        (lambda s: s.update(time={"values": [55644] * 3}), "no date and time such as"),
        (lambda s: s.update(time={"values": ["yesterday"] * 3}), "no date and time"),
        (lambda s: s.update(time={"key": "DATE-AVG"}), "no FITS header"),
        (lambda s: s["pointing"].pop("scale"), "pointing: scale missing"),
        (lambda s: s["pointing"].update(scale=0.0), "pixels have a size"),
        (lambda s: s["pointing"].update(reference_value=[[1.0, 2.0]]), "the pointing does not fit"),
        (lambda s: s.update(pointing={"header": True}), "there is no FITS header"),
        (lambda s: s.update(unit="Angstrom"), "unit of the intensities"),
        (lambda s: s.update(padding="zero"), "padding"),
        (lambda s: s.update(cavity_map={"file": "crispex.6563.icube", "unit": "nm"}), "map does not fit"),
    ],
)  # fmt: skip
def test_unusable_statements(file, statement, change, words):
    change(statement)
    state(file, statement)
    text = refused(file, words)
    assert "crispex.6563.yaml" in text


@pytest.mark.parametrize("text", ["", "[1, 2", "- 3", "line: [", "\x00", "a: &b [*b]", "2014-13-77"])
def test_sidecars_that_are_none(file, text):
    file.with_suffix(".yaml").write_text(text)
    assert "crispex.6563.yaml" in refused(file, "description")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: b[:-1], "truncated"),
        (lambda b: b[:600], "truncated"),
        (lambda b: b + b"\0", "not as long as its header says"),
        (lambda b: b.replace(b"datatype=2", b"datatype=9"), "says what cannot be"),
        (lambda b: b.replace(b"endian=l", b"endian=x"), "says what cannot be"),
        (lambda b: b.replace(b"(integer)", b"(FLOAT)  "), "says what cannot be"),
        (lambda b: b.replace(b"endian=l", b"xxxxxxxx"), "says what cannot be"),
        (lambda b: b.replace(b"nx=13", b"nx=1x"), "says what cannot be"),
        (lambda b: b.replace(b"nx=13", b"nx=00"), "not as long"),
        (lambda b: b.replace(b"nx=13, ny=9, nt=180", b"nx=13, ny=90, nt=18"), "whole scans"),
        (lambda b: b.replace(b"I,Q,U,V", b"I,Q,U,U"), "do not fit"),
    ],
)
def test_unusable_cubes(file, damage, words):
    file.write_bytes(damage(file.read_bytes()))
    text = refused(file, words)
    assert "crispex.6563" in text


@pytest.mark.parametrize("content", [b"", b"SIMPLE  =", b"nx=3, ny=4", b"\x89PNG"])
def test_other_files(tmp_path, content):
    path = tmp_path / "scan.icube"
    path.write_bytes(content)
    with pytest.raises(OtherKindError, match="not a La Palma cube"):
        lapalma.read_scans(path)


def test_directories_and_missing_files(tmp_path):
    with pytest.raises(OtherKindError, match="a directory"):
        lapalma.read_scans(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        lapalma.read_scans(tmp_path / "nowhere.icube")


def test_file_changed_after_it_was_described(file, cube):
    scan = read_scans(file)[2]
    write_cube(file, cube[:, :, :, 1:], stokes=True)
    with pytest.raises(InputError, match="has changed"):
        open_intensity(scan)
    write_cube(file, cube[:2], stokes=True)
    with pytest.raises(InputError, match="has changed"):
        open_intensity(scan)
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        open_intensity(scan)


def test_cavity_map_of_a_cube(file, statement):
    """The pipeline's map: a cube of integers, an image a scan, in milliangstrom of air, to be subtracted."""
    errors = np.random.default_rng(4).integers(-80, 80, (SCANS, 1, 1, ROWS, COLUMNS)).astype("<i2")
    write_cube(file.with_name("cmap.icube"), errors)
    statement["cavity_map"] = {"file": "cmap.icube", "unit": "mAngstrom", "factor": -1.0}
    state(file, statement)
    for scan in read_scans(file):
        assert scan.has_wavelength_shift
        shift = open_wavelength_shift(scan)
        # a difference of wavelengths is larger in vacuum, by the refractive index
        np.testing.assert_allclose(shift, -1.000276e-3 * errors[scan.index, 0, 0], rtol=1e-5)
        assert str(file.with_name("cmap.icube")) in scan.sidecars


def test_sidecars_are_hashed_with_the_cube(tmp_path):
    in_lapalma(tmp_path, known_series())
    for path in tmp_path.glob("*_sp.icube"):
        path.unlink()
    ingest([tmp_path], tmp_path / "obs.zarr", call="")
    made_from = open_observation(tmp_path / "obs.zarr").attrs["made_from"]
    files = [p for p in tmp_path.iterdir() if p.is_file() and not p.name.endswith(".assoc.pro")]
    assert made_from == {str(path): sha256_file(path) for path in files}
    assert ingest([tmp_path], tmp_path / "obs.zarr", call="").complete_before
    sidecar = next(tmp_path.glob("*6563*.yaml"))
    sidecar.write_text(sidecar.read_text() + "# looked through\n")
    with pytest.raises(MisuseError, match="made from other files"):
        ingest([tmp_path], tmp_path / "obs.zarr", call="")


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damage_gives_typed_errors_only(tmp_path, file, whole, cube, data):
    """Bytes changed or cut in the header or in a sidecar: scans of the true numbers, or an `InputError`."""
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    name = data.draw(st.sampled_from(sorted(whole)))
    content = bytearray(whole[name])
    for _ in range(data.draw(st.integers(1, 4), label="changes")):
        content[data.draw(st.integers(0, min(len(content), 512) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content))) :]
    (tmp_path / name).write_bytes(content)
    try:
        opened = [(scan, open_intensity(scan)) for scan in read_scans(file)]
    except InputError as error:
        message, opened = str(error), []
    else:
        message = str(tmp_path)
    assert str(tmp_path) in message
    for scan, intensity in opened:
        assert intensity.shape == (len(scan.wavelength), *scan.shape)
        if intensity.shape == (POINTS, ROWS, COLUMNS) and intensity.dtype == cube.dtype:
            assert np.isin(intensity[:], cube).all()


def test_cubes_larger_than_memory_are_no_matter(file, statement):
    """A sparse file of 40 GB: nothing but what is indexed is touched."""
    images = 4 * POINTS * 3
    side = 10_000
    head = (
        f"stokes=[I,Q,U,V], ns=4 :  datatype=2 (integer), dims=3, nx={side}, ny={side}, nt={images}, endian=l"
    )
    file.write_bytes(head.encode().ljust(512, b"\0"))
    os.truncate(file, 512 + 2 * side * side * images)
    cube = open_intensity(read_scans(file)[2])
    assert cube.shape == (POINTS, side, side)
    assert (cube[:, 9_000:9_002, 9_000:9_003] == 0).all()
