"""Pictures of a map: they show the map's own numbers, with units, and need no display."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from known_map import COLUMNS, ROWS, known_truth, map_around, observation_of
from matplotlib.figure import Figure

from pipeline.errors import MisuseError
from pipeline.figures import map_figure, profile_figure, trust_figure, truth_figure


@pytest.fixture(scope="module")
def truth():
    return known_truth()


@pytest.fixture(scope="module")
def ds(truth):
    return map_around(truth, error=1.0)


@pytest.fixture(scope="module")
def observation(truth):
    return observation_of(truth)


def panel(figure, title):
    """The axes whose title starts so."""
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def shown(axes):
    """Values of the axes' only image."""
    (image,) = axes.images
    return np.ma.filled(image.get_array().astype(float), np.nan)


def bar_label(axes):
    return axes.child_axes[0].get_ylabel()


def drawn(figure, tmp_path):
    """Draw the figure as its users do; the bytes are a picture."""
    figure.savefig(tmp_path / "figure.png")
    return (tmp_path / "figure.png").read_bytes()


def test_figures_leave_pyplot_alone(ds, truth, observation, tmp_path):
    plt.close("all")
    before = dict(plt.rcParams)
    for figure in (
        map_figure(ds, observation=observation),
        profile_figure(ds, 5, 5, observation=observation, truth=truth.isel(sample=0)),
        trust_figure(ds),
        truth_figure(ds, truth),
    ):
        assert isinstance(figure, Figure)
        assert drawn(figure, tmp_path).startswith(b"\x89PNG")
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before


def test_the_map_shows_medians_at_the_nearest_height(ds):
    figure = map_figure(ds, time=1, height=0.85)
    here = ds.isel(time=1).sel(quantile=0.5, height=0.9)
    assert shown(panel(figure, "Electron density")) == pytest.approx(
        np.log10(here["electron_density"].values), nan_ok=True
    )
    assert shown(panel(figure, "Velocity")) == pytest.approx(here["velocity"].values, nan_ok=True)
    assert "height 0.90 Mm" in figure.get_suptitle()
    assert "2014-09-06 16:56:08 UTC" in figure.get_suptitle()


def test_the_map_shows_widths_of_the_68_per_cent_interval(ds):
    figure = map_figure(ds, height=0.9)
    here = ds.isel(time=0).sel(height=0.9)
    width = np.log10(here["temperature"].sel(quantile=0.84) / here["temperature"].sel(quantile=0.16))
    assert shown(panel(figure, "68 % interval of $T$")) == pytest.approx(width.values, nan_ok=True)


def test_every_image_says_its_unit(ds, observation):
    figure = map_figure(ds, observation=observation)
    labels = {
        "Hα": "[DN]",
        "Ca II": "[DN]",
        "Electron density": "[cm⁻³]",
        "Temperature": "[K]",
        "Velocity": "[km s⁻¹]",
        "68 % interval of $v$": "[km s⁻¹]",
        "68 % interval of $T$": "[dex]",
        "Misfit": "[joint maximum]",
        "Novelty": "probability",
    }
    for title, unit in labels.items():
        assert unit in bar_label(panel(figure, title))
    assert "[arcsec]" in panel(figure, "Quality").get_xlabel()


def test_the_line_cores_are_the_wavelengths_nearest_to_rest(ds, observation):
    figure = map_figure(ds, time=1, observation=observation)
    assert np.array_equal(shown(panel(figure, "Hα")), observation["halpha"].values[1, :, :, 7])
    assert np.array_equal(shown(panel(figure, "Ca II")), observation["ca8542"].values[1, :, :, 12])


def test_images_lie_where_their_coordinates_say(ds):
    axes = panel(map_figure(ds), "Velocity")
    left, right, bottom, top = axes.images[0].get_extent()
    assert (left + right) / 2 == pytest.approx(float(ds["x"].mean()))
    assert right - left == pytest.approx(COLUMNS * 0.057)
    assert top - bottom == pytest.approx(ROWS * 0.057)
    # The first column is outside of the field: the panel leaves it away.
    assert axes.get_xlim() == pytest.approx((left + 0.057, right))


