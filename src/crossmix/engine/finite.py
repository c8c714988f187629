"""Roll back steps with non-finite losses or gradients, without a host sync."""

import copy
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossmix._checks import check_int

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
    """Undo optimizer steps whose loss or gradients are not finite, without a host sync.

    Call `check` after the backward pass and `restore` after the optimizer and the averages have moved. The device then
    keeps the new weights, buffers and optimizer state if the step was good, and the old ones if it was bad. The host
    learns of a bad step when the flag has arrived, on a GPU a few steps later; `check` raises then.

    State on the host can only be put back once the host knows: the teacher's update count, Adam's `step` unless it was
    built with `fused=True` or `capturable=True`, and state that a first step creates. The next `check` does this, and
    waits for the flag of the previous step, since which a forward and a backward pass have been queued. Reading an
    optimizer's state_dict also triggers it; call `settle` before reading a module's.

    Memory: a copy of everything that moves, on a GPU two: 1 GB for ResNet-101 with a teacher.

    Args:
        modules: Modules whose parameters and buffers move: student, teacher, averages. Their `get_extra_state` is put
            back too.
        optimizer: One optimizer or several; their parameters and state are put back too.
        skip: How many bad steps to undo before one is an error.

    Attributes:
        skipped: Bad steps so far, as far as the host knows.

    Raises:
        TypeError: If `optimizer` is neither an optimizer nor several, `skip` is not an int, or a parameter or buffer is
            sharded (`fully_shard`).
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

    def __init__(
        self,
        modules: Iterable[nn.Module],
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        skip: int = 0,
    ) -> None:
        check_int("skip", skip, least=0, hint="; 0 makes every bad step an error")
        self.modules: list[nn.Module] = list(modules)
        _refuse_shards(self.modules)
        several = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        self.optimizers: list[torch.optim.Optimizer] = several
        self.skip = skip
        self.skipped: int = 0
        self._good: Tensor | None = None
        self._heard_good = True
        self._before: _HostState | None = None
        self._unsettled: tuple[_Flag, _HostState] | None = None
        self._report = _Report()
        self._kept: dict[Tensor, Tensor] = {}
        self._views: dict[Tensor, Tensor] = {}
        self._groups: list[_Group] = []
        self._inside: list[nn.Module] = []
        self._seen: list[int] = []
        self._extras: list[nn.Module] = []
        itself = weakref.WeakMethod(self.settle)
        for one in self.optimizers:
            if not isinstance(one, torch.optim.Optimizer):
                raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, or several, got {type(one).__name__}.")
            one.register_state_dict_pre_hook(lambda _: (settle := itself()) and settle())
        self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        """Accept the present state as good: after loading a checkpoint, or adding, replacing or converting modules.

        Without this call, the next `check` accepts what is new as it finds it, after the forward pass, which moves
        BatchNorm's statistics.
        """
        self._good = self._before = self._unsettled = None
        self._kept, self._views = {}, {}
        self._keep_new()

    @torch.no_grad()
    def check(self, loss: Tensor, step: int, *, gradients: bool = True) -> None:
        """Check the loss and all gradients, of all ranks, on the device.

        Args:
            loss: Scalar.
            step: The step's number in error messages.
            gradients: Whether to check gradients. Pass False with a GradScaler, which expects infinite ones.

        Raises:
            NonFiniteError: If there were more than `skip` bad steps. The last one is this step on a CPU, and one of the
                last few on a GPU. Everything is then as it was before this step.
        """
        self.settle()
        self._keep_new()
        good = loss.detach().isfinite().all()
        if gradients:
            good = good & self._gradients_are_finite(good.device)
        if dist.is_available() and dist.is_initialized():
            every = good.int()
            dist.all_reduce(every, dist.ReduceOp.MIN)
            good = every.bool()
        self._good = good
        self._before = _HostState(self.optimizers, self._extras, self._kept)
        bad = self._report.tell(good, step)
        self._heard_good = bad is None
        if bad is None:
            return
        self.skipped, latest = bad
        if self.skipped > self.skip:
            self._good = torch.zeros_like(good)
            self.restore()
            self.settle()
            count = f"{self.skipped} such steps so far and {self.skip} allowed"
            kept = "weights, teacher and averages are as they were before it"
            raise NonFiniteError(latest, f"step {latest}: the loss or a gradient is not finite, {count}; {kept}.")

    @torch.no_grad()
    def restore(self) -> None:
        """Undo everything since the last `restore` or `keep` if the last `check` found a bad step.

        Raises:
            RuntimeError: If there was no `check`.
        """
        good, before = self._good, self._before
        if good is None or before is None:
            raise RuntimeError("`restore` needs a `check` before it; check the loss after the backward pass.")
        self._good = self._before = None
        for group in self._groups:
            if not self._is_known(good):
                group.choose(good)
            elif self._heard_good:
                torch._foreach_copy_(group.kept, group.moving)
            else:
                torch._foreach_copy_(group.moving, group.kept)
        if before.is_needed():
            self._unsettled = _Flag(good, known=self._heard_good), before
            if self._is_known(good):
                self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Wait for the last step's flag, and put back the host's state if it was bad.

        `check` does so by itself. Call it before reading counts, such as a `MeanTeacher`'s state_dict for a checkpoint.
        """
        if self._unsettled is not None:
            flag, before = self._unsettled
            self._unsettled = None
            if not flag.is_good():
                before.put_back()

    def _is_known(self, tensor: Tensor) -> bool:
        """Whether the host can read a flag on this tensor's device without waiting."""
        return tensor.device.type != "cuda"

    def _gradients_are_finite(self, device: torch.device) -> Tensor:
        """Whether all gradients of all optimizers are finite, as a bool scalar on a device."""
        gradients = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
        finite = torch.ones((), dtype=torch.bool, device=device)
        for found in _alike(one._values() if one.is_sparse else one for one in gradients):
            half = found[0].dtype in {torch.float16, torch.bfloat16}  # norms overflow in these
            norms = torch._foreach_norm(found, 2, torch.float32 if half else None)
            finite = finite & torch.stack(norms).isfinite().all().to(device)
        return finite

    def _parameters(self) -> Iterator[Tensor]:
        return (p for one in self.optimizers for group in one.param_groups for p in group["params"])

    def _moving(self) -> list[Tensor]:
        """Every tensor that moves, once; with parameters on a device, without those on the host."""
        held = [[*module.parameters(), *module.buffers()] for module in self.modules]
        states = [state.values() for one in self.optimizers for state in one.state.values()]
        made = [value for values in states for value in values if isinstance(value, Tensor)]
        tensors = [self._writable(one) for one in dict.fromkeys(itertools.chain(*held, self._parameters(), made))]
        if any(not parameter.is_cpu for parameter in self._parameters()):
            return [tensor for tensor in tensors if not tensor.is_cpu]  # the host puts its own back
        return tensors

    def _writable(self, tensor: Tensor) -> Tensor:
        """The tensor, or of an expanded one a view of the elements that it has in memory, always the same one."""
        if 0 not in tensor.stride():
            return tensor
        if tensor not in self._views:
            sizes = [size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
            self._views[tensor] = tensor.as_strided(sizes, tensor.stride())
        return self._views[tensor]

    def _keep_new(self) -> None:
        """Copy everything that moves; again when a step has created state."""
        seen = [id(value) for values in self._holders() for value in values]  # of objects that are kept alive
        if self._kept and seen == self._seen:
            return
        self._inside = [part for module in self.modules for part in module.modules()]
        self._extras = [one for one in self._inside if type(one).get_extra_state is not nn.Module.get_extra_state]
        self._seen = [id(value) for values in self._holders() for value in values]
        old = self._kept
        self._groups = [_Group(one, 1 if self._is_known(one[0]) else 2) for one in _alike(self._moving())]
        self._kept = {one: kept for group in self._groups for one, kept in zip(group.moving, group.kept, strict=True)}
        for tensor, kept in self._kept.items():
            kept.copy_(old.get(tensor, tensor))

    def _holders(self) -> Iterator[Iterable[object]]:
        """What modules and optimizers hold: the same objects as long as nothing is added or replaced."""
        yield self.modules
        for part in self._inside:
            yield from (part._parameters.values(), part._buffers.values(), part._modules.values())
        for one in self.optimizers:
            yield from (group["params"] for group in one.param_groups)
            for state in one.state.values():
                yield (value for value in state.values() if isinstance(value, Tensor))


def _refuse_shards(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
            if hasattr(value, "to_local"):  # a DTensor
                raise TypeError(
                    f"`modules` must not be sharded, got the DTensor {name!r}; under `fully_shard`, check that the "
                    "loss is finite before the backward pass."
                )


def _alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors by dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())


class _Group:
    """Tensors of one dtype and device, which copy in a few launches, and their copies.

    Copies are views into one flat tensor, so that choosing between two of them is one `where`.
    """

    def __init__(self, moving: list[Tensor], copies: int) -> None:
        self.moving = moving
        size = sum(tensor.numel() for tensor in moving)
        self.flat = torch.zeros(copies, size, dtype=moving[0].dtype, device=moving[0].device)
        self.kept, *rest = ([*_views(row, moving)] for row in self.flat)
        self.now = rest[0] if rest else []

    def choose(self, good: Tensor) -> None:
        """Keep the new values if `good`, else put back the old ones: seven passes over memory, no sync."""
        kept, now = self.flat
        torch._foreach_copy_(self.now, self.moving)
        torch.where(good.to(kept.device, non_blocking=True), now, kept, out=kept)
        torch._foreach_copy_(self.moving, self.kept)


def _views(memory: Tensor, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Views of flat memory, one for each tensor, of its shape and memory format."""
    offset = 0
    for tensor in tensors:
        part = memory[offset : offset + tensor.numel()]
        offset += tensor.numel()
        if tensor.is_contiguous(memory_format=torch.channels_last) and tensor.ndim == 4:
            yield part.as_strided(tensor.shape, tensor.stride(), part.storage_offset())
        else:
            yield part.view(tensor.shape)


class _HostState:
    """The host's part of the state before a step: counts, extra state, and which tensors an optimizer holds.

    Each value is a pair: the object, and its copy. A tensor that the device puts back is paired with itself.
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], extras: Sequence[nn.Module], kept: Mapping[Tensor, Tensor]
    ) -> None:
        def saved(value: Any) -> tuple[Any, Any]:  # noqa: ANN401 - whatever an optimizer keeps
            if isinstance(value, Tensor):
                return value, value if value in kept else value.clone()
            return value, copy.copy(value)

        self.states = [
            (one, {key: {name: saved(value) for name, value in state.items()} for key, state in one.state.items()})
            for one in optimizers
        ]
        self.extras = [(module, module.get_extra_state()) for module in extras]

    def is_needed(self) -> bool:
        """Whether the step may have changed anything on the host."""
        return bool(self.extras) or any(map(self._differs, self.states))

    def put_back(self) -> None:
        """Undo the step."""
        for one, states in self.states:
            for key in one.state.keys() - states.keys():
                del one.state[key]
            for key, values in states.items():
                one.state[key].clear()
                for name, (value, was) in values.items():
                    if isinstance(value, Tensor) and was is not value:
                        value.copy_(was)
                    one.state[key][name] = value if isinstance(value, Tensor) else was
        for module, extra in self.extras:
            module.set_extra_state(extra)

    @staticmethod
    def _differs(saved: tuple[torch.optim.Optimizer, dict[Any, dict[str, tuple[Any, Any]]]]) -> bool:
        """Whether the optimizer holds anything but the tensors that the device puts back."""
        one, states = saved
        for key, pairs in states.items():
            known = {name: id(value) for name, (value, was) in pairs.items() if was is value and torch.is_tensor(value)}
            now = {name: id(value) for name, value in one.state.get(key, {}).items()}
            if len(known) < len(pairs) or known != now:
                return True
        return one.state.keys() != states.keys()


