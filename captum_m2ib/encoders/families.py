"""Which function of a model embeds which input: one entry per model family.

Most models need none: whatever offers ``get_image_features`` and ``get_text_features``, or ``encode_image`` and
``encode_text``, is a dual encoder as it is. An entry says what is particular: other inputs than pictures and captions,
arguments beside them, an embedding that no method returns, a score for which one side reads the other's output, or one
that is no cosine of two embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_m2ib.encoders.embedders import family_of_embedder, is_embedder
from captum_m2ib.encoders.patches import joined, positions_in
from captum_m2ib.encoders.scores import MaxSim, best_match, dot
from captum_m2ib.encoders.sides import Family, Side
from captum_m2ib.encoders.towers import (
    config_of,
    embeds_text,
    image_layout,
    packed_layout,
    sound_layout,
    text_layout,
    video_layout,
)
from captum_m2ib.engine.layouts import Layout, TextLayout


def derive_layout(side: Side, model: nn.Module, positions: dict[str, int]) -> Layout | None:
    """A side's layout from its tower's modules; ``positions`` says where its other arguments are given."""
    tower = side.tower(model)
    if side.modality == "text":
        embeds = embeds_text(side.embedder(model))
        layout = text_layout(tower, positions.get("attention_mask")) if embeds else None
        return replace(layout, source=None) if layout is not None and side.is_filled else layout
    if side.modality == "video" or side.is_tiled:
        return video_layout(tower, positions.get("padding_mask_videos"))
    if side.modality == "audio" and embeds_text(tower):
        # Sound as codes: one token per span of time.
        return TextLayout()
    if side.modality == "audio":
        return sound_layout(tower, positions.get("padding_mask"))
    shapes = next((positions[name] for name in ("spatial_shapes", "image_grid_thw") if name in positions), None)
    if shapes is not None:
        own = model if side.is_stem else tower
        return packed_layout(tower, positions.get("pixel_attention_mask"), shapes, config_of(own, "vision_config"))
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


def _blip2_image(model: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
    """What each of the query tokens has read from the picture."""
    output = model.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
    queries = model.query_tokens.expand(len(pixel_values), -1, -1)
    read = model.qformer(query_embeds=queries, encoder_hidden_states=output.last_hidden_state).last_hidden_state
    return F.normalize(model.vision_projection(read.to(model.vision_projection.weight.dtype)), dim=-1)


def _blip2_text(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    placeholder = model.config.image_token_index
    if placeholder is not None and bool((input_ids == placeholder).any()):
        raise ValueError(
            f"input_ids: expected captions alone, got the placeholder of pictures ({placeholder}) among them; leave "
            "out what Blip2Processor writes before a caption, or prepare pairs with DualEncoder.prepare."
        )
    embedded = model.embeddings(input_ids=input_ids)
    output = model.qformer(query_embeds=embedded, query_length=0, attention_mask=attention_mask)
    first = output.last_hidden_state[:, 0].to(model.text_projection.weight.dtype)
    return F.normalize(model.text_projection(first), dim=-1)


def _bridge_image(model: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
    inside = model.bridgetower
    visual = inside.vision_model.visual
    hidden = visual.forward_pre(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
    # Of the blocks, the model runs as many as its text tower has.
    for block in visual.transformer.resblocks[: len(inside.text_model.encoder.layer)]:
        hidden = block(hidden)
    first = inside.cross_modal_image_transform(visual.forward_post(hidden)[:, 0])
    return model.itc_image_head(first + inside.token_type_embeddings.weight[1])


def _bridge_text(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    output = model.bridgetower.text_model(input_ids, attention_mask=attention_mask)
    return model.itc_text_head(output.last_hidden_state[:, 0])


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


def _videoprism_video(model: Any, pixel_values_videos: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
    output = model.get_video_features(pixel_values_videos, interpolate_pos_encoding=interpolate_pos_encoding)
    return output.pooler_output.flatten(1)


def _fused_audio(model: Any, input_features: Tensor, is_longer: Tensor | None = None) -> Any:
    return model.get_audio_features(input_features, is_longer=is_longer)


def _page(model: Any, pixel_values: Tensor, page_input_ids: Tensor, **others: Tensor) -> Tensor:
    """A page's tokens: its patches, and the prompt around them."""
    given = {name.removeprefix("page_"): value for name, value in others.items()}
    found: Tensor = model(pixel_values=pixel_values, input_ids=page_input_ids, **given).embeddings
    return found


