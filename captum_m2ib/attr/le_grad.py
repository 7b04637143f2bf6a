"""LeGrad: how each layer's own embedding would gain from more attention to a token, summed over the last layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from captum_m2ib.attr._attended import Attended, check_keys, differentiate, pooled_rows, without_attention
from captum_m2ib.attr._attention import RecordAttention
from captum_m2ib.attr._pairwise import AttentionAttribution, Formula, last_blocks
from captum_m2ib.attr._scoring import Forward
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.interception import Handler, interpose
from captum_m2ib.engine.layers import Layer, LayerLike, find_hidden, get_at, replace_at, resolve_for
from captum_m2ib.engine.layouts import Layout
from captum_m2ib.engine.real_units import real_elements
from captum_m2ib.engine.suffix import Suffix


class LeGrad(AttentionAttribution):
    r"""Layerwise explainability through gradients of attention (LeGrad), for towers with attention.

    Each of the last blocks ``l`` is given an embedding of its own: the mean of its tokens, taken through what follows
    the last block. With ``s_l`` the score of that embedding and ``A_l`` the block's attention weights, ::

        attribution = sum over l of mean over heads and queries of ReLU(d s_l / d A_l).

    Where a pooling head attends to the tokens, the block's tokens go to that head as they are, and ``A_l`` are the
    head's weights.

    Choices, as in the authors' code: the last two blocks; for pooling heads, no correction by an empty prompt.
    The authors explain pictures; for captions, means run over the real tokens and weights that a mask forbids count
    as 0.

    Bousselham et al., "LeGrad: An Explainability Method for Vision Transformers via Feature Formation Sensitivity",
    ICCV 2025, https://arxiv.org/abs/2404.03214

    Args:

        forward_func (Callable or nn.Module): As for :class:`MultiModalInfoBottleneck`.
        layers (sequence, optional): Per modality the first block that counts, where ``forward_func`` is a
                    :class:`DualEncoder`; or per modality the list of blocks up to the last. Default: None (the last
                    two of each tower)
        layouts (sequence, optional): Per modality how hidden-state units map onto input units. Default: None (derived
                    from the encoder)

    Raises:
        ValueError: if a layer is unknown, is none of the tower's blocks, or none can be chosen for ``forward_func``.
        TypeError: if ``forward_func`` cannot be called.

    Examples::

        >>> legrad = LeGrad(encoder)
        >>> image_map, token_map = legrad.attribute(
        ...     pairs.inputs, additional_forward_args=pairs.additional_forward_args)
        >>> image_map.shape, token_map.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 7]))
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layers: Sequence[LayerLike | list[LayerLike]] | LayerLike | None = None,
        layouts: Sequence[Layout | None] | None = None,
    ) -> None:
        lists = [one if isinstance(one, list) else [one] for one in layers] if _has_lists(layers) else None
        first: Any = layers if lists is None else [blocks[0] for blocks in lists]
        super().__init__(forward_func, first, layouts)
        self.blocks: list[list[nn.Module]] = (
            [_following(self.forward_func, index, layer) for index, layer in enumerate(self.layers)]
            if lists is None
            else [[resolve_for(self.forward_func, block).module for block in blocks] for blocks in lists]
        )

    def _choose_layers(self, encoder: DualEncoder) -> Sequence[LayerLike]:
        return last_blocks(encoder, (2, 2))

    def _formula(self) -> Formula:
        watch = _Watch()

        def explain(suffix: Suffix, index: int, arguments: tuple[Any, ...]) -> Tensor:
            real = real_elements(self.layouts[index], suffix.hidden[index], index, arguments)
            return _sensitivity(suffix, index, self.blocks[index], watch, real).unsqueeze(-1)

        return Formula(explain, watch.around)


