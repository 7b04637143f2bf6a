"""What is measured on scenes whose truth is known, group by group, for any method.

Image probes name one of two to four objects; the truth is its visible mask. Token probes name one object that is in
the picture and one that is not; the truth is the words of the first. The maps of a block of probes are made once and
serve every group: pictures' maps for the caption and for one that names another object, and captions' maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor

from captum_m2ib.benchmark import faithfulness as faith
from captum_m2ib.benchmark.compare import estimate
from captum_m2ib.benchmark.parts import Found
from captum_m2ib.benchmark.tables import Figure
from captum_m2ib.benchmark.truth import lists_of, on_truth
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.pairs import Pairs
from captum_m2ib.encoders.spelling import blank_token
from captum_m2ib.metrics import (
    Summary,
    auroc,
    infidelity_perturbation,
    pearson,
    pointing_game,
    randomisation,
    relevance_mass,
    sensitivity_perturbation,
    spearman,
    top_k,
)
from captum_m2ib.scenes import ImageProbe, TokenProbe, image_probes, token_probes
from captum_m2ib.scenes.grounds import TEXTURED

BLOCK = 25
"""Probes whose maps are made at once."""

REDRAWS = 3
"""How often all parameters are redrawn: random models differ in how much of a picture's contrast they pass on."""

_HEADS = {
    "localisation, pictures": {
        "image pointing": (1, "pointing"),
        "image mass": (1, "mass"),
        "image auroc": (1, "AUROC"),
        "image pointing, other caption": (1, "pointing, other"),
        "image mass moved": (1, "mass moved"),
    },
    "localisation, words": {
        "text auroc": (1, "AUROC"),
        "text top-1": (1, "top-1"),
        "text auroc, all words": (1, "AUROC, all words"),
    },
    "faithfulness, pictures": {name: (better, name[6:]) for name, better in faith.FIGURES.items() if name[0] == "i"},
    "faithfulness, words": {name: (better, name[5:]) for name, better in faith.FIGURES.items() if name[0] == "t"},
    "sanity": {
        "image prompt sensitivity": (1, "pictures: prompt"),
        "image random model": (-1, "pictures: random model"),
        "image random model, by chance": (0, "by chance"),
        "image random model, signed": (0, "signed"),
        "text random model": (-1, "words: random model"),
    },
    "stability": {"image seeds": (1, "pictures: seeds"), "text seeds": (1, "words: seeds")},
    "robustness": {
        "image infidelity": (-1, "pictures: infidelity"),
        "image sensitivity": (-1, "sensitivity"),
        "text infidelity": (-1, "words: infidelity"),
        "text sensitivity": (-1, "sensitivity"),
    },
    "cost": {
        "seconds per pair": (0, "s per pair"),
        "GFLOP per pair": (0, "GFLOP per pair"),
        "peak MiB": (0, "peak MiB above the model"),
    },
}

_DIGITS = {
    "image confidence drop": 2,
    "image confidence increase": 1,
    "text confidence drop": 2,
    "text confidence increase": 1,
    "image infidelity": 4,
    "text infidelity": 4,
    "GFLOP per pair": 2,
    "peak MiB": 1,
}

FIGURES: tuple[Figure, ...] = tuple(
    Figure(name, title, better, short, _DIGITS.get(name, 3))
    for title, heads in _HEADS.items()
    for name, (better, short) in heads.items()
)
"""Every figure, in the order of the tables."""


