"""What a grid covers, in words and in a figure: families by their criteria, the grid's own numbers."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from rich.console import Console
from toy_grid import toy_grid, write_toy_grid

from inn.layout import CA8542, HALPHA
from pipeline.errors import MisuseError, StoreError
from pipeline.grids.coverage import (
    ASYMMETRIES,
    SHAPES,
    coverage_figure,
    describe_grid,
    profile_families,
    show_grid,
)
from pipeline.grids.store import BUNDLED_GRID, open_grid, split
from pipeline.training_set import content_hash

OFFSETS = np.linspace(-1.4, 1.4, 57)


def bump(centre, width, offsets=OFFSETS):
    return np.exp(-0.5 * ((offsets - centre) / width) ** 2)


PROFILES = {
    "absorption": 1.0 - 0.8 * bump(0.0, 0.4),
    "absorption, core to the red": 1.0 - 0.8 * bump(0.5, 0.4),
    "absorption, core to the blue": 1.0 - 0.8 * bump(-0.5, 0.4),
    "emission": 0.3 + bump(0.0, 0.4),
    "emission in absorption wings": 1.0 - 0.2 * bump(0.0, 0.8) + bump(0.0, 0.2),
    "emission to the red": 0.3 + bump(0.5, 0.4),
    "reversal": 0.3 + bump(0.0, 0.6) - 0.6 * bump(0.0, 0.2),
    "reversal, red peak higher": 0.3 + bump(-0.5, 0.2) + 1.6 * bump(0.5, 0.2),
    "reversal below the ends": 1.0 - 0.7 * bump(0.0, 0.6) + 0.4 * bump(-0.4, 0.12) + 0.4 * bump(0.4, 0.12),
    "shallow reversal": 0.3 + bump(0.0, 0.6) - 0.10 * bump(0.0, 0.2),
    "P Cygni": 1.0 - 0.6 * bump(-0.5, 0.2) + 0.6 * bump(0.5, 0.2),
}
WANTED = {
    "absorption": ("absorption", "none"),
    "absorption, core to the red": ("absorption", "blue"),
    "absorption, core to the blue": ("absorption", "red"),
    "emission": ("emission", "none"),
    "emission in absorption wings": ("emission", "none"),
    "emission to the red": ("emission", "red"),
    "reversal": ("central reversal", "none"),
    "reversal, red peak higher": ("central reversal", "red"),
    "reversal below the ends": ("central reversal", "none"),
    # A dip of less than a twentieth of the maximum is no reversal.
    "shallow reversal": ("emission", "none"),
    "P Cygni": ("mixed", "red"),
}


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("intensity", [1.0, 3e6])
def test_families(name, intensity):
    families = profile_families(intensity * PROFILES[name][None], OFFSETS)
    assert (SHAPES[families.shape[0]], ASYMMETRIES[families.asymmetry[0]]) == WANTED[name]


def test_a_mirrored_profile_has_the_mirrored_asymmetry():
    profiles = np.stack(list(PROFILES.values()))
    here, there = profile_families(profiles, OFFSETS), profile_families(profiles[:, ::-1], OFFSETS)
    assert there.shape.tolist() == here.shape.tolist()
    assert there.excess == pytest.approx(-here.excess, abs=1e-12)
    assert there.asymmetry.tolist() == (2 - here.asymmetry).tolist()


def test_excess_is_the_difference_of_the_sides_means():
    """A step of height 1 at rest: one side's mean exceeds the other's by all of the range."""
    step = np.where(OFFSETS > 0, 2.0, np.where(OFFSETS < 0, 1.0, 1.5))
    assert profile_families(step[None], OFFSETS).excess[0] == pytest.approx(1.0, abs=0.02)
    # Unevenly sampled, on an axis that is not centred on rest: a straight line of slope 1 over -1 to 0.8.
    offsets = np.array([-1.0, -0.4, -0.1, 0.05, 0.8])
    wanted = (0.4 - -0.5) / 1.8
    assert profile_families(offsets[None] + 3.0, offsets).excess[0] == pytest.approx(wanted)
    with pytest.raises(MisuseError, match="both sides"):
        profile_families(np.ones((1, 5)), offsets + 2.0)


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


@pytest.fixture(scope="module")
def grid():
    return toy_grid(200)


@pytest.fixture(scope="module")
def figure(grid):
    return coverage_figure(grid, mu=0.55)


def test_the_figure_shows_every_family_of_both_lines(figure, grid, tmp_path):
    plt.close("all")
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == []
    assert "200 samples of 200 simulations, 196 converged" in figure.get_suptitle()
    assert "μ = 0.60" in figure.get_suptitle()
    usable = grid.isel(mu=1, sample=np.flatnonzero(grid["converged"].values))
    for window, title in ((HALPHA, "Hα"), (CA8542, "Ca II 8542")):
        offsets = grid[f"wavelength_{window.name}"].values
        seen = np.abs(offsets) <= window.half_width + 1e-9
        families = profile_families(usable[window.name].values[:, seen], offsets[seen])
        for number, shape in enumerate(SHAPES):
            axes = panel(figure, f"{title}: {shape}")
            share = 100 * (families.shape == number).mean()
            said = axes.get_title(loc="left").rpartition(", ")[2].removesuffix(" %")
            assert said == "<1" if 0 < share < 1 else float(said) == pytest.approx(share, abs=0.51)
            assert axes.get_xlim() == pytest.approx((-window.half_width, window.half_width))
            assert (len(axes.lines) > 1) == (share > 0)
        widths = [bar.get_width() for bar in panel(figure, f"{title}: shares").patches]
        assert len(widths) == len(SHAPES) * len(ASYMMETRIES)
        assert sum(widths) == pytest.approx(100.0)


def test_the_figure_shows_the_atmospheres_quantiles(figure, grid):
    usable = grid.isel(sample=np.flatnonzero(grid["converged"].values))
    seen = grid["height"].values <= 3.0
    for quantity, title in (
        ("temperature", "Temperature"),
        ("velocity", "Velocity"),
        ("electron_density", "Elec"),
    ):
        axes = panel(figure, title)
        median = next(line for line in axes.lines if line.get_label() == "median")
        assert median.get_xdata() == pytest.approx(grid["height"].values[seen])
        assert median.get_ydata() == pytest.approx(np.median(usable[quantity].values[:, seen], axis=0))
        outer = axes.collections[0].get_paths()[0].vertices[:, 1]
        low, high = np.quantile(usable[quantity].values[:, seen], (0.05, 0.95), axis=0)
        assert (outer.min(), outer.max()) == pytest.approx((low.min(), high.max()))


def test_families_may_be_empty_and_grids_of_one_angle_and_one_sample(grid):
    one = grid.isel(sample=[3], mu=[2])
    drawn = coverage_figure(one)
    assert "μ = 0.90" in drawn.get_suptitle()
    empty = [axes for axes in drawn.axes if any(text.get_text() == "none" for text in axes.texts)]
    assert len(empty) == 2 * (len(SHAPES) - 1)
    with pytest.raises(MisuseError, match="no converged samples"):
        coverage_figure(grid.assign(converged=xr.zeros_like(grid["converged"])))


def told(path, **options):
    """The description as one line."""
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(describe_grid(path, **options))
    return " ".join(console.export_text().split())


def test_the_description_of_the_bundled_grid_is_its_own():
    grid, text = open_grid(BUNDLED_GRID), told(BUNDLED_GRID)
    usable = int(grid["converged"].sum())
    assert f"{grid.sizes['sample']:,}, of which {usable:,} converged" in text
    assert "lightweaver" in text
    assert grid.attrs["call"] in text
    assert grid.attrs["made_from"]["settings"] in text
    assert content_hash(BUNDLED_GRID) in text
    assert "statistical equilibrium" in text
    assert "tau_500 = 1" in text
    parts = split(grid["simulation"].values)
    for part in ("train", "validation", "test"):
        assert f"{part} {(parts == part).sum():,} (" in text
    for name in ("microturbulence", "transition_region_height"):
        assert name in text
    for window, rest in (("halpha", "6564.692"), ("ca8542", "8544.438")):
        assert f"{grid[f'wavelength_{window}'].size} wavelengths" in text
        assert f"rest {rest}" in text
    assert "50, -0.065 to 10.5 Mm" in text


def test_failures_are_told_with_their_reasons(tmp_path):
    grid = toy_grid(100)
    grid["status"] = (
        "sample",
        np.where(grid["converged"].values, 0, np.where(grid["simulation"].values > 50, 2, 1)),
    )
    grid.attrs["failures"] = (
        '{"49": "300 iterations: J still changes by 1e-2", "99": "LinAlgError: singular"}'
    )
    grid.attrs["runs"] = (
        '{"a.cdf": {"sha256": "00"}, "b.cdf": {"refused": "no snapshots"}, "c.cdf": {"unfinished": true}}'
    )
    grid["parameter_density"][:] = np.nan
    grid.to_zarr(tmp_path / "grid.zarr", zarr_format=3)
    text = told(tmp_path / "grid.zarr")
    assert "100, of which 98 converged; 1 iteration limit, 1 numerical failure" in text
    assert "1 × LinAlgError" in text
    assert "3; 1 unfinished: c.cdf; 1 refused: b.cdf (no snapshots)" in text
    assert "density │ unknown" in text


def test_show_prints_and_draws(tmp_path):
    path = write_toy_grid(tmp_path / "toy.zarr", samples=60)
    console = Console(record=True, width=120, file=io.StringIO())
    show_grid(path, tmp_path / "toy.png", mu=0.3, console=console)
    text = console.export_text()
    assert "Profile families at mu = 0.3" in text
    assert (tmp_path / "toy.png").stat().st_size > 10_000
    with pytest.raises(MisuseError, match="cannot be written"):
        show_grid(path, tmp_path / "toy.docx", console=console)
    with pytest.raises(StoreError, match="no such grid"):
        show_grid(tmp_path / "none.zarr", console=console)
