"""An audit from its first row to its last: plan, resume, run an engine, take note of what came out."""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from captum_m2ib.audit.embedded import Done, Progress, run_embedded
from captum_m2ib.audit.manifest import Manifest
from captum_m2ib.audit.rows import Piece
from captum_m2ib.audit.tables import import_pyarrow
from captum_m2ib.audit.worker import Worker
from captum_m2ib.audit.writer import (
    RUN_FILE,
    ask_to_stop,
    error_counts,
    forget_stop,
    is_finished,
    kind_in,
    method_of,
    only_writer,
    read_run,
    remove_unfinished,
    shards,
    verdict_counts,
    write_run,
)

ENGINES = ("embedded", "ray")
_PACKAGES = ("captum_m2ib", "torch", "transformers", "captum", "numpy", "pillow", "pyarrow")


@dataclass(frozen=True)
class Summary:
    r"""What an audit has done.

    Attributes:

        output (Path): Where its shards are.
        rows (int): Rows of the manifest.
        finished (int): Rows in finished shards.
        errors (dict): Number of errors of each kind, in all finished shards.
        explained_now (int): Rows that this run went through, errors included.
        seconds (float): How long that took, loading the model not included.
        size (int): Bytes of all finished shards.
        interrupted (bool): Whether the run was asked to stop before the end.
        checks (dict): Number of each verdict on the pictures' and on the captions' maps, in all finished shards; empty
            where none was checked.
        kind (str): What is compared with captions: ``"image"``, ``"sound"`` or ``"video"``.
    """

    output: Path
    rows: int
    finished: int
    errors: dict[str, int]
    explained_now: int
    seconds: float
    size: int
    interrupted: bool
    checks: dict[str, dict[str, int]] = field(default_factory=dict)
    kind: str = "image"


