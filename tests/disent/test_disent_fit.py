"""Training: it learns, resumes bit for bit, survives interruption, and refuses what it cannot learn from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from disent_models import CLASSES, WIDTH, TinyCNN, batches, planted
from torch.utils.data import DataLoader, TensorDataset

from captum_m2ib.disent import FeatureSet, InfoDisent, storage
from captum_m2ib.disent import training as loop
from captum_m2ib.disent.model import hold_out

IMAGES, LABELS = planted(96)
LOADER = batches(IMAGES, LABELS)


def model(**options) -> InfoDisent:
    return InfoDisent(TinyCNN(), "body", CLASSES, **options)


def parameters(made: InfoDisent) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in made.head.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@contextlib.contextmanager
def interrupted(at_epoch: int) -> Iterator[None]:
    """Makes the second batch of an epoch raise KeyboardInterrupt, and expects it."""
    original = loop._Run.epoch

    def epoch(run: loop._Run) -> None:
        if len(run.record.loss) == at_epoch:
            task_loss, calls = run.task.loss, []

            def loss(*args: Any) -> torch.Tensor:
                calls.append(None)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                return task_loss(*args)

            run.task.loss = loss  # type: ignore[method-assign]
        original(run)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Run, "epoch", epoch)
        yield


@pytest.mark.parametrize("estimator", ["gumbel", "gumbel_soft", "max"])
@pytest.mark.parametrize("transform", ["cayley", "matrix_exp", "householder"])
def test_it_learns_local_patterns_and_stays_orthogonal(transform, estimator):
    made = model(transform=transform, estimator=estimator)
    record = made.fit(LOADER, epochs=40, lr=3e-2, transform_lr=1e-2)
    test_images, test_labels = planted(120, seed=1)
    accuracy = float((made(test_images).argmax(1) == test_labels).float().mean())
    assert accuracy > 0.9
    assert made.head.transform.orthogonality_error() < 1e-5
    assert record.loss[-1] < record.loss[0] and not made.training


def test_live_training_sees_fresh_batches_and_learns():
    seen = []

    class Augmented:
        def __iter__(self):
            generator = torch.Generator().manual_seed(len(seen))
            for images, labels in LOADER:
                noisy = images + 0.05 * torch.randn(images.shape, generator=generator)
                seen.append(noisy)
                yield noisy, labels

    made = model()
    made.fit(Augmented(), (validation := LOADER), cache=False, epochs=25, lr=3e-2)
    assert float((made.predict(validation).argmax(1) == LABELS).float().mean()) > 0.9
    # One pass to standardise by, one per epoch.
    assert len(seen) == 26 * len(LOADER) and not torch.equal(seen[0], seen[len(LOADER)])


def test_cached_training_runs_the_backbone_once_per_picture(monkeypatch):
    made, rows = model(), []
    forward = made.backbone.forward
    monkeypatch.setattr(made.backbone, "forward", lambda images: rows.append(len(images)) or forward(images))
    made.fit(LOADER, epochs=5)
    assert sum(rows) == len(IMAGES)


def test_loaders_of_torch_and_feature_sets_are_the_same_data():
    first, second, third = model(), model(), model()
    first.fit(LOADER, epochs=3)
    second.fit(DataLoader(TensorDataset(IMAGES, LABELS), batch_size=16), epochs=3)
    third.fit(third.collect(LOADER), epochs=3)
    assert_same(parameters(first), parameters(second))
    assert_same(parameters(first), parameters(third))


def test_a_seed_decides_everything():
    runs = []
    for seed in (0, 0, 1):
        made = model()
        before = torch.random.get_rng_state()
        made.fit(LOADER, epochs=3, seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        runs.append(parameters(made))
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0]["raw_weight"], runs[2]["raw_weight"])


def test_probabilities_teach_like_labels():
    made, soft = model(), model()
    made.fit(LOADER, epochs=3)
    probabilities = torch.nn.functional.one_hot(LABELS, CLASSES).float()
    soft.fit(batches(IMAGES, probabilities), epochs=3)
    for name, tensor in parameters(made).items():
        torch.testing.assert_close(parameters(soft)[name], tensor, atol=1e-4, rtol=1e-3)


def test_early_stopping_keeps_the_best_epoch():
    made = model()
    shuffled = LABELS[torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))]
    held_out = FeatureSet(made.collect(LOADER).features, shuffled)
    record = made.fit(LOADER, held_out, epochs=60, lr=5e-2, patience=3)
    assert record.stopped_early and len(record.loss) == record.best_epoch + 4 < 60
    logits = made.predict(held_out)
    kept = float(torch.nn.functional.cross_entropy(logits, shuffled))
    assert kept == pytest.approx(min(record.validation_loss), rel=1e-6)


def test_rates_are_cut_before_a_fit_stops_and_an_interrupted_fit_goes_on_with_cut_rates(tmp_path):
    shuffled = LABELS[torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))]
    settings = {"epochs": 60, "lr": 5e-2, "transform_lr": 1e-2, "patience": 3, "cuts": 1}
    made, again = model(), model()
    held_out = FeatureSet(made.collect(LOADER).features, shuffled)
    record = made.fit(LOADER, held_out, **settings)
    (cut,) = record.cut_at
    assert record.stopped_early and len(record.loss) == max(cut, record.best_epoch) + 4
    with interrupted(at_epoch=cut + 2):
        again.fit(LOADER, held_out, checkpoint=tmp_path / "state", **settings)
    resumed = again.fit(LOADER, held_out, checkpoint=tmp_path / "state", **settings)
    assert resumed.resumed_from == cut + 2 and resumed.loss == record.loss and resumed.cut_at == [cut]
    assert_same(parameters(made), parameters(again))


def test_without_held_out_data_the_last_epoch_is_kept():
    record = model().fit(LOADER, epochs=4, validation_share=0)
    assert record.best_epoch == 3 and record.validation_loss == []


def test_repeated_pictures_are_never_on_both_sides():
    made = model()
    twice = made.collect(batches(torch.cat([IMAGES, IMAGES]), torch.cat([LABELS, LABELS])))
    kept, held_out = hold_out(twice, 0.3, 0)
    assert len(held_out) == 58 and len(kept) == 134
    assert not set(kept.ids.tolist()) & set(held_out.ids.tolist())


def test_sparsity_lowers_the_weights():
    plain, sparse = model(weight="abs"), model(weight="abs")
    plain.fit(LOADER, epochs=15, validation_share=0)
    sparse.fit(LOADER, epochs=15, validation_share=0, sparsity=3.0)
    assert float(sparse.head.class_weight.detach().sum()) < 0.8 * float(plain.head.class_weight.detach().sum())


def test_an_interrupted_fit_resumes_to_the_same_end(tmp_path):
    whole, checkpoint = model(), tmp_path / "deep" / "state.safetensors"
    expected = whole.fit(LOADER, epochs=6)
    broken = model()
    with interrupted(at_epoch=3):
        broken.fit(LOADER, epochs=6, checkpoint=checkpoint)
    content = checkpoint.read_bytes()
    assert not broken.training and list(checkpoint.parent.iterdir()) == [checkpoint]
    resumed = model()
    record = resumed.fit(LOADER, epochs=6, checkpoint=checkpoint)
    assert record.resumed_from == 3 and record.loss == expected.loss
    assert record.validation_loss == expected.validation_loss
    assert_same(parameters(resumed), parameters(whole))
    assert checkpoint.read_bytes() != content


def test_a_crash_while_writing_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoint = tmp_path / "state.safetensors"
    made = model()
    made.fit(LOADER, epochs=2, checkpoint=checkpoint)
    content = checkpoint.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        model().fit(LOADER, epochs=4, checkpoint=checkpoint, resume=False)
    monkeypatch.undo()
    assert checkpoint.read_bytes() == content


def test_the_file_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(storage.os, name, lambda *a, real=real, name=name: (order.append(name), real(*a))[1])
    storage.write_tensors(tmp_path / "file", {"a": torch.ones(2)}, {"b": [1]})
    assert order == ["fsync", "replace", "fsync"]
    assert storage.read_tensors(tmp_path / "file")[1] == {"b": [1]}


def test_a_finished_fit_is_not_trained_again(tmp_path):
    checkpoint = tmp_path / "state.safetensors"
    first, second = model(), model()
    first.fit(LOADER, epochs=3, checkpoint=checkpoint)
    record = second.fit(LOADER, epochs=3, checkpoint=checkpoint)
    assert record.resumed_from == 3
    assert_same(parameters(first), parameters(second))


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    checkpoint = tmp_path / "state.safetensors"
    model().fit(LOADER, epochs=2, checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"^checkpoint: expected the settings .* epochs=2, lr=0.01; pass these"):
        model().fit(LOADER, epochs=3, lr=0.5, checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"^checkpoint: .* belongs to another head"):
        model(transform="none").fit(LOADER, epochs=2, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:200])
    with pytest.raises(OSError, match="is damaged"):
        model().fit(LOADER, epochs=2, checkpoint=checkpoint)
    model().fit(LOADER, epochs=2, checkpoint=checkpoint, resume=False)


def test_save_and_load(tmp_path, fitted):
    path = tmp_path / "head.safetensors"
    fitted.save(path)
    loaded = InfoDisent.load(path, TinyCNN())
    assert torch.equal(loaded(IMAGES), fitted(IMAGES))
    assert loaded.class_names == fitted.class_names and loaded.options == fitted.options
    storage.write_tensors(path, {"a": torch.ones(1)}, {})
    with pytest.raises(OSError, match="holds no InfoDisent head"):
        InfoDisent.load(path, TinyCNN())
    with pytest.raises(FileNotFoundError, match=r"^path: "):
        InfoDisent.load(tmp_path / "nothing", TinyCNN())


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: model().fit([]), ValueError, "^loader: expected at least one batch, got none"),
        (lambda: model().fit([], cache=False), ValueError, "^loader: expected at least one batch, got none"),
        (lambda: model().fit(batches(IMAGES)), ValueError, "^labels: expected one per example, got none"),
        (
            lambda: InfoDisent(TinyCNN(), "body", 2).fit(LOADER),
            ValueError,
            "^n_classes: expected labels from 0 to 1, got labels from 0 to 2",
        ),
        (
            lambda: model().fit(batches(IMAGES, torch.rand(96, 5))),
            ValueError,
            r"^labels: expected classes, \(96,\), or probabilities of n_classes=3",
        ),
        (lambda: model().fit(batches(IMAGES * torch.nan, LABELS)), ValueError, "^features: expected finite numbers"),
        (lambda: model(channels=9).fit(LOADER), ValueError, "^channels: expected features of 9 channels, got 6"),
        (lambda: model().fit(iter(LOADER), LOADER, cache=False), ValueError, "pass a loader, not an iterator"),
        (lambda: model().fit(LOADER, epochs=0), ValueError, "^epochs: expected a whole number of at least 1, got 0"),
        (lambda: model().fit(LOADER, lr=-1.0), ValueError, "^lr: expected a number of at least 0"),
        (lambda: model().fit(LOADER, rate=1), ValueError, "^rate: not a setting of fit; expected one of epochs"),
        (lambda: model().fit(LOADER, epochs=9, lr=3e37), FloatingPointError, "^lr: expected a finite loss"),
        (lambda: model(rotation=1), ValueError, "^rotation: not an option of InfoDisent; expected one of transform"),
        (lambda: model(class_names=["a"]), ValueError, "^class_names: expected 3, one per class, got 1"),
        (lambda: InfoDisent(TinyCNN(), "body", 0, channels=6), ValueError, "^n_classes: expected a whole number"),
        (lambda: model()(IMAGES), RuntimeError, "^head: not built before"),
        (
            lambda: model(channels=WIDTH + 1)(IMAGES),
            ValueError,
            r"^features: expected a tensor of shape \(N, 7, h, w\)",
        ),
    ],
)
def test_bad_input_is_named(run, error, message):
    with pytest.raises(error, match=message):
        run()
