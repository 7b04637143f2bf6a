"""The check of maps that came from anywhere: their orders tried out by the gates of the bottleneck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from captum_m2ib.attr._arguments import Explained
from captum_m2ib.attr._priors import defaults_of
from captum_m2ib.attr._scoring import roots_of
from captum_m2ib.attr.multi_modal_info_bottleneck import MultiModalInfoBottleneck
from captum_m2ib.engine.check import Check, joined
from captum_m2ib.engine.closing import check_of, measured_stakes
from captum_m2ib.engine.gates import Gates, gates_of, unit_positions
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layouts import Layout
from captum_m2ib.engine.settings import Settings, check_count
from captum_m2ib.engine.smoothing import COLOUR, SHARE, over_neighbours
from captum_m2ib.engine.suffix import Suffix, Tap


def check_maps(
    method: MultiModalInfoBottleneck,
    arguments: tuple[Any, ...],
    modality: int,
    maps: Sequence[Tensor],
    internal_batch_size: int | None = None,
) -> list[Check]:
    r"""The check of maps that came from anywhere, at the layer where the method has its gates.

    Args:

        method (MultiModalInfoBottleneck): On the encoder that is explained.
        arguments (tuple): All arguments of the encoder, the inputs first.
        modality (int): Whose maps these are.
        maps (sequence of Tensor): Of the shape of the modality's input; of token ids and packed patches also without
            what comes after their second dimension.
        internal_batch_size (int, optional): Most rows in one pass. Default: None (all at once)

    Returns:
        list[Check]: one per map, with the untouched score as that of the map's gates, which are not known.

    Raises:
        ValueError: if a hidden state does not have the units of its input, or a score is NaN or infinite.
    """
    layers, layouts = method.layers, method.layouts
    if internal_batch_size is not None:
        check_count("internal_batch_size", internal_batch_size)
    settings = Settings(internal_batch_size=internal_batch_size)
    applied = settings.per_layer(defaults_of(layers, method.priors))
    count = len(layers)
    given = Explained.ensure(method.forward_func, arguments[:count], None, arguments[count:])
    at_once = None if internal_batch_size is None else max(1, internal_batch_size // applied.most_draws)
    found: list[list[Check]] = [[] for _ in maps]
    with borrowing(*roots_of(method.forward_func, layers)):
        for start, chunk in given.parts(at_once):
            suffix = Suffix(given.forward, chunk, len(chunk[0]), [Tap(layer) for layer in layers])
            gate = gates_of(suffix, chunk, modality, method.priors[modality], layouts[modality], applied, modality)
            if layers[modality].argument is not None:
                gate.filter = over_neighbours(SHARE, COLOUR, gate.hidden, chunk[modality], gate.real)
            stakes = measured_stakes(suffix, [gate], applied, start)
            for checks, bits in zip(found, maps, strict=True):
                elements = _elements(bits[start : start + len(chunk[0])], gate, layouts[modality], chunk[modality])
                checks.append(check_of(suffix, gate, elements, applied, start, stakes, suffix.score))
    return [check for checks in found if (check := joined(checks)) is not None]


def _elements(bits: Tensor, gate: Gates, layout: Layout | None, inputs: Tensor) -> Tensor:
    """A map of an input as one of the hidden state's shape, each unit's value in all of its channels."""
    hidden = gate.hidden
    bits = bits.to(hidden.device, hidden.dtype)
    if bits.shape == hidden.shape:
        return bits
    if bits.shape == hidden.shape[:-1]:
        return bits.unsqueeze(-1).expand_as(hidden)
    if layout is None:
        raise ValueError(
            f"layouts: cannot tell how a map of shape {tuple(bits.shape)} lies on a hidden state of shape "
            f"{tuple(hidden.shape)}; pass the encoder's layouts, or leave the check out."
        )
    places = unit_positions(layout, hidden, inputs)
    units = bits.flatten(2).sum(2) if inputs.ndim < 4 and bits.ndim > 2 else bits
    if inputs.ndim == 4:
        units = adaptive_avg_pool2d(bits.sum(1), (places.shape[0], places.shape[1]))
    moved = hidden.movedim(gate.channels, -1)
    rows = torch.zeros(moved.shape[:-1], dtype=hidden.dtype, device=hidden.device).flatten(1)
    rows[:, places.flatten()] = units.flatten(1)
    return rows.view(moved.shape[:-1]).unsqueeze(-1).expand_as(moved).movedim(-1, gate.channels)
