"""The page of interactions in a real browser: words show their patches, patches their words, by pointer and by key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from browsing import Visit, needs_browser, visit

from captum_m2ib.games import Fit, Interactions

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = needs_browser

HOSTILE = "</script><img src=x onerror=alert(1)>"
STATE = "document.getElementById('state').textContent"
VALUES = "[...document.querySelectorAll('#words .value')].map(e => e.textContent)"
PRESSED = "[...document.querySelectorAll('#words button')].map(e => e.getAttribute('aria-pressed'))"
# How much of the map covers the middle of each patch, row by row.
COVER = """(() => {
    const canvas = document.querySelector('#picture canvas');
    // Of a copy: the browser complains where what is drawn is read again and again.
    const ink = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', { willReadFrequently: true });
    ink.drawImage(canvas, 0, 0);
    return [0, 1].map(row => [0, 1, 2].map(column => ink.getImageData(
        (column + 0.5) * canvas.width / 3, (row + 0.5) * canvas.height / 2, 1, 1).data[3] > 0));
})()"""


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Visit]:
    across = np.zeros((3, 6))
    across[1, 4], across[2, 0], across[2, 4] = 0.5, -0.25, 0.125
    picture = np.array([0.1, 0, 0, 0, -0.2, 0])
    found = Interactions(
        image=np.full((40, 60, 3), 90, dtype=np.uint8),
        caption=f"a red {HOSTILE}",
        tokens=("a", "red", HOSTILE),
        score=0.31,
        score_name="cosine similarity",
        places=np.arange(6).reshape(2, 3),
        fit=Fit(0.5, 0.2, picture, np.array([0.01, 0.02, -0.03]), across),
        explained=0.8,
        explained_alone=0.5,
        passes=(700, 12),
        settings={"is_exact": False},
    )
    path = found.save(tmp_path / "page.html")
    with visit(browser, path.as_uri()) as page:
        yield page
        assert page.complaints == []
        assert page.requests == [path.as_uri()]


def patch_at(opened: Visit, row: int, column: int) -> None:
    box = opened.page.locator("#picture canvas").bounding_box()
    assert box is not None
    opened.page.mouse.click(box["x"] + (column + 0.5) * box["width"] / 3, box["y"] + (row + 0.5) * box["height"] / 2)


def test_a_word_marks_its_patches(opened: Visit):
    opened.expect(COVER, [[True, False, False], [False, True, False]])
    words = opened.page.locator("#words button")
    words.nth(1).click()
    opened.expect(PRESSED, ["false", "true", "false"])
    opened.expect(COVER, [[False, False, False], [False, True, False]])
    assert "its patches with “red”" in opened.page.evaluate(STATE)
    # A second word comes beside the first, and goes again.
    words.nth(2).click()
    opened.expect(COVER, [[True, False, False], [False, True, False]])
    words.nth(1).click()
    words.nth(2).click()
    opened.expect(PRESSED, ["false"] * 3)


def test_a_patch_gives_its_words_numbers(opened: Visit):
    opened.expect(VALUES, ["0.010", "0.020", "−0.030"])
    patch_at(opened, 1, 1)
    opened.expect(VALUES, ["0.0", "0.50", "0.13"])
    assert "each with patch 4, which adds −0.20 on average" in opened.page.evaluate(STATE)
    patch_at(opened, 0, 0)
    opened.expect(VALUES, ["0.0", "0.0", "−0.25"])
    patch_at(opened, 0, 0)
    opened.expect(VALUES, ["0.010", "0.020", "−0.030"])
    patch_at(opened, 1, 1)
    opened.page.locator("#words button").first.click()
    opened.page.click("#clear")
    opened.expect(VALUES, ["0.010", "0.020", "−0.030"])
    opened.expect(PRESSED, ["false"] * 3)


def test_patches_are_reached_by_key_and_the_caption_is_text(opened: Visit):
    opened.page.focus("#picture")
    for key in ("ArrowDown", "ArrowRight", "Enter"):
        opened.page.keyboard.press(key)
    opened.expect(VALUES, ["0.0", "0.50", "0.13"])
    assert opened.page.locator("h1").inner_text() == f"a red {HOSTILE}"
    assert opened.page.locator("img[src=x]").count() == 0


def test_a_phone_needs_no_scrolling_sideways(browser: Browser, opened: Visit):
    with visit(browser, opened.page.url, phone=True) as small:
        small.expect("document.documentElement.scrollWidth", 390)
