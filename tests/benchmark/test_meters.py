"""Operations are counted as torch counts them, also where a gradient of the input is taken."""

from __future__ import annotations

import os

import pytest
import torch
from families import clip_case
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from captum_m2ib import MultiModalInfoBottleneck
from captum_m2ib.benchmark.meters import count_flops, in_new_process

INNER, OUTER = nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)
FORWARD = 2 * 5 * (8 * 16 + 16 * 4)


def test_those_of_the_arithmetic():
    assert count_flops(lambda: OUTER(INNER(torch.ones(5, 8)))) == FORWARD
    with torch.inference_mode():
        assert count_flops(lambda: OUTER(INNER(torch.ones(5, 8)))) == FORWARD
    assert count_flops(lambda: None) == 0


def test_gradient_of_an_input():
    inputs = torch.ones(5, 8, requires_grad=True)
    weights = (INNER.weight, OUTER.weight)
    for weight in weights:
        weight.requires_grad_(False)
    assert count_flops(lambda: torch.autograd.grad(OUTER(INNER(inputs)).sum(), inputs)) == 2 * FORWARD


def test_as_torch_counts():
    case = clip_case()
    method = MultiModalInfoBottleneck(case.forward)

    def run() -> None:
        case.attribute(method, n_steps=2, n_samples=2)

    with FlopCounterMode(display=False) as counter:
        run()
    assert count_flops(run) == counter.get_total_flops() > 0


def fail(message: str) -> None:
    raise LookupError(message)


def test_what_another_process_answers():
    assert in_new_process(max, 2, 3) == 3
    assert in_new_process(os.getpid) != os.getpid()
    with pytest.raises(LookupError, match="not there"):
        in_new_process(fail, "not there")
