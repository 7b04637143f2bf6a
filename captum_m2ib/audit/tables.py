"""Manifests that are tables: CSV, TSV, JSON lines, parquet, and data sets on disk in Arrow files."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from captum_m2ib.audit.rows import Problem, Record, blocks, even_runs, runs

_LONGEST_LINE = 64 * 2**20


def import_pyarrow() -> Any:
    """The module ``pyarrow``, or an error that says how to install it."""
    try:
        import pyarrow
    except ImportError:
        raise RuntimeError("audits need pyarrow: pip install 'captum_m2ib[audit]'") from None
    return pyarrow


class _Lines:
    """Lines of a binary file as text; ``offset`` is where the next one begins."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self.file, self.offset = file, start
        file.seek(start)

    def __iter__(self) -> Iterator[str]:
        while line := self.file.readline(_LONGEST_LINE):
            self.offset += len(line)
            # Bytes that are not UTF-8 stay recognisable: their row reports them.
            yield line.decode("utf-8", "surrogateescape")


def _skip_mark(file: BinaryIO) -> int:
    """Where text begins: after the byte order mark, if there is one."""
    return 3 if file.read(3) == b"\xef\xbb\xbf" else 0


class _Text:
    """Files of text: all that is in them counts."""

    def content(self, file: str, names: Collection[str]) -> Iterator[bytes]:
        with open(file, "rb") as opened:
            yield from blocks(opened)


class Delimited(_Text):
    r"""CSV or TSV files with a header line.

    Args:

        files (sequence of Path): The files.
        delimiter (str): Between the fields.
    """

    def __init__(self, files: Iterable[Path], delimiter: str) -> None:
        self.files = tuple(map(str, files))
        self.delimiter = delimiter

    def columns(self) -> list[str]:
        with open(self.files[0], "rb") as file:
            return self._header(file)[0]

    def starts(self, file: str, size: int) -> Iterator[tuple[int, int]]:
        with open(file, "rb") as opened:
            names, start = self._header(opened)
            yield from runs((position for position, _ in self._records(opened, names, start)), size)

    def read(self, file: str, start: int) -> Iterator[Record]:
        with open(file, "rb") as opened:
            names, _ = self._header(opened)
            for _, record in self._records(opened, names, start):
                yield record

    def _header(self, file: BinaryIO) -> tuple[list[str], int]:
        lines = _Lines(file, _skip_mark(file))
        try:
            return next(csv.reader(iter(lines), delimiter=self.delimiter)), lines.offset
        except (StopIteration, csv.Error):
            raise ValueError(f"MANIFEST: {file.name} has no header line; name the columns in its first line.") from None

    def _records(self, file: BinaryIO, names: list[str], start: int) -> Iterator[tuple[int, Record]]:
        lines = _Lines(file, start)
        parser = csv.reader(iter(lines), delimiter=self.delimiter)
        while True:
            position = lines.offset
            try:
                fields = next(parser)
            except StopIteration:
                return
            except csv.Error as error:
                yield position, Problem(f"not a line of a table ({error})")
                continue
            if fields:
                yield position, dict(zip(names, fields, strict=False))


