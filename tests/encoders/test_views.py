"""A picture is shown as the model sees it, whatever its processor does, and its place in the whole picture is known."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import tiny_clip
from PIL import Image
from tiny_parts import LEGACY
from torch import Tensor
from torchvision import transforms

from captum_m2ib import DualEncoder
from captum_m2ib.encoders.views import View, view_of
from captum_m2ib.scenes import CHECKPOINT, load_checkpoint

SIDE = 64
SQUARE = {"height": SIDE, "width": SIDE}
SHORTEST = {"size": {"shortest_edge": 72}, "crop_size": SQUARE}
GREY = 90

# Every image processor of the families that are explained, and the ways in which they cut.
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPImageProcessor", SHORTEST),
    "clip, squashed": ("CLIPImageProcessor", {"size": SQUARE, "do_center_crop": False}),
    "siglip": ("SiglipImageProcessor", {"size": SQUARE}),
    "siglip2": ("Siglip2ImageProcessor", {"patch_size": 8, "max_num_patches": 40}),
    "owlvit": ("OwlViTImageProcessor", {"size": SQUARE}),
    "owlv2": ("Owlv2ImageProcessor", {"size": SQUARE}),
    "blip": ("BlipImageProcessor", {"size": SQUARE}),
    "chinese_clip": ("ChineseCLIPImageProcessor", SHORTEST),
    "flava": ("FlavaImageProcessor", {"size": SQUARE, "crop_size": SQUARE}),
    "align": (
        "EfficientNetImageProcessor",
        {"size": {"height": 80, "width": 80}, "crop_size": SQUARE, "do_center_crop": True, "include_top": False},
    ),
    "convnext": ("ConvNextImageProcessor", {"size": {"shortest_edge": SIDE}, "crop_pct": 0.8}),
    "convnext, large": ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    "vit": ("ViTImageProcessor", {"size": SQUARE}),
    "bit": ("BitImageProcessor", SHORTEST),
}
if LEGACY:
    # It takes no shortest edge.
    del PROCESSORS["chinese_clip"]
SIZES = [(300, 100), (100, 300), (120, 90), (40, 50)]


def processor_of(name: str) -> Any:
    kind, settings = PROCESSORS[name]
    return getattr(transformers, f"{kind}Pil", getattr(transformers, kind))(**settings)


def encoder_with(image_processor: Any) -> DualEncoder:
    """Whatever the processor hands out, nothing is run here."""
    tokenizer = load_checkpoint(CHECKPOINT)[1].tokenizer
    return DualEncoder(tiny_clip(), processor=SimpleNamespace(tokenizer=tokenizer, image_processor=image_processor))


def planted(width: int, height: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """A grey picture with a red patch a little off its middle, and the patch's left, top, right and bottom."""
    side = min(width, height) // 4
    left, top = width // 2 + side // 8, height // 2 - side
    picture = np.full((height, width, 3), GREY, np.uint8)
    picture[top : top + side, left : left + side] = (255, 0, 0)
    return picture, (left, top, left + side, top + side)


def middle_of_red(picture: np.ndarray) -> np.ndarray:
    """The middle of what is red, (column, row), as shares of the picture's width and height."""
    red = np.clip(picture[..., 0].astype(float) - picture[..., 1] - 60, 0, None)
    rows, columns = np.indices(red.shape) + 0.5
    return np.array([(columns * red).sum() / red.shape[1], (rows * red).sum() / red.shape[0]]) / red.sum()


def pixels_of(pairs: Any, encoder: DualEncoder) -> np.ndarray:
    """The first picture as the model receives it, from 0 to 255 in each channel."""
    pixels = pairs.inputs[0][0]
    names = encoder.argument_names[2:]
    if pixels.ndim == 2:
        shapes = dict(zip(names, pairs.additional_forward_args, strict=False))["spatial_shapes"]
        rows, columns = shapes[0].tolist()
        patches = pixels[: rows * columns].view(rows, columns, 8, 8, 3)
        pixels = patches.permute(4, 0, 2, 1, 3).reshape(3, rows * 8, columns * 8)
    low, high = pixels.flatten(1).min(1).values, pixels.flatten(1).max(1).values
    return (255 * (pixels - low[:, None, None]) / (high - low)[:, None, None]).permute(1, 2, 0).numpy()


