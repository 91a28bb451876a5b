"""The SSTRED reader against astropy's own reading of its files; every way in which a cube is unusable."""

from __future__ import annotations

import mmap
import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import astropy.units as u
import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.crisp import (
    ForeignFileError,
    find_scans,
    open_intensity,
    open_wavelength_shift,
    read_headers,
    read_scans,
)
from pipeline.crisp.cube import PER_ANGSTROM
from pipeline.crisp.headers import header_contradictions
from pipeline.crisp.scan import OtherLineError
from pipeline.crisp.wavelengths import air_to_vacuum
from pipeline.defects import uncorrected_wavelengths
from pipeline.errors import InputError
from pipeline.pairing import pair_scans
from tests.sstred_files import DAY, PHYSICAL, write_sstred

SCANS, POINTS, ROWS, COLUMNS = 4, 5, 9, 13
IN_AIR = 6562.79 + np.array([-1.2, -0.5, 0.0, 0.4, 1.3])  # Angstrom, not uniform
SECONDS = 61000.0 + 20.0 * np.arange(SCANS)[:, None] + np.array([0.0, 1.5, 2.0, 2.25, 4.0])
POINTING = np.array([-729.0, -313.0]) + np.array([[0.0, 0.0], [0.4, -0.1], [0.7, 0.2], [1.1, 0.3]])


@pytest.fixture(scope="module")
def cube():
    return np.random.default_rng(1).uniform(5e-9, 4e-8, (SCANS, 4, POINTS, ROWS, COLUMNS)).astype(np.float32)


@pytest.fixture(scope="module")
def cavity():
    return np.random.default_rng(2).normal(0.0, 0.03, (SCANS, ROWS, COLUMNS))


def write(path, cube, cavity=None, **settings):
    settings = {"pointing": POINTING[: len(cube)], "angle": 37.0, "scale": 0.6, **settings}
    return write_sstred(path, cube, IN_AIR, SECONDS[: len(cube)], cavity=cavity, **settings)


@pytest.fixture
def file(tmp_path, cube, cavity):
    return write(tmp_path / "no name of the pipeline's.fits", cube, cavity)


def rewrite(path, change):
    """Let `change` alter the file's HDU list."""
    with fits.open(path, memmap=False, do_not_scale_image_data=True) as hdus:
        hdus = fits.HDUList([hdu.copy() for hdu in hdus])
    change(hdus)
    hdus.writeto(path, overwrite=True)
    return path


def astropys(path, scan, tuning, y, x):
    """Longitude, latitude, wavelength (nm) and seconds of pixels, as astropy and wcslib have them."""
    with fits.open(path) as hdus, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hdus[0].header["SPECSYS"] = "TOPOCENT"
        wcs = WCS(hdus[0].header, fobj=hdus)
        longitude, latitude, wave, _, time = wcs.pixel_to_world_values(x, y, tuning, 0, scan)
    return longitude, latitude, wave, time


