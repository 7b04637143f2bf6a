"""A worker whose process ends in the middle of a batch, as a crash in native code would end it, but only once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from captum_m2ib.audit import Worker


class MortalWorker(Worker):
    def __init__(self, *args: Any, marker: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.marker = Path(marker)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        if "scene-1" in batch["id"] and not self.marker.exists():
            self.marker.touch()
            os._exit(1)
        return super().__call__(batch)
