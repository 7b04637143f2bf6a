r"""What a pair's score stands to lose: the unit in which the score is weighed against bits.

A score may be a cosine, a logit or anything else; only its share of what closed gates would take counts. With
:math:`s` the pair's score, :math:`c` its mean with all gates closed, and :math:`p` its scores with a random half of the
positions closed::

    range = max(s - c, 2 * standard deviation of p)

The second term speaks where the first is silent: a pair whose score is as high, or higher, with everything closed
still has positions that raise and lower it. Both grow with the score's unit and neither depends on its zero, so nothing
in the optimisation does. The draws are the same for every pair and every seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_m2ib.engine.verdict import LEAST_SHARE

CLOSED_DRAWS = 2
HALVES, HALVES_OF_PIXELS = 6, 4
"""Draws with all gates closed, and with half of them closed; each comes with its opposite. Halves of many pixels differ
less than halves of a dozen words, and each of them costs a pass of the whole tower."""

# A forward pass in single precision repeats its scores to some hundred times the last digit, not to the digit itself.
_ROUNDING = 1024.0


class NothingToExplainWarning(UserWarning):
    """A pair whose score does not fall when all gates close."""


@dataclass(frozen=True)
class Stakes:
    r"""What pairs stand to lose.

    Attributes:

        range (Tensor): The unit of the score, (N,); 0 where nothing that closes changes the score beyond rounding.
        closed (Tensor or None): Mean score with all gates closed, (N,); None where the range was given.
    """

    range: Tensor
    closed: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """What scores are multiplied by, (N,), in float32 at least; 0 for a pair that has nothing to lose."""
        own = self.range.to(torch.promote_types(self.range.dtype, torch.float32))
        return torch.where(own > 0, 1 / own.clamp(min=torch.finfo(own.dtype).tiny), 0.0)


def measured(score: Tensor, closed: Tensor, halves: Tensor) -> Stakes:
    r"""The stakes of pairs from their scores.

    Args:

        score (Tensor): Scores of the untouched pairs, (N,).
        closed (Tensor): Scores with all gates closed, (N, draws).
        halves (Tensor): Scores with a random half of the positions closed, (N, draws).

    Returns:
        Stakes: in the scores' own unit.
    """
    mean = closed.mean(1)
    found = torch.maximum(score - mean, 2 * halves.std(1))
    largest = torch.cat([score.unsqueeze(1), closed, halves], 1).abs().amax(1)
    least = _ROUNDING * torch.finfo(found.dtype).eps * largest
    return Stakes(torch.where(found > least, found, 0.0), mean)


def nothing_to_lose(score: Tensor, stakes: Stakes, share: float = LEAST_SHARE) -> Tensor:
    r"""Which pairs score about as high with everything closed, (N,) boolean; none where that was not measured.

    Args:

        score (Tensor): Scores of the untouched pairs, (N,).
        stakes (Stakes): What was measured.
        share (float, optional): Of the range, the least that must be lost. Default: 0.1

    Returns:
        Tensor: on the CPU.
    """
    if stakes.closed is None:
        return torch.zeros(len(score), dtype=torch.bool)
    # Where the range is 0, what little the score falls by is rounding.
    return ~((score - stakes.closed > share * stakes.range) & (stakes.range > 0)).cpu()
