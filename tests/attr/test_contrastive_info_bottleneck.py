"""The difference of two captions against the same difference written out by hand, and what runs for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attr_oracles import clip_case
from families import Case, family_named
from torch import Tensor, nn

from captum_m2ib import MultiModalInfoBottleneck, PatchLayout, TextLayout
from captum_m2ib.attr.contrastive_info_bottleneck import ContrastiveInfoBottleneck

FEW = {"n_steps": 3, "n_samples": 3}


def rivals(case: Case) -> tuple[Tensor, Tensor]:
    ids, mask = case.inputs[1], case.additional[0]
    return ids.roll(1, 0), mask.roll(1, 0)


def by_hand(case: Case, floor: float | None):
    """The difference with the picture embedded once, each step in the open."""
    model = case.roots[0]

    def embedding(output) -> Tensor:
        return getattr(output, "pooler_output", output)

    def score(pixels, ids, rival, mask, rival_mask) -> Tensor:
        image = embedding(model.get_image_features(pixels))
        right, wrong = (
            F.cosine_similarity(image, embedding(model.get_text_features(words, attention_mask=real)))
            for words, real in ((ids, mask), (rival, rival_mask))
        )
        return right - (wrong if floor is None else wrong.clamp(min=floor))

    return score


@pytest.mark.parametrize("floor", [0.0, None, 0.2])
def test_equals_the_difference_by_hand(floor: float | None):
    case = clip_case()
    rival, rival_mask = rivals(case)
    model = case.roots[0]
    layers = [model.vision_model.encoder.layers[1], model.text_model.encoder.layers[1]]
    contrast = ContrastiveInfoBottleneck(case.forward, layers, floor=floor)
    everything = (case.additional[0], rival_mask)
    found = contrast.attribute((*case.inputs, rival), additional_forward_args=everything, **FEW)
    hand = MultiModalInfoBottleneck(
        by_hand(case, floor),
        [layers[0], (layers[1], 0), (layers[1], 1)],
        [PatchLayout((8, 8), prefix=1), TextLayout(mask_argument=3), TextLayout(mask_argument=4)],
    )
    expected = hand.attribute((*case.inputs, rival), additional_forward_args=everything, **FEW)
    assert len(found) == 3 and found[2].shape == rival.shape
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * float(other.max()))
    assert not found[2][rival_mask == 0].any() and float(found[2].sum()) > 0
    # The first input alone, or with the second, gives the same maps.
    alone = contrast.attribute(case.inputs[0], additional_forward_args=(case.inputs[1], rival, *everything), **FEW)
    torch.testing.assert_close(alone, found[0], rtol=0, atol=1e-9)
    both = contrast.attribute(case.inputs, additional_forward_args=(rival, *everything), **FEW)
    torch.testing.assert_close(both[1], found[1], rtol=0, atol=1e-9)


def test_one_tower_for_both_inputs():
    case = family_named("shared_tower").build().double()
    (tower,) = case.roots
    first, second = case.inputs
    rival = second.roll(1, 0)
    layers = [(tower.blocks[0], 0), (tower.blocks[0], 1)]
    found = ContrastiveInfoBottleneck(case.forward, layers, case.layouts, floor=None).attribute(
        (first, second, rival), **FEW
    )

    def score(one: Tensor, two: Tensor, three: Tensor) -> Tensor:
        embedding = tower(one)
        return F.cosine_similarity(embedding, tower(two)) - F.cosine_similarity(embedding, tower(three))

    hand = MultiModalInfoBottleneck(score, [(tower.blocks[0], i) for i in range(3)], [case.layouts[0]] * 3)
    for one, other in zip(found, hand.attribute((first, second, rival), **FEW), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * float(other.max()))


@pytest.mark.parametrize("name", ["siglip2_naflex", "open_clip_vit", "keywords_only", "sequence_first"])
def test_other_towers_and_their_extras(name: str):
    case = family_named(name).build()
    extras = tuple(a.roll(1, 0) if i == 0 else a for i, a in enumerate(case.additional))
    rival = case.inputs[1].roll(1, 0)
    maps = ContrastiveInfoBottleneck(case.forward).attribute(
        (*case.inputs, rival), additional_forward_args=(*case.additional, *extras) or None, **FEW
    )
    for map_, given in zip(maps, (*case.inputs, rival), strict=True):
        assert map_.shape == given.shape and float(map_.min()) >= 0 and float(map_.sum()) > 0


def test_the_first_tower_runs_once_for_both_scores():
    case = clip_case()
    rival, rival_mask = rivals(case)
    model = case.roots[0]
    layers = [model.vision_model.encoder.layers[1], model.text_model.encoder.layers[1]]
    # Once for an encoder, a pass tells what embeds its tokens.
    contrast = ContrastiveInfoBottleneck(case.forward, layers)
    counts = {"image": 0, "text": 0}

    def counting(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda *_: counts.__setitem__(name, counts[name] + 1))

    counting("image", model.vision_model.encoder.layers[3])
    counting("text", model.text_model.encoder.layers[3])
    contrast.attribute(
        case.inputs[0],
        additional_forward_args=(case.inputs[1], rival, case.additional[0], rival_mask),
        **FEW,
    )
    # One recorded pass, three steps, eight draws of closed gates at once, and a pass that these are held against; the
    # captions' tower runs for each caption of the recorded pass and of the latter only.
    assert counts == {"image": 1 + 3 + 1 + 1, "text": 2 + 2}


def test_the_published_settings_are_one_call_away():
    case = clip_case()
    rival, rival_mask = rivals(case)
    contrast = ContrastiveInfoBottleneck.published(case.forward)
    assert contrast.priors == (None,) * 3 and [layer.call for layer in contrast.layers] == [None, 0, 1]
    _, record = contrast.attribute_with_record(
        (*case.inputs, rival), additional_forward_args=(case.additional[0], rival_mask), **FEW
    )
    with torch.no_grad():
        difference = case.forward(*case.inputs, *case.additional) - case.forward(
            case.inputs[0], rival, rival_mask
        ).clamp(min=0)
    for modality in record.modalities:
        torch.testing.assert_close(modality.score_before, difference, rtol=0, atol=1e-9)


def test_arguments_are_checked():
    case = clip_case()
    contrast = ContrastiveInfoBottleneck(case.forward)
    for inputs, additional in (
        (case.inputs, None),
        (case.inputs, (case.inputs[1], case.additional[0])),
        (case.inputs[0], case.inputs[1]),
    ):
        with pytest.raises(ValueError, match="inputs: expected, with additional_forward_args, a first input, a second"):
            contrast.attribute(inputs, additional_forward_args=additional)
    with pytest.raises(ValueError, match="layers: expected two"):
        ContrastiveInfoBottleneck(case.forward, [case.roots[0].vision_model.encoder.layers[1]])
