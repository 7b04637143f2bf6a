"""Contract 2: bits, conserved from layer to input, none at padding, in the right place."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from families import Case, Patches, family_named
from torch import nn

from captum_m2ib import LayerMultiModalInfoBottleneck, MultiModalInfoBottleneck, PatchLayout, TextLayout
from captum_m2ib.engine.information import information

GRIDS = [
    "clip",
    "clip_wide",
    "clip_bf16",
    "conv_maps",
    "closure",
    "sequence_first",
    "torch_encoder",
    "shared_tower",
    "tuple_output",
    "in_place",
    "keywords_only",
    "rotary",
]


def settings_of(case: Case) -> dict:
    return {"additional_forward_args": case.additional or None, "n_steps": 3, "n_samples": 3}


@pytest.mark.parametrize("name", GRIDS)
def test_pixels_hold_the_bits_of_the_patch_tokens(name: str):
    case = family_named(name).build()
    method = case.method()
    pixels = method.attribute(case.inputs, **settings_of(case))[0]
    layer = LayerMultiModalInfoBottleneck(case.forward, case.layers[0][0], layouts=case.layouts)
    bits = layer.attribute(case.inputs, **settings_of(case))
    if case.batch_dim == 1:
        bits = bits.transpose(0, 1)
    patches = bits if bits.ndim == 4 else bits[:, 1:]
    assert bits.ndim == 4 or not torch.allclose(bits[:, :1], torch.zeros(()))
    for row, patch_row in zip(pixels, patches, strict=True):
        assert float(row.double().sum()) == pytest.approx(float(patch_row.double().sum()), rel=1e-4)
    torch.testing.assert_close(pixels[:, 0], pixels[:, 1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["clip", "closure", "conv_maps", "torch_encoder", "sequence_first"])
def test_tokens_hold_the_bits_of_the_layer_and_padding_none(name: str):
    case = family_named(name).build()
    tokens = case.method().attribute(case.inputs, **settings_of(case))[1]
    layer = LayerMultiModalInfoBottleneck(case.forward, [c[0] for c in case.layers], layouts=case.layouts)
    bits = layer.attribute(case.inputs, **settings_of(case))[1]
    bits = bits.transpose(0, 1) if case.batch_dim == 1 else bits
    torch.testing.assert_close(tokens, bits.sum(-1), rtol=1e-4, atol=0)
    padding = case.additional[0] == 0
    assert padding.any() and tokens[padding].tolist() == [0.0] * int(padding.sum())
    assert bool((tokens[~padding] > 0).all()) and bits[padding].sum() == 0


def test_bits_are_nats_divided_by_log_two():
    case = family_named("closure").build()
    hidden = []
    handle = case.layers[1][0].register_forward_hook(lambda m, a, output: hidden.append(output))
    case.forward(*case.inputs, *case.additional)
    handle.remove()
    # A learning rate of nothing keeps every gate where it starts, at sigmoid(5).
    method = LayerMultiModalInfoBottleneck(case.forward, case.layers[1][0])
    bits = method.attribute(case.inputs, additional_forward_args=case.additional, n_steps=1, n_samples=1, lr=1e-30)
    gate = 1 / (1 + math.exp(-5))
    nats = -math.log(1 - gate) + ((1 - gate) ** 2 + (gate * hidden[0]) ** 2) / 2 - 0.5
    torch.testing.assert_close(bits, nats.detach() / math.log(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nats, information(torch.tensor(5.0), hidden[0]), rtol=1e-4, atol=1e-4)


class OnePatch(nn.Module):
    """An image tower whose embedding reads one place of the grid only."""

    def __init__(self, height: int, width: int, row: int, column: int, conv: bool) -> None:
        super().__init__()
        self.conv = conv
        self.embed = nn.Conv2d(3, 8, 8, 8) if conv else Patches(8)
        self.block = nn.Identity()
        self.row, self.column, self.width = row, column, width // 8

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        hidden = self.block(self.embed(pictures))
        return hidden[:, :, self.row, self.column] if self.conv else hidden[:, 1 + self.row * self.width + self.column]


@pytest.mark.parametrize("conv", [True, False], ids=["maps", "tokens"])
@pytest.mark.parametrize(
    ("height", "width", "row", "column"), [(32, 48, 0, 5), (32, 48, 3, 1), (48, 24, 4, 2), (32, 32, 1, 2)]
)
def test_the_patch_that_holds_the_evidence_lights_up(height, width, row, column, conv):
    torch.manual_seed(0)
    tower = OnePatch(height, width, row, column, conv).eval()
    anchor = torch.randn(8)

    def score(pictures):
        return F.cosine_similarity(tower(pictures), anchor.expand(len(pictures), -1))

    pictures = torch.randn(2, 3, height, width)
    method = MultiModalInfoBottleneck(score, [tower.block], [PatchLayout((8, 8), prefix=0 if conv else 1)])
    pixels, record = method.attribute_with_record(pictures, n_steps=30, n_samples=4, beta=1.0)
    pixels, grid = pixels.sum(1), record.modalities[0].units
    assert grid.shape == (2, height // 8, width // 8)
    for pair in range(2):
        found = divmod(int(pixels[pair].argmax()), width)
        assert (found[0] // 8, found[1] // 8) == (row, column)
        assert divmod(int(grid[pair].argmax()), width // 8) == (row, column)
        inside = pixels[pair, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].sum()
        assert float(inside) > 0.5 * float(pixels[pair].sum())
    torch.testing.assert_close(grid.sum((1, 2)), pixels.sum((1, 2)), rtol=1e-4, atol=1e-4)


def test_units_are_patches_and_tokens():
    case = family_named("clip_wide").build()
    bits, record = case.method().attribute_with_record(case.inputs, **settings_of(case))
    patches, tokens = (modality.units for modality in record.modalities)
    assert patches.shape == (3, 4, 6)
    torch.testing.assert_close(patches.sum((1, 2)), bits[0].sum((1, 2, 3)), rtol=1e-4, atol=1e-3)
    assert torch.equal(tokens, bits[1])


def test_prefix_tokens_are_read_from_the_model():
    layouts = family_named("clip").build().forward.layouts
    assert layouts[0] == PatchLayout((8, 8), prefix=1) and isinstance(layouts[1], TextLayout)
    assert layouts[1].end_token_id == 63
    assert family_named("clip_legacy_end").build().forward.layouts[1].end_token_id is None
    assert family_named("clip_wide").build().forward.layouts[0] == PatchLayout((8, 8), prefix=1)


def test_padding_is_found_by_the_end_token_without_a_mask():
    case = family_named("clip").build()
    mask = case.additional[0]
    tokens = case.with_inputs(case.inputs, ()).attribute()[1]
    assert bool((tokens[mask == 0] == 0).all()) and bool((tokens[mask == 1] > 0).all())
