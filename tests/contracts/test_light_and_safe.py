"""Contracts 8 and 9: importing loads nothing heavy, and nothing is ever unpickled."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import captum_m2ib

PACKAGE = Path(captum_m2ib.__file__).parent
HEAVY = [
    "transformers",
    "PIL",
    "matplotlib.pyplot",
    "open_clip",
    "ray",
    "IPython",
    "safetensors",
    "torchvision",
    "torch",
    "numpy",
]


def loaded_by(statement: str) -> set[str]:
    """Which heavy modules a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_loads_nothing_heavy():
    ours = loaded_by("import captum_m2ib")
    needed = loaded_by("import captum.attr, torch, numpy, tqdm.auto") if ours else set()
    assert ours <= needed, f"import captum_m2ib loads {sorted(ours - needed)}"
    assert "transformers" not in ours and "open_clip" not in ours and "ray" not in ours


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_the_command_line_tells_of_itself_at_once(option: str):
    told = f"from captum_m2ib.cli import main\ntry:\n    main([{option!r}])\nexcept SystemExit:\n    pass"
    assert loaded_by(told) == set()


@pytest.mark.parametrize(
    "room", ["captum_m2ib", "captum_m2ib.audit", "captum_m2ib.disent", "captum_m2ib.games", "captum_m2ib.scenes"]
)
def test_every_name_of_a_room_is_found_late(room: str):
    module = importlib.import_module(room)
    assert set(module.__all__) <= set(dir(module)) and all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match=rf"module '{room}' has no attribute 'nothing'"):
        _ = module.nothing


SOURCES = sorted(PACKAGE.rglob("*.py"))


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("source", SOURCES, ids=[str(path.relative_to(PACKAGE)) for path in SOURCES])
def test_source_unpickles_nothing(source: Path):
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            assert name not in ("torch.save", "torch.hub.load", "eval", "exec", "os.system")
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if name == "torch.load":
                # What another package ships as a pickle is read without running code.
                only = keywords.get("weights_only")
                assert isinstance(only, ast.Constant) and only.value is True
            assert "trust_remote_code" not in keywords
            allowed = keywords.get("allow_pickle")
            assert allowed is None or (isinstance(allowed, ast.Constant) and allowed.value is False)
            if name.split(".")[-1] == "load" and name.split(".")[0] in ("np", "numpy"):
                assert allowed is not None
            shell = keywords.get("shell")
            assert shell is None or (isinstance(shell, ast.Constant) and shell.value is False)


def test_the_scan_covers_the_package():
    assert len(SOURCES) > 10 and PACKAGE / "engine" / "suffix.py" in SOURCES
