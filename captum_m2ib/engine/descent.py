"""Optimise gates at tapped layers, one set per pair, until little but what the score needs gets through.

Per pair the loss is ``beta * mean(information over the pair's real elements) - mean over noise draws(score) / range``,
where the range is what the pair's score stands to lose (:mod:`captum_m2ib.engine.stakes`), so that its unit does not
matter. Losses are summed over pairs and Adam works element by element, so pairs never influence each other.

A few draws estimate that mean badly, and maps differ between seeds. So a share of it, ``noiseless``, is the score where
all noise is at its mean, 0: one draw that no seed changes. That share trades the mean over the noise for stability.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_m2ib.engine.batch_axis import BatchAxis
from captum_m2ib.engine.callers import frames_within
from captum_m2ib.engine.check import Check, joined
from captum_m2ib.engine.closing import check_of, measured_stakes, stakes_of, through
from captum_m2ib.engine.gates import FilterMaker, Gates, Prior, check_finite, gates_of, noise
from captum_m2ib.engine.guidance import moved
from captum_m2ib.engine.information import NATS_PER_BIT, mean_information
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layers import Layer
from captum_m2ib.engine.layouts import Layout
from captum_m2ib.engine.portions import parts_of, portions_of
from captum_m2ib.engine.settings import LayerSettings
from captum_m2ib.engine.stakes import NothingToExplainWarning, Stakes, nothing_to_lose
from captum_m2ib.engine.suffix import Suffix, Tap
from captum_m2ib.engine.units import to_input, to_units

AFTER_DRAWS = 8
"""Least number of fresh draws from which the score through the final gates is measured."""

GUIDES = 2**16
"""Where the numbers of layers that guide others begin, in what tells their noise from that of others."""


@dataclass
class LayerRecord:
    r"""What the optimisation of one layer's gates did.

    Attributes:

        layer (str): The layer's name.
        score (Tensor): Mean score over the draws at each step, as the objective weighs them, (n_steps, N).
        information (Tensor): Total information over the pair's real elements at each step, in bits, (n_steps, N).
        bits (Tensor): The same for the final gates, (N,).
        score_before (Tensor): Score of the untouched pair, (N,).
        score_after (Tensor): Mean score through the final gates, over fresh noise draws, (N,).
        score_range (Tensor): What the score is divided by in the objective: what the pair stands to lose, (N,); see
            :mod:`captum_m2ib.engine.stakes`.
        score_closed (Tensor or None): Mean score with all gates closed, (N,); None where ``score_range`` was given.
        check (Check or None): Scores with parts shut, where asked for; see :mod:`captum_m2ib.engine.check`.
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
    check: Check | None = None
    units: Tensor | None = None


@dataclass
class Gated:
    """The result at one layer: bits per element, pairs first, and how the model holds that tensor."""

    bits: Tensor
    axis: BatchAxis
    real: Tensor | None
    record: LayerRecord | None = None


