"""The command: what it writes and prints, and that every mistake ends in one helpful line and status 2."""

from __future__ import annotations

import io
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Result, Run, runner
from PIL import Image
from safetensors.torch import load_file, save_file

import captum_m2ib
from captum_m2ib import DualEncoder, Explanation, MultiModalInfoBottleneck, explain
from captum_m2ib.attr.registry import METHODS, method_named, unit_of
from captum_m2ib.cli import main
from captum_m2ib.scenes.grounds import GROUNDS

CAPTION = "a picture with a red circle"
IMAGE_BLOCK, TEXT_BLOCK = "vision_model.encoder.layers.0", "text_model.encoder.layers.0"
QUICK = ("--steps", "2", "--samples", "2")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(capsys, monkeypatch)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_one_line(result: Result, says: str) -> None:
    assert result.status == 2, result
    assert result.err.startswith("captum-m2ib: ") and result.err.endswith("\n")
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    assert re.search(says, result.err), result.err
    assert result.out == ""


class TestExplain:
    def test_without_arguments_an_example_is_explained(self, run: Run, checkpoint: Path, tmp_path: Path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        status, out, err = run("explain", "--model", checkpoint)
        assert status == 0 and err == ""
        assert set(files_in(tmp_path)) == {"explanation.png"}
        with Image.open(tmp_path / "explanation.png") as written:
            assert written.format == "PNG" and min(written.size) > 100
        caption, score, image, text, check, second, path = out.splitlines()
        assert caption.startswith("caption  ") and path == "picture  explanation.png"
        assert -1 <= float(re.fullmatch(r"score +(-?\d\.\d{3}) \(cosine similarity\)", score)[1]) <= 1
        assert float(re.fullmatch(r"image +(\d+\.\d) bits", image)[1]) > 0
        tokens = re.fullmatch(r"text +(\d+\.\d) bits; most in: (.*)", text)[2].split(", ")
        assert 1 <= len(tokens) <= 5
        verdict = r" map (holds|is weak|fails): .*(what the score can lose|nothing to explain).*"
        assert re.fullmatch("check    image" + verdict, check) and re.fullmatch("         text" + verdict, second)
        words = caption.removeprefix("caption").split()
        for token in tokens:
            word, bits = token.rsplit(" ", 1)
            assert word in words and float(bits) >= 0

    def test_the_maps_of_the_example_hold(self, run: Run, tmp_path: Path):
        done = run("explain", "--output", tmp_path / "example.json")
        assert (done.status, done.err) == (0, "")
        example = Explanation.load(tmp_path / "example.json")
        assert example.check is not None
        assert [example.check[name]["verdict"] for name in ("image", "text")] == ["holds", "holds"]
        assert example.caption == "here is a yellow moon"
        assert {token for token, _ in example.top_tokens(2)} == {"yellow", "moon"}

    @pytest.mark.parametrize("suffix", [".png", ".html", ".npz", ".json", ".PNG"])
    def test_a_pair_in_every_format(self, run: Run, checkpoint: Path, picture: Path, tmp_path: Path, suffix: str):
        target = tmp_path / f"result{suffix}"
        status, out, err = run("explain", picture, CAPTION, "--model", checkpoint, "--output", target, *QUICK)
        assert (status, err) == (0, "")
        assert set(files_in(tmp_path)) == {"picture.png", target.name}
        kind = "picture" if suffix.lower() == ".png" else "written"
        assert out.splitlines()[0] == f"caption  {CAPTION}" and out.splitlines()[-1] == f"{kind}  {target}"
        if suffix.lower() == ".png":
            with Image.open(target) as written:
                written.load()
        elif suffix == ".html":
            page = target.read_text(encoding="utf-8")
            assert CAPTION in page and "check: text map" in page
        else:
            loaded = Explanation.load(target)
            assert loaded.check_lines == [line[9:] for line in out.splitlines()[4:6]]
            assert loaded.caption == CAPTION and loaded.image_bits.shape == (64, 64)
            assert f"score    {loaded.score:.3f} " in out
            assert f"image    {loaded.image_total_bits:.1f} bits" in out
            assert f"text     {loaded.token_total_bits:.1f} bits" in out
            assert ", ".join(f"{token} {bits:.2f}" for token, bits in loaded.top_tokens(5)) in out

    def test_without_options_the_settings_are_the_method_s(
        self, run: Run, checkpoint: Path, picture: Path, tmp_path: Path
    ):
        path = tmp_path / "default.npz"
        assert run("explain", picture, CAPTION, "--model", checkpoint, "--output", path).status == 0
        plain = explain(DualEncoder.from_pretrained(checkpoint), picture, CAPTION, seed=0)[0]
        plain.save(tmp_path / "plain.npz")
        assert Explanation.load(path).settings == Explanation.load(tmp_path / "plain.npz").settings

    def test_a_model_comes_from_a_function(
        self, run: Run, checkpoint: Path, own_model: str, picture: Path, tmp_path: Path
    ):
        before, path = list(sys.path), tmp_path / "own.npz"
        from_function = run("explain", picture, CAPTION, "--model", f"{own_model}:model", "--output", path, *QUICK)
        assert (from_function.status, from_function.err, sys.path) == (0, "", before)
        assert run("explain", picture, CAPTION, "--model", checkpoint, "--output", path, *QUICK) == from_function

    @pytest.mark.filterwarnings("always::captum_m2ib.NothingToExplainWarning")
    def test_the_check_can_be_left_out(self, run: Run, checkpoint: Path, picture: Path, tmp_path: Path):
        target = tmp_path / "result.json"
        given = ("explain", picture, "red circle " * 8, "--model", checkpoint, "--output", target, *QUICK)
        status, out, err = run(*given)
        assert (status, err) == (0, "") and "fails: the score is about as high" in out
        status, out, err = run(*given, "--no-check")
        # What the check would have said is a warning then.
        assert status == 0 and "little to explain" in err and "check  " not in out and len(out.splitlines()) == 5
        assert Explanation.load(target).check is None

    @pytest.mark.filterwarnings("ignore::captum_m2ib.metrics.bypass.BypassWarning")
    def test_options_reach_the_method(self, run: Run, checkpoint: Path, picture: Path, tmp_path: Path):
        target = tmp_path / "result.npz"

        def settings(*options: str) -> dict[str, Any]:
            assert run("explain", picture, CAPTION, "--model", checkpoint, "--output", target, *options).status == 0
            return Explanation.load(target).settings

        plain = settings(*QUICK)
        assert plain["layers"] == ["inputs[0]", "text_model.embeddings"]
        assert (plain["n_steps"], plain["n_samples"], plain["seed"], plain["joint"]) == ([2, 2], [2, 2], 0, False)
        other = settings("--steps", "1", "--samples", "3", "--seed", "7", "--beta", "0.25", "--joint")
        chosen = {"n_steps": [1, 1], "n_samples": [3, 3], "seed": 7, "beta": [0.25, 0.25], "joint": True}
        assert {name: other[name] for name in chosen} == chosen
        published = settings("--published", *QUICK)
        assert published["layers"] == ["vision_model.encoder.layers.1", TEXT_BLOCK]
        assert published["priors"] == ["N(0, variance)"] * 2
        named = settings("--layers", "vision_model.encoder.layers.1.mlp", TEXT_BLOCK, *QUICK)
        assert named["layers"] == ["vision_model.encoder.layers.1.mlp", TEXT_BLOCK]
        mixed = settings("--layers", "inputs[0]", TEXT_BLOCK, *QUICK)
        assert mixed["layers"] == ["inputs[0]", TEXT_BLOCK] and mixed["priors"] == ["pair", "N(0, variance)"]

    @pytest.mark.parametrize(
        "name", [name for name, method in METHODS.items() if name != "rise" and not method.late_only]
    )
    def test_every_method(self, run: Run, checkpoint: Path, picture: Path, tmp_path: Path, name: str):
        target = tmp_path / "result.npz"
        given = ("explain", picture, CAPTION, "--model", checkpoint, "--output", target)
        status, out, err = run(*given, "--method", name, *(QUICK if name.startswith("m2ib") else ()))
        assert (status, err) == (0, "")
        found = Explanation.load(target)
        assert found.unit == unit_of(method_named(name, DualEncoder.from_pretrained(checkpoint)))
        image, text = (line.partition(" ")[2].strip() for line in out.splitlines()[2:4])
        pattern = {
            "bits": r"\d+\.\d bits",
            "score": r"-?[\d.e-]+ units of the score",
            "relative": "relative values",
        }[found.unit]
        assert re.fullmatch(pattern, image) and re.fullmatch(pattern + "; most in: .*", text)
        assert out.count(" map ") == 2

    def test_settings_reach_another_method(self, run: Run, checkpoint: Path, picture: Path, tmp_path: Path):
        target = tmp_path / "result.npz"
        options = ("--steps", 3, "--layers", IMAGE_BLOCK, TEXT_BLOCK, "--output", target)
        assert run("explain", picture, CAPTION, "--model", checkpoint, "--method", "nib", *options).status == 0
        found = Explanation.load(target)
        layers = [IMAGE_BLOCK, TEXT_BLOCK]
        assert found.settings == {"method": "NarrowingInfoBottleneck", "layers": layers, "n_steps": 3}

    def test_methods_and_captions_side_by_side(self, run: Run, checkpoint: Path, picture: Path, tmp_path: Path):
        target = tmp_path / "both.svg"
        options = ("--model", checkpoint, "--output", target)
        # The names of methods may come before the picture, too.
        status, out, err = run("explain", *options, "--method", "legrad", "nib", picture, CAPTION, "a red star")
        assert (status, err) == (0, "")
        assert re.findall(r"^(?:method|caption) +(.*?)(?:, .*)?$", out, re.M) == [
            *("legrad", CAPTION, "a red star"),
            *("nib", CAPTION, "a red star"),
        ]
        assert out.endswith(f"picture  {target}\n") and target.read_bytes().startswith(b"<?xml")
        assert run("explain", *options, "--method", "legrad", picture, CAPTION).status == 0
        refused = run("explain", picture, CAPTION, "a red star", "--output", tmp_path / "both.npz")
        assert refused.status == 2 and "must end in one of .png, .pdf, .svg, .html, got 'both.npz'" in refused.err

    def test_why_this_caption_rather_than_that(self, run: Run, checkpoint: Path, picture: Path, tmp_path: Path):
        target = tmp_path / "result.json"
        given = ("explain", picture, CAPTION, "--model", checkpoint, "--output", target, *QUICK)
        status, out, err = run(*given, "--instead-of", "a red star")
        assert (status, err) == (0, "")
        assert re.search(r"^instead  a red star \(-?\d\.\d{3}\)$", out, re.M)
        assert Explanation.load(target).settings["method"] == "ContrastiveInfoBottleneck"

    def test_help_names_every_method(self, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit):
            main(["explain", "--help"])
        # Lines are broken at hyphens too.
        shown = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
        assert all(f"{name}: {method.about}" in shown for name, method in METHODS.items())

    @pytest.mark.parametrize("suffix", [".png", ".html"])
    def test_the_whole_picture(self, run: Run, checkpoint: Path, picture: Path, tmp_path: Path, suffix: str):
        target = tmp_path / f"result{suffix}"
        given = ("explain", picture, CAPTION, "--model", checkpoint, "--output", target, "--no-check", *QUICK)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert run(*given).status == 0
            seen = target.read_bytes()
            assert run(*given, "--whole").status == 0
        assert target.read_bytes() != seen

    def test_same_seed_same_file(self, run: Run, checkpoint: Path, picture: Path, tmp_path: Path):
        maps = []
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            target = tmp_path / f"{name}.npz"
            options = ("--model", checkpoint, "--output", target, "--seed", seed, *QUICK)
            assert run("explain", picture, CAPTION, *options).status == 0
            maps.append(Explanation.load(target).image_bits)
        assert np.array_equal(maps[0], maps[1]) and not np.array_equal(maps[0], maps[2])

    @pytest.mark.filterwarnings("always::UserWarning")
    def test_a_warning_is_one_line_and_the_work_goes_on(
        self, run: Run, checkpoint: Path, picture: Path, tmp_path: Path
    ):
        target = tmp_path / "result.json"
        result = run("explain", picture, "red circle " * 30, "--model", checkpoint, "--output", target, *QUICK)
        assert result.status == 0 and target.exists()
        assert re.fullmatch(r"captum-m2ib: warning: captions: the model reads 32 tokens.*\n", result.err)

    def test_caption_that_the_terminal_cannot_show(self, checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding="ascii")
        monkeypatch.setattr(sys, "stdout", stream)
        target = tmp_path / "result.json"
        arguments = ["explain", str(picture), "a röd circle", "--model", str(checkpoint), "--output", str(target)]
        with pytest.MonkeyPatch.context():
            status = _quietly(arguments)
        stream.flush()
        assert status == 0 and target.exists()
        assert b"score" in raw.getvalue()

    def test_interrupted(self, run: Run, checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch):
        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("captum_m2ib.explanations.explain.explain", interrupt)
        result = run("explain", picture, CAPTION, "--model", checkpoint, "--output", tmp_path / "result.png")
        assert result == Result(130, "", "captum-m2ib: interrupted.\n")
        assert set(files_in(tmp_path)) == {"picture.png"}


def _quietly(arguments: list[str]) -> int:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return main([*arguments, *QUICK])


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises a picture that is not there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def jpeg_cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


PICTURES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda p: None, r"IMAGE: there is no file .*picture.png; check the path"),
    "truncated": (lambda p: p.write_bytes(jpeg_cut(p.read_bytes())), r"IMAGE: cannot read .*truncated.*expected"),
    "empty": (lambda p: p.write_bytes(b""), r"IMAGE: cannot read .*picture.png as a picture.*expected an intact"),
    "no picture": (lambda p: p.write_text("words"), r"IMAGE: cannot read .*picture.png as a picture.*expected"),
    "directory": (lambda p: (p.unlink(), p.mkdir()), r"IMAGE: .* is not a file; give the path"),
    "large": (lambda p: p.write_bytes(png_of_size(8000, 8000)), r"IMAGE: .*pixels.*resize it first"),
    "larger": (lambda p: p.write_bytes(png_of_size(10_000, 10_000)), r"IMAGE: .*pixels.*resize it first"),
    "bomb": (lambda p: p.write_bytes(png_of_size(60_000, 60_000)), r"IMAGE: .*pixels.*resize it first"),
}

OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "no steps": (("--steps", "0"), r"n_steps: expected .* at least 1, got 0"),
    "no samples": (("--samples", "0"), r"n_samples: expected .* at least 1, got 0"),
    "negative seed": (("--seed", "-1"), r"seed: expected .* at least 0, got -1"),
    "negative beta": (("--beta", "-1"), r"beta: expected .* at least 0, got -1"),
    "beta not a number": (("--beta", "nan"), r"beta: expected a finite number.* got nan"),
    "unknown image layer": (
        ("--layers", "vision_model.encoder.layer.0", TEXT_BLOCK),
        r"layers: no layer named 'vision_model.encoder.layer.0'.*near matches: .*vision_model.encoder.layers.0\b",
    ),
    "unknown text layer": (
        ("--layers", IMAGE_BLOCK, "text_model.embedings"),
        r"layers: no layer named 'text_model.embedings'.*near matches: .*text_model.embeddings\b",
    ),
    "layer like none": (("--layers", IMAGE_BLOCK, "zzz"), r"layers: no layer named 'zzz'.*it has: .*text_model"),
    "empty layer name": (("--layers", "", TEXT_BLOCK), r"layers: no layer named ''.*: \w+"),
    "layers of the wrong towers": (("--layers", TEXT_BLOCK, IMAGE_BLOCK), r"layouts: expected"),
    "layers twice over": (
        ("--published", "--layers", IMAGE_BLOCK, TEXT_BLOCK),
        r"--layers.*--published|--published.*--l",
    ),
    "unknown method": (
        ("--method", "legard"),
        r"--method: expected one of m2ib, .*legrad, m2ib-guided, similarity-map, rise, got 'legard'",
    ),
    "two methods": (("--published", "--method", "legrad"), r"--published.*--method legrad"),
    "words of a cosine": (("--tokens", "red"), r"tokens: CLIPModel scores a caption as a whole.*leave tokens out"),
    "unknown among methods": (("--method", "nib", "legard"), r"--method: expected one of m2ib, .*, got 'legard'"),
    "instead of by another method": (("--method", "nib", "--instead-of", "a"), r"--instead-of: is for the method m2ib"),
    "fixed layers": (("--method", "m2ib-published", "--layers", IMAGE_BLOCK, TEXT_BLOCK), r"layers: those of m2ib-p"),
    "settings of another method": (
        ("--method", "legrad", "--beta", "1", "--joint"),
        r"--beta, --steps, --samples, --joint: legrad takes no such setting; leave it out",
    ),
    "whole picture as data": (("--whole", "--output", "result.npz"), r"--whole: is for the figure or page.*result.npz"),
    "unknown device": (("--device", "nonsense"), r"device"),
}


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def only_config(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()


FIRST_WEIGHT = "vision_model.encoder.layers.0.mlp.fc1.weight"

CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no such directory": (shutil.rmtree, r"model: .*model is not a directory; expected a checkpoint directory"),
    "empty directory": (
        lambda d: (shutil.rmtree(d), d.mkdir()),
        r"model: .*holds no config.json; expected a transformers checkpoint",
    ),
    "a file": (lambda d: (shutil.rmtree(d), d.write_text("words")), r"model: .*is not a directory; expected"),
    "only a configuration": (only_config, r"model: .*holds no safetensors weights; save the model"),
    "without weights": (lambda d: (d / "model.safetensors").unlink(), r"model: .*holds no safetensors weights"),
    "truncated weights": (lambda d: cut(d / "model.safetensors"), r"model: .*model"),
    "corrupt weights": (lambda d: (d / "model.safetensors").write_bytes(b"words" * 99), r"model: .*model"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), r"model: .*model"),
    "weights missing": (change_tensors(lambda tensors: tensors.pop(FIRST_WEIGHT)), rf"model: .*{FIRST_WEIGHT}"),
    "weights of another shape": (
        change_tensors(lambda tensors: tensors.update({FIRST_WEIGHT: torch.zeros(3, 3)})),
        rf"model: .*{FIRST_WEIGHT}|model: .*shape",
    ),
    "weights not numbers": (
        change_tensors(lambda tensors: tensors[FIRST_WEIGHT].fill_(float("nan"))),
        r"NaN|finite",
    ),
    "configuration not JSON": (lambda d: (d / "config.json").write_text("{"), r"config"),
    "configuration of nothing": (lambda d: (d / "config.json").write_text("{}"), r"model_type"),
    "without picture processor": (lambda d: (d / "preprocessor_config.json").unlink(), r"processor"),
    "without tokenizer": (lambda d: (d / "tokenizer.json").unlink(), r"processor|tokenizer"),
    "corrupt tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), r"processor|tokenizer"),
    "corrupt statistics": (
        lambda d: (d / "bottleneck_statistics.safetensors").write_bytes(b"words" * 9),
        r"bottleneck_statistics",
    ),
}


