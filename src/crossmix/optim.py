"""Parameter groups and the learning rate schedule of DeepLab-v2 training."""

from typing import Any

from torch import nn

__all__ = ["parameter_groups", "poly_lr"]


def parameter_groups(
    model: nn.Module, lr: float, *, head: str = "layer5", head_multiplier: float = 10.0
) -> list[dict[str, Any]]:
    """Split trainable parameters into backbone and head, the head learning ten times as fast.

    Args:
        model: A `crossmix.models.DeepLabV2`, or any network with a submodule named `head`.
        lr: Learning rate of the backbone; 2.5e-4 in the paper.
        head: Name of the submodule that is the head.
        head_multiplier: The head's learning rate over the backbone's.

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
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    backbone = [parameter for parameter in trainable if parameter not in in_head]
    rest = [parameter for parameter in trainable if parameter in in_head]
    return [
        {"params": backbone, "lr": lr, "initial_lr": lr},
        {"params": rest, "lr": head_multiplier * lr, "initial_lr": head_multiplier * lr},
    ]


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
