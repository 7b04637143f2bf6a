"""Ids that enter a tower by several tables: all of them are one layer, and none of them is one alone."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import LAYOUTS, captions, image_tower, pictures
from torch import Tensor, nn

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck
from captum_m2ib.encoders.token_rows import TokenRows


class TwoTables(nn.Module):
    """A text tower whose second block is given what a table of its own holds of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.values = nn.Embedding(64, 16), nn.Embedding(64, 8)
        self.first, self.second, self.add = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        weight = (torch.ones_like(ids) if mask is None else mask).to(self.first.weight.dtype)[..., None]
        hidden = self.first(self.tokens(ids)).tanh()
        # Tokens are mixed before the second table is read.
        hidden = hidden + (hidden * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        hidden = self.second(hidden) + self.add(self.values(ids))
        return (hidden * weight).sum(1) / weight.sum(1)


@pytest.fixture
def encoder() -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(image_tower(), TwoTables(), layouts=LAYOUTS).eval().double()


def test_all_tables_are_one_layer(encoder: DualEncoder):
    text, found = encoder.text_tower, encoder.embeddings_of(1)
    assert isinstance(found, TokenRows) and [*found.tables] == [text.tokens, text.values]
    assert encoder.token_table_of(1) is found and encoder.recommended_layers()[1] is found
    ids, _ = captions()
    assert torch.equal(found(ids), torch.cat([text.tokens(ids), text.values(ids)], -1))
    assert encoder.statistics_of(found).mean.shape == (24,)


def test_the_score_is_the_towers_own_whether_the_tables_are_known_or_not(encoder: DualEncoder):
    ids, mask = captions()
    given = pictures().double(), ids, mask
    before = encoder(*given)
    encoder.embeddings_of(1)
    assert torch.equal(encoder(*given), before)
    assert not encoder.text_tower.tokens._forward_hooks and not encoder.text_tower.values._forward_hooks


def test_nothing_of_a_caption_goes_round_all_tables_and_something_round_each(encoder: DualEncoder):
    ids, mask = captions()
    other = (ids * 7) % 50 + 5
    found = encoder.embeddings_of(1)

    def moves_behind(layer: nn.Module) -> float:
        handle = layer.register_forward_hook(lambda module, args, output: torch.ones_like(output))
        scores = [encoder(pictures().double(), given, mask) for given in (ids, other)]
        handle.remove()
        return float((scores[0] - scores[1]).abs().max().detach())

    assert moves_behind(found) == 0.0
    found.handed_on = lambda ids: contextlib.nullcontext()
    assert min(moves_behind(table) for table in found.tables) > 1e-2


def test_bits_of_all_tables_are_the_captions(encoder: DualEncoder):
    ids, mask = captions()
    given = pictures().double(), ids
    bits = MultiModalInfoBottleneck(encoder).attribute(given, additional_forward_args=(mask,), n_steps=2)[1]
    assert bits.shape == ids.shape and bool((bits[mask > 0] > 0).all()) and not bits[mask == 0].any()


def test_one_of_several_tables_is_refused(encoder: DualEncoder):
    for table in encoder.embeddings_of(1).tables:
        with pytest.raises(ValueError, match=r"^layers: the token ids enter .*tokens and .*values.*embeddings_of\(1\)"):
            MultiModalInfoBottleneck(encoder, layers=(None, table))


class Bare(TwoTables):
    """The second table is a parameter, which no module reads."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = self._modules.pop("values").weight

    def values(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.rows)


def test_ids_that_no_module_reads_are_noticed():
    torch.manual_seed(0)
    encoder = DualEncoder(image_tower(), Bare(), layouts=LAYOUTS).eval()
    with pytest.warns(UserWarning, match=r"^model: Bare reads which token is where outside of .*functional\.embedding"):
        assert encoder.embeddings_of(1) is encoder.text_tower.tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.embeddings_of(1)


class EndsAtHighest(nn.Module):
    """Where a caption ends is told by its highest id, and by an id of its own: neither says which token is where."""

    def __init__(self, end: int | None) -> None:
        super().__init__()
        self.tokens, self.head, self.end = nn.Embedding(64, 16), nn.Linear(16, 8), end

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        ends = ids.argmax(1) if self.end is None else (ids == self.end).int().argmax(1)
        return self.head(self.tokens(ids).cumsum(1))[torch.arange(len(ids)), ends]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("end", [None, 3, 7, 63])
def test_where_a_caption_ends_is_no_table(end: int | None):
    encoder = DualEncoder(image_tower(), EndsAtHighest(end), layouts=LAYOUTS)
    assert encoder.embeddings_of(1) is encoder.text_tower.tokens


class PerLayer(nn.Module):
    """Gemma 3n, whose blocks are each given rows of a table of their own."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 64}
        config = transformers.Gemma3nTextConfig(
            **sizes,
            vocab_size_per_layer_input=64,
            hidden_size_per_layer_input=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            num_kv_shared_layers=0,
            laurel_rank=4,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.0, 0.0],
            pad_token_id=0,
            eos_token_id=63,
            bos_token_id=62,
        )
        self.model, self.head = transformers.Gemma3nTextModel(config), nn.Linear(32, 8)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return self.head(hidden.mean(1))


def test_embeddings_per_layer_are_found_under_any_name():
    torch.manual_seed(0)
    encoder = DualEncoder(image_tower(), PerLayer(), layouts=LAYOUTS).eval()
    text, found = encoder.text_tower.model, encoder.embeddings_of(1)
    assert isinstance(found, TokenRows) and [*found.tables] == [text.embed_tokens, text.embed_tokens_per_layer]
    with pytest.raises(ValueError, match=r"embed_tokens and .*embed_tokens_per_layer"):
        MultiModalInfoBottleneck(encoder, layers=(None, text.embed_tokens))


def test_one_table_stays_what_it_is():
    encoder = DualEncoder(image_tower(), nn.Sequential(nn.Embedding(64, 8), nn.Flatten(), nn.LazyLinear(8)))
    assert not isinstance(encoder.embeddings_of(1), TokenRows)
