"""How many pairs and draws go through the model together: as many as were asked for, or as the memory has room for.

What a row takes is measured on the recorded pass: the tensors that it makes of a layer are counted as they are made, of
which autograd keeps between half and all. Nothing that a pair gets depends on what goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from captum_m2ib.engine.rows import slice_pairs
from captum_m2ib.engine.settings import LayerSettings
from captum_m2ib.engine.suffix import Suffix, Tap

FIRST_ROWS = 80
"""Rows (pairs times draws) for which pairs are recorded together before it is known what a row takes."""

ROWS_WITHOUT_GRAPH = 4
"""How many rows without a graph go through the model in the place of one with a graph."""


@dataclass(frozen=True)
class Portion:
    r"""Pairs that go through the model together.

    Attributes:

        start (int): Position of the first.
        arguments (tuple): Their arguments.
        suffix (Suffix): Their recorded pass.
        settings (tuple[LayerSettings, ...]): For each objective, with the rows that go together.
        left (int): How many such portions there are from here on, this one included.
    """

    start: int
    arguments: tuple[Any, ...]
    suffix: Suffix
    settings: tuple[LayerSettings, ...]
    left: int


def portions_of(
    forward: Callable[[tuple[Any, ...]], Any],
    arguments: tuple[Any, ...],
    taps: Sequence[Tap],
    settings: LayerSettings,
    objectives: Sequence[Sequence[int]],
) -> Iterator[Portion]:
    r"""Record the pairs, as many together as the settings or the memory allow.

    Args:

        forward (Callable): Maps the tuple of all arguments to scores, (N,).
        arguments (tuple): All arguments; the first is a batch of N.
        taps (sequence of Tap): The layers.
        settings (LayerSettings): The optimisation's settings.
        objectives (sequence): The positions of the taps whose gates descend together.

    Returns:
        iterator of Portion: all pairs, in order.
    """
    pairs, draws = arguments[0].shape[0], settings.most_draws
    given = settings.internal_batch_size
    fitting = None if given is None else [given] * len(objectives)
    at_once, start = max(1, (given or FIRST_ROWS) // draws), 0
    while start < pairs:
        some = tuple(slice_pairs(argument, pairs, start, at_once) for argument in arguments)
        count = some[0].shape[0]
        suffix = Suffix(forward, some, count, taps, for_score=True)
        if fitting is None:
            fitting = [max(1, settings.memory_budget // max(1, suffix.bytes_per_row(one))) for one in objectives]
            at_once = max(1, min(fitting) // draws)
            if at_once < count:
                continue
        # What was asked for bounds the rows without a graph, too; the budget allows more of these.
        most = None if given is None else given // count
        limits = tuple(replace(settings, internal_batch_size=rows if rows < draws else most) for rows in fitting)
        yield Portion(start, some, suffix, limits, 1 + -(-(pairs - start - count) // at_once))
        start += count


def parts_of(settings: LayerSettings, count: int) -> Iterator[slice]:
    """So many draws, cut into those that go through the model together; a portion's settings count draws of a pair."""
    most = settings.most_draws
    if not torch.is_grad_enabled():
        # Without a graph a row holds one layer's activations instead of all, and cores are busier with more rows.
        most *= ROWS_WITHOUT_GRAPH
    at_once = most if settings.internal_batch_size is None else min(most, settings.internal_batch_size)
    return (slice(i, min(i + at_once, count)) for i in range(0, count, at_once))
