"""What a tower's modules tell of it: its layout, its blocks.

Everything is read from names and sizes that model libraries share, so a new tower usually needs nothing here; what is
particular to one kind is one line of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from captum_m2ib.engine.layouts import HALVINGS, Layout, PackedLayout, PatchLayout, TextLayout

_CLASS_TOKENS = ("class_embedding", "cls_token", "class_token", "dist_token", "distillation_token")
_REGISTERS = ("register_tokens", "reg_token", "registers")

# Where hierarchical towers keep the blocks of each stage; a star stands for every child.
_STAGES = (
    "encoder.stages.*.layers",
    "encoder.layers.*.blocks",
    "audio_encoder.layers.*.blocks",
    "stages.*.blocks",
    "layers.*.blocks",
    "layer1 layer2 layer3 layer4",
)

# Towers whose later stages hold no patches, by the model_type of their configuration.
_PATCH_STAGES = {"groupvit_vision_model": "encoder.stages.0.layers"}

# Tokens that a tower of this kind keeps after its patches, by the model_type of its configuration.
_SUFFIXES: dict[str, Callable[[Any], int]] = {
    "groupvit_vision_model": lambda config: config.num_group_tokens[0],
    "xclip_vision_model": lambda config: 1,
}

# Text towers in which no token sees what follows it, so that nothing after the end token matters.
_CAUSAL = ("clip", "metaclip_2", "groupvit", "owlvit", "owlv2", "xclip", "aimv2")
_READS_PADDING = ("siglip", "clvp")

# Parts of video towers that see the frames of each patch, by name.
_OVER_TIME = ("temporal_embeddings", "temporal_layers")


def config_of(tower: nn.Module, part: str) -> Any:
    """The tower's own configuration, also where the tower is a whole model whose configuration has parts."""
    config = getattr(tower, "config", None)
    return getattr(config, part, config)


def image_layout(tower: nn.Module) -> PatchLayout:
    """The layout of a tower that reads pictures, (N, C, H, W)."""
    config = config_of(tower, "vision_config")
    patch = _patch_size(tower, config)
    hierarchical = len(stages_of(tower)) > 1
    window = getattr(config, "window_size", None) or _first_attribute(tower, "window_size")
    suffix = _SUFFIXES.get(getattr(config, "model_type", None) or "", lambda _: 0)(config)
    if patch is None:
        return PatchLayout((1, 1), _prefix(tower, None), suffix, coarser=HALVINGS)
    coarser = HALVINGS[:5] if hierarchical and not suffix else (1,)
    return PatchLayout(
        patch, _prefix(tower, _native_grid(config, tower, patch)), suffix, coarser=coarser, window=_side(window)
    )


def video_layout(tower: nn.Module, mask: int | None) -> PatchLayout:
    """The layout of a tower that reads videos, (N, frames, C, H, W), frame by frame or in tubes."""
    layout = image_layout(tower)
    frames, *_ = getattr(config_of(tower, "vision_config"), "tubelet_size", (1,))
    return replace(layout, patch_size=(frames, *layout.patch_size), axes=(1, 3, 4), mask_argument=mask)


def packed_layout(tower: nn.Module, mask: int | None, shapes: int, config: Any) -> PackedLayout:
    """The layout of a tower that reads pictures as sequences of patches, (N, patches, values)."""
    patch, merge = _patch_size(tower, config), getattr(config, "spatial_merge_size", None) or 1
    return PackedLayout(mask, shapes, _prefix(tower, None), patch or (1, 1), merge, drops_padding=mask is None)


def sound_layout(tower: nn.Module, mask: int | None) -> PatchLayout | None:
    """The layout of a tower that reads spectrograms, (N, C, time, frequency), or waves, (N, C, samples)."""
    config = config_of(tower, "audio_config")
    codec = getattr(config, "dac_config", None)
    if codec is not None:
        return PatchLayout((codec.hop_length,), _prefix(tower, None), mask_argument=mask)
    return _folded_layout(config) if hasattr(config, "spec_size") else None


def _folded_layout(config: Any) -> PatchLayout:
    """The layout of HTS-AT, which folds a spectrogram into a square picture."""
    bins = config.num_mel_bins
    fold = config.spec_size // bins
    size = (config.spec_size * fold, bins)
    patch = _pair(config.patch_size)
    return PatchLayout(patch, coarser=HALVINGS[:4], size=size, fold=fold, window=_side(config.window_size))


