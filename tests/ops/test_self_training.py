"""The algorithm: whole steps against slow restatements, and every configuration."""

import copy
import inspect
import math
import operator
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from crossmix import (
    BoxMasks,
    ClassMix,
    ConfidenceWeightedCE,
    CowMasks,
    CrossDomainMix,
    DistributionAlignment,
    MaskedImages,
    MeanTeacher,
    Mixed,
    SelfTraining,
    StrongAugment,
    recipes,
)
from crossmix import functional as F
from crossmix.models import deeplab_v2_tiny
from crossmix.self_training import SelfTrainingDraw
from oracles import (
    SlowNetwork,
    augment_one_by_one,
    classes_by_loop,
    mask_by_loop,
    mean_cross_entropy,
    paste,
    seeded,
    softmax,
    with_batch_statistics,
)

C, N, H, W = 5, 2, 6, 7
THRESHOLD = 0.968


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = seeded(seed)
    labels = torch.randint(0, C, (N, H, W), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.2] = 255
    source, target = torch.rand(2, N, 3, H, W, generator=g)
    return source.to(dtype), labels, target.to(dtype)


def confident_network(dtype: torch.dtype = torch.float64) -> SlowNetwork:
    """Random, with logits large enough that about half of the pixels are confident."""
    torch.manual_seed(3)
    network = SlowNetwork(C).to(dtype)
    with torch.no_grad():
        network.head.weight.mul_(12)
    return network


def slow_step(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    data: tuple[Tensor, Tensor, Tensor],
    scores: Tensor,
    paper: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One iteration: facts of the released code, or the paper's text. Returns the loss and what it is made of."""
    source, labels, target = data
    source_logits = with_batch_statistics(student, source)
    valid = labels != 255
    source_loss = mean_cross_entropy(
        source_logits, labels, torch.ones_like(labels, dtype=source.dtype), N * H * W if paper else int(valid.sum())
    )
    probs = softmax(with_batch_statistics(teacher, target)).detach()
    confidence, pseudo = probs.max(1)
    sure = (confidence >= THRESHOLD).to(source.dtype)
    lam = torch.stack([sure[i].mean() for i in range(N)]) if paper else sure.mean().expand(N)
    classes = classes_by_loop(labels, C, scores, 0.5, 255, ignored=not paper)
    mask = mask_by_loop(labels, classes, 255)
    target_weights = lam[:, None, None].expand(N, H, W)
    source_weights = target_weights if paper else torch.ones(N, H, W, dtype=source.dtype)
    images, mixed_labels, weights = paste((source, labels, source_weights), (target, pseudo, target_weights), mask)
    mixed_loss = mean_cross_entropy(with_batch_statistics(student, images), mixed_labels, weights, N * H * W)
    parts = {"images": images, "labels": mixed_labels, "weights": weights, "confidence": confidence}
    return source_loss + mixed_loss, {**parts, "source": source_loss, "mixed": mixed_loss}


@pytest.mark.parametrize("recipe", ["released", "paper"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-6)])
def test_training__equals_the_slow_reference_over_steps(recipe: str, dtype: torch.dtype, tolerance: float) -> None:
    paper = recipe == "paper"
    network = confident_network(dtype)
    training = recipes.self_training(network, C, recipe=recipe).train()
    training.augment = None
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)

    slow = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    slow_optimizer = torch.optim.SGD(slow.values(), 0.05, momentum=0.9)
    teacher = {name: p.detach().clone() for name, p in slow.items()}
    lambdas = set()
    for step in range(5):
        data = batch(step, dtype)
        draw = training.sample(N, generator=seeded(50 + step))
        assert draw.scores is not None
        output = training(*data, draw=draw)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        training.update()

        loss, parts = slow_step(slow, teacher, data, draw.scores, paper)
        slow_optimizer.zero_grad()
        loss.backward()
        slow_optimizer.step()
        alpha = 0.0 if paper else min(1 - 1 / (step + 1), 0.99)
        for name, value in teacher.items():
            value.copy_(alpha * value + (1 - alpha) * slow[name].detach())

        def close(a: Tensor, b: Tensor) -> None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

        close(output.loss.detach(), loss.detach())
        close(output.source_loss.detach(), parts["source"].detach())
        close(output.mixed_loss.detach(), parts["mixed"].detach())
        assert output.mixed is not None
        assert output.confidence is not None
        close(output.mixed.images, parts["images"])
        close(output.mixed.weights, parts["weights"])
        close(output.confidence, parts["confidence"])
        assert torch.equal(output.mixed.labels, parts["labels"].long())
        lambdas |= set(output.mixed.weights.flatten().tolist())
        for name, p in network.named_parameters():
            close(p.detach(), slow[name].detach())
        assert training.teacher is not None
        for name, p in training.teacher.module.named_parameters():
            close(p, teacher[name])
    assert any(0.05 < value < 0.95 for value in lambdas)  # the weights were no trivial 0 or 1


