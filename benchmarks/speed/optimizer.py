"""One step of SGD on ResNet-101 as in the released code: three or four updates of most of the backbone.

- `RepeatedSGD`: the library's implementation of the repetitions.
- `plain foreach`, `plain fused`, `plain loop`: `torch.optim.SGD` on each parameter once, a third of the arithmetic.
- `repeated foreach`: one plain foreach step per repetition.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from benchmarks.speed.common import compare
from crossmix.models import deeplab_v2_resnet101
from crossmix.optim import RepeatedSGD, parameter_groups


def network(device: str) -> nn.Module:
    model = deeplab_v2_resnet101(19).to(device)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return model


def plain(params: Iterable[Any], *, foreach: bool = False, fused: bool = False) -> torch.optim.SGD:
    return torch.optim.SGD(params, 1e-4, 0.9, weight_decay=5e-4, foreach=foreach, fused=fused)


def repeated(model: nn.Module) -> RepeatedSGD:
    return RepeatedSGD(parameter_groups(model, 1e-4, repeated=True), momentum=0.9, weight_decay=5e-4)


def stepwise(model: nn.Module) -> Callable[[], None]:
    """One plain optimizer per repetition: all parameters, then those with more than one, and so on."""
    groups = repeated(model).param_groups
    counts = [entry for group in groups for entry in zip(group["params"], group["repeats"], strict=True)]
    most = max(count for _, count in counts)
    steps = [plain([p for p, count in counts if count > i], foreach=True).step for i in range(most)]

    def step() -> None:
        for one in steps:
            one()

    return step


def measure(device: str, rounds: int, *, quick: bool) -> dict[str, dict[str, float]]:  # noqa: ARG001 - quick enough
    torch.manual_seed(0)
    one, two = network(device), network(device)
    candidates: dict[str, Callable[[], object]] = {
        "plain foreach": plain(parameter_groups(one, 1e-4), foreach=True).step,
        "plain fused": plain(parameter_groups(one, 1e-4), fused=True).step,
        "plain loop": plain(parameter_groups(one, 1e-4)).step,
        "RepeatedSGD": repeated(two).step,
        "repeated foreach": stepwise(two),
    }
    return compare("one step, 43.8 million parameters", candidates, "plain foreach", rounds=rounds, device=device)
