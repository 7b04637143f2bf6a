"""Tiny random dual encoders of every shape that the library promises to explain, in one list.

A new kind of model joins every contract by one more entry in ``FAMILIES``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import zoo
from copies import copier
from torch import Tensor, nn

from captum_m2ib import DualEncoder, LayerMultiModalInfoBottleneck, MultiModalInfoBottleneck, PatchLayout, TextLayout

TOKENS = 6
PAIRS = 3


@dataclass
class Case:
    """One model with a batch of pairs, and where it may be explained."""

    forward: Any
    inputs: tuple[Tensor, ...]
    additional: tuple[Any, ...]
    layers: tuple[list[Any], ...]
    roots: list[nn.Module]
    layouts: Sequence[Any] | None = None
    batch_dim: int = 0
    training: bool = False

    def method(self, choice: int = 0, **options: Any) -> MultiModalInfoBottleneck:
        chosen = [choices[min(choice, len(choices) - 1)] for choices in self.layers]
        return MultiModalInfoBottleneck(self.forward, chosen, self.layouts, **options)

    def layer_method(self, modality: int = 0, choice: int = 0) -> LayerMultiModalInfoBottleneck:
        return LayerMultiModalInfoBottleneck(self.forward, self.layers[modality][choice])

    def attribute(self, method: Any = None, **settings: Any) -> Any:
        """Few steps and draws; a model in training mode is explained with a warning."""
        settings = {"n_steps": 2, "n_samples": 3, **settings}
        method = method or self.method()
        # Filters of warnings are global, so they are left alone where threads may run.
        with warnings.catch_warnings() if self.training else contextlib.nullcontext():
            if self.training:
                warnings.filterwarnings("ignore", "forward_func: the model is in training mode")
            return method.attribute(self.inputs, additional_forward_args=self.additional or None, **settings)

    def select(self, rows: Any) -> Case:
        """The same model with some of the pairs."""

        def pick(argument: Any) -> Any:
            return argument[rows] if isinstance(argument, Tensor) else argument

        return self.with_inputs(tuple(map(pick, self.inputs)), tuple(map(pick, self.additional)))

    def with_inputs(self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...]) -> Case:
        changed = copy.copy(self)
        changed.inputs, changed.additional = inputs, additional
        return changed

    def double(self) -> Case:
        """The same model, in place, in float64."""
        for root in self.roots:
            root.double()

        def cast(argument: Any) -> Any:
            is_float = isinstance(argument, Tensor) and argument.is_floating_point()
            return argument.double() if is_float else argument

        return self.with_inputs(tuple(map(cast, self.inputs)), tuple(map(cast, self.additional)))


@dataclass(frozen=True)
class Family:
    name: str
    build: Callable[[], Case]
    features: frozenset[str] = field(default=frozenset())


class Patches(nn.Module):
    """A picture's patches as tokens, after one class token."""

    def __init__(self, width: int, patch: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(torch.randn(width))

    def forward(self, pictures: Tensor) -> Tensor:
        tokens = self.conv(pictures).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(tokens), 1, -1), tokens], 1)


class Rotary(nn.Module):
    """Cosines and sines of the usual rotary embedding: the second half of the channels repeats the first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequency", 10.0 ** -torch.linspace(0, 1, width // 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.frequency.to(x.dtype)
        angles = torch.cat([angles, angles], -1)[None]
        return angles.cos(), angles.sin()


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, rotation: Any = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if rotation is not None:
            q, k = (t * rotation[0] + t.roll(t.shape[-1] // 2, -1) * rotation[1] for t in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None].bool()))


class Opaque:
    """An output that hides its tensor."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Block(nn.Module):
    """A residual block that returns its hidden state in some form."""

    def __init__(self, width: int, form: str = "tensor", sequence_first: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.form, self.sequence_first = form, sequence_first
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Any, mask: Tensor | None = None, rotation: Any = None) -> Any:
        x = unpack(hidden_states)
        seen = self.norm1(x).transpose(0, 1) if self.sequence_first else self.norm1(x)
        mixed = self.attention(seen, mask=mask, rotation=rotation)
        x = x + self.dropout(mixed.transpose(0, 1) if self.sequence_first else mixed)
        return pack(x + self.dropout(self.mlp(self.norm2(x))), self.form)


def pack(x: Tensor, form: str) -> Any:
    """A hidden state as blocks of one form return it."""
    if form == "tuple":
        return (x, None)
    if form == "dict":
        return {"flag": True, "hidden_states": x}
    if form == "output":
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=x)
    return Opaque(x) if form == "opaque" else x


def unpack(output: Any) -> Tensor:
    """The hidden state out of what a block returns."""
    if isinstance(output, tuple):
        return output[0]
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state
    if isinstance(output, dict):
        return output["hidden_states"]
    return output.hidden if isinstance(output, Opaque) else output


