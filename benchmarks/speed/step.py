"""A whole training step of DACS in the released recipe, from the batch on the device to the updated teacher.

Each form adds one change to the previous one; all use the same batch and the same draws. The confidence threshold is
such that half of the small network's pixels reach it with random weights, so that pseudo-labels count.

- `released style`: our reimplementation of the released step: the loop of `mixing.py`, kornia's functional jitter and
  51-tap blur image by image, full-size logits, lambda on the host, every listed parameter updated separately, the
  teacher's average as `data[:] =`, and no guard.
- `plain`: `SelfTraining` on networks that return full-size logits, with a guard and parameters updated one by one.
- `small logits`: the networks return 1/8 logits, and the loss upsamples them.
- `channels last`: networks and images in that layout.
- `RepeatedSGD`: fused updates; this is what the trainer does in fp32 with `--channels-last`.
- `mic`: as the previous one, in the recipe `mic`: a third pass of the student on partly hidden target images, and other
  options, so its loss differs. `bf16, mic`: as `bf16`, GPU only.
- `updated once`: as `RepeatedSGD`, but `torch.optim.SGD(fused=True)` once per parameter, so it does less.
- `tf32`: as `RepeatedSGD`, GPU only. `bf16`: under autocast.
- `networks compiled`, `step compiled`: student and teacher compiled as by `--compile`, or the whole `SelfTraining` in
  one graph with a given draw; in bf16 on a GPU, in fp32 on a CPU.
- `graph`, `graph, networks compiled`: everything up to the gradients as one CUDA graph; guard, optimizer and average,
  whose decay and learning rate change, stay outside.

`loss` is the loss of the first step, equal up to rounding in all forms of one recipe. `peak_mb` is the total memory of
a form's second step in a fresh process, including weights and optimizer: on a CPU the high-water mark of the resident
memory minus the resident memory before the networks were built (including the compiler, if used), on a GPU the
allocator's maximum; `reserved_mb` is the memory reserved from the driver. `parts` are the consecutive parts of a step.
`tflop` is the arithmetic of the convolutions by torch's counter: two forward and backward passes (`mic`: three) and the
teacher's forward pass. `matmul_tflop_per_s` is the rate of a large matrix product, an upper bound for a step.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.common import compare, held_bytes, in_fresh_process, interleave, is_cuda, peak_mb
from benchmarks.speed.mixing import CLASSES
from benchmarks.speed.step_forms import (
    NETWORKS,
    Draw,
    Form,
    Size,
    Step,
    Training,
    build,
    forms,
    move,
    precision,
    stepper,
)
from crossmix import functional as F
from crossmix.models import DeepLabV2


def first_loss(work: Training, step: Step, size: Size) -> float:
    """The loss of the first step, on the draw of seed 0."""
    generator = torch.Generator().manual_seed(0)
    return float(step(work.training.sample(size.batch, size.crop, generator=generator, device=size.device)))


def parts_of(form: Form, size: Size, rounds: int) -> dict[str, float]:
    """Median milliseconds of each part of a step that is not captured or compiled as a whole."""
    work = build(form, size)
    seen: dict[str, list[float]] = {}
    for i in range(3 + rounds):
        for name, elapsed in marked_step(work, work.sample(), size)[1].items():
            if i >= 3:
                seen.setdefault(name, []).append(elapsed)
    return {name: statistics.median(values) for name, values in seen.items()}


def marked_step(work: Training, draw: Draw, size: Size) -> tuple[Tensor, dict[str, float]]:
    """Run one step part by part, using public names; return the loss and the time of each part."""
    training, (source_images, source_labels, target_images) = work.training, work.batch
    student, teacher, mix, augment = training.student, training.teacher, training.mix, training.augment
    clock = Clock(size.device)
    work.optimizer.zero_grad(set_to_none=True)
    with precision(work.form, size.device):
        source_loss = loss_of(training.source_criterion, student(source_images), source_labels)
        clock.mark("source forward and loss")
        if teacher is None or mix is None or augment is None or draw.scores is None:
            raise TypeError("the marked step has a teacher, a mix and an augmentation")
        logits = full_size(teacher(target_images), target_images)
        pseudo_labels, confidence = F.pseudo_label(logits)
        weights = training.criterion.weights(confidence)
        clock.mark("teacher and pseudo-labels")
        mixed = mix(source_images, source_labels, target_images, pseudo_labels, weights, scores=draw.scores)
        clock.mark("mix")
        images = augment(mixed.images, draw=draw.augment)
        clock.mark("augment")
        mixed_loss = loss_of(training.criterion, student(images), mixed.labels, mixed.weights)
        loss = source_loss + mixed_loss
        clock.mark("mixed forward and loss")
    loss.backward()  # type: ignore[no-untyped-call]
    clock.mark("backward")
    work.guard.check(loss, work.steps)
    clock.mark("guard: check")
    move(work)
    clock.mark("optimizer")
    training.update()
    clock.mark("EMA")
    work.guard.restore()
    clock.mark("guard: restore")
    work.steps += 1
    return loss.detach(), clock.parts()


def loss_of(criterion: Any, logits: Tensor, labels: Tensor, *weights: Tensor) -> Tensor:  # noqa: ANN401 - either loss
    form = criterion if logits.shape[-2:] == labels.shape[-2:] else criterion.upsampled
    loss: Tensor = form(logits, labels, *weights)
    return loss


def full_size(logits: Tensor, images: Tensor) -> Tensor:
    return functional.interpolate(logits.float(), size=images.shape[-2:], mode="bilinear", align_corners=True)


class Clock:
    """Measures time between marks: CPU time of this thread, or GPU time between events."""

    def __init__(self, device: str) -> None:
        self.cuda = is_cuda(device)
        self.names: list[str] = []
        self.moments = [self.now()]

    def now(self) -> Any:  # noqa: ANN401 - an event or seconds
        if not self.cuda:
            return time.thread_time()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def mark(self, name: str) -> None:
        self.names.append(name)
        self.moments.append(self.now())

    def parts(self) -> dict[str, float]:
        pairs = zip(self.moments, self.moments[1:], strict=False)
        if self.cuda:
            torch.cuda.synchronize()
            spent = [begin.elapsed_time(end) for begin, end in pairs]
        else:
            spent = [1e3 * (end - begin) for begin, end in pairs]
        return dict(zip(self.names, spent, strict=True))


def tflop(size: Size, passes: int = 2) -> float:
    """The arithmetic of one step in 10^12 floating-point operations, counted on the meta device."""
    with torch.device("meta"):
        network: DeepLabV2 = NETWORKS[size.network](CLASSES, aspp_branches=2, upsample=False)
        images = torch.empty(size.batch, 3, *size.crop)
    with FlopCounterMode(display=False) as counted:
        with torch.no_grad():
            network(images)
        for _ in range(passes):
            network(images).sum().backward()
    return float(counted.get_total_flops()) / 1e12


def matmul_rates(device: str, rounds: int) -> dict[str, float]:
    cuda = is_cuda(device)
    side = 8192 if cuda else 1024
    rates = {}
    for kind in ("fp32", "tf32", "bf16") if cuda else ("fp32", "bf16"):
        factor = torch.rand(side, side, device=device, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        row = interleave({kind: lambda factor=factor: factor @ factor}, rounds=rounds, device=device)[kind]  # type: ignore[misc]
        rates[kind] = 2 * side**3 / row["median_ms"] / 1e9
    return rates


def peak(name: str, size: Size) -> dict[str, float]:
    """Peak memory of a form's second step, including networks and optimizer, in this (fresh) process."""
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)], 0.1)  # the first optimizer imports torch's compiler
    before = held_bytes(size.device)
    work, step = stepper(forms(size.device)[name], size)
    step(work.sample())
    return peak_mb(lambda: step(work.sample()), size.device, since=before)


