"""The views: the score is the model's own, what passes is what the layer holds, and the model stays as it was."""

from __future__ import annotations

import threading

import pytest
import torch
import zoo
from captum.attr import LayerActivation, LayerGradCam
from families import Case, Family, captions, clip_case, family_named
from tiny_pairs import close
from torch import Tensor, nn

from captum_m2ib import DualEncoder, PatchLayout, TextLayout
from captum_m2ib.composition import EmbeddingForward, GridForward, TokenGradCam
from captum_m2ib.engine.layers import find_hidden, get_at

NAMES = """
    clip clip_wide clip_bf16 conv_maps in_place torch_encoder model_output keywords_only siglip siglip2_naflex groupvit
    xclip clap registers_roberta swin_bert
"""
ENCODERS = [family_named(name) for name in NAMES.split()]


@pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.name)
def test_embeddings_in_place_of_ids(kind: Family):
    case = kind.build()
    forward = EmbeddingForward(case.forward)
    inputs, additional = forward.embedded(case.inputs, case.additional)
    assert torch.equal(inputs[0], case.inputs[0]) and torch.equal(additional[0], case.inputs[1])
    embeddings = inputs[1].requires_grad_()
    score = forward(inputs[0], embeddings, *additional)
    close(score.detach(), case.forward(*case.inputs, *case.additional).detach(), atol=1e-6)
    (gradient,) = torch.autograd.grad(score.sum(), embeddings)
    assert gradient.shape == embeddings.shape and bool(gradient.isfinite().all())
    assert bool((gradient.flatten(1).abs().sum(1) > 0).all())
    other = forward(inputs[0], embeddings.detach().flip(1), *additional)
    assert not torch.allclose(other, score.detach(), atol=1e-4)


@pytest.mark.parametrize("modality", [0, 1])
@pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.name)
def test_the_grid_changes_no_score(kind: Family, modality: int):
    case = kind.build()
    layer = case.forward.embeddings_of(1) if modality else case.layers[0][0]
    view = GridForward(case.forward, layer)
    expected = case.forward(*case.inputs, *case.additional).detach()
    close(view(*case.inputs, *case.additional).detach(), expected, atol=1e-6)
    maps = LayerActivation(view, view.grid).attribute(case.inputs, case.additional)
    assert maps.ndim >= 3 and len(maps) == len(expected)


def test_sequences_before_pairs_are_refused():
    case = family_named("sequence_first").build()
    view = GridForward(case.forward, case.layers[0][0])
    with pytest.raises(ValueError, match="layouts: expected"):
        view(*case.inputs, *case.additional)


def hidden_of(case: Case, layer: nn.Module) -> Tensor:
    found: list[Tensor] = []
    handle = layer.register_forward_hook(lambda m, a, output: found.append(get_at(output, find_hidden(output))))
    case.forward(*case.inputs, *case.additional)
    handle.remove()
    return found[0].detach()


