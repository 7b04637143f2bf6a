"""Training: it learns, resumes exactly, and refuses what it cannot do."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck
from captum_m2ib.scenes import (
    build_model,
    evaluate_naming,
    evaluate_retrieval,
    load_checkpoint,
    train,
    training,
)

TINY: dict[str, Any] = {
    "batch_size": 16,
    "warmup_steps": 2,
    "model_options": {
        "image_size": 32,
        "patch_size": 16,
        "vision_width": 32,
        "vision_layers": 1,
        "text_width": 32,
        "text_layers": 1,
        "projection": 16,
    },
    "device": "cpu",
    "workers": 0,
    "report_sets": 1,
    "report_trials": 8,
    "show_progress": False,
}


def recommended(encoder: DualEncoder) -> list[tuple[Any, str]]:
    method = MultiModalInfoBottleneck(encoder)
    return [(prior, layer.name) for prior, layer in zip(method.priors, method.layers, strict=True)]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Makes drawing the batch of step 5 stop the training, until undone."""
    draw = training.draw_batch

    def stop(*args: Any, **kwargs: Any) -> Any:
        if kwargs["purpose"] == "training" and kwargs["index"] == 5:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(training, "draw_batch", stop)
    return monkeypatch


def test_loss_knows_nothing_at_first_and_everything_when_aligned() -> None:
    same, scale = torch.ones(8, 4) / 2, torch.tensor(math.log(100.0))
    assert float(training.contrastive_loss(same, same, scale)) == pytest.approx(math.log(8))
    assert float(training.contrastive_loss(torch.eye(4), torch.eye(4), scale)) == pytest.approx(0, abs=1e-6)


def test_naming_loss_leaves_out_what_is_also_true() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures, names = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (3, 5))
    kinds = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    logits = 2 * pictures @ names.T
    terms = []
    for i, k in kinds.nonzero().tolist():
        row = [logits[i, k], *(logits[i, j] for j in range(5) if not kinds[i, j])]
        column = [logits[i, k], *(logits[j, k] for j in range(3) if not kinds[j, k])]
        terms += [torch.stack(choices).logsumexp(0) - choices[0] for choices in (row, column)]
    loss = training.naming_loss(pictures, names, kinds, torch.tensor(math.log(2.0)))
    assert float(loss) == pytest.approx(float(torch.stack(terms).mean()))


def test_training_reduces_the_loss_and_writes_a_checkpoint(tmp_path: Path) -> None:
    first = train(tmp_path / "short", steps=1, **TINY)
    output = tmp_path / "long"
    report = train(output, steps=30, lr=5e-3, **TINY)
    assert report["loss"] < first["loss"]
    assert json.loads((output / "report.json").read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long", "short"]
    model, _ = load_checkpoint(output)
    encoder = DualEncoder.from_pretrained(output)
    assert recommended(encoder)[1][0] is encoder.statistics["text_model.embeddings"]
    assert evaluate_retrieval(model, sets=1) == report["retrieval"]
    assert evaluate_naming(model, 8) == report["naming"]


def test_the_ground_reaches_training_report_and_statistics(tmp_path: Path) -> None:
    reports = {name: train(tmp_path / name, steps=2, ground=name, **TINY) for name in ("plain", "textured")}
    assert reports["plain"]["settings"]["ground"] == "plain"
    assert reports["plain"]["loss"] != reports["textured"]["loss"]
    model, _ = load_checkpoint(tmp_path / "plain")
    assert evaluate_retrieval(model, sets=1, ground="plain") == reports["plain"]["retrieval"]
    first, second = (DualEncoder.from_pretrained(tmp_path / name).statistics for name in reports)
    layer = "vision_model.embeddings"
    assert not torch.equal(first[layer].mean, second[layer].mean)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, interrupt: pytest.MonkeyPatch) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        train(broken, steps=8, save_every=3, **TINY)
    assert not broken.exists() and broken.with_name("broken.training.safetensors").exists()
    interrupt.undo()
    resumed = train(broken, steps=8, save_every=3, **TINY)
    straight = train(whole, steps=8, save_every=3, **TINY)
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert {**resumed, "seconds": 0} == {**straight, "seconds": 0}
    assert not broken.with_name("broken.training.safetensors").exists()


def test_other_settings_cannot_resume(tmp_path: Path, interrupt: pytest.MonkeyPatch) -> None:
    output = tmp_path / "output"
    with pytest.raises(KeyboardInterrupt):
        train(output, steps=8, save_every=3, **TINY)
    interrupt.undo()
    with pytest.raises(ValueError, match=r"settings: .* lr=0.002, steps=8; got lr=0.1, steps=9; pass"):
        train(output, steps=9, lr=0.1, **TINY)
    assert train(output, steps=2, resume=False, **TINY)["settings"]["steps"] == 2


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    alone = train(tmp_path / "alone", steps=3, **TINY)
    helped = train(tmp_path / "helped", steps=3, **{**TINY, "workers": 1})
    assert {**alone, "seconds": 0} == {**helped, "seconds": 0}


def test_progress_and_report_are_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "output", steps=2, **{**TINY, "show_progress": True})
    out, err = capfd.readouterr()
    assert "held-out retrieval among 256 captions" in out and "naming, one of 8 captions" in out
    assert "loss=" in err and "top1=" in err


def test_output_is_not_replaced_unasked(tmp_path: Path) -> None:
    train(tmp_path / "output", steps=1, **TINY)
    with pytest.raises(FileExistsError, match=r"output: expected a path that does not exist"):
        train(tmp_path / "output", steps=1, **TINY)
    assert train(tmp_path / "output", steps=2, overwrite=True, **TINY)["settings"]["steps"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"expected training to stay finite"):
        train(tmp_path / "output", steps=4, lr=1e30, **TINY)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size: expected 2 or more, got 1"):
        train(tmp_path / "output", steps=1, **{**TINY, "batch_size": 1})
    with pytest.raises(ValueError, match=r"bf16, compile: expected False on cpu"):
        train(tmp_path / "output", steps=1, bf16=True, **TINY)
    with pytest.raises(ValueError, match=r"^ground: expected one of textured, plain, .*got 'lawn'"):
        train(tmp_path / "output", steps=1, ground="lawn", **TINY)
    assert not list(tmp_path.iterdir())


def test_rate_rises_and_falls() -> None:
    rates = [training.rate_at(step, 100, 10) for step in range(100)]
    assert rates[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert rates[10] == 1 and all(a > b for a, b in pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.01


def test_untrained_model_is_at_chance() -> None:
    model = build_model(**TINY["model_options"])
    retrieval, naming = evaluate_retrieval(model, sets=2), evaluate_naming(model, 200)
    assert retrieval["top1"] < 0.05 and retrieval["top5"] < 0.1
    assert abs(naming["accuracy"] - 1 / 8) < 5 * math.sqrt(1 / 8 * 7 / 8 / 200)
