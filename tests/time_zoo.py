"""Tiny random models of sounds and videos that transformers offers, built from their own configurations."""

from __future__ import annotations

from typing import Any

import transformers
from tiny_parts import SIZES, TEXT, VISION, WIDTH, build
from torch import nn


def videoprism() -> nn.Module:
    vision = {
        **SIZES,
        "image_size": 32,
        "num_frames": 4,
        "tubelet_size": [1, 8, 8],
        "num_spatial_layers": 4,
        "num_temporal_layers": 2,
        "num_auxiliary_layers": 1,
    }
    config = transformers.VideoPrismConfig(vision_config=vision, text_config=TEXT)
    return transformers.VideoPrismClipModel(config)


def _pe_parts() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Configurations of Perception Encoder's towers of sounds, videos and text."""
    encoder = {**SIZES, "head_dim": 16}
    codec = {"encoder_hidden_size": 4, "downsampling_ratios": [32], "codebook_dim": 8, "hidden_size": 16}
    frames = {
        "architecture": "vit_pe_core_tiny_patch16_384",
        "num_classes": 16,
        "model_args": {"depth": 4, "embed_dim": 48, "img_size": 32, "patch_size": 8, "num_heads": 3},
    }
    text = {
        **TEXT,
        "hidden_size": WIDTH,
        "global_attn_every_n_layers": 2,
        "local_attention": 4,
        "cls_token_id": 62,
        "num_attention_heads": 4,
    }
    return {**encoder, "dac_config": codec}, {**encoder, "vision_config": frames}, {**text, "sep_token_id": 63}


def pe_audio() -> nn.Module:
    audio, _, text = _pe_parts()
    return transformers.PeAudioModel(transformers.PeAudioConfig(audio_config=audio, text_config=text))


def pe_video() -> nn.Module:
    _, video, text = _pe_parts()
    return transformers.PeVideoModel(transformers.PeVideoConfig(video_config=video, text_config=text))


def pe_audio_video() -> nn.Module:
    audio, video, text = _pe_parts()
    both = {**SIZES, "head_dim": 16, "audio_config": audio, "video_config": video}
    config = transformers.PeAudioVideoConfig(audio_video_config=both, text_config=text)
    return transformers.PeAudioVideoModel(config)


def clvp() -> nn.Module:
    # Its rotary embedding turns 32 channels of a head.
    tower = {**SIZES, "num_attention_heads": 1, "vocab_size": 64, "projection_dim": 16, "pad_token_id": 1}
    decoder = {**SIZES, "vocab_size": 64, "max_position_embeddings": 16, "max_text_tokens": 16, "feature_size": 8}
    config = transformers.ClvpConfig(text_config=tower, speech_config=tower, decoder_config=decoder, projection_dim=16)
    return transformers.ClvpModelForConditionalGeneration(config)


def xclip() -> nn.Module:
    vision = {
        **VISION,
        "num_frames": 4,
        "mit_hidden_size": WIDTH,
        "mit_intermediate_size": WIDTH,
        "mit_num_hidden_layers": 1,
        "mit_num_attention_heads": 2,
    }
    return build("XCLIPModel", vision, TEXT, projection_dim=WIDTH, prompt_num_attention_heads=2, prompt_layers=1)


def clap(**audio: Any) -> nn.Module:
    sizes = {
        "spec_size": 128,
        "num_mel_bins": 32,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "window_size": 2,
        "hidden_size": 64,
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1, 2, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "num_classes": 4,
        **audio,
    }
    text = {**TEXT, "projection_dim": 16, "type_vocab_size": 1, "max_position_embeddings": 20}
    config = transformers.ClapConfig(audio_config={**sizes, "projection_dim": 16}, text_config=text, projection_dim=16)
    return transformers.ClapModel(config)


def clap_fused() -> nn.Module:
    return clap(enable_fusion=True, fusion_type="aff_2d", aff_block_r=2)
