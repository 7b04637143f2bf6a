"""How alike two batches of maps are, example by example: what sanity checks compare maps with.

Every function takes two tensors of one shape, (N, ...), and returns (N,). A constant or non-finite map has no
similarity: the value is NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_m2ib.metrics._examples import mean_ranks, min_max

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def pearson(first: Tensor, second: Tensor) -> Tensor:
    r"""Pearson's correlation of two maps.

    Args:

        first (Tensor): Maps, (N, ...).
        second (Tensor): Maps of the same shape.

    Returns:
        Tensor: (N,), float64, in [-1, 1]; NaN where a map is constant or not finite.

    Raises:
        ValueError: if the shapes differ.

    Examples::

        >>> pearson(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 1.0]]))
        tensor([-1.], dtype=torch.float64)
    """
    a, b = _flat(first, second)
    # Scaled before squaring, so that maps of tiny or huge bits neither vanish nor overflow.
    a, b = (_scaled(x - x.mean(1, keepdim=True), x) for x in (a, b))
    # One root of the product, so that a map and itself give exactly 1.
    return ((a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()).clamp(-1.0, 1.0)


def spearman(first: Tensor, second: Tensor) -> Tensor:
    r"""Spearman's rank correlation of two maps: Pearson's of their ranks, ties sharing their mean rank.

    Args:

        first (Tensor): Maps, (N, ...).
        second (Tensor): Maps of the same shape.

    Returns:
        Tensor: (N,), float64, in [-1, 1]; NaN where a map is constant or not finite.

    Raises:
        ValueError: if the shapes differ.

    Examples::

        >>> spearman(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 4.0, 9.0]]))
        tensor([1.], dtype=torch.float64)
    """
    a, b = _flat(first, second)
    value = pearson(mean_ranks(a), mean_ranks(b))
    return value.masked_fill(~(a.isfinite().all(1) & b.isfinite().all(1)), torch.nan)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    r"""Structural similarity of two maps, each scaled to [0, 1] first, as in the sanity checks of saliency maps.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004: with local means
    :math:`\mu`, variances and covariance under a Gaussian window (11 x 11, sigma 1.5), the mean over the map of

    .. math:: \frac{(2\mu_a\mu_b + c_1)(2\sigma_{ab} + c_2)}{(\mu_a^2 + \mu_b^2 + c_1)(\sigma_a^2 + \sigma_b^2 + c_2)},
        \quad c_1 = 0.01^2,\ c_2 = 0.03^2,

    over the positions where the window fits; the window shrinks to the largest odd size that fits a smaller map.

    Args:

        first (Tensor): Maps, (N, H, W).
        second (Tensor): Maps of the same shape.

    Returns:
        Tensor: (N,), float64, at most 1; NaN where a map is constant or not finite.

    Raises:
        ValueError: if the shapes differ or are not (N, H, W).

    Examples::

        >>> ssim(image_bits.sum(1), image_bits.sum(1))
        tensor([1., 1.], dtype=torch.float64)
    """
    a, b = _flat(first, second)
    if first.ndim != 3:
        raise ValueError(f"first: expected maps of shape (N, H, W), got {tuple(first.shape)}; sum over channels first.")
    everywhere = torch.ones_like(a, dtype=torch.bool)
    broken = ~(a.isfinite().all(1) & b.isfinite().all(1))
    (a, a_constant), (b, b_constant) = min_max(a.nan_to_num(), everywhere), min_max(b.nan_to_num(), everywhere)
    side = min(_WINDOW, *first.shape[1:])
    side -= 1 - side % 2
    offsets = torch.arange(side, dtype=a.dtype, device=a.device) - side // 2
    window = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    window = window / window.sum()
    kernel = torch.outer(window, window)[None, None]

    def local(values: Tensor) -> Tensor:
        return F.conv2d(values.reshape(-1, 1, *first.shape[1:]), kernel)

    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    c1, c2 = _K1**2, _K2**2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    likeness = likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return likeness.flatten(1).mean(1).masked_fill(broken | a_constant | b_constant, torch.nan)


def _flat(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    if first.shape != second.shape or first.ndim < 2:
        raise ValueError(
            f"second: expected maps of the same shape, (N, ...), got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    return first.detach().double().flatten(1), second.detach().double().flatten(1).to(first.device)


def _scaled(centred: Tensor, values: Tensor) -> Tensor:
    """Divided by the largest deviation; NaN where the map is constant, also if its mean is not exact."""
    constant = values.amax(1, keepdim=True) == values.amin(1, keepdim=True)
    return (centred / centred.abs().amax(1, keepdim=True)).masked_fill(constant, torch.nan)
