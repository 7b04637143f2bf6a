"""Sanity checks on explanations whose dependence is known, and the model left to the bit as it was found."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from families import family_named
from torch import Tensor, nn

from captum_m2ib import MultiModalInfoBottleneck
from captum_m2ib.metrics import (
    caption_permutation,
    pearson,
    prompt_sensitivity,
    randomisation,
    seed_stability,
    spearman,
    ssim,
)


class Net(nn.Module):
    """Layers of 8 units, with a buffer, a frozen parameter and a dropout that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.BatchNorm1d(8)
        self.first.weight.requires_grad_(False)
        self.tied = self.third


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    model.norm.train()
    model.second.weight.grad = torch.ones(8, 8)
    return model


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything that must be the same afterwards, with the identity of every tensor."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return [
        [(name, id(tensor), tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors],
        [(name, id(p.grad), None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()],
        [module.training for module in model.modules()],
    ]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and bool((first == second).all())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


INPUTS = torch.rand(40, 8, generator=torch.Generator().manual_seed(1)) + 0.5


def test_similarity_falls_with_what_the_map_depends_on(net):
    before = fingerprint(net)

    def explain(inputs: Tensor, offset: float) -> Tensor:
        return inputs * net.second.weight.mean(0) + offset

    found = randomisation(explain, INPUTS, net, ["third", "second", net.first], similarity=pearson, offset=2.0)
    assert found.stages == ("third", "second", "first")
    (values,) = found.similarities
    assert values.shape == (40, 3)
    torch.testing.assert_close(values[:, 0], torch.ones(40, dtype=torch.float64))
    assert bool((values[:, 1] < 0.999).all())
    # The cascade keeps the second layer as it was randomised.
    torch.testing.assert_close(values[:, 2], values[:, 1])
    alone = randomisation(explain, INPUTS, net, ["second", "first"], cascading=False, similarity=pearson, offset=2.0)
    torch.testing.assert_close(alone.similarities[0][:, 1], torch.ones(40, dtype=torch.float64))
    assert bool((alone.similarities[0][:, 0] < 0.999).all())
    assert same(fingerprint(net), before)


def test_a_map_of_the_input_alone_fails_and_one_of_the_weights_alone_is_at_chance(net):
    edges = randomisation(lambda inputs: inputs * 3, INPUTS, net)
    assert bool((edges.similarities[0] == 1).all())
    # All modules that own parameters, the last first; the tied one once.
    assert edges.stages == ("norm", "third", "second", "first")

    values = []
    for seed in range(150):
        found = randomisation(
            lambda inputs: net.first.weight.flatten()[None], INPUTS[:1], net, ["first"], seed=seed, similarity=pearson
        )
        values.append(float(found.similarities[0]))
    spread = torch.tensor(values)
    assert float(spread.mean()) == pytest.approx(0, abs=4 * float(spread.std()) / math.sqrt(150))
    assert float(spread.std()) == pytest.approx(1 / 8, rel=0.3)


def test_draws_keep_each_parameters_scale_and_come_from_the_seed(net):
    with torch.no_grad():
        net.first.weight.copy_(5 + 2 * torch.randn(8, 8))
    seen: list[Tensor] = []

    def watch(inputs: Tensor) -> Tensor:
        seen.append(net.first.weight.detach().clone())
        return inputs

    state = torch.get_rng_state()
    for seed in (0, 0, 1):
        randomisation(watch, INPUTS, net, ["first"], seed=seed)
    assert bool((torch.get_rng_state() == state).all())
    original, drawn, _, again, _, other = seen
    assert bool((drawn == again).all()) and not bool((drawn == other).any())
    assert float(drawn.mean()) == pytest.approx(float(original.mean()), abs=1)
    assert float(drawn.std()) == pytest.approx(float(original.std()), rel=0.3)


def test_a_parameter_that_two_layers_share_is_drawn_once(net):
    net.second.bias = net.third.bias
    seen: list[Tensor] = []

    def watch(inputs: Tensor) -> Tensor:
        seen.append(net.third.bias.detach().clone())
        return inputs

    randomisation(watch, INPUTS, net, ["third", "second"])
    assert not bool((seen[1] == seen[0]).any()) and torch.equal(seen[2], seen[1])
    randomisation(watch, INPUTS, net, ["third", "second"], cascading=False)
    assert not bool((seen[5] == seen[4]).any())


def test_groups_and_another_way_to_randomise(net):
    called: list[nn.Module] = []
    before = fingerprint(net)

    def reset(module: nn.Module) -> None:
        called.append(module)
        module.reset_parameters()
        module.eval()
        # A module may even be given other parameters.
        module.weight = nn.Parameter(torch.rand_like(module.weight))

    weights: list[Tensor] = []

    def watch(inputs: Tensor) -> Tensor:
        weights.append(torch.stack([net.first.weight, net.second.weight]).detach())
        return inputs

    state = torch.get_rng_state()
    found = randomisation(watch, INPUTS, net, [("first", net.second), "norm"], reinitialise=reset)
    assert found.stages == ("first + second", "norm")
    assert called == [net.first, net.second, net.norm]
    assert not bool((weights[1][0] == weights[1][1]).any())
    assert bool((torch.get_rng_state() == state).all()) and same(fingerprint(net), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_found_after_an_exception(net, error):
    before, calls = fingerprint(net), 0

    def failing(inputs: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            net.requires_grad_(False)
            net.train()
            net.second.weight.grad.mul_(3)
            net.zero_grad(set_to_none=True)
            net.norm.running_mean.add_(1)
            raise error("stop")
        return inputs

    with pytest.raises(error, match="stop"):
        randomisation(failing, INPUTS, net)
    assert calls == 3 and same(fingerprint(net), before)

    def breaking(module: nn.Module) -> None:
        with torch.no_grad():
            module.weight.fill_(math.nan)
        raise error("broken")

    with pytest.raises(error, match="broken"):
        randomisation(lambda inputs: inputs, INPUTS, net, reinitialise=breaking)
    assert same(fingerprint(net), before)


def test_constant_maps_have_no_similarity(net):
    original = net.second.weight.detach().clone()

    def collapsing(inputs: Tensor) -> tuple[Tensor, Tensor]:
        changed = not torch.equal(net.second.weight, original)
        maps = inputs.clone()
        maps[2] = maps[2] * (0.0 if changed else 1.0)
        return maps, inputs

    arguments: Any = (collapsing, INPUTS[:4], net, ["third", "second"])
    first, second = randomisation(*arguments).similarities
    expected = torch.ones(4, 2, dtype=torch.float64)
    torch.testing.assert_close(second, expected)
    expected[2, 1] = math.nan
    torch.testing.assert_close(first, expected, equal_nan=True)
    with pytest.warns(UserWarning, match="1 of 4 examples .* similarity of map 0 that is NaN: 1"):
        first, second = randomisation(*arguments, nan_policy="omit").similarities
    assert first.shape == second.shape == (3, 2)
    with pytest.raises(ValueError, match=r"explanation_func: .* \(examples 2\)"):
        randomisation(*arguments, nan_policy="raise")


def test_padding_is_not_compared(net):
    weights = net.first.weight.detach().clone()

    def explain(inputs: Tensor) -> Tensor:
        maps = inputs.clone()
        maps[:, 4:] = 0
        if not torch.equal(net.first.weight, weights):
            maps[:, :4] = maps[:, :4].flip(1)
        return maps

    valid = torch.zeros(3, 8, dtype=torch.bool)
    valid[:, :4] = True
    inputs = torch.arange(1.0, 9).repeat(3, 1)
    assert randomisation(explain, inputs, net, ["first"], valid=valid).similarities[0].tolist() == [[-1]] * 3
    assert bool((randomisation(explain, inputs, net, ["first"]).similarities[0] > -0.5).all())
    with pytest.raises(ValueError, match=r"valid: expected a boolean tensor of the map's shape \(3, 8\)"):
        randomisation(explain, inputs, net, ["first"], valid=valid[:2])
    with pytest.raises(ValueError, match=r"valid: expected one entry per map \(1\), got 2"):
        randomisation(explain, inputs, net, ["first"], valid=(valid, None))


def test_unknown_layers(net):
    with pytest.raises(ValueError, match="layers: no layer named 'fourth'"):
        randomisation(lambda inputs: inputs, INPUTS, net, ["fourth"])
    with pytest.raises(ValueError, match="layers: expected layers with parameters, ReLU has none"):
        randomisation(lambda inputs: inputs, INPUTS, net, [nn.ReLU()])


PICTURES = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(2))
IDS = torch.arange(6 * 5).view(6, 5)
ONES = torch.ones(6, 5)


def by_caption(inputs: Any, additional_forward_args: Any = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """A map of the picture that is drawn from the caption, and one of the caption that is drawn from the picture."""
    pictures, ids = inputs
    seeds = (ids * additional_forward_args[0]).sum(1).long().tolist()
    maps = torch.stack([torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return maps * scale, pictures.flatten(1)[:, :5]


def by_picture(inputs: Any, additional_forward_args: Any = None) -> Tensor:
    return inputs


def test_caption_permutation_tells_who_reads_the_caption():
    kept = caption_permutation(by_picture, PICTURES, (IDS, ONES))
    assert kept.tolist() == [1] * 6
    moved = caption_permutation(by_caption, (PICTURES, IDS), (ONES,), scale=2.0)
    assert moved.shape == (6,) and bool((moved < 0.95).all())
    assert caption_permutation(by_caption, (PICTURES, IDS), (ONES,), arguments=(0,)).tolist() == [1] * 6
    swapped = caption_permutation(by_caption, (PICTURES, IDS), (ONES,), arguments=(0,), modality=1)
    assert bool((swapped < 0.999).all())
    assert moved.tolist() == caption_permutation(by_caption, (PICTURES, IDS), (ONES,)).tolist()


@pytest.mark.parametrize("pairs", [2, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_every_pair_is_lent_one_other_caption_with_its_mask(pairs, seed):
    calls: list[tuple[Tensor, Any]] = []

    def watch(inputs: Any, additional_forward_args: Any = None) -> Tensor:
        calls.append((inputs[1], additional_forward_args))
        return inputs[0]

    mask = IDS[:pairs] * 10
    caption_permutation(watch, (PICTURES[:pairs], IDS[:pairs]), (mask, "text", torch.tensor(3)), seed=seed)
    ids, (lent_mask, text, scalar) = calls[1]
    assert not bool((ids == IDS[:pairs]).any()) and sorted(ids[:, 0].tolist()) == IDS[:pairs, 0].tolist()
    assert bool((lent_mask == ids * 10).all()) and (text, int(scalar)) == ("text", 3)


def test_equal_captions_say_nothing():
    ids = IDS.clone()
    ids[:] = ids[0]
    assert bool(caption_permutation(by_caption, (PICTURES, ids), (ONES,)).isnan().all())
    with pytest.raises(ValueError, match="equal caption: 6"):
        caption_permutation(by_caption, (PICTURES, ids), (ONES,), nan_policy="raise")


def test_random_maps_are_as_alike_as_chance_has_it():
    generator = torch.Generator().manual_seed(3)

    def noise(inputs: Tensor, additional_forward_args: Any = None, seed: int = 0) -> Tensor:
        return torch.rand(300, 64, generator=generator)

    pictures, ids = torch.zeros(300, 64), torch.arange(300)[:, None]
    error = 4 / math.sqrt(64 * 300)
    assert float(caption_permutation(noise, pictures, ids).mean()) == pytest.approx(0, abs=error)
    assert float(prompt_sensitivity(noise, pictures, [(ids,)], ids).mean()) == pytest.approx(1, abs=error)
    assert float(seed_stability(noise, pictures, seeds=(0, 1)).mean()) == pytest.approx(0, abs=error)


def test_prompt_sensitivity():
    prompts = [(IDS + 1, ONES), (torch.arange(42).view(6, 7), torch.ones(6, 7))]
    assert prompt_sensitivity(by_picture, PICTURES, prompts, (IDS, ONES)).tolist() == [0] * 6
    found = prompt_sensitivity(by_caption, (PICTURES, IDS), prompts, (ONES,))
    assert bool((found > 0.05).all())
    each = [prompt_sensitivity(by_caption, (PICTURES, IDS), [prompt], (ONES,)) for prompt in prompts]
    torch.testing.assert_close(found, (each[0] + each[1]) / 2)
    assert prompt_sensitivity(by_caption, (PICTURES, IDS), [(IDS, ONES)], (ONES,)).tolist() == [0] * 6
    flat = prompt_sensitivity(lambda inputs, additional_forward_args: inputs[0] * 0, (PICTURES, IDS), prompts, (ONES,))
    assert bool(flat.isnan().all())


def test_seed_stability():
    def explain(inputs: Tensor, seed: int, noise: float) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return inputs, inputs + noise * torch.rand(inputs.shape, generator=generator)

    steady, shaken = seed_stability(explain, INPUTS, noise=0.5)
    assert steady.tolist() == [1] * 40 and bool((shaken < 1).any()) and shaken.shape == (40,)
    more = seed_stability(explain, INPUTS, noise=5.0)[1]
    assert float(more.mean()) < float(shaken.mean())
    pair = seed_stability(explain, INPUTS, seeds=(3, 4), noise=0.5, similarity=pearson)[1]
    torch.testing.assert_close(pair, pearson(explain(INPUTS, 3, 0.5)[1], explain(INPUTS, 4, 0.5)[1]))
    assert isinstance(seed_stability(lambda inputs, seed: inputs, INPUTS), Tensor)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: seed_stability(by_picture, PICTURES, seeds=(1, 1)), "seeds: expected at least two different ones"),
        (lambda: prompt_sensitivity(by_picture, PICTURES, [], IDS), "prompts: expected at least one"),
        (
            lambda: prompt_sensitivity(by_picture, PICTURES, [(IDS[:2],)], IDS),
            r"prompts\[0\]: expected 1 tensors with 6 rows, .* got shapes \[\(2, 5\)\]",
        ),
        (lambda: caption_permutation(by_picture, PICTURES[:1], IDS[:1]), "inputs: expected at least two pairs"),
        (lambda: caption_permutation(by_picture, PICTURES), "arguments: expected positions among"),
        (lambda: caption_permutation(by_picture, PICTURES, IDS, arguments=(2,)), r"arguments: expected .* got \[2\]"),
        (lambda: caption_permutation(by_picture, PICTURES, IDS, modality=1), "modality: expected an index below 1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("similarity", [spearman, ssim])
def test_the_bottleneck_passes_its_own_checks(similarity):
    case = family_named("clip").build()
    (model,) = case.roots
    before = copy.deepcopy(model.state_dict())
    method = case.method()
    settings = {"additional_forward_args": case.additional, "n_steps": 4, "n_samples": 4}

    def explain(inputs: Any, **options: Any) -> Tensor:
        return method.attribute(inputs, **options)[0]

    found = randomisation(
        explain, case.inputs, case.forward, ["text_model", "vision_model"], similarity=similarity, **settings
    )
    assert float(found.similarities[0][:, -1].mean()) < 0.9
    assert all(bool((before[name] == value).all()) for name, value in model.state_dict().items())
    assert isinstance(method, MultiModalInfoBottleneck)

    image = seed_stability(explain, case.inputs, seeds=(0, 1), similarity=similarity, **settings)
    settings.pop("additional_forward_args")
    moved = caption_permutation(explain, case.inputs, case.additional, similarity=similarity, **settings)
    assert image.shape == moved.shape == (3,) and bool((moved < 1).all())
