"""A run of models x methods x blocks of probes: what it keeps of each, and the tables that come of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from captum_m2ib.benchmark.methods import OURS, Method
from captum_m2ib.benchmark.store import Store, write_atomically
from captum_m2ib.benchmark.tables import Comparison, Figure, Values, compare, figures_csv, markdown, summary_csv
from captum_m2ib.encoders.dual_encoder import DualEncoder

Found: TypeAlias = dict[str, list[float]]
"""Figure to one value per probe."""

TABLES = ("figures.csv", "summary.csv", "table.md")
"""Every value, the means, and the tables of a page."""


@dataclass(frozen=True)
class Model:
    """A model, by the name under which its parts lie."""

    name: str
    path: str
    encoder: DualEncoder

    @cached_property
    def digest(self) -> str:
        """What tells its weights and statistics from others'."""
        seen = hashlib.sha256()
        for name, tensor in sorted(self.encoder.state_dict().items()):
            seen.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        for name, channels in sorted(self.encoder.statistics.items()):
            seen.update(name.encode() + channels.mean.numpy().tobytes() + channels.std.numpy().tobytes())
        return seen.hexdigest()[:16]


@dataclass(frozen=True)
class Part:
    """What is kept of one method on one model."""

    store: Store
    model: Model
    method: Method

    def add(self, found: Found, group: str, number: int, told: Mapping[str, Any], run: Callable[[], Found]) -> None:
        r"""Append a group's figures of one block, measured now or before.

        Args:

            found (dict): What is appended to.
            group (str): The group's name.
            number (int): Which block.
            told (mapping): What the figures depend on beside model and method; plain values.
            run (Callable): Measures them.
        """
        given = {
            "model": self.model.digest,
            "family": self.method.family.name,
            "settings": list(self.method.settings),
            **told,
        }
        kept = self.store.read(self.model.name, self.method.name, group, number, given)
        if kept is None:
            kept = run()
            self.store.write(self.model.name, self.method.name, group, number, given, kept)
        for name, values in kept.items():
            found.setdefault(name, []).extend(values)


def spans_of(probes: int, block: int) -> list[slice]:
    """So many probes, cut into blocks."""
    return [slice(start, min(start + block, probes)) for start in range(0, probes, block)]


def write_comparison(
    folder: Path, models: Sequence[str], methods: Sequence[Method], values: Values, figures: Sequence[Figure]
) -> Comparison:
    r"""Write :data:`TABLES` of ours beside every other method.

    Args:

        folder (Path): Where.
        models (sequence of str): The models' names, in the order of the rows.
        methods (sequence of Method): What was measured; floors are no rivals.
        values (mapping): Method to figure to one row per model, one value per probe.
        figures (sequence of Figure): Which figures, in the order of the tables.

    Returns:
        Comparison: of ours with every other method.
    """
    rivals = [method.name for method in methods if not method.is_floor and not method.family.name.startswith(OURS)]
    compared = compare(values, figures, OURS, rivals)
    write_tables(folder, models, values, compared)
    return compared


def write_tables(folder: Path, models: Sequence[str], values: Values, compared: Comparison) -> None:
    r"""Write :data:`TABLES`.

    Args:

        folder (Path): Where; made if it is not there.
        models (sequence of str): The models' names, in the order of the rows.
        values (mapping): What was measured.
        compared (Comparison): What came of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = (figures_csv(values, models, compared.figures), summary_csv(compared), markdown(compared))
    for name, text in zip(TABLES, texts, strict=True):
        write_atomically(folder / name, text)
