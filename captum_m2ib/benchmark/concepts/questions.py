"""What is asked of a classifier: photographs with masks of what one of its own classes names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_m2ib.benchmark.photos.coco import Photo
from captum_m2ib.benchmark.photos.probes import AREAS
from captum_m2ib.disent.named import NamedBackbone


@dataclass(frozen=True, eq=False)
class Question:
    r"""A photograph, a class of the classifier, and where in the photograph it is.

    Attributes:

        photo (Photo): The photograph.
        name (str): What the data set calls it.
        target (int): The classifier's class.
        image (Tensor): What the classifier reads, (3, side, side).
        mask (Tensor): Boolean, (side, side).
    """

    photo: Photo
    name: str
    target: int
    image: Tensor
    mask: Tensor


def fitting_classes(name: str, classes: Sequence[str]) -> list[int]:
    r"""The classes that a category's name fits.

    Args:

        name (str): As the data set has it.
        classes (sequence of str): The classifier's, each with its synonyms behind commas.

    Returns:
        list[int]: those with a synonym that is the name, or ends in it as a word: "African elephant" is an elephant.
    """
    wanted = name.lower()
    return [
        index
        for index, synonyms in enumerate(classes)
        if any(one.strip() == wanted or one.strip().endswith(f" {wanted}") for one in synonyms.lower().split(","))
    ]


def questions_about(
    photos: Sequence[Photo], backbone: NamedBackbone, classes: Sequence[str], rank: int
) -> list[Question]:
    r"""A question for each category of a photograph that the classifier knows and sees.

    Args:

        photos (sequence of Photo): The photographs.
        backbone (NamedBackbone): The classifier.
        classes (sequence of str): What its outputs are called.
        rank (int): Among how many first classes the best fitting one must be.

    Returns:
        list[Question]: in the order of the photographs. A mask covers 1 to 60 % of what the classifier reads.

    Raises:
        ValueError: if the classes are not one per output.
    """
    found = []
    for photo in photos:
        image = backbone.preparation.tensor(backbone.preparation.crop(photo.picture()))
        with torch.no_grad():
            output = backbone.module(image[None])
        logits = getattr(output, "logits", output)[0]
        if len(logits) != len(classes):
            raise ValueError(
                f"--classes: expected a name for each of the classifier's {len(logits)} outputs, got {len(classes)}."
            )
        for name in photo.outlines:
            fitting = fitting_classes(name, classes)
            drawn = photo.mask(name) if fitting else None
            if drawn is None:
                continue
            target = max(fitting, key=lambda index: float(logits[index]))
            mask = _as_read(drawn, backbone)
            if int((logits >= logits[target]).sum()) <= rank and AREAS[0] <= float(mask.double().mean()) <= AREAS[1]:
                found.append(Question(photo, name, target, image, mask))
    return found


def _as_read(drawn: np.ndarray, backbone: NamedBackbone) -> Tensor:
    """A mask, cut and resized as the picture is."""
    picture = Image.fromarray(drawn.astype(np.uint8) * 255).convert("RGB")
    return torch.from_numpy(np.asarray(backbone.preparation.crop(picture).convert("L")) >= 128)
