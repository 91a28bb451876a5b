"""The paper's released training data: read without running it, in the grid's units, split by beam."""

import builtins
import copyreg
import io
import os
import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch

from inn.layout import CA8542, HALPHA, HEIGHTS, Layout
from pipeline.errors import InputError, MisuseError
from pipeline.grids.published import make_published_grid, read_contents, rest_wavelength
from pipeline.grids.store import open_grid, split
from pipeline.training_set import Augmentation, TrainingSet

LIGHT_SPEED = 299_792.458  # km/s
REST = {"halpha": 6564.69, "ca8542": 8544.44}
BEAMS = [(4.0, 1e11, "20kev"), (3.0, 3e10, "10kev"), (4.0, 1e12, "20kev"), (3.0, 3e10, "10kev")]
COUNTS = [3, 2, 4, 3]


def axis(name, reach, points=31):
    """Wavelengths of frequencies that lie evenly on both sides of the line's, denser in the core."""
    steps = np.linspace(-1.0, 1.0, points)
    return REST[name] / (1.0 - reach / REST[name] * steps * (0.3 + 0.7 * np.abs(steps)))


def released(seed=0, reach=(1.65, 1.2)):
    """What the paper's public code puts into its pickle, for a few invented snapshots."""
    generator = np.random.default_rng(seed)
    count = sum(COUNTS)
    wavelengths = [axis("halpha", reach[0]), axis("ca8542", reach[1], 27)]
    temperature = 10.0 ** generator.uniform(3.6, 6.5, (count, 50))
    density = 10.0 ** generator.uniform(9.0, 14.0, (count, 50))
    velocity = generator.uniform(-5e6, 5e6, (count, 50))
    lines = [3e6 * generator.uniform(0.2, 2.0, (count, wl.size)) for wl in wavelengths]

    def tensors(rows, kind=torch.float32):
        return [torch.from_numpy(row.copy()).to(kind) for row in rows]

    return {
        "lineInfo": [
            {"line": "H_alpha", "kr": 4, "iel": 0, "halfWidth": 1.4},
            {"line": "CaII k", "kr": 20, "iel": 1, "halfWidth": 1.0},
        ],
        "line": [tensors(rows, torch.float64) for rows in lines],
        "temperature": tensors(temperature),
        "ne": tensors(density),
        "vel": tensors(velocity),
        "upperLevelPop": [tensors(density), tensors(density)],
        "nTime": COUNTS,
        "beamSpectralIndex": [beam[0] for beam in BEAMS],
        "totalBeamEnergy": [beam[1] for beam in BEAMS],
        "beamPulseType": ["t20s"] * len(BEAMS),
        "cutoffEnergy": [beam[2] for beam in BEAMS],
        "mu": [np.float32(0.95308992), np.float32(0.95308992)],
        "wavelength": [torch.from_numpy(wl) for wl in wavelengths],
        "z": torch.from_numpy((HEIGHTS * 1e8).astype(np.float32)),
    }


def write(path, content):
    path.write_bytes(pickle.dumps(content, protocol=3))
    return path


@pytest.fixture(scope="module")
def content():
    return released()


@pytest.fixture(scope="module")
def source(content, tmp_path_factory):
    return write(tmp_path_factory.mktemp("released") / "DoublePicoGigaPickle50.pickle", content)


@pytest.fixture(scope="module")
def grid_path(source, client, tmp_path_factory):
    path = tmp_path_factory.mktemp("grid") / "published.zarr"
    return make_published_grid(source, path, cluster=client)


# What a pickle may do


class Calls:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


