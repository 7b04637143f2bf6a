"""An audit from its first row to its last: plan, resume, run an engine, take note of what came out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
    error_counts,
    is_finished,
    only_writer,
    read_run,
    remove_unfinished,
    shards,
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
    """

    output: Path
    rows: int
    finished: int
    errors: dict[str, int]
    explained_now: int
    seconds: float
    size: int
    interrupted: bool


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
    show_progress: bool = False,
    worker: type[Worker] = Worker,
    **settings: Any,
) -> Summary:
    r"""Explain every pair of a manifest; go on where an earlier run in the same folder stopped.

    A row that cannot be explained becomes a row with an error. On Ctrl-C the embedded engine finishes the shard in
    flight and returns; a second Ctrl-C stops at once.

    Args:

        manifest (path): See :class:`Manifest`.
        output (path): Folder for the shards; created if need be.
        columns, root: As for :class:`Manifest`.
        shard_size (int, optional): Rows in a shard, at most; what a killed run can lose. Default: 256
        engine (str, optional): ``"embedded"`` or ``"ray"``. Default: "embedded"
        workers, gpus, address: As for :func:`captum_m2ib.audit.ray_engine.run_ray`; for the engine ``"ray"``.
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
    for name, number in (("shard_size", shard_size), ("workers", workers)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {number!r}.")
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
        explained, stopped = 0, False
        with _progress_bar(run["rows"], pending, show_progress) as progress, _stopping() as stop:
            if engine == "embedded" or not pending:
                results: Iterator[Done] = run_embedded(explainer, opened, pending, folder, batch_size, progress)
            else:
                from captum_m2ib.audit.ray_engine import run_ray

                arguments = {"path": str(opened.path), "columns": opened.given, "root": str(opened.root)}
                results = run_ray(
                    worker, settings, arguments, pending, folder.absolute(), batch_size, workers, gpus, address
                )
                results = _reported(results, progress)
            for done in results:
                explained += done.rows
                if stop.is_set():
                    stopped = explained < sum(piece.rows for piece in pending)
                    break
        seconds = time.monotonic() - began
        finished, errors = error_counts(folder)
        write_run(folder, {**run, "finished": finished, "errors": errors, "complete": finished == run["rows"]})
    size = sum(path.stat().st_size for path in shards(folder))
    return Summary(folder, run["rows"], finished, errors, explained, seconds, size, stopped)


def _description(manifest: Manifest, pieces: list[Piece], shard_size: int, worker: Any) -> dict[str, Any]:
    """What ``run.json`` says from the beginning."""
    sizes = [(os.path.basename(file), _size(file)) for file in manifest.source.files]
    plan = [(piece.first, piece.rows, piece.start) for piece in pieces]
    return {
        "model": worker.model_name,
        "settings": worker.settings,
        "seed": worker.settings.get("seed"),
        "manifest": str(manifest.path),
        "kind": manifest.kind,
        "columns": manifest.given,
        "fingerprint": hashlib.sha256(json.dumps([sizes, plan]).encode()).hexdigest(),
        "rows": sum(piece.rows for piece in pieces),
        "shards": len(pieces),
        "shard_size": shard_size,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    }


def _size(file: str) -> int:
    return os.path.getsize(file) if os.path.isfile(file) else 0


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
    for name in ("model", "settings", "columns", "shard_size", "kind", "rows", "fingerprint"):
        if earlier.get(name) != run[name]:
            told = (
                "its manifest has changed" if name == "fingerprint" else _difference(name, earlier.get(name), run[name])
            )
            raise ValueError(f"--output: {folder} holds another audit ({told}); choose another folder.")
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
def _stopping() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second interrupts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def ask(signum: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        print("\nfinishing the shard; press Ctrl-C again to stop at once.", file=sys.stderr)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


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


def _reported(results: Iterator[Done], progress: Progress) -> Iterator[Done]:
    for done in results:
        progress(done.rows, done.errors)
        yield done
