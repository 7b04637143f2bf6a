"""What Captum's perturbation methods take away at once, and what they put in its place.

FeatureAblation, ShapleyValueSampling, KernelShap and Lime number features by a mask of each input's shape. Here a
picture's features are its patches and a caption's are its words: patches come first, words count on from there, and
everything that must stay (start, end, pooled and padding tokens) is one feature whose baseline is the token itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from captum.attr import TokenReferenceBase
from torch import Tensor

from captum_m2ib import _captum
from captum_m2ib.attr._arguments import format_additional, format_inputs
from captum_m2ib.engine.layouts import Layout, PatchLayout, TextLayout
from captum_m2ib.engine.real_units import real_tokens


def feature_masks(
    layouts: Sequence[Layout | None],
    inputs: Tensor | tuple[Tensor, ...],
    additional_forward_args: Any = None,
    maskable: Tensor | None = None,
    cell: tuple[int, ...] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""A ``feature_mask`` for Captum's perturbation methods: a feature per patch and per word.

    Args:

        layouts (sequence): The layout of each input, such as ``encoder.layouts``.
        inputs (Tensor or tuple[Tensor, ...]): The inputs to be explained, batch first.
        additional_forward_args (Any, optional): The other arguments of ``forward_func``; attention masks tell padding.
                    Default: None
        maskable (Tensor, optional): Boolean, (N, L): False for tokens that stay, e.g.
                    ``~torch.tensor(pairs.special)``; padding stays in any case. Needed if an input holds tokens.
                    Default: None
        cell (tuple[int, ...], optional): Extent of a feature along each axis of the grid, in elements of the input as
                    the tower sees it. Default: None (a patch)

    Returns:
        *Tensor* or *tuple[Tensor, ...]* of **feature masks**:
        - **feature masks** (*Tensor* or *tuple[Tensor, ...]*):
                    Integers of the inputs' shapes, contiguous. Indices are counted through all inputs, so that no
                    feature spans two of them: patches row by row, then per pair one feature for all tokens that stay
                    (where there are any) and one for each word. Elements that no patch covers belong to the nearest.

    Raises:
        ValueError: if an input has no layout, tokens come without ``maskable`` or with one of another shape, ``cell``
            does not fit the grid, or the layout does not know the size of patches and there is no ``cell``.

    Examples::

        >>> from captum.attr import FeatureAblation
        >>> maskable = ~torch.tensor(pairs.special)
        >>> masks = feature_masks(encoder.layouts, pairs.inputs, pairs.additional_forward_args, maskable, cell=(32, 32))
        >>> unknown = encoder.processor.tokenizer.unk_token_id
        >>> baselines = (0, token_baselines(pairs.inputs[1], maskable, unknown))
        >>> image_map, token_map = FeatureAblation(encoder).attribute(
        ...     pairs.inputs, baselines, feature_mask=masks, additional_forward_args=pairs.additional_forward_args)
        >>> image_map.shape, token_map.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 7]))
    """
    tensors = format_inputs(inputs, None)
    arguments = (*tensors, *format_additional(additional_forward_args, len(tensors[0])))
    if sum(isinstance(layout, TextLayout) for layout in layouts[: len(tensors)]) > 1:
        raise ValueError("layouts: expected at most one input of tokens, got several; make a mask for each of them.")
    masks: list[Tensor] = []
    start = 0
    for index, tensor in enumerate(tensors):
        layout = layouts[index] if index < len(layouts) else None
        if layout is None:
            raise ValueError(
                f"layouts: expected a layout for inputs[{index}], got none; pass e.g. "
                "(PatchLayout(patch_size=(16, 16)), TextLayout(mask_argument=2))."
            )
        if isinstance(layout, PatchLayout):
            features = _cells(layout, tensor, cell)
        else:
            features = _words(_may_change(layout, tensor, arguments, maskable))
        spread = features.view(*features.shape, *[1] * (tensor.ndim - features.ndim)).expand(tensor.shape)
        masks.append((start + spread).contiguous())
        start = int(masks[-1].max()) + 1
    return _captum.format_output(_captum.is_tuple(inputs), tuple(masks))


