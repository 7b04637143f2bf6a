"""Bits are moved from hidden-state units to input units, never made or lost."""

from __future__ import annotations

import pytest
import torch
from families import clip_case
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_m2ib.layouts import (
    PatchLayout,
    TextLayout,
    image_grid,
    real_elements,
    real_tokens,
    to_pixels,
    to_tokens,
)

sizes = st.integers(1, 5)


@settings(max_examples=100, deadline=None)
@given(
    rows=sizes,
    columns=sizes,
    patch=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    prefix=st.integers(0, 3),
    margin=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    channels=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_bits_are_conserved(rows, columns, patch, prefix, margin, channels, seed):
    height, width = (n * p + min(m, p - 1) for n, p, m in zip((rows, columns), patch, margin, strict=True))
    generator = torch.Generator().manual_seed(seed)
    elements = torch.rand(2, prefix + rows * columns, 3, generator=generator, dtype=torch.float64)
    layout = PatchLayout(patch, prefix)
    grid = image_grid(layout, elements, (height, width))
    assert grid.shape == (2, rows, columns)
    torch.testing.assert_close(grid.sum((1, 2)), elements[:, prefix:].sum((1, 2)))
    picture = torch.zeros(2, channels, height, width)
    pixels = to_pixels(layout, grid, picture)
    assert pixels.shape == picture.shape and pixels.is_contiguous() and bool((pixels >= 0).all())
    torch.testing.assert_close(pixels.sum((1, 2, 3)), grid.sum((1, 2)))
    torch.testing.assert_close(pixels, pixels[:, :1].expand_as(pixels))
    assert not pixels[:, :, rows * patch[0] :].any() and not pixels[:, :, :, columns * patch[1] :].any()


def test_grid_is_filled_row_by_row():
    elements = torch.arange(7.0).view(1, 7, 1)
    grid = image_grid(PatchLayout((4, 4), prefix=1), elements, (8, 12))
    assert grid.tolist() == [[[1, 2, 3], [4, 5, 6]]]


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 3), (1, 1), (1, 3)])
def test_one_patch_lights_its_own_place(row, column):
    grid = torch.zeros(1, 2, 4)
    grid[0, row, column] = 8.0
    pixels = to_pixels(PatchLayout((8, 6)), grid, torch.zeros(1, 3, 16, 24))[0].sum(0)
    place = divmod(int(pixels.argmax()), 24)
    assert (place[0] // 8, place[1] // 6) == (row, column)
    inside = pixels[row * 8 : row * 8 + 8, column * 6 : column * 6 + 6].sum()
    assert float(inside) > 0.5 * 8.0


def test_a_convolutional_map_brings_its_own_grid():
    elements = torch.rand(2, 5, 3, 4)
    grid = image_grid(PatchLayout((16, 16)), elements, (12, 16))
    torch.testing.assert_close(grid, elements.sum(1))
    pixels = to_pixels(PatchLayout((16, 16)), grid, torch.zeros(2, 3, 12, 16))
    torch.testing.assert_close(pixels.sum((1, 2, 3)), elements.sum((1, 2, 3)))


def test_no_bits_stay_no_bits():
    assert not to_pixels(PatchLayout((4, 4)), torch.zeros(1, 2, 2), torch.zeros(1, 3, 8, 8)).any()


def test_prefix_tokens_may_be_missing_already():
    layout = PatchLayout((4, 4), prefix=1)
    assert image_grid(layout, torch.ones(1, 4, 2), (8, 8)).tolist() == [[[2, 2], [2, 2]]]


def test_tokens_that_are_not_the_grid_are_an_error():
    with pytest.raises(ValueError, match=r"layouts: expected 1 prefix tokens and a grid of 2 x 2 .*\(1, 7, 2\)"):
        image_grid(PatchLayout((4, 4), prefix=1), torch.ones(1, 7, 2), (8, 8))
    with pytest.raises(ValueError, match="layouts: expected"):
        image_grid(PatchLayout((4, 4)), torch.ones(1, 4), (8, 8))


def test_real_tokens_from_mask_end_or_nothing():
    ids = torch.tensor([[5, 6, 9, 1, 9], [5, 9, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    arguments = (None, ids, mask)
    assert real_tokens(TextLayout(mask_argument=2), ids, arguments).tolist() == mask.bool().tolist()
    by_end = real_tokens(TextLayout(end_token_id=9), ids, arguments)
    assert by_end.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert real_tokens(TextLayout(mask_argument=2, end_token_id=9), ids, (None, ids)).equal(by_end)
    assert real_tokens(TextLayout(mask_argument=2, end_token_id=9), ids, (None, ids, "no tensor")).equal(by_end)
    assert real_tokens(TextLayout(), ids, arguments) is None
    assert real_tokens(TextLayout(end_token_id=7), ids, arguments).all()


def test_real_elements_follow_the_tokens():
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 0, 0]])
    layout, arguments = TextLayout(mask_argument=2), (None, ids, mask)
    real = real_elements(layout, torch.zeros(2, 3, 4), 1, arguments)
    assert real.shape == (2, 3, 1) and real.squeeze(-1).equal(mask.bool())
    assert real_elements(layout, torch.zeros(2, 4), 1, arguments) is None
    assert real_elements(layout, torch.zeros(2, 5, 4), 1, arguments) is None
    assert real_elements(PatchLayout((1, 1)), torch.zeros(2, 3, 4), 1, arguments) is None
    assert real_elements(None, torch.zeros(2, 3, 4), 1, arguments) is None


def test_tokens_get_their_channels_sum_and_padding_nothing():
    elements = torch.arange(12.0).view(2, 3, 2)
    ids = torch.zeros(2, 3, dtype=torch.long)
    real = torch.tensor([[True, True, True], [True, False, False]])[..., None]
    assert to_tokens(elements, real, ids).tolist() == [[1, 5, 9], [13, 0, 0]]
    assert to_tokens(elements, None, ids).tolist() == [[1, 5, 9], [13, 17, 21]]
    with pytest.raises(ValueError, match="layouts: expected a hidden state with 4 tokens"):
        to_tokens(elements, None, torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="layouts: expected a hidden state with 3 tokens"):
        to_tokens(torch.zeros(2, 3), None, ids)


def test_the_highest_id_ends_a_caption_of_the_first_vocabulary():
    ids = torch.tensor([[5, 9, 3, 1], [5, 2, 9, 9], [9, 1, 1, 1]])
    real = real_tokens(TextLayout(ends_at_highest=True), ids, (None, ids))
    assert real.tolist() == [[True, True, False, False], [True, True, True, False], [True, False, False, False]]
    mask = torch.tensor([[1, 1, 1, 0]]).expand(3, 4)
    assert torch.equal(real_tokens(TextLayout(0, ends_at_highest=True), ids, (mask,)), mask.bool())


def test_a_legacy_configuration_says_so():
    layouts = clip_case(end=2).forward.layouts
    assert layouts[1] == TextLayout(mask_argument=2, end_token_id=None, ends_at_highest=True)
