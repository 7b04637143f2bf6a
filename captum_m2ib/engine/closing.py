"""Scores with gates shut otherwise than by the descent: all of them, random halves, and the most relevant first.

Noise and random orders are the same for every pair and every seed of a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from captum_m2ib.engine.check import FRACTIONS, ORDERS, Check
from captum_m2ib.engine.gates import Gates, check_finite, noise
from captum_m2ib.engine.portions import parts_of
from captum_m2ib.engine.settings import LayerSettings
from captum_m2ib.engine.stakes import CLOSED_DRAWS, HALVES, HALVES_OF_PIXELS, Stakes, measured
from captum_m2ib.engine.suffix import Suffix

# Steps that no descent reaches, for draws of their own.
_CLOSED, _HALVES, _FIELD, _CHECK, _ORDERS = (2**32 + purpose for purpose in range(5))


def through(
    suffix: Suffix,
    gates: Sequence[Gates],
    drawn: Sequence[Tensor],
    logits: Sequence[Tensor | None] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Scores for some draws, (N, draws): through the gates, or through gates of given logits, (N or 1, draws, ...)."""
    draws = len(drawn[0])
    given = logits or [None] * len(gates)
    values = {gate.index: gate.sample(part, fixed) for gate, part, fixed in zip(gates, drawn, given, strict=True)}
    return suffix.run(values, draws, dtype).unflatten(0, (-1, draws))


def stakes_of(suffix: Suffix, gates: Sequence[Gates], settings: LayerSettings, start: int) -> Stakes:
    """What the pairs of a suffix, from the pair ``start`` on, stand to lose when these gates close."""
    pairs = len(suffix.score)
    if settings.score_range is not None:
        given = torch.as_tensor(settings.score_range, dtype=suffix.score.dtype, device=suffix.score.device)
        return Stakes(given.expand(pairs) if given.ndim == 0 else given[start : start + pairs])
    return measured_stakes(suffix, gates, settings, start)


def measured_stakes(suffix: Suffix, gates: Sequence[Gates], settings: LayerSettings, start: int) -> Stakes:
    """The same, measured whatever range was given."""
    count = max(HALVES if gate.shared is None else HALVES_OF_PIXELS for gate in gates)
    half = [_open_where(_fields(gate, _FIELD, count) > 0) for gate in gates]
    shut = [torch.full_like(one[:, :1], -torch.inf).expand(-1, CLOSED_DRAWS, *one.shape[2:]) for one in half]
    logits = [torch.cat(both, 1) for both in zip(shut, half, strict=True)]
    scores = _scores(suffix, gates, settings, {_CLOSED: CLOSED_DRAWS, _HALVES: count}, logits)
    check_finite("score with closed gates", scores, start)
    return measured(suffix.score, *scores.split([CLOSED_DRAWS, count], 1))


