"""Contract 1: Captum's interface, and that Captum's own tools work on the methods."""

from __future__ import annotations

import inspect

import pytest
import torch
from captum.attr import NoiseTunnel
from captum.attr._utils.attribution import (
    Attribution,
    GradientAttribution,
    LayerAttribution,
    PerturbationAttribution,
)
from captum.metrics import infidelity, sensitivity_max
from families import Case, Family, family_named

import captum_m2ib.attr
from captum_m2ib import LayerMultiModalInfoBottleneck, MultiModalInfoBottleneck

METHODS = [MultiModalInfoBottleneck, LayerMultiModalInfoBottleneck]
FEW = {"n_steps": 2, "n_samples": 2}


def check(attributions: tuple, inputs: tuple) -> None:
    for attribution, given in zip(attributions, inputs, strict=True):
        assert attribution.shape == given.shape and attribution.is_floating_point()
        assert attribution.is_contiguous() and not attribution.requires_grad and attribution.grad_fn is None
        assert bool(attribution.isfinite().all()) and bool((attribution >= 0).all()) and float(attribution.sum()) > 0


def test_every_layer_choice_gives_attributions(case: Case):
    for choice in range(1, max(map(len, case.layers))):
        check(case.attribute(case.method(choice), n_steps=1), case.inputs)


def test_tuple_in_tuple_out_and_tensor_in_tensor_out(case: Case):
    first, *others = case.inputs
    attributions = case.attribute(**FEW)
    assert isinstance(attributions, tuple)
    check(attributions, case.inputs)
    if case.training:
        case.forward.eval()
    one = case.method().attribute(first, additional_forward_args=(*others, *case.additional), **FEW)
    assert isinstance(one, torch.Tensor)
    torch.testing.assert_close(one, attributions[0], rtol=1e-3, atol=1e-3 * float(one.max()))


def test_a_tuple_of_one_gives_a_tuple_of_one():
    case = family_named("clip").build()
    first, *others = case.inputs
    extra = (*others, *case.additional)
    (found,) = case.with_inputs((first,), extra).attribute(**FEW)
    assert torch.equal(found, case.method().attribute(first, additional_forward_args=extra, **FEW))


def test_callers_in_inference_mode(distinct: Family):
    case = distinct.build()
    expected = case.attribute(**FEW)
    with torch.inference_mode():
        made = tuple(tensor.clone() for tensor in case.inputs)
        extra = tuple(tensor.clone() for tensor in case.additional)
        found = case.with_inputs(made, extra).attribute(**FEW)
    check(found, case.inputs)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["clip", "closure"])
def test_callers_without_gradients(name: str, mode):
    case = family_named(name).build()
    expected = case.attribute(**FEW)
    with mode():
        found = case.attribute(**FEW)
    check(found, case.inputs)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("method", METHODS)
def test_signature_is_captums_first(method):
    names = list(inspect.signature(method.attribute).parameters)
    assert names[:4] == ["self", "inputs", "target", "additional_forward_args"]
    assert {"beta", "variance", "n_steps", "n_samples", "lr", "seed", "internal_batch_size"} <= set(names)
    assert {"attribute_to_layer_input", "show_progress"} <= set(names)
    assert callable(method.attribute.__wrapped__)
    assert method.attribute.__wrapped__ is not method.attribute


@pytest.mark.parametrize("name", captum_m2ib.attr.__all__)
def test_base_classes(name):
    method = getattr(captum_m2ib.attr, name)
    if not hasattr(method, "attribute"):
        return
    assert issubclass(method, Attribution)
    if name in ("MultiModalInfoBottleneck", "LayerMultiModalInfoBottleneck"):
        assert not issubclass(method, (GradientAttribution, PerturbationAttribution))
        assert issubclass(method, LayerAttribution) == name.startswith("Layer")


def test_what_captum_asks_of_a_method():
    case = family_named("closure").build()
    for method in (case.method(), case.layer_method()):
        assert method.forward_func is case.forward
        assert method.has_convergence_delta() is False and method.multiplies_by_inputs is False
        with pytest.raises(NotImplementedError, match=f"attribute_future.*{type(method).__name__}"):
            method.attribute_future()
    assert case.method().get_name() == "Multi Modal Info Bottleneck"
    assert case.layer_method().layer is case.layers[0][0]


COMPOSED = ["clip", "closure", "conv_maps", "shared_tower", "rotary"]


@pytest.mark.parametrize("name", COMPOSED)
def test_noise_tunnel(name: str):
    case = family_named(name).build()
    first, *others = case.inputs
    extra = (*others, *case.additional)
    method = case.method()
    tunnel = NoiseTunnel(method)
    expected = method.attribute(first, additional_forward_args=extra, **FEW)
    still = tunnel.attribute(
        first, nt_type="smoothgrad", nt_samples=2, stdevs=1e-9, additional_forward_args=extra, **FEW
    )
    assert still.shape == first.shape
    torch.testing.assert_close(still, expected, rtol=0, atol=2e-3 * float(expected.max()))
    noisy = tunnel.attribute(first, nt_samples=2, stdevs=0.5, additional_forward_args=extra, **FEW)
    assert not torch.allclose(noisy, expected, rtol=1e-2)


