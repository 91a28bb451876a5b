"""One known series of scans in every format that is read, each with what its readers are for.

Every writer takes a folder and the series, and gives the keywords that `pipeline.ingest.ingest` needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import astropy.units as u
import numpy as np
import yaml
from astropy.io import fits
from numpy.typing import NDArray

from pipeline.crisp.cube import PER_ANGSTROM
from pipeline.crisp.scan import LINES
from pipeline.crisp.wavelengths import vacuum_to_air
from tests.crispy_groups import write_crispy
from tests.fchroma_files import (
    BETWEEN_LINES,
    CADENCE,
    PAD,
    START,
    WAVELENGTH_CA8542,
    WAVELENGTH_HALPHA,
    displace,
    rotated_field,
    scene,
)
from tests.generic_files import write_dkist, write_fiss, write_ibis
from tests.lapalma_files import write_assoc, write_cube, write_idl, write_twin
from tests.sstred_files import DAY, write_sstred

DEPLOY = Path(__file__).parents[1] / "deploy"

SHAPE = (90, 110)
SHIFTS = ((2.3, -1.4), (-4.6, 3.2))
"""(y, x) pixels that bring Ca II onto H-alpha, of the two scans."""
AXES = {"halpha": WAVELENGTH_HALPHA, "ca8542": WAVELENGTH_CA8542}
COUNT = 1e3
"""Intensity per Angstrom of one count of the scene, in `PER_ANGSTROM`, where files have physical units."""
CONTINUUM = {"halpha": 2.8475e6, "ca8542": 1.7361e6}
"""The quiet Sun's at the disc's centre, `PER_ANGSTROM` (Neckel 1999)."""


@dataclass(frozen=True)
class Series:
    """Two scans of both lines, in counts, as the detector has them.

    Attributes
    ----------
    truth, noisy : dict of str to ndarray, shape (scan, wavelength, y, x)
        Each line as it is on the Sun, in H-alpha's frame; and as it was taken, Ca II displaced, with noise.
    field : dict of str to ndarray of bool, shape (scan, y, x)
        Each line's field in its own frame.
    """

    truth: dict[str, NDArray[np.float64]]
    noisy: dict[str, NDArray[np.float64]]
    field: dict[str, NDArray[np.bool_]]


def known_series() -> Series:
    """The series that all formats hold: two scans, fields turned in a pad, Ca II displaced."""
    rng = np.random.default_rng(5)
    field = rotated_field(SHAPE, 20.0)
    truth, noisy, fields = ({"halpha": [], "ca8542": []} for _ in range(3))
    for shift in SHIFTS:
        cubes = dict(zip(AXES, scene(rng, SHAPE), strict=True))
        seen = {
            "halpha": cubes["halpha"],
            "ca8542": np.stack([displace(image, -shift[0], -shift[1]) for image in cubes["ca8542"]]),
        }
        own = {"halpha": field, "ca8542": np.roll(field, [-round(value) for value in shift], (0, 1))}
        for line, cube in cubes.items():
            truth[line].append(cube)
            noise = np.sqrt(np.maximum(seen[line], 1.0)) * rng.standard_normal(cube.shape)
            noisy[line].append(np.rint(np.maximum(seen[line] + noise, 1.0)))
            fields[line].append(own[line])
    return Series(
        *({line: np.stack(parts) for line, parts in all_of.items()} for all_of in (truth, noisy, fields))
    )


def seconds(points: int, delay: float) -> NDArray[np.float64]:
    """Times of the exposures since midnight, (scan, tuning), about the scans' mean times."""
    first = (START - np.datetime64(DAY, "ms")) / np.timedelta64(1, "s")
    middle = first + delay + np.arange(2) * (CADENCE / np.timedelta64(1, "s"))
    return middle[:, None] + 0.2 * (np.arange(points) - (points - 1) / 2)


def database_header(line: str, axis: NDArray[np.float64], moment: np.datetime64) -> fits.Header:
    """Cards of a scan as the database's files have them; nothing is asked of FlareField's own writer."""
    element, middle = {"halpha": ("H I 6563", 7), "ca8542": ("Ca II 8542", 12)}[line]
    cards = f"""
DATE-AVG= '{moment.astype("datetime64[ms]")}'
POINT_ID= '{START.astype("datetime64[s]")}'
CDELT1  =                0.057
CDELT2  =                0.057
CDELT3  = {(axis[-1] - axis[0]) / (axis.size - 1):20.12f}
CRPIX1  = {(SHAPE[1] + 1) / 2:20.1f}
CRPIX2  = {(SHAPE[0] + 1) / 2:20.1f}
CRPIX3  = {middle + 1:20d}
CRVAL1  =             -729.826
CRVAL2  =             -313.432
CRVAL3  = {axis[middle]:20.3f}
CTYPE1  = 'HPLN-TAN'
CTYPE2  = 'HPLT-TAN'
CTYPE3  = 'WAVE    '
CUNIT1  = 'arcsec  '
CUNIT2  = 'arcsec  '
CUNIT3  = 'Angstrom'
PC1_1   =                  1.0
PC2_2   =                  1.0
PC3_3   =                  1.0
NWIN    =                    1
WSTART1 =                    0
WWIDTH1 = {axis.size:20d}
WDESC1  = '{element}'
TWAVE1  = {axis[middle]:20.3f}
EXTNAME = '{element.replace(" ", "_")}'
SOLARNET=                  0.5
INSTRUME= 'CRISP   '"""
    return fits.Header.fromstring(cards.strip(), sep="\n")


