"""Contract 10: a map depends neither on the score's unit nor on its zero: a * score + b has the map of score.

In float32 the zero is moved by no more than a few scores: beyond that the score's own digits are lost before anything
here sees them. The published settings take the score as it is, and do depend on its unit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import Case, Family, family_named
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_m2ib import (
    ContrastiveInfoBottleneck,
    DualEncoder,
    InfoBottleneck,
    LayerMultiModalInfoBottleneck,
    MultiModalInfoBottleneck,
    PatchLayout,
)

FEW = {"n_steps": 3, "n_samples": 2}
DTYPES = pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32"])
# Both ends of the range in float64, which tells the least trace; in float32 the end where digits are lost.
UNITS = {True: ((1e-3, 100.0), (1e3, -1e4)), False: ((1e3, 700.0),)}


def some_in_float64(*names: str) -> pytest.MarkDecorator:
    """Models in float64, and the first of them in float32 as well."""
    cases = [*((name, True) for name in names), (names[0], False)]
    ids = [f"{name}-{'float64' if exact else 'float32'}" for name, exact in cases]
    return pytest.mark.parametrize(("name", "exact"), cases, ids=ids)


def scaled(forward: Any, a: float, b: float) -> Any:
    """The same score in another unit and from another zero, for everything else the same model."""
    if not isinstance(forward, DualEncoder):
        return lambda *arguments: a * forward(*arguments) + b

    class Scaled(type(forward)):
        def forward(self, *arguments: Any) -> Tensor:
            return a * super().forward(*arguments) + b

    other = copy.copy(forward)
    other.__class__ = Scaled
    return other


def case_of(family: Family, exact: bool) -> Case:
    case = family.build()
    if "half" in family.features:
        case.roots[0].float()
        case = case.with_inputs((case.inputs[0].float(), *case.inputs[1:]), case.additional)
    return case.double() if exact else case


def same(found: Any, expected: Any, exact: bool) -> None:
    """Every pair's map to a share of its own largest value."""
    share = 1e-6 if exact else 1e-3
    pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
    for one, other in pairs:
        difference, most = ((part).abs().flatten(1).amax(1) for part in (one - other, other))
        assert bool((most > 0).all()) and bool((difference <= share * most).all()), difference / most


def in_every_unit(attribute: Callable[[Any], Any], forward: Any, exact: bool) -> None:
    expected = attribute(forward)
    for a, b in UNITS[exact]:
        same(attribute(scaled(forward, a, b)), expected, exact)


def with_forward(case: Case, forward: Any) -> Case:
    changed = copy.copy(case)
    changed.forward = forward
    return changed


def at_layers(case: Case, forward: Any) -> Any:
    return with_forward(case, forward).attribute(**FEW)


def at_the_input_and_for_words(case: Case, forward: Any) -> Any:
    changed = with_forward(case, forward)
    if case.layouts is None:
        return changed.attribute(MultiModalInfoBottleneck(forward), **FEW)
    words = None if case.inputs[1].is_floating_point() else case.layers[1][-1]
    method = MultiModalInfoBottleneck(forward, [None, words], case.layouts, statistics=["pair", "pair"])
    return changed.attribute(method, **FEW)


WHERE = pytest.mark.parametrize("attribute", [at_layers, at_the_input_and_for_words], ids=lambda one: one.__name__)


@WHERE
def test_every_family(distinct: Family, attribute: Callable[[Case, Any], Any]):
    case = case_of(distinct, True)
    (a, b), exact = UNITS[True][1], "single" not in distinct.features
    same(attribute(case, scaled(case.forward, a, b)), attribute(case, case.forward), exact)


@DTYPES
@WHERE
@pytest.mark.parametrize("name", ["clip", "clip_bf16", "conv_maps", "shared_tower", "siglip2_naflex"])
def test_every_unit(name: str, attribute: Callable[[Case, Any], Any], exact: bool):
    case = case_of(family_named(name), exact)
    in_every_unit(lambda forward: attribute(case, forward), case.forward, exact)


