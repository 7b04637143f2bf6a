"""The picture of app.md: ``python docs/app_picture.py ADDRESS [FILE]``, of what ``captum-m2ib app`` serves there.

It takes the packages of the extras ``app`` and ``test``, and a Chromium.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

CAPTIONS = "here is a yellow moon\na blue star"


def ask(page: Page, address: str) -> None:
    """Explain the first example and another caption, and point at the map."""
    page.goto(address)
    page.locator("tbody tr").first.click()
    page.locator("#picture img").wait_for()
    page.locator("#captions textarea").fill(CAPTIONS)
    page.click("#go")
    page.locator("#download-json").wait_for()
    frame = page.frame_locator("iframe.explanation")
    frame.locator("#view").hover(position={"x": 145, "y": 275})
    frame.locator("#read", has_text="row 6 of 8").wait_for()


def draw(page: Page, path: Path) -> None:
    """The page as a picture of few colours, which is small; mixed, so that heat has no steps."""
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        colours = shot.convert("RGB")
    palette = colours.quantize(256, Image.Quantize.MAXCOVERAGE)
    colours.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def main(address: str, path: Path) -> None:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1040})
        ask(page, address)
        draw(page, path)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "images" / "app.png")
