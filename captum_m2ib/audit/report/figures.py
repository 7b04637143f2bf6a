"""What a report says about all pairs of an audit, from a few numbers per pair: one shard is read at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from captum_m2ib.audit.results import CHECKS, FIGURES
from captum_m2ib.audit.writer import kind_in, read_shard, shards
from captum_m2ib.engine.verdict import VERDICTS, worst

# A word carries nothing if it has less than this share of what it would have were all words alike.
SILENT = 0.05
_FEWEST_WORDS = 3
_NAME = re.compile(r"[^\s(]*[/\\]\S*?(?=[;,.:)]*$)")
_WITHOUT_BOXES = ("The manifest has no boxes or masks.", "Boxes and masks lie in pictures.")
_FOUND = 24
_TOKENS = 15


@dataclass(frozen=True)
class Figures:
    r"""Numbers of all n pairs of an audit.

    Attributes:

        ids (list[str]): Their ids.
        rows (numpy.ndarray): Their positions in the manifest, (n,).
        numbers (dict): Per name in :data:`captum_m2ib.audit.results.FIGURES` the values, NaN where there is none, (n,).
        silent (numpy.ndarray): Share of the caption's words that carry nothing, NaN where there are too few, (n,).
        kinds (list): Kind of error, or None.
        tokens (dict): Per token: occurrences, magnitudes of its values in all, and in how many it carried nothing.
        examples (dict): Per kind of error, its commonest reasons with their numbers.
        checks (dict): Per name in :data:`captum_m2ib.audit.results.CHECKS` the verdicts, None where there is none.
        unit (str): What the maps are in, as :attr:`captum_m2ib.Explanation.unit` says it.
        kind (str): What is compared with captions: ``"image"``, ``"sound"`` or ``"video"``.
    """

    ids: list[str]
    rows: np.ndarray
    numbers: dict[str, np.ndarray]
    silent: np.ndarray
    kinds: list[str | None]
    tokens: dict[str, list[float]]
    examples: dict[str, dict[str, int]]
    checks: dict[str, list[str | None]]
    unit: str = "bits"
    kind: str = "image"

    def __len__(self) -> int:
        return len(self.ids)


def read_figures(folder: str | os.PathLike[str]) -> Figures:
    """Read the numbers of an audit, without pictures and maps."""
    ids: list[str] = []
    kinds: list[str | None] = []
    parts: list[dict[str, np.ndarray]] = []
    tokens: dict[str, list[float]] = {}
    examples: dict[str, dict[str, int]] = {}
    checks: dict[str, list[str | None]] = {name: [] for name in CHECKS}
    units: set[str] = set()
    wanted = ["id", "row", *FIGURES, *CHECKS, "unit", "tokens", "special", "token_bits", "error_kind", "error"]
    for path in shards(folder):
        table = read_shard(path, wanted)
        ids += table["id"].to_pylist()
        found = table["error_kind"].to_pylist()
        units.update(table["unit"].drop_null().unique().to_pylist())
        kinds += found
        for name, verdicts in checks.items():
            verdicts += table[name].to_pylist()
        numbers = {
            name: np.asarray(table[name].to_numpy(zero_copy_only=False), dtype=np.float64) for name in ("row", *FIGURES)
        }
        parts.append({**numbers, "silent": _silent_share(table, tokens)})
        for kind, reason in zip(found, table["error"].to_pylist(), strict=True):
            if kind is not None:
                _count(examples.setdefault(kind, {}), _without_names(reason))
    joined = {
        name: np.concatenate([part[name] for part in parts]) if parts else np.zeros(0)
        for name in ("row", "silent", *FIGURES)
    }
    rows, silent = joined.pop("row").astype(np.int64), joined.pop("silent")
    # Earlier releases wrote no unit: they knew bits alone.
    unit = units.pop() if units else "bits"
    return Figures(ids, rows, joined, silent, kinds, tokens, examples, checks, unit, kind_in(folder))


def _count(counts: dict[str, int], name: str, most: int = 200) -> None:
    if name in counts or len(counts) < most:
        counts[name] = counts.get(name, 0) + 1


def _without_names(reason: str) -> str:
    """A reason without the file it is about, so that equal ones are counted together."""
    return " ".join(_NAME.sub("…", word) for word in reason.split())


def _silent_share(table: Any, tokens: dict[str, list[float]]) -> np.ndarray:
    """Per pair the share of words that carry nothing; adds to the counts of each token."""
    import pyarrow as pa
    import pyarrow.compute as pc

    count = table.num_rows
    lengths = pc.fill_null(pc.list_value_length(table["tokens"]), 0).to_numpy()
    owner = np.repeat(np.arange(count), lengths)
    # What speaks against the score carries something, too.
    bits = np.abs(pc.list_flatten(table["token_bits"]).to_numpy().astype(np.float64))
    word = ~np.asarray(pc.list_flatten(table["special"]).to_numpy(zero_copy_only=False), dtype=bool)
    words = np.bincount(owner, word, count)
    total = np.bincount(owner, bits * word, count)
    silent = word & (bits * words[owner] < SILENT * total[owner])
    flat = pa.table(
        {
            "token": pc.list_flatten(table["tokens"]).combine_chunks(),
            "bits": pa.array(bits),
            "silent": pa.array(silent.astype(np.int64)),
        }
    ).filter(pa.array(word))
    grouped = flat.group_by("token").aggregate([("bits", "count"), ("bits", "sum"), ("silent", "sum")])
    for row in grouped.to_pylist():
        sums = tokens.setdefault(row["token"], [0.0, 0.0, 0.0])
        for index, name in enumerate(("bits_count", "bits_sum", "silent_sum")):
            sums[index] += row[name]
    enough = (words >= _FEWEST_WORDS) & (total > 0)
    return np.where(enough, np.bincount(owner, silent, count) / np.maximum(words, 1), np.nan)


def ranks(values: np.ndarray) -> np.ndarray:
    """Position of each value among all, from 0 to 1; equal values share theirs; NaN stays NaN."""
    known = ~np.isnan(values)
    found = np.full(len(values), np.nan)
    levels, inverse, counts = np.unique(values[known], return_inverse=True, return_counts=True)
    middles = np.cumsum(counts) - (counts + 1) / 2
    found[known] = middles[inverse] / max(known.sum() - 1, 1) if len(levels) else 0.0
    return found


@dataclass(frozen=True)
class Finding:
    """Pairs worth a look for one reason, most first; ``missing`` says what to run where there can be none."""

    name: str
    title: str
    explanation: str
    indices: list[int]
    missing: str = ""


def find(figures: Figures) -> list[Finding]:
    """The pairs most worth a look."""
    numbers = figures.numbers
    cheap = ranks(numbers["score"]) - ranks(numbers["image_bits"] + numbers["text_bits"])
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = numbers["inside_share"] / numbers["inside_area"]
    return [
        Finding(
            "failing",
            "Maps that fail their check",
            "Hiding what the map marks takes about as little of the score as hiding so much at random, or the score is "
            "as high with everything hidden: smallest difference first.",
            _top(_failing(figures)),
            "" if any(map(any, figures.checks.values())) else "The audit was run without its check.",
        ),
        Finding(
            "cheap",
            "High score, few bits",
            "The model is sure and needs almost nothing of the pair for it: rank of the score less rank of the bits.",
            _top(np.where(cheap > 0, cheap, np.nan)) if figures.unit == "bits" else [],
            "" if figures.unit == "bits" else "Only maps in bits can say.",
        ),
        Finding(
            "outside",
            "Map outside the boxes",
            "Least of the map above zero inside the given boxes or mask for their area; at 1 it knows nothing of them.",
            _top(np.where(lift < 1, -lift, np.nan)),
            "" if np.isfinite(lift).any() else _WITHOUT_BOXES[figures.kind != "image"],
        ),
        Finding(
            "unchanged",
            "Map unchanged by another caption",
            "The map for another caption is almost the same (cosine similarity of the two above 0.9).",
            _top(np.where(numbers["contrast_similarity"] > 0.9, numbers["contrast_similarity"], np.nan)),
            ""
            if np.isfinite(numbers["contrast_similarity"]).any()
            else "Run the audit with --contrast CAPTION, or with a column of other captions.",
        ),
        Finding(
            "silent",
            "Words that carry nothing",
            f"Largest share of words with less than {SILENT:.0%} of an even share of what the caption's words have.",
            _top(np.where(figures.silent > 0, figures.silent, np.nan)),
        ),
    ]


def _failing(figures: Figures) -> np.ndarray:
    """How far below random positions the failing maps of each pair are; NaN where none fails."""
    found = np.full(len(figures), np.nan)
    for name, verdicts in figures.checks.items():
        fails = np.array([verdict == VERDICTS[-1] for verdict in verdicts], dtype=bool)
        margin = figures.numbers[name.replace("check", "margin")]
        found = np.fmax(found, np.where(fails, -margin, np.nan))
    return found


def verdict_table(figures: Figures) -> list[dict[str, Any]]:
    """How many maps of each side, and how many pairs, got each verdict; empty where none was checked."""
    of_pairs = [pair_verdict(pair) for pair in zip(*figures.checks.values(), strict=True)]
    media = "pictures" if figures.kind == "image" else f"{figures.kind}s"
    rows = {
        media: figures.checks["image_check"],
        "captions": figures.checks["text_check"],
        "pairs": of_pairs,
    }
    if not any(of_pairs):
        return []
    return [
        {"what": what, "counts": [sum(verdict == one for verdict in verdicts) for one in VERDICTS]}
        for what, verdicts in rows.items()
    ]


def pair_verdict(verdicts: Sequence[str | None]) -> str | None:
    """A pair's verdict: the worse one of its maps; None where none was checked."""
    known = [verdict for verdict in verdicts if verdict is not None]
    return worst(known) if known else None


