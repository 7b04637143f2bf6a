"""Features of a frozen backbone: read at a layer, as grids of channels, once per picture if they are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_m2ib.disent._grid import derive_layout, to_grid
from captum_m2ib.engine.interception import borrowing, intercept
from captum_m2ib.engine.layers import LayerLike, find_hidden, get_at, resolve_layer
from captum_m2ib.engine.layouts import PatchLayout


@dataclass(frozen=True, eq=False)
class FeatureSet:
    r"""Features of a data set, as a frozen backbone gives them.

    Args:

        features (Tensor): (n, D, h, w).
        labels (Tensor, optional): Classes, int64 (n,), or probabilities of the classes, float (n, classes).
            Default: None
        ids (Tensor, optional): Which picture each row shows, int64 (n,); rows with one id show the same picture.
            Default: None (all differ)
        size (tuple[int, int], optional): Height and width of the pictures in pixels. Default: None (the grid's)

    Raises:
        ValueError: if the shapes do not fit, there are no rows, or features are NaN or infinite.
    """

    features: Tensor
    labels: Tensor | None = None
    ids: Tensor | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_features(self.features)
        for name, values in (("labels", self.labels), ("ids", self.ids)):
            if values is not None and len(values) != len(self.features):
                raise ValueError(
                    f"{name}: expected one per row of the features ({len(self.features)}), got {len(values)}."
                )

    def __len__(self) -> int:
        return len(self.features)

    def subset(self, rows: Tensor) -> FeatureSet:
        r"""The rows at these indices.

        Args:

            rows (Tensor): Indices, int64, (m,).

        Returns:
            FeatureSet: of m rows.
        """
        labels, ids = (None if values is None else values[rows] for values in (self.labels, self.ids))
        return FeatureSet(self.features[rows], labels, ids, self.size)

    def batches(self, size: int = 256) -> Iterator[Tensor]:
        r"""The features in order, part by part.

        Args:

            size (int, optional): At most so many rows in a part. Default: 256

        Yields:
            Tensor: (size, D, h, w).
        """
        yield from self.features.split(size)


Loader: TypeAlias = Iterable[Any] | FeatureSet


def check_features(features: Any) -> None:
    """Refuse features that no head could learn from, before any work is done."""
    if not isinstance(features, Tensor) or features.ndim != 4 or not features.is_floating_point():
        got = f"{features.dtype} {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"features: expected a floating-point tensor of shape (N, D, h, w), got {got}.")
    if not features.numel():
        raise ValueError(f"features: expected at least one example, got the shape {tuple(features.shape)}.")
    finite = features.isfinite()
    if not bool(finite.all()):
        raise ValueError(
            f"features: expected finite numbers, got NaN or infinity in {int((~finite).sum())} of {features.numel()} "
            "values; check the pictures' preprocessing and the backbone's precision."
        )


def check_labels(labels: Tensor | None, n_classes: int, count: int) -> Tensor:
    r"""Labels as training needs them.

    Raises:
        ValueError: if there are none, or they are not classes below ``n_classes`` or probabilities of that many.
    """
    if labels is None:
        raise ValueError("labels: expected one per example, got none; let the loader yield (images, labels).")
    soft = labels.is_floating_point()
    if labels.shape != ((count, n_classes) if soft else (count,)):
        raise ValueError(
            f"labels: expected classes, ({count},), or probabilities of n_classes={n_classes} classes, ({count}, "
            f"{n_classes}), got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if soft:
        return labels
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= n_classes:
        raise ValueError(
            f"n_classes: expected labels from 0 to {n_classes - 1}, got labels from {least} to {most}; pass the number "
            "of classes that the data set has."
        )
    return labels.long()


class FeatureReader:
    r"""Reads a layer of a backbone that is left as it was found: flags, gradients, hooks.

    Args:

        backbone (nn.Module): Called as ``backbone(images)``.
        layer (nn.Module, str or tuple): The layer: a module, a dotted name, or (layer, index of the call).
        layout (PatchLayout, optional): How the backbone cuts pictures into patches, and which tokens are none.
            Default: None (told from the backbone's modules; whatever comes before the patches is prefix)
        channels_last (bool, optional): Maps of four dimensions are (N, h, w, C). Default: False (told from their shape
            and the pictures')

    Raises:
        ValueError: if the layer is unknown.
        TypeError: if the backbone is not a module.
    """

    def __init__(
        self, backbone: nn.Module, layer: LayerLike, layout: PatchLayout | None = None, channels_last: bool = False
    ) -> None:
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone: expected a torch module, got {type(backbone).__name__}.")
        self.backbone, self.channels_last = backbone, channels_last
        self.layer = resolve_layer(layer, backbone)
        self._any_prefix = layout is None
        self.layout = derive_layout(backbone, self.layer.name) if layout is None else layout
        self.patch = None if self.layout is None else (self.layout.patch_size[0], self.layout.patch_size[1])

    def read(self, images: Tensor, *additional: Any) -> tuple[Tensor, Any]:
        r"""One pass of the backbone.

        Gradients reach the images if autograd is on and the images require them, and never the parameters.

        Args:

            images (Tensor): (N, channels, height, width).
            *additional: Further arguments of the backbone.

        Returns:
            tuple: features at the layer, (N, D, h, w), and what the backbone returned.

        Raises:
            ValueError: if the images or the features are not of the expected shape, or not finite.
            RuntimeError: if the layer is not reached, or more than once and no call was chosen.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images: expected a tensor of shape (N, channels, height, width), N >= 1, got {got}.")
        seen: list[Any] = []

        def watch(proceed: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
            output = proceed(module, *args, **kwargs)
            if module is self.layer.module:
                seen.append(output)
            return output

        with_grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with borrowing(self.backbone), intercept(watch), torch.set_grad_enabled(with_grad):
            output = self.backbone(images, *additional)
        hidden = self._hidden(seen)
        features = to_grid(hidden, images, self.layout, self._any_prefix, self.channels_last)
        check_features(features)
        return features, output

    def collect(self, loader: Iterable[Any], show_progress: bool = False) -> FeatureSet:
        r"""Features of everything a loader yields, computed once, on the CPU.

        Args:

            loader (iterable): Yields images, (images, labels) or (images, labels, ids), or mappings with
                ``pixel_values`` and ``labels``. Without ids, pictures of equal content share one.
            show_progress (bool, optional): Default: False

        Returns:
            FeatureSet: the features.

        Raises:
            ValueError: if the loader is empty, or yields what no backbone can read.
        """
        features, labels, ids = [], [], []
        size: tuple[int, int] | None = None
        first_seen: dict[bytes, int] = {}
        for batch in tqdm(loader, desc="Features", unit="batch", disable=not show_progress):
            images, batch_labels, batch_ids = unpack(batch)
            with torch.no_grad():
                features.append(self.read(self.place(images))[0].detach().cpu())
            if batch_ids is None:
                batch_ids = _content_ids(images, first_seen)
            ids.append(batch_ids.cpu())
            if batch_labels is not None:
                labels.append(batch_labels.cpu())
            size = (images.shape[-2], images.shape[-1])
        if not features:
            raise ValueError("loader: expected at least one batch, got none.")
        shapes = {tuple(part.shape[1:]) for part in features}
        if len(shapes) > 1:
            raise ValueError(f"loader: expected features of one shape, got {sorted(shapes)}; give pictures one size.")
        return FeatureSet(torch.cat(features), torch.cat(labels) if labels else None, torch.cat(ids), size)

    def place(self, images: Tensor) -> Tensor:
        r"""The images on the backbone's device.

        Args:

            images (Tensor): Pictures, (N, C, H, W).

        Returns:
            Tensor: the same pictures.
        """
        parameter = next(self.backbone.parameters(), None)
        return images if parameter is None else images.to(parameter.device)

    def _hidden(self, seen: list[Any]) -> Tensor:
        name, call = self.layer.name, self.layer.call
        if not seen:
            raise RuntimeError(f"layer: the backbone never called layer {name!r}; choose a module that it runs.")
        if call is None and len(seen) > 1:
            raise RuntimeError(
                f"layer: the backbone called layer {name!r} {len(seen)} times; say which call is meant, as "
                f"({name!r}, 0) for the first."
            )
        if call is not None and call >= len(seen):
            raise RuntimeError(f"layer: layer {name!r} was called {len(seen)} times, so it has no call {call}.")
        output = seen[call or 0]
        path = find_hidden(output)
        if path is None:
            raise RuntimeError(f"layer: the output of layer {name!r} holds no floating-point tensor; choose another.")
        return get_at(output, path)


def unpack(batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Images, labels and ids of what a loader yielded."""
    if isinstance(batch, Tensor):
        return batch, None, None
    if isinstance(batch, Mapping) and isinstance(batch.get("pixel_values"), Tensor):
        return batch["pixel_values"], batch.get("labels"), batch.get("ids")
    if isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 3 and all(isinstance(part, Tensor) for part in batch):
        images, labels, ids = (*batch, None, None)[:3]
        return images, labels, ids
    raise ValueError(
        "loader: expected batches of tensors: images, (images, labels), (images, labels, ids) or a mapping with "
        f"pixel_values and labels, got {type(batch).__name__}."
    )


def _content_ids(images: Tensor, first_seen: dict[bytes, int]) -> Tensor:
    """A number per content, in the order in which contents were first met."""
    ids = []
    for row in images.detach().cpu().contiguous():
        digest = hashlib.blake2b(row.flatten().view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
        ids.append(first_seen.setdefault(digest, len(first_seen)))
    return torch.tensor(ids)
