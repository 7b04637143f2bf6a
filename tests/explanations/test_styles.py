"""Figures for papers: a line round the top share, colours for any print and eye, and what Captum draws of the map."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captum.attr import visualization
from matplotlib.patches import Rectangle
from PIL import Image

from captum_m2ib import DualEncoder, Explanation, explain
from captum_m2ib.cli import main
from captum_m2ib.explanations.visualization import heat_colors, top_share
from captum_m2ib.scenes import CHECKPOINT, image_probes


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    probe = image_probes(1, seed=5)[0]
    return explain(DualEncoder.from_pretrained(CHECKPOINT), probe.image, probe.caption, n_steps=2, check=False)[0]


def test_the_top_share_is_the_smallest_area_that_holds_it():
    values = np.array([[4.0, -9.0], [3.0, 2.0], [1.0, 0.0]])
    assert [top_share(values, share) for share in (0.3, 0.4, 0.5, 0.7, 0.95)] == [4, 4, 3, 3, 1]
    assert top_share(-values.clip(min=0), 0.5) == np.inf
    with pytest.raises(ValueError, match="share: expected a number between 0 and 1, got 1"):
        top_share(values, 1)


def test_colours_survive_a_grey_print_and_colour_blindness():
    lightness = heat_colors(32, palette="safe") @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) > 0).all()
    colors = heat_colors(33, signed=True, palette="safe")
    # Without the difference of red and green, blue against yellow is left.
    assert (colors[:8, 2] > colors[:8, :2].max(1)).all() and (colors[-8:, 2] < colors[-8:, :2].min(1)).all()


def test_a_line_lies_round_the_top_share(explanation: Explanation):
    axes = explanation.plot(style="contour", share=0.6).axes
    assert [len(one.collections) for one in axes[1:]] == [0, 2]
    level = axes[2].collections[0].levels[0]
    assert 0 < level < explanation.image_bits.max() * 10_000
    plain = explanation.plot().axes
    assert len(plain) == len(axes) + 1 and not plain[2].collections
    with pytest.raises(ValueError, match="style: expected one of heat, safe, contour, got 'heatmap'"):
        explanation.plot(style="heatmap")


def test_what_the_model_saw_is_framed_in_the_whole_picture():
    whole = np.zeros((64, 128, 3), dtype=np.uint8)
    given = {
        "image": whole[:, 32:96],
        "image_bits": np.ones((8, 8)),
        "patch_bits": None,
        "region": (32, 0, 96, 64, 128, 64),
    }
    pair = {"caption": "a", "tokens": ("a",), "special": (False,), "token_bits": [1.0], "score": 0.5, "settings": {}}
    frames = [
        patch for patch in Explanation(**given, **pair).plot(whole).axes[2].patches if isinstance(patch, Rectangle)
    ]
    assert len(frames) == 2
    left, right = frames[0].get_x() + 0.5, frames[0].get_x() + 0.5 + frames[0].get_width()
    assert (left / 720, right / 720) == pytest.approx((0.25, 0.75))
    assert not Explanation(**given, **pair).plot().axes[2].patches


def test_captum_draws_the_same_map(explanation: Explanation):
    bits = explanation.image_bits
    _, axes = visualization.visualize_image_attr(
        bits[..., None], method="heat_map", sign="positive", outlier_perc=0, use_pyplot=False
    )
    drawn = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(drawn, bits / bits.max(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("style", "ending"), [("safe", "svg"), ("contour", "svg"), ("safe", "html")])
def test_styles_are_saved(explanation: Explanation, style: str, ending: str, tmp_path: Path):
    usual = explanation.save(tmp_path / f"usual.{ending}").read_text()
    found = explanation.save(tmp_path / f"styled.{ending}", style=style).read_text()
    assert found != usual
    assert ("lie inside the line" in figure_texts(explanation.plot(style=style))) == (style == "contour")


def figure_texts(figure: Any) -> str:
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_what_has_no_such_style_is_refused(explanation: Explanation, tmp_path: Path):
    for name, style, says in (
        ("a.html", "contour", "style: a page is drawn as one of heat, safe, got 'contour'; save a figure"),
        ("a.npz", "safe", "style: .npz holds numbers"),
        ("a.json", "safe", "style: .json holds numbers"),
        ("a.png", "red", "style: expected one of heat, safe, contour, got 'red'"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            explanation.save(tmp_path / name, style=style)
    assert not list(tmp_path.iterdir())


def test_the_command_draws_in_a_style(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64), (200, 30, 30)).save(picture)
    quick = ["--model", str(checkpoint), "--method", "legrad", "--no-check"]
    for style in ("heat", "safe", "contour"):
        given = ["explain", str(picture), "a red cross", *quick, "--style", style]
        assert main([*given, "--output", str(tmp_path / f"{style}.svg")]) == 0
    assert len({(tmp_path / f"{style}.svg").read_bytes() for style in ("heat", "safe", "contour")}) == 3
    capsys.readouterr()
    for arguments, says in (
        (
            ["a red cross", "--output", str(tmp_path / "a.html"), "--style", "contour"],
            "--style contour: is for a figure",
        ),
        (["a red cross", "a star", "--style", "safe"], "--style: is for the figure or page of one explanation"),
    ):
        assert main(["explain", str(picture), *arguments, *quick]) == 2
        assert says in capsys.readouterr().err
