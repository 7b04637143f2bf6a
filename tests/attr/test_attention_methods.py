"""AttentionRelevance, GradECLIP and LeGrad against second implementations, and what they see of a model's attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attr_oracles import (
    clip_case,
    eager_copy,
    expected_maps,
    grad_eclip_oracle,
    legrad_oracle,
    relevance_oracle,
    score_of,
)
from families import Case, conv_case, family_named
from torch import Tensor, nn

from captum_m2ib import DualEncoder
from captum_m2ib.attr._attention import RecordAttention
from captum_m2ib.attr.attention_relevance import AttentionRelevance
from captum_m2ib.attr.grad_eclip import GradECLIP
from captum_m2ib.attr.le_grad import LeGrad
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layouts import TextLayout
from captum_m2ib.engine.units import to_input

METHODS = [AttentionRelevance, GradECLIP, LeGrad]


def blocks_of(case: Case, position: int) -> list[nn.Module]:
    model = case.roots[0]
    return [model.vision_model.encoder.layers[position], model.text_model.encoder.layers[position]]


def check(case: Case, method, expected: tuple) -> None:
    found = method.attribute(case.inputs, additional_forward_args=case.additional)
    for one, other in zip(found, expected_maps(case, expected), strict=True):
        assert float(other.abs().max()) > 0
        # transformers takes the softmax of eager attention in float32.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("first", [0, 2, 3])
def test_relevance_equals_the_rule_over_output_attentions(first: int, implementation: str):
    case = clip_case()
    case.roots[0].set_attn_implementation(implementation)
    layers = None if first == 3 else blocks_of(case, first)
    check(case, AttentionRelevance(case.forward, layers), relevance_oracle(case, first))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_grad_eclip_equals_the_formula_with_the_models_heads(implementation: str):
    case = clip_case()
    case.roots[0].set_attn_implementation(implementation)
    # The text tower has four blocks, fewer than the eight of the default.
    check(case, GradECLIP(case.forward), grad_eclip_oracle(case, (1, 4)))
    check(case, GradECLIP(case.forward, blocks_of(case, 1)), grad_eclip_oracle(case, (3, 3)))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_legrad_equals_the_formula_over_output_attentions(count: int):
    case = clip_case()
    layers = None if count == 2 else blocks_of(case, 4 - count)
    check(case, LeGrad(case.forward, layers), legrad_oracle(case, count))


def test_legrad_by_lists_of_blocks_for_any_callable():
    case = clip_case()
    expected = LeGrad(case.forward).attribute(case.inputs, additional_forward_args=case.additional)
    lists = [[*tower.encoder.layers[2:]] for tower in (case.roots[0].vision_model, case.roots[0].text_model)]
    for forward in (case.forward, lambda *given: case.forward(*given)):
        method = LeGrad(forward, lists, case.forward.layouts)
        for one, other in zip(
            method.attribute(case.inputs, additional_forward_args=case.additional), expected, strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="cannot tell which blocks follow"):
        LeGrad(lambda *given: case.forward(*given), blocks_of(case, 2), case.forward.layouts)


def recorded(case: Case) -> list:
    with borrowing(*case.roots), RecordAttention() as record:
        case.forward(*case.inputs, *case.additional)
    return record.seen


def test_recorded_weights_are_output_attentions():
    case = clip_case()
    _, both = score_of(eager_copy(case), case)
    expected = [*both[0].attentions, *both[1].attentions]
    for implementation in ("sdpa", "eager"):
        case.roots[0].set_attn_implementation(implementation)
        seen = recorded(case)
        assert len(seen) == len(expected) == 8
        for attention, weights in zip(seen, expected, strict=True):
            torch.testing.assert_close(attention.weights(3), weights.detach(), rtol=0, atol=1e-7)


ATTENDING = [
    "clip",
    "torch_encoder",
    "rotary",
    "siglip",
    "siglip2_naflex",
    "altclip",
    "blip_itc",
    "owlvit",
    "vit_bert",
    "aimv2",
    "open_clip_vit",
    "open_clip_coca",
    "open_clip_eva02",
    "open_clip_biomed",
]


@pytest.mark.parametrize("name", ATTENDING)
def test_weights_times_values_are_what_attention_returned(name: str):
    case = family_named(name).build().double()
    seen = recorded(case)
    assert len(seen) >= 4
    for attention in seen:
        # Attention without heads has none to split.
        if attention.query.shape[0] != 3 or attention.query.ndim != 4:
            weights, value, output = attention.weigh(), attention.value, attention.output
        else:
            weights, value, output = (
                attention.weights(3),
                attention.heads(attention.value, 3),
                attention.heads(attention.output, 3),
            )
        torch.testing.assert_close(weights @ value, output, rtol=0, atol=1e-9)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "torch_encoder", "siglip", "open_clip_vit", "open_clip_coca"])
def test_recording_changes_no_score(name: str):
    case = family_named(name).build().double()
    with torch.no_grad():
        expected = case.forward(*case.inputs, *case.additional)
        with RecordAttention():
            found = case.forward(*case.inputs, *case.additional)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding", "float", "bool", "per head", "both", "other widths"])
def test_torchs_attention_module_in_the_open(kind: str, batch_first: bool, need_weights: bool):
    torch.manual_seed(0)
    widths = {"kdim": 6, "vdim": 5} if kind == "other widths" else {}
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first, **widths).double().eval()
    nn.init.normal_(module.in_proj_bias)
    query = torch.randn(3, 4, 8).double()
    key, value = (torch.randn(3, 5, widths.get(name, 8)).double() for name in ("kdim", "vdim"))
    masks = {}
    if kind in ("padding", "both"):
        masks["key_padding_mask"] = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    if kind in ("float", "both"):
        masks["attn_mask"] = torch.randn(4, 5).double()
    if kind == "both":
        masks["key_padding_mask"] = torch.zeros(3, 5).double().masked_fill(masks["key_padding_mask"], -torch.inf)
    if kind == "bool":
        masks["attn_mask"] = torch.ones(4, 5).triu(2).bool()
    if kind == "per head":
        masks["attn_mask"] = torch.randn(6, 4, 5).double()
    tensors = (query, key, value) if batch_first else tuple(t.transpose(0, 1) for t in (query, key, value))
    expected, weights = module(*tensors, need_weights=True, average_attn_weights=False, **masks)
    with RecordAttention() as record:
        found, average = module(*tensors, need_weights=need_weights, **masks)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(record.seen[0].weights(3), weights.detach(), rtol=0, atol=1e-12)
    assert (average is None) == (not need_weights)
    if need_weights:
        torch.testing.assert_close(average, weights.mean(1), rtol=0, atol=1e-12)
    assert record.seen[0].projection[0] is module.out_proj.weight


def test_torchs_attention_module_with_learnt_keys_is_refused():
    module = nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True).eval()
    with RecordAttention(), pytest.raises(ValueError, match="bias_k"):
        module(*[torch.randn(2, 3, 8)] * 3)


@pytest.mark.parametrize("name", ["open_clip_vit", "open_clip_coca", "siglip", "blip_itc"])
@pytest.mark.parametrize("method", METHODS)
def test_other_libraries_and_poolings(method, name: str):
    case = family_named(name).build()
    maps = method(case.forward).attribute(case.inputs, additional_forward_args=case.additional or None)
    for found, given in zip(maps, case.inputs, strict=True):
        assert found.shape == given.shape and float(found.min()) >= 0 and float(found.sum()) > 0


def test_a_pooling_head_is_read_in_the_place_of_a_pooled_token():
    case = family_named("siglip").build().double()
    model = case.roots[0]
    head = model.vision_model.head
    kept = {}
    handle = head.attention.register_forward_pre_hook(
        lambda module, args, kwargs: kept.update(query=args[0], tokens=args[1]), with_kwargs=True
    )
    case.forward(*case.inputs, *case.additional)
    handle.remove()
    text = model.get_text_features(case.inputs[1], attention_mask=case.additional[0])
    text = getattr(text, "pooler_output", text).detach()
    tokens = kept["tokens"].detach()
    # The head by hand, so that its weights are a leaf of the graph.
    attention = head.attention
    query, key, value = (
        (part @ weight.T + bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for part, weight, bias in zip(
            (kept["query"].detach(), tokens, tokens),
            attention.in_proj_weight.chunk(3),
            attention.in_proj_bias.chunk(3),
            strict=True,
        )
    )
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).detach().requires_grad_()
    pooled = attention.out_proj((weights @ value).transpose(1, 2).flatten(2))
    pooled = (pooled + head.mlp(head.layernorm(pooled)))[:, 0]
    (gradient,) = torch.autograd.grad(torch.cosine_similarity(pooled, text).sum(), weights)
    wanted = (gradient * weights).detach().relu().mean(1)[:, 0]
    # Without the block before it, relevance is the head's alone.
    own = AttentionRelevance(case.forward, [head, model.text_model.encoder.layers[3]])
    gain = LeGrad(case.forward, [model.vision_model.encoder.layers[3], model.text_model.encoder.layers[3]])
    for method, expected in ((own, wanted), (gain, gradient.relu().mean(1)[:, 0])):
        found, _ = method.attribute(case.inputs, additional_forward_args=case.additional)
        units = to_input(case.forward.layouts[0], expected.unflatten(1, (4, 4)), case.inputs[0])
        torch.testing.assert_close(found, units, rtol=0, atol=1e-9 * float(units.max()))


@pytest.mark.parametrize("method", METHODS)
def test_a_convolutional_tower_is_refused(method):
    case = conv_case()
    image, text = case.roots
    layers = [image.body[0], text.blocks[-1]]
    layers = [[layer] for layer in layers] if method is LeGrad else layers
    with pytest.raises(ValueError, match=f"layers: {method.__name__} needs a transformer tower.*RISE"):
        method(case.forward, layers, case.layouts).attribute(case.inputs, additional_forward_args=case.additional)


@pytest.mark.parametrize("name", ["align", "convnext_bert", "clap", "xclip", "groupvit"])
@pytest.mark.parametrize("method", METHODS)
def test_towers_without_attention_between_all_tokens_are_refused(method, name: str):
    case = family_named(name).build()
    with pytest.raises(ValueError, match=r"layers: .*NarrowingInfoBottleneck"):
        method(case.forward).attribute(case.inputs, additional_forward_args=case.additional or None)


@pytest.mark.parametrize("method", [*METHODS])
def test_layers_are_asked_for_where_none_can_be_chosen(method):
    with pytest.raises(ValueError, match="layers: they can only be chosen for a DualEncoder"):
        method(lambda pixels, ids: pixels.sum((1, 2, 3)))


def test_raw_models_are_wrapped():
    case = clip_case()
    for method in METHODS:
        assert isinstance(method(case.roots[0]).forward_func, DualEncoder)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.ModuleList([nn.Linear(8, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(one(x) for one in self.project))


class OwnHeads(nn.Module):
    """Attention whose heads are modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out = nn.ModuleList([Head(), Head()]), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.cat([head(x) for head in self.heads], -1))


def test_grad_eclip_says_which_projection_it_looked_for():
    torch.manual_seed(0)
    model = nn.Sequential(OwnHeads(), nn.LayerNorm(8)).eval()
    embed = nn.Embedding(9, 8).eval()
    method = GradECLIP(lambda ids: model(embed(ids))[:, 0].tanh().sum(-1), [model[0]], [TextLayout()])
    with pytest.raises(ValueError, match=r"looked for a linear map of 4 channels \(1 heads side by side\).*found none"):
        method.attribute(torch.arange(8).view(2, 4))
