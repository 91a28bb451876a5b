"""RADYN runs into a grid, read by radynpy itself from CDF files that the test writes."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import astropy.units as u
import numpy as np
import pytest
import torch
import xarray as xr
from astropy import constants
from radyn_files import CC, F_CHROMA, QNORM, RAYS, REST, ToyRun, frequencies
from radynpy.cdf import LazyRadynData
from toy_grid import write_toy_grid

from inn.layout import HEIGHTS, Layout
from pipeline.errors import InputError, MisuseError
from pipeline.grids import radyn, store
from pipeline.grids.radyn import RunFile, RunTask, make_radyn_grid, read_run
from pipeline.training_set import TrainingSet

LINES = {"halpha": 4, "ca8542": 20}
PRECISION = 2.0**-9
"""Relative: what the store keeps of a number, twice over."""


def task(path, **changes):
    made = RunTask(str(path), RunFile(path).axes(), tuple(HEIGHTS), 1, True, None)
    return replace(made, **changes)


@pytest.fixture
def run():
    return ToyRun()


@pytest.fixture
def file(run, tmp_path):
    return run.write(tmp_path / F_CHROMA)


# One run


def test_lines_are_what_their_definition_says(run, file):
    """Frequency in Doppler units, the continuum term and I_nu -> I_lambda, by astropy, point by point."""
    records = read_run(task(file)).records
    axes = RunFile(file).axes()
    for line, kr in LINES.items():
        rest = REST[kr] * u.AA
        for i, q in enumerate(frequencies(kr)):  # ascending frequency
            shift = (q * QNORM * u.km / u.s / (CC * u.cm / u.s)).to_value(u.one)
            frequency = (constants.c / rest).to(u.Hz) * (1 + shift)
            wavelength = frequency.to(u.AA, u.spectral())
            from_red = len(axes.offsets[line]) - 1 - i
            assert axes.offsets[line][from_red] == pytest.approx((wavelength - rest).value, abs=1e-6)
            for t, ray in ((0, 0), (3, 2), (6, 4)):
                outint = run.variables["outint"][t, :, ray, kr]
                per_frequency = (outint[i + 1] + outint[0]) * u.erg / u.s / u.cm**2 / u.Hz
                wanted = per_frequency.to_value(u.erg / u.s / u.cm**2 / u.AA, u.spectral_density(wavelength))
                assert getattr(records[t], line)[ray, from_red] == pytest.approx(wanted, rel=1e-5)


def test_both_axes_are_turned_round(run, file):
    opened = RunFile(file)
    heights, ne, *_ = opened.atmospheres(slice(None))
    assert np.all(np.diff(heights) > 0)
    assert ne[2] == pytest.approx(run.variables["ne1"][2][::-1])
    assert heights[2] == pytest.approx(run.variables["z1"][2][::-1] / 1e8)
    for line in LINES:
        assert np.all(np.diff(opened.wavelengths(line)[0]) > 0)
    # The bluest point is the highest frequency, the last one in the file.
    lines, _ = opened.intensities(slice(None), continuum=False)
    nq = frequencies(4).size
    ratio = lines["halpha"][1, 2, 0] / lines["halpha"][1, 2, -1]
    blue, red = (opened.wavelengths("halpha")[0][end] for end in (0, -1))
    outint = run.variables["outint"][1, :, 2, 4]
    assert ratio == pytest.approx(outint[nq] / outint[1] * (red / blue) ** 2)


def test_without_the_continuum_term(run, file):
    with_term, shares = RunFile(file).intensities(slice(0, 1))
    without, _ = RunFile(file).intensities(slice(0, 1), continuum=False)
    for line, kr in LINES.items():
        wavelength = RunFile(file).wavelengths(line)[0] * u.AA
        term = run.variables["outint"][0, 0, :, kr][:, None] * u.erg / u.s / u.cm**2 / u.Hz
        wanted = term.to_value(u.erg / u.s / u.cm**2 / u.AA, u.spectral_density(wavelength))
        assert (with_term[line] - without[line])[0] == pytest.approx(wanted)
        outint = run.variables["outint"][0, :, -1, kr]
        wings = outint[[1, frequencies(kr).size]].mean()
        assert shares[line] == pytest.approx(outint[0] / wings)


def test_upflow_is_a_blueshift(run, file):
    """By the first moment of the profile: -v mu / c from rest."""
    records = read_run(task(file, continuum=False)).records
    for line, kr in LINES.items():
        offsets = np.array(RunFile(file).axes().offsets[line])
        for record, speed in zip(records, run.speed / 1e5, strict=True):
            assert record.velocity == pytest.approx(speed)
            profile = getattr(record, line)[3]
            excess = np.clip(profile - 0.3 * profile.max(), 0, None)
            moment = np.trapezoid(excess * offsets, offsets) / np.trapezoid(excess, offsets)
            wanted = -speed * RAYS[3] / 299792.458 * REST[kr]
            assert moment == pytest.approx(wanted, abs=0.06 * REST[kr] * 20 / 299792.458)


def test_heights_are_interpolated_linearly(run, file):
    names = {"electron_density": ("ne1", 1), "temperature": ("tg1", 1), "velocity": ("vz1", 1e-5)}
    heights = (-0.05, 0.0, 0.123, 1.9, 2.0, 7.5)
    for grid in (HEIGHTS, heights):
        records = read_run(task(file, heights=tuple(grid))).records
        for t, record in enumerate(records):
            z = run.variables["z1"][t][::-1]
            for name, (variable, factor) in names.items():
                values = run.variables[variable][t][::-1] * factor
                for height, found in zip(grid, getattr(record, name), strict=True):
                    upper = np.flatnonzero(z >= height * 1e8)[0]
                    part = (height * 1e8 - z[upper - 1]) / (z[upper] - z[upper - 1])
                    wanted = values[upper - 1] + part * (values[upper] - values[upper - 1])
                    assert found == pytest.approx(wanted, rel=1e-5)


def test_rays_are_sorted(tmp_path):
    run = ToyRun(rays=RAYS[[2, 0, 4, 1, 3]])
    record = read_run(task(run.write(tmp_path / "run.cdf"))).records[0]
    assert RunFile(tmp_path / "run.cdf").axes().mu == pytest.approx(RAYS)
    nq, outint = frequencies(4).size, run.variables["outint"][0, :, :, 4]
    wanted = (outint[nq] + outint[0])[np.argsort(run.rays)]  # at the bluest wavelength
    assert record.halpha[:, 0] / record.halpha[0, 0] == pytest.approx(wanted / wanted[0], rel=1e-6)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("snapshots", "rays"), [(1, RAYS), (4, RAYS[-1:]), (1, RAYS[-1:])])
def test_one_snapshot_or_one_ray(snapshots, rays, dropped, tmp_path, monkeypatch):
    """Dimensions of length one, which some versions of cdflib drop."""
    run = ToyRun(snapshots=snapshots, rays=rays)
    if dropped:
        monkeypatch.setattr(
            RunFile, "_read", lambda file, name: np.squeeze(np.asarray(getattr(file._data, name)))
        )
    records = read_run(task(run.write(tmp_path / "run.cdf"))).records
    monkeypatch.undo()
    assert len(records) == snapshots
    assert records[-1].halpha.shape == (rays.size, frequencies(4).size)
    assert all(record.reason == "" for record in records)
    whole = read_run(task(ToyRun().write(tmp_path / "whole.cdf"))).records
    assert np.array_equal(records[-1].temperature, whole[snapshots - 1].temperature)


def test_beam_is_what_radynpy_takes_from_the_name(run, tmp_path):
    names = ["radyn_out.val3c_d3_1.0e11_t20s_10kev_fp", "radyn_out.val3c_d8_3.0e10_t20s_25kev_fp.cdf"]
    for name in names:
        data = LazyRadynData(str(run.write(tmp_path / name)))
        cutoff = float(data.cutoffEnergy.removesuffix("kev"))
        pulse = float(data.beamPlulseType[1:-1])
        found = radyn.beam(radyn.run_name(tmp_path / name))
        assert found == (data.beamSpectralIndex, data.totalBeamEnergy, cutoff, pulse)
    # radynpy would refuse the second of these
    for name in ("flare7.cdf", "radyn_out.my_own_run", "radyn_out.cdf"):
        records = read_run(task(run.write(tmp_path / name))).records
        assert np.isnan(records[3].parameters[:4]).all()
        assert records[3].parameters[4:] == pytest.approx((30.0, 2.0))


def test_what_cannot_be_used_is_marked(run, tmp_path):
    run.variables["tg1"][1, 30] = np.nan
    run.variables["outint"][2, 5, 3, 20] = np.inf
    run.variables["ne1"][3, 10] = 0.0
    run.variables["z1"][4] *= 0.5
    run.variables["z1"][5, [7, 8]] = run.variables["z1"][5, [8, 7]]
    made = read_run(task(run.write(tmp_path / "run.cdf")))
    reasons = [record.reason for record in made.records]
    assert reasons[0] == reasons[6] == ""
    assert reasons[1:3] == ["not finite: temperature", "not finite: ca8542"]
    assert reasons[3] == "not positive: electron density"
    assert reasons[4].startswith("it reaches from -0.050 to 5.500 Mm")
    assert reasons[5] == "heights do not ascend"
    assert made.facts["failed"] == 5
    for record in made.records:
        for name in ("electron_density", "temperature", "velocity", *LINES):
            assert np.isnan(getattr(record, name)).all() == bool(record.reason)
        assert (store.STATUS[record.status] == "converged") == (not record.reason)


def test_run_that_was_stopped_while_it_wrote(run, tmp_path):
    run.variables["outint"] = run.variables["outint"][:4]
    made = read_run(task(run.write(tmp_path / "run.cdf"), stride=2))
    assert [record.parameters[4] for record in made.records] == pytest.approx([0.0, 20.0])
    assert made.facts["ends"] == pytest.approx(30.0)
    assert made.facts["notes"] == ["3 of 7 snapshots are incomplete and left out"]


def test_microturbulence(run, tmp_path):
    def told():
        return RunFile(run.write(tmp_path / "run.cdf")).microturbulence()

    run.variables["vturb"][:] = 3.5e5
    assert told() == (pytest.approx(3.5), None)
    run.variables["vturb"][:5] = 9e5
    assert told() == (pytest.approx(3.5), "vturb varies with height: its median is stored")
    del run.variables["vturb"], run.variables["iiter"]
    assert told() == (2.0, "the file does not hold vturb: RADYN's 2 km/s is stored")
    assert not RunFile(tmp_path / "run.cdf").iterations().any()


def test_continuum_that_counts_twice_is_reported(run, tmp_path):
    for kr in REST:
        run.variables["outint"][:, 0, :, kr] = run.variables["outint"][:, 1, :, kr]
    path = run.write(tmp_path / "run.cdf")
    (note,) = read_run(task(path)).facts["notes"]
    assert "counted twice" in note
    assert read_run(task(path, continuum=False)).facts["notes"] == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"alamb": (4, 4862.7)}, "transition kr = 4 is not halpha"),
        ({"alamb": (20, 8542.09)}, "transition kr = 20 is not ca8542"),  # in air
        ({"cont": (20, 1)}, "transition kr = 20 is not ca8542"),
        ({"nq": (4, 2)}, "frequencies of halpha"),
        ({"q": ((slice(None), 20), 1.0)}, "frequencies of ca8542"),
        ({"zmu": (0, -0.5)}, "rays"),
    ],
)
def test_what_is_not_the_line_is_refused(run, tmp_path, change, problem):
    ((name, (where, value)),) = change.items()
    run.variables[name][where] = value
    with pytest.raises(InputError, match=problem) as caught:
        RunFile(run.write(tmp_path / "run.cdf")).axes()
    assert caught.value.where == str(tmp_path / "run.cdf")


def test_lines_in_another_order_are_refused(run, tmp_path):
    for name in ("alamb", "cont", "nq"):
        run.variables[name] = run.variables[name][::-1]
    run.variables["q"] = run.variables["q"][:, ::-1]
    with pytest.raises(InputError, match="transition kr = 4 is not halpha"):
        RunFile(run.write(tmp_path / "run.cdf")).axes()


def test_variables_of_other_dimensions_are_refused(run, file, tmp_path):
    run.variables["outint"] = run.variables["outint"][:, :30]
    with pytest.raises(InputError, match="outint is not what it should be"):
        read_run(task(run.write(tmp_path / "run.cdf")))
    run = ToyRun()
    run.variables["tg1"] = run.variables["tg1"][:, 1:]
    with pytest.raises(InputError, match="atmosphere is not what it should be"):
        read_run(task(run.write(tmp_path / "run.cdf")))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9])
def test_damaged_files_are_refused(file, share):
    good = task(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="cut short, damaged"):
        read_run(good)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "notes.cdf").write_text("Dear reader, this is a letter.")
    with pytest.raises(InputError, match="cut short, damaged, or not of RADYN"):
        RunFile(tmp_path / "notes.cdf")


# Several runs


def make(sources, path, client, **options):
    return make_radyn_grid(sources, path, cluster=client, call="the command", **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory, client):
    """Three runs (of seven snapshots, of seven with a bad one, of three), the report on their grid, its path.

    Not to be changed.
    """
    folder = tmp_path_factory.mktemp("made")
    second = ToyRun(seed=2)
    second.variables["vz1"][2, 4] = np.nan
    runs = [
        ToyRun(seed=1).write(folder / F_CHROMA),
        second.write(folder / "radyn_out.val3c_d5_1.0e12_t20s_25kev_fp"),
        ToyRun(seed=3, snapshots=3).write(folder / "my own run.cdf"),
    ]
    return runs, make(runs, folder / "grid.zarr", client), folder / "grid.zarr"


@pytest.fixture
def runs(made, tmp_path):
    """The same runs, for a test to spoil."""
    (tmp_path / "runs").mkdir()
    return [Path(shutil.copy2(run, tmp_path / "runs")) for run in made[0]]


def same(one, other):
    """Whether two stores hold the same but for the files' dates."""
    one, other = store.open_grid(one).load(), store.open_grid(other).load()
    for grid in (one, other):
        facts = json.loads(grid.attrs.pop("runs"))
        grid.attrs["runs"] = {name: {**run, "modified": 0} for name, run in facts.items()}
    return one.identical(other)


