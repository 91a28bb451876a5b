"""Training grids: the family of atmospheres, their synthesis, the store and the job that fills it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import astropy.units as u
import numpy as np
import pytest
import xarray as xr
import zarr
from astropy import constants
from numcodecs import BitRound

from inn.layout import CA8542, HALPHA, HEIGHTS
from pipeline.errors import MisuseError, StoreError
from pipeline.grids import atmosphere, lightweaver, store
from pipeline.grids.atmosphere import QUIET_SUN, AtmosphereParameters, design

FLARE = AtmosphereParameters(7500.0, 1500.0, 0.7, 1.4, 6.6, 0.1, 20.0, 50.0, 0.0, 5.0)


def rms(lines, reference):
    """Greatest difference over mu, root mean square over the line, relative to the line's maximum."""
    return np.max(np.sqrt(np.mean((lines - reference) ** 2, axis=1)) / reference.max(axis=1))


def but(parameters, **changes):
    return AtmosphereParameters(**{**parameters.__dict__, **changes})


# The family


def test_design_is_one_sequence():
    whole = design(40)
    assert design(7, first=21) == whole[21:28]
    assert design(40, seed=1) != whole
    assert len({sample.values() for sample in whole}) == 40


def test_design_fills_every_range_evenly():
    samples = np.array([sample.values() for sample in design(256)])
    for column, parameter in enumerate(atmosphere.PARAMETERS):
        unit = ((samples[:, column] - parameter.low) / (parameter.high - parameter.low)) ** (
            1 / parameter.power
        )
        # 256 points of a scrambled Sobol sequence: exactly one in each 256th of every axis.
        assert sorted(np.floor(unit * 256 + 1e-9).astype(int)) == list(range(256)), parameter.name


def test_parameters_have_units_astropy_reads():
    assert [p.name for p in atmosphere.PARAMETERS] == list(AtmosphereParameters.__dataclass_fields__)
    for parameter in atmosphere.PARAMETERS:
        u.Unit(parameter.units)


def test_quiet_sun_is_close_to_falc():
    # FALC (Fontenla, Avrett & Loeser 1993), heights in Mm above tau_500 = 1: K, and log10 n_H (cm-3).
    falc = {
        0.0: (6530, 17.07),
        0.5: (4510, 15.48),
        1.0: (5920, 13.61),
        1.5: (6900, 12.26),
        2.0: (7980, 11.35),
    }
    heights = np.array(list(falc))
    hot = atmosphere.temperature(QUIET_SUN, heights)
    hydrogen = np.log10(atmosphere.hydrogen_density(QUIET_SUN, heights))
    for i, (kelvin, density) in enumerate(falc.values()):
        assert hot[i] == pytest.approx(kelvin, rel=0.16)
        assert hydrogen[i] == pytest.approx(density, abs=0.4)


@pytest.mark.parametrize("parameters", [QUIET_SUN, but(FLARE, density_departure=0.0)])
def test_density_is_hydrostatic(parameters):
    """dP/dz = -rho g with the pressure of gas and microturbulence, above the photosphere."""
    heights = np.linspace(0.25, 6.0, 20001)
    hot = atmosphere.temperature(parameters, heights)
    hydrogen = atmosphere.hydrogen_density(parameters, heights)
    rho = hydrogen * 1.41 * constants.m_p.cgs.value * (1 + 1 / 1836)
    turbulence = atmosphere.microturbulence(parameters, heights) * 1e5
    gas = hydrogen * (1.09 + atmosphere.ionisation(hot)) * constants.k_B.cgs.value * hot
    pressure = gas + 0.5 * rho * turbulence**2
    weight = np.trapezoid(rho * 2.74e4, heights * 1e8)
    assert pressure[0] - pressure[-1] == pytest.approx(weight, rel=5e-3)


def test_density_departure_scales_the_chromosphere_only():
    heights = np.array([0.0, 1.8])
    ratio = atmosphere.hydrogen_density(
        but(FLARE, density_departure=0.6), heights
    ) / atmosphere.hydrogen_density(but(FLARE, density_departure=0.1), heights)
    assert ratio == pytest.approx([1.0, 10**0.5], rel=1e-3)