def slow_mic_gradients(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    data: tuple[Tensor, Tensor, Tensor],
    draw: SelfTrainingDraw,
    allowed: Tensor,
    block: int,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Masked image consistency in three separate passes, each backpropagated by itself: losses and gradients."""
    source, labels, target = data
    assert draw.scores is not None
    assert draw.augment is not None
    assert draw.consistency is not None
    assert draw.consistency_augment is not None
    probs = softmax(with_batch_statistics(teacher, target)).detach()
    confidence, pseudo = probs.max(1)
    lam = (confidence >= THRESHOLD).to(source.dtype).mean()  # of the batch, ignored rows included
    weights = lam * allowed.clone()
    weights[:, : round(100 / 512 * H)] = 0
    weights[:, H - round(120 / 512 * H) :] = 0
    mask = mask_by_loop(labels, classes_by_loop(labels, C, draw.scores, 0.5, 255, ignored=False), 255)
    images, mixed_labels, mixed_weights = paste(
        (source, labels, torch.ones_like(weights)), (target, pseudo, weights), mask
    )
    jittered = augment_one_by_one(target, draw.consistency_augment, "torchvision")
    hidden = jittered.clone()
    for i, channel, row, column in np.ndindex(*hidden.shape):
        if float(draw.consistency[i, row // block, column // block]) < 0.7:
            hidden[i, channel, row, column] = (0.485, 0.456, 0.406)[channel]
    passes = (
        (source, labels, torch.ones_like(weights), int((labels != 255).sum())),
        (augment_one_by_one(images, draw.augment, "torchvision"), mixed_labels.long(), mixed_weights, N * H * W),
        (hidden, pseudo, weights, N * H * W),
    )
    losses, gradients = {}, [torch.zeros_like(p) for p in student.values()]
    for name, (seen, truth, pixel_weights, divisor) in zip(("source", "mixed", "consistency"), passes, strict=True):
        loss = mean_cross_entropy(with_batch_statistics(student, seen), truth, pixel_weights, divisor)
        for total, gradient in zip(gradients, torch.autograd.grad(loss, list(student.values())), strict=True):
            total.add_(gradient)
        losses[f"{name}_loss"] = loss.detach()
    return losses, gradients


@pytest.mark.parametrize("one_by_one", [False, True])
def test_mic__equals_the_slow_reference_over_steps(one_by_one: bool) -> None:
    network = confident_network()
    training = recipes.self_training(network, C, recipe="mic", ignore_top=100, consistency_block=2).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    slow = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    teacher = {name: p.detach().clone() for name, p in slow.items()}
    for step in range(4):
        data, allowed = batch(step), torch.rand(N, H, W, generator=seeded(step), dtype=torch.float64)
        draw = training.sample(N, (H, W), generator=seeded(50 + step))
        optimizer.zero_grad()
        if one_by_one:
            losses = {}
            for name, loss in training.terms(*data, target_weights=allowed, draw=draw):
                loss.backward()
                losses[name] = loss.detach()
        else:
            output = training(*data, target_weights=allowed, draw=draw)
            output.loss.backward()
            losses = {name: getattr(output, name).detach() for name in slow_names(output)}
            torch.testing.assert_close(output.loss.detach(), torch.stack(list(losses.values())).sum())
        want, gradients = slow_mic_gradients(slow, teacher, data, draw, allowed, 2)
        assert list(losses) == list(want)
        torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-6)  # kornia's blur has 51 taps
        got = [p.grad for p in network.parameters()]
        torch.testing.assert_close(got, gradients, rtol=1e-4, atol=1e-5)
        assert float(want["consistency_loss"]) > 1e-3
        optimizer.step()
        training.update()
        with torch.no_grad():
            alpha = min(1 - 1 / (step + 1), 0.999)
            for (name, value), gradient in zip(slow.items(), gradients, strict=True):
                value.sub_(0.05 * gradient)
                teacher[name].mul_(alpha).add_((1 - alpha) * value)


def slow_names(output: object) -> list[str]:
    return [name for name in ("source_loss", "mixed_loss", "consistency_loss") if hasattr(output, name)]


@pytest.mark.parametrize("weigh", ["target", "mixed"])
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("method", ["pseudo-label", "classmix", "alignment", "dacs"])
def test_consistency__is_the_loss_on_hidden_target_images(method: str, upsample: bool, weigh: str) -> None:
    """With every method; the teacher's one pass serves both terms, and the rest of the step stays as it is."""
    torch.manual_seed(0)
    network = deeplab_v2_tiny(C, upsample=not upsample).double()
    options = {"upsample": upsample, "weigh": weigh, "threshold": 0.25, "consistency_block": 16}
    training = recipes.self_training(network, C, method=method, recipe="mic", **options).train()
    plain = copy.deepcopy(training)
    plain.consistency = None
    source, target = torch.rand(2, N, 3, 45, 52, dtype=torch.float64, generator=seeded(0))
    labels = torch.randint(0, C, (N, 45, 52), generator=seeded(1), dtype=torch.uint8)
    allowed = torch.rand(N, 45, 52, generator=seeded(2), dtype=torch.float64)
    draw = training.sample(N, (45, 52), generator=seeded(3))
    student = copy.deepcopy(training.student)
    asked: list[Tensor] = []
    training.teacher.register_forward_pre_hook(lambda _, args: asked.append(args[0]))
    output = training(source, labels, target, target_weights=allowed, draw=draw)
    assert len(asked) == 1
    assert asked[0] is target
    without = plain(source, labels, target, target_weights=allowed, draw=draw)
    for name in ("source_loss", "mixed_loss", "confidence", "target_weight"):
        assert torch.equal(getattr(output, name), getattr(without, name))
    assert float(without.consistency_loss) == 0
    torch.testing.assert_close(output.loss, without.loss + output.consistency_loss)

    hide = MaskedImages(16)
    images = hide(training.consistency_augment(target, draw=draw.consistency_augment), scores=draw.consistency)
    probs = F.pseudo_label_from_probs(
        align_if_there(
            training,
            nn.functional.interpolate(training.teacher(target), (45, 52), mode="bilinear", align_corners=True).softmax(
                1
            ),
        )
    )
    weights = F.confidence_weight(probs.confidence, 0.25, scope="batch") * allowed
    weights[:, : round(15 / 512 * 45)] = 0
    weights[:, 45 - round(120 / 512 * 45) :] = 0
    assert 0 < int((weights > 0).sum()) < weights.numel()
    logits = nn.functional.interpolate(student(images), (45, 52), mode="bilinear", align_corners=True)
    want = (nn.functional.cross_entropy(logits, probs.labels, reduction="none") * weights).mean()
    torch.testing.assert_close(output.consistency_loss, want, rtol=1e-9, atol=1e-12)


def align_if_there(training: SelfTraining, probs: Tensor) -> Tensor:
    aligned: Tensor = probs if training.align is None else training.align(probs)
    return aligned


def test_consistency__weight_is_a_factor_of_loss_and_gradient() -> None:
    data = batch(1)
    training = build("dacs", recipe="mic", consistency_block=2)
    draw = training.sample(N, (H, W), generator=seeded(2))
    losses, gradients = [], []
    for weight in (0.0, 1.0, 0.5):
        training = build("dacs", recipe="mic", consistency_block=2, consistency_weight=weight)
        output = training(*data, draw=draw)
        output.loss.backward()
        losses.append(output.consistency_loss.detach())
        gradients.append([p.grad for p in training.student.parameters()])
    assert float(losses[0]) == 0 < float(losses[1])
    torch.testing.assert_close(losses[2], losses[1] / 2)
    for none, whole, half in zip(*gradients, strict=True):
        torch.testing.assert_close(half, (none + whole) / 2)


def test_consistency__may_be_any_callable() -> None:
    network = confident_network()
    seen: list[Tensor] = []

    def darker(images: Tensor) -> Tensor:
        return images / 2

    def keep(images: Tensor) -> Tensor:
        seen.append(images)
        return images

    training = SelfTraining(
        network, MeanTeacher(network), mix=CrossDomainMix(C), consistency=keep, consistency_augment=darker
    ).train()
    data = batch(0)
    assert training.sample(N)._replace(scores=None) == (None,) * 4
    output = training(*data, generator=seeded(0))
    assert torch.equal(seen[0], data[2] / 2)  # augmented first
    probs = F.pseudo_label(training.teacher(data[2]))
    weights = F.confidence_weight(probs.confidence)
    logits = with_batch_statistics(dict(network.named_parameters()), data[2] / 2)
    torch.testing.assert_close(output.consistency_loss, F.weighted_cross_entropy(logits, probs.labels, weights))


def test_consistency__draws_replay_split_over_ranks_and_leave_the_others_alone() -> None:
    network = confident_network()
    with torch.no_grad():
        network.norm = nn.Identity()  # batch statistics are the one thing that does not split
    training = SelfTraining(
        network,
        MeanTeacher(network),
        mix=CrossDomainMix(C),
        augment=StrongAugment(),
        consistency=MaskedImages(2),
        consistency_augment=StrongAugment(),
    ).train()
    data = batch(0)
    draw = training.sample(N, (H, W), generator=seeded(5))
    whole = training(*data, draw=draw)
    assert torch.equal(training(*data, generator=seeded(5)).loss, whole.loss)
    halves = [
        training(*(x[rows] for x in data), draw=draw.rows(rows)).consistency_loss for rows in (slice(0, 1), slice(1, 2))
    ]
    torch.testing.assert_close(torch.stack(halves).mean(), whole.consistency_loss)  # lambda is per image here
    plain = SelfTraining(network, MeanTeacher(network), mix=CrossDomainMix(C), augment=StrongAugment())
    same = plain.sample(N, (H, W), generator=seeded(5))
    assert torch.equal(same.scores, draw.scores)  # the draws of the other terms come first
    torch.testing.assert_close(tuple(same.augment), tuple(draw.augment), rtol=0, atol=0)


@pytest.mark.parametrize("height", [4, 6, 63, 512, 1000])
@pytest.mark.parametrize("weigh", ["target", "mixed"])
@pytest.mark.parametrize("kind", ["dacs", "classmix", "pseudo-label"])
def test_ignored_rows__weigh_nothing_and_count_in_lambda(kind: str, weigh: str, height: int) -> None:
    """As `target_weights` that are 0 in these rows."""
    network = confident_network(torch.float32)
    source, target = torch.rand(2, 2, 3, height, 3, generator=seeded(0))
    labels = torch.randint(0, C, (2, height, 3), generator=seeded(1))
    rows = torch.ones(2, height, 3)
    rows[:, : int(15 * height / 512 + 0.5)] = 0
    rows[:, height - int(120 * height / 512 + 0.5) :] = 0
    mix = {"dacs": CrossDomainMix(C), "classmix": ClassMix(C), "pseudo-label": None}[kind]
    options = {"mix": mix, "weigh": weigh, "num_classes": C}
    training = SelfTraining(network, MeanTeacher(network), **options, ignore_top=15, ignore_bottom=120).train()
    plain = SelfTraining(network, MeanTeacher(network), **options).train()
    got = training(source, labels, target, generator=seeded(2))
    want = plain(source, labels, target, target_weights=rows, generator=seeded(2))
    assert torch.equal(got.mixed.weights, want.mixed.weights)
    assert torch.equal(got.mixed_loss, want.mixed_loss)
    assert torch.equal(got.target_weight, want.target_weight)
    both = training(source, labels, target, target_weights=torch.tensor([0.0, 0.5]), generator=seeded(2))
    want = plain(
        source, labels, target, target_weights=rows * torch.tensor([0.0, 0.5])[:, None, None], generator=seeded(2)
    )
    assert torch.equal(both.mixed.weights, want.mixed.weights)


def test_mix__makes_its_own_scores_where_it_can() -> None:
    class Rows(nn.Module):
        """A mask of its own, which depends on the size."""

        def sample_scores(self, n: int, size: tuple[int, int], **where: Any) -> Tensor:
            return torch.rand(n, size[0], generator=where["generator"], device=where["device"])

        def forward(
            self, xs: Tensor, ys: Tensor, xt: Tensor, yt: Tensor, w: Tensor, *, scores: Tensor | None = None
        ) -> Mixed:
            mask = (scores < 0.5)[:, :, None].expand(ys.shape)
            return Mixed(F.mix(xs, xt, mask), F.mix(ys, yt, mask), F.mix(torch.ones_like(w), w, mask), mask)

    network = confident_network()
    training = SelfTraining(network, MeanTeacher(network), mix=Rows()).train()  # which needs no number of classes
    draw = training.sample(N, (H, W), generator=seeded(1))
    assert draw.scores.shape == (N, H)
    mixed = training(*batch(0), generator=seeded(1)).mixed
    assert torch.equal(mixed.mask, (draw.scores < 0.5)[:, :, None].expand(N, H, W))
    assert torch.equal(training(*batch(0), draw=draw).mixed.mask, mixed.mask)


def test_forward__augments_the_mixed_images_alone() -> None:
    network = confident_network()
    training = recipes.self_training(network, C).train()
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    data = batch(0)
    draw = training.sample(N, generator=seeded(1))
    output = training(*data, draw=draw)
    plain = copy.deepcopy(training)
    plain.augment = None
    mixed = plain(*data, draw=draw).mixed
    assert output.mixed is not None
    assert mixed is not None
    assert torch.equal(seen[0], data[0])  # source as it is, first
    assert torch.equal(seen[1], output.mixed.images)
    assert isinstance(training.augment, StrongAugment)
    assert torch.equal(output.mixed.images, training.augment(mixed.images, draw=draw.augment))
    assert torch.equal(output.mixed.labels, mixed.labels)
    assert torch.equal(output.mixed.weights, mixed.weights)


def build(method: str, **options: object) -> SelfTraining:
    return recipes.self_training(confident_network(), C, method=method, **options).train()


def test_methods__are_the_rows_of_the_ablation() -> None:
    data = batch(4)
    outputs = {method: build(method)(*data, generator=seeded(2)) for method in recipes.METHODS}
    source = outputs["source"]
    assert source.mixed is None
    assert source.confidence is None
    assert float(source.mixed_loss) == 0
    assert torch.equal(source.loss, source.source_loss)
    for output in outputs.values():
        torch.testing.assert_close(output.source_loss, source.source_loss)
    pseudo, naive, dacs = (outputs[m].mixed for m in ("pseudo-label", "classmix", "dacs"))
    assert pseudo is not None
    assert naive is not None
    assert dacs is not None
    assert not pseudo.mask.any()
    teacher_labels = build("dacs").teacher.pseudo_label(data[2]).labels
    assert torch.equal(pseudo.labels, teacher_labels)
    assert torch.equal(naive.labels, torch.where(naive.mask, teacher_labels, teacher_labels.roll(-1, 0)))
    assert torch.equal(dacs.labels, torch.where(dacs.mask, data[1], teacher_labels))
    assert bool((dacs.weights[dacs.mask] == 1).all())


@pytest.mark.parametrize("weigh", ["target", "mixed"])
@pytest.mark.parametrize("scope", ["image", "batch", "pixel", "none"])
@pytest.mark.parametrize("kind", ["dacs", "classmix", "pseudo-label"])
def test_weights__equal_the_loop(weigh: str, scope: str, kind: str) -> None:
    network = confident_network()
    mix = {"dacs": CrossDomainMix(C), "classmix": ClassMix(C), "pseudo-label": None}[kind]
    teacher = MeanTeacher(network, mode="train")
    training = SelfTraining(network, teacher, mix=mix, criterion=ConfidenceWeightedCE(scope=scope), weigh=weigh).train()
    source, labels, target = batch(7)
    allowed = torch.rand(N, H, W, generator=seeded(8), dtype=torch.float64)
    output = training(source, labels, target, target_weights=allowed, generator=seeded(9))
    confidence = teacher.pseudo_label(target).confidence
    mixed = output.mixed
    assert mixed is not None
    lam = F.confidence_weight(confidence, scope=scope)
    from_mix = F.confidence_weight(F.mix(confidence, confidence.roll(-1, 0), mixed.mask), scope=scope)
    for i, row, column in np.ndindex(N, H, W):
        pasted = bool(mixed.mask[i, row, column])
        j = (i + 1) % N
        if kind == "classmix":
            origin = i if pasted else j
            weight = from_mix[i, row, column] if weigh == "mixed" else lam[origin, row, column]
            want = weight * allowed[origin, row, column]
        elif pasted:
            want = lam[i, row, column] if weigh == "mixed" else torch.ones((), dtype=torch.float64)
        else:
            want = lam[i, row, column] * allowed[i, row, column]
        assert float(mixed.weights[i, row, column]) == pytest.approx(float(want), rel=1e-12)


def test_criteria__defaults_are_lambda_per_image_and_the_mean_over_valid_source_pixels() -> None:
    network = confident_network()
    training = SelfTraining(network, MeanTeacher(network, mode="train"), mix=None).train()
    source, labels, target = batch(3)
    output = training(source, labels, target)
    logits = with_batch_statistics(dict(network.named_parameters()), source)
    torch.testing.assert_close(output.source_loss, nn.functional.cross_entropy(logits, labels, ignore_index=255))
    want = (output.confidence >= THRESHOLD).double().mean((1, 2))
    torch.testing.assert_close(output.mixed.weights, want[:, None, None].expand(N, H, W))


def test_target_weights__one_per_image_and_zero_is_no_loss() -> None:
    training = build("pseudo-label", flavor="torchvision", same_on_batch=False)
    data = batch(1)
    vector = training(*data, target_weights=torch.tensor([0.0, 1.0]), generator=seeded(0))
    maps = training(*data, target_weights=torch.tensor([0.0, 1.0])[:, None, None].expand(N, H, W), generator=seeded(0))
    assert torch.equal(vector.mixed_loss, maps.mixed_loss)
    assert not vector.mixed.weights[0].any()
    assert float(training(*data, target_weights=torch.zeros(N), generator=seeded(0)).mixed_loss.detach()) == 0.0


def test_align__updates_in_training_alone_and_aligns() -> None:
    network = confident_network()
    prior = torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1])
    align = DistributionAlignment(C, prior=prior)
    training = SelfTraining(network, MeanTeacher(network, mode="train"), mix=ClassMix(C), align=align).train()
    data = batch(0)
    probs = training.teacher(data[2]).softmax(1)
    output = training(*data, generator=seeded(0))
    torch.testing.assert_close(align.running.double(), probs.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    want = F.pseudo_label_from_probs(F.align_distribution(probs, align.prior, align.running))
    torch.testing.assert_close(output.confidence, want.confidence)
    moved = align.running.clone()
    training.eval()
    training(*data, generator=seeded(0))
    assert torch.equal(align.running, moved)
    assert int(align.running_count) == 1


def test_forward__changes_no_state_but_batchnorm_and_alignment() -> None:
    training = build("alignment")
    before = copy.deepcopy(training.state_dict())
    training(*batch(0), generator=seeded(0))
    changed = {name for name, value in training.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"student.norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")} | {
        "align.running",
        "align.running_count",
    }
    assert int(training.state_dict()["student.norm.num_batches_tracked"]) == 2  # source, then mixed


