"""The processes of a distributed run."""

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist

__all__ = ["Ranks", "expected_ranks", "leave", "reason", "start_ranks"]

Result = TypeVar("Result")


class Ranks(NamedTuple):
    """This process among the processes of a run."""

    rank: int = 0
    world: int = 1
    control: dist.ProcessGroup | None = None  # communicates between hosts, not GPUs

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def once(self, work: Callable[[], Result]) -> Result:
        """Do some work in the first process only, and return its result in all; exit in the others if it failed."""
        if self.world == 1:
            return work()
        said: list[Any] = [None, False]  # the result, and whether the work failed
        if self.first:
            try:
                said[0] = work()
            except BaseException:
                with suppress(RuntimeError):  # the same signal may have ended the others
                    dist.broadcast_object_list([None, True], 0, group=self.control)
                raise
        dist.broadcast_object_list(said, 0, group=self.control)
        if said[1]:
            raise SystemExit(1)  # the first process gives the reason
        result: Result = said[0]
        return result


def expected_ranks() -> Ranks:
    """Tell which process of how many this is, without joining the others."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def start_ranks(device: str, stack: ExitStack) -> Ranks:
    """Join the process group if torchrun started this process, until the stack is closed."""
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


def leave(main: Callable[[], int]) -> NoReturn:
    """Run a script and end its process; under a launcher, without shutting the interpreter down.

    Threads of gloo outlive the process group. If one of them needs the interpreter while that is shutting down, the
    process is aborted, and the launcher reports a finished run as a failed one;
    https://github.com/pytorch/pytorch/pull/179291 is about a related case.
    """
    if "RANK" not in os.environ:
        sys.exit(main())
    try:
        status = main()
    except SystemExit as error:  # with a message or a status
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def reason(error: BaseException) -> str:
    """Return an error's message, without the traceback that a data-loading worker adds to it."""
    text = str(error).strip()
    return text.splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text
