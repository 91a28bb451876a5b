"""The demo: what its series is painted with, and that ingest and the bundled network find it again."""

import json

import numpy as np
import pytest
import xarray as xr
from astropy.io import fits
from scipy import ndimage

from inn.layout import CA8542, HALPHA
from pipeline import demo_series
from pipeline.comparison import compare
from pipeline.crisp.instrument import transmission
from pipeline.crisp.scan import cosine_of_pointing
from pipeline.demo import run_demo
from pipeline.demo_series import (
    Canvas,
    Cast,
    Scene,
    Texture,
    casting,
    held_out,
    line_profiles,
    make_scene,
    make_series,
    shows_emission,
)
from pipeline.errors import InputError, MisuseError
from pipeline.grids.store import BUNDLED_GRID, open_grid, split
from pipeline.ingest import ingest
from pipeline.observation import open_observation
from pipeline.results import open_map
from pipeline.training_set import CRISP_WAVELENGTHS

MU = cosine_of_pointing(demo_series.POINTING, demo_series.START)


@pytest.fixture(scope="module")
def grid():
    with open_grid(BUNDLED_GRID) as store:
        yield store.load()


@pytest.fixture(scope="module")
def atmospheres(grid):
    return held_out(grid)


@pytest.fixture(scope="module")
def profiles(atmospheres):
    return line_profiles(atmospheres, MU)


@pytest.fixture(scope="module")
def series(grid, tmp_path_factory):
    """The demo's own series."""
    return make_series(tmp_path_factory.mktemp("crisp"), grid)


def share_of_field(painted):
    """Largest share of the field that one atmosphere paints, for each scan."""
    return [np.bincount(scan[scan >= 0]).max() / (scan >= 0).sum() for scan in painted]


# The physics


def test_only_held_out_converged_atmospheres_are_used(grid, series):
    used = series.dataset["simulation"].values
    assert set(split(used)) == {"test"}
    assert np.all(grid["converged"].values[np.isin(grid["simulation"].values, used)])
    assert np.isfinite(series.dataset["temperature"]).all()


def test_every_held_out_atmosphere_is_used(series):
    painted = series.dataset["painted"].values
    assert set(np.unique(painted)) == set(range(-1, series.dataset.sizes["sample"]))


def test_no_atmosphere_paints_more_than_two_per_cent(series):
    assert max(share_of_field(series.dataset["painted"].values)) <= 0.02


@pytest.mark.parametrize("seed", range(1, 6))
def test_other_seeds_keep_the_rule(profiles, seed):
    # `make_scene` refuses a scene that breaks it.
    make_scene(Canvas.around((96, 128), 17.0), *casting(profiles), scans=3, cell=6.5, seed=seed)


def test_ribbons_show_emission(series, profiles):
    painted, ribbon = series.dataset["painted"].values, series.dataset["ribbon"].values
    assert shows_emission(profiles)[painted[ribbon]].all()
    assert np.unique(painted[ribbon]).size > 150


def test_atmospheres_share_the_cells_evenly():
    random = np.random.default_rng(4)
    cast = Cast((np.array([3, 1, 4]), np.array([0, 2]), np.array([5])))
    brightness, contrast = random.uniform(size=(2, 600))
    chosen = cast.lay_out(brightness, contrast, np.ones(600))
    assert np.array_equal(np.bincount(chosen), np.full(6, 100))
    # The faintest half goes to the first block; in it Ca II's share decides.
    assert set(chosen[brightness < np.median(brightness)]) == {1, 3, 4}
    assert contrast[chosen == 3].max() <= contrast[chosen == 1].min()
    # By area: cells twice as large count twice.
    area = np.where(brightness < 0.5, 2.0, 1.0)
    chosen = cast.lay_out(brightness, contrast, area)
    assert np.bincount(chosen, weights=area) == pytest.approx(area.sum() / 6, abs=2.0)


def test_more_cells_than_atmospheres_leave_none_out():
    random = np.random.default_rng(5)
    cast = Cast(tuple(np.array_split(random.permutation(190), 8)))
    for cells in (190, 230, 300):
        chosen = cast.lay_out(*random.uniform(size=(2, cells)), np.ones(cells))
        assert set(chosen) == set(range(190))


