"""EPIC: the channels of a backbone's own classifier turned towards purity, without changing a single prediction.

A classifier that averages positions and applies one linear layer, ``logits = A mean(Z) + b``, is the same function
after any change of basis of the channels: ``logits = (A U^T) mean(U Z) + b``. EPIC (arXiv 2505.12897) trains only U, so
that at the places where a channel is strongest it holds as much of the vector as possible.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from captum_m2ib.disent.explanations import purity
from captum_m2ib.disent.features import FeatureSet, Loader, unpack
from captum_m2ib.disent.head import ConceptHead
from captum_m2ib.disent.model import ConceptModel
from captum_m2ib.disent.prototypes import find_prototypes
from captum_m2ib.disent.storage import below_prefix, read_tensors, with_prefix, write_tensors
from captum_m2ib.disent.training import FitRecord, FitSettings, fit_head, shuffled
from captum_m2ib.engine.layers import LayerLike, resolve_layer
from captum_m2ib.engine.layouts import PatchLayout

_TOLERANCE = 1e-4


class EPICHead(ConceptHead):
    r"""The backbone's own linear classifier in another basis of the channels; only the basis is trained.

    Args:

        classifier (nn.Linear): The backbone's classifier, copied.
        transform (str, optional): Parametrisation of the orthogonal matrix. Default: ``"matrix_exp"`` (as EPIC's code)
    """

    original: Tensor
    bias: Tensor | None

    def __init__(self, classifier: nn.Linear, transform: str = "matrix_exp") -> None:
        super().__init__(classifier.in_features, classifier.out_features, transform, "mean")
        self.register_buffer("original", classifier.weight.detach().float().clone())
        bias = classifier.bias
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    @property
    def class_weight(self) -> Tensor:
        return self.original @ self.transform.matrix().mT

    @property
    def class_bias(self) -> Tensor | None:
        return self.bias


class EPIC(ConceptModel[EPICHead]):
    r"""EPIC on a classifier that pools by the mean: explanations in purer channels, the predictions untouched.

    "EPIC: Explanation of Pretrained Image Classification Networks via Prototype", AAAI 2026,
    https://arxiv.org/abs/2505.12897

    Args:

        backbone (nn.Module): A classifier, called as ``backbone(images)``; left as found.
        layer (nn.Module, str or tuple): The layer whose positions the classifier averages.
        classifier (nn.Linear or str): The linear layer that reads the average: a module or a dotted name.
        layout (PatchLayout, optional): As for :class:`InfoDisent`. Default: None
        channels_last (bool, optional): As for :class:`InfoDisent`. Default: False
        class_names (sequence of str, optional): Default: None
        transform (str, optional): See :class:`ChannelTransform`. Default: ``"matrix_exp"`` (as EPIC's code)

    Raises:
        TypeError: if the classifier is not a linear layer.

    Examples::

        >>> backbone = nn.Sequential(
        ...     nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
        >>> pictures, labels = torch.randn(12, 3, 16, 16), torch.arange(12) % 3

        >>> model = EPIC(backbone, "1", "4")
        >>> record = model.fit([pictures], epochs=1)
        >>> bool(torch.allclose(model(pictures), backbone(pictures), atol=1e-4))
        True
        >>> len(model.contributions(pictures).top(4)[0])
        4
    """

    def __init__(
        self,
        backbone: nn.Module,
        layer: LayerLike,
        classifier: nn.Linear | str,
        *,
        layout: PatchLayout | None = None,
        channels_last: bool = False,
        class_names: Any = None,
        transform: str = "matrix_exp",
    ) -> None:
        super().__init__(backbone, layer, layout, channels_last, class_names)
        linear = resolve_layer(classifier, backbone).module
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"classifier: expected the nn.Linear that reads the mean of the layer's positions, got "
                f"{type(linear).__name__}; other heads are not the same function after a change of basis, use "
                "InfoDisent for them."
            )
        self._head = EPICHead(linear, transform)
        self.eval()

    def check_lossless(self, images: Tensor) -> float:
        r"""Largest difference between this model's and the backbone's logits, relative to the largest logit.

        Args:

            images (Tensor): (N, C, H, W).

        Returns:
            float: the difference.

        Raises:
            ValueError: if it is above 1e-4: the classifier does not read the mean of this layer's positions.
        """
        with torch.no_grad():
            features, output = self.reader.read(self.reader.place(images))
            logits = getattr(output, "logits", output)
            ours = self.head(features.to(self.head.scale.device)).to(logits.device)
        if ours.shape != logits.shape:
            raise ValueError(
                f"classifier: expected the backbone to return its logits, {tuple(ours.shape)}, got "
                f"{tuple(logits.shape)}; pass the whole classifier as the backbone."
            )
        gap = float((ours - logits).abs().max() / logits.abs().max().clamp(min=1e-12))
        if not gap <= _TOLERANCE:
            raise ValueError(
                f"classifier: expected it to read the mean over positions of layer {self.reader.layer.name!r}, but the "
                f"logits differ by {gap:.1e} of the largest; a norm between them, or pooling by a class token, is not "
                "kept by a change of basis. Choose the layer after the norm, or use InfoDisent."
            )
        return gap

    def fit(
        self,
        loader: Loader,
        *,
        prototypes: tuple[int, int] = (100, 5),
        refresh: int = 2,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = True,
        show_progress: bool = False,
        **settings: Any,
    ) -> FitRecord:
        r"""Turn the channels so that they are purest on their own prototypes; no labels are needed.

        Args:

            loader (iterable): Yields pictures; or a :class:`FeatureSet`. Cached once.
            prototypes (tuple[int, int], optional): Prototypes per channel in the first and in the last epoch, linear
                        between. Default: (100, 5) (as published)
            refresh (int, optional): Epochs between two searches for prototypes. Default: 2 (as published)
            checkpoint, resume, show_progress: As for :meth:`InfoDisent.fit`.
            **settings: See :class:`FitSettings`; here ``epochs`` defaults to 20, ``batch_size`` to 512 and
                        ``transform_lr`` to 1e-3, as published.

        Returns:
            FitRecord: the loss is minus the mean purity.

        Raises:
            ValueError: if the loader is empty, features do not fit, or the classifier is not of the kind that EPIC
                keeps (checked where the loader yields pictures).
        """
        if self.head.transform.kind == "none":
            raise ValueError("transform: expected one that can be trained, got 'none'; make the model with another.")
        numbers = FitSettings(**{"epochs": 20, "batch_size": 512, "transform_lr": 1e-3, "lr": 1e-3, **settings})
        if refresh < 1 or len(prototypes) != 2 or min(prototypes) < 1:
            raise ValueError(
                f"prototypes, refresh: expected two counts and a period of at least 1, got {prototypes!r} and "
                f"{refresh!r}."
            )
        if not isinstance(loader, FeatureSet):
            loader = _Checked(self, loader)
        task = Purity(self, self.collect(loader, show_progress), prototypes, refresh, numbers)
        try:
            return fit_head(self.head, task, numbers, checkpoint=checkpoint, resume=resume, show_progress=show_progress)
        finally:
            self.eval()

    def save(self, path: str | os.PathLike[str]) -> None:
        r"""Write the basis as one safetensors file; load it with :meth:`load_head`.

        Args:

            path (str or PathLike): The file; replaced if it exists.
        """
        write_tensors(path, with_prefix("epic", self.head.state_dict()), {"transform": self.head.transform.kind})

    def load_head(self, path: str | os.PathLike[str]) -> None:
        r"""Read a basis that :meth:`save` wrote for the same classifier.

        Args:

            path (str or PathLike): The file.

        Raises:
            OSError: if the file is missing or damaged.
            ValueError: if it belongs to another classifier or transform.
        """
        tensors, _ = read_tensors(path)
        state = below_prefix("epic", tensors)
        if set(state) != set(self.head.state_dict()) or not torch.equal(state["original"], self.head.original.cpu()):
            raise ValueError(f"path: {os.fspath(path)} was saved for another classifier or transform.")
        self.head.load_state_dict(state)


class _Checked:
    """A loader whose first batch is checked to be classified as the backbone does."""

    def __init__(self, model: EPIC, loader: Iterable[Any]) -> None:
        self.model, self.loader = model, loader

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.loader):
            if index == 0:
                self.model.check_lossless(unpack(batch)[0])
            yield batch


class Purity:
    """Minus the mean purity of channels on their current prototypes."""

    def __init__(
        self, model: EPIC, features: FeatureSet, counts: tuple[int, int], refresh: int, settings: FitSettings
    ) -> None:
        self.model, self.features, self.counts, self.refresh, self.settings = model, features, counts, refresh, settings
        # Which pictures are prototypes of which channels, (n, D).
        self.members = torch.zeros(len(features), model.head.channels, dtype=torch.bool)

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        if epoch % self.refresh == 0:
            self.members = self._search(self._count(epoch))
        rows = self.members.any(1).nonzero().squeeze(1)
        place = self.model.head.scale.device
        for chosen in shuffled(len(rows), self.settings.batch_size, generator):
            picked = rows[chosen]
            yield self.features.features[picked].to(place), self.members[picked].to(place)

    def loss(self, features: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        positive = purity(self.model.head.maps(features))[..., 0]
        return -(positive * targets).sum() / targets.sum()

    def validate(self) -> None:
        return None

    def state(self) -> dict[str, Tensor]:
        return {"members": self.members}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state["members"].shape != self.members.shape:
            raise ValueError(
                f"checkpoint: expected one of {self.members.shape[0]} pictures, got {state['members'].shape[0]}; give "
                "the loader that it was made with, or pass resume=False."
            )
        self.members = state["members"]

    def _count(self, epoch: int) -> int:
        first, last = self.counts
        return round(first + (last - first) * epoch / max(self.settings.epochs - 1, 1))

    def _search(self, count: int) -> Tensor:
        found = find_prototypes(self.model, self.features, min(count, len(self.features)), rank_by="sum").images
        members = torch.zeros_like(self.members)
        channel = torch.arange(members.shape[1])[:, None].expand_as(found[:, 0])
        chosen = found[:, 0] >= 0
        members[found[:, 0][chosen], channel[chosen]] = True
        return members
