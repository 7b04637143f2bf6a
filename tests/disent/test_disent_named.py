"""Backbones by name: the libraries' own preparation, weights from a file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captum_m2ib.disent.named import Preparation, as_arguments, load_backbone
from captum_m2ib.disent.storage import write_tensors


def test_timm_takes_weights_from_a_file_and_prepares_as_timm_does(tmp_path: Path):
    import timm

    net = timm.create_model("resnet10t", pretrained=False)
    write_tensors(tmp_path / "net.safetensors", net.state_dict(), {})
    made = load_backbone("timm:resnet10t", weights=tmp_path / "net.safetensors")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (230, 310, 3), dtype=np.uint8))
    expected = timm.data.create_transform(**timm.data.resolve_model_data_config(net), is_training=False)(picture)
    found = made.preparation.tensor(made.preparation.crop(picture))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    with torch.no_grad():
        torch.testing.assert_close(made.module(expected[None]), net.eval()(expected[None]))
    assert not made.module.training


def test_torchvision_takes_weights_from_a_file_and_prepares_as_torchvision_does(tmp_path: Path):
    from torchvision import models

    net = models.get_model("squeezenet1_1", weights=None)
    write_tensors(tmp_path / "net.safetensors", net.state_dict(), {})
    made = load_backbone("torchvision:squeezenet1_1", weights=tmp_path / "net.safetensors")
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 260, 3), dtype=np.uint8))
    expected = models.get_model_weights("squeezenet1_1").DEFAULT.transforms()(picture)
    found = made.preparation.tensor(made.preparation.crop(picture))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_transformers_reads_a_directory(tmp_path: Path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    made = load_backbone(f"hf:{tmp_path}")
    assert made.preparation == Preparation(32, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")
    assert made.module(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)


def test_backbones_of_other_weights_have_another_digest(tmp_path: Path):
    from torchvision import models

    digests = set()
    for seed in range(2):
        torch.manual_seed(seed)
        write_tensors(tmp_path / "net.safetensors", models.get_model("squeezenet1_1").state_dict(), {})
        digests.add(load_backbone("torchvision:squeezenet1_1", weights=tmp_path / "net.safetensors").digest())
    assert len(digests) == 2


def test_weights_that_do_not_fit_are_refused(tmp_path: Path):
    write_tensors(tmp_path / "net.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"--weights: .* does not fit the backbone"):
        load_backbone("torchvision:squeezenet1_1", weights=tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="--weights: "):
        load_backbone("torchvision:squeezenet1_1", weights=tmp_path / "none.safetensors")


def test_options_are_read_as_json_or_text():
    assert as_arguments(["img_size=112", "global_pool=avg", "flags=[true]"]) == {
        "img_size": 112,
        "global_pool": "avg",
        "flags": [True],
    }


def test_the_side_keeps_the_share_that_is_cut_out(tmp_path: Path):
    from torchvision import models

    write_tensors(tmp_path / "net.safetensors", models.get_model("squeezenet1_1").state_dict(), {})
    made = load_backbone("torchvision:squeezenet1_1", weights=tmp_path / "net.safetensors", side=112)
    assert (made.preparation.side, made.preparation.resized) == (112, 128)
