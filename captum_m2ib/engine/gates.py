"""The gates of one layer for a batch of pairs, their prior and their noise.

Noise is common to all pairs and comes from generators of the call's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from captum_m2ib.engine.grids import channel_axis
from captum_m2ib.engine.ground import ground_of
from captum_m2ib.engine.information import close_fully, information, sample
from captum_m2ib.engine.layouts import Layout
from captum_m2ib.engine.real_units import covered_elements, real_elements
from captum_m2ib.engine.settings import LayerSettings
from captum_m2ib.engine.statistics import ChannelStatistics, floor_std
from captum_m2ib.engine.suffix import Suffix
from captum_m2ib.engine.units import to_units

Prior: TypeAlias = ChannelStatistics | Literal["pair"] | None
GateFilter: TypeAlias = Callable[[Tensor], Tensor]
FilterMaker: TypeAlias = "Callable[[Tensor, Tensor, Tensor | None], GateFilter | None]"


def noise(
    seed: int,
    layer: int,
    step: int,
    draws: int,
    shape: Sequence[int],
    antithetic: bool = False,
    from_middle: bool = False,
) -> Tensor:
    r"""Standard normal draws for one step, (draws, \*shape), the same on every device.

    The first units do not depend on how many follow, so padding a batch further changes nothing.

    Args:

        seed (int): The call's seed.
        layer (int): What tells the layer's noise from that of others, such as its position.
        step (int): Step of the optimisation.
        draws (int): Number of draws.
        shape (sequence of int): Shape of one pair's hidden state.
        antithetic (bool, optional): The second half of the draws is the first with its sign changed, so that what is
            linear in the noise cancels. Default: False
        from_middle (bool, optional): The first draw is the mean of all, without noise. Default: False

    Returns:
        Tensor: float32, on the CPU.
    """
    if from_middle:
        drawn = noise(seed, layer, step, draws - 1, shape, antithetic)
        return torch.cat([torch.zeros(1, *shape), drawn])
    generator = np.random.default_rng((seed, layer, step))
    own = (draws + 1) // 2 if antithetic else draws
    drawn = torch.from_numpy(generator.standard_normal((shape[0], own, *shape[1:]), dtype=np.float32)).movedim(1, 0)
    return torch.cat([drawn, -drawn[: draws - own]]) if antithetic else drawn


@dataclass(eq=False)
class Gates:
    """The gates of one layer for a batch of pairs, with everything that stays fixed during optimisation.

    ``stream`` tells their noise from that of other layers. ``shared`` is a dimension along which elements have one
    gate in common. ``idle``, where it is known, is what ``alpha`` would have become if no score had asked for anything:
    gates that are hardly further open shut. ``is_discrete`` says that what is explained are whole numbers, such as
    token ids.
    """

    index: int
    stream: int
    hidden: Tensor
    mean: Tensor | float
    std: Tensor | float
    real: Tensor | None
    beta: float
    initial_gate: float
    dtype: torch.dtype
    shared: int | None = None
    filter: GateFilter | None = None
    channels: int = -1
    is_discrete: bool = False
    idle: Tensor | None = None
    alpha: Tensor = field(init=False)

    def __post_init__(self) -> None:
        start = math.log(self.initial_gate / (1 - self.initial_gate))
        gated = self.hidden if self.shared is None else self.hidden.narrow(self.shared, 0, 1)
        self.alpha = torch.full_like(gated, start, requires_grad=True)

    @property
    def logits(self) -> Tensor:
        """Logits of the gates that the hidden state passes through."""
        found = self.applied(self.alpha)
        return found if self.idle is None else close_fully(found, self.applied(self.idle))

    def applied(self, alpha: Tensor) -> Tensor:
        """Logits of the gates that optimised values stand for."""
        return alpha if self.filter is None else self.filter(alpha)

    def information(self, logits: Tensor | None = None) -> Tensor:
        elements = information(self.logits if logits is None else logits, self.hidden, self.mean, self.std)
        return elements if self.real is None else torch.where(self.real, elements, 0.0)

    def sample(self, drawn: Tensor, logits: Tensor | None = None) -> Tensor:
        """Values for the suffix, (N * draws, ...); padding passes unchanged.

        Logits of other gates than these may be given, one set per draw, (N or 1, draws, ...).
        """
        hidden = self.hidden.unsqueeze(1)
        mean, std = (part.unsqueeze(1) if isinstance(part, Tensor) else part for part in (self.mean, self.std))
        drawn = drawn.to(hidden.device, hidden.dtype).unsqueeze(0)
        mixed = sample(self.logits.unsqueeze(1) if logits is None else logits, hidden, drawn, mean, std)
        if self.real is not None:
            mixed = torch.where(self.real.unsqueeze(1), mixed, hidden)
        return mixed.flatten(0, 1).to(self.dtype)


def gates_of(
    suffix: Suffix,
    arguments: tuple[Any, ...],
    index: int,
    prior: Prior,
    layout: Layout | None,
    settings: LayerSettings,
    modality: int,
    stream: int | None = None,
) -> Gates:
    held = suffix.hidden[index]
    hidden = held.to(torch.promote_types(held.dtype, torch.float32))
    # More layers than arguments can be explained at once, but no layout belongs to the others.
    modality = min(modality, len(arguments) - 1)
    real = real_elements(layout, hidden, modality, arguments)
    inputs = arguments[modality] if isinstance(arguments[modality], Tensor) else None
    channels, shared = channel_axis(layout, hidden, inputs), None
    is_input = suffix.taps[index].layer.argument is not None
    if is_input:
        real = covered_elements(layout, hidden) if real is None else real
        shared = channels if hidden.ndim == 4 else None
    mean, std = prior_of(prior, hidden, real, settings.variance[index], channels, is_input)
    beta, start = settings.beta[index], settings.initial_gate[index]
    stream = index if stream is None else stream
    discrete = inputs is not None and not inputs.is_floating_point()
    return Gates(index, stream, hidden, mean, std, real, beta, start, held.dtype, shared, None, channels, discrete)


def prior_of(
    prior: Prior, hidden: Tensor, real: Tensor | None, variance: float, channels: int, is_input: bool = False
) -> tuple[Tensor | float, Tensor | float]:
    """Mean and standard deviation of the prior and of the noise, of shapes that broadcast with the hidden state."""
    scale = variance**0.5
    if prior is None:
        return 0.0, scale
    if prior == "pair":
        mean, std = _own_statistics(hidden, real, channels)
        return ground_of(hidden, real, channels) if is_input else mean, std * scale
    if prior.mean.shape[0] != hidden.shape[channels]:
        raise ValueError(
            f"statistics: expected one value for each of the layer's {hidden.shape[channels]} channels, got "
            f"{prior.mean.shape[0]}; estimate them at the layer and side (input or output) that is explained."
        )
    shape = [-1 if dim == channels else 1 for dim in range(hidden.ndim)]
    mean, std = (part.to(hidden.device, hidden.dtype).view(shape) for part in (prior.mean, prior.std))
    return mean, std * scale


def _own_statistics(hidden: Tensor, real: Tensor | None, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over one pair's own real positions."""
    positions = tuple(dim for dim in range(1, hidden.ndim) if dim != channels)
    if not positions:
        raise ValueError(
            f"statistics: 'pair' needs several positions per pair, got a hidden state of shape {tuple(hidden.shape)}; "
            "pass ChannelStatistics or None."
        )
    weight = torch.ones_like(hidden.narrow(channels, 0, 1))
    weight = weight if real is None else weight * real
    count = weight.sum(positions, keepdim=True).clamp(min=1)
    mean = (hidden * weight).sum(positions, keepdim=True) / count
    std = (((hidden - mean).square() * weight).sum(positions, keepdim=True) / count).sqrt()
    return mean, floor_std(std.movedim(channels, -1)).movedim(-1, channels)


