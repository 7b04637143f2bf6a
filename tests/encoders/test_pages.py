"""Pages and queries through the processors of late-interaction models: their own scores, and where tiles lie."""

from __future__ import annotations

from typing import Any

import late
import numpy as np
import pytest
import torch
import zoo
from PIL import Image
from torch import Tensor

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck, explain
from captum_m2ib.engine.units import packed_grid

QUERIES = ["revenue 2024", "a chart of the revenue 2025"]
NAMES = [name for name in ("colpali", "colqwen2", "colmodernvbert") if name in {model.name for model in zoo.ZOO}]


def pages() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((40, 64), (64, 40))]


@pytest.fixture(params=NAMES)
def encoder(request: pytest.FixtureRequest) -> DualEncoder:
    return zoo.encoder_of(zoo.model_named(request.param), processor=getattr(late, request.param)())


def own_mean_scores(encoder: DualEncoder, given: list[Image.Image], queries: list[str]) -> Tensor:
    """The same where each side is written by a template: the mean over a query's tokens of their best on the page."""
    processor: Any = encoder.processor
    page = [processor(images=[one], return_tensors="pt") for one in given]
    conversations = [[{"role": "user", "content": [{"type": "text", "text": one}]}] for one in queries]
    query = [processor.apply_chat_template(one, task="query", tokenize=True, return_dict=True) for one in conversations]
    embedded = [
        [
            encoder.model(**{k: torch.as_tensor(v) for k, v in one.items()}, output_dense=False).embeddings[0]
            for one in side
        ]
        for side in (page, query)
    ]
    return torch.tensor([[(q @ p.T).amax(-1).mean() for q in embedded[1]] for p in embedded[0]])


@pytest.mark.skipif("neomme" not in {model.name for model in zoo.ZOO}, reason="of a later transformers")
class TestTemplates:
    @pytest.fixture
    def encoder(self) -> DualEncoder:
        return zoo.encoder_of(zoo.model_named("neomme"), processor=late.neomme())

    @torch.no_grad()
    def test_scores_are_the_models_own(self, encoder: DualEncoder):
        pairs = encoder.prepare(pages(), QUERIES)
        found = encoder(*pairs.inputs, *pairs.additional_forward_args)
        expected = own_mean_scores(encoder, pages(), QUERIES)
        torch.testing.assert_close(found, expected.diagonal(), rtol=0, atol=1e-5)
        every = encoder.similarities(*pairs.inputs, *pairs.additional_forward_args)
        torch.testing.assert_close(every, expected, rtol=0, atol=1e-5)

    def test_a_page_and_its_query_are_explained(self, encoder: DualEncoder):
        wide, tall = explain(encoder, pages(), QUERIES, n_steps=1, n_samples=1, check=False)
        assert wide.patch_bits.shape == (3, 4) and tall.patch_bits.shape == (4, 3)
        assert wide.tokens == ("[query]", "revenue", "2024", "[mask]", "[mask]") and (wide.token_bits > 0).all()
        # Padded below to whole patches.
        np.testing.assert_allclose(wide.region[:4], (0, 0, 64, 48), atol=0.25)

    def test_a_processor_without_a_template_is_told_so(self):
        encoder = zoo.encoder_of(zoo.model_named("neomme"), processor=late.neomme(chat_template=None))
        with pytest.raises(ValueError, match=r"^processor: expected NeoMMEProcessor with a chat template"):
            encoder.prepare(pages(), QUERIES)


def own_scores(encoder: DualEncoder, given: list[Image.Image], queries: list[str]) -> Tensor:
    """As whoever uses the model without this package scores them, pages by queries."""
    processor: Any = encoder.processor
    page, query = processor.process_images(given), processor.process_queries(queries)
    page.pop("labels", None)
    embedded = [encoder.model(**batch).embeddings for batch in (query, page)]
    return processor.score_retrieval(*embedded).T


