"""What is borrowed for a pass is given back, and other threads see nothing of it."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from families import image_tower, unpack

from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layers import Layer
from captum_m2ib.engine.suffix import Suffix, Tap


def in_threads(*functions) -> None:
    """Run each function with a common barrier in its own thread, and raise what they raise."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(functions), timeout=30)

    def guarded(function):
        try:
            function(barrier)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_attention_path_of_overlapping_threads():
    seen: list[bool] = []

    def first(barrier):
        with borrowing():
            barrier.wait()
            barrier.wait()
        barrier.wait()

    def second(barrier):
        barrier.wait()
        with borrowing():
            barrier.wait()
            barrier.wait()
            seen.append(torch.backends.mha.get_fastpath_enabled())

    in_threads(first, second)
    left = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    assert seen == [False] and left


def test_compiler_stance_of_overlapping_threads():
    from torch._dynamo import eval_frame

    torch.compiler.set_stance("default")
    model = image_tower().eval()

    def first(barrier):
        def score(arguments):
            barrier.wait()
            barrier.wait()
            return model(arguments[0]).sum(1)

        run(score)
        barrier.wait()

    def second(barrier):
        def score(arguments):
            barrier.wait()
            barrier.wait()
            return model(arguments[0]).sum(1)

        barrier.wait()
        run(score)

    def run(score) -> None:
        with borrowing(model):
            Suffix(score, (torch.randn(2, 3, 32, 32),), 2, [Tap(Layer(model.blocks[0], "block"))])

    in_threads(first, second)
    left = eval_frame._stance.stance
    torch.compiler.set_stance("default")
    assert left == "default"


def test_borrowing_restores_after_a_warning_becomes_an_error():
    model = image_tower().train()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(UserWarning, match="training mode"), borrowing(model):
        pass
    assert [module.training for module in model.modules()] == before


def test_forward_outside_the_pass_is_untouched():
    model = image_tower().eval()
    picture = torch.randn(2, 3, 32, 32)
    plain = model(picture)
    with borrowing(model):
        Suffix(lambda a: F.normalize(model(a[0])).sum(1), (picture,), 2, [Tap(Layer(model.blocks[0], "block"))])
        torch.testing.assert_close(model(picture), plain)
        assert unpack(model.blocks[0](torch.zeros(1, 2, 16))).shape == (1, 2, 16)