def fresh_peaks(names: Sequence[str], size: Size) -> dict[str, dict[str, float]]:
    """Peak memory of several forms, each in its own process."""
    return {name: in_fresh_process("step", f"peak({name!r}, step.Size(**{asdict(size)!r}))") for name in names}


def measure(device: str, rounds: int, *, quick: bool) -> dict[str, object]:
    """All forms, the parts of some, and memory; without slow compilation with `quick` and on a GPU."""
    known = forms(device)
    cuda = is_cuda(device)
    names = [name for name, form in known.items() if not (form.compiled and (quick or cuda))]
    size = default_size(device)
    memory = names
    if quick:
        memory = [name for name in ("released style", "RepeatedSGD") if name in names]
    return measured(size, rounds, names, [] if cuda else memory)  # on a GPU it is `measure_memory` of the same step


def measure_compiled(device: str, rounds: int, *, quick: bool) -> dict[str, object]:  # noqa: ARG001 - all are slow
    """The compiled forms and the form that they are based on."""
    known = forms(device)
    base = "bf16" if is_cuda(device) else "RepeatedSGD"
    return measured(default_size(device), rounds, [base, *(name for name in known if known[name].compiled)], ())


def measure_memory(device: str, rounds: int, *, quick: bool) -> dict[str, object]:  # noqa: ARG001 - no time is taken
    """The memory of the paper's step, on any device."""
    size = Size(network="resnet101", crop=(512, 512), batch=2, device=device)
    rows = fresh_peaks(["released style", "RepeatedSGD"] if quick else ["released style", "plain", "RepeatedSGD"], size)
    for name, row in rows.items():
        print(f"  {name:24}  {', '.join(f'{key} {value:.0f}' for key, value in row.items())}")
    return {**asdict(size), "rows": rows}


