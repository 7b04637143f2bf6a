"""What is measured on captions that name two objects of a scene: each name's map against its own object, and the score
while the patches go or come in a method's order.

A method of first order has one map of the picture for both names; asked for one name alone (``m2ib-phrase``), it is
given that as a caption. In the curves missing patches show the ground, as they do while interactions are found.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from captum_m2ib.attr import GradECLIP, MultiModalInfoBottleneck, PairInteraction
from captum_m2ib.benchmark.tables import Figure, Values
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.layouts import PatchLayout, per_patch
from captum_m2ib.engine.stakes import NothingToExplainWarning
from captum_m2ib.games import Interactions, PairGame, interactions
from captum_m2ib.metrics.localisation import auroc, pointing_game, relevance_mass
from captum_m2ib.scenes.drawing import Scene
from captum_m2ib.scenes.probes import pair_probes

Maps = NDArray[np.float64]

OURS = "interactions"
FIGURES = (
    Figure("pointing", "each name's map", 1, "pointing"),
    Figure("mass", "each name's map", 1, "mass"),
    Figure("auroc", "each name's map", 1, "AUROC"),
    Figure("own above other", "each name's map", 1, "own object above the other"),
    Figure("insertion", "the whole caption", 1, "insertion"),
    Figure("deletion", "the whole caption", -1, "deletion"),
    Figure("seconds", "cost", 0, "s per scene", 2),
)
"""Every figure, in the order of the tables."""


class Said(NamedTuple):
    """What a method says of a scene: a map per name, (rows, columns), and of the whole caption, where it does."""

    names: list[Maps]
    whole: Maps | None


@dataclass(frozen=True)
class Asked:
    r"""One scene.

    Attributes:

        scene (Scene): Whose caption names two objects.
        names (tuple[list[int], list[int]]): The words of each name, by their positions in the caption.
        objects (tuple[int, int]): The objects that they name.
    """

    scene: Scene
    names: tuple[list[int], list[int]]
    objects: tuple[int, int]

    @classmethod
    def of(cls, scene: Scene) -> Asked:
        """What there is to ask about a scene."""
        first, second = dict.fromkeys(thing for thing in scene.word_objects if thing is not None)
        words = [[i for i, thing in enumerate(scene.word_objects) if thing == named] for named in (first, second)]
        return cls(scene, (words[0], words[1]), (first, second))

    def phrase(self, name: int) -> str:
        """One name as a caption of its own."""
        words = [self.scene.words[place] for place in self.names[name]]
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def measure(encoder: DualEncoder, probes: int, seed: int, show_progress: bool = False) -> Values:
    r"""Measure every method on held-out scenes.

    Args:

        encoder (DualEncoder): A model trained on scenes, whose tokens are words.
        probes (int): How many scenes.
        seed (int): Which.
        show_progress (bool, optional): Show a progress bar. Default: False

    Returns:
        dict: method to figure to one row with one value per scene, means over both names.
    """
    from tqdm.auto import tqdm

    values: dict[str, dict[str, list[list[float]]]] = {}
    for number, scene in enumerate(tqdm(pair_probes(probes, seed), unit="scene", disable=not show_progress)):
        asked = Asked.of(scene)
        game = PairGame(encoder, encoder.prepare(scene.image, scene.caption))
        for name, said, seconds in _said(encoder, asked, seed + number):
            found = {**_localised(said, asked), **_curves(game, said), "seconds": seconds}
            for figure, value in found.items():
                values.setdefault(name, {}).setdefault(figure, [[]])[0].append(value)
    return values


def _said(encoder: DualEncoder, asked: Asked, seed: int) -> list[tuple[str, Said, float]]:
    """What every method says of one scene, and its seconds."""
    found: list[Interactions] = []

    def played() -> Said:
        found.append(interactions(encoder, asked.scene.image, asked.scene.caption, seed=seed))
        (one,) = found
        # Beside all words, not beside half of them.
        whole = one.fit.picture + (1 - one.fit.p) * one.fit.across.sum(0)
        return Said([one.map_of(words) for words in asked.names], whole[one.places])

    ways: dict[str, Callable[[], Said]] = {
        OURS: played,
        "pair-interaction": lambda: _pair_interaction(encoder, asked),
        "m2ib": lambda: _one_map(encoder, MultiModalInfoBottleneck, asked),
        "m2ib-phrase": lambda: _phrases(encoder, asked),
        "grad-eclip": lambda: _one_map(encoder, GradECLIP, asked),
        "random": lambda: _random(encoder, asked, seed),
    }
    told = []
    for name, way in ways.items():
        began = perf_counter()
        said = way()
        told.append((name, said, perf_counter() - began))
    # The same passes: the picture's own values, without the words.
    alone = found[0].picture_map
    told.insert(1, ("interactions-alone", Said([alone, alone], alone), told[0][2]))
    return told


def _pair_interaction(encoder: DualEncoder, asked: Asked) -> Said:
    pairs = encoder.prepare(asked.scene.image, asked.scene.caption)
    looks = PairInteraction(encoder).attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args)
    table = looks[0].double().cpu().numpy()
    # Word i is token i + 1.
    return Said([table[[place + 1 for place in words]].sum(0) for words in asked.names], table.sum(0))


def _one_map(encoder: DualEncoder, method: type, asked: Asked) -> Said:
    found = _picture_map(encoder, method, asked.scene, asked.scene.caption)
    return Said([found, found], found)


def _phrases(encoder: DualEncoder, asked: Asked) -> Said:
    names = [_picture_map(encoder, MultiModalInfoBottleneck, asked.scene, asked.phrase(name)) for name in (0, 1)]
    return Said(names, None)


def _picture_map(encoder: DualEncoder, method: type, scene: Scene, caption: str) -> Maps:
    """A method's map of the picture, summed over each patch."""
    pairs = encoder.prepare(scene.image, caption)
    with warnings.catch_warnings():
        # An empty map is counted as it is.
        warnings.simplefilter("ignore", NothingToExplainWarning)
        found = method(encoder).attribute(pairs.inputs[0], additional_forward_args=_rest(pairs))
    layout = encoder.layouts[0]
    assert isinstance(layout, PatchLayout)
    patches: Maps = per_patch(layout, found.detach().double().sum(1))[0].cpu().numpy()
    return patches


