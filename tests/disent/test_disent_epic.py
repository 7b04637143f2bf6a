"""EPIC: not one prediction changes, channels become purer, heads that it cannot keep are refused."""

from __future__ import annotations

import pytest
import torch
from disent_models import CLASSES, TinyCNN, TinyViT, batches, planted

from captum_m2ib.disent import EPIC, InfoDisentAttribution, find_prototypes

IMAGES, _ = planted(64, seed=5)
LOADER = batches(IMAGES)


@pytest.mark.parametrize("transform", ["matrix_exp", "cayley", "householder"])
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_predictions_stay_and_purity_grows(kind, transform):
    backbone = TinyCNN() if kind == "cnn" else TinyViT(2)
    model = EPIC(backbone, "body" if kind == "cnn" else "block", "fc", transform=transform)
    before = find_prototypes(model, LOADER, rank_by="sum").purity[:, 0].mean()
    record = model.fit(LOADER, prototypes=(20, 5), epochs=30, transform_lr=2e-2)
    after = find_prototypes(model, LOADER, rank_by="sum").purity[:, 0].mean()
    expected = backbone(IMAGES).detach()
    assert float((model(IMAGES).detach() - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert float(after) > float(before) + 0.02
    assert model.head.transform.orthogonality_error() < 1e-5 and len(record.loss) == 30


def test_explanations_are_shared_with_infodisent(epic):
    logits = epic.backbone(IMAGES).detach()
    found = epic.contributions(IMAGES, 2)
    total = (found.positive + found.negative).sum(1) + found.bias
    torch.testing.assert_close(total, logits[:, 2], atol=1e-5, rtol=1e-4)
    maps = InfoDisentAttribution(epic).attribute(IMAGES, target=2)
    torch.testing.assert_close(maps.sum((1, 2, 3)) + found.bias, logits[:, 2], atol=1e-5, rtol=1e-4)


def test_the_number_of_prototypes_falls_linearly(monkeypatch):
    import captum_m2ib.disent.epic as room

    counts = []
    search = room.find_prototypes
    monkeypatch.setattr(room, "find_prototypes", lambda *a, **k: counts.append(a[2]) or search(*a, **k))
    EPIC(TinyCNN(), "body", "fc").fit(LOADER, prototypes=(40, 4), epochs=7, refresh=2)
    assert counts == [40, 28, 16, 4]


def test_an_interrupted_fit_resumes_between_two_searches(tmp_path):
    runs = []
    for stop in (False, True):
        model = EPIC(TinyCNN(), "body", "fc")
        path = tmp_path / f"{stop}.safetensors"
        if stop:
            original, calls = model.head.maps, []

            def maps(features, original=original, calls=calls):
                calls.append(None)
                if len(calls) > 6:
                    raise KeyboardInterrupt
                return original(features)

            model.head.maps = maps
            with pytest.raises(KeyboardInterrupt):
                model.fit(LOADER, prototypes=(20, 5), epochs=8, checkpoint=path)
            model = EPIC(TinyCNN(), "body", "fc")
        record = model.fit(LOADER, prototypes=(20, 5), epochs=8, checkpoint=path)
        runs.append((record.loss, model.head.transform.weight.detach()))
    assert record.resumed_from == 3
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])


def test_save_and_load(tmp_path, epic):
    path = tmp_path / "basis.safetensors"
    epic.save(path)
    loaded = EPIC(TinyCNN(), "body", "fc")
    loaded.load_head(path)
    assert torch.equal(loaded.head.transform.weight, epic.head.transform.weight)
    with pytest.raises(ValueError, match=r"^path: .* another classifier"):
        EPIC(TinyCNN(seed=1), "body", "fc").load_head(path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: EPIC(TinyCNN(), "body", "body"), TypeError, "^classifier: expected the nn.Linear .* got Sequential"),
        (
            lambda: EPIC(TinyViT(1, pool="norm"), "block", "fc").fit(LOADER),
            ValueError,
            "^classifier: expected it to read the mean over positions of layer 'block'",
        ),
        (
            lambda: EPIC(TinyCNN(), "body", torch.nn.Linear(6, CLASSES + 1)).fit(LOADER),
            ValueError,
            "^classifier: expected the backbone to return its logits",
        ),
        (lambda: EPIC(TinyCNN(), "body", "fc").fit([]), ValueError, "^loader: expected at least one batch"),
        (lambda: EPIC(TinyCNN(), "body", "fc").fit(LOADER, refresh=0), ValueError, "^prototypes, refresh: expected"),
        (lambda: EPIC(TinyCNN(), "body", "fc", transform="none").fit(LOADER), ValueError, "^transform: expected one"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
