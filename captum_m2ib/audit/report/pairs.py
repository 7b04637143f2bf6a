"""The pairs that a report shows, as compact data for its page: text as text, maps and colours as small numbers."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from captum_m2ib.audit.report.figures import Finding, pair_verdict
from captum_m2ib.audit.results import CHECKS, FIGURES
from captum_m2ib.audit.writer import read_shard, shards
from captum_m2ib.encoders.timelines import VideoTimeline, ensure_timeline
from captum_m2ib.explanations.embedding import ramps
from captum_m2ib.explanations.lettering import shown_text
from captum_m2ib.explanations.units import WORDINGS
from captum_m2ib.explanations.visualization import token_colors

_LONGEST_CAPTION = 600
_COLUMNS = (
    "id",
    "row",
    "caption",
    *FIGURES,
    *CHECKS,
    "unit",
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


def read_pairs(folder: str | os.PathLike[str], indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Some pairs of an audit with everything that is stored of them, in order; indices must rise."""
    from pyarrow import parquet

    wanted = iter(indices)
    index = next(wanted, None)
    first = 0
    for path in shards(folder):
        if index is None:
            return
        count = parquet.read_metadata(path).num_rows
        inside: list[int] = []
        while index is not None and index < first + count:
            inside.append(index - first)
            index = next(wanted, None)
        if inside:
            yield from read_shard(path, _COLUMNS).take(inside).to_pylist()
        first += count


def as_data(pair: Mapping[str, Any], found: Mapping[str, int]) -> dict[str, Any]:
    """A pair as the page holds it, without its picture."""
    caption = shown_text(pair["caption"] or "")
    shown = {
        "id": shown_text(pair["id"]),
        "row": pair["row"],
        "caption": caption if len(caption) <= _LONGEST_CAPTION else caption[: _LONGEST_CAPTION - 1] + "…",
        "found": dict(found),
        **{name: _rounded(pair[name]) for name in FIGURES},
        **{name: pair[name] for name in CHECKS},
        "check": pair_verdict([pair[name] for name in CHECKS]),
        **explanation_data(pair),
    }
    texts = {name: pair[name] for name in ("contrast", "warning", "error_kind", "error")}
    for name, text in {**texts, "time": _time(pair)}.items():
        if text is not None:
            shown[name] = shown_text(text)
    return shown


def explanation_data(pair: Mapping[str, Any]) -> dict[str, Any]:
    """Map and tokens of a pair; empty where there is an error."""
    if pair["map"] is None:
        return {}
    bits = np.array(pair["map"], dtype=np.float64)
    wording = WORDINGS[pair["unit"] or "bits"]
    is_signed = wording.is_signed(bits)
    shown = np.abs(bits) if is_signed else bits
    top = float(shown.max(initial=0.0))
    levels = np.rint(255 * shown / top).clip(0, 255).astype(np.uint8) if top > 0 else np.zeros(bits.shape, np.uint8)
    planes = [levels, (bits < 0).astype(np.uint8)] if is_signed else [levels]
    return {
        "unit": wording.name,
        "map": [*levels.shape, *(base64.b64encode(plane.tobytes()).decode("ascii") for plane in planes)],
        "top": _rounded(top),
        "tokens": [shown_text(token) for token in pair["tokens"]],
        "special": [int(flag) for flag in pair["special"]],
        "bits": [_rounded(value) for value in pair["token_bits"]],
    }


def picture_data(pair: Mapping[str, Any]) -> str:
    """The picture in base64, or nothing."""
    return base64.b64encode(pair["thumbnail"]).decode("ascii") if pair["thumbnail"] else ""


def _time(pair: Mapping[str, Any]) -> str | None:
    """When a sound or a video begins and ends, and what was taken of it."""
    if pair["timeline"] is None:
        return None
    timeline = ensure_timeline(json.loads(pair["timeline"]))
    if isinstance(timeline, VideoTimeline):
        told = f"{timeline.names[0]} to {timeline.names[-1]}"
    else:
        told = f"0 to {timeline.seconds:.4g} s"
    return f"{told}; {timeline.taken}" if timeline.taken else told


def have_one_place(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether a pair's maps in two audits lie on the same: of a sound or a video both models have taken the same."""
    if first["timeline"] != second["timeline"]:
        return False
    return first["timeline"] is None or np.shape(first["map"]) == np.shape(second["map"])


def agreement(first: Any, second: Any) -> float | None:
    """Cosine similarity of two maps, the coarser one brought to the finer one's grid; None where one is zero."""
    from PIL import Image

    if first is None or second is None:
        return None
    maps = [np.array(bits, dtype=np.float32) for bits in (first, second)]
    height, width = (max(bits.shape[axis] for bits in maps) for axis in (0, 1))
    resized = [
        np.asarray(Image.fromarray(bits).resize((width, height), Image.Resampling.BILINEAR), dtype=np.float64).ravel()
        for bits in maps
    ]
    norm = float(np.linalg.norm(resized[0]) * np.linalg.norm(resized[1]))
    return float(resized[0] @ resized[1]) / norm if norm > 0 else None


def colours() -> dict[str, Any]:
    """256 colours of heat as red, green, blue and opacity, and 256 of tokens as background and ink; below zero, too."""
    levels = np.linspace(0, 1, 256)
    found: dict[str, Any] = dict(ramps())
    for name, sign in (("token", 1), ("below", -1)):
        found[name] = [list(pair) for pair in token_colors(sign * levels, maximum=1.0)]
    return found


def found_in(findings: Sequence[Finding]) -> dict[int, dict[str, int]]:
    """For each pair the findings that it is in, and its place in each."""
    places: dict[int, dict[str, int]] = {}
    for finding in findings:
        for place, index in enumerate(finding.indices):
            places.setdefault(index, {})[finding.name] = place
    return places


def _rounded(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.5g}")
