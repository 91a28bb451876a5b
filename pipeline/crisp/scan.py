"""One scan of one spectral line, as every reader describes it: what it is and where, not its intensities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import astropy.units as u
import numpy as np
from astropy.coordinates import get_sun
from astropy.time import Time
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales
from numpy.typing import ArrayLike, NDArray

from inn.layout import CA8542, HALPHA, LineWindow
from pipeline.crisp.wavelengths import Medium, to_vacuum
from pipeline.errors import InputError

LINES: dict[str, LineWindow] = {HALPHA.name: HALPHA, CA8542.name: CA8542}
LONG_NAMES = {"halpha": "H-alpha 6563", "ca8542": "Ca II 8542"}
"""The lines that an observation holds, by name."""

NEAR = 3.5  # Angstrom: an axis centred this near to a line is of that line (wide enough for an axis in air)
ARCSEC_PER_DEGREE = 3600.0
ANOTHER_PLACE = 0.05  # arcsec, a pixel: a plane image of the sky that misses by more is not the one described

SOLAR_RADIUS = 695.7e6
"""Nominal solar radius, m (IAU 2015 resolution B3, doi:10.3847/0004-6256/152/2/41)."""


Stated = Literal["file", "format", "caller"]
"""Who says what the wavelengths are measured in: the file itself (or its sidecar), its format's definition,
or the caller."""

Padding = Literal["none", "nan", "constant"]
"""What surrounds the field in the frame: nothing, NaN, or one value at each wavelength."""


class ForeignFileError(InputError):
    """A file that is not a scan of the lines wanted in a known format; it may still be a sound file."""


class OtherKindError(ForeignFileError):
    """A file of another kind than those of a format: not FITS, for example."""


class OtherLineError(ForeignFileError):
    """A file of a known format, without a scan of the lines wanted."""


@dataclass(frozen=True)
class Frame:
    """Where the pixels of a scan lie on the sky: a gnomonic (TAN) helioprojective frame.

    Attributes
    ----------
    reference_pixel : tuple of float
        Zero-based ``(x, y)`` of the reference pixel (FITS ``CRPIX`` less one).
    reference_value : tuple of float
        Helioprojective ``(longitude, latitude)`` of the reference pixel, arcsec (``CRVAL``).
    scale : tuple of float
        Size of a pixel along x and y, arcsec (``CDELT``).
    rotation : tuple of tuple of float
        The matrix ``((PC1_1, PC1_2), (PC2_1, PC2_2))``.

    Notes
    -----
    Thompson 2006, A&A 449, 791, doi:10.1051/0004-6361:20054262.
    """

    reference_pixel: tuple[float, float]
    reference_value: tuple[float, float]
    scale: tuple[float, float]
    rotation: tuple[tuple[float, float], tuple[float, float]]

    @classmethod
    def from_wcs(cls, wcs: WCS, shape: tuple[int, int], where: object) -> Frame:
        """Take the frame from the celestial part of an astropy WCS (whose unit is the degree).

        Parameters
        ----------
        wcs : astropy.wcs.WCS
            Of two axes, longitude and latitude.
        shape : tuple of int
            Pixels ``(y, x)`` of the frame.
        where : object
            The file, for the error.

        Raises
        ------
        InputError
            The WCS puts the corners or the middle elsewhere: it has what a frame has not (``LONPOLE`` or
            ``PVi_m`` of their own, distortions).
        """
        # The size of a pixel along its own axes, also where a CD matrix says it; signs are those of CDELT.
        steps = np.copysign(proj_plane_pixel_scales(wcs), wcs.wcs.get_cdelt())
        rotation = wcs.pixel_scale_matrix / steps[:, None]
        frame = cls(
            (float(wcs.wcs.crpix[0]) - 1.0, float(wcs.wcs.crpix[1]) - 1.0),
            (float(wcs.wcs.crval[0]) * ARCSEC_PER_DEGREE, float(wcs.wcs.crval[1]) * ARCSEC_PER_DEGREE),
            (float(steps[0]) * ARCSEC_PER_DEGREE, float(steps[1]) * ARCSEC_PER_DEGREE),
            ((float(rotation[0, 0]), float(rotation[0, 1])), (float(rotation[1, 0]), float(rotation[1, 1]))),
        )
        rows, columns = shape
        x = (columns - 1) * np.array([0.0, 1.0, 0.0, 1.0, 0.5])
        y = (rows - 1) * np.array([0.0, 0.0, 1.0, 1.0, 0.5])
        away = _apart(frame.coordinates(x, y), np.array(wcs.all_pix2world(x, y, 0)) * ARCSEC_PER_DEGREE)
        if not away.max() <= ANOTHER_PLACE:
            raise InputError(
                "the header's coordinates are not those of a plane image of the sky",
                where=where,
                found=f"corners or the middle {away.max():.2g} arcsec from where CRPIX, CRVAL, CDELT and PC "
                "put them",
                expected=f"{ANOTHER_PLACE} arcsec at most: no LONPOLE, PVi_m or distortion of its own",
                remedy="mend the header",
            )
        return frame

    @classmethod
    def through(
        cls,
        x: NDArray[np.float64],
        y: NDArray[np.float64],
        longitude: NDArray[np.float64],
        latitude: NDArray[np.float64],
        reference_pixel: tuple[float, float],
    ) -> Frame:
        """Find the frame that gives pixels the coordinates they have, by least squares.

        Parameters
        ----------
        x, y : ndarray, shape (n,)
            Zero-based pixels, three at least and not on one line.
        longitude, latitude : ndarray, shape (n,)
            Helioprojective, arcsec.
        reference_pixel : tuple of float
            Zero-based ``(x, y)`` of the point where the frame's plane touches the sky.
        """
        design = np.stack([x - reference_pixel[0], y - reference_pixel[1], np.ones_like(x)], axis=1)
        value = (float(longitude[len(x) // 2]), float(latitude[len(x) // 2]))
        # The first plane touches the sky at one of the pixels. It says what is at the reference pixel, where
        # the next one touches; from there on only the last digits change.
        for _ in range(4):
            touching = cls((0.0, 0.0), value, (1.0, 1.0), ((1.0, 0.0), (0.0, 1.0)))
            plane = touching.wcs.wcs_world2pix(longitude / ARCSEC_PER_DEGREE, latitude / ARCSEC_PER_DEGREE, 0)
            solution = np.linalg.lstsq(design, np.stack(plane, axis=1), rcond=None)[0]
            angles = touching.coordinates(*solution[2][:, None])
            value = (float(angles[0][0]), float(angles[1][0]))
        matrix = solution[:2].T
        step = (float(np.hypot(*matrix[:, 0])), float(np.hypot(*matrix[:, 1])))
        # FITS scales the rows of the matrix, not its columns.
        rotation = matrix / np.array(step)[:, None]
        return cls(
            reference_pixel,
            value,
            step,
            ((float(rotation[0, 0]), float(rotation[0, 1])), (float(rotation[1, 0]), float(rotation[1, 1]))),
        )

    @property
    def matrix(self) -> NDArray[np.float64]:
        """Arcsec in the frame's plane (to west, to north) that a pixel along x, y (the columns) is."""
        return np.asarray(np.array(self.rotation) * np.array(self.scale)[:, None])

    @property
    def wcs(self) -> WCS:
        """The frame as an astropy WCS of two celestial axes."""
        wcs = WCS(naxis=2)
        wcs.wcs.ctype = ["HPLN-TAN", "HPLT-TAN"]
        wcs.wcs.cunit = ["arcsec", "arcsec"]
        wcs.wcs.crpix = [self.reference_pixel[0] + 1.0, self.reference_pixel[1] + 1.0]
        wcs.wcs.crval = list(self.reference_value)
        wcs.wcs.cdelt = list(self.scale)
        wcs.wcs.pc = np.array(self.rotation)
        wcs.wcs.set()
        return wcs

    def coordinates(
        self, x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Helioprojective longitude and latitude of zero-based pixel positions.

        Parameters
        ----------
        x, y : ndarray
            Positions along a row and along a column, of one shape.

        Returns
        -------
        longitude, latitude : ndarray
            Arcsec, of the same shape; longitude within half a turn of the disc's centre.
        """
        longitude, latitude = self.wcs.wcs_pix2world(x, y, 0)
        longitude = (np.asarray(longitude) + 180.0) % 360.0 - 180.0
        return longitude * ARCSEC_PER_DEGREE, np.asarray(latitude) * ARCSEC_PER_DEGREE

    def pixels(
        self, longitude: NDArray[np.float64], latitude: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Zero-based pixel positions along a row and along a column: the inverse of `coordinates`.

        Parameters
        ----------
        longitude, latitude : ndarray
            Helioprojective, arcsec, of one shape.

        Returns
        -------
        x, y : ndarray
            Of the same shape.
        """
        x, y = self.wcs.wcs_world2pix(longitude / ARCSEC_PER_DEGREE, latitude / ARCSEC_PER_DEGREE, 0)
        return np.asarray(x), np.asarray(y)


@dataclass(frozen=True)
class Scan:
    """One scan of one line: everything but its intensities, which `pipeline.crisp.open_intensity` opens.

    It is small and travels to workers as it is. Checked here, trusted afterwards.

    Attributes
    ----------
    path : str
        The file (or the directory, of formats that are one), as an absolute path.
    format : str
        Name of the reader that made this description, for example ``"fchroma"``.
    index : int
        Which of the file's scans it is, from 0, as its reader counts them.
    part : str
        Where in the file its array is, if a description says so: an HDU, or a variable.
    line : str
        The line's name, a key of `LINES`.
    time : numpy.datetime64
        The scan's mean time, UTC, to the nanosecond.
    wavelength : tuple of float
        Wavelengths in vacuum, Angstrom, increasing, whatever the file has.
    medium : {"vacuum", "air"}
        What the file's own wavelengths are measured in.
    medium_stated_by : {"file", "format", "caller"}
        Who says so.
    shape : tuple of int
        Pixels ``(y, x)``.
    units : str
        Unit of the intensities as they are opened, which astropy parses: what is counted, such as ``"DN"``;
        ``""`` (relative); or intensity per Angstrom (`pipeline.crisp.cube.PER_ANGSTROM`).
    units_of_file : str
        Unit of the intensities in the file, as it stands there.
    saturation : float
        Largest intensity, in `units`, that the file can hold; infinite if it has no limit.
    frame : Frame
        Where the pixels lie on the sky.
    padding : {"none", "nan", "constant"}, optional
        What surrounds the field; None where the file does not say.
    begin, end : numpy.datetime64, optional
        First and last exposure, UTC; None where they are not known.
    has_wavelength_shift : bool
        Whether the file has a map of wavelengths that differ from pixel to pixel
        (`pipeline.crisp.open_wavelength_shift`).
    sidecars : tuple of str
        Other files that say something of the scan: its wavelengths, times or pointing.
    present : tuple of int, optional
        Indices of `wavelength` of which the file has images; None if it has them all.
    drift : float
        Angstrom by which the file's own wavelengths are above `wavelength`, all alike.

    Raises
    ------
    InputError
        When made with an axis, a shape or a time that cannot be.
    """

    path: str
    format: str
    line: str
    time: np.datetime64
    wavelength: tuple[float, ...]
    medium: Medium
    medium_stated_by: Stated
    shape: tuple[int, int]
    units: str
    units_of_file: str
    saturation: float
    frame: Frame
    index: int = 0
    part: str = ""
    padding: Padding | None = None
    begin: np.datetime64 | None = None
    end: np.datetime64 | None = None
    has_wavelength_shift: bool = False
    sidecars: tuple[str, ...] = ()
    present: tuple[int, ...] | None = None
    drift: float = 0.0

    def __post_init__(self) -> None:
        _check_axis(np.asarray(self.wavelength), self.path)
        if self.line not in LINES:
            raise InputError("unknown line", where=self.path, found=self.line, expected=", ".join(LINES))
        if min(self.shape) < 1:
            raise InputError("the scan holds no pixels", where=self.path, found=f"{self.shape} (y, x)")
        if np.isnat(self.time):
            raise InputError("the scan has no time", where=self.path)
        if (self.begin is not None and not self.begin <= self.time) or (
            self.end is not None and not self.time <= self.end
        ):
            raise InputError(
                "the scan's mean time is not between its beginning and its end",
                where=self.path,
                found=f"{self.begin} to {self.end}, mean {self.time}",
                remedy="mend the times, or leave the file out",
            )
        numbers = (*self.frame.reference_pixel, *self.frame.reference_value, *self.frame.scale)
        if not np.all(np.isfinite(numbers)) or 0.0 in self.frame.scale:
            raise InputError(
                "the scan's pointing or pixel size is not a number",
                where=self.path,
                found=self.frame,
                expected="finite CRPIX, CRVAL and CDELT, and pixels of some size",
            )

    @property
    def as_filed(self) -> Scan:
        """The scan with no other wavelengths than the file's."""
        if self.present is None and self.drift == 0.0:
            return self
        present = range(len(self.wavelength)) if self.present is None else self.present
        wavelength = tuple(self.wavelength[index] + self.drift for index in present)
        return replace(self, wavelength=wavelength, present=None, drift=0.0)

    def without_drift(self, axis: Sequence[float], tolerance: float, largest: float) -> Scan:
        """The scan on an axis above which its wavelengths lie by one amount; itself if they do not.

        Parameters
        ----------
        axis : sequence of float
            Wavelengths in vacuum, Angstrom, increasing.
        tolerance : float
            Angstrom by which wavelengths may differ beside that; those that differ by no more have no drift.
        largest : float
            Angstrom of a drift at most.
        """
        if len(self.wavelength) != len(axis):
            return self
        above = np.subtract(self.wavelength, axis)
        drift = float(above.mean())
        if (
            np.abs(above).max() <= tolerance
            or abs(drift) > largest
            or np.abs(above - drift).max() > tolerance
        ):
            return self
        return replace(self, wavelength=tuple(axis), drift=drift)

    def on_axis(self, axis: Sequence[float], tolerance: float) -> Scan:
        """The scan on a longer axis, whose other wavelengths it lacks; itself if this is not a part of it.

        Parameters
        ----------
        axis : sequence of float
            Wavelengths in vacuum, Angstrom, increasing.
        tolerance : float
            Angstrom by which wavelengths may differ.
        """
        apart = np.abs(np.subtract.outer(self.wavelength, axis))
        if len(self.wavelength) >= len(axis) or apart.min(axis=1).max() > tolerance:
            return self
        present = tuple(int(index) for index in apart.argmin(axis=1))
        return replace(self, wavelength=tuple(axis), present=present)

    @property
    def window(self) -> LineWindow:
        """The scan's line, with its laboratory rest wavelength in vacuum."""
        return LINES[self.line]

    def changed(self, found: object) -> InputError:
        """Make the error of a file that no longer holds the scan that it held when it was described."""
        return InputError(
            "the file has changed since it was looked at",
            where=self.name,
            found=found,
            expected=f"{len(self.wavelength)} wavelengths, {self.shape} pixels (y, x)",
            remedy="run the command again",
        )

    @property
    def name(self) -> str:
        """What errors call it: the file, with the scan's number where the file may hold several."""
        return self.path if self.index == 0 else f"{self.path}, scan {self.index}"


def vacuum_axis(
    wavelength: NDArray[np.float64],
    stated: tuple[Medium, Stated] | None,
    medium: Medium | None,
    where: str,
) -> tuple[NDArray[np.float64], Medium, Stated]:
    """Bring a file's wavelength axis to vacuum, by what the file, its format or the caller says of it.

    The caller may say what a file leaves open, and may know better than the definition of a format; a file
    that says so itself is believed, and a caller who says otherwise is refused.

    Parameters
    ----------
    wavelength : ndarray
        As the file has it, Angstrom.
    stated : tuple, optional
        The medium, and whether the file or its format says so; None if neither does.
    medium : {"vacuum", "air"}, optional
        What the caller says.
    where : str
        The file, for the error.

    Returns
    -------
    wavelength : ndarray
        In vacuum, Angstrom.
    medium, stated_by : str
        As `Scan` has them.

    Raises
    ------
    InputError
        Nobody says what the wavelengths are measured in, or file and caller say different things.
    """
    _check_axis(wavelength, where)
    if medium is not None and stated is not None and stated[1] == "file" and stated[0] != medium:
        raise InputError(
            "the file says otherwise of its wavelengths than the caller",
            where=where,
            found=f"the file: wavelengths in {stated[0]}",
            expected=f"the caller: wavelengths in {medium}",
            remedy="leave --medium out, or mend the file's header",
        )
    if medium is not None:
        stated = stated if stated is not None and stated[0] == medium else (medium, "caller")
    if stated is None:
        raise InputError(
            "the file does not say whether its wavelengths are in air or in vacuum",
            where=where,
            found=f"{len(wavelength)} wavelengths, {wavelength[0]:.3f} to {wavelength[-1]:.3f} Angstrom",
            expected="a statement: at H-alpha the difference is 1.8 Angstrom, or 83 km/s",
            remedy="say --medium air or --medium vacuum",
        )
    return to_vacuum(wavelength, stated[0]), *stated


def _apart(places: ArrayLike, others: ArrayLike) -> NDArray[np.float64]:
    """Arcsec between helioprojective coordinates (longitude, latitude) that are near one another."""
    (longitude, latitude), (other, other_latitude) = np.asarray(places), np.asarray(others)
    turn = 360.0 * ARCSEC_PER_DEGREE
    along = (longitude - other + 0.5 * turn) % turn - 0.5 * turn
    across = along * np.cos(np.deg2rad(latitude / ARCSEC_PER_DEGREE))
    return np.asarray(np.hypot(across, latitude - other_latitude))


def cosine_of_pointing(pointing: tuple[ArrayLike, ArrayLike], time: np.datetime64) -> NDArray[np.float64]:
    """Cosine of the heliocentric angle, mu, of points on the disc as seen from the Earth.

    The line of sight that leaves the disc's centre by the angle rho meets the surface at the angle whose sine
    is D sin(rho) / R, where D is the Sun's distance at that time and R its radius.

    Parameters
    ----------
    pointing : tuple of array_like
        Helioprojective longitude and latitude, arcsec, of one shape.
    time : numpy.datetime64
        UTC.

    Returns
    -------
    ndarray
        Of that shape, between 0 and 1; NaN off the disc.
    """
    longitude, latitude = (np.deg2rad(np.asarray(angle) / ARCSEC_PER_DEGREE) for angle in pointing)
    away = 1.0 - (np.cos(latitude) * np.cos(longitude)) ** 2  # sin^2 of the elongation
    distance = float(get_sun(Time(time, scale="utc")).distance.to_value(u.m))
    squared = 1.0 - away * (distance / SOLAR_RADIUS) ** 2
    return np.asarray(np.sqrt(np.where(squared >= 0.0, squared, np.nan)))


def identify_line(wavelength: NDArray[np.float64], where: str) -> str:
    """Name of the line that a wavelength axis is centred on.

    Parameters
    ----------
    wavelength : ndarray
        In vacuum, Angstrom.
    where : str
        The file, for the error.

    Raises
    ------
    OtherLineError
        The axis belongs to neither H-alpha nor Ca II 8542.
    InputError
        It is no wavelength axis at all.
    """
    _check_axis(wavelength, where)
    centre = 0.5 * (float(wavelength[0]) + float(wavelength[-1]))
    for name, window in LINES.items():
        if abs(centre - window.rest_wavelength) <= NEAR:
            return name
    raise OtherLineError(
        "a scan of another line",
        where=where,
        found=f"wavelengths centred on {centre:.2f} Angstrom",
        expected=" or ".join(f"{window.rest_wavelength} ({name})" for name, window in LINES.items()),
        remedy="leave this file out",
    )


def _check_axis(axis: NDArray[np.float64], where: str) -> None:
    if axis.size < 2 or not np.all(np.isfinite(axis)) or not np.all(np.diff(axis) > 0.0):
        raise InputError(
            "the wavelength axis must hold two values or more, all finite, and increase",
            where=where,
            found=f"{axis.size} values, {np.array2string(axis, threshold=6, precision=3)}",
            remedy="fetch the file again, or leave it out",
        )
