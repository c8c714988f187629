"""The few torch.distributed operations behind `sync=True`; without a process group there is one rank."""

import torch.distributed as dist
from torch import Tensor

__all__ = ["all_reduce_sum", "rank", "world_size"]


def world_size() -> int:
    """The number of ranks; 1 if no process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The index of this rank; 0 if no process group is initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over ranks, as a new tensor without gradient."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total
