"""What the methods that explain pairs at one layer per modality share: checked arguments, one recorded pass, maps.

A method says which layers it takes by default and what each element of a hidden state is worth; elements become units
of the input and spread over it here, with their signs and their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_m2ib import _captum
from captum_m2ib.attr._arguments import format_additional, format_inputs, scorer
from captum_m2ib.attr.multi_modal_info_bottleneck import (
    MultiModalInfoBottleneck,
    as_forward_func,
    roots_of,
    to_units_and_input,
)
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.gates import Gated, check_finite, slice_pairs
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layers import Layer, LayerLike
from captum_m2ib.engine.layouts import Layout, real_elements, to_input
from captum_m2ib.engine.settings import check_count
from captum_m2ib.engine.suffix import Suffix, Tap

Forward: TypeAlias = Callable[[tuple[Any, ...]], Any]
Explain: TypeAlias = Callable[[Suffix, int, tuple[Any, ...]], Tensor]


class PairAttribution(_captum.Attribution):
    """A method that explains each input at one layer of its tower."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layers: Sequence[LayerLike] | LayerLike | None,
        layouts: Sequence[Layout | None] | None,
        choose: Callable[[DualEncoder], Sequence[LayerLike]],
    ) -> None:
        forward_func = as_forward_func(forward_func)
        _captum.Attribution.__init__(self, forward_func)
        chosen = choose(_as_encoder(forward_func)) if layers is None else layers
        resolved = MultiModalInfoBottleneck(forward_func, chosen, layouts)
        self.layers: tuple[Layer, ...] = resolved.layers
        self.layouts: tuple[Layout | None, ...] = resolved.layouts

    def attribute_future(self) -> None:
        """Not offered, as for most of Captum's methods."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def _explain(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any,
        additional_forward_args: Any,
        pairs_at_once: int | None,
        at_input: bool,
        show_progress: bool,
        explain: Explain,
        around: Callable[[Forward], Forward] = lambda forward: forward,
    ) -> Tensor | tuple[Tensor, ...]:
        """Attributions of the inputs' shapes; ``explain`` values the elements of one modality's hidden state.

        ``around`` wraps what computes the scores.
        """
        tensors = format_inputs(inputs, len(self.layers))
        pairs = tensors[0].shape[0]
        additional = format_additional(additional_forward_args, pairs)
        forward, arguments = scorer(self.forward_func, tensors, additional, target)
        layers = self.layers[: len(tensors)]
        at_once = min(pairs, pairs_at_once or pairs)
        parts: list[list[Tensor]] = [[] for _ in tensors]
        with (
            borrowing(*roots_of(self.forward_func, layers)),
            tqdm(
                total=-(-pairs // at_once) * len(tensors),
                desc=self.get_name(),
                unit="map",
                disable=not show_progress,
            ) as bar,
        ):
            for start in range(0, pairs, at_once):
                chunk = tuple(slice_pairs(argument, pairs, start, at_once) for argument in arguments)
                suffix = Suffix(around(forward), chunk, chunk[0].shape[0], [Tap(layer, at_input) for layer in layers])
                check_finite("score of the untouched pairs", suffix.score, start)
                for index in range(len(tensors)):
                    elements = explain(suffix, index, chunk)
                    check_finite("attribution", elements, start)
                    units = sum_units(self.layouts[index], elements, index, chunk)
                    parts[index].append(spread_units(self.layouts[index], units, chunk[index]))
                    bar.update()
        return _captum.format_output(
            _captum.is_tuple(inputs), tuple(torch.cat(part).detach().contiguous() for part in parts)
        )


def _as_encoder(forward_func: Any) -> DualEncoder:
    if not isinstance(forward_func, DualEncoder):
        raise ValueError(
            f"layers: they can only be chosen for a DualEncoder, got {type(forward_func).__name__}; name one layer "
            "per input, e.g. layers=(model.image_tower.blocks[-1], model.text_tower.blocks[-1])."
        )
    return forward_func


def last_blocks(encoder: DualEncoder, counts: Sequence[int]) -> Sequence[LayerLike]:
    """Per tower the first of its last so many blocks, or its first block if it has fewer."""
    towers = [[block for stage in encoder.stages(index) for block in stage] for index in (0, 1)]
    return encoder.told_apart([blocks[-min(count, len(blocks))] for blocks, count in zip(towers, counts, strict=True)])


def sum_units(layout: Layout | None, elements: Tensor, modality: int, arguments: tuple[Any, ...]) -> Tensor:
    """Elements of a hidden state summed to the input's patches or tokens; 0 at padding."""
    real = real_elements(layout, elements, modality, arguments)
    return to_units_and_input(layout, Gated(elements, None, real), arguments[modality])[0]  # type: ignore[arg-type]


def spread_units(layout: Layout | None, units: Tensor, inputs: Tensor) -> Tensor:
    """Units spread over the input they came from."""
    return units if layout is None or units.shape == inputs.shape else to_input(layout, units, inputs)


def gradients(score: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the summed scores in float32 or better, 0 where they do not depend; the graph is kept."""
    # What a single element contributes to a score is below what half precision can hold.
    scale = 2.0**12 if any(tensor.dtype == torch.float16 for tensor in tensors) else 1.0
    found = torch.autograd.grad(score.sum() * scale, list(tensors), retain_graph=True, materialize_grads=True)
    return [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale for gradient in found]


def rows_at_once(internal_batch_size: int | None, rows_per_pair: int) -> tuple[int | None, int]:
    """How many pairs, and how many rows of each, go through the model together."""
    if internal_batch_size is None:
        return None, rows_per_pair
    check_count("internal_batch_size", internal_batch_size)
    return max(1, internal_batch_size // rows_per_pair), min(rows_per_pair, internal_batch_size)
