"""Padding that the ids show: said where somebody says otherwise, and believed row by row."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from captum_m2ib import TextLayout
from captum_m2ib.engine.layouts import PackedLayout
from captum_m2ib.engine.padding import between_padding, trailing_runs
from captum_m2ib.engine.real_units import real_tokens

BY_PADDING = TextLayout(pad_token_id=1, reads_padding=True, source="the configuration")
BY_END = TextLayout(2, end_token_id=9, source="the configuration")
BY_MASK = TextLayout(2, source="the configuration")


def ids_of(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def told(layout: TextLayout, ids: Tensor, mask: Tensor | None = None) -> list[list[int]] | None:
    arguments = (None, ids) if mask is None else (None, ids, mask)
    real = real_tokens(layout, ids, arguments)
    return None if real is None else real.int().tolist()


def quietly(layout: TextLayout, ids: Tensor, mask: Tensor | None = None) -> list[list[int]] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return told(layout, ids, mask)


def test_runs_at_the_end():
    assert trailing_runs(ids_of([3, 0, 0, 0], [0, 0, 0, 4], [5, 5, 5, 5])).tolist() == [3, 1, 4]


def test_what_stands_between_words_is_no_padding():
    assert between_padding(ids_of([0, 4, 0, 5, 0, 0]), 0).int().tolist() == [[0, 1, 1, 1, 0, 0]]


# Three words, the end token 1, and padding 0, under a configuration that takes 1 for padding.
@pytest.mark.parametrize("length", [5, 6, 9])
def test_ids_that_are_padded_with_another_id_are_believed(length: int):
    ids = ids_of([4, 5, 6, 1] + [0] * (length - 4))
    message = rf"pair 0 end in a run of {length - 4} tokens of the id 0, while the configuration says .* the id 1;"
    with pytest.warns(UserWarning, match=message) as caught:
        assert told(BY_PADDING, ids) == [[1, 1, 1, 1] + [0] * (length - 4)]
    assert caught[0].filename == __file__
    assert "TextLayout(pad_token_id=..., reads_padding=True)" in str(caught[0].message)


def test_each_row_is_judged_by_itself():
    rows = ids_of([4, 5, 6, 1, 0, 0, 0], [4, 5, 6, 7, 8, 4, 3], [4, 5, 1, 1, 1, 1, 1])
    whole = quietly(BY_PADDING, rows)
    assert whole == [[1, 1, 1, 1, 0, 0, 0], [1] * 7, [1, 1, 0, 0, 0, 0, 0]]
    assert [quietly(BY_PADDING, row[None])[0] for row in rows] == whole


@pytest.mark.parametrize(
    ("layout", "ids", "real"),
    [
        (BY_PADDING, [4, 5, 1, 1, 1], [1, 1, 0, 0, 0]),
        (BY_PADDING, [1, 1, 1, 4, 5], [0, 0, 0, 1, 1]),
        (BY_PADDING, [4, 5, 5], [1, 1, 1]),
        (BY_PADDING, [5, 5, 5, 5], [1, 1, 1, 1]),
        (BY_END, [4, 5, 9, 0, 0, 0], [1, 1, 1, 0, 0, 0]),
        (BY_END, [4, 5, 9, 9, 9, 9], [1, 1, 1, 0, 0, 0]),
        (TextLayout(ends_at_highest=True, source="it"), [3, 4, 9, 0, 0, 0], [1, 1, 1, 0, 0, 0]),
    ],
)
def test_ids_that_agree_are_silent(layout: TextLayout, ids: list[int], real: list[int]):
    assert told(layout, ids_of(ids)) == [real]


def test_an_end_token_that_never_comes():
    with pytest.warns(UserWarning, match="run of 3 tokens of the id 0, while the configuration knows no end token"):
        assert told(BY_END, ids_of([4, 5, 6, 0, 0, 0])) == [[1, 1, 1, 0, 0, 0]]


def test_a_mask_that_is_missing_or_forgets_padding_is_said():
    ids = ids_of([4, 5, 6, 0, 0, 0])
    with pytest.warns(UserWarning, match="while there is no mask: they are read, and explained, as words"):
        assert told(BY_MASK, ids) is None
    with pytest.warns(UserWarning, match="while the mask calls them real"):
        assert told(BY_MASK, ids, torch.ones(1, 6)) == [[1] * 6]
    assert told(BY_MASK, ids, torch.tensor([[1, 1, 1, 0, 0, 0]])) == [[1, 1, 1, 0, 0, 0]]


def test_a_layout_of_ones_own_is_believed():
    ids = ids_of([4, 5, 1, 0, 0, 0, 0])
    assert told(TextLayout(pad_token_id=1), ids) == [[1] * 7]
    assert told(TextLayout(), ids) is None


@pytest.mark.parametrize("layout", [BY_MASK, TextLayout(2), PackedLayout(2)])
def test_a_mask_of_another_shape_is_an_error(layout: TextLayout):
    inputs = torch.randn(2, 5, 4) if isinstance(layout, PackedLayout) else torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(
        ValueError, match=r"expected the mask \(argument .*\(2, 5\) for these inputs, got \(2, 1, 1, 5\); pass"
    ):
        real_tokens(layout, inputs, (None, inputs, torch.ones(2, 1, 1, 5)))
