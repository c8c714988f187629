"""Weighted cross-entropy from 1/8 logits, forward and backward: N = 2, 19 classes, 65 x 65 to 512 x 512.

- `plain`: bilinear upsampling, then the weighted cross-entropy of the full-size logits.
- `crossmix`: `upsampled_cross_entropy`, which works on blocks of rows.
- `compiled plain`: the first under `torch.compile`.

All compute the loss and the gradient of the small logits. The error of the gradient is measured against the plain form
in float64, relative to its largest entry. `peak_mb` is the peak memory of one call beyond what was in use before. On a
CPU it is measured in a fresh process after two calls: the high-water mark of the resident memory (Linux's VmHWM, reset
before the call) minus the resident memory before the call, with freed large blocks returned to the system. On a GPU it
is the allocator's maximum.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.speed.common import compare, held_bytes, in_fresh_process, peak_mb
from crossmix.functional import upsampled_cross_entropy, weighted_cross_entropy

N, CLASSES, SMALL, FULL = 2, 19, 65, 512
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    full = functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=True)
    return weighted_cross_entropy(full, labels, weights)


def candidates() -> dict[str, Loss]:
    return {"plain": plain, "crossmix": upsampled_cross_entropy, "compiled plain": torch.compile(plain)}


def inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with some confident pixels, labels with an ignored border, and weights."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(N, CLASSES, SMALL, SMALL, generator=generator)
    labels = torch.randint(0, CLASSES, (N, FULL, FULL), generator=generator)
    labels[:, :8] = 255
    weights = torch.rand(N, FULL, FULL, generator=generator)
    return logits.to(device).requires_grad_(), labels.to(device), weights.to(device)


def step(loss: Loss, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Run forward and backward; return the gradient of the logits."""
    (gradient,) = torch.autograd.grad(loss(*batch), batch[0])
    return gradient


def peak(name: str, device: str) -> dict[str, float]:
    """Peak memory of one call beyond its inputs, in this process."""
    torch.set_num_threads(1)
    loss, batch = candidates()[name], inputs(device)
    for _ in range(2):
        step(loss, batch)
    return peak_mb(lambda: step(loss, batch), device, since=held_bytes(device))


def measure(device: str, rounds: int, *, quick: bool) -> dict[str, dict[str, float]]:
    """Time, memory and error of each candidate; `quick` leaves out the compiled one."""
    losses, batch = candidates(), inputs(device)
    if quick:
        del losses["compiled plain"]
    exact = step(plain, (batch[0].detach().double().requires_grad_(), batch[1], batch[2].double()))
    title = f"{N} x {CLASSES} x {SMALL} x {SMALL} to {FULL} x {FULL}, {device}"
    steps = {name: partial(step, loss, batch) for name, loss in losses.items()}
    rows = compare(title, steps, "plain", rounds=rounds, device=device)
    for name, loss in losses.items():
        error = (step(loss, batch) - exact).abs().max() / exact.abs().max()
        rows[name] |= {**in_fresh_process("loss", f"peak({name!r}, {device!r})"), "gradient_error": error.item()}
        share = rows[name]["peak_mb"] / rows["plain"]["peak_mb"]
        print(f"  {name:14}  {rows[name]['peak_mb']:6.1f} MB  {share:5.3f} x plain  gradient error {error:.1e}")
    return rows
