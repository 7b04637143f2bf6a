"""A tokenizer for tiny models of the zoo: a letter is a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Letters:
    pad_token_id = 1

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        rows = [torch.tensor([62, *(3 + ord(letter) % 50 for letter in caption[:8]), 63]) for caption in captions]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
        return {"input_ids": ids, "attention_mask": (ids != 1).long()}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [str(token) for token in ids]
