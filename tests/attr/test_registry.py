"""Methods by name: one list for the command, the benchmark and the library, and the unit of what each says."""

from __future__ import annotations

import inspect

import captum.attr
import pytest

from captum_m2ib import DualEncoder, GradECLIP, MultiModalInfoBottleneck
from captum_m2ib.attr.registry import METHODS, UNITS, method_named, unit_of
from captum_m2ib.benchmark.methods import FAMILIES
from captum_m2ib.explanations.units import WORDINGS
from captum_m2ib.scenes import CHECKPOINT


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return DualEncoder.from_pretrained(CHECKPOINT)


def test_the_benchmark_compares_every_method_under_the_same_name_in_the_same_order():
    assert [name for name in FAMILIES if name in METHODS] == list(METHODS)
    for name, method in METHODS.items():
        assert (FAMILIES[name].make, FAMILIES[name].seeded) == (method.make, method.seeded)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.late_only])
def test_each_is_made_by_its_name_and_takes_a_seed_if_it_says_so(name: str, encoder: DualEncoder):
    method = method_named(name, encoder)
    assert ("seed" in inspect.signature(method.attribute).parameters) == METHODS[name].seeded
    assert unit_of(method) in UNITS and method.forward_func is encoder


def test_layers_reach_the_method(encoder: DualEncoder):
    blocks = [encoder.stages(index)[0][0] for index in (0, 1)]
    found = method_named("grad-eclip", encoder, layers=blocks)
    assert isinstance(found, GradECLIP) and [layer.module for layer in found.layers] == blocks


def test_what_cannot_be_named(encoder: DualEncoder):
    with pytest.raises(ValueError, match=r"^method: expected one of m2ib, .*rise, got 'legard'\.$"):
        method_named("legard", encoder)
    with pytest.raises(ValueError, match=r"^layers: those of m2ib-published are fixed; leave out layers"):
        method_named("m2ib-published", encoder, layers=(None, None))


def test_units_have_words():
    assert tuple(WORDINGS) == UNITS


def test_units_of_methods_of_captum(encoder: DualEncoder):
    assert unit_of(MultiModalInfoBottleneck(encoder)) == "bits"
    assert unit_of(captum.attr.IntegratedGradients(encoder)) == "score"
    assert unit_of(captum.attr.Saliency(encoder)) == unit_of(object()) == "relative"
