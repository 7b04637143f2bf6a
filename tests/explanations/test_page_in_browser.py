"""The saved page of an explanation in a real browser: slider, numbers of patches, clicks on tokens, no scripts."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from browsing import Visit, needs_browser, visit
from PIL import Image

from captum_m2ib import Explanation
from captum_m2ib.encoders.regions import Region
from captum_m2ib.explanations.page import to_html

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = needs_browser

READ = "document.getElementById('read').textContent"
TITLE = "document.getElementById('title').textContent"
PATCHES = np.arange(12, dtype=np.float32).reshape(3, 4)
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


def make(**changes) -> Explanation:
    picture = np.zeros((60, 80, 3), dtype=np.uint8)
    picture[:30] = 200
    fields = {
        "image": picture,
        "caption": HOSTILE,
        "tokens": ("a", "</script>", "dog"),
        "special": (False, False, True),
        "score": 0.5,
        "image_bits": np.kron(PATCHES, np.ones((2, 2), np.float32)) / 4,
        "patch_bits": PATCHES,
        "token_bits": np.array([1, 2, 3], np.float32),
        "settings": {"method": HOSTILE},
    }
    return Explanation(**{**fields, **changes})


# Token 1 acts with the patch in the middle, token 2 against the last one.
INTERACTIONS = np.zeros((3, 3, 4))
INTERACTIONS[1, 1, 1] = 0.25
INTERACTIONS[2, 2, 3] = -0.5


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Visit]:
    path = tmp_path / "page.html"
    path.write_bytes(to_html(make(), interactions=INTERACTIONS))
    with visit(browser, path.as_uri()) as page:
        yield page
        assert page.complaints == []
        assert page.requests == [path.as_uri()]


def point_at(opened: Visit, across: float, down: float) -> None:
    box = opened.page.locator("#view").bounding_box()
    assert box is not None
    opened.page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])


def test_a_patch_says_its_number(opened: Visit):
    hint = opened.page.evaluate(READ)
    point_at(opened, 0.63, 0.4)
    opened.expect(READ, "patch, row 2 of 3, column 3 of 4: 6.00 bits")
    point_at(opened, 0.9, 0.9)
    opened.expect(READ, "patch, row 3 of 3, column 4 of 4: 11.0 bits; most with “dog” −0.5")
    point_at(opened, 0.63, 0.4)
    frame, view = (opened.page.locator(name).bounding_box() for name in (".cell", "#view"))
    assert frame is not None and view is not None
    assert (frame["x"] - view["x"]) / view["width"] == pytest.approx(0.5, abs=0.01)
    assert frame["height"] / view["height"] == pytest.approx(1 / 3, abs=0.01)
    opened.page.mouse.move(1, 1)
    opened.expect(READ, hint)


def test_patches_are_reached_by_key(opened: Visit):
    opened.page.focus("#view")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowUp"):
        opened.page.keyboard.press(key)
    opened.expect(f"{READ}.startsWith('patch, row 1 of 3, column 2 of 4: 1.00 bits')", True)


def test_the_slider_fades_the_map_and_not_the_picture(opened: Visit):
    def colour() -> list[int]:
        shot = opened.page.locator("#view").screenshot()
        with Image.open(io.BytesIO(shot)) as picture:
            return list(picture.convert("RGB").getpixel((picture.width // 8, picture.height // 6)))

    # The first patch has no bits: the picture is 200 there, and the map shows it dimmed.
    assert max(colour()) < 130
    opened.page.locator("#strength").fill("0")
    assert min(colour()) > 190


def test_a_token_shows_its_patches_and_its_own_scale(opened: Visit):
    before = opened.page.evaluate(TITLE)
    opened.page.locator("#tokens > span").nth(1).click()
    opened.expect(TITLE, "what acts together with “</script>”")
    opened.expect("[...document.getElementById('scale').children].map(e => e.textContent)[2]", "0.25")
    pixels = opened.page.evaluate(
        "[...document.querySelector('#view canvas').getContext('2d').getImageData(0,0,4,3).data]"
    )
    opacity = np.array(pixels).reshape(3, 4, 4)[..., 3]
    assert opacity[1, 1] > 200 and np.count_nonzero(opacity) == 1
    point_at(opened, 0.3, 0.5)
    opened.expect(READ, "patch, row 2 of 3, column 2 of 4: 5.00 bits; with “</script>” +0.25")
    opened.page.locator("#tokens > span").nth(2).focus()
    opened.page.keyboard.press("Enter")
    opened.expect(READ, "patch, row 2 of 3, column 2 of 4: 5.00 bits; with “dog” 0")
    pressed = "[...document.querySelectorAll('#tokens > span')].map(e => e.getAttribute('aria-pressed'))"
    opened.expect(pressed, ["false", "false", "true"])
    opened.page.keyboard.press("Escape")
    opened.expect(TITLE, before)
    opened.expect("document.querySelectorAll('#view canvas').length", 0)


def test_tokens_are_no_buttons_without_interactions(browser: Browser, tmp_path: Path):
    path = make(patch_bits=None).save(tmp_path / "page.html")
    with visit(browser, path.as_uri()) as opened:
        opened.expect("document.querySelectorAll('#tokens [role=button]').length", 0)
        assert not opened.page.locator("#how").is_visible()
        # Without patches the map is read in parts of it: here, of 6 x 8 pixels, each is one.
        point_at(opened, 0.99, 0.99)
        opened.expect(READ, "part, row 6 of 6, column 8 of 8: 2.75 bits")
        assert opened.complaints == []


def test_on_the_whole_picture_patches_lie_where_the_model_looked(browser: Browser, tmp_path: Path):
    whole = np.zeros((60, 160, 3), dtype=np.uint8)
    path = make(region=Region(80, 0, 160, 60, 160, 60)).save(tmp_path / "page.html", whole)
    with visit(browser, path.as_uri()) as opened:
        hint = opened.page.evaluate(READ)
        point_at(opened, 0.25, 0.5)
        opened.expect(READ, hint)
        point_at(opened, 0.51, 0.1)
        opened.expect(READ, "patch, row 1 of 3, column 1 of 4: 0 bits")


def test_without_scripts_the_map_is_there(browser: Browser, tmp_path: Path):
    path = make().save(tmp_path / "page.html")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("#view img").is_visible() and not page.locator("#tools").is_visible()
    context.close()


@pytest.mark.parametrize("wrong", [np.zeros((3, 3, 3)), np.full((3, 3, 4), np.nan)])
def test_interactions_that_do_not_fit_are_refused(wrong: np.ndarray):
    with pytest.raises(ValueError, match=r"^interactions: expected finite numbers of shape \(3, 3, 4\)"):
        to_html(make(), interactions=wrong)
