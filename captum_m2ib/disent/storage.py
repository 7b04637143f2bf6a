"""Safetensors files with settings in their header, written so that an interruption leaves the old file intact."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    r"""Replace a file at once, or not at all.

    The content goes to a temporary file beside it, is forced to the disk, and takes the name in one step.

    Args:

        path (str or PathLike): The file; its folder is made if missing.
        tensors (mapping): Name to tensor.
        metadata (mapping): Anything that JSON can hold, by name.
    """
    from safetensors.torch import save

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = save(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()},
        metadata={name: json.dumps(value) for name, value in metadata.items()},
    )
    temporary = target.with_name(target.name + ".partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
    _sync_folder(target.parent)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    r"""Read what :func:`write_tensors` wrote.

    Raises:
        OSError: if the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"path: {path} is not a file; expected one that was saved by this library.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise OSError(f"path: {path} is damaged ({error}); delete it, or save it again.") from error


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names that begin with a prefix."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def below_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of the name."""
    start = f"{prefix}."
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer whose entries are tensors, as Adam's are."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": entry for index, entries in state.items() for name, entry in entries.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer back what :func:`optimizer_tensors` took."""
    content = optimizer.state_dict()
    for name, tensor in tensors.items():
        index, entry = name.split(".", 1)
        content["state"].setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict(content)


def _sync_folder(folder: Path) -> None:
    # Without it a crash of the machine could forget the renaming. Windows cannot open a folder.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
