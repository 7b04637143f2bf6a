"""The method itself: against the published loop, against a small second implementation, and on planted evidence."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from attr_oracles import draw_counts, draw_shares, measure_range
from families import Case, family_named
from torch import Tensor, nn

from captum_m2ib import (
    ChannelStatistics,
    DualEncoder,
    LayerMultiModalInfoBottleneck,
    MultiModalInfoBottleneck,
    OptimizationRecord,
    TextLayout,
)
from captum_m2ib.benchmark.speed.loops import published_map
from captum_m2ib.engine.gates import noise


def one_pair(case: Case, pair: int = 0) -> Case:
    """A pair without padding, which the published loop does not know."""
    length = int(case.additional[0][pair].sum())
    pixels, ids = (tensor[pair : pair + 1] for tensor in case.inputs)
    return case.with_inputs((pixels, ids[:, :length]), (case.additional[0][pair : pair + 1, :length],))


@pytest.mark.parametrize(
    ("dtype", "share", "pair"), [(torch.float32, 1e-3, 0), (torch.float64, 1e-6, 0), (torch.float64, 1e-6, 1)]
)
def test_parity_with_the_published_loop(dtype, share: float, pair: int):
    case = family_named("clip").build()
    case = one_pair(case.double() if dtype == torch.float64 else case, pair)
    model = case.roots[0]
    inputs = (*case.inputs, *case.additional)
    layers = [model.vision_model.encoder.layers[2], model.text_model.encoder.layers[2]]
    ours = LayerMultiModalInfoBottleneck(case.forward, layers).attribute(
        case.inputs, additional_forward_args=case.additional, beta=0.1, score_range=1.0, n_steps=9, n_samples=10
    )
    for modality, (layer, bits) in enumerate(zip(layers, ours, strict=True)):
        published = published_map(DualEncoder(model), inputs, modality, layer, n_steps=10)
        assert bits.dtype == dtype
        nats = bits[0] * math.log(2)
        # Adam's first steps are sign-like, so gradients at rounding level may flip single gates in float32.
        if dtype == torch.float32:
            nats, published = nats.sum(-1), published.sum(-1)
        assert float((nats - published).abs().max()) < share * float(published.abs().max())


OPEN = 1 / (1 + math.exp(-5.0))
PAPER = {"beta": 0.1, "lr": 1.0, "initial_gate": OPEN, "antithetic": False, "noiseless": 0.0}
AT_LAYER = {**PAPER, "beta": 0.25}


def second_implementation(
    case: Case,
    layers: list[nn.Module],
    joint: bool,
    n_steps: int,
    n_samples: int,
    beta=(0.1, 0.1),
    variance=(1.0, 1.0),
    lr=(1.0, 1.0),
    statistics=(None, None),
    seed: int = 0,
    initial_gate=(OPEN, OPEN),
    antithetic: bool = False,
    noiseless: float = 0.0,
    score_range: float | None = None,
) -> list[Tensor]:
    """Bits at two layers of one batch in float64: hooks, full passes, the divergence from torch.distributions."""
    masks = [None, case.additional[0].bool()[..., None]]
    hidden: list[Tensor] = []
    for layer in layers:
        handle = layer.register_forward_hook(lambda m, a, output: hidden.append(output.detach()))
        case.forward(*case.inputs, *case.additional)
        handle.remove()
    starts = [math.log(g / (1 - g)) for g in initial_gate]
    alphas = [torch.full_like(h, start, requires_grad=True) for h, start in zip(hidden, starts, strict=True)]
    priors = []
    for v, channel in zip(variance, statistics, strict=True):
        mean, std = (torch.zeros(()), torch.ones(())) if channel is None else (channel.mean, channel.std)
        priors.append((mean.double(), std.double() * math.sqrt(v)))

    def nats(index: int) -> Tensor:
        gate, (mean, std) = torch.sigmoid(alphas[index]), priors[index]
        shut = torch.sigmoid(-alphas[index])
        passed = torch.distributions.Normal(gate * hidden[index] + shut * mean, shut * std)
        prior = torch.distributions.Normal(mean.expand_as(gate), std.expand_as(gate))
        divergence = torch.distributions.kl_divergence(passed, prior)
        return divergence if masks[index] is None else divergence * masks[index]

    def through(indices, gates: list[Tensor], drawn: list[Tensor]) -> Tensor:
        handles = []
        for index, gate, eps in zip(indices, gates, drawn, strict=True):
            mean, std = priors[index]
            mixed = gate * hidden[index] + (1 - gate) * (mean + std * eps)
            if masks[index] is not None:
                mixed = torch.where(masks[index], mixed, hidden[index])
            handles.append(layers[index].register_forward_hook(lambda m, a, o, mixed=mixed: mixed))
        found = case.forward(*case.inputs, *case.additional)
        for handle in handles:
            handle.remove()
        return found

    def score(indices, step: int) -> Tensor:
        total = 0.0
        middles = 1 if noiseless else 0
        draws = draw_counts(n_steps, n_samples, noiseless)[step]
        others = draws - middles
        half = (others + 1) // 2
        for draw, share in enumerate(draw_shares(draws, noiseless)):
            drawn = []
            for index in indices:
                shape, at = hidden[index].shape[1:], draw - middles
                if at < 0:
                    eps = torch.zeros(shape).double()
                elif antithetic:
                    eps = noise(seed, index, step, half, shape)[at % half].double()
                    eps = eps if at < half else -eps
                else:
                    eps = noise(seed, index, step, others, shape)[at].double()
                drawn.append(eps)
            total = total + share * through(indices, [torch.sigmoid(alphas[index]) for index in indices], drawn)
        return total

    groups = [[0, 1]] if joint else [[0], [1]]
    for indices in groups:
        range_ = score_range
        if range_ is None:
            before = case.forward(*case.inputs, *case.additional).detach()
            shapes = [hidden[i].shape[1:] for i in indices]
            axes = [len(shape) - 1 for shape in shapes]
            range_ = measure_range(before, partial(through, indices), indices, shapes, axes)
        adam = torch.optim.Adam([{"params": [alphas[i]], "lr": lr[i]} for i in indices])
        for step in range(n_steps):
            adam.zero_grad()
            loss = -(score(indices, step) / range_).sum()
            for i in indices:
                real = torch.ones_like(hidden[i]) if masks[i] is None else masks[i].expand_as(hidden[i]).double()
                loss = loss + beta[i] * (nats(i).flatten(1).sum(1) / real.flatten(1).sum(1)).sum()
            loss.backward()
            adam.step()
    return [nats(i).detach() / math.log(2) for i in range(2)]


STATISTICS = (
    ChannelStatistics(torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)),
    ChannelStatistics(torch.linspace(1, -1, 16), torch.linspace(2, 0.5, 16)),
)


@pytest.mark.parametrize(
    "options",
    [
        {"joint": False},
        {"joint": True},
        {"joint": True, "beta": (0.5, 2.0), "lr": (1.0, 0.3)},
        {"joint": False, "beta": (3.0, 0.01), "variance": (0.25, 4.0)},
        {"joint": False, "statistics": STATISTICS},
        {"joint": True, "statistics": (STATISTICS[0], None), "variance": (2.0, 0.5), "seed": 5},
        {"joint": False, "initial_gate": (0.5, 0.2), "antithetic": True},
        {"joint": True, "score_range": 0.7},
        {"joint": False, "noiseless": 0.4},
        {"joint": True, "noiseless": 0.7, "antithetic": True},
    ],
    ids=lambda options: "-".join(name for name in options if options[name] is not False),
)
def test_equals_a_second_implementation(options):
    case = family_named("closure").build().double()
    layers = [root.blocks[0] for root in case.roots]
    expected = second_implementation(case, layers, n_steps=4, n_samples=3, **options)
    settings = {name: value for name, value in options.items() if name != "statistics"}
    method = LayerMultiModalInfoBottleneck(
        case.forward, layers, layouts=case.layouts, statistics=options.get("statistics")
    )
    found = method.attribute(
        case.inputs,
        additional_forward_args=case.additional,
        **{**PAPER, "n_steps": 4, "n_samples": 3, **settings},
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.max()))


def test_defaults_follow_the_prior():
    case = family_named("closure").build()
    measured = {"beta": 3.0, "lr": 4 / 4, "initial_gate": 0.5, "antithetic": True, "noiseless": 0.0}
    for statistics, settings in ((None, AT_LAYER), (STATISTICS, measured)):
        method = case.method(statistics=statistics)
        for one, other in zip(case.attribute(method), case.attribute(method, **settings), strict=True):
            assert torch.equal(one, other)
    mixed = case.method(statistics=(STATISTICS[0], None))
    told = {name: (measured[name], AT_LAYER[name]) for name in ("beta", "lr", "initial_gate", "noiseless")}
    for one, other in zip(case.attribute(mixed), case.attribute(mixed, **told), strict=True):
        assert torch.equal(one, other)


def test_layers_that_descend_together_take_the_steps_of_the_most_demanding():
    case = family_named("clip").build()
    method = MultiModalInfoBottleneck(case.forward)
    given = {"additional_forward_args": case.additional, "joint": True}
    # The picture's own are 4 steps of 3 draws, .7 without noise; the words' 6 of 2, all noise.
    told = {"n_steps": 6, "n_samples": 3, "noiseless": 0.0, "lr": (5 / 6, 4 / 6)}
    expected = method.attribute(case.inputs, **given, **told)
    for one, other in zip(method.attribute(case.inputs, **given), expected, strict=True):
        assert torch.equal(one, other)
    _, record = method.attribute_with_record(case.inputs, **given)
    assert [len(modality.score) for modality in record.modalities] == [6, 6]
    assert (record.settings.n_steps, record.settings.n_samples) == ((6, 6), (3, 3))
    _, apart = method.attribute_with_record(case.inputs, additional_forward_args=case.additional)
    assert [len(modality.score) for modality in apart.modalities] == [4, 6]


def test_antithetic_noise_repeats_each_draw_with_its_sign_changed():
    for draws in (1, 4, 5):
        drawn = noise(3, 0, 2, draws, (6, 7), antithetic=True)
        half = (draws + 1) // 2
        assert drawn.shape == (draws, 6, 7)
        assert torch.equal(drawn[:half], noise(3, 0, 2, half, (6, 7)))
        assert torch.equal(drawn[half:], -drawn[: draws - half])


def test_one_number_serves_every_modality():
    case = family_named("closure").build()
    for name, value in (("beta", 0.7), ("variance", 2.0), ("lr", 0.5)):
        expected = case.attribute(**{name: (value, value)})
        other = case.attribute(**{name: (value, 3 * value)})
        for index, found in enumerate(case.attribute(**{name: value})):
            assert torch.equal(found, expected[index])
            assert torch.equal(found, other[index]) == (index == 0)


def test_variance_standardised_prior_and_joint_matter():
    case = family_named("closure").build()
    variants = [
        case.attribute(),
        case.attribute(variance=0.1),
        case.attribute(joint=True),
        case.attribute(case.method(statistics=STATISTICS)),
        case.attribute(case.method(statistics=["pair", "pair"])),
        case.attribute(n_steps=4),
        case.attribute(n_samples=4),
    ]
    for index, one in enumerate(variants):
        for other in variants[index + 1 :]:
            assert not torch.allclose(one[0], other[0], rtol=1e-4)


def test_statistics_of_the_pair_itself():
    case = family_named("closure").build().double().select(slice(1, 2))
    hidden: list[Tensor] = []
    for root in case.roots:
        handle = root.blocks[0].register_forward_hook(lambda m, a, output: hidden.append(output[0].detach()))
        case.forward(*case.inputs, *case.additional)
        handle.remove()
    hidden[1] = hidden[1][case.additional[0][0].bool()]
    assert len(hidden[1]) == 4
    given = [ChannelStatistics(h.mean(0), h.std(0, unbiased=False)) for h in hidden]
    layers = [root.blocks[0] for root in case.roots]
    pair = MultiModalInfoBottleneck(case.forward, layers, case.layouts, statistics=["pair", "pair"])
    same = MultiModalInfoBottleneck(case.forward, layers, case.layouts, statistics=given)
    for one, other in zip(case.attribute(pair), case.attribute(same), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.max()))


class Bag(nn.Module):
    """Reads one token of the caption only."""

    def __init__(self, position: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(20, 8), position

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids)[:, self.position]


@pytest.mark.parametrize("position", [0, 2, 4])
def test_the_only_token_that_matters_gets_nearly_all_bits(position: int):
    torch.manual_seed(position)
    tower, anchor = Bag(position).eval(), torch.randn(8)

    def score(ids):
        return F.cosine_similarity(tower(ids), anchor.expand(len(ids), -1))

    ids = torch.tensor([[1, 2, 3, 4, 5], [7, 7, 7, 7, 7], [9, 8, 7, 6, 5]])
    bits = MultiModalInfoBottleneck(score, [tower.embed], [TextLayout()]).attribute(ids, n_steps=60, beta=0.1)
    share = bits[:, position] / bits.sum(1)
    assert bool((share > 0.9).all()), share


def test_record_tells_what_happened():
    case = family_named("clip").build()
    method = case.method()
    settings = {"additional_forward_args": case.additional, "n_steps": 20, "n_samples": 5}
    attributions, record = method.attribute_with_record(case.inputs, beta=1000.0, **settings)
    assert isinstance(record, OptimizationRecord) and len(record.modalities) == 2
    with torch.no_grad():
        score = case.forward(*case.inputs, *case.additional)
    for one, other in zip(attributions, method.attribute(case.inputs, beta=1000.0, **settings), strict=True):
        assert torch.equal(one, other)
    names = ["vision_model.encoder.layers.1", "text_model.encoder.layers.1"]
    for modality, name, attribution in zip(record.modalities, names, attributions, strict=True):
        assert modality.layer == name
        assert modality.score.shape == modality.information.shape == (20, 3)
        assert modality.bits.shape == modality.score_before.shape == modality.score_after.shape == (3,)
        torch.testing.assert_close(modality.score_before, score, rtol=0, atol=1e-5)
        assert bool((modality.information.diff(dim=0) <= 0).all())
        assert bool((modality.bits <= modality.information[-1]).all())
        assert bool((attribution.flatten(1).sum(1) <= modality.bits * 1.001).all())
        assert not any(tensor.requires_grad for tensor in (modality.score, modality.bits, modality.score_after))
    torch.testing.assert_close(record.modalities[1].bits, attributions[1].sum(1), rtol=1e-4, atol=1e-4)


def test_record_in_parts_equals_the_whole():
    case = family_named("closure").build().double()
    settings = {"additional_forward_args": case.additional, "n_steps": 3, "n_samples": 2}
    for joint in (False, True):
        _, whole = case.method().attribute_with_record(case.inputs, joint=joint, **settings)
        _, parts = case.method().attribute_with_record(case.inputs, joint=joint, internal_batch_size=2, **settings)
        for one, other in zip(whole.modalities, parts.modalities, strict=True):
            for name in ("score", "information", "bits", "score_before", "score_after"):
                torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_record_of_one_modality():
    case = family_named("closure").build()
    pixels, *others = case.inputs
    bits, record = case.method().attribute_with_record(
        pixels, additional_forward_args=(*others, *case.additional), n_steps=2, n_samples=2
    )
    assert isinstance(bits, Tensor) and len(record.modalities) == 1


def test_first_step_scores_the_nearly_open_gates():
    case = family_named("closure").build()
    _, record = case.method().attribute_with_record(
        case.inputs, additional_forward_args=case.additional, n_steps=1, n_samples=50
    )
    for modality in record.modalities:
        torch.testing.assert_close(modality.score[0], modality.score_before, rtol=0, atol=0.02)


def test_larger_beta_keeps_less_and_beta_zero_keeps_the_score():
    case = family_named("closure").build()
    totals = []
    for beta in (0.001, 1.0, 30.0):
        bits, _ = case.attribute(beta=beta, n_steps=30, n_samples=4)
        totals.append(bits.flatten(1).sum(1))
    assert bool((totals[0] > totals[1]).all()) and bool((totals[1] > totals[2]).all())
    _, record = case.method().attribute_with_record(
        case.inputs, additional_forward_args=case.additional, beta=0.0, n_steps=30, n_samples=4
    )
    for modality in record.modalities:
        assert bool((modality.score_after >= modality.score_before - 0.02).all())


def test_long_runs_stay_finite():
    case = family_named("closure").build()
    for beta in (0.0, 1e6):
        bits = case.attribute(beta=beta, n_steps=100, n_samples=1)
        assert all(bool(tensor.isfinite().all()) and bool((tensor >= 0).all()) for tensor in bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(dtype):
    case = family_named("clip").build()
    expected = case.attribute(n_steps=10, n_samples=10)
    case.roots[0].to(dtype)
    half = case.with_inputs((case.inputs[0].to(dtype), case.inputs[1]), case.additional)
    found = half.attribute(n_steps=10, n_samples=10)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert float(correlation) > 0.9


def test_half_precision_survives_small_gradients_and_long_runs():
    case = family_named("clip").build()
    case.roots[0].half()
    half = case.with_inputs((case.inputs[0].half(), case.inputs[1]), case.additional)
    bits = half.attribute(n_steps=30, n_samples=2, beta=1.0)
    assert all(bool(tensor.isfinite().all()) for tensor in bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_survives_scores_of_any_unit(dtype):
    case = family_named("clip").build()
    case.roots[0].to(dtype)
    half = case.with_inputs((case.inputs[0].to(dtype), case.inputs[1]), case.additional)
    layers = [model.encoder.layers[1] for model in (case.roots[0].vision_model, case.roots[0].text_model)]

    def bits(unit: float) -> tuple[Tensor, Tensor]:
        def score(*arguments):
            return unit * case.forward(*arguments).to(dtype)

        return half.attribute(MultiModalInfoBottleneck(score, layers, case.forward.layouts), n_steps=10, n_samples=4)

    expected = bits(1.0)
    for unit in (1e-3, 1e3):
        for one, other in zip(bits(unit), expected, strict=True):
            assert bool(one.isfinite().all())
            assert float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) > 0.98


def test_published_uses_the_papers_layers_and_prior():
    case = family_named("clip").build()
    model = case.roots[0]
    layers = [model.vision_model.encoder.layers[2], model.text_model.encoder.layers[2]]
    expected = case.attribute(MultiModalInfoBottleneck(case.forward, layers), beta=0.1, score_range=1.0)
    for forward in (case.forward, model):
        for one, other in zip(case.attribute(MultiModalInfoBottleneck.published(forward)), expected, strict=True):
            assert torch.equal(one, other)


def test_progress_is_shown_when_asked(capsys):
    case = family_named("closure").build()
    case.attribute(n_steps=2)
    assert capsys.readouterr().err == ""
    case.attribute(n_steps=2, show_progress=True)
    assert "4/4" in capsys.readouterr().err


def test_padding_passes_the_bottleneck_unchanged():
    torch.manual_seed(0)
    embed, after, anchor = nn.Embedding(20, 8).eval(), nn.Identity().eval(), torch.randn(8)
    passed: list[Tensor] = []
    after.register_forward_hook(lambda module, args, output: passed.append(output.detach()))

    def score(ids, mask):
        return F.cosine_similarity(after(embed(ids)).sum(1), anchor.expand(len(ids), -1))

    ids, mask = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    method = MultiModalInfoBottleneck(score, [embed], [TextLayout(mask_argument=1)])
    bits = method.attribute(ids, additional_forward_args=mask, n_steps=5, n_samples=3)
    assert not bits[mask == 0].any()
    # The pass that reruns are held against has one draw, closed gates have eight with random halves, a step has three.
    assert {len(received) for received in passed[1:]} == {2 * 1, 2 * 8, 2 * 3}
    for received in passed[1:]:
        draws = len(received) // 2
        hidden, real = embed(ids).repeat_interleave(draws, 0), mask.repeat_interleave(draws, 0).bool()
        assert torch.equal(received[~real], hidden[~real]) and not torch.equal(received[real], hidden[real])
