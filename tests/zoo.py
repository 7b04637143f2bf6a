"""Tiny random models of the families that transformers and open_clip offer, built from their own configurations.

One entry of ``ZOO`` is enough for a model to join every contract, and the table of models in the documentation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip_zoo
import torch
import transformers
import wrapped
from copies import copier
from torch import Tensor, nn
from transformers.modeling_attn_mask_utils import AttentionMaskConverter

from captum_m2ib import DualEncoder
from captum_m2ib.encoders.towers import stages_of

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


def _build(name: str, vision: dict[str, Any], text: dict[str, Any], **options: Any) -> nn.Module:
    config = getattr(transformers, name.replace("Model", "Config"))(vision_config=vision, text_config=text, **options)
    return getattr(transformers, name)(config)


def _both(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return _build(name, VISION, TEXT, projection_dim=16, **options)

    return build


def siglip() -> nn.Module:
    return _build("SiglipModel", VISION, {**TEXT, "projection_size": WIDTH})


def siglip2() -> nn.Module:
    vision = {**SIZES, "patch_size": 8, "num_patches": 16}
    return _build("Siglip2Model", vision, {**TEXT, "projection_size": WIDTH})


def altclip() -> nn.Module:
    text = {**TEXT, "max_position_embeddings": 20, "project_dim": 16, "pad_token_id": 1, "type_vocab_size": 1}
    return _build("AltCLIPModel", VISION, text, projection_dim=16)


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
    return _build("AlignModel", vision, TEXT, projection_dim=16)


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
    return _build("Tipsv2Model", {**VISION, "num_register_tokens": 2, "mlp_ratio": 2}, TEXT)


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


def groupvit() -> nn.Module:
    vision = {
        **VISION,
        "depths": [2, 2, 1],
        "num_group_tokens": [6, 4, 0],
        "num_output_groups": [6, 4, 0],
    }
    return _build("GroupViTModel", vision, TEXT, projection_dim=16, projection_intermediate_dim=32)


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


def xclip() -> nn.Module:
    vision = {
        **VISION,
        "num_frames": 4,
        "mit_hidden_size": WIDTH,
        "mit_intermediate_size": WIDTH,
        "mit_num_hidden_layers": 1,
        "mit_num_attention_heads": 2,
    }
    return _build("XCLIPModel", vision, TEXT, projection_dim=WIDTH, prompt_num_attention_heads=2, prompt_layers=1)


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
    model = _both("Aimv2Model")()
    # Its fused attention forgets that it is causal where no caption of the batch is padded: scores would depend on
    # the batch.
    model.set_attn_implementation("eager")
    return model


# Where a page's patches stand in its prompt, and tokens of a language model that reads both.
IMAGE_TOKEN = 61
LANGUAGE = {**TEXT, "max_position_embeddings": 64, "num_key_value_heads": 1}


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
    rope = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = {**LANGUAGE, "rope_parameters": rope}
    return _retrieval(
        "ColQwen2", transformers.Qwen2VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    )


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
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4}
    text = {**LANGUAGE, "num_hidden_layers": 3, "head_dim": 16, "rope_parameters": rope}
    ids = {"image_token_id": IMAGE_TOKEN, "video_token_id": 58, "vision_start_token_id": 57, "vision_end_token_id": 56}
    return transformers.Qwen3VLModel(transformers.Qwen3VLConfig(vision_config=vision, text_config=text, **ids))


def qwen3_vl_embedder() -> nn.Module:
    return wrapped.SentenceTransformer(wrapped.PromptedReader(qwen3_vl()), wrapped.LastToken())


def colmodernvbert() -> nn.Module:
    vision = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    ends = {"cls_token_id": 62, "sep_token_id": 63}
    text = {**TEXT, **ends, "model_type": "modernbert", "max_position_embeddings": 64}
    text = {**text, "global_attn_every_n_layers": 2, "local_attention": 8}
    vlm = transformers.ModernVBertConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, pixel_shuffle_factor=2
    )
    return _retrieval("ColModernVBert", vlm)


@dataclass(frozen=True)
class Model:
    """How to build a model, what to feed it, and how the documentation calls it.

    ``needs`` is a class that transformers 4.57 lacks, ``second`` the shape of the second input where that is no
    caption; ``is_single`` says that the model computes parts in float32 whatever its weights are.
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


