"""Any two towers as one ``forward_func``: the cosine similarity of each aligned pair.

Works on transformers models that offer ``get_image_features`` and ``get_text_features``, on models with
``encode_image`` and ``encode_text``, and on two separate towers. Everything else here serves that function: loading,
preparing inputs through the model's own processor, the towers' layouts, and the layers worth explaining at.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_m2ib.checkpoints import check_checkpoint, find_statistics, load_model, load_processor
from captum_m2ib.layers import tensors_in
from captum_m2ib.layouts import Layout, PatchLayout, TextLayout, real_tokens
from captum_m2ib.pictures import PictureLike, load_pictures, seen_part
from captum_m2ib.statistics import ChannelStatistics, RunningStatistics

_METHODS = (("get_image_features", "get_text_features"), ("encode_image", "encode_text"))


@dataclass(frozen=True)
class Pairs:
    r"""Model inputs for a batch of pairs, with what is needed to show them.

    Attributes:

        inputs (tuple[Tensor, Tensor]): ``pixel_values``, (N, C, H, W), and ``input_ids``, (N, L).
        additional_forward_args (tuple[Tensor, ...]): ``attention_mask``, (N, L), where the tokenizer makes one.
        captions (tuple[str, ...]): The captions as given.
        tokens (tuple[tuple[str, ...], ...]): Per pair, the token at each of the L positions as a string.
        special (tuple[tuple[bool, ...], ...]): Per pair, which tokens the tokenizer added.
        pictures (tuple[numpy.ndarray, ...]): Per pair, the part of the picture that the model sees, uint8,
            (height, width, 3), at a resolution fit for looking at.
    """

    inputs: tuple[Tensor, Tensor]
    additional_forward_args: tuple[Tensor, ...]
    captions: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    special: tuple[tuple[bool, ...], ...]
    pictures: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str) -> Pairs:
        """The same pairs with their tensors on another device."""
        return Pairs(
            (self.inputs[0].to(device), self.inputs[1].to(device)),
            tuple(argument.to(device) for argument in self.additional_forward_args),
            self.captions,
            self.tokens,
            self.special,
            self.pictures,
        )


class _Tower(nn.Module):
    """One tower as a module that returns its embedding, so that the whole tower is one call.

    It refers to the model without owning it: the model stays registered once, under its own names.
    """

    def __init__(self, model: nn.Module, method: str | None, argument: str, result: str) -> None:
        super().__init__()
        self.__dict__["model"] = model
        self.method, self.argument, self.result = method, argument, result
        self.training = False

    def forward(self, inputs: Tensor, *additional: Any) -> Tensor:
        run: Any = self.model if self.method is None else getattr(self.model, self.method)
        named = self.method is not None and self.method.startswith("get_")
        mask = {"attention_mask": additional[0]} if additional and named else {}
        output = run(**{self.argument: inputs}, **mask) if named else run(inputs, *additional)
        return _embedding(output, self.result, type(self.model).__name__)


def _embedding(output: Any, result: str, owner: str) -> Tensor:
    for name in (None, result, "pooler_output"):
        found = output if name is None else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise TypeError(
        f"model: expected {owner} to return an embedding per example, (N, dimensions), as a tensor or under "
        f"{result!r} or 'pooler_output', got {type(output).__name__}; wrap the tower in a module that returns it."
    )


class DualEncoder(nn.Module):
    r"""Two towers as one ``forward_func``: cosine similarity of each aligned pair.

    Args:

        *towers (nn.Module): Either one model that offers ``get_image_features`` and ``get_text_features``
            (transformers) or ``encode_image`` and ``encode_text``, or two towers, the image's first, each returning
            an embedding per example.
        processor (optional): The processor of the model, for :meth:`prepare`. Default: None
        layouts (tuple, optional): Layouts of the towers where they cannot be derived. Default: None
        statistics (mapping, optional): Layer name to :class:`ChannelStatistics`, for the standardised prior.
            Default: None

    Raises:
        TypeError: if the towers offer neither of these.

    Examples::

        >>> # pixel_values (2, 3, 224, 224), input_ids (2, 12)
        >>> encoder = DualEncoder.from_pretrained("openai/clip-vit-base-patch32")
        >>> pairs = encoder.prepare(["cat.jpg", "dog.jpg"], ["a cat", "a dog"])
        >>> encoder(*pairs.inputs, *pairs.additional_forward_args)  # cosine similarities, shape (2,)
    """

    def __init__(
        self,
        *towers: nn.Module,
        processor: Any = None,
        layouts: tuple[Layout | None, ...] | None = None,
        statistics: Mapping[str, ChannelStatistics] | None = None,
    ) -> None:
        super().__init__()
        self._towers: tuple[_Tower, _Tower]
        if len(towers) == 1:
            self.model = towers[0]
            self.__dict__["_towers"] = _towers_of(towers[0])
        elif len(towers) == 2:
            self.image_tower, self.text_tower = towers
            self.__dict__["_towers"] = (
                _Tower(towers[0], None, "pixel_values", "image_embeds"),
                _Tower(towers[1], None, "input_ids", "text_embeds"),
            )
        else:
            raise TypeError(f"towers: expected one model or two towers, got {len(towers)} arguments.")
        self.processor = processor
        self.statistics: dict[str, ChannelStatistics] = dict(statistics or {})
        self._given_layouts = layouts
        self.training = any(tower.training for tower in towers)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> DualEncoder:
        r"""Load a transformers checkpoint with its processor; safetensors only, no code from the checkpoint is run.

        Args:

            model (str or PathLike): Hub id, or a local directory of the same form.
            revision (str, optional): Branch, tag or commit on the hub. Default: None
            torch_dtype (torch.dtype, optional): Default: None (float32, whatever the file holds)
            device (torch.device or str, optional): Default: None (stays on the CPU)

        Returns:
            DualEncoder: in eval mode; statistics for the standardised prior are read from
            ``bottleneck_statistics.safetensors`` where the checkpoint holds one.

        Raises:
            OSError: if there is no such checkpoint, or its safetensors weights are missing, damaged or incomplete.
            TypeError: if the model has no two towers.
        """
        check_checkpoint(model)
        loaded = load_model(model, revision, torch_dtype or torch.float32)
        encoder = cls(loaded.eval(), processor=load_processor(model, revision))
        encoder.statistics.update(find_statistics(model, revision))
        return encoder.to(device) if device is not None else encoder

    def forward(self, image: Tensor, text: Tensor, *additional: Any) -> Tensor:
        r"""Cosine similarity of each aligned pair.

        Args:

            image (Tensor): (N, C, H, W).
            text (Tensor): Token ids, (N, L).
            *additional: Further arguments of the text tower, the attention mask, (N, L), first.

        Returns:
            Tensor: (N,).

        Raises:
            ValueError: if the batch sizes differ or the token ids are not integers.
        """
        if image.shape[0] != text.shape[0]:
            raise ValueError(
                f"inputs: expected one text per image, got {image.shape[0]} images and {text.shape[0]} texts; repeat "
                "the one that is shared."
            )
        if isinstance(self.layouts[1], TextLayout) and text.is_floating_point():
            raise ValueError(
                f"inputs: expected integer token ids, got {text.dtype}; ids cannot be perturbed or averaged like "
                "pixels. Pass them as additional_forward_args, or attribute to the layer that embeds them."
            )
        image_embedding, text_embedding = self._towers[0](image), self._towers[1](text, *additional)
        # Half-precision scores differ by steps as large as what a token contributes.
        precise = torch.promote_types(image_embedding.dtype, torch.float32)
        return F.cosine_similarity(image_embedding.to(precise), text_embedding.to(precise), dim=-1)

    @property
    def layouts(self) -> tuple[Layout | None, ...]:
        """Layouts of the towers: as given, or derived from the model's configuration."""
        if self._given_layouts is not None:
            return self._given_layouts
        return _image_layout(self._side(0)), _text_layout(self._side(1))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def roots(self) -> tuple[nn.Module, ...]:
        """Where names of layers start: at the wrapped model, and at this module."""
        return (self.model, self) if "model" in self._modules else (self,)

    def owner(self, layer: nn.Module) -> int:
        """Which tower a layer belongs to: 0 for the image's, 1 for the text's."""
        return int(any(module is layer for module in self._side(1).modules()))

    def recommended_layers(self) -> tuple[nn.Module, nn.Module]:
        r"""The layers that measured best: the image tower's first block, the text tower's embeddings.

        From the first block on, the pooled position of a text tower already holds what the score needs, so that
        information goes round the gates of the other tokens; at the embeddings it cannot.

        Raises:
            ValueError: if the towers have no such layers under a known name.
        """
        return _blocks(self._side(0), "image")[0], _embeddings(self._side(1))

    def published_layers(self) -> tuple[nn.Module, nn.Module]:
        """The layers of the M2IB paper: the output of the block at three quarters of each tower's depth."""
        image, text = _blocks(self._side(0), "image"), _blocks(self._side(1), "text")
        return image[_three_quarters(len(image))], text[_three_quarters(len(text))]

    def statistics_of(self, layer: nn.Module) -> ChannelStatistics | None:
        r"""What is known of a layer's channels without seeing data: shipped statistics, or the vocabulary's.

        Args:

            layer (nn.Module): A layer of this encoder.

        Returns:
            ChannelStatistics or None: as shipped with the checkpoint; for the embeddings of the text tower those of
            every token of the vocabulary; else None.
        """
        for root in self.roots():
            for name, module in root.named_modules():
                if module is layer and name in self.statistics:
                    return self.statistics[name]
        return _vocabulary_statistics(layer) if layer is _find_embeddings(self._side(1)) else None

    def prepare(self, images: PictureLike | Sequence[PictureLike], captions: str | Sequence[str]) -> Pairs:
        r"""Turn pictures and captions into model inputs with the model's own processor.

        Args:

            images (picture or sequence of pictures): Paths, PIL images or uint8 arrays (H, W, 3). A single picture
                is paired with every caption.
            captions (str or sequence of str): A single caption is paired with every picture.

        Returns:
            Pairs: the inputs on the model's device, captions padded to the longest.

        Raises:
            ValueError: if the numbers of pictures and captions differ, a caption is empty, a picture cannot be read
                or is too large, or the encoder has no processor.
        """
        if self.processor is None:
            raise ValueError(
                "processor: this DualEncoder has none; load it with DualEncoder.from_pretrained or pass "
                "DualEncoder(model, processor=...)."
            )
        texts, pictures = _align(_captions(captions), load_pictures(images))
        pixels = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        encoded = self._tokenize(texts)
        ids, mask = encoded["input_ids"], encoded.get("attention_mask")
        tokenizer = self.processor.tokenizer
        special = set(tokenizer.all_special_ids) - _unknown_tokens(tokenizer)
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
        pairs = Pairs(
            (pixels.to(dtype), ids),
            () if mask is None else (mask,),
            tuple(texts),
            tuple(tuple(tokenizer.convert_ids_to_tokens(row)) for row in ids.tolist()),
            tuple(tuple(token in special for token in row) for row in ids.tolist()),
            tuple(seen_part(picture, self.processor.image_processor, pixels.shape[-2:]) for picture in pictures),
        )
        return pairs.to(self.device)

    def token_counts(self, pairs: Pairs) -> list[int]:
        """How many of each pair's tokens are real, (N,); the rest is padding."""
        layout, arguments = self.layouts[1], (*pairs.inputs, *pairs.additional_forward_args)
        real = real_tokens(layout, pairs.inputs[1], arguments) if isinstance(layout, TextLayout) else None
        return [len(row) for row in pairs.tokens] if real is None else real.sum(1).tolist()

    def _tokenize(self, captions: list[str]) -> Any:
        tokenizer = self.processor.tokenizer
        positions = getattr(_config(self._side(1), "text_config"), "max_position_embeddings", None)
        limit = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)
        unknown = _unknown_tokens(tokenizer)
        for caption, ids in zip(captions, tokenizer(captions)["input_ids"], strict=True):
            if len(ids) > limit:
                warnings.warn(
                    f"captions: the model reads {limit} tokens, {caption[:40]!r}... has {len(ids)}; the rest is cut.",
                    UserWarning,
                    stacklevel=3,
                )
            if unknown & set(ids):
                warnings.warn(
                    f"captions: the model's tokenizer does not know every word of {caption[:40]!r}; unknown words all "
                    "look the same to the model.",
                    UserWarning,
                    stacklevel=3,
                )
        return tokenizer(captions, padding="longest", truncation=True, max_length=limit, return_tensors="pt")

    def _side(self, index: int) -> nn.Module:
        """The module that holds one tower's layers."""
        if "model" not in self._modules:
            return (self.image_tower, self.text_tower)[index]
        for name in (("vision_model", "visual"), ("text_model", "text"))[index]:
            found = getattr(self.model, name, None)
            if isinstance(found, nn.Module):
                return found
        return self.model


