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
    if torch.compiler.is_compiling():  # without fullgraph=True the compiler catches this, and the draw is made eagerly
        raise TypeError(
            "`generator` must be None inside a compiled function, since torch.compile cannot trace a torch.Generator; "
            "make the draw outside with `sample` and hand it in, or `scores`."
        )
    target = generator.device if device is None else torch.device(device)
    # A GPU copies from pinned memory alone without the host; a copy to the CPU that nobody waits for has not arrived.
    pinned = generator.device.type == "cpu" and target.type == "cuda"
    numbers = torch.rand(shape, generator=generator, device=generator.device, pin_memory=pinned)
    return numbers.to(target, non_blocking=pinned)
