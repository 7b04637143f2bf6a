"""The heads: what is trained on top of a frozen backbone, and what every explanation reads.

A head turns features, (N, D, h, w), into channel maps ``K = U (Z - m) / s``, pools their positive and negative halves
to ``p`` and ``n``, and scores classes with ``logits = W (p - n) + b``. Hence the contribution of the positive half of
channel c to class k is ``W_kc p_c``, that of the negative half ``-W_kc n_c``, and they sum to the logit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_m2ib.disent._checks import check_choice, check_count, check_number
from captum_m2ib.disent.pooling import (
    ESTIMATORS,
    POOLINGS,
    location_weights,
    pool_halves,
    sample_location_weights,
)
from captum_m2ib.disent.transform import TRANSFORMS, ChannelTransform

WEIGHTS = ("softplus", "abs", "relu", "signed")
STANDARDISATIONS = ("scale", "centre", "none")


@dataclass(frozen=True)
class HeadOptions:
    r"""How InfoDisent's head is built. The paper's own code was never published: what its text and reviews leave open
    is a choice here, and each says why its default is what it is.

    Args:

        transform (str, optional): Parametrisation of the orthogonal matrix, see :class:`ChannelTransform`. The paper
            names a skew-symmetric matrix, which both ``"cayley"`` and ``"matrix_exp"`` are built on; a step of the
            former costs a fraction. Default: ``"cayley"``
        pooling (str, optional): ``"max"`` is the paper's sparse pooling; ``"mean"`` and ``"top_k"`` are for
            ablations. Default: ``"max"``
        top_k (int, optional): Locations that ``"top_k"`` averages. Default: 3
        estimator (str, optional): How the sparse pooling is trained, see
            ``captum_m2ib.disent.pooling.sample_location_weights``. The paper's
            appendix trains with Gumbel-softmax and its main figure shows the plain maximum; both are here. Other
            poolings ignore it. Default: ``"gumbel"``
        temperature (float, optional): Of the Gumbel-softmax; the paper's is not known, 1 is the usual start.
            Default: 1.0
        noise (float, optional): Scale of the Gumbel noise beside channel maps of unit size. At 1, the textbook
            value, a draw among 64 locations was the maximum that prediction uses in 4 to 7 % of cases and held half of
            its value; at 0.1 in half of the cases and 92 to 97 %. Default: 0.1
        weight (str, optional): What keeps the classifier non-negative: ``"softplus"`` (always a gradient, never
            exactly 0), ``"abs"`` (0 is reachable, and left again), ``"relu"`` (a weight that reaches 0 stays there);
            the paper does not say. ``"signed"`` lifts the constraint, for ablations. Default: ``"softplus"``
        bias (bool, optional): Whether classes have a bias. Without one nothing but evidence in the picture moves a
            logit; the paper does not say. Default: False
        standardise (str, optional): What is done to features before the transform. ``"scale"``: one number makes
            their root mean square 1, which commutes with the transform and gives noise and learning rates the same
            meaning for every backbone. ``"centre"``: the mean of each channel is also taken away, so that both signs
            occur after a ReLU. ``"none"``: as the paper's formulas read. Default: ``"scale"``
        seed (int, optional): Seed of the initial classifier; the global random state is untouched. Default: 0

    Raises:
        ValueError: if a value is not one of these.
    """

    transform: str = "cayley"
    pooling: str = "max"
    top_k: int = 3
    estimator: str = "gumbel"
    temperature: float = 1.0
    noise: float = 0.1
    weight: str = "softplus"
    bias: bool = False
    standardise: str = "scale"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("transform", self.transform, TRANSFORMS)
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("weight", self.weight, WEIGHTS)
        check_choice("standardise", self.standardise, STANDARDISATIONS)
        check_count("top_k", self.top_k)
        check_count("seed", self.seed, 0)
        check_number("temperature", self.temperature, above=True)
        check_number("noise", self.noise)


class ConceptHead(nn.Module):
    r"""What heads share: channel maps, pooling of their halves, and the completeness of contributions.

    Args:

        channels (int): D, the backbone's channels.
        n_classes (int): Number of classes.
        transform (str): Parametrisation of the orthogonal matrix.
        pooling (str): How locations are pooled when predicting.
        top_k (int, optional): For ``pooling="top_k"``. Default: 1
    """

    mean: Tensor
    scale: Tensor
    channels: int
    n_classes: int
    pooling: str
    top_k: int
    transform: ChannelTransform

    def __init__(self, channels: int, n_classes: int, transform: str, pooling: str, top_k: int = 1) -> None:
        super().__init__()
        check_count("n_classes", n_classes)
        self.channels, self.n_classes, self.pooling, self.top_k = channels, int(n_classes), pooling, top_k
        self.transform = ChannelTransform(channels, transform)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(()))

    @property
    def class_weight(self) -> Tensor:
        """W, (n_classes, D): what a unit of pooled channel adds to a logit."""
        raise NotImplementedError

    @property
    def class_bias(self) -> Tensor | None:
        """b, (n_classes,), or None."""
        return None

    def maps(self, features: Tensor) -> Tensor:
        r"""Channel maps K in the new basis.

        Args:

            features (Tensor): (N, D, h, w).

        Returns:
            Tensor: (N, D, h, w).

        Raises:
            ValueError: if the features are not (N, D, h, w) with this head's D.
        """
        if features.ndim != 4 or features.shape[1] != self.channels:
            raise ValueError(
                f"features: expected a tensor of shape (N, {self.channels}, h, w), got {tuple(features.shape)}; take "
                "them from the layer that this head was trained on."
            )
        centred = features.to(self.scale.dtype) - self.mean[:, None, None]
        return self.transform(centred / self.scale)

    def location_weights(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        r"""Weights of the locations for both halves when predicting.

        Args:

            maps (Tensor): Channel maps, (N, D, h, w), as :meth:`maps` returns them.

        Returns:
            tuple[Tensor, Tensor]: of the positive and of the negative half, each (N, D, h w).
        """
        flat = maps.flatten(2)
        return (
            location_weights(flat, self.pooling, self.top_k),
            location_weights(-flat, self.pooling, self.top_k),
        )

    def evidence(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        r"""Pooled halves p and n of the channel maps when predicting.

        Args:

            maps (Tensor): Channel maps, (N, D, h, w), as :meth:`maps` returns them.

        Returns:
            tuple[Tensor, Tensor]: p and n, both non-negative, (N, D).
        """
        return pool_halves(maps.flatten(2), *self.location_weights(maps))

    def classify(self, positive: Tensor, negative: Tensor) -> Tensor:
        r"""Logits of pooled halves.

        Args:

            positive (Tensor): p, (N, D).
            negative (Tensor): n, (N, D).

        Returns:
            Tensor: (N, n_classes).
        """
        return F.linear(positive - negative, self.class_weight, self.class_bias)

    def forward(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        r"""Logits of features.

        Args:

            features (Tensor): (N, D, h, w).
            generator (torch.Generator, optional): Where the noise of training comes from. Default: None

        Returns:
            Tensor: (N, n_classes).
        """
        return self.classify(*self.evidence(self.maps(features)))


class InfoDisentHead(ConceptHead):
    r"""Orthogonal transform, sparse pooling of both halves, non-negative classifier.

    Struski, Rymarczyk and Tabor, "InfoDisent: Explainability of Image Classification Models by Information
    Disentanglement", https://arxiv.org/abs/2409.10329

    Args:

        channels (int): D, the backbone's channels.
        n_classes (int): Number of classes.
        options (HeadOptions, optional): Default: ``HeadOptions()``
    """

    def __init__(self, channels: int, n_classes: int, options: HeadOptions | None = None) -> None:
        options = options or HeadOptions()
        super().__init__(channels, n_classes, options.transform, options.pooling, options.top_k)
        self.options = options
        generator = torch.Generator().manual_seed(options.seed)
        start = torch.randn(n_classes, channels, generator=generator) / channels**0.5
        if options.weight != "signed":
            start = start.abs()
        if options.weight == "softplus":
            start = torch.log(torch.expm1(start.clamp(min=1e-4)))
        self.raw_weight = nn.Parameter(start)
        self.bias = nn.Parameter(torch.zeros(n_classes)) if options.bias else None

    @property
    def class_weight(self) -> Tensor:
        kind = self.options.weight
        if kind == "softplus":
            return F.softplus(self.raw_weight)
        if kind == "abs":
            return self.raw_weight.abs()
        return F.relu(self.raw_weight) if kind == "relu" else self.raw_weight

    @property
    def class_bias(self) -> Tensor | None:
        return self.bias

    def calibrate(self, features: Tensor) -> None:
        r"""Set the standardisation from the training features.

        Args:

            features (Tensor): (n, D, h, w).

        Raises:
            ValueError: if the features are constant, so that nothing can be scaled.
        """
        if self.options.standardise == "none":
            return
        parts, count = features.split(256), features.numel() / self.channels
        mean = torch.stack([part.double().sum((0, 2, 3)) for part in parts]).sum(0) / count
        if self.options.standardise == "scale":
            mean = torch.zeros_like(mean)
        squares = torch.stack([(part.double() - mean[:, None, None]).square().sum() for part in parts]).sum()
        scale = (squares / features.numel()).sqrt()
        if not scale > 0:
            raise ValueError("features: expected features that vary, got a constant; choose another layer.")
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        r"""Logits of features; in training mode the sparse pooling draws its locations.

        Args:

            features (Tensor): (N, D, h, w).
            generator (torch.Generator, optional): Where the noise of training comes from. Default: None

        Returns:
            Tensor: (N, n_classes).
        """
        maps = self.maps(features)
        if not self.training or self.options.pooling != "max":
            return self.classify(*self.evidence(maps))
        flat, options = maps.flatten(2), self.options
        drawn = [
            sample_location_weights(half, options.estimator, options.temperature, options.noise, generator)
            for half in (flat, -flat)
        ]
        return self.classify(*pool_halves(flat, *drawn))
