"""The networks of FlareField: spectral lines to posterior atmospheres, in torch and nothing else."""

from inn.checkpoint import BUNDLED, import_weights, load_model, model_hash, save_model
from inn.conditional import ConditionalNetwork
from inn.emulator import Emulator
from inn.errors import FlareFieldError, MisuseError, ModelError
from inn.joint import JointNetwork
from inn.latent import draw_latent
from inn.layout import CA8542, HALPHA, HEIGHTS, QUANTITIES, Layout, LineWindow
from inn.posterior import posterior_quantiles, sample
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
    "draw_latent",
    "import_weights",
    "load_model",
    "model_hash",
    "posterior_quantiles",
    "sample",
    "save_model",
    "scale",
    "unscale",
]
