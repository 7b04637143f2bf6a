"""The trained checkpoint that comes with the package is complete, small, and good."""

from __future__ import annotations

import json

import pytest

from captum_m2ib import ChannelStatistics, DualEncoder, MultiModalInfoBottleneck
from captum_m2ib.benchmark.scenes.measures import measure
from captum_m2ib.scenes import CHECKPOINT, evaluate_naming, evaluate_retrieval

REACHED = {
    "image pointing": 0.95,
    "image mass": 0.73,
    "image auroc": 0.985,
    "text auroc": 0.98,
    "text top-1": 0.98,
}
"""What the default method must reach on held-out probes."""


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return DualEncoder.from_pretrained(CHECKPOINT)


def test_is_complete_and_small() -> None:
    names = {path.name for path in CHECKPOINT.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
        "report.json",
        "bottleneck_statistics.safetensors",
    } <= names
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*")) < 4_000_000


def test_default_prior_is_standardised_by_shipped_statistics(encoder: DualEncoder) -> None:
    image, text = MultiModalInfoBottleneck(encoder).priors
    assert image == "pair" and isinstance(text, ChannelStatistics)
    assert text is encoder.statistics["text_model.embeddings"]


def test_retrieves_and_names(encoder: DualEncoder) -> None:
    report = json.loads((CHECKPOINT / "report.json").read_text(encoding="utf-8"))
    assert report["retrieval"]["top1"] >= 0.85 and report["retrieval"]["top5"] >= 0.99
    assert report["naming"]["accuracy"] >= 0.95
    retrieval, naming = evaluate_retrieval(encoder.model, sets=2, seed=1), evaluate_naming(encoder.model, 256, seed=1)
    assert retrieval["top1"] >= 0.85 and retrieval["top5"] >= 0.98 and naming["accuracy"] >= 0.95


def test_maps_fall_on_what_is_named(encoder: DualEncoder) -> None:
    found = measure(MultiModalInfoBottleneck(encoder), 12)
    assert all(found[name].high >= bound and found[name].mean >= bound - 0.1 for name, bound in REACHED.items())


@pytest.mark.slow
def test_maps_fall_on_what_is_named_over_many_probes(encoder: DualEncoder) -> None:
    found = measure(MultiModalInfoBottleneck(encoder), 200)
    assert all(found[name].low >= bound for name, bound in REACHED.items())
    assert found["image mass moved"].low > 0.68
