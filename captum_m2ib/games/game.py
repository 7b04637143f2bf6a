"""The score of one pair as a game: patches and words take part or not.

A dual encoder's score is made of two embeddings, so that M masked pictures and N masked captions give M x N scores for
M + N passes of a tower. What a missing patch shows and what stands for a missing word is the same as elsewhere in this
package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm.auto import tqdm

from captum_m2ib.attr._scoring import as_forward_func
from captum_m2ib.composition.feature_masks import feature_masks
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.pairs import Pairs
from captum_m2ib.encoders.spelling import blank_token
from captum_m2ib.engine.gates import check_finite
from captum_m2ib.engine.ground import ground_of
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layouts import Layout, PackedLayout, TextLayout
from captum_m2ib.engine.real_units import real_tokens
from captum_m2ib.engine.settings import check_count
from captum_m2ib.engine.units import packed_grid
from captum_m2ib.explanations.visualization import clean_token
from captum_m2ib.games.fit import Masks
from captum_m2ib.metrics.curves import Substrate, substrate_of

# Most numbers that are compared at once: with late interaction each score is one of many tokens.
_AT_ONCE = 2**24


class PairGame:
    r"""The score of one pair where some patches of the picture and some words of the caption are missing.

    Players are numbered: first the picture's, then the caption's. A game is called with a matrix of coalitions, as
    shapiq's approximators and its ``ExactComputer`` do; :meth:`scores` gives a whole grid for the price of its edges.

    Args:

        encoder (DualEncoder or nn.Module): The model.
        pairs (Pairs): One pair, as :meth:`DualEncoder.prepare` returns it.
        cell (tuple[int, int], optional): Height and width of a player of the picture, in pixels of the model's input.
            Default: None (a patch)
        feature_mask (array, optional): Which player each pixel of the model's input belongs to, integers, (H, W), such
            as superpixels. Default: None (see ``cell``)
        substrate (str, float or Tensor, optional): What missing patches show: ``"ground"``, what fills most of the
            picture; or as for :func:`captum_m2ib.metrics.curves.deletion`. Default: "ground"
        absent (str or int, optional): What stands for a missing word: ``"blank"``, the unknown token or padding; the id
            of another token; or ``"mask"``: it is hidden from attention, where the model reads a mask. Default: "blank"
        internal_batch_size (int, optional): Most pictures or captions in one pass; None for all at once. Default: 80

    Raises:
        ValueError: if there is more than one pair, its picture comes as tiles, one side of the model reads what the
            other returns, or an argument does not fit.

    Examples::

        >>> game = PairGame(encoder, encoder.prepare(images[0], captions[0]), cell=(32, 32))
        >>> game.n_players, game.player_names[4:]
        (7, ('a', 'white', 'square'))
        >>> game(np.ones((1, 7), dtype=bool)).shape  # everything is there
        (1,)
    """

    def __init__(
        self,
        encoder: DualEncoder,
        pairs: Pairs,
        *,
        cell: tuple[int, int] | None = None,
        feature_mask: ArrayLike | None = None,
        substrate: Substrate | str = "ground",
        absent: str | int = "blank",
        internal_batch_size: int | None = 80,
    ) -> None:
        self.encoder: DualEncoder = as_forward_func(encoder)
        if len(pairs) != 1:
            raise ValueError(f"pairs: a game is of one pair, got {len(pairs)}; pass pairs.select(slice(0, 1)).")
        if any(pairs.tiles):
            raise ValueError(
                "pairs: the model's processor cuts the picture into tiles, of which patches lie in several at once; "
                "interactions are not offered for it."
            )
        self.pairs = pairs.to(self.encoder.device)
        self._arguments = (*self.pairs.inputs, *self.pairs.additional_forward_args)
        self._at_once = None if internal_batch_size is None else check_count("internal_batch_size", internal_batch_size)
        self.passes = [0, 0]
        layout = self.encoder.layouts[0]
        if feature_mask is not None and cell is not None:
            raise ValueError("cell: players are told by feature_mask already; leave out one of the two.")
        if feature_mask is None:
            self._features, self.places = self._patches(layout, cell)
        else:
            self._features, self.places = self._told(feature_mask)
        self._blank_picture = self._missing_patches(substrate, layout)
        self._words = (self.encoder.real_tokens(pairs)[0] & ~torch.tensor(pairs.special[0])).nonzero().flatten()
        if not len(self._words):
            raise ValueError(f"pairs: the caption {pairs.captions[0][:40]!r} holds no word for the model's tokenizer.")
        self._absent, self._mask_argument = self._missing_words(absent)

    @property
    def picture_players(self) -> int:
        """How many players the picture has."""
        return int(self.places.max()) + 1

    @property
    def tokens(self) -> tuple[str, ...]:
        """The caption's players as they are shown."""
        return tuple(clean_token(self.pairs.tokens[0][i]) for i in self._words.tolist())

    @property
    def caption_players(self) -> int:
        """How many players the caption has."""
        return len(self._words)

    @property
    def n_players(self) -> int:
        """How many players there are, as shapiq asks."""
        return self.picture_players + self.caption_players

    @property
    def player_names(self) -> tuple[str, ...]:
        """What each player is called: patches by their numbers, words by themselves."""
        return (*(f"patch {i}" for i in range(self.picture_players)), *self.tokens)

    def __call__(self, coalitions: ArrayLike) -> NDArray[np.float64]:
        r"""The score of each coalition; each masked picture and each masked caption among them is run once.

        Args:

            coalitions (array): Who takes part, boolean, (coalitions, players) or (players,).

        Returns:
            numpy.ndarray: float64, (coalitions,).

        Raises:
            ValueError: if the players are of another number.
        """
        given = np.atleast_2d(np.asarray(coalitions)).astype(bool)
        if given.ndim != 2 or given.shape[1] != self.n_players:
            raise ValueError(
                f"coalitions: expected (coalitions, {self.n_players}), {self.picture_players} patches and "
                f"{self.caption_players} words, got shape {np.shape(coalitions)}."
            )
        sides = (given[:, : self.picture_players], given[:, self.picture_players :])
        (pictures, first), (captions, second) = (np.unique(side, axis=0, return_inverse=True) for side in sides)
        one, other = self.embed(0, pictures), self.embed(1, captions)
        found = np.empty(len(given))
        for caption in range(len(captions)):
            rows = np.flatnonzero(second.ravel() == caption)
            found[rows] = self._compare(one[torch.from_numpy(first.ravel()[rows])], other[caption : caption + 1])[:, 0]
        return found

    def scores(self, picture_masks: Masks, caption_masks: Masks, show_progress: bool = False) -> NDArray[np.float64]:
        r"""The score of every masked picture with every masked caption.

        Args:

            picture_masks (numpy.ndarray): Which of its players are there, boolean, (M, picture's players).
            caption_masks (numpy.ndarray): Boolean, (N, caption's players).
            show_progress (bool, optional): Show a progress bar. Default: False

        Returns:
            numpy.ndarray: float64, (M, N).

        Raises:
            ValueError: if a score is NaN or infinite.
        """
        return self._compare(self.embed(0, picture_masks, show_progress), self.embed(1, caption_masks, show_progress))

    @torch.no_grad()
    def embed(self, index: int, masks: Masks, show_progress: bool = False) -> Tensor:
        r"""What one tower returns where some of its players are missing.

        Args:

            index (int): 0 for the picture, 1 for the caption.
            masks (numpy.ndarray): Which players are there, boolean, (count, players).
            show_progress (bool, optional): Show a progress bar. Default: False

        Returns:
            Tensor: as :meth:`DualEncoder.embed`, in float64.
        """
        there = torch.from_numpy(np.asarray(masks, dtype=bool)).to(self.encoder.device)
        self.passes[index] += len(there)
        found = []
        with borrowing(self.encoder), torch.no_grad():
            name = ("pictures", "captions")[index]
            parts = there.split(self._at_once or max(len(there), 1))
            for part in tqdm(parts, desc=f"masked {name}", unit="part", disable=not show_progress):
                arguments = self._masked(index, part)
                found.append(self.encoder.embed(index, arguments[index], *arguments[2:]).double())
        return torch.cat(found)

    def _masked(self, index: int, there: Tensor) -> list[Any]:
        """All arguments, one row per coalition of one side."""
        count = len(there)
        arguments = [
            a.expand(count, *a.shape[1:]) if isinstance(a, Tensor) and len(a) == 1 else a for a in self._arguments
        ]
        if index == 0:
            # Elements that belong to no player, as padding does, stay.
            kept = torch.cat([there, there.new_ones(count, 1)], 1)[:, self._features]
            arguments[0] = torch.where(kept, arguments[0], self._blank_picture)
            return arguments
        kept = there.new_ones(count, arguments[1].shape[1])
        kept[:, self._words.to(kept.device)] = there
        if self._mask_argument is not None:
            arguments[self._mask_argument] = torch.where(kept, arguments[self._mask_argument], 0)
        else:
            arguments[1] = torch.where(kept, arguments[1], self._absent)
        return arguments

    def _compare(self, first: Tensor, second: Tensor) -> NDArray[np.float64]:
        each = second.numel() * (first.shape[1] if first.ndim > 2 else 1)
        parts = [self.encoder.compare_embeddings(part, second) for part in first.split(max(1, _AT_ONCE // each))]
        found = torch.cat(parts)
        check_finite("score", found, 0)
        return found.cpu().numpy()

    def _patches(self, layout: Layout | None, cell: tuple[int, int] | None) -> tuple[Tensor, NDArray[np.int64]]:
        """The player of each element of the picture, and of each place of the grid that is shown."""
        picture, *others = self._arguments
        features = feature_masks((layout,), picture, tuple(others), cell=cell)
        assert isinstance(features, Tensor)
        if isinstance(layout, PackedLayout):
            real = real_tokens(layout, picture, self._arguments)
            features = features if real is None or bool(real.all()) else features - 1
            return features[0], packed_grid(layout, features[..., 0], self._arguments, 0).cpu().numpy()
        plane = features[0, 0]
        return features[0], _coarse(plane.cpu().numpy())

    def _told(self, feature_mask: ArrayLike) -> tuple[Tensor, NDArray[np.int64]]:
        picture = self._arguments[0]
        given = np.asarray(feature_mask)
        if picture.ndim != 4 or given.shape != tuple(picture.shape[2:]) or not np.issubdtype(given.dtype, np.integer):
            expected = tuple(picture.shape[2:]) if picture.ndim == 4 else "none: the model reads patches of its own"
            raise ValueError(
                f"feature_mask: expected integers, one per pixel of the model's input, {expected}, got {given.dtype} "
                f"of shape {given.shape}."
            )
        places = np.unique(given, return_inverse=True)[1].reshape(given.shape)
        return torch.from_numpy(places).to(picture.device).expand(picture.shape[1:]), places

    def _missing_patches(self, substrate: Substrate | str, layout: Layout | None) -> Tensor:
        picture = self._arguments[0]
        if isinstance(substrate, str) and substrate == "ground":
            is_packed = isinstance(layout, PackedLayout)
            real = real_tokens(layout, picture, self._arguments) if isinstance(layout, PackedLayout) else None
            return ground_of(picture, None if real is None else real.unsqueeze(-1), 2 if is_packed else 1)
        if picture.ndim != 4 and isinstance(substrate, str) and substrate != "zero":
            raise ValueError(
                f"substrate: expected 'ground', 'zero', a number or a tensor for a picture that comes as patches, got "
                f"{substrate!r}."
            )
        return substrate_of(substrate, picture)  # type: ignore[arg-type]

    def _missing_words(self, absent: str | int) -> tuple[int, int | None]:
        """The id that stands for a missing word, or the position of the mask that hides it."""
        if absent == "blank":
            return blank_token(self.encoder), None
        if isinstance(absent, int) and not isinstance(absent, bool) and absent >= 0:
            return absent, None
        if absent != "mask":
            raise ValueError(f"absent: expected 'blank', 'mask' or the id of a token, got {absent!r}.")
        layout = self.encoder.layouts[1]
        argument = layout.mask_argument if isinstance(layout, TextLayout) else None
        if argument is None or argument >= len(self._arguments) or self._arguments[argument] is None:
            raise ValueError(
                "absent: the model reads no attention mask of captions; take 'blank', or the id of a token."
            )
        return 0, argument


def _coarse(plane: NDArray[np.int64]) -> NDArray[np.int64]:
    """The players of a grid, (rows, columns), of those of its pixels."""
    return plane[np.ix_(list(_changes(plane[:, 0])), list(_changes(plane[0])))]


def _changes(numbers: Sequence[int] | NDArray[np.int64]) -> Iterator[int]:
    """Where a new number starts."""
    last = None
    for place, number in enumerate(numbers):
        if number != last:
            yield place
        last = number
