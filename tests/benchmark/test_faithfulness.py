"""Faithfulness figures on a model whose answers are known by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_m2ib import DualEncoder
from captum_m2ib.benchmark.faithfulness import FIGURES, faithfulness, maskable_tokens, token_table
from captum_m2ib.encoders.spelling import blank_token
from captum_m2ib.scenes import CHECKPOINT, image_probes

EMBEDDINGS = torch.tensor([[0.0], [0.0], [1.0], [5.0], [2.0]])
WORD, LOUD, QUIET = 2, 3, 4


class Sum(nn.Module):
    """The score is the mean of the left half's pixels plus a tenth of the sum of the words' values."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(EMBEDDINGS)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        left: Tensor = pixels[..., : pixels.shape[-1] // 2].mean((1, 2, 3)) + self.table(ids).sum((1, 2)) / 10
        return left


MODEL = Sum()
PIXELS = torch.ones(2, 3, 4, 4)
IDS = torch.tensor([[1, LOUD, QUIET, 1], [1, WORD, QUIET, 1]])
MASKABLE = torch.tensor([[False, True, True, False]] * 2)
LEFT = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 4, 4)
MAPS = torch.cat([LEFT, 1 - LEFT])
TOKENS = torch.tensor([[9.0, 1.0, 0.0, 9.0], [9.0, 1.0, 0.0, 9.0]])


def found(maps: Any, **options: Any) -> dict[str, list[float]]:
    given: dict[str, Any] = {"maskable": MASKABLE, "replacement": 0, "embedding": MODEL.table, "steps": 4, **options}
    return faithfulness(MODEL, (PIXELS, IDS), maps, **given)


def test_by_hand():
    figures = found((MAPS, TOKENS))
    assert set(figures) == set(FIGURES)
    # The left half alone keeps the score; the right half alone leaves the words', that of the picture being 1.
    assert figures["image confidence drop"] == pytest.approx([0.0, 100.0])
    assert figures["image confidence increase"] == [0.0, 0.0]
    # The picture's part after 0, 1, .. 4 quarters, on top of 0.7 and 0.3 of the words.
    assert figures["image deletion"] == pytest.approx([0.7 + 0.25, 0.3 + 0.75])
    # A blurred picture of ones is the picture.
    assert figures["image insertion"] == pytest.approx([1.7, 1.3])
    # Word 1 is kept, word 2 is scaled to nothing: 2 tenths are lost.
    assert figures["text confidence drop"] == pytest.approx([20.0, 20.0])
    assert figures["text confidence increase"] == [0.0, 0.0]
    # Half the words each step: all, without the first, none.
    assert figures["text deletion"] == pytest.approx([1 + (0.7 / 2 + 0.2 + 0) / 2, 1 + (0.3 / 2 + 0.2 + 0) / 2])
    assert figures["text insertion"] == pytest.approx([1 + (0 + 0.5 + 0.7 / 2) / 2, 1 + (0 + 0.1 + 0.3 / 2) / 2])


def test_one_modality_is_enough():
    pictures, words = found((MAPS, None)), found((None, TOKENS))
    assert {name.split()[0] for name in pictures} == {"image"} and {name.split()[0] for name in words} == {"text"}
    assert {**pictures, **words} == found((MAPS, TOKENS))
    assert faithfulness(MODEL, (PIXELS, IDS), (MAPS, None), steps=4) == pictures


def test_a_constant_map_has_no_confidence_but_a_curve():
    figures = found((torch.ones(2, 4, 4), torch.ones(2, 4)))
    for name in ("image confidence drop", "image confidence increase", "text confidence drop"):
        assert all(map(math.isnan, figures[name]))
    assert all(map(math.isfinite, figures["image deletion"])) and all(map(math.isfinite, figures["text insertion"]))


@pytest.mark.parametrize("missing", ["maskable", "replacement"])
def test_captions_need_their_words(missing: str):
    with pytest.raises(ValueError, match=f"^{missing}: expected one because captions are measured"):
        found((None, TOKENS), **{missing: None})


def test_a_model_of_another_kind_needs_its_table():
    with pytest.raises(ValueError, match=r"^embedding: found no table of tokens in Sum"):
        found((None, TOKENS), embedding=None)


def test_the_shipped_model_s_table_words_and_blank():
    encoder = DualEncoder.from_pretrained(CHECKPOINT)
    pairs = encoder.prepare([p.image for p in image_probes(2, 0)], ["a red cross", "a picture of a blue star"])
    table: Any = token_table(encoder)
    assert table is encoder.model.text_model.embeddings.token_embedding
    tokenizer = encoder.processor.tokenizer
    assert blank_token(encoder) == tokenizer.unk_token_id and tokenizer.unk_token_id != tokenizer.eos_token_id
    assert maskable_tokens(pairs).sum(1).tolist() == [3, 6]


@pytest.mark.parametrize(
    "unknown, padding, end, blank", [(7, 5, 9, 7), (9, 5, 9, 5), (None, 5, 9, 5), (9, 9, 9, 0), (None, None, None, 0)]
)
def test_a_blank_never_ends_a_caption(unknown: Any, padding: Any, end: Any, blank: int):
    class Tokenizer:
        unk_token_id, pad_token_id, bos_token_id, eos_token_id = unknown, padding, 1, end

    class Encoder:
        processor = Tokenizer()

    assert blank_token(Encoder()) == blank
