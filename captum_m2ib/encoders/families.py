"""Which function of a model embeds which input: one entry per model family.

Most models need none: whatever offers ``get_image_features`` and ``get_text_features``, or ``encode_image`` and
``encode_text``, is a dual encoder as it is. An entry says what is particular: other inputs than pictures and captions,
arguments beside them, an embedding that no method returns, a score for which one side reads the other's output, or one
that is no cosine of two embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from captum_m2ib.encoders.scores import Score
from captum_m2ib.encoders.towers import (
    config_of,
    embeds_text,
    image_layout,
    packed_layout,
    spectrogram_layout,
    text_layout,
    video_layout,
)
from captum_m2ib.engine.layouts import Layout


@dataclass(frozen=True)
class Side:
    r"""How one side of a dual encoder is computed.

    Args:

        modality (str): ``"image"``, ``"text"``, ``"audio"`` or ``"video"``.
        encode (str or Callable): Name of the model's method, or a function of the model and ``arguments``, that
            returns one embedding per example, (N, dimensions), as a tensor or in an output object; or what the
            family's score reads.
        arguments (tuple[str, ...]): Names of what it reads; the first is the input that is explained, the others come
            among the additional arguments.
        towers (tuple[str, ...]): Names under which the model may keep the tower; the model itself if it has none.
        named (bool, optional): Whether arguments are passed by name. Default: True
        padding (str, optional): How captions are padded: ``"longest"`` or ``"max_length"``. Default: ``"longest"``
        keyword (str, optional): Name under which the mask is passed where all else is passed by position. Default:
            None (second)
    """

    modality: str
    encode: str | Callable[..., Any]
    arguments: tuple[str, ...]
    towers: tuple[str, ...]
    named: bool = True
    padding: str = "longest"
    keyword: str | None = None

    def tower(self, model: nn.Module) -> nn.Module:
        """The module that holds this side's layers."""
        found = (getattr(model, name, None) for name in self.towers)
        return next((tower for tower in found if isinstance(tower, nn.Module)), model)


@dataclass(frozen=True)
class Family:
    r"""The sides that a model offers, and how their outputs become a score.

    Args:

        sides (tuple[Side, ...]): What it compares.
        join (Callable, optional): Where one side reads the other's output: from the model and both outputs to two
            embeddings. Default: None
        score (Callable, optional): Of both sides' outputs as ``encode`` returns them, in the order of ``sides``, what a
            pair scores (see :mod:`captum_m2ib.encoders.scores`). Default: None (the cosine of two embeddings)
    """

    sides: tuple[Side, ...]
    join: Callable[[nn.Module, Any, Any], tuple[Tensor, Tensor]] | None = None
    score: Score | None = None

    def side(self, modality: str) -> Side | None:
        return next((side for side in self.sides if side.modality == modality), None)


def derive_layout(side: Side, tower: nn.Module, positions: dict[str, int]) -> Layout | None:
    """A side's layout from its tower's modules; ``positions`` says where its other arguments are given."""
    if side.modality == "text":
        return text_layout(tower, positions.get("attention_mask")) if embeds_text(tower) else None
    if side.modality == "video":
        return video_layout(tower)
    if side.modality == "audio":
        return spectrogram_layout(tower) if hasattr(config_of(tower, "audio_config"), "spec_size") else None
    if "spatial_shapes" in positions:
        return packed_layout(tower, positions["pixel_attention_mask"], positions["spatial_shapes"])
    return image_layout(tower)


_VISION, _TEXT = ("vision_model", "image_model", "visual"), ("text_model", "text_encoder", "text")

IMAGE = Side("image", "get_image_features", ("pixel_values",), _VISION)
TEXT = Side("text", "get_text_features", ("input_ids", "attention_mask"), _TEXT)
UNMASKED_TEXT = Side("text", "get_text_features", ("input_ids", "attention_mask"), _TEXT, padding="max_length")
ENCODED_IMAGE = Side("image", "encode_image", ("image",), _VISION, named=False)
ENCODED_TEXT = Side("text", "encode_text", ("text", "attention_mask"), _TEXT, named=False)


def _flava_image(model: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
    output = model.image_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
    return model.image_projection(output.last_hidden_state[:, 0])


def _first_token(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    return model.text_projection(model.text_model(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0])


def _blip_image(model: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
    output = model.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
    return model.vision_proj(output.last_hidden_state[:, 0])


def _blip_text(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    return model.text_proj(model.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0])


def _xclip_video(model: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """The video's embedding, and its patches, which X-CLIP reads once more together with the caption."""
    pairs, frames = pixel_values.shape[:2]
    output = model.vision_model(pixel_values.flatten(0, 1))
    of_frames = model.visual_projection(output.pooler_output).unflatten(0, (pairs, frames))
    # A tuple in transformers 4, an output object in 5.
    embedding = model.mit(of_frames)[1]
    patches = model.prompts_visual_layernorm(output.last_hidden_state[:, 1:]) @ model.prompts_visual_projection
    return embedding, patches.unflatten(0, (pairs, frames)).mean(1)


def _xclip_join(model: Any, video: tuple[Tensor, Tensor], text: Tensor) -> tuple[Tensor, Tensor]:
    embedding, patches = video
    caption = text.unsqueeze(1)
    return embedding, (caption + model.prompts_generator(caption, patches)).squeeze(1)


def _fused_audio(model: Any, input_features: Tensor, is_longer: Tensor | None = None) -> Any:
    return model.get_audio_features(input_features, is_longer=is_longer)


# By class name, or by the model_type of the configuration.
FAMILIES: dict[str, Family] = {
    "siglip": Family((IMAGE, UNMASKED_TEXT)),
    "siglip2": Family(
        (
            Side("image", "get_image_features", ("pixel_values", "pixel_attention_mask", "spatial_shapes"), _VISION),
            UNMASKED_TEXT,
        )
    ),
    # The method of transformers 4.57 asks for a pooled output that this tower does not have.
    "chinese_clip": Family((IMAGE, Side("text", _first_token, ("input_ids", "attention_mask"), _TEXT))),
    "flava": Family(
        (
            Side("image", _flava_image, ("pixel_values",), _VISION),
            Side("text", _first_token, ("input_ids", "attention_mask"), _TEXT),
        )
    ),
    "BlipForImageTextRetrieval": Family(
        (
            Side("image", _blip_image, ("pixel_values",), _VISION),
            Side("text", _blip_text, ("input_ids", "attention_mask"), _TEXT),
        )
    ),
    "xclip": Family((Side("video", _xclip_video, ("pixel_values",), _VISION), TEXT), join=_xclip_join),
    "clap": Family((Side("audio", _fused_audio, ("input_features", "is_longer"), ("audio_model",)), TEXT)),
}


def family_of(model: Any) -> Family | None:
    """How a model embeds its inputs, or None if it offers no two towers under a known name."""
    config = getattr(model, "config", None)
    for key in (type(model).__name__, getattr(config, "model_type", None)):
        if key in FAMILIES and all(_offers(model, side) for side in FAMILIES[key].sides):
            return FAMILIES[key]
    for image, text in ((IMAGE, TEXT), (ENCODED_IMAGE, ENCODED_TEXT)):
        if _offers(model, image) and _offers(model, text):
            return Family((image, text))
    return None


def _offers(model: Any, side: Side) -> bool:
    if isinstance(side.encode, str):
        return hasattr(model, side.encode)
    return any(hasattr(model, name) for name in side.towers)
