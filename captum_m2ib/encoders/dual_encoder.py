"""Any two towers as one ``forward_func``: the cosine similarity of each aligned pair, or its family's own score.

Works on transformers models that offer ``get_image_features`` and ``get_text_features`` (or what
:mod:`captum_m2ib.encoders.families` knows of them), on models with ``encode_image`` and ``encode_text`` (open_clip),
and on two separate towers. Everything else here serves that function: loading, preparing inputs through the model's own
processor, the towers' layouts, and the layers worth explaining at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast, overload

import torch
from torch import Tensor, nn

from captum_m2ib.encoders.calls import TowerCall, as_called, embedding_of
from captum_m2ib.encoders.checkpoints import (
    find_source,
    find_statistics,
    load_model,
    load_open_clip,
    load_processor,
)
from captum_m2ib.encoders.families import Family, Side, derive_layout, family_of, image_token_of
from captum_m2ib.encoders.pairs import Media, Pairs, padding_of, prepare_pairs
from captum_m2ib.encoders.processors import as_processor
from captum_m2ib.encoders.scores import MaxSim, cosine, is_token
from captum_m2ib.encoders.spans import find_span
from captum_m2ib.encoders.tables import TokenModules, find_token_modules, vocabulary_statistics
from captum_m2ib.encoders.towers import config_of, device_of, refine, stages_of
from captum_m2ib.encoders.wrappers import no_towers, processor_in, unwrap
from captum_m2ib.engine.layers import Layer, LayerLike, resolve_for
from captum_m2ib.engine.layouts import Layout, PackedLayout, PatchLayout, TextLayout, real_tokens
from captum_m2ib.engine.statistics import ChannelStatistics

__all__ = ["DualEncoder", "Pairs", "is_dual_encoder"]

_OWN = {
    "text": Side("text", "", ("input_ids", "attention_mask"), (), named=False),
    **{
        name: Side(name, "", (argument,), (), named=False)
        for name, argument in (("image", "pixel_values"), ("video", "pixel_values"), ("audio", "input_features"))
    },
}


# Under which names one model, or two towers, are registered.
_NAMES = {1: ("model",), 2: ("image_tower", "text_tower")}


class Interaction(NamedTuple):
    r"""What a MaxSim score is made of.

    Attributes:

        matches (Tensor): Of every query token with every page token, (N, query tokens, page tokens); minus infinity at
            padding of the page.
        counted (Tensor): Which query tokens count, boolean, (N, query tokens).
        patches (Tensor): Which page tokens are patches, in their order, boolean, (N, page tokens).
    """

    matches: Tensor
    counted: Tensor
    patches: Tensor


class DualEncoder(nn.Module):
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

    model: nn.Module
    image_tower: nn.Module
    text_tower: nn.Module
    _towers: tuple[TowerCall, TowerCall]

    def __init__(
        self,
        *towers: nn.Module,
        modalities: tuple[str, str] | None = None,
        processor: Any = None,
        layouts: Sequence[Layout | None] | None = None,
        statistics: Mapping[str, ChannelStatistics] | None = None,
    ) -> None:
        super().__init__()
        if len(towers) not in (1, 2):
            raise TypeError(f"towers: expected one model or two towers, got {len(towers)} arguments.")
        self.processor = as_processor(processor if processor is not None else processor_in(towers[0]))
        self.statistics: dict[str, ChannelStatistics] = dict(statistics or {})
        self._modalities = modalities
        self._given_layouts = tuple(layouts) if layouts is not None else None
        self._hold(dict(zip(_NAMES[len(towers)], towers, strict=True)))

    def __setattr__(self, name: str, value: Any) -> None:
        held = [known for known in _NAMES[1] + _NAMES[2] if known in self.__dict__.get("_modules", ())]
        if name not in _NAMES[1] + _NAMES[2] or not held:
            super().__setattr__(name, value)
            return
        if name not in held:
            raise AttributeError(
                f"{name}: this DualEncoder is made of {' and '.join(held)}; set that, or make a new DualEncoder."
            )
        self._hold({known: value if known == name else self._modules[known] for known in held})
        # They were measured on what has been replaced.
        self.statistics = {}

    def _hold(self, towers: Mapping[str, Any]) -> None:
        """Register the model or the towers, and derive all that is known of them."""
        names, modules = list(towers), [unwrap(tower) for tower in towers.values()]
        is_one = len(modules) == 1
        family = _known_family(modules[0]) if is_one else Family(tuple(_OWN.values()))
        sides = _chosen_sides(family, self._modalities or (None if is_one else ("image", "text")), modules[0])
        calls = [
            TowerCall(self._modules, name, as_called(side, module))
            for name, module, side in zip(names * (3 - len(names)), modules * (3 - len(names)), sides, strict=True)
        ]
        for name, module in zip(names, modules, strict=True):
            super().__setattr__(name, module)
        self._family, self._is_whole = family, sides == family.sides
        self._is_in_order = family.sides.index(sides[0]) <= family.sides.index(sides[1])
        self.sides: tuple[Side, Side] = (calls[0].side, calls[1].side)
        # Outside the registry of modules, so that parameters keep the model's own names.
        self.__dict__["_towers"] = tuple(calls)
        self.__dict__["_wrapped"] = tuple(tower for tower in towers.values() if tower not in modules)
        self.__dict__["_tokens"] = {}
        self._slots = _slots(self.sides)
        given = self._given_layouts or (None, None)
        self._layouts = tuple(self._derived_layout(i) if layout is None else layout for i, layout in enumerate(given))
        self.training = any(module.training for module in modules)

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
        if self._join is not None:
            raise ValueError(
                f"similarities: in {type(self.model).__name__} one side reads what the other returns, so that no "
                "embedding serves several pairs; score the pairs one by one."
            )
        additional, counted = self._split(additional)
        one, other = self._joined(*self._outputs(first, second, additional))
        counted = None if counted is None else counted.unsqueeze(0 if self._is_in_order else 1)
        return self._scored(one.unsqueeze(1), other.unsqueeze(0), counted)

    def count_tokens(self, pairs: Pairs, tokens: str | Sequence[str] | Tensor) -> Pairs:
        r"""The same pairs with a score that counts some tokens of the query alone, as a MaxSim score can.

        Args:

            pairs (Pairs): As :meth:`prepare` returns them.
            tokens (str, sequence of str or Tensor): Words as they follow one another in every query, or one such string
                per pair; or which tokens count, boolean, (N, L).

        Returns:
            Pairs: with that as one more additional argument.

        Raises:
            ValueError: if the score is no sum over tokens, the words cannot be found among a query's tokens, or no real
                token is left.
        """
        self._ensure_terms()
        if isinstance(tokens, Tensor):
            counted = tokens.bool().cpu()
        else:
            words = [tokens] * len(pairs) if isinstance(tokens, str) else list(tokens)
            if len(words) != len(pairs):
                raise ValueError(
                    f"tokens: expected one string for all pairs or one per pair, {len(pairs)}, got {len(words)}."
                )
            found = zip(pairs.captions, pairs.tokens, words, strict=True)
            counted = torch.tensor([find_span(*each) for each in found])
        real = self.real_tokens(pairs)
        if counted.shape != real.shape or not bool((counted & real).any(1).all()):
            raise ValueError(
                f"tokens: expected at least one real token per pair among (N, L) = {tuple(real.shape)}, got a mask of "
                f"shape {tuple(counted.shape)} with {counted.sum().item()} of them."
            )
        missing = (None,) * (len(self._slots) - 2 - len(pairs.additional_forward_args))
        additional = (*pairs.additional_forward_args, *missing, counted.to(pairs.inputs[1].device))
        return replace(pairs, additional_forward_args=additional)

    def holds_sizes(self, pairs: Pairs) -> bool:
        r"""Whether pairs hold pictures, sounds or videos of several sizes, so that each is to be explained alone.

        Args:

            pairs (Pairs): As :meth:`prepare` returns them.

        Returns:
            bool: False for most models, whose pictures all have one size.
        """
        layout = self.layouts[0]
        if isinstance(layout, PatchLayout) and layout.mask_argument is not None:
            arguments = (*pairs.inputs, *pairs.additional_forward_args)
            # Whatever the mask says, a tower that begins with convolutions reads padding at the end of a short sound.
            mask = arguments[layout.mask_argument] if layout.mask_argument < len(arguments) else None
            return mask is not None and len(set(mask.sum(1).tolist())) > 1
        if isinstance(layout, PackedLayout) and layout.drops_padding:
            real = real_tokens(layout, pairs.inputs[0], (*pairs.inputs, *pairs.additional_forward_args))
            return real is not None and len(set(real.sum(1).tolist())) > 1
        return len(set(map(len, pairs.tiles))) > 1

    @property
    def has_terms(self) -> bool:
        """Whether the score is a sum over the tokens of the query, of which some can be chosen."""
        return isinstance(self._family.score, MaxSim)

    def interaction(self, page: Tensor, query: Tensor, *additional: Any) -> Interaction:
        r"""What a MaxSim score is made of.

        Args:

            page, query (Tensor): As for :meth:`forward`.
            *additional: As for :meth:`forward`.

        Returns:
            Interaction: matches of all tokens.

        Raises:
            ValueError: if the score is no MaxSim, or the first input is no page.
        """
        self._ensure_terms()
        if not self._is_in_order:
            raise ValueError("modalities: expected pages first, then queries; leave modalities out.")
        read, counted = self._split(additional)
        of_page, of_query = self._outputs(page, query, read)
        is_query = is_token(of_query)
        ids = read[self.argument_names.index("page_input_ids") - 2]
        return Interaction(
            cast(MaxSim, self._family.score).matches(of_page, of_query),
            is_query if counted is None else is_query & counted.bool(),
            ids == image_token_of(self.model),
        )

    def _ensure_terms(self) -> None:
        if not self.has_terms:
            raise ValueError(
                f"tokens: {type(self._towers[1].model).__name__} scores a caption as a whole, and no token has a share "
                "of its own in that; leave tokens out, or explain a model of late interaction, such as ColPali."
            )

    def _split(self, additional: tuple[Any, ...]) -> tuple[tuple[Any, ...], Tensor | None]:
        """What the towers read, and which tokens of the query count."""
        taken = len(self._slots) - 2
        if not self.has_terms or len(additional) != taken + 1:
            return additional, None
        return additional[:taken], additional[taken]

    @property
    def score_name(self) -> str:
        """What the score is called."""
        score = self._family.score
        return "cosine similarity" if score is None else getattr(score, "name", "score")

    def _outputs(self, first: Tensor, second: Tensor, additional: tuple[Any, ...]) -> list[Any]:
        given = dict(zip(self._slots[2:], additional, strict=False))
        beyond = additional[len(self._slots) - 2 :]
        if beyond and self.sides[1].named:
            known = ", ".join(self.argument_names[2:])
            raise ValueError(
                f"additional_forward_args: expected at most {len(self._slots) - 2} ({known}), got {len(additional)}; "
                "leave out what the model does not read."
            )
        outputs = []
        for index, (tower, inputs) in enumerate(zip(self._towers, (first, second), strict=True)):
            tower.check_configuration()
            extras = [given.get((index, name)) for name in tower.side.arguments[1:]]
            while extras and extras[-1] is None:
                extras.pop()
            outputs.append(tower(inputs, *extras, *(beyond if index else ())))
        return outputs

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

    @property
    def argument_names(self) -> tuple[str, ...]:
        """What :meth:`forward` reads, in its order; first the two inputs, then attention masks, then what else there
        is.
        """
        return tuple(name for _, name in self._slots)

    def _derived_layout(self, index: int) -> Layout | None:
        side = self.sides[index]
        positions = {name: at for at, (owner, name) in enumerate(self._slots) if owner == index}
        layout = derive_layout(side, self.tower_of(index), positions)
        if isinstance(layout, TextLayout) and layout.reads_padding and self.processor is not None:
            # Configurations of SigLIP 2 name another id than the one that its tokenizer pads with.
            pad = padding_of(self.processor)
            return layout if pad is None else replace(layout, pad_token_id=pad, source="the tokenizer")
        return layout

    @property
    def layouts(self) -> tuple[Layout | None, ...]:
        """Layouts of the towers, as given, or derived from their modules and configuration."""
        return self._layouts

    def layout_of(self, layer: nn.Module, modality: int | None = None) -> Layout | None:
        r"""The layout that holds in one layer: its tower's, with what is particular to the layer.

        Args:

            layer (nn.Module): A layer of this encoder.
            modality (int, optional): Which tower it is taken for. Default: None (see :meth:`owner`)

        Returns:
            Layout or None: None where it cannot be derived.
        """
        modality = self.owner(layer) if modality is None else modality
        layout = self.layouts[modality]
        # Only where padding is read does it matter what embeds it, for which the tower is run.
        reads = isinstance(layout, TextLayout) and layout.reads_padding
        return refine(layout, self.tower_of(modality), layer, self.embeddings_of(modality) if reads else None)

    def layout_at(self, layer: Layer, modality: int) -> Layout | None:
        r"""The layout where an input is explained: in a layer, or at the input itself.

        Args:

            layer (Layer): A resolved layer, or the entry of an input.
            modality (int): Position of the input.

        Returns:
            Layout or None: None where it cannot be derived.
        """
        return self.layouts[modality] if layer.argument is not None else self.layout_of(layer.module, modality)

    @property
    def device(self) -> torch.device:
        """Where the model computes: where its parameters are, or where they are brought for each call."""
        return device_of(self)

    def roots(self) -> tuple[nn.Module, ...]:
        r"""Where names of layers start.

        Returns:
            tuple[nn.Module, ...]: the wrapped model, this module, and what the model was wrapped in when it was given.
        """
        wrapped = (root for root in self.__dict__["_wrapped"] if isinstance(root, nn.Module))
        return (self.model, self, *wrapped) if "model" in self._modules else (self,)

    def owner(self, layer: nn.Module) -> int:
        r"""Which tower a layer belongs to.

        Args:

            layer (nn.Module): A layer of this encoder.

        Returns:
            int: 0 for the first tower, 1 for the second; 0 if both use it.
        """
        sides = [self.tower_of(index) for index in (0, 1)]
        inside = [any(module is layer for module in side.modules()) for side in sides]
        # A tower that is not kept apart from the whole model owns what no other tower does.
        whole = [side is self._modules.get("model") for side in sides]
        return int(inside[1] and (not inside[0] or (whole[0] and not whole[1])))

    def recommended_layers(self) -> tuple[LayerLike | None, LayerLike | None]:
        r"""Where gates measured best: at a picture itself, and at a text tower's embeddings.

        There, information cannot go round the gates. From the first block on, the pooled position of a text tower
        already holds what the score needs. Videos, sounds and pictures that come as a sequence of patches are taken
        at the first block of their tower, or, where its grid becomes coarser from stage to stage, at the end of the
        last stage but one. One tower for both inputs is reached twice: the layers name the calls.

        Returns:
            tuple: Per input None for the input itself, a module, or (module, index of the call) where one tower serves
            both inputs.

        Raises:
            ValueError: if the towers have no such layers under a known name.
        """
        return self.told_apart([self._recommended(index) for index in (0, 1)])

    def published_layers(self) -> tuple[LayerLike, LayerLike]:
        r"""The layers of the M2IB paper: the output of the block at three quarters of each tower's depth.

        Returns:
            tuple: Two layers, as for :meth:`recommended_layers`.

        Raises:
            ValueError: if a tower has no list of blocks.
        """
        found = []
        for index in (0, 1):
            blocks = [block for stage in self.stages(index) for block in stage]
            found.append(blocks[_three_quarters(len(blocks))])
        return self.told_apart(found)

    def statistics_of(self, layer: LayerLike | None) -> ChannelStatistics | None:
        r"""What is known of a layer's channels without seeing data: shipped statistics, or the vocabulary's.

        Args:

            layer (nn.Module, str or tuple): A layer of this encoder: a module, its dotted name, or a pair of either
                and the index of a call. None for an input itself, of which nothing is known.

        Returns:
            ChannelStatistics or None: as shipped with the checkpoint; for the embeddings of a text tower those of
            every token of the vocabulary; else None.
        """
        if layer is None:
            return None
        wanted = resolve_for(self, layer).module
        for root in self.roots():
            for name, module in root.named_modules():
                if module is wanted and name in self.statistics:
                    return self.statistics[name]
        embeds = any(wanted is self.embeddings_of(index) for index in (0, 1) if self.reads_tokens(index))
        return vocabulary_statistics(wanted) if embeds else None

    def prepare(self, images: Media, captions: str | Sequence[str]) -> Pairs:
        r"""Turn pictures, sounds or videos and captions into model inputs with the model's own processor.

        Args:

            images (pictures, sounds or videos): What the model compares with captions, one or several.
                Pictures: paths, PIL images or uint8 arrays (H, W, 3), in a list, a column of a table or anything else
                that can be gone through. Sounds: paths of WAV files, :class:`Sound` objects or mappings with ``array``
                and ``sampling_rate``. Videos: lists of pictures, uint8 arrays (frames, H, W, 3), folders, GIF files or
                :class:`Video` objects. A single one is paired with every caption.
            captions (str or sequence of str): A single caption is paired with every picture, sound or video.

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
            captions,
            getattr(config_of(self.tower_of(1), "text_config"), "max_position_embeddings", None),
            self.sides[1].padding,
            next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32),
            kinds[0],
            getattr(config_of(self.tower_of(0), "vision_config"), "num_frames", None),
        )
        return pairs.to(self.device)

    def real_tokens(self, pairs: Pairs) -> Tensor:
        r"""Which tokens of each pair are real; the rest is padding, before them or after.

        Args:

            pairs (Pairs): As :meth:`prepare` returns them.

        Returns:
            Tensor: Boolean, (N, L), on the CPU.
        """
        layout, arguments = self.layouts[1], (*pairs.inputs, *pairs.additional_forward_args)
        real = real_tokens(layout, pairs.inputs[1], arguments) if isinstance(layout, TextLayout) else None
        return torch.ones(pairs.inputs[1].shape[:2], dtype=torch.bool) if real is None else real.cpu()

    def tower_of(self, index: int) -> nn.Module:
        r"""The module that holds one tower's layers.

        Args:

            index (int): 0 for the first tower, 1 for the second.

        Returns:
            nn.Module: the tower.
        """
        if "model" not in self._modules:
            return (self.image_tower, self.text_tower)[index]
        return self.sides[index].tower(self.model)

    def embeddings_of(self, index: int) -> nn.Module | None:
        r"""The module that embeds a tower's tokens, with their positions where it adds them.

        A text tower is run once on two made-up captions: what embeds them is found by what it does, so that adapters
        and replaced tables are seen as the tower reads them.

        Args:

            index (int): 0 for the first tower, 1 for the second.

        Returns:
            nn.Module or None: None if there is none.
        """
        return self._token_modules(index).embeddings

    def token_table_of(self, index: int) -> nn.Module | None:
        r"""The part of a tower's embeddings that knows no positions: from token ids to rows.

        Args:

            index (int): 0 for the first tower, 1 for the second.

        Returns:
            nn.Module or None: None if there is none.
        """
        return self._token_modules(index).table

    def _token_modules(self, index: int) -> TokenModules:
        tower = self.tower_of(index)
        # Adapters may have been put into the tower since.
        modules, known = list(tower.modules()), self.__dict__["_tokens"].get(index)
        if known is None or known[0] != modules:
            call = self._towers[index] if self.reads_tokens(index) else None
            known = modules, find_token_modules(tower, call)
            self.__dict__["_tokens"][index] = known
        found: TokenModules = known[1]
        return found

    def stages(self, index: int) -> list[list[nn.Module]]:
        r"""The blocks of one tower, stage by stage; a tower of one resolution has one stage.

        Args:

            index (int): 0 for the first tower, 1 for the second.

        Returns:
            list[list[nn.Module]]: Per stage its blocks, from input to output.

        Raises:
            ValueError: if the tower has no list of blocks under a known name.
        """
        tower, kind = self.tower_of(index), self.sides[index].modality
        found = stages_of(tower)
        if not found:
            raise ValueError(
                f"layers: found no list of blocks in the {kind} tower {type(tower).__name__}; name the layers, e.g. "
                "MultiModalInfoBottleneck(encoder, layers=(image_layer, text_layer))."
            )
        return found

    def gates_input(self, index: int) -> bool:
        r"""Whether an input is best explained at itself: a picture that its tower cuts into patches.

        Args:

            index (int): Position of the input.

        Returns:
            bool: False for captions, sounds, videos, and pictures that come as a sequence of patches.
        """
        layout = self.layouts[index]
        is_grid = isinstance(layout, PatchLayout) and len(layout.patch_size) == 2
        return is_grid and self.sides[index].modality == "image"

    def reads_tokens(self, index: int) -> bool:
        r"""Whether an input is token ids: captions, and sounds that come as codes.

        Args:

            index (int): Position of the input.

        Returns:
            bool: False for pictures, videos, and sounds as waves or spectrograms.
        """
        return self.sides[index].modality == "text" or isinstance(self.layouts[index], TextLayout)

    def _recommended(self, index: int) -> nn.Module | None:
        if self.gates_input(index):
            return None
        tower = self.tower_of(index)
        if not self.reads_tokens(index):
            stages = self.stages(index)
            return stages[0][0] if len(stages) == 1 else stages[-2][-1]
        found = self.embeddings_of(index)
        if found is None:
            raise ValueError(
                f"layers: found no table of tokens in the text tower {type(tower).__name__}; name the layers, e.g. "
                "MultiModalInfoBottleneck(encoder, layers=(image_layer, text_layer))."
            )
        return found

    @overload
    def told_apart(self, layers: Sequence[nn.Module]) -> tuple[LayerLike, LayerLike]: ...

    @overload
    def told_apart(self, layers: Sequence[nn.Module | None]) -> tuple[LayerLike | None, LayerLike | None]: ...

    def told_apart(self, layers: Sequence[nn.Module | None]) -> tuple[LayerLike | None, LayerLike | None]:
        r"""Name the calls where one module serves both towers.

        Args:

            layers (sequence of nn.Module or None): The layer of the first tower and the layer of the second; None for
                an input itself.

        Returns:
            tuple: The layers, each that both sides run as (module, index of the side).
        """
        first, second = layers
        is_one = first is second and first is not None
        told = [
            (layer, i) if layer is not None and (is_one or self._runs_twice(layer)) else layer
            for i, layer in enumerate(layers)
        ]
        return told[0], told[1]

    def _runs_twice(self, layer: nn.Module) -> bool:
        """Whether each side runs a layer once."""
        if not self._family.is_shared:
            return False
        return any(layer is module for module in self._family.sides[1].tower(self.model).modules())


