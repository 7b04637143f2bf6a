"""The engine Ray: the same tables as the embedded one, and a worker that dies is started again."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from audit_cases import QUICK, rows_of, write_captions, write_scenes
from stub_worker import StubWorker
from test_audit_run import assert_tables_close, in_other_process
from test_interrupts import Interrupted

from captum_m2ib.audit import Worker, read_run, run_audit, shards
from captum_m2ib.audit.ray_engine import PieceWorker, end_scheduling
from captum_m2ib.audit.writer import ask_to_stop

STUB: Any = StubWorker


def run_with_ray(folder: Path, code: str, patience: float) -> None:
    """Ray is left out of this process: its threads and warnings would outlive the test."""
    process = in_other_process(folder, f"if __name__ == '__main__':\n    {code}")
    out, err = process.communicate(timeout=patience)
    assert process.returncode == 0, (out, err)


def test_the_table_is_the_embedded_one_even_if_a_worker_dies(tmp_path: Path, checkpoint: Path):
    manifest = write_scenes(tmp_path, 6)
    settings = {"model": str(checkpoint), "shard_size": 2, **QUICK}
    run_audit(manifest, tmp_path / "embedded", **settings)
    settings |= {"engine": "ray", "workers": 2, "marker": str(tmp_path / "died")}
    code = (
        "from captum_m2ib.audit import run_audit; from mortal_worker import MortalWorker; "
        f"run_audit({str(manifest)!r}, {str(tmp_path / 'ray')!r}, worker=MortalWorker, **{settings!r})"
    )
    run_with_ray(tmp_path, code, 240)
    assert (tmp_path / "died").exists()
    assert [row["row"] for row in rows_of(tmp_path / "ray")] == list(range(6))
    assert_tables_close(tmp_path / "embedded", tmp_path / "ray")
    assert read_run(tmp_path / "ray")["complete"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sending Ctrl-C to another process needs POSIX signals")
def test_ctrl_c_finishes_the_shards_in_flight_and_says_how_to_go_on(tmp_path: Path):
    run = Interrupted(tmp_path, 0.2, "--engine", "ray", "--workers", "2")
    run.wait_for(lambda: shards(run.output))
    run.press_ctrl_c()
    run.assert_resumable()


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


def piece_worker(folder: Path, **settings: Any) -> PieceWorker:
    manifest = {"path": str(write_captions(folder / "pairs.jsonl", 5))}
    (folder / "out").mkdir()
    return PieceWorker(settings.pop("worker", STUB), settings, manifest, str(folder / "out"), 8, 0)


def test_pieces_are_passed_over_once_the_audit_is_asked_to_stop(tmp_path: Path):
    worker = piece_worker(tmp_path)
    (first, second) = worker.manifest.pieces(3)
    assert worker.reply(first) == {"piece": 0, "rows": 3, "errors": 0, "failure": ""}
    ask_to_stop(worker.output)
    assert worker.reply(second) == {"piece": 1, "rows": 0, "errors": 0, "failure": ""}
    assert len(shards(worker.output)) == 1


def test_threads_of_ray_data_have_ended_before_ray_does():
    asked = threading.Event()

    class Scheduling(threading.Thread):
        def run(self) -> None:
            asked.wait()
            time.sleep(0.3)

        def shutdown(self, force: bool) -> None:
            asked.set()

    def read() -> None:
        asked.wait()
        time.sleep(0.6)

    threads = [threading.Thread(target=read, name=name, daemon=True) for name in ("iter_threaded", "other")]
    threads.append(Scheduling(name="StreamingExecutor-dataset_1", daemon=True))
    for thread in threads:
        thread.start()
    end_scheduling()
    reading, other, scheduling = threads
    assert not reading.is_alive() and not scheduling.is_alive()
    other.join()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("execution/streaming_executor.py", 'f"StreamingExecutor-{'),
        ("block_batching/util.py", 'name="iter_threaded"'),
        ("execution/metadata_fetcher.py", 'name="ray-data-metadata-prefetch"'),
    ],
)
def test_ray_still_names_its_threads_so(module: str, name: str):
    package = importlib.util.find_spec("ray")
    assert package is not None and package.origin is not None
    assert name in (Path(package.origin).parent / "data/_internal" / module).read_text(encoding="utf-8")


def test_what_stops_a_worker_is_passed_on(tmp_path: Path):
    worker = piece_worker(tmp_path, worker=Worker, model=str(tmp_path / "no model"))
    (piece,) = worker.manifest.pieces(9)
    assert "no model is not a directory" in worker.reply(piece)["failure"]
    assert shards(worker.output) == []


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_stops_the_run_with_its_reason(tmp_path: Path):
    manifest = write_captions(tmp_path / "pairs.jsonl", 40)
    arguments = ["audit", str(manifest), "--output", str(tmp_path / "out"), "--engine", "ray", "--model", "/no model"]
    process = in_other_process(
        tmp_path, f"if __name__ == '__main__':\n    from captum_m2ib.cli import main; exit(main({arguments!r}))"
    )
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith("captum-m2ib: --engine ray: model: /no model is not a directory; expected")
    assert shards(tmp_path / "out") == []


def test_ray_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    manifest = write_captions(tmp_path / "pairs.jsonl", 5)
    with pytest.raises(RuntimeError, match=r"pip install 'captum_m2ib\[ray\]'"):
        run_audit(manifest, tmp_path / "out", engine="ray", worker=STUB)
