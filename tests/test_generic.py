"""Cubes with a description: whatever their axes, numbers and places, the same scans; else it is said why."""

from __future__ import annotations

import itertools
import os
import sys
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml
from astropy.io import fits
from astropy.time import Time
from astropy.wcs import WCS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.crisp import find_scans, generic, open_intensity, open_wavelength_shift, read_headers
from pipeline.crisp.cube import PER_ANGSTROM
from pipeline.crisp.generic import load_description
from pipeline.crisp.scan import OtherKindError
from pipeline.crisp.wavelengths import vacuum_to_air
from pipeline.errors import InputError, MisuseError
from pipeline.ingest import ingest
from pipeline.observation import fits_headers, open_observation
from pipeline.provenance import sha256_file
from tests.fchroma_files import START, WAVELENGTH_HALPHA
from tests.generic_files import write_dkist
from tests.known_series import AXES, CONTINUUM, FORMATS, described, in_ibis, known_series, per_frequency
from tests.lapalma_files import write_idl

DEPLOY = Path(__file__).parents[1] / "deploy"
SIZES = {"time": 2, "stokes": 4, "wavelength": 15, "y": 6, "x": 8}
IN_AIR = vacuum_to_air(WAVELENGTH_HALPHA)


def fuzzed(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@pytest.fixture
def cube():
    """(time, stokes, wavelength, y, x)"""
    return np.random.default_rng(1).integers(100, 3000, tuple(SIZES.values())).astype(">i2")


def statement(**changes):
    cube = {
        "axes": list(SIZES),
        "stokes": ["I", "Q", "U", "V"],
        "line": "halpha",
        "wavelength": {"values": IN_AIR.tolist(), "unit": "Angstrom", "medium": "air"},
        "time": {"start": "2014-09-06T15:27:24", "step": 11.5},
        "pointing": {"reference_value": [-729.8, -313.4], "scale": 0.1},
        "unit": "DN",
        **changes,
    }
    return {key: value for key, value in cube.items() if value is not None}


def read_scans(path, description, medium=None):
    return generic.read_scans(path, load_description(description), medium)


def describe(folder, *cubes):
    path = folder / "description.yaml"
    path.write_text(yaml.safe_dump({"cubes": list(cubes)}))
    return path


@pytest.fixture
def file(tmp_path, cube):
    path = tmp_path / "cube.fits"
    fits.PrimaryHDU(cube, fits.Header({"DATE-AVG": "2014-09-06T15:27:24.5"})).writeto(path)
    return path


def rewrite(path, change):
    """Let `change` alter the file's HDU list, or replace it."""
    with fits.open(path, memmap=False) as hdus:
        hdus = fits.HDUList([hdu.copy() for hdu in hdus])
    hdus = change(hdus) or hdus
    hdus.writeto(path, overwrite=True)


def test_examples_in_deploy_are_descriptions(tmp_path):
    for name in ("ibis.yaml", "fiss.yaml", "dkist.yaml"):
        description = load_description(DEPLOY / name)
        assert {cube.line for cube in description.cubes} == {"halpha", "ca8542"}
    (tmp_path / "example.yaml").write_text(generic.EXAMPLE)
    assert load_description(tmp_path / "example.yaml").cubes[0].wavelength.medium == "air"


def test_scans(file, cube, tmp_path):
    description = describe(tmp_path, statement())
    scans = read_scans(file, description)
    assert [scan.index for scan in scans] == [0, 1]
    for scan in scans:
        assert (scan.format, scan.line, scan.units, scan.saturation) == ("generic", "halpha", "DN", 32767)
        assert (scan.medium, scan.medium_stated_by) == ("air", "file")
        assert scan.sidecars == (str(description),)
        assert scan.frame.reference_pixel == (3.5, 2.5)
        np.testing.assert_allclose(scan.wavelength, WAVELENGTH_HALPHA, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(open_intensity(scan), cube[scan.index, 0])
    assert scans[1].time - scans[0].time == np.timedelta64(11500, "ms")
    header, text = read_headers(scans[0])
    assert header.startswith("SIMPLE")
    assert yaml.safe_load(text)["cubes"]
    with pytest.raises(InputError, match="otherwise of its wavelengths"):
        read_scans(file, description, "vacuum")


@fuzzed(40)
@given(data=st.data())
def test_any_axes_numbers_and_containers(tmp_path, cube, data):
    """Written by numpy's transposing in any order and type, read as what it was."""
    axes = data.draw(
        st.sampled_from(
            [
                p
                for n in (3, 4, 5)
                for p in itertools.permutations(SIZES, n)
                if {"wavelength", "y", "x"} <= {*p}
            ]
        )
    )
    stokes = data.draw(st.permutations(["I", "Q", "U", "V"])) if "stokes" in axes else None
    order = np.array(data.draw(st.permutations(range(SIZES["wavelength"]))))
    dtype = data.draw(st.sampled_from([">i2", ">i4", ">f4", ">f8", "u1"]))
    container = data.draw(st.sampled_from(["fits", "compressed", "scipy", "h5netcdf"]))
    numbers = (cube // 16).astype(dtype)
    whole = numbers[:, :, order]
    if stokes is not None:
        whole = whole[:, ["IQUV".index(each) for each in stokes]]
    kept = tuple(slice(None) if axis in axes else 0 for axis in SIZES)
    left = [axis for axis in SIZES if axis in axes]
    stored = np.ascontiguousarray(np.transpose(whole[kept], [left.index(axis) for axis in axes]))
    path = tmp_path / "any.cube"
    path.unlink(missing_ok=True)
    changes = {}
    if container == "fits":
        fits.PrimaryHDU(stored).writeto(path)
    elif container == "compressed":
        image = fits.CompImageHDU(stored, name="CUBE", compression_type="GZIP_1", quantize_level=0)
        fits.HDUList([fits.PrimaryHDU(), image]).writeto(path)
        changes["hdu"] = data.draw(st.sampled_from(["cube", 1, None]))
    else:
        native = stored.astype(np.int16 if dtype == "u1" else stored.dtype.newbyteorder("="))
        xr.Dataset({"intensity": (axes, native)}).to_netcdf(path, engine=container)
        changes["variable"] = "intensity"
    description = describe(
        tmp_path,
        statement(
            axes=list(axes),
            stokes=stokes,
            wavelength={"values": IN_AIR[order].tolist(), "unit": "Angstrom", "medium": "air"},
            **changes,
        ),
    )
    scans = read_scans(path, description)
    assert len(scans) == (2 if "time" in axes else 1)
    for scan in scans:
        intensity, expected = open_intensity(scan), numbers[scan.index, 0]
        np.testing.assert_allclose(scan.wavelength, WAVELENGTH_HALPHA, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(intensity, expected)
        np.testing.assert_array_equal(intensity[3:9, 1:4, 2], expected[3:9, 1:4, 2])


class TestWavelengths:
    def axis(self, file, /, **wavelength):
        changes = {"unit": "Angstrom", "medium": "air", **wavelength}
        scan = read_scans(file, describe(file.parent, statement(wavelength=changes)))[0]
        return np.array(scan.wavelength)

    @pytest.mark.parametrize("unit", ["Angstrom", "nm", "0.001 Angstrom", "m"])
    def test_start_and_step_in_any_unit(self, file, unit):
        step = {"Angstrom": 1.0, "nm": 10.0, "0.001 Angstrom": 1e-3, "m": 1e10}[unit]
        for first, sign in ((0, 1.0), (-1, -1.0)):
            start = float(WAVELENGTH_HALPHA[first]) / step
            found = self.axis(file, unit=unit, medium="vacuum", start=start, step=sign * 0.2 / step)
            np.testing.assert_allclose(found, WAVELENGTH_HALPHA, rtol=0, atol=1e-9)

    def test_in_files(self, file, tmp_path):
        np.savetxt(tmp_path / "axis.txt", IN_AIR, header="Angstrom, in air")
        column = fits.BinTableHDU.from_columns([fits.Column("WAVE", "D", array=IN_AIR)], name="TABLE")
        images = [fits.PrimaryHDU(), fits.ImageHDU(IN_AIR, name="AXIS"), column]
        fits.HDUList(images).writeto(tmp_path / "axis.fits")
        xr.Dataset({"wave": ("n", IN_AIR)}).to_netcdf(tmp_path / "axis.nc", engine="scipy")
        xr.Dataset({"wave": ("n", IN_AIR)}).to_netcdf(tmp_path / "deep.nc", engine="h5netcdf", group="a/b")
        write_idl(tmp_path / "axis.sav", {"wave": IN_AIR, "spect_pos": IN_AIR})
        rewrite(file, lambda hdus: fits.HDUList([hdus[0], *images[1:]]))
        for where in (
            {"file": "axis.txt"},
            {"file": "axis.fits"},
            {"file": "axis.fits", "hdu": "axis"},
            {"file": "axis.fits", "hdu": 2, "column": "WAVE"},
            {"file": "axis.nc", "variable": "wave"},
            {"file": "deep.nc", "variable": "a/b/wave"},
            {"file": "axis.sav"},
            {"file": "axis.sav", "variable": "WAVE"},
            {"hdu": "AXIS"},
            {"hdu": "TABLE", "column": "WAVE"},
        ):
            np.testing.assert_allclose(self.axis(file, **where), WAVELENGTH_HALPHA, rtol=0, atol=1e-9)

    @pytest.mark.filterwarnings("ignore::astropy.wcs.FITSFixedWarning")
    @pytest.mark.parametrize("first", [0, 1])
    def test_in_the_header(self, file, first):
        cards = {"CRVAL3": IN_AIR[3], "CRPIX3": 3.0 + first, "CDELT3": IN_AIR[1] - IN_AIR[0]}
        rewrite(file, lambda hdus: hdus[0].header.update(cards))
        found = self.axis(file, header=True, first_pixel=first)
        np.testing.assert_allclose(found, WAVELENGTH_HALPHA, rtol=0, atol=1e-6)
        # astropy's own reading of the same header
        if first == 1:
            with fits.open(file) as hdus:
                expected = WCS(hdus[0].header).sub([3]).wcs_pix2world(np.arange(15), 0)[0]
            np.testing.assert_allclose(vacuum_to_air(found), expected, rtol=0, atol=1e-9)

    @pytest.mark.parametrize(
        ("cards", "words"),
        [
            ({}, "no wavelengths"),
            ({"CRVAL3": 656.0, "CRPIX3": 1.0, "CDELT3": 0.02, "CUNIT3": "nm"}, "another unit"),
            (
                {"CRVAL3": 6561.4, "CRPIX3": 1.0, "CDELT3": 0.2, "CUNIT3": "Angstrom", "CTYPE3": "AWAV"},
                "in air",
            ),
            ({"CRVAL3": 5000.0, "CRPIX3": 1.0, "CDELT3": 0.2}, "not the line's"),
            ({"CRVAL3": 6563.0, "CRPIX3": 1.0, "CDELT3": 0.0}, "no axis"),
        ],
    )
    def test_headers_that_contradict(self, file, cards, words):
        rewrite(file, lambda hdus: hdus[0].header.update(cards))
        with pytest.raises(InputError, match=words) as caught:
            self.axis(file, header=True, medium="vacuum")
        assert "cubes.0.wavelength" in str(caught.value)


class TestTimes:
    def scans(self, file, /, **time):
        changes = {"axes": ["wavelength", "y", "x"], "stokes": None, "time": time}
        rewrite(file, lambda hdus: setattr(hdus[0], "data", hdus[0].data.reshape(-1, 15, 6, 8)[0]))
        return read_scans(file, describe(file.parent, statement(**changes)))

    @pytest.mark.parametrize(
        "value",
        ["2014-09-06T15:27:24.5", "2014-09-06 15:27:24.5", "2014.09.06 15:27:24.5", "2014-09-06T15:27:24.5Z"],
    )
    def test_as_people_write_them(self, file, value):
        (scan,) = self.scans(file, values=[value])
        assert scan.time == START + np.timedelta64(500, "ms")
        assert scan.begin is scan.end is None

    def test_card_offset_and_duration(self, file):
        (scan,) = self.scans(file, key="DATE-AVG", offset=1.5, duration=3.0)
        assert scan.time == START + np.timedelta64(2000, "ms")
        assert scan.end - scan.begin == np.timedelta64(3, "s")
        assert scan.time - scan.begin == np.timedelta64(1500, "ms")

    def test_two_cards(self, file):
        cards = {"STRTIME": "2014-09-06T15:27:20", "ENDTIME": "2014-09-06T15:27:28"}
        rewrite(file, lambda hdus: hdus[0].header.update(cards))
        (scan,) = self.scans(file, key=["STRTIME", "ENDTIME"])
        assert (scan.begin, scan.time, scan.end) == tuple(START + np.array([-4, 0, 4], "timedelta64[s]"))
        with pytest.raises(InputError, match="ends before it begins"):
            self.scans(file, key=["ENDTIME", "STRTIME"])

    def test_time_scale(self, file):
        (scan,) = self.scans(file, values=["2014-09-06T15:27:24"], scale="tai")
        assert scan.time == np.datetime64(Time("2014-09-06T15:27:24", scale="tai").utc.datetime64, "ns")
        rewrite(file, lambda hdus: hdus[0].header.update({"TIMESYS": "TAI"}))
        with pytest.raises(InputError, match="another time scale"):
            self.scans(file, key="DATE-AVG")

    def test_numbers_and_times_of_day(self, file, tmp_path):
        (tmp_path / "numbers.txt").write_text("55644.0  # of the day\n")
        (tmp_path / "times.txt").write_text("15:27:24.0\n")
        write_idl(tmp_path / "old.sav", {"time": ["15:27:24"], "date": "2014.09.06"})
        for time in (
            {"file": "numbers.txt", "since": "2014-09-06T00:00:00"},
            {"file": "times.txt", "date": "2014-09-06"},
            {"file": "old.sav"},
        ):
            assert self.scans(file, **time)[0].time == START
        for time, words in (
            ({"file": "numbers.txt"}, "times are numbers"),
            ({"file": "numbers.txt", "since": "2014-09-06T00:00:00", "unit": "yr"}, "no times"),
            ({"file": "times.txt"}, "no date"),
        ):
            with pytest.raises(InputError, match=words) as caught:
                self.scans(file, **time)
            assert "cubes.0.time" in str(caught.value)

    def times(self, file, /, **time):
        return [scan.time for scan in read_scans(file, describe(file.parent, statement(time=time)))]

    def test_midnight(self, file, tmp_path):
        """10 s before midnight and 20 s after it: half a minute, however the date is stated."""
        (tmp_path / "times.txt").write_text("23:59:50\n00:00:20.0\n")
        for dates in ("2014.09.06", ["2014.09.06"] * 2, ["2014.09.06", "2014.09.07"]):
            name = f"{len(set(dates))}_{len(dates)}.sav"
            write_idl(tmp_path / name, {"time": ["23:59:50", "00:00:20"], "date": dates})
            expected = np.datetime64("2014-09-06T23:59:50") + np.arange(2) * np.timedelta64(30, "s")
            np.testing.assert_array_equal(self.times(file, file=name), expected)
        stated = {"date": "2014-09-06", "offset": 0.5}
        expected = expected + np.timedelta64(500, "ms")
        np.testing.assert_array_equal(self.times(file, file="times.txt", **stated), expected)
        np.testing.assert_array_equal(self.times(file, values=["23:59:50", "0:00:20"], **stated), expected)
        rewrite(file, lambda hdus: hdus[0].header.update({"START": "23:59:58", "STOP": "00:00:08"}))
        (scan,) = self.scans(file, key=["START", "STOP"], date="2014-09-06")
        assert scan.time == np.datetime64("2014-09-07T00:00:03")
        assert scan.end - scan.begin == np.timedelta64(10, "s")

    @pytest.mark.parametrize(
        "values",
        [
            ["15:27:24", "15:27:23"],
            ["15:27:24", "15:27:24"],
            ["15:27:24", "03:27:24"],  # half a day, and no more
            ["2014-09-06T23:59:50", "2014-09-06T00:00:20"],
        ],
    )
    def test_times_that_do_not_increase(self, file, values):
        with pytest.raises(InputError, match="times do not increase") as caught:
            self.times(file, values=values, date="2022-06-05")
        assert "cubes.0.time" in str(caught.value)

    @pytest.mark.parametrize("scale", ["utc", "tai"])
    @pytest.mark.parametrize("engine", ["scipy", "h5netcdf"])
    def test_time_scale_of_netcdf(self, file, tmp_path, scale, engine):
        """Times of CF conventions in TAI: as astropy has them in UTC."""
        written = START.astype("datetime64[ns]") + np.array([123_456_789, 30_000_000_000], "timedelta64[ns]")
        units = (
            "nanoseconds since 2014-09-06T15:27:24" if engine == "h5netcdf" else "seconds since 2014-09-06"
        )
        dataset = xr.Dataset({"when": ("n", written)})
        kind = "i8" if engine == "h5netcdf" else "f8"
        dataset.to_netcdf(
            tmp_path / "a.nc", engine=engine, encoding={"when": {"units": units, "dtype": kind}}
        )
        found = self.times(file, file="a.nc", variable="when", scale=scale)
        expected = Time(written, scale=scale).utc.datetime64
        away = np.abs(np.array(found) - expected)
        assert away.max() <= np.timedelta64(10, "ns")
        assert (written[0] - found[0] > np.timedelta64(34, "s")) == (scale == "tai")

    @pytest.mark.parametrize("card", ["DATE-OBS", "DATE_OBS"])
    def test_a_date_beside_a_time_of_day(self, file, card):
        """DATE-OBS and TIME-OBS, as headers of the last century have them; a date alone is no time."""
        cards = {card: "2014-09-06", card.replace("DATE", "TIME"): "15:27:24.5"}
        rewrite(file, lambda hdus: hdus[0].header.update(cards))
        (scan,) = self.scans(file, key=card)
        assert scan.time == START + np.timedelta64(500, "ms")
        rewrite(file, lambda hdus: hdus[0].header.remove(card.replace("DATE", "TIME")))
        for time in ({"key": card}, {"values": ["2014-09-06"]}, {"start": "2014-09-06", "step": 1.0}):
            with pytest.raises(InputError, match="no date and time of day") as caught:
                self.scans(file, **time)
            assert "cubes.0.time" in str(caught.value)

    @pytest.mark.parametrize("day", ["0014-09-06", "1677-09-06", "2262-09-06", "2914-09-06"])
    def test_years_that_numbers_cannot_hold(self, file, tmp_path, day):
        """64 bits of nanoseconds from 1970 end in 1677 and 2262, and begin anew."""
        xr.Dataset({"t": ("n", [0.0, 9.0], {"units": f"seconds since {day}"})}).to_netcdf(
            tmp_path / "a.nc", engine="scipy"
        )
        for time in (
            {"values": [f"{day}T15:27:24", f"{day}T15:27:25"]},
            {"start": f"{day}T15:27:24", "step": 1.0},
            {"file": "a.nc", "variable": "t"},
            {"start": "2014-09-06T15:27:24", "step": 1e10},
            {"start": "2014-09-06T15:27:24", "step": 1.0, "offset": 1e10},
        ):
            with pytest.raises(InputError, match=r"no date and time|do not fit|cannot be decoded") as caught:
                self.times(file, **time)
            assert "cubes.0.time" in str(caught.value)


class TestPointing:
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_numbers_are_what_fits_means(self, file, sign):
        """CROTA2, and pixels that are not square or mirrored: as astropy's WCS of the same cards has it."""
        scale = [0.1 * sign, 0.3]
        pointing = {"reference_value": [880.0, -350.0], "reference_pixel": [2.0, 700.0], "scale": scale}
        pointing["rotation"] = 31.0
        scan = read_scans(file, describe(file.parent, statement(pointing=pointing)))[0]
        cards = {"CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN", "CUNIT1": "arcsec", "CUNIT2": "arcsec"}
        cards |= {"CRPIX1": 3.0, "CRPIX2": 701.0, "CRVAL1": 880.0, "CRVAL2": -350.0}
        cards |= {"CDELT1": 0.1 * sign, "CDELT2": 0.3, "CROTA2": 31.0}
        y, x = np.mgrid[:1000:250, :1500:300].astype(float)
        expected = WCS(cards).all_pix2world(x, y, 0)
        for found, degrees in zip(scan.frame.coordinates(x, y), expected, strict=True):
            np.testing.assert_allclose(
                found, (degrees + 180.0) % 360.0 * 3600.0 - 648000.0, rtol=0, atol=1e-6
            )

    def test_of_each_scan(self, file):
        pointing = {"reference_value": [[1.0, 2.0], [3.0, 4.0]], "scale": 0.1}
        scans = read_scans(file, describe(file.parent, statement(pointing=pointing)))
        assert [scan.frame.reference_value for scan in scans] == [(1.0, 2.0), (3.0, 4.0)]

    def test_of_the_header_whatever_the_axes(self, file, cube):
        """x is the file's third axis, y its second: the frame takes their cards, in this order."""
        angle = np.deg2rad(20.0)
        cards = {"CTYPE3": "HPLN-TAN", "CTYPE2": "HPLT-TAN", "CUNIT3": "arcsec", "CUNIT2": "arcsec"}
        cards |= {
            "CRPIX3": 2.0,
            "CRPIX2": 5.0,
            "CRVAL3": -200.0,
            "CRVAL2": 80.0,
            "CDELT3": 0.16,
            "CDELT2": 0.2,
        }
        cards |= {
            "PC3_3": np.cos(angle),
            "PC2_2": np.cos(angle),
            "PC3_2": -np.sin(angle),
            "PC2_3": np.sin(angle),
        }
        cards |= {"CTYPE1": "AWAV", "CUNIT1": "Angstrom", "CRPIX1": 1.0, "CRVAL1": IN_AIR[0], "CDELT1": 0.2}
        stored = np.transpose(cube[0, 0], (2, 1, 0))
        fits.PrimaryHDU(stored, fits.Header(cards)).writeto(file, overwrite=True)
        changes = {"axes": ["x", "y", "wavelength"], "stokes": None, "pointing": {"header": True}}
        time = {"values": ["2014-09-06T15:27:24"]}
        (scan,) = read_scans(file, describe(file.parent, statement(time=time, **changes)))
        np.testing.assert_array_equal(open_intensity(scan), cube[0, 0])
        y, x = np.mgrid[:6, :8].astype(float)
        with fits.open(file) as hdus:
            world = WCS(hdus[0].header).all_pix2world(np.zeros_like(x), y, x, 0)
        longitude, latitude = scan.frame.coordinates(x, y)
        np.testing.assert_allclose(
            longitude, (world[2] + 180.0) % 360.0 * 3600.0 - 648000.0, rtol=0, atol=1e-6
        )
        np.testing.assert_allclose(latitude, world[1] * 3600.0, rtol=0, atol=1e-6)
        # The same by a matrix of steps.
        places = [(row, column) for row in (2, 3) for column in (2, 3)]
        steps = {f"CD{i}_{j}": cards[f"CDELT{i}"] * cards[f"PC{i}_{j}"] for i, j in places}
        for card in [card for card in cards if card.startswith(("PC", "CDELT"))]:
            del cards[card]
        fits.PrimaryHDU(stored, fits.Header({**cards, **steps, "CD1_1": 0.2})).writeto(file, overwrite=True)
        (again,) = read_scans(file, describe(file.parent, statement(time=time, **changes)))
        np.testing.assert_allclose(again.frame.coordinates(x, y), (longitude, latitude), rtol=0, atol=1e-6)
        rewrite(file, lambda hdus: hdus[0].header.update({"LONPOLE": 90.0}))
        with pytest.raises(InputError, match="LONPOLE"):
            read_scans(file, describe(file.parent, statement(time=time, **changes)))
        rewrite(file, lambda hdus: hdus[0].header.update({"CTYPE3": "SOLARX", "CTYPE2": "SOLARY"}))
        with pytest.raises(InputError, match="no helioprojective coordinates"):
            read_scans(file, describe(file.parent, statement(time=time, **changes)))


class TestIntensities:
    def cube_of(self, file, **changes):
        scan = read_scans(file, describe(file.parent, statement(**changes)))[1]
        return scan, open_intensity(scan)

    def test_per_frequency(self, tmp_path):
        counts = np.random.default_rng(1).uniform(1, 3, tuple(SIZES.values()))
        path = tmp_path / "a.fits"
        fits.PrimaryHDU((counts * per_frequency("halpha")).astype(">f4")).writeto(path)
        scan, cube = self.cube_of(path, unit="W m-2 Hz-1 sr-1")
        assert scan.units == PER_ANGSTROM.to_string()
        assert scan.saturation == np.inf
        np.testing.assert_allclose(cube, 1e3 * counts[1, 0], rtol=1e-6)

    @pytest.mark.parametrize(("unit", "units"), [("continuum", PER_ANGSTROM.to_string()), ("", "")])
    def test_relative_to_the_continuum(self, tmp_path, unit, units):
        """1 in both lines is 2.8475e6 and 1.7361e6 (Neckel 1999), or 1 of something that nobody knows."""
        for line, axis in AXES.items():
            path = tmp_path / f"{line}.fits"
            ones = np.ones((2, axis.size, 6, 8), ">f4")
            fits.PrimaryHDU(ones, fits.Header({"BUNIT": "1"})).writeto(path)
            wavelength = {"values": axis.tolist(), "unit": "Angstrom", "medium": "vacuum"}
            changes = {"axes": ["time", "wavelength", "y", "x"], "stokes": None, "line": line}
            scan, found = self.cube_of(path, unit=unit, wavelength=wavelength, **changes)
            assert (scan.units, scan.units_of_file) == (units, unit)
            np.testing.assert_allclose(found, CONTINUUM[line] if units else 1.0, rtol=1e-6)

    def test_scaled_and_blank_integers(self, file, cube):
        cards = b"BSCALE  =                  0.5".ljust(80) + b"BZERO   =                 10.0".ljust(80)
        cards += f"BLANK   = {cube[1, 0, 2, 3, 4]:20d}".encode().ljust(80)
        raw = file.read_bytes()
        end = raw.index(b"END" + b" " * 77)
        file.write_bytes(raw[:end] + cards + raw[end : 2880 - len(cards)] + raw[2880:])
        scan, found = self.cube_of(file)
        expected = np.where(cube[1, 0] == cube[1, 0, 2, 3, 4], np.nan, 0.5 * cube[1, 0] + 10.0)
        np.testing.assert_array_equal(found, expected.astype(np.float32))
        assert scan.saturation == np.inf

    @pytest.mark.parametrize("compressed", [False, True])
    @pytest.mark.parametrize("kind", ["u2", "u4"])
    def test_unsigned_integers(self, tmp_path, cube, kind, compressed):
        """FITS writes them as signed ones with an offset."""
        path = tmp_path / "a.fits"
        numbers = cube.astype(kind) + 40_000
        image = fits.CompImageHDU(numbers) if compressed else fits.ImageHDU(numbers)
        fits.HDUList([fits.PrimaryHDU(), image]).writeto(path)
        scan, found = self.cube_of(path)
        np.testing.assert_array_equal(found, numbers[1, 0])
        assert scan.saturation == np.iinfo(kind).max

    def test_padding_and_saturation(self, file, cube):
        pad = int(cube[1, 0, 2, 3, 4])
        scan, found = self.cube_of(file, padding=pad, saturation=2500.0)
        np.testing.assert_array_equal(found, np.where(cube[1, 0] == pad, np.nan, cube[1, 0]))
        assert (scan.padding, scan.saturation) == ("nan", 2500.0)
        assert self.cube_of(file, padding="constant")[0].padding == "constant"

    @pytest.mark.parametrize("container", ["u2", "u4", "scaled", "packed", "float"])
    def test_padding_is_stated_in_the_unit_whatever_the_file_has(self, tmp_path, cube, container):
        """A pad of 300.2 DN, or of 0 in unsigned integers, which FITS has as -32768 or -2147483648."""
        path, pad = tmp_path / "a.cube", 0.0 if container.startswith("u") else 300.2
        numbers = np.where(cube % 7 == 0, pad, 10.0 * np.rint(cube / 10.0) + 0.2)
        inside = numbers[1, 0] != pad
        if container == "packed":
            dataset = xr.Dataset({"intensity": (tuple(SIZES), numbers)})
            dataset.intensity.encoding = {
                "scale_factor": 0.3,
                "add_offset": 0.1,
                "dtype": "i2",
                "_FillValue": -1,
            }
            dataset.to_netcdf(path, engine="scipy")
        elif container == "scaled":
            image = fits.PrimaryHDU(numbers.copy())
            image.scale("int16", bscale=0.3, bzero=0.1)
            image.writeto(path)
        else:
            kind = "f4" if container == "float" else container
            numbers = numbers.astype(kind)
            inside &= numbers[1, 0] != numbers.dtype.type(pad)
            fits.PrimaryHDU(numbers).writeto(path)
        _, found = self.cube_of(path, padding=pad, variable="intensity")
        np.testing.assert_array_equal(np.isfinite(found), inside)
        apart = 0.151 if container in ("packed", "scaled") else 0.0
        np.testing.assert_allclose(found[:][inside], numbers[1, 0][inside], rtol=0, atol=apart)

    def test_netcdf_scaled_as_cf_says(self, tmp_path, cube):
        path = tmp_path / "a.nc"
        numbers = cube.astype(float)
        numbers[1, 0, 2, 3, 4] = np.nan
        dataset = xr.Dataset({"intensity": (tuple(SIZES), numbers)})
        dataset.intensity.encoding = {"scale_factor": 0.5, "add_offset": 1.0, "_FillValue": -1, "dtype": "i2"}
        dataset.to_netcdf(path, engine="scipy")
        _, found = self.cube_of(path, variable="intensity")
        np.testing.assert_array_equal(found, numbers[1, 0])

    def test_cavity_map(self, file, tmp_path):
        errors = np.random.default_rng(4).normal(0.0, 0.05, (2, 6, 8))
        for held, kept in ((errors, errors), (errors[0], errors[[0, 0]])):
            rewrite(file, lambda hdus, held=held: fits.HDUList([hdus[0], fits.ImageHDU(held, name="CMAP")]))
            cavity = {"hdu": "CMAP", "unit": "nm", "factor": 0.1}
            for medium, index in (("air", 1.000276), ("vacuum", 1.0)):
                wavelength = {"values": WAVELENGTH_HALPHA.tolist(), "unit": "Angstrom", "medium": medium}
                description = describe(tmp_path, statement(cavity_map=cavity, wavelength=wavelength))
                for scan in read_scans(file, description):
                    assert scan.has_wavelength_shift
                    shift = open_wavelength_shift(scan)
                    np.testing.assert_allclose(shift, index * kept[scan.index], rtol=1e-5, atol=1e-8)
        rewrite(file, lambda hdus: hdus.__setitem__(1, fits.ImageHDU(errors[0].T, name="CMAP")))
        with pytest.raises(InputError, match="map does not fit"):
            read_scans(file, describe(tmp_path, statement(cavity_map=cavity)))

    def test_prefilter(self, file, cube, tmp_path):
        """Intensities of a flat spectrum through a filter 1 Angstrom off, divided by its closed form."""
        stated = statement(stokes=["I", "Q", "U", "V"])
        plain = [open_intensity(scan)[:] for scan in read_scans(file, describe(tmp_path, stated))]
        stated["prefilter"] = {
            "unit": "nm",
            "medium": "vacuum",
            "centre": 656.561,
            "width": 0.49,
            "slope": 0.01,
        }
        scans = read_scans(file, describe(tmp_path, stated))
        axis = np.array(scans[0].wavelength)

        def curve(wavelength):
            away = (2.0 * (wavelength - 6565.61) / 4.9) ** 4
            return (1.0 + 0.01 * (wavelength - 6564.61)) / (1.0 + away)

        expected = curve(axis) / curve(6564.61)
        assert expected.max() / expected.min() > 1.2
        for scan, before in zip(scans, plain, strict=True):
            found = open_intensity(scan)[:]
            np.testing.assert_allclose(found * expected[:, None, None], before, rtol=1e-5)
        stated["prefilter"] |= {"medium": "air", "centre": 656.561 / 1.000276}
        np.testing.assert_allclose(
            open_intensity(read_scans(file, describe(tmp_path, stated))[0])[:],
            open_intensity(scans[0])[:],
            rtol=1e-4,
        )
        for wrong, problem in (
            ({"width": -1.0}, "not a prefilter"),
            ({"slope": 1.0}, "lets no light through"),
        ):
            bad = statement(prefilter={**stated["prefilter"], **wrong})
            with pytest.raises(InputError, match=problem) as refusal:
                read_scans(file, describe(tmp_path, bad))
            assert "prefilter" in refusal.value.remedy

    def test_saturated_pixels_are_those_of_the_detector(self, file, cube, tmp_path):
        """Whatever a prefilter or a unit makes of numbers: 27 707 of 32 767 is sound, times 1.3 as well."""
        cube[:] = np.random.default_rng(5).integers(20_000, 27_708, cube.shape)
        cube[1, 0, 2, 3, 4] = cube[1, 0, 14, 0, 0] = 32767
        for numbers, offset in ((cube, 0), (cube.astype("u2") + 32768, 32768)):
            fits.PrimaryHDU(numbers).writeto(file, overwrite=True)
            filtered = {"unit": "Angstrom", "medium": "vacuum", "centre": 6565.9, "width": 4.9}
            for changes in (
                {},
                {"prefilter": filtered},
                {"prefilter": filtered, "padding": int(numbers[1, 0, 5, 5, 5])},
                {"unit": "1e-12 W m-2 Hz-1 sr-1"},
                {"saturation": 28_000 + offset, "prefilter": filtered},
            ):
                for index, scan in enumerate(read_scans(file, describe(tmp_path, statement(**changes)))):
                    found = open_intensity(scan)[:]
                    np.testing.assert_array_equal(found >= scan.saturation, cube[index, 0] == 32767)


IMAGES = {"axes": ["wavelength", "y", "x"], "stokes": None, "time": {"values": ["2014-09-06T15:27:24"]}}
PER_HERTZ = "W m-2 Hz-1 sr-1"
EVEN = {"CRVAL3": IN_AIR[0], "CRPIX3": 1.0, "CDELT3": 0.2}
AXIS = {"CTYPE3": "AWAV", "CUNIT3": "Angstrom", **EVEN}
SKY = {"CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN"}
ARCSEC = {"CUNIT1": "arcsec", "CUNIT2": "arcsec"}


IN_NM = fits.ImageHDU(IN_AIR / 10.0, fits.Header({"BUNIT": "nm"}), name="AXIS")
CAVITIES = fits.ImageHDU(np.zeros((6, 8)), fits.Header({"BUNIT": "Angstrom"}), name="CMAP")
MISNAMED = fits.BinTableHDU.from_columns([fits.Column("WAVE", "D", unit="nm", array=IN_AIR)], name="TABLE")
MINUTES = fits.BinTableHDU.from_columns([fits.Column("T", "D", unit="min", array=[927.4])], name="TIMES")
POINTING = {"reference_value": [-729.8, -313.4], "scale": 0.1}
PLACE = {**SKY, **ARCSEC, "CDELT1": 0.1, "CDELT2": 0.1}
PLACE |= {"CRPIX1": 4.5, "CRPIX2": 3.5, "CRVAL1": -729.8, "CRVAL2": -313.4}
TURNED = {"PC1_1": -0.76604, "PC2_2": -0.76604, "PC1_2": -0.64279, "PC2_1": 0.64279}  # by 140 degrees
SOLAR = {"CTYPE1": "SOLARX", "CTYPE2": "SOLAR_Y"}
UNNAMED = {"CTYPE1": "", "CTYPE2": ""}
DEGREES = {"CUNIT1": "deg", "CUNIT2": "deg", "CDELT1": 0.1 / 3600, "CDELT2": 0.1 / 3600}
DEGREES |= {"CRVAL1": 360.0 - 729.8 / 3600, "CRVAL2": -313.4 / 3600}


def from_header(medium):
    return {"wavelength": {"header": True, "unit": "Angstrom", "medium": medium}}


class TestContradictions:
    """What a file says and what is stated of it: refused where they differ, unless that is stated, too."""

    def check(self, path, changes, key, words, scans=1):
        stated = statement(**{**IMAGES, **changes})
        with pytest.raises(InputError, match=words) as caught:
            read_scans(path, describe(path.parent, stated))
        assert f"`cubes.0.{key}`" in caught.value.remedy
        assert "in the file" in caught.value.found
        part = key.partition(".")[0]
        assert f"overrides: [{part}]" in caught.value.remedy
        assert len(read_scans(path, describe(path.parent, {**stated, "overrides": [part]}))) == scans

    def fits(self, tmp_path, cube, cards):
        path = tmp_path / "a.fits"
        hdu = fits.PrimaryHDU(cube[0, 0].astype(">f4"))
        hdu.header.update(cards)
        hdu.writeto(path)
        return path

    def netcdf(self, tmp_path, cube, dims=("wavelength", "y", "x"), axis=None, **attributes):
        dataset = xr.Dataset({"intensity": (dims, cube[0, 0].astype("f4"), attributes)})
        if axis is not None:
            dataset["wavelength"] = ("wavelength", IN_AIR, axis)
        dataset.to_netcdf(tmp_path / "a.nc", engine="scipy")
        return tmp_path / "a.nc"

    @pytest.mark.parametrize(
        ("cards", "changes", "key", "words"),
        [
            ({"BUNIT": PER_HERTZ}, {"unit": "erg s-1 cm-2 sr-1 Angstrom-1"}, "unit", "another unit"),
            ({"BUNIT": PER_HERTZ}, {"unit": "DN"}, "unit", "another unit"),
            ({"BUNIT": PER_HERTZ}, {"unit": "kW m-2 Hz-1 sr-1"}, "unit", "another unit"),
            ({"BUNIT": "counts"}, {"unit": PER_HERTZ}, "unit", "another unit"),
            ({"CTYPE1": "HPLT-TAN", "CTYPE2": "HPLN-TAN"}, {}, "axes", "other axes"),
            ({"CTYPE1": "SOLAR-Y", "CTYPE2": "SOLAR-X"}, {}, "axes", "other axes"),
            ({"CTYPE3": "STOKES"}, {}, "axes", "other axes"),
            ({"CTYPE1": "WAVE"}, {}, "axes", "other axes"),
            ({"CDELT1": 0.057, "CDELT2": 0.057}, {}, "pointing.scale", "another size"),
            ({**ARCSEC, "CDELT1": 0.1, "CDELT2": 0.2}, {}, "pointing.scale", "another size"),
            ({**ARCSEC, "CDELT1": 0.2, "CDELT2": 0.2, "CTYPE3": "AWAV-TAB"}, {}, "pointing.scale", "size"),
            ({**SKY, "CD1_1": 0.57 / 3600, "CD2_2": 0.57 / 3600}, {}, "pointing.scale", "another size"),
            ({**SKY, **ARCSEC, "CDELT1": -0.1, "CDELT2": 0.1}, {}, "pointing.scale", "x runs the other way"),
            ({**SKY, "CDELT1": 0.1 / 3600, "CDELT2": -0.1 / 3600}, {}, "pointing.scale", "y runs the other"),
            ({**PLACE, "PC1_1": -1.0, "PC2_2": -1.0}, {}, "pointing.scale", "x runs the other way"),
            ({**PLACE, "CDELT1": -0.1, "CTYPE1": "SOLAR-X", "CTYPE2": ""}, {}, "pointing.scale", "x runs"),
            ({**PLACE, "CRVAL1": -715.0}, {}, "pointing.reference_value", "points elsewhere"),
            ({**PLACE, "CRPIX2": 203.5}, {}, "pointing.reference_value", "points elsewhere"),
            ({**PLACE, **DEGREES, "CRVAL2": 0.0}, {}, "pointing.reference_value", "points elsewhere"),
            ({**PLACE, "CROTA2": 45.0}, {}, "pointing.rotation", "turned otherwise"),
            ({**PLACE, **SOLAR, "CROTA2": 45.0}, {}, "pointing.rotation", "turned otherwise"),
            ({**PLACE, **TURNED}, {"pointing": {**POINTING, "rotation": 138}}, "pointing.rotation", "turned"),
            ({**AXIS, "CRVAL3": 8542.1}, {}, "wavelength", "the header has other wavelengths"),
            ({**AXIS, "CRVAL3": 854.21, "CDELT3": 0.02, "CUNIT3": "nm"}, {}, "wavelength", "has other wave"),
            ({**AXIS, "CRVAL3": IN_AIR[-1], "CDELT3": -0.2}, {}, "wavelength", "run the other way"),
            ({"WAVELNTH": 8542}, {}, "line", "another wavelength"),
            ({"WAVELNTH": "854.2", "WAVEUNIT": "nm"}, {}, "line", "another wavelength"),
            ({"WAVELNTH": 8.542e-7, "WAVEUNIT": 0}, {}, "line", "another wavelength"),
            ({"WAVELNTH": (617.33, "[nm] characteristic wavelength")}, {}, "line", "another wavelength"),
            ({"WAVELNTH": (0.8542, "[um]")}, {}, "line", "another wavelength"),
            ({"LINEWAV": 854.209}, {}, "line", "another wavelength"),
            ({"LINEWAV": 1430.0, "WAVEUNIT": -9}, {}, "line", "another wavelength"),
            ({"WAVELEN": "8542"}, {}, "line", "another wavelength"),
            ({"WAVE_LEN": 8542.1}, {}, "line", "another wavelength"),
            ({"WAVE": 854.2}, {}, "line", "another wavelength"),
            ({"WAVE": 6302.5}, {}, "line", "another wavelength"),
            ({"WAVE": 700.0, "WAVEUNIT": -9}, {}, "line", "another wavelength"),
            ({"WAVE": "Ca II 8542"}, {}, "line", "another line"),
            ({"WAVEBAND": "Ca II (854.21 nm)"}, {}, "line", "another line"),
            ({"TWAVE1": 8542.1}, {}, "line", "another wavelength"),
            ({"WAVEMIN": 853.0, "WAVEMAX": 855.0, "WAVEUNIT": -9}, {}, "line", "other wavelengths"),
            ({"WDESC1": "Ca II 8542"}, {}, "line", "another line"),
            ({"FILTER": "8542.1"}, {}, "line", "another line"),
            ({"DATE-BEG": "2013-09-06T15:27:20"}, {}, "time", "another date"),
            ({"DATE-OBS": "2014-09-08"}, {}, "time", "another date"),
            ({"CTYPE3": "WAVE"}, {}, "wavelength.medium", "in vacuum"),
            ({"CTYPE3": "WAVE-TAB"}, {}, "wavelength.medium", "in vacuum"),
            ({"BUNIT": "electron"}, {"unit": "DN"}, "unit", "another unit"),
            ({"WAVEREF": "vac"}, {}, "wavelength.medium", "in vacuum"),
            ({"AIRORVAC": "vac"}, {}, "wavelength.medium", "in vacuum"),
            ({"AIRORVAC": "AIR", **EVEN}, from_header("vacuum"), "wavelength.medium", "in air"),
            ({"WAVEREF": "Air", **EVEN}, from_header("vacuum"), "wavelength.medium", "in air"),
            ({"CTYPE3": "AWAV-GRA", **EVEN}, from_header("vacuum"), "wavelength.medium", "in air"),
            ({"CTYPE3": "WAVE-LOG", **EVEN}, from_header("vacuum"), "wavelength.header", "even steps"),
            ({"CTYPE3": "AWAV-GRA", **EVEN}, from_header("air"), "wavelength.header", "even steps"),
            ({"CTYPE3": "FREQ", **EVEN}, from_header("vacuum"), "wavelength.header", "even steps"),
            ({"PC3_1": 0.01, **EVEN}, from_header("air"), "wavelength.header", "depend on other axes"),
        ],
    )  # fmt: skip
    def test_of_fits(self, tmp_path, cube, cards, changes, key, words):
        self.check(self.fits(tmp_path, cube, cards), changes, key, words)

    @pytest.mark.parametrize(
        ("said", "changes", "key", "words"),
        [
            ({"units": PER_HERTZ}, {"unit": "DN"}, "unit", "another unit"),
            ({"units": "1"}, {"unit": PER_HERTZ}, "unit", "another unit"),
            ({"dims": ("wavelength", "x", "y")}, {}, "axes", "other axes"),
            ({"dims": ("wavelength", "halpha_x", "halpha_y")}, {}, "axes", "other axes"),
            (
                {"axis": {"standard_name": "radiation_wavelength_in_air"}},
                {"wavelength": {"variable": "wavelength", "unit": "Angstrom", "medium": "vacuum"}},
                "wavelength.medium",
                "in air",
            ),
            ({"axis": {"long_name": "wavelength (vacuum)"}}, {}, "wavelength.medium", "in vacuum"),
            ({"long_name": "intensity, Ca II 8542"}, {}, "line", "another line"),
            (
                {"axis": {"units": "nm"}},
                {"wavelength": {"variable": "wavelength", "unit": "Angstrom", "medium": "air"}},
                "wavelength.unit",
                "another unit",
            ),
        ],
    )
    def test_of_netcdf(self, tmp_path, cube, said, changes, key, words):
        self.check(self.netcdf(tmp_path, cube, **said), {"variable": "intensity", **changes}, key, words)

    @pytest.mark.parametrize(
        ("cards", "changes"),
        [
            ({"BUNIT": "erg/s/cm2/sr/Hz"}, {"unit": "1e-3 W m-2 Hz-1 sr-1"}),
            ({"BUNIT": "adu"}, {}),
            ({"BUNIT": "whatever"}, {}),
            ({**PLACE, "CTYPE3": "AWAV-TAB"}, {"pointing": {"header": True}}),
            ({"CDELT1": 0.1 / 3600, "CDELT2": 0.1 / 3600, **SKY}, {}),
            ({**PLACE, "CDELT2": -0.1}, {"pointing": {**POINTING, "scale": [0.1, -0.1]}}),
            ({**PLACE, "CDELT1": -0.1, "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN"}, {}),
            ({**PLACE, **TURNED}, {"pointing": {**POINTING, "rotation": 140.0}}),
            ({**PLACE, "CROTA2": 0.0}, {"pointing": {**POINTING, "rotation": 30.0}}),
            ({**PLACE, "CROTA2": 12.5}, {"pointing": {**POINTING, "rotation": 12.5}}),
            ({**PLACE, **SOLAR, "CROTA2": 12.5}, {"pointing": {**POINTING, "rotation": 12.5}}),
            ({**PLACE, **SOLAR, "CROTA2": 180.0}, {"pointing": {**POINTING, "rotation": 180.0}}),
            ({**PLACE, **UNNAMED, "CROTA2": -31.0}, {"pointing": {**POINTING, "rotation": -31.0}}),
            (AXIS, {}),
            ({**AXIS, "CDELT3": 0.1}, {}),
            ({**AXIS, "CRVAL3": 0.0, "CDELT3": "none"}, {}),
            ({**AXIS, "CRVAL3": 8542.1, "CUNIT3": "pixel"}, {}),
            ({"WAVEMIN": 655.5, "WAVEMAX": 657.0, "WAVEUNIT": -9}, {}),
            ({"WAVEMIN": 1, "WAVEMAX": 15}, {}),
            ({**PLACE, "CRPIX1": 54.5, "CRVAL1": -724.8}, {}),
            ({**PLACE, **DEGREES}, {}),
            ({**PLACE, "CRVAL1": 0.0, "CRVAL2": 0.0}, {}),
            ({**PLACE, "CRVAL1": -722.0}, {}),
            ({"CDELT1": 0.1, "CDELT2": 0.1, **SKY}, {}),
            ({"CDELT1": 100.0, "CDELT2": 100.0, "CUNIT1": "mas", "CUNIT2": "mas"}, {}),
            ({"CDELT1": 72.0, "CDELT2": 72.0, "CUNIT1": "km", "CUNIT2": "km"}, {}),
            ({"CDELT1": 1.0, "CDELT2": 1.0}, {}),
            ({"WAVELNTH": 6562.8, "WDESC1": "H I 6563", "FILTER": "broad, 6563 and 8542"}, {}),
            ({"WAVELNTH": 656.3}, {}),
            ({"WAVELNTH": 0.65646, "WAVEUNIT": "um"}, {}),
            ({"WAVELNTH": "H-alpha", "FILTER": 4}, {}),
            ({"WAVELNTH": (656.46, "[nm]"), "WAVE": (6562.8, "[A]"), "WAVE_LEN": "6562.8 and 6569.2"}, {}),
            ({"LINEWAV": 656.28, "WAVEUNIT": -9, "WAVEBAND": "H alpha (656.28 nm)", "WAVEREF": "Air"}, {}),
            ({"WAVELNTH": 0, "WAVE": True, "WAVELEN": 512, "WAVE_LEN": 1.5}, {}),
            ({"WAVE": (8542, "[furlong]"), "WAVELEN": (8542, "[s]"), "WAVEREF": "as ever"}, {}),
            ({"WAVE": 2000.0, "WAVELEN": "", "SPECLINE": "6563 of 2014", "EXTNAME": "18542"}, {}),
            ({"BUNIT": "Electron", "AIRORVAC": "air"}, {"unit": "electron"}),
            ({"DATE-OBS": "2014-09-06", "DATE-BEG": "06/09/14", "DATE": "2020-01-01T00:00:00"}, {}),
        ],
    )  # fmt: skip
    def test_the_same_in_other_words_or_nothing(self, tmp_path, cube, cards, changes):
        path = self.fits(tmp_path, cube, cards)
        assert len(read_scans(path, describe(tmp_path, statement(**{**IMAGES, **changes})))) == 1

    @pytest.mark.parametrize("card", ["CDELT1", "CDELT2", "CRPIX1", "CRPIX2", "CRVAL1", "CRVAL2"])
    def test_coordinates_that_are_missing(self, tmp_path, cube, card):
        path = self.fits(tmp_path, cube, {name: value for name, value in PLACE.items() if name != card})
        with pytest.raises(InputError, match="pointing is missing") as caught:
            read_scans(path, describe(tmp_path, statement(**IMAGES, pointing={"header": True})))
        assert f"no {card}" in str(caught.value)

    def test_a_matrix_says_the_size_of_pixels_too(self, tmp_path, cube):
        cards = {name: value for name, value in PLACE.items() if not name.startswith("CDELT")}
        path = self.fits(tmp_path, cube, {**cards, "CD1_2": -0.1, "CD2_1": 0.1})
        (scan,) = read_scans(path, describe(tmp_path, statement(**IMAGES, pointing={"header": True})))
        np.testing.assert_allclose(scan.frame.matrix, [[0.0, -0.1], [0.1, 0.0]], rtol=0, atol=1e-9)

    @pytest.mark.parametrize("card", ["CDELT1", "CRVAL1", "CRPIX2", "CROTA2", "PC1_2", "CD1_1"])
    def test_coordinates_that_are_written_as_text(self, tmp_path, cube, card):
        """They are not taken for one or zero, as astropy takes them; what is stated is not held to them."""
        path = self.fits(tmp_path, cube, {**PLACE, card: "12.5"})
        with pytest.raises(InputError, match="states no number") as caught:
            read_scans(path, describe(tmp_path, statement(**IMAGES, pointing={"header": True})))
        assert f"{card} = '12.5'" in str(caught.value)
        assert read_scans(path, describe(tmp_path, statement(**IMAGES, pointing=POINTING)))

    def test_a_frame_whose_latitude_is_not_the_second_axis(self, tmp_path, cube):
        """Then ``CROTA2`` is of no latitude, and turns nothing: astropy's WCS of the same cards says so."""
        path = tmp_path / "a.fits"
        stated = {**IMAGES, "axes": ["y", "x", "wavelength"]}
        for turned in (2, 3):
            cards = {f"{card[:-1]}{int(card[-1]) + 1}": value for card, value in PLACE.items()}
            cards[f"CROTA{turned}"] = 45.0
            hdu = fits.PrimaryHDU(np.moveaxis(cube[0, 0], 0, 2).astype(">f4"), fits.Header(cards))
            hdu.writeto(path, overwrite=True)
            matrix = WCS(hdu.header).celestial.pixel_scale_matrix * 3600
            assert (abs(matrix[0, 1]) > 0.05) == (turned == 3)
            (scan,) = read_scans(path, describe(tmp_path, statement(**stated, pointing={"header": True})))
            np.testing.assert_allclose(scan.frame.matrix, matrix, rtol=0, atol=1e-9)
            right = {**POINTING, "rotation": 45.0}
            assert read_scans(path, describe(tmp_path, statement(**stated, pointing=right)))
        self.check(path, stated, "pointing.rotation", "turned otherwise")

    @pytest.mark.parametrize(
        ("hdu", "changes", "key"),
        [
            (
                IN_NM,
                {"wavelength": {"hdu": "AXIS", "unit": "Angstrom", "medium": "air"}},
                "wavelength.unit",
            ),
            (
                MISNAMED,
                {"wavelength": {"hdu": "TABLE", "column": "WAVE", "unit": "Angstrom", "medium": "air"}},
                "wavelength.unit",
            ),
            (CAVITIES, {"cavity_map": {"hdu": "CMAP", "unit": "nm"}}, "cavity_map.unit"),
            (
                MINUTES,
                {"time": {"hdu": "TIMES", "column": "T", "since": "2014-09-06T00:00:00"}},
                "time.unit",
            ),
        ],
    )
    def test_units_of_other_hdus(self, tmp_path, cube, hdu, changes, key):
        path = self.fits(tmp_path, cube, {})
        rewrite(path, lambda hdus: hdus.append(hdu.copy()))
        with pytest.raises(InputError, match="what it refers to has another unit") as caught:
            read_scans(path, describe(tmp_path, statement(**{**IMAGES, **changes})))
        assert f"`cubes.0.{key}`" in caught.value.remedy
        part = key.partition(".")[0]
        changes[part] = {**changes[part], "unit": hdu.header.get("BUNIT", hdu.header.get("TUNIT1"))}
        if hdu.name == "TABLE":  # whose numbers are Angstrom
            changes["overrides"], changes[part]["unit"] = ["wavelength"], "Angstrom"
        assert len(read_scans(path, describe(tmp_path, statement(**{**IMAGES, **changes})))) == 1

    def test_times_of_netcdf(self, tmp_path, cube):
        """Its own times, 15:27:24 and 11.5 s later, against those that are stated."""
        dims = ("time", "wavelength", "y", "x")
        dataset = xr.Dataset({"intensity": (dims, cube[:, 0].astype("f4"))})
        dataset["time"] = ("time", 55644.0 + 11.5 * np.arange(2), {"units": "seconds since 2014-09-06"})
        dataset.to_netcdf(tmp_path / "a.nc", engine="scipy")
        changes = {"variable": "intensity", "axes": list(dims), "stokes": None}
        for start in ("2014-09-06T15:27:24", "2014-09-06T15:28:00"):
            stated = statement(**changes, time={"start": start, "step": 11.5})
            assert len(read_scans(tmp_path / "a.nc", describe(tmp_path, stated))) == 2
        for start in ("2014-09-06T17:27:24", "2014-09-05T15:27:24"):
            time = {"start": start, "step": 11.5}
            self.check(tmp_path / "a.nc", {**changes, "time": time}, "time", "other times", scans=2)
        dataset["time"].attrs["units"] = "moons since the flood"
        dataset.to_netcdf(tmp_path / "b.nc", engine="scipy")
        assert len(read_scans(tmp_path / "b.nc", describe(tmp_path, stated))) == 2

    @pytest.mark.parametrize(("unit", "step"), [("arcsec", 0.1), ("degrees", 0.1 / 3600), ("Mm", 0.07)])
    def test_coordinates_of_netcdf(self, tmp_path, cube, unit, step):
        """Coordinates 0.1 arcsec apart agree with what is stated, ones five times that do not."""
        for factor in (1.0, 5.0):
            dataset = xr.Dataset({"intensity": (("wavelength", "y", "x"), cube[0, 0].astype("f4"))})
            dataset["x"] = ("x", 880.0 + factor * step * np.arange(8.0), {"units": unit})
            path = tmp_path / f"{factor}.nc"
            dataset.to_netcdf(path, engine="scipy")
            changes = {"variable": "intensity"}
            if factor == 1.0 or unit == "Mm":
                assert read_scans(path, describe(tmp_path, statement(**IMAGES, **changes)))
            else:
                self.check(path, changes, "pointing.scale", "another size")
        if unit != "Mm":
            path = tmp_path / "mirrored.nc"
            mirrored = dataset.assign_coords(x=("x", 880.0 - step * np.arange(8.0), {"units": unit}))
            mirrored.to_netcdf(path, engine="scipy")
            self.check(path, changes, "pointing.scale", "x runs the other way")

    def test_scale_of_the_wavelengths_matrix(self, tmp_path, cube):
        """As astropy's WCS has it."""
        matrix = {"CTYPE3": "AWAV", "CUNIT3": "Angstrom", **EVEN, "CDELT3": 0.1, "PC3_3": 2.0}
        cd = {"CTYPE3": "AWAV", "CUNIT3": "Angstrom", "CD3_3": 0.2, "CD1_1": 1.0, "CD2_2": 1.0, **EVEN}
        del cd["CDELT3"]
        for cards in (matrix, cd):
            path = self.fits(tmp_path, cube, cards)
            (scan,) = read_scans(path, describe(tmp_path, statement(**{**IMAGES, **from_header("air")})))
            with fits.open(path) as hdus:
                expected = WCS(hdus[0].header).sub([3]).wcs_pix2world(np.arange(15), 0)[0] * 1e10
            np.testing.assert_allclose(vacuum_to_air(scan.wavelength), expected, rtol=0, atol=1e-6)
            path.unlink()


def several(tmp_path):
    """Files of 8 MB each, of which a hundredth is looked at."""
    cube = np.random.default_rng(1).integers(1, 255, (4, 1, 15, 200, 300)).astype("<i2")
    fits.PrimaryHDU(cube.astype(">i2")).writeto(tmp_path / "plain.fits")
    packed = fits.CompImageHDU(cube, compression_type="RICE_1", tile_shape=(1, 1, 1, 50, 50))
    fits.HDUList([fits.PrimaryHDU(), packed]).writeto(tmp_path / "packed.fits")
    dataset = xr.Dataset({"intensity": (tuple(SIZES), cube)})
    dataset.to_netcdf(tmp_path / "three.nc", engine="scipy")
    encoding = {"intensity": {"chunksizes": (1, 1, 1, 50, 50), "zlib": True}}
    dataset.to_netcdf(tmp_path / "four.nc", engine="h5netcdf", encoding=encoding)
    return cube


def test_only_what_is_indexed_is_in_memory(tmp_path):
    cube = several(tmp_path)
    description = describe(tmp_path, statement(stokes=["I"], variable="intensity"))
    for name in ("plain.fits", "packed.fits", "three.nc", "four.nc"):
        read_scans(tmp_path / name, description)  # what is imported on the way is not counted
        tracemalloc.start()
        found = open_intensity(read_scans(tmp_path / name, description)[2])[:, 50:90, 100:140]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_array_equal(found, cube[2, 0, :, 50:90, 100:140])
        assert peak < cube.nbytes / 4, name


def test_several_cubes_in_one_file_and_other_formats_beside(tmp_path, cube):
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / "both.fits"
    other = fits.ImageHDU(cube + 5, name="OTHER")
    fits.HDUList([fits.PrimaryHDU(cube), other]).writeto(path)
    FORMATS["fchroma"][0](tmp_path / "files", known_series())
    first = statement(files="both*", hdu=0)
    second = statement(files="both*", hdu="OTHER", time={"start": "2014-09-06T16:00:00", "step": 1.0})
    third = statement(files="*.nothing")
    scans, _ = find_scans([tmp_path / "files"], description=describe(tmp_path, first, second, third))
    described = [scan for scan in scans if scan.format == "generic"]
    assert len(scans) == 4 + len(described) == 8
    assert [scan.index for scan in described] == [0, 1, 2, 3]
    for scan in described:
        expected = cube[scan.index % 2, 0] + 5 * (scan.index // 2)
        np.testing.assert_array_equal(open_intensity(scan), expected)


@pytest.mark.parametrize("kind", ["fits", "netcdf", "netcdf, spelled otherwise"])
def test_no_array_is_of_two_lines(tmp_path, cube, kind):
    """With `files` left out each cube is looked for in every file."""
    stated = {line: statement(line=line, variable="intensity") for line in AXES}
    if kind.endswith("otherwise"):
        stated["ca8542"]["variable"] = "/intensity"
    for line, axis in AXES.items():
        stated[line]["wavelength"] = {"values": axis[:15].tolist(), "unit": "Angstrom", "medium": "vacuum"}
        if kind == "fits":
            fits.PrimaryHDU(cube).writeto(tmp_path / line)
        else:
            xr.Dataset({"intensity": (tuple(SIZES), cube)}).to_netcdf(tmp_path / line, engine="h5netcdf")
    description = describe(tmp_path, *stated.values())
    for line in AXES:
        with pytest.raises(InputError, match="two cubes of the description take the same array") as caught:
            read_scans(tmp_path / line, description)
        assert "by cubes.0 (halpha) and cubes.1 (ca8542)" in caught.value.found
        assert "`cubes.1.files`" in caught.value.remedy
    description = describe(tmp_path, *({**stated[line], "files": f"{line}*"} for line in AXES))
    for line in AXES:
        assert [scan.line for scan in read_scans(tmp_path / line, description)] == [line] * 2


def test_a_description_of_other_files(file, tmp_path):
    description = describe(tmp_path, statement(files="*.nothing"))
    with pytest.raises(InputError, match="no format that is known") as caught:
        find_scans([file], description=description)
    assert "not described: its name is none that the description has" in str(caught.value)
    assert "not fchroma: a FITS file of another instrument" in str(caught.value)
    with pytest.raises(InputError, match="description cannot be read"):
        find_scans([file], description=tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="cubes: there is none"):
        find_scans([file], description=describe(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes": ["time", "wavelength", "y", "x"], "stokes": None}, "other axes"),
        ({"axes": ["time", "stokes", "wavelength", "y"]}, "axes"),
        ({"axes": ["time", "time", "wavelength", "y", "x"]}, "axes"),
        ({"axes": ["time", "stokes", "lambda", "y", "x"]}, "axes.2"),
        ({"stokes": None}, "Stokes parameters are not stated"),
        ({"stokes": ["I", "Q"]}, "do not fit"),
        ({"stokes": ["Q", "Q", "U", "V"]}, "do not fit"),
        ({"hdu": "CUBE"}, "no such HDU"),
        ({"hdu": 4}, "no such HDU"),
        ({"line": "sodium"}, "line"),
        ({"wavelength": None}, "wavelength: missing"),
        ({"wavelength": {"hdu": 0, "unit": "nm", "medium": "air"}}, "other axes|do not fit|wavelengths"),
        ({"wavelength": {"column": "A", "unit": "nm", "medium": "air"}}, "HDU is not named"),
        ({"cubes": []}, "cubes: unknown key"),
    ],
)
def test_descriptions_that_do_not_fit(file, tmp_path, changes, words):
    description = describe(tmp_path, statement(**changes))
    with pytest.raises(InputError, match=words) as caught:
        read_scans(file, description)
    assert "description" in str(caught.value) or "cube.fits" in str(caught.value)
    assert caught.value.remedy


def test_files_that_are_none(tmp_path):
    description = describe(tmp_path, statement())
    for content in (b"", b"GIF89a"):
        (tmp_path / "a.fits").write_bytes(content)
        with pytest.raises(OtherKindError, match="neither a FITS nor a NetCDF"):
            read_scans(tmp_path / "a.fits", description)
    with pytest.raises(InputError, match="cannot be read"):
        read_scans(tmp_path / "nowhere.fits", description)
    with pytest.raises(InputError, match="description cannot be read"):
        read_scans(tmp_path / "a.fits", tmp_path / "nowhere.yaml")
    table = fits.BinTableHDU.from_columns([fits.Column("A", "D", array=IN_AIR)])
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(tmp_path / "b.fits")
    with pytest.raises(InputError, match="holds no cube"):
        read_scans(tmp_path / "b.fits", description)
    xr.Dataset({"text": ("n", ["a", "b"])}).to_netcdf(tmp_path / "c.nc", engine="h5netcdf")
    with pytest.raises(InputError, match="variable is not named"):
        read_scans(tmp_path / "c.nc", description)
    with pytest.raises(InputError, match="no such variable"):
        read_scans(tmp_path / "c.nc", describe(tmp_path, statement(variable="intensity")))
    with pytest.raises(InputError, match="other axes"):
        read_scans(tmp_path / "c.nc", describe(tmp_path, statement(variable="text")))


def test_a_compressed_image_read_by_two_threads_leaves_the_warnings_as_they_are(tmp_path, cube):
    path = tmp_path / "cube.fits"
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(cube)]).writeto(path)
    image = generic.CompressedImage(path, 1, cube.shape, cube.dtype)
    before = list(warnings.filters)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(2) as threads:
            for block in threads.map(image.__getitem__, [(0, 0, 0)] * 40):
                np.testing.assert_array_equal(block, cube[0, 0, 0])
    finally:
        sys.setswitchinterval(interval)
    assert warnings.filters == before


def test_a_compressed_image_larger_than_its_tiles(tmp_path, cube):
    """ZNAXIS5 of two becomes two billion: no memory is taken for what is not there."""
    path = tmp_path / "a.fits"
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(cube)]).writeto(path)
    content = path.read_bytes()
    card = content.index(b"ZNAXIS5 ")
    wrong = content[:card] + b"ZNAXIS5 =           2000000000".ljust(80) + content[card + 80 :]
    path.write_bytes(wrong)
    with pytest.raises(InputError, match="compressed image is damaged") as caught:
        read_scans(path, describe(tmp_path, statement()))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [b"(2014, 9, 6", b"= =", b"'2014\x00'", b"\x01", b"T F"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_card_that_cannot_be_read(tmp_path, cube, value, compressed):
    """It says what FITS has no words for."""
    path, header = tmp_path / "a.fits", fits.Header({"DATE-AVG": "2014-09-06T15:27:24"})
    image = (fits.CompImageHDU if compressed else fits.ImageHDU)(cube[0, 0], header)
    fits.HDUList([fits.PrimaryHDU(), image]).writeto(path)
    content = path.read_bytes()
    card = content.index(b"DATE-AVG=")
    path.write_bytes(content[:card] + (b"DATE-AVG= " + value).ljust(80) + content[card + 80 :])
    with pytest.raises(InputError, match=r"a\.fits") as caught:
        read_scans(path, describe(tmp_path, statement(**{**IMAGES, "time": {"key": "DATE-AVG"}})))
    assert caught.value.found


def test_netcdf4_without_its_library(tmp_path, monkeypatch, cube):
    path = tmp_path / "a.nc"
    xr.Dataset({"intensity": (tuple(SIZES), cube)}).to_netcdf(path, engine="h5netcdf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MisuseError, match=r"need h5netcdf") as caught:
        read_scans(path, describe(tmp_path, statement(variable="intensity")))
    assert "flarefield[netcdf]" in str(caught.value)


def test_changed_after_it_was_described(file, cube, tmp_path):
    description = describe(tmp_path, statement())
    scan = read_scans(file, description)[1]
    fits.PrimaryHDU(cube[..., 1:]).writeto(file, overwrite=True)
    with pytest.raises(InputError, match="has changed"):
        open_intensity(scan)
    fits.PrimaryHDU(cube[:1]).writeto(file, overwrite=True)
    with pytest.raises(InputError, match="has changed"):
        open_intensity(scan)


def test_netcdf3_round_trip_and_headers(tmp_path):
    """DKIST's example in NetCDF-3, which needs nothing that is not there anyway."""
    series = known_series()
    lines = {
        line: (
            np.stack([(series.noisy[line] * 1e-3).astype("f4")] * 4),
            vacuum_to_air(axis),
            START + np.arange(2) * np.timedelta64(11, "s"),
        )
        for line, axis in AXES.items()
    }
    path = write_dkist(tmp_path / "dkist.nc", lines, engine="scipy")
    scans = read_scans(path, described(tmp_path, "dkist.yaml")["description"])
    assert len(scans) == 4
    for scan in scans:
        expected = lines[scan.line][0][0, scan.index % 2] * CONTINUUM[scan.line]
        np.testing.assert_allclose(open_intensity(scan), expected, rtol=1e-6)
    assert "halpha_wavelength" in read_headers(scans[0])[0]


def test_command_line(tmp_path):
    """A description is a source as the files are: kept, hashed, and asked for again."""
    files = tmp_path / "files"
    files.mkdir()
    description = in_ibis(files, known_series(), compressed=True)["description"]
    text = description.read_text().replace("hdu: 0", "hdu: 1")
    description.write_text(text)
    runner = CliRunner()
    arguments = ["--generic", str(description), str(files)]
    result = runner.invoke(app, ["inspect", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    ingest([files], tmp_path / "obs.zarr", call="", description=description)
    dataset = open_observation(tmp_path / "obs.zarr")
    paths = [description, *files.glob("*.fits")]
    assert dataset.attrs["made_from"] == {str(path): sha256_file(path) for path in paths}
    assert dataset.halpha.attrs["headers"][0].endswith(f"{text}\nEND\n")
    assert len(fits_headers(dataset, "halpha", 0)) == 3
    result = runner.invoke(app, ["ingest", *arguments, str(tmp_path / "obs.zarr")], catch_exceptions=False)
    assert result.exit_code == 0, result.output


# h5netcdf's, and xarray's, on the way to the error
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::UserWarning")
@fuzzed(160)
@given(data=st.data())
def test_damage_gives_typed_errors_only(tmp_path, cube, data):
    """Bytes changed or cut in headers, tiles, descriptions: scans of the true shape, or an `InputError`."""
    packings = ["RICE_1", "GZIP_2", "HCOMPRESS_1"]
    kind = data.draw(st.sampled_from(["fits", *packings, "scipy", "h5netcdf", "description"]))
    path = tmp_path / "a.cube"
    path.unlink(missing_ok=True)
    if kind in ("scipy", "h5netcdf"):
        xr.Dataset({"intensity": (tuple(SIZES), cube.astype("i2"))}).to_netcdf(path, engine=kind)
    elif kind in packings:
        image = fits.CompImageHDU(cube, compression_type=kind, tile_shape=(1, 1, 1, 6, 8))
        fits.HDUList([fits.PrimaryHDU(), image]).writeto(path)
    else:
        fits.PrimaryHDU(cube).writeto(path)
    description = describe(tmp_path, statement(variable="intensity"))
    damaged = description if kind == "description" else path
    content = bytearray(damaged.read_bytes())
    # In NetCDF-4 most of what precedes the numbers is HDF5's own, which it checks as it pleases.
    first, last = (2880, len(content)) if kind in packings else (0, min(len(content), 2880))
    for _ in range(data.draw(st.integers(1, 4), label="changes")):
        content[data.draw(st.integers(first, last - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content))) :]
    damaged.write_bytes(content)
    try:
        opened = [(scan, open_intensity(scan)[:, :2, 0]) for scan in read_scans(path, description)]
    except InputError as error:
        message, opened = str(error), []
    else:
        message = str(tmp_path)
    assert str(tmp_path) in message
    for scan, intensity in opened:
        assert intensity.shape == (len(scan.wavelength), min(2, scan.shape[0]))


@fuzzed(60)
@given(data=st.data())
def test_any_statement_is_taken_or_refused(tmp_path, file, data):
    """Keys replaced by anything YAML can say: a typed error that names the file, or sound scans."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
        max_leaves=4,
    )
    stated = statement()
    place = data.draw(st.sampled_from(["", "wavelength", "time", "pointing"]))
    part = stated[place] if place else stated
    keys = {
        "": [
            "axes",
            "stokes",
            "line",
            "unit",
            "padding",
            "saturation",
            "hdu",
            "files",
            "cavity_map",
            "prefilter",
        ],
        "wavelength": ["values", "start", "step", "header", "file", "hdu", "line_centre", "unit", "medium"],
        "time": ["values", "start", "step", "key", "file", "since", "date", "offset", "duration", "scale"],
        "pointing": ["reference_value", "reference_pixel", "scale", "rotation", "header"],
    }[place]
    part[data.draw(st.sampled_from(keys))] = data.draw(anything)
    description = tmp_path / "description.yaml"
    description.write_text(yaml.safe_dump({"cubes": [stated]}), encoding="utf-8")
    try:
        scans = read_scans(file, description)
    except InputError as error:
        message, scans = str(error), ()
    else:
        message = str(tmp_path)
    assert str(tmp_path) in message
    for scan in scans:
        assert open_intensity(scan).shape == (15, *scan.shape)


def test_a_sparse_file_larger_than_memory(tmp_path):
    """24 GB of FITS: nothing but what is indexed is touched."""
    header = fits.Header([("SIMPLE", True), ("BITPIX", 16), ("NAXIS", 4)])
    for number, size in enumerate((10_000, 8_000, 15, 10), start=1):
        header[f"NAXIS{number}"] = size
    path = tmp_path / "large.fits"
    path.write_bytes(header.tostring().encode())
    os.truncate(path, 2880 + -(-2 * 10_000 * 8_000 * 150 // 2880) * 2880)
    changes = {"axes": ["time", "wavelength", "y", "x"], "stokes": None}
    scan = read_scans(path, describe(tmp_path, statement(**changes)))[7]
    assert (open_intensity(scan)[:, 7_000:7_002, 9_000:9_003] == 0).all()
