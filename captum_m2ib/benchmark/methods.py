"""The methods that the benchmarks compare, each by one name: as published, and where it measured best on validation.

A family is a method and the settings that it may be run with; a :class:`Method` is a family with one setting for
pictures and one for captions. ``settings.json`` beside this file holds those that measured best on validation scenes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

from captum.attr import InputXGradient, IntegratedGradients, Saliency

from captum_m2ib.attr import MultiModalInfoBottleneck, registry
from captum_m2ib.benchmark.adapters import (
    Ablation,
    CentrePrior,
    GradCAM,
    Inputs,
    OcclusionWindow,
    OnEmbeddings,
    RandomMap,
)
from captum_m2ib.encoders.dual_encoder import DualEncoder

Setting: TypeAlias = Mapping[str, Any]
"""Options of a method; ``layer`` is the index of a block."""

SETTINGS_FILE = Path(__file__).with_name("settings.json")
MODALITIES = ("image", "text")
OURS = "m2ib"


@dataclass(frozen=True)
class Family:
    r"""A method and the settings it may be run with.

    Attributes:

        name (str): The family's name, and its published method's.
        make (Callable): ``make(encoder, layers=...)``; without layers, those published.
        constructed (tuple[str, ...]): Options that ``make`` takes; all others go to ``attribute``.
        candidates (tuple): For pictures and for captions the settings to choose from on validation, beside the
            published one.
        seeded (bool): Whether ``attribute`` takes a seed.
    """

    name: str
    make: Callable[..., Any]
    constructed: tuple[str, ...] = ()
    candidates: tuple[tuple[Setting, ...], tuple[Setting, ...]] = ((), ())
    seeded: bool = False

    def settings(self, encoder: DualEncoder, modality: int) -> list[Setting]:
        """The published setting and the candidates whose block the tower has."""
        depth = len(_blocks(encoder, modality))
        return [{}, *(one for one in self.candidates[modality] if one.get("layer", 0) < depth)]


@dataclass(frozen=True)
class Method:
    r"""A family with its settings; called with an encoder, it is an attribution method on it.

    Attributes:

        name (str): The name by which it is asked for.
        family (Family): What it runs.
        settings (tuple[Setting, Setting]): For pictures and for captions; empty as published.
        is_floor (bool): Whether it knows nothing of the pair.
    """

    name: str
    family: Family
    settings: tuple[Setting, Setting] = ({}, {})
    is_floor: bool = False

    def __call__(self, encoder: DualEncoder) -> Explainer:
        r"""The method on an encoder.

        Args:

            encoder (DualEncoder): The encoder, with a processor.

        Returns:
            Explainer: its ``attribute`` takes ``inputs``, ``additional_forward_args`` and ``seed``.
        """
        image, text = self.settings
        if _options(image) == _options(text) and ("layer" in image) == ("layer" in text):
            return _Whole(encoder, self.family, self.settings)
        return _PerModality(_Whole(encoder, self.family, (image, image)), _Whole(encoder, self.family, (text, text)))


class Explainer:
    """A method on an encoder; deterministic methods take a seed as well and leave it."""

    forward_func: DualEncoder

    def attribute(self, inputs: Inputs, additional_forward_args: Any = None, seed: int = 0) -> Inputs:
        r"""Maps of the inputs' shapes.

        Args:

            inputs (Tensor or tuple[Tensor, Tensor]): Pixels, or pixels and token ids.
            additional_forward_args (Any, optional): What else the encoder reads, the ids first if they are no input.
            seed (int, optional): Of methods that draw. Default: 0
        """
        raise NotImplementedError


class _Whole(Explainer):
    """One method for both modalities, its options bound."""

    def __init__(self, encoder: DualEncoder, family: Family, settings: tuple[Setting, Setting]) -> None:
        self.forward_func, self.family = encoder, family
        options = _options(settings[0])
        given = {name: options.pop(name) for name in family.constructed if name in options}
        if "layer" in settings[0]:
            given["layers"] = [_block(encoder, index, setting["layer"]) for index, setting in enumerate(settings)]
        self.method, self.options = family.make(encoder, **given), options

    def attribute(self, inputs: Inputs, additional_forward_args: Any = None, seed: int = 0) -> Inputs:
        options = {**self.options, "seed": seed} if self.family.seeded else self.options
        found: Inputs = self.method.attribute(inputs, additional_forward_args=additional_forward_args, **options)
        return found


class _PerModality(Explainer):
    """Pictures' maps from one method and captions' from another, where their options differ."""

    def __init__(self, image: _Whole, text: _Whole) -> None:
        self.forward_func, self.image, self.text = image.forward_func, image, text

    def attribute(self, inputs: Inputs, additional_forward_args: Any = None, seed: int = 0) -> Inputs:
        if not isinstance(inputs, tuple):
            return self.image.attribute(inputs, additional_forward_args, seed)
        additional = additional_forward_args if additional_forward_args is not None else ()
        additional = additional if isinstance(additional, tuple) else (additional,)
        pixels, ids = inputs
        image: Any = self.image.attribute(pixels, (ids, *additional), seed)
        return image, self.text.attribute(inputs, additional_forward_args, seed)[1]


def _options(setting: Setting) -> dict[str, Any]:
    return {name: value for name, value in setting.items() if name != "layer"}


def _blocks(encoder: DualEncoder, modality: int) -> list[Any]:
    return [block for stage in encoder.stages(modality) for block in stage]


def _block(encoder: DualEncoder, modality: int, index: int) -> Any:
    """A block; of a tower that is not asked about and has fewer, its last."""
    blocks = _blocks(encoder, modality)
    return blocks[min(index, len(blocks) - 1)]


def _settings(**choices: tuple[Any, ...]) -> tuple[Setting, ...]:
    """Every combination of the choices."""
    return tuple(dict(zip(choices, values, strict=True)) for values in product(*choices.values()))


def _both(**choices: tuple[Any, ...]) -> tuple[tuple[Setting, ...], tuple[Setting, ...]]:
    """The same candidates for pictures and captions."""
    return _settings(**choices), _settings(**choices)


# Towers that have fewer blocks leave out the rest.
_BLOCKS = tuple(range(12))
_EITHER = (False, True)

# Of this package's own methods those that have something to choose.
_CHOICES = {
    "nib": _both(layer=_BLOCKS, n_steps=(10, 50)),
    "grad-eclip": _both(layer=_BLOCKS),
    "relevance": _both(layer=_BLOCKS),
    "legrad": _both(layer=_BLOCKS),
}

ON_REQUEST = ("m2ib-fine", "m2ib-guided", "m2ib-late", "similarity-map", "rise")
"""Methods that are left out unless they are asked for: variants of ours, what is for late interaction alone, and RISE,
which takes 4000 passes per map."""


def _own(on_request: bool) -> Iterator[Family]:
    """The methods of this package, but for those that are left out, or those."""
    for method in registry.METHODS.values():
        if (method.name in ON_REQUEST) == on_request:
            yield Family(method.name, method.make, (), _CHOICES.get(method.name, ((), ())), method.seeded)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *_own(on_request=False),
        Family("grad-cam", GradCAM, ("relu",), _both(layer=_BLOCKS, relu=_EITHER)),
        Family("saliency", partial(OnEmbeddings, method=Saliency), ("smooth",), (_settings(smooth=(True,)), ())),
        Family(
            "input-x-gradient",
            partial(OnEmbeddings, method=InputXGradient),
            ("magnitude", "smooth"),
            (_settings(magnitude=_EITHER, smooth=_EITHER), _settings(magnitude=(True,))),
        ),
        Family(
            "integrated-gradients",
            partial(OnEmbeddings, method=IntegratedGradients, internal_batch_size=128),
            ("magnitude", "smooth", "silent"),
            (_settings(magnitude=_EITHER, smooth=_EITHER), _settings(magnitude=_EITHER, silent=_EITHER)),
        ),
        Family("feature-ablation", Ablation, ("cell", "smooth"), (_settings(cell=(None, 16), smooth=_EITHER), ())),
        Family("occlusion", OcclusionWindow, ("window", "smooth"), (_settings(window=(1, 2, 3), smooth=_EITHER), ())),
        *_own(on_request=True),
        Family("centre", CentrePrior),
        Family("random", RandomMap, seeded=True),
    )
}

_FLOORS = ("centre", "random")


def _late(encoder: DualEncoder, layers: Any = None) -> MultiModalInfoBottleneck:
    """Ours at the paper's layers, which are late ones."""
    late = encoder.published_layers() if layers is None else layers
    return MultiModalInfoBottleneck(encoder, layers=late, statistics=("pair", "pair"))


