"""One page about an audit, for a person to judge: no other file, no network, nothing in it is taken for markup."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captum_m2ib.audit.report.figures import (
    Figures,
    Finding,
    choose,
    find,
    histogram,
    quiet_tokens,
    read_figures,
    verdict_table,
)
from captum_m2ib.audit.report.figures import (
    compare as compare_figures,
)
from captum_m2ib.audit.report.pairs import (
    agreement,
    as_data,
    colours,
    found_in,
    have_one_place,
    picture_data,
    read_pairs,
)
from captum_m2ib.audit.tables import import_pyarrow
from captum_m2ib.audit.writer import method_of, read_run
from captum_m2ib.engine.verdict import VERDICTS
from captum_m2ib.explanations.embedding import data_text
from captum_m2ib.explanations.lettering import shown_text
from captum_m2ib.explanations.reports import page_environment, page_policy, page_style, trusted
from captum_m2ib.explanations.units import WORDINGS

__all__ = ["write_report"]

_HERE = Path(__file__).parent
_CHUNK = 200
_SCORE = ("score", "score")
_READING = {
    "sound": "A sound is shown as its spectrogram, high above low, or as its wave; time goes from left to right.",
    "video": "Frames of a video stand in rows, and time goes from left to right.",
}


def write_report(
    audit: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    compare: str | os.PathLike[str] | None = None,
    pairs: int = 5000,
    title: str | None = None,
) -> Path:
    r"""Write a page about an audit.

    Args:

        audit (path): The audit's folder.
        output (path, optional): Default: None (``report.html`` in that folder)
        compare (path, optional): Another audit of the same pairs, matched by id and shown beside. Default: None
        pairs (int, optional): Most pairs in the gallery; numbers are about all. Default: 5000
        title (str, optional): Default: None (the manifest's name)

    Returns:
        Path: the page.

    Raises:
        ValueError: if the folder holds no audit, no pair is finished, or the two audits share no pair.
        RuntimeError: if pyarrow or Jinja2 is not installed.
    """
    import_pyarrow()
    environment = page_environment(_HERE, "audit")
    if pairs < 1:
        raise ValueError(f"pairs: expected a whole number of at least 1, got {pairs}.")
    runs = [read_run(audit)] if compare is None else [read_run(audit), read_run(compare)]
    figures = read_figures(audit)
    if not len(figures):
        raise ValueError(f"{str(audit)!r} has no finished pair to report on; run the audit first.")
    findings = find(figures)
    other, matched = None, None
    if compare is not None:
        other = read_figures(compare)
        changes, matched = compare_figures(figures, other)
        findings = changes + findings
    chosen = choose(figures, findings, pairs)
    shown, pictures = _shown_pairs(audit, chosen, findings, compare, matched)
    environment.filters.update(number=_number, shown=shown_text, amount=_amount)
    style, script = page_style(_HERE / "page.css"), (_HERE / "page.js").read_text(encoding="utf-8")
    page = environment.get_template("page.html").render(
        title=shown_text(title or Path(runs[0]["manifest"]).name),
        style=trusted(style),
        script=trusted(script),
        policy=page_policy(style, script),
        runs=runs,
        names=_names(runs, [audit] if compare is None else [audit, compare]),
        count=len(figures),
        failed=sum(kind is not None for kind in figures.kinds),
        shown=len(chosen),
        methods=_methods(runs, [figures] if other is None else [figures, other]),
        unit=WORDINGS[figures.unit].name,
        kind=figures.kind,
        reading=_READING.get(figures.kind, ""),
        totals=_labels([figures] if other is None else [figures, other])[1:],
        tiles=_tiles([figures] if other is None else [figures, other]),
        distributions=_distributions([figures] if other is None else [figures, other]),
        errors=_errors(figures),
        verdicts=VERDICTS,
        checks=verdict_table(figures),
        findings=findings,
        tokens=quiet_tokens(figures),
        comparison=None if other is None or matched is None else _comparison(figures, other, matched, shown),
        data=trusted(
            data_text(
                {
                    "pairs": shown,
                    "colours": colours(),
                    "compared": compare is not None,
                    "chunk": _CHUNK,
                    "kind": figures.kind,
                }
            )
        ),
        chunks=[trusted(data_text(pictures[first : first + _CHUNK])) for first in range(0, len(pictures), _CHUNK)],
    )
    path = Path(audit, "report.html") if output is None else Path(output)
    path.write_text(page, encoding="utf-8")
    return path


def _shown_pairs(
    audit: str | os.PathLike[str],
    chosen: Sequence[int],
    findings: Sequence[Finding],
    compare: str | os.PathLike[str] | None,
    matched: Any,
) -> tuple[list[dict[str, Any]], list[str]]:
    found = found_in(findings)
    shown, pictures, mine = [], [], []
    for index, pair in zip(chosen, read_pairs(audit, chosen), strict=True):
        shown.append(as_data(pair, found.get(index, {})))
        pictures.append(picture_data(pair))
        mine.append({name: pair[name] for name in ("map", "timeline")} if compare is not None else {})
    if compare is not None:
        places = {int(matched[index]): position for position, index in enumerate(chosen) if matched[index] >= 0}
        order = sorted(places)
        for place, pair in zip(order, read_pairs(compare, order), strict=True):
            one = shown[places[place]]
            one["other"] = as_data(pair, {})
            before = mine[places[place]]
            one["agreement"] = agreement(before["map"], pair["map"]) if have_one_place(before, pair) else None
            if one["score"] is not None and one["other"]["score"] is not None:
                one["change"] = one["other"]["score"] - one["score"]
    return shown, pictures


def _names(runs: Sequence[dict[str, Any]], folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The model of each audit; of two also the folder, for the model may be the same."""
    names = [shown_text(run["model"]) for run in runs]
    if len(names) == 1:
        return names
    return [f"{name} in {shown_text(Path(folder).name)}" for name, folder in zip(names, folders, strict=True)]


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}".replace("-", "−")


