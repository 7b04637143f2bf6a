"""See every attention of a running model, as the model computes it: fused, by hand, or inside torch's own module.

Functions of torch are observed for the current thread while a pass is running; no module is touched and no attention
implementation is switched. What is kept of an attention ``O = A V`` is enough to know its weights ``A`` and, from the
gradient of a score with respect to ``O``, their gradient ``dA = dO V^T``, whether or not ``A`` was ever formed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = ("matmul", "bmm", "baddbmm", "__matmul__")
_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)
_FUSED = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass
class Attention:
    r"""One attention of a pass.

    Attributes:

        query (Tensor): (N, heads, queries, channels of a head), or heads merged into the first dimension.
        key (Tensor): (N, heads, keys, channels of a head), likewise.
        value (Tensor): Likewise.
        output (Tensor): What attention returned before heads are joined and projected, (N, heads, queries, channels of
            a head), likewise, a part of the graph.
        weigh (Callable): Computes the weights, (N, heads, queries, keys), likewise.
        projection (tuple): Weight and bias of the linear map that follows; empty if none does.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    weigh: Callable[[], Tensor]
    projection: tuple[Tensor | None, ...] = ()

    @property
    def pools(self) -> bool:
        """Whether this is a pooling head's, whose queries are not the tokens."""
        return self.query.shape[-2] != self.key.shape[-2]

    def heads(self, tensor: Tensor, pairs: int) -> Tensor:
        """A tensor of this attention as (N, heads, units, channels), in float32 or better, detached."""
        precise = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        split = precise.unflatten(0, (pairs, -1)) if precise.ndim == 3 and precise.shape[0] % pairs == 0 else precise
        if split.ndim != 4 or split.shape[0] != pairs:
            raise ValueError(
                f"layers: expected attention over all tokens of a pair, (pairs, heads, tokens, channels) with {pairs} "
                f"pairs, got {tuple(tensor.shape)}; towers that attend within windows or frames have no weights "
                "between any two tokens. Use NarrowingInfoBottleneck or RISE for them."
            )
        return split

    def weights(self, pairs: int) -> Tensor:
        """The weights, (N, heads, queries, keys)."""
        return self.heads(self.weigh(), pairs)


@dataclass
class _Scores:
    """The product of queries and keys, before or after it became weights."""

    query: Tensor
    key: Tensor
    are_weights: bool = False


@dataclass
class RecordAttention(TorchFunctionMode):
    """Keeps every attention of the passes that run inside, in their order."""

    seen: list[Attention] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        # The tensors themselves are kept: an id alone may be given to another tensor later.
        self._known: dict[int, tuple[Tensor, _Scores]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._fused(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        output = func(*args, **kwargs)
        if name == "linear":
            self._project(*args, **kwargs)
        elif isinstance(output, Tensor) and output.ndim >= 3:
            self._follow(name, output, args, kwargs)
        return output

    def _keep(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, weigh: Callable[[], Tensor]) -> None:
        self.seen.append(Attention(query, key, value, output, weigh))

    def _fused(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = {**dict(zip(_FUSED, args, strict=False)), **kwargs}
        output = func(*args, **kwargs)
        query, key, value = (given[name] for name in ("query", "key", "value"))
        if given.get("enable_gqa"):
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        mask, causal, scale = given.get("attn_mask"), given.get("is_causal", False), given.get("scale")

        def weigh() -> Tensor:
            return _weights(query, key, mask, causal, scale)

        self._keep(query, key, value, output, weigh)
        return output

    def _multi_head(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """torch's attention module, whose function hides its parts: the same computation, in the open."""
        bound = _MULTI_HEAD.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if given["bias_k"] is not None or given["add_zero_attn"] or given["query"].ndim != 3:
            raise ValueError(
                "layers: expected batched torch.nn.MultiheadAttention without bias_k, bias_v and add_zero_attn; "
                "choose a later layer, or use NarrowingInfoBottleneck or RISE."
            )
        query, key, value = _in_projection(given)
        mask = _joint_mask(given, query)
        output = F.scaled_dot_product_attention(query, key, value, mask)

        def weigh() -> Tensor:
            return _weights(query, key, mask, False, None)

        self._keep(query, key, value, output, weigh)
        self.seen[-1].projection = (given["out_proj_weight"], given["out_proj_bias"])
        joined = output.permute(2, 0, 1, 3).flatten(2)
        projected = F.linear(joined, given["out_proj_weight"], given["out_proj_bias"])
        if not given["need_weights"]:
            return projected, None
        return projected, weigh().mean(1) if given["average_attn_weights"] else weigh()

    def _project(self, given: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """The first linear map after an attention that fits its joined heads is its output projection."""
        if not self.seen or self.seen[-1].projection:
            return
        made = self.seen[-1].output
        if made.numel() == given.numel() and weight.shape[1] % made.shape[-1] == 0:
            self.seen[-1].projection = (weight, bias)

    def _follow(self, name: str, output: Tensor, args: Any, kwargs: Any) -> None:
        """Attention written out: a product, what is done to it until a softmax, and a product with the values."""
        tensors = [argument for argument in (*args, *kwargs.values()) if isinstance(argument, Tensor)]
        scores = next((self._known[id(t)][1] for t in tensors if id(t) in self._known), None)
        if name in _PRODUCTS:
            left, right = tensors[-2:] if name == "baddbmm" else tensors[:2]
            if scores is not None and scores.are_weights:
                if id(left) in self._known:
                    self._keep(scores.query, scores.key, right, output, lambda: left)
            elif left.ndim == right.ndim >= 3:
                self._known[id(output)] = (output, _Scores(left, right.transpose(-1, -2)))
        elif scores is not None and name == "softmax":
            self._known[id(output)] = (output, _Scores(scores.query, scores.key, True))
        elif scores is not None and output.shape[-2:] == (scores.query.shape[-2], scores.key.shape[-2]):
            self._known[id(output)] = (output, scores)


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    query, key = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (query, key))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    # A query that may attend to nothing attends to nothing.
    return scores.softmax(-1).nan_to_num(0.0)


def _in_projection(given: dict[str, Any]) -> list[Tensor]:
    """Queries, keys and values, (N, heads, units, channels of a head), from sequence-first inputs."""
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    separate = given["use_separate_proj_weight"]
    weights = [given[name] for name in names] if separate else given["in_proj_weight"].chunk(3)
    biases = (None,) * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)
    inputs = (given["query"], given["key"], given["value"])
    return [
        F.linear(tensor, weight, bias).unflatten(-1, (given["num_heads"], -1)).permute(1, 2, 0, 3)
        for tensor, weight, bias in zip(inputs, weights, biases, strict=True)
    ]


def _joint_mask(given: dict[str, Any], query: Tensor) -> Tensor | None:
    """Both masks of torch's attention module as one that is added to the scores."""
    total = None
    attention, padding = given["attn_mask"], given["key_padding_mask"]
    if attention is not None:
        attention = _added(attention, query)
        total = attention.unflatten(0, query.shape[:2]) if attention.ndim == 3 else attention
    if padding is not None:
        padding = _added(padding, query)[:, None, None]
        total = padding if total is None else total + padding
    return total


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