def test_grid_holds_every_run(made):
    runs, report, path = made
    grid = store.open_grid(path).load()
    assert grid.sizes["sample"] == 17
    assert grid.sizes["mu"] == 5
    assert grid["mu"].values == pytest.approx(RAYS)
    facts = json.loads(grid.attrs["runs"])
    assert list(facts) == sorted(radyn.run_name(path) for path in runs)
    for path in runs:
        number = facts[radyn.run_name(path)]["simulation"]
        mine = grid.isel(sample=grid["simulation"].values == number)
        records = read_run(task(path)).records
        assert mine["sample"].values.tolist() == [record.sample for record in records]
        for i, record in enumerate(records):
            for name in ("temperature", "electron_density", "velocity", "halpha", "ca8542"):
                wanted = getattr(record, name)
                assert np.allclose(mine[name].values[i], wanted, rtol=PRECISION, equal_nan=True)
            assert mine["converged"].values[i] == (record.reason == "")
        assert mine["parameter_time"].values == pytest.approx(10.0 * np.arange(len(records)))
        assert mine["iterations"].values.tolist() == [3 + i for i in range(len(records))]
    known = grid["parameter_beam_total_energy"].values
    assert set(known[np.isfinite(known)]) == {1e11, 1e12}
    for name, units, _ in radyn.PARAMETERS:
        assert grid[f"parameter_{name}"].attrs["units"] == units
        u.Unit(units)
    assert grid["wavelength_halpha"].attrs["rest_wavelength"] == REST[4]
    assert "time-dependent" in grid.attrs["statistical_equilibrium"]
    assert report.complete