_FINE: Setting = {"n_steps": 8, "n_samples": 9}

VARIANTS = (
    Method("m2ib-fine", FAMILIES[OURS], (_FINE, _FINE)),
    Method("m2ib-late", Family("m2ib-late", _late, seeded=True)),
)
"""Ours otherwise than at its defaults: with six times the passes, and behind late blocks instead of at the inputs."""


def tuned_methods(path: str | os.PathLike[str] = SETTINGS_FILE) -> dict[str, Method]:
    r"""Methods at the settings that measured best on validation, each named after its family with ``-tuned``.

    Args:

        path (str or PathLike, optional): A file that ``captum-m2ib benchmark scenes --tune`` wrote. Default: that of
                    the package, chosen on the shipped model

    Returns:
        dict: name to method; without those whose best setting is the published one.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds something else.
    """
    try:
        chosen = json.loads(Path(path).read_text(encoding="utf-8"))
        pairs = {name: tuple(dict(both[modality]) for modality in MODALITIES) for name, both in chosen.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--settings: {os.fspath(path)} holds no settings ({error}); write it with captum-m2ib benchmark scenes "
            "--tune."
        ) from None
    if unknown := sorted(set(pairs) - set(FAMILIES)):
        raise ValueError(f"--settings: {os.fspath(path)} names unknown methods: {', '.join(unknown)}.")
    return {
        f"{name}-tuned": Method(f"{name}-tuned", FAMILIES[name], (image, text))
        for name, (image, text) in pairs.items()
        if image or text
    }


def methods(settings: str | os.PathLike[str] = SETTINGS_FILE) -> dict[str, Method]:
    r"""Every method by its name: ours, each rival as published and tuned, and the floors.

    Args:

        settings (str or PathLike, optional): As for :func:`tuned_methods`.

    Returns:
        dict: in the order of the tables.
    """
    tuned = tuned_methods(settings)
    found: dict[str, Method] = {}
    for name, family in FAMILIES.items():
        found[name] = Method(name, family, is_floor=name in _FLOORS)
        if f"{name}-tuned" in tuned:
            found[f"{name}-tuned"] = tuned[f"{name}-tuned"]
        found |= {method.name: method for method in VARIANTS if name == OURS}
    return found


METHODS: dict[str, Method] = methods()

DEFAULT = tuple(name for name in METHODS if name not in ON_REQUEST)
