"""Reading a frozen backbone: right grid, model left as found, errors that say what to do."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from disent_models import CLASSES, SIDE, WIDTH, TinyCNN, TinyViT, batches, planted
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    GroupViTVisionConfig,
    GroupViTVisionModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from captum_m2ib import PatchLayout
from captum_m2ib.disent import FeatureReader, FeatureSet, InfoDisent, InfoDisentAttribution
from captum_m2ib.disent._grid import cell_box, covered, to_grid

IMAGES, LABELS = planted(20)


def snapshot(module: nn.Module) -> list:
    state: list = [nn.Module.__call__, torch.is_grad_enabled()]
    for name, part in module.named_modules():
        hooks = [dict(value) for key, value in vars(part).items() if key.endswith("_hooks")]
        state.append((name, part.training, hooks, "forward" in vars(part)))
    for name, parameter in module.named_parameters():
        state.append((name, parameter.requires_grad, parameter.grad, parameter._version))
    state += [(name, buffer._version, buffer.tolist()) for name, buffer in module.named_buffers()]
    return state


def test_convolutional_features_are_the_layers_output():
    backbone = TinyCNN()
    features, output = FeatureReader(backbone, "body").read(IMAGES)
    torch.testing.assert_close(features, backbone.body(IMAGES))
    torch.testing.assert_close(output, backbone(IMAGES))
    assert features.shape == (20, WIDTH, 4, 4)


@pytest.mark.parametrize("layout", [None, "given"])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_tokens_become_the_grid_row_by_row(prefix, layout):
    backbone = TinyViT(prefix)
    images = torch.randn(2, 1, 6, 10)
    given = None if layout is None else PatchLayout((2, 2), prefix)
    features, _ = FeatureReader(backbone, "block", given).read(images)
    assert features.shape == (2, WIDTH, 3, 5)
    for row, column in ((0, 3), (2, 1), (2, 4)):
        expected = backbone.block.inner(backbone.embed(images)[1, :, row, column])
        torch.testing.assert_close(features[1, :, row, column], expected)


def test_channels_last():
    class Last(nn.Module):
        def forward(self, images):
            return images.permute(0, 2, 3, 1)

    backbone = nn.Sequential(Last()).eval()
    features, _ = FeatureReader(backbone, "0", channels_last=True).read(IMAGES)
    torch.testing.assert_close(features, IMAGES)


@pytest.mark.parametrize("name", ["timm/vit", "timm/resnet", "transformers/vit", "torchvision-like"])
def test_real_families(name):
    images = torch.randn(2, 3, 32, 32)
    if name == "timm/vit":
        import timm

        backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, embed_dim=24, depth=2).eval()
        layer, shape = "norm", (2, 24, 2, 2)
    elif name == "timm/resnet":
        import timm

        backbone, layer, shape = timm.create_model("resnet18", num_classes=4).eval(), "layer3", (2, 256, 2, 2)
    elif name == "transformers/vit":
        config = ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
        )
        backbone, layer, shape = ViTForImageClassification(config).eval(), "vit.layernorm", (2, 24, 4, 4)
    else:
        backbone, layer, shape = TinyViT(2), "block", (2, WIDTH, 4, 4)
        images = IMAGES[:2]
    before = snapshot(backbone)
    assert FeatureReader(backbone, layer).read(images)[0].shape == shape
    assert snapshot(backbone) == before


@pytest.fixture(scope="module")
def swin() -> SwinForImageClassification:
    """Tokens of 2 x 2 pixels, merged twice."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = SwinConfig(
            image_size=32, patch_size=2, embed_dim=12, depths=[1, 1, 2], num_heads=[2, 2, 2], window_size=4
        )
        return SwinForImageClassification(config).eval()


@pytest.fixture(scope="module")
def convnext() -> ConvNextForImageClassification:
    """Patches of 4 x 4 pixels, merged twice; blocks work with channels last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ConvNextConfig(num_stages=3, hidden_sizes=[8, 16, 24], depths=[1, 2, 1])
        return ConvNextForImageClassification(config).eval()


class Wrapped(nn.Module):
    """A classifier two names deeper."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"model": model})
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.inner["model"](images).logits


