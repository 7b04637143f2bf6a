r"""How the units of a hidden state map onto the units of an input: layouts are data, a few functions read them.

A layout says how a tower cuts its input into units (patches of a picture, tubes of a video, pieces of a spectrogram,
tokens of a caption). :func:`to_units` sums information per element, (N, ...), to one number per unit, and
:func:`to_input` gives that the shape of the input. Bits are moved, never made: both keep sums.

Where the units are in a hidden state is told from its shape: tokens with or without prefix, a map with its channels
first or last, windows, or one of the coarser grids of a hierarchical tower. Nothing is taken from a square root.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_m2ib.engine.padding import believe_ids, between_padding, warn_of_words
from captum_m2ib.engine.rows import Shared

HALVINGS = (1, 2, 4, 8, 16, 32, 64)

_CELL = 16


@dataclass(frozen=True)
class PatchLayout:
    r"""An input cut into a grid: pictures by height and width, videos also by frame, spectrograms by time and pitch.

    Args:

        patch_size (tuple[int, ...]): Extent of a patch along each axis of the grid, in elements of the input: (height,
            width) for a picture, (frames, height, width) for a video. (1, 1) with ``coarser`` covers every tower that
            halves its grid as it goes.
        prefix (int, optional): Tokens before the first patch (class token, registers). Default: 0
        suffix (int, optional): Tokens after the last patch (group tokens). A layer may lack the prefix, the suffix or
            both. Default: 0
        axes (tuple[int, ...], optional): The input's dimensions that the grid lies on. Default: None (the last ones)
        coarser (tuple[int, ...], optional): By which factors the stages of a hierarchical tower merge patches.
            Default: (1,)
        size (tuple[int, ...], optional): Extent of those axes inside the tower, where it resizes its input. Default:
            None (as the input comes)
        fold (int, optional): Into how many pieces the first axis is cut, which are then stacked along the second, as
            HTS-AT does with a spectrogram. Default: 1
        window (int, optional): Side of the square windows within which attention works. Default: None
        shift (int, optional): By how many patches windows are shifted in this layer. Default: 0
        frames_last (bool, optional): Whether this layer holds the grid's first axis last, (patches, frames), as blocks
            do that see the frames of each patch. Default: False
        whole_frames (bool, optional): Whether this layer holds one cell per step along the first axis, as blocks do
            that see whole frames. Default: False
        mask_argument (int, optional): Position, among all arguments of forward_func, of the mask that tells what is
            padding along the first axis, (N, extent of that axis): samples of a sound, frames of a video. A cell is
            real if its first element is, and shares its bits equally along that axis, so that none reach padding.
            Default: None

    Examples::

        >>> layout = PatchLayout(patch_size=(16, 16), prefix=1)
        >>> hidden, picture = torch.ones(2, 1 + 2 * 3, 8), torch.zeros(2, 3, 32, 48)
        >>> to_units(layout, hidden, picture).shape  # rows and columns; the class token is left out
        torch.Size([2, 2, 3])
    """

    patch_size: tuple[int, ...]
    prefix: int = 0
    suffix: int = 0
    axes: tuple[int, ...] | None = None
    coarser: tuple[int, ...] = (1,)
    size: tuple[int, ...] | None = None
    fold: int = 1
    window: int | None = None
    shift: int = 0
    frames_last: bool = False
    whole_frames: bool = False
    mask_argument: int | None = None


@dataclass(frozen=True)
class PackedLayout:
    r"""An input that is a sequence of patches already, (N, patches, values), of pictures of any shape.

    Args:

        mask_argument (int, optional): Position, among all arguments of forward_func, of the mask that tells patches
            from padding, (N, patches). Default: None
        shapes_argument (int, optional): Position of the grids' heights and widths, (N, 2), or of these behind a number
            of frames, (N, 3). Without a mask they tell patches from padding. Default: None
        prefix (int, optional): Tokens before the first patch. Default: 0
        patch_size (tuple[int, int], optional): Height and width of a patch in pixels, to show maps at the picture's
            resolution. Default: (1, 1)
        merge (int, optional): Side of the square blocks whose patches follow one another, as Qwen2-VL orders them.
            Default: 1 (row by row)
        drops_padding (bool, optional): Whether the tower leaves padding out, so that a hidden state holds the patches
            of pictures of one size alone. Default: False
    """

    mask_argument: int | None = None
    shapes_argument: int | None = None
    prefix: int = 0
    patch_size: tuple[int, int] = (1, 1)
    merge: int = 1
    drops_padding: bool = False


@dataclass(frozen=True)
class TextLayout:
    r"""A text tower: one token of the hidden state per token of the input.

    Which tokens are real is read from an attention mask where there is one, else from the end token, else from the
    id of padding.

    Args:

        mask_argument (int, optional): Position of the attention mask among all arguments of forward_func (inputs,
            then additional arguments). Default: None
        end_token_id (int, optional): Tokens after the first end token are padding when there is no mask.
            Default: None
        ends_at_highest (bool, optional): The end token is the one with the highest id, as in CLIP's first vocabulary,
            whatever that id is. Default: False
        pad_token_id (int, optional): Tokens of this id before the first and after the last other one are padding when
            there is no mask. Default: None
        reads_padding (bool, optional): The tower reads padding like words, as SigLIP does. Padding is then told from
            words at the embeddings only; in later layers it holds what it has read, and every token counts. Default:
            False
        prefix (int, optional): Tokens that the tower itself puts before the input's. Default: 0
        suffix (int, optional): Tokens that the tower itself puts after them (CoCa's class token). A layer may lack
            the prefix, the suffix or both. Default: 0
        source (str, optional): Who says which tokens are real, as warnings call it: where the ids in hand end in a run
            of one id that it takes for words, that is said, and the run is taken for padding unless a mask speaks for
            it. Default: None (you say so, and nothing is looked for)

    Examples::

        >>> ids = torch.tensor([[0, 7, 9, 1, 1]])
        >>> real_tokens(TextLayout(end_token_id=1), ids, (ids,))
        tensor([[ True,  True,  True,  True, False]])
    """

    mask_argument: int | None = None
    end_token_id: int | None = None
    ends_at_highest: bool = False
    pad_token_id: int | None = None
    reads_padding: bool = False
    prefix: int = 0
    suffix: int = 0
    source: str | None = field(default=None, compare=False)


Layout: TypeAlias = PatchLayout | PackedLayout | TextLayout


def real_tokens(layout: Layout, inputs: Tensor, arguments: Sequence[Any]) -> Tensor | None:
    r"""Which tokens or packed patches are real.

    Args:

        layout (Layout): The tower's layout.
        inputs (Tensor): The tower's input: token ids, (N, L), or packed patches or embeddings, (N, L, ...).
        arguments (sequence): All arguments of forward_func.

    Returns:
        Tensor or None: Boolean, (N, L), or None if the layout cannot tell (then all are).

    Raises:
        ValueError: if the mask has another shape.

    Warns:
        UserWarning: if the ids show padding that a derived layout does not know.
    """
    if isinstance(layout, PatchLayout):
        return None
    source = None if isinstance(layout, PackedLayout) or inputs.is_floating_point() else layout.source
    mask = _mask_of(layout, inputs, arguments)
    if mask is not None:
        if source is not None:
            warn_of_words(inputs, mask, "the mask calls them real")
        return mask
    if isinstance(layout, PackedLayout) or inputs.is_floating_point():
        return None
    real = _told_by_ids(layout, inputs)
    if source is None:
        return real
    if real is None:
        warn_of_words(inputs, real, "there is no mask")
        return None
    return believe_ids(inputs, real, layout.pad_token_id, source, layout.reads_padding)


def _mask_of(layout: Layout, inputs: Tensor, arguments: Sequence[Any]) -> Tensor | None:
    """The mask among the arguments, boolean, (N, L)."""
    if isinstance(layout, PackedLayout) and layout.mask_argument is None:
        return _told_by_shapes(layout, inputs, arguments)
    if layout.mask_argument is None or layout.mask_argument >= len(arguments):
        return None
    mask = arguments[layout.mask_argument]
    mask = mask.value if isinstance(mask, Shared) else mask
    if not isinstance(mask, Tensor):
        return None
    length = inputs.shape[_axes(layout, inputs)[0] if isinstance(layout, PatchLayout) else 1]
    if mask.shape != (len(inputs), length):
        raise ValueError(
            f"additional_forward_args: expected the mask (argument {layout.mask_argument} of forward_func, "
            f"counted from 0) to be of shape (N, L), {(len(inputs), length)} for these inputs, got "
            f"{tuple(mask.shape)}; pass 1 for each real token, patch, sample or frame and 0 for each that is padding."
        )
    return mask.bool()


def _told_by_shapes(layout: PackedLayout, inputs: Tensor, arguments: Sequence[Any]) -> Tensor | None:
    """Which packed patches lie on the grids."""
    if layout.shapes_argument is None or layout.shapes_argument >= len(arguments):
        return None
    counts = arguments[layout.shapes_argument][:, -2:].prod(1, keepdim=True)
    return torch.arange(inputs.shape[1], device=counts.device) < counts


def _told_by_ids(layout: TextLayout, ids: Tensor) -> Tensor | None:
    """Which tokens the end token, or the id of padding, says are real."""
    if layout.ends_at_highest:
        return torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(1, keepdim=True)
    if layout.end_token_id is not None:
        ends = (ids == layout.end_token_id).int()
        return ends.cumsum(1) - ends < 1
    return None if layout.pad_token_id is None else between_padding(ids, layout.pad_token_id)


def check_masks(layouts: Sequence[Layout | None], arguments: Sequence[Any]) -> None:
    """Raise where a mask has another shape than its inputs, before any model meets it."""
    for layout, inputs in zip(layouts, arguments, strict=False):
        if layout is not None and isinstance(inputs, Tensor) and inputs.ndim > 1:
            _mask_of(layout, inputs, arguments)


def real_elements(layout: Layout | None, hidden: Tensor, modality: int, arguments: Sequence[Any]) -> Tensor | None:
    r"""Which elements of a hidden state belong to real input units.

    Args:

        layout (Layout or None): The modality's layout; without one everything is real.
        hidden (Tensor): The hidden state, (N, tokens, channels) or any other shape.
        modality (int): Position of the modality's input among the arguments.
        arguments (sequence): All arguments of forward_func.

    Returns:
        Tensor or None: Boolean, broadcastable to ``hidden``; None if every element is real.
    """
    if isinstance(layout, PatchLayout):
        return _real_cells(layout, hidden, arguments[modality], arguments)
    if layout is None or hidden.ndim != 3:
        return None
    inputs = arguments[modality]
    real = real_tokens(layout, inputs, arguments)
    start = None if real is None else _first_of(layout, hidden.shape[1], inputs.shape[1])
    if real is None or start is None:
        return None
    # What the tower adds of its own is read by it, whatever the caption's length.
    real = F.pad(real, (start, hidden.shape[1] - start - inputs.shape[1]), value=True)
    return real.to(hidden.device).unsqueeze(-1)


def _real_cells(layout: PatchLayout, hidden: Tensor, inputs: Tensor, arguments: Sequence[Any]) -> Tensor | None:
    """Which elements belong to real steps along the first axis, or to no step."""
    mask = _mask_of(layout, inputs, arguments)
    if mask is None or bool(mask.all()):
        return None
    found = _find_grid(layout, hidden.shape, _extents(layout, inputs))
    if found is None or found.windows or layout.fold > 1:
        return None
    steps = mask[:, :: -(-mask.shape[1] // found.cells[0])][:, : found.cells[0]].to(hidden.device)
    real = steps.view(*steps.shape, *[1] * (len(found.cells) - 1)).expand(len(steps), *found.cells)
    shape = [size for axis, size in enumerate(hidden.shape) if axis != found.channels]
    if found.frames_last:
        real = real.flatten(2).transpose(1, 2)
    elif list(real.shape) != shape:
        # What the tower adds before and after the cells is read by it, however long the input is.
        ahead = len(shape) - 1
        real = real.flatten(ahead)
        real = F.pad(real, (found.start, shape[-1] - found.start - real.shape[-1]), value=True)
    return real.unsqueeze(found.channels)


def covered_elements(layout: Layout | None, inputs: Tensor) -> Tensor | None:
    r"""Which elements of an input lie in a patch: patches that do not divide it leave a margin that no tower sees.

    Args:

        layout (Layout or None): The tower's layout.
        inputs (Tensor): The tower's input, (N, ...).

    Returns:
        Tensor or None: Boolean, broadcastable to ``inputs``; None if every element is covered, or nothing is known.
    """
    if not isinstance(layout, PatchLayout) or layout.size is not None:
        return None
    covered = torch.ones([1] * inputs.ndim, dtype=torch.bool, device=inputs.device)
    for axis, patch in zip(_axes(layout, inputs), layout.patch_size, strict=True):
        side = inputs.shape[axis]
        shape = [side if dim == axis % inputs.ndim else 1 for dim in range(inputs.ndim)]
        covered = covered & (torch.arange(side, device=inputs.device) < side // patch * patch).view(shape)
    return None if bool(covered.all()) else covered


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
        found = _find_grid(layout, hidden.shape, _extents(layout, inputs))
        if found is not None:
            return found.channels
    return 1 if hidden.ndim == 4 else hidden.ndim - 1


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
        return _grid_units(layout, elements if real is None else torch.where(real, elements, 0.0), inputs)
    length = inputs.shape[1]
    if isinstance(layout, PackedLayout) and layout.drops_padding and elements.ndim == 3:
        elements = F.pad(elements, (0, 0, 0, max(layout.prefix + length - elements.shape[1], 0)))
    start = _first_of(layout, elements.shape[1], length) if elements.ndim == 3 else None
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


def _first_of(layout: PackedLayout | TextLayout, tokens: int, length: int) -> int | None:
    """The position of the first input unit among so many tokens of a hidden state."""
    suffix = layout.suffix if isinstance(layout, TextLayout) else 0
    return _start(tokens, length, layout.prefix, suffix)


def _start(tokens: int, units: int, prefix: int, suffix: int) -> int | None:
    extras = {0: 0, suffix: 0, prefix: prefix, prefix + suffix: prefix}
    return extras.get(tokens - units)


@dataclass(frozen=True)
class _Grid:
    """Where a hidden state holds a grid: the channels' dimension, the grid, and how its cells lie."""

    channels: int
    cells: tuple[int, ...]
    start: int = 0
    windows: bool = False
    frames_last: bool = False


def _axes(layout: PatchLayout, inputs: Tensor) -> tuple[int, ...]:
    count = len(layout.patch_size)
    return layout.axes if layout.axes is not None else tuple(range(inputs.ndim - count, inputs.ndim))


def _extents(layout: PatchLayout, inputs: Tensor) -> tuple[int, ...]:
    return layout.size or tuple(inputs.shape[axis] for axis in _axes(layout, inputs))


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


def _find_grid(layout: PatchLayout, shape: Sequence[int], extents: Sequence[int]) -> _Grid | None:
    last, inner = len(shape) - 1, tuple(shape[1:])
    grids = [(cells, _stored(layout, cells)) for cells in _grids(layout, extents)]
    # A picture that is not square may fit both readings of a map; most maps hold their channels first.
    first = next((cells for cells, stored in grids if inner[1:] == stored), None)
    if first is not None:
        return _Grid(1, first)
    for cells, stored in grids:
        if layout.frames_last and inner[:-1] == (math.prod(cells[1:]), cells[0]):
            return _Grid(last, cells, frames_last=True)
        if inner[:-1] == stored:
            return _Grid(last, cells)
        ahead = last - 2
        if 0 <= ahead < len(stored) and inner[:ahead] == stored[:ahead]:
            start = _start(inner[ahead], math.prod(stored[ahead:]), layout.prefix, layout.suffix)
            if start is not None:
                return _Grid(last, cells, start)
        if layout.window is not None and last == 3 and inner[:2] == _window_shape(layout, stored):
            return _Grid(last, cells, windows=True)
    own = inner[1:]
    is_own = len(own) == len(extents) and layout.fold == 1 and _has_aspect(own, extents)
    return _Grid(1, own) if is_own else None


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


def _grid_units(layout: PatchLayout, elements: Tensor, inputs: Tensor) -> Tensor:
    extents = _extents(layout, inputs)
    found = _find_grid(layout, elements.shape, extents)
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


def _spread_grid(layout: PatchLayout, units: Tensor, inputs: Tensor) -> Tensor:
    axes = [axis % inputs.ndim for axis in _axes(layout, inputs)]
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
