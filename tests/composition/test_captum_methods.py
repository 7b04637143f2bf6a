"""Captum's own methods on the dual encoder: each with a property that only the right numbers have."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from captum._utils.models.linear_model import SkLearnLinearRegression
from captum.attr import (
    DeepLift,
    FeatureAblation,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    LayerIntegratedGradients,
    Lime,
    Occlusion,
    Saliency,
    ShapleyValueSampling,
    configure_interpretable_embedding_layer,
    remove_interpretable_embedding_layer,
)
from families import family_named
from tiny_pairs import Setup, close
from torch import Tensor

from captum_m2ib.composition import feature_masks


def embedded(setup: Setup) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """Pixels and embeddings that ask for gradients, additional arguments, and baselines."""
    (pixels, embeddings), additional = setup.embedding.embedded(setup.inputs, setup.additional)
    silent = setup.embedding.embed(setup.pixels, setup.baselines[1], *setup.additional)
    inputs = (pixels.clone().requires_grad_(), embeddings.clone().requires_grad_())
    return inputs, additional, (torch.zeros_like(pixels), silent)


def total(attributions: Any) -> Tensor:
    parts = attributions if isinstance(attributions, tuple) else (attributions,)
    return sum(part.detach().flatten(1).sum(1) for part in parts)


def gradients(setup: Setup) -> tuple[Tensor, ...]:
    inputs, additional, _ = embedded(setup)
    return torch.autograd.grad(setup.embedding(*inputs, *additional).sum(), inputs)


def test_saliency(setup: Setup):
    expected = gradients(setup)
    inputs, additional, _ = embedded(setup)
    found = Saliency(setup.embedding).attribute(inputs, additional_forward_args=additional)
    for attribution, gradient in zip(found, expected, strict=True):
        close(attribution, gradient.abs())
    pixels = Saliency(setup.encoder).attribute(inputs[0], additional_forward_args=(setup.ids, setup.mask))
    close(pixels, expected[0].abs())


def test_input_x_gradient(setup: Setup):
    inputs, additional, _ = embedded(setup)
    found = InputXGradient(setup.embedding).attribute(inputs, additional_forward_args=additional)
    for attribution, gradient, given in zip(found, gradients(setup), inputs, strict=True):
        close(attribution.detach(), (gradient * given).detach())
    pixels = InputXGradient(setup.encoder).attribute(inputs[0], additional_forward_args=(setup.ids, setup.mask))
    close(pixels, found[0])


def test_integrated_gradients_of_pixels_are_complete(setup: Setup):
    found = IntegratedGradients(setup.encoder).attribute(
        setup.pixels, additional_forward_args=(setup.ids, setup.mask), n_steps=128
    )
    difference = setup.score() - setup.score(torch.zeros_like(setup.pixels))
    assert bool((difference.abs() > 0.01).all())
    close(total(found), difference, atol=1e-4)


def test_integrated_gradients_of_pixels_and_tokens_are_complete(setup: Setup):
    inputs, additional, baselines = embedded(setup)
    found = IntegratedGradients(setup.embedding).attribute(
        inputs, baselines, additional_forward_args=additional, n_steps=128, internal_batch_size=96
    )
    difference = setup.score() - setup.score(torch.zeros_like(setup.pixels), setup.baselines[1])
    close(total(found), difference, atol=1e-4)
    words = found[1].sum(-1).detach()
    assert torch.equal(words != 0, setup.maskable)


def test_layer_integrated_gradients_of_tokens_agree(setup: Setup):
    """Captum's own way to tokens: a layer, and ids in the baseline that keep the pooled position."""
    inputs, additional, baselines = embedded(setup)
    expected = IntegratedGradients(lambda embeddings, pixels, ids, mask: setup.embedding(pixels, embeddings, ids, mask))
    tokens = expected.attribute(
        inputs[1], baselines[1], additional_forward_args=(setup.pixels, *additional), n_steps=64
    )
    layer = LayerIntegratedGradients(
        lambda ids, pixels, mask: setup.encoder(pixels, ids, mask), setup.encoder.model.text_model.embeddings
    )
    found = layer.attribute(
        setup.ids, setup.baselines[1], additional_forward_args=(setup.pixels, setup.mask), n_steps=64
    )
    close(found, tokens.detach(), atol=1e-7)


