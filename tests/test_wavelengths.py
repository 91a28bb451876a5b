"""Air and vacuum: published pairs of wavelengths, another implementation, and who states the medium."""

from __future__ import annotations

import astropy.units as u
import numpy as np
import pytest

from inn.layout import CA8542, HALPHA
from pipeline.crisp.scan import vacuum_axis
from pipeline.crisp.wavelengths import air_to_vacuum, refractive_index, to_vacuum, vacuum_to_air
from pipeline.errors import InputError

# NIST Atomic Spectra Database, Ritz wavelengths of observed lines: air and vacuum, Angstrom
PUBLISHED = {
    "H I 3d 2D5/2 - 2p 2P3/2": (6562.8516, 6564.66464),
    "Ca II 4p 2P3/2 - 3d 2D5/2": (8542.091, 8544.438),
    "He I 10830": (10830.33977, 10833.30643),
    "Na I D2": (5889.950954, 5891.583264),
}


@pytest.mark.parametrize(("air", "vacuum"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_pairs(air, vacuum):
    """The database uses another formula for air (Peck & Reeder 1972): within 0.5 mA, or 20 m/s."""
    assert air_to_vacuum(air) == pytest.approx(vacuum, abs=5e-4)
    assert vacuum_to_air(vacuum) == pytest.approx(air, abs=5e-4)


def test_the_lines_of_the_network():
    """Both lines' classical air wavelengths give the rest wavelengths that the network is placed at."""
    assert air_to_vacuum(6562.79) == pytest.approx(HALPHA.rest_wavelength, abs=0.01)
    assert air_to_vacuum(8542.09) == pytest.approx(CA8542.rest_wavelength, abs=0.01)


def test_another_implementation():
    wcs_utils = pytest.importorskip("specutils.utils.wcs_utils")
    vacuum = np.linspace(3900.0, 10900.0, 50)
    np.testing.assert_allclose(
        refractive_index(vacuum),
        wcs_utils.refraction_index(vacuum * u.Angstrom, method="Ciddor1996"),
        rtol=1e-12,
    )
    np.testing.assert_allclose(
        vacuum_to_air(vacuum),
        wcs_utils.vac_to_air(vacuum * u.Angstrom, method="Morton2000").to_value(u.Angstrom),
        atol=2e-4,
    )


def test_there_and_back():
    vacuum = np.linspace(2500.0, 16000.0, 400)
    np.testing.assert_allclose(air_to_vacuum(vacuum_to_air(vacuum)), vacuum, rtol=1e-15)
    np.testing.assert_array_equal(to_vacuum(vacuum, "vacuum"), vacuum)
    np.testing.assert_array_equal(to_vacuum(vacuum, "air"), air_to_vacuum(vacuum))


AXIS = np.array([6562.0, 6562.8, 6563.6])


@pytest.mark.parametrize(
    ("stated", "caller", "expected"),
    [
        (("vacuum", "file"), None, ("vacuum", "file")),
        (("air", "format"), None, ("air", "format")),
        (("air", "format"), "air", ("air", "format")),
        (("air", "file"), "air", ("air", "file")),
        (("air", "format"), "vacuum", ("vacuum", "caller")),
        (None, "air", ("air", "caller")),
        (None, "vacuum", ("vacuum", "caller")),
    ],
)
def test_who_states_the_medium(stated, caller, expected):
    axis, *said = vacuum_axis(AXIS, stated, caller, "file.fits")
    assert tuple(said) == expected
    np.testing.assert_array_equal(axis, air_to_vacuum(AXIS) if expected[0] == "air" else AXIS)


def test_a_medium_that_nobody_states_is_refused():
    with pytest.raises(InputError, match=r"(?s)file\.fits.*air or in vacuum.*--medium"):
        vacuum_axis(AXIS, None, None, "file.fits")


def test_a_file_that_says_so_is_believed():
    with pytest.raises(InputError, match=r"(?s)says otherwise.*in vacuum.*in air"):
        vacuum_axis(AXIS, ("vacuum", "file"), "air", "file.fits")
