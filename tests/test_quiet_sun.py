"""Calibration by the quiet Sun: published numbers, a model atmosphere, and scenes whose truth is known."""

from __future__ import annotations

from pathlib import Path

import astropy.units as u
import numpy as np
import pytest
import xarray as xr
from astropy.table import Table
from scipy.interpolate import CubicSpline

import pipeline
from pipeline.calibration import calibrate, limb_darkening, quiet_pixels, quiet_sun_profile
from pipeline.demo_series import held_out, line_profiles, shows_emission
from pipeline.errors import InputError, MisuseError
from pipeline.grids.store import BUNDLED_GRID, open_grid
from pipeline.ingest import ingest
from pipeline.invert import invert
from pipeline.observation import open_observation
from pipeline.results import open_map
from tests.quiet_scene import AXES, CONTINUUM, PIXEL, REST, quiet_scene, quiet_spectrum, write_scene

COUNTS = {"halpha": 1.1e-3, "ca8542": 1.9e-3}
REAL = Path(__file__).parents[2] / "shared" / "data" / "crisp"
VELOCITY = {"halpha": 1.2, "ca8542": -0.9}


@pytest.fixture(scope="module")
def table():
    return Table.read(Path(pipeline.__file__).parent / "data" / "quiet_sun.ecsv", format="ascii.ecsv")


class TestTable:
    def test_atlas(self, table):
        """Continua of 4.09e-8 and 4.23e-8 W m-2 Hz-1 sr-1, cores of 0.160 and 0.188 of them (Neckel 1999)."""
        for line, level, core in (("halpha", 4.09e-8, 0.160), ("ca8542", 4.23e-8, 0.188)):
            # 1 W m-2 = 1e3 erg s-1 cm-2; c / lambda^2 in Hz per Angstrom
            per_angstrom = level * 1e3 * 2.99792458e18 / REST[line] ** 2
            assert table.meta["continuum"][line] == pytest.approx(per_angstrom, rel=2e-3)
            here = table[table["line"] == line]
            assert np.min(here["intensity"]) == pytest.approx(core, abs=2e-3)

    def test_cores_are_where_the_atlas_has_them(self, table):
        """Parabolas through the atlas's cores: 6562.828 and 8542.132 Angstrom in air, less 633 m/s."""
        for line, vacuum in (("halpha", 6564.641), ("ca8542", 8544.479)):
            here = table[table["line"] == line]
            near = np.abs(here["offset"] - 0.02) < 0.1
            curve, tilt, _ = np.polyfit(here["offset"][near], here["intensity"][near], 2)
            found = -0.5 * tilt / curve
            expected = vacuum * (1.0 - 0.633 / 299792.458) - REST[line]
            assert (found - expected) / REST[line] * 299792.458 == pytest.approx(0.0, abs=0.15)

    def test_limb_darkening(self):
        """1 - u - v + u mu + v mu^2, between 0.6, 0.8 and 1 micron: Allen's Astrophysical Quantities."""
        mu = np.linspace(0.2, 1.0, 9)
        for line, first, second in (("halpha", 0.838, -0.228), ("ca8542", 0.706, -0.215)):
            np.testing.assert_allclose(
                limb_darkening(line, mu), 1.0 - first - second + first * mu + second * mu**2, rtol=0.02
            )
            assert limb_darkening(line, 1.0) == pytest.approx(1.0, abs=1e-4)

    def test_lines_darken_as_in_falc(self, table):
        """Solved anew, with fewer rays; and FAL-C's own wings and continuum are right, as is claimed."""
        pytest.importorskip("lightweaver")
        from tests.quiet_sun_table import darkening

        offsets = np.array([-1.2, -0.9, 0.0, 0.9, 1.2])
        for line, (ratio, continuum, centre) in darkening(mu=(0.4, 0.7), offsets=offsets, rays=3).items():
            here = table[table["line"] == line]
            for number, mu in enumerate((0.4, 0.7)):
                known = np.interp(offsets, here["offset"], here[f"darkening_{mu}"])
                np.testing.assert_allclose(ratio[:, number], known, rtol=0.01)
                assert continuum[number] == pytest.approx(float(limb_darkening(line, mu)), rel=0.01)
            wings = np.abs(offsets) > 0.5
            np.testing.assert_allclose(
                centre[wings], np.interp(offsets, here["offset"], here["intensity"])[wings], rtol=0.05
            )

    @pytest.mark.parametrize("mu", [1.0, 0.6])
    def test_profile_is_the_tables_through_the_instrument(self, mu):
        for line, axis in AXES.items():
            offset = axis - REST[line]
            np.testing.assert_allclose(
                quiet_sun_profile(line, offset, mu), quiet_spectrum(line, axis, mu), rtol=0.012
            )
        assert quiet_sun_profile("halpha", 1.2, mu).shape == ()
        with pytest.raises(InputError, match="not a place on the disc"):
            quiet_sun_profile("halpha", 0.0, 0.0)
        with pytest.raises(InputError, match="too short"):
            quiet_sun_profile("halpha", 3.0, mu)
        with pytest.raises(MisuseError, match="not known"):
            quiet_sun_profile("hbeta", 0.0, mu)


