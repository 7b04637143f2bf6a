"""Classifiers by the names that a command takes, with the pictures as each wants them.

``timm:NAME``, ``torchvision:NAME`` and ``hf:ID`` are made by those libraries; ``module:function`` is a Python function,
whose code is run. Weights are read from safetensors files only, or by the library from where it keeps them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_m2ib.encoders.naming import call_named, is_function

if TYPE_CHECKING:
    from PIL.Image import Image

LIBRARIES = ("timm", "torchvision", "hf")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIDE = 224


@dataclass(frozen=True)
class Preparation:
    r"""How a picture becomes what a backbone reads: its shorter side resized, its centre cut out, its colours shifted.

    Args:

        side (int, optional): Of the square that is cut out, in pixels. Default: 224
        resized (int, optional): What the picture's shorter side becomes before. Default: None (``side``)
        mean (tuple, optional): Per colour, of 1. Default: ImageNet's
        std (tuple, optional): Per colour. Default: ImageNet's
        filter (str, optional): Of the resizing, ``"bicubic"`` or ``"bilinear"``. Default: ``"bicubic"``
    """

    side: int = _SIDE
    resized: int | None = None
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    filter: str = "bicubic"

    def crop(self, picture: Image) -> Image:
        r"""The part of a picture that the backbone sees.

        Args:

            picture (PIL.Image.Image): In mode RGB.

        Returns:
            PIL.Image.Image: ``side`` x ``side`` pixels.
        """
        from PIL import Image

        short = max(self.resized or 0, self.side)
        # Rounded as torchvision rounds, which timm calls.
        size = [int(short * length / min(picture.size)) for length in picture.size]
        resample = Image.Resampling.BILINEAR if self.filter == "bilinear" else Image.Resampling.BICUBIC
        left, top = (round((length - self.side) / 2) for length in size)
        return picture.resize((size[0], size[1]), resample).crop((left, top, left + self.side, top + self.side))

    def tensor(self, crop: Image) -> Tensor:
        r"""What the backbone reads of a crop.

        Args:

            crop (PIL.Image.Image): From :meth:`crop`.

        Returns:
            Tensor: (3, side, side).
        """
        pixels = torch.from_numpy(np.asarray(crop, dtype=np.float32) / 255).permute(2, 0, 1)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std


@dataclass(frozen=True, eq=False)
class NamedBackbone:
    r"""A classifier with what its pictures need.

    Attributes:

        name (str): As it was asked for.
        module (nn.Module): In eval mode.
        preparation (Preparation): For its pictures.
    """

    name: str
    module: nn.Module
    preparation: Preparation

    def digest(self) -> str:
        r"""What tells the backbone from others: name, preparation and every weight.

        Returns:
            str: hexadecimal.
        """
        found = hashlib.sha256(repr((self.name, self.preparation)).encode())
        for name, tensor in self.module.state_dict().items():
            content = tensor.detach().cpu().contiguous()
            found.update(f"{name} {tuple(content.shape)} {content.dtype}".encode())
            found.update(content.flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:24]


def load_backbone(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    n_classes: int | None = None,
    options: Mapping[str, Any] | None = None,
    side: int | None = None,
) -> NamedBackbone:
    r"""Load or make a classifier.

    Args:

        name (str): ``timm:NAME``, ``torchvision:NAME`` or ``hf:ID``; or ``module:function``, a Python function without
            arguments that returns a module, or a module and a :class:`Preparation`. The module may lie in the working
            directory.
        weights (str or PathLike, optional): Safetensors file of the module's state. Default: None (the library's own,
            which it fetches or finds)
        n_classes (int, optional): Make it with this many outputs and random weights, to be trained; of timm and
            torchvision. Default: None
        options (mapping, optional): Further arguments of the library's constructor. Default: None
        side (int, optional): Of the pictures in pixels. Default: None (the library's)

    Returns:
        NamedBackbone: in eval mode.

    Raises:
        ValueError: if there is no such backbone, an option is not one of its own, or the weights do not fit.
        ImportError: if the library is not installed.
    """
    library, _, rest = name.partition(":")
    makers: dict[str, Callable[..., tuple[nn.Module, Preparation]]] = {
        "timm": _timm,
        "torchvision": _torchvision,
        "hf": _transformers,
    }
    given = dict(options or {})
    if library in makers and rest:
        module, preparation = _made(makers[library], name, rest, weights is None, n_classes, given)
    elif is_function(name):
        module, preparation = _called(name, n_classes, given)
    else:
        raise ValueError(f"--backbone: expected timm:NAME, torchvision:NAME, hf:ID or module:function, got {name!r}.")
    if weights is not None:
        _load_weights(module, weights)
    if side is not None:
        resized = preparation.resized and round(preparation.resized * side / preparation.side)
        preparation = Preparation(side, resized, preparation.mean, preparation.std, preparation.filter)
    return NamedBackbone(name, module.eval(), preparation)


def named_place(layer: str) -> str | tuple[str, int]:
    r"""A layer's name as a command takes it, as :class:`FeatureReader` does.

    Args:

        layer (str): Dotted name; ``NAME:1`` is the second call of a module that is called more than once.

    Returns:
        str or tuple[str, int]: the name, or name and call.
    """
    name, separator, call = layer.rpartition(":")
    return (name, int(call)) if separator and call.isdigit() else layer


def as_arguments(pairs: list[str]) -> dict[str, Any]:
    r"""Arguments of a constructor from ``NAME=VALUE``; values are read as JSON, else as text.

    Args:

        pairs (list[str]): From the command line.

    Returns:
        dict: name to value.

    Raises:
        ValueError: if one is no such pair.
    """
    found = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not (name.isidentifier() and separator):
            raise ValueError(f"--options: expected NAME=VALUE, such as img_size=112, got {pair!r}.")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _made(
    maker: Callable[..., tuple[nn.Module, Preparation]],
    name: str,
    rest: str,
    pretrained: bool,
    n_classes: int | None,
    options: dict[str, Any],
) -> tuple[nn.Module, Preparation]:
    try:
        with torch.random.fork_rng(devices=[]):
            # Where weights are random, they are the same every time.
            torch.manual_seed(0)
            return maker(rest, pretrained and n_classes is None, n_classes, options)
    except ImportError as error:
        library = name.partition(":")[0].replace("hf", "transformers")
        raise ImportError(
            f"--backbone: {name} needs {library} ({error}); install it with: pip install {library}."
        ) from error
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, KeyError) as error:
        # Unknown names, options that a constructor does not take, and weights that cannot be fetched.
        told = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise ValueError(
            f"--backbone: cannot make {name} ({told}); check the name and --options, or give its weights as a "
            "safetensors file with --weights."
        ) from error


def _timm(name: str, pretrained: bool, n_classes: int | None, options: dict[str, Any]) -> tuple[nn.Module, Preparation]:
    import timm

    sized: dict[str, Any] = {} if n_classes is None else {"num_classes": n_classes}
    module = timm.create_model(name, pretrained=pretrained, **sized, **options)
    told = timm.data.resolve_model_data_config(module)
    # Where the model was made for another size than its weights were trained on, its own is what it reads.
    own = getattr(getattr(module, "patch_embed", None), "img_size", None)
    side = int(own[-1] if own else told["input_size"][-1])
    resized = max(int(side / told["crop_pct"]), side)
    kind = "bilinear" if told["interpolation"] == "bilinear" else "bicubic"
    return module, Preparation(side, resized, tuple(told["mean"]), tuple(told["std"]), kind)


def _torchvision(
    name: str, pretrained: bool, n_classes: int | None, options: dict[str, Any]
) -> tuple[nn.Module, Preparation]:
    from torchvision import models

    sized: dict[str, Any] = {} if n_classes is None else {"num_classes": n_classes}
    module = models.get_model(name, weights="DEFAULT" if pretrained else None, **sized, **options)
    told = models.get_model_weights(name).DEFAULT.transforms()
    kind = "bilinear" if told.interpolation.value == "bilinear" else "bicubic"
    return module, Preparation(told.crop_size[0], told.resize_size[0], tuple(told.mean), tuple(told.std), kind)


def _transformers(
    name: str, pretrained: bool, n_classes: int | None, options: dict[str, Any]
) -> tuple[nn.Module, Preparation]:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    if n_classes is not None:
        raise ValueError("models of transformers are not trained here, give timm:NAME or torchvision:NAME")
    module = AutoModelForImageClassification.from_pretrained(name, **options)
    told = AutoImageProcessor.from_pretrained(name)
    size, crop = (dict(getattr(told, key, None) or {}) for key in ("size", "crop_size"))
    resized = int(size.get("shortest_edge") or size.get("height") or _SIDE)
    side = int(crop["height"]) if crop and getattr(told, "do_center_crop", False) else resized
    mean = getattr(told, "image_mean", None) or _MEAN
    std = getattr(told, "image_std", None) or _STD
    kind = "bicubic" if getattr(told, "resample", 3) == 3 else "bilinear"
    return module, Preparation(side, max(resized, side), tuple(mean), tuple(std), kind)


def _called(name: str, n_classes: int | None, options: dict[str, Any]) -> tuple[nn.Module, Preparation]:
    if n_classes is not None or options:
        what = "--options" if n_classes is None else "--train-backbone"
        raise ValueError(f"{what}: {name} is a Python function, which makes its backbone itself; leave it out.")
    made = call_named(name, "--backbone")
    module, preparation = made if isinstance(made, tuple) and len(made) == 2 else (made, Preparation())
    if not isinstance(module, nn.Module) or not isinstance(preparation, Preparation):
        raise ValueError(
            f"--backbone: expected {name} to return a torch module, or one and a "
            f"captum_m2ib.disent.named.Preparation, got "
            f"{type(made).__name__}."
        )
    return module, preparation


def _load_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    from captum_m2ib.disent.storage import read_tensors

    try:
        tensors, _ = read_tensors(path)
    except OSError as error:
        raise ValueError(f"--weights: {str(error).removeprefix('path: ')}") from error
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        told = str(error).splitlines()[-1].strip()
        raise ValueError(f"--weights: {os.fspath(path)} does not fit the backbone ({told[:300]}).") from error