def seen_at(backbone: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What the layer returns, as it is."""
    found: list[Tensor] = []
    handle = backbone.get_submodule(layer).register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        backbone(images)
    handle.remove()
    return found[0]


# Sides that patches and merging divide, unequal ones, and ones that Swin pads before it merges.
@pytest.mark.parametrize("size", [(32, 32), (48, 32), (36, 28)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_tokens_of_every_stage_of_swin_are_its_own_grids(swin, size, wrapped):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = swin.swin(images, output_hidden_states=True).reshaped_hidden_states
    backbone, start = (Wrapped(swin), "inner.model.") if wrapped else (swin, "")
    for stage, layer in enumerate(("embeddings", "encoder.layers.0", "encoder.layers.1", "encoder")):
        features, _ = FeatureReader(backbone, f"{start}swin.{layer}").read(images)
        assert torch.equal(features, own[stage]), layer
    found, _ = FeatureReader(backbone, swin.swin.layernorm).read(images)
    torch.testing.assert_close(found, swin.swin.layernorm(own[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2).detach())


def test_infodisent_on_swin_without_flags(swin):
    images = torch.randn(6, 3, 48, 32, generator=torch.Generator().manual_seed(2))
    model = InfoDisent(swin, "swin.layernorm", CLASSES)
    model.fit([(images, torch.tensor([0, 1, 2, 0, 1, 2]))], epochs=1, validation_share=0.0)
    maps = InfoDisentAttribution(model).attribute(images, target=1)
    torch.testing.assert_close(maps.sum((1, 2, 3)), model(images)[:, 1].detach())
    # A cell of the coarsest grid stands for 8 x 8 pixels, all of one value.
    cells = maps.unflatten(3, (4, 8)).unflatten(2, (6, 8))
    torch.testing.assert_close(cells, cells[:, :, :, :1, :, :1].expand_as(cells))


def test_windows_among_the_examples_are_refused(swin):
    reader = FeatureReader(swin, "swin.encoder.layers.0.blocks.0.attention")
    with pytest.raises(ValueError, match=r"^layer: .* for N = 2 images, got \(32, 16, 12\).* outside of windows"):
        reader.read(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (40, 40)])
def test_channels_of_convnext_are_found_first_and_last(convnext, size):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    for layer in ("convnext.embeddings", "convnext.encoder.stages.1.layers.0.dwconv"):
        found, _ = FeatureReader(convnext, layer).read(images)
        assert torch.equal(found, seen_at(convnext, layer, images)), layer
    for layer in ("convnext.encoder.stages.0.layers.0.pwconv1", "convnext.encoder.stages.1.layers.1.pwconv2"):
        found, _ = FeatureReader(convnext, layer).read(images)
        assert torch.equal(found, seen_at(convnext, layer, images).permute(0, 3, 1, 2)), layer
    last, _ = FeatureReader(convnext, "convnext.encoder").read(images)
    assert last.shape == (2, 24, size[0] // 16, size[1] // 16)


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_hierarchical_maps_with_channels_last(size, flag):
    class Stage(nn.Module):
        def __init__(self, inputs: int, stride: int) -> None:
            super().__init__()
            self.merge = nn.Conv2d(inputs, WIDTH, stride, stride)

        def forward(self, maps: Tensor) -> Tensor:
            return self.merge(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.Sequential(Stage(1, 4), Stage(WIDTH, 2))
            self.eval()

        def forward(self, images: Tensor) -> Tensor:
            return self.stages(images.permute(0, 2, 3, 1)).mean((1, 2))

    backbone, images = Trunk(), torch.randn(2, 1, *size)
    for layer in ("stages.0", "stages.1"):
        found, _ = FeatureReader(backbone, layer, channels_last=flag).read(images)
        assert torch.equal(found, seen_at(backbone, layer, images).permute(0, 3, 1, 2))


def test_as_many_channels_as_rows_are_still_channels_first():
    # (16, 8) is the grid of single pixels, so that 16 channels of 8 x 4 cells might be 16 x 8 cells of 4 channels.
    backbone = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1)).eval()
    images = torch.randn(2, 1, 16, 8)
    assert torch.equal(FeatureReader(backbone, "0").read(images)[0], backbone(images))


def test_a_narrow_grid_is_not_taken_for_a_column_of_cells():
    # Merging rounds 24 x 16 pixels up to 2 x 1 cells.
    hidden, images = torch.randn(2, 2, 1, 5), torch.randn(2, 1, 24, 16)
    assert torch.equal(to_grid(hidden, images, PatchLayout((4, 4))), hidden.permute(0, 3, 1, 2))


def test_suffix_tokens_are_dropped():
    class Around(nn.Module):
        patch_size = 2

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.all = nn.Conv2d(1, WIDTH, 2, 2), nn.Identity()
            self.eval()

        def forward(self, images: Tensor) -> Tensor:
            patches = self.embed(images).flatten(2).transpose(1, 2)
            before, after = torch.full((len(images), 1, WIDTH), 7.0), torch.full((len(images), 2, WIDTH), 9.0)
            return self.all(torch.cat([before, patches, after], 1)).mean(1)

    backbone, images = Around(), torch.randn(2, 1, 6, 8)
    found, _ = FeatureReader(backbone, "all", PatchLayout((2, 2), prefix=1, suffix=2)).read(images)
    torch.testing.assert_close(found, backbone.embed(images))
    with pytest.raises(ValueError, match=r"^layout: expected 2 prefix tokens and a grid of 3 x 4 patches \("):
        FeatureReader(backbone, "all", PatchLayout((2, 2), prefix=2, suffix=2)).read(images)


def test_group_tokens_of_groupvit_are_known():
    config = GroupViTVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        depths=[1, 1],
        num_hidden_layers=2,
        num_group_tokens=[5, 3],
        num_output_groups=[5, 3],
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    backbone, images = GroupViTVisionModel(config).eval(), torch.randn(2, 3, 16, 16)
    layer = "vision_model.encoder.stages.0.layers.0"
    found, _ = FeatureReader(backbone, layer).read(images)
    hidden = seen_at(backbone, layer, images)
    assert hidden.shape[1] == 16 + 5 and torch.equal(found.flatten(2).transpose(1, 2), hidden[:, :16])


def test_single_pixels_may_be_patches():
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 4, "patch_size": 1}
    config = ViTConfig(num_hidden_layers=1, **sizes)
    backbone, images = ViTForImageClassification(config).eval(), torch.randn(2, 3, 4, 4)
    found, _ = FeatureReader(backbone, "vit.layernorm").read(images)
    assert torch.equal(found.flatten(2).transpose(1, 2), seen_at(backbone, "vit.layernorm", images)[:, 1:])


@pytest.mark.parametrize(
    ("size", "grid", "patch", "expected"),
    [
        ((40, 40), (10, 10), (4, 4), (40, 40)),
        ((40, 40), (2, 2), (4, 4), (32, 32)),
        ((40, 70), (2, 4), (4, 4), (32, 64)),
        ((36, 28), (5, 4), (2, 2), (36, 28)),
        ((33, 33), (8, 8), (4, 4), (32, 32)),
        ((33, 33), (9, 9), (4, 4), (33, 33)),
        ((33, 33), (8, 8), None, (33, 33)),
    ],
)
def test_what_a_grid_covers(size, grid, patch, expected):
    assert covered(size, grid, patch) == expected
    assert cell_box((grid[0] - 1, grid[1] - 1), grid, size, patch)[2:] == expected


@pytest.mark.parametrize("failing", [False, True])
def test_left_as_found_also_when_it_fails(failing):
    class Failing(nn.Module):
        def forward(self, tensor):
            raise ZeroDivisionError

    backbone = TinyCNN().train()
    backbone.fc.weight.requires_grad_(False)
    backbone.body[2].eval()
    if failing:
        backbone.fc = Failing()
    before = snapshot(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = FeatureReader(backbone, "body")
        if failing:
            with pytest.raises(ZeroDivisionError):
                reader.read(IMAGES)
        else:
            # Batch norm and dropout behave as in eval mode although the backbone is in training mode.
            assert torch.equal(reader.read(IMAGES)[0], reader.read(IMAGES[:20])[0])
    assert snapshot(backbone) == before


def test_a_whole_fit_leaves_the_backbone_as_found():
    backbone = TinyCNN()
    before = snapshot(backbone)
    model = InfoDisent(backbone, "body", CLASSES)
    model.fit(batches(IMAGES, LABELS), epochs=2)
    model.fit(batches(IMAGES, LABELS), epochs=2, cache=False)
    model.contributions(IMAGES)
    assert snapshot(backbone) == before
    assert not any(name.startswith("reader") for name, _ in model.named_parameters())
    assert not any(parameter is known for parameter in model.parameters() for known in backbone.parameters())


def test_gradients_reach_the_images_only(fitted):
    images = IMAGES.clone().requires_grad_()
    fitted(images)[:, 0].sum().backward()
    assert float(images.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in fitted.backbone.parameters())
    with torch.no_grad():
        assert not fitted(images).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(fitted(IMAGES), fitted(images).detach())
    fitted.zero_grad(set_to_none=True)


def test_two_threads_read_one_backbone():
    backbone = TinyCNN()
    expected = backbone.body(IMAGES).detach()
    found: list = []

    def work():
        reader = FeatureReader(backbone, "body")
        found.extend(reader.read(IMAGES)[0] for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    for features in found:
        torch.testing.assert_close(features.detach(), expected)


def test_collect_joins_batches_and_knows_repeated_pictures():
    images = torch.cat([IMAGES[:5], IMAGES[2:4], IMAGES[5:9]])
    reader = FeatureReader(TinyCNN(), "body")
    found = reader.collect(batches(images, LABELS[:11], 4))
    torch.testing.assert_close(found.features, reader.read(images)[0].detach())
    assert found.ids.tolist() == [0, 1, 2, 3, 4, 2, 3, 5, 6, 7, 8]
    assert torch.equal(found.labels, LABELS[:11]) and found.size == (SIDE, SIDE)
    named = reader.collect([{"pixel_values": IMAGES[:3], "labels": LABELS[:3], "ids": torch.tensor([7, 7, 9])}])
    assert named.ids.tolist() == [7, 7, 9]


def test_a_layer_that_runs_twice_needs_a_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, images):
            return self.conv(self.conv(images))

    backbone = Twice().eval()
    with pytest.raises(RuntimeError, match=r"called layer 'conv' 2 times; say which call"):
        FeatureReader(backbone, "conv").read(IMAGES)
    once, twice = (FeatureReader(backbone, ("conv", call)).read(IMAGES)[0].detach() for call in (0, 1))
    torch.testing.assert_close(twice, backbone.conv(once).detach())
    with pytest.raises(RuntimeError, match="has no call 2"):
        FeatureReader(backbone, ("conv", 2)).read(IMAGES)


def test_a_layer_that_never_runs():
    backbone = TinyViT(pool="mean")
    with pytest.raises(RuntimeError, match="never called layer 'norm'"):
        FeatureReader(backbone, "norm").read(IMAGES)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: FeatureReader(TinyCNN(), "bdy").read(IMAGES), ValueError, "no layer named 'bdy'"),
        (lambda: FeatureReader("resnet", "body"), TypeError, "^backbone: expected a torch module, got str"),
        (lambda: FeatureReader(TinyCNN(), "fc").read(IMAGES), ValueError, "choose a layer before the positions"),
        (lambda: FeatureReader(TinyCNN(), "body").read(IMAGES[0]), ValueError, "^images: expected a tensor of shape"),
        (lambda: FeatureReader(TinyCNN(), "body").read(IMAGES[:0]), ValueError, "^images: expected"),
        (
            lambda: FeatureReader(TinyViT(1), "block", PatchLayout((2, 2), 2)).read(IMAGES),
            ValueError,
            r"^layout: expected 2 prefix tokens and a grid of 4 x 4 patches .* got .* of shape \(20, 17, 6\)",
        ),
        (
            lambda: FeatureReader(nn.Sequential(nn.Flatten(2)).eval(), "0").read(IMAGES),
            ValueError,
            "^layout: cannot tell the patch size",
        ),
        (lambda: FeatureReader(TinyCNN(), "body").collect([]), ValueError, "^loader: expected at least one batch"),
        (lambda: FeatureReader(TinyCNN(), "body").collect(["path.png"]), ValueError, "^loader: expected batches"),
        (
            lambda: FeatureReader(TinyCNN(), "body").collect([IMAGES, IMAGES[..., :6, :6]]),
            ValueError,
            "^loader: expected features of one shape",
        ),
        (lambda: FeatureReader(TinyCNN(), "body").read(IMAGES / 0), ValueError, "^features: .* NaN or infinity in"),
        (lambda: FeatureSet(torch.zeros(3, 4)), ValueError, r"^features: expected .* got torch.float32 \(3, 4\)"),
        (lambda: FeatureSet(torch.zeros(3, 4, 2, 2).long()), ValueError, "^features: expected a floating-point"),
        (lambda: FeatureSet(torch.zeros(0, 4, 2, 2)), ValueError, "^features: expected at least one example"),
        (lambda: FeatureSet(torch.full((3, 4, 2, 2), torch.nan)), ValueError, "in 48 of 48 values"),
        (lambda: FeatureSet(torch.zeros(3, 4, 2, 2), torch.zeros(2)), ValueError, "^labels: expected one per row"),
    ],
)
def test_bad_input_is_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("place", ["transformers", "clip", "timm", "own", "layout"])
def test_patch_size_is_found_where_families_keep_it(place):
    from types import SimpleNamespace

    backbone, layout = TinyViT(1), None
    backbone.patch_size = None
    if place == "transformers":
        backbone.config = SimpleNamespace(patch_size=[2, 2])
    elif place == "clip":
        backbone.config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=2))
    elif place == "timm":
        backbone.patch_embed = nn.Identity().eval()
        backbone.patch_embed.patch_size = (2, 2)
    elif place == "own":
        backbone.patch_size = 2
    else:
        backbone.patch_size, layout = 4, PatchLayout((2, 2), 1)
    reader = FeatureReader(backbone, "block", layout)
    assert reader.patch == (2, 2) and reader.read(IMAGES)[0].shape == (20, WIDTH, 4, 4)
