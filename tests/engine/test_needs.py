"""Linear layers at the positions that the score reads: told from the operations, equal to running them everywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import tiny_clip
from tiny_parts import LEGACY
from torch import Tensor, nn

from captum_m2ib import MultiModalInfoBottleneck
from captum_m2ib.benchmark.meters import count_flops
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layers import input_layer
from captum_m2ib.engine.suffix import Suffix, Tap

WIDTH, POSITIONS = 8, 6


class Block(nn.Module):
    """One head of attention, then a layer for each position by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.query, self.key, self.value = nn.LayerNorm(WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        weights = (self.query(normed) @ self.key(normed).transpose(1, 2)).softmax(-1)
        hidden = hidden + weights @ self.value(normed)
        return hidden + self.narrow(F.gelu(self.wide(hidden)))


class Score(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.pool = Block(), pool

    def forward(self, hidden: Tensor) -> Tensor:
        return self.pool(self.block(hidden)).square().flatten(1).sum(1)


def last_changed_in_place(hidden: Tensor) -> Tensor:
    hidden.mul_(2)
    return hidden[:, 0]


def by_position(hidden: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden)), torch.full((len(hidden),), 2)]


POOLS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "first": (lambda hidden: hidden[:, 0], (0,)),
    "last": (lambda hidden: hidden[:, -1], (POSITIONS - 1,)),
    "two": (lambda hidden: hidden[:, 1] + hidden[:, 4], (1, 4)),
    "split": (lambda hidden: hidden.split([1, POSITIONS - 1], 1)[0][:, 0], (0,)),
    "heads": (lambda hidden: hidden.view(len(hidden), POSITIONS, 2, -1).transpose(1, 2)[:, :, 3], (3,)),
    "by an index": (by_position, (2,)),
    "norms of all": (lambda hidden: (hidden / hidden.norm(dim=-1, keepdim=True))[:, 0], ()),
    "mean": (lambda hidden: hidden.mean(1), ()),
    "maximum": (lambda hidden: hidden.amax(1), ()),
    "one chosen by its values": (
        lambda hidden: hidden.gather(1, hidden.sum(2).argmax(1)[:, None, None].expand(-1, 1, WIDTH)),
        (),
    ),
    "in place": (last_changed_in_place, ()),
    "a number": (lambda hidden: hidden[:, 0] * float(hidden[:, 1:].detach().mean()), ()),
}
LAYERS = {"query", "wide", "narrow"}


def recorded(model: nn.Module, pairs: int = 2) -> Suffix:
    hidden = torch.randn(pairs, POSITIONS, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    return Suffix(lambda given: model(*given), (hidden,), pairs, [Tap(input_layer(0))], for_score=True)


def needed(suffix: Suffix, model: nn.Module) -> dict[str, tuple[int, ...]]:
    names = {module: name.split(".")[-1] for name, module in model.named_modules()}
    calls = suffix._recording.calls
    return {names[call.module]: call.needed.positions for call in calls if call.needed is not None}


@pytest.mark.parametrize("name", [name for name in POOLS if name != "a number"])
def test_reruns_and_gradients_are_those_of_all_positions(name: str):
    pool, positions = POOLS[name]
    model = Score(pool).double().eval()
    with borrowing(model):
        suffix = recorded(model)
        values = suffix.hidden[0].repeat_interleave(3, 0) + torch.randn(6, POSITIONS, WIDTH).double()
        values.requires_grad_()
        score = suffix.run({0: values}, 3)
        found = torch.autograd.grad(score.sum(), values)[0]
        narrow = needed(suffix, model)
        assert suffix._reuse.is_narrowing == bool(narrow)
    plain = model(values)
    torch.testing.assert_close(score, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, torch.autograd.grad(plain.sum(), values)[0], rtol=0, atol=1e-12)
    assert narrow == (dict.fromkeys(LAYERS, positions) if positions else {})


def test_what_became_a_number_may_have_been_read_anywhere():
    model = Score(POOLS["a number"][0]).double().eval()
    with borrowing(model):
        assert needed(recorded(model), model) == {}


def test_a_layer_with_a_hook_or_of_another_class_runs_at_all_positions():
    class Scaled(nn.Linear):
        def forward(self, given: Tensor) -> Tensor:
            return super().forward(given) * given.shape[1]

    model = Score(POOLS["first"][0])
    model.block.wide = Scaled(WIDTH, 2 * WIDTH)
    model = model.double().eval()
    seen: list[torch.Size] = []
    model.block.narrow.register_forward_hook(lambda module, args, made: seen.append(made.shape))
    with borrowing(model):
        suffix = recorded(model)
        assert needed(suffix, model) == {"query": (0,)}
        suffix.run({0: suffix.hidden[0]}, 1)
    assert {shape[1] for shape in seen} == {POSITIONS}


@pytest.mark.parametrize("for_score", [False, True])
def test_a_rerun_that_is_looked_into_runs_at_all_positions(for_score: bool):
    model, seen = Score(POOLS["first"][0]).double().eval(), []

    def forward(given: tuple[Any, ...]) -> Tensor:
        made = model.block(given[0])
        seen.append(made.detach())
        return model.pool(made).square().sum(1)

    hidden = torch.randn(2, POSITIONS, WIDTH, dtype=torch.float64)
    with borrowing(model):
        suffix = Suffix(forward, (hidden,), 2, [Tap(input_layer(0))], for_score)
        seen.clear()
        suffix.run({0: hidden + 1}, 1)
    assert torch.allclose(seen[0], model.block(hidden + 1)) != for_score


def test_a_model_that_looks_at_positions_that_it_does_not_read_is_run_as_it_is():
    class Careful(Score):
        looked = 0

        def forward(self, hidden: Tensor) -> Tensor:
            made = self.block(hidden)
            if self.looked and torch.allclose(made[:, 1] - made[:, 2], hidden[:, 1] - hidden[:, 2]):
                raise RuntimeError("positions are all alike")
            return self.pool(made).square().flatten(1).sum(1)

    model = Careful(POOLS["first"][0]).double().eval()
    # The attention of positions that look alike is alike, and so is what is added to them.
    model.block.key.weight.data.zero_()
    with borrowing(model):
        suffix = recorded(model)
        assert needed(suffix, model)
        model.looked = 1
        values = suffix.hidden[0] + 1
        torch.testing.assert_close(suffix.run({0: values}, 1), model(values), rtol=0, atol=1e-12)
        assert not suffix._reuse.is_narrowing


@pytest.mark.skipif(LEGACY, reason="in CLIP of this transformers nothing is left out")
def test_maps_of_a_dual_encoder_are_the_same_for_fewer_operations(monkeypatch: pytest.MonkeyPatch):
    encoder = tiny_clip().double()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32, generator=generator).double()
    ids = torch.randint(3, 40, (2, 8), generator=generator)
    ids[:, -1] = 49
    method = MultiModalInfoBottleneck(encoder)
    found: list[Any] = []

    def run(**settings: Any) -> None:
        mask = (torch.ones_like(ids),)
        found.append(method.attribute((pixels, ids), additional_forward_args=mask, n_steps=2, **settings))

    # What smoothing among colours takes is the same either way, and much beside so small a model.
    plain = partial(run, smoothing_colour=None)
    run()
    few = count_flops(plain)
    monkeypatch.setattr("captum_m2ib.engine.needs.Trace.needed", lambda *_: {})
    run()
    many = count_flops(plain)
    for some, every in ((found[0], found[2]), (found[1], found[3])):
        for one, other in zip(some, every, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.max()))
    assert few < 0.9 * many