def _amount(value: float | None, unit: str) -> str:
    """A number of a map, in the unit that is called so."""
    wording = next(one for one in WORDINGS.values() if one.name == unit)
    return "–" if value is None else wording.number(value)


def _methods(runs: Sequence[dict[str, Any]], audits: Sequence[Figures]) -> list[str]:
    """Per audit its method and what its maps are in."""
    return [
        f"{shown_text(method_of(run))}, {WORDINGS[figures.unit].name}"
        for run, figures in zip(runs, audits, strict=True)
    ]


def _labels(audits: Sequence[Figures]) -> list[tuple[str, str]]:
    """What distributions are shown of: totals only where they mean something, and the same in both audits."""
    units = {audit.unit for audit in audits}
    wording = WORDINGS[audits[0].unit]
    if len(units) > 1 or not wording.has_totals:
        return [_SCORE]
    totals = (("image_bits", audits[0].kind), ("text_bits", "text"))
    return [_SCORE, *((name, f"{wording.name} of the {what}") for name, what in totals)]


def _tiles(audits: Sequence[Figures]) -> list[dict[str, Any]]:
    import numpy as np

    tiles = []
    for name, label in _labels(audits):
        values = [audit.numbers[name][np.isfinite(audit.numbers[name])] for audit in audits]
        medians = [float(np.median(series)) if len(series) else None for series in values]
        unit = WORDINGS[audits[0].unit].name
        shown = [_number(value) if name == "score" else _amount(value, unit) for value in medians]
        tiles.append({"label": f"median {label}", "values": shown})
    return tiles


def _distributions(audits: Sequence[Figures]) -> list[dict[str, Any]]:
    found = []
    for name, label in _labels(audits):
        bars = histogram([audit.numbers[name] for audit in audits])
        if bars is not None:
            highest = max(max(counts) for counts in bars["counts"]) or 1
            heights = [[round(100 * count / highest, 2) for count in counts] for counts in bars["counts"]]
            found.append({**bars, "label": label, "heights": heights, "is_score": name == "score"})
    return found


def _errors(figures: Figures) -> list[dict[str, Any]]:
    rows = []
    for kind, reasons in figures.examples.items():
        ordered = sorted(reasons.items(), key=lambda entry: -entry[1])
        rows += [
            {"kind": kind, "reason": shown_text(reason), "count": count, "total": sum(reasons.values())}
            for reason, count in ordered[:5]
        ]
    return sorted(rows, key=lambda row: -row["count"])


def _comparison(figures: Figures, other: Figures, matched: Any, shown: Sequence[dict[str, Any]]) -> dict[str, Any]:
    import numpy as np

    both = matched >= 0
    change = other.numbers["score"][matched[both]] - figures.numbers["score"][both]
    change = change[np.isfinite(change)]
    known = [pair["agreement"] for pair in shown if pair.get("agreement") is not None]
    return {
        "both": int(both.sum()),
        "only": [int((~both).sum()), len(other) - len({int(place) for place in matched[both]})],
        "change": float(change.mean()) if len(change) else None,
        "higher": float((change > 0).mean()) if len(change) else None,
        "agreement": float(np.median(known)) if known else None,
        "agreements": len(known),
    }
