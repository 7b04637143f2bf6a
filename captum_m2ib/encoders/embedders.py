"""SentenceTransformers that embed pictures and texts: what each side is computed with, and their own preparation.

Such a model is a chain of modules. The first reads the input (one network for both sides, or by a router one for each),
the others pool tokens, project and normalise; which prompts go before an input and how embeddings are compared is part
of it. All of that is run as it is: what is known here is where the towers lie and what they read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from captum_m2ib.encoders.patches import joined, positions_in, separated, shapes_of
from captum_m2ib.encoders.processors import warn_of_captions
from captum_m2ib.encoders.scores import Score, distance, dot
from captum_m2ib.encoders.sides import Family, Side

if TYPE_CHECKING:
    from PIL.Image import Image

# What each kind of input is in a search, and under which names prompts for that are kept.
_TASKS = {"image": "document", "audio": "document", "video": "document", "text": "query"}
_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}

_SCORES: dict[str, Score | None] = {
    "cosine": None,
    "dot": dot,
    "euclidean": distance(2.0),
    "manhattan": distance(1.0),
}

_VISUAL = ("visual", "vision_tower", "vision_model", "image_model")
_LANGUAGE = ("language_model", "text_model", "text_encoder")

# What a network may read of a picture beside its pixels, by the names of its arguments; of a prompt around it, too.
_BESIDE = ("image_grid_thw", "spatial_shapes", "pixel_attention_mask")
_OF_PROMPT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
_KNOWN = {
    "image": {"pixel_values", "image_position_ids", *_BESIDE, *_OF_PROMPT},
    "text": {"input_ids", "attention_mask", "prompt_length"},
}


class Reader(NamedTuple):
    r"""The module of a SentenceTransformer that reads one kind of input.

    Attributes:

        path (str): Where it lies in the SentenceTransformer.
        module (Any): The module: a network of transformers with its processor.
        modality (str): What it calls the input.
    """

    path: str
    module: Any
    modality: str

    def takes(self) -> set[str]:
        """Names of what its network reads."""
        method = self.module.modality_config[self.modality]["method"]
        return set(inspect.signature(getattr(self.module.model, method)).parameters)

    def towers(self, names: Sequence[str]) -> tuple[str, ...]:
        """Where its network may keep a tower of one of these names."""
        return tuple(f"{self.path}.model.{within}{name}" for within in ("", "model.") for name in names)

    @property
    def network(self) -> str:
        """Where its network lies."""
        return f"{self.path}.model"


def is_embedder(model: Any) -> bool:
    """Whether a model is a SentenceTransformer, by its name, so that the package is not imported to look."""
    return any(kind.__name__ == "SentenceTransformer" for kind in type(model).__mro__)


def compares_whole_by_cosine(model: Any) -> bool:
    """Whether a SentenceTransformer's score is the cosine of what its modules return."""
    return _similarity(model) == "cosine" and getattr(model, "truncate_dim", None) is None


def _similarity(model: Any) -> str:
    return getattr(model, "similarity_fn_name", None) or "cosine"


def family_of_embedder(model: Any) -> Family | None:
    r"""How a SentenceTransformer embeds pictures and texts.

    Args:

        model: A SentenceTransformer of version 5.4 or newer.

    Returns:
        Family or None: None if it does not read both, or its similarity function is not known.
    """
    image, text = (_reader(model, kind) for kind in ("image", "text"))
    similarity = _similarity(model)
    if image is None or text is None or similarity not in _SCORES:
        return None
    taken = image.takes()
    is_prompted = "input_ids" in taken
    beside = [name for name in _BESIDE if name in taken]
    if "image_position_ids" in taken:
        beside = ["pixel_attention_mask", "spatial_shapes"]
    around = [f"page_{name}" for name in _OF_PROMPT if name in taken] if is_prompted else []
    reads = ("input_ids", "attention_mask", *(("prompt_length",) if _excludes_prompts(model) else ()))
    # A network that reads pictures among tokens has a tower for them, or their patches have no place in it.
    visual = (*image.towers(_VISUAL), *(() if is_prompted else (image.network,)))
    language = (*text.towers(_LANGUAGE), text.network)
    sides = (
        Side("image", _encode("image", image), ("pixel_values", *around, *beside), visual),
        Side("text", _encode("text", text), reads, language, is_filled=True),
    )
    if not all(side.is_offered(model) for side in sides):
        return None
    return Family(sides, score=_SCORES[similarity], is_shared=is_prompted and image.module is text.module)


def _reader(model: Any, kind: str) -> Reader | None:
    """The module that reads one kind of input, or None where there is none."""
    path, module = "0", next(iter(model), None)
    route = getattr(module, "_resolve_route", None)
    is_routed = route is not None
    if route is not None and module is not None:
        with suppress(ValueError):
            path, module = f"0.sub_modules.{(name := route(_TASKS[kind], kind))}.0", module.sub_modules[name][0]
    config = getattr(module, "modality_config", {})
    if kind not in config or not isinstance(getattr(module, "model", None), nn.Module):
        return None
    return Reader(path, module, "message" if "message" in config and not is_routed else kind)


def _excludes_prompts(model: nn.Module) -> bool:
    """Whether tokens of the prompt are left out of the mean."""
    return any(getattr(module, "include_prompt", True) is False for module in model.modules())


