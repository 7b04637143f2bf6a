"""``captum-m2ib benchmark scenes`` on small models: what it prints and writes, what it refuses, and that it goes on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Run, assert_one_line, runner
from PIL import Image

from captum_m2ib.benchmark.scenes import run as scenes_run
from captum_m2ib.benchmark.tables import WIDTH
from captum_m2ib.scenes import build_model, image_probes, save_checkpoint

FEW = ("--method", "relevance", "centre", "--without-cost")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return runner(capsys, monkeypatch, "benchmark", "scenes")


def test_the_shipped_model(run: Run, tmp_path: Path):
    status, out, err = run("--probes", 1, *FEW)
    assert (status, err) == (0, "")
    folder = tmp_path / "benchmark-scenes"
    lines = out.splitlines()
    assert max(map(len, lines[:-1])) <= WIDTH
    for head in ("localisation, pictures", "localisation, words", "faithfulness", "sanity", "robustness"):
        assert any(line.startswith(head) for line in lines), head
    assert lines[-1].startswith("written") and {path.name for path in folder.iterdir()} == {
        "run.json",
        "parts",
        "figures.csv",
        "probes.csv",
        "summary.csv",
        "table.md",
        "examples.png",
    }
    rows = list(csv.DictReader((folder / "figures.csv").read_text().splitlines()))
    assert {row["model"] for row in rows} == {"shipped"}
    assert {row["method"] for row in rows} == {"relevance", "centre"}
    assert sum(row["figure"] == "image auroc" for row in rows) == 2
    with Image.open(folder / "examples.png") as page:
        assert np.asarray(page).std() > 10
    asked = list(csv.DictReader((folder / "probes.csv").read_text().splitlines()))
    assert [row["kind"] for row in asked] == ["image", "text"] and {row["probe"] for row in asked} == {"0"}
    probe = image_probes(1, seed=0)[0]
    assert (asked[0]["caption"], asked[0]["other caption"]) == (probe.caption, probe.wrong_caption)
    assert f"{asked[0]['colour']} {asked[0]['shape']}" in probe.caption
    assert float(asked[0]["area"]) == pytest.approx(probe.mask.mean(), abs=1e-4)
    assert asked[1]["colour"] in asked[1]["caption"] and 0 < int(asked[0]["ground"]) < 255
    # Again: nothing is measured, all is the same.
    before = {path: path.stat().st_mtime_ns for path in (folder / "parts").rglob("*.json")}
    assert run("--probes", 1, *FEW).out == out
    assert {path: path.stat().st_mtime_ns for path in (folder / "parts").rglob("*.json")} == before
    assert_one_line(run("--probes", 3, *FEW), r"--output: .*run.json .*probes: 1 there, 3 here")


def test_models_of_any_size_are_averaged(run: Run, tmp_path: Path):
    sizes = {"vision_width": 32, "vision_layers": 2, "text_width": 32, "text_layers": 2, "projection": 16}
    for seed, name in enumerate(("first", "second")):
        save_checkpoint(build_model(image_size=32, seed=seed, **sizes), tmp_path / name)
    models = ("--model", tmp_path / "first", tmp_path / "second")
    given = ("--probes", 1, *models, "--method", "m2ib", "legrad", "--without-cost", "--output", "run")
    status, out, err = run(*given)
    assert (status, err) == (0, "") and "of 2 models)" in out
    rows = list(csv.DictReader((tmp_path / "run" / "summary.csv").read_text().splitlines()))
    assert {row["count"] for row in rows if row["figure"] == "image auroc"} == {"2"}


def test_tuned_settings_can_be_used(run: Run, checkpoint: Path, tmp_path: Path):
    given = ("--model", checkpoint, "--probes", 1)
    status, out, err = run(*given, "--tune", "--method", "relevance", "legrad", "centre", "--output", "tuned")
    assert (status, err) == (0, "") and out.startswith("relevance")
    chosen = json.loads((tmp_path / "tuned" / "settings.json").read_text())
    assert set(chosen) == {"relevance", "legrad"}
    (tmp_path / "tuned" / "settings.json").write_text(json.dumps({"relevance": {"image": {"layer": 0}, "text": {}}}))
    options = ("--settings", tmp_path / "tuned" / "settings.json", "--without-cost", "--output", "run")
    assert run(*given, *options, "--method", "relevance-tuned", "relevance").status == 0
    assert_one_line(
        run(*given, *options, "--method", "legrad-tuned"), r"--method: expected some of .*, got legrad-tuned\."
    )


def test_an_interrupted_run_says_how_to_go_on(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes_run, "measure_all", stop)
    status, out, err = run("--model", checkpoint, "--probes", 1, "--output", "run")
    assert (status, out) == (130, "") and "same command again" in err


@pytest.mark.parametrize(
    "given, says",
    [
        (("--probes", 0), "--probes: expected at least 1, got 0"),
        (("--seed", -1), "--seed: expected .* got -1"),
        (("--method", "m2ib", "magic"), "--method: expected some of m2ib, .*, got magic"),
        (("--model", "./none"), r"model: ./none is not a directory"),
        (("--settings", "none"), ".*none"),
    ],
)
def test_arguments_that_cannot_be(run: Run, tmp_path: Path, given: tuple[Any, ...], says: str):
    assert_one_line(run(*given, "--output", "run"), says)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_files_is_left_alone(run: Run, checkpoint: Path, tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    assert_one_line(run("--model", checkpoint, "--output", "thesis"), r"--output: thesis holds other files")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]
