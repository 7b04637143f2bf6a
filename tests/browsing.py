"""Pages in a headless Chromium: what they log and ask for is kept."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_DESK, _PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# How long anything that is waited for may take, in milliseconds.
_PATIENCE = 60_000

# Where a browser must be, as in .ci/run, its absence is a failure.
needs_browser = pytest.mark.skipif(
    (CHROMIUM is None or importlib.util.find_spec("playwright") is None) and "M2IB_NEED_BROWSER" not in os.environ,
    reason="there is no Chromium on this machine, or no Playwright",
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; it ends with the block, for an event loop runs in this thread as long as it is open."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "there is no Chromium on this machine"
    # Shared memory is scarce in containers, and a tab that runs out of it ends.
    options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """One page that is looked at."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self._complaints: list[str] = []
        self._requests: list[str] = []
        page.set_default_timeout(_PATIENCE)
        page.on("console", self._logged)
        page.on("pageerror", lambda error: self._complaints.append(str(error)))
        page.on("request", lambda request: self._asked(request.url))

    def _logged(self, message: Any) -> None:
        if message.type in ("error", "warning", "assert"):
            self._complaints.append(message.text)

    def _asked(self, address: str) -> None:
        if not address.startswith(("data:", "about:", "blob:")):
            self._requests.append(address)

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and uncaught exceptions, since the page was opened."""
        self._catch_up()
        return self._complaints

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for, embedded data left out."""
        self._catch_up()
        return self._requests

    def _catch_up(self) -> None:
        """What the browser told before it answers has been heard by then."""
        self.page.evaluate("0")

    def expect(self, expression: str, value: Any) -> None:
        """Wait until a JavaScript expression has a value."""
        found = None
        for _ in range(_PATIENCE // 20):
            found = self.page.evaluate(expression)
            if found == value:
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"{expression} is {found!r}, not {value!r}")


@contextmanager
def visit(browser: Browser, address: str, phone: bool = False) -> Iterator[Visit]:
    """A page in a window of its own, with no memory of others, as on a desk or on a phone."""
    # Without motion nothing is still on its way when it is looked at.
    context = browser.new_context(
        viewport=_PHONE if phone else _DESK, is_mobile=phone, has_touch=phone, reduced_motion="reduce"
    )
    try:
        found = Visit(context.new_page())
        found.page.goto(address)
        yield found
    finally:
        context.close()
