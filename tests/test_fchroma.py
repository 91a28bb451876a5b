"""The F-CHROMA reader and writer: layout, times, pointing, and every way in which a file can be unusable."""

from __future__ import annotations

import mmap
import os
import pickle
import warnings
from pathlib import Path

import astropy.units as u
import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.crisp import ForeignFileError, find_scans, open_intensity, read_headers, read_scans
from pipeline.crisp.fchroma import file_name, write_fchroma
from pipeline.crisp.headers import header_contradictions
from pipeline.crisp.scan import OtherLineError
from pipeline.crisp.wavelengths import vacuum_to_air
from pipeline.errors import InputError, MisuseError
from pipeline.inspect import inspect
from tests.fchroma_files import PAD, START, WAVELENGTH_CA8542, WAVELENGTH_HALPHA, write_pair

REAL = Path(__file__).parents[2] / "shared" / "data" / "crisp"
needs_real_pair = [
    pytest.mark.observation,
    pytest.mark.skipif(not REAL.is_dir(), reason="the real pair is not here"),
]


@pytest.fixture
def cube():
    return np.random.default_rng(1).integers(800, 6000, (WAVELENGTH_HALPHA.size, 9, 13))


@pytest.fixture
def file(tmp_path, cube):
    return write_fchroma(tmp_path / "no name of the database.fits", cube, WAVELENGTH_HALPHA, START)


def rewrite(path, change):
    """Let `change` alter the file's HDU list."""
    with fits.open(path, memmap=False) as hdus:
        hdus = fits.HDUList([hdu.copy() for hdu in hdus])
    change(hdus)
    hdus.writeto(path, overwrite=True)
    return path


def test_round_trip(file, cube):
    (scan,) = read_scans(file)
    assert scan.line == "halpha"
    assert scan.time == START
    assert scan.shape == cube.shape[1:]
    assert scan.units == "DN"
    assert u.Unit(scan.units) == u.DN
    assert scan.saturation == 32767
    np.testing.assert_array_equal(scan.wavelength, WAVELENGTH_HALPHA)
    np.testing.assert_array_equal(open_intensity(scan), cube)
    assert pickle.loads(pickle.dumps(scan)) == scan


def test_intensities_are_mapped_not_read(file):
    owner = open_intensity(read_scans(file)[0])
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert isinstance(owner, mmap.mmap)


def test_scaled_integers_are_unscaled(file, cube):
    raw = file.read_bytes()
    scaled = raw.replace(b"SOLARNET=                  0.5", b"BSCALE  =                  0.5")
    assert scaled != raw
    file.write_bytes(scaled)
    (scan,) = read_scans(file)
    np.testing.assert_array_equal(open_intensity(scan), cube * 0.5)
    # They span what the file holds: the brightest is no limit of the detector.
    assert scan.saturation == np.inf


@pytest.mark.parametrize(("zero", "kind"), [(32768, ">u2"), (0, ">i2")])
def test_unscaled_integers_are_saturated_at_their_largest(file, cube, zero, kind):
    with fits.open(file, mode="update", do_not_scale_image_data=True) as hdus:
        if zero:
            hdus[0].header["BZERO"] = zero
    (scan,) = read_scans(file)
    assert scan.saturation == np.iinfo(kind).max
    np.testing.assert_array_equal(open_intensity(scan)[:], cube + zero)


@pytest.mark.parametrize("kind", ["i1", "u2", "i4", "u4", "i8"])
def test_integers_of_any_size_are_those_that_astropy_wrote(file, cube, kind):
    """Unsigned ones it writes as signed ones with BZERO, i1 as unsigned ones."""
    numbers = (cube % 100 if kind == "i1" else cube).astype(kind)
    rewrite(file, lambda hdus: setattr(hdus[0], "data", numbers))
    assert ("BZERO" in fits.getheader(file)) == (kind in ("i1", "u2", "u4"))
    (scan,) = read_scans(file)
    np.testing.assert_array_equal(open_intensity(scan)[:], numbers)
    assert scan.saturation == float(np.iinfo(kind).max)


