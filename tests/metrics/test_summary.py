"""One figure out of many: the mean, an interval as wide as its error, and a count of what has no value."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import captum_m2ib
from captum_m2ib.metrics import Summary, summarise


def test_interval_is_as_wide_as_the_error_of_the_mean():
    values = np.random.default_rng(0).normal(2, 3, 400)
    found = summarise(torch.from_numpy(values))
    assert found.mean == pytest.approx(values.mean()) and (found.count, found.omitted) == (400, 0)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(400), rel=0.05)
    assert found.low < found.mean < found.high
    assert summarise(values.tolist()) == found and summarise(values.tolist(), seed=1) != found


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_interval_lies_within_the_values(values):
    found = summarise(values, draws=200)
    assert min(values) - 1e-12 <= found.low <= found.high <= max(values) + 1e-12


def test_constant_values_have_no_interval():
    assert summarise([0.25] * 7) == Summary(0.25, 0.25, 0.25, 7, 0) == summarise(torch.full((7,), 0.25))


def test_the_policy_decides_about_nan_and_counts_it():
    values = torch.tensor([1.0, torch.nan, 3.0, torch.nan, 2.0])
    found = summarise(values)
    assert (found.mean, found.count, found.omitted) == (2.0, 3, 2)
    assert (found.low, found.high) == (summarise([1.0, 3.0, 2.0]).low, summarise([1.0, 3.0, 2.0]).high)
    assert str(found) == f"2.000 [{found.low:.3f}, {found.high:.3f}] (2 of 5 without a value)"
    spread = summarise(values, nan_policy="propagate")
    assert math.isnan(spread.mean) and math.isnan(spread.low) and (spread.count, spread.omitted) == (3, 2)
    with pytest.raises(ValueError, match="values: expected no NaN, got 2 among 5 examples"):
        summarise(values, nan_policy="raise")
    assert math.isnan(summarise(torch.full((3,), torch.nan)).mean)


def test_draws_in_parts_cover_all_draws(monkeypatch):
    values = np.random.default_rng(1).random(50)
    whole = summarise(values.tolist(), draws=997)
    monkeypatch.setattr("captum_m2ib.metrics.summary._AT_ONCE", 50 * 100)
    parts = summarise(values.tolist(), draws=997)
    assert parts.low == pytest.approx(whole.low, abs=0.01) and parts.high == pytest.approx(whole.high, abs=0.01)


@pytest.mark.parametrize("values", [[], torch.ones(2, 2), torch.tensor(1.0)])
def test_values_must_be_one_per_example(values):
    with pytest.raises(ValueError, match=r"values: expected one value per example, \(N,\), at least one"):
        summarise(values)


def test_unknown_settings():
    with pytest.raises(ValueError, match="nan_policy: expected one of"):
        summarise([1.0], nan_policy="ignore")
    with pytest.raises(ValueError, match="draws: expected a number of at least 1"):
        summarise([1.0], draws=0)


def test_metrics_are_imported_without_what_only_some_of_them_need():
    heavy = ["captum", "sklearn", "scipy", "transformers", "matplotlib", "PIL"]
    code = f"import sys, captum_m2ib.metrics; print([name for name in {heavy} if name in sys.modules])"
    path = os.pathsep.join([str(Path(captum_m2ib.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
