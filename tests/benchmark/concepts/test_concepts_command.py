"""``captum-m2ib benchmark concepts`` on drawn photographs with masks and a tiny classifier that sees colours."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from coco_cases import annotation, polygon, write_coco
from commands import Run, assert_one_line, runner
from torch import nn

from captum_m2ib.benchmark.concepts.questions import fitting_classes
from captum_m2ib.benchmark.concepts.run import methods_on
from captum_m2ib.disent import InfoDisent

BACKBONE = "colour_classifier:make"
SOURCE = """
import torch
from torch import nn
from captum_m2ib.disent.named import Preparation

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return net, Preparation(side=32)
"""


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    boxes = [annotation(number, 1, polygon((40, 20, 70, 60))) for number in range(1, 7)]
    write_coco(tmp_path / "data", boxes, pictures=6)
    (tmp_path / "colour_classifier.py").write_text(SOURCE)
    (tmp_path / "classes.txt").write_text("red circle, dot\nsquare\nstar\n")
    monkeypatch.chdir(tmp_path)
    return runner(capsys, monkeypatch, "benchmark")


ASKED = ("concepts", "--data", "data", "--backbone", BACKBONE, "--layer", "1", "--classes", "classes.txt")
QUICK = ("--crops", 4, "--epochs", 5, "--rank", 3)


def test_every_method_is_measured_on_the_same_questions(run: Run, tmp_path: Path):
    result = run(*ASKED, *QUICK, "--output", "out")
    assert result.status == 0, result.err
    assert "asked     6 things in 6 of 6 photographs" in result.out and "agreement " in result.out
    with (tmp_path / "out" / "figures.csv").open() as file:
        rows = list(csv.DictReader(file))
    methods = {row["method"] for row in rows}
    assert {"infodisent", "infodisent, margin", "grad-cam", "integrated gradients", "centre"} <= methods
    assert len({row["value"] for row in rows if row["figure"] == "image auroc" and row["method"] == "centre"}) == 1
    assert "infodisent" in (tmp_path / "out" / "table.md").read_text()


def test_a_category_fits_classes_that_end_in_its_name():
    classes = ["African elephant, Loxodonta africana", "elephant seal", "tusker", "Elephant"]
    assert fitting_classes("elephant", classes) == [0, 3]


def test_maps_of_the_head_sum_to_its_logit_and_point_where_the_mask_is():
    net = nn.Sequential(nn.Conv2d(3, 2, 8, 8, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        net[0].weight.zero_()[0, 0] = 1.0
        net[0].weight[1, 1] = 1.0
    images = torch.zeros(1, 3, 32, 32)
    images[0, 0, 8:16, 16:24] = 1.0
    model = InfoDisent(net.eval(), "1", 2, channels=2, transform="none", standardise="none", weight="relu")
    with torch.no_grad():
        model.head.raw_weight.copy_(torch.eye(2))
    target = torch.tensor([0])
    for name, maps_of in methods_on(model).items():
        found = maps_of(images, target)
        assert found.shape == (1, 32, 32), name
        if name != "centre":
            row, column = divmod(int(found[0].argmax()), 32)
            assert 8 <= row < 16 and 16 <= column < 24, name
    total = methods_on(model)["infodisent"](images, target).sum()
    torch.testing.assert_close(total, model(images)[0, 0].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("--rank", 0), "--rank: expected at least 1"),
        (("--classes", "none.txt"), "--classes: cannot read none.txt"),
        (("--classes", "colour_classifier.py"), "--classes: expected a name for each of the classifier's 3 outputs"),
        (("--backbone", "net"), "--backbone: expected timm:NAME"),
        (("--data", "nowhere"), "--data: nowhere is not a directory"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(run: Run, change: tuple[object, ...], expected: str):
    assert_one_line(run(*ASKED, *QUICK, *change), expected)


def test_a_classifier_that_knows_nothing_of_the_photographs_is_refused(run: Run, tmp_path: Path):
    (tmp_path / "others.txt").write_text("a\nb\nc\n")
    assert_one_line(run(*ASKED, *QUICK, "--classes", "others.txt"), "--rank: the classifier names nothing")
