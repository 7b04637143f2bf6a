"""How towers are called, and what is an embedding: masks where they are taken, one row per example, one width."""

from __future__ import annotations

import copy
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from families import captions, clip_case, image_tower, pictures, text_tower, tiny_clip
from torch import Tensor, nn

from captum_m2ib import ChannelStatistics, DualEncoder, MultiModalInfoBottleneck, PatchLayout, TextLayout

FEW = {"n_steps": 2, "n_samples": 2}
LAYOUTS = (PatchLayout((8, 8), 1), None)


class Text(nn.Module):
    """Means of tokens; how the mask is taken differs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)

    def pooled(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        weight = torch.ones_like(ids) if mask is None else mask
        return (self.embed(ids) * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)


class Unmasked(Text):
    def forward(self, ids: Tensor) -> Tensor:
        return self.pooled(ids)


class Second(Text):
    def forward(self, ids: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return self.pooled(ids, padding_mask)


class Required(Text):
    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self.pooled(ids, weights)


class Named(Text):
    def forward(self, ids: Tensor, normalize: bool = False, *, attention_mask: Tensor | None = None) -> Tensor:
        assert normalize is False
        return self.pooled(ids, attention_mask)


class Other(Text):
    def forward(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        assert position_ids is None
        return self.pooled(ids)


TAKING = [(Unmasked, False), (Second, True), (Required, True), (Named, True), (Other, False)]


@pytest.mark.parametrize(("kind", "is_taken"), TAKING, ids=[kind.__name__ for kind, _ in TAKING])
def test_a_mask_is_passed_as_a_tower_takes_it(kind: type[Text], is_taken: bool):
    image, text = image_tower().eval(), kind().eval()
    encoder = DualEncoder(image, text, layouts=LAYOUTS)
    assert encoder.argument_names == ("pixel_values", "input_ids", "attention_mask")[: 2 + is_taken]
    pixels, (ids, mask) = pictures(), captions()
    given = (mask,) if is_taken else ()
    torch.testing.assert_close(
        encoder(pixels, ids, *given), F.cosine_similarity(image(pixels), text.pooled(ids, *given))
    )
    assert encoder.layouts[1] == TextLayout(2 if is_taken else None)


class ScriptedUnmasked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids).mean(1)


class ScriptedSecond(ScriptedUnmasked):
    def forward(self, ids: Tensor, mask: Optional[Tensor] = None) -> Tensor:  # noqa: UP045 - scripts know this form
        return self.embed(ids).mean(1)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("kind", "names"), [(ScriptedUnmasked, 2), (ScriptedSecond, 3)])
def test_a_scripted_tower_says_what_it_takes(kind: type[nn.Module], names: int):
    scripted = torch.jit.script(kind().eval())
    encoder = DualEncoder(image_tower().eval(), scripted, layouts=(LAYOUTS[0], TextLayout()))
    assert len(encoder.argument_names) == names
    pixels, (ids, mask) = pictures(), captions()
    assert torch.equal(encoder(pixels, ids, *(mask,)[: names - 2]), encoder(pixels, ids))


class Encodes(nn.Module):
    """A model of one's own under open_clip's names, whose text tower reads a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.text = image_tower(), text_tower()

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image)

    def encode_text(self, text: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.text(text, attention_mask)


def test_a_mask_reaches_a_model_that_encodes_with_one():
    model, pixels, (ids, mask) = Encodes().eval(), pictures(), captions()
    encoder = DualEncoder(model, layouts=LAYOUTS)
    assert encoder.argument_names == ("image", "text", "attention_mask")
    torch.testing.assert_close(
        encoder(pixels, ids, mask), F.cosine_similarity(model.visual(pixels), model.text(ids, mask))
    )
    bits = MultiModalInfoBottleneck(encoder).attribute((pixels, ids), additional_forward_args=mask, **FEW)
    assert not bits[1][mask == 0].any() and bool((bits[1][mask > 0] > 0).all())


class Inferring(Encodes):
    """Methods that were made for inference only."""

    @torch.inference_mode()
    def encode_text(self, text: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.text(text, attention_mask)


def test_a_method_in_inference_mode_is_explained_as_without():
    model, given = Inferring().eval(), (pictures(), captions()[0])
    found = MultiModalInfoBottleneck(DualEncoder(model, layouts=LAYOUTS)).attribute(given, **FEW)
    model.encode_text = Encodes.encode_text.__get__(model)
    expected = MultiModalInfoBottleneck(DualEncoder(model, layouts=LAYOUTS)).attribute(given, **FEW)
    for one, other in zip(found, expected, strict=True):
        assert bool(one.any())
        torch.testing.assert_close(one, other)


class Whole(nn.Module):
    """A text tower that returns all of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids)


def test_one_row_per_token_is_no_embedding():
    encoder = DualEncoder(image_tower().eval(), Whole().eval(), layouts=LAYOUTS)
    with pytest.raises(TypeError, match=r"^model: expected Whole .*got a tensor of shape \(3, 6, 8\); wrap .* pools"):
        encoder(pictures(), captions()[0])


def test_embeddings_of_two_widths_are_an_error():
    encoder = DualEncoder(image_tower().eval(), nn.Sequential(Unmasked(), nn.Linear(8, 5)).eval(), layouts=LAYOUTS)
    with pytest.raises(ValueError, match=r"^model: expected both towers .* one width, got 8 and 5 dimensions"):
        encoder(pictures(), captions()[0])


@pytest.mark.parametrize("part", ["whole", "text_model", "vision_model"])
def test_outputs_without_names_are_refused(part: str):
    case = clip_case()
    model = case.roots[0]
    (model if part == "whole" else getattr(model, part)).config.return_dict = False
    with pytest.raises(
        ValueError, match=r"^model: the configuration of \w+ says return_dict=False.*return_dict = True"
    ):
        case.forward(*case.inputs, *case.additional)


# One owner of the model.


def tuned(model: nn.Module) -> nn.Module:
    torch.manual_seed(9)
    changed = copy.deepcopy(model)
    for parameter in changed.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return changed


def test_a_model_that_is_set_takes_effect_everywhere():
    case = clip_case()
    given = ChannelStatistics(torch.zeros(32), torch.ones(32))
    encoder = DualEncoder(case.roots[0], statistics={"text_model.embeddings": given})
    old = case.attribute(MultiModalInfoBottleneck(encoder), **FEW)
    model = tuned(case.roots[0])
    encoder.model = model
    fresh, arguments = DualEncoder(model), (*case.inputs, *case.additional)
    assert torch.equal(encoder(*arguments), fresh(*arguments))
    assert encoder.tower_of(1) is model.text_model and encoder.roots()[0] is model and not encoder.statistics
    maps = [case.attribute(MultiModalInfoBottleneck(one), **FEW) for one in (encoder, fresh)]
    assert all(map(torch.equal, *maps)) and not torch.equal(maps[0][0], old[0])


def test_a_tower_that_is_set_takes_effect_everywhere():
    image, text, other = image_tower().eval(), text_tower().eval(), text_tower().eval()
    encoder = DualEncoder(image, text, layouts=LAYOUTS)
    encoder.text_tower = torch.compile(other, backend="eager")
    assert encoder.text_tower is other and encoder.tower_of(1) is other
    pixels, (ids, mask) = pictures(), captions()
    torch.testing.assert_close(encoder(pixels, ids, mask), F.cosine_similarity(image(pixels), other(ids, mask)))


def test_a_model_put_in_place_by_hand_is_the_one_that_is_run():
    case = clip_case()
    encoder, model = DualEncoder(case.roots[0]), tuned(case.roots[0])
    encoder._modules["model"] = model
    arguments = (*case.inputs, *case.additional)
    assert torch.equal(encoder(*arguments), DualEncoder(model)(*arguments))


def test_a_copy_runs_its_own_model():
    case = clip_case()
    encoder = copy.deepcopy(case.forward)
    encoder.model.visual_projection.weight.data.neg_()
    arguments = (*case.inputs, *case.additional)
    torch.testing.assert_close(encoder(*arguments), -case.forward(*arguments))


def test_what_an_encoder_is_not_made_of_cannot_be_set():
    whole, towers = DualEncoder(tiny_clip()), DualEncoder(image_tower(), text_tower(), layouts=LAYOUTS)
    with pytest.raises(AttributeError, match=r"^text_tower: this DualEncoder is made of model; set that"):
        whole.text_tower = text_tower()
    with pytest.raises(AttributeError, match=r"^model: this DualEncoder is made of image_tower and text_tower"):
        towers.model = tiny_clip()
    before = whole.model
    with pytest.raises(TypeError, match=r"^model: expected get_image_features"):
        whole.model = nn.Linear(2, 2)
    assert whole.model is before


def test_a_layout_that_is_none_is_derived():
    encoder = DualEncoder(tiny_clip(), layouts=(None, TextLayout(pad_token_id=0)))
    assert encoder.layouts == (PatchLayout((8, 8), 1), TextLayout(pad_token_id=0))
