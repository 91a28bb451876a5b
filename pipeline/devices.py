"""Where a tile's numbers are computed: the CPU, or the GPU of a worker that has one.

Intensities are read on the host and judged there, go to the device once, are interpolated there by its array
library (NumPy or CuPy), and are handed to torch in the same memory (DLPack), which samples and sorts them
there. Only quantiles come back.

No GPU has ever run this. On the CPU the same code is tested with NumPy in CuPy's place: that the hand-over
shares memory, that the interpolation needs nothing but the array API (`pipeline.spectra`), and that the
sampling brings nothing to the host before the sorting is done (`inn.posterior`). Tests marked ``gpu`` say the
same of CuPy and CUDA, and skip where there is none.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ClusterError

if TYPE_CHECKING:
    import torch  # workers that compute no network (those of ingest) need not wait for it, or hold it

Device = Literal["cpu", "cuda"]
"""Where tiles are computed: torch's name of the kind of device."""

LIBRARIES: dict[Device, str] = {"cpu": "numpy", "cuda": "cupy"}
"""The array library of each device."""

GPU_PACKAGES = ("cupy", "dask_cuda", "rmm")
"""What the extras ``cuda12`` and ``cuda13`` install."""

INSTALL = "pip install 'flarefield[cuda13]', or [cuda12] with a torch that was built for CUDA 12"


def gpus() -> int:
    """Number of GPUs that torch can use in this process (as ``CUDA_VISIBLE_DEVICES`` says)."""
    import torch

    return torch.cuda.device_count()


def missing_packages() -> list[str]:
    """Those of `GPU_PACKAGES` that are not installed."""
    return [name for name in GPU_PACKAGES if find_spec(name) is None]


def array_library(device: Device) -> ModuleType:
    """Module whose arrays lie on a device.

    Parameters
    ----------
    device : {"cpu", "cuda"}

    Returns
    -------
    module
        NumPy or CuPy.

    Raises
    ------
    ClusterError
        This process has no such device, or lacks its library.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ClusterError(
                "a worker has no GPU that its torch can use",
                found=f"torch {torch.__version__}, {gpus()} GPUs",
                remedy="start workers on GPUs with a torch that was built for CUDA, or compute on the CPU",
            )
    try:
        return importlib.import_module(LIBRARIES[device])
    except ImportError as error:
        raise ClusterError("a worker with a GPU has no CuPy", found=error, remedy=INSTALL) from error


def to_torch(array: Any) -> torch.Tensor:  # noqa: ANN401
    """Hand an array over to torch, in the same memory on the same device.

    Parameters
    ----------
    array : array
        NumPy's or CuPy's, writable.

    Returns
    -------
    torch.Tensor
    """
    from torch.utils.dlpack import from_dlpack

    return from_dlpack(array)
