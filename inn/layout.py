"""What a network's vectors hold: the heights of its atmosphere and the windows of its spectral lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inn.errors import ModelError

QUANTITIES: tuple[str, str, str] = ("electron_density", "temperature", "velocity")
"""The quantities of an atmosphere, in the order in which its vectors hold them."""


def _published_heights() -> NDArray[np.float64]:
    linear = np.linspace(-0.065, 3.5, 45)
    exponential = np.logspace(np.log10(3.5), np.log10(10.5), 6)[1:]
    heights: NDArray[np.float64] = np.concatenate([linear, exponential])
    heights.setflags(write=False)
    return heights


HEIGHTS: NDArray[np.float64] = _published_heights()
"""The published network's heights, shape (50,), in Mm: 45 evenly spaced points from -0.065 to 3.5, then 5
exponentially spaced to 10.5 (Osborne, Armstrong & Fletcher 2019, section 3.1, doi:10.3847/1538-4357/ab07b4,
with the numbers of its public code)."""


@dataclass(frozen=True)
class LineWindow:
    """The evenly spaced wavelengths at which a network takes one spectral line.

    Parameters
    ----------
    name : str
        The line's name in stores and vectors: ``"halpha"``, ``"ca8542"``.
    rest_wavelength : float
        Laboratory rest wavelength in vacuum, in Angstrom.
    half_width : float
        Distance from the rest wavelength to either end of the window, in Angstrom.
    points : int
        Number of wavelengths, both ends included.
    """

    name: str
    rest_wavelength: float
    half_width: float
    points: int

    def __post_init__(self) -> None:
        if self.points < 2 or not self.half_width > 0.0 or not self.rest_wavelength > 0.0:
            raise ModelError(
                "a line window needs two points or more and positive wavelengths",
                where=self.name,
                found=f"{self.points} points, rest {self.rest_wavelength}, half width {self.half_width}",
            )

    @property
    def offsets(self) -> NDArray[np.float64]:
        """Wavelengths as offsets from rest, shape (points,), in Angstrom, ascending."""
        return np.linspace(-self.half_width, self.half_width, self.points)

    @property
    def wavelengths(self) -> NDArray[np.float64]:
        """Vacuum wavelengths, shape (points,), in Angstrom, ascending."""
        return self.rest_wavelength + self.offsets


HALPHA = LineWindow("halpha", 6564.61, 1.4, 30)
"""The published window of H-alpha."""

CA8542 = LineWindow("ca8542", 8544.44, 1.0, 30)
"""The published window of Ca II 8542."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The meaning of every number in a network's atmosphere and line vectors.

    An atmosphere vector holds the electron density, the temperature and the velocity, each at all heights, in
    network units (`inn.scaling`). A lines vector holds the windows one after the other, divided by their
    joint maximum.

    Parameters
    ----------
    heights : array_like
        Shape (heights,), in Mm, strictly ascending. The published ones if left out.
    lines : tuple of LineWindow
        The windows, in order. The published H-alpha and Ca II 8542 if left out.

    Attributes
    ----------
    atmosphere_size : int
        Length of an atmosphere vector: three quantities at every height (150).
    """

    heights: NDArray[np.float64]
    lines: tuple[LineWindow, ...]
    atmosphere_size: int  # kept, for torch's compiler cannot ask an array for its size

    def __init__(
        self, heights: ArrayLike = HEIGHTS, lines: tuple[LineWindow, ...] = (HALPHA, CA8542)
    ) -> None:
        array = np.array(heights, dtype=np.float64)
        if array.ndim != 1 or array.size < 2 or not np.all(np.diff(array) > 0.0):
            raise ModelError(
                "a layout's heights must ascend strictly",
                found=f"shape {array.shape}: {array}",
                expected="a one-dimensional array of heights in Mm",
            )
        array.setflags(write=False)
        object.__setattr__(self, "heights", array)
        object.__setattr__(self, "lines", tuple(lines))
        object.__setattr__(self, "atmosphere_size", len(QUANTITIES) * array.size)

    @property
    def lines_size(self) -> int:
        """Length of a lines vector: the points of all windows (60)."""
        return sum(line.points for line in self.lines)

    def atmosphere_slice(self, quantity: str) -> slice:
        """Where an atmosphere vector holds a quantity, one of `QUANTITIES`."""
        start = QUANTITIES.index(quantity) * self.heights.size
        return slice(start, start + self.heights.size)

    def line_slice(self, name: str) -> slice:
        """Where a lines vector holds the line of this name."""
        start = 0
        for line in self.lines:
            if line.name == name:
                return slice(start, start + line.points)
            start += line.points
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """Return the layout as JSON holds it; `from_json` reads it back without loss."""
        return {
            "heights": {"units": "Mm", "values": self.heights.tolist()},
            "lines": [
                {
                    "name": line.name,
                    "rest_wavelength": line.rest_wavelength,
                    "half_width": line.half_width,
                    "points": line.points,
                    "units": "Angstrom",
                    "medium": "vacuum",
                }
                for line in self.lines
            ],
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Layout:
        """Rebuild a layout from `to_json`'s mapping.

        Raises
        ------
        ModelError
            If an entry is missing or is not what it should be.
        """
        try:
            return cls(
                stored["heights"]["values"],
                tuple(
                    LineWindow(
                        str(line["name"]),
                        float(line["rest_wavelength"]),
                        float(line["half_width"]),
                        int(line["points"]),
                    )
                    for line in stored["lines"]
                ),
            )
        except (KeyError, TypeError, ValueError) as failure:
            raise ModelError(
                "the layout is not readable",
                found=f"{type(failure).__name__}: {failure}",
                expected="heights in Mm and line windows in Angstrom, as `Layout.to_json` writes them",
            ) from failure

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        return self.lines == other.lines and np.array_equal(self.heights, other.heights)

    def __hash__(self) -> int:
        return hash((self.heights.tobytes(), self.lines))

    def __repr__(self) -> str:
        windows = ", ".join(f"{line.name} {line.points}" for line in self.lines)
        span = f"{self.heights[0]:g} to {self.heights[-1]:g} Mm"
        return f"Layout({self.heights.size} heights from {span}; {windows})"
