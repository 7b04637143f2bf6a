"""Which tokens are real, by a mask, an end token or padding, and which elements hold them."""

from __future__ import annotations

import torch

from captum_m2ib.engine.layouts import PatchLayout, TextLayout
from captum_m2ib.engine.real_units import real_elements, real_tokens
from captum_m2ib.engine.units import to_units


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


def test_tokens_that_the_tower_adds_are_real_and_left_out():
    ids = torch.tensor([[5, 6, 0], [5, 0, 0]])
    layout = TextLayout(pad_token_id=0, suffix=1)
    elements = torch.rand(2, 4, 2)
    real = real_elements(layout, elements, 1, (None, ids))
    assert real[..., 0].tolist() == [[True, True, False, True], [True, False, False, True]]
    expected = elements[:, :3].sum(-1) * (ids != 0)
    torch.testing.assert_close(to_units(layout, elements, ids, real), expected)


def test_the_highest_id_ends_a_caption_of_the_first_vocabulary():
    ids = torch.tensor([[5, 9, 3, 1], [5, 2, 9, 9], [9, 1, 1, 1]])
    real = real_tokens(TextLayout(ends_at_highest=True), ids, (None, ids))
    assert real.tolist() == [[True, True, False, False], [True, True, True, False], [True, False, False, False]]
    mask = torch.tensor([[1, 1, 1, 0]]).expand(3, 4)
    assert torch.equal(real_tokens(TextLayout(0, ends_at_highest=True), ids, (mask,)), mask.bool())
