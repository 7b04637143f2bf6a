"""Why this caption rather than that one: M2IB of the difference between two scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_m2ib.attr._priors import Statistics
from captum_m2ib.attr.multi_modal_info_bottleneck import MultiModalInfoBottleneck
from captum_m2ib.engine.interception import Handler, interpose
from captum_m2ib.engine.layers import Layer, LayerLike, input_layer, tensors_in
from captum_m2ib.engine.layouts import Layout, PackedLayout, TextLayout


class ContrastiveInfoBottleneck(MultiModalInfoBottleneck):
    r"""M2IB of what a pair's score has and a rival's has not.

    The bottleneck keeps the difference score(first, second) - max(score(first, rival), floor), for instance of one
    picture with two captions: bits go to what speaks for the second input rather than for the rival. The first input
    goes through its tower once, and its gates are common to both scores.

    Below the floor, what speaks against the rival is no merit: the plain difference (floor None) can be raised far
    beyond the pair's own by distorting what the rival names, and then bits go there.

    ``attribute`` takes ``inputs`` and ``additional_forward_args`` such that together they are::

        first, second, rival, *extras of the pair, *extras of the rival's pair,

    and explains those that are given as ``inputs``: the first, the first two, or all three. The extras are what
    ``forward_func`` reads after its two inputs, such as attention masks; for the rival's pair they come once more, as
    many as for the pair. Everything else is as for :class:`MultiModalInfoBottleneck`.

    Args:

        forward_func (Callable or nn.Module): As for :class:`MultiModalInfoBottleneck`, of two inputs.
        layers (sequence, optional): The layers of the first and of the second input's towers; the second's serves the
                    rival too. Default: None (the recommended ones, with the standardised prior)
        layouts (sequence, optional): Layouts of the first and the second input, for the arguments of ``forward_func``.
                    Default: None (derived from the encoder)
        statistics (mapping or sequence, optional): As for :class:`MultiModalInfoBottleneck`. Default: None
        floor (float, optional): The score below which the rival's counts no further; None for the plain difference.
                    It is in the score's own unit. Default: 0.0 (unrelated, for a cosine similarity)
        guides (sequence, optional): As for :class:`MultiModalInfoBottleneck`. Default: ()

    Raises:
        ValueError: if a layer is unknown, or cannot be recommended for this model.
        TypeError: if ``forward_func`` cannot be called.

    Examples::

        >>> right, wrong = encoder.prepare(images[0], captions[0]), encoder.prepare(images[0], captions[1])
        >>> contrast = ContrastiveInfoBottleneck(encoder)
        >>> image_bits, token_bits, rival_bits = contrast.attribute(
        ...     (*right.inputs, wrong.inputs[1]),
        ...     additional_forward_args=(*right.additional_forward_args, *wrong.additional_forward_args), n_steps=2)
        >>> image_bits.shape, token_bits.shape, rival_bits.shape
        (torch.Size([1, 3, 64, 64]), torch.Size([1, 5]), torch.Size([1, 7]))
    """

    _may_rise = (2,)

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layers: Sequence[LayerLike] | LayerLike | None = None,
        layouts: Sequence[Layout | None] | None = None,
        statistics: Statistics | None = None,
        floor: float | None = 0.0,
        guides: Sequence[LayerLike | None] = (),
    ) -> None:
        super().__init__(forward_func, layers, layouts, statistics, guides)
        if len(self.layers) != 2:
            raise ValueError(
                f"layers: expected two, of the first and of the second input's towers, got {len(self.layers)}."
            )
        self.floor = floor
        self.layers = (self.layers[0], *_twice(*self.layers))
        self.layouts = (*self.layouts[:2], self.layouts[1])
        self.priors = (*self.priors, self.priors[1])

    @property
    def _objective(self) -> Callable[..., Any]:
        return _Contrast(self.forward_func, self.floor)

    def _layouts_among(self, count: int) -> Sequence[Layout | None]:
        extras = count - 3
        if extras < 0 or extras % 2:
            raise ValueError(
                "inputs: expected, with additional_forward_args, a first input, a second, a rival of the second, and "
                f"as many further arguments for the rival's pair as for the pair, got {count} in all."
            )
        return [_moved(layout, by) for layout, by in zip(self.layouts, (1, 1, 1 + extras // 2), strict=True)]


def _twice(first: Layer, second: Layer) -> tuple[Layer, Layer]:
    """Where the second input is explained, and where its rival is."""
    if second.argument is not None:
        return second, input_layer(second.argument + 1)
    # Its tower runs for the second input, then for the rival, after the first input if it serves that too.
    call = (second.call or 0) if second.module is not first.module else 1
    return second._replace(call=call), second._replace(call=call + 1)


def _moved(layout: Layout | None, by: int) -> Layout | None:
    """A layout whose further arguments stand so many places later."""
    if isinstance(layout, TextLayout) and layout.mask_argument is not None:
        return replace(layout, mask_argument=layout.mask_argument + by)
    if isinstance(layout, PackedLayout):
        places = {name: getattr(layout, name) for name in ("mask_argument", "shapes_argument")}
        return replace(layout, **{name: at + by for name, at in places.items() if at is not None})
    return layout


class _Contrast:
    """The score of a pair minus the score of its first input with a rival of the second, down to a floor."""

    def __init__(self, forward_func: Callable[..., Any], floor: float | None) -> None:
        self.forward_func = forward_func
        self.floor = floor

    def __call__(self, first: Tensor, second: Tensor, rival: Tensor, *extras: Any) -> Any:
        half = len(extras) // 2
        own = extras[:half]
        # Extras that both pairs have alike are the first input's, or might as well be.
        others = [a if _is_same(a, b) else b for a, b in zip(own, extras[half:], strict=True)]
        once = _Once(first, own)
        with interpose(once):
            score = self.forward_func(first, second, *own)
            once.repeats = True
            against = self.forward_func(first, rival, *others)
        return score - (against if self.floor is None else against.clamp(min=self.floor))


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))
    return one is other


class _Once:
    """What a module made of the first input alone is made once, and given again."""

    def __init__(self, first: Tensor, extras: tuple[Any, ...]) -> None:
        self.first = id(first)
        self.arguments = {self.first, *(id(tensor) for tensor in tensors_in(extras))}
        self.repeats = False
        self.made: dict[Any, Any] = {}

    def __call__(self, proceed: Handler, aside: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        received = [id(tensor) for tensor in tensors_in((args, kwargs))]
        if not received or not self.arguments.issuperset(received):
            # A whole that reads the first input with others would be skipped where only the rival's side is rerun, and
            # the part that reads the first alone with it.
            return (aside if self.first in received else proceed)(module, *args, **kwargs)
        key = (id(module), *received)
        if not self.repeats or key not in self.made:
            self.made[key] = proceed(module, *args, **kwargs)
        return self.made[key]
