"""Wrapped models and adapted tables, by family: the map through the wrapper is that of the plain model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
from families import Case, family_named
from torch import Tensor, nn
from wrapped import TABLES, WRAPPERS, Embedder, PeftModel, SentenceTransformer

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck, explain
from captum_m2ib.encoders.tables import token_tables

FEW = {"n_steps": 2, "n_samples": 2}
MODELS = ("clip", "siglip", "blip_itc", "open_clip_vit", "open_clip_coca")


@pytest.fixture(autouse=True, scope="module")
def no_process_group_is_left() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch._dynamo.reset()


def bits_of(case: Case, forward: object) -> tuple[Tensor, ...]:
    return case.attribute(MultiModalInfoBottleneck(forward), **FEW)


@functools.cache
def bits_of_plain(name: str) -> tuple[Tensor, ...]:
    """The map that all wrappers of a family are held against: every build has the same weights."""
    case = family_named(name).build().double()
    return bits_of(case, case.forward)


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert float(other.max()) > 0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.max()))


# A model of each library in every wrapper, and those that say otherwise what their embeddings are in one.
@pytest.mark.parametrize(
    ("wrapper", "name"),
    [
        (wrapper, name)
        for name in MODELS
        for wrapper in WRAPPERS
        if name in ("clip", "open_clip_coca") or wrapper == "peft"
    ],
)
def test_a_wrapped_model_has_the_map_of_the_plain_one(wrapper: str, name: str):
    case = family_named(name).build().double()
    model = case.forward.model
    wrapped = WRAPPERS[wrapper](model)
    encoder = DualEncoder(wrapped.eval())
    assert type(encoder.model) is type(model)
    # What is no encoder yet is made one by the method.
    for forward in (encoder, wrapped) if name == "clip" else (wrapped,):
        assert_equal(bits_of(case, forward), bits_of_plain(name))


@pytest.mark.parametrize("wrapper", ["compiled", "data_parallel", "averaged"])
def test_a_wrapped_encoder_has_the_map_of_the_plain_one(wrapper: str):
    case = family_named("clip").build().double()
    wrapped = WRAPPERS[wrapper](case.forward).eval()
    assert_equal(bits_of(case, wrapped), bits_of(case, case.forward))


@pytest.mark.parametrize("wrapper", ["compiled", "data_parallel", "averaged"])
def test_a_wrapped_encoder_explains_pictures_and_captions(wrapper: str, checkpoint: Path):
    encoder = DualEncoder.from_pretrained(checkpoint)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found, expected = (
        explain(one, picture, "a red square", check=False, **FEW)[0]
        for one in (WRAPPERS[wrapper](encoder).eval(), encoder)
    )
    np.testing.assert_array_equal(found.token_bits, expected.token_bits)
    np.testing.assert_array_equal(found.image_bits, expected.image_bits)


def test_a_raw_model_is_told_what_lacks():
    model = family_named("clip").build().forward.model
    with pytest.raises(ValueError, match=r"^processor: this DualEncoder has none; .*two functions"):
        explain(model, np.zeros((8, 8, 3), np.uint8), "a cat")


@pytest.mark.parametrize("wrapper", ["compiled", "data_parallel", "averaged"])
def test_wrapped_towers_have_the_map_of_the_plain_ones(wrapper: str):
    case = family_named("rotary").build().double()
    wrapped = DualEncoder(*map(WRAPPERS[wrapper], case.roots), layouts=case.layouts).eval()
    layers = ["image_tower.embed", "text_tower.embed"]
    found, expected = (
        case.attribute(MultiModalInfoBottleneck(encoder, layers), **FEW) for encoder in (wrapped, case.forward)
    )
    assert_equal(found, expected)


@pytest.mark.parametrize("name", ["clip", "siglip", "open_clip_vit", "open_clip_coca", "open_clip_biomed"])
@pytest.mark.parametrize("table", TABLES)
def test_an_adapted_table_has_the_map_of_the_merged_one(table: str, name: str):
    case = family_named(name).build().double()
    adapted, merged = case.forward.model, copy.deepcopy(case.forward.model)
    for model, is_merged in ((adapted, False), (merged, True)):
        tower = DualEncoder(model).tower_of(1)
        path, plain = next((path, one) for path, one in token_tables(tower.named_modules()))
        owner, _, last = path.rpartition(".")
        replaced = TABLES[table](plain).eval()
        if is_merged:
            plain.weight.data = replaced.merged().detach()
        else:
            setattr(tower.get_submodule(owner), last, replaced)
    found, expected = bits_of(case, DualEncoder(adapted)), bits_of(case, DualEncoder(merged))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.max()))


def test_a_table_that_nothing_reads_is_not_taken_for_the_embeddings():
    case = family_named("open_clip_vit").build()
    expected = bits_of(case, DualEncoder(case.forward.model))
    table = case.forward.model.token_embedding
    del case.forward.model.token_embedding
    case.forward.model.kept = copy.deepcopy(table)
    case.forward.model.token_embedding = table
    encoder = DualEncoder(case.forward.model)
    assert next(found for _, found in token_tables(encoder.model.named_modules())) is encoder.model.kept
    assert encoder.embeddings_of(1) is table and encoder.token_table_of(1) is table
    for one, other in zip(bits_of(case, encoder), expected, strict=True):
        assert torch.equal(one, other)


def test_adapters_that_come_later_are_seen():
    case = family_named("open_clip_vit").build()
    encoder = case.forward
    assert encoder.embeddings_of(1) is encoder.model.token_embedding
    encoder.model.token_embedding = TABLES["adapted"](encoder.model.token_embedding).eval()
    assert encoder.embeddings_of(1) is encoder.model.token_embedding


class Held(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Identity(), model])


def test_a_model_inside_another_is_named():
    model = family_named("clip").build().forward.model
    advice = r"get_image_features.*got Held, which offers neither; pass its attribute \.parts\[1\] instead"
    with pytest.raises(TypeError, match=r"^model: expected " + advice):
        DualEncoder(Held(model))
    with pytest.raises(ValueError, match=r"^layers: .*expected " + advice):
        MultiModalInfoBottleneck(Held(model))
    with pytest.raises(ValueError, match=r"pass DualEncoder\(image_tower, text_tower\) instead"):
        MultiModalInfoBottleneck(nn.Linear(2, 2))


def test_prompts_outside_the_towers_are_refused():
    model = family_named("clip").build().forward.model
    with pytest.raises(ValueError, match=r"^model: PeftModel adds its prompts in a forward pass of its own"):
        DualEncoder(PeftModel(model, is_prompt_learning=True))


def test_what_changes_similarities_is_not_taken_off():
    model = family_named("clip").build().forward.model
    with pytest.raises(TypeError, match=r"got SentenceTransformer.*pass its attribute \[0\]\.model instead"):
        DualEncoder(SentenceTransformer(Embedder(model), nn.Linear(16, 4)))
    marker = object()
    assert DualEncoder(SentenceTransformer(Embedder(model, marker))).processor is marker


def test_names_of_layers_may_start_at_the_wrapper():
    case = family_named("clip").build()
    encoder = DualEncoder(WRAPPERS["peft"](case.forward.model))
    names = ["vision_model.encoder.layers.1", "text_model.embeddings"]
    whole = [f"base_model.model.{name}" for name in names]
    one, other = (case.attribute(MultiModalInfoBottleneck(encoder, layers), **FEW) for layers in (names, whole))
    assert all(map(torch.equal, one, other))