def test_draw__replays_and_splits_over_ranks() -> None:
    network = confident_network()
    with torch.no_grad():
        network.norm = nn.Identity()  # batch statistics are the one thing that does not split
    training = SelfTraining(
        network, MeanTeacher(network), mix=CrossDomainMix(C), augment=StrongAugment(same_on_batch=True)
    ).train()
    data = batch(0)
    state = torch.get_rng_state()
    one = training(*data, generator=seeded(5))
    draw = training.sample(N, generator=seeded(5))
    two = training(*data, draw=draw)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(one.mixed.images, two.mixed.images)
    for i in range(N):
        rows = slice(i, i + 1)
        part = draw._replace(scores=draw.scores[rows], augment=type(draw.augment)(*(v[rows] for v in draw.augment)))
        half = training(*(x[rows] for x in data), draw=part)
        torch.testing.assert_close(half.mixed.images[0], one.mixed.images[i])
        assert torch.equal(half.mixed.labels[0], one.mixed.labels[i])
    torch.manual_seed(0)
    training(*data)
    assert not torch.equal(torch.get_rng_state(), state)  # without a generator the global one draws


class Quarter(nn.Module):
    """Logits at a quarter of the size, as SegFormer gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, C, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.conv(images)
        return out


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("custom", [False, True])
def test_upsample__is_the_upsampled_network(custom: bool, align_corners: bool) -> None:
    torch.manual_seed(0)
    small = Quarter().double()

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(small)

        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.interpolate(
                self.inner(images), size=images.shape[-2:], mode="bilinear", align_corners=align_corners
            )

    source, target = torch.rand(2, N, 3, 16, 12, dtype=torch.float64, generator=seeded(0))
    labels = torch.randint(0, C, (N, 16, 12), generator=seeded(1))

    class Other:
        def weights(self, confidence: Tensor) -> Tensor:
            return F.confidence_weight(confidence, 0.3)

        def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
            return F.weighted_cross_entropy(logits, labels, weights)

    options = {"criterion": Other(), "source_criterion": F.weighted_cross_entropy} if custom else {}
    options["align_corners"] = align_corners
    outputs = []
    for network, upsample in ((small, True), (Whole(), False)):
        training = SelfTraining(network, MeanTeacher(network), mix=CrossDomainMix(C), upsample=upsample, **options)
        outputs.append(training(source, labels, target, generator=seeded(2)))
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    torch.testing.assert_close(outputs[0].confidence, outputs[1].confidence)


@pytest.mark.parametrize("recipe", ["released", "paper"])
@pytest.mark.parametrize("method", recipes.METHODS)
def test_upsample__of_every_method_is_the_upsampled_network(method: str, recipe: str) -> None:
    torch.manual_seed(0)
    small, whole = (deeplab_v2_tiny(C, upsample=whole).double() for whole in (False, True))
    whole.load_state_dict(small.state_dict())
    source, target = torch.rand(2, N, 3, 45, 52, dtype=torch.float64, generator=seeded(0))
    labels = torch.randint(0, C, (N, 45, 52), generator=seeded(1), dtype=torch.uint8)
    gradients = []
    for network, upsample in ((small, True), (whole, False)):
        training = recipes.self_training(network, C, method=method, recipe=recipe, threshold=0.3, upsample=upsample)
        training(source, labels, target, generator=seeded(2)).loss.backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)


def test_augment__may_be_any_callable() -> None:
    network = confident_network()
    training = SelfTraining(network, MeanTeacher(network), mix=CrossDomainMix(C), augment=lambda x: 1 - x).train()
    plain = SelfTraining(network, training.teacher, mix=CrossDomainMix(C)).train()
    data = batch(0)
    flipped, straight = (t(*data, generator=seeded(0)) for t in (training, plain))
    torch.testing.assert_close(flipped.mixed.images, 1 - straight.mixed.images)


@pytest.mark.parametrize("recipe", ["released", "mic"])
@pytest.mark.parametrize("method", recipes.METHODS)
def test_degenerate__all_ignored_and_empty_batches(method: str, recipe: str) -> None:
    training = recipes.self_training(nn.Conv2d(3, C, 1), C, method=method, recipe=recipe).train()
    images = torch.rand(2, 3, 4, 4)
    output = training(images, torch.full((2, 4, 4), 255), images)
    assert float(output.source_loss.detach()) == 0
    assert bool(output.loss.isfinite())
    empty = torch.rand(0, 3, 4, 4)
    for student in (nn.Conv2d(3, C, 1), SlowNetwork(C)):
        training = recipes.self_training(student, C, method=method, recipe=recipe).train()
        output = training(empty, torch.zeros(0, 4, 4, dtype=torch.uint8), empty)
        assert float(output.loss.detach()) == 0
        output.loss.backward()
        assert not any(p.grad.any() for p in training.student.parameters())
        assert all(value.isfinite().all() for value in training.state_dict().values())


@pytest.mark.parametrize("recipe", ["released", "mic"])
@pytest.mark.parametrize("method", recipes.METHODS)
def test_autocast__losses_are_float32(method: str, recipe: str) -> None:
    training = recipes.self_training(confident_network(torch.float32), C, method=method, recipe=recipe).train()
    data = batch(0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = training(*data, generator=seeded(0))
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    full = training(*data, generator=seeded(0))
    assert float(output.source_loss.detach()) == pytest.approx(float(full.source_loss.detach()), rel=0.05)


@pytest.mark.parametrize("recipe", ["released", "mic"])
@pytest.mark.parametrize("method", recipes.METHODS)
def test_state_dict__resumes_bit_for_bit(method: str, recipe: str) -> None:
    runs = [build(method, recipe=recipe) for _ in range(2)]
    optimizers = [torch.optim.SGD(t.student.parameters(), 0.05, momentum=0.9) for t in runs]

    def step(k: int, run: int) -> None:
        output = runs[run](*batch(k), generator=seeded(k))
        optimizers[run].zero_grad()
        output.loss.backward()
        optimizers[run].step()
        runs[run].update()

    for k in range(3):
        step(k, 0)
    assert not runs[1].load_state_dict(copy.deepcopy(runs[0].state_dict()), strict=True).missing_keys
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for k in range(3, 6):
        step(k, 0)
        step(k, 1)
    one, two = (t.state_dict() for t in runs)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("method", ["pseudo-label", "classmix", "alignment"])
def test_target__may_differ_in_size_where_nothing_of_the_source_is_pasted(method: str) -> None:
    source, labels, _ = batch(0)
    target = torch.rand(3, 3, 9, 5, dtype=torch.float64, generator=seeded(1))
    output = build(method)(source, labels, target, generator=seeded(2))
    assert output.mixed.images.shape == target.shape
    assert output.mixed.weights.shape == output.confidence.shape == (3, 9, 5)
    source_loss = F.weighted_cross_entropy(confident_network().train()(source), labels, normalizer="valid")
    torch.testing.assert_close(output.source_loss, source_loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks__losses_are_float32(dtype: torch.dtype) -> None:
    training = recipes.self_training(confident_network(dtype), C).train()
    output = training(*batch(0, dtype), generator=seeded(0))
    assert output.loss.dtype == output.mixed_loss.dtype == output.mixed.weights.dtype == torch.float32
    want = F.pseudo_label_from_probs(training.teacher(batch(0, dtype)[2]).float().softmax(1))
    assert torch.equal(output.confidence, want.confidence)
    assert output.mixed.images.dtype == dtype
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in training.student.parameters())


def test_no_teacher__is_the_source_only_baseline_whatever_else_is_given() -> None:
    network = confident_network()
    training = SelfTraining(
        network, None, mix=CrossDomainMix(C), augment=StrongAugment(), align=DistributionAlignment(C)
    ).train()
    state = torch.get_rng_state()
    output = training(*batch(0))
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn for nothing
    torch.testing.assert_close(output.loss, build("source")(*batch(0)).loss)
    assert (output.confidence, output.mixed, float(output.mixed_loss)) == (None, None, 0.0)
    assert int(training.align.running_count) == 0
    training.update()


def test_update__moves_the_teacher_or_does_nothing() -> None:
    training = build("dacs")
    for name, p in training.student.named_parameters():
        p.data.add_(1 if "weight" in name else 0)
    training.update()
    torch.testing.assert_close(training.teacher.module.conv.weight, training.student.conv.weight)
    build("source").update()


SWITCHES: list[tuple[str, object, object, Callable[[SelfTraining], object]]] = [
    ("weigh", "target", "mixed", lambda t: t.weigh),
    ("scope", "batch", "image", lambda t: t.criterion.scope),
    ("source_normalizer", "valid", "all", lambda t: t.source_criterion.normalizer),
    ("include_ignored", True, False, lambda t: t.mix.include_ignored),
    ("decay", 0.99, 0.0, lambda t: t.teacher.decay),
    ("flavor", "additive", "torchvision", lambda t: t.augment.flavor),
    ("same_on_batch", True, False, lambda t: t.augment.same_on_batch),
]
MIC: list[tuple[str, object, Callable[[SelfTraining], object]]] = [
    ("weigh", "target", lambda t: t.weigh),
    ("scope", "batch", lambda t: t.criterion.scope),
    ("source_normalizer", "valid", lambda t: t.source_criterion.normalizer),
    ("include_ignored", False, lambda t: t.mix.include_ignored),
    ("decay", 0.999, lambda t: t.teacher.decay),
    ("mode", "train", lambda t: t.teacher.mode),
    ("flavor", "torchvision", lambda t: t.consistency_augment.flavor),
    ("same_on_batch", False, lambda t: t.consistency_augment.same_on_batch),
    ("threshold", 0.968, lambda t: t.criterion.threshold),
    ("ignore_top", 15, lambda t: t.ignore_top),
    ("ignore_bottom", 120, lambda t: t.ignore_bottom),
    ("consistency", True, lambda t: isinstance(t.consistency, MaskedImages)),
    ("consistency_block", None, lambda t: t.consistency.block),
    ("consistency_ratio", 0.7, lambda t: t.consistency.ratio),
    ("consistency_weight", 1.0, lambda t: t.consistency_weight),
]


@pytest.mark.parametrize(("name", "value", "read"), MIC)
def test_recipes__mic(name: str, value: object, read: Callable[[SelfTraining], object]) -> None:
    assert getattr(recipes.MIC, name) == value
    assert read(build("dacs", recipe="mic")) == value
    assert {name for name, *_ in MIC} == set(recipes.Recipe.__dataclass_fields__)  # all are looked at


def test_recipes__consistency_is_on_or_off_or_ones_own_in_each() -> None:
    own = MaskedImages(8)
    for recipe in ("released", "paper", "mic"):
        assert (build("dacs", recipe=recipe).consistency is None) == (recipe != "mic")
        assert build("dacs", recipe=recipe, consistency=own).consistency is own
        for off in (None, False):
            training = build("dacs", recipe=recipe, consistency=off)
            assert training.consistency is training.consistency_augment is None
        training = build("dacs", recipe=recipe, consistency=True, consistency_block=8, consistency_ratio=0.5)
        assert (training.consistency.block, training.consistency.ratio) == (8, 0.5)
        assert training.consistency_augment is not training.augment
        assert repr(training.consistency_augment) == repr(training.augment)
        assert build("source", recipe=recipe).consistency is None
    assert build("pseudo-label", recipe="mic", ignore_top=0, ignore_bottom=7).ignore_bottom == 7


def test_recipes__what_is_hidden_is_the_mean_colour_of_normalised_images_too() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert build("dacs", recipe="mic", mean=mean, std=std).consistency.fill == (0.0, 0.0, 0.0)
    other = build("dacs", recipe="mic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5)).consistency.fill
    assert other == pytest.approx((-0.03, -0.176, -0.188))


@pytest.mark.parametrize(("name", "released", "paper", "read"), SWITCHES)
def test_recipes__every_switch_has_both_values(
    name: str, released: object, paper: object, read: Callable[[SelfTraining], object]
) -> None:
    assert getattr(recipes.RELEASED, name) == released
    assert getattr(recipes.PAPER, name) == paper
    assert read(build("dacs")) == read(build("dacs", recipe="paper", **{name: released}))
    assert read(build("dacs", recipe="paper")) == read(build("dacs", **{name: paper}))
    assert read(build("dacs")) != read(build("dacs", recipe="paper"))


def test_recipes__settings_of_the_released_code() -> None:
    training = build("dacs", sync=True)
    assert training.criterion.threshold == 0.968
    assert build("dacs", threshold=0.5).criterion.threshold == 0.5
    assert training.criterion.normalizer == "all"
    assert training.criterion.sync
    assert training.source_criterion.sync
    assert (training.teacher.decay, training.teacher.mode, training.teacher.warmup) == (0.99, "train", True)
    assert (training.augment.jitter_p, training.augment.blur_p, training.augment.hue) == (0.8, 0.5, 0.25)
    assert training.mix.ratio == 0.5
    assert "weigh='target', upsample=False, align_corners=True, num_classes=5, ignore_index=255" in repr(training)
    assert build("alignment", prior=[1.0] * C).align.fixed_prior
    assert not math.isnan(float(build("alignment")(*batch(0)).loss.detach()))
    assert recipes.self_training(confident_network(), C, recipe=recipes.PAPER).weigh == "mixed"
    assert build("dacs", decay=0.9).teacher.decay == 0.9
    assert build("dacs", mode="eval").teacher.mode == "eval"


class Ema:
    """A teacher as others write it: no module, `update`, an average kept at 0.5 after a first copy."""

    def __init__(self, student: nn.Module) -> None:
        self.network = copy.deepcopy(student)
        self.seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        out: Tensor = self.network(images)
        return out

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        for mine, theirs in zip(self.network.parameters(), student.parameters(), strict=True):
            mine.lerp_(theirs, 0.5 if self.seen else 1.0)
        self.seen += 1


@pytest.mark.parametrize("kind", ["AveragedModel", "one's own"])
def test_teacher__may_be_anybodys(kind: str) -> None:
    """Four steps with torch's own averaged model, and with one of no library, are those with ours."""
    losses = []
    for ours in (True, False):
        network = confident_network()
        network.norm = nn.Identity()  # each has its own idea of buffers
        teacher: object = MeanTeacher(network, decay=0.5)
        if not ours:
            average = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}
            teacher = AveragedModel(network, **average) if kind == "AveragedModel" else Ema(network)
        training = SelfTraining(network, teacher, mix=CrossDomainMix(C)).train()
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        for step in range(4):
            output = training(*batch(step), generator=seeded(step))
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            training.update()
            losses.append(output.loss.detach())
    torch.testing.assert_close(losses[:4], losses[4:])


