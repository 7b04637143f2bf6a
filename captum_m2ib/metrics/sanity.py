r"""Does the map depend on what it should depend on? Checks that a map which merely looks right does not pass.

- :func:`randomisation`: on the model's learnt parameters (Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS
  2018): maps of an ever more randomised model should lose their similarity with the original ones.
- :func:`caption_permutation` and :func:`prompt_sensitivity`: on the caption: another caption should have another map.
- :func:`seed_stability`: not on the seed: what two seeds disagree on is noise, and bounds what the others can show.

``explanation_func(inputs, **kwargs)`` returns a map or a tuple of maps, first dimension N, as ``attribute`` of Captum's
methods does. Maps of pictures, (N, C, H, W), are summed over channels before they are compared. ``similarity`` is any
function of two batches of maps, (N, ...), that returns (N,), such as those of :mod:`captum_m2ib.metrics.similarity`.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from captum_m2ib.engine.layers import resolve_for
from captum_m2ib.engine.stakes import NothingToExplainWarning
from captum_m2ib.metrics._examples import NanPolicy, join_arguments, settle
from captum_m2ib.metrics.similarity import spearman

Explanation: TypeAlias = Callable[..., Tensor | tuple[Tensor, ...]]
Similarity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Stage: TypeAlias = nn.Module | str | Sequence[nn.Module | str]


@dataclass(frozen=True)
class Randomisation:
    r"""Similarity of each example's maps with the original ones, as the model is randomised.

    Attributes:

        stages (tuple[str, ...]): Names of the layers randomised at each stage.
        similarities (tuple[Tensor, ...]): Per map, (N, stages). Lower is better.
    """

    stages: tuple[str, ...]
    similarities: tuple[Tensor, ...]


def randomisation(
    explanation_func: Explanation,
    inputs: Tensor | tuple[Tensor, ...],
    model: nn.Module,
    layers: Sequence[Stage] | None = None,
    cascading: bool = True,
    reinitialise: Callable[[nn.Module], Any] | None = None,
    similarity: Similarity = spearman,
    valid: Tensor | tuple[Tensor | None, ...] | None = None,
    seed: int = 0,
    nan_policy: NanPolicy = "propagate",
    show_progress: bool = False,
    **kwargs: Any,
) -> Randomisation:
    r"""Randomise the model's parameters stage by stage and compare the maps with the original ones.

    The model is changed in place and left as it was found, also after an exception: parameters and buffers to the bit,
    gradients, ``requires_grad`` and training flags. A method that holds statistics of the model's hidden states should
    estimate them anew inside ``explanation_func``, or its prior fits the original model only.

    Args:

        explanation_func (Callable): ``explanation_func(inputs, **kwargs)``, using ``model``; fix its seed.
        inputs (Tensor or tuple[Tensor, ...]): The examples.
        model (nn.Module): The model whose parameters are randomised.
        layers (sequence, optional): The stages, from the output to the input: each a module, a dotted name or a group
                    of these that is randomised at once, e.g. the same block of both towers. Default: None (every
                    module that owns parameters, last registered first; as many explanations)
        cascading (bool, optional): Each stage keeps the former ones randomised; False randomises each stage alone.
                    Default: True
        reinitialise (Callable, optional): Randomises one module in place, e.g. ``lambda module:
                    module.reset_parameters()``, called for every module within a stage that owns parameters, under a
                    random state seeded anew for each. Default: None (each parameter is drawn from a normal
                    distribution with its own mean and standard deviation, so that hidden states keep their scale;
                    parameters whose entries are all equal stay)
        similarity (Callable, optional): Compares maps. Default: :func:`spearman`
        valid (Tensor or tuple, optional): Boolean, per map, in the maps' shape after channels are summed: units to
                    compare, e.g. real tokens; None for a map compares all. Default: None
        seed (int, optional): Of the randomisation; every module draws differently. Default: 0
        nan_policy (str, optional): What becomes of examples whose similarity is NaN at a stage, as for constant maps:
                    ``"propagate"``, ``"omit"`` (at every stage, with a warning that counts them) or ``"raise"``.
                    Default: "propagate"
        show_progress (bool, optional): Show a progress bar. Default: False
        **kwargs: Further arguments of ``explanation_func``.

    Returns:
        Randomisation: names of the stages, and per map the similarities, (N, stages).

    Raises:
        ValueError: if a layer is unknown or owns no parameters, shapes do not fit, or by the NaN policy.

    Examples::

        >>> few = {"additional_forward_args": pairs.additional_forward_args, "n_steps": 2, "n_samples": 2}
        >>> found = randomisation(
        ...     MultiModalInfoBottleneck(encoder).attribute, pairs.inputs, encoder,
        ...     layers=[("visual_projection", "text_projection"), "vision_model"], **few)
        >>> found.stages, found.similarities[0].shape  # of image maps: (N, stages)
        (('visual_projection + text_projection', 'vision_model'), torch.Size([2, 2]))
    """
    from tqdm.auto import tqdm

    stages = _stages(model, layers)
    original = _maps(explanation_func(inputs, **kwargs))
    table: list[tuple[Tensor, ...]] = []
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    with _left_as_found(model) as restore, warnings.catch_warnings():
        # Models with random weights are here to have nothing to lose.
        warnings.simplefilter("ignore", NothingToExplainWarning)
        for _, modules in tqdm(stages, desc="Randomisation", disable=not show_progress):
            if not cascading:
                restore()
                done.clear()
            for module in modules:
                _randomise(module, reinitialise, generator, done)
            table.append(_compare(similarity, original, _maps(explanation_func(inputs, **kwargs)), valid))
    joined = [torch.stack(column, 1) for column in zip(*table, strict=True)]
    return Randomisation(tuple(name for name, _ in stages), _settled(joined, {}, nan_policy))


def caption_permutation(
    explanation_func: Explanation,
    inputs: Tensor | tuple[Tensor, ...],
    additional_forward_args: Any = None,
    arguments: Sequence[int] | None = None,
    modality: int = 0,
    similarity: Similarity = spearman,
    valid: Tensor | None = None,
    seed: int = 0,
    nan_policy: NanPolicy = "propagate",
    **kwargs: Any,
) -> Tensor:
    r"""Similarity of each picture's map with its map when another pair of the batch lends it its caption.

    Args:

        explanation_func (Callable): ``explanation_func(inputs, additional_forward_args=..., **kwargs)``.
        inputs (Tensor or tuple[Tensor, ...]): At least two pairs.
        additional_forward_args (Any, optional): Further arguments, such as attention masks. Default: None
        arguments (sequence of int, optional): Which arguments are the caption, counted over inputs and additional
                    arguments; they move together. Default: None (every tensor but the first)
        modality (int, optional): Which of the maps is compared; with ``arguments=(0,)`` and 1, captions' maps under
                    permuted pictures. Default: 0
        similarity (Callable, optional): Compares maps. Default: :func:`spearman`
        valid (Tensor, optional): Boolean: units to compare. Default: None (all)
        seed (int, optional): Of the permutation, in which no pair keeps its place. Default: 0
        nan_policy (str, optional): What becomes of pairs whose similarity is NaN or that are lent an equal caption.
                    Default: "propagate"
        **kwargs: Further arguments of ``explanation_func``.

    Returns:
        Tensor: (N,). Lower is better.

    Raises:
        ValueError: if there is one pair only, shapes do not fit, or by the NaN policy.
    """
    given = join_arguments(inputs, additional_forward_args)
    moved = _caption_arguments(given, arguments)
    pairs = len(given[0])
    if pairs < 2:
        raise ValueError("inputs: expected at least two pairs to permute captions among, got 1.")
    # Shifting a random cycle by one leaves no pair with its own caption.
    cycle = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    lender = torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))
    lent = {index: given[index][lender.to(given[index].device)] for index in moved}
    same = torch.stack([(given[index] == lent[index]).flatten(1).all(1).cpu() for index in moved]).all(0)

    def maps(values: tuple[Any, ...]) -> Tensor:
        return _map_of(explanation_func, values, inputs, modality, kwargs)

    changed = (*(lent.get(index, value) for index, value in enumerate(given)),)
    value = _similar(similarity, maps(given), maps(changed), valid)
    return _settled([value], {"equal caption": same}, nan_policy)[0]


def prompt_sensitivity(
    explanation_func: Explanation,
    inputs: Tensor | tuple[Tensor, ...],
    prompts: Sequence[tuple[Tensor, ...]],
    additional_forward_args: Any = None,
    arguments: Sequence[int] | None = None,
    modality: int = 0,
    similarity: Similarity = spearman,
    nan_policy: NanPolicy = "propagate",
    **kwargs: Any,
) -> Tensor:
    r"""How much each picture's map changes with the caption: 1 - similarity, averaged over other prompts.

    Args:

        explanation_func (Callable): ``explanation_func(inputs, additional_forward_args=..., **kwargs)``.
        inputs (Tensor or tuple[Tensor, ...]): The pairs.
        prompts (sequence of tuple): The other prompts, each as the tensors that replace ``arguments``, with one row per
                    pair: (ids, attention mask). They may be longer or shorter than the caption.
        additional_forward_args (Any, optional): Further arguments, such as attention masks. Default: None
        arguments (sequence of int, optional): Which arguments a prompt replaces, counted over inputs and additional
                    arguments. Default: None (every tensor but the first)
        modality (int, optional): Which of the maps is compared. Default: 0
        similarity (Callable, optional): Compares maps. Default: :func:`spearman`
        nan_policy (str, optional): What becomes of pairs whose similarity is NaN. Default: "propagate"
        **kwargs: Further arguments of ``explanation_func``.

    Returns:
        Tensor: (N,); 0 if the map is the same for every prompt. Higher is better for prompts that mean something else.

    Raises:
        ValueError: if there is no prompt, a prompt does not fit, or by the NaN policy.
    """
    given = join_arguments(inputs, additional_forward_args)
    replaced = _caption_arguments(given, arguments)
    if not prompts:
        raise ValueError("prompts: expected at least one, got none.")
    original = _map_of(explanation_func, given, inputs, modality, kwargs)
    changes = []
    for index, prompt in enumerate(prompts):
        if len(prompt) != len(replaced) or any(len(tensor) != len(given[0]) for tensor in prompt):
            raise ValueError(
                f"prompts[{index}]: expected {len(replaced)} tensors with {len(given[0])} rows, in place of arguments "
                f"{tuple(replaced)}, got shapes {[tuple(tensor.shape) for tensor in prompt]}."
            )
        values = list(given)
        for position, tensor in zip(replaced, prompt, strict=True):
            values[position] = tensor
        other = _map_of(explanation_func, tuple(values), inputs, modality, kwargs)
        changes.append(1 - _similar(similarity, original, other, None))
    return _settled([torch.stack(changes).mean(0)], {}, nan_policy)[0]


def seed_stability(
    explanation_func: Explanation,
    inputs: Tensor | tuple[Tensor, ...],
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    similarity: Similarity = spearman,
    valid: Tensor | tuple[Tensor | None, ...] | None = None,
    nan_policy: NanPolicy = "propagate",
    **kwargs: Any,
) -> Tensor | tuple[Tensor, ...]:
    r"""Mean similarity of each example's maps between every two seeds.

    Args:

        explanation_func (Callable): ``explanation_func(inputs, seed=..., **kwargs)``.
        inputs (Tensor or tuple[Tensor, ...]): The examples.
        seeds (sequence of int, optional): At least two. Default: (0, 1, 2, 3, 4)
        similarity (Callable, optional): Compares maps. Default: :func:`spearman`
        valid (Tensor or tuple, optional): As for :func:`randomisation`. Default: None
        nan_policy (str, optional): What becomes of examples whose similarity is NaN. Default: "propagate"
        **kwargs: Further arguments of ``explanation_func``.

    Returns:
        Tensor or tuple[Tensor, ...]: (N,) per map; 1 if the seed changes nothing (or its ranks, for
        :func:`spearman`). Higher is better.

    Raises:
        ValueError: if there are fewer than two seeds, shapes do not fit, or by the NaN policy.
    """
    if len(set(seeds)) < 2:
        raise ValueError(f"seeds: expected at least two different ones, got {tuple(seeds)}.")
    found = [explanation_func(inputs, seed=seed, **kwargs) for seed in dict.fromkeys(seeds)]
    compared = [
        _compare(similarity, _maps(first), _maps(second), valid) for first, second in itertools.combinations(found, 2)
    ]
    means = _settled([torch.stack(column).mean(0) for column in zip(*compared, strict=True)], {}, nan_policy)
    return means if isinstance(found[0], tuple) else means[0]


def _maps(explanation: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    maps = explanation if isinstance(explanation, tuple) else (explanation,)
    return tuple((part.sum(1) if part.ndim == 4 else part).detach().clone() for part in maps)


def _map_of(
    explanation_func: Explanation, values: tuple[Any, ...], inputs: Any, modality: int, kwargs: dict[str, Any]
) -> Tensor:
    """The map of one modality for given arguments, split into inputs and additional ones as the user's were."""
    count = len(inputs) if isinstance(inputs, tuple) else 1
    first = values[:count] if isinstance(inputs, tuple) else values[0]
    maps = _maps(explanation_func(first, additional_forward_args=values[count:] or None, **kwargs))
    if not 0 <= modality < len(maps):
        raise ValueError(f"modality: expected an index below {len(maps)}, the number of maps, got {modality}.")
    return maps[modality]


