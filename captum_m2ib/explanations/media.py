"""Explanations of sounds compared with videos: there is no caption, and each of the two has a map over time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from captum_m2ib.attr._scoring import as_forward_func
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.pairs import Media, Pairs, load_media
from captum_m2ib.explanations.checking import MODALITIES
from captum_m2ib.explanations.explanation import Explanation
from captum_m2ib.explanations.methods import Maps, Method, maps_of

__all__ = ["explain_media"]

_KINDS = {"audio": "sound", "video": "video"}


def explain_media(
    encoder: DualEncoder,
    first: Media,
    second: Media,
    *,
    method: Method = "m2ib",
    internal_batch_size: int | None = None,
    check: bool = True,
    **settings: Any,
) -> list[tuple[Explanation, Explanation]]:
    r"""Explain pairs of a sound and a video: which of each the score rests on, and when.

    Args:

        encoder (DualEncoder): That compares sounds with videos, such as Perception Encoder's audio-video model, with a
            processor that reads both.
        first (sounds or videos): What its first side reads, one or several, as :meth:`DualEncoder.prepare` takes them.
        second (sounds or videos): The same for its second side; a single one is paired with every other.
        method (optional): As for :func:`captum_m2ib.explain`. Default: ``"m2ib"``
        internal_batch_size (int, optional): As for :func:`captum_m2ib.explain`. Default: None
        check (bool, optional): As for :func:`captum_m2ib.explain`. Default: True
        **settings: Further arguments of the method's ``attribute``, such as ``beta`` or ``seed``.

    Returns:
        list[tuple[Explanation, Explanation]]: per pair one of the first and one of the second, without tokens; both
        have the pair's score, and ``settings["beside"]`` says what the other one is.

    Raises:
        ValueError: as :func:`captum_m2ib.explain`, or if the encoder does not compare sounds with videos.
        TypeError: as :func:`captum_m2ib.explain`.
    """
    encoder = as_forward_func(encoder)
    if not encoder.compares_media:
        compared = " with ".join(side.modality for side in encoder.sides)
        raise ValueError(f"encoder: expected one that compares sounds with videos, got {compared}; use explain.")
    media = [load_media(one, side.modality) for one, side in zip((first, second), encoder.sides, strict=True)]
    pairs = encoder.prepare(*media)
    if encoder.holds_sizes(pairs):
        given = {"method": method, "internal_batch_size": internal_batch_size, "check": check, **settings}
        alone = zip(*(one * (len(pairs) // len(one)) for one in media), strict=True)
        return [explain_media(encoder, [one], [other], **given)[0] for one, other in alone]
    maps = maps_of(encoder, method, pairs, internal_batch_size, check, settings)
    return list(zip(_explanations(encoder, pairs, maps), _turned(encoder, pairs, maps), strict=True))


def _explanations(encoder: DualEncoder, pairs: Pairs, maps: Maps, place: int = 0) -> list[Explanation]:
    """What is said of one of each pair, by its place."""
    kinds = [_KINDS[side.modality] for side in encoder.sides]
    told = {"beside": kinds[1 - place]}
    if encoder.score_name != Explanation.USUAL_SCORE:
        told["score"] = encoder.score_name
    return [
        Explanation(
            image=pairs.pictures[i],
            caption="",
            tokens=(),
            special=(),
            score=float(maps.scores[i]),
            image_bits=maps.pixels[i].float().cpu().numpy(),
            patch_bits=None if maps.patches is None else maps.patches[i].float().cpu().numpy(),
            token_bits=np.zeros(0, np.float32),
            settings={**maps.settings, **told},
            record=None if maps.records is None else maps.records[i],
            check=None if maps.checks is None else maps.checks[i],
            unit=maps.unit,
            timeline=pairs.timelines[i],
        )
        for i in range(len(pairs))
    ]


def _turned(encoder: DualEncoder, pairs: Pairs, maps: Maps) -> list[Explanation]:
    """What is said of the second one of each pair, as if it were the first."""
    assert maps.second is not None
    seen = replace(pairs, pictures=pairs.partners, timelines=pairs.partner_timelines)
    pixels, patches = maps.second
    checks, records = (
        None
        if each is None
        else [{**one, **dict(zip(MODALITIES, map(one.get, reversed(MODALITIES)), strict=True))} for one in each]
        for each in (maps.checks, maps.records)
    )
    return _explanations(
        encoder, seen, replace(maps, pixels=pixels, patches=patches, checks=checks, records=records), 1
    )
