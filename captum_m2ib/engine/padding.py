"""Padding as the token ids in hand show it: a run of one id at the end of a row.

Who says which tokens are padding may be wrong: configurations name ids that the tokenizer never writes, masks are
forgotten. Where ids end in a run that was taken for words, that is said; where nothing but an id told padding from
words, the ids are believed, row by row, so that a pair does not depend on its batch.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from captum_m2ib.engine.callers import frames_within

# A caption may end with a word twice.
_LEAST_RUN = 3


def trailing_runs(ids: Tensor) -> Tensor:
    """How many tokens at the end of each row, (N, L), are the last one again, itself included, (N,)."""
    return (ids == ids[:, -1:]).flip(1).int().cumprod(1).sum(1)


def between_padding(ids: Tensor, pad: int) -> Tensor:
    """Tokens from the first to the last that is not of the id of padding, boolean, (N, L); in between it is a word."""
    words = (ids != pad).int()
    return (words.cumsum(1) > 0) & (words.flip(1).cumsum(1).flip(1) > 0)


def believe_ids(ids: Tensor, real: Tensor, pad: int | None, source: str, reads_padding: bool) -> Tensor:
    r"""Real tokens where the end of a caption, or padding, was told by an id.

    Args:

        ids (Tensor): Token ids, (N, L).
        real (Tensor): Which tokens were taken for words by that id, boolean, (N, L).
        pad (int or None): The id of padding; None where an end token was looked for.
        source (str): Who said so, as the warning calls it.
        reads_padding (bool): Whether the tower reads padding like words.

    Returns:
        Tensor: as given, but for rows that end in a run of another id: there, the run is padding and all else is real.

    Warns:
        UserWarning: if there are such rows.
    """
    runs, length = trailing_runs(ids), ids.shape[1]
    taken = real[:, -_LEAST_RUN:].all(1) & (runs >= _LEAST_RUN) & (runs < length)
    if pad is not None:
        # What words follow is no padding: an end token, for example, before the run.
        inside = (ids == pad) & between_padding(ids, pad)
        taken = taken | (inside.any(1) & real[:, -1] & _ends_after(inside, runs))
    if not bool(taken.any()):
        return real
    said = "knows no end token among them" if pad is None else f"says that padding has the id {pad}"
    reads = ", reads_padding=True" if reads_padding else ""
    _warn(
        ids,
        runs,
        taken,
        f"{source} {said}; the run is taken for padding. Say which id it is, e.g. "
        f"DualEncoder(model, layouts=(None, TextLayout(pad_token_id=...{reads})))",
    )
    places = torch.arange(length, device=ids.device)
    return torch.where(taken[:, None], places < (length - runs)[:, None], real)


def warn_of_words(ids: Tensor, real: Tensor | None, source: str) -> None:
    """Say where a run at the end of a row, (N, L), is taken for words, by a mask or for lack of one."""
    runs = trailing_runs(ids)
    taken = (runs >= _LEAST_RUN) & (runs < ids.shape[1])
    if real is not None:
        taken = taken & real[:, -_LEAST_RUN:].all(1)
    if bool(taken.any()):
        _warn(
            ids, runs, taken, f"{source}: they are read, and explained, as words. Pass the mask that tells them apart"
        )


def _ends_after(inside: Tensor, runs: Tensor) -> Tensor:
    """Whether nothing but one run stands behind the last of the marked tokens of a row."""
    length = inside.shape[1]
    last = length - 1 - inside.int().flip(1).argmax(1)
    return last + runs == length - 1


def _warn(ids: Tensor, runs: Tensor, rows: Tensor, said: str) -> None:
    row = int(rows.int().argmax())
    pad = int(ids[row, -1])
    warnings.warn(
        f"inputs: the token ids of pair {row} end in a run of {int(runs[row])} tokens of the id {pad}, while {said}.",
        UserWarning,
        stacklevel=frames_within() + 1,
    )
