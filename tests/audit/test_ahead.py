"""Work done ahead in threads: in order, bounded, errors at their turn, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_m2ib.audit.ahead import ahead

PATIENCE = 60


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


@given(count=st.integers(0, 40), workers=st.integers(0, 4), most=st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_results_come_in_order_and_no_more_are_made_than_allowed(count: int, workers: int, most: int):
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for item in range(count):
            drawn.append(item)
            yield item

    used = []
    with ahead(lambda item: 10 * item, items(), workers, most) as results:
        for result in results:
            used.append(result)
            assert len(drawn) <= len(used) + (most if workers else 0)
    assert used == [item if workers == 0 else 10 * item for item in range(count)]
    assert threads() == []


def test_order_is_that_of_the_items_whoever_is_done_first():
    last_is_done = threading.Event()

    def work(item: int) -> int:
        if item == 3:
            last_is_done.set()
        elif item == 0:
            assert last_is_done.wait(PATIENCE)
        return item

    with ahead(work, range(4), 2, 4) as results:
        assert list(results) == [0, 1, 2, 3]


def test_work_goes_on_while_results_are_used():
    begun = [threading.Event() for _ in range(6)]

    def work(item: int) -> int:
        begun[item].set()
        return item

    with ahead(work, range(6), 1, 2) as results:
        for result in results:
            assert all(event.wait(PATIENCE) for event in begun[: result + 3])


def test_an_error_is_raised_at_its_turn():
    def work(item: int) -> int:
        if item == 2:
            raise KeyError(item)
        return item

    used = []
    with pytest.raises(KeyError, match="2"), ahead(work, range(9), 3, 5) as results:
        used.extend(iter(lambda: next(results), None))
    assert used == [0, 1] and threads() == []


def test_items_are_drawn_by_the_caller():
    drawn_by = set()

    def items() -> Iterator[int]:
        for item in range(20):
            drawn_by.add(threading.current_thread())
            yield item

    with ahead(lambda item: item, items(), 3, 4) as results:
        list(results)
    assert drawn_by == {threading.current_thread()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_who_leaves_early_leaves_no_thread_and_no_work(error: type[BaseException]):
    begun = []
    release = threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item:
            assert release.wait(PATIENCE)
        return item

    with pytest.raises(error), ahead(work, range(100), 2, 50) as results:
        assert next(results) == 0
        release.set()
        raise error
    assert threads() == [] and len(begun) <= 51