class JsonLines(_Text):
    r"""Files with one JSON object per line.

    Args:

        files (sequence of Path): The files.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(map(str, files))

    def columns(self) -> list[str] | None:
        for record in self.read(self.files[0], 0):
            if not isinstance(record, Problem):
                return list(record)
        return None

    def starts(self, file: str, size: int) -> Iterator[tuple[int, int]]:
        with open(file, "rb") as opened:
            yield from runs((position for position, line in self._lines(opened, 0) if line.strip()), size)

    def read(self, file: str, start: int) -> Iterator[Record]:
        with open(file, "rb") as opened:
            for _, line in self._lines(opened, start):
                if line.strip():
                    yield _parse(line)

    def _lines(self, file: BinaryIO, start: int) -> Iterator[tuple[int, str]]:
        lines = _Lines(file, start or _skip_mark(file))
        position = lines.offset
        for line in lines:
            yield position, line
            position = lines.offset


def _parse(line: str) -> Record:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Problem(f"not a line of JSON ({str(error)[:200]})")
    return found if isinstance(found, dict) else Problem(f"not a JSON object but {type(found).__name__}")


class Parquet:
    r"""Parquet files.

    Args:

        files (sequence of Path): The files.
    """

    _BATCH = 64

    def __init__(self, files: Iterable[Path]) -> None:
        import_pyarrow()
        self.files = tuple(map(str, files))
        self._next: tuple[str, int, Iterator[Record]] | None = None

    def columns(self) -> list[str]:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(self.files[0]) as opened:
            return list(opened.schema_arrow.names)

    def starts(self, file: str, size: int) -> Iterator[tuple[int, int]]:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(file) as opened:
            yield from even_runs(opened.metadata.num_rows, size)

    def read(self, file: str, start: int) -> Iterator[Record]:
        # A row group can only be read from its beginning, so that the next shard goes on where the last one ended.
        if self._next is not None and self._next[:2] == (file, start):
            records = self._next[2]
        else:
            records = self._records(file, start)
        for position, record in enumerate(records, start + 1):
            self._next = (file, position, records)
            yield record

    def _records(self, file: str, start: int) -> Iterator[Record]:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(file) as opened:
            before = 0
            for group in range(opened.metadata.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                if before + rows > start:
                    skip = max(start - before, 0)
                    for batch in opened.iter_batches(self._BATCH, row_groups=[group]):
                        yield from batch.slice(min(skip, batch.num_rows)).to_pylist()
                        skip = max(skip - batch.num_rows, 0)
                before += rows

    def content(self, file: str, names: Collection[str]) -> Iterator[bytes]:
        from pyarrow.parquet import ParquetFile

        with open(file, "rb") as raw, ParquetFile(raw) as opened:
            metadata, schema = opened.metadata, opened.schema
            for group in range(metadata.num_row_groups):
                for index in range(metadata.num_columns):
                    chunk = metadata.row_group(group).column(index)
                    if chunk.path_in_schema.partition(".")[0] not in names:
                        continue
                    size = chunk.total_compressed_size
                    yield f"{chunk.path_in_schema} {chunk.num_values} {size} {chunk.total_uncompressed_size}".encode()
                    if chunk.physical_type != "BYTE_ARRAY" or schema.column(index).logical_type.type != "NONE":
                        # As it lies in the file: nothing needs to be unpacked.
                        yield from blocks(raw, chunk.dictionary_page_offset or chunk.data_page_offset, size)


class Arrow:
    r"""Arrow files, as ``datasets.Dataset.save_to_disk`` writes them; memory-mapped.

    Args:

        files (sequence of Path): The files.
    """

    _BATCH = 64

    def __init__(self, files: Iterable[Path]) -> None:
        import_pyarrow()
        self.files = tuple(map(str, files))

    def columns(self) -> list[str]:
        return list(self._table(self.files[0]).schema.names)

    def starts(self, file: str, size: int) -> Iterator[tuple[int, int]]:
        yield from even_runs(self._table(file).num_rows, size)

    def read(self, file: str, start: int) -> Iterator[Record]:
        table = self._table(file)
        for first in range(start, table.num_rows, self._BATCH):
            yield from table.slice(first, self._BATCH).to_pylist()

    def content(self, file: str, names: Collection[str]) -> Iterator[bytes]:
        table = self._table(file)
        for name in table.schema.names:
            if name in names:
                yield name.encode()
                for chunk in table[name].chunks:
                    yield from _buffers(chunk)

    @staticmethod
    def _table(file: str) -> Any:
        arrow = import_pyarrow()
        mapped = arrow.memory_map(file)
        try:
            return arrow.ipc.open_stream(mapped).read_all()
        except arrow.ArrowInvalid:
            return arrow.ipc.open_file(mapped).read_all()


def _buffers(array: Any) -> Iterator[bytes]:
    """What an Arrow array is made of, of binary values only where each ends."""
    types = import_pyarrow().types
    kind = array.type
    if types.is_struct(kind):
        for index in range(kind.num_fields):
            yield from _buffers(array.field(index))
    elif types.is_dictionary(kind):
        yield from _buffers(array.indices)
        yield from _buffers(array.dictionary)
    elif isinstance(kind, import_pyarrow().BaseExtensionType):
        yield from _buffers(array.storage)
    else:
        held = array.buffers()
        for buffer in held[:-1] if types.is_binary(kind) or types.is_large_binary(kind) else held:
            yield b"" if buffer is None else bytes(buffer)