def run_audit(
    manifest: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    root: str | os.PathLike[str] | None = None,
    shard_size: int = 256,
    engine: str = "embedded",
    workers: int = 1,
    gpus: float = 0.0,
    address: str | None = None,
    decode_workers: int = 1,
    show_progress: bool = False,
    worker: type[Worker] = Worker,
    **settings: Any,
) -> Summary:
    r"""Explain every pair of a manifest; go on where an earlier run in the same folder stopped.

    A row that cannot be explained becomes a row with an error. On Ctrl-C the shards in flight are finished before it
    returns; a second Ctrl-C stops at once.

    Args:

        manifest (path): See :class:`Manifest`.
        output (path): Folder for the shards; created if need be.
        columns, root: As for :class:`Manifest`.
        shard_size (int, optional): Rows in a shard, at most; what a killed run can lose. Default: 256
        engine (str, optional): ``"embedded"`` or ``"ray"``. Default: "embedded"
        workers, gpus, address: As for :func:`captum_m2ib.audit.ray_engine.run_ray`; for the engine ``"ray"``.
        decode_workers (int, optional): Threads of each worker that decode the pictures of the next batch while the
            model is busy with one; 0 for none. Changes no result. Default: 1
        show_progress (bool, optional): Show a progress bar. Default: False
        worker (type, optional): What explains batches. Default: :class:`Worker`
        **settings: Settings of the worker.

    Returns:
        Summary: what was done.

    Raises:
        ValueError: if the manifest cannot be read, a setting is out of range, or the folder holds another audit.
        RuntimeError: if a package is missing, or another run is writing to the folder.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}.")
    for name, number, least in (
        ("shard_size", shard_size, 1),
        ("workers", workers, 1),
        ("decode_workers", decode_workers, 0),
    ):
        if not isinstance(number, int) or number < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {number!r}.")
    if engine == "embedded" and (workers != 1 or gpus or address is not None):
        raise ValueError("workers: the embedded engine is one process; choose engine='ray' for more.")
    import_pyarrow()
    explainer = worker(**settings)
    opened = Manifest(Path(manifest).absolute(), columns, None if root is None else Path(root).absolute())
    pieces = list(opened.pieces(shard_size))
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder):
        run = _claim(folder, _description(opened, pieces, shard_size, explainer))
        remove_unfinished(folder)
        pending = [piece for piece in pieces if not is_finished(folder, piece.index, piece.rows)]
        batch_size = int(getattr(explainer, "batch_size", 8))
        if engine == "embedded" and pending:
            explainer.load()
        began = time.monotonic()
        with _progress_bar(run["rows"], pending, show_progress) as progress, _stopping(folder), _quiet_pictures():
            if engine == "embedded" or not pending:
                results: Generator[Done, None, None] = run_embedded(
                    explainer, opened, pending, folder, batch_size, decode_workers, progress
                )
            else:
                from captum_m2ib.audit.ray_engine import run_ray

                arguments = {
                    "worker": worker,
                    "settings": settings,
                    "manifest": {"path": str(opened.path), "columns": opened.given, "root": str(opened.root)},
                    "output": str(folder.absolute()),
                    "batch_size": batch_size,
                    "decode_workers": decode_workers,
                }
                results = _reported(run_ray(arguments, pending, workers, gpus, address), progress)
            with closing(results):
                for _ in results:
                    continue
        seconds = time.monotonic() - began
        explained = sum(piece.rows for piece in pending if is_finished(folder, piece.index, piece.rows))
        finished, errors = error_counts(folder)
        checks = verdict_counts(folder)
        ended = {"finished": finished, "errors": errors, "checks": checks, "complete": finished == run["rows"]}
        write_run(folder, {**run, **ended})
    size = sum(path.stat().st_size for path in shards(folder))
    stopped = explained < sum(piece.rows for piece in pending)
    return Summary(folder, run["rows"], finished, errors, explained, seconds, size, stopped, checks, kind_in(folder))


def _description(manifest: Manifest, pieces: list[Piece], shard_size: int, worker: Any) -> dict[str, Any]:
    """What ``run.json`` says from the beginning."""
    return {
        "model": worker.model_name,
        "settings": worker.settings,
        "seed": worker.settings.get("seed"),
        "manifest": str(manifest.path),
        "kind": manifest.kind,
        "columns": manifest.given,
        "fingerprint": manifest.fingerprint(),
        "rows": sum(piece.rows for piece in pieces),
        "shards": len(pieces),
        "shard_size": shard_size,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _claim(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Begin an audit in a folder, or go on with the same one."""
    if not (folder / RUN_FILE).exists():
        if shards(folder):
            raise ValueError(f"--output: {folder} holds shards but no {RUN_FILE}; choose another folder.")
        write_run(folder, {**run, "finished": 0, "errors": {}, "complete": False})
        return run
    earlier = read_run(folder)
    if "method" in run["settings"]:
        # Earlier releases did not write it.
        earlier = {**earlier, "settings": {**earlier.get("settings", {}), "method": method_of(earlier)}}
    for name in ("model", "settings", "columns", "shard_size", "kind"):
        if earlier.get(name) != run[name]:
            told = _difference(name, earlier.get(name), run[name])
            raise ValueError(f"--output: {folder} holds another audit ({told}); choose another folder.")
    if any(earlier.get(name) != run[name] for name in ("fingerprint", "rows")):
        raise ValueError(
            f"MANIFEST: {run['manifest']} is not what it was when the audit in {folder} began ({earlier.get('rows')} "
            f"rows then, {run['rows']} now); restore it, or choose another folder for --output."
        )
    if earlier.get("versions") != run["versions"]:
        told = _difference("versions", earlier.get("versions"), run["versions"])
        warnings.warn(f"--output: {folder} was begun with other versions ({told}).", UserWarning, stacklevel=3)
    return run


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                return f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
    return f"{name}: {before!r} there, {now!r} now"


@contextmanager
def _stopping(folder: Path) -> Iterator[None]:
    """The first Ctrl-C asks the run to stop; the second interrupts as usual."""
    forget_stop(folder)
    asked = False

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        ask_to_stop(folder)
        print("\nfinishing the shards in flight; press Ctrl-C again to stop at once.", file=sys.stderr)

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, ask) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
        forget_stop(folder)


@contextmanager
def _quiet_pictures() -> Iterator[None]:
    """What Pillow warns of is in the row; set for all threads at once, as they share the filters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


@contextmanager
def _progress_bar(total: int, pending: list[Piece], show: bool) -> Iterator[Progress]:
    from tqdm.auto import tqdm

    rest = sum(piece.rows for piece in pending)
    # Rows of an earlier run count as done, but not towards the rate.
    with tqdm(total=total, initial=total - rest, unit="pair", disable=not show, smoothing=0.05) as bar:
        errors = 0

        def advance(rows: int, failed: int) -> None:
            nonlocal errors
            errors += failed
            bar.set_postfix(errors=errors, refresh=False)
            bar.update(rows)

        yield advance


def _reported(results: Iterator[Done], progress: Progress) -> Generator[Done, None, None]:
    for done in results:
        progress(done.rows, done.errors)
        yield done