@dataclass(frozen=True)
class Block:
    r"""Some probes and one method's maps of them, each made when it is first asked for.

    Attributes:

        explainer (Any): A method on an encoder with a processor: ``attribute`` and ``forward_func``.
        pictures (sequence of ImageProbe): Image probes.
        captions (sequence of TokenProbe): Token probes.
        make (Callable or None): Makes the method anew for an encoder; needed for :func:`sanity`.
        seeded (bool): Whether ``attribute`` depends on its ``seed``.
        whole (Block or None): The block that this one is the first probes of, whose maps it shares.
    """

    explainer: Any
    pictures: Sequence[ImageProbe]
    captions: Sequence[TokenProbe]
    make: Callable[[DualEncoder], Any] | None = None
    seeded: bool = False
    whole: Block | None = None

    def first(self, count: int) -> Block:
        """The first probes of the block, with its maps."""
        return replace(self, pictures=self.pictures[:count], captions=self.captions[:count], whole=self)

    @property
    def encoder(self) -> Any:
        """The encoder that is explained."""
        return self.explainer.forward_func

    @cached_property
    def right(self) -> Pairs:
        """Image probes with their captions."""
        if self.whole is not None:
            return _first_pairs(self.whole.right, len(self.pictures))
        return self._pairs(self.pictures, [probe.caption for probe in self.pictures])

    @cached_property
    def wrong(self) -> Pairs:
        """Image probes with captions that name another object."""
        if self.whole is not None:
            return _first_pairs(self.whole.wrong, len(self.pictures))
        return self._pairs(self.pictures, [probe.wrong_caption for probe in self.pictures])

    @cached_property
    def worded(self) -> Pairs:
        """Token probes."""
        if self.whole is not None:
            return _first_pairs(self.whole.worded, len(self.captions))
        return self._pairs(self.captions, [probe.caption for probe in self.captions])

    @cached_property
    def right_maps(self) -> Tensor:
        """Pictures' maps, (N, C, H, W)."""
        if self.whole is not None:
            return self.whole.right_maps[: len(self.pictures)]
        return self.image_maps(self.right)

    @cached_property
    def wrong_maps(self) -> Tensor:
        """The same pictures' maps for the other captions."""
        if self.whole is not None:
            return self.whole.wrong_maps[: len(self.pictures)]
        return self.image_maps(self.wrong)

    @cached_property
    def token_maps(self) -> Tensor:
        """Captions' maps, (N, L)."""
        if self.whole is not None:
            return self.whole.token_maps[: len(self.captions)]
        return self.caption_maps(self.worded)

    def image_maps(self, pairs: Pairs, **options: Any) -> Tensor:
        """Maps of pictures alone."""
        pixels, ids = pairs.inputs
        additional = (ids, *pairs.additional_forward_args)
        found: Tensor = self.explainer.attribute(pixels, additional_forward_args=additional, **options)
        return found.detach()

    def caption_maps(self, pairs: Pairs, **options: Any) -> Tensor:
        """Maps of captions."""
        given = pairs.additional_forward_args
        _, found = self.explainer.attribute(pairs.inputs, additional_forward_args=given, **options)
        return found.detach()

    def _pairs(self, probes: Sequence[Any], captions: list[str]) -> Pairs:
        found: Pairs = self.encoder.prepare([probe.image for probe in probes], captions)
        return found


def pictures_on_truth(block: Block) -> Found:
    """Do pictures' maps fall on the object that the caption names?"""
    return lists_of(on_truth(block.right_maps.cpu(), _masks(probe.mask for probe in block.pictures)))


def words_on_truth(block: Block) -> Found:
    r"""Do captions' maps fall on the words of the object that is there?

    ``text auroc`` and ``text top-1`` are between the present object's words and the absent one's, ``text auroc, all
    words`` between the present object's words and every other word.
    """
    maps = block.token_maps.cpu()
    present, named, words = _word_flags(block.captions, maps.shape[1])
    return lists_of(
        {
            "text auroc": auroc(maps, present, valid=named),
            "text top-1": top_k(maps, present, 1, valid=named),
            "text auroc, all words": auroc(maps, present, valid=words),
        }
    )


def localisation(block: Block) -> Found:
    r"""Do maps fall on the truth, and follow another caption for the same picture?

    Beside :func:`pictures_on_truth` and :func:`words_on_truth`, ``image mass moved`` is the relevance mass that another
    object gains when the caption names it instead, ``image pointing, other caption`` the pointing game against it.
    """
    others = _masks(probe.wrong_mask for probe in block.pictures)
    right, wrong = block.right_maps.cpu(), block.wrong_maps.cpu()
    moved = {
        "image pointing, other caption": pointing_game(wrong, others),
        "image mass moved": relevance_mass(wrong, others) - relevance_mass(right, others),
    }
    return {**pictures_on_truth(block), **lists_of(moved), **words_on_truth(block)}


def faithfulness(block: Block) -> Found:
    """Confidence, insertion and deletion: of pictures on image probes, of words on token probes."""
    pictures = faith.faithfulness(
        block.encoder, block.right.inputs, (block.right_maps, None), block.right.additional_forward_args
    )
    words = faith.faithfulness(
        block.encoder,
        block.worded.inputs,
        (None, block.token_maps),
        block.worded.additional_forward_args,
        maskable=faith.maskable_tokens(block.worded),
        replacement=blank_token(block.encoder),
    )
    return {**pictures, **words}


