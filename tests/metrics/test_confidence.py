"""Confidence drop and increase against scores that are sums, so that every masked score is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from captum_m2ib.metrics import Confidence, image_confidence, published_token_confidence, token_confidence

MAP = torch.tensor([[0, 1, 2, 0], [0, 4, 4, 0], [1, 0, 3, 0], [4, 0, 0, 1]], dtype=torch.float64)[None]
WEIGHTS = torch.zeros(4, 4)
WEIGHTS[1:3, 1:3] = 0.25


def score(pixels: Tensor, scale: Tensor | None = None) -> Tensor:
    """Mean of the centre, of which a picture of ones has 1."""
    value = (pixels.mean(1) * WEIGHTS.to(pixels)).sum((1, 2))
    return value if scale is None else value * scale


class Words(nn.Module):
    """A caption's score: ten times the row of its first end token, and the sum of all rows, real ones counted twice."""

    def __init__(self, vocabulary: int = 20) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 1)
        self.other = nn.Embedding(vocabulary, 1)
        with torch.no_grad():
            self.embed.weight.copy_(torch.arange(float(vocabulary))[:, None])
        self.seen: list[list[int]] = []

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        self.seen += ids.tolist()
        rows = self.embed(ids).squeeze(-1)
        ends = (ids == 19).int().argmax(1)
        return pixels.flatten(1)[:, 0] + 10 * rows.gather(1, ends[:, None])[:, 0] + (rows * (1 + mask)).sum(1)


IDS = torch.tensor([[18, 5, 7, 5, 3, 19], [18, 2, 4, 19, 0, 0]])
MASK = (IDS > 0).long()
MASKABLE = torch.tensor([[False, True, True, True, True, False], [False, True, True, False, False, False]])
BITS = torch.tensor([[9.0, 0.0, 4.0, 1.0, 2.0, 9.0], [9.0, 3.0, 1.0, 9.0, 0.0, 0.0]])
PIXELS = torch.ones(2, 1, 1, 1)


def test_by_hand():
    # Scaled to [0, 1] the centre of the map is 1, 1, 0, 0.75.
    found = image_confidence(score, torch.ones(1, 3, 4, 4), MAP)
    assert float(found.original) == 1 and float(found.masked) == pytest.approx(0.6875)
    assert float(found.confidence_drop) == pytest.approx(31.25)
    assert float(found.average_drop) == pytest.approx(31.25)
    assert float(found.confidence_increase) == 0


def test_the_relative_drop_is_of_the_score_and_the_published_one_is_not():
    scale = torch.tensor([1.0, 0.5, -1.0])
    found = image_confidence(score, torch.ones(3, 3, 4, 4), MAP.repeat(3, 1, 1), scale)
    assert found.confidence_drop.tolist() == pytest.approx([31.25, 15.625, 0])
    assert found.average_drop[:2].tolist() == pytest.approx([31.25, 31.25]) and math.isnan(found.average_drop[2])
    assert found.confidence_increase.tolist() == [0, 0, 100]


def test_an_oracle_drops_nothing_and_its_opposite_everything():
    pixels = torch.ones(1, 3, 4, 4)
    assert float(image_confidence(score, pixels, (WEIGHTS > 0)[None] + 0.0).confidence_drop) == 0
    assert float(image_confidence(score, pixels, (WEIGHTS == 0)[None] + 0.0).confidence_drop) == 100


def test_a_random_map_keeps_the_mean_of_its_values():
    maps = torch.rand(3000, 4, 4, generator=torch.Generator().manual_seed(0))
    maps[:, 0, 0], maps[:, 0, 1] = 0, 1
    found = image_confidence(score, torch.ones(3000, 1, 4, 4), maps).confidence_drop
    assert float(found.mean()) == pytest.approx(50, abs=4 * float(found.std()) / math.sqrt(3000))


def test_rejected_pixels_become_the_baseline():
    pixels = torch.full((1, 3, 4, 4), 3.0)
    gone = (WEIGHTS == 0)[None] + 0.0
    assert float(image_confidence(score, pixels, gone, baselines=2.0).masked) == 2
    base = torch.arange(3.0)[None, :, None, None]
    assert float(image_confidence(score, pixels, gone, baselines=base).masked) == 1
    half = torch.full((1, 4, 4), 0.5)
    assert float(image_confidence(score, pixels, half, baselines=1.0, normalise=False).masked) == 2