def test_train__stops_at_the_teacher() -> None:
    network = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.Dropout(0.5))
    training = SelfTraining(network, AveragedModel(network).eval(), mix=CrossDomainMix(C), augment=nn.Sequential())
    before = copy.deepcopy(training.teacher.state_dict())
    for mode in (True, False):
        assert training.train(mode) is training
        assert training.training is training.student.training is training.augment.training is mode
        assert not any(module.training for module in training.teacher.modules())
    training.train()
    images = torch.rand(2, 3, 4, 4)
    one, two = (training(images, torch.zeros(2, 4, 4).long(), images).confidence for _ in range(2))
    assert torch.equal(one, two)  # no dropout
    torch.testing.assert_close(training.teacher.state_dict(), before)


def left_half(labels: Tensor, ratio: float = 0.5) -> Tensor:
    return (torch.arange(labels.shape[-1]) < ratio * labels.shape[-1]).expand(labels.shape)


def whole_left(source: Tensor, labels: Tensor, target: Tensor, pseudo: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    mask = left_half(labels)
    pairs = ((source, target), (labels, pseudo), (torch.ones_like(weights), weights))
    return (*(F.mix(pasted, base, mask) for pasted, base in pairs), mask)


class OwnMix(nn.Module):
    """Called with keywords of all kinds, and not after our names."""

    def forward(self, xs: Tensor, ys: Tensor, xt: Tensor, yt: Tensor, w: Tensor, **_: object) -> Mixed:
        return Mixed(*whole_left(xs, ys, xt, yt, w))


def own_target_mix(images: Tensor, labels: Tensor, weights: Tensor, scores: Tensor, ratio: float = 0.5) -> Mixed:
    """Keywords that come after three tensors could be given by position: that makes it no mix of five arguments."""
    assert scores.shape == (len(images), C + 1)
    values = (images, labels, weights)
    mask = left_half(labels, ratio)
    return Mixed(*(F.mix(value, value.roll(-1, 0), mask) for value in values), mask)


@pytest.mark.parametrize("weigh", ["target", "mixed"])
@pytest.mark.parametrize("own", [whole_left, OwnMix(), own_target_mix], ids=["function", "module", "target mix"])
def test_mix__may_be_ones_own(own: Callable[..., Mixed], weigh: str) -> None:
    network = confident_network()
    teacher = MeanTeacher(network, mode="train")
    training = SelfTraining(network, teacher, mix=own, num_classes=C, weigh=weigh).train()
    source, labels, target = batch(1)
    mixed = training(source, labels, target, generator=seeded(0)).mixed
    pseudo = teacher.pseudo_label(target)
    mask = left_half(labels)
    onto_itself = own is own_target_mix
    want = F.mix(target if onto_itself else source, target.roll(-1, 0) if onto_itself else target, mask)
    assert torch.equal(mixed.images, want)
    want = F.mix(
        pseudo.labels if onto_itself else labels, pseudo.labels.roll(-1, 0) if onto_itself else pseudo.labels, mask
    )
    assert torch.equal(mixed.labels, want)
    weights = F.confidence_weight(pseudo.confidence)
    if onto_itself and weigh == "mixed":
        weights = F.confidence_weight(F.mix(pseudo.confidence, pseudo.confidence.roll(-1, 0), mask))
    elif onto_itself:
        weights = F.mix(weights, weights.roll(-1, 0), mask)
    elif weigh == "target":
        weights = F.mix(torch.ones_like(weights), weights, mask)
    torch.testing.assert_close(mixed.weights, weights)


@pytest.mark.parametrize("num_classes", [None, C])
@pytest.mark.parametrize("keywords", [("scores",), ("generator",), ("scores", "generator"), ()])
def test_mix__gets_scores_or_the_generator(keywords: tuple[str, ...], num_classes: int | None) -> None:
    seen: dict[str, object] = {}

    def own(*tensors: Tensor, **given: object) -> tuple[Tensor, ...]:
        seen.update(given)
        return whole_left(*tensors)

    five = ("xs", "ys", "xt", "yt", "w")
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in five]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in keywords]
    own.__signature__ = inspect.Signature(parameters)
    network = confident_network()
    training = SelfTraining(network, MeanTeacher(network), mix=own, num_classes=num_classes)
    generator = seeded(0)
    training(*batch(0), generator=generator)
    if "scores" in keywords and num_classes is not None:
        assert seen.keys() == {"scores"}
        assert torch.equal(seen["scores"], training.sample(N, generator=seeded(0)).scores)
    else:
        assert seen == ({"generator": generator} if "generator" in keywords else {})


