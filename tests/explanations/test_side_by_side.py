"""Methods and captions side by side, and why one caption rather than another."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from captum_m2ib import ContrastiveInfoBottleneck, DualEncoder, Explanation, compare, explain
from captum_m2ib.attr.registry import METHODS
from captum_m2ib.scenes import CHECKPOINT, image_probes

PROBE, OTHER = image_probes(2, seed=5)
QUICK = {"n_steps": 2, "n_samples": 2}
FEWER = {"m2ib": QUICK, "m2ib-published": QUICK, "rise": {"n_masks": 16}, "nib": {"n_steps": 2}}


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return DualEncoder.from_pretrained(CHECKPOINT)


def test_rows_are_what_each_method_says_alone(encoder: DualEncoder):
    captions = [PROBE.caption, OTHER.caption]
    names = [name for name, one in METHODS.items() if not one.late_only]
    found = compare(encoder, PROBE.image, captions, names, settings=FEWER)
    assert [row.name for row in found.rows] == names
    for row in found.rows:
        alone = explain(encoder, PROBE.image, captions, method=row.name, **FEWER.get(row.name, {}))
        assert row.seconds > 0 and [one.caption for one in row.explanations] == captions
        for one, expected in zip(row.explanations, alone, strict=True):
            np.testing.assert_array_equal(one.image_bits, expected.image_bits)
            assert one.check == expected.check and one.unit == expected.unit


@pytest.mark.parametrize("captions", [[PROBE.caption], [PROBE.caption, "red star " * 30, "<b>$x$</b>"]])
@pytest.mark.filterwarnings("ignore:captions")
def test_nothing_in_the_figure_is_cut_or_drawn_over_something_else(captions: list[str], encoder: DualEncoder):
    figure = compare(encoder, PROBE.image, captions, ["grad-eclip", "nib"]).plot()
    figure.canvas.draw()
    inside = figure.bbox
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1, text.get_text()
        assert inside.y0 <= box.y0 and box.y1 <= inside.y1, text.get_text()
    for i, one in enumerate(boxes):
        for j in range(i):
            assert not (one.shrunk(0.9, 0.9).overlaps(boxes[j].shrunk(0.9, 0.9))), (
                texts[i].get_text(),
                texts[j].get_text(),
            )
    # A map for each method and caption.
    assert len(figure.axes) - 1 == 2 * len(captions)
    drawn = " ".join(text.get_text() for text in texts)
    assert "nib   ·   units of the score" in drawn and "check: image map" in drawn
    assert "before each caption: cosine similarity; each map" in drawn


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_figures_for_papers(ending: str, encoder: DualEncoder, tmp_path: Path):
    found = compare(encoder, PROBE.image, PROBE.caption, ["legrad"], check=False)
    first = found.save(tmp_path / f"a.{ending}").read_bytes()
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[ending]
    assert first.startswith(start) and found.save(tmp_path / f"b.{ending}").read_bytes() == first
    one = found.rows[0].explanations[0]
    assert one.save(tmp_path / f"one.{ending}").read_bytes().startswith(start)
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.pdf, \.svg, \.html, got 'a\.npz'"):
        found.save(tmp_path / "a.npz")


def test_a_page_has_every_map_and_takes_no_caption_for_markup(encoder: DualEncoder, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # words that the model does not know
        found = compare(
            encoder, PROBE.image, [PROBE.caption, "<b>a & b</b>"], ["nib", "legrad"], settings={"nib": {"n_steps": 2}}
        )
    page = found.save(tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 4 and "<b>" not in page and "&lt;b&gt;a &amp; b&lt;/b&gt;" in page
    assert "nib   ·   units of the score" in page and "check: image map" in page and "default-src 'none'" in page


def test_what_cannot_be_compared(encoder: DualEncoder):
    for nothing in ([], "m2ib"):
        with pytest.raises(ValueError, match=r"^methods: expected a list of at least one method"):
            compare(encoder, PROBE.image, PROBE.caption, nothing)
    with pytest.raises(ValueError, match=r"^settings: rise is not among the methods; they are nib"):
        compare(encoder, PROBE.image, PROBE.caption, ["nib"], settings={"rise": {}})
    with pytest.raises(ValueError, match=r"^instead_of: of the methods m2ib alone .*, not 'nib'"):
        explain(encoder, PROBE.image, PROBE.caption, method="nib", instead_of="a star")


def test_why_this_caption_rather_than_that(encoder: DualEncoder, tmp_path: Path):
    rival = "a white ring"
    (one,) = explain(encoder, PROBE.image, PROBE.caption, instead_of=rival, **QUICK)
    right, wrong = (encoder.prepare(PROBE.image, caption) for caption in (PROBE.caption, rival))
    image, tokens = ContrastiveInfoBottleneck(encoder).attribute(
        right.inputs,
        additional_forward_args=(wrong.inputs[1], *right.additional_forward_args, *wrong.additional_forward_args),
        **QUICK,
    )
    np.testing.assert_allclose(one.image_bits, image[0].sum(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.token_bits, tokens[0, : len(one.tokens)], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        scores = [float(encoder(*pairs.inputs, *pairs.additional_forward_args)) for pairs in (right, wrong)]
    assert one.score == pytest.approx(scores[0], abs=1e-5)
    assert one.settings["rival_score"] == pytest.approx(scores[1], abs=1e-5)
    plain = explain(encoder, PROBE.image, PROBE.caption, **QUICK)[0]
    # The rival's score does not depend on the pair's caption.
    np.testing.assert_allclose(one.token_bits, plain.token_bits, rtol=1e-4)
    assert not np.allclose(one.image_bits, plain.image_bits, rtol=1e-2)
    assert one.notes[0].startswith(f"instead of “{rival}” (")
    assert one.notes[1:] == [f"check: {x}" for x in one.check_lines]
    page = one.save(tmp_path / "one.html").read_text()
    assert f"<li>instead of “{rival}” (" in page
    assert Explanation.load(one.save(tmp_path / "one.json")).notes == one.notes
    # In a batch each pair has its own.
    both = explain(encoder, [PROBE.image, OTHER.image], [PROBE.caption, OTHER.caption], instead_of=rival, **QUICK)
    assert both[0].settings["rival_score"] == pytest.approx(scores[1], abs=1e-5) != both[1].settings["rival_score"]