def test_gradient_shap_is_the_gradient_at_random_points_between(setup: Setup):
    inputs, additional, baselines = embedded(setup)
    seen: list[tuple[Tensor, ...]] = []

    def watched(*arguments: Tensor) -> Tensor:
        seen.append(tuple(argument.detach() for argument in arguments))
        return setup.embedding(*arguments)

    first = tuple(baseline[:1] for baseline in baselines)
    found, delta = GradientShap(watched).attribute(
        inputs,
        first,
        additional_forward_args=additional,
        n_samples=5,
        stdevs=0.0,
        return_convergence_delta=True,
    )
    pixels, embeddings, *rest = seen[0]
    points = (pixels.requires_grad_(), embeddings.requires_grad_())
    slopes = torch.autograd.grad(setup.embedding(*points, *rest).sum(), points)
    for attribution, slope, given, baseline in zip(found, slopes, inputs, first, strict=True):
        expected = slope.unflatten(0, (3, 5)).mean(1) * (given.detach() - baseline)
        close(attribution.detach(), expected)
    # The points are between input and baseline, and not all the same.
    shares = points[0].detach().flatten(1)[:, 0] / inputs[0].detach().repeat_interleave(5, 0).flatten(1)[:, 0]
    assert bool(((shares >= 0) & (shares <= 1)).all()) and float(shares.std()) > 0.1
    assert delta.shape == (15,)


def test_deep_lift_uses_its_rules_on_relu_towers():
    """For a picture tower of ReLUs the rules are exact up to the embedding; the cosine adds its gradient there."""
    case = family_named("conv_maps").build().double()
    pixels, ids = case.inputs
    baseline = torch.zeros_like(pixels)
    with pytest.warns(UserWarning, match="Setting forward, backward hooks"):
        found = DeepLift(case.forward).attribute(
            pixels.clone().requires_grad_(), baseline, additional_forward_args=(ids, *case.additional)
        )
    image, text = case.roots
    with torch.no_grad():
        before, after, caption = image(baseline), image(pixels), text(ids, *case.additional)
    after = after.clone().requires_grad_()
    score = torch.nn.functional.cosine_similarity(after, caption)
    (direction,) = torch.autograd.grad(score.sum(), after)
    expected = (direction * (after.detach() - before)).sum(1)
    assert bool((expected.abs() > 1e-3).all())
    close(total(found), expected, atol=1e-8)
    plain = InputXGradient(case.forward).attribute(
        pixels.clone().requires_grad_(), additional_forward_args=(ids, *case.additional)
    )
    assert bool(((total(plain) - expected).abs() > 1e-3).all())


def test_deep_lift_on_transformers_is_the_gradient(setup: Setup):
    """It has rules for a few modules of torch and takes the gradient of everything else, such as CLIP's GELU."""
    inputs, additional, baselines = embedded(setup)
    with pytest.warns(UserWarning, match="Setting forward, backward hooks"):
        found = DeepLift(setup.embedding).attribute(inputs, baselines, additional_forward_args=additional)
    for attribution, gradient, given, baseline in zip(found, gradients(setup), inputs, baselines, strict=True):
        close(attribution.detach(), (gradient * (given - baseline)).detach())


def without(setup: Setup, feature: int) -> Tensor:
    """The score with one feature at its baseline."""
    pixels, ids = setup.masks
    return setup.score(
        setup.pixels.masked_fill(pixels == feature, 0), torch.where(ids == feature, setup.baselines[1], setup.ids)
    )


def check_differences(setup: Setup, image: Tensor, text: Tensor) -> None:
    score = setup.score()
    for feature in range(16):
        row, column = divmod(feature, 4)
        found = image[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].detach()
        expected = (score - without(setup, feature)).view(3, 1, 1, 1).expand_as(found)
        close(found.double(), expected, atol=1e-6)
    for position in range(6):
        ids = setup.ids.clone()
        ids[:, position] = setup.baselines[1][:, position]
        expected = score - setup.score(ids=ids)
        close(text[:, position].detach().double(), expected, atol=1e-6)
        assert torch.equal(expected != 0, setup.maskable[:, position])


@pytest.mark.parametrize("evaluations", [1, 5])
def test_feature_ablation_is_the_difference(setup: Setup, evaluations: int):
    image, text = FeatureAblation(setup.encoder).attribute(
        setup.inputs,
        setup.baselines,
        additional_forward_args=setup.additional,
        feature_mask=setup.masks,
        perturbations_per_eval=evaluations,
    )
    check_differences(setup, image, text)


def test_feature_ablation_of_pixels_alone(setup: Setup):
    mask = feature_masks(setup.encoder.layouts, setup.pixels, (setup.ids, setup.mask))
    found = FeatureAblation(setup.encoder).attribute(
        setup.pixels, 0, additional_forward_args=(setup.ids, setup.mask), feature_mask=mask
    )
    close(found[:, 0, 9, 17].double(), setup.score() - without(setup, 6), atol=1e-6)


def test_occlusion_is_the_difference(setup: Setup):
    image, text = Occlusion(setup.encoder).attribute(
        setup.inputs,
        sliding_window_shapes=((3, 8, 8), (1,)),
        strides=((3, 8, 8), 1),
        baselines=setup.baselines,
        additional_forward_args=setup.additional,
    )
    check_differences(setup, image, text)


