"""How disentangled channels are, and how well maps of a grid point: figures for experiments and for users' models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_m2ib.disent._checks import check_count


def mutual_information(values: Tensor, attribute: Tensor, bins: int = 8) -> float:
    r"""Information that a channel's value carries about an attribute, in bits.

    Values are cut at their quantiles; the plug-in estimate is corrected for its bias (Miller and Madow): with K
    occupied cells it is too large by about ``(K_xy - K_x - K_y + 1) / (2 n ln 2)``.

    Args:

        values (Tensor): (n,).
        attribute (Tensor): Classes, int64 (n,).
        bins (int, optional): Most bins; values that repeat (zeros) share one. Default: 8

    Returns:
        float: at least 0.
    """
    check_count("bins", bins, 2)
    if values.shape != attribute.shape or values.ndim != 1 or not len(values):
        raise ValueError(
            f"values, attribute: expected two rows of one length, got {tuple(values.shape)} and "
            f"{tuple(attribute.shape)}."
        )
    values = values.double()
    edges = torch.quantile(values, torch.linspace(0, 1, bins + 1, dtype=values.dtype)[1:-1]).unique()
    joint = torch.zeros(bins, int(attribute.max()) + 1, dtype=torch.float64)
    joint.index_put_((torch.bucketize(values, edges), attribute), torch.ones_like(values), accumulate=True)
    joint /= len(values)
    rows, columns = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    occupied = joint > 0
    plug_in = float((joint * (joint / (rows * columns).clamp(min=1e-300)).clamp(min=1e-300).log2())[occupied].sum())
    cells = int(occupied.sum()) - int((rows > 0).sum()) - int((columns > 0).sum()) + 1
    return max(plug_in - cells / (2 * len(values) * math.log(2)), 0.0)


def entropy(attribute: Tensor) -> float:
    """Entropy of an attribute's distribution, in bits."""
    shares = torch.bincount(attribute).double() / len(attribute)
    return float(-(shares[shares > 0] * shares[shares > 0].log2()).sum())


def attribute_information(evidence: Tensor, attributes: Mapping[str, Tensor]) -> dict[str, float]:
    r"""How much single halves of channels say about attributes, and whether each says it of one attribute only.

    Args:

        evidence (Tensor): Pooled halves, (n, D, 2).
        attributes (mapping): Name to classes, int64 (n,).

    Returns:
        dict: ``information``: bits about the attribute that a half says most of, as a share of that attribute's
        entropy, averaged over halves; ``gap``: by how much that share exceeds the next attribute's, averaged (only with
        two attributes or more). Halves that never vary are left out.
    """
    flat = evidence.flatten(1)
    shares = []
    for column in flat.T[flat.std(0) > 0]:
        shares.append([mutual_information(column, one) / max(entropy(one), 1e-12) for one in attributes.values()])
    if not shares:
        return {"information": 0.0, **({"gap": 0.0} if len(attributes) > 1 else {})}
    ranked = torch.tensor(shares).sort(1, descending=True).values
    found = {"information": float(ranked[:, 0].mean())}
    if len(attributes) > 1:
        found["gap"] = float((ranked[:, 0] - ranked[:, 1]).mean())
    return found


def grad_cam(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    r"""Grad-CAM of a classifier that applies one linear layer to the mean of the positions.

    The gradient of the logit is then ``W_k / L`` at each of L positions, so that the map is ``relu(W_k Z) / L``.

    Args:

        features (Tensor): (N, D, h, w).
        weight (Tensor): (n_classes, D).
        target (Tensor): (N,).

    Returns:
        Tensor: (N, h, w).
    """
    size = features.shape[-2] * features.shape[-1]
    return F.relu(torch.einsum("nc,nchw->nhw", weight[target], features)) / size


@torch.no_grad()
def perturbation_curves(
    classify: Callable[[Tensor], Tensor], images: Tensor, grid: Tensor, target: Tensor, steps: int = 8
) -> tuple[float, float]:
    r"""Areas under the deletion and the insertion curve, cell by cell of a grid.

    Cells are taken in the order of the map, highest first. Deletion replaces them by the picture's mean colour,
    insertion starts from the mean colour and puts them back; the curve is the probability of the target.

    Args:

        classify (Callable): Images to logits, (N, n_classes).
        images (Tensor): (N, C, H, W).
        grid (Tensor): Map, (N, h, w).
        target (Tensor): (N,).
        steps (int, optional): Points of the curves after the first. Default: 8

    Returns:
        tuple[float, float]: mean deletion area (lower is better) and insertion area (higher is better), in [0, 1].
    """
    count, cells = len(images), grid[0].numel()
    rank = grid.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1)
    blank = images.mean((2, 3), keepdim=True).expand_as(images)
    rows = torch.arange(count)
    curves: list[list[Tensor]] = [[], []]
    for step in range(steps + 1):
        taken = (rank < round(cells * step / steps)).unflatten(1, grid.shape[1:]).unsqueeze(1).float()
        mask = F.interpolate(taken, size=images.shape[-2:], mode="nearest").bool()
        for curve, picture in zip(
            curves, (torch.where(mask, blank, images), torch.where(mask, images, blank)), strict=True
        ):
            curve.append(classify(picture).softmax(1)[rows, target])
    deletion, insertion = (float(torch.trapezoid(torch.stack(curve), dx=1 / steps, dim=0).mean()) for curve in curves)
    return deletion, insertion
