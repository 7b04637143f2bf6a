"""What interactions are written as: a figure per word, and a page in which nothing of a caption is markup."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from captum_m2ib.games import Fit, Interactions
from captum_m2ib.games.figure import signed_overlay


def made(caption: str = "a red cross", tokens: tuple[str, ...] = ("a", "red", "cross")) -> Interactions:
    rng = np.random.default_rng(0)
    fit = Fit(0.5, 0.2, rng.normal(size=6), rng.normal(size=len(tokens)), rng.normal(size=(len(tokens), 6)))
    return Interactions(
        image=rng.integers(0, 255, (40, 60, 3), dtype=np.uint8),
        caption=caption,
        tokens=tokens,
        score=0.31,
        score_name="cosine similarity",
        places=np.arange(6).reshape(2, 3),
        fit=fit,
        explained=0.8,
        explained_alone=0.5,
        passes=(700, 12),
        settings={"is_exact": False},
    )


def texts_of(figure: object) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]  # type: ignore[attr-defined]


def test_a_figure_has_the_picture_and_a_panel_per_word():
    figure = made().plot()
    written = texts_of(figure)
    assert {"picture", "what it adds on average"} < set(written)
    assert [text.split("  ")[0] for text in written if re.fullmatch(r"\w+  −?\d.*", text)] == ["a", "red", "cross"]
    assert any("explain 80%" in text and "50%" in text and "700 masked pictures" in text for text in written)
    assert len(made().plot([1]).axes) == len(figure.axes) - 2
    with pytest.raises(ValueError, match="tokens: expected indices of the 3 tokens"):
        made().plot([3])


def test_places_keep_their_edges_and_one_scale_holds_for_all_words():
    found = made()
    grey = replace(found, image=np.full((40, 60, 3), 128, dtype=np.uint8))
    values = np.array([[0.0, 1.0, -1.0], [2.0, -2.0, 0.5]])
    panel = signed_overlay(grey, values, 2.0).reshape(2, 240, 3, 240, 3)
    cells = panel.transpose(0, 2, 1, 3, 4).reshape(6, -1, 3)
    assert (cells == cells[:, :1]).all() and len({tuple(cell[0]) for cell in cells}) == 6
    halved = signed_overlay(grey, values, 4.0).reshape(2, 240, 3, 240, 3)
    assert tuple(halved[1, 0, 0, 0]) == tuple(panel[0, 0, 1, 0])


def test_a_page_escapes_what_a_caption_holds(tmp_path: Path):
    hostile = '</script><script>alert(1)</script>&<img src=x onerror="alert(2)">'
    page = made(hostile, ("<b>", "$data", "</script>")).save(tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2 and page.count("<img") == 1 and "<b>" not in page and "$data" in page
    assert "http" not in re.sub(r"http-equiv", "", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert np.shape(data["across"]) == (3, 6) and data["places"] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("name", "starts"), [("i.png", b"\x89PNG"), ("i.svg", b"<?xml")])
def test_figures_as_files(tmp_path: Path, name: str, starts: bytes):
    assert made().save(tmp_path / name).read_bytes().startswith(starts)


def test_other_endings_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.pdf, \.svg, \.html"):
        made().save(tmp_path / "i.txt")


def test_without_shapiq_its_form_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "shapiq", None)
    with pytest.raises(ImportError, match=r"pip install 'captum_m2ib\[interactions\]'"):
        made().to_shapiq()
