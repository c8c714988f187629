"""What the modules built with `sync=True` need of torch.distributed; without a process group each is the identity."""

import torch.distributed as dist
from torch import Tensor

__all__ = ["all_reduce_sum", "rank", "world_size"]


def world_size() -> int:
    """The number of ranks, 1 where no process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this rank, 0 where no process group is initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over ranks as a new tensor without gradient."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total
