"""Geometry against astropy's and sunpy's own: coordinates, cuts, mu; derotation with masks in closed form."""

from __future__ import annotations

import astropy.units as u
import numpy as np
import pytest
import sunpy.coordinates
import xarray as xr
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.time import Time
from astropy.wcs import WCS
from astropy.wcs.utils import wcs_to_celestial_frame
from sunpy.coordinates import Heliocentric, Helioprojective, get_earth

from pipeline.crisp.fchroma import read_scans, write_fchroma
from pipeline.crisp.scan import cosine_of_pointing
from pipeline.errors import MisuseError, StoreError
from pipeline.geometry import derotated, heliographic_latitude, mu_of_pixels
from pipeline.ingest import ingest
from pipeline.observation import coordinates, open_observation
from tests.fchroma_files import CADENCE, START, WAVELENGTH_CA8542, WAVELENGTH_HALPHA

ROWS, COLUMNS = 60, 90
POINTINGS = {"disc": (-729.826, -313.432), "limb": (-905.0, 250.0)}
# Astropy remarks that it added the date as a number to a header that has it as text.
pytestmark = pytest.mark.filterwarnings("ignore::astropy.wcs.FITSFixedWarning")

REFERENCE = (-13.25, 140.5)
"""Far off the frame's middle, and beyond its edge."""


def turn(angle: float) -> np.ndarray:
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    return np.array([[c, -s], [s, c]])


def observed(folder, *, pointing=POINTINGS["disc"], angle=41.0, drift=(0.0, 0.0), shape=(ROWS, COLUMNS)):
    """Coordinates of two scans of each line, and the H-alpha files' own headers."""
    scans, headers = [], []
    for line, axis in (("h", WAVELENGTH_HALPHA), ("c", WAVELENGTH_CA8542)):
        for number in range(2):
            path = write_fchroma(
                folder / f"{line}{number}.fits",
                np.full((axis.size, *shape), 1000),
                axis,
                START + number * CADENCE,
                pointing=(pointing[0] + number * drift[0], pointing[1] + number * drift[1]),
                scale=0.5,
                reference_pixel=REFERENCE,
                rotation=turn(angle),
            )
            scans.extend(read_scans(path))
            headers.append(fits.getheader(path))
    return coordinates(scans[:2], scans[2:]), headers[:2]


def of_header(header, x, y):
    """Astropy's own reading of the header, arcsec."""
    longitude, latitude = WCS(header).celestial.wcs_pix2world(x, y, 0)
    return (longitude + 180.0) % 360.0 * 3600.0 - 648000.0, latitude * 3600.0


def of_wcs(wcs, x, y):
    longitude, latitude = wcs.wcs_pix2world(x, y, 0)
    return (longitude + 180.0) % 360.0 * 3600.0 - 648000.0, latitude * 3600.0


