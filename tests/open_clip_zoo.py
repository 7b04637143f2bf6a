"""Tiny random models of open_clip's kinds: its own towers, timm's and transformers'."""

from __future__ import annotations

import tempfile
from typing import Any

import transformers
from torch import nn

TEXT = {"context_length": 6, "vocab_size": 64, "width": 32, "heads": 2, "layers": 4}
VISION = {"layers": 4, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}


def _clip(vision: dict[str, Any], text: dict[str, Any] = TEXT, custom: bool = False, embed_dim: int = 16) -> nn.Module:
    from open_clip import model

    kind = model.CustomTextCLIP if custom else model.CLIP
    return kind(embed_dim, model.CLIPVisionCfg(**vision), model.CLIPTextCfg(**text))


def _timm(name: str, text: dict[str, Any] = TEXT, embed_dim: int = 16, **vision: Any) -> nn.Module:
    return _clip({"timm_model_name": name, "timm_proj": "linear", "image_size": 64, **vision}, text, True, embed_dim)


def _with_trunk(trunk: nn.Module, features: int) -> nn.Module:
    """A tower of timm that is built smaller than any that timm has a name for."""
    model = _timm("test_vit")
    model.visual.trunk, model.visual.head = trunk, nn.Linear(features, 16)
    return model


def mobileclip() -> nn.Module:
    from timm.models.fastvit import FastVit

    mixers = ("repmixer", "repmixer", "repmixer", "attention")
    sizes = {"layers": (1, 1, 2, 1), "embed_dims": (8, 16, 32, 64), "mlp_ratios": (2, 2, 2, 2)}
    return _with_trunk(FastVit(token_mixers=mixers, num_classes=0, cls_ratio=1.0, **sizes), 64)


def eva02() -> nn.Module:
    from timm.models.eva import Eva

    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 4, "num_heads": 2, "mlp_ratio": 2}
    rotary = {"use_rot_pos_emb": True, "swiglu_mlp": True, "ref_feat_shape": (4, 4)}
    return _with_trunk(Eva(num_classes=0, **sizes, **rotary), 48)


def vit() -> nn.Module:
    return _clip(VISION)


def custom() -> nn.Module:
    return _clip(VISION, custom=True)


def convnext() -> nn.Module:
    return _timm("test_convnext")


def resnet() -> nn.Module:
    return _clip({"layers": (1, 1, 2, 1), "width": 8, "head_width": 8, "image_size": 64})


def siglip() -> nn.Module:
    text = {**TEXT, "no_causal_mask": True, "pool_type": "last", "pad_id": 1, "proj_bias": True}
    return _timm("test_vit", text, embed_dim=64, timm_pool="map", timm_proj="none")


def coca() -> nn.Module:
    from open_clip import coca_model, model

    text = {**TEXT, "context_length": 6, "embed_cls": True, "output_tokens": True}
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    return coca_model.CoCa(
        16, coca_model.MultimodalCfg(**TEXT), model.CLIPTextCfg(**text), model.CLIPVisionCfg(**vision)
    )


def biomed() -> nn.Module:
    """A timm picture tower beside a BERT of transformers, as BiomedCLIP is built."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    with tempfile.TemporaryDirectory() as folder:
        transformers.BertConfig(vocab_size=64, max_position_embeddings=16, pad_token_id=1, **sizes).save_pretrained(
            folder
        )
        text = {
            "hf_model_name": folder,
            "hf_model_pretrained": False,
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_pooler",
        }
        return _timm("test_vit", text)
