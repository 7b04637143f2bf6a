"""Contract 7: bad input is an error that names the argument, before any work; NaN is never a heatmap."""

from __future__ import annotations

import pytest
import torch
from families import Case, family_named

from captum_m2ib import (
    ChannelStatistics,
    DualEncoder,
    LayerMultiModalInfoBottleneck,
    MultiModalInfoBottleneck,
)

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def clip() -> Case:
    return family_named("clip").build()


def run(case: Case, **options):
    return case.method().attribute(case.inputs, additional_forward_args=case.additional, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 0}, "n_steps: expected a whole number of at least 1, got 0"),
        ({"n_steps": 2.5}, "n_steps: "),
        ({"n_steps": True}, "n_steps: "),
        ({"n_samples": 0}, "n_samples: "),
        ({"n_samples": "ten"}, "n_samples: "),
        ({"internal_batch_size": 0}, "internal_batch_size: "),
        ({"internal_batch_size": -3}, "internal_batch_size: "),
        ({"beta": -0.1}, "beta: expected a finite number of at least 0"),
        ({"beta": NAN}, "beta: "),
        ({"initial_gate": 0.0}, "initial_gate: expected a finite number above 0"),
        ({"initial_gate": 1.0}, "initial_gate: expected a number between 0 and 1"),
        ({"initial_gate": (0.5, 1.5)}, "initial_gate: expected a number between 0 and 1"),
        ({"beta": INF}, "beta: "),
        ({"beta": (0.1,)}, r"beta: expected a number or one per modality \(2\), got 1"),
        ({"beta": (0.1, 0.1, 0.1)}, r"beta: .*got 3"),
        ({"beta": ("a", "b")}, "beta: "),
        ({"variance": 0.0}, "variance: expected a finite number above 0"),
        ({"variance": -1.0}, "variance: "),
        ({"variance": (1.0, NAN)}, "variance: "),
        ({"lr": 0.0}, "lr: "),
        ({"lr": (1.0, -1.0)}, "lr: "),
        ({"seed": -1}, "seed: "),
        ({"seed": 0.5}, "seed: "),
        ({"seed": None}, "seed: "),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_out_of_range(clip: Case, options: dict, message: str):
    calls = []
    clip.forward.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=f"^{message}"):
        run(clip, **options)
    layer = LayerMultiModalInfoBottleneck(clip.forward, [choices[0] for choices in clip.layers])
    with pytest.raises(ValueError, match=f"^{message}"):
        layer.attribute(clip.inputs, additional_forward_args=clip.additional, **options)
    assert not calls


def test_numbers_of_numpy_are_numbers(clip: Case):
    import numpy as np

    settings = {"n_steps": 2, "n_samples": 2}
    expected = run(clip, beta=0.5, seed=3, **settings)
    found = run(clip, beta=np.float32(0.5), seed=np.int64(3), n_steps=np.int64(2), n_samples=np.int32(2))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_pixels_that_are_not_finite(clip: Case, value: float):
    pixels = clip.inputs[0].clone()
    pixels[1, 0, 3, 4] = value
    with pytest.raises(ValueError, match=r"^inputs\[0\]: expected finite"):
        run(clip.with_inputs((pixels, clip.inputs[1]), clip.additional))


def test_inputs_of_a_wrong_kind(clip: Case):
    pixels, ids = clip.inputs
    method = clip.method()
    for wrong in ([pixels, ids], {"pixel_values": pixels}, None, (pixels, [1, 2]), (), pixels.numpy()):
        with pytest.raises(ValueError, match=r"^inputs: expected a tensor or a tuple of tensors"):
            method.attribute(wrong, additional_forward_args=clip.additional)


def test_wrong_numbers_of_examples(clip: Case):
    pixels, ids = clip.inputs
    with pytest.raises(ValueError, match=r"^inputs: expected the same number of examples.*\[2, 3\]"):
        run(clip.with_inputs((pixels[:2], ids), clip.additional))
    with pytest.raises(ValueError, match=r"^inputs: expected the same number of examples"):
        run(clip.with_inputs((pixels[:0], ids[:0]), ()))
    with pytest.raises(ValueError, match=r"^inputs: "):
        run(clip.with_inputs((torch.tensor(1.0), torch.tensor(1)), ()))


