"""What a report says: figures worked out by hand, pairs that deserve a look, and text that stays text."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captum_m2ib.audit import write_report
from captum_m2ib.audit.report.figures import (
    choose,
    compare,
    find,
    histogram,
    quiet_tokens,
    ranks,
    read_figures,
    verdict_table,
)
from captum_m2ib.audit.report.pairs import agreement, as_data, read_pairs
from captum_m2ib.audit.results import RESULTS
from captum_m2ib.audit.writer import read_shard, schema, shard_path, shards, verdict_counts, write_run, write_shard

Row = dict[str, Any]


def make_row(index: int, **changes: Any) -> Row:
    """An explained row: three words, the second without bits."""
    row: Row = {
        "row": index,
        "id": f"pair-{index}",
        "caption": f"a red ball{index}",
        "score": 0.1 + index / 100,
        "image_bits": 100.0 + index,
        "text_bits": 10.0,
        "map": np.array([[0, 1], [2, 4]], dtype=np.float16),
        "tokens": ["[start]", "a", "red", f"ball{index}"],
        "special": [True, False, False, False],
        "token_bits": np.array([50.0, 0.0, 4.0, 6.0], dtype=np.float32),
    }
    return {**row, **changes}


def make_audit(folder: Path, pairs: list[Row], per_shard: int = 10, **run: Any) -> Path:
    folder.mkdir()
    for index, first in enumerate(range(0, len(pairs), per_shard)):
        part = pairs[first : first + per_shard]
        columns = {name: [row.get(name) for row in part] for name in ("row", "id", "caption", *RESULTS)}
        write_shard(shard_path(folder, index), columns, {"model": "m", "settings": "{}"})
    whole = {
        "model": "m",
        "settings": {"seed": 0},
        "manifest": "pairs.csv",
        "kind": "csv",
        "shards": 1,
        "shard_size": per_shard,
        "versions": {"python": "3"},
        "rows": len(pairs),
        "finished": len(pairs),
        "complete": True,
    }
    write_run(folder, {**whole, **run})
    return folder


@pytest.fixture
def audit(tmp_path: Path) -> Callable[..., Path]:
    return lambda pairs, name="audit", **options: make_audit(tmp_path / name, pairs, **options)


def names_of(audit: Path) -> dict[str, list[str]]:
    figures = read_figures(audit)
    return {finding.name: [figures.ids[index] for index in finding.indices] for finding in find(figures)}


def test_figures_are_gathered_over_all_shards(audit: Callable[..., Path]):
    rows = [make_row(index) for index in range(25)]
    rows[7] = {"row": 7, "id": "pair-7", "caption": "", "error_kind": "image", "error": "cannot read /a/b.png twice"}
    figures = read_figures(audit(rows))
    assert figures.ids == [f"pair-{index}" for index in range(25)] and figures.rows.tolist() == list(range(25))
    assert np.isnan(figures.numbers["score"][7]) and np.isclose(figures.numbers["score"][24], 0.34)
    assert figures.kinds[7] == "image" and figures.examples == {"image": {"cannot read … twice": 1}}
    assert np.isnan(figures.silent[7]) and np.isclose(figures.silent[8], 1 / 3)
    assert (
        figures.tokens["a"] == [24, 0, 24] and figures.tokens["red"] == [24, 96, 0] and "[start]" not in figures.tokens
    )


def test_a_word_is_silent_below_a_twentieth_of_an_even_share(audit: Callable[..., Path]):
    # Four words and 80 bits: an even share is 20, a twentieth of it 1. The special token counts for nothing.
    tokens = {"tokens": ["[s]", "w", "x", "y", "z"], "special": [True, False, False, False, False]}
    bits = np.array([500, 0.99, 1.01, 38, 40], dtype=np.float32)
    figures = read_figures(audit([make_row(0, **tokens, token_bits=bits)]))
    assert figures.silent.tolist() == [0.25] and figures.tokens["w"][2] == 1 and figures.tokens["x"][2] == 0


VERDICTS = [("holds", 0.9, "holds", 0.8), ("fails", 0.1, "weak", 0.2), ("weak", 0.2, "fails", -0.4), (None,) * 4]


def checked_rows() -> list[Row]:
    names = ("image_check", "image_margin", "text_check", "text_margin")
    return [make_row(i, **dict(zip(names, values, strict=True))) for i, values in enumerate(VERDICTS)]


def test_verdicts_are_counted_and_failing_maps_come_first(audit: Callable[..., Path]):
    folder = audit(checked_rows(), per_shard=2)
    assert verdict_counts(folder) == {
        "image": {"holds": 1, "weak": 1, "fails": 1},
        "text": {"holds": 1, "weak": 1, "fails": 1},
    }
    figures = read_figures(folder)
    # By the difference from random positions of the map that fails, the worst first.
    assert names_of(folder)["failing"] == ["pair-2", "pair-1"]
    assert verdict_table(figures) == [
        {"what": "pictures", "counts": [1, 1, 1]},
        {"what": "captions", "counts": [1, 1, 1]},
        {"what": "pairs", "counts": [1, 0, 2]},
    ]
    pairs = [as_data(pair, {}) for pair in read_pairs(folder, [0, 1, 2, 3])]
    assert [pair["check"] for pair in pairs] == ["holds", "fails", "fails", None]
    page = write_report(folder).read_text()
    assert "<h3>Checks</h3>" in page and '<option value="check fails">' in page


def test_audits_without_checks_are_reported_on(audit: Callable[..., Path]):
    import pyarrow as pa
    from pyarrow import parquet

    folder = audit([make_row(0), make_row(1)])
    (path,) = shards(folder)
    older = [name for name in schema().names if not re.search("_(check|margin|kept)$", name)]
    parquet.write_table(parquet.read_table(path, columns=older), path)
    assert read_shard(path, ["id", "image_check"])["image_check"].type == pa.string()
    assert verdict_counts(folder) == {} and verdict_table(read_figures(folder)) == []
    page = write_report(folder).read_text()
    assert "<h3>Checks</h3>" not in page and "The audit was run without its check." in page


def test_high_scores_from_few_bits_come_first(audit: Callable[..., Path]):
    rows = [make_row(index, score=0.2, image_bits=500.0) for index in range(10)]
    rows[4].update(score=0.9, image_bits=1.0)
    rows[6].update(score=0.9, image_bits=900.0)
    assert names_of(audit(rows))["cheap"][0] == "pair-4"
    assert "pair-6" not in names_of(audit(rows, "again"))["cheap"]


def test_maps_outside_their_boxes_are_found_for_the_boxes_size(audit: Callable[..., Path]):
    shares = [(0.5, 0.25), (0.1, 0.4), (0.01, 0.02), (0.3, 0.3), (None, None)]
    rows = [make_row(i, inside_share=share, inside_area=area) for i, (share, area) in enumerate(shares)]
    assert names_of(audit(rows))["outside"] == ["pair-1", "pair-2"]


def test_maps_that_another_caption_does_not_change_are_found(audit: Callable[..., Path]):
    rows = [make_row(i, contrast_similarity=value) for i, value in enumerate([0.2, 0.95, None, 0.99])]
    assert names_of(audit(rows))["unchanged"] == ["pair-3", "pair-1"]


def test_what_cannot_be_found_says_what_to_run(audit: Callable[..., Path]):
    missing = {finding.name: finding.missing for finding in find(read_figures(audit([make_row(0)])))}
    assert "no boxes" in missing["outside"] and "--contrast" in missing["unchanged"]


def test_tokens_that_carry_nothing_come_first_and_rare_ones_not_at_all(audit: Callable[..., Path]):
    found = quiet_tokens(read_figures(audit([make_row(index) for index in range(20)])))
    assert [row["token"] for row in found] == ["a", "red"]
    assert found[0] == {"token": "a", "count": 20, "mean": 0.0, "silent": 1.0} and found[1]["mean"] == 4.0


def test_reasons_are_counted_together_whatever_file_they_name(audit: Callable[..., Path]):
    reasons = ["there is no file /a/b.png; check", "there is no file C:\\c.d.png; check", "cannot read (/a/b) twice."]
    rows = [
        {"row": index, "id": str(index), "caption": "", "error_kind": "image", "error": reason}
        for index, reason in enumerate(reasons)
    ]
    found = read_figures(audit(rows)).examples["image"]
    assert found == {"there is no file …; check": 2, "cannot read (…) twice.": 1}


def test_two_audits_are_matched_by_id(audit: Callable[..., Path]):
    first = read_figures(audit([make_row(index) for index in range(4)]))
    rows = [
        make_row(index, score=0.1 + index / 100 + change) for index, change in ((3, 0.2), (1, -0.3), (2, 0), (9, 5))
    ]
    other = read_figures(audit(rows, "other"))
    findings, matched = compare(first, other)
    assert matched.tolist() == [-1, 1, 2, 0]
    assert [finding.indices for finding in findings] == [[3], [1]]
    with pytest.raises(ValueError, match="no pair in common"):
        compare(first, read_figures(audit([make_row(50)], "strange")))


def test_ranks_are_shared_by_equal_values():
    assert ranks(np.array([3.0, 1.0, np.nan, 3.0, 9.0])).tolist()[:2] == [0.5, 0.0]
    assert np.isnan(ranks(np.array([np.nan]))).all() and ranks(np.zeros(0)).size == 0


def test_a_page_too_small_for_all_shows_findings_errors_and_an_even_sample(audit: Callable[..., Path]):
    rows = [make_row(index, score=0.2, image_bits=500.0) for index in range(200)]
    rows[150].update(score=0.9, image_bits=1.0)
    for index in range(100, 140):
        rows[index] = {"row": index, "id": f"pair-{index}", "caption": "", "error_kind": "image", "error": "no"}
    figures = read_figures(audit(rows))
    findings = [finding for finding in find(figures) if finding.name == "cheap"]
    chosen = choose(figures, findings, 50)
    assert len(chosen) == 50 == len(set(chosen)) and chosen == sorted(chosen) and 150 in chosen
    assert sum(figures.kinds[index] is not None for index in chosen) == 10
    assert min(chosen) < 20 and max(chosen) > 180
    assert choose(figures, findings, 200) == list(range(200))


def test_chosen_pairs_are_read_from_any_shard(audit: Callable[..., Path]):
    folder = audit([make_row(index) for index in range(35)])
    indices = [0, 9, 10, 33, 34]
    assert [pair["row"] for pair in read_pairs(folder, indices)] == indices


def test_histograms_count_every_value_once():
    values = np.concatenate([np.linspace(0, 1, 999), [1000.0], [np.nan]])
    bars = histogram([values, np.zeros(0)])
    assert bars is not None and sum(bars["counts"][0]) == 1000 and bars["high"] < 2
    assert histogram([np.array([np.nan])]) is None
    same = histogram([np.full(5, 2.0)])
    assert same is not None and sum(same["counts"][0]) == 5


def test_agreement_of_maps_is_a_cosine_on_the_finer_grid():
    one = [[1.0, 0.0], [0.0, 0.0]]
    assert agreement(one, one) == pytest.approx(1) and agreement(one, [[0.0, 0.0], [0.0, 1.0]]) == pytest.approx(0)
    assert agreement(one, [[3.0]]) == pytest.approx(0.5)
    assert agreement(one, None) is None and agreement(one, [[0.0, 0.0], [0.0, 0.0]]) is None


def test_numbers_of_a_pair_reach_the_page(audit: Callable[..., Path]):
    folder = audit([make_row(0)])
    (pair,) = read_pairs(folder, [0])
    data = as_data(pair, {"cheap": 2})
    assert data["map"] == [2, 2, "AECA/w=="] and data["top"] == 4 and data["found"] == {"cheap": 2}
    assert data["bits"] == [50, 0, 4, 6] and data["special"] == [1, 0, 0, 0] and data["score"] == 0.1


def test_maps_with_two_signs_keep_them(audit: Callable[..., Path]):
    row = make_row(0, map=np.array([[-4, 1], [0, 2]], dtype=np.float32), unit="relative", method="nib")
    row.update(image_bits=None, text_bits=None, token_bits=np.array([5.0, 1e-4, -4.0, 6e-6], dtype=np.float32))
    folder = audit([row] * 6, settings={"method": "grad-eclip"})
    (pair,) = read_pairs(folder, [0])
    data = as_data(pair, {})
    rows, columns, levels, signs = data["map"]
    assert (rows, columns, data["top"], data["unit"]) == (2, 2, 4, "relative values")
    assert list(base64.b64decode(levels)) == [255, 64, 0, 128] and list(base64.b64decode(signs)) == [1, 0, 0, 0]
    # Speaking against the score is not saying nothing: of three words two are silent.
    assert np.isclose(read_figures(folder).silent[0], 2 / 3)
    page = write_report(folder).read_text(encoding="utf-8")
    assert "(grad-eclip, relative values)" in page and "Only maps in bits can say." in page
    assert "bits of the image" not in page.split("<script>")[0].split('id="settings"')[0]


def test_audits_in_different_units_are_not_laid_over_each_other(audit: Callable[..., Path]):
    rows = [make_row(index, unit="score", method="nib") for index in range(5)]
    other = audit([make_row(index) for index in range(5)], name="other")
    folder = audit(rows, settings={"method": "nib"})
    assert "median units of the score of the image" in write_report(folder).read_text(encoding="utf-8")
    page = write_report(folder, compare=other).read_text(encoding="utf-8")
    assert "(nib, units of the score)" in page and "(m2ib, bits)" in page
    above = page.split('id="findings"')[0]
    # An audit does not say what its model's score is: a cosine, a logit, MaxSim, or a function of one's own.
    assert "<dt>median score</dt>" in above and "cosine" not in above and "of the image" not in above


HOSTILE = '</script><script>evil()</script><img src=x onerror=evil()> {{ 7 * 7 }} \x1b[31m\u202e & "quoted" \u2028'


def test_no_markup_survives_into_the_page(audit: Callable[..., Path]):
    hostile = {"caption": HOSTILE, "id": HOSTILE, "tokens": ["[s]", HOSTILE, "<b>", "</p>"], "contrast": HOSTILE}
    failed = {"row": 1, "id": HOSTILE, "caption": HOSTILE, "error_kind": "image", "error": HOSTILE, "warning": HOSTILE}
    rows = [make_row(0, **hostile), failed, *(make_row(index, **hostile) for index in range(2, 9))]
    settings = {"settings": {"contrast": HOSTILE}, "model": HOSTILE, "manifest": HOSTILE}
    folder = audit(rows, **settings)
    page = write_report(folder, compare=folder, title=HOSTILE).read_text(encoding="utf-8")
    for wrong in ("<script>evil", "<img", "onerror=evil()>", "<b>", "\x1b", "\u202e", "\u2028", ">49<"):
        assert wrong not in page, wrong
    scripts = re.findall(r"<script[^>]*>", page)
    assert scripts == [
        '<script type="application/json" id="data">',
        '<script type="application/json" id="pictures-0">',
        "<script>",
    ]
    block = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert block and json.loads(block[1])["pairs"][0]["tokens"][2] == "<b>"


def test_the_page_forbids_everything_but_itself(audit: Callable[..., Path]):
    page = write_report(audit([make_row(0)])).read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src &#39;none&#39;" in policy[1] and "unsafe-inline" not in policy[1]
    assert not re.search(r"https?://", page)


def test_an_unfinished_audit_says_so(audit: Callable[..., Path]):
    page = write_report(audit([make_row(0)], rows=5, finished=1, complete=False)).read_text(encoding="utf-8")
    assert "not finished" in page and "1 of 5 pairs" in page


def test_what_is_no_audit_is_refused(tmp_path: Path, audit: Callable[..., Path]):
    with pytest.raises(ValueError, match="holds no audit"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no finished pair"):
        write_report(audit([]))
    (tmp_path / "run.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="does not say"):
        write_report(tmp_path)


def test_a_page_of_errors_alone_can_be_written(audit: Callable[..., Path]):
    rows = [{"row": 0, "id": "a", "caption": None, "error_kind": "caption", "error": "there is no caption"}]
    assert "there is no caption" in write_report(audit(rows)).read_text(encoding="utf-8")
