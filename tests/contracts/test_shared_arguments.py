"""What pairs share reaches the model as it is, whatever its rows; what only looks like a row per pair is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from families import Block
from torch import Tensor, nn

from captum_m2ib import (
    RISE,
    AttentionRelevance,
    GradECLIP,
    InfoBottleneck,
    LayerMultiModalInfoBottleneck,
    LeGrad,
    MultiModalInfoBottleneck,
    NarrowingInfoBottleneck,
    PatchLayout,
    Shared,
)
from captum_m2ib.metrics.confidence import image_confidence
from captum_m2ib.metrics.curves import PerturbationCurve, deletion, insertion

PAIRS = 3


class Classifier(nn.Module):
    """The probability of each picture's class among those that it is given, by their embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.ModuleList([Block(8), Block(8)])

    def forward(self, pixels: Tensor, classes: Tensor, index: Tensor) -> Tensor:
        hidden = self.embed(pixels).flatten(2).transpose(1, 2)
        for block in self.blocks:
            hidden = block(hidden)
        logits = 5 * F.normalize(hidden.mean(1), dim=-1) @ F.normalize(classes, dim=-1).T
        return logits.softmax(-1)[torch.arange(len(pixels)), index]


def model_of() -> Classifier:
    return Classifier().double().eval()


LAYOUTS = (PatchLayout((4, 4)),)
METHODS = {
    "default": lambda f, m: partial(MultiModalInfoBottleneck(f, [m.blocks[0]], LAYOUTS).attribute, n_steps=2),
    "input": lambda f, m: partial(MultiModalInfoBottleneck(f, (None,), LAYOUTS).attribute, n_steps=2),
    "layer": lambda f, m: partial(LayerMultiModalInfoBottleneck(f, m.blocks[0]).attribute, n_steps=2),
    "IBA": lambda f, m: partial(InfoBottleneck(f, [m.blocks[0]], LAYOUTS).attribute, n_steps=2),
    "narrowing": lambda f, m: NarrowingInfoBottleneck(f, [m.blocks[0]], LAYOUTS).attribute,
    "GradECLIP": lambda f, m: GradECLIP(f, [m.blocks[1]], LAYOUTS).attribute,
    "relevance": lambda f, m: AttentionRelevance(f, [m.blocks[1]], LAYOUTS).attribute,
    "LeGrad": lambda f, m: LeGrad(f, ([*m.blocks],), LAYOUTS).attribute,
    "RISE": lambda f, m: partial(RISE(f, (None,), LAYOUTS).attribute, n_masks=6),
}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels, classes = torch.randn(PAIRS, 3, 16, 16, generator=generator), torch.randn(PAIRS, 8, generator=generator)
    return pixels.double(), classes.double(), torch.tensor([0, 2, 1])


@pytest.mark.parametrize("at_once", [None, 2])
@pytest.mark.parametrize("name", METHODS)
def test_shared_as_if_the_function_held_it(name: str, at_once: int | None):
    model, (pixels, classes, index) = model_of(), inputs()

    def held(given: Tensor, chosen: Tensor) -> Tensor:
        return model(given, classes, chosen)

    expected = METHODS[name](held, model)(pixels, additional_forward_args=(index,), internal_batch_size=at_once)
    found = METHODS[name](model, model)(
        pixels, additional_forward_args=(Shared(classes), index), internal_batch_size=at_once
    )
    assert bool(expected.any())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("at_once", [None, 2])
@pytest.mark.parametrize("name", METHODS)
def test_shared_by_all_with_a_row_for_each_by_chance(name: str, at_once: int | None):
    model, (pixels, classes, index) = model_of(), inputs()
    with pytest.raises(ValueError, match=r"captum_m2ib.Shared\(tensor\) .* additional_forward_args"):
        METHODS[name](model, model)(pixels, additional_forward_args=(classes, index), internal_batch_size=at_once)


def test_another_number_of_rows_is_told_to_be_shared():
    model, (pixels, classes, index) = model_of(), inputs()
    with pytest.raises(ValueError, match=r"additional_forward_args\[0\]: expected one entry for each of the 3 pairs"):
        METHODS["default"](model, model)(pixels, additional_forward_args=(classes[:2], index))


def test_metrics_take_what_is_shared():
    model, (pixels, classes, index) = model_of(), inputs()
    relevance = torch.rand(PAIRS, 16, 16, generator=torch.Generator().manual_seed(2))

    def held(given: Tensor, chosen: Tensor) -> Tensor:
        return model(given, classes, chosen)

    expected = deletion(held, pixels, relevance, additional_forward_args=(index,))
    found = deletion(model, pixels, relevance, additional_forward_args=(Shared(classes), index))
    torch.testing.assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("metric", [deletion, insertion, image_confidence])
def test_metrics_in_parts_refuse_what_only_looks_like_a_row_for_each(metric):
    model, (pixels, classes, index) = model_of(), inputs()
    relevance = torch.rand(PAIRS, 16, 16, generator=torch.Generator().manual_seed(2))

    def scores(given: object, **settings) -> Tensor:
        found = metric(model, pixels, relevance, additional_forward_args=(given, index), **settings)
        return found.scores if isinstance(found, PerturbationCurve) else found.masked

    whole = scores(classes)
    torch.testing.assert_close(scores(Shared(classes), internal_batch_size=2), whole)
    with pytest.raises(ValueError, match=r"argument 1 .* of shape \(3, 8\), is used by all pairs together"):
        scores(classes, internal_batch_size=2)


def test_metrics_in_parts_refuse_a_score_of_the_whole_batch():
    pixels, relevance = inputs()[0], torch.rand(PAIRS, 16, 16, generator=torch.Generator().manual_seed(2))

    def ranked(given: Tensor) -> Tensor:
        return given.flatten(1).sum(1).softmax(0)

    assert deletion(ranked, pixels, relevance).scores.shape[0] == PAIRS
    with pytest.raises(ValueError, match="changes with the other examples in the batch"):
        deletion(ranked, pixels, relevance, internal_batch_size=2)
