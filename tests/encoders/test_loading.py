"""Checkpoint directories of the same form as on the hub: loaded, prepared, scored as the model itself does, explained.

Models are tiny and random; tokenizers and image processors are the families' own, read from the files that hub
checkpoints hold.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hub_files import (
    BERT_TOKENS,
    CHINESE,
    CLIP,
    CROPPED,
    FEW,
    IMAGENET,
    LONGEST,
    PICTURES,
    SQUARE,
    WORDS,
    Checkpoint,
    bert_tokenizer,
    gemma_tokenizer,
    of_zoo,
    processors,
    roberta_tokenizer,
    siglip_tokenizer,
    standardised,
)
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck, explain

CHECKPOINTS = [
    CLIP,
    Checkpoint(
        "siglip",
        of_zoo("siglip"),
        siglip_tokenizer,
        processors("SiglipImageProcessor", "SiglipProcessor", size=SQUARE),
        ("a", "red", "cat"),
        padding="max_length",
    ),
    Checkpoint(
        "siglip2_naflex",
        of_zoo("siglip2_naflex"),
        gemma_tokenizer,
        processors("Siglip2ImageProcessor", "Siglip2Processor", patch_size=8, max_num_patches=20),
        ("a", "▁red", "▁cat", "<eos>"),
        padding="max_length",
        size=(32, 40),
        grid=(4, 5),
    ),
    Checkpoint(
        "chinese_clip",
        of_zoo("chinese_clip"),
        partial(bert_tokenizer, words=sorted(set("".join(CHINESE)))),
        processors("ChineseCLIPImageProcessor", "ChineseCLIPProcessor", do_center_crop=False, size=SQUARE),
        ("[CLS]", "一", "只", "红", "猫", "[SEP]"),
        captions=CHINESE,
    ),
    Checkpoint(
        "altclip",
        of_zoo("altclip"),
        roberta_tokenizer,
        processors("CLIPImageProcessor", "AltCLIPProcessor", **CROPPED),
        ("<s>", "a", "red", "cat", "</s>"),
    ),
    Checkpoint(
        "blip",
        of_zoo("blip_itc"),
        bert_tokenizer,
        processors("BlipImageProcessor", "BlipProcessor", size=SQUARE),
        BERT_TOKENS,
    ),
    Checkpoint(
        "align",
        of_zoo("align"),
        bert_tokenizer,
        processors(
            "EfficientNetImageProcessor",
            "AlignProcessor",
            size={"height": 80, "width": 80},
            crop_size={"height": 64, "width": 64},
            do_center_crop=True,
            include_top=False,
        ),
        BERT_TOKENS,
        size=(64, 64),
        grid=(4, 4),
    ),
    Checkpoint(
        "vit_bert",
        of_zoo("vit_bert"),
        bert_tokenizer,
        processors("ViTImageProcessor", "VisionTextDualEncoderProcessor", size=SQUARE),
        BERT_TOKENS,
    ),
    Checkpoint(
        "convnext_bert",
        of_zoo("convnext_bert"),
        bert_tokenizer,
        processors(
            "ConvNextImageProcessor", "VisionTextDualEncoderProcessor", size={"shortest_edge": 64}, crop_pct=0.8
        ),
        BERT_TOKENS,
        size=(64, 64),
        grid=(4, 4),
    ),
]


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=[checkpoint.name for checkpoint in CHECKPOINTS])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, DualEncoder]:
    checkpoint = request.param
    return checkpoint, DualEncoder.from_pretrained(checkpoint.save(tmp_path_factory.mktemp(checkpoint.name)))


def processed(checkpoint: Checkpoint, encoder: DualEncoder) -> dict[str, Tensor]:
    """What the checkpoint's own processor makes of the pictures and captions."""
    pictures = [Image.fromarray(picture) for picture in PICTURES]
    settings = {"padding": checkpoint.padding, "max_length": LONGEST, "truncation": True, "return_tensors": "pt"}
    if checkpoint.name == "siglip2_naflex":
        settings |= {"max_num_patches": 20, "patch_size": 8}
    return dict(encoder.processor(text=checkpoint.captions, images=pictures, **settings))


def test_the_named_class_is_loaded_with_its_weights(loaded: tuple[Checkpoint, DualEncoder]):
    checkpoint, encoder = loaded
    original = checkpoint.build()
    assert type(encoder.model) is type(original) and not encoder.model.training
    for name, tensor in original.state_dict().items():
        assert torch.equal(encoder.model.state_dict()[name], tensor), name


