"""What a pair stands to lose: by hand on made-up scores, and the same for every seed, batch and length of padding."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from captum_m2ib import ChannelStatistics, MultiModalInfoBottleneck, TextLayout
from captum_m2ib.engine.gates import noise
from captum_m2ib.engine.stakes import CLOSED_DRAWS, HALVES, HALVES_OF_PIXELS, Stakes, measured, nothing_to_lose

DTYPES = [torch.float32, torch.float64]


def stakes_of(before: float, closed: list[float], halves: list[float], dtype: torch.dtype = torch.float64) -> Stakes:
    """Of one pair."""
    parts = [torch.tensor([values], dtype=dtype) for values in (closed, halves)]
    return measured(torch.tensor([before], dtype=dtype), *parts)


def test_the_fall_where_it_is_the_larger():
    found = stakes_of(5.0, [1.0, 2.0], [3.0, 3.5, 2.5, 3.0, 3.5, 2.5])
    assert found.range.tolist() == [3.5] and found.closed.tolist() == [1.5]
    assert found.weight.tolist() == [1 / 3.5]


def test_twice_the_spread_where_it_is_the_larger():
    halves = [1.0, 5.0, 2.0, 9.0, 4.0, 3.0]
    for before, closed in ((5.0, [4.5, 4.7]), (5.0, [5.0, 5.0]), (5.0, [7.0, 90.0])):
        found = stakes_of(before, closed, halves)
        # By hand: the mean is 4, the squares of what differs from it are 9 + 1 + 4 + 25 + 0 + 1 = 40, over 6 - 1.
        assert found.range.tolist() == pytest.approx([2 * math.sqrt(8)])
        assert found.range.tolist() == pytest.approx([2 * statistics.stdev(halves)])
        assert found.closed.tolist() == pytest.approx([sum(closed) / 2])


def test_each_pair_has_its_own():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(7, generator=generator)
    closed, halves = (torch.randn(7, draws, generator=generator) for draws in (CLOSED_DRAWS, HALVES))
    whole = measured(before, closed, halves)
    order = torch.tensor([3, 0, 6, 1, 2, 5, 4])
    turned = measured(before[order], closed[order], halves[order])
    assert torch.equal(turned.range, whole.range[order]) and torch.equal(turned.closed, whole.closed[order])
    for pair in range(7):
        row = slice(pair, pair + 1)
        alone = measured(before[row], closed[row], halves[row])
        torch.testing.assert_close(alone.range, whole.range[row])
    assert whole.range.shape == whole.weight.shape == whole.closed.shape == (7,)


@pytest.mark.parametrize("factor", [1e-3, 0.5, 1e3])
@pytest.mark.parametrize("moved", [0.0, -7.0, 100.0])
def test_it_has_the_scores_unit_and_not_its_zero(factor: float, moved: float):
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(50, *more, generator=generator).double() for more in ((), (CLOSED_DRAWS,), (HALVES,))]
    plain = measured(*parts)
    other = measured(*(factor * part + moved for part in parts))
    torch.testing.assert_close(other.range, factor * plain.range, rtol=1e-9, atol=0)
    torch.testing.assert_close(other.weight, plain.weight / factor, rtol=1e-9, atol=0)
    torch.testing.assert_close(other.closed, factor * plain.closed + moved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", [0.0, 0.3, -2e4])
def test_a_score_that_never_changes_has_range_and_weight_zero(dtype: torch.dtype, score: float):
    found = stakes_of(score, [score] * CLOSED_DRAWS, [score] * HALVES, dtype)
    assert found.range.tolist() == [0.0] and found.weight.tolist() == [0.0]
    assert found.range.dtype == found.weight.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_what_is_lost_in_rounding_is_nothing(dtype: torch.dtype, scale: float):
    step = torch.finfo(dtype).eps * scale
    for fall, counts in ((2, False), (1000, False), (1100, True), (1e5, True)):
        found = stakes_of(scale, [scale - fall * step] * CLOSED_DRAWS, [scale] * HALVES, dtype)
        assert bool(found.range > 0) == bool(found.weight > 0) == counts, (fall, found)
    # The floor is that of the largest score there is, whichever that is.
    found = stakes_of(scale, [scale - 1100 * step] * CLOSED_DRAWS, [-4 * scale] * HALVES, dtype)
    assert found.range.tolist() == [0.0]
    raised = stakes_of(scale, [scale + 1100 * step] * CLOSED_DRAWS, [scale] * HALVES, dtype)
    assert raised.range.tolist() == [0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_finite_down_to_the_smallest_range(dtype: torch.dtype):
    for number in (torch.finfo(dtype).tiny, 1e-30, 1.0, 1e30):
        found = stakes_of(number, [0.0] * CLOSED_DRAWS, [0.0] * HALVES, dtype)
        assert bool(found.weight.isfinite()) and float(found.weight * found.range) == pytest.approx(1.0)


def test_a_score_that_is_nan_stays_out_of_the_other_pairs():
    before, closed, halves = torch.tensor([1.0, 1.0, 1.0]), torch.zeros(3, CLOSED_DRAWS), torch.zeros(3, HALVES)
    closed[1, 0], halves[2, 3] = math.nan, math.nan
    found = measured(before, closed, halves)
    assert found.range.tolist()[0] == 1.0 and found.weight.isfinite().all()
    # No weight is made of it, and whoever looks at the scores themselves finds it.
    assert found.weight.tolist()[1:] == [0.0, 0.0] and math.isnan(found.closed[1])


def test_which_pairs_lose_too_little():
    before = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    closed = torch.tensor([0.0, 0.89, 0.91, 1.0, 1.5])
    told = nothing_to_lose(before, Stakes(torch.ones(5), closed))
    assert told.tolist() == [False, False, True, True, True] and told.device.type == "cpu"
    assert nothing_to_lose(before, Stakes(torch.ones(5), closed), share=0.5).tolist() == [False] + [True] * 4
    # Where the range was given, nothing was measured and nothing is said.
    assert not nothing_to_lose(before, Stakes(torch.ones(5))).any()
    assert nothing_to_lose(before[:1], Stakes(torch.ones(1), torch.tensor([math.nan]))).tolist() == [True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pair_without_a_range_loses_nothing_even_by_rounding(dtype: torch.dtype):
    step = torch.finfo(dtype).eps
    for fall in (0.0, 2 * step, -2 * step):
        found = stakes_of(1.0, [1.0 - fall] * CLOSED_DRAWS, [1.0] * HALVES, dtype)
        assert found.range.tolist() == [0.0]
        assert nothing_to_lose(torch.ones(1, dtype=dtype), found).tolist() == [True]


WEIGHTS = torch.linspace(-1, 2, 8 * 8).view(8, 8).double()


def pixels_score(pictures: Tensor, words: Tensor | None = None) -> Tensor:
    """Of each picture its own: the first channel's weighted mean, and a little of the second one's."""
    read = (pictures[:, 0] * WEIGHTS.to(pictures)).mean((1, 2)) + 0.1 * pictures[:, 1].square().mean((1, 2))
    return torch.tanh(read) if words is None else torch.tanh(read + words)


def pictures(count: int = 4) -> Tensor:
    drawn = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return drawn + torch.arange(count).view(-1, 1, 1, 1) / 2


def record_of(given: Tensor, score=pixels_score, additional=None, **settings):
    method = MultiModalInfoBottleneck(score, [None])
    settings = {"n_steps": 2, "n_samples": 4, "smoothing": 0.0, **settings}
    _, record = method.attribute_with_record(given, additional_forward_args=additional, **settings)
    return record.modalities[0]


def test_the_record_tells_the_range_by_hand():
    given, base = pictures(), torch.tensor([0.7, 0.6, -1.0]).double().view(3, 1, 1)
    # The right half is the ground that closed gates show, with noise of half the picture's own deviation.
    given[..., 4:] = base
    found = record_of(given)
    for pair, picture in enumerate(given):
        std = math.sqrt(0.25) * picture.flatten(1).std(1, unbiased=False).view(3, 1, 1)

        def antithetic(step: int, draws: int, shape: tuple[int, ...] = (3, 8, 8)) -> Tensor:
            drawn = noise(0, 0, 2**32 + step, draws // 2, shape).double()
            return torch.cat([drawn, -drawn])

        closed = pixels_score(base + std * antithetic(0, 2))
        is_open = antithetic(2, HALVES_OF_PIXELS, (1, 8, 8)) > 0
        halves = pixels_score(torch.where(is_open, picture, base + std * antithetic(1, HALVES_OF_PIXELS)))
        assert bool((is_open[: HALVES_OF_PIXELS // 2] ^ is_open[HALVES_OF_PIXELS // 2 :]).all())
        before = float(pixels_score(picture[None]))
        expected = max(before - statistics.mean(closed.tolist()), 2 * statistics.stdev(halves.tolist()))
        assert float(found.score_before[pair]) == pytest.approx(before, rel=1e-12)
        assert float(found.score_closed[pair]) == pytest.approx(statistics.mean(closed.tolist()), rel=1e-9)
        assert float(found.score_range[pair]) == pytest.approx(expected, rel=1e-9)


def test_it_depends_on_no_setting_of_the_descent():
    expected = record_of(pictures())
    for settings in (
        {"seed": 1},
        {"seed": 2**31},
        {"n_steps": 5},
        {"n_samples": 1},
        {"n_samples": 7},
        {"beta": 3.0, "lr": 0.1, "initial_gate": 0.3, "antithetic": False},
        {"internal_batch_size": 1},
        {"internal_batch_size": 3},
        {"internal_batch_size": 9},
    ):
        found = record_of(pictures(), **settings)
        for name in ("score_range", "score_closed"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=0, msg=str)
    other = record_of(pictures(), variance=1.0)
    assert not torch.allclose(other.score_closed, expected.score_closed)


def test_it_depends_on_the_pair_alone():
    given, words = pictures(), torch.linspace(-1, 1, 4).double()
    whole = record_of(given, additional=words)
    order = [2, 0, 3, 1]
    turned = record_of(given[order], additional=words[order])
    for name in ("score_range", "score_closed"):
        expected = getattr(whole, name)
        torch.testing.assert_close(getattr(turned, name), expected[order], rtol=1e-12, atol=0)
        for pair in range(4):
            row = slice(pair, pair + 1)
            alone = record_of(given[row], additional=words[row])
            torch.testing.assert_close(getattr(alone, name), expected[row], rtol=1e-12, atol=0)


@pytest.mark.parametrize("prior", [None, "pair", "given"])
def test_padding_does_not_change_it(prior):
    torch.manual_seed(0)
    embed = torch.nn.Embedding(20, 6).double().eval()
    anchor = torch.randn(6).double()
    given = ChannelStatistics(torch.linspace(-1, 1, 6), torch.linspace(0.5, 2, 6)) if prior == "given" else prior

    def score(ids: Tensor, mask: Tensor) -> Tensor:
        read = (embed(ids) * mask[..., None]).sum(1)
        return torch.cosine_similarity(read, anchor.expand_as(read))

    method = MultiModalInfoBottleneck(score, [embed], [TextLayout(mask_argument=1)], statistics=[given])
    ids, mask = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    records = []
    for more in (0, 1, 5):
        filler = torch.zeros(2, more, dtype=torch.long)
        arguments = torch.cat([ids, filler], 1), torch.cat([mask, filler], 1)
        _, record = method.attribute_with_record(arguments[0], additional_forward_args=arguments[1], n_steps=1)
        records.append(record.modalities[0])
    _, record = method.attribute_with_record(ids[1:, :2], additional_forward_args=mask[1:, :2], n_steps=1)
    for name in ("score_range", "score_closed"):
        for found in records[1:]:
            torch.testing.assert_close(getattr(found, name), getattr(records[0], name), rtol=1e-12, atol=1e-15)
        alone = getattr(record.modalities[0], name)
        torch.testing.assert_close(alone, getattr(records[0], name)[1:], rtol=1e-12, atol=1e-15)


def test_draws_of_the_stakes_are_none_of_the_descents():
    shape = (5, 4)
    stakes = [noise(0, 0, 2**32 + purpose, 2, shape) for purpose in range(3)]
    descent = [noise(0, 0, step, 2, shape) for step in range(50)]
    drawn = [*stakes, *descent]
    assert all(not torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[i + 1 :])


def test_a_given_range_is_taken_and_nothing_is_measured():
    calls = []

    def score(given: Tensor) -> Tensor:
        calls.append(len(given))
        return pixels_score(given)

    for given, expected in ((0.3, [0.3] * 4), ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])):
        for settings in ({}, {"internal_batch_size": 3}):
            found = record_of(pictures(), score, score_range=given, **settings)
            assert found.score_range.tolist() == pytest.approx(expected) and found.score_closed is None
    calls.clear()
    record_of(pictures(), score, score_range=torch.ones(4))
    # The pass that is recorded with a copy, two steps with the pass that the first is held against, and the record's.
    assert calls == [5, 16, 4, 16, 32]
    calls.clear()
    record_of(pictures(), score)
    # Besides, all draws of closed gates at once.
    assert calls == [5, 24, 4, 16, 16, 32]


@pytest.mark.parametrize("given", [0, -1.0, math.nan, math.inf, [1.0, 0.0, 1.0, 1.0], [], torch.ones(4, 1)])
def test_ranges_that_are_none(given):
    with pytest.raises(ValueError, match="score_range: expected a finite number above 0, or one per pair"):
        record_of(pictures(), score_range=given)


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("internal_batch_size", [None, 4])
def test_ranges_of_other_pairs(count: int, internal_batch_size: int | None):
    with pytest.raises(ValueError, match=rf"score_range: expected one number or one per pair \(4\), got {count}"):
        record_of(pictures(), score_range=[1.0] * count, internal_batch_size=internal_batch_size)


@pytest.mark.parametrize("internal_batch_size", [None, 4])
def test_a_score_that_is_not_finite_with_gates_closed_is_named(internal_batch_size: int | None):
    given = pictures()
    # A closed gate's noise has half the deviation: less than is asked for in the third picture alone.
    given[[0, 1, 3], 0] *= 5

    def score(seen: Tensor) -> Tensor:
        return (seen[:, 0].flatten(1).std(1) - 0.2).log()

    with pytest.raises(ValueError, match="inputs: the score with closed gates is NaN or infinite for pair 2;"):
        record_of(given, score, internal_batch_size=internal_batch_size)


@pytest.mark.parametrize("count", [3, HALVES_OF_PIXELS])
def test_gates_that_a_pair_keeps_shut_stay_shut_where_half_are_open(count: int):
    class FirstRowsOnly(MultiModalInfoBottleneck):
        """So many rows of each picture may open as its first value says."""

        def _gate_filter(self, index: int, settings: object):
            def make(hidden: Tensor, inputs: Tensor, real: Tensor | None):
                rows = torch.arange(8).view(1, 1, 8, 1) < inputs[:, :1, :1, :1]
                return lambda alpha: torch.where(rows, alpha, -torch.inf)

            return make

    given = pictures(count)
    given[:, 0, 0, 0] = torch.arange(2, 2 + count)
    passed: list[Tensor] = []

    def score(seen: Tensor) -> Tensor:
        passed.append(seen)
        return pixels_score(seen)

    def record(some: Tensor):
        settings = {"n_steps": 1, "n_samples": HALVES_OF_PIXELS, "initial_gate": 0.5}
        return FirstRowsOnly(score, [None]).attribute_with_record(some, **settings)[1].modalities[0]

    whole = record(given)
    # After the recorded pass, the draws with all gates closed before those with half of them.
    halves = passed[1].unflatten(0, (count, CLOSED_DRAWS + HALVES_OF_PIXELS))[:, CLOSED_DRAWS:]
    for pair in range(count):
        kept = (halves[pair] == given[pair]).all(1)
        assert bool(kept[:, : 2 + pair].any()) and not kept[:, 2 + pair :].any()
        alone = record(given[pair : pair + 1])
        torch.testing.assert_close(alone.score_range, whole.score_range[pair : pair + 1], rtol=1e-12, atol=0)
