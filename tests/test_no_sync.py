"""Nothing in a training step makes the host wait for the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from crossmix import functional as F
from crossmix import recipes
from crossmix._cross_entropy import sum_by_blocks
from crossmix.diagnostics import PseudoLabelMonitor
from oracles import seeded

WAITING = ("local_scalar_dense", "nonzero", "unique", "masked_select", "bincount", "equal", "is_nonzero", "item")
C = 7


class NoSync(TorchDispatchMode):
    """Fail on operations that a GPU would have to finish before the host goes on."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        name = func.name().removeprefix("aten::").partition(".")[0].lstrip("_")
        assert not any(name.startswith(word) for word in WAITING), f"{name} waits for the device"
        if name in {"index", "index_put", "index_put_"}:
            indices = args[1]
            assert not any(i is not None and i.dtype in {torch.bool, torch.uint8} for i in indices), (
                "boolean indexing waits"
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: float(x[0]),
    ],
    ids=["item", "bool", "boolean index", "nonzero", "unique", "masked_select", "float"],
)
def test_the_guard_itself(wait: Callable[[Tensor], object]) -> None:
    with pytest.raises(AssertionError, match="waits"), NoSync():
        wait(torch.rand(5))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, C, 1))


@pytest.mark.parametrize("recipe", ["released", "paper"])
@pytest.mark.parametrize("method", recipes.METHODS)
def test_self_training__a_whole_step(method: str, recipe: str) -> None:
    student = network()
    training = recipes.self_training(student, C, method=method, recipe=recipe).train()
    images = torch.rand(2, 3, 12, 16, generator=seeded(0))
    labels = torch.randint(0, C, (2, 12, 16), generator=seeded(1), dtype=torch.uint8)
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, foreach=True)
    with NoSync():
        for _ in range(2):
            if training.align is not None:
                training.align.update_prior(labels)
            output = training(images, labels, images.flip(0), target_weights=torch.ones(2, 12, 16))
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            training.update()


@pytest.mark.parametrize("num_classes", [C, 40])
def test_functional(num_classes: int) -> None:
    labels = torch.randint(0, num_classes, (2, 9, 9))
    logits, images = torch.randn(2, num_classes, 9, 9), torch.rand(2, 3, 9, 9)
    prior = torch.full((num_classes,), 1 / num_classes)
    averaged, current = [torch.rand(3), torch.tensor(1)], [torch.rand(3), torch.tensor(2)]
    with NoSync():
        classes = F.sample_classes(labels, num_classes, include_ignored=True)
        mask = F.class_mask(labels, classes)
        F.mix(images, images.flip(0), mask)
        pseudo = F.pseudo_label_from_probs(F.align_distribution(logits.softmax(1), prior, prior))
        for scope in ("image", "batch", "pixel", "none"):
            weights = F.confidence_weight(F.pseudo_label(logits).confidence, scope=scope)
            for normalizer in ("all", "valid", "weights"):
                F.weighted_cross_entropy(logits, pseudo.labels, weights, normalizer=normalizer)
                F.upsampled_cross_entropy(logits[..., :3, :3], labels, weights, normalizer=normalizer)
        F.ema_update_(averaged, current, 0.9)
        for smoothing in (0.0, 0.1):  # the guard does not see into the operator
            sum_by_blocks(
                logits[..., :3, :3],
                labels,
                labels / num_classes,
                ignore_index=255,
                label_smoothing=smoothing,
                with_gradient=True,
            )


def test_pseudo_label_monitor() -> None:
    labels = torch.randint(0, C + 2, (2, 9, 9))
    pseudo = F.pseudo_label(torch.randn(2, C, 9, 9))
    monitor = PseudoLabelMonitor(C)
    with NoSync():
        monitor.update(*pseudo)
        monitor.update(*pseudo, truth=labels.to(torch.uint8), student=labels)
        monitor.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", recipes.METHODS)
def test_cuda__sync_debug_mode(method: str) -> None:
    student = network().cuda()
    training = recipes.self_training(student, C, method=method).cuda().train()
    monitor = PseudoLabelMonitor(C).cuda()
    images = torch.rand(2, 3, 64, 64, device="cuda")
    labels = torch.randint(0, C, (2, 64, 64), device="cuda", dtype=torch.uint8)
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, foreach=True)
    for attempt in range(3):
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")  # the first step may allocate and tune
        try:
            output = training(images, labels, images.flip(0))
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            training.update()
            if output.mixed is not None and output.confidence is not None:
                monitor.update(output.mixed.labels, output.confidence, truth=labels, student=labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
