"""Grad-ECLIP: values of attention, weighted by the score's gradient and by how the pooled token looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_m2ib.attr._attended import Attended, attend, is_unit
from captum_m2ib.attr._pairwise import AttentionAttribution, Formula, last_blocks
from captum_m2ib.attr._units import sum_units
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.layers import LayerLike
from captum_m2ib.engine.layouts import TextLayout
from captum_m2ib.engine.real_units import real_elements
from captum_m2ib.engine.suffix import Suffix


class GradECLIP(AttentionAttribution):
    r"""Gradient-based explanation of CLIP (Grad-ECLIP), for towers with attention.

    Per block, with ``w`` the gradient of the score with respect to what attention returns for the pooled token (heads
    joined, before the output projection), ``v_i`` the value of token ``i``, and ``s_i`` the cosine similarity of the
    pooled token's query and token ``i``'s key, both taken through the output projection, scaled to [0, 1] over the
    tokens, ::

        attribution_i = ReLU(sum over blocks of s_i * sum over channels of w * v_i).

    Choices, as in the authors' code: the last block of an image tower and the last eight of a text tower; ``s`` is
    scaled over the patches of a picture and over all tokens of a caption. Unlike that code, which reruns its blocks
    with one head and so explains another score, attention keeps its heads: ``w`` is the gradient of the model's own
    score. Padding is left out of the scaling. Where a tower pools by averaging or by a pooling head, the sum runs over
    the queries that the score reads.

    Zhao et al., "Gradient-based Visual Explanation for Transformer-based CLIP", ICML 2024,
    https://arxiv.org/abs/2502.18816

    Args:

        forward_func (Callable or nn.Module): As for :class:`MultiModalInfoBottleneck`.
        layers (sequence, optional): Per modality the first block that counts; all after it count as well. Default:
                    None (as above)
        layouts (sequence, optional): Per modality how hidden-state units map onto input units. Default: None (derived
                    from the encoder)

    Raises:
        ValueError: if a layer is unknown, or none can be chosen for ``forward_func``.
        TypeError: if ``forward_func`` cannot be called.

    Examples::

        >>> grad_eclip = GradECLIP(encoder)
        >>> image_map, token_map = grad_eclip.attribute(
        ...     pairs.inputs, additional_forward_args=pairs.additional_forward_args)
        >>> image_map.shape, token_map.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 7]))
    """

    def _choose_layers(self, encoder: DualEncoder) -> Sequence[LayerLike]:
        return last_blocks(encoder, [8 if isinstance(layout, TextLayout) else 1 for layout in encoder.layouts])

    def _formula(self) -> Formula:
        def explain(suffix: Suffix, index: int, arguments: tuple[Any, ...]) -> Tensor:
            attended = attend(suffix, index, type(self).__name__)
            hidden = suffix.hidden[index]
            counts = is_unit(hidden, lambda numbers: sum_units(self.layouts[index], numbers, index, arguments))
            real = real_elements(self.layouts[index], hidden, index, arguments)
            counts = counts if real is None else counts & real.squeeze(-1)
            # A pooling head looks at the tokens in the place of the last block's pooled token.
            blocks = attended[-1:] if attended[-1].pools else attended
            read = blocks[-1].read_queries()
            return torch.stack([emphasis(one, read, counts) for one in blocks]).sum(0).clamp(min=0).unsqueeze(-1)

        return Formula(explain)


def emphasis(attended: Attended, read: Tensor, counts: Tensor) -> Tensor:
    r"""One block's share of the attribution, (N, tokens).

    Args:

        attended (Attended): The block's attention.
        read (Tensor): Which queries the score reads, (N, queries).
        counts (Tensor): Over which tokens similarities are scaled, (tokens,) or (N, tokens).

    Returns:
        Tensor: signed, (N, tokens).
    """
    attention, pairs = attended.attention, attended.pairs
    query, key, value = (_joined(attention.heads(t, pairs)) for t in (attention.query, attention.key, attention.value))
    weight, bias = attention.projection or (None, None)
    if weight is None or weight.shape[1] != query.shape[-1]:
        heads, found = attended.gradient.shape[1], "none" if weight is None else f"one of {weight.shape[1]}"
        raise ValueError(
            "layers: GradECLIP takes queries and keys through the output projection of their attention, and looked for "
            f"a linear map of {query.shape[-1]} channels ({heads} heads side by side) as what follows it, but found "
            f"{found}, as where heads are modules of their own; use AttentionRelevance, which needs none."
        )
    bias = None if bias is None else bias.to(query.dtype)
    query, key = (F.normalize(F.linear(tensor, weight.to(query.dtype), bias), dim=-1) for tensor in (query, key))
    similarity = _scaled(query @ key.transpose(-1, -2), counts)
    wanted = _joined(attended.gradient) @ value.transpose(-1, -2)
    return (wanted * similarity * read.unsqueeze(-1)).sum(1)


def _joined(heads: Tensor) -> Tensor:
    """Heads side by side: (N, heads, units, channels of a head) to (N, units, channels)."""
    return heads.transpose(1, 2).flatten(2)


def _scaled(similarity: Tensor, counts: Tensor) -> Tensor:
    """Each row, (N, queries, keys), scaled to [0, 1] over the keys that count; 0 where all are equal."""
    counts = counts.expand(len(similarity), -1).unsqueeze(1)
    least = similarity.masked_fill(~counts, torch.inf).amin(-1, keepdim=True)
    span = similarity.masked_fill(~counts, -torch.inf).amax(-1, keepdim=True) - least
    return torch.where(span > 0, (similarity - least) / span.clamp(min=torch.finfo(similarity.dtype).tiny), 0.0)
