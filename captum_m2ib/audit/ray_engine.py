"""The engine for many processes or machines: Ray Data hands the pieces to actors, each with a worker of its own.

Pieces are small (a file name and a position), so nothing but them passes through Ray: each actor reads its rows from
and writes its shard to storage that all machines share. An actor that dies is started again and its piece repeated; a
piece that was written twice is the same shard.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from captum_m2ib.audit.embedded import Done, explain_piece
from captum_m2ib.audit.manifest import Manifest
from captum_m2ib.audit.rows import Piece
from captum_m2ib.audit.writer import stop_asked

_MOST_BLOCKS = 10_000
_SCHEDULING_THREAD = "StreamingExecutor-"
_READING_THREADS = ("iter_threaded", "ray-data-metadata-prefetch")
_LONGEST_WAIT = 60.0


class PieceWorker:
    r"""A worker that explains whole pieces, and passes over them once the audit is asked to stop; a Ray actor runs it.

    Args:

        worker (type): :class:`Worker` or a class like it.
        settings (mapping): Its settings.
        manifest (mapping): Arguments of :class:`Manifest`.
        output (str): The audit's folder.
        batch_size, decode_workers (int): As for :func:`captum_m2ib.audit.embedded.explain_piece`.
    """

    def __init__(
        self,
        worker: type,
        settings: Mapping[str, Any],
        manifest: Mapping[str, Any],
        output: str,
        batch_size: int,
        decode_workers: int,
    ) -> None:
        self.worker = worker(**settings)
        self.manifest, self.output = Manifest(**manifest), Path(output)
        self.batch_size, self.decode_workers = batch_size, decode_workers

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        import ray

        actor = ray.get_runtime_context().get_actor_id()
        replies = []
        for index in range(len(batch["index"])):
            piece = Piece(**{name: _plain(column[index]) for name, column in batch.items()})
            replies.append({"actor": actor, **self.reply(piece)})
        return {name: np.array([reply[name] for reply in replies]) for name in replies[0]}

    def reply(self, piece: Piece) -> dict[str, Any]:
        """Explain a piece: what became of it, no rows if it was passed over, and why it failed if it did."""
        if stop_asked(self.output):
            return {**Done(piece.index, 0, 0)._asdict(), "failure": ""}
        try:
            done = explain_piece(self.worker, self.manifest, piece, self.output, self.batch_size, self.decode_workers)
        except Exception as error:
            # Raised here, it would reach the driver as one of Ray's own that hides the reason.
            return {**Done(piece.index, 0, 0)._asdict(), "failure": str(error) or type(error).__name__}
        return {**done._asdict(), "failure": ""}


def run_ray(
    arguments: Mapping[str, Any],
    pieces: Iterable[Piece],
    workers: int = 1,
    gpus: float = 0.0,
    address: str | None = None,
) -> Generator[Done, None, None]:
    r"""Explain pieces on a Ray cluster, until all are done or the audit is asked to stop and none is in flight.

    Args:

        arguments (mapping): Of :class:`PieceWorker`.
        pieces (iterable of Piece): The pieces.
        workers (int, optional): Number of actors. Default: 1
        gpus (float, optional): GPUs for each, perhaps a fraction. Default: 0
        address (str, optional): Of a running cluster. Default: None (a cluster on this machine, ended afterwards)

    Returns:
        generator of Done: as the pieces are done, in any order.

    Raises:
        RuntimeError: if Ray is not installed, or it or a worker fails.
    """
    ray = _import_ray()
    started = not ray.is_initialized()
    if started:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        local: dict[str, Any] = {"include_dashboard": False} if address is None else {}
        # Without an address Ray would join whatever cluster was last started on this machine.
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        resources: dict[str, Any] = {"num_gpus": gpus} if gpus else {"num_cpus": 1}
        items = [asdict(piece) for piece in pieces]
        # What Ray repeats when an actor dies is a block: one piece, unless there are very many.
        done = ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS)).map_batches(
            PieceWorker,
            fn_constructor_kwargs=dict(arguments),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            **resources,
        )
        idle: set[str] = set()
        for row in done.iter_rows():
            if row["failure"]:
                raise RuntimeError(f"--engine ray: {row['failure']}")
            if row["rows"]:
                yield Done(*(int(row[name]) for name in Done._fields))
                continue
            # Who passes over a piece has none in flight any more. Nothing is lost by ending them all, and the rest of
            # the pieces need not be passed over one by one.
            idle.add(str(row["actor"]))
            if len(idle) == workers:
                return
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise RuntimeError(f"--engine ray: {cause}") from error
    finally:
        if started:
            end_scheduling()
            ray.shutdown()


def end_scheduling() -> None:
    """Wait for the threads of Ray Data that hand out work and fetch what comes back.

    One that finds Ray shut down ends the whole process.
    """
    threads = threading.enumerate()
    for thread in threads:
        if thread.name.startswith(_SCHEDULING_THREAD):
            # What it has in flight is given up; it waits two seconds for the thread, which a busy machine exceeds.
            thread.shutdown(force=True)  # type: ignore[attr-defined]
    for thread in threads:
        if thread.name.startswith((_SCHEDULING_THREAD, *_READING_THREADS)):
            thread.join(_LONGEST_WAIT)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise RuntimeError("--engine ray needs Ray: pip install 'captum_m2ib[ray]'") from None
    return ray