def compare(figures: Figures, other: Figures) -> tuple[list[Finding], np.ndarray]:
    r"""What changed most from one audit to another of the same pairs.

    Returns:
        tuple: findings, and for each pair of the first its index in the second or -1, (n,).
    """
    places = {identity: index for index, identity in enumerate(other.ids)}
    matched = np.array([places.get(identity, -1) for identity in figures.ids], dtype=np.int64)
    if not (matched >= 0).any():
        raise ValueError("--compare: the two audits have no pair in common; their ids differ.")
    change = np.where(matched >= 0, other.numbers["score"][matched] - figures.numbers["score"], np.nan)
    explanation = "B's score less A's is {}."
    return [
        Finding("rose", "Score rose most", explanation.format("largest"), _top(np.where(change > 0, change, np.nan))),
        Finding("fell", "Score fell most", explanation.format("smallest"), _top(np.where(change < 0, -change, np.nan))),
    ], matched


def _top(values: np.ndarray) -> list[int]:
    order = np.argsort(-values, kind="stable")
    return [int(index) for index in order[:_FOUND] if np.isfinite(values[index])]


def quiet_tokens(figures: Figures) -> list[dict[str, Any]]:
    """Tokens of some frequency, those that most often carry nothing first."""
    least = max(5, len(figures) // 200)
    common = [(token, sums) for token, sums in figures.tokens.items() if sums[0] >= least]
    common.sort(key=lambda entry: (-entry[1][2] / entry[1][0], -entry[1][0], entry[0]))
    return [
        {"token": token, "count": int(count), "mean": bits / count, "silent": silent / count}
        for token, (count, bits, silent) in common[:_TOKENS]
    ]


def choose(figures: Figures, findings: Sequence[Finding], most: int) -> list[int]:
    """Which pairs the page shows: all if they fit; else findings, then errors up to a fifth, then an even sample."""
    if len(figures) <= most:
        return list(range(len(figures)))
    chosen = dict.fromkeys(index for finding in findings for index in finding.indices)
    failed = [index for index, kind in enumerate(figures.kinds) if kind is not None]
    chosen.update(dict.fromkeys(_evenly(failed, most // 5)))
    rest = [index for index in range(len(figures)) if index not in chosen and figures.kinds[index] is None]
    chosen.update(dict.fromkeys(_evenly(rest, max(most - len(chosen), 0))))
    return sorted(list(chosen)[:most])


def _evenly(indices: Sequence[int], count: int) -> list[int]:
    if len(indices) <= count:
        return list(indices)
    return [indices[position] for position in (np.arange(count) * len(indices) // max(count, 1)).tolist()]


def histogram(values: Sequence[np.ndarray], bins: int = 28) -> dict[str, Any] | None:
    r"""One or two distributions on one axis.

    Returns:
        dict or None: ``low`` and ``high`` end of the axis and ``counts`` per series; None without values.
    """
    known = [series[np.isfinite(series)] for series in values]
    if not any(len(series) for series in known):
        return None
    everything = np.concatenate(known)
    low, high = float(everything.min()), float(everything.max())
    # A few extreme values would squeeze all others into one bar; they are counted in the last.
    top = float(np.percentile(everything, 99.5))
    high = top if high - low > 2 * (top - low) > 0 else high
    if high <= low:
        high = low + 1.0
    counts = [np.histogram(np.clip(series, low, high), bins, (low, high))[0].tolist() for series in known]
    return {"low": low, "high": high, "counts": counts}
