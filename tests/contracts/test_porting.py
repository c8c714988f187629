"""What docs/porting.md says: iterations of other code, restated in loops, are ours for the same draws."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crossmix import SelfTraining, recipes
from crossmix import functional as F
from crossmix.metrics import ConfusionMatrix
from crossmix.optim import RepeatedSGD, parameter_groups, poly_lr
from crossmix.self_training import SelfTrainingDraw
from oracles import (
    SlowNetwork,
    augment_one_by_one,
    classes_by_loop,
    cross_entropy_by_loop,
    mask_by_loop,
    mean_cross_entropy,
    paste,
    seeded,
    softmax,
    with_batch_statistics,
)

C, N, H, W = 5, 2, 16, 14
SURE = 0.968
Parameters = dict[str, Tensor]
Data = tuple[Tensor, Tensor, Tensor]


class Nested(nn.Module):
    """A network in a stage, so that the released code lists its convolution twice; BatchNorm's affine is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stage = SlowNetwork(C).double()
        with torch.no_grad():
            self.stage.head.weight.mul_(12)
        self.stage.norm.requires_grad_(requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.stage(images)
        return logits


def parameters(network: nn.Module) -> Parameters:
    named = network.named_parameters()
    return {name.removeprefix("stage."): p.detach().clone().requires_grad_(p.requires_grad) for name, p in named}


def data(seed: int) -> Data:
    g = seeded(seed)
    labels = torch.randint(0, C, (N, H, W), generator=g)
    labels[0][labels[0] == 1] = 3  # so that the batch has a class that an image lacks
    labels[torch.rand(labels.shape, generator=g) < 0.2] = 255
    source, target = torch.rand(2, N, 3, H, W, generator=g, dtype=torch.float64)
    return source, labels, target


def ones(count: int = N) -> Tensor:
    return torch.ones(count, H, W, dtype=torch.float64)


def teachers_view(teacher: Parameters, target: Tensor) -> tuple[Tensor, Tensor]:
    """Soft predictions on batch statistics, and q, one number for the batch."""
    probs = softmax(with_batch_statistics(teacher, target)).detach()
    return probs, (probs.max(1).values >= SURE).double().mean()


def dacs(student: Parameters, teacher: Parameters, batch: Data, draw: SelfTrainingDraw) -> Tensor:
    """255 is one of the classes, half rounded up; q on target pixels, 1 on source pixels; all pixels divide."""
    source, labels, target = batch
    source_loss = mean_cross_entropy(with_batch_statistics(student, source), labels, ones(), int((labels != 255).sum()))
    probs, q = teachers_view(teacher, target)
    mask = mask_by_loop(labels, classes_by_loop(labels, C, draw.scores, 0.5, 255, ignored=True), 255)
    images, mixed, weights = paste((source, labels, ones()), (target, probs.argmax(1), q * ones()), mask)
    images = augment_one_by_one(images, draw.augment, "additive")
    return source_loss + mean_cross_entropy(with_batch_statistics(student, images), mixed, weights, N * H * W)


def classmix(student: Parameters, teacher: Parameters, batch: Data, draw: SelfTrainingDraw) -> Tensor:
    """Classes of predictions, half rounded down; image i onto i + 1; soft maps are mixed, q is of the mixed ones."""
    source, labels, target = batch
    source_loss = mean_cross_entropy(with_batch_statistics(student, source), labels, ones(), int((labels != 255).sum()))
    probs, _ = teachers_view(teacher, target)
    predicted = probs.argmax(1)
    images, soft = torch.empty_like(target), torch.empty_like(probs)
    for i in range(N):
        present = sorted(predicted[i].unique().tolist(), key=lambda c: float(draw.scores[i, c]))
        chosen = present[: len(present) // 2]
        for row, column in np.ndindex(H, W):
            j = i if int(predicted[i, row, column]) in chosen else (i + 1) % N
            images[i, :, row, column], soft[i, :, row, column] = target[j, :, row, column], probs[j, :, row, column]
    confidence, mixed = soft.max(1)
    q = (confidence >= SURE).double().mean()
    images = augment_one_by_one(images, draw.augment, "additive")
    return source_loss + mean_cross_entropy(with_batch_statistics(student, images), mixed, q * ones(), N * H * W)


def mic(student: Parameters, teacher: Parameters, batch: Data, draw: SelfTrainingDraw) -> Tensor:
    """Classes of the whole batch; all pixels divide everywhere; rows without weight; hidden blocks of the target."""
    source, labels, target = batch
    source_loss = mean_cross_entropy(with_batch_statistics(student, source), labels, ones(), N * H * W)
    probs, q = teachers_view(teacher, target)
    weights = q * ones()
    weights[:, :2] = weights[:, -3:] = 0  # 64 and 96 of 512 rows
    whole = labels.reshape(1, N * H, W)
    classes = torch.cat([classes_by_loop(whole, C, draw.scores[i : i + 1], 0.5, 255, ignored=True) for i in range(N)])
    parts = paste((source, labels, ones()), (target, probs.argmax(1), weights), mask_by_loop(labels, classes, 255))
    images = augment_one_by_one(parts[0], draw.augment, "additive")
    mixed_loss = mean_cross_entropy(with_batch_statistics(student, images), parts[1], parts[2], N * H * W)
    hidden = augment_one_by_one(target, draw.consistency_augment, "additive")
    for i, row, column in np.ndindex(N, H, W):
        if float(draw.consistency[i, row // 4, column // 4]) < 0.7:
            hidden[i, :, row, column] = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
    hidden_loss = mean_cross_entropy(with_batch_statistics(student, hidden), probs.argmax(1), weights, N * H * W)
    return source_loss + mixed_loss + hidden_loss


DAFORMER = {
    "recipe": "mic", "whole_batch": True, "include_ignored": True, "source_normalizer": "all", "start": 1,
    "flavor": "additive", "same_on_batch": True, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.2,
    "consistency_block": 4, "ignore_top": 64, "ignore_bottom": 96,
}  # fmt: skip
CODE: dict[str, tuple[Callable[..., Tensor], dict[str, object], Callable[[int], float]]] = {
    "DACS": (dacs, {"recipe": "released"}, lambda step: min(1 - 1 / (step + 1), 0.99)),
    "ClassMix": (
        classmix,
        {"method": "classmix", "recipe": "released", "weigh": "mixed", "rounding": "floor"},
        lambda step: min(1 - 1 / (step + 1), 0.99),
    ),
    # Updated at the start of step + 1, with the number of that step.
    "DAFormer and MIC": (mic, DAFORMER, lambda step: min(1 - 1 / (step + 2), 0.999)),
}


@pytest.mark.parametrize("name", CODE)
def test_iterations__are_theirs_for_the_same_draws(name: str) -> None:
    iteration, options, alpha = CODE[name]
    network = Nested()
    training: SelfTraining = recipes.self_training(network, C, **options).train()  # type: ignore[arg-type]
    optimizer = RepeatedSGD(
        parameter_groups(network, 0.02, head="stage.head", repeated=True), momentum=0.9, weight_decay=5e-4
    )
    student, teacher = parameters(network), parameters(network)
    velocity = {key: torch.zeros_like(value) for key, value in student.items()}
    trained = [key for key, value in student.items() if value.requires_grad]
    lambdas = []
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = poly_lr(step, 10, group["initial_lr"])
        batch, draw = data(step), training.sample(N, (H, W), generator=seeded(50 + step))
        output = training(*batch, draw=draw)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        training.update()
        lambdas.append(float(output.target_weight))

        loss = iteration(student, teacher, batch, draw)
        torch.testing.assert_close(output.loss, loss, rtol=1e-7, atol=1e-7)  # their blur has 51 taps
        gradients = dict(zip(trained, torch.autograd.grad(loss, [student[key] for key in trained]), strict=True))
        for key, gradient in gradients.items():
            head = key.startswith("head")
            rate = (0.2 if head else 0.02) * (1 - step / 10) ** 0.9
            with torch.no_grad():
                for _ in range(1 if head else 2):  # the convolution is in two modules below the network
                    velocity[key] = 0.9 * velocity[key] + gradient + 5e-4 * student[key]
                    student[key] -= rate * velocity[key]
        decay = alpha(step)
        teacher = {key: decay * value + (1 - decay) * student[key].detach() for key, value in teacher.items()}
        for ours, theirs in ((network, student), (training.teacher.module, teacher)):
            for key, value in parameters(ours).items():
                torch.testing.assert_close(value.detach(), theirs[key].detach(), rtol=1e-7, atol=1e-8)
    assert any(0.05 < value < 0.95 for value in lambdas)  # q was no trivial 0 or 1


@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_mmsegmentation__source_loss_is_of_upsampled_logits(avg_non_ignore: bool) -> None:
    g = seeded(0)
    logits = torch.randn(N, C, 4, 4, generator=g, dtype=torch.float64)
    labels = data(0)[1]
    full = nn.functional.interpolate(logits, size=(H, W), mode="bilinear", align_corners=False)
    normalizer = "valid" if avg_non_ignore else "all"
    want = cross_entropy_by_loop(full, labels, None, 255, normalizer, 0.0)
    got = F.upsampled_cross_entropy(logits, labels, align_corners=False, normalizer=normalizer)  # type: ignore[arg-type]
    assert float(got) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("power", [0.9, 1.0])
def test_mmsegmentation__schedule_is_poly_with_a_linear_warmup(power: float) -> None:
    """mmcv's hook: base (1 - step / steps)^power, while warming up times 1 - (1 - step / warmup) (1 - ratio)."""
    for step in (0, 1, 7, 9, 10, 11, 50, 99):
        lr = 6e-5 * (1 - step / 100) ** power
        if step < 10:
            lr *= 1 - (1 - step / 10) * (1 - 1e-6)
        assert poly_lr(step, 100, 6e-5, power=power, warmup=10, warmup_ratio=1e-6) == pytest.approx(lr, rel=1e-12)


def test_mmsegmentation__scores_are_of_all_images_together() -> None:
    matrix, hits, unions, right, seen = ConfusionMatrix(C), [0] * C, [0] * C, 0, 0
    for seed in range(3):
        labels = data(seed)[1]
        predictions = torch.randint(0, C - 1, labels.shape, generator=seeded(seed))  # one class is never predicted
        matrix.update(predictions, labels)
        for truth, guess in zip(labels.flatten().tolist(), predictions.flatten().tolist(), strict=True):
            if truth != 255:
                seen, right = seen + 1, right + (truth == guess)
                hits[truth] += truth == guess
                for c in {truth, guess}:
                    unions[c] += 1
    scores = matrix.compute()
    assert scores.mean == pytest.approx(sum(h / u for h, u in zip(hits, unions, strict=True)) / C)
    assert scores.pixel_accuracy == pytest.approx(right / seen)