@pytest.mark.parametrize("name", ["clip", "clip_wide"])
def test_a_pictures_grid_is_its_patches_behind_the_prefix(name: str):
    case = family_named(name).build()
    layer = case.roots[0].vision_model.encoder.layers[1]
    view = GridForward(case.forward, layer)
    maps = LayerActivation(view, view.grid).attribute(case.inputs, case.additional)
    rows, columns = (side // 8 for side in case.inputs[0].shape[-2:])
    expected = hidden_of(case, layer)[:, 1:].transpose(1, 2).reshape(3, 32, rows, columns)
    close(maps, expected, atol=0)


def test_a_feature_map_is_its_own_grid():
    case = family_named("conv_maps").build()
    layer = case.layers[0][0]
    view = GridForward(case.forward, layer)
    close(LayerActivation(view, view.grid).attribute(case.inputs, case.additional), hidden_of(case, layer), atol=0)


def test_a_captions_grid_is_its_tokens_and_zero_at_padding():
    case = clip_case()
    layer = case.roots[0].text_model.encoder.layers[1]
    view = GridForward(case.forward, layer)
    maps = LayerActivation(view, view.grid).attribute(case.inputs, case.additional)
    expected = hidden_of(case, layer).transpose(1, 2) * case.additional[0][:, None]
    close(maps, expected, atol=0)
    assert float(expected[1, :, -1].abs().max()) == 0


def test_a_chosen_call_of_a_shared_tower():
    case = family_named("shared_tower").build()
    tower, layout = case.roots[0], PatchLayout((8, 8), prefix=1)
    with pytest.raises(RuntimeError, match="called it 2 times"):
        GridForward(case.forward, tower.embed, layout)(*case.inputs)
    for call in (0, 1):
        view = GridForward(case.forward, (tower.embed, call), layout, modality=call)
        maps = LayerActivation(view, view.grid).attribute(case.inputs)
        close(maps.flatten(2).transpose(1, 2), tower.embed(case.inputs[call])[:, 1:].detach(), atol=0)


def reference_cam(hidden: Tensor, gradient: Tensor, real: Tensor | None = None) -> Tensor:
    """Grad-CAM over tokens, (N, tokens, channels), written out."""
    keep = torch.ones(hidden.shape[:2]).to(hidden) if real is None else real.to(hidden)
    weights = (gradient * keep[..., None]).mean(1, keepdim=True)
    return (weights * hidden).sum(-1) * keep


def test_token_grad_cam_is_grad_cam(setup):
    model = setup.encoder.model
    layers = (model.vision_model.encoder.layers[1], model.text_model.encoder.layers[1])
    found: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda m, a, output: found.append(output)) for layer in layers]
    score = setup.encoder(*setup.inputs, *setup.additional)
    for handle in handles:
        handle.remove()
    image, text = torch.autograd.grad(score.sum(), found)
    maps = TokenGradCam(setup.encoder, layers[0]).attribute(setup.inputs, additional_forward_args=setup.additional)
    close(maps, reference_cam(found[0][:, 1:], image[:, 1:]).view(3, 1, 4, 4), atol=1e-12)
    words = TokenGradCam(setup.encoder, layers[1]).attribute(setup.inputs, additional_forward_args=setup.additional)
    close(words, reference_cam(found[1], text, setup.mask).view(3, 1, 6), atol=1e-12)
    assert (words != 0).squeeze(1).tolist() == setup.mask.bool().tolist()


def test_captums_own_grad_cam_takes_channels_for_space(setup):
    layer = setup.encoder.model.vision_model.encoder.layers[1]
    maps = LayerGradCam(setup.encoder, layer).attribute(setup.inputs, additional_forward_args=setup.additional)
    assert maps.shape == (3, 1, 32)


def test_a_frozen_model_and_the_options_of_captum():
    case = clip_case()
    for parameter in case.roots[0].parameters():
        parameter.requires_grad_(False)
    cam = TokenGradCam(case.forward, "vision_model.encoder.layers.1")
    maps = cam.attribute(case.inputs, additional_forward_args=case.additional, relu_attributions=True)
    assert maps.shape == (3, 1, 4, 4) and bool((maps >= 0).all() and (maps > 0).any())


def snapshot(model: nn.Module) -> list[object]:
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), m.training, "forward" in vars(m)) for m in model.modules()
    ]
    return [hooks, [(p.requires_grad, p.grad) for p in model.parameters()], nn.Module.__call__]


class Broken(Exception):
    pass


def test_the_model_is_left_as_found():
    case = clip_case()
    model = case.roots[0]
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    forward = EmbeddingForward(case.forward)
    inputs, additional = forward.embedded(case.inputs, case.additional)
    forward(*inputs, *additional)
    TokenGradCam(case.forward, "vision_model.encoder.layers.1").attribute(
        case.inputs, additional_forward_args=case.additional
    )
    assert snapshot(model) == before

    def fail(*arguments: Tensor) -> Tensor:
        case.forward(*arguments)
        raise Broken

    broken = EmbeddingForward(fail, model.text_model.embeddings)
    with pytest.raises(Broken):
        broken(*inputs, *additional)
    assert snapshot(model) == before


