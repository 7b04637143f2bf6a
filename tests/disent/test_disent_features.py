"""Reading a frozen backbone: right grid, model left as found, errors that say what to do."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from disent_models import CLASSES, SIDE, WIDTH, TinyCNN, TinyViT, batches, planted
from torch import nn

from captum_m2ib import PatchLayout
from captum_m2ib.disent import FeatureReader, FeatureSet, InfoDisent

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
        timm = pytest.importorskip("timm")
        backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, embed_dim=24, depth=2).eval()
        layer, shape = "norm", (2, 24, 2, 2)
    elif name == "timm/resnet":
        timm = pytest.importorskip("timm")
        backbone, layer, shape = timm.create_model("resnet18", num_classes=4).eval(), "layer3", (2, 256, 2, 2)
    elif name == "transformers/vit":
        from transformers import ViTConfig, ViTForImageClassification

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