def test_velocity_is_symmetric_and_blue_for_upflow(ds):
    image = panel(map_figure(ds), "Velocity").images[0]
    assert image.norm.vmin == -image.norm.vmax
    red, _, blue, _ = image.cmap(image.norm(image.norm.vmax))
    assert blue > red
    red, _, blue, _ = image.cmap(image.norm(image.norm.vmin))
    assert red > blue


def test_quality_names_the_flags_that_occur(ds):
    figure = map_figure(ds)
    legend = next(axes.get_legend() for axes in figure.axes if axes.get_legend() is not None)
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(texts) == 3
    assert texts[0].startswith("no flag")
    assert texts[1].startswith("novel  0.6 %")
    assert texts[2].startswith("outside field  6.7 %")


def test_a_profile_shows_bands_median_and_truth(ds, truth, observation):
    sample = int(truth["painted"][1, 4, 6])
    figure = profile_figure(
        ds, 4, 6, time=1, truth=truth.isel(sample=sample), observation=observation, top=2.0
    )
    axes = panel(figure, "Velocity")
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    pixel = ds.isel(time=1, y=4, x=6)
    assert lines["median"] == pytest.approx(pixel["velocity"].sel(quantile=0.5).values)
    assert lines["truth"] == pytest.approx(truth["velocity"].values[sample])
    extents = {band.get_label(): band.get_datalim(axes.transData) for band in axes.collections}
    for label, low, high in (("90 %", 0.05, 0.95), ("68 %", 0.16, 0.84)):
        assert extents[label].y0 == pytest.approx(pixel["velocity"].sel(quantile=low).min())
        assert extents[label].y1 == pytest.approx(pixel["velocity"].sel(quantile=high).max())
    assert panel(figure, "Temperature").get_yscale() == "log"
    assert panel(figure, "Temperature").get_ylabel() == "$T$ [K]"
    observed = panel(figure, "Hα, observed").lines[0].get_ydata()
    assert np.array_equal(observed, observation["halpha"].values[1, 4, 6])


def test_a_profile_says_what_is_known_of_its_pixel(ds, observation):
    texts = [
        text.get_text()
        for axes in profile_figure(ds, 5, 5, observation=observation).axes
        for text in axes.texts
    ]
    assert "novel" in texts
    assert "0.001" in texts
    assert "5.0 s after Hα's" in texts
    assert "by (−0.96, 0.48) pixels" in texts


def test_trust_counts_what_is_flagged(ds):
    figure = trust_figure(ds)
    share = 100 / (ROWS * (COLUMNS - 1))
    assert any(axes.get_title(loc="left").startswith(f"{share:.1f} % below 0.01") for axes in figure.axes)


def test_truth_and_median_share_their_colours(ds, truth):
    figure = truth_figure(ds, truth, height=0.9)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    for above, below in zip(images[:3], images[3:], strict=True):
        assert above.get_clim() == below.get_clim()
    painted = truth["painted"].values[0]
    true = np.where(painted >= 0, truth["velocity"].sel(height=0.9).values[painted], np.nan)
    assert shown(panel(figure, "Velocity, truth")) == pytest.approx(true, nan_ok=True)


def test_a_map_without_answers_emulator_or_observation_is_still_drawn(ds, tmp_path):
    empty = ds.copy(deep=True)
    for name in ("electron_density", "temperature", "velocity", "misfit", "novelty"):
        empty[name].values[:] = np.nan
    empty["quality"].values[:] = 256
    for figure in (map_figure(empty), trust_figure(empty), profile_figure(empty, 3, 3)):
        assert drawn(figure, tmp_path)
    titles = [axes.get_title(loc="left") for axes in trust_figure(empty).axes]
    assert "Misfit (the model has no emulator)" in titles


def test_the_truth_of_another_field_is_refused(ds, truth):
    with pytest.raises(MisuseError, match="different fields"):
        truth_figure(ds.isel(x=slice(3, 9)), truth)
