"""What is measured on drawn pages: maps of a page against the place of what the query names.

Each page is explained twice: for the words of the query that name the item, as what they add to the score, and for the
whole query. Maps are taken less their least value, for which a similarity map is drawn, too: that changes neither where
they point nor how they rank, and leaves maps with zeros as they are.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter

import numpy as np
import torch

from captum_m2ib.benchmark.choice import short
from captum_m2ib.benchmark.figure_page import Example, explained
from captum_m2ib.benchmark.methods import Method
from captum_m2ib.benchmark.parts import Found, Model, Part, spans_of
from captum_m2ib.benchmark.store import Store
from captum_m2ib.benchmark.tables import Figure
from captum_m2ib.benchmark.truth import grids_of, lists_of, on_truth
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.pairs import Pairs
from captum_m2ib.engine.stakes import NothingToExplainWarning
from captum_m2ib.scenes.pages import PageProbe, page_probes

BLOCK = 16
_SHOWN = 4

_HEADS = {"pointing": "pointing", "mass": "mass", "auroc": "AUROC"}
_TITLES = {"words": "the words that name it", "query": "the whole query"}

FIGURES: tuple[Figure, ...] = (
    *(Figure(f"{of} {name}", title, 1, head) for of, title in _TITLES.items() for name, head in _HEADS.items()),
    Figure("seconds per page", "cost", 0, "s per page"),
)
"""Every figure, in the order of the tables."""


@dataclass(frozen=True)
class Plan:
    r"""What is measured.

    Attributes:

        probes (int): How many held-out pages.
        seed (int): Which.
    """

    probes: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("probes", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name}: expected at least {least}, got {getattr(self, name)}.")


def run_settings(model: Model, plan: Plan) -> dict[str, object]:
    """What all results of a run have in common, for its :class:`Store`."""
    return {"kind": "pages", "model": model.digest, "block": BLOCK, **asdict(plan)}


def measure_all(
    model: Model, methods: Sequence[Method], plan: Plan, store: Store, show_progress: bool = False
) -> dict[str, dict[str, list[list[float]]]]:
    r"""Measure what the store does not hold yet.

    Args:

        model (Model): A late-interaction model.
        methods (sequence of Method): The methods.
        plan (Plan): What is measured.
        store (Store): Where parts are kept.
        show_progress (bool, optional): Show a progress bar. Default: False

    Returns:
        dict: method to figure to one row with one value per page. A method that does not work on the first block is
        told of on stderr and left out.

    Raises:
        ValueError: if no method works.
    """
    from tqdm.auto import tqdm

    probes = page_probes(plan.probes, plan.seed)
    spans = spans_of(len(probes), BLOCK)
    values: dict[str, dict[str, list[list[float]]]] = {}
    with tqdm(total=len(methods) * len(spans), unit="block", disable=not show_progress) as bar:
        for method in methods:
            bar.set_description(method.name)
            found: Found = {}
            for number, span in enumerate(spans):
                run = partial(measure, method, model.encoder, probes[span])
                try:
                    Part(store, model, method).add(found, "pages", number, {}, run)
                except (ValueError, RuntimeError) as error:
                    # What a method lacks shows at once; whatever comes later is something else.
                    if number:
                        raise
                    print(f"left out  {method.name}: {short(error)}", file=sys.stderr)
                    break
                bar.update()
            if found:
                values[method.name] = {name: [row] for name, row in found.items()}
    if not values:
        raise ValueError("--method: none of them works on this model; see above.")
    return values


def measure(method: Method, encoder: DualEncoder, probes: Sequence[PageProbe]) -> Found:
    r"""One method's figures of some pages.

    Args:

        method (Method): The method.
        encoder (DualEncoder): A late-interaction model.
        probes (sequence of PageProbe): The pages.

    Returns:
        dict: figure to one value per page.
    """
    masks = torch.from_numpy(np.stack([probe.page.mask(probe.kind) for probe in probes]))
    pairs = pairs_of(encoder, probes)
    explainer = method(encoder)
    found: Found = {}
    began = perf_counter()
    for of, asked in (("words", encoder.count_tokens(pairs, [probe.kind for probe in probes])), ("query", pairs)):
        ids, additional = asked.inputs[1], asked.additional_forward_args
        with warnings.catch_warnings():
            # An empty map is counted as it is.
            warnings.simplefilter("ignore", NothingToExplainWarning)
            maps = explainer.attribute(asked.inputs[0], (ids, *additional))
        assert isinstance(maps, torch.Tensor)
        grids = torch.stack(grids_of(encoder, asked, maps.detach()))
        measured = lists_of(on_truth(grids - grids.amin((1, 2), keepdim=True), masks))
        found.update({name.replace("image", of): values for name, values in measured.items()})
    # Both maps of each page.
    found["seconds per page"] = [(perf_counter() - began) / (2 * len(probes))] * len(probes)
    return found


def pairs_of(encoder: DualEncoder, probes: Sequence[PageProbe]) -> Pairs:
    """Pages and their queries, prepared."""
    return encoder.prepare([probe.page.picture for probe in probes], [probe.query for probe in probes])


def examples_of(encoder: DualEncoder, methods: Sequence[Method], plan: Plan) -> list[Example]:
    r"""Explain some of the pages by every method, for the words that name the item.

    Args:

        encoder (DualEncoder): A late-interaction model.
        methods (sequence of Method): The methods.
        plan (Plan): Which pages.

    Returns:
        list[Example]: the first four, or all.
    """
    probes = page_probes(min(plan.probes, _SHOWN), plan.seed)
    pairs = encoder.count_tokens(pairs_of(encoder, probes), [probe.kind for probe in probes])
    masks = [probe.page.mask(probe.kind) for probe in probes]
    return explained(encoder, methods, pairs, pairs.pictures, masks)
