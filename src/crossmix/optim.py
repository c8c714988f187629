"""Parameter groups, the released code's repeated SGD updates, and the polynomial learning rate schedule."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from crossmix._checks import check_module
from crossmix._wrappers import named_parts, plain_name

__all__ = ["RepeatedSGD", "parameter_groups", "poly_lr"]


def parameter_groups(
    network: nn.Module,
    lr: float,
    *,
    head: str | nn.Module | Sequence[str | nn.Module] | None = "layer5",
    head_factor: float = 10.0,
    no_decay: Collection[Literal["norm", "bias", "position"]] = (),
    repeated: bool = False,
) -> list[dict[str, Any]]:
    """Split trainable parameters into backbone and head; by default the head learns ten times as fast.

    Wrappers around the network or its parts (DistributedDataParallel, DataParallel, FullyShardedDataParallel,
    `torch.compile`, activation checkpointing) are ignored: the groups are those of the network without them.

    The released code lists a backbone parameter once for each submodule that contains it: in ResNet-101 the stem once,
    the convolutions of a bottleneck three times (stage, bottleneck, convolution) and those of `downsample` four times,
    314 entries for 104 tensors. Its optimizer stepped each entry. `repeated=True` builds that list, for `RepeatedSGD`;
    pass the DeepLab itself then, since a module around it would count too.

    Args:
        network: Any network, such as a `crossmix.models.DeepLabV2`, wrapped or not.
        lr: Learning rate of the backbone; 2.5e-4 in the paper.
        head: The head: the name of a submodule (with or without wrapper prefixes), the submodule itself, or several of
            either; None puts the whole network into the backbone.
        head_factor: Ratio of the head's learning rate to the backbone's.
        no_decay: Kinds of parameters that get weight decay 0, whatever the optimizer's is: normalisation layers
            (`"norm"`: classes whose name, or a base class's, ends in it, such as LayerNorm or BatchNorm2d), biases
            (`"bias"`, by name), and position embeddings (`"position"`: names with `pos`, `position` or `positional` as
            a word).
        repeated: Whether to list the backbone's parameters as often as the released code does.

    Returns:
        Groups for a torch optimizer, first backbone and head, then their parts without weight decay, if any. Each has
        `lr` and, with the same value, `initial_lr` for a schedule. Each parameter with `requires_grad` is in exactly
        one group; those shared by head and backbone are in the head's.

    Raises:
        TypeError: If `head` or `no_decay` has another type.
        ValueError: If `head` is not part of the network or has no parameters, `no_decay` contains another name, or a
            learning rate is negative or not finite.

    Example:
        >>> from crossmix.models import deeplab_v2_tiny
        >>> [group["lr"] for group in parameter_groups(deeplab_v2_tiny(), 0.01)]
        [0.01, 0.1]
    """
    check_module("network", network)
    hints = {"lr": "start from 2.5e-4", "head_factor": "1 trains the head like the backbone"}
    for (name, hint), value in zip(hints.items(), (lr, head_factor), strict=True):
        if not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be finite and not negative, got {value}; {hint}.")
    if not isinstance(no_decay, Collection):
        raise TypeError(f"`no_decay` must hold 'norm', 'bias' or 'position', got {no_decay!r}; () means all decay.")
    modules = dict(named_parts(network))
    several = isinstance(head, Sequence) and not isinstance(head, str)
    heads: Iterable[Any] = head if several else [] if head is None else [head]  # type: ignore[assignment]
    in_head = {parameter for one in heads for parameter in _head_parameters(network, modules, one)}
    undecayed = _undecayed(modules, {no_decay} if isinstance(no_decay, str) else set(no_decay))
    once = [parameter for parameter in network.parameters() if parameter.requires_grad]
    listed = once
    if repeated:
        whole, *inside = dict.fromkeys(modules.values())  # a shared module counts once
        around = chain(whole.parameters(recurse=False), *(module.parameters() for module in inside))
        listed = [parameter for parameter in around if parameter.requires_grad]
    parts = [([parameter for parameter in listed if parameter not in in_head], lr)]
    if head is not None:
        parts.append(([parameter for parameter in once if parameter in in_head], head_factor * lr))
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in part if parameter not in undecayed], "lr": rate, "initial_lr": rate}
        for part, rate in parts
    ]
    for part, rate in parts:
        if free := [parameter for parameter in part if parameter in undecayed]:
            groups.append({"params": free, "lr": rate, "initial_lr": rate, "weight_decay": 0.0})
    return groups


class RepeatedSGD(torch.optim.SGD):
    """SGD that updates a parameter as many times per step as its group lists it, as the released code did.

    For a parameter listed k times, one step computes, with the same gradient g,

        k times:  v <- momentum * v + g + weight_decay * p;  p <- p - lr * v

    As a result, the published bottlenecks learned three times and the projections four times as fast as the learning
    rate says, with a shorter momentum memory. `torch.optim.SGD` no longer supports this: its multi-tensor kernels
    update a parameter listed twice from two places at once. Here each repetition runs torch's own kernel, fused if
    possible, over the parameters that still have updates left. If none is listed twice, this is plain SGD.

    Args:
        params: Parameters or groups, such as `parameter_groups(model, lr, repeated=True)`.
        lr: Learning rate of groups without their own. In a group it may be a tensor on the parameters' device, so that
            a captured step can follow a schedule.
        momentum: Momentum factor; 0.9 in the paper.
        weight_decay: L2 penalty, applied at every repetition; 5e-4 in the paper.
        nesterov: Whether to use Nesterov momentum: the paper's text does, the released code does not.

    State:
        `momentum_buffer` per parameter; in each group `params` without repetitions, and `repeats`, how often each was
        listed. State dicts of the released code's optimizer, with repeated ids, can be loaded.

    Raises:
        ValueError: If a hyperparameter is out of range, or a parameter is in two groups.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = RepeatedSGD([weight, weight, weight], lr=0.5)
        >>> weight.grad = torch.tensor([0.25])
        >>> optimizer.step()
        >>> weight.data, optimizer.param_groups[0]["repeats"]
        (tensor([0.6250]), [3])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(params, lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: `params`, with repetitions, which are counted, and options that override the optimizer's.

        Raises:
            ValueError: If a parameter is already in another group.
        """
        params = param_group["params"]
        listed = [params] if isinstance(params, Tensor) else list(params)
        super().add_param_group(_counted({**param_group, "params": listed}))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have a gradient; return the loss of `closure`, which reevaluates the model."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            counts = zip(group["params"], group["repeats"], strict=True)
            ready = [(parameter, repeats) for parameter, repeats in counts if parameter.grad is not None]
            for repetition in range(max((repeats for _, repeats in ready), default=0)):
                self._update(group, [parameter for parameter, repeats in ready if repeats > repetition])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore momentum buffers and options of a `RepeatedSGD`, or of the `optimizer` of a released checkpoint.

        Raises:
            ValueError: If its groups differ, or it updates a parameter a different number of times per step.
        """
        groups = [_counted(group) for group in state_dict["param_groups"]]
        for own, saved in zip(self.param_groups, groups, strict=False):  # torch checks the number of groups below
            if own["repeats"] != saved["repeats"]:
                got = f"expected {_summary(own['repeats'])}, got {_summary(saved['repeats'])}"
                raise ValueError(
                    f"`state_dict` must update every parameter as often per step as this optimizer: {got}; build the "
                    f"groups with `parameter_groups(..., repeated={max(saved['repeats'], default=1) > 1})`."
                )
        super().load_state_dict({**state_dict, "param_groups": groups})

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Run one plain SGD update of some of a group's parameters."""
        grads = [cast("Tensor", parameter.grad) for parameter in params]
        buffers: list[Tensor | None] = [None] * len(params)
        if group["momentum"] != 0:
            buffers = [self._buffer(parameter) for parameter in params]
        alike = all(map(_fusible, params, grads, buffers))
        sgd(
            params,
            grads,
            buffers,
            fused=True if alike else None,  # None: torch's default
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            has_sparse_grad=any(grad.is_sparse for grad in grads),
        )

    def _buffer(self, parameter: Tensor) -> Tensor:
        """The momentum buffer, initialised to zero, so that the first update is the gradient itself."""
        state = self.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return cast("Tensor", state["momentum_buffer"])


def poly_lr(
    step: int, steps: int, lr: float, *, power: float = 0.9, warmup: int = 0, warmup_ratio: float = 1e-6
) -> float:
    """Compute the learning rate of a step under polynomial decay, with an optional linear warm-up.

    lr * (1 - step / steps) ** power; during the warm-up multiplied by
    warmup_ratio + (1 - warmup_ratio) * step / warmup

    Args:
        step: Number of optimizer steps finished before this one, from 0.
        steps: Number of steps of the whole run.
        lr: Initial learning rate of the decay.
        power: Exponent; 0.9 in the paper.
        warmup: Number of warm-up steps; 0 for none.
        warmup_ratio: Factor of the learning rate at step 0 of the warm-up, in [0, 1].

    Returns:
        The learning rate.

    Raises:
        ValueError: If `steps` is not positive, `step` does not lie in 0..steps, or `lr`, `power`, `warmup` or
            `warmup_ratio` is out of range.

    Example:
        >>> poly_lr(0, 100, 2.5e-4), poly_lr(100, 100, 2.5e-4)
        (0.00025, 0.0)
        >>> [round(poly_lr(step, 100, 1.0, power=1.0, warmup=10), 3) for step in (0, 5, 10)]
        [0.0, 0.475, 0.9]
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}; pass the length of the run.")
    if not 0 <= step <= steps:
        raise ValueError(f"`step` must lie in 0..steps = {steps}, got {step}; count finished steps from 0.")
    if not 0 <= lr < math.inf:
        raise ValueError(f"`lr` must be finite and at least 0, got {lr}; start from 2.5e-4.")
    if not 0 <= power < math.inf:
        raise ValueError(f"`power` must be finite and at least 0, got {power}; 0 means no decay.")
    if warmup < 0:
        raise ValueError(f"`warmup` must be at least 0 steps, got {warmup}; 0 means no warm-up.")
    if not 0 <= warmup_ratio <= 1:
        raise ValueError(f"`warmup_ratio` must lie in [0, 1], got {warmup_ratio}; 1 means no warm-up.")
    warm = warmup_ratio + (1 - warmup_ratio) * step / warmup if step < warmup else 1.0
    return float(lr * (1 - step / steps) ** power * warm)


def _head_parameters(network: nn.Module, modules: Mapping[str, nn.Module], head: object) -> set[nn.Parameter]:
    """The parameters of a head. A name is looked up as given first, and without wrapper prefixes only after that."""
    part = head
    if isinstance(head, str):
        name = head if head in modules else plain_name(network, head)
        if not name or name not in modules:
            names = ", ".join(name for name in modules if name and "." not in name)
            raise ValueError(f"`head` must name a submodule of the model, got {head!r}; it has {names}.")
        part = modules[name]
    if not isinstance(part, nn.Module):
        raise TypeError(f"`head` must be a name, a module, several of them or None, got {type(part).__name__}.")
    inside = set(part.parameters())
    if not inside or not inside <= set(modules[""].parameters()):
        got = repr(head) if isinstance(head, str) else f"a {type(part).__name__}"
        raise ValueError(
            f"`head` must have parameters, all of them the model's, got {got} with {len(inside)}; pass a part of this "
            "model, and use FullyShardedDataParallel with `use_orig_params=True`."
        )
    return inside


def _undecayed(modules: Mapping[str, nn.Module], kinds: Collection[str]) -> set[nn.Parameter]:
    """The parameters without weight decay."""
    if unknown := set(kinds) - {"norm", "bias", "position"}:
        raise ValueError(f"`no_decay` must be of 'norm', 'bias' and 'position', got {', '.join(map(repr, unknown))}.")
    found = set()
    for path, module in modules.items():
        norm = any(re.search(r"norm\d*d?$", kind.__name__, re.IGNORECASE) for kind in type(module).__mro__)
        for name, parameter in module.named_parameters(recurse=False):
            words = re.split(r"[._]", f"{path}.{name}")
            is_kind = {
                "norm": norm,
                "bias": "bias" in name.split("_"),
                "position": not {"pos", "position", "positional"}.isdisjoint(words),
            }
            if any(is_kind[kind] for kind in kinds):
                found.add(parameter)
    return found


def _counted(group: dict[str, Any]) -> dict[str, Any]:
    """Copy a group, listing each of `params` (tensors, or ids of a state_dict) once, with its count in `repeats`."""
    if group.get("dampening"):
        raise ValueError(f"`dampening` must be 0 for RepeatedSGD, got {group['dampening']}; use torch.optim.SGD.")
    counts: dict[Any, int] = {}
    for parameter, count in zip(group["params"], group.get("repeats", repeat(1)), strict=False):
        counts[parameter] = counts.get(parameter, 0) + count
    return {**group, "params": list(counts), "repeats": list(counts.values())}


def _fusible(parameter: Tensor, grad: Tensor, buffer: Tensor | None) -> bool:
    """Whether the fused kernel can be used, which ignores strides and so needs one memory layout for all tensors."""
    tensors = [parameter, grad] if buffer is None else [parameter, grad, buffer]
    if parameter.device.type not in {"cpu", "cuda"} or not parameter.is_floating_point():
        return False
    if any(type(tensor) not in {Tensor, nn.Parameter} for tensor in tensors):  # e.g. DTensors of FSDP2
        return False
    if any(tensor.layout is not torch.strided or tensor.dtype is not parameter.dtype for tensor in tensors):
        return False
    return any(
        all(tensor.is_contiguous(memory_format=form) for tensor in tensors)
        for form in (torch.contiguous_format, torch.channels_last)
    )


def _summary(repeats: list[int]) -> str:
    """Summarise how many parameters have each count, e.g. `1 x1, 99 x3, 4 x4`."""
    return ", ".join(f"{repeats.count(count)} x{count}" for count in sorted(set(repeats))) or "none"
