"""FITS files as readers open them: damage becomes an error that names the file, intensities stay on disk."""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from threading import RLock
from typing import Any

import astropy.units as u
import numpy as np
from astropy.io import fits
from astropy.io.fits.verify import VerifyError
from astropy.time import ScaleValueError, Time
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WcsError
from numpy.typing import NDArray

from pipeline.crisp.scan import OtherKindError
from pipeline.crisp.signatures import beginning
from pipeline.errors import InputError

SUFFIXES = (".fits", ".fit", ".fts")
SIGNATURE = b"SIMPLE  ="
BLOCK = 2880
EXACT = 2.0**53
"""Up to here double precision has all integers."""

YEARS = (1800, 2150)
"""Times within a century of these fit 64 bits of nanoseconds."""
DATE = re.compile(r"[+-]?\d+[-./]\d{1,2}[-./]\d{1,2}")
TIME_OF_DAY = re.compile(r"\d{1,2}:\d{2}(:\d{2}(\.\d*)?)?")

FETCH_AGAIN = "fetch the file again, or leave it out"
MEND_CARD = "mend the card, or leave the file out"

_FILTERS = RLock()  # what warnings are ignored is the process's matter, not a thread's

# astropy reports damage with whichever of these the damaged card or tile leads to
DAMAGE = (
    OSError, VerifyError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    ArithmeticError, MemoryError, RuntimeError, AssertionError, EOFError, struct.error, zlib.error,
)  # fmt: skip


