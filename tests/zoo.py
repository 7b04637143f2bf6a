"""Tiny random models of the families that transformers and open_clip offer, built from their own configurations.

One entry of ``ZOO`` is enough for a model to join every contract, and the table of models in the documentation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import image_zoo
import open_clip_zoo
import page_zoo
import time_zoo
import torch
import transformers
from copies import copier
from tiny_parts import LEGACY, both
from torch import Tensor, nn

from captum_m2ib import DualEncoder
from captum_m2ib.encoders.towers import stages_of


@dataclass(frozen=True)
class Model:
    """How to build a model, what to feed it, and how the documentation calls it.

    ``needs`` is a class that transformers 4.57 lacks, and ``is_new`` says that its passes cannot be followed there;
    ``second`` is the shape of the second input where that is no caption; ``is_single`` says that the model computes
    parts in float32 whatever its weights are.
    """

    name: str
    build: Callable[[], nn.Module]
    title: str
    size: tuple[int, ...] = (3, 32, 32)
    pad: int = 1
    library: str = "transformers"
    page_tokens: int = 0
    needs: str = "PreTrainedModel"
    second: tuple[int, ...] | None = None
    modalities: tuple[str, str] | None = None
    is_single: bool = False
    is_new: bool = False


_ALL = [
    Model("siglip", image_zoo.siglip, "SigLIP, SigLIP 2 at fixed resolution"),
    Model("siglip2_naflex", image_zoo.siglip2, "SigLIP 2 NaFlex", size=(20, 192)),
    Model("metaclip2", both("MetaClip2Model"), "MetaCLIP 2"),
    Model("altclip", image_zoo.altclip, "AltCLIP"),
    Model("chinese_clip", both("ChineseCLIPModel"), "Chinese-CLIP"),
    Model("align", image_zoo.align, "ALIGN", size=(3, 128, 128)),
    Model("blip_itc", image_zoo.blip, "BLIP, image-text contrastive score"),
    Model("blip", both("BlipModel"), "BLIP, text-image features"),
    Model("blip2", image_zoo.blip2, "BLIP-2, image-text contrastive score"),
    Model("bridgetower", image_zoo.bridgetower, "BridgeTower, contrastive score"),
    Model("clipseg", both("CLIPSegModel"), "CLIPSeg"),
    Model("groupvit", image_zoo.groupvit, "GroupViT"),
    Model("owlvit", both("OwlViTModel"), "OWL-ViT, text-image features"),
    Model("owlv2", both("Owlv2Model"), "OWLv2, text-image features"),
    Model("flava", image_zoo.flava, "FLAVA, contrastive embeddings"),
    Model("xclip", time_zoo.xclip, "X-CLIP", size=(4, 3, 32, 32)),
    Model("clap", time_zoo.clap, "CLAP", size=(1, 512, 32)),
    Model("clap_fused", time_zoo.clap_fused, "CLAP with feature fusion", size=(4, 512, 32)),
    Model(
        "videoprism",
        time_zoo.videoprism,
        "VideoPrism",
        size=(4, 3, 32, 32),
        needs="VideoPrismClipModel",
        is_single=True,
    ),
    Model(
        "pe_audio", time_zoo.pe_audio, "Perception Encoder: audio", size=(1, 512), needs="PeAudioModel", is_single=True
    ),
    Model(
        "pe_video",
        time_zoo.pe_video,
        "Perception Encoder: video",
        size=(4, 3, 32, 32),
        needs="PeVideoModel",
        is_single=True,
    ),
    Model(
        "pe_audio_video",
        time_zoo.pe_audio_video,
        "Perception Encoder: audio, video",
        size=(1, 512),
        second=(4, 3, 32, 32),
        needs="PeAudioVideoModel",
        is_single=True,
    ),
    Model(
        "pe_av_text",
        time_zoo.pe_audio_video,
        "Perception Encoder: audio-video model, audio",
        size=(1, 512),
        modalities=("audio", "text"),
        needs="PeAudioVideoModel",
        is_single=True,
    ),
    Model("clvp", time_zoo.clvp, "CLVP, speech codes and text", size=(8,)),
    Model("vit_bert", image_zoo.vit_bert, "VisionTextDualEncoder: ViT, BERT"),
    Model("registers_roberta", image_zoo.registers_roberta, "VisionTextDualEncoder: DINOv2 with registers, RoBERTa"),
    Model("convnext_bert", image_zoo.convnext_bert, "VisionTextDualEncoder: ConvNeXt, BERT", size=(3, 64, 64)),
    Model("swin_bert", image_zoo.swin_bert, "VisionTextDualEncoder: Swin, BERT", size=(3, 64, 64)),
    Model("aimv2", image_zoo.aimv2, "AIMv2", is_single=True),
    Model("tipsv2", image_zoo.tipsv2, "TIPSv2", needs="Tipsv2Model"),
    Model("colpali", page_zoo.colpali, "ColPali", page_tokens=16, is_single=True),
    Model("colqwen2", page_zoo.colqwen2, "ColQwen2", size=(20, 384), page_tokens=4, is_single=True),
    Model(
        "colmodernvbert",
        page_zoo.colmodernvbert,
        "ColModernVBERT",
        size=(4, 3, 32, 32),
        page_tokens=16,
        needs="ColModernVBertForRetrieval",
    ),
    Model(
        "neomme",
        page_zoo.neomme,
        "NeoMME, multi-vector retrieval",
        size=(20, 192),
        page_tokens=16,
        needs="NeoMMEForRetrieval",
        is_single=True,
    ),
    Model(
        "embedding_gemma2",
        page_zoo.embedding_gemma2,
        "EmbeddingGemma 2, mean over tokens",
        size=(20, 192),
        page_tokens=4,
        needs="EmbeddingGemma2Model",
        is_single=True,
    ),
    Model(
        "qwen3_vl_embedder",
        page_zoo.qwen3_vl_embedder,
        "Qwen3-VL embedders, last token",
        size=(20, 384),
        library="sentence-transformers",
        page_tokens=4,
        needs="Qwen3VLModel",
        is_single=True,
        is_new=True,
    ),
    Model("open_clip_vit", open_clip_zoo.vit, "CLIP ViT (ViT-B-32)", pad=0, library="open_clip"),
    Model("open_clip_resnet", open_clip_zoo.resnet, "CLIP ResNet (RN50)", (3, 64, 64), 0, "open_clip"),
    Model("open_clip_custom", open_clip_zoo.custom, "CustomTextCLIP", pad=0, library="open_clip"),
    Model("open_clip_coca", open_clip_zoo.coca, "CoCa", pad=0, library="open_clip"),
    Model("open_clip_siglip", open_clip_zoo.siglip, "SigLIP (ViT-B-16-SigLIP)", (3, 64, 64), 1, "open_clip"),
    Model("open_clip_mobileclip", open_clip_zoo.mobileclip, "MobileCLIP (FastViT)", (3, 128, 128), 0, "open_clip"),
    Model("open_clip_convnext", open_clip_zoo.convnext, "CLIP ConvNeXt", (3, 64, 64), 0, "open_clip"),
    Model("open_clip_eva02", open_clip_zoo.eva02, "EVA02-CLIP", (3, 64, 64), 0, "open_clip"),
    Model("open_clip_biomed", open_clip_zoo.biomed, "BiomedCLIP (timm ViT, BERT)", (3, 64, 64), 1, "open_clip"),
]
ZOO = [model for model in _ALL if hasattr(transformers, model.needs) and not (LEGACY and model.is_new)]
LEFT_OUT = [model.title for model in _ALL if model not in ZOO]


def model_named(name: str) -> Model:
    return next(model for model in ZOO if model.name == name)


def encoder_of(model: Model, seed: int = 0, **options: Any) -> DualEncoder:
    make = _stirred(model, seed)
    torch.manual_seed(seed)
    return DualEncoder(make(), modalities=model.modalities, **options)


@functools.cache
def _stirred(model: Model, seed: int) -> Callable[[], nn.Module]:
    """Built once, to be copied: no test sees what another did to its own."""
    torch.manual_seed(seed)
    built = model.build().eval()
    stir(built)
    return copier(built)


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Larger random weights than models start their training with, so that every input moves the score."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        # What divides by its weights keeps them.
        if parameter.ndim >= 2 and parameter[0].numel() > 1 and not name.endswith(".alpha"):
            inputs = parameter[0].numel()
            parameter.normal_(std=1.0 if id(parameter) in tables or len(parameter) == 1 else 1.5 * inputs**-0.5)


def arguments_of(model: Model, encoder: DualEncoder, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Random inputs for as many pairs as there are captions."""
    pairs, generator = len(ids), torch.Generator().manual_seed(1)
    inputs = _inputs_of(encoder, 0, (pairs, *model.size), generator)
    second = ids.where(mask > 0, model.pad)
    if model.second is not None:
        second = _inputs_of(encoder, 1, (pairs, *model.second), generator)
    # Pages have places for all of their patches.
    shapes = torch.tensor([[4, 4], [2, 8] if model.page_tokens else [3, 4], [2, 8]])[:pairs]
    patches = (torch.arange(model.size[0]) < shapes.prod(1, keepdim=True)).long()
    tiles = torch.ones(pairs, model.size[0], *model.size[2:], dtype=torch.long)
    page = torch.tensor([[62, *[page_zoo.IMAGE_TOKEN] * model.page_tokens, 5, 6]]).repeat(pairs, 1)
    given = {
        "attention_mask": mask,
        "page_input_ids": page,
        "page_attention_mask": torch.ones_like(page),
        "page_position_ids": torch.stack([torch.arange(page.shape[1]), torch.arange(page.shape[1]).flip(0)])
        .expand(pairs, 2, -1)
        .contiguous(),
        "page_mm_token_type_ids": (page == page_zoo.IMAGE_TOKEN).long(),
        "image_grid_thw": torch.tensor([[1, 4, 4]]).repeat(pairs, 1),
        "pixel_attention_mask": tiles if len(model.size) == 4 else patches,
        "spatial_shapes": shapes,
        "is_longer": torch.tensor([[True], [False], [True]])[:pairs],
        "padding_mask": _shorter(pairs, 512, 384),
        "padding_mask_videos": _shorter(pairs, 4, 3),
    }
    return inputs, second, *(given[name] for name in encoder.argument_names[2:])


def _shorter(pairs: int, length: int, shorter: int) -> Tensor:
    """A mask of pairs of which the second has padding."""
    mask = torch.ones(pairs, length, dtype=torch.long)
    mask[1:2, shorter:] = 0
    return mask


def _inputs_of(encoder: DualEncoder, index: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if encoder.reads_tokens(index):
        return torch.randint(3, 60, shape, generator=generator)
    return torch.randn(shape, generator=generator)


_MLPS = ("c_fc", "mlp", "ffn", "intermediate", "pwconv1", "fc1", "projection", "conv3", "linear1", "up_proj")


def layers_to_try(tower: nn.Module) -> list[nn.Module]:
    """The first block, one in the middle, and the multi-layer perceptron, or what comes nearest to it, of another."""
    stages = [stage for stage in stages_of(tower) if stage] or [[tower]]
    blocks = [block for stage in stages for block in stage]
    middle = blocks[len(blocks) // 2]
    inside = dict(middle.named_modules())
    mlp = next(module for name in _MLPS for path, module in inside.items() if path.split(".")[-1] == name)
    return [stages[0][0], middle, mlp]
