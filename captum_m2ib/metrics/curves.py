r"""Insertion and deletion: how the score changes while units are replaced in the order of their relevance.

Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018. Units are ranked by
the map. Deletion goes from the input to a substrate, insertion from the substrate to the input, ``step`` units at a
time. With :math:`p_k` the share of units changed after :math:`k` steps and :math:`s_k` the score then,

.. math:: \mathrm{AUC} = \sum_{k=1}^{n} (p_k - p_{k-1}) \frac{s_{k-1} + s_k}{2},

which is RISE's :math:`(\sum_k s_k - s_0/2 - s_n/2)/n` where ``step`` divides the number of units. The normalised
curve is :math:`(s_k - s_{blank}) / (s_{full} - s_{blank})`, with the scores of the substrate alone and of the intact
input, so that models and pairs can be compared.

Most relevant first (``"morf"``), a good map has a low deletion and a high insertion AUC; least relevant first
(``"lerf"``), the reverse. The difference ``deletion(lerf).auc - deletion(morf).auc`` cancels what the substrate does
to every order alike (Schulz et al., ICLR 2020). ``"random"`` is the chance level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_m2ib.metrics._examples import (
    NanPolicy,
    Order,
    argument_at,
    at_least,
    check_parts,
    chunks,
    finite_maps,
    importance_ranks,
    join_arguments,
    rows_of,
    run,
    settle,
    unit_flags,
    unit_maps,
)

Substrate = Literal["zero", "mean", "blur"] | float | Tensor


@dataclass(frozen=True)
class PerturbationCurve:
    r"""Scores while units are replaced.

    Attributes:

        fractions (Tensor): (N, n + 1), share of each example's units that have been changed, from 0 to 1.
        scores (Tensor): (N, n + 1), the score then.
        kind (str): ``"deletion"`` or ``"insertion"``.
    """

    fractions: Tensor
    scores: Tensor
    kind: Literal["deletion", "insertion"]

    @property
    def auc(self) -> Tensor:
        """(N,), area under the scores."""
        return _area(self.fractions, self.scores)

    @property
    def normalised_scores(self) -> Tensor:
        """(N, n + 1), 0 at the substrate's score and 1 at the intact input's; NaN where these are equal."""
        first, last = self.scores[:, :1], self.scores[:, -1:]
        blank, full = (last, first) if self.kind == "deletion" else (first, last)
        return ((self.scores - blank) / (full - blank)).masked_fill(full == blank, torch.nan)

    @property
    def normalised_auc(self) -> Tensor:
        """(N,), area under the normalised scores; NaN where the substrate scores as the intact input."""
        return _area(self.fractions, self.normalised_scores)


def deletion(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor,
    additional_forward_args: Any = None,
    modality: int = 0,
    substrate: Substrate = "zero",
    order: Order = "morf",
    step: int | None = None,
    internal_batch_size: int | None = None,
    seed: int = 0,
    nan_policy: NanPolicy = "propagate",
    show_progress: bool = False,
) -> PerturbationCurve:
    r"""Replace the picture's pixels by the substrate, in the order of their relevance.

    Args:

        forward_func (Callable): ``forward_func(*inputs, *additional_forward_args)``, one score per pair, (N,).
        inputs (Tensor or tuple[Tensor, ...]): The pairs, batch first.
        attributions (Tensor): Maps, (N, H, W) or (N, C, H, W); channels are summed. All channels of a pixel change
                    together.
        additional_forward_args (Any, optional): Further arguments of ``forward_func``. Default: None
        modality (int, optional): Which argument is the picture, (N, C, H, W), counted over inputs and additional
                    arguments. Default: 0
        substrate (str, float or Tensor, optional): What pixels become: ``"zero"`` (the data set's mean colour where
                    pixels are normalised), ``"mean"`` (each picture's own mean colour), ``"blur"``
                    (:func:`gaussian_blur`), a number, or a tensor that broadcasts with the picture. Default: "zero"
        order (str, optional): ``"morf"``, most relevant first; ``"lerf"``, least relevant first; ``"random"``. Ties,
                    and so constant maps, are put in a random order. Default: "morf"
        step (int, optional): Pixels changed per step. Default: None (a hundredth of the picture)
        internal_batch_size (int, optional): Most pictures in one pass, over pairs and steps. Default: None (as many as
                    there are pairs)
        seed (int, optional): Of random orders. Default: 0
        nan_policy (str, optional): What becomes of pairs whose map is not finite or whose scores are NaN:
                    ``"propagate"``, ``"omit"`` (with a warning that counts them) or ``"raise"``.
                    Default: "propagate"
        show_progress (bool, optional): Show a progress bar. Default: False

    Returns:
        PerturbationCurve: scores and shares of changed pixels, with the areas.

    Raises:
        ValueError: if an argument does not fit, or by the NaN policy.

    Examples::

        >>> curve = deletion(encoder, pairs.inputs, image_bits, pairs.additional_forward_args, substrate="mean")
        >>> curve.scores.shape, curve.auc.shape  # steps and the untouched picture
        (torch.Size([2, 101]), torch.Size([2]))
    """
    change = _picture_change(inputs, additional_forward_args, modality, attributions, substrate, step)
    settings = _Settings(order, internal_batch_size, seed, nan_policy, show_progress)
    return _curve("deletion", forward_func, change, settings)


def insertion(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor,
    additional_forward_args: Any = None,
    modality: int = 0,
    substrate: Substrate = "blur",
    order: Order = "morf",
    step: int | None = None,
    internal_batch_size: int | None = None,
    seed: int = 0,
    nan_policy: NanPolicy = "propagate",
    show_progress: bool = False,
) -> PerturbationCurve:
    r"""Put the picture's pixels back on the substrate, in the order of their relevance.

    Args:

        forward_func, inputs, attributions, additional_forward_args, modality: As for :func:`deletion`.
        order, step, internal_batch_size, seed, nan_policy, show_progress: As for :func:`deletion`.
        substrate (str, float or Tensor, optional): What the picture starts from. Default: "blur", as in RISE

    Returns:
        PerturbationCurve: scores and shares of inserted pixels, with the areas.

    Raises:
        ValueError: if an argument does not fit, or by the NaN policy.
    """
    change = _picture_change(inputs, additional_forward_args, modality, attributions, substrate, step)
    settings = _Settings(order, internal_batch_size, seed, nan_policy, show_progress)
    return _curve("insertion", forward_func, change, settings)


def token_deletion(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor,
    additional_forward_args: Any = None,
    *,
    maskable: Tensor,
    replacement: int | Tensor,
    modality: int = 1,
    order: Order = "morf",
    step: int = 1,
    internal_batch_size: int | None = None,
    seed: int = 0,
    nan_policy: NanPolicy = "propagate",
    show_progress: bool = False,
) -> PerturbationCurve:
    r"""Replace the caption's tokens by another id, in the order of their relevance.

    Args:

        forward_func (Callable): As for :func:`deletion`.
        inputs (Tensor or tuple[Tensor, ...]): The pairs, batch first.
        attributions (Tensor): Maps, (N, L).
        additional_forward_args (Any, optional): Further arguments of ``forward_func``. Default: None
        maskable (Tensor): Boolean, (N, L): False for start, end, pooled and padding tokens, which stay, e.g.
                    ``~torch.tensor(pairs.special)``. Shares count maskable tokens only, so a shorter caption reaches 1
                    after fewer steps.
        replacement (int or Tensor): The id that tokens become, e.g. the padding's, or one per position, (N, L).
        modality (int, optional): Which argument holds the ids, (N, L). Default: 1
        order, internal_batch_size, seed, show_progress: As for :func:`deletion`.
        step (int, optional): Tokens changed per step. Default: 1
        nan_policy (str, optional): As for :func:`deletion`; captions without maskable tokens have no value either.
                    Default: "propagate"

    Returns:
        PerturbationCurve: scores and shares of replaced tokens, with the areas.

    Raises:
        ValueError: if an argument does not fit, or by the NaN policy.
    """
    change = _token_change(inputs, additional_forward_args, modality, attributions, maskable, replacement, step)
    settings = _Settings(order, internal_batch_size, seed, nan_policy, show_progress)
    return _curve("deletion", forward_func, change, settings)


def token_insertion(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor,
    additional_forward_args: Any = None,
    *,
    maskable: Tensor,
    replacement: int | Tensor,
    modality: int = 1,
    order: Order = "morf",
    step: int = 1,
    internal_batch_size: int | None = None,
    seed: int = 0,
    nan_policy: NanPolicy = "propagate",
    show_progress: bool = False,
) -> PerturbationCurve:
    r"""Put the caption's tokens back in place of another id, in the order of their relevance.

    Args:

        forward_func, inputs, attributions, additional_forward_args: As for :func:`token_deletion`.
        maskable, replacement, modality, order, step: As for :func:`token_deletion`.
        internal_batch_size, seed, nan_policy, show_progress: As for :func:`token_deletion`.

    Returns:
        PerturbationCurve: scores and shares of inserted tokens, with the areas.

    Raises:
        ValueError: if an argument does not fit, or by the NaN policy.
    """
    change = _token_change(inputs, additional_forward_args, modality, attributions, maskable, replacement, step)
    settings = _Settings(order, internal_batch_size, seed, nan_policy, show_progress)
    return _curve("insertion", forward_func, change, settings)


def gaussian_blur(pixels: Tensor, kernel_size: int = 11, sigma: float = 5.0) -> Tensor:
    r"""Pictures without detail, as a substrate; the defaults are RISE's.

    Args:

        pixels (Tensor): (N, C, H, W).
        kernel_size (int, optional): Odd, in pixels. Default: 11
        sigma (float, optional): Standard deviation of the kernel in pixels. Default: 5.0

    Returns:
        Tensor: of the same shape; beyond the edge the edge is repeated, so an even picture stays as it is.

    Raises:
        ValueError: if the kernel's size is even or its width is not positive.

    Examples::

        >>> gaussian_blur(torch.full((1, 3, 8, 8), 0.5), kernel_size=3, sigma=1.0)[0, 0, 0, 0].item()
        0.5
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: expected an odd number of at least 1, got {kernel_size}.")
    if not sigma > 0:
        raise ValueError(f"sigma: expected a number above 0, got {sigma}.")
    offsets = torch.arange(kernel_size, device=pixels.device) - kernel_size // 2
    window = torch.exp(-(offsets**2) / (2 * sigma**2)).to(pixels.dtype)
    window = (window / window.sum()).expand(pixels.shape[1], 1, 1, -1)
    reach = kernel_size // 2
    padded = F.pad(pixels, (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, window, groups=pixels.shape[1])
    return F.conv2d(rows, window.transpose(2, 3), groups=pixels.shape[1])


def substrate_of(substrate: Substrate, pixels: Tensor) -> Tensor:
    r"""What pixels become where they are taken out.

    Args:

        substrate (str, float or Tensor): As for :func:`deletion`.
        pixels (Tensor): (N, C, H, W).

    Returns:
        Tensor: of the pixels' shape.

    Raises:
        ValueError: if there is no such substrate.
    """
    if isinstance(substrate, str):
        if substrate == "zero":
            return torch.zeros_like(pixels)
        if substrate == "mean":
            return pixels.mean((2, 3), keepdim=True).expand_as(pixels)
        if substrate == "blur":
            return gaussian_blur(pixels)
        raise ValueError(
            f"substrate: expected 'zero', 'mean', 'blur', a number or a tensor, got {substrate!r}; pass e.g. "
            "gaussian_blur(pixel_values, sigma=10)."
        )
    return torch.as_tensor(substrate, dtype=pixels.dtype, device=pixels.device).expand_as(pixels)


@dataclass(frozen=True)
class _Change:
    """One argument's values, intact and blank, with the maps, (N, ...), and flags, (N, U), of its units."""

    arguments: tuple[Any, ...]
    modality: int
    intact: Tensor
    blank: Tensor
    maps: Tensor
    counted: Tensor
    step: int


@dataclass(frozen=True)
class _Settings:
    order: Order
    internal_batch_size: int | None
    seed: int
    nan_policy: NanPolicy
    show_progress: bool


def _picture_change(
    inputs: Any, additional: Any, modality: int, attributions: Any, substrate: Substrate, step: int | None
) -> _Change:
    arguments = join_arguments(inputs, additional)
    pixels = argument_at(arguments, modality, is_ids=False)
    units = (pixels.shape[0], *pixels.shape[2:])
    maps = unit_maps(attributions, units, f"argument {modality}").to(pixels.device)
    counted = unit_flags("attributions", None, units, pixels.device)
    step = math.ceil(counted.shape[1] / 100) if step is None else step
    return _Change(arguments, modality, pixels, substrate_of(substrate, pixels), maps, counted, step)


def _token_change(
    inputs: Any,
    additional: Any,
    modality: int,
    attributions: Any,
    maskable: Tensor,
    replacement: int | Tensor,
    step: int,
) -> _Change:
    arguments = join_arguments(inputs, additional)
    ids = argument_at(arguments, modality, is_ids=True)
    maps = unit_maps(attributions, ids.shape, f"argument {modality}").to(ids.device)
    counted = unit_flags("maskable", maskable, ids.shape, ids.device)
    replaced = torch.as_tensor(replacement, device=ids.device)
    if replaced.is_floating_point():
        raise ValueError(f"replacement: expected integer token ids, got {replaced.dtype}.")
    blank = torch.where(counted, replaced.to(ids.dtype), ids)
    return _Change(arguments, modality, ids, blank, maps, counted, step)


def _curve(
    kind: Literal["deletion", "insertion"], forward_func: Callable[..., Any], change: _Change, settings: _Settings
) -> PerturbationCurve:
    at_least("step", change.step, 1)
    start, end = (change.intact, change.blank) if kind == "deletion" else (change.blank, change.intact)
    flat, broken = finite_maps(change.maps, change.counted)
    ranks = importance_ranks(flat, settings.order, settings.seed, change.counted)
    examples, units = len(start), change.counted.sum(1)
    steps = max(1, math.ceil(int(units.max()) / change.step))
    # Ranks of units that never change lie beyond every example's count, so the count bounds what a step changes.
    changed = (torch.arange(steps + 1, device=units.device) * change.step).minimum(units[:, None])

    check_parts(forward_func, change.arguments, settings.internal_batch_size)
    scores = []
    at_once = settings.internal_batch_size or examples
    for rows in chunks((steps + 1) * examples, at_once, kind.capitalize(), settings.show_progress):
        example, count = rows.to(start.device) % examples, rows.to(start.device) // examples
        where = (ranks[example] < changed[example, count][:, None]).view(-1, *change.maps.shape[1:])
        where = where.unsqueeze(1) if start.ndim > where.ndim else where
        mixed = torch.where(where, end[example], start[example])
        scores.append(run(forward_func, rows_of(change.arguments, example, {change.modality: mixed}), len(rows)))
    table = torch.cat(scores).view(steps + 1, examples).T.contiguous()

    empty = units == 0
    fractions = (changed / units.clamp(min=1)[:, None]).to(table)
    silent = table.isnan().any(1) & ~(broken | empty).to(table.device)
    undefined = {"map that is not finite": broken & ~empty, "no maskable token": empty, "score that is NaN": silent}
    fractions, table = settle((fractions, table), undefined, settings.nan_policy)
    return PerturbationCurve(fractions, table, kind)


def _area(fractions: Tensor, scores: Tensor) -> Tensor:
    return torch.trapezoid(scores, fractions, dim=1)