_ALL = [
    Model("siglip", siglip, "SigLIP, SigLIP 2 at fixed resolution"),
    Model("siglip2_naflex", siglip2, "SigLIP 2 NaFlex", size=(20, 192)),
    Model("metaclip2", _both("MetaClip2Model"), "MetaCLIP 2"),
    Model("altclip", altclip, "AltCLIP"),
    Model("chinese_clip", _both("ChineseCLIPModel"), "Chinese-CLIP"),
    Model("align", align, "ALIGN", size=(3, 128, 128)),
    Model("blip_itc", blip, "BLIP, image-text contrastive score"),
    Model("blip", _both("BlipModel"), "BLIP, text-image features"),
    Model("blip2", blip2, "BLIP-2, image-text contrastive score"),
    Model("bridgetower", bridgetower, "BridgeTower, contrastive score"),
    Model("clipseg", _both("CLIPSegModel"), "CLIPSeg"),
    Model("groupvit", groupvit, "GroupViT"),
    Model("owlvit", _both("OwlViTModel"), "OWL-ViT, text-image features"),
    Model("owlv2", _both("Owlv2Model"), "OWLv2, text-image features"),
    Model("flava", flava, "FLAVA, contrastive embeddings"),
    Model("xclip", xclip, "X-CLIP", size=(4, 3, 32, 32)),
    Model("clap", clap, "CLAP", size=(1, 512, 32)),
    Model("clap_fused", clap_fused, "CLAP with feature fusion", size=(4, 512, 32)),
    Model("videoprism", videoprism, "VideoPrism", (4, 3, 32, 32), needs="VideoPrismClipModel", is_single=True),
    Model("pe_audio", pe_audio, "Perception Encoder: audio", size=(1, 512), needs="PeAudioModel", is_single=True),
    Model("pe_video", pe_video, "Perception Encoder: video", size=(4, 3, 32, 32), needs="PeVideoModel", is_single=True),
    Model(
        "pe_audio_video",
        pe_audio_video,
        "Perception Encoder: audio, video",
        size=(1, 512),
        second=(4, 3, 32, 32),
        needs="PeAudioVideoModel",
        is_single=True,
    ),
    Model(
        "pe_av_text",
        pe_audio_video,
        "Perception Encoder: audio-video model, audio",
        size=(1, 512),
        modalities=("audio", "text"),
        needs="PeAudioVideoModel",
        is_single=True,
    ),
    Model("clvp", clvp, "CLVP, speech codes and text", size=(8,)),
    Model("vit_bert", vit_bert, "VisionTextDualEncoder: ViT, BERT"),
    Model("registers_roberta", registers_roberta, "VisionTextDualEncoder: DINOv2 with registers, RoBERTa"),
    Model("convnext_bert", convnext_bert, "VisionTextDualEncoder: ConvNeXt, BERT", size=(3, 64, 64)),
    Model("swin_bert", swin_bert, "VisionTextDualEncoder: Swin, BERT", size=(3, 64, 64)),
    Model("aimv2", aimv2, "AIMv2", is_single=True),
    Model("tipsv2", tipsv2, "TIPSv2", needs="Tipsv2Model"),
    Model("colpali", colpali, "ColPali", page_tokens=16, is_single=True),
    Model("colqwen2", colqwen2, "ColQwen2", size=(20, 384), page_tokens=4, is_single=True),
    Model(
        "colmodernvbert",
        colmodernvbert,
        "ColModernVBERT",
        size=(4, 3, 32, 32),
        page_tokens=16,
        needs="ColModernVBertForRetrieval",
    ),
    Model(
        "embedding_gemma2",
        embedding_gemma2,
        "EmbeddingGemma 2, mean over tokens",
        size=(20, 192),
        page_tokens=4,
        needs="EmbeddingGemma2Model",
        is_single=True,
    ),
    Model(
        "qwen3_vl_embedder",
        qwen3_vl_embedder,
        "Qwen3-VL embedders, last token",
        size=(20, 384),
        library="sentence-transformers",
        page_tokens=4,
        needs="Qwen3VLModel",
        is_single=True,
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
ZOO = [model for model in _ALL if hasattr(transformers, model.needs)]
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
    page = torch.tensor([[62, *[IMAGE_TOKEN] * model.page_tokens, 5, 6]]).repeat(pairs, 1)
    given = {
        "attention_mask": mask,
        "page_input_ids": page,
        "page_attention_mask": torch.ones_like(page),
        "page_mm_token_type_ids": (page == IMAGE_TOKEN).long(),
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


_MLPS = ("c_fc", "mlp", "ffn", "intermediate", "pwconv1", "fc1", "projection", "conv3", "linear1")


def layers_to_try(tower: nn.Module) -> list[nn.Module]:
    """The first block, one in the middle, and the multi-layer perceptron, or what comes nearest to it, of another."""
    stages = [stage for stage in stages_of(tower) if stage]
    blocks = [block for stage in stages for block in stage]
    middle = blocks[len(blocks) // 2]
    inside = dict(middle.named_modules())
    mlp = next(module for name in _MLPS for path, module in inside.items() if path.split(".")[-1] == name)
    return [stages[0][0], middle, mlp]
