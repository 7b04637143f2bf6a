"""Remove and retrain on a task whose answer is known: one unit holds the label, and a learner that finds it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from captum_m2ib.metrics import RetrainCell, RetrainTable, roar, roar_plus

EXAMPLES, UNITS = 60, 10


def data(seed: int) -> tuple[Tensor, Tensor]:
    """The label is the sign of unit 0 and, more weakly, of unit 1; the other units are noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(EXAMPLES) % 2
    values = torch.randn(EXAMPLES, UNITS, generator=generator) / 10
    values[:, 0] += 2.0 * labels - 1
    values[:, 1] += 0.5 * (2.0 * labels - 1)
    return values, labels


def fit(train: tuple[Tensor, ...], seed: int) -> Tensor:
    """Difference of the classes' means: the direction of a closed-form classifier."""
    values, labels = train
    values = values.flatten(1)
    return values[labels == 1].mean(0) - values[labels == 0].mean(0)


def accuracy(model: Tensor, test: tuple[Tensor, ...]) -> float:
    projected = test[0].flatten(1) @ model
    # What is constant tells nothing: such an example is right half the time.
    right = (projected > 1e-6) == (test[1] == 1)
    return float(torch.where(projected.abs() <= 1e-6, 0.5, right.float()).mean())


def loss(model: Tensor, test: tuple[Tensor, ...]) -> float:
    """1 minus the share of the direction that lies on the two units that matter, and a little."""
    return 1.1 - float(model[:2].norm() / model.norm().clamp(min=1e-12))


TRAIN, TEST = data(0), data(1)
ORACLE = torch.tensor([10.0, 9.0, *range(UNITS - 2)]).expand(EXAMPLES, -1)
MAPS = {"oracle": (ORACLE, ORACLE), "inverse": (-ORACLE, -ORACLE)}
OPTIONS: dict[str, Any] = {"fill": 0.0, "fractions": (0.2, 0.8), "seeds": (0, 1, 2)}


def means(table: RetrainTable) -> dict[tuple[str, float], float]:
    return {(row.method, row.fraction): row.mean for row in table.summary()}


def test_roar_where_the_outcome_is_known():
    found = means(roar(fit, accuracy, TRAIN, TEST, MAPS, **OPTIONS))
    assert found["intact", 0.0] == 1
    # Without its two units nothing but noise is left; the inverse map takes noise only.
    assert found["oracle", 0.2] < 0.75 and found["oracle", 0.8] < 0.75
    assert found["inverse", 0.2] == found["inverse", 0.8] == 1
    assert found["oracle", 0.2] < found["random", 0.2] <= 1
    # With everything replaced nothing is left to learn.
    nothing = means(roar(fit, accuracy, TRAIN, TEST, MAPS, **{**OPTIONS, "fractions": (1.0,)}))
    assert {name: value for (name, _), value in nothing.items()} == {
        "intact": 1,
        "oracle": 0.5,
        "inverse": 0.5,
        "random": 0.5,
    }


def test_keeping_the_most_relevant_reverses_the_order():
    kept = means(roar(fit, accuracy, TRAIN, TEST, MAPS, order="lerf", **OPTIONS))
    assert kept["oracle", 0.8] == 1 and kept["inverse", 0.8] < 0.75


def test_a_random_ranking_removes_the_units_at_chance():
    shares: list[float] = []
    replaced: list[float] = []

    def watch(train: tuple[Tensor, ...], seed: int) -> Tensor:
        shares.append(float((train[0][:, 0] == 7).float().mean()))
        replaced.append(float((train[0] == 7).float().mean()))
        return fit(train, seed)

    table = roar(watch, accuracy, TRAIN, TEST, {}, fill=7.0, fractions=(0.3,), seeds=range(20))
    assert len(table.cells) == 40
    # The first twenty models see intact examples.
    assert shares[:20] == replaced[:20] == [0] * 20
    assert replaced[20:] == pytest.approx([0.3] * 20)
    error = math.sqrt(0.3 * 0.7 / EXAMPLES / 20)
    assert sum(shares[20:]) / 20 == pytest.approx(0.3, abs=4 * error)