def test_report_names_what_is_wrong(made):
    _, report, path = made
    grid, text = store.open_grid(path), report.summary()
    assert "3 runs (3 read, 0 kept, 0 refused), 17 snapshots, 1 not to be used" in text
    assert "radyn_out.val3c_d5_1.0e12_t20s_25kev_fp: 1 of 7 snapshots are not to be used" in text
    assert "my own run: unfinished: it ends at 20 s, the longest at 60 s" in text
    facts = json.loads(grid.attrs["runs"])
    assert {name for name, run in facts.items() if run["unfinished"]} == {"my own run"}
    assert list(json.loads(grid.attrs["failures"]).values()) == ["not finite: velocity"]


def test_grid_does_not_depend_on_order_or_growth(made, tmp_path, client):
    runs, _, path = made
    make(runs[2:], tmp_path / "grown.zarr", client)
    make(runs[1::-1], tmp_path / "grown.zarr", client)
    assert same(path, tmp_path / "grown.zarr")


def test_every_second_snapshot(made, tmp_path, client):
    runs, _, path = made
    report = make(runs, tmp_path / "some.zarr", client, stride=2)
    assert [run.snapshots for run in report.runs] == [2, 4, 4]
    every, some = store.open_grid(path).load(), store.open_grid(tmp_path / "some.zarr").load()
    chosen = np.isin(every["sample"], some["sample"])
    assert some.drop_attrs().equals(every.isel(sample=chosen).drop_attrs())
    assert set(some["parameter_time"].values.round(3)) == {0.0, 20.0, 40.0, 60.0}
    with pytest.raises(MisuseError, match="other settings: maker"):
        make(runs, tmp_path / "some.zarr", client, stride=3)


