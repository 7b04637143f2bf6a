"""RISE: the score under random masks, averaged over the masks that showed a place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from captum_m2ib import _captum
from captum_m2ib.attr._arguments import Explained, rows_at_once
from captum_m2ib.attr._layers import check_entry, ensure_layers
from captum_m2ib.attr._scoring import as_forward_func, roots_of
from captum_m2ib.attr._units import spread_units, sum_units
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.gates import check_finite
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layers import Layer, LayerLike, input_layer
from captum_m2ib.engine.layouts import Layout, PatchLayout, TextLayout
from captum_m2ib.engine.real_units import check_masks
from captum_m2ib.engine.settings import check_count
from captum_m2ib.engine.suffix import Suffix, Tap


class RISE(_captum.Attribution):
    r"""Randomised input sampling for explanation (RISE), for any tower.

    Inputs are multiplied by random masks ``m``; the attribution of a place is the mean score under the masks, each
    weighted by how far it shows the place::

        attribution_i = mean over masks of score(input * m) * m_i / probability.

    Masks of a picture are coarse grids of zeros and ones, enlarged linearly and shifted at random. A caption's masks
    are zeros and ones per token, and multiply its embeddings, so that every token keeps its position and its kind. Each
    modality is masked while the other is seen whole. Masks are the same for all pairs.

    The attribution is no difference to anything: a place that does not matter gets the mean score under the masks.

    Petsiuk, Das and Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018,
    https://arxiv.org/abs/1806.07421

    Args:

        forward_func (Callable or nn.Module): As for :class:`MultiModalInfoBottleneck`.
        layers (sequence, optional): Per modality the layer whose output is masked, or None for the input itself, which
                    must then be of floating point. Default: None (the inputs; for token ids the embeddings of a
                    :class:`DualEncoder`'s tower)
        layouts (sequence, optional): Per modality how units map onto input units. Default: None (derived from the
                    encoder; without one, a mask covers all but the first two dimensions of an input)

    Raises:
        ValueError: if a layer is unknown.
        TypeError: if ``forward_func`` cannot be called.

    Examples::

        >>> rise = RISE(encoder)
        >>> image_map, token_map = rise.attribute(
        ...     pairs.inputs, additional_forward_args=pairs.additional_forward_args, n_masks=50)
        >>> image_map.shape, token_map.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 7]))
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layers: Sequence[LayerLike | None] | None = None,
        layouts: Sequence[Layout | None] | None = None,
    ) -> None:
        forward_func = as_forward_func(forward_func)
        _captum.Attribution.__init__(self, forward_func)
        if layouts is None and isinstance(forward_func, DualEncoder):
            layouts = forward_func.layouts
        self.layouts: tuple[Layout | None, ...] = tuple(layouts or ())
        self.layers = ensure_layers(forward_func, layers, _embeddings)

    @_captum.log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        n_masks: int = 4000,
        cells: int = 7,
        probability: float = 0.5,
        seed: int = 0,
        internal_batch_size: int | None = 128,
        show_progress: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        r"""Attribute each pair's score to its inputs, in units of the score.

        Args:

            inputs (Tensor or tuple[Tensor, ...]): The inputs to explain, batch first.
            target (int, tuple, Tensor or list, optional): Selects one output per example where ``forward_func``
                        returns several. Default: None
            additional_forward_args (Any, optional): Further positional arguments of ``forward_func``. Default: None
            n_masks (int, optional): Masks, for each modality; 4000 as published for VGG16, 8000 for ResNet-50.
                        Default: 4000
            cells (int, optional): Cells of a coarse mask along each axis; at most the input's extent. Default: 7
            probability (float, optional): How often a cell, or a token, is shown. Default: 0.5
            seed (int, optional): Seed of the masks; the global random state is neither read nor changed. Default: 0
            internal_batch_size (int, optional): Most rows (pairs times masks) in one pass; None for all at once.
                        Default: 128
            show_progress (bool, optional): Show a progress bar. Default: False

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*):
                        Of the inputs' shapes and of the scores' sign; an image's channels share its pixels'
                        attribution equally, tokens at padding are exactly 0.

        Raises:
            ValueError: if an argument is out of range, batch sizes differ, an integer input has no layer, or a score
                is NaN or infinite.
            RuntimeError: if a layer is not reached, or the score does not depend on it.
        """
        check_count("n_masks", n_masks)
        check_count("cells", cells)
        check_count("seed", seed, least=0)
        if not 0 < probability < 1:
            raise ValueError(f"probability: expected a number between 0 and 1, got {probability!r}.")
        given = Explained.ensure(self.forward_func, inputs, target, additional_forward_args)
        check_masks(self.layouts, given.arguments)
        pairs_at_once, masks_at_once = rows_at_once(internal_batch_size, n_masks)
        maps = []
        with tqdm(
            total=len(given.inputs) * given.pairs * n_masks,
            desc=self.get_name(),
            unit="mask",
            disable=not show_progress,
        ) as bar:
            for index, tensor in enumerate(given.inputs):
                layer = self._layer(index, tensor)
                layout = self.layouts[index] if index < len(self.layouts) else None
                parts = []
                with borrowing(*roots_of(self.forward_func, [layer])):
                    for start, chunk in given.parts(pairs_at_once):
                        suffix = Suffix(given.forward, chunk, chunk[0].shape[0], [Tap(layer)])
                        check_finite("score of the untouched pairs", suffix.score, start)
                        axes = None if layer.argument is None else _grid_axes(layout, tensor)
                        generator = np.random.default_rng((seed, index))
                        masks = draw_masks(
                            generator, suffix.hidden[0], axes, n_masks, cells, probability, masks_at_once
                        )
                        shown = _mean_shown(suffix, masks, n_masks, bar.update) / probability
                        check_finite("attribution", shown, start)
                        parts.append(_to_input(shown, axes, layout, index, chunk))
                maps.append(torch.cat(parts))
        return _captum.format_output(_captum.is_tuple(inputs), tuple(maps))

    def attribute_future(self) -> None:
        """Not offered, as for most of Captum's methods."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def _layer(self, index: int, tensor: Tensor) -> Layer:
        """What is masked: the input itself, or a layer in its place."""
        layer = self.layers[index] if index < len(self.layers) else input_layer(index)
        check_entry(layer, tensor, "masked by multiplication")
        return layer


def _embeddings(forward_func: Any) -> Sequence[LayerLike | None]:
    """The embeddings of a dual encoder's text towers, None for its other towers."""
    if not isinstance(forward_func, DualEncoder):
        return ()
    first, second = (
        forward_func.embeddings_of(index) if isinstance(layout, TextLayout) else None
        for index, layout in enumerate(forward_func.layouts)
    )
    return forward_func.told_apart((first, second))


