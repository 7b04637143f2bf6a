"""Paired comparisons: right in closed form, for one model and for several, with values missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_m2ib.benchmark.compare import best_rival, estimate, paired
from captum_m2ib.metrics import summarise

NAN = float("nan")


def test_one_model_is_the_ordinary_bootstrap():
    values = np.random.default_rng(3).normal(1, 2, 40)
    ours, theirs = estimate(values, draws=500), summarise(values, draws=500)
    assert (ours.mean, ours.low, ours.high) == pytest.approx((theirs.mean, theirs.low, theirs.high), abs=1e-12)
    assert (ours.count, ours.omitted) == (40, 0)


def test_the_interval_is_as_wide_as_the_standard_error_says():
    rng = np.random.default_rng(0)
    theirs = rng.normal(0, 5, 400)
    ours = theirs + rng.normal(0.3, 1, 400)
    found = paired(ours, theirs)
    error = (ours - theirs).std() / 20
    assert found.mean == pytest.approx((ours - theirs).mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    # The probes' own spread, five times as large, cancels: unpaired, nothing would be clear.
    assert found.is_clear and found.count == 400


@pytest.mark.parametrize("by", [0.25, -0.25])
def test_a_constant_difference_is_certain(by: float):
    theirs = np.random.default_rng(0).random((2, 30))
    found = paired(theirs + by, theirs)
    assert (found.mean, found.low, found.high) == pytest.approx((by, by, by))
    assert found.is_clear and (found.agreeing, found.models) == (2, 2)


def test_no_difference_is_not_clear():
    found = paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == (0, 0, 0) and not found.is_clear
    assert str(found) == "+0.000 [+0.000, +0.000]"


def test_several_models_are_resampled_as_models():
    # Every probe of the second model is 1 ahead, none of the first: a draw of two models has 0, 1/2 or 1.
    ours, theirs = np.array([[0.0] * 50, [1.0] * 50]), np.zeros((2, 50))
    found = paired(ours, theirs)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    assert (found.agreeing, found.models) == (1, 2) and not found.is_clear


def test_probes_are_resampled_for_all_models_at_once():
    # The same probe is hard for every model, so that a second model tells nothing new about probes.
    values = np.random.default_rng(1).normal(0, 1, 60)
    one, three = estimate(values), estimate(np.stack([values] * 3))
    assert (three.mean, three.low, three.high) == pytest.approx((one.mean, one.low, one.high))


def test_means_weigh_what_is_there():
    found = estimate([[1.0, NAN, 3.0], [NAN, math.inf, 5.0]])
    assert (found.mean, found.count, found.omitted) == (3.0, 3, 3)
    difference = paired([[1.0, NAN, 3.0]], [[0.0, 9.0, NAN]])
    assert (difference.mean, difference.count) == (1.0, 1)


def test_nothing_has_no_mean():
    assert math.isnan(estimate([NAN, NAN]).mean)
    found = paired([1.0, NAN], [NAN, 1.0])
    assert math.isnan(found.mean) and not found.is_clear and found.models == 0


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_the_other_way_round_is_the_negative(pairs: list[tuple[float, float]]):
    ours, theirs = zip(*pairs, strict=True)
    one, other = paired(ours, theirs, draws=100), paired(theirs, ours, draws=100)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low), abs=1e-9)


def test_the_best_rival_is_best_in_the_figure_s_direction():
    figures = {"ours": [0.5, 0.6], "low": [0.1, 0.1], "high": [0.9, 0.8], "none": [NAN, NAN], "floor": [1.0, 1.0]}
    rivals = ["low", "high", "none", "absent", "ours"]
    high = best_rival(figures, "ours", rivals, 1, "pointing")
    assert high is not None and (high.figure, high.rival, high.ahead) == ("pointing", "high", False)
    assert high.difference.mean == pytest.approx(-0.3) and high.theirs.mean == pytest.approx(0.85)
    low = best_rival(figures, "ours", rivals, -1)
    assert low is not None and (low.rival, low.ahead) == ("low", False)
    alone = best_rival(figures, "ours", ["low"], 1)
    assert alone is not None and alone.ahead and alone.difference.is_clear


def test_without_ours_or_a_rival_there_is_no_comparison():
    assert best_rival({"ours": [1.0]}, "ours", ["ours", "absent"], 1) is None
    assert best_rival({"rival": [1.0]}, "ours", ["rival"], 1) is None
    assert best_rival({"ours": [NAN], "rival": [1.0]}, "ours", ["rival"], 1) is None


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match=r"^theirs: expected the probes of ours, shape \(1, 2\), got \(1, 3\)"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"^values: expected .* got shape \(1, 0\)"):
        estimate([])
    with pytest.raises(ValueError, match=r"^better: expected 1 .* got 0"):
        best_rival({"ours": [1.0]}, "ours", [], 0)
