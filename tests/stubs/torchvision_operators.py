"""Let torchvision's wheel be imported beside a CPU build of torch.

The wheel is built for CUDA: its compiled part cannot be loaded, and two of its operators are then missing although
nothing here calls them. They are declared when torchvision is first imported, in this process and its children.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []


class _DeclaresOperators(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision" and not _declared:
            import torch

            library = torch.library.Library("torchvision", "DEF")
            _declared.append(library)
            for operator in ("nms", "qnms"):
                library.define(operator + _SCHEMA)
        return None


sys.meta_path.insert(0, _DeclaresOperators())
