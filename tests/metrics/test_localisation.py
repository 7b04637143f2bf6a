"""Maps against the truth: right by hand, best for an oracle, at chance for a random map, defined at the edges."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from captum_m2ib.metrics import (
    auroc,
    average_precision,
    best_iou,
    boxes_to_masks,
    iou,
    pointing_game,
    relevance_mass,
    relevance_rank,
    summarise,
    top_k,
)

MAP = torch.tensor([[0, 1, 2, 0], [0, 4, 4, 0], [1, 0, 3, 0], [4, 0, 0, 1]], dtype=torch.float64)[None]
MASK = torch.zeros(1, 4, 4, dtype=torch.bool)
MASK[:, 1:3, 1:3] = True

METRICS = {
    "pointing_game": pointing_game,
    "relevance_mass": relevance_mass,
    "relevance_rank": relevance_rank,
    "iou": iou,
    "best_iou": lambda *args, **kwargs: best_iou(*args, **kwargs).iou,
    "auroc": auroc,
    "average_precision": average_precision,
    "top_k": lambda *args, **kwargs: top_k(*args, k=4, **kwargs),
}
each_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())


@pytest.fixture
def random_case() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(800, 4, 4, dtype=torch.bool)
    masks[:, 1:3, 1:3] = True
    return torch.rand(800, 4, 4, generator=generator), masks


def test_by_hand():
    # Three maxima of 4, two of them true. 4 + 4 + 0 + 3 of 20 bits.
    assert float(pointing_game(MAP, MASK)) == pytest.approx(2 / 3)
    assert float(relevance_mass(MAP, MASK)) == pytest.approx(11 / 20)
    # The four highest are 4, 4, 4, 3: three of them true. The two highest are two of three fours.
    assert float(relevance_rank(MAP, MASK)) == pytest.approx(3 / 4)
    assert float(top_k(MAP, MASK, k=2)) == pytest.approx(2 / 3)
    # At half the maximum 4, 4, 4, 3, 2 are selected: 3 of 5 + 4 - 3. At 3, the best, 3 of 4 + 4 - 3.
    assert float(iou(MAP, MASK)) == pytest.approx(3 / 6)
    best = best_iou(MAP, MASK)
    assert (float(best.iou), float(best.threshold)) == (pytest.approx(3 / 5), 3.0)
    # Outside: 4, 2, 1, 1, 1 and seven zeros. A four beats 11 and ties with 1; 3 beats 11; 0 ties with 7.
    assert float(auroc(MAP, MASK)) == pytest.approx((2 * 11.5 + 11 + 3.5) / (4 * 12))
    # Precision 2/3 brings a recall of 2/4, 3/4 another 1/4, and the zeros, at all 16 units, the last 1/4.
    assert float(average_precision(MAP, MASK)) == pytest.approx(2 / 3 / 2 + 3 / 4 / 4 + 4 / 16 / 4)


@each_metric
def test_an_oracle_scores_one_and_its_opposite_least(metric, random_case):
    noise, masks = (tensor[:50] for tensor in random_case)
    best = metric(masks + 0.0, masks)
    worst = metric((~masks) + 0.0, masks)
    assert best.shape == (50,) and best.dtype == torch.float64
    assert bool((best == 1).all())
    assert bool((worst < metric(noise, masks).mean()).all()) and bool((worst <= 0.25).all())


@pytest.mark.parametrize("name", ["pointing_game", "relevance_mass", "relevance_rank", "top_k", "auroc"])
def test_a_random_map_is_at_chance(name, random_case):
    chance = 0.5 if name == "auroc" else 4 / 16
    found = summarise(METRICS[name](*random_case), draws=500)
    error = (found.high - found.low) / (2 * 1.96)
    assert abs(found.mean - chance) < 4 * error and error < 0.03


def test_average_precision_and_iou_of_random_maps_are_those_of_random_orders():
    # Over all orders of 5 units, 2 of them true, counted one by one.
    precision, overlap = [], []
    for order in itertools.permutations(range(5)):
        hits = [position for position, unit in enumerate(order, 1) if unit < 2]
        precision.append(sum(index / position for index, position in enumerate(hits, 1)) / 2)
        overlap.append(max(index / (position + 2 - index) for index, position in enumerate(hits, 1)))
    generator = torch.Generator().manual_seed(1)
    maps, masks = torch.rand(400, 5, generator=generator), torch.tensor([[True, True, False, False, False]] * 400)
    for value, expected in (
        (average_precision(maps, masks), precision),
        (best_iou(maps, masks).iou, overlap),
    ):
        assert float(value.mean()) == pytest.approx(np.mean(expected), abs=4 * np.std(expected) / math.sqrt(400))


def test_ties_at_random_have_the_expectation_as_their_mean():
    for metric in (pointing_game, lambda *args, **options: top_k(*args, k=2, **options)):
        drawn = torch.stack([metric(MAP, MASK, ties="random", seed=seed)[0] for seed in range(300)])
        assert float(drawn.mean()) == pytest.approx(2 / 3, abs=4 * 0.5 / math.sqrt(300))
    hits = torch.stack([pointing_game(MAP, MASK, ties="random", seed=seed)[0] for seed in range(20)])
    assert set(hits.tolist()) == {0.0, 1.0}
    again = torch.stack([pointing_game(MAP, MASK, ties="random", seed=seed)[0] for seed in range(20)])
    assert hits.tolist() == again.tolist()
    assert float(relevance_rank(MAP, MASK, ties="random")) == 0.75


def test_pointing_tolerance_is_a_distance_between_centres():
    maps = torch.zeros(6, 9, 9)
    masks = torch.zeros(6, 9, 9, dtype=torch.bool)
    masks[:, 4, 4] = True
    for index, (row, column) in enumerate([(4, 4), (4, 6), (4, 7), (6, 6), (6, 5), (0, 0)]):
        maps[index, row, column] = 1
    assert pointing_game(maps, masks).tolist() == [1, 0, 0, 0, 0, 0]
    assert pointing_game(maps, masks, tolerance=2).tolist() == [1, 1, 0, 0, 0, 0]
    assert pointing_game(maps, masks, tolerance=2.3).tolist() == [1, 1, 0, 0, 1, 0]
    assert pointing_game(maps, masks, tolerance=3).tolist() == [1, 1, 1, 1, 1, 0]
    assert pointing_game(maps, masks, tolerance=15).tolist() == [1] * 6


@each_metric
def test_constant_maps(metric):
    chance = {pointing_game: 0.25, auroc: 0.5, iou: 0.25}
    for value in (0.0, 2.5, -1.0):
        found = float(metric(torch.full((1, 4, 4), value), MASK))
        if metric is relevance_mass and value <= 0:
            assert found == 0
        else:
            assert found == pytest.approx(chance.get(metric, 0.25))


def test_negative_relevance_holds_no_mass():
    maps = torch.tensor([[3.0, -5.0, 1.0, 0.0]])
    assert float(relevance_mass(maps, torch.tensor([[True, True, False, False]]))) == 0.75
    for scale in (1e-300, 1e307):
        found = relevance_mass(maps.double() * scale, torch.tensor([[True, True, False, False]]))
        assert float(found) == pytest.approx(0.75)


def test_channels_are_summed():
    channels = torch.stack([MAP - 1, 2 - MAP, MAP - 1], 1)
    for metric in METRICS.values():
        assert float(metric(channels, MASK)) == float(metric(MAP, MASK))


@each_metric
def test_padding_and_special_tokens_do_not_count(metric):
    maps = torch.tensor([[9.0, 3.0, 1.0, 2.0, 0.5, 8.0, 0.0, 0.0]])
    labels = torch.tensor([[True, True, False, True, False, False, False, True]])
    valid = torch.tensor([[False, True, True, True, True, False, False, False]])
    inner = metric(maps[:, 1:5], labels[:, 1:5])
    assert float(metric(maps, labels, valid=valid)) == float(inner)
    broken = maps.clone()
    broken[0, 6] = torch.nan
    assert float(metric(broken, labels, valid=valid)) == float(inner)


def test_token_figures_by_hand():
    bits = torch.tensor([[0.0, 3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 5.0, 1.0, 0.0]])
    present = torch.tensor([[False, True, False, True, False], [False, True, False, False, False]])
    words = torch.tensor([[False, True, True, True, False]] * 2)
    assert auroc(bits, present, valid=words).tolist() == [1.0, 0.25]
    assert top_k(bits, present, k=1, valid=words).tolist() == [1.0, 0.0]
    assert top_k(bits, present, k=2, valid=words).tolist() == [1.0, 0.25]
    assert top_k(bits, present, k=3, valid=words).tolist() == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    assert top_k(bits, present, k=4, valid=words).isnan().all()


@each_metric
def test_empty_masks_and_broken_maps_follow_the_policy(metric):
    maps = torch.stack([MAP[0], MAP[0], MAP[0], MAP[0]])
    maps[2, 0, 0], maps[3, 1, 1] = torch.nan, torch.inf
    masks = MASK.repeat(4, 1, 1)
    masks[1] = False
    value = float(metric(MAP, MASK))
    found = metric(maps, masks)
    assert float(found[0]) == value and bool(found[1:].isnan().all())
    counts = r"3 of 4 examples.*empty mask: 1 \(examples 1\).*not finite: 2 \(examples 2, 3\)"
    with pytest.warns(UserWarning, match=counts):
        assert metric(maps, masks, nan_policy="omit").tolist() == [value]
    with pytest.raises(ValueError, match=r"attributions: expected a value for each of the 4 examples.*empty mask: 1"):
        metric(maps, masks, nan_policy="raise")
    with pytest.raises(ValueError, match="nan_policy: expected one of 'propagate', 'omit', 'raise', got 'drop'"):
        metric(maps, masks, nan_policy="drop")


def test_a_mask_that_covers_all():
    full = torch.ones_like(MASK)
    assert bool(auroc(MAP, full).isnan())
    for metric in (pointing_game, relevance_mass, relevance_rank, average_precision):
        assert float(metric(MAP, full)) == 1
    assert float(best_iou(MAP, full).iou) == 1
    with pytest.raises(ValueError, match="mask that covers all: 1"):
        auroc(MAP, full, nan_policy="raise")


def test_iou_at_thresholds():
    assert float(iou(MAP, MASK, threshold=0.0)) == 4 / 16
    assert float(iou(MAP, MASK, threshold=1.0)) == 2 / 5
    assert float(iou(MAP, MASK, threshold=3.0, normalise=False)) == 3 / 5
    assert float(iou(MAP, MASK, threshold=5.0, normalise=False)) == 0
    shifted = MAP * 7 - 3
    assert float(iou(shifted, MASK)) == float(iou(MAP, MASK))


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=25).filter(
        lambda rows: len({label for _, label in rows}) == 2
    )
)
@settings(max_examples=40, deadline=None)
def test_ranking_metrics_against_counting(rows):
    values, labels = [value for value, _ in rows], [label for _, label in rows]
    maps, masks = torch.tensor([values], dtype=torch.float64), torch.tensor([labels])
    true, false = [v for v, label in rows if label], [v for v, label in rows if not label]
    wins = [(t > f) + (t == f) / 2 for t in true for f in false]
    assert float(auroc(maps, masks)) == pytest.approx(np.mean(wins), abs=1e-12)
    overlaps = {}
    for threshold in set(values):
        hit = sum(value >= threshold for value in true)
        overlaps[threshold] = hit / (sum(value >= threshold for value in values) + len(true) - hit)
        assert float(iou(maps, masks, threshold, normalise=False)) == pytest.approx(overlaps[threshold])
    best = best_iou(maps, masks)
    assert float(best.iou) == pytest.approx(max(overlaps.values()))
    assert float(best.threshold) == max(t for t, share in overlaps.items() if share == max(overlaps.values()))
    # The expectation over ties is the mean over all orders, here of the units that tie at the last place.
    k = len(true)
    level = sorted(values, reverse=True)[k - 1]
    tied = [label for value, label in rows if value == level]
    above = [label for value, label in rows if value > level]
    expected = (sum(above) + (k - len(above)) * sum(tied) / len(tied)) / k
    assert float(relevance_rank(maps, masks)) == pytest.approx(expected)
    for metric in (auroc, average_precision, relevance_rank, pointing_game):
        assert float(metric(maps.exp(), masks)) == pytest.approx(float(metric(maps, masks)), abs=1e-12)


@each_metric
def test_examples_are_independent(metric, random_case):
    maps, masks = (tensor[:6] for tensor in random_case)
    together = metric(maps, masks)
    for index in range(6):
        alone = metric(maps[index : index + 1], masks[index : index + 1])
        assert float(alone) == float(together[index])


def test_boxes_by_hand():
    masks = boxes_to_masks([[[1, 1, 3, 3]], [[0, 0, 1, 4], [3, 2, 9, 9]], []], (4, 4))
    assert bool((masks[0] == MASK[0]).all())
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:, 0], expected[2:, 3] = True, True
    assert bool((masks[1] == expected).all()) and not bool(masks[2].any())
    assert bool((boxes_to_masks([torch.tensor([[1.0, 1, 2, 2]])], (4, 4), "xywh") == MASK).all())
    # A box of 0.5 to 2.5 covers the centres at 0.5, 1.5 and not the one at 2.5.
    assert boxes_to_masks([[[0.5, 0, 2.5, 1]]], (1, 4))[0, 0].tolist() == [True, True, False, False]


@given(st.integers(-3, 8), st.integers(-3, 8), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_boxes_cover_their_area(left, top, width, height):
    mask = boxes_to_masks([[[left, top, width, height]]], (5, 7), "xywh")
    columns = max(0, min(left + width, 7) - max(left, 0))
    rows = max(0, min(top + height, 5) - max(top, 0))
    assert int(mask.sum()) == rows * columns


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([[3, 1, 1, 3]], r"boxes\[0\]: expected right > left"),
        ([[1, 2, 3]], r"boxes\[0\]: expected four finite numbers"),
        ([[1, 2, 3, float("nan")]], r"boxes\[0\]: expected four finite numbers"),
    ],
)
def test_impossible_boxes(box, message):
    with pytest.raises(ValueError, match=message):
        boxes_to_masks([box], (4, 4))
    with pytest.raises(ValueError, match="box_format: expected one of"):
        boxes_to_masks([], (4, 4), "yxyx")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iou(MAP, MASK.float()), "masks: expected a boolean tensor"),
        (lambda: iou(MAP, MASK[:, :3]), r"attributions: expected one value per unit of masks, shape \(1, 3, 4\)"),
        (lambda: iou(MAP[0].numpy(), MASK), "attributions: .* got ndarray"),
        (lambda: iou(MAP, MASK, valid=MASK[0]), r"valid: expected a boolean tensor of shape \(1, 4, 4\)"),
        (lambda: iou(MAP[:0], MASK[:0]), "masks: expected .* N at least 1"),
        (lambda: top_k(MAP, MASK, k=0), "k: expected a number of at least 1"),
        (lambda: pointing_game(MAP, MASK, tolerance=-1), "tolerance: expected a number of at least 0"),
        (lambda: pointing_game(MAP[0], MASK[0], tolerance=2), "tolerance: expected pictures"),
        (lambda: pointing_game(MAP, MASK, ties="first"), "ties: expected one of 'expectation', 'random'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@each_metric
def test_only_average_precision_needs_scikit_learn(metric, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    if metric is not average_precision:
        assert float(metric(MAP, MASK)) > 0
        return
    with pytest.raises(ImportError, match=r"average_precision needs sklearn.metrics; .*captum_m2ib\[metrics\]"):
        metric(MAP, MASK)


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.booleans()), min_size=2, max_size=25))
@settings(max_examples=40, deadline=None)
def test_auroc_is_scikit_learns(rows):
    values, labels, counted = (torch.tensor([column]) for column in zip(*rows, strict=True))
    found = float(auroc(values.double(), labels, valid=counted))
    true = labels[counted]
    if len(set(true.tolist())) < 2:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(float(roc_auc_score(true.numpy(), values[counted].numpy())), abs=1e-12)


def test_maps_are_not_changed_and_need_no_gradient():
    maps = MAP.clone().requires_grad_()
    for metric in METRICS.values():
        assert not metric(maps, MASK).requires_grad
    assert bool((maps.detach() == MAP).all())