def _encode(kind: str, reader: Reader) -> Callable[..., Tensor]:
    """The embedding of one side, as the whole chain of modules makes it."""
    takes = reader.takes()

    def encode(model: Any, **given: Tensor) -> Tensor:
        features: dict[str, Any] = {name.removeprefix("page_"): value for name, value in given.items()}
        if "image_grid_thw" in features:
            features["pixel_values"] = joined(features["pixel_values"], features["image_grid_thw"])
        if "image_position_ids" in takes and "spatial_shapes" in features:
            count = features["pixel_values"].shape[1]
            features["image_position_ids"] = positions_in(features.pop("spatial_shapes"), count)
            del features["pixel_attention_mask"]
        task = _TASKS[kind]
        found: Tensor = model({**features, "modality": reader.modality, "task": task}, task=task)["sentence_embedding"]
        return found[..., : getattr(model, "truncate_dim", None)]

    return encode


class PromptedProcessor:
    r"""A SentenceTransformer's own preparation of pictures and texts, with its prompts for documents and queries.

    Args:

        model: The SentenceTransformer.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def image_processor(self) -> Any:
        """What reads pictures."""
        processor = self._processor("image")
        return getattr(processor, "image_processor", processor)

    @property
    def feature_extractor(self) -> Any:
        """What reads sounds, or None."""
        return self._timed("audio", "feature_extractor")

    @property
    def video_processor(self) -> Any:
        """What reads videos, or None."""
        return self._timed("video", "video_processor")

    @property
    def tokenizer(self) -> Any:
        """What reads texts."""
        processor = self._processor("text")
        return getattr(processor, "tokenizer", processor)

    def process_images(self, images: Sequence[Image]) -> dict[str, Tensor]:
        r"""Prepare pictures.

        Args:

            images (sequence of PIL.Image.Image): The pictures.

        Returns:
            dict[str, Tensor]: what the model reads, each with one row per picture.
        """
        reader = _reader(self._model, "image")
        if reader is not None and reader.modality == "image" and "input_ids" in reader.takes():
            # Without a message around each, such processors take a list of pictures for the pictures of one input.
            found = self._stacked([dict(self._features("image", [image])) for image in images])
        else:
            found = dict(self._features("image", list(images)))
        if "image_grid_thw" in found:
            found["pixel_values"] = separated(found["pixel_values"], found["image_grid_thw"])
        if "image_position_ids" in found:
            positions = found.pop("image_position_ids")
            found["spatial_shapes"] = shapes_of(positions)
            found["pixel_attention_mask"] = (positions >= 0).all(-1).long()
        return found

    def process_queries(self, text: Sequence[str]) -> dict[str, Tensor]:
        r"""Prepare texts.

        Args:

            text (sequence of str): The texts, without prompts.

        Returns:
            dict[str, Tensor]: what the model reads, each with one row per text.
        """
        longest = self._model.max_seq_length
        if longest is not None:
            warn_of_captions(self.tokenizer, text, longest, f"the model reads {longest} tokens", stacklevel=5)
        return dict(self._features("text", list(text)))

    def _timed(self, kind: str, name: str) -> Any:
        if _reader(self._model, kind) is None:
            return None
        if any(self._prompt(task) for task in _PROMPTS):
            raise ValueError(
                f"processor: this SentenceTransformer puts prompts before its inputs, which are known for pictures and "
                f"texts alone; make {kind} inputs with its own preprocess, or set model.prompts = {{}}."
            )
        return getattr(self._processor(kind), name, None)

    def _processor(self, kind: str) -> Any:
        reader = _reader(self._model, kind)
        return getattr(reader.module if reader is not None else next(iter(self._model)), "processor", None)

    def _features(self, kind: str, given: list[Any]) -> Iterator[tuple[str, Tensor]]:
        task = _TASKS[kind]
        read: Mapping[str, Any] = self._model.preprocess(given, prompt=self._prompt(task), task=task)
        self._check(kind, read)
        for name, value in read.items():
            if name == "prompt_length":
                yield name, torch.full((len(given),), int(value))
            elif isinstance(value, Tensor):
                yield name, value

    def _check(self, kind: str, read: Mapping[str, Any]) -> None:
        """Raise where the network would be left without something that was prepared for it."""
        reader = _reader(self._model, kind)
        taken = reader.takes() - _KNOWN[kind] if reader is not None else set()
        lost = [name for name in read if name in taken and isinstance(read[name], Tensor) and bool(read[name].any())]
        if lost:
            raise ValueError(
                f"processor: the model's own preparation of one {kind} makes {', '.join(lost)}, which its network "
                "reads and DualEncoder does not know; explain a function of your own that passes it."
            )

    def _stacked(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Inputs that were read one by one, as one batch with padding behind them."""
        fill = {"input_ids": getattr(self.tokenizer, "pad_token_id", None) or 0, "image_position_ids": -1}
        return {
            name: pad_sequence([row[name][0] for row in rows], batch_first=True, padding_value=fill.get(name, 0))
            for name in rows[0]
        }

    def _prompt(self, task: str) -> str | None:
        prompts = self._model.prompts
        name = next((name for name in _PROMPTS[task] if name in prompts), self._model.default_prompt_name)
        found: str | None = prompts.get(name)
        return found
