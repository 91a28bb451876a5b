"""What `flarefield inspect` says of files whose every property is known, and of what is no scan."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from rich.console import Console
from scipy import ndimage

from pipeline.cli import main
from pipeline.crisp.fchroma import write_fchroma
from pipeline.crisp.wavelengths import vacuum_to_air
from pipeline.errors import InputError
from pipeline.ingest import ingest
from pipeline.inspect import inspect, show
from pipeline.observation import open_observation
from tests.fchroma_files import (
    CADENCE,
    PAD,
    START,
    WAVELENGTH_CA8542,
    WAVELENGTH_HALPHA,
    rotated_field,
    write_pair,
)
from tests.sstred_files import write_sstred

REAL = Path(__file__).parents[2] / "shared" / "data" / "crisp"
SHAPE = (40, 50)


def said(inspection):
    """The report as text without borders or line breaks, by the titles of its tables."""
    console = Console(width=400, record=True, file=io.StringIO())
    show(inspection, console)
    return " ".join(console.export_text().replace("│", " ").split())


@pytest.fixture
def series(tmp_path):
    """Four scans of both lines; after the third there is a gap of two cadences."""
    for number in (0, 1, 2, 5):
        write_pair(tmp_path, shape=SHAPE, number=number, seed=number, angle=20.0)
    return tmp_path


def test_a_series_is_told_about_together(series):
    (series / "notes.fits").write_text("no scan")
    inspection = inspect([series], tolerance=15.0)
    assert [(group.scans[0].line, len(group.scans)) for group in inspection.groups] == [
        ("halpha", 4),
        ("ca8542", 4),
    ]
    assert all(len(group.looked_at) == 3 for group in inspection.groups)
    assert all(len(group.looked_at) == 4 for group in inspect([series], tolerance=15.0, every=True).groups)
    share = rotated_field(SHAPE, 20.0).mean()
    assert inspection.groups[0].field == pytest.approx(share)
    assert inspection.groups[0].found == ()
    assert len(inspection.pairs) == 4
    assert not inspection.refused
    assert not inspection.unpaired
    assert [Path(refusal.where).name for refusal in inspection.passed_over] == ["notes.fits"]
    text = said(inspection)
    for words in (
        "H-alpha 6563: 4 scans, format fchroma",
        "15, every 0.200 Angstrom, 6563.184 to 6565.984 in vacuum",
        "in the file in vacuum, as the format defines",
        "middle -0.026 Angstrom (-1.2 km/s) from rest, 6564.61",
        "DN; saturated at 32767",
        "every 11.54 s in the median",
        "1 gap: 34.6 s after 2014-09-06T15:27:47",
        "40 x 50 pixels (y, x) of 0.057 x 0.057 arcsec",
        f"{100 * share:.0f} % of the frame",
        "(-729.8, -313.4) arcsec, mu = 0.551",
        "nothing wrong in the 3 scans looked at",
        "4, their lines 5.01 s apart in the median, 5.01 at most",
        "an observation of 4 x 40 x 50 pixels",
        "notes.fits: not a FITS file",
    ):
        assert words in text, words


def test_times_of_poor_seeing_are_named(tmp_path):
    """One scan of five blurred over 12 pixels, in the middle of those that are not looked at otherwise."""
    folder = tmp_path / "crisp"
    folder.mkdir()
    for number in range(5):
        pair = write_pair(folder, shape=(90, 110), number=number, seed=number, angle=None)[:2]
        if number == 3:
            for path in pair:
                with fits.open(path, mode="update") as hdus:
                    hdus[0].data = ndimage.gaussian_filter(hdus[0].data, (0, 5, 5))
    inspection = inspect([folder], tolerance=15.0, min_contrast=0.04)
    for group in inspection.groups:
        assert len(group.looked_at) == 3
        contrasts = np.array([value for _, value in group.contrasts])
        # The scene's granulation has 7 %, and some noise.
        assert np.delete(contrasts, 3) == pytest.approx(np.full(4, 0.07), rel=0.3)
        assert contrasts[3] < 0.03
    text = said(inspection)
    for moment in ("2014-09-06T15:27:58", "2014-09-06T15:28:03"):
        assert f"poor seeing, less than 0.04, in 1 of 5 scans: {moment} (0.0" in text
    assert "poor seeing" not in said(inspect([folder], tolerance=15.0))
    ingest([folder], tmp_path / "obs.zarr", call="tests", min_contrast=0.04)
    with open_observation(tmp_path / "obs.zarr") as observation:
        assert observation.poor_seeing.values.tolist() == [False, False, False, True, False]


def test_scans_in_air_with_cavity_errors(tmp_path):
    rng = np.random.default_rng(1)
    axis = WAVELENGTH_HALPHA[[0, 2, 5, 7, 9, 12, 14]]
    cavity = rng.normal(0.0, 0.02, (3, *SHAPE))
    cavity[:, 3, 4] = np.nan
    times = 61000.0 + 20.0 * np.arange(3)[:, None] + 0.5 * np.arange(7)
    path = write_sstred(
        tmp_path / "cube.fits",
        rng.uniform(1e-8, 2e-8, (3, 1, 7, *SHAPE)),
        vacuum_to_air(axis),
        times,
        angle=30.0,
        cavity=cavity,
        pointing=(0.0, 0.0),
        padding="nan",
    )
    inspection = inspect([path], tolerance=15.0)
    (group,) = inspection.groups
    known = cavity[np.isfinite(cavity)]
    assert group.shift == pytest.approx((np.sqrt(np.mean(known**2)), np.abs(known).max()), rel=1e-3)
    assert len(group.found) == 3
    text = said(inspection)
    for words in (
        "H-alpha 6563: 3 scans, format sstred",
        "7, 0.400 to 0.600 Angstrom apart, 6563.184 to 6565.984 in vacuum",
        "in the file in air (6561.371 to 6564.171), as the format defines",
        "from 'W m^-2 Hz^-1 sr^-1' in the file",
        "a scan takes 3.00 s, first to last wavelength",
        "turned by +30.00 degrees",
        "100 % of the frame; NaN around it, as the file says",
        "mu = 1.000",
        f"root mean square {1000 * group.shift[0]:.1f} mA",
        "1 pixels in the field have no wavelength correction",
        "only one line is given: there is no ca8542 scan",
    ):
        assert words in text, words


def test_what_is_wrong_is_counted(tmp_path):
    rng = np.random.default_rng(2)
    cube = rng.integers(1000, 2000, (15, *SHAPE))
    field = rotated_field(SHAPE, 20.0)
    cube[3, 20, 20:24] = 0
    cube[5, 21, 21], cube[6, 21, 21], cube[5, 22, 25] = 32767, 32767, 32767
    cube[8] = 1500
    write_fchroma(tmp_path / "bad.fits", np.where(field, cube, PAD), WAVELENGTH_HALPHA, START)
    (group,) = inspect([tmp_path], tolerance=15.0).groups
    sentences = [sentence for _, sentence in group.found]
    missing = WAVELENGTH_HALPHA[8] - 6564.61
    assert sentences == [
        f"no image at {missing:+.3f} Angstrom from the line's rest: one value everywhere, none, or a copy "
        "of the one before",
        f"4 pixels of {field.sum()} in the field are zero or negative at some wavelength",
        f"2 pixels of {field.sum()} in the field are saturated at some wavelength",
    ]


def test_an_image_that_is_there_once_more_is_said(tmp_path):
    cube = np.random.default_rng(2).integers(1000, 2000, (15, *SHAPE))
    cube[4] = cube[3]
    write_fchroma(tmp_path / "scan.fits", cube, WAVELENGTH_HALPHA, START)
    (group,) = inspect([tmp_path], tolerance=15.0).groups
    ((_, sentence),) = group.found
    assert sentence.startswith(f"no image at {WAVELENGTH_HALPHA[4] - 6564.61:+.3f} Angstrom")


@pytest.mark.parametrize("move", [0.0, 0.5, -1.81])
def test_a_line_far_from_rest_is_said(tmp_path, move):
    """Wavelengths in air, taken for vacuum: 1.81 Angstrom, or 83 km/s."""
    axis = WAVELENGTH_HALPHA + move
    rng = np.random.default_rng(3)
    profile = 1.0 - 0.7 * np.exp(-(((WAVELENGTH_HALPHA - WAVELENGTH_HALPHA[7]) / 0.5) ** 2))
    cube = np.rint(3000 * profile[:, None, None] * rng.uniform(0.9, 1.1, SHAPE))
    write_fchroma(tmp_path / "scan.fits", cube, axis, START)
    (group,) = inspect([tmp_path], tolerance=15.0).groups
    speed = (WAVELENGTH_HALPHA[7] + move - 6564.61) / 6564.61 * 299792.458
    sentences = [sentence for _, sentence in group.found]
    if abs(speed) < 40.0:
        assert sentences == []
    else:
        (sentence,) = sentences
        assert sentence.startswith(f"the mean profile is darkest {speed:+.0f} km/s from the line's rest")
        assert round(speed) == -84


@pytest.mark.parametrize("stated", ["vacuum", "air"])
def test_ingest_says_so_too(tmp_path, caplog, stated):
    """Axes so wide that those in air, taken for vacuum, cover the lines' windows as well."""
    offset = np.arange(-40, 41) * 0.1
    rng = np.random.default_rng(4)
    for line, rest in (("halpha", 6564.61), ("ca8542", 8544.44)):
        profile = 1.0 - 0.7 * np.exp(-((offset / 0.5) ** 2))
        cube = np.rint(3000 * profile[:, None, None] * rng.uniform(0.9, 1.1, SHAPE))
        axis = vacuum_to_air(rest + offset) if stated == "vacuum" else rest + offset
        write_fchroma(tmp_path / f"{line}.fits", cube, axis, START)
    report = ingest([tmp_path], tmp_path / "obs.zarr", call="")
    said = [sentence for sentence in report.found if "darkest" in sentence]
    if stated == "air":
        assert not said
        return
    for line, speed, sentence in zip(("halpha", "ca8542"), (-83, -82), said, strict=True):
        assert f"{line}.fits: the mean profile is darkest {speed} km/s from the line's rest" in sentence
        assert sentence in caplog.text
        assert sentence in open_observation(tmp_path / "obs.zarr").attrs["found"]


