"""A worker without a model: what it returns for a row follows from the row alone."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from captum_m2ib.audit.results import RESULTS


class StubWorker:
    def __init__(self, *, seconds: float = 0.0, batch_size: int = 8, log: str | None = None) -> None:
        self.seconds, self.batch_size, self.log = seconds, batch_size, log
        self.model_name, self.settings = "stub", {"seed": 0}

    def load(self) -> None:
        return None

    def read_ahead(self, row: Any) -> Any:
        return row

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        if self.log is not None:
            # One write, which the system appends whole: several processes share the file.
            with open(self.log, "a") as file:
                file.write("".join(f"{identity}\n" for identity in batch["id"]))
        time.sleep(self.seconds)
        rows = [self._explain(*row) for row in zip(batch["id"], batch["caption"], batch["image"], strict=True)]
        columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in RESULTS}
        return {"row": list(batch["row"]), "id": list(batch["id"]), "caption": list(batch["caption"]), **columns}

    def _explain(self, identity: str, caption: str | None, image: Any) -> dict[str, Any]:
        if not caption:
            return {"error_kind": "caption", "error": "there is no caption"}
        seed = int.from_bytes(hashlib.sha256(f"{identity} {caption}".encode()).digest()[:4], "big")
        rng = np.random.default_rng(seed)
        tokens = caption.split()
        bits = rng.random((7, 7))
        return {
            "score": float(rng.random()),
            "image_bits": float(bits.sum()),
            "text_bits": float(rng.random()),
            "map": bits.astype(np.float16),
            "tokens": tokens,
            "special": [False] * len(tokens),
            "token_bits": rng.random(len(tokens), dtype=np.float32),
            "thumbnail": image if isinstance(image, bytes) else None,
        }
