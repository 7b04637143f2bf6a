"""Finding a layer by name or module, and its hidden state in whatever it returns."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from captum_m2ib.engine.layers import (
    Layer,
    find_hidden,
    get_at,
    is_transparent,
    map_leaves,
    replace_at,
    resolve_layer,
    tensors_in,
)


@pytest.fixture
def root() -> nn.Module:
    return nn.ModuleDict({"tower": nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "head": nn.Linear(2, 2)})


def test_name_and_module_are_one_layer(root):
    by_name, by_module = resolve_layer("tower.0", root), resolve_layer(root["tower"][0], root)
    assert by_name == by_module == Layer(root["tower"][0], "tower.0", None)
    assert resolve_layer(("tower.0", 1), root) == by_name._replace(call=1)
    assert resolve_layer((root["head"], 0), root) == Layer(root["head"], "head", 0)


def test_a_module_needs_no_root(root):
    assert resolve_layer(root["head"], None) == Layer(root["head"], "Linear", None)
    assert resolve_layer(nn.Tanh(), root).name == "Tanh"


def test_a_layer_registered_twice_is_found_under_both_names(root):
    root["again"] = root["head"]
    assert resolve_layer("again", root).module is resolve_layer("head", root).module


def test_unknown_names_list_what_is_near(root):
    with pytest.raises(ValueError, match=r"layers: no layer named 'tower\.3'.*tower\.0"):
        resolve_layer("tower.3", root)
    with pytest.raises(ValueError, match=r"layers: no layer named 'xyz'.*it has: tower, head"):
        resolve_layer("xyz", root)
    with pytest.raises(ValueError, match="layers: no layer named ''"):
        resolve_layer("", root)


def test_errors_for_what_is_no_layer(root):
    with pytest.raises(ValueError, match="layers: cannot look up the name 'head' because forward_func is not a module"):
        resolve_layer("head", None)
    for wrong in (3, None, ["head"], ("head", "head"), ("head", 1.0)):
        with pytest.raises(TypeError, match="layers: expected a module, a dotted name"):
            resolve_layer(wrong, root)


@dataclasses.dataclass(frozen=True)
class Frozen:
    scores: Tensor
    hidden_states: Tensor


Named = collections.namedtuple("Named", ["hidden", "weights"])
HIDDEN, OTHER, FLAT = torch.zeros(2, 3, 4), torch.ones(2, 5, 4), torch.zeros(2, 4)

STRUCTURES = [
    (HIDDEN, ()),
    ((HIDDEN, OTHER), (0,)),
    ([None, HIDDEN], (1,)),
    ((FLAT, HIDDEN), (1,)),
    (((), {"hidden_states": HIDDEN, "attention_mask": FLAT}), (1, "hidden_states")),
    (((), {"mask": OTHER, "hidden_states": HIDDEN}), (1, "hidden_states")),
    (((HIDDEN,), {"hidden_states": OTHER}), (0, 0)),
    ({"pooler_output": FLAT, "last_hidden_state": HIDDEN}, ("last_hidden_state",)),
    ({"attentions": OTHER, "last_hidden_state": HIDDEN}, ("last_hidden_state",)),
    (BaseModelOutputWithPooling(last_hidden_state=HIDDEN, pooler_output=FLAT), ("last_hidden_state",)),
    (Named(HIDDEN, OTHER), (0,)),
    (Frozen(OTHER, HIDDEN), ("hidden_states",)),
    ((torch.zeros(2, 3, 4, dtype=torch.long), FLAT), (1,)),
    (FLAT, ()),
    (torch.zeros(2, 8, 3, 3), ()),
]


@pytest.mark.parametrize(("structure", "path"), STRUCTURES, ids=range(len(STRUCTURES)))
def test_hidden_state_is_found_and_replaced_with_everything_else_kept(structure, path):
    assert find_hidden(structure) == path
    value = torch.full((1,), 7.0)
    replaced = replace_at(structure, path, value)
    assert type(replaced) is type(structure) or path == ()
    assert get_at(replaced, path) is value
    kept = [t for t in tensors_in(structure) if t is not get_at(structure, path)]
    assert [id(t) for t in tensors_in(replaced) if t is not value] == [id(t) for t in kept]
    assert get_at(structure, path) is not value


def test_output_object_changes_by_key_and_by_attribute():
    output = BaseModelOutputWithPooling(last_hidden_state=HIDDEN, pooler_output=FLAT)
    replaced = replace_at(output, ("last_hidden_state",), OTHER)
    assert replaced.last_hidden_state is OTHER and replaced["last_hidden_state"] is OTHER and replaced[0] is OTHER
    assert output.last_hidden_state is HIDDEN


def test_nothing_to_find():
    for structure in (None, 3, "text", torch.tensor(1.0), torch.zeros(3), torch.zeros(2, 3, dtype=torch.long), ()):
        assert find_hidden(structure) is None


def test_map_leaves_keeps_the_form():
    structure = {"a": (HIDDEN, [FLAT, 3]), "b": None}
    doubled = map_leaves(structure, lambda t: t + 1)
    assert doubled["b"] is None and doubled["a"][1][1] == 3 and float(doubled["a"][1][0].sum()) == FLAT.numel()
    assert float(HIDDEN.sum()) == 0 and isinstance(doubled["a"], tuple) and isinstance(doubled["a"][1], list)
    output = BaseModelOutputWithPooling(last_hidden_state=HIDDEN, pooler_output=None)
    assert list(map_leaves(output, lambda t: t + 1).keys()) == ["last_hidden_state"]


def test_what_can_be_seen_through():
    for structure in (HIDDEN, (HIDDEN, None), {}, [], {"a": [1, "x", torch.float32]}, Frozen(FLAT, FLAT), HIDDEN.shape):
        assert is_transparent(structure)
    for structure in (object(), (HIDDEN, object()), {"cache": object()}, {HIDDEN}):
        assert not is_transparent(structure)
