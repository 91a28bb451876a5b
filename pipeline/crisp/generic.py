"""Any FITS or NetCDF cube with a description in YAML: of IBIS, FISS, DKIST and others.

The description lists ``cubes``: for each which files hold it, in which HDU or variable, what its axes are,
and what `pipeline.crisp.statements.CubeStatement` asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from astropy.io import fits
from astropy.io.fits.verify import VerifyError
from numpy.typing import NDArray
from pydantic import model_validator

from pipeline.crisp import fits_files, netcdf_files
from pipeline.crisp.axes import OF_A_CUBE, Axis, Stored
from pipeline.crisp.contradictions import check_file, check_scans
from pipeline.crisp.cube import Cube
from pipeline.crisp.described import DescribedCube
from pipeline.crisp.scan import OtherKindError, Scan
from pipeline.crisp.signatures import beginning
from pipeline.crisp.statements import CubeStatement, Statement, load
from pipeline.crisp.wavelengths import Medium
from pipeline.errors import InputError

FORMAT = "generic"
SUFFIXES = (*fits_files.SUFFIXES, *netcdf_files.SUFFIXES)
UNREADABLE = (VerifyError,)
"""What astropy raises of a card that it cannot read, once it is asked for it."""

EXAMPLE = """\
cubes:
  - files: "*6563*.fits"         # of the files given, those that hold this cube
    hdu: 0                       # FITS; of NetCDF: variable: intensity
    axes: [wavelength, y, x]     # the first varies slowest: FITS' NAXIS3, NAXIS2, NAXIS1
    line: halpha                 # or ca8542
    wavelength: {hdu: wavelengths, unit: Angstrom, medium: air}   # or start and step, or values, or header
    time: {key: DATE-AVG}        # or values, or start and step, or hdu or variable
    pointing: {reference_value: [-729.8, -313.4], scale: 0.098, rotation: 0.0}   # arcsec, degrees; or header
    unit: DN                     # or such as W m-2 Hz-1 sr-1
    # overrides: [unit]          # where the file is wrong: axes, line, wavelength, time, pointing, cavity_map
"""
"""A description."""


class FileStatement(CubeStatement):
    """A cube of scans of one line, and where files hold it."""

    files: str = "*"
    """Pattern of the names of the files that hold it; no array belongs to two cubes."""
    hdu: str | int | None = None
    """Of FITS files: name or number of the HDU; the first that holds anything if left out."""
    variable: str | None = None
    """Of NetCDF files: the variable; ``group/variable`` of one in a group."""
    axes: tuple[Axis, ...]
    """What the array's axes are, from the one that varies slowest to the fastest (of FITS: from the last
    ``NAXISn`` to the first): ``wavelength``, ``y`` and ``x``; ``time`` and ``stokes`` where it has them."""
    overrides: tuple[
        Literal["axes", "unit", "line", "wavelength", "pointing", "time", "cavity_map"], ...
    ] = ()
    """Keys of this description that are right where the file says otherwise: a difference is refused else."""

    @model_validator(mode="after")
    def _sound_axes(self) -> Self:
        if len(set(self.axes)) < len(self.axes) or not set(OF_A_CUBE) <= set(self.axes):
            raise ValueError(f"axes: {list(self.axes)}, not wavelength, y and x and perhaps time and stokes")
        return self


class Cubes(Statement):
    """What the YAML of ``--generic`` holds."""

    cubes: tuple[FileStatement, ...]
    """The cubes; a file may hold several of them, each in its own HDU or variable."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.cubes:
            raise ValueError("cubes: there is none")
        return self


@dataclass(frozen=True)
class Description:
    """A description that was read.

    Attributes
    ----------
    path : Path
        The YAML file.
    cubes : tuple of FileStatement
        What it states.
    """

    path: Path
    cubes: tuple[FileStatement, ...]

    def cubes_in(self, file: str | Path) -> tuple[int, ...]:
        """Numbers of the cubes that it has in a file, by the file's name."""
        name = Path(file).name
        return tuple(number for number, cube in enumerate(self.cubes) if fnmatch(name, cube.files))

    def describes(self, file: str | Path) -> bool:
        """Whether it has a cube in a file, by the file's name."""
        return bool(self.cubes_in(file))


