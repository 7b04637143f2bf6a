"""How many pairs and draws go through the model together where the memory decides."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from captum_m2ib import MultiModalInfoBottleneck
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layers import Layer
from captum_m2ib.engine.portions import FIRST_ROWS, ROWS_WITHOUT_GRAPH
from captum_m2ib.engine.suffix import Suffix, Tap

WIDTH, POSITIONS = 8, 5
# What a row makes behind the entry: two tensors of twice the width, and their sum.
ROW = 4 * (2 * POSITIONS * 2 * WIDTH + 1)


class Rows(nn.Module):
    """A layer, the rows of each of its calls with a graph and without."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2 * WIDTH)
        self.seen: dict[bool, list[int]] = {True: [], False: []}

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen[hidden.requires_grad].append(len(hidden))
        return self.linear(hidden)


class Score(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.entry, self.rows = nn.Identity(), Rows()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.rows(self.entry(hidden)).tanh().flatten(1).sum(1)


def attribute(pairs: int, **settings) -> tuple[Tensor, dict[bool, list[int]]]:
    model = Score().eval().double()
    given = torch.randn(pairs, POSITIONS, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    method = MultiModalInfoBottleneck(model, ["entry"])
    return method.attribute(given, **{"n_steps": 2, "n_samples": 4, **settings}), model.rows.seen


def test_what_a_row_makes_is_counted():
    model = Score().eval()
    with borrowing(model):
        suffix = Suffix(
            lambda given: model(*given), (torch.randn(3, POSITIONS, WIDTH),), 3, [Tap(Layer(model.entry, "e"))]
        )
    assert suffix.bytes_per_row([0]) == ROW


@pytest.mark.parametrize(
    ("budget", "graph"),
    [
        (1, [1] * 4 * 2 * 5),
        (2 * 2 * ROW, [2] * 2 * 2 * 5),
        (2 * 9 * ROW, [8] * 2 * 2 + [4] * 2),
        (2 * 21 * ROW, [20] * 2),
    ],
    ids=["one row at least", "draws are cut", "pairs are cut", "all fit"],
)
def test_as_many_rows_as_the_budget_has_room_for(budget: int, graph: list[int]):
    found, seen = attribute(5, memory_budget=budget)
    assert seen[True] == graph
    expected, _ = attribute(5)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_pairs_are_recorded_anew_once_at_most():
    _, seen = attribute(5, memory_budget=2 * 9 * ROW)
    # Five pairs with the copy of the first, of which two fit; then two, two and one.
    assert [rows for rows in seen[False] if rows in (3, 6)][:2] == [6, 3]
    assert Counter(seen[False])[6] == 1


def test_rows_without_a_graph_are_more():
    _, seen = attribute(1, memory_budget=10**9)
    assert max(seen[False]) <= 4 * ROWS_WITHOUT_GRAPH and max(seen[False]) > max(seen[True])


@pytest.mark.parametrize(
    ("steps", "draws"), [(3, [4, 4, 4]), (4, [1, 7, 7, 1]), (5, [1, 7, 4, 7, 1]), (6, [1, 7, 4, 4, 7, 1])]
)
def test_the_ends_of_a_descent_leave_their_noise_to_the_steps_beside_them(steps: int, draws: list[int]):
    given = {"n_steps": steps, "n_samples": 4, "memory_budget": 10**9}
    _, seen = attribute(1, noiseless=0.5, **given)
    assert seen[True] == draws and sum(draws) == 4 * steps
    _, seen = attribute(1, **given)
    assert seen[True] == [4] * steps
    found, seen = attribute(3, noiseless=0.5, **given, internal_batch_size=8)
    assert max(seen[True]) <= 8 and sum(seen[True]) == 3 * 4 * steps
    torch.testing.assert_close(found, attribute(3, noiseless=0.5, **given)[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("most", [3, 4, 8, 9])
def test_rows_that_are_asked_for_bound_every_pass(most: int):
    found, seen = attribute(5, internal_batch_size=most)
    # Where draws fill a pass, the recorded pass's copy of the first pair has room as well.
    assert max(seen[True]) <= most and max(seen[False]) <= most
    expected, _ = attribute(5)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_many_pairs_are_not_recorded_all_at_once():
    pairs = FIRST_ROWS // 4 + 3
    _, seen = attribute(pairs, memory_budget=10**9)
    assert max(seen[False][:1]) == FIRST_ROWS // 4 + 1
    assert seen[True] == [FIRST_ROWS] * 2 + [12] * 2


@pytest.mark.parametrize("budget", [0, -1, 1.5, None])
def test_a_budget_that_is_none(budget):
    with pytest.raises(ValueError, match="memory_budget: expected a whole number of at least 1"):
        attribute(1, memory_budget=budget)
