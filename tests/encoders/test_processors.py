"""Two functions for a processor, tokens as the characters they spell, and captions that are cut."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip_zoo
import pytest
import torch
from families import image_tower
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from captum_m2ib import DualEncoder, PatchLayout, TextLayout, explain
from captum_m2ib.encoders.spelling import Speller, byte_alphabet
from captum_m2ib.explanations.lettering import clean_token

FEW = {"n_steps": 2, "n_samples": 2, "check": False}
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
_tokenizer = SimpleTokenizer()


def pixels_of(picture: Any) -> Tensor:
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1) / 255


def tokenize(captions: list[str], context_length: int = 12) -> Tensor:
    """A function beside the table of its tokens, as OpenAI's package has one."""
    ids = torch.zeros(len(captions), context_length, dtype=torch.int32)
    for row, caption in zip(ids, captions, strict=True):
        found = [_tokenizer.sot_token_id, *_tokenizer.encode(caption), _tokenizer.eot_token_id]
        if len(found) > context_length:
            raise RuntimeError(f"Input {caption} is too long for context length {context_length}")
        row[: len(found)] = torch.tensor(found)
    return ids


def letters(captions: list[str]) -> dict[str, Tensor]:
    rows = [torch.tensor([ord(letter) % 64 for letter in caption]) for caption in captions]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def first_clip() -> nn.Module:
    torch.manual_seed(0)
    text = {**open_clip_zoo.TEXT, "context_length": 12, "vocab_size": 49408}
    return open_clip_zoo._clip(open_clip_zoo.VISION, text).eval()


def own_towers(processor: Any) -> DualEncoder:
    class Letters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(64, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.embed(ids).mean(1)

    torch.manual_seed(0)
    layouts = (PatchLayout((8, 8), 1), TextLayout(pad_token_id=0))
    return DualEncoder(image_tower().eval(), Letters().eval(), layouts=layouts, processor=processor)


@pytest.mark.parametrize(
    "how", [tokenize, functools.partial(tokenize, context_length=12), SimpleTokenizer(context_length=12)]
)
def test_a_loaded_model_with_its_transform_and_tokenizer(how: Any):
    encoder = DualEncoder(first_clip(), processor=(pixels_of, how))
    found = explain(encoder, PICTURE, "a cat on a sofa", **FEW)[0]
    start, end = found.tokens[0], found.tokens[-1]
    assert found.tokens[1:-1] == ("a", "cat", "on", "a", "sofa") and "start" in start and "end" in end
    assert found.special == (True, *[False] * 5, True)
    pairs = encoder.prepare(PICTURE, "a cat on a sofa")
    assert torch.equal(pairs.inputs[1], tokenize(["a cat on a sofa"]).to(pairs.inputs[1].dtype))
    np.testing.assert_array_equal(pairs.pictures[0], PICTURE)


def test_two_towers_with_two_functions():
    encoder = own_towers((pixels_of, letters))
    pairs = encoder.prepare(PICTURE, ["a cat", "a dog on it"])
    assert pairs.additional_forward_args == () and pairs.inputs[1].shape == (2, 11)
    first, second = explain(encoder, PICTURE, ["a cat", "a dog on it"], **FEW)
    assert first.tokens == tuple(str(ord(letter) % 64) for letter in "a cat") and len(second.tokens) == 11


def test_a_tokenizer_that_spells_its_tokens():
    def spelling(captions: list[str]) -> tuple[Tensor, Tensor]:
        return tuple(letters(captions).values())

    spelling.convert_ids_to_tokens = lambda ids: [chr(64 + token) for token in ids]
    spelling.all_special_ids = [1]
    found = explain(own_towers((pixels_of, spelling)), PICTURE, "ABC", **FEW)[0]
    assert found.tokens == ("A", "B", "C") and found.special == (True, False, False)


@pytest.mark.parametrize(
    "processor", [object(), SimpleNamespace(tokenizer=tokenize), SimpleNamespace(transform=pixels_of)]
)
def test_what_a_processor_must_offer_is_said(processor: Any):
    for call in (own_towers(processor).prepare, functools.partial(explain, own_towers(processor))):
        with pytest.raises(
            ValueError, match=r"^processor: expected a processor of transformers .*or two functions: .*got"
        ):
            call(PICTURE, "a cat")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ((lambda picture: pixels_of(picture)[None], letters), r"pixels, \(C, H, W\).*shape \(1, 3, 32, 32\)"),
        ((lambda picture: picture, letters), r"pixels, \(C, H, W\).*got Image"),
        ((pixels_of, lambda captions: [[1, 2]]), r"token ids, \(1, L\).*got \[\[1, 2\]\]"),
        ((pixels_of, lambda captions: torch.ones(3, 4).long()), r"token ids, \(1, L\).*\(3, 4\)"),
        ((pixels_of, lambda captions: torch.ones(1, 4)), r"token ids, \(1, L\).*float32"),
        ((pixels_of, lambda captions: (torch.ones(1, 4).long(), torch.ones(1, 3))), r"same shape.*\(1, 3\)"),
    ],
)
def test_functions_that_return_something_else(processor: Any, message: str):
    with pytest.raises(ValueError, match=rf"^processor: expected its function of .*{message}"):
        own_towers(processor).prepare(PICTURE, "a cat")


