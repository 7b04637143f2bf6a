"""Interactions where the exact answer is known: linear towers, completeness, and Jacobians by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attr_oracles import clip_case
from torch import Tensor, nn

from captum_m2ib import DualEncoder, PatchLayout, TextLayout
from captum_m2ib.attr.pair_interaction import PairInteraction

LAYOUTS = (PatchLayout((4, 4)), TextLayout(mask_argument=2))


class Linear(nn.Module):
    """The sum of linear maps of its units, different at each position."""

    def __init__(self, embed: nn.Module, units: int, bent: bool) -> None:
        super().__init__()
        self.embed, self.block = embed, nn.Identity()
        self.maps = nn.Parameter(torch.randn(units, 5, 4))
        self.bent = bent

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        units = self.embed(inputs)
        units = self.block(units.flatten(2).transpose(1, 2) if units.ndim == 4 else units)
        mapped = torch.einsum("npd,pde->npe", units, self.maps[: units.shape[1]])
        mapped = mapped if mask is None else mapped * mask[..., None]
        total = mapped.sum(1)
        return torch.sin(total / 3) + 0.1 * total.square() if self.bent else total


def encoder(bent: bool = False) -> DualEncoder:
    torch.manual_seed(0)
    image = Linear(nn.Conv2d(3, 5, 4, 4), 6, bent)
    text = Linear(nn.Embedding(20, 5), 7, bent)
    return DualEncoder(image, text, layouts=LAYOUTS).double().eval()


def pair() -> tuple[tuple[Tensor, Tensor], Tensor]:
    pixels = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(1)).double()
    ids = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 2, 0, 0], [1, 9, 10, 2, 0]])
    return (pixels, ids), (ids > 0).long()


def method(model: DualEncoder) -> PairInteraction:
    return PairInteraction(model, [model.image_tower.block, model.text_tower.block])


def reference_ids() -> Tensor:
    return torch.tensor([[1, 0, 0, 0, 2], [1, 0, 2, 0, 0], [1, 0, 0, 2, 0]])


def hidden(tower: Linear, inputs: Tensor) -> Tensor:
    units = tower.embed(inputs)
    return units.flatten(2).transpose(1, 2) if units.ndim == 4 else units


@pytest.mark.parametrize("n_steps", [1, 4])
def test_linear_towers_have_an_exact_answer(n_steps: int):
    model = encoder()
    (pixels, ids), mask = pair()
    found = method(model).attribute((pixels, ids), additional_forward_args=mask, n_steps=n_steps)
    image, text = model.image_tower, model.text_tower
    with torch.no_grad():
        patches = hidden(image, pixels) - hidden(image, torch.zeros_like(pixels))
        tokens = hidden(text, ids) - hidden(text, reference_ids())
        norms = image(pixels).norm(dim=1) * text(ids, mask).norm(dim=1)
        for n in range(3):
            for s in range(5):
                for p in range(6):
                    one, other = patches[n, p] @ image.maps[p], tokens[n, s] @ text.maps[s]
                    expected = (one @ other / norms[n]).item() * mask[n, s].item()
                    assert found[n, s, p // 3, p % 3].item() == pytest.approx(expected, abs=1e-12)
    assert found.shape == (3, 5, 2, 3) and not found.requires_grad
    # The first token is its own reference, so it takes part in nothing; the second does.
    assert not found[:, 0].any() and bool(found[:, 1].abs().amax((1, 2)).gt(1e-3).all())


@pytest.mark.parametrize("baselines", [None, (0.5, 3)])
def test_bent_towers_are_complete(baselines):
    model = encoder(bent=True)
    (pixels, ids), mask = pair()
    found = method(model).attribute(
        (pixels, ids), additional_forward_args=mask, baselines=baselines, n_steps=300, internal_batch_size=150
    )
    other = torch.full_like(pixels, 0.5 if baselines else 0.0)
    words = torch.full_like(ids, 3) if baselines else reference_ids()
    with torch.no_grad():
        first, first_reference = (model.image_tower(given) for given in (pixels, other))
        second, second_reference = (model.text_tower(given, mask) for given in (ids, words))
        norms = first.norm(dim=1) * second.norm(dim=1)
        expected = ((first - first_reference) * (second - second_reference)).sum(1) / norms
    torch.testing.assert_close(found.flatten(1).sum(1), expected, rtol=0, atol=1e-4)


def test_clip_equals_whole_jacobians():
    case = clip_case().select(slice(1, 2))
    model, n_steps = case.roots[0], 3
    blocks = [model.vision_model.encoder.layers[3], model.text_model.encoder.layers[3]]
    ids, mask = case.inputs[1], case.additional[0]
    words = torch.where(mask.bool(), 0, ids)
    end = int(mask.sum()) - 1
    words[0, 0], words[0, end] = ids[0, 0], ids[0, end]

    def embed(index: int, given: Tensor) -> Tensor:
        output = model.get_text_features(given, attention_mask=mask) if index else model.get_image_features(given)
        return getattr(output, "pooler_output", output)[0]

    def entering(index: int, given: Tensor) -> Tensor:
        kept = []
        handle = blocks[index].register_forward_pre_hook(lambda m, args: kept.append(args[0].detach()))
        embed(index, given)
        handle.remove()
        return kept[0]

    parts, embeddings = [], []
    for index, reference in enumerate((torch.zeros_like(case.inputs[0]), words)):
        given = case.inputs[index]
        start, goal = entering(index, reference), entering(index, given)

        def through(value: Tensor, index: int = index, given: Tensor = given) -> Tensor:
            handle = blocks[index].register_forward_pre_hook(lambda m, args: (value, *args[1:]))
            try:
                return embed(index, given)
            finally:
                handle.remove()

        ways = [start + (goal - start) * (step + 0.5) / n_steps for step in range(n_steps)]
        jacobian = sum(torch.autograd.functional.jacobian(through, way) for way in ways) / n_steps
        parts.append((jacobian * (goal - start)).sum(-1)[:, 0])
        embeddings.append(embed(index, given))
    expected = parts[1].T @ parts[0] / embeddings[0].norm() / embeddings[1].norm()
    expected = (expected * mask.T)[:, 1:].unflatten(1, (4, 4))
    found = PairInteraction(case.forward).attribute(case.inputs, additional_forward_args=mask, n_steps=n_steps)
    torch.testing.assert_close(found[0], expected.detach(), rtol=0, atol=1e-10)


def test_pairs_steps_and_batches_change_nothing():
    case = clip_case()
    interaction = PairInteraction(case.forward)
    expected = interaction.attribute(case.inputs, additional_forward_args=case.additional)
    assert expected.shape == (3, 6, 4, 4)
    for rows in (4, 25):
        found = interaction.attribute(case.inputs, additional_forward_args=case.additional, internal_batch_size=rows)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for row in (1, 2):
        one = case.select(slice(row, row + 1))
        found = interaction.attribute(one.inputs, additional_forward_args=one.additional)
        torch.testing.assert_close(found[0], expected[row], rtol=0, atol=1e-12)
    assert not expected[1, 4:].any()


def test_two_pictures():
    torch.manual_seed(3)
    tower = Linear(nn.Conv2d(3, 5, 4, 4), 6, False).double().eval()
    (pixels, _), _ = pair()

    def score(first: Tensor, second: Tensor) -> Tensor:
        return F.cosine_similarity(tower(first), tower(second))

    found = PairInteraction(score, [(tower.block, 0), (tower.block, 1)], LAYOUTS[:1] * 2).attribute(
        (pixels, pixels.roll(1, 0))
    )
    same = PairInteraction(score, [(tower.block, 0), (tower.block, 1)], LAYOUTS[:1] * 2).attribute(
        (pixels.roll(1, 0), pixels)
    )
    assert found.shape == (3, 2, 3, 2, 3)
    torch.testing.assert_close(found, same.permute(0, 3, 4, 1, 2))


def test_arguments_are_checked():
    model = encoder()
    (pixels, ids), mask = pair()
    interaction = method(model)
    with pytest.raises(ValueError, match="inputs: expected two, with a layer each, got 1 inputs"):
        interaction.attribute(pixels, additional_forward_args=(ids, mask))
    with pytest.raises(ValueError, match="baselines: expected one reference for each"):
        interaction.attribute((pixels, ids), additional_forward_args=mask, baselines=(0.0,))
    with pytest.raises(ValueError, match=r"baselines\[0\]: expected the shape"):
        interaction.attribute((pixels, ids), additional_forward_args=mask, baselines=(torch.zeros(2, 2), 0))
    with pytest.raises(ValueError, match="n_steps: expected a whole number"):
        interaction.attribute((pixels, ids), additional_forward_args=mask, n_steps=0)
    dot = PairInteraction(
        lambda first, second, real: (model.image_tower(first) * model.text_tower(second, real)).sum(1),
        [model.image_tower.block, model.text_tower.block],
        LAYOUTS,
    )
    with pytest.raises(ValueError, match="forward_func: interactions need the two embeddings"):
        dot.attribute((pixels, ids), additional_forward_args=mask)
