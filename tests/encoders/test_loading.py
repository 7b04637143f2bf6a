"""Checkpoint directories of the same form as on the hub: loaded, prepared, scored as the model itself does, explained.

Models are tiny and random; tokenizers and image processors are the families' own, read from the files that hub
checkpoints hold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from families import tiny_clip
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck, Sound, explain

FEW = {"n_steps": 2, "n_samples": 2}
LONGEST = 16
CAPTIONS = ["a red cat", "the dog on the mat", "a cat and a dog"]
WORDS = ["a", "red", "cat", "the", "dog", "on", "mat", "and"]
IMAGENET = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.25, 0.2]}
SQUARE = {"height": 32, "width": 32}
CROPPED = {"do_center_crop": True, "size": {"shortest_edge": 40}, "crop_size": SQUARE}


def gradient(width: int, height: int, blue: int) -> np.ndarray:
    """A picture whose red tells the column and whose green tells the row."""
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([columns, rows, np.full_like(rows, blue)], -1).astype(np.uint8)


PICTURES = [gradient(60, 40, 30), gradient(48, 96, 200), gradient(64, 64, 120)]


# Tokenizers, as the files that a checkpoint directory holds.


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def clip_tokenizer(directory: Path) -> None:
    """CLIP's byte pairs; what pads has the id of the end token."""
    ids: dict[str, int] = {}
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        ids.update(dict.fromkeys(pieces, 0))
        while len(pieces) > 1:
            merges.append(f"{pieces[-2]} {pieces[-1]}")
            pieces[-2:] = [pieces[-2] + pieces[-1]]
            ids[pieces[-1]] = 0
    ids = {token: index for index, token in enumerate(ids, 3)} | {"<|startoftext|>": 62, "<|endoftext|>": 63}
    write_json(directory / "vocab.json", ids)
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    end = {"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "model_max_length": 77, **end}
    write_json(directory / "tokenizer_config.json", settings)


def bert_tokenizer(directory: Path, words: Sequence[str] = WORDS) -> None:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (directory / "vocab.txt").write_text("\n".join([*specials, *words]) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    write_json(directory / "tokenizer_config.json", settings)


def gemma_tokenizer(directory: Path) -> None:
    """SigLIP 2's pieces with their spaces; its padding has an id that the model's configuration does not know."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.normalizers import Replace
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "▁"]
    merges = []
    for word in WORDS:
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
        pieces += [*word, *(word[: end + 1] for end in range(len(word))), "▁" + word]
    merges += [("▁", word) for word in WORDS]
    ids = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(BPE(ids, list(dict.fromkeys(merges)), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = Replace(" ", "▁")
    tokenizer.pre_tokenizer = Split(" ", "merged_with_previous")
    tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", ids["<eos>"])])
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    settings = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right", "do_lower_case": True}
    common = {"tokenizer_class": "GemmaTokenizer", "model_input_names": ["input_ids"]}
    write_json(directory / "tokenizer_config.json", {**common, **settings, **names})


def word_tokenizer(directory: Path, specials: Sequence[str], template: str, **settings: Any) -> None:
    """A tokenizer of whole words in a ``tokenizer.json``; special tokens have the first ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    ids = {token: index for index, token in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    used = [(token, ids[token]) for token in template.split() if token in specials]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=used)
    tokenizer.save(str(directory / "tokenizer.json"))
    common = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "padding_side": "right"}
    write_json(directory / "tokenizer_config.json", {**common, **settings})


# SigLIP pads with its end token.
siglip_tokenizer = partial(
    word_tokenizer,
    specials=("<unk>", "</s>"),
    template="$A </s>",
    eos_token="</s>",
    pad_token="</s>",
    model_input_names=["input_ids"],
)
roberta_tokenizer = partial(
    word_tokenizer,
    specials=("<s>", "<pad>", "</s>", "<unk>"),
    template="<s> $A </s>",
    bos_token="<s>",
    eos_token="</s>",
    pad_token="<pad>",
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint directory is made of, and how its first caption is read."""

    name: str
    build: Callable[[], nn.Module]
    tokenizer: Callable[[Path], None]
    processor: dict[str, Any]
    tokens: tuple[str, ...]
    padding: str = "longest"
    captions: list[str] = field(default_factory=lambda: CAPTIONS)
    size: tuple[int, ...] = (32, 32)
    grid: tuple[int, int] = (4, 4)

    def save(self, directory: Path) -> Path:
        self.build().save_pretrained(directory)
        self.tokenizer(directory)
        write_json(directory / "preprocessor_config.json", {**IMAGENET, **self.processor})
        return directory


def of_zoo(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = zoo.encoder_of(zoo.model_named(name)).model
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        for table in tables:
            # Some models are loaded with nothing at the row of padding, whatever the file holds.
            table.weight.data[[] if table.padding_idx is None else table.padding_idx] = 0
        return model

    return build


def processors(image: str, whole: str, **settings: Any) -> dict[str, Any]:
    return {"image_processor_type": image, "processor_class": whole, "do_resize": True, "resample": 3, **settings}


BERT_TOKENS = ("[CLS]", "a", "red", "cat", "[SEP]")
CHINESE = ["一只红猫", "狗在垫子上", "猫和狗"]

CHECKPOINTS = [
    Checkpoint(
        "clip",
        tiny_clip,
        clip_tokenizer,
        processors("CLIPImageProcessor", "CLIPProcessor", **CROPPED),
        ("<|startoftext|>", "a</w>", "red</w>", "cat</w>", "<|endoftext|>"),
    ),
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


def standardised(matrix: Tensor) -> Tensor:
    return (matrix - matrix.mean()) / matrix.std()


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


# Towers that read sounds and videos.


def prepares(encoder: DualEncoder, media: Any, given: dict[str, Any]) -> None:
    """The inputs are what the processor makes, which refuses pictures."""
    pairs = encoder.prepare(media, CAPTIONS)
    arguments = dict(zip(encoder.argument_names, (*pairs.inputs, *pairs.additional_forward_args), strict=True))
    for name, values in arguments.items():
        torch.testing.assert_close(values, given[name], check_dtype=False)
    assert len(pairs.timelines) == 3 and not any(timeline.taken for timeline in pairs.timelines)
    with pytest.raises(ValueError, match=r"frames: expected a uint8 array|an array of samples"):
        encoder.prepare(PICTURES[0], CAPTIONS[0])


def agrees(encoder: DualEncoder, given: dict[str, Any], logits: Callable[[Any], Tensor]) -> None:
    """Every pair of what a processor made is scored and explained, in the order of ``argument_names``."""
    arguments = [given[name] for name in encoder.argument_names if name in given]
    count = len(arguments[0])
    rows, columns = torch.arange(count).repeat_interleave(count), torch.arange(count).repeat(count)
    own = [rows if index == 0 or name == "is_longer" else columns for index, name in enumerate(encoder.argument_names)]
    with torch.no_grad():
        scores = encoder(*(argument[chosen] for argument, chosen in zip(arguments, own, strict=False)))
        expected = logits(encoder.model(**given))
    torch.testing.assert_close(standardised(scores.view(count, count)), standardised(expected), rtol=0, atol=1e-3)
    inputs, additional = tuple(arguments[:2]), tuple(arguments[2:])
    bits = MultiModalInfoBottleneck(encoder).attribute(inputs, additional_forward_args=additional, **FEW)
    for attribution, given_input in zip(bits, inputs, strict=True):
        assert attribution.shape == given_input.shape and float(attribution.sum()) > 0
    assert not bits[1][given["attention_mask"] == 0].any()


def test_xclip_reads_videos(tmp_path: Path):
    checkpoint = Checkpoint(
        "xclip",
        of_zoo("xclip"),
        clip_tokenizer,
        processors("VideoMAEImageProcessor", "XCLIPProcessor", **CROPPED),
        (),
    )
    encoder = DualEncoder.from_pretrained(checkpoint.save(tmp_path))
    videos = [[np.roll(picture, 9 * frame, 1) for frame in range(4)] for picture in PICTURES]
    given = dict(encoder.processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt"))
    given["pixel_values"] = encoder.processor.image_processor(videos, return_tensors="pt")["pixel_values"]
    assert given["pixel_values"].shape == (3, 4, 3, 32, 32)
    prepares(encoder, videos, given)
    agrees(encoder, given, lambda output: output.logits_per_video)


def test_clap_reads_sounds(tmp_path: Path):
    # One second in steps of 8 samples makes 501 frames of 32 bands.
    settings = {
        "feature_extractor_type": "ClapFeatureExtractor",
        "processor_class": "ClapProcessor",
        "feature_size": 32,
        "sampling_rate": 4000,
        "hop_length": 8,
        "max_length_s": 1,
        "fft_window_size": 512,
        "frequency_max": 2000,
        "truncation": "rand_trunc",
        "padding": "repeatpad",
    }
    checkpoint = Checkpoint("clap", of_zoo("clap"), roberta_tokenizer, settings, ())
    encoder = DualEncoder.from_pretrained(checkpoint.save(tmp_path))
    times = np.linspace(0, 1, 4000)
    sounds = [np.sin(2 * np.pi * pitch * times).astype(np.float32) for pitch in (100, 300, 900)]
    given = dict(encoder.processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt"))
    extracted = encoder.processor.feature_extractor(sounds, sampling_rate=4000, return_tensors="pt")
    given |= {name: torch.as_tensor(value) for name, value in extracted.items()}
    prepares(encoder, [Sound(sound, 4000) for sound in sounds], given)
    agrees(encoder, given, lambda output: output.logits_per_audio)


# open_clip.


VIT = {"layers": 4, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
BLOCKS = {"width": 32, "heads": 2, "layers": 4}


def open_clip_directory(directory: Path, text: dict[str, Any], custom: bool) -> nn.Module:
    """A configuration, weights and what opens the pictures, as open_clip's checkpoints on the hub hold them."""
    import open_clip

    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": {**BLOCKS, **text}}
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**sizes)
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    mean, std = IMAGENET.values()
    opened = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}
    configuration = {"model_cfg": {**sizes, "custom_text": custom}, "preprocess_cfg": opened}
    write_json(directory / "open_clip_config.json", configuration)
    return model.eval()


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
