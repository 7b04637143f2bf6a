"""Three pairs on a tiny CLIP in float64, and a seed for Captum's tools."""

from __future__ import annotations

from collections.abc import Iterator

import families
import pytest
import torch
from tiny_pairs import Setup

from captum_m2ib.composition import EmbeddingForward


@pytest.fixture(scope="session")
def setup() -> Setup:
    case = families.clip_case().double()
    pixels, ids = case.inputs
    (mask,) = case.additional
    return Setup(case.forward, pixels, ids, mask, (ids < 60) & (mask == 1), EmbeddingForward(case.forward))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Captum's tools draw from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