def test_roar_plus_where_the_outcome_is_known():
    maps = {name: train for name, (train, _) in MAPS.items()}
    table = roar_plus(fit, loss, TRAIN, TEST, maps, **OPTIONS)
    found = means(table)
    intact = loss(fit(TRAIN, 0), TEST)
    removed = TRAIN[0].clone()
    removed[:, :2] = 0
    expected = (loss(fit((removed, TRAIN[1]), 0), TEST) - intact) / intact
    assert found["oracle", 0.2] == pytest.approx(expected) and expected > 1
    assert abs(found["inverse", 0.2]) < 0.05 and found["intact", 0.0] == 0
    assert found["inverse", 0.2] < found["random", 0.2] < found["oracle", 0.2]


def test_roar_plus_evaluates_on_intact_pairs():
    seen: list[tuple[Tensor, ...]] = []

    def watch(model: Tensor, test: tuple[Tensor, ...]) -> float:
        seen.append(test)
        return 0.0

    table = roar_plus(fit, watch, TRAIN, TEST, {"oracle": ORACLE}, **OPTIONS)
    assert all(test[0] is TEST[0] for test in seen)
    # Without a loss there is nothing to compare with.
    assert all(math.isnan(cell.value) for cell in table.cells)


def test_replacement_by_hand():
    maps = torch.arange(16.0).view(1, 4, 4).repeat(2, 1, 1)
    pixels = torch.arange(2 * 2 * 16.0).view(2, 2, 4, 4)
    seen: list[Tensor] = []

    def watch(train: tuple[Tensor, ...], seed: int) -> None:
        seen.append(train[0])

    roar(watch, lambda model, test: 0.0, (pixels,), (pixels,), {"m": (maps, maps)}, fractions=(0.25,), seeds=(0,))
    expected = pixels.clone()
    # The quarter of highest rank is the last row; channel means over both pictures are 23.5 and 39.5.
    expected[:, 0, 3], expected[:, 1, 3] = 23.5, 39.5
    torch.testing.assert_close(seen[0], pixels)
    torch.testing.assert_close(seen[1], expected)


def test_blocks_of_pixels_are_ranked_by_their_sum_and_replaced_whole():
    maps = torch.zeros(1, 4, 6)
    maps[0, 0, 5] = 5.0  # the highest pixel, in the block of second rank
    maps[0, 2:, 2:4] = 2.0
    pixels = torch.arange(24.0).view(1, 1, 4, 6)
    seen: list[Tensor] = []

    def watch(train: tuple[Tensor, ...], seed: int) -> None:
        seen.append(train[0][0, 0])

    def replaced(*blocks: tuple[slice, slice]) -> Tensor:
        expected = pixels[0, 0].clone()
        for rows, columns in blocks:
            expected[rows, columns] = -1
        return expected

    top, bottom = slice(0, 2), slice(2, 4)
    first, second = (bottom, slice(2, 4)), (top, slice(4, 6))
    options: dict[str, Any] = {"fill": -1.0, "seeds": (0,), "block": 2}
    given = (watch, lambda model, test: 1.0, (pixels,), (pixels,))
    roar_plus(*given, {"m": maps}, fractions=(1 / 6, 1 / 3), **options)
    assert seen[1].equal(replaced(first)) and seen[2].equal(replaced(first, second))
    # Random ranks are those of blocks, too.
    assert all(
        (found.unfold(0, 2, 2).unfold(1, 2, 2).flatten(2) == -1).all(2).sum() == n
        for found, n in zip(seen[3:], (1, 2), strict=True)
    )
    assert [int((found == -1).sum()) for found in seen[3:]] == [4, 8]
    # One pixel that must stay keeps its block, and fractions count the rest.
    maskable = torch.ones(1, 4, 6, dtype=torch.bool)
    maskable[0, 3, 3] = False
    seen.clear()
    roar_plus(*given, {"m": maps}, fractions=(1 / 5,), maskable=maskable, **options)
    assert seen[1].equal(replaced(second))


def test_training_and_test_examples_are_replaced_by_their_own_maps():
    seen: list[Tensor] = []

    def watch_fit(train: tuple[Tensor, ...], seed: int) -> None:
        seen.append(train[0])

    def watch_evaluate(model: None, test: tuple[Tensor, ...]) -> float:
        seen.append(test[0])
        return 0.0

    train, test = torch.ones(3, 4), torch.ones(2, 4)
    maps = {"m": (torch.arange(4.0).repeat(3, 1), -torch.arange(4.0).repeat(2, 1))}
    roar(watch_fit, watch_evaluate, (train,), (test,), maps, fill=0.0, fractions=(0.25,), seeds=(0,))
    assert seen[0].equal(train) and seen[1].equal(test)
    assert seen[2].tolist() == [[1, 1, 1, 0]] * 3 and seen[3].tolist() == [[0, 1, 1, 1]] * 2


