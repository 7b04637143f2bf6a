"""Any two towers as one ``forward_func``: the cosine similarity of each aligned pair, or its family's own score.

Works on transformers models that offer ``get_image_features`` and ``get_text_features`` (or what
:mod:`captum_m2ib.encoders.families` knows of them), on models with ``encode_image`` and ``encode_text`` (open_clip),
and on two separate towers. Everything else here serves that function: loading, preparing inputs through the model's own
processor, the towers' layouts, and the layers worth explaining at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_m2ib.encoders.calls import embedding_of
from captum_m2ib.encoders.checkpoints import (
    find_source,
    find_statistics,
    load_embedder,
    load_model,
    load_open_clip,
    load_processor,
)
from captum_m2ib.encoders.families import family_of
from captum_m2ib.encoders.late_interaction import LateInteraction
from captum_m2ib.encoders.pairs import Media, Pairs, prepare_media, prepare_pairs
from captum_m2ib.encoders.scores import MaxSim, cosine
from captum_m2ib.encoders.towers import config_of
from captum_m2ib.engine.layouts import PackedLayout, PatchLayout, TextLayout
from captum_m2ib.engine.real_units import real_tokens

__all__ = ["DualEncoder", "Pairs", "is_dual_encoder"]


class DualEncoder(LateInteraction):
    r"""Two towers as one ``forward_func``: cosine similarity of each aligned pair, or its family's own score.

    Args:

        *towers (nn.Module): Either one model of a known family, or that offers ``get_image_features`` and
            ``get_text_features`` (transformers) or ``encode_image`` and ``encode_text`` (open_clip), or two towers,
            each returning an embedding per example. The same tower may be given twice.
        modalities (tuple[str, str], optional): What is compared: two of ``"image"``, ``"text"``, ``"audio"`` and
            ``"video"``, such as ("image", "image") for pictures compared through one tower. Default: None (what the
            model compares; ("image", "text") for two towers)
        processor (optional): The processor of the model, for :meth:`prepare`, or two functions, (preprocess, tokenize)
            (see :mod:`captum_m2ib.encoders.processors`). Default: None
        layouts (tuple, optional): Layouts of the towers, each None where it is to be derived. Default: None
        statistics (mapping, optional): Layer name to :class:`ChannelStatistics`, for the standardised prior.
            Default: None

    Raises:
        TypeError: if the towers offer neither of these.
        ValueError: if the model does not read one of the modalities.

    Examples::

        >>> from captum_m2ib.scenes import CHECKPOINT
        >>> encoder = DualEncoder.from_pretrained(CHECKPOINT)  # or "openai/clip-vit-base-patch32", or any directory
        >>> pairs = encoder.prepare(images, captions)  # two pictures, two captions
        >>> encoder(*pairs.inputs, *pairs.additional_forward_args).shape  # cosine similarities
        torch.Size([2])
    """

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

            model (str or PathLike): Hub id, or a local directory of the same form: a checkpoint of transformers; an
                adapter of one (LoRA, ...), which peft reads and which is added to the weights; or a SentenceTransformer
                that holds one. Names of open_clip are for :meth:`from_open_clip`.
            revision (str, optional): Branch, tag or commit on the hub. Default: None
            torch_dtype (torch.dtype, optional): Default: None (float32, whatever the file holds)
            device (torch.device or str, optional): Default: None (stays on the CPU)

        Returns:
            DualEncoder: in eval mode; statistics for the standardised prior are read from
            ``bottleneck_statistics.safetensors`` where the checkpoint holds one.

        Raises:
            OSError: if there is no such checkpoint, or its safetensors weights are missing, damaged or incomplete.
            ImportError: if it is an adapter and peft is not installed.
            TypeError: if the model has no two towers.
        """
        source = find_source(model, revision)
        loaded = load_model(source, torch_dtype or torch.float32)
        encoder = cls(loaded.eval(), processor=load_processor(source, revision))
        encoder.statistics.update(find_statistics(model, revision))
        return encoder.to(device) if device is not None else encoder

    @classmethod
    def from_open_clip(
        cls,
        model: str,
        pretrained: str | None = None,
        *,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> DualEncoder:
        r"""Load a model of open_clip with its own transform and tokenizer (extra ``open-clip``).

        Args:

            model (str): Name of an architecture, or ``"hf-hub:..."`` or ``"local-dir:..."`` for a checkpoint with its
                configuration.
            pretrained (str, optional): Tag of the weights or path of a file. Default: None (what the checkpoint holds;
                random weights for a bare architecture)
            device (torch.device or str, optional): Default: None (stays on the CPU)
            **options: Passed on to ``open_clip.create_model_and_transforms``. Pickled weights are read with
                ``weights_only=True``, which runs no code.

        Returns:
            DualEncoder: in eval mode.

        Raises:
            ImportError: if open_clip is not installed.
            OSError: if there is no such model or its weights cannot be read.
        """
        loaded, processor = load_open_clip(model, pretrained, options)
        encoder = cls(loaded.eval(), processor=processor)
        return encoder.to(device) if device is not None else encoder

    @classmethod
    def from_sentence_transformers(
        cls,
        model: str | os.PathLike[str] | nn.Module,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
    ) -> DualEncoder:
        r"""Load a model of sentence-transformers that embeds pictures and texts (extra ``sentence-transformers``).

        Pictures are prepared as the model's documents, captions as its queries, with the prompts that belong to it; the
        score is its own pooling and similarity function (cosine, dot product, Euclidean or Manhattan distance).

        Args:

            model (str, PathLike or SentenceTransformer): Hub id, or a local directory of the same form, or a model in
                hand. No code from the checkpoint is run.
            revision (str, optional): Branch, tag or commit on the hub. Default: None
            device (torch.device or str, optional): Default: None (stays where it is, or on the CPU)

        Returns:
            DualEncoder: in eval mode.

        Raises:
            ImportError: if sentence-transformers is not installed.
            OSError: if there is no such model or it cannot be loaded.
            TypeError: if the model does not embed both pictures and texts.

        Examples::

            >>> from captum_m2ib import DualEncoder
            >>> encoder = DualEncoder.from_sentence_transformers("Qwen/Qwen3-VL-Embedding-2B")  # doctest: +SKIP
        """
        loaded = model if isinstance(model, nn.Module) else load_embedder(model, revision)
        encoder = cls(loaded.eval())
        return encoder.to(device) if device is not None else encoder

    def forward(self, first: Tensor, second: Tensor, *additional: Any) -> Tensor:
        r"""Score of each aligned pair: the cosine similarity, or what the model's family says.

        Args:

            first (Tensor): What the first tower reads, e.g. pictures, (N, C, H, W).
            second (Tensor): What the second tower reads, e.g. token ids, (N, L).
            *additional: Further arguments, in the order of :attr:`argument_names`; attention masks, (N, L), come first.
                For a MaxSim score one more may follow: which tokens of the query count, (N, L), as
                :meth:`count_tokens` adds it.

        Returns:
            Tensor: (N,).

        Raises:
            ValueError: if the batch sizes differ or the token ids are not integers.
        """
        if first.shape[0] != second.shape[0]:
            kinds = [side.modality for side in self.sides]
            raise ValueError(
                f"inputs: expected one {kinds[1]} per {kinds[0]}, got {first.shape[0]} {kinds[0]}s and "
                f"{second.shape[0]} {kinds[1]}s; repeat the one that is shared."
            )
        for inputs, layout in zip((first, second), self.layouts, strict=False):
            if isinstance(layout, TextLayout) and inputs.is_floating_point():
                raise ValueError(
                    f"inputs: expected integer token ids, got {inputs.dtype}; ids cannot be perturbed or averaged like "
                    "pixels. Pass them as additional_forward_args, or attribute to the layer that embeds them."
                )
        additional, counted = self._split(additional)
        return self._scored(*self._joined(*self._outputs(first, second, additional)), counted)

    def similarities(self, first: Tensor, second: Tensor, *additional: Any) -> Tensor:
        r"""Score of every first input with every second one; each tower runs once.

        Args:

            first (Tensor): What the first tower reads, M examples.
            second (Tensor): What the second tower reads, N examples.
            *additional: As for :meth:`forward`, each as many as what it belongs to.

        Returns:
            Tensor: (M, N).

        Raises:
            ValueError: if one side of the model reads what the other returns.

        Examples::

            >>> pictures, captions = pairs.inputs
            >>> encoder.similarities(pictures[:1], captions, *pairs.additional_forward_args).shape
            torch.Size([1, 2])
        """
        additional, counted = self._split(additional)
        one, other = self.embed(0, first, *additional), self.embed(1, second, *additional)
        counted = None if counted is None else counted.unsqueeze(0 if self._is_in_order else 1)
        return self._scored(one.unsqueeze(1), other.unsqueeze(0), counted)

    def embed(self, index: int, inputs: Tensor, *additional: Any) -> Tensor:
        r"""What one tower returns, for :meth:`compare_embeddings`.

        Args:

            index (int): 0 for the first tower, 1 for the second.
            inputs (Tensor): What it reads, N examples.
            *additional: As for :meth:`forward`; what belongs to the other tower is not looked at.

        Returns:
            Tensor: Embeddings, (N, dimensions); of a MaxSim score one per token, (N, tokens, dimensions).

        Raises:
            ValueError: if one side of the model reads what the other returns.
        """
        if self._join is not None:
            raise ValueError(
                f"model: in {type(self.model).__name__} one side reads what the other returns, so that no embedding "
                "serves several pairs; score the pairs one by one."
            )
        output = self._output(index, inputs, self._split(additional)[0])
        return (
            output if self._family.score is not None else embedding_of(output, type(self._towers[index].model).__name__)
        )

    def compare_embeddings(self, first: Tensor, second: Tensor) -> Tensor:
        r"""Score of every embedding of the first tower with every one of the second; no tower runs.

        Args:

            first (Tensor): What :meth:`embed` returned for the first tower, M examples.
            second (Tensor): What it returned for the second, N examples.

        Returns:
            Tensor: (M, N).

        Examples::

            >>> pictures, captions = pairs.inputs
            >>> first = encoder.embed(0, pictures)
            >>> second = encoder.embed(1, captions, *pairs.additional_forward_args)
            >>> encoder.compare_embeddings(first, second).shape
            torch.Size([2, 2])
        """
        return self._scored(first.unsqueeze(1), second.unsqueeze(0))

    def holds_sizes(self, pairs: Pairs) -> bool:
        r"""Whether pairs hold pictures, sounds or videos of several sizes, so that each is to be explained alone.

        Args:

            pairs (Pairs): As :meth:`prepare` returns them.

        Returns:
            bool: False for most models, whose pictures all have one size.
        """
        layout = self.layouts[0]
        if any(isinstance(one, PatchLayout) and one.mask_argument is not None for one in self.layouts):
            arguments = (*pairs.inputs, *pairs.additional_forward_args)
            places = [one.mask_argument for one in self.layouts if isinstance(one, PatchLayout)]
            # Whatever the mask says, a tower that begins with convolutions reads padding at the end of a short sound.
            masks = [arguments[place] for place in places if place is not None and place < len(arguments)]
            return any(mask is not None and len(set(mask.sum(1).tolist())) > 1 for mask in masks)
        if isinstance(layout, PackedLayout) and layout.drops_padding:
            real = real_tokens(layout, pairs.inputs[0], (*pairs.inputs, *pairs.additional_forward_args))
            return real is not None and len(set(real.sum(1).tolist())) > 1
        return len(set(map(len, pairs.tiles))) > 1

    @property
    def compares_media(self) -> bool:
        """Whether sounds are compared with videos, without captions."""
        return {side.modality for side in self.sides} == {"audio", "video"}

    @property
    def _join(self) -> Callable[[nn.Module, Any, Any], tuple[Tensor, Tensor]] | None:
        """How the two outputs become embeddings where one side reads the other's."""
        return self._family.join if self._is_whole else None

    def _joined(self, first: Any, second: Any) -> tuple[Tensor, Tensor]:
        names = [type(tower.model).__name__ for tower in self._towers]
        if self._join is not None:
            return self._join(self.model, first, embedding_of(second, names[1]))
        if self._family.score is not None:
            return first, second
        return embedding_of(first, names[0]), embedding_of(second, names[1])

    def _scored(self, first: Tensor, second: Tensor, counted: Tensor | None = None) -> Tensor:
        score = self._family.score
        if score is None:
            return cosine(first, second)
        outputs = (first, second) if self._is_in_order else (second, first)
        return score(*outputs) if counted is None else cast(MaxSim, score)(*outputs, counted)

    def prepare(self, images: Media, captions: str | Sequence[str] | Media) -> Pairs:
        r"""Turn pictures, sounds or videos and captions into model inputs with the model's own processor.

        Args:

            images (pictures, sounds or videos): What the model compares with captions, one or several.
                Pictures: paths, PIL images or uint8 arrays (H, W, 3), in a list, a column of a table or anything else
                that can be gone through. Sounds: paths of WAV files, :class:`Sound` objects or mappings with ``array``
                and ``sampling_rate``. Videos: lists of pictures, uint8 arrays (frames, H, W, 3), folders, GIF files or
                :class:`Video` objects. A single one is paired with every caption.
            captions (str or sequence of str): A single caption is paired with every picture, sound or video. Of a model
                that compares sounds with videos, the second ones: videos for sounds, sounds for videos.

        Returns:
            Pairs: the inputs on the model's device, captions padded as the model was trained. ``timelines`` say which
            part of a sound and which frames were taken.

        Raises:
            ValueError: if the numbers of pictures and captions differ, a caption is empty, a picture cannot be read
                or is too large, a sound has no sampling rate, the encoder has no processor, or it does not compare
                these with captions.
        """
        if self.processor is None:
            raise ValueError(
                "processor: this DualEncoder has none; load it with DualEncoder.from_pretrained, or pass "
                "DualEncoder(model, processor=...) with one of transformers or two functions, (preprocess, tokenize)."
            )
        kinds = tuple(side.modality for side in self.sides)
        is_codes = kinds[0] == "audio" and self.reads_tokens(0)
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
        frames = getattr(config_of(self.tower_of(0), "vision_config"), "num_frames", None)
        if self.compares_media:
            kind = kinds[0], kinds[1]
            return prepare_media(self.processor, self.argument_names, (images, captions), kind, dtype).to(self.device)
        if kinds[1] != "text" or kinds[0] == "text" or is_codes:
            compared = "sounds as codes" if is_codes else kinds[0]
            raise ValueError(
                "prepare: expected an encoder of pictures, sounds or videos and captions, in this order; this one "
                f"compares {compared} with {kinds[1]}; make tensors with encoder.processor and pass them in the order "
                f"{', '.join(self.argument_names)}."
            )
        pairs = prepare_pairs(
            self.processor,
            self.argument_names,
            images,
            cast("str | Sequence[str]", captions),
            getattr(config_of(self.tower_of(1), "text_config"), "max_position_embeddings", None),
            self.sides[1].padding,
            dtype,
            kinds[0],
            frames,
        )
        return pairs.to(self.device)


def is_dual_encoder(model: Any) -> bool:
    """Whether a model offers both towers under names that are known."""
    return family_of(model) is not None
