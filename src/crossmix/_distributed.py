"""The few torch.distributed operations behind `sync=True` and `merge`; without a process group there is one rank."""

import torch.distributed as dist
from torch import Tensor, nn


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


class Counts(nn.Module):
    """Integer buffers that batches add to, and that can be summed over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self._merged: dict[str, Tensor] | None = None
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    def merge(self) -> None:
        """Sum the counts of all ranks for `compute`. Idempotent, and a no-op without a process group."""
        self._merged = {name: all_reduce_sum(buffer) for name, buffer in self.named_buffers()}

    def reset(self) -> None:
        """Reset all counts to 0."""
        for buffer in self.buffers():
            buffer.zero_()
        self._merged = None

    def _totals(self) -> dict[str, Tensor]:
        """The counts, after `merge` those of all ranks, as float64 on the CPU."""
        return {name: value.cpu().double() for name, value in (self._merged or dict(self.named_buffers())).items()}


def _forget(counts: Counts, _: object) -> None:
    """Discard what belongs to the counts that a loaded state has replaced."""
    for name in counts._non_persistent_buffers_set:
        counts.get_buffer(name).zero_()
    counts._merged = None
