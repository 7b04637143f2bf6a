"""The methods that the benchmarks compare, each by one name, at its published defaults and where it measured best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_m2ib.attr import (
    RISE,
    AttentionRelevance,
    GradECLIP,
    LeGrad,
    MultiModalInfoBottleneck,
    NarrowingInfoBottleneck,
)
from captum_m2ib.dual_encoder import DualEncoder


class _Floor:
    """A map that knows nothing of the pair: what a method must beat."""

    def __init__(self, forward_func: DualEncoder) -> None:
        self.forward_func = forward_func

    def attribute(self, inputs: Any, additional_forward_args: Any = None, **settings: Any) -> Any:
        maps = tuple(self.map_of(tensor) for tensor in (inputs if isinstance(inputs, tuple) else (inputs,)))
        return maps if isinstance(inputs, tuple) else maps[0]

    def map_of(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError


class CentrePrior(_Floor):
    """Objects tend to lie in the middle: a Gaussian there, a quarter of the side wide; tokens all alike."""

    def map_of(self, tensor: Tensor) -> Tensor:
        if tensor.ndim != 4:
            return torch.ones(tensor.shape)
        rows, columns = (torch.linspace(-2, 2, side).square() / 2 for side in tensor.shape[-2:])
        return torch.exp(-(rows[:, None] + columns)).expand(tensor.shape)


class RandomMap(_Floor):
    """Uniform noise, the same for every batch."""

    def map_of(self, tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0))


def _from_first_block(method: Callable[..., Any]) -> Callable[[DualEncoder], Any]:
    return lambda encoder: method(encoder, layers=[encoder.stages(index)[0][0] for index in (0, 1)])


class _AtRecommendedLayers:
    """The narrowing bottleneck at the output of the layers that M2IB is measured best at."""

    def __init__(self, encoder: DualEncoder) -> None:
        self.forward_func = encoder
        self._method = NarrowingInfoBottleneck(encoder, layers=encoder.recommended_layers())

    def attribute(self, inputs: Any, additional_forward_args: Any = None, **settings: Any) -> Any:
        return self._method.attribute(
            inputs, additional_forward_args=additional_forward_args, attribute_to_layer_input=False, **settings
        )


METHODS: dict[str, Callable[[DualEncoder], Any]] = {
    "m2ib": MultiModalInfoBottleneck,
    "m2ib-published": MultiModalInfoBottleneck.published,
    "nib": NarrowingInfoBottleneck,
    "nib-recommended-layers": _AtRecommendedLayers,
    "grad-eclip": GradECLIP,
    "relevance": AttentionRelevance,
    "relevance-all-blocks": _from_first_block(AttentionRelevance),
    "legrad": LeGrad,
    "legrad-all-blocks": _from_first_block(LeGrad),
    "rise": RISE,
    "centre": CentrePrior,
    "random": RandomMap,
}
