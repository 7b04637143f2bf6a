"""Tiny random models of pictures and captions that transformers offers, built from their own configurations."""

from __future__ import annotations

from typing import Any

import transformers
from tiny_parts import SIZES, STAGES, TEXT, VISION, WIDTH, both, build
from torch import nn


def siglip() -> nn.Module:
    return build("SiglipModel", VISION, {**TEXT, "projection_size": WIDTH})


def siglip2() -> nn.Module:
    vision = {**SIZES, "patch_size": 8, "num_patches": 16}
    return build("Siglip2Model", vision, {**TEXT, "projection_size": WIDTH})


def altclip() -> nn.Module:
    text = {**TEXT, "max_position_embeddings": 20, "project_dim": 16, "pad_token_id": 1, "type_vocab_size": 1}
    return build("AltCLIPModel", VISION, text, projection_dim=16)


def align() -> nn.Module:
    vision = {
        "image_size": 64,
        "width_coefficient": 0.2,
        "depth_coefficient": 0.5,
        "depth_divisor": 4,
        "kernel_sizes": [3, 3, 5, 3],
        "in_channels": [32, 16, 24, 40],
        "out_channels": [16, 24, 40, 80],
        "strides": [1, 2, 2, 2],
        "num_block_repeats": [1, 2, 2, 2],
        "expand_ratios": [1, 4, 4, 4],
        "hidden_dim": 16,
    }
    return build("AlignModel", vision, TEXT, projection_dim=16)


def blip() -> nn.Module:
    text = {**TEXT, "encoder_hidden_size": WIDTH, "projection_dim": 16, "is_decoder": True}
    config = transformers.BlipConfig(
        vision_config=VISION, text_config=text, image_text_hidden_size=16, projection_dim=16
    )
    return transformers.BlipForImageTextRetrieval(config)


def blip2() -> nn.Module:
    reader = {**TEXT, "num_hidden_layers": 3, "encoder_hidden_size": WIDTH, "use_qformer_text_input": True}
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config=reader, num_query_tokens=4, image_text_hidden_size=16
    )
    return transformers.Blip2ForImageTextRetrieval(config)


def bridgetower() -> nn.Module:
    # Heads of its picture tower are 64 channels wide.
    sizes = {**SIZES, "hidden_size": 64}
    config = transformers.BridgeTowerConfig(
        text_config={**TEXT, **sizes, "max_position_embeddings": 20, "type_vocab_size": 1},
        vision_config={"hidden_size": 64, "num_hidden_layers": 4, "patch_size": 8, "image_size": 32},
        **{**sizes, "num_hidden_layers": 2},
        contrastive_hidden_size=16,
        logit_scale_init_value=2.6592,
    )
    return transformers.BridgeTowerForContrastiveLearning(config)


def tipsv2() -> nn.Module:
    return build("Tipsv2Model", {**VISION, "num_register_tokens": 2, "mlp_ratio": 2}, TEXT)


def groupvit() -> nn.Module:
    vision = {
        **VISION,
        "depths": [2, 2, 1],
        "num_group_tokens": [6, 4, 0],
        "num_output_groups": [6, 4, 0],
    }
    return build("GroupViTModel", vision, TEXT, projection_dim=16, projection_intermediate_dim=32)


def flava() -> nn.Module:
    config = transformers.FlavaConfig(
        image_config=VISION,
        text_config=TEXT,
        multimodal_config=SIZES,
        image_codebook_config={"hidden_size": 8, "num_groups": 2, "vocab_size": 16, "num_blocks_per_group": 1},
        projection_dim=16,
        hidden_size=WIDTH,
    )
    return transformers.FlavaModel(config)


def vision_text(vision: Any, text: Any = None) -> nn.Module:
    text = text or transformers.BertConfig(**TEXT)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)
    return transformers.VisionTextDualEncoderModel(config)


def vit_bert() -> nn.Module:
    return vision_text(transformers.ViTConfig(**VISION))


def registers_roberta() -> nn.Module:
    vision = transformers.Dinov2WithRegistersConfig(**{**VISION, "mlp_ratio": 2, "num_register_tokens": 4})
    text = {**TEXT, "max_position_embeddings": 20, "type_vocab_size": 1}
    return vision_text(vision, transformers.RobertaConfig(**text))


def convnext_bert() -> nn.Module:
    return vision_text(transformers.ConvNextConfig(patch_size=4, image_size=64, hidden_size=64, **STAGES))


def swin_bert() -> nn.Module:
    vision = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=2
    )
    return vision_text(vision)


def aimv2() -> nn.Module:
    model = both("Aimv2Model")()
    # Its fused attention forgets that it is causal where no caption of the batch is padded: scores would depend on
    # the batch.
    model.set_attn_implementation("eager")
    return model