@pytest.mark.parametrize(("images", "texts"), [(2, 3), (3, 2), (1, 2), (2, 1), (3, 1)])
def test_wrong_numbers_of_examples_among_additional_arguments(clip: Case, images: int, texts: int):
    pixels, ids = clip.inputs
    with pytest.raises(ValueError, match=rf"additional_forward_args\[0\]: .* the {images} pairs, .*\({texts}, "):
        clip.method().attribute(
            pixels[:images], additional_forward_args=(ids[:texts], clip.additional[0][:texts]), n_steps=2, n_samples=2
        )


def test_more_inputs_than_layers(clip: Case):
    method = MultiModalInfoBottleneck(clip.forward, ["vision_model.encoder.layers.1"])
    with pytest.raises(ValueError, match=r"^inputs: expected at most 1 inputs, one per layer, got 2"):
        method.attribute(clip.inputs, additional_forward_args=clip.additional)


def test_token_ids_as_floats(clip: Case):
    pixels, ids = clip.inputs
    with pytest.raises(ValueError, match=r"^inputs: expected integer token ids, got torch.float32"):
        run(clip.with_inputs((pixels, ids.float()), clip.additional))
    with pytest.raises(ValueError, match=r"^inputs: expected integer token ids"):
        clip.forward(pixels, ids.float())


def test_unknown_layers(clip: Case):
    with pytest.raises(ValueError, match=r"^layers: no layer named 'vision.layer'"):
        MultiModalInfoBottleneck(clip.forward, ["vision.layer", "text_model.embeddings"])
    with pytest.raises(TypeError, match=r"^layers: expected a module"):
        MultiModalInfoBottleneck(clip.forward, [3, 4])


def test_forward_func_that_cannot_be_called():
    with pytest.raises(TypeError, match=r"^forward_func: expected a model or a callable, got str"):
        MultiModalInfoBottleneck("openai/clip", ["a"])


def closure_with(change) -> tuple[Case, MultiModalInfoBottleneck]:
    """A case whose score goes through ``change``."""
    case = family_named("closure").build()

    def score(*arguments):
        return change(case.forward(*arguments))

    return case, MultiModalInfoBottleneck(score, [choices[0] for choices in case.layers], case.layouts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:, None] * s, r"^forward_func: expected one score per pair.*not the matrix"),
        (lambda s: s.mean(), "^forward_func: expected one score per pair"),
        (lambda s: (s,), "^forward_func: expected one score per pair.*tuple"),
        (lambda s: torch.cat([s, s]), "^forward_func: expected one score per pair"),
        (lambda s: s.round().long(), "^forward_func: expected floating-point scores"),
        (lambda s: s.tolist(), "^forward_func: expected one score per pair.*list"),
    ],
    ids=["matrix", "mean", "tuple", "twice", "integers", "list"],
)
@pytest.mark.parametrize("pairs", [1, 3])
def test_forward_func_that_returns_no_score_per_pair(change, message: str, pairs: int):
    case, method = closure_with(change)
    with pytest.raises(ValueError, match=message):
        case.select(slice(0, pairs)).attribute(method)


def test_the_message_counts_the_users_pairs():
    case, method = closure_with(lambda s: s[:, None] * s)
    with pytest.raises(ValueError, match=r"shape \(3,\) for 3 pairs"):
        case.attribute(method)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_score_that_is_not_finite(value: float):
    case, method = closure_with(lambda s: s + torch.full_like(s, value))
    with pytest.raises(ValueError, match="score of the untouched pairs is NaN or infinite for pair 0, 1, 2"):
        case.attribute(method)


