"""How the units of a hidden state map onto the units of an input: layouts are data, two functions read them.

``image_grid`` and ``text_units`` reduce information per element, (N, ...), to one number per patch or token;
``to_pixels`` and ``to_tokens`` give it the shape of the input. Bits are moved, never made: resizing keeps a map's sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PatchLayout:
    r"""An image tower: a grid of patches, as tokens after some prefix tokens or as a convolutional map.

    Args:

        patch_size (tuple[int, int]): Height and width of a patch in pixels. A convolutional map, (N, C, h, w), brings
            its own grid and ignores it.
        prefix (int, optional): Tokens before the first patch (class token, registers). Default: 0
    """

    patch_size: tuple[int, int]
    prefix: int = 0


@dataclass(frozen=True)
class TextLayout:
    r"""A text tower: one token of the hidden state per token of the input.

    Which tokens are real is read from an attention mask where there is one, else from the end token.

    Args:

        mask_argument (int, optional): Position of the attention mask among all arguments of forward_func (inputs,
            then additional arguments). Default: None
        end_token_id (int, optional): Tokens after the first end token are padding when there is no mask.
            Default: None
        ends_at_highest (bool, optional): The end token is the one with the highest id, as in CLIP's first vocabulary,
            whatever that id is. Default: False
    """

    mask_argument: int | None = None
    end_token_id: int | None = None
    ends_at_highest: bool = False


Layout: TypeAlias = PatchLayout | TextLayout


def real_elements(layout: Layout | None, hidden: Tensor, modality: int, arguments: Sequence[Any]) -> Tensor | None:
    r"""Which elements of a hidden state belong to real input units.

    Args:

        layout (Layout or None): The modality's layout; without one everything is real.
        hidden (Tensor): The hidden state, (N, tokens, channels) or (N, channels, h, w).
        modality (int): Position of the modality's input among the arguments.
        arguments (sequence): All arguments of forward_func.

    Returns:
        Tensor or None: Boolean, broadcastable to ``hidden``; None if every element is real.
    """
    if not isinstance(layout, TextLayout) or hidden.ndim != 3:
        return None
    real = real_tokens(layout, arguments[modality], arguments)
    if real is None or real.shape[1] != hidden.shape[1]:
        return None
    return real.to(hidden.device).unsqueeze(-1)


def real_tokens(layout: TextLayout, ids: Tensor, arguments: Sequence[Any]) -> Tensor | None:
    """Which tokens are real, (N, L) boolean, or None if the layout cannot tell (then all are)."""
    if layout.mask_argument is not None and layout.mask_argument < len(arguments):
        mask = arguments[layout.mask_argument]
        if isinstance(mask, Tensor):
            return mask.bool()
    if ids.is_floating_point():
        return None
    if layout.ends_at_highest:
        return torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(1, keepdim=True)
    if layout.end_token_id is None:
        return None
    ends = (ids == layout.end_token_id).int()
    return ends.cumsum(1) - ends < 1


def image_grid(layout: PatchLayout, elements: Tensor, size: Sequence[int]) -> Tensor:
    r"""Sum information over channels and arrange it as the picture's patches.

    Args:

        layout (PatchLayout): The tower's layout.
        elements (Tensor): Information per element, (N, tokens, channels) or (N, channels, h, w).
        size (sequence of int): Height and width of the input in pixels.

    Returns:
        Tensor: (N, grid height, grid width), without what prefix tokens carry.

    Raises:
        ValueError: if the tokens are not the prefix and the grid that the layout says.
    """
    if elements.ndim == 4:
        return elements.sum(1)
    rows, columns = (side // patch for side, patch in zip(size, layout.patch_size, strict=True))
    if elements.ndim == 3 and elements.shape[1] in (rows * columns, layout.prefix + rows * columns):
        return elements.sum(-1)[:, -rows * columns :].unflatten(1, (rows, columns))
    raise ValueError(
        f"layouts: expected {layout.prefix} prefix tokens and a grid of {rows} x {columns} patches (an input of "
        f"{size[0]} x {size[1]} pixels, patches of {layout.patch_size[0]} x {layout.patch_size[1]}), got a hidden "
        f"state of shape {tuple(elements.shape)}; pass layouts=(PatchLayout(patch_size=(height, width), prefix=n), "
        "...) that fits the tower, or a layer before its tokens are pooled."
    )


def to_pixels(layout: PatchLayout, grid: Tensor, inputs: Tensor) -> Tensor:
    r"""Spread a map of patches over the pixels, keeping its sum.

    Args:

        layout (PatchLayout): The tower's layout.
        grid (Tensor): (N, grid height, grid width).
        inputs (Tensor): The pictures, (N, C, H, W).

    Returns:
        Tensor: (N, C, H, W); resized bilinearly over the area that patches cover, shared equally by the channels.
    """
    channels, *size = inputs.shape[-3:]
    height, width = size
    # Patches that do not divide the picture leave a margin that the model never sees.
    covered = [
        count * patch if side // patch == count else side
        for side, count, patch in zip(size, grid.shape[1:], layout.patch_size, strict=True)
    ]
    fine = F.interpolate(grid.unsqueeze(1), size=covered, mode="bilinear", align_corners=False)
    before, after = grid.sum((1, 2)), fine.sum((1, 2, 3))
    scale = torch.where(after > 0, before / after.clamp(min=torch.finfo(fine.dtype).tiny), 0.0)
    fine = F.pad(fine * scale[:, None, None, None], (0, width - covered[1], 0, height - covered[0]))
    return (fine / channels).expand(-1, channels, -1, -1).contiguous()


def to_tokens(elements: Tensor, real: Tensor | None, ids: Tensor) -> Tensor:
    r"""One value per token: information summed over channels, exactly 0 at padding.

    Args:

        elements (Tensor): Information per element, (N, L, channels).
        real (Tensor, optional): (N, L, 1) boolean.
        ids (Tensor): The input tokens, (N, L).

    Returns:
        Tensor: (N, L).

    Raises:
        ValueError: if the hidden state does not have one token per input token.
    """
    if elements.ndim != 3 or elements.shape[1] != ids.shape[1]:
        raise ValueError(
            f"layouts: expected a hidden state with {ids.shape[1]} tokens, one per input token, got the shape "
            f"{tuple(elements.shape)}; choose a layer before the tokens are pooled."
        )
    bits = elements.sum(-1)
    return bits.contiguous() if real is None else torch.where(real.squeeze(-1), bits, 0.0).contiguous()