def unit_positions(layout: Layout, hidden: Tensor, inputs: Tensor) -> Tensor:
    r"""Which positions of a hidden state hold the units of the input.

    Args:

        layout (Layout): The tower's layout.
        hidden (Tensor): The hidden state, pairs first, (N, ...).
        inputs (Tensor): The tower's input.

    Returns:
        Tensor: Indices, of the shape of one pair's units (patches or tokens), into its positions as they follow one
        another with the channels last.

    Raises:
        ValueError: if the hidden state does not have the units that the layout says.
    """
    channels = channel_axis(layout, hidden, inputs)
    shape = [1, *hidden.shape[1:]]
    del shape[channels]
    # Numbered by their positions in one channel and empty in the others, elements sum to their positions.
    numbered = torch.zeros(1, *hidden.shape[1:], dtype=torch.float64, device=hidden.device)
    numbers = torch.arange(math.prod(shape), dtype=torch.float64, device=hidden.device)
    numbered.select(channels, 0).copy_(numbers.view(shape))
    return to_units(layout, numbered, inputs[:1])[0].long()


def check_finite(what: str, tensor: Tensor | None, start: int) -> None:
    if tensor is None:
        return
    bad = ~tensor.isfinite().flatten(1 if tensor.ndim > 1 else 0)
    if bool(bad.any()):
        rows = bad.any(1) if bad.ndim > 1 else bad
        which = ", ".join(str(start + int(i)) for i in rows.nonzero().flatten()[:5])
        raise ValueError(
            f"inputs: the {what} is NaN or infinite for pair {which}; check the pair's pixels and tokens, and the "
            "model's precision (half precision overflows where bfloat16 or float32 does not)."
        )