def test_emission_is_a_core_above_the_far_wings():
    flat = {line: np.ones((4, axis.size)) for line, axis in CRISP_WAVELENGTHS.items()}
    for line in flat:
        core = np.exp(-0.5 * ((CRISP_WAVELENGTHS[line] - CRISP_WAVELENGTHS[line].mean()) / 0.2) ** 2)
        flat[line][0] -= 0.5 * core
    flat["halpha"][1] += 0.5 * np.exp(-0.5 * ((CRISP_WAVELENGTHS["halpha"] - 6564.3) / 0.2) ** 2)
    flat["ca8542"][2] += 0.5 * np.exp(-0.5 * ((CRISP_WAVELENGTHS["ca8542"] - 8544.7) / 0.1) ** 2)
    flat["ca8542"][3] -= 0.5 * np.exp(-0.5 * ((CRISP_WAVELENGTHS["ca8542"] - 8544.4) / 0.1) ** 2)
    assert shows_emission(flat).tolist() == [False, True, True, False]


def test_profiles_are_the_grids_at_laboratory_wavelengths_through_the_instrument(grid):
    sample = grid.isel(sample=[5])
    seen = line_profiles(sample, 0.6)
    for line in (HALPHA, CA8542):
        spectrum = sample[line.name].sel(mu=0.6).values[0].astype(float)
        beside = np.linspace(-0.6, 0.6, 2401)
        weight = transmission(line.name, beside)
        for wavelength, measured in zip(CRISP_WAVELENGTHS[line.name], seen[line.name][0], strict=True):
            around = wavelength - line.rest_wavelength + beside
            sharp = np.interp(around, grid[f"wavelength_{line.name}"].values, spectrum)
            assert measured == pytest.approx((weight * sharp).sum() / weight.sum(), rel=2e-3)


def test_inclinations_between_the_grids_follow_a_smooth_curve(grid):
    # A profile that is a parabola in mu at every wavelength: a cubic spline is exact on it.
    sample = grid.isel(sample=[5]).load()
    shape = 1.0 + 0.8 * sample["mu"] - 0.3 * sample["mu"] ** 2
    for name in ("halpha", "ca8542"):
        sample[name] = (sample[name].isel(mu=0, drop=True) * shape).transpose(*sample[name].dims)
    ratio = line_profiles(sample, 0.53)["ca8542"] / line_profiles(sample, 0.8)["ca8542"]
    assert ratio == pytest.approx((1.0 + 0.8 * 0.53 - 0.3 * 0.53**2) / (1.0 + 0.64 - 0.192), rel=1e-5)


def test_inclinations_and_wavelengths_outside_the_grid_are_refused(grid):
    with pytest.raises(InputError, match="inclination"):
        line_profiles(grid.isel(sample=[0]), 0.1)
    narrow = grid.isel(sample=[0], wavelength_ca8542=slice(20, 90))
    with pytest.raises(InputError, match="wavelengths are too few"):
        line_profiles(narrow, 0.5)


def test_a_small_grid_is_refused(grid, tmp_path):
    with pytest.raises(InputError, match="too small to paint the demo"):
        make_series(tmp_path, grid.isel(sample=slice(0, 300)))


# The pictures


def test_files_are_like_the_databases(series):
    assert [file.name for file in series.files[:2]] == [
        "crisp_l2_20140906_165557_6563_r00000.fits",
        "crisp_l2_20140906_165557_8542_r00000.fits",
    ]
    times = []
    for number, file in enumerate(series.files):
        with fits.open(file) as hdus:
            line = "ca8542" if number % 2 else "halpha"
            assert hdus[0].data.dtype == np.dtype(">i2")
            assert hdus["lambda-coordinate"].data == pytest.approx(CRISP_WAVELENGTHS[line], abs=1e-6)
            assert hdus[0].header["CDELT1"] == 0.057
            assert (hdus[0].header["CRVAL1"], hdus[0].header["CRVAL2"]) == (-730.0, -313.0)
            times.append(np.datetime64(hdus[0].header["DATE-AVG"]))
            pad = hdus[0].data[:, series.dataset["painted"].values[0] < 0]
            assert np.ptp(pad) == 0
            assert hdus[0].data.min() > 0
            assert hdus[0].data.max() < 32767
    steps = (np.array(times[1:]) - np.array(times[:-1])) / np.timedelta64(1, "s")
    assert steps == pytest.approx([5.0, 6.5, 5.0, 6.5, 5.0])


