"""The heads that a study compares: how each is built, fitted to convergence, and its settings chosen on validation.

Every fit holds back a share of the training pictures. Its rates are cut when the loss on these stops falling, and the
fit ends when that does not help; test pictures are never looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from captum_m2ib.disent.features import FeatureReader, FeatureSet
from captum_m2ib.disent.head import HeadOptions
from captum_m2ib.disent.model import InfoDisent
from captum_m2ib.disent.training import FitRecord

_POOLED = {"pooling": "mean"}
HEADS: dict[str, dict[str, Any]] = {
    "linear probe": {"transform": "none", "weight": "signed", "bias": True, **_POOLED},
    "infodisent": {},
    "epic": {},
    "no bottleneck": _POOLED,
    "no transform": {"transform": "none"},
}
"""Each head with its options of InfoDisent; the last two leave out one part of it."""

CANDIDATES: dict[str, dict[str, Any]] = {
    "as given": {},
    "a third of the rates": {"lr": 1 / 3, "transform_lr": 1 / 3},
    "three times the noise": {"noise": 0.3},
    "the plain maximum": {"estimator": "max"},
    "soft places": {"estimator": "gumbel_soft", "noise": 0.0},
    "a price on weights": {"sparsity": 3.0},
}
"""What :func:`choose` tries, one change at a time; rates are factors of those given."""

_RATES = ("lr", "transform_lr")
_OF_PLACES = ("estimator", "noise")
_TRIED_FOR = 30


@dataclass(frozen=True)
class Rates:
    r"""What every fit of a study is given.

    Args:

        epochs (int): At most.
        batch_size (int): Examples per step.
        lr (float): Of the classifier.
        transform_lr (float): Of the transform.
        patience (int, optional): See :class:`FitSettings`. Default: 10
        cuts (int, optional): See :class:`FitSettings`. Default: 1
        validation_share (float, optional): See :class:`FitSettings`. Default: 0.15
    """

    epochs: int
    batch_size: int
    lr: float
    transform_lr: float
    patience: int = 10
    cuts: int = 1
    validation_share: float = 0.15

    def settings(self, change: Mapping[str, Any]) -> dict[str, Any]:
        r"""Keyword arguments of :meth:`InfoDisent.fit`.

        Args:

            change (mapping): One of :data:`CANDIDATES`.

        Returns:
            dict: by name.
        """
        given = dict(vars(self))
        for name, value in change.items():
            if name in _RATES:
                given[name] *= value
            elif name not in HeadOptions.__dataclass_fields__:
                given[name] = value
        return given


def candidates_for(name: str) -> dict[str, dict[str, Any]]:
    r"""The candidates that can differ for a head.

    Args:

        name (str): One of :data:`HEADS`.

    Returns:
        dict: name to change; places are drawn by heads with the bottleneck alone, and only weights that are all of
        one sign are priced.
    """
    options = HEADS[name]
    left_out = set(_OF_PLACES) if options.get("pooling") == "mean" else set()
    left_out |= {"sparsity"} if options.get("weight") == "signed" else set()
    return {told: change for told, change in CANDIDATES.items() if not left_out & set(change)}


def fit_head_of(
    name: str,
    change: Mapping[str, Any],
    build: Callable[..., InfoDisent],
    train: FeatureSet,
    rates: Rates,
    seed: int,
    checkpoint: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> tuple[InfoDisent, FitRecord]:
    r"""Fit one of InfoDisent's heads.

    Args:

        name (str): One of :data:`HEADS`, but not EPIC.
        change (mapping): One of :data:`CANDIDATES`.
        build (Callable): From options of InfoDisent to a model that is not fitted.
        train (FeatureSet): Of the training pictures, with labels.
        rates (Rates): What every fit is given.
        seed (int): Of weights, order, noise, and what is held back.
        checkpoint (str or PathLike, optional): See :meth:`InfoDisent.fit`. Default: None
        show_progress (bool, optional): Default: False

    Returns:
        tuple: the model, and what its fit did.
    """
    options = {key: value for key, value in change.items() if key in HeadOptions.__dataclass_fields__}
    model = build(seed=seed, **HEADS[name], **options)
    # A mean does not ask where; of means alone, heads that pool by it learn the same in a fraction of the time.
    learnt = averaged(train) if HEADS[name].get("pooling") == "mean" else train
    record = model.fit(learnt, seed=seed, checkpoint=checkpoint, show_progress=show_progress, **rates.settings(change))
    return model, record


def choose(
    name: str, build: Callable[..., InfoDisent], train: FeatureSet, rates: Rates, show_progress: bool = False
) -> dict[str, Any]:
    r"""The candidate with the lowest loss on the pictures that a fit of seed 0 holds back, after 30 epochs at most.

    Args:

        name (str): One of :data:`HEADS`, but not EPIC.
        build (Callable): As for :func:`fit_head_of`.
        train (FeatureSet): Of the training pictures, with labels.
        rates (Rates): What every fit is given.
        show_progress (bool, optional): Default: False

    Returns:
        dict: ``chosen``, its name, and ``losses``, name to loss.
    """
    losses, short = {}, replace(rates, epochs=min(rates.epochs, _TRIED_FOR))
    for told, change in candidates_for(name).items():
        _, record = fit_head_of(name, change, build, train, short, 0, show_progress=show_progress)
        losses[told] = min(record.validation_loss or record.loss)
    return {"chosen": min(losses, key=lambda told: losses[told]), "losses": losses}


def averaged(features: FeatureSet) -> FeatureSet:
    r"""The mean over positions, as a grid of one cell.

    Args:

        features (FeatureSet): (n, D, h, w).

    Returns:
        FeatureSet: (n, D, 1, 1).
    """
    return FeatureSet(features.features.mean((2, 3), keepdim=True), features.labels, features.ids, features.size)


class Grid(nn.Module):
    r"""A backbone up to a layer, as a module of its own.

    Args:

        reader (FeatureReader): Of the backbone, at the layer.
    """

    reader: FeatureReader

    def __init__(self, reader: FeatureReader) -> None:
        super().__init__()
        self.trunk = reader.backbone
        self.__dict__["reader"] = reader

    def forward(self, images: Tensor) -> Tensor:
        """Features, (N, D, h, w)."""
        features: Tensor = self.reader.read(images)[0]
        return features


class Probed(nn.Module):
    r"""A frozen backbone with a linear layer on the mean of a layer's positions.

    Args:

        reader (FeatureReader): Of the backbone, at the layer.
        linear (nn.Linear): From channels to classes.
    """

    def __init__(self, reader: FeatureReader, linear: nn.Linear) -> None:
        super().__init__()
        self.grid, self.linear = Grid(reader), linear

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (N, classes)."""
        logits: Tensor = self.linear(self.grid(images).mean((2, 3)))
        return logits
