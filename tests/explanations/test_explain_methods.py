"""Any attribution method makes an explanation: its own maps, its unit and sign, and a check that can tell."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from captum_m2ib import (
    DualEncoder,
    Explanation,
    GradECLIP,
    MultiModalInfoBottleneck,
    NarrowingInfoBottleneck,
    PairInteraction,
    PatchLayout,
    explain,
)
from captum_m2ib.attr.registry import METHODS, method_named
from captum_m2ib.composition import EmbeddingForward, TokenGradCam, feature_masks
from captum_m2ib.engine.layouts import TextLayout
from captum_m2ib.scenes import CHECKPOINT, image_probes, load_checkpoint, token_probes

PROBES = image_probes(2, seed=5)
PICTURES, CAPTIONS = [probe.image for probe in PROBES], [probe.caption for probe in PROBES]
FEWER: dict[str, dict[str, Any]] = {
    "m2ib": {"n_steps": 2, "n_samples": 2},
    "m2ib-published": {"n_steps": 2, "n_samples": 2},
    "rise": {"n_masks": 16},
    "nib": {"n_steps": 2},
}


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return DualEncoder.from_pretrained(CHECKPOINT)


def agrees(found: list[Explanation], image: Tensor, tokens: Tensor, encoder: DualEncoder) -> None:
    pairs = encoder.prepare(PICTURES, CAPTIONS)
    scores = encoder(*pairs.inputs, *pairs.additional_forward_args).detach()
    for index, one in enumerate(found):
        count = len(one.tokens)
        np.testing.assert_allclose(one.image_bits, image[index].detach().sum(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(one.token_bits, tokens[index, :count].detach(), rtol=1e-4, atol=1e-6)
        assert one.patch_bits.shape == (8, 8)
        assert one.patch_bits.sum() == pytest.approx(one.image_total_bits, rel=1e-3, abs=1e-4)
        assert one.score == pytest.approx(float(scores[index]), abs=1e-5)


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if not one.late_only])
def test_every_method_by_its_name(name: str, encoder: DualEncoder, tmp_path: Path):
    settings = FEWER.get(name, {})
    found = explain(encoder, PICTURES, CAPTIONS, method=name, internal_batch_size=None, **settings)
    pairs = encoder.prepare(PICTURES, CAPTIONS)
    method = method_named(name, encoder)
    maps = method.attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args, **settings)
    agrees(found, *maps, encoder)
    for one in found:
        assert one.settings["method"] == type(method).__name__ and len(one.settings["layers"]) == 2
        assert (one.record is None) == (one.unit != "bits") == (not name.startswith("m2ib"))
        assert one.check["verdict"] in ("holds", "weak", "fails")
        assert (one.check["image"]["kept"] is None) == (one.unit != "bits")
        assert len(one.check_lines) == 2
        for suffix in (".json", ".npz", ".png", ".html"):
            assert one.save(tmp_path / f"pair{suffix}").stat().st_size > 1000
        assert (
            Explanation.load(tmp_path / "pair.json").check == Explanation.load(tmp_path / "pair.npz").check == one.check
        )


def test_a_method_that_was_made(encoder: DualEncoder):
    by_name = explain(encoder, PICTURES[0], CAPTIONS[0], method="grad-eclip")[0]
    made = explain(encoder, PICTURES[0], CAPTIONS[0], method=GradECLIP(encoder))[0]
    np.testing.assert_array_equal(made.image_bits, by_name.image_bits)
    np.testing.assert_array_equal(made.token_bits, by_name.token_bits)
    assert made.unit == "relative" and made.settings == by_name.settings and made.check == by_name.check


@pytest.mark.parametrize("name", ["IntegratedGradients", "InputXGradient", "Saliency"])
def test_gradient_methods_of_captum_on_embeddings(name: str, encoder: DualEncoder):
    forward = EmbeddingForward(encoder)
    method = getattr(captum.attr, name)(forward)
    settings = {"n_steps": 4} if name == "IntegratedGradients" else {}
    found = explain(encoder, PICTURES, CAPTIONS, method=method, internal_batch_size=None, **settings)
    pairs = encoder.prepare(PICTURES, CAPTIONS)
    inputs, additional = forward.embedded(pairs.inputs, pairs.additional_forward_args)
    given = tuple(tensor.requires_grad_() for tensor in inputs)
    image, tokens = method.attribute(given, additional_forward_args=additional, **settings)
    agrees(found, image, tokens.sum(-1), encoder)
    for one in found:
        assert one.unit == ("relative" if name == "Saliency" else "score")
        assert (one.image_bits < 0).any() == (name != "Saliency")
        assert one.record is None and one.check is not None


def test_shares_of_the_score_sum_to_what_it_gains(encoder: DualEncoder):
    forward = EmbeddingForward(encoder)
    settings = {"method": captum.attr.IntegratedGradients(forward), "n_steps": 100, "check": False}
    (one,) = explain(encoder, PICTURES[0], CAPTIONS[0], internal_batch_size=None, **settings)
    pairs = encoder.prepare(PICTURES[0], CAPTIONS[0])
    inputs, additional = forward.embedded(pairs.inputs, pairs.additional_forward_args)
    with torch.no_grad():
        nothing = float(forward(*(torch.zeros_like(tensor) for tensor in inputs), *additional))
    assert one.unit == "score" and one.image_total_bits + one.token_total_bits == pytest.approx(
        one.score - nothing, abs=0.03
    )


def test_perturbations_of_captum(encoder: DualEncoder):
    pairs = encoder.prepare(PICTURES, CAPTIONS)
    masks = feature_masks(encoder.layouts, pairs.inputs, pairs.additional_forward_args, ~torch.tensor(pairs.special))
    settings = {"baselines": (0, 1), "feature_mask": masks, "perturbations_per_eval": 8}
    found = explain(encoder, PICTURES, CAPTIONS, method=captum.attr.FeatureAblation(encoder), **settings)
    expected = captum.attr.FeatureAblation(encoder).attribute(
        pairs.inputs, additional_forward_args=pairs.additional_forward_args, **settings
    )
    agrees(found, *expected, encoder)
    # What JSON cannot hold is named.
    assert found[0].settings["feature_mask"] == "tuple" and found[0].settings["perturbations_per_eval"] == 8


def test_one_method_for_each_side(encoder: DualEncoder):
    image_layer, text_layer = encoder.published_layers()
    both = TokenGradCam(encoder, image_layer), TokenGradCam(encoder, text_layer)
    found = explain(encoder, PICTURES, CAPTIONS, method=both)
    pairs = encoder.prepare(PICTURES, CAPTIONS)
    grid, tokens = (
        one.attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args).detach() for one in both
    )
    for index, one in enumerate(found):
        np.testing.assert_allclose(one.patch_bits, grid[index, 0], rtol=0.4, atol=0.3 * float(grid.abs().max()))
        assert one.image_total_bits == pytest.approx(float(grid[index].sum()), rel=1e-3, abs=1e-5)
        np.testing.assert_allclose(one.token_bits, tokens[index, 0, : len(one.tokens)], rtol=1e-5)
        assert one.settings["method"] == "TokenGradCam" and one.unit == "relative"
    mixed = explain(encoder, PICTURES[0], CAPTIONS[0], method=(both[0], NarrowingInfoBottleneck(encoder)))[0]
    assert mixed.settings["method"] == ["TokenGradCam", "NarrowingInfoBottleneck"] and mixed.unit == "relative"


class Given:
    """A method that says what it is told."""

    def __init__(self, image: Tensor, tokens: Tensor) -> None:
        self.found = image, tokens

    def attribute(self, inputs: Any, additional_forward_args: Any = None) -> Any:
        return self.found


def test_the_check_tells_a_map_on_the_truth_from_one_off_it(encoder: DualEncoder):
    pictures, captions = image_probes(8, seed=9), token_probes(8, seed=9)
    pairs = encoder.prepare([probe.image for probe in pictures], [probe.caption for probe in pictures])
    truth = torch.stack([torch.from_numpy(probe.mask) for probe in pictures]).float()
    words = torch.zeros(pairs.inputs[1].shape)
    for right, verdict, least in ((truth, "holds", 6), (1 - truth, "fails", 7)):
        image = right.unsqueeze(1).expand(pairs.inputs[0].shape) / 3
        found = explain(encoder, [p.image for p in pictures], [p.caption for p in pictures], method=Given(image, words))
        verdicts = [one.check["image"]["verdict"] for one in found]
        assert verdicts.count(verdict) >= least, verdicts
    pairs = encoder.prepare([probe.image for probe in captions], [probe.caption for probe in captions])
    there, absent = torch.zeros(pairs.inputs[1].shape), torch.zeros(pairs.inputs[1].shape)
    for row, probe in enumerate(captions):
        there[row, [word + 1 for word in probe.present_words]] = 1.0
        absent[row, 1 : 1 + len(probe.scene.words)] = 1.0
        absent[row] -= there[row]
    for words, verdict, least in ((there, "holds", 6), (absent, "fails", 7)):
        given = Given(torch.zeros(pairs.inputs[0].shape), words)
        found = explain(encoder, [p.image for p in captions], [p.caption for p in captions], method=given)
        verdicts = [one.check["text"]["verdict"] for one in found]
        assert verdicts.count(verdict) >= least, verdicts


def test_rows_in_one_pass_change_no_check(encoder: DualEncoder):
    whole, parts = (
        explain(encoder, PICTURES, CAPTIONS, method="legrad", internal_batch_size=size) for size in (None, 3)
    )
    for one, other in zip(whole, parts, strict=True):
        assert one.check["verdict"] == other.check["verdict"]
        for name in ("image", "text"):
            assert one.check[name]["lost_top"] == pytest.approx(other.check[name]["lost_top"], abs=1e-3)


def test_packed_patches():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.Siglip2Config(
        vision_config={**sizes, "patch_size": 8, "num_patches": 16},
        text_config={**sizes, "vocab_size": 48, "max_position_embeddings": 32, "projection_size": 32},
    )
    images = getattr(transformers, "Siglip2ImageProcessorPil", transformers.Siglip2ImageProcessor)
    processor = SimpleNamespace(
        tokenizer=load_checkpoint(CHECKPOINT)[1].tokenizer, image_processor=images(patch_size=8, max_num_patches=16)
    )
    torch.manual_seed(0)
    encoder = DualEncoder(transformers.Siglip2Model(config).eval(), processor=processor)
    wide = np.tile(PICTURES[0], (1, 2, 1))
    (one,) = explain(encoder, wide, CAPTIONS[0], method="nib")
    pairs = encoder.prepare(wide, CAPTIONS[0])
    image, _ = NarrowingInfoBottleneck(encoder).attribute(
        pairs.inputs, additional_forward_args=pairs.additional_forward_args
    )
    rows, columns = one.patch_bits.shape
    assert columns > rows and one.image_bits.shape == (rows * 8, columns * 8)
    np.testing.assert_allclose(one.patch_bits.ravel(), image[0].sum(-1)[: rows * columns], rtol=1e-4, atol=1e-7)
    assert one.check["image"]["lost_random"] != one.check["image"]["lost_top"]


class Pixels(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(2).mean(-1)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(100, 3))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.table[ids].mean(1)


def test_a_check_that_cannot_be_made_is_left_out_with_a_warning():
    layouts = (PatchLayout((16, 16)), TextLayout())
    encoder = DualEncoder(Pixels(), Words(), layouts=layouts, processor=load_checkpoint(CHECKPOINT)[1]).eval()
    pairs = encoder.prepare(PICTURES[0], CAPTIONS[0])
    method = Given(torch.ones(pairs.inputs[0].shape), torch.ones(pairs.inputs[1].shape))
    with pytest.warns(
        UserWarning, match=r"^check: left out, for it needs layers with a layout \(layers: found no table"
    ):
        (one,) = explain(encoder, PICTURES[0], CAPTIONS[0], method=method)
    assert one.check is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(encoder, PICTURES[0], CAPTIONS[0], method=method, check=False)


SHAPE = (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("legard", ValueError, r"^method: expected one of m2ib, .*, got 'legard'"),
        (3, TypeError, r"^method: expected a name, an object with attribute\(.*\), or two of them.*got int"),
        ((3, 4), TypeError, r"^method: expected a name"),
        (
            Given(torch.ones(1, 3, 8, 8), torch.ones(1, 6)),
            ValueError,
            r"^method: expected Given .* of shape \(1, 3, 64",
        ),
        (Given(torch.ones(SHAPE), torch.ones(1, 99)), ValueError, r"^method: expected Given .* map of the caption"),
        (PairInteraction, ValueError, r"^method: expected PairInteraction to return a map of the picture of shape"),
        (
            captum.attr.IntegratedGradients,
            ValueError,
            r"^method: IntegratedGradients takes the gradient of every input, and token ids have none; make it of "
            r"captum_m2ib.composition.EmbeddingForward\(encoder\)",
        ),
    ],
)
def test_what_is_no_method_of_pairs(method: Any, error: type[Exception], message: str, encoder: DualEncoder):
    made = method(encoder) if isinstance(method, type) else method
    with pytest.raises(error, match=message):
        explain(encoder, PICTURES[0], CAPTIONS[0], method=made)


@pytest.mark.parametrize("view", [lambda other: GradECLIP(other), lambda other: GradECLIP(other.model)])
def test_a_method_of_another_model_is_refused(view: Any, encoder: DualEncoder):
    other = DualEncoder.from_pretrained(CHECKPOINT)
    ablation = captum.attr.Saliency(EmbeddingForward(other))
    for method in (view(other), (GradECLIP(encoder), ablation), MultiModalInfoBottleneck(other)):
        with pytest.raises(ValueError, match=r"^method: \w+ was made of another model than the encoder; make it of"):
            explain(encoder, PICTURES[0], CAPTIONS[0], method=method)
    # A model that was not wrapped yet is the same model.
    assert explain(encoder, PICTURES[0], CAPTIONS[0], method=GradECLIP(encoder.model), check=False)


def test_a_setting_that_a_method_does_not_take(encoder: DualEncoder):
    with pytest.raises(TypeError, match="beta"):
        explain(encoder, PICTURES[0], CAPTIONS[0], method="legrad", beta=3.0)
