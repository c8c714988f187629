"""Class weights held by a module: the odds of a mix, or the factors of a loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from crossmix._checks import check_class_weights, check_values


def numbers_of(
    weights: Tensor | Sequence[float] | None, num_classes: int | None, *, may_be_zero: bool = False
) -> list[float] | None:
    """Class weights as numbers. Their values are checked only here, once, where a sync is acceptable."""
    if weights is None:
        return None
    if isinstance(weights, Tensor):
        check_values("class_weights", weights)
        weights = weights.detach().cpu()
    try:
        values = torch.as_tensor(weights, device="cpu").to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        found = f"{type(weights).__name__} ({error})"
        raise TypeError(f"`class_weights` must be a sequence of numbers, got {found}; pass one per class.") from error
    check_class_weights(values, num_classes, may_be_zero=may_be_zero)
    numbers: list[float] = values.tolist()
    return numbers


def buffer_of(numbers: list[float] | None, like: object) -> Tensor | None:
    """Make a float32 buffer of class weights, on the device of `like` if that is a tensor, else on the default one."""
    device = like.device if isinstance(like, Tensor) else None
    return None if numbers is None else torch.tensor(numbers, dtype=torch.float32, device=device)


def refill(buffer: Tensor | None, numbers: list[float] | None) -> None:
    """Restore a buffer that `to_empty` left without values."""
    if buffer is not None and numbers is not None:
        buffer.copy_(torch.tensor(numbers, dtype=torch.float32, device="cpu"))


def shown(weights: Tensor | None) -> object:
    """Format class weights for `repr`."""
    if weights is None:
        return None
    return "on meta" if weights.is_meta else [round(weight, 4) for weight in weights.tolist()]
