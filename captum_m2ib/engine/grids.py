"""Where a hidden state holds the units of an input, told from its shape.

Tokens with or without prefix, a map with its channels first or last, windows, or one of the coarser grids of a
hierarchical tower. Nothing is taken from a square root.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from captum_m2ib.engine.layouts import Layout, PackedLayout, PatchLayout


@dataclass(frozen=True)
class Grid:
    """Where a hidden state holds a grid: the channels' dimension, the grid, and how its cells lie."""

    channels: int
    cells: tuple[int, ...]
    start: int = 0
    windows: bool = False
    frames_last: bool = False


def find_grid(layout: PatchLayout, shape: Sequence[int], extents: Sequence[int]) -> Grid | None:
    """Where a hidden state of this shape holds the grid of an input of these extents; None if nowhere."""
    last, inner = len(shape) - 1, tuple(shape[1:])
    grids = [(cells, _stored(layout, cells)) for cells in _grids(layout, extents)]
    # A picture that is not square may fit both readings of a map; most maps hold their channels first.
    first = next((cells for cells, stored in grids if inner[1:] == stored), None)
    if first is not None:
        return Grid(1, first)
    for cells, stored in grids:
        if layout.frames_last and inner[:-1] == (math.prod(cells[1:]), cells[0]):
            return Grid(last, cells, frames_last=True)
        if inner[:-1] == stored:
            return Grid(last, cells)
        ahead = last - 2
        if 0 <= ahead < len(stored) and inner[:ahead] == stored[:ahead]:
            start = first_token(layout, inner[ahead], math.prod(stored[ahead:]))
            if start is not None:
                return Grid(last, cells, start)
        if layout.window is not None and last == 3 and inner[:2] == _window_shape(layout, stored):
            return Grid(last, cells, windows=True)
    own = inner[1:]
    is_own = len(own) == len(extents) and layout.fold == 1 and _has_aspect(own, extents)
    return Grid(1, own) if is_own else None


def channel_axis(layout: Layout | None, hidden: Tensor, inputs: Tensor | None) -> int:
    r"""The dimension of a hidden state, (N, ...), along which its channels run.

    Args:

        layout (Layout or None): The layout of its tower.
        hidden (Tensor): The hidden state, pairs first.
        inputs (Tensor or None): The tower's input.

    Returns:
        int: as the layout tells; else 1 for maps of four dimensions and the last for everything else.
    """
    if isinstance(layout, PatchLayout) and inputs is not None and inputs.ndim > len(layout.patch_size):
        found = find_grid(layout, hidden.shape, extents_of(layout, inputs))
        if found is not None:
            return found.channels
    return 1 if hidden.ndim == 4 else hidden.ndim - 1


def to_cells(layout: PatchLayout, elements: Tensor, inputs: Tensor) -> Tensor:
    """Sum what a hidden state's elements carry to one number per cell of its grid, (N, *grid), or raise ValueError."""
    extents = extents_of(layout, inputs)
    found = find_grid(layout, elements.shape, extents)
    if found is None:
        raise ValueError(_no_grid(layout, elements, extents))
    cells, stored = elements.sum(found.channels), _stored(layout, found.cells)
    if found.windows:
        cells = _join_windows(layout, cells, stored)
    elif found.frames_last:
        cells = cells.transpose(1, 2).unflatten(2, stored[1:])
    elif cells.shape[1:] != stored:
        ahead = cells.ndim - 2
        rest = stored[ahead:]
        cells = cells[..., found.start : found.start + math.prod(rest)].unflatten(-1, rest)
    if layout.fold > 1:
        cells = cells.unflatten(1, (layout.fold, -1)).transpose(2, 3).flatten(1, 2)
    return cells.contiguous()


def first_token(layout: Layout, tokens: int, units: int) -> int | None:
    """The position of the first input unit among a hidden state's tokens; None if they hold another number of units."""
    prefix, suffix = layout.prefix, 0 if isinstance(layout, PackedLayout) else layout.suffix
    extras = {0: 0, suffix: 0, prefix: prefix, prefix + suffix: prefix}
    return extras.get(tokens - units)


