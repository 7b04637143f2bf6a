"""Captum's tools around the bottleneck: pixels with ids beside them, with embeddings, and with ids where it can be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import captum
import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, LayerAttribution, NoiseTunnel, TokenReferenceBase, visualization
from captum.concept import TCAV, Classifier, Concept
from captum.metrics import infidelity, sensitivity_max
from matplotlib.figure import Figure
from tiny_pairs import FEW, UNKNOWN, Setup, close
from torch import Tensor

from captum_m2ib import LayerMultiModalInfoBottleneck, MultiModalInfoBottleneck
from captum_m2ib.composition import text_records, token_baselines
from captum_m2ib.metrics import infidelity_perturbation, sensitivity_perturbation

FORMS = ["additional", "embeddings"]


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def in_form(setup: Setup, form: str) -> tuple[MultiModalInfoBottleneck, Any, tuple[Tensor, ...]]:
    """The method, what is explained, and the additional arguments."""
    if form == "pair":
        return setup.method, setup.inputs, setup.additional
    if form == "additional":
        return setup.method, setup.pixels, (setup.ids, setup.mask)
    return setup.embedding_method, *setup.embedding.embedded(setup.inputs, setup.additional)


class Watched(MultiModalInfoBottleneck):
    """Keeps what it was asked to attribute."""

    def __init__(self, method: MultiModalInfoBottleneck) -> None:
        self.__dict__.update(vars(method))
        self.seen: list[tuple[Tensor, ...]] = []

    def _run(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(tuple(tensor.detach().clone() for tensor in as_tuple(inputs)))
        return super()._run(inputs, *args, **kwargs)


COMBINE = {
    "smoothgrad": lambda maps: maps.mean(1),
    "smoothgrad_sq": lambda maps: (maps**2).mean(1),
    "vargrad": lambda maps: (maps**2).mean(1) - maps.mean(1) ** 2,
}


@pytest.mark.parametrize(("kind", "batch"), [("smoothgrad", None), ("smoothgrad_sq", 2), ("vargrad", 2)])
@pytest.mark.parametrize("form", FORMS)
def test_noise_tunnel_combines_the_maps_of_noisy_pairs(setup: Setup, form: str, kind: str, batch: int | None):
    method, inputs, additional = in_form(setup, form)
    watched = Watched(method)
    # captum 0.7 fails on one deviation per input.
    several = isinstance(inputs, tuple) and not captum.__version__.startswith("0.7")
    stdevs = (0.3, 0.2) if several else 0.3
    found = NoiseTunnel(watched).attribute(
        inputs,
        nt_type=kind,
        nt_samples=3,
        nt_samples_batch_size=batch,
        stdevs=stdevs,
        additional_forward_args=additional,
        **FEW,
    )
    assert isinstance(found, tuple) == isinstance(inputs, tuple)
    assert [len(seen[0]) for seen in watched.seen] == ([9] if batch is None else [6, 3])
    maps: list[list[Tensor]] = [[] for _ in as_tuple(inputs)]
    for seen in watched.seen:
        draws = len(seen[0]) // 3
        for draw in range(draws):
            noisy = tuple(tensor.unflatten(0, (3, draws))[:, draw] for tensor in seen)
            one = method.attribute(
                noisy if isinstance(inputs, tuple) else noisy[0], additional_forward_args=additional, **FEW
            )
            for kept, attribution in zip(maps, as_tuple(one), strict=True):
                kept.append(attribution)
    for attribution, kept, given in zip(as_tuple(found), maps, as_tuple(inputs), strict=True):
        expected = COMBINE[kind](torch.stack(kept, 1))
        assert attribution.shape == given.shape and float(expected.max()) > 0
        close(attribution, expected, atol=1e-6 * float(expected.max()))


def test_noise_on_token_ids_is_an_error_that_says_so(setup: Setup):
    with pytest.raises(ValueError, match=r"expected integer token ids.*ids cannot be perturbed"):
        NoiseTunnel(setup.method).attribute(
            setup.inputs, stdevs=1e-9, nt_samples=2, additional_forward_args=setup.additional, **FEW
        )


@pytest.mark.parametrize("form", ["pair", *FORMS])
def test_sensitivity_max(setup: Setup, form: str):
    method, inputs, additional = in_form(setup, form)
    # Captum's own perturbation adds noise to everything, which only floating-point inputs survive.
    perturb = {"maskable": setup.maskable, "vocabulary": range(3, 60)} if form == "pair" else None

    def measure(radius: float, watched: Any = method) -> Tensor:
        functions = () if perturb is None else (sensitivity_perturbation(**perturb),)
        return sensitivity_max(
            watched.attribute,
            inputs,
            *functions,
            perturb_radius=radius,
            n_perturb_samples=1,
            additional_forward_args=additional,
            **FEW,
        )

    assert measure(0.0).tolist() == [0, 0, 0]
    watched = Watched(method)
    found = measure(0.4, watched)
    plain, noisy = (
        torch.cat(
            [part.flatten(1) for part in as_tuple(method.attribute(seen, additional_forward_args=additional, **FEW))], 1
        )
        for seen in watched.seen
    )
    expected = (noisy - plain).norm(dim=1) / plain.norm(dim=1)
    assert bool((expected > 1e-3).all())
    close(found, expected, atol=1e-6)


@pytest.mark.parametrize("form", ["pair", *FORMS])
def test_infidelity(setup: Setup, form: str):
    method, inputs, additional = in_form(setup, form)
    attributions = method.attribute(inputs, additional_forward_args=additional, **FEW)
    forward = method.forward_func
    made: list[tuple[Any, Any]] = []
    own = infidelity_perturbation(maskable=setup.maskable, vocabulary=range(3, 60))

    def perturb(given: Any) -> tuple[Any, Any]:
        made.append(own(given))
        return made[-1]

    found = infidelity(
        forward,
        perturb,
        inputs,
        attributions,
        additional_forward_args=additional,
        n_perturb_samples=4,
        max_examples_per_batch=3,
        normalize=True,
    )
    with torch.no_grad():
        score = forward(*as_tuple(inputs), *additional)
        predicted, changed = [], []
        for change, perturbed in made:
            products = [
                (part * bits).flatten(1).sum(1)
                for part, bits in zip(as_tuple(change), as_tuple(attributions), strict=True)
            ]
            predicted.append(sum(products))
            changed.append(score - forward(*as_tuple(perturbed), *additional))
    p, c = torch.stack(predicted), torch.stack(changed)
    scale = (p * c).mean(0) / (p**2).mean(0)
    expected = ((scale * p - c) ** 2).mean(0)
    assert len(made) == 4 and bool((expected > 0).all())
    close(found, expected, atol=1e-6 * float(expected.max()))


@pytest.fixture(scope="module")
def bits(setup: Setup) -> tuple[Tensor, Tensor]:
    found = setup.method.attribute(setup.inputs, additional_forward_args=setup.additional, **FEW)
    assert isinstance(found, tuple)
    return found[0], found[1]


def as_pictures(setup: Setup, bits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Bits, (N, H, W, 1), and pictures, (N, H, W, 3) in [0, 1], as NumPy arrays."""
    pixels = setup.pixels
    shown = (pixels - pixels.amin()) / (pixels.amax() - pixels.amin())
    return bits.sum(1).unsqueeze(-1).numpy(), shown.permute(0, 2, 3, 1).numpy()


