"""Where random numbers are drawn, and how they come to where they are used without anybody waiting."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["uniform"]


def uniform(
    shape: Sequence[int], *, generator: torch.Generator | None, device: torch.device | str | None = None
) -> Tensor:
    """Uniform numbers in [0, 1) on `device`, or where they were drawn; a generator draws on its own device."""
    if generator is None:
        return torch.rand(shape, device=device)
    target = generator.device if device is None else torch.device(device)
    # A GPU copies from pinned memory alone without the host; a copy to the CPU that nobody waits for has not arrived.
    pinned = generator.device.type == "cpu" and target.type == "cuda"
    numbers = torch.rand(shape, generator=generator, device=generator.device, pin_memory=pinned)
    return numbers.to(target, non_blocking=pinned)