def test_no_gradient_is_kept_where_none_is_wanted():
    case = clip_case()
    forward = EmbeddingForward(case.forward)
    inputs, additional = forward.embedded(case.inputs, case.additional)
    assert not inputs[1].requires_grad
    with torch.no_grad():
        assert not forward(inputs[0], inputs[1].clone().requires_grad_(), *additional).requires_grad
    with torch.inference_mode():
        expected = case.forward(*case.inputs, *case.additional)
        assert torch.equal(forward(*inputs, *additional), expected)
        view = GridForward(case.forward, "vision_model.encoder.layers.1")
        assert torch.equal(view(*case.inputs, *case.additional), expected)


def test_other_threads_see_the_model_as_it_is():
    case = clip_case()
    expected = case.forward(*case.inputs, *case.additional).detach()
    seen: list[Tensor] = []

    def score(*arguments: Tensor) -> Tensor:
        def elsewhere() -> None:
            with torch.no_grad():
                seen.append(case.forward(*case.inputs, *case.additional))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return case.forward(*arguments)

    forward = EmbeddingForward(score, case.roots[0].text_model.embeddings)
    inputs, additional = forward.embedded(case.inputs, case.additional)
    changed = forward(inputs[0], inputs[1] * 0, *additional)
    assert len(seen) == 2 and all(torch.equal(found, expected) for found in seen)
    assert not torch.allclose(changed, expected, atol=1e-3)


def test_text_first():
    case = clip_case()

    def score(ids: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
        return case.forward(pixels, ids, mask)

    forward = EmbeddingForward(score, case.roots[0].text_model.embeddings, modality=0)
    inputs, additional = forward.embedded(case.inputs[::-1], case.additional)
    assert inputs[0].shape == (3, 6, 32) and torch.equal(additional[0], case.inputs[1])
    assert torch.equal(forward(*inputs, *additional), case.forward(*case.inputs, *case.additional))


def test_layouts_for_the_arguments_with_embeddings():
    case = clip_case()
    image, text = EmbeddingForward(case.forward).layouts
    assert image == case.forward.layouts[0] and isinstance(text, TextLayout) and text.mask_argument == 3


def test_bad_arguments():
    case = clip_case()
    encoder, model = case.forward, case.roots[0]
    pixels, ids = case.inputs
    forward = EmbeddingForward(encoder)
    embeddings = forward.embed(pixels, ids, *case.additional)
    calls = [
        ((pixels, embeddings), "arguments: expected 2 inputs with floating-point embeddings at position 1"),
        ((pixels, ids, ids), "arguments: expected 2 inputs"),
        ((pixels, embeddings, embeddings), "arguments: expected 2 inputs"),
        ((pixels, embeddings[:, :4], ids), r"arguments: expected embeddings of shape \(3, 6, 32\).*\(3, 4, 32\)"),
    ]
    for arguments, message in calls:
        with pytest.raises(ValueError, match=message):
            forward(*arguments)
    with pytest.raises(ValueError, match="modality: expected the index of one of the 2 inputs, got 2"):
        EmbeddingForward(encoder, modality=2)
    with pytest.raises(ValueError, match="embedding: found no layer of function that embeds tokens"):
        EmbeddingForward(lambda *arguments: arguments[0])
    with pytest.raises(TypeError, match="forward_func: expected a model or a callable, got int"):
        EmbeddingForward(3, model.text_model.embeddings)
    with pytest.raises(ValueError, match="layout: expected the layout of the layer's tower, got None"):
        GridForward(lambda *arguments: arguments[0], model.vision_model)
    with pytest.raises(RuntimeError, match=r"never called it; choose a module that forward_func runs"):
        GridForward(encoder, nn.Identity(), encoder.layouts[0], 0)(*case.inputs, *case.additional)
    with pytest.raises(ValueError, match="layers: no layer named 'nothing'"):
        GridForward(encoder, "nothing")
    assert isinstance(encoder, DualEncoder)


def test_tokens_of_a_network_that_reads_both_inputs_are_told_apart():
    encoder = zoo.encoder_of(zoo.model_named("colpali"))
    ids, mask = captions()
    arguments = zoo.arguments_of(zoo.model_named("colpali"), encoder, ids, mask)
    forward = EmbeddingForward(encoder)
    inputs, additional = forward.embedded(arguments[:2], arguments[2:])
    with torch.no_grad():
        torch.testing.assert_close(forward(*inputs, *additional), encoder(*arguments))
