"""Model directories, and published checkpoints against FrEIA, with nothing in any file ever executed."""

import errno
import hashlib
import json
import os
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import published_checkpoints as published
import pytest
import torch

from inn.checkpoint import BUNDLED, import_weights, load_model, model_hash, save_model
from inn.emulator import Emulator
from inn.errors import MisuseError, ModelError
from inn.joint import JointNetwork
from inn.latent import draw_latent
from inn.layout import HEIGHTS, Layout
from inn.novelty import Novelty

SMALL = Layout([0.0, 0.5, 1.5])
# The published heights as the checkpoints hold them: float32, cm.
Z = torch.tensor(HEIGHTS * 1e8, dtype=torch.float32)


# --- agreement with FrEIA


def range_of_inputs(latent, points):
    generator = torch.Generator().manual_seed(3)
    atmosphere = torch.rand(200, 3, 50, generator=generator)
    atmosphere = atmosphere * torch.tensor([7.5, 4.2, 6.0])[:, None] + torch.tensor([8.0, 3.3, -3.0])[:, None]
    lines = torch.rand(200, 2 * points, generator=generator)
    return atmosphere.reshape(200, 150), lines, draw_latent(200, latent, seed=1)


@torch.no_grad()
def assert_agrees(model, reference, latent, points):
    """Our physical parts against FrEIA's padded vectors, put together here by hand."""
    atmosphere, lines, z = range_of_inputs(latent, points)
    whole = reference(torch.cat((atmosphere, torch.zeros(200, 234)), dim=1))
    found_lines, found_latent = model(atmosphere)
    torch.testing.assert_close(found_lines, whole[:, 384 - 2 * points :], rtol=0.0, atol=1e-4)
    torch.testing.assert_close(found_latent, whole[:, :latent], rtol=0.0, atol=1e-4)
    padding = torch.zeros(200, 384 - latent - 2 * points)
    back = reference(torch.cat((z, padding, lines), dim=1), rev=True)
    torch.testing.assert_close(model.inverse(lines, z), back[:, :150], rtol=0.0, atol=1e-4)
    assert (whole[:, :150] - atmosphere).abs().max() > 1.0  # far from the identity


@pytest.mark.filterwarnings("ignore:ReversibleGraphNet:DeprecationWarning")
@pytest.mark.parametrize(("latent", "points"), [(150, 30), (200, 31)])
def test_layout_a_agrees_with_freia(latent, points, tmp_path):
    reference = published.reference(published.Graph)
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3, betas=(0.8, 0.8))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=12, gamma=0.9)
    checkpoint = published.layout_a(
        reference,
        latent=latent,
        halpha=points,
        ca8542=points,
        z=Z,
        optimizer=optimizer.state_dict(),
        scheduler=scheduler.state_dict(),
    )
    file = published.write(checkpoint, tmp_path / "Radynversion.pth.tar")
    model = import_weights(file)
    assert model.latent_size == latent
    assert [line.points for line in model.layout.lines] == [points, points]
    np.testing.assert_allclose(model.layout.heights, HEIGHTS, atol=1e-6)
    assert model.record["epoch"] == 11400
    assert model.record["checkpoint_layout"] == "A"
    assert model.record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert not model.training
    assert_agrees(model, reference, latent, points)


@pytest.mark.parametrize(("latent", "points"), [(None, None), (150, 31), (120, 25)])
def test_layout_b_agrees_with_freia(latent, points, tmp_path):
    reference = published.reference(published.Sequence, seed=5)
    file = published.write(published.layout_b(reference), tmp_path / "Radynversion_1.0.1.pth.tar")
    model = import_weights(file, line_points=points, latent=latent)
    latent, points = latent or 150, points or 30
    assert model.latent_size == latent
    assert [line.points for line in model.layout.lines] == [points, points]
    assert model.layout == Layout(HEIGHTS, model.layout.lines)
    assert model.record["checkpoint_layout"] == "B"
    assert_agrees(model, reference, latent, points)


@torch.no_grad()
def test_imported_weights_survive_a_model_directory(tmp_path):
    reference = published.reference(published.Sequence)
    model = import_weights(published.write(published.layout_b(reference), tmp_path / "weights.pth.tar"))
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.record == model.record
    _, lines, latent = range_of_inputs(150, 30)
    assert torch.equal(loaded.inverse(lines, latent), model.inverse(lines, latent))


