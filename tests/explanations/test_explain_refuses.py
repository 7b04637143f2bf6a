"""Every mistake in what ``explain`` is given ends in one helpful line and status 2, with warnings shown, not raised."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import CAPTION, IMAGE_BLOCK, TEXT_BLOCK
from PIL import Image

pytestmark = pytest.mark.filterwarnings("always::UserWarning", "always::RuntimeWarning")


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


@pytest.mark.parametrize("name", PICTURES)
def test_picture(refused: Callable[..., None], picture: Path, name: str):
    spoil, says = PICTURES[name]
    if name == "missing":
        picture.unlink()
    spoil(picture)
    refused(says=says)


def test_truncated_jpeg(refused: Callable[..., None], tmp_path: Path):
    path = tmp_path / "picture.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(jpeg_cut(path.read_bytes()))
    refused(says=r"IMAGE: cannot read .*picture.jpg.*truncated", arguments=(path, CAPTION))


@pytest.mark.parametrize("path", ["", "pic\0ture.png"], ids=["empty", "null byte"])
def test_path_of_no_file(refused: Callable[..., None], path: str):
    refused(says=r"IMAGE: .*(path|file)", arguments=(path, CAPTION))


@pytest.mark.parametrize("caption", ["", "  ", "\t\n"])
def test_empty_caption(refused: Callable[..., None], picture: Path, caption: str):
    refused(says=r"expected a caption with at least one word, got an empty one", arguments=(picture, caption))


def test_no_caption(refused: Callable[..., None], picture: Path):
    refused(says=r"TEXT: expected a caption.*captum-m2ib explain IMAGE TEXT", arguments=(picture,))


def test_caption_that_is_no_text(refused: Callable[..., None], picture: Path):
    refused(says=r"caption", arguments=(picture, "red \udcff circle"))


@pytest.mark.parametrize("name", OPTIONS)
def test_option(refused: Callable[..., None], name: str):
    options, says = OPTIONS[name]
    refused(*options, says=says)


@pytest.mark.parametrize("name", ["result.eps", "result", "result.png.txt"])
def test_output_of_an_unknown_kind(refused: Callable[..., None], tmp_path: Path, name: str):
    refused("--output", tmp_path / name, says=r"must end in one of .png, .pdf, .svg, .html, .npz, .json, got")


def test_output_in_a_missing_directory(refused: Callable[..., None], tmp_path: Path):
    refused("--output", tmp_path / "none" / "result.png", says=r"directory '.*none' does not exist: create it")


def test_output_that_is_a_directory(refused: Callable[..., None], tmp_path: Path, monkeypatch):
    target = tmp_path / "result.png"
    target.mkdir()
    monkeypatch.setattr(
        "captum_m2ib.explanations.explain.explain", lambda *_, **__: pytest.fail("work before the check")
    )
    refused("--output", target, says=r"result.png.*directory")


def test_output_is_checked_before_the_model_is_loaded(refused: Callable[..., None], tmp_path: Path):
    refused("--output", tmp_path / "result.eps", says=r"must end in", model=tmp_path / "none")


def test_an_older_output_is_kept(refused: Callable[..., None], tmp_path: Path):
    (tmp_path / "result.png").write_bytes(b"older")
    refused("--layers", "zzz", "zzz", says=r"no layer named")