def few_features(setup: Setup) -> tuple[Tensor, ...]:
    """Four quarters of the picture, then the words."""
    masks = feature_masks(setup.encoder.layouts, setup.inputs, setup.additional, setup.maskable, cell=(16, 16))
    assert isinstance(masks, tuple)
    return masks


def per_feature(masks: tuple[Tensor, ...], attributions: Any) -> Tensor:
    """One value per feature, (N, features); Captum gives every element its feature's."""
    values = torch.zeros(len(masks[0]), int(max(mask.max() for mask in masks)) + 1, dtype=torch.float64)
    for mask, part in zip(masks, attributions, strict=True):
        values.scatter_(1, mask.flatten(1), part.detach().double().flatten(1))
    return values


def test_sampled_shapley_values_are_complete(setup: Setup):
    found = ShapleyValueSampling(setup.encoder).attribute(
        setup.inputs,
        setup.baselines,
        additional_forward_args=setup.additional,
        feature_mask=setup.masks,
        n_samples=2,
        perturbations_per_eval=4,
    )
    difference = setup.score() - setup.score(torch.zeros_like(setup.pixels), setup.baselines[1])
    values = per_feature(setup.masks, found)
    close(values.sum(1), difference, atol=1e-5)
    close(values[:, 16], torch.zeros(3, dtype=torch.float64), atol=1e-12)


