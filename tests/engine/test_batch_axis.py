"""The batch is found where it runs, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_m2ib.engine.batch_axis import BatchAxis, find_batch_axis, nearly_equal


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 6),
    others=st.lists(st.integers(1, 12), min_size=0, max_size=3),
    place=st.integers(0, 3),
    data=st.data(),
)
def test_the_batch_is_found_wherever_it_runs(rows, others, place, data):
    place = min(place, len(others))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tensor = torch.randn(rows, *others, generator=generator)
    tensor[-1] = tensor[0]
    moved = tensor.movedim(0, place)
    axis = find_batch_axis(moved, rows)
    assert axis == BatchAxis(place)
    torch.testing.assert_close(axis.split(moved), tensor, rtol=0, atol=0)
    torch.testing.assert_close(axis.merge(tensor), moved, rtol=0, atol=0)
    repeated = axis.split(axis.repeat(axis.first(moved, rows - 1), 3))
    torch.testing.assert_close(repeated, tensor[:-1].repeat_interleave(3, 0), rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 5), heads=st.integers(2, 5), length=st.integers(1, 7), seed=st.integers(0, 99))
def test_a_batch_merged_with_heads_is_found(rows, heads, length, seed):
    tensor = torch.randn(rows, heads, length, 3, generator=torch.Generator().manual_seed(seed))
    tensor[-1] = tensor[0]
    merged = tensor.flatten(0, 1)
    axis = find_batch_axis(merged, rows)
    assert axis == BatchAxis(0, heads)
    assert torch.equal(axis.split(merged), tensor) and torch.equal(axis.merge(tensor), merged)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 6), shape=st.lists(st.integers(1, 12), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_a_table_of_random_numbers_is_no_batch(rows, shape, seed):
    assert find_batch_axis(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), rows) is None


@pytest.mark.parametrize("rows", [2, 4])
def test_a_table_that_repeats_its_channels_is_no_batch(rows):
    angles = torch.arange(7.0)[:, None] * torch.rand(1, 8)
    cosines = torch.cat([angles, angles], -1).cos()[None]
    assert find_batch_axis(cosines, rows) is None


def test_whole_numbers_and_infinities_are_compared():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3]])
    assert find_batch_axis(ids, 3) == BatchAxis(0)
    mask = torch.zeros(3, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
    assert find_batch_axis(mask, 3) == BatchAxis(0)
    assert find_batch_axis(torch.tensor(1.0), 2) is None


def test_tensors_of_two_types_are_never_the_same():
    ones = torch.ones(2)
    assert nearly_equal(ones, ones.clone()) and not nearly_equal(ones, ones.double())
    assert not nearly_equal(ones.long(), ones)
