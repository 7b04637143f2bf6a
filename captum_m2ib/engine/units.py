r"""Bits per unit of an input: summed from the elements of a hidden state, and spread over the input again.

:func:`to_units` sums information per element, (N, ...), to one number per unit, and :func:`to_input` gives that the
shape of the input. Bits are moved, never made: both keep sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_m2ib.engine.grids import axes_of, first_token, to_cells
from captum_m2ib.engine.layouts import Layout, PackedLayout, PatchLayout

_CELL = 16


def to_units(layout: Layout, elements: Tensor, inputs: Tensor, real: Tensor | None = None) -> Tensor:
    r"""Sum information over channels and arrange it as the input's patches or tokens.

    Args:

        layout (Layout): The tower's layout.
        elements (Tensor): Information per element, (N, ...) of the hidden state's shape.
        inputs (Tensor): The tower's input.
        real (Tensor, optional): What :func:`real_elements` told. Default: None

    Returns:
        Tensor: (N, \*grid) for a :class:`PatchLayout`, without what prefix tokens carry; else (N, L); exactly 0 at
        padding.

    Raises:
        ValueError: if the hidden state does not have the units that the layout says.
    """
    if isinstance(layout, PatchLayout):
        return to_cells(layout, elements if real is None else torch.where(real, elements, 0.0), inputs)
    length = inputs.shape[1]
    if isinstance(layout, PackedLayout) and layout.drops_padding and elements.ndim == 3:
        elements = F.pad(elements, (0, 0, 0, max(layout.prefix + length - elements.shape[1], 0)))
    start = first_token(layout, elements.shape[1], length) if elements.ndim == 3 else None
    if start is None:
        kind = "packed patch" if isinstance(layout, PackedLayout) else "input token"
        raise ValueError(
            f"layouts: expected a hidden state with {length} tokens, one per {kind}, got the shape "
            f"{tuple(elements.shape)}; choose a layer before the tokens are pooled, or pass a layout whose prefix and "
            "suffix count the tokens that the tower adds."
        )
    bits = elements.sum(-1)
    bits = bits if real is None else torch.where(real.squeeze(-1), bits, 0.0)
    return bits[:, start : start + length].contiguous()


def to_input(layout: Layout, units: Tensor, inputs: Tensor) -> Tensor:
    r"""Spread units over the input that they came from, keeping the sum.

    Args:

        layout (Layout): The tower's layout.
        units (Tensor): What :func:`to_units` gave.
        inputs (Tensor): The tower's input.

    Returns:
        Tensor: of the input's shape. Grids are resized (bi- or tri-)linearly over what patches cover, positive and
        negative units apart; what lies on no axis of the grid (colour channels, the values of a packed patch) shares
        equally.
    """
    if isinstance(layout, PatchLayout):
        return _spread_grid(layout, units, inputs)
    beyond = inputs.shape[2:]
    shared = units / math.prod(beyond)
    return shared.view(*units.shape, *[1] * len(beyond)).expand(inputs.shape).contiguous()


def per_patch(layout: PatchLayout, pixels: Tensor) -> Tensor:
    r"""Sum a picture's map over its patches.

    Args:

        layout (PatchLayout): The tower's layout, of two axes.
        pixels (Tensor): One number per pixel, (N, h, w), not negative.

    Returns:
        Tensor: (N, rows, columns), of the same sums. Of towers that halve their grid as they go, cells of 16 pixels,
        or of a multiple of the tower's patch that is at least as wide.
    """
    factor = next((f for f in layout.coarser if min(layout.patch_size) * f >= _CELL), layout.coarser[-1])
    sides = tuple(pixels.shape[1:])
    extents = layout.size or sides
    grid = [max(extent // (patch * factor), 1) for extent, patch in zip(extents, layout.patch_size, strict=True)]
    rows, columns = (
        side if layout.size else min(side, count * patch * factor)
        for side, count, patch in zip(sides, grid, layout.patch_size, strict=True)
    )
    means = F.adaptive_avg_pool2d(pixels[:, :rows, :columns].unsqueeze(1), (grid[0], grid[1])).squeeze(1)
    total, pooled = pixels.flatten(1).sum(1), means.flatten(1).sum(1)
    scale = torch.where(pooled > 0, total / pooled.clamp(min=torch.finfo(means.dtype).tiny), 0.0)
    return means * scale.view(-1, 1, 1)


def packed_grid(layout: PackedLayout, units: Tensor, arguments: Sequence[Any], index: int) -> Tensor:
    r"""One picture's packed patches as the grid they were cut from, (rows, columns).

    Args:

        layout (PackedLayout): The tower's layout, with ``shapes_argument``.
        units (Tensor): What :func:`to_units` gave, (N, patches).
        arguments (sequence): All arguments of forward_func.
        index (int): Which picture.

    Raises:
        ValueError: if the layout does not say where the grids' heights and widths are given.
    """
    if layout.shapes_argument is None or layout.shapes_argument >= len(arguments):
        raise ValueError(
            "layouts: expected a PackedLayout whose shapes_argument is among the arguments; pass the grids' heights "
            "and widths, (N, 2), to forward_func."
        )
    rows, columns = arguments[layout.shapes_argument][index, -2:].tolist()
    return unpacked(units[index, : rows * columns], rows, columns, layout.merge)


def unpacked(patches: Tensor, rows: int, columns: int, merge: int) -> Tensor:
    r"""Packed patches as the grid they were cut from.

    Args:

        patches (Tensor): (rows * columns, ...), block by block.
        rows, columns (int): The grid.
        merge (int): Side of the blocks; 1 where patches follow one another row by row.

    Returns:
        Tensor: (rows, columns, ...).
    """
    blocks = patches.unflatten(0, (rows // merge, columns // merge, merge, merge))
    return blocks.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def resized(units: Tensor, size: Sequence[int], nearest: bool = False) -> Tensor:
    r"""Resize maps along every axis of their grid, keeping the sum of the positive and of the negative values.

    Args:

        units (Tensor): (N, \*grid).
        size (sequence of int): The new grid.
        nearest (bool, optional): Repeat values instead of going from one to the next linearly. Default: False

    Returns:
        Tensor: (N, \*size).
    """
    mode = "nearest" if nearest else {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    options: dict[str, Any] = {} if nearest else {"align_corners": False}
    parts = []
    # Signs apart, so that each keeps its own sum.
    for part in (units.clamp(min=0), (-units).clamp(min=0)):
        fine = F.interpolate(part.unsqueeze(1), size=list(size), mode=mode, **options).squeeze(1)
        before, after = part.flatten(1).sum(1), fine.flatten(1).sum(1)
        scale = torch.where(after > 0, before / after.clamp(min=torch.finfo(fine.dtype).tiny), 0.0)
        parts.append(fine * scale.view(-1, *[1] * len(size)))
    return parts[0] - parts[1]


def covered_side(side: int, count: int, patch: int, coarser: Sequence[int]) -> int:
    """How much of an input's side so many cells cover: patches that do not divide it leave a margin."""
    steps = (patch * factor for factor in coarser)
    return next((count * step for step in steps if side // step == count), side)


def _spread_grid(layout: PatchLayout, units: Tensor, inputs: Tensor) -> Tensor:
    axes = [axis % inputs.ndim for axis in axes_of(layout, inputs)]
    sides = [inputs.shape[axis] for axis in axes]
    covered = [
        side if layout.size else covered_side(side, count, patch, layout.coarser)
        for side, count, patch in zip(sides, units.shape[1:], layout.patch_size, strict=True)
    ]
    if layout.mask_argument is not None:
        units = resized(units, (covered[0], *units.shape[2:]), nearest=True)
    fine = resized(units, covered)
    # Patches that do not divide the input leave a margin that the model never sees.
    margins = [extra for side, part in zip(sides[::-1], covered[::-1], strict=True) for extra in (0, side - part)]
    fine = F.pad(fine, margins)
    others = [axis for axis in range(1, inputs.ndim) if axis not in axes]
    for axis in others:
        fine = fine.unsqueeze(axis)
    return (fine / math.prod(inputs.shape[axis] for axis in others)).expand(inputs.shape).contiguous()