def is_dual_encoder(model: Any) -> bool:
    """Whether a model offers both towers under names that are known."""
    return family_of(model) is not None


def _known_family(model: nn.Module) -> Family:
    family = family_of(model)
    if family is None:
        raise TypeError(f"model: {no_towers(model)}")
    return family


def _chosen_sides(family: Family, modalities: tuple[str, str] | None, owner: nn.Module) -> tuple[Side, Side]:
    kinds = tuple(modalities) if modalities is not None else tuple(side.modality for side in family.sides[:2])
    found = [side for side in map(family.side, kinds, kinds[::-1]) if side is not None]
    if len(kinds) != 2 or len(found) != 2:
        offered = ", ".join(sorted({side.modality for side in family.sides}))
        raise ValueError(
            f"modalities: expected two of what {type(owner).__name__} reads ({offered}), got {modalities!r}."
        )
    if family.score is not None and found[0] is found[1]:
        compared = " with ".join(side.modality for side in family.sides)
        raise ValueError(
            f"modalities: the score of {type(owner).__name__} compares {compared}, got {modalities!r}; pass two of "
            "these, in either order."
        )
    return found[0], found[1]


def _slots(sides: tuple[Side, Side]) -> list[tuple[int, str]]:
    """What forward reads, in its order: of which side, and under which name."""
    extras = [(index, name) for index, side in enumerate(sides) for name in side.arguments[1:]]
    masks = [slot for slot in extras if slot[1] == "attention_mask"]
    inputs = [(index, side.arguments[0]) for index, side in enumerate(sides)]
    return [*inputs, *masks, *(slot for slot in extras if slot not in masks)]


def _three_quarters(depth: int) -> int:
    # After the last block only the pooled position reaches the score: gates of the others would mean nothing.
    return max(min(3 * depth // 4, depth - 2), 0)