class TestCoordinates:
    def test_pointing_is_astropys(self, file):
        y, x = np.mgrid[:ROWS, :COLUMNS].astype(float)
        for scan in read_scans(file):
            longitude, latitude = scan.frame.coordinates(x, y)
            expected = astropys(file, scan.index, 2, y, x)
            # the table is linear between the corners, the frame is a plane that touches the sky
            np.testing.assert_allclose(longitude, expected[0], rtol=0, atol=1e-4)
            np.testing.assert_allclose(latitude, expected[1], rtol=0, atol=1e-4)
            assert scan.frame.scale == pytest.approx((0.6, 0.6), rel=1e-5)
            turn = np.rad2deg(np.arctan2(scan.frame.rotation[1][0], scan.frame.rotation[0][0]))
            assert turn == pytest.approx(37.0, abs=1e-3)

    @pytest.mark.parametrize("axis", [2, 3])
    def test_mirrored_images_are_read_right(self, file, axis):
        """The corners' coordinates run the other way along x or y."""

        def change(hdus):
            values = hdus["WCS-TAB"].data["HPLN+HPLT+WAVE+TIME"]
            values[..., :2] = np.flip(values, axis - 5)[..., :2]

        rewrite(file, change)
        y, x = np.mgrid[:ROWS, :COLUMNS].astype(float)
        for scan in read_scans(file):
            expected = astropys(file, scan.index, 2, y, x)[:2]
            np.testing.assert_allclose(scan.frame.coordinates(x, y), expected, rtol=0, atol=1e-4)
            assert np.linalg.det(scan.frame.matrix) < 0

    def test_wavelengths_are_astropys_brought_to_vacuum(self, file):
        for scan in read_scans(file):
            wave = astropys(file, scan.index, np.arange(POINTS), 3, 4)[2]
            np.testing.assert_allclose(scan.wavelength, air_to_vacuum(10.0 * wave), rtol=0, atol=1e-9)
            assert (scan.medium, scan.medium_stated_by) == ("air", "format")

    def test_times_are_astropys(self, file):
        for scan in read_scans(file):
            seconds = astropys(file, scan.index, np.arange(POINTS), 3, 4)[3]
            for found, expected in (
                (scan.time, seconds.mean()),
                (scan.begin, seconds.min()),
                (scan.end, seconds.max()),
            ):
                assert (found - np.datetime64(DAY)) / np.timedelta64(1, "s") == pytest.approx(
                    expected, abs=1e-6
                )

    def test_medium_that_the_file_states(self, tmp_path, cube):
        path = write(tmp_path / "awav.fits", cube, wave="AWAV")
        assert {(scan.medium, scan.medium_stated_by) for scan in read_scans(path)} == {("air", "file")}
        with pytest.raises(InputError, match="says otherwise"):
            read_scans(path, "vacuum")

    def test_medium_on_the_callers_word(self, file):
        scan = read_scans(file, "vacuum")[0]
        np.testing.assert_allclose(scan.wavelength, IN_AIR, rtol=0, atol=1e-9)
        assert (scan.medium, scan.medium_stated_by) == ("vacuum", "caller")

    def test_units_of_the_table_are_the_headers(self, file, cube):
        def change(hdus):
            values = hdus["WCS-TAB"].data["HPLN+HPLT+WAVE+TIME"]
            values[..., :2] /= 3600.0
            values[..., 2] *= 10.0
            values[..., 3] /= 60.0
            for axis, unit in ((1, "deg"), (2, "deg"), (3, "Angstrom"), (5, "min")):
                hdus[0].header[f"CUNIT{axis}"] = unit

        before = read_scans(file)
        after = read_scans(rewrite(file, change))
        for old, new in zip(before, after, strict=True):
            assert new.frame.reference_value == pytest.approx(old.frame.reference_value, abs=1e-6)
            np.testing.assert_allclose(new.wavelength, old.wavelength, rtol=0, atol=1e-9)
            assert abs(new.time - old.time) < np.timedelta64(1, "us")

    @pytest.mark.parametrize("dropped", [False, True])
    def test_one_scan(self, tmp_path, cube, cavity, dropped):
        path = write(tmp_path / "one.fits", cube[:1], cavity[:1], drop_single_axes=dropped)
        (scan,) = read_scans(path)
        np.testing.assert_allclose(scan.wavelength, air_to_vacuum(IN_AIR), rtol=0, atol=1e-9)
        assert (scan.begin - np.datetime64(DAY)) / np.timedelta64(1, "s") == 61000.0
        np.testing.assert_allclose(open_wavelength_shift(scan), cavity[0], atol=1e-4)

    def test_a_table_of_fewer_scans_is_interpolated_by_its_index(self, file):
        """The first and the last scan tabulated, the others between them: as the index column says."""

        def change(hdus):
            old = hdus["WCS-TAB"].data
            ends = old["HPLN+HPLT+WAVE+TIME"][:, [0, -1]]
            columns = [
                fits.Column("HPLN+HPLT+WAVE+TIME", f"{ends.size}D", dim=f"(4,2,2,{POINTS},2)", array=ends),
                fits.Column("HPLN-INDEX", "2E", array=old["HPLN-INDEX"]),
                fits.Column("HPLT-INDEX", "2E", array=old["HPLT-INDEX"]),
                fits.Column("TIME-INDEX", "2E", array=np.array([[1.0, SCANS]])),
            ]
            hdus["WCS-TAB"] = fits.BinTableHDU.from_columns(columns, name="WCS-TAB")
            hdus[0].header["PS5_2"] = "TIME-INDEX"

        rewrite(file, change)
        for scan in read_scans(file):
            longitude, latitude, _, seconds = astropys(file, scan.index, np.arange(POINTS), 4.0, 6.0)
            assert (scan.time - np.datetime64(DAY)) / np.timedelta64(1, "s") == pytest.approx(
                seconds.mean(), abs=1e-6
            )
            assert scan.frame.reference_value == pytest.approx((longitude[0], latitude[0]), abs=1e-4)


