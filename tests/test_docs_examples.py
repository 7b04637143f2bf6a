"""The Python blocks of the documentation run, page by page, top to bottom; its figures can be drawn, and what its pages
name is there."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import re
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import matplotlib.image
import pytest
import torch
from test_house import FLOORS, PACKAGE

from captum_m2ib.benchmark.speed.ways import WAYS

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
EVERY = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*") if page.suffix in (".md", ".rst"))


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
    # Of the random weights of an own model some have nothing to explain, which is warned of.
    torch.manual_seed(0)
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


def is_there(name: str) -> bool:
    """Whether a dotted name of the package leads to a module, or to something in one."""
    path = name.split(".")
    for length in range(len(path), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(path[:length]))
        except ModuleNotFoundError:
            continue
        for part in path[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_a_name_that_is_not_there_is_found_out():
    assert is_there("captum_m2ib.metrics") and is_there("captum_m2ib.encoders.families.FAMILIES")
    assert not is_there("captum_m2ib.gone") and not is_there("captum_m2ib.metrics.bypass.gone")


@pytest.mark.parametrize("page", ["../README.md", *EVERY])
def test_modules_that_a_page_names_are_there(page: str):
    text = (DOCS / page).read_text(encoding="utf-8")
    names = re.findall(r"\bcaptum_m2ib(?:\.[A-Za-z_]\w*)+", text)
    assert [name for name in names if not is_there(name)] == []
    # Lines of imports, also those of blocks that are not run.
    lines = re.findall(r"^from (captum_m2ib\S*) import ([\w, ]+)$", text, re.M)
    imported = [f"{module}.{name.split(' as ')[0].strip()}" for module, names in lines for name in names.split(",")]
    assert [name for name in imported if not is_there(name)] == []


def test_the_rooms_on_the_page_are_those_of_the_house():
    page = (DOCS / "contributing.md").read_text(encoding="utf-8")
    lines = re.search(r"^\| room \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.M)
    assert lines is not None
    rooms = [re.findall(r"`(\w+)(?:/|\.py)`", line.split("|")[1]) for line in lines[1].splitlines()]
    assert list(map(set, rooms)) == list(FLOORS)


def test_files_that_the_page_for_contributors_names_are_there():
    page = (DOCS / "contributing.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`(\w[\w./]*(?:/|\.(?:py|md)))`", page))
    assert {"engine/layouts.py", "encoders/families.py", "tests/zoo.py"} <= paths
    places = (PACKAGE, DOCS.parent)
    # A benchmark's own command, whatever its folder is called.
    assert [path for path in paths - {"command.py"} if not any((place / path).exists() for place in places)] == []


def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_figures", DOCS / "figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_are_drawn_from_the_method(tmp_path: Path):
    figures().main(tmp_path)
    for name in ("channel.png", "descent.png", "rivals.png", "cost.png", "sound.png", "video.png"):
        drawn, kept = (matplotlib.image.imread(folder / name) for folder in (tmp_path, DOCS / "images"))
        # Fonts and rounding differ from machine to machine; another method would not stay this close.
        assert drawn.shape == kept.shape
        assert float(abs(drawn - kept).mean()) < 0.05


def test_the_chart_of_costs_shows_what_was_measured():
    tables = {}
    for name in ("speed", "quality"):
        with (DOCS / "images" / f"{name}.csv").open(encoding="utf-8", newline="") as lines:
            tables[name] = list(csv.DictReader(lines))
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    ways = {row["way"]: row for row in tables["speed"]}
    for name, row in ways.items():
        told = f"{re.escape(WAYS[name].title.format(batch=8))} +{float(row['gflop']):.0f} "
        assert re.search(f"^{told}", page, re.M), told
    measured = {(row["method"], row["figure"]): row for row in tables["quality"]}
    drawn = 0
    for axes in figures().cost().axes:
        for bar, dot in pairwise(axes.get_lines()):
            if ", " not in str(dot.get_label()):
                continue
            name, figure = str(dot.get_label()).split(", ")
            row = measured[ways[name]["method"], figure]
            assert [float(*dot.get_xdata()), float(*dot.get_ydata()), *map(float, bar.get_ydata())] == [
                float(ways[name]["gflop"]),
                *(float(row[column]) for column in ("mean", "low", "high")),
            ]
            drawn += 1
    assert drawn == len(measured)


def test_the_chart_of_rivals_shows_the_table():
    with (DOCS / "images" / "rivals.csv").open(encoding="utf-8", newline="") as lines:
        kept = {(row["method"], row["figure"]): (row["mean"], row["low"], row["high"]) for row in csv.DictReader(lines)}
    page = (DOCS / "benchmark.md").read_text(encoding="utf-8")
    table = re.search(r"^\| method \| image: pointing.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.M)
    assert table is not None
    listed = {}
    for line in table[1].splitlines():
        head, *cells = line.strip("| ").split(" | ")
        (method,) = re.findall(r"`(\S+)`", head)
        for figure, cell in zip(figures().PANELS, cells, strict=True):
            listed[method, figure] = tuple(re.findall(r"[\d.]+", cell))
    assert listed == kept

    drawn = {}
    for axes in figures().rivals().axes:
        lines = axes.get_lines()
        for bar, dot in pairwise(lines):
            if ", " in str(dot.get_label()):
                values = (*dot.get_xdata(), *bar.get_xdata())
                drawn[tuple(str(dot.get_label()).split(", "))] = tuple(f"{value:.3f}" for value in values)
    assert drawn == kept
