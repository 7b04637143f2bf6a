"""Do the next few things in other threads, and hand them over in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


@contextmanager
def ahead(
    function: Callable[[Item], Item] | None, items: Iterable[Item], workers: int, most: int
) -> Iterator[Iterator[Item]]:
    r"""Apply a function to items in threads, as many ahead of their use as allowed.

    The items are drawn in the caller's thread. However the block is left, no thread outlives it, and what has not
    begun by then is dropped.

    Args:

        function (callable): For one item; must be safe to run in several threads.
        items (iterable): Any number, read lazily.
        workers (int): Threads; with 0 the items come as they are, and the function is not used.
        most (int): Results that wait to be used, at most.

    Returns:
        iterator: the results in the order of the items; an error of the function is raised at its item's turn.
    """
    if not workers or function is None:
        yield iter(items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ahead")
    try:
        yield _in_order(pool, function, items, most)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: Executor, function: Callable[[Item], Item], items: Iterable[Item], most: int) -> Iterator[Item]:
    waiting: deque[Future[Item]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
