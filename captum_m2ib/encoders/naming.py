"""An encoder by the name that a command line takes: a hub id, a directory, one of open_clip's, or a Python function."""

from __future__ import annotations

import importlib
import os
import re
import sys

import torch

from captum_m2ib.encoders.dual_encoder import DualEncoder

_EMBEDDER = "sentence-transformers:"


def load_named(
    model: str | os.PathLike[str], *, revision: str | None = None, device: torch.device | str | None = None
) -> DualEncoder:
    r"""Load or make an encoder.

    Args:

        model (str or PathLike): What :meth:`DualEncoder.from_pretrained` takes; a model of open_clip as
            ``hf-hub:ORG/NAME``, ``local-dir:PATH``, the path itself, or ``open_clip:ARCHITECTURE:WEIGHTS`` with a tag
            or a file of weights; ``sentence-transformers:`` and a hub id or directory of one of its models; or
            ``module:function``, a Python function without arguments that returns a :class:`DualEncoder` with a
            processor. Its code is run. The module may lie in the working directory.
        revision (str, optional): Branch, tag or commit on the hub. Default: None
        device (torch.device or str, optional): Default: None (where it was made)

    Returns:
        DualEncoder: in eval mode.

    Raises:
        OSError, ImportError: as for :meth:`DualEncoder.from_pretrained` and :meth:`DualEncoder.from_open_clip`.
        TypeError: if the name is that of no function.
        ValueError: if there is no such module or function, it needs what is not installed, or returns something else.
    """
    name = os.fspath(model)
    known = _open_clip_name(name)
    if known is not None:
        if revision is not None:
            raise ValueError(f"revision: {name} is a model of open_clip, which has none; leave it out.")
        return DualEncoder.from_open_clip(*known, device=device)
    if name.startswith(_EMBEDDER):
        return DualEncoder.from_sentence_transformers(name.removeprefix(_EMBEDDER), revision=revision, device=device)
    if not is_function(name):
        return DualEncoder.from_pretrained(name, revision=revision, device=device)
    if revision is not None:
        raise ValueError(f"revision: {name} is a Python function, which has none; leave it out.")
    made = call_named(name)
    if not isinstance(made, DualEncoder) or made.processor is None:
        got = "one without" if isinstance(made, DualEncoder) else type(made).__name__
        raise ValueError(
            f"model: expected {name} to return a DualEncoder with a processor, got {got}; return "
            "DualEncoder(..., processor=...)."
        )
    made.eval()
    return made if device is None else made.to(device)


def is_function(name: str) -> bool:
    """Whether a model's name is that of a Python function, ``module:function``."""
    return re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", name) is not None


def _open_clip_name(name: str) -> tuple[str, str | None] | None:
    """What open_clip calls a model, and its weights; None if it is none of its models."""
    if name.startswith(("hf-hub:", "local-dir:")):
        return name, None
    if name.startswith("open_clip:"):
        _, architecture, weights = [*name.split(":", 2), ""][:3]
        if not architecture or not weights:
            raise ValueError(
                f"model: expected open_clip:ARCHITECTURE:WEIGHTS, where WEIGHTS is a tag of open_clip or a file, got "
                f"{name}; without weights they would be random."
            )
        return architecture, weights
    if os.path.isfile(os.path.join(name, "open_clip_config.json")) and not os.path.isfile(
        os.path.join(name, "config.json")
    ):
        return f"local-dir:{name}", None
    return None


def call_named(name: str, argument: str = "model") -> object:
    r"""What a Python function returns that is called by its name.

    Args:

        name (str): ``module:function``; the module may lie in the working directory. Its code is run.
        argument (str, optional): What errors call it. Default: "model"

    Returns:
        object: whatever it returned.

    Raises:
        TypeError: if the name is that of no function.
        ValueError: if there is no such module or function, or it needs what is not installed.
    """
    module, _, function = name.partition(":")
    # At the end, so that a file that happens to lie there stands for no installed module.
    sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
        if found is None:
            raise ValueError(f"{argument}: {module} has no function {function}; check the name.")
        if not callable(found):
            got = type(found).__name__
            raise TypeError(f"{argument}: expected {name} to be a function, got {got}; check the name.")
        made: object = found()
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{argument}: there is no module {error.name} for {name}; check the name, and where you are."
            ) from None
        raise ValueError(f"{argument}: {name} needs what cannot be imported here: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    return made
