"""Explaining pages for queries: some words' share of the score, tiles laid on the page, pages of several sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import late
import numpy as np
import pytest
import tiny_parts
import torch
import zoo
from PIL import Image

from captum_m2ib import DualEncoder, Explanation, MultiModalInfoBottleneck, compare, explain
from captum_m2ib.encoders.spans import find_span
from captum_m2ib.explanations.compare import Comparison
from captum_m2ib.explanations.methods import _on_page

QUERY = "a chart of the revenue 2024"
FEW = {"n_steps": 2, "n_samples": 2, "check": False}
BAR = {"show_progress": True}
PAGES = [
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    for size in ((40, 64), (64, 40), (40, 40))
]

pytestmark = pytest.mark.filterwarnings("ignore::captum_m2ib.NothingToExplainWarning")


def encoder_of(name: str) -> DualEncoder:
    return zoo.encoder_of(zoo.model_named(name), processor=getattr(late, name)())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("revenue 2024", "revenue 2024"),
        ("REVENUE  2024", "revenue 2024"),
        ("a", "a"),
        ("chart of", "chart of"),
    ],
)
def test_words_are_found_among_the_tokens(words: str, expected: str):
    encoder = encoder_of("colpali")
    pairs = encoder.prepare(PAGES[0], QUERY)
    found = find_span(QUERY, pairs.tokens[0], words)
    assert [token for token, is_word in zip(pairs.tokens[0], found, strict=True) if is_word] == expected.split()


@pytest.mark.parametrize(
    ("tokens", "words", "expected"),
    [
        (["<s>", "▁The", "▁re", "ven", "ue", "▁in", "▁2", "0", "2", "4", "</s>"], "2024", [6, 7, 8, 9]),
        (["[CLS]", "the", "rev", "##enue", "in", "2024", "[SEP]"], "revenue in", [2, 3, 4]),
        (["The</w>", "revenue</w>", "in</w>", "2024</w>"], "the", [0]),
        (["ĠThe", "Ġrevenue", "Ġin", "Ġ20", "24", "Ċ"], "revenue", [1]),
        # Part of a word, where there is no such word.
        (["The", "revenue", "in", "20", "24"], "24", [4]),
    ],
)
def test_words_in_the_tokens_of_many_kinds(tokens: list[str], words: str, expected: list[int]):
    assert [i for i, one in enumerate(find_span("The revenue in 2024", tokens, words)) if one] == expected


def test_words_that_occur_twice_are_found_twice():
    assert find_span("red on red", ["red", "on", "red"], "red") == [True, False, True]


@pytest.mark.parametrize(
    ("caption", "words", "says"),
    [
        ("the revenue", "profit", "the caption does not hold them"),
        ("the revenue", "", "the caption does not hold them"),
        ("the profit", "profit", "its tokens do not spell the caption"),
    ],
)
def test_words_that_cannot_be_found(caption: str, words: str, says: str):
    with pytest.raises(ValueError, match=rf"^tokens: cannot tell which .*{says}"):
        find_span(caption, ["the", "revenue"], words)


@torch.no_grad()
def test_shares_of_all_tokens_sum_to_the_score():
    encoder = encoder_of("colpali")
    pairs = encoder.prepare([PAGES[0], PAGES[1]], [QUERY, "revenue 2025"])
    whole = encoder(*pairs.inputs, *pairs.additional_forward_args)
    shares = torch.zeros(2)
    for place in range(pairs.inputs[1].shape[1]):
        mask = torch.arange(pairs.inputs[1].shape[1]).expand(2, -1) == place
        shares += encoder(*pairs.inputs, *pairs.additional_forward_args, mask)
    torch.testing.assert_close(shares, whole)
    one = encoder.count_tokens(pairs, ["revenue 2024", "revenue"])
    page = encoder.model(**{k: v for k, v in encoder.processor.process_images(PAGES[:2]).items() if k != "labels"})
    query = encoder.model(**encoder.processor.process_queries([QUERY, "revenue 2025"])).embeddings
    matches = (query @ page.embeddings.transpose(1, 2)).amax(-1)
    counted = zip(pairs.tokens, ["revenue 2024", "revenue"], strict=True)
    places = [[token in words.split() for token in row] for row, words in counted]
    expected = (matches * torch.tensor(places)).sum(1)
    torch.testing.assert_close(encoder(*one.inputs, *one.additional_forward_args), expected, rtol=0, atol=1e-5)
    every = encoder.similarities(*one.inputs, *one.additional_forward_args)
    torch.testing.assert_close(every.diagonal(), expected, rtol=0, atol=1e-5)


def test_the_map_of_some_words_is_that_of_their_share():
    encoder = encoder_of("colpali")
    words, whole = (explain(encoder, PAGES[0], QUERY, tokens=t, **FEW)[0] for t in ("revenue 2024", None))
    assert words.score < whole.score and words.score_name == "MaxSim of “revenue 2024”"
    assert whole.score_name == "MaxSim"
    assert not np.allclose(words.image_bits, whole.image_bits)
    pairs = encoder.prepare(PAGES[0], QUERY)
    counted = encoder.count_tokens(pairs, "revenue 2024")
    bits, _ = MultiModalInfoBottleneck(encoder).attribute(
        counted.inputs, additional_forward_args=counted.additional_forward_args, n_steps=2, n_samples=2
    )
    np.testing.assert_allclose(words.image_bits, bits[0].sum(0), rtol=1e-4)


def test_words_of_a_score_without_terms(checkpoint: Path):
    encoder = DualEncoder.from_pretrained(checkpoint)
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"^tokens: CLIPModel scores a caption as a whole.* leave tokens out"):
        explain(encoder, picture, "a red cross", tokens="red")


def test_words_for_each_pair_are_as_many_as_the_pairs():
    encoder = encoder_of("colpali")
    pairs = encoder.prepare(PAGES[:2], QUERY)
    with pytest.raises(ValueError, match=r"^tokens: expected one string for all pairs or one per pair, 2, got 1\."):
        encoder.count_tokens(pairs, ["revenue"])
    with pytest.raises(ValueError, match=r"^tokens: expected at least one real token per pair"):
        encoder.count_tokens(pairs, torch.zeros_like(pairs.inputs[1]))


def test_pages_of_several_sizes_are_explained_one_by_one():
    encoder = encoder_of("colqwen2")
    together = explain(encoder, [PAGES[0], PAGES[2]], [QUERY, "revenue 2025"], tokens="revenue", **FEW)
    alone = explain(encoder, PAGES[2], "revenue 2025", tokens="revenue", **FEW)[0]
    np.testing.assert_array_equal(together[1].image_bits, alone.image_bits)
    # How large they are is the processor's, and other from release to release.
    (low, wide), (high, square) = (one.image_bits.shape for one in together)
    assert low < wide and high == square


@pytest.mark.skipif(tiny_parts.LEGACY, reason="this transformers has no model that reads tiles")
def test_tiles_and_thumbnail_are_laid_on_the_page():
    encoder = encoder_of("colmodernvbert")
    pairs = encoder.prepare(PAGES[0], QUERY)
    bits, _ = MultiModalInfoBottleneck(encoder).attribute(
        pairs.inputs, additional_forward_args=pairs.additional_forward_args, n_steps=2, n_samples=2
    )
    found = explain(encoder, PAGES[0], QUERY, **FEW)[0]
    assert found.image_bits.shape == (40, 64) and found.patch_bits is None
    assert found.image_total_bits == pytest.approx(float(bits.sum()), rel=0.02)
    # A map of one tile lies in its quarter.
    single = torch.zeros_like(bits)
    single[:, 1] = 1.0
    (laid,) = _on_page(pairs, single)
    assert float(laid[:20, 32:].sum() / laid.sum()) > 0.97


def test_files_and_figures_name_the_score(tmp_path: Path):
    found = explain(encoder_of("colpali"), PAGES[0], QUERY, tokens="revenue 2024", **FEW)[0]
    page = found.save(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "MaxSim of “revenue 2024”" in page and "cosine" not in page
    assert Explanation.load(found.save(tmp_path / "page.json")).score_name == found.score_name


def test_comparisons_name_the_score(tmp_path: Path):
    asked = {"tokens": ["chart", "revenue 2024"], "check": False}
    found = compare(encoder_of("colpali"), PAGES[0], [QUERY, QUERY], ["similarity-map"], **asked)
    told = "before each caption: MaxSim of “chart”, MaxSim of “revenue 2024”; each map"
    drawn = " ".join(text.get_text() for text in found.plot().axes[0].texts)
    page = found.save(tmp_path / "page.html").read_text(encoding="utf-8")
    assert told in drawn and told in page and "cosine" not in drawn + page
    # Whoever names a score writes no markup.
    (row,) = found.rows
    named = replace(row.explanations[0], settings={"score": "<b>"})
    page = Comparison((replace(row, explanations=(named,)),)).save(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "before each caption: &lt;b&gt;; each map" in page and "<b>" not in page


def test_a_method_without_a_bar_is_asked_for_none():
    asked = {"method": "similarity-map", "check": False}
    shown, plain = (explain(encoder_of("colpali"), PAGES[0], QUERY, **asked, **bar)[0] for bar in (BAR, {}))
    np.testing.assert_array_equal(shown.image_bits, plain.image_bits)
