"""What figures and files need to know of a pair that was explained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from captum_m2ib.encoders.pictures import PictureLike
    from captum_m2ib.encoders.regions import Region
    from captum_m2ib.encoders.timelines import Timeline


class ShownPair(Protocol):
    """What is drawn of a pair, whatever is told of it."""

    @property
    def image(self) -> NDArray[np.uint8]: ...
    @property
    def caption(self) -> str: ...
    @property
    def tokens(self) -> tuple[str, ...]: ...
    @property
    def score(self) -> float: ...


class Shown(ShownPair, Protocol):
    """The parts of an :class:`captum_m2ib.Explanation` that are drawn."""

    @property
    def special(self) -> tuple[bool, ...]: ...
    @property
    def image_bits(self) -> NDArray[np.float32]: ...
    @property
    def token_bits(self) -> NDArray[np.float32]: ...
    @property
    def notes(self) -> list[str]: ...
    @property
    def unit(self) -> str: ...


class Explained(Shown, Protocol):
    """What there is to write: the fields of an :class:`captum_m2ib.Explanation`, its totals and its figure."""

    @property
    def score_name(self) -> str: ...
    @property
    def patch_bits(self) -> NDArray[np.float32] | None: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def record(self) -> dict[str, Any] | None: ...
    @property
    def check(self) -> dict[str, Any] | None: ...
    @property
    def image_total_bits(self) -> float: ...
    @property
    def token_total_bits(self) -> float: ...
    @property
    def region(self) -> Region | None: ...
    @property
    def kind(self) -> str: ...
    @property
    def timeline(self) -> Timeline | None: ...
    def shown(self, original: PictureLike | None = None) -> tuple[NDArray[np.uint8], NDArray[np.float32]]: ...
    def plot(self, original: PictureLike | None = None, *, style: str = "heat", share: float = 0.5) -> Figure: ...


class Drawing(NamedTuple):
    """How a figure or a page is drawn: over which picture, and in which style."""

    original: PictureLike | None = None
    style: str = "heat"
    share: float = 0.5
