"""Records for Captum's table of words: scaled, without padding, and harmless whatever a caption holds."""

from __future__ import annotations

import math
import re

import pytest
import torch
from captum.attr import visualization

from captum_m2ib.composition import text_records

TOKENS = [["<|startoftext|>", "a</w>", "<b>x</b>", "<|endoftext|>"], ["<s>", "Ġcat", "</s>", "<pad>"]]
REAL = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
BITS = torch.tensor([[1.0, 2.0, 4.0, 0.0], [0.0, -8.0, 2.0, 0.0]])


def test_values_and_words():
    first, second = text_records(TOKENS, BITS, [0.25, -0.5], REAL)
    assert isinstance(first, visualization.VisualizationDataRecord)
    assert first.word_attributions.tolist() == [0.25, 0.5, 1, 0] and first.attr_score == 7 and first.pred_prob == 0.25
    assert first.raw_input_ids == ["[startoftext]", "a", "&lt;b&gt;x&lt;/b&gt;", "[endoftext]"]
    assert second.word_attributions.tolist() == [0, -1, 0.25] and second.attr_score == -6
    assert second.raw_input_ids == ["[s]", "cat", "[/s]"] and math.isnan(second.convergence_score)


def test_padding_before_the_words():
    (record,) = text_records([["<pad>", "<pad>", "Ġcat", "</s>"]], BITS[1:], [0.0], torch.tensor([[0, 0, 1, 1]]))
    assert record.raw_input_ids == ["cat", "[/s]"] and record.word_attributions.tolist() == [1, 0]


def test_zero_everywhere_stays_zero():
    (record,) = text_records(TOKENS[:1], torch.zeros(1, 4), torch.tensor([0.1]))
    assert record.word_attributions.tolist() == [0, 0, 0, 0]


def test_nothing_of_a_caption_is_markup(capsys: pytest.CaptureFixture[str]):
    tokens = [["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;", '"onmouseover=']]
    records = text_records(tokens, torch.ones(1, 4), [0.0], unit="<i>bits</i>")
    page = visualization.visualize_text(records).data
    capsys.readouterr()
    assert not re.search(r"<(script|img|i)\b", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&amp;lt;" in page and "&quot;onmouseover=" in page
    assert "&lt;i&gt;bits&lt;/i&gt;" in page


@pytest.mark.parametrize(
    ("bits", "scores", "real", "named"),
    [
        (BITS[:, :3], [0, 0], None, "attributions: expected one number per token"),
        (BITS[:1], [0, 0], None, "attributions: expected one number per token"),
        (BITS[..., None], [0, 0], None, "attributions: expected one number per token"),
        (BITS, [0], None, "attributions: expected one number per token"),
        (BITS, [0, 0], REAL[:1], "real: expected which tokens are real"),
        (BITS, [0, 0], REAL[:, :3], "real: expected which tokens are real"),
    ],
)
def test_shapes_that_do_not_fit(bits, scores, real, named):
    with pytest.raises(ValueError, match=rf"{named}, \(2, 4\)"):
        text_records(TOKENS, bits, scores, real)


def test_values_that_are_no_numbers():
    with pytest.raises(ValueError, match="attributions: expected finite numbers"):
        text_records(TOKENS, BITS / 0, [0, 0])
