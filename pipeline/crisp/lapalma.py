"""La Palma cubes (``.icube``, ``.fcube``): the SST's older pipelines' and CRISPEX' format.

A header of 512 bytes, such as ``stokes=[I,Q,U,V], ns=4 : datatype=2 (integer), dims=3, nx=967, ny=981,
nt=2100, endian=l``, then images (y, x): those of one scan after the other, in it one Stokes parameter after
the other, of each one wavelength after the other; ``nt`` counts them all. Data types are IDL's.

The header says nothing else, and what ships beside a cube does not say it all: the wavelengths are in
``spectfile.6563.idlsave`` (``spect_pos``, counted from the prefilter's nominal wavelength), the times in
``tseries.6563.<time>.calib.sav`` (``time`` and ``date``); nothing says medium, pointing and unit. So a
sidecar in YAML is needed, named as the cube with the ending ``.yaml``, which states or names all of it: see
`EXAMPLE` and `pipeline.crisp.statements.CubeStatement`. The cube's twin of spectra (``_sp``) and its
``.assoc.pro``, where there are any, have to agree.

De la Cruz Rodriguez et al. 2015, A&A 573, A40, doi:10.1051/0004-6361/201424319; Vissers & Rouppe van der
Voort 2012, ApJ 750, 22, doi:10.1088/0004-637X/750/1/22.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from pipeline.crisp import lapalma_files
from pipeline.crisp.axes import Axis
from pipeline.crisp.cube import Cube
from pipeline.crisp.described import DescribedCube
from pipeline.crisp.lapalma_files import Header, read_header
from pipeline.crisp.scan import OtherLineError, Scan
from pipeline.crisp.statements import CubeStatement, load
from pipeline.crisp.wavelengths import Medium
from pipeline.errors import InputError

FORMAT = "lapalma"
SUFFIXES = lapalma_files.SUFFIXES
POLARISED = ("I", "Q", "U", "V")
AXES: tuple[Axis, ...] = ("time", "stokes", "wavelength", "y", "x")

EXAMPLE = """\
line: halpha                                  # or ca8542
wavelength:
  file: spectfile.6563.idlsave                # or values, or start and step
  unit: Angstrom
  medium: air
  line_centre: 6563.0                         # spectfiles count from the prefilter's nominal wavelength
