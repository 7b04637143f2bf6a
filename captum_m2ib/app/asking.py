"""What is asked on the page, checked, and its answer: explanations of one picture and one caption or several.

Nothing here knows of Gradio.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from captum_m2ib.attr.pair_interaction import PairInteraction
from captum_m2ib.attr.registry import METHODS, entry_named, method_named
from captum_m2ib.attr.similarity_map import SimilarityMap
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.pictures import load_picture
from captum_m2ib.engine.stakes import NothingToExplainWarning
from captum_m2ib.explanations.explain import explain
from captum_m2ib.explanations.explanation import Explanation
from captum_m2ib.games import interactions

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

MOST_PIXELS = 32_000_000
"""What a picture may have on the page: several may be decoded at once."""

MOST_LETTERS = 1000
MOST_CAPTIONS = 8

QUALITIES: Mapping[str, Mapping[str, Mapping[str, int]]] = MappingProxyType(
    {
        "quick": {
            "m2ib": {"n_steps": 3, "n_samples": 2},
            "m2ib-guided": {"n_steps": 3, "n_samples": 2},
            "m2ib-published": {"n_steps": 5, "n_samples": 5},
            "nib": {"n_steps": 5},
            "rise": {"n_masks": 500},
        },
        "default": {},
        "fine": {
            "m2ib": {"n_steps": 8, "n_samples": 9},
            "m2ib-guided": {"n_steps": 8, "n_samples": 9},
            "m2ib-published": {"n_steps": 20, "n_samples": 20},
            "nib": {"n_steps": 40},
            "rise": {"n_masks": 16_000},
        },
    }
)
"""Per quality the settings of the methods that have a choice there; the others have one pass, whatever the quality."""


@dataclass(frozen=True)
class Answer:
    r"""What one question gave.

    Attributes:

        explanations (tuple[Explanation, ...]): One per caption.
        interactions (tuple[numpy.ndarray or None, ...]): Per caption how each of its tokens acts together with each
            patch, (tokens, rows, columns), in units of the score; None where it was not asked for or cannot be told.
        method (str): The method's name.
        seconds (float): How long it took.
        notes (tuple[str, ...]): What has to be said beside.
    """

    explanations: tuple[Explanation, ...]
    interactions: tuple[NDArray[Any] | None, ...]
    method: str
    seconds: float
    notes: tuple[str, ...] = ()


def ask(
    encoder: DualEncoder,
    picture: str | os.PathLike[str] | None,
    captions: str,
    method: str = "m2ib",
    quality: str = "default",
    *,
    words: str | None = None,
    show_progress: bool = False,
) -> Answer:
    r"""Explain a picture that was handed in and the captions that were typed.

    Args:

        encoder (DualEncoder): With a processor.
        picture (path or None): A picture file.
        captions (str): One caption per line; empty lines and repetitions are left out.
        method (str, optional): One of :data:`captum_m2ib.attr.registry.METHODS`. Default: "m2ib"
        quality (str, optional): One of :data:`QUALITIES`. Default: "default"
        words (str, optional): Also how tokens act together with patches, in one of the ways of :data:`WORDS`. Default:
            None
        show_progress (bool, optional): Show bars, where the method has one. Default: False

    Returns:
        Answer: with an explanation per caption.

    Raises:
        ValueError: if the picture or a caption cannot be used, is too large or too long, or the method, the quality or
            the way is unknown.

    Examples::

        >>> ask(encoder, None, "a cat")
        Traceback (most recent call last):
        ...
        ValueError: picture: there is none; drop a picture, or choose an example.
    """
    lines = check_captions(captions)
    settings = _settings(method, quality)
    if words is not None and words not in WORDS:
        raise ValueError(f"words: expected one of {', '.join(WORDS)}, got {words!r}.")
    image = check_picture(picture)
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # The check says so.
        warnings.simplefilter("ignore", NothingToExplainWarning)
        found = explain(encoder, image, lines, method=method, show_progress=show_progress, **settings)
        together, notes = ((), []) if words is None else _interactions(encoder, image, found, words, show_progress)
    told = dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, UserWarning))
    seconds = time.perf_counter() - began
    return Answer(tuple(found), together or (None,) * len(found), method, seconds, (*told, *notes))


def fitting(encoder: DualEncoder) -> list[str]:
    r"""The methods that can be made of an encoder.

    Args:

        encoder (DualEncoder): Any.

    Returns:
        list[str]: names of :data:`captum_m2ib.attr.registry.METHODS`.

    Examples::

        >>> "similarity-map" in fitting(encoder)
        False
    """
    found = []
    for name in METHODS:
        try:
            method_named(name, encoder)
        except (ValueError, TypeError):
            continue
        found.append(name)
    return found


def check_captions(captions: str) -> list[str]:
    r"""The captions among what was typed.

    Args:

        captions (str): One per line.

    Returns:
        list[str]: without empty ones and repetitions.

    Raises:
        ValueError: if there is none, or too many, or one is too long.

    Examples::

        >>> check_captions(" a cat \n\na dog\na cat")
        ['a cat', 'a dog']
    """
    lines = list(dict.fromkeys(line.strip() for line in (captions or "").splitlines() if line.strip()))
    if not lines:
        raise ValueError("captions: there is none; type one, or several on a line each.")
    if len(lines) > MOST_CAPTIONS:
        raise ValueError(f"captions: expected at most {MOST_CAPTIONS}, got {len(lines)}; leave some out.")
    for line in lines:
        if len(line) > MOST_LETTERS:
            raise ValueError(
                f"captions: “{line[:30]}…” has {len(line):,} characters, more than the {MOST_LETTERS:,} that the page "
                "takes, and more than models read; shorten it."
            )
    return lines


def check_picture(picture: str | os.PathLike[str] | None) -> Image:
    r"""A picture that was handed in.

    Args:

        picture (path or None): Its file.

    Returns:
        PIL.Image.Image: as :func:`captum_m2ib.encoders.pictures.load_picture` reads it.

    Raises:
        ValueError: if there is none, it has over 32 million pixels, or it cannot be read; the sentence says the file's
            name alone.
    """
    if picture is None:
        raise ValueError("picture: there is none; drop a picture, or choose an example.")
    try:
        return load_picture(picture, "picture", MOST_PIXELS)
    except ValueError as error:
        # Where an uploaded file lies is nobody's business.
        raise ValueError(str(error).replace(os.fspath(picture), Path(picture).name)) from error


def _settings(method: str, quality: str) -> Mapping[str, Any]:
    entry_named(method)
    if quality not in QUALITIES:
        raise ValueError(f"quality: expected one of {', '.join(QUALITIES)}, got {quality!r}.")
    return QUALITIES[quality].get(method, {})


def _interactions(
    encoder: DualEncoder, image: Image, explanations: list[Explanation], words: str, show_progress: bool
) -> tuple[tuple[NDArray[Any], ...], list[str]]:
    """Of each caption, or of none and why."""
    found = []
    for explanation in explanations:
        try:
            values = WORDS[words](encoder, image, explanation, show_progress)
        except (ValueError, RuntimeError) as error:
            # Not every family has what a way needs; the maps are as good.
            return (), [f"Which patches each word goes with is not known of this model by {words}: {error}"]
        grid = None if explanation.patch_bits is None else explanation.patch_bits.shape
        if values.shape[1:] != grid:
            return (), [f"Which patches each word goes with is not shown: by {words} the model has other patches."]
        found.append(values)
    return tuple(found), []


def _by_gradients(encoder: DualEncoder, image: Image, explanation: Explanation, show_progress: bool) -> NDArray[Any]:
    pairs = encoder.prepare(image, explanation.caption)
    (values,) = PairInteraction(encoder).attribute(
        pairs.inputs,
        additional_forward_args=pairs.additional_forward_args,
        internal_batch_size=16,
        show_progress=show_progress,
    )
    kept: NDArray[Any] = values[encoder.real_tokens(pairs)[0]].float().cpu().numpy()
    return kept


def _by_matches(encoder: DualEncoder, image: Image, explanation: Explanation, show_progress: bool) -> NDArray[Any]:
    pairs = encoder.prepare(image, explanation.caption)
    (values,) = SimilarityMap(encoder).of_tokens(pairs.inputs, pairs.additional_forward_args)
    # The score gains by how much the best of them stands out; what all have in common hides it.
    values = values - values.mean((1, 2), keepdim=True)
    kept: NDArray[Any] = values[encoder.real_tokens(pairs)[0]].float().cpu().numpy()
    return kept


def _by_masks(encoder: DualEncoder, image: Image, explanation: Explanation, show_progress: bool) -> NDArray[Any]:
    game = interactions(encoder, image, explanation.caption, show_progress=show_progress)
    found = np.zeros((len(explanation.tokens), *game.places.shape))
    # The model's own tokens take no part.
    players = [place for place, token in enumerate(explanation.tokens) if token in game.tokens]
    if [explanation.tokens[place] for place in players] != list(game.tokens):
        raise ValueError(f"the words that take part are {' '.join(game.tokens)}")
    for number, place in enumerate(players):
        found[place] = game.map_of(number)
    return found


WORDS: Mapping[str, Callable[[DualEncoder, Image, Explanation, bool], NDArray[Any]]] = MappingProxyType(
    {"gradients": _by_gradients, "matches": _by_matches, "masks": _by_masks}
)
"""The ways to tell which patches each word goes with; what is found is in units of the score."""


def ways(encoder: DualEncoder) -> list[str]:
    r"""Those of :data:`WORDS` that fit a model, the quickest first.

    Args:

        encoder (DualEncoder): Any.

    Returns:
        list[str]: in late interaction matches take the place of gradients, for its score is made of them.

    Examples::

        >>> ways(encoder)
        ['gradients', 'masks']
    """
    left_out = "gradients" if encoder.has_terms else "matches"
    return [name for name in WORDS if name != left_out]