class Tower(nn.Module):
    """Embedding, positions, blocks, mean over real tokens, head."""

    def __init__(
        self,
        embed: nn.Module,
        tokens: int,
        width: int = 16,
        depth: int = 3,
        in_place: bool = False,
        keywords: bool = False,
        rotary: bool = False,
        **block: Any,
    ) -> None:
        super().__init__()
        self.embed = embed
        self.position = nn.Parameter(torch.randn(tokens, width) / 2)
        self.rotary = Rotary(width) if rotary else None
        self.blocks = nn.ModuleList(Block(width, **block) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 8)
        self.in_place, self.keywords = in_place, keywords
        self.sequence_first = block.get("sequence_first", False)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(inputs)
        if self.in_place:
            x += self.position[: x.shape[1]]
        else:
            x = x + self.position[: x.shape[1]]
        rotation = None if self.rotary is None else self.rotary(x)
        x = x.transpose(0, 1) if self.sequence_first else x
        for block in self.blocks:
            x = block(hidden_states=x, mask=mask, rotation=rotation) if self.keywords else block(x, mask, rotation)
        x = unpack(x)
        x = self.norm(x.transpose(0, 1) if self.sequence_first else x)
        if mask is None:
            return self.head(x.mean(1))
        weight = mask.to(x.dtype)[..., None]
        return self.head((x * weight).sum(1) / weight.sum(1))


class ConvTower(nn.Module):
    """Feature maps, (N, C, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 8)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.body(self.stem(pictures)).mean((2, 3)))


class EncoderTower(nn.Module):
    """torch's own encoder, which has a fused path for inference."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(16, 8)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        padding = None if mask is None else mask == 0
        x = self.encoder(self.embed(inputs), src_key_padding_mask=padding)
        return self.head(x[:, 0])


def pictures(height: int = 32, width: int = 32, pairs: int = PAIRS) -> Tensor:
    return torch.randn(pairs, 3, height, width, generator=torch.Generator().manual_seed(1))


def captions(end: int = 63, pairs: int = PAIRS) -> tuple[Tensor, Tensor]:
    """Token ids and mask: the second caption is two tokens shorter."""
    ids = torch.randint(3, 60, (pairs, TOKENS), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(pairs, TOKENS, dtype=torch.long)
    ids[:, 0], ids[:, -1] = 62, end
    if pairs > 1:
        ids[1, -3], ids[1, -2:], mask[1, -2:] = end, 1, 0
    return ids, mask


def tiny_clip(end: int = 63, seed: int = 0) -> nn.Module:
    make = _tiny_clip(end, seed)
    torch.manual_seed(seed)
    return make()


@functools.cache
def _tiny_clip(end: int, seed: int) -> Callable[[], nn.Module]:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "initializer_factor": 2.0,
    }
    vision = {**size, "image_size": 32, "patch_size": 8}
    text = {
        **size,
        "vocab_size": 64,
        "max_position_embeddings": 16,
        "bos_token_id": 62,
        "eos_token_id": end,
        "pad_token_id": 1,
    }
    return copier(CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).eval())


def clip_case(end: int = 63) -> Case:
    model = tiny_clip(end)
    ids, mask = captions()
    image, text = model.vision_model, model.text_model
    layers = (
        [image.encoder.layers[1], image.encoder.layers[2].mlp, "vision_model.embeddings"],
        [text.encoder.layers[1], text.encoder.layers[0].self_attn.out_proj, "text_model.embeddings"],
    )
    return Case(DualEncoder(model), (pictures(), ids), (mask,), layers, [model])


