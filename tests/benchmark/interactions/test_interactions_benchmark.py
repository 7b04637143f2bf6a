"""What the benchmark measures: a map on the right object is right, and curves follow the game."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from captum_m2ib import DualEncoder, PairGame
from captum_m2ib.benchmark.interactions.measures import (
    FIGURES,
    OURS,
    Asked,
    HeldOut,
    Said,
    _curves,
    _foretold,
    _localised,
    _pair_interaction,
)
from captum_m2ib.benchmark.interactions.regression import centred
from captum_m2ib.cli import main
from captum_m2ib.scenes import pair_probes


def test_probes_name_two_objects_each_with_a_colour_and_a_shape():
    for scene in pair_probes(40, 3):
        asked = Asked.of(scene)
        assert [len(words) for words in asked.names] == [2, 2]
        for name, thing in enumerate(asked.objects):
            one = scene.objects[thing]
            assert asked.phrase(name).split()[1:] == [one.colour, one.shape]
    assert pair_probes(40, 3)[5].caption == pair_probes(6, 3)[5].caption


def test_maps_of_the_objects_themselves_are_perfect_and_swapped_ones_are_not():
    (scene,) = pair_probes(1, 0)
    asked = Asked.of(scene)
    masks = [scene.masks[thing].astype(float) for thing in asked.objects]
    right = _localised(Said(masks, None), asked)
    assert right == {"pointing": 1, "mass": 1, "auroc": 1, "own above other": 1}
    wrong = _localised(Said(masks[::-1], None), asked)
    assert wrong["mass"] == 0 and wrong["own above other"] == 0


def test_curves_are_those_of_the_game(checkpoint: Path):
    encoder = DualEncoder.from_pretrained(checkpoint)
    (scene,) = pair_probes(1, 0)
    game = PairGame(encoder, encoder.prepare(scene.image, scene.caption))
    order = np.random.default_rng(0).permutation(64)
    found = _curves(game, Said([], -order.astype(float).reshape(8, 8)), steps=2)
    words = np.ones((1, game.caption_players), dtype=bool)
    none, first, last, whole = (
        game.scores((order < limit)[None] if is_first else (order >= limit)[None], words)[0, 0]
        for limit, is_first in ((0, True), (32, True), (32, False), (64, True))
    )
    assert found["insertion"] == pytest.approx((none + 2 * first + whole) / 4)
    assert found["deletion"] == pytest.approx((none + 2 * last + whole) / 4)


def test_what_is_foretold_is_the_score_of_coalitions_that_no_fit_has_seen(checkpoint: Path):
    encoder = DualEncoder.from_pretrained(checkpoint)
    (scene,) = pair_probes(1, 0)
    game = PairGame(encoder, encoder.prepare(scene.image, scene.caption))
    held = HeldOut.of(game, 0)
    assert held.scores.shape == (256, 64)
    both = np.concatenate([held.pictures.masks[:5], held.captions.masks[:5]], 1)
    np.testing.assert_allclose(held.scores[range(5), range(5)], game(both), atol=1e-6)
    assert _foretold(Said([], None, lambda x, y: held.scores), held) == {"explained": 1, "ranks": 1}
    # Of no unit, only the order counts; nothing is said where nothing was.
    others = _foretold(Said([], None, lambda x, y: -7 * held.scores, has_unit=False), held)
    assert others["ranks"] == -1 and np.isnan(others["explained"])
    assert all(np.isnan(value) for value in _foretold(Said([], None), held).values())


def test_a_polynomial_of_presence_is_the_same_about_the_mean_coalition():
    generator = np.random.default_rng(0)
    alone, upper = generator.normal(size=5), np.triu(generator.normal(size=(5, 5)), 1)
    found = centred(0.3, alone, upper + upper.T, 3)
    there = (np.arange(32)[:, None] >> np.arange(5)) & 1 == 1
    expected = 0.3 + there @ alone + np.einsum("ci,ij,cj->c", there.astype(float), upper, there.astype(float))
    told = found.predict(there[:, :3], there[:, 3:]).diagonal()
    np.testing.assert_allclose(told, expected, atol=1e-12)
    assert found.mean == pytest.approx(expected.mean())


def test_pairs_of_a_map_of_words_and_patches_add_up(checkpoint: Path):
    encoder = DualEncoder.from_pretrained(checkpoint)
    (scene,) = pair_probes(1, 0)
    said = _pair_interaction(encoder, Asked.of(scene))
    assert said.scores is not None
    patches, words = np.ones((1, 64), dtype=bool), np.zeros((2, len(scene.words)), dtype=bool)
    for row, named in enumerate(Asked.of(scene).names):
        words[row, named] = True
    np.testing.assert_allclose(said.scores(patches, words)[0], [one.sum() for one in said.names], atol=1e-9)


def test_every_method_has_every_figure(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = ["benchmark", "interactions", "--model", str(checkpoint), "--output", str(tmp_path)]
    assert main([*given, "--probes", "1"]) == 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    for name in (
        OURS,
        "interactions-alone",
        "pair-interaction",
        "m2ib",
        "m2ib-phrase",
        "grad-eclip",
        "random",
    ):
        assert f"| `{name}` |" in table
    assert all(figure.short in table for figure in FIGURES)
    assert main([*given, "--probes", "0"]) == 2
    assert "--probes: expected at least 1, got 0" in capsys.readouterr().err
    assert main([*given, "--shapiq", "64", "1"]) == 2
    assert "--shapiq: expected at least 2 coalitions, got 1" in capsys.readouterr().err


@pytest.mark.slow
def test_pairs_within_each_side_are_a_row(checkpoint: Path, tmp_path: Path):
    given = ["benchmark", "interactions", "--model", str(checkpoint), "--output", str(tmp_path), "--probes", "1"]
    assert main([*given, "--within", "2100"]) == 0
    assert "| `interactions-within` |" in (tmp_path / "table.md").read_text(encoding="utf-8")
