"""What each of the default's choices for pictures is worth on photographs: one changed at a time."""

from __future__ import annotations

from typing import Any

from captum_m2ib.attr import MultiModalInfoBottleneck
from captum_m2ib.benchmark.methods import FAMILIES, METHODS, OURS, Family, Method
from captum_m2ib.encoders.dual_encoder import DualEncoder

_SETTINGS: dict[str, dict[str, Any]] = {
    "unsmoothed": {"smoothing": 0.0},
    "smoothed-half": {"smoothing": 0.05},
    "smoothed-twice": {"smoothing": 0.2},
    "any-colour": {"smoothing_colour": None},
    "half-colour": {"smoothing_colour": 0.5},
    "twice-colour": {"smoothing_colour": 2.0},
    "own-variance": {"variance": 1.0},
    "tenth-variance": {"variance": 0.1},
    "not-antithetic": {"antithetic": False},
    "half-open": {"initial_gate": 0.5},
    "open": {"initial_gate": 0.9933},
    "all-noise": {"noiseless": 0.0},
    "half-rate": {"lr": 0.625},
    "beta-0.3": {"beta": 0.3},
    "beta-1.2": {"beta": 1.2},
    "fine": {"n_steps": 8, "n_samples": 9},
}


def _prior(encoder: DualEncoder, layers: Any = None) -> MultiModalInfoBottleneck:
    return MultiModalInfoBottleneck(encoder, layers, statistics=(None, None))


ABLATION: tuple[Method, ...] = (
    METHODS[OURS],
    *(Method(f"{OURS}-{name}", FAMILIES[OURS], (given, given)) for name, given in _SETTINGS.items()),
    Method(f"{OURS}-plain-prior", Family(f"{OURS}-plain-prior", _prior, seeded=True)),
    METHODS[f"{OURS}-guided"],
    METHODS[f"{OURS}-late"],
    METHODS[f"{OURS}-published"],
)
"""The default, what changes one setting, the prior or the layer of it, and the paper's method."""