OWN = """
from captum_m2ib import DualEncoder

number = 7

def model():
    return DualEncoder.from_pretrained({checkpoint!r}).train()

def bare():
    encoder = model()
    encoder.processor = None
    return encoder

def tower():
    return model().model

def nothing():
    pass

def greedy(size):
    pass

def lacking():
    import not_to_be_found_anywhere

def told():
    raise ImportError("parts: timm cannot be imported; install it with: pip install timm.")
"""

FACTORIES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "no module": ("no_such.module:model", (), r"model: there is no module no_such for no_such.module:model; check"),
    "no function": ("{}:none", (), r"model: (\w+) has no function none; check the name"),
    "no callable": ("{}:number", (), r"model: expected \w+:number to be a function, got int; check the name"),
    "without a processor": (
        "{}:bare",
        (),
        r"model: expected .*a DualEncoder with a processor, got one without; return",
    ),
    "another module": ("{}:tower", (), r"model: expected .*a DualEncoder with a processor, got CLIPModel; return"),
    "nothing": ("{}:nothing", (), r"model: expected .*a DualEncoder with a processor, got NoneType; return"),
    "with arguments": ("{}:greedy", (), r"greedy\(\) missing 1 required positional argument: 'size'"),
    "lacking a module": ("{}:lacking", (), r"model: \w+:lacking needs .*: No module named 'not_to_be_found_anywhere'"),
    "lacking a package": ("{}:told", (), r"model: \w+:told needs .*timm cannot be imported; install it with: pip"),
    "of a revision": ("{}:model", ("--revision", "main"), r"revision: \w+:model is a Python function.* leave it out"),
    "on no device": ("{}:model", ("--device", "abacus"), r"--device: there is no 'abacus' here; choose one of cpu"),
}


