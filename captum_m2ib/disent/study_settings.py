"""What a study is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from captum_m2ib.disent._checks import check_choice, check_count, check_number
from captum_m2ib.disent.named import named_place
from captum_m2ib.disent.pooling import ESTIMATORS
from captum_m2ib.disent.scores import MOST_SEEDS


@dataclass(frozen=True)
class StudySettings:
    r"""What a study is asked for.

    Args:

        data (str): See :func:`read_photographs`.
        backbone (str): See :func:`load_backbone`.
        layer (str): Dotted name of the last layer before the backbone pools its positions; ``NAME:1`` for the second
            call of a module that is called more than once.
        weights (str, optional): See :func:`load_backbone`. Default: None
        options (mapping, optional): See :func:`load_backbone`. Default: {}
        side (int, optional): Of the pictures in pixels. Default: None (the backbone's)
        test_share (float, optional): See :func:`read_photographs`. Default: 0.3
        split_seed (int, optional): Of the choice of test pictures. Default: 0
        train_backbone (int, optional): Epochs in which the backbone is trained from nothing on the training pictures;
            0 takes the weights that it comes with. Default: 0
        seeds (int, optional): Fits of each head. Default: 3
        epochs (int, optional): Most epochs of InfoDisent's heads and the probe; they end earlier, when the loss on
            pictures held back from training has stopped falling. Default: 200
        estimator (str, optional): How heads with the bottleneck are trained, see :class:`HeadOptions`; ``"max"`` takes
            less than half of the time of ``"gumbel"``. Default: ``"gumbel"``
        choose (bool, optional): Whether each head's settings are chosen among a few on pictures held back from
            training. Default: False
        epic_epochs (int, optional): Epochs of EPIC. Default: 20
        batch_size (int, optional): Examples per step of InfoDisent's heads. Default: 64
        lr (float, optional): See :class:`FitSettings`. Default: 1e-2
        transform_lr (float, optional): See :class:`FitSettings`. Default: 5e-3

    Raises:
        ValueError: if a number is out of range.
    """

    data: str
    backbone: str
    layer: str
    weights: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    side: int | None = None
    test_share: float = 0.3
    split_seed: int = 0
    train_backbone: int = 0
    seeds: int = 3
    epochs: int = 200
    estimator: str = "gumbel"
    choose: bool = False
    epic_epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-2
    transform_lr: float = 5e-3

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "epic_epochs", "batch_size"):
            check_count(f"--{name.replace('_', '-')}", getattr(self, name))
        check_count("--train-backbone", self.train_backbone, 0)
        check_count("--split-seed", self.split_seed, 0)
        if self.side is not None:
            check_count("--side", self.side)
        check_choice("--estimator", self.estimator, ESTIMATORS)
        check_number("--test-share", self.test_share, high=1.0, above=True)
        check_number("--lr", self.lr, above=True)
        check_number("--transform-lr", self.transform_lr, above=True)
        if self.seeds > MOST_SEEDS:
            raise ValueError(f"--seeds: expected at most {MOST_SEEDS}, got {self.seeds}.")
        if self.train_backbone and self.weights:
            raise ValueError("--train-backbone: starts from nothing; leave out --weights, or this.")

    @property
    def place(self) -> str | tuple[str, int]:
        """The layer as :class:`FeatureReader` takes it."""
        return named_place(self.layer)
