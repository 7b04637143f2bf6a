"""What every test shares: one thread, a quiet transformers, and helpers that run one family's case."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import environment  # noqa: F401 - comes first
import families
import pytest
import torch
from browsing import chromium

from captum_m2ib.scenes import build_model, save_checkpoint

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Models that differ most in how they hold their units; tests/contracts/test_models.py covers every other one as well.
REPRESENTATIVE = ("siglip2_naflex", "xclip", "clap", "swin_bert", "open_clip_resnet", "open_clip_coca")


def _parameter(family: families.Family) -> Any:
    is_common = "model" in family.features and family.name not in REPRESENTATIVE
    return pytest.param(family, id=family.name, marks=[pytest.mark.slow] if is_common else [])


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models are slower on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model of the shipped kind, as a checkpoint directory."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    sizes = {"vision_width": 32, "vision_layers": 3, "text_width": 32, "text_layers": 2, "projection": 16}
    save_checkpoint(build_model(**sizes), folder)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium for the pages of one file."""
    with chromium() as opened:
        yield opened


@pytest.fixture(params=[_parameter(family) for family in families.FAMILIES])
def family(request: pytest.FixtureRequest) -> families.Family:
    return request.param


@pytest.fixture
def case(family: families.Family) -> families.Case:
    return family.build()