@pytest.fixture
def own_model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with functions that make a model, in the working directory; a name that no other test imported."""
    folder = tmp_path_factory.mktemp("own")
    name = f"own_model_of_{folder.name}"
    (folder / f"{name}.py").write_text(OWN.format(checkpoint=str(checkpoint)))
    monkeypatch.chdir(folder)
    return name


@pytest.mark.filterwarnings("always::UserWarning", "always::RuntimeWarning")
class TestBadInput:
    """As a user meets it, with warnings shown rather than raised."""

    @pytest.fixture
    def refused(self, run: Run, checkpoint: Path, picture: Path, tmp_path: Path) -> Callable[..., None]:
        def check(*options: Any, says: str, arguments: tuple[Any, ...] = (picture, CAPTION), model: Any = None) -> None:
            before = files_in(tmp_path)
            options = options if "--output" in options else (*options, "--output", tmp_path / "result.png")
            assert_one_line(run("explain", *arguments, "--model", model or checkpoint, *QUICK, *options), says)
            assert files_in(tmp_path) == before

        return check

    @pytest.mark.parametrize("name", PICTURES)
    def test_picture(self, refused: Callable[..., None], picture: Path, name: str):
        spoil, says = PICTURES[name]
        if name == "missing":
            picture.unlink()
        spoil(picture)
        refused(says=says)

    def test_truncated_jpeg(self, refused: Callable[..., None], tmp_path: Path):
        path = tmp_path / "picture.jpg"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        path.write_bytes(jpeg_cut(path.read_bytes()))
        refused(says=r"IMAGE: cannot read .*picture.jpg.*truncated", arguments=(path, CAPTION))

    @pytest.mark.parametrize("path", ["", "pic\0ture.png"], ids=["empty", "null byte"])
    def test_path_of_no_file(self, refused: Callable[..., None], path: str):
        refused(says=r"IMAGE: .*(path|file)", arguments=(path, CAPTION))

    @pytest.mark.parametrize("caption", ["", "  ", "\t\n"])
    def test_empty_caption(self, refused: Callable[..., None], picture: Path, caption: str):
        refused(says=r"expected a caption with at least one word, got an empty one", arguments=(picture, caption))

    def test_no_caption(self, refused: Callable[..., None], picture: Path):
        refused(says=r"TEXT: expected a caption.*captum-m2ib explain IMAGE TEXT", arguments=(picture,))

    def test_caption_that_is_no_text(self, refused: Callable[..., None], picture: Path):
        refused(says=r"caption", arguments=(picture, "red \udcff circle"))

    @pytest.mark.parametrize("name", OPTIONS)
    def test_option(self, refused: Callable[..., None], name: str):
        options, says = OPTIONS[name]
        refused(*options, says=says)

    def test_device_that_is_not_there(self, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
        def fail(*_: Any, **__: Any) -> None:
            raise AssertionError("Torch not compiled with CUDA enabled")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "_lazy_init", fail)
        refused("--device", "cuda", says=r"(?i)device|cuda")

    @pytest.mark.parametrize("name", ["result.eps", "result", "result.png.txt"])
    def test_output_of_an_unknown_kind(self, refused: Callable[..., None], tmp_path: Path, name: str):
        refused("--output", tmp_path / name, says=r"must end in one of .png, .pdf, .svg, .html, .npz, .json, got")

    def test_output_in_a_missing_directory(self, refused: Callable[..., None], tmp_path: Path):
        refused("--output", tmp_path / "none" / "result.png", says=r"directory '.*none' does not exist: create it")

    def test_output_that_is_a_directory(self, refused: Callable[..., None], tmp_path: Path, monkeypatch):
        target = tmp_path / "result.png"
        target.mkdir()
        monkeypatch.setattr(
            "captum_m2ib.explanations.explain.explain", lambda *_, **__: pytest.fail("work before the check")
        )
        refused("--output", target, says=r"result.png.*directory")

    def test_output_is_checked_before_the_model_is_loaded(self, refused: Callable[..., None], tmp_path: Path):
        refused("--output", tmp_path / "result.eps", says=r"must end in", model=tmp_path / "none")

    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_checkpoint(self, refused: Callable[..., None], checkpoint: Path, tmp_path: Path, name: str):
        spoil, says = CHECKPOINTS[name]
        folder = tmp_path / "model"
        shutil.copytree(checkpoint, folder)
        spoil(folder)
        refused(says=says, model=folder)

    def test_relative_directory_that_is_not_there(self, refused: Callable[..., None], tmp_path: Path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        refused(says=r"model: ./none is not a directory", model="./none")

    @pytest.mark.parametrize("name", ["no-one/no-such-model", "no-such-model", "a/b/c"])
    def test_unknown_hub_id(self, refused: Callable[..., None], name: str):
        refused(says=re.escape(name), model=name)

    @pytest.mark.parametrize("name", FACTORIES)
    def test_function(self, refused: Callable[..., None], own_model: str, name: str):
        model, options, says = FACTORIES[name]
        refused(*options, says=says, model=model.format(own_model))

    def test_an_older_output_is_kept(self, refused: Callable[..., None], tmp_path: Path):
        (tmp_path / "result.png").write_bytes(b"older")
        refused("--layers", "zzz", "zzz", says=r"no layer named")


class TestTrainScenes:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        monkeypatch.setattr("captum_m2ib.scenes.train", lambda *given, **options: calls.append((given, options)))
        return calls

    def test_defaults(self, run: Run, calls: list[Any]):
        assert run("train-scenes", "--output", "folder") == Result(0, "", "")
        assert calls == [
            (("folder",), {"seed": 0, "ground": "textured", "device": None, "resume": True, "overwrite": False})
        ]

    @pytest.mark.parametrize("ground", GROUNDS)
    def test_every_option(self, run: Run, calls: list[Any], ground: str):
        options = ("--steps", 5, "--seed", 3, "--ground", ground, "--device", "cpu", "--restart", "--overwrite")
        assert run("train-scenes", "--output", "folder", *options).status == 0
        expected = {"steps": 5, "seed": 3, "ground": ground, "device": "cpu", "resume": False, "overwrite": True}
        assert calls == [(("folder",), expected)]

    def test_output_is_required(self, run: Run, calls: list[Any], capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit) as stop:
            run("train-scenes")
        assert stop.value.code == 2 and "--output" in capsys.readouterr().err and not calls

    def test_what_training_refuses(self, run: Run, tmp_path: Path):
        (tmp_path / "there").mkdir()
        assert_one_line(run("train-scenes", "--output", tmp_path / "new", "--steps", 0), r"steps: expected 1 or more")
        assert_one_line(run("train-scenes", "--output", tmp_path / "there"), r"output: .*choose another")
        assert [path.name for path in tmp_path.iterdir()] == ["there"]

    @pytest.mark.parametrize("device", [(), ("--device", "cpu")])
    def test_negative_seed_is_refused_before_any_work(self, run: Run, tmp_path: Path, device: tuple[str, ...]):
        result = run("train-scenes", "--output", tmp_path / "new", "--steps", 1, "--seed", -1, *device)
        assert_one_line(result, r"captum-m2ib: seed: expected .*got -1")
        assert not list(tmp_path.iterdir())

    def test_corrupt_state_of_an_interrupted_run(self, run: Run, tmp_path: Path):
        (tmp_path / "new.training.safetensors").write_bytes(b"words" * 9)
        result = run("train-scenes", "--output", tmp_path / "new", "--steps", 1, "--device", "cpu")
        assert_one_line(result, r"new\.training\.safetensors")

    @pytest.mark.parametrize("error", [FloatingPointError, FileExistsError, RuntimeError, ValueError, MemoryError])
    def test_an_error_of_training_is_one_line(self, run: Run, monkeypatch: pytest.MonkeyPatch, error: type[Exception]):
        def fail(*_: Any, **__: Any) -> None:
            raise error("lr: expected training to stay finite,\n  got nan; pass a lower lr.")

        monkeypatch.setattr("captum_m2ib.scenes.train", fail)
        result = run("train-scenes", "--output", "folder")
        assert_one_line(result, r"lr: expected training to stay finite, got nan; pass a lower lr\.")

    def test_interrupted(self, run: Run, monkeypatch: pytest.MonkeyPatch):
        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("captum_m2ib.scenes.train", interrupt)
        assert run("train-scenes", "--output", "folder") == Result(130, "", "captum-m2ib: interrupted.\n")


class TestBenchmark:
    def test_speed(self, run: Run, monkeypatch: pytest.MonkeyPatch):
        calls = []
        monkeypatch.setattr("captum_m2ib.benchmark.speed.ways.measure", lambda *given: calls.append(given) or "report")
        monkeypatch.setattr("captum_m2ib.benchmark.speed.ways.render", lambda report: f"table of the {report}")
        options = ("--repeats", 2, "--batch", 5, "--layer", 1, "--device", "cpu")
        assert run("benchmark", "speed", *options) == Result(0, "table of the report\n", "")
        monkeypatch.setattr("captum_m2ib.benchmark.speed.ways.write", lambda *given: calls.append(given))
        assert run("benchmark", "speed", "--csv", "costs.csv").status == 0
        assert calls == [(2, 5, 1, "cpu"), (3, 8, 9, "cpu"), ("report", "costs.csv")]

    @pytest.mark.parametrize("name", ["repeats", "batch"])
    def test_speed_with_arguments_that_cannot_be(self, run: Run, name: str):
        assert_one_line(run("benchmark", "speed", f"--{name}", 0), rf"{name}: expected at least 1, got 0")


class TestProcess:
    """The same through ``python -m captum_m2ib``."""

    def process(self, folder: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
        source = str(Path(captum_m2ib.__file__).parents[1])
        path = os.pathsep.join([source, os.environ["PYTHONPATH"]])
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "captum_m2ib", *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)

    def test_explains(self, checkpoint: Path, picture: Path, tmp_path: Path):
        done = self.process(
            tmp_path, "explain", picture, CAPTION, "--model", checkpoint, "--output", "result.html", *QUICK
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("written  result.html\n")
        assert set(files_in(tmp_path)) == {"picture.png", "result.html"}

    def test_refuses(self, checkpoint: Path, picture: Path, tmp_path: Path):
        folder = tmp_path / "model"
        shutil.copytree(checkpoint, folder)
        (folder / "model.safetensors").write_bytes(b"words" * 99)
        before = files_in(tmp_path)
        done = self.process(tmp_path, "explain", picture, CAPTION, "--model", folder)
        assert_one_line(Result(done.returncode, done.stdout, done.stderr), r"model: .*model")
        assert files_in(tmp_path) == before


def test_version_and_help(capsys: pytest.CaptureFixture[str]):
    for argument, says in (("--version", captum_m2ib.__version__), ("--help", "train-scenes")):
        with pytest.raises(SystemExit) as stop:
            main([argument])
        assert stop.value.code == 0 and says in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["benchmark"], ["explain", "--steps", "x"], ["explain", "--nothing"]]
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and "Traceback" not in err and "error: " in err.splitlines()[-1]


def test_a_programming_mistake_is_not_hidden(run: Run, checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch):
    def mistake(*_: Any, **__: Any) -> None:
        raise NameError("name 'x' is not defined")

    monkeypatch.setattr(MultiModalInfoBottleneck, "__init__", mistake)
    with pytest.raises(NameError):
        run("explain", picture, CAPTION, "--model", checkpoint, "--output", tmp_path / "result.png")