def _grid_axes(layout: Layout | None, tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions of an input that smooth masks lie on; None if it is masked unit by unit."""
    if isinstance(layout, PatchLayout):
        axes = layout.axes or range(-len(layout.patch_size), 0)
        return tuple(axis % tensor.ndim for axis in axes)
    return None if layout is not None or tensor.ndim == 2 else tuple(range(2, tensor.ndim))


def draw_masks(
    generator: np.random.Generator,
    hidden: Tensor,
    axes: tuple[int, ...] | None,
    n_masks: int,
    cells: int,
    probability: float,
    at_once: int,
) -> Iterator[Tensor]:
    r"""Random masks, a few at a time; the same however many at a time.

    Args:

        generator (numpy.random.Generator): The source of randomness.
        hidden (Tensor): What will be masked, (N, ...).
        axes (tuple[int, ...] or None): Its dimensions that masks lie on; None for one value per unit of dimension 1.
        n_masks (int): How many.
        cells (int): Cells of a coarse mask along each axis.
        probability (float): How often a cell or unit is shown.
        at_once (int): How many at a time.

    Yields:
        Tensor: (masks, ...), of values in [0, 1], broadcastable with one pair's hidden state.
    """
    if axes is None:
        # Units first: what a unit is given does not depend on how many follow.
        shown = torch.from_numpy(generator.random((hidden.shape[1], n_masks)) < probability).T
        coarse, shape = shown.to(hidden), (-1, hidden.shape[1], *[1] * (hidden.ndim - 2))
        yield from (part.reshape(shape) for part in coarse.split(at_once))
        return
    extents = [hidden.shape[axis] for axis in axes]
    counts = [min(cells, extent) for extent in extents]
    sizes = [-(-extent // count) for extent, count in zip(extents, counts, strict=True)]
    coarse = torch.from_numpy(generator.random((n_masks, *counts)) < probability).to(hidden)
    shifts = generator.integers(0, sizes, (n_masks, len(axes)))
    enlarged = [(count + 1) * size for count, size in zip(counts, sizes, strict=True)]
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(axes)]
    shape = (-1, *(hidden.shape[dim] if dim in axes else 1 for dim in range(1, hidden.ndim)))
    for start in range(0, n_masks, at_once):
        fine = F.interpolate(coarse[start : start + at_once, None], size=enlarged, mode=mode, align_corners=False)
        windows = [
            mask[(0, *(slice(at, at + extent) for at, extent in zip(shift, extents, strict=True)))]
            for mask, shift in zip(fine, shifts[start : start + at_once], strict=True)
        ]
        # Linear enlargement may round beyond 1.
        yield torch.stack(windows).clamp(max=1).reshape(shape)


@torch.no_grad()
def _mean_shown(suffix: Suffix, masks: Iterator[Tensor], n_masks: int, advance: Callable[[int], Any]) -> Tensor:
    """The mean over masks of score times mask, (N, ...) of a mask's shape."""
    hidden = suffix.hidden[0]
    total: Tensor | float = 0.0
    for part in masks:
        values = (hidden.unsqueeze(1) * part).flatten(0, 1)
        scores = suffix.run({0: values}, len(part)).unflatten(0, (len(hidden), -1))
        precise = part.to(scores.dtype)
        total = total + torch.tensordot(scores, precise, dims=1)
        advance(len(part) * len(hidden))
    return torch.as_tensor(total) / n_masks


def _to_input(
    shown: Tensor, axes: tuple[int, ...] | None, layout: Layout | None, index: int, arguments: tuple[Any, ...]
) -> Tensor:
    """The attribution of one modality in its input's shape; what no mask tells apart shares equally."""
    inputs = arguments[index]
    if axes is None and layout is not None:
        units = sum_units(layout, shown.flatten(2).sum(-1, keepdim=True), index, arguments)
        return spread_units(layout, units, inputs)
    if shown.ndim == inputs.ndim:
        return (shown / (inputs[0].numel() // shown[0].numel())).expand(inputs.shape).contiguous()
    raise ValueError(
        f"layouts: cannot tell how masked units of shape {tuple(shown.shape)} map onto an input of shape "
        f"{tuple(inputs.shape)}; pass layouts with a TextLayout or PatchLayout for it."
    )
