"""The passes of a descent in bfloat16, and all else in the model's own precision."""

from __future__ import annotations

import pytest
import torch
from families import family_named
from torch import Tensor


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


@pytest.mark.parametrize("settings", [{}, {"score_range": 1.0}], ids=["measured range", "given range"])
def test_steps_run_in_low_precision_and_nothing_else(settings: dict):
    case = family_named("clip").build()
    expected = case.attribute(n_steps=4, **settings)
    seen: set[tuple[bool, torch.dtype]] = set()
    block = case.roots[0].vision_model.encoder.layers[3].mlp.fc1
    hook = block.register_forward_hook(lambda _, args, output: seen.add((output.requires_grad, output.dtype)))
    found = case.attribute(n_steps=4, precision="bf16", **settings)
    hook.remove()
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert not torch.equal(one, other)
        assert correlation(one, other) > 0.99


def test_what_is_measured_keeps_the_models_own_precision():
    case = family_named("clip").build()
    given = {"additional_forward_args": case.additional, "n_steps": 1}
    records = [
        case.method().attribute_with_record(case.inputs, precision=precision, **given)[1].modalities
        for precision in (None, "bf16")
    ]
    for plain, low in zip(*records, strict=True):
        assert torch.equal(plain.score_range, low.score_range) and torch.equal(plain.score_before, low.score_before)
        assert low.score.dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp16", torch.bfloat16, 16])
def test_a_precision_that_is_none(precision):
    with pytest.raises(ValueError, match="precision: expected 'bf16' or None"):
        family_named("clip").build().attribute(precision=precision)
