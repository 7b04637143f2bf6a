"""Remedies do what the ablation says of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck, Pairs
from captum_m2ib.benchmark.scenes.remedies import BETAS, AgainstTheBatch, BetaOfEachPair, ClosedPrefix, LateLayers
from captum_m2ib.engine.settings import Settings
from captum_m2ib.scenes import image_probes

QUICK: dict[str, Any] = {"n_steps": 2, "n_samples": 4}


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def pairs(encoder: DualEncoder) -> Pairs:
    probes = image_probes(3, 5, 64)
    return encoder.prepare([probe.image for probe in probes], [probe.caption for probe in probes])


def test_only_patches_and_words_are_open(encoder: DualEncoder, pairs: Pairs):
    method = ClosedPrefix(encoder)
    pixels, ids = pairs.inputs
    patches, words = torch.zeros(3, 65, 4), torch.zeros(*ids.shape, 4)
    opened = []
    for index, (hidden, inputs) in enumerate(((patches, pixels), (words, ids))):
        gates = method._gate_filter(index, Settings())(hidden, inputs, None)
        assert gates is not None
        opened.append(torch.sigmoid(gates(torch.ones_like(hidden))))
    assert bool((opened[0][:, 0] < 1e-12).all()) and bool((opened[0][:, 1:] > 0.7).all())
    is_word = ~torch.isin(ids, torch.tensor(encoder.processor.tokenizer.all_special_ids))
    assert bool((opened[1][is_word] > 0.7).all()) and bool((opened[1][~is_word] < 1e-12).all())
    assert 0 < int(is_word.sum()) < is_word.numel() - 5


def test_closed_tokens_carry_nothing_of_the_score(encoder: DualEncoder, pairs: Pairs):
    """With all gates of patches and words wide open, what is lost is what went through the other tokens."""
    settings: dict[str, Any] = {"beta": 0.0, "lr": 1e-6, "initial_gate": 1 - 1e-6, **QUICK}
    lost = []
    for method in (LateLayers(encoder), ClosedPrefix(encoder)):
        _, record = method.attribute_with_record(
            pairs.inputs, additional_forward_args=pairs.additional_forward_args, **settings
        )
        lost.append([(part.score_before - part.score_after).abs() for part in record.modalities])
    for whole, closed in zip(*lost, strict=True):
        assert float(whole.max()) < 1e-5 and bool((closed > 0.001).all())


@pytest.fixture(scope="module")
def alone(encoder: DualEncoder, pairs: Pairs) -> Callable[[int, float], tuple[torch.Tensor, Any]]:
    """Maps of one pair with one beta, and the record of its picture; each is computed once."""

    @functools.cache
    def run(index: int, beta: float) -> tuple[torch.Tensor, Any]:
        pixels, *rest = (tensor[index : index + 1] for tensor in (*pairs.inputs, *pairs.additional_forward_args))
        bits, record = MultiModalInfoBottleneck(encoder).attribute_with_record(
            pixels, additional_forward_args=tuple(rest), beta=beta, seed=3
        )
        return bits[0], record.modalities[0]

    return run


@pytest.mark.parametrize("share", [0.0, 0.9, 1.05, 10.0])
def test_each_pair_gets_the_largest_beta_that_keeps_the_share(
    encoder: DualEncoder, pairs: Pairs, alone: Callable[[int, float], tuple[torch.Tensor, Any]], share: float
):
    pixels, *rest = (*pairs.inputs, *pairs.additional_forward_args)
    found = BetaOfEachPair(encoder, share).attribute(pixels, tuple(rest), seed=3)
    for index in range(3):
        for beta in BETAS:
            bits, picture = alone(index, beta)
            if float(picture.score_after[0]) >= share * float(picture.score_before[0]):
                break
        torch.testing.assert_close(found[index], bits, rtol=1e-3, atol=1e-4)


def test_the_score_is_beyond_the_other_captions(encoder: DualEncoder, pairs: Pairs):
    pixels, ids = pairs.inputs
    mask = pairs.additional_forward_args[0]
    found = AgainstTheBatch(encoder, temperature=0.1).attribute(pixels, (ids, mask), seed=2)

    def contrast(picture: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        rows = picture.shape[0]
        every = torch.stack(
            [encoder(picture, ids[i : i + 1].expand(rows, -1), mask[i : i + 1].expand(rows, -1)) for i in range(3)], 1
        )
        return every.gather(1, own.unsqueeze(1)).squeeze(1) - 0.1 * torch.logsumexp(every / 0.1, 1)

    method = MultiModalInfoBottleneck(contrast, [None], layouts=encoder.layouts[:1])
    expected = method.attribute(pixels, additional_forward_args=torch.arange(3), seed=2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    plain = MultiModalInfoBottleneck(encoder).attribute(pixels, additional_forward_args=(ids, mask), seed=2)
    assert not torch.allclose(found, plain, rtol=0.05)
