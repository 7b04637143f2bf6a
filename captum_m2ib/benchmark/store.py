"""What a benchmark has measured so far: one file per model, method, group of figures and block of probes.

A part is written beside its place and renamed, so that it is there whole or not at all. Each holds the settings that it
was measured with; a part of other settings is an error, never a result.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Figures: TypeAlias = Mapping[str, Sequence[float]]

RUN_FILE = "run.json"
_FORMAT, _VERSION = "captum_m2ib.benchmark", 1


class Store:
    r"""The parts of one run, in a folder.

    Args:

        folder (str or PathLike): Made if it is not there.
        settings (mapping): What holds for the whole run; plain values, as JSON holds them.

    Raises:
        ValueError: if the folder holds a run with other settings, or something else than a run.
        OSError: if it cannot be read or written.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RUN_FILE
        told: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "settings": dict(settings)}
        if path.exists():
            there = _read(path)
            if there.get("format") != _FORMAT or there.get("version") != _VERSION:
                raise ValueError(f"--output: {path} is of no run of this benchmark; choose another folder.")
            _check(path, there.get("settings"), told["settings"])
        elif any(self.folder.iterdir()):
            raise ValueError(
                f"--output: {self.folder} holds other files; choose a new or empty folder, or that of an earlier run."
            )
        else:
            write_atomically(path, json.dumps(told, indent=1))

    def path(self, model: str, method: str, group: str, block: int) -> Path:
        """Where a part lies."""
        return self.folder / "parts" / model / method / f"{group}-{block:04d}.json"

    def read(self, model: str, method: str, group: str, block: int, settings: Mapping[str, Any]) -> Figures | None:
        r"""A part, if it has been measured.

        Args:

            model, method, group (str): Names.
            block (int): Which block of probes.
            settings (mapping): What it must have been measured with.

        Returns:
            dict or None: Figure to one value per probe, NaN where a probe has none; None if it is not there.

        Raises:
            ValueError: if it was measured with other settings, or is no part.
        """
        path = self.path(model, method, group, block)
        if not path.exists():
            return None
        there = _read(path)
        _check(path, there.get("settings"), dict(settings))
        figures = there.get("figures")
        if not isinstance(figures, dict):
            raise ValueError(f"--output: {path} holds no figures; delete it to measure it again.")
        return {name: [math.nan if value is None else float(value) for value in row] for name, row in figures.items()}

    def write(
        self, model: str, method: str, group: str, block: int, settings: Mapping[str, Any], figures: Figures
    ) -> None:
        """Keep a part; arguments as for :meth:`read`."""
        rows = {name: [value if math.isfinite(value) else None for value in row] for name, row in figures.items()}
        path = self.path(model, method, group, block)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"settings": dict(settings), "figures": rows}))


def write_atomically(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--output: {path} is damaged ({error}); delete it to measure it again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"--output: {path} is damaged; delete it to measure it again.")
    return found


def _check(path: Path, there: Any, wanted: Mapping[str, Any]) -> None:
    # As JSON holds them: a tuple comes back as a list.
    wanted = json.loads(json.dumps(wanted))
    if there == wanted:
        return
    found = there if isinstance(there, dict) else {}
    differing = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    told = "; ".join(f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} here" for name in differing)
    raise ValueError(f"--output: {path} was measured with other settings ({told}); choose another folder.")
