"""Attention relevance: which tokens reach the pooled one through attention that the score wants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_m2ib.attr._attended import Attended, attend, pooled_rows
from captum_m2ib.attr._pairwise import AttentionAttribution, Formula
from captum_m2ib.engine.suffix import Suffix


class AttentionRelevance(AttentionAttribution):
    r"""Attention relevance (Chefer et al.), for towers with attention.

    From the first block that counts to the last, with ``A`` a block's attention weights and ``dA`` the gradient of the
    score with respect to them, ::

        R = R + mean over heads of ReLU(A * dA) @ R,    starting from the identity.

    The row of the token that the score reads is the attribution; where it reads several, as a tower that averages its
    tokens does, their mean; where a pooling head attends to the tokens, that head's own mean over heads of
    ReLU(A * dA), times R. ``A`` and ``dA`` are those of the model as it runs, recomputed from its queries, keys and
    values and from the gradient of its attention's output, so that no attention implementation needs to be switched.
    The token that the score reads keeps the 1 that it has of itself.

    Chefer, Gur and Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
    Transformers", ICCV 2021, https://arxiv.org/abs/2103.15679

    Args:

        forward_func (Callable or nn.Module): As for :class:`MultiModalInfoBottleneck`.
        layers (sequence, optional): Per modality the first block that counts; all after it count as well. Default:
                    None (the last block of each tower, as in the authors' code for CLIP; give the first blocks for the
                    rule over all blocks, as in the paper)
        layouts (sequence, optional): Per modality how hidden-state units map onto input units. Default: None (derived
                    from the encoder)

    Raises:
        ValueError: if a layer is unknown, or none can be chosen for ``forward_func``.
        TypeError: if ``forward_func`` cannot be called.

    Examples::

        >>> relevance = AttentionRelevance(encoder)
        >>> image_map, token_map = relevance.attribute(
        ...     pairs.inputs, additional_forward_args=pairs.additional_forward_args)
        >>> image_map.shape, token_map.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 7]))
    """

    def _formula(self) -> Formula:
        def explain(suffix: Suffix, index: int, arguments: tuple[Any, ...]) -> Tensor:
            return relevance(attend(suffix, index, type(self).__name__)).unsqueeze(-1)

        return Formula(explain)


def relevance(attended: list[Attended]) -> Tensor:
    """Relevance of the tokens that entered the first attention, (N, tokens)."""
    first = attended[0].weights()
    rollout = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device).expand(len(first), -1, -1)
    last = attended[-1]
    for one in attended:
        wanted = (one.weights() * one.weight_gradient()).clamp(min=0).mean(1)
        if one.pools:
            return pooled_rows(one, wanted @ rollout)
        rollout = rollout + wanted @ rollout
    return pooled_rows(last, rollout)
