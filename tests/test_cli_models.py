"""The option ``--model``: a checkpoint, a name on the hub or a function, and what is wrong with one in one line."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import CAPTION, QUICK, Run
from safetensors.torch import load_file, save_file

# As a user meets them, not raised.
SHOWN = pytest.mark.filterwarnings("always::UserWarning", "always::RuntimeWarning")


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


def test_a_model_comes_from_a_function(run: Run, checkpoint: Path, own_model: str, picture: Path, tmp_path: Path):
    before, path = list(sys.path), tmp_path / "own.npz"
    from_function = run("explain", picture, CAPTION, "--model", f"{own_model}:model", "--output", path, *QUICK)
    assert (from_function.status, from_function.err, sys.path) == (0, "", before)
    assert run("explain", picture, CAPTION, "--model", checkpoint, "--output", path, *QUICK) == from_function


@SHOWN
def test_device_that_is_not_there(refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "_lazy_init", fail)
    refused("--device", "cuda", says=r"[Dd]evice|CUDA")


@SHOWN
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(refused: Callable[..., None], checkpoint: Path, tmp_path: Path, name: str):
    spoil, says = CHECKPOINTS[name]
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    spoil(folder)
    refused(says=says, model=folder)


@SHOWN
def test_relative_directory_that_is_not_there(refused: Callable[..., None], tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(says=r"model: ./none is not a directory", model="./none")


@SHOWN
@pytest.mark.parametrize("name", ["no-one/no-such-model", "no-such-model", "a/b/c"])
def test_unknown_hub_id(refused: Callable[..., None], name: str):
    refused(says=re.escape(name), model=name)


@SHOWN
@pytest.mark.parametrize("name", FACTORIES)
def test_function(refused: Callable[..., None], own_model: str, name: str):
    model, options, says = FACTORIES[name]
    refused(*options, says=says, model=model.format(own_model))
