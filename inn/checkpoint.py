"""Models in files: FlareField's own model directory, and the published network's checkpoints.

A model directory holds ``model.json`` (what the network is: architecture, layout, units, scaling, record of
training, the weights' SHA-256) and ``weights.safetensors``. Nothing in it can be executed. Published
checkpoints are pickles: they are read by torch's restricted unpickler alone, which builds tensors and plain
containers and refuses everything else.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickletools
import re
import shutil
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from inn.conditional import ConditionalNetwork
from inn.coupling import FixedPermutation
from inn.emulator import Emulator
from inn.errors import FlareFieldError, MisuseError, ModelError
from inn.joint import JointNetwork
from inn.latent import TunedLatents
from inn.layout import CA8542, HALPHA, HEIGHTS, Layout
from inn.novelty import Novelty
from inn.preview import Preview
from inn.scaling import SCALINGS, UNITS

BUNDLED = Path(__file__).parent / "models" / "conditional"
"""The model directory that comes with FlareField."""

FORMAT = "flarefield model"
FORMAT_VERSION = 1
DESCRIPTION_FILE = "model.json"
WEIGHTS_FILE = "weights.safetensors"

Network: TypeAlias = JointNetwork | ConditionalNetwork

_KINDS: dict[str, type[JointNetwork] | type[ConditionalNetwork]] = {
    "joint": JointNetwork,
    "conditional": ConditionalNetwork,
}
_COMPANIONS: dict[str, type[Novelty] | type[Emulator] | type[TunedLatents] | type[Preview]] = {
    "novelty": Novelty,
    "emulator": Emulator,
    "latents": TunedLatents,
    "preview": Preview,
}
"""What a network may carry, stored with it under its name."""


def save_model(model: Network, path: str | Path, record: Mapping[str, Any] | None = None) -> None:
    """Write a model directory.

    The directory appears whole or not at all: it is written under another name beside ``path`` and renamed.
    A model directory that is already there is replaced.

    Parameters
    ----------
    model : JointNetwork or ConditionalNetwork
        The network; its ``novelty``, ``emulator``, ``latents`` and ``preview``, where it has them, are stored
        with it.
    path : str or Path
        The directory to write.
    record : mapping, optional
        How the network came to be: data, recipe, losses, versions, as JSON can hold them (NumPy numbers and
        arrays too). The model's own ``record`` if left out.

    Raises
    ------
    MisuseError
        If ``path`` exists and is something else than a model directory.
    ModelError
        If the files cannot be written.
    """
    path = Path(path)
    kind = next((name for name, network in _KINDS.items() if type(model) is network), None)
    if kind is None:
        raise MisuseError(
            "this is not a network that has a model directory",
            found=type(model).__name__,
            expected=" or ".join(network.__name__ for network in _KINDS.values()),
        )
    if os.path.lexists(path) and not _may_be_replaced(path):
        raise MisuseError(
            "the output exists and is not a model directory",
            where=path,
            remedy="choose another path, or remove it yourself",
        )
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    weights: bytes = safetensors.torch.save(state, metadata={"format": "pt"})
    companions = {name: getattr(model, name, None) for name in _COMPANIONS}
    description: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "flarefield_version": version("flarefield"),
        "kind": kind,
        "architecture": model.architecture(),
        **{name: None if part is None else part.architecture() for name, part in companions.items()},
        "layout": model.layout.to_json(),
        "units": {**UNITS, "lines": "intensity per Angstrom divided by the joint maximum of all lines"},
        "scaling": _scaling_names(),
        "record": dict(model.record if record is None else record),
        "weights": {"file": WEIGHTS_FILE, "sha256": hashlib.sha256(weights).hexdigest()},
    }
    text = json.dumps(description, indent=1, default=_plain) + "\n"
    unfinished = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        _write_synced(unfinished / WEIGHTS_FILE, weights)
        _write_synced(unfinished / DESCRIPTION_FILE, text.encode())
        _move_into_place(unfinished, path)
    except OSError as failure:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ModelError(
            "the model cannot be written",
            where=path,
            found=failure.strerror or str(failure),
            remedy="see that the place exists, has room and may be written",
        ) from failure


def load_model(path: str | Path | None = None) -> Network:
    """Read a model directory.

    Parameters
    ----------
    path : str or Path, optional
        The directory. The bundled model if left out.

    Returns
    -------
    JointNetwork or ConditionalNetwork
        On the CPU, in evaluation mode, in the precision it was saved in, with ``layout``, ``latent_size``,
        ``record`` (how it came to be), and ``novelty``, ``emulator``, ``latents`` and ``preview``, None where
        it has none.

    Raises
    ------
    ModelError
        If there is no model, its format or kind is unknown, a part is missing or unreadable, or the weights
        are not those that its description was written for.
    """
    path = BUNDLED if path is None else Path(path)
    description = _read_description(path)
    where = path / DESCRIPTION_FILE
    try:
        kind = description["kind"]
        if kind not in _KINDS:
            raise ModelError(
                "the kind of network is unknown",
                where=where,
                found=kind,
                expected=" or ".join(_KINDS),
                remedy="install the FlareField that wrote it",
            )
        if description["scaling"] != _scaling_names():
            raise ModelError(
                "the model was trained with another scaling of the atmosphere",
                where=where,
                found=description["scaling"],
                expected=_scaling_names(),
            )
        layout = Layout.from_json(description["layout"])
        # Building a network draws initial weights; loading a model must leave the caller's draws alone.
        with torch.random.fork_rng(devices=[]):
            model = _KINDS[kind].from_architecture(layout, description["architecture"])
            for name, companion in _COMPANIONS.items():
                stored = description.get(name)
                part = None if stored is None else companion.from_architecture(layout, stored)
                setattr(model, name, part)
        record = dict(description["record"])
        expected_hash = description["weights"]["sha256"]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as failure:
        raise ModelError(
            "the model's description is not readable",
            where=where,
            found=f"{type(failure).__name__}: {failure}",
            expected="what `save_model` writes",
            remedy="get the model again",
        ) from failure
    except FlareFieldError as failure:
        if failure.where is not None and failure.where.startswith(str(path)):
            raise
        raise ModelError(
            failure.problem,
            where=where if failure.where is None else f"{where}: {failure.where}",
            found=failure.found,
            expected=failure.expected,
            remedy=failure.remedy or "get the model again",
        ) from failure
    weights_file = path / WEIGHTS_FILE
    weights = _read_file(weights_file)
    found_hash = hashlib.sha256(weights).hexdigest()
    if found_hash != expected_hash:
        raise ModelError(
            "the weights are not those that the model was saved with",
            where=weights_file,
            found=f"sha256 {found_hash}",
            expected=f"sha256 {expected_hash}",
            remedy="get the model again: the file is damaged, or belongs to another model",
        )
    try:
        # assign: each tensor keeps the precision it was saved in.
        model.load_state_dict(safetensors.torch.load(weights), assign=True)
    except (SafetensorError, RuntimeError) as failure:
        raise ModelError(
            "the weights do not fit the network that the model describes",
            where=weights_file,
            found=failure,
            remedy="get the model again",
        ) from failure
    model.record = record
    return model.eval()


def model_hash(path: str | Path | None = None) -> str:
    """Return the SHA-256 of a model directory: its description and its weights, wherever it lies.

    Parameters
    ----------
    path : str or Path, optional
        The directory. The bundled model if left out.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    ModelError
        If one of the two files is missing.
    """
    path = BUNDLED if path is None else Path(path)
    digest = hashlib.sha256()
    for name in (DESCRIPTION_FILE, WEIGHTS_FILE):
        digest.update(hashlib.sha256(_read_file(path / name)).digest())
    return digest.hexdigest()


def import_weights(
    file: str | Path, *, line_points: int | None = None, latent: int | None = None
) -> JointNetwork:
    """Read a checkpoint of the published network.

    Two layouts exist. Release 1.0.0 (layout A) states its latent size, its line lengths and perhaps its
    heights, and leaves out the permutations, which its code made from fixed seeds. Releases 1.0.1 and 1.1.1
    (layout B) hold the permutations and state nothing else. The width is that of the weights. Nothing in the
    file is executed: anything but tensors and plain containers is refused.

    Parameters
    ----------
    file : str or Path
        A file that ``torch.save`` wrote.
    line_points : int, optional
        Layout B: wavelengths of each line, 30 if left out; release 1.1.1 has 31.
    latent : int, optional
        Layout B: components of the latent space, 150 if left out.

    Returns
    -------
    JointNetwork
        In evaluation mode; its ``record`` says what it was made from.

    Raises
    ------
    ModelError
        If the file cannot be read, holds code, or is not a checkpoint of the published network.
    MisuseError
        If ``line_points`` or ``latent`` contradict what the file states.

    References
    ----------
    Osborne, Armstrong & Fletcher (2019), ApJ 873, 128, doi:10.3847/1538-4357/ab07b4;
    https://github.com/Goobley/Radynversion
    """
    file = Path(file)
    content = _read_file(file)
    checkpoint = _unpickle_tensors(file, content)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise _not_published(file, "no `state_dict`")
    if any(key.startswith(_LAYOUT_B.prefix) for key in state):
        naming = _LAYOUT_B
        points = 30 if line_points is None else line_points
        layout = _layout_with_points(file, HEIGHTS, points, points)
        latent_size, heights_from = 150 if latent is None else latent, "published"
    elif any(key.startswith(_LAYOUT_A.prefix) for key in state):
        naming = _LAYOUT_A
        heights, halpha_points, ca8542_points, latent_size, heights_from = _stated_sizes(file, checkpoint)
        _agree(file, "line_points", line_points, {halpha_points, ca8542_points})
        _agree(file, "latent", latent, {latent_size})
        layout = _layout_with_points(file, heights, halpha_points, ca8542_points)
    else:
        raise _not_published(file, f"weights named {', '.join(list(state)[:3]) or 'nothing'}")
    blocks = _count_blocks(file, state, naming)
    width = _width(file, state, naming)
    try:
        with torch.random.fork_rng(devices=[]):
            model = JointNetwork(layout, latent_size=latent_size, width=width, blocks=blocks)
    except ModelError as failure:
        raise ModelError(
            failure.problem,
            where=file,
            found=failure.found,
            expected=failure.expected,
            remedy="where the file states no sizes, give the latent size and line length it was trained with",
        ) from failure
    _fill(file, model, dict(state), naming)
    model.record = {
        "source": "imported checkpoint of the published network",
        "doi": "10.3847/1538-4357/ab07b4",
        "file": file.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "checkpoint_layout": naming.layout,
        "heights": heights_from,
        "training_data": "not stated here; the published networks' is the F-CHROMA grid, mu 0.9531",
    }
    epoch = checkpoint.get("epoch")
    if isinstance(epoch, int):
        model.record["epoch"] = epoch
    return model.eval()


@dataclass(frozen=True)
class _Naming:
    """How one of the published layouts names the weights in its ``state_dict``."""

    layout: str
    prefix: str
    first: int
    """Number of the first coupling block; permutations take every second number from there."""
    subnet: str
    holds_permutations: bool


_LAYOUT_A = _Naming("A", "module_list.", 1, "", holds_permutations=False)
_LAYOUT_B = _Naming("B", "model.module_list.", 0, "subnet_", holds_permutations=True)

_LAYERS = {"fc1": 0, "fc2": 2, "fc2b": 4, "fc2d": 6, "fc3": 8}
"""The published subnets' layers, and where `inn.coupling.Subnet` has them."""


