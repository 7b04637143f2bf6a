"""Insertion and deletion against sums, whose every score on the way is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_m2ib.metrics import deletion, gaussian_blur, insertion, token_deletion, token_insertion

MAP = torch.tensor([[15, 14, 13, 12], [11, 10, 9, 8], [7, 6, 5, 4], [3, 2, 1, 0]], dtype=torch.float64)[None]
WEIGHTS = torch.zeros(4, 4)
WEIGHTS[0], WEIGHTS[1, 0] = torch.tensor([8.0, 4.0, 2.0, 1.0]), 1.0


def score(pixels: Tensor) -> Tensor:
    """16 for a picture of ones."""
    return (pixels.mean(1) * WEIGHTS.to(pixels)).sum((1, 2))


def words(pixels: Tensor, ids: Tensor) -> Tensor:
    """Sum of the ids."""
    return pixels.flatten(1)[:, 0] + ids.float().sum(1)


ONES = torch.ones(1, 3, 4, 4)
IDS = torch.tensor([[90, 5, 7, 5, 3, 91], [90, 2, 4, 91, 1, 1]])
BITS = torch.tensor([[9.0, 0.0, 4.0, 1.0, 2.0, 9.0], [9.0, 3.0, 5.0, 9.0, 0.0, 0.0]])
MASKABLE = torch.tensor([[False, True, True, True, True, False], [False, True, True, False, False, False]])
PIXELS = torch.ones(2, 1, 1, 1)


def test_by_hand():
    curve = deletion(score, ONES, MAP, step=4)
    assert curve.fractions.tolist() == [[0, 0.25, 0.5, 0.75, 1]]
    assert curve.scores.tolist() == [[16, 1, 0, 0, 0]]
    assert float(curve.auc) == (16 / 2 + 1) / 4
    assert curve.normalised_scores.tolist() == [[1, 1 / 16, 0, 0, 0]]
    assert float(curve.normalised_auc) == (16 / 2 + 1) / 4 / 16
    back = insertion(score, ONES, MAP, step=4, substrate="zero")
    assert back.scores.tolist() == [[0, 15, 16, 16, 16]]
    assert float(back.auc) == float(back.normalised_auc) * 16 == (16 * 3 + 15 - 16 / 2) / 4
    assert deletion(score, ONES, MAP, step=4, order="lerf").scores.tolist() == [[16, 16, 16, 15, 0]]
    # Five at a time: the last step changes one pixel.
    uneven = deletion(score, ONES, MAP, step=5)
    assert uneven.fractions.tolist() == [[0, 5 / 16, 10 / 16, 15 / 16, 1]]
    assert float(uneven.auc) == pytest.approx(16 / 2 * 5 / 16)


def test_default_steps_are_a_hundredth_of_the_picture():
    pixels = torch.ones(1, 1, 20, 30)
    curve = deletion(lambda pixels: pixels.sum((1, 2, 3)), pixels, torch.rand(1, 20, 30))
    assert curve.scores.shape == (1, 101)
    torch.testing.assert_close(curve.scores[0], torch.linspace(600, 0, 101))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 16))
def test_no_map_beats_the_oracle_of_a_sum(seed, step):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(4, 4, generator=generator, dtype=torch.float64)
    pixels = torch.ones(1, 1, 4, 4, dtype=torch.float64)

    def summed(pixels: Tensor) -> Tensor:
        return (pixels[:, 0] * weights).sum((1, 2))

    other = torch.rand(1, 4, 4, generator=generator)
    best, found = (deletion(summed, pixels, maps, step=step) for maps in (weights[None], other))
    assert float(best.auc) <= float(found.auc) + 1e-12
    high = insertion(summed, pixels, weights[None], step=step, substrate="zero")
    assert float(high.auc) >= float(insertion(summed, pixels, other, step=step, substrate="zero").auc) - 1e-12
    # For a sum, what deletion has taken away is what insertion has put back.
    torch.testing.assert_close(high.scores, best.scores[:, :1] - best.scores)
    # RISE's own formula where the step divides the picture.
    if 16 % step == 0:
        rise = (found.scores.sum() - found.scores[0, 0] / 2 - found.scores[0, -1] / 2) / (16 / step)
        assert float(found.auc) == pytest.approx(float(rise))
        reverse = deletion(summed, pixels, other, step=step, order="lerf")
        assert float(found.auc + reverse.auc) == pytest.approx(float(weights.sum()))


def test_a_random_order_is_at_chance():
    count = 400
    pixels = torch.ones(count, 1, 4, 4)
    by_order = deletion(score, pixels, MAP.repeat(count, 1, 1), step=1, order="random", seed=3)
    by_map = deletion(score, pixels, torch.rand(count, 4, 4, generator=torch.Generator().manual_seed(4)), step=1)
    for curve in (by_order, by_map):
        values = curve.normalised_auc
        assert float(values.mean()) == pytest.approx(0.5, abs=4 * float(values.std()) / math.sqrt(count))
        assert float(values.std()) > 0.05


def test_ties_are_broken_by_the_seed():
    flat = torch.zeros(1, 4, 4)
    runs = [deletion(score, ONES, flat, step=1, seed=seed).scores for seed in range(4)]
    assert len({tuple(run.flatten().tolist()) for run in runs}) > 1
    torch.testing.assert_close(deletion(score, ONES, flat, step=1, seed=2).scores, runs[2])


@pytest.mark.parametrize("substrate", ["zero", "mean", "blur", 0.5, "tensor"])
def test_the_curve_ends_at_the_substrate(substrate):
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = {
        "zero": torch.zeros(2, 3, 8, 8),
        "mean": torch.stack([torch.stack([channel.mean().expand(8, 8) for channel in picture]) for picture in pixels]),
        "blur": gaussian_blur(pixels, 11, 5.0),
        0.5: torch.full((2, 3, 8, 8), 0.5),
        "tensor": torch.arange(3.0)[:, None, None].expand(2, 3, 8, 8),
    }[substrate]

    def weighted(pixels: Tensor) -> Tensor:
        return (pixels * torch.linspace(-1, 1, 192).view(3, 8, 8)).sum((1, 2, 3))

    given_substrate = torch.arange(3.0)[:, None, None] if substrate == "tensor" else substrate
    curve = deletion(weighted, pixels, torch.rand(2, 8, 8), substrate=given_substrate)
    torch.testing.assert_close(curve.scores[:, 0], weighted(pixels))
    torch.testing.assert_close(curve.scores[:, -1], weighted(expected))
    back = insertion(weighted, pixels, torch.rand(2, 8, 8), substrate=given_substrate)
    torch.testing.assert_close(back.scores[:, 0], weighted(expected))
    torch.testing.assert_close(back.scores[:, -1], weighted(pixels))


def test_blur_is_a_weighted_mean():
    even = torch.full((1, 2, 5, 6), 3.0)
    torch.testing.assert_close(gaussian_blur(even), even)
    point = torch.zeros(1, 1, 21, 21, dtype=torch.float64)
    point[0, 0, 10, 10] = 1
    found = gaussian_blur(point, 5, 2.0)[0, 0]
    line = torch.tensor([math.exp(-(d**2) / 8) for d in range(-2, 3)], dtype=torch.float64)
    torch.testing.assert_close(found[8:13, 8:13], torch.outer(line, line) / line.sum() ** 2)
    assert float(found.sum()) == pytest.approx(1) and int((found > 0).sum()) == 25
    for arguments, message in (
        ((4, 1.0), "kernel_size: expected an odd"),
        ((3, 0.0), "sigma: expected a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            gaussian_blur(point, *arguments)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_chunks_change_nothing(size):
    pixels, maps = torch.rand(4, 3, 4, 4), torch.rand(4, 4, 4)
    rows: list[int] = []

    def counting(pixels: Tensor) -> Tensor:
        rows.append(len(pixels))
        return score(pixels)

    whole = deletion(score, pixels, maps, step=3)
    parts = deletion(counting, pixels, maps, step=3, internal_batch_size=size)
    torch.testing.assert_close(whole.scores, parts.scores)
    # Before parts one example alone, and beside another.
    assert rows[:2] == [1, 2] and max(rows[2:]) == min(size, 28) and sum(rows[2:]) == 7 * 4
    alone = deletion(score, pixels[2:3], maps[2:3], step=3)
    torch.testing.assert_close(alone.scores, whole.scores[2:3])


def test_tokens_by_hand():
    curve = token_deletion(words, (PIXELS, IDS), BITS, maskable=MASKABLE, replacement=0)
    # First the seven, then 3, 5 (third word), 5 (first); the short caption loses 4, then 2, and is done.
    assert curve.scores.tolist() == [[202, 195, 192, 187, 182], [190, 186, 184, 184, 184]]
    assert curve.fractions.tolist() == [[0, 0.25, 0.5, 0.75, 1], [0, 0.5, 1, 1, 1]]
    assert curve.auc[1] == pytest.approx((190 + 186) / 4 + (186 + 184) / 4)
    assert curve.normalised_scores[1].tolist() == pytest.approx([1, 1 / 3, 0, 0, 0])
    back = token_insertion(words, (PIXELS, IDS), BITS, maskable=MASKABLE, replacement=0, order="lerf", step=2)
    assert back.scores.tolist() == [[182, 192, 202], [184, 190, 190]]
    ids = torch.full_like(IDS, 50)
    assert token_deletion(words, (PIXELS, IDS), BITS, maskable=MASKABLE, replacement=ids).scores[1, -1] == 284


def test_only_maskable_tokens_are_replaced():
    seen = []

    def watching(pixels: Tensor, ids: Tensor) -> Tensor:
        seen.append(ids)
        return words(pixels, ids)

    for order in ("morf", "lerf", "random"):
        token_deletion(watching, (PIXELS, IDS), BITS, maskable=MASKABLE, replacement=0, order=order)
    ids = torch.cat(seen)
    rows = torch.arange(len(ids)) % 2
    assert bool((ids[~MASKABLE[rows]] == IDS[rows][~MASKABLE[rows]]).all())
    assert ids.dtype == IDS.dtype and bool((ids[MASKABLE[rows]] == 0).any())


def test_examples_without_a_value_follow_the_policy():
    maps = MAP.repeat(3, 1, 1)
    maps[1, 2, 2] = torch.nan
    pixels = torch.ones(3, 1, 4, 4)
    pixels[2] = torch.nan
    curve = deletion(score, pixels, maps, step=8)
    assert curve.auc.isnan().tolist() == [False, True, True] and bool(curve.fractions[1:].isnan().all())
    with pytest.warns(UserWarning, match="2 of 3 examples.*not finite: 1.*score that is NaN: 1"):
        curve = deletion(score, pixels, maps, step=8, nan_policy="omit")
    assert curve.scores.shape == (1, 3) == curve.fractions.shape
    with pytest.raises(ValueError, match="score that is NaN"):
        insertion(score, pixels, maps, step=8, nan_policy="raise")
    maskable = MASKABLE.clone()
    maskable[1] = False
    bits = BITS.clone()
    bits[0, 0] = torch.nan
    curve = token_deletion(words, (PIXELS, IDS), bits, maskable=maskable, replacement=0)
    assert curve.auc.isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match="no maskable token: 1"):
        token_deletion(words, (PIXELS, IDS), bits, maskable=maskable, replacement=0, nan_policy="raise")


def test_a_substrate_that_scores_as_the_input_has_no_normalised_curve():
    curve = deletion(lambda pixels: pixels.new_ones(len(pixels)), ONES, MAP, step=4)
    assert float(curve.auc) == 1 and math.isnan(curve.normalised_auc)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: deletion(score, ONES, MAP, substrate="black"), "substrate: expected 'zero', 'mean', 'blur'"),
        (lambda: deletion(score, ONES, MAP, order="best"), "order: expected one of 'morf', 'lerf', 'random'"),
        (lambda: deletion(score, ONES, MAP, step=0), "step: expected a number of at least 1"),
        (lambda: deletion(score, ONES, MAP[:, :2]), r"attributions: .* shape \(1, 4, 4\)"),
        (
            lambda: deletion(words, (PIXELS, IDS), BITS, modality=1),
            "modality: expected argument 1 to be floating-point",
        ),
        (
            lambda: token_deletion(words, (PIXELS, IDS), BITS, maskable=MASKABLE, replacement=0.5),
            "replacement: expected integer token ids",
        ),
        (
            lambda: token_deletion(words, (PIXELS, IDS), BITS, maskable=MASKABLE, replacement=0, modality=0),
            "modality: expected argument 0 to be integer token ids",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_compact_encoder_depends_on_the_truth(picture_scenes, caption_scenes):
    scenes = picture_scenes
    truth, options = scenes.truth + 0.0, {"step": 512, "internal_batch_size": 50}
    arguments = (scenes.encoder, scenes.inputs, truth, scenes.additional)
    first, last, chance = (deletion(*arguments, **options, order=order).auc for order in ("morf", "lerf", "random"))
    assert float((last - first).mean()) > 0.1 and float((last - chance).mean()) > 0
    first, last = (insertion(*arguments, **options, order=order).auc for order in ("morf", "lerf"))
    assert float((first - last).mean()) > 0.05

    scenes = caption_scenes
    arguments = (scenes.encoder, scenes.inputs, scenes.truth + 0.0, scenes.additional)
    options = {"maskable": scenes.maskable, "replacement": scenes.encoder.processor.tokenizer.unk_token_id}
    first, last = (token_deletion(*arguments, **options, order=order).auc for order in ("morf", "lerf"))
    assert float((last - first).mean()) > 0.1
    first, last = (token_insertion(*arguments, **options, order=order).auc for order in ("morf", "lerf"))
    assert float((first - last).mean()) > 0.1
