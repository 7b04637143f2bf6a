"""A dual encoder's zero-shot decisions from its patches, and channels named by captions."""

from __future__ import annotations

import pytest
import torch

from captum_m2ib import DualEncoder
from captum_m2ib.disent import InfoDisentAttribution, ZeroShotInfoDisent, name_concepts, similarities
from captum_m2ib.scenes import CHECKPOINT, draw_batch
from captum_m2ib.scenes.model import normalize_images

CAPTIONS = ["a photo of a star", "a photo of a ring", "a photo of a heart"]


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return DualEncoder.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.from_numpy(draw_batch(160, 0, 64, purpose="validation", index=7).images)


@pytest.fixture(scope="module")
def model(encoder, pictures) -> ZeroShotInfoDisent:
    made = ZeroShotInfoDisent(encoder, CAPTIONS)
    made.fit(list(normalize_images(pictures[:120]).split(40)), epochs=12, lr=2e-2)
    return made


def test_similarities_are_the_encoders(encoder, pictures):
    found = similarities(encoder, list(normalize_images(pictures[:7]).split(3)), CAPTIONS)
    for column, caption in enumerate(CAPTIONS):
        pairs = encoder.prepare(list(pictures[:7].numpy()), caption)
        expected = encoder(*pairs.inputs, *pairs.additional_forward_args).detach()
        torch.testing.assert_close(found[:, column], expected, atol=1e-5, rtol=1e-4)


def test_it_learns_the_encoders_decisions(model, encoder, pictures):
    images = normalize_images(pictures[120:])
    wanted = similarities(encoder, [images], CAPTIONS)
    assert float((model(images).argmax(1) == wanted.argmax(1)).float().mean()) > 0.6
    assert model.class_names == tuple(CAPTIONS) and model.head.channels == 96
    labelled = model.labelled([images])
    torch.testing.assert_close(labelled.labels, (model.logit_scale * wanted).softmax(1))
    assert model.logit_scale == pytest.approx(float(encoder.model.logit_scale.detach().exp()))


def test_maps_are_in_the_pictures_shape(model, pictures):
    images = normalize_images(pictures[:3])
    found = InfoDisentAttribution(model).attribute(images, target=1)
    assert found.shape == images.shape
    torch.testing.assert_close(found.sum((1, 2, 3)), model(images)[:, 1].detach(), atol=1e-4, rtol=1e-4)


def test_the_encoder_is_held_and_left_as_found(model, encoder):
    assert all("encoder" not in name for name, _ in model.named_parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in encoder.parameters())
    assert not encoder.training


def test_names_are_the_captions_that_correlate(model, encoder, pictures):
    loader = list(normalize_images(pictures).split(40))
    candidates = [f"a photo of a {colour} {shape}" for colour in ("red", "blue") for shape in ("star", "ring")]
    found = name_concepts(model, encoder, loader, candidates, per_half=2)
    evidence = model.evidence(loader)
    scores = similarities(encoder, loader, candidates)
    for channel, side, sign in ((0, 0, 1), (5, 1, -1), (95, 0, 1)):
        stacked = torch.cat([evidence[:, channel, side][None], scores.T])
        correlation = torch.corrcoef(stacked.double())[0, 1:]
        order = correlation.argsort(descending=True)[:2].tolist()
        listed = found.of(channel, sign)
        assert [caption for caption, _ in listed] == [candidates[index] for index in order]
        assert [value for _, value in listed] == pytest.approx(correlation[order].tolist(), abs=1e-5)
    # Channels that were found without any caption follow captions well beyond what chance allows on 160 pictures.
    assert float(found.correlation[..., 0].max()) > 0.5


def test_halves_that_never_vary_correlate_with_nothing(model, encoder, pictures):
    image = normalize_images(pictures[:1]).expand(4, -1, -1, -1)
    found = name_concepts(model, encoder, [image], CAPTIONS)
    assert float(found.correlation.abs().max()) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, encoder: ZeroShotInfoDisent(encoder, []), r"^captions: expected a sequence of captions"),
        (lambda model, encoder: ZeroShotInfoDisent(encoder, "a star"), r"^captions: expected a sequence"),
        (lambda model, encoder: ZeroShotInfoDisent(encoder, CAPTIONS, logit_scale=0), r"^logit_scale: expected"),
        (lambda model, encoder: ZeroShotInfoDisent(encoder, CAPTIONS, layer="blocks.9"), r"^layers: no layer named"),
        (lambda model, encoder: model.fit([]), r"^loader: expected at least one batch"),
        (lambda model, encoder: similarities(encoder, [], CAPTIONS), r"^loader: expected at least one batch"),
        (
            lambda model, encoder: name_concepts(model, encoder, [torch.zeros(1, 3, 64, 64)], CAPTIONS),
            r"^loader: expected at least 2 pictures",
        ),
        (
            lambda model, encoder: name_concepts(model, encoder, [torch.zeros(1, 3, 64, 64)], CAPTIONS, per_half=0),
            r"^per_half: expected",
        ),
    ],
)
def test_bad_input_is_named(model, encoder, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, encoder)