def sanity(block: Block) -> Found:
    r"""Do maps depend on the caption, and on what the model has learnt?

    ``image prompt sensitivity`` is 1 - Spearman's correlation of a picture's maps for the two captions; ``random
    model`` is the correlation's magnitude between maps of the model and of one with all parameters redrawn, a mean over
    :data:`REDRAWS` such models; ``by chance`` is that with the redrawn models' maps of the other pictures of the block,
    NaN where there is none; ``signed`` is the correlation itself, whose mean over unrelated maps is 0 however smooth
    they are. For these checks the prior of a bottleneck comes from the model that is explained, never from shipped
    statistics.
    """
    if block.make is None:
        raise ValueError("make: expected a function that makes the method anew for a randomised model, got None.")
    found = {"image prompt sensitivity": 1 - spearman(block.right_maps.sum(1), block.wrong_maps.sum(1))}
    changed, own, redrawn = _redrawn(block, 0, block.make)
    found["image random model"] = changed.abs().mean(1)
    chance = [_among_others(own.sum(1), maps.sum(1)) for maps in redrawn]
    found["image random model, by chance"] = torch.stack(chance).mean(0)
    found["image random model, signed"] = changed.mean(1)
    found["text random model"] = _redrawn(block, 1, block.make)[0].abs().mean(1)
    return lists_of(found)


