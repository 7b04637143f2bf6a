"""The share that goes round a map: closed forms on towers made by hand, and the engine's promises on real ones."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contracts_state import assert_as_found, disturb, snapshot
from families import Case, ConvTower, Family, family_named, pictures
from torch import Tensor, nn

from captum_m2ib import (
    ChannelStatistics,
    DualEncoder,
    MultiModalInfoBottleneck,
    PatchLayout,
    TextLayout,
    plot_bypass,
)
from captum_m2ib.engine.gates import noise
from captum_m2ib.engine.layers import resolve_for
from captum_m2ib.metrics.bypass import (
    BypassWarning,
    TowerBypass,
    measure_bypass,
    recommend_layers,
    warn_of_bypass,
)

WIDTH, SIDE, PATCH = 5, 16, 4
PATCHES = (SIDE // PATCH) ** 2


class Cut(nn.Module):
    """A class token, and each patch's mean colour as a token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.colour = nn.Linear(3, WIDTH)
        self.first = nn.Parameter(torch.randn(WIDTH))

    def forward(self, given: Tensor) -> Tensor:
        patches = F.avg_pool2d(given, PATCH).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(given), 1, -1), self.colour(patches)], 1)


class Each(nn.Module):
    """A block in which no token sees another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class CopyIntoClass(Each):
    """A block that puts the mean of all patches, and nothing else, into the class token."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return torch.cat([x[:, 1:].mean(1, keepdim=True), x[:, 1:]], 1)


class PictureTower(nn.Module):
    def __init__(self, blocks: list[nn.Module], pooled: str) -> None:
        super().__init__()
        self.embed = Cut()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(block() for block in blocks)
        self.head = nn.Linear(WIDTH, 4)
        self.pooled = pooled

    def forward(self, given: Tensor) -> Tensor:
        x = self.embed(given)
        for block in self.blocks:
            x = block(x)
        return self.head({"class": x[:, 0], "mean": x[:, 1:].mean(1)}[self.pooled])


class Causal(nn.Module):
    """A block in which each token becomes the mean of those up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]


class CaptionTower(nn.Module):
    """Tokens, causal means, and the embedding of the last real token."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Causal() for _ in range(depth))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x[torch.arange(len(x)), mask.sum(1) - 1][:, :4]


