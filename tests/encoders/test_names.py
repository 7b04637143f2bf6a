"""Every form in which a model may be named: adapters, SentenceTransformers and models of open_clip, as on the hub."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import peft
import pytest
import torch
from commands import Run, assert_one_line, runner
from hub_files import CAPTIONS, CLIP, FEW, PICTURES, open_clip_directory, write_json
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from captum_m2ib import DualEncoder, Explanation, explain
from captum_m2ib.encoders.naming import load_named

TARGETS = ["q_proj", "v_proj", "token_embedding"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CLIP.save(tmp_path_factory.mktemp("base"))


def adapt(base: Path, folder: Path, **settings: Any) -> Any:
    """Save an adapter that changes something, as peft does, and return the adapted model."""
    torch.manual_seed(1)
    model = DualEncoder.from_pretrained(base).model
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(-1.5)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(folder))
    return adapted


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    adapt(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def scores(encoder: DualEncoder) -> Tensor:
    pairs = encoder.prepare(PICTURES, CAPTIONS)
    with torch.no_grad():
        return encoder(*pairs.inputs, *pairs.additional_forward_args)


class TestAdapters:
    @pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["visual_projection"]}])
    def test_weights_are_those_of_the_adapted_model(self, base: Path, tmp_path: Path, settings: dict[str, Any]):
        if settings.get("use_dora"):
            settings = {**settings, "exclude_modules": ["token_embedding"]}
        adapted = adapt(base, tmp_path, **settings)
        encoder = DualEncoder.from_pretrained(tmp_path)
        pairs = encoder.prepare(PICTURES, CAPTIONS)
        inner = adapted.get_base_model()
        with torch.no_grad():
            image, text = (
                getattr(found, "pooler_output", found)
                for found in (
                    inner.get_image_features(pairs.inputs[0]),
                    inner.get_text_features(pairs.inputs[1], attention_mask=pairs.additional_forward_args[0]),
                )
            )
        torch.testing.assert_close(scores(encoder), torch.cosine_similarity(image, text), atol=1e-5, rtol=0)
        assert (scores(encoder) - scores(DualEncoder.from_pretrained(base))).abs().max() > 1e-3
        # Nothing of the adapter is left in the way of a layer's name.
        assert set(encoder.model.state_dict()) == set(DualEncoder.from_pretrained(base).model.state_dict())
        assert not encoder.model.training and all(not p.is_meta for p in encoder.parameters())

    def test_it_explains(self, adapter: Path):
        (one,) = explain(DualEncoder.from_pretrained(adapter), PICTURES[0], CAPTIONS[0], **FEW)
        assert one.image_total_bits > 0 and one.token_total_bits > 0

    def test_a_processor_of_its_own_comes_first(self, base: Path, adapter: Path):
        for path in base.iterdir():
            if path.suffix != ".safetensors" and path.name != "config.json":
                shutil.copy(path, adapter / path.name)
        settings = json.loads((adapter / "preprocessor_config.json").read_text())
        write_json(
            adapter / "preprocessor_config.json",
            {**settings, "do_center_crop": False, "size": {"height": 32, "width": 32}},
        )
        encoder = DualEncoder.from_pretrained(adapter)
        assert encoder.processor.image_processor.do_center_crop is False

    def test_a_configuration_beside_it_makes_it_no_model(self, base: Path, adapter: Path):
        expected = scores(DualEncoder.from_pretrained(adapter))
        shutil.copy(base / "config.json", adapter / "config.json")
        torch.testing.assert_close(scores(DualEncoder.from_pretrained(adapter)), expected)

    @pytest.mark.parametrize(
        "name", ["pickled", "no base", "base gone", "truncated", "lacking", "other base", "no json"]
    )
    def test_what_it_lacks_is_said(self, name: str, adapter: Path, tmp_path: Path):
        config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
        settings = json.loads(config.read_text())
        says = r"^model: the adapter .* cannot be added to the weights"
        if name == "pickled":
            weights.rename(adapter / "adapter_model.bin")
            says = r"^model: .*adapter holds no adapter_model.safetensors.*pickled"
        elif name == "no base":
            write_json(config, {**settings, "base_model_name_or_path": None})
            says = r"^model: adapter_config.json of .* names no base_model_name_or_path"
        elif name == "base gone":
            write_json(config, {**settings, "base_model_name_or_path": str(tmp_path / "gone")})
            says = r"^model: the base model of the adapter .*: model: .*gone is not a directory"
        elif name == "truncated":
            weights.write_bytes(weights.read_bytes()[:100])
        elif name == "lacking":
            tensors = load_file(weights)
            tensors.pop(next(iter(tensors)))
            save_file(tensors, weights)
            says += r".*missing adapter keys"
        elif name == "other base":
            write_json(config, {**settings, "target_modules": ["query"]})
        else:
            config.write_text("{")
            says = r"^model: adapter_config.json of .* is no JSON"
        with pytest.raises(OSError, match=says):
            DualEncoder.from_pretrained(adapter)

    def test_without_peft(self, adapter: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r"^model: .* is an adapter, which peft reads.*captum_m2ib\[peft\]"):
            DualEncoder.from_pretrained(adapter)


def sentence_transformer(folder: Path, base: Path, path: str, *kinds: str) -> Path:
    """As SentenceTransformer.save writes it: a list of modules, and a folder for each that has something to keep."""
    shutil.copytree(base, folder / path)
    modules = [
        {"idx": index, "name": str(index), "path": path if not index else f"{index}_{kind}", "type": f"a.b.{kind}"}
        for index, kind in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    return folder


class TestSentenceTransformers:
    @pytest.mark.parametrize("path", ["0_CLIPModel", ""])
    @pytest.mark.parametrize("kinds", [("CLIPModel",), ("Transformer", "Normalize")])
    def test_the_dual_encoder_inside_is_read(self, path: str, kinds: tuple[str, ...], base: Path, tmp_path: Path):
        folder = sentence_transformer(tmp_path / "model", base, path, *kinds)
        torch.testing.assert_close(
            scores(DualEncoder.from_pretrained(folder)), scores(DualEncoder.from_pretrained(base))
        )

    @pytest.mark.parametrize("kinds", [("CLIPModel", "Dense"), ("Transformer", "Pooling"), ("Router",), ()])
    @pytest.mark.parametrize("path", ["0_CLIPModel", ""])
    def test_what_changes_the_embedding_is_not_passed_over(
        self, path: str, kinds: tuple[str, ...], base: Path, tmp_path: Path
    ):
        folder = sentence_transformer(tmp_path / "model", base, path, *kinds)
        named = ", ".join(kinds) or "nothing"
        with pytest.raises(
            OSError, match=rf"^model: .* is a SentenceTransformer of {named}; expected one dual encoder"
        ):
            DualEncoder.from_pretrained(folder)

    def test_a_folder_outside_is_refused(self, base: Path, tmp_path: Path):
        folder = sentence_transformer(tmp_path / "model", base, "0_CLIPModel", "CLIPModel")
        write_json(folder / "modules.json", [{"path": "../../elsewhere", "type": "CLIPModel"}])
        with pytest.raises(OSError, match=r"^model: modules.json of .* leads out of it"):
            DualEncoder.from_pretrained(folder)


@pytest.fixture
def of_open_clip(tmp_path: Path) -> tuple[Path, Any]:
    folder = tmp_path / "open clip"
    folder.mkdir()
    return folder, open_clip_directory(folder, {"context_length": 12, "vocab_size": 49408}, custom=False)


class TestOpenClip:
    def agrees(self, encoder: DualEncoder, saved: Any) -> None:
        pairs = encoder.prepare(PICTURES, CAPTIONS)
        with torch.no_grad():
            expected = torch.cosine_similarity(saved.encode_image(pairs.inputs[0]), saved.encode_text(pairs.inputs[1]))
            torch.testing.assert_close(encoder(*pairs.inputs), expected)

    @pytest.mark.parametrize("form", ["{}", "local-dir:{}"])
    def test_a_directory(self, form: str, of_open_clip: tuple[Path, Any]):
        self.agrees(load_named(form.format(of_open_clip[0])), of_open_clip[1])

    def test_an_architecture_with_a_file_of_weights(
        self, of_open_clip: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
    ):
        import open_clip

        folder, saved = of_open_clip
        config = json.loads((folder / "open_clip_config.json").read_text())
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config["model_cfg"])
        self.agrees(load_named(f"open_clip:tiny:{folder / 'open_clip_model.safetensors'}"), saved)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("hf-hub:org/name", ("hf-hub:org/name", None)),
            ("open_clip:ViT-B-32:laion2b_s34b_b79k", ("ViT-B-32", "laion2b_s34b_b79k")),
            ("open_clip:RN50:C:\\weights.pt", ("RN50", "C:\\weights.pt")),
        ],
    )
    def test_names_are_read(self, name: str, expected: Any, monkeypatch: pytest.MonkeyPatch):
        calls = []
        monkeypatch.setattr(DualEncoder, "from_open_clip", lambda *given, device=None: calls.append(given))
        load_named(name)
        assert calls == [expected]

    @pytest.mark.parametrize(
        "name", ["open_clip:ViT-B-32", "open_clip:ViT-B-32:", "open_clip::openai", "open_clip:RN50"]
    )
    def test_random_weights_are_refused(self, name: str):
        with pytest.raises(ValueError, match=r"^model: expected open_clip:ARCHITECTURE:WEIGHTS.*would be random"):
            load_named(name)

    def test_a_revision_is_refused(self):
        with pytest.raises(ValueError, match=r"^revision: hf-hub:org/name is a model of open_clip"):
            load_named("hf-hub:org/name", revision="main")

    def test_from_pretrained_says_where_to_go(self):
        with pytest.raises(OSError, match=r"^model: hf-hub:org/name is a name of open_clip.*from_open_clip"):
            DualEncoder.from_pretrained("hf-hub:org/name")


class TestCommand:
    @pytest.fixture
    def run(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
        return runner(capsys, monkeypatch)

    @pytest.fixture
    def picture(self, tmp_path: Path) -> Path:
        Image.fromarray(PICTURES[0]).save(tmp_path / "picture.png")
        return tmp_path / "picture.png"

    @pytest.fixture
    def models(self, adapter: Path, base: Path, of_open_clip: tuple[Path, Any], tmp_path: Path) -> dict[str, str]:
        return {
            "adapter": str(adapter),
            "sentence transformer": str(sentence_transformer(tmp_path / "s", base, "0_CLIPModel", "CLIPModel")),
            "open_clip": str(of_open_clip[0]),
        }

    @pytest.mark.parametrize("kind", ["adapter", "sentence transformer", "open_clip"])
    def test_explains(self, kind: str, run: Run, models: dict[str, str], picture: Path, tmp_path: Path, capsys: Any):
        # What the fixtures loaded shows its progress.
        capsys.readouterr()
        target = tmp_path / "pair.json"
        options = ("--output", target, "--steps", 2, "--samples", 2)
        status, out, err = run("explain", picture, CAPTIONS[0], "--model", models[kind], *options)
        assert (status, err) == (0, "") and out.startswith(f"caption  {CAPTIONS[0]}")
        assert Explanation.load(target).image_total_bits > 0

    @pytest.mark.parametrize(
        ("model", "says"),
        [
            ("open_clip:no-such:weights", r"model: open_clip knows no architecture no-such; (near|it has)"),
            ("open_clip:ViT-b-32:openai", r"model: open_clip knows no architecture ViT-b-32; near matches: .*ViT-B-32"),
            ("open_clip:ViT-B-32:laion2b", r"model: open_clip has no weights laion2b of ViT-B-32, and .*laion2b_e16"),
            ("open_clip:ViT-B-32", r"model: expected open_clip:ARCHITECTURE:WEIGHTS"),
            ("local-dir:none", r"model: open_clip cannot load local-dir:none"),
            ("https://huggingface.co/openai/clip", r"model: https://.* is an address; give a hub id"),
        ],
    )
    def test_one_line_for_what_cannot_be_loaded(self, model: str, says: str, run: Run, picture: Path):
        assert_one_line(run("explain", picture, CAPTIONS[0], "--model", model), says)

    def test_an_adapter_without_peft(
        self, run: Run, models: dict[str, str], picture: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setitem(sys.modules, "peft", None)
        assert_one_line(run("explain", picture, CAPTIONS[0], "--model", models["adapter"]), "model: .*which peft reads")

    @pytest.mark.parametrize("address", ["https://example.org/a.png", "http://example.org/a.png", "s3://a/b.png"])
    def test_addresses_of_pictures(self, address: str, run: Run, base: Path):
        assert_one_line(
            run("explain", address, CAPTIONS[0], "--model", base),
            rf"IMAGE: {address} is an address, and nothing is fetched; download it first and give the file",
        )


@pytest.mark.parametrize(
    "gather",
    [
        pandas.Series,
        lambda paths: pandas.DataFrame({"image": paths}).image,
        tuple,
        iter,
        lambda paths: (path for path in paths),
        lambda paths: dict.fromkeys(paths).keys(),
        lambda paths: np.array(paths, dtype=object),
        lambda paths: pandas.Series([Image.open(path) for path in paths]),
    ],
)
def test_pictures_in_anything_that_can_be_gone_through(gather: Callable[[list[Path]], Any], base: Path, tmp_path: Path):
    paths = []
    for index, picture in enumerate(PICTURES):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(picture).save(paths[-1])
    encoder = DualEncoder.from_pretrained(base)
    expected = encoder.prepare(PICTURES, CAPTIONS)
    found = encoder.prepare(gather(paths), pandas.Series(CAPTIONS))
    assert torch.equal(found.inputs[0], expected.inputs[0]) and found.captions == expected.captions
    assert len(explain(encoder, gather(paths), CAPTIONS, method="legrad", check=False)) == 3


@pytest.mark.parametrize("images", [3, {"bytes": b""}, None])
def test_what_is_no_picture_and_holds_none(images: Any, base: Path):
    with pytest.raises(ValueError, match=r"^images\[0\]: expected a path, a PIL image or a uint8 array, got"):
        DualEncoder.from_pretrained(base).prepare(images, CAPTIONS[0])


@pytest.mark.parametrize("address", ["https://example.org/a.png", Path("https://example.org/a.png"), "ftp://a/b"])
def test_addresses_are_to_be_downloaded_first(address: Any, base: Path):
    with pytest.raises(ValueError, match=r"^images\[1\]: .* is an address, and nothing is fetched; download it first"):
        DualEncoder.from_pretrained(base).prepare([PICTURES[0], address], CAPTIONS[0])
