"""Pairs with an argument in common: what is the same for them runs once, and maps are the same."""

from __future__ import annotations

import pytest
import torch
from families import family_named
from torch import Tensor, nn

from captum_m2ib import MultiModalInfoBottleneck
from captum_m2ib.benchmark.meters import count_flops
from captum_m2ib.engine.merging import Merged

PAIRS = 3
SETTINGS = {"n_steps": 1, "n_samples": 2}


def with_common(argument: int, name: str = "clip"):
    """A case whose pairs have one of the inputs in common."""
    case = family_named(name).build().double()
    inputs, additional = list(case.inputs), case.additional
    inputs[argument] = inputs[argument][:1].expand_as(inputs[argument]).contiguous()
    if argument == 1 and additional:
        additional = (additional[0][:1].expand_as(additional[0]).contiguous(), *additional[1:])
    return case.with_inputs(tuple(inputs), additional)


def measured(case, module: nn.Module) -> tuple[list[Tensor], dict[bool, int], int]:
    """Maps and checks, the rows of a module with a graph and without, and the operations."""
    rows = {True: 0, False: 0}

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows[torch.is_grad_enabled() and args[0].requires_grad] += len(args[0])

    made: list[Tensor] = []

    def run() -> None:
        method = MultiModalInfoBottleneck(case.forward, [None, case.layers[1][0]], case.layouts)
        maps, record = method.attribute_with_record(
            case.inputs, additional_forward_args=case.additional, check=True, **SETTINGS
        )
        for one in record.modalities:
            made.extend([one.bits, one.score_range, one.check.top, one.check.random])
        made.extend(maps)

    with module.register_forward_pre_hook(count):
        flops = count_flops(run)
    return made, rows, flops


@pytest.mark.parametrize("name", ["clip", "closure"])
def test_a_common_picture_runs_once_where_gates_do_not_differ(name: str, monkeypatch: pytest.MonkeyPatch):
    case = with_common(0, name)
    block = case.roots[0].vision_model.encoder.layers[1] if name == "clip" else case.roots[0].blocks[1]
    found, rows, flops = measured(case, block)
    monkeypatch.setattr(Merged, "of", lambda *_: None)
    expected, plain_rows, plain_flops = measured(case, block)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
    # Six draws of the range and six random orders, of three pairs, on one of them.
    assert plain_rows[False] - rows[False] >= 12 * (PAIRS - 1)
    assert rows[True] == plain_rows[True]
    assert flops < 0.9 * plain_flops


def test_pairs_with_nothing_in_common_are_not_compared():
    case = family_named("clip").build()
    assert Merged.of((*case.inputs, *case.additional), PAIRS) is not None  # two of the masks are the same
    assert Merged.of(case.inputs, PAIRS) is None
    assert Merged.of((torch.ones(1, 3),), 1) is None


class Counting(nn.Module):
    """A tower that must see as many rows as there are pictures."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 4), nn.Linear(4, 4)
        self.rows = 0

    def forward(self, pixels: Tensor) -> Tensor:
        if len(pixels) != self.rows:
            raise ValueError(f"{len(pixels)} rows, not {self.rows}")
        return self.second(self.first(pixels.flatten(1)).tanh())


def test_a_tower_that_needs_all_rows_gets_them():
    tower = Counting().eval().double()

    def score(pixels: Tensor, other: Tensor) -> Tensor:
        tower.rows = len(pixels)
        return (tower(pixels) * other).sum(1)

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 2, 2, generator=generator).double().expand(3, -1, -1, -1)
    others = torch.randn(3, 4, generator=generator).double()
    method = MultiModalInfoBottleneck(score, [None, None], statistics=["pair", None])
    whole = method.attribute((pixels, others), n_steps=2, smoothing=0.0)
    for pair in range(3):
        alone = method.attribute((pixels[:1], others[pair : pair + 1]), n_steps=2, smoothing=0.0)
        for one, other in zip(whole, alone, strict=True):
            torch.testing.assert_close(one[pair : pair + 1], other, rtol=1e-8, atol=1e-12)