def _redrawn(block: Block, modality: int, make: Callable[[DualEncoder], Any]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Spearman's correlation of maps with those of redrawn models, (N, models), the maps, and each model's."""
    encoder = block.encoder
    pairs = block.worded if modality else block.right
    made: list[Tensor] = []

    def explain(inputs: Any, additional_forward_args: Any) -> Tensor:
        remade = Block(make(encoder), (), ())
        given: Any = _Given(inputs, additional_forward_args)
        made.append(remade.caption_maps(given) if modality else remade.image_maps(given))
        return made[-1]

    with _without_statistics(encoder):
        changed = randomisation(
            explain,
            pairs.inputs,
            encoder,
            layers=[[encoder]] * REDRAWS,
            cascading=False,
            valid=faith.maskable_tokens(pairs) if modality else None,
            additional_forward_args=pairs.additional_forward_args,
        )
    return changed.similarities[0], made[0], made[1:]


def _among_others(maps: Tensor, others: Tensor) -> Tensor:
    """Mean magnitude of the correlation of each map with all of the others but the one in its own place, (N,)."""
    shifted = [spearman(maps, others.roll(places, 0)).abs() for places in range(1, len(maps))]
    return torch.stack(shifted).mean(0) if shifted else torch.full((len(maps),), torch.nan)


def stability(block: Block) -> Found:
    """Pearson's correlation of maps made with two seeds; 1 for methods that draw nothing."""
    if not block.seeded:
        return {"image seeds": [1.0] * len(block.pictures), "text seeds": [1.0] * len(block.captions)}
    return {**stability_of_pictures(block), **stability_of_words(block)}


def stability_of_pictures(block: Block) -> Found:
    """Pearson's correlation of pictures' maps made with two seeds."""
    again = block.image_maps(block.right, seed=1)
    return lists_of({"image seeds": pearson(block.right_maps.sum(1), again.sum(1))})


def stability_of_words(block: Block) -> Found:
    """Pearson's correlation of captions' maps made with two seeds, over words."""
    tokens = block.caption_maps(block.worded, seed=1)
    words = faith.maskable_tokens(block.worded)
    rows = zip(block.token_maps, tokens, words.to(tokens.device), strict=True)
    return lists_of({"text seeds": torch.cat([pearson(a[counted][None], b[counted][None]) for a, b, counted in rows])})


def robustness(block: Block) -> Found:
    r"""Captum's infidelity and sensitivity of both maps.

    Infidelity is under noise on pixels, and under words replaced by others, scaled as Captum's ``normalize=True``
    does; sensitivity is the largest relative change of a map under small noise on the pixels.
    """
    encoder = block.encoder
    pixels, ids = block.right.inputs
    rest = block.right.additional_forward_args
    words_pixels, words_ids = block.worded.inputs
    words_rest = block.worded.additional_forward_args
    tokenizer = getattr(encoder.processor, "tokenizer", encoder.processor)
    vocabulary = sorted(set(range(len(tokenizer))).difference(tokenizer.all_special_ids))

    def text_first(ids: Tensor, pixels: Tensor, *rest: Any) -> Any:
        return encoder(pixels, ids, *rest)

    # Captum hands over a tuple, and expects one.
    def image_map(inputs: tuple[Tensor], additional_forward_args: Any) -> tuple[Tensor]:
        found: Tensor = block.explainer.attribute(inputs[0], additional_forward_args=additional_forward_args)
        return (found,)

    def token_map(inputs: tuple[Tensor], additional_forward_args: Any) -> tuple[Tensor]:
        ids, *rest = additional_forward_args
        found = block.explainer.attribute((inputs[0], ids), additional_forward_args=tuple(rest))
        return (found[1],)

    words = infidelity_perturbation(
        token_share=0.3, maskable=faith.maskable_tokens(block.worded), vocabulary=vocabulary
    )
    options: dict[str, Any] = {"n_perturb_samples": 32, "normalize": True}
    shaken: dict[str, Any] = {"perturb_radius": 0.02, "n_perturb_samples": 2}
    return lists_of(
        {
            "image infidelity": infidelity(
                encoder,
                infidelity_perturbation(),
                pixels,
                block.right_maps,
                additional_forward_args=(ids, *rest),
                **options,
            ),
            "image sensitivity": sensitivity_max(
                image_map, pixels, sensitivity_perturbation(), additional_forward_args=(ids, *rest), **shaken
            ),
            "text infidelity": infidelity(
                text_first,
                words,
                words_ids,
                block.token_maps,
                additional_forward_args=(words_pixels, *words_rest),
                **options,
            ),
            "text sensitivity": sensitivity_max(
                token_map,
                words_pixels,
                sensitivity_perturbation(),
                additional_forward_args=(words_ids, *words_rest),
                **shaken,
            ),
        }
    )


GROUPS: dict[str, Callable[[Block], Found]] = {
    "localisation": localisation,
    "faithfulness": faithfulness,
    "sanity": sanity,
    "stability": stability,
    "robustness": robustness,
}
"""What is measured on blocks of probes, by name."""


def measure(explainer: Any, probes: int = 200, seed: int = 0) -> dict[str, Summary]:
    r"""Localisation of any method's maps on held-out scenes.

    Args:

        explainer (Attribution): The method, on an encoder trained on scenes.
        probes (int, optional): Image probes, and token probes. Default: 200
        seed (int, optional): Which probes. Default: 0

    Returns:
        dict: Figure name, see :func:`localisation`, to its mean with a 95 % bootstrap interval.

    Raises:
        ValueError: if there are no probes.
    """
    pictures, captions = draw_probes(explainer.forward_func, probes, seed)
    found: Found = {}
    for start in range(0, probes, BLOCK):
        rows = slice(start, start + BLOCK)
        for name, values in localisation(Block(explainer, pictures[rows], captions[rows])).items():
            found.setdefault(name, []).extend(values)
    return {name: estimate(values) for name, values in found.items()}


def draw_probes(
    encoder: Any, probes: int, seed: int, ground: str = TEXTURED
) -> tuple[list[ImageProbe], list[TokenProbe]]:
    """Probes of both kinds at the size that the encoder reads."""
    if probes < 1:
        raise ValueError(f"probes: expected at least 1, got {probes}.")
    side = encoder.prepare(image_probes(1, seed)[0].image, "a scene").inputs[0].shape[-1]
    return image_probes(probes, seed, side, ground), token_probes(probes, seed, side, ground)


@dataclass(frozen=True)
class _Given:
    """Arguments in the place of :class:`Pairs`."""

    inputs: Any
    additional_forward_args: Any


@contextmanager
def _without_statistics(encoder: Any) -> Iterator[None]:
    """While open, a bottleneck's prior is taken from the model as it is."""
    kept = dict(encoder.statistics)
    encoder.statistics.clear()
    try:
        yield
    finally:
        encoder.statistics.update(kept)


def _first_pairs(pairs: Pairs, count: int) -> Pairs:
    """The first pairs of several, padded as all of them are."""
    given = (*pairs.inputs, *pairs.additional_forward_args)
    pixels, ids, *additional = (a[:count] if isinstance(a, Tensor) and a.ndim else a for a in given)
    told = {name: getattr(pairs, name)[:count] for name in ("captions", "tokens", "special", "pictures")}
    return replace(pairs, inputs=(pixels, ids), additional_forward_args=tuple(additional), **told)


def _masks(masks: Iterable[Any]) -> Tensor:
    return torch.stack([torch.from_numpy(mask) for mask in masks])


def _word_flags(probes: Sequence[TokenProbe], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens are words of the present object, of either object, and of the caption, (N, L) each."""
    present, named, words = (torch.zeros(len(probes), length, dtype=torch.bool) for _ in range(3))
    for row, probe in enumerate(probes):
        # Word i is token i + 1: the first token starts the caption.
        present[row, [word + 1 for word in probe.present_words]] = True
        named[row, [word + 1 for word in (*probe.present_words, *probe.absent_words)]] = True
        words[row, 1 : 1 + len(probe.scene.words)] = True
    return present, named, words
