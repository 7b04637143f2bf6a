"""Is a map faithful to the score? Confidence drop and increase, insertion and deletion, for both maps of given pairs.

What is taken out of a picture is replaced by the data set's mean colour, what is put back starts from a blurred
picture; tokens are scaled by position in the corrected protocol and replaced by one id in the curves. Start, end and
padding tokens stay. The formulae are those of :mod:`captum_m2ib.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.layers import LayerLike
from captum_m2ib.metrics import (
    deletion,
    image_confidence,
    insertion,
    token_confidence,
    token_deletion,
    token_insertion,
)

FIGURES = {
    "image confidence drop": -1,
    "image confidence increase": 1,
    "image insertion": 1,
    "image deletion": -1,
    "text confidence drop": -1,
    "text confidence increase": 1,
    "text insertion": 1,
    "text deletion": -1,
}
"""What is measured: 1 where higher is better, -1 where lower is."""


def faithfulness(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, Tensor],
    maps: tuple[Tensor | None, Tensor | None],
    additional_forward_args: Any = None,
    *,
    maskable: Tensor | None = None,
    replacement: int | None = None,
    embedding: LayerLike | None = None,
    steps: int = 50,
    internal_batch_size: int = 64,
) -> dict[str, list[float]]:
    r"""Faithfulness of maps, per pair.

    Args:

        forward_func (Callable): ``forward_func(pixels, ids, *additional)``, one score per pair, (N,).
        inputs (tuple[Tensor, Tensor]): Pixels, (N, C, H, W), and token ids, (N, L).
        maps (tuple[Tensor or None, Tensor or None]): The pictures' maps, (N, H, W) or (N, C, H, W), and the captions',
                    (N, L); None leaves out the figures of that modality.
        additional_forward_args (Any, optional): Further arguments of ``forward_func``. Default: None
        maskable (Tensor, optional): Boolean, (N, L): False for start, end and padding tokens, e.g.
                    ``~torch.tensor(pairs.special)``. Needed for captions. Default: None
        replacement (int, optional): The id that stands for no word, see
                    :func:`captum_m2ib.encoders.spelling.blank_token`. Needed for captions. Default: None
        embedding (nn.Module or str, optional): The layer that turns ids into rows. Default: None (the table of tokens
                    of a :class:`DualEncoder`'s second tower)
        steps (int, optional): Steps of a picture's curve. Default: 50
        internal_batch_size (int, optional): Most pairs in one pass. Default: 64

    Returns:
        dict: Of :data:`FIGURES` those that were asked for, one value per pair. Drops are 100 times the loss of cosine,
        increases 0 or 100, insertion and deletion areas under the score. NaN where a map is constant or not finite.

    Raises:
        ValueError: if shapes do not fit, or captions come without ``maskable``, ``replacement`` or an ``embedding``
            that can be found.

    Examples::

        >>> from captum_m2ib.encoders.spelling import blank_token
        >>> found = faithfulness(
        ...     encoder, pairs.inputs, (image_bits, token_bits), pairs.additional_forward_args,
        ...     maskable=~torch.tensor(pairs.special), replacement=blank_token(encoder))
        >>> len(found["image deletion"])  # one value per pair
        2
    """
    image_map, token_map = maps
    found: dict[str, Tensor] = {}
    if image_map is not None:
        pixels = inputs[0]
        given = (forward_func, inputs, image_map, additional_forward_args)
        step = max(1, -(-pixels.shape[-2] * pixels.shape[-1] // steps))
        kept = image_confidence(*given, internal_batch_size=internal_batch_size)
        found["image confidence drop"] = kept.confidence_drop
        found["image confidence increase"] = kept.confidence_increase
        found["image insertion"] = insertion(*given, step=step, internal_batch_size=internal_batch_size).auc
        found["image deletion"] = deletion(*given, step=step, internal_batch_size=internal_batch_size).auc
    if token_map is not None:
        if maskable is None or replacement is None:
            missing = "maskable" if maskable is None else "replacement"
            raise ValueError(
                f"{missing}: expected one because captions are measured, got None; pass "
                "maskable=~torch.tensor(pairs.special) and replacement=blank_token(encoder)."
            )
        given = (forward_func, inputs, token_map, additional_forward_args)
        table = token_table(forward_func) if embedding is None else embedding
        scaled = token_confidence(*given, maskable=maskable, embedding=table, internal_batch_size=internal_batch_size)
        found["text confidence drop"] = scaled.confidence_drop
        found["text confidence increase"] = scaled.confidence_increase
        replaced: dict[str, Any] = {
            "maskable": maskable,
            "replacement": replacement,
            "internal_batch_size": internal_batch_size,
        }
        found["text insertion"] = token_insertion(*given, **replaced).auc
        found["text deletion"] = token_deletion(*given, **replaced).auc
    return {name: values.double().tolist() for name, values in found.items()}


def token_table(encoder: Any) -> LayerLike:
    r"""The layer of an encoder's second tower that turns token ids into rows, before positions are added.

    Args:

        encoder (DualEncoder): The encoder.

    Returns:
        nn.Module: The table.

    Raises:
        ValueError: if it cannot be found.
    """
    found = encoder.token_table_of(1) if isinstance(encoder, DualEncoder) else None
    if found is not None:
        return found
    raise ValueError(
        f"embedding: found no table of tokens in {type(encoder).__name__}; pass the layer that turns ids into rows, "
        "e.g. embedding='text_model.embeddings.token_embedding'."
    )


def maskable_tokens(pairs: Any) -> Tensor:
    """Which tokens are words, (N, L): not added by the tokenizer, as padding, start and end are."""
    return ~torch.tensor(pairs.special, dtype=torch.bool)
