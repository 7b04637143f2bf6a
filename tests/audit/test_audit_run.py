"""A whole audit: complete, resumable after any death, and the same table every time."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from audit_cases import QUICK, rows_of, table_of, write_captions, write_scenes
from pyarrow import parquet
from stub_worker import StubWorker

from captum_m2ib.audit import Summary, read_run, run_audit, shards
from captum_m2ib.audit.writer import only_writer, shard_path, write_shard

HERE = Path(__file__).parent
STUB: Any = StubWorker


def in_other_process(folder: Path, code: str) -> subprocess.Popen[str]:
    """Run code in a fresh interpreter that finds the package and these helpers."""
    import captum_m2ib

    path = os.pathsep.join([str(HERE), str(Path(captum_m2ib.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    script = folder / f"script-{random.getrandbits(32)}.py"
    script.write_text(textwrap.dedent(code))
    return subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stub_audit(manifest: Path, output: Path, seconds: float = 0.0, **settings: Any) -> Summary:
    return run_audit(manifest, output, shard_size=10, worker=STUB, seconds=seconds, **settings)


class TestComplete:
    def test_one_row_for_each_and_a_run_file_that_says_so(self, tmp_path: Path):
        manifest = tmp_path / "pairs.jsonl"
        write_captions(manifest, 37)
        manifest.write_text(manifest.read_text() + '\n{"id": "bad", "image": "none.png"}')
        summary = stub_audit(manifest, tmp_path / "out")
        rows = rows_of(tmp_path / "out")
        assert [row["row"] for row in rows] == list(range(38))
        assert [row["id"] for row in rows] == [f"pair-{index}" for index in range(37)] + ["bad"]
        assert (summary.rows, summary.finished, summary.errors) == (38, 38, {"caption": 1})
        assert len(shards(tmp_path / "out")) == 4
        run = read_run(tmp_path / "out")
        assert run["complete"] and run["finished"] == 38 and run["errors"] == {"caption": 1}
        assert run["model"] == "stub" and run["seed"] == 0 and run["versions"]["pyarrow"]
        assert {row["settings"] for row in rows} == {'{"seed": 0}'}

    def test_with_a_model_every_row_is_as_the_worker_gives_it(self, tmp_path: Path, checkpoint: Path):
        manifest = write_scenes(tmp_path, 10)
        run_audit(manifest, tmp_path / "a", model=str(checkpoint), shard_size=4, batch_size=4, **QUICK)
        run_audit(manifest, tmp_path / "b", model=str(checkpoint), shard_size=4, batch_size=4, **QUICK)
        assert table_of(tmp_path / "a").equals(table_of(tmp_path / "b"))
        run_audit(manifest, tmp_path / "c", model=str(checkpoint), shard_size=7, batch_size=3, **QUICK)
        assert_tables_close(tmp_path / "a", tmp_path / "c")

    def test_an_empty_manifest_is_an_empty_audit(self, tmp_path: Path):
        (tmp_path / "pairs.csv").write_text("image,caption\n")
        summary = stub_audit(tmp_path / "pairs.csv", tmp_path / "out")
        assert (summary.rows, summary.finished) == (0, 0) and read_run(tmp_path / "out")["complete"]

    @pytest.mark.slow
    def test_ten_thousand_rows_take_no_more_memory_than_a_thousand(self, tmp_path: Path):
        # Each row brings a picture of 20 kB: were they kept, the larger run would need 180 MB more.
        code = """
            import resource, sys
            import pyarrow as pa
            from pyarrow import parquet
            from captum_m2ib.audit import run_audit
            from stub_worker import StubWorker
            def write(path, count):
                schema = pa.schema([("image", pa.binary()), ("caption", pa.string())])
                with parquet.ParquetWriter(path, schema) as writer:
                    for first in range(0, count, 500):
                        rows = range(first, first + 500)
                        rows = [{"image": (b"%09d" % i) * 2222, "caption": f"word{i}"} for i in rows]
                        writer.write_table(pa.Table.from_pylist(rows, schema))
            peaks = []
            for count in (1000, COUNT):
                write(f"{FOLDER}/{count}.parquet", count)
                run_audit(f"{FOLDER}/{count}.parquet", f"{FOLDER}/{count}", worker=StubWorker)
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            print(peaks[1] - peaks[0])
        """
        code = textwrap.dedent(code).replace("COUNT)", "10_000)").replace("{FOLDER}", str(tmp_path))
        process = in_other_process(tmp_path, code)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert int(out) < 40_000, f"{int(out) / 1000:.0f} MB more"


def assert_tables_close(first: Path, second: Path) -> None:
    import numpy as np

    one = {row["id"]: row for row in rows_of(first)}
    other = {row["id"]: row for row in rows_of(second)}
    assert one.keys() == other.keys()
    for identity, row in one.items():
        for name, value in row.items():
            found = other[identity][name]
            if isinstance(value, float):
                assert np.isclose(found, value, rtol=1e-3, atol=1e-5), (identity, name)
            elif name in ("map", "token_bits") and value is not None:
                assert np.allclose(found, value, atol=2e-3 * np.max(value)), (identity, name)
            elif name != "thumbnail":
                assert found == value, (identity, name)


class TestResume:
    def test_finished_shards_are_neither_repeated_nor_touched(self, tmp_path: Path):
        manifest = write_captions(tmp_path / "pairs.jsonl", 50)
        stub_audit(manifest, tmp_path / "whole")
        stub_audit(manifest, tmp_path / "out")
        shard_path(tmp_path / "out", 3).unlink()
        shard_path(tmp_path / "out", 4).write_bytes(b"PAR1 half a shard")
        (tmp_path / "out" / "pairs-00000003.parquet.unfinished").write_bytes(b"half")
        before = {path.name: path.stat().st_mtime_ns for path in shards(tmp_path / "out")[:3]}
        summary = stub_audit(manifest, tmp_path / "out")
        assert summary.explained_now == 20 and summary.finished == 50
        assert {path.name: path.stat().st_mtime_ns for path in shards(tmp_path / "out")[:3]} == before
        assert table_of(tmp_path / "out").equals(table_of(tmp_path / "whole"))
        assert not list((tmp_path / "out").glob("*.unfinished"))

    def test_a_finished_audit_has_nothing_left_to_do(self, tmp_path: Path):
        manifest = write_captions(tmp_path / "pairs.jsonl", 20)
        stub_audit(manifest, tmp_path / "out")
        assert stub_audit(manifest, tmp_path / "out").explained_now == 0

    @pytest.mark.parametrize("changed", ["manifest", "model", "settings", "shard_size"])
    def test_a_folder_is_never_shared_by_different_audits(self, changed: str, tmp_path: Path, checkpoint: Path):
        manifest = write_scenes(tmp_path, 2)
        run_audit(manifest, tmp_path / "out", model=str(checkpoint), thumbnail=0, **QUICK)
        table = table_of(tmp_path / "out")
        settings: dict[str, Any] = {"model": str(checkpoint), "thumbnail": 0, **QUICK}
        if changed == "manifest":
            manifest.write_text(manifest.read_text().replace("scene-1", "scene-one"))
        else:
            settings |= {"model": {"model": None}, "settings": {"seed": 1}, "shard_size": {"shard_size": 3}}[changed]
        with pytest.raises(ValueError, match="holds another audit"):
            run_audit(manifest, tmp_path / "out", **settings)
        assert table_of(tmp_path / "out").equals(table)

    def test_sizes_of_batches_may_change_on_the_way(self, tmp_path: Path):
        manifest = write_captions(tmp_path / "pairs.jsonl", 20)
        stub_audit(manifest, tmp_path / "out")
        shard_path(tmp_path / "out", 1).unlink()
        assert stub_audit(manifest, tmp_path / "out", batch_size=3).explained_now == 10

    def test_two_runs_do_not_write_to_one_folder(self, tmp_path: Path):
        manifest = write_captions(tmp_path / "pairs.jsonl", 5)
        (tmp_path / "out").mkdir()
        with only_writer(tmp_path / "out"), pytest.raises(RuntimeError, match="another audit is writing"):
            stub_audit(manifest, tmp_path / "out")
        assert stub_audit(manifest, tmp_path / "out").finished == 5

    def test_shards_without_a_run_file_are_not_added_to(self, tmp_path: Path):
        manifest = write_captions(tmp_path / "pairs.jsonl", 5)
        stub_audit(manifest, tmp_path / "out")
        (tmp_path / "out" / "run.json").unlink()
        with pytest.raises(ValueError, match=r"no run\.json"):
            stub_audit(manifest, tmp_path / "out")

    def test_a_table_begun_with_other_versions_says_so(self, tmp_path: Path):
        manifest = write_captions(tmp_path / "pairs.jsonl", 5)
        stub_audit(manifest, tmp_path / "out")
        run = read_run(tmp_path / "out")
        run["versions"]["torch"] = "0.4"
        (tmp_path / "out" / "run.json").write_text(json.dumps(run))
        with pytest.warns(UserWarning, match=r"torch: '0\.4' there"):
            stub_audit(manifest, tmp_path / "out")

    def test_a_shard_that_cannot_be_written_leaves_nothing_behind_under_its_name(self, tmp_path: Path):
        path = shard_path(tmp_path, 0)
        with pytest.raises(KeyError):
            write_shard(path, {"row": [0], "id": ["a"]}, {})
        assert not path.exists()


KILLED = """
    import sys
    sys.path.insert(0, {here!r})
    from pathlib import Path
    from captum_m2ib.audit import run_audit
    from stub_worker import StubWorker
    print("ready", flush=True)
    run_audit({manifest!r}, {output!r}, shard_size=10, worker=StubWorker, seconds=0.01)