def _caption_arguments(given: tuple[Any, ...], arguments: Sequence[int] | None) -> tuple[int, ...]:
    per_pair = [i for i, value in enumerate(given) if isinstance(value, Tensor) and value.ndim]
    chosen = tuple(per_pair[1:] if arguments is None else arguments)
    if not chosen or not set(chosen) <= set(per_pair):
        raise ValueError(
            f"arguments: expected positions among {per_pair}, the tensors with a row per pair, at least one, got "
            f"{list(chosen)}; pass captions as inputs or additional_forward_args."
        )
    return chosen


def _similar(similarity: Similarity, first: Tensor, second: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return similarity(first, second)
    if valid.dtype != torch.bool or valid.shape != first.shape:
        raise ValueError(
            f"valid: expected a boolean tensor of the map's shape {tuple(first.shape)}, got {valid.dtype} of shape "
            f"{tuple(valid.shape)}."
        )
    rows = zip(first, second, valid.to(first.device), strict=True)
    return torch.cat([similarity(a[counted][None], b[counted][None]) for a, b, counted in rows])


def _compare(
    similarity: Similarity,
    first: tuple[Tensor, ...],
    second: tuple[Tensor, ...],
    valid: Tensor | tuple[Tensor | None, ...] | None,
) -> tuple[Tensor, ...]:
    flags = valid if isinstance(valid, tuple) else (valid,) * len(first)
    if len(flags) != len(first):
        raise ValueError(f"valid: expected one entry per map ({len(first)}), got {len(flags)}.")
    return tuple(_similar(similarity, a, b, v) for a, b, v in zip(first, second, flags, strict=True))


def _settled(values: Sequence[Tensor], undefined: dict[str, Tensor], nan_policy: NanPolicy) -> tuple[Tensor, ...]:
    for index, value in enumerate(values):
        undefined[f"similarity of map {index} that is NaN"] = value.isnan().reshape(len(value), -1).any(1)
    if nan_policy == "propagate":
        # The stages concerned are NaN already; the others, and the example's other maps, keep their values.
        undefined = {reason: where for reason, where in undefined.items() if not reason.startswith("similarity")}
    return settle(values, undefined, nan_policy, "explanation_func")


def _stages(model: nn.Module, layers: Sequence[Stage] | None) -> list[tuple[str, list[nn.Module]]]:
    if layers is None:
        named = [(name or "model", module) for name, module in model.named_modules() if _own(module)]
        return [(name, [module]) for name, module in reversed(named)]
    stages = []
    for stage in layers:
        group = [resolve_for(model, layer) for layer in ([stage] if isinstance(stage, (nn.Module, str)) else stage)]
        name = " + ".join(layer.name for layer in group)
        modules = [module for layer in group for module in layer.module.modules() if _own(module)]
        if not modules:
            raise ValueError(f"layers: expected layers with parameters, {name or 'an empty group'} has none.")
        stages.append((name, modules))
    return stages


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _randomise(
    module: nn.Module, reinitialise: Callable[[nn.Module], Any] | None, generator: torch.Generator, done: set[int]
) -> None:
    """Draw a module's own parameters anew; parameters that several modules share, once."""
    if reinitialise is not None:
        seed = int(torch.randint(2**31, (), generator=generator))
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            reinitialise(module)
        return
    for parameter in _own(module):
        if id(parameter) in done:
            continue
        done.add(id(parameter))
        values = parameter.detach().double()
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(values.device)
        with torch.no_grad():
            parameter.copy_(values.mean() + values.std(correction=0) * drawn)


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Hands out a function that restores the model, and calls it at the end whatever happens."""
    modules = [(m, m.training, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    kept = [(t, t.detach().clone(), t.requires_grad) for t in tensors]
    gradients = [(t, t.grad, None if t.grad is None else t.grad.clone()) for t in tensors]

    def restore() -> None:
        for module, training, parameters, buffers in modules:
            module.training = training
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value, requires_grad in kept:
                tensor.copy_(value)
                tensor.requires_grad_(requires_grad)
            for tensor, gradient, before in gradients:
                tensor.grad = gradient
                if gradient is not None and before is not None:
                    gradient.copy_(before)

    try:
        yield restore
    finally:
        restore()
