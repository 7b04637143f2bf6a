"""Networks that read a picture and a caption at once, through a function of one score, as two towers are explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import image_zoo
import pytest
import torch
import transformers
import zoo
from contracts_state import assert_as_found, disturb, snapshot
from families import Case, captions, pictures
from tiny_parts import SIZES

from captum_m2ib import MultiModalInfoBottleneck, PatchLayout, TextLayout

FEW = {"n_steps": 2, "n_samples": 2}
LAYOUTS = (PatchLayout((8, 8)), TextLayout(mask_argument=2))


def vilt() -> tuple[Any, Callable[..., Any], Any]:
    """A model, its score of pairs, and its table of words."""
    # All patches are read: of some, a random part would be.
    config = transformers.ViltConfig(**SIZES, image_size=32, patch_size=8, vocab_size=64, max_image_length=-1)
    model = transformers.ViltForImageAndTextRetrieval(config)

    def match(pixel_values: Any, input_ids: Any, attention_mask: Any) -> Any:
        return model(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask).logits[:, 0]

    return model, match, model.vilt.embeddings.text_embeddings


def blip_matching() -> tuple[Any, Callable[..., Any], Any]:
    """The head of BLIP that says whether two match: the log-odds."""
    model = image_zoo.blip()

    def match(pixel_values: Any, input_ids: Any, attention_mask: Any) -> Any:
        found = model(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask).itm_score
        return found[:, 1] - found[:, 0]

    return model, match, model.text_encoder.embeddings


@pytest.fixture(params=[vilt, blip_matching])
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    model, match, words = request.param()
    zoo.stir(model.eval())
    ids, mask = captions()
    return Case(match, (pictures(), ids), (mask,), ([None], [words]), [model], LAYOUTS)


def method_of(case: Case) -> MultiModalInfoBottleneck:
    return case.method(statistics=("pair", "pair"))


def test_bits_lie_on_the_picture_and_on_words_and_none_at_padding(case: Case):
    found, record = method_of(case).attribute_with_record(
        case.inputs, additional_forward_args=case.additional, check=True, **FEW
    )
    with torch.no_grad():
        own = case.forward(*case.inputs, *case.additional)
    real = case.additional[0] > 0
    assert float(own.std()) > 1e-3
    for bits, inputs, one in zip(found, case.inputs, record.modalities, strict=True):
        assert bits.shape == inputs.shape and bool((bits.flatten(1).sum(1) > 0).all())
        torch.testing.assert_close(one.score_before, own, rtol=1e-4, atol=1e-5)
        assert one.check is not None
    assert bool((found[1][real] > 0).all()) and not found[1][~real].any()


def test_a_pair_does_not_depend_on_its_batch(case: Case):
    case = case.double()
    method = method_of(case)
    whole, alone = case.attribute(method, **FEW), case.select(slice(1, 2)).attribute(method, **FEW)
    for one, of_all in zip(alone, whole, strict=True):
        assert float((one - of_all[1:2]).abs().max()) <= 1e-3 * float(one.max())


def test_the_model_is_left_as_found(case: Case):
    case.forward(*case.inputs, *case.additional)
    disturb(case)
    before = snapshot(case)
    case.attribute(method_of(case), **FEW)
    assert_as_found(case, before)
