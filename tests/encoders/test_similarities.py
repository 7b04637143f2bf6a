"""Every first input beside every second one is what pairs say one by one; and what has no embedding is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES

from captum_m2ib import DualEncoder


def test_every_pair_has_the_score_that_forward_gives_it(checkpoint: Path):
    encoder = DualEncoder.from_pretrained(checkpoint)
    pictures = list(np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8))
    captions = ["a red cross", "a photo of a blue circle"]
    first, second = encoder.prepare(pictures, captions[0]), encoder.prepare(pictures[0], captions)
    with torch.no_grad():
        found = encoder.similarities(first.inputs[0], second.inputs[1], *second.additional_forward_args)
        assert found.shape == (3, 2)
        for row, picture in enumerate(pictures):
            pairs = encoder.prepare(picture, captions)
            torch.testing.assert_close(found[row], encoder(*pairs.inputs, *pairs.additional_forward_args))


def test_sides_that_read_each_other_have_no_embeddings_of_their_own():
    (family,) = (one for one in FAMILIES if one.name == "xclip")
    encoder = family.build().forward
    with pytest.raises(ValueError, match=r"^model: in .* one side reads what the other returns"):
        encoder.similarities(torch.zeros(1, 2, 3, 32, 32), torch.zeros(1, 3, dtype=torch.long))
