"""Any two towers as one function of aligned pairs; loading and preparing with the model's own processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import captions, clip_case, family_named, image_tower, pictures, text_tower, tiny_clip
from PIL import Image
from tiny_parts import reader_of
from torch import nn

import captum_m2ib.encoders.pictures
from captum_m2ib import (
    ChannelStatistics,
    DualEncoder,
    MultiModalInfoBottleneck,
    PatchLayout,
    TextLayout,
    save_statistics,
)
from captum_m2ib.encoders.dual_encoder import is_dual_encoder
from captum_m2ib.encoders.pictures import load_picture

WORDS = ["[unk]", "[pad]", "a", "cat", "dog", "on", "the", "mat", "red", "and"]
END, START = 63, 62


# Towers.


def embeddings(model: nn.Module, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor):
    image = model.visual_projection(model.vision_model(pixels).pooler_output)
    text = model.text_projection(model.text_model(ids, attention_mask=mask).pooler_output)
    return image, text


def test_score_is_the_cosine_similarity_of_aligned_pairs():
    model, pixels, (ids, mask) = tiny_clip(), pictures(), captions()
    image, text = embeddings(model, pixels, ids, mask)
    score = DualEncoder(model)(pixels, ids, mask)
    torch.testing.assert_close(score, F.cosine_similarity(image, text))
    logits = model(input_ids=ids, pixel_values=pixels, attention_mask=mask).logits_per_image
    torch.testing.assert_close(score * model.logit_scale.exp(), logits.diagonal(), rtol=1e-4, atol=1e-5)


class Fake(nn.Module):
    """A model with both towers under the names of one kind of library."""

    def __init__(self, names: tuple[str, str], wrap) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual, self.text = image_tower(), text_tower()
        self.seen: list = []
        if names[0].startswith("get_"):
            self.get_image_features = lambda pixel_values: wrap(self.visual(pixel_values), "image")
            self.get_text_features = lambda input_ids, attention_mask=None: wrap(
                self.text(input_ids, attention_mask), "text"
            )
        else:
            self.encode_image = lambda image: wrap(self.visual(image), "image")
            self.encode_text = lambda text, *more: wrap(self.text(text, *more), "text")


FORMS = {
    "tensor": lambda x, kind: x,
    "pooler": lambda x, kind: SimpleNamespace(pooler_output=x, last_hidden_state=x[:, None]),
    "embeds": lambda x, kind: SimpleNamespace(**{f"{kind}_embeds": x, "pooler_output": -x}),
    "no_embeds": lambda x, kind: SimpleNamespace(**{f"{kind}_embeds": None, "pooler_output": x}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", [("get_image_features", "get_text_features"), ("encode_image", "encode_text")])
def test_models_of_every_library_and_version(names, form: str):
    fake = Fake(names, FORMS[form]).eval()
    assert is_dual_encoder(fake)
    pixels, (ids, mask) = pictures(), captions()
    expected = F.cosine_similarity(fake.visual(pixels), fake.text(ids, mask))
    torch.testing.assert_close(DualEncoder(fake)(pixels, ids, mask), expected)
    without = F.cosine_similarity(fake.visual(pixels), fake.text(ids))
    torch.testing.assert_close(DualEncoder(fake)(pixels, ids), without)
    method = MultiModalInfoBottleneck(
        fake, ["visual.blocks.0", "text.blocks.0"], (PatchLayout((8, 8), 1), TextLayout(2))
    )
    bits = method.attribute((pixels, ids), additional_forward_args=mask, n_steps=2, n_samples=2)
    assert bits[0].shape == pixels.shape and not bits[1][mask == 0].any()


def test_an_output_without_embedding_is_an_error():
    fake = Fake(("get_image_features", "get_text_features"), lambda x, kind: SimpleNamespace(logits=x)).eval()
    with pytest.raises(
        TypeError, match=r"^model: expected Fake to return an embedding.*'image_embeds'.*SimpleNamespace"
    ):
        DualEncoder(fake)(pictures(), captions()[0])


def test_two_towers():
    image, text = image_tower().eval(), text_tower().eval()
    pixels, (ids, mask) = pictures(), captions()
    encoder = DualEncoder(image, text)
    torch.testing.assert_close(encoder(pixels, ids, mask), F.cosine_similarity(image(pixels), text(ids, mask)))
    assert encoder.image_tower is image and encoder.text_tower is text
    assert {id(p) for p in encoder.parameters()} == {id(p) for t in (image, text) for p in t.parameters()}
    assert encoder.owner(image.blocks[0]) == 0 and encoder.owner(text.blocks[0].mlp) == 1


def test_two_transformers_towers():
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    model, pixels, (ids, mask) = tiny_clip(), pictures(), captions()
    torch.manual_seed(0)
    vision = CLIPVisionModelWithProjection(model.config.vision_config).eval()
    text = CLIPTextModelWithProjection(model.config.text_config).eval()
    one, two = DualEncoder(model), DualEncoder(vision, text)
    expected = F.cosine_similarity(vision(pixels).image_embeds, text(ids, mask).text_embeds)
    torch.testing.assert_close(two(pixels, ids, mask), expected)
    assert one.layouts == two.layouts == (PatchLayout((8, 8), 1), TextLayout(2, END))


def test_two_image_towers():
    first, second = image_tower().eval(), image_tower().eval()
    for layouts in ((PatchLayout((8, 8), 1),) * 2, None):
        encoder = DualEncoder(first, second, layouts=layouts)
        assert encoder(pictures(), pictures()).shape == (3,)


def test_training_flag_is_that_of_the_towers():
    model = tiny_clip()
    assert not DualEncoder(model).training
    assert DualEncoder(model.train()).training and model.training
    encoder = DualEncoder(image_tower().train(), text_tower().eval())
    assert encoder.training and not encoder.text_tower.training


def test_half_precision_scores_are_float32():
    case = family_named("clip_bf16").build()
    score = case.forward(*case.inputs, *case.additional)
    assert score.dtype == torch.float32
    assert DualEncoder(tiny_clip().double())(pictures().double(), captions()[0]).dtype == torch.float64


def test_state_holds_the_model_once():
    model = tiny_clip()
    encoder = DualEncoder(model)
    assert set(encoder.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in model.parameters())
    assert [type(root).__name__ for root in encoder.roots()] == ["CLIPModel", "DualEncoder"]
    assert encoder.device == torch.device("cpu")


def test_statistics_are_those_given_else_the_vocabularys():
    model = tiny_clip()
    given = ChannelStatistics(torch.zeros(32), torch.ones(32))
    encoder = DualEncoder(model, statistics={"vision_model.encoder.layers.0": given})
    assert encoder.statistics_of(model.vision_model.encoder.layers[0]) is given
    assert encoder.statistics_of("vision_model.encoder.layers.0") is given
    assert encoder.statistics_of(model.vision_model.encoder.layers[1]) is None
    vocabulary = encoder.statistics_of(model.text_model.embeddings)
    positions = torch.arange(64) % 16
    table = model.text_model.embeddings.token_embedding.weight
    states = table + model.text_model.embeddings.position_embedding.weight[positions]
    torch.testing.assert_close(vocabulary.mean, states.mean(0).detach())
    torch.testing.assert_close(vocabulary.std, states.std(0).detach())
    assert vocabulary.count == 64


def test_a_tower_without_known_names_says_what_to_do():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

    encoder = DualEncoder(Plain(), Plain())
    with pytest.raises(ValueError, match=r"^layers: found no list of blocks in the image tower Plain; name the layers"):
        encoder.published_layers()
    with pytest.raises(ValueError, match=r"^layers: found no table of tokens in the text tower Plain; name the layers"):
        MultiModalInfoBottleneck(encoder)
    with pytest.raises(ValueError, match=r"^layers: found no table of tokens in the text tower Plain"):
        DualEncoder(image_tower(), Plain()).recommended_layers()


# Loading and preparing.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory with weights, word tokenizer and CLIP's image processor."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPProcessor, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_clip().save_pretrained(directory)
    words = {word: index for index, word in enumerate(WORDS)} | {"[start]": START, "[end]": END}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[unk]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[start] $A [end]", special_tokens=[("[start]", START), ("[end]", END)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[start]",
        eos_token="[end]",
        pad_token="[pad]",
        unk_token="[unk]",
        model_max_length=77,
    )
    reader = reader_of("clip", "CLIPImageProcessor")
    images = reader(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, fast).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint)


def picture(width: int = 60, height: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_loaded_checkpoint_scores_and_explains(encoder: DualEncoder, checkpoint: Path):
    assert not encoder.training and not encoder.model.training
    for name, tensor in tiny_clip().state_dict().items():
        assert torch.equal(encoder.model.state_dict()[name], tensor)
    pairs = encoder.prepare([picture(), picture(seed=1)], ["a cat", "the red dog on the mat"])
    assert len(pairs) == 2 and pairs.inputs[0].shape == (2, 3, 32, 32)
    assert pairs.inputs[1].tolist() == [[62, 2, 3, 63, 1, 1, 1, 1], [62, 6, 8, 4, 5, 6, 7, 63]]
    assert pairs.additional_forward_args[0].tolist() == [[1] * 4 + [0] * 4, [1] * 8]
    assert pairs.captions == ("a cat", "the red dog on the mat")
    assert pairs.tokens[0][:5] == ("[start]", "a", "cat", "[end]", "[pad]")
    assert pairs.special[0] == (True, False, False, True, True, True, True, True)
    assert [p.dtype for p in pairs.pictures] == [np.uint8] * 2
    score = encoder(*pairs.inputs, *pairs.additional_forward_args)
    assert score.shape == (2,)
    bits = MultiModalInfoBottleneck(encoder).attribute(
        pairs.inputs, additional_forward_args=pairs.additional_forward_args, n_steps=2, n_samples=2
    )
    assert bits[0].shape == (2, 3, 32, 32) and not bits[1][0, 4:].any()
    again = DualEncoder.from_pretrained(str(checkpoint), torch_dtype=torch.bfloat16, device="cpu")
    assert next(again.parameters()).dtype == torch.bfloat16
    assert again.prepare(picture(), "a cat").inputs[0].dtype == torch.bfloat16


def test_one_picture_or_one_caption_serves_all(encoder: DualEncoder):
    pairs = encoder.prepare(picture(), ["a cat", "a dog", "the mat"])
    assert len(pairs) == 3 and torch.equal(pairs.inputs[0][0], pairs.inputs[0][2]) and len(pairs.pictures) == 3
    pairs = encoder.prepare([picture(), Image.fromarray(picture(seed=1))], "a cat")
    assert len(pairs) == 2 and torch.equal(pairs.inputs[1][0], pairs.inputs[1][1]) and len(pairs.tokens) == 2
    batch = encoder.prepare(np.stack([picture(), picture(seed=1)]), ["a cat", "a dog"])
    assert len(batch) == 2 and torch.equal(batch.inputs[0], pairs.inputs[0])
    moved = batch.to("cpu")
    assert moved.captions == batch.captions and torch.equal(moved.inputs[1], batch.inputs[1])


def test_pictures_and_captions_that_do_not_fit(encoder: DualEncoder):
    with pytest.raises(ValueError, match=r"^captions: expected one per picture.*got 2 pictures and 3 captions"):
        encoder.prepare([picture(), picture()], ["a", "cat", "dog"])
    with pytest.raises(ValueError, match=r"^captions: expected at least one caption"):
        encoder.prepare(picture(), [])
    with pytest.raises(ValueError, match=r"^images: expected at least one image"):
        encoder.prepare([], "a cat")
    for empty in ("", "  \n"):
        with pytest.raises(ValueError, match=r"^captions\[1\]: expected a caption with at least one word"):
            encoder.prepare(picture(), ["a cat", empty])
    with pytest.raises(ValueError, match=r"^captions\[0\]: .*got int"):
        encoder.prepare(picture(), [3])


def test_long_captions_warn_and_are_cut(encoder: DualEncoder):
    with pytest.warns(UserWarning, match=r"^captions: the model reads 16 tokens, .* has 22; the rest is cut"):
        pairs = encoder.prepare(picture(), ["a cat", "cat " * 20])
    assert pairs.inputs[1].shape == (2, 16) and int(pairs.inputs[1][1, -1]) == END
    assert encoder(*pairs.inputs, *pairs.additional_forward_args).shape == (2,)


def test_a_tokenizer_that_says_less_than_the_tower_holds_is_blamed(
    encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = encoder.processor.tokenizer
    monkeypatch.setattr(tokenizer, "model_max_length", 8)
    message = (
        r"^captions: the tokenizer says that the model reads 8 tokens, the text tower has 16 positions; set "
        r"processor\.tokenizer\.model_max_length = 16 .* has 14; the rest is cut"
    )
    with pytest.warns(UserWarning, match=message):
        assert encoder.prepare(picture(), "cat " * 12).inputs[1].shape == (1, 8)
    monkeypatch.setattr(tokenizer, "model_max_length", 16)
    assert encoder.prepare(picture(), "cat " * 12).inputs[1].shape == (1, 14)


def test_an_encoder_without_processor_says_so():
    with pytest.raises(ValueError, match=r"^processor: this DualEncoder has none"):
        DualEncoder(tiny_clip()).prepare(picture(), "a cat")


def copied(checkpoint: Path, target: Path, without: str) -> Path:
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns(without))
    return target


def test_incomplete_checkpoints(checkpoint: Path, tmp_path: Path):
    with pytest.raises(OSError, match=r"^model: .* holds no config.json"):
        DualEncoder.from_pretrained(copied(checkpoint, tmp_path / "config", "config.json"))
    weightless = copied(checkpoint, tmp_path / "weights", "*.safetensors")
    (weightless / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(OSError, match=r"^model: .* holds no safetensors weights"):
        DualEncoder.from_pretrained(weightless)
    with pytest.raises(OSError, match=r"^model: .* is not a directory"):
        DualEncoder.from_pretrained(tmp_path / "nothing")
    with pytest.raises(OSError, match=r"^model: .* is not a directory"):
        DualEncoder.from_pretrained("./nothing/here")


def test_a_missing_processor_warns(checkpoint: Path, tmp_path: Path):
    bare = copied(checkpoint, tmp_path / "bare", "*token*")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (bare / name).unlink(missing_ok=True)
    with pytest.warns(UserWarning, match=r"^model: .* has no usable processor"):
        encoder = DualEncoder.from_pretrained(bare)
    assert encoder.processor is None


def test_a_model_with_one_tower_is_refused(tmp_path: Path):
    from transformers import CLIPVisionModel

    CLIPVisionModel(tiny_clip().config.vision_config).save_pretrained(tmp_path)
    with (
        pytest.warns(UserWarning, match="no usable processor"),
        pytest.raises(TypeError, match=r"^model: expected get_image_features"),
    ):
        DualEncoder.from_pretrained(tmp_path)


def test_code_in_a_checkpoint_is_never_run(checkpoint: Path, tmp_path: Path):
    directory = copied(checkpoint, tmp_path / "code", "nothing")
    marker = tmp_path / "ran"
    (directory / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_own.Own", "AutoConfig": "modeling_own.OwnConfig"}
    (directory / "config.json").write_text(json.dumps(config))
    DualEncoder.from_pretrained(directory)
    assert not marker.exists()


def test_shipped_statistics_are_found(checkpoint: Path, tmp_path: Path):
    directory = copied(checkpoint, tmp_path / "statistics", "nothing")
    given = ChannelStatistics(torch.linspace(-1, 1, 32), torch.linspace(1, 2, 32), 7)
    pixels = ChannelStatistics(torch.linspace(-1, 1, 3), torch.linspace(1, 2, 3), 5)
    statistics = {"inputs[0]": pixels, "text_model.embeddings": given}
    save_statistics(directory / "bottleneck_statistics.safetensors", statistics)
    encoder = DualEncoder.from_pretrained(directory)
    for prior, told in zip(MultiModalInfoBottleneck(encoder).priors, (pixels, given), strict=True):
        assert torch.equal(prior.mean, told.mean) and prior.count == told.count


# Pictures.


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(picture()).save(path)
    return path


def test_a_picture_in_every_form_is_the_same(encoder: DualEncoder, file: Path):
    forms = [file, str(file), Image.open(file), picture()]
    pixels = [encoder.prepare(form, "a cat").inputs[0] for form in forms]
    assert all(torch.equal(one, pixels[0]) for one in pixels)
    grey = load_picture(np.zeros((4, 5), np.uint8))
    assert grey.mode == "RGB" and grey.size == (5, 4)
    assert load_picture(np.zeros((4, 5, 4), np.uint8)).mode == "RGB"
    assert load_picture(Image.new("CMYK", (3, 2))).mode == "RGB"


def test_pictures_that_cannot_be_read(encoder: DualEncoder, file: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"^images\[1\]: there is no file .*missing.png; check the path"):
        encoder.prepare([file, tmp_path / "missing.png"], "a cat")
    cut = tmp_path / "cut.png"
    cut.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"^images\[0\]: cannot read .*cut.png as a picture"):
        encoder.prepare(cut, "a cat")
    for name, content in (("text.png", b"no picture"), ("empty.jpg", b""), ("vector.svg", b"<svg/>")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^images\[0\]: cannot read .*{name} as a picture"):
            encoder.prepare(tmp_path / name, "a cat")
    with pytest.raises(ValueError, match=r"^images\[0\]: "):
        encoder.prepare(tmp_path, "a cat")
    with pytest.raises(ValueError, match=r"^images\[0\]: expected a path, a PIL image or a uint8 array, got "):
        encoder.prepare(torch.zeros(3, 4, 4), "a cat")
    for wrong in (np.zeros((4, 4, 3)), np.zeros((3, 4, 5), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(ValueError, match=r"^images\[0\]: expected a uint8 array of shape \(H, W, 3\)"):
            encoder.prepare([wrong], "a cat")


def test_oversized_pictures_are_refused_before_they_are_decoded(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(captum_m2ib.encoders.pictures, "MAXIMUM_PIXELS", 100)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"^image: .* has 60 x 40 pixels, more than the 100 allowed"):
        load_picture(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"^image: .*pixels"):
        load_picture(file)


def test_a_format_that_runs_other_programs_is_refused(tmp_path: Path):
    path = tmp_path / "picture.eps"
    Image.fromarray(picture()).save(path)
    with pytest.raises(ValueError, match=r"^image: cannot read"):
        load_picture(path)


def test_orientation_is_applied(tmp_path: Path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(60, 40)).save(path, exif=exif)
    assert load_picture(path).size == (40, 60)


def test_more_arguments_than_the_model_reads_are_refused():
    case = clip_case()
    with pytest.raises(ValueError, match=r"additional_forward_args: expected at most 1 \(attention_mask\), got 2"):
        case.forward(*case.inputs, *case.additional, torch.ones(3))
