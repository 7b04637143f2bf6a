"""What an audit says of a pair: its columns, and how maps, checks and errors become their values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from captum_m2ib.audit.measures import coarse, flat, thumbnail
from captum_m2ib.encoders.timelines import to_plain
from captum_m2ib.explanations.checking import MODALITIES
from captum_m2ib.explanations.units import WORDINGS

if TYPE_CHECKING:
    from torch import Tensor

    from captum_m2ib.encoders.dual_encoder import Pairs

PASSED_ON = ("row", "id", "caption")
FIGURES = (
    "score",
    "image_bits",
    "text_bits",
    "image_score",
    "text_score",
    "image_margin",
    "text_margin",
    "image_kept",
    "text_kept",
    "best_half_score",
    "other_half_score",
    "inside_share",
    "inside_area",
    "contrast_similarity",
)
CHECKS = ("image_check", "text_check")
RESULTS = (
    *FIGURES,
    *CHECKS,
    "method",
    "unit",
    "kind",
    "timeline",
    "map",
    "tokens",
    "special",
    "token_bits",
    "contrast",
    "thumbnail",
    "warning",
    "error_kind",
    "error",
)

_LONGEST_REASON = 500


def shown(kind: str, unit: str, grid: np.ndarray, pairs: Pairs, index: int, side: int) -> dict[str, Any]:
    """The map of a pair's picture, sound or video, and what it lies on."""
    timeline = pairs.timelines[index] if pairs.timelines else None
    return {
        "unit": unit,
        "kind": kind,
        "timeline": None if timeline is None else json.dumps(to_plain(timeline)),
        "image_bits": float(grid.sum(dtype=np.float64)) if WORDINGS[unit].has_totals else None,
        # Bits compress better with fewer digits; other units may be tiny.
        "map": flat(grid, kind).astype(np.float16 if unit == "bits" else np.float32),
        "thumbnail": thumbnail(pairs.pictures[index], kind, len(grid), side) if side else None,
    }


def grids_of(pixels: Sequence[Tensor], patches: Sequence[Tensor] | None) -> list[np.ndarray]:
    """Maps per patch, (gh, gw), of a video (frames, gh, gw); without a patch grid per cell of a coarse one."""
    grids = coarse(pixels) if patches is None else patches
    return [grid.float().cpu().numpy() for grid in grids]


def gated_scores(record: Mapping[str, Any]) -> dict[str, float]:
    """The score that is left with one side gated, per side."""
    return {f"{name}_score": record[name]["score_after"] for name in MODALITIES}


def checked(check: Mapping[str, Any]) -> dict[str, Any]:
    """What the check of a pair's maps says."""
    found = {}
    for name in MODALITIES:
        part = check[name]
        found[f"{name}_check"], found[f"{name}_kept"] = part["verdict"], part["kept"]
        found[f"{name}_margin"] = part["lost_top"] - part["lost_random"]
    return found


def failed(kind: str, reason: object) -> dict[str, str]:
    """What the row of a pair says that could not be explained."""
    return {"error_kind": kind, "error": short(reason)}


def short(reason: object) -> str:
    """A reason in one line, no longer than a table should hold."""
    text = storable(" ".join(str(reason).split()) or type(reason).__name__)
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"


def storable(text: str) -> str:
    """Text that a table can hold, whatever a tokenizer made of it."""
    return text.encode("utf-8", "replace").decode("utf-8")
