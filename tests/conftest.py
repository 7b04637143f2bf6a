"""What every test shares: one thread, a quiet transformers, and helpers that run one family's case.

Nothing heavy is imported here: the process that only hands out the tests would import it too, before any test runs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import environment  # noqa: F401 - comes first
import pytest

if TYPE_CHECKING:
    from commands import Run
    from families import Case, Family
    from playwright.sync_api import Browser

# Models that differ most in how they hold their units; tests/contracts/test_models.py covers every other one as well.
REPRESENTATIVE = ("siglip2_naflex", "xclip", "clap", "swin_bert", "open_clip_resnet", "open_clip_coca")


def _parameter(family: Family) -> Any:
    is_common = "model" in family.features and family.name not in REPRESENTATIVE
    return pytest.param(family, id=family.name, marks=[pytest.mark.slow] if is_common else [])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in ("family", "distinct"):
        if name in metafunc.fixturenames:
            from families import FAMILIES

            # Those that only pack what they compute in another way have the numbers of another one.
            chosen = [one for one in FAMILIES if name == "family" or "packing" not in one.features]
            metafunc.parametrize(name, [_parameter(family) for family in chosen])


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What the imports left stays: the garbage collector need not walk a million objects again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models are slower on several threads than on one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model of the shipped kind, as a checkpoint directory."""
    from captum_m2ib.scenes import build_model, save_checkpoint

    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    sizes = {"vision_width": 32, "vision_layers": 3, "text_width": 32, "text_layers": 2, "projection": 16}
    save_checkpoint(build_model(**sizes), folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line, in this process."""
    from commands import runner

    return runner(capsys, monkeypatch)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A file for the command line to explain."""
    from commands import picture_in

    return picture_in(tmp_path)


@pytest.fixture
def refused(run: Run, checkpoint: Path, picture: Path, tmp_path: Path) -> Callable[..., None]:
    """What ``captum-m2ib explain`` must refuse."""
    from commands import refuser

    return refuser(run, tmp_path, picture, checkpoint)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium for the pages of one file."""
    from browsing import chromium

    with chromium() as opened:
        yield opened


@pytest.fixture
def case(family: Family) -> Case:
    return family.build()
