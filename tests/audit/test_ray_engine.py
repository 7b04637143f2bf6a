"""The engine Ray: the same tables as the embedded one, and a worker that dies is started again."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from audit_cases import QUICK, table_of, write_captions, write_scenes
from stub_worker import StubWorker
from test_audit_run import assert_tables_close, in_other_process

from captum_m2ib.audit import read_run, run_audit, shards

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed")
STUB: Any = StubWorker


def run_with_ray(folder: Path, code: str, patience: float) -> None:
    """Ray is left out of this process: its threads and warnings would outlive the test."""
    process = in_other_process(folder, f"if __name__ == '__main__':\n    {code}")
    out, err = process.communicate(timeout=patience)
    assert process.returncode == 0, (out, err)


def test_a_worker_that_dies_is_started_again_and_the_table_is_whole(tmp_path: Path):
    manifest = write_captions(tmp_path / "pairs.jsonl", 60)
    run_audit(manifest, tmp_path / "embedded", shard_size=10, worker=STUB)
    settings = {"shard_size": 10, "engine": "ray", "workers": 2, "marker": str(tmp_path / "died")}
    code = (
        "from captum_m2ib.audit import run_audit; from mortal_worker import MortalWorker; "
        f"run_audit({str(manifest)!r}, {str(tmp_path / 'ray')!r}, worker=MortalWorker, **{settings!r})"
    )
    run_with_ray(tmp_path, code, 120)
    assert (tmp_path / "died").exists()
    assert table_of(tmp_path / "ray").equals(table_of(tmp_path / "embedded"))
    assert read_run(tmp_path / "ray")["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2000])
def test_scene_pairs_give_the_same_table_under_both_engines(count: int, tmp_path: Path, checkpoint: Path):
    manifest = write_scenes(tmp_path, count)
    settings = {"model": str(checkpoint), "shard_size": 50, **QUICK}
    run_audit(manifest, tmp_path / "embedded", **settings)
    code = (
        "from captum_m2ib.audit import run_audit; "
        f"run_audit({str(manifest)!r}, {str(tmp_path / 'ray')!r}, engine='ray', workers=2, **{settings!r})"
    )
    run_with_ray(tmp_path, code, 900)
    assert len(shards(tmp_path / "ray")) == count // 50
    assert_tables_close(tmp_path / "embedded", tmp_path / "ray")


def test_ray_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    manifest = write_captions(tmp_path / "pairs.jsonl", 5)
    with pytest.raises(RuntimeError, match=r"pip install 'captum_m2ib\[ray\]'"):
        run_audit(manifest, tmp_path / "out", engine="ray", worker=STUB)
