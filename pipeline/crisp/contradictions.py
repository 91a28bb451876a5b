"""What FITS and NetCDF files say of themselves, held against what a description states: they may not differ.

What a file does not say, or says in words that nobody defined, is not compared. Where the file is wrong the
description overrules it: `pipeline.crisp.generic.FileStatement.overrides` names the keys that are right.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import astropy.units as u
import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from numpy.typing import NDArray

from pipeline.crisp import fits_files
from pipeline.crisp.axes import Axis, Stored
from pipeline.crisp.cube import COUNTS, DN
from pipeline.crisp.described import DescribedCube
from pipeline.crisp.netcdf_files import NetcdfArray
from pipeline.crisp.scan import Scan
from pipeline.crisp.statements import CONTINUUM
from pipeline.errors import InputError

SPECTRAL = ("WAVE", "AWAV", "FREQ", "ENER", "WAVN", "VRAD", "VOPT", "ZOPT", "VELO", "BETA")
TYPES: dict[Axis, tuple[str, ...]] = {
    "x": ("HPLN", "SOLARX", "SOLX"),
    "y": ("HPLT", "SOLARY", "SOLY"),
    "wavelength": SPECTRAL,
    "stokes": ("STOKES",),
    "time": ("UTC", "TAI", "TIME"),
}
"""How ``CTYPE`` begins, without punctuation (Greisen et al. 2006, doi:10.1051/0004-6361:20053818; Thompson
2006, doi:10.1051/0004-6361:20054262)."""
DIMENSIONS: dict[Axis, tuple[str, ...]] = {
    "x": ("x", "nx", "lon", "longitude", "hpln"),
    "y": ("y", "ny", "lat", "latitude", "hplt"),
    "wavelength": ("wavelength", "wavelengths", "wave", "lambda", "nw"),
    "stokes": ("stokes", "ns"),
    "time": ("time", "t", "nt"),
}
"""How the names of NetCDF's dimensions end, after the last underscore."""
MEDIUM_OF_TYPE = {"WAVE": "vacuum", "AWAV": "air"}
DATES = ("DATE-OBS", "DATE-BEG", "DATE-AVG", "DATE-END")
DAY = np.timedelta64(1, "D")
ALIKE = 0.01  # sizes of pixels: a thousand of them are ten pixels off


class Contradiction(NamedTuple):
    """A key of the description, what is wrong, what the file says, and what is stated."""

    key: str
    problem: str
    said: object
    stated: object


def check_file(cube: DescribedCube, stored: Stored) -> None:
    """Hold unit, axes, wavelengths and size of pixels of a file against what is stated of it.

    Parameters
    ----------
    cube : DescribedCube
        The cube and what is stated of it.
    stored : Stored
        Its array.

    Raises
    ------
    InputError
        They differ, and the description does not say that it is right.
    """
    if isinstance(stored, NetcdfArray):
        _check(cube, _of_netcdf(cube, stored))
    if cube.headers:
        _check(cube, _of_header(cube, cube.headers[0]))


def check_times(cube: DescribedCube, scans: Sequence[Scan]) -> None:
    """Hold the dates in the headers of a FITS file against the scans' times: they are a day apart at most.

    Parameters
    ----------
    cube : DescribedCube
        The cube and what is stated of it.
    scans : sequence of Scan
        Its scans.

    Raises
    ------
    InputError
        They differ, and the description does not say that it is right.
    """
    _check(cube, _of_dates(cube, min(scan.time for scan in scans), max(scan.time for scan in scans)))


def _check(cube: DescribedCube, contradictions: Iterable[Contradiction]) -> None:
    for key, problem, said, stated in contradictions:
        part = key.partition(".")[0]
        if part not in cube.overrides:
            raise InputError(
                problem,
                where=cube.file,
                found=f"{said}, in the file",
                expected=f"{stated}, as stated in {cube.description}",
                remedy=f"mend `{cube.key}{key}` in {cube.description}; or, if it is the file that is wrong, "
                f"add `overrides: [{part}]` to the cube's other keys there",
            )