def siglip2_encoder(image_processor: Any) -> DualEncoder:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Siglip2Config(
        vision_config={**sizes, "patch_size": 8, "num_patches": 16},
        text_config={**sizes, "vocab_size": 48, "max_position_embeddings": 32, "projection_size": 32},
    )
    tokenizer = load_checkpoint(CHECKPOINT)[1].tokenizer
    processor = SimpleNamespace(tokenizer=tokenizer, image_processor=image_processor)
    return DualEncoder(transformers.Siglip2Model(config).eval(), processor=processor)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_patch_lies_where_the_model_sees_it(name: str, size: tuple[int, int]):
    encoder = (siglip2_encoder if name == "siglip2" else encoder_with)(processor_of(name))
    picture, (left, top, right, bottom) = planted(*size)
    pairs = encoder.prepare(picture, "a red square")
    received = pixels_of(pairs, encoder)
    # Channels were stretched apart, so that only what is far more red than the rest counts.
    received[..., 1:] = received[..., 1:].max((0, 1)) - received[..., 1:]
    seen = middle_of_red(np.stack([received[..., 0], 255 - received[..., 1], received[..., 2]], -1))
    shown, region = pairs.pictures[0], pairs.regions[0]
    pixel = 1 / np.array(received.shape[1::-1])
    assert (np.abs(middle_of_red(shown) - seen) < 0.6 * pixel + 0.6 / np.array(shown.shape[1::-1])).all()
    assert (region.width, region.height) == size
    extent = np.array([region.right - region.left, region.bottom - region.top])
    place = (np.array([(left + right) / 2, (top + bottom) / 2]) - region[:2]) / extent
    assert (np.abs(place - seen) < 0.6 * pixel).all()
    # Neither is stretched otherwise than the other.
    np.testing.assert_allclose(shown.shape[1] / shown.shape[0], extent[0] / extent[1], rtol=0.05)


def test_what_pads_is_shown():
    picture, _ = planted(300, 100)
    encoder = encoder_with(processor_of("owlv2"))
    pairs = encoder.prepare(picture, "a red square")
    shown, region = pairs.pictures[0], pairs.regions[0]
    assert region[:3] == (0.0, 0.0, 300.0) and region.bottom == pytest.approx(300, abs=1)
    assert region.inside == (0.0, 0.0, 300.0, 100.0)
    np.testing.assert_array_equal(shown[:100], picture)
    processor = encoder.processor.image_processor
    pixels = pairs.inputs[0][0].permute(1, 2, 0).numpy() * processor.image_std + processor.image_mean
    padding = pixels[40:] * 255
    assert padding.std() < 0.1 and np.abs(shown[188:] - padding.mean()).max() < 1


def normalised(picture: Image.Image) -> Tensor:
    levels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1) / 255
    return (levels - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / 0.25


def letterbox(ground: tuple[int, int, int]) -> Callable[[Image.Image], Tensor]:
    def process(picture: Image.Image) -> Tensor:
        small = picture.copy()
        small.thumbnail((SIDE, SIDE))
        canvas = Image.new("RGB", (SIDE, SIDE), ground)
        canvas.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
        return normalised(canvas)

    return process


def view(picture: np.ndarray, process: Callable[[Image.Image], Tensor]) -> View:
    whole = Image.fromarray(picture)
    return view_of(whole, process(whole), process, process)


@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (124, 116, 104)])
@pytest.mark.parametrize("size", [(256, 64), (64, 256)])
def test_letterboxes_of_any_colour(ground: tuple[int, int, int], size: tuple[int, int]):
    picture, _ = planted(*size)
    found = view(picture, letterbox(ground))
    margin = (256 - 64) / 2
    expected = (0, -margin, 256, 64 + margin) if size[0] > size[1] else (-margin, 0, 64 + margin, 256)
    np.testing.assert_allclose(found.region[:4], expected, atol=1)
    np.testing.assert_allclose(found.picture.shape, (256, 256, 3), atol=1)
    assert (np.abs(found.picture[3, 3].astype(int) - ground) <= 1).all()
    inside = found.picture[96:160, :256] if size[0] > size[1] else found.picture[:256, 96:160]
    assert np.abs(inside.astype(int) - picture).mean() < 2


def test_padding_of_the_colour_of_a_place_is_shown_though_the_place_is_not_known():
    found = view(planted(256, 64)[0], letterbox((100, 50, 255)))
    assert found.region is None and found.picture.shape == (SIDE, SIDE, 3)
    assert (np.abs(found.picture[3, 3].astype(int) - (100, 50, 255)) <= 1).all()


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(300, 100), (100, 300)])
def test_transforms_of_open_clip(mode: str, size: tuple[int, int]):
    import open_clip

    picture, (left, top, right, bottom) = planted(*size)
    process = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=SIDE, resize_mode=mode, fill_color=40), is_train=False
    )
    found = view(picture, process)
    received = process(Image.fromarray(picture)).permute(1, 2, 0).numpy()
    red = received[..., 0] - received[..., 1]
    rows, columns = np.nonzero(red > 0.9 * red.max())
    seen = (np.array([columns.mean(), rows.mean()]) + 0.5) / SIDE
    extent = np.array([found.region.right - found.region.left, found.region.bottom - found.region.top])
    place = (np.array([(left + right) / 2, (top + bottom) / 2]) - found.region[:2]) / extent
    np.testing.assert_allclose(place, seen, atol=0.6 / SIDE)
    np.testing.assert_allclose(middle_of_red(found.picture), seen, atol=0.8 / SIDE)