def test_counts_keep_the_relative_intensity_of_the_lines(series, profiles):
    painted = series.dataset["painted"].values[1]
    alike = ndimage.minimum_filter(painted, 5) == ndimage.maximum_filter(painted, 5)
    halpha, ca8542 = (fits.getdata(file).astype(float) for file in series.files[2:4])
    # Ca II is elsewhere on the canvas: bring it back by whole pixels, well inside of evenly painted cells.
    dy, dx = (int(np.rint(series.dataset[name].values[1])) for name in ("shift_y", "shift_x"))
    moved = np.roll(ca8542, (dy, dx), (1, 2))
    found, true = [], []
    for sample in np.unique(painted[alike & (painted >= 0)]):
        place = alike & (painted == sample)
        found.append(moved[:, place].mean() / halpha[:, place].mean())
        true.append(profiles["ca8542"][sample].mean() / profiles["halpha"][sample].mean())
    ratio = np.array(found) / np.array(true)
    # Granulation displaced by less than a pixel, and noise, are left.
    assert np.median(ratio) == pytest.approx(1.0, abs=0.01)
    assert np.percentile(np.abs(ratio - 1.0), 90) < 0.08


def test_a_scene_of_one_atmosphere_without_granulation_is_even():
    canvas = Canvas((60, 60), (200, 200), 0.0)
    still = Texture(np.zeros(1), np.zeros(1), np.full(1, np.pi / 2))
    one = np.zeros((1, 1), dtype=int)
    scene = Scene(canvas, np.zeros((1, 2)), one, one.astype(bool), still, (still, still))
    image = scene.image(np.array([[100.0, 400.0]]), 0)
    assert image == pytest.approx(np.broadcast_to(np.array([100.0, 400.0])[:, None, None], (2, 60, 60)))


def test_photon_noise_is_that_of_the_counts(series, grid, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_series, "ELECTRONS_PER_COUNT", 1e6)
    clean = make_series(tmp_path, grid)
    inside = series.dataset["painted"].values[0] >= 0
    noisy, true = (fits.getdata(made.files[1])[:, inside].astype(float) for made in (series, clean))
    assert (noisy - true).mean() == pytest.approx(0.0, abs=0.1)
    # Eight electrons a count; rounding to whole counts adds twice a twelfth.
    expected = np.sqrt(true / 8.0 + 1.0 / 6.0)
    assert ((noisy - true) / expected).std() == pytest.approx(1.0, abs=0.02)


def test_a_displaced_scene_is_the_same_scene(profiles):
    canvas = Canvas.around((40, 50), 11.0)
    scene = make_scene(Canvas.around((96, 128), 17.0), *casting(profiles), scans=1, cell=6.5, seed=0)
    scene = Scene(canvas, scene.cells, scene.sample, scene.ribbon, scene.granulation, scene.bends)
    still = scene.image(profiles["ca8542"], 0)
    moved = scene.image(profiles["ca8542"], 0, (3.0, -2.0))
    edge = slice(6, -6)
    assert moved[:, edge, edge] == pytest.approx(np.roll(still, (3, -2), (1, 2))[:, edge, edge], rel=1e-9)
    # Between pixels too: twice half a pixel is a pixel, to what a point spread of half a pixel lets through.
    half = scene.image(profiles["ca8542"], 0, (0.5, 0.0)).mean(axis=0)
    mean = 0.5 * (still.mean(axis=0) + np.roll(still, 1, 1).mean(axis=0))
    difference = (half - mean)[edge, edge]
    assert np.abs(difference).mean() < 0.05 * half[edge, edge].std()


