"""Questions about scenes whose right answer is known: for attribution maps and for the model itself.

The scenes come from random streams of their own (:func:`captum_m2ib.scenes.drawing.generator`), so no seed
makes a probe repeat a training scene. They are drawn in blocks: probe ``i`` of a seed is the same however
many are asked for, and whatever ``size``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from captum_m2ib.scenes.captions import COLOURS, SHAPES, Caption, Phrase, choose_template, compose
from captum_m2ib.scenes.drawing import OBJECT_COUNTS, Scene, draw_scenes, generator
from captum_m2ib.scenes.grounds import TEXTURED

PROBE_COUNTS = {2: 0.30, 3: 0.35, 4: 0.35}
"""Number of objects in the scenes of image and token probes, with probabilities."""

_BLOCK = 32

_Probe = TypeVar("_Probe")


@dataclass(frozen=True, eq=False)
class ImageProbe:
    """A scene of 2 to 4 objects whose caption names exactly one: the map over pixels should point there.

    Args:
        scene (Scene): The scene, with the probe's caption, words and word_objects.
        target (int): Index of the named object.
        mask (numpy.ndarray): What is visible of it, bool (H, W).
        wrong_caption (str): The same caption naming another object of the scene.
        wrong_target (int): Index of that object.
        wrong_mask (numpy.ndarray): What is visible of that object, bool (H, W).
    """

    scene: Scene
    target: int
    mask: np.ndarray
    wrong_caption: str
    wrong_target: int
    wrong_mask: np.ndarray

    @property
    def image(self) -> np.ndarray:
        """The picture, uint8 (H, W, 3)."""
        return self.scene.image

    @property
    def caption(self) -> str:
        """The caption that names the target."""
        return self.scene.caption


@dataclass(frozen=True, eq=False)
class TokenProbe:
    """A scene of 2 to 4 objects whose caption names one that is there and one that is not.

    Neither the colour nor the shape of the absent object occurs in the scene, so only the present one's two
    words can hold information. Word ``i`` is token ``i + 1`` of the compact model's tokenizer.

    Args:
        scene (Scene): The scene, with the probe's caption, words and word_objects.
        target (int): Index of the present object.
        present_words (tuple[int, int]): Positions in ``scene.words`` of its colour word and its shape word.
        absent (tuple[str, str]): Shape and colour of the absent object.
        absent_words (tuple[int, int]): Positions of its colour word and its shape word.
    """

    scene: Scene
    target: int
    present_words: tuple[int, int]
    absent: tuple[str, str]
    absent_words: tuple[int, int]

    @property
    def image(self) -> np.ndarray:
        """The picture, uint8 (H, W, 3)."""
        return self.scene.image

    @property
    def caption(self) -> str:
        """The caption that names the present and the absent object."""
        return self.scene.caption


@dataclass(frozen=True, eq=False)
class NamingTrial:
    """A scene of 1 to 4 objects and eight captions that name one object each; one is true.

    Of the wrong ones three differ from the right one in exactly one attribute. No wrong caption is true of
    any object in the scene.

    Args:
        scene (Scene): The scene, with the right caption, its words and word_objects.
        target (int): Index of the named object.
        captions (tuple[str, ...]): Eight captions, all in the same template, in random order.
        correct (int): Which of them is true.
    """

    scene: Scene
    target: int
    captions: tuple[str, ...]
    correct: int

    @property
    def image(self) -> np.ndarray:
        """The picture, uint8 (H, W, 3)."""
        return self.scene.image


def image_probes(n: int, seed: int, size: int = 64, ground: str = TEXTURED) -> list[ImageProbe]:
    r"""Draws probes of image maps.

    Args:
        n (int): How many, at least 1.
        seed (int): Not negative.
        size (int): Side of the pictures in pixels, at least 16. Default: 64.
        ground (str): What the objects lie on, one of ``captum_m2ib.scenes.GROUNDS``. Default: ``"textured"``.

    Returns:
        list[ImageProbe]: The probes.

    Raises:
        ValueError: If an argument is out of range.

    Examples::

        >>> probe = image_probes(1, seed=0)[0]
        >>> probe.caption, probe.mask.shape, probe.image.shape
        ('we can see a red cross', (64, 64), (64, 64, 3))
    """
    return _in_blocks(n, seed, size, "image_probes", PROBE_COUNTS, _image_probe, ground)


def token_probes(n: int, seed: int, size: int = 64, ground: str = TEXTURED) -> list[TokenProbe]:
    r"""Draws probes of token maps.

    Args:

        n (int): How many, at least 1.
        seed (int): Not negative.
        size (int, optional): Side of the pictures in pixels, at least 16. Default: 64
        ground (str, optional): What the objects lie on, one of ``captum_m2ib.scenes.GROUNDS``. Default: ``"textured"``

    Returns:
        list[TokenProbe]: one scene each.

    Raises:
        ValueError: if an argument is out of range.
    """
    return _in_blocks(n, seed, size, "token_probes", PROBE_COUNTS, _token_probe, ground)


def pair_probes(n: int, seed: int, size: int = 64, ground: str = TEXTURED) -> list[Scene]:
    r"""Draws scenes of 2 to 4 objects whose caption names exactly two of them: each word's map should point at its own.

    Args:

        n (int): How many, at least 1.
        seed (int): Not negative.
        size (int, optional): Side of the pictures in pixels, at least 16. Default: 64
        ground (str, optional): What the objects lie on, one of ``captum_m2ib.scenes.GROUNDS``. Default: ``"textured"``

    Returns:
        list[Scene]: with the probe's caption, words and word_objects.

    Raises:
        ValueError: if an argument is out of range.

    Examples::

        >>> len(set(pair_probes(1, seed=0)[0].word_objects) - {None})
        2
    """
    return _in_blocks(n, seed, size, "pair_probes", PROBE_COUNTS, _pair_probe, ground)


def naming_trials(n: int, seed: int, size: int = 64, ground: str = TEXTURED) -> list[NamingTrial]:
    r"""Draws trials of the model: which caption is true?

    Args:

        n (int): How many, at least 1.
        seed (int): Not negative.
        size (int, optional): Side of the pictures in pixels, at least 16. Default: 64
        ground (str, optional): What the objects lie on, one of ``captum_m2ib.scenes.GROUNDS``. Default: ``"textured"``

    Returns:
        list[NamingTrial]: one scene each.

    Raises:
        ValueError: if an argument is out of range.
    """
    return _in_blocks(n, seed, size, "naming_trials", OBJECT_COUNTS, _naming_trial, ground)


def _in_blocks(
    n: int,
    seed: int,
    size: int,
    purpose: str,
    counts: dict[int, float],
    make: Callable[[np.random.Generator, Scene], _Probe],
    ground: str,
) -> list[_Probe]:
    if n < 1:
        raise ValueError(f"n: expected 1 or more, got {n}; ask for at least one.")
    probes: list[_Probe] = []
    for block in range(-(-n // _BLOCK)):
        rng = generator(purpose, seed, block)
        probes += [make(rng, scene) for scene in draw_scenes(rng, _BLOCK, size, counts=counts, ground=ground)]
    return probes[:n]


def _image_probe(rng: np.random.Generator, scene: Scene) -> ImageProbe:
    target, wrong = rng.permutation(len(scene.objects))[:2].tolist()
    template = choose_template(rng, 1)
    return ImageProbe(
        scene=_recaptioned(scene, compose([_phrase(scene, target)], template)),
        target=target,
        mask=scene.masks[target],
        wrong_caption=compose([_phrase(scene, wrong)], template).text,
        wrong_target=wrong,
        wrong_mask=scene.masks[wrong],
    )


def _token_probe(rng: np.random.Generator, scene: Scene) -> TokenProbe:
    target = int(rng.integers(len(scene.objects)))
    absent = (
        _choice(rng, [shape for shape in SHAPES if all(shape != thing.shape for thing in scene.objects)]),
        _choice(rng, [colour for colour in COLOURS if all(colour != thing.colour for thing in scene.objects)]),
    )
    phrases = [_phrase(scene, target), Phrase(*absent)]
    order = rng.permutation(2).tolist()
    caption = compose([phrases[i] for i in order], choose_template(rng, 2))
    return TokenProbe(
        scene=_recaptioned(scene, caption),
        target=target,
        present_words=_positions(caption, order.index(0)),
        absent=absent,
        absent_words=_positions(caption, order.index(1)),
    )


def _pair_probe(rng: np.random.Generator, scene: Scene) -> Scene:
    named = rng.permutation(len(scene.objects))[:2].tolist()
    return _recaptioned(scene, compose([_phrase(scene, index) for index in named], choose_template(rng, 2)))


def _naming_trial(rng: np.random.Generator, scene: Scene) -> NamingTrial:
    target = int(rng.integers(len(scene.objects)))
    right = (scene.objects[target].shape, scene.objects[target].colour)
    untrue = {(shape, colour) for shape in SHAPES for colour in COLOURS}
    untrue -= {(thing.shape, thing.colour) for thing in scene.objects}
    near = [pair for pair in sorted(untrue) if (pair[0] == right[0]) != (pair[1] == right[1])]
    near = [near[i] for i in rng.permutation(len(near))[:3]]
    others = sorted(untrue.difference(near))
    others = [others[i] for i in rng.permutation(len(others))[:4]]
    template = choose_template(rng, 1)
    answers = [compose([Phrase(*pair)], template).text for pair in (right, *near, *others)]
    order = rng.permutation(len(answers)).tolist()
    return NamingTrial(
        scene=_recaptioned(scene, compose([_phrase(scene, target)], template)),
        target=target,
        captions=tuple(answers[i] for i in order),
        correct=order.index(0),
    )


def _recaptioned(scene: Scene, caption: Caption) -> Scene:
    return replace(scene, caption=caption.text, words=caption.words, word_objects=caption.word_objects)


def _phrase(scene: Scene, index: int) -> Phrase:
    return Phrase(scene.objects[index].shape, scene.objects[index].colour, index)


def _positions(caption: Caption, phrase: int) -> tuple[int, int]:
    colour, shape = (i for i, named in enumerate(caption.word_phrases) if named == phrase)
    return colour, shape


def _choice(rng: np.random.Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]
