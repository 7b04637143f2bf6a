"""Every rival method keeps the contracts: interface, independent pairs, padding, the model as found, bad input."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attr_oracles import clip_case, state_of
from captum.attr import NoiseTunnel
from captum.attr._utils.attribution import Attribution, GradientAttribution, PerturbationAttribution
from families import Case, conv_case, family_named, wide_case
from families import clip_case as clip_in_float32

from captum_m2ib.attr.attention_relevance import AttentionRelevance
from captum_m2ib.attr.contrastive_info_bottleneck import ContrastiveInfoBottleneck
from captum_m2ib.attr.grad_eclip import GradECLIP
from captum_m2ib.attr.info_bottleneck import InfoBottleneck
from captum_m2ib.attr.le_grad import LeGrad
from captum_m2ib.attr.narrowing_info_bottleneck import NarrowingInfoBottleneck
from captum_m2ib.attr.pair_interaction import PairInteraction
from captum_m2ib.attr.rise import RISE


@dataclass(frozen=True)
class Method:
    """A method as a function of a case, with few steps."""

    kind: type
    make: Callable[[Any], Any]
    settings: dict[str, Any]

    def __call__(self, case: Case, **settings: Any) -> tuple[torch.Tensor, ...]:
        return self.make(case.forward).attribute(
            case.inputs, additional_forward_args=case.additional or None, **{**self.settings, **settings}
        )


def recommended(forward: Any) -> InfoBottleneck:
    return InfoBottleneck(forward, forward.recommended_layers())


METHODS = [
    Method(NarrowingInfoBottleneck, NarrowingInfoBottleneck, {"n_steps": 2}),
    Method(GradECLIP, GradECLIP, {}),
    Method(AttentionRelevance, AttentionRelevance, {}),
    Method(LeGrad, LeGrad, {}),
    Method(RISE, RISE, {"n_masks": 4}),
    Method(InfoBottleneck, recommended, {"n_steps": 2, "n_samples": 2}),
]
KINDS = [method.kind for method in METHODS] + [ContrastiveInfoBottleneck, PairInteraction]


# Random masks and noise tell equal patches apart: the tests of RISE and IBA plant evidence of their own.
NOT_RANDOM = pytest.mark.parametrize("method", METHODS[:4], ids=lambda method: method.kind.__name__)
# A target of IBA names a class.
SCORING = pytest.mark.parametrize("method", METHODS[:5], ids=lambda method: method.kind.__name__)


@pytest.fixture(params=METHODS, ids=lambda method: method.kind.__name__)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_captums_interface(kind: type):
    assert issubclass(kind, Attribution) and not issubclass(kind, (GradientAttribution, PerturbationAttribution))
    names = list(inspect.signature(kind.attribute).parameters)
    assert names[:4] == ["self", "inputs", "target", "additional_forward_args"]
    assert {"internal_batch_size", "show_progress"} <= set(names)
    assert callable(kind.attribute.__wrapped__)
    bare = kind.__new__(kind)
    assert not bare.multiplies_by_inputs and not bare.has_convergence_delta()
    with pytest.raises(NotImplementedError, match=kind.__name__):
        bare.attribute_future()


def test_form_of_what_is_returned(method: Method):
    case = clip_in_float32()
    maps = method(case)
    assert isinstance(maps, tuple)
    for found, given in zip(maps, case.inputs, strict=True):
        assert found.shape == given.shape and found.dtype == torch.float32 and found.is_contiguous()
        assert not found.requires_grad and found.grad_fn is None and float(found.abs().sum()) > 0
    # Channels share equally, padding has nothing.
    assert torch.equal(maps[0][:, 0], maps[0][:, 1])
    assert not maps[1][case.additional[0] == 0].any()
    first, *others = case.inputs
    alone = method.make(case.forward).attribute(
        first, additional_forward_args=(*others, *case.additional), **method.settings
    )
    assert isinstance(alone, torch.Tensor)
    torch.testing.assert_close(alone, maps[0], rtol=0, atol=1e-4 * float(maps[0].abs().max()))


def test_pairs_are_independent(method: Method):
    case = clip_case()
    expected = method(case)
    variants = [
        (slice(1, 2), [1]),
        (torch.tensor([1, 1, 2, 0]), [1, 1, 2, 0]),
    ]
    for rows, order in variants:
        for found, whole in zip(method(case.select(rows)), expected, strict=True):
            torch.testing.assert_close(found, whole[order], rtol=0, atol=1e-6 * float(whole.abs().max()))
    for rows in (1, 4):
        for found, whole in zip(method(case, internal_batch_size=rows), expected, strict=True):
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))


def test_more_padding_changes_nothing(method: Method):
    case = clip_case()
    pixels, ids = case.inputs
    longer = case.with_inputs((pixels, F.pad(ids, (0, 3), value=1)), (F.pad(case.additional[0], (0, 3)),))
    for found, expected in zip(method(longer), method(case), strict=True):
        found = found if found.ndim == 4 else found[:, :6]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert not method(longer)[1][:, 6:].any()


def test_the_model_is_left_as_found(method: Method):
    case = clip_in_float32()
    model = case.roots[0]
    model.logit_scale.grad = torch.ones(())
    model.vision_model.encoder.layers[0].requires_grad_(False)
    before = state_of(case.roots)
    expected = method(case)
    assert state_of(case.roots) == before
    with torch.no_grad():
        quiet = method(case)
    with torch.inference_mode():
        made = case.with_inputs(tuple(t.clone() for t in case.inputs), tuple(t.clone() for t in case.additional))
        inferred = method(made)
    assert state_of(case.roots) == before
    for maps in (quiet, inferred):
        for found, same in zip(maps, expected, strict=True):
            assert torch.equal(found, same)
    case.forward.train()
    before = state_of(case.roots)
    with pytest.warns(UserWarning, match="training mode"):
        maps = method(case)
    assert state_of(case.roots) == before
    for found, same in zip(maps, expected, strict=True):
        assert torch.equal(found, same)


def test_the_model_is_left_as_found_after_an_error(method: Method):
    case = clip_in_float32()
    last = case.roots[0].text_model.encoder.layers[3]
    for calls in (1, 2):
        passes = []

        def fail(module: Any, args: Any, output: Any, passes: list = passes, calls: int = calls) -> None:
            passes.append(1)
            if len(passes) >= calls:
                raise KeyboardInterrupt

        handle = last.register_forward_hook(fail)
        before = state_of(case.roots)
        with pytest.raises(KeyboardInterrupt):
            method(case)
        assert state_of(case.roots) == before
        handle.remove()


def test_two_threads_on_one_model(method: Method):
    case = clip_case()
    expected = method(case)
    found: list[Any] = [None, None]

    def work(place: int) -> None:
        found[place] = method(case)

    threads = [threading.Thread(target=work, args=(place,)) for place in (0, 1)]
    before = state_of(case.roots)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state_of(case.roots) == before
    for maps in found:
        for one, other in zip(maps, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(method: Method, dtype: torch.dtype):
    case = clip_in_float32()
    expected = method(case)
    case.roots[0].to(dtype)
    half = case.with_inputs((case.inputs[0].to(dtype), case.inputs[1]), case.additional)
    for found, same in zip(method(half), expected, strict=True):
        assert found.dtype == torch.float32
        correlation = torch.corrcoef(torch.stack([found.flatten(), same.flatten()]))[0, 1]
        assert float(correlation) > 0.9


@NOT_RANDOM
def test_the_one_patch_that_differs_stands_out_in_its_place(method: Method):
    case = wide_case()
    model = case.roots[0].model
    torch.nn.init.zeros_(model.vision_model.embeddings.position_embedding.weight)
    pixels = torch.ones(3, 3, 32, 48)
    places = [(0, 5), (3, 1), (2, 4)]
    for picture, (row, column) in zip(pixels, places, strict=True):
        picture[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = torch.randn(3, 8, 8)
    made, score = method.make(case.forward), case.forward
    # Evidence against a pair counts as well, which some methods leave out.

    def both(*given: torch.Tensor) -> torch.Tensor:
        for_it = score(*given)
        return torch.stack([for_it, -for_it], 1)

    made.forward_func = both
    beyond = torch.zeros(3, 4, 6)
    for target in (0, 1):
        maps, _ = made.attribute(
            (pixels, case.inputs[1]), target=target, additional_forward_args=case.additional, **method.settings
        )
        cells = F.avg_pool2d(maps.sum(1), 8)
        beyond += (cells - cells.flatten(1).median(1).values[:, None, None]).abs()
    for cell, place in zip(beyond, places, strict=True):
        assert divmod(int(cell.argmax()), 6) == place


def test_noise_tunnel_takes_it(method: Method):
    case = clip_in_float32()
    pixels, ids = case.inputs
    tunnel = NoiseTunnel(method.make(case.forward))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tunnel.attribute(
            pixels,
            nt_samples=2,
            stdevs=0.01,
            additional_forward_args=(ids, *case.additional),
            **method.settings,
        )
    assert found.shape == pixels.shape and bool(found.isfinite().all())


@SCORING
def test_targets_select_an_output(method: Method):
    case = clip_case()
    expected = method(case)

    def both(*arguments: torch.Tensor) -> torch.Tensor:
        score = case.forward(*arguments)
        return torch.stack([-score, score], 1)

    made = method.make(case.forward)
    made.forward_func = both
    found = made.attribute(case.inputs, target=1, additional_forward_args=case.additional, **method.settings)
    per_pair = made.attribute(case.inputs, target=[1, 0, 1], additional_forward_args=case.additional, **method.settings)
    for one, mixed, other in zip(found, per_pair, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
        torch.testing.assert_close(mixed[[0, 2]], other[[0, 2]], rtol=0, atol=1e-9)
        assert not torch.allclose(mixed[1], other[1])


@pytest.mark.parametrize("name", ["conv_maps", "swin_bert", "convnext_bert", "open_clip_resnet", "xclip", "clap"])
@pytest.mark.parametrize("kind", [NarrowingInfoBottleneck, RISE])
def test_towers_without_attention_have_two_rivals_left(kind: type, name: str):
    case = conv_case() if name == "conv_maps" else family_named(name).build()
    settings = {"n_masks": 6} if kind is RISE else {"n_steps": 3}
    if name == "conv_maps" and kind is NarrowingInfoBottleneck:
        made = kind(case.forward, [case.roots[0].body, case.roots[1].blocks[1]])
        settings["attribute_to_layer_input"] = True
    else:
        made = kind(case.forward)
    maps = made.attribute(case.inputs, additional_forward_args=case.additional or None, **settings)
    for found, given in zip(maps, case.inputs, strict=True):
        assert found.shape == given.shape and bool(found.isfinite().all()) and float(found.abs().sum()) > 0


def test_bad_input_gets_a_clear_error(method: Method):
    case = clip_in_float32()
    made = method.make(case.forward)
    pixels, ids = case.inputs
    bad = pixels.clone()
    bad[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"inputs\[0\]: expected finite numbers"):
        made.attribute((bad, ids), additional_forward_args=case.additional)
    with pytest.raises(ValueError, match="inputs: expected a tensor or a tuple of tensors"):
        made.attribute([pixels, ids])
    with pytest.raises(ValueError, match="inputs: expected the same number of examples"):
        made.attribute((pixels, ids[:2]))
    with pytest.raises(ValueError, match="internal_batch_size: expected a whole number of at least 1"):
        made.attribute(case.inputs, additional_forward_args=case.additional, internal_batch_size=0)
    case.roots[0].text_projection.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite for pair 0"):
        made.attribute(case.inputs, additional_forward_args=case.additional)
