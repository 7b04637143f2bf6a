"""The page in a real browser: sorting, filtering, keys, nothing logged, nothing asked for."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from browsing import Visit, needs_browser, visit
from PIL import Image
from test_report_numbers import HOSTILE, make_audit, make_row

from captum_m2ib.audit import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = needs_browser

IDS = "[...document.querySelectorAll('#cards .card')].map(card => Number(card.dataset.index))"
STATUS = "document.getElementById('status').textContent"
DIALOG = "document.getElementById('detail').open"
FOCUSED = "document.activeElement.dataset.index"


def jpeg(width: int = 48, height: int = 48) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height)).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        make_row(index, score=(index * 37 % 60) / 100, thumbnail=jpeg(48, 30 if index % 2 else 48))
        for index in range(60)
    ]
    rows[5].update(inside_share=0.1, inside_area=0.5, contrast_similarity=0.99, warning="unknown word")
    for index in range(0, 60, 3):
        rows[index].update(image_check="holds", image_margin=0.9, text_check="holds", text_margin=0.5, image_kept=1.0)
    rows[9].update(image_check="fails", image_margin=0.1)
    rows[12].update(text_check="fails", text_margin=-0.2, text_kept=0.5)
    rows[6] = {"row": 6, "id": "bad", "caption": HOSTILE, "error_kind": "image", "error": HOSTILE}
    folder = tmp_path_factory.mktemp("audits")
    other = [make_row(index, score=(index * 37 % 60) / 100 + (0.2 if index == 9 else 0)) for index in range(60)]
    make_audit(folder / "b", other)
    path = write_report(make_audit(folder / "a", rows))
    write_report(folder / "a", folder / "compared.html", compare=folder / "b")
    return path


@pytest.fixture
def opened(browser: Browser, report: Path) -> Iterator[Visit]:
    with visit(browser, report.as_uri()) as page:
        yield page
        assert page.complaints == []
        assert page.requests == [report.as_uri()]


def choose(opened: Visit, identity: str, value: str) -> None:
    """Set a control as a user would."""
    control = opened.page.locator(f"#{identity}")
    if control.evaluate("control => control.tagName") == "SELECT":
        control.select_option(value)
    else:
        control.fill(value)


def test_pairs_are_sorted_and_missing_values_come_last(opened: Visit):
    choose(opened, "sort", "score")
    scores = [(index * 37 % 60) / 100 for index in range(60)]
    expected = sorted((index for index in range(60) if index != 6), key=lambda index: scores[index])
    opened.expect(IDS, expected[:24])
    choose(opened, "order", "down")
    opened.expect(IDS, expected[::-1][:24])
    opened.page.click("#next")
    opened.page.click("#next")
    opened.expect(IDS, [*expected[::-1][48:], 6])
    opened.expect(STATUS, "49–60 of 60 pairs, page 3 of 3")


def test_pairs_are_filtered_and_sorted_by_their_checks(opened: Visit):
    choose(opened, "filter", "check fails")
    opened.expect(IDS, [9, 12])
    choose(opened, "sort", "text_margin")
    opened.expect(IDS, [12, 9])
    opened.page.locator("#cards .card").first.click()
    told = "document.getElementById('detail-body').textContent.includes('fails: hiding what it marks takes −20 % more')"
    opened.expect(told, True)
    choose(opened, "filter", "check weak")
    opened.expect(STATUS, "no pair matches")


def test_pairs_are_filtered(opened: Visit):
    choose(opened, "filter", "error")
    opened.expect(IDS, [6])
    choose(opened, "filter", "warning")
    opened.expect(IDS, [5])
    choose(opened, "filter", "outside")
    opened.expect(IDS, [5])
    choose(opened, "filter", "")
    choose(opened, "search", "BALL17")
    opened.expect(IDS, [17])
    choose(opened, "search", "nothing like it")
    opened.expect(STATUS, "no pair matches")
    choose(opened, "search", "")
    choose(opened, "least", "0.10")
    choose(opened, "most", "0.12")
    opened.expect(f"{IDS}.map(index => index * 37 % 60).sort()", [10, 11, 12])


def test_findings_lead_to_the_gallery(opened: Visit):
    opened.expect("document.querySelectorAll('[data-finding=unchanged] .card').length", 1)
    opened.expect("document.querySelector('[data-show=unchanged]').textContent", "Show it in the gallery")
    opened.page.locator("[data-show=unchanged]").first.click()
    opened.expect(IDS, [5])
    opened.expect("document.getElementById('filter').value", "unchanged")


def test_everything_can_be_done_by_keyboard(opened: Visit):
    opened.page.keyboard.press("/")
    opened.expect("document.activeElement.id", "search")
    opened.page.keyboard.insert_text("ball1")
    opened.expect("document.querySelectorAll('#cards .card').length", 11)
    opened.page.locator("#cards .card").first.focus()
    first = opened.page.evaluate(IDS)
    opened.expect(FOCUSED, str(first[0]))
    opened.page.keyboard.press("ArrowRight")
    opened.expect(FOCUSED, str(first[1]))
    columns = opened.page.evaluate(
        "getComputedStyle(document.getElementById('cards')).gridTemplateColumns.split(' ').length"
    )
    assert 4 <= columns < 10
    opened.page.keyboard.press("ArrowDown")
    opened.expect(FOCUSED, str(first[1 + columns]))
    opened.page.keyboard.press("ArrowUp")
    opened.expect(FOCUSED, str(first[1]))
    opened.page.keyboard.press("Enter")
    opened.expect(DIALOG, True)
    opened.expect("document.getElementById('detail-id').textContent", f"pair-{first[1]} (row {first[1]})")
    opened.page.keyboard.press("ArrowRight")
    opened.expect("document.getElementById('detail-id').textContent", f"pair-{first[2]} (row {first[2]})")
    opened.page.keyboard.press("Escape")
    opened.expect(DIALOG, False)
    opened.expect(FOCUSED, str(first[2]))


def test_pages_are_turned_by_key(opened: Visit):
    opened.page.locator("#cards .card").first.focus()
    opened.page.keyboard.press("]")
    opened.expect(STATUS, "25–48 of 60 pairs, page 2 of 3")
    opened.page.keyboard.press("[")
    opened.expect(STATUS, "1–24 of 60 pairs, page 1 of 3")


def test_every_control_is_reached_by_tab_and_named(opened: Visit):
    opened.page.focus("#search")
    for identity in ("search", "filter", "sort", "order", "least", "most", "heat", "next"):
        opened.expect("document.activeElement.id", identity)
        opened.page.keyboard.press("Tab")
    unnamed = "[...document.querySelectorAll('input,select')].filter(e => !e.labels.length && !e.ariaLabel).length"
    opened.expect(unnamed, 0)


def test_hostile_text_is_text(opened: Visit):
    choose(opened, "filter", "error")
    opened.expect(IDS, [6])
    assert (
        opened.page.evaluate(
            "document.querySelectorAll('img[src=x]').length + document.querySelectorAll('main script').length"
        )
        == 0
    )
    assert "<img src=x" in opened.page.evaluate("document.querySelector('#cards .bad').textContent")
    opened.page.locator("#cards .card").first.click()
    opened.expect(DIALOG, True)
    assert opened.page.evaluate("document.querySelectorAll('#detail-body .view').length") == 0
    assert "</script>" in opened.page.evaluate("document.getElementById('detail-caption').textContent")


def test_the_map_lies_over_its_picture(opened: Visit):
    # The picture's box takes its shape when the picture has been decoded.
    opened.expect("document.querySelector('[data-index=\"1\"] .fit').style.width", "100%")
    shape = """(() => {
        const fit = document.querySelector('[data-index="1"] .fit');
        const [image, canvas] = ['img', 'canvas'].map(name => fit.querySelector(name).getBoundingClientRect());
        return [image.width / image.height, canvas.width - image.width, canvas.height - image.height];
    })()"""
    ratio, wider, higher = opened.page.evaluate(shape)
    assert ratio == pytest.approx(48 / 30, rel=0.02) and abs(wider) < 1 and abs(higher) < 1
    pixels = opened.page.evaluate(
        "[...document.querySelector('[data-index=\"0\"] canvas').getContext('2d').getImageData(0, 0, 2, 2).data]"
    )
    opacities = pixels[3::4]
    # The map is [[0, 1], [2, 4]]: opacity rises with the bits, from none at zero.
    assert opacities[0] == 0 < opacities[1] < opacities[2] < opacities[3]
    opened.page.click("#heat")
    opened.expect("document.querySelectorAll('#cards canvas').length", 0)


def test_two_audits_are_side_by_side(browser: Browser, report: Path):
    compared = report.parent.parent / "compared.html"
    with visit(browser, compared.as_uri()) as opened:
        opened.expect("document.querySelectorAll('#cards .card:first-child .view').length", 2)
        choose(opened, "sort", "change")
        choose(opened, "order", "down")
        opened.expect(f"{IDS}[0]", 9)
        opened.expect("document.querySelectorAll('[data-finding=rose] .card').length", 1)
        opened.page.locator("#cards .card").first.click()
        sides = "[...document.querySelectorAll('#detail-body .side > .series')].map(e => e.textContent)"
        opened.expect(sides, ["A", "B"])
        assert opened.complaints == [] and opened.requests == [compared.as_uri()]


@pytest.mark.parametrize("name", ["a/report.html", "compared.html"])
def test_a_phone_needs_no_scrolling_sideways(name: str, browser: Browser, report: Path):
    with visit(browser, (report.parent.parent / name).as_uri(), phone=True) as opened:
        opened.expect("document.documentElement.scrollWidth", 390)
        opened.page.locator("#cards .card").first.click()
        opened.expect(DIALOG, True)
        opened.expect("document.getElementById('detail').scrollWidth <= 390", True)
        controls = "[...document.querySelectorAll('button, select, input[type=search]')].filter(e => e.offsetHeight)"
        assert opened.page.evaluate(f"Math.min(...{controls}.map(e => e.offsetHeight))") >= 36


def test_thousands_of_pairs_keep_the_page_small(browser: Browser, tmp_path: Path):
    picture = jpeg()
    path = write_report(make_audit(tmp_path / "big", [make_row(i, thumbnail=picture) for i in range(3000)], 1000))
    with visit(browser, path.as_uri(), phone=True) as opened:
        opened.expect(STATUS, "1–24 of 3,000 pairs, page 1 of 125")
        choose(opened, "sort", "score")
        choose(opened, "order", "down")
        opened.expect(f"{IDS}[0]", 2999)
        # What makes a page stall is the number of elements: it does not grow with the pairs.
        assert opened.page.evaluate("document.querySelectorAll('*').length") < 2500
        assert opened.complaints == []
