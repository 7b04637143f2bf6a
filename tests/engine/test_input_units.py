"""Bits are moved from hidden-state units to input units, never made or lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_m2ib.engine.layouts import PackedLayout, PatchLayout, TextLayout
from captum_m2ib.engine.real_units import real_elements, real_tokens
from captum_m2ib.engine.units import packed_grid, to_input, to_units

sizes = st.integers(1, 5)


def picture(*size: int, pairs: int = 1, channels: int = 3) -> torch.Tensor:
    return torch.zeros(pairs, channels, *size)


@settings(max_examples=100, deadline=None)
@given(
    rows=sizes,
    columns=sizes,
    patch=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    prefix=st.integers(0, 3),
    suffix=st.integers(0, 2),
    margin=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    channels=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_bits_are_conserved(rows, columns, patch, prefix, suffix, margin, channels, seed):
    height, width = (n * p + min(m, p - 1) for n, p, m in zip((rows, columns), patch, margin, strict=True))
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + rows * columns + suffix
    elements = torch.rand(2, tokens, 3, generator=generator, dtype=torch.float64)
    layout, inputs = PatchLayout(patch, prefix, suffix), picture(height, width, pairs=2, channels=channels)
    grid = to_units(layout, elements, inputs)
    assert grid.shape == (2, rows, columns)
    patches = elements[:, prefix : tokens - suffix]
    torch.testing.assert_close(grid.sum((1, 2)), patches.sum((1, 2)))
    pixels = to_input(layout, grid, inputs)
    assert pixels.shape == inputs.shape and pixels.is_contiguous() and bool((pixels >= 0).all())
    torch.testing.assert_close(pixels.sum((1, 2, 3)), grid.sum((1, 2)))
    torch.testing.assert_close(pixels, pixels[:, :1].expand_as(pixels))
    assert not pixels[:, :, rows * patch[0] :].any() and not pixels[:, :, :, columns * patch[1] :].any()


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 3), (1, 1), (1, 3)])
def test_one_patch_lights_its_own_place(row, column):
    grid = torch.zeros(1, 2, 4)
    grid[0, row, column] = 8.0
    pixels = to_input(PatchLayout((8, 6)), grid, picture(16, 24))[0].sum(0)
    place = divmod(int(pixels.argmax()), 24)
    assert (place[0] // 8, place[1] // 6) == (row, column)
    inside = pixels[row * 8 : row * 8 + 8, column * 6 : column * 6 + 6].sum()
    assert float(inside) > 0.5 * 8.0


def test_packed_patches_block_by_block_without_their_padding():
    # Two blocks of 2 x 2 on a grid of 2 rows and 4 columns, and two places of padding.
    layout = PackedLayout(shapes_argument=1, merge=2, drops_padding=True)
    inputs, shapes = torch.zeros(1, 10, 6), torch.tensor([[1, 2, 4]])
    real = real_tokens(layout, inputs, (inputs, shapes))
    assert real.tolist() == [[True] * 8 + [False] * 2]
    hidden = torch.arange(8.0).view(1, 8, 1).expand(1, 8, 3)
    units = to_units(layout, hidden, inputs)
    assert units.tolist() == [[0, 3, 6, 9, 12, 15, 18, 21, 0, 0]]
    assert packed_grid(layout, units, (inputs, shapes), 0).tolist() == [[0, 3, 12, 15], [6, 9, 18, 21]]
    assert float(to_input(layout, units, inputs).sum()) == float(hidden.sum())


def test_packed_patches():
    layout, inputs = PackedLayout(mask_argument=2, shapes_argument=3, prefix=1), torch.zeros(2, 5, 12)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    arguments = (inputs, None, mask, torch.tensor([[2, 2], [1, 2]]))
    elements = torch.rand(2, 6, 3)
    real = real_elements(layout, elements, 0, arguments)
    assert real[..., 0].tolist() == [[True, *row] for row in mask.bool().tolist()]
    units = to_units(layout, elements, inputs, real)
    torch.testing.assert_close(units, elements[:, 1:].sum(-1) * mask)
    spread = to_input(layout, units, inputs)
    torch.testing.assert_close(spread, (units / 12)[..., None].expand(2, 5, 12))
    with pytest.raises(ValueError, match="layouts: expected a hidden state with 5 tokens, one per packed patch"):
        to_units(layout, torch.rand(2, 9, 3), inputs)


def test_units_of_both_signs_keep_both_sums():
    grid = torch.tensor([[[3.0, -5.0], [0.0, 1.0]], [[-1.0, -2.0], [-3.0, 0.0]]])
    pixels = to_input(PatchLayout((4, 4)), grid, picture(8, 8, pairs=2)).sum(1)
    torch.testing.assert_close(pixels.sum((1, 2)), grid.sum((1, 2)))
    assert float(pixels[0, 1, 1]) > 0 > float(pixels[0, 1, 6]) and bool((pixels[1] <= 0).all())


def test_no_bits_stay_no_bits():
    assert not to_input(PatchLayout((4, 4)), torch.zeros(1, 2, 2), picture(8, 8)).any()


def test_tokens_get_their_channels_sum_and_padding_nothing():
    elements = torch.arange(12.0).view(2, 3, 2)
    ids = torch.zeros(2, 3, dtype=torch.long)
    real = torch.tensor([[True, True, True], [True, False, False]])[..., None]
    assert to_units(TextLayout(), elements, ids, real).tolist() == [[1, 5, 9], [13, 0, 0]]
    assert to_units(TextLayout(), elements, ids).tolist() == [[1, 5, 9], [13, 17, 21]]
    with pytest.raises(ValueError, match="layouts: expected a hidden state with 4 tokens"):
        to_units(TextLayout(), elements, torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="layouts: expected a hidden state with 3 tokens"):
        to_units(TextLayout(), torch.zeros(2, 3), ids)
