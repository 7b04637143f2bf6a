"""Pages as processors of late-interaction models prepare them, and where what the model sees of a page lies.

Such a processor prepares each side on its own (``process_images``, ``process_queries``): a page comes with token ids of
its own, a prompt in which its patches have their places. It may come in one piece, as packed patches, or as tiles and a
thumbnail of the whole; each tile is looked for on the page like any model's view of a picture.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from captum_m2ib.encoders.patches import separated, side_by_side
from captum_m2ib.encoders.regions import Region
from captum_m2ib.encoders.views import View, view_of
from captum_m2ib.engine.units import unpacked

if TYPE_CHECKING:
    from PIL.Image import Image

_TOKENS = ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids", "token_type_ids")


class Pages(NamedTuple):
    r"""Pages as a model reads them.

    Attributes:

        found (dict[str, Any]): What the model reads, by the names of its arguments.
        views (list[View]): What it sees of each page.
        tiles (tuple[tuple[Region or None, ...], ...]): Where each tile of each page lies; () for pages in one piece.
    """

    found: dict[str, Any]
    views: list[View]
    tiles: tuple[tuple[Region | None, ...], ...]


class TaskedProcessor:
    r"""A processor whose chat template is told whether it writes a document or a query, as NeoMME's is.

    Args:

        processor: Of transformers.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    @property
    def image_processor(self) -> Any:
        """What reads pictures."""
        return self._processor.image_processor

    def process_images(self, images: Sequence[Image]) -> dict[str, Tensor]:
        r"""Prepare pages.

        Args:

            images (sequence of PIL.Image.Image): The pages.

        Returns:
            dict[str, Tensor]: what the model reads, each with one row per page.
        """
        found = self._written("document", [{"type": "image", "image": image} for image in images])
        found["position_ids"] = found["position_ids"].movedim(0, 1)
        # Two tokens come before a page's patches, and a mark stands behind each row of them.
        found["spatial_shapes"] = found["position_ids"].amax(-1) - torch.tensor([1, 2])
        found["pixel_values"] = separated(found["pixel_values"], found["spatial_shapes"])
        return found

    def process_queries(self, text: Sequence[str]) -> dict[str, Tensor]:
        r"""Prepare queries.

        Args:

            text (sequence of str): The queries.

        Returns:
            dict[str, Tensor]: what the model reads, each with one row per query.
        """
        return self._written("query", [{"type": "text", "text": one} for one in text])

    def _written(self, task: str, contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not getattr(self._processor, "chat_template", None):
            raise ValueError(
                f"processor: expected {type(self._processor).__name__} with a chat template, which writes pages and "
                "queries; load it from the checkpoint, or pass chat_template=..."
            )
        return dict(
            self._processor.apply_chat_template(
                [[{"role": "user", "content": [content]}] for content in contents],
                task=task,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"padding": True, "return_tensors": "pt"},
            )
        )


def with_tasks(processor: Any) -> Any:
    """A processor whose chat template knows documents and queries becomes one that :func:`reads_pages`."""
    write = getattr(processor, "apply_chat_template", None)
    is_tasked = callable(write) and "task" in inspect.signature(write).parameters
    return TaskedProcessor(processor) if is_tasked and not reads_pages(processor) else processor


def reads_pages(processor: Any) -> bool:
    """Whether a processor prepares pages and queries each on its own."""
    return all(callable(getattr(processor, name, None)) for name in ("process_images", "process_queries"))


def read_pages(processor: Any, pictures: Sequence[Image]) -> Pages:
    r"""Prepare pages.

    Args:

        processor: One that :func:`reads_pages`.
        pictures (sequence of PIL.Image.Image): The pages, RGB.

    Returns:
        Pages: what the model reads of them, and what it sees.
    """
    read = dict(processor.process_images(list(pictures)))
    found = {f"page_{name}" if name in _TOKENS else name: value for name, value in read.items()}
    if read["pixel_values"].ndim != 5:
        parts = _Parts(processor)
        views = [
            view_of(picture, parts.of(read, index)[0], parts.alone, processor.image_processor)
            for index, picture in enumerate(pictures)
        ]
        return Pages(found, views, ())
    wholes = [Region(0.0, 0.0, *picture.size, *picture.size) for picture in pictures]
    views = [View(whole.crop(picture), whole) for whole, picture in zip(wholes, pictures, strict=True)]
    return Pages(found, views, tuple(_tiles(processor, read, index, one) for index, one in enumerate(pictures)))


def _tiles(processor: Any, read: dict[str, Any], index: int, picture: Image) -> tuple[Region | None, ...]:
    """Where each tile of a page lies on it."""
    parts = _Parts(processor)
    return tuple(
        view_of(picture, tile, partial(parts.alone, place=place), None).region
        for place, tile in enumerate(parts.of(read, index))
    )


class _Parts:
    """The pictures, (C, h, w), that a processor makes of a page; the same page is processed once."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._known: dict[bytes, list[Tensor]] = {}

    def alone(self, picture: Image, place: int = 0) -> Tensor:
        """One part of a page that is processed for itself."""
        content = picture.tobytes()
        if content not in self._known:
            self._known[content] = self.of(dict(self._processor.process_images([picture])), 0)
        return self._known[content][place]

    def of(self, read: dict[str, Any], index: int) -> list[Tensor]:
        """One page of a batch."""
        pixels = read["pixel_values"][index]
        if "image_grid_thw" in read:
            return [self._joined(pixels, read["image_grid_thw"][index])]
        if "spatial_shapes" in read:
            return [side_by_side(pixels, *read["spatial_shapes"][index].tolist())]
        # Tiles beyond a page's own are all zeros.
        return [tile for tile in pixels if bool(tile.any())] if pixels.ndim == 4 else [pixels]

    def _joined(self, patches: Tensor, shape: Tensor) -> Tensor:
        """Packed patches, each of some equal frames, put side by side."""
        reader, (rows, columns) = self._processor.image_processor, shape[-2:].tolist()
        side = reader.patch_size
        grid = unpacked(patches[: rows * columns], rows, columns, reader.merge_size)
        frames = grid.unflatten(-1, (3, -1, side, side))[:, :, :, 0]
        return frames.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