def coalitions(setup: Setup, masks: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Every choice of features that are kept, (2^n, n), and the score of each, for one pair."""
    count = int(masks[1].max()) + 1
    chosen = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * count).double()
    scores = []
    for row in chosen.bool():
        pixels = torch.where(row[masks[0]], setup.pixels, 0.0)
        scores.append(setup.score(pixels, torch.where(row[masks[1]], setup.ids, setup.baselines[1])))
    return chosen, torch.cat(scores)


def weighted_fit(chosen: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
    """Coefficients of the weighted linear fit, without the constant."""
    design = torch.cat([chosen, torch.ones(len(chosen), 1).double()], 1) * weights.sqrt()[:, None]
    solution = torch.linalg.lstsq(design, (scores * weights.sqrt())[:, None], driver="gelsd").solution
    return solution[:-1, 0]


def shapley_values(chosen: Tensor, scores: Tensor) -> Tensor:
    """The mean over all orders of what a feature adds to those before it, from the score of every coalition."""
    count = chosen.shape[1]
    values = torch.zeros(count, dtype=torch.float64)
    for row, score in zip(chosen.bool().tolist(), scores.tolist(), strict=True):
        size = sum(row)
        for feature, is_in in enumerate(row):
            if is_in:
                values[feature] += score / (count * math.comb(count - 1, size - 1))
            else:
                values[feature] -= score / (count * math.comb(count - 1, size))
    return values


def test_kernel_shap_comes_to_the_shapley_values(setup: Setup):
    one = setup.row(1)
    masks = few_features(one)
    found = KernelShap(one.encoder).attribute(
        one.inputs,
        one.baselines,
        additional_forward_args=one.additional,
        feature_mask=masks,
        n_samples=1000,
        perturbations_per_eval=50,
    )
    values = per_feature(masks, found)[0]
    chosen, scores = coalitions(one, masks)
    expected = shapley_values(chosen, scores)
    close(expected.sum(), scores[-1] - scores[0])
    close(values.sum(), expected.sum(), atol=1e-3)
    close(values, expected, atol=0.15 * float(expected.abs().max()))


def by_features(original: Any, perturbed: Any, kept: Tensor, **kwargs: Any) -> Tensor:
    """How near a sample is: Lime's own measure compares ids as if they were numbers."""
    return torch.exp(kept.sum() - kept.numel())


def test_lime_is_the_weighted_linear_fit(setup: Setup):
    one = setup.row(1)
    masks = few_features(one)
    chosen, scores = coalitions(one, masks)

    found = Lime(one.encoder, interpretable_model=SkLearnLinearRegression(), similarity_func=by_features).attribute(
        one.inputs,
        one.baselines,
        additional_forward_args=one.additional,
        feature_mask=masks,
        n_samples=800,
        perturbations_per_eval=50,
    )
    values = per_feature(masks, found)[0]
    expected = weighted_fit(chosen, scores, torch.exp(chosen.sum(1) - chosen.shape[1]))
    close(values, expected, atol=0.15 * float(expected.abs().max()))


PERTURBING: list[tuple[Any, dict[str, Any]]] = [
    (FeatureAblation, {}),
    (Occlusion, {}),
    (ShapleyValueSampling, {"n_samples": 2}),
    (KernelShap, {"n_samples": 40}),
    # Its own fit, a lasso, sets differences as small as those of cosines to zero.
    (partial(Lime, interpretable_model=SkLearnLinearRegression(), similarity_func=by_features), {"n_samples": 40}),
]


def perturbed(method: Any, inputs: Any, baselines: Any, masks: Any, additional: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    if isinstance(method, Occlusion):
        shapes = [(3, 16, 16), (1,), (1, 32)]
        windows = shapes[0] if isinstance(inputs, Tensor) else (shapes[0], shapes[inputs[1].ndim - 1])
        options |= {"sliding_window_shapes": windows, "strides": windows}
    else:
        options["feature_mask"] = masks
    return method.attribute(inputs, baselines=baselines, additional_forward_args=additional, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    PERTURBING,
    ids=lambda value: "" if isinstance(value, dict) else getattr(value, "__name__", "Lime"),
)
def test_words_taken_away_as_ids_or_as_embeddings(setup: Setup, kind: Any, options: dict[str, Any]):
    one = setup.row(1)
    inputs, additional, (_, silent) = embedded(one)
    masks = feature_masks(one.embedding.layouts, inputs, additional, one.maskable, cell=(16, 16))
    found = perturbed(kind(one.embedding), inputs, (0, silent), masks, additional, **options)
    expected = perturbed(kind(one.encoder), one.inputs, one.baselines, few_features(one), one.additional, **options)
    close(found[0].detach().double(), expected[0].detach().double(), atol=1e-6)
    words = found[1].detach().double()
    close(words, expected[1].detach().double()[..., None].expand_as(words), atol=1e-6)
    assert float(expected[0].detach().abs().max()) > 1e-3 and float(expected[1].detach().abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("kind", "options"),
    PERTURBING,
    ids=lambda value: "" if isinstance(value, dict) else getattr(value, "__name__", "Lime"),
)
def test_pixels_taken_away_with_the_caption_beside_or_closed_over(setup: Setup, kind: Any, options: dict[str, Any]):
    one = setup.row(1)
    mask = few_features(one)[0]
    found = perturbed(kind(one.encoder), one.pixels, 0, mask, (one.ids, one.mask), **options)

    def closed(pixels: Tensor) -> Tensor:
        return one.encoder(pixels, one.ids.expand(len(pixels), -1), one.mask.expand(len(pixels), -1))

    expected = perturbed(kind(closed), one.pixels, 0, mask, None, **options)
    close(found.detach(), expected.detach(), atol=1e-6)
    assert float(expected.detach().abs().max()) > 1e-3


def test_layer_integrated_gradients_of_both_towers_are_complete(setup: Setup):
    model = setup.encoder.model
    layers = [model.vision_model.embeddings.patch_embedding, model.text_model.embeddings]
    difference = setup.score() - setup.score(torch.zeros_like(setup.pixels), setup.baselines[1])
    with pytest.warns(UserWarning, match="Multiple layers provided"):
        method = LayerIntegratedGradients(setup.encoder, layers)
    both = method.attribute(
        setup.inputs,
        (torch.zeros_like(setup.pixels), setup.baselines[1]),
        additional_forward_args=setup.additional,
        n_steps=128,
    )
    assert [part.shape for part in both] == [(3, 32, 4, 4), (3, 6, 32)]
    close(total(tuple(both)), difference, atol=1e-4)
    pixels = LayerIntegratedGradients(setup.encoder, layers[0]).attribute(
        setup.pixels, additional_forward_args=(setup.ids, setup.mask), n_steps=128
    )
    close(total(pixels), setup.score() - setup.score(torch.zeros_like(setup.pixels)), atol=1e-4)


@pytest.mark.parametrize("kind", [Saliency, InputXGradient, IntegratedGradients, GradientShap, DeepLift])
@pytest.mark.filterwarnings("ignore")
def test_gradient_methods_cannot_take_ids(setup: Setup, kind: Any):
    baselines = (torch.zeros_like(setup.pixels), setup.baselines[1])
    options = {} if kind in (Saliency, InputXGradient) else {"baselines": baselines}
    with pytest.raises((RuntimeError, ValueError, AssertionError)):
        # A method that fails may leave its inputs changed.
        inputs = (setup.pixels.clone(), setup.ids)
        kind(setup.encoder).attribute(inputs, additional_forward_args=setup.additional, **options)


def test_captums_interpretable_embedding_does_not_fit():
    case = family_named("clip").build()
    with pytest.warns(UserWarning, match="embedding layer"):
        layer = configure_interpretable_embedding_layer(case.roots[0], "text_model.embeddings.token_embedding")
    with pytest.raises((ValueError, RuntimeError)):
        case.forward(case.inputs[0], layer.indices_to_embeddings(case.inputs[1]), *case.additional)
    remove_interpretable_embedding_layer(case.roots[0], layer)
