"""The Python blocks of the documentation run, page by page, top to bottom, and its figures can be drawn."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.image
import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
# captum.md has a test of its own; the others show fragments, for models and data that the reader has.
ELSEWHERE = {"captum.md", "audit.md", "models.md"}
# It trains a classifier, two heads and a zero-shot one.
TRAINS = {"disent.md"}
PAGES = sorted(
    str(page.relative_to(DOCS))
    for page in DOCS.rglob("*.md")
    if page.name not in ELSEWHERE and "```python" in page.read_text(encoding="utf-8")
)


class Block(NamedTuple):
    line: int
    code: str
    reason: str | None


def blocks(text: str) -> list[Block]:
    """The Python blocks of a page: first line, code, and why one is not run, if it says so."""
    fence = re.compile(r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n\n?)?```python\n(?P<code>.*?)^```", re.M | re.S)
    return [Block(text[: m.start("code")].count("\n") + 1, m["code"], m["reason"]) for m in fence.finditer(text)]


def test_pages_are_found():
    assert {"index.md", "guides/explain.md", "guides/own-model.md", "guides/metrics.md"} <= set(PAGES)


def test_a_reason_keeps_a_block_from_running():
    text = "<!-- not run: it fetches -->\n```python\nfetch()\n```\n\n```python\nx = 1\n```\n"
    assert blocks(text) == [Block(3, "fetch()\n", "it fetches"), Block(7, "x = 1\n", None)]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in TRAINS else []) for page in PAGES]
)
def test_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = blocks((DOCS / page).read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in found:
        if block.reason is None:
            # Errors are reported at the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, f"docs/{page}", "exec"), namespace)
    assert any(block.reason is None for block in found)
    encoder = namespace.get("encoder")
    if isinstance(encoder, torch.nn.Module):
        assert all(parameter.grad is None and parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("page", ["../README.md", *sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))])
def test_links_lead_somewhere(page: str):
    """Relative links work on a code host, which knows nothing of the site."""
    text = re.sub(r"^```.*?^```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [t for t in targets if t.partition("#")[0] and not ((DOCS / page).parent / t.partition("#")[0]).exists()]
    assert missing == []


def test_every_page_is_in_the_site():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    trees = "".join(re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.M | re.S))
    listed = set(re.findall(r"^(?:[^:\n]+ <)?([\w/-]+)>?$", trees, re.M))
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*") if page.suffix in (".md", ".rst")}
    assert listed == pages - {"index"}


def test_the_figures_are_drawn_from_the_method(tmp_path: Path):
    spec = importlib.util.spec_from_file_location("docs_figures", DOCS / "figures.py")
    assert spec is not None and spec.loader is not None
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    figures.main(tmp_path)
    for name in ("channel.png", "descent.png"):
        drawn, kept = (matplotlib.image.imread(folder / name) for folder in (tmp_path, DOCS / "images"))
        # Fonts and rounding differ from machine to machine; another method would not stay this close.
        assert drawn.shape == kept.shape
        assert float(abs(drawn - kept).mean()) < 0.05
