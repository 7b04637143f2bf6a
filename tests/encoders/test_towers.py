"""What is read from towers: layouts, blocks, embeddings. Two libraries with one set of weights give one map."""

from __future__ import annotations

import image_zoo
import pytest
import torch
import torch.nn.functional as F
import zoo
from families import captions, clip_case, image_tower, pictures, text_tower, tiny_clip
from tiny_parts import LEGACY, embedded
from torch import Tensor, nn

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck, PackedLayout, PatchLayout, TextLayout
from captum_m2ib.encoders.families import FAMILIES, family_of
from captum_m2ib.encoders.tables import vocabulary_statistics
from captum_m2ib.encoders.towers import refine, stages_of
from captum_m2ib.engine.layouts import HALVINGS
from captum_m2ib.engine.units import to_units

HIERARCHY = HALVINGS[:5]
MASKED = TextLayout(2)
LAYOUTS = {
    "siglip": (PatchLayout((8, 8)), TextLayout(2, pad_token_id=1, reads_padding=True)),
    "siglip2_naflex": (PackedLayout(3, 4, 0, (8, 8)), TextLayout(2, pad_token_id=1, reads_padding=True)),
    "metaclip2": (PatchLayout((8, 8), 1), TextLayout(2, end_token_id=63)),
    "altclip": (PatchLayout((8, 8), 1), MASKED),
    "align": (PatchLayout((1, 1), coarser=HALVINGS), MASKED),
    "blip_itc": (PatchLayout((8, 8), 1), MASKED),
    "groupvit": (PatchLayout((8, 8), 0, 6), TextLayout(2, end_token_id=63)),
    "flava": (PatchLayout((8, 8), 1), MASKED),
    "xclip": (PatchLayout((1, 8, 8), 1, 1, axes=(1, 3, 4)), TextLayout(2, end_token_id=63)),
    "clap": (PatchLayout((4, 4), coarser=HALVINGS[:4], size=(512, 32), fold=4, window=2), MASKED),
    "registers_roberta": (PatchLayout((8, 8), 5), MASKED),
    "convnext_bert": (PatchLayout((4, 4), coarser=HIERARCHY), MASKED),
    "swin_bert": (PatchLayout((4, 4), coarser=HIERARCHY, window=2), MASKED),
    "aimv2": (PatchLayout((8, 8)), TextLayout(2, end_token_id=63)),
    "open_clip_vit": (PatchLayout((8, 8), 1), TextLayout(ends_at_highest=True)),
    "open_clip_resnet": (PatchLayout((1, 1), 1, coarser=HALVINGS), TextLayout(ends_at_highest=True)),
    "open_clip_coca": (PatchLayout((8, 8), 1), TextLayout(pad_token_id=0, suffix=1)),
    "open_clip_siglip": (PatchLayout((16, 16), 1), TextLayout(pad_token_id=1, reads_padding=True)),
    "open_clip_mobileclip": (PatchLayout((1, 1), coarser=HALVINGS), TextLayout(ends_at_highest=True)),
    "open_clip_convnext": (PatchLayout((4, 4), coarser=HIERARCHY), TextLayout(ends_at_highest=True)),
    "open_clip_eva02": (PatchLayout((16, 16), 1), TextLayout(ends_at_highest=True)),
    "open_clip_biomed": (PatchLayout((16, 16), 1), TextLayout(pad_token_id=1)),
}
RECOMMENDED = {
    "groupvit": ("inputs[0]", "text_model.embeddings"),
    "align": ("inputs[0]", "text_model.embeddings"),
    "altclip": ("inputs[0]", "text_model.roberta.embeddings"),
    "clap": ("audio_model.audio_encoder.layers.2.blocks.1", "text_model.embeddings"),
    "swin_bert": ("inputs[0]", "text_model.embeddings"),
    "convnext_bert": ("inputs[0]", "text_model.embeddings"),
    "open_clip_vit": ("inputs[0]", "token_embedding"),
    "open_clip_resnet": ("inputs[0]", "token_embedding"),
    "open_clip_coca": ("inputs[0]", "text.token_embedding"),
    "open_clip_mobileclip": ("inputs[0]", "text.token_embedding"),
    "open_clip_biomed": ("inputs[0]", "text.transformer.embeddings"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_read_from_the_model(name: str):
    assert zoo.encoder_of(zoo.model_named(name)).layouts == LAYOUTS[name]


@pytest.mark.parametrize("name", RECOMMENDED)
def test_recommended_layers(name: str):
    method = MultiModalInfoBottleneck(zoo.encoder_of(zoo.model_named(name)))
    assert tuple(layer.name for layer in method.layers) == RECOMMENDED[name]
    assert all(prior is not None for prior in method.priors)


@pytest.mark.skipif(LEGACY, reason="this transformers lacks families of the table")
def test_every_entry_of_the_table_is_in_the_zoo():
    kinds = set()
    for model in zoo.ZOO:
        built = model.build()
        kinds |= {type(built).__name__, getattr(getattr(built, "config", None), "model_type", None)}
    assert set(FAMILIES) <= kinds


def test_no_family_for_a_model_that_lacks_its_parts():
    class Config:
        model_type = "clap"

    class Impostor(nn.Module):
        config = Config()

    assert family_of(Impostor()) is None
    with pytest.raises(TypeError, match="model: expected get_image_features"):
        DualEncoder(Impostor())


def test_padding_that_is_read_is_told_at_the_embeddings_only():
    encoder = zoo.encoder_of(zoo.model_named("siglip"))
    text = encoder.model.text_model
    told = encoder.layouts[1]
    assert encoder.layout_of(text.embeddings) == told == encoder.layout_of(text.embeddings.token_embedding)
    assert encoder.layout_of(text.encoder.layers[0]).pad_token_id is None


def test_a_pooled_position_that_a_mask_calls_padding_is_gated():
    encoder = zoo.encoder_of(zoo.model_named("siglip"))
    ids, mask = captions(pairs=2)
    assert not mask[:, -1].all()
    method = MultiModalInfoBottleneck(encoder, (encoder.stages(0)[0][0], encoder.stages(1)[0][-1]))
    inputs = (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), ids)
    _, bits = method.attribute(inputs, additional_forward_args=(mask,), n_steps=10, n_samples=4)
    # The last block's other positions reach nothing.
    assert bool((bits[:, -1] > bits[:, :-1].sum(1)).all())


def test_shift_of_windows_is_that_of_the_block():
    encoder = zoo.encoder_of(zoo.model_named("swin_bert"))
    blocks = encoder.model.vision_model.encoder.layers[2].blocks
    assert [encoder.layout_of(block.attention).shift for block in blocks] == [0, 1]
    assert encoder.layout_of(encoder.model.vision_model.embeddings).shift == 0


@pytest.mark.parametrize("index", [0, 1])
def test_windows_of_a_block_lie_where_the_block_puts_them(index: int):
    encoder = zoo.encoder_of(zoo.model_named("swin_bert"))
    inputs = torch.randn(2, 3, 64, 64)
    ids, mask = captions(pairs=2)
    block = encoder.model.vision_model.encoder.layers[2].blocks[index]
    inside = next(module for name, module in block.named_modules() if name.endswith("attention"))
    seen: list[Tensor] = []

    def receives(module, args, kwargs):
        seen.append((*args, *kwargs.values())[0])

    handles = [
        inside.register_forward_pre_hook(receives, with_kwargs=True),
        block.layernorm_before.register_forward_hook(lambda module, args, output: seen.append(output)),
    ]
    with torch.no_grad():
        encoder(inputs, ids, mask)
    for handle in handles:
        handle.remove()
    tokens, windows = seen
    layout = encoder.layout_of(inside)
    found = to_units(layout, windows.unflatten(0, (2, -1)), inputs)
    torch.testing.assert_close(found, to_units(layout, tokens.view(2, -1, tokens.shape[-1]), inputs))


def test_vocabulary_statistics_of_a_bare_table_are_its_rows():
    table = nn.Embedding(7, 3)
    found = vocabulary_statistics(table)
    torch.testing.assert_close(found.mean, table.weight.detach().mean(0))
    torch.testing.assert_close(found.std, table.weight.detach().std(0))
    assert vocabulary_statistics(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("vocabulary", [3, 8, 21, 9000])
def test_vocabulary_statistics_are_of_every_token_at_cycling_positions(vocabulary: int):
    torch.manual_seed(0)
    embeddings = nn.Module()
    embeddings.token, embeddings.position = nn.Embedding(vocabulary, 4), nn.Embedding(8, 4)
    embeddings.forward = lambda ids: embeddings.token(ids) + embeddings.position(torch.arange(ids.shape[1]))
    rows = (embeddings.token.weight + embeddings.position.weight[torch.arange(vocabulary) % 8]).double()
    found = vocabulary_statistics(embeddings)
    assert found.count == vocabulary
    torch.testing.assert_close(found.mean.double(), rows.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.std.double(), rows.std(0), rtol=0, atol=1e-6)


def test_vocabulary_statistics_cover_positions_that_start_late():
    encoder = zoo.encoder_of(zoo.model_named("registers_roberta"))
    embeddings = encoder.embeddings_of(1)
    assert vocabulary_statistics(embeddings).count == 64


def test_a_tower_without_blocks_has_no_stages():
    assert stages_of(nn.Linear(2, 2)) == []
    assert refine(None, nn.Linear(2, 2), nn.Linear(2, 2), None) is None


# Two libraries, one set of weights.


def to_open_clip(source: nn.Module) -> nn.Module:
    """A CLIP of transformers as open_clip builds it, with its weights."""
    from open_clip import model

    size = {"layers": 4, "width": 32}
    vision = model.CLIPVisionCfg(**size, head_width=16, mlp_ratio=2, patch_size=8, image_size=32)
    text = model.CLIPTextCfg(**size, heads=2, mlp_ratio=2, context_length=16, vocab_size=64)
    built = model.CLIP(16, vision, text, quick_gelu=True).eval()
    visual, side = built.visual, source.vision_model
    pairs: list[tuple[Tensor, Tensor]] = [
        (visual.class_embedding, side.embeddings.class_embedding),
        (visual.conv1.weight, side.embeddings.patch_embedding.weight),
        (visual.positional_embedding, side.embeddings.position_embedding.weight),
        (visual.proj, source.visual_projection.weight.T),
        (built.token_embedding.weight, source.text_model.embeddings.token_embedding.weight),
        (built.positional_embedding, source.text_model.embeddings.position_embedding.weight),
        (built.text_projection, source.text_projection.weight.T),
    ]
    norms = [
        (visual.ln_pre, side.pre_layrnorm),
        (visual.ln_post, side.post_layernorm),
        (built.ln_final, source.text_model.final_layer_norm),
    ]
    towers = ((visual.transformer, side), (built.transformer, source.text_model))
    for block, layer in ((b, lay) for t, s in towers for b, lay in zip(t.resblocks, s.encoder.layers, strict=True)):
        attention = layer.self_attn
        for part in ("weight", "bias"):
            joined = torch.cat([getattr(getattr(attention, f"{name}_proj"), part) for name in "qkv"])
            pairs.append((getattr(block.attn, f"in_proj_{part}"), joined))
        norms += [(block.ln_1, layer.layer_norm1), (block.ln_2, layer.layer_norm2)]
        norms += [(block.attn.out_proj, attention.out_proj), (block.mlp.c_fc, layer.mlp.fc1)]
        norms.append((block.mlp.c_proj, layer.mlp.fc2))
    pairs += [(getattr(a, part), getattr(b, part)) for a, b in norms for part in ("weight", "bias")]
    with torch.no_grad():
        for target, value in pairs:
            target.copy_(value)
    return built


def test_one_set_of_weights_gives_one_map_through_both_libraries():
    source = tiny_clip()
    zoo.stir(source)
    here, there = DualEncoder(source), DualEncoder(to_open_clip(source))
    ids = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(5))
    ids[:, 0], ids[:, 9], ids[:, 10:] = 62, 63, 0
    inputs = (pictures(), ids)
    with torch.no_grad():
        torch.testing.assert_close(here(*inputs), there(*inputs), rtol=1e-5, atol=1e-5)
    blocks = [
        (source.vision_model.encoder.layers[1], source.text_model.encoder.layers[2]),
        (there.model.visual.transformer.resblocks[1], there.model.transformer.resblocks[2]),
    ]
    for first, second in (
        [MultiModalInfoBottleneck(e, layers) for e, layers in zip((here, there), blocks, strict=True)],
        [MultiModalInfoBottleneck.published(e) for e in (here, there)],
    ):
        for one, other in zip(first.attribute(inputs), second.attribute(inputs), strict=True):
            assert float((one - other).abs().max()) <= 1e-3 * float(one.max())


# Anything else.


def test_pictures_compared_through_one_tower_of_a_model():
    model = tiny_clip()
    encoder = DualEncoder(model, modalities=("image", "image"))
    one, two = pictures(), pictures().flip(3)
    assert encoder.argument_names == ("pixel_values", "pixel_values")
    with torch.no_grad():
        found = encoder(one, two)
        own = [embedded(model.get_image_features(p)) for p in (one, two)]
    torch.testing.assert_close(found, F.cosine_similarity(*own))
    method = MultiModalInfoBottleneck(encoder)
    assert [layer.argument for layer in method.layers] == [0, 1]
    assert [call for _, call in encoder.published_layers()] == [0, 1]
    # Each place has noise of its own, in the range that is measured, too.
    settings = {"n_steps": 3, "n_samples": 16, "score_range": 0.1}
    first, second = method.attribute((one, two), **settings)
    assert first.shape == second.shape == one.shape
    swapped = method.attribute((two, one), **settings)
    for a, b in zip((first, second), swapped[::-1], strict=True):
        assert float(a.sum()) == pytest.approx(float(b.sum()), rel=0.05)
    with pytest.raises(
        ValueError, match=r"prepare: expected an encoder of pictures, sounds .* this one compares image with image"
    ):
        DualEncoder(model, modalities=("image", "image"), processor=object()).prepare([], "a")


def test_captions_compared_through_one_tower_of_a_model():
    encoder = DualEncoder(tiny_clip(), modalities=("text", "text"))
    assert encoder.argument_names == ("input_ids", "input_ids", "attention_mask", "attention_mask")
    ids, mask = captions()
    method = MultiModalInfoBottleneck(encoder)
    first, second = method.attribute(
        (ids, ids.flip(0)), additional_forward_args=(mask, mask.flip(0)), n_steps=3, n_samples=2
    )
    assert not first[mask == 0].any() and not second[mask.flip(0) == 0].any()
    assert bool((first[mask == 1] > 0).all())


def test_two_modules_that_are_one():
    torch.manual_seed(0)
    tower = image_tower().eval()
    encoder = DualEncoder(tower, tower, modalities=("image", "image"))
    assert encoder.layouts == (PatchLayout((8, 8)),) * 2
    encoder = DualEncoder(tower, tower, modalities=("image", "image"), layouts=(PatchLayout((8, 8), 1),) * 2)
    one, two = pictures(), pictures().flip(2)
    bits = MultiModalInfoBottleneck(encoder).attribute((one, two), n_steps=2, n_samples=2)
    assert [b.shape for b in bits] == [one.shape, two.shape]


def test_a_tower_whose_tokens_cannot_be_placed_says_how_to_place_them():
    encoder = DualEncoder(image_tower().eval(), text_tower().eval())
    ids, mask = captions()
    with pytest.raises(ValueError, match=r"layouts: expected 0 prefix tokens and a grid of 4 x 4.*pass layouts="):
        MultiModalInfoBottleneck.published(encoder).attribute(
            (pictures(), ids), additional_forward_args=(mask,), n_steps=1
        )


def test_modalities_that_the_model_does_not_read():
    with pytest.raises(ValueError, match=r"modalities: expected two of what CLIPModel reads \(image, text\), got"):
        DualEncoder(tiny_clip(), modalities=("image", "audio"))
    with pytest.raises(ValueError, match="modalities: expected two of"):
        DualEncoder(tiny_clip(), modalities=("image",))


def test_a_fusion_model_that_only_gives_a_score():
    """BLIP's matching head reads picture and caption together; its score is explained like any other."""
    torch.manual_seed(0)
    model = image_zoo.blip().eval()
    zoo.stir(model)

    def matching(pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = model(input_ids, pixel_values, attention_mask=attention_mask, use_itm_head=True)
        return output.itm_score.log_softmax(-1)[:, 1]

    layers = (model.vision_model.encoder.layers[0], model.text_encoder.embeddings)
    layouts = (PatchLayout((8, 8), prefix=1), TextLayout(mask_argument=2))
    method = MultiModalInfoBottleneck(matching, layers, layouts, statistics=("pair", "pair"))
    ids, mask = captions()
    few = {"n_steps": 10, "n_samples": 10, "beta": 8.0}
    (pixels, tokens), record = method.attribute_with_record((pictures(), ids), additional_forward_args=(mask,), **few)
    assert pixels.shape == (3, 3, 32, 32) and not tokens[mask == 0].any() and bool((tokens[mask == 1] > 0).all())
    image, _ = record.modalities
    assert bool((image.information[-1] < image.information[0]).all())
    alone = method.attribute((pictures()[1:2], ids[1:2, :4]), additional_forward_args=(mask[1:2, :4],), **few)
    assert float((alone[0] - pixels[1:2]).abs().max()) <= 1e-3 * float(pixels[1].max())


def test_pictures_of_another_size_are_read_with_interpolated_positions():
    model = tiny_clip()
    encoder = DualEncoder(model)
    ids, mask = captions()
    wide = pictures(32, 48)
    with torch.no_grad():
        found = encoder(wide, ids, mask)
        image = embedded(model.get_image_features(wide, interpolate_pos_encoding=True))
        text = embedded(model.get_text_features(ids, attention_mask=mask))
    torch.testing.assert_close(found, F.cosine_similarity(image, text))
    _, record = MultiModalInfoBottleneck(encoder).attribute_with_record(
        (wide, ids), additional_forward_args=(mask,), n_steps=1, n_samples=1
    )
    assert record.modalities[0].units.shape == (3, 32, 48)
    _, record = MultiModalInfoBottleneck.published(encoder).attribute_with_record(
        (wide, ids), additional_forward_args=(mask,), n_steps=1, n_samples=1
    )
    assert record.modalities[0].units.shape == (3, 4, 6)


def test_placeholders_before_a_caption_are_refused():
    encoder = zoo.encoder_of(zoo.model_named("blip2"))
    encoder.model.config.image_token_index = 60
    pixels, ids = torch.zeros(1, 3, 32, 32), torch.tensor([[60, 60, 5, 6]])
    with pytest.raises(ValueError, match=r"^input_ids: expected captions alone, got the placeholder .*\(60\)"):
        encoder(pixels, ids)
    assert encoder(pixels, ids[:, 2:]).shape == (1,)


def test_a_text_tower_of_any_length_is_followed():
    tower = text_tower()
    # As towers of open_clip say it whose positions are relative.
    tower.context_length = 0
    assert DualEncoder(image_tower(), tower).eval().embeddings_of(1) is tower.embed


def test_a_legacy_configuration_says_so():
    layouts = clip_case(end=2).forward.layouts
    assert layouts[1] == TextLayout(mask_argument=2, end_token_id=None, ends_at_highest=True)
