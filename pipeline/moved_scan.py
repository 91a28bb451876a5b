"""One scan, opened, as it is in the frame of an observation: moved, with its flags and its wavelengths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.crisp import Cube, Scan, open_wavelength_shift
from pipeline.crisp.cube import PlacedCube
from pipeline.defects import (
    Survey,
    granulation_contrast,
    line_far_from_rest,
    survey,
    uncorrected_wavelengths,
)
from pipeline.pairing import Pair
from pipeline.registration import (
    STAYS,
    Image,
    Mask,
    Shift,
    field_of_view,
    find_shift,
    move_field,
    move_flags,
    move_values,
    read_block,
    resample,
)


@dataclass(frozen=True)
class MovedScan:
    """An opened scan in H-alpha's frame, and what it is moved by from there.

    Attributes
    ----------
    scan : Scan
        What it is.
    cube : Cube, shape (wavelength, y, x)
        Its intensities, placed by the headers in a frame of H-alpha's size.
    own_field : ndarray of bool, shape (y, x)
        Its field of view, before it is moved.
    found : Survey
        What is wrong with it, before it is moved.
    elsewhere : bool
        Whether all of its field lies outside of H-alpha's frame by the headers.
    corner : tuple of int
        Where its first pixel lies in H-alpha's frame by the headers, (y, x).
    move : Shift
        What it is moved by.
    """

    scan: Scan
    cube: Cube
    own_field: Mask
    found: Survey
    elsewhere: bool = False
    corner: tuple[int, int] = (0, 0)
    move: Shift = STAYS

    @classmethod
    def looked_through(cls, pair: Pair, line: str, cube: Cube) -> MovedScan:
        """A pair's scan of a line, given its opened intensities; it is not moved yet."""
        scan: Scan = getattr(pair, line)
        field = field_of_view(cube)
        somewhere = bool(field.any())
        corner = (0, 0)
        if line == "ca8542" and pair.placed:
            corner, shape = pair.placement, pair.halpha.shape
            cube = PlacedCube(cube, shape, corner)
            field = np.asarray(PlacedCube(field[None].astype(np.float32), shape, corner)[0] == 1.0)
        elsewhere = somewhere and not field.any()
        found = survey(cube, field, scan.saturation)
        if found.empty:
            field = np.zeros_like(field)
        return cls(scan, cube, field, found, elsewhere, corner)

    @property
    def empty(self) -> bool:
        """Whether it holds no intensities."""
        return self.found.empty and not self.elsewhere

    def moved(self, move: Shift) -> MovedScan:
        """The same scan, moved by something else."""
        return replace(self, move=move)

    def displacement(self, halpha: MovedScan) -> Shift:
        """By how much the scan, as it is placed, has to be moved to lie on one of H-alpha."""
        if not (self.own_field & halpha.own_field).any():
            return STAYS
        return find_shift(
            halpha.cube,
            self.cube,
            (halpha.scan.wavelength, self.scan.wavelength),
            (halpha.scan.window.rest_wavelength, self.scan.window.rest_wavelength),
            (halpha.own_field, self.own_field),
        )

    @property
    def stays(self) -> bool:
        """Whether it is not moved."""
        return self.move.still

    @cached_property
    def field(self) -> Mask:
        """Its field of view (y, x)."""
        return self.own_field if self.stays else move_field(self.own_field, self.move)

    @property
    def defects(self) -> NDArray[np.uint8]:
        """Bits of `pipeline.defects.Defect` (y, x)."""
        return move_flags(self.found.defects, self.move)

    @property
    def contrast(self) -> float | None:
        """Contrast of its granulation; None where there is none: a journal holds no NaN."""
        value = granulation_contrast(
            self.cube, self.scan.wavelength, self.scan.window.rest_wavelength, self.own_field
        )
        return value if np.isfinite(value) else None

    @property
    def sentences(self) -> list[str]:
        """What is wrong with it, in words."""
        if self.elsewhere:
            return []
        offset = np.subtract(self.scan.wavelength, self.scan.window.rest_wavelength)
        sentences = [
            *self.found.sentences(offset),
            *line_far_from_rest(self.found.profile, self.scan),
            *uncorrected_wavelengths(self._own_shift(), self.own_field),
        ]
        return [f"{self.scan.name}: {sentence}" for sentence in sentences]

    def block(self, rows: slice, columns: slice) -> Image:
        """One block of its intensities (rows, columns, wavelength); NaN outside of its field."""
        if self.stays:
            return read_block(self.cube, self.own_field, rows, columns)
        saturation, spoilt = self.scan.saturation, self.found.spoilt
        return resample(self.cube, self.own_field, self.move, rows, columns, saturation, spoilt)

    def wavelength_shift(self) -> NDArray[np.float64]:
        """What is added to its wavelengths at each pixel (y, x), Angstrom; NaN outside of its field."""
        shift = self._own_shift()
        values = np.where(self.own_field, 0.0 if shift is None else shift, np.nan)
        return values if self.stays else move_values(values, self.move)

    def _own_shift(self) -> NDArray[np.float64] | None:
        """The same before it is moved, in the field and outside; None where all pixels have the axis' own."""
        shift = open_wavelength_shift(self.scan)
        if shift is not None and (self.corner != (0, 0) or shift.shape != self.own_field.shape):
            placed = PlacedCube(shift[None], self.own_field.shape, self.corner)
            shift = placed[0].astype(np.float64)
        return shift
