"""The late layer that guides a picture's bits: chosen, named, left out, refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import Case, family_named
from torch import Tensor, nn

from captum_m2ib import ContrastiveInfoBottleneck, DualEncoder, MultiModalInfoBottleneck, PatchLayout

FEW: dict[str, Any] = {"n_steps": 2, "n_samples": 2}


@pytest.fixture
def case() -> Case:
    return family_named("clip").build().double()


def explain(method: MultiModalInfoBottleneck, case: Case, **options: Any) -> tuple[Tensor, ...]:
    return method.attribute(case.inputs, additional_forward_args=case.additional, **{**FEW, **options})


def test_the_published_layer_guides_the_picture_alone(case: Case):
    encoder = case.forward
    assert isinstance(encoder, DualEncoder)
    assert MultiModalInfoBottleneck(encoder).guides == ()
    method = MultiModalInfoBottleneck.guided(encoder)
    assert [guide.guided for guide in method.guides] == [0]
    assert method.guides[0].layer.module is encoder.published_layers()[0]
    guided, plain = explain(method, case), explain(MultiModalInfoBottleneck(encoder), case)
    named = explain(MultiModalInfoBottleneck(encoder, guides=(encoder.published_layers()[0], None)), case)
    assert torch.equal(guided[1], plain[1])
    assert torch.equal(guided[0], named[0])
    # Bits are moved, never made.
    torch.testing.assert_close(guided[0].sum((1, 2, 3)), plain[0].sum((1, 2, 3)))
    assert float((guided[0] - plain[0]).abs().max()) > 0.1 * float(plain[0].max())


def test_a_picture_alone_has_the_map_that_it_has_in_the_pair(case: Case):
    method = MultiModalInfoBottleneck.guided(case.forward)
    both = explain(method, case)[0]
    alone = method.attribute(case.inputs[0], additional_forward_args=(case.inputs[1], *case.additional), **FEW)
    torch.testing.assert_close(alone, both, rtol=0, atol=1e-9 * float(both.max()))


def test_another_layer_guides_otherwise(case: Case):
    encoder = case.forward
    first = encoder.stages(0)[0][0]
    found = explain(MultiModalInfoBottleneck(encoder, guides=(first,)), case)[0]
    assert not torch.allclose(found, explain(MultiModalInfoBottleneck.guided(encoder), case)[0])


def test_the_record_is_of_the_map_that_is_given(case: Case):
    method = MultiModalInfoBottleneck.guided(case.forward)
    maps, record = method.attribute_with_record(case.inputs, additional_forward_args=case.additional, check=True, **FEW)
    assert [one.layer for one in record.modalities] == [layer.name for layer in method.layers]
    torch.testing.assert_close(record.modalities[0].units, maps[0].sum(1))
    torch.testing.assert_close(record.modalities[0].bits, maps[0].sum((1, 2, 3)))
    assert len(record.settings.beta) == 2 and record.modalities[0].check is not None


def test_joint_gates_are_guided_too(case: Case):
    guided = explain(MultiModalInfoBottleneck.guided(case.forward), case, joint=True)
    plain = explain(MultiModalInfoBottleneck(case.forward), case, joint=True)
    assert torch.equal(guided[1], plain[1]) and not torch.allclose(guided[0], plain[0])


def test_a_pair_alone_has_the_map_that_it_has_in_the_batch(case: Case):
    method = MultiModalInfoBottleneck.guided(case.forward)
    whole, alone = explain(method, case)[0], explain(method, case.select(slice(1, 2)))[0]
    torch.testing.assert_close(alone, whole[1:2], rtol=0, atol=1e-6 * float(alone.max()))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_map_does_not_depend_on_the_unit_of_the_score(case: Case, scale: float):
    encoder = case.forward
    given = {
        "layers": encoder.recommended_layers(),
        "layouts": encoder.layouts,
        "statistics": ("pair", "pair"),
        "guides": (encoder.published_layers()[0],),
    }

    def scaled(*arguments: Any) -> Tensor:
        return scale * encoder(*arguments) + 7.0

    own, other = (explain(MultiModalInfoBottleneck(score, **given), case)[0] for score in (encoder, scaled))
    torch.testing.assert_close(other, own, rtol=0, atol=1e-6 * float(own.max()))


def test_only_pictures_that_are_gated_themselves_are_guided(case: Case):
    encoder = case.forward
    image, text = encoder.published_layers()
    with pytest.raises(ValueError, match=r"guides: only pictures .* a layer for input 1"):
        MultiModalInfoBottleneck(encoder, guides=(image, text))
    with pytest.raises(ValueError, match=r"guides: only pictures .* a layer for input 0"):
        MultiModalInfoBottleneck(encoder, layers=(image, text), guides=(image,))
    with pytest.raises(ValueError, match=r"layers: only pictures .* neither input is one"):
        MultiModalInfoBottleneck.guided(encoder, layers=(image, text))
    with pytest.raises(ValueError, match=r"layers: they can only be guided for a DualEncoder"):
        MultiModalInfoBottleneck.guided(lambda pixels, ids: encoder(pixels, ids))


def test_a_contrast_is_guided_too(case: Case):
    pixels, ids = case.inputs
    given = (pixels, ids, ids.roll(1, 0)), (*case.additional, *(one.roll(1, 0) for one in case.additional))
    found = []
    for make in (ContrastiveInfoBottleneck, ContrastiveInfoBottleneck.guided):
        found.append(make(case.forward).attribute(given[0], additional_forward_args=given[1], **FEW))
    plain, guided = found
    assert torch.equal(guided[1], plain[1]) and torch.equal(guided[2], plain[2])
    torch.testing.assert_close(guided[0].sum((1, 2, 3)), plain[0].sum((1, 2, 3)))
    assert not torch.allclose(guided[0], plain[0])


class Towers(nn.Module):
    """Patches of 4 pixels, each embedded by itself; the score is the mean of one channel, times that of the words."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 4, 4)
        self.mix = nn.Conv2d(8, 8, 1)

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        return self.mix(self.cut(pixels).tanh())[:, 0].mean((1, 2)) * words.mean(1)


def test_a_function_is_guided_by_the_layer_that_it_is_given():
    torch.manual_seed(0)
    model = Towers().double().eval()
    pixels, words = torch.randn(2, 3, 16, 16).double(), torch.rand(2, 5).double()
    layouts = (PatchLayout(patch_size=(4, 4)), None)
    plain = MultiModalInfoBottleneck(lambda a, b: model(a, b), layers=(None, None), layouts=layouts)
    assert plain.guides == ()
    guided = MultiModalInfoBottleneck(
        lambda a, b: model(a, b), layers=(None, None), layouts=layouts, guides=(model.mix, None)
    )
    found = [method.attribute(pixels, additional_forward_args=(words,), **FEW) for method in (plain, guided)]
    torch.testing.assert_close(found[0].sum((1, 2, 3)), found[1].sum((1, 2, 3)))
    assert not torch.allclose(*found)
    with pytest.raises(ValueError, match=r"guides: cannot tell how .* maps onto input 0; pass its layout"):
        MultiModalInfoBottleneck(lambda a, b: model(a, b), layers=(None, None), guides=(model.mix, None))
    with pytest.raises(
        ValueError, match=r"guides: expected pictures, .* as input 0, .* got a tensor of shape \(2, 16\)"
    ):
        guided.attribute(torch.randn(2, 16).double(), additional_forward_args=(words,), **FEW)
