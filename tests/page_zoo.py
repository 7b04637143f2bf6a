"""Tiny random networks that read pages among the tokens of a prompt, and queries."""

from __future__ import annotations

from typing import Any

import transformers
import wrapped
from tiny_parts import LEGACY, SIZES, TEXT, VISION, WIDTH
from torch import nn

# Where a page's patches stand in its prompt, and tokens of a language model that reads both.
IMAGE_TOKEN = 61
LANGUAGE = {**TEXT, "max_position_embeddings": 64, "num_key_value_heads": 1}


def _rope(section: list[int]) -> dict[str, Any]:
    """Rotary positions of three axes, as configurations of this transformers say it."""
    rope = {"rope_type": "default", "type": "default", "mrope_section": section}
    return {"rope_scaling": rope, "rope_theta": 1e4} if LEGACY else {"rope_parameters": {**rope, "rope_theta": 1e4}}


def _retrieval(name: str, vlm: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(vlm_config=vlm, embedding_dim=16)
    return getattr(transformers, f"{name}ForRetrieval")(config)


def colpali() -> nn.Module:
    vision = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    text = {**LANGUAGE, "model_type": "gemma", "head_dim": 16}
    vlm = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, projection_dim=WIDTH
    )
    return _retrieval("ColPali", vlm)


def colqwen2() -> nn.Module:
    vision = {"depth": 4, "embed_dim": WIDTH, "num_heads": 2, "mlp_ratio": 2, "hidden_size": WIDTH, "patch_size": 8}
    text = {**LANGUAGE, **_rope([2, 3, 3])}
    return _retrieval(
        "ColQwen2", transformers.Qwen2VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    )


def colmodernvbert() -> nn.Module:
    vision = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    ends = {"cls_token_id": 62, "sep_token_id": 63}
    text = {**TEXT, **ends, "model_type": "modernbert", "max_position_embeddings": 64}
    text = {**text, "global_attn_every_n_layers": 2, "local_attention": 8}
    vlm = transformers.ModernVBertConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, pixel_shuffle_factor=2
    )
    return _retrieval("ColModernVBert", vlm)


def embedding_gemma2() -> nn.Module:
    sizes = {**SIZES, "num_hidden_layers": 3, "head_dim": 16, "num_key_value_heads": 1}
    vision = {**sizes, "num_key_value_heads": 2, "patch_size": 8, "pooling_kernel_size": 2}
    vision = {**vision, "model_type": "gemma4_vision", "position_embedding_size": 32}
    text = {**TEXT, **sizes, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "embedding_dim": 16}
    text = {**text, "max_position_embeddings": 64, "sliding_window": 4}
    text["layer_types"] = ["sliding_attention", "full_attention", "full_attention"]
    ids = {"image_token_id": IMAGE_TOKEN, "video_token_id": 58, "audio_token_id": 57}
    return transformers.EmbeddingGemma2Model(
        transformers.EmbeddingGemma2Config(vision_config=vision, text_config=text, **ids)
    )


def neomme() -> nn.Module:
    sizes = {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "embedding_rank": 16, "embedding_dim": 16}
    ids = {"image_token_id": IMAGE_TOKEN, "document_token_id": 60}
    text = {**TEXT, "max_position_embeddings": 64, "sliding_window": 4}
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = transformers.NeoMMEConfig(**{**text, **sizes, **ids}, patch_size=8, layer_types=kinds)
    return transformers.NeoMMEForRetrieval(config)


def qwen3_vl() -> nn.Module:
    vision = {
        "depth": 3,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    text = {**LANGUAGE, "num_hidden_layers": 3, "head_dim": 16, **_rope([4, 2, 2])}
    ids = {"image_token_id": IMAGE_TOKEN, "video_token_id": 58, "vision_start_token_id": 57, "vision_end_token_id": 56}
    return transformers.Qwen3VLModel(transformers.Qwen3VLConfig(vision_config=vision, text_config=text, **ids))


def qwen3_vl_embedder() -> nn.Module:
    return wrapped.SentenceTransformer(wrapped.PromptedReader(qwen3_vl()), wrapped.LastToken())
