"""Hidden states as grids of channels, and grids as pictures; the only place that knows a layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_m2ib.disent._checks import check_choice
from captum_m2ib.layouts import PatchLayout

INTERPOLATIONS = ("nearest", "bilinear")


def to_grid(
    hidden: Tensor,
    size: Sequence[int],
    layout: PatchLayout | None,
    patch: tuple[int, int] | None,
    channels_last: bool = False,
) -> Tensor:
    r"""Arrange a hidden state as a grid of channels.

    Args:

        hidden (Tensor): A convolutional map, (N, C, h, w), or tokens, (N, tokens, C), patches last and row by row.
        size (sequence of int): Height and width of the input in pixels.
        layout (PatchLayout, optional): Says how many prefix tokens there are. None: whatever comes before the patches.
        patch (tuple[int, int], optional): Height and width of a patch in pixels, where there is one.
        channels_last (bool, optional): A map of four dimensions is (N, h, w, C). Default: False

    Returns:
        Tensor: (N, C, h, w), prefix tokens dropped.

    Raises:
        ValueError: if the hidden state is neither, or its tokens are not the prefix and the grid that the layout says.
    """
    if hidden.ndim == 4:
        return hidden.permute(0, 3, 1, 2) if channels_last else hidden
    if hidden.ndim != 3:
        raise ValueError(
            f"layer: expected a hidden state of shape (N, C, h, w) or (N, tokens, C), got {tuple(hidden.shape)}; "
            "choose a layer before the positions are pooled."
        )
    if patch is None:
        raise ValueError(
            f"layout: cannot tell the patch size of this backbone, whose layer returns tokens, {tuple(hidden.shape)}; "
            "pass layout=PatchLayout(patch_size=(height, width), prefix=n)."
        )
    rows, columns = (side // length for side, length in zip(size, patch, strict=True))
    count, tokens = rows * columns, hidden.shape[1]
    fits = tokens >= count if layout is None else tokens in (count, layout.prefix + count)
    if not count or not fits:
        prefix = "any" if layout is None else layout.prefix
        raise ValueError(
            f"layout: expected {prefix} prefix tokens and a grid of {rows} x {columns} patches (an input of {size[0]} "
            f"x {size[1]} pixels, patches of {patch[0]} x {patch[1]}), got a hidden state of shape "
            f"{tuple(hidden.shape)}; pass layout=PatchLayout(patch_size=(height, width), prefix=n) that fits."
        )
    return hidden[:, -count:].transpose(1, 2).unflatten(2, (rows, columns))


def patch_of(backbone: nn.Module, layout: PatchLayout | None) -> tuple[int, int] | None:
    """The layout's patch size, or that of transformers' configuration, timm's embedding or torchvision's ViT."""
    config = getattr(backbone, "config", None)
    named: tuple[Any, ...] = (
        layout,
        getattr(config, "vision_config", None),
        config,
        getattr(backbone, "patch_embed", None),
        backbone,
    )
    found: Any = next((h.patch_size for h in named if getattr(h, "patch_size", None) is not None), None)
    if found is None:
        return None
    return (found, found) if isinstance(found, int) else (int(found[0]), int(found[1]))


def covered(size: Sequence[int], grid: Sequence[int], patch: tuple[int, int] | None) -> tuple[int, int]:
    """The part of a picture that a grid covers, in pixels: patches that do not divide it leave a margin."""
    height, width = (
        count * length if length and side // length == count else side
        for side, count, length in zip(size, grid, patch or (0, 0), strict=True)
    )
    return height, width


def spread(grid: Tensor, size: Sequence[int], patch: tuple[int, int] | None, interpolation: str) -> Tensor:
    r"""Spread signed values per cell over pixels, keeping the sum of the positive and of the negative ones.

    Args:

        grid (Tensor): (N, h, w).
        size (sequence of int): Height and width of the picture in pixels.
        patch (tuple[int, int], optional): Patch size, where there is one.
        interpolation (str): ``"nearest"`` or ``"bilinear"``.

    Returns:
        Tensor: (N, height, width).
    """
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    height, width = covered(size, grid.shape[1:], patch)
    options: dict[str, Any] = {"align_corners": False} if interpolation == "bilinear" else {}
    parts = []
    for part in (grid.clamp(min=0), (-grid).clamp(min=0)):
        fine = F.interpolate(part.unsqueeze(1), size=(height, width), mode=interpolation, **options).squeeze(1)
        before, after = part.sum((1, 2)), fine.sum((1, 2))
        scale = torch.where(after > 0, before / after.clamp(min=torch.finfo(fine.dtype).tiny), 0.0)
        parts.append(fine * scale[:, None, None])
    return F.pad(parts[0] - parts[1], (0, size[1] - width, 0, size[0] - height))


def cell_box(
    cell: Sequence[int], grid: Sequence[int], size: Sequence[int], patch: tuple[int, int] | None, context: int = 0
) -> tuple[int, int, int, int]:
    r"""The pixels that a cell of the grid stands for.

    Args:

        cell (sequence of int): Row and column.
        grid (sequence of int): Rows and columns of the grid.
        size (sequence of int): Height and width of the picture in pixels.
        patch (tuple[int, int], optional): Patch size, where there is one.
        context (int, optional): Cells to add on every side, as far as the grid goes. Default: 0

    Returns:
        tuple[int, int, int, int]: top, left, bottom, right; the last two exclusive.
    """
    edges = []
    for index, count, side in zip(cell, grid, covered(size, grid, patch), strict=True):
        first, last = max(index - context, 0), min(index + context + 1, count)
        edges.append((first * side // count, max(last * side // count, first * side // count + 1)))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right
