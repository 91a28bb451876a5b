"""La Palma cubes, and IDL save files beside them, as the SST's older pipelines write them.

Headers as `red_unpol_lpheader` and `red_pol_lpheader` make them; save files in IDL's layout (Markwardt 2010,
"Unofficial Format Specification, IDL Save File").
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

TYPES = {"u1": (1, "byte"), "i2": (2, "integer"), "i4": (3, "long"), "f4": (4, "float"), "f8": (5, "double")}


def header(shape: tuple[int, int, int], dtype: np.dtype, stokes: bool = False) -> bytes:
    """Header of images (image, y, x), 512 bytes."""
    code, name = TYPES[dtype.str[1:]]
    order = "b" if dtype.byteorder == ">" else "l"
    text = f"datatype={code} ({name}), dims=3, nx={shape[2]}, ny={shape[1]}, nt={shape[0]}, endian={order}"
    text = f"stokes=[I,Q,U,V], ns=4 :  {text}" if stokes else text
    return text.encode().ljust(512, b"\0")


def write_cube(path: Path, cube: NDArray, stokes: bool = False) -> Path:
    """Write images (scan, Stokes, wavelength, y, x) of the cube's own number type."""
    images = cube.reshape(-1, *cube.shape[-2:])
    path.write_bytes(header(images.shape, images.dtype, stokes) + images.tobytes())
    return path


def write_twin(path: Path, cube: NDArray, stokes: bool = False) -> Path:
    """Write the twin of spectra of such a cube: IDL's (wavelength, scan, x * y * Stokes)."""
    scans, parameters, points, rows, columns = cube.shape
    spectra = np.moveaxis(cube, (3, 4, 1, 0, 2), (0, 1, 2, 3, 4)).reshape(-1, scans, points)
    assert len(spectra) == rows * columns * parameters
    path.write_bytes(header(spectra.shape, spectra.dtype, stokes) + spectra.tobytes())
    return path


def write_assoc(path: Path, cube: NDArray) -> Path:
    """Write the note on a cube's dimensions that is an IDL script."""
    scans, _, points, rows, columns = cube.shape
    sizes = {"nx": columns, "ny": rows, "nw": points, "nt": scans}
    lines = [f"{name}={size:12d}" for name, size in sizes.items()]
    path.write_text("\n".join([*lines, "openr,lun,'cube.icube', /get_lun", "dat = assoc(lun, ...)", ""]))
    return path


def write_idl(path: Path, variables: Mapping[str, ArrayLike]) -> Path:
    """Write an IDL save file of double arrays and arrays of texts."""
    stream = bytearray(b"SR" + struct.pack(">h", 4))
    for name, values in variables.items():
        array = np.asarray(values)
        texts = array.dtype.kind in "SU"
        body = _text(name.upper().encode())
        if array.ndim == 0:
            body += struct.pack(">ii", 7 if texts else 5, 0)
        else:
            body += struct.pack(">ii", 7 if texts else 5, 4) + _array(array, texts)
        body += struct.pack(">i", 7)
        for value in array.ravel():
            if texts:
                content = str(value).encode()
                body += struct.pack(">i", len(content)) + _text(content)
            else:
                body += struct.pack(">d", float(value))
        start = len(stream)
        stream += struct.pack(">iiII", 2, start + 16 + len(body), 0, 0) + body
    stream += struct.pack(">iiII", 6, 0, 0, 0)
    path.write_bytes(bytes(stream))
    return path


def _text(content: bytes) -> bytes:
    return struct.pack(">i", len(content)) + content + b"\0" * (-len(content) % 4)


def _array(array: NDArray, texts: bool) -> bytes:
    sizes = [*array.shape[::-1], *[1] * (8 - array.ndim)]
    bytes_each = 4 if texts else 8
    return struct.pack(
        ">iiiiiiii8i", 8, bytes_each, array.size * bytes_each, array.size, array.ndim, 0, 0, 8, *sizes
    )