class WideClip(nn.Module):
    """CLIP for pictures of another shape than its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_clip()
        self.config = self.model.config

    @property
    def vision_model(self) -> nn.Module:
        return self.model.vision_model

    @property
    def text_model(self) -> nn.Module:
        return self.model.text_model

    def get_image_features(self, pixel_values: Tensor) -> Any:
        return self.model.get_image_features(pixel_values, interpolate_pos_encoding=True)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.model.get_text_features(input_ids, attention_mask=attention_mask)


def wide_case() -> Case:
    model = WideClip().eval()
    ids, mask = captions()
    layers = (["model.vision_model.encoder.layers.1"], ["model.text_model.encoder.layers.1"])
    return Case(DualEncoder(model), (pictures(32, 48), ids), (mask,), layers, [model])


def bf16_case() -> Case:
    case = clip_case()
    case.roots[0].bfloat16()
    case.inputs = (case.inputs[0].bfloat16(), case.inputs[1])
    return case


LAYOUTS = (PatchLayout((8, 8), prefix=1), TextLayout(mask_argument=2))


def image_tower(size: int = 32, **options: Any) -> Tower:
    return Tower(Patches(16), 1 + (size // 8) ** 2, **options)


def text_tower(**options: Any) -> Tower:
    return Tower(nn.Embedding(64, 16), 16, **options)


def towers_case(training: bool = False, **options: Any) -> Case:
    torch.manual_seed(3)
    image, text = image_tower(**options), text_tower(**options)
    ids, mask = captions()
    encoder = DualEncoder(image, text, layouts=LAYOUTS).train(training)
    layers = (
        [image.blocks[0], image.blocks[1].mlp[0], image.embed],
        [text.blocks[0], text.blocks[1].attention, text.embed],
    )
    if options.get("form") == "opaque":
        layers = tuple(choices[1:] for choices in layers)
    first = options.get("sequence_first", False)
    return Case(
        encoder, (pictures(), ids), (mask,), layers, [image, text], LAYOUTS, batch_dim=int(first), training=training
    )


def conv_case() -> Case:
    torch.manual_seed(4)
    image, text = ConvTower(), text_tower()
    ids, mask = captions()
    layouts = (PatchLayout((4, 4)), TextLayout(mask_argument=2))
    encoder = DualEncoder(image, text, layouts=layouts).eval()
    layers = ([image.stem, image.body[0], image.stem[1]], [text.blocks[0], text.embed])
    return Case(encoder, (pictures(32, 48), ids), (mask,), layers, [image, text], layouts)


def closure_case() -> Case:
    torch.manual_seed(5)
    image, text = image_tower().eval(), text_tower().eval()

    def similarity(picture: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return F.cosine_similarity(image(picture), text(ids, mask))

    ids, mask = captions()
    layers = ([image.blocks[1], image.embed], [text.blocks[1], text.embed])
    return Case(similarity, (pictures(), ids), (mask,), layers, [image, text], LAYOUTS)


def encoder_case() -> Case:
    torch.manual_seed(6)
    image, text = EncoderTower(Patches(16)), EncoderTower(nn.Embedding(64, 16))
    ids, mask = captions()
    encoder = DualEncoder(image, text, layouts=LAYOUTS).eval()
    layers = (
        [image.encoder.layers[1], image.encoder.layers[1].linear1, image.embed],
        [text.encoder.layers[0], text.encoder.layers[1].norm1, text.embed],
    )
    return Case(encoder, (pictures(), ids), (mask,), layers, [image, text], LAYOUTS)


def shared_case() -> Case:
    torch.manual_seed(7)
    tower = image_tower().eval()

    def similarity(first: Tensor, second: Tensor) -> Tensor:
        return F.cosine_similarity(tower(first), tower(second))

    layers = ([(tower.blocks[0], 0), (tower.embed, 0)], [(tower.blocks[0], 1), (tower.embed, 1)])
    layouts = (PatchLayout((8, 8), prefix=1),) * 2
    return Case(similarity, (pictures(), pictures().flip(2)), (), layers, [tower], layouts)


def model_case(model: zoo.Model) -> Case:
    """A model of the zoo: the first block of each tower, one in the middle, the perceptron in it."""
    encoder = zoo.encoder_of(model)
    ids, mask = captions()
    first, second, *additional = zoo.arguments_of(model, encoder, ids, mask)
    tried = zip(*(zoo.layers_to_try(encoder.tower_of(index)) for index in (0, 1)), strict=True)
    layers = tuple(map(list, zip(*map(encoder.told_apart, tried), strict=True)))
    return Case(encoder, (first, second), tuple(additional), layers, [encoder.model])


PACKING = frozenset({"packing"})
FAMILIES = [
    Family("clip", clip_case),
    Family("clip_legacy_end", lambda: clip_case(end=2)),
    Family("clip_wide", wide_case),
    Family("clip_bf16", bf16_case, frozenset({"half"})),
    Family("conv_maps", conv_case),
    Family("closure", closure_case),
    Family("sequence_first", lambda: towers_case(sequence_first=True)),
    Family("in_place", lambda: towers_case(in_place=True)),
    Family("torch_encoder", encoder_case),
    Family("tuple_output", lambda: towers_case(form="tuple"), PACKING),
    Family("dict_output", lambda: towers_case(form="dict"), PACKING),
    Family("model_output", lambda: towers_case(form="output"), PACKING),
    Family("keywords_only", lambda: towers_case(keywords=True), PACKING),
    Family("opaque_output", lambda: towers_case(form="opaque"), PACKING),
    Family("rotary", lambda: towers_case(rotary=True)),
    Family("shared_tower", shared_case),
    Family("training_dropout", lambda: towers_case(training=True, dropout=0.2)),
]


def features_of(model: zoo.Model) -> frozenset[str]:
    told = {"model": True, "late": bool(model.page_tokens), "single": model.is_single}
    return frozenset(name for name, holds in told.items() if holds)


FAMILIES += [Family(model.name, partial(model_case, model), features_of(model)) for model in zoo.ZOO]


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)
