"""Zarr groups as sst-crispy's own function writes them, and as its class reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray


def write_crispy(
    path: Path,
    cube: NDArray,
    wavelength: ArrayLike,
    time: np.datetime64,
    *,
    pointing: Sequence[float] = (-729.826, -313.432),
    scale: float = 0.057,
    zarr_format: int = 2,
    uniform: bool = False,
    **changes: Any,
) -> Path:
    """Write one scan, ((Stokes,) wavelength, y, x), of the cube's own number type.

    Parameters
    ----------
    wavelength : array_like
        Angstrom; listed, or, if `uniform`, as ``wavel_scale`` says.
    changes : optional
        Attributes that are to be others; None for none.
    """
    axis = np.asarray(wavelength, dtype=np.float64)
    day, moment = str(np.datetime64(time).astype("datetime64[ms]")).split("T")
    reference = [(size + 1) / 2 for size in cube.shape]
    values = [1.0] * (cube.ndim - 3) + [
        float(np.interp(reference[-3], np.arange(1, axis.size + 1), axis)), pointing[1], pointing[0]
    ]  # fmt: skip
    attributes: dict[str, Any] = {
        "date_obs": day,
        "time_obs": moment,
        "telescope": "SST",
        "instrument": "CRISP",
        "pixel_scale": scale,
        "cadence": 11.54,
        "element": "H I 6563" if axis[0] < 7000.0 else "Ca II 8542",
        "dimensions": list(cube.shape),
        "ctype": [*["STOKES"] * (cube.ndim - 3), "WAVE", "HPLT-TAN", "HPLN-TAN"],
        "cunit": ["Angstrom", "arcsec", "arcsec"],
        "crpix": reference,
        "crval": values,
        **({"wavel_scale": float(axis[1] - axis[0])} if uniform else {"wavels": axis.tolist()}),
        **changes,
    }
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    array = group.create_array(
        "data",
        shape=cube.shape,
        dtype=cube.dtype,
        chunks=(*[1] * (cube.ndim - 2), *cube.shape[-2:]),
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    array[...] = cube
    array.attrs.update({key: value for key, value in attributes.items() if value is not None})
    return path