def test_unsigned_integers_of_64_bits_are_refused_for_what_they_are(file, cube):
    rewrite(file, lambda hdus: setattr(hdus[0], "data", cube.astype("u8")))
    with pytest.raises(InputError, match="double precision cannot undo") as caught:
        read_scans(file)
    assert "9223372036854775808: unsigned integers" in caught.value.found


@pytest.mark.parametrize("card", ["BSCALE", "BZERO", "NWIN"])
@pytest.mark.parametrize("value", ["x", "6563 A", True])
def test_cards_that_are_no_numbers_are_named(file, card, value):
    content = bytearray(file.read_bytes())
    place = content.index(b"SOLARNET=") if card != "NWIN" else content.index(b"NWIN    =")
    text = fits.Card(card, value).image
    content[place : place + 80] = text.encode("ascii")
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{card} = ") as caught:
        read_scans(file)
    assert str(file) in str(caught.value)
    assert caught.value.expected == f"{card} = a number"


def test_headers_are_whole(file):
    headers = read_headers(read_scans(file)[0])
    with fits.open(file) as hdus:
        assert len(headers) == len(hdus) == 2
        for text, hdu in zip(headers, hdus, strict=True):
            restored = fits.Header.fromstring(text, sep="\n")
            assert [card.image for card in restored.cards] == [card.image for card in hdu.header.cards]