def test_the_field_is_a_rotated_rectangle():
    canvas = Canvas.around((96, 128), 17.0)
    inside = canvas.inside(*canvas.pixels())
    assert inside.sum() == pytest.approx(96 * 128, rel=0.01)
    assert not inside[[0, -1]].any()
    assert not inside[:, [0, -1]].any()
    middle = tuple(size // 2 for size in canvas.shape)
    assert inside[middle]


def test_ribbons_brighten_and_separate(series):
    ribbon = series.dataset["ribbon"].values
    core = [fits.getdata(file)[7] for file in series.files[::2]]
    light = [float(image[mask].astype(float).sum()) for image, mask in zip(core, ribbon, strict=True)]
    assert light[0] < light[1] < light[2]
    canvas = Canvas.around((96, 128), 17.0)
    v, _ = canvas.field_coordinates(*canvas.pixels())
    reach = [np.percentile(v[mask], 98) - np.percentile(v[mask], 2) for mask in ribbon]
    assert reach[0] < reach[1] < reach[2]


def test_the_same_seed_makes_the_same_files(grid, series, tmp_path):
    again = make_series(tmp_path, grid)
    assert again.dataset.equals(series.dataset)
    assert again.files[3].read_bytes() == series.files[3].read_bytes()
    other = make_series(tmp_path / "other", grid, seed=1)
    assert not np.array_equal(other.dataset["painted"], series.dataset["painted"])


# What ingest and inversion find


@pytest.mark.parametrize(
    ("shift", "drift"),
    [
        ((-2.4, 5.3), (0.35, -0.25)),
        ((6.0, -6.0), (0.0, 0.0)),
        ((0.5, 0.25), (-0.2, 0.1)),
        ((-5.7, -1.9), (0.3, 0.6)),
    ],
)
def test_displacements_are_found_to_a_tenth_of_a_pixel(grid, tmp_path, shift, drift):
    made = make_series(tmp_path / "crisp", grid, shift=shift, drift=drift)
    ingest(made.files, tmp_path / "obs.zarr", call="tests")
    with open_observation(tmp_path / "obs.zarr") as observation:
        assert observation["shift_applied"].values.all()
        for name in ("shift_y", "shift_x"):
            assert np.abs(observation[name].values - made.dataset[name].values).max() <= 0.1
        for valid, overlap in zip(observation["valid"].values, made.dataset["overlap"].values, strict=True):
            # The overlap to within a pixel; at the moved field's edge two more would be extrapolated.
            assert (valid >= ndimage.binary_erosion(overlap, np.ones((7, 7)))).all()
            assert (valid <= ndimage.binary_dilation(overlap, np.ones((3, 3)))).all()


@pytest.fixture(scope="module")
def demo(client, tmp_path_factory):
    """A whole run of the demo with the bundled grid and network, a scan left out."""
    return run_demo(tmp_path_factory.mktemp("demo") / "demo", client=client, scans=2)


def test_the_bundled_network_finds_held_out_physics_in_the_ribbons(demo):
    ribbon = demo.comparison.sel(region="ribbon")
    assert ribbon["pixels"] > 5000
    assert ribbon["answered"] > 0.99
    assert ribbon["error_ratio"].sel(quantity="electron_density") <= 0.35
    assert ribbon["error_ratio"].sel(quantity="temperature") <= 0.5
    assert ribbon["correlation"].sel(quantity="velocity") > 0.6
    coverage = ribbon["coverage"].sel(interval=0.9)
    assert np.all((coverage >= 0.80) & (coverage <= 0.97))


def test_the_demo_registers_its_scans(demo):
    for axis in ("y", "x"):
        assert np.abs(demo.comparison[f"shift_error_{axis}"]).max() <= 0.1
    assert demo.comparison["shift_applied"].all()
    assert demo.comparison["valid_error"].max() <= np.hypot(3.0, 3.0)


def test_the_demo_leaves_everything_behind(demo):
    names = {entry.name for entry in demo.directory.iterdir()}
    assert {
        "crisp",
        "obs.zarr",
        "map.zarr",
        "truth.zarr",
        "comparison.json",
        "report.html",
        "maps.png",
    } <= names
    stored = json.loads((demo.directory / "comparison.json").read_text())
    ratio = float(demo.comparison["error_ratio"].sel(region="ribbon", quantity="temperature"))
    assert stored["regions"]["ribbon"]["temperature"]["error_ratio"] == pytest.approx(ratio)
    truth = xr.open_zarr(demo.directory / "truth.zarr", chunks=None)
    assert truth.attrs["kind"] == "truth"
    again = compare(
        open_map(demo.directory / "map.zarr"), truth, open_observation(demo.directory / "obs.zarr")
    )
    assert again.equals(demo.comparison)


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(MisuseError, match="something else than a demo"):
        run_demo(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
