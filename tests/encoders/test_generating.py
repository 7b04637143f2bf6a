"""Models that generate text: the error says what is explained, and with what to go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from torch import nn

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SAYS = r"Llava\w+ generates text.* no score of a picture and a caption.* the log-odds of yes over no.*/own-model\.md"


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config={**SIZES, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
        text_config={**SIZES, "model_type": "llama", "vocab_size": 64},
        image_token_index=61,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_a_model_in_memory():
    with pytest.raises(TypeError, match=f"^model: {SAYS}"):
        DualEncoder(llava())
    with pytest.raises(ValueError, match=f"^layers: .* for a dual encoder: {SAYS}"):
        MultiModalInfoBottleneck(llava())


def test_a_model_of_words_alone():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    with pytest.raises(TypeError, match=r"^model: GPT2LMHeadModel generates text"):
        DualEncoder(transformers.GPT2LMHeadModel(config))


def test_a_checkpoint_is_refused_before_its_weights_are_read(tmp_path: Path):
    llava().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(TypeError, match=f"^model: {SAYS}"):
        DualEncoder.from_pretrained(tmp_path)


def test_its_base_model_says_the_same():
    base = llava().model
    base.config.architectures = ["LlavaForConditionalGeneration"]
    with pytest.raises(TypeError, match=f"^model: {SAYS}"):
        DualEncoder(base)
