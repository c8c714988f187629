"""EMA update of the teacher: 43.9 million parameters of ResNet-101.

- `MeanTeacher.update`: as a user calls it, with matching of names and shapes and copying of buffers.
- `ema_update_`: the function it uses, on the parameters only.
- `loop mul_/add_`: `average.mul_(decay).add_(current, alpha=1 - decay)`, parameter by parameter.
- `loop data[:] =`: our reimplementation of the released DACS code: a new tensor per parameter, copied in.
- `AveragedModel`: torch's implementation, with `get_ema_multi_avg_fn`, on the parameters only.

On a GPU, the kernels and copies launched by one update are counted as well.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.profiler import ProfilerActivity

from benchmarks.speed.common import compare, is_cuda
from crossmix import MeanTeacher
from crossmix.functional import ema_update_
from crossmix.models import deeplab_v2_resnet101

DECAY = 0.99


@torch.no_grad()
def mul_add(averaged: Sequence[Tensor], current: Sequence[Tensor]) -> None:
    for old, new in zip(averaged, current, strict=True):
        old.mul_(DECAY).add_(new, alpha=1 - DECAY)


@torch.no_grad()
def released(averaged: Sequence[Tensor], current: Sequence[Tensor], decay: float = DECAY) -> None:
    for old, new in zip(averaged, current, strict=True):
        old.data[:] = decay * old.data[:] + (1 - decay) * new.data[:]


def launches(run: Callable[[], object]) -> int:
    """Count the kernels and copies that one call launches on the GPU."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    sent = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync")
    return sum(event.count for event in profile.key_averages() if event.key.startswith(sent))


def measure(device: str, rounds: int, *, quick: bool) -> dict[str, dict[str, float]]:  # noqa: ARG001 - quick enough
    torch.manual_seed(0)
    student = deeplab_v2_resnet101(19).to(device)
    teacher = MeanTeacher(student, decay=DECAY, warmup=False)
    torchs = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(DECAY))  # type: ignore[no-untyped-call]
    averaged, current = list(teacher.module.parameters()), list(student.parameters())
    torchs.update_parameters(student)  # the first call copies
    candidates: dict[str, Callable[[], object]] = {
        "MeanTeacher.update": lambda: teacher.update(student),
        "ema_update_": lambda: ema_update_(averaged, current, DECAY),
        "loop mul_/add_": lambda: mul_add(averaged, current),
        "loop data[:] =": lambda: released(averaged, current),
        "AveragedModel": lambda: torchs.update_parameters(student),
    }
    title = f"one update, {sum(parameter.numel() for parameter in current) / 1e6:.1f} million parameters, {device}"
    rows = compare(title, candidates, "loop mul_/add_", rounds=rounds, device=device)
    if is_cuda(device):
        for name, run in candidates.items():
            if count := launches(run):  # 0 if profiling is not permitted
                rows[name]["launches"] = count
                print(f"  {name}: {count} launches")
    return rows
