"""Maps against ground truth: does the picture's map fall on the object that the caption names, and do the caption's
bits go to the object that is there?

Image probes name one of two to four objects; the truth is its visible mask. Token probes name one object that is in
the picture and one that is not; the truth is the words of the first. Every figure is a mean over probes with a 95 %
bootstrap interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from captum_m2ib.scenes import ImageProbe, TokenProbe, image_probes, token_probes

Floats = NDArray[np.float64]

_BATCH = 25


@dataclass(frozen=True)
class Estimate:
    """A mean over probes and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pointing_game(bits: Floats, mask: NDArray[np.bool_]) -> float:
    """1 if the map's maximum lies on the mask, 0 if not; ties share their hit."""
    return float(mask[bits == bits.max()].mean())


def relevance_mass(bits: Floats, mask: NDArray[np.bool_]) -> float:
    """Share of the map's positive part that lies on the mask; chance is the mask's area."""
    positive = bits.clip(min=0)
    total = positive.sum()
    return float(positive[mask].sum() / total) if total > 0 else 0.0


def auroc(scores: Floats, labels: NDArray[np.bool_]) -> float:
    """How often a positive unit scores above a negative one, ties counting half (Mann-Whitney)."""
    order = np.sort(scores[~labels])
    positive = scores[labels]
    below, up_to = np.searchsorted(order, positive, "left"), np.searchsorted(order, positive, "right")
    return float((below + up_to).mean() / 2 / len(order))


def bootstrap(values: Sequence[float], draws: int = 10_000, seed: int = 0) -> Estimate:
    """Mean and percentile interval over resampled probes."""
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(array), size=(draws, len(array)))
    low, high = np.quantile(array[picks].mean(1), [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high))


def image_figures(method: Any, probes: Sequence[ImageProbe], **settings: Any) -> dict[str, list[float]]:
    r"""Localisation of image maps, per probe, and how they follow another caption for the same picture.

    Args:

        method (Attribution): The method, on an encoder with a processor.
        probes (sequence of ImageProbe): The probes.
        **settings: Further arguments of ``attribute``.

    Returns:
        dict: per figure one value per probe. ``mass moved`` is the relevance mass that another object gains when the
        caption names it instead; ``pointing, other caption`` the pointing game against that object.
    """
    figures: dict[str, list[float]] = {
        "pointing": [],
        "mass": [],
        "auroc": [],
        "pointing, other caption": [],
        "mass moved": [],
    }
    for part in _batches(probes):
        images = [probe.image for probe in part]
        right = _image_maps(method, images, [probe.caption for probe in part], **settings)
        other = _image_maps(method, images, [probe.wrong_caption for probe in part], **settings)
        for probe, bits, changed in zip(part, right, other, strict=True):
            figures["pointing"].append(pointing_game(bits, probe.mask))
            figures["mass"].append(relevance_mass(bits, probe.mask))
            figures["auroc"].append(auroc(bits.ravel(), probe.mask.ravel()))
            figures["pointing, other caption"].append(pointing_game(changed, probe.wrong_mask))
            moved = relevance_mass(changed, probe.wrong_mask) - relevance_mass(bits, probe.wrong_mask)
            figures["mass moved"].append(moved)
    return figures


def token_figures(method: Any, probes: Sequence[TokenProbe], **settings: Any) -> dict[str, list[float]]:
    r"""Whether the caption's bits go to the words of the object that is in the picture, per probe.

    Args:

        method (Attribution): The method, on an encoder with a processor.
        probes (sequence of TokenProbe): The probes.
        **settings: Further arguments of ``attribute``.

    Returns:
        dict: ``auroc`` and ``top-1`` between the present object's words and the absent one's; ``auroc, all words``
        between the present object's words and every other word of the caption.
    """
    figures: dict[str, list[float]] = {"auroc": [], "top-1": [], "auroc, all words": []}
    for part in _batches(probes):
        pairs = method.forward_func.prepare([p.image for p in part], [p.caption for p in part])
        _, tokens = method.attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args, **settings)
        for probe, row in zip(part, tokens.double().cpu().numpy(), strict=True):
            # Word i is token i + 1: the first token starts the caption.
            words = row[1 : 1 + len(probe.scene.words)]
            named = [*probe.present_words, *probe.absent_words]
            labels = np.array([True, True, False, False])
            figures["auroc"].append(auroc(words[named], labels))
            figures["top-1"].append(float(labels[words[named] == words[named].max()].mean()))
            present = np.isin(np.arange(len(words)), probe.present_words)
            figures["auroc, all words"].append(auroc(words, present))
    return figures


def measure(method: Any, probes: int = 200, seed: int = 0, **settings: Any) -> dict[str, Estimate]:
    r"""All figures of a method on held-out scenes.

    Args:

        method (Attribution): The method, on an encoder trained on scenes.
        probes (int, optional): Image probes, and token probes. Default: 200
        seed (int, optional): Which probes. Default: 0
        **settings: Further arguments of ``attribute``.

    Returns:
        dict: figure name, ``image ...`` or ``text ...``, to :class:`Estimate`. The area of the mask is what pointing
        and mass reach by chance.
    """
    if probes < 1:
        raise ValueError(f"probes: expected at least 1, got {probes}.")
    side = method.forward_func.prepare(image_probes(1, seed)[0].image, "a scene").inputs[0].shape[-1]
    pictures, captions = image_probes(probes, seed, side), token_probes(probes, seed, side)
    figures = {f"image {name}": values for name, values in image_figures(method, pictures, **settings).items()}
    figures["image area of the mask"] = [float(probe.mask.mean()) for probe in pictures]
    figures |= {f"text {name}": values for name, values in token_figures(method, captions, **settings).items()}
    return {name: bootstrap(values) for name, values in figures.items()}


def render(figures: dict[str, Estimate]) -> str:
    """The figures as lines of text."""
    width = max(map(len, figures))
    return "\n".join(f"{name:{width}}  {estimate}" for name, estimate in figures.items())


def _image_maps(method: Any, images: Sequence[np.ndarray], captions: Sequence[str], **settings: Any) -> Floats:
    pairs = method.forward_func.prepare(images, captions)
    pixels, *rest = pairs.inputs
    bits: torch.Tensor = method.attribute(
        pixels, additional_forward_args=(*rest, *pairs.additional_forward_args), **settings
    )
    return bits.sum(1).double().cpu().numpy()


def _batches(probes: Sequence[Any]) -> Iterator[Sequence[Any]]:
    from tqdm.auto import tqdm

    for start in tqdm(range(0, len(probes), _BATCH), desc="Probes", unit="batch", leave=False, disable=None):
        yield probes[start : start + _BATCH]
