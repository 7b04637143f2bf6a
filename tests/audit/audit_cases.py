"""Manifests and tables that several tests of audits share."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from captum_m2ib.audit import shards
from captum_m2ib.scenes import draw_scene

QUICK: dict[str, Any] = {"n_steps": 2, "n_samples": 2}


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def write_scenes(folder: Path, count: int) -> Path:
    """A manifest of drawn scenes as JSON lines, pictures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        scene = draw_scene(index, 32)
        (folder / f"{index}.png").write_bytes(png(scene.image))
        lines.append(json.dumps({"id": f"scene-{index}", "image": f"{index}.png", "caption": scene.caption}))
    manifest = folder / "pairs.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def write_captions(path: Path, count: int) -> Path:
    """A manifest whose pictures are not there: for workers that do not look at them."""
    lines = (
        json.dumps({"id": f"pair-{index}", "image": "none.png", "caption": f"word{index}"}) for index in range(count)
    )
    path.write_text("\n".join(lines))
    return path


def table_of(output: Path) -> pa.Table:
    """The whole table of an audit."""
    return pa.concat_tables([parquet.read_table(path) for path in shards(output)])


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table_of(output).to_pylist()
    return rows
