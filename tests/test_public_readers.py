"""Files that the tests write, read by the observatory's own public readers, and what these make of them.

Neither package can be asked for as a dependency. The metadata of crispy (sst-crispy 1.0.2) demands a NumPy
before 1.22; its code works all the same, and `make` installs it without what it asks for. ISPy (ISPy-solar
0.2.3) is built by `numpy.distutils`, which is not there from Python 3.12 on, and does not say so: with Python
3.11, NumPy, setuptools and wheel, `pip install --no-deps --no-build-isolation ISPy-solar` does it.
"""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.crisp import open_intensity, read_scans
from pipeline.crisp.wavelengths import air_to_vacuum
from tests.crispy_groups import write_crispy
from tests.fchroma_files import START, WAVELENGTH_HALPHA
from tests.lapalma_files import write_cube, write_twin
from tests.sstred_files import write_sstred

SCANS, PARAMETERS, POINTS, ROWS, COLUMNS = 3, 4, WAVELENGTH_HALPHA.size, 9, 13
IN_AIR = WAVELENGTH_HALPHA / 1.000276


@pytest.fixture
def cube():
    shape = (SCANS, PARAMETERS, POINTS, ROWS, COLUMNS)
    return np.random.default_rng(1).integers(100, 3000, shape).astype("<i2")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("stokes", [True, False])
def test_groups_as_crispy_reads_them(tmp_path, cube, zarr_format, uniform, stokes):
    crispy = pytest.importorskip("crispy", reason="pip install --no-deps sst-crispy")
    numbers = cube[0] if stokes else cube[0, 0]
    path = tmp_path / "scan.zarr"
    write_crispy(path, numbers, WAVELENGTH_HALPHA, START, zarr_format=zarr_format, uniform=uniform)
    (scan,) = read_scans(path, "vacuum")
    theirs = (crispy.CRISP if uniform else crispy.CRISPNonU)(str(path))
    np.testing.assert_array_equal(theirs.file.data[...].reshape(-1, POINTS, ROWS, COLUMNS)[0], cube[0, 0])
    np.testing.assert_array_equal(open_intensity(scan), cube[0, 0])
    wavelength = getattr(theirs.wvls, "value", theirs.wvls)
    np.testing.assert_allclose(scan.wavelength, wavelength, rtol=0, atol=1e-6)
    y, x = np.mgrid[:ROWS, :COLUMNS].astype(float)
    sky = theirs.wcs.celestial.wcs_pix2world(x, y, 0)
    longitude = (sky[0] + 180.0) % 360.0 - 180.0
    np.testing.assert_allclose(
        scan.frame.coordinates(x, y), 3600.0 * np.array([longitude, sky[1]]), rtol=0, atol=1e-4
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["<i2", "<f4"])
def test_la_palma_cubes_as_ispy_reads_them(tmp_path, cube, kind):
    """The sidecar is ours alone; number, order and place of images are the format's."""
    lapalma = pytest.importorskip("ISPy.io.lapalma", reason="pip install ISPy-solar with Python 3.11")
    path = write_cube(tmp_path / "crispex.6563.icube", cube.astype(kind), stokes=True)
    write_twin(tmp_path / "crispex.6563_sp.icube", cube.astype(kind), stokes=True)
    path.with_suffix(".yaml").write_text(
        f"line: halpha\nwavelength: {{values: {IN_AIR.tolist()}, unit: Angstrom, medium: air}}\n"
        "time: {start: 2014-09-06T15:27:24, step: 11.5}\nunit: DN\n"
        "pointing: {reference_value: [-729.8, -313.4], scale: 0.059}\n"
    )
    theirs = lapalma.read(str(path))
    assert theirs.shape == cube.shape
    for scan in read_scans(path):
        np.testing.assert_array_equal(theirs[scan.index, 0], cube[scan.index, 0])
        np.testing.assert_array_equal(open_intensity(scan), theirs[scan.index, 0])
        image = lapalma.get(str(path), (scan.index * PARAMETERS) * POINTS + 4)
        np.testing.assert_array_equal(open_intensity(scan)[4], image)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("integers", [True, False])
def test_sstred_cubes_as_ispy_reads_them(tmp_path, cube, integers):
    solarnet = pytest.importorskip("ISPy.io.solarnet", reason="pip install ISPy-solar with Python 3.11")
    seconds = 55644.0 + 20.0 * np.arange(SCANS)[:, None] + 0.5 * np.arange(POINTS)
    path = write_sstred(tmp_path / "a.fits", cube, IN_AIR, seconds, unit="dn", integers=integers)
    scans = read_scans(path)
    data, times = solarnet.read(str(path)), solarnet.get_time(str(path), fulltime=True)
    wavelength = air_to_vacuum(10.0 * solarnet.get_wav(str(path)))
    for scan in scans:
        np.testing.assert_allclose(open_intensity(scan), data[scan.index, 0], rtol=1e-5)
        np.testing.assert_allclose(open_intensity(scan), cube[scan.index, 0], rtol=0, atol=0.05)
        np.testing.assert_allclose(scan.wavelength, wavelength, rtol=0, atol=1e-6)
        moments = (np.array([scan.begin, scan.end]) - np.datetime64("2014-09-06")) / np.timedelta64(1, "s")
        np.testing.assert_allclose(moments, times[scan.index, [0, -1]], rtol=0, atol=1e-6)
        corners = np.array(solarnet.get_extent(str(path), scan.index))
        found = scan.frame.coordinates(np.array([0.0, COLUMNS - 1.0]), np.array([0.0, ROWS - 1.0]))
        np.testing.assert_allclose(np.ravel(found), corners, rtol=0, atol=1e-4)
