"""Stand between a model's modules inside a pass that is itself recorded or rerun."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from captum_m2ib.interception import Handler, current_handler, intercept


@contextlib.contextmanager
def interpose(handler: Handler) -> Iterator[None]:
    """Route this thread's module calls through ``handler(proceed, aside, module, args, kwargs)``.

    ``proceed`` goes on to whatever intercepts already; ``aside`` runs the module without it, so that only the calls
    inside are seen there.
    """
    outer = current_handler()

    def go_on(original: Handler, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(module, *args, **kwargs) if outer is None else outer(original, module, args, kwargs)

    def through(original: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return handler(partial(go_on, original), original, module, args, kwargs)

    with intercept(through):
        yield
