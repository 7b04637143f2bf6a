"""The trained checkpoint that comes with the package."""

from __future__ import annotations

import json
from typing import Any

import pytest

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck
from captum_m2ib.benchmark.scenes import measure
from captum_m2ib.scenes import CHECKPOINT


class TestShippedCheckpoint:
    @pytest.fixture(scope="class")
    def method(self) -> MultiModalInfoBottleneck:
        return MultiModalInfoBottleneck(DualEncoder.from_pretrained(CHECKPOINT))

    @pytest.fixture(scope="class")
    def report(self) -> dict[str, Any]:
        return json.loads((CHECKPOINT / "report.json").read_text(encoding="utf-8"))

    def test_is_complete_and_small(self) -> None:
        assert CHECKPOINT.is_dir()
        names = {path.name for path in CHECKPOINT.iterdir()}
        assert {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "report.json",
            "bottleneck_statistics.safetensors",
        } <= names
        assert names & {"preprocessor_config.json", "processor_config.json"}
        assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*")) < 4_000_000

    def test_loads_with_statistics_of_the_recommended_layers(self, method: MultiModalInfoBottleneck) -> None:
        encoder = method.forward_func
        assert encoder.processor is not None and not encoder.training
        assert all(encoder.statistics_of(layer) is not None for layer in encoder.recommended_layers())

    def test_retrieves(self, report: dict[str, Any]) -> None:
        assert report["retrieval"]["top1"] >= 0.85
        assert report["retrieval"]["top5"] >= 0.99

    def test_names(self, report: dict[str, Any]) -> None:
        assert report["naming"]["accuracy"] >= 0.95

    def test_maps_fall_on_what_is_named(self, method: MultiModalInfoBottleneck) -> None:
        least = {
            "image pointing": 0.45,
            "image mass": 0.20,
            "image auroc": 0.88,
            "text auroc": 0.88,
            "text top-1": 0.88,
        }
        assert_reached(method, 24, least)

    @pytest.mark.slow
    def test_maps_fall_on_what_is_named_over_many_probes(self, method: MultiModalInfoBottleneck) -> None:
        least = {
            "image pointing": 0.60,
            "image mass": 0.25,
            "image auroc": 0.93,
            "text auroc": 0.95,
            "text top-1": 0.95,
        }
        assert_reached(method, 200, least)


def assert_reached(method: MultiModalInfoBottleneck, probes: int, least: dict[str, float]) -> None:
    found = measure(method, probes)
    short = {name: str(found[name]) for name, bound in least.items() if not found[name].mean >= bound}
    assert not short
