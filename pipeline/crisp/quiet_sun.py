"""The quiet Sun as the package has it (``pipeline/data/quiet_sun.ecsv``): an atlas, and how bright it is."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from astropy.table import Table

from pipeline.crisp.cube import PER_ANGSTROM


@cache
def table() -> Table:
    """Profiles of the lines at the disc's centre and how they darken; its `meta` says which and whose."""
    return Table.read(Path(__file__).parents[1] / "data" / "quiet_sun.ecsv", format="ascii.ecsv")


def continuum(line: str) -> float:
    """Intensity of the continuum near a line at the disc's centre, `pipeline.crisp.cube.PER_ANGSTROM`.

    Parameters
    ----------
    line : str
        ``"halpha"`` or ``"ca8542"``.
    """
    assert table().meta["continuum_unit"] == PER_ANGSTROM
    return float(table().meta["continuum"][line])
