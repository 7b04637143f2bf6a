"""What the methods that explain pairs at one layer per modality share: checked arguments, one recorded pass, maps.

A method says which layers it takes by default and what each element of a hidden state is worth; elements become units
of the input and spread over it here, with their signs and their sum.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_m2ib import _captum
from captum_m2ib.attr._arguments import Explained, rows_at_once
from captum_m2ib.attr._layers import encoder_of, ensure_layers, ensure_layouts
from captum_m2ib.attr._scoring import Forward, as_forward_func, roots_of
from captum_m2ib.attr._units import spread_units, sum_units
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.gates import check_finite
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layers import Layer, LayerLike
from captum_m2ib.engine.layouts import Layout
from captum_m2ib.engine.real_units import check_masks
from captum_m2ib.engine.suffix import Suffix, Tap

Explain: TypeAlias = Callable[[Suffix, int, tuple[Any, ...]], Tensor]


@dataclass(frozen=True)
class Formula:
    r"""What a method says of one call.

    Attributes:

        explain (Callable): Of a recorded pass, the index of a modality and all arguments: what each element of that
            modality's hidden state is worth, of its shape or with fewer channels.
        around (Callable): Wraps what computes the scores.
    """

    explain: Explain
    around: Callable[[Forward], Forward] = lambda forward: forward


class PairAttribution(_captum.Attribution):
    """A method that explains each input at one layer of its tower."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layers: Sequence[LayerLike] | LayerLike | None = None,
        layouts: Sequence[Layout | None] | None = None,
    ) -> None:
        forward_func = as_forward_func(forward_func)
        _captum.Attribution.__init__(self, forward_func)
        self.layers: tuple[Layer, ...] = ensure_layers(forward_func, layers, self._layers_for)
        self.layouts: tuple[Layout | None, ...] = ensure_layouts(forward_func, self.layers, layouts)

    def attribute_future(self) -> None:
        """Not offered, as for most of Captum's methods."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def _layers_for(self, forward_func: Any) -> Sequence[LayerLike]:
        example = "model.image_tower.blocks[-1], model.text_tower.blocks[-1]"
        return self._choose_layers(encoder_of(forward_func, "chosen", example))

    def _choose_layers(self, encoder: DualEncoder) -> Sequence[LayerLike]:
        """The layers where none are given."""
        return last_blocks(encoder, (1, 1))

    def _explain(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any,
        additional_forward_args: Any,
        pairs_at_once: int | None,
        at_input: bool,
        show_progress: bool,
        formula: Formula,
    ) -> Tensor | tuple[Tensor, ...]:
        """Attributions of the inputs' shapes."""
        given = Explained.ensure(self.forward_func, inputs, target, additional_forward_args, len(self.layers))
        count = len(given.inputs)
        check_masks(self.layouts, given.arguments)
        layers = self.layers[:count]
        taps = [Tap(layer, at_input) for layer in layers]
        parts: list[list[Tensor]] = [[] for _ in given.inputs]
        with (
            borrowing(*roots_of(self.forward_func, layers)),
            tqdm(
                total=given.count(pairs_at_once) * count, desc=self.get_name(), unit="map", disable=not show_progress
            ) as bar,
        ):
            for start, chunk in given.parts(pairs_at_once):
                suffix = Suffix(formula.around(given.forward), chunk, chunk[0].shape[0], taps)
                check_finite("score of the untouched pairs", suffix.score, start)
                for index in range(count):
                    elements = formula.explain(suffix, index, chunk)
                    check_finite("attribution", elements, start)
                    units = sum_units(self.layouts[index], elements, index, chunk)
                    parts[index].append(spread_units(self.layouts[index], units, chunk[index]))
                    bar.update()
        return _captum.format_output(
            _captum.is_tuple(inputs), tuple(torch.cat(part).detach().contiguous() for part in parts)
        )


class AttentionAttribution(PairAttribution):
    """A method that reads the attention of each tower from one of its blocks on."""

    @_captum.log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        internal_batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        r"""Attribute each pair's score to its inputs.

        Args:

            inputs (Tensor or tuple[Tensor, ...]): The inputs to explain, batch first; input ``i`` is explained from
                        layer ``i`` on.
            target (int, tuple, Tensor or list, optional): Selects one output per example where ``forward_func``
                        returns several. Default: None
            additional_forward_args (Any, optional): Further positional arguments of ``forward_func``. Default: None
            internal_batch_size (int, optional): Most pairs in one pass. Default: None (all at once)
            show_progress (bool, optional): Show a progress bar. Default: False

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*):
                        Non-negative, of the inputs' shapes; an image's channels share its pixels' attribution equally,
                        tokens at padding are exactly 0. Prefix tokens are not included.

        Raises:
            ValueError: if a tower has no attention over all its tokens, or none of the kind that the method needs,
                batch sizes differ, a layout does not fit, or a score is NaN or infinite.
            RuntimeError: if a layer is not reached, or the score does not depend on it.
        """
        pairs_at_once, _ = rows_at_once(internal_batch_size, 1)
        return self._explain(
            inputs, target, additional_forward_args, pairs_at_once, True, show_progress, self._formula()
        )

    @abstractmethod
    def _formula(self) -> Formula:
        """What each token that enters a tower's layer is worth, (N, tokens, 1)."""


def last_blocks(encoder: DualEncoder, counts: Sequence[int]) -> Sequence[LayerLike]:
    """Per tower the first of its last so many blocks, or its first block if it has fewer."""
    towers = [[block for stage in encoder.stages(index) for block in stage] for index in (0, 1)]
    return encoder.told_apart([blocks[-min(count, len(blocks))] for blocks, count in zip(towers, counts, strict=True)])


def gradients(score: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the summed scores in float32 or better, 0 where they do not depend; the graph is kept."""
    # What a single element contributes to a score is below what half precision can hold.
    scale = 2.0**12 if any(tensor.dtype == torch.float16 for tensor in tensors) else 1.0
    found = torch.autograd.grad(score.sum() * scale, list(tensors), retain_graph=True, materialize_grads=True)
    return [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale for gradient in found]
