"""The compact late-interaction model: a small ColPali with a tokenizer of whole words, as a transformers checkpoint.

The directory that :func:`save_page_model` writes loads with ``DualEncoder.from_pretrained`` as any ColPali does, with
transformers 5.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from captum_m2ib.scenes.pages.drawing import KINDS, SIDE, TEMPLATES

PATCH = 8
PATCHES = (SIDE // PATCH) ** 2
PAD, UNKNOWN, START, IMAGE = "<pad>", "<unk>", "<start>", "<image>"
SPECIAL_TOKENS = (PAD, UNKNOWN, START, IMAGE)
_PROMPT, _PREFIX = "page", ""


def build_page_model(
    *, width: int = 64, vision_layers: int = 3, layers: int = 2, embedding: int = 32, seed: int = 0
) -> Any:
    """Builds the model with fresh weights.

    Args:
        width (int): Channels of both towers, a multiple of 16. Default: 64.
        vision_layers (int): Blocks of the image tower. Default: 3.
        layers (int): Blocks of the language model. Default: 2.
        embedding (int): Width of a token's embedding. Default: 32.
        seed (int): Seed of the weights; the global random state is untouched. Default: 0.

    Returns:
        transformers.ColPaliForRetrieval: In training mode, float32, on the CPU.
    """
    from transformers import ColPaliConfig, ColPaliForRetrieval, PaliGemmaConfig

    words = _words()
    size = {"hidden_size": width, "num_attention_heads": width // 16}
    vision = {
        **size,
        "model_type": "siglip_vision_model",
        "image_size": SIDE,
        "patch_size": PATCH,
        "intermediate_size": 3 * width,
        "num_hidden_layers": vision_layers,
        "vision_use_head": False,
    }
    text = {
        **size,
        "model_type": "gemma",
        "vocab_size": len(words),
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": words[PAD],
        "bos_token_id": words[START],
        "eos_token_id": words[PAD],
    }
    image: dict[str, Any] = {"image_token_id": words[IMAGE]}
    vlm = PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=width, **image)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ColPaliForRetrieval(ColPaliConfig(vlm_config=vlm, embedding_dim=embedding)).train()


def build_page_processor() -> Any:
    """Builds the processor: pages of 96 pixels a side, and lower-case words, one token each.

    Returns:
        transformers.ColPaliProcessor: With the tokenizer and the image processor of the compact model.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import ColPaliProcessor, PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel(_words(), unk_token=UNKNOWN))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=START,
        unk_token=UNKNOWN,
        pad_token=PAD,
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
    )
    return ColPaliProcessor(_image_processor(), tokenizer, visual_prompt_prefix=_PROMPT, query_prefix=_PREFIX)


def save_page_model(model: Any, directory: str | os.PathLike[str]) -> None:
    """Writes model and processor as an ordinary checkpoint directory, weights in float16.

    Args:
        model (transformers.ColPaliForRetrieval): From :func:`build_page_model`.
        directory (str or path): Where to; made if missing.
    """
    folder = Path(directory)
    model.half().save_pretrained(folder)
    model.float()
    # Without it the weights would load in the float16 that they are stored in.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    build_page_processor().save_pretrained(folder)


def page_values(pages: torch.Tensor) -> torch.Tensor:
    """Turns pages, uint8 (N, H, W, 3), into what the model reads, float32 (N, 3, H, W) in [-1, 1]."""
    return pages.permute(0, 3, 1, 2).float() / 127.5 - 1


def _image_processor() -> Any:
    from transformers.models import siglip

    # Of transformers 4 the plain name needs no more than Pillow, of 5 this one.
    kind = getattr(siglip, "SiglipImageProcessorPil", None) or siglip.SiglipImageProcessor
    made: Any = kind(size={"height": SIDE, "width": SIDE}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    made.image_seq_length = PATCHES
    return made


def _words() -> dict[str, int]:
    """Every word that pages and queries are written with, and its id."""
    of_templates = sorted({word for template in TEMPLATES for word in template.split() if word != "{}"} - {_PROMPT})
    return {word: index for index, word in enumerate((*SPECIAL_TOKENS, "\n", _PROMPT, *of_templates, *KINDS))}