@pytest.mark.parametrize("prior", [None, "pair"])
@some_in_float64("clip", "closure", "conv_maps", "shared_tower", "sequence_first")
def test_all_modalities_against_one_score(name: str, prior, exact: bool):
    case = case_of(family_named(name), exact)

    def attribute(forward: Any) -> Any:
        changed = with_forward(case, forward)
        return changed.attribute(changed.method(statistics=[prior, prior]), joint=True, **FEW)

    in_every_unit(attribute, case.forward, exact)


@some_in_float64("clip", "closure", "conv_maps")
def test_elements_of_layers(name: str, exact: bool):
    case = case_of(family_named(name), exact)
    several = [choices[0] for choices in case.layers]
    for layer, settings_ in ((several, {}), (several, {"joint": True}), (several[1], {"internal_batch_size": 4})):

        def attribute(forward: Any, layer=layer, settings_=settings_) -> Any:
            method = LayerMultiModalInfoBottleneck(forward, layer, layouts=case.layouts)
            return method.attribute(case.inputs, additional_forward_args=case.additional, **settings_, **FEW)

        in_every_unit(attribute, case.forward, exact)


@DTYPES
@pytest.mark.parametrize("floor", [None, 0.1])
def test_contrasts(floor: float | None, exact: bool):
    case = case_of(family_named("clip"), exact)
    ids, mask = case.inputs[1], case.additional[0]
    inputs, more = (*case.inputs, ids.roll(1, 0)), (mask, mask.roll(1, 0))
    model = case.roots[0]
    at_layers = [model.vision_model.encoder.layers[1], model.text_model.encoder.layers[1]]
    for layers in (None, at_layers):

        def attribute(forward: Any, a: float = 1.0, b: float = 0.0, layers=layers) -> Any:
            # A floor is a score, in the score's own unit.
            moved = None if floor is None else a * floor + b
            method = ContrastiveInfoBottleneck(forward, layers, floor=moved)
            return method.attribute(inputs, additional_forward_args=more, **FEW)

        expected = attribute(case.forward)
        for a, b in UNITS[exact]:
            same(attribute(scaled(case.forward, a, b), a, b), expected, exact)


def test_contrasts_above_the_default_floor_have_no_unit():
    case = case_of(family_named("clip"), True)
    ids, mask = case.inputs[1], case.additional[0]

    def attribute(forward: Any) -> Any:
        method = ContrastiveInfoBottleneck(forward)
        return method.attribute((*case.inputs, ids.roll(1, 0)), additional_forward_args=(mask, mask.roll(1, 0)), **FEW)

    for a in (1e-3, 1e3):
        same(attribute(scaled(case.forward, a, 0.0)), attribute(case.forward), True)


