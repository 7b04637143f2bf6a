"""The similarity map: by hand on every layout of a page, and as one method among the others."""

from __future__ import annotations

import late
import numpy as np
import page_zoo
import pytest
import tiny_parts
import torch
import zoo
from PIL import Image

from captum_m2ib import DualEncoder, SimilarityMap, explain
from captum_m2ib.attr.registry import method_named, unit_of
from captum_m2ib.engine.units import packed_grid

QUERY = "a chart of the revenue 2024"
PAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8))


def encoder_of(name: str) -> DualEncoder:
    return zoo.encoder_of(zoo.model_named(name), processor=getattr(late, name)())


@torch.no_grad()
def matches(encoder: DualEncoder, query: str) -> torch.Tensor:
    """Of each query token, prefix and filling included, with each patch of the page."""
    page, asked = encoder.processor.process_images([PAGE]), encoder.processor.process_queries([query])
    page.pop("labels", None)
    found = encoder.model(**asked).embeddings[0] @ encoder.model(**page).embeddings[0].T
    return found[:, page["input_ids"][0] == page_zoo.IMAGE_TOKEN]


def test_of_a_page_in_one_piece():
    encoder = encoder_of("colpali")
    pairs = encoder.prepare(PAGE, QUERY)
    expected = matches(encoder, QUERY)
    image, text = SimilarityMap(encoder).attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args)
    assert image.shape == pairs.inputs[0].shape and text.shape == pairs.inputs[1].shape
    # Bilinear interpolation keeps the sums of what is above and below zero, and the largest cell.
    mean = expected.mean(0).view(4, 4)
    assert float(image.sum()) == pytest.approx(float(mean.sum()), abs=1e-4)
    pooled = image.sum(1)[0].unflatten(0, (4, 8)).unflatten(2, (4, 8)).sum((1, 3))
    assert np.corrcoef(pooled.flatten(), mean.flatten())[0, 1] > 0.95
    with torch.no_grad():
        score = encoder(*pairs.inputs, *pairs.additional_forward_args)
    torch.testing.assert_close(text.sum(1), score)


@pytest.mark.parametrize(("name", "merged"), [("colpali", 1), ("colqwen2", 2)])
def test_of_each_token(name: str, merged: int):
    encoder = encoder_of(name)
    pairs = encoder.prepare(PAGE, QUERY)
    (found,) = SimilarityMap(encoder).of_tokens(pairs.inputs, pairs.additional_forward_args)
    expected = matches(encoder, QUERY)
    tokens = found[:, ::merged, ::merged]
    torch.testing.assert_close(tokens.flatten(1), expected)
    torch.testing.assert_close(found[:, merged - 1 :: merged, merged - 1 :: merged], tokens)
    some = encoder.count_tokens(pairs, "revenue")
    (found,) = SimilarityMap(encoder).of_tokens(some.inputs, some.additional_forward_args)
    place = pairs.tokens[0].index("revenue")
    torch.testing.assert_close(found[place], tokens[place].repeat_interleave(merged, 0).repeat_interleave(merged, 1))
    assert not found[torch.arange(len(found)) != place].any()


def test_of_some_words():
    encoder = encoder_of("colpali")
    pairs = encoder.count_tokens(encoder.prepare(PAGE, QUERY), "revenue 2024")
    image, text = SimilarityMap(encoder).attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args)
    places = [token in ("revenue", "2024") for token in pairs.tokens[0]]
    assert [value != 0 for value in text[0].tolist()] == places
    mean = matches(encoder, QUERY)[places].mean(0)
    assert float(image.sum()) == pytest.approx(float(mean.sum()), abs=1e-4)


def test_of_packed_patches():
    encoder = encoder_of("colqwen2")
    pairs = encoder.prepare(PAGE, QUERY)
    arguments = (*pairs.inputs, *pairs.additional_forward_args)
    image, _ = SimilarityMap(encoder).attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args)
    grid = packed_grid(encoder.layouts[0], image.sum(2), arguments, 0)
    # A token stands for a block of two by two patches.
    expected = matches(encoder, QUERY).mean(0).view(grid.shape[0] // 2, grid.shape[1] // 2)
    torch.testing.assert_close(grid[::2, ::2], expected)
    torch.testing.assert_close(grid[1::2, 1::2], expected)


@pytest.mark.skipif(tiny_parts.LEGACY, reason="this transformers has no model that reads tiles")
def test_of_tiles():
    encoder = encoder_of("colmodernvbert")
    pairs = encoder.prepare(PAGE, QUERY)
    image, _ = SimilarityMap(encoder).attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args)
    expected = matches(encoder, QUERY).mean(0).view(5, 4)
    torch.testing.assert_close(image[0].sum((1, 2, 3)), expected.sum(1), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"^inputs: expected pages in one piece, got tiles"):
        SimilarityMap(encoder).of_tokens(pairs.inputs, pairs.additional_forward_args)


def test_pairs_are_independent_and_the_batch_may_be_cut():
    encoder = encoder_of("colpali")
    pairs = encoder.prepare([PAGE, PAGE.rotate(180)], [QUERY, "revenue 2025"])
    method = SimilarityMap(encoder)
    whole = method.attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args)
    parts = method.attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args, internal_batch_size=1)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


def test_of_the_page_alone():
    encoder = encoder_of("colpali")
    pairs = encoder.prepare(PAGE, QUERY)
    method, (pixels, ids) = SimilarityMap(encoder), pairs.inputs
    both = method.attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args)
    alone = method.attribute(pixels, additional_forward_args=(ids, *pairs.additional_forward_args))
    torch.testing.assert_close(alone, both[0])


def test_by_name():
    encoder = encoder_of("colpali")
    assert unit_of(method_named("similarity-map", encoder)) == "relative"
    found = explain(encoder, PAGE, QUERY, method="similarity-map", tokens="revenue", check=False)[0]
    assert found.unit == "relative" and found.settings["method"] == "SimilarityMap"
    assert [token for token, value in zip(found.tokens, found.token_bits, strict=True) if value] == ["revenue"]


def test_a_model_without_embeddings_of_tokens():
    with pytest.raises(ValueError, match=r"^forward_func: expected a model of late interaction.* choose another"):
        SimilarityMap(zoo.encoder_of(zoo.model_named("siglip")))