class TestIntensity:
    def test_per_angstrom(self, file, cube):
        for scan in read_scans(file):
            assert u.Unit(scan.units) == PER_ANGSTROM
            assert scan.units_of_file == PHYSICAL
            assert scan.saturation == np.inf
            vacuum = np.array(scan.wavelength)[:, None, None] * u.Angstrom
            expected = (cube[scan.index, 0] * u.Unit(PHYSICAL)).to_value(
                PER_ANGSTROM, u.spectral_density(vacuum)
            )
            np.testing.assert_allclose(open_intensity(scan)[:], expected, rtol=1e-6)

    def test_counts_stay(self, tmp_path, cube):
        path = write(tmp_path / "dn.fits", cube * 1e11, unit="dn")
        for scan in read_scans(path):
            assert scan.units == "DN"
            np.testing.assert_array_equal(open_intensity(scan), np.float32(cube * 1e11)[scan.index, 0])

    def test_relative_on_the_files_word(self, tmp_path, cube):
        for scan in read_scans(write(tmp_path / "relative.fits", cube, unit="1")):
            assert (scan.units, scan.units_of_file) == ("", "1")
            np.testing.assert_array_equal(open_intensity(scan), np.float32(cube)[scan.index, 0])

    def test_scaled_integers(self, tmp_path, cube):
        path = write(tmp_path / "int.fits", cube * 1e11, unit="dn", integers=True)
        assert fits.getheader(path)["BITPIX"] == 16
        with fits.open(path) as hdus:
            expected = hdus[0].data
        step = np.ptp(cube * 1e11) / 64000.0
        for scan in read_scans(path):
            values = open_intensity(scan)[:]
            np.testing.assert_allclose(values, expected[scan.index, 0], rtol=1e-6)
            assert np.abs(values - cube[scan.index, 0] * 1e11).max() <= 0.51 * step
            assert scan.saturation == np.inf

    def test_only_what_is_indexed_is_read(self, tmp_path, cube):
        """Of a file that is torn off after its first scan, that one is still there to be read."""
        path = write(tmp_path / "int.fits", cube, integers=True)
        first, *_, last = read_scans(path)
        opened = [open_intensity(scan) for scan in (first, last)]
        for intensity in opened:
            owner = intensity._stored
            while isinstance(owner, np.ndarray):
                owner = owner.base
            assert isinstance(owner, mmap.mmap)
        np.testing.assert_allclose(opened[1][2, 1:3, 4], opened[1][:][2, 1:3, 4])

    def test_stokes_i_is_taken_wherever_it_is(self, tmp_path, cube):
        path = write(tmp_path / "cube.fits", cube[:, [2, 1, 0, 3]], unit="dn")

        def change(hdus):
            hdus[0].header.update(CRPIX4=3, CRVAL4=1, CDELT4=-1)

        for scan in read_scans(rewrite(path, change)):
            np.testing.assert_array_equal(open_intensity(scan), cube[scan.index, 0])

    @pytest.mark.parametrize(("said", "expected"), [("nan", "nan"), ("median", "constant"), (None, None)])
    def test_padding(self, tmp_path, cube, said, expected):
        assert read_scans(write(tmp_path / "cube.fits", cube, padding=said))[0].padding == expected


