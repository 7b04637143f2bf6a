"""How good the compact dual encoder is on held-out scenes: retrieval, and naming one object among others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from captum_m2ib.scenes.drawing import draw_batch
from captum_m2ib.scenes.grounds import TEXTURED
from captum_m2ib.scenes.model import build_tokenizer, embed_images, embed_texts, image_side, normalize_images, tokenize
from captum_m2ib.scenes.probes import naming_trials

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import CLIPModel


def evaluate_retrieval(
    model: CLIPModel,
    *,
    sets: int = 8,
    size: int = 256,
    seed: int = 0,
    purpose: str = "held_out",
    ground: str = TEXTURED,
) -> dict[str, float]:
    r"""How often a picture finds its own caption among those of a set of held-out scenes.

    Args:
        model (transformers.CLIPModel): The compact dual encoder, on any device.
        sets (int): Disjoint sets of scenes. Default: 8.
        size (int): Scenes, and so captions, in a set. Default: 256.
        seed (int): Which held-out scenes. Default: 0.
        purpose (str): Their random stream; training draws from another one. Default: ``"held_out"``.
        ground (str): What the objects lie on, one of ``captum_m2ib.scenes.GROUNDS``. Default: ``"textured"``.

    Returns:
        dict[str, float]: ``top1`` and ``top5``, shares of pictures averaged over the sets; ``top1_std`` and
        ``top5_std``, standard deviations over the sets (0 for one set); ``sets`` and ``size``.
    """
    tokenizer, pixels = build_tokenizer(), image_side(model)
    shares = []
    for index in range(sets):
        images, captions, _ = draw_batch(size, seed, pixels, purpose=purpose, index=index, ground=ground)
        scores = _similarities(model, tokenizer, images, captions)
        better = (scores > scores.diagonal()[:, None]).sum(dim=1)
        shares.append([float((better < k).double().mean()) for k in (1, 5)])
    mean, spread = np.mean(shares, axis=0).tolist(), np.std(shares, axis=0, ddof=min(1, sets - 1)).tolist()
    return {
        "top1": mean[0],
        "top1_std": spread[0],
        "top5": mean[1],
        "top5_std": spread[1],
        "sets": sets,
        "size": size,
    }


def evaluate_naming(model: CLIPModel, n: int = 2048, seed: int = 0, ground: str = TEXTURED) -> dict[str, float]:
    """How often the true one of eight captions of one object scores highest (chance: 1/8).

    Args:
        model (transformers.CLIPModel): The compact dual encoder, on any device.
        n (int): Number of trials (see :func:`captum_m2ib.scenes.naming_trials`). Default: 2048.
        seed (int): Which trials. Default: 0.
        ground (str): What the objects lie on, one of ``captum_m2ib.scenes.GROUNDS``. Default: ``"textured"``.

    Returns:
        dict[str, float]: ``accuracy``, its ``standard_error``, and ``n``.
    """
    tokenizer, chunk, right = build_tokenizer(), 256, 0
    trials = naming_trials(n, seed, image_side(model), ground)
    for start in range(0, n, chunk):
        part = trials[start : start + chunk]
        captions = [caption for trial in part for caption in trial.captions]
        scores = _similarities(model, tokenizer, np.stack([trial.image for trial in part]), captions)
        choices = scores.reshape(len(part), len(part), -1).diagonal(dim1=0, dim2=1).argmax(dim=0)
        right += int((choices == torch.tensor([trial.correct for trial in part])).sum())
    accuracy = right / n
    return {"accuracy": accuracy, "standard_error": math.sqrt(accuracy * (1 - accuracy) / n), "n": n}


@torch.no_grad()
def _similarities(model: CLIPModel, tokenizer: Tokenizer, images: np.ndarray, captions: list[str]) -> torch.Tensor:
    """Cosine similarities of every picture with every caption, on the CPU."""
    device = model.logit_scale.device
    image_embeddings = embed_images(model, normalize_images(torch.from_numpy(images).to(device)))
    text_embeddings = embed_texts(model, tokenize(tokenizer, captions).to(device))
    return (image_embeddings @ text_embeddings.T).cpu()
