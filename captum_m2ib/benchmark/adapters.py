"""Captum's own methods, and maps that know nothing, in the form of this package's attribution methods.

Each takes an encoder and has ``attribute(inputs, additional_forward_args=None)`` for the pair, or for pixels with the
token ids first among the additional arguments; maps have the inputs' shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from captum.attr import FeatureAblation, Occlusion
from torch import Tensor
from torch.nn.functional import avg_pool2d

from captum_m2ib.composition import EmbeddingForward, TokenGradCam, feature_masks, token_baselines
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.spelling import blank_token
from captum_m2ib.engine.layers import LayerLike
from captum_m2ib.engine.layouts import PatchLayout
from captum_m2ib.engine.units import to_input

Inputs = Tensor | tuple[Tensor, ...]

# How many pixels go through a model at once: on a CPU more cost time, three times as much for 32 times as many.
_PIXELS = 2**18

# What stands for a patch where a tower has none: the cells in which audits keep the maps of such towers.
_CELL = 16


class OnEmbeddings:
    r"""A gradient method of Captum, on pixels and on the embeddings of tokens.

    Args:

        encoder (DualEncoder): The encoder.
        method (Callable): Captum's class, e.g. ``IntegratedGradients``.
        magnitude (bool, optional): Take the absolute value of each unit's attribution. Default: False
        smooth (bool, optional): Sum pixels over patches and spread the sums linearly, as maps from layers are.
            Default: False
        silent (bool, optional): Start from the caption without its words instead of embeddings of zero.
            Default: False
        **options: Further arguments of the method's ``attribute``.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        method: Callable[..., Any],
        magnitude: bool = False,
        smooth: bool = False,
        silent: bool = False,
        **options: Any,
    ) -> None:
        self.forward_func, self.method = encoder, method
        self.magnitude, self.smooth, self.silent, self.options = magnitude, smooth, silent, options

    def attribute(self, inputs: Inputs, additional_forward_args: Any = None) -> Inputs:
        """Maps of the inputs' shapes, each with the other input whole; tokens have the sums over their channels."""
        if isinstance(inputs, Tensor):
            return self._picture(self._run(self.forward_func, inputs, additional_forward_args))
        forward = EmbeddingForward(self.forward_func)
        (pixels, embeddings), additional = forward.embedded(inputs, additional_forward_args)
        options: dict[str, Any] = {}
        if self.silent:
            words = token_baselines(inputs[1], words_in(self.forward_func, inputs[1]), blank_token(self.forward_func))
            options["baselines"] = forward.embed(pixels, words, *additional[1:])

        def text_first(embeddings: Tensor, pixels: Tensor, *rest: Any) -> Any:
            return forward(pixels, embeddings, *rest)

        tokens = self._run(text_first, embeddings, (pixels, *additional), **options).sum(-1)
        image = self._picture(self._run(self.forward_func, pixels, additional))
        return image, tokens.abs() if self.magnitude else tokens

    def _run(self, forward: Any, inputs: Tensor, additional: Any, **options: Any) -> Tensor:
        # Captum warns where it has to ask for the gradient itself.
        given = inputs.clone().requires_grad_()
        found = self.method(forward).attribute(given, additional_forward_args=additional, **options, **self.options)
        return found.detach().float()

    def _picture(self, attribution: Tensor) -> Tensor:
        values = smoothed(self.forward_func, attribution) if self.smooth else attribution
        return spread(values.sum(1).abs(), values) if self.magnitude else values


