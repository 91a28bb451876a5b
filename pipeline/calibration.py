"""Intensities and wavelengths from the quiet Sun in the field: a scale and a zero for each line.

What the network needs is how bright one line is against the other, per Angstrom. Data numbers do not say; the
quiet Sun does, whose mean spectrum is known. Its pixels are found by the shape of both lines and the
brightness of their wings (`quiet_pixels`), and their mean profiles compared with those that CRISP would
measure at the same place on the disc (`quiet_sun_profile`):

- disc-centre profiles per Angstrom from the Fourier-transform-spectrometer atlas (Neckel 1999,
  doi:10.1023/A:1017165208013), gravitational redshift taken off, the Sun's own mean motions left in: the
  cores of H-alpha and Ca II 8542 stand 0.8 km/s to the red of the laboratory's wavelengths;
- darkened towards the limb as the continuum is (Neckel & Labs 1994, doi:10.1007/BF00712791), and by how much
  less the line is, in the model atmosphere FAL-C (``data/quiet_sun.ecsv``). In the wings that ratio is 1.0 to
  1.3, and alike in both lines; a fifth of its logarithm is taken as its uncertainty, since the model's wings
  at the disc's centre and its continuum at all mu are right to 2 % (for measured profiles see Pietrow et al.
  2023, doi:10.1051/0004-6361/202244811);
- through CRISP's transmission profile (`pipeline.crisp.instrument`).

Intensities are compared in the wings alone, 0.9 Angstrom and more from the line's centre: there the quiet
Sun is the photosphere, the same everywhere but for granulation. They are not continuum: 0.55 to 0.7 of it.
Cores are chromosphere and differ from place to place; they serve to choose the pixels, and to find the
wavelengths' zero.

The commonest brightness of the wings, among pixels whose lines have the quiet Sun's shape, is taken to be the
quiet Sun's. In counts nothing else says how bright it is: a field that is wholly in a penumbra or in plage
cannot be told from it by its wings, and its scale is then wrong. Cores say it where they are not the quiet
Sun's on average (`LineCalibration.core`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
import zarr
from astropy.table import Table
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.optimize import minimize_scalar

from pipeline.crisp import quiet_sun
from pipeline.crisp.cube import PER_ANGSTROM
from pipeline.crisp.instrument import response_matrix
from pipeline.crisp.scan import LINES, Scan, cosine_of_pointing
from pipeline.crisp.wavelengths import LIGHT_SPEED
from pipeline.errors import InputError, MisuseError
from pipeline.storage import place

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

Reference = Literal["none", "quiet-sun"]
"""What intensities or wavelengths are referred to."""

UNITS = PER_ANGSTROM.to_string()
"""Unit of calibrated intensities."""
VELOCITY_UNITS = "km s-1"
RECORD_UNITS = {
    "scale": UNITS,
    "velocity_offset": VELOCITY_UNITS,
    "velocity_uncertainty": VELOCITY_UNITS,
    "slope": "Angstrom-1",
    "area": "arcsec2",
}
"""Units of what a store records; the scale's is that of one of the files' unit, other numbers have none."""

LIMB_DARKENING = {
    "halpha": (
        (6409.7, (0.33644, 1.30590, -1.79238, 2.45040, -1.89979, 0.59943)),
        (6694.0, (0.34685, 1.37539, -2.04425, 2.70493, -1.94290, 0.55999)),
    ),
    "ca8542": (
        (8117.6, (0.42977, 1.25182, -1.85164, 2.31949, -1.59101, 0.44155)),
        (8696.0, (0.45396, 1.25101, -2.02958, 2.75410, -2.02287, 0.59338)),
    ),
}
"""Polynomials in mu of the continuum's I(mu)/I(1) at the two wavelengths (Angstrom) around each line (Neckel
& Labs 1994, table 1); what lies between is interpolated."""

WING = 0.9  # Angstrom from rest at which wings begin
CORE = 0.35  # and at which the core ends
FITTED = {"halpha": 0.7, "ca8542": 0.5}
"""Angstrom around the core in which a profile's place is fitted: the core and its steep flanks."""
STEEP = 0.03  # per Angstrom: a tilt of the wings that is worth a remark
FILLED_IN = 0.1
"""Of the logarithm of the mean core over what was expected: what is worth a remark. Known scenes' are within
0.03, also where the line darkens by a fifth of the logarithm more or less than the table says
(`DARKENING_ERROR`); what real chromospheres' means differ by comes on top."""
SHIFT_LIMIT = 0.35
"""Angstrom by which wavelengths may be off: more is no drift, but air taken for vacuum or a wrong line."""

