"""Contract 6: the model is left exactly as found, whatever happens, also with several threads."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from contracts_state import assert_as_found, disturb, snapshot
from families import Case, Family, family_named, towers_case
from torch import nn

from captum_m2ib import LayerMultiModalInfoBottleneck, MultiModalInfoBottleneck


class Stop(Exception):
    pass


def last_linear_that_runs(case: Case) -> nn.Module:
    """Of the first model: some hold parts that their score does not use."""
    ran = []
    linear = [m for m in case.roots[0].modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_hook(lambda module, *_: ran.append(module)) for m in linear]
    with torch.no_grad():
        case.forward(*case.inputs, *case.additional)
    for handle in handles:
        handle.remove()
    return ran[-1]


def test_after_a_run(family: Family):
    case = family.build()
    if "late" in family.features:
        # ColPali puts hooks of its own on itself when it first runs.
        case.forward(*case.inputs, *case.additional)
    disturb(case)
    before = snapshot(case)
    case.attribute()
    assert_as_found(case, before)


@pytest.mark.parametrize("name", ["clip", "closure", "shared_tower"])
def test_after_a_joint_run(name: str):
    case = family_named(name).build()
    disturb(case)
    before = snapshot(case)
    case.attribute(joint=True)
    assert_as_found(case, before)


# While the pass is recorded, and in the descent.
@pytest.mark.parametrize(("call", "error"), [(1, Stop), (4, KeyboardInterrupt)])
def test_after_an_error_in_the_forward_pass(family: Family, call: int, error: type[BaseException]):
    case = family.build()
    disturb(case)
    # What embeds tokens is found by a pass of its own, once, in which an error is no error yet.
    case.method()
    inner = last_linear_that_runs(case)
    seen = 0

    def fail(*_):
        nonlocal seen
        seen += 1
        if seen == call:
            raise error

    inner.register_forward_hook(fail)
    before = snapshot(case)
    with pytest.raises(error):
        case.attribute(n_steps=10)
    assert_as_found(case, before)
    case.attribute(n_steps=1)


def test_after_an_error_in_the_backward_pass():
    case = family_named("closure").build()

    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise Stop

    def score(*arguments):
        return Fail.apply(case.forward(*arguments))

    before = snapshot(case)
    with pytest.raises(Stop):
        case.attribute(MultiModalInfoBottleneck(score, [choices[0] for choices in case.layers], case.layouts))
    assert_as_found(case, before)


def test_after_refusals():
    case = family_named("clip").build()
    disturb(case)
    before = snapshot(case)
    for options in ({"n_steps": 0}, {"beta": -1.0}, {"variance": 0.0}):
        with pytest.raises(ValueError):
            case.attribute(**options)
        assert_as_found(case, before)
    with pytest.raises(RuntimeError):
        case.attribute(MultiModalInfoBottleneck(case.forward, [nn.Linear(2, 2).eval(), "text_model.embeddings"]))
    assert_as_found(case, before)


def test_inputs_that_require_gradients_still_do():
    case = family_named("closure").build()
    pixels = case.inputs[0].requires_grad_()
    derived = pixels * 2
    with_graph = case.with_inputs((derived, case.inputs[1]), case.additional)
    for each in (case, with_graph):
        attribution = each.attribute()[0]
        assert each.inputs[0].requires_grad and not attribution.requires_grad
    assert pixels.grad is None and derived.grad_fn is not None


def test_frozen_model_is_explained_alike():
    case = family_named("clip").build()
    expected = case.attribute()
    case.roots[0].requires_grad_(False)
    for found, same_bits in zip(case.attribute(), expected, strict=True):
        assert torch.equal(found, same_bits)


def test_training_mode_warns_is_explained_in_eval_mode_and_is_restored():
    case = towers_case(training=True, dropout=0.5)
    case.roots[0].blocks[1].eval()
    before = snapshot(case)
    method = case.method()
    with pytest.warns(UserWarning, match="forward_func: the model is in training mode") as caught:
        found = method.attribute(case.inputs, additional_forward_args=case.additional, n_steps=3, n_samples=3)
    assert ["training mode" in str(warning.message) for warning in caught].count(True) == 1
    assert_as_found(case, before)
    for root in case.roots:
        root.eval()
    case.forward.eval()
    case.training = False
    for one, other in zip(found, case.attribute(n_steps=3), strict=True):
        assert torch.equal(one, other)


def test_batch_statistics_do_not_move():
    case = family_named("conv_maps").build()
    case.forward.train()
    case.training = True
    before = case.roots[0].stem[1].running_mean.clone(), case.roots[0].stem[1].num_batches_tracked.clone()
    case.attribute()
    norm = case.roots[0].stem[1]
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.num_batches_tracked, before[1])


def test_model_made_in_inference_mode_is_refused_or_explained():
    expected = family_named("closure").build()
    with torch.inference_mode():
        case = family_named("closure").build()
        try:
            found = case.attribute()
        except (RuntimeError, ValueError) as error:
            assert "inference" in str(error).lower()
            return
    for one, other in zip(found, expected.attribute(), strict=True):
        torch.testing.assert_close(one, other)


THREADED = ["clip", "closure", "torch_encoder", "conv_maps"]


@pytest.mark.parametrize("name", THREADED)
def test_two_threads_and_a_plain_run_meanwhile(name: str):
    case = family_named(name).build()
    disturb(case)
    settings = {"n_steps": 6, "n_samples": 3}
    expected = case.attribute(**settings)
    with torch.no_grad():
        plain = case.forward(*case.inputs, *case.additional)
    before = snapshot(case)
    found: dict[int, tuple] = {}
    errors: list[BaseException] = []
    barrier, finished = threading.Barrier(3, timeout=60), threading.Event()
    scores: list[torch.Tensor] = []

    def explain(index: int) -> None:
        try:
            barrier.wait()
            found[index] = case.attribute(**settings)
        except BaseException as error:
            errors.append(error)

    def run() -> None:
        try:
            barrier.wait()
            with torch.no_grad():
                while not finished.is_set() or not scores:
                    scores.append(case.forward(*case.inputs, *case.additional))
        except BaseException as error:
            errors.append(error)

    explaining = [threading.Thread(target=explain, args=(index,)) for index in range(2)]
    running = threading.Thread(target=run)
    for thread in (*explaining, running):
        thread.start()
    for thread in explaining:
        thread.join()
    finished.set()
    running.join()
    if errors:
        raise errors[0]
    for attributions in found.values():
        for one, other in zip(attributions, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-3 * float(other.max()))
    for score in scores:
        torch.testing.assert_close(score, plain, rtol=0, atol=1e-5)
    left = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    assert left
    assert_as_found(case, before)


def test_warnings_as_errors_leave_the_model_in_training_mode():
    case = towers_case(training=True)
    before = snapshot(case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="training mode"):
            case.method().attribute(case.inputs, additional_forward_args=case.additional, n_steps=1, n_samples=1)
    assert_as_found(case, before)


@pytest.mark.parametrize("how", ["wrapped", "method"])
def test_compiled_model_gives_the_same_bits(how: str):
    case = family_named("closure").build()
    image, text = case.roots
    layers = [image.blocks[0], text.blocks[0]]
    expected = case.attribute(MultiModalInfoBottleneck(case.forward, layers, case.layouts))
    if how == "wrapped":
        compiled = torch.compile(image, backend="eager")
    else:
        image.compile(backend="eager")
        compiled = image
    compiled(case.inputs[0])

    def score(picture, ids, mask):
        return F.cosine_similarity(compiled(picture), text(ids, mask))

    found = case.attribute(MultiModalInfoBottleneck(score, layers, case.layouts))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3 * float(other.max()))
    torch._dynamo.reset()


def test_data_parallel_is_refused():
    case = family_named("closure").build()
    image, text = case.roots
    parallel = nn.DataParallel(image).eval()

    def score(picture, ids, mask):
        return F.cosine_similarity(parallel(picture), text(ids, mask))

    with pytest.raises(ValueError, match="forward_func: DataParallel"):
        case.attribute(MultiModalInfoBottleneck(score, [image.blocks[0], text.blocks[0]], case.layouts))


def test_a_layer_method_leaves_the_model_alone():
    case = family_named("clip").build()
    disturb(case)
    before = snapshot(case)
    method = LayerMultiModalInfoBottleneck(case.forward, "vision_model.encoder.layers.1")
    method.attribute(case.inputs, additional_forward_args=case.additional, n_steps=2, n_samples=2)
    assert_as_found(case, before)


def test_the_models_own_hooks_count():
    case = family_named("closure").build()
    image = case.roots[0]
    plain = case.attribute()
    handle = image.norm.register_forward_hook(lambda m, a, output: output * torch.linspace(0, 1, 16))
    hooked = case.attribute()
    handle.remove()
    assert not torch.allclose(plain[0], hooked[0], rtol=1e-3)
    for one, other in zip(case.attribute(), plain, strict=True):
        assert torch.equal(one, other)
