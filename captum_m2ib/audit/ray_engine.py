"""The engine for many processes or machines: Ray Data hands the pieces to actors, each with a worker of its own.

Pieces are small (a file name and a position), so nothing but them passes through Ray: each actor reads its rows from
and writes its shard to storage that all machines share. An actor that dies is started again and its piece repeated; a
piece that was written twice is the same shard.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from captum_m2ib.audit.embedded import Done, explain_piece
from captum_m2ib.audit.manifest import Manifest
from captum_m2ib.audit.rows import Piece

_MOST_BLOCKS = 10_000


class PieceWorker:
    r"""A worker that explains whole pieces; what a Ray actor runs.

    Args:

        worker (type): :class:`Worker` or a class like it.
        settings (mapping): Its settings.
        manifest (mapping): Arguments of :class:`Manifest`.
        output (str): The audit's folder.
        batch_size (int): Rows read at once.
    """

    def __init__(
        self, worker: type, settings: Mapping[str, Any], manifest: Mapping[str, Any], output: str, batch_size: int
    ) -> None:
        self.worker = worker(**settings)
        self.manifest, self.output, self.batch_size = Manifest(**manifest), Path(output), batch_size

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        done = []
        for index in range(len(batch["index"])):
            values = {name: _plain(column[index]) for name, column in batch.items()}
            done.append(explain_piece(self.worker, self.manifest, Piece(**values), self.output, self.batch_size))
        return {name: np.array([getattr(one, name) for one in done]) for name in Done._fields}


def run_ray(
    worker: type,
    settings: Mapping[str, Any],
    manifest: Mapping[str, Any],
    pieces: Iterable[Piece],
    output: Path,
    batch_size: int,
    workers: int = 1,
    gpus: float = 0.0,
    address: str | None = None,
) -> Iterator[Done]:
    r"""Explain pieces on a Ray cluster.

    Args:

        worker, settings, manifest, output, batch_size: As for :class:`PieceWorker`.
        pieces (iterable of Piece): The pieces.
        workers (int, optional): Number of actors. Default: 1
        gpus (float, optional): GPUs for each, perhaps a fraction. Default: 0
        address (str, optional): Of a running cluster. Default: None (a cluster on this machine, ended afterwards)

    Returns:
        iterator of Done: as the pieces are done, in any order.

    Raises:
        RuntimeError: if Ray is not installed.
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
            fn_constructor_args=(worker, dict(settings), dict(manifest), str(output), batch_size),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            **resources,
        )
        for row in done.iter_rows():
            yield Done(*(int(row[name]) for name in Done._fields))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise RuntimeError(f"--engine ray: {cause}") from error
    finally:
        if started:
            ray.shutdown()


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise RuntimeError("--engine ray needs Ray: pip install 'captum_m2ib[ray]'") from None
    return ray