def text_layout(tower: nn.Module, mask: int | None) -> TextLayout:
    """The layout of a text tower whose attention mask is the argument at ``mask``."""
    return replace(_told_layout(tower, mask), source="the model's configuration")


def _told_layout(tower: nn.Module, mask: int | None) -> TextLayout:
    """What the tower and its configuration say of the ends of captions."""
    config = config_of(tower, "text_config")
    suffix = int(_has_parameter(tower, ("cls_emb",)))
    kind = str(getattr(config, "model_type", ""))
    end, pad = getattr(config, "eos_token_id", None), getattr(config, "pad_token_id", None)
    pooling = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)
    if kind.startswith(_READS_PADDING) or pooling == "last":
        pad = getattr(tower, "pad_id", pad)
        return TextLayout(mask, pad_token_id=1 if pad is None else pad, reads_padding=True, suffix=suffix)
    if suffix:
        return TextLayout(mask, pad_token_id=getattr(tower, "pad_id", 0), suffix=suffix)
    # Old configurations of CLIP hold a wrong id, 2, by which transformers knows to pool at the highest id.
    legacy = end == 2 and kind.startswith(("clip", "groupvit", "xclip"))
    if pooling == "argmax" or legacy or _is_first_clip(tower):
        return TextLayout(mask, ends_at_highest=True)
    if pooling == "eos":
        return TextLayout(mask, end_token_id=getattr(tower, "text_eos_id", None) or getattr(tower, "eos_id", None))
    if kind.startswith(_CAUSAL) or not kind:
        return TextLayout(mask, end_token_id=end if isinstance(end, int) else None)
    return TextLayout(mask, pad_token_id=pad if mask is None else None)


def refine(layout: Layout | None, tower: nn.Module, layer: nn.Module, embeddings: nn.Module | None) -> Layout | None:
    """A tower's layout as it holds in one of its layers; ``embeddings`` is what embeds its tokens."""
    if isinstance(layout, TextLayout) and layout.reads_padding:
        inside = embeddings is not None and any(layer is module for module in embeddings.modules())
        # A mask keeps words from reading padding, but the pooled last position may be padding that reads words.
        return layout if inside else replace(layout, pad_token_id=None, mask_argument=None, source=None)
    if isinstance(layout, PatchLayout) and len(layout.patch_size) == 3:
        return _over_time(layout, tower, layer)
    if isinstance(layout, PatchLayout) and layout.window is not None:
        owners = [m for m in tower.modules() if hasattr(m, "shift_size") and any(layer is c for c in m.modules())]
        shifts = [_side(owner.shift_size) or 0 for owner in owners]
        return replace(layout, shift=shifts[-1]) if shifts else layout
    return layout


def _over_time(layout: PatchLayout, tower: nn.Module, layer: nn.Module) -> PatchLayout:
    """A video's layout in a layer that sees the frames of each patch, or whole frames behind what reads each one."""
    parts: list[str] = next((name.split(".") for name, module in tower.named_modules() if module is layer), [])
    reader = _trunk(tower)
    if reader is not tower and parts and not any(module is layer for module in reader.modules()):
        own = sum(name.split(".")[-1] in _CLASS_TOKENS for name, _ in tower.named_parameters())
        inside = sum(name.split(".")[-1] in _CLASS_TOKENS for name, _ in reader.named_parameters())
        return replace(layout, whole_frames=True, prefix=own - inside)
    return replace(layout, frames_last=any(part in _OVER_TIME for part in parts))


def stages_of(tower: nn.Module) -> list[list[nn.Module]]:
    """The tower's blocks, stage by stage; a tower of one resolution has one stage. Empty if there are none."""
    trunk = _trunk(tower)
    only = _PATCH_STAGES.get(getattr(config_of(tower, "vision_config"), "model_type", None) or "")
    for pattern in (only,) if only else _STAGES:
        stages = [list(stage.children()) for part in pattern.split() for stage in _matching(trunk, part)]
        if len(stages) > 1 or only:
            return stages
    blocks = max(_lists_of_blocks(trunk), key=len, default=[])
    return _split_at_strides(blocks)


def embeds_text(tower: nn.Module) -> bool:
    """Whether the tower has a table of tokens."""
    return any(True for _ in token_tables(tower.named_modules()))


