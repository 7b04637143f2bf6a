"""What a pair costs is what was run: arithmetic by hand, memory that was really taken, time that passed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from captum_m2ib import DualEncoder
from captum_m2ib.benchmark.meters import peak_of
from captum_m2ib.benchmark.methods import METHODS, Family, Method
from captum_m2ib.benchmark.scenes import cost as costs
from captum_m2ib.benchmark.scenes.cost import FIGURES, cost


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint)


class Busy:
    """Sleeps, and multiplies matrices of known size."""

    def __init__(self, encoder: Any) -> None:
        self.weight = torch.ones(100, 200)

    def attribute(self, inputs: Any, additional_forward_args: Any = None) -> Any:
        time.sleep(0.02)
        torch.ones(50, 100) @ self.weight
        return inputs


def test_time_and_arithmetic(encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(costs, "_peak_elsewhere", lambda method, model: 12.5)
    found = cost(Method("busy", Family("busy", Busy)), encoder, "unused", repeats=3)
    assert tuple(found) == FIGURES and found["peak MiB"] == [12.5]
    assert found["GFLOP per pair"] == [pytest.approx(2 * 50 * 100 * 200 / 1e9)]
    assert found["seconds per pair"][0] >= 0.02


def test_peak_memory_is_what_a_run_takes_at_once():
    def take() -> None:
        for _ in range(4):
            torch.ones(16 * 2**20)

    # Four times 64 MiB, one after the other.
    assert 60 < peak_of(take) < 130


def test_memory_is_measured_elsewhere(checkpoint: Path):
    assert 0 <= costs._peak_elsewhere(METHODS["centre"], str(checkpoint)) < 100


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_fails_in_the_other_process_is_an_error_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RuntimeError, match=r"^centre: its memory could not be measured .*nothing is not a directory"):
        costs._peak_elsewhere(METHODS["centre"], str(tmp_path / "nothing"))
    monkeypatch.setattr(costs, "_peak_here", die)
    with pytest.raises(RuntimeError, match=r"^centre: .*was killed"):
        costs._peak_elsewhere(METHODS["centre"], "unused")
