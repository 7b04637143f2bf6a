"""The experiments: data with the right labels, a quick run whose figures are all there, and their arithmetic."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest
import torch

from captum_m2ib.disent import backbones, experiments
from captum_m2ib.disent.backbones import OneTask, digits, scenes, train_backbone
from captum_m2ib.scenes.captions import COLOURS, SHAPES
from captum_m2ib.scenes.drawing import _RGB, draw_scenes, generator


def test_scenes_are_labelled_by_their_largest_object():
    data = scenes(0, train=60, test=40)
    assert len(data.train) == 60 and data.test.masks.shape == (40, 32, 32)
    assert not torch.equal(data.train.images[:40], data.test.images)
    for image, mask, colour in zip(data.test.images, data.test.masks, data.test.labels["colour"], strict=True):
        # The labelled object's pixels are nearest to its own colour in hue.
        pixels = ((image.permute(1, 2, 0)[mask] + 1) * 127.5).numpy()
        median = np.median(pixels, 0)
        nearest = min(COLOURS, key=lambda name: float(np.linalg.norm(median - _RGB[name])))
        assert nearest == COLOURS[int(colour)]
    drawn = draw_scenes(generator("held_out", 0), 256, 32, counts=backbones._OBJECTS)
    clear = [
        scene for scene in drawn if len(scene.masks) == 1 or not 1 / 1.3 < np.divide(*scene.masks.sum((1, 2))) < 1.3
    ]
    assert 40 < len(clear) < 256 and {len(scene.masks) for scene in clear} == {1, 2}
    for row, scene in zip(range(40), clear, strict=False):
        largest = max(range(len(scene.masks)), key=lambda index: scene.masks[index].sum())
        assert SHAPES[int(data.test.labels["shape"][row])] == scene.objects[largest].shape
        assert np.array_equal(data.test.masks[row].numpy(), scene.masks[largest])


def test_digits_are_split_and_enlarged():
    data = digits(0)
    assert (len(data.train), len(data.test)) == (1258, 539)
    assert data.train.images.shape[1:] == (1, 16, 16)
    assert float(data.train.images.min()) == -1 and float(data.train.images.max()) == 1
    assert not torch.equal(data.train.images[:50], digits(1).train.images[:50])
    assert torch.equal(data.train.images[..., ::2, ::2], data.train.images[..., 1::2, 1::2])


def test_without_scikit_learn_the_digits_say_so(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"^scikit-learn: .* pip install scikit-learn"):
        digits(0)


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_a_seed_decides_a_backbone(kind):
    data = scenes(0, train=64, test=32)
    before = torch.random.get_rng_state()
    trained = [train_backbone(kind, data, seed, 1) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    logits = [OneTask(one, "colour")(data.test.images).detach() for one in trained]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_a_backbone_learns():
    data = scenes(0, train=384, test=100)
    logits = OneTask(train_backbone("cnn", data, 0, 6), "colour")(data.test.images).detach()
    assert float((logits.argmax(1) == data.test.labels["colour"]).float().mean()) > 0.3


def test_a_run_holds_every_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "LAYERS", {"cnn": "trunk"})
    kept = ("infodisent", "no transform", "linear probe")
    monkeypatch.setattr(experiments, "VARIANTS", {name: experiments.VARIANTS[name] for name in kept})
    check_quick_run(tmp_path, capsys)


@pytest.mark.slow
def test_a_whole_quick_run_holds_every_figure(tmp_path, capsys):
    check_quick_run(tmp_path, capsys)


def check_quick_run(tmp_path, capsys):
    output = tmp_path / "figures" / "scenes.json"
    experiments.main(["scenes", "--seeds", "2", "--output", str(output), "--quick"])
    report = json.loads(output.read_text())
    assert report["seeds"] == 2 and set(report["figures"]) == set(experiments.LAYERS)
    for tasks in report["figures"].values():
        assert set(tasks) == {"shape", "colour"}
        for figures in tasks.values():
            assert set(figures) == {*experiments.VARIANTS, "backbone", "epic", "maps"}
            for variant in experiments.VARIANTS:
                assert len(figures[variant]["accuracy"]["values"]) == 2
                assert figures[variant]["orthogonality error"]["mean"] < 1e-5
            assert figures["epic"]["accuracy"]["values"] == figures["backbone"]["accuracy"]["values"]
            assert {"purity of prototypes", "information", "gap"} <= set(figures["infodisent"])
            assert {"grad-cam", "chance", "infodisent, exact"} <= set(figures["maps"])
            chance = figures["maps"]["chance"]
            assert 0.02 < chance["pointing"]["mean"] < 0.2 and chance["pointing"] == chance["relevance mass"]
            for name, values in figures["maps"].items():
                assert name == "chance" or set(values) == {"pointing", "relevance mass", "deletion", "insertion"}
                assert all(0 <= found["mean"] <= 1 for found in values.values())
    printed = capsys.readouterr().out
    assert "scenes: 2 seeds" in printed and "grad-cam" in printed and "linear probe" in printed


def test_cost_covers_every_parametrisation(tmp_path):
    report = experiments.run("cost", 1, tmp_path / "cost.json", quick=True, progress=False)
    cells = {(row["channels"], row["transform"]) for row in report["cost"]}
    assert len(cells) == 8 and all(row["orthogonality error"] < 1e-5 for row in report["cost"])
    assert experiments.render(report).count("s per step") == 8


def test_summaries_are_means_and_deviations_over_seeds():
    found = experiments.summarise([{"a": {"b": 1.0}}, {"a": {"b": 3.0}}])
    assert found == {"a": {"b": {"mean": 2.0, "std": pytest.approx(2**0.5), "values": [1.0, 3.0]}}}
    assert experiments.summarise([{"a": 5.0}])["a"] == {"mean": 5.0, "std": 0.0, "values": [5.0]}


def test_seeds_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^seeds: expected 1 or more, got 0"):
        experiments.run("scenes", 0, tmp_path / "none.json")
