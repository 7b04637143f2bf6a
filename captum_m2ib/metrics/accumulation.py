"""A metric over many batches: ``update``, ``compute`` and ``reset``, as torchmetrics has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_m2ib.metrics.summary import Summary, summarise


class Accumulated:
    r"""A metric of this package, fed batch by batch.

    Args:

        metric (Callable): Returns one value per example, (N,), such as :func:`auroc`; or anything that leads to them,
            such as ``lambda *given: deletion(*given).auc``.
        **settings: Further arguments of it, for every batch.

    Examples::

        >>> from captum_m2ib.metrics import auroc
        >>> found = Accumulated(auroc)
        >>> for part in (image_bits[:1], image_bits[1:]):
        ...     values = found.update(part, part > part.mean())
        >>> found.compute().mean, found.compute().count
        (1.0, 2)
    """

    def __init__(self, metric: Callable[..., Tensor], **settings: Any) -> None:
        self.metric, self.settings = metric, settings
        self._parts: list[Tensor] = []

    @property
    def values(self) -> Tensor:
        """The value of each example so far, (N,), float64, on the CPU."""
        return torch.cat(self._parts) if self._parts else torch.empty(0, dtype=torch.float64)

    def update(self, *args: Any, **kwargs: Any) -> Tensor:
        r"""Measure a batch.

        Args:

            *args: Arguments of the metric.
            **kwargs: Further ones.

        Returns:
            Tensor: The batch's own values, (N,).

        Raises:
            ValueError: if the metric does not return one value per example.
        """
        found = self.metric(*args, **self.settings, **kwargs)
        if not isinstance(found, Tensor) or found.ndim != 1:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"metric: expected one value per example, a tensor (N,), got {got}; wrap the metric, e.g. "
                "lambda *given: deletion(*given).auc."
            )
        self._parts.append(found.detach().double().cpu())
        return found

    def compute(self) -> Summary:
        r"""The mean so far, with its interval; examples without a value are counted, not averaged.

        Returns:
            Summary: as of :func:`summarise`.

        Raises:
            ValueError: if nothing has been measured.
        """
        return summarise(self.values)

    def reset(self) -> None:
        """Forget what has been measured."""
        self._parts.clear()

    def merge(self, other: Accumulated) -> None:
        r"""Take in what another process has measured.

        Args:

            other (Accumulated): Of the same metric.
        """
        self._parts.extend(other._parts)