def test_mix__may_be_replaced_by_one_of_another_kind() -> None:
    network = confident_network()
    training = SelfTraining(network, MeanTeacher(network), mix=CrossDomainMix(C)).train()
    data = batch(0)
    for other in (ClassMix(C), None, torch.compile(CrossDomainMix(C), backend="eager"), CrossDomainMix(C)):
        training.mix = other
        want = SelfTraining(network, training.teacher, mix=other, num_classes=C).train()(*data, generator=seeded(1))
        torch.testing.assert_close(tuple(training(*data, generator=seeded(1)).mixed), tuple(want.mixed))


def test_align__may_be_ones_own() -> None:
    class First:
        """Makes everything the first class it has been told of."""

        def update(self, probs: Tensor) -> None:
            self.seen = probs

        def __call__(self, probs: Tensor) -> Tensor:
            assert torch.equal(probs, self.seen)
            return nn.functional.one_hot(torch.zeros_like(probs[:, 0]).long(), C).movedim(-1, 1).to(probs)

    network = confident_network()
    training = SelfTraining(network, MeanTeacher(network), mix=ClassMix(C), align=First()).train()
    output = training(*batch(0), generator=seeded(0))
    assert not output.mixed.labels.any()
    assert bool((output.confidence == 1).all())


@pytest.mark.parametrize("method", recipes.METHODS)
@pytest.mark.parametrize("ignore_index", [7, -1, 2])
def test_ignore_index__is_one_in_all_parts(ignore_index: int, method: str) -> None:
    """Another id for the same pixels changes nothing; a class can be the ignored one."""
    source, labels, target = batch(5)
    if ignore_index == 2:
        labels[labels == 2] = 255
    renamed = labels.masked_fill(labels == 255, ignore_index)
    want = build(method)(source, labels, target, generator=seeded(3))
    training = build(method, ignore_index=ignore_index)
    assert training.ignore_index == ignore_index
    got = training(source, renamed, target, generator=seeded(3))
    torch.testing.assert_close(got.source_loss, want.source_loss, rtol=0, atol=0)
    if method in {"pseudo-label", "dacs"} and ignore_index != 2:  # pseudo-labels know no ignored class
        torch.testing.assert_close(got.mixed_loss, want.mixed_loss, rtol=0, atol=0)


