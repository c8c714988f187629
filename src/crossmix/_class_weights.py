"""Class weights held by a module: the odds of a mix, or the factors of a loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from crossmix._checks import check_class_weights


def buffer_of(
    weights: Tensor | Sequence[float] | None, num_classes: int | None, *, may_be_zero: bool = False
) -> Tensor | None:
    """Copy class weights to float32. Their values are checked only here, once, where a sync is acceptable."""
    if weights is None:
        return None
    try:
        values = torch.as_tensor(weights).detach().to(torch.float32, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        found = f"{type(weights).__name__} ({error})"
        raise TypeError(f"`class_weights` must be a sequence of numbers, got {found}; pass one per class.") from error
    check_class_weights(values if values.is_meta else values.cpu(), num_classes, may_be_zero=may_be_zero)
    return values


def shown(weights: Tensor | None) -> object:
    """Format class weights for `repr`."""
    if weights is None:
        return None
    return "on meta" if weights.is_meta else [round(weight, 4) for weight in weights.tolist()]
