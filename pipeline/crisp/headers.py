"""In what the headers of scans contradict themselves, or the scans that were read from them.

Of files that a description describes, `pipeline.crisp.contradictions` knows: those are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import astropy.units as u
import numpy as np
from astropy.io import fits

from pipeline.crisp import crispy, fits_files
from pipeline.crisp.scan import Scan
from pipeline.crisp.wavelengths import vacuum_to_air
from pipeline.errors import InputError

FITS_FORMATS = ("fchroma", "sstred")
LINE_NUMBERS = {"halpha": "6563", "ca8542": "8542"}
LINE_NAMES = {
    "halpha": re.compile(r"(?<!\d)656[2-4]|h[-_ ]?alpha", re.IGNORECASE),
    "ca8542": re.compile(r"(?<!\d)854[2-4]"),
}
"""What texts call the lines: by the wavelength in Angstrom or, without its point, in nm; in air or vacuum."""
TURNED = 0.5  # degrees: what two statements about a frame's rotation may differ by
MEDIUM_CARDS = ("WAVEREF", "AIRORVAC")
"""What says whether wavelengths are in air: SOLARNET's card, and one of DESI's spectra and others'."""
MEDIUM_OF_REFERENCE = {"vacuum": "vacuum", "vac": "vacuum", "air": "air"}
"""What these say."""
OFF = 0.05  # Angstrom: what two statements about wavelengths may differ by
NAMED = 1.0  # Angstrom: what a line's name, a whole number, may lie outside of its wavelengths
FILTER = 10.0  # Angstrom: what a prefilter's wavelength may differ from that of the line
NANOMETRES = 2000.0  # a wavelength of less, whose unit is not said, is in nm
A_SECOND = np.timedelta64(1, "s")
A_DAY = np.timedelta64(1, "D")
EARLIER = ("POINT_ID", "STARTOBS", "DATE-OBS", "DATE_OBS", "DATE-BEG")
"""Cards that say when the scan, or the series that it belongs to, began."""
LATER = ("ENDOBS", "DATE-END")
"""Those that say when it ended."""


def header_contradictions(scan: Scan) -> tuple[str, ...]:
    """In what a scan's header contradicts itself or the scan's wavelengths and times, a sentence each.

    What decides (the wavelength axis, the scan's own time) is believed; a contradiction says: somebody has
    to look.

    Parameters
    ----------
    scan : Scan
        The scan; of a format without headers nothing is said.

    Returns
    -------
    tuple of str

    Raises
    ------
    InputError
        The header cannot be read, or a card that has to be a number is none.
    """
    if scan.format == crispy.FORMAT:
        return tuple(_about_element(json.loads(crispy.read_headers(scan.path)[0]), scan))
    if scan.format not in FITS_FORMATS:
        return ()
    scan = scan.as_filed
    with fits_files.opened(scan.path) as hdus:
        header = hdus[0].header
        return (*_about_lines(header, scan), *_about_pointing(header, scan), *_about_times(header, scan))


def other_line(text: str, line: str) -> str | None:
    """The number of a line that a text names, such as 8542, if it is not the scan's own; None if it is none.

    Parameters
    ----------
    text : str
        Such as ``"Ca_II_8542"``, ``"Ca II (854.21 nm)"`` or ``"H-alpha"``.
    line : str
        The scan's line, a key of `LINE_NUMBERS`.
    """
    text = re.sub(r"(?<=\d)\.(?=\d)", "", text)
    if LINE_NAMES[line].search(text):
        return None
    return next((LINE_NUMBERS[other] for other, name in LINE_NAMES.items() if name.search(text)), None)


def wavelength_stated(header: fits.Header, number: float, where: object) -> float:
    """What ``WAVELNTH`` says, in Angstrom.

    Parameters
    ----------
    header : astropy.io.fits.Header
        The header: ``WAVEUNIT``, a unit or a power of ten of metres; where it is not there, the magnitude
        says it.
    number : float
        The card's number.
    where : object
        The file, for the error.

    Raises
    ------
    InputError
        The unit is neither.
    """
    unit = header.get("WAVEUNIT")
    if isinstance(unit, str):
        return number * _angstrom(unit)
    exponent = fits_files.number(header, "WAVEUNIT", where, -9 if number < NANOMETRES else -10)
    return float(number * 10.0 ** min(exponent + 10.0, 10.0))


def _about_element(header: dict[str, object], scan: Scan) -> Iterator[str]:
    """What crispy calls the line, if it is another than the wavelengths are of."""
    element = str(header.get("element", ""))
    if other := other_line(element, scan.line):
        yield f"element = {element!r} names {other}, the wavelengths are around {LINE_NUMBERS[scan.line]}"