def test_scans_without_intensities_are_told(series, tmp_path):
    """One of four, of Ca II: its time is blank; if no time is left, ingest would refuse."""
    later = sorted(series.glob("*8542*"))
    for path, words in (
        (later[1:2], "1 times without an answer"),
        (later, "no pair of scans has a pixel with both lines"),
    ):
        for file in path:
            with fits.open(file, mode="update") as hdus:
                hdus[0].data[:] = 0
        inspection = inspect([series], tolerance=15.0, every=True)
        assert [scan.path for scan in inspection.groups[1].empty] == [str(file) for file in path]
        text = said(inspection)
        assert words in text
        assert "no image at any wavelength" in text
        assert ("would refuse" in text) == (path == later)
        if path == later:
            with pytest.raises(InputError, match="no time of the series"):
                ingest([series], tmp_path / "obs.zarr", call="")
        else:
            assert ingest([series], tmp_path / "some.zarr", call="").blank == (1,)


def test_drifting_wavelengths_are_told_about_together(tmp_path):
    rng = np.random.default_rng(5)
    for number in range(3):
        cube = rng.integers(1000, 2000, (15, *SHAPE))
        axis = WAVELENGTH_HALPHA + 0.002 * number
        write_fchroma(tmp_path / f"{number}.fits", cube, axis, START + number * CADENCE)
    inspection = inspect([tmp_path], tolerance=15.0)
    (group,) = inspection.groups
    assert len(group.scans) == 3
    assert "moved by up to 4.0 mA from scan to scan" in said(inspection)