@pytest.mark.parametrize("place", POINTINGS)
@pytest.mark.parametrize("angle", [0.0, 41.0, -120.0])
def test_coordinates_are_those_of_the_header(tmp_path, place, angle):
    dataset, headers = observed(tmp_path, pointing=POINTINGS[place], angle=angle)
    x, y = np.meshgrid(np.arange(COLUMNS), np.arange(ROWS))
    longitude, latitude = of_header(headers[0], x, y)
    np.testing.assert_allclose(dataset.longitude, longitude, atol=1e-6)
    np.testing.assert_allclose(dataset.latitude, latitude, atol=1e-6)
    wcs = dataset.flarefield.wcs
    for found, expected in zip(of_wcs(wcs, x, y), (longitude, latitude), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(wcs.wcs.crpix, np.add(REFERENCE, 1.0), atol=1e-5)
    np.testing.assert_allclose(wcs.wcs.crval * 3600.0, POINTINGS[place], atol=1e-5)
    np.testing.assert_allclose(wcs.wcs.get_pc(), turn(angle), atol=1e-7)


def test_coordinates_are_those_of_sunpy(tmp_path):
    """The same pixel as sunpy's frame has it, off the centre, rotated, near the limb."""
    dataset, headers = observed(tmp_path, pointing=POINTINGS["limb"])
    header = headers[0].copy()
    header["DATE-OBS"] = header["DATE-AVG"]
    frame = wcs_to_celestial_frame(dataset.flarefield.wcs)
    assert isinstance(frame, Helioprojective)
    earth = get_earth(frame.obstime)
    assert frame.observer.separation_3d(earth) < 5000 * u.km
    x, y = np.meshgrid([0, 40, 89], [0, 30, 59])
    sky = dataset.flarefield.wcs.pixel_to_world(x, y)
    own = WCS(header).celestial
    expected = own.wcs_pix2world(x, y, 0)
    there = SkyCoord(expected[0] * u.deg, expected[1] * u.deg, frame=frame)
    assert sky.separation(there).max() < 1e-5 * u.arcsec


def test_a_cut_has_the_wcs_of_what_is_left(tmp_path):
    dataset, headers = observed(tmp_path)
    whole = dataset.flarefield.wcs
    cut = dataset.isel(y=slice(7, 40), x=slice(20, None))
    wcs = cut.flarefield.wcs
    np.testing.assert_allclose(wcs.wcs.crpix, whole.wcs.crpix - [20, 7], atol=1e-5)
    np.testing.assert_allclose(wcs.wcs.crval, whole.wcs.crval, atol=1e-9)
    stepped = dataset.isel(y=slice(3, None, 4), x=slice(None, None, 3)).flarefield.wcs
    x, y = np.meshgrid(np.arange(10), np.arange(9))
    for found, expected in zip(of_wcs(stepped, x, y), of_header(headers[0], 3 * x, 3 + 4 * y), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    for found, expected in zip(
        of_wcs(dataset.isel(y=slice(None, None, -1)).flarefield.wcs, x, y),
        of_header(headers[0], x, ROWS - 1 - y),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(MisuseError, match="one row or column"):
        dataset.isel(y=slice(3, 4)).flarefield.wcs  # noqa: B018
    with pytest.raises(StoreError, match="where its pixels are"):
        dataset.drop_vars("longitude").flarefield.wcs  # noqa: B018


@pytest.mark.parametrize(
    "selected",
    [
        lambda dataset: dataset.isel(x=[0, 1, 5, 6, 20, 50]),
        lambda dataset: dataset.isel(x=[5, 5]),
        lambda dataset: dataset.roll(x=5, roll_coords=True),
        lambda dataset: dataset.pad(x=3),
    ],
)
def test_pixels_of_no_regular_cut_have_no_wcs(tmp_path, selected):
    dataset, _ = observed(tmp_path)
    with pytest.raises(MisuseError, match="no regular cut"):
        selected(dataset).flarefield.wcs  # noqa: B018


def test_no_time_has_no_wcs_and_the_order_of_axes_does_not_matter(tmp_path):
    dataset, _ = observed(tmp_path)
    with pytest.raises(MisuseError, match="without a time"):
        dataset.isel(time=slice(0, 0)).flarefield.wcs  # noqa: B018
    other = dataset.transpose("x", "y", ...).flarefield.wcs
    assert other.wcs.compare(dataset.flarefield.wcs.wcs)


def test_every_time_has_its_own_pointing(tmp_path):
    dataset, headers = observed(tmp_path, drift=(4.0, -2.5))
    x, y = np.meshgrid([0, 44, 89], [0, 30, 59])
    for time in (0, 1):
        wcs = dataset.isel(time=time).flarefield.wcs
        assert abs(Time(wcs.wcs.dateavg) - Time(dataset.time.values[time])) < 1 * u.ms
        for found, expected in zip(of_wcs(wcs, x, y), of_header(headers[time], x, y), strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-3)
    later = dataset.isel(time=slice(1, None), y=slice(10, 50))
    for found, expected in zip(
        of_wcs(later.flarefield.wcs, x, y), of_header(headers[1], x, y + 10), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("when", ["2014-09-06T16:56:00", "2021-03-07T09:00:00"])
def test_mu_is_sunpys(when):
    """Where the line of sight meets the photosphere, sunpy says; the cosine is that with the radius there."""
    time = np.datetime64(when)
    earth = get_earth(when)
    longitude, latitude = np.array([0.0, 300.0, -729.8, 640.0]), np.array([0.0, -500.0, -313.4, 690.0])
    frame = Helioprojective(obstime=when, observer=earth, rsun=695.7 * u.Mm)
    seen = SkyCoord(longitude * u.arcsec, latitude * u.arcsec, frame=frame).make_3d()
    surface = seen.transform_to(
        Heliocentric(observer=earth, obstime=when)
    ).cartesian  # z points to the observer
    towards = np.array([0.0, 0.0, 1.0])[:, None] * earth.radius.to_value(u.Mm) - surface.xyz.to_value(u.Mm)
    normal = surface.xyz.to_value(u.Mm)
    expected = (towards * normal).sum(0) / np.linalg.norm(towards, axis=0) / np.linalg.norm(normal, axis=0)
    np.testing.assert_allclose(cosine_of_pointing((longitude, latitude), time), expected, atol=1e-5)
    assert heliographic_latitude(time) == pytest.approx(sunpy.coordinates.sun.B0(when).deg, abs=0.01)


def test_mu_of_pixels_follows_the_limb(tmp_path):
    dataset, _ = observed(tmp_path, pointing=(-940.0, 20.0), angle=0.0, shape=(40, 200))
    mu = mu_of_pixels(dataset)
    radius = np.hypot(dataset.longitude, dataset.latitude)
    # The Astronomical Almanac's semidiameter on that day: 15' 52.6"
    assert bool((np.isnan(mu) == (radius > 952.6)).where(abs(radius - 952.6) > 1.0, True).all())
    np.testing.assert_allclose(
        mu.where(mu > 0.2), np.sqrt(1.0 - (radius / 952.6) ** 2).where(mu > 0.2), atol=0.01
    )


class TestDerotation:
    ANGLE = 30.0

    @pytest.fixture
    def rotated(self, tmp_path):
        """Numbers that are linear on the sky, over a field turned by 30 degrees, with two bad pixels."""
        dataset, _ = observed(tmp_path, angle=self.ANGLE)
        value = 3.0 * dataset.longitude - 2.0 * dataset.latitude
        spectrum = xr.DataArray(np.array([1.0, 2.0]), dims="wavelength_halpha")
        time = xr.DataArray(np.array([0.0, 1.0]), dims="time")
        intensity = ((value + time) * spectrum).transpose("time", "y", "x", "wavelength_halpha")
        intensity[0, 20, 30, 1] = np.nan
        valid = xr.ones_like(value, dtype=bool).expand_dims(time=2).copy()
        valid[1, 33, 50] = False
        quality = xr.zeros_like(valid, dtype=np.uint16) + np.uint16(32)
        quality.attrs = {"flag_masks": [1, 32], "flag_meanings": "outside_field novel"}
        return dataset.drop_dims(["wavelength_halpha", "wavelength_ca8542"]).assign(
            halpha=intensity, valid=valid, quality=quality
        )

    def place(self, rotated, result):
        """Old pixel (x, y) of every new one, by plane trigonometry, at 0.5 arcsec a pixel."""
        x, y = np.meshgrid(result.x / 0.5, result.y / 0.5)
        back = np.einsum("ij,jyx->iyx", turn(-self.ANGLE), np.stack([x, y]))
        return back[0] + REFERENCE[0], back[1] + REFERENCE[1]

    def test_axes_are_west_and_north_and_the_sky_is_the_same(self, rotated):
        result = derotated(rotated)
        wcs = result.flarefield.wcs
        np.testing.assert_allclose(wcs.wcs.get_pc(), np.eye(2), atol=1e-7)
        np.testing.assert_allclose(wcs.wcs.crval * 3600.0, POINTINGS["disc"], atol=1e-5)
        x, y = np.meshgrid(np.arange(result.sizes["x"]), np.arange(result.sizes["y"]))
        for found, expected in zip(of_wcs(wcs, x, y), (result.longitude, result.latitude), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
        assert result.attrs["derotated_by"] == pytest.approx(30.0)
        expected = 3.0 * result.longitude - 2.0 * result.latitude
        for time in (0, 1):
            seen = result.halpha.isel(time=time, wavelength_halpha=0)
            assert int(seen.notnull().sum()) > 4000
            np.testing.assert_allclose(
                seen.where(seen.notnull(), 0.0),
                (expected + time).where(seen.notnull(), 0.0),
                atol=2e-3,
            )

    def test_masks_are_exact(self, rotated):
        result = derotated(rotated)
        x, y = self.place(rotated, result)
        edge = 1e-4  # on the border itself rounding decides
        inside = (x >= -edge) & (x <= COLUMNS - 1 + edge) & (y >= -edge) & (y <= ROWS - 1 + edge)
        decided = np.minimum.reduce([abs(x), abs(y), abs(x - COLUMNS + 1), abs(y - ROWS + 1)]) > edge
        dead = (abs(x - 30) < 1.0) & (abs(y - 20) < 1.0)
        shaded = (abs(x - 50) < 1.0) & (abs(y - 33) < 1.0)
        halpha = result.halpha.notnull().transpose("time", "wavelength_halpha", "y", "x").to_numpy()
        for time in (0, 1):
            for point in (0, 1):
                expected = inside & ~(dead if (time, point) == (0, 1) else False)
                np.testing.assert_array_equal(halpha[time, point][decided], expected[decided])
            expected = inside & ~(shaded if time == 1 else False)
            np.testing.assert_array_equal(result.valid.to_numpy()[time][decided], expected[decided])
        flags = result.quality.isel(time=0).to_numpy()
        assert flags.dtype == np.uint16
        touched = (x > -1.0) & (x < COLUMNS) & (y > -1.0) & (y < ROWS)
        clear = decided & (
            np.minimum.reduce([abs(x + 1), abs(y + 1), abs(x - COLUMNS), abs(y - ROWS)]) > edge
        )
        np.testing.assert_array_equal(
            flags[clear], (np.where(touched, 32, 0) | np.where(inside, 0, 1))[clear]
        )

    def test_what_has_a_part_of_a_flagged_pixel_is_flagged(self, rotated):
        spike = np.zeros((ROWS, COLUMNS))
        spike[20, 30] = 30_000.0
        defects = np.where(spike > 0, 1, 0).astype(np.uint8)
        defects[40, 60] = 6
        dataset = rotated.assign(
            spike=(("y", "x"), spike),
            defects=(("y", "x"), defects, {"flag_masks": [1, 2, 4], "flag_meanings": "spike dead missing"}),
            label=(("y", "x"), np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)),
        )
        result = derotated(dataset)
        found = result.defects.to_numpy()
        assert found.dtype == np.uint8
        leaked = np.nan_to_num(result.spike.to_numpy()) > 0.1
        assert leaked.sum() >= 3
        np.testing.assert_array_equal(found & 1 > 0, leaked)
        x, y = self.place(rotated, result)
        np.testing.assert_array_equal(found & 6, np.where((abs(x - 60) < 1) & (abs(y - 40) < 1), 6, 0))
        nearest = np.clip(np.rint(y), 0, ROWS - 1) * COLUMNS + np.clip(np.rint(x), 0, COLUMNS - 1)
        half = np.minimum(abs(x % 1.0 - 0.5), abs(y % 1.0 - 0.5)) > 1e-4
        within = half & (x >= 0) & (x <= COLUMNS - 1) & (y >= 0) & (y <= ROWS - 1)
        np.testing.assert_array_equal(result.label.to_numpy()[within], nearest[within])

    def test_from_files_to_a_store_and_back(self, tmp_path):
        """A bright point in turned frames, ingested, derotated, stored and opened: where astropy puts it."""
        rng = np.random.default_rng(5)
        point = (71, 22)  # column, row
        for line, axis in (("h", WAVELENGTH_HALPHA), ("c", WAVELENGTH_CA8542)):
            cube = 1000.0 + 20.0 * rng.standard_normal((axis.size, ROWS, COLUMNS))
            y, x = np.mgrid[:ROWS, :COLUMNS]
            cube += 20000.0 * np.exp(-0.5 * ((x - point[0]) ** 2 + (y - point[1]) ** 2) / 1.5**2)
            path = write_fchroma(
                tmp_path / f"{line}.fits",
                cube,
                axis,
                START,
                pointing=POINTINGS["limb"],
                scale=0.5,
                reference_pixel=REFERENCE,
                rotation=turn(self.ANGLE),
            )
        ingest([tmp_path], tmp_path / "obs.zarr", call="")
        result = derotated(open_observation(tmp_path / "obs.zarr"))
        result.to_zarr(tmp_path / "derotated.zarr", zarr_format=3)
        result = open_observation(tmp_path / "derotated.zarr")
        image = result.halpha.isel(time=0, wavelength_halpha=7).fillna(0.0).to_numpy() - 1000.0
        weight = np.where(image > 1000.0, image, 0.0)
        y, x = (float((weight * axis).sum() / weight.sum()) for axis in np.indices(image.shape))
        expected = of_header(fits.getheader(path), *point)
        for found, wanted in zip(of_wcs(result.flarefield.wcs, x, y), expected, strict=True):
            assert found == pytest.approx(wanted, abs=0.02)
        row, column = round(y), round(x)
        assert float(result.longitude[row, column]) == pytest.approx(expected[0], abs=0.36)
        assert bool(result.valid[0, row, column])

    def test_dask_arrays_stay_lazy_and_no_rotation_changes_nothing(self, rotated, tmp_path):
        lazy = derotated(rotated.chunk({"y": 32, "x": 32}))
        assert lazy.halpha.chunks is not None
        xr.testing.assert_equal(lazy.compute(), derotated(rotated))
        (tmp_path / "straight").mkdir()
        dataset, _ = observed(tmp_path / "straight", angle=0.0)
        dataset = dataset.assign(halpha=(("y", "x"), np.random.default_rng(3).normal(size=(ROWS, COLUMNS))))
        straight = derotated(dataset)
        np.testing.assert_array_equal(straight.halpha, dataset.halpha)
        for name in ("x", "y", "longitude", "latitude"):
            np.testing.assert_allclose(straight[name], dataset[name], atol=1e-5)
        again = derotated(straight)
        np.testing.assert_allclose(again.halpha, straight.halpha, rtol=0, atol=1e-9)
        np.testing.assert_allclose(again.longitude, straight.longitude, atol=1e-9)

    @pytest.mark.parametrize("angle", [0.0, 90.0, 180.0, -90.0])
    @pytest.mark.parametrize("mirrored", [False, True])
    def test_right_angles_keep_every_pixel(self, tmp_path, angle, mirrored):
        dataset, _ = observed(tmp_path, angle=angle)
        rng = np.random.default_rng(4)
        image = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)
        image[0, 3] = image[20, 30] = np.nan
        flags = rng.integers(0, 8, (ROWS, COLUMNS)).astype(np.uint8)
        dataset = dataset.assign(
            halpha=(("y", "x"), image),
            valid=(("y", "x"), np.isfinite(image)),
            defects=(("y", "x"), flags, {"flag_masks": [1, 2, 4], "flag_meanings": "spike dead missing"}),
        )
        result = derotated(dataset.isel(x=slice(None, None, -1)) if mirrored else dataset)
        # Rows run to the north, so that counterclockwise on the sky is clockwise in NumPy's order.
        turned = {
            name: np.rot90(dataset[name].to_numpy(), -round(angle / 90.0))
            for name in ("halpha", "valid", "defects", "longitude", "latitude")
        }
        for name in ("halpha", "valid", "defects"):
            np.testing.assert_array_equal(result[name], turned[name])
        for name in ("longitude", "latitude"):
            np.testing.assert_allclose(result[name], turned[name], atol=1e-5)
        np.testing.assert_allclose(np.diff(result.x), 0.5)
        x, y = np.meshgrid(np.arange(result.sizes["x"]), np.arange(result.sizes["y"]))
        for found, expected in zip(
            of_wcs(result.flarefield.wcs, x, y), (result.longitude, result.latitude), strict=True
        ):
            np.testing.assert_allclose(found, expected, atol=1e-5)

    def test_a_later_time_keeps_its_place(self, tmp_path):
        dataset, _ = observed(tmp_path, drift=(4.0, -2.5))
        for time in (0, 1):
            later = dataset.isel(time=slice(time, None))
            result = derotated(later)
            for number in range(later.sizes["time"]):
                there = result.isel(time=number).flarefield.wcs
                old = later.isel(time=number).flarefield.wcs
                np.testing.assert_allclose(there.wcs.crval, old.wcs.crval, atol=1e-6)