"""


def kill_at_random(folder: Path, code: str, longest: float) -> bool:
    """Start a run and kill it at a random moment; whether it was still running."""
    process = in_other_process(folder, code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()
    time.sleep(random.uniform(0, longest))
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return running


def assert_whole(output: Path, expected: Path) -> None:
    rows = rows_of(output)
    ids = [row["id"] for row in rows]
    assert len(ids) == len(set(ids))
    assert table_of(output).equals(table_of(expected))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
class TestKilled:
    def test_killed_and_resumed_gives_the_undisturbed_table(self, tmp_path: Path):
        manifest = write_captions(tmp_path / "pairs.jsonl", 300)
        stub_audit(manifest, tmp_path / "whole")
        code = KILLED.format(here=str(HERE), manifest=str(manifest), output=str(tmp_path / "out"))
        killed = [kill_at_random(tmp_path, code, 0.3) for _ in range(2)]
        assert any(killed)
        stub_audit(manifest, tmp_path / "out")
        assert_whole(tmp_path / "out", tmp_path / "whole")

    @pytest.mark.slow
    def test_ten_times_with_a_model(self, tmp_path: Path, checkpoint: Path):
        manifest = write_scenes(tmp_path, 60)
        settings = {"model": str(checkpoint), "shard_size": 6, "batch_size": 4, **QUICK}
        run_audit(manifest, tmp_path / "whole", **settings)
        code = f"""
            import torch
            torch.set_num_threads(1)
            import transformers
            from captum_m2ib.audit import run_audit
            from captum_m2ib.dual_encoder import DualEncoder
            DualEncoder.from_pretrained({str(checkpoint)!r})
            print("ready", flush=True)
            run_audit({str(manifest)!r}, {str(tmp_path / "out")!r}, **{settings!r})
        """
        killed = 0
        for _ in range(10):
            out = tmp_path / "out"
            for path in out.glob("*") if random.random() < 0.3 else ():
                path.unlink()
            killed += kill_at_random(tmp_path, code, 3.0)
            run_audit(manifest, out, **settings)
            assert_whole(out, tmp_path / "whole")
            for path in shards(out)[random.randrange(8) :]:
                path.unlink()
        assert killed >= 5


@pytest.mark.skipif(os.name != "posix", reason="sending Ctrl-C to another process needs POSIX signals")
class TestInterrupted:
    CODE = """
        import sys
        from captum_m2ib.audit.command import add_commands
        import argparse, captum_m2ib.audit.run as run
        from stub_worker import StubWorker
        run_audit = run.run_audit
        def stubbed(manifest, output, **settings):
            print("ready", flush=True)
            return run_audit(manifest, output, worker=StubWorker, seconds=0.05, shard_size=settings["shard_size"])
        run.run_audit = stubbed
        from captum_m2ib.cli import main
        parser = argparse.ArgumentParser()
        add_commands(parser.add_subparsers())
        sys.argv = ["captum-m2ib", "audit", {manifest!r}, "--output", {output!r}, "--shard-size", "20"]
        given = parser.parse_args(sys.argv[1:])
        try:
            given.run(given)
        except KeyboardInterrupt:
            sys.exit(130)
    """

    def test_ctrl_c_finishes_the_shard_and_says_how_to_go_on(self, tmp_path: Path):
        manifest = write_captions(tmp_path / "pairs.jsonl", 400)
        process = in_other_process(tmp_path, self.CODE.format(manifest=str(manifest), output=str(tmp_path / "out")))
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        while not shards(tmp_path / "out"):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, (out, err)
        finished = shards(tmp_path / "out")
        assert 1 <= len(finished) < 20
        assert all(parquet.read_metadata(path).num_rows == 20 for path in finished)
        assert f"to go on from here: captum-m2ib audit {manifest} --output {tmp_path / 'out'} --shard-size 20" in err
        assert "finishing the shard" in err and f"explained  {20 * len(finished)} of 400 pairs" in out
        summary = run_audit(manifest, tmp_path / "out", shard_size=20, worker=STUB)
        assert summary.explained_now == 400 - 20 * len(finished)
        assert [row["row"] for row in rows_of(tmp_path / "out")] == list(range(400))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"shard_size": 0}, "shard_size: expected"),
        ({"engine": "spark"}, "engine: expected"),
        ({"workers": 2}, "one process"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(
    arguments: dict[str, Any], says: str, tmp_path: Path
):
    manifest = write_captions(tmp_path / "pairs.jsonl", 5)
    with pytest.raises(ValueError, match=says):
        run_audit(manifest, tmp_path / "out", worker=STUB, **arguments)
    assert not (tmp_path / "out").exists()
