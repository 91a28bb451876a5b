"""A map against a known truth: closed-form cases of every figure."""

import json

import numpy as np
import pytest
from known_map import FRAME, known_truth, map_around, observation_of

from inn.layout import QUANTITIES
from pipeline.comparison import as_json, compare, valid_error
from pipeline.errors import InputError


@pytest.fixture
def truth():
    return known_truth()


def constant_answer(truth, region):
    """A map that answers each pixel with the median true profile of a region."""
    answer = map_around(truth)
    chosen = truth["painted"].values[region]
    for name in QUANTITIES:
        profile = np.median(truth[name].values[chosen], axis=0)
        if name != "velocity":
            profile = 10 ** np.median(np.log10(truth[name].values[chosen]), axis=0)
        answer[name].values[...] = np.where(np.isnan(answer[name].values), np.nan, profile)
    return answer


def test_a_perfect_map_has_no_error(truth):
    found = compare(map_around(truth), truth)
    found = found.sel(region=["ribbon", "quiet"])
    assert np.allclose(found["error"], 0.0, atol=1e-9)
    assert np.allclose(found["error_ratio"], 0.0, atol=1e-9)
    assert np.allclose(found["correlation"], 1.0)
    assert np.allclose(found["coverage"], 1.0)
    assert np.all(found["answered"] == 1.0)


def test_climatology_itself_scores_one(truth):
    ribbon = truth["ribbon"].values & truth["overlap"].values
    found = compare(constant_answer(truth, ribbon), truth).sel(region="ribbon")
    assert np.allclose(found["error_ratio"], 1.0)
    assert np.allclose(found["error"], found["climatology_error"])


def test_errors_are_medians_over_the_heights_asked_for(truth):
    shifted = map_around(truth)
    shifted["electron_density"].values *= 10**0.2
    shifted["velocity"].values -= 3.0
    # Beyond the heights that are compared nothing counts.
    shifted["temperature"].loc[{"height": [0.1, 2.0]}] *= 10.0
    found = compare(shifted, truth, heights=(0.3, 1.5)).sel(region="quiet")
    assert found["error"].sel(quantity="electron_density") == pytest.approx(0.2)
    assert found["error"].sel(quantity="velocity") == pytest.approx(3.0)
    assert found["error"].sel(quantity="temperature") == pytest.approx(0.0, abs=1e-9)
    wider = compare(shifted, truth, heights=(1.6, 2.0)).sel(region="quiet", quantity="temperature")
    assert wider["error"] == pytest.approx(1.0)


def test_intervals_of_a_right_posterior_cover_what_they_say(truth):
    found = compare(map_around(truth, error=1.0), truth)
    quiet = found["coverage"].sel(region="quiet")
    assert found["interval"].values == pytest.approx([0.68, 0.9])
    # About 1,000 independent values a quantity: a standard error of 0.015 and 0.009.
    assert np.allclose(quiet.sel(interval=0.68), 0.68, atol=0.05)
    assert np.allclose(quiet.sel(interval=0.90), 0.90, atol=0.03)


def test_an_overconfident_posterior_is_found_out(truth):
    found = compare(map_around(truth, error=3.0), truth)
    # Errors three times as large as stated: P(|z| < 1.645 / 3) = 0.42.
    assert np.allclose(found["coverage"].sel(interval=0.9, region="quiet"), 0.42, atol=0.05)


def test_only_painted_pixels_of_both_fields_count(truth):
    found = compare(map_around(truth), truth)
    assert found["pixels"].sel(region="ribbon") == 2 * 5 * 14
    assert found["pixels"].sel(region="quiet") == 2 * 7 * 14


def test_unmixed_pixels_have_neighbours_alike(truth):
    truth["painted"].values[0, 3:8, 4:9] = 7
    found = compare(map_around(truth), truth)
    assert found["pixels"].sel(region="ribbon, unmixed") >= 9


def test_pixels_without_an_answer_are_left_out_and_counted(truth):
    lacking = map_around(truth)
    lacking["temperature"].values[:, 3:5] = np.nan
    found = compare(lacking, truth).sel(region="ribbon")
    assert found["answered"] == pytest.approx(3 / 5)
    assert found["error"].sel(quantity="temperature") == pytest.approx(0.0, abs=1e-9)


def test_the_novel_share_is_of_the_region(truth):
    found = compare(map_around(truth), truth)
    assert found["novel"].sel(region="ribbon") == pytest.approx(1 / 140)
    assert found["novel"].sel(region="quiet") == 0.0


def test_registration_is_compared_where_the_observation_is_given(truth):
    found = compare(map_around(truth), truth, observation_of(truth))
    assert found["shift_error_y"].values == pytest.approx([0.04, 0.04])
    assert found["shift_error_x"].values == pytest.approx([-0.02, -0.02])
    assert found["shift_applied"].values.tolist() == [True, False]
    assert np.all(found["valid_error"] == 0.0)


def test_the_edge_of_the_valid_field_is_measured_in_pixels():
    overlap = np.zeros((20, 20), dtype=bool)
    overlap[5:15, 5:15] = True
    larger, smaller = np.zeros_like(overlap), np.zeros_like(overlap)
    larger[3:15, 5:15] = True
    smaller[5:15, 5:14] = True
    assert valid_error(overlap, overlap) == 0.0
    assert valid_error(larger, overlap) == 2.0
    assert valid_error(smaller, overlap) == 1.0


def test_a_map_of_something_else_is_refused(truth):
    with pytest.raises(InputError, match="not of the truth's observation: y differs"):
        compare(map_around(truth).isel(y=slice(0, 5)), truth)
    other = map_around(truth)
    with pytest.raises(InputError, match="heights are not the truth's"):
        compare(other.assign_coords(height=other["height"] + 0.1), truth)


def test_json_holds_everything_and_no_nan(truth):
    empty = map_around(truth)
    for name in QUANTITIES:
        empty[name].values[:] = np.nan
    for answer in (map_around(truth), empty):
        stored = json.loads(
            json.dumps(as_json(compare(answer, truth, observation_of(truth))), allow_nan=False)
        )
        assert set(stored["regions"]) == {"ribbon", "ribbon, unmixed", "quiet"}
        assert set(stored["regions"]["ribbon"]["velocity"]["coverage"]) == {"0.68", "0.9"}
        assert stored["registration"]["shift_applied"] == [True, False]
    assert stored["regions"]["ribbon"]["velocity"]["error"] is None
    assert stored["held_out"] is False  # nobody said that it was
    told = truth.assign_attrs(held_out=True)
    assert as_json(compare(map_around(truth), told))["held_out"] is True


def test_the_order_of_dimensions_does_not_matter(truth):
    usual = compare(map_around(truth, error=1.0), truth)
    turned = compare(map_around(truth, error=1.0).transpose("height", "x", "quantile", *FRAME[:2]), truth)
    assert usual.equals(turned)
