"""Two sides of one model, or two towers: their calls, layouts, and the layers worth explaining at."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from captum_m2ib.encoders.calls import TowerCall, as_called
from captum_m2ib.encoders.families import derive_layout, family_of
from captum_m2ib.encoders.pairs import Pairs, padding_of
from captum_m2ib.encoders.processors import as_processor
from captum_m2ib.encoders.sides import Family, Side
from captum_m2ib.encoders.tables import TokenModules, find_token_modules, vocabulary_statistics
from captum_m2ib.encoders.token_rows import TokenRows
from captum_m2ib.encoders.towers import device_of, refine, stages_of, token_tables
from captum_m2ib.encoders.wrappers import no_towers, processor_in, unwrap
from captum_m2ib.engine.layers import Layer, LayerLike, resolve_for
from captum_m2ib.engine.layouts import Layout, PatchLayout, TextLayout
from captum_m2ib.engine.real_units import real_tokens
from captum_m2ib.engine.statistics import ChannelStatistics

_OWN = {
    "text": Side("text", "", ("input_ids", "attention_mask"), (), named=False),
    **{
        name: Side(name, "", (argument,), (), named=False)
        for name, argument in (("image", "pixel_values"), ("video", "pixel_values"), ("audio", "input_features"))
    },
}


# Under which names one model, or two towers, are registered.
_NAMES = {1: ("model",), 2: ("image_tower", "text_tower")}


class TowerPair(nn.Module):
    """What the two inputs of a dual encoder are read by, whatever becomes of the outputs."""

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

    @property
    def score_name(self) -> str:
        """What the score is called."""
        score = self._family.score
        return "cosine similarity" if score is None else getattr(score, "name", "score")

    def _outputs(self, first: Tensor, second: Tensor, additional: tuple[Any, ...]) -> list[Any]:
        return [self._output(index, inputs, additional) for index, inputs in enumerate((first, second))]

    def _output(self, index: int, inputs: Tensor, additional: tuple[Any, ...]) -> Any:
        given = dict(zip(self._slots[2:], additional, strict=False))
        beyond = additional[len(self._slots) - 2 :]
        if beyond and self.sides[1].named:
            known = ", ".join(self.argument_names[2:])
            raise ValueError(
                f"additional_forward_args: expected at most {len(self._slots) - 2} ({known}), got {len(additional)}; "
                "leave out what the model does not read."
            )
        tower = self._towers[index]
        tower.check_configuration()
        extras = [given.get((index, name)) for name in tower.side.arguments[1:]]
        while extras and extras[-1] is None:
            extras.pop()
        return tower(inputs, *extras, *(beyond if index else ()))

    @property
    def argument_names(self) -> tuple[str, ...]:
        """What :meth:`forward` reads, in its order; first the two inputs, then attention masks, then what else there
        is.
        """
        return tuple(name for _, name in self._slots)

    def _derived_layout(self, index: int) -> Layout | None:
        side = self.sides[index]
        positions = {name: at for at, (owner, name) in enumerate(self._slots) if owner == index}
        layout = derive_layout(side, self._towers[index].model, positions)
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
        self._refuse_one_of_several(layer, modality)
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
        held = [(side, self._embedder_of(index)) for index, side in enumerate(sides)]
        inside = [any(module is layer for part in parts for module in part.modules()) for parts in held]
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

    def _embedder_of(self, index: int) -> nn.Module:
        return self.sides[index].embedder(self._towers[index].model)

    def _token_modules(self, index: int) -> TokenModules:
        tower = self._embedder_of(index)
        # Adapters may have been put into the tower since.
        modules, known = list(tower.modules()), self.__dict__["_tokens"].get(index)
        if known is None or known[0] != modules:
            call = self._towers[index]
            call.__dict__["rows"] = None
            found = find_token_modules(tower, call if self.reads_tokens(index) else None)
            if found.embeddings is not None and found.further:
                rows = TokenRows([found.embeddings, *found.further])
                found = found._replace(embeddings=rows, table=rows if found.table is found.embeddings else found.table)
                call.__dict__["rows"] = rows
            if not found.are_all:
                warnings.warn(
                    f"model: {type(tower).__name__} reads which token is where outside of the modules that embed them, "
                    "such as by torch.nn.functional.embedding; what it reads there goes round gates, and no bits of "
                    "the caption count it. Make that table an nn.Embedding of the tower, and it is found.",
                    UserWarning,
                    stacklevel=2,
                )
            known = modules, found
            self.__dict__["_tokens"][index] = known
        tokens: TokenModules = known[1]
        return tokens

    def _refuse_one_of_several(self, layer: nn.Module, index: int) -> None:
        """Raise where ids enter other tables beside a layer, and so go round gates at it."""
        holds_table = any(True for _ in token_tables(("", module) for module in layer.modules()))
        if not holds_table or not self.reads_tokens(index):
            return
        found = self.embeddings_of(index)
        if isinstance(found, TokenRows) and any(layer is one for table in found.tables for one in table.modules()):
            names = {module: name for name, module in self.roots()[0].named_modules()}
            all_of_them = " and ".join(names.get(table, type(table).__name__) for table in found.tables)
            raise ValueError(
                f"layers: the token ids enter {all_of_them}, so that the caption would go round gates at one of them; "
                f"leave layers out, or pass encoder.embeddings_of({index}), which is all of them as one layer."
            )

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
        found = [[tower]] if self.sides[index].is_stem else stages_of(tower)
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
        unshared = self._family.unshared
        named = self._family.sides[1].tower(self.model).named_modules()
        return any(layer is module and not (unshared and re.match(unshared, name)) for name, module in named)


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