class TestCavityMap:
    @pytest.mark.parametrize("tunings", [slice(None), None])
    def test_added_to_the_wavelengths(self, tmp_path, cube, cavity, tunings):
        path = write(tmp_path / "cube.fits", cube, cavity, tunings=tunings)
        for scan in read_scans(path):
            assert scan.has_wavelength_shift
            shift = open_wavelength_shift(scan)
            # true wavelength in air = tuning + map, then to vacuum
            core = air_to_vacuum(6562.79 + cavity[scan.index])
            np.testing.assert_allclose(air_to_vacuum(6562.79) + shift, core, rtol=0, atol=2e-8)

    def test_in_vacuum_it_stays_as_it_is(self, file, cavity):
        for scan in read_scans(file, "vacuum"):
            np.testing.assert_allclose(open_wavelength_shift(scan), cavity[scan.index], rtol=0, atol=1e-8)

    @pytest.mark.parametrize(
        ("steps", "applied"),
        [
            (("CONCATENATION", "SPECTRAL-DISTORTION-CORRECTION"), False),
            (("CONCATENATION,SPECTRAL-DISTORTION-CORRECTION", "CROPPING"), False),
            (("SPECTRAL-COORDINATE-DISTORTION-CORRECTION",), True),
            (("SPATIAL-DISTORTION-CORRECTION",), True),
            ((), True),
        ],
    )
    def test_not_applied_twice(self, tmp_path, cube, cavity, steps, applied):
        path = write(tmp_path / "cube.fits", cube, cavity, steps=steps)
        for scan in read_scans(path):
            assert scan.has_wavelength_shift is applied
            assert (open_wavelength_shift(scan) is not None) is applied

    def test_a_map_in_another_unit_is_told(self, tmp_path, cube, cavity):
        """It is in Angstrom, where the axis is in nm."""
        for factor in (1.0, 100.0):
            path = write(tmp_path / f"{factor}.fits", cube, factor * np.sign(cavity + 1e-9) * 0.03)
            scan = read_scans(path)[0]
            said = list(uncorrected_wavelengths(open_wavelength_shift(scan), np.ones(scan.shape, bool)))
            assert ["see whether their unit is right" in sentence for sentence in said] == [True] * (
                factor > 1.0
            )

    def test_none(self, tmp_path, cube):
        (scan, *_) = read_scans(write(tmp_path / "cube.fits", cube))
        assert not scan.has_wavelength_shift
        assert open_wavelength_shift(scan) is None

    def test_pixels_without(self, tmp_path, cube, cavity):
        holes = np.where(np.arange(COLUMNS) < 3, np.nan, cavity)
        (scan, *_) = read_scans(write(tmp_path / "cube.fits", cube, holes))
        np.testing.assert_array_equal(np.isnan(open_wavelength_shift(scan)), np.isnan(holes[0]))

    def test_of_some_tunings_only_is_refused(self, tmp_path, cube, cavity):
        path = write(tmp_path / "cube.fits", cube, cavity, tunings=slice(1, 4))
        with pytest.raises(InputError, match=r"(?s)differ between the tunings.*\[1, 2, 3\]"):
            read_scans(path)


def test_what_travels_is_small(tmp_path):
    """A description of a scan does not grow with the number of scans, nor with the header."""
    cube = np.ones((300, 1, POINTS, 2, 2), dtype=np.float32)
    path = write_sstred(tmp_path / "long.fits", cube, IN_AIR, np.arange(300.0)[:, None] + np.arange(POINTS))
    scans = read_scans(path)
    assert [scan.index for scan in scans] == list(range(300))
    assert max(len(pickle.dumps(scan)) for scan in scans) < 2000
    assert pickle.loads(pickle.dumps(scans[7])) == scans[7]


def test_headers_are_whole(file):
    headers = read_headers(read_scans(file)[0])
    with fits.open(file) as hdus:
        assert len(headers) == len(hdus) == 4
        for text, hdu in zip(headers, hdus, strict=True):
            restored = fits.Header.fromstring(text, sep="\n")
            assert [card.image for card in restored.cards] == [card.image for card in hdu.header.cards]


def test_specsys_may_be_missing(tmp_path, cube):
    assert len(read_scans(write(tmp_path / "cube.fits", cube, specsys=None))) == SCANS