def test_ignore_index__of_the_parts_is_that_of_the_default_losses() -> None:
    network = confident_network()
    training = SelfTraining(network, MeanTeacher(network), mix=CrossDomainMix(C, ignore_index=0)).train()
    source, labels, target = batch(2)
    labels[labels == 255] = 0
    output = training(source, labels, target, generator=seeded(0))
    logits = with_batch_statistics(dict(network.named_parameters()), source)
    torch.testing.assert_close(output.source_loss, nn.functional.cross_entropy(logits, labels, ignore_index=0))
    mixed = output.mixed
    logits = with_batch_statistics(dict(network.named_parameters()), mixed.images)
    losses = nn.functional.cross_entropy(logits, mixed.labels, ignore_index=0, reduction="none") * mixed.weights
    torch.testing.assert_close(output.mixed_loss, losses.mean())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_criteria__of_others_get_int64_and_their_own_ignored_id(dtype: torch.dtype) -> None:
    network = confident_network()
    source, labels, target = batch(2)
    labels[0, 0] = 77  # neither a class nor the ignored id
    logits = with_batch_statistics(dict(network.named_parameters()), source)
    want = nn.functional.cross_entropy(logits, labels.masked_fill(labels >= C, 255), ignore_index=255)

    class Weighted:
        def weights(self, confidence: Tensor) -> Tensor:
            return torch.full_like(confidence, 0.5)[:, 0, 0]  # one per image

        def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
            losses = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=255)
            return (losses * weights).mean()

    for torch_criterion in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=255)):
        training = SelfTraining(
            network, MeanTeacher(network), mix=CrossDomainMix(C), criterion=Weighted(), source_criterion=torch_criterion
        ).train()
        output = training(source, labels.to(dtype), target, generator=seeded(0))
        torch.testing.assert_close(output.source_loss, want)
        assert set(output.mixed.weights.unique().tolist()) <= {0.5, 1.0}
    function = SelfTraining(network, None, mix=None, source_criterion=nn.functional.cross_entropy).train()
    classes = labels.clamp(max=C - 1)
    torch.testing.assert_close(
        function(source, classes.to(dtype), target).loss, nn.functional.cross_entropy(logits, classes)
    )


@pytest.mark.parametrize("normalised", [False, True])
def test_augment__ours_is_drawn_and_replayed_compiled_too(normalised: bool) -> None:
    network, options = nn.Conv2d(3, C, 1), {"mean": (0.5,) * 3, "std": (0.25,) * 3} if normalised else {}
    source, target = torch.rand(2, 2, 3, 6, 5, generator=seeded(0)) * (4 if normalised else 1) - 2 * normalised
    labels = torch.randint(0, C, (2, 6, 5), generator=seeded(1))
    plain, compiled = (
        SelfTraining(network, MeanTeacher(network), mix=CrossDomainMix(C), augment=augment)
        for augment in (StrongAugment(**options), torch.compile(StrongAugment(**options), backend="eager"))
    )
    draw = compiled.sample(2, generator=seeded(2))
    want = plain(source, labels, target, draw=plain.sample(2, generator=seeded(2)))
    torch.testing.assert_close(compiled(source, labels, target, draw=draw).mixed.images, want.mixed.images)
    with pytest.raises(ValueError, match=r"`draw.augment` must be given"):
        compiled(source, labels, target, draw=draw._replace(augment=None))


def test_criterion__may_give_one_weight_for_all() -> None:
    class Half(ConfidenceWeightedCE):
        def weights(self, confidence: torch.Tensor) -> torch.Tensor:
            return confidence.new_tensor(0.5)

    network = confident_network()
    training = SelfTraining(network, MeanTeacher(network), mix=None, criterion=Half())
    assert training(*batch(0)).mixed.weights.unique().tolist() == [0.5]


def test_augment__keeps_the_dtype_of_the_images() -> None:
    training = SelfTraining(nn.Conv2d(3, C, 1), Ema(nn.Conv2d(3, C, 1)), mix=None, augment=lambda x: x.double())
    images = torch.rand(2, 3, 4, 4)
    assert training(images, torch.zeros(2, 4, 4).long(), images).mixed.images.dtype == torch.float32


@pytest.mark.parametrize("recipe", ["released", "mic"])
@pytest.mark.parametrize("method", recipes.METHODS)
def test_images__may_be_normalised_where_the_augmentation_knows(method: str, recipe: str) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    shift, scale = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (mean, std))

    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = confident_network()

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.inner((images - shift) / scale)
            return out

    source, labels, target = batch(0)
    want = recipes.self_training(Normalising(), C, method=method, recipe=recipe)(
        source, labels, target, generator=seeded(0)
    )
    source, target = (source - shift) / scale, (target - shift) / scale
    got = build(method, recipe=recipe, mean=mean, std=std)(source, labels, target, generator=seeded(0))
    torch.testing.assert_close(got.loss, want.loss)
    with pytest.raises(ValueError, match=r"`source_images` must lie in \[0, 1\], got values from -2"):
        build(method, recipe=recipe)(source, labels, target)
    with pytest.raises(ValueError, match=r"`target_images` must lie in \[0, 1\] before they are normalised by mean="):
        build(method, recipe=recipe, mean=mean, std=std)(source, labels, 255 * target)