def token_baselines(ids: Tensor, maskable: Tensor, reference_token_id: int) -> Tensor:
    r"""Token ids with every word replaced by a reference token; what must stay is left as it is.

    A baseline without the start and end tokens moves the position that a text tower pools at, and so answers another
    question.

    Args:

        ids (Tensor): Token ids, (N, L).
        maskable (Tensor): Boolean, (N, L): False for tokens that stay, e.g. ``~torch.tensor(pairs.special)``.
        reference_token_id (int): What stands for no word, usually the id of padding or of the unknown token.

    Returns:
        Tensor: Token ids, (N, L), of the same type.

    Raises:
        ValueError: if the shapes or types do not fit.

    Examples::

        >>> token_baselines(torch.tensor([[2, 7, 9, 3]]), torch.tensor([[False, True, True, False]]), 0)
        tensor([[2, 0, 0, 3]])
    """
    if ids.is_floating_point() or ids.ndim != 2:
        raise ValueError(f"ids: expected integer token ids, (N, L), got {ids.dtype} of shape {tuple(ids.shape)}.")
    _check_maskable(maskable, ids)
    reference = TokenReferenceBase(reference_token_idx=reference_token_id)
    row = reference.generate_reference(ids.shape[1], device=ids.device).to(ids.dtype)
    return torch.where(maskable.to(ids.device), row, ids)


def _check_maskable(maskable: Tensor | None, tokens: Tensor) -> Tensor:
    expected = tuple(tokens.shape[:2])
    if maskable is None:
        raise ValueError(
            f"maskable: expected a boolean tensor of shape {expected} because an input holds tokens, got None; pass "
            "e.g. ~torch.tensor(pairs.special)."
        )
    if maskable.dtype != torch.bool or tuple(maskable.shape) != expected:
        raise ValueError(
            f"maskable: expected a boolean tensor of shape {expected}, one entry per token, got {maskable.dtype} of "
            f"shape {tuple(maskable.shape)}."
        )
    return maskable


def _may_change(layout: Layout, tensor: Tensor, arguments: Sequence[Any], maskable: Tensor | None) -> Tensor:
    """Which tokens or packed patches are features of their own, (N, L)."""
    open_to_change = torch.ones(tensor.shape[:2], dtype=torch.bool, device=tensor.device)
    if isinstance(layout, TextLayout):
        open_to_change = _check_maskable(maskable, tensor).to(tensor.device)
    real = real_tokens(layout, tensor, arguments)
    return open_to_change if real is None else open_to_change & real.to(tensor.device)


def _words(chosen: Tensor) -> Tensor:
    """Number what is chosen from 1 in each row, all else being 0; from 0 in a row where nothing else is."""
    first = (~chosen).any(1, keepdim=True).long()
    return torch.where(chosen, chosen.cumsum(1) - 1 + first, 0)


def _cells(layout: PatchLayout, tensor: Tensor, cell: tuple[int, ...] | None) -> Tensor:
    """Number the cells of a grid over an input, (1, ...) and broadcastable to it."""
    if cell is None and set(layout.patch_size) == {1} and len(layout.coarser) > 1:
        raise ValueError(
            "cell: expected the extent of a feature because the tower's layout does not know the size of patches, got "
            "None; pass e.g. cell=(32, 32)."
        )
    steps = layout.patch_size if cell is None else tuple(cell)
    if len(steps) != len(layout.patch_size) or min(steps) < 1:
        raise ValueError(
            f"cell: expected {len(layout.patch_size)} whole numbers of at least 1, one per axis of the grid, got "
            f"{cell!r}."
        )
    axes = layout.axes if layout.axes is not None else range(tensor.ndim - len(steps), tensor.ndim)
    sides = [tensor.shape[axis] for axis in axes]
    seen = layout.size or tuple(sides)
    counts = [max(extent // step, 1) for extent, step in zip(seen, steps, strict=True)]
    features = torch.zeros([1] * tensor.ndim, dtype=torch.long, device=tensor.device)
    for number, axis in enumerate(axes):
        along = torch.arange(sides[number], device=tensor.device) * seen[number] // sides[number] // steps[number]
        shape = [1] * tensor.ndim
        shape[axis] = -1
        place = along.clamp(max=counts[number] - 1).view(shape)
        features = features + place * math.prod(counts[number + 1 :])
    return features