def test_what_ingest_would_refuse_and_leave_out(series):
    extra = WAVELENGTH_CA8542[:20] + 0.03
    late = START + 40 * CADENCE
    write_fchroma(series / "late.fits", np.full((15, *SHAPE), 1000), WAVELENGTH_HALPHA, late)
    inspection = inspect([series], tolerance=15.0)
    assert [scan.time for scan in inspection.unpaired] == [late]
    assert "1 scans without a partner: halpha of 2014-09-06T15:35:05.600" in said(inspection)
    write_fchroma(series / "short.fits", np.full((20, *SHAPE), 1000), extra, late)
    inspection = inspect([series], tolerance=15.0)
    assert "different wavelengths" in str(inspection.refusal)
    assert len(inspection.groups) == 3
    assert "would refuse" in said(inspection)


def test_the_command(series, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(series)])
    assert not ended.value.code
    assert "an observation of 4 x 40 x 50 pixels" in capsys.readouterr().out
    (series / "torn.fits").write_bytes(next(series.glob("*6563*")).read_bytes()[:9000])
    fits.PrimaryHDU(np.zeros((3, 3))).writeto(series / "other.fits")
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(series), str(series / "other.fits")])
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    text = " ".join(captured.out.split())
    assert "torn.fits: the file is truncated" in text
    assert "other.fits: a file of no format that is known" in text
    assert "H-alpha 6563: 4 scans" in text
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(series / "*.sav")])
    assert ended.value.code == 1
    assert "no file matches" in capsys.readouterr().err


@pytest.mark.observation
@pytest.mark.skipif(not REAL.is_dir(), reason="the real pair is not here")
def test_the_real_pair():
    text = said(inspect([REAL], tolerance=15.0))
    for words in ("21 x 21 pixels", "mu = 0.551", "nothing wrong", "1, their lines 5.01 s apart"):
        assert words in text
