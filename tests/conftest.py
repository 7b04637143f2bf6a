"""What every test shares: one thread, a quiet transformers, and helpers that run one family's case."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Iterator

import families
import pytest
import torch

FAMILY_NAMES = [family.name for family in families.FAMILIES]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models are slower on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=families.FAMILIES, ids=FAMILY_NAMES)
def family(request: pytest.FixtureRequest) -> families.Family:
    return request.param


@pytest.fixture
def case(family: families.Family) -> families.Case:
    return family.build()
