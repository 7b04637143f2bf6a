"""Ctrl-C: the shards in flight are finished, the command that goes on is printed, and nothing is lost or done twice."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from audit_cases import rows_of, write_captions
from stub_worker import StubWorker
from test_audit_run import STUB, in_other_process, stub_audit

from captum_m2ib.audit import run_audit, shards

COMMAND = """
    if __name__ == "__main__":
        import sys
        import captum_m2ib.audit.run as run
        from captum_m2ib.cli import main
        from stub_worker import StubWorker
        run_audit = run.run_audit
        stub = {{"worker": StubWorker, "seconds": {seconds}, "log": {log!r}}}
        kept = ("shard_size", "engine", "workers", "decode_workers")
        run.run_audit = lambda *paths, **given: run_audit(*paths, **stub, **{{name: given[name] for name in kept}})
        sys.argv[1:] = {arguments!r}
        sys.exit(main())
"""


class Interrupted:
    """The command on 400 rows in shards of 20 with a stub in place of the model, to be sent Ctrl-C."""

    def __init__(self, folder: Path, seconds: float, *options: str) -> None:
        self.manifest, self.output = write_captions(folder / "pairs.jsonl", 400), folder / "out"
        self.log = folder / "log"
        self.arguments = ["audit", str(self.manifest), "--output", str(self.output), "--shard-size", "20", *options]
        self.process = in_other_process(
            folder, COMMAND.format(seconds=seconds, log=str(self.log), arguments=self.arguments)
        )

    def wait_for(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, "nothing happens"
            time.sleep(0.01)

    def begun(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []

    def press_ctrl_c(self) -> None:
        """As a terminal sends it: to all processes of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def assert_resumable(self, lost: int = 0) -> None:
        """It says how to go on, and then nothing is missing and nothing but what was lost is done twice."""
        out, err = self.process.communicate(timeout=120)
        assert self.process.returncode == 130, (out, err)
        assert f"to go on from here: captum-m2ib {shlex.join(self.arguments)}" in err
        finished = rows_of(self.output) if shards(self.output) else []
        assert len(finished) % 20 == 0 and len(finished) < 400
        if not lost:
            assert "finishing the shards in flight" in err
            assert f"explained  {len(finished):,} of 400 pairs" in out
        assert len(self.begun()) <= len(finished) + lost
        assert not list(self.output.glob(".stop"))
        summary = run_audit(self.manifest, self.output, shard_size=20, worker=STUB, log=str(self.log))
        assert summary.explained_now == 400 - len(finished) and not summary.interrupted
        assert [row["row"] for row in rows_of(self.output)] == list(range(400))
        assert len(self.begun()) - len(set(self.begun())) <= lost


@pytest.mark.skipif(os.name != "posix", reason="sending Ctrl-C to another process needs POSIX signals")
class TestInterrupted:
    @pytest.mark.parametrize("decode_workers", ["0", "2"])
    def test_ctrl_c_finishes_the_shard_and_says_how_to_go_on(self, decode_workers: str, tmp_path: Path):
        run = Interrupted(tmp_path, 0.05, "--decode-workers", decode_workers)
        run.wait_for(lambda: shards(run.output))
        run.press_ctrl_c()
        run.assert_resumable()

    def test_a_second_ctrl_c_stops_at_once(self, tmp_path: Path):
        run = Interrupted(tmp_path, 600)
        run.wait_for(run.begun)
        run.press_ctrl_c()
        run.wait_for((run.output / ".stop").exists)
        run.press_ctrl_c()
        run.assert_resumable(lost=8)

    def test_a_file_named_stop_does_the_same(self, tmp_path: Path):
        run = Interrupted(tmp_path, 0.05)
        run.wait_for(lambda: shards(run.output))
        (run.output / ".stop").touch()
        _, err = run.process.communicate(timeout=120)
        assert run.process.returncode == 130 and "to go on from here" in err
        assert 0 < len(run.begun()) == len(rows_of(run.output)) < 400

    def test_an_interrupt_in_the_middle_leaves_no_thread(self, tmp_path: Path):
        manifest = write_captions(tmp_path / "pairs.jsonl", 50)
        with pytest.raises(KeyboardInterrupt):
            stub_audit(manifest, tmp_path / "out", worker=Impatient, decode_workers=3)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
        assert stub_audit(manifest, tmp_path / "out").explained_now == 40


class Impatient(StubWorker):
    """Is interrupted in the second shard."""

    def __call__(self, batch: Any) -> Any:
        if "pair-17" in batch["id"]:
            raise KeyboardInterrupt
        return super().__call__(batch)
