"""The processes of a run: who does what only one may do."""

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

__all__ = ["Ranks", "reason", "start_ranks"]

Result = TypeVar("Result")


class Ranks(NamedTuple):
    """The processes of a run."""

    rank: int = 0
    world: int = 1
    control: dist.ProcessGroup | None = None  # for what is decided on the host

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def once(self, work: Callable[[], Result]) -> Result:
        """Have the first process do something, while the others wait for what it returns.

        Raises:
            SystemExit: On the others, if it failed.
        """
        if self.world == 1:
            return work()
        said: list[Any] = [None, False]  # what came of it, and whether nothing did
        if self.first:
            try:
                said[0] = work()
            except BaseException:
                with suppress(RuntimeError):  # the others may have ended already, by the same signal
                    dist.broadcast_object_list([None, True], 0, group=self.control)
                raise
        dist.broadcast_object_list(said, 0, group=self.control)
        if said[1]:
            raise SystemExit(1)  # the first process says why
        result: Result = said[0]
        return result


def start_ranks(device: str, stack: ExitStack) -> Ranks:
    """Join the other processes, where torchrun has started this one; they part when the stack is left."""
    if "RANK" not in os.environ:
        return Ranks()
    on_gpu = device.startswith("cuda")
    if on_gpu:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise SystemExit(f"error: torchrun has started more processes on this machine than its {gpus} GPUs.")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    stack.callback(dist.destroy_process_group)
    control = dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD
    return Ranks(dist.get_rank(), dist.get_world_size(), control)


def reason(error: BaseException) -> str:
    """What an error says; of one that a loader's worker raised, without the worker's traceback."""
    text = str(error).strip()
    return text.splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text
