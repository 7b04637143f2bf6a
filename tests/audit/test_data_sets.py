"""The worker in ``datasets.map``: one process, several that were forked after the model had run, several spawned."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_cases import QUICK, png
from test_audit_run import in_other_process

from captum_m2ib.audit import Worker
from captum_m2ib.audit.results import FIGURES, RESULTS
from captum_m2ib.audit.writer import schema
from captum_m2ib.scenes import draw_scene

SCENES = [draw_scene(index, 48) for index in range(6)]
COLUMNS: dict[str, list[Any]] = {
    "id": [f"scene-{index}" for index in range(6)],
    "image": [png(scene.image) for scene in SCENES],
    "caption": [*(scene.caption for scene in SCENES[:5]), ""],
}


@pytest.mark.parametrize("held_as", ["bytes", "picture"])
def test_map_gives_what_the_worker_gives(held_as: str, checkpoint: Path):
    import datasets

    datasets.disable_progress_bars()
    data_set = datasets.Dataset.from_dict(COLUMNS)
    if held_as == "picture":
        data_set = data_set.cast_column("image", datasets.Image())
    types = datasets.Features.from_arrow_schema(schema())
    features = datasets.Features({**data_set.features, **{name: types[name] for name in RESULTS}})
    worker = Worker(str(checkpoint), **QUICK)
    found = data_set.map(worker, batched=True, batch_size=4, features=features, load_from_cache_file=False)
    expected = worker(COLUMNS)
    assert found["id"][:] == COLUMNS["id"] and found["error_kind"][:] == [None] * 5 + ["caption"]
    for name in FIGURES:
        for one, other in zip(found[name], expected[name], strict=True):
            assert one == other if other is None else np.isclose(one, other, rtol=1e-3, atol=1e-5), name
    assert found["tokens"][:5] == expected["tokens"][:5]


# Both processes multiply matrices large enough for PyTorch to share the work among threads.
FORKED = """
    import os
    import torch
    torch.set_num_threads(4)
    from captum_m2ib.audit import Worker
    from captum_m2ib.scenes import draw_scene
    class Busy(Worker):
        def __call__(self, batch):
            found = super().__call__(batch)
            return {**found, "product": float((torch.ones(1500, 1500) @ torch.ones(1500, 1500)).max())}
    scene = draw_scene(0, 48)
    batch = {"image": [scene.image], "caption": [scene.caption]}
    worker = Busy(CHECKPOINT, n_steps=2, n_samples=2)
    before = worker(batch)
    child = os.fork()
    if child == 0:
        after = worker(batch)
        same = after["error"] == [None] and after["product"] == before["product"] == 1500
        os._exit(0 if same and abs(after["score"][0] - before["score"][0]) < 1e-5 else 3)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_does_not_wait_for_threads_that_its_parent_has(tmp_path: Path, checkpoint: Path):
    process = in_other_process(tmp_path, FORKED.replace("CHECKPOINT", repr(str(checkpoint))))
    assert outcome(process, 120).split() == ["0", "4"]


MAPPED = """
    import json
    def main():
        import datasets, multiprocess, torch
        from captum_m2ib.audit import Worker
        torch.set_num_threads(4)
        datasets.disable_progress_bars()
        multiprocess.set_start_method(METHOD)
        columns = {"image": FILES, "caption": CAPTIONS}
        worker = Worker(n_steps=2, n_samples=2, thumbnail=0)
        before = worker(columns)
        mapped = datasets.Dataset.from_dict(columns).map(worker, batched=True, batch_size=2, num_proc=2)
        print(json.dumps([before["score"], mapped["score"][:], before["error"], mapped["error"][:]]))
    if __name__ == "__main__":
        main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", [*(["fork"] if hasattr(os, "fork") else []), "spawn"])
def test_several_processes_give_the_same(method: str, tmp_path: Path):
    files = [str(tmp_path / f"{index}.png") for index in range(5)]
    for file, data in zip(files, COLUMNS["image"], strict=False):
        Path(file).write_bytes(data)
    code = MAPPED.replace("METHOD", repr(method)).replace("FILES", repr(files))
    code = code.replace("CAPTIONS", repr(COLUMNS["caption"][:5]))
    before, mapped, *errors = json.loads(outcome(in_other_process(tmp_path, code), 300).splitlines()[-1])
    assert np.allclose(before, mapped, atol=1e-5) and errors == [[None] * 5] * 2


def outcome(process: subprocess.Popen[str], patience: float) -> str:
    """What a process prints; one that hangs is ended with its children."""
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        pytest.fail(f"still running after {patience} s: {process.communicate()}")
    assert process.returncode == 0, (out, err)
    return out