class FakeStorage:
    """Pickled as torch's storages are: a call of its own hook, with any bytes."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


def by_torch(payload):
    """Bytes of a nested torch file that holds anything."""
    nested = io.BytesIO()
    torch.save(payload, nested, _use_new_zipfile_serialization=False)
    return nested.getvalue()


def hostile(trace):
    """Pickles that would each leave the file `trace` if anything in them were called."""
    touch = f"touch {trace}"
    write = f"open({str(trace)!r}, 'w').close()"
    yield "os.system", pickle.dumps({"line": Calls(os.system, touch)})
    yield "eval", pickle.dumps([Calls(builtins.eval, write)])
    yield "exec, protocol 0", pickle.dumps(Calls(builtins.exec, write), protocol=0)
    yield "exec, protocol 2", pickle.dumps(Calls(builtins.exec, write), protocol=2)
    yield "exec, protocol 5", pickle.dumps(Calls(builtins.exec, write), protocol=5)
    text = b"X" + struct.pack("<I", len(touch)) + touch.encode()
    imported = b"cbuiltins\n__import__\nX\x02\x00\x00\x00os\x85R"
    found = b"\x80\x03cbuiltins\ngetattr\n" + imported + b"X\x06\x00\x00\x00system\x86R"
    yield "getattr", found + text + b"\x85R."
    yield "nested os.system", pickle.dumps({"z": FakeStorage(by_torch(Calls(os.system, touch)))})
    yield "nested pickle", pickle.dumps({"z": FakeStorage(pickle.dumps(Calls(os.system, touch)))})
    yield "torch.load itself", pickle.dumps(Calls(torch.load, str(trace)))
    # A dotted name: admitted modules must not lead to what they import.
    yield (
        "dotted",
        b"\x80\x04\x8c\x0dtorch.storage\x8c\x1dtorch.serialization.os.system\x93" + text + b"\x85R.",
    )
    yield "instance", b"(S" + repr(touch).encode() + b"\nios\nsystem\n."
    yield "copyreg", pickle.dumps(Calls(copyreg._reconstructor, OrderedDict, object, None))
    yield "object dtype", pickle.dumps(np.array([None], dtype=object), protocol=3)


@pytest.mark.parametrize("number", range(13))
def test_hostile_pickles_are_refused_and_not_run(number, tmp_path):
    trace = tmp_path / "executed"
    name, content = list(hostile(trace))[number]
    path = tmp_path / "hostile.pickle"
    path.write_bytes(content)
    with pytest.raises(InputError, match="nothing in it was executed") as refusal:
        read_contents(path)
    assert not trace.exists(), name
    assert refusal.value.where == str(path)
    assert refusal.value.remedy


def test_the_hostile_pickles_are_armed(tmp_path):
    """The test above proves nothing unless an ordinary unpickler would run them."""
    trace = tmp_path / "executed"
    ran = []
    for name, content in hostile(trace):
        if name in (
            "torch.load itself",
            "copyreg",
            "object dtype",
            "nested os.system",
            "nested pickle",
        ):
            continue  # torch refuses the nested ones itself, as long as its default is what it is
        pickle.loads(content)
        ran.append(trace.exists())
        trace.unlink(missing_ok=True)
    assert ran == [True] * 8


def test_names_hidden_behind_registered_numbers_are_refused(tmp_path):
    """Extension codes of copyreg skip find_class once another unpickling has resolved them."""
    trace = tmp_path / "executed"
    path = tmp_path / "hostile.pickle"
    copyreg.add_extension("os", "system", 0x70)
    try:
        text = f"touch {trace}".encode()
        armed = b"\x80\x02\x82\x70X" + struct.pack("<I", len(text)) + text + b"\x85R."
        pickle.loads(armed)
        assert trace.exists()
        trace.unlink()
        path.write_bytes(armed)
        with pytest.raises(InputError, match="nothing in it was executed"):
            read_contents(path)
        assert not trace.exists()
    finally:
        copyreg.remove_extension("os", "system", 0x70)


def test_forged_tensors_are_refused(tmp_path):
    """A view that reaches beyond its storage would read memory that is not the file's."""
    storage = torch.zeros(4).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    for offset, size, stride in ((0, (5,), (1,)), (3, (2,), (1,)), (-1, (2,), (1,)), (0, (4,), (2,))):
        forged = Calls(torch._utils._rebuild_tensor_v2, typed, offset, size, stride, False, OrderedDict())
        with pytest.raises(InputError, match="nothing in it was executed"):
            read_contents(write(tmp_path / "forged.pickle", {"z": forged}))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_cut_short_says_so(share, source, tmp_path):
    whole = source.read_bytes()
    path = tmp_path / "short.pickle"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="cut short") as refusal:
        read_contents(path)
    assert "download it again" in refusal.value.remedy


