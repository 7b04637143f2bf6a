"""What is measured on captions that name two objects of a scene: each name's map against its own object, the score
while the patches go or come in a method's order, and how well a method tells the score of coalitions.

A method of first order has one map of the picture for both names; asked for one name alone (``m2ib-phrase``), it is
given that as a caption. In the curves and coalitions missing patches show the ground, as they do while interactions are
found.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import process_time
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from captum_m2ib.attr import GradECLIP, MultiModalInfoBottleneck, PairInteraction
from captum_m2ib.benchmark.interactions.regression import regression
from captum_m2ib.benchmark.tables import Figure, Values
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.layouts import PatchLayout
from captum_m2ib.engine.stakes import NothingToExplainWarning
from captum_m2ib.engine.units import per_patch
from captum_m2ib.games import Fit, PairGame, interactions
from captum_m2ib.games.fit import Draws, Floats, Masks, draw, explained
from captum_m2ib.metrics.localisation import auroc, pointing_game, relevance_mass
from captum_m2ib.metrics.similarity import spearman
from captum_m2ib.scenes.drawing import Scene
from captum_m2ib.scenes.probes import pair_probes

OURS, ALONE = "interactions", "interactions-alone"
FIGURES = (
    Figure("pointing", "each name's map", 1, "pointing"),
    Figure("mass", "each name's map", 1, "mass"),
    Figure("auroc", "each name's map", 1, "AUROC"),
    Figure("own above other", "each name's map", 1, "own object above the other"),
    Figure("insertion", "the whole caption", 1, "insertion"),
    Figure("deletion", "the whole caption", -1, "deletion"),
    Figure("explained", "the score of coalitions", 1, "variance explained"),
    Figure("ranks", "the score of coalitions", 1, "rank correlation"),
    Figure("seconds", "cost", 0, "s of a processor per scene", 2),
)
"""Every figure, in the order of the tables."""

# With which probability patches and words take part, and how many masked pictures and captions no fit has seen.
_P, _HELD_OUT = 0.5, (256, 64)


class Said(NamedTuple):
    """What a method says of a scene: a map per name, (rows, columns); of the whole caption and of the score of masked
    pictures beside masked captions, where it does; and whether the latter is in units of the score."""

    names: list[Floats]
    whole: Floats | None
    scores: Callable[[Masks, Masks], Floats] | None = None
    has_unit: bool = True


class HeldOut(NamedTuple):
    """Coalitions of the picture's and the caption's players, and the score of each with each."""

    pictures: Draws
    captions: Draws
    scores: Floats

    @classmethod
    def of(cls, game: PairGame, seed: int) -> HeldOut:
        """Fresh ones; :func:`captum_m2ib.games.interactions` draws with this seed and the three after it."""
        pictures = draw(game.picture_players, _HELD_OUT[0], _P, seed + 4)
        captions = draw(game.caption_players, _HELD_OUT[1], _P, seed + 5)
        return cls(pictures, captions, game.scores(pictures.masks, captions.masks))


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


def measure(
    encoder: DualEncoder,
    probes: int,
    seed: int,
    *,
    within: int | None = None,
    shapiq: Sequence[int] = (),
    show_progress: bool = False,
) -> Values:
    r"""Measure every method on held-out scenes.

    Args:

        encoder (DualEncoder): A model trained on scenes, whose tokens are words.
        probes (int): How many scenes.
        seed (int): Which.
        within (int, optional): Also interactions of two patches and of two words, from so many masked pictures.
            Default: None
        shapiq (sequence of int, optional): Also shapiq's regression with each of these numbers of coalitions. Default:
            ()
        show_progress (bool, optional): Show a progress bar. Default: False

    Returns:
        dict: method to figure to one row with one value per scene, means over both names.

    Raises:
        ValueError: if ``within`` or ``shapiq`` is too small.
        ImportError: if shapiq is asked for and not installed.
    """
    from tqdm.auto import tqdm

    values: dict[str, dict[str, list[list[float]]]] = {}
    for number, scene in enumerate(tqdm(pair_probes(probes, seed), unit="scene", disable=not show_progress)):
        asked = Asked.of(scene)
        game = PairGame(encoder, encoder.prepare(scene.image, scene.caption))
        held = HeldOut.of(game, seed + number)
        for name, said, seconds in _said(encoder, asked, game, seed + number, within, shapiq):
            found = {**_localised(said, asked), **_curves(game, said), **_foretold(said, held), "seconds": seconds}
            for figure, value in found.items():
                values.setdefault(name, {}).setdefault(figure, [[]])[0].append(value)
    return values


def _said(
    encoder: DualEncoder, asked: Asked, game: PairGame, seed: int, within: int | None, shapiq: Sequence[int]
) -> list[tuple[str, Said, float]]:
    """What every method says of one scene, and its seconds."""
    found: list[Fit] = []

    def played(**settings: Any) -> Said:
        made = interactions(encoder, asked.scene.image, asked.scene.caption, p=_P, seed=seed, **settings)
        found.append(made.fit)
        return _of_fit(made.fit, game, asked)

    def regressed(coalitions: int) -> Said:
        return _of_fit(regression(game, coalitions, seed), game, asked)

    ways: dict[str, Callable[[], Said]] = {
        OURS: played,
        **({} if within is None else {f"{OURS}-within": lambda: played(within=True, budget=(within, 256))}),
        **{f"shapiq-{coalitions}": partial(regressed, coalitions) for coalitions in shapiq},
        "pair-interaction": lambda: _pair_interaction(encoder, asked),
        "m2ib": lambda: _one_map(encoder, MultiModalInfoBottleneck, asked),
        "m2ib-phrase": lambda: _phrases(encoder, asked),
        "grad-eclip": lambda: _one_map(encoder, GradECLIP, asked),
        "random": lambda: _random(game, seed),
    }
    told = []
    for name, way in ways.items():
        began = process_time()
        said = way()
        told.append((name, said, process_time() - began))
    # The same passes: the values of patches and words, without the interactions.
    alone = replace(found[0], across=np.zeros_like(found[0].across))
    one = alone.picture[game.places]
    told.insert(1, (ALONE, Said([one, one], one, alone.predict), told[0][2]))
    return told


def _of_fit(fit: Fit, game: PairGame, asked: Asked) -> Said:
    # Beside all words, not beside half of them.
    whole = fit.picture + (1 - fit.p) * fit.across.sum(0)
    names = [fit.across[words].sum(0)[game.places] for words in asked.names]
    return Said(names, whole[game.places], fit.predict)


def _pair_interaction(encoder: DualEncoder, asked: Asked) -> Said:
    pairs = encoder.prepare(asked.scene.image, asked.scene.caption)
    looks = PairInteraction(encoder).attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args)
    table = looks[0].double().cpu().numpy()
    # Word i is token i + 1; a patch is a player of its own.
    words = table[1 : 1 + len(asked.scene.words)].reshape(len(asked.scene.words), -1)

    def scores(pictures: Masks, captions: Masks) -> Floats:
        found: Floats = pictures.astype(float) @ words.T @ captions.astype(float).T
        return found

    names = [table[[place + 1 for place in named]].sum(0) for named in asked.names]
    # Of the score of references that are not those of the game.
    return Said(names, table.sum(0), scores, has_unit=False)


def _one_map(encoder: DualEncoder, method: type, asked: Asked) -> Said:
    found = _picture_map(encoder, method, asked.scene, asked.scene.caption)
    return Said([found, found], found)


def _phrases(encoder: DualEncoder, asked: Asked) -> Said:
    names = [_picture_map(encoder, MultiModalInfoBottleneck, asked.scene, asked.phrase(name)) for name in (0, 1)]
    return Said(names, None)


def _picture_map(encoder: DualEncoder, method: type, scene: Scene, caption: str) -> Floats:
    """A method's map of the picture, summed over each patch."""
    pairs = encoder.prepare(scene.image, caption)
    with warnings.catch_warnings():
        # An empty map is counted as it is.
        warnings.simplefilter("ignore", NothingToExplainWarning)
        found = method(encoder).attribute(pairs.inputs[0], additional_forward_args=_rest(pairs))
    layout = encoder.layouts[0]
    assert isinstance(layout, PatchLayout)
    patches: Floats = per_patch(layout, found.detach().double().sum(1))[0].cpu().numpy()
    return patches


def _rest(pairs: object) -> tuple[object, ...]:
    return (pairs.inputs[1], *pairs.additional_forward_args)  # type: ignore[attr-defined]


def _random(game: PairGame, seed: int) -> Said:
    drawn = np.random.default_rng(seed).random((3, *game.places.shape))
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


def _foretold(said: Said, held: HeldOut) -> dict[str, float]:
    """How well the score of held-out coalitions is told: the share of its variance, and its order."""
    if said.scores is None:
        return {"explained": float("nan"), "ranks": float("nan")}
    told = said.scores(held.pictures.masks, held.captions.masks)
    ranks = spearman(torch.from_numpy(held.scores.reshape(1, -1)), torch.from_numpy(told.reshape(1, -1)))
    share = explained(held.scores, told, held.pictures, held.captions) if said.has_unit else float("nan")
    return {"explained": share, "ranks": float(ranks)}


def methods_of(values: Values) -> Sequence[str]:
    """Those among which ours is compared with the best; chance is none of them, nor are other forms of ours."""
    return [name for name in values if not name.startswith(OURS) and name != "random"]