def _rest(pairs: object) -> tuple[object, ...]:
    return (pairs.inputs[1], *pairs.additional_forward_args)  # type: ignore[attr-defined]


def _random(encoder: DualEncoder, asked: Asked, seed: int) -> Said:
    side = PairGame(encoder, encoder.prepare(asked.scene.image, asked.scene.caption)).places.shape
    drawn = np.random.default_rng(seed).random((3, *side))
    return Said([drawn[0], drawn[1]], drawn[2])


def _localised(said: Said, asked: Asked) -> dict[str, float]:
    """How well each name's map finds its own object, as means over both names."""
    masks = torch.from_numpy(asked.scene.masks[list(asked.objects)])
    spread = (np.array(masks.shape[1:]) // np.array(said.names[0].shape)).tolist()
    maps = torch.from_numpy(np.stack([np.kron(one, np.ones(spread)) for one in said.names]))
    found = {"pointing": pointing_game(maps, masks), "mass": relevance_mass(maps, masks), "auroc": auroc(maps, masks)}
    means = torch.stack([torch.stack([one[mask].mean() for mask in masks]) for one in maps])
    own, other = means.diagonal(), means.flip(1).diagonal()
    found["own above other"] = (own > other).double() + 0.5 * (own == other).double()
    return {name: float(values.double().nanmean()) for name, values in found.items()}


def _curves(game: PairGame, said: Said, steps: int = 16) -> dict[str, float]:
    """Areas under the score while patches come and go, most relevant first, beside the whole caption."""
    if said.whole is None:
        return {"insertion": float("nan"), "deletion": float("nan")}
    relevance = np.zeros(game.picture_players)
    relevance[game.places] = said.whole
    rank = np.argsort(np.argsort(-relevance, kind="stable"), kind="stable")
    limits = np.linspace(0, len(rank), steps + 1).round()
    inserted: NDArray[np.bool_] = rank[None] < limits[:, None]
    everything = np.ones((1, game.caption_players), dtype=bool)
    scores = game.scores(np.concatenate([inserted, ~inserted]), everything)[:, 0]
    parts = torch.from_numpy(scores).split(steps + 1)
    areas = [float(torch.trapezoid(part) / steps) for part in parts]
    return {"insertion": areas[0], "deletion": areas[1]}


def methods_of(values: Values) -> Sequence[str]:
    """Those among which ours is compared with the best; chance is none of them, nor are ours without words."""
    return [name for name in values if name not in (OURS, "interactions-alone", "random")]
