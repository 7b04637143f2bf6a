"""``captum-m2ib disent`` on drawn pictures in folders: fit, go on, explain, prototypes, report, and bad data."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Run, assert_one_line, runner
from PIL import Image

from captum_m2ib.disent.compared import HEADS, candidates_for
from captum_m2ib.disent.scores import interval, peak_gib, shown_interval
from captum_m2ib.disent.study import Study

KINDS = {"<b>red & co": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200)}
BACKBONE = "tiny_backbone:make"
SOURCE = """
import torch
from torch import nn
from captum_m2ib.disent.named import Preparation

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return net, Preparation(side=32)
"""


def draw(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    """A noisy picture with a square of a colour somewhere in it."""
    random = np.random.default_rng(seed)
    pixels = random.integers(90, 150, (40, 48, 3), dtype=np.uint8)
    top, left = random.integers(0, 20, 2)
    pixels[top : top + 20, left : left + 20] = colour
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def draw_set(folder: Path, count: int = 10) -> Path:
    for number, (kind, colour) in enumerate(KINDS.items()):
        for index in range(count):
            draw(folder / kind / f"{index}.png", colour, 100 * number + index)
    return folder


def width_of(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.width


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures in ``data``, the backbone's module, and a fitted study in ``study``."""
    folder = tmp_path_factory.mktemp("disent")
    draw_set(folder / "data")
    (folder / "tiny_backbone.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert fit_quietly(folder) == 0
    return folder


def fit_quietly(folder: Path) -> int:
    from captum_m2ib.cli import main

    return main([str(one) for one in arguments(folder / "data", folder / "study", 2)])


def arguments(data: Path, output: Path, seeds: int = 1) -> list[object]:
    settings = ("--seeds", seeds, "--epochs", 20, "--epic-epochs", 2, "--lr", 0.05)
    return ["disent", "fit", "--data", data, "--backbone", BACKBONE, "--layer", "1", "--output", output, *settings]


@pytest.fixture
def run(fitted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(fitted)
    return runner(capsys, monkeypatch)


@pytest.fixture
def study(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(fitted)
    return Study.open(fitted / "study", BACKBONE)


def test_every_head_is_fitted_and_learns_what_colours_tell(study: Study):
    figures = study.figures()
    assert list(figures) == list(HEADS) and all(len(rows) == 2 for rows in figures.values())
    assert len(study.train) == 21 and len(study.test) == 9
    assert min(row["top1"] for row in figures["infodisent"]) > 0.6
    assert all(0 <= row["purity"] <= 1 and row["halves"] >= 1 for rows in figures.values() for row in rows)


@pytest.mark.parametrize("name", HEADS)
def test_contributions_sum_to_the_logit(study: Study, name: str):
    model = study.model(name)
    image = study.backbone.preparation.tensor(study.backbone.preparation.crop(study.photographs.picture(0)))[None]
    found = model.contributions(image, 1)
    total = (found.positive + found.negative).sum(1) + found.bias
    torch.testing.assert_close(total, model(image)[:, 1].detach(), rtol=1e-4, atol=1e-4)
    assert all(row["residual"] < 1e-4 for row in study.figures()[name])


def test_epic_keeps_the_probe(study: Study):
    probe, epic = study.model("linear probe").predict(study.test), study.model("epic").predict(study.test)
    torch.testing.assert_close(epic, probe, rtol=1e-4, atol=1e-4)
    assert all(row["lossless"] < 1e-4 for row in study.figures()["epic"])


def test_a_probe_on_means_is_a_probe_on_maps(study: Study):
    model = study.model("linear probe")
    expected = study.test.features.mean((2, 3)) / model.head.scale @ model.head.class_weight.T + model.head.class_bias
    torch.testing.assert_close(model.predict(study.test), expected.detach(), rtol=1e-4, atol=1e-4)


def test_a_second_fit_reads_no_picture_and_changes_no_figure(run: Run, fitted: Path, study: Study):
    before = {path.name: path.read_bytes() for path in (fitted / "study" / "figures").iterdir()}
    study.collect()
    assert study.cached.read_now == 0
    result = run(*arguments(fitted / "data", fitted / "study", 2))
    assert result.status == 0 and "top-1" not in result.out
    assert {path.name: path.read_bytes() for path in (fitted / "study" / "figures").iterdir()} == before


def test_features_are_made_again_where_a_shard_is_damaged_or_a_picture_changed(fitted: Path, tmp_path: Path, run: Run):
    shutil.copytree(fitted / "study", tmp_path / "study")
    shutil.copytree(fitted / "data", tmp_path / "data", copy_function=shutil.copy2)
    (shard,) = (tmp_path / "study" / "features").iterdir()
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(bytes(content))
    damaged = Study.open(tmp_path / "study", BACKBONE, str(tmp_path / "data"))
    damaged.collect()
    assert damaged.cached.read_now == 30
    draw(tmp_path / "data" / "green" / "0.png", (1, 2, 3), 7)
    assert_one_line(run(*arguments(tmp_path / "data", tmp_path / "study", 2)), "--output: .* another photographs")


def test_an_interrupted_fit_goes_on_with_the_next_head(fitted: Path, tmp_path: Path, run: Run):
    shutil.copytree(fitted / "study", tmp_path / "study")
    (tmp_path / "study" / "figures" / "infodisent-1.json").unlink()
    result = run(*arguments(fitted / "data", tmp_path / "study", 2))
    assert result.status == 0 and result.out.count("top-1") == 1
    first, again = (
        json.loads((folder / "study" / "figures" / "infodisent-1.json").read_text()) for folder in (fitted, tmp_path)
    )
    assert again["top1"] == first["top1"] and again["purity"] == pytest.approx(first["purity"])


def test_one_picture_is_explained(run: Run, fitted: Path, tmp_path: Path):
    output = tmp_path / "why.png"
    given = (fitted / "study", fitted / "data" / "green" / "0.png", "--backbone", BACKBONE, "--output", output)
    result = run("disent", "explain", *given, "--class", "green")
    assert result.status == 0 and result.out.startswith("class    green, logit ") and "channel  " in result.out
    assert width_of(output) > 200
    assert_one_line(run("disent", "explain", *given, "--class", "grene"), "--class: .*nearest names are green")


def test_prototypes_of_a_class_are_drawn(run: Run, fitted: Path, tmp_path: Path):
    output = tmp_path / "class.png"
    result = run(
        "disent", "prototypes", fitted / "study", "--backbone", BACKBONE, "--class", "blue", "--output", output
    )
    assert result.status == 0 and width_of(output) > 200


def test_the_page_escapes_names_and_needs_no_other_file(run: Run, fitted: Path):
    result = run("disent", "report", fitted / "study", "--backbone", BACKBONE)
    assert result.status == 0
    page = (fitted / "study" / "report.html").read_text(encoding="utf-8")
    assert "<b>red" not in page and "&lt;b&gt;red &amp; co" in page
    assert "data:image/jpeg" in page and "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert re.search(r"top-1 [\d.]+ %\.\s+EPIC changes no logit", page)
    for name in HEADS:
        assert f'<th scope="row">{name}</th>' in page


def test_a_folder_does_not_make_code_run(run: Run, fitted: Path):
    assert_one_line(run("disent", "report", fitted / "study"), "--backbone: .* whose code is not run")


def test_bad_pictures_become_rows(run: Run, tmp_path: Path):
    data = tmp_path / "data"
    draw_set(data / "train", 6)
    draw_set(data / "test", 3)
    for index in range(3):
        draw(data / "test" / "green" / f"{index}.png", KINDS["green"], 900 + index)
    (data / "train" / "empty").mkdir()
    draw(data / "test" / "stranger" / "0.png", (9, 9, 9), 5)
    whole = (data / "train" / "green" / "0.png").read_bytes()
    (data / "train" / "green" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with Image.open(data / "train" / "green" / "1.png") as picture:
        picture.convert("L").save(data / "train" / "green" / "grey.png")
    result = run(*arguments(data, tmp_path / "study"))
    assert result.status == 0, result.err
    told = {kind: where for kind, where, _ in json.loads((tmp_path / "study" / "study.json").read_text())["problems"]}
    assert told["empty class"] == "empty" and told["test only"] == "stranger"
    assert told["unreadable"] == "train/green/cut.png" and told["no colour"] == "train/green/grey.png"
    # Red and blue are drawn alike for both splits.
    assert told["in both splits"].startswith("test/")
    assert "unreadable: train/green/cut.png: " in result.err and "Traceback" not in result.err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"--data": "nowhere"}, "--data: there is no folder"),
        ({"--backbone": "net"}, "--backbone: expected timm:NAME"),
        ({"--backbone": "tiny_backbone:nothing"}, "--backbone: tiny_backbone has no function nothing"),
        ({"--backbone": "timm:no_such_net"}, "--backbone: cannot make timm:no_such_net"),
        ({"--layer": "9"}, ".*9"),
        ({"--seeds": 0}, "--seeds"),
        ({"--test-share": 1.5}, "--test-share"),
        ({"--options": "x"}, "--options: expected NAME=VALUE"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(
    run: Run, fitted: Path, tmp_path: Path, change: dict[str, object], expected: str
):
    given = arguments(fitted / "data", tmp_path / "study")
    assert_one_line(run(*given, *(part for pair in change.items() for part in pair)), expected)


def test_folders_without_what_is_needed_are_refused(run: Run, tmp_path: Path):
    (tmp_path / "data" / "one").mkdir(parents=True)
    assert_one_line(run(*arguments(tmp_path / "data", tmp_path / "study")), "--data: .* holds no folder with pictures")
    draw(tmp_path / "data" / "one" / "0.png", (1, 2, 3), 0)
    assert_one_line(run(*arguments(tmp_path / "data", tmp_path / "study")), "--data: expected at least 2 classes")
    draw(tmp_path / "data" / "two" / "0.png", (1, 2, 3), 1)
    assert_one_line(run(*arguments(tmp_path / "data", tmp_path / "study")), "--data: no class of .* to test on")
    for kind in ("one", "two"):
        for index in range(2):
            (tmp_path / "data" / kind / f"{index}.png").write_bytes(b"no picture")
    assert_one_line(run(*arguments(tmp_path / "data", tmp_path / "study")), "--data: not one of 4 pictures can be read")


def test_settings_are_chosen_on_pictures_held_back_from_training(fitted: Path, tmp_path: Path, run: Run):
    result = run(*arguments(fitted / "data", tmp_path / "study"), "--choose", "--epochs", 4)
    assert result.status == 0, result.err
    for name in ("infodisent", "no-bottleneck", "linear-probe"):
        told = json.loads((tmp_path / "study" / "chosen" / f"{name}.json").read_text())
        assert told["losses"][told["chosen"]] == min(told["losses"].values())
        figures = json.loads((tmp_path / "study" / "figures" / f"{name}-0.json").read_text())
        assert figures["chosen"] == told["chosen"] and 0 <= figures["held_back"] <= 1
    assert not (tmp_path / "study" / "chosen" / "epic.json").exists()
    assert "soft places" not in candidates_for("no bottleneck")
    assert "a price on weights" not in candidates_for("linear probe")


def test_a_backbone_is_trained_from_nothing_once(fitted: Path, tmp_path: Path, run: Run):
    small = ("img_size=16", "patch_size=4", "depth=1", "embed_dim=12", "num_heads=2", "class_token=false")
    vit = ("--backbone", "timm:vit_tiny_patch16_224", "--layer", "norm", "--options", *small, "global_pool=avg")
    quick = ("--train-backbone", 30, "--seeds", 1, "--epochs", 2, "--epic-epochs", 1)
    fit = ("disent", "fit", "--data", fitted / "data", *vit, *quick, "--output", tmp_path / "study")
    result = run(*fit)
    assert result.status == 0, result.err
    told = json.loads((tmp_path / "study" / "study.json").read_text())
    assert told["own"] > 0.6 and told["grid"] == [12, 4, 4]
    weights = (tmp_path / "study" / "backbone.safetensors").stat().st_mtime_ns
    assert run(*fit).status == 0
    assert (tmp_path / "study" / "backbone.safetensors").stat().st_mtime_ns == weights
    assert_one_line(run(*fit, "--weights", "net.safetensors"), "--train-backbone: starts from nothing")
    assert_one_line(run(*fit, "--backbone", BACKBONE), "--train-backbone: .* Python function")


def test_memory_is_told_where_the_system_tells_it(monkeypatch: pytest.MonkeyPatch):
    assert 0.05 < peak_gib() < 100
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_gib() is None


def test_interval_is_students():
    assert shown_interval([0.5], 1) == "0.5" and shown_interval([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
