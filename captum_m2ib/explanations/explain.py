"""From pictures and captions to explanations: prepare, attribute, and gather what there is to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from captum_m2ib.attr import LayerRecord, MultiModalInfoBottleneck
from captum_m2ib.attr._scoring import as_forward_func
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.pictures import PictureLike
from captum_m2ib.engine.layouts import PackedLayout, PatchLayout, packed_grid, per_patch, to_input
from captum_m2ib.explanations.checking import pair_checks
from captum_m2ib.explanations.explanation import Explanation
from captum_m2ib.explanations.visualization import clean_token
from captum_m2ib.metrics.bypass import has_chosen_layers, warn_of_bypass

__all__ = ["explain"]


def explain(
    encoder: DualEncoder,
    images: PictureLike | Sequence[PictureLike],
    captions: str | Sequence[str],
    *,
    method: MultiModalInfoBottleneck | None = None,
    internal_batch_size: int | None = 80,
    check: bool = True,
    **settings: Any,
) -> list[Explanation]:
    r"""Explain pairs of pictures and captions: prepare, attribute, and gather what there is to show.

    Args:

        encoder (DualEncoder): With a processor, as :meth:`DualEncoder.from_pretrained` loads it.
        images (picture or sequence of pictures): Paths, PIL images or uint8 arrays (H, W, 3); a single one is paired
            with every caption.
        captions (str or sequence of str): One per image; a single one is paired with every image.
        method (MultiModalInfoBottleneck, optional): The attribution method. Default: None
            (``MultiModalInfoBottleneck(encoder)``)
        internal_batch_size (int, optional): Most rows (pairs times noise draws) in one forward pass; None for all at
            once. Default: 80
        check (bool, optional): Whether to look at what the score loses where the maps' top positions are hidden, and so
            many at random: 9 forward passes per pair and modality, without gradients. Default: True
        **settings: Further arguments of :meth:`MultiModalInfoBottleneck.attribute`, such as ``beta`` or ``seed``.

    Returns:
        list[Explanation]: one per pair.

    Raises:
        ValueError: if a picture or caption cannot be used, or a setting is out of range.

    Warns:
        BypassWarning: if ``method`` was given layers, and information goes round the units of one; looked at on the
            first four pairs. The recommended layers and those of :meth:`MultiModalInfoBottleneck.published` are not
            looked at.

    Examples::

        >>> explain(encoder, images, captions, n_steps=5)[0].top_tokens(1)[0][0] in captions[0]
        True
    """
    encoder = as_forward_func(encoder)
    method = MultiModalInfoBottleneck(encoder) if method is None else method
    pairs = encoder.prepare(images, captions)
    if has_chosen_layers(method):
        warn_of_bypass(method, pairs.inputs, pairs.additional_forward_args)
    (image_bits, token_bits), record = method.attribute_with_record(
        pairs.inputs,
        additional_forward_args=pairs.additional_forward_args,
        internal_batch_size=internal_batch_size,
        check=check,
        **settings,
    )
    image, text = record.modalities
    found = [part.check for part in record.modalities if part.check is not None]
    checks = pair_checks(found) if found else None
    real = [row.nonzero().flatten().tolist() for row in encoder.real_tokens(pairs)]
    layout, arguments = method.layouts[0], (*pairs.inputs, *pairs.additional_forward_args)
    units = image.units
    if isinstance(layout, PatchLayout) and method.layers[0].argument is not None and units is not None:
        units = per_patch(layout, units)
    patches = None if units is None else list(units)
    pixels = [bits.sum(0) for bits in image_bits]
    if isinstance(layout, PackedLayout) and image.units is not None:
        patches = [packed_grid(layout, image.units, arguments, i) for i in range(len(pairs))]
        pixels = [_over_pixels(grid, layout.patch_size) for grid in patches]
    return [
        Explanation(
            image=pairs.pictures[i],
            caption=pairs.captions[i],
            tokens=tuple(clean_token(pairs.tokens[i][j]) for j in real[i]),
            special=tuple(pairs.special[i][j] for j in real[i]),
            score=float(image.score_before[i]),
            image_bits=pixels[i].float().cpu().numpy(),
            patch_bits=None if patches is None else patches[i].float().cpu().numpy(),
            token_bits=token_bits[i, real[i]].float().cpu().numpy(),
            settings={
                "method": type(method).__name__,
                "layers": [layer.name for layer in method.layers],
                "priors": [_prior_name(prior) for prior in method.priors],
                **asdict(record.settings),
            },
            record={"image": _course(image, i), "text": _course(text, i)},
            check=None if checks is None else checks[i],
        )
        for i in range(len(pairs))
    ]


def _over_pixels(grid: Tensor, patch: tuple[int, int]) -> Tensor:
    """A map of patches spread over the pixels of the picture that they were cut from."""

    rows, columns = grid.shape
    picture = grid.new_zeros(1, 1, rows * patch[0], columns * patch[1])
    return to_input(PatchLayout(patch), grid[None], picture)[0, 0]


def _prior_name(prior: Any) -> str:
    return "N(0, variance)" if prior is None else prior if isinstance(prior, str) else "standardised"


def _course(record: LayerRecord, index: int) -> dict[str, Any]:
    """One pair's optimisation as JSON."""
    return {
        "layer": record.layer,
        "score": record.score[:, index].tolist(),
        "information": record.information[:, index].tolist(),
        "bits": float(record.bits[index]),
        "score_before": float(record.score_before[index]),
        "score_after": float(record.score_after[index]),
    }
