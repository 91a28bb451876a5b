"""How `pipeline/data/quiet_sun.ecsv` was made: an atlas of the disc's centre, and how profiles darken.

    python -m tests.quiet_sun_table fts_disk_center_SI.idlsave pipeline/data/quiet_sun.ecsv

The first argument is the disc-centre intensity atlas of Neckel (1999) as the package ISPy-solar 0.2.3 (MIT
licence) carries it. The darkening is computed here, from the model atmosphere FAL-C, with Lightweaver.
"""

from __future__ import annotations

import sys

import numpy as np
from astropy.table import Table
from scipy.io import readsav

from inn.layout import CA8542, HALPHA
from pipeline.crisp.wavelengths import air_to_vacuum

OFFSETS = np.round(np.arange(-2.1, 2.101, 0.03), 2)
MU = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LIGHT = 299792.458  # km/s
GRAVITATIONAL_REDSHIFT = 0.633  # km/s, of sunlight at the Earth
NEAR_CONTINUUM = 60.0  # Angstrom from the lines


def darkening(mu=MU, offsets=OFFSETS, rays=5):
    """Of FAL-C, for each line: I(mu)/I(1) of its profile over that of the continuum, (offset, mu); the latter
    itself, (mu); the profile at the disc's centre over its continuum, (offset).
    """
    import lightweaver
    from lightweaver import fal, rh_atoms

    from pipeline.grids.lightweaver import _BACKGROUND, _lightweaver, rest_wavelengths

    _lightweaver()
    atmosphere = fal.Falc82()
    atmosphere.quadrature(rays)
    atoms = lightweaver.RadiativeSet(
        [
            rh_atoms.H_6_atom(),
            rh_atoms.CaII_atom(),
            *(getattr(rh_atoms, f"{name}_atom")() for name in _BACKGROUND),
        ]
    )
    atoms.set_active("H", "Ca")
    context = lightweaver.Context(
        atmosphere, atoms.compute_wavelength_grid(), atoms.compute_eq_pops(atmosphere), Nthreads=1
    )
    lightweaver.iterate_ctx_se(context, quiet=True)
    found = {}
    for line, rest in zip(("halpha", "ca8542"), rest_wavelengths(), strict=True):
        wavelength = rest + np.array([-NEAR_CONTINUUM, *offsets, NEAR_CONTINUUM])
        intensity = context.compute_rays(wavelength / 10.0, mus=np.array([*mu, 1.0]))
        relative = intensity[:, :-1] / intensity[:, -1:]
        continuum = 0.5 * (relative[0] + relative[-1])
        centre = intensity[1:-1, -1] / intensity[[0, -1], -1].mean()
        found[line] = relative[1:-1] / continuum, continuum, centre
    return found


def main(atlas, output):
    saved = readsav(atlas)
    wavelength, intensity, continuum = (
        saved[name].astype(float) for name in ("ftswav", "ftsint_si", "ftscnt_si")
    )
    near = (wavelength > 6500.0) & (wavelength < 8600.0)
    # As the spectrum would be without the Sun's gravity: laboratory wavelengths, but for the Sun's motions.
    own = air_to_vacuum(wavelength[near]) * (1.0 - GRAVITATIONAL_REDSHIFT / LIGHT)
    relative = intensity[near] / continuum[near]
    clv = darkening()
    parts, levels = [], {}
    for line in (HALPHA, CA8542):
        offset = own - line.rest_wavelength
        # The mean of a step's width, so that what lies between two points of the table is not lost.
        fine = np.linspace(-0.015, 0.015, 31)
        profile = np.interp(OFFSETS[:, None] + fine, offset, relative).mean(axis=1)
        level = np.interp(0.0, offset, continuum[near])  # W m-2 Hz-1 sr-1
        # c / lambda^2: 1 W m-2 = 1e3 erg s-1 cm-2; Hz per Angstrom.
        levels[line.name] = float(level * 1e3 * LIGHT * 1e13 / line.rest_wavelength**2)
        parts.append((line.name, profile, clv[line.name][0]))
    table = Table()
    table["line"] = np.repeat([name for name, *_ in parts], OFFSETS.size)
    table["offset"] = np.tile(OFFSETS, len(parts))
    table["intensity"] = np.round(np.concatenate([profile for _, profile, _ in parts]), 4)
    for number, mu in enumerate(MU[:-1]):
        table[f"darkening_{mu}"] = np.round(np.concatenate([ratio[:, number] for *_, ratio in parts]), 3)
    table["offset"].unit = "Angstrom"
    table.meta = {
        "offset": "from the laboratory's rest wavelength in vacuum (6564.61, 8544.44), gravitational "
        "redshift of 0.633 km/s taken off; the Sun's own motions are in it",
        "intensity": "per Angstrom, at the disc's centre, relative to the continuum there, mean over 0.03 "
        "Angstrom. Neckel 1999, doi:10.1023/A:1017165208013, as in ISPy-solar 0.2.3 (MIT licence)",
        "darkening": "I(mu)/I(1) in the line over I(mu)/I(1) in the continuum. FAL-C (Fontenla et al. 1993, "
        "doi:10.1086/172443), non-LTE hydrogen and Ca II, Lightweaver 0.17",
        "continuum": {name: float(f"{level:.4e}") for name, level in levels.items()},
        "continuum_unit": "erg s-1 cm-2 sr-1 Angstrom-1",
        "made_by": "tests/quiet_sun_table.py",
    }
    table.write(output, format="ascii.ecsv", overwrite=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
