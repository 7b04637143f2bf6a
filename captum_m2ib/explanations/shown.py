"""What figures and files need to know of a pair that was explained."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Shown(Protocol):
    """The parts of an :class:`captum_m2ib.Explanation` that are drawn."""

    @property
    def image(self) -> NDArray[np.uint8]: ...
    @property
    def caption(self) -> str: ...
    @property
    def tokens(self) -> tuple[str, ...]: ...
    @property
    def special(self) -> tuple[bool, ...]: ...
    @property
    def score(self) -> float: ...
    @property
    def image_bits(self) -> NDArray[np.float32]: ...
    @property
    def token_bits(self) -> NDArray[np.float32]: ...
    @property
    def notes(self) -> list[str]: ...
    @property
    def unit(self) -> str: ...
