"""What a game says of one pair: data, its files and its figures; no reference to a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from captum_m2ib.encoders.spans import find_span
from captum_m2ib.explanations.embedding import figure_bytes
from captum_m2ib.explanations.files import FIGURES, check_output, one_of, replace_file
from captum_m2ib.games.figure import interactions_figure
from captum_m2ib.games.fit import Fit, Floats
from captum_m2ib.games.page import interactions_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Interactions"]


def import_shapiq() -> Any:
    r"""shapiq, which is an extra.

    Returns:
        module: shapiq.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import shapiq
    except ImportError as error:
        raise ImportError(
            "shapiq is not installed; pip install 'captum_m2ib[interactions]', or shapiq itself."
        ) from error
    return shapiq


@dataclass(frozen=True, eq=False, repr=False)
class Interactions:
    r"""Which words act together with which patches, in units of the score.

    Attributes:

        image (numpy.ndarray): What the model saw of the picture, uint8, (H, W, 3).
        caption (str): The caption.
        tokens (tuple[str, ...]): The caption's players.
        score (float): The model's score of the whole pair.
        score_name (str): What the score is called.
        places (numpy.ndarray): The picture's player at each place, integers, (rows, columns): of a grid of patches, or
            of pixels where a feature mask was given.
        fit (Fit): Weighted Banzhaf values and interactions.
        explained (float): The share of the score's variance over coalitions that values and interactions explain; over
            fresh ones where the fit is of some of them.
        explained_alone (float): The share that the values explain without the interactions.
        passes (tuple[int, int]): Masked pictures and masked captions that went through their towers.
        settings (dict): How this was made.
    """

    image: NDArray[np.uint8]
    caption: str
    tokens: tuple[str, ...]
    score: float
    score_name: str
    places: NDArray[np.int64]
    fit: Fit
    explained: float
    explained_alone: float
    passes: tuple[int, int]
    settings: dict[str, Any]

    def __repr__(self) -> str:
        caption = self.caption if len(self.caption) <= 60 else self.caption[:59] + "…"
        return (
            f"Interactions({caption!r}, score={self.score:.4g}, {len(self.tokens)} words x {len(self.fit.picture)} "
            f"patches, explained: {self.explained:.2f})"
        )

    @property
    def picture_map(self) -> Floats:
        """What each place adds to the score on average, (rows, columns)."""
        return self.fit.picture[self.places]

    def map_of(self, words: str | int | Sequence[int]) -> Floats:
        r"""The patches that act together with words.

        Args:

            words (str, int or sequence of int): Words of the caption as they follow one another, or the index of one
                token or of several.

        Returns:
            numpy.ndarray: float64, (rows, columns), summed over the words' tokens. Above zero where the patch adds more
            with the words than without them.

        Raises:
            ValueError: if the caption does not hold the words, or there is no such token.

        Examples::

            >>> found = interactions(encoder, images[0], "a white square", cell=(16, 16), budget=(64, 8))
            >>> found.map_of("white square").shape, found.map_of(1).shape
            ((4, 4), (4, 4))
        """
        if isinstance(words, str):
            chosen = [i for i, is_part in enumerate(find_span(self.caption, self.tokens, words)) if is_part]
        else:
            chosen = [words] if isinstance(words, int) else list(words)
        if not chosen or min(chosen) < 0 or max(chosen) >= len(self.tokens):
            raise ValueError(f"words: expected indices of the {len(self.tokens)} tokens, from 0, got {words!r}.")
        found: Floats = self.fit.across[chosen].sum(0)[self.places]
        return found

    def words_of(self, player: int | tuple[int, int]) -> list[tuple[str, float]]:
        r"""The words that act together with a patch, in the caption's order.

        Args:

            player (int or tuple[int, int]): A player of the picture, or the (row, column) of a place.

        Returns:
            list[tuple[str, float]]: token and interaction.

        Raises:
            ValueError: if there is no such player or place.
        """
        rows, columns = self.places.shape
        if isinstance(player, tuple):
            row, column = player
            if not (0 <= row < rows and 0 <= column < columns):
                raise ValueError(f"player: expected a place of the {rows} x {columns} ones, got {player}.")
            player = int(self.places[row, column])
        if not 0 <= player < len(self.fit.picture):
            raise ValueError(f"player: expected one of the picture's {len(self.fit.picture)}, from 0, got {player}.")
        return list(zip(self.tokens, self.fit.across[:, player].tolist(), strict=True))

    def plot(self, tokens: Sequence[int] | None = None) -> Figure:
        r"""The picture with what it adds on its own, and a row per word with the patches that it acts together with.

        Args:

            tokens (sequence of int, optional): Which tokens, by their indices. Default: None (all)

        Returns:
            matplotlib.figure.Figure: outside pyplot.

        Raises:
            ValueError: if there is no such token.
        """
        chosen = list(range(len(self.tokens))) if tokens is None else list(tokens)
        if not chosen or min(chosen) < 0 or max(chosen) >= len(self.tokens):
            raise ValueError(f"tokens: expected indices of the {len(self.tokens)} tokens, from 0, got {tokens!r}.")
        return interactions_figure(self, chosen)

    def save(self, path: str | os.PathLike[str]) -> Path:
        r"""Write a figure, or a page in which words and patches can be selected; it appears complete or not at all.

        Args:

            path (str or PathLike): Ends in ``.png``, ``.pdf``, ``.svg`` or ``.html``. The page needs no other file.

        Returns:
            Path: the path that was written.

        Raises:
            ValueError: if the name ends in anything else.
            FileNotFoundError: if the directory does not exist.
        """
        path = check_output(path, WRITERS)
        write: Callable[[Interactions], bytes] = one_of(WRITERS, path)
        replace_file(path, write(self))
        return path

    def to_shapiq(self) -> Any:
        r"""The same as shapiq's ``InteractionValues``, for its figures (extra ``interactions``).

        Returns:
            shapiq.InteractionValues: of orders 0, 1 and 2, picture's players first: the mean score, weighted Banzhaf
            values, weighted Banzhaf interactions.

        Raises:
            ImportError: if shapiq is not installed.
        """
        shapiq = import_shapiq()
        fit, start = self.fit, len(self.fit.picture)
        values: dict[tuple[int, ...], float] = {(): fit.mean}
        values |= {(i,): value for i, value in enumerate([*fit.picture.tolist(), *fit.caption.tolist()])}
        values |= {(i, start + j): value for j, row in enumerate(fit.across.tolist()) for i, value in enumerate(row)}
        for table, first in ((fit.in_picture, 0), (fit.in_caption, start)):
            if table is not None:
                pairs = zip(*np.triu_indices(len(table), 1), strict=True)
                values |= {(first + int(i), first + int(j)): float(table[i, j]) for i, j in pairs}
        ordered = sorted(values, key=lambda players: (len(players), players))
        return shapiq.InteractionValues(
            values=np.array([values[players] for players in ordered]),
            index="BII",
            max_order=2,
            n_players=start + len(self.tokens),
            min_order=0,
            interaction_lookup={players: place for place, players in enumerate(ordered)},
            estimated=not self.settings["is_exact"],
            baseline_value=fit.mean,
        )


def _figure_writer(kind: str) -> Callable[[Interactions], bytes]:
    return lambda found: figure_bytes(found.plot(), kind)


WRITERS: dict[str, Callable[[Interactions], bytes]] = {
    **{ending: _figure_writer(kind) for ending, kind in FIGURES.items()},
    ".html": interactions_page,
}
"""Endings of files, and what writes them."""