def test_coordinates_agree_with_astropy_wcs(tmp_path, cube):
    angle = np.deg2rad(31.0)
    rotation = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    path = write_fchroma(
        tmp_path / "rotated.fits",
        cube,
        WAVELENGTH_HALPHA,
        START,
        pointing=(880.0, -350.0),
        reference_pixel=(2.5, 700.0),
        rotation=rotation,
    )
    (scan,) = read_scans(path)
    y, x = np.mgrid[:1470:210, :1930:193].astype(float)
    longitude, latitude = scan.frame.coordinates(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wcs = WCS(fits.getheader(path))
    first, second, _ = wcs.all_pix2world(x, y, np.zeros_like(x), 0)
    first = (first + 180.0) % 360.0 - 180.0
    np.testing.assert_allclose(longitude, first * 3600.0, rtol=0, atol=1e-6)
    np.testing.assert_allclose(latitude, second * 3600.0, rtol=0, atol=1e-6)
    np.testing.assert_allclose(scan.frame.pixels(longitude, latitude), (x, y), rtol=0, atol=1e-6)
    # and by hand, near the disc's centre of the tangent plane: rotation, then scale
    centre = np.array(scan.frame.coordinates(np.array([2.5 + 100.0]), np.array([700.0])))[:, 0]
    step = 100 * 0.057 * np.array([np.cos(angle), np.sin(angle)])
    np.testing.assert_allclose(centre, np.array([880.0, -350.0]) + step, atol=1e-3)


def separation(arcsec, degrees):
    """Arcsec between two sets of helioprojective coordinates, by astropy."""
    one = SkyCoord(*np.asarray(arcsec) / 3600.0, unit="deg")
    return one.separation(SkyCoord(*degrees, unit="deg")).arcsec


@pytest.mark.filterwarnings("ignore::astropy.wcs.FITSFixedWarning")
@pytest.mark.parametrize("handed", [1.0, -1.0])
def test_a_matrix_of_steps_is_the_same_as_pc_and_steps(file, handed):
    """CD1_1 and so on, as many instruments write them."""
    angle, x, y = np.deg2rad(31.0), np.arange(9.0), np.arange(9.0)[::-1]
    matrix = 0.057 * np.array([[handed * np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    def change(hdus):
        header = hdus[0].header
        for card in ("PC1_1", "PC2_2", "PC3_3", "CDELT1", "CDELT2", "CDELT3"):
            del header[card]
        for (row, column), value in np.ndenumerate(matrix):
            header[f"CD{row + 1}_{column + 1}"] = value
        header["CD3_3"] = 0.2

    rewrite(file, change)
    (scan,) = read_scans(file)
    assert np.abs(scan.frame.scale) == pytest.approx((0.057, 0.057), rel=1e-9)
    np.testing.assert_allclose(scan.frame.matrix, matrix, rtol=0, atol=1e-12)
    sky = WCS(fits.getheader(file)).all_pix2world(x, y, 0.0 * x, 0)[:2]
    assert separation(scan.frame.coordinates(x, y), sky).max() < 1e-6
    assert header_contradictions(scan) == ()


@pytest.mark.filterwarnings("ignore::astropy.wcs.FITSFixedWarning")
@pytest.mark.parametrize(
    "cards", [{"LONPOLE": 170.0}, {"PV1_1": 10.0, "PV1_2": 80.0}, {"PV1_1": 0.0, "PV1_2": 89.0}]
)
def test_other_poles_are_refused_where_they_matter(file, cards):
    rewrite(file, lambda hdus: hdus[0].header.update(cards))
    y, x = np.array([[0.0, 8.0], [0.0, 12.0]])
    plain = np.array([-729.826 + 0.057 * (x - 6.0), -313.432 + 0.057 * (y - 4.0)])
    sky = WCS(fits.getheader(file)).all_pix2world(x, y, 0.0 * x, 0)[:2]
    try:
        (scan,) = read_scans(file)
    except InputError as error:
        assert separation(plain, sky).max() > 0.049
        assert str(file) in str(error)  # noqa: PT017
        assert "LONPOLE" in str(error)  # noqa: PT017
    else:
        assert separation(plain, sky).max() < 0.051
        assert separation(scan.frame.coordinates(x, y), sky).max() < 0.051


def test_time_of_day_beside_the_date(file):
    rewrite(file, lambda hdus: hdus[0].header.update({"DATE-AVG": "2014-09-06", "TIME-AVG": "15:27:24.25"}))
    (scan,) = read_scans(file)
    assert scan.time == np.datetime64("2014-09-06T15:27:24.25")
    assert header_contradictions(scan) == ()


def test_time_scale_is_honoured(file):
    rewrite(file, lambda hdus: hdus[0].header.set("TIMESYS", "TAI"))
    # TAI was 35 s ahead of UTC in September 2014
    assert START - read_scans(file)[0].time == np.timedelta64(35, "s")


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda h: h[0].header.set("INSTRUME", "IBIS"), ForeignFileError, "another instrument"),
        (lambda h: h[0].header.remove("INSTRUME"), ForeignFileError, "another instrument"),
        (lambda h: setattr(h[0], "data", h[0].data[None, None]), ForeignFileError, "another layout"),
        (lambda h: setattr(h[1], "data", h[1].data - 263.0), OtherLineError, "another line"),
        (lambda h: h.pop(1), InputError, "wavelength axis is missing"),
        (lambda h: setattr(h[1], "data", h[1].data[:-1]), InputError, "does not fit"),
        (lambda h: setattr(h[1], "data", h[1].data[::-1].copy()), InputError, "increase"),
        (lambda h: setattr(h[1], "data", h[1].data * np.nan), InputError, "finite|another line"),
        (lambda h: h[0].header.remove("DATE-AVG"), InputError, "time is missing"),
        (lambda h: h[0].header.set("DATE-AVG", "yesterday"), InputError, "time cannot be read"),
        (lambda h: h[0].header.set("TIMESYS", "MARS"), InputError, "time cannot be read"),
        (lambda h: h[0].header.set("DATE-AVG", "2014-09-06"), InputError, "date without a time of day"),
        (lambda h: h[0].header.set("DATE-AVG", "0014-09-06T15:27:24"), InputError, "time cannot be read"),
        (lambda h: h[0].header.set("DATE-AVG", "2914-09-06T15:27:24"), InputError, "time cannot be read"),
        (lambda h: h[0].header.remove("CRVAL1"), InputError, "pointing is missing"),
        (lambda h: h[0].header.set("PC1_2", "-0.5"), InputError, "states no number"),
        (lambda h: h[0].header.set("CROTA2", "30"), InputError, "states no number"),
        (lambda h: h[0].header.remove("CUNIT1"), InputError, "(?s)pointing is missing.*no CUNIT1"),
        (lambda h: h[0].header.set("CUNIT2", "arcmonkey"), InputError, "unit of a coordinate is not known"),
        (lambda h: h[1].header.set("BUNIT", "fathom"), InputError, "unit of a coordinate is not known"),
        (lambda h: h[1].header.set("BUNIT", "s"), InputError, "unit of a coordinate is not known"),
        (lambda h: h[0].header.set("CTYPE1", "RA---TAN"), InputError, "pointing is missing"),
        (lambda h: h[0].header.set("CTYPE3", "FREQ"), InputError, "not one of wavelengths"),
        (lambda h: h[0].header.set("CDELT1", 0.0), InputError, "coordinates cannot be read.*\n.*singular"),
        (lambda h: h[0].header.set("PC3_1", 0.5), InputError, "cannot be read.*\n.*off-diagonal"),
        (lambda h: h[0].header.set("CUNIT2", "deg"), InputError, "cannot be read.*\n.*Ill-conditioned"),
    ],
)
def test_unusable_files(file, change, kind, words):
    rewrite(file, change)
    with pytest.raises(kind, match=words) as caught:
        read_scans(file)
    assert type(caught.value) is kind
    assert str(file) in str(caught.value)
    assert caught.value.found
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "empty file"), (b"%PDF-1.4", "%PDF"), (b"\x1f\x8b\x08", "x1f")]
)
def test_not_fits(tmp_path, content, words):
    path = tmp_path / "scan.fits"
    path.write_bytes(content)
    with pytest.raises(ForeignFileError, match="not a FITS file") as caught:
        read_scans(path)
    assert words in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_scans(tmp_path / "nowhere.fits")


