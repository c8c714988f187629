"""The mean teacher: an average of the student over training, which makes the pseudo-labels.

Mean Teacher: Tarvainen and Valpola, NeurIPS 2017, https://arxiv.org/abs/1703.01780
As used by DACS: Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702, section 3.2.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # what torch.compiler.disable is, without importing the compiler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from crossmix._checks import check_choice, check_fraction, check_logits

__all__ = ["MeanTeacher", "PseudoLabels", "ema_update_", "pseudo_label", "pseudo_label_from_probs"]


class PseudoLabels(NamedTuple):
    """The most probable class of each pixel, and how sure the network is.

    Attributes:
        labels: (N, H, W) int64 in 0..C-1.
        confidence: (N, H, W) float32 or float64 in [0, 1].
    """

    labels: Tensor
    confidence: Tensor


def pseudo_label(logits: Tensor) -> PseudoLabels:
    """Take the most probable class of each pixel and its probability.

    Args:
        logits: (N, C, H, W) floating; the softmax runs in float32, in float64 for float64 logits.

    Returns:
        Labels and confidence, without gradient. Every pixel keeps its label; nothing is thresholded to ignored.

    Raises:
        TypeError: If `logits` is not floating.
        ValueError: If its shape is wrong.

    Example:
        >>> pseudo_label(torch.tensor([0.0, 4.0])[None, :, None, None])
        PseudoLabels(labels=tensor([[[1]]]), confidence=tensor([[[0.9820]]]))
    """
    check_logits("logits", logits)
    logits = logits.detach()
    return pseudo_label_from_probs((logits if logits.dtype == torch.float64 else logits.float()).softmax(1))


def pseudo_label_from_probs(probs: Tensor) -> PseudoLabels:
    """Take the most probable class of each pixel, from probabilities: for those that were aligned, say.

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
    probs = probs.detach()
    confidence, labels = (probs if probs.dtype == torch.float64 else probs.float()).max(dim=1)
    return PseudoLabels(labels, confidence)


