"""The engine without further dependencies: one process, one piece after the other."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from captum_m2ib.audit.ahead import ahead
from captum_m2ib.audit.manifest import Manifest
from captum_m2ib.audit.rows import Piece, Row
from captum_m2ib.audit.writer import shard_path, stop_asked, write_shard

Progress = Callable[[int, int], None]


class Done(NamedTuple):
    """What became of a piece."""

    piece: int
    rows: int
    errors: int


def explain_piece(
    worker: Any,
    manifest: Manifest,
    piece: Piece,
    output: Path,
    batch_size: int,
    decode_workers: int = 0,
    progress: Progress | None = None,
) -> Done:
    r"""Explain the rows of a piece and write them as one shard; every engine does its work through this.

    Args:

        worker (Worker): Or any callable from batch to columns that has ``model_name`` and ``settings``; if it has
            ``read_ahead``, its rows go through that first.
        manifest (Manifest): Where the rows are.
        piece (Piece): Which rows.
        output (Path): The audit's folder.
        batch_size (int): Rows given to the worker at once.
        decode_workers (int, optional): Threads that decode the next batch meanwhile; no more pictures are held than
            two batches have. Default: 0 (the worker decodes its batch itself)
        progress (callable, optional): Called with the numbers of rows and of errors of each batch. Default: None

    Returns:
        Done: how many rows and errors the shard holds.
    """
    import json

    columns: dict[str, list[Any]] = {}
    read = getattr(worker, "read_ahead", None)
    with ahead(read, manifest.rows(piece), decode_workers if read else 0, max(batch_size, decode_workers)) as ready:
        for rows in _batches(ready, batch_size):
            found = worker(_columns(rows))
            for name, values in found.items():
                columns.setdefault(name, []).extend(values)
            if progress is not None:
                progress(len(rows), sum(kind is not None for kind in found["error_kind"]))
            # Else its pictures would be held while the next batch is put together.
            del rows
    constants = {"model": worker.model_name, "settings": json.dumps(worker.settings, sort_keys=True)}
    write_shard(shard_path(output, piece.index), columns, constants)
    return Done(piece.index, piece.rows, sum(kind is not None for kind in columns["error_kind"]))


def run_embedded(
    worker: Any,
    manifest: Manifest,
    pieces: Iterable[Piece],
    output: Path,
    batch_size: int,
    decode_workers: int = 0,
    progress: Progress | None = None,
) -> Generator[Done, None, None]:
    """Explain pieces in order, until all are done or the audit is asked to stop."""
    for piece in pieces:
        if stop_asked(output):
            return
        yield explain_piece(worker, manifest, piece, output, batch_size, decode_workers, progress)


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _columns(rows: list[Row]) -> dict[str, list[Any]]:
    return {name: [getattr(row, name) for row in rows] for name in Row.__dataclass_fields__}
