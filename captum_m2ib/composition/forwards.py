"""Views of a ``forward_func`` through which Captum's gradient methods reach tokens and maps.

Token ids have no gradient, but what embeds them returns a tensor that has; a transformer's layer returns tokens, but
behind its prefix they are a grid. Both views run the model as it is and exchange one layer's output on the way,
by interception: no module is changed or hooked, and other threads that use the model see nothing of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

from captum_m2ib import _captum
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.batch_axis import BatchAxis
from captum_m2ib.engine.grids import channel_axis
from captum_m2ib.engine.interception import Handler, borrowing, current_handler, intercept
from captum_m2ib.engine.layers import Layer, LayerLike, find_hidden, get_at, replace_at, resolve_for
from captum_m2ib.engine.layouts import Layout, PatchLayout, TextLayout
from captum_m2ib.engine.real_units import real_elements
from captum_m2ib.engine.units import to_units


class _View(nn.Module):
    """A forward_func with one layer's hidden state exchanged on the way."""

    def __init__(self, forward_func: Callable[..., Any], layer: LayerLike) -> None:
        super().__init__()
        if not callable(forward_func):
            raise TypeError(f"forward_func: expected a model or a callable, got {type(forward_func).__name__}.")
        self.forward_func = forward_func
        self.layer = resolve_for(forward_func, layer)
        self.training = isinstance(forward_func, nn.Module) and forward_func.training

    def roots(self) -> tuple[nn.Module, ...]:
        r"""Where names of layers start.

        Returns:
            tuple[nn.Module, ...]: where they start in ``forward_func``.
        """
        if hasattr(self.forward_func, "roots"):
            return self.forward_func.roots()
        return (self.forward_func if isinstance(self.forward_func, nn.Module) else self,)

    def _run(self, arguments: Any, change: Callable[[Tensor], Tensor]) -> Any:
        with _exchanging(self.layer, change, self):
            return self.forward_func(*arguments)


