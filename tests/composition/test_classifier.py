"""Captions as classes: scores are those of the pairs, and maps those of the method; and Quantus measures them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from captum_m2ib import DualEncoder, LeGrad
from captum_m2ib.composition import CaptionClassifier, explain_classes

CAPTIONS = ["a red cross", "a photo of a blue circle", "a white star"]


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8))


def test_scores_and_maps_are_those_of_the_pairs(encoder: DualEncoder, pictures: list[np.ndarray]):
    classifier = CaptionClassifier(encoder, CAPTIONS)
    pairs = encoder.prepare(pictures, [CAPTIONS[2], CAPTIONS[0]])
    (mask,) = pairs.additional_forward_args
    with torch.no_grad():
        scores = classifier(pairs.inputs[0])
        expected = encoder(*pairs.inputs, mask)
    torch.testing.assert_close(scores[[0, 1], [2, 0]], expected)
    maps = explain_classes(classifier, pairs.inputs[0].numpy(), np.array([2, 0]), method="legrad", device="cpu")
    (found,) = LeGrad(encoder).attribute((pairs.inputs[0],), additional_forward_args=(pairs.inputs[1], mask))
    np.testing.assert_allclose(maps, found.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="method: expected one of"):
        explain_classes(classifier, pairs.inputs[0].numpy(), [0, 1], method="none")


@pytest.mark.skipif(
    importlib.util.find_spec("quantus") is None and "M2IB_NEED_QUANTUS" not in os.environ,
    reason="needs the package of the extra quantus",
)
@pytest.mark.filterwarnings("ignore")
def test_quantus_measures_maps(encoder: DualEncoder, pictures: list[np.ndarray]):
    import quantus

    classifier = CaptionClassifier(encoder, CAPTIONS)
    pixels = encoder.prepare(pictures, CAPTIONS[0]).inputs[0].numpy()
    shared: dict[str, Any] = {"x_batch": pixels, "y_batch": np.array([2, 0]), "model": classifier, "softmax": False}
    # Its areas need numpy 1: curves it is.
    flip = quantus.PixelFlipping(features_in_step=512, perturb_baseline="mean", disable_warnings=True)
    flipped = flip(**shared, explain_func=explain_classes, explain_func_kwargs={"method": "legrad"})
    given = flip(**shared, a_batch=explain_classes(classifier, pixels, [2, 0], method="legrad"))
    np.testing.assert_allclose(flipped, given, rtol=1e-4)
    assert np.shape(flipped) == (2, 24) and np.isfinite(flipped).all()