def test_only_the_pair_at_fault_is_named():
    case, method = closure_with(lambda s: torch.where(torch.arange(len(s)) == 1, NAN, s))
    with pytest.raises(ValueError, match=r"NaN or infinite for pair 1;"):
        case.attribute(method)


def test_a_score_that_is_not_finite_later():
    calls = []

    def change(score):
        calls.append(1)
        # The recorded pass, the draws with gates closed, the pass that they are held against, and the first step.
        return score if len(calls) < 1 + 1 + 1 + 2 else score * NAN

    case, method = closure_with(change)
    with pytest.raises(ValueError, match="score at step 1 is NaN or infinite"):
        case.attribute(method)


def test_a_gradient_that_is_not_finite():
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * NAN

    case, method = closure_with(Bad.apply)
    with pytest.raises(ValueError, match="gradient at step 0 is NaN or infinite"):
        case.attribute(method)


def test_a_hidden_state_that_is_not_finite():
    case = family_named("closure").build()

    def spoil(module, args, output):
        output = output.clone()
        output[:, 0, 0] = INF
        return output

    def ignore(module, args):
        return (args[0].nan_to_num(0, 0, 0), *args[1:])

    case.roots[0].blocks[0].register_forward_hook(spoil)
    case.roots[0].blocks[1].register_forward_pre_hook(ignore)
    method = MultiModalInfoBottleneck(case.forward, [case.roots[0].blocks[0], case.roots[1].blocks[0]], case.layouts)
    with pytest.raises(ValueError, match="hidden state of layer 'Block' is NaN or infinite"):
        case.attribute(method)


def test_statistics_that_do_not_fit(clip: Case):
    layers = [choices[0] for choices in clip.layers]
    wrong = ChannelStatistics(torch.zeros(5), torch.ones(5))
    with pytest.raises(ValueError, match=r"^statistics: expected one value for each of the layer's 32 channels, got 5"):
        clip.attribute(MultiModalInfoBottleneck(clip.forward, layers, statistics=[wrong, None]))
    with pytest.raises(ValueError, match=r"^statistics: expected one entry per layer \(2\), got 1"):
        MultiModalInfoBottleneck(clip.forward, layers, statistics=[wrong])
    with pytest.raises(ValueError, match=r"^statistics: expected an entry for each layer, none for text_model"):
        MultiModalInfoBottleneck(clip.forward, layers, statistics={"vision_model.encoder.layers.1": wrong})
    for bad in ("pairs", 3.0, (torch.zeros(32), torch.ones(32))):
        with pytest.raises(ValueError, match=r"^statistics: expected ChannelStatistics"):
            MultiModalInfoBottleneck(clip.forward, layers, statistics=[bad, None])


def test_statistics_by_name_are_those_by_order(clip: Case):
    layers = [choices[0] for choices in clip.layers]
    one = ChannelStatistics(torch.zeros(32), torch.full((32,), 2.0))
    two = ChannelStatistics(torch.ones(32), torch.ones(32))
    by_order = clip.attribute(MultiModalInfoBottleneck(clip.forward, layers, statistics=[one, two]))
    names = {"text_model.encoder.layers.1": two, "vision_model.encoder.layers.1": one}
    by_name = clip.attribute(MultiModalInfoBottleneck(clip.forward, layers, statistics=names))
    for first, second in zip(by_order, by_name, strict=True):
        assert torch.equal(first, second)


def test_towers_of_a_wrong_number():
    with pytest.raises(TypeError, match=r"^towers: expected one model or two towers, got 0"):
        DualEncoder()
    with pytest.raises(TypeError, match=r"^model: expected get_image_features"):
        DualEncoder(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("change", [lambda mask: mask[:, None], lambda mask: mask[:, 1:]])
def test_a_mask_of_another_shape_is_told_in_a_sentence(change):
    case = family_named("clip").build()
    with pytest.raises(ValueError, match=r"expected the mask .* to be of shape \(N, L\), \(\d+, \d+\) for"):
        case.method().attribute(case.inputs, additional_forward_args=(change(case.additional[0]),))
