"""Pairs that have an argument in common, such as many captions of one picture: what is the same runs once.

Rows are compared when a module is called, so nothing is assumed of where an argument goes: a row that is the same as
that of an earlier pair with an argument in common is not run, and gets what the module returns for that pair. The first
rerun from a layer is held against the model's own pass on all rows; where they differ, all rows run from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_m2ib.engine.layers import map_leaves, tensors_in
from captum_m2ib.engine.recording import Kept
from captum_m2ib.engine.rows import is_batch


class Merged:
    r"""Which pairs have an argument in common.

    Args:

        origins (sequence of Tensor): Per argument that some pairs have in common, the first pair that has what each
            pair has, (N,).
    """

    def __init__(self, origins: Sequence[Tensor]) -> None:
        self._origins = origins

    @classmethod
    def of(cls, arguments: tuple[Any, ...], pairs: int) -> Merged | None:
        """What the pairs of a call have in common; None if nothing."""
        found = [_origins(one) for one in arguments if is_batch(one, pairs)]
        shared = [torch.tensor(origins) for origins in found if len(set(origins)) < pairs]
        return cls(shared) if shared else None

    def rows_of(self, structure: Any, draws: int) -> MergedRows | None:
        """The rows to run a module on that is called with a structure; None if they all differ, or if it cannot be
        told which are rows."""
        for origin in self._origins:
            rows = len(origin) * draws
            given = tensors_in(structure)
            if not all(_is_plain(one, rows) for one in given):
                return None
            batches = [one for one in given if is_batch(one, rows)]
            first = (origin.unsqueeze(1) * draws + torch.arange(draws)).flatten()
            kept = torch.arange(rows)
            for place in (first != kept).nonzero().flatten().tolist():
                if batches and all(torch.equal(one[place], one[first[place]]) for one in batches):
                    kept[place] = first[place]
            if len(found := kept.unique()) < rows:
                return MergedRows(rows, found, torch.searchsorted(found, kept))
        return None


@dataclass(frozen=True, eq=False)
class MergedRows:
    r"""Rows of a module's call that are the same.

    Attributes:

        rows (int): How many there are.
        kept (Tensor): Those that differ, by their positions.
        places (Tensor): For each row its place among those, (rows,).
    """

    rows: int
    kept: Tensor
    places: Tensor

    def narrow(self, structure: Any) -> Any:
        """What a module is called with, for the rows that differ."""
        return map_leaves(structure, lambda one: one[self.kept.to(one.device)] if is_batch(one, self.rows) else one)

    def widen(self, structure: Any, recorded: Any) -> Any:
        """What it returned, for all rows; ``recorded`` tells where they run."""
        axes = iter(_kept_in(recorded))
        return map_leaves(structure, lambda one: next(axes).axis.take(one, self.places.to(one.device)))  # type: ignore[union-attr]


def is_row_wise(structure: Any) -> bool:
    """Whether everything that a module returned has rows."""
    return all(one.axis is not None for one in _kept_in(structure))


def _kept_in(structure: Any) -> list[Kept]:
    found: list[Kept] = []
    map_leaves(structure, found.append, Kept)
    return found


def _is_plain(tensor: Tensor, rows: int) -> bool:
    """Whether rows are a tensor's first dimension, or it has none."""
    return tensor.ndim == 0 or tensor.shape[0] <= rows or tensor.shape[0] % rows != 0


def _origins(argument: Tensor) -> list[int]:
    """For each pair the first one that has the same."""
    origins: list[int] = []
    for row, own in enumerate(argument):
        firsts = dict.fromkeys(origins)
        origins.append(next((first for first in firsts if torch.equal(own, argument[first])), row))
    return origins
