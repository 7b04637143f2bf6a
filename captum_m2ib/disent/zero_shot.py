"""InfoDisent on the image tower of a dual encoder: classes are captions, and channels are named by captions.

A dual encoder sorts pictures into classes that are only written down: by the cosine similarity between a picture and
a caption per class. InfoDisent learns those decisions from the tower's patches, without labels, and each half of each
channel is then named by the caption whose similarity follows it most closely over a set of pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_m2ib.disent._checks import check_count, check_number
from captum_m2ib.disent.features import FeatureSet, Loader, unpack
from captum_m2ib.disent.model import ConceptModel, InfoDisent
from captum_m2ib.disent.training import FitRecord
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layers import LayerLike, resolve_for
from captum_m2ib.engine.layouts import PatchLayout

_CLIP_SCALE = 100.0


class ZeroShotInfoDisent(InfoDisent):
    r"""InfoDisent that learns a dual encoder's zero-shot decisions from the patches of its image tower.

    Args:

        encoder (DualEncoder): The dual encoder; left as found.
        captions (sequence of str): One per class.
        layer (nn.Module, str or tuple, optional): The layer of the image tower. Default: None (the block at three
                    quarters of its depth: after the last one, patches that the tower does not pool mean nothing)
        logit_scale (float, optional): Inverse temperature of the encoder's decisions. Default: None (the model's own,
                    else 100 as CLIP's)
        class_names (sequence of str, optional): Default: None (the captions)
        **options: See :class:`HeadOptions`.

    Raises:
        ValueError: if there are no captions, the encoder has no processor, or the tower has no blocks to choose from.

    Examples::

        >>> model = ZeroShotInfoDisent(encoder, ["a red star", "a blue ring"])
        >>> record = model.fit([pairs.inputs[0].repeat(8, 1, 1, 1)], epochs=2)  # pictures only
        >>> model.predict([pairs.inputs[0]]).shape
        torch.Size([2, 2])
    """

    encoder: DualEncoder

    def __init__(
        self,
        encoder: DualEncoder,
        captions: Sequence[str],
        layer: LayerLike | None = None,
        *,
        logit_scale: float | None = None,
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        names = _check_captions(captions)
        if logit_scale is not None:
            check_number("logit_scale", logit_scale, above=True)
        found = resolve_for(encoder, encoder.published_layers()[0] if layer is None else layer)
        layout = encoder.layouts[0]
        super().__init__(
            _ImageSide(encoder),
            found.module if found.call is None else (found.module, found.call),
            len(names),
            layout=layout if isinstance(layout, PatchLayout) else None,
            class_names=names if class_names is None else class_names,
            **options,
        )
        # Held, not owned, as the backbone is.
        self.__dict__["encoder"] = encoder
        self.captions = names
        self.logit_scale = _scale_of(encoder) if logit_scale is None else float(logit_scale)

    def labelled(self, loader: Loader, show_progress: bool = False) -> FeatureSet:
        r"""Features of pictures, labelled with the encoder's probabilities of the classes.

        Args:

            loader (iterable): Yields pictures, (N, C, H, W), alone or first in a tuple.
            show_progress (bool, optional): Default: False

        Returns:
            FeatureSet: for :meth:`fit`; its labels are float, (n, classes).

        Raises:
            ValueError: if given features, which hold no pictures to ask the encoder about.
        """
        if isinstance(loader, FeatureSet):
            raise ValueError("loader: expected pictures, which the encoder must see; got features.")
        batches = list(loader)
        features = self.collect(batches, show_progress)
        found = similarities(self.encoder, batches, self.captions)
        return FeatureSet(features.features, (self.logit_scale * found).softmax(1), features.ids, features.size)

    def fit(self, loader: Loader, *args: Any, **settings: Any) -> FitRecord:
        r"""Learn the encoder's decisions: as :meth:`InfoDisent.fit`, from pictures alone.

        Args:

            loader (iterable): Yields pictures; or what :meth:`labelled` made of them.
            \*args, \*\*settings: As for :meth:`InfoDisent.fit`.

        Returns:
            FitRecord: as of :meth:`InfoDisent.fit`.
        """
        given = loader if isinstance(loader, FeatureSet) else self.labelled(loader)
        return super().fit(given, *args, **settings)


@dataclass(frozen=True)
class ConceptNames:
    r"""The captions that follow each half of each channel most closely.

    Attributes:

        captions (tuple[str, ...]): The candidates.
        best (Tensor): Per half the positions of its closest captions, closest first, int64 (D, 2, m).
        correlation (Tensor): Pearson correlation of each over the pictures, (D, 2, m); 0 for halves that never vary.
    """

    captions: tuple[str, ...]
    best: Tensor
    correlation: Tensor

    def of(self, channel: int, sign: int) -> list[tuple[str, float]]:
        r"""Captions of a half with their correlations, closest first.

        Args:

            channel (int): The channel.
            sign (int): 1 for its positive half, -1 for the negative.

        Returns:
            list[tuple[str, float]]: caption and correlation.

        Raises:
            ValueError: if ``sign`` is neither.
        """
        if sign not in (1, -1):
            raise ValueError(f"sign: expected 1 or -1, got {sign!r}.")
        side = 0 if sign == 1 else 1
        pairs = zip(self.best[channel, side].tolist(), self.correlation[channel, side].tolist(), strict=True)
        return [(self.captions[index], value) for index, value in pairs]


def name_concepts(
    model: ConceptModel[Any], encoder: DualEncoder, loader: Iterable[Any], captions: Sequence[str], per_half: int = 3
) -> ConceptNames:
    r"""Name each half of each channel by the captions whose similarity follows it over pictures.

    Args:

        model (InfoDisent or EPIC): Trained, on any backbone that sees the same pictures as the encoder.
        encoder (DualEncoder): Judges captions against pictures.
        loader (iterable): Yields pictures, (N, C, H, W), prepared for both.
        captions (sequence of str): Candidates.
        per_half (int, optional): Names per half, at most as many as captions. Default: 3

    Returns:
        ConceptNames: names and how closely they follow.

    Raises:
        ValueError: if there are no captions, or fewer than two pictures.
    """
    names = _check_captions(captions)
    check_count("per_half", per_half)
    batches = list(loader)
    evidence = model.evidence(batches)
    if len(evidence) < 2:
        raise ValueError(f"loader: expected at least 2 pictures to correlate over, got {len(evidence)}.")
    return closest(correlations(evidence, similarities(encoder, batches, names)), names, per_half)


def correlations(evidence: Tensor, scores: Tensor) -> Tensor:
    r"""How closely captions follow halves over pictures.

    Args:

        evidence (Tensor): Pooled halves, (n, D, 2), as :meth:`ConceptModel.evidence` gives them, or flat.
        scores (Tensor): Similarity of each picture with each caption, (n, captions).

    Returns:
        Tensor: Pearson correlations, (2 D, captions); 0 for what never varies.
    """
    halves = evidence.double().flatten(1)
    return _standardised(halves).T @ _standardised(scores.double()) / len(scores)


def closest(correlation: Tensor, captions: Sequence[str], per_half: int = 3) -> ConceptNames:
    r"""Name each half by the captions that follow it most closely.

    Args:

        correlation (Tensor): From :func:`correlations`.
        captions (sequence of str): The captions.
        per_half (int, optional): Names per half, at most as many as captions. Default: 3

    Returns:
        ConceptNames: names and how closely they follow.
    """
    top = correlation.float().topk(min(per_half, len(captions)), 1)
    shape = (-1, 2, top.indices.shape[1])
    return ConceptNames(tuple(captions), top.indices.view(shape), top.values.view(shape))


def similarities(
    encoder: DualEncoder, loader: Iterable[Any], captions: Sequence[str], show_progress: bool = False
) -> Tensor:
    r"""Cosine similarity of every picture with every caption, each embedded once.

    Args:

        encoder (DualEncoder): With a processor.
        loader (iterable): Yields pictures as the encoder takes them.
        captions (sequence of str): Captions.
        show_progress (bool, optional): Default: False

    Returns:
        Tensor: (n, captions), on the CPU.

    Raises:
        ValueError: if the encoder has no processor or the loader is empty.
    """
    names, rows = _check_captions(captions), []
    with borrowing(encoder), torch.no_grad():
        texts = caption_embeddings(encoder, names)
        for batch in tqdm(loader, desc="Similarities", unit="batch", disable=not show_progress):
            images = unpack(batch)[0].to(encoder.device)
            rows.append((_unit(_embed_images(encoder, images)) @ texts.T).cpu())
    if not rows:
        raise ValueError("loader: expected at least one batch, got none.")
    return torch.cat(rows)


def caption_embeddings(encoder: DualEncoder, captions: Sequence[str]) -> Tensor:
    r"""Embeddings of captions, of length 1.

    Args:

        encoder (DualEncoder): With a processor.
        captions (sequence of str): Captions.

    Returns:
        Tensor: (captions, dimensions).
    """
    with borrowing(encoder), torch.no_grad():
        return _unit(_embed_captions(encoder, captions))


class _ImageSide(nn.Module):
    """The image side of a dual encoder as a backbone: pictures to embeddings."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.training = encoder.training

    def forward(self, images: Tensor) -> Tensor:
        return _embed_images(self.encoder, images)


