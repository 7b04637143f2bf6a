"""What an entry of a model family says: how each side is computed, and how two sides' outputs become a score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from captum_m2ib.encoders.scores import Score


@dataclass(frozen=True)
class Side:
    r"""How one side of a dual encoder is computed.

    Args:

        modality (str): ``"image"``, ``"text"``, ``"audio"`` or ``"video"``.
        encode (str or Callable): Name of the model's method, or a function of the model and ``arguments``, that
            returns one embedding per example, (N, dimensions), as a tensor or in an output object; or what the
            family's score reads.
        arguments (tuple[str, ...]): Names of what it reads; the first is the input that is explained, the others come
            among the additional arguments.
        towers (tuple[str, ...]): Names under which the model may keep the tower, with dots where it lies deeper; the
            model itself if it has none.
        named (bool, optional): Whether arguments are passed by name. Default: True
        padding (str, optional): How captions are padded: ``"longest"`` or ``"max_length"``. Default: ``"longest"``
        is_tiled (bool, optional): Whether a picture comes as several of one size, (N, tiles, C, H, W). Default: False
        is_filled (bool, optional): Whether captions end in tokens of one id that the mask rightly calls real, such as
            those that queries of late interaction are filled up with. Default: False
        keyword (str, optional): Name under which the mask is passed where all else is passed by position. Default:
            None (second)
        embeds (str, optional): Name of the module that embeds the tokens, where the tower does not hold it. Default:
            None (the tower does)
        is_stem (bool, optional): Whether the tower makes tokens of the input and nothing more, so that it is the one
            place where the input stands alone. Default: False
        beside (str, optional): The modality of the other side, where a model embeds one input in several ways.
            Default: None (any)
    """

    modality: str
    encode: str | Callable[..., Any]
    arguments: tuple[str, ...]
    towers: tuple[str, ...]
    named: bool = True
    padding: str = "longest"
    is_tiled: bool = False
    is_filled: bool = False
    keyword: str | None = None
    embeds: str | None = None
    is_stem: bool = False
    beside: str | None = None

    def embedder(self, model: nn.Module) -> nn.Module:
        """The module that holds what embeds this side's tokens."""
        found: nn.Module = self.tower(model) if self.embeds is None else attrgetter(self.embeds)(model)
        return found

    def tower(self, model: nn.Module) -> nn.Module:
        """The module that holds this side's layers."""
        return next((tower for tower in self._held(model)), model)

    def is_offered(self, model: Any) -> bool:
        """Whether a model has what this side is computed with."""
        if isinstance(self.encode, str):
            return hasattr(model, self.encode)
        return any(True for _ in self._held(model))

    def _held(self, model: Any) -> Iterator[nn.Module]:
        for name in self.towers:
            with suppress(AttributeError):
                tower = attrgetter(name)(model)
                if isinstance(tower, nn.Module):
                    yield tower


@dataclass(frozen=True)
class Family:
    r"""The sides that a model offers, and how their outputs become a score.

    Args:

        sides (tuple[Side, ...]): What it compares; of more than two, the first two unless others are asked for.
        join (Callable, optional): Where one side reads the other's output: from the model and both outputs to two
            embeddings. Default: None
        score (Callable, optional): Of both sides' outputs as ``encode`` returns them, in the order of ``sides``, what a
            pair scores (see :mod:`captum_m2ib.encoders.scores`). Default: None (the cosine of two embeddings)
        is_shared (bool, optional): Whether the first side runs the second side's tower, too, so that each of its layers
            is reached twice. Default: False
        unshared (str, optional): Pattern of what the second side runs alone of such a tower: names in the tower, or
            how they begin. Default: None (nothing)
    """

    sides: tuple[Side, ...]
    join: Callable[[nn.Module, Any, Any], tuple[Tensor, Tensor]] | None = None
    score: Score | None = None
    is_shared: bool = False
    unshared: str | None = None

    def side(self, modality: str, beside: str) -> Side | None:
        """The side that reads a modality, where the other one reads ``beside``."""
        fitting = (side for side in self.sides if side.modality == modality and side.beside in (None, beside))
        return next(fitting, None)