@pytest.mark.parametrize("kept", [0.98, 0.7, 0.5, 0.3])
def test_truncated_file(file, kept):
    # 0.98 cuts the last padding only when that is longer than 2 %: the data of the axis go in any case here
    size = file.stat().st_size
    os.truncate(file, int(size * kept) if kept < 0.9 else size - 2880)
    with pytest.raises(InputError, match=r"truncated|damaged|missing") as caught:
        read_scans(file)
    assert str(file) in str(caught.value)
    assert not isinstance(caught.value, ForeignFileError)


def test_file_changed_after_it_was_described(file, cube):
    (scan,) = read_scans(file)
    write_fchroma(file, cube[:, 1:], WAVELENGTH_HALPHA, START, overwrite=True)
    with pytest.raises(InputError, match="has changed"):
        open_intensity(scan)
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        open_intensity(scan)


def test_writer_refuses_what_does_not_fit(tmp_path, cube):
    path = tmp_path / "scan.fits"
    with pytest.raises(MisuseError, match="16-bit"):
        write_fchroma(path, cube * 10.0, WAVELENGTH_HALPHA, START)
    with pytest.raises(MisuseError, match="16-bit"):
        write_fchroma(path, np.full(cube.shape, np.nan), WAVELENGTH_HALPHA, START)
    with pytest.raises(MisuseError, match="do not fit"):
        write_fchroma(path, cube[1:], WAVELENGTH_HALPHA, START)
    with pytest.raises(ForeignFileError, match="another line"):
        write_fchroma(path, cube, WAVELENGTH_HALPHA - 20.0, START)
    assert not path.exists()
    write_fchroma(path, cube, WAVELENGTH_HALPHA, START)
    with pytest.raises(MisuseError, match="exists"):
        write_fchroma(path, cube, WAVELENGTH_HALPHA, START)


def test_database_names():
    assert file_name("halpha", "2014-09-06T15:27:24", 459) == "crisp_l2_20140906_152724_6563_r00459.fits"
    assert file_name("ca8542", "2014-09-06T15:27:24", 459) == "crisp_l2_20140906_152724_8542_r00459.fits"


def crispex(path, cube, wavelength, *, lines=None, seconds=None):
    """One file of several lines or times, as CRISPEX's keywords and extensions put them."""
    first = slice(0, 15) if lines is None else slice(lines[0][0], sum(lines[0]))
    write_fchroma(path, np.reshape(cube, (-1, *cube.shape[-3:]))[0][first], wavelength[first], START)

    def change(hdus):
        header = hdus[0].header
        hdus[0].data = cube.astype(">i2")
        hdus[1].data = wavelength
        if lines is not None:
            header["NWIN"] = len(lines)
            for number, (start, width) in enumerate(lines, start=1):
                header[f"WSTART{number}"], header[f"WWIDTH{number}"] = start, width
        if seconds is not None:
            header["CTYPE4"], header["CUNIT4"] = "UTC", "s"
            header["STARTOBS"] = "2014-09-06T15:27:24"
            hdus.append(fits.ImageHDU(np.asarray(seconds), name="time-coordinate"))

    return rewrite(path, change)


