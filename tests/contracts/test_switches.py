"""Switches of a model that change how it computes and not what: each is explained as without, and left as it was."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from functools import partial

import open_clip
import pytest
import torch
from tiny_parts import both
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_m2ib import (
    RISE,
    AttentionRelevance,
    DualEncoder,
    GradECLIP,
    LayerMultiModalInfoBottleneck,
    LeGrad,
    MultiModalInfoBottleneck,
    NarrowingInfoBottleneck,
    PairInteraction,
)

METHODS = {
    "default": MultiModalInfoBottleneck,
    "GradECLIP": GradECLIP,
    "AttentionRelevance": AttentionRelevance,
    "LeGrad": LeGrad,
    "NarrowingInfoBottleneck": NarrowingInfoBottleneck,
    "PairInteraction": PairInteraction,
    "RISE": RISE,
}
OPTIONS = {"RISE": {"n_masks": 8}, "default": {"n_steps": 2}}


def transformers_clip() -> nn.Module:
    torch.manual_seed(0)
    return prepared(both("CLIPModel")())


def openai_clip() -> nn.Module:
    vision = {"layers": 3, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 3}
    torch.manual_seed(0)
    return prepared(open_clip.model.CLIP(16, vision, text))


def prepared(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.double().eval()


def inputs() -> tuple[Tensor, Tensor]:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    return pixels, torch.tensor([[62, 5, 6, 7, 8, 9, 10, 63], [62, 15, 16, 17, 18, 19, 20, 63]])


@functools.cache
def maps_without(build: Callable[[], nn.Module], method: str) -> tuple[Tensor, ...]:
    """What all switches of a model are held against: every build has the same weights."""
    return maps_of(build(), method)


def maps_of(model: nn.Module, method: str) -> tuple[Tensor, ...]:
    found = METHODS[method](DualEncoder(model)).attribute(inputs(), **OPTIONS.get(method, {}))
    return found if isinstance(found, tuple) else (found,)


def checkpointed(model: nn.Module) -> nn.Module:
    """Every block checkpointed by its own forward, in both of torch's ways."""
    for index, block in enumerate(blocks_of(model)):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False) if index % 2 else reentrant(block)
    return model


def reentrant(block: nn.Module) -> Callable[..., Tensor]:
    plain = block.forward

    def forward(x: Tensor, *args, **kwargs) -> Tensor:
        return checkpoint(lambda hidden: plain(hidden, *args, **kwargs), x, use_reentrant=True)

    return forward


def blocks_of(model: nn.Module) -> list[nn.Module]:
    encoder = DualEncoder(model)
    return [block for index in (0, 1) for stage in encoder.stages(index) for block in stage]


def switched_checkpointing(model: nn.Module) -> nn.Module:
    model.set_grad_checkpointing(True)
    return model


def flex(model: nn.Module) -> nn.Module:
    model.set_attn_implementation("flex_attention")
    return model


def in_inference_mode(model: nn.Module) -> nn.Module:
    for name in ("encode_image", "encode_text"):
        setattr(model, name, types.MethodType(torch.inference_mode()(getattr(type(model), name)), model))
    return model


def offloaded(model: nn.Module) -> nn.Module:
    """Weights that each module loads when it is called and gives back afterwards, as accelerate's hooks do it."""
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            module._hf_hook = types.SimpleNamespace(execution_device=torch.device("cpu"))
            for name in own:
                set_parameter(module, name, own[name].to("meta"))
            module.forward = partial(loaded, module, module.forward, own)
    return model


def loaded(module: nn.Module, forward: Callable[..., Tensor], own: dict[str, Tensor], *args, **kwargs) -> Tensor:
    for name, value in own.items():
        set_parameter(module, name, value.detach())
    try:
        return forward(*args, **kwargs)
    finally:
        for name in own:
            set_parameter(module, name, own[name].to("meta"))


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    module._parameters[name] = nn.Parameter(value, requires_grad=False)


SWITCHES = [
    (transformers_clip, checkpointed),
    (transformers_clip, flex),
    (transformers_clip, offloaded),
    (openai_clip, checkpointed),
    (openai_clip, switched_checkpointing),
    (openai_clip, in_inference_mode),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("build", "switch"), SWITCHES, ids=lambda one: one.__name__)
def test_a_switch_changes_no_map(build, switch, method):
    for found, wanted in zip(maps_of(switch(build()), method), maps_without(build, method), strict=True):
        assert bool(wanted.any())
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize("switch", [checkpointed, switched_checkpointing])
def test_a_layer_inside_a_checkpointed_block(switch):
    model = openai_clip()

    def bits(of: nn.Module) -> Tensor:
        layer = of.visual.transformer.resblocks[1].ln_2
        return LayerMultiModalInfoBottleneck(DualEncoder(of), layer).attribute(inputs(), n_steps=2)

    expected = bits(copy.deepcopy(model))
    torch.testing.assert_close(bits(switch(model)), expected, rtol=1e-6, atol=1e-9)


def test_switches_are_left_as_they_were():
    model = switched_checkpointing(openai_clip())
    maps_of(model, "GradECLIP")
    assert model.visual.transformer.grad_checkpointing
    ran: list[int] = []

    def counted(x: Tensor) -> Tensor:
        ran.append(1)
        return x.sin()

    for use_reentrant in (False, True):
        ran.clear()
        checkpoint(counted, torch.ones(2, requires_grad=True), use_reentrant=use_reentrant).sum().backward()
        assert len(ran) == 2
    with torch.inference_mode():
        assert torch.ones(1).is_inference()
    attending = flex(transformers_clip())
    maps_of(attending, "GradECLIP")
    assert {one.config._attn_implementation for one in attending.modules() if hasattr(one, "config")} == {
        "flex_attention"
    }


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_a_quantised_model_is_refused_by_the_name_of_its_operator_and_masked_rightly():
    model = transformers_clip().float()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}).eval()
    pixels, ids = inputs()
    for method in ("default", "GradECLIP", "NarrowingInfoBottleneck"):
        with pytest.raises(RuntimeError, match=r"q_proj' \(Linear\) computes with quantized::linear_dynamic, which"):
            METHODS[method](DualEncoder(quantised)).attribute((pixels.float(), ids))
    masked = RISE(DualEncoder(quantised)).attribute((pixels.float(), ids), n_masks=8)
    assert all(bool(found.any()) for found in masked)