@dataclass
class _Watch:
    """Keeps what chosen blocks return within a pass, and can put something else in the place of one."""

    blocks: dict[int, tuple[Tensor, int, int]] = field(default_factory=dict)
    watched: Sequence[nn.Module] = ()
    record: RecordAttention = field(default_factory=RecordAttention)
    replaced: nn.Module | None = None
    value: Tensor | None = None

    def around(self, forward: Forward) -> Forward:
        def watched(arguments: tuple[Any, ...]) -> Any:
            with interpose(self, is_observer=True):
                return forward(arguments)

        return watched

    @contextmanager
    def replacing(self, block: nn.Module, value: Tensor) -> Iterator[None]:
        self.replaced, self.value = block, value
        try:
            yield
        finally:
            self.replaced = self.value = None

    def __call__(self, proceed: Handler, aside: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        before = len(self.record.seen)
        output = proceed(module, *args, **kwargs)
        if module is self.replaced:
            path = find_hidden(output)
            return output if path is None else replace_at(output, path, self.value)
        if any(module is block for block in self.watched):
            path = find_hidden(output)
            held = None if path is None else get_at(output, path)
            # A block that both towers share is called for the other one too, where nothing is differentiated.
            if held is not None and held.requires_grad:
                self.blocks.setdefault(id(module), (held, before, len(self.record.seen)))
        return output


def _has_lists(layers: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(layers, (list, tuple)) and any(isinstance(one, list) for one in layers)


def _following(forward_func: Any, index: int, layer: Layer) -> list[nn.Module]:
    """A tower's blocks from one of them to the last."""
    blocks: list[nn.Module] = []
    if isinstance(forward_func, DualEncoder):
        blocks = [block for stage in forward_func.stages(index) for block in stage]
    for position, block in enumerate(blocks):
        if block is layer.module:
            return blocks[position:]
    raise ValueError(
        f"layers: cannot tell which blocks follow {layer.name!r}; give LeGrad one of the tower's own blocks, or per "
        "modality the list of blocks up to the last, e.g. layers=([*image.blocks[-2:]], [*text.blocks[-2:]])."
    )


def _sensitivity(suffix: Suffix, index: int, blocks: list[nn.Module], watch: _Watch, real: Tensor | None) -> Tensor:
    """The attribution of the tokens of one tower, (N, tokens)."""
    hidden, axis = suffix.hidden[index], suffix.axes[index]
    watch.blocks, watch.watched = {}, blocks
    with RecordAttention() as watch.record:
        suffix.run({index: hidden.detach().requires_grad_()}, 1)
    seen, watch.watched = watch.record.seen, ()
    formed = [watch.blocks[id(block)] for block in blocks if id(block) in watch.blocks]
    ends = formed[-1][2] if formed else 0
    own = [attention for _, before, after in formed for attention in seen[before:after]]
    if not own or hidden.ndim != 3:
        raise without_attention(suffix, index, "LeGrad")
    if any(axis.split(held).shape != hidden.shape for held, _, _ in formed):
        raise ValueError(
            f"layers: LeGrad needs blocks with the same tokens, got hidden states of shape {tuple(hidden.shape)} and "
            f"{[tuple(held.shape) for held, _, _ in formed]}; choose a later block, or use NarrowingInfoBottleneck."
        )
    has_head = any(attention.pools for attention in seen[ends:])
    total = torch.zeros(hidden.shape[:2], device=hidden.device)
    for held, before, after in formed:
        tokens = held.detach().requires_grad_() if has_head else axis.merge(_mean_token(axis.split(held), real))
        with watch.replacing(blocks[-1], tokens), RecordAttention() as record:
            score = suffix.run({index: hidden.detach()}, 1)
        # Of the blocks that ran before they were replaced nothing is differentiated.
        attentions = [one for one in record.seen if one.output.requires_grad] if has_head else seen[before:after]
        for attended in differentiate(score, attentions, len(hidden)):
            check_keys(suffix, index, attended, "LeGrad")
            total = total + _gain(attended, real)
    return total


def _mean_token(tokens: Tensor, real: Tensor | None) -> Tensor:
    """The mean of each pair's real tokens, in the place of every token, (N, tokens, channels)."""
    weight = torch.ones_like(tokens[..., :1]) if real is None else real.to(tokens.dtype).expand(*tokens.shape[:2], 1)
    return ((tokens * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)).expand_as(tokens)


def _gain(attended: Attended, real: Tensor | None) -> Tensor:
    """Mean over heads and queries of what more weight on a token would add to the score, (N, keys)."""
    gain = (attended.weight_gradient().clamp(min=0) * (attended.weights() > 0)).mean(1)
    if attended.pools:
        return pooled_rows(attended, gain)
    queries = torch.full((len(gain), 1), gain.shape[1], device=gain.device) if real is None else real.sum(1)
    return gain.sum(1) / queries
