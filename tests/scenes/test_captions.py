"""Captions: grammar, alignment of words with objects, and which objects are described."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from captum_m2ib.scenes.captions import (
    COLOURS,
    DESCRIBED,
    SHAPES,
    TEMPLATES,
    Phrase,
    compose,
    describe,
    name_kinds,
    vocabulary,
)

THINGS = (("circle", "red"), ("moon", "orange"), ("star", "blue"), ("star", "red"))


def test_composes_an_aligned_enumeration() -> None:
    phrases = [Phrase("moon", "orange", 2), Phrase("star", "red", 0), Phrase("ring", "pink")]
    caption = compose(phrases, "a picture of {all}")
    assert caption.text == "a picture of an orange moon , a red star and a pink ring"
    assert caption.word_objects == (None, None, None, None, 2, 2, None, None, 0, 0, None, None, None, None)
    assert caption.word_phrases == (None, None, None, None, 0, 0, None, None, 1, 1, None, None, 2, 2)


def test_composes_a_relation() -> None:
    caption = compose([Phrase("star", "blue", 1), Phrase("circle", "red", 0)], "{first} next to {rest}")
    assert caption.text == "a blue star next to a red circle"
    assert caption.word_objects == (None, 1, 1, None, None, None, 0, 0)


def test_refuses_too_few_phrases() -> None:
    with pytest.raises(ValueError, match=r"phrases: expected at least 2 .* got 1"):
        compose([Phrase("star", "blue")], "{first} beside {rest}")


def test_words_align_with_objects_in_every_caption() -> None:
    rng = np.random.default_rng(0)
    for trial in range(2000):
        things = THINGS[: 1 + trial % 4]
        caption = describe(rng, things)
        assert caption.text == " ".join(caption.words) == caption.text.lower()
        assert len(caption.words) == len(caption.word_objects) == len(caption.word_phrases)
        named: dict[int, list[str]] = {}
        for word, index in zip(caption.words, caption.word_objects, strict=True):
            assert (index is not None) == (word in SHAPES or word in COLOURS)
            if index is not None:
                named.setdefault(index, []).append(word)
        assert named
        assert all(words == [things[index][1], things[index][0]] for index, words in named.items())


def test_articles_are_right() -> None:
    rng = np.random.default_rng(1)
    for _ in range(1000):
        words = describe(rng, THINGS).words
        for article, word in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou"), words


def test_every_template_is_used() -> None:
    rng = np.random.default_rng(2)
    texts = [describe(rng, THINGS).text for _ in range(1500)]
    patterns = [re.sub(r"\\\{\w+\\\}", "an? .+", re.escape(template)) for template in TEMPLATES]
    assert len(TEMPLATES) >= 10
    assert all(any(re.fullmatch(pattern, text) for text in texts) for pattern in patterns)


def test_vocabulary_holds_every_word_and_no_other() -> None:
    rng = np.random.default_rng(3)
    things = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    used = {word for _ in range(1500) for word in describe(rng, [things[i] for i in rng.permutation(64)[:4]]).words}
    assert used == set(vocabulary())


def test_how_many_objects_are_described() -> None:
    rng = np.random.default_rng(4)
    n = 4000
    counts = Counter(len({i for i in describe(rng, THINGS).word_objects if i is not None}) for _ in range(n))
    assert sum(DESCRIBED.values()) == pytest.approx(1)
    for described, share in ((4, DESCRIBED["all"]), (3, DESCRIBED["one fewer"]), (1, DESCRIBED["one"])):
        assert counts[described] / n == pytest.approx(share, abs=0.03)


def test_every_kind_is_named_alone_and_in_order() -> None:
    names = name_kinds(np.random.default_rng(5))
    kinds = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    for name, (shape, colour) in zip(names, kinds, strict=True):
        words = name.split()
        assert [word for word in words if word in SHAPES or word in COLOURS] == [colour, shape]
