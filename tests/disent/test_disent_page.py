"""The page about a study in a real browser: classes and pictures show, links lead somewhere, nothing is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browsing import needs_browser, visit
from test_disent_command import BACKBONE, KINDS, SOURCE, arguments, draw_set

from captum_m2ib.cli import main

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = needs_browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page about three kinds of drawn pictures."""
    folder = tmp_path_factory.mktemp("page")
    draw_set(folder / "data")
    (folder / "tiny_backbone.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([str(one) for one in arguments(folder / "data", folder / "study")]) == 0
        assert main(["disent", "report", "study", "--backbone", BACKBONE]) == 0
    return Path(folder, "study", "report.html").as_uri()


@pytest.mark.parametrize("phone", [False, True])
def test_every_class_shows_with_its_pictures(browser: Browser, report: str, phone: bool):
    with visit(browser, report, phone) as opened:
        page = opened.page
        for index, kind in enumerate(sorted(KINDS)):
            heading = page.locator(f"#class-{index}")
            heading.scroll_into_view_if_needed()
            assert heading.is_visible() and kind in heading.inner_text()
        pictures = page.locator("svg image, main img")
        assert pictures.count() >= len(KINDS)
        for number in range(pictures.count()):
            box = pictures.nth(number).bounding_box()
            assert box is not None and min(box["width"], box["height"]) > 20
        assert page.evaluate("document.documentElement.scrollWidth") <= (390 if phone else 1280)
        # The name of the first kind is markup, and stays text.
        assert page.locator("main b > b, main bdi > b").count() == 0
        assert opened.complaints == [] and opened.requests == [report]


def test_every_link_leads_to_a_part_of_the_page(browser: Browser, report: str):
    with visit(browser, report) as opened:
        page = opened.page
        links = page.locator("a")
        assert links.count() >= 4
        for number in range(links.count()):
            target = links.nth(number).get_attribute("href") or ""
            assert target.startswith("#"), target
            # The first is out of sight until it has the focus.
            links.nth(number).focus()
            page.keyboard.press("Enter")
            opened.expect("location.hash", target)
            shown = f"document.getElementById({target[1:]!r}).getBoundingClientRect().top < innerHeight"
            opened.expect(shown, True)
        assert opened.complaints == [] and set(opened.requests) == {report}