def axes_of(layout: PatchLayout, inputs: Tensor) -> tuple[int, ...]:
    """The input's dimensions that the grid lies on."""
    count = len(layout.patch_size)
    return layout.axes if layout.axes is not None else tuple(range(inputs.ndim - count, inputs.ndim))


def extents_of(layout: PatchLayout, inputs: Tensor) -> tuple[int, ...]:
    """How far an input goes along those dimensions, inside the tower."""
    return layout.size or tuple(inputs.shape[axis] for axis in axes_of(layout, inputs))


def _grids(layout: PatchLayout, extents: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The grids that the tower's stages may have, the finest first."""
    for factor in layout.coarser:
        # Frames are not merged where a patch is one frame of a video.
        steps = [p if len(extents) > 2 and not i else p * factor for i, p in enumerate(layout.patch_size)]
        floor = tuple(e // s for e, s in zip(extents, steps, strict=True))
        ceiling = tuple(-(-e // s) for e, s in zip(extents, steps, strict=True))
        if layout.whole_frames:
            floor, ceiling = ((cells[0], *[1] * (len(cells) - 1)) for cells in (floor, ceiling))
        if min(floor) and (layout.fold == 1 or floor[0] % layout.fold == 0):
            yield floor
        if ceiling != floor and layout.fold == 1:
            yield ceiling


def _stored(layout: PatchLayout, cells: tuple[int, ...]) -> tuple[int, ...]:
    """A grid as the tower holds it: folded or not."""
    return cells if layout.fold == 1 else (cells[1] * layout.fold, cells[0] // layout.fold)


def _has_aspect(cells: Sequence[int], extents: Sequence[int]) -> bool:
    """Whether a convolution that pads in its own way could have made this grid with one stride for all axes."""
    stride = max(extent / count for extent, count in zip(extents, cells, strict=True))
    return all(abs(extent / stride - count) <= 1.5 for extent, count in zip(extents, cells, strict=True))


def _window(layout: PatchLayout, stored: Sequence[int]) -> tuple[int, int]:
    """Side and shift of the windows on a grid; a grid no larger than a window is one window."""
    side = min(layout.window or 1, *stored)
    return side, layout.shift if min(stored) > side else 0


def _window_shape(layout: PatchLayout, stored: Sequence[int]) -> tuple[int, int]:
    side, _ = _window(layout, stored)
    return math.prod(-(-count // side) for count in stored), side * side


def _join_windows(layout: PatchLayout, cells: Tensor, stored: Sequence[int]) -> Tensor:
    """Windows, (N, windows, side * side), as the grid they were cut from after a cyclic shift."""
    side, shift = _window(layout, stored)
    rows, columns = (-(-count // side) for count in stored)
    tiled = cells.unflatten(1, (rows, columns)).unflatten(3, (side, side)).transpose(2, 3)
    whole = tiled.flatten(3, 4).flatten(1, 2).roll((shift, shift), (1, 2))
    return whole[:, : stored[0], : stored[1]]


def _no_grid(layout: PatchLayout, elements: Tensor, extents: Sequence[int]) -> str:
    grids = [" x ".join(map(str, _stored(layout, cells))) for cells in _grids(layout, extents)]
    known = f"a grid of {' or '.join(grids)} patches" if grids else "a grid with at least one patch"
    return (
        f"layouts: expected {layout.prefix} prefix tokens and {known} (an input of {' x '.join(map(str, extents))}, "
        f"patches of {' x '.join(map(str, layout.patch_size))}), got a hidden state of shape "
        f"{tuple(elements.shape)}; pass layouts=(PatchLayout(patch_size=(height, width), prefix=n), ...) that fits the "
        "tower, or a layer before its tokens are pooled."
    )
