"""The state of an interrupted training run on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import CLIPModel


def save_state(
    path: Path,
    model: CLIPModel,
    optimizers: Sequence[torch.optim.Optimizer],
    progress: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Write what an interrupted run needs to go on, all of it or nothing."""
    from safetensors.torch import save_file

    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for which, optimizer in enumerate(optimizers):
        for index, entries in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{which}.{index}.{name}": entry for name, entry in entries.items()})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # Settings and step travel in the file's JSON header, so that one replacement renews everything at once.
    save_file(tensors, partial, metadata={"progress": json.dumps(progress), "settings": json.dumps(settings)})
    os.replace(partial, path)


def load_state(
    path: Path,
    model: CLIPModel,
    optimizers: Sequence[torch.optim.Optimizer],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    r"""Give model and optimizers what :func:`save_state` wrote, and return the progress.

    Raises:
        OSError: if the file is damaged.
        ValueError: if it was written by a run with other settings.
    """
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise OSError(
            f"resume: the saved state {str(path)!r} is damaged ({error}); delete it, or pass resume=False."
        ) from error
    with opened as file:
        metadata = file.metadata()
        saved = json.loads(metadata["settings"])
        changed = sorted(name for name in {*saved, *settings} if saved.get(name) != settings.get(name))
        if changed:
            was = ", ".join(f"{name}={saved.get(name)!r}" for name in changed)
            now = ", ".join(f"{name}={settings.get(name)!r}" for name in changed)
            raise ValueError(
                f"settings: expected those of the saved state {str(path)!r}, {was}; got {now}; "
                "pass the saved values to go on, or resume=False to start again."
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    prefix = "model."
    model.load_state_dict({name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)})
    for which, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        for name, tensor in tensors.items():
            kind, *rest = name.split(".", 3)
            if kind == "optimizer" and int(rest[0]) == which:
                content["state"].setdefault(int(rest[1]), {})[rest[2]] = tensor
        optimizer.load_state_dict(content)
    return json.loads(metadata["progress"])
