"""Average pairs of tensors in place, and say which dtypes can hold an average."""

from typing import TypeAlias

import torch
from torch import Tensor

Pairs: TypeAlias = list[tuple[Tensor, Tensor]]


def average_(pairs: Pairs, decay: float) -> None:
    """Update averages in place from (average, current) pairs; integers are copied."""
    copied = pairs if decay == 0 else [pair for pair in pairs if not can_average(pair[0])]
    lerped = [] if decay in {0, 1} else [pair for pair in pairs if can_average(pair[0])]
    kinds: dict[tuple[torch.dtype, torch.dtype], Pairs] = {}  # one launch copies many tensors of equal dtypes
    for old, new in copied:
        kinds.setdefault((old.dtype, new.dtype), []).append((old, new))
    for alike in kinds.values():
        torch._foreach_copy_([old for old, _ in alike], [new for _, new in alike])
    if not lerped:
        return
    averages = [old for old, _ in lerped]
    low = any(map(is_low, {old.dtype for old in averages}))
    wide = [widened(old) for old in averages] if low else averages
    torch._foreach_lerp_(wide, [new.to(old) for old, (_, new) in zip(wide, lerped, strict=True)], 1.0 - decay)
    if low:
        torch._foreach_copy_(averages, wide)  # copies a tensor that was wide already onto itself


def can_average(value: Tensor) -> bool:
    """Whether a tensor is averaged; integers and booleans are copied."""
    return value.is_floating_point() or value.is_complex()


def is_low(dtype: torch.dtype) -> bool:
    """Whether a dtype is too coarse to hold an average."""
    return (dtype.is_floating_point and dtype.itemsize < 4) or dtype == torch.complex32


def widened(value: Tensor) -> Tensor:
    """Cast a tensor to a dtype that can hold an average; return it as is if its own can."""
    if not is_low(value.dtype):
        return value
    return value.to(torch.complex64 if value.is_complex() else torch.float32)
