"""Files of checkpoint directories as the hub holds them: the families' own tokenizers and processors, tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo
from families import tiny_clip
from safetensors.torch import save_file
from torch import Tensor, nn

FEW = {"n_steps": 2, "n_samples": 2}
LONGEST = 16
CAPTIONS = ["a red cat", "the dog on the mat", "a cat and a dog"]
WORDS = ["a", "red", "cat", "the", "dog", "on", "mat", "and"]
IMAGENET = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.25, 0.2]}
SQUARE = {"height": 32, "width": 32}
CROPPED = {"do_center_crop": True, "size": {"shortest_edge": 40}, "crop_size": SQUARE}


def gradient(width: int, height: int, blue: int) -> np.ndarray:
    """A picture whose red tells the column and whose green tells the row."""
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([columns, rows, np.full_like(rows, blue)], -1).astype(np.uint8)


PICTURES = [gradient(60, 40, 30), gradient(48, 96, 200), gradient(64, 64, 120)]


# Tokenizers, as the files that a checkpoint directory holds.


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def clip_tokenizer(directory: Path) -> None:
    """CLIP's byte pairs; what pads has the id of the end token."""
    ids: dict[str, int] = {}
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        ids.update(dict.fromkeys(pieces, 0))
        while len(pieces) > 1:
            merges.append(f"{pieces[-2]} {pieces[-1]}")
            pieces[-2:] = [pieces[-2] + pieces[-1]]
            ids[pieces[-1]] = 0
    ids = {token: index for index, token in enumerate(ids, 3)} | {"<|startoftext|>": 62, "<|endoftext|>": 63}
    write_json(directory / "vocab.json", ids)
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    end = {"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "model_max_length": 77, **end}
    write_json(directory / "tokenizer_config.json", settings)


def bert_tokenizer(directory: Path, words: Sequence[str] = WORDS) -> None:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (directory / "vocab.txt").write_text("\n".join([*specials, *words]) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    write_json(directory / "tokenizer_config.json", settings)


def gemma_tokenizer(directory: Path) -> None:
    """SigLIP 2's pieces with their spaces; its padding has an id that the model's configuration does not know."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.normalizers import Replace
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "▁"]
    merges = []
    for word in WORDS:
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
        pieces += [*word, *(word[: end + 1] for end in range(len(word))), "▁" + word]
    merges += [("▁", word) for word in WORDS]
    ids = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(BPE(ids, list(dict.fromkeys(merges)), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = Replace(" ", "▁")
    tokenizer.pre_tokenizer = Split(" ", "merged_with_previous")
    tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", ids["<eos>"])])
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    settings = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right", "do_lower_case": True}
    common = {"tokenizer_class": "GemmaTokenizer", "model_input_names": ["input_ids"]}
    write_json(directory / "tokenizer_config.json", {**common, **settings, **names})


def word_tokenizer(directory: Path, specials: Sequence[str], template: str, **settings: Any) -> None:
    """A tokenizer of whole words in a ``tokenizer.json``; special tokens have the first ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    ids = {token: index for index, token in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    used = [(token, ids[token]) for token in template.split() if token in specials]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=used)
    tokenizer.save(str(directory / "tokenizer.json"))
    common = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "padding_side": "right"}
    write_json(directory / "tokenizer_config.json", {**common, **settings})


# SigLIP pads with its end token.
siglip_tokenizer = partial(
    word_tokenizer,
    specials=("<unk>", "</s>"),
    template="$A </s>",
    eos_token="</s>",
    pad_token="</s>",
    model_input_names=["input_ids"],
)
roberta_tokenizer = partial(
    word_tokenizer,
    specials=("<s>", "<pad>", "</s>", "<unk>"),
    template="<s> $A </s>",
    bos_token="<s>",
    eos_token="</s>",
    pad_token="<pad>",
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint directory is made of, and how its first caption is read."""

    name: str
    build: Callable[[], nn.Module]
    tokenizer: Callable[[Path], None]
    processor: dict[str, Any]
    tokens: tuple[str, ...]
    padding: str = "longest"
    captions: list[str] = field(default_factory=lambda: CAPTIONS)
    size: tuple[int, ...] = (32, 32)
    grid: tuple[int, int] = (4, 4)

    def save(self, directory: Path) -> Path:
        self.build().save_pretrained(directory)
        self.tokenizer(directory)
        write_json(directory / "preprocessor_config.json", {**IMAGENET, **self.processor})
        return directory


def of_zoo(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = zoo.encoder_of(zoo.model_named(name)).model
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        for table in tables:
            # Some models are loaded with nothing at the row of padding, whatever the file holds.
            table.weight.data[[] if table.padding_idx is None else table.padding_idx] = 0
        return model

    return build


def processors(image: str, whole: str, **settings: Any) -> dict[str, Any]:
    return {"image_processor_type": image, "processor_class": whole, "do_resize": True, "resample": 3, **settings}


BERT_TOKENS = ("[CLS]", "a", "red", "cat", "[SEP]")
CHINESE = ["一只红猫", "狗在垫子上", "猫和狗"]

CLIP = Checkpoint(
    "clip",
    tiny_clip,
    clip_tokenizer,
    processors("CLIPImageProcessor", "CLIPProcessor", **CROPPED),
    ("<|startoftext|>", "a</w>", "red</w>", "cat</w>", "<|endoftext|>"),
)

VIT = {"layers": 4, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
BLOCKS = {"width": 32, "heads": 2, "layers": 4}


def open_clip_directory(directory: Path, text: dict[str, Any], custom: bool) -> nn.Module:
    """A configuration, weights and what opens the pictures, as open_clip's checkpoints on the hub hold them."""
    import open_clip

    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": {**BLOCKS, **text}}
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**sizes)
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    mean, std = IMAGENET.values()
    opened = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}
    configuration = {"model_cfg": {**sizes, "custom_text": custom}, "preprocess_cfg": opened}
    write_json(directory / "open_clip_config.json", configuration)
    return model.eval()


def standardised(matrix: Tensor) -> Tensor:
    return (matrix - matrix.mean()) / matrix.std()