class Total(nn.Module):
    """One score per picture, from the cells of a map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh())
        self.head = nn.Linear(8, 1)

    def forward(self, given: Tensor) -> Tensor:
        return torch.tanh(self.head(self.stem(given).flatten(2).mean(2)).squeeze(1))


@DTYPES
@pytest.mark.parametrize("smoothing", [None, 1.0])
def test_one_modality_without_a_target(smoothing: float | None, exact: bool):
    model = Total().eval().to(torch.float64 if exact else torch.float32)
    pictures = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(0)).to(model.head.weight)

    def attribute(forward: Any) -> Any:
        method = InfoBottleneck(forward, [model.stem], [PatchLayout((4, 4))])
        return method.attribute(pictures, smoothing=smoothing, **FEW)

    in_every_unit(attribute, model, exact)


# Where the score weighs a tenth, some maps are empty.
@pytest.mark.filterwarnings("ignore:beta. no part of pair:captum_m2ib.NothingToExplainWarning")
@pytest.mark.parametrize("joint", [False, True])
@some_in_float64("clip", "closure")
def test_the_measured_range_may_be_given(name: str, joint: bool, exact: bool):
    case = case_of(family_named(name), exact)
    method = MultiModalInfoBottleneck(case.forward) if name == "clip" else case.method()
    given = {"additional_forward_args": case.additional, "joint": joint, **FEW}
    expected, record = method.attribute_with_record(case.inputs, **given)
    for index, modality in enumerate(record.modalities):
        if not joint or index == 0:
            # A tensor, and a list.
            ranges = modality.score_range if index == 0 else modality.score_range.tolist()
            found = method.attribute(case.inputs, score_range=ranges, **given)
            where = slice(None) if joint else slice(index, index + 1)
            same(found[where], expected[where], exact)
    # Apart from each other they have ranges of their own, against one score a common one.
    one, other = (modality.score_range for modality in record.modalities)
    assert torch.equal(one, other) == joint
    # A larger range makes the score weigh less, so fewer bits are kept.
    less = method.attribute(case.inputs, score_range=10 * other, **given)
    assert float(less[1].sum()) < float(expected[1].sum())
    chunked = method.attribute(case.inputs, score_range=other, internal_batch_size=3, **given)
    same(chunked[1:], expected[1:], exact)


def test_a_given_range_is_in_the_scores_unit():
    case = case_of(family_named("closure"), True)
    expected = case.attribute(score_range=0.3, **FEW)
    found = with_forward(case, scaled(case.forward, 50.0, -3.0)).attribute(score_range=15.0, **FEW)
    same(found, expected, True)


@pytest.mark.parametrize("name", ["clip", "open_clip_coca"])
def test_the_published_settings_take_the_score_as_it_is(name: str):
    case = case_of(family_named(name), True)

    def attribute(forward: Any, **settings_) -> Any:
        return with_forward(case, forward).attribute(MultiModalInfoBottleneck.published(forward), **settings_, **FEW)

    expected = attribute(case.forward)
    same(attribute(scaled(case.forward, 1.0, 100.0)), expected, True)
    for a in (1e-3, 1e3):
        for one, other in zip(attribute(scaled(case.forward, a, 0.0)), expected, strict=True):
            assert float((one - other).abs().max()) > 0.005 * float(other.max())
    _, record = MultiModalInfoBottleneck.published(case.forward).attribute_with_record(
        case.inputs, additional_forward_args=case.additional, **FEW
    )
    assert all(r.score_range.tolist() == [1.0] * 3 and r.score_closed is None for r in record.modalities)


def toy_score(words: Tensor) -> Callable[[Tensor], Tensor]:
    def score(given: Tensor) -> Tensor:
        return F.cosine_similarity(given[:, :, 2:6, 1:4].mean((2, 3)), words.expand(len(given), -1))

    return score


@settings(max_examples=20, deadline=None)
@given(
    logarithm=st.floats(-3, 3),
    zero=st.floats(-1e4, 1e4),
    seed=st.integers(0, 20),
    at_input=st.booleans(),
)
def test_any_unit_and_any_zero(logarithm: float, zero: float, seed: int, at_input: bool):
    a = 10.0**logarithm
    generator = torch.Generator().manual_seed(seed)
    given_ = torch.rand(2, 3, 8, 8, generator=generator).double()
    words = torch.randn(3, generator=generator).double()
    reader = nn.Conv2d(3, 3, 2, 2, bias=False).double().eval()
    with torch.no_grad():
        reader.weight.copy_(torch.randn(reader.weight.shape, generator=generator))

    def read(seen: Tensor) -> Tensor:
        return F.cosine_similarity(reader(seen)[:, :, 1:3, :2].flatten(2).mean(2), words.expand(len(seen), -1))

    forward = toy_score(words) if at_input else read
    layers, layouts = ([None], None) if at_input else ([reader], [PatchLayout((2, 2))])
    maps = [
        MultiModalInfoBottleneck(function, layers, layouts).attribute(given_, n_steps=4, n_samples=2, beta=0.1)
        for function in (forward, scaled(forward, a, a * zero), scaled(forward, a, zero))
    ]
    for found in maps[1:]:
        # Random pictures may have nothing to lose, and empty maps.
        torch.testing.assert_close(found, maps[0], rtol=0, atol=1e-6 * float(maps[0].max()))
