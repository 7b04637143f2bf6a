"""The examples in docstrings run, on the model that is shipped, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import captum_m2ib
from captum_m2ib.scenes import CHECKPOINT, image_probes


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(captum_m2ib.__path__, "captum_m2ib."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    # Without globals of their own, tests keep those of the module that they are written in.
    found = {test.name: test for module in modules() for test in finder.find(module, module.__name__, module=module)}
    return [test for test in found.values() if test.examples]


EXAMPLES = examples()


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    """What the examples take for granted, as the reference says."""
    encoder = captum_m2ib.DualEncoder.from_pretrained(CHECKPOINT)
    probes = image_probes(2, seed=5)
    images, captions = [probe.image for probe in probes], [probe.caption for probe in probes]
    pairs = encoder.prepare(images, captions)
    image_bits, token_bits = captum_m2ib.MultiModalInfoBottleneck(encoder).attribute(
        pairs.inputs, additional_forward_args=pairs.additional_forward_args, n_steps=2, n_samples=2
    )
    names = {name: getattr(captum_m2ib, name) for name in captum_m2ib.__all__}
    own = {"encoder": encoder, "images": images, "captions": captions, "pairs": pairs}
    return {**names, **own, "image_bits": image_bits, "token_bits": token_bits, "np": np, "torch": torch, "nn": nn}


def test_examples_are_found():
    assert {test.name for test in EXAMPLES} > {
        "captum_m2ib.encoders.dual_encoder.DualEncoder",
        "captum_m2ib.metrics.localisation.auroc",
    }


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name)
def test_the_example_runs(test: doctest.DocTest, given: dict[str, Any]):
    state = torch.get_rng_state()
    torch.manual_seed(0)
    parser = doctest.DocTestRunner(verbose=False)
    told: list[str] = []
    test.globs = {**given, **test.globs}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # As everywhere in the tests: a ruined model's pairs, or a rival that fits as well, have nothing to lose.
        warnings.filterwarnings("ignore", ".*about as high with all gates closed")
        parser.run(test, out=told.append, clear_globs=False)
    torch.set_rng_state(state)
    assert parser.summarize(verbose=False).failed == 0, "".join(told)


def test_a_wrong_example_fails():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda _: None).failed == 1