def test_velocities_point_where_they_should():
    below, above = np.array([FLARE.transition_region_height - 0.12]), np.array([6.0])
    assert atmosphere.velocity(FLARE, below)[0] == pytest.approx(-FLARE.condensation, rel=0.01)
    assert 0 < atmosphere.velocity(FLARE, above)[0] < FLARE.evaporation
    still = but(FLARE, condensation=0.0, evaporation=0.0)
    assert np.all(atmosphere.velocity(still, HEIGHTS) == 0.0)


def test_depth_points_resolve_temperature():
    for parameters in [QUIET_SUN, FLARE, *design(4)]:
        heights = atmosphere.depth_points(parameters, 100)
        assert heights.shape == (100,)
        assert np.all(np.diff(heights) < 0)
        assert (heights[-1], heights[0]) == (atmosphere.BOTTOM, atmosphere.TOP)
        assert heights[-1] < HEIGHTS[0]
        assert heights[0] == HEIGHTS[-1]
        assert np.abs(np.diff(np.log(atmosphere.temperature(parameters, heights)))).max() < 0.45


# Synthesis


def test_intensity_per_angstrom_is_astropys():
    wavelength = np.array([6564.6, 8544.4])
    per_frequency = np.array([[3e-8, 2e-8], [1e-8, 5e-9]])
    unit = u.W / u.m**2 / u.Hz
    wanted = (per_frequency * unit).to(
        u.erg / u.s / u.cm**2 / u.AA, equivalencies=u.spectral_density(wavelength * u.AA)
    )
    assert lightweaver.intensity_per_angstrom(per_frequency, wavelength) == pytest.approx(
        wanted.value, rel=1e-9
    )


def test_grid_covers_the_networks_windows():
    halpha, calcium = lightweaver.rest_wavelengths()
    assert halpha == pytest.approx(HALPHA.rest_wavelength, abs=0.1)
    assert calcium == pytest.approx(CA8542.rest_wavelength, abs=0.1)
    # with room for a bulk Doppler shift of 15 km/s
    assert lightweaver.HALPHA_OFFSETS[-1] >= HALPHA.half_width + 15 / 299792.458 * halpha
    assert lightweaver.CA8542_OFFSETS[-1] >= CA8542.half_width + 13 / 299792.458 * calcium
    assert min(lightweaver.MU) <= 0.2
    assert max(lightweaver.MU) == 1.0


@pytest.fixture(scope="module")
def quiet():
    return lightweaver.synthesise(QUIET_SUN)


@pytest.fixture(scope="module")
def flare():
    return lightweaver.synthesise(FLARE)


def test_quiet_sun_looks_like_the_sun(quiet):
    assert quiet.status == 0
    # Disc-centre continuum (Neckel & Labs 1984): 2.8e6 erg s-1 cm-2 sr-1 A-1 at 6560 A, 1.8e6 at 8540 A; the
    # windows end in the lines' wings, 10 to 40 % below it.
    assert 2.0e6 < quiet.halpha[-1, 0] < 2.8e6
    assert 0.9e6 < quiet.ca8542[-1, 0] < 1.7e6
    for line in (quiet.halpha, quiet.ca8542):
        depth = line[-1].min() / line[-1, 0]
        assert 0.1 < depth < 0.45
        # at rest: symmetric about the model atom's own wavelength
        assert line == pytest.approx(line[:, ::-1], rel=0.02)
    assert quiet.halpha[-1].argmin() == 36
    # the limb is darker
    assert np.all(np.diff(quiet.halpha[:, 0]) > 0)


def test_flare_is_in_emission(flare):
    assert flare.status == 0
    assert flare.halpha[-1].max() > 1.2 * flare.halpha[-1, 0]
    assert flare.ca8542[-1].max() > 1.5 * flare.ca8542[-1, 0]
    assert 12.5 < np.log10(flare.electron_density[(HEIGHTS > 0.8) & (HEIGHTS < 1.3)]).max() < 15


def test_corona_is_fully_ionised(flare):
    hydrogen = atmosphere.hydrogen_density(FLARE, HEIGHTS)
    corona = HEIGHTS > 1.6
    # a tenth of helium with two electrons each
    assert flare.electron_density[corona] / hydrogen[corona] == pytest.approx(1.17, abs=0.05)


