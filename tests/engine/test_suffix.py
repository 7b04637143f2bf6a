"""A rerun equals a full forward pass in which the hidden state is replaced by a hook."""

from __future__ import annotations

from itertools import zip_longest

import pytest
import torch
from families import Case, Family, family_named, pack
from torch import Tensor, nn

from captum_m2ib.engine.batch_axis import BatchAxis
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layers import Layer, resolve_layer
from captum_m2ib.engine.suffix import Suffix, Tap


def layer_of(case: Case, choice) -> Layer:
    root = case.forward if isinstance(case.forward, nn.Module) else None
    try:
        return resolve_layer(choice, root)
    except ValueError:
        return resolve_layer(choice, case.roots[0])


def form_of(output) -> str:
    if isinstance(output, Tensor):
        return "tensor"
    if isinstance(output, tuple):
        return "tuple"
    return "output" if hasattr(output, "last_hidden_state") else "dict"


def hooked_score(case: Case, layer: Layer, value: Tensor, draws: int, at_input: bool = False) -> Tensor:
    """The whole model on every pair repeated, with the layer's hidden state replaced."""
    seen = 0

    def is_chosen() -> bool:
        nonlocal seen
        seen += 1
        return layer.call in (None, seen - 1)

    def replace_output(module, args, output):
        return pack(value.clone(), form_of(output)) if is_chosen() else None

    def replace_input(module, args, kwargs):
        if not is_chosen():
            return None
        if args:
            return (pack(value.clone(), form_of(args[0])), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": pack(value.clone(), form_of(kwargs["hidden_states"]))}

    if at_input:
        handle = layer.module.register_forward_pre_hook(replace_input, with_kwargs=True)
    else:
        handle = layer.module.register_forward_hook(replace_output)
    modes = [(module, module.training) for root in case.roots for module in root.modules()]
    for module, _ in modes:
        module.training = False
    try:
        repeated = [a.repeat_interleave(draws, 0) for a in (*case.inputs, *case.additional)]
        return case.forward(*repeated)
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode


def record(case: Case, taps: list[Tap]) -> Suffix:
    return Suffix(
        lambda arguments: case.forward(*arguments), (*case.inputs, *case.additional), len(case.inputs[0]), taps
    )


def changed(hidden: Tensor, draws: int) -> Tensor:
    """Another hidden state for each draw."""
    noise = torch.randn(len(hidden) * draws, *hidden.shape[1:], generator=torch.Generator().manual_seed(9))
    return hidden.repeat_interleave(draws, 0) + noise.to(hidden.dtype)


@pytest.mark.filterwarnings("ignore:forward_func. the model is in training mode")
def test_run_equals_a_full_pass_with_a_hook(family: Family):
    check_against_a_hook(family, family.build())


@pytest.mark.parametrize("name", ["clip", "conv_maps", "sequence_first", "shared_tower", "xclip", "swin_bert"])
def test_run_of_a_single_pair_equals_a_full_pass_with_a_hook(name: str):
    family = family_named(name)
    check_against_a_hook(family, family.build().select(slice(0, 1)))


def check_against_a_hook(family: Family, case: Case) -> None:
    half = "half" in family.features
    case = case if half else case.double()
    # AIMv2 normalises in float32 whatever its weights are.
    tolerance = 2e-2 if half else 1e-5 if family.name == "aimv2" else 1e-9
    blocks = [block for root in case.roots for block in getattr(root, "blocks", [])]
    for chosen in zip_longest(*case.layers):
        layers = [layer_of(case, choice) for choice in chosen if choice is not None]
        with borrowing(*case.roots):
            suffix = record(case, [Tap(layer) for layer in layers])
            for index, (layer, axis) in enumerate(zip(layers, suffix.axes, strict=True)):
                values = {draws: changed(suffix.hidden[index], draws) for draws in (4, 1)}
                expected = {n: hooked_score(case, layer, axis.merge(value), n) for n, value in values.items()}
                for draws in (4, 1, 4):
                    ran = suffix.run({index: values[draws].clone()}, draws)
                    torch.testing.assert_close(ran, expected[draws], rtol=0, atol=tolerance)
                if layer.module in blocks:
                    assert axis == BatchAxis(case.batch_dim)


BLOCK_INPUTS = [
    "clip",
    "conv_maps",
    "closure",
    "sequence_first",
    "tuple_output",
    "dict_output",
    "model_output",
    "keywords_only",
    "torch_encoder",
    "in_place",
    "rotary",
    "shared_tower",
]


@pytest.mark.parametrize("name", BLOCK_INPUTS)
def test_run_at_the_input_equals_a_full_pass_with_a_hook(name: str):
    case = family_named(name).build().double()
    for choices in case.layers:
        chosen = choices[0]
        if name in ("tuple_output", "dict_output", "model_output"):
            block = next(root for root in case.roots if chosen in root.modules()).blocks[1]
            chosen = block
        layer = layer_of(case, chosen)
        if name == "conv_maps" and layer.module is case.roots[0].stem:
            layer = Layer(case.roots[0].body, "body")
        with borrowing(*case.roots):
            suffix = record(case, [Tap(layer, at_input=True)])
            value = changed(suffix.hidden[0], 2)
            ran = suffix.run({0: value.clone()}, 2)
            expected = hooked_score(case, layer, suffix.axes[0].merge(value), 2, at_input=True)
        torch.testing.assert_close(ran, expected, rtol=0, atol=1e-9)


def test_untouched_value_gives_the_recorded_score(family: Family):
    case = family.build()
    layer = layer_of(case, case.layers[0][0])
    if case.training:
        case.forward.eval()
    with borrowing():
        suffix = record(case, [Tap(layer)])
        atol = 2e-2 if "half" in family.features else 1e-5
        again = suffix.run({0: suffix.hidden[0]}, 1)
    torch.testing.assert_close(again, suffix.score, rtol=0, atol=atol)
    with torch.no_grad():
        plain = case.forward(*case.inputs, *case.additional)
    torch.testing.assert_close(plain, suffix.score, rtol=0, atol=atol)
    assert suffix.hidden[0].shape[0] == len(case.inputs[0]) and not suffix.hidden[0].requires_grad


def run_case(model: nn.Module, tapped: nn.Module, inputs: Tensor | None = None, draws: int = 3) -> None:
    """Check a module that maps one batch to scores against the hook."""
    inputs = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)) if inputs is None else inputs
    case = Case(model, (inputs,), (), ([tapped],), [model])
    layer = Layer(tapped, "tapped")
    with borrowing(model):
        suffix = record(case, [Tap(layer)])
        for _ in range(2):
            value = changed(suffix.hidden[0], draws)
            ran = suffix.run({0: value.clone()}, draws)
            expected = hooked_score(case, layer, suffix.axes[0].merge(value), draws)
            torch.testing.assert_close(ran, expected, rtol=0, atol=1e-5)


