"""Where in a picture its bits lie: at single pixels, as far as a late layer of its tower reads there.

Gates at a picture's pixels are fine, and cost a pixel the more bits the more it differs from the picture's ground;
gates at a late layer are coarse, and know what the score takes from a place. Each is wrong where the other is right, so
that their product is right more often than either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_m2ib.engine.smoothing import blur

FLOOR = 0.1
"""What a pixel without bits of its own counts for, as a share of the late layer's density there."""

SHARPNESS = 2
"""The power in which the late layer's density counts."""

CELL = 1 / 14
"""Standard deviation by which the late layer's grid is blurred, as a share of the picture's shorter side."""


@torch.no_grad()
def moved(bits: Tensor, late: Tensor) -> Tensor:
    r"""Bits of a picture's pixels, moved to where a late layer reads; each pair keeps as many in all.

    With a pair's pixels D and its late layer's bits L, both as shares of their sums and L blurred, what is given is in
    proportion to ``(D + 0.1 * L) * L ** 2``. A pair that has none of either keeps its own.

    Args:

        bits (Tensor): Bits of the elements of pictures, (N, C, h, w), non-negative.
        late (Tensor): Bits of the late layer spread over the pictures, (N, C, h, w), non-negative.

    Returns:
        Tensor: Bits, (N, C, h, w); a pixel's channels share them equally.
    """
    own, total = _shares(bits.sum(1, keepdim=True))
    reads, read = _shares(blur(late.sum(1, keepdim=True), CELL * min(late.shape[2:])))
    shares, weight = _shares((own + FLOOR * reads) * reads**SHARPNESS)
    there = (total > 0) & (read > 0) & (weight > 0)
    return torch.where(there, shares * total / bits.shape[1], bits).expand_as(bits).contiguous()


def _shares(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps as shares of their sums, and these sums, (N, 1, 1, 1)."""
    total = maps.sum((1, 2, 3), keepdim=True)
    return maps / torch.where(total > 0, total, 1.0), total