def in_fchroma(folder: Path, series: Series) -> dict[str, Any]:
    """16-bit counts, one file a scan, wavelengths in vacuum, a constant pad."""
    for line, axis in AXES.items():
        for number in range(2):
            inside = series.field[line][number]
            moment = START + number * CADENCE + (0 if line == "halpha" else BETWEEN_LINES)
            counts = np.rint(np.where(inside, series.noisy[line][number], PAD)).astype(">i2")
            wavelengths = fits.ImageHDU(axis, name="lambda-coordinate")
            wavelengths.header["BUNIT"] = "Angstrom"
            scan = fits.PrimaryHDU(counts, database_header(line, axis, moment))
            fits.HDUList([scan, wavelengths]).writeto(folder / f"{line}_{number}.fits")
    return {}


def per_frequency(line: str) -> NDArray[np.float64]:
    """Intensity per frequency, W m-2 Hz-1 sr-1, of one count of the scene, (wavelength, 1, 1)."""
    intensity = np.full(len(AXES[line]), COUNT) * PER_ANGSTROM
    equivalence = u.spectral_density(AXES[line] * u.Angstrom)
    return intensity.to_value("W m-2 Hz-1 sr-1", equivalence)[:, None, None]


def in_sstred(folder: Path, series: Series) -> dict[str, Any]:
    """Floats per frequency, one file a line, wavelengths in air, a pad of NaN."""
    for line, axis in AXES.items():
        cube = np.where(series.field[line][:, None], series.noisy[line] * per_frequency(line), np.nan)
        write_sstred(
            folder / f"nb_{line}_im.fits",
            cube[:, None],
            vacuum_to_air(axis),
            seconds(len(axis), 0.0 if line == "halpha" else 5.015),
            padding="nan",
        )
    return {}


def in_sstred_integers(folder: Path, series: Series) -> dict[str, Any]:
    """The same in scaled integers, the pad each frame's median, and Stokes Q, U, V besides."""
    for line, axis in AXES.items():
        values = series.noisy[line] * per_frequency(line)
        inside = series.field[line][:, None]
        median = np.nanmedian(np.where(inside, values, np.nan), axis=(2, 3), keepdims=True)
        cube = np.where(inside, values, median)
        write_sstred(
            folder / f"nb_{line}_stokes_im.fits",
            np.stack([cube, 0.01 * cube, -0.01 * cube, 0.002 * cube], axis=1),
            vacuum_to_air(axis),
            seconds(len(axis), 0.0 if line == "halpha" else 5.015),
            padding="median",
            integers=True,
        )
    return {}


POINTING = {"reference_value": [-729.826, -313.432], "scale": 0.057}


def times(line: str) -> NDArray[np.datetime64]:
    """Mean times of a line's scans."""
    return START + np.arange(2) * CADENCE + (BETWEEN_LINES if line == "ca8542" else np.timedelta64(0, "ms"))


def nominal(line: str) -> float:
    """What a line's prefilter is called after, Angstrom."""
    return {"halpha": 6563.0, "ca8542": 8542.0}[line]


def state(path: Path, statement: dict[str, Any]) -> None:
    """Write a sidecar or a description."""
    path.write_text(yaml.safe_dump(statement, sort_keys=False))


