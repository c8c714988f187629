"""Averages and training loops of other packages."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checks import needed
from crossmix import MeanTeacher, recipes
from oracles import seeded, small_network

C = 5
pytestmark = pytest.mark.filterwarnings("ignore")


def data() -> tuple[Tensor, Tensor, Tensor]:
    source, target = torch.rand(2, 2, 3, 16, 16, generator=seeded(0))
    return source, torch.randint(0, C, (2, 16, 16), generator=seeded(1)), target


def trained(network: nn.Module, teacher: Any) -> list[Tensor]:
    """The losses of a few steps."""
    training = recipes.self_training(network, C, teacher=teacher, augment=None, threshold=0.2).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses = []
    for step in range(4):
        output = training(*data(), generator=seeded(step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        training.update()
        losses.append(output.loss.detach())
    return losses


@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
def test_timm__is_a_teacher_and_equals_ours_of_the_same_options(version: str) -> None:
    kind = getattr(needed("timm.utils"), version)
    ours, theirs = small_network(C), small_network(C)
    ema = kind(theirs, decay=0.8)
    mine = MeanTeacher(ours, decay=0.8, warmup=False, buffers="average", mode="eval")
    torch.testing.assert_close(trained(ours, mine), trained(theirs, ema))
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(mine.module.state_dict()[name], value)


@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
def test_accelerate__teacher_follows_the_steps_that_happen(when: str) -> None:
    accelerator = needed("accelerate").Accelerator(cpu=True, gradient_accumulation_steps=2)
    network = small_network(C)
    optimizer: Any = torch.optim.SGD(network.parameters(), lr=0.1)
    training = recipes.self_training(network, C).train()
    if when == "before prepare":
        training.teacher.follow(optimizer, network)
    prepared, optimizer = accelerator.prepare(network, optimizer)
    if when == "after prepare":
        training.teacher.follow(optimizer, prepared)
    for _ in range(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(training(*data()).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert training.teacher.num_updates == 2


def test_lightning__teacher_follows_its_wrapped_optimizer() -> None:
    wrapper = needed("lightning.pytorch.core.optimizer").LightningOptimizer
    network = small_network(C)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    teacher = MeanTeacher(network)
    handle = teacher.follow(wrapper(optimizer), network)
    network(data()[0]).sum().backward()
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert teacher.num_updates == 1