def test_pictures_may_be_any_argument_and_channels_are_summed():
    pixels, scale = torch.rand(3, 2, 4, 4), torch.tensor([1.0, 2.0, 3.0])
    maps = torch.rand(3, 4, 4)

    def turned(scale: Tensor, pixels: Tensor) -> Tensor:
        return score(pixels, scale)

    first = image_confidence(score, (pixels, scale), maps)
    second = image_confidence(turned, scale, torch.stack([maps * 2, -maps], 1), pixels, modality=1)
    torch.testing.assert_close(first.masked, second.masked)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_chunks_change_nothing(size):
    pixels, maps = torch.rand(5, 3, 4, 4), torch.rand(5, 4, 4)
    rows: list[int] = []

    def counting(pixels: Tensor) -> Tensor:
        rows.append(len(pixels))
        return score(pixels)

    whole, parts = (
        image_confidence(score, pixels, maps),
        image_confidence(counting, pixels, maps, internal_batch_size=size),
    )
    torch.testing.assert_close(whole.masked, parts.masked)
    # Before parts one example alone, and beside another.
    looked = 0 if size == 5 else 2
    assert rows[:looked] == [1, 2][:looked] and max(rows[looked:]) == size and sum(rows[looked:]) == 10


def test_constant_maps_broken_maps_and_broken_scores_follow_the_policy():
    pixels, maps = torch.ones(5, 1, 4, 4), MAP.repeat(5, 1, 1)
    maps[1], maps[2, 0, 0] = 0.5, torch.nan
    scale = torch.tensor([1.0, 1.0, 1.0, torch.nan, 1.0])
    found = image_confidence(score, pixels, maps, scale)
    for values in (found.masked, found.confidence_drop, found.confidence_increase, found.average_drop):
        assert values.isnan().tolist() == [False, True, True, True, False]
    with pytest.warns(UserWarning, match="3 of 5 examples.*not finite: 1.*constant map: 1.*score that is NaN: 1"):
        assert len(image_confidence(score, pixels, maps, scale, nan_policy="omit").masked) == 2
    with pytest.raises(ValueError, match=r"constant map: 1 \(examples 1\)"):
        image_confidence(score, pixels, maps, scale, nan_policy="raise")
    assert float(image_confidence(score, pixels[:1], maps[1:2], normalise=False).masked) == 0.5


def test_token_rows_are_scaled_by_position_and_all_else_stays():
    model = Words()
    found = token_confidence(model, (PIXELS, IDS), BITS, MASK, maskable=MASKABLE, embedding="embed")
    # Scaled over maskable tokens the values are 0, 1, 1/4, 1/2 and 1, 0; the fives are scaled apart.
    fixed = torch.tensor([1 + 190 + 2 * (18 + 19), 1 + 190 + 2 * (18 + 19)])
    kept = torch.tensor([2 * (7 + 5 / 4 + 3 / 2), 2 * 2.0])
    torch.testing.assert_close(found.masked, fixed + kept)
    torch.testing.assert_close(found.original, fixed + torch.tensor([2 * 20.0, 2 * 6.0]))
    assert not model.embed._forward_hooks
    assert model.seen[0] == model.seen[2] == IDS[0].tolist()


def test_token_rows_above_a_quantile_are_kept_whole():
    found = token_confidence(Words(), (PIXELS, IDS), BITS, MASK, maskable=MASKABLE, embedding="embed", quantile=0.5)
    fixed = 1 + 190 + 2 * (18 + 19)
    assert found.masked.tolist() == [fixed + 2 * (7 + 3), fixed + 2 * 2]


def test_captions_without_a_value():
    bits, maskable = BITS.clone(), MASKABLE.clone()
    bits[0, 1:5] = 2.0
    maskable[1] = False
    found = token_confidence(Words(), (PIXELS, IDS), bits, MASK, maskable=maskable, embedding="embed")
    assert bool(found.masked.isnan().all())
    with pytest.raises(ValueError, match=r"constant map: 1 \(examples 0\); no maskable token: 1 \(examples 1\)"):
        token_confidence(Words(), (PIXELS, IDS), bits, MASK, maskable=maskable, embedding="embed", nan_policy="raise")


def test_the_embedding_must_be_the_one_that_reads_the_ids():
    for embedding, message in (
        ("other", "to run once per pass of forward_func, it ran 0 times"),
        ("", "no layer named ''"),
    ):
        model = Words()
        with pytest.raises(ValueError, match=message):
            token_confidence(model, (PIXELS, IDS), BITS, MASK, maskable=MASKABLE, embedding=embedding)
    model = Words()
    with pytest.raises(ValueError, match=r"embedding: expected a layer that returns a row per token, \(2, 6, width\)"):
        token_confidence(
            lambda pixels, ids, mask: model(pixels, ids[:, 1:], mask[:, 1:]),
            (PIXELS, IDS),
            BITS,
            MASK,
            maskable=MASKABLE,
            embedding=model.embed,
        )
    assert not model.embed._forward_hooks


