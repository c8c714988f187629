"""The logits in a network's output, also of networks that predict masks with classes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from crossmix._checks import kind_of
from crossmix._tensors import at_least_float32, no_autocast

__all__ = ["semantic_logits"]

LEAST = 1e-6  # of a score, so that its logarithm is finite


def semantic_logits(output: object) -> Tensor:
    """Return the logits of a network's output, for the `logits=` of `SelfTraining` and `evaluate`.

    It takes the `logits` or `out` of an output object or dict, as of transformers and torchvision. MaskFormer,
    Mask2Former, OneFormer and EoMT predict a set of masks, each with a class, instead. Their score of class c,

    s_c = sum over queries of softmax(classes)_c * sigmoid(mask),

    is neither a logit nor a probability: the softmax of 19 scores between 0 and 1 is at most 0.13, so no pixel would
    ever count as confident. This function returns log s, whose softmax is s divided by its sum over the classes.

    Args:
        output: A tensor, which is returned as it is; an object with `logits`, or with `class_queries_logits` (N, Q,
            C + 1) and `masks_queries_logits` (N, Q, h, w); or a dict with such keys, or with `"out"`.

    Returns:
        (N, C, h, w) logits, in float32 or float64 for mask predictions.

    Raises:
        TypeError: If the output holds none of these.

    Example:
        >>> from types import SimpleNamespace
        >>> sure = SimpleNamespace(
        ...     class_queries_logits=torch.tensor([[[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]]),
        ...     masks_queries_logits=torch.tensor([9.0, -9.0])[None, :, None, None],
        ... )
        >>> semantic_logits(sure).softmax(1).flatten().round(decimals=3)
        tensor([1., 0.])
    """
    if isinstance(output, Tensor):
        return output
    classes, masks = _found(output, "class_queries_logits"), _found(output, "masks_queries_logits")
    if classes is not None and masks is not None:
        with no_autocast(masks.device):
            share = at_least_float32(classes).softmax(-1)[..., :-1]  # the last class stands for no object
            scores = torch.einsum("nqc,nqhw->nchw", share, at_least_float32(masks).sigmoid())
            return scores.clamp(min=LEAST).log()
    for name in ("logits", "out"):
        logits = _found(output, name)
        if logits is not None:
            return logits
    raise TypeError(
        f"`output` must hold `logits`, `out`, or `class_queries_logits` and `masks_queries_logits`, got "
        f"{kind_of(output)}; pass a function of your own as `logits=`."
    )


def _found(output: object, name: str) -> Tensor | None:
    """The tensor of this name in an object or a dict; None if there is none."""
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, Tensor) else None
