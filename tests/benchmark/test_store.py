"""What is kept is what was measured, with the settings it was measured with, whole or not at all."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from captum_m2ib.benchmark.store import Store, write_atomically

SETTINGS = {"probes": 5, "split": "test"}
PART = ("model", "method", "localisation", 3)


def test_a_part_comes_back_as_it_was(tmp_path: Path):
    store = Store(tmp_path / "run", SETTINGS)
    figures = {"auroc": [0.1 + 0.2, 1 / 3, math.nan], "drop": [math.inf, -0.0, 7.0]}
    assert store.read(*PART, {"seed": 1}) is None
    store.write(*PART, {"seed": 1, "layers": (1, 2)}, figures)
    again = Store(tmp_path / "run", SETTINGS).read(*PART, {"seed": 1, "layers": (1, 2)})
    assert again is not None and again["auroc"][:2] == figures["auroc"][:2]
    # What is no number is no value.
    assert math.isnan(again["auroc"][2]) and math.isnan(again["drop"][0]) and again["drop"][1:] == [0.0, 7.0]
    assert store.read("model", "method", "localisation", 4, {}) is None


def test_other_settings_are_refused(tmp_path: Path):
    store = Store(tmp_path, SETTINGS)
    store.write(*PART, {"seed": 1}, {})
    with pytest.raises(ValueError, match=r"^--output: .*localisation-0003.json .*\(seed: 1 there, 2 here\)"):
        store.read(*PART, {"seed": 2})
    with pytest.raises(ValueError, match=r"run.json .*\(probes: 5 there, 6 here; more: None there, 1 here\)"):
        Store(tmp_path, {"probes": 6, "split": "test", "more": 1})
    assert Store(tmp_path, SETTINGS).read(*PART, {"seed": 1}) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}'])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, text: str):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"^--output: .*run.json"):
        Store(tmp_path, SETTINGS)
    assert (tmp_path / "run.json").read_text() == text


def test_a_folder_with_other_files_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"^--output: .* holds other files"):
        Store(tmp_path, SETTINGS)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_damaged_part_is_named(tmp_path: Path):
    store = Store(tmp_path, SETTINGS)
    store.write(*PART, {}, {"auroc": [1.0]})
    path = store.path(*PART)
    for text in (path.read_text()[:-3], '{"settings": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"localisation-0003.json .* delete it"):
            store.read(*PART, {})


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "part.json"
    write_atomically(path, "first")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "second")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["part.json"]