def test_stored_permutations_are_taken_and_not_assumed(tmp_path):
    reference = published.reference(published.Sequence)
    other = torch.roll(torch.arange(384), 5)
    reference.model.module_list[3].perm.data = other
    reference.model.module_list[3].perm_inv.data = torch.argsort(other)
    file = published.write(published.layout_b(reference), tmp_path / "weights.pth.tar")
    assert_agrees(import_weights(file), reference, 150, 30)


# --- checkpoints that are not what they should be, on small networks in layout A


def small_checkpoint(**entries):
    reference = published.reference(published.Sequence, width=24)
    z = torch.tensor([0.0, 0.5e8, 1.5e8])
    checkpoint = published.layout_a(reference, latent=5, halpha=4, ca8542=6, heights=3, z=z)
    return {**checkpoint, **entries}


def small_file(tmp_path, checkpoint, **options):
    return published.write(checkpoint, tmp_path / "small.pth.tar", **options)


@pytest.mark.parametrize("zipped", [True, False])
def test_any_sizes_that_layout_a_states(tmp_path, zipped):
    # torch's container of before 1.6, in which release 1.0.0 was written, is read as well.
    file = small_file(tmp_path, small_checkpoint(), _use_new_zipfile_serialization=zipped)
    model = import_weights(file)
    assert model.layout.heights.tolist() == [0.0, 0.5, 1.5]
    assert [line.points for line in model.layout.lines] == [4, 6]
    assert (model.latent_size, model.width) == (5, 24)
    assert model.record["heights"] == "stated by the checkpoint"