def peak(image: Any) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(np.argmax(image), np.shape(image)))


@pytest.mark.parametrize("method", ["heat_map", "blended_heat_map"])
def test_visualize_image_attr(setup: Setup, bits: tuple[Tensor, Tensor], method: str):
    heat, shown = as_pictures(setup, bits[0])
    figure, axis = visualization.visualize_image_attr(
        heat[0], shown[0], method=method, sign="positive", use_pyplot=False, outlier_perc=0
    )
    assert isinstance(figure, Figure)
    drawn = np.asarray(axis.images[-1].get_array())
    assert drawn.shape == (32, 32) and peak(drawn) == peak(heat[0, :, :, 0])
    np.testing.assert_allclose(drawn, heat[0, :, :, 0] / heat[0].max(), rtol=1e-6)


def test_visualize_image_attr_multiple(setup: Setup, bits: tuple[Tensor, Tensor]):
    heat, shown = as_pictures(setup, bits[0])
    figure, axes = visualization.visualize_image_attr_multiple(
        heat[1], shown[1], ["original_image", "blended_heat_map"], ["all", "positive"], use_pyplot=False, outlier_perc=0
    )
    assert isinstance(figure, Figure) and len(axes) == 2
    np.testing.assert_allclose(np.asarray(axes[0].images[0].get_array()), (shown[1] * 255).astype(int), atol=1)
    assert peak(axes[1].images[-1].get_array()) == peak(heat[1, :, :, 0])


def test_visualize_text(setup: Setup, bits: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]):
    tokens = [[f"<{token}></w>" for token in row] for row in setup.ids.tolist()]
    records = text_records(tokens, bits[1], setup.score(), setup.mask)
    page = visualization.visualize_text(records).data
    capsys.readouterr()
    assert [record.attr_score for record in records] == pytest.approx(bits[1].sum(1).tolist())
    marks = re.findall(r"<mark.*?hsl\(\d+, \d+%, (\d+)%\).*?</mark>", page, re.DOTALL)
    assert len(marks) == int(setup.mask.sum())
    # The darkest word of the first caption is the one with the most bits.
    first = [int(lightness) for lightness in marks[:6]]
    assert first.index(min(first)) == int(bits[1][0].argmax())


