"""The mean teacher, an exponential moving average of the student that produces the pseudo-labels.

Mean Teacher: Tarvainen and Valpola, NeurIPS 2017, https://arxiv.org/abs/1703.01780
As used by DACS: Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702, section 3.2.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # what torch.compiler.disable is, without importing the compiler
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.hooks import RemovableHandle

from crossmix._averaging import average_, can_average, is_low, widened
from crossmix._checks import (
    check_bool,
    check_choice,
    check_fraction,
    check_int,
    check_logits,
    check_module,
    check_tensor,
    logits_in,
)
from crossmix._network_copy import copied, filled
from crossmix._network_state import (
    State,
    first_difference,
    is_sharded,
    local_pairs,
    low_dtypes,
    matched,
    state_of,
    take_over,
)
from crossmix._norms import Change, run_changed, without_statistics
from crossmix._tensors import at_least_float32
from crossmix._wrappers import named_parts, unwrapped

__all__ = ["MeanTeacher", "PseudoLabels", "ema_update_", "pseudo_label", "pseudo_label_from_probs"]


class PseudoLabels(NamedTuple):
    """The most probable class of each pixel and its probability.

    Attributes:
        labels: (N, H, W) int64 in 0..C-1.
        confidence: (N, H, W) float32 or float64 in [0, 1].
    """

    labels: Tensor
    confidence: Tensor


def pseudo_label(logits: Tensor) -> PseudoLabels:
    """Return the most probable class of each pixel and its probability.

    Args:
        logits: (N, C, H, W) floating; the softmax runs in float32, or in float64 for float64 logits.

    Returns:
        Labels and confidence, without gradient. Every pixel gets a label; none is set to ignored by a threshold.

    Raises:
        TypeError: If `logits` is not a floating tensor.
        ValueError: If its shape is wrong.

    Example:
        >>> pseudo_label(torch.tensor([0.0, 4.0])[None, :, None, None])
        PseudoLabels(labels=tensor([[[1]]]), confidence=tensor([[[0.9820]]]))
    """
    if way := logits_in(logits, "output"):
        hint = f"extract it from the network's output: crossmix.functional.pseudo_label({way})"
        small = "Logits smaller than the images have to be upsampled first, as SelfTraining(upsample=True) does."
        raise TypeError(f"`logits` must be a torch.Tensor, got {type(logits).__name__}; {hint}. {small}")
    check_logits("logits", logits)
    return pseudo_label_from_probs(at_least_float32(logits.detach()).softmax(1))


def pseudo_label_from_probs(probs: Tensor) -> PseudoLabels:
    """Return the most probable class of each pixel from probabilities, e.g. after distribution alignment.

    Args:
        probs: (N, C, H, W) floating, summing to 1 over dimension 1.

    Returns:
        Labels and confidence, without gradient.

    Raises:
        TypeError: If `probs` is not floating.
        ValueError: If its shape is wrong.

    Example:
        >>> pseudo_label_from_probs(torch.tensor([0.25, 0.75])[None, :, None, None])
        PseudoLabels(labels=tensor([[[1]]]), confidence=tensor([[[0.7500]]]))
    """
    check_logits("probs", probs)
    confidence, labels = at_least_float32(probs.detach()).max(dim=1)
    return PseudoLabels(labels, confidence)


@torch.no_grad()
def ema_update_(averaged: Sequence[Tensor], current: Sequence[Tensor], decay: float) -> None:
    """Update moving averages in place, with a few kernel launches for the whole list.

    averaged <- decay * averaged + (1 - decay) * current; integers and booleans are copied

    Keep averages in float32. One in bfloat16 or float16 is computed in float32 and rounded back, which loses changes
    smaller than a rounding step; at decay 0.99 such an average stops moving.

    Args:
        averaged: Tensors to update. For a sharded tensor (DTensor), each rank updates its shard.
        current: As many tensors, of the same shapes. Other dtypes are converted. Tensors on another device are moved,
            which syncs; shards with another placement are redistributed, which communicates.
        decay: Share of the average to keep, in [0, 1], in double precision. 0 copies; 1 leaves floats unchanged.

    Raises:
        TypeError: If an average is floating and its current value is not, or the other way round.
        ValueError: If the lists differ in length or in a shape, or `decay` is out of range. Nothing is changed then.

    Example:
        >>> average = torch.tensor([1.0])
        >>> ema_update_([average], [torch.tensor([2.0])], 0.9)
        >>> average
        tensor([1.1000])
    """
    check_fraction("decay", decay)
    averaged, current = list(averaged), list(current)
    if len(averaged) != len(current):
        raise ValueError(f"`averaged` holds {len(averaged)} tensors but `current` {len(current)}; pass matching lists.")
    for i, (old, new) in enumerate(zip(averaged, current, strict=True)):
        check_tensor(f"averaged[{i}]", old)
        check_tensor(f"current[{i}]", new)
        if difference := first_difference(old, new):
            kind, mine, theirs = difference
            found = f"`averaged[{i}]` has {kind} {mine} but `current[{i}]` {theirs}"
            raise (TypeError if kind == "dtype" else ValueError)(f"{found}; pass both lists in the same order.")
    average_(local_pairs(dict(enumerate(averaged)), dict(enumerate(current))), decay)


class MeanTeacher(nn.Module):
    """A copy of the student whose weights are an exponential moving average of the student's.

    teacher <- decay_t * teacher + (1 - decay_t) * student,  decay_t = min(1 - 1 / (t + 1), decay)

    t is `start` plus the number of earlier updates. With `start=0` the first update copies the student; at decay 0.99
    the ramp ends at t = 99. With `decay=0` the teacher equals the student, as in the paper's Algorithm 1.

    Averages are kept in float32 (float64 for float64 weights) even if this module or a parent is cast to a lower
    precision, in which they would stop moving. The forward pass runs in the student's dtype, or in that of the cast.

    Loading weights without an update count into the teacher, a parent or a part of it ends the ramp, so that the next
    update keeps a share `decay` of them instead of copying the student over them.

    Args:
        student: The network to average. It may be wrapped (DistributedDataParallel, torch.compile, ...) as a whole or
            in parts; it is deep-copied without the wrappers.
        decay: Share of the teacher that an update keeps, in [0, 1]; 0.99 in the released code.
        warmup: Whether the decay ramps up; otherwise decay_t is `decay`.
        buffers: `"copy"` copies the student's buffers at every update, `"average"` averages them; integer buffers are
            always copied. (The released code leaves them at their initial values, which its teacher never reads.)
        mode: How the forward pass runs, regardless of `.train()` and `.eval()`: `"train"` (the released code), where
            BatchNorm and InstanceNorm use batch statistics and leave the running ones unchanged, or `"eval"`. Dropout
            is off in both.
        network: A second network of the same architecture and without shared tensors, for a student that cannot be
            deep-copied; it becomes `.module` and gets the student's weights. Shard it (`fully_shard`) as the student.
        start: First value of t: 1 for DAFormer's ramp, which never copies.

    State:
        `module.*`: the teacher's parameters and buffers, changed only by `update`. `_extra_state`: the number of
            updates.

    Attributes:
        module: The averaged network, an ordinary module in eval mode unless you change that. Call it directly to
            evaluate with running statistics.
        num_updates: t, i.e. `start` plus the updates made; beyond the ramp after loading weights without a count.

    Raises:
        TypeError: If `student` or `network` is not a module, or another argument has a wrong type.
        ValueError: If `decay` or `start` is out of range, `buffers` or `mode` is unknown, the student cannot be
            deep-copied (as with a `forward` that was replaced by `torch.compile(student.forward)`, or a forward hook
            whose closure holds a module of it), or `network` does not match it.

    Example:
        >>> student = nn.Conv2d(3, 2, 1)
        >>> teacher = MeanTeacher(student, decay=0.99)
        >>> teacher.update(student)
        >>> teacher.num_updates, teacher.pseudo_label(torch.rand(1, 3, 4, 4)).labels.shape
        (1, torch.Size([1, 4, 4]))
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        decay: float = 0.99,
        warmup: bool = True,
        buffers: Literal["copy", "average"] = "copy",
        mode: Literal["eval", "train"] = "train",
        network: nn.Module | None = None,
        start: int = 0,
    ) -> None:
        super().__init__()
        check_module("student", student)
        if network is not None:
            check_module("network", network)
        check_fraction("decay", decay)
        check_bool("warmup", warmup)
        check_choice("buffers", buffers, ("copy", "average"))
        check_choice("mode", mode, ("eval", "train"))
        check_int("start", start, least=0, hint="; it is a count of updates")
        self.decay = decay
        self.warmup = warmup
        self.buffers_mode = buffers
        self.mode = mode
        self.num_updates: int = start
        theirs = state_of(student)
        lazy = [name for name, value in theirs.parameters.items() if nn.parameter.is_lazy(value)]
        if lazy:
            raise ValueError(f"`student` has an uninitialised parameter {lazy[0]!r}; run a batch through it first.")
        self.module: nn.Module = copied(unwrapped(student)) if network is None else filled(network, theirs)
        self.module.requires_grad_(requires_grad=False).zero_grad(set_to_none=True)
        self.module.eval()
        self._cumulative = self._count_cumulative()
        self._loaded = _Loaded()
        for part in self.module.modules():
            part.register_load_state_dict_pre_hook(self._loaded)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]
        self._low: dict[str, torch.dtype] = {}  # forward dtypes below float32, by tensor name
        self._wide_state()
        self._students_low = low_dtypes(theirs)
        self._low = dict(self._students_low)

    @torch.no_grad()
    def forward(self, *inputs: Any, **named: Any) -> Any:  # noqa: ANN401 - what the network takes and returns
        """Run the teacher in its mode, without gradient and without changing any state. One thread at a time.

        The one exception is `torch.optim.swa_utils.update_bn(loader, teacher)`, which refreshes the running statistics
        of `.module`. It is recognised by a teacher in training mode with BatchNorm layers whose `momentum` was set to
        None after it was made. (If the student's own layers have None, call `update_bn(loader, teacher.module)`.)

        Args:
            *inputs: The network's inputs, usually images (N, 3, H, W) floating in [0, 1].
            **named: Its keyword arguments.

        Returns:
            Logits (N, C, H, W), or whatever the network returns.
        """
        return run_changed(self._during_forward(), self.module, *inputs, **named)

    def pseudo_label(self, *inputs: Any, **named: Any) -> PseudoLabels:  # noqa: ANN401 - what the network takes
        """Compute labels (N, H, W) int64 and confidence (N, H, W) of images, the arguments of `forward`.

        Raises:
            TypeError: If the network does not return its logits as a tensor.
        """
        return pseudo_label(self(*inputs, **named))

    @_disable_dynamo  # decay and count are Python numbers, so every step would recompile
    @torch.inference_mode(mode=False)  # tensors created here are modified by later updates
    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Update with the student, wrapped or not. Call this after each optimizer step, except after skipped ones.

        It runs eagerly inside a compiled function. Replays of a CUDA graph use the decay of the captured update and do
        not count: set `num_updates` to the number of steps before saving.

        Non-persistent buffers (caches) of the student that appeared or changed shape since are copied. If student and
        teacher are sharded alike (`fully_shard`), each rank averages its shards; an unsharded teacher gathers the
        student's.

        Raises:
            TypeError: If it is not a module.
            ValueError: If its parameters or buffers do not match the teacher's by name and shape. Nothing is changed
                then.
            RuntimeError: If a CUDA graph is being captured while the decay is still ramping up.
        """
        check_module("student", student)
        self._end_ramp_if_loaded()
        decay = min(1.0 - 1.0 / (self.num_updates + 1), self.decay) if self.warmup else self.decay
        if decay < self.decay and _capturing():
            now = f"got {decay:.4g} on the way to {self.decay} after {self.num_updates} updates"
            hint = "warm up eagerly first, or build with `warmup=False`"
            raise RuntimeError(f"`update` can be captured only once the decay is constant, {now}; {hint}.")
        mine, theirs = self._wide_state(), state_of(student)
        parameters, buffers, caches = matched(mine, theirs)
        for name in caches:
            take_over(name, mine, theirs)
        average_(parameters, decay)
        average_(buffers, decay if self.buffers_mode == "average" else 0.0)
        low = low_dtypes(theirs)
        if low != self._students_low:  # the student was cast, or has a new cache
            self._students_low, self._low = low, dict(low)
        self.num_updates += 1

    def follow(self, optimizer: torch.optim.Optimizer, student: nn.Module) -> RemovableHandle:
        """Call `update` automatically after every step of an optimizer.

        This is correct under gradient accumulation, with a GradScaler (steps that it skips do not count; with a fused
        optimizer it costs one host sync per step), and in frameworks that call the optimizer themselves, also where
        accelerate or Lightning have wrapped it. `remove()` of the returned handle stops the updates.

        Raises:
            TypeError: If `optimizer` is not a torch.optim.Optimizer.

        Example:
            >>> student = nn.Linear(2, 2)
            >>> teacher, optimizer = MeanTeacher(student), torch.optim.SGD(student.parameters(), lr=0.1)
            >>> handle = teacher.follow(optimizer, student)
            >>> student(torch.rand(1, 2)).sum().backward()
            >>> optimizer.step()
            >>> teacher.num_updates
            1
        """
        if not isinstance(optimizer, torch.optim.Optimizer):  # a scheduler has an `optimizer` too
            raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}; unwrap it.")
        inner = getattr(optimizer, "optimizer", None)  # of accelerate and Lightning, whose wrappers take no hooks
        optimizer = inner if isinstance(inner, torch.optim.Optimizer) else optimizer

        def after_step(stepped: torch.optim.Optimizer, *_: object) -> None:
            skipped = getattr(stepped, "found_inf", None)  # set by a GradScaler during a fused step
            if skipped is None or not skipped.item():
                self.update(student)

        return optimizer.register_step_post_hook(after_step)

    def update_parameters(self, model: nn.Module) -> None:
        """Call `update` with the student `model`; `torch.optim.swa_utils.AveragedModel` has this name for it."""
        self.update(model)

    def train(self, mode: bool = True) -> "MeanTeacher":
        """Set the flag `training` to `mode`, and nothing else: `forward` has its own mode, and `.module` keeps its."""
        self.training = mode
        return self

    def get_extra_state(self) -> Tensor:
        """Return the number of updates, for the state_dict."""
        self._end_ramp_if_loaded()
        return torch.tensor(self.num_updates, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the number of updates from `state`, the result of `get_extra_state`."""
        self.num_updates = int(state)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:  # noqa: ANN401
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._loaded.count = f"{prefix}_extra_state" in state_dict

    def extra_repr(self) -> str:
        """Constructor arguments, for `repr`."""
        return f"decay={self.decay}, warmup={self.warmup}, buffers={self.buffers_mode!r}, mode={self.mode!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MeanTeacher":
        """Move and cast as usual, except that dtypes below float32 apply only to the forward pass."""
        names: dict[int, list[str]] = {}
        for name, value in state_of(self.module).every_name():
            names.setdefault(id(value), []).append(name)

        def keep_wide(value: Tensor) -> Tensor:
            known = names.get(id(value), [])
            if not known or not can_average(value):
                return fn(value)
            forward_dtype = self._low.get(known[0], value.dtype)
            forward_dtype = fn(torch.empty(0, dtype=forward_dtype, device=value.device)).dtype
            moved = fn(value)
            for name in known:
                self._low.pop(name, None)
            if not is_low(forward_dtype):
                return moved
            self._low.update(dict.fromkeys(known, forward_dtype))
            return moved if moved.dtype == value.dtype else torch.empty_like(moved, dtype=value.dtype).copy_(value)

        super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
        return self

    def _during_forward(self) -> list[Change]:
        """Temporary attributes of the network's modules during a forward pass."""
        refreshing = self.training and self._count_cumulative() > self._cumulative
        changes: list[Change] = []
        for name, part in named_parts(self.module):
            prefix = f"{name}." if name else ""
            norm = isinstance(part, _NormBase)
            batch_statistics = norm and self.mode == "train" and not refreshing
            changes.append((part.__dict__, "training", refreshing or batch_statistics))
            if self._low and not (norm and refreshing):  # statistics being refreshed must not be copies
                changes += self._in_low_dtype(part, prefix)
            if batch_statistics:
                low = {key: self._low[prefix + key] for key in part._buffers if prefix + key in self._low}
                changes += without_statistics(part, low)
        return changes

    def _in_low_dtype(self, part: nn.Module, prefix: str) -> list[Change]:
        """A module's tensors, cast to their forward dtype. Shards are left to the policy of `fully_shard`."""
        return [
            (own, key, value.to(self._low[prefix + key]))
            for own in (part._parameters, part._buffers)
            for key, value in own.items()
            if value is not None and prefix + key in self._low and not is_sharded(value)
        ]

    def _count_cumulative(self) -> int:
        """Number of BatchNorm layers with a cumulative average (`momentum=None`), as `update_bn` sets it."""
        return sum(isinstance(part, _BatchNorm) and part.momentum is None for part in self.module.modules())

    def _wide_state(self) -> State:
        """The network's tensors, after casting any below float32 (after `.module.half()`, say) back up."""
        state = state_of(self.module)
        low = low_dtypes(state)
        if low:
            self.module._apply(widened)  # type: ignore[no-untyped-call]
            self._low.update(low)
            state = state_of(self.module)
        return state

    def _end_ramp_if_loaded(self) -> None:
        """End the ramp of the decay if weights were loaded without an update count."""
        if self._loaded.without_count and self.warmup:
            ramp = math.ceil(1 / (1 - self.decay)) if self.decay < 1 else 2**62
            self.num_updates = max(self.num_updates, ramp)
        self._loaded.without_count = False


class _Loaded:
    """Records that weights were loaded into the teacher's network; a hook on each of its modules.

    It holds no reference to the teacher, so that a copy of the network alone does not affect it.
    """

    without_count = False  # whether the last weights loaded came without an update count
    count = False  # whether the last teacher state loaded contained one

    def __call__(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
        if any(prefix + name in state_dict for name in module._parameters):
            self.without_count = True


def _after_loading(teacher: MeanTeacher, _: object) -> None:
    """Restore float32 averages after loading a teacher's state: `assign=True` keeps the dtypes of the file."""
    teacher.module._apply(widened)  # type: ignore[no-untyped-call]
    if teacher._loaded.count:
        teacher._loaded.without_count = False


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