class CompressedImage:
    """A compressed image of a FITS file: tiles are read, and unpacked, as it is indexed.

    Parameters
    ----------
    path : Path
        The file.
    number : int
        Number of the HDU.
    shape : tuple of int
        The image's.
    dtype : numpy.dtype
        Of its numbers, before ``BSCALE`` and ``BZERO``.
    """

    def __init__(self, path: Path, number: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._path, self._number = path, number
        self.shape, self.dtype = shape, dtype

    def __getitem__(self, key: Any, /) -> NDArray[Any]:  # noqa: ANN401
        with fits_files.opened(self._path) as hdus:
            return np.asarray(hdus[self._number].section[key])


def load_description(path: str | Path) -> Description:
    """Read a description.

    Parameters
    ----------
    path : str or Path
        The YAML file.

    Raises
    ------
    InputError
        It cannot be read, or states something else than it should: every such key is named.
    """
    file = Path(path).absolute()
    return Description(file, load(file, Cubes, EXAMPLE).cubes)


def read_scans(path: str | Path, description: Description, medium: Medium | None = None) -> tuple[Scan, ...]:
    """Describe a file's scans, in the order of the description's cubes.

    Parameters
    ----------
    path : str or Path
        A FITS or NetCDF file.
    description : Description
        As `load_description` gives it.
    medium : {"vacuum", "air"}, optional
        What the caller says of the wavelengths: the description may not say otherwise.

    Raises
    ------
    OtherKindError
        It is neither FITS nor NetCDF.
    InputError
        It cannot be read, does not fit the description, or contradicts it (`pipeline.crisp.contradictions`).
    """
    scans: list[Scan] = []
    with fits_files.damage(path, UNREADABLE):
        for cube, stored in _cubes(Path(path).absolute(), description):
            check_file(cube, stored)
            found = cube.scans(FORMAT, medium, first=len(scans))
            check_scans(cube, stored, found)
            scans.extend(found)
    return tuple(scans)


def read_headers(path: str | Path) -> tuple[str, ...]:
    """What the file says of itself, whole, as text: every HDU's header, or what ``ncdump -h`` would show."""
    file = Path(path)
    if _is_netcdf(file):
        return (netcdf_files.header(file),)
    return fits_files.read_headers(file)


def open_intensity(scan: Scan) -> Cube:
    """Intensities of a scan, (wavelength, y, x), in its units: only what is indexed is read.

    Parameters
    ----------
    scan : Scan
        As `read_scans` returned it.

    Raises
    ------
    InputError
        The file or its description has changed or gone since.
    """
    with fits_files.damage(scan.path, UNREADABLE):
        cube, stored, index = _again(scan)
        return cube.cube(stored, index, scan)


def open_wavelength_shift(scan: Scan) -> NDArray[np.float64] | None:
    """The cavity map of a scan: Angstrom (y, x), in vacuum; None if the description has none."""
    cube, _, index = _again(scan)
    return cube.wavelength_shift(index)


def _again(scan: Scan) -> tuple[DescribedCube, Stored, int]:
    """The cube of a scan that was described before, and the scan's index within it."""
    index = scan.index
    for cube, stored in _cubes(Path(scan.path), load_description(scan.sidecars[0])):
        if index < cube.size("time"):
            if (cube.size("wavelength"), cube.size("y"), cube.size("x")) == (
                len(scan.wavelength),
                *scan.shape,
            ):
                return cube, stored, index
            break
        index -= cube.size("time")
    raise scan.changed("other scans, by what the file and its description say now")


def _cubes(file: Path, description: Description) -> list[tuple[DescribedCube, Stored]]:
    """The cubes that a description has in a file, each with its array."""
    found = []
    taken: dict[str, str] = {}
    for number, statement in enumerate(description.cubes):
        if not fnmatch(file.name, statement.files):
            continue
        key = f"cubes.{number}."
        headers: list[fits.Header]
        stored: Stored
        if _is_netcdf(file):
            stored, headers = _of_netcdf(file, statement, key, description.path), []
            # A variable's path may be written with a slash more.
            part = f"the variable {'/'.join(filter(None, str(statement.variable).split('/')))}"
        else:
            part, stored, *headers = _of_fits(file, statement)
        cube = DescribedCube(
            file,
            description.path,
            statement,
            key,
            statement.axes,
            stored.shape,
            np.dtype(stored.dtype),
            tuple(headers),
            statement.overrides,
            part,
        )
        name = f"cubes.{number} ({statement.line})"
        if (other := taken.setdefault(part, name)) != name:
            cube.refuse(
                "files",
                "two cubes of the description take the same array",
                f"{part}, by {other} and {name}",
                "each its own: other patterns in `files`, another HDU or variable",
            )
        if len(stored.shape) != len(statement.axes):
            cube.refuse("axes", "the array has other axes", _axes(stored), list(statement.axes))
        if stored.dtype.kind not in "iuf" or 0 in stored.shape:
            cube.refuse(
                "hdu" if headers else "variable", "it holds no intensities", f"{stored.dtype}, {stored.shape}"
            )
        found.append((cube, stored))
    return found


def _axes(stored: Stored) -> str:
    sizes = " x ".join(map(str, stored.shape))
    return f"{sizes} {getattr(stored, 'dims', '')}".strip()


def _of_fits(file: Path, statement: FileStatement) -> tuple[str, Stored, fits.Header, fits.Header]:
    """Where the cube is, its array, the header of its HDU, and the primary one."""
    with fits_files.opened(file) as hdus:
        hdu = fits_files.find_hdu(hdus, statement.hdu, file)
        if not hdu.is_image or not hdu.shape:
            raise InputError(
                "the HDU holds no cube",
                where=file,
                found=f"{hdu.name or 'the primary HDU'}: {type(hdu).__name__}",
                expected="an image",
                remedy="name another HDU in the description",
            )
        header = hdu.header
        if isinstance(hdu, fits.CompImageHDU):
            stored: Stored = CompressedImage(file, hdus.index(hdu), hdu.shape, hdu.section.dtype)
        else:
            stored = hdu.data
        return f"HDU {hdus.index(hdu)}", stored, header, hdus[0].header


def _of_netcdf(file: Path, statement: FileStatement, key: str, description: Path) -> Stored:
    if statement.variable is None:
        raise InputError(
            "the variable is not named",
            where=file,
            found=", ".join(map(str, netcdf_files.opened(file).variables)),
            expected="variable: its name",
            remedy=f"add `{key}variable` in {description}",
        )
    return netcdf_files.NetcdfArray(file, statement.variable)


def _is_netcdf(file: Path) -> bool:
    start = beginning(file)
    if not netcdf_files.is_netcdf(start) and not start.startswith(fits_files.SIGNATURE):
        raise OtherKindError(
            "neither a FITS nor a NetCDF file",
            where=file,
            found=f"it begins with {start[:8]!r}" if start else "an empty file",
            remedy="leave this file out",
        )
    return netcdf_files.is_netcdf(start)
