"""Parameter groups, the repeated SGD of the released code, and the learning rate schedule of DeepLab-v2 training."""

from collections.abc import Callable, Iterable
from itertools import chain, repeat
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

__all__ = ["RepeatedSGD", "parameter_groups", "poly_lr"]


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    head: str = "layer5",
    head_multiplier: float = 10.0,
    repeated: bool = False,
) -> list[dict[str, Any]]:
    """Split trainable parameters into backbone and head, the head learning ten times as fast.

    The released code lists a parameter of the backbone once for each submodule around it: in ResNet-101 the stem once,
    a bottleneck's convolutions three times (stage, bottleneck, convolution) and those of `downsample` four times, 314
    entries for 104 tensors. Its optimizer stepped each entry. `repeated=True` makes that list, for `RepeatedSGD`.

    Args:
        model: A `crossmix.models.DeepLabV2`, or any network with a submodule named `head`.
        lr: Learning rate of the backbone; 2.5e-4 in the paper.
        head: Name of the submodule that is the head.
        head_multiplier: The head's learning rate over the backbone's.
        repeated: Whether to list the backbone's parameters as often as the released code does.

    Returns:
        Two groups for a torch optimizer, backbone first, each with `lr` and the same as `initial_lr`, which a schedule
        starts from. Parameters without `requires_grad` are left out: the frozen scale and shift of BatchNorm.

    Raises:
        ValueError: If there is no such submodule.

    Example:
        >>> from crossmix.models import deeplab_v2_tiny
        >>> [group["lr"] for group in parameter_groups(deeplab_v2_tiny(), 0.01)]
        [0.01, 0.1]
    """
    try:
        in_head = set(model.get_submodule(head).parameters())
    except AttributeError:
        names = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"`head` must name a submodule of the model, got {head!r}; it has {names}.") from None
    listed: Iterable[Tensor] = model.parameters()
    if repeated:
        inside = [module.parameters() for module in model.modules() if module is not model]
        listed = chain(model.parameters(recurse=False), *inside)
    backbone = [parameter for parameter in listed if parameter.requires_grad and parameter not in in_head]
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter in in_head]
    return [
        {"params": backbone, "lr": lr, "initial_lr": lr},
        {"params": rest, "lr": head_multiplier * lr, "initial_lr": head_multiplier * lr},
    ]


class RepeatedSGD(torch.optim.SGD):
    """SGD that updates a parameter once for each time that its group lists it, as the released code did.

    With a parameter listed k times, one step is, with the same gradient g,

        k times:  v <- momentum * v + g + weight_decay * p;  p <- p - lr * v

    so that the published bottlenecks learned three times, and the projections four times, as fast as the learning rate
    says, with a shorter memory. `torch.optim.SGD` no longer does this for a parameter listed twice: it warns, its first
    step starts every repetition from an empty buffer, and its multi-tensor kernels update one tensor from two places at
    once. Here the repetitions are runs of torch's own kernel, fused where there is one, over ever fewer parameters.
    Listing no parameter twice makes it plain SGD.

    Args:
        params: Parameters or groups, such as `parameter_groups(model, lr, repeated=True)`.
        lr: Learning rate of groups without one of their own. In a group it can be a tensor on the device of the
            parameters: a captured step then follows it.
        momentum: Momentum factor; 0.9 in the paper.
        weight_decay: L2 penalty, applied at every repetition; 5e-4 in the paper.
        nesterov: Whether to use Nesterov momentum: the paper's text does, the released code does not.

    State:
        `momentum_buffer` per parameter, and in each group `params` without repetition and `repeats`, how often each was
        listed. A state_dict of the released code's optimizer, with its repeated ids, can be loaded.

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
        """Add a group, counting how often it lists each parameter.

        Args:
            param_group: `params`, with repetitions, and options that differ from the optimizer's.

        Raises:
            ValueError: If a parameter is in another group already.
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
        """Update the parameters that have a gradient.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What `closure` returned, or None.
        """
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
        """Restore momentum buffers and options.

        Args:
            state_dict: Of a `RepeatedSGD`, or the `optimizer` entry of a released checkpoint.

        Raises:
            ValueError: If it has other groups, or updates a parameter another number of times per step.
        """
        groups = [_counted(group) for group in state_dict["param_groups"]]
        for own, saved in zip(self.param_groups, groups, strict=False):  # torch refuses another number of groups
            if own["repeats"] != saved["repeats"]:
                raise ValueError(
                    f"`state_dict` must update every parameter as often per step as this optimizer: expected "
                    f"{_summary(own['repeats'])}, got {_summary(saved['repeats'])}; build the groups with "
                    f"`parameter_groups(..., repeated={max(saved['repeats'], default=1) > 1})`."
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
            fused=True if alike else None,  # None: what torch takes by default
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            has_sparse_grad=any(grad.is_sparse for grad in grads),
        )

    def _buffer(self, parameter: Tensor) -> Tensor:
        """The momentum, which starts from zero: the first update is the gradient itself."""
        state = self.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return cast("Tensor", state["momentum_buffer"])


def poly_lr(step: int, total: int, base: float, *, power: float = 0.9) -> float:
    """Compute the learning rate of a step under polynomial decay.

    base * (1 - step / total) ** power

    Args:
        step: Optimizer steps finished before this one, from 0.
        total: Steps of the whole run.
        base: Learning rate at step 0.
        power: Exponent; 0.9 in the paper.

    Returns:
        The learning rate.

    Raises:
        ValueError: If `step` does not lie in 0..total.

    Example:
        >>> poly_lr(0, 100, 2.5e-4), poly_lr(100, 100, 2.5e-4)
        (0.00025, 0.0)
    """
    if not 0 <= step <= total or total < 1:
        raise ValueError(f"`step` must lie in 0..total = {total}, got {step}; count finished steps from 0.")
    return float(base * (1 - step / total) ** power)


def _counted(group: dict[str, Any]) -> dict[str, Any]:
    """Copy a group with each of `params`, tensors or the ids of a state_dict, once and its count in `repeats`."""
    if group.get("dampening"):
        raise ValueError(f"`dampening` must be 0 for RepeatedSGD, got {group['dampening']}; use torch.optim.SGD.")
    counts: dict[Any, int] = {}
    for parameter, count in zip(group["params"], group.get("repeats", repeat(1)), strict=False):
        counts[parameter] = counts.get(parameter, 0) + count
    return {**group, "params": list(counts), "repeats": list(counts.values())}


def _fusible(parameter: Tensor, grad: Tensor, buffer: Tensor | None) -> bool:
    """Whether the fused kernel can be used: it walks through the memory of all three without looking at strides."""
    tensors = [parameter, grad] if buffer is None else [parameter, grad, buffer]
    if parameter.device.type not in {"cpu", "cuda"} or not parameter.is_floating_point():
        return False
    if any(tensor.layout is not torch.strided or tensor.dtype is not parameter.dtype for tensor in tensors):
        return False
    return any(
        all(tensor.is_contiguous(memory_format=form) for tensor in tensors)
        for form in (torch.contiguous_format, torch.channels_last)
    )


def _summary(repeats: list[int]) -> str:
    """How many parameters there are of each count, such as `1 x1, 99 x3, 4 x4`."""
    return ", ".join(f"{repeats.count(count)} x{count}" for count in sorted(set(repeats))) or "none"
