r"""Does information go round the units that are explained? How much of a tower's embedding survives without them.

Once blocks have mixed its tokens, a tower's pooled position may hold all that the score needs: a class token, an
end-of-text token. Then the other tokens can be replaced by noise and the score hardly changes, and the bits of a map
at that layer mean nothing. For each layer every unit of the map but the pooled one is drawn from the prior, and the
tower is run on from there. With :math:`e` the tower's embedding, and means over draws,

    share = (mean cos(e_kept, e) - mean cos(e_none, e)) / (1 - mean cos(e_none, e)),

where :math:`e_{kept}` leaves the pooled position and what the tower adds of its own (class token, registers) as they
are, and :math:`e_{none}` replaces these too. 0: nothing goes round the map; 1: everything does.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_m2ib.attr._arguments import Explained, format_additional, rows_at_once
from captum_m2ib.attr._scoring import as_forward_func, roots_of
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layers import Layer, LayerLike, resolve_at
from captum_m2ib.engine.layouts import Layout
from captum_m2ib.engine.rows import slice_pairs
from captum_m2ib.engine.settings import check_count
from captum_m2ib.engine.statistics import ChannelStatistics
from captum_m2ib.metrics._noised import Measure, MeasuredTower, NoisedPass

__all__ = [
    "BypassWarning",
    "TowerBypass",
    "has_chosen_layers",
    "measure_bypass",
    "recommend_layers",
    "warn_of_bypass",
]

THRESHOLD = 0.5
"""From this share on a layer counts as bypassed; chosen on validation scenes, see docs/bypass.md."""


class BypassWarning(UserWarning):
    """The chosen layer is one that information goes round."""


@dataclass(frozen=True)
class TowerBypass:
    r"""What survives of one tower's embedding, layer by layer, when the units of its map are noise.

    Attributes:

        modality (str): What the tower reads: ``"image"``, ``"text"``, ..., or ``"input 0"`` for a plain function.
        layers (tuple[str, ...]): Names of the layers, in the order in which they were given or run.
        choices (tuple): The same layers as ``MultiModalInfoBottleneck(layers=...)`` takes them.
        share (Tensor): The share that goes round the map, (layers, N), at most 1; NaN where noise everywhere leaves
            the embedding, or the score, as it is.
        kept (Tensor): How many real positions were left as they are, (layers, N): the pooled one and those that the
            tower adds. Where there are none, nothing can go round the map.
        score (Tensor): Score of the untouched pairs, (N,).
        score_kept (Tensor): Mean score with the units of the map replaced, (layers, N).
        score_none (Tensor): Mean score with everything replaced, (layers, N).
    """

    modality: str
    layers: tuple[str, ...]
    choices: tuple[LayerLike | None, ...]
    share: Tensor
    kept: Tensor
    score: Tensor
    score_kept: Tensor
    score_none: Tensor

    @property
    def mean_share(self) -> Tensor:
        """The mean share over pairs, (layers,)."""
        return self.share.nanmean(1)

    def latest(self, threshold: float = THRESHOLD) -> int | None:
        r"""The last layer before the mean share first reaches a threshold.

        Args:

            threshold (float, optional): The share from which on a layer counts as bypassed. Default: 0.5

        Returns:
            int or None: its position in ``layers``; None if the first layer's share reaches the threshold.
        """
        reached = ~(self.mean_share < threshold)
        first = int(reached.int().argmax()) if bool(reached.any()) else len(self.layers)
        return first - 1 if first else None


def measure_bypass(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    additional_forward_args: Any = None,
    layers: Sequence[LayerLike | Sequence[LayerLike | None] | None] | None = None,
    statistics: Mapping[str, ChannelStatistics] | None = None,
    layouts: Sequence[Layout | None] | None = None,
    n_draws: int = 8,
    seed: int = 0,
    measure: Measure = "embedding",
    internal_batch_size: int | None = None,
    show_progress: bool = False,
) -> tuple[TowerBypass, ...]:
    r"""Measure, layer by layer, how much of each tower's embedding goes round the units of its map.

    The prefix of each layer and the other tower run once; each layer costs ``2 * n_draws`` passes of what follows it,
    without gradients. Which position is pooled is read from the model: the only unit whose last hidden state the score
    depends on. Where there are several (mean or attention pooling), none is left as it is.

    Args:

        forward_func (Callable or nn.Module): A :class:`DualEncoder`, a model that one can wrap, or any callable
                    ``forward_func(*inputs, *additional_forward_args)`` that returns one score per pair, (N,).
        inputs (Tensor or tuple[Tensor, ...]): The inputs whose towers are measured, batch first.
        additional_forward_args (Any, optional): Further positional arguments of ``forward_func``. Default: None
        layers (sequence, optional): Per input a layer or a list of layers, in the order in which they run; a layer is
                    a module, a dotted name, a pair (module or name, index of the call), or None for the input itself.
                    Default: None (a :class:`DualEncoder`'s pictures, embeddings and blocks)
        statistics (mapping, optional): Layer name to the :class:`ChannelStatistics` of the noise. Default: None
                    (shipped statistics or those of the vocabulary where there are any, else each pair's own)
        layouts (sequence, optional): Per input how hidden-state units map onto input units. Default: None (derived
                    from a :class:`DualEncoder`; else every position counts as a unit)
        n_draws (int, optional): Noise draws, each used once more with its sign changed where there are two or more;
                    common to all pairs. Default: 8
        seed (int, optional): Seed of the noise. Default: 0
        measure (str, optional): ``"embedding"``, for scores made by torch's ``cosine_similarity`` of two embeddings;
                    or ``"score"``: (kept - none) / (untouched - none) of the scores themselves, for any score. It is
                    worth little for pairs whose score is near that of noise. Default: "embedding"
        internal_batch_size (int, optional): Most rows (pairs times draws) in one pass; changes no result. Default:
                    None (all at once)
        show_progress (bool, optional): Show a progress bar. Default: False

    Returns:
        tuple[TowerBypass, ...]: one per input. What a pair gets does not depend on the other pairs.

    Raises:
        ValueError: if an argument is out of range, layers cannot be found or do not fit their layout, the score is no
            cosine similarity, or a score or hidden state is NaN or infinite.
        RuntimeError: if a layer is not reached.

    Examples::

        >>> image, text = measure_bypass(encoder, pairs.inputs, pairs.additional_forward_args)
        >>> bool(text.mean_share[0] < 0.1), bool(text.mean_share[1] > 0.9)  # at the embeddings, after a block
        (True, True)
    """
    check_count("n_draws", n_draws)
    check_count("seed", seed, 0)
    if measure not in ("embedding", "score"):
        raise ValueError(f"measure: expected 'embedding' or 'score', got {measure!r}.")
    forward_func = as_forward_func(forward_func)
    given = Explained.ensure(forward_func, inputs, None, additional_forward_args)
    towers = _towers(forward_func, len(given.inputs), layers, layouts, statistics)
    pairs_at_once, _ = rows_at_once(internal_batch_size, 2 * n_draws)
    parts = []
    with (
        borrowing(*roots_of(forward_func, [layer for tower in towers for layer in tower.layers])),
        torch.no_grad(),
        tqdm(
            total=given.count(pairs_at_once) * sum(len(tower.layers) for tower in towers),
            desc="Bypass",
            unit="layer",
            disable=not show_progress,
        ) as bar,
    ):
        for start, chunk in given.parts(pairs_at_once):
            parts.append(
                NoisedPass(given.forward, chunk, towers, start).measured(n_draws, int(seed), measure, bar.update)
            )
    joined = [[torch.cat(part, -1) for part in zip(*of_tower, strict=True)] for of_tower in zip(*parts, strict=True)]
    return tuple(
        TowerBypass(
            tower.modality,
            tuple(layer.name for layer in tower.layers),
            tuple(_as_choice(layer) for layer in tower.layers),
            *found,
        )
        for tower, found in zip(towers, joined, strict=True)
    )


def recommend_layers(
    encoder: DualEncoder,
    inputs: tuple[Tensor, ...],
    additional_forward_args: Any = None,
    threshold: float = THRESHOLD,
    **settings: Any,
) -> tuple[LayerLike | None, ...]:
    r"""The latest layer of each tower, the cheapest to explain at, that information does not go round.

    Args:

        encoder (DualEncoder): The encoder.
        inputs (tuple[Tensor, ...]): Some pairs of the kind that will be explained; a dozen is enough.
        additional_forward_args (Any, optional): Further positional arguments of the encoder. Default: None
        threshold (float, optional): The mean share from which on a layer counts as bypassed. Default: 0.5
        **settings: Further arguments of :func:`measure_bypass`.

    Returns:
        tuple: per input a layer, or None for the input itself. A tower that information cannot go round, because
        nothing stands beside the units of its map, gets the encoder's own recommendation; so does one that is bypassed
        from its first layer on.

    Raises:
        ValueError: if the threshold is not in (0, 1], or as for :func:`measure_bypass`.
    """
    check_threshold(threshold)
    defaults = encoder.recommended_layers()
    chosen: list[LayerLike | None] = []
    for index, tower in enumerate(measure_bypass(encoder, inputs, additional_forward_args, **settings)):
        latest = tower.latest(threshold) if bool(tower.kept.any()) else None
        chosen.append(defaults[index] if latest is None else tower.choices[latest])
    return tuple(chosen)


def warn_of_bypass(
    method: Any,
    inputs: tuple[Tensor, ...],
    additional_forward_args: Any = None,
    threshold: float = THRESHOLD,
    pairs: int = 4,
    n_draws: int = 4,
    seed: int = 0,
) -> None:
    r"""Warn where a method explains at a layer that information goes round.

    Args:

        method (MultiModalInfoBottleneck): Or any method with ``forward_func``, ``layers`` and ``layouts``.
        inputs (tuple[Tensor, ...]): The inputs to explain.
        additional_forward_args (Any, optional): Further positional arguments of the method's function. Default: None
        threshold (float, optional): The mean share from which on to warn. Default: 0.5
        pairs (int, optional): How many pairs to look at, the first ones. Default: 4
        n_draws (int, optional): Noise draws. Default: 4
        seed (int, optional): Seed of the noise. Default: 0

    Warns:
        BypassWarning: naming tower, layer, share, and the latest layer of the tower that is sound. One per layer.

    Raises:
        ValueError: as for :func:`measure_bypass`.
    """
    check_threshold(threshold)
    count = inputs[0].shape[0]
    few = tuple(tensor[:pairs] for tensor in inputs)
    additional = tuple(slice_pairs(a, count, 0, pairs) for a in format_additional(additional_forward_args, count))
    chosen = [[_as_choice(layer)] for layer in method.layers[: len(inputs)]]
    found = measure_bypass(method.forward_func, few, additional, chosen, None, method.layouts, n_draws, seed)
    bypassed = [index for index, tower in enumerate(found) if float(tower.mean_share[0]) >= threshold]
    every: Sequence[TowerBypass] = ()
    if bypassed and isinstance(method.forward_func, DualEncoder):
        every = measure_bypass(method.forward_func, few, additional, n_draws=n_draws, seed=seed)
    for index in bypassed:
        tower = found[index]
        warnings.warn(
            f"layers: information goes round the {tower.modality} units at layer {tower.layers[0]!r}: with all of "
            f"them replaced by noise, what is pooled keeps {float(tower.mean_share[0]):.0%} of the embedding, so that "
            f"their bits mean little. {_sound_layer(every[index] if every else None, threshold)}",
            BypassWarning,
            stacklevel=3,
        )


def has_chosen_layers(method: Any) -> bool:
    r"""Whether someone chose a method's layers: they are neither those its encoder recommends nor the paper's.

    Args:

        method (MultiModalInfoBottleneck): Or any method with ``forward_func`` and ``layers``.

    Returns:
        bool: True also where the method explains no :class:`DualEncoder`, which recommends nothing.
    """
    encoder = method.forward_func
    if not isinstance(encoder, DualEncoder):
        return True
    chosen = tuple(map(_as_choice, method.layers))
    for known in (encoder.recommended_layers, encoder.published_layers):
        # Towers without blocks under a known name have neither.
        with contextlib.suppress(ValueError):
            if chosen == known():
                return False
    return True


def _sound_layer(tower: TowerBypass | None, threshold: float) -> str:
    """What to do instead, in a sentence."""
    latest = None if tower is None else tower.latest(threshold)
    if tower is not None and latest is not None:
        if tower.choices[latest] is None:
            return "Choose None, the input itself."
        return f"Choose {tower.layers[latest]!r} ({float(tower.mean_share[latest]):.0%}) or an earlier layer."
    return "Choose an earlier layer; captum_m2ib.measure_bypass measures them all."


def _towers(
    forward_func: Any,
    count: int,
    layers: Sequence[LayerLike | Sequence[LayerLike | None] | None] | None,
    layouts: Sequence[Layout | None] | None,
    statistics: Mapping[str, ChannelStatistics] | None,
) -> list[MeasuredTower]:
    encoder = forward_func if isinstance(forward_func, DualEncoder) else None
    if layers is None and encoder is None:
        raise ValueError(
            f"layers: they can only be found in a DualEncoder, got {type(forward_func).__name__}; give a list per "
            "input, e.g. layers=(list(image_tower.blocks), list(text_tower.blocks))."
        )
    given = [_layers_of(encoder, index) for index in range(count)] if layers is None else list(layers)
    if len(given) < count:
        raise ValueError(f"layers: expected a layer or a list of layers for each of {count} inputs, got {len(given)}.")
    towers = []
    for index in range(count):
        entry: Any = given[index]
        listed = entry if isinstance(entry, list) else [entry]
        found = tuple(resolve_at(forward_func, index, layer) for layer in listed)
        if not found:
            raise ValueError(f"layers[{index}]: expected at least one layer, got an empty list.")
        fixed = None if layouts is None or index >= len(layouts) else layouts[index]
        of_layers = tuple(
            encoder.layout_at(layer, index) if encoder is not None and layouts is None else fixed for layer in found
        )
        priors = tuple(_prior(encoder, layer, statistics or {}) for layer in found)
        modality = encoder.sides[index].modality if encoder is not None and index < 2 else f"input {index}"
        towers.append(MeasuredTower(index, modality, found, of_layers, priors))
    return towers


def _layers_of(encoder: Any, index: int) -> list[LayerLike | None]:
    """A picture itself, a tower's embeddings and blocks; of one tower that reads both inputs, the calls on this one."""
    found: list[Any] = [block for stage in encoder.stages(index) for block in stage]
    embeddings = encoder.embeddings_of(index)
    # In a picture's tower, a table of its own is no embedding of the picture.
    if embeddings is not None and (encoder.sides[index].modality == "text" or not isinstance(embeddings, nn.Embedding)):
        found = [embeddings, *found]
    shared = encoder.tower_of(0) is encoder.tower_of(1) and encoder.sides[0] == encoder.sides[1]
    layers = [encoder.told_apart([layer if shared or i == index else None for i in (0, 1)])[index] for layer in found]
    return [None, *layers] if encoder.gates_input(index) else layers


def _prior(encoder: DualEncoder | None, layer: Layer, statistics: Mapping[str, ChannelStatistics]) -> Any:
    if layer.name in statistics:
        return statistics[layer.name]
    return (encoder.statistics_of(layer.module) if encoder is not None else None) or "pair"


def _as_choice(layer: Layer) -> LayerLike | None:
    if layer.argument is not None:
        return None
    return layer.module if layer.call is None else (layer.module, layer.call)


def check_threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a share above 0 and at most 1, got {threshold!r}.")
