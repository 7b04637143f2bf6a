"""From pictures, sounds or videos and captions to explanations: prepare, attribute, gather what there is to show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from captum_m2ib.attr import ContrastiveInfoBottleneck, MultiModalInfoBottleneck
from captum_m2ib.attr._scoring import as_forward_func
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.pairs import Media, load_media
from captum_m2ib.explanations.explanation import Explanation
from captum_m2ib.explanations.methods import Method, maps_of, scores_of
from captum_m2ib.explanations.visualization import clean_token
from captum_m2ib.metrics.bypass import has_chosen_layers, warn_of_bypass

__all__ = ["explain"]


def explain(
    encoder: DualEncoder,
    images: Media,
    captions: str | Sequence[str],
    *,
    method: Method = "m2ib",
    instead_of: str | None = None,
    internal_batch_size: int | None = None,
    check: bool = True,
    tokens: str | Sequence[str] | None = None,
    **settings: Any,
) -> list[Explanation]:
    r"""Explain pairs of pictures, sounds or videos and captions: prepare, attribute, and gather what there is to show.

    Args:

        encoder (DualEncoder): With a processor, as :meth:`DualEncoder.from_pretrained` loads it.
        images (pictures, sounds or videos): What the encoder compares with captions, one or several, as
            :meth:`DualEncoder.prepare` takes them; a single one is paired with every caption.
        captions (str or sequence of str): One per image; a single one is paired with every image.
        method (optional): A name of :data:`captum_m2ib.attr.registry.METHODS`, such as ``"legrad"``; any attribution
            method of this package or of Captum, made of the encoder or of a view of it from
            :mod:`captum_m2ib.composition`; or two, (of the picture, of the caption), that have a map each. Default:
            ``"m2ib"``, :class:`MultiModalInfoBottleneck`
        instead_of (str, optional): Another caption: why the pair's rather than this one. Maps are then those of
            :class:`ContrastiveInfoBottleneck`, of the difference of the two scores, and so is the check; of the methods
            M2IB alone can tell. Default: None
        internal_batch_size (int, optional): Most rows (pairs times noise draws) in one forward pass; changes no
            result. Default: None (as many as M2IB's ``memory_budget`` has room for; 80 for other methods)
        check (bool, optional): Whether to look at what the score loses where the maps' top positions are hidden, and so
            many at random: 9 forward passes per pair and modality, without gradients; 8 more for other methods than
            M2IB. Default: True
        tokens (str or sequence of str, optional): Words of the query, for all pairs or one string per pair: the score
            explained is then what their tokens add to a MaxSim score (:meth:`DualEncoder.count_tokens`). Default: None
            (the whole score)
        **settings: Further arguments of the method's ``attribute``, such as ``beta`` or ``seed``.

    Returns:
        list[Explanation]: one per pair, in bits for M2IB; ``unit`` says what another method's are. Only M2IB has a
        record.

    Raises:
        ValueError: if a picture or caption cannot be used, a setting is out of range, a name is unknown, or the method
            returns no maps of the pair.
        TypeError: if ``method`` is none, or takes no such setting.

    Warns:
        BypassWarning: if ``method`` was given layers, and information goes round the units of one; looked at on the
            first four pairs. The recommended layers and those of :meth:`MultiModalInfoBottleneck.published` are not
            looked at.
        UserWarning: if the check is left out because the encoder's layers are not known.

    Examples::

        >>> explain(encoder, images, captions, n_steps=5)[0].top_tokens(1)[0][0] in captions[0]
        True
        >>> explain(encoder, images[0], captions[0], method="legrad")[0].unit
        'relative'
    """
    encoder = as_forward_func(encoder)
    if instead_of is not None and method not in (None, "m2ib"):
        raise ValueError(f"instead_of: of the methods m2ib alone explains a difference of captions, not {method!r}.")
    if instead_of is not None and tokens is not None:
        raise ValueError("instead_of: compares whole captions; leave out tokens, or leave out instead_of.")
    if method is None or method == "m2ib":
        method = MultiModalInfoBottleneck(encoder) if instead_of is None else ContrastiveInfoBottleneck(encoder)
    if encoder.compares_media:
        raise ValueError("encoder: compares sounds with videos, without captions; use explain_media(encoder, ...).")
    images = load_media(images, encoder.sides[0].modality)
    pairs = encoder.prepare(images, captions)
    if encoder.holds_sizes(pairs):
        words = list(tokens) if tokens is not None and not isinstance(tokens, str) else [tokens] * len(pairs)
        alone = zip(images * (len(pairs) // len(images)), pairs.captions, words, strict=True)
        given = {"instead_of": instead_of, "internal_batch_size": internal_batch_size, "check": check, **settings}
        method = method if instead_of is None else "m2ib"
        return [
            explain(encoder, image, caption, method=method, tokens=one, **given)[0] for image, caption, one in alone
        ]
    if tokens is not None:
        pairs = encoder.count_tokens(pairs, tokens)
    rivals = None if instead_of is None else encoder.prepare(images, [instead_of] * len(pairs))
    if isinstance(method, MultiModalInfoBottleneck) and has_chosen_layers(method):
        warn_of_bypass(method, pairs.inputs, pairs.additional_forward_args)
    maps = maps_of(encoder, method, pairs, internal_batch_size, check, settings, rivals)
    compared = (
        [{} for _ in pairs.captions]
        if rivals is None
        else [
            {"instead_of": instead_of, "rival_score": score}
            for score in scores_of(encoder, rivals, internal_batch_size).tolist()
        ]
    )
    real = [row.nonzero().flatten().tolist() for row in encoder.real_tokens(pairs)]
    return [
        Explanation(
            image=pairs.pictures[i],
            caption=pairs.captions[i],
            tokens=tuple(clean_token(pairs.tokens[i][j]) for j in real[i]),
            special=tuple(pairs.special[i][j] for j in real[i]),
            score=float(maps.scores[i]),
            image_bits=maps.pixels[i].float().cpu().numpy(),
            patch_bits=None if maps.patches is None else maps.patches[i].float().cpu().numpy(),
            token_bits=maps.tokens[i, real[i]].float().cpu().numpy(),
            settings={**maps.settings, **_told_of_score(encoder, tokens, i), **compared[i]},
            record=None if maps.records is None else maps.records[i],
            check=None if maps.checks is None else maps.checks[i],
            unit=maps.unit,
            region=pairs.regions[i] if pairs.regions else None,
            timeline=pairs.timelines[i] if pairs.timelines else None,
        )
        for i in range(len(pairs))
    ]


def _told_of_score(encoder: DualEncoder, tokens: str | Sequence[str] | None, index: int) -> dict[str, str]:
    """What an explanation says of a score that is no cosine similarity of whole captions."""
    if encoder.score_name == Explanation.USUAL_SCORE:
        return {}
    words = tokens if tokens is None or isinstance(tokens, str) else tokens[index]
    return {"score": encoder.score_name, **({} if words is None else {"tokens": words})}
