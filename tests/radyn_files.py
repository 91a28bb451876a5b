"""CDF files with RADYN's variables, filled by closed forms: profiles are Gaussians at the Doppler shift."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cdflib import cdfwrite

CC = 2.99792458e10
QNORM = 8.0
REST = {4: 6564.69, 20: 8544.40}
NQ = {4: 41, 20: 51}
RAYS = np.array([0.0469101, 0.2307653, 0.5, 0.7692347, 0.9530899])
TRANSITIONS, DEPTHS = 22, 80
SCALARS = {
    "nel": 3, "nk1": 20, "nrad": TRANSITIONS, "nline": 21, "nrfix": 5, "nmu": 5, "ndep": DEPTHS,
    "ndepm": DEPTHS - 1, "qnorm": QNORM, "hn3c2": 1.0, "hny4p": 1.0, "grav": 2.74e4, "ee": 1.602189e-12,
    "em": 9.109534e-28, "hh": 6.626176e-27, "cc": CC, "bk": 1.380662e-16, "amu": 1.660531e-24, "hce": 1.0,
    "hc2": 1.0, "hck": 1.0, "pi": np.pi,
}  # fmt: skip
CONSTANT = {"alamb", "cont", "nq", "q", "zmu", "vturb"}
F_CHROMA = "radyn_out.val3c_d3_1.0e11_t20s_10kev_fp"


def frequencies(kr: int, reach: float = 22.0) -> np.ndarray:
    """Ascending, dense in the core, in Doppler widths."""
    return reach * np.linspace(-1, 1, NQ[kr]) ** 3 * 0.8 + reach * np.linspace(-1, 1, NQ[kr]) * 0.2


@dataclass
class ToyRun:
    """Variables of a run, a minute of it every 10 s; change them before writing."""

    snapshots: int = 7
    rays: np.ndarray = field(default_factory=RAYS.copy)
    seed: int = 0

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        time = 0.1 * np.arange(self.snapshots)
        share = np.linspace(0, 1, DEPTHS)[None] ** (1.5 + 0.05 * time[:, None])
        z = 11e8 * (1 - share) - 0.1e8 * share  # top first, cm; the grid of depths moves with time
        mm = z / 1e8
        self.speed = 20e5 * np.cos(3 * time)  # cm/s, upflow positive, the same at all heights
        self.variables: dict[str, Any] = {
            **SCALARS,
            "nmu": self.rays.size,
            "time": 100.0 * time,
            "zmu": self.rays,
            "alamb": np.linspace(900.0, 12000.0, TRANSITIONS),
            "cont": np.zeros(TRANSITIONS, np.int32),
            "nq": np.full(TRANSITIONS, 11, np.int32),
            "q": np.zeros((max(NQ.values()), TRANSITIONS)),
            "vturb": np.full(DEPTHS, 2e5),
            "iiter": np.arange(self.snapshots, dtype=np.int32) + 3,
            "z1": z,
            "tg1": 4000.0 + 1e6 / (1 + np.exp(-(mm - 2) / 0.1)) + 100 * random.random(z.shape),
            "ne1": 1e14 * np.exp(-mm / 0.7) * (1 + 0.2 * random.random(z.shape)),
            "vz1": self.speed[:, None] * np.ones_like(z),
            "outint": np.full((self.snapshots, 60, self.rays.size, TRANSITIONS), 1e-9),
        }
        for kr, rest in REST.items():
            q = frequencies(kr)
            self.variables["alamb"][kr], self.variables["nq"][kr] = rest, q.size
            self.variables["q"][: q.size, kr] = q
            shift = self.speed[:, None, None] * 1e-5 * self.rays / QNORM
            core = np.exp(-0.5 * ((q[None, :, None] - shift) / 3.0) ** 2)
            # Between the frequencies an asymmetric slope, so that a profile back to front is another one.
            line = 2e-6 * (1 + 0.4 * self.rays) * (core + 0.05 + 0.001 * q[None, :, None])
            self.variables["outint"][:, 1 : q.size + 1, :, kr] = line * (1 + 0.1 * random.random(line.shape))
            self.variables["outint"][:, 0, :, kr] = 4e-6 * (1 + 0.1 * np.arange(self.rays.size))

    def write(self, path: Path) -> Path:
        """Write the CDF file."""
        path.unlink(missing_ok=True)
        # cdflib writes what it is given as if it were in the file's order: only this one reads back the same.
        file = cdfwrite.CDF(path.with_suffix(path.suffix + ".tmp.cdf"), {"Majority": "row_major"})
        for name, value in self.variables.items():
            values = np.asarray(value, np.float64 if np.asarray(value).dtype.kind == "f" else np.int32)
            varies = values.ndim > 0 and name not in CONSTANT
            kind = cdfwrite.CDF.CDF_DOUBLE if values.dtype.kind == "f" else cdfwrite.CDF.CDF_INT4
            spec = {
                "Variable": name, "Data_Type": kind, "Num_Elements": 1, "Rec_Vary": varies,
                "Dim_Sizes": list(values.shape[1:] if varies else values.shape), "Compress": 1,
            }  # fmt: skip
            file.write_var(spec, var_data=values)
        file.close()
        path.with_suffix(path.suffix + ".tmp.cdf").rename(path)
        return path
