"""Scores that are no cosine: late interaction by hand, and what an encoder makes of a family that names one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_m2ib import DualEncoder
from captum_m2ib.encoders.families import FAMILIES, Family, Side
from captum_m2ib.encoders.scores import MaxSim

PAGE = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], [[-1.0, 0.0], [0.0, -1.0], [-0.5, -0.5]]])
QUERY = torch.tensor([[[3.0, 1.0], [-1.0, -1.0], [0.0, 0.0]], [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]])


def test_each_query_token_adds_its_best_page_token():
    # By hand: max(3, 2), max(-1, -2), padding; max(-1, -2, -1.5), padding, padding.
    assert MaxSim().terms(PAGE, QUERY).tolist() == [[3.0, -1.0, 0.0], [-1.0, 0.0, 0.0]]
    assert MaxSim()(PAGE, QUERY).tolist() == [2.0, -1.0]


def test_padding_of_a_page_is_no_match():
    page = torch.tensor([[[-1.0, 0.0], [0.0, 0.0]]])
    assert MaxSim()(page, torch.tensor([[[1.0, 0.0]]])).tolist() == [-1.0]


@pytest.mark.parametrize("score", [MaxSim(), MaxSim(is_mean=True)])
def test_a_query_without_tokens_matches_nothing(score: MaxSim):
    assert score(PAGE, torch.zeros_like(QUERY)).tolist() == [0.0, 0.0]


def test_nan_stays_nan():
    page = PAGE.clone()
    page[0, 0, 0] = torch.nan
    assert MaxSim()(page, QUERY).isnan().tolist() == [True, False]


def test_half_precision_is_scored_in_float32():
    page, query = F.normalize(torch.randn(2, 5, 8), dim=-1), F.normalize(torch.randn(2, 3, 8), dim=-1)
    found = MaxSim()(page.bfloat16(), query.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, MaxSim()(page.bfloat16().float(), query.bfloat16().float()))


class Interacting(nn.Module):
    """Tokens of pictures, one per column, and of captions, held against each other."""

    def __init__(self) -> None:
        super().__init__()
        self.columns, self.words = nn.Linear(4, 6), nn.Embedding(16, 6)


def columns(model: Interacting, pixel_values: Tensor) -> Tensor:
    return F.normalize(model.columns(pixel_values), dim=-1)


def words(model: Interacting, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    found = F.normalize(model.words(input_ids), dim=-1)
    return found if attention_mask is None else found * attention_mask.unsqueeze(-1)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Interacting:
    sides = (
        Side("image", columns, ("pixel_values",), ("columns",)),
        Side("text", words, ("input_ids", "attention_mask"), ("words",)),
    )
    monkeypatch.setitem(FAMILIES, "Interacting", Family(sides, score=MaxSim()))
    torch.manual_seed(0)
    return Interacting().eval()


def test_an_encoder_scores_as_its_family_says(model: Interacting):
    pictures, ids = torch.randn(3, 5, 4), torch.randint(0, 16, (3, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    encoder = DualEncoder(model)
    with torch.no_grad():
        page, query = columns(model, pictures), words(model, ids, mask)
        expected = torch.stack([(query[j] @ page[i].T).amax(1).sum() for i in range(3) for j in range(3)]).view(3, 3)
        torch.testing.assert_close(encoder(pictures, ids, mask), expected.diagonal())
        torch.testing.assert_close(encoder.similarities(pictures, ids, mask), expected)
        # The query stays the query, whichever comes first.
        turned = DualEncoder(model, modalities=("text", "image"))
        torch.testing.assert_close(turned(ids, pictures, mask), expected.diagonal())
        torch.testing.assert_close(turned.similarities(ids, pictures, mask), expected.T)


def test_a_score_of_two_sides_takes_both(model: Interacting):
    with pytest.raises(ValueError, match=r"^modalities: the score of Interacting compares image with text, got"):
        DualEncoder(model, modalities=("image", "image"))


def test_a_mean_is_over_real_tokens_of_the_query():
    mean = MaxSim(is_mean=True)
    assert mean.terms(PAGE, QUERY).tolist() == [[1.5, -0.5, 0.0], [-1.0, 0.0, 0.0]]
    assert mean(PAGE, QUERY).tolist() == [1.0, -1.0]
    # A part of the query is told by its share of the score.
    assert mean(PAGE, QUERY, torch.tensor([[True, False, True], [True, True, True]])).tolist() == [1.5, -1.0]