class TestScenes:
    @pytest.mark.parametrize(("mu", "darkening"), [(1.0, 1.0), (0.6, 1.0), (0.6, 0.8), (0.3, 1.2)])
    def test_known_errors_are_found(self, mu, darkening):
        """A wrong scale and zero of each line, in a field with a ribbon, plage, a spot and a filament.

        Where the Sun darkens otherwise than the table says, the result is off by what it says that it may be.
        """
        velocity = {"halpha": 1.5, "ca8542": -0.8}
        dataset, _ = quiet_scene(counts=COUNTS, velocity=velocity, mu=mu, darkening=darkening)
        found = calibrate(dataset)
        assert found.mu == pytest.approx(mu, abs=0.02)
        scales = {}
        for line in AXES:
            calibration = getattr(found, line)
            scales[line] = calibration.scale * COUNTS[line]
            assert abs(np.log(scales[line])) < 1.5 * calibration.uncertainty
            assert calibration.velocity_offset == pytest.approx(velocity[line], abs=0.06)
            assert calibration.core == pytest.approx(1.0, abs=0.08)
            assert abs(calibration.slope) < 0.005
        relative = abs(np.log(scales["halpha"] / scales["ca8542"]))
        assert relative < 1.5 * found.relative_uncertainty
        assert found.relative_uncertainty < 0.08
        if darkening == 1.0:
            assert relative < 0.005

    def test_quiet_pixels_are_the_quiet_ones(self):
        dataset, active = quiet_scene()
        profiles = {line: dataset[line].isel(time=0).to_numpy() for line in AXES}
        usable = dataset.valid.isel(time=0).to_numpy()
        quiet = quiet_pixels(profiles, AXES, usable, mu=0.6, pixel=PIXEL)
        assert quiet[~active].mean() > 0.9
        assert quiet[active].mean() < 0.05
        # Whatever the units of either line.
        others = {"halpha": 7.0 * profiles["halpha"], "ca8542": 0.01 * profiles["ca8542"]}
        np.testing.assert_array_equal(quiet_pixels(others, AXES, usable, mu=0.6, pixel=PIXEL), quiet)

    def test_an_upflow_is_a_blueshift_is_a_positive_velocity(self):
        """The quiet Sun's lines moved to the blue by 0.0438 Angstrom at H-alpha: 2 km/s towards us."""
        shifted = {line: AXES[line] + REST[line] * 2.0 / 299792.458 for line in AXES}
        dataset, _ = quiet_scene(active=False, times=1)
        for line, axis in shifted.items():
            spectrum = quiet_spectrum(line, axis, 0.6)
            # the core, at fixed wavelengths: the blue flank is darker, the red one brighter
            at_rest = quiet_spectrum(line, AXES[line], 0.6)
            blue, red = (np.argmin(np.abs(AXES[line] - REST[line] - side * 0.4)) for side in (-1, 1))
            assert spectrum[blue] < at_rest[blue]
            assert spectrum[red] > at_rest[red]
            dataset[line] = dataset[line] * (spectrum / at_rest).astype(np.float32)
        found = calibrate(dataset)
        assert found.halpha.velocity_offset == pytest.approx(2.0, abs=0.06)
        assert found.ca8542.velocity_offset == pytest.approx(2.0, abs=0.06)
        # Wavelengths times (1 + v / c) put the lines back.
        corrected = dataset.assign_coords(
            {f"wavelength_{line}": AXES[line] * (1.0 + 2.0 / 299792.458) for line in AXES}
        )
        assert calibrate(corrected).halpha.velocity_offset == pytest.approx(0.0, abs=0.06)

    def test_pixels_with_wavelengths_of_their_own(self):
        """Cavity errors that grow across the field, and a map that says by how much."""
        dataset, _ = quiet_scene(counts=COUNTS, active=False, times=1)
        columns = np.linspace(0.01, 0.07, dataset.sizes["x"])
        for line, axis in AXES.items():
            # What lies at a pixel's axis is the Sun at the axis plus the map.
            seen = np.stack([quiet_spectrum(line, axis + error, 0.6) for error in columns])
            ratio = seen / quiet_spectrum(line, axis, 0.6)
            dataset[line] = dataset[line] * ratio.astype(np.float32)
        blind = calibrate(dataset)
        assert blind.ca8542.velocity_offset == pytest.approx(0.04 / REST["ca8542"] * 299792.458, abs=0.3)
        for line in AXES:
            shift = np.broadcast_to(columns.astype(np.float32), dataset.valid.shape)
            dataset[f"wavelength_shift_{line}"] = (("time", "y", "x"), shift, {"units": "Angstrom"})
        found = calibrate(dataset)
        for line in AXES:
            assert getattr(found, line).velocity_offset == pytest.approx(0.0, abs=0.08)
            assert getattr(found, line).scale * COUNTS[line] == pytest.approx(1.0, abs=0.02)

    def test_pixels_with_defects_do_not_count(self):
        """A sixth of the pixels a tenth too bright, which no criterion of the quiet Sun would tell."""
        dataset, _ = quiet_scene(counts=COUNTS, active=False, times=1)
        wrong = np.zeros(dataset.valid.shape, dtype=np.uint16)
        wrong[:, ::3, ::2] = 4
        dataset["halpha"] = dataset.halpha * np.where(wrong > 0, 1.1, 1.0).astype(np.float32)[..., None]
        blind = calibrate(dataset)
        dataset["defects"] = (("time", "y", "x"), wrong)
        found = calibrate(dataset)
        assert found.halpha.scale / blind.halpha.scale == pytest.approx(1.0 + 0.1 / 6.0, abs=0.005)
        assert found.ca8542.scale / blind.ca8542.scale == pytest.approx(1.0, abs=0.005)

    def test_spoilt_scans_do_not_count(self):
        dataset, _ = quiet_scene(counts=COUNTS, times=3, shape=(80, 100))
        dataset.halpha[1] = np.nan
        dataset.ca8542[2, :40] *= 0.2
        found = calibrate(dataset)
        assert found.times == (0, 2)
        assert found.mu == pytest.approx(0.6, abs=0.02)
        whole = calibrate(dataset.isel(time=[0]))
        assert found.blocks <= whole.blocks
        for line in AXES:
            ratio = getattr(found, line).scale / getattr(whole, line).scale
            assert ratio == pytest.approx(1.0, abs=0.02)

    def test_a_prefilter_left_in_shows_as_a_slope(self):
        dataset, _ = quiet_scene(slope=0.05)
        found = calibrate(dataset)
        assert found.halpha.slope == pytest.approx(0.05, abs=0.005)
        assert "halpha: the wings tilt by +5 %" in found.summary()
        assert "ca8542: the wings tilt" not in found.summary()
        assert found.ca8542.slope == pytest.approx(0.0, abs=0.005)

    @pytest.mark.parametrize("mu", [1.0, 0.6])
    def test_stray_light_shows_as_cores_that_are_filled(self, mu):
        """Grey light as bright as the outermost wings, 5 % and 15 %; of scenes without, nothing is said."""
        scene, _ = quiet_scene(mu=mu, times=1)
        assert calibrate(scene).remarks() == ()
        expected, level = {}, {}
        for line, axis in AXES.items():
            sun, offset = quiet_spectrum(line, axis, mu), np.abs(axis - REST[line])
            seen = 0.95 * sun + 0.05 * sun[[0, -1]].mean()
            core, wings = offset <= 0.35, (offset >= 0.9) & (offset <= 1.7)
            expected[line] = seen[core].mean() / sun[core].mean() / (seen[wings] / sun[wings]).mean()
            level[line] = scene[line].isel({f"wavelength_{line}": [0, -1]}).median()
        found = {
            share: calibrate(
                scene.assign({line: (1 - share) * scene[line] + share * level[line] for line in AXES})
            )
            for share in (0.05, 0.15)
        }
        for line in AXES:
            assert getattr(found[0.05], line).core == pytest.approx(expected[line], abs=0.04)
        for share in found:
            assert "stray light" in next(said for said in found[share].remarks() if "halpha" in said)
        assert "halpha: the mean core is 1.2" in found[0.15].summary()

    def test_a_field_that_is_all_plage_shows_as_cores_that_are_filled(self, tmp_path, caplog):
        scene, _ = quiet_scene(active=False, times=1)
        for line, axis in AXES.items():
            core = np.exp(-(((axis - REST[line]) / 0.35) ** 2))
            scene[line] = scene[line] * (1.1 * (1.0 + 0.2 * core)).astype(np.float32)
        ingest(
            [write_scene(tmp_path / "scene", scene)], tmp_path / "obs.zarr", call="", calibrate="quiet-sun"
        )
        for line in AXES:
            (said,) = [text for text in caplog.messages if f"{line}: the mean core" in text]
            assert "plage" in said

    def test_intensities_in_physical_units_have_a_scale_of_one(self):
        dataset, _ = quiet_scene(counts={"halpha": 1.0, "ca8542": 1.0}, times=1)
        found = calibrate(dataset)
        assert found.halpha.scale == pytest.approx(1.0, abs=0.015)
        assert found.ca8542.scale == pytest.approx(1.0, abs=0.015)
        assert CONTINUUM["halpha"] > CONTINUUM["ca8542"]

    def test_without_quiet_sun_it_is_refused(self):
        dataset, _ = quiet_scene(times=1)
        ribbon = dataset.isel(y=slice(24, 36))
        with pytest.raises(InputError, match="too little quiet Sun") as refusal:
            calibrate(ribbon)
        assert "assumed" in str(refusal.value)
        with pytest.raises(InputError, match="too little quiet Sun"):
            calibrate(dataset.isel(y=slice(50, 71), x=slice(50, 71)))
        short = dataset.isel(wavelength_halpha=slice(4, 11))
        with pytest.raises(InputError, match="too few wavelengths"):
            calibrate(short)
        with pytest.raises(InputError, match="on the disc"):
            calibrate(dataset.assign_coords(mu=("time", [np.nan])))
        in_air = dataset.assign_coords(wavelength_ca8542=AXES["ca8542"] + 0.5)
        with pytest.raises(InputError, match="quiet Sun"):
            calibrate(in_air)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    dataset, _ = quiet_scene(counts=COUNTS, velocity=VELOCITY, times=1)
    return write_scene(tmp_path_factory.mktemp("scene"), dataset)


