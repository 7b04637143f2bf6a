"""From a picture and a caption to which words act together with which patches."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from captum_m2ib.attr._scoring import as_forward_func
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.pictures import PictureLike, load_picture
from captum_m2ib.engine.settings import check_count
from captum_m2ib.games.fit import Draws, Fit, draw, explained, fit
from captum_m2ib.games.found import Interactions
from captum_m2ib.games.game import PairGame
from captum_m2ib.metrics.curves import Substrate

__all__ = ["interactions"]

# Masked pictures per player of the picture, and masked captions; the latter are cheap, and up to eight words all of
# them.
_PER_PLAYER, _LEAST, _CAPTIONS = 16, 512, 256
# Fresh ones of either, on which a fit is judged.
_FRESH = (128, 64)


def interactions(
    encoder: DualEncoder,
    image: PictureLike,
    caption: str,
    *,
    p: float = 0.5,
    budget: tuple[int, int] | None = None,
    within: bool = False,
    cell: tuple[int, int] | None = None,
    feature_mask: ArrayLike | None = None,
    substrate: Substrate | str = "ground",
    absent: str | int = "blank",
    internal_batch_size: int | None = 80,
    seed: int = 0,
    show_progress: bool = False,
) -> Interactions:
    r"""Which words act together with which patches, faithful to the score: weighted Banzhaf interactions.

    Patches and words are taken out at random, each with probability ``1 - p``. A patch and a word interact by as much
    as the patch adds more to the score with the word than without it, on average over the others; see
    :mod:`captum_m2ib.games.fit`. Baniecki et al., NeurIPS 2025, https://arxiv.org/abs/2508.05430

    Args:

        encoder (DualEncoder): With a processor, as for :func:`captum_m2ib.explain`.
        image (picture): A path, a PIL image or a uint8 array, (H, W, 3).
        caption (str): The caption.
        p (float, optional): With which probability a patch or a word takes part. Default: 0.5
        budget (tuple[int, int], optional): How many masked pictures, and how many masked captions: so many passes of a
            tower. Where that is as many as there are, all are taken, and the fit is exact. Default: None (16 pictures
            per patch, 512 at least; 256 captions; with ``within`` at least half as many again as coefficients)
        within (bool, optional): Fit interactions of two patches, and of two words, as well, which explains more of the
            score; it takes more masked pictures than there are pairs of patches. Default: False
        cell, feature_mask, substrate, absent, internal_batch_size: As for :class:`captum_m2ib.games.PairGame`.
        seed (int, optional): Of the draws. Default: 0
        show_progress (bool, optional): Show progress bars. Default: False

    Returns:
        Interactions: values, with figures and files.

    Raises:
        ValueError: if the picture or the caption cannot be used, a setting is out of range, or one side of the model
            reads what the other returns.

    Examples::

        >>> found = interactions(encoder, images[0], "a white square", cell=(16, 16), budget=(64, 8))
        >>> found
        Interactions('a white square', score=0.1837, 3 words x 16 patches, explained: 0.74)
    """
    if not 0 < p < 1:
        raise ValueError(f"p: expected a probability between 0 and 1, got {p!r}.")
    if not isinstance(caption, str):
        raise ValueError(f"caption: expected one caption, got {type(caption).__name__}.")
    check_count("seed", seed, 0)
    encoder = as_forward_func(encoder)
    pairs = encoder.prepare(load_picture(image), caption)
    options: dict[str, Any] = {"cell": cell, "feature_mask": feature_mask, "substrate": substrate, "absent": absent}
    game = PairGame(encoder, pairs, **options, internal_batch_size=internal_batch_size)
    sizes = (game.picture_players, game.caption_players)
    counts = _usual(sizes, within) if budget is None else _counts(budget)
    pictures, captions = (
        draw(size, count, p, seed + place, is_paired=not within)
        for place, (size, count) in enumerate(zip(sizes, counts, strict=True))
    )
    found = fit(game.scores(pictures.masks, captions.masks, show_progress), pictures, captions, p, within)
    shares = _judge(game, found, pictures, captions, seed)
    whole = game(np.ones(game.n_players))
    return Interactions(
        image=pairs.pictures[0],
        caption=pairs.captions[0],
        tokens=game.tokens,
        score=float(whole[0]),
        score_name=encoder.score_name,
        places=game.places,
        fit=found,
        explained=shares[0],
        explained_alone=shares[1],
        passes=(game.passes[0], game.passes[1]),
        settings={
            "p": p,
            "budget": [len(pictures.masks), len(captions.masks)],
            "within": within,
            "is_exact": pictures.is_whole and captions.is_whole,
            "cell": None if cell is None else list(cell),
            "substrate": substrate if isinstance(substrate, (str, int, float)) else type(substrate).__name__,
            "absent": absent,
            "seed": seed,
        },
    )


def _usual(sizes: tuple[int, int], within: bool) -> tuple[int, int]:
    """Masked pictures and masked captions, where nothing is said."""
    # Half as many again as there are coefficients: with hardly more than those, a fit follows what it has seen.
    least = [3 * (1 + size + size * (size - 1) // 2) // 2 if within else 0 for size in sizes]
    return max(_LEAST, _PER_PLAYER * sizes[0], least[0]), max(_CAPTIONS, least[1])


def _counts(budget: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(budget, (tuple, list)) or len(budget) != 2:
        raise ValueError(f"budget: expected (masked pictures, masked captions), got {budget!r}.")
    return check_count("budget[0]", budget[0]), check_count("budget[1]", budget[1])


def _judge(game: PairGame, found: Fit, pictures: Draws, captions: Draws, seed: int) -> tuple[float, float]:
    """The share of the score's variance that the fit explains, and that its values alone do."""
    drawn = []
    for place, (draws, fresh) in enumerate(zip((pictures, captions), _FRESH, strict=True)):
        # Other seeds than those of the draws.
        drawn.append(draws if draws.is_whole else draw(draws.masks.shape[1], fresh, found.p, seed + 2 + place))
    values = game.scores(drawn[0].masks, drawn[1].masks)
    alone = Fit(found.p, found.mean, found.picture, found.caption, np.zeros_like(found.across))
    first, second = (explained(values, one.predict(drawn[0].masks, drawn[1].masks), *drawn) for one in (found, alone))
    return first, second
