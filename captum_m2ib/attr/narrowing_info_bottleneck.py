"""NIB: a bottleneck without noise, one scale for the whole hidden state, narrowed from open to shut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_m2ib import _captum
from captum_m2ib.attr._arguments import rows_at_once
from captum_m2ib.attr._pairwise import Formula, PairAttribution, gradients
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.layers import LayerLike
from captum_m2ib.engine.settings import check_count
from captum_m2ib.engine.suffix import Suffix


class NarrowingInfoBottleneck(PairAttribution):
    r"""Narrowing information bottleneck attribution (NIB).

    The hidden state ``h`` that enters a layer is scaled by one number that runs from 1 / n_steps to 1; the gradients
    met on the way, averaged and multiplied by ``h``, are the attribution::

        attribution = h * mean over i = 1..n_steps of grad score(h * i / n_steps).

    This is layer integrated gradients from a hidden state of zeros, by a right Riemann sum: attributions of all
    tokens, prefix tokens included, sum to score(h) - score(0) up to O(1 / n_steps). Signs are kept; the published code
    loses them when it normalises its maps.

    Zhu et al., "Narrowing Information Bottleneck Theory for Multimodal Image-Text Representations Interpretability",
    ICLR 2025, https://arxiv.org/abs/2502.14889

    Args:

        forward_func (Callable or nn.Module): As for :class:`MultiModalInfoBottleneck`.
        layers (sequence, optional): Per modality the layer: a module, a dotted name, or a pair (module or name, index
                    of the call). Default: None (as published: the block at three quarters of each tower's depth)
        layouts (sequence, optional): Per modality how hidden-state units map onto input units. Default: None (derived
                    from the encoder)

    Raises:
        ValueError: if a layer is unknown, or none can be chosen for ``forward_func``.
        TypeError: if ``forward_func`` cannot be called.

    Examples::

        >>> nib = NarrowingInfoBottleneck(encoder)
        >>> image_map, token_map = nib.attribute(
        ...     pairs.inputs, additional_forward_args=pairs.additional_forward_args)
        >>> image_map.shape, token_map.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 7]))
    """

    def _choose_layers(self, encoder: DualEncoder) -> Sequence[LayerLike]:
        return encoder.published_layers()

    @_captum.log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 10,
        internal_batch_size: int | None = None,
        attribute_to_layer_input: bool = True,
        show_progress: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        r"""Attribute each pair's score to its inputs, in units of the score.

        Args:

            inputs (Tensor or tuple[Tensor, ...]): The inputs to explain, batch first; input ``i`` is explained at
                        layer ``i``.
            target (int, tuple, Tensor or list, optional): Selects one output per example where ``forward_func``
                        returns several. Default: None
            additional_forward_args (Any, optional): Further positional arguments of ``forward_func``. Default: None
            n_steps (int, optional): Steps of the integral. Default: 10
            internal_batch_size (int, optional): Most rows (pairs times steps) in one pass. Default: None (all at once)
            attribute_to_layer_input (bool, optional): Scale what the layers receive instead of what they return.
                        Default: True
            show_progress (bool, optional): Show a progress bar. Default: False

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*):
                        Signed, of the inputs' shapes; an image's channels share its pixels' attribution equally,
                        tokens at padding are exactly 0. What prefix tokens carry is not included.

        Raises:
            ValueError: if an argument is out of range, batch sizes differ, a layout does not fit, or a score is NaN
                or infinite.
            RuntimeError: if a layer is not reached, or the score does not depend on it.
        """
        check_count("n_steps", n_steps)
        pairs_at_once, steps_at_once = rows_at_once(internal_batch_size, n_steps)

        def explain(suffix: Suffix, index: int, arguments: tuple[Any, ...]) -> Tensor:
            return integrate(suffix, index, n_steps, steps_at_once)

        return self._explain(
            inputs,
            target,
            additional_forward_args,
            pairs_at_once,
            attribute_to_layer_input,
            show_progress,
            Formula(explain),
        )


def integrate(suffix: Suffix, index: int, n_steps: int, steps_at_once: int) -> Tensor:
    """The hidden state times its mean gradient on the way from zero, (N, ...) of its shape."""
    held = suffix.hidden[index]
    hidden = held.to(torch.promote_types(held.dtype, torch.float32))
    total = torch.zeros_like(hidden)
    for scales in (torch.arange(1, n_steps + 1, dtype=hidden.dtype, device=hidden.device) / n_steps).split(
        steps_at_once
    ):
        scaled = hidden.unsqueeze(1) * scales.view(1, -1, *[1] * (hidden.ndim - 1))
        values = scaled.flatten(0, 1).to(held.dtype).requires_grad_()
        (gradient,) = gradients(suffix.run({index: values}, len(scales)), [values])
        total += gradient.unflatten(0, (-1, len(scales))).sum(1)
    return hidden * total / n_steps