CORE_TOLERANCE = 0.35
"""Of the logarithm of core over wings: fibrils and network pass, ribbons, plage and filaments do not."""
WING_TOLERANCE = 0.2
"""Of the logarithm of the wings' brightness, from the commonest: granules pass, spots and faculae do not."""
NEIGHBOURHOOD = 1.0  # arcsec along each side of the surroundings of a pixel
NEIGHBOURS = 0.6  # share of them that must be quiet as well

BLOCK = 3.0
"""Arcsec along each side of the blocks that are compared on their own: two granules, so that they hardly
depend on one another."""
FILLED = 0.3  # share of a block's pixels that must be quiet
LEAST_BLOCKS = 8
LARGEST_SAMPLE = 6
"""Times of a series that are looked at."""

ATLAS_ERROR = 0.01
"""Relative error of one line's intensities in the atlas against the other's. Its absolute calibration is
consistent to half a per cent (Neckel & Labs 1984, doi:10.1007/BF00173953)."""
DARKENING_ERROR = 0.2
"""Error of the line's darkening relative to the continuum's, as a share of its logarithm."""
POINTING_ERROR = 10.0  # arcsec
ATLAS_WAVELENGTH_ERROR = 0.15
"""km/s: of the atlas (Allende Prieto & Garcia Lopez 1998, A&AS 131, 431)."""
LIMB_SHIFT_ERROR = 0.4
"""km/s, towards the limb: how the cores' shift changes with mu is not in the atlas."""


@dataclass(frozen=True)
class LineCalibration:
    """What the quiet Sun says about one line.

    Attributes
    ----------
    scale : float
        By which the store's intensities are multiplied to be in `UNITS`.
    uncertainty : float
        Relative, one standard deviation: of the blocks' mean, of time, of the atlas and the darkening, of mu.
    velocity_offset : float
        km/s, upflow positive: the mean velocity that the quiet Sun would wrongly show. Wavelengths times one
        plus this over the speed of light put that right. It holds the Sun's rotation, the Earth's motion, the
        gravitational redshift and the instrument's own error.
    velocity_uncertainty : float
        km/s, one standard deviation.
    core : float
        Intensity of the mean core over what was expected; 1 to a few per cent if all is well. More is stray
        light, or plage all over the field.
    slope : float
        Per Angstrom: how much brighter than expected the red wing is than the blue one. A few per cent are a
        prefilter that has been left in.
    """

    scale: float
    uncertainty: float
    velocity_offset: float
    velocity_uncertainty: float
    core: float
    slope: float