def tiles(picture: Image.Image) -> Tensor:
    """The whole picture on the left, its right half on the right."""
    side = SIDE // 2
    whole = picture.resize((side, SIDE))
    half = picture.crop((picture.width // 2, 0, picture.width, picture.height)).resize((side, SIDE))
    return torch.cat([normalised(whole), normalised(half)], 2)


def mirrored(picture: Image.Image) -> Tensor:
    return normalised(picture.resize((SIDE, SIDE))).flip(2)


def turned(picture: Image.Image) -> Tensor:
    return normalised(picture.resize((SIDE, SIDE))).transpose(1, 2)


@pytest.mark.parametrize("process", [tiles, mirrored, turned])
def test_what_is_not_one_box_is_shown_as_the_models_own_pixels(process: Callable[[Image.Image], Tensor]):
    picture, _ = planted(300, 100)
    found = view(picture, process)
    expected = process(Image.fromarray(picture)) * 0.25 + torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    assert found.region is None
    np.testing.assert_allclose(found.picture, expected.permute(1, 2, 0) * 255, atol=1)


def test_colours_that_cannot_be_told_are_shown_as_brightness():
    def grey(picture: Image.Image) -> Tensor:
        return normalised(picture.resize((SIDE, SIDE)).convert("L"))

    def standardised(picture: Image.Image) -> Tensor:
        levels = normalised(picture.resize((SIDE, SIDE)))
        return (levels - levels.mean()) / levels.std()

    picture, _ = planted(100, 100)
    for process in (grey, standardised):
        found = view(picture, process)
        assert found.region is None and found.picture.shape == (SIDE, SIDE, 3)
        red = np.indices((SIDE, SIDE))[:, found.picture[..., 0] != found.picture[0, 0, 0]].mean(1)
        np.testing.assert_allclose(red / SIDE, [0.38, 0.65], atol=0.05)


def test_random_crops_have_no_place():
    process = transforms.Compose([transforms.RandomResizedCrop(SIDE, scale=(0.2, 0.4)), transforms.ToTensor()])
    torch.manual_seed(0)
    assert view(planted(200, 200)[0], process).region is None


def test_channels_in_another_order():
    found = view(planted(100, 100)[0], lambda picture: normalised(picture.resize((SIDE, SIDE))).flip(0))
    assert found.region[:4] == (0.0, 0.0, 100.0, 100.0)
    np.testing.assert_array_equal(found.picture, planted(100, 100)[0])


def test_one_pixel_is_enough_to_be_shown():
    found = view(np.full((1, 1, 3), 200, np.uint8), lambda picture: normalised(picture.resize((SIDE, SIDE))))
    assert found.region is None and np.abs(found.picture.astype(int) - 200).max() <= 1


def test_what_is_known_of_a_processor_goes_with_its_settings_and_with_itself():
    encoder = encoder_with(processor_of("clip"))
    image_processor = encoder.processor.image_processor
    picture, _ = planted(300, 100)
    first = encoder.prepare(picture, "a red square").regions[0]
    assert encoder.prepare(picture, "a red square").regions[0] is first
    image_processor.do_center_crop, image_processor.size = False, SQUARE
    assert encoder.prepare(picture, "a red square").regions[0][:4] == (0.0, 0.0, 300.0, 100.0)
    alive = weakref.ref(image_processor)
    del image_processor, encoder
    gc.collect()
    assert alive() is None


def test_maps_that_are_known_are_not_measured_again():
    calls = 0

    class Counting:
        def __call__(self, picture: Image.Image) -> Tensor:
            nonlocal calls
            calls += 1
            return normalised(picture.resize((SIDE, SIDE)))

    process, (picture, _) = Counting(), planted(90, 60)
    whole = Image.fromarray(picture)
    for _ in range(3):
        view_of(whole, normalised(whole.resize((SIDE, SIDE))), process, process)
    first = calls
    view_of(whole.rotate(90, expand=True), normalised(whole.resize((SIDE, SIDE))), process, process)
    assert first == 7 and calls == 8


@pytest.mark.parametrize("name", ["owlv2", "clip"])
def test_a_mask_is_seen_like_its_picture_and_padding_is_no_part_of_it(name: str):
    from captum_m2ib.audit.decode import cover_of, seen_region

    encoder = encoder_with(processor_of(name))
    mask = Image.new("L", (300, 100), 255)
    cover = cover_of(seen_region(encoder, mask, "a red square"), (6, 6))
    expected = np.ones((6, 6))
    expected[2:] = float(name == "clip")
    np.testing.assert_allclose(cover, expected, atol=0.02)


def test_pixels_that_carry_gradients_and_low_precision_are_read():
    def process(picture: Image.Image) -> Tensor:
        return normalised(picture.resize((SIDE, SIDE))).to(torch.bfloat16).requires_grad_()

    found = view(planted(64, 64)[0], process)
    assert found.picture.shape[2] == 3 and not isinstance(found.picture, Tensor)