def test_captions_that_are_too_long_for_a_function():
    encoder = DualEncoder(first_clip(), processor=(pixels_of, tokenize))
    with pytest.raises(ValueError, match=r"^captions: the processor's tokenizer refuses them \(Input cat .*partial"):
        encoder.prepare(PICTURE, "cat " * 20)
    encoder = DualEncoder(first_clip(), processor=(pixels_of, SimpleTokenizer(context_length=12)))
    with pytest.warns(
        UserWarning, match=r"^captions: the tokenizer makes 12 tokens, 'cat cat .* has 22; the rest is cut"
    ):
        encoder.prepare(PICTURE, "cat " * 20)


# Tokens as the characters that they spell.


def shown(text: str) -> tuple[list[str], list[str]]:
    """What the tokens of a text were written as, and what they are shown as."""
    ids = [_tokenizer.sot_token_id, *_tokenizer.encode(text), _tokenizer.eot_token_id]
    row = Speller(_tokenizer).row(ids)
    return [_tokenizer.decoder[token] for token in ids[1:-1]], [clean_token(token) for token in row[1:-1]]


@pytest.mark.parametrize("text", ["一只猫", "قطة حمراء", "🐱 🏳️‍🌈", "naïve café", "кошка", "ไทย"])
def test_every_token_shows_the_characters_that_it_spells(text: str):
    written, found = shown(text)
    assert len(found) == len(written)
    assert not any(set(token) & set("ĠĢģĤĥĦħĨĩĪīĬĭĮįİıĲĳĴĵĶķĸĹĺĻļĽľĿŀŁłŃ") for token in found)
    labels = [token.rpartition(" ") for token in found]
    spelled = "".join(word if count.startswith("1/") else "" for word, _, count in labels if "/" in count)
    spelled += "".join(token for token in found if "/" not in token)
    assert set(spelled) <= set(text) and set(text) - set(spelled) <= {" ", "\ufe0f", "\u200d"}


def test_a_character_over_several_tokens_names_its_parts():
    written, found = shown("🦩")
    count = len(written)
    assert count > 1 and found == [f"🦩 {place}/{count}" for place in range(1, count + 1)]


def test_words_in_ascii_stay_as_they_are_written():
    assert Speller(_tokenizer).row(_tokenizer.encode("a cat!")) == ("a</w>", "cat</w>", "!</w>")


class Fallback:
    """A vocabulary of words with bytes for what it has no word for, as SentencePiece has it."""

    tokens = ("<pad>", "▁cat", "<0xE7>", "<0x8C>", "<0xAB>", "é")
    all_special_ids = (0,)
    unk_token_id = None

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.tokens[token] for token in ids]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.tokens.index(token) if token in self.tokens else None


def test_bytes_for_want_of_a_word_are_joined():
    row = Speller(Fallback()).row([1, 2, 3, 4, 5, 0])
    assert row == ("▁cat", "猫 1/3", "猫 2/3", "猫 3/3", "é", "<pad>")
    # Half a character spells nothing.
    assert Speller(Fallback()).row([2, 3, 1]) == ("<0xE7>", "<0x8C>", "▁cat")


def test_the_byte_alphabet_has_a_letter_for_each_byte():
    assert sorted(byte_alphabet().values()) == list(range(256)) and byte_alphabet()["Ġ"] == 0x20