def is_dual_encoder(model: Any) -> bool:
    """Whether a model offers both towers under the names that transformers or CLIP's own code use."""
    return any(all(hasattr(model, name) for name in names) for names in _METHODS)


def _towers_of(model: nn.Module) -> tuple[_Tower, _Tower]:
    for image, text in _METHODS:
        if hasattr(model, image) and hasattr(model, text):
            return (
                _Tower(model, image, "pixel_values", "image_embeds"),
                _Tower(model, text, "input_ids", "text_embeds"),
            )
    raise TypeError(
        "model: expected get_image_features and get_text_features, or encode_image and encode_text, got "
        f"{type(model).__name__}, which offers neither; pass DualEncoder(image_tower, text_tower) instead."
    )


def _config(tower: nn.Module, part: str) -> Any:
    config = getattr(tower, "config", None)
    return getattr(config, part, config)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _image_layout(tower: nn.Module) -> PatchLayout | None:
    config = _config(tower, "vision_config")
    if getattr(config, "patch_size", None) is None or getattr(config, "image_size", None) is None:
        return None
    patch, size = _pair(config.patch_size), _pair(config.image_size)
    tables = (m for n, m in tower.named_modules() if isinstance(m, nn.Embedding) and "position" in n)
    # A tower stores a position for each prefix token and each patch of its native picture.
    positions = next((table.num_embeddings for table in tables), 0)
    return PatchLayout(patch, max(positions - (size[0] // patch[0]) * (size[1] // patch[1]), 0))


def _text_layout(tower: nn.Module) -> TextLayout | None:
    tables = (name for name, module in tower.named_modules() if isinstance(module, nn.Embedding))
    if all("position" in name for name in tables):
        return None
    config = _config(tower, "text_config")
    end = getattr(config, "eos_token_id", None)
    # Old configurations of CLIP hold a wrong id, 2, by which transformers knows to pool at the highest id.
    legacy = end == 2 and str(getattr(config, "model_type", "")).startswith(("clip", "groupvit", "xclip"))
    return TextLayout(2, end if isinstance(end, int) and not legacy else None, ends_at_highest=legacy)


def _blocks(tower: nn.Module, kind: str) -> nn.ModuleList:
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ValueError(
            f"layers: found no list of blocks in the {kind} tower {type(tower).__name__}; name the layers, e.g. "
            "MultiModalInfoBottleneck(encoder, layers=(image_layer, text_layer))."
        )
    return max(lists, key=len)


def _three_quarters(depth: int) -> int:
    # After the last block only the pooled position reaches the score: gates of the others would mean nothing.
    return max(min(3 * depth // 4, depth - 2), 0)


def _find_embeddings(tower: nn.Module) -> nn.Module | None:
    return next((module for name, module in tower.named_modules() if name.split(".")[-1] == "embeddings"), None)


def _embeddings(tower: nn.Module) -> nn.Module:
    found = _find_embeddings(tower)
    if found is None:
        raise ValueError(
            f"layers: found no module named 'embeddings' in the text tower {type(tower).__name__}; name the layers, "
            "e.g. MultiModalInfoBottleneck(encoder, layers=(image_layer, text_layer))."
        )
    return found


def _vocabulary_statistics(embeddings: nn.Module) -> ChannelStatistics | None:
    """Channels over every token of the vocabulary, each at one position, positions cycling."""
    tables = {name: module for name, module in embeddings.named_modules() if isinstance(module, nn.Embedding)}
    tokens = next((table for name, table in tables.items() if "position" not in name), None)
    positions = next((table for name, table in tables.items() if "position" in name), None)
    if tokens is None:
        return None
    length = positions.num_embeddings if positions is not None else 64
    running = RunningStatistics()
    with torch.no_grad():
        for ids in torch.arange(tokens.num_embeddings, device=tokens.weight.device).split(length):
            running.update(tensors_in(embeddings(input_ids=ids[None]))[0].flatten(0, -2))
    return running.result()


def _captions(captions: str | Sequence[str]) -> list[str]:
    given = [captions] if isinstance(captions, str) else list(captions)
    if not given:
        raise ValueError("captions: expected at least one caption, got none.")
    for index, caption in enumerate(given):
        if not isinstance(caption, str) or not caption.strip():
            got = "an empty one" if isinstance(caption, str) else type(caption).__name__
            raise ValueError(f"captions[{index}]: expected a caption with at least one word, got {got}.")
        if any("\ud800" <= character <= "\udfff" for character in caption):
            raise ValueError(f"captions[{index}]: expected text, got bytes that are not UTF-8; decode it first.")
    return given


def _align(captions: list[str], pictures: list[Any]) -> tuple[list[str], list[Any]]:
    count = max(len(captions), len(pictures))
    if len(captions) not in (1, count) or len(pictures) not in (1, count):
        raise ValueError(
            f"captions: expected one per picture or a single one for all, got {len(pictures)} pictures and "
            f"{len(captions)} captions."
        )
    return (
        captions * count if len(captions) == 1 else captions,
        pictures * count if len(pictures) == 1 else pictures,
    )


def _unknown_tokens(tokenizer: Any) -> set[int]:
    """Ids that stand for words the tokenizer does not know; CLIP's own knows every word and names its end token."""
    return {tokenizer.unk_token_id} - {None, tokenizer.eos_token_id, tokenizer.pad_token_id}