class Parts(nn.Module):
    """A handful of layers for small models whose forward is given."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.table, self.norm, self.relu = nn.Embedding(8, 4), nn.LayerNorm(4), nn.ReLU(inplace=True)
        self.identity = nn.Identity()
        self.run = forward
        self.eval()

    def forward(self, x):
        return self.run(self, x).flatten(1).sum(1)


def test_index_of_a_maximum_is_not_stale():
    model = Parts(lambda m, x: m.second(h := m.first(x)) + m.third(m.table(h.argmax(-1))))
    run_case(model, model.first)


def test_index_next_to_a_constant_is_not_stale():
    class Select(nn.Module):
        def forward(self, index, table):
            return table[index]

    constant = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    model = Parts(lambda m, x: (h := m.first(x)) + m.select(h.argmax(-1), constant))
    model.select = Select().eval()
    run_case(model, model.first)


def test_detached_path_is_not_stale():
    model = Parts(lambda m, x: (h := m.first(x)) * m.norm(m.second(h.detach())))
    run_case(model, model.first)


def test_thresholded_path_is_not_stale():
    model = Parts(lambda m, x: (h := m.first(x)) + m.second((h > 0).float()))
    run_case(model, model.first)


def test_path_without_gradients_is_not_stale():
    def forward(m, x):
        h = m.first(x)
        with torch.no_grad():
            scale = m.third(m.second(h))
        return h * scale

    model = Parts(forward)
    run_case(model, model.first)


def test_module_in_place_on_the_tapped_output():
    model = Parts(lambda m, x: m.second(m.relu(m.first(x))))
    run_case(model, model.first)


def test_arithmetic_in_place_on_the_tapped_output():
    def forward(m, x):
        h = m.first(x)
        h += 1.0
        return m.second(h)

    model = Parts(forward)
    run_case(model, model.first)


def test_reused_module_that_works_in_place_on_its_input():
    def forward(m, x):
        h = m.first(x)
        m.relu(h)
        return m.third(m.second(m.norm(h)) + h)

    model = Parts(forward)
    run_case(model, model.second)


def test_in_place_on_reused_outputs():
    def forward(m, x):
        h = m.first(x)
        h.mul_(2.0)
        return m.third(m.second(m.norm(h)) + h)

    model = Parts(forward)
    run_case(model, model.second)


def test_module_that_returns_its_input():
    def forward(m, x):
        h = m.first(x)
        same = m.identity(h)
        same += 1
        return m.third(m.second(m.norm(x)) + h)

    model = Parts(forward)
    run_case(model, model.second)


def test_constant_module_output_is_not_taken_for_a_batch():
    class Constant(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.value = nn.Parameter(torch.zeros(shape))

        def forward(self):
            return self.value

    for shape, pairs in (((6, 4), 1), ((1, 6, 4), 1), ((1, 6, 4), 2), ((6, 4), 2)):
        model = Parts(lambda m, x: m.second(m.first(x) + m.constant()))
        model.constant = Constant(*shape).eval()
        run_case(model, model.first, torch.randn(pairs, 6, 4))


def test_parametrised_weight_of_zeros():
    model = Parts(lambda m, x: m.third(m.second(m.first(x)) + x))
    nn.init.zeros_(model.third.weight)
    torch.nn.utils.parametrize.register_parametrization(model.third, "weight", nn.Identity())
    model.eval()
    run_case(model, model.second, torch.randn(1, 5, 4))


def test_control_flow_that_changes_is_an_error():
    calls = []

    def forward(m, x):
        calls.append(None)
        h = m.second(m.first(x))
        return m.third(h) if len(calls) == 1 else m.norm(h)

    model = Parts(forward)
    case = Case(model, (torch.randn(2, 5, 4),), (), ([model.first],), [model])
    with borrowing(model):
        suffix = record(case, [Tap(Layer(model.first, "first"))])
        with pytest.raises(RuntimeError, match="forward_func: its module calls changed"):
            suffix.run({0: suffix.hidden[0]}, 1)


def test_prefix_and_other_tower_do_not_run_again():
    case = family_named("closure").build()
    layer = layer_of(case, case.layers[0][0])
    ran: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda module, *_: ran.append(module))
        for root in case.roots
        for module in root.modules()
    ]
    with borrowing():
        suffix = record(case, [Tap(layer)])
        # The first rerun is held against a pass of the whole model.
        suffix.run({0: suffix.hidden[0]}, 1)
        ran.clear()
        suffix.run({0: suffix.hidden[0]}, 1)
    for handle in handles:
        handle.remove()
    image, text = case.roots
    later = set(image.blocks[2].modules()) | {image, image.norm, image.head}
    assert set(ran) <= later and image.blocks[2].mlp[0] in ran
    assert not set(ran) & set(text.modules())


def test_memory_used_again_is_not_taken_for_what_it_held():
    ran: list[nn.Module] = []

    def forward(m, x):
        h = m.first(x)
        other = 0
        for _ in range(50):
            # Freed at once; a tensor made from numbers, which no operation gives birth to, may get its place.
            (h * 2).sum()
            other = other + m.norm(x * torch.tensor(0.5))
        return m.third(h + other)

    model = Parts(forward)
    case = Case(model, (torch.randn(2, 5, 4),), (), ([model.first],), [model])
    with borrowing(model):
        suffix = record(case, [Tap(Layer(model.first, "first"))])
        # The first rerun is held against a pass of the whole model.
        suffix.run({0: suffix.hidden[0]}, 1)
        model.norm.register_forward_hook(lambda module, *_: ran.append(module))
        suffix.run({0: suffix.hidden[0]}, 1)
    assert not ran


def test_gradient_reaches_the_value_and_no_parameter():
    case = family_named("closure").build()
    layer = layer_of(case, case.layers[0][0])
    with borrowing(*case.roots):
        suffix = record(case, [Tap(layer)])
        value = suffix.hidden[0].requires_grad_()
        suffix.run({0: value}, 1).sum().backward()
    assert value.grad.abs().sum() > 0
    assert all(parameter.grad is None for root in case.roots for parameter in root.parameters())


def test_two_taps_can_be_replaced_together_or_alone():
    case = family_named("closure").build().double()
    layers = [layer_of(case, choices[0]) for choices in case.layers]
    with borrowing(*case.roots):
        suffix = record(case, [Tap(layer) for layer in layers])
        values = {index: changed(suffix.hidden[index], 2) for index in range(2)}
        both = suffix.run(values, 2)
        alone = suffix.run({0: values[0]}, 2)
        expected_alone = hooked_score(case, layers[0], values[0], 2)
        handle = layers[1].module.register_forward_hook(lambda *_: values[1])
        expected_both = hooked_score(case, layers[0], values[0], 2)
        handle.remove()
    torch.testing.assert_close(alone, expected_alone)
    torch.testing.assert_close(both, expected_both)
    assert not torch.allclose(alone, both)
