"""The benchmark on pages: its figures by hand, a run that goes on, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from commands import Run

from captum_m2ib import DualEncoder
from captum_m2ib.benchmark.methods import METHODS, Family, Method
from captum_m2ib.benchmark.pages.measures import Plan, measure, measure_all, run_settings
from captum_m2ib.benchmark.parts import Model
from captum_m2ib.benchmark.store import Store
from captum_m2ib.scenes import CHECKPOINT
from captum_m2ib.scenes.pages import PAGES_CHECKPOINT, page_probes


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return DualEncoder.from_pretrained(PAGES_CHECKPOINT)


class Knowing:
    """Marks the truth when asked for words, and one corner when asked for the query; on a ground of 5."""

    def __init__(self, encoder: DualEncoder, layers: object = None) -> None:
        self.forward_func = encoder

    def attribute(self, inputs: torch.Tensor, additional_forward_args: tuple) -> torch.Tensor:
        found = torch.full_like(inputs, 5.0)
        if len(additional_forward_args) < 5:
            found[:, :, 0, 0] += 3
            return found
        for row, probe in zip(found, page_probes(len(inputs)), strict=True):
            row[:, torch.from_numpy(probe.page.mask(probe.kind))] += 3
        return found


def test_figures_of_a_map_that_knows_the_truth(encoder: DualEncoder):
    found = measure(Method("knowing", Family("knowing", Knowing)), encoder, page_probes(3))
    # The least value is taken off, so that all of the mass lies on the truth.
    assert found["words pointing"] == found["words mass"] == found["words auroc"] == [1.0] * 3
    assert found["query mass"] == [0.0] * 3


def refuse(*_: object) -> None:
    raise AssertionError("measured again")


def test_a_run_goes_on_where_it_stopped(encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, plan = Model("pages", "", encoder), Plan(probes=4)
    store = Store(tmp_path, run_settings(model, plan))
    methods = [METHODS["similarity-map"], METHODS["centre"]]
    found = measure_all(model, methods, plan, store)
    monkeypatch.setattr("captum_m2ib.benchmark.pages.measures.measure", refuse)
    assert measure_all(model, methods, plan, store) == found
    assert [len(row) for (row,) in found["similarity-map"].values()] == [4] * 7


def test_the_command(run: Run, tmp_path: Path):
    target = tmp_path / "out"
    status, out, err = run(
        "benchmark", "pages", "--probes", "2", "--method", "similarity-map", "random", "--output", target
    )
    assert status == 0, err
    assert "the words that name it" in out and "the whole query" in out
    assert {path.name for path in target.iterdir()} >= {"figures.csv", "summary.csv", "table.md", "examples.png"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--model", CHECKPOINT), r"--model: expected one of late interaction"),
        (("--probes", "0"), r"--probes: expected at least 1, got 0"),
        (("--method", "guess"), r"--method: expected some of m2ib"),
    ],
)
def test_what_is_refused(run: Run, tmp_path: Path, options: tuple, says: str):
    status, _, err = run("benchmark", "pages", *options, "--output", tmp_path / "out")
    assert status == 2 and re.search(says, err), err
