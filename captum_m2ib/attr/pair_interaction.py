"""Which units of one input act together with which units of the other: second-order attribution of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from captum_m2ib import _captum
from captum_m2ib.attr._arguments import Explained, rows_at_once
from captum_m2ib.attr._pairwise import PairAttribution, gradients
from captum_m2ib.attr._scoring import roots_of
from captum_m2ib.attr._units import sum_units
from captum_m2ib.engine.gates import check_finite
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layouts import Layout, TextLayout
from captum_m2ib.engine.real_units import check_masks, real_tokens
from captum_m2ib.engine.settings import check_count
from captum_m2ib.engine.suffix import Suffix, Tap

Baselines = tuple[Tensor | int | float, ...]


class PairInteraction(PairAttribution):
    r"""Second-order attribution of a pair (exCLIP): how each unit of one input acts together with each of the other.

    With ``x`` and ``y`` the hidden states that enter a layer of each tower, ``r`` those of references, ``e`` and ``f``
    the embeddings of the pair, and Jacobians averaged on straight ways from the references, ::

        interaction[s, p] = sum over d, d' of (y - r)_sd (mean dF/dy_sd . mean dE/dx_pd') (x - r)_pd' / (|e| |f|),

    which sums, over all tokens of both towers, to score(x, y) - score(x, r) - score(r, y) + score(r, r) where every
    score is divided by the pair's own norms. The Jacobians are never formed: contracted with ``y - r`` they are one
    vector per token, and each such vector is taken back through the other tower.

    Choices: the layers are the inputs of the towers' last blocks, and the reference picture is zeros (of normalised
    pixels), as published; the way is cut into n_steps equal parts whose middles are taken, exact to one order more than
    their ends. The reference caption keeps its first and last token and has id 0 between them, where the authors have
    padding, which not every vocabulary can put there without moving the token that is pooled.

    Möller et al., "Explaining Caption-Image Interactions in CLIP Models with Second-Order Attributions", TMLR 2025,
    https://arxiv.org/abs/2408.14153

    Args:

        forward_func (Callable or nn.Module): A :class:`DualEncoder`, a model that one can wrap, or any callable whose
                    score is torch's ``cosine_similarity`` of two embeddings.
        layers (sequence, optional): Per modality the layer: a module, a dotted name, or a pair (module or name, index
                    of the call). Default: None (the last block of each tower)
        layouts (sequence, optional): Per modality how hidden-state units map onto input units. Default: None (derived
                    from the encoder)

    Raises:
        ValueError: if a layer is unknown, or none can be chosen for ``forward_func``.
        TypeError: if ``forward_func`` cannot be called.

    Examples::

        >>> looks = PairInteraction(encoder).attribute(
        ...     pairs.inputs, additional_forward_args=pairs.additional_forward_args)
        >>> looks.shape  # per token a map of patches
        torch.Size([2, 7, 8, 8])
    """

    @_captum.log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: tuple[Tensor, Tensor],
        target: Any = None,
        additional_forward_args: Any = None,
        baselines: Baselines | None = None,
        n_steps: int = 10,
        internal_batch_size: int | None = None,
        attribute_to_layer_input: bool = True,
        show_progress: bool = False,
    ) -> Tensor:
        r"""Interactions of the units of each pair's two inputs.

        Args:

            inputs (tuple[Tensor, Tensor]): Both inputs, batch first.
            target (Any, optional): Not used: an interaction is one of a similarity. Default: None
            additional_forward_args (Any, optional): Further positional arguments of ``forward_func``. Default: None
            baselines (tuple, optional): Per input its reference: a tensor of the input's shape or of one example, or a
                        number. Default: None (zeros; token ids keep their first and last token)
            n_steps (int, optional): Steps of each integral. Default: 10
            internal_batch_size (int, optional): Most rows (pairs times steps) in one pass. Default: None (all at once)
            attribute_to_layer_input (bool, optional): Take what the layers receive instead of what they return.
                        Default: True
            show_progress (bool, optional): Show a progress bar. Default: False

        Returns:
            *Tensor* of **interactions**:
            - **interactions** (*Tensor*):
                        Signed, in units of the score: (N, units of the second input, units of the first), a caption's
                        tokens and a picture's grid giving (N, tokens, height, width). Tokens at padding are exactly 0;
                        prefix tokens are not included.

        Raises:
            ValueError: if there are not two inputs, an argument is out of range, a layout does not fit, the score is
                no cosine similarity, or a score is NaN or infinite.
            RuntimeError: if a layer is not reached, or the score does not depend on it.
        """
        given = Explained.ensure(self.forward_func, inputs, target, additional_forward_args, 2)
        if len(given.inputs) != 2 or len(self.layers) != 2:
            raise ValueError(
                f"inputs: expected two, with a layer each, got {len(given.inputs)} inputs and {len(self.layers)} "
                "layers."
            )
        check_count("n_steps", n_steps)
        check_masks(self.layouts, given.arguments)
        references = replace(given, arguments=_references(self.layouts, given.arguments, baselines))
        pairs_at_once, steps_at_once = rows_at_once(internal_batch_size, n_steps)
        taps = [Tap(layer, attribute_to_layer_input) for layer in self.layers]
        parts = []
        with borrowing(*roots_of(self.forward_func, self.layers)):
            both = zip(given.parts(pairs_at_once), references.parts(pairs_at_once), strict=True)
            total = given.count(pairs_at_once)
            for (start, chunk), (_, other) in tqdm(
                both, total=total, desc=self.get_name(), unit="part", disable=not show_progress
            ):
                suffix = Suffix(given.forward, chunk, chunk[0].shape[0], taps)
                check_finite("score of the untouched pairs", suffix.score, start)
                reference = Suffix(given.forward, other, chunk[0].shape[0], taps)
                found = _Ways(suffix, reference.hidden, self.layouts, chunk, n_steps, steps_at_once).interaction()
                check_finite("interaction", found, start)
                parts.append(found)
        return torch.cat(parts)


def _references(
    layouts: Sequence[Layout | None], arguments: tuple[Any, ...], baselines: Baselines | None
) -> tuple[Any, ...]:
    """All arguments with references in the place of the two inputs."""
    if baselines is not None and (not isinstance(baselines, tuple) or len(baselines) != 2):
        raise ValueError("baselines: expected one reference for each of the two inputs, as a tuple.")
    made = []
    for index, tensor in enumerate(arguments[:2]):
        given = None if baselines is None else baselines[index]
        if isinstance(given, Tensor) and given.shape not in (tensor.shape, tensor.shape[1:], (1, *tensor.shape[1:])):
            raise ValueError(
                f"baselines[{index}]: expected the shape {tuple(tensor.shape)} or that of one example, got "
                f"{tuple(given.shape)}."
            )
        if given is not None:
            made.append(torch.as_tensor(given, device=tensor.device).to(tensor.dtype).expand_as(tensor).clone())
        elif tensor.is_floating_point():
            made.append(torch.zeros_like(tensor))
        else:
            made.append(_without_words(layouts[index], tensor, arguments))
    return (*made, *arguments[2:])


def _without_words(layout: Layout | None, ids: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """Captions of id 0 but for their first and last real token, and padding as it is."""
    real = real_tokens(layout, ids, arguments) if isinstance(layout, TextLayout) else None
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    place = real.int().cumsum(1)
    inner = real & (place > 1) & (place < place[:, -1:])
    return ids.masked_fill(inner, 0)


class _Embeddings(TorchFunctionMode):
    """Keeps the two embeddings whose cosine similarity a pass returns."""

    def __init__(self) -> None:
        super().__init__()
        self.found: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "cosine_similarity":
            first, second = (*args, *(kwargs[name] for name in ("x1", "x2") if name in kwargs))[:2]
            self.found = (first, second)
        return func(*args, **kwargs)


def embed(suffix: Suffix, values: dict[int, Tensor], draws: int) -> tuple[Tensor, Tensor]:
    """The embeddings, (N * draws, dimensions) each, of a pass that is rerun from given hidden states."""
    with _Embeddings() as embeddings:
        suffix.run(values, draws)
    if embeddings.found is None or any(e.ndim != 2 for e in embeddings.found):
        raise ValueError(
            "forward_func: interactions need the two embeddings, but its score is not made by "
            "torch.nn.functional.cosine_similarity of two tensors (N, dimensions); pass a DualEncoder."
        )
    return embeddings.found


class _Ways:
    """The straight ways from the references of some pairs to their hidden states."""

    def __init__(
        self,
        suffix: Suffix,
        references: Sequence[Tensor],
        layouts: Sequence[Layout | None],
        arguments: tuple[Any, ...],
        n_steps: int,
        steps_at_once: int,
    ) -> None:
        self.suffix, self.layouts, self.arguments = suffix, layouts, arguments
        self.references = references
        self.n_steps, self.steps_at_once = n_steps, steps_at_once

    def interaction(self) -> Tensor:
        """(N, units of the second input, units of the first)."""
        with torch.no_grad():
            values = dict(enumerate(self.suffix.hidden))
            first, second = (embedding.detach() for embedding in embed(self.suffix, values, 1))
        # (dimensions, N, units): what each unit of the second input adds to its embedding.
        added = self.contracted(1, torch.eye(second.shape[1], dtype=second.dtype, device=second.device))
        per_unit = added.flatten(2).movedim(0, -1)
        found = self.contracted(0, per_unit.movedim(1, 0).to(first.dtype))
        norms = (first.norm(dim=1) * second.norm(dim=1)).view(-1, *[1] * (found.ndim - 1))
        return (found.movedim(0, 1) / norms).unflatten(1, added.shape[2:]).contiguous()

    def contracted(self, index: int, directions: Tensor) -> Tensor:
        r"""Per direction of the embedding, (directions, dimensions) or (directions, N, dimensions), what each unit adds
        to the embedding along it, (directions, N, \*units)."""
        held, reference = self.suffix.hidden[index], self.references[index]
        way = (held - reference).to(torch.promote_types(held.dtype, torch.float32))
        totals = [torch.zeros_like(way) for _ in directions]
        middles = (torch.arange(self.n_steps, dtype=way.dtype, device=way.device) + 0.5) / self.n_steps
        for part in middles.split(self.steps_at_once):
            values = reference.unsqueeze(1) + way.unsqueeze(1) * part.view(1, -1, *[1] * (way.ndim - 1))
            values = values.flatten(0, 1).to(held.dtype).requires_grad_()
            embedding = embed(self.suffix, {index: values}, len(part))[index].unflatten(0, (len(held), -1))
            for total, direction in zip(totals, directions, strict=True):
                along = (embedding * (direction if direction.ndim == 1 else direction.unsqueeze(1))).sum(-1)
                total += gradients(along, [values])[0].unflatten(0, (len(held), -1)).sum(1)
        layout = self.layouts[index]
        units = [sum_units(layout, way * total / self.n_steps, index, self.arguments) for total in totals]
        return torch.stack(units)
