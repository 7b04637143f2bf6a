import html.parser
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from captum_m2ib.explanations.visualization import (
    at_display_size,
    clean_token,
    format_bits,
    heat_colors,
    overlay,
    pair_figure,
    token_colors,
    token_html,
)


def grey_picture(height=40, width=90):
    return np.full((height, width, 3), 128, np.uint8)


def lightness(picture):
    return np.asarray(picture, dtype=float) @ (0.2126, 0.7152, 0.0722)


class Texts(html.parser.HTMLParser):
    """Collects tags and text, as a browser would see them."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("row, column", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
@pytest.mark.parametrize("size", [(40, 90), (90, 40), (64, 64)])
def test_hot_corner_stays_in_its_corner(row, column, size):
    bits = np.zeros((4, 7))
    bits[row, column] = 2.0
    heat = lightness(overlay(grey_picture(*size), bits))
    corner = np.unravel_index(heat.argmax(), heat.shape)
    assert (corner[0] < size[0] / 4, corner[1] < size[1] / 4) == (row == 0, column == 0)
    assert (corner[0] > size[0] * 0.75, corner[1] > size[1] * 0.75) == (row == -1, column == -1)


def test_overlay_keeps_shape_type_and_input():
    image, bits = grey_picture(30, 50), np.random.default_rng(0).random((3, 5))
    before = image.copy()
    result = overlay(image, bits)
    assert result.shape == image.shape and result.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_more_bits_are_brighter_on_any_picture(shade):
    bits = np.linspace(0, 3, 400)[None]
    row = lightness(overlay(np.full((1, 400, 3), shade, np.uint8), bits))[0]
    assert row[-1] > row[0] + 40
    if shade < 255:
        assert (np.diff(row) > -2).all()


def test_zero_map_shows_the_picture_and_nothing_else():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    empty = overlay(image, np.zeros((2, 3)))
    assert np.corrcoef(lightness(image).ravel(), lightness(empty).ravel())[0, 1] > 0.95
    np.testing.assert_array_equal(empty, overlay(image, np.full((2, 3), -1.0)))


def test_scale_is_the_maximum_and_can_be_fixed():
    image, bits = grey_picture(), np.eye(4)
    np.testing.assert_array_equal(overlay(image, bits), overlay(image, 1024 * bits))
    assert lightness(overlay(image, bits, maximum=4)).max() < lightness(overlay(image, bits)).max()
    one_hot = np.full((10, 10), 0.1)
    one_hot[0, 0] = 100
    assert lightness(overlay(image, one_hot, percentile=95)).mean() > lightness(overlay(image, one_hot)).mean()
    lonely = np.zeros((20, 20))
    lonely[0, 0] = 1
    assert lightness(overlay(image, lonely, percentile=95)).max() > lightness(overlay(image, 0 * lonely)).max()


def test_signed_maps_have_a_colour_of_their_own_below_zero_on_one_scale():
    image, bits = grey_picture(1, 401), np.linspace(-2, 2, 401)[None]
    row = overlay(image, bits, signed=True)[0].astype(int)
    np.testing.assert_array_equal(row[200:], overlay(image, bits)[0, 200:])
    assert row[0, 2] > row[0, 0] + 20 and row[-1, 0] > row[-1, 2] + 20
    brightness = lightness(row[None])[0]
    assert brightness[0] > brightness[100] > brightness[200] < brightness[300] < brightness[400]
    # Half as low is as strong as half as high.
    half = overlay(image, np.where(bits < 0, bits / 2, bits), signed=True)[0].astype(int)
    assert np.abs(half[0] - row[100]).max() <= 2
    colors = heat_colors(33, signed=True)
    np.testing.assert_allclose(colors[16:], heat_colors(17), atol=0.02)
    assert (colors[0] != colors[-1]).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    bits = np.ones((3, 3))
    bits[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 9"):
        overlay(grey_picture(), bits)
    with pytest.raises(ValueError, match="finite"):
        token_html(["a"], [bad])
    with pytest.raises(ValueError, match="image_bits must be finite"):
        pair_figure(grey_picture(), bits, ["a"], [1.0], score=0.1)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_other_pictures_are_refused(image):
    with pytest.raises(ValueError, match=r"image must be a uint8 array of shape \(H, W, 3\)"):
        overlay(image, np.ones((2, 2)))


def test_other_maps_and_options_are_refused():
    with pytest.raises(ValueError, match="sum over channels"):
        overlay(grey_picture(), np.ones((3, 4, 4)))
    with pytest.raises(ValueError, match="percentile"):
        overlay(grey_picture(), np.ones((2, 2)), percentile=0)
    with pytest.raises(ValueError, match="strength"):
        overlay(grey_picture(), np.ones((2, 2)), strength=2)
    with pytest.raises(ValueError, match="one length, got 2, 1 and 2"):
        token_html(["a", "b"], [1.0])


@pytest.mark.parametrize(
    "token, shown",
    [
        ("cat</w>", "cat"),
        ("ca", "ca"),
        ("▁dog", "dog"),
        ("Ġbird", "bird"),
        ("##ing", "ing"),
        ("##", "##"),
        ("#1</w>", "#1"),
        ("<|startoftext|>", "[startoftext]"),
        ("<|endoftext|>", "[endoftext]"),
        ("</s>", "[/s]"),
        ("<pad>", "[pad]"),
        ("[CLS]", "[CLS]"),
        ("</w>", "␣"),
        ("▁", "␣"),
        ("Ġ", "␣"),
        ("", "␣"),
        ("Ċ", "⏎"),
        ("cafÃ©</w>", "café"),
        ("çĭĹ</w>", "狗"),
        ("café", "café"),
        ("犬", "犬"),
        ("<</w>", "<"),
        ("a\u202eb\u200b\x00", "ab\ufffd"),
        ("\ud800", "\ufffd"),
    ],
)
def test_clean_token(token, shown):
    assert clean_token(token) == shown
    assert clean_token(shown) == shown


def test_format_bits():
    values = (0, 0.001, 0.42, 9.99, 9.996, 31.44, 99.96, 1280.4, -0.001, -2)
    expected = ["0", "<0.01", "0.42", "9.99", "10.0", "31.4", "100", "1280", ">-0.01", "-2.00"]
    assert [format_bits(value) for value in values] == expected


def test_html_is_escaped_and_keeps_every_token():
    tokens = ["<script>alert(1)</script>", "&amp;", '" onmouseover="x', "cat</w>", "\u202eevil"]
    page = token_html(tokens, [1, 0.001, 0, 2, 3], [True, False, False, False, False])
    seen = Texts(page)
    assert set(seen.tags) == {"span", "bdi"} and "onmouseover=&quot;" in page
    for token in [*tokens[:4], "evil"]:
        assert token in seen.text
    assert "<0.01" in seen.text and "\u202e" not in page
    assert page.count("dashed") == 1


def test_token_colors_contrast_everywhere():
    def luminance(code):
        color = np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4) @ (
            0.2126,
            0.7152,
            0.0722,
        )

    colors = token_colors(np.linspace(0, 7, 101))
    assert colors[0][0] == "#ffffff"
    for background, ink in colors:
        dark, light = sorted((luminance(background), luminance(ink)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    assert (np.diff([luminance(background) for background, _ in colors]) <= 0).all()
    assert token_colors([0.0, 0.0]) == [("#ffffff", "#000000")] * 2


def test_tokens_below_zero_are_green_on_the_scale_of_the_others():
    low, zero, half, high = (code for code, _ in token_colors([-2.0, 0.0, 1.0, 2.0]))
    assert zero == "#ffffff" and [half, high] == [code for code, _ in token_colors([1.0, 2.0])]
    red, green, blue = (int(low[i : i + 2], 16) for i in (1, 3, 5))
    assert green > red + 40 and green > blue + 20


def test_heat_colors_get_lighter():
    assert (np.diff(lightness(heat_colors(32))) > -0.01).all()
    assert at_display_size(grey_picture(64, 32)).shape == (720, 360, 3)


@pytest.mark.parametrize("patches", [True, False])
@pytest.mark.parametrize("count, size", [(1, (300, 60)), (1, (60, 300)), (10, (64, 64)), (77, (60, 300))])
def test_figure_has_no_text_outside_or_over_other_text(count, size, patches):
    rng = np.random.default_rng(count)
    words = ["a", "$x_1$", "собака", "<b>", "incomprehensibilities", "狗", "w" * 300]
    tokens = [words[i % len(words)] for i in range(count)]
    figure = pair_figure(
        grey_picture(*size),
        rng.random((8, 8)) * 1e-4,
        tokens,
        rng.gamma(0.5, 2000, count),
        score=-0.25,
        caption=" ".join(tokens),
        special=[i == 0 for i in range(count)],
        patch_bits=1000 * rng.random((4, 4)) if patches else None,
    )
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    page, _, _, bar = figure.axes
    ticks = [text for text in bar.get_yticklabels() if bar.get_ylim()[0] <= text.get_position()[1] <= bar.get_ylim()[1]]
    texts = [*page.texts, bar.yaxis.label, *ticks]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    for i, first in enumerate(boxes):
        for second in boxes[i + 1 :]:
            assert not first.padded(-1.5).overlaps(second.padded(-1.5))


def test_figure_says_score_totals_and_units():
    bits = np.full((10, 20), 0.001)
    figure = pair_figure(grey_picture(), bits, ["a", "b"], [0.5, 1.25], score=-0.25, patch_bits=np.zeros((2, 4)))
    words = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert "cosine similarity −0.250" in words and "image 0.20 bits" in words and "text 1.75 bits" in words
    assert "no information anywhere" in words
    assert figure.axes[-1].get_ylabel() == "bits per patch\n(2 × 4 patches)"
    per_pixel = pair_figure(grey_picture(), bits, ["a"], [1.0], score=0.1)
    assert per_pixel.axes[-1].get_ylabel() == "bits per 100 pixels"
    assert per_pixel.axes[-1].get_ylim() == pytest.approx((0, 0.1))


@pytest.mark.parametrize(
    ("unit", "totals", "bar"),
    [
        ("bits", "image 2.00 bits   ·   text −0.50 bits", "bits per 100 pixels"),
        ("score", "image 2 units of the score   ·   text −0.5 units of the score", "units of the score per 100 pixels"),
        ("relative", None, "relative values"),
    ],
)
def test_units_in_figures(unit, totals, bar):
    values = np.full((10, 20), 0.01)
    values[0, :2] -= (0.02, 0.0)
    values[1, 0] += 0.02
    figure = pair_figure(grey_picture(), values, ["a", "b"], [0.5, -1.0], score=0.1, unit=unit)
    words = [text.get_text().replace("-", "−") for text in figure.axes[0].texts]
    assert (totals in words) if totals else not any("image" in word for word in words)
    axes = figure.axes[-1]
    assert axes.get_ylabel() == bar
    low, high = axes.get_ylim()
    assert (low < 0) == (unit != "bits") and (low == pytest.approx(-high) or low == 0)
    assert ("−1.00" in words) if unit == "bits" else ("−1" in words)
    shown = "title=" in token_html(["a"], [-1.0], unit=unit)
    assert shown and {"bits": "bits", "score": "units of the score", "relative": "relative values"}[unit] in (
        token_html(["a"], [-1.0], unit=unit)
    )


def test_nothing_imports_pyplot():
    code = (
        "import sys, numpy as np\n"
        "import captum_m2ib.explanations.explanation, captum_m2ib.explanations.visualization as v\n"
        "heavy = {'PIL', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "v.pair_figure(np.zeros((8, 8, 3), np.uint8), np.ones((2, 2)), ['a'], [1.0], score=0.1)\n"
        "print(sorted(heavy), 'matplotlib.pyplot' in sys.modules)\n"
    )
    # Whatever the package's own __init__ imports is not what is tested here.
    stub = (
        "import sys, types\n"
        "package = types.ModuleType('captum_m2ib')\n"
        "package.__path__ = [PATH]\n"
        "sys.modules['captum_m2ib'] = package\n"
    )
    path = str(Path(sys.modules[overlay.__module__].__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", stub.replace("PATH", repr(path)) + code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[] False", done.stderr
