"""In which precision matrix products are done: the networks' own, or half of it where that costs nothing.

Processors and GPUs that multiply bfloat16 numbers do so two to four times as fast as float32 ones. Its 8
significant bits suffice inside a coupling network, whose output is a correction, but not for what an
atmosphere is made of: networks do their last products, sums and exponentials in float32 in any case. What is
left of the error is measured for every network (`inn.sampling.precision_error`) before it is used.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from inn.errors import MisuseError

Precision = Literal["float32", "bfloat16"]
"""Precision of the factors of matrix products."""


def products_in(precision: Precision, device: torch.device) -> torch.autocast:
    """Context in which matrix products take factors of this precision.

    Parameters
    ----------
    precision : {"float32", "bfloat16"}
        The former leaves everything in the network's own precision.
    device : torch.device
        Where they are done.

    Raises
    ------
    MisuseError
        There is no such precision.
    """
    if precision not in ("float32", "bfloat16"):
        raise MisuseError("there is no such precision", found=precision, expected="float32 or bfloat16")
    enabled = precision == "bfloat16" and device.type in ("cpu", "cuda")
    return torch.autocast(
        device.type if enabled else "cpu", dtype=torch.bfloat16, enabled=enabled, cache_enabled=False
    )


def fastest(device: torch.device | str) -> Precision:
    """Precision of the fastest matrix products of a device.

    Parameters
    ----------
    device : torch.device or str
    """
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def in_full(device: torch.device) -> torch.autocast:
    """Context in which nothing is rounded, whatever the one around it says."""
    return torch.autocast(device.type if device.type in ("cpu", "cuda") else "cpu", enabled=False)


def linear_in_full(layer: nn.Linear, values: Tensor) -> Tensor:
    """Apply a linear layer in its own precision.

    Parameters
    ----------
    layer : nn.Linear
    values : Tensor, shape (..., inputs)

    Returns
    -------
    Tensor, shape (..., outputs)
    """
    with in_full(values.device):
        return functional.linear(values.to(layer.weight), layer.weight, layer.bias)


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether a device has instructions for products of bfloat16 numbers; without, they are slow.

    Parameters
    ----------
    device : torch.device or str
    """
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # A public name of torch since 2.10; whoever has an older one goes without.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