def test_killed_job_goes_on_where_it_stopped(made, runs, tmp_path, client, monkeypatch):
    path, taken, take = tmp_path / "grid.zarr", [], radyn._take

    def killed(journal, name, run):
        if taken:  # in the middle of the second run
            journal.extend(run.records[:1])
            raise KeyboardInterrupt
        taken.append(name)
        take(journal, name, run)

    monkeypatch.setattr(radyn, "_take", killed)
    with pytest.raises(KeyboardInterrupt):
        make(runs, path, client)
    assert not path.exists()
    monkeypatch.undo()
    # If the finished run were read again, it would be refused now.
    (done,) = (source for source in runs if radyn.run_name(source) == taken[0])
    content, status = done.read_bytes(), done.stat()
    done.write_bytes(bytes(len(content)))
    os.utime(done, ns=(status.st_atime_ns, status.st_mtime_ns))
    report = make(runs, path, client)
    assert {run.name: run.state for run in report.runs}[taken[0]] == "kept"
    assert [run.state for run in report.runs].count("read") == 2
    assert same(path, made[2])
    assert not list(tmp_path.glob("grid.zarr.*"))


def test_a_worker_reads_one_run_at_a_time(runs, tmp_path, client, monkeypatch):
    # The workers are threads of this process, as several threads of one worker would be.
    onto, reading, together = radyn._onto, [], []

    def watched(*args):
        reading.append(1)
        together.append(len(reading))
        time.sleep(0.2)
        reading.pop()
        return onto(*args)

    monkeypatch.setattr(radyn, "_onto", watched)
    make(runs, tmp_path / "grid.zarr", client)
    assert len(together) >= 2
    assert max(together) == 1