class GradCAM:
    r"""LayerGradCam on the tokens of one layer per tower, laid over the inputs.

    Args:

        encoder (DualEncoder): The encoder.
        layers (sequence, optional): One per tower. Default: None (the block at three quarters of each tower's depth)
        relu (bool, optional): Leave out what speaks against the score. Default: True, as published
    """

    def __init__(self, encoder: DualEncoder, layers: Any = None, relu: bool = True) -> None:
        self.forward_func, self.relu = encoder, relu
        chosen: tuple[LayerLike, ...] = tuple(encoder.published_layers() if layers is None else layers)
        self.cams = [TokenGradCam(encoder, layer, modality=index) for index, layer in enumerate(chosen)]

    def attribute(self, inputs: Inputs, additional_forward_args: Any = None) -> Inputs:
        """Maps of the inputs' shapes."""
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        found = []
        for cam, layout, tensor in zip(self.cams, self.forward_func.layouts, tensors, strict=False):
            units = cam.attribute(
                inputs, additional_forward_args=additional_forward_args, relu_attributions=self.relu
            ).detach()
            found.append(
                units.squeeze(1) if tensor.ndim == 2 or layout is None else to_input(layout, units[:, 0], tensor)
            )
        return tuple(found) if isinstance(inputs, tuple) else found[0]


class Ablation:
    r"""FeatureAblation by patches and words: the score's loss where one is replaced by grey or by no word.

    Args:

        encoder (DualEncoder): The encoder.
        cell (int, optional): Side of what is taken out of a picture, in pixels. Default: None (a patch; 16 for towers
            that halve their grid)
        smooth (bool, optional): Spread each patch's loss linearly, as maps from layers are. Default: False
    """

    def __init__(self, encoder: DualEncoder, cell: int | None = None, smooth: bool = False) -> None:
        self.forward_func, self.smooth = encoder, smooth
        cell = _CELL if cell is None and _halves(encoder) else cell
        self.cell = None if cell is None else (cell, cell)

    def attribute(self, inputs: Inputs, additional_forward_args: Any = None) -> Inputs:
        """Maps of the inputs' shapes."""
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        words = words_in(self.forward_func, tensors[1]) if len(tensors) > 1 else None
        masks = feature_masks(self.forward_func.layouts, inputs, additional_forward_args, words, cell=self.cell)
        found = FeatureAblation(self.forward_func).attribute(
            inputs,
            _nothing(self.forward_func, inputs),
            additional_forward_args=additional_forward_args,
            feature_mask=masks,
            perturbations_per_eval=_at_once(tensors[0]),
        )
        return _pictures_of(self.forward_func, found, self.smooth)


class OcclusionWindow:
    r"""Occlusion by a square window, and word by word.

    Args:

        encoder (DualEncoder): The encoder.
        window (int, optional): Side of the window in patches, or in cells of 16 pixels for towers that halve their
            grid. Default: 2
        smooth (bool, optional): Spread the mean loss of each patch linearly. Default: False
    """

    def __init__(self, encoder: DualEncoder, window: int = 2, smooth: bool = False) -> None:
        self.forward_func, self.window, self.smooth = encoder, window, smooth

    def attribute(self, inputs: Inputs, additional_forward_args: Any = None) -> Inputs:
        """Maps of the inputs' shapes; the window moves by one patch."""
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        rows, columns = _patch(self.forward_func)
        channels = tensors[0].shape[1]
        shapes: tuple[Any, ...] = ((channels, rows * self.window, columns * self.window), (1,))
        strides: tuple[Any, ...] = ((channels, rows, columns), 1)
        found = Occlusion(self.forward_func).attribute(
            inputs,
            sliding_window_shapes=shapes if isinstance(inputs, tuple) else shapes[0],
            strides=strides if isinstance(inputs, tuple) else strides[0],
            baselines=_nothing(self.forward_func, inputs),
            additional_forward_args=additional_forward_args,
            perturbations_per_eval=_at_once(tensors[0]),
        )
        return _pictures_of(self.forward_func, found, self.smooth)


class CentrePrior:
    """Objects tend to lie in the middle: a Gaussian there, a quarter of the side wide; tokens all alike."""

    def __init__(self, encoder: DualEncoder) -> None:
        self.forward_func = encoder

    def attribute(self, inputs: Inputs, additional_forward_args: Any = None) -> Inputs:
        """Maps of the inputs' shapes."""
        maps = tuple(_centred(tensor) for tensor in (inputs if isinstance(inputs, tuple) else (inputs,)))
        return maps if isinstance(inputs, tuple) else maps[0]


