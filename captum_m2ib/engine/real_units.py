"""Which units of an input, and which elements of a hidden state, are real: not padding, and seen by the tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_m2ib.engine.grids import axes_of, extents_of, find_grid, first_token
from captum_m2ib.engine.layouts import Layout, PackedLayout, PatchLayout, TextLayout
from captum_m2ib.engine.padding import believe_ids, between_padding, warn_of_words
from captum_m2ib.engine.rows import Shared


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
    start = None if real is None else first_token(layout, hidden.shape[1], inputs.shape[1])
    if real is None or start is None:
        return None
    # What the tower adds of its own is read by it, whatever the caption's length.
    real = F.pad(real, (start, hidden.shape[1] - start - inputs.shape[1]), value=True)
    return real.to(hidden.device).unsqueeze(-1)


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
    for axis, patch in zip(axes_of(layout, inputs), layout.patch_size, strict=True):
        side = inputs.shape[axis]
        shape = [side if dim == axis % inputs.ndim else 1 for dim in range(inputs.ndim)]
        covered = covered & (torch.arange(side, device=inputs.device) < side // patch * patch).view(shape)
    return None if bool(covered.all()) else covered


def check_masks(layouts: Sequence[Layout | None], arguments: Sequence[Any]) -> None:
    """Raise where a mask has another shape than its inputs, before any model meets it."""
    for layout, inputs in zip(layouts, arguments, strict=False):
        if layout is not None and isinstance(inputs, Tensor) and inputs.ndim > 1:
            _mask_of(layout, inputs, arguments)


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
    length = inputs.shape[axes_of(layout, inputs)[0] if isinstance(layout, PatchLayout) else 1]
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


def _real_cells(layout: PatchLayout, hidden: Tensor, inputs: Tensor, arguments: Sequence[Any]) -> Tensor | None:
    """Which elements belong to real steps along the first axis, or to no step."""
    mask = _mask_of(layout, inputs, arguments)
    if mask is None or bool(mask.all()):
        return None
    found = find_grid(layout, hidden.shape, extents_of(layout, inputs))
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
