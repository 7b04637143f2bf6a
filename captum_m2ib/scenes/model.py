"""The compact dual encoder: a small CLIP with a tokenizer of whole words, as a transformers checkpoint.

The directory that :func:`save_checkpoint` writes loads with ``CLIPModel.from_pretrained`` and
``AutoProcessor.from_pretrained``, with or without torchvision. Weights are stored in float16; ``config.json``
says float32, which is what they load as.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from captum_m2ib.scenes.captions import vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import CLIPModel

PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<start>", "<end>"
# The position in this tuple is the token's id. The end token must not get id 2: with eos_token_id == 2
# transformers' CLIP takes the text embedding from the position of the highest token id instead of the end
# token's.
SPECIAL_TOKENS = (PAD, UNKNOWN, START, END)


def build_model(
    *,
    image_size: int = 64,
    patch_size: int = 8,
    vision_width: int = 96,
    vision_layers: int = 4,
    vision_heads: int = 4,
    text_width: int = 96,
    text_layers: int = 3,
    text_heads: int = 4,
    projection: int = 96,
    max_length: int = 32,
    seed: int = 0,
) -> CLIPModel:
    """Builds the compact dual encoder with fresh weights.

    Args:
        image_size (int): Side of the pictures in pixels, a multiple of ``patch_size``. Default: 64.
        patch_size (int): Side of a patch in pixels. Default: 8.
        vision_width (int): Channels of the image tower. Default: 96.
        vision_layers (int): Blocks of the image tower. Default: 4.
        vision_heads (int): Attention heads of the image tower. Default: 4.
        text_width (int): Channels of the text tower. Default: 96.
        text_layers (int): Blocks of the text tower. Default: 3.
        text_heads (int): Attention heads of the text tower. Default: 4.
        projection (int): Width of the shared embedding. Default: 96.
        max_length (int): Longest caption in tokens, start and end included. Default: 32.
        seed (int): Seed of the weights; the global random state is untouched. Default: 0.

    Returns:
        transformers.CLIPModel: In training mode, float32, on the CPU.

    Raises:
        ValueError: If ``image_size`` is not a multiple of ``patch_size``.
    """
    from transformers import CLIPConfig, CLIPModel

    if image_size % patch_size:
        raise ValueError(f"image_size: expected a multiple of patch_size {patch_size}, got {image_size}; change one.")
    special = {
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
        "bos_token_id": SPECIAL_TOKENS.index(START),
        "eos_token_id": SPECIAL_TOKENS.index(END),
    }
    config = CLIPConfig(
        text_config={
            "vocab_size": len(SPECIAL_TOKENS) + len(vocabulary()),
            "hidden_act": "gelu",
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width,
            "num_hidden_layers": text_layers,
            "num_attention_heads": text_heads,
            "max_position_embeddings": max_length,
            "projection_dim": projection,
            **special,
        },
        vision_config={
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_act": "gelu",
            "hidden_size": vision_width,
            "intermediate_size": 4 * vision_width,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_heads,
            "projection_dim": projection,
        },
        projection_dim=projection,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(config).train()


def build_tokenizer() -> Tokenizer:
    r"""Builds the tokenizer: lower case, words and punctuation apart, ``<start>`` and ``<end>`` around them.

    Returns:
        tokenizers.Tokenizer: A word-level tokenizer over ``captum_m2ib.scenes.captions.vocabulary``.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, words[START]), (END, words[END])]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def image_side(model: CLIPModel) -> int:
    """Side of the pictures that the model takes, in pixels."""
    config: Any = model.config
    return config.vision_config.image_size


def tokenize(tokenizer: Tokenizer, captions: list[str]) -> torch.Tensor:
    """Turns captions into token ids, padded to the longest.

    Args:
        tokenizer (tokenizers.Tokenizer): From :func:`build_tokenizer`.
        captions (list[str]): n captions, one or more.

    Returns:
        torch.Tensor: int64 (n, longest). No mask is needed: the text tower is causal and padding comes after
        the end token.
    """
    # One by one, because a batch call starts threads inside the tokenizer, which must not exist when workers
    # are forked.
    rows = [tokenizer.encode(caption).ids for caption in captions]
    ids = torch.full((len(rows), max(map(len, rows))), SPECIAL_TOKENS.index(PAD), dtype=torch.int64)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    return ids


def normalize_images(images: torch.Tensor) -> torch.Tensor:
    """Turns uint8 pictures (n, H, W, 3) into the model's pixel values, float32 (n, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def embed_images(model: CLIPModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Unit-length image embeddings: pixel values (n, 3, H, W) -> (n, projection)."""
    pooled = model.vision_model(pixel_values=pixel_values).pooler_output
    return torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)


def embed_texts(model: CLIPModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Unit-length text embeddings: token ids (n, length) -> (n, projection)."""
    pooled = model.text_model(input_ids=input_ids).pooler_output
    return torch.nn.functional.normalize(model.text_projection(pooled), dim=-1)


def save_checkpoint(model: CLIPModel, directory: str | os.PathLike[str]) -> None:
    """Writes model, tokenizer and image processor as an ordinary checkpoint directory.

    Args:
        model (transformers.CLIPModel): From :func:`build_model`.
        directory (str or path): Where to; made if missing.

    Raises:
        ValueError: If a weight is beyond float16's range.
    """
    from safetensors.torch import save_file
    from transformers import PreTrainedTokenizerFast

    folder = Path(directory)
    halves = {name: tensor.detach().cpu().half() for name, tensor in model.state_dict().items()}
    for name, tensor in halves.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"model: expected finite float16 weights, got infinity or NaN in {name}; train it again.")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    # Without it the weights would load in the float16 that they are stored in.
    config.dtype = "float32"
    config.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        pad_token=PAD,
        model_max_length=config.text_config.max_position_embeddings,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    # Releases of transformers write different class names here; this one is known to all of them.
    _edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        processor_class="CLIPProcessor",
    )
    _edit_json(
        folder / "preprocessor_config.json",
        **_image_processor_settings(image_side(model)),
    )


def load_checkpoint(directory: str | os.PathLike[str]) -> tuple[CLIPModel, Any]:
    """Loads a checkpoint directory as any user of transformers would.

    Args:
        directory (str or path): Written by :func:`save_checkpoint`.

    Returns:
        tuple[transformers.CLIPModel, transformers.CLIPProcessor]: The model, in evaluation mode and float32,
            and its processor.

    Raises:
        FileNotFoundError: If the directory holds no checkpoint.
    """
    from transformers import AutoProcessor, CLIPModel

    folder = Path(directory)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"directory: expected a checkpoint with model.safetensors, got {str(folder)!r}; "
            "train one with captum_m2ib.scenes.train(output)."
        )
    return CLIPModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def _image_processor_settings(size: int) -> dict[str, Any]:
    square = {"height": size, "width": size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square,
        "resample": 3,
        "do_center_crop": False,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}, indent=2) + "\n", encoding="utf-8")