def test_tokens_that_must_stay_do():
    ids = torch.tensor([[90, 5, 7, 5, 91, 1], [90, 2, 91, 1, 1, 1]])
    maskable = torch.tensor([[False, True, True, True, False, False], [False, True, False, False, False, False]])
    bits = torch.tensor([[9.0, 1.0, 3.0, 2.0, 9.0, torch.nan], [9.0, 1.0, 9.0, 0.0, 0.0, 0.0]])
    seen: list[Tensor] = []

    def watch(train: tuple[Tensor, ...], seed: int) -> None:
        seen.append(train[1])

    pixels = torch.zeros(2, 1, 1, 1)
    options = {"modality": 1, "fill": 0, "fractions": (2 / 3, 1.0), "seeds": (0,)}
    pairs = (pixels, ids)
    roar_plus(watch, lambda model, test: 1.0, pairs, pairs, {"m": bits}, maskable=maskable, **options)
    assert seen[1].tolist() == [[90, 5, 0, 0, 91, 1], [90, 0, 91, 1, 1, 1]]
    assert seen[2].tolist() == [[90, 0, 0, 0, 91, 1], [90, 0, 91, 1, 1, 1]]
    assert bool((seen[3][~maskable] == ids[~maskable]).all()) and int((seen[3] == 0).sum()) == 3


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    path, calls = tmp_path / "cells.json", 0

    def failing(train: tuple[Tensor, ...], seed: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise RuntimeError("out of memory")
        return fit(train, seed)

    with pytest.raises(RuntimeError, match="out of memory"):
        roar(failing, accuracy, TRAIN, TEST, MAPS, path=path, **OPTIONS)
    assert len(json.loads(path.read_text())["cells"]) == 7
    resumed = roar(failing, accuracy, TRAIN, TEST, MAPS, path=path, **OPTIONS)
    assert calls == 8 + (3 + 3 * 2 * 3 - 7)
    assert resumed == roar(fit, accuracy, TRAIN, TEST, MAPS, **OPTIONS)
    finished = roar(failing, accuracy, TRAIN, TEST, MAPS, path=path, **OPTIONS)
    assert finished == resumed and calls == 22
    assert list(tmp_path.iterdir()) == [path]
    # Another method and another seed only add to what is there.
    more = {**MAPS, "late": MAPS["oracle"]}
    roar(failing, accuracy, TRAIN, TEST, more, path=path, **{**OPTIONS, "seeds": (0, 1, 2, 3)})
    assert calls == 22 + 6 + 1 + 8 - 0
    assert roar(failing, accuracy, TRAIN, TEST, MAPS, path=path, **OPTIONS) == resumed


def test_results_of_something_else_are_refused(tmp_path):
    path = tmp_path / "cells.json"
    options = {**OPTIONS, "path": path, "seeds": (0,)}
    roar(fit, accuracy, TRAIN, TEST, MAPS, **options)
    changed = (TRAIN[0] + 1, TRAIN[1])
    for call in (
        lambda: roar(fit, accuracy, changed, TEST, MAPS, **options),
        lambda: roar(fit, accuracy, TRAIN, TEST, MAPS, **{**options, "fill": 1.0}),
        lambda: roar(fit, accuracy, TRAIN, TEST, MAPS, order="lerf", **options),
        lambda: roar_plus(fit, accuracy, TRAIN, TEST, {"oracle": ORACLE}, **options),
    ):
        with pytest.raises(ValueError, match=r"path: .* holds results of other data or settings"):
            call()
    with pytest.raises(ValueError, match=r"path: .* holds results of other maps of 'oracle'"):
        roar(fit, accuracy, TRAIN, TEST, {"oracle": MAPS["inverse"]}, **options)


def test_a_value_that_is_nan_is_kept_and_follows_the_policy(tmp_path):
    path = tmp_path / "cells.json"
    options = {"fill": 0.0, "fractions": (0.5,), "seeds": (0, 1, 2), "path": path}

    def broken(model: Any, test: tuple[Tensor, ...]) -> float:
        return math.nan if model == 1 else float(model)

    def numbered(train: tuple[Tensor, ...], seed: int) -> int:
        return seed

    roar(numbered, broken, TRAIN, TEST, {}, **options)
    table = roar(numbered, broken, TRAIN, TEST, {}, **options)
    assert "NaN" not in path.read_text()
    row = table.summary()[0]
    assert math.isnan(row.mean) and math.isnan(row.low) and (row.seeds, row.omitted) == (2, 1)
    row = table.summary("omit")[0]
    assert (row.mean, row.seeds, row.omitted) == (1, 2, 1)
    with pytest.raises(ValueError, match="cells: expected a value for every seed of 'intact' at 0, 1 are NaN"):
        table.summary("raise")


@pytest.mark.parametrize("block", [3, 4, -2])
def test_blocks_that_do_not_fill_the_picture_are_refused(block: int):
    pixels, maps = torch.ones(2, 1, 4, 6), torch.ones(2, 4, 6)
    with pytest.raises(ValueError, match=rf"block: .* got {block} for \(2, 1, 4, 6\)"):
        roar_plus(fit, loss, (pixels,), (pixels,), {"m": maps}, block=block)


def test_differences_are_taken_between_the_same_seeds():
    values = {"m": (0.9, 0.5, 0.4), "random": (0.8, 0.3, 0.1), "intact": (1.0, 1.0, 1.0)}
    cells = [
        RetrainCell(name, 0.0 if name == "intact" else 0.5, s, v)
        for name, row in values.items()
        for s, v in enumerate(row)
    ]
    # Cells in any order: it is the seed that pairs them.
    table = RetrainTable("roar", tuple(reversed(cells)))
    (row,) = table.against()
    low, high = stats.t.interval(0.95, 2, loc=0.2, scale=stats.sem([0.1, 0.2, 0.3]))
    assert (row.method, row.fraction, row.seeds) == ("m", 0.5, 3)
    assert (row.mean, row.low, row.high) == (pytest.approx(0.2), pytest.approx(low), pytest.approx(high))
    (opposite,) = table.against("m")
    assert (opposite.method, opposite.mean) == ("random", pytest.approx(-0.2))
    for unknown in ("other", "intact"):
        with pytest.raises(ValueError, match=f"reference: expected one of m, random, got '{unknown}'"):
            table.against(unknown)


def test_token_ids_have_no_mean():
    ids = TEST[0].long()
    with pytest.raises(ValueError, match=r"fill: .* got 'mean' for torch.int64"):
        roar(fit, accuracy, (ids,), (ids,), {})


def test_intervals_are_students():
    values = [0.7, 0.9, 0.8, 0.6]
    table = RetrainTable("roar", tuple(RetrainCell("m", 0.5, seed, value) for seed, value in enumerate(values)))
    row = table.summary()[0]
    low, high = stats.t.interval(0.95, 3, loc=0.75, scale=stats.sem(values))
    assert (row.mean, row.low, row.high) == (pytest.approx(0.75), pytest.approx(low), pytest.approx(high))
    assert str(table) == f"m  0.50  0.7500 [{low:.4f}, {high:.4f}]"
    alone = RetrainTable("roar", table.cells[:1]).summary()[0]
    assert alone.mean == 0.7 and math.isnan(alone.low) and math.isnan(alone.high)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fractions": (0.0, 0.5)}, "fractions: expected shares above 0 and at most 1"),
        ({"fractions": ()}, "fractions: expected different values, at least one"),
        ({"seeds": (1, 1)}, "seeds: expected different values"),
        ({"order": "best"}, "order: expected one of"),
        ({"fill": "median"}, "fill: expected a number or tensor, or 'mean'"),
        ({"block": 2}, r"block: expected 1, or for pictures a divisor of height and width, got 2 for \(60, 10\)"),
        ({"block": 0}, "block: expected 1"),
        ({"modality": 1}, r"modality: expected pictures, .* at position 1, got shape \(60,\)"),
        ({"modality": 2}, "train: expected a tuple of tensors of equal length that reaches position 2"),
        ({"attributions": {"random": (ORACLE, ORACLE)}}, "attributions: the name 'random' is taken"),
        ({"attributions": {"m": (ORACLE * math.nan, ORACLE)}}, r"attributions\['m'\]: expected finite maps.* 60 of 60"),
        ({"attributions": {"m": (ORACLE[:5], ORACLE)}}, r"attributions: expected one value per unit of train"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {"attributions": MAPS, **OPTIONS, **changes}
    with pytest.raises(ValueError, match=message):
        roar(fit, accuracy, TRAIN, TEST, **arguments)
