"""The prior of each layer: what a user may give for it, what is known without, and what the descent's defaults are."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.gates import Prior
from captum_m2ib.engine.layers import Layer, resolve_at
from captum_m2ib.engine.settings import Defaults
from captum_m2ib.engine.statistics import ChannelStatistics

Statistics: TypeAlias = Mapping[str, ChannelStatistics] | Sequence[Prior]

# The paper's, with the score in its own unit; 1 / (1 + exp(-5)) is where its gates start.
PUBLISHED = Defaults(beta=0.1, variance=1.0, lr=1.0, initial_gate=1 / (1 + math.exp(-5)), antithetic=False)
# For the paper's prior N(0, variance), with the score as a share of what the pair stands to lose.
AT_LAYER = replace(PUBLISHED, beta=0.25)
# What measured best on validation scenes for the standardised prior.
STANDARDISED = Defaults(
    beta=3.0,
    variance=1.0,
    lr=None,
    initial_gate=0.5,
    antithetic=True,
    n_steps=6,
    n_samples=2,
    reach=4.0,
)
# The same where an input itself is gated.
AT_INPUT = replace(
    STANDARDISED, beta=0.6, variance=0.25, initial_gate=0.8, n_steps=4, n_samples=3, noiseless=0.7, reach=5.0
)
# Late layers that guide where the bits of an input lie; of how many steps and draws is the input's to say.
GUIDE = STANDARDISED


def defaults_of(layers: Sequence[Layer], priors: Sequence[Prior]) -> list[Defaults]:
    """What holds at each layer where nothing is asked for."""
    return [
        AT_INPUT if layer.argument is not None else AT_LAYER if prior is None else STANDARDISED
        for layer, prior in zip(layers, priors, strict=True)
    ]


def ensure_priors(forward_func: Any, layers: Sequence[Layer], statistics: Statistics | None) -> tuple[Prior, ...]:
    """One prior per layer, of what was given as ``statistics``."""
    if statistics is None:
        return _known(forward_func, layers)
    if isinstance(statistics, Mapping):
        missing = [layer.name for layer in layers if layer.name not in statistics]
        if missing:
            raise ValueError(
                f"statistics: expected an entry for each layer, none for {', '.join(missing)}; it has "
                f"{', '.join(statistics) or 'none'}."
            )
        return tuple(statistics[layer.name] for layer in layers)
    if len(statistics) != len(layers):
        raise ValueError(f"statistics: expected one entry per layer ({len(layers)}), got {len(statistics)}.")
    for prior in statistics:
        if prior is not None and prior != "pair" and not isinstance(prior, ChannelStatistics):
            raise ValueError(f"statistics: expected ChannelStatistics, 'pair' or None, got {prior!r}.")
    return tuple(statistics)


def _known(forward_func: Any, layers: Sequence[Layer]) -> tuple[Prior, ...]:
    """The priors where none are given: standardised at an input itself and at recommended layers."""
    encoder = forward_func if isinstance(forward_func, DualEncoder) else None
    recommended: list[Layer] = []
    # Towers without parts under a known name have no recommended layers.
    with contextlib.suppress(ValueError):
        if encoder is not None:
            recommended = [resolve_at(encoder, i, layer) for i, layer in enumerate(encoder.recommended_layers())]
    known = {(layer.module, layer.call) for layer in recommended}
    priors: list[Prior] = []
    for layer in layers:
        if layer.argument is not None:
            priors.append((encoder.statistics.get(layer.name) if encoder is not None else None) or "pair")
        elif encoder is not None and (layer.module, layer.call) in known:
            priors.append(encoder.statistics_of(layer.module) or "pair")
        else:
            priors.append(None)
    return tuple(priors)