@torch.no_grad()
def test_scores_are_the_processors_own(encoder: DualEncoder):
    pairs = encoder.prepare(pages(), QUERIES)
    found = encoder(*pairs.inputs, *pairs.additional_forward_args)
    torch.testing.assert_close(found, own_scores(encoder, pages(), QUERIES).diagonal(), rtol=0, atol=1e-5)
    every = encoder.similarities(*pairs.inputs, *pairs.additional_forward_args)
    torch.testing.assert_close(every, own_scores(encoder, pages(), QUERIES), rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_of_several_pages_scores_as_it_does_alone(encoder: DualEncoder):
    pairs = encoder.prepare(pages(), QUERIES)
    for index, (page, query) in enumerate(zip(pages(), QUERIES, strict=True)):
        chosen = pairs.select(slice(index, index + 1))
        assert chosen.captions == (query,) and len(chosen) == 1
        torch.testing.assert_close(
            encoder(*chosen.inputs, *chosen.additional_forward_args), own_scores(encoder, [page], [query])[0]
        )


def test_what_the_model_sees_is_the_page(encoder: DualEncoder):
    pairs = encoder.prepare(pages(), QUERIES)
    for page, seen, region in zip(pages(), pairs.pictures, pairs.regions, strict=True):
        assert region[:4] == (0, 0, *page.size)
        assert np.array_equal(seen, np.asarray(page))


@pytest.mark.filterwarnings("error")
def test_tokens_that_fill_a_query_are_real(encoder: DualEncoder):
    pairs = encoder.prepare(pages()[0], QUERIES[1])
    assert encoder.real_tokens(pairs).all()
    assert sum(pairs.special[0]) >= 10


@pytest.mark.skipif("colmodernvbert" not in NAMES, reason="of a later transformers")
def test_tiles_lie_where_they_were_cut_from():
    encoder = zoo.encoder_of(zoo.model_named("colmodernvbert"), processor=late.colmodernvbert())
    pairs = encoder.prepare(pages()[0], QUERIES[0])
    (tiles,) = pairs.tiles
    quarters = [(x, y, x + 32, y + 20) for y in (0, 20) for x in (0, 32)]
    for region, expected in zip(tiles, [*quarters, (0, 0, 64, 40)], strict=True):
        np.testing.assert_allclose(region[:4], expected, atol=0.25)


def test_packed_patches_are_put_side_by_side():
    encoder = zoo.encoder_of(zoo.model_named("colqwen2"), processor=late.colqwen2())
    layout = encoder.layouts[0]
    pairs = encoder.prepare(pages(), QUERIES)
    arguments = (*pairs.inputs, *pairs.additional_forward_args)
    assert layout.merge == 2 and layout.drops_padding
    for index, page in enumerate(pages()):
        # The mean colour of a patch, as the model received it, against that of the resized page.
        reader = encoder.processor.image_processor
        first = pairs.inputs[0].unflatten(-1, (3, 2, 8, 8))[:, :, 0, 0].mean((2, 3))
        grid = packed_grid(layout, first, arguments, index)
        rows, columns = grid.shape
        resized = np.asarray(page.resize((columns * 8, rows * 8), Image.Resampling.BICUBIC))[..., 0] / 255
        red = (torch.tensor(resized) - reader.image_mean[0]) / reader.image_std[0]
        expected = red.float().unflatten(0, (rows, 8)).unflatten(2, (columns, 8)).mean((1, 3))
        torch.testing.assert_close(grid, expected, rtol=0, atol=0.02)


def test_pages_of_several_sizes_at_once_are_an_error_that_says_so():
    encoder = zoo.encoder_of(zoo.model_named("colqwen2"), processor=late.colqwen2())
    pairs = encoder.prepare([pages()[0], pages()[0].resize((40, 40))], QUERIES)
    with pytest.raises(RuntimeError, match=r"of several sizes .* pass pairs of one size at a time"):
        MultiModalInfoBottleneck(encoder).attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args)
