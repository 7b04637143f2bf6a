"""Remove and retrain on scenes: maps that are known to be right or wrong, fits that can be counted, broken runs."""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from captum_m2ib import DualEncoder
from captum_m2ib.benchmark.roar import run as study
from captum_m2ib.benchmark.roar.command import add_roar
from captum_m2ib.benchmark.roar.report import draw, is_beyond_random, render, write_table
from captum_m2ib.benchmark.roar.run import (
    FineTuning,
    Settings,
    batches,
    draw_pairs,
    retrieval,
    run,
    true_maps,
)
from captum_m2ib.cli import main
from captum_m2ib.metrics import RetrainCell, RetrainTable
from captum_m2ib.metrics.retrain_table import RetrainRow
from captum_m2ib.scenes import CHECKPOINT

TINY = Settings(methods=(), fractions=(0.3,), seeds=2, training=32, held_out=32, epochs=1, batch_size=16)


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return DualEncoder.from_pretrained(CHECKPOINT)


class Fake:
    """A method with given maps, which counts its calls."""

    settings = ({}, {})

    def __init__(self, image: Any, text: Any) -> None:
        self.image, self.text, self.calls = image, text, 0

    def __call__(self, encoder: DualEncoder) -> Any:
        return SimpleNamespace(attribute=self.attribute)

    def attribute(self, inputs: tuple[Tensor, Tensor], additional_forward_args: Any = None) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return self.image(inputs[0]), self.text(inputs[1]).float()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Maps that prefer the picture's upper left and the caption's first words."""
    made = Fake(
        lambda pixels: torch.arange(pixels[0, 0].numel(), 0, -1.0).view(1, 1, *pixels.shape[2:]).expand(pixels.shape),
        lambda ids: torch.arange(ids.shape[1], 0, -1).expand(ids.shape),
    )
    monkeypatch.setitem(study.METHODS, "fake", made)
    return made


@pytest.fixture
def stub_fit(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Tensor, ...], int]]:
    """Fits that learn nothing and are written down; their model is a number made from what they were given."""
    seen: list[tuple[tuple[Tensor, ...], int]] = []

    def fit(self: FineTuning, train: tuple[Tensor, ...], seed: int) -> float:
        seen.append((train, seed))
        return 1 + seed / 10 + float(train[0].abs().mean()) + float((train[1] == 0).float().mean())

    monkeypatch.setattr(FineTuning, "_fit", fit)
    monkeypatch.setattr(study, "held_out_loss", lambda model, test: model)
    monkeypatch.setattr(study, "retrieval", lambda model, test: model + float(test[0].abs().mean()))
    return seen


def test_what_the_caption_names_is_needed_and_random_patches_are_not(encoder: DualEncoder, tmp_path: Path):
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    results = run(encoder, tmp_path, TINY)
    assert list(results) == [(a, b) for a in ("image", "text") for b in ("roar_plus", "roar")]
    for modality in ("image", "text"):
        values = {
            (protocol, cell.method, cell.seed): cell.value
            for protocol in ("roar", "roar_plus")
            for cell in results[modality, protocol].cells
        }
        for seed in (1, 2):
            accuracy = [values["roar", method, seed] for method in ("truth", "random", "intact")]
            # Among 32 pairs chance is 1/32.
            assert accuracy[0] < accuracy[1] - 0.25 and accuracy[1] <= accuracy[2]
            assert accuracy[2] > 0.9
            assert math.isfinite(values["roar_plus", "truth", seed]) and values["roar_plus", "intact", seed] == 0
    assert all(tensor.equal(before[name]) for name, tensor in encoder.model.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.model.parameters())


def test_a_seed_decides_the_fit(encoder: DualEncoder):
    scenes = draw_pairs(32, 5, 64)
    pairs = encoder.prepare([scene.image for scene in scenes], [scene.caption for scene in scenes])
    fits = [FineTuning(encoder.model, Settings(epochs=1, batch_size=16)) for _ in range(2)]
    first, again, other = (
        fit(pairs.inputs, seed).state_dict() for fit, seed in ((fits[0], 1), (fits[1], 1), (fits[1], 2))
    )
    assert all(tensor.equal(again[name]) for name, tensor in first.items())
    assert any(not tensor.equal(other[name]) for name, tensor in first.items())
    # What is kept is the fit itself, until it is forgotten.
    kept = fits[0](pairs.inputs, 1)
    assert fits[0](tuple(tensor.clone() for tensor in pairs.inputs), 1) is kept
    fits[0].forget()
    assert fits[0](pairs.inputs, 1) is not kept


def test_batches_come_from_the_seed_alone():
    def rows(pairs: int, size: int, epochs: int, seed: int) -> list[list[int]]:
        return [part.tolist() for part in batches(pairs, size, epochs, seed)]

    found = rows(10, 4, 3, 7)
    assert found == rows(10, 4, 3, 7) != rows(10, 4, 3, 8)
    assert [len(part) for part in found] == [4] * 6
    # Within an epoch no pair comes twice, and epochs differ.
    assert all(len({*a, *b}) == 8 for a, b in zip(found[::2], found[1::2], strict=True))
    assert len({tuple(a + b) for a, b in zip(found[::2], found[1::2], strict=True)}) == 3
    assert sorted(row for part in rows(8, 4, 1, 0) for row in part) == list(range(8))
    assert [len(part) for part in rows(3, 4, 2, 0)] == [3, 3]


def test_every_method_is_fitted_with_the_same_seeds_and_both_protocols_share_a_fit(
    encoder: DualEncoder, tmp_path: Path, fake: Fake, stub_fit: list[Any]
):
    results = run(encoder, tmp_path, Settings(("fake",), (0.1, 0.5), seeds=3, training=40, held_out=8))
    # Per modality: intact once, and truth, fake and random at two shares; 3 seeds of each.
    assert len(stub_fit) == 2 * 3 * (1 + 3 * 2)
    assert [seed for _, seed in stub_fit] == [1, 2, 3] * (len(stub_fit) // 3)
    pixels, ids = stub_fit[0][0]
    for (train, _), modality in zip(stub_fit, [0] * 21 + [1] * 21, strict=True):
        assert train[1 - modality].equal((pixels, ids)[1 - modality])
    for table in results.values():
        assert {cell.seed for cell in table.cells} == {1, 2, 3}
        assert {(cell.method, cell.fraction) for cell in table.cells} == {
            ("intact", 0.0),
            *((method, share) for method in ("truth", "fake", "random") for share in (0.1, 0.5)),
        }


def test_whole_patches_and_words_are_replaced(encoder: DualEncoder, tmp_path: Path, fake: Fake, stub_fit: list[Any]):
    run(encoder, tmp_path, Settings(("fake",), (0.25,), seeds=2, training=40, held_out=8))
    pixels, ids = stub_fit[0][0]
    changed = [train for train, _ in stub_fit if not (train[0].equal(pixels) and train[1].equal(ids))]
    mean = pixels.mean((0, 2, 3))[:, None, None]
    images = [train[0] for train in changed if train[1].equal(ids)]
    texts = [train[1] for train in changed if train[0].equal(pixels)]
    assert len(images) == len(texts) == 6 and len(changed) == 12
    for image in images:
        replaced = (image == mean).all(1).unfold(1, 8, 8).unfold(2, 8, 8).flatten(3).all(3)
        assert (replaced.flatten(1).sum(1) == 16).all()
    # The fake's are the two upper rows of patches, each seed alike.
    upper = pixels.clone()
    upper[:, :, :16] = mean
    assert sum(image.equal(upper) for image in images) == 2
    assert encoder.processor.tokenizer.pad_token_id == 0
    words = (ids != 0).sum(1) - 2
    for text in texts:
        blank = (text == 0) & (ids != 0)
        assert blank.sum(1).equal((words * 0.25).round().long())
        # Start and end tokens stay.
        assert not blank[ids == 2].any() and not blank[ids == 3].any()
    first = torch.arange(ids.shape[1])[None] <= (words * 0.25).round()[:, None]
    first[:, 0] = False
    assert sum(text.equal(ids.masked_fill(first, 0)) for text in texts) == 2


def test_an_interrupted_run_ends_as_an_undisturbed_one(
    encoder: DualEncoder, tmp_path: Path, fake: Fake, stub_fit: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(study, "_EXPLAINED_AT_ONCE", 8)
    settings = Settings(("fake",), (0.2, 0.3), seeds=2, training=12, held_out=4)
    expected = run(encoder, tmp_path / "undisturbed", settings)
    wanted, asked, fit = len(stub_fit), fake.calls, FineTuning._fit
    assert wanted == 2 * 2 * (1 + 3 * 2) and asked == 2
    stub_fit.clear()
    fake.calls = 0

    # Cut short while maps are made, and at every ninth fit.
    def failing_map(*_: Any, **__: Any) -> Any:
        if fake.calls:
            raise RuntimeError("out of memory")
        return type(fake).attribute(fake, *_, **__)

    with monkeypatch.context() as broken:
        broken.setattr(fake, "attribute", failing_map)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(encoder, tmp_path / "disturbed", settings)
    assert not stub_fit and not list((tmp_path / "disturbed" / "maps").glob("*.part"))
    tries = 0

    def failing_fit(self: FineTuning, *given: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries % 9 == 0:
            raise RuntimeError("out of memory")
        return fit(self, *given)

    monkeypatch.setattr(FineTuning, "_fit", failing_fit)
    for _ in range(20):
        try:
            found = run(encoder, tmp_path / "disturbed", settings)
            break
        except RuntimeError:
            assert not (tmp_path / "disturbed" / "roar.csv").exists()
    assert found == expected
    # A fit is made again only where a protocol had not read it yet.
    assert wanted < tries <= wanted + 5 * (tries // 9)
    assert fake.calls == asked
    for name in ("roar.csv", "image-roar.json", "text-roar-plus.json"):
        assert (tmp_path / "disturbed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    # Once more: everything is there, and other shares only add.
    tries = 0
    assert run(encoder, tmp_path / "disturbed", settings) == expected and tries == 0
    more = Settings(("fake",), (0.2, 0.3, 0.4), seeds=2, training=12, held_out=4)
    for _ in range(20):
        try:
            grown = run(encoder, tmp_path / "disturbed", more)
            break
        except RuntimeError:
            pass
    assert set(expected["image", "roar"].cells) < set(grown["image", "roar"].cells)
    assert fake.calls == asked


def test_another_run_in_the_folder_is_refused(
    encoder: DualEncoder, tmp_path: Path, stub_fit: list[Any], monkeypatch: pytest.MonkeyPatch
):
    small = {"methods": (), "fractions": (0.5,), "seeds": 2, "training": 8, "held_out": 4}
    run(encoder, tmp_path, Settings(**small))
    count = len(stub_fit)
    for changes, named in (
        ({"epochs": 3}, "epochs"),
        ({"lr": 1e-3, "scenes": 4}, "lr, scenes"),
        ({"training": 9}, "training"),
    ):
        with pytest.raises(ValueError, match=f"output: .* holds a run with another {named}; choose another folder"):
            run(encoder, tmp_path, Settings(**{**small, **changes}))
    other = DualEncoder.from_pretrained(CHECKPOINT)
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    with pytest.raises(ValueError, match="holds a run with another model"):
        run(other, tmp_path, Settings(**small))
    assert len(stub_fit) == count
    assert "model" in json.loads((tmp_path / "settings.json").read_text())


def test_truth_is_where_the_named_objects_are():
    scenes = draw_pairs(70, 3, 32)
    pictures, words = true_maps(scenes, 30)
    assert pictures.shape == (70, 32, 32) and words.shape == (70, 30)
    unnamed = 0
    for scene, picture, row in zip(scenes, pictures.numpy(), words, strict=True):
        named = {index for index in scene.word_objects if index is not None}
        unnamed += len(named) < len(scene.objects)
        for index, mask in enumerate(scene.masks):
            assert (picture[mask] == (1 if index in named else 0)).all()
        assert picture.sum() == sum(scene.masks[index].sum() for index in named)
        assert [scene.words[i - 1] for i in row.nonzero().flatten().tolist()] == [
            word for word, index in zip(scene.words, scene.word_objects, strict=True) if index is not None
        ]
    assert unnamed
    assert [scene.caption for scene in draw_pairs(3, 3, 32)] == [scene.caption for scene in scenes[:3]]
    assert draw_pairs(3, 4, 32)[0].caption != scenes[0].caption or not np.array_equal(
        draw_pairs(3, 4, 32)[0].image, scenes[0].image
    )


def test_retrieval_by_hand(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study, "embed_images", lambda model, pixels: pixels)
    monkeypatch.setattr(study, "embed_texts", lambda model, ids: ids)
    captions = torch.eye(4)
    pictures = captions[[0, 1, 3, 3]]
    assert retrieval(None, (pictures, captions)) == 0.75
    # Two captions of which nothing is left are the same: neither is found.
    captions[1] = captions[0]
    assert retrieval(None, (captions, captions)) == 0.5
    # 64 and 2 pairs: a caption of the other set is no rival.
    many = torch.eye(66)
    many[65] = many[0]
    assert retrieval(None, (many, many)) == 1


def table(protocol: str, **values: tuple[float, float]) -> RetrainTable:
    cells = [RetrainCell("intact", 0.0, seed, 1.0) for seed in (1, 2)]
    cells += [RetrainCell(name, 0.2, seed, value) for name, row in values.items() for seed, value in enumerate(row, 1)]
    return RetrainTable(protocol, tuple(cells))


def test_only_an_interval_wholly_on_the_better_side_is_beyond_random():
    def row(low: float, high: float) -> RetrainRow:
        return RetrainRow("m", 0.2, (low + high) / 2, low, high, 5, 0)

    assert is_beyond_random(row(0.01, 1), "roar_plus") and not is_beyond_random(row(0.01, 1), "roar")
    assert is_beyond_random(row(-1, -0.01), "roar") and not is_beyond_random(row(-1, -0.01), "roar_plus")
    for protocol in ("roar", "roar_plus"):
        assert not is_beyond_random(row(-0.5, 1), protocol) and not is_beyond_random(row(math.nan, math.nan), protocol)


def test_report(tmp_path: Path):
    results = {
        ("image", "roar_plus"): table("roar_plus", truth=(0.5, 0.51), m=(0.3, -0.2), random=(0.1, 0.1)),
        ("image", "roar"): table("roar", truth=(0.2, 0.21), m=(0.9, 0.8), random=(0.9, 0.9)),
    }
    text = render(results)
    assert "| truth | 0.505 [0.441, 0.569] |" in text and "| truth | +0.405 [+0.341, +0.469] * |" in text
    assert "| truth | -0.695 [-0.759, -0.631] * |" in text
    assert text.count(" * |") == 2 and text.count("intact 1.000") == 1
    write_table(tmp_path / "roar.csv", results)
    with (tmp_path / "roar.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["protocol"], row["method"], row["beyond_random"]) for row in rows] == [
        (protocol, *row)
        for protocol in ("roar_plus", "roar")
        for row in (("intact", ""), ("truth", "true"), ("m", "false"), ("random", ""))
    ]
    assert float(rows[1]["minus_random"]) == pytest.approx(0.405) and rows[3]["minus_random"] == ""
    axes = draw(results).axes
    assert [one.get_title(loc="left").split(":")[1] for one in axes] == [" ROAR+", " ROAR"]
    for one, (_, values) in zip(axes, results.items(), strict=True):
        drawn = {bars.get_label(): bars.lines[0].get_ydata()[0] for bars in one.containers}
        means = {row.method: row.mean for row in values.summary()}
        assert drawn == {name: pytest.approx(means[name]) for name in ("truth", "m", "random")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("m2ib", "nothing")}, "methods: expected different ones of m2ib, .* got m2ib, nothing"),
        ({"methods": ("random",)}, "methods: expected different ones"),
        ({"methods": ("m2ib", "m2ib")}, "methods: expected different ones"),
        ({"fractions": ()}, "fractions: expected shares above 0 and at most 1"),
        ({"fractions": (0.0,)}, "fractions: expected shares above 0 and at most 1"),
        ({"seeds": 1}, "seeds: expected 2 or more, got 1"),
        ({"training": 1}, "training: expected 2 or more, got 1"),
        ({"held_out": 0}, "held_out: expected 2 or more, got 0"),
        ({"scenes": -1}, "scenes: expected 0 or more, got -1"),
        ({"epochs": 0}, "epochs: expected 1 or more, got 0"),
        ({"batch_size": 1}, "batch_size: expected 2 or more, got 1"),
        ({"lr": 0.0}, "lr: expected a rate above 0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


def test_the_sub_command(tmp_path: Path, fake: Fake, stub_fit: list[Any], encoder: DualEncoder):
    parser = argparse.ArgumentParser()
    asked = []
    add_roar(parser.add_subparsers(required=True), lambda given: asked.append(given.model) or encoder)
    chosen = ["--methods", "fake", "--fractions", "0.2", "0.4", "--seeds", "3", "--training", "8", "--held-out", "4"]
    given = parser.parse_args(["roar", "--output", str(tmp_path), *chosen, "--scenes", "6", "--model", "there"])
    given.run(given)
    assert asked == ["there"] and len(stub_fit) == 2 * 3 * (1 + 3 * 2)
    assert json.loads((tmp_path / "settings.json").read_text())["scenes"] == 6


def test_the_help_names_the_defaults(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["benchmark", "roar", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    usual = Settings()
    for several in (usual.methods, usual.fractions):
        assert f"(default: {' '.join(map(str, several))})" in shown
    for name in ("seeds", "training", "held_out", "scenes"):
        start = shown.rindex(f"--{name.replace('_', '-')} ")
        assert f"(default: {getattr(usual, name)})" in shown[start:].split(" --")[0], name


def test_the_command_line_does_not_wait_for_what_only_a_run_needs():
    code = "import sys, captum_m2ib.benchmark.roar.command; print({'torch', 'captum', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_command(tmp_path: Path, fake: Fake, stub_fit: list[Any], capsys: pytest.CaptureFixture[str]):
    chosen = ["--methods", "fake", "--fractions", "0.2", "--seeds", "2", "--training", "8", "--held-out", "4"]
    assert main(["benchmark", "roar", "--output", str(tmp_path / "out"), *chosen]) == 0
    shown = capsys.readouterr().out
    assert "text: ROAR, top-1" in shown and f"written  {tmp_path / 'out' / 'roar.csv'}" in shown
    assert (tmp_path / "out" / "roar.png").read_bytes().startswith(b"\x89PNG")
    assert len(stub_fit) == 2 * 2 * 4
    # What is named wins over the small run's settings.
    assert main(["benchmark", "roar", "--output", str(tmp_path / "quick"), "--quick", *chosen]) == 0
    assert len(stub_fit) == 2 * 2 * 2 * 4
    for wrong in (["--seeds", "1"], ["--methods", "nothing"], ["--model", str(tmp_path / "nowhere")]):
        assert main(["benchmark", "roar", "--output", str(tmp_path / "wrong"), *wrong]) == 2
        assert capsys.readouterr().err.startswith("captum-m2ib: ")
    assert not (tmp_path / "wrong").exists()