def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other.pickle"
    path.write_bytes(b"SIMPLE  =                    T")
    with pytest.raises(InputError, match="not a pickle"):
        read_contents(path)
    with pytest.raises(InputError, match="there is no such file"):
        read_contents(tmp_path / "none")
    for change, said in (
        ({"z": content["z"] / 2}, "5.25 Mm"),
        ({"wavelength": [wl - 1.8 for wl in content["wavelength"]]}, "in vacuum"),
        ({"mu": [0.95, 0.5]}, "one ray"),
        ({"vel": content["vel"][:-1]}, "11, 12"),
        ({"nTime": [1, 2]}, "2 runs"),
        ({"line": [[row / row.max() for row in rows] for rows in content["line"]]}, "erg s-1"),
        ({"ne": content["temperature"][0]}, "list of tensors"),
    ):
        with pytest.raises(InputError, match="not the paper's training data") as refusal:
            read_contents(write(path, content | change))
        assert said in str(refusal.value)
    without = {key: value for key, value in content.items() if key != "vel"}
    with pytest.raises(InputError, match="not the paper's training data"):
        read_contents(write(path, without))


def test_storages_of_torch_before_1_0_are_read(content, tmp_path):
    """Then a storage was pickled as a list of its numbers: torch.FloatStorage([...])."""
    wanted = read_contents(write(tmp_path / "new.pickle", content))

    class Listed:
        def __init__(self, kind, values):
            self.kind, self.values = kind, values

        def __reduce__(self):
            return self.kind, (self.values,)

    class Old(pickle.Pickler):
        def reducer_override(self, tensor):
            if not isinstance(tensor, torch.Tensor):
                return NotImplemented
            kind = torch.DoubleStorage if tensor.dtype == torch.float64 else torch.FloatStorage
            view = (Listed(kind, tensor.tolist()), 0, tuple(tensor.shape), (1,), False, None)
            return torch._utils._rebuild_tensor_v2, view

    path = tmp_path / "old.pickle"
    with path.open("wb") as file:
        Old(file, protocol=3).dump(content)
    assert b"_load_from_bytes" not in path.read_bytes()
    found = read_contents(path)
    assert (found.wavelengths, found.runs, found.mu) == (wanted.wavelengths, wanted.runs, wanted.mu)


# The grid


def test_units_are_the_grids(grid_path, content):
    grid = open_grid(grid_path).load()
    assert grid.sizes["sample"] == sum(COUNTS)
    assert grid["converged"].all()
    assert grid["height"].values == pytest.approx(HEIGHTS, abs=1e-12)
    assert grid["mu"].values == pytest.approx([0.95308992], abs=1e-7)
    half_step = 2.0**-10  # the store's rounding
    for name, key, unit in (
        ("electron_density", "ne", 1.0),
        ("temperature", "temperature", 1.0),
        ("velocity", "vel", 1e5),
    ):
        wanted = torch.stack(content[key]).numpy() / unit
        assert grid[name].values == pytest.approx(wanted, rel=1.01 * half_step), name
    for number, name in enumerate(REST):
        wanted = torch.stack(content["line"][number]).numpy()
        assert grid[name].values[:, 0] == pytest.approx(wanted, rel=1.01 * half_step)
        assert "Angstrom" in grid[name].attrs["units"]
        offsets = grid[f"wavelength_{name}"]
        # As stored, to a hundredth of a CRISP step; the rest wavelength is the model atom's.
        assert offsets.attrs["rest_wavelength"] == pytest.approx(REST[name], abs=1e-3)
        assert offsets.values + offsets.attrs["rest_wavelength"] == pytest.approx(
            content["wavelength"][number].numpy(), abs=1e-9
        )


def test_snapshots_of_equal_beams_are_one_simulation(grid_path):
    grid = open_grid(grid_path).load()
    runs = np.repeat(np.arange(len(BEAMS)), COUNTS)
    assert grid["parameter_beam_spectral_index"].values == pytest.approx([BEAMS[i][0] for i in runs])
    assert grid["parameter_beam_total_energy"].values == pytest.approx([BEAMS[i][1] for i in runs])
    assert grid["parameter_beam_cutoff_energy"].values == pytest.approx(
        [float(BEAMS[i][2].removesuffix("kev")) for i in runs]
    )
    assert grid["parameter_snapshot"].values.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1, 2]
    # By their beams in ascending order: (3, 3e10, 10), (4, 1e11, 20), (4, 1e12, 20).
    assert grid["simulation"].values.tolist() == [1, 1, 1, 0, 0, 2, 2, 2, 2, 0, 0, 0]
    assert len(set(split(grid["simulation"].values)[runs % 2 == 1])) == 1
    assert grid["parameter_beam_total_energy"].attrs["units"] == "erg / cm2"


