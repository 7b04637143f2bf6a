"""The page of examples shows every method's map of every example."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captum_m2ib import DualEncoder
from captum_m2ib.benchmark.figure_page import COLUMNS, Example, make_examples, write_page
from captum_m2ib.benchmark.methods import METHODS


def example(names: list[str], tokens: tuple[str, ...] = ("a", "red", "cross")) -> Example:
    rng = np.random.default_rng(0)
    mask = np.zeros((16, 16), dtype=bool)
    mask[4:9, 4:9] = True
    maps = {name: (mask * 1.0 + 0.1 * rng.random((16, 16)), np.arange(len(tokens)) - 1.0) for name in names}
    return Example(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8), "a red cross", mask, tokens, maps)


def drawn(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_every_map_is_drawn_where_the_last_one_ends(tmp_path: Path):
    sizes = {}
    for count in (1, COLUMNS - 1, COLUMNS):
        write_page(tmp_path / "page.png", [example([f"method {i}" for i in range(count)])])
        sizes[count] = drawn(tmp_path / "page.png").shape
    one, full, broken = sizes.values()
    assert one[1] < full[1] == broken[1] and one[0] == full[0] < broken[0]
    assert os.listdir(tmp_path) == ["page.png"]


def test_a_hot_place_is_bright_and_the_margin_white(tmp_path: Path):
    write_page(tmp_path / "page.png", [example(["a", "b"])] * 2, "a title")
    page = drawn(tmp_path / "page.png")
    assert (page[:20] == 255).all() and (page[:, :20] == 255).all() and (page[-10:] == 255).all()
    # Hot colours, which neither text nor the edges have.
    hot = (page[..., 0] > 200) & (page[..., 0] - page[..., 2] > 60)
    assert hot.mean() > 0.01


@pytest.mark.parametrize("tokens", [(), ("word",) * 40, ("incomprehensibilities" * 3,), ("$x^2$", "</b>", "漢字")])
def test_any_caption_can_be_drawn(tmp_path: Path, tokens: tuple[str, ...]):
    write_page(tmp_path / "page.png", [example(["a"], tokens)])
    assert drawn(tmp_path / "page.png").std() > 10


def test_a_map_of_nothing_can_be_drawn(tmp_path: Path):
    one = example(["a"])
    empty = Example(one.picture, one.caption, one.mask & False, one.tokens, {"a": (np.zeros((16, 16)), np.zeros(3))})
    write_page(tmp_path / "page.png", [empty])
    assert drawn(tmp_path / "page.png").std() > 10


def test_without_examples_there_is_no_page(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^examples: expected at least one"):
        write_page(tmp_path / "page.png", [])
    assert os.listdir(tmp_path) == []


def test_examples_hold_each_method_s_maps_of_words(checkpoint: Path):
    encoder: Any = DualEncoder.from_pretrained(checkpoint)
    methods = [METHODS["relevance"], METHODS["centre"]]
    found = make_examples(encoder, methods, seed=3, each=1)
    assert [list(one.maps) for one in found] == [["relevance", "centre"]] * 2
    for one in found:
        assert one.tokens == tuple(one.caption.replace(",", " ,").split())
        assert all(image.shape == (64, 64) and len(text) == len(one.tokens) for image, text in one.maps.values())
        assert one.mask.any() and one.picture.shape == (64, 64, 3)
    assert (found[0].maps["centre"][1] == 1).all()
