"""The page of a comparison in a real browser: a row per method, a map per caption, nothing asked for, no markup."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browsing import needs_browser, visit

from captum_m2ib import DualEncoder, compare
from captum_m2ib.scenes import image_probes

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = needs_browser

HOSTILE = "<img src=x onerror=alert(1)></script> cross"
METHODS = ["grad-eclip", "legrad"]


@pytest.fixture(scope="module")
def page(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = DualEncoder.from_pretrained(checkpoint)
    with warnings.catch_warnings():
        # Of words that the model does not know.
        warnings.filterwarnings("ignore", "captions")
        found = compare(encoder, image_probes(1, 0)[0].image, ["a red cross", HOSTILE], METHODS)
    return found.save(tmp_path_factory.mktemp("compared") / "page.html")


def test_every_method_has_a_map_of_every_caption(browser: Browser, page: Path):
    with visit(browser, page.as_uri()) as opened:
        rows = opened.page.locator("h2").all_inner_texts()
        assert [row.split()[0] for row in rows] == METHODS
        widths = "[...row.querySelectorAll('img')].map(picture => picture.naturalWidth > 100)"
        opened.expect(f"[...document.querySelectorAll('.pictures')].map(row => {widths})", [[True, True]] * 2)
        captions = opened.page.locator(".pictures").first.locator("figcaption bdi").all_inner_texts()
        assert captions == ["a red cross", HOSTILE]
        assert opened.page.locator("img[src=x]").count() == 0
        # Captions stand beside each other, methods one below the other.
        boxes = [one.bounding_box() for one in opened.page.locator("figure").all()]
        lefts, tops = ([round(box[side]) for box in boxes if box] for side in ("x", "y"))
        assert lefts[0] == lefts[2] < lefts[1] == lefts[3] and tops[0] == tops[1] < tops[2] == tops[3]
        assert opened.page.locator(".check li").count() >= 2 * len(METHODS)
        assert opened.complaints == [] and opened.requests == [page.as_uri()]


def test_a_phone_needs_no_scrolling_sideways(browser: Browser, page: Path):
    with visit(browser, page.as_uri(), phone=True) as opened:
        opened.expect("document.documentElement.scrollWidth", 390)