@torch.no_grad()
def test_small_network_agrees_with_freia(tmp_path):
    reference = published.reference(published.Sequence, width=24)
    model = import_weights(small_file(tmp_path, small_checkpoint()))
    x = torch.randn(50, 24)
    torch.testing.assert_close(model.forward_padded(x), reference(x), rtol=0.0, atol=1e-5)
    torch.testing.assert_close(model.inverse_padded(x), reference(x, rev=True), rtol=0.0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:ReversibleGraphNet:DeprecationWarning")
def test_heights_of_a_checkpoint_without_them(tmp_path):
    # The published training notebook saved no `z`; only the published heights can be meant.
    reference = published.reference(published.Graph)
    checkpoint = published.layout_a(reference, latent=150, halpha=30, ca8542=30)
    model = import_weights(published.write(checkpoint, tmp_path / "checkpoint.pth.tar"))
    assert model.layout == Layout()
    assert model.record["heights"] == "published"
    checkpoint = small_checkpoint()
    del checkpoint["z"]
    with pytest.raises(ModelError, match="does not state its heights"):
        import_weights(small_file(tmp_path, checkpoint))


class Malicious:
    """Runs a command wherever its pickle is loaded without restraint."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", ["whole", "entry", "state_dict", "weight", "z"])
@pytest.mark.parametrize("container", ["zip", "legacy", "bare pickle", "tar"])
def test_no_code_is_executed(place, container, tmp_path):
    marker = tmp_path / "executed"
    payload = Malicious(marker)
    checkpoint = small_checkpoint()
    if place == "whole":
        checkpoint = payload
    elif place == "weight":
        checkpoint["state_dict"]["module_list.1.s1.fc1.weight"] = payload
    else:
        checkpoint["optimizer" if place == "entry" else place] = payload
    file = tmp_path / "hostile.pth.tar"
    if container == "zip":
        torch.save(checkpoint, file)
    elif container == "legacy":
        torch.save(checkpoint, file, _use_new_zipfile_serialization=False)
    else:
        file.write_bytes(pickle.dumps(checkpoint))
        if container == "tar":
            inner = tmp_path / "tensors"
            file.rename(inner)
            with tarfile.open(file, "w") as archive:
                for name in ("storages", "tensors", "pickle"):
                    archive.add(inner, arcname=name)
    with pytest.raises(ModelError) as caught:
        import_weights(file)
    assert not marker.exists()
    assert caught.value.where == str(file)
    assert caught.value.remedy
    if container in ("zip", "legacy"):
        assert caught.value.problem == "the checkpoint holds code, which is never executed"
        assert caught.value.found.endswith("system")
    # The payload is a real one.
    if place == "whole" and container == "bare pickle":
        pickle.loads(file.read_bytes())
        assert marker.exists()


def test_code_is_refused_whatever_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "executed"
    file = small_file(tmp_path, small_checkpoint(z=Malicious(marker)))
    with pytest.raises(ModelError, match="never executed"):
        import_weights(file)
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_checkpoint(tmp_path, zipped, share):
    file = small_file(tmp_path, small_checkpoint(), _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError, match="damaged") as caught:
        import_weights(file)
    assert caught.value.where == str(file)


def test_other_files(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a checkpoint\n" * 50)
    for file in (text, tmp_path):
        with pytest.raises(ModelError, match=re.escape(str(file))):
            import_weights(file)
    with pytest.raises(ModelError, match="No such file"):
        import_weights(tmp_path / "missing.pth.tar")


def changed(change):
    """A small checkpoint after `change` was done to its weights."""
    checkpoint = small_checkpoint()
    change(checkpoint["state_dict"])
    return checkpoint


FIRST = "module_list.1.s1.fc1.weight"
BROKEN = {
    "no dictionary": ([1, 2], "not a checkpoint of the published network"),
    "no weights": ({"epoch": 3}, "no `state_dict`"),
    "weights of no network": (small_checkpoint(state_dict={"layer.weight": torch.ones(2)}), "layer.weight"),
    "no names": (small_checkpoint(state_dict={3: torch.ones(2)}), "no `state_dict`"),
    "missing first weights": (changed(lambda state: state.pop(FIRST)), FIRST),
    "missing bias": (
        changed(lambda state: state.pop("module_list.9.t2.fc3.bias")),
        "module_list.9.t2.fc3.bias",
    ),
    "wrong shape": (
        changed(lambda state: state.update({"module_list.3.t1.fc2b.weight": torch.ones(24, 23)})),
        r"fc2b.weight: shape \(24, 23\)",
    ),
    "no matrix": (changed(lambda state: state.update({FIRST: torch.ones(24)})), FIRST),
    "no tensor": (changed(lambda state: state.update({FIRST: [1.0]})), FIRST),
    "not finite": (changed(lambda state: state[FIRST].fill_(torch.nan)), "not finite"),
    "batch normalisation": (
        changed(lambda state: state.update({"module_list.1.s1.bn1.weight": torch.ones(24)})),
        "module_list.1.s1.bn1.weight",
    ),
    "missing block": (
        changed(lambda state: [state.pop(key) for key in list(state) if key.startswith("module_list.5.")]),
        r"\[1, 3, 7, 9\]",
    ),
    "no sizes": (small_checkpoint(outRepr=None), "outRepr"),
    "other lines": (small_checkpoint(outRepr=[("LatentSpace", 5), ("!!PAD",), ("MgII", 9)]), "MgII"),
    "other order": (
        small_checkpoint(inRepr=[("temperature", 3), ("ne", 3), ("vel", 3), ("!!PAD",)]),
        "ne, temperature, vel",
    ),
    "no length": (
        small_checkpoint(outRepr=[("LatentSpace",), ("!!PAD",), ("Halpha", 4), ("Ca8542", 6)]),
        "published network's",
    ),
    "negative length": (
        small_checkpoint(outRepr=[("LatentSpace", -5), ("!!PAD",), ("Halpha", 4), ("Ca8542", 6)]),
        "outRepr",
    ),
    "unequal heights": (
        small_checkpoint(inRepr=[("ne", 3), ("temperature", 4), ("vel", 3), ("!!PAD",)]),
        "same heights",
    ),
    "too long for its width": (
        small_checkpoint(outRepr=[("LatentSpace", 50), ("!!PAD",), ("Halpha", 4), ("Ca8542", 6)]),
        "width of at least 60",
    ),
    "z of another length": (small_checkpoint(z=torch.arange(4.0)), r"shape \(4,\)"),
    "z that falls": (small_checkpoint(z=torch.tensor([1.5e8, 0.5e8, 0.0])), "ascend"),
    "z that is no tensor": (small_checkpoint(z=[0.0, 0.5e8, 1.5e8]), "list"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(case, tmp_path):
    checkpoint, message = BROKEN[case]
    file = small_file(tmp_path, checkpoint)
    with pytest.raises(ModelError, match=message) as caught:
        import_weights(file)
    assert caught.value.where == str(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.module_list.3.perm"), "module_list.3.perm"),
        (lambda state: state["model.module_list.1.perm"].fill_(0), "permutation"),
        (lambda state: state["model.module_list.1.perm"].add_(1), "permutation"),
        (lambda state: state["model.module_list.7.perm_inv"].copy_(torch.arange(384)), "permutation"),
    ],
)
def test_broken_permutations(change, message, tmp_path):
    checkpoint = published.layout_b(published.reference(published.Sequence))
    change(checkpoint["state_dict"])
    with pytest.raises(ModelError, match=message):
        import_weights(small_file(tmp_path, checkpoint))


def test_arguments_that_contradict_the_checkpoint(tmp_path):
    file = small_file(tmp_path, small_checkpoint())
    with pytest.raises(MisuseError, match="line_points"):
        import_weights(file, line_points=30)
    with pytest.raises(MisuseError, match="latent"):
        import_weights(file, latent=150)
    assert import_weights(file, latent=5).latent_size == 5


def test_arguments_too_large_for_the_weights(tmp_path):
    checkpoint = published.layout_b(published.reference(published.Sequence))
    file = small_file(tmp_path, checkpoint)
    with pytest.raises(ModelError, match="width of at least 424"):
        import_weights(file, line_points=137)
    with pytest.raises(ModelError, match="two points"):
        import_weights(file, line_points=1)


# --- model directories


def small_network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return JointNetwork(SMALL, latent_size=9, width=72, blocks=2)


def test_description_says_what_the_network_is(tmp_path):
    record = {"loss": np.float32(0.5), "epochs": np.arange(3), "grid": tmp_path, "seed": 1}
    save_model(small_network(), tmp_path / "model", record)
    assert sorted(os.listdir(tmp_path / "model")) == ["model.json", "weights.safetensors"]
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    weights = (tmp_path / "model" / "weights.safetensors").read_bytes()
    assert description["kind"] == "joint"
    assert description["architecture"] == {"latent_size": 9, "width": 72, "blocks": 2}
    assert description["layout"]["heights"] == {"units": "Mm", "values": [0.0, 0.5, 1.5]}
    assert [line["rest_wavelength"] for line in description["layout"]["lines"]] == [6564.61, 8544.44]
    assert description["scaling"]["velocity"] == "signed_log10"
    assert description["units"]["electron_density"] == "cm-3"
    assert description["record"] == {"loss": 0.5, "epochs": [0, 1, 2], "grid": str(tmp_path), "seed": 1}
    assert description["weights"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", description["flarefield_version"])


def test_companions_are_stored_with_the_network(tmp_path):
    torch.manual_seed(0)
    network = small_network()
    network.novelty = Novelty.fitted(SMALL, torch.rand(300, 60), torch.rand(100, 60), components=4)
    network.emulator = Emulator(SMALL, width=8, depth=1)
    save_model(network, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    for name in ("novelty", "emulator"):
        own, again = getattr(network, name), getattr(loaded, name)
        assert type(again) is type(own)
        assert not again.training
        for key, values in own.state_dict().items():
            assert again.state_dict()[key].dtype == values.dtype
            assert torch.equal(again.state_dict()[key], values)
    lines = torch.rand(20, 60)
    assert torch.equal(loaded.novelty.distance(lines), network.novelty.distance(lines))


def test_model_hash_is_of_the_content_alone(tmp_path):
    save_model(small_network(), tmp_path / "one", {"seed": 1})
    save_model(small_network(), tmp_path / "two", {"seed": 1})
    save_model(small_network(), tmp_path / "other", {"seed": 2})
    assert re.fullmatch("[0-9a-f]{64}", model_hash(tmp_path / "one"))
    assert model_hash(tmp_path / "one") == model_hash(tmp_path / "two")
    assert model_hash(tmp_path / "one") != model_hash(tmp_path / "other")
    network = small_network()
    with torch.no_grad():
        next(network.parameters())[0, 0] += 1e-6
    save_model(network, tmp_path / "two", {"seed": 1})
    assert model_hash(tmp_path / "one") != model_hash(tmp_path / "two")
    with pytest.raises(ModelError, match="cannot be read"):
        model_hash(tmp_path / "missing")


def test_a_model_is_replaced_and_nothing_else_is(tmp_path):
    save_model(small_network(), tmp_path / "model", {"seed": 1})
    save_model(small_network(), tmp_path / "model", {"seed": 2})
    assert load_model(tmp_path / "model").record == {"seed": 2}
    assert os.listdir(tmp_path) == ["model"]
    (tmp_path / "empty").mkdir()
    save_model(small_network(), tmp_path / "empty")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "data", tmp_path / "file"):
        with pytest.raises(MisuseError, match="is not a model directory"):
            save_model(small_network(), path)
    assert (tmp_path / "data" / "thesis.tex").read_text() == "years of work"


def test_only_networks_are_saved(tmp_path):
    with pytest.raises(MisuseError, match="Linear"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "model")


@pytest.mark.parametrize("moment", ["fsync", "first rename", "second rename"])
def test_a_write_that_fails_leaves_the_old_model(moment, tmp_path, monkeypatch):
    save_model(small_network(), tmp_path / "model", {"seed": 1})

    def no_space(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if moment == "fsync":
            patch.setattr("inn.checkpoint.os.fsync", no_space)
        else:
            rename, refused = Path.rename, "model" if moment == "first rename" else ".model."

            def refuse_once(path, target):
                # Of the two renames, the first takes the old model away, the second brings the new one.
                if path.name.startswith(refused) and not path.name.endswith(".replaced"):
                    no_space()
                return rename(path, target)

            patch.setattr("inn.checkpoint.Path.rename", refuse_once)
        with pytest.raises(ModelError, match="No space left"):
            save_model(small_network(), tmp_path / "model", {"seed": 2})
    assert load_model(tmp_path / "model").record == {"seed": 1}
    assert os.listdir(tmp_path) == ["model"]


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        save_model(small_network(), tmp_path / "file" / "model")


@pytest.fixture
def model(tmp_path):
    save_model(small_network(), tmp_path / "model", {"seed": 1})
    return tmp_path / "model"


def test_changed_weights_are_found(model):
    weights = bytearray((model / "weights.safetensors").read_bytes())
    weights[-5] ^= 1
    (model / "weights.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match="not those that the model was saved with") as caught:
        load_model(model)
    assert caught.value.where == str(model / "weights.safetensors")
    assert "sha256" in caught.value.found
    assert "sha256" in caught.value.expected
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["weights.safetensors", "model.json"])
def test_missing_part(model, name):
    (model / name).unlink()
    with pytest.raises(ModelError, match=re.escape(name)):
        load_model(model)


def test_no_model(tmp_path):
    with pytest.raises(ModelError, match="not a model directory"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ModelError, match="not a model directory"):
        load_model(tmp_path)
    file = small_file(tmp_path, small_checkpoint())
    with pytest.raises(ModelError, match="import-weights"):
        load_model(file)


def without(name):
    def change(description):
        del description[name]

    return change


DESCRIPTIONS = {
    "not JSON": ("{", "not JSON"),
    "a list": ("[]", "does not describe"),
    "another format": (lambda d: d.update(format="onnx"), "onnx"),
    "a later version": (lambda d: d.update(version=2), "version that this FlareField does not read"),
    "another kind": (lambda d: d.update(kind="diffusion"), "diffusion"),
    "a kind that is none": (lambda d: d.update(kind=[1]), "not readable"),
    "another scaling": (lambda d: d["scaling"].update(velocity="asinh"), "asinh"),
    "no layout": (without("layout"), "layout"),
    "no record": (without("record"), "record"),
    "no hash": (without("weights"), "weights"),
    "bad layout": (lambda d: d["layout"]["heights"].update(values=[2, 1]), "ascend"),
    "unknown size": (lambda d: d["architecture"].update(depth=7), "depth"),
    "size of another type": (lambda d: d["architecture"].update(width="wide"), "not readable"),
    "impossible size": (lambda d: d["architecture"].update(width=3), "width 3"),
    "another size": (lambda d: d["architecture"].update(width=74), "do not fit"),
    "a companion without weights": (lambda d: d.update(emulator={"width": 8, "depth": 1}), "do not fit"),
    "a companion that is none": (lambda d: d.update(emulator=3), "not readable"),
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_broken_descriptions(case, model):
    change, message = DESCRIPTIONS[case]
    file = model / "model.json"
    if callable(change):
        description = json.loads(file.read_text())
        change(description)
        file.write_text(json.dumps(description))
    else:
        file.write_text(change)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(model)
    assert caught.value.where.startswith(str(model))


def test_weights_that_are_no_weights(model):
    (model / "weights.safetensors").write_bytes(b"nothing")
    description = json.loads((model / "model.json").read_text())
    description["weights"]["sha256"] = hashlib.sha256(b"nothing").hexdigest()
    (model / "model.json").write_text(json.dumps(description))
    with pytest.raises(ModelError, match="do not fit"):
        load_model(model)


def test_the_bundled_model_lies_in_the_package():
    assert BUNDLED.parts[-3:] == ("inn", "models", "conditional")
