"""A dual encoder as a classifier of pictures by captions, for tools that measure classifiers, Quantus among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from captum_m2ib.attr.registry import method_named
from captum_m2ib.encoders.dual_encoder import DualEncoder


class CaptionClassifier(nn.Module):
    r"""Pictures in, a score per caption out: captions are the classes.

    Args:

        encoder (DualEncoder): With a processor.
        captions (sequence of str): One per class, such as "a photo of a cat".

    Raises:
        ValueError: if a caption cannot be used, or one side of the model reads what the other returns.

    Examples::

        >>> classifier = CaptionClassifier(encoder, ["a white square", "a red cross"])
        >>> classifier(pairs.inputs[0]).shape
        torch.Size([2, 2])
    """

    def __init__(self, encoder: DualEncoder, captions: Sequence[str]) -> None:
        super().__init__()
        self.encoder = encoder
        blank = np.zeros((32, 32, 3), dtype=np.uint8)
        pairs = encoder.prepare(blank, list(captions))
        self.captions = pairs.captions
        self._texts = (pairs.inputs[1], *pairs.additional_forward_args)
        with torch.no_grad():
            self._embeddings = encoder.embed(1, *self._texts)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        r"""The score of each picture with each caption.

        Args:

            pixels (Tensor): As the encoder's processor prepares pictures, (N, C, H, W).

        Returns:
            Tensor: (N, captions).
        """
        return self.encoder.compare_embeddings(self.encoder.embed(0, pixels), self._embeddings)

    def of_classes(self, targets: ArrayLike) -> tuple[Any, ...]:
        r"""What the encoder reads of each target's caption, behind the pixels.

        Args:

            targets (array): Indices of captions, (N,).

        Returns:
            tuple: token ids and additional arguments, N rows each.
        """
        rows = torch.as_tensor(np.asarray(targets).reshape(-1), dtype=torch.long, device=self._texts[0].device)
        return tuple(one[rows] if isinstance(one, Tensor) else one for one in self._texts)


def explain_classes(
    model: CaptionClassifier, inputs: ArrayLike, targets: ArrayLike, *, method: str = "m2ib", **settings: Any
) -> NDArray[np.float32]:
    r"""Maps of pictures for their classes' captions, in the form that Quantus asks of its ``explain_func``.

    Args:

        model (CaptionClassifier): The classifier.
        inputs (array): Prepared pictures, (N, C, H, W).
        targets (array): The class of each, (N,).
        method (str, optional): A name of :data:`captum_m2ib.attr.registry.METHODS`. Default: "m2ib"
        **settings: Further arguments of the method's ``attribute``; ``device``, ``batch_size`` and the like, which
            Quantus hands on, are left out.

    Returns:
        numpy.ndarray: float32, (N, 1, H, W).

    Raises:
        ValueError: if there is no such method.

    Examples::

        >>> classifier = CaptionClassifier(encoder, ["a white square", "a red cross"])
        >>> explain_classes(classifier, pairs.inputs[0].numpy(), [0, 1], method="legrad").shape
        (2, 1, 64, 64)
    """
    kept = {name: value for name, value in settings.items() if name not in _OF_QUANTUS}
    reference = next(model.parameters())
    pixels = torch.as_tensor(np.asarray(inputs), device=reference.device).to(reference.dtype)
    found = method_named(method, model.encoder).attribute(
        pixels, additional_forward_args=model.of_classes(targets), **kept
    )
    maps: NDArray[np.float32] = found.detach().sum(1, keepdim=True).float().cpu().numpy()
    return maps


_OF_QUANTUS = ("device", "batch_size", "nr_channels", "img_size")
