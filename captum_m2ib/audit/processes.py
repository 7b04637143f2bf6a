"""Let PyTorch work in a forked process.

The threads that share a large operation exist in the parent only: a child that hands work to them waits for ever. With
one thread it hands over nothing. ``datasets.map(num_proc=...)`` and ``multiprocessing`` fork on Linux by default.
"""

from __future__ import annotations

import os

_forked = False


def _note() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note)


def survive_fork() -> None:
    """To be called before PyTorch does anything: in a forked process, limit it to one thread."""
    global _forked
    if _forked:
        import torch

        torch.set_num_threads(1)
        _forked = False