def test_upflow_is_blueshift(quiet):
    speed = 15.0
    moving = lightweaver.synthesise(but(QUIET_SUN, chromospheric_velocity=speed))
    assert moving.velocity[np.argmin(abs(HEIGHTS - 0.9))] == pytest.approx(speed, rel=0.01)
    offsets, rest = lightweaver.CA8542_OFFSETS, lightweaver.rest_wavelengths()[1]
    core = offsets[moving.ca8542[-1].argmin()]
    # The core forms between 0.9 and 1.4 Mm, where this family's flow is 15 to 8 km/s.
    assert -speed * rest / 299792.458 <= core <= -0.4 * speed * rest / 299792.458


def test_lines_agree_with_a_fine_reference(flare):
    reference = lightweaver.synthesise(FLARE, depth_points=160, rays=4, sparse=False)
    assert rms(flare.halpha, reference.halpha) < 0.01
    assert rms(flare.ca8542, reference.ca8542) < 0.01
    chromosphere = (HEIGHTS > 0.0) & (HEIGHTS < 1.3)
    ratio = flare.electron_density[chromosphere] / reference.electron_density[chromosphere]
    assert np.abs(np.log10(ratio)).max() < 0.02


def test_what_does_not_converge_is_said():
    made = lightweaver.synthesise(FLARE, max_iterations=6, depth_points=50)
    assert store.STATUS[made.status] == "iteration_limit"
    assert "6 iterations" in made.reason


def test_numerical_failure_is_recorded(monkeypatch):
    tried = []

    def fail(_parameters, _heights, _rays, accelerated, _sparse):
        tried.append(accelerated)
        raise np.linalg.LinAlgError("singular matrix")

    monkeypatch.setattr(lightweaver, "_context", fail)
    made = lightweaver.synthesise(FLARE)
    assert tried == [True, False]  # once more without acceleration
    assert store.STATUS[made.status] == "numerical_failure"
    assert made.reason == "LinAlgError: singular matrix"
    assert np.isnan(made.halpha).all()
    assert np.isfinite(made.temperature).all()


def test_acceleration_that_overshoots_is_left_out(monkeypatch, flare):
    context = lightweaver._context

    def overshoot(parameters, heights, rays, accelerated, sparse):
        if accelerated:
            raise np.linalg.LinAlgError("singular matrix")
        return context(parameters, heights, rays, accelerated, sparse)

    monkeypatch.setattr(lightweaver, "_context", overshoot)
    plain = lightweaver.synthesise(FLARE)
    assert plain.status == 0
    assert rms(plain.halpha, flare.halpha) < 1e-3
    assert rms(plain.ca8542, flare.ca8542) < 1e-3


# The store


def description(seed=0):
    return lightweaver.description(seed)


