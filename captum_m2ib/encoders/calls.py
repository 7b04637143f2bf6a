"""One tower as one call: what it is given, and the embedding in what it returns."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from captum_m2ib.encoders.sides import Side
from captum_m2ib.encoders.token_rows import TokenRows
from captum_m2ib.encoders.towers import config_of

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class TowerCall(nn.Module):
    """One tower as a module that returns its embedding, so that the whole tower is one call.

    It refers to the model where the encoder registers it, without owning it: there is one owner, under one name.
    """

    def __init__(self, held: dict[str, nn.Module | None], name: str, side: Side) -> None:
        super().__init__()
        self.__dict__["held"] = held
        self.__dict__["rows"] = None
        self.name, self.side = name, side
        self.training = False

    @property
    def model(self) -> Any:
        """What the encoder holds under the name at this moment."""
        return self.__dict__["held"][self.name]

    @property
    def rows(self) -> TokenRows | None:
        """All tables that the token ids enter, where there are several and they are known."""
        return self.__dict__["rows"]

    def forward(self, inputs: Tensor, *extras: Any) -> Any:
        if self.rows is None:
            return self._run(inputs, *extras)
        with self.rows.handed_on(inputs):
            return self._run(inputs, *extras)

    def _run(self, inputs: Tensor, *extras: Any) -> Any:
        side = self.side
        method: Any = getattr(self.model, side.encode) if isinstance(side.encode, str) and side.encode else self.model
        if not side.named:
            if side.keyword is not None and extras:
                return method(inputs, *extras[1:], **{side.keyword: extras[0]})
            return method(inputs, *extras)
        given = {
            name: value for name, value in zip(side.arguments, (inputs, *extras), strict=False) if value is not None
        }
        run = method if isinstance(side.encode, str) else functools.partial(side.encode, self.model)
        if self._is_resized(inputs) and "interpolate_pos_encoding" in inspect.signature(run).parameters:
            given["interpolate_pos_encoding"] = True
        return run(**given)

    def check_configuration(self) -> None:
        """Raise where the model is set to return plain tuples, in which embeddings have no name."""
        for owner in (self.model, self.side.tower(self.model)):
            if getattr(getattr(owner, "config", None), "return_dict", None) is False:
                raise ValueError(
                    f"model: the configuration of {type(owner).__name__} says return_dict=False, so that outputs come "
                    "without names; set model.config.return_dict = True, in the towers' configurations, too."
                )

    def _is_resized(self, inputs: Tensor) -> bool:
        """Whether pictures or frames come in another size or number than the tower stores positions for."""
        config = config_of(self.side.tower(self.model), "vision_config")
        native = getattr(config, "image_size", None)
        if native is None or inputs.ndim != {"image": 4, "video": 5}.get(self.side.modality):
            return False
        frames = getattr(config, "num_frames", None) if inputs.ndim == 5 else None
        size = (native, native) if isinstance(native, int) else tuple(native)
        return tuple(inputs.shape[-2:]) != size or frames not in (None, inputs.shape[1])


def as_called(side: Side, model: nn.Module) -> Side:
    """A side with those of its arguments that the model's method takes, and how it takes them."""
    if not isinstance(side.encode, str):
        return side
    taken = _parameters(getattr(model, side.encode) if side.encode else model.forward)
    if taken is None:
        return side
    names = {parameter.name for parameter in taken}
    first, *others = side.arguments
    if side.named and first in names:
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken)
        return replace(side, arguments=(first, *(name for name in others if takes_any or name in names)))
    side = replace(side, named=False)
    return _masked(side, taken[1:]) if "attention_mask" in others else side


def _masked(side: Side, beyond: list[inspect.Parameter]) -> Side:
    """A side that reads captions with the mask as it is taken: second, under a name, or not at all."""
    named = next((parameter for parameter in beyond if "mask" in parameter.name), None)
    second = beyond[0] if beyond else None
    if named is not None:
        return side if named is second and named.kind in _BY_POSITION else replace(side, keyword=named.name)
    is_any = second is not None and second.kind is inspect.Parameter.VAR_POSITIONAL and not side.encode
    is_required = second is not None and second.kind in _BY_POSITION and second.default is inspect.Parameter.empty
    return side if is_any or is_required else replace(side, arguments=side.arguments[:1])


def _parameters(method: Any) -> list[inspect.Parameter] | None:
    """What a method takes, itself left out; None where it does not say."""
    if hasattr(method, "schema"):
        # A method that torch has compiled to a script.
        empty, kind = inspect.Parameter.empty, inspect.Parameter.POSITIONAL_OR_KEYWORD
        arguments = method.schema.arguments[1:]
        return [
            inspect.Parameter(one.name, kind, default=one.default_value if one.has_default_value() else empty)
            for one in arguments
        ]
    try:
        return list(inspect.signature(method).parameters.values())
    except (TypeError, ValueError):
        return None


def embedding_of(output: Any, owner: str) -> Tensor:
    r"""The embedding in what a tower returned.

    Args:

        output (Any): A tensor, a tuple that begins with one, or an output object.
        owner (str): What errors call the tower.

    Returns:
        Tensor: (N, dimensions).

    Raises:
        TypeError: if there is none, or it has another number of dimensions.
    """
    output = output[0] if isinstance(output, tuple) and output else output
    for name in (None, "image_embeds", "text_embeds", "pooler_output"):
        found = output if name is None else getattr(output, name, None)
        if isinstance(found, Tensor):
            if found.ndim == 2:
                return found
            raise TypeError(
                f"model: expected {owner} to return an embedding per example, (N, dimensions), got a tensor of shape "
                f"{tuple(found.shape)}; wrap the tower in a module that pools it, over tokens for example."
            )
    raise TypeError(
        f"model: expected {owner} to return an embedding per example, (N, dimensions), as a tensor or under "
        f"'image_embeds', 'text_embeds' or 'pooler_output', got {type(output).__name__}; wrap the tower in a module "
        "that returns it."
    )
