"""Every block of docs/captum.md runs, in its order, and leaves nothing behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import captum_m2ib.composition

PAGE = (Path(__file__).parents[2] / "docs" / "captum.md").read_text(encoding="utf-8")
BLOCKS = [(PAGE[: m.start()].count("\n") + 2, m[1]) for m in re.finditer(r"^```python\n(.*?)^```", PAGE, re.M | re.S)]


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for line, block in BLOCKS:
        # Errors are reported at the line of the page.
        exec(compile("\n" * (line - 1) + block, "docs/captum.md", "exec"), namespace)
    capsys.readouterr()
    assert list(tmp_path.iterdir()) == []
    encoder = namespace["encoder"]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())
    assert all(bool(torch.isfinite(namespace[name]).all()) for name in ("stable", "faithful", "per_feature"))


def test_every_fence_is_a_block():
    assert len(BLOCKS) == PAGE.count("```") // 2 > 10


def test_every_public_name_is_shown():
    # What serves other tools has a page with them.
    others = (Path(__file__).parents[2] / "docs" / "bridges.md").read_text(encoding="utf-8")
    code = "".join(block for _, block in BLOCKS) + "".join(re.findall(r"^```python\n(.*?)^```", others, re.M | re.S))
    for name in captum_m2ib.composition.__all__:
        assert re.search(rf"\b{name}\b", code), name