def test_found_among_other_files(tmp_path, file, cube):
    """Wide-band cubes and cubes of spectra lie beside the cubes of images, and are passed over."""
    write_sstred(tmp_path / "wb.fits", cube[:, :1, :1], IN_AIR[:1], SECONDS[:, :1])

    def flip(hdus):
        header = hdus[0].header
        hdus[0].data = hdus[0].data.transpose(3, 4, 1, 0, 2)
        kinds = [header[f"CTYPE{axis}"] for axis in (3, 5, 4, 1, 2)]
        for axis, kind in enumerate(kinds, start=1):
            header[f"CTYPE{axis}"] = kind

    spectra = write(tmp_path / "sp.fits", cube)
    rewrite(spectra, flip)
    scans, passed_over = find_scans([tmp_path])
    assert {scan.path for scan in scans} == {str(file)}
    assert len(scans) == SCANS
    reasons = {Path(refusal.where).name: str(refusal) for refusal in passed_over}
    assert set(reasons) == {"wb.fits", "sp.fits"}
    assert "one wavelength" in reasons["wb.fits"]
    assert "of spectra" in reasons["sp.fits"]
    with pytest.raises(InputError, match="of spectra"):
        find_scans([spectra])


def table(hdus):
    return hdus["WCS-TAB"].data["HPLN+HPLT+WAVE+TIME"]


def put(hdus, place, value):
    table(hdus)[place] = value


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda h: h[0].header.set("CTYPE4", "HEIGHT"), ForeignFileError, "no format that is known"),
        (lambda h: put(h, (..., 2), 854.2 + np.arange(POINTS)[:, None, None]), InputError, "another line"),
        (
            lambda h: put(h, (..., 2), 393.3 + 0.01 * np.arange(POINTS)[:, None, None]),
            OtherLineError,
            "another line",
        ),
        (lambda h: put(h, (..., 2), 656.28), InputError, "increase"),
        (lambda h: put(h, (0, 1, 2, 0, 0, 2), np.nan), InputError, "damaged"),
        (lambda h: put(h, (..., 3), 1e12), InputError, "times"),
        (lambda h: put(h, (..., 0, 0, 0), 0.0), InputError, "contradict"),
        (lambda h: put(h, (..., 0), -700.0), InputError, "on one line"),
        (lambda h: put(h, (..., slice(2)), -700.0), InputError, "on one line"),
        (lambda h: put(h, (..., 1, 2), 656.3), InputError, "differ between the field's corners"),
        (lambda h: h[0].header.update(CUNIT1="deg", CUNIT2="deg"), InputError, "coordinates cannot be read"),
        # A fourth of what one of the four corners is off is left in each, by least squares.
        (
            lambda h: put(h, (..., 0, 0, 0), table(h)[..., 0, 0, 0] + 0.3),
            InputError,
            "0.07 arcsec|0.08 arcsec",
        ),
        (lambda h: h.pop(1), InputError, "coordinates are missing"),
        (lambda h: h[0].header.set("PS3_1", "WAVE"), InputError, "not tabulated"),
        (lambda h: h[0].header.set("PV5_3", 3), InputError, "not tabulated"),
        (lambda h: h[0].header.set("PC1_2", 0.3), InputError, "not tabulated"),
        (lambda h: h[0].header.set("CRPIX5", 20), InputError, "does not cover"),
        (lambda h: h[0].header.set("CDELT3", 0), InputError, "index"),
        (lambda h: h[0].header.set("CDELT1", -1), InputError, "index"),
        (lambda h: h[0].header.set("CUNIT3", "kg"), InputError, "unit of a coordinate"),
        (lambda h: h[0].header.remove("CUNIT5"), InputError, "unit of a coordinate"),
        (lambda h: h[0].header.remove("DATEREF"), InputError, "no reference"),
        (lambda h: h[0].header.set("DATEREF", "yesterday"), InputError, "time cannot be read"),
        (lambda h: h[0].header.set("BUNIT", "furlongs"), InputError, "unit of the intensities"),
        (lambda h: h[0].header.remove("BUNIT"), InputError, "no unit"),
        (lambda h: h[0].header.set("BUNIT", " "), InputError, "no unit"),
        (lambda h: h[0].header.set("CRVAL4", 2), InputError, "no Stokes I"),
        (lambda h: h.pop(3), InputError, "corrections is missing"),
        (lambda h: setattr(h["WCSDVARR"], "data", h["WCSDVARR"].data[..., 1:]), InputError, "does not fit"),
    ],
)
def test_unusable_files(file, change, kind, words):
    rewrite(file, change)
    with pytest.raises(kind, match=words) as caught:
        read_scans(file)
    assert str(file) in str(caught.value)
    assert caught.value.found
    assert caught.value.remedy


