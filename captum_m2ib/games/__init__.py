"""The score of a pair as a game of patches and words: which of them act together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from captum_m2ib._lazy import lazily

if TYPE_CHECKING:
    from captum_m2ib.games.fit import Fit
    from captum_m2ib.games.found import Interactions
    from captum_m2ib.games.game import PairGame
    from captum_m2ib.games.play import interactions

_HOMES = {
    "fit": ("Fit",),
    "found": ("Interactions",),
    "game": ("PairGame",),
    "play": ("interactions",),
}

__all__ = ["Fit", "Interactions", "PairGame", "interactions"]

__getattr__, __dir__ = lazily(__name__, _HOMES)
