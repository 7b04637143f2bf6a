"""InfoDisent's whole-picture map in Captum's interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from captum_m2ib import _captum
from captum_m2ib.disent._grid import spread
from captum_m2ib.disent.model import ConceptModel


class InfoDisentAttribution(_captum.Attribution):
    r"""The contributions to a class's logit, laid over the pixels of the picture.

    A map sums to the logit (less the class's bias): what every half of every channel contributed, at the place where
    it was found. Values are in units of the logit; negative ones speak against the class.

    Struski, Rymarczyk and Tabor, "InfoDisent: Explainability of Image Classification Models by Information
    Disentanglement", https://arxiv.org/abs/2409.10329

    Args:

        forward_func (InfoDisent or EPIC): The model, trained.

    Raises:
        TypeError: if it is another model.

    Examples::

        >>> from captum_m2ib.disent import InfoDisent
        >>> backbone = nn.Sequential(
        ...     nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
        >>> pictures, labels = torch.randn(12, 3, 16, 16), torch.arange(12) % 3

        >>> model = InfoDisent(backbone, "1", n_classes=3)
        >>> record = model.fit([(pictures, labels)], epochs=2)
        >>> attributions = InfoDisentAttribution(model).attribute(pictures, target=1)
        >>> bool(torch.allclose(attributions.sum((1, 2, 3)), model(pictures)[:, 1], atol=1e-4))
        True
    """

    def __init__(self, forward_func: ConceptModel[Any]) -> None:
        if not isinstance(forward_func, ConceptModel):
            raise TypeError(
                f"forward_func: expected an InfoDisent or EPIC model, got {type(forward_func).__name__}; train one on "
                "the classifier first."
            )
        _captum.Attribution.__init__(self, forward_func)

    @_captum.log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        exact: bool = True,
        contrast: bool = False,
        interpolation: str = "nearest",
    ) -> Tensor | tuple[Tensor, ...]:
        r"""Attribute a class's logit to pixels.

        Args:

            inputs (Tensor or tuple[Tensor, ...]): Pictures, (N, C, H, W), alone or as a tuple of one.
            target (int, Tensor or list, optional): The class, or one per example. Default: None (the predicted
                        class)
            additional_forward_args (Any, optional): Further positional arguments of the backbone. Default: None
            exact (bool, optional): Lay each contribution where the pooling took it, which for sparse pooling is one
                        cell per half. False spreads it in proportion to the half's map, which shows what the channel
                        saw around that cell; the sum is the same. Default: True
            contrast (bool, optional): Explain how far the logit is above the mean of all logits, which is all that a
                        softmax sees: what speaks for every class alike cancels. Default: False
            interpolation (str, optional): ``"nearest"`` fills each cell evenly, ``"bilinear"`` blurs across cells;
                        both keep the sums of positive and of negative contributions. Default: ``"nearest"``

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*):
                        Of the inputs' shape. A picture's channels share its pixels' values equally.

        Raises:
            ValueError: if inputs are not one batch of pictures, or a target is not a class of the model.
            RuntimeError: if the model was not trained.
        """
        is_tuple = _captum.is_tuple(inputs)
        tensors = _captum.format_tensor_into_tuples(inputs)
        if len(tensors) != 1:
            raise ValueError(
                f"inputs: expected one batch of pictures, got {len(tensors)} tensors; pass what else the backbone "
                "needs as additional_forward_args."
            )
        additional = _captum.format_additional_forward_args(additional_forward_args) or ()
        found = self.forward_func.contributions(tensors[0], target, *additional, contrast=contrast)
        channels, *size = tensors[0].shape[1:]
        cells = found.cells if exact else found.spread
        pixels = spread(cells, size, self.forward_func.reader.patch, interpolation)
        shared = (pixels / channels).unsqueeze(1).expand(-1, channels, -1, -1)
        return _captum.format_output(is_tuple, (shared.detach().to(tensors[0].device).contiguous(),))

    def attribute_future(self) -> None:
        """Not offered, as for most of Captum's methods."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")