OXYGEN = 7774.0 + 0.1 * np.arange(5)


@pytest.fixture
def several_lines(tmp_path):
    wavelength = np.concatenate([WAVELENGTH_HALPHA, OXYGEN, WAVELENGTH_CA8542])
    cube = np.random.default_rng(4).integers(800, 6000, (45, 9, 13))
    return crispex(tmp_path / "lines.fits", cube, wavelength, lines=((0, 15), (15, 5), (20, 25))), cube


def test_several_lines_in_a_file(several_lines):
    path, cube = several_lines
    halpha, ca8542 = read_scans(path)
    assert (halpha.line, halpha.index, ca8542.line, ca8542.index) == ("halpha", 0, "ca8542", 2)
    np.testing.assert_array_equal(halpha.wavelength, WAVELENGTH_HALPHA)
    np.testing.assert_array_equal(ca8542.wavelength, WAVELENGTH_CA8542)
    np.testing.assert_array_equal(open_intensity(halpha), cube[:15])
    np.testing.assert_array_equal(open_intensity(ca8542), cube[20:])
    assert header_contradictions(halpha) == header_contradictions(ca8542) == ()

    def change(hdus):
        hdus[0].header["WDESC3"] = "H I 6563"
        hdus[0].header["TWAVE3"] = 6564.6

    rewrite(path, change)
    assert len(header_contradictions(ca8542)) == 2


def test_an_axis_that_is_not_uniform(tmp_path, cube):
    axis = WAVELENGTH_HALPHA[[0, 2, 3, 5, 6, 7, 8, 9, 11, 14]]
    (scan,) = read_scans(write_fchroma(tmp_path / "scan.fits", cube[:10], axis, START))
    np.testing.assert_array_equal(scan.wavelength, axis)
    assert header_contradictions(scan) == ()


def test_several_scans_in_a_file(tmp_path):
    """Of both lines, and on an axis that is not uniform."""
    axis = WAVELENGTH_HALPHA[[0, 2, 3, 5, 6, 7, 8, 9, 11, 14]]
    wavelength = np.concatenate([axis, WAVELENGTH_CA8542])
    cube = np.random.default_rng(5).integers(800, 6000, (3, 35, 9, 13))
    seconds = [0.0, 11.54, 23.25]
    path = crispex(tmp_path / "scans.fits", cube, wavelength, lines=((0, 10), (10, 25)), seconds=seconds)
    scans, _ = find_scans([path])
    assert [scan.line for scan in scans] == ["ca8542"] * 3 + ["halpha"] * 3
    for number, scan in enumerate(scans[3:]):
        assert scan.time == START + np.timedelta64(round(1000 * seconds[number]), "ms")
        np.testing.assert_array_equal(scan.wavelength, axis)
        np.testing.assert_array_equal(open_intensity(scan), cube[number, :10])
    for number, scan in enumerate(scans[:3]):
        np.testing.assert_array_equal(scan.wavelength, WAVELENGTH_CA8542)
        np.testing.assert_array_equal(open_intensity(scan), cube[number, 10:])


