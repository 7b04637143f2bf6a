"""Sizes of tiny models, and how a model of two towers is built from two configurations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_attn_mask_utils import AttentionMaskConverter

WIDTH = 32
LEGACY = int(transformers.__version__.split(".")[0]) < 5

if LEGACY:
    # It makes causal masks of the default type first, which cannot hold the lowest float64.
    _make = AttentionMaskConverter._make_causal_mask

    def _make_in_float64(shape: Any, dtype: torch.dtype, *arguments: Any, **options: Any) -> Tensor:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.promote_types(dtype, default))
        try:
            return _make(shape, dtype, *arguments, **options)
        finally:
            torch.set_default_dtype(default)

    AttentionMaskConverter._make_causal_mask = staticmethod(_make_in_float64)

SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
TEXT = {
    **SIZES,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "bos_token_id": 62,
    "eos_token_id": 63,
    "pad_token_id": 1,
}
STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 32, 64]}


def build(name: str, vision: dict[str, Any], text: dict[str, Any], **options: Any) -> nn.Module:
    config = getattr(transformers, name.replace("Model", "Config"))(vision_config=vision, text_config=text, **options)
    return getattr(transformers, name)(config)


def both(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(build, name, VISION, TEXT, projection_dim=16, **options)


def reader_of(family: str, name: str) -> Any:
    """The class of a family's pictures in this transformers that needs Pillow alone; 4 has it under the plain name."""
    module = getattr(transformers.models, family)
    return getattr(module, name if LEGACY else f"{name}Pil")


def embedded(output: Any) -> Tensor:
    """What get_image_features and the like return: a tensor in transformers 4, an output object in 5."""
    found: Tensor = getattr(output, "pooler_output", output)
    return found
