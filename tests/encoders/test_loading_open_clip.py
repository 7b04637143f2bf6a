"""Checkpoints of open_clip: prepared with their own tokenizer and transform, scored as the model does, explained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_files import CAPTIONS, FEW, IMAGENET, PICTURES, open_clip_directory, siglip_tokenizer
from PIL import Image

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck, explain


@pytest.fixture(scope="module", params=["clip", "siglip"])
def from_open_clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kind of text tower, the model that was saved, and what was loaded."""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "clip":
        saved = open_clip_directory(directory, {"context_length": 12, "vocab_size": 49408}, custom=False)
    else:
        siglip_tokenizer(directory)
        text = {"context_length": 12, "vocab_size": 64, "hf_tokenizer_name": "its own"}
        siglip = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
        saved = open_clip_directory(directory, {**text, **siglip}, custom=True)
    return request.param, saved, DualEncoder.from_open_clip(f"local-dir:{directory}")


OPEN_CLIP_TOKENS = {
    "clip": ("<start_of_text>", "a</w>", "red</w>", "cat</w>", "<end_of_text>"),
    "siglip": ("a", "red", "cat"),
}


def test_open_clip_prepares_with_its_own_tokenizer_and_transform(from_open_clip: Any):
    kind, saved, encoder = from_open_clip
    for name, tensor in saved.state_dict().items():
        assert torch.equal(encoder.model.state_dict()[name], tensor), name
    assert not encoder.model.training
    pairs = encoder.prepare(PICTURES, CAPTIONS)
    assert pairs.inputs[1].shape == (3, 12) and pairs.additional_forward_args == ()
    expected = OPEN_CLIP_TOKENS[kind]
    assert pairs.tokens[0][: len(expected)] == expected
    assert int(encoder.real_tokens(pairs)[0].sum()) == len(expected)
    begin = int(kind == "clip")
    words = pairs.special[0][begin : begin + 3], pairs.special[1][begin : begin + 5]
    assert not any(sum(words, ()))
    assert all(pairs.special[0][begin + 3 : len(expected)]) and all(pairs.special[0][:begin])
    received = pairs.inputs[0].permute(0, 2, 3, 1).numpy() * IMAGENET["image_std"] + IMAGENET["image_mean"]
    for pixels, shown in zip(received, pairs.pictures, strict=True):
        expected = Image.fromarray(shown).resize((32, 32), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(pixels * 255, np.asarray(expected), atol=5)
    with torch.no_grad():
        images, texts = saved.encode_image(pairs.inputs[0]), saved.encode_text(pairs.inputs[1])
        torch.testing.assert_close(encoder(*pairs.inputs), torch.cosine_similarity(images, texts))


def test_open_clip_end_to_end(from_open_clip: Any):
    kind, _, encoder = from_open_clip
    explanation, other = explain(encoder, PICTURES[0], CAPTIONS[:2], **FEW)
    assert len(explanation.tokens) == len(OPEN_CLIP_TOKENS[kind]) and len(other.tokens) == len(explanation.tokens) + 2
    assert explanation.image_bits.shape == (32, 32) and explanation.patch_bits.shape == (4, 4)
    assert explanation.image_total_bits > 0 and explanation.token_total_bits > 0
    pairs = encoder.prepare(PICTURES[0], CAPTIONS[0])
    bits = MultiModalInfoBottleneck(encoder).attribute(pairs.inputs, **FEW)[1]
    assert not bits[0, len(explanation.tokens) :].any()


def test_open_clip_that_is_missing_or_finds_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(OSError, match=r"^model: open_clip cannot load local-dir:.*nothing with weights None"):
        DualEncoder.from_open_clip(f"local-dir:{tmp_path / 'nothing'}")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"^open_clip: cannot be imported.*captum_m2ib\[open-clip\]"):
        DualEncoder.from_open_clip("ViT-B-32")