@pytest.mark.parametrize(("unit", "kind"), [("dn", ">i4"), (PHYSICAL, ">i4"), (PHYSICAL, ">i2")])
def test_scaled_integers_of_any_size_are_astropys(tmp_path, cube, unit, kind):
    """Integers with BZERO far from the intensities: what astropy makes of the file."""
    path = write(tmp_path / "a.fits", cube, unit=unit)
    step = 1.0 if unit == "dn" else 2e-12
    offset = 2**31 if kind == ">i4" else 30_000
    stored = np.random.default_rng(3).integers(0, 30_000, cube.shape) - offset

    def change(hdus):
        hdus[0].data = stored.astype(kind)
        hdus[0].header["BSCALE"], hdus[0].header["BZERO"] = step, step * offset

    rewrite(path, change)
    with fits.open(path) as hdus:
        expected = hdus[0].data.astype(np.float64)[:, 0]
    for scan in read_scans(path):
        factor = np.ones((POINTS, 1, 1))
        if unit != "dn":
            axis = np.array(scan.wavelength)[:, None, None] * u.Angstrom
            factor *= (1.0 * u.Unit(unit)).to_value(PER_ANGSTROM, u.spectral_density(axis))
        away = np.abs(open_intensity(scan)[:] - factor * expected[scan.index])
        # to single precision, or a hundredth of what one more is
        assert np.all(away < 1e-7 * factor * expected[scan.index] + 0.01 * factor * step)


def test_a_table_that_has_all_scans_at_one_time(file):
    rewrite(file, lambda hdus: put(hdus, (..., 3), 61000.0))
    with pytest.raises(InputError, match="two scans of a file have the same time") as caught:
        pair_scans([*read_scans(file), replace(read_scans(file)[0], line="ca8542")], 15.0)
    assert caught.value.where == f"{file}, scan 1"


@pytest.mark.parametrize("lost", [0.0, 0.02, 0.1, 0.2, 0.3, 0.6, 0.9])
def test_truncated_file(file, lost):
    os.truncate(file, int(file.stat().st_size * (1.0 - lost)) - 2880)
    with pytest.raises(InputError, match=r"truncated|damaged|missing") as caught:
        read_scans(file)
    assert not isinstance(caught.value, ForeignFileError)


def test_file_changed_after_it_was_described(file, cube):
    last = read_scans(file)[-1]
    file.unlink()
    write(file, cube[:2])
    for opener in (open_intensity,):
        with pytest.raises(InputError, match="has changed"):
            opener(last)
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        open_wavelength_shift(last)


@pytest.mark.filterwarnings("ignore::astropy.utils.exceptions.AstropyUserWarning", "ignore::RuntimeWarning")
@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damage_gives_typed_errors_only(tmp_path, file, data):
    """Bytes changed or cut in headers, tables and maps: scans of the file's own shape, or an `InputError`."""
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 8), label="changes")):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content))) :]
    damaged = tmp_path / "damaged.fits"
    damaged.write_bytes(content)
    message = str(damaged)
    try:
        scans = read_scans(damaged)
        opened = [(open_intensity(scan), open_wavelength_shift(scan)) for scan in scans[:2]]
    except InputError as error:
        message = str(error)
    else:
        for scan, (intensity, shift) in zip(scans, opened, strict=False):
            assert intensity.shape == (len(scan.wavelength), *scan.shape)
            assert intensity[0].dtype.kind in "iuf"
            assert shift is None or shift.shape == scan.shape
    assert str(damaged) in message


# What each card may change without being a lie: a file that says another unit has another unit.
DECIDES = {
    "wavelength": {"CTYPE3", "CUNIT3", "CRPIX3", "CRVAL3", "CDELT3", "PS3_2", "PV3_3"},
    "time": {"CTYPE5", "CUNIT5", "CRPIX5", "CRVAL5", "CDELT5", "PS5_2", "PV5_3", "DATEREF", "TIMESYS"},
    "pointing": {f"{card}{axis}" for card in ("CUNIT", "CRPIX", "CRVAL", "CDELT") for axis in (1, 2)}
    | {f"P{kind}_{part}" for kind in ("S1", "S2", "V1", "V2") for part in (2, 3)},
    "intensity": {"BUNIT", "BSCALE", "BZERO", "BLANK", "CRPIX4", "CRVAL4", "CDELT4"},
}
VALUES = [None, "", "x", "nm", "UTC", "2014-09-06", "WCS-TAB", -1, 0, 1, 2, 3, 0.5, 1e300, -1e-300, True]


