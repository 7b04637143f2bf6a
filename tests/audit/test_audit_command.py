"""The commands ``audit`` and ``report``, from manifest to page, and that mistakes end in one helpful line."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from audit_cases import rows_of, table_of, write_scenes

from captum_m2ib.audit.command import add_commands

Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def call(*arguments: Any) -> None:
        parser = argparse.ArgumentParser()
        add_commands(parser.add_subparsers(required=True))
        given = parser.parse_args([str(argument) for argument in arguments])
        given.run(given)

    return call


def test_from_pairs_to_a_page(run: Run, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    manifest = write_scenes(tmp_path, 5)
    manifest.write_text(manifest.read_text() + '{"id": "bad", "image": "missing.png", "caption": "a star"}\n')
    arguments = ("--model", checkpoint, "--steps", 2, "--samples", 2, "--shard-size", 4)
    run("audit", manifest, "--output", tmp_path / "out", *arguments)
    out = capsys.readouterr().out
    assert "explained  5 of 6 pairs" in out and "errors     1 (1 image)" in out
    assert re.search(r"^image maps \d hold, \d weak, \d fail$", out, re.M), out
    assert re.search(r"^text maps  \d hold, \d weak, \d fail$", out, re.M), out
    assert "pairs/s (6 in" in out and "GB per million pairs" in out
    assert out.rstrip().endswith(f"captum-m2ib report {tmp_path / 'out'}")
    assert [row["id"] for row in rows_of(tmp_path / "out")] == [*(f"scene-{index}" for index in range(5)), "bad"]
    table = table_of(tmp_path / "out")
    run("audit", manifest, "--output", tmp_path / "out", *arguments)
    assert "pairs/s" not in capsys.readouterr().out and table_of(tmp_path / "out").equals(table)
    run("report", tmp_path / "out")
    assert capsys.readouterr().out == f"written  {tmp_path / 'out' / 'report.html'}\n"
    assert "scene-4" in (tmp_path / "out" / "report.html").read_text()
    run(
        "report", tmp_path / "out", "--compare", tmp_path / "out", "--output", tmp_path / "both.html", "--title", "mine"
    )
    assert "Audit of <bdi>mine" in (tmp_path / "both.html").read_text()


def test_every_option_reaches_the_worker(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import captum_m2ib.audit.run as module

    given: dict[str, Any] = {}

    def note(manifest: str, output: str, **settings: Any) -> module.Summary:
        given.update(settings, manifest=manifest, output=output)
        return module.Summary(Path(output), 0, 0, {}, 0, 0.0, 0, False)

    monkeypatch.setattr(module, "run_audit", note)
    options = (
        "audit pairs.csv --output out --columns image=path caption=title --images pictures --model m --revision r "
        "--device cuda --layers a b --method nib --beta 2 --steps 3 --samples 4 --seed 5 --joint --contrast other "
        "--halves --cut-captions --thumbnail 6 --batch 7 --shard-size 8 --engine ray --workers 9 --gpus 0.5 "
        "--address auto --decode-workers 2 --no-check"
    )
    run(*options.split())
    assert given == {
        "manifest": "pairs.csv",
        "output": "out",
        "columns": {"image": "path", "caption": "title"},
        "root": "pictures",
        "model": "m",
        "revision": "r",
        "device": "cuda",
        "layers": ["a", "b"],
        "method": "nib",
        "published": False,
        "beta": 2.0,
        "n_steps": 3,
        "n_samples": 4,
        "seed": 5,
        "joint": True,
        "contrast": "other",
        "halves": True,
        "check": False,
        "cut_captions": True,
        "thumbnail": 6,
        "batch_size": 7,
        "shard_size": 8,
        "engine": "ray",
        "workers": 9,
        "gpus": 0.5,
        "decode_workers": 2,
        "address": "auto",
        "show_progress": False,
    }


def test_columns_need_a_name_and_a_column(run: Run, tmp_path: Path):
    with pytest.raises(ValueError, match="expected NAME=COLUMN"):
        run("audit", "pairs.csv", "--output", tmp_path / "out", "--columns", "caption")


@pytest.mark.parametrize("package", ["pyarrow", "jinja2"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    manifest = write_scenes(tmp_path, 1)
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ("audit", manifest, "--output", tmp_path / "out") if package == "pyarrow" else ("report", tmp_path)
    with pytest.raises(RuntimeError, match=r"pip install 'captum_m2ib\[audit\]'"):
        run(*arguments)
    assert not (tmp_path / "out").exists()


def test_the_commands_cost_nothing_until_they_run():
    heavy = ["torch", "transformers", "pyarrow", "jinja2", "ray", "PIL", "numpy"]
    code = f"import sys, captum_m2ib.audit.command\nprint([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
