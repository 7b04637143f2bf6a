"""The command ``benchmark speed``."""

from __future__ import annotations

import pytest
from commands import Result, Run, assert_told


def test_speed(run: Run, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr("captum_m2ib.benchmark.speed.ways.measure", lambda *given: calls.append(given) or "report")
    monkeypatch.setattr("captum_m2ib.benchmark.speed.ways.render", lambda report: f"table of the {report}")
    options = ("--repeats", 2, "--batch", 5, "--layer", 1, "--device", "cpu")
    assert run("benchmark", "speed", *options) == Result(0, "table of the report\n", "")
    monkeypatch.setattr("captum_m2ib.benchmark.speed.ways.write", lambda *given: calls.append(given))
    assert run("benchmark", "speed", "--csv", "costs.csv").status == 0
    assert calls == [(2, 5, 1, "cpu"), (3, 8, 9, "cpu"), ("report", "costs.csv")]


@pytest.mark.parametrize("name", ["repeats", "batch"])
def test_speed_with_arguments_that_cannot_be(run: Run, name: str):
    assert_told(run("benchmark", "speed", f"--{name}", 0), rf"{name}: expected at least 1, got 0")
