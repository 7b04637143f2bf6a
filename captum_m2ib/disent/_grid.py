"""Hidden states as grids of channels, and grids as pictures; the only place that knows a layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_m2ib.disent._checks import check_choice
from captum_m2ib.encoders.towers import image_layout
from captum_m2ib.engine.grids import channel_axis
from captum_m2ib.engine.layouts import HALVINGS, PatchLayout
from captum_m2ib.engine.units import covered_side, resized, to_units

INTERPOLATIONS = ("nearest", "bilinear")


def derive_layout(backbone: nn.Module, layer: str) -> PatchLayout | None:
    r"""The layout that a backbone's modules tell.

    Args:

        backbone (nn.Module): Reads pictures, (N, channels, height, width).
        layer (str): Dotted name of a module in it.

    Returns:
        PatchLayout or None: None if the backbone has no patches of one size. Where a classifier only wraps a
            hierarchical trunk around the layer, the trunk's.
    """
    path = layer.split(".")
    around = [backbone.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    layouts = [image_layout(module) for module in around]
    whole = layouts[0]
    # Every halving of single pixels is what a tower gets that states no patch size.
    if whole.patch_size == (1, 1) and whole.coarser == HALVINGS:
        return None
    same = (layout for layout in layouts if layout.patch_size == whole.patch_size)
    return next((layout for layout in same if len(layout.coarser) > 1), whole)


def to_grid(
    hidden: Tensor, images: Tensor, layout: PatchLayout | None, any_prefix: bool = False, channels_last: bool = False
) -> Tensor:
    r"""Arrange a hidden state as a grid of channels.

    Args:

        hidden (Tensor): A map, (N, C, h, w) or (N, h, w, C), or tokens, (N, tokens, C), patches row by row.
        images (Tensor): What the backbone read, (N, channels, height, width).
        layout (PatchLayout, optional): How the backbone cuts pictures. None: unknown, so that only maps can be read.
        any_prefix (bool, optional): Whatever comes before the patches is prefix, however many tokens. Default: False
        channels_last (bool, optional): A map is (N, h, w, C) whatever its shape says. Default: False

    Returns:
        Tensor: (N, C, h, w), prefix and suffix tokens dropped.

    Raises:
        ValueError: if the hidden state is neither, or its tokens are not the prefix, a grid and the suffix that the
            layout says.
    """
    if hidden.ndim not in (3, 4) or len(hidden) != len(images):
        raise ValueError(
            f"layer: expected a hidden state of shape (N, C, h, w) or (N, tokens, C) for N = {len(images)} images, got "
            f"{tuple(hidden.shape)}; choose a layer before the positions are pooled, and outside of windows that are "
            "put among the examples."
        )
    if hidden.ndim == 4:
        return hidden.permute(0, 3, 1, 2) if channels_last else _from_map(hidden, images, layout)
    size = tuple(images.shape[-2:])
    if layout is None:
        raise ValueError(
            f"layout: cannot tell the patch size of this backbone, whose layer returns tokens, {tuple(hidden.shape)}; "
            "pass layout=PatchLayout(patch_size=(height, width), prefix=n)."
        )
    rows, columns = (side // length for side, length in zip(size, layout.patch_size, strict=True))
    extra = hidden.shape[1] - rows * columns
    if any_prefix and extra > 0 and not layout.suffix:
        layout = replace(layout, prefix=extra)
    try:
        return _arranged(hidden, images, layout)
    except ValueError as error:
        coarser = " or a coarser one" if len(layout.coarser) > 1 else ""
        raise ValueError(
            f"layout: expected {layout.prefix} prefix tokens and a grid of {rows} x {columns} patches{coarser} (an "
            f"input of {size[0]} x {size[1]} pixels, patches of {layout.patch_size[0]} x {layout.patch_size[1]}), got "
            f"a hidden state of shape {tuple(hidden.shape)}; pass layout=PatchLayout(patch_size=(height, width), "
            "prefix=n) that fits."
        ) from error


def _from_map(hidden: Tensor, images: Tensor, layout: PatchLayout | None) -> Tensor:
    """A map with its channels first, which is also what a shape that no grid explains is taken for."""
    # Two sides that fit a halving of the patches' grid are evidence enough, even if no stages are known.
    halved = PatchLayout((1, 1), coarser=HALVINGS) if layout is None else replace(layout, coarser=HALVINGS)
    last = channel_axis(halved, hidden, images) == 3
    # Pictures that are not square may fit both readings; then the first dimension holds the channels, as in most maps.
    first = channel_axis(halved, hidden.movedim(1, 3), images) == 3
    return _arranged(hidden, images, halved) if last and not first else hidden


def _arranged(hidden: Tensor, images: Tensor, layout: PatchLayout) -> Tensor:
    """Channels last to channels first: the layout arranges the positions' numbers, and they fetch the positions."""
    each = hidden.flatten(1, -2)
    # Of the hidden state's own shape, by which the layout knows where positions are; it sums over channels.
    numbers = torch.zeros_like(each[:1], dtype=torch.int64)
    numbers[..., 0] = torch.arange(each.shape[1], device=each.device)
    cells = to_units(layout, numbers.view_as(hidden[:1]), images[:1])
    return each[:, cells[0]].permute(0, 3, 1, 2)


def covered(size: Sequence[int], grid: Sequence[int], patch: tuple[int, int] | None) -> tuple[int, int]:
    """The part of a picture that a grid covers, in pixels."""
    if patch is None:
        return size[0], size[1]
    height, width = (covered_side(*side, HALVINGS) for side in zip(size, grid, patch, strict=True))
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
    fine = resized(grid, (height, width), nearest=interpolation == "nearest")
    return F.pad(fine, (0, size[1] - width, 0, size[0] - height))


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