def check_of(
    suffix: Suffix, gate: Gates, bits: Tensor, settings: LayerSettings, start: int, stakes: Stakes, after: Tensor
) -> Check:
    r"""The scores that are left when parts of one layer are shut: the most relevant first, and in random orders.

    Args:

        suffix (Suffix): The recorded pass.
        gate (Gates): The layer's gates.
        bits (Tensor): What the map says of each element, (N, ...) of the hidden state's shape.
        settings (LayerSettings): How many rows go through the model together.
        start (int): Position of the first of these pairs, for errors.
        stakes (Stakes): What these pairs stand to lose, measured.
        after (Tensor): Mean scores through the map's own gates, (N,).

    Returns:
        Check: one score per pair and fraction.

    Raises:
        ValueError: if a score is not finite, or the stakes were not measured.
    """
    if stakes.closed is None:
        raise ValueError("stakes: expected measured ones, got a given range.")
    relevance, there = _positions(bits, gate)
    fields = _fields(gate, _ORDERS, ORDERS * len(FRACTIONS)).movedim(1, 0)
    if fields.shape[2:] != relevance.shape[1:]:
        # The draws stand before the pairs here, so that the channels are one dimension further on.
        fields = fields.mean(gate.channels + 1, keepdim=True)
    counts = there.flatten(1).sum(1).view(-1, *[1] * (relevance.ndim - 1))
    open_ = []
    # Each fraction has random orders of its own: an order that begins with what matters would spoil all of them.
    for orders in ([relevance] * len(FRACTIONS), *fields.unflatten(0, (ORDERS, len(FRACTIONS)))):
        for order, fraction in zip(orders, FRACTIONS, strict=True):
            # Where a map says the same of many positions, they come in a random order, too.
            rank = _rank(order.expand_as(relevance), fields[0].expand_as(relevance), there)
            open_.append(_open_where(rank >= fraction * counts))
    rounds = len(open_) // len(FRACTIONS)
    scores = _scores(suffix, [gate], settings, {_CHECK: len(FRACTIONS)}, [torch.stack(open_, 1)], rounds)
    check_finite("score with closed gates", scores, start)
    found = scores.unflatten(1, (rounds, len(FRACTIONS)))
    return Check(found[:, 0], found[:, 1:].mean(1), suffix.score, after, stakes.closed, stakes.range)


def _positions(bits: Tensor, gate: Gates) -> tuple[Tensor, Tensor]:
    """What a map says of each position, with one channel, and which positions are no padding."""
    several = bits.ndim > 2
    relevance = bits.sum(gate.channels, keepdim=True) if several else bits
    there = torch.ones_like(relevance, dtype=torch.bool)
    if gate.real is None:
        return relevance, there
    return relevance, there & (gate.real.any(gate.channels, keepdim=True) if several else gate.real)


@torch.no_grad()
def _scores(
    suffix: Suffix,
    gates: Sequence[Gates],
    settings: LayerSettings,
    steps: Mapping[int, int],
    logits: Sequence[Tensor],
    rounds: int = 1,
) -> Tensor:
    """Scores through gates of given logits, (N or 1, draws, ...), with the noise of steps that no descent reaches: so
    many draws of each, in as many rounds."""
    drawn = [
        torch.cat([noise(0, gate.stream, step, draws, gate.hidden.shape[1:], True) for step, draws in steps.items()])
        for gate in gates
    ]
    draws = rounds * sum(steps.values())
    found = []
    for part in parts_of(settings, draws):
        places = torch.arange(draws)[part] % len(drawn[0])
        found.append(through(suffix, gates, [one[places] for one in drawn], [one[:, part] for one in logits]))
    return torch.cat(found, 1)


def _open_where(is_open: Tensor) -> Tensor:
    """Logits of gates that are open or shut."""
    return torch.where(is_open, torch.inf, -torch.inf)


def _fields(gate: Gates, step: int, draws: int) -> Tensor:
    """Random values per position, as smooth as the gates are, (N or 1, draws, ...)."""
    positions = list(gate.hidden.shape[1:])
    if len(positions) > 1:
        positions[gate.channels - 1] = 1
    drawn = noise(0, gate.stream, step, draws, positions, antithetic=True).to(gate.hidden.device, gate.hidden.dtype)
    if gate.filter is None:
        return drawn.unsqueeze(0)
    # A filter is made for these pairs, and may treat each in its own way.
    return torch.stack([gate.filter(field.expand_as(gate.alpha)) for field in drawn], 1)


def _rank(relevance: Tensor, among_equals: Tensor, there: Tensor) -> Tensor:
    """Places of each pair's positions, the most relevant first, those that are not there last."""
    shape = relevance.shape
    order = among_equals.flatten(1).argsort(dim=1, descending=True, stable=True)
    value = torch.where(there, relevance, -torch.inf).flatten(1).gather(1, order)
    order = order.gather(1, value.argsort(dim=1, descending=True, stable=True))
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(shape)
