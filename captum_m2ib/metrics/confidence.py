r"""Does the score survive when only what the map calls relevant is kept? Confidence drop and increase.

With the score :math:`s` of the pair and :math:`s'` of the pair masked by its map, scaled to [0, 1]:

- as the literature on dual encoders reports it (M2IB, arXiv 2312.17174, through the package grad-cam):
  ``confidence_drop`` :math:`= 100 \max(0, s - s')`, an absolute difference of cosines times 100, and
  ``confidence_increase`` :math:`= 100 \cdot 1[s' > s]`;
- as Grad-CAM++ defines it (Chattopadhay et al., WACV 2018): ``average_drop``
  :math:`= 100 \max(0, s - s') / s`, relative to the score, with the same increase.

A map of ones has no drop: read these figures beside one that rewards sparse maps, such as deletion or localisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_m2ib.engine.layers import LayerLike, resolve_for
from captum_m2ib.metrics._examples import (
    NanPolicy,
    argument_at,
    check_parts,
    chunks,
    finite_maps,
    join_arguments,
    min_max,
    rows_of,
    run,
    settle,
    unit_flags,
    unit_maps,
)


@dataclass(frozen=True)
class Confidence:
    r"""Scores before and after masking by the map, and what the literature makes of them.

    Attributes:

        original (Tensor): (N,), scores :math:`s` of the pairs.
        masked (Tensor): (N,), scores :math:`s'` of the masked pairs.
    """

    original: Tensor
    masked: Tensor

    @property
    def confidence_drop(self) -> Tensor:
        r"""Points of cosine lost, :math:`100 \max(0, s - s')`, (N,). Lower is better."""
        return 100 * (self.original - self.masked).clamp(min=0)

    @property
    def confidence_increase(self) -> Tensor:
        r"""Whether the score rises, :math:`100 \cdot 1[s' > s]`, (N,); the mean is the percentage of pairs that gain.
        Higher is better.
        """
        return (100.0 * (self.masked > self.original)).to(self.original).masked_fill(self._missing, torch.nan)

    @property
    def average_drop(self) -> Tensor:
        r"""Per cent of the score lost, :math:`100 \max(0, s - s') / s`, (N,); NaN where :math:`s \le 0`."""
        return (self.confidence_drop / self.original).masked_fill(~(self.original > 0), torch.nan)

    @property
    def _missing(self) -> Tensor:
        return self.original.isnan() | self.masked.isnan()


def image_confidence(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor,
    additional_forward_args: Any = None,
    modality: int = 0,
    baselines: float | Tensor = 0.0,
    normalise: bool = True,
    internal_batch_size: int | None = None,
    nan_policy: NanPolicy = "propagate",
    show_progress: bool = False,
) -> Confidence:
    r"""Score with the picture softly masked by its map: :math:`x' = b + m (x - b)`.

    The defaults are what the literature reports: the map, scaled to [0, 1] per example, multiplies the *normalised*
    pixels, so that what it rejects turns into the data set's mean colour.

    Args:

        forward_func (Callable): ``forward_func(*inputs, *additional_forward_args)``, one score per pair, (N,).
        inputs (Tensor or tuple[Tensor, ...]): The pairs, batch first.
        attributions (Tensor): Maps, (N, H, W) or (N, C, H, W); channels are summed.
        additional_forward_args (Any, optional): Further arguments of ``forward_func``. Default: None
        modality (int, optional): Which argument is the picture, (N, C, H, W), counted over inputs and additional
                    arguments. Default: 0
        baselines (float or Tensor, optional): :math:`b`, what a rejected pixel becomes; broadcasts with the picture.
                    Default: 0.0
        normalise (bool, optional): Scale each map to [0, 1] by its minimum and maximum; a constant map then has no
                    value. False takes maps as masks as they are. Default: True
        internal_batch_size (int, optional): Most pairs in one pass. Default: None (all)
        nan_policy (str, optional): What becomes of pairs whose map is constant or not finite, or whose score is NaN:
                    ``"propagate"``, ``"omit"`` (with a warning that counts them) or ``"raise"``.
                    Default: "propagate"
        show_progress (bool, optional): Show a progress bar. Default: False

    Returns:
        Confidence: scores before and after, and the figures made of them.

    Raises:
        ValueError: if shapes do not fit, or by the NaN policy.

    Examples::

        >>> found = image_confidence(encoder, pairs.inputs, image_bits, pairs.additional_forward_args)
        >>> found.confidence_drop.shape, found.confidence_increase.shape, found.average_drop.shape
        (torch.Size([2]), torch.Size([2]), torch.Size([2]))
    """
    arguments = join_arguments(inputs, additional_forward_args)
    pixels = argument_at(arguments, modality, is_ids=False)
    maps = unit_maps(attributions, (pixels.shape[0], *pixels.shape[2:]), f"argument {modality}").to(pixels.device)
    counted = unit_flags("attributions", None, maps.shape, pixels.device)
    weights, undefined = _weights(maps, counted, normalise)
    weights = weights.view_as(maps).unsqueeze(1)
    base = torch.as_tensor(baselines, dtype=pixels.dtype, device=pixels.device).expand_as(pixels)

    def masked(rows: Tensor) -> Tensor:
        kept = weights[rows] * (pixels[rows] - base[rows]) + base[rows]
        return _score(forward_func, arguments, rows, {modality: kept.to(pixels.dtype)})

    check_parts(forward_func, arguments, internal_batch_size)
    original, after = [], []
    for rows in chunks(len(pixels), internal_batch_size, "Confidence", show_progress):
        original.append(_score(forward_func, arguments, rows))
        after.append(masked(rows.to(pixels.device)))
    return _settled(torch.cat(original), torch.cat(after), undefined, nan_policy)


def token_confidence(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor,
    additional_forward_args: Any = None,
    *,
    maskable: Tensor,
    embedding: LayerLike,
    modality: int = 1,
    quantile: float | None = None,
    internal_batch_size: int | None = None,
    nan_policy: NanPolicy = "propagate",
    show_progress: bool = False,
) -> Confidence:
    r"""Score with the caption's token embeddings scaled by their map, position by position; the corrected protocol.

    Each maskable token's embedding row, before its position is added, is multiplied by the token's value in [0, 1].
    All other tokens stay: the tower reads and pools the caption exactly where it always does, and a token that occurs
    twice is scaled at each of its positions by that position's value.

    Args:

        forward_func (Callable): As for :func:`image_confidence`; it must run ``embedding`` once per pass.
        inputs (Tensor or tuple[Tensor, ...]): The pairs, batch first.
        attributions (Tensor): Maps, (N, L).
        additional_forward_args (Any, optional): Further arguments of ``forward_func``. Default: None
        maskable (Tensor): Boolean, (N, L): False for start, end, pooled and padding tokens, e.g.
                    ``~torch.tensor(pairs.special)``.
        embedding (nn.Module or str): The layer that turns ids into rows, (N, L, width), e.g.
                    ``"text_model.embeddings.token_embedding"``.
        modality (int, optional): Which argument holds the ids, (N, L). Default: 1
        quantile (float, optional): Keep tokens above this quantile of the maskable tokens' values whole and remove the
                    others, instead of scaling softly. Default: None
        internal_batch_size (int, optional): Most pairs in one pass. Default: None (all)
        nan_policy (str, optional): As for :func:`image_confidence`. Default: "propagate"
        show_progress (bool, optional): Show a progress bar. Default: False

    Returns:
        Confidence: scores before and after, and the figures made of them. A map that is constant over the maskable
        tokens, one without maskable tokens, or one that is not finite has no value.

    Raises:
        ValueError: if shapes do not fit, the embedding is not run, or by the NaN policy.

    Examples::

        >>> found = token_confidence(
        ...     encoder, pairs.inputs, token_bits, pairs.additional_forward_args,
        ...     maskable=~torch.tensor(pairs.special), embedding="text_model.embeddings.token_embedding")
        >>> found.confidence_drop.shape
        torch.Size([2])
    """
    arguments = join_arguments(inputs, additional_forward_args)
    ids = argument_at(arguments, modality, is_ids=True)
    maps = unit_maps(attributions, ids.shape, f"argument {modality}").to(ids.device)
    flags = unit_flags("maskable", maskable, ids.shape, ids.device)
    weights, undefined = _weights(maps, flags, True)
    undefined["no maskable token"] = ~flags.any(1)
    undefined["constant map"] &= flags.any(1)
    if quantile is not None:
        level = torch.nanquantile(weights.masked_fill(~flags, torch.nan), quantile, dim=1, keepdim=True)
        weights = (weights > level).to(weights.dtype)
    weights = weights.masked_fill(~flags, 1.0)
    layer = resolve_for(forward_func, embedding).module

    check_parts(forward_func, arguments, internal_batch_size)
    original, after = [], []
    for rows in chunks(len(ids), internal_batch_size, "Confidence", show_progress):
        original.append(_score(forward_func, arguments, rows))
        with _scaling(layer, weights[rows.to(ids.device)]):
            after.append(_score(forward_func, arguments, rows))
    return _settled(torch.cat(original), torch.cat(after), undefined, nan_policy)


def published_token_confidence(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor,
    additional_forward_args: Any = None,
    *,
    maskable: Tensor,
    modality: int = 1,
    replacement: int = 0,
    nan_policy: NanPolicy = "propagate",
    show_progress: bool = False,
) -> Confidence:
    r"""Score with the lower half of the caption's tokens replaced, as M2IB's released evaluation does it.

    For comparison with published figures only. Start, end and padding tokens are cut away first, for the original
    score too, so the tower pools where it never pools otherwise; of the rest, tokens whose value is not strictly above
    the median become token 0, whatever that token means. :func:`token_confidence` does neither.

    Args:

        forward_func (Callable): As for :func:`image_confidence`; it is given one pair at a time.
        inputs (Tensor or tuple[Tensor, ...]): The pairs, batch first.
        attributions (Tensor): Maps, (N, L).
        additional_forward_args (Any, optional): Further arguments; those of the ids' shape (attention masks) are cut
                    like the ids. Default: None
        maskable (Tensor): Boolean, (N, L): the tokens that are left of the caption.
        modality (int, optional): Which argument holds the ids, (N, L). Default: 1
        replacement (int, optional): The id that replaces rejected tokens. Default: 0
        nan_policy (str, optional): What becomes of captions without maskable tokens, maps that are not finite and
                    scores that are NaN. Default: "propagate"
        show_progress (bool, optional): Show a progress bar. Default: False

    Returns:
        Confidence: scores before and after, and the figures made of them. A constant map keeps no token.

    Raises:
        ValueError: if shapes do not fit, or by the NaN policy.
    """
    arguments = join_arguments(inputs, additional_forward_args)
    ids = argument_at(arguments, modality, is_ids=True)
    flags = unit_flags("maskable", maskable, ids.shape, ids.device)
    maps, broken = finite_maps(unit_maps(attributions, ids.shape, f"argument {modality}").to(ids.device), flags)
    empty = ~flags.any(1)
    text = {
        index
        for index, argument in enumerate(arguments)
        if isinstance(argument, Tensor) and argument.shape == ids.shape
    }
    original = torch.full((len(ids),), torch.nan, dtype=torch.float64, device=ids.device)
    after = original.clone()
    check_parts(forward_func, arguments, 1)
    for rows in chunks(len(ids), 1, "Confidence", show_progress):
        row = int(rows)
        if empty[row]:
            continue
        cut = {index: arguments[index][row][flags[row].to(arguments[index].device)][None] for index in text}
        original[row] = _score(forward_func, arguments, rows, cut)
        values = maps[row][flags[row]]
        kept = values > values.quantile(0.5)
        cut[modality] = torch.where(kept, cut[modality], replacement)
        after[row] = _score(forward_func, arguments, rows, cut)
    undefined = {"map that is not finite": broken, "no maskable token": empty}
    return _settled(original, after, undefined, nan_policy)


def _weights(maps: Tensor, counted: Tensor, normalise: bool) -> tuple[Tensor, dict[str, Tensor]]:
    flat, broken = finite_maps(maps, counted)
    undefined = {"map that is not finite": broken}
    if normalise:
        flat, constant = min_max(flat, counted)
        undefined["constant map"] = constant & ~broken
    return flat, undefined


def _score(
    forward_func: Callable[..., Any],
    arguments: tuple[Any, ...],
    rows: Tensor,
    replaced: dict[int, Tensor] | None = None,
) -> Tensor:
    return run(forward_func, rows_of(arguments, rows, replaced), len(rows))


def _settled(original: Tensor, after: Tensor, undefined: dict[str, Tensor], nan_policy: NanPolicy) -> Confidence:
    lost = torch.stack([where.to(original.device) for where in undefined.values()]).any(0)
    undefined["score that is NaN"] = (original.isnan() | after.isnan()) & ~lost
    return Confidence(*settle((original, after), undefined, nan_policy))


@contextmanager
def _scaling(layer: nn.Module, weights: Tensor) -> Iterator[None]:
    """While open, what ``layer`` returns is scaled position by position."""
    calls = 0

    def scale(module: nn.Module, args: Any, output: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if not isinstance(output, Tensor) or output.shape[:-1] != weights.shape:
            got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"embedding: expected a layer that returns a row per token, ({', '.join(map(str, weights.shape))}, "
                f"width), got {got}; name the layer that embeds ids, e.g. 'text_model.embeddings.token_embedding'."
            )
        return output * weights.unsqueeze(-1).to(output)

    handle = layer.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise ValueError(
            f"embedding: expected {type(layer).__name__} to run once per pass of forward_func, it ran {calls} times; "
            "name the layer that embeds this modality's ids."
        )