class _Flag:
    """Whether a step was good; from a GPU the answer is copied asynchronously."""

    def __init__(self, good: Tensor, *, known: bool) -> None:
        self.good: Tensor | bool = known
        self.on_gpu: Any = None
        if good.device.type == "cuda":
            self.good = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True).copy_(good, non_blocking=True)
            self.on_gpu = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.on_gpu.record(torch.cuda.current_stream(good.device))  # may not be the current device

    def is_good(self) -> bool:
        """The answer, once it has arrived."""
        if self.on_gpu is not None:
            self.on_gpu.synchronize()
        return bool(self.good)


class _Report:
    """Carry the number of bad steps, and the latest one, from device to host asynchronously."""

    def __init__(self) -> None:
        self._on_device: Tensor | None = None
        self._flying: tuple[Tensor, Any] | None = None
        self._told = 0

    def tell(self, good: Tensor, step: int) -> tuple[int, int] | None:
        """Count a step; return the number of bad steps and the latest one if the host hears of a new one."""
        if self._on_device is None:
            self._on_device = torch.zeros(2, dtype=torch.int64, device=good.device)
        count, latest = self._on_device
        self._on_device = torch.stack([count + torch.logical_not(good), torch.where(good, latest, step)])
        heard = self._on_device if good.device.type != "cuda" else self._from_gpu(self._on_device)
        if heard is None or int(heard[0]) == self._told:
            return None
        self._told = int(heard[0])
        return self._told, int(heard[1])

    def _from_gpu(self, now: Tensor) -> Tensor | None:
        """The previous copy if it has arrived, in which case the next one is sent."""
        heard = None
        if self._flying is not None:
            sent, event = self._flying
            if not event.query():
                return None
            heard = sent
        sent = torch.empty(2, dtype=torch.int64, device="cpu", pin_memory=True).copy_(now, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(now.device))
        self._flying = (sent, event)
        return heard