def _of_header(cube: DescribedCube, header: fits.Header) -> Iterator[Contradiction]:
    stated = cube.statement
    unit = _card(header, "BUNIT")
    if _differ(unit, stated.unit):
        yield Contradiction("unit", "the header has another unit", f"BUNIT = {unit!r}", repr(stated.unit))
    for axis in cube.axes:
        card = f"CTYPE{cube.fits_number(axis)}"
        kind = _card(header, card)
        letters = re.sub("[^A-Z]", "", kind.upper())
        found = next((name for name, starts in TYPES.items() if letters.startswith(starts)), axis)
        if found != axis:
            yield Contradiction("axes", "the header has other axes", f"{card} = {kind!r}", _listed(cube))
    yield from _of_wavelengths(cube, header)
    yield from _of_pixels(cube, header)


def _of_wavelengths(cube: DescribedCube, header: fits.Header) -> Iterator[Contradiction]:
    stated, number = cube.statement.wavelength, cube.fits_number("wavelength")
    kind, unit = _card(header, f"CTYPE{number}"), _card(header, f"CUNIT{number}")
    said = f"CTYPE{number} = {kind!r}"
    medium = MEDIUM_OF_TYPE.get(kind.upper().partition("-")[0])
    if medium not in (None, stated.medium):
        yield Contradiction(
            "wavelength.medium", f"the header's wavelengths are in {medium}", said, stated.medium
        )
    if not stated.header:
        return
    if kind and kind.upper() not in MEDIUM_OF_TYPE:
        yield Contradiction(
            "wavelength.header",
            "the header's axis is none of wavelengths at even steps",
            said,
            "WAVE or AWAV; or the wavelengths themselves (values, or where they are)",
        )
    if unit and _differ(unit, stated.unit):
        yield Contradiction(
            "wavelength.unit", "the header has another unit", f"CUNIT{number} = {unit!r}", stated.unit
        )
    others = [
        f"{matrix}{one}_{two}"
        for matrix in ("PC", "CD")
        for other in range(1, len(cube.axes) + 1)
        for one, two in ((number, other), (other, number))
        if other != number
    ]
    mixed = [card for card in others if header.get(card, 0.0) != 0.0]
    if mixed:
        yield Contradiction(
            "wavelength.header",
            "the header's wavelengths depend on other axes",
            ", ".join(f"{card} = {header[card]}" for card in mixed),
            "one wavelength for each image",
        )


def _of_pixels(cube: DescribedCube, header: fits.Header) -> Iterator[Contradiction]:
    if cube.statement.pointing.scale is None:
        return
    stated = np.array(cube.statement.pointing.scale)
    numbers = [cube.fits_number("x"), cube.fits_number("y")]
    sizes = [_pixels(cube, header, numbers, unit) for unit in (u.arcsec, u.deg)]
    found = [size for size in sizes if size is not None]
    if not found or any(np.allclose(size, np.abs(stated), rtol=ALIKE, atol=0.0) for size in found):
        return
    cards = [f"{name}{n}" for n in numbers for name in ("CDELT", "CUNIT")]
    cards += [f"CD{one}_{two}" for one in numbers for two in numbers]
    yield Contradiction(
        "pointing.scale",
        "the header's pixels have another size",
        ", ".join(f"{card} = {header[card]!r}" for card in cards if card in header),
        f"{' x '.join(f'{size:g}' for size in stated)} arcsec",
    )


def _pixels(
    cube: DescribedCube, header: fits.Header, numbers: list[int], default: u.UnitBase
) -> NDArray[np.float64] | None:
    """Sizes of pixels along x and y, arcsec, where the header's unit is `default` if none is there.

    None if the header does not say: no cards, no angles, or ones without a unit, as templates have.
    """
    units = [_card(header, f"CUNIT{number}") for number in numbers]
    steps = [header.get(f"CDELT{n}", header.get(f"CD{n}_{n}")) for n in numbers]
    if None in steps or (not all(units) and all(step in (0.0, 1.0) for step in steps)):
        return None
    try:
        wcs = cube.sky()
        # wcslib makes degrees of what it knows to be angles on the sky, where the header has their unit
        found = [str(unit) if said else str(default) for unit, said in zip(wcs.wcs.cunit, units, strict=True)]
        factors = np.array([u.Unit(unit).to(u.arcsec) for unit in found])
        matrix = factors[:, None] * np.asarray(wcs.pixel_scale_matrix)
    except Exception:  # wcslib's, of many kinds: coordinates that cannot be read say nothing
        return None
    return np.asarray(np.sqrt(np.sum(matrix**2, axis=0)))


