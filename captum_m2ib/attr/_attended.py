"""What the methods that read attention share: the attentions after a layer, and which queries the score reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_m2ib.attr._attention import Attention, RecordAttention
from captum_m2ib.attr._pairwise import gradients
from captum_m2ib.engine.suffix import Suffix


@dataclass
class Attended:
    r"""One attention of a pass, and the gradient of the summed scores with respect to its output.

    Attributes:

        attention (Attention): The attention.
        gradient (Tensor): (N, heads, queries, channels of a head).
        pairs (int): N.
    """

    attention: Attention
    gradient: Tensor
    pairs: int

    def weights(self) -> Tensor:
        """The weights, (N, heads, queries, keys)."""
        return self.attention.weights(self.pairs)

    def weight_gradient(self) -> Tensor:
        """Gradient of the summed scores with respect to the weights, (N, heads, queries, keys)."""
        return self.gradient @ self.attention.heads(self.attention.value, self.pairs).transpose(-1, -2)

    def read_queries(self) -> Tensor:
        """Which queries' outputs the score depends on, (N, queries) boolean."""
        return self.gradient.ne(0).any(-1).any(1)

    @property
    def pools(self) -> bool:
        """Whether this is a pooling head's."""
        return self.attention.pools


def attend(suffix: Suffix, index: int, method: str) -> list[Attended]:
    r"""Rerun the suffix from one tap, and differentiate the scores with respect to every attention on the way.

    Args:

        suffix (Suffix): The recorded pass, tapped at the inputs of layers.
        index (int): Which tap.
        method (str): The method's name, for errors.

    Returns:
        list[Attended]: in the order of the pass, at least one.

    Raises:
        ValueError: if there is no attention after the layer, or it is not over all tokens of a pair.
    """
    hidden = suffix.hidden[index].detach().requires_grad_()
    with RecordAttention() as record:
        score = suffix.run({index: hidden}, 1)
    seen = [attention for attention in record.seen if attention.output.requires_grad]
    if not seen or hidden.ndim != 3:
        raise without_attention(suffix, index, method)
    attended = differentiate(score, seen, len(hidden))
    for one in attended:
        check_keys(suffix, index, one, method)
    return attended


def check_keys(suffix: Suffix, index: int, attended: Attended, method: str) -> None:
    """Raise unless an attention is over the tokens that entered the tapped layer."""
    tokens, keys = suffix.hidden[index].shape[1], attended.attention.key.shape[-2]
    if keys != tokens:
        raise ValueError(
            f"layers: {method} needs attention over the {tokens} tokens of layer {suffix.taps[index].layer.name!r}, "
            f"got one over {keys}; choose a layer after which the tokens stay the same, or use NarrowingInfoBottleneck "
            "or RISE."
        )


def without_attention(suffix: Suffix, index: int, method: str) -> ValueError:
    """The error for a tower that does not attend."""
    layer = suffix.taps[index].layer
    return ValueError(
        f"layers: {method} needs a transformer tower, but found no attention over tokens after the input of layer "
        f"{layer.name!r} ({type(layer.module).__name__}), where the hidden state has the shape "
        f"{tuple(suffix.hidden[index].shape)}; use NarrowingInfoBottleneck or RISE for towers without attention, or "
        "name a block that attends."
    )


def differentiate(score: Tensor, attentions: list[Attention], pairs: int) -> list[Attended]:
    """The attentions that the scores depend on, with the gradients of their outputs."""
    found = gradients(score, [attention.output for attention in attentions])
    return [
        Attended(attention, attention.heads(gradient, pairs), pairs)
        for attention, gradient in zip(attentions, found, strict=True)
        if bool(gradient.any())
    ]


def pooled_rows(attended: Attended, relevance: Tensor) -> Tensor:
    """The mean of the rows, (N, queries, keys), of the queries that the score reads, (N, keys)."""
    read = attended.read_queries().unsqueeze(-1)
    return (relevance * read).sum(1) / read.sum(1).clamp(min=1)


def is_unit(suffix_hidden: Tensor, units_of: Any) -> Tensor:
    """Which tokens of a hidden state stand for units of the input, (tokens,) boolean."""
    tokens = suffix_hidden.shape[1]
    numbers = torch.arange(1, tokens + 1, dtype=torch.float64, device=suffix_hidden.device)
    found = units_of(numbers.expand(len(suffix_hidden), tokens).unsqueeze(-1)).amax(0).flatten().long()
    # Padding of one pair is a unit of another; what is padding in all of them keeps the number 0.
    mask = torch.zeros(tokens + 1, dtype=torch.bool, device=suffix_hidden.device)
    mask[found] = True
    return mask[1:]
