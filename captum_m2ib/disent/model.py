"""InfoDisent: a frozen backbone's decision rebuilt from few, local, signed channels (arXiv 2409.10329)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_m2ib.disent.explanations import Contributions, contributions
from captum_m2ib.disent.features import FeatureReader, FeatureSet, Loader, check_labels, unpack
from captum_m2ib.disent.head import ConceptHead, HeadOptions, InfoDisentHead
from captum_m2ib.disent.storage import below_prefix, read_tensors, with_prefix, write_tensors
from captum_m2ib.disent.training import FitRecord, FitSettings, fit_head, shuffled
from captum_m2ib.engine.layers import LayerLike
from captum_m2ib.engine.layouts import PatchLayout

HeadT = TypeVar("HeadT", bound=ConceptHead)
_BATCH = 256
# Enough pictures for one number per channel; more would only cost time.
_CALIBRATION_EXAMPLES = 2048


class ConceptModel(nn.Module, Generic[HeadT]):
    r"""A frozen backbone with a head whose decisions break into channels.

    The backbone is held, not owned: it is no submodule, stays on its device and in its mode, and none of its
    parameters is ever trained. Only the head is.

    Args:

        backbone (nn.Module): Called as ``backbone(images)``.
        layer (nn.Module, str or tuple): The layer whose hidden state is explained.
        layout (PatchLayout, optional): Patch size and prefix tokens of a transformer. Default: None
        channels_last (bool, optional): Maps of four dimensions are (N, h, w, C). Default: False (told from the shape)
        class_names (sequence of str, optional): Default: None (numbers)
    """

    reader: FeatureReader

    def __init__(
        self,
        backbone: nn.Module,
        layer: LayerLike,
        layout: PatchLayout | None = None,
        channels_last: bool = False,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.__dict__["reader"] = FeatureReader(backbone, layer, layout, channels_last)
        self._head: HeadT | None = None
        self.class_names = None if class_names is None else tuple(class_names)

    @property
    def backbone(self) -> nn.Module:
        """The backbone, as it was given."""
        return self.reader.backbone

    @property
    def head(self) -> HeadT:
        """The trained part.

        Raises:
            RuntimeError: if it is not built yet.
        """
        if self._head is None:
            raise RuntimeError("head: not built before the number of channels is known; call fit, or pass channels=.")
        return self._head

    def features(self, images: Tensor, *additional: Any) -> Tensor:
        r"""Features of images at the layer.

        Args:

            images (Tensor): Pictures, (N, C, H, W).
            *additional: Further arguments of the backbone.

        Returns:
            Tensor: (N, D, h, w), on the head's device.
        """
        found = self.reader.read(images, *additional)[0]
        return found if self._head is None else found.to(self._head.scale.device)

    def forward(self, images: Tensor, *additional: Any) -> Tensor:
        r"""Logits of images; gradients reach the images if they require them.

        Args:

            images (Tensor): Pictures, (N, C, H, W).
            *additional: Further arguments of the backbone.

        Returns:
            Tensor: (N, n_classes).
        """
        return self.head(self.features(images, *additional))

    def collect(self, loader: Loader, show_progress: bool = False) -> FeatureSet:
        r"""Features of everything a loader yields, see :meth:`FeatureReader.collect`; feature sets pass through.

        Args:

            loader (iterable or FeatureSet): Yields pictures, or (pictures, labels); or what :meth:`collect` returned.
            show_progress (bool, optional): Show a progress bar. Default: False

        Returns:
            FeatureSet: features, (n, D, h, w), with the labels where there are any.
        """
        return loader if isinstance(loader, FeatureSet) else self.reader.collect(loader, show_progress)

    def contributions(
        self, images: Tensor, target: Any = None, *additional: Any, contrast: bool = False
    ) -> Contributions:
        r"""Contributions to the target's logits, see :func:`contributions`.

        Args:

            images (Tensor): Pictures, (N, C, H, W).
            target (int, Tensor or list, optional): Class per example. Default: None (the predicted class)
            *additional: Further arguments of the backbone.
            contrast (bool, optional): Explain how far the target's logit is above the mean of all logits. Default:
                False

        Returns:
            Contributions: detached.

        Raises:
            ValueError: if a target is not a class of the head, or there is not one per example.
        """
        with torch.no_grad():
            features = self.features(images, *additional)
        return contributions(self.head, features, target, contrast)

    @torch.no_grad()
    def predict(self, loader: Loader) -> Tensor:
        r"""Logits of everything a loader yields, or of a feature set.

        Args:

            loader (iterable or FeatureSet): Yields pictures, or (pictures, labels); or what :meth:`collect` returned.

        Returns:
            Tensor: (n, n_classes), on the CPU.
        """
        return torch.cat([self.head.classify(*halves).cpu() for halves in self._evidence(self.collect(loader))])

    @torch.no_grad()
    def evidence(self, loader: Loader) -> Tensor:
        r"""Pooled halves of everything a loader yields, or of a feature set.

        Args:

            loader (iterable or FeatureSet): Yields pictures, or (pictures, labels); or what :meth:`collect` returned.

        Returns:
            Tensor: (n, D, 2), positive and negative halves.
        """
        return torch.cat([torch.stack(halves, -1).cpu() for halves in self._evidence(self.collect(loader))])

    def name_of(self, index: int) -> str:
        r"""What a class is called.

        Args:

            index (int): The class.

        Returns:
            str: its name, or "class" and its index where there are no names.
        """
        return f"class {index}" if self.class_names is None else self.class_names[index]

    def _evidence(self, features: FeatureSet) -> Iterator[tuple[Tensor, Tensor]]:
        for part in features.batches(_BATCH):
            yield self.head.evidence(self.head.maps(part.to(self.head.scale.device)))


class InfoDisent(ConceptModel[InfoDisentHead]):
    r"""InfoDisent on a frozen backbone.

    An orthogonal transform turns the channels of a layer, sparse pooling keeps of every channel its most positive and
    its most negative location, and a classifier with non-negative weights adds them up. A decision is then a short
    list of channels, each with a sign, a place and an exact share of the logit.

    Struski, Rymarczyk and Tabor, "InfoDisent: Explainability of Image Classification Models by Information
    Disentanglement", https://arxiv.org/abs/2409.10329

    Args:

        backbone (nn.Module): Any classifier or trunk of torch, timm or transformers, called as ``backbone(images)``.
                    It is left as found: mode, ``requires_grad``, hooks.
        layer (nn.Module, str or tuple): The layer whose hidden state is disentangled, (N, C, h, w) or (N, tokens, C):
                    the last before the backbone pools positions. A module, a dotted name, or (layer, index of the
                    call).
        n_classes (int): Number of classes.
        channels (int, optional): Channels of the layer. Default: None (known when the first features are seen)
        layout (PatchLayout, optional): Patch size and prefix tokens of a transformer, where they cannot be derived.
                    Prefix tokens are dropped, as they have no place in the picture. Default: None
        channels_last (bool, optional): Maps of four dimensions are (N, h, w, C). Default: False (told from the shape)
        class_names (sequence of str, optional): One per class. Default: None
        **options: See :class:`HeadOptions`, which gives the reason for every default.

    Raises:
        ValueError: if an option is unknown to it, the layer is not found, or names and classes differ in number.

    Examples::

        >>> from captum_m2ib.disent import InfoDisentAttribution
        >>> backbone = nn.Sequential(
        ...     nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
        >>> pictures, labels = torch.randn(12, 3, 16, 16), torch.arange(12) % 3

        >>> model = InfoDisent(backbone, "1", n_classes=3)
        >>> record = model.fit([(pictures, labels)], epochs=2)
        >>> model.contributions(pictures).top(5)[0]  # doctest: +ELLIPSIS
        [Half(channel=...
        >>> InfoDisentAttribution(model).attribute(pictures).shape
        torch.Size([12, 3, 16, 16])
    """

    def __init__(
        self,
        backbone: nn.Module,
        layer: LayerLike,
        n_classes: int,
        *,
        channels: int | None = None,
        layout: PatchLayout | None = None,
        channels_last: bool = False,
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(backbone, layer, layout, channels_last, class_names)
        unknown = sorted(set(options) - set(HeadOptions.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"{unknown[0]}: not an option of InfoDisent; expected one of "
                f"{', '.join(HeadOptions.__dataclass_fields__)}."
            )
        self.options = HeadOptions(**options)
        self.n_classes = n_classes
        if self.class_names is not None and len(self.class_names) != n_classes:
            raise ValueError(f"class_names: expected {n_classes}, one per class, got {len(self.class_names)}.")
        if channels is not None:
            self._build(channels)
        self.eval()

    def fit(
        self,
        loader: Loader,
        validation: Loader | None = None,
        *,
        cache: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = True,
        show_progress: bool = False,
        **settings: Any,
    ) -> FitRecord:
        r"""Train the head; the backbone stays frozen.

        Args:

            loader (iterable): Yields (images, labels); or a :class:`FeatureSet` with labels. Labels are classes or
                        probabilities of classes (to learn from another model's predictions).
            validation (iterable, optional): The same, for early stopping. Default: None (``validation_share`` of the
                        cached examples; with ``cache=False`` nothing, so that all epochs are run)
            cache (bool, optional): Run the backbone once per picture and train on what it gave: the cheap way, in
                        which random augmentations are fixed at their first draw. False runs it in every epoch, on
                        batches as the loader makes them. Default: True
            checkpoint (str or PathLike, optional): Safetensors file that holds the state after every epoch; it is
                        replaced in one step, so that an interrupted fit leaves the last one intact. Default: None
            resume (bool, optional): Go on from the checkpoint if there is one. With ``cache=False`` the loader's own
                        random state is not part of it. Default: True
            show_progress (bool, optional): Default: False
            **settings: See :class:`FitSettings`.

        Returns:
            FitRecord: losses per epoch and which epoch was kept.

        Raises:
            ValueError: if the loader is empty, features are of the wrong shape, NaN or infinite, labels do not fit
                ``n_classes``, or a setting is out of range.
            FloatingPointError: if the loss is not finite.
        """
        unknown = sorted(set(settings) - set(FitSettings.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"{unknown[0]}: not a setting of fit; expected one of {', '.join(FitSettings.__dataclass_fields__)}."
            )
        numbers = FitSettings(**settings)
        held_out = None if validation is None else self._labelled(self.collect(validation, show_progress))
        task: Supervised
        if cache or isinstance(loader, FeatureSet):
            kept = self._labelled(self.collect(loader, show_progress))
            if held_out is None:
                kept, held_out = hold_out(kept, numbers.validation_share, numbers.seed)
            first, source = kept, _Kept(kept, numbers.batch_size)
            task = Supervised(self, source, held_out, numbers)
        else:
            first = self._labelled(self.collect(_beginning(loader), show_progress))
            task = Supervised(self, _Live(self, loader), held_out, numbers)
        self._prepare(first)
        try:
            return fit_head(self.head, task, numbers, checkpoint=checkpoint, resume=resume, show_progress=show_progress)
        finally:
            self.eval()

    def save(self, path: str | os.PathLike[str]) -> None:
        r"""Write head, options and names as one safetensors file; the backbone is not part of it.

        Args:

            path (str or PathLike): The file; replaced if it exists.
        """
        metadata = {
            "options": asdict(self.options),
            "layer": self.reader.layer.name,
            "call": self.reader.layer.call,
            "n_classes": self.n_classes,
            "channels": self.head.channels,
            "class_names": self.class_names,
        }
        write_tensors(path, with_prefix("head", self.head.state_dict()), metadata)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backbone: nn.Module,
        *,
        layout: PatchLayout | None = None,
        channels_last: bool = False,
    ) -> InfoDisent:
        r"""Read what :meth:`save` wrote, for the same backbone.

        Args:

            path (str or PathLike): The file.
            backbone (nn.Module): The backbone that the head was trained on.
            layout, channels_last: As for :class:`InfoDisent`, as when it was made.

        Returns:
            InfoDisent: ready to predict.

        Raises:
            OSError: if the file is missing or damaged, or is not one of these.
            ValueError: if the backbone has no layer of the name.
        """
        tensors, metadata = read_tensors(path)
        if not {"options", "layer", "n_classes", "channels"} <= set(metadata):
            raise OSError(
                f"path: {os.fspath(path)} holds no InfoDisent head; expected a file that InfoDisent.save wrote."
            )
        layer = metadata["layer"] if metadata["call"] is None else (metadata["layer"], metadata["call"])
        model = cls(
            backbone,
            layer,
            metadata["n_classes"],
            channels=metadata["channels"],
            layout=layout,
            channels_last=channels_last,
            class_names=metadata["class_names"],
            **metadata["options"],
        )
        model.head.load_state_dict(below_prefix("head", tensors))
        return model

    def _build(self, channels: int) -> None:
        self._head = InfoDisentHead(channels, self.n_classes, self.options).eval()

    def _prepare(self, first: FeatureSet) -> None:
        channels = first.features.shape[1]
        if self._head is None:
            self._build(channels)
        if self.head.channels != channels:
            raise ValueError(
                f"channels: expected features of {self.head.channels} channels, got {channels} at layer "
                f"{self.reader.layer.name!r}; pass the layer's own number, or leave channels out."
            )
        self.head.calibrate(first.features)

    def _labelled(self, features: FeatureSet) -> FeatureSet:
        labels = check_labels(features.labels, self.n_classes, len(features))
        return FeatureSet(features.features, labels, features.ids, features.size)


class _Kept:
    """Batches of cached features in random order."""

    def __init__(self, features: FeatureSet, batch_size: int) -> None:
        self.features, self.batch_size = features, batch_size

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.features.labels is not None
        for rows in shuffled(len(self.features), self.batch_size, generator):
            yield self.features.features[rows], self.features.labels[rows]


class _Live:
    """Batches as a loader makes them, through the backbone anew in every epoch."""

    def __init__(self, model: InfoDisent, loader: Iterable[Any]) -> None:
        self.model, self.loader = model, loader

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            images, labels, _ = unpack(batch)
            with torch.no_grad():
                features = self.model.reader.read(self.model.reader.place(images))[0]
            yield features, check_labels(labels, self.model.n_classes, len(images))


class Supervised:
    """Cross entropy against labels, with an optional price on the classifier's weights."""

    def __init__(
        self, model: InfoDisent, source: _Kept | _Live, held_out: FeatureSet | None, settings: FitSettings
    ) -> None:
        self.model, self.source, self.held_out, self.settings = model, source, held_out, settings

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        place = self.model.head.scale.device
        for features, labels in self.source.batches(generator):
            yield features.to(place), labels.to(place)

    def loss(self, features: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        head, settings = self.model.head, self.settings
        loss = F.cross_entropy(head(features, generator), targets, label_smoothing=settings.label_smoothing)
        return loss + settings.sparsity * head.class_weight.abs().mean() if settings.sparsity else loss

    def validate(self) -> float | None:
        if self.held_out is None:
            return None
        assert self.held_out.labels is not None
        return float(F.cross_entropy(self.model.predict(self.held_out), self.held_out.labels))

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing is remembered."""


def hold_out(features: FeatureSet, share: float, seed: int) -> tuple[FeatureSet, FeatureSet | None]:
    r"""Split off what :meth:`InfoDisent.fit` validates on; pictures that occur more than once stay on one side.

    Args:

        features (FeatureSet): Of the training pictures.
        share (float): See :class:`FitSettings`.
        seed (int): Of the choice.

    Returns:
        tuple: what is trained on, and what is held out, or None where that would be nothing or everything.
    """
    if not round(len(features) * share):
        return features, None
    ids = torch.arange(len(features)) if features.ids is None else features.ids
    kinds = ids.unique()
    order = kinds[torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed))]
    chosen = torch.isin(ids, order[: max(1, round(len(kinds) * share))])
    if bool(chosen.all()):
        return features, None
    return features.subset(~chosen), features.subset(chosen)


def _beginning(loader: Iterable[Any]) -> Iterator[Any]:
    """The first batches, enough to standardise by."""
    seen = 0
    for batch in loader:
        yield batch
        seen += len(unpack(batch)[0])
        if seen >= _CALIBRATION_EXAMPLES:
            return