def _about_lines(header: fits.Header, scan: Scan) -> Iterator[str]:
    """Cards that say another line or other wavelengths than the scan has."""
    own = LINE_NUMBERS[scan.line]
    lines = fits_files.whole_number(header, "NWIN", scan.path, 1)
    # A file of several lines has a set of cards for each, and one of all others for all.
    place = 1 if lines <= 1 else 1 + scan.index % lines
    names = (f"WDESC{place}", *(("EXTNAME", "FILTER1", "WAVEBAND") if lines <= 1 else ()))
    for name in names:
        text = str(header.get(name, ""))
        if other := other_line(text, scan.line):
            yield f"{name} = {text.strip()!r} names {other}, the wavelengths are around {own}"
    axis = vacuum_to_air(scan.wavelength) if scan.medium == "air" else np.asarray(scan.wavelength)
    if lines <= 1 and "WAVELNTH" in header:
        try:
            value = float(header["WAVELNTH"])  # some write it as text
        except (TypeError, ValueError):
            value = fits_files.number(header, "WAVELNTH", scan.path)
        if not abs(wavelength_stated(header, value, scan.path) - axis.mean()) < FILTER:
            yield f"WAVELNTH = {header['WAVELNTH']}, the wavelengths are around {own}"
    for card in MEDIUM_CARDS:
        reference = str(header.get(card, "")).strip()
        if MEDIUM_OF_REFERENCE.get(reference.lower(), scan.medium) != scan.medium:
            yield f"{card} = {reference!r}, the wavelengths are taken to be in {scan.medium}"
    if lines <= 1 and "WWIDTH1" in header:
        width = fits_files.whole_number(header, "WWIDTH1", scan.path)
        if width != axis.size:
            yield f"WWIDTH1 = {width}, but there are {axis.size} wavelengths"
    if scan.format != "fchroma":
        return
    unit = str(header.get("CUNIT3", "")).strip() or "Angstrom"
    angstrom = _angstrom(unit)
    if not angstrom > 0.0:
        yield f"CUNIT3 = {unit!r} is no unit of wavelength"
        return
    if f"TWAVE{place}" in header:
        target = fits_files.number(header, f"TWAVE{place}", scan.path)
        # In Angstrom by its definition, or in the axis' unit. A whole number may be the line's name.
        off = NAMED if target == round(target) else OFF
        if not any(axis[0] - off <= target * step <= axis[-1] + off for step in (1.0, angstrom)):
            yield f"TWAVE{place} = {target}, outside of the wavelengths"
    if lines <= 1 and {"CRVAL3", "CRPIX3"} <= set(header) and {"CDELT3", "CD3_3"} & set(header):
        per_pixel = "CD3_3" if "CD3_3" in header else "CDELT3"
        value, pixel, step = (
            fits_files.number(header, card, scan.path) for card in ("CRVAL3", "CRPIX3", per_pixel)
        )
        steps = np.arange(axis.size) + 1 - pixel
        away = np.abs((value + steps * step) * angstrom - axis)
        # Of an axis that is not uniform these cards can be right at the reference pixel alone.
        uniform = np.ptp(np.diff(axis)) <= OFF
        if not (off := float(away.max() if uniform else away[np.abs(steps).argmin()])) <= OFF:
            yield f"CRVAL3 and {per_pixel} are up to {off:.2f} Angstrom off the wavelengths"


def _about_pointing(header: fits.Header, scan: Scan) -> Iterator[str]:
    """A rotation that is stated twice: where there is a matrix, ``CROTA2`` decides nothing."""
    if scan.format != "fchroma" or "CROTA2" not in header:
        return
    stated = fits_files.number(header, "CROTA2", scan.path)
    # By FITS' definition y points along (-sin, cos) of it.
    along_x, along_y = np.sign(scan.frame.scale[1]) * scan.frame.matrix[:, 1]
    turned = float(np.degrees(np.arctan2(-along_x, along_y)))
    if not abs((stated - turned + 180.0) % 360.0 - 180.0) <= TURNED:
        yield f"CROTA2 = {stated:g}, but the frame's matrix turns it by {round(turned, 1) + 0.0:g} degrees"


def _about_times(header: fits.Header, scan: Scan) -> Iterator[str]:
    """Times that cannot be those of the scan, or of a series that it belongs to."""
    scale = str(header.get("TIMESYS", "")).strip() or "UTC"
    begin = scan.time if scan.begin is None else scan.begin
    end = scan.time if scan.end is None else scan.end
    moments: dict[str, np.datetime64] = {}
    for name in (*EARLIER, "DATE-AVG", *LATER):
        if text := fits_files.dated(header, name):
            try:
                moment = fits_files.utc(text, scale, scan.path, name)
                # A date alone is a day.
                moments[name] = moment + A_DAY if name in LATER and "T" not in text else moment
            except InputError:
                if name.startswith("DATE"):
                    yield f"{name} = {text!r}, time scale {scale}, is no date and time"
    for name, moment in moments.items():
        stated = f"{name} = {header[name]}"
        if name in EARLIER and moment > begin + A_SECOND:
            yield f"{stated} is after the scan"
        elif name in LATER and moment + A_SECOND < end:
            yield f"{stated} is before the scan"
        elif abs(moment - scan.time) > A_DAY:
            yield f"{stated} is more than a day from the scan"
    average = moments.get("DATE-AVG", scan.time)
    # Of a file of several scans it is not the time of any.
    if average != scan.time and (
        moments.get("DATE-BEG", average) > average + A_SECOND
        or moments.get("DATE-END", average) + A_SECOND < average
    ):
        yield f"DATE-AVG = {header['DATE-AVG']} is not between DATE-BEG and DATE-END"


def _angstrom(unit: str) -> float:
    """What a unit of wavelength is in Angstrom; NaN if it is none."""
    try:
        return float(u.Unit(unit).to(u.Angstrom))
    except (ValueError, TypeError):
        return float("nan")