def record(sample, status=0, reason=""):
    rng = np.random.default_rng(sample)
    return store.Record(
        sample=sample,
        simulation=sample,
        parameters=design(1, first=sample)[0].values(),
        electron_density=10 ** rng.uniform(8, 15, 50),
        temperature=10 ** rng.uniform(3.6, 7, 50),
        velocity=rng.normal(0, 20, 50),
        halpha=rng.uniform(1e5, 1e7, (len(lightweaver.MU), 73)),
        ca8542=np.full((len(lightweaver.MU), 113), np.nan)
        if status
        else rng.uniform(1e5, 1e7, (len(lightweaver.MU), 113)),
        status=status,
        iterations=40,
        reason=reason,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A store of four samples, one of them not to be used. Not to be changed."""
    path = tmp_path_factory.mktemp("written") / "grid.zarr"
    with store.Journal(path, description()) as journal:
        for sample in (2, 0, 1, 3):  # they finish in any order
            journal.append(record(sample, *((2, "exploded") if sample == 1 else ())))
        journal.assemble("flarefield grid lightweaver grid.zarr --samples 4")
    return path


@pytest.fixture
def filled(written, tmp_path):
    """The same, alone in its folder, for a test to change."""
    return Path(shutil.copytree(written, tmp_path / "grid.zarr"))


def test_rounding_is_numcodecs_bitround():
    values = np.random.default_rng(0).normal(0, 1e6, (50, 20)).astype(np.float32)
    rounded = store.round_mantissa(values)
    codec = BitRound(keepbits=store.MANTISSA_BITS)
    assert np.array_equal(rounded, codec.decode(codec.encode(values.copy())).reshape(values.shape))
    assert np.array_equal(store.round_mantissa(rounded), rounded)
    assert np.abs(rounded / values - 1).max() <= 2.0**-10
    assert np.isnan(store.round_mantissa(np.array([np.nan, np.inf]))).tolist() == [True, False]


def test_store_has_the_schema(written):
    grid = store.open_grid(written)
    assert dict(grid.sizes) == {
        "sample": 4,
        "height": 50,
        "mu": len(lightweaver.MU),
        "wavelength_halpha": 73,
        "wavelength_ca8542": 113,
    }
    assert grid["sample"].values.tolist() == [0, 1, 2, 3]
    assert grid["halpha"].dims == ("sample", "mu", "wavelength_halpha")
    assert grid["ca8542"].dims == ("sample", "mu", "wavelength_ca8542")
    for name in (
        "electron_density",
        "temperature",
        "velocity",
        "halpha",
        "ca8542",
        "height",
        "wavelength_halpha",
    ):
        assert grid[name].attrs["long_name"]
        u.Unit(grid[name].attrs["units"])
    assert u.Unit(grid["electron_density"].attrs["units"]) == u.cm**-3
    assert grid["wavelength_halpha"].attrs["rest_wavelength"] == lightweaver.rest_wavelengths()[0]
    for parameter in atmosphere.PARAMETERS:
        assert grid[f"parameter_{parameter.name}"].attrs["units"] == parameter.units
        assert grid[f"parameter_{parameter.name}"].values[3] == getattr(design(4)[3], parameter.name)
    assert grid.attrs["kind"] == "grid"
    assert "tau_500 = 1" in grid.attrs["height_zero"]
    assert "equilibrium" in grid.attrs["statistical_equilibrium"]
    assert grid.attrs["call"].startswith("flarefield grid lightweaver")
    assert zarr.open_group(written).metadata.zarr_format == 3
    assert zarr.open_group(written).metadata.consolidated_metadata is not None
    assert grid["temperature"].values[2] == pytest.approx(record(2).temperature, rel=2.0**-10)
    with xr.open_zarr(written) as plain:  # any xarray user's way
        assert set(plain.data_vars) == set(grid.data_vars)


def test_failures_are_kept_with_their_reason(written):
    grid = store.open_grid(written)
    assert grid["converged"].values.tolist() == [True, False, True, True]
    assert json.loads(grid.attrs["failures"]) == {"1": "exploded"}
    assert grid["status"].attrs["flag_meanings"].split()[grid["status"].values[1]] == "numerical_failure"


def test_journal_is_gone_when_the_store_is_there(written):
    assert [path.name for path in written.parent.iterdir()] == ["grid.zarr"]


def test_enlarging_keeps_every_bit(filled, tmp_path):
    before = store.open_grid(filled).load()
    with store.Journal(filled, description()) as journal:
        assert journal.samples == {0, 1, 2, 3}
        journal.append(record(4))
        journal.assemble("more")
    with store.Journal(tmp_path / "at_once.zarr", description()) as journal:
        for sample in range(5):
            journal.append(record(sample, *((2, "exploded") if sample == 1 else ())))
        journal.assemble("more")
    after, at_once = store.open_grid(filled).load(), store.open_grid(tmp_path / "at_once.zarr").load()
    assert after.isel(sample=slice(4)).drop_attrs().equals(before.drop_attrs())
    assert after.identical(at_once)


def test_torn_journal_loses_the_torn_record_only(tmp_path):
    path = tmp_path / "grid.zarr"
    with store.Journal(path, description()) as journal:
        for sample in range(3):
            journal.append(record(sample))
    file = tmp_path / "grid.zarr.journal"
    file.write_bytes(file.read_bytes()[:-100])
    with store.Journal(path, description()) as journal:
        assert journal.samples == {0, 1}
        journal.append(record(2))
    content = bytearray(file.read_bytes())
    content[-50] ^= 1  # a flipped bit in the last record
    file.write_bytes(content)
    with store.Journal(path, description()) as journal:
        assert journal.samples == {0, 1}


def test_journal_torn_in_its_first_line_starts_anew(tmp_path):
    path = tmp_path / "grid.zarr"
    (tmp_path / "grid.zarr.journal").write_bytes(b'{"schema": 1, "heig')
    with store.Journal(path, description()) as journal:
        journal.append(record(0))
    with store.Journal(path, description()) as journal:
        assert journal.samples == {0}


def test_assembling_in_small_steps_makes_the_same_store(filled, tmp_path, monkeypatch):
    """From the store and the journal together, whose samples lie in turns and in part replace each other."""
    with store.Journal(tmp_path / "at_once.zarr", description()) as journal:
        journal.extend(record(sample) for sample in range(9))
        journal.assemble("call")
    with store.Journal(filled, description()) as journal:
        journal.extend(record(sample) for sample in (8, 6, 4, 1, 5, 7))  # 1 had failed
        rows = journal._rows
        monkeypatch.setattr(journal, "_rows", lambda samples: (sizes.append(len(samples)), rows(samples))[1])
        monkeypatch.setattr(store, "CHUNK", 2)
        sizes = []
        journal.assemble("call")
    assert sizes == [2, 2, 2, 2, 1]
    assert store.open_grid(filled).load().identical(store.open_grid(tmp_path / "at_once.zarr").load())


def test_runs_are_kept_with_their_samples(tmp_path):
    path = tmp_path / "grid.zarr"
    with store.Journal(path, description()) as journal:
        journal.extend([record(0), record(1)])
        journal.add_run("first", {"sha256": "0" * 64})
        journal.add_run("second", {"refused": "damaged"})
    with (tmp_path / "grid.zarr.runs").open("ab") as file:
        file.write(b'{"third": {"sha')  # killed while it was written
    with store.Journal(path, description()) as journal:
        assert journal.runs == {"first": {"sha256": "0" * 64}, "second": {"refused": "damaged"}}
        journal.assemble("call")
    assert [file.name for file in tmp_path.iterdir()] == ["grid.zarr"]
    grid = store.open_grid(path)
    assert json.loads(grid.attrs["runs"])["second"] == {"refused": "damaged"}
    assert grid.attrs["made_from"]["first"] == "0" * 64
    with store.Journal(path, description()) as journal:
        journal.add_run("second", {"sha256": "1" * 64})
        journal.keep({1, 2})
        assert journal.samples == {1}
        journal.assemble("call")
    grid = store.open_grid(path)
    assert grid["sample"].values.tolist() == [1]
    assert json.loads(grid.attrs["runs"])["second"] == {"sha256": "1" * 64}


def test_settings_of_a_grid_finished_or_under_way(filled, tmp_path):
    fingerprint = description().fingerprint()
    assert store.settings_of(filled) == fingerprint
    filled.rename(filled.with_name("grid.zarr.old"))
    assert store.settings_of(filled) == fingerprint
    other = tmp_path / "other.zarr"
    assert store.settings_of(other) is None
    with store.Journal(other, description()) as journal:
        journal.append(record(0))
    assert store.settings_of(other) == fingerprint
    (tmp_path / "other.zarr.journal").write_text("a letter\n")
    with pytest.raises(MisuseError, match="not a grid's journal"):
        store.settings_of(other)


def test_other_settings_are_refused_by_name(filled, monkeypatch):
    about = description(seed=1)
    with pytest.raises(MisuseError, match=r"other settings: maker\.seed\n") as refusal:
        store.Journal(filled, about)
    assert (refusal.value.found, refusal.value.expected) == ("maker.seed 0", "maker.seed 1")
    # Another Lightweaver may give other lines.
    other = replace(about, maker={**description().maker, "lightweaver": "99.1"})
    with pytest.raises(MisuseError, match=r"other settings: maker\.lightweaver\n") as refusal:
        store.Journal(filled, other)
    assert refusal.value.expected == "maker.lightweaver 99.1"
    # Another FlareField does not, unless it says so.
    monkeypatch.setattr("pipeline.provenance.flarefield_version", lambda: "99.2")
    with store.Journal(filled, description()) as journal:
        journal.append(record(4))
        journal.assemble("more")
    assert store.open_grid(filled).attrs["flarefield_version"] == "99.2"


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with store.Journal(tmp_path / "grid.zarr", description()) as journal:
        journal.append(record(0))
        journal.assemble("call")
    assert f"{tmp_path / 'grid.zarr'} is on a file system without locks" in caplog.text
    assert store.open_grid(tmp_path / "grid.zarr").sizes["sample"] == 1


def test_where_nothing_can_be_written_is_said(tmp_path):
    with pytest.raises(StoreError, match="nothing can be written there") as refusal:
        store.Journal(tmp_path / "nowhere" / "grid.zarr", description())
    assert refusal.value.where == str(tmp_path / "nowhere")


def test_a_full_disk_leaves_a_good_journal(tmp_path, monkeypatch):
    path, sync = tmp_path / "grid.zarr", os.fsync
    with store.Journal(path, description()) as journal:
        journal.append(record(0))
        size = journal.file_path.stat().st_size

        def full(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="no space left"):
            journal.extend([record(1), record(2)])
        assert (journal.samples, journal.file_path.stat().st_size) == ({0}, size)
        monkeypatch.setattr(os, "fsync", sync)
        journal.extend([record(1)])
    with store.Journal(path, description()) as journal:
        assert journal.samples == {0, 1}


def test_two_commands_cannot_fill_one_grid(tmp_path):
    with (
        store.Journal(tmp_path / "grid.zarr", description()),
        pytest.raises(MisuseError, match="another command"),
    ):
        store.Journal(tmp_path / "grid.zarr", description())


def test_swap_that_was_cut_short_is_mended(filled):
    filled.rename(filled.with_name("grid.zarr.old"))
    with store.Journal(filled, description()) as journal:
        assert journal.samples == {0, 1, 2, 3}


def test_what_is_no_grid_is_refused(tmp_path, filled):
    with pytest.raises(StoreError, match="no such grid"):
        store.open_grid(tmp_path / "nothing.zarr")
    other = tmp_path / "map.zarr"
    zarr.create_group(other, zarr_format=3, attributes={"kind": "map"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(StoreError, match="not a grid") as caught:
            store.open_grid(other)
        assert caught.value.found == "map"
        with pytest.raises(MisuseError, match="exists and is not a grid"):
            store.Journal(other, description())
    text = tmp_path / "notes.zarr"
    text.write_text("not a store")
    with pytest.raises(StoreError, match="not a readable Zarr store"):
        store.open_grid(text)


def test_split_is_stable_and_by_simulation():
    simulations = np.arange(20000)
    places = store.split(simulations)
    shares = {place: np.mean(places == place) for place in ("train", "validation", "test")}
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.01)
    # Written down: a grid's split must never change with a release.
    assert store.split([0, 1, 2, 7]).tolist() == ["train", "test", "train", "test"]
    shuffled = np.random.default_rng(0).permutation(simulations)
    assert np.array_equal(store.split(shuffled), places[shuffled])
    assert len(set(store.split([5, 5, 5]))) == 1


# The job

JOB = """
import sys
from distributed import Client, LocalCluster
from pipeline.grids.lightweaver import make_lightweaver_grid
if __name__ == "__main__":
    with (
        LocalCluster(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        make_lightweaver_grid(sys.argv[1], samples=3, cluster=client, call="the command")
"""


def test_killed_job_resumes_to_the_same_grid(tmp_path, client):
    """After kill -9 with samples in flight, the same command makes the grid of an undisturbed run."""
    script, path = tmp_path / "job.py", tmp_path / "grid.zarr"
    script.write_text(JOB)
    command = [sys.executable, str(script), str(path)]
    journal = tmp_path / "grid.zarr.journal"
    header = len(json.dumps(lightweaver.description().fingerprint())) + 1

    first = subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 240
    while not (journal.exists() and journal.stat().st_size > header):
        assert first.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not path.exists()
    with store.Journal(path, lightweaver.description()) as kept:
        saved = kept.samples
    assert 1 <= len(saved) < 3

    lightweaver.make_lightweaver_grid(path, samples=3, cluster=client, call="the command")
    with store.Journal(tmp_path / "undisturbed.zarr", lightweaver.description()) as undisturbed:
        for sample in range(3):
            undisturbed.append(
                lightweaver.run_task(lightweaver.AtmosphereTask(sample, atmosphere.DESIGN_SEED))
            )
        undisturbed.assemble("the command")
    assert store.open_grid(path).load().identical(store.open_grid(tmp_path / "undisturbed.zarr").load())
    assert not journal.exists()


def test_empty_request_is_refused(tmp_path):
    with pytest.raises(MisuseError, match="at least one sample"):
        lightweaver.make_lightweaver_grid(tmp_path / "grid.zarr", samples=0)