@torch.no_grad()
def ema_update_(averaged: Sequence[Tensor], current: Sequence[Tensor], decay: float) -> None:
    """Move averages towards current values, in place, a few launches for the whole list.

    averaged <- decay * averaged + (1 - decay) * current; integers and booleans are copied

    Args:
        averaged: Tensors to change.
        current: As many tensors of the same shapes.
        decay: Share of the average that is kept, in [0, 1], in double precision: 0 copies, 1 changes no float.

    Raises:
        ValueError: If the lists differ in length or in a shape, or `decay` is out of range.

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
        if old.shape != new.shape:
            raise ValueError(
                f"`averaged[{i}]` has shape {tuple(old.shape)} but `current[{i}]` {tuple(new.shape)}; "
                "pass the tensors in one order."
            )
    copied = [pair for pair in zip(averaged, current, strict=True) if decay == 0 or not _averages(pair[0])]
    lerped = [pair for pair in zip(averaged, current, strict=True) if decay not in {0, 1} and _averages(pair[0])]
    if copied:
        torch._foreach_copy_([old for old, _ in copied], [new for _, new in copied])
    if lerped:
        torch._foreach_lerp_([old for old, _ in lerped], [new.to(old) for old, new in lerped], 1.0 - decay)


class MeanTeacher(nn.Module):
    """A copy of the student whose weights are an exponential moving average of the student's.

    teacher <- decay_t * teacher + (1 - decay_t) * student,  decay_t = min(1 - 1 / (t + 1), decay)

    t counts earlier updates from 0, so the first update copies the student; at decay 0.99 the ramp ends at t = 99. With
    `warmup=False` decay_t is `decay` from the start. `decay=0` with `mode="train"` makes the teacher the network
    itself, as in the paper's Algorithm 1.

    Args:
        student: The network to average. A DistributedDataParallel or compiled wrapper is looked through.
        decay: Share of the teacher that an update keeps, in [0, 1]; the released code has 0.99.
        warmup: Whether the decay ramps up.
        buffers: `"copy"` takes the student's buffers at every update, `"average"` averages them too; integer ones are
            always copied. (The released code leaves them at their initial value: its teacher never reads them.)
        mode: How the forward pass runs, whatever `.train()` or `.eval()` is called: `"eval"`, or `"train"` (the
            released code), where BatchNorm uses the batch's statistics while its running ones are left alone. Dropout
            is off in both.

    State:
        `module.*`: the teacher's parameters and buffers, changed by `update` alone. `_extra_state`: the number of
            updates.

    Attributes:
        module: The averaged network. To evaluate it on the running statistics, put it in eval mode and call it
            directly.
        num_updates: How many updates were made.

    Raises:
        ValueError: If `decay` is out of range, or `buffers` or `mode` unknown.

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
        mode: Literal["eval", "train"] = "eval",
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"`student` must be an nn.Module, got {type(student).__name__}; pass the network itself.")
        check_fraction("decay", decay)
        check_choice("buffers", buffers, ("copy", "average"))
        check_choice("mode", mode, ("eval", "train"))
        self.decay = decay
        self.warmup = warmup
        self.buffers_mode = buffers
        self.mode = mode
        self.num_updates = 0
        self.module = copy.deepcopy(_unwrap(student)).requires_grad_(requires_grad=False)
        self.module.zero_grad(set_to_none=True)
        self._apply_mode()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:  # noqa: ANN401 - what the network returns
        """Run the teacher in its mode, without gradient and without a change of state.

        Args:
            images: (N, 3, H, W) floating in [0, 1].

        Returns:
            Logits (N, C, H, W), or whatever else the network returns.
        """
        if any(module.training != self._batch_statistics(module) for module in self.module.modules()):
            self._apply_mode()  # somebody called .train() or .eval() on the inner module
        return self.module(images)

    def pseudo_label(self, images: Tensor) -> PseudoLabels:
        """Label images by the teacher.

        Args:
            images: (N, 3, H, W) floating in [0, 1].

        Returns:
            Labels (N, H, W) int64 and confidence (N, H, W).
        """
        return pseudo_label(self(images))

    @_disable_dynamo  # decay and count are Python numbers: it would be compiled anew at each step
    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Average the student in: call it after each optimizer step, and not after a step that was skipped.

        Runs eagerly inside a compiled function. Replays of a CUDA graph use the decay of the captured update and do not
        count: set `num_updates` to the steps made before saving.

        Args:
            student: The network given to the constructor, wrapped or not.

        Raises:
            ValueError: If its parameters or buffers do not match the teacher's by name and shape.
            RuntimeError: If a CUDA graph is being captured while the decay still rises.
        """
        student = _unwrap(student)
        decay = min(1.0 - 1.0 / (self.num_updates + 1), self.decay) if self.warmup else self.decay
        if decay < self.decay and _capturing():
            raise RuntimeError(
                f"A captured `update` must have a decay that no longer changes, got {decay:.4g} on the way to "
                f"{self.decay} after {self.num_updates} updates; warm up eagerly first, or build with `warmup=False`."
            )
        mine, theirs = _tensors(self.module), _tensors(student)
        ema_update_(*_matched(mine[0], theirs[0], "parameter"), decay)
        ema_update_(*_matched(mine[1], theirs[1], "buffer"), decay if self.buffers_mode == "average" else 0.0)
        self.num_updates += 1

    def update_parameters(self, model: nn.Module) -> None:
        """Do what `update` does, under the name that `torch.optim.swa_utils.AveragedModel` has for it.

        Args:
            model: The student.
        """
        self.update(model)

    def train(self, mode: bool = True) -> "MeanTeacher":
        """Set this module's flag and keep the teacher's own mode.

        Args:
            mode: What a parent module passes on.

        Returns:
            This module.
        """
        self.training = mode
        self._apply_mode()
        return self

    def get_extra_state(self) -> Tensor:
        """Return the number of updates, for the state_dict."""
        return torch.tensor(self.num_updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the number of updates.

        Args:
            state: What `get_extra_state` returned.
        """
        self.num_updates = int(state)

    def extra_repr(self) -> str:
        """Constructor arguments, for `repr`."""
        return f"decay={self.decay}, warmup={self.warmup}, buffers={self.buffers_mode!r}, mode={self.mode!r}"

    def _batch_statistics(self, module: nn.Module) -> bool:
        """Whether a submodule runs in training mode: BatchNorm in mode "train"."""
        return self.mode == "train" and isinstance(module, _BatchNorm)

    def _apply_mode(self) -> None:
        for module in self.module.modules():
            module.training = self._batch_statistics(module)
            if self.mode == "train" and isinstance(module, _BatchNorm):
                # In training mode without tracking, BatchNorm neither reads nor moves its running statistics. In eval
                # mode it still reads them, so `.module.eval()` evaluates the teacher as usual.
                module.track_running_stats = False


def _averages(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _unwrap(module: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and torch.compile wrappers, in any nesting."""
    while True:
        if isinstance(module, DistributedDataParallel | DataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def _tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `named_parameters` and `named_buffers` give, in one walk: their four are a tenth of an update on a CPU."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen = set()  # shared ones are averaged once

    def walk(part: nn.Module, prefix: str) -> None:
        for own, found in ((part._parameters, parameters), (part._buffers, buffers)):
            for name, value in own.items():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    found[prefix + name] = value
        for name, child in part._modules.items():
            if child is not None:
                walk(child, f"{prefix}{name}.")

    walk(module, "")
    return parameters, buffers


def _matched(averaged: dict[str, Tensor], current: dict[str, Tensor], kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists in one order, matched by name and shape."""
    if averaged.keys() != current.keys():
        differing = sorted(averaged.keys() ^ current.keys())
        raise ValueError(
            f"The student's {kind}s must be those of the teacher, but {len(differing)} names differ, "
            f"first {differing[0]!r}; pass the network that the teacher was made from."
        )
    for name, value in averaged.items():
        if value.shape != current[name].shape:
            raise ValueError(
                f"The student's {kind} {name!r} has shape {tuple(current[name].shape)} but the teacher's "
                f"{tuple(value.shape)}; pass the network that the teacher was made from."
            )
    return list(averaged.values()), [current[name] for name in averaged]
