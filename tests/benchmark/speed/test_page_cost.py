"""What a page costs: counted where nothing is computed, and timed on a model small enough to run here."""

from __future__ import annotations

import pytest

from captum_m2ib.benchmark.speed import page


def test_a_page_of_a_small_model_is_counted_and_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    monkeypatch.setattr(page, "VISION", {**page.VISION, **sizes, "num_hidden_layers": 2})
    text = {**sizes, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2}
    monkeypatch.setattr(page, "TEXT", {**page.TEXT, **text})
    page.main([])
    counted = rows_of(capsys.readouterr().out)
    page.main(["--seconds", "--map", "--repeats", "2"])
    *timed, whole = rows_of(capsys.readouterr().out)
    assert [row[:2] for row in timed] == [row[:2] for row in counted] and not any(row[2] for row in counted)
    forwards, tower, query, back = page.gflop_of_passes().values()
    assert forwards > tower > query and 1.9 * forwards < back < 3.1 * forwards
    assert all(row[2].count(",") == 1 for row in timed)
    # Twelve passes forwards and backwards, and forwards what measures the range and holds reruns against the model.
    assert whole[0] == "map of the page for a query" and whole[2] and 12 * back < float(whole[1]) < 25 * back


def rows_of(printed: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[4:]]