def test_prepared_inputs_are_the_processors_own(loaded: tuple[Checkpoint, DualEncoder]):
    checkpoint, encoder = loaded
    own = processed(checkpoint, encoder)
    pairs = encoder.prepare(PICTURES, checkpoint.captions)
    arguments = zip(encoder.argument_names, (*pairs.inputs, *pairs.additional_forward_args), strict=False)
    given = {name: value for name, value in arguments if value is not None}
    assert set(given) == set(own) - {"token_type_ids"}
    for name, value in given.items():
        assert torch.equal(value, own[name]), name
    assert pairs.tokens[0][: len(checkpoint.tokens)] == checkpoint.tokens
    plain = {form.format(word) for word in WORDS for form in ("{}", "▁{}", "{}</w>")} | {*"".join(CHINESE)}
    for tokens, special in zip(pairs.tokens, pairs.special, strict=True):
        assert special == tuple(token not in plain for token in tokens)
    assert int(encoder.real_tokens(pairs)[0].sum()) == len(checkpoint.tokens)


def own_similarities(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """What the model itself computes, every picture with every caption, but for a temperature and a bias."""
    if type(model).__name__ == "BlipForImageTextRetrieval":
        return model(**given, use_itm_head=False).itm_score
    if "ConvNextModel" in (type(part).__name__ for part in model.children()):
        # The forward pass of transformers 4.57 hands this tower arguments that it refuses.
        image = model.visual_projection(model.vision_model(given.pop("pixel_values")).pooler_output)
        return normalize(image) @ normalize(model.text_projection(model.text_model(**given).pooler_output)).T
    return model(**given).logits_per_image


def test_scores_are_those_of_the_models_own_logits(loaded: tuple[Checkpoint, DualEncoder]):
    checkpoint, encoder = loaded
    count = len(PICTURES)
    pairs = encoder.prepare([p for p in PICTURES for _ in range(count)], checkpoint.captions * count)
    with torch.no_grad():
        own = own_similarities(encoder.model, processed(checkpoint, encoder))
        scores = encoder(*pairs.inputs, *pairs.additional_forward_args).view(count, count)
    torch.testing.assert_close(standardised(scores), standardised(own), rtol=0, atol=1e-3)


def test_shown_pictures_are_what_the_model_receives(loaded: tuple[Checkpoint, DualEncoder]):
    checkpoint, encoder = loaded
    pairs = encoder.prepare(PICTURES, checkpoint.captions)
    mean, std = (np.array(IMAGENET[name]) for name in ("image_mean", "image_std"))
    for index, shown in enumerate(pairs.pictures):
        pixels = pairs.inputs[0][index]
        if checkpoint.name == "siglip2_naflex":
            rows, columns = pairs.additional_forward_args[encoder.argument_names[2:].index("spatial_shapes")][index]
            patches = pixels[: rows * columns].view(int(rows), int(columns), 8, 8, 3)
            received = patches.permute(0, 2, 1, 3, 4).reshape(int(rows) * 8, int(columns) * 8, 3).numpy()
        else:
            received = pixels.permute(1, 2, 0).numpy()
        expected = Image.fromarray(shown).resize(received.shape[1::-1], Image.Resampling.BICUBIC)
        np.testing.assert_allclose((received * std + mean) * 255, np.asarray(expected), atol=5)


def test_end_to_end(loaded: tuple[Checkpoint, DualEncoder]):
    checkpoint, encoder = loaded
    pairs = encoder.prepare(PICTURES[0], checkpoint.captions[:2])
    bits = MultiModalInfoBottleneck(encoder).attribute(
        pairs.inputs, additional_forward_args=pairs.additional_forward_args, **FEW
    )
    counts = encoder.real_tokens(pairs).sum(1).tolist()
    for index, count in enumerate(counts):
        assert float(bits[1][index, :count].sum()) > 0 and not bits[1][index, count:].any()
    explanations = explain(encoder, PICTURES[0], checkpoint.captions[:2], **FEW)
    assert [len(explanation.tokens) for explanation in explanations] == counts
    first = explanations[0]
    np.testing.assert_array_equal(first.token_bits, bits[1][0, : counts[0]].numpy())
    assert first.image_bits.shape == checkpoint.size and first.patch_bits.shape == checkpoint.grid
    np.testing.assert_allclose([first.image_total_bits, first.patch_bits.sum()], float(bits[0][0].sum()), rtol=1e-4)
    assert first.image_total_bits > 0


def test_padding_before_the_words(loaded: tuple[Checkpoint, DualEncoder], monkeypatch: pytest.MonkeyPatch):
    checkpoint, encoder = loaded
    captions = sorted(checkpoint.captions[:2], key=len)
    tokenizer = encoder.processor.tokenizer
    expected = [explanation.tokens for explanation in explain(encoder, PICTURES[0], captions, **FEW)]
    monkeypatch.setattr(tokenizer, "padding_side", "left")
    explanations = explain(encoder, PICTURES[0], captions, **FEW)
    assert [explanation.tokens for explanation in explanations] == expected
    assert all(explanation.token_bits.any() for explanation in explanations)
