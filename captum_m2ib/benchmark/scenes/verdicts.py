"""How often is a map's check right? Verdicts on right and on wrong maps of scenes whose truth is known.

``python -m captum_m2ib.benchmark.scenes.verdicts`` gives each pair of validation scenes three maps: its own, another
pair's (shuffled), and what a model with random weights makes of it; all are checked on the model that is explained. A
map is on the truth if what it has there, of the object or the words of the object that is in the picture, is at least a
quarter of the way from an even map's share to all; else it is off it. So a shuffled map may be on the truth, where two
pairs have their objects in one place. A verdict is right that says ``holds`` of a map on the truth, and ``fails`` of
one off it.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_m2ib.attr import MultiModalInfoBottleneck
from captum_m2ib.attr.map_check import check_maps
from captum_m2ib.benchmark.compare import estimate
from captum_m2ib.benchmark.scenes.measures import BLOCK
from captum_m2ib.benchmark.scenes.run import Plan
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.stakes import NothingToExplainWarning
from captum_m2ib.engine.verdict import VERDICTS
from captum_m2ib.metrics import relevance_mass
from captum_m2ib.scenes import ImageProbe, TokenProbe, image_probes, token_probes

MAPS = ("its own", "another pair's", "a random model's")
"""The maps that are checked."""

GROUNDS = ("textured", "plain")
"""What the objects lie on."""

ON_TRUTH = 0.25
"""Where a map is on the truth: the least of the way from an even map's share of the truth to all."""

_RANDOM_SEED = 5


@dataclass(frozen=True)
class Checked:
    r"""One map, what its check says, and where it lies.

    Attributes:

        ground (str): One of :data:`GROUNDS`.
        modality (str): ``"image"`` or ``"text"``.
        source (str): One of :data:`MAPS`.
        verdict (str): One of :data:`captum_m2ib.engine.verdict.VERDICTS`.
        margin (float): How much more the map's order takes than a random one.
        kept (float): Share of the range that the map's gates keep; 1 for a map that is not the pair's own: it has no
            gates here, so that its verdict is that of its margin alone, if anything too good.
        on_truth (float): Way from an even map's share of the truth to all; 0 for an even map, 1 at best.
    """

    ground: str
    modality: str
    source: str
    verdict: str
    margin: float
    kept: float
    on_truth: float


def measure(encoder: DualEncoder, probes: int = 100, seed: int = 0) -> list[Checked]:
    r"""Check maps of pictures on image probes, and of captions on token probes.

    Args:

        encoder (DualEncoder): The compact encoder, trained on scenes, with a processor.
        probes (int, optional): Validation probes of each kind and ground. Default: 100
        seed (int, optional): Which probes. Default: 0

    Returns:
        list[Checked]: per ground, modality and probe three maps.
    """
    plan = Plan(probes=probes, seed=seed, split="validation")
    random = _randomised(encoder)
    methods = MultiModalInfoBottleneck(encoder), MultiModalInfoBottleneck(random)
    found: list[Checked] = []
    for ground in GROUNDS:
        pictures = image_probes(probes, plan.probes_seed, ground=ground)
        captions = token_probes(probes, plan.probes_seed, ground=ground)
        for start in range(0, probes, BLOCK):
            part = slice(start, start + BLOCK)
            found += _of_block(methods, ground, pictures[part], 0)
            found += _of_block(methods, ground, captions[part], 1)
    return found


def _randomised(encoder: DualEncoder) -> DualEncoder:
    """The same encoder before any training."""
    random = copy.deepcopy(encoder)
    model: Any = random.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        model.load_state_dict(type(model)(model.config).state_dict())
    # They describe the trained model's embeddings.
    random.statistics.clear()
    return random


def _of_block(
    methods: tuple[MultiModalInfoBottleneck, MultiModalInfoBottleneck],
    ground: str,
    probes: Sequence[Any],
    modality: int,
) -> Iterator[Checked]:
    """The maps of some probes."""
    encoder = methods[0].forward_func
    pairs = encoder.prepare([probe.image for probe in probes], [probe.caption for probe in probes])
    given = [*pairs.inputs, *pairs.additional_forward_args]
    # A picture is explained without its caption; a caption comes second.
    inputs, additional = tuple(given[: modality + 1]), tuple(given[modality + 1 :])
    with warnings.catch_warnings():
        # The verdict says so.
        warnings.simplefilter("ignore", NothingToExplainWarning)
        own, record = methods[0].attribute_with_record(inputs, additional_forward_args=additional, check=True)
        other = methods[1].attribute(inputs, additional_forward_args=additional)
    real = pairs.inputs[0].new_ones(len(probes), 1) if modality == 0 else encoder.real_tokens(pairs)
    maps = dict(zip(MAPS, (own[modality], _shuffled(own[modality], real), other[modality]), strict=True))
    others = check_maps(methods[0], tuple(given), modality, list(maps.values())[1:])
    checks = (record.modalities[modality].check, *others)
    for (source, bits), check in zip(maps.items(), checks, strict=True):
        assert check is not None
        kept = check.kept if source == MAPS[0] else torch.ones_like(check.kept)
        found = check.verdicts(by_margin=source != MAPS[0])
        places = on_truth(bits, probes)
        for row in zip(found, check.margin.tolist(), kept.tolist(), places, strict=True):
            yield Checked(ground, ("image", "text")[modality], source, *row)


