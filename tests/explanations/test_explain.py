"""``explain``: what it gathers agrees with the method on the same pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_explanation import assert_equal

from captum_m2ib import DualEncoder, Explanation, MultiModalInfoBottleneck, explain

CAPTIONS = ["a red circle", "there is a blue square and a green ring", "a star"]
QUICK: dict[str, Any] = {"n_steps": 3, "n_samples": 4}


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint)


def picture(seed: int = 0, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


PICTURES = [picture(0), picture(1, 40, 90), picture(2)]


# Random weights may have nothing to explain.
@pytest.mark.filterwarnings("ignore::captum_m2ib.NothingToExplainWarning")
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("published", [False, True])
def test_agrees_with_the_method(encoder: DualEncoder, published: bool, joint: bool):
    method = MultiModalInfoBottleneck.published(encoder) if published else MultiModalInfoBottleneck(encoder)
    found = explain(encoder, PICTURES, CAPTIONS, method=method, joint=joint, seed=3, **QUICK)
    pairs = encoder.prepare(PICTURES, CAPTIONS)
    additional = pairs.additional_forward_args
    image, text = method.attribute(pairs.inputs, additional_forward_args=additional, joint=joint, seed=3, **QUICK)
    scores = encoder(*pairs.inputs, *additional).detach()
    assert len(found) == 3 and all(isinstance(one, Explanation) for one in found)
    for i, one in enumerate(found):
        count = len(one.tokens)
        assert one.image_bits.shape == (64, 64) and one.patch_bits.shape == (8, 8)
        assert one.token_bits.shape == (count,) == (len(CAPTIONS[i].split()) + 2,)
        np.testing.assert_allclose(one.image_bits, image[i].sum(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(one.token_bits, text[i, :count], rtol=1e-5, atol=1e-7)
        assert not text[i, count:].any()
        assert one.image_total_bits == pytest.approx(float(image[i].double().sum()), rel=1e-5)
        assert one.token_total_bits == pytest.approx(float(text[i].double().sum()), rel=1e-5)
        # Spread smoothly over pixels, so only the whole is the same.
        assert one.image_total_bits == pytest.approx(float(one.patch_bits.sum(dtype=np.float64)), rel=1e-5)
        assert one.score == pytest.approx(float(scores[i]), abs=1e-6)
        assert one.caption == CAPTIONS[i]
        np.testing.assert_array_equal(one.image, pairs.pictures[i])


def test_padding_is_dropped_and_special_tokens_are_marked(encoder: DualEncoder):
    for one, caption in zip(explain(encoder, PICTURES, CAPTIONS, **QUICK), CAPTIONS, strict=True):
        words = caption.split()
        assert list(one.tokens[1:-1]) == words and len(one.tokens) == len(words) + 2
        assert one.special == (True, *[False] * len(words), True)
        assert [token for token, _ in one.top_tokens(99)] != [] and len(one.top_tokens(99)) == len(words)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_unknown_word_is_part_of_the_caption(encoder: DualEncoder):
    (one,) = explain(encoder, picture(), "a crimson circle", **QUICK)
    assert one.special == (True, False, False, False, True) and len(one.top_tokens()) == 3


def test_a_batch_is_its_pairs(encoder: DualEncoder):
    together = explain(encoder, PICTURES, CAPTIONS, **QUICK)
    for i, one in enumerate(together):
        (alone,) = explain(encoder, PICTURES[i], CAPTIONS[i], **QUICK)
        assert (alone.tokens, alone.special) == (one.tokens, one.special)
        np.testing.assert_allclose(alone.image_bits, one.image_bits, rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(alone.token_bits, one.token_bits, rtol=2e-3, atol=1e-5)
        assert alone.score == pytest.approx(one.score, abs=1e-5)


def test_one_picture_with_several_captions_and_the_other_way(encoder: DualEncoder):
    several = explain(encoder, picture(), CAPTIONS, **QUICK)
    repeated = explain(encoder, [picture()] * 3, CAPTIONS, **QUICK)
    assert [one.caption for one in several] == CAPTIONS
    for first, second in zip(several, repeated, strict=True):
        assert_equal(first, second)
    several = explain(encoder, PICTURES, CAPTIONS[0], **QUICK)
    assert [one.caption for one in several] == [CAPTIONS[0]] * 3
    assert not np.array_equal(several[0].image_bits, several[2].image_bits)


def test_pictures_in_every_form(encoder: DualEncoder, tmp_path: Path):
    path = tmp_path / "picture.png"
    Image.fromarray(picture()).save(path)
    (expected,) = explain(encoder, picture(), CAPTIONS[0], **QUICK)
    for form in (path, str(path), Image.fromarray(picture()), [picture()], picture()[None]):
        (found,) = explain(encoder, form, [CAPTIONS[0]], **QUICK)
        assert_equal(found, expected)


def test_rows_in_one_pass_change_nothing(encoder: DualEncoder):
    expected = explain(encoder, PICTURES, CAPTIONS, internal_batch_size=None, **QUICK)
    for size in (1, 5):
        for one, other in zip(
            expected, explain(encoder, PICTURES, CAPTIONS, internal_batch_size=size, **QUICK), strict=True
        ):
            np.testing.assert_allclose(one.image_bits, other.image_bits, rtol=2e-3, atol=1e-5)
            np.testing.assert_allclose(one.token_bits, other.token_bits, rtol=2e-3, atol=1e-5)


def test_settings_say_how_it_was_made(encoder: DualEncoder):
    (plain,) = explain(encoder, picture(), CAPTIONS[0], **QUICK)
    assert plain.settings["method"] == "MultiModalInfoBottleneck"
    assert plain.settings["layers"] == ["inputs[0]", "text_model.embeddings"]
    assert plain.settings["priors"] == ["pair", "standardised"]
    assert plain.settings["internal_batch_size"] is None
    method = MultiModalInfoBottleneck.published(encoder)
    given = {"beta": (0.1, 0.2), "variance": 2.0, "lr": 0.5, "seed": 9, "joint": True, **QUICK}
    (one,) = explain(encoder, picture(), CAPTIONS[0], method=method, internal_batch_size=7, **given)
    assert one.settings["layers"] == ["vision_model.encoder.layers.1", "text_model.encoder.layers.0"]
    assert one.settings["priors"] == ["N(0, variance)"] * 2 and one.settings["internal_batch_size"] == 7
    expected = {**given, "beta": [0.1, 0.2], "variance": [2.0, 2.0], "lr": [0.5, 0.5]}
    expected |= {name: [value] * 2 for name, value in QUICK.items()}
    assert {name: one.settings[name] for name in given} == expected
    assert plain.settings["beta"] == [0.6, 3.0]
    assert json.loads(json.dumps(one.settings)) == one.settings


@pytest.mark.parametrize(
    "setting", [{"seed": np.int64(3)}, {"beta": np.float32(0.5)}, {"n_steps": np.int64(2)}], ids=lambda s: next(iter(s))
)
def test_numbers_of_numpy_are_numbers(encoder: DualEncoder, setting: dict[str, Any]):
    (name, value), settings = next(iter(setting.items())), {**QUICK, **setting}
    (one,) = explain(encoder, picture(), CAPTIONS[0], **settings)
    (same,) = explain(encoder, picture(), CAPTIONS[0], **{**QUICK, name: value.item()})
    assert one.settings[name] == same.settings[name]
    np.testing.assert_array_equal(one.image_bits, same.image_bits)


def test_record_holds_the_course_of_the_optimisation(encoder: DualEncoder):
    pairs = encoder.prepare(PICTURES, CAPTIONS)
    _, expected = MultiModalInfoBottleneck(encoder).attribute_with_record(
        pairs.inputs, additional_forward_args=pairs.additional_forward_args, **QUICK
    )
    for i, one in enumerate(explain(encoder, PICTURES, CAPTIONS, **QUICK)):
        assert set(one.record) == {"image", "text"}
        for part, record in zip((one.record["image"], one.record["text"]), expected.modalities, strict=True):
            assert set(part) == {"layer", "score", "information", "bits", "score_before", "score_after"}
            assert part["layer"] == record.layer
            assert len(part["score"]) == len(part["information"]) == QUICK["n_steps"]
            assert part["score"] == pytest.approx(record.score[:, i].tolist(), abs=1e-5)
            assert part["information"] == pytest.approx(record.information[:, i].tolist(), rel=1e-4)
            assert part["score_after"] == pytest.approx(float(record.score_after[i]), abs=1e-5)
            assert part["score_before"] == one.score
        units = expected.modalities[0].units[i]
        np.testing.assert_allclose(one.image_bits, units, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(
            one.patch_bits, units.unflatten(1, (8, 8)).unflatten(0, (8, 8)).sum((1, 3)), rtol=1e-5
        )
        assert one.record["image"]["bits"] == pytest.approx(one.image_total_bits, rel=1e-5)
        assert one.record["text"]["bits"] == pytest.approx(one.token_total_bits, rel=1e-5)


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_saved_and_loaded(encoder: DualEncoder, tmp_path: Path, suffix: str):
    for index, one in enumerate(explain(encoder, PICTURES, CAPTIONS, beta=(0.1, 0.2), **QUICK)):
        assert_equal(Explanation.load(one.save(tmp_path / f"{index}{suffix}")), one)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_shown(encoder: DualEncoder, tmp_path: Path, suffix: str):
    (one,) = explain(encoder, picture(), CAPTIONS[1], **QUICK)
    assert one.save(tmp_path / f"pair{suffix}").stat().st_size > 1000


def test_half_precision(checkpoint: Path):
    half = DualEncoder.from_pretrained(checkpoint, torch_dtype=torch.bfloat16)
    (one,) = explain(half, picture(), CAPTIONS[0], **QUICK)
    assert one.image_bits.dtype == one.token_bits.dtype == np.float32 and np.isfinite(one.score)


def test_model_and_random_state_are_left_as_found(encoder: DualEncoder):
    torch.manual_seed(5)
    state, before = torch.get_rng_state(), {n: t.clone() for n, t in encoder.state_dict().items()}
    explain(encoder, picture(), CAPTIONS[0], **QUICK)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())


@pytest.mark.parametrize(
    ("images", "captions", "settings", "message"),
    [
        (picture(), "", {}, r"^captions\[0\]: expected a caption"),
        (picture(), [], {}, r"^captions: expected at least one"),
        ([], "a star", {}, r"^images: expected at least one"),
        ([picture(), "none.png"], "a star", {}, r"^images\[1\]: there is no file none.png"),
        (PICTURES, CAPTIONS[:2], {}, r"^captions: expected one per picture"),
        (picture(), "a star", {"n_steps": 0}, r"^n_steps: "),
        (picture(), "a star", {"seed": -1}, r"^seed: "),
        (picture(), "a star", {"internal_batch_size": 0}, r"^internal_batch_size: "),
    ],
)
def test_bad_input(encoder: DualEncoder, images: Any, captions: Any, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        explain(encoder, images, captions, **settings)


def test_an_unknown_setting(encoder: DualEncoder):
    with pytest.raises(TypeError, match="n_step"):
        explain(encoder, picture(), "a star", n_step=3)
