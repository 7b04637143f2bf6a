"""``captum-m2ib disent zero-shot`` on folders of scenes: the encoder's decisions, and names tried on new pictures."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from commands import Run, assert_one_line, runner
from PIL import Image

from captum_m2ib import DualEncoder
from captum_m2ib.disent.photographs import read_photographs
from captum_m2ib.disent.zero_shot_study import ZeroShotSettings, zero_shot_study
from captum_m2ib.scenes import CHECKPOINT
from captum_m2ib.scenes.drawing import draw_scenes, generator

KINDS = ("star", "ring", "heart")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes of one object per kind."""
    folder = tmp_path_factory.mktemp("scenes")
    counts = dict.fromkeys(KINDS, 0)
    rng = generator("validation", 3)
    while min(counts.values()) < 12:
        for scene in draw_scenes(rng, 64, counts={1: 1.0}):
            kind = scene.objects[0].shape
            if counts.get(kind, 12) < 12:
                (folder / kind).mkdir(exist_ok=True)
                Image.fromarray(scene.image).save(folder / kind / f"{counts[kind]}.png")
                counts[kind] += 1
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(capsys, monkeypatch, "disent")


def test_the_encoder_is_right_the_head_follows_and_names_are_tried_on_new_pictures(
    data: Path, tmp_path: Path, run: Run
):
    (tmp_path / "names.txt").write_text("red\nblue\na star\na ring\na heart\n\nred\n")
    mine = shutil.copytree(data, tmp_path / "data")
    (mine / "star" / "broken.png").write_bytes(b"no picture")
    given = ("zero-shot", "--data", mine, "--model", CHECKPOINT, "--names", tmp_path / "names.txt")
    result = run(*given, "--seeds", 2, "--epochs", 30, "--estimator", "max")
    assert result.status == 0, result.err
    encoder, head, agreement = (
        float(re.search(pattern, result.out)[1])  # type: ignore[index]
        for pattern in (r"encoder +top-1 ([\d.]+)", r"head +top-1 ([\d.]+)", r"as the encoder in ([\d.]+)")
    )
    assert encoder > 60 and head > 40 and agreement > 40
    assert len(re.findall(r"^channel +\d+[+-]: '(?:red|blue|a \w+)' with", result.out, re.M)) == 5


def test_a_seed_decides_everything_and_limits_are_per_class(data: Path):
    encoder = DualEncoder.from_pretrained(CHECKPOINT)
    photographs = read_photographs(data)
    found = zero_shot_study(encoder, photographs, ZeroShotSettings(seeds=1, epochs=2, limit=4))
    assert found["pictures"] == (12, 12)
    again = zero_shot_study(encoder, photographs, ZeroShotSettings(seeds=1, epochs=2, limit=4))
    assert again == found
    assert all(-1 <= value <= 1 for name in ("known", "new", "shuffled") for value in found[name])
    # Chosen where they follow best, they follow less elsewhere, and not at all by chance.
    assert found["known"][0] >= found["new"][0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("--names", "none.txt"), "--names: cannot read none.txt"),
        (("--template", "a photo"), "--template: expected a caption with"),
        (("--limit", 0), "--limit: expected a whole number"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(data: Path, run: Run, change: tuple[object, ...], expected: str):
    assert_one_line(run("zero-shot", "--data", data, "--model", CHECKPOINT, *change), expected)
