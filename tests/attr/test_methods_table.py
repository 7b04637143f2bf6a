"""The page's table of methods is what the registry says, and the registry what the methods do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods_table import MODELS, PAGE, answer, maps_of, page
from tiny_parts import LEGACY

from captum_m2ib.attr._attention import RecordAttention
from captum_m2ib.attr.registry import METHODS


def test_the_page_shows_the_registry():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/methods_table.py"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_needs_what_it_says(name: str, monkeypatch: pytest.MonkeyPatch):
    asked = set()

    def spied(real: Any, need: str) -> Any:
        def spy(*args: Any, **kwargs: Any) -> Any:
            asked.add(need)
            return real(*args, **kwargs)

        return spy

    monkeypatch.setattr(torch.autograd, "grad", spied(torch.autograd.grad, "gradients"))
    monkeypatch.setattr(torch.Tensor, "backward", spied(torch.Tensor.backward, "gradients"))
    monkeypatch.setattr(RecordAttention, "__post_init__", spied(RecordAttention.__post_init__, "attention"))
    maps_of(name, "late interaction" if METHODS[name].late_only else MODELS[0])
    assert asked == set(METHODS[name].needs)


@pytest.mark.parametrize("name", METHODS)
def test_maps_are_below_zero_where_the_registry_says(name: str):
    if LEGACY and name == "rise":
        pytest.skip("the random weights of this transformers give scores above zero alone")
    found = [maps for model in MODELS if not isinstance(maps := answer(name, model), str)]
    lowest = min(float(one.min()) for maps in found for one in maps)
    assert (lowest < 0) == METHODS[name].is_signed, lowest
