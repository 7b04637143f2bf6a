"""Contract 3: any layer, at its output or its input, by module or by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import Case, family_named, image_tower, tiny_clip
from torch import nn

from captum_m2ib import DualEncoder, LayerMultiModalInfoBottleneck, MultiModalInfoBottleneck, PatchLayout

FEW = {"n_steps": 2, "n_samples": 2}
CLIP_LAYERS = [
    "vision_model.embeddings",
    "vision_model.encoder.layers.0",
    "vision_model.encoder.layers.1.mlp",
    "vision_model.encoder.layers.1.mlp.fc1",
    "vision_model.encoder.layers.2.layer_norm2",
    "vision_model.encoder.layers.2.self_attn",
    "vision_model.encoder.layers.2.self_attn.q_proj",
    "vision_model.pre_layrnorm",
    "text_model.embeddings.token_embedding",
    "text_model.encoder.layers.3",
    "text_model.final_layer_norm",
]


def bits(case: Case, layer, **options) -> torch.Tensor:
    method = LayerMultiModalInfoBottleneck(case.forward, layer)
    return method.attribute(case.inputs, additional_forward_args=case.additional, **{**FEW, **options})


@pytest.mark.parametrize("name", CLIP_LAYERS)
def test_name_and_module_give_the_same_bits(name: str):
    case = family_named("clip").build()
    by_name = bits(case, name)
    by_module = bits(case, case.roots[0].get_submodule(name))
    by_full_name = bits(case, f"model.{name}")
    torch.testing.assert_close(by_name, by_module, rtol=0, atol=0)
    torch.testing.assert_close(by_name, by_full_name, rtol=0, atol=0)
    assert by_name.shape[0] == 3 and float(by_name.sum()) > 0


@pytest.mark.parametrize("name", [name for name in CLIP_LAYERS if "embedding" not in name])
def test_a_layers_input_is_what_comes_before_it(name: str):
    case = family_named("clip").build()
    found = bits(case, name, attribute_to_layer_input=True)
    received = []
    handle = (
        case.roots[0]
        .get_submodule(name)
        .register_forward_pre_hook(
            lambda m, args, kwargs: received.append((*args, *kwargs.values())[0]), with_kwargs=True
        )
    )
    case.forward(*case.inputs, *case.additional)
    handle.remove()
    assert found.shape == received[0].shape and float(found.sum()) > 0


def test_input_of_a_block_is_the_output_of_the_one_before():
    for name in ("closure", "sequence_first", "tuple_output", "dict_output", "model_output", "keywords_only"):
        case = family_named(name).build()
        image = next(root for root in case.roots if hasattr(root, "blocks"))
        at_output = bits(case, image.blocks[0])
        at_input = bits(case, image.blocks[1], attribute_to_layer_input=True)
        torch.testing.assert_close(at_input, at_output, rtol=0, atol=1e-3 * float(at_output.max()))


def test_pixels_from_a_layers_input():
    case = family_named("clip").build()
    layers = [case.roots[0].vision_model.encoder.layers[1], case.roots[0].text_model.encoder.layers[1]]
    before = [case.roots[0].vision_model.encoder.layers[0], case.roots[0].text_model.encoder.layers[0]]
    at_input = case.attribute(MultiModalInfoBottleneck(case.forward, layers), attribute_to_layer_input=True)
    at_output = case.attribute(MultiModalInfoBottleneck(case.forward, before))
    for found, expected in zip(at_input, at_output, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.max()))


def test_raw_model_is_wrapped():
    case = family_named("clip").build()
    wrapped = MultiModalInfoBottleneck(case.roots[0], [choices[0] for choices in case.layers])
    assert isinstance(wrapped.forward_func, DualEncoder)
    for found, expected in zip(case.attribute(wrapped), case.attribute(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_single_layer_need_not_be_in_a_list():
    case = family_named("clip").build()
    pixels, ids = case.inputs
    for layer in ("vision_model.encoder.layers.1", case.layers[0][0], (case.layers[0][0], 0)):
        method = MultiModalInfoBottleneck(case.forward, layer)
        found = method.attribute(pixels, additional_forward_args=(ids, *case.additional), **FEW)
        assert found.shape == pixels.shape


def test_near_names_are_offered():
    case = family_named("clip").build()
    with pytest.raises(ValueError, match=r"layers: no layer named 'vision_model.encoder.layers.9'.*layers\.[0-3]"):
        MultiModalInfoBottleneck(case.forward, ["vision_model.encoder.layers.9", "text_model.embeddings"])
    with pytest.raises(ValueError, match="layers: no layer named"):
        bits(case, "text_modle.embeddings")


def test_a_name_without_a_module_is_an_error():
    case = family_named("closure").build()
    with pytest.raises(ValueError, match=r"layers: cannot look up the name 'blocks.0'"):
        MultiModalInfoBottleneck(case.forward, ["blocks.0"])


def test_a_layer_never_reached_is_an_error():
    case = family_named("clip").build()
    with pytest.raises(RuntimeError, match="layers: the forward pass never called layer 'Linear'"):
        bits(case, nn.Linear(2, 2).eval())
    case = family_named("closure").build()
    with pytest.raises(RuntimeError, match="layers: the forward pass never called layer 'Block'"):
        bits(case, image_tower().eval().blocks[0])


def test_a_layer_reached_twice_needs_a_chosen_call():
    case = family_named("shared_tower").build()
    block = case.roots[0].blocks[0]
    with pytest.raises(RuntimeError, match=r"layers: the forward pass called layer 'Block' 2 times; say which call"):
        bits(case, block)
    first, second = bits(case, (block, 0)), bits(case, (block, 1))
    assert not torch.allclose(first, second)
    swapped = case.with_inputs(case.inputs[::-1], ())
    torch.testing.assert_close(bits(swapped, (block, 1)), first, rtol=0, atol=1e-3 * float(first.max()))
    with pytest.raises(RuntimeError, match="layers: layer 'Block' was called 2 times, so it has no call 2"):
        bits(case, (block, 2))


def test_a_block_applied_again_and_again():
    torch.manual_seed(0)
    block, head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).eval(), nn.Linear(4, 4).eval()

    def score(tokens):
        for _ in range(3):
            tokens = tokens + block(tokens)
        return head(tokens).flatten(1).sum(1)

    tokens = torch.randn(2, 5, 4)
    found = [LayerMultiModalInfoBottleneck(score, (block, call)).attribute(tokens, **FEW) for call in range(3)]
    assert not torch.allclose(found[0], found[2])
    with pytest.raises(RuntimeError, match="3 times"):
        LayerMultiModalInfoBottleneck(score, block).attribute(tokens, **FEW)


def test_a_score_that_ignores_the_layer_is_an_error():
    block, head = nn.Linear(4, 4).eval(), nn.Linear(4, 1).eval()

    def aside(tokens):
        block(tokens)
        return head(tokens).flatten(1).sum(1)

    def cut(tokens):
        return head(block(tokens).detach()).flatten(1).sum(1)

    for score in (aside, cut):
        with pytest.raises(RuntimeError, match="layers: the score does not depend on layer"):
            LayerMultiModalInfoBottleneck(score, block).attribute(torch.randn(2, 3, 4), **FEW)


def test_a_layer_of_whole_numbers_is_an_error():
    table, identity = nn.Embedding(5, 4).eval(), nn.Identity().eval()

    def score(ids):
        return table(identity(ids)).flatten(1).sum(1)

    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"layers: the output of layer .* no floating-point tensor"):
        LayerMultiModalInfoBottleneck(score, identity).attribute(ids, **FEW)
    with pytest.raises(RuntimeError, match=r"layers: the input of layer .* no floating-point tensor"):
        LayerMultiModalInfoBottleneck(score, table).attribute(ids, attribute_to_layer_input=True, **FEW)


def test_a_layer_that_does_not_depend_on_the_pair_is_an_error():
    table = nn.Embedding(5, 4).eval()

    def score(tokens):
        return (tokens @ table(torch.arange(5)).T).flatten(1).sum(1)

    with pytest.raises(RuntimeError, match=r"layers: the hidden state at the output .* does not depend on the pair"):
        LayerMultiModalInfoBottleneck(score, table).attribute(torch.randn(2, 3, 4), **FEW)


def test_given_layout_overrides_the_derived_one():
    case = family_named("clip").build()
    layers = [choices[0] for choices in case.layers]
    method = MultiModalInfoBottleneck(case.forward, layers, [PatchLayout((8, 8), prefix=3), None])
    with pytest.raises(ValueError, match="layouts: expected 3 prefix tokens"):
        case.attribute(method)


def test_a_hidden_state_without_layout_keeps_its_shape_or_says_so():
    case = family_named("closure").build()
    method = MultiModalInfoBottleneck(case.forward, [choices[0] for choices in case.layers])
    with pytest.raises(ValueError, match="layouts: cannot tell how a hidden state"):
        case.attribute(method)
    block = nn.Linear(4, 4).eval()
    plain = MultiModalInfoBottleneck(lambda x: F.normalize(block(x), dim=-1).flatten(1).sum(1), [block])
    tokens = torch.randn(2, 3, 4)
    assert plain.attribute(tokens, **FEW).shape == tokens.shape


def test_published_and_recommended_layers():
    encoder = DualEncoder(tiny_clip())
    published = MultiModalInfoBottleneck.published(encoder)
    assert [layer.name for layer in published.layers] == [
        "vision_model.encoder.layers.2",
        "text_model.encoder.layers.2",
    ]
    assert published.priors == (None, None)
    recommended = MultiModalInfoBottleneck(encoder)
    assert [layer.name for layer in recommended.layers] == ["inputs[0]", "text_model.embeddings"]
    named = MultiModalInfoBottleneck(encoder, ["inputs[0]", "text_model.embeddings"])
    other = MultiModalInfoBottleneck(encoder, ["vision_model.encoder.layers.0", "text_model.embeddings"])
    assert [layer.argument for layer in named.layers] == [0, None]
    assert (named.priors[0], other.priors[0]) == ("pair", None)
    for words in (named.priors[1], other.priors[1]):
        assert torch.equal(words.mean, recommended.priors[1].mean) and torch.equal(words.std, recommended.priors[1].std)
    assert all(prior is not None for prior in recommended.priors)
    with pytest.raises(ValueError, match="layers: they can only be recommended for a DualEncoder"):
        MultiModalInfoBottleneck(lambda x: x)
    with pytest.raises(ValueError, match="forward_func: expected a DualEncoder"):
        MultiModalInfoBottleneck.published(lambda x: x)
