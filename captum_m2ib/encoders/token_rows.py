"""Several tables that the same token ids enter, as one layer.

Some text towers look their ids up twice: once for the tokens, once for what later blocks add to them (a second table of
values, embeddings per block). Gates at the first table alone would let the caption through the second. Here the rows of
all of them are one tensor, side by side, of which each table hands on its own part.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_m2ib.encoders.towers import device_of


class TokenRows(nn.Module):
    r"""Tables read at the same ids, their rows side by side.

    Args:

        tables (sequence of nn.Module): Each from token ids, (N, L), to rows, (N, L, channels).

    Examples::

        >>> rows = TokenRows([torch.nn.Embedding(8, 3), torch.nn.Embedding(8, 2)])
        >>> rows(torch.tensor([[1, 2, 4, 5]])).shape
        torch.Size([1, 4, 5])
    """

    def __init__(self, tables: Sequence[nn.Module]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(tables)
        # The tables stay in the mode that their model is in.
        self.training = self.tables.training = False
        self._widths = [_width_of(table) for table in tables]

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([table(ids) for table in self.tables], -1)

    @contextlib.contextmanager
    def handed_on(self, ids: Tensor) -> Iterator[None]:
        """While active, the tables return their parts of what this module returns for ``ids``, in this thread."""
        # As each table itself would return them, so that nothing rounds otherwise.
        thread, parts = threading.get_ident(), map(torch.Tensor.contiguous, self(ids).split(self._widths, -1))
        handles = [
            table.register_forward_hook(_returning(part, thread))
            for table, part in zip(self.tables, parts, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _width_of(table: nn.Module) -> int:
    """How many channels a table's rows have."""
    with torch.no_grad():
        rows: Tensor = table(torch.zeros(1, 1, dtype=torch.long, device=device_of(table)))
    return rows.shape[-1]


def _returning(part: Tensor, thread: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        return part if threading.get_ident() == thread else None

    return hook
