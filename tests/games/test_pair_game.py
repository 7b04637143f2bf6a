"""A pair's game on models: every coalition has the score of the pair that it stands for, and what cannot be played is
refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import families
import late
import numpy as np
import pytest
import tiny_parts
import torch
import zoo

from captum_m2ib import DualEncoder, PairGame, interactions
from captum_m2ib.encoders.spelling import blank_token
from captum_m2ib.engine.ground import ground_of
from captum_m2ib.scenes import CHECKPOINT
from captum_m2ib.scenes.drawing import draw_scenes, generator

CAPTION = "a red cross and a blue ring"


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint, torch_dtype=torch.float64)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


def play(encoder: DualEncoder, picture: np.ndarray, **options: Any) -> PairGame:
    return PairGame(encoder, encoder.prepare(picture, CAPTION), **options)


@pytest.mark.parametrize("absent", ["blank", "mask", 3])
def test_a_coalition_has_the_score_of_its_masked_pair(encoder: DualEncoder, picture: np.ndarray, absent: Any):
    game = play(encoder, picture, cell=(16, 32), absent=absent, internal_batch_size=2)
    assert (game.picture_players, game.caption_players, game.n_players) == (8, 7, 15)
    assert game.tokens == tuple(CAPTION.split()) and game.places.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    coalitions = np.random.default_rng(1).random((5, 15)) < 0.5
    pairs = encoder.prepare(picture, CAPTION)
    pixels, ids, (mask,) = *pairs.inputs, pairs.additional_forward_args
    expected = []
    for row in coalitions:
        shown, words, seen = pixels.clone(), ids.clone(), mask.clone()
        for player in range(8):
            if not row[player]:
                top, left = 16 * (player // 2), 32 * (player % 2)
                shown[..., top : top + 16, left : left + 32] = ground_of(pixels, None, 1)
        for token in range(7):
            if not row[8 + token] and absent == "mask":
                seen[0, 1 + token] = 0
            elif not row[8 + token]:
                words[0, 1 + token] = blank_token(encoder) if absent == "blank" else absent
        with torch.no_grad():
            expected.append(float(encoder(shown, words, seen)))
    np.testing.assert_allclose(game(coalitions), expected, rtol=0, atol=1e-12)
    assert game.passes == [5, 5]
    edges = game.scores(coalitions[:, :8], coalitions[:, 8:])
    np.testing.assert_allclose(np.diag(edges), expected, rtol=0, atol=1e-12)


def test_interactions_of_a_model_are_exact_where_all_coalitions_are_run(encoder: DualEncoder, picture: np.ndarray):
    found = interactions(encoder, picture, "a red cross", cell=(32, 32), budget=(16, 8), within=True, p=0.4)
    game = PairGame(encoder, encoder.prepare(picture, "a red cross"), cell=(32, 32))
    everything = np.array(list(product((False, True), repeat=7)))
    values = dict(zip(map(tuple, everything.tolist()), game(everything), strict=True))
    for patch, word in product(range(4), range(3)):
        others = [i for i in range(7) if i not in (patch, 4 + word)]
        total = 0.0
        for there in product((False, True), repeat=5):
            masks = np.zeros((4, 7), dtype=bool)
            masks[:, others] = there
            masks[:, (patch, 4 + word)] = [(True, True), (True, False), (False, True), (False, False)]
            one, two, three, four = (values[tuple(row)] for row in masks.tolist())
            total += np.prod(np.where(there, 0.4, 0.6)) * (one - two - three + four)
        np.testing.assert_allclose(found.fit.across[word, patch], total, rtol=0, atol=1e-12)
    assert found.settings["is_exact"] and 0 < found.explained_alone < found.explained <= 1
    np.testing.assert_allclose(found.score, game(np.ones(7))[0], atol=1e-12)
    assert found.map_of("red cross").tolist() == (found.map_of(1) + found.map_of(2)).tolist()
    assert found.words_of((1, 0)) == found.words_of(2)
    assert [token for token, _ in found.words_of(2)] == ["a", "red", "cross"]


def test_superpixels_are_players(encoder: DualEncoder, picture: np.ndarray):
    regions = np.full((64, 64), 7)
    regions[10:30, 5:40] = -3
    found = interactions(encoder, picture, "a red cross", feature_mask=regions, budget=(4, 8))
    assert found.fit.across.shape == (3, 2) and found.places.shape == (64, 64)
    assert (found.picture_map[10:30, 5:40] == found.fit.picture[0]).all()


@pytest.mark.parametrize("name", ["colpali", "colqwen2"])
def test_late_interaction_is_played_on_its_own_score(name: str, picture: np.ndarray):
    encoder = zoo.encoder_of(zoo.model_named(name), processor=getattr(late, name)())
    pairs = encoder.prepare(picture, "a red circle")
    game = PairGame(encoder, pairs)
    assert "red" in game.tokens
    everything = np.ones((1, game.n_players), dtype=bool)
    with torch.no_grad():
        expected = encoder(*pairs.inputs, *pairs.additional_forward_args)
    np.testing.assert_allclose(game(everything), expected.double(), rtol=1e-5)
    without = everything.copy()
    without[0, : game.picture_players // 2] = False
    assert game(without) != game(everything)


@pytest.mark.skipif(tiny_parts.LEGACY, reason="this transformers has no model that reads tiles")
def test_pages_that_come_as_tiles_are_refused(picture: np.ndarray):
    encoder = zoo.encoder_of(zoo.model_named("colmodernvbert"), processor=late.colmodernvbert())
    with pytest.raises(ValueError, match=r"^pairs: the model's processor cuts the picture into tiles"):
        interactions(encoder, picture, "a red circle")


def test_words_point_at_their_objects_on_the_trained_model():
    encoder = DualEncoder.from_pretrained(CHECKPOINT)
    scenes = draw_scenes(generator("token_probes", 77, 0), 8, 64, counts={2: 1.0})
    (scene,) = [one for one in scenes if len(set(one.word_objects) - {None}) == 2][:1]
    found = interactions(encoder, scene.image, scene.caption, cell=(16, 16), budget=(160, 256))
    for thing in (0, 1):
        words = [i for i, named in enumerate(scene.word_objects) if named == thing]
        heat = np.kron(found.map_of(words), np.ones((16, 16)))
        assert heat[scene.masks[thing]].mean() > heat[scene.masks[1 - thing]].mean()
        assert heat[scene.masks[thing]].mean() > heat[~scene.masks.any(0)].mean()


def test_what_cannot_be_played_is_refused_with_what_to_do(encoder: DualEncoder, picture: np.ndarray):
    two = encoder.prepare([picture, picture], CAPTION)
    with pytest.raises(ValueError, match=r"^pairs: a game is of one pair, got 2; pass pairs\.select"):
        PairGame(encoder, two)
    for options, told in (
        ({"absent": "nothing"}, "absent: expected 'blank', 'mask' or the id of a token, got 'nothing'"),
        ({"substrate": "noise"}, "substrate: expected 'zero', 'mean'"),
        ({"feature_mask": np.zeros((8, 8), dtype=int)}, r"feature_mask: expected integers.*\(64, 64\), got int64 of"),
        ({"feature_mask": np.zeros((64, 64), dtype=int), "cell": (8, 8)}, "cell: players are told by feature_mask"),
        ({"internal_batch_size": 0}, "internal_batch_size: expected a whole number of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=told):
            play(encoder, picture, **options)
    with pytest.raises(ValueError, match=r"coalitions: expected \(coalitions, 71\), 64 patches and 7 words"):
        play(encoder, picture)(np.ones(3))
    for options, told in (
        ({"p": 1}, "p: expected a probability between 0 and 1, got 1"),
        ({"budget": 5}, r"budget: expected \(masked pictures, masked captions\), got 5"),
        ({"budget": (40, 8)}, "budget: expected masked pictures that tell 65 coefficients apart, got 40"),
    ):
        with pytest.raises(ValueError, match=told):
            interactions(encoder, picture, CAPTION, **options)
    found = interactions(encoder, picture, "a red cross", cell=(32, 32), budget=(16, 8))
    for call in (lambda: found.map_of("blue"), lambda: found.map_of(3), lambda: found.words_of(4)):
        with pytest.raises(ValueError, match=r"^(words|tokens|player): "):
            call()


def test_models_whose_sides_read_each_other_are_refused():
    (family,) = (one for one in families.FAMILIES if one.name == "xclip")
    encoder = family.build().forward
    with pytest.raises(ValueError, match=r"^model: in .* one side reads what the other returns"):
        encoder.embed(0, torch.zeros(1, 2, 3, 32, 32))