def _embed_images(encoder: DualEncoder, images: Tensor) -> Tensor:
    model: Any = encoder._modules.get("model")
    if model is None:
        return _embedding(encoder.image_tower(images))
    if hasattr(model, "get_image_features"):
        return _embedding(model.get_image_features(pixel_values=images))
    return _embedding(model.encode_image(images))


def _embed_captions(encoder: DualEncoder, captions: Sequence[str]) -> Tensor:
    # The encoder pads captions as its model was trained; the picture beside them is not looked at.
    pairs = encoder.prepare(np.zeros((64, 64, 3), dtype=np.uint8), list(captions))
    ids, mask = pairs.inputs[1], pairs.additional_forward_args[:1]
    model: Any = encoder._modules.get("model")
    if model is None:
        return _embedding(encoder.text_tower(ids, *mask))
    if hasattr(model, "get_text_features"):
        named = {"attention_mask": mask[0]} if mask else {}
        return _embedding(model.get_text_features(input_ids=ids, **named))
    return _embedding(model.encode_text(ids))


def _embedding(output: Any) -> Tensor:
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        if isinstance(output, Tensor):
            break
        output = getattr(output, name, output)
    if not isinstance(output, Tensor):
        raise TypeError(f"encoder: expected its towers to return embeddings, got {type(output).__name__}.")
    return output.float()


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1)


def _standardised(columns: Tensor) -> Tensor:
    """Columns of mean 0 and variance 1; those that never vary become 0."""
    centred = columns - columns.mean(0)
    scale = centred.square().mean(0).sqrt()
    return torch.where(scale > 1e-12, centred / scale.clamp(min=1e-12), 0.0)


def _scale_of(encoder: DualEncoder) -> float:
    scale = getattr(encoder._modules.get("model"), "logit_scale", None)
    return float(scale.detach().exp()) if isinstance(scale, Tensor) and scale.numel() == 1 else _CLIP_SCALE


def _check_captions(captions: Sequence[str]) -> tuple[str, ...]:
    if isinstance(captions, str) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"captions: expected a sequence of captions, at least one, got {captions!r}.")
    return tuple(captions)
