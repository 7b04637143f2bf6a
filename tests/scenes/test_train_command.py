"""The command ``train-scenes``: what it asks of the training, and what it refuses in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import Result, Run, assert_told

from captum_m2ib.scenes.grounds import GROUNDS


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr("captum_m2ib.scenes.train", lambda *given, **options: calls.append((given, options)))
    return calls


def test_defaults(run: Run, calls: list[Any]):
    assert run("train-scenes", "--output", "folder") == Result(0, "", "")
    assert calls == [
        (("folder",), {"seed": 0, "ground": "textured", "device": None, "resume": True, "overwrite": False})
    ]


@pytest.mark.parametrize("ground", GROUNDS)
def test_every_option(run: Run, calls: list[Any], ground: str):
    options = ("--steps", 5, "--seed", 3, "--ground", ground, "--device", "cpu", "--restart", "--overwrite")
    assert run("train-scenes", "--output", "folder", *options).status == 0
    expected = {"steps": 5, "seed": 3, "ground": ground, "device": "cpu", "resume": False, "overwrite": True}
    assert calls == [(("folder",), expected)]


def test_output_is_required(run: Run, calls: list[Any], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        run("train-scenes")
    assert stop.value.code == 2 and "--output" in capsys.readouterr().err and not calls


def test_what_training_refuses(run: Run, tmp_path: Path):
    (tmp_path / "there").mkdir()
    assert_told(run("train-scenes", "--output", tmp_path / "new", "--steps", 0), r"steps: expected 1 or more")
    assert_told(run("train-scenes", "--output", tmp_path / "there"), r"output: .*choose another")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("device", [(), ("--device", "cpu")])
def test_negative_seed_is_refused_before_any_work(run: Run, tmp_path: Path, device: tuple[str, ...]):
    result = run("train-scenes", "--output", tmp_path / "new", "--steps", 1, "--seed", -1, *device)
    assert_told(result, r"seed: expected .*got -1")
    assert not list(tmp_path.iterdir())


def test_corrupt_state_of_an_interrupted_run(run: Run, tmp_path: Path):
    (tmp_path / "new.training.safetensors").write_bytes(b"words" * 9)
    result = run("train-scenes", "--output", tmp_path / "new", "--steps", 1, "--device", "cpu")
    assert_told(result, r"new\.training\.safetensors")


@pytest.mark.parametrize("error", [FloatingPointError, FileExistsError, RuntimeError, ValueError, MemoryError])
def test_an_error_of_training_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, error: type[Exception]):
    def fail(*_: Any, **__: Any) -> None:
        raise error("lr: expected training to stay finite,\n  got nan; pass a lower lr.")

    monkeypatch.setattr("captum_m2ib.scenes.train", fail)
    result = run("train-scenes", "--output", "folder")
    assert_told(result, r"lr: expected training to stay finite, got nan; pass a lower lr\.")


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("captum_m2ib.scenes.train", interrupt)
    assert run("train-scenes", "--output", "folder") == Result(130, "", "captum-m2ib: interrupted.\n")
