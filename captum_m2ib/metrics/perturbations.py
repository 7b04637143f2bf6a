"""Perturbations of pairs for Captum's own metrics, ``captum.metrics.infidelity`` and ``sensitivity_max``.

Pixels and token ids cannot be perturbed alike: floating-point inputs receive noise, integer inputs have some of their
tokens replaced by others, and start, end, pooled and padding tokens stay, because a tower that pools at another
position answers another question. Both kinds of function take whatever ``inputs`` Captum hands them: the pair, or
pictures or ids alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from captum_m2ib.metrics._examples import at_least

Inputs: TypeAlias = Tensor | tuple[Tensor, ...]


def infidelity_perturbation(
    noise: float = 0.1,
    token_share: float = 0.2,
    maskable: Tensor | None = None,
    vocabulary: Sequence[int] | None = None,
    seed: int = 0,
) -> Callable[[Inputs], tuple[Inputs, Inputs]]:
    r"""A ``perturb_func`` for ``captum.metrics.infidelity``.

    Infidelity (Yeh et al., NeurIPS 2019) compares the perturbation's product with the map with the change of the score.
    For pixels the perturbation is the noise taken away, :math:`I = x - x'`; for tokens it is 1 where a token was
    replaced and 0 elsewhere. Bits are not in units of the score: pass ``normalize=True`` to ``infidelity``.

    Args:

        noise (float, optional): Standard deviation of the noise on floating-point inputs. Default: 0.1
        token_share (float, optional): Probability that a maskable token is replaced. Default: 0.2
        maskable (Tensor, optional): Boolean, (N, L), for the pairs as given to the metric: False for tokens that stay,
                    e.g. ``~torch.tensor(pairs.special)``. Needed if an input holds token ids. Default: None
        vocabulary (sequence of int, optional): Ids that a replaced token may become, special ones left out; at least
                    two. Needed if an input holds token ids. Default: None
        seed (int, optional): Of the draws; every call draws on, so make a new function to repeat them. Default: 0

    Returns:
        Callable: from inputs to (perturbations, perturbed inputs), each of the form of the inputs.

    Raises:
        ValueError: if an argument is out of range, here; if ids come without ``maskable`` or ``vocabulary``, or with
            other rows than it has, when called.

    Examples::

        >>> from captum.metrics import infidelity
        >>> perturb = infidelity_perturbation(maskable=~torch.tensor(pairs.special), vocabulary=range(4, 48))
        >>> infidelity(encoder, perturb, pairs.inputs, (image_bits, token_bits),
        ...     additional_forward_args=pairs.additional_forward_args, normalize=True).shape
        torch.Size([2])
    """
    at_least("noise", noise, 0)
    generator = torch.Generator().manual_seed(seed)
    replace = _replacer(maskable, vocabulary, generator)
    _check_share(token_share)

    def perturb(inputs: Inputs) -> tuple[Inputs, Inputs]:
        def one(tensor: Tensor) -> tuple[Tensor, Tensor]:
            if tensor.is_floating_point():
                drawn = noise * torch.randn(tensor.shape, generator=generator).to(tensor)
                return drawn, tensor - drawn
            replaced = replace(tensor, token_share)
            return (replaced != tensor).float(), replaced

        if isinstance(inputs, Tensor):
            return one(inputs)
        perturbations, perturbed = zip(*map(one, inputs), strict=True)
        return perturbations, perturbed

    return perturb


def sensitivity_perturbation(
    token_share: float = 1.0,
    maskable: Tensor | None = None,
    vocabulary: Sequence[int] | None = None,
    seed: int = 0,
) -> Callable[[Inputs, float], tuple[Tensor, ...]]:
    r"""A ``perturb_func`` for ``captum.metrics.sensitivity_max``.

    Floating-point inputs receive noise drawn evenly from ``[-perturb_radius, perturb_radius]``, as Captum's own does;
    a maskable token is replaced with probability ``min(1, token_share * perturb_radius)``. At radius 0 nothing changes.

    Args:

        token_share (float, optional): Probability per unit of radius that a maskable token is replaced; 0 leaves all
                    tokens. Default: 1.0
        maskable, vocabulary, seed: As for :func:`infidelity_perturbation`.

    Returns:
        Callable: from inputs and ``perturb_radius`` to a tuple of perturbed inputs.

    Raises:
        ValueError: as for :func:`infidelity_perturbation`.

    Examples::

        >>> from captum.metrics import sensitivity_max
        >>> perturb = sensitivity_perturbation(maskable=~torch.tensor(pairs.special), vocabulary=range(4, 48))
        >>> m2ib = MultiModalInfoBottleneck(encoder)
        >>> sensitivity_max(m2ib.attribute, pairs.inputs, perturb, perturb_radius=0.1, n_perturb_samples=1,
        ...     additional_forward_args=pairs.additional_forward_args, n_steps=2).shape
        torch.Size([2])
    """
    at_least("token_share", token_share, 0)
    generator = torch.Generator().manual_seed(seed)
    replace = _replacer(maskable, vocabulary, generator)

    def perturb(inputs: Inputs, perturb_radius: float = 0.02) -> tuple[Tensor, ...]:
        at_least("perturb_radius", perturb_radius, 0)

        def one(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                drawn = 2 * torch.rand(tensor.shape, generator=generator).to(tensor) - 1
                return tensor + perturb_radius * drawn
            return replace(tensor, min(1.0, token_share * perturb_radius))

        return tuple(map(one, (inputs,) if isinstance(inputs, Tensor) else inputs))

    return perturb


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"token_share: expected a probability in [0, 1], got {share!r}.")


def _replacer(
    maskable: Tensor | None, vocabulary: Sequence[int] | None, generator: torch.Generator
) -> Callable[[Tensor, float], Tensor]:
    """Replace each maskable token, with some probability, by another one drawn evenly from the vocabulary."""
    if maskable is not None and (maskable.dtype != torch.bool or maskable.ndim != 2):
        raise ValueError(
            f"maskable: expected a boolean tensor, (N, L), got {maskable.dtype} of shape {tuple(maskable.shape)}."
        )
    words = None if vocabulary is None else torch.tensor(sorted(set(vocabulary)))
    if words is not None and len(words) < 2:
        raise ValueError(f"vocabulary: expected at least two different ids, got {words.tolist()}.")

    def replace(ids: Tensor, share: float) -> Tensor:
        if maskable is None or words is None:
            missing = "maskable" if maskable is None else "vocabulary"
            raise ValueError(
                f"{missing}: expected one because an input holds token ids, got None; pass e.g. "
                "maskable=~torch.tensor(pairs.special) and vocabulary=range(first_word, last_word)."
            )
        repeats, rest = divmod(len(ids), len(maskable))
        if rest or ids.shape[1:] != maskable.shape[1:]:
            raise ValueError(
                f"maskable: expected the shape of the token ids, {tuple(ids.shape)}, or of ids that Captum repeats "
                f"into these, got {tuple(maskable.shape)}."
            )
        # Captum repeats each example next to itself.
        open_to_change = maskable.cpu().repeat_interleave(repeats, 0)
        chosen = torch.rand(ids.shape, generator=generator) < share
        # One word is left out of the draw and stands in for the token itself, so that every replacement is another.
        drawn = words[torch.randint(len(words) - 1, ids.shape, generator=generator)]
        drawn = torch.where(drawn == ids.cpu(), words[-1], drawn)
        return torch.where((chosen & open_to_change).to(ids.device), drawn.to(ids), ids)

    return replace