def in_lapalma(folder: Path, series: Series) -> dict[str, Any]:
    """Integers and all Stokes parameters, a file a line, with all that the pipeline wrote beside it."""
    for line, axis in AXES.items():
        cube = np.where(series.field[line][:, None], series.noisy[line], PAD).astype("<i2")
        cube = np.stack([cube, cube // 50, -cube // 60, cube // 70], axis=1)
        name = f"crispex.stokes.{nominal(line):.0f}.15:27:24.time_corrected"
        write_cube(folder / f"{name}.icube", cube, stokes=True)
        write_twin(folder / f"{name}_sp.icube", cube, stokes=True)
        write_assoc(folder / f"{name}.assoc.pro", cube)
        offsets = vacuum_to_air(axis) - vacuum_to_air(LINES[line].rest_wavelength)
        spectra, series_ = f"spectfile.{nominal(line):.0f}.idlsave", f"tseries.{nominal(line):.0f}.calib.sav"
        norm = np.ones((len(axis), 4))
        write_idl(
            folder / spectra, {"norm_spect": norm, "norm_factor": 4.0, "spect_pos": offsets + nominal(line)}
        )
        days, moments = zip(*(str(time).split("T") for time in times(line)), strict=True)
        write_idl(
            folder / series_,
            {"ang": [0.0, 0.1], "time": moments, "date": [d.replace("-", ".") for d in days]},
        )
        state(
            folder / f"{name}.yaml",
            {
                "line": line,
                "wavelength": {
                    "file": spectra, "unit": "Angstrom", "medium": "air", "line_centre": nominal(line)
                },
                "time": {"file": series_},
                "pointing": POINTING,
                "unit": "DN",
                "padding": "constant",
            },
        )  # fmt: skip
    return {}


def in_lapalma_floats(folder: Path, series: Series) -> dict[str, Any]:
    """Floats per frequency, the other order of bytes, all of it stated in the sidecar, in vacuum."""
    for line, axis in AXES.items():
        cube = np.where(series.field[line][:, None], series.noisy[line] * per_frequency(line), np.nan)
        write_cube(folder / f"{line}_im.fcube", cube[:, None].astype(">f4"))
        state(
            folder / f"{line}_im.yaml",
            {
                "line": line,
                "wavelength": {"values": (axis / 10.0).tolist(), "unit": "nm", "medium": "vacuum"},
                "time": {"start": f"{times(line)[0]}", "step": 11.54},
                "pointing": POINTING,
                "unit": "W m-2 Hz-1 sr-1",
                "padding": "nan",
            },
        )
    return {}


def in_crispy(folder: Path, series: Series) -> dict[str, Any]:
    """Integers, one group a scan, evenly spaced wavelengths, in vacuum on the caller's word."""
    for line, axis in AXES.items():
        for number, time in enumerate(times(line)):
            inside = series.field[line][number]
            cube = np.where(inside, series.noisy[line][number], PAD).astype("i2")
            write_crispy(folder / f"{line}-{number:05d}.zarr", cube, axis, time, uniform=True)
    return {"medium": "vacuum"}


def in_crispy_stokes(folder: Path, series: Series) -> dict[str, Any]:
    """Floats, all Stokes parameters, Zarr's version 3, listed wavelengths, in air on the caller's word."""
    for line, axis in AXES.items():
        for number, time in enumerate(times(line)):
            cube = np.where(series.field[line][number], series.noisy[line][number], np.nan).astype("f4")
            cube = np.stack([cube, 0.01 * cube, -0.01 * cube, 0.002 * cube])
            path = folder / f"{line}-{number:05d}.zarr"
            write_crispy(path, cube, vacuum_to_air(axis), time, zarr_format=3)
    return {"medium": "air"}


def described(folder: Path, name: str) -> dict[str, Any]:
    """The description in deploy/, with the series' own pointing."""
    description = yaml.safe_load((DEPLOY / name).read_text())
    for cube in description["cubes"]:
        cube["pointing"] = POINTING
    state(folder / name, description)
    return {"description": folder / name}


def in_ibis(folder: Path, series: Series, compressed: bool = False) -> dict[str, Any]:
    """FITS, one file a scan, integers, wavelengths in an extension, zeros outside of the field stop."""
    for line, axis in AXES.items():
        for number, time in enumerate(times(line)):
            cube = np.where(series.field[line][number], series.noisy[line][number], 0).astype(">i2")
            path = folder / f"ibis_{nominal(line):.0f}_{number}.fits"
            write_ibis(path, cube, vacuum_to_air(axis), time - np.timedelta64(4200, "ms"), compressed)
    return described(folder, "ibis.yaml")


def in_fiss(folder: Path, series: Series) -> dict[str, Any]:
    """FITS, one file a raster, the wavelength the fastest axis, its header's cards counted from 0."""
    half = np.timedelta64(4500, "ms")
    for line, axis in AXES.items():
        for number, time in enumerate(times(line)):
            cube = np.where(series.field[line][number], series.noisy[line][number], PAD).astype(">i2")
            path = folder / f"FISS_{'A' if line == 'halpha' else 'B'}1_{number}.fts"
            write_fiss(path, cube, vacuum_to_air(axis), time - half, time + half)
    return described(folder, "fiss.yaml")


def in_dkist(folder: Path, series: Series, engine: str = "h5netcdf") -> dict[str, Any]:
    """NetCDF, both lines in one file, floats relative to each line's continuum, all Stokes parameters."""
    lines = {}
    for line, axis in AXES.items():
        relative = series.noisy[line] * COUNT / CONTINUUM[line]
        cube = np.where(series.field[line][:, None], relative, np.nan).astype("f4")
        stokes = np.stack([cube, 0.01 * cube, -0.01 * cube, 0.002 * cube])
        lines[line] = (stokes, vacuum_to_air(axis), times(line))
    write_dkist(folder / "dkist.nc", lines, engine)
    return described(folder, "dkist.yaml")


FORMATS: dict[str, tuple[Callable[[Path, Series], dict[str, Any]], float]] = {
    "fchroma": (in_fchroma, 1.0),
    "sstred": (in_sstred, COUNT),
    "sstred, integers": (in_sstred_integers, COUNT),
    "La Palma": (in_lapalma, 1.0),
    "La Palma, floats": (in_lapalma_floats, COUNT),
    "crispy": (in_crispy, 1.0),
    "crispy, Stokes": (in_crispy_stokes, 1.0),
    "IBIS": (in_ibis, 1.0),
    "FISS": (in_fiss, 1.0),
    "DKIST": (in_dkist, COUNT),
}
"""Writers, and what the store holds for one count of the scene."""