def _of_dates(cube: DescribedCube, first: np.datetime64, last: np.datetime64) -> Iterator[Contradiction]:
    for header in cube.headers:
        for card in DATES:
            try:
                moment = fits_files.utc(_card(header, card), "utc", cube.file, card)
            except InputError:
                continue
            if not first - DAY <= moment <= last + DAY:
                yield Contradiction(
                    "time", "the header has another date", f"{card} = {header[card]!r}", f"{first} to {last}"
                )


def _of_netcdf(cube: DescribedCube, stored: NetcdfArray) -> Iterator[Contradiction]:
    stated = cube.statement
    unit = stored.attribute("units")
    if _differ(unit, stated.unit):
        yield Contradiction("unit", "the variable has another unit", f"units = {unit!r}", repr(stated.unit))
    for axis, name in zip(cube.axes, stored.dims, strict=True):
        last = re.split("[^a-z]", name.lower())[-1]
        found = next((kind for kind, names in DIMENSIONS.items() if last in names), axis)
        if found != axis:
            yield Contradiction("axes", "the variable has other axes", ", ".join(stored.dims), _listed(cube))
    pixels: tuple[Axis, ...] = ("x", "y") if stated.pointing.scale is not None else ()
    for axis, scale in zip(pixels, stated.pointing.scale or (), strict=True):
        name = stored.dims[cube.axes.index(axis)]
        size = _spacing(stored.beside(name))
        if size is not None and not np.isclose(size, abs(scale), rtol=ALIKE, atol=0.0):
            yield Contradiction(
                "pointing.scale",
                "the file's pixels have another size",
                f"{name}: {size:g} arcsec apart",
                f"{scale:g} arcsec",
            )
    dimension = stored.dims[cube.axes.index("wavelength")]
    of_the_cube = stated.wavelength.variable if stated.wavelength.file is None else None
    axis_of = stored.beside(of_the_cube or dimension, absolute=of_the_cube is not None)
    if axis_of is None:
        return
    for attribute in ("standard_name", "long_name"):
        text = axis_of.attribute(attribute)
        medium = re.search(r"(?:\b|_)(air|vacuum)(?:\b|_)", text.lower())
        if medium is not None and medium[1] != stated.wavelength.medium:
            yield Contradiction(
                "wavelength.medium",
                f"the file's wavelengths are in {medium[1]}",
                f"{attribute} = {text!r}",
                stated.wavelength.medium,
            )
    unit = axis_of.attribute("units")
    if of_the_cube is not None and _differ(unit, stated.wavelength.unit):
        yield Contradiction(
            "wavelength.unit", "the variable has another unit", f"units = {unit!r}", stated.wavelength.unit
        )


def _spacing(coordinate: NetcdfArray | None) -> float | None:
    """How far coordinates along an axis are apart, arcsec; None if they are no angles."""
    if coordinate is None or len(coordinate.shape) != 1 or coordinate.dtype.kind not in "iuf":
        return None
    unit = _unit(coordinate.attribute("units"))
    if unit is None or unit.physical_type != "angle" or coordinate.shape[0] < 2:
        return None
    return float(np.abs(np.median(np.diff(coordinate[:].astype(np.float64)))) * unit.to(u.arcsec))


def _card(header: fits.Header, card: str) -> str:
    return str(header.get(card, "")).strip()


def _listed(cube: DescribedCube) -> str:
    return f"axes: [{', '.join(cube.axes)}]"


def _differ(said: str, stated: str) -> bool:
    """Whether units are of other kinds or scales; not if nothing is said, or in no words that are known."""
    unit, other = _unit(said) if said else None, _unit(stated)
    if unit is None or other is None:
        return False
    try:
        return bool(abs(unit.to(other) - 1.0) > 1e-9)
    except (ValueError, TypeError):
        return True


def _unit(text: str) -> u.UnitBase | None:
    if text.strip().lower() in COUNTS:
        return u.Unit(DN)
    if text == CONTINUUM:
        return u.dimensionless_unscaled
    for word in (text, text.removesuffix("s")):  # CF has degrees and arcseconds
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AstropyWarning)
                return u.Unit(word)
        except (ValueError, TypeError):
            continue
    return None
