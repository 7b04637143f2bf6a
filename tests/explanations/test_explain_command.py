"""The command ``explain``: what it writes and prints, and which options reach the method."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import CAPTION, IMAGE_BLOCK, QUICK, TEXT_BLOCK, Run, files_in
from PIL import Image

from captum_m2ib import DualEncoder, Explanation, explain
from captum_m2ib.attr.registry import METHODS, method_named, unit_of
from captum_m2ib.cli import main


def test_without_arguments_an_example_is_explained(run: Run, checkpoint: Path, tmp_path: Path, monkeypatch):
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


def test_the_maps_of_the_example_hold(run: Run, tmp_path: Path):
    done = run("explain", "--output", tmp_path / "example.json")
    assert (done.status, done.err) == (0, "")
    example = Explanation.load(tmp_path / "example.json")
    assert example.check is not None
    assert [example.check[name]["verdict"] for name in ("image", "text")] == ["holds", "holds"]
    assert example.caption == "here is a yellow moon"
    assert {token for token, _ in example.top_tokens(2)} == {"yellow", "moon"}


@pytest.mark.parametrize("suffix", [".png", ".html", ".npz", ".json", ".PNG"])
def test_a_pair_in_every_format(run: Run, checkpoint: Path, picture: Path, tmp_path: Path, suffix: str):
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


def test_without_options_the_settings_are_the_method_s(run: Run, checkpoint: Path, picture: Path, tmp_path: Path):
    path = tmp_path / "default.npz"
    assert run("explain", picture, CAPTION, "--model", checkpoint, "--output", path).status == 0
    plain = explain(DualEncoder.from_pretrained(checkpoint), picture, CAPTION, seed=0)[0]
    plain.save(tmp_path / "plain.npz")
    assert Explanation.load(path).settings == Explanation.load(tmp_path / "plain.npz").settings


@pytest.mark.filterwarnings("always::captum_m2ib.NothingToExplainWarning")
def test_the_check_can_be_left_out(run: Run, checkpoint: Path, picture: Path, tmp_path: Path):
    target = tmp_path / "result.json"
    given = ("explain", picture, "red circle " * 8, "--model", checkpoint, "--output", target, *QUICK)
    status, out, err = run(*given)
    assert (status, err) == (0, "") and "fails: the score is about as high" in out
    status, out, err = run(*given, "--no-check")
    # What the check would have said is a warning then.
    assert status == 0 and "little to explain" in err and "check  " not in out and len(out.splitlines()) == 5
    assert Explanation.load(target).check is None


@pytest.mark.filterwarnings("ignore::captum_m2ib.metrics.bypass.BypassWarning")
def test_options_reach_the_method(run: Run, checkpoint: Path, picture: Path, tmp_path: Path):
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


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if name != "rise" and not method.late_only])
def test_every_method(run: Run, checkpoint: Path, picture: Path, tmp_path: Path, name: str):
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


def test_settings_reach_another_method(run: Run, checkpoint: Path, picture: Path, tmp_path: Path):
    target = tmp_path / "result.npz"
    options = ("--steps", 3, "--layers", IMAGE_BLOCK, TEXT_BLOCK, "--output", target)
    assert run("explain", picture, CAPTION, "--model", checkpoint, "--method", "nib", *options).status == 0
    found = Explanation.load(target)
    layers = [IMAGE_BLOCK, TEXT_BLOCK]
    assert found.settings == {"method": "NarrowingInfoBottleneck", "layers": layers, "n_steps": 3}


def test_methods_and_captions_side_by_side(run: Run, checkpoint: Path, picture: Path, tmp_path: Path):
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


def test_why_this_caption_rather_than_that(run: Run, checkpoint: Path, picture: Path, tmp_path: Path):
    target = tmp_path / "result.json"
    given = ("explain", picture, CAPTION, "--model", checkpoint, "--output", target, *QUICK)
    status, out, err = run(*given, "--instead-of", "a red star")
    assert (status, err) == (0, "")
    assert re.search(r"^instead  a red star \(-?\d\.\d{3}\)$", out, re.M)
    assert Explanation.load(target).settings["method"] == "ContrastiveInfoBottleneck"


def test_help_names_every_method(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    # Lines are broken at hyphens too.
    shown = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    assert all(f"{name}: {method.about}" in shown for name, method in METHODS.items())


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_the_whole_picture(run: Run, checkpoint: Path, picture: Path, tmp_path: Path, suffix: str):
    target = tmp_path / f"result{suffix}"
    given = ("explain", picture, CAPTION, "--model", checkpoint, "--output", target, "--no-check", *QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(*given).status == 0
        seen = target.read_bytes()
        assert run(*given, "--whole").status == 0
    assert target.read_bytes() != seen


def test_same_seed_same_file(run: Run, checkpoint: Path, picture: Path, tmp_path: Path):
    maps = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        target = tmp_path / f"{name}.npz"
        options = ("--model", checkpoint, "--output", target, "--seed", seed, *QUICK)
        assert run("explain", picture, CAPTION, *options).status == 0
        maps.append(Explanation.load(target).image_bits)
    assert np.array_equal(maps[0], maps[1]) and not np.array_equal(maps[0], maps[2])