def optimise(
    forward: Callable[[tuple[Any, ...]], Any],
    arguments: tuple[Any, ...],
    taps: Sequence[Tap],
    priors: Sequence[Prior],
    layouts: Sequence[Layout | None],
    settings: LayerSettings,
    roots: Sequence[Any] = (),
    with_record: bool = False,
    with_check: bool = False,
    modalities: Sequence[int] | None = None,
    may_rise: Sequence[int] = (),
    filters: Sequence[FilterMaker] | None = None,
    guided: Sequence[int] = (),
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
        with_check (bool, optional): Whether the record tells what is left of the score when parts are shut: 9 rows per
            pair and tap, and 8 more where the range was given, 6 at pixels. Default: False
        modalities (sequence of int, optional): Per tap the argument that it explains. Default: None (tap ``i`` explains
            argument ``i``)
        may_rise (sequence of int, optional): Taps that may raise the score by closing, and are not warned of.
            Default: ()
        filters (sequence of callable, optional): Per tap what makes, of the hidden state, the explained input and what
            of the hidden state is real (None for all), the function from gate logits to the logits of the gates that
            are applied, or None. Default: None (gates are applied as they are)
        guided (sequence of int, optional): Per tap of the last ones, which guide others, the tap of a picture's pixels
            that it guides; see :mod:`captum_m2ib.engine.guidance`. Default: ()

    Returns:
        list[Gated]: one per tap, without those that guide others.

    Raises:
        ValueError: if the score, a hidden state or a gradient is not finite, or there is not one range per pair.
    """
    pairs = arguments[0].shape[0]
    ranges = settings.score_range
    if isinstance(ranges, tuple) and len(ranges) != pairs:
        raise ValueError(f"score_range: expected one number or one per pair ({pairs}), got {len(ranges)}.")
    explains = range(len(taps)) if modalities is None else modalities
    count = len(taps) - len(guided)
    apart = [range(i, i + 1) for i in range(len(taps))]
    objectives = [range(count)] if settings.joint else apart[:count]
    late = apart[count:]
    streams = [*range(count), *(GUIDES + index for index in guided)]
    results: list[list[Gated]] = [[] for _ in range(count)]
    hopeless: list[int] = []
    empty: list[int] = []
    with (
        borrowing(*roots),
        tqdm(
            desc="Information bottleneck",
            unit="step",
            disable=not settings.show_progress,
        ) as bar,
    ):
        for portion in portions_of(forward, arguments, taps, settings, objectives + late):
            start, chunk, suffix = portion.start, portion.arguments, portion.suffix
            bar.total = bar.n + portion.left * sum(settings.course(one[0]).n_steps for one in objectives + late)
            check_finite("score of the untouched pairs", suffix.score, start)
            for tap, hidden in zip(taps, suffix.hidden, strict=True):
                check_finite(f"hidden state of layer {tap.layer.name!r}", hidden, start)
            gates = [
                gates_of(suffix, chunk, i, priors[i], layouts[i], settings, explains[i], streams[i])
                for i in range(len(taps))
            ]
            for gate, make in zip(gates, filters or (), strict=False):
                gate.filter = make(gate.hidden, chunk[explains[gate.index]], gate.real)
            limits = dict(zip(objectives + late, portion.settings, strict=True))
            for objective in objectives:
                within = limits[objective]
                chosen = [gates[i] for i in objective]
                stakes = stakes_of(suffix, chosen, within, start)
                if not set(objective) <= set(may_rise):
                    hopeless += (start + nothing_to_lose(suffix.score, stakes).nonzero().flatten()).tolist()
                steps = _descend(suffix, chosen, within, stakes.weight, start, bar.update)
                reads = {}
                for one in late:
                    guide, at = gates[one[0]], guided[one[0] - count]
                    if at in objective:
                        _descend(suffix, [guide], limits[one], stakes.weight, start, bar.update)
                        reads[at] = _over_input(guide, layouts[guide.index], chunk[explains[at]])
                after = _score_after(suffix, chosen, within) if with_record else None
                # A range that was given is the objective's own; the check needs what closed gates really take.
                given = with_check and stakes.closed is None
                found = measured_stakes(suffix, chosen, within, start) if given else stakes
                for gate in chosen:
                    result = _result(suffix, gate, taps[gate.index].layer, steps, stakes, after, reads.get(gate.index))
                    if gate.index not in may_rise:
                        empty += (start + (~result.bits.flatten(1).any(1)).nonzero().flatten()).tolist()
                    if result.record is not None and after is not None and with_check:
                        result.record.check = check_of(suffix, gate, result.bits, within, start, found, after)
                    results[gate.index].append(result)
    if hopeless:
        _warn(
            sorted(set(hopeless)),
            "inputs: the score of pair {} is about as high with all gates closed, so there is little to explain: the "
            "map shows what raises the score, not what it rests on. Look at score_before and score_closed of the "
            "record.",
        )
    if set(empty) - set(hopeless):
        _warn(
            sorted(set(empty) - set(hopeless)),
            "beta: no part of pair {} was worth its bits, so its map is empty: what the score rests on is spread too "
            "far. Ask for less compression with a smaller beta.",
        )
    return [_join(parts_of) for parts_of in results]


def _descend(
    suffix: Suffix,
    gates: list[Gates],
    settings: LayerSettings,
    weight: Tensor,
    start: int,
    advance: Callable[[], Any],
) -> list[tuple[Tensor, list[Tensor]]]:
    """Adam on the gates; returns per step the mean scores and the total information per pair."""
    course = settings.course(gates[0].index)
    adam = _adam([gate.alpha for gate in gates], gates, settings)
    # Otherwise gates that nothing needs leave a faint copy of the picture's contrast.
    idle = {gate: gate.alpha.detach().clone().requires_grad_() for gate in gates if gate.shared is not None}
    adrift = _adam(list(idle.values()), list(idle), settings) if idle else None
    history = []
    for step in range(course.n_steps):
        shares = weight.new_tensor(course.shares(step))
        drawn = [_draw(gate, settings, step, len(shares), course.has_middle) for gate in gates]
        scores = []
        for gate in gates:
            gate.alpha.grad = torch.zeros_like(gate.alpha)
        for part, dtype in _passes(gates, settings, len(shares), course.has_middle):
            score = through(suffix, gates, [noise_[part] for noise_ in drawn], dtype=dtype)
            _accumulate(gates, score * shares[part], weight)
            scores.append(score.detach())
        totals = [_add_information(gate) for gate in gates]
        score = (torch.cat(scores, 1) * shares).sum(1)
        check_finite(f"score at step {step}", score, start)
        for gate in gates:
            check_finite(f"gradient at step {step}", gate.alpha.grad, start)
        adam.step()
        if adrift is not None:
            for gate, alpha in idle.items():
                alpha.grad = _pull(gate, alpha)
            adrift.step()
        history.append((score, totals))
        advance()
    for gate, alpha in idle.items():
        gate.idle = alpha.detach()
    return history


def _over_input(gate: Gates, layout: Layout | None, inputs: Tensor) -> Tensor:
    """The bits of a layer, spread over the input."""
    if layout is None:
        raise ValueError("layouts: expected one for each layer that guides others, got None.")
    return to_input(layout, to_units(layout, _bits(gate), inputs, gate.real), inputs)


def _passes(
    gates: list[Gates], settings: LayerSettings, draws: int, has_middle: bool
) -> Iterator[tuple[slice, torch.dtype | None]]:
    """The draws of a step that go through the model together, and what they run in.

    Noise hides what a lower precision rounds. A draw without noise does not, nor do whole numbers such as token ids,
    whose gates, one for each number of a token's embedding, part where rounding tips one.
    """
    lowered = None if any(gate.is_discrete for gate in gates) else settings.dtype
    for part in parts_of(settings, draws):
        if lowered is None or part.start or not has_middle:
            yield part, lowered
            continue
        yield slice(0, 1), None
        if part.stop > 1:
            yield slice(1, part.stop), lowered


def _adam(alphas: list[Tensor], gates: list[Gates], settings: LayerSettings) -> torch.optim.Adam:
    rates = [settings.lr[gate.index] for gate in gates]
    return torch.optim.Adam([{"params": [alpha], "lr": lr} for alpha, lr in zip(alphas, rates, strict=True)])


def _pull(gate: Gates, alpha: Tensor) -> Tensor:
    """The gradient of the information alone."""
    loss = gate.beta * mean_information(gate.information(gate.applied(alpha)), gate.real).sum()
    return torch.autograd.grad(loss, alpha)[0]


def _draw(gate: Gates, settings: LayerSettings, step: int, draws: int, has_middle: bool = False) -> Tensor:
    shape, antithetic = gate.hidden.shape[1:], settings.antithetic[gate.index]
    return noise(settings.seed, gate.stream, step, draws, shape, antithetic, has_middle)


def _accumulate(gates: list[Gates], score: Tensor, weight: Tensor) -> None:
    # A gradient of 1e-5 per element has few digits left in half precision and none after another layer.
    scale = 2.0**12 if any(gate.dtype == torch.float16 for gate in gates) else 1.0
    # Small weights go in before the model's own gradient and large ones after it, or half precision overflows within.
    loss = (score.sum(1) * weight.clamp(max=1)).sum() * scale
    for gate, gradient in zip(gates, torch.autograd.grad(loss, [gate.alpha for gate in gates]), strict=True):
        late = weight.clamp(min=1).to(gradient).view(-1, *[1] * (gradient.ndim - 1))
        gate.alpha.grad -= gradient * (late / scale)  # type: ignore[operator]


def _add_information(gate: Gates) -> Tensor:
    elements = gate.information()
    loss = gate.beta * mean_information(elements, gate.real).sum()
    gate.alpha.grad += torch.autograd.grad(loss, gate.alpha)[0]  # type: ignore[operator]
    return elements.detach().flatten(1).sum(1) / NATS_PER_BIT


@torch.no_grad()
def _score_after(suffix: Suffix, gates: list[Gates], settings: LayerSettings) -> Tensor:
    """Mean score over draws that no step has seen, all of them noise."""
    course = settings.course(gates[0].index)
    draws = max(AFTER_DRAWS, course.n_samples)
    drawn = [_draw(gate, settings, course.n_steps, draws) for gate in gates]
    scores = [through(suffix, gates, [noise_[part] for noise_ in drawn]) for part in parts_of(settings, draws)]
    return torch.cat(scores, 1).mean(1)


def _bits(gate: Gates) -> Tensor:
    return (gate.information().detach() / NATS_PER_BIT).clamp(min=0.0)


def _result(
    suffix: Suffix,
    gate: Gates,
    layer: Layer,
    steps: list[tuple[Tensor, list[Tensor]]],
    stakes: Stakes,
    after: Tensor | None,
    reads: Tensor | None,
) -> Gated:
    bits = _bits(gate) if reads is None else moved(_bits(gate), reads)
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
            check=joined([r.check for r in records if r.check is not None]),
        )
    real = None if first.real is None else torch.cat([part.real for part in parts if part.real is not None])
    return Gated(torch.cat([part.bits for part in parts]), first.axis, real, record)


def _warn(pairs: list[int], text: str) -> None:
    which = ", ".join(map(str, pairs[:5])) + (", ..." if len(pairs) > 5 else "")
    warnings.warn(text.format(which), NothingToExplainWarning, stacklevel=frames_within() + 1)
