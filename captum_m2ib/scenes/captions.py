"""Captions of scenes: the words, and which object each word names.

A caption is one of :data:`TEMPLATES` filled with noun phrases such as "an orange star". Every word, the comma
included, stands between spaces, so ``caption.split()`` gives exactly the words and the compact model's
tokenizer gives exactly one token per word: word ``i`` is token ``i + 1`` (token 0 is ``<start>``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "moon")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")

TEMPLATES = (
    "{all}",
    "a photo of {all}",
    "a picture of {all}",
    "a picture with {all}",
    "a drawing of {all}",
    "an image of {all}",
    "an image containing {all}",
    "there is {all}",
    "here is {all}",
    "this image shows {all}",
    "the picture shows {all}",
    "we can see {all}",
    "you can see {all} in this picture",
    "{first} next to {rest}",
    "{first} beside {rest}",
    "{first} together with {rest}",
    "a scene with {first} and also {rest}",
)
"""``{all}`` takes an enumeration of all phrases; ``{first}`` and ``{rest}`` need two phrases or more."""

DESCRIBED = {"all": 0.80, "one fewer": 0.14, "one": 0.06}
"""How many of a scene's objects its caption describes, with probabilities."""

_SINGLE_TEMPLATES = tuple(template for template in TEMPLATES if "{all}" in template)


@dataclass(frozen=True)
class Phrase:
    """What a noun phrase says.

    Args:
        shape (str): One of :data:`SHAPES`.
        colour (str): One of :data:`COLOURS`.
        index (int, optional): The object of the scene that it names; None if the scene has no such object.
    """

    shape: str
    colour: str
    index: int | None = None


@dataclass(frozen=True)
class Caption:
    """A caption and what its words name.

    Args:
        text (str): The caption; its words are joined with single spaces.
        words (tuple[str, ...]): The words, lower case; a comma is a word.
        word_phrases (tuple[int | None, ...]): Per word, the position in the given phrases of the phrase whose
            shape or colour it is; None for every other word, articles included.
        word_objects (tuple[int | None, ...]): Per word, the index of the scene's object that it names, or
            None.
    """

    text: str
    words: tuple[str, ...]
    word_phrases: tuple[int | None, ...]
    word_objects: tuple[int | None, ...]


def compose(phrases: Sequence[Phrase], template: str) -> Caption:
    """Fills a template with noun phrases, in the order given.

    Args:
        phrases (Sequence[Phrase]): What to name, one or more; templates with ``{rest}`` need two or more.
        template (str): One of :data:`TEMPLATES`, or any words with the same slots.

    Returns:
        Caption: The caption, aligned word by word.

    Raises:
        ValueError: If there are too few phrases for the template.
    """
    needed = 2 if "{rest}" in template else 1
    if len(phrases) < needed:
        raise ValueError(
            f"phrases: expected at least {needed} for the template {template!r}, got {len(phrases)}; "
            "give more phrases or a template with {all}."
        )
    slots = {"{all}": range(len(phrases)), "{first}": range(1), "{rest}": range(1, len(phrases))}
    words: list[str] = []
    word_phrases: list[int | None] = []
    for piece in template.split():
        if piece in slots:
            _enumerate(phrases, slots[piece], words, word_phrases)
        else:
            words.append(piece)
            word_phrases.append(None)
    word_objects = tuple(None if position is None else phrases[position].index for position in word_phrases)
    return Caption(" ".join(words), tuple(words), tuple(word_phrases), word_objects)


def choose_template(rng: np.random.Generator, n_phrases: int) -> str:
    """Draws a template that fits this many phrases, all equally likely."""
    templates = TEMPLATES if n_phrases > 1 else _SINGLE_TEMPLATES
    return templates[int(rng.integers(len(templates)))]


def describe(rng: np.random.Generator, things: Sequence[tuple[str, str]]) -> Caption:
    """Describes some of a scene's objects, in random order and a random template.

    Args:
        rng (numpy.random.Generator): Where the choices come from.
        things (Sequence[tuple[str, str]]): Shape and colour of each of the scene's objects.

    Returns:
        Caption: The caption, its ``word_objects`` indexing ``things``.
    """
    count = _described_count(float(rng.random()), len(things))
    chosen = rng.permutation(len(things))[:count].tolist()
    phrases = [Phrase(things[index][0], things[index][1], index) for index in chosen]
    return compose(phrases, choose_template(rng, count))


def name_kinds(rng: np.random.Generator) -> list[str]:
    """One caption for every kind of object, in the order of shapes, then colours, each in a random template."""
    return [compose([Phrase(shape, colour)], choose_template(rng, 1)).text for shape in SHAPES for colour in COLOURS]


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can contain, sorted."""
    words = {"a", "an", "and", ",", *SHAPES, *COLOURS}
    for template in TEMPLATES:
        words.update(piece for piece in template.split() if not piece.startswith("{"))
    return tuple(sorted(words))


def _described_count(chance: float, n_objects: int) -> int:
    if chance < DESCRIBED["all"]:
        return n_objects
    if chance < DESCRIBED["all"] + DESCRIBED["one fewer"]:
        return max(1, n_objects - 1)
    return 1


def _enumerate(phrases: Sequence[Phrase], positions: range, words: list[str], word_phrases: list[int | None]) -> None:
    for position in positions:
        if position > positions.start:
            words.append("and" if position == positions.stop - 1 else ",")
            word_phrases.append(None)
        phrase = phrases[position]
        words += ["an" if phrase.colour[0] in "aeiou" else "a", phrase.colour, phrase.shape]
        word_phrases += [None, position, position]