@dataclass(frozen=True)
class QuietSunCalibration:
    """Both lines' calibration, and on what it rests.

    Attributes
    ----------
    halpha, ca8542 : LineCalibration
    relative_uncertainty : float
        Of one line's intensities against the other's, one standard deviation: the network's
        ``calibration_error``.
    mu : float
        Mean of the quiet pixels.
    area : float
        Arcsec^2 of quiet Sun at a time, on average.
    blocks : int
        Blocks of the field that were compared on their own.
    times : tuple of int
        Indices of the times that were looked at, and show quiet Sun.
    """

    halpha: LineCalibration
    ca8542: LineCalibration
    relative_uncertainty: float
    mu: float
    area: float
    blocks: int
    times: tuple[int, ...]

    def record(self) -> dict[str, Any]:
        """As a store's attributes hold it: numbers of four digits more than are known."""
        record: dict[str, Any] = asdict(self)
        record["times"] = list(self.times)
        record["units"] = RECORD_UNITS
        record["sources"] = "Neckel 1999; Neckel & Labs 1994; FAL-C; CRISP's nominal profile"
        return record

    def summary(self) -> str:
        """Say it in a few lines."""
        lines = [
            f"quiet Sun: {self.area:.0f} arcsec2 in {self.blocks} blocks at mu = {self.mu:.2f}, "
            f"{len(self.times)} times; H-alpha against Ca II known to {100 * self.relative_uncertainty:.1f} %"
        ]
        for name in LINES:
            line: LineCalibration = getattr(self, name)
            lines.append(
                f"{name}: the files' unit is {line.scale:.5g} {UNITS} (+- {100 * line.uncertainty:.1f} %); "
                f"wavelengths off by {line.velocity_offset:+.2f} km/s (+- {line.velocity_uncertainty:.2f})"
            )
        return "\n".join((*lines, *self.remarks()))

    def remarks(self) -> tuple[str, ...]:
        """Say what the quiet Sun would not show, a sentence each."""
        found = []
        for name in LINES:
            line: LineCalibration = getattr(self, name)
            if abs(line.slope) > STEEP:
                found.append(
                    f"{name}: the wings tilt by {100 * line.slope:+.0f} % an Angstrom against the quiet "
                    "Sun's; is a prefilter left in?"
                )
            if abs(np.log(line.core)) > FILLED_IN:
                causes = (
                    "stray light left in, or plage"
                    if line.core > 1.0
                    else "too much stray light taken off, or a filament"
                )
                found.append(
                    f"{name}: the mean core is {line.core:.2f} times as bright as the quiet Sun's; is there "
                    f"{causes}? Then the scale is off as well"
                )
        return tuple(found)


def _of_line(line: str) -> Table:
    if line not in LINES:
        raise MisuseError("the quiet Sun is not known there", found=line, expected=list(LINES))
    table = quiet_sun.table()
    return table[table["line"] == line]


def limb_darkening(line: str, mu: ArrayLike) -> Array:
    """Intensity of the continuum near a line relative to the disc's centre (Neckel & Labs 1994).

    Parameters
    ----------
    line : str
        ``"halpha"`` or ``"ca8542"``.
    mu : array_like
        Cosine of the heliocentric angle.

    Returns
    -------
    ndarray, shape as `mu`
    """
    (blue, first), (red, second) = LIMB_DARKENING[line]
    share = (LINES[line].rest_wavelength - blue) / (red - blue)
    coefficients = (1.0 - share) * np.array(first) + share * np.array(second)
    return np.asarray(np.power.outer(np.asarray(mu, dtype=np.float64), np.arange(6)) @ coefficients)


ANGLES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""The table's mu."""


def _darkening(line: str) -> Array:
    """I(mu)/I(1) of a line's profile over the continuum's, (mu, offset)."""
    table = _of_line(line)
    ratios = [np.asarray(table[f"darkening_{mu}"], dtype=np.float64) for mu in ANGLES[:-1]]
    return np.stack([*ratios, np.ones(len(table))])


def _at_angle(values: Array, mu: float) -> Array:
    """Values (mu, ...) between the table's angles; below its smallest, the line through the last two."""
    if not 0.0 < mu <= 1.0:
        raise InputError("not a place on the disc", found=f"mu = {mu:.3g}", expected="above 0, at most 1")
    low = int(np.clip(np.searchsorted(ANGLES, mu) - 1, 0, len(ANGLES) - 2))
    share = (mu - ANGLES[low]) / (ANGLES[low + 1] - ANGLES[low])
    return np.asarray((1.0 - share) * values[low] + share * values[low + 1])


def _continuum(line: str, mu: float) -> float:
    return quiet_sun.continuum(line) * float(limb_darkening(line, mu))


