"""Gates that neighbours share: a Gaussian kernel over the grid that they lie on, and over colours where asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from captum_m2ib.engine.bilateral import Bilateral

SHARE = 0.1
"""How far a picture's gates are smoothed: a standard deviation, as a share of the picture's shorter side."""

COLOUR = 1.0
"""Over which colours they are: a standard deviation, in standard deviations of the picture."""


def smooth_logits(alpha: Tensor, sigma: float) -> Tensor:
    r"""Logits of gates smoothed by a Gaussian kernel: ``logit(blur(sigmoid(alpha)))``.

    Args:

        alpha (Tensor): (N, C, h, w).
        sigma (float): Standard deviation of the kernel in cells, above 0.

    Returns:
        Tensor: (N, C, h, w).
    """
    # Mirrored borders blur 1 - g to 1 - blur(g), and blurring both keeps the digits of gates that are nearly open.
    least = torch.finfo(alpha.dtype).tiny
    opened, closed = (blur(torch.sigmoid(part), sigma).clamp(min=least) for part in (alpha, -alpha))
    return opened.log() - closed.log()


def blur(maps: Tensor, sigma: float) -> Tensor:
    r"""Maps blurred by a Gaussian kernel of ``2 * round(2 * sigma) + 1`` cells a side, mirrored at the border.

    A border mirrored without repeating its own cells (torch's ``reflect``, as in the paper's code) keeps constant maps,
    though not every map's sum. On a grid too small to be mirrored so far the kernel is cut.

    Args:

        maps (Tensor): (N, C, h, w).
        sigma (float): Standard deviation of the kernel in cells, above 0.

    Returns:
        Tensor: (N, C, h, w).
    """
    # Steps that only go by a gradient's sign make much of what a product of many terms rounds; MPS has no float64.
    wide = maps if maps.device.type == "mps" else maps.double()
    down, across = (_mixing(wide, axis, sigma) for axis in (2, 3))
    return (down @ wide @ across.T).to(maps.dtype)


def _mixing(maps: Tensor, axis: int, sigma: float) -> Tensor:
    """What each cell of an axis takes of each, (cells, cells); a CPU is far slower at convolutions of one channel."""
    last = maps.shape[axis] - 1
    reach = min(round(2 * sigma), last)
    offsets = torch.arange(-reach, reach + 1, device=maps.device)
    kernel = torch.softmax(-offsets.to(maps.dtype).square() / (2 * sigma**2), 0)
    cells = torch.arange(last + 1, device=maps.device).unsqueeze(1)
    mirrored = last - (last - (cells + offsets).abs()).abs()
    return maps.new_zeros(last + 1, last + 1).scatter_add_(1, mirrored, kernel.expand(last + 1, -1))


def over_neighbours(
    share: float, colour: float | None, hidden: Tensor, inputs: Tensor, real: Tensor | None
) -> Callable[[Tensor], Tensor] | None:
    r"""Smooth a picture's gates over neighbouring pixels, of like colour where asked for.

    Args:

        share (float): Standard deviation of the kernel as a share of the picture's shorter side; 0 for none.
        colour (float or None): Standard deviation of colours, in standard deviations of the picture, by which pixels
            share a gate; None for pixels of whatever colour.
        hidden (Tensor): What is gated, (N, C, h, w); nothing is smoothed where it has another number of dimensions.
        inputs (Tensor): Not read; the hidden state is the input itself.
        real (Tensor or None): Which pixels are neither padding nor in a margin that no tower sees, broadcastable to the
            hidden state: the others' colours do not matter. None if all are.

    Returns:
        Callable or None: from logits, (N, 1, h, w), to those that are applied.
    """
    if hidden.ndim != 4 or share == 0:
        return None
    sigma = share * min(hidden.shape[2:])
    return partial(blur, sigma=sigma) if colour is None else Bilateral(hidden, sigma, colour, real)
