"""The passes of a picture's descent in bfloat16, and all else in the model's own precision."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from families import Case, family_named
from torch import Tensor

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck
from captum_m2ib.metrics import pearson
from captum_m2ib.scenes import CHECKPOINT, pair_probes

OWN, LOW = torch.float32, torch.bfloat16


def correlation(one: Tensor, other: Tensor) -> float:
    return float(pearson(one.flatten()[None], other.flatten()[None]))


@contextmanager
def passes(case: Case, tower: str):
    """Yields the set of the passes that run there: rows to a pair, whether they have a graph, and what they run in."""
    seen: set[tuple[int, bool, torch.dtype]] = set()
    block = getattr(case.roots[0], tower).encoder.layers[3].mlp.fc1
    pairs = len(case.inputs[0])
    hook = block.register_forward_hook(
        lambda _, args, output: seen.add((len(output) // pairs, output.requires_grad, output.dtype))
    )
    yield seen
    hook.remove()


def with_graph(seen: set[tuple[int, bool, torch.dtype]]) -> set[tuple[int, torch.dtype]]:
    return {(rows, dtype) for rows, has_graph, dtype in seen if has_graph}


@pytest.mark.parametrize("settings", [{}, {"score_range": 1.0}], ids=["measured range", "given range"])
def test_steps_of_a_picture_run_in_low_precision_and_nothing_else(settings: dict):
    case = family_named("clip").build()
    expected = case.attribute(n_steps=4, **settings)
    with passes(case, "vision_model") as seen, passes(case, "text_model") as of_captions:
        found = case.attribute(n_steps=4, precision="bf16", **settings)
    assert with_graph(seen) == {(3, LOW)}
    assert {dtype for _, has_graph, dtype in seen if not has_graph} == {OWN}
    assert {dtype for _, _, dtype in of_captions} == {OWN}
    assert found[0].dtype == torch.float32
    assert not torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert correlation(found[0], expected[0]) > 0.99


@pytest.mark.parametrize(("limit", "rows"), [(None, {(1, OWN), (2, LOW)}), (1, {(1, OWN), (1, LOW)})])
def test_a_draw_without_noise_keeps_the_models_own_precision(limit: int | None, rows: set):
    case = family_named("clip").build().select(slice(0, 1))
    method = MultiModalInfoBottleneck(case.forward, [None, case.layers[1][0]], case.layouts)
    with passes(case, "vision_model") as seen:
        case.attribute(method, precision="bf16", internal_batch_size=limit, noiseless=(0.5, 0.0))
    assert with_graph(seen) == rows


def test_pairs_that_rounding_could_tip_keep_their_maps():
    encoder = DualEncoder.from_pretrained(CHECKPOINT)
    # With all passes of the pictures in bfloat16 the third has .984, and captions of other pairs as little as .97.
    probes = pair_probes(118, seed=5)
    chosen = [probes[place] for place in (10, 83, 112, 117)]
    pairs = encoder.prepare([probe.image for probe in chosen], [probe.caption for probe in chosen])
    plain, low = (
        MultiModalInfoBottleneck(encoder).attribute(
            pairs.inputs, additional_forward_args=pairs.additional_forward_args, precision=precision
        )
        for precision in (None, "bf16")
    )
    assert torch.equal(plain[1], low[1]) and not torch.equal(plain[0], low[0])
    assert float(pearson(plain[0].sum(1), low[0].sum(1)).min()) > 0.995


def test_what_is_measured_keeps_the_models_own_precision():
    case = family_named("clip").build()
    given = {"additional_forward_args": case.additional, "n_steps": 1}
    records = [
        case.method().attribute_with_record(case.inputs, precision=precision, **given)[1].modalities
        for precision in (None, "bf16")
    ]
    for plain, low in zip(*records, strict=True):
        assert torch.equal(plain.score_range, low.score_range) and torch.equal(plain.score_before, low.score_before)
        assert low.score.dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp16", torch.bfloat16, 16])
def test_a_precision_that_is_none(precision):
    with pytest.raises(ValueError, match="precision: expected 'bf16' or None"):
        family_named("clip").build().attribute(precision=precision)
