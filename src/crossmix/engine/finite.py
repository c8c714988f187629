"""A step that went wrong leaves no trace: decided on the device, told to the host when it is known there."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["FiniteGuard", "NonFiniteError"]


class NonFiniteError(RuntimeError):
    """A loss or a gradient was not finite.

    Attributes:
        step: The step, as it was given to `FiniteGuard.check`.
    """

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class FiniteGuard:
    """Undo an optimizer step whose loss or gradients are not finite.

    `check` after the backward pass, `restore` after the optimizer and the averages have moved. Everything is then as it
    was before the step, or as the step left it, as the device finds out; the host does not wait. It learns of a bad
    step when the flag has arrived, on a GPU a few steps later: `check` then raises.

    It keeps a copy of all that moves and, in passing, a second one: for ResNet-101 with a teacher 1 GB.

    Args:
        modules: Modules whose parameters and buffers move: student, teacher, averages.
        optimizer: Its state moves too.
        skip: How many bad steps are passed over before one is an error.

    Attributes:
        skipped: How many bad steps there were, as far as the host knows.

    Raises:
        ValueError: If `skip` is negative.

    Example:
        >>> student = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(student.parameters(), 0.1)
        >>> guard = FiniteGuard([student], optimizer, skip=1)
        >>> before = student.weight.detach().clone()
        >>> loss = student(torch.tensor([[torch.nan, 1.0]])).sum()
        >>> loss.backward()
        >>> guard.check(loss, 7)
        >>> optimizer.step()
        >>> guard.restore()
        >>> torch.equal(student.weight, before), guard.skipped
        (True, 1)
    """

    def __init__(self, modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer, *, skip: int = 0) -> None:
        if skip < 0:
            raise ValueError(f"`skip` must not be negative, got {skip}; 0 makes every bad step an error.")
        self.modules = list(modules)
        self.optimizer = optimizer
        self.skip = skip
        self.skipped = 0
        self._good: Tensor | None = None
        self._report = _Report()
        self._kept: dict[Tensor, Tensor] = {}
        self._now: dict[Tensor, Tensor] = {}
        self._flat: list[tuple[Tensor, Tensor]] = []
        self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        """Take everything as it is now for good: after loading a checkpoint, say."""
        self._allocate(self._moving())
        for tensor, copy in self._kept.items():
            copy.copy_(tensor)

    @torch.no_grad()
    def check(self, loss: Tensor, step: int, *, gradients: bool = True) -> None:
        """Look at the loss and at all gradients, of all ranks, on the device.

        Args:
            loss: Scalar.
            step: What errors call this step.
            gradients: Whether to look at gradients; not with a GradScaler, to whom infinite ones are normal.

        Raises:
            NonFiniteError: If there was one bad step too many: this one on a CPU, on a GPU one of the last few.
                Everything is then as it was before this step.
        """
        good = loss.detach().isfinite().all()
        found = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if found and gradients:
            good = good & torch.stack(torch._foreach_norm(found)).isfinite().all()
        if dist.is_available() and dist.is_initialized():
            every = good.int()
            dist.all_reduce(every, dist.ReduceOp.MIN)
            good = every.bool()
        self._good = good
        bad = self._report.tell(good, step)
        if bad is None:
            return
        self.skipped, latest = bad
        if self.skipped > self.skip:
            self._good = torch.zeros_like(good)
            self.restore()
            raise NonFiniteError(
                latest,
                f"step {latest}: the loss or a gradient is not finite, {self.skipped} such steps so far and "
                f"{self.skip} allowed; weights, teacher and averages are as they were before it.",
            )

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what has moved since the last `restore` or `keep`, if the last `check` was bad.

        Raises:
            RuntimeError: If there was no `check`.
        """
        if self._good is None:
            raise RuntimeError("`restore` needs a `check` before it; check the loss after the backward pass.")
        moving = self._moving()
        if self._kept.keys() != set(moving):  # the optimizer has new state: it starts from zero
            old = self._kept
            self._allocate(moving)
            for tensor, copy in self._kept.items():
                copy.copy_(old[tensor]) if tensor in old else copy.zero_()
        torch._foreach_copy_([self._now[tensor] for tensor in moving], moving)
        for kept, now in self._flat:
            torch.where(self._good, now, kept, out=kept)
        torch._foreach_copy_(moving, [self._kept[tensor] for tensor in moving])
        self._good = None

    def _moving(self) -> list[Tensor]:
        """Each tensor once."""
        tensors: dict[Tensor, None] = {}
        for module in self.modules:
            tensors.update(dict.fromkeys(module.parameters()))
            tensors.update(dict.fromkeys(module.buffers()))
        for state in self.optimizer.state.values():
            tensors.update(dict.fromkeys(value for value in state.values() if isinstance(value, Tensor)))
        return list(tensors)

    def _allocate(self, moving: list[Tensor]) -> None:
        """Two copies of everything, as views into one long tensor each, so that choosing is one operation."""
        self._kept, self._now, self._flat = {}, {}, []
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in moving:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for (dtype, device), tensors in kinds.items():
            flat = torch.zeros(2, sum(tensor.numel() for tensor in tensors), dtype=dtype, device=device)
            self._flat.append((flat[0], flat[1]))
            offset = 0
            for tensor in tensors:
                for row, copies in zip(flat, (self._kept, self._now), strict=True):
                    copies[tensor] = _like(row[offset : offset + tensor.numel()], tensor)
                offset += tensor.numel()


def _like(memory: Tensor, tensor: Tensor) -> Tensor:
    """Memory seen in the shape of a tensor, and in its layout where that has no gaps."""
    if tensor.is_contiguous(memory_format=torch.channels_last) and tensor.ndim == 4:
        return memory.as_strided(tensor.shape, tensor.stride(), memory.storage_offset())
    return memory.view(tensor.shape)


class _Report:
    """Carries the count of bad steps, and the latest of them, from the device to the host without waiting."""

    def __init__(self) -> None:
        self._on_device: Tensor | None = None
        self._flying: tuple[Tensor, Any] | None = None
        self._told = 0

    def tell(self, good: Tensor, step: int) -> tuple[int, int] | None:
        """Note a step; return the count and the latest bad step when the host hears of a new one."""
        if self._on_device is None:
            self._on_device = torch.zeros(2, dtype=torch.int64, device=good.device)
        count, latest = self._on_device
        self._on_device = torch.stack([count + torch.logical_not(good), torch.where(good, latest, step)])
        heard = self._on_device if good.device.type != "cuda" else self._landed(self._on_device)
        if heard is None or int(heard[0]) == self._told:
            return None
        self._told = int(heard[0])
        return self._told, int(heard[1])

    def _landed(self, now: Tensor) -> Tensor | None:
        """The copy that was on its way, if it is here; then the next one is sent."""
        heard = None
        if self._flying is not None:
            copy, event = self._flying
            if not event.query():
                return None
            heard = copy
        copy = torch.empty(2, dtype=torch.int64, pin_memory=True).copy_(now, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._flying = (copy, event)
        return heard
