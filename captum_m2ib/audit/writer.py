"""What an audit leaves on disk: shards that appear whole or not at all, and ``run.json`` that says what they are.

A shard is written beside its place, flushed to the disk and renamed. Whoever resumes trusts every shard that has its
name, and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from captum_m2ib.audit.tables import import_pyarrow
from captum_m2ib.engine.verdict import VERDICTS

RUN_FILE = "run.json"
_FORMAT, _VERSION = "captum_m2ib.audit", 1
_UNFINISHED = ".unfinished"
_STOP_FILE = ".stop"


def schema() -> Any:
    """The columns of a shard, as a ``pyarrow.Schema``."""
    pa = import_pyarrow()
    number, text = pa.float32(), pa.string()
    return pa.schema(
        [
            ("row", pa.int64()),
            ("id", text),
            ("caption", text),
            ("score", number),
            ("image_bits", number),
            ("text_bits", number),
            ("image_score", number),
            ("text_score", number),
            ("image_check", text),
            ("text_check", text),
            ("image_margin", number),
            ("text_margin", number),
            ("image_kept", number),
            ("text_kept", number),
            ("best_half_score", number),
            ("other_half_score", number),
            ("inside_share", number),
            ("inside_area", number),
            ("contrast_similarity", number),
            ("map", pa.list_(pa.list_(number))),
            ("tokens", pa.list_(text)),
            ("special", pa.list_(pa.bool_())),
            ("token_bits", pa.list_(number)),
            ("contrast", text),
            ("thumbnail", pa.binary()),
            ("warning", text),
            ("error_kind", text),
            ("error", text),
            ("method", text),
            ("unit", text),
            ("kind", text),
            ("timeline", text),
            ("model", text),
            ("settings", text),
        ]
    )


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"pairs-{index:08d}.parquet"


def shards(folder: str | os.PathLike[str]) -> list[Path]:
    r"""The finished shards of an audit, in order.

    Args:

        folder (str or PathLike): The audit's output.

    Returns:
        list[Path]: parquet files.
    """
    return sorted(Path(folder).glob("pairs-*.parquet"))


def write_shard(path: Path, columns: Mapping[str, Sequence[Any]], constants: Mapping[str, str]) -> None:
    r"""Write a shard; it appears whole or not at all, also if the process or the machine dies.

    Args:

        path (Path): From :func:`shard_path`.
        columns (mapping): Columns of one length, as a worker returns them.
        constants (mapping): Columns that hold one value for all rows.
    """
    pa = import_pyarrow()
    from pyarrow import parquet

    count = len(columns["row"])
    arrays = []
    for column in schema():
        values = [constants[column.name]] * count if column.name in constants else columns[column.name]
        arrays.append(_array(pa, column, values))
    temporary = path.with_name(path.name + _UNFINISHED)
    parquet.write_table(pa.table(arrays, schema=schema()), temporary, compression="zstd")
    _into_place(temporary, path)


def _array(pa: Any, column: Any, values: Sequence[Any]) -> Any:
    if column.name == "map":
        values = [None if grid is None else list(grid) for grid in values]
    if column.name == "caption":
        values = [None if caption is None else _storable(caption) for caption in values]
    return pa.array(values, column.type)


def _storable(value: Any) -> str:
    return str(value).encode("utf-8", "replace").decode("utf-8")


def is_finished(folder: Path, index: int, rows: int) -> bool:
    """Whether a shard is there, whole, with as many rows as it should have."""
    pa = import_pyarrow()
    from pyarrow import parquet

    try:
        return bool(parquet.read_metadata(shard_path(folder, index)).num_rows == rows)
    except (OSError, pa.ArrowInvalid):
        return False


def read_shard(path: Path, columns: Sequence[str]) -> Any:
    """Some columns of a shard, as a ``pyarrow.Table``; those that an older release did not write are null."""
    pa = import_pyarrow()
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as opened:
        there = opened.read(columns=list(columns))
    types = schema()
    for name in columns:
        if name not in there.column_names:
            there = there.append_column(types.field(name), pa.nulls(len(there), types.field(name).type))
    return there


def error_counts(folder: Path) -> tuple[int, dict[str, int]]:
    """How many rows the finished shards hold, and how many errors of each kind."""
    rows, counts = 0, dict[str, int]()
    for path in shards(folder):
        kinds = read_shard(path, ["error_kind"])["error_kind"]
        rows += len(kinds)
        for pair in kinds.drop_null().value_counts().to_pylist():
            counts[pair["values"]] = counts.get(pair["values"], 0) + pair["counts"]
    return rows, dict(sorted(counts.items()))


def verdict_counts(folder: Path) -> dict[str, dict[str, int]]:
    """How many maps of the finished shards got each verdict, ``image`` and ``text``; empty where none was checked."""
    found: dict[str, dict[str, int]] = {}
    for path in shards(folder):
        table = read_shard(path, ["image_check", "text_check"])
        for name in ("image", "text"):
            for pair in table[f"{name}_check"].drop_null().value_counts().to_pylist():
                counts = found.setdefault(name, dict.fromkeys(VERDICTS, 0))
                counts[pair["values"]] += pair["counts"]
    return found


def kind_in(folder: str | os.PathLike[str]) -> str:
    """What an audit compares with captions: ``"image"``, ``"sound"`` or ``"video"``."""
    for path in shards(folder):
        found = read_shard(path, ["kind"])["kind"].drop_null()
        if len(found):
            return str(found[0])
    # Earlier releases knew pictures alone; of errors nothing is known.
    return "image"


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Write ``run.json``, whole or not at all."""
    temporary = folder / (RUN_FILE + _UNFINISHED)
    temporary.write_text(json.dumps({"format": _FORMAT, "version": _VERSION, **run}, indent=2) + "\n", encoding="utf-8")
    _into_place(temporary, folder / RUN_FILE)


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
    r"""What an audit's ``run.json`` says.

    Args:

        folder (str or PathLike): The audit's output.

    Returns:
        dict: settings, versions, counts and the seed.

    Raises:
        ValueError: if the folder holds no audit.
    """
    path = Path(folder, RUN_FILE)
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{str(folder)!r} holds no audit: there is no {RUN_FILE}.") from None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} does not say what an audit holds: {error}") from None
    if not isinstance(run, dict) or run.get("format") != _FORMAT or run.get("version") != _VERSION:
        raise ValueError(f"{str(path)!r} does not say what an audit holds; this release reads version {_VERSION}.")
    return run


def method_of(run: Mapping[str, Any]) -> str:
    """The name of the method of what :func:`read_run` returned; earlier releases knew two, and told them apart."""
    settings = run.get("settings", {})
    return str(settings.get("method") or ("m2ib-published" if settings.get("published") else "m2ib"))


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run left half written."""
    for path in folder.glob(f"*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


def _into_place(temporary: Path, path: Path) -> None:
    descriptor = os.open(temporary, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    if os.name == "posix":
        # The new name is on the disk only when its folder is.
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def ask_to_stop(folder: Path) -> None:
    """Ask a run to finish the shards in flight and no more; a file, for its workers may be on other machines."""
    (folder / _STOP_FILE).touch()


def stop_asked(folder: Path) -> bool:
    """Whether the run in a folder is to begin no further shard."""
    return (folder / _STOP_FILE).exists()


def forget_stop(folder: Path) -> None:
    """Let runs go on again."""
    (folder / _STOP_FILE).unlink(missing_ok=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    r"""Keep other runs on this machine out of a folder; a killed run's claim ends with it.

    Raises:
        RuntimeError: if another run is writing there.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f"another audit is writing to {folder}; wait for it or choose another output.") from None
        yield
