"""Probes: what they call ground truth is true of the scene."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from captum_m2ib.scenes import COLOURS, SHAPES, image_probes, naming_trials, token_probes
from captum_m2ib.scenes.drawing import Scene

N = 100


def named_pairs(caption: str) -> list[tuple[str, str]]:
    words = caption.split()
    return [(shape, colour) for colour, shape in pairwise(words) if shape in SHAPES]


def pairs_of(scene: Scene) -> list[tuple[str, str]]:
    return [(thing.shape, thing.colour) for thing in scene.objects]


def test_image_probes_name_exactly_the_target() -> None:
    for probe in image_probes(N, 0):
        pairs = pairs_of(probe.scene)
        assert 2 <= len(pairs) <= 4
        assert named_pairs(probe.caption) == [pairs[probe.target]]
        assert named_pairs(probe.wrong_caption) == [pairs[probe.wrong_target]]
        assert probe.target != probe.wrong_target
        assert np.array_equal(probe.mask, probe.scene.masks[probe.target]) and probe.mask.any()
        assert np.array_equal(probe.wrong_mask, probe.scene.masks[probe.wrong_target])
        assert {i for i in probe.scene.word_objects if i is not None} == {probe.target}
        assert tuple(probe.caption.split()) == probe.scene.words


def test_token_probes_name_one_present_and_one_absent_object() -> None:
    orders = set()
    for probe in token_probes(N, 0):
        scene = probe.scene
        shape, colour = probe.absent
        assert 2 <= len(scene.objects) <= 4
        assert shape in SHAPES and all(shape != thing.shape for thing in scene.objects)
        assert colour in COLOURS and all(colour != thing.colour for thing in scene.objects)
        target = scene.objects[probe.target]
        assert [scene.words[i] for i in probe.present_words] == [target.colour, target.shape]
        assert [scene.words[i] for i in probe.absent_words] == [colour, shape]
        assert sorted(named_pairs(probe.caption)) == sorted([(target.shape, target.colour), probe.absent])
        assert [i for i, index in enumerate(scene.word_objects) if index is not None] == list(probe.present_words)
        orders.add(probe.present_words < probe.absent_words)
    assert orders == {True, False}


def test_naming_trials_have_one_true_caption_and_three_near_ones() -> None:
    for trial in naming_trials(N, 0):
        pairs = pairs_of(trial.scene)
        named = [pair for caption in trial.captions for pair in named_pairs(caption)]
        assert len(trial.captions) == len(named) == len(set(named)) == 8
        right = named.pop(trial.correct)
        assert right == pairs[trial.target]
        assert trial.captions[trial.correct] == trial.scene.caption
        assert not set(named) & set(pairs)
        assert sum((shape == right[0]) != (colour == right[1]) for shape, colour in named) >= 3
    assert {trial.correct for trial in naming_trials(N, 0)} == set(range(8))


def test_probes_depend_on_seed_and_position_only() -> None:
    for draw in (image_probes, token_probes, naming_trials):
        many, few, other = draw(40, 1, 32), draw(3, 1, 64), draw(3, 2, 64)
        assert [probe.scene.caption for probe in many[:3]] == [probe.scene.caption for probe in few]
        assert [probe.scene.objects for probe in many[:3]] == [probe.scene.objects for probe in few]
        assert [probe.scene.objects for probe in other] != [probe.scene.objects for probe in few]
        assert many[0].image.shape == (32, 32, 3)