def test_images__overshoot_and_nan_are_let_through() -> None:
    training = build("dacs")
    source, labels, target = batch(0)
    target[0, 0, 0, :2] = torch.tensor([-0.45, 1.45])  # as bicubic resizing may leave them
    assert bool(training(source, labels, target).loss.isfinite())
    target[0, 0, 0, 0] = math.nan  # the loss says it, on every device, and the guard finds it there
    assert bool(training(source, labels, target).loss.isnan())


@pytest.mark.parametrize("recipe", ["released", "mic"])
@pytest.mark.parametrize("method", recipes.METHODS)
def test_terms__one_by_one_have_the_gradients_of_the_sum(method: str, recipe: str) -> None:
    data, allowed = batch(0), torch.rand(N, H, W, generator=seeded(1))
    whole, parts = build(method, recipe=recipe), build(method, recipe=recipe)
    output = whole(*data, target_weights=allowed, generator=seeded(2))
    output.loss.backward()
    losses = {}
    for name, loss in parts.terms(*data, target_weights=allowed, generator=seeded(2)):
        loss.backward()
        losses[name] = loss.detach()
    names = ["source_loss", "mixed_loss", "consistency_loss"]
    assert list(losses) == names[: 1 if method == "source" else 2 if recipe == "released" else 3]
    for name, loss in losses.items():
        assert torch.equal(loss, getattr(output, name))
    torch.testing.assert_close(sum(losses.values()), output.loss.detach())
    for (name, one), other in zip(whole.student.named_parameters(), parts.student.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14, msg=name)
    torch.testing.assert_close(whole.state_dict(), parts.state_dict())  # BatchNorm and averages moved alike


def test_terms__hold_one_graph_at_a_time() -> None:
    alive, most = 0, 0

    class Kept:
        """A tensor that is saved for the backward pass, counted while it is."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, most
            self.tensor = tensor
            alive += tensor.numel()
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.tensor.numel()

    peaks = []
    for one_by_one in (False, True):
        training, data = build("dacs"), batch(0)
        alive = most = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            if one_by_one:
                for _, loss in training.terms(*data, generator=seeded(0)):
                    loss.backward()
            else:
                training(*data, generator=seeded(0)).loss.backward()
        peaks.append(most)
    assert peaks[1] < 0.6 * peaks[0]


def test_terms__are_checked_at_once() -> None:
    source, labels, target = batch(0)
    with pytest.raises(ValueError, match=r"`source_labels` .* must agree"):
        build("dacs").terms(source, labels[:1], target)


def test_forward__an_incomplete_draw_is_refused_before_the_student_runs() -> None:
    network = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C)).double()
    training = recipes.self_training(network, C, recipe="mic").train()
    before = copy.deepcopy(network.state_dict())
    data = batch(2)
    draw = training.sample(2, (data[0].shape[-2], data[0].shape[-1]))
    for missing in ("scores", "augment", "consistency", "consistency_augment"):
        for step in (training, training.terms):  # `terms` refuses it when it is called, not when it is iterated over
            with pytest.raises(ValueError, match=f"`draw.{missing}` must be given"):
                step(*data, draw=draw._replace(**{missing: None}))
    with pytest.raises(TypeError, match="`draw` must be a SelfTrainingDraw, got Tensor"):
        training.terms(*data, draw=draw.scores)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("weigh", ["target", "mixed"])
@pytest.mark.parametrize("scope", ["image", "batch", "pixel"])
@pytest.mark.parametrize("method", ["pseudo-label", "classmix", "dacs"])
def test_target_weight__is_lambda(method: str, scope: str, weigh: str) -> None:
    training = build(method, scope=scope, weigh=weigh)
    data = batch(3)
    output = training(*data, generator=seeded(0))
    sure = (output.confidence >= THRESHOLD).double().mean()
    assert 0 < float(sure) < 1
    torch.testing.assert_close(output.target_weight, sure)
    allowed = torch.zeros(N, H, W, dtype=torch.float64)
    allowed[:, : H // 2] = 1
    output = training(*data, target_weights=allowed, generator=seeded(0))
    if scope == "batch":
        torch.testing.assert_close(output.target_weight, sure * (H // 2) / H)
    assert build("source")(*data).target_weight is None


class Output(NamedTuple):
    logits: Tensor


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.inner = confident_network()
        self.wrap = wrap

    def forward(self, images: Tensor) -> object:
        return self.wrap(self.inner(images))


@pytest.mark.parametrize(
    ("wrap", "fix", "line"),
    [
        (Output, "out.logits", lambda out: out.logits),
        (lambda logits: SimpleNamespace(logits=logits), "out.logits", lambda out: out.logits),
        (lambda logits: {"out": logits, "aux": 0}, "out['out']", lambda out: out["out"]),
        (lambda logits: {"logits": logits}, "out['logits']", lambda out: out["logits"]),
        (lambda logits: {"main": logits}, "out['main']", lambda out: out["main"]),
        (lambda logits: [logits, logits], "out[0]", lambda out: out[0]),
    ],
    ids=["tuple", "object", "torchvision", "dict", "other", "list"],
)
def test_logits__takes_an_output_apart_as_the_error_says(
    wrap: Callable[[Tensor], object], fix: str, line: Callable[[Any], Tensor]
) -> None:
    student = Wrapped(wrap)
    data = batch(0)
    with pytest.raises(TypeError, match=re.escape(f"pass `logits=lambda out: {fix}` to SelfTraining")):
        recipes.self_training(student, C)(*data)
    training = recipes.self_training(student, C, logits=line).train()
    output = training(*data, generator=seeded(0))
    torch.testing.assert_close(output.loss, build("dacs")(*data, generator=seeded(0)).loss)


def test_num_classes__is_that_of_the_parts_or_the_argument() -> None:
    network = confident_network()
    teacher = MeanTeacher(network)
    assert SelfTraining(network, teacher, mix=CrossDomainMix(C)).num_classes == C
    assert SelfTraining(network, teacher, mix=None, align=DistributionAlignment(C)).num_classes == C
    assert SelfTraining(network, teacher, mix=None).num_classes is None
    with pytest.raises(ValueError, match="returned 5 classes but SelfTraining was built with num_classes=6"):
        SelfTraining(network, teacher, mix=None, num_classes=6)(*batch(0))


def test_sample__is_empty_where_nothing_is_random() -> None:
    assert build("source").sample(N) == (None,) * 4
    network = confident_network()
    training = SelfTraining(network, MeanTeacher(network), mix=None, augment=lambda x: x)
    assert training.sample(N, (H, W)) == (None,) * 4
    one, two = (build("dacs").sample(N, *size, generator=seeded(0)) for size in ((), ((H, W),)))
    assert torch.equal(one.scores, two.scores)


@pytest.mark.parametrize("method", ["pseudo-label", "classmix", "dacs"])
def test_layout__of_images_is_kept(method: str) -> None:
    source, labels, target = batch(0)
    source, target = (images.to(memory_format=torch.channels_last) for images in (source, target))
    mixed = build(method)(source, labels, target).mixed
    assert mixed.images.is_contiguous(memory_format=torch.channels_last)


class Tint(nn.Module):
    """An augmentation of somebody else."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * 0.5