time: {file: tseries.6563.calib.sav}          # or values, or start and step
pointing: {reference_value: [-729.8, -313.4], scale: 0.059, rotation: 0.0}    # arcsec, degrees
unit: DN
# stokes: [I, Q, U, V]                        # where the cube has them and its header does not say so
"""
"""A sidecar."""

TWINS = (("$", "_sp"), ("_im$", "_sp"), ("^im_", "sp_"))
"""How the names of cubes become those of their twins of spectra."""


def read_scans(path: str | Path, medium: Medium | None = None) -> tuple[Scan, ...]:
    """Describe the scans of a cube, from its header and sidecars alone.

    Parameters
    ----------
    path : str or Path
        The file; that its numbers are integers or floats its header says.
    medium : {"vacuum", "air"}, optional
        What the caller says of the wavelengths: the sidecar may not say otherwise.

    Raises
    ------
    ForeignFileError
        The file is no La Palma cube, or one of spectra (`OtherLineError`).
    InputError
        It has no sidecar, or contradicts it, or is not as long as its header says.
    """
    return _described(Path(path).absolute()).scans(FORMAT, medium)


def read_headers(path: str | Path) -> tuple[str, ...]:
    """The header, as text."""
    return (read_header(Path(path)).text,)


def open_intensity(scan: Scan) -> Cube:
    """Intensities (Stokes I) of a scan, (wavelength, y, x), memory-mapped: only what is indexed is read.

    Parameters
    ----------
    scan : Scan
        As `read_scans` returned it.

    Raises
    ------
    InputError
        The file or its sidecar has changed or gone since.
    """
    cube = _again(scan)
    return cube.cube(lapalma_files.mapped(cube.file).reshape(cube.shape), scan.index, scan)


def open_wavelength_shift(scan: Scan) -> NDArray[np.float64] | None:
    """The cavity map of a scan: Angstrom (y, x), in vacuum; None if the sidecar names none."""
    return _again(scan).wavelength_shift(scan.index)


def _again(scan: Scan) -> DescribedCube:
    """The cube of a scan that was described before."""
    cube = _described(Path(scan.path))
    if scan.index >= cube.shape[0] or cube.shape[2:] != (len(scan.wavelength), *scan.shape):
        raise scan.changed(f"{cube.shape} {cube.axes}")
    return cube


def _described(file: Path) -> DescribedCube:
    header = read_header(file)
    sidecar = file.with_suffix(".yaml")
    if not sidecar.exists():
        _refuse_without(sidecar, file, header)
    statement = load(sidecar, CubeStatement, EXAMPLE)
    images, rows, columns = header.shape
    cube = DescribedCube(file, sidecar, statement, "", AXES, (images, 1, 1, rows, columns), header.dtype)
    if header.stokes is not None and statement.stokes not in (None, header.stokes):
        cube.refuse("stokes", "the header says otherwise", list(header.stokes), list(statement.stokes or ()))
    stokes = header.stokes or statement.stokes or ("I",)
    if header.parameters not in (None, len(stokes)):
        cube.refuse(
            "stokes",
            "the header has another number of Stokes parameters",
            f"ns={header.parameters}",
            f"{list(stokes)}{'' if statement.stokes else ', as nothing is stated'}; or all of them",
        )
    points = cube.stated_wavelengths()
    others = list(_others(file, header, len(stokes)))
    for name, of_scan, scans in others:
        points = of_scan if points is None else points
        if (of_scan, of_scan * len(stokes) * scans) != (points, images):
            cube.refuse(
                "wavelength",
                f"the cube does not fit its {name}",
                f"{images} images, {len(stokes)} Stokes parameters, {points} wavelengths",
                f"{of_scan} wavelengths, {scans} scans",
            )
    if points is None:
        cube.refuse(
            "wavelength",
            "nothing says how many wavelengths a scan has",
            f"{images} images",
            "values, or a file of them; or the cube's twin of spectra, or its .assoc.pro, beside it",
        )
    if points < 2 or images % (len(stokes) * points):
        cube.refuse(
            "wavelength",
            "the cube does not hold whole scans",
            f"{images} images",
            f"a multiple of {points} (two or more) wavelengths times {len(stokes)} Stokes parameters",
        )
    scans = images // (len(stokes) * points)
    said = header.stokes or statement.stokes or header.parameters or others
    if not said and statement.time.step is not None and scans % len(POLARISED) == 0:
        cube.refuse(
            "stokes",
            "nothing says whether the cube has other Stokes parameters than I",
            f"{images} images: {scans} scans of I, or {scans // len(POLARISED)} of {', '.join(POLARISED)}",
            f"[I] or [{', '.join(POLARISED)}]; or the time of each scan",
        )
    return replace(
        cube,
        statement=statement.model_copy(update={"stokes": stokes}),
        shape=(scans, len(stokes), points, rows, columns),
    )


def _refuse_without(sidecar: Path, file: Path, header: Header) -> NoReturn:
    images = next((images for images in _images_of(file) if images.exists()), None)
    if images is not None:
        raise OtherLineError(
            "a La Palma cube of spectra, not of images",
            where=file,
            found=f"the cube of images is {images.name}",
            remedy="leave the cube of spectra out",
        )
    raise InputError(
        "a La Palma cube without a sidecar",
        where=file,
        found=f"no {sidecar.name}; and the cube's header says no more than `{header.text}`",
        expected="line, wavelength, time, pointing and unit, for example\n"
        + "\n".join(f"    {line}" for line in EXAMPLE.strip().split("\n")),
        remedy=f"write {sidecar}, or one beside a link to the cube; or leave the cube out",
    )


def _others(file: Path, header: Header, stokes: int) -> Iterator[tuple[str, int, int]]:
    """What lies beside a cube and says how many wavelengths and scans it has: name, and both numbers."""
    for end, other in TWINS:
        name = re.sub(end, other, file.stem, count=1)
        twin = file.with_name(name + file.suffix)
        if name != file.stem and twin.exists():
            spectra, scans, points = read_header(twin).shape
            if spectra != header.shape[1] * header.shape[2] * stokes:
                raise InputError(
                    "a cube does not fit its twin of spectra",
                    where=file,
                    found=f"{header.shape[1]} x {header.shape[2]} pixels, {stokes} Stokes parameters",
                    expected=f"{spectra} spectra of {scans} scans, as {twin.name}",
                    remedy="remove the twin, or fetch both again",
                )
            yield f"twin {twin.name}", points, scans
    note = file.with_name(f"{file.stem}.assoc.pro")
    if note.exists():
        said = dict(re.findall(r"^\s*(nw|nt)\s*=\s*(\d+)", note.read_text("ascii", "replace"), re.MULTILINE))
        if said.keys() == {"nw", "nt"}:
            yield note.name, int(said["nw"]), int(said["nt"])


def _images_of(file: Path) -> Iterator[Path]:
    """Names that the cube of images may have, if this is a cube of spectra."""
    for end, other in (("_sp$", ""), ("_sp$", "_im"), ("^sp_", "im_")):
        name = re.sub(end, other, file.stem)
        if name != file.stem:
            yield file.with_name(name + file.suffix)