@pytest.fixture(scope="module")
def store(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrated") / "obs.zarr"
    report = ingest([files], path, call="", calibrate="quiet-sun", wavelength_zero="quiet-sun")
    return path, report


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "obs.zarr"
    ingest([files], path, call="")
    return path


class TestIngest:
    """From files to a store and a map: the scene's known errors, in F-CHROMA's files."""

    def test_the_scene_is_recovered_to_the_stated_uncertainty(self, store, plain):
        dataset, raw = open_observation(store[0]), open_observation(plain)
        record = dataset.attrs["quiet_sun"]
        assert dataset.attrs["relative_calibration"] == "quiet_sun"
        assert dataset.attrs["wavelength_zero"] == "quiet_sun"
        assert dataset.attrs["relative_calibration_uncertainty"] == record["relative_uncertainty"]
        ratios = {}
        for line in AXES:
            assert u.Unit(dataset[line].attrs["units"]) == u.Unit("erg s-1 cm-2 sr-1 Angstrom-1")
            ratios[line] = float(np.nanmedian(dataset[line].values / raw[line].values)) * COUNTS[line]
            assert abs(np.log(ratios[line])) < 2.0 * record[line]["uncertainty"]
            assert record[line]["velocity_offset"] == pytest.approx(VELOCITY[line], abs=0.1)
            moved = dataset[f"wavelength_{line}"].values / AXES[line] - 1.0
            np.testing.assert_allclose(
                moved, dataset[f"wavelength_{line}"].attrs["velocity_offset"] / 299792.458, rtol=1e-6
            )
            assert u.Unit(dataset[f"wavelength_{line}"].attrs["velocity_offset_units"]) == u.km / u.s
            assert "velocity_offset_units" not in raw[f"wavelength_{line}"].attrs
            saturation = dataset[line].attrs["saturation"] / raw[line].attrs["saturation"]
            assert saturation == pytest.approx(ratios[line] / COUNTS[line], rel=1e-5)
        relative = abs(np.log(ratios["halpha"] / ratios["ca8542"]))
        assert relative < record["relative_uncertainty"]
        per_angstrom = u.erg / u.s / u.cm**2 / u.sr / u.Angstrom
        assert {name: u.Unit(unit) for name, unit in record["units"].items()} == {
            "scale": per_angstrom,
            "velocity_offset": u.km / u.s,
            "velocity_uncertainty": u.km / u.s,
            "slope": 1 / u.Angstrom,
            "area": u.arcsec**2,
        }
        assert "quiet Sun" in store[1].summary()
        assert "km/s" in store[1].summary()

    def test_without_being_asked_nothing_changes(self, plain):
        dataset = open_observation(plain)
        assert dataset.attrs["relative_calibration"] == "assumed"
        assert "quiet_sun" not in dataset.attrs
        assert dataset.halpha.dtype == np.float32
        np.testing.assert_array_equal(dataset.wavelength_halpha, AXES["halpha"])

    def test_inversion_takes_the_error_that_was_measured(self, store, plain, fake_model, client, tmp_path):
        uncertainty = open_observation(store[0]).attrs["relative_calibration_uncertainty"]
        settings = {"model": fake_model, "cluster": client, "draws": 4, "region": "0:8,50:58", "times": "0"}
        invert(store[0], tmp_path / "map.zarr", **settings)
        made = open_map(tmp_path / "map.zarr")
        assert made.attrs["settings"]["calibration_error"] == uncertainty
        assert made.attrs["relative_calibration"] == "quiet_sun"
        invert(plain, tmp_path / "plain.zarr", **settings)
        assert open_map(tmp_path / "plain.zarr").attrs["settings"]["calibration_error"] is None
        # The map is where the observation is, also in a part of it.
        for dataset in (made, open_observation(store[0])):
            part = dataset.isel(y=slice(5, 60), x=slice(11, None))
            x, y = np.meshgrid(np.arange(30), np.arange(20))
            found = part.flarefield.wcs.wcs_pix2world(x, y, 0)
            np.testing.assert_allclose(found[0] * 3600.0, part.longitude[:20, :30], atol=1e-4)
            np.testing.assert_allclose(found[1] * 3600.0, part.latitude[:20, :30], atol=1e-4)

    def test_a_velocity_that_is_the_instruments_is_taken_out(self, client, tmp_path):
        """Files whose wavelengths show 2 km/s of upflow that is not there: 96 atmospheres of the bundled grid
        in a quiet field. Along the vertical that is 2 / mu too much; the quiet Sun takes it away.
        """
        error, mu = 2.0, 0.6
        dataset, _ = quiet_scene(
            counts=dict.fromkeys(AXES, 1e-3), velocity=dict.fromkeys(AXES, error), active=False, times=1
        )
        known = held_out(open_grid(BUNDLED_GRID))
        chosen = known.isel(sample=np.flatnonzero(shows_emission(line_profiles(known, mu)))[:96])
        for line, profiles in line_profiles(chosen, mu).items():
            seen = CubicSpline(AXES[line], profiles, axis=-1)(AXES[line] * (1.0 + error / 299792.458))
            dataset[line][0, 40:48, 60:72] = 1e-3 * seen.reshape(8, 12, -1)
        files = write_scene(tmp_path / "scene", dataset)
        found = {}
        for zero in ("none", "quiet-sun"):
            ingest([files], tmp_path / f"{zero}.zarr", call="", wavelength_zero=zero)
            invert(
                tmp_path / f"{zero}.zarr",
                tmp_path / f"{zero}-map.zarr",
                cluster=client,
                draws=64,
                region="40:48,60:72",
            )
            made = open_map(tmp_path / f"{zero}-map.zarr").velocity.isel(time=0)
            patch = made.isel(y=slice(40, 48), x=slice(60, 72)).sel(quantile=0.5)
            found[zero] = patch.sel(height=0.9, method="nearest").values.ravel()
        truth = chosen.velocity.sel(height=0.9, method="nearest").values
        # Atmospheres of one pixel each, beside quite other ones: some are taken for spikes and dead pixels.
        answered = np.isfinite(found["none"] + found["quiet-sun"])
        assert answered.sum() > 48
        truth, found = truth[answered], {zero: values[answered] for zero, values in found.items()}
        change = found["none"] - found["quiet-sun"]
        # The prior of the grid takes some of the error back.
        assert 0.5 * error / mu < np.median(change) < 1.2 * error / mu
        assert abs(np.median(found["quiet-sun"] - truth)) < 0.5 < np.median(found["none"] - truth)

    def test_a_store_made_otherwise_is_not_taken_for_it(self, files, plain, store):
        with pytest.raises(MisuseError, match="otherwise"):
            ingest([files], plain, call="", calibrate="quiet-sun")
        again = ingest([files], store[0], call="", calibrate="quiet-sun", wavelength_zero="quiet-sun")
        assert again.complete_before

    def test_a_refusal_keeps_what_is_done(self, tmp_path):
        """All ribbon: nothing to calibrate with. The same command without it goes on from there."""
        dataset, _ = quiet_scene(times=1)
        files = write_scene(tmp_path / "scene", dataset.isel(y=slice(24, 36)))
        with pytest.raises(InputError, match="too little quiet Sun"):
            ingest([files], tmp_path / "obs.zarr", call="", calibrate="quiet-sun")
        report = ingest([files], tmp_path / "obs.zarr", call="")
        assert report.resumed == 1
        assert open_observation(tmp_path / "obs.zarr").attrs["relative_calibration"] == "assumed"

    @pytest.mark.observation
    @pytest.mark.skipif(not REAL.is_dir(), reason="the real pair is not here")
    def test_the_real_pair_is_all_ribbon(self, tmp_path):
        with pytest.raises(InputError, match="too little quiet Sun") as refusal:
            ingest([REAL], tmp_path / "obs.zarr", call="", calibrate="quiet-sun")
        assert refusal.value.where == str(tmp_path / "obs.zarr")

    def test_a_calibration_cut_off_and_done_again_is_the_same(self, files, store, tmp_path, monkeypatch):
        """The journal keeps the times; what was written of the calibration does not count twice."""
        monkeypatch.setattr("pipeline.ingest._finish", interrupted)
        settings = {"call": "", "calibrate": "quiet-sun", "wavelength_zero": "quiet-sun"}
        with pytest.raises(KeyboardInterrupt):
            ingest([files], tmp_path / "obs.zarr", **settings)
        monkeypatch.undo()
        assert ingest([files], tmp_path / "obs.zarr", **settings).resumed == 1
        xr.testing.assert_identical(
            open_observation(tmp_path / "obs.zarr").load(), open_observation(store[0]).load()
        )


def interrupted(*_arguments):
    raise KeyboardInterrupt


def test_times_off_the_disc_and_without_intensities_are_passed_over():
    """Of eight times two know where on the disc they are, and see it."""
    dataset, _ = quiet_scene(times=2)
    whole = calibrate(dataset)
    eight = dataset.isel(time=[0, 0, 0, 0, 0, 0, 0, 1]).copy(deep=True)
    eight["mu"] = ("time", [0.6, *[np.nan] * 6, 0.6])
    found = calibrate(eight)
    assert found.times == (0, 7)
    assert found.halpha == whole.halpha
    eight["mu"] = ("time", [0.6] * 8)
    eight["valid"][1:7] = False
    eight["ca8542"][1:7] = np.nan
    found = calibrate(eight)
    assert found.times == (0, 7)
    assert found.ca8542 == whole.ca8542
    eight["mu"] = ("time", [np.nan] * 8)
    with pytest.raises(InputError, match="on the disc is not known"):
        calibrate(eight)
