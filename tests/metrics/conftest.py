"""The trained compact dual encoder with probes of known truth, loaded once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from captum_m2ib import DualEncoder
from captum_m2ib.scenes import CHECKPOINT, image_probes, token_probes


@dataclass(frozen=True)
class Scenes:
    """A dual encoder, pairs, the truth of each, and which tokens may be masked."""

    encoder: DualEncoder
    inputs: tuple[torch.Tensor, torch.Tensor]
    additional: tuple[torch.Tensor, ...]
    truth: torch.Tensor
    maskable: torch.Tensor
    embedding: str = "text_model.embeddings.token_embedding"


def build(encoder: DualEncoder, probes: list, truths: list) -> Scenes:
    pairs = encoder.prepare([probe.image for probe in probes], [probe.caption for probe in probes])
    maskable = ~torch.tensor(pairs.special)
    truth = torch.zeros(len(probes), *(truths[0].shape if truths else maskable.shape[1:]), dtype=torch.bool)
    for index, probe in enumerate(probes):
        if truths:
            truth[index] = torch.from_numpy(truths[index])
        else:
            truth[index, [position + 1 for position in probe.present_words]] = True
    return Scenes(encoder, pairs.inputs, pairs.additional_forward_args, truth, maskable)


@pytest.fixture(scope="session")
def encoder() -> DualEncoder:
    return DualEncoder.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="session")
def picture_scenes(encoder: DualEncoder) -> Scenes:
    probes = image_probes(12, seed=5)
    return build(encoder, probes, [probe.mask for probe in probes])


@pytest.fixture(scope="session")
def caption_scenes(encoder: DualEncoder) -> Scenes:
    return build(encoder, token_probes(12, seed=5), [])
