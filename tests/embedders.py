"""Tiny networks with their processors, as directories that sentence-transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import late
import page_zoo
import time_zoo
import tiny_parts
import transformers
import zoo
from torch import nn

TEMPLATE = """\
{% for message in messages %}<s>{{ message.role }}: \
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|image_pad|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}{% endfor %}"""


def _save(model: nn.Module, processor: Any, folder: Path) -> None:
    zoo.stir(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_qwen3_vl(folder: Path) -> None:
    """One network that reads prompts with patches in them."""
    from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    reader = Qwen2VLImageProcessorPil(size={"shortest_edge": 16 * 16, "longest_edge": 40 * 32}, patch_size=8)
    tokenizer = late.tokenizer("<|image_pad|>", {58: "<|video_pad|>"})
    videos = Qwen3VLVideoProcessor(patch_size=8)
    _save(page_zoo.qwen3_vl(), transformers.Qwen3VLProcessor(reader, tokenizer, videos, TEMPLATE), folder)


def save_vit(folder: Path) -> None:
    reader = transformers.models.vit.ViTImageProcessorPil(size={"height": 32, "width": 32})
    _save(transformers.ViTModel(transformers.ViTConfig(**tiny_parts.VISION), add_pooling_layer=False), reader, folder)


def save_bert(folder: Path) -> None:
    model = transformers.BertModel(transformers.BertConfig(**tiny_parts.TEXT), add_pooling_layer=False)
    _save(model, late.tokenizer(), folder)


def save_embedding_gemma2(folder: Path) -> None:
    """One network whose tokens are averaged."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    names = ("boi", "eoi", "boa", "eoa", "video", "audio")
    others = {58 - place: f"<|{name}|>" for place, name in enumerate(names)}
    named = {f"{name}_token": f"<|{name}|>" for name in ("image", *names)}
    tokenizer = late.tokenizer("<|image|>", others, extra_special_tokens=named)
    reader = Gemma4ImageProcessorPil(patch_size=8, max_soft_tokens=70, pooling_kernel_size=2)
    processor = transformers.EmbeddingGemma2Processor(
        transformers.Gemma4AudioFeatureExtractor(), reader, tokenizer, transformers.EmbeddingGemma2VideoProcessor()
    )
    _save(page_zoo.embedding_gemma2(), processor, folder)


def save_clap(folder: Path) -> None:
    """Two towers, of sounds and of texts."""
    reader = transformers.ClapFeatureExtractor(
        feature_size=32,
        sampling_rate=16_000,
        hop_length=160,
        max_length_s=5,
        fft_window_size=1024,
        frequency_max=8_000,
        nb_max_samples=80_000,
        truncation="rand_trunc",
    )
    _save(time_zoo.clap().eval(), transformers.ClapProcessor(reader, late.tokenizer()), folder)


def save_videoprism(folder: Path) -> None:
    """Two towers, of videos and of texts."""
    reader = transformers.LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32})
    _save(time_zoo.videoprism().eval(), transformers.VideoPrismProcessor(reader, late.tokenizer()), folder)
