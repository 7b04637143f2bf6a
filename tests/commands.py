"""The command line as tests call it: in this process, offline, with what it returns and prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from captum_m2ib.cli import main


class Result(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Result]

CAPTION = "a picture with a red circle"
IMAGE_BLOCK, TEXT_BLOCK = "vision_model.encoder.layers.0", "text_model.encoder.layers.0"
QUICK = ("--steps", "2", "--samples", "2")


def runner(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *first: Any) -> Run:
    """Calls the command with these arguments and those of the call."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: Any) -> Result:
        status = main([str(argument) for argument in (*first, *arguments)])
        return Result(status, *capsys.readouterr())

    return call


def assert_one_line(result: Result, pattern: str) -> None:
    """Refused, in one line that begins like this."""
    assert result.status == 2 and result.out == "", result
    assert result.err.count("\n") == 1 and result.err.endswith("\n"), result.err
    assert re.match(rf"captum-m2ib: {pattern}", result.err), result.err


def assert_told(result: Result, says: str) -> None:
    """Refused, in one line that says this somewhere."""
    assert_one_line(result, rf".*(?:{says})")
    assert "Traceback" not in result.err


def refuser(run: Run, folder: Path, picture: Path, checkpoint: Path) -> Callable[..., None]:
    """Asks ``explain`` for what it must refuse, in one line and without a trace in the folder."""

    def check(*options: Any, says: str, arguments: tuple[Any, ...] = (picture, CAPTION), model: Any = None) -> None:
        before = files_in(folder)
        options = options if "--output" in options else (*options, "--output", folder / "result.png")
        assert_told(run("explain", *arguments, "--model", model or checkpoint, *QUICK, *options), says)
        assert files_in(folder) == before

    return check


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def picture_in(folder: Path) -> Path:
    path = folder / "picture.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path