def test_interpolate(setup: Setup):
    _, record = setup.method.attribute_with_record(setup.inputs, additional_forward_args=setup.additional, **FEW)
    units = record.modalities[0].units
    assert units is not None and units.shape == (3, 4, 4)
    grid = units.unsqueeze(1)
    near = LayerAttribution.interpolate(grid, (32, 32))
    assert near.shape == (3, 1, 32, 32)
    close(near[:, 0, ::8, ::8], units, atol=0)
    close(near.sum((1, 2, 3)) / 64, record.modalities[0].bits - prefix_bits(setup), atol=1e-6)
    smooth = LayerAttribution.interpolate(grid, (32, 32), "bilinear")
    assert smooth.shape == (3, 1, 32, 32) and not torch.equal(smooth, near)


def prefix_bits(setup: Setup) -> Tensor:
    """What the class token carries: in the layer's attribution only."""
    layer = LayerMultiModalInfoBottleneck(setup.encoder, setup.encoder.published_layers()[0])
    return layer.attribute(setup.inputs, additional_forward_args=setup.additional, **FEW)[:, 0].sum(1)


def test_token_reference_base(setup: Setup, bits: tuple[Tensor, Tensor]):
    reference = TokenReferenceBase(reference_token_idx=UNKNOWN).generate_reference(6, device=torch.device("cpu"))
    baseline = token_baselines(setup.ids, setup.maskable, UNKNOWN)
    assert torch.equal(baseline, torch.where(setup.maskable, reference, setup.ids))
    # A caption without words still ends where it ended, so that its bits are those of the same positions.
    silent = setup.method.attribute((setup.pixels, baseline), additional_forward_args=setup.additional, **FEW)
    assert torch.equal(silent[1] > 0, bits[1] > 0) and not torch.allclose(silent[1], bits[1], rtol=0.01)


def test_bits_per_feature_of_the_ablation_family(setup: Setup, bits: tuple[Tensor, Tensor]):
    masks = setup.masks
    count = int(masks[1].max()) + 1
    per_feature = torch.zeros(3, count, dtype=torch.float64)
    for mask, part in zip(masks, bits, strict=True):
        per_feature.scatter_add_(1, mask.flatten(1), part.flatten(1))
    close(per_feature.sum(1), bits[0].sum((1, 2, 3)) + bits[1].sum(1), atol=1e-9 * float(per_feature.max()))
    close(per_feature[:, 17:20], bits[1][:, 1:4].masked_fill(~setup.maskable[:, 1:4], 0), atol=1e-9)
    ablated = FeatureAblation(setup.encoder).attribute(
        setup.inputs, setup.baselines, additional_forward_args=setup.additional, feature_mask=masks
    )
    words = torch.zeros(3, count, dtype=torch.float64).scatter_(1, masks[1], ablated[1].double())
    assert per_feature.shape == words.shape and bool((words[0, 17:21] != 0).all())


LAYER = "model.vision_model.encoder.layers.1"


class Examples(torch.utils.data.IterableDataset):
    """Batches of pairs as one concept: pictures brighter or darker."""

    def __init__(self, setup: Setup, shift: float) -> None:
        self.setup, self.shift = setup, shift

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(int(self.shift > 0))
        for _ in range(4):
            noise = torch.randn(self.setup.pixels.shape, generator=generator, dtype=torch.float64)
            yield (noise + self.shift, self.setup.ids, self.setup.mask)


class Means(Classifier):
    """A concept's direction: from the mean of the others' activations to the mean of its own."""

    def __init__(self) -> None:
        self.labels: list[int] = []
        self.directions = torch.empty(0)

    def train_and_eval(self, dataloader: Any, test_split_ratio: float = 0.33, **kwargs: Any) -> dict[str, float]:
        activations, labels = (torch.cat(parts) for parts in zip(*dataloader, strict=True))
        self.labels = labels.unique().tolist()
        means = torch.stack([activations[labels == label].mean(0) for label in self.labels])
        self.directions = torch.stack([means[0] - means[1], means[1] - means[0]])
        return {}

    def weights(self) -> Tensor:
        return self.directions

    def classes(self) -> list[int]:
        return self.labels


def test_tcav_calls_the_layer_method(setup: Setup, tmp_path: Path):
    method = LayerMultiModalInfoBottleneck(setup.encoder, setup.encoder.model.text_model)
    tcav = TCAV(setup.encoder, LAYER, "tiny", classifier=Means(), layer_attr_method=method, save_path=str(tmp_path))
    bright, dark = (Concept(i, name, Examples(setup, s)) for i, (name, s) in enumerate((("a", 1.0), ("b", -1.0))))
    scores = tcav.interpret(setup.inputs, [[bright, dark]], additional_forward_args=setup.additional, **FEW)
    found = scores["0-1"][LAYER]
    assert method.layer is setup.encoder.get_submodule(LAYER)
    bits = method.attribute(setup.inputs, additional_forward_args=setup.additional, **FEW).flatten(1)
    weights = tcav.cavs["0-1"][LAYER].stats["weights"].float()
    expected = (bits.float() @ weights.T).mean(0)
    close(found["magnitude"], expected, atol=1e-5 * float(expected.abs().max()))
    assert bool((expected != 0).all()) and found["sign_count"].shape == (2,)