@contextmanager
def damage(file: str | Path, of: tuple[type[Exception], ...] = DAMAGE) -> Iterator[None]:
    """Make errors that name a FITS file of those that astropy raises where it is damaged.

    Parameters
    ----------
    file : str or Path
        The file.
    of : tuple of type
        The errors that mean damage.

    Raises
    ------
    InputError
        The file is damaged.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as failure:
        # That of the library that unpacks tiles has no public name.
        if not isinstance(failure, of) and type(failure).__name__ != "CfitsioException":
            raise
        if isinstance(failure, WcsError):
            raise InputError(
                "the header's coordinates cannot be read",
                where=file,
                found=wcs_fault(failure),
                expected="angles on the sky of pixels of some size, on axes of their own",
                remedy="mend CRVAL, CDELT, CUNIT and PC, or what they refer to; or leave the file out",
            ) from failure
        raise InputError(
            "a damaged FITS file",
            where=file,
            found=f"{type(failure).__name__}: {failure}",
            remedy=FETCH_AGAIN,
        ) from failure


@contextmanager
def opened(path: str | Path) -> Iterator[fits.HDUList]:
    """Open a FITS file; its numbers are mapped as they are stored, and stay mapped once it is closed.

    Integers are not scaled: see `scaling`.

    Parameters
    ----------
    path : str or Path
        The file; its name says nothing.

    Yields
    ------
    astropy.io.fits.HDUList

    Raises
    ------
    OtherKindError
        The file is not FITS.
    InputError
        It cannot be read, is damaged or truncated; errors of astropy's inside the context become this, too.
    """
    file = Path(path)
    start = beginning(file)[: len(SIGNATURE)]
    if start != SIGNATURE:
        raise OtherKindError(
            "not a FITS file",
            where=file,
            found=f"it begins with {start!r}" if start else "an empty file",
            expected=f"{SIGNATURE!r}",
            remedy="unpack it first" if start.startswith(b"\x1f\x8b") else "leave this file out",
        )
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)  # what astropy warns of is an error or harmless here
        with damage(file), fits.open(file, memmap=True, do_not_scale_image_data=True) as hdus:
            _check_length(hdus, file)
            yield hdus


def wcs_fault(failure: Exception) -> str:
    """What is wrong with coordinates, in a line: wcslib says where in its own code it found that, too.

    Parameters
    ----------
    failure : Exception
        As astropy raised it.
    """
    lines = str(failure).strip().splitlines()
    return next((line for line in lines if not line.startswith("ERROR")), " ".join(lines)).rstrip(".")


def _check_length(hdus: fits.HDUList, file: Path) -> None:
    # astropy maps a truncated file without complaint, and the process dies when it touches the missing part.
    needed = 0
    for index in range(len(hdus)):
        place, hdu = hdus.fileinfo(index), hdus[index]
        # Of a compressed image the size is that of its numbers, not of the bytes in the file.
        size = place["datSpan"] if isinstance(hdu, fits.CompImageHDU) else hdu.size
        if isinstance(hdu, fits.CompImageHDU):
            _check_tiles(hdu, file)
        needed = max(needed, place["datLoc"] + size)
    present = file.stat().st_size
    if present < needed:
        raise InputError(
            "the file is truncated",
            where=file,
            found=f"{present} bytes",
            expected=f"{needed} bytes or more",
            remedy=FETCH_AGAIN,
        )
    # A header that is cut or cannot be read ends the list of HDUs, also without complaint.
    with file.open("rb") as stream:
        stream.seek(-(-needed // BLOCK) * BLOCK)
        rest = stream.read(BLOCK)
    if rest.strip(b"\0 "):
        raise InputError(
            "an HDU of the file is truncated or damaged",
            where=file,
            found=f"{present} bytes, of which {len(hdus)} HDUs take {needed}",
            expected="nothing after the last HDU",
            remedy=FETCH_AGAIN,
        )


def _check_tiles(hdu: fits.CompImageHDU, file: Path) -> None:
    """See to it that a compressed image has a row of its table for each tile: all of them take memory."""
    tiles = prod(-(-size // tile) for size, tile in zip(hdu.shape, hdu.tile_shape, strict=True))
    rows = len(hdu.compressed_data)
    if tiles != rows:
        raise InputError(
            "a compressed image is damaged",
            where=file,
            found=f"{rows} tiles in {hdu.name or 'an HDU'}",
            expected=f"{tiles}: {hdu.shape} pixels, {hdu.tile_shape} each",
            remedy=FETCH_AGAIN,
        )


def read_headers(path: str | Path) -> tuple[str, ...]:
    """Every HDU's header, whole, one card a line.

    ``astropy.io.fits.Header.fromstring(text, sep="\\n")`` reads one back.

    Parameters
    ----------
    path : str or Path
        The file.

    Raises
    ------
    InputError
        It cannot be read.
    """
    with opened(path) as hdus:
        return tuple(_text(hdu.header) for hdu in hdus)


def _text(header: fits.Header) -> str:
    text = str(header.tostring(sep="\n", endcard=False, padding=False))
    return "\n".join(card.rstrip() for card in text.split("\n"))


def find_hdu(hdus: fits.HDUList, hdu: str | int | None, where: object) -> Any:  # noqa: ANN401
    """An HDU by its name or number; the first that holds anything if neither is said.

    Parameters
    ----------
    hdus : astropy.io.fits.HDUList
        The file's.
    hdu : str or int, optional
        ``EXTNAME``, in any case, or number from 0.
    where : object
        The file, for the error.

    Raises
    ------
    InputError
        There is none.
    """
    for number, candidate in enumerate(hdus):
        if hdu is None:
            matches = candidate.size > 0
        else:
            matches = candidate.name.lower() == hdu.lower() if isinstance(hdu, str) else number == hdu
        if matches:
            return candidate
    raise InputError(
        "no such HDU",
        where=where,
        found=", ".join(f"{number} {found.name!r}" for number, found in enumerate(hdus)),
        expected="an HDU that holds numbers" if hdu is None else repr(hdu),
        remedy="mend the description",
    )


def number(header: fits.Header, card: str, where: object, default: float | None = None) -> float:
    """The number that a card states.

    Parameters
    ----------
    header : astropy.io.fits.Header
        The header.
    card : str
        The card's name.
    where : object
        The file, for the error.
    default : float, optional
        Where there is no such card.

    Raises
    ------
    InputError
        The card states no number, or there is none and no `default`.
    """
    try:
        value = header.get(card, default)
    except VerifyError:
        value = "what FITS cannot read"
    if isinstance(value, bool) or not isinstance(value, int | float):
        found = f"no value of {card}" if value is None else f"{card} = {value!r}"
        raise _not_a("number", card, found, where)
    return float(value)


def whole_number(header: fits.Header, card: str, where: object, default: int | None = None) -> int:
    """The whole number that a card states; see `number`."""
    value = number(header, card, where, default)
    if not value.is_integer():
        raise _not_a("whole number", card, f"{card} = {value}", where)
    return int(value)


def check_sky(header: fits.Header, axes: Sequence[int], where: object) -> None:
    """Refuse coordinates whose cards state no numbers: wcslib passes over these, and takes 0 or 1 instead.

    Parameters
    ----------
    header : astropy.io.fits.Header
        The header.
    axes : sequence of int
        Numbers of the axes, as FITS counts them.
    where : object
        The file, for the error.

    Raises
    ------
    InputError
        A card states none, such as a text.
    """
    cards = [f"{name}{axis}" for name in ("CRPIX", "CRVAL", "CDELT", "CROTA") for axis in axes]
    cards += [f"{matrix}{one}_{two}" for matrix in ("PC", "CD") for one in axes for two in axes]
    for card in cards:
        if card in header:
            number(header, card, where)


def _not_a(kind: str, card: str, found: str, where: object) -> InputError:
    return InputError(
        f"a card of the header states no {kind}",
        where=where,
        found=found,
        expected=f"{card} = a {kind}",
        remedy=MEND_CARD,
    )


def scaling(header: fits.Header, where: object) -> tuple[float, float, int | None]:
    """``BSCALE``, ``BZERO`` and ``BLANK`` (None where there is none, as in files of floats).

    Parameters
    ----------
    header : astropy.io.fits.Header
        The HDU's.
    where : object
        The file, for the error.

    Raises
    ------
    InputError
        One of them is no number, or takes the last digits from integers of 64 bits.
    """
    blank = whole_number(header, "BLANK", where) if header["BITPIX"] > 0 and "BLANK" in header else None
    step, zero = number(header, "BSCALE", where, 1.0), number(header, "BZERO", where, 0.0)
    if header["BITPIX"] == 64 and abs(zero) > EXACT * abs(step):
        raise InputError(
            "integers of 64 bits with an offset that double precision cannot undo",
            where=where,
            found=f"BITPIX = 64, BZERO = {header['BZERO']}: unsigned integers"
            if zero == 2.0**63
            else f"BITPIX = 64, BSCALE = {step:g}, BZERO = {zero:g}",
            expected="integers of 32 bits or fewer, signed ones, or floats",
            remedy="write the array again as one of these",
        )
    return step, zero, blank


def unit_factor(text: str, wanted: u.UnitBase, card: str, where: object) -> float:
    """What a coordinate is multiplied by to be in the unit wanted.

    Parameters
    ----------
    text : str
        Its unit.
    wanted : astropy.units.UnitBase
        The one that it should have.
    card : str
        What states it, for the error.
    where : object
        The file, for the error.

    Raises
    ------
    InputError
        It is no unit, or of another kind.
    """
    try:
        return float(u.Unit(text).to(wanted))
    except (ValueError, TypeError) as failure:
        raise InputError(
            "the unit of a coordinate is not known",
            where=where,
            found=f"{card} = {text!r}",
            expected=f"a unit such as {wanted}",
            remedy="mend the header",
        ) from failure


def coordinates(hdu: Any, default: str, wanted: u.UnitBase, where: object) -> NDArray[np.float64]:  # noqa: ANN401
    """Numbers of an image along an axis, unscaled and in a unit; NaN where the file has ``BLANK``.

    Parameters
    ----------
    hdu : astropy.io.fits.ImageHDU
        The HDU; ``BUNIT``, or ``CUNIT1``, says the unit of its numbers.
    default : str
        The unit where it does not.
    wanted : astropy.units.UnitBase
        The one that they should have.
    where : object
        The file, for the error.

    Raises
    ------
    InputError
        Scaling or unit make no sense.
    """
    step, zero, blank = scaling(hdu.header, where)
    stored = np.asarray(hdu.data)
    values = step * stored.astype(np.float64) + zero
    card = next((card for card in ("BUNIT", "CUNIT1") if str(hdu.header.get(card) or "").strip()), None)
    unit = default if card is None else str(hdu.header[card]).strip()
    values *= unit_factor(unit, wanted, f"{hdu.name}: {card}", where)
    return values if blank is None else np.where(stored == blank, np.nan, values)


def saturation(header: fits.Header, where: object) -> float:
    """Largest number that an HDU's integers can be: the detector's limit; infinite where there is none.

    Integers that are scaled by another step than one span what the HDU holds: their largest is no limit of
    the detector.

    Parameters
    ----------
    header : astropy.io.fits.Header
        The HDU's.
    where : object
        The file, for the error.

    Raises
    ------
    InputError
        The scaling is no number.
    """
    step, zero, _ = scaling(header, where)
    bits = header["BITPIX"]
    if bits < 0 or step != 1.0:
        return float("inf")
    return zero + (2.0 ** (bits - 1) - 1.0 if bits > 8 else 255.0)


def utc(text: str, scale: str, where: object, card: str) -> np.datetime64:
    """A moment that a header states, in UTC, to the nanosecond; of a date alone, its midnight.

    Parameters
    ----------
    text : str
        Date and time as FITS writes them.
    scale : str
        The time scale (``TIMESYS``).
    where : object
        The file, for the error.
    card : str
        What states it, for the error.

    Raises
    ------
    InputError
        It is no time, of another age, or the scale is not known.
    """
    written = re.sub(r"T(\d:)", r"T0\1", text.strip().removesuffix("Z"))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ERFA function")  # of years far from ours
            moment = Time(written, format="fits", scale=scale.strip().lower()).utc
            year = int(moment.ymdhms["year"])
            if not YEARS[0] <= year < YEARS[1]:
                raise ValueError(f"the year {year}")
            return np.datetime64(moment.datetime64, "ns")
    except (ValueError, ScaleValueError) as failure:
        raise InputError(
            "the scan's time cannot be read",
            where=where,
            found=f"{card} = {text!r}, time scale {scale.upper()}",
            expected=f"a date and time such as 2014-09-06T16:55:57.057, UTC, from {YEARS[0]} to {YEARS[1]}",
            remedy=MEND_CARD,
        ) from failure


def dated(header: fits.Header, card: str) -> str:
    """What a card says of a moment: date and time, or a date with what its twin says of the time of day.

    Old headers have ``DATE-OBS = '2014-09-06'`` beside ``TIME-OBS = '16:55:57.057'``.

    Parameters
    ----------
    header : astropy.io.fits.Header
        The header.
    card : str
        The card's name.

    Returns
    -------
    str
        Empty if there is no such card.
    """
    text = str(header.get(card) or "").strip()
    twin = str(header.get(card.replace("DATE", "TIME", 1)) or "").strip() if "DATE" in card else ""
    return f"{text}T{twin}" if DATE.fullmatch(text) and TIME_OF_DAY.fullmatch(twin) else text


def moment(header: fits.Header, card: str, scale: str, where: object) -> np.datetime64:
    """The moment that a card states, which a date alone is not, in UTC.

    Parameters
    ----------
    header : astropy.io.fits.Header
        The header.
    card : str
        The card's name.
    scale : str
        The time scale (``TIMESYS``).
    where : object
        The file, for the error.

    Raises
    ------
    InputError
        It states none, or a date without a time of day (see `dated`).
    """
    text = dated(header, card)
    found = utc(text, scale, where, card)
    if DATE.fullmatch(text):
        twin = card.replace("DATE", "TIME", 1)
        raise InputError(
            "a date without a time of day",
            where=where,
            found=f"{card} = {text!r}" + (f", and no time of day in {twin}" if twin != card else ""),
            expected="a date and time such as 2014-09-06T16:55:57.057",
            remedy=MEND_CARD,
        )
    return found
