"""The command line itself: its process, its streams, and how it ends."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from commands import CAPTION, QUICK, Result, Run, assert_told, files_in

import captum_m2ib
from captum_m2ib import MultiModalInfoBottleneck
from captum_m2ib.cli import main


@pytest.mark.filterwarnings("always::UserWarning")
def test_a_warning_is_one_line_and_the_work_goes_on(run: Run, checkpoint: Path, picture: Path, tmp_path: Path):
    target = tmp_path / "result.json"
    result = run("explain", picture, "red circle " * 30, "--model", checkpoint, "--output", target, *QUICK)
    assert result.status == 0 and target.exists()
    assert re.fullmatch(r"captum-m2ib: warning: captions: the model reads 32 tokens.*\n", result.err)


def test_caption_that_the_terminal_cannot_show(checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    target = tmp_path / "result.json"
    arguments = ["explain", str(picture), "a röd circle", "--model", str(checkpoint), "--output", str(target)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        status = main([*arguments, *QUICK])
    stream.flush()
    assert status == 0 and target.exists()
    assert b"score" in raw.getvalue()


def test_interrupted(run: Run, checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch):
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("captum_m2ib.explanations.explain.explain", interrupt)
    result = run("explain", picture, CAPTION, "--model", checkpoint, "--output", tmp_path / "result.png")
    assert result == Result(130, "", "captum-m2ib: interrupted.\n")
    assert set(files_in(tmp_path)) == {"picture.png"}


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
        assert_told(Result(done.returncode, done.stdout, done.stderr), r"model: .*model")
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
