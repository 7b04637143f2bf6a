"""Dependence is followed through operations that carry no gradient, and through memory that is shared."""

from __future__ import annotations

import pytest
import torch

from captum_m2ib.engine.dependence import Dependence, storage_of


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + 1,
        lambda x: x[0],
        lambda x: x.detach().argmax(-1),
        lambda x: (x > 0).float(),
        lambda x: torch.zeros(2).add_(x[0]),
        lambda x: torch.stack([torch.zeros(2), x[0]]),
        lambda x: torch.ones(2, 2).split(1)[0].copy_(x[:1]),
    ],
)
def test_what_is_made_of_a_source_descends_from_it(operation):
    with Dependence() as dependence:
        source = torch.ones(2, 2)
        dependence.mark([source], frozenset([3]))
        assert dependence.of([operation(source)]) == {3}
        assert dependence.of([operation(torch.ones(2, 2))]) == set()


def test_operation_that_returns_nothing_marks_what_it_changed():
    with Dependence() as dependence:
        source, changed = torch.ones(2), [torch.zeros(2)]
        dependence.mark([source], frozenset([0]))
        torch._foreach_add_(changed, [source])
        assert dependence.of(changed) == {0}


def test_sources_add_up():
    with Dependence() as dependence:
        first, second = torch.ones(2), torch.ones(2)
        dependence.mark([first], frozenset([0]))
        dependence.mark([second], frozenset([1]))
        assert dependence.of([first * second]) == dependence.of([first, second]) == {0, 1}


def test_views_share_a_storage():
    tensor = torch.ones(2, 2)
    assert storage_of(tensor) == storage_of(tensor[1]) != storage_of(tensor.clone())


@pytest.mark.parametrize("change", [lambda x: x.add_(1), lambda x: torch._foreach_add_([x], 1), lambda x: x[0].zero_()])
def test_what_is_about_to_change_is_told_before_it_does(change):
    told = []

    def tell(tensors):
        told.extend((storage_of(tensor), tensor.clone()) for tensor in tensors)

    with Dependence(before_change=tell):
        tensor = torch.ones(2)
        tensor + 1
        assert not told
        change(tensor)
    assert told[0][0] == storage_of(tensor) and told[0][1].eq(1).all() and not tensor.eq(1).all()


def test_what_runs_while_it_rests_is_not_followed():
    with Dependence() as dependence:
        source = torch.ones(2)
        dependence.mark([source], frozenset([0]))
        with dependence.resting():
            aside = source + 1
        assert dependence.of([aside]) == set() and dependence.of([source + 1]) == {0}
    with dependence.resting():
        assert dependence.of([source + 1]) == set()