def _shuffled(bits: Tensor, real: Tensor) -> Tensor:
    """Maps of the pairs before; of captions as far as both have words."""
    moved = bits.roll(1, 0)
    return moved if bits.ndim > 2 else moved * real


def on_truth(bits: Tensor, probes: Sequence[ImageProbe | TokenProbe]) -> list[float]:
    """Way from an even map's share of the truth to all, for each probe."""
    truth, valid = torch.zeros(bits.shape[0], *bits.shape[-2:] if bits.ndim > 2 else bits.shape[1:]).bool(), None
    if bits.ndim == 2:
        valid = torch.zeros_like(truth)
    for row, probe in enumerate(probes):
        if isinstance(probe, ImageProbe):
            truth[row] = torch.from_numpy(probe.mask)
        elif valid is not None:
            # Word i is token i + 1: the first token starts the caption.
            truth[row, [word + 1 for word in probe.present_words]] = True
            valid[row, 1 : 1 + len(probe.scene.words)] = True
    even = relevance_mass(torch.ones(truth.shape), truth, valid=valid)
    mass = relevance_mass(bits.detach().cpu(), truth, valid=valid)
    found: list[float] = ((mass - even) / (1 - even)).tolist()
    return found


def table(found: Sequence[Checked]) -> str:
    r"""Verdicts as Markdown.

    Args:

        found (sequence of Checked): From :func:`measure`.

    Returns:
        str: per modality, ground and kind of map how many are on the truth, the verdicts, and how many of the maps on
        the truth hold and of those off it fail; then over all of them how often a verdict is right.
    """
    heads = ["", "map", "maps", "on the truth", *VERDICTS, "on it: hold", "off it: fail", "off it: hold"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for modality in ("image", "text"):
        for ground in GROUNDS:
            for source in MAPS:
                rows = [r for r in found if (r.modality, r.ground, r.source) == (modality, ground, source)]
                if rows:
                    lines.append(_line(f"{modality}, {ground}", source, rows))
    lines += ["", "| verdict | maps | on the truth, of all maps |", "|---|---|---|"]
    for modality in ("image", "text"):
        for verdict in VERDICTS:
            said = [row for row in found if (row.modality, row.verdict) == (modality, verdict)]
            lines.append(f"| {modality} {verdict} | {len(said)} | {_share([_is_on(row) for row in said])} |")
    return "\n".join(lines)


def _line(what: str, source: str, rows: Sequence[Checked]) -> str:
    on, off = [row for row in rows if _is_on(row)], [row for row in rows if not _is_on(row)]
    cells = [
        what,
        source,
        str(len(rows)),
        str(len(on)),
        *(str(sum(row.verdict == verdict for row in rows)) for verdict in VERDICTS),
        _share([row.verdict == "holds" for row in on]),
        _share([row.verdict == "fails" for row in off]),
        _share([row.verdict == "holds" for row in off]),
    ]
    return "| " + " | ".join(cells) + " |"


def _is_on(row: Checked) -> bool:
    return row.on_truth >= ON_TRUTH


def _share(flags: Sequence[bool]) -> str:
    if not flags:
        return "–"
    found = estimate([float(flag) for flag in flags])
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    from captum_m2ib.benchmark.tables import csv_text
    from captum_m2ib.scenes import CHECKPOINT

    parser = argparse.ArgumentParser(prog="python -m captum_m2ib.benchmark.scenes.verdicts", description=__doc__)
    parser.add_argument("--model", metavar="DIR", help="checkpoint trained on scenes (default: shipped model)")
    parser.add_argument("--probes", type=int, default=100, help="of each kind and ground (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which validation probes (default: %(default)s)")
    parser.add_argument("--csv", metavar="FILE", help="write every map's figures there")
    given = parser.parse_args(arguments)
    found = measure(DualEncoder.from_pretrained(given.model or CHECKPOINT), given.probes, given.seed)
    if given.csv:
        heads = list(Checked.__dataclass_fields__)
        with open(given.csv, "w", encoding="utf-8") as file:
            file.write(csv_text(heads, ([getattr(row, name) for name in heads] for row in found)))
    print(table(found))


if __name__ == "__main__":
    main()
