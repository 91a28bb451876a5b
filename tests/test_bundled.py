"""The bundled network and grid: what the README says of them, and the sign of velocity from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest

import inn
from inn.checkpoint import BUNDLED
from pipeline.crisp.instrument import transmission
from pipeline.grids.store import BUNDLED_GRID, open_grid, split
from pipeline.spectra import network_lines
from pipeline.training_set import CRISP_WAVELENGTHS, content_hash

ROOT = Path(__file__).parents[1]
LIGHT_SPEED = 299_792.458  # km/s
MU = 3  # index of mu = 0.8


@pytest.fixture(scope="module")
def held_out():
    grid = open_grid(BUNDLED_GRID)
    return grid.isel(sample=np.flatnonzero(split(grid["simulation"].values) == "test")).load()


@pytest.fixture(scope="module")
def model():
    return inn.load_model()


def observed(grid, model, receding: float):
    """Held-out profiles as CRISP samples them from a frame that moves them by `receding` km/s to the red."""
    spectra = {}
    for line, rest in (("halpha", 6564.61), ("ca8542", 8544.44)):
        # What is seen at a wavelength was emitted at a shorter one.
        emitted = CRISP_WAVELENGTHS[line] / (1.0 + receding / LIGHT_SPEED) - rest
        offsets = grid[f"wavelength_{line}"].values
        beside = np.linspace(-0.3, 0.3, 31)
        weight = transmission(line, beside)
        seen = [
            [np.interp(emitted + offset, offsets, spectrum) for offset in beside]
            for spectrum in grid[line].isel(mu=MU).values
        ]
        spectra[line] = np.einsum("k,skw->sw", weight / weight.sum(), np.array(seen))
    lines, _ = network_lines(
        spectra["halpha"],
        spectra["ca8542"],
        CRISP_WAVELENGTHS["halpha"],
        CRISP_WAVELENGTHS["ca8542"],
        model.layout,
    )
    return lines.astype(np.float32)


def test_blueshift_becomes_upflow_becomes_positive_velocity(held_out, model):
    mu = float(held_out["mu"][MU])
    where = int(np.abs(held_out["height"].values - 0.9).argmin())
    medians = {}
    for bulk in (-3.0, 3.0):  # vertical, upflow positive: the line of sight sees mu times it, approaching
        lines = observed(held_out, model, receding=-mu * bulk)
        posterior = inn.posterior_quantiles(model, lines, mu=mu, quantiles=(0.5,), draws=128)
        medians[bulk] = posterior["velocity"][:, 0, where]
    change = medians[3.0] - medians[-3.0]
    assert np.mean(change > 0) > 0.95
    # 6 km/s were put in; the prior of the grid takes some of it back.
    assert 3.0 < np.median(change) < 7.0


def test_velocity_of_held_out_atmospheres_has_the_right_sign(held_out, model):
    lines = observed(held_out, model, receding=0.0)
    posterior = inn.posterior_quantiles(
        model, lines, mu=float(held_out["mu"][MU]), quantiles=(0.5,), draws=128
    )
    heights = (held_out["height"].values > 0.6) & (held_out["height"].values < 1.2)
    truth = held_out["velocity"].values[:, heights]
    found = posterior["velocity"][:, 0, heights]
    strong = np.abs(truth) > 5.0
    assert np.mean(np.sign(found[strong]) == np.sign(truth[strong])) > 0.9


def test_bundled_network_was_trained_on_the_bundled_grid(model):
    assert model.record["grid"]["sha256"] == content_hash(BUNDLED_GRID)


def test_bundled_files_stay_small():
    size = sum(
        file.stat().st_size for root in (BUNDLED, BUNDLED_GRID) for file in root.rglob("*") if file.is_file()
    )
    assert size < 12e6


def test_readme_states_the_bundled_networks_scores(model):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "@@" not in text
    emission = model.record["metrics"]["emission"]
    for name in ("electron_density", "temperature", "velocity"):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {name.replace('_', ' ')} |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert float(cells[2]) == pytest.approx(emission[name]["error_ratio"], abs=0.005)
        assert float(cells[3]) == pytest.approx(emission[name]["correlation"], abs=0.005)
        stated = [float(cell.rstrip(" %")) / 100 for cell in cells[4:]]
        assert stated == pytest.approx(list(emission[name]["coverage"].values()), abs=0.0051)


def test_model_record_says_what_it_is_not(model):
    assert "not a radiation-hydrodynamic" in json.dumps(model.record).lower()