@pytest.mark.parametrize("kind", ["scaled", "minutes", "axis in minutes", "ms in the extension"])
def test_coordinates_in_any_number_and_unit(tmp_path, kind):
    """Times and wavelengths as scaled integers, in min and nm: those of astropy's own scaling."""
    cube = np.random.default_rng(6).integers(800, 6000, (2, 15, 9, 13))
    path = crispex(tmp_path / "scans.fits", cube, WAVELENGTH_HALPHA, seconds=[0.0, 12.0])

    def change(hdus):
        if kind == "scaled":
            hdus[1].scale("int32", bscale=0.001, bzero=6560.0)
            hdus[2].scale("int16", bscale=0.001, bzero=0.0)
        elif kind == "minutes":
            hdus[1].data, hdus[1].header["BUNIT"] = hdus[1].data / 10.0, "nm"
            hdus[2].data, hdus[2].header["BUNIT"] = hdus[2].data / 60.0, "min"
        elif kind == "axis in minutes":
            hdus[2].data, hdus[0].header["CUNIT4"] = hdus[2].data / 60.0, "min"
        else:
            hdus[2].data, hdus[2].header["CUNIT1"] = hdus[2].data * 1000.0, "ms"
            hdus[0].header["CUNIT4"] = "s"

    scans = read_scans(rewrite(path, change))
    assert [scan.time for scan in scans] == [START, START + np.timedelta64(12, "s")]
    for scan in scans:
        np.testing.assert_allclose(scan.wavelength, WAVELENGTH_HALPHA, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h[0].header.set("WSTART2", 14), "places along the wavelength axis"),
        (lambda h: h[0].header.set("WWIDTH3", 26), "places along the wavelength axis"),
        (lambda h: h[0].header.set("WWIDTH1", 0), "places along the wavelength axis"),
        (lambda h: h[0].header.set("NWIN", 2_000_000_000), "places along the wavelength axis"),
        (lambda h: h[0].header.remove("WSTART3"), "places along the wavelength axis"),
        (lambda h: h[0].header.set("NWIN", 1), "another line"),
    ],
)
def test_lines_that_do_not_fit(several_lines, change, words):
    path, _ = several_lines
    with pytest.raises(InputError, match=words):
        read_scans(rewrite(path, change))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda h: h[0].header.remove("STARTOBS"), InputError, "times are missing"),
        (lambda h: h.pop(2), InputError, "times are missing"),
        (lambda h: setattr(h[2], "data", h[2].data[:1]), InputError, "times are missing"),
        (lambda h: setattr(h[2], "data", h[2].data * np.nan), InputError, "times are missing"),
        (lambda h: h[0].header.set("STARTOBS", "noon"), InputError, "time cannot be read"),
        (lambda h: h[0].header.set("CTYPE4", "STOKES"), ForeignFileError, "another layout"),
    ],
)
def test_times_that_do_not_fit(tmp_path, change, kind, words):
    cube = np.random.default_rng(6).integers(800, 6000, (2, 15, 9, 13))
    path = crispex(tmp_path / "scans.fits", cube, WAVELENGTH_HALPHA, seconds=[0.0, 11.54])
    with pytest.raises(kind, match=words):
        read_scans(rewrite(path, change))


def test_found_by_content_in_any_order(tmp_path):
    halpha, ca8542, _ = write_pair(tmp_path, shape=(30, 40))
    renamed = halpha.rename(tmp_path / "zz.fits")
    (tmp_path / "deeper").mkdir()
    moved = ca8542.rename(tmp_path / "deeper" / "a.FITS")
    (tmp_path / "notes.txt").write_text("not looked at in a directory")
    fits.PrimaryHDU(np.zeros((3, 3))).writeto(tmp_path / "other.fits")
    (tmp_path / "broken.fits").write_text("text")

    scans, passed_over = find_scans([tmp_path])
    assert [(scan.line, scan.path) for scan in scans] == [("ca8542", str(moved)), ("halpha", str(renamed))]
    assert {Path(refusal.where).name for refusal in passed_over} == {"other.fits", "broken.fits"}

    by_pattern, _ = find_scans([f"{tmp_path}/zz*", f"{tmp_path}/**/a.FITS", str(renamed)])
    assert by_pattern == scans

    with pytest.raises(InputError, match="another instrument"):
        find_scans([tmp_path / "other.fits", tmp_path])
    with pytest.raises(InputError, match=r"(?s)2 files cannot be used.*other.fits.*broken.fits") as caught:
        find_scans([tmp_path / "other.fits", tmp_path / "broken.fits"])
    assert "not fchroma: a FITS file of another instrument (INSTRUME = '')" in caught.value.found
    assert "not a FITS file" in caught.value.found or "it begins with b'text'" in caught.value.found
    with pytest.raises(InputError, match="no file matches"):
        find_scans([f"{tmp_path}/*.sav"])


