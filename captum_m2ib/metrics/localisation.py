r"""Does the map fall where the truth is? Maps against masks, boxes or word labels.

Every function takes maps, (N, H, W), (N, C, H, W) with channels summed, or (N, L) for tokens, and the truth as a
boolean tensor of the maps' shape without channels, and returns one value per example in float64. ``valid`` says which
units count at all: pass it for tokens, so that padding and special tokens are neither found nor missed. With the set S
of true units among the U valid ones and the map A:

=========================== ========================================== ====================
metric                      formula                                    chance
=========================== ========================================== ====================
:func:`pointing_game`       1[argmax A in S]                           \|S\| / U
:func:`relevance_mass`      sum of A over S / sum of A                 \|S\| / U
:func:`relevance_rank`      \|top-\|S\|(A) and S\| / \|S\|             \|S\| / U
:func:`top_k`               \|top-k(A) and S\| / k                     \|S\| / U
:func:`iou`                 \|(A >= t) and S\| / \|(A >= t) or S\|     depends on t
:func:`auroc`               P(A in S > A outside), ties half           1/2
:func:`average_precision`   sum of precision times gain in recall      near \|S\| / U
=========================== ========================================== ====================

An empty S, or a map with a value among the valid units that is not finite, has no value: see ``nan_policy``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_m2ib.metrics._examples import (
    NanPolicy,
    at_least,
    finite_maps,
    importance_ranks,
    mean_ranks,
    min_max,
    one_of,
    optional_module,
    settle,
    unit_flags,
    unit_maps,
)

Ties = Literal["expectation", "random"]
BoxFormat = Literal["xyxy", "xywh"]


class BestIoU(NamedTuple):
    r"""The highest IoU over all thresholds.

    Attributes:

        iou (Tensor): (N,), in [0, 1].
        threshold (Tensor): (N,), the value of the map that reaches it.
    """

    iou: Tensor
    threshold: Tensor


class _Truth(NamedTuple):
    """Flat maps (N, U), true units, valid units, and why examples have no value."""

    maps: Tensor
    masks: Tensor
    valid: Tensor
    undefined: dict[str, Tensor]


def boxes_to_masks(
    boxes: Sequence[Tensor | Sequence[Sequence[float]]], size: tuple[int, int], box_format: BoxFormat = "xyxy"
) -> Tensor:
    r"""The union of each example's boxes as a mask.

    Args:

        boxes (sequence): Per example its boxes, (K, 4), in pixels of the map: left, top, right, bottom, or left, top,
                    width, height. An example may have none.
        size (tuple[int, int]): Height and width of the map.
        box_format (str, optional): ``"xyxy"`` or ``"xywh"``. Default: "xyxy"

    Returns:
        Tensor: boolean, (N, H, W). A pixel belongs to a box if its centre does, so whole-numbered boxes include their
        left and top and exclude their right and bottom edge. What reaches beyond the picture is cut.

    Raises:
        ValueError: if a box is not four finite numbers, or has no width or height.

    Examples::

        >>> boxes_to_masks([[[1, 0, 3, 1]]], (2, 4)).int()
        tensor([[[0, 1, 1, 0],
                 [0, 0, 0, 0]]], dtype=torch.int32)
    """
    one_of("box_format", box_format, BoxFormat)
    rows, columns = (torch.arange(side, dtype=torch.float64) + 0.5 for side in size)
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for index, given in enumerate(boxes):
        corners = torch.as_tensor(given, dtype=torch.float64).cpu()
        if not corners.numel():
            continue
        if corners.ndim != 2 or corners.shape[1] != 4 or not bool(corners.isfinite().all()):
            raise ValueError(
                f"boxes[{index}]: expected four finite numbers per box, (K, 4), got {given!r} of shape "
                f"{tuple(corners.shape)}."
            )
        if box_format == "xywh":
            corners = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1)
        for left, top, right, bottom in corners.tolist():
            if right <= left or bottom <= top:
                raise ValueError(
                    f"boxes[{index}]: expected right > left and bottom > top, got {(left, top, right, bottom)}; is the "
                    "format xywh?"
                )
            inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
            masks[index] |= inside
    return masks


def pointing_game(
    attributions: Tensor,
    masks: Tensor,
    tolerance: float = 0.0,
    ties: Ties = "expectation",
    seed: int = 0,
    valid: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    r"""Whether the map's maximum lies on the truth (Zhang et al., "Top-down Neural Attention by Excitation Backprop").

    Args:

        attributions (Tensor): Maps, (N, H, W), (N, C, H, W) or (N, L).
        masks (Tensor): Boolean, (N, H, W) or (N, L).
        tolerance (float, optional): A hit within this many pixels of the truth, between centres, counts too; the
                    original allows 15. Pictures only. Default: 0.0
        ties (str, optional): Where several units share the maximum, ``"expectation"`` returns the share of them that
                    hits, ``"random"`` the hit of one drawn at random. Default: "expectation"
        seed (int, optional): Of the draw. Default: 0
        valid (Tensor, optional): Boolean, as ``masks``: units that count. Default: None (all)
        nan_policy (str, optional): What becomes of examples with an empty mask or a map that is not finite:
                    ``"propagate"``, ``"omit"`` (with a warning that counts them) or ``"raise"``.
                    Default: "propagate"

    Returns:
        Tensor: (N,), in [0, 1]. A constant map is at chance: the share of the units that the truth covers.

    Raises:
        ValueError: if shapes do not fit, or by the NaN policy.

    Examples::

        >>> maps, truth = torch.tensor([[0.1, 0.5, 0.3, 0.1]]), torch.tensor([[False, True, False, True]])
        >>> pointing_game(maps, truth)
        tensor([1.], dtype=torch.float64)
    """
    at_least("tolerance", tolerance, 0)
    truth = _truth(attributions, masks, valid)
    if tolerance > 0:
        if masks.ndim != 3:
            raise ValueError(f"tolerance: expected pictures, masks of shape (N, H, W), got {tuple(masks.shape)}.")
        near = _dilated(truth.masks.view(masks.shape), tolerance).flatten(1)
        truth = truth._replace(masks=near & truth.valid)
    share = _top_share(truth, torch.ones_like(truth.valid[:, 0], dtype=torch.long), ties, seed)
    return settle((share,), truth.undefined, nan_policy)[0]


def top_k(
    attributions: Tensor,
    masks: Tensor,
    k: int,
    ties: Ties = "expectation",
    seed: int = 0,
    valid: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    r"""Share of the map's k highest units that are true (top-k intersection, precision at k).

    Args:

        attributions, masks, ties, seed, valid: As for :func:`pointing_game`; ties concern the k-th place.
        k (int): How many units, at least 1.
        nan_policy (str, optional): As for :func:`pointing_game`; examples with fewer than k valid units have no value
                    either. Default: "propagate"

    Returns:
        Tensor: (N,), in [0, 1].

    Raises:
        ValueError: if shapes do not fit, or by the NaN policy.

    Examples::

        >>> maps, truth = torch.tensor([[0.1, 0.5, 0.3, 0.1]]), torch.tensor([[False, True, False, True]])
        >>> top_k(maps, truth, k=2)
        tensor([0.5000], dtype=torch.float64)
    """
    at_least("k", k, 1)
    truth = _truth(attributions, masks, valid)
    short = truth.valid.sum(1) < k
    share = _top_share(truth, torch.full_like(short, k, dtype=torch.long), ties, seed)
    return settle((share,), {**truth.undefined, f"fewer than {k} units": short}, nan_policy)[0]


def relevance_rank(
    attributions: Tensor,
    masks: Tensor,
    ties: Ties = "expectation",
    seed: int = 0,
    valid: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    r"""Relevance rank accuracy (Arras et al., CLEVR-XAI): share of the truth among as many of the highest units.

    Args:

        attributions, masks, ties, seed, valid, nan_policy: As for :func:`pointing_game`; ties concern the last place.

    Returns:
        Tensor: (N,), in [0, 1].

    Raises:
        ValueError: if shapes do not fit, or by the NaN policy.

    Examples::

        >>> maps, truth = torch.tensor([[0.1, 0.5, 0.3, 0.1]]), torch.tensor([[False, True, False, True]])
        >>> relevance_rank(maps, truth)
        tensor([0.5000], dtype=torch.float64)
    """
    truth = _truth(attributions, masks, valid)
    share = _top_share(truth, truth.masks.sum(1).clamp(min=1), ties, seed)
    return settle((share,), truth.undefined, nan_policy)[0]


def relevance_mass(
    attributions: Tensor, masks: Tensor, valid: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    r"""Energy pointing game, relevance mass accuracy: the truth's share of the map's positive sum.

    Wang et al., "Score-CAM", and Arras et al., CLEVR-XAI. Negative values are taken as 0, so that the share stays a
    share for signed maps.

    Args:

        attributions, masks, valid, nan_policy: As for :func:`pointing_game`.

    Returns:
        Tensor: (N,), in [0, 1]. A map without a positive value holds no mass anywhere: 0, so that a method gains
        nothing by returning nothing.

    Raises:
        ValueError: if shapes do not fit, or by the NaN policy.

    Examples::

        >>> maps, truth = torch.tensor([[0.1, 0.5, 0.3, 0.1]]), torch.tensor([[False, True, False, True]])
        >>> relevance_mass(maps, truth)
        tensor([0.6000], dtype=torch.float64)
    """
    truth = _truth(attributions, masks, valid)
    positive = truth.maps.clamp(min=0) * truth.valid
    # Scaled by the maximum first: the sum of tiny values would be lost, that of huge ones infinite.
    positive = positive / positive.amax(1, keepdim=True).clamp(min=torch.finfo(positive.dtype).tiny)
    total = positive.sum(1)
    mass = (positive * truth.masks).sum(1) / torch.where(total > 0, total, 1.0)
    return settle((mass,), truth.undefined, nan_policy)[0]


def iou(
    attributions: Tensor,
    masks: Tensor,
    threshold: float = 0.5,
    normalise: bool = True,
    valid: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    r"""Intersection over union of the truth and the units whose value reaches a threshold.

    Args:

        attributions, masks, valid, nan_policy: As for :func:`pointing_game`.
        threshold (float, optional): Units of at least this value are selected. Default: 0.5
        normalise (bool, optional): Scale each map to [0, 1] by its minimum and maximum over valid units first, so that
                    threshold 0 selects everything and 1 the maximum; False compares the map's own values, in bits.
                    Default: True

    Returns:
        Tensor: (N,), in [0, 1]. A constant map cannot be scaled and selects everything.

    Raises:
        ValueError: if shapes do not fit, or by the NaN policy.

    Examples::

        >>> maps, truth = torch.tensor([[0.1, 0.5, 0.3, 0.1]]), torch.tensor([[False, True, False, True]])
        >>> iou(maps, truth, 0.3)
        tensor([0.3333], dtype=torch.float64)
    """
    truth = _truth(attributions, masks, valid)
    maps = truth.maps
    if normalise:
        maps, constant = min_max(maps, truth.valid)
        maps = torch.where(constant[:, None], torch.inf, maps)
    chosen = (maps >= threshold) & truth.valid
    overlap = (chosen & truth.masks).sum(1).double()
    union = (chosen | truth.masks).sum(1).clamp(min=1)
    return settle((overlap / union,), truth.undefined, nan_policy)[0]


def best_iou(
    attributions: Tensor, masks: Tensor, valid: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> BestIoU:
    r"""The highest intersection over union that any threshold of the map reaches, per example.

    The threshold is chosen by looking at the truth: an upper bound, not what a fixed threshold would reach.

    Args:

        attributions, masks, valid, nan_policy: As for :func:`pointing_game`.

    Returns:
        BestIoU: the value, (N,), in [0, 1], and the threshold, (N,), in the map's own units: units of at least this
        value are selected; the highest such threshold where several are equally good.

    Raises:
        ValueError: if shapes do not fit, or by the NaN policy.

    Examples::

        >>> maps, truth = torch.tensor([[0.1, 0.5, 0.3, 0.1]]), torch.tensor([[False, True, False, True]])
        >>> best_iou(maps, truth).iou
        tensor([0.5000], dtype=torch.float64)
    """
    truth = _truth(attributions, masks, valid)
    values, order = truth.maps.masked_fill(~truth.valid, -torch.inf).sort(1, descending=True)
    hits = truth.masks.gather(1, order).cumsum(1).double()
    chosen = torch.arange(1, values.shape[1] + 1, device=values.device)
    ratio = hits / (chosen + truth.masks.sum(1, keepdim=True) - hits)
    # A threshold takes all units of one value or none, so only the last of equal values can end a selection.
    ends = F.pad(values[:, 1:] < values[:, :-1], (0, 1), value=True) & truth.valid.gather(1, order)
    best, at = ratio.masked_fill(~ends, -1.0).max(1)
    thresholds = values.gather(1, at[:, None]).squeeze(1)
    return BestIoU(*settle((best, thresholds), truth.undefined, nan_policy))


def auroc(
    attributions: Tensor, masks: Tensor, valid: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    r"""Area under the ROC curve with units as samples: how often a true unit's value is above another's, ties half.

    Computed from the ranks of the true units (Mann and Whitney, 1947), all examples at once.

    Args:

        attributions, masks, valid, nan_policy: As for :func:`pointing_game`; examples where every unit is true have no
            value either.

    Returns:
        Tensor: (N,), in [0, 1]; 0.5 for a constant map.

    Raises:
        ValueError: if shapes do not fit, or by the NaN policy.

    Examples::

        >>> maps, truth = torch.tensor([[0.1, 0.5, 0.3, 0.1]]), torch.tensor([[False, True, False, True]])
        >>> auroc(maps, truth)
        tensor([0.6250], dtype=torch.float64)
    """
    truth = _truth(attributions, masks, valid)
    true, others = truth.masks.sum(1).double(), (truth.valid & ~truth.masks).sum(1)
    # Units that do not count take the lowest ranks, so they lift every other rank by their number.
    ranks = mean_ranks(truth.maps.masked_fill(~truth.valid, -torch.inf)) - (~truth.valid).sum(1, keepdim=True)
    wins = (ranks * truth.masks).sum(1) - true * (true + 1) / 2
    undefined = {**truth.undefined, "mask that covers all": (others == 0) & (true > 0)}
    return settle((wins / (true * others).clamp(min=1),), undefined, nan_policy)[0]


def average_precision(
    attributions: Tensor, masks: Tensor, valid: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    r"""Average precision with units as samples: precision at each threshold, weighted by what it adds to the recall.

    Needs scikit-learn (``captum_m2ib[metrics]``).

    Args:

        attributions, masks, valid, nan_policy: As for :func:`pointing_game`.

    Returns:
        Tensor: (N,), in [0, 1]; the truth's share of the units for a constant map.

    Raises:
        ValueError: if shapes do not fit, or by the NaN policy.
        ImportError: if scikit-learn is missing.

    Examples::

        >>> maps, truth = torch.tensor([[0.1, 0.5, 0.3, 0.1]]), torch.tensor([[False, True, False, True]])
        >>> average_precision(maps, truth)
        tensor([0.7500], dtype=torch.float64)
    """
    score = optional_module("sklearn.metrics", "average_precision").average_precision_score
    truth = _truth(attributions, masks, valid)
    lost = torch.stack(list(truth.undefined.values())).any(0)
    values = [
        float("nan") if skip else float(score(labels[counted].cpu().numpy(), units[counted].cpu().numpy()))
        for units, labels, counted, skip in zip(truth.maps, truth.masks, truth.valid, lost.tolist(), strict=True)
    ]
    found = torch.tensor(values, dtype=torch.float64, device=truth.maps.device)
    return settle((found,), truth.undefined, nan_policy)[0]


def _truth(attributions: Tensor, masks: Any, valid: Tensor | None) -> _Truth:
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.ndim < 2 or not len(masks):
        got = f"{masks.dtype} of shape {tuple(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(f"masks: expected a boolean tensor, (N, H, W) or (N, L), N at least 1, got {got}.")
    maps = unit_maps(attributions, masks.shape, "masks")
    counted = unit_flags("valid", valid, masks.shape, maps.device)
    flat, broken = finite_maps(maps, counted)
    labels = masks.to(maps.device).flatten(1) & counted
    return _Truth(flat, labels, counted, {"empty mask": ~labels.any(1), "map that is not finite": broken})


def _dilated(masks: Tensor, tolerance: float) -> Tensor:
    reach = math.floor(tolerance)
    offsets = torch.arange(-reach, reach + 1, device=masks.device)
    disc = (offsets[:, None] ** 2 + offsets**2 <= tolerance**2).float()[None, None]
    return F.conv2d(masks.unsqueeze(1).float(), disc, padding=reach).squeeze(1) > 0.5


def _top_share(truth: _Truth, k: Tensor, ties: Ties, seed: int) -> Tensor:
    """Share of true units among the k highest valid ones, (N,); k is (N,)."""
    one_of("ties", ties, Ties)
    if ties == "random":
        first = importance_ranks(truth.maps, "morf", seed, truth.valid) < k[:, None]
        return (first & truth.masks).sum(1).double() / k
    values = truth.maps.masked_fill(~truth.valid, -torch.inf)
    last_place = (k - 1).clamp(max=values.shape[1] - 1)[:, None]
    level = values.sort(1, descending=True).values.gather(1, last_place)
    above, tied = values > level, values == level
    places = k - above.sum(1)
    shared = (tied & truth.masks).sum(1) / tied.sum(1).double()
    return ((above & truth.masks).sum(1) + places * shared) / k
