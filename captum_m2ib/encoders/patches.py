"""Pictures as sequences of patches: one behind the other as some models take them, side by side, or as places."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def joined(patches: Tensor, grids: Tensor) -> Tensor:
    r"""The patches of all pictures one behind the other.

    Args:

        patches (Tensor): (N, patches, values), padded behind each picture's own.
        grids (Tensor): What each picture's number of patches is the product of, (N, k).

    Returns:
        Tensor: (all patches, values).
    """
    return torch.cat([own[:count] for own, count in zip(patches, grids.prod(-1).tolist(), strict=True)])


def separated(patches: Tensor, grids: Tensor) -> Tensor:
    r"""The reverse of :func:`joined`, padded with zeros.

    Args:

        patches (Tensor): (all patches, values).
        grids (Tensor): As for :func:`joined`.

    Returns:
        Tensor: (N, patches, values).
    """
    return pad_sequence(list(patches.split(grids.prod(-1).tolist())), batch_first=True)


def positions_in(shapes: Tensor, count: int) -> Tensor:
    r"""Column and row of each patch, row by row.

    Args:

        shapes (Tensor): Rows and columns of each picture's grid, (N, 2).
        count (int): How many places there are, those of padding included.

    Returns:
        Tensor: (N, count, 2); -1 at padding.

    Examples::

        >>> positions_in(torch.tensor([[2, 1]]), 3)
        tensor([[[ 0,  0],
                 [ 0,  1],
                 [-1, -1]]])
    """
    places = torch.arange(count, device=shapes.device)
    columns = shapes[:, 1:]
    found = torch.stack([places % columns, places // columns], -1)
    return found.masked_fill((places >= shapes.prod(-1, keepdim=True)).unsqueeze(-1), -1)


def shapes_of(positions: Tensor) -> Tensor:
    """The reverse of :func:`positions_in`."""
    return positions.amax(1).flip(-1) + 1


def side_by_side(patches: Tensor, rows: int, columns: int) -> Tensor:
    """The picture, (C, h, w), whose square patches, (patches, values), hold the colours of one pixel after another."""
    side = math.isqrt(patches.shape[-1] // 3)
    grid = patches[: rows * columns].view(rows, columns, side, side, 3)
    return grid.permute(4, 0, 2, 1, 3).reshape(3, rows * side, columns * side)