def _scaling_names() -> dict[str, str]:
    return {quantity: scaling.name for quantity, scaling in SCALINGS.items()}


def _plain(value: object) -> Any:  # noqa: ANN401 - whatever JSON holds
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a model's record cannot hold {type(value).__name__}: {value!r}")


def _may_be_replaced(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    return names <= {DESCRIPTION_FILE, WEIGHTS_FILE}


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _move_into_place(unfinished: Path, path: Path) -> None:
    if not path.exists():
        unfinished.rename(path)
        return
    # A directory cannot be replaced in one step; until the second step the old model lies beside.
    replaced = unfinished.with_name(unfinished.name + ".replaced")
    path.rename(replaced)
    try:
        unfinished.rename(path)
    except OSError:
        replaced.rename(path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as failure:
        raise ModelError(
            "the file cannot be read",
            where=path,
            found=failure.strerror or str(failure),
            remedy="check the path",
        ) from failure


def _read_description(path: Path) -> dict[str, Any]:
    where = path / DESCRIPTION_FILE
    if not where.is_file():
        remedy = "check the path"
        if path.is_file():
            remedy = "if this is a published checkpoint, convert it: flarefield import-weights FILE MODEL"
        raise ModelError(
            "this is not a model directory",
            where=path,
            found="a file" if path.is_file() else f"no {DESCRIPTION_FILE}" if path.is_dir() else "nothing",
            expected=f"a directory with {DESCRIPTION_FILE} and {WEIGHTS_FILE}",
            remedy=remedy,
        )
    try:
        description = json.loads(_read_file(where))
    except ValueError as failure:
        raise ModelError(
            "the model's description is not JSON", where=where, found=failure, remedy="get the model again"
        ) from failure
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ModelError(
            "the file does not describe a FlareField model",
            where=where,
            found=description.get("format") if isinstance(description, dict) else type(description).__name__,
            expected=f"format {FORMAT!r}",
        )
    if description.get("version") != FORMAT_VERSION:
        raise ModelError(
            "the model's format has a version that this FlareField does not read",
            where=where,
            found=description.get("version"),
            expected=FORMAT_VERSION,
            remedy=f"install the FlareField that wrote it ({description.get('flarefield_version')})",
        )
    return description


def _unpickle_tensors(file: Path, content: bytes) -> Any:  # noqa: ANN401 - the file may hold anything
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on how to load it all the same
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as failure:
        # Damaged and hostile files fail in as many ways as a pickle has; all of them mean the same here.
        message = str(failure)
        named = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"class (\S+) was not", message)
        forbidden = named[1] if named is not None else _named_code(content)
        if forbidden is not None:
            raise ModelError(
                "the checkpoint holds code, which is never executed",
                where=file,
                found=forbidden,
                expected="tensors, numbers, texts, lists and dictionaries",
                remedy="use the checkpoint as published, or save its weights alone: "
                "torch.save({'state_dict': network.state_dict()}, file)",
            ) from failure
        raise ModelError(
            "the file is not a checkpoint that torch can read, or is damaged",
            where=file,
            found=f"{len(content)} bytes that begin with {content[:8]!r}",
            expected="a file that torch.save wrote",
            remedy="download it again and compare its size",
        ) from failure


def _named_code(content: bytes) -> str | None:
    """Name of the first function or class that a bare pickle asks for; None if there is none."""
    texts: list[str] = []
    try:
        for operation, argument, _ in pickletools.genops(content):
            if operation.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if operation.name == "STACK_GLOBAL":
                return ".".join(texts[-2:])
            if isinstance(argument, str):
                texts.append(argument)
    except (ValueError, UnicodeDecodeError, OverflowError):
        return None  # not a pickle, or a broken one
    return None


def _not_published(file: Path, found: str) -> ModelError:
    return ModelError(
        "this is not a checkpoint of the published network",
        where=file,
        found=found,
        expected="`state_dict` with module_list.1.s1.fc1.weight... (release 1.0.0) or "
        "model.module_list.0.subnet_s1.fc1.weight... (releases 1.0.1 and 1.1.1)",
        remedy="a FlareField model is a directory, and needs no import",
    )


def _agree(file: Path, name: str, given: int | None, stated: set[int]) -> None:
    if given is not None and {given} != stated:
        raise MisuseError(
            f"the checkpoint states another {name}",
            where=file,
            found=given,
            expected=" and ".join(str(number) for number in sorted(stated)),
            remedy=f"leave {name} out",
        )


def _layout_with_points(
    file: Path, heights: NDArray[np.float64], halpha_points: int, ca8542_points: int
) -> Layout:
    try:
        return Layout(heights, (replace(HALPHA, points=halpha_points), replace(CA8542, points=ca8542_points)))
    except ModelError as failure:
        raise ModelError(
            failure.problem, where=file, found=failure.found, expected=failure.expected
        ) from failure


def _representation(file: Path, checkpoint: Mapping[str, Any], key: str, names: Sequence[str]) -> list[int]:
    """Lengths of a vector's named parts, from layout A's list of tuples such as ``('ne', 50)``."""
    stated = checkpoint.get(key)
    expected = f"parts {', '.join(names)} in this order, each with its length"
    if not isinstance(stated, list | tuple) or not all(
        isinstance(part, list | tuple) and part for part in stated
    ):
        raise ModelError(
            f"the checkpoint does not state `{key}`", where=file, found=stated, expected=expected
        )
    lengths = [part[1] for part in stated if len(part) == 2]
    if [part[0] for part in stated] != list(names) or not all(
        isinstance(length, int) and length > 0 for length in lengths
    ):
        raise ModelError(
            f"the checkpoint's `{key}` is not the published network's",
            where=file,
            found=stated,
            expected=expected,
        )
    return lengths


def _stated_sizes(
    file: Path, checkpoint: Mapping[str, Any]
) -> tuple[NDArray[np.float64], int, int, int, str]:
    """Layout A's heights in Mm, points of both lines, latent size, and where the heights are from."""
    atmosphere = _representation(file, checkpoint, "inRepr", ("ne", "temperature", "vel", "!!PAD"))
    lines = _representation(file, checkpoint, "outRepr", ("LatentSpace", "!!PAD", "Halpha", "Ca8542"))
    if len(atmosphere) != 3 or len(set(atmosphere)) != 1 or len(lines) != 3:
        raise ModelError(
            "the checkpoint's vectors are not the published network's",
            where=file,
            found=f"{checkpoint['inRepr']} and {checkpoint['outRepr']}",
            expected="electron density, temperature and velocity at the same heights, and two lines",
        )
    latent_size, halpha_points, ca8542_points = lines
    z = checkpoint.get("z")
    if z is None:
        if atmosphere[0] != HEIGHTS.size:
            raise ModelError(
                "the checkpoint does not state its heights",
                where=file,
                found=f"{atmosphere[0]} heights and no `z`",
                expected=f"`z` in cm; only the published {HEIGHTS.size} heights are known without it",
            )
        return HEIGHTS, halpha_points, ca8542_points, latent_size, "published"
    if not isinstance(z, torch.Tensor) or z.shape != (atmosphere[0],) or not z.is_floating_point():
        raise ModelError(
            "the checkpoint's heights do not fit its atmosphere",
            where=file,
            found=f"`z` of shape {tuple(z.shape)}" if isinstance(z, torch.Tensor) else type(z).__name__,
            expected=f"a tensor of {atmosphere[0]} heights in cm",
        )
    return z.double().numpy() / 1e8, halpha_points, ca8542_points, latent_size, "stated by the checkpoint"


def _take(file: Path, state: dict[str, Any], key: str, shape: tuple[int, ...] | None) -> torch.Tensor:
    """Remove a tensor from ``state``, once it is what it should be."""
    tensor = state.pop(key, None)
    if not isinstance(tensor, torch.Tensor) or (shape is not None and tensor.shape != shape):
        raise ModelError(
            "the checkpoint's weights are incomplete or have the wrong shape",
            where=file,
            found=f"{key}: "
            + (
                f"shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else "missing or no tensor"
            ),
            expected="a tensor" if shape is None else f"shape {shape}",
            remedy="download the checkpoint again; it must be the published network's",
        )
    if not torch.isfinite(tensor).all():
        raise ModelError("the checkpoint's weights are not finite", where=file, found=key)
    return tensor


def _count_blocks(file: Path, state: Mapping[str, Any], naming: _Naming) -> int:
    """Number of coupling blocks, once they are numbered without a gap."""
    number = re.compile(re.escape(naming.prefix) + r"(\d{1,3})\.")
    steps = sorted({int(match[1]) for key in state if (match := number.match(key))})
    couplings = steps[::2] if naming.holds_permutations else steps
    if couplings != list(range(naming.first, naming.first + 2 * len(couplings), 2)):
        raise _not_published(file, f"coupling blocks numbered {couplings}")
    return len(couplings)


def _width(file: Path, state: Mapping[str, Any], naming: _Naming) -> int:
    """Width of the padded vectors: what the first block's two subnets take together."""
    sizes = []
    for half in ("s1", "s2"):
        key = f"{naming.prefix}{naming.first}.{naming.subnet}{half}.fc1.weight"
        weight = _take(file, dict(state), key, None)
        if weight.ndim != 2:
            raise _not_published(file, f"{key} of shape {tuple(weight.shape)}")
        sizes.append(weight.shape[1])
    return sum(sizes)


def _fill(file: Path, model: JointNetwork, state: dict[str, Any], naming: _Naming) -> None:
    """Copy the checkpoint's weights and permutations into the network, leaving nothing over."""
    named = dict(model.named_parameters())
    for index, step in enumerate(model.steps):
        place = f"{naming.prefix}{naming.first + index}."
        if isinstance(step, FixedPermutation):
            if naming.holds_permutations:
                order = _take(file, state, f"{place}perm", (model.width,))
                inverse = _take(file, state, f"{place}perm_inv", (model.width,))
                _check_permutation(file, place, order, inverse)
                model.steps[index] = FixedPermutation(order)
            continue
        for half in ("s1", "t1", "s2", "t2"):
            for layer, position in _LAYERS.items():
                for kind in ("weight", "bias"):
                    own = named[f"steps.{index}.{half}.{position}.{kind}"]
                    taken = _take(
                        file, state, f"{place}{naming.subnet}{half}.{layer}.{kind}", tuple(own.shape)
                    )
                    with torch.no_grad():
                        own.copy_(taken)
    if state:
        raise ModelError(
            "the checkpoint holds weights that the published network does not have",
            where=file,
            found=", ".join(list(state)[:3]),
            remedy="its network cannot be reproduced from this file",
        )


def _check_permutation(file: Path, place: str, order: torch.Tensor, inverse: torch.Tensor) -> None:
    ascending = torch.arange(order.numel())
    whole = order.dtype == inverse.dtype == torch.int64
    if (
        not whole
        or not torch.equal(order.sort().values, ascending)
        or not torch.equal(inverse, torch.argsort(order))
    ):
        raise ModelError(
            "the checkpoint's permutation is none",
            where=file,
            found=f"{place}perm and {place}perm_inv",
            expected=f"the numbers 0 to {order.numel() - 1} in some order, and its inverse",
        )
