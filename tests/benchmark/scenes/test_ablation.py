"""The ablation's rows are what the parts measure on their own, and differences are paired."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck
from captum_m2ib.benchmark.compare import Difference
from captum_m2ib.benchmark.scenes.ablation import FIGURES, VARIANTS, Changed, Row, Variant, main, measure, table
from captum_m2ib.benchmark.scenes.run import Plan
from captum_m2ib.metrics import Summary, pearson, relevance_mass
from captum_m2ib.scenes import image_probes

PROBES = 2


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint)


def test_rows_are_what_the_method_measures(encoder: DualEncoder):
    wider = Variant("wider", 0, settings={"smoothing": 0.2})
    base, changed, caption = measure([encoder], PROBES, 3, [VARIANTS[0], wider, Variant("default", 1)])
    probes = image_probes(PROBES, Plan(probes=PROBES, seed=3, split="validation").probes_seed, 64)
    pairs = encoder.prepare([probe.image for probe in probes], [probe.caption for probe in probes])
    pixels, ids = pairs.inputs
    masks = torch.stack([torch.from_numpy(probe.mask) for probe in probes])
    found = {}
    for name, settings in (("base", {}), ("changed", {"smoothing": 0.2})):
        maps, again = (
            MultiModalInfoBottleneck(encoder).attribute(
                pixels, additional_forward_args=(ids, *pairs.additional_forward_args), seed=seed, **settings
            )
            for seed in (0, 1)
        )
        found[name] = relevance_mass(maps, masks), pearson(maps.sum(1), again.sum(1))
    for row, name in ((base, "base"), (changed, "changed")):
        mass, seeds = found[name]
        assert row.figures["image mass"].mean == pytest.approx(float(mass.mean()), rel=1e-3)
        assert row.figures["image seeds"].mean == pytest.approx(float(seeds.nanmean()), abs=1e-3)
    gain = float((found["changed"][0] - found["base"][0]).mean())
    assert changed.differences["image mass"].mean == pytest.approx(gain, abs=1e-3)
    assert base.differences == caption.differences == {} and tuple(caption.figures) == FIGURES[1]


def test_each_variant_changes_what_it_says(encoder: DualEncoder):
    defaults = {modality: Changed(encoder, Variant("default", modality)) for modality in (0, 1)}
    for variant in VARIANTS:
        method = Changed(encoder, variant).method
        if variant.method is not None:
            assert isinstance(method, variant.method) and not variant.settings
            continue
        default = defaults[variant.modality].method
        place = variant.modality
        assert (variant.layer is not None or variant.published) == (
            method.layers[place].name != default.layers[place].name
        )
        assert (method.priors[place] is None) == (variant.statistics is None or variant.published)
    assert len({(variant.name, variant.modality) for variant in VARIANTS}) == len(VARIANTS)


def test_marks_where_the_difference_is_clear():
    def row(name: str, low: float, high: float) -> Row:
        summary = Summary(0.5, 0.4, 0.6, 3, 0)
        difference = Difference((low + high) / 2, low, high, 3, 1, 1)
        return Row(Variant(name, 0), dict.fromkeys(FIGURES[0], summary), dict.fromkeys(FIGURES[0], difference))

    lines = table([row("better", 0.1, 0.2), row("worse", -0.2, -0.1), row("level", -0.1, 0.1)]).splitlines()
    assert [line.count("] +") for line in lines[2:5]] == [4, 0, 0]
    assert [line.count("] -") for line in lines[2:5]] == [0, 4, 0]


@pytest.mark.slow
def test_the_command_prints_every_variant(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    main(["--model", str(checkpoint), "--probes", "1"])
    told = capsys.readouterr().out
    assert all(f"| {variant.name} |" in told for variant in VARIANTS)
