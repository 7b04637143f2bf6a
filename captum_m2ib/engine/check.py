r"""Does a map hold what the score needs? What is left of the score when parts of the input are shut.

A map that holds names the positions that the score rests on: shut first, they take much of it, where as many positions
in a random order that is equally smooth take little. With :math:`s` the pair's score, :math:`r` its range
(:mod:`captum_m2ib.engine.stakes`) and means over :data:`FRACTIONS` of the positions::

    lost(order) = mean (s - score with the first positions of the order shut) / r,    margin = lost(map) - lost(random)

and ``kept`` is the share of the range that the map's own gates keep.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the positions that are shut."""

ORDERS = 2
"""Random orders, one the other's opposite."""


@dataclass(frozen=True)
class Check:
    r"""Scores with parts of one layer shut.

    Attributes:

        top (Tensor): The map's most relevant positions shut, (N, fractions).
        random (Tensor): As many in random orders, mean over the orders, (N, fractions).
    """

    top: Tensor
    random: Tensor
