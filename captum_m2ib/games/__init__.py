"""The score of a pair as a game of patches and words: which of them act together."""

from captum_m2ib.games.fit import Fit
from captum_m2ib.games.found import Interactions
from captum_m2ib.games.game import PairGame
from captum_m2ib.games.play import interactions

__all__ = ["Fit", "Interactions", "PairGame", "interactions"]