KINDS = {  # of kernels, by what their names hold
    "batch norm": ("batch_norm",),
    "convolutions": ("xmma", "nvjet", "cutlass", "gemm", "cudnn", "conv"),
    "guard, optimizer, EMA": ("multi_tensor",),
    "copies and fills of memory": ("Memcpy", "Memset"),
    "elementwise": ("elementwise",),
}


def measure_kernels(device: str, rounds: int, *, quick: bool) -> dict[str, object]:  # noqa: ARG001 - it is quick
    """Profile a captured step: milliseconds and launches of each kind of kernel."""
    size = default_size(device)
    work, step = stepper(forms(device)["graph"], size)
    for _ in range(3):
        step(work.sample())
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(rounds):
            step(work.sample())
        torch.cuda.synchronize()
    events = [event for event in profiled.events() if event.device_type.name == "CUDA"]
    kinds = by_kind([(event.name, event.device_time / 1e3) for event in events], rounds)
    for kind, row in sorted(kinds.items(), key=lambda item: -item[1]["ms"]):
        print(f"  {kind:26}  {row['ms']:9.3f} ms  {row['launches']:7.0f} launches")
    return {**asdict(size), "form": "graph", "tflop": tflop(size), "kernels": kinds}


def by_kind(kernels: Sequence[tuple[str, float]], steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds and launches per step."""
    found = {kind: {"ms": 0.0, "launches": 0.0} for kind in (*KINDS, "other")}
    for name, spent in kernels:
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")
        found[kind]["ms"] += spent / steps
        found[kind]["launches"] += 1 / steps
    return found


def measured(size: Size, rounds: int, names: Sequence[str], memory: Sequence[str]) -> dict[str, object]:
    """Time the named forms side by side, with the first as baseline; measure parts and memory of some."""
    device, known = size.device, forms(size.device)
    print(f"{tflop(size):.4g} TFLOP a step")
    made = {name: stepper(known[name], size) for name in names}
    first = {name: first_loss(*made[name], size) for name in names}
    height, width = size.crop
    title = f"one step of {size.network}, {size.batch} + {size.batch} crops of {height} x {width}, {device}"
    steps = {name: lambda work=work, step=step: step(work.sample()) for name, (work, step) in made.items()}
    rows = compare(title, steps, names[0], rounds=rounds, device=device)
    made.clear()
    steps.clear()
    if is_cuda(device):
        torch.cuda.empty_cache()  # leave memory to the processes that measure it
    peaks = fresh_peaks(memory, size)
    for name, row in rows.items():
        rate, work = 1e3 / row["median_ms"], tflop(size, known[name].passes)
        row.update(loss=first[name], it_per_s=rate, tflop_per_s=rate * work, **peaks.get(name, {}))
        used = f"  {row['peak_mb']:8.1f} MB" if "peak_mb" in row else ""
        print(f"  {name:24}  {rate:7.2f} it/s  {rate * work:7.2f} TFLOP/s  loss {row['loss']:.6f}{used}")
    parts = {name: parts_of(known[name], size, rounds) for name in ("RepeatedSGD", "bf16") if name in names}
    for name, times in parts.items():
        show_parts(name, times)
    rates = matmul_rates(device, rounds)
    print(f"\nmatrix products reach {', '.join(f'{rate:.3g} TFLOP/s in {kind}' for kind, rate in rates.items())}")
    return {**asdict(size), "tflop": tflop(size), "matmul_tflop_per_s": rates, "rows": rows, "parts": parts}


def show_parts(name: str, times: dict[str, float]) -> None:
    whole = math.fsum(times.values())
    print(f"\nthe parts of `{name}`, {whole:.2f} ms")
    for part, value in times.items():
        print(f"  {part:26}  {value:9.3f} ms  {100 * value / whole:5.1f} %")


def default_size(device: str) -> Size:
    """The paper's size on a GPU, the demo's on a CPU."""
    if is_cuda(device):
        return Size(network="resnet101", crop=(512, 512), batch=2, device=device)
    return Size(device=device)