def test_damaged_scan_in_a_directory_is_an_error(tmp_path):
    halpha, _, _ = write_pair(tmp_path, shape=(30, 40))
    os.truncate(halpha, halpha.stat().st_size // 2)
    with pytest.raises(InputError, match="truncated"):
        find_scans([tmp_path])


def test_pair_of_the_fixture_has_pad_and_both_lines(tmp_path):
    halpha, ca8542, truth = write_pair(tmp_path, shift=(2.3, -1.4))
    for path, axis, field in (
        (halpha, WAVELENGTH_HALPHA, truth.field_halpha),
        (ca8542, WAVELENGTH_CA8542, truth.field_ca8542),
    ):
        (scan,) = read_scans(path)
        np.testing.assert_array_equal(scan.wavelength, axis)
        assert (open_intensity(scan)[:, ~field] == PAD).all()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_real_pair) for name in ("*6563*.fits", "*8542*.fits")]
)
def test_real_files(name):
    (path,) = REAL.glob(name)
    (scan,) = read_scans(path)
    data = open_intensity(scan)
    points, line = {"*6563*.fits": (15, "halpha"), "*8542*.fits": (25, "ca8542")}[name]
    assert scan.line == line
    assert data.shape == (points, 21, 21)
    assert scan.shape == (21, 21)
    with fits.open(path) as hdus:
        np.testing.assert_array_equal(data, hdus[0].data)
        np.testing.assert_array_equal(scan.wavelength, hdus["lambda-coordinate"].data)
    assert scan.frame.scale == pytest.approx((0.057, 0.057))
    assert scan.frame.reference_value == pytest.approx((-729.82, -313.43), abs=0.01)


@pytest.mark.filterwarnings("ignore::astropy.utils.exceptions.AstropyUserWarning")
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damage_gives_typed_errors_only(tmp_path, file, cube, data):
    """Bytes changed or cut anywhere in the headers: a scan of the true shape, or an `InputError`."""
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 6), label="changes")):
        where = data.draw(
            st.one_of(
                st.integers(0, 2880 * 2 - 1),
                st.integers(len(content) - 2 * 2880, len(content) - 2880 - 1),
            )
        )
        content[where] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content))) :]
    damaged = tmp_path / "damaged.fits"
    damaged.write_bytes(content)
    try:
        (scan,) = read_scans(damaged)
        intensity = open_intensity(scan)
        header_contradictions(scan)
    except InputError as error:
        message = str(error)
    else:
        message = str(damaged)
        assert intensity.shape == (len(scan.wavelength), *scan.shape)
        assert intensity.dtype.kind in "iuf"
        intensity.sum()
    assert str(damaged) in message


def test_wavelengths_in_air_on_the_callers_word(tmp_path, cube):
    """The database is in vacuum by definition; a file that is not says nothing of it."""
    path = write_fchroma(tmp_path / "air.fits", cube, vacuum_to_air(WAVELENGTH_HALPHA), START)
    (scan,) = read_scans(path)
    assert (scan.medium, scan.medium_stated_by) == ("vacuum", "format")
    (scan,) = read_scans(path, "air")
    assert (scan.medium, scan.medium_stated_by) == ("air", "caller")
    np.testing.assert_allclose(scan.wavelength, WAVELENGTH_HALPHA, rtol=0, atol=1e-9)
    assert header_contradictions(scan) == ()


def test_wavelengths_in_air_on_the_files_word(tmp_path, cube):
    path = write_fchroma(tmp_path / "air.fits", cube, vacuum_to_air(WAVELENGTH_HALPHA), START)
    rewrite(path, lambda hdus: hdus[0].header.set("CTYPE3", "AWAV"))
    (scan,) = read_scans(path)
    assert (scan.medium, scan.medium_stated_by) == ("air", "file")
    np.testing.assert_allclose(scan.wavelength, WAVELENGTH_HALPHA, rtol=0, atol=1e-9)
    assert header_contradictions(scan) == ()
    with pytest.raises(InputError, match="says otherwise"):
        read_scans(path, "vacuum")
    # The refractive index of FITS' own conversion (astropy's, by wcslib) is known to 1e-8.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wcs = WCS(fits.getheader(path)).spectral
    wcs.wcs.sptr("WAVE-???")
    assert wcs.wcs.crval[0] * 1e10 == pytest.approx(scan.wavelength[7], abs=1e-3)