def test_file_that_changed_is_noticed(runs, tmp_path, client):
    path = tmp_path / "grid.zarr"
    make(runs, path, client)
    os.utime(runs[0])  # another date, the same content
    ToyRun(seed=9, snapshots=5).write(runs[1])  # another content, and fewer snapshots
    report = make(runs, path, client)
    states = {run.name: run.state for run in report.runs}
    assert [states[radyn.run_name(source)] for source in runs] == ["kept", "read", "kept"]
    make(runs, tmp_path / "anew.zarr", client)
    assert same(path, tmp_path / "anew.zarr")
    before = path.stat().st_mtime_ns
    assert [run.state for run in make(runs, path, client).runs] == ["kept"] * 3
    assert path.stat().st_mtime_ns == before  # nothing to do: nothing is written


def test_bad_runs_do_not_stop_the_others(runs, tmp_path, client):
    content = runs[0].read_bytes()
    runs[0].write_bytes(content[: len(content) // 2])
    other_rays = ToyRun(rays=RAYS * 0.9).write(tmp_path / "other rays.cdf")
    narrow = ToyRun()
    narrow.variables["q"][:, 4] *= 0.5
    narrow.write(tmp_path / "narrow.cdf")
    atom = ToyRun()
    atom.variables["alamb"][4] += 0.05
    atom.write(tmp_path / "other atom.cdf")
    copy = tmp_path / "radyn_out.copy.cdf"
    copy.write_bytes(runs[1].read_bytes())
    sources = [*runs, other_rays, tmp_path / "narrow.cdf", tmp_path / "other atom.cdf", copy]
    report = make(sources, tmp_path / "grid.zarr", client)
    refused = {run.name: run.notes[0] for run in report.runs if run.state == "refused"}
    assert not report.complete
    assert "cut short" in refused.pop(F_CHROMA)
    rays = refused.pop("other rays")
    assert "rays are not the grid's (found mu = 0.0422, 0.2077, 0.4500, 0.6923, 0.8578;" in rays
    assert "expected mu = 0.0469, 0.2308, 0.5000, 0.7692, 0.9531" in rays
    assert "wavelengths of halpha do not cover" in refused.pop("narrow")
    assert "halpha is another model atom's" in refused.pop("other atom")
    assert "the same file as radyn_out.copy" in refused.pop("radyn_out.val3c_d5_1.0e12_t20s_25kev_fp")
    assert not refused
    grid = store.open_grid(tmp_path / "grid.zarr")
    assert grid.sizes["sample"] == 10
    assert "cut short" in json.loads(grid.attrs["runs"])[F_CHROMA]["refused"]
    # Mended, it comes in with the same command.
    runs[0].write_bytes(content)
    report = make(runs[:1], tmp_path / "grid.zarr", client)
    assert report.complete
    grid = store.open_grid(tmp_path / "grid.zarr")
    assert grid.sizes["sample"] == 17
    assert "refused" not in json.loads(grid.attrs["runs"])[F_CHROMA]


def test_most_runs_decide_on_rays_atoms_and_wavelengths(tmp_path, client):
    """And not the first by name, nor the number of runs with the rays of few."""
    sources = [ToyRun(rays=RAYS[1:], snapshots=2).write(tmp_path / "a few rays.cdf")]
    atom = ToyRun(snapshots=2)
    atom.variables["alamb"][4] += 0.05
    sources.append(atom.write(tmp_path / "b another atom.cdf"))
    wide = ToyRun(snapshots=2)
    wide.variables["q"][:, 20] *= 1.2
    sources.append(wide.write(tmp_path / "c wide.cdf"))
    sources += [ToyRun(seed=i, snapshots=2).write(tmp_path / f"run{i}.cdf") for i in range(2)]
    wanted = RunFile(sources[-1]).axes()
    report = make(sources, tmp_path / "grid.zarr", client)
    refused = {run.name for run in report.runs if run.state == "refused"}
    assert refused == {"a few rays", "b another atom"}
    grid = store.open_grid(tmp_path / "grid.zarr")
    assert grid["mu"].values == pytest.approx(wanted.mu)
    for line in LINES:
        assert grid[f"wavelength_{line}"].values == pytest.approx(wanted.offsets[line])
        assert grid[f"wavelength_{line}"].attrs["rest_wavelength"] == wanted.rest[line]
    # Where two kinds are equally common, the first one given counts.
    rays, other = (RunFile(source).axes() for source in (sources[0], sources[-1]))
    assert radyn.common_axes([rays, other]) == rays
    assert radyn.common_axes([other, rays]) == other


@pytest.mark.parametrize(
    ("name", "snapshots", "unfinished", "told"),
    [
        (F_CHROMA, 6, False, ""),
        (F_CHROMA, 5, True, "unfinished: it ends at 40 s, F-CHROMA's at 50 s"),
        (
            "my run",
            5,
            None,
            "it ends at 40 s; neither its name nor another run tells whether that is all of it",
        ),
    ],
)
def test_a_run_alone_is_judged_by_its_name(tmp_path, client, name, snapshots, unfinished, told):
    source = ToyRun(snapshots=snapshots).write(tmp_path / f"{name}.cdf")
    (run,) = make([source], tmp_path / "grid.zarr", client).runs
    assert "; ".join(run.notes) == told
    facts = json.loads(store.open_grid(tmp_path / "grid.zarr").attrs["runs"])
    assert facts[name]["unfinished"] is unfinished


def test_other_wavelengths_are_interpolated(made, tmp_path, client):
    wide = ToyRun(seed=1)
    wide.variables["q"][:, 20] *= 1.2
    wide.write(tmp_path / "wide.cdf")
    report = make([made[0][0], tmp_path / "wide.cdf"], tmp_path / "grid.zarr", client)
    (mine,) = (run for run in report.runs if run.name == "wide")
    assert mine.notes == ("ca8542 was interpolated from 51 wavelengths of its own",)
    grid = store.open_grid(tmp_path / "grid.zarr").load()
    own = RunFile(tmp_path / "wide.cdf")
    offsets = own.wavelengths("ca8542")[0] - REST[20]
    sample = grid.isel(sample=grid["simulation"].values == radyn.simulation_number("wide"))
    for ray in range(5):
        profile = own.intensities(slice(None))[0]["ca8542"][3, ray]
        wanted = np.interp(grid["wavelength_ca8542"].values, offsets, profile)
        assert sample["ca8542"].values[3, ray] == pytest.approx(wanted, rel=PRECISION)


def test_numbers_of_simulations_are_written_down():
    """They decide the split, and must never change with a release."""
    assert radyn.simulation_number(F_CHROMA) == 3039549858
    assert store.split([3039549858]).tolist() == ["train"]


def test_requests_that_cannot_be_met(made, tmp_path, client):
    runs = made[0]
    for problem, sources, options in [
        ("at least one run", [], {}),
        ("no such file", [tmp_path / "nothing.cdf"], {}),
        ("positive stride", runs, {"stride": 0}),
        ("heights that ascend", runs, {"heights": [1.0, 0.5]}),
    ]:
        with pytest.raises(MisuseError, match=problem):
            make(sources, tmp_path / "grid.zarr", client, **options)
    twin = tmp_path / runs[0].name
    twin.write_bytes(runs[0].read_bytes())
    with pytest.raises(MisuseError, match="same name"):
        make([runs[0], twin], tmp_path / "grid.zarr", client)
    letter = tmp_path / "letter.cdf"
    letter.write_text("Dear reader")
    with pytest.raises(InputError, match="no run can be read"):
        make([letter], tmp_path / "grid.zarr", client)
    assert not list(tmp_path.glob("grid.zarr*"))


def test_other_grids_are_not_touched(made, tmp_path, client):
    runs = made[0]
    other = xr.Dataset({"a": ("x", [1, 2])}, attrs={"kind": "map"})
    other.to_zarr(tmp_path / "map.zarr", zarr_format=3, consolidated=False)
    with pytest.raises(MisuseError, match="exists and is not a grid"):
        make(runs, tmp_path / "map.zarr", client)
    toy = tmp_path / "toy.zarr"
    write_toy_grid(toy, samples=5)
    with pytest.raises(MisuseError, match="other settings"):
        make(runs, toy, client)


# What it is for


@pytest.mark.parametrize("rays", [RAYS, RAYS[-1:]])
def test_networks_can_be_trained_on_it(tmp_path, client, rays):
    sources = [ToyRun(seed=i, rays=rays).write(tmp_path / f"run{i}.cdf") for i in range(3)]
    make(sources, tmp_path / "grid.zarr", client)
    grid = store.open_grid(tmp_path / "grid.zarr").load()
    parts = store.split(grid["simulation"].values)
    for number in np.unique(grid["simulation"].values):
        assert len(set(parts[grid["simulation"].values == number])) == 1
    examples = TrainingSet(grid, Layout())
    batch = examples.draw(16, torch.Generator().manual_seed(0))
    assert batch.atmosphere.shape == (16, 150)
    assert batch.lines.shape == (16, 60)
    for values in batch:
        assert torch.isfinite(values).all()
    assert batch.microturbulence.tolist() == pytest.approx([2.0] * 16)
    assert float(batch.mu.min()) >= rays.min() - 1e-6
    assert examples.clean().lines.shape == (21 * rays.size, 60)
