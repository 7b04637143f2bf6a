"""Names of a package that are imported when they are first used, so that a command line need not wait for torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazily(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    r"""What a package's ``__getattr__`` and ``__dir__`` are to be.

    Args:

        package (str): Its ``__name__``.
        homes (Mapping): Per module inside the package, the names that come from it.

    Returns:
        tuple: both functions.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in homes:
            return importlib.import_module(f"{package}.{name}")
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)

    return get, lambda: sorted({*vars(sys.modules[package]), *home_of})