DECIDES = {
    "time": {"DATE-AVG", "TIMESYS"},
    "pointing": {f"{card}{axis}" for card in ("CRPIX", "CRVAL", "CDELT", "CUNIT", "CTYPE") for axis in (1, 2)}
    | {"PC1_1", "PC2_2"},
    "intensity": {"BUNIT"},
}
OF_THE_SKY = ["LONPOLE", "LATPOLE", "PV1_0", "PV1_1", "PV1_2", "CD1_1", "CD1_2", "CD2_1", "CD2_2", "CROTA2"]
VALUES = [None, "", "x", "AWAV", "2014-09-06", "TAI", "deg", -1, 0, 1, 2, 3, 0.5, 1e300, -1e-300, True]


@pytest.mark.filterwarnings("ignore::astropy.utils.exceptions.AstropyWarning", "ignore::RuntimeWarning")
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_header_gives_the_true_axes_or_a_typed_error(tmp_path, data):
    """Cards replaced or removed in scans of any size and number type: right, or refused, but never wrong."""
    rows, columns, points = (data.draw(st.integers(1, 6), label=label) for label in "yxw")
    rng = np.random.default_rng(data.draw(st.integers(0, 9), label="seed"))
    axis = 6564.61 + np.sort(rng.uniform(-1.5, 1.5, points + 1))
    values = rng.integers(0, 250, (points + 1, rows, columns))
    path = write_fchroma(tmp_path / "fuzzed.fits", values, axis, START, overwrite=True)
    # By bytes: astropy would mend what it writes.
    content = path.read_bytes()
    header = fits.Header.fromstring(content)
    length, size = len(header.tostring()), 2 * values.size
    rest = content[length + -(-size // 2880) * 2880 :]
    cards = sorted({card for card in header if card and not card.startswith(("NAXIS", "BITPIX", "SIM"))})
    changed = data.draw(
        st.dictionaries(st.sampled_from(cards), st.sampled_from(VALUES), max_size=2), label="changed"
    )
    placed = st.sampled_from([-0.3, 0.0, 0.02, 0.057, 1.0, 170.0, 180.0])
    changed |= data.draw(st.dictionaries(st.sampled_from(OF_THE_SKY), placed, max_size=3), label="sky")
    for card, value in changed.items():
        if value is None:
            header.remove(card)
        else:
            header[card] = value
    kind = data.draw(st.sampled_from([">i2", "u1", ">i4", ">i8", ">f4", ">f8"]), label="type")
    header["BITPIX"] = np.dtype(kind).itemsize * (-8 if "f" in kind else 8)
    numbers = values.astype(kind).tobytes()
    numbers += bytes(-len(numbers) % 2880)
    path.write_bytes(header.tostring().encode("ascii") + numbers + rest)
    try:
        (scan,) = read_scans(path)
        intensity = np.array(open_intensity(scan))
        header_contradictions(scan)
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017
        assert inspect([path], tolerance=15.0).refused
        return
    assert not inspect([path], tolerance=15.0).refused
    touched = {name for name, deciding in DECIDES.items() if deciding & set(changed)}
    if changed.get("CTYPE3") == "AWAV":
        np.testing.assert_allclose(vacuum_to_air(scan.wavelength), axis, rtol=0, atol=1e-9)
    else:
        np.testing.assert_array_equal(scan.wavelength, axis)
    if "intensity" not in touched:
        np.testing.assert_array_equal(intensity, values)
    if "time" not in touched:
        assert scan.time == START
    y, x = np.array([[0, 0, rows - 1, rows - 1], [0, columns - 1, 0, columns - 1]], dtype=float)
    sky = WCS(fits.getheader(path)).all_pix2world(x, y, np.zeros(4), 0)[:2]
    assert separation(scan.frame.coordinates(x, y), sky).max() < 0.051
    if "pointing" not in touched and not changed.keys() & set(OF_THE_SKY):
        assert scan.frame.reference_value == pytest.approx((-729.826, -313.432), abs=1e-9)
        assert scan.frame.scale == pytest.approx((0.057, 0.057))