class RandomMap:
    """Uniform noise, the same for every batch."""

    def __init__(self, encoder: DualEncoder) -> None:
        self.forward_func = encoder

    def attribute(self, inputs: Inputs, additional_forward_args: Any = None, seed: int = 0) -> Inputs:
        """Maps of the inputs' shapes."""
        generator = torch.Generator().manual_seed(seed)
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        maps = tuple(torch.rand(tensor.shape, generator=generator).to(tensor.device) for tensor in tensors)
        return maps if isinstance(inputs, tuple) else maps[0]


def words_in(encoder: Any, ids: Tensor) -> Tensor:
    """Which tokens are words, (N, L), as the encoder's tokenizer tells from the ids alone."""
    tokenizer = getattr(encoder.processor, "tokenizer", encoder.processor)
    return ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids, device=ids.device))


def spread(units: Tensor, like: Tensor) -> Tensor:
    """Pixels' values, (N, H, W), shared equally by the channels of a map, (N, C, H, W)."""
    return (units / like.shape[1]).unsqueeze(1).expand_as(like).contiguous()


def smoothed(encoder: DualEncoder, attribution: Tensor) -> Tensor:
    """An image map, (N, C, H, W), summed over patches and spread linearly; the sum stays."""
    patch, layout = _patch(encoder), encoder.layouts[0]
    sums = avg_pool2d(attribution.sum(1, keepdim=True), patch, divisor_override=1).squeeze(1)
    return to_input(layout, sums, attribution)  # type: ignore[arg-type]


def _centred(tensor: Tensor) -> Tensor:
    if tensor.ndim != 4:
        return torch.ones(tensor.shape, device=tensor.device)
    rows, columns = (torch.linspace(-2, 2, side, device=tensor.device).square() / 2 for side in tensor.shape[-2:])
    return torch.exp(-(rows[:, None] + columns)).expand(tensor.shape).contiguous()


def _at_once(pictures: Tensor) -> int:
    """How many perturbations of each picture go through the model together."""
    return max(1, _PIXELS // (len(pictures) * pictures.shape[-2:].numel()))


def _patch(encoder: DualEncoder) -> tuple[int, ...]:
    layout = encoder.layouts[0]
    if _halves(encoder):
        return _CELL, _CELL
    if not isinstance(layout, PatchLayout) or len(layout.patch_size) != 2 or max(layout.patch_size) == 1:
        raise ValueError(
            "encoder: expected an image tower whose layout tells the size of patches, got "
            f"{type(layout).__name__}; choose another method."
        )
    return layout.patch_size


def _halves(encoder: DualEncoder) -> bool:
    """Whether the image tower is one that cuts no patches and halves its grid as it goes."""
    layout = encoder.layouts[0]
    return isinstance(layout, PatchLayout) and layout.patch_size == (1, 1) and _CELL in layout.coarser


def _nothing(encoder: DualEncoder, inputs: Inputs) -> Any:
    """Baselines: the data set's mean colour, and captions without words."""
    if isinstance(inputs, Tensor):
        return 0
    return 0, token_baselines(inputs[1], words_in(encoder, inputs[1]), blank_token(encoder))


def _pictures_of(encoder: DualEncoder, found: Any, smooth: bool) -> Inputs:
    """Losses in floating point, each pixel's shared by its channels."""
    maps = found if isinstance(found, tuple) else (found,)
    # All channels of a pixel were taken out at once, so that each holds the pixel's loss.
    image = spread(maps[0].float().mean(1), maps[0])
    image = smoothed(encoder, image) if smooth else image
    return (image, *(tokens.float() for tokens in maps[1:])) if isinstance(found, tuple) else image
