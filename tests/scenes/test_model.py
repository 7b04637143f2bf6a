"""The compact dual encoder: tokenizer, pooled position, and an ordinary checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captum_m2ib.scenes import (
    build_model,
    build_tokenizer,
    draw_batch,
    draw_scene,
    load_checkpoint,
    save_checkpoint,
)
from captum_m2ib.scenes.captions import vocabulary
from captum_m2ib.scenes.drawing import draw_scenes, generator
from captum_m2ib.scenes.model import (
    END,
    START,
    UNKNOWN,
    embed_images,
    embed_texts,
    normalize_images,
    tokenize,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scenes") / "checkpoint"
    save_checkpoint(build_model(seed=1), directory)
    return directory


def test_one_token_per_word_and_none_unknown() -> None:
    tokenizer = build_tokenizer()
    for scene in draw_scenes(generator("scenes", 0), 300, 16):
        tokens = tokenizer.encode(scene.caption).tokens
        assert tokens == [START, *scene.words, END]
        assert len(tokens) <= 32
    assert UNKNOWN not in tokenizer.encode(" ".join(vocabulary())).tokens


def test_ordinary_spelling_gives_the_same_tokens() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.encode("A red circle, a blue star").ids == tokenizer.encode("a red circle , a blue star").ids


def test_weights_depend_on_the_seed_and_leave_the_random_state() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (build_model(seed=seed).visual_projection.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_refuses_an_image_size_that_patches_do_not_fill() -> None:
    with pytest.raises(ValueError, match=r"image_size: expected a multiple of patch_size 8, got 60"):
        build_model(image_size=60)


def test_text_is_pooled_at_the_end_token() -> None:
    model = build_model().eval()
    end = build_tokenizer().token_to_id(END)
    assert model.config.text_config.eos_token_id == end != 2
    # "white" has a higher id than <end>, and padding comes after it.
    ids = tokenize(build_tokenizer(), ["a white star", "a photo of a white star and a red ring"])
    with torch.no_grad():
        output = model.text_model(input_ids=ids)
        alone = embed_texts(model, ids[:1, :5])
    positions = (ids == end).int().argmax(dim=1)
    assert positions.tolist() == [4, 11]
    assert torch.equal(output.pooler_output, output.last_hidden_state[torch.arange(2), positions])
    assert torch.allclose(embed_texts(model, ids)[:1], alone, atol=1e-6)


def test_checkpoint_is_small_and_holds_the_usual_files(checkpoint: Path) -> None:
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert "preprocessor_config.json" in names
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 4_000_000
    assert json.loads((checkpoint / "config.json").read_text())["text_config"]["eos_token_id"] != 2


def test_round_trip(checkpoint: Path) -> None:
    model, loaded = build_model(seed=1), load_checkpoint(checkpoint)[0]
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    expected = model.state_dict()
    assert expected.keys() == loaded.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name].half().float()), name


def test_processor_prepares_what_training_feeds(checkpoint: Path) -> None:
    model, processor = load_checkpoint(checkpoint)
    images, captions, _ = draw_batch(3, 0)
    prepared = processor(
        text=captions, images=[Image.fromarray(image) for image in images], return_tensors="pt", padding=True
    )
    pixel_values, ids = normalize_images(torch.from_numpy(images)), tokenize(build_tokenizer(), captions)
    assert torch.allclose(prepared["pixel_values"], pixel_values, atol=1e-6)
    assert torch.equal(prepared["input_ids"], ids)
    with torch.no_grad():
        scores = embed_texts(model, ids) @ embed_images(model, pixel_values).T * model.logit_scale.exp()
        assert torch.allclose(model(**prepared).logits_per_text, scores, atol=1e-4)


def test_processor_takes_finer_drawings(checkpoint: Path) -> None:
    processor = load_checkpoint(checkpoint)[1]
    coarse, fine = (
        np.asarray(processor(images=Image.fromarray(draw_scene(0, size).image), return_tensors="np").pixel_values)
        for size in (64, 256)
    )
    assert coarse.shape == fine.shape == (1, 3, 64, 64)
    assert np.abs(coarse - fine).mean() < 0.02


def test_missing_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"directory: expected a checkpoint with model.safetensors"):
        load_checkpoint(tmp_path)


def test_infinite_half_weights_are_refused(tmp_path: Path) -> None:
    model = build_model()
    torch.nn.init.constant_(model.visual_projection.weight, 1e6)
    with pytest.raises(ValueError, match=r"expected finite float16 weights, .* visual_projection.weight"):
        save_checkpoint(model, tmp_path / "checkpoint")