def test_noise_tunnel_on_a_layer():
    case = family_named("closure").build()
    first, *others = case.inputs
    layer = case.layer_method()
    bits = NoiseTunnel(layer).attribute(
        first, nt_samples=2, stdevs=0.1, additional_forward_args=(*others, *case.additional), **FEW
    )
    assert bits.shape == (3, 17, 16)


@pytest.mark.parametrize("name", COMPOSED)
def test_sensitivity_at_radius_zero_is_zero(name: str):
    case = family_named(name).build()
    first, *others = case.inputs
    sensitivity = sensitivity_max(
        case.method().attribute,
        first,
        perturb_radius=0.0,
        n_perturb_samples=1,
        additional_forward_args=(*others, *case.additional),
        **FEW,
    )
    assert sensitivity.tolist() == [0.0] * len(first)


@pytest.mark.parametrize("name", COMPOSED)
def test_infidelity(name: str):
    case = family_named(name).build()
    first, *others = case.inputs
    extra = (*others, *case.additional)
    attribution = case.method().attribute(first, additional_forward_args=extra, **FEW)

    def perturb(inputs):
        noise = 0.1 * torch.ones_like(inputs)
        return noise, inputs - noise

    value = infidelity(
        case.forward, perturb, first, attribution, additional_forward_args=extra, n_perturb_samples=2, normalize=True
    )
    assert value.shape == (len(first),) and bool(value.isfinite().all())


def test_target_selects_an_output_of_several():
    case = family_named("closure").build()
    expected = case.attribute()

    def several(*arguments):
        score = case.forward(*arguments)
        return torch.stack([score * 0.5 + 1, score], 1)

    method = MultiModalInfoBottleneck(several, [choices[0] for choices in case.layers], case.layouts)
    targets = [1, torch.tensor([1, 1, 1]), [1, 1, 1], torch.tensor(1), torch.tensor([1])]
    for target in targets:
        for found, same in zip(case.attribute(method, target=target), expected, strict=True):
            torch.testing.assert_close(found, same, rtol=0, atol=0)


def test_target_per_pair_selects_each_pairs_own():
    case = family_named("closure").build()

    def several(*arguments):
        score = case.forward(*arguments)
        return torch.stack([score, -score], 1)

    method = MultiModalInfoBottleneck(several, [choices[0] for choices in case.layers], case.layouts)
    mixed = case.attribute(method, target=torch.tensor([0, 1, 0]))
    for target, rows in ((0, [0, 2]), (1, [1])):
        same = case.attribute(method, target=target)
        for found, expected in zip(mixed, same, strict=True):
            torch.testing.assert_close(found[rows], expected[rows], rtol=0, atol=1e-3 * float(expected.max()))


def test_layer_attribution_has_the_layers_shape(case: Case):
    if case.training:
        case.forward.eval()
    for modality, choices in enumerate(case.layers):
        method = case.layer_method(modality)
        bits = method.attribute(case.inputs, additional_forward_args=case.additional, n_steps=1, n_samples=1)
        assert bits.is_contiguous() and bool((bits >= 0).all()) and not bits.requires_grad
        layer, call = choices[0] if isinstance(choices[0], tuple) else (choices[0], 0)
        if isinstance(layer, str):
            continue
        shapes = []
        handle = layer.register_forward_hook(lambda m, a, output, s=shapes: s.append(_shape(output)))
        case.forward(*case.inputs, *case.additional)
        handle.remove()
        assert bits.shape == shapes[call]


def _shape(output):
    from families import unpack

    return unpack(output).shape


def test_a_list_of_layers_gives_a_list():
    case = family_named("closure").build()
    layers = [choices[0] for choices in case.layers]
    extra = case.additional
    together = LayerMultiModalInfoBottleneck(case.forward, layers).attribute(
        case.inputs, additional_forward_args=extra, beta=(0.25, 0.5), **FEW
    )
    assert isinstance(together, list) and [b.shape for b in together] == [(3, 17, 16), (3, 6, 16)]
    alone = case.layer_method(0).attribute(case.inputs, additional_forward_args=extra, **FEW)
    torch.testing.assert_close(together[0], alone, rtol=0, atol=1e-3 * float(alone.max()))


def test_two_layers_of_one_tower():
    case = family_named("closure").build()
    image = case.roots[0]
    layers = [image.blocks[0], image.blocks[1]]
    bits = LayerMultiModalInfoBottleneck(case.forward, layers).attribute(
        case.inputs, additional_forward_args=case.additional, **FEW
    )
    first = LayerMultiModalInfoBottleneck(case.forward, layers[0]).attribute(
        case.inputs, additional_forward_args=case.additional, **FEW
    )
    torch.testing.assert_close(bits[0], first, rtol=0, atol=1e-3 * float(first.max()))
    assert bits[1].shape == first.shape


def test_layer_can_be_reassigned():
    case = family_named("closure").build()
    method = case.layer_method()
    method.layer = case.roots[1].embed
    bits = method.attribute.__wrapped__(
        method, case.inputs, target=None, additional_forward_args=case.additional, attribute_to_layer_input=False, **FEW
    )
    assert bits.shape == (3, 6, 16)


def test_a_family_is_named_once(family: Family):
    assert family_named(family.name) is family
