"""Optimise gates at tapped layers, one set per pair, until little but what the score needs gets through.

Per pair the loss is ``beta * mean(information over the pair's real elements) - mean over noise draws(score) / range``,
where the range is what the pair's score stands to lose (:mod:`captum_m2ib.engine.stakes`), so that its unit does not
matter. Losses are summed over pairs and Adam works element by element, so pairs never influence each other. Noise is
common to all pairs and comes from a generator of the call's own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_m2ib.engine.batch_axis import BatchAxis
from captum_m2ib.engine.ground import ground_of
from captum_m2ib.engine.information import NATS_PER_BIT, close_fully, information, mean_information, sample
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layers import Layer
from captum_m2ib.engine.layouts import Layout, channel_axis, covered_elements, real_elements, to_units
from captum_m2ib.engine.settings import LayerSettings
from captum_m2ib.engine.stakes import (
    CLOSED_DRAWS,
    HALVES,
    NothingToExplainWarning,
    Stakes,
    measured,
    nothing_to_lose,
)
from captum_m2ib.engine.statistics import ChannelStatistics, floor_std
from captum_m2ib.engine.suffix import Suffix, Tap

Prior: TypeAlias = ChannelStatistics | Literal["pair"] | None
GateFilter: TypeAlias = Callable[[Tensor], Tensor]

# Steps that no descent reaches, for draws of their own.
_STAKES = 2**32


@dataclass
class LayerRecord:
    r"""What the optimisation of one layer's gates did.

    Attributes:

        layer (str): The layer's name.
        score (Tensor): Mean score over the noise draws at each step, (n_steps, N).
        information (Tensor): Total information over the pair's real elements at each step, in bits, (n_steps, N).
        bits (Tensor): The same for the final gates, (N,).
        score_before (Tensor): Score of the untouched pair, (N,).
        score_after (Tensor): Mean score through the final gates, over fresh noise draws, (N,).
        score_range (Tensor): What the score is divided by in the objective: what the pair stands to lose, (N,); see
            :mod:`captum_m2ib.engine.stakes`.
        score_closed (Tensor or None): Mean score with all gates closed, (N,); None where ``score_range`` was given.
        units (Tensor or None): Bits per unit of the hidden state, before they are spread over the input: patches,
            (N, h, w), or tokens, (N, L).
    """

    layer: str
    score: Tensor
    information: Tensor
    bits: Tensor
    score_before: Tensor
    score_after: Tensor
    score_range: Tensor
    score_closed: Tensor | None = None
    units: Tensor | None = None


@dataclass
class Gated:
    """The result at one layer: bits per element, pairs first, and how the model holds that tensor."""

    bits: Tensor
    axis: BatchAxis
    real: Tensor | None
    record: LayerRecord | None = None


def noise(seed: int, layer: int, step: int, draws: int, shape: Sequence[int], antithetic: bool = False) -> Tensor:
    r"""Standard normal draws for one step, (draws, \*shape), the same on every device.

    The first units do not depend on how many follow, so padding a batch further changes nothing.

    Args:

        seed (int): The call's seed.
        layer (int): Position of the layer.
        step (int): Step of the optimisation.
        draws (int): Number of draws.
        shape (sequence of int): Shape of one pair's hidden state.
        antithetic (bool, optional): The second half of the draws is the first with its sign changed, so that what is
            linear in the noise cancels. Default: False

    Returns:
        Tensor: float32, on the CPU.
    """
    generator = np.random.default_rng((seed, layer, step))
    own = (draws + 1) // 2 if antithetic else draws
    drawn = torch.from_numpy(generator.standard_normal((shape[0], own, *shape[1:]), dtype=np.float32)).movedim(1, 0)
    return torch.cat([drawn, -drawn[: draws - own]]) if antithetic else drawn


@dataclass
class _Gates:
    """The gates of one layer for a batch of pairs, with everything that stays fixed during optimisation.

    ``shared`` is a dimension along which elements have one gate in common.
    """

    index: int
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
    closes_fully: bool = False
    alpha: Tensor = field(init=False)

    def __post_init__(self) -> None:
        start = math.log(self.initial_gate / (1 - self.initial_gate))
        gated = self.hidden if self.shared is None else self.hidden.narrow(self.shared, 0, 1)
        self.alpha = torch.full_like(gated, start, requires_grad=True)

    @property
    def logits(self) -> Tensor:
        """Logits of the gates that the hidden state passes through."""
        found = self.alpha if self.filter is None else self.filter(self.alpha)
        return close_fully(found) if self.closes_fully else found

    def information(self) -> Tensor:
        elements = information(self.logits, self.hidden, self.mean, self.std)
        return elements if self.real is None else torch.where(self.real, elements, 0.0)

    def sample(self, drawn: Tensor, logits: Tensor | None = None) -> Tensor:
        """Values for the suffix, (N * draws, ...); padding passes unchanged.

        Logits of other gates than these may be given, one set per draw, (N, draws, ...) or (1, draws, ...).
        """
        hidden = self.hidden.unsqueeze(1)
        mean, std = (part.unsqueeze(1) if isinstance(part, Tensor) else part for part in (self.mean, self.std))
        drawn = drawn.to(hidden.device, hidden.dtype).unsqueeze(0)
        mixed = sample(self.logits.unsqueeze(1) if logits is None else logits, hidden, drawn, mean, std)
        if self.real is not None:
            mixed = torch.where(self.real.unsqueeze(1), mixed, hidden)
        return mixed.flatten(0, 1).to(self.dtype)


def optimise(
    forward: Callable[[tuple[Any, ...]], Any],
    arguments: tuple[Any, ...],
    taps: Sequence[Tap],
    priors: Sequence[Prior],
    layouts: Sequence[Layout | None],
    settings: LayerSettings,
    roots: Sequence[Any] = (),
    with_record: bool = False,
    modalities: Sequence[int] | None = None,
    filters: Sequence[Callable[[Tensor, Tensor], GateFilter | None]] | None = None,
) -> list[Gated]:
    r"""Optimise the gates of every tap for every pair.

    Args:

        forward (Callable): Maps the tuple of all arguments to scores, (N,).
        arguments (tuple): All arguments; the first is a batch of N.
        taps (sequence of Tap): The layers.
        priors (sequence): Per tap its statistics, ``"pair"`` for those of the pair's own hidden state, or None for
            N(0, variance).
        layouts (sequence): Per tap its layout or None.
        settings (LayerSettings): The optimisation's settings.
        roots (sequence, optional): Modules known to be used. Default: ()
        with_record (bool, optional): Whether to keep what happened (one more run of the suffix). Default: False
        modalities (sequence of int, optional): Per tap the argument that it explains. Default: None (tap ``i`` explains
            argument ``i``)
        filters (sequence of callable, optional): Per tap what makes, of the hidden state and the explained input, the
            function from gate logits to the logits of the gates that are applied, or None. Default: None (gates are
            applied as they are)

    Returns:
        list[Gated]: one per tap.

    Raises:
        ValueError: if the score, a hidden state or a gradient is not finite, or there is not one range per pair.
    """
    pairs = arguments[0].shape[0]
    ranges = settings.score_range
    if isinstance(ranges, tuple) and len(ranges) != pairs:
        raise ValueError(f"score_range: expected one number or one per pair ({pairs}), got {len(ranges)}.")
    rows = settings.internal_batch_size or pairs * settings.n_samples
    at_once = max(1, min(pairs, rows // settings.n_samples))
    parts = -(-pairs // at_once)
    explains = range(len(taps)) if modalities is None else modalities
    objectives = [range(len(taps))] if settings.joint else [range(i, i + 1) for i in range(len(taps))]
    results: list[list[Gated]] = [[] for _ in taps]
    hopeless: list[int] = []
    with (
        borrowing(*roots),
        tqdm(
            total=parts * len(objectives) * settings.n_steps,
            desc="Information bottleneck",
            unit="step",
            disable=not settings.show_progress,
        ) as bar,
    ):
        for start in range(0, pairs, at_once):
            chunk = tuple(slice_pairs(argument, pairs, start, at_once) for argument in arguments)
            suffix = Suffix(forward, chunk, chunk[0].shape[0], taps)
            check_finite("score of the untouched pairs", suffix.score, start)
            for tap, hidden in zip(taps, suffix.hidden, strict=True):
                check_finite(f"hidden state of layer {tap.layer.name!r}", hidden, start)
            gates = [_gates(suffix, chunk, i, priors[i], layouts[i], settings, explains[i]) for i in range(len(taps))]
            for gate, make in zip(gates, filters or (), strict=False):
                gate.filter = make(gate.hidden, chunk[explains[gate.index]])
            for objective in objectives:
                chosen = [gates[i] for i in objective]
                stakes = _stakes(suffix, chosen, settings, start)
                hopeless += (start + nothing_to_lose(suffix.score, stakes).nonzero().flatten()).tolist()
                steps = _descend(suffix, chosen, settings, stakes.weight, start, bar.update)
                for gate in chosen:
                    # Otherwise gates that nothing needs leave a faint copy of the picture's contrast.
                    gate.closes_fully = gate.shared is not None
                after = _score_after(suffix, chosen, settings) if with_record else None
                for gate in chosen:
                    results[gate.index].append(_result(suffix, gate, taps[gate.index].layer, steps, stakes, after))
    if hopeless:
        _warn_of(sorted(set(hopeless)))
    return [_join(parts_of) for parts_of in results]


def _gates(
    suffix: Suffix,
    arguments: tuple[Any, ...],
    index: int,
    prior: Prior,
    layout: Layout | None,
    settings: LayerSettings,
    modality: int,
) -> _Gates:
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
    return _Gates(index, hidden, mean, std, real, beta, start, held.dtype, shared, channels=channels)


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


def _stakes(suffix: Suffix, gates: list[_Gates], settings: LayerSettings, start: int) -> Stakes:
    """What the pairs of a suffix, from the pair ``start`` on, stand to lose when these gates close."""
    pairs = len(suffix.score)
    if settings.score_range is not None:
        given = torch.as_tensor(settings.score_range, dtype=suffix.score.dtype, device=suffix.score.device)
        return Stakes(given.expand(pairs) if given.ndim == 0 else given[start : start + pairs])
    scores = []
    with torch.no_grad():
        for purpose, count in enumerate((CLOSED_DRAWS, HALVES)):
            drawn = [_noise_of_stakes(gate, purpose, count) for gate in gates]
            logits = [_half_open(gate) if purpose else _closed(gate, count) for gate in gates]
            parts = _parts(settings, count)
            through = [
                _through(suffix, gates, [d[part] for d in drawn], [z[:, part] for z in logits]) for part in parts
            ]
            scores.append(torch.cat(through, 1))
    check_finite("score with closed gates", torch.cat(scores, 1), start)
    return measured(suffix.score, *scores)


def _noise_of_stakes(gate: _Gates, purpose: int, draws: int) -> Tensor:
    """Noise that does not depend on the call's seed and is none of the descent's."""
    return noise(0, gate.index, _STAKES + purpose, draws, gate.hidden.shape[1:], antithetic=True)


def _closed(gate: _Gates, draws: int) -> Tensor:
    """Logits of gates that are closed, (1, draws, ...)."""
    return torch.full_like(gate.hidden[:1], -torch.inf).unsqueeze(1).expand(-1, draws, *gate.hidden.shape[1:])


def _half_open(gate: _Gates) -> Tensor:
    """Logits of gates that are open at half of the positions and closed at the others, (N or 1, draws, ...)."""
    positions = list(gate.hidden.shape[1:])
    if len(positions) > 1:
        positions[gate.channels - 1] = 1
    drawn = noise(0, gate.index, _STAKES + 2, HALVES, positions, antithetic=True)
    field = drawn.to(gate.hidden.device, gate.hidden.dtype)
    if gate.filter is None:
        field = field.unsqueeze(0)
    else:
        # A filter is made for these pairs, and may treat each in its own way.
        field = torch.stack([gate.filter(one.expand_as(gate.alpha)) for one in field], 1)
    return torch.where(field > 0, torch.inf, -torch.inf).to(field.dtype)


def _descend(
    suffix: Suffix,
    gates: list[_Gates],
    settings: LayerSettings,
    weight: Tensor,
    start: int,
    advance: Callable[[], Any],
) -> list[tuple[Tensor, list[Tensor]]]:
    """Adam on the gates; returns per step the mean scores and the total information per pair."""
    adam = torch.optim.Adam([{"params": [gate.alpha], "lr": settings.lr[gate.index]} for gate in gates])
    history = []
    for step in range(settings.n_steps):
        drawn = [_draw(gate, settings, step) for gate in gates]
        scores = []
        for gate in gates:
            gate.alpha.grad = torch.zeros_like(gate.alpha)
        for part in _parts(settings, settings.n_samples):
            score = _through(suffix, gates, [noise_[part] for noise_ in drawn])
            _accumulate(gates, score, weight, settings.n_samples)
            scores.append(score.detach())
        totals = [_add_information(gate) for gate in gates]
        score = torch.cat(scores, 1).mean(1)
        check_finite(f"score at step {step}", score, start)
        for gate in gates:
            check_finite(f"gradient at step {step}", gate.alpha.grad, start)
        adam.step()
        history.append((score, totals))
        advance()
    return history


def _draw(gate: _Gates, settings: LayerSettings, step: int) -> Tensor:
    shape, antithetic = gate.hidden.shape[1:], settings.antithetic[gate.index]
    return noise(settings.seed, gate.index, step, settings.n_samples, shape, antithetic)


def _parts(settings: LayerSettings, count: int) -> Iterator[slice]:
    """So many draws, cut into those that go through the model together."""
    at_once = min(settings.n_samples, settings.internal_batch_size or settings.n_samples)
    return (slice(i, min(i + at_once, count)) for i in range(0, count, at_once))


def _through(suffix: Suffix, gates: list[_Gates], drawn: list[Tensor], logits: list[Tensor] | None = None) -> Tensor:
    """Scores for some draws, (N, draws): through the gates, or through gates of the given logits, one per draw."""
    draws = len(drawn[0])
    given = [None] * len(gates) if logits is None else logits
    values = {g.index: g.sample(part, fixed) for g, part, fixed in zip(gates, drawn, given, strict=True)}
    return suffix.run(values, draws).unflatten(0, (-1, draws))


def _accumulate(gates: list[_Gates], score: Tensor, weight: Tensor, n_samples: int) -> None:
    # A gradient of 1e-5 per element has few digits left in half precision and none after another layer.
    scale = 2.0**12 if any(gate.dtype == torch.float16 for gate in gates) else 1.0
    # Small weights go in before the model's own gradient and large ones after it, or half precision overflows within.
    loss = (score.sum(1) * weight.clamp(max=1)).sum() * (scale / n_samples)
    for gate, gradient in zip(gates, torch.autograd.grad(loss, [gate.alpha for gate in gates]), strict=True):
        late = weight.clamp(min=1).to(gradient).view(-1, *[1] * (gradient.ndim - 1))
        gate.alpha.grad -= gradient * (late / scale)  # type: ignore[operator]


def _add_information(gate: _Gates) -> Tensor:
    elements = gate.information()
    loss = gate.beta * mean_information(elements, gate.real).sum()
    gate.alpha.grad += torch.autograd.grad(loss, gate.alpha)[0]  # type: ignore[operator]
    return elements.detach().flatten(1).sum(1) / NATS_PER_BIT


@torch.no_grad()
def _score_after(suffix: Suffix, gates: list[_Gates], settings: LayerSettings) -> Tensor:
    drawn = [_draw(gate, settings, settings.n_steps) for gate in gates]
    scores = [
        _through(suffix, gates, [noise_[part] for noise_ in drawn]) for part in _parts(settings, settings.n_samples)
    ]
    return torch.cat(scores, 1).mean(1)


def _result(
    suffix: Suffix,
    gate: _Gates,
    layer: Layer,
    steps: list[tuple[Tensor, list[Tensor]]],
    stakes: Stakes,
    after: Tensor | None,
) -> Gated:
    bits = (gate.information().detach() / NATS_PER_BIT).clamp(min=0.0)
    result = Gated(bits, suffix.axes[gate.index], gate.real)
    if after is not None:
        position = gate.index if len(steps[0][1]) > 1 else 0
        result.record = LayerRecord(
            layer.name,
            torch.stack([score for score, _ in steps]),
            torch.stack([totals[position] for _, totals in steps]),
            bits.flatten(1).sum(1),
            suffix.score,
            after,
            stakes.range,
            stakes.closed,
        )
    return result


def _join(parts: list[Gated]) -> Gated:
    first = parts[0]
    if len(parts) == 1:
        return first
    records = [part.record for part in parts if part.record is not None]
    record = None
    if records:
        per_pair = ("bits", "score_before", "score_after", "score_range")
        closed = [r.score_closed for r in records if r.score_closed is not None]
        record = LayerRecord(
            records[0].layer,
            torch.cat([r.score for r in records], 1),
            torch.cat([r.information for r in records], 1),
            **{name: torch.cat([getattr(r, name) for r in records]) for name in per_pair},
            score_closed=torch.cat(closed) if closed else None,
        )
    real = None if first.real is None else torch.cat([part.real for part in parts if part.real is not None])
    return Gated(torch.cat([part.bits for part in parts]), first.axis, real, record)


def _warn_of(pairs: list[int]) -> None:
    which = ", ".join(map(str, pairs[:5])) + (", ..." if len(pairs) > 5 else "")
    warnings.warn(
        f"inputs: the score of pair {which} is about as high with all gates closed, so there is little to explain: the "
        "map shows what raises the score, not what it rests on. Look at score_before and score_closed of the record.",
        NothingToExplainWarning,
        stacklevel=4,
    )


def slice_pairs(argument: Any, pairs: int, start: int, count: int) -> Any:
    if isinstance(argument, Tensor) and argument.ndim and argument.shape[0] == pairs:
        return argument[start : start + count]
    return argument


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
