"""Backbones trained from random weights on a set of photographs, where no weights are to be had."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_m2ib.disent.backbones import train_classifier
from captum_m2ib.disent.named import NamedBackbone, Preparation
from captum_m2ib.disent.photographs import TRAIN, PhotographSet
from captum_m2ib.disent.storage import read_tensors, write_tensors

_LR = 1e-3
_LABEL_SMOOTHING = 0.1
_LEAST_PART = 0.6


def trained_backbone(
    backbone: NamedBackbone,
    photographs: PhotographSet,
    epochs: int,
    path: str | os.PathLike[str],
    show_progress: bool = False,
) -> NamedBackbone:
    r"""Train a backbone in place, or read what an earlier call trained.

    Args:

        backbone (NamedBackbone): With one output per class and random weights.
        photographs (PhotographSet): Its training pictures are learnt from; those that cannot be read are left out.
        epochs (int): Passes over them.
        path (str or PathLike): Safetensors file for the weights.
        show_progress (bool, optional): Default: False

    Returns:
        NamedBackbone: the same, in eval mode.

    Raises:
        ValueError: if not one training picture can be read.
        OSError: if the file is damaged.
    """
    key = {"epochs": epochs, "photographs": photographs.digest(), "made": backbone.digest()}
    if Path(path).is_file():
        tensors, metadata = read_tensors(path)
        if metadata == key:
            backbone.module.load_state_dict(tensors)
            return backbone
    pictures, labels = _training_pictures(backbone.preparation, photographs)

    def loss_of(output: Any, rows: Tensor) -> Tensor:
        return F.cross_entropy(output, labels[rows], label_smoothing=_LABEL_SMOOTHING)

    def varied(images: Tensor, random: torch.Generator) -> Tensor:
        return _varied(images, random, backbone.preparation)

    train_classifier(backbone.module, pictures, loss_of, 0, epochs, lr=_LR, varied=varied, show_progress=show_progress)
    write_tensors(path, backbone.module.state_dict(), key)
    return backbone


def _training_pictures(preparation: Preparation, photographs: PhotographSet) -> tuple[Tensor, Tensor]:
    """Crops as bytes, (n, 3, side, side), and their labels."""
    crops, labels = [], []
    for place in photographs.of(TRAIN):
        try:
            crop = preparation.crop(photographs.picture(place))
        except ValueError:
            # Told of when its features are read.
            continue
        pixels = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8)
        crops.append(pixels.view(crop.height, crop.width, 3).permute(2, 0, 1))
        labels.append(photographs.photographs[place].label)
    if not crops:
        raise ValueError("--data: not one training picture can be read.")
    return torch.stack(crops), torch.tensor(labels)


def _varied(images: Tensor, random: torch.Generator, preparation: Preparation) -> Tensor:
    """A part of the pictures at full size, and about every second one mirrored."""
    side = images.shape[-1]
    part = int(torch.randint(max(int(_LEAST_PART * side), 1), side + 1, (), generator=random))
    top, left = torch.randint(0, side - part + 1, (2,), generator=random).tolist()
    cut = images[..., top : top + part, left : left + part].float() / 255
    cut = F.interpolate(cut, size=(side, side), mode="bilinear")
    mirrored = torch.rand(len(images), generator=random) < 0.5
    cut[mirrored] = cut[mirrored].flip(-1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preparation.mean, preparation.std))
    return (cut - mean) / std