@pytest.mark.filterwarnings("ignore::astropy.utils.exceptions.AstropyWarning", "ignore::RuntimeWarning")
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_header_gives_the_true_axes_or_a_typed_error(tmp_path, data):
    """Cards replaced or removed in cubes of any size and number type: right, or refused, but never wrong."""
    scans, stokes, rows, columns = (data.draw(st.integers(1, 3), label=label) for label in "tsyx")
    rows, columns = rows + 1, columns + 1
    rng = np.random.default_rng(data.draw(st.integers(0, 9), label="seed"))
    cube = rng.uniform(5.0, 40.0, (scans, stokes, POINTS, rows, columns))
    path = tmp_path / "fuzzed.fits"
    path.unlink(missing_ok=True)
    write(
        path,
        cube,
        rng.normal(0.0, 0.03, (scans, rows, columns)) if data.draw(st.booleans(), label="map") else None,
        unit="dn",
        integers=data.draw(st.booleans(), label="integers"),
        drop_single_axes=data.draw(st.booleans(), label="dropped"),
    )
    truth = [np.array(open_intensity(scan)) for scan in read_scans(path)]
    # By bytes: astropy would mend what it writes.
    content = path.read_bytes()
    header = fits.Header.fromstring(content)
    length, size = len(header.tostring()), cube.size * abs(header["BITPIX"]) // 8
    stored = np.frombuffer(content, {16: ">i2", -32: ">f4"}[header["BITPIX"]], cube.size, length)
    rest = content[length + -(-size // 2880) * 2880 :]
    cards = sorted(
        {card for card in header if card and not card.startswith(("NAXIS", "BITPIX", "DW3", "SIM"))}
        | {"NWIN", "WAVELNTH", "WAVEUNIT", "FILTER1", "DATE-BEG", "DATE-AVG", "DATE-END"}
    )
    changed = data.draw(
        st.dictionaries(st.sampled_from(cards), st.sampled_from(VALUES), max_size=2), label="changed"
    )
    for card, value in changed.items():
        if value is None:
            header.remove(card, ignore_missing=True)
        else:
            header[card] = value
    bits, kind = data.draw(
        st.sampled_from([(header["BITPIX"], stored.dtype), (32, ">i4"), (-64, ">f8"), (64, ">i8")]),
        label="type",
    )
    if header["BITPIX"] < 0 < bits:  # rounded, which the intensities are compared with
        truth = [np.trunc(cube[index, 0]) for index in range(scans)]
    header["BITPIX"] = bits
    numbers = stored.astype(kind).tobytes()
    numbers += bytes(-len(numbers) % 2880)
    path.write_bytes(header.tostring().encode("ascii") + numbers + rest)
    try:
        found = read_scans(path)
        opened = [open_intensity(scan)[:] for scan in found]
        for scan in found:
            header_contradictions(scan)
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    touched = {name for name, deciding in DECIDES.items() if deciding & set(changed)}
    assert len(found) == scans
    for scan, intensity, true in zip(found, opened, truth, strict=True):
        assert intensity.shape == (POINTS, rows, columns) == (len(scan.wavelength), *scan.shape)
        if "wavelength" not in touched:
            np.testing.assert_allclose(scan.wavelength, air_to_vacuum(IN_AIR), rtol=0, atol=1e-9)
        if "time" not in touched:
            seconds = (scan.time - np.datetime64(DAY)) / np.timedelta64(1, "s")
            assert seconds == pytest.approx(SECONDS[scan.index].mean(), abs=1e-6)
        if "pointing" not in touched:
            assert scan.frame.reference_value == pytest.approx(tuple(POINTING[scan.index]), abs=1e-4)
        if "intensity" not in touched:
            np.testing.assert_allclose(intensity, true, rtol=1e-6)