def _measure(line: str, offset: Array) -> Array:
    """Profiles (mu, offset) at the table's angles through CRISP, relative to the continuum."""
    table = _of_line(line)
    spectra = np.asarray(table["intensity"]) * _darkening(line)
    axis = np.asarray(table["offset"])
    # In parts: the matrix's making takes a thousand numbers for each of its own.
    parts = [response_matrix(line, axis, part) for part in np.array_split(offset, offset.size // 64 + 1)]
    return np.asarray(spectra @ np.concatenate(parts).T)


@cache
def _measured(line: str) -> tuple[Array, Array]:
    """Offsets 0.01 Angstrom apart, and what CRISP measures there at the table's angles, (mu, offset)."""
    reach = WING + 0.8 + SHIFT_LIMIT
    fine = np.arange(-reach, reach + 1e-9, 0.01)
    return fine, _measure(line, fine)


def quiet_sun_profile(line: str, offset: ArrayLike, mu: float) -> Array:
    """Mean profile of the quiet Sun as CRISP measures it.

    Parameters
    ----------
    line : str
        ``"halpha"`` or ``"ca8542"``.
    offset : array_like
        Wavelengths that the instrument is tuned to, Angstrom from the line's rest wavelength; within 2.1.
    mu : float
        Cosine of the heliocentric angle, above 0.

    Returns
    -------
    ndarray, shape as `offset`
        Intensity, `UNITS`.

    Raises
    ------
    InputError
        A wavelength lies beyond the table, or `mu` is not that of a place on the disc.
    MisuseError
        The line is another one.
    """
    wanted = np.asarray(offset, dtype=np.float64)
    relative = _at_angle(_measure(line, wanted.ravel()), mu)
    return relative.reshape(wanted.shape) * _continuum(line, mu)


class _Expected:
    """A line's quiet profile at one mu, and how it lies on an observation's axis."""

    def __init__(self, line: str, wavelength: ArrayLike, mu: float, velocity: float = 0.0) -> None:
        window = LINES[line]
        offset = np.asarray(wavelength, dtype=np.float64) * (1.0 + velocity / LIGHT_SPEED)
        self.line = line
        self.offset = offset - window.rest_wavelength
        self.wings = (np.abs(self.offset) >= WING) & (np.abs(self.offset) <= WING + 0.8)
        self.core = np.abs(self.offset) <= CORE
        self.fitted = np.abs(self.offset) <= FITTED[line]
        blue, red = (self.wings & (np.sign(self.offset) == side) for side in (-1, 1))
        if not (blue.any() and red.any() and self.core.any() and self.fitted.sum() >= 5):
            raise InputError(
                f"{line} has too few wavelengths for a comparison with the quiet Sun",
                found=f"{self.offset.size}, {self.offset.min():+.2f} to {self.offset.max():+.2f} Angstrom",
                expected=f"some beyond {WING} Angstrom on both sides, and five within {FITTED[line]}",
                remedy="ingest it without --calibrate and --wavelength-zero",
            )
        self._fine, measured = _measured(line)
        self._profile = _at_angle(measured, mu) * _continuum(line, mu)

    def at(self, shift: float = 0.0) -> Array:
        """Profile on the axis, were the Sun's moved to the red by `shift` Angstrom; NaN beyond the wings."""
        moved = self.offset - shift
        return np.interp(moved, self._fine, self._profile, left=np.nan, right=np.nan)

    def shift_of(self, profile: Array) -> float:
        """Angstrom to the red by which a profile lies: the best fit of core and flanks, however deep."""
        seen = profile[self.fitted]

        def misfit(shift: float) -> float:
            design = np.stack([np.ones(seen.size), self.at(shift)[self.fitted]], axis=1)
            return float(np.sum((design @ np.linalg.lstsq(design, seen, rcond=None)[0] - seen) ** 2))

        trial = np.arange(-SHIFT_LIMIT, SHIFT_LIMIT + 1e-9, 0.02)
        best = trial[int(np.argmin([misfit(shift) for shift in trial]))]
        return float(minimize_scalar(misfit, bounds=(best - 0.02, best + 0.02), method="bounded").x)

    def wing_weights(self) -> Array:
        """Weights of the wings' wavelengths: little where other atoms' lines or the air's are blended in."""
        profile, mirrored = self.at(), np.interp(-self.offset, self._fine, self._profile)
        blend = 0.5 * np.abs(profile / mirrored - 1.0)
        weights = np.where(self.wings, 1.0 / (ATLAS_ERROR**2 + blend**2), 0.0)
        return np.asarray(weights / weights.sum())


def quiet_pixels(
    profiles: Mapping[str, NDArray[Any]],
    wavelengths: Mapping[str, ArrayLike],
    usable: Mask,
    *,
    mu: float,
    pixel: float,
    velocities: Mapping[str, float] | None = None,
) -> Mask:
    """Find the quiet Sun: not ribbons, plage, filaments, spots or faculae, whatever the intensities' units.

    A pixel is quiet if in both lines (1) the core's mean brightness over the wings' is that of the quiet Sun
    there to a factor of exp(`CORE_TOLERANCE`), (2) its wings are as bright as those of most such pixels, to a
    factor of exp(`WING_TOLERANCE`), and (3) so are `NEIGHBOURS` of the pixels around it. Most are taken to be
    quiet: a field wholly in a penumbra or plage is not told.

    Parameters
    ----------
    profiles : mapping of str to ndarray, shape (y, x, wavelength)
        Both lines' intensities, each in any unit.
    wavelengths : mapping of str to array_like
        Both axes, vacuum, Angstrom.
    usable : ndarray of bool, shape (y, x)
        Pixels with sound intensities in both lines.
    mu : float
        Cosine of the heliocentric angle.
    pixel : float
        Size of a pixel, arcsec.
    velocities : mapping of str to float, optional
        By which each line's wavelengths are known to be off, km/s.

    Returns
    -------
    ndarray of bool, shape (y, x)
    """
    quiet = usable.copy()
    brightness = {}
    for line in LINES:
        expected = _Expected(line, wavelengths[line], mu, (velocities or {}).get(line, 0.0))
        reference = expected.at()
        wings, core = (
            profiles[line][..., part].mean(axis=-1, dtype=np.float64)
            for part in (expected.wings, expected.core)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            brightness[line] = np.log(wings)
            excess = np.log(core / wings) - np.log(
                reference[expected.core].mean() / reference[expected.wings].mean()
            )
            quiet &= np.abs(excess) <= CORE_TOLERANCE
    shaped = quiet.copy()
    for values in brightness.values():
        if shaped.any():
            with np.errstate(invalid="ignore"):
                quiet &= np.abs(values - _commonest(values[shaped])) <= WING_TOLERANCE
    side = max(round(NEIGHBOURHOOD / pixel), 1)
    share = ndimage.uniform_filter(quiet.astype(np.float64), side, mode="constant")
    return np.asarray(quiet & (share >= NEIGHBOURS))


def _commonest(values: Array) -> float:
    """Where a distribution is densest."""
    step = 0.02
    low, high = np.percentile(values, (0.5, 99.5))
    edges = np.arange(low - 4.0 * step, high + 5.0 * step, step)
    counts = ndimage.gaussian_filter1d(np.histogram(values, edges)[0].astype(np.float64), 2.0)
    most = int(np.argmax(counts))
    return float(0.5 * (edges[most] + edges[most + 1]))


def calibrate(dataset: xr.Dataset, times: Sequence[int] | None = None) -> QuietSunCalibration:
    """Compare an observation with the quiet Sun.

    Parameters
    ----------
    dataset : xarray.Dataset
        An observation with both lines, ``valid``, ``mu`` and the pixels' coordinates.
    times : sequence of int, optional
        Indices of the times to look at; by default `LARGEST_SAMPLE` of those whose place on the disc is
        known, evenly spread.

    Returns
    -------
    QuietSunCalibration

    Raises
    ------
    InputError
        There is too little quiet Sun in the field, its place on the disc is unknown, the wavelengths do not
        reach the wings, or they are off by more than `SHIFT_LIMIT`.
    """
    if times is None:
        times = _spread(dataset, range(dataset.sizes["time"]))
    pixel = float(np.sqrt(np.prod([abs(float(dataset[axis].diff(axis).mean())) for axis in ("y", "x")])))
    looked_at = {int(time): _Field(dataset, time, pixel) for time in times}
    # A scan that clouds or the seeing have spoilt has no quiet pixels.
    sound = {time: field for time, field in looked_at.items() if field.enough.any()}
    found = list(sound.values())
    share = np.mean([field.enough for field in found or looked_at.values()], axis=0)
    kept = share >= 0.5
    area = float(np.mean([field.area for field in found or looked_at.values()]))
    if kept.sum() < LEAST_BLOCKS:
        raise InputError(
            "there is too little quiet Sun in the field to calibrate with",
            found=f"{area:.0f} arcsec2, in {int(kept.sum())} blocks of {BLOCK:g} x {BLOCK:g} arcsec that are "
            f"quiet for {100 * FILLED:.0f} % or more",
            expected=f"{LEAST_BLOCKS} blocks in which both lines look like the quiet Sun",
            remedy="ingest it without --calibrate and --wavelength-zero: then the calibration is assumed",
        )
    mu = float(np.nanmean([field.mu[kept] for field in found]))
    lines = {}
    logarithms = {}
    for line in LINES:
        scale, shift, core, slope = (
            np.array(
                [[getattr(field, what)[line][block] for block in np.flatnonzero(kept)] for field in found]
            )
            for what in ("scale", "velocity", "core", "slope")
        )
        logarithms[line] = scale
        dark, angle = _darkening_error(line, mu), _pointing_error(line, mu)
        spread = float(np.hypot(_mean_error(scale), np.hypot(dark, angle)))
        velocity_error = np.hypot(_mean_error(shift), ATLAS_WAVELENGTH_ERROR)
        lines[line] = LineCalibration(
            scale=float(np.exp(np.nanmean(scale))),
            uncertainty=float(np.hypot(spread, ATLAS_ERROR)),
            velocity_offset=float(np.nanmedian(shift)),
            velocity_uncertainty=float(np.hypot(velocity_error, LIMB_SHIFT_ERROR * (1.0 - mu))),
            core=float(np.exp(np.nanmean(core))),
            slope=float(np.nanmean(slope)),
        )
    between = logarithms["halpha"] - logarithms["ca8542"]
    systematic = [
        ATLAS_ERROR,
        *(_darkening_error(line, mu) for line in LINES),
        # Both lines darken together where the pointing is wrong.
        _pointing_error("halpha", mu) - _pointing_error("ca8542", mu),
    ]
    return QuietSunCalibration(
        **lines,
        relative_uncertainty=float(np.hypot(_mean_error(between), np.linalg.norm(systematic))),
        mu=mu,
        area=area,
        blocks=int(kept.sum()),
        times=tuple(sound),
    )


def _spread(dataset: xr.Dataset, among: Sequence[int]) -> list[int]:
    """`LARGEST_SAMPLE` of some times, evenly spread, leaving out those off the disc if there are others."""
    on_disc = np.isfinite(dataset["mu"].to_numpy()[list(among)])
    usable = np.asarray(among)[on_disc] if on_disc.any() else np.asarray(among)
    chosen = np.linspace(0, usable.size - 1, min(usable.size, LARGEST_SAMPLE)).round().astype(int)
    return [int(time) for time in usable[np.unique(chosen)]]


def calibrate_store(
    path: str | Path, name: object = None, *, among: Sequence[int] | None = None
) -> QuietSunCalibration:
    """Calibrate an observation store that need not be finished: only its arrays have to be there.

    Parameters
    ----------
    path : str or Path
        The store, or its URL.
    name : object, optional
        What errors call it; by default its path.
    among : sequence of int, optional
        Times of which some are looked at; all if left out.

    Returns
    -------
    QuietSunCalibration

    Raises
    ------
    InputError
        As for `calibrate`.
    """
    dataset: xr.Dataset = xr.open_zarr(place(path).zarr, chunks=None, consolidated=False)
    try:
        return calibrate(dataset, None if among is None else _spread(dataset, among))
    except InputError as refusal:
        raise InputError(
            refusal.problem,
            where=path if name is None else name,
            found=refusal.found,
            expected=refusal.expected,
            remedy=refusal.remedy,
        ) from refusal


def write_calibration(
    path: str | Path,
    scans: Sequence[Scan],
    calibration: QuietSunCalibration | None = None,
    *,
    intensities: bool = False,
    wavelengths: bool = False,
) -> dict[str, Any]:
    """Put a calibration into an observation store, or take it out.

    Intensities stay as they are in the files: the scale is the variables' ``scale_factor``, by which xarray
    multiplies as it reads. Wavelengths are written anew from the scans'. Doing it again gives the same store.

    Parameters
    ----------
    path : str or Path
        A store that `pipeline.observation.lay_out` made, or its URL.
    scans : sequence of Scan
        One of each line.
    calibration : QuietSunCalibration, optional
        If left out, intensities and wavelengths are as in the files.
    intensities, wavelengths : bool
        Whether it is applied to these.

    Returns
    -------
    dict
        What the store's own attributes have to say of it.
    """
    group = zarr.open_group(place(path).zarr, mode="r+", use_consolidated=False)
    for scan in scans:
        line: LineCalibration | None = getattr(calibration, scan.line, None)
        intensity, axis = group[scan.line], group[f"wavelength_{scan.line}"]
        assert isinstance(intensity, zarr.Array)
        assert isinstance(axis, zarr.Array)
        attributes = {**intensity.attrs, "units": scan.units}
        attributes.pop("scale_factor", None)
        scale = 1.0
        if line is not None and intensities:
            scale = line.scale
            attributes |= {"units": UNITS, "scale_factor": scale}
        if np.isfinite(scan.saturation):
            attributes["saturation"] = scan.saturation * scale
        intensity.attrs.put(attributes)
        known = {**axis.attrs}
        for name in ("velocity_offset", "velocity_offset_units"):
            known.pop(name, None)
        velocity = 0.0
        if line is not None and wavelengths:
            velocity = known["velocity_offset"] = line.velocity_offset
            known["velocity_offset_units"] = VELOCITY_UNITS
        axis[:] = np.asarray(scan.wavelength) * (1.0 + velocity / LIGHT_SPEED)
        axis.attrs.put(known)
    found: dict[str, Any] = {
        "relative_calibration": "assumed",
        "relative_calibration_comment": "the two lines' intensities are taken as they are in the files",
    }
    if calibration is None:
        return found
    if intensities:
        found = {
            "relative_calibration": "quiet_sun",
            "relative_calibration_comment": "each line against the quiet Sun in the field; the files' "
            "intensities are stored, with a scale_factor",
            "relative_calibration_uncertainty": calibration.relative_uncertainty,
        }
    if wavelengths:
        found["wavelength_zero"] = "quiet_sun"
    return {**found, "quiet_sun": calibration.record()}


class _Field:
    """What one time of an observation shows, block by block."""

    def __init__(self, dataset: xr.Dataset, time: int, pixel: float) -> None:
        here = dataset.isel(time=time)
        middle = float(here["mu"])
        if not 0.0 < middle <= 1.0:
            raise InputError(
                "where the field is on the disc is not known",
                found=f"mu = {middle:.3g} at {here['time'].values}",
                expected="the cosine of the heliocentric angle, above 0 and at most 1",
                remedy="mend the pointing in the headers",
            )
        axes = {line: dataset[f"wavelength_{line}"].to_numpy() for line in LINES}
        profiles, usable = {}, here["valid"].to_numpy().astype(bool)
        if "defects" in here:
            usable &= here["defects"].to_numpy() == 0
        moved = {}
        for line in LINES:
            profiles[line] = here[line].transpose("y", "x", ...).to_numpy()
            moved[line] = np.zeros(usable.shape)
            if (own := f"wavelength_shift_{line}") in here:
                moved[line] = here[own].transpose("y", "x").to_numpy().astype(np.float64)
                usable &= np.isfinite(moved[line])
            full = float(dataset[line].attrs.get("saturation", np.inf))
            for image in np.moveaxis(profiles[line], -1, 0):
                with np.errstate(invalid="ignore"):
                    usable &= (image > 0.0) & (image < full)
        self._blocks(usable.shape, pixel)
        velocities = dict.fromkeys(LINES, 0.0)
        quiet = usable
        # A second look, with wavelengths that are right, tells cores and wings better apart.
        for _ in range(2):
            if not quiet.any():
                break
            # Pixels whose wavelengths differ a little are as good as their mean at the wavelengths' mean.
            wavelengths = {line: axes[line] + moved[line][quiet].mean() for line in LINES}
            quiet = quiet_pixels(profiles, wavelengths, usable, mu=middle, pixel=pixel, velocities=velocities)
            for line in LINES if quiet.any() else ():
                mean = profiles[line][quiet].mean(axis=0, dtype=np.float64)
                expected = _Expected(line, axes[line] + moved[line][quiet].mean(), middle)
                velocities[line] = _velocity(line, _plausible(line, expected.shift_of(mean)))
        self.area = float(quiet.sum()) * pixel**2
        number = np.bincount(self._block[quiet], minlength=self._count)
        self.enough: Mask = number >= FILLED * np.bincount(self._block.ravel(), minlength=self._count).max()
        longitude, latitude = (dataset[name].to_numpy() for name in ("longitude", "latitude"))
        moment = np.datetime64(here["time"].to_numpy().flat[0])
        everywhere = cosine_of_pointing((longitude[quiet], latitude[quiet]), moment)
        with np.errstate(invalid="ignore", divide="ignore"):
            self.mu = np.bincount(self._block[quiet], everywhere, minlength=self._count) / number
        self.scale, self.velocity, self.core, self.slope = (
            {line: np.full(self._count, np.nan) for line in LINES} for _ in range(4)
        )
        for line in LINES:
            sums = [
                np.bincount(self._block[quiet], image[quiet].astype(np.float64), minlength=self._count)
                for image in np.moveaxis(profiles[line], -1, 0)
            ]
            shift = np.bincount(self._block[quiet], moved[line][quiet], minlength=self._count)
            for block in np.flatnonzero(self.enough).tolist():
                mean = np.array([total[block] for total in sums]) / number[block]
                axis = axes[line] + shift[block] / number[block]
                self._compare(line, axis, mean, block, velocities[line])

    def _blocks(self, shape: tuple[int, int], pixel: float) -> None:
        side = max(round(BLOCK / pixel), 1)
        row, column = np.arange(shape[0]) // side, np.arange(shape[1]) // side
        self._block = row[:, None] * (column[-1] + 1) + column
        self._count = int(self._block[-1, -1]) + 1

    def _compare(self, line: str, wavelength: Array, mean: Array, block: int, velocity: float) -> None:
        """Compare a block's mean profile with the quiet Sun's at its mu, with the field's wavelengths."""
        expected = _Expected(line, wavelength, float(self.mu[block]), velocity)
        shift = expected.shift_of(mean)
        self.velocity[line][block] = velocity + _velocity(line, shift)
        weights, wings = expected.wing_weights(), expected.wings
        ratio = np.log(expected.at()[wings] / mean[wings])
        scale = float(weights[wings] @ ratio)
        self.scale[line][block] = scale
        offset = expected.offset[wings]
        self.slope[line][block] = -np.polyfit(offset, ratio, 1, w=np.sqrt(weights[wings]))[0]
        core = expected.core
        self.core[line][block] = scale + np.log(mean[core].mean() / expected.at(shift)[core].mean())


def _velocity(line: str, shift: float) -> float:
    """Velocity (km/s, upflow positive) that a profile shows which lies `shift` Angstrom to the red."""
    return -shift / LINES[line].rest_wavelength * LIGHT_SPEED


def _plausible(line: str, shift: float) -> float:
    if abs(shift) > SHIFT_LIMIT - 0.01:
        raise InputError(
            f"the wavelengths of {line} do not fit the quiet Sun's",
            found=f"its core lies {shift:+.2f} Angstrom or more from where it should",
            expected=f"less than {SHIFT_LIMIT} Angstrom",
            remedy="check whether they are in vacuum, and of this line",
        )
    return shift


def _mean_error(values: Array) -> float:
    """Standard error of the mean of values over times and blocks: blocks are independent, times are not."""
    blocks = np.nanmean(values, axis=0)
    error = np.nanstd(blocks, ddof=1) / np.sqrt(blocks.size)
    drift = np.nanstd(np.nanmean(values, axis=1)) if len(values) > 1 else 0.0
    return float(np.hypot(error, drift))


def _darkening_error(line: str, mu: float) -> float:
    wings = np.abs(np.asarray(_of_line(line)["offset"])) >= WING
    return float(DARKENING_ERROR * np.abs(np.log(_at_angle(_darkening(line), mu)[wings])).mean())


def _pointing_error(line: str, mu: float) -> float:
    """Relative change of the wings' intensity over the error of the pointing."""
    radius = 960.0  # arcsec, of the Sun
    away = np.sqrt(1.0 - mu**2)
    other = np.sqrt(max(1.0 - (away - POINTING_ERROR / radius) ** 2, 1e-4))
    offset = np.array([-1.2, -1.0, 1.0, 1.2])
    here, there = (quiet_sun_profile(line, offset, float(angle)).mean() for angle in (mu, min(other, 1.0)))
    return float(abs(np.log(there / here)))
