"""An encoder by the name that a command line takes: a hub id, a directory, or a Python function that makes one."""

from __future__ import annotations

import importlib
import os
import re
import sys

import torch

from captum_m2ib.encoders.dual_encoder import DualEncoder


def load_named(
    model: str | os.PathLike[str], *, revision: str | None = None, device: torch.device | str | None = None
) -> DualEncoder:
    r"""Load or make an encoder.

    Args:

        model (str or PathLike): What :meth:`DualEncoder.from_pretrained` takes, or ``module:function``: a Python
            function without arguments that returns a :class:`DualEncoder` with a processor. Its code is run. The module
            may lie in the working directory.
        revision (str, optional): Branch, tag or commit on the hub. Default: None
        device (torch.device or str, optional): Default: None (where it was made)

    Returns:
        DualEncoder: in eval mode.

    Raises:
        OSError: as for :meth:`DualEncoder.from_pretrained`.
        TypeError: if the name is that of no function.
        ValueError: if there is no such module or function, it needs what is not installed, or returns something else.
    """
    if not is_function(model):
        return DualEncoder.from_pretrained(model, revision=revision, device=device)
    name = os.fspath(model)
    if revision is not None:
        raise ValueError(f"revision: {name} is a Python function, which has none; leave it out.")
    made = _call(name)
    if not isinstance(made, DualEncoder) or made.processor is None:
        got = "one without" if isinstance(made, DualEncoder) else type(made).__name__
        raise ValueError(
            f"model: expected {name} to return a DualEncoder with a processor, got {got}; return "
            "DualEncoder(..., processor=...)."
        )
    made.eval()
    return made if device is None else made.to(device)


def is_function(model: str | os.PathLike[str]) -> bool:
    """Whether a model's name is that of a Python function, ``module:function``."""
    return isinstance(model, str) and re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", model) is not None


def _call(name: str) -> object:
    module, _, function = name.partition(":")
    # At the end, so that a file that happens to lie there stands for no installed module.
    sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
        if found is None:
            raise ValueError(f"model: {module} has no function {function}; check the name.")
        if not callable(found):
            raise TypeError(f"model: expected {name} to be a function, got {type(found).__name__}; check the name.")
        made: object = found()
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"model: there is no module {error.name} for {name}; check the name, and where you are."
            ) from None
        raise ValueError(f"model: {name} needs what cannot be imported here: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    return made