LAYOUTS = (PatchLayout((PATCH, PATCH), prefix=1), TextLayout(mask_argument=2))
IDS = torch.tensor([[5, 9, 17, 3, 60], [8, 22, 61, 1, 1], [33, 40, 2, 60, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
ARGUMENTS = ((pictures(SIDE, SIDE).double(), IDS), (MASK,))


def encoder_of(blocks: list[type[nn.Module]], pooled: str, depth: int = 2) -> DualEncoder:
    encoder = DualEncoder(PictureTower(blocks, pooled), CaptionTower(depth), layouts=LAYOUTS)
    return encoder.double().eval()


@pytest.mark.parametrize("pooled", ["mean", "class"])
def test_nothing_goes_round_where_tokens_do_not_mix(pooled: str):
    encoder = encoder_of([Each, Each, Each], pooled)
    image, _ = measure_bypass(encoder, *ARGUMENTS)
    assert image.layers[-3:] == tuple(f"image_tower.blocks.{i}" for i in range(3))
    # Nothing stands beside the pixels.
    assert image.layers[0] == "inputs[0]" and image.kept.tolist() == [[0] * 3, *[[1] * 3] * (len(image.layers) - 1)]
    # The mean of the patches is all there is; of a class token that saw no patch, everything is kept.
    share = image.share[1:]
    torch.testing.assert_close(share, torch.full_like(share, float(pooled == "class")), rtol=0, atol=1e-12)


def test_all_goes_round_once_the_class_token_holds_a_copy():
    encoder = encoder_of([Each, CopyIntoClass, Each], "class")
    layers = [encoder.image_tower.embed, *encoder.image_tower.blocks]
    (image, _) = measure_bypass(encoder, *ARGUMENTS, layers=[layers, encoder.text_tower.embed])
    torch.testing.assert_close(image.mean_share, torch.tensor([0.0, 0.0, 1.0, 1.0]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(image.score_kept[2:], image.score.expand(2, -1), rtol=0, atol=1e-12)
    assert image.latest() == 1
    chosen = recommend_layers(encoder, *ARGUMENTS, layers=[layers, encoder.text_tower.embed])
    assert chosen == (encoder.image_tower.blocks[0], encoder.text_tower.embed)


class Parts(nn.Module):
    """A class token (3, 0, 0) before two tokens; the embedding takes each axis from the one or from the others."""

    def __init__(self) -> None:
        super().__init__()
        self.hold = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        first = tokens.new_tensor([3.0, 0.0, 0.0]).expand(len(tokens), 1, -1)
        x = self.hold(torch.cat([first, tokens], 1))
        return torch.stack([x[:, 0, 0], x[:, 1:, 1].mean(1), x[:, 1:, 2].mean(1)], 1)


def test_share_of_a_class_token_that_holds_a_part_by_hand():
    tower = Parts().eval()
    tokens, other = torch.tensor([[[0, 4, 0], [0, 4, 0]]] * 2).double(), torch.tensor([[1, 0, 0]] * 2).double()

    def score(given: Tensor, second: Tensor) -> Tensor:
        return F.cosine_similarity(tower(given), second)

    prior = ChannelStatistics(torch.tensor([0.0, 0.0, 1.0]), torch.full((3,), 1e-9))
    given = {"layers": [tower.hold], "layouts": [TextLayout(prefix=1)], "statistics": {"Identity": prior}}
    (found,) = measure_bypass(score, tokens, other, **given)
    # e = (3, 4, 0), kept (3, 0, 1), none (0, 0, 1): cosines with e are 9 / (5 sqrt 10) and 0.
    torch.testing.assert_close(found.share, torch.full((1, 2), 9 / (5 * 10**0.5)).double(), rtol=0, atol=1e-7)
    # With the other embedding, (1, 0, 0), the scores are 3 / 5, 3 / sqrt 10 and 0.
    torch.testing.assert_close(found.score, torch.full((2,), 0.6).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.score_kept, torch.full((1, 2), 3 / 10**0.5).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.score_none, torch.zeros(1, 2).double(), rtol=0, atol=1e-7)
    (by_score,) = measure_bypass(score, tokens, other, **given, measure="score")
    torch.testing.assert_close(by_score.share, torch.full((1, 2), 5 / 10**0.5).double(), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="layouts: expected a hidden state with 2 tokens"):
        measure_bypass(score, tokens, other, **{**given, "layouts": [TextLayout(prefix=2)]})


class Average(nn.Module):
    """Rows of a table, averaged over every position, padding included."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 2)
        self.table.weight.data = torch.tensor([[1.0, 0.0], [0.0, 6.0], [3.0, 0.0], [0.0, 0.0]])

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).mean(1)


def test_padding_stays_as_it_is_by_hand():
    tower = Average().double().eval()
    ids, other = torch.tensor([[0, 2, 1], [2, 2, 0]]), torch.tensor([[1, 0]] * 2).double()

    def score(given: Tensor, second: Tensor) -> Tensor:
        return F.cosine_similarity(tower(given), second)

    prior = {"Embedding": ChannelStatistics(torch.tensor([4.0, 0.0]), torch.full((2,), 1e-9))}
    (found,) = measure_bypass(score, ids, other, [tower.table], prior, [TextLayout(pad_token_id=1)])
    # The first caption's third token, (0, 6), is padding: (8, 6) / 3 is left of everything. The second has none.
    expected = torch.tensor([[0.8, 1.0]]).double()
    torch.testing.assert_close(found.score_none, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.score_kept, expected, rtol=0, atol=1e-7)
    assert found.kept.tolist() == [[0, 0]]


def test_a_causal_tower_agrees_with_a_loop_over_pairs_and_draws():
    encoder = encoder_of([Each], "class")
    tower, draws, seed = encoder.text_tower, 4, 3
    prior = ChannelStatistics(torch.linspace(-1, 1, WIDTH), torch.linspace(0.5, 2, WIDTH))
    layers = [tower.embed, *tower.blocks]
    names = [resolve_for(encoder, layer).name for layer in layers]
    _, text = measure_bypass(
        encoder,
        *ARGUMENTS,
        layers=[encoder.image_tower.embed, layers],
        statistics=dict.fromkeys(names, prior),
        n_draws=draws,
        seed=seed,
    )
    mean, std = prior.mean.double(), prior.std.double()
    for depth, name in enumerate(names):
        hidden = tower.embed(IDS).detach()
        for block in list(tower.blocks)[:depth]:
            hidden = block(hidden)
        drawn = noise(seed, 0, 0, draws, hidden.shape[1:], antithetic=True).double()
        for pair, length in enumerate(MASK.sum(1).tolist()):
            own = end_of(tower, hidden[pair : pair + 1], length, depth)
            kept, none = [], []
            for draw in range(draws):
                noisy = mean + std * drawn[draw]
                row = hidden[pair].clone()
                row[: length - 1] = noisy[: length - 1]
                kept.append(F.cosine_similarity(end_of(tower, row[None], length, depth), own))
                row[:length] = noisy[:length]
                none.append(F.cosine_similarity(end_of(tower, row[None], length, depth), own))
            of_kept, of_none = torch.stack(kept).mean(), torch.stack(none).mean()
            expected = (of_kept - of_none) / (1 - of_none)
            torch.testing.assert_close(text.share[depth, pair], expected, rtol=0, atol=1e-9, msg=name)
    assert text.layers == tuple(names) and text.kept.tolist() == [[1, 1, 1]] * 3
    torch.testing.assert_close(text.share[-1], torch.ones(3).double(), rtol=0, atol=1e-12)
    assert bool((text.mean_share.diff() > 0).all())


def end_of(tower: CaptionTower, hidden: Tensor, length: int, depth: int) -> Tensor:
    for block in list(tower.blocks)[depth:]:
        hidden = block(hidden)
    return hidden[:, length - 1, :4]


def test_a_score_that_is_no_cosine_needs_the_other_measure():
    encoder = encoder_of([Each, CopyIntoClass], "class")
    image, text = encoder.image_tower, encoder.text_tower

    def product(given: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return (image(given) * text(ids, mask)).sum(1)

    layers = ([image.embed, *image.blocks], [text.embed, *text.blocks])
    prior = ChannelStatistics(torch.full((WIDTH,), 0.7), torch.ones(WIDTH))
    names = [resolve_for(product, layer).name for part in layers for layer in part]
    settings = {"layers": layers, "layouts": LAYOUTS, "statistics": dict.fromkeys(names, prior)}
    with pytest.raises(ValueError, match="cosine_similarity"):
        measure_bypass(product, *ARGUMENTS, **settings)
    found = measure_bypass(product, *ARGUMENTS, **settings, measure="score")
    torch.testing.assert_close(found[0].mean_share, torch.tensor([0.0, 0.0, 1.0]).double(), rtol=0, atol=1e-9)
    assert [tower.modality for tower in found] == ["input 0", "input 1"]
    assert found[1].kept.tolist() == [[1, 1, 1]] * 3


def measured(case: Case, **settings) -> tuple[TowerBypass, ...]:
    """At the blocks that the encoder knows, else at the layers of the case, from the first on."""
    named = isinstance(case.forward, DualEncoder) and not isinstance(case.roots[0], ConvTower)
    if not named or any(getattr(block, "form", "") == "opaque" for block in case.roots[0].modules()):
        settings |= {"layers": [list(choices)[::-1] for choices in case.layers], "layouts": case.layouts}
    with warnings.catch_warnings():
        if case.training:
            warnings.filterwarnings("ignore", "forward_func: the model is in training mode")
        return measure_bypass(case.forward, case.inputs, case.additional or None, n_draws=2, **settings)


def test_every_family_is_measured_and_left_as_found(family: Family):
    case = family.build()
    disturb(case)
    before = snapshot(case)
    found = measured(case)
    assert_as_found(case, before)
    for tower in found:
        assert tower.share.shape == tower.kept.shape == (len(tower.layers), len(case.inputs[0]))
        assert bool((tower.share[~tower.share.isnan()] <= 1 + 1e-4).all())
        nothing_beside = tower.kept == 0
        assert bool((tower.share[nothing_beside].nan_to_num().abs() < 1e-5).all())


@pytest.mark.parametrize(
    ("name", "kept", "last"),
    [
        ("clip", (1, 1), (1.0, 1.0)),
        ("clip_legacy_end", (1, 1), (1.0, 1.0)),
        # Patches pooled by attention; of the captions the last position, padding or not.
        ("siglip", (0, 1), (0.0, 1.0)),
        # The class token, and the first token of the caption.
        ("vit_bert", (1, 1), (1.0, 1.0)),
        ("registers_roberta", (5, 1), (1.0, 1.0)),
        ("sequence_first", (1, 0), (None, 0.0)),
        ("conv_maps", (0, 0), (0.0, 0.0)),
    ],
)
def test_pooled_and_prefix_tokens_are_left_as_they_are(name: str, kept, last):
    case = family_named(name).build().double()
    for tower, count, share in zip(measured(case), kept, last, strict=True):
        assert set(tower.kept[-1].tolist()) == {count}
        if share is not None:
            torch.testing.assert_close(tower.share[-1], torch.full_like(tower.share[-1], share), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "closure", "siglip", "shared_tower", "xclip"])
def test_pairs_are_independent(name: str):
    case = family_named(name).build().double()
    whole = measured(case)
    # The second caption is the one with padding.
    alone = measured(case.select(slice(1, 2)))
    others = [measured(case, internal_batch_size=size) for size in (1, 8)]
    for index, tower in enumerate(whole):
        for name_ in ("share", "kept", "score", "score_kept", "score_none"):
            expected = getattr(tower, name_)
            own = getattr(alone[index], name_)
            torch.testing.assert_close(own, expected[..., 1:2], rtol=0, atol=1e-9, equal_nan=True)
            for other in others:
                torch.testing.assert_close(getattr(other[index], name_), expected, rtol=0, atol=1e-9, equal_nan=True)


def test_further_padding_changes_nothing():
    encoder = encoder_of([Each], "class")
    longer = (ARGUMENTS[0][0], F.pad(IDS, (0, 3), value=1)), (F.pad(MASK, (0, 3)),)
    for one, other in zip(measure_bypass(encoder, *ARGUMENTS), measure_bypass(encoder, *longer), strict=True):
        torch.testing.assert_close(one.share, other.share, rtol=0, atol=1e-12, equal_nan=True)


def test_same_seed_same_shares_and_the_global_state_untouched():
    encoder = encoder_of([Each], "class")
    state = torch.get_rng_state()
    one, same, other = (measure_bypass(encoder, *ARGUMENTS, seed=seed)[1].share for seed in (5, 5, 6))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.allclose(one, other)
    assert torch.equal(state, torch.get_rng_state())


def test_a_layer_costs_its_suffix_and_the_other_tower_runs_once():
    encoder = encoder_of([Each] * 4, "class")
    rows = dict.fromkeys((*encoder.image_tower.blocks, encoder.text_tower.embed), 0)
    handles = [
        module.register_forward_hook(lambda m, _, output: rows.__setitem__(m, rows[m] + len(output))) for module in rows
    ]
    layers = [encoder.image_tower.blocks[1], encoder.image_tower.blocks[2]]
    measure_bypass(encoder, ARGUMENTS[0][0], (IDS, MASK), layers=[layers], n_draws=8)
    for handle in handles:
        handle.remove()
    pairs = len(IDS)
    first, one, two, three = (rows[block] for block in encoder.image_tower.blocks)
    # One recorded pass (with a copy of the first pair), one for each layer to hold its reruns against, and no more
    # before the first layer or in the other tower.
    whole = pairs + 1 + 2 * pairs
    assert first == rows[encoder.text_tower.embed] == whole
    # What comes behind a layer that was held against the model need not run again for the next.
    assert one == whole - pairs
    # One look at what is pooled and at the embedding, two draws of other values where that look changes none, and the
    # draws of each layer before.
    assert two <= whole + (2 + 2 + 16) * pairs and three <= whole + (2 + 2 + 2 * 16) * pairs


def test_an_error_in_the_pass_leaves_the_model_as_found():
    case = family_named("clip").build()
    calls = 0

    def fail(*_) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    case.roots[0].vision_model.encoder.layers[3].register_forward_hook(fail)
    before = snapshot(case)
    with pytest.raises(KeyboardInterrupt):
        measured(case)
    assert_as_found(case, before)


def test_the_warning_names_tower_layer_share_and_a_sound_layer():
    encoder = encoder_of([Each, CopyIntoClass, Each], "class")
    image, text = encoder.image_tower, encoder.text_tower
    method = MultiModalInfoBottleneck(encoder, layers=(image.blocks[2], text.embed), layouts=LAYOUTS)
    with pytest.warns(BypassWarning) as caught:
        warn_of_bypass(method, *ARGUMENTS, threshold=0.9)
    (message,) = [str(warning.message) for warning in caught]
    assert "image units at layer 'image_tower.blocks.2'" in message and "keeps 100% of the embedding" in message
    assert "Choose 'image_tower.blocks.0' (0%) or an earlier layer." in message
    # Nothing to say of a sound layer: an error if there were, as warnings are errors here.
    warn_of_bypass(MultiModalInfoBottleneck(encoder, (image.blocks[0], text.embed), LAYOUTS), *ARGUMENTS, threshold=0.9)


def test_the_warning_on_a_plain_function_says_how_to_find_a_layer():
    encoder = encoder_of([CopyIntoClass], "class")
    image, text = encoder.image_tower, encoder.text_tower

    def score(given: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return F.cosine_similarity(image(given), text(ids, mask))

    method = MultiModalInfoBottleneck(score, (image.blocks[0], text.embed), LAYOUTS)
    with pytest.warns(BypassWarning, match=r"input 0 units.*Choose an earlier layer; captum_m2ib.measure_bypass"):
        warn_of_bypass(method, *ARGUMENTS, threshold=0.9)


def test_towers_without_anything_beside_the_map_keep_the_recommended_layer():
    case = family_named("siglip").build()
    image, _ = recommend_layers(case.forward, case.inputs, case.additional, n_draws=2)
    assert image is case.forward.recommended_layers()[0]


def test_latest_is_the_last_before_the_threshold_is_first_reached():
    def tower(*shares: float) -> TowerBypass:
        values = torch.tensor(shares)[:, None].expand(-1, 2)
        names = tuple(map(str, range(len(shares))))
        return TowerBypass("text", names, names, values, values.long(), values[0], values, values)

    assert tower(0.1, 0.4, 0.6, 0.3).latest() == 1
    assert tower(0.5, 0.1).latest() is None
    assert tower(0.1, 0.2).latest() == 1
    assert tower(0.1, float("nan"), 0.2).latest() == 0
    assert tower(0.1, 0.4).latest(0.3) == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n_draws": 0}, "n_draws: expected a whole number of at least 1"),
        ({"seed": -1}, "seed: expected a whole number of at least 0"),
        ({"measure": "cosine"}, "measure: expected 'embedding' or 'score', got 'cosine'"),
        ({"internal_batch_size": 0}, "internal_batch_size: expected a whole number"),
        ({"layers": ["image_tower.embed"]}, "layers: expected a layer or a list of layers for each of 2 inputs, got 1"),
        ({"layers": [[], "text_tower.embed"]}, r"layers\[0\]: expected at least one layer, got an empty list"),
        ({"layers": ["image_tower.blok", "text_tower.embed"]}, "layers: no layer named 'image_tower.blok'"),
    ],
)
def test_arguments_are_checked(settings, says: str):
    with pytest.raises(ValueError, match=says):
        measure_bypass(encoder_of([Each], "class"), *ARGUMENTS, **settings)


def test_a_plain_function_must_name_its_layers_and_thresholds_are_shares():
    encoder = encoder_of([Each], "class")
    with pytest.raises(ValueError, match="layers: they can only be found in a DualEncoder, got function"):
        measure_bypass(lambda *given: encoder(*given), *ARGUMENTS)
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="threshold: expected a share above 0 and at most 1"):
            recommend_layers(encoder, *ARGUMENTS, threshold=wrong)


def test_a_hidden_state_that_is_not_finite_is_an_error():
    encoder = encoder_of([Each], "class")
    with torch.no_grad():
        encoder.image_tower.head.bias[0] = float("nan")
    with pytest.raises(ValueError, match="the score of the untouched pairs is NaN or infinite for pair 0"):
        measure_bypass(encoder, *ARGUMENTS)


@pytest.mark.parametrize("pairs", [1, 3])
def test_the_figure_shows_each_tower_with_its_layers_and_the_threshold(pairs: int):
    encoder = encoder_of([Each, CopyIntoClass, Each], "class")
    found = measure_bypass(encoder, tuple(t[:pairs] for t in ARGUMENTS[0]), MASK[:pairs])
    figure = plot_bypass(found, threshold=0.4)
    assert len(figure.axes) == 2
    for axes, tower in zip(figure.axes, found, strict=True):
        line, limit = axes.lines
        np.testing.assert_allclose(line.get_ydata(), tower.mean_share.numpy())
        assert set(limit.get_ydata()) == {0.4}
        assert [label.get_text().split(".")[-1] for label in axes.get_xticklabels()] == [
            name.split(".")[-1] for name in tower.layers
        ]
        assert tower.modality in axes.get_title(loc="left")
    figure.canvas.draw()