OPTIONS: dict[str, tuple[object, str]] = {
    "ratio": (0.25, "mix.ratio"),
    "rounding": ("floor", "mix.rounding"),
    "whole_batch": (True, "mix.whole_batch"),
    "masks": (BoxMasks(), "mix.masks"),
    "include_ignored": (False, "mix.include_ignored"),
    "decay": (0.5, "teacher.decay"),
    "warmup": (False, "teacher.warmup"),
    "mode": ("eval", "teacher.mode"),
    "brightness": (0.5, "augment.brightness"),
    "contrast": (0.5, "augment.contrast"),
    "saturation": (0.5, "augment.saturation"),
    "hue": (0.125, "augment.hue"),
    "jitter_p": (0.25, "augment.jitter_p"),
    "blur_p": (0.25, "consistency_augment.blur_p"),
    "blur_sigma": ((0.5, 2.0), "augment.blur_sigma"),
    "flavor": ("torchvision", "augment.flavor"),
    "same_on_batch": (False, "augment.same_on_batch"),
    "threshold": (0.5, "criterion.threshold"),
    "scope": ("pixel", "criterion.scope"),
    "normalizer": ("weights", "criterion.normalizer"),
    "label_smoothing": (0.1, "source_criterion.label_smoothing"),
    "source_normalizer": ("all", "source_criterion.normalizer"),
    "weigh": ("mixed", "weigh"),
    "ignore_top": (7, "ignore_top"),
    "ignore_bottom": (8, "ignore_bottom"),
    "consistency_weight": (0.5, "consistency_weight"),
    "consistency_ratio": (0.25, "consistency.ratio"),
    "consistency_block": (2, "consistency.block"),
    "consistency": (MaskedImages(2), "consistency"),
    "augment": (Tint(), "consistency_augment"),
    "consistency_augment": (Tint(), "consistency_augment"),
    "criterion": (ConfidenceWeightedCE(), "criterion"),
    "source_criterion": (nn.CrossEntropyLoss(ignore_index=255), "source_criterion"),
    "mix": (CrossDomainMix(C, masks=CowMasks(sigma=1.0)), "mix"),
    "align": (DistributionAlignment(C), "align"),
    "teacher": (MeanTeacher(nn.Conv2d(3, C, 1).double()), "teacher"),
    "upsample": (True, "upsample"),
    "align_corners": (False, "align_corners"),
    "logits": (nn.Identity(), "logits"),
    "ignore_index": (254, "ignore_index"),
    "sync": (True, "criterion.sync"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_recipes__every_argument_of_a_part_is_an_option(name: str) -> None:
    value, place = OPTIONS[name]
    options: dict[str, object] = {"consistency": True, name: value}
    training = build("dacs", **options)
    assert operator.attrgetter(place)(training) == value
    output = training(*batch(2), generator=seeded(0))
    output.loss.backward()
    assert output.loss.isfinite()


def test_recipes__options_that_are_compared_otherwise() -> None:
    training = build("dacs", class_weights=[1, 2, 3, *[1] * (C - 3)])
    assert torch.equal(training.mix.class_weights[:3], torch.tensor([1.0, 2.0, 3.0]))
    assert build("classmix", ratio=0.25).mix.ratio == 0.25
    assert build("alignment", momentum=0.5).align.momentum == 0.5
    assert build("dacs", augment=None, consistency=True).consistency_augment is None
    assert "buffers='average'" in repr(build("dacs", buffers="average").teacher)
    network = confident_network()
    assert build("dacs", network=network, start=1).teacher.module is network
    assert build("source", augment=Tint(), label_smoothing=0.1).source_criterion.label_smoothing == 0.1


def test_recipes__an_augmentation_of_ones_own_changes_mixed_and_hidden_images() -> None:
    seen: list[torch.Tensor] = []
    training = build("dacs", augment=Tint(), consistency=lambda images: seen.append(images) or images)
    source, labels, target = batch(2)
    draw = training.sample(2, generator=seeded(1))
    output = training(source, labels, target, draw=draw)
    plain = build("dacs", augment=None)(source, labels, target, draw=draw)
    torch.testing.assert_close(output.mixed.images, 0.5 * plain.mixed.images, rtol=0, atol=0)
    torch.testing.assert_close(seen[0], 0.5 * target, rtol=0, atol=0)


def test_recipes__images_that_are_normalised_have_an_augmentation_of_ones_own() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    source, labels, target = batch(2)
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    source, target = (source - shift) / scale, (target - shift) / scale
    for options in ({"augment": None}, {"augment": Tint()}, {"augment": StrongAugment(mean=mean, std=std)}, {}):
        training = build("dacs", recipe="mic", mean=mean, std=std, **options)
        assert training.consistency.fill == pytest.approx(
            [(v - m) / s for v, m, s in zip((0.485, 0.456, 0.406), mean, std, strict=True)]
        )
        assert training(source, labels, target, generator=seeded(0)).loss.isfinite()
        with pytest.raises(ValueError, match="before they are normalised by mean="):
            training(source * 255, labels, target)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got"):
        build("dacs", augment=Tint())(source, labels, target)


LEFT_OUT: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "unknown": (
        {"lamda": 1},
        TypeError,
        r"unknown option 'lamda'; the options are weigh, .*rounding, .*augment, .*std\.$",
    ),
    "target_weights": (
        {"target_weights": torch.ones(2)},
        TypeError,
        "given with each batch, when the result is called",
    ),
    "given mix": ({"mix": None, "ratio": 0.5}, ValueError, "`ratio` must be left out if `mix` is given"),
    "given augment": ({"augment": None, "flavor": "additive"}, ValueError, "`flavor` must be left out if `augment`"),
    "given teacher": (
        {"teacher": MeanTeacher(nn.Conv2d(3, C, 1)), "decay": 0.9},
        ValueError,
        "`decay` must be left out",
    ),
    "given loss": ({"source_criterion": nn.MSELoss(), "label_smoothing": 0.1}, ValueError, "`label_smoothing` must be"),
    "given alignment": (
        {"method": "alignment", "align": DistributionAlignment(C), "prior": [1 / C] * C},
        ValueError,
        "`prior` must be left out if `align` is given",
    ),
    "no mix": ({"method": "pseudo-label", "ratio": 0.5}, ValueError, "left out for method='pseudo-label'"),
    "no teacher": ({"method": "source", "warmup": False}, ValueError, "`warmup` must be left out for method='source'"),
    "no alignment": ({"momentum": 0.5}, ValueError, "`momentum` must be left out for method='dacs'"),
    "source's teacher": (
        {"method": "source", "teacher": MeanTeacher(nn.Conv2d(3, C, 1))},
        ValueError,
        "use method='pseudo-label'",
    ),
    "no augmentation": ({"method": "source", "hue": 0.1}, ValueError, "`hue` must be left out for method='source'"),
    "no mixed loss": ({"method": "source", "normalizer": "valid"}, ValueError, "`normalizer` must be left out for"),
    "no consistency": ({"consistency_augment": StrongAugment()}, ValueError, "if there is no `consistency`; pass both"),
    "given consistency": (
        {"consistency": MaskedImages(8), "consistency_block": 16},
        ValueError,
        "`consistency_block` must be left out if `consistency` is a module",
    ),
    "given masks": ({"masks": BoxMasks(), "ratio": 0.3}, ValueError, "`ratio` must be left out if `masks` is given"),
    "mean": ({"mean": (0.5, 0.5, 0.5)}, ValueError, "`mean` and `std` belong together"),
    "another mean": (
        {"augment": StrongAugment(), "mean": (0.5, 0.5, 0.5), "std": (1.0, 1.0, 1.0)},
        ValueError,
        "`augment` must have the mean=.* of SelfTraining, got None",
    ),
    "both kinds of masks": ({"masks": BoxMasks(), "class_weights": [1.0] * C}, ValueError, "must not both be given"),
    "value": ({"rounding": "up"}, ValueError, "`rounding` must be one of 'ceil', 'floor', got 'up'"),
    "part": ({"augment": 0.5}, TypeError, "`augment` must be callable, got float"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_recipes__refuse_what_would_have_no_effect(name: str) -> None:
    options, error, message = LEFT_OUT[name]
    with pytest.raises(error, match=message):
        recipes.self_training(nn.Conv2d(3, C, 1), C, **options)


def test_recipes__take_every_field_of_a_recipe_with_every_method() -> None:
    for method in recipes.METHODS:  # fields of a recipe fit every method, so that methods can be compared
        recipe = {name: getattr(recipes.MIC, name) for name in recipes.Recipe.__dataclass_fields__}
        assert build(method, **recipe).source_criterion.normalizer == "valid"


def test_recipes__know_every_argument_of_their_parts() -> None:
    """So that none is forgotten when a part gets a new one."""
    elsewhere = {"num_classes", "student"}
    with pytest.raises(TypeError) as error:
        build("dacs", unknown=0)
    known = set(re.findall(r"\w+", str(error.value).partition("options are")[2]))
    for part in (CrossDomainMix, MeanTeacher, StrongAugment, ConfidenceWeightedCE, DistributionAlignment, SelfTraining):
        assert set(inspect.signature(part).parameters) <= known | elsewhere, part
