"""A whole audit: complete, resumable after any death, and the same table every time."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from audit_cases import QUICK, png, rows_of, table_of, write_captions, write_scenes
from pyarrow import parquet
from stub_worker import StubWorker

from captum_m2ib.audit import Summary, read_run, run_audit, shards
from captum_m2ib.audit.writer import only_writer, shard_path, write_run, write_shard

HERE = Path(__file__).parent
STUB: Any = StubWorker


def in_other_process(folder: Path, code: str) -> subprocess.Popen[str]:
    """Run code in a fresh interpreter that finds the package and these helpers, and leads a process group."""
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
        start_new_session=True,
    )


def stub_audit(manifest: Path, output: Path, **settings: Any) -> Summary:
    return run_audit(manifest, output, **{"shard_size": 10, "worker": STUB, **settings})


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
        assert run["checks"] == summary.checks == {}
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
    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
    def test_memory_is_flat_over_ten_thousand_rows(self, tmp_path: Path):
        # Each row brings a picture of 20 kB: were they kept, packed or not, the second half would need 100 MB more.
        code = """
            import re
            from pathlib import Path
            from captum_m2ib.audit import run_audit
            from captum_m2ib.audit.decode import read_ahead, read_picture
            from stub_worker import StubWorker
            def tell_peak():
                # Not getrusage: its peak includes that of the process which started this one.
                print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
            class Reader(StubWorker):
                read_ahead = staticmethod(read_ahead)
                def _explain(self, identity, caption, image):
                    if identity in ("999", "4999"):
                        tell_peak()
                    return {**super()._explain(identity, caption, image), "thumbnail": read_picture(image).tobytes()}
            summary = run_audit("FOLDER/pairs.parquet", "FOLDER/WORKERS", worker=Reader, decode_workers=WORKERS)
            assert summary.finished == 10_000 and not summary.errors
            tell_peak()
        """
        picture = png(np.random.default_rng(0).integers(0, 256, (82, 82, 3), dtype=np.uint8))
        write_pictures(tmp_path / "pairs.parquet", picture, 10_000)
        peaks = {}
        for workers in (0, 3):
            filled = textwrap.dedent(code).replace("WORKERS", str(workers)).replace("FOLDER", str(tmp_path))
            out, err = (process := in_other_process(tmp_path, filled)).communicate(timeout=600)
            assert process.returncode == 0, err
            peaks[workers] = [int(kilobytes) for kilobytes in out.split()]
        print(f"most memory over the first 1,000, 5,000 and 10,000 rows, by decode workers, in kB: {peaks}")
        assert all(whole - half < 10_000 for _, half, whole in peaks.values()), peaks


def write_pictures(path: Path, picture: bytes, count: int) -> None:
    """A manifest that holds a picture for each row, no two of the same bytes."""
    types = pa.schema([("image", pa.binary()), ("caption", pa.string())])
    with parquet.ParquetWriter(path, types) as writer:
        for first in range(0, count, 500):
            rows = [{"image": picture + b"%09d" % i, "caption": f"word{i}"} for i in range(first, first + 500)]
            writer.write_table(pa.Table.from_pylist(rows, types))


def assert_tables_close(first: Path, second: Path) -> None:
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

    def test_a_manifest_that_was_edited_is_noticed_whatever_its_length(self, tmp_path: Path):
        manifest = write_captions(tmp_path / "pairs.jsonl", 30)
        stub_audit(manifest, tmp_path / "out")
        shard_path(tmp_path / "out", 1).unlink()
        text, moment = manifest.read_text(), manifest.stat().st_mtime_ns
        manifest.write_text(text.replace("word15", "sword1"))
        os.utime(manifest, ns=(moment, moment))
        with pytest.raises(ValueError, match=r"MANIFEST: .*pairs\.jsonl is not what it was .* began .*restore it"):
            stub_audit(manifest, tmp_path / "out")
        manifest.write_text(text + '\n{"image": "none.png", "caption": "more"}')
        with pytest.raises(ValueError, match=r"30 rows then, 31 now"):
            stub_audit(manifest, tmp_path / "out")
        assert len(shards(tmp_path / "out")) == 2
        manifest.write_text(text)
        assert stub_audit(manifest, tmp_path / "out").explained_now == 10

    @pytest.mark.parametrize("method", ["m2ib", "m2ib-published"])
    def test_an_audit_of_before_methods_had_names_goes_on(self, method: str, tmp_path: Path, checkpoint: Path):
        manifest = write_scenes(tmp_path, 2)
        settings: dict[str, Any] = {"model": str(checkpoint), "thumbnail": 0, **QUICK}
        run_audit(manifest, tmp_path / "out", method=method, **settings)
        run = read_run(tmp_path / "out")
        del run["settings"]["method"]
        write_run(tmp_path / "out", run)
        assert run_audit(manifest, tmp_path / "out", method=method, **settings).explained_now == 0
        del run["settings"]["published"]
        write_run(tmp_path / "out", run)
        with pytest.raises(ValueError, match=r"\(method: 'm2ib' there, 'legrad' now\); choose another"):
            run_audit(manifest, tmp_path / "out", method="legrad", model=str(checkpoint), thumbnail=0)

    @pytest.mark.parametrize("changed", ["model", "settings", "method", "shard_size", "columns"])
    def test_a_folder_is_never_shared_by_different_audits(self, changed: str, tmp_path: Path, checkpoint: Path):
        manifest = write_scenes(tmp_path, 2)
        run_audit(manifest, tmp_path / "out", model=str(checkpoint), thumbnail=0, **QUICK)
        table = table_of(tmp_path / "out")
        settings: dict[str, Any] = {"model": str(checkpoint), "thumbnail": 0, **QUICK}
        other = {
            "model": None,
            "settings": 1,
            "method": "m2ib-published",
            "shard_size": 3,
            "columns": {"caption": "id"},
        }
        settings["seed" if changed == "settings" else changed] = other[changed]
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
            from captum_m2ib.encoders.dual_encoder import DualEncoder
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


class Picture:
    """Stands for a decoded picture."""


ALIVE: weakref.WeakSet[Picture] = weakref.WeakSet()


class Counter(StubWorker):
    """Counts how many pictures exist at once."""

    most = 0

    def read_ahead(self, row: Any) -> Any:
        picture = Picture()
        ALIVE.add(picture)
        Counter.most = max(Counter.most, len(ALIVE))
        return replace(row, image=picture)


def test_no_more_pictures_are_held_than_two_batches_have(tmp_path: Path):
    manifest = write_captions(tmp_path / "pairs.jsonl", 200)
    settings: dict[str, Any] = {"worker": Counter, "batch_size": 7, "seconds": 0.001}
    run_audit(manifest, tmp_path / "out", shard_size=50, decode_workers=1, **settings)
    assert 7 < Counter.most <= 14 and not ALIVE


class Paired(StubWorker):
    """Waits in each batch until the next one is being read."""

    def __init__(self) -> None:
        super().__init__(batch_size=5)
        self.read = {index: threading.Event() for index in range(40)}

    def read_ahead(self, row: Any) -> Any:
        self.read[row.row].set()
        return row

    def __call__(self, batch: Any) -> Any:
        if batch["row"][-1] % 10 == 4:
            assert all(self.read[row + 5].wait(60) for row in batch["row"])
        return super().__call__(batch)


def test_the_next_batch_is_read_while_the_model_is_busy(tmp_path: Path):
    manifest = write_captions(tmp_path / "pairs.jsonl", 40)
    assert run_audit(manifest, tmp_path / "out", shard_size=10, worker=Paired).finished == 40  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"shard_size": 0}, "shard_size: expected"),
        ({"engine": "spark"}, "engine: expected"),
        ({"workers": 2}, "one process"),
        ({"decode_workers": -1}, "decode_workers: expected a whole number of at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(
    arguments: dict[str, Any], says: str, tmp_path: Path
):
    manifest = write_captions(tmp_path / "pairs.jsonl", 5)
    with pytest.raises(ValueError, match=says):
        run_audit(manifest, tmp_path / "out", worker=STUB, **arguments)
    assert not (tmp_path / "out").exists()
