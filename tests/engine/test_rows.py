"""Rows are made of pairs without a trace of the caller's autograd, and one score must come back for each."""

from __future__ import annotations

import pytest
import torch

from captum_m2ib.engine.rows import append_first, check_score, repeat_pairs


@pytest.mark.parametrize(
    ("make", "rows"), [(append_first, [0, 1, 0]), (lambda a, n: repeat_pairs(a, n, 2), [0, 0, 1, 1])]
)
def test_only_batches_of_pairs_get_more_rows(make, rows):
    batch, table, scalar = torch.randn(2, 3, requires_grad=True), torch.randn(3, 2), torch.tensor(2.0)
    made, *others = make((batch, table, scalar, "plain", None), 2)
    assert torch.equal(made, batch[rows]) and not made.requires_grad
    assert torch.equal(others[0], table) and torch.equal(others[1], scalar) and others[2:] == ["plain", None]


@pytest.mark.parametrize("make", [append_first, lambda a, n: repeat_pairs(a, n, 2)])
def test_tensors_of_inference_mode_can_take_part_in_autograd(make):
    with torch.inference_mode():
        batch, table = torch.ones(2, 3), torch.ones(3)
    assert not any(tensor.is_inference() for tensor in make((batch, table), 2))


def test_scores_in_a_column_are_one_per_pair():
    assert check_score(torch.zeros(4, 1), 4, 2).shape == (4,)


@pytest.mark.parametrize(
    ("score", "got"),
    [
        (torch.zeros(4, 4), r"a tensor of shape \(2, 2\)"),
        (torch.zeros(1, 4), r"a tensor of shape \(1, 2\)"),
        (3.0, "got float"),
        (torch.zeros(4, dtype=torch.int64), "floating-point scores, got torch.int64"),
    ],
)
def test_other_scores_are_refused_in_terms_of_pairs(score, got):
    with pytest.raises(ValueError, match=got):
        check_score(score, 4, 2)