def test_the_published_protocol_cuts_and_replaces_as_released():
    model = Words()
    found = published_token_confidence(model, (PIXELS, IDS), BITS, MASK, maskable=MASKABLE)
    # Medians are 1.5 and 2: above them are the second and the fourth word, and the first.
    assert model.seen[-4:] == [[5, 7, 5, 3], [0, 7, 0, 3], [2, 4], [2, 0]]
    # The end token is gone, so the first word is pooled: ten times its row, and all rows twice.
    assert found.original.tolist() == [1 + 50 + 40, 1 + 20 + 12]
    assert found.masked.tolist() == [1 + 0 + 20, 1 + 20 + 4]
    other = published_token_confidence(model, (PIXELS, IDS), BITS, MASK, maskable=MASKABLE, replacement=1)
    assert other.masked.tolist() == [1 + 10 + 24, 1 + 20 + 6]


def test_a_single_word_is_dropped_entirely_as_released():
    model = Words()
    maskable = torch.zeros_like(MASKABLE)
    maskable[0, 2] = True
    found = published_token_confidence(model, (PIXELS, IDS), BITS, MASK, maskable=maskable)
    assert model.seen[-2:] == [[7], [0]] and found.masked.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: image_confidence(score, torch.ones(2, 3, 4, 4), MAP), r"attributions: .* shape \(2, 4, 4\)"),
        (lambda: image_confidence(score, torch.ones(2, 3), MAP), "modality: expected argument 0 to be floating-point"),
        (
            lambda: image_confidence(score, torch.ones(1, 3, 4, 4), MAP, modality=1),
            "modality: expected an index below 1",
        ),
        (lambda: image_confidence(score, [torch.ones(1)], MAP), "inputs: expected a tensor or a tuple of tensors"),
        (
            lambda: image_confidence(score, torch.ones(1, 3, 4, 4), MAP, torch.ones(2)),
            r"inputs: expected the same number of examples.*\[1, 2\]",
        ),
        (
            lambda: image_confidence(lambda pixels: pixels, torch.ones(1, 3, 4, 4), MAP),
            "forward_func: expected one score per pair",
        ),
        (
            lambda: image_confidence(score, torch.ones(1, 3, 4, 4), MAP, internal_batch_size=0),
            "internal_batch_size: expected a number of at least 1",
        ),
        (
            lambda: published_token_confidence(Words(), (PIXELS, IDS), BITS, MASK, maskable=MASKABLE[:1]),
            r"maskable: expected a boolean tensor of shape \(2, 6\)",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_confidence_is_what_its_scores_say():
    found = Confidence(torch.tensor([0.5, 0.5, 0.2]), torch.tensor([0.3, 0.5, 0.3]))
    assert found.confidence_drop.tolist() == pytest.approx([20, 0, 0])
    assert found.average_drop.tolist() == pytest.approx([40, 0, 0])
    assert found.confidence_increase.tolist() == [0, 0, 100]


def test_the_compact_encoder_keeps_its_score_on_the_truth(picture_scenes, caption_scenes):
    scenes = picture_scenes
    truth = scenes.truth + 0.0
    right = image_confidence(scenes.encoder, scenes.inputs, truth, scenes.additional, internal_batch_size=7)
    wrong = image_confidence(scenes.encoder, scenes.inputs, 1 - truth, scenes.additional)
    assert float((wrong.confidence_drop - right.confidence_drop).mean()) > 5

    scenes = caption_scenes
    options = {"maskable": scenes.maskable, "embedding": scenes.embedding}
    truth = scenes.truth + 0.0
    right = token_confidence(scenes.encoder, scenes.inputs, truth, scenes.additional, **options)
    wrong = token_confidence(scenes.encoder, scenes.inputs, 1 - truth, scenes.additional, **options)
    assert float((wrong.confidence_drop - right.confidence_drop).mean()) > 5
    alone = token_confidence(
        scenes.encoder,
        tuple(tensor[3:4] for tensor in scenes.inputs),
        truth[3:4],
        tuple(tensor[3:4] for tensor in scenes.additional),
        maskable=scenes.maskable[3:4],
        embedding=scenes.embedding,
    )
    torch.testing.assert_close(alone.masked, right.masked[3:4], rtol=1e-4, atol=1e-5)
    published = published_token_confidence(
        scenes.encoder, scenes.inputs, truth, scenes.additional, maskable=scenes.maskable
    )
    assert bool(published.masked.isfinite().all()) and not torch.allclose(published.original, right.original.double())