def test_the_store_says_where_it_is_from(grid_path, source):
    import hashlib

    grid = open_grid(grid_path)
    maker, digest = grid.attrs["maker"], hashlib.sha256(source.read_bytes()).hexdigest()
    assert maker["sha256"] == grid.attrs["made_from"][source.name] == digest
    assert maker["file"] == source.name
    assert "centre of the file's frequencies" in maker["rest_wavelengths"]


def test_a_network_can_train_on_it(grid_path):
    """With wavelengths that the file covers; CRISP's own reach further than the window it was cut to."""
    grid = open_grid(grid_path).load()
    axes = {
        line.name: np.linspace(-0.9, 0.9, 19) * line.half_width + line.rest_wavelength
        for line in (HALPHA, CA8542)
    }
    layout = Layout(
        HEIGHTS,
        tuple(
            type(line)(line.name, line.rest_wavelength, 0.9 * line.half_width, 30)
            for line in (HALPHA, CA8542)
        ),
    )
    examples = TrainingSet(grid, layout, Augmentation(doppler=0.0), wavelengths=axes)
    batch = examples.clean()
    assert batch.atmosphere.shape == (12, 150)
    assert batch.lines.shape == (12, 60)
    assert batch.lines.amax(dim=1).tolist() == pytest.approx([1.0] * 12)
    assert torch.isfinite(batch.atmosphere).all()
    drawn = examples.draw(8, torch.Generator().manual_seed(0))
    assert drawn.mu.tolist() == pytest.approx([0.95308992] * 8)


def test_again_does_only_what_is_missing(grid_path, source, client, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in grid_path.rglob("*") if file.is_file()}
    make_published_grid(source, grid_path, cluster=client)
    assert {file: file.stat().st_mtime_ns for file in grid_path.rglob("*") if file.is_file()} == before
    other = write(tmp_path / "other.pickle", released(seed=1))
    with pytest.raises(MisuseError, match="made with other settings"):
        make_published_grid(other, grid_path, cluster=client)


def test_values_that_are_not_physical_are_kept_and_marked(content, tmp_path):
    from pipeline.grids.published import RunTask, run_task

    bad = [row.clone() for row in content["ne"]]
    bad[4][7] = -1.0
    source = write(tmp_path / "bad.pickle", content | {"ne": bad})
    contents = read_contents(source)
    records = run_task(RunTask(source, contents.sha256, contents.runs[1]))
    assert [record.status for record in records] == [0, 2]
    assert "not positive" in records[1].reason
    with pytest.raises(InputError, match="another one"):
        run_task(RunTask(source, "0" * 64, contents.runs[1]))


def test_a_workers_error_reaches_the_caller(client, tmp_path):
    trace = tmp_path / "executed"
    source = tmp_path / "hostile.pickle"
    source.write_bytes(pickle.dumps(Calls(os.system, f"touch {trace}")))
    with pytest.raises(InputError, match="nothing in it was executed"):
        make_published_grid(source, tmp_path / "grid.zarr", cluster=client)
    assert not trace.exists()
    assert not (tmp_path / "grid.zarr").exists()


# Rest wavelengths


def test_rest_wavelength_is_the_centre_of_the_frequencies():
    wavelengths = axis("halpha", 1.65)
    # Even in frequency, so not even in wavelength: the mean of the ends is off by reach^2 / rest.
    assert wavelengths.mean() != pytest.approx(REST["halpha"], abs=1e-5)
    found, origin = rest_wavelength(wavelengths, HALPHA)
    assert found == pytest.approx(REST["halpha"], abs=1e-6)
    assert origin.startswith("centre")


def test_rest_wavelength_of_an_uneven_axis_is_the_laboratorys():
    wavelengths = axis("ca8542", 1.2)[3:]
    assert rest_wavelength(wavelengths, CA8542) == (CA8542.rest_wavelength, "laboratory")


def test_doppler_shift_of_the_rest_wavelength_matters():
    """0.08 Angstrom between RADYN's H-alpha and the laboratory's are 3.7 km/s."""
    shift = (REST["halpha"] - HALPHA.rest_wavelength) / HALPHA.rest_wavelength * LIGHT_SPEED
    assert shift == pytest.approx(3.7, abs=0.1)