def _query(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
    found: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, **others).embeddings
    return found


def _prefix_page(model: Any, pixel_values: Tensor, page_input_ids: Tensor, **others: Tensor) -> Tensor:
    # As ColPali's processor says: a prefix, whose tokens all see each other.
    kinds = torch.zeros_like(page_input_ids)
    return _page(model, pixel_values, page_input_ids, page_token_type_ids=kinds, **others)


def _prefix_query(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    return _query(model, input_ids, attention_mask, token_type_ids=torch.zeros_like(input_ids))


def _neomme_page(
    model: Any,
    pixel_values: Tensor,
    page_input_ids: Tensor,
    page_attention_mask: Tensor | None = None,
    *,
    page_position_ids: Tensor,
    spatial_shapes: Tensor,
) -> Tensor:
    output = model(
        pixel_values=joined(pixel_values, spatial_shapes),
        input_ids=page_input_ids,
        attention_mask=page_attention_mask,
        position_ids=page_position_ids.movedim(1, 0),
        output_dense=False,
    )
    found: Tensor = output.embeddings
    return found


def _neomme_query(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    return _query(model, input_ids, attention_mask, output_dense=False)


def _mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over real tokens."""
    if mask is None:
        return hidden.mean(1)
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def _gemma_page(
    model: Any,
    pixel_values: Tensor,
    page_input_ids: Tensor,
    page_attention_mask: Tensor | None = None,
    pixel_attention_mask: Tensor | None = None,
    *,
    spatial_shapes: Tensor,
) -> Tensor:
    # Padding of patches is told by their positions.
    del pixel_attention_mask
    output = model(
        pixel_values=pixel_values,
        input_ids=page_input_ids,
        attention_mask=page_attention_mask,
        image_position_ids=positions_in(spatial_shapes, pixel_values.shape[1]),
    )
    return _mean(output.last_hidden_state, page_attention_mask)


def _gemma_query(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    return _mean(model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state, attention_mask)


def _late(
    vision: str,
    language: str,
    *others: str,
    page: Callable[..., Tensor] = _page,
    query: Callable[..., Tensor] = _query,
    is_tiled: bool = False,
) -> Family:
    """Late interaction: one network reads a page, as patches among the tokens of a prompt, and a query."""
    reads = ("pixel_values", "page_input_ids", "page_attention_mask", *others)
    pages = Side("image", page, reads, (vision,), is_tiled=is_tiled)
    queries = Side("text", query, ("input_ids", "attention_mask"), (language,), is_filled=True)
    return Family((pages, queries), score=MaxSim(), is_shared=True)


def _pe_audio(model: Any, input_values: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    inside = getattr(model, "audio_model", model)
    return inside.audio_head(inside.audio_encoder(input_values, padding_mask=padding_mask).pooler_output)


def _pe_video(model: Any, pixel_values_videos: Tensor, padding_mask_videos: Tensor | None = None) -> Tensor:
    inside = getattr(model, "video_model", model)
    output = inside.video_encoder(pixel_values_videos, padding_mask_videos=padding_mask_videos)
    return inside.video_head(output.pooler_output)


def _pe_text(kind: str) -> Callable[..., Tensor]:
    """The text as it is compared with sounds or with videos."""

    def encode(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        output = model.text_model(input_ids, attention_mask=attention_mask)
        inside = getattr(model, f"{kind}_model", model)
        return getattr(inside, f"text_{kind}_head")(output.last_hidden_state[:, 0])

    return encode


_PE_AUDIO = Side("audio", _pe_audio, ("input_values", "padding_mask"), ("audio_encoder", "audio_model.audio_encoder"))
_PE_VIDEO = Side(
    "video", _pe_video, ("pixel_values_videos", "padding_mask_videos"), ("video_encoder", "video_model.video_encoder")
)
_PE_TEXTS = tuple(
    Side("text", _pe_text(kind), ("input_ids", "attention_mask"), _TEXT, beside=kind) for kind in ("audio", "video")
)


def _clvp_text(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
    output = model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
    # A tensor in transformers 4, an output object in 5.
    return getattr(output, "embeds", output)


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
    "Blip2ForImageTextRetrieval": Family(
        (
            Side("image", _blip2_image, ("pixel_values",), _VISION),
            Side("text", _blip2_text, ("input_ids", "attention_mask"), ("qformer",), embeds="embeddings"),
        ),
        score=best_match,
        is_shared=True,
        # Its feed-forward part of the queries is another one.
        unshared=r"encoder\.layer\.\d+\.(intermediate|output)\b",
    ),
    "BridgeTowerForContrastiveLearning": Family(
        (
            Side("image", _bridge_image, ("pixel_values",), ("bridgetower.vision_model",)),
            Side("text", _bridge_text, ("input_ids", "attention_mask"), ("bridgetower.text_model",)),
        )
    ),
    "videoprism": Family((Side("video", _videoprism_video, ("pixel_values_videos",), ("video_model",)), TEXT)),
    "pe_audio": Family((_PE_AUDIO, _PE_TEXTS[0]), score=dot),
    "pe_video": Family((_PE_VIDEO, _PE_TEXTS[1]), score=dot),
    "pe_audio_video": Family((_PE_AUDIO, _PE_VIDEO, *_PE_TEXTS), score=dot),
    "xclip": Family((Side("video", _xclip_video, ("pixel_values",), _VISION), TEXT), join=_xclip_join),
    "ColPaliForRetrieval": _late("vlm.vision_tower", "vlm.language_model", page=_prefix_page, query=_prefix_query),
    "ColQwen2ForRetrieval": _late("vlm.visual", "vlm.language_model", "image_grid_thw"),
    "ColModernVBertForRetrieval": _late("vlm.vision_model", "vlm.text_model", "pixel_attention_mask", is_tiled=True),
    # Patches have no tower of their own: what makes tokens of them is the one place before they are mixed.
    "NeoMMEForRetrieval": Family(
        (
            Side(
                "image",
                _neomme_page,
                ("pixel_values", "page_input_ids", "page_attention_mask", "page_position_ids", "spatial_shapes"),
                ("model.patch_embeddings",),
                is_stem=True,
            ),
            Side("text", _neomme_query, ("input_ids", "attention_mask"), ("model",), is_filled=True),
        ),
        score=MaxSim(is_mean=True),
        is_shared=True,
        unshared="patch_embeddings",
    ),
    # Its mean is taken outside, by whoever uses it; its network projects each token before that.
    "EmbeddingGemma2Model": Family(
        (
            Side(
                "image",
                _gemma_page,
                ("pixel_values", "page_input_ids", "page_attention_mask", "pixel_attention_mask", "spatial_shapes"),
                ("vision_tower",),
            ),
            Side("text", _gemma_query, ("input_ids", "attention_mask"), ("language_model",)),
        ),
        is_shared=True,
    ),
    "clap": Family((Side("audio", _fused_audio, ("input_features", "is_longer"), ("audio_model",)), TEXT)),
    # Sound comes as the codes that the model's own decoder writes.
    "clvp": Family(
        (
            Side("audio", "get_speech_features", ("speech_ids",), ("speech_encoder_model",)),
            Side("text", _clvp_text, ("input_ids", "attention_mask"), ("text_encoder_model",)),
        )
    ),
}


def family_of(model: Any) -> Family | None:
    """How a model embeds its inputs, or None if it offers no two towers under a known name."""
    if is_embedder(model):
        return family_of_embedder(model)
    config = getattr(model, "config", None)
    for key in (type(model).__name__, getattr(config, "model_type", None)):
        if key in FAMILIES and all(side.is_offered(model) for side in FAMILIES[key].sides):
            return FAMILIES[key]
    for image, text in ((IMAGE, TEXT), (ENCODED_IMAGE, ENCODED_TEXT)):
        if image.is_offered(model) and text.is_offered(model):
            return Family((image, text))
    return None


def patches_among(model: Any, ids: Tensor) -> Tensor:
    """Which tokens of pages' prompts, (N, tokens), stand for patches."""
    config = getattr(model.config, "vlm_config", model.config)
    found = ids == int(config.image_token_id)
    opening = getattr(config, "document_token_id", None)
    if opening is not None:
        # The same token right after the one that opens a page only says that a picture follows.
        found[:, 1:] &= ids[:, :-1] != opening
    return found
