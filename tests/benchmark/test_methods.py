"""The methods that are compared: each is what its name says, on pairs and on pictures alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients, LayerAttribution, Saliency

from captum_m2ib import DualEncoder
from captum_m2ib.attr import AttentionRelevance, GradECLIP, LeGrad, NarrowingInfoBottleneck
from captum_m2ib.benchmark.adapters import Ablation, GradCAM, OcclusionWindow, OnEmbeddings, smoothed, words_in
from captum_m2ib.benchmark.faithfulness import maskable_tokens
from captum_m2ib.benchmark.methods import DEFAULT, FAMILIES, METHODS, SETTINGS_FILE, Family, Method, methods
from captum_m2ib.composition import TokenGradCam, token_baselines
from captum_m2ib.encoders.spelling import blank_token
from captum_m2ib.scenes import CHECKPOINT, token_probes


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return DualEncoder.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def pairs(encoder: DualEncoder) -> Any:
    probes = token_probes(2, 5)
    return encoder.prepare([probe.image for probe in probes], [probe.caption for probe in probes])


@pytest.mark.parametrize("name", DEFAULT)
def test_maps_have_the_inputs_shapes_and_do_not_depend_on_how_they_are_asked_for(
    name: str, encoder: DualEncoder, pairs: Any
):
    method = METHODS[name](encoder)
    additional = pairs.additional_forward_args
    image, text = method.attribute(pairs.inputs, additional_forward_args=additional)
    alone = method.attribute(pairs.inputs[0], additional_forward_args=(pairs.inputs[1], *additional))
    assert image.shape == alone.shape == pairs.inputs[0].shape and text.shape == pairs.inputs[1].shape
    assert torch.allclose(image, alone, atol=1e-4 * float(image.abs().max()), rtol=0)
    assert all(bool(part.isfinite().all()) and not part.requires_grad for part in (image, text))
    if not METHODS[name].is_floor:
        assert image.std() > 0 and text.std() > 0


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].family.seeded and name != "rise"])
def test_a_seed_changes_maps_of_methods_that_draw(name: str, encoder: DualEncoder, pairs: Any):
    method = METHODS[name](encoder)
    given = (pairs.inputs[0][:1], (pairs.inputs[1][:1], *(a[:1] for a in pairs.additional_forward_args)))
    first, again, other = (method.attribute(*given, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "name, made",
    [
        ("nib", NarrowingInfoBottleneck),
        ("grad-eclip", GradECLIP),
        ("relevance", AttentionRelevance),
        ("legrad", LeGrad),
    ],
)
def test_published_settings_are_the_methods_own(name: str, made: Any, encoder: DualEncoder, pairs: Any):
    given = (pairs.inputs, pairs.additional_forward_args)
    expected = made(encoder).attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args)
    assert all(map(torch.equal, METHODS[name](encoder).attribute(*given), expected))


def test_every_candidate_differs_from_the_published_setting_or_is_named_by_it(encoder: DualEncoder):
    for family in FAMILIES.values():
        for modality in range(2):
            settings = family.settings(encoder, modality)
            assert settings[0] == {}
            depth = len(encoder.stages(modality)[0])
            assert all(setting.get("layer", 0) < depth for setting in settings)
            assert len({json.dumps(setting) for setting in settings}) == len(settings)


def test_layers_are_chosen_per_modality(encoder: DualEncoder, pairs: Any):
    image, text = encoder.stages(0)[0], encoder.stages(1)[0]
    together = Method("x", FAMILIES["relevance"], ({"layer": 0}, {"layer": 2}))(encoder)
    expected = AttentionRelevance(encoder, layers=[image[0], text[2]])
    given = (pairs.inputs, pairs.additional_forward_args)
    wanted = expected.attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args)
    assert all(map(torch.equal, together.attribute(*given), wanted))


def test_options_that_differ_are_run_apart(encoder: DualEncoder, pairs: Any):
    given = (pairs.inputs, pairs.additional_forward_args)
    mixed = Method("x", FAMILIES["nib"], ({"layer": 3, "n_steps": 3}, {"layer": 1, "n_steps": 5}))(encoder)
    image, text = mixed.attribute(*given)
    blocks = [encoder.stages(index)[0] for index in (0, 1)]
    nib = NarrowingInfoBottleneck(encoder, layers=[blocks[0][3], blocks[1][1]])
    additional = {"additional_forward_args": pairs.additional_forward_args}
    assert torch.allclose(image, nib.attribute(pairs.inputs, n_steps=3, **additional)[0], atol=1e-6)
    assert torch.allclose(text, nib.attribute(pairs.inputs, n_steps=5, **additional)[1], atol=1e-6)


def test_integrated_gradients_of_words_sum_to_what_the_words_bring(encoder: DualEncoder, pairs: Any):
    method = OnEmbeddings(encoder, IntegratedGradients, silent=True, n_steps=48, internal_batch_size=64)
    image, text = method.attribute(pairs.inputs, pairs.additional_forward_args)
    (pixels, ids), rest = pairs.inputs, pairs.additional_forward_args
    silent = token_baselines(ids, maskable_tokens(pairs), blank_token(encoder))
    with torch.no_grad():
        whole = encoder(pixels, ids, *rest)
        without_words, grey = encoder(pixels, silent, *rest), encoder(pixels * 0, ids, *rest)
    assert torch.allclose(text.sum(1), whole - without_words, atol=2e-2)
    assert torch.allclose(image.sum((1, 2, 3)), whole - grey, atol=4e-2)


def test_magnitudes_and_smooth_maps(encoder: DualEncoder, pairs: Any):
    given = (pairs.inputs, pairs.additional_forward_args)
    plain, smooth = (OnEmbeddings(encoder, Saliency, smooth=s).attribute(*given)[0] for s in (False, True))
    assert torch.allclose(plain.sum((1, 2, 3)), smooth.sum((1, 2, 3)), rtol=1e-3)
    rows = smooth.sum(1)[:, :, 8:56].diff(dim=2).abs().mean()
    assert rows < plain.sum(1)[:, :, 8:56].diff(dim=2).abs().mean() / 5
    signed = OnEmbeddings(encoder, Saliency, abs=False).attribute(*given)
    sizes = OnEmbeddings(encoder, Saliency, magnitude=True, abs=False).attribute(*given)
    assert torch.allclose(sizes[0].sum(1), signed[0].sum(1).abs(), atol=1e-7)
    assert torch.allclose(sizes[1], signed[1].abs())


def test_smoothing_keeps_where_the_attribution_lies(encoder: DualEncoder):
    spot = torch.zeros(1, 3, 64, 64)
    spot[:, :, 19, 42] = 2.0
    spread = smoothed(encoder, spot).sum(1)
    assert spread.sum() == pytest.approx(6.0) and spread.argmax() // 64 // 8 == 2 and spread.argmax() % 64 // 8 == 5


def test_grad_cam_is_captum_s(encoder: DualEncoder, pairs: Any):
    layers = encoder.published_layers()
    image, text = GradCAM(encoder).attribute(pairs.inputs, pairs.additional_forward_args)
    cams = [
        TokenGradCam(encoder, layer)
        .attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args, relu_attributions=True)
        .detach()
        for layer in layers
    ]
    assert torch.allclose(image.sum((1, 2, 3)), cams[0].sum((1, 2, 3)), rtol=1e-4)
    wanted = LayerAttribution.interpolate(cams[0], (64, 64), "bilinear")[:, 0]
    scale = image.sum(1).amax((1, 2)) / wanted.amax((1, 2))
    assert torch.allclose(image.sum(1) / scale[:, None, None], wanted, atol=0.15 * float(wanted.max()))
    assert torch.allclose(text, cams[1][:, 0])


def test_ablation_and_occlusion_are_losses_of_score(encoder: DualEncoder, pairs: Any):
    (pixels, ids), rest = pairs.inputs, pairs.additional_forward_args
    image, text = Ablation(encoder).attribute(pairs.inputs, rest)
    occluded, words = OcclusionWindow(encoder, window=1).attribute(pairs.inputs, rest)
    grey, silent = pixels.clone(), ids.clone()
    grey[:, :, 16:24, 32:40] = 0
    silent[:, 3] = blank_token(encoder)
    with torch.no_grad():
        whole = encoder(pixels, ids, *rest)
        loss, quiet = whole - encoder(grey, ids, *rest), whole - encoder(pixels, silent, *rest)
    for maps in (image, occluded):
        assert torch.allclose(maps.sum(1)[:, 20, 36], loss, atol=1e-5)
    for tokens in (text, words):
        assert torch.allclose(tokens[:, 3], quiet, atol=1e-5)
        assert tokens[~maskable_tokens(pairs)].abs().max() < 1e-6
    assert torch.equal(words_in(encoder, ids), maskable_tokens(pairs))


def test_the_centre_prior_is_highest_in_the_middle_and_knows_no_tokens(encoder: DualEncoder):
    pixels, tokens = METHODS["centre"](encoder).attribute((torch.zeros(1, 3, 9, 15), torch.zeros(1, 4)))
    assert divmod(int(pixels[0, 0].argmax()), 15) == (4, 7) and torch.equal(tokens, torch.ones(1, 4))
    assert pixels[0, 0, 4, 7] == 1 and pixels[0, 0, 0, 7] == pytest.approx(math.exp(-2))


def test_tuned_methods_are_read_from_a_file(tmp_path: Path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"nib": {"image": {"layer": 2}, "text": {}}, "legrad": {"image": {}, "text": {}}}))
    found = methods(path)
    assert found["nib-tuned"].settings == ({"layer": 2}, {}) and found["nib"].settings == ({}, {})
    # Where the published setting is the best one, there is no second row.
    assert "legrad-tuned" not in found and list(found).index("nib-tuned") == list(found).index("nib") + 1


@pytest.mark.parametrize("text", ["", "[]", '{"nib": {}}', '{"nib": 3}', '{"nobody": {"image": {}, "text": {}}}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^--settings: .*settings.json"):
        methods(path)


def test_the_package_s_settings_are_candidates(encoder: DualEncoder):
    for name, both in json.loads(SETTINGS_FILE.read_text()).items():
        for modality, kind in enumerate(("image", "text")):
            assert both[kind] in FAMILIES[name].settings(encoder, modality)
    assert {"m2ib", "m2ib-published", "nib", "centre", "random"} <= set(DEFAULT)


def test_a_family_without_candidates_has_the_published_setting_alone(encoder: DualEncoder):
    assert Family("x", Saliency).settings(encoder, 0) == [{}]
