r"""Does a map hold what the score needs? What is left of the score when parts of the input are shut.

A map that holds names the positions that the score rests on: shut first, they take much of it, where as many positions
in a random order that is equally smooth take little. With :math:`s` the pair's score, :math:`c` its mean with all gates
closed, :math:`r` its range (:mod:`captum_m2ib.engine.stakes`) and means over :data:`FRACTIONS` of the positions::

    lost(order) = mean (s - score with the first positions of the order shut) / r,    margin = lost(map) - lost(random)
    kept = (score through the map's own gates - c) / r

Where the pair has nothing to lose, as ``s - c`` is a tenth of the range or less, no map of it can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from captum_m2ib.engine.stakes import Stakes, nothing_to_lose
from captum_m2ib.engine.verdict import FAILING_MARGIN, HOLDING_KEPT, HOLDING_MARGIN, VERDICTS

FRACTIONS = (1 / 32, 1 / 8, 1 / 2)
"""Shares of the positions that are shut."""

ORDERS = 2
"""Random orders for each share, one the other's opposite."""


@dataclass(frozen=True)
class Check:
    r"""Scores with parts of one layer shut, and those that they are compared with.

    Attributes:

        top (Tensor): The map's most relevant positions shut, (N, fractions).
        random (Tensor): As many in random orders, mean over the orders, (N, fractions).
        score (Tensor): Nothing shut, (N,).
        after (Tensor): Mean score through the map's own gates, (N,).
        closed (Tensor): Mean score with everything shut, (N,).
        range (Tensor): What the pair stands to lose, (N,).
    """

    top: Tensor
    random: Tensor
    score: Tensor
    after: Tensor
    closed: Tensor
    range: Tensor

    @property
    def lost_top(self) -> Tensor:
        """Share of the range that goes with the map's most relevant positions, (N,); 0 where the range is."""
        return self._lost(self.top)

    @property
    def lost_random(self) -> Tensor:
        """The same of random orders, (N,)."""
        return self._lost(self.random)

    @property
    def margin(self) -> Tensor:
        """How much more the map's order takes than a random one, (N,)."""
        return self.lost_top - self.lost_random

    @property
    def kept(self) -> Tensor:
        """Share of the range that the map's own gates keep, (N,)."""
        return (self.after.float() - self.closed.float()) * self._weight

    @property
    def is_idle(self) -> Tensor:
        """Which pairs have nothing to lose, (N,) boolean, on the CPU."""
        return nothing_to_lose(self.score, Stakes(self.range, self.closed))

    def verdicts(self, by_margin: bool = False) -> list[str]:
        """One of :data:`captum_m2ib.engine.verdict.VERDICTS` per pair; of a map without gates that of its margin."""
        return verdicts(self.margin, torch.ones_like(self.kept) if by_margin else self.kept, self.is_idle)

    def _lost(self, left: Tensor) -> Tensor:
        return (self.score.float() - left.float().mean(1)) * self._weight

    @property
    def _weight(self) -> Tensor:
        return Stakes(self.range.float()).weight


def verdicts(margin: Tensor, kept: Tensor, is_idle: Tensor) -> list[str]:
    r"""What to think of maps.

    Args:

        margin (Tensor): How much more the map's order takes than a random one, as shares of the range, (N,).
        kept (Tensor): Share of the range that the map's own gates keep, (N,).
        is_idle (Tensor): Which pairs have nothing to lose, (N,) boolean.

    Returns:
        list[str]: ``"holds"``: the map names what the score rests on. ``"fails"``: it says no more of that than chance,
        or there is nothing to say. ``"weak"``: in between, or the map leaves out much of what the score rests on.

    Examples::

        >>> verdicts(torch.tensor([0.9, 0.9, 0.0]), torch.tensor([1.0, 0.2, 1.0]), torch.tensor([False, False, False]))
        ['holds', 'weak', 'fails']
    """
    fails = (margin < FAILING_MARGIN).cpu() | is_idle.cpu()
    holds = ((margin >= HOLDING_MARGIN) & (kept >= HOLDING_KEPT)).cpu()
    places = torch.where(fails, 2, torch.where(holds, 0, 1))
    return [VERDICTS[place] for place in places.tolist()]


def joined(parts: Sequence[Check]) -> Check | None:
    """The checks of a batch that went through the model in parts; None of none."""
    if not parts:
        return None
    return Check(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Check)))
