"""The networks of FlareField: spectral lines to posterior atmospheres, in torch and nothing else."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inn.checkpoint import BUNDLED, import_weights, load_model, model_hash, save_model
    from inn.conditional import ConditionalNetwork
    from inn.emulator import Emulator
    from inn.errors import FlareFieldError, MisuseError, ModelError
    from inn.joint import JointNetwork
    from inn.latent import draw_latent
    from inn.layout import CA8542, HALPHA, HEIGHTS, QUANTITIES, Layout, LineWindow
    from inn.novelty import Novelty
    from inn.posterior import posterior_quantiles, sample
    from inn.preview import Preview, preview_quantiles
    from inn.scaling import scale, unscale

__all__ = [
    "BUNDLED",
    "CA8542",
    "HALPHA",
    "HEIGHTS",
    "QUANTITIES",
    "ConditionalNetwork",
    "Emulator",
    "FlareFieldError",
    "JointNetwork",
    "Layout",
    "LineWindow",
    "MisuseError",
    "ModelError",
    "Novelty",
    "Preview",
    "draw_latent",
    "import_weights",
    "load_model",
    "model_hash",
    "posterior_quantiles",
    "preview_quantiles",
    "sample",
    "save_model",
    "scale",
    "unscale",
]

_MODULES = {
    "checkpoint": ("BUNDLED", "import_weights", "load_model", "model_hash", "save_model"),
    "conditional": ("ConditionalNetwork",),
    "emulator": ("Emulator",),
    "errors": ("FlareFieldError", "MisuseError", "ModelError"),
    "joint": ("JointNetwork",),
    "latent": ("draw_latent",),
    "layout": ("CA8542", "HALPHA", "HEIGHTS", "QUANTITIES", "Layout", "LineWindow"),
    "novelty": ("Novelty",),
    "posterior": ("posterior_quantiles", "sample"),
    "preview": ("Preview", "preview_quantiles"),
    "scaling": ("scale", "unscale"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    # On first use: a command's help, and workers that compute no network, need not wait for torch or hold it.
    if name not in _HOMES:
        raise AttributeError(f"module 'inn' has no attribute {name!r}")
    return getattr(import_module(f"inn.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
