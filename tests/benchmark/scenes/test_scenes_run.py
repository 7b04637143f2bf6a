"""A run can be stopped and goes on; what changes is refused; the better setting is chosen."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from captum_m2ib import DualEncoder
from captum_m2ib.benchmark.methods import Family, Method
from captum_m2ib.benchmark.scenes import run as scenes_run
from captum_m2ib.benchmark.scenes.measures import draw_probes
from captum_m2ib.benchmark.scenes.run import Plan, load_models, measure_all, run_settings, tune, write_tables
from captum_m2ib.benchmark.store import Store
from captum_m2ib.scenes import image_probes, token_probes

PLAN = Plan(probes=5, faithfulness=3, sanity=0, stability=2, robustness=0, repeats=0)


class Stub:
    """Maps from the inputs alone, and how often it was asked."""

    calls = 0
    fails_after = 10**9

    def __init__(self, encoder: Any, power: float = 1.0) -> None:
        self.power = power

    def attribute(self, inputs: Any, additional_forward_args: Any = None) -> Any:
        type(self).calls += 1
        if type(self).calls > self.fails_after:
            raise KeyboardInterrupt
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        maps = tuple((tensor.float() + 0.5).abs() ** self.power for tensor in tensors)
        return maps if isinstance(inputs, tuple) else maps[0]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stub, "calls", 0)
    monkeypatch.setattr(scenes_run, "BLOCK", 2)


def method(name: str, **setting: Any) -> Method:
    return Method(name, Family(name, Stub, constructed=("power",)), (setting, setting))


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint)


def models(encoder: DualEncoder, *names: str) -> Any:
    return load_models(names or ("model",), lambda _: encoder, PLAN)


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.*") if path.is_file()}


METHODS = [method("m2ib"), method("rival", power=0.5)]


def measured(folder: Path, encoder: DualEncoder) -> Any:
    store = Store(folder, run_settings(PLAN, "measure"))
    values = measure_all(models(encoder), METHODS, PLAN, store)
    write_tables(folder, models(encoder), METHODS, values)
    return values


def test_every_probe_of_every_group_is_measured(encoder: DualEncoder, tmp_path: Path):
    values = measured(tmp_path, encoder)
    assert list(values) == ["m2ib", "rival"]
    counts = {name: len(rows[0]) for name, rows in values["m2ib"].items()}
    assert counts["image auroc"] == counts["text auroc"] == 5
    assert counts["image deletion"] == counts["text deletion"] == 3
    assert counts["image seeds"] == 2 and "image infidelity" not in counts and "seconds per pair" not in counts
    # Blocks of 2, 2 and 1: two image maps and one of captions each, for all groups together.
    assert Stub.calls == 2 * 3 * 3
    rows = list(csv.DictReader((tmp_path / "figures.csv").read_text().splitlines()))
    assert len(rows) == sum(len(row) for found in values.values() for (row,) in found.values())


def test_an_interrupted_run_goes_on(encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured(tmp_path / "whole", encoder)
    whole = files(tmp_path / "whole")
    for after in (1, 5, 9):
        stopped = tmp_path / f"stopped{after}"
        monkeypatch.setattr(Stub, "calls", 0)
        monkeypatch.setattr(Stub, "fails_after", after)
        with pytest.raises(KeyboardInterrupt):
            measured(stopped, encoder)
        done = files(stopped)
        monkeypatch.setattr(Stub, "fails_after", 10**9)
        monkeypatch.setattr(Stub, "calls", 0)
        measured(stopped, encoder)
        # A block that was begun is begun again, one that was finished is not.
        assert Stub.calls == 18 - after // 3 * 3
        assert files(stopped) == whole
        assert done.items() <= whole.items()


def test_a_finished_run_is_only_read(encoder: DualEncoder, tmp_path: Path):
    first = measured(tmp_path, encoder)
    before = Stub.calls
    assert measured(tmp_path, encoder) == first and Stub.calls == before


def test_what_changed_is_refused(encoder: DualEncoder, tmp_path: Path):
    measured(tmp_path, encoder)
    store = Store(tmp_path, run_settings(PLAN, "measure"))
    with pytest.raises(ValueError, match=r"settings: \[\{'power': 0.5\}.* there, \[\{'power': 2.0\}.* here"):
        measure_all(models(encoder), [method("rival", power=2.0)], PLAN, store)
    with pytest.raises(ValueError, match="purpose: 'measure' there, 'tune' here"):
        Store(tmp_path, run_settings(PLAN, "tune"))
    other = models(encoder)
    with torch.no_grad():
        weight = next(encoder.parameters())
        weight.add_(1)
        try:
            with pytest.raises(ValueError, match=r"model: '[0-9a-f]{16}' there, '[0-9a-f]{16}' here"):
                measure_all(other, METHODS, PLAN, store)
        finally:
            weight.sub_(1)


def test_models_are_rows(encoder: DualEncoder, tmp_path: Path):
    several = models(encoder, "a/seed", "b/seed", "other")
    assert [model.name for model in several] == ["seed", "seed-2", "other"]
    values = measure_all(several, METHODS[:1], PLAN, Store(tmp_path, run_settings(PLAN, "measure")))
    rows = values["m2ib"]["image auroc"]
    assert len(rows) == 3 and rows[0] == rows[1] == rows[2]


def test_the_best_setting_of_each_modality_is_chosen(encoder: DualEncoder, tmp_path: Path):
    # Large and small values are exchanged, or nothing is told apart: the scores of these are known.
    family = Family(
        "stub", Stub, constructed=("power",), candidates=(({"power": -1.0}, {"power": 0.0}), ({"power": -1.0},))
    )
    store = Store(tmp_path, run_settings(PLAN, "tune"))
    chosen = tune(models(encoder), [family, Family("fixed", Stub)], PLAN, store)
    scores = {
        (r["modality"], r["setting"]): float(r["score"])
        for r in csv.DictReader((tmp_path / "tuning.csv").read_text().splitlines())
    }
    assert set(scores) == {
        ("image", "{}"),
        ("image", '{"power": -1.0}'),
        ("image", '{"power": 0.0}'),
        ("text", "{}"),
        ("text", '{"power": -1.0}'),
    }
    assert list(chosen) == ["stub"]
    for kind, setting in chosen["stub"].items():
        assert scores[kind, json.dumps(setting)] == max(score for (one, _), score in scores.items() if one == kind)
    assert json.loads((tmp_path / "settings.json").read_text()) == chosen


def test_the_published_setting_wins_ties(encoder: DualEncoder, tmp_path: Path):
    family = Family("stub", Stub, constructed=("power",), candidates=(({"power": 1.0},), ()))
    chosen = tune(models(encoder), [family], PLAN, Store(tmp_path, run_settings(PLAN, "tune")))
    assert chosen == {"stub": {"image": {}, "text": {}}}


def test_the_ground_reaches_the_probes(encoder: DualEncoder):
    drawn = {ground: draw_probes(encoder, 2, 0, ground) for ground in ("textured", "white")}
    for usual, white in zip(*(pictures + words for pictures, words in drawn.values()), strict=True):
        assert usual.caption == white.caption
        empty = ~white.scene.masks.any(0)
        assert (white.image[empty] == 255).mean() > 0.8 > (usual.image[empty] == 255).mean()


def test_the_validation_split_shares_no_scene_with_the_test_split():
    test, validation = Plan(seed=3), Plan(seed=3, split="validation")
    assert validation.probes_seed != test.probes_seed
    for draw in (image_probes, token_probes):
        scenes = [{probe.image.tobytes() for probe in draw(40, plan.probes_seed, 32)} for plan in (test, validation)]
        assert not scenes[0] & scenes[1]


def test_quick_is_less_of_the_same():
    quick, whole = Plan.quick(), Plan()
    assert quick.probes >= 100 and whole.probes >= 500
    assert all(0 < quick.counts()[group] < count for group, count in whole.counts().items())
    assert Plan.quick(probes=8).counts() == dict.fromkeys(whole.counts(), 8)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"probes": 0}, "--probes: expected at least 1, got 0"),
        ({"seed": -1}, "--seed: expected .* got -1"),
        ({"seed": 10**9}, "--seed: expected .* got 1000000000"),
        ({"split": "train"}, "--split: expected test or validation"),
        ({"ground": "lawn"}, "--ground: expected one of textured, plain"),
    ],
)
def test_a_plan_that_cannot_be(given: Any, says: str):
    with pytest.raises(ValueError, match=f"^{says}"):
        Plan(**given)