def token_tables(named: Any) -> Iterator[tuple[str, nn.Embedding]]:
    """Of named modules those that turn token ids into rows, not positions or segments."""
    for name, module in named:
        if isinstance(module, nn.Embedding) and not any(word in name for word in ("position", "type", "relative")):
            yield name, module


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where a hook that loads them for each call brings them."""
    for one in module.modules():
        hook = getattr(one, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next((one.device for one in module.parameters() if not one.is_meta), torch.device("cpu"))


def _trunk(tower: nn.Module) -> nn.Module:
    """What holds the blocks: towers wrap those of timm and transformers, and open_clip keeps its own under a name."""
    for path in ("trunk", "transformer", "embedder.vision_model.timm_model"):
        found = _matching(tower, path)
        if found:
            return found[0]
    return tower


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[-2], value[-1])


def _side(value: Any) -> int | None:
    return None if value is None else _pair(value)[0]


def _first_attribute(tower: nn.Module, name: str) -> Any:
    return next((getattr(m, name) for m in tower.modules() if isinstance(getattr(m, name, None), (int, tuple))), None)


def _patch_size(tower: nn.Module, config: Any) -> tuple[int, int] | None:
    trunk = _trunk(tower)
    for owner in (config, tower, trunk, getattr(trunk, "patch_embed", None)):
        stated = getattr(owner, "patch_size", None) or getattr(owner, "tubelet_size", None)
        if isinstance(stated, (int, tuple, list)):
            return _pair(stated)
    first = next((module for module in tower.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.kernel_size == first.stride and min(first.stride) > 1:
        return _pair(first.stride)
    return None


def _native_grid(config: Any, tower: nn.Module, patch: tuple[int, int]) -> int | None:
    """How many patches the picture has for which the tower stores positions."""
    size = getattr(config, "image_size", None) or getattr(tower, "image_size", None)
    return None if size is None else (_pair(size)[0] // patch[0]) * (_pair(size)[1] // patch[1])


def _prefix(tower: nn.Module, patches: int | None) -> int:
    stated = getattr(_trunk(tower), "num_prefix_tokens", None)
    if isinstance(stated, int):
        return stated
    registers = sum(p.shape[-2] for name, p in _own_tokens(tower, _REGISTERS))
    classes = len(list(_own_tokens(tower, _CLASS_TOKENS)))
    if classes or patches is None:
        # Attention pooling of maps puts their mean before the positions.
        return classes + registers + int(hasattr(tower, "attnpool"))
    tables = (m.num_embeddings for n, m in tower.named_modules() if isinstance(m, nn.Embedding) and "position" in n)
    rows = (p.shape[-2] for n, p in tower.named_parameters() if "pos" in n and p.ndim in (2, 3) and "head" not in n)
    stored = next(tables, None) or next(rows, 0)
    return max(stored - patches, 0) + registers


def _own_tokens(tower: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Tokens that travel through the tower; a pooling head's query does not."""
    for name, parameter in tower.named_parameters():
        *path, last = name.split(".")
        if last in names and not any("head" in part or "pool" in part for part in path):
            yield name, parameter


def _has_parameter(tower: nn.Module, names: Sequence[str]) -> bool:
    return any(name.split(".")[-1] in names for name, _ in tower.named_parameters())


def _is_first_clip(tower: nn.Module) -> bool:
    return all(hasattr(tower, name) for name in ("token_embedding", "positional_embedding", "ln_final", "encode_text"))


def _matching(root: nn.Module, pattern: str) -> list[nn.Module]:
    found = [root]
    for part in pattern.split("."):
        if part == "*":
            found = [child for module in found for child in module.children()]
        else:
            found = [getattr(module, part) for module in found if isinstance(getattr(module, part, None), nn.Module)]
    return found


def _lists_of_blocks(tower: nn.Module) -> list[list[nn.Module]]:
    lists = [m for m in tower.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)]
    alike = [list(m) for m in lists if len({type(child) for child in m}) == 1 or isinstance(m, nn.ModuleList)]
    return [blocks for blocks in alike if any(True for _ in blocks[0].children())]


def _split_at_strides(blocks: list[nn.Module]) -> list[list[nn.Module]]:
    """Blocks of a flat convolutional tower, cut where their grid becomes coarser."""
    stages: list[list[nn.Module]] = []
    for block in blocks:
        strided = any(isinstance(m, nn.Conv2d) and max(m.stride) > 1 for m in block.modules())
        if strided or not stages:
            stages.append([])
        stages[-1].append(block)
    return stages