@contextlib.contextmanager
def _exchanging(layer: Layer, change: Callable[[Tensor], Tensor], root: nn.Module) -> Iterator[None]:
    """Pass the hidden state that a layer returns through ``change``, in this thread."""
    outer, is_grad_enabled = current_handler(), torch.is_grad_enabled()
    calls = 0

    def step(original: Handler, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        output = original(module, *args, **kwargs)
        if module is not layer.module:
            return output
        calls += 1
        if layer.call not in (None, calls - 1):
            return output
        path = find_hidden(output)
        if path is None:
            raise RuntimeError(
                f"layer: the output of {layer.name!r} holds no floating-point tensor of two or more dimensions; choose "
                "another layer."
            )
        return replace_at(output, path, change(get_at(output, path)))

    def handler(original: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        # What records or reruns the pass already must see the exchanged hidden state, not the model's own.
        proceed = partial(step, original)
        return proceed(module, *args, **kwargs) if outer is None else outer(proceed, module, args, kwargs)

    with contextlib.ExitStack() as stack:
        if outer is None:
            stack.enter_context(borrowing(root))
            stack.enter_context(torch.set_grad_enabled(is_grad_enabled))
        stack.enter_context(intercept(handler))
        yield
    # A rerun may leave out the layer.
    if (outer is None and calls == 0) or (layer.call is None and calls > 1):
        times = "never called it" if calls == 0 else f"called it {calls} times"
        raise RuntimeError(
            f"layer: expected one call of {layer.name!r} in a forward pass, but the pass {times}; choose a module that "
            "forward_func runs, or say which call is meant, as (layer, 0) for the first."
        )


class EmbeddingForward(_View):
    r"""A ``forward_func`` that takes token embeddings in place of token ids, so that gradients reach tokens.

    The arguments are those of the wrapped function with embeddings where the ids were, and the ids as the first
    additional argument: towers read lengths and the pooled position from them. For a :class:`DualEncoder` that is
    ``(pixel_values, embeddings, input_ids, attention_mask)``.

    Args:

        forward_func (Callable or nn.Module): A :class:`DualEncoder` or any callable that returns one score per pair.
        embedding (nn.Module or str, optional): The layer whose output the embeddings are. Default: None (what embeds
                    the tokens of a :class:`DualEncoder`, with their positions where it adds them)
        modality (int, optional): Position of the token ids among the inputs. Default: None (as a
                    :class:`DualEncoder` tells; else 1)
        n_inputs (int, optional): How many of the arguments are inputs; the ids follow them. Default: 2

    Raises:
        ValueError: if ``embedding`` is not given and cannot be found, here; if the arguments do not fit, when called.
        RuntimeError: if a pass does not call the layer exactly once.

    Examples::

        >>> from captum.attr import IntegratedGradients
        >>> forward = EmbeddingForward(encoder)
        >>> inputs, additional = forward.embedded(pairs.inputs, pairs.additional_forward_args)
        >>> [tensor.shape for tensor in inputs]  # pixels, embeddings; the ids are the first of additional
        [torch.Size([2, 3, 64, 64]), torch.Size([2, 7, 96])]
        >>> image_map, token_map = IntegratedGradients(forward).attribute(
        ...     tuple(tensor.requires_grad_() for tensor in inputs), additional_forward_args=additional, n_steps=4)
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        embedding: LayerLike | None = None,
        modality: int | None = None,
        n_inputs: int = 2,
    ) -> None:
        if modality is None:
            modality = _text_modality(forward_func)
        if not 0 <= modality < n_inputs:
            raise ValueError(f"modality: expected the index of one of the {n_inputs} inputs, got {modality!r}.")
        super().__init__(forward_func, _embedding_of(forward_func, modality) if embedding is None else embedding)
        self.modality, self.n_inputs = modality, n_inputs

    def forward(self, *arguments: Any) -> Any:
        r"""The score, from embeddings.

        Args:

            *arguments: Inputs with embeddings, (N, L, channels), in place of token ids; the ids, (N, L); the additional
                arguments of the wrapped function.

        Returns:
            Tensor: What the wrapped function returns, (N,).

        Raises:
            ValueError: if the arguments are not of this form.
        """
        inputs, rest = list(arguments[: self.n_inputs]), arguments[self.n_inputs :]
        given = inputs[self.modality] if len(inputs) == self.n_inputs else None
        if not rest or not isinstance(given, Tensor) or not given.is_floating_point() or rest[0].is_floating_point():
            raise ValueError(
                f"arguments: expected {self.n_inputs} inputs with floating-point embeddings at position "
                f"{self.modality}, then the integer token ids, then what else the model reads; make them with "
                "EmbeddingForward.embedded(inputs, additional_forward_args)."
            )
        inputs[self.modality], *additional = rest

        def change(hidden: Tensor) -> Tensor:
            if hidden.shape != given.shape:
                raise ValueError(
                    f"arguments: expected embeddings of shape {tuple(hidden.shape)} for these token ids, got "
                    f"{tuple(given.shape)}."
                )
            # Some towers add positions in place.
            return given.clone()

        return self._run((*inputs, *additional), change)

    def embed(self, *arguments: Any) -> Tensor:
        r"""What the layer returns for token ids.

        Args:

            *arguments: The arguments of the wrapped function, with ids.

        Returns:
            Tensor: Embeddings, (N, L, channels), detached.
        """
        found: list[Tensor] = []

        def change(hidden: Tensor) -> Tensor:
            found.append(hidden.detach().clone())
            return hidden

        with torch.no_grad():
            self._run(arguments, change)
        return found[0]

    def embedded(
        self, inputs: tuple[Tensor, ...], additional_forward_args: Any = None
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        r"""Turn arguments with token ids into arguments of this function.

        Args:

            inputs (tuple[Tensor, ...]): Inputs with token ids, such as ``pairs.inputs``.
            additional_forward_args (Any, optional): Additional arguments of the wrapped function. Default: None

        Returns:
            tuple: inputs with embeddings, and additional arguments that start with the ids.
        """
        additional = _captum.format_additional_forward_args(additional_forward_args) or ()
        embeddings = self.embed(*inputs, *additional)
        changed = tuple(embeddings if i == self.modality else tensor for i, tensor in enumerate(inputs))
        return changed, (inputs[self.modality], *additional)

    @property
    def layouts(self) -> tuple[Layout | None, ...]:
        """The encoder's layouts as they hold for this function's arguments, for :class:`MultiModalInfoBottleneck`."""
        layouts = getattr(self.forward_func, "layouts", (None,) * self.n_inputs)
        return tuple(layout if layout is None else _shifted(layout, self.n_inputs) for layout in layouts)


class GridForward(_View):
    r"""A ``forward_func`` in which the tokens of one layer pass through ``grid`` as a map, (N, channels, \*grid).

    Captum's layer methods take the dimensions after the second for space. Given ``view.grid`` as the layer they find
    there a picture's patches as (N, channels, rows, columns) and a caption's tokens as (N, channels, L): without
    prefix tokens, which travel past it, and zero at padding. The score is unchanged.

    Args:

        forward_func (Callable or nn.Module): A :class:`DualEncoder` or any callable that returns one score per pair.
        layer (nn.Module, str or tuple): The layer, or (layer, index of the call). Pairs come first in what it returns;
                    frames of a video may be rows of their own.
        layout (Layout, optional): The layout of its tower. Default: None (derived from a :class:`DualEncoder`)
        modality (int, optional): Position of the tower's input. Default: None (as a :class:`DualEncoder` tells; else 0
                    for a :class:`PatchLayout` and 1 for any other)

    Attributes:

        grid (nn.Identity): The layer to name to Captum.

    Raises:
        ValueError: if there is no layout, or the layer's hidden state does not have the units that it says.
        RuntimeError: if a pass does not call the layer exactly once.

    Examples::

        >>> from captum.attr import LayerActivation
        >>> view = GridForward(encoder, "vision_model.encoder.layers.2")
        >>> LayerActivation(view, view.grid).attribute(pairs.inputs, pairs.additional_forward_args).shape
        torch.Size([2, 96, 8, 8])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: LayerLike,
        layout: Layout | None = None,
        modality: int | None = None,
    ) -> None:
        super().__init__(forward_func, layer)
        module = self.layer.module
        if isinstance(forward_func, DualEncoder):
            modality = forward_func.owner(module) if modality is None else modality
            layout = forward_func.layout_of(module, modality) if layout is None else layout
        if layout is None:
            raise ValueError(
                "layout: expected the layout of the layer's tower, got None; pass e.g. "
                "PatchLayout(patch_size=(16, 16), prefix=1) or TextLayout()."
            )
        self.layout = layout
        self.modality = int(not isinstance(layout, PatchLayout)) if modality is None else modality
        self.grid = nn.Identity().train(self.training)

    def forward(self, *arguments: Any) -> Any:
        r"""The score of the wrapped function.

        Args:

            *arguments: The arguments of the wrapped function.

        Returns:
            Tensor: What the wrapped function returns, (N,).
        """

        inputs = arguments[self.modality]

        def change(rows: Tensor) -> Tensor:
            # Towers of videos run frames as rows of their own.
            frames = BatchAxis(0, len(rows) // len(inputs) if len(rows) % len(inputs) == 0 else 1)
            hidden = frames.split(rows)
            axis = channel_axis(self.layout, hidden, inputs)
            places = self._places(hidden, axis, inputs)
            real = real_elements(self.layout, hidden, self.modality, arguments)
            channels_first = hidden.movedim(axis, 1)
            flat = channels_first.flatten(2)
            counted = None if real is None else real.squeeze(-1).unsqueeze(1)
            seen = flat if counted is None else flat.masked_fill(~counted, 0.0)
            maps = seen[..., places.flatten()].unflatten(2, places.shape)
            passed = flat.index_copy(2, places.flatten(), self.grid(maps).flatten(2))
            passed = passed if counted is None else torch.where(counted, passed, flat)
            return frames.merge(passed.unflatten(2, channels_first.shape[2:]).movedim(1, axis))

        return self._run(arguments, change)

    def _places(self, hidden: Tensor, axis: int, inputs: Tensor) -> Tensor:
        """The position among the layer's units at each place of the grid."""
        numbers = torch.zeros(hidden[:1].shape, dtype=torch.float32, device=hidden.device)
        first = numbers.select(axis, 0)
        first += torch.arange(first.numel(), device=hidden.device).view(first.shape)
        return to_units(self.layout, numbers, inputs[:1])[0].round().long()


class TokenGradCam(LayerGradCam):
    r"""Captum's LayerGradCam at a layer that returns tokens.

    LayerGradCam averages gradients over the dimensions after the second, which are space in a convolutional layer's
    (N, channels, rows, columns) but channels in a transformer's (N, tokens, channels), and says nothing. Here it works
    on the :class:`GridForward` of the layer; ``attribute`` is Captum's own.

    Of a CLIP tower's last block only the pooled token reaches the score, so that a map there is zero: choose an earlier
    one, e.g. ``encoder.published_layers()[0]``. The weights of channels are means over all L places, so that a
    caption's map scales with 1 / L; values at padding are 0.

    Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017,
    https://arxiv.org/abs/1610.02391

    Args:

        forward_func, layer, layout, modality: As for :class:`GridForward`.
        device_ids (list[int], optional): As for LayerGradCam. Default: None

    Raises:
        ValueError, RuntimeError: as for :class:`GridForward`.

    Examples::

        >>> cam = TokenGradCam(encoder, encoder.published_layers()[0])
        >>> maps = cam.attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args)
        >>> maps.shape, TokenGradCam.interpolate(maps, (64, 64), "bilinear").shape
        (torch.Size([2, 1, 8, 8]), torch.Size([2, 1, 64, 64]))
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: LayerLike,
        layout: Layout | None = None,
        modality: int | None = None,
        device_ids: list[int] | None = None,
    ) -> None:
        view = GridForward(forward_func, layer, layout, modality)
        super().__init__(view, view.grid, device_ids)


def _text_modality(forward_func: Any) -> int:
    layouts = getattr(forward_func, "layouts", ())
    return next((index for index, layout in enumerate(layouts) if isinstance(layout, TextLayout)), 1)


def _embedding_of(forward_func: Any, modality: int) -> LayerLike:
    found = forward_func.embeddings_of(modality) if isinstance(forward_func, DualEncoder) else None
    if found is None:
        raise ValueError(
            f"embedding: found no layer of {type(forward_func).__name__} that embeds tokens; pass the module, e.g. "
            "EmbeddingForward(forward_func, text_tower.embeddings)."
        )
    # A model that reads both inputs with one network embeds tokens of each.
    told = forward_func.told_apart([found if index == modality else None for index in (0, 1)])[modality]
    return found if told is None else told


def _shifted(layout: Layout, n_inputs: int) -> Layout:
    """A layout for arguments with one more behind the inputs."""
    moved = {
        name: value + 1
        for name in ("mask_argument", "shapes_argument")
        if (value := getattr(layout, name, None)) is not None and value >= n_inputs
    }
    return replace(layout, **moved)
