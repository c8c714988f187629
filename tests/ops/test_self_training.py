"""The algorithm: whole steps against slow restatements, and every configuration."""

import copy
import inspect
import math
import operator
import re
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from checks import assert_equal_states
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
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TERMS = ("source_loss", "mixed_loss", "consistency_loss")
every_method = pytest.mark.parametrize(
    ("method", "recipe"), [*((method, "mic") for method in recipes.METHODS), ("dacs", "released"), ("dacs", "paper")]
)


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


def build(method: str = "dacs", *, student: nn.Module | None = None, **options: object) -> SelfTraining:
    return recipes.self_training(student or confident_network(), C, method=method, **options).train()


def assemble(**parts: Any) -> SelfTraining:
    """Without a recipe: DACS, but for the parts that are given."""
    student = parts.pop("student", None) or confident_network()
    return SelfTraining(student, **{"teacher": MeanTeacher(student), "mix": CrossDomainMix(C)} | parts).train()


def take_step(training: SelfTraining, optimizer: torch.optim.Optimizer, k: int) -> Tensor:
    optimizer.zero_grad()
    loss: Tensor = training(*batch(k), generator=seeded(k)).loss
    loss.backward()
    optimizer.step()
    training.update()
    return loss.detach()


def names(draw: SelfTrainingDraw) -> set[str]:
    return {name for name, value in draw._asdict().items() if value is not None}


def slow_losses(
    recipe: str,
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    data: tuple[Tensor, Tensor, Tensor],
    draw: SelfTrainingDraw,
    allowed: Tensor,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One iteration: facts of the released code, the paper's text, or MIC. The terms, and what they are made of."""
    source, labels, target = data
    paper, mic = recipe == "paper", recipe == "mic"
    confidence, pseudo = softmax(with_batch_statistics(teacher, target)).detach().max(1)
    sure = (confidence >= THRESHOLD).to(source.dtype)
    lam = torch.stack([sure[i].mean() for i in range(N)]) if paper else sure.mean().expand(N)
    lam = lam[:, None, None].expand(N, H, W)
    weights = lam * allowed
    if mic:  # ignored rows count in lambda
        weights[:, : round(100 / 512 * H)] = 0
        weights[:, H - round(120 / 512 * H) :] = 0
    mask = mask_by_loop(labels, classes_by_loop(labels, C, draw.scores, 0.5, 255, ignored=recipe == "released"), 255)
    ones = torch.ones_like(weights)
    pasted = (source, labels, lam if paper else ones)
    images, mixed_labels, mixed_weights = paste(pasted, (target, pseudo, weights), mask)
    parts = {"images": images, "labels": mixed_labels.long(), "weights": mixed_weights, "confidence": confidence}
    if mic:
        images = parts["images"] = augment_one_by_one(images, draw.augment, "torchvision")
    passes = [
        (source, labels, ones, N * H * W if paper else int((labels != 255).sum())),
        (images, parts["labels"], mixed_weights, N * H * W),
    ]
    if mic:
        hidden = augment_one_by_one(target, draw.consistency_augment, "torchvision")
        for i, channel, row, column in np.ndindex(*hidden.shape):
            if float(draw.consistency[i, row // 2, column // 2]) < 0.7:
                hidden[i, channel, row, column] = MEAN[channel]
        passes.append((hidden, pseudo, weights, 2 * N * H * W))  # `consistency_weight`
    losses = [mean_cross_entropy(with_batch_statistics(student, seen), *truth) for seen, *truth in passes]
    return dict(zip(TERMS, losses, strict=False)), parts


@pytest.mark.parametrize(
    ("recipe", "dtype", "tolerance"),
    [
        ("released", torch.float64, 1e-11),
        ("paper", torch.float64, 1e-11),
        ("released", torch.float32, 2e-6),
        ("mic", torch.float64, 1e-5),  # kornia's blur has 51 taps
    ],
)
def test_training__equals_the_slow_reference_over_steps(recipe: str, dtype: torch.dtype, tolerance: float) -> None:
    network = confident_network(dtype)
    mic = {"ignore_top": 100, "consistency_block": 2, "consistency_weight": 0.5}
    options = mic if recipe == "mic" else {"augment": None}
    training = build(student=network, recipe=recipe, **options)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    slow = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    slow_optimizer = torch.optim.SGD(slow.values(), 0.05, momentum=0.9)
    teacher = {name: p.detach().clone() for name, p in slow.items()}
    shares = []
    for step in range(4):
        data, allowed = batch(step, dtype), torch.rand(N, H, W, generator=seeded(step)).to(dtype)
        draw = training.sample(N, (H, W), generator=seeded(50 + step))
        output = training(*data, target_weights=allowed, draw=draw)
        losses, parts = slow_losses(recipe, slow, teacher, data, draw, allowed)
        for one, loss in ((optimizer, output.loss), (slow_optimizer, sum(losses.values()))):
            one.zero_grad()
            loss.backward()
        got = {name: getattr(output, name) for name in losses} | output.mixed._asdict() | output._asdict()
        for name, value in (losses | parts | {"loss": sum(losses.values())}).items():
            torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance)
        for name, p in network.named_parameters():
            torch.testing.assert_close(p.grad, slow[name].grad, rtol=10 * tolerance, atol=tolerance)
        optimizer.step()
        slow_optimizer.step()
        training.update()
        alpha = 0.0 if recipe == "paper" else min(1 - 1 / (step + 1), 0.999 if recipe == "mic" else 0.99)
        for name, value in teacher.items():
            value.copy_(alpha * value + (1 - alpha) * slow[name].detach())
        for network_of, want in ((network, slow), (training.teacher.module, teacher)):
            torch.testing.assert_close(dict(network_of.named_parameters()), want, rtol=tolerance, atol=tolerance)
        shares.append(float((parts["confidence"] >= THRESHOLD).double().mean()))
    assert any(0.05 < share < 0.95 for share in shares)  # lambda was no trivial 0 or 1


def quarter(*, upsampled: bool, align_corners: bool = True) -> nn.Sequential:
    """Logits at a quarter of the size, as SegFormer gives them, or upsampled."""
    torch.manual_seed(0)
    upsampling = nn.Upsample(scale_factor=4, mode="bilinear", align_corners=align_corners)
    network = nn.Sequential(nn.Conv2d(3, C, 4, 4), upsampling).double()
    network[0].weight.data.mul_(4)
    return network if upsampled else network[:1]


class Weighted:
    """A criterion of somebody else."""

    def __init__(self, weights: Callable[[Tensor], Tensor]) -> None:
        self.weights = weights

    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return (nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=255) * weights).mean()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {"recipe": "released", "threshold": 0.3}) for method in recipes.METHODS),
        *((method, {"recipe": "paper", "threshold": 0.3}) for method in recipes.METHODS),
        ("dacs", {"align_corners": False}),
        ("dacs", {"criterion": Weighted(F.confidence_weight), "source_criterion": F.weighted_cross_entropy}),
    ],
)
def test_upsample__is_the_upsampled_network(method: str, options: dict[str, Any]) -> None:
    source, target = torch.rand(2, N, 3, 36, 12, dtype=torch.float64, generator=seeded(0))
    labels = torch.randint(0, C, (N, 36, 12), generator=seeded(1), dtype=torch.uint8)
    results = []
    for upsampled in (False, True):
        network = quarter(upsampled=upsampled, align_corners=options.get("align_corners", True))
        training = build(method, student=network, upsample=not upsampled, **options)
        output = training(source, labels, target, generator=seeded(2))
        output.loss.backward()
        gradients = [p.grad for p in network.parameters()]
        results.append((output.loss.detach(), output.confidence, gradients))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("upsample", "weigh"), [(False, "mixed"), (True, "target")])
@pytest.mark.parametrize("method", ["pseudo-label", "classmix", "alignment", "dacs"])
def test_consistency__is_the_loss_on_hidden_target_images(method: str, upsample: bool, weigh: str) -> None:
    """With every method; the teacher's one pass serves both terms, and the rest of the step stays as it is."""
    options = {"upsample": upsample, "weigh": weigh, "threshold": 0.5, "consistency_block": 4}
    training = build(method, student=quarter(upsampled=not upsample), recipe="mic", **options)
    plain, student = copy.deepcopy(training), copy.deepcopy(training.student)
    plain.consistency = None
    source, target = torch.rand(2, N, 3, 36, 12, dtype=torch.float64, generator=seeded(0))
    labels = torch.randint(0, C, (N, 36, 12), generator=seeded(1), dtype=torch.uint8)
    allowed = torch.rand(N, 36, 12, generator=seeded(2), dtype=torch.float64)
    draw = training.sample(N, (36, 12), generator=seeded(3))
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

    jittered = training.consistency_augment(target, draw=draw.consistency_augment)
    images = MaskedImages(4)(jittered, scores=draw.consistency)
    full_size = nn.Upsample((36, 12), mode="bilinear", align_corners=True)
    probs = full_size(training.teacher(target)).softmax(1)
    pseudo = F.pseudo_label_from_probs(probs if training.align is None else training.align(probs))
    weights = F.confidence_weight(pseudo.confidence, 0.5, scope="batch") * allowed
    weights[:, : round(15 / 512 * 36)] = 0
    weights[:, 36 - round(120 / 512 * 36) :] = 0
    assert 0 < int((weights > 0).sum()) < weights.numel()
    losses = nn.functional.cross_entropy(full_size(student(images)), pseudo.labels, reduction="none")
    torch.testing.assert_close(output.consistency_loss, (losses * weights).mean(), rtol=1e-9, atol=1e-12)


class OwnNorm(nn.BatchNorm2d):
    """A norm with a forward pass of its own, which reads its running statistics whatever their kind."""

    def forward(self, images: Tensor) -> Tensor:
        assert self.running_mean is not None
        return super().forward(images) + 0 * self.running_mean[:, None, None]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, OwnNorm])
def test_consistency__need_not_change_running_statistics(norm: type[nn.BatchNorm2d], frozen: bool) -> None:
    """Losses and gradients stay the same, and the statistics are those of a step without the term."""

    def step(**options: object) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
        network = confident_network()
        network.norm = norm(network.norm.num_features).double()
        training = build(student=network, consistency_block=2, threshold=0.3, **options)
        network.norm.train(not frozen)
        before, flags = dict(network.norm.named_buffers()), dict(vars(network.norm))
        losses = [loss for _, loss in training.terms(*batch(0), draw=draw)]
        sum(losses).backward()
        assert all(value is before[name] for name, value in network.norm.named_buffers())
        assert vars(network.norm) == flags
        return losses, {name: p.grad for name, p in network.named_parameters()}, before

    draw = build(consistency=True, consistency_block=2).sample(N, (H, W), generator=seeded(1))
    _, _, plain = step()
    losses, gradients, followed = step(consistency=True)
    kept_losses, kept_gradients, kept = step(consistency=True, consistency_running_stats=False)
    torch.testing.assert_close((kept_losses, kept_gradients), (losses, gradients), rtol=0, atol=0)
    torch.testing.assert_close(kept, plain, rtol=0, atol=0)
    assert torch.equal(followed["running_mean"], plain["running_mean"]) == frozen


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(nn.InstanceNorm2d, track_running_stats=True)])
def test_consistency__keeps_running_statistics_under_ddp(norm: Callable[[int], nn.Module]) -> None:
    """With the defaults of DistributedDataParallel, which looks for buffers before each pass."""
    network = confident_network()
    network.norm = norm(network.norm.num_features).double()
    options = {"consistency": True, "consistency_block": 2, "consistency_running_stats": False}
    training = build(student=network, threshold=0.3, **options)
    training.student = nn.parallel.DistributedDataParallel(network)
    alone = copy.deepcopy(network)
    source, labels, target = batch(0)
    draw = training.sample(N, (H, W), generator=seeded(1))
    mixed = training(source, labels, target, draw=draw)
    mixed.loss.backward()
    for images in (source, mixed.mixed.images):
        alone.train()(images)
    torch.testing.assert_close(dict(network.named_buffers()), dict(alone.named_buffers()))


def test_draw__replays_and_splits_over_ranks() -> None:
    network = confident_network()
    network.norm = nn.Identity()  # batch statistics are the one thing that does not split
    masked = {"consistency": MaskedImages(2), "consistency_augment": StrongAugment()}
    training = assemble(student=network, augment=StrongAugment(same_on_batch=True), **masked)
    data, state = batch(0), torch.get_rng_state()
    draw = training.sample(N, (H, W), generator=seeded(5))
    whole, again = training(*data, draw=draw), training(*data, generator=seeded(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.loss, whole.loss)
    assert torch.equal(again.mixed.images, whole.mixed.images)
    parts = [training(*(x[i : i + 1] for x in data), draw=draw.rows(slice(i, i + 1))) for i in range(N)]
    torch.testing.assert_close(torch.cat([part.mixed.images for part in parts]), whole.mixed.images)
    assert torch.equal(torch.cat([part.mixed.labels for part in parts]), whole.mixed.labels)
    torch.testing.assert_close(torch.stack([part.consistency_loss for part in parts]).mean(), whole.consistency_loss)
    plain = assemble(augment=StrongAugment(same_on_batch=True)).sample(N, generator=seeded(5))
    assert names(plain) == {"scores", "augment"}
    torch.testing.assert_close(tuple(plain[:2]), tuple(draw[:2]), rtol=0, atol=0)  # the other terms draw first
    training(*data)
    assert not torch.equal(torch.get_rng_state(), state)  # without a generator the global one draws


def test_draw__is_empty_where_nothing_is_random() -> None:
    assert not names(build("source").sample(N))
    assert not names(assemble(mix=None, augment=lambda x: x).sample(N, (H, W)))
    assert names(assemble(consistency=lambda x: x, consistency_augment=lambda x: x).sample(N)) == {"scores"}


MIXES = {"dacs": CrossDomainMix(C), "classmix": ClassMix(C), "pseudo-label": None}


@pytest.mark.parametrize(("height", "weigh"), [(4, "target"), (63, "target"), (512, "mixed"), (1000, "mixed")])
@pytest.mark.parametrize("kind", MIXES)
def test_ignored_rows__weigh_nothing_and_count_in_lambda(kind: str, weigh: str, height: int) -> None:
    """As `target_weights` that are 0 in these rows; one weight per image is one for all its pixels."""
    source, target = torch.rand(2, 2, 3, height, 3, generator=seeded(0))
    labels = torch.randint(0, C, (2, height, 3), generator=seeded(1))
    rows = torch.ones(2, height, 3)
    rows[:, : int(15 * height / 512 + 0.5)] = 0
    rows[:, height - int(120 * height / 512 + 0.5) :] = 0
    options = {"student": confident_network(torch.float32), "mix": MIXES[kind], "weigh": weigh, "num_classes": C}
    training, plain = assemble(**options, ignore_top=15, ignore_bottom=120), assemble(**options)
    for weights, same in ((None, rows), (torch.tensor([0.0, 0.5]), rows * torch.tensor([0.0, 0.5])[:, None, None])):
        got = training(source, labels, target, target_weights=weights, generator=seeded(2))
        want = plain(source, labels, target, target_weights=same, generator=seeded(2))
        torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0)
    nothing = training(source, labels, target, target_weights=torch.zeros(2))
    assert (float(nothing.mixed_loss.detach()) == 0) == (kind != "dacs")


@pytest.mark.parametrize("weigh", ["target", "mixed"])
@pytest.mark.parametrize("scope", ["image", "batch", "pixel", "none"])
@pytest.mark.parametrize("kind", MIXES)
def test_weights__equal_the_loop(weigh: str, scope: str, kind: str) -> None:
    training = assemble(mix=MIXES[kind], criterion=ConfidenceWeightedCE(scope=scope), weigh=weigh)
    source, labels, target = batch(7)
    allowed = torch.rand(N, H, W, generator=seeded(8), dtype=torch.float64)
    confidence = training.teacher.pseudo_label(target).confidence
    lam = F.confidence_weight(confidence, scope=scope)
    output = training(source, labels, target, target_weights=allowed, generator=seeded(9))
    torch.testing.assert_close(output.target_weight, (lam * allowed).mean())
    mixed = output.mixed
    from_mix = F.confidence_weight(F.mix(confidence, confidence.roll(-1, 0), mixed.mask), scope=scope)
    for i, row, column in np.ndindex(N, H, W):
        pasted = bool(mixed.mask[i, row, column])
        if kind == "classmix":
            origin = i if pasted else (i + 1) % N
            weight = from_mix[i, row, column] if weigh == "mixed" else lam[origin, row, column]
            want = weight * allowed[origin, row, column]
        elif pasted:
            want = lam[i, row, column] if weigh == "mixed" else 1.0
        else:
            want = lam[i, row, column] * allowed[i, row, column]
        assert float(mixed.weights[i, row, column]) == pytest.approx(float(want), rel=1e-12)


class Rows(nn.Module):
    """A mask of its own, which depends on the size."""

    def sample_scores(self, n: int, size: tuple[int, int], **where: Any) -> Tensor:
        return torch.rand(n, size[0], generator=where["generator"], device=where["device"])

    def forward(
        self, xs: Tensor, ys: Tensor, xt: Tensor, yt: Tensor, w: Tensor, *, scores: Tensor | None = None
    ) -> Mixed:
        mask = (scores < 0.5)[:, :, None].expand(ys.shape)
        return Mixed(F.mix(xs, xt, mask), F.mix(ys, yt, mask), F.mix(torch.ones_like(w), w, mask), mask)


def test_mix__makes_its_own_scores_where_it_can() -> None:
    training = assemble(mix=Rows())  # which needs no number of classes
    draw = training.sample(N, (H, W), generator=seeded(1))
    assert draw.scores.shape == (N, H)
    want = (draw.scores < 0.5)[:, :, None].expand(N, H, W)
    assert torch.equal(training(*batch(0), generator=seeded(1)).mixed.mask, want)
    assert torch.equal(training(*batch(0), draw=draw).mixed.mask, want)


def test_methods__are_the_rows_of_the_ablation() -> None:
    data = batch(4)
    outputs = {method: build(method)(*data, generator=seeded(2)) for method in recipes.METHODS}
    source = outputs["source"]
    assert (source.mixed, source.confidence, source.target_weight, float(source.mixed_loss)) == (None, None, None, 0)
    assert torch.equal(source.loss, source.source_loss)
    for output in outputs.values():
        torch.testing.assert_close(output.source_loss, source.source_loss)
    pseudo, naive, dacs = (outputs[m].mixed for m in ("pseudo-label", "classmix", "dacs"))
    teacher_labels = build().teacher.pseudo_label(data[2]).labels
    assert not pseudo.mask.any()
    assert torch.equal(pseudo.labels, teacher_labels)
    assert torch.equal(naive.labels, torch.where(naive.mask, teacher_labels, teacher_labels.roll(-1, 0)))
    assert torch.equal(dacs.labels, torch.where(dacs.mask, data[1], teacher_labels))
    assert bool((dacs.weights[dacs.mask] == 1).all())


@pytest.mark.parametrize("ignored", [255, 0])
def test_criteria__defaults_are_lambda_per_image_and_the_mean_over_valid_source_pixels(ignored: int) -> None:
    """The ignored id of the mix is that of both losses."""
    training = assemble(mix=CrossDomainMix(C, ignore_index=ignored))
    parameters = dict(training.student.named_parameters())
    source, labels, target = batch(3)
    labels[labels == 255] = ignored
    output = training(source, labels, target, generator=seeded(0))
    mixed = output.mixed
    logits = with_batch_statistics(parameters, source)
    torch.testing.assert_close(output.source_loss, nn.functional.cross_entropy(logits, labels, ignore_index=ignored))
    logits = with_batch_statistics(parameters, mixed.images)
    losses = nn.functional.cross_entropy(logits, mixed.labels, ignore_index=ignored, reduction="none")
    torch.testing.assert_close(output.mixed_loss, (losses * mixed.weights).mean())
    lam = (output.confidence >= THRESHOLD).double().mean((1, 2))
    torch.testing.assert_close(mixed.weights, lam[:, None, None].where(~mixed.mask, 1.0))


def test_align__updates_in_training_alone_and_aligns() -> None:
    align = DistributionAlignment(C, prior=torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]))
    training, data = assemble(mix=ClassMix(C), align=align), batch(0)
    probs = training.teacher(data[2]).softmax(1)
    before = copy.deepcopy(training.state_dict())
    output = training(*data, generator=seeded(0))
    torch.testing.assert_close(align.running.double(), probs.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    want = F.pseudo_label_from_probs(F.align_distribution(probs, align.prior, align.running))
    torch.testing.assert_close(output.confidence, want.confidence)
    after = copy.deepcopy(training.state_dict())
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    statistics = {f"student.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed == statistics | {"align.running", "align.running_count"}  # forward changes nothing else
    assert int(after["student.norm.num_batches_tracked"]) == 2  # source, then mixed
    training.eval()
    training(*data, generator=seeded(0))
    torch.testing.assert_close(training.state_dict(), after, rtol=0, atol=0)


def test_align__may_be_ones_own() -> None:
    class First:
        """Makes everything the first class it has been told of."""

        def update(self, probs: Tensor) -> None:
            self.seen = probs

        def __call__(self, probs: Tensor) -> Tensor:
            assert torch.equal(probs, self.seen)
            return nn.functional.one_hot(torch.zeros_like(probs[:, 0]).long(), C).movedim(-1, 1).to(probs)

    output = assemble(mix=ClassMix(C), align=First())(*batch(0), generator=seeded(0))
    assert not output.mixed.labels.any()
    assert bool((output.confidence == 1).all())


@every_method
def test_degenerate__all_ignored_and_empty_batches(method: str, recipe: str) -> None:
    images, empty = torch.rand(2, 3, 4, 4), torch.rand(0, 3, 4, 4)
    training = build(method, student=nn.Conv2d(3, C, 1), recipe=recipe)
    output = training(images, torch.full((2, 4, 4), 255), images)
    assert float(output.source_loss.detach()) == 0
    assert bool(output.loss.isfinite())
    for student in (nn.Conv2d(3, C, 1), SlowNetwork(C)):
        training = build(method, student=student, recipe=recipe)
        output = training(empty, torch.zeros(0, 4, 4, dtype=torch.uint8), empty)
        assert float(output.loss.detach()) == 0
        output.loss.backward()
        assert not any(p.grad.any() for p in training.student.parameters())
        assert all(value.isfinite().all() for value in training.state_dict().values())


@every_method
def test_autocast__losses_are_float32(method: str, recipe: str) -> None:
    training = build(method, student=confident_network(torch.float32), recipe=recipe)
    data = batch(0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = training(*data, generator=seeded(0))
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    full = training(*data, generator=seeded(0))
    assert float(output.source_loss.detach()) == pytest.approx(float(full.source_loss.detach()), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks__losses_are_float32(dtype: torch.dtype) -> None:
    training, data = build(student=confident_network(dtype)), batch(0, dtype)
    output = training(*data, generator=seeded(0))
    assert output.loss.dtype == output.mixed_loss.dtype == output.mixed.weights.dtype == torch.float32
    want = F.pseudo_label_from_probs(training.teacher(data[2]).float().softmax(1))
    assert torch.equal(output.confidence, want.confidence)
    assert output.mixed.images.dtype == dtype
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in training.student.parameters())


@every_method
def test_state_dict__resumes_bit_for_bit(method: str, recipe: str) -> None:
    runs = [build(method, recipe=recipe) for _ in range(2)]
    optimizers = [torch.optim.SGD(run.student.parameters(), 0.05, momentum=0.9) for run in runs]
    for k in range(2):
        take_step(runs[0], optimizers[0], k)
    for one, two in (runs, optimizers):
        two.load_state_dict(copy.deepcopy(one.state_dict()))
    for k in range(2, 4):
        for training, optimizer in zip(runs, optimizers, strict=True):
            take_step(training, optimizer, k)
    torch.testing.assert_close(*(dict(run.state_dict()) for run in runs), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["pseudo-label", "classmix", "alignment"])
def test_target__may_differ_in_size_where_nothing_of_the_source_is_pasted(method: str) -> None:
    source, labels, _ = batch(0)
    target = torch.rand(3, 3, 9, 5, dtype=torch.float64, generator=seeded(1))
    output = build(method)(source, labels, target, generator=seeded(2))
    assert output.mixed.images.shape == target.shape
    assert output.mixed.weights.shape == output.confidence.shape == (3, 9, 5)
    torch.testing.assert_close(output.source_loss, build("source")(source, labels, target).loss)


def test_no_teacher__is_the_source_only_baseline_whatever_else_is_given() -> None:
    training = assemble(teacher=None, augment=StrongAugment(), align=DistributionAlignment(C))
    state = torch.get_rng_state()
    output = training(*batch(0))
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn for nothing
    torch.testing.assert_close(output.loss, build("source")(*batch(0)).loss)
    assert (output.confidence, output.mixed, float(output.mixed_loss)) == (None, None, 0.0)
    assert int(training.align.running_count) == 0
    training.update()


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


def test_teacher__may_be_anybodys() -> None:
    """Four steps with torch's own averaged model, and with one of no library, are those with ours."""
    losses = []
    for teacher in (
        lambda network: MeanTeacher(network, decay=0.5),
        lambda network: AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
        Ema,
    ):
        network = confident_network()
        network.norm = nn.Identity()  # each has its own idea of buffers
        training = assemble(student=network, teacher=teacher(network))
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        losses += [take_step(training, optimizer, k) for k in range(4)]
    torch.testing.assert_close(losses[4:], 2 * losses[:4])


def test_train__stops_at_the_teacher() -> None:
    network = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.Dropout(0.5))
    training = assemble(student=network, teacher=AveragedModel(network).eval(), augment=nn.Sequential())
    before = copy.deepcopy(training.teacher.state_dict())
    for mode in (False, True):
        assert training.train(mode) is training
        assert training.training is training.student.training is training.augment.training is mode
        assert not any(module.training for module in training.teacher.modules())
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
    mask = left_half(labels, ratio)
    return Mixed(*(F.mix(value, value.roll(-1, 0), mask) for value in (images, labels, weights)), mask)


@pytest.mark.parametrize("weigh", ["target", "mixed"])
@pytest.mark.parametrize("own", [whole_left, OwnMix(), own_target_mix], ids=["function", "module", "target mix"])
def test_mix__may_be_ones_own(own: Callable[..., Mixed], weigh: str) -> None:
    training = assemble(mix=own, num_classes=C, weigh=weigh)
    source, labels, target = batch(1)
    mixed = training(source, labels, target, generator=seeded(0)).mixed
    pseudo = training.teacher.pseudo_label(target)
    weights = F.confidence_weight(pseudo.confidence)
    if own is own_target_mix:
        images, classes, weights, mask = own(target, pseudo.labels, weights, torch.rand(N, C + 1))
        if weigh == "mixed":
            weights = F.confidence_weight(F.mix(pseudo.confidence, pseudo.confidence.roll(-1, 0), mask))
    else:
        images, classes, of_target, mask = whole_left(source, labels, target, pseudo.labels, weights)
        weights = of_target if weigh == "target" else weights
    torch.testing.assert_close(tuple(mixed), (images, classes, weights, mask))


def test_mix__may_return_images_of_another_dtype() -> None:
    def in_float32(xs: Tensor, ys: Tensor, xt: Tensor, yt: Tensor, w: Tensor) -> Mixed:
        images, *rest = whole_left(xs, ys, xt, yt, w)
        return Mixed(images.float(), *rest)

    source, labels, target = batch(1)  # float64, as the student
    rounded = source.float().double(), labels, target.float().double()
    found, expected = assemble(mix=in_float32)(*rounded), assemble(mix=whole_left)(*rounded)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("num_classes", [None, C])
@pytest.mark.parametrize("keywords", [("scores",), ("generator",), ("scores", "generator"), ()])
def test_mix__gets_scores_or_the_generator(keywords: tuple[str, ...], num_classes: int | None) -> None:
    seen: dict[str, object] = {}

    def own(*tensors: Tensor, **given: object) -> tuple[Tensor, ...]:
        seen.update(given)
        return whole_left(*tensors)

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in "abcde"]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in keywords]
    own.__signature__ = inspect.Signature(parameters)
    training, generator = assemble(mix=own, num_classes=num_classes), seeded(0)
    training(*batch(0), generator=generator)
    if "scores" in keywords and num_classes is not None:
        assert seen.keys() == {"scores"}
        assert torch.equal(seen["scores"], training.sample(N, generator=seeded(0)).scores)
    else:
        assert seen == ({"generator": generator} if "generator" in keywords else {})


def test_mix__may_be_replaced_by_one_of_another_kind() -> None:
    training, data = assemble(), batch(0)
    for other in (ClassMix(C), None, torch.compile(CrossDomainMix(C), backend="eager"), CrossDomainMix(C)):
        training.mix = other
        want = assemble(mix=other, num_classes=C)(*data, generator=seeded(1))
        torch.testing.assert_close(tuple(training(*data, generator=seeded(1)).mixed), tuple(want.mixed))


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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_criteria__of_others_get_int64_and_their_own_ignored_id(dtype: torch.dtype) -> None:
    source, labels, target = batch(2)
    labels[0, 0] = 77  # neither a class nor the ignored id
    logits = with_batch_statistics(dict(confident_network().named_parameters()), source)
    want = nn.functional.cross_entropy(logits, labels.masked_fill(labels >= C, 255), ignore_index=255)
    for criterion, weigh in (
        (nn.CrossEntropyLoss(), lambda confidence: torch.full((N,), 0.5).to(confidence)),
        (nn.CrossEntropyLoss(ignore_index=255), lambda confidence: confidence.new_tensor(0.5)),
    ):
        training = assemble(criterion=Weighted(weigh), source_criterion=criterion)
        output = training(source, labels.to(dtype), target, generator=seeded(0))
        torch.testing.assert_close(output.source_loss, want)
        assert torch.equal(output.mixed.weights, torch.where(output.mixed.mask, 1.0, 0.5).double())
    function = assemble(teacher=None, source_criterion=nn.functional.cross_entropy)
    classes = labels.clamp(max=C - 1)
    got = function(source, classes.to(dtype), target).loss
    torch.testing.assert_close(got, nn.functional.cross_entropy(logits, classes))


@pytest.mark.parametrize("normalised", [False, True])
def test_augment__ours_is_drawn_and_replayed_compiled_too(normalised: bool) -> None:
    options = {"mean": (0.5,) * 3, "std": (0.25,) * 3} if normalised else {}
    source, labels, target = batch(0)
    source, target = ((images - 0.5) / 0.25 if normalised else images for images in (source, target))
    ours = StrongAugment(**options)
    plain, compiled = (assemble(augment=augment) for augment in (ours, torch.compile(ours, backend="eager")))
    draw = compiled.sample(N, generator=seeded(2))
    want = plain(source, labels, target, draw=plain.sample(N, generator=seeded(2)))
    torch.testing.assert_close(compiled(source, labels, target, draw=draw).mixed.images, want.mixed.images)
    with pytest.raises(ValueError, match=r"`draw.augment` must be given"):
        compiled(source, labels, target, draw=draw._replace(augment=None))


def test_consistency__compiled_is_drawn_and_replayed_too() -> None:
    plain, compiled = (
        build("dacs", consistency=hide) for hide in (MaskedImages(2), torch.compile(MaskedImages(2), backend="eager"))
    )
    draw = compiled.sample(N, (H, W), generator=seeded(2))
    assert torch.equal(draw.consistency, plain.sample(N, (H, W), generator=seeded(2)).consistency)
    want, *again = (training(*batch(0), draw=draw).consistency_loss for training in (plain, compiled, compiled))
    for loss in again:
        torch.testing.assert_close(loss, want, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"`draw.consistency` must be given"):
        compiled(*batch(0), draw=draw._replace(consistency=None))


def test_augment__all_of_ours_have_one_normalisation() -> None:
    plain, ours = StrongAugment(), StrongAugment(mean=MEAN, std=STD)
    for augment, other in ((plain, ours), (ours, plain)):
        with pytest.raises(ValueError, match=r"`consistency_augment` must have the mean=.* of `augment`, got"):
            build("dacs", augment=augment, consistency=MaskedImages(2), consistency_augment=other)
    with pytest.raises(ValueError, match=r"`augment` must have the mean=.* of SelfTraining, got None"):
        assemble(augment=plain, mean=MEAN, std=STD)
    assemble(augment=ours, mean=torch.tensor(MEAN), std=torch.tensor(STD))  # equal in float32


def test_consistency__hides_normalised_images_with_a_normalised_colour() -> None:
    ours = StrongAugment(mean=MEAN, std=STD)
    given = {"augment": ours, "mean": MEAN, "std": STD}
    hide = torch.compile(MaskedImages(2), backend="eager")
    refused: list[dict[str, Any]] = [
        {**given, "consistency": MaskedImages(2)},
        {**given, "consistency": hide},
        {"augment": ours, "consistency": MaskedImages(2)},  # which alone says how the images are normalised
        {"consistency_augment": ours, "consistency": MaskedImages(2)},
    ]
    for parts in refused:
        with pytest.raises(ValueError, match=r"normalised as the images are, got \(0\.485, .*; pass `fill=\(") as told:
            assemble(**parts)
    fill = tuple(map(float, re.findall(r"-?\d+\.\d+", str(told.value).rpartition("fill=")[2])))
    assemble(**given, consistency=MaskedImages(2, fill=fill))
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    assemble(augment=StrongAugment(**plain), **plain, consistency=MaskedImages(2))


@pytest.mark.parametrize("name", ["criterion", "source_criterion", "align"])
def test_recipes__parts_that_do_not_sync_are_refused(name: str) -> None:
    def part(*, sync: bool) -> nn.Module:
        return DistributionAlignment(C, sync=sync) if name == "align" else ConfidenceWeightedCE(sync=sync)

    with pytest.raises(ValueError, match=f"`{name}` must be built with sync=True"):
        build("alignment", sync=True, **{name: part(sync=False)})
    build("alignment", sync=True, **{name: part(sync=True)})
    build("alignment", **{name: part(sync=False)})


SWITCHES: dict[str, Callable[[], object]] = {
    "sync of the loss": lambda: ConfidenceWeightedCE(sync="no"),
    "sync of the alignment": lambda: DistributionAlignment(C, sync="no"),
    "warmup": lambda: MeanTeacher(nn.Conv2d(3, C, 1), warmup="no"),
    "upsample": lambda: assemble(upsample="no"),
    "align_corners": lambda: assemble(align_corners=0),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches__are_true_or_false(name: str) -> None:
    with pytest.raises(TypeError, match=rf"`{name.split(maxsplit=1)[0]}` must be True or False, got ('no'|0)"):
        SWITCHES[name]()


@pytest.mark.parametrize("kind", [ConfidenceWeightedCE, partial(CrossDomainMix, C), partial(ClassMix, C)], ids=str)
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.0, 4.0, 5.0]], ids=["without", "with"])
def test_class_weights__come_back_after_the_meta_device(kind: Callable[..., Any], weights: list[float] | None) -> None:
    with torch.device("meta"):
        module = kind(class_weights=weights)
    module.to_empty(device="cpu")
    module.reset_parameters()
    assert_equal_states(dict(module.named_buffers()), dict(kind(class_weights=weights).named_buffers()))


@pytest.mark.parametrize("method", ["pseudo-label", "classmix", "dacs"])
def test_images__keep_their_layout_and_dtype(method: str) -> None:
    source, labels, target = batch(0, torch.float32)
    source, target = (images.to(memory_format=torch.channels_last) for images in (source, target))
    for augment in (StrongAugment(), lambda images: images.double()):
        training = build(method, student=confident_network(torch.float32), augment=augment)
        mixed = training(source, labels, target).mixed
        assert mixed.images.dtype == torch.float32
        assert mixed.images.is_contiguous(memory_format=torch.channels_last)


def normalised(
    data: tuple[Tensor, Tensor, Tensor], mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> tuple[Tensor, Tensor, Tensor]:
    shift, scale = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (mean, std))
    return (data[0] - shift) / scale, data[1], (data[2] - shift) / scale


@every_method
def test_images__may_be_normalised_where_the_augmentation_knows(method: str, recipe: str) -> None:
    network = confident_network()
    network.register_forward_pre_hook(lambda _, args: normalised((args[0], args[0], args[0]))[0])
    want = build(method, student=network, recipe=recipe)(*batch(0), generator=seeded(0))
    source, labels, target = normalised(batch(0))
    got = build(method, recipe=recipe, mean=MEAN, std=STD)(source, labels, target, generator=seeded(0))
    torch.testing.assert_close(got.loss, want.loss)
    with pytest.raises(ValueError, match=r"`source_images` must lie in \[0, 1\], got values from -2"):
        build(method, recipe=recipe)(source, labels, target)


def test_images__overshoot_and_nan_are_let_through() -> None:
    training = build()
    source, labels, target = batch(0)
    target[0, 0, 0, :2] = torch.tensor([-0.45, 1.45])  # as bicubic resizing may leave them
    assert bool(training(source, labels, target).loss.isfinite())
    target[0, 0, 0, 0] = math.nan  # the loss says it, on every device, and the guard finds it there
    assert bool(training(source, labels, target).loss.isnan())


@every_method
def test_terms__one_by_one_have_the_gradients_of_the_sum(method: str, recipe: str) -> None:
    data, allowed = batch(0), torch.rand(N, H, W, generator=seeded(1))
    whole, parts = build(method, recipe=recipe), build(method, recipe=recipe)
    output = whole(*data, target_weights=allowed, generator=seeded(2))
    output.loss.backward()
    losses = {}
    for name, loss in parts.terms(*data, target_weights=allowed, generator=seeded(2)):
        loss.backward()
        losses[name] = loss.detach()
    assert tuple(losses) == TERMS[: 1 if method == "source" else 3 if recipe == "mic" else 2]
    for name, loss in losses.items():
        assert torch.equal(loss, getattr(output, name))
    torch.testing.assert_close(sum(losses.values()), output.loss.detach())
    for (name, one), other in zip(whole.student.named_parameters(), parts.student.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14, msg=name)
    torch.testing.assert_close(whole.state_dict(), parts.state_dict())  # BatchNorm and averages moved alike


def test_terms__hold_one_graph_at_a_time() -> None:
    class Kept(list[Tensor]):
        """A tensor that is saved for the backward pass."""

    refs: list[weakref.ref[Kept]] = []

    def keep(tensor: Tensor) -> Kept:
        kept = Kept([tensor])
        refs.append(weakref.ref(kept))
        return kept

    training, counts = build(recipe="mic"), []
    with torch.autograd.graph.saved_tensors_hooks(keep, operator.itemgetter(0)):
        for _, loss in training.terms(*batch(0), generator=seeded(0)):
            counts.append(sum(ref() is not None for ref in refs))
            loss.backward()
            counts.append(sum(ref() is not None for ref in refs))
    assert all(counts[::2])
    assert not any(counts[1::2])


def test_forward__an_incomplete_draw_is_refused_before_the_student_runs() -> None:
    training, data = build(recipe="mic"), batch(2)
    before = copy.deepcopy(training.state_dict())
    draw = training.sample(N, (H, W))
    for missing in draw._fields:
        for step in (training, training.terms):  # `terms` refuses it when it is called, not when it is iterated over
            with pytest.raises(ValueError, match=f"`draw.{missing}` must be given"):
                step(*data, draw=draw._replace(**{missing: None}))
    with pytest.raises(TypeError, match="`draw` must be a SelfTrainingDraw, got Tensor"):
        training.terms(*data, draw=draw.scores)
    with pytest.raises(ValueError, match=r"`source_labels` .* must agree"):
        training.terms(data[0], data[1][:1], data[2])
    torch.testing.assert_close(training.state_dict(), before, rtol=0, atol=0)


class Output(NamedTuple):
    logits: Tensor


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
    student, data = confident_network(), batch(0)
    student.register_forward_hook(lambda _, args, logits: wrap(logits))
    with pytest.raises(TypeError, match=re.escape(f"pass `logits=lambda out: {fix}` to SelfTraining")):
        build(student=student)(*data)
    output = build(student=student, logits=line)(*data, generator=seeded(0))
    torch.testing.assert_close(output.loss, build()(*data, generator=seeded(0)).loss)


def test_num_classes__is_that_of_the_parts_or_the_argument() -> None:
    assert assemble().num_classes == C
    assert assemble(mix=None, align=DistributionAlignment(C)).num_classes == C
    assert assemble(mix=None).num_classes is None
    with pytest.raises(ValueError, match="returned 5 classes but SelfTraining was built with num_classes=6"):
        assemble(mix=None, num_classes=6)(*batch(0))


def tint(images: Tensor) -> Tensor:
    """An augmentation of somebody else."""
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
    "consistency_running_stats": (False, "consistency_running_stats"),
    "consistency_ratio": (0.25, "consistency.ratio"),
    "consistency_block": (2, "consistency.block"),
    "consistency": (MaskedImages(2), "consistency"),
    "augment": (tint, "consistency_augment"),
    "consistency_augment": (tint, "consistency_augment"),
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

# What each recipe sets: released, paper, mic.
FIELDS: dict[str, tuple[object, object, object]] = {
    "weigh": ("target", "mixed", "target"),
    "scope": ("batch", "image", "batch"),
    "source_normalizer": ("valid", "all", "valid"),
    "include_ignored": (True, False, False),
    "decay": (0.99, 0.0, 0.999),
    "mode": ("train", "train", "train"),
    "flavor": ("additive", "torchvision", "torchvision"),
    "same_on_batch": (True, False, False),
    "threshold": (0.968, 0.968, 0.968),
    "ignore_top": (0, 0, 15),
    "ignore_bottom": (0, 0, 120),
    "consistency": (None, None, True),
    "consistency_block": (None, None, None),
    "consistency_ratio": (0.7, 0.7, 0.7),
    "consistency_weight": (1.0, 1.0, 1.0),
    "consistency_running_stats": (True, True, True),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_recipes__every_argument_of_a_part_is_an_option(name: str) -> None:
    value, place = OPTIONS[name]
    training = build(**{"consistency": True, name: value})
    assert operator.attrgetter(place)(training) == value
    output = training(*batch(2), generator=seeded(0))
    output.loss.backward()
    assert output.loss.isfinite()


@pytest.mark.parametrize("name", recipes.Recipe.__dataclass_fields__)
def test_recipes__every_field_is_set_and_can_be_set_otherwise(name: str) -> None:
    """In each recipe to the value that any of them has."""

    def read(**options: object) -> object:
        found = operator.attrgetter(OPTIONS[name][1])(build(**{"consistency": True} | options))
        return True if isinstance(found, MaskedImages) else found

    for recipe, value in zip(("released", "paper", "mic"), FIELDS[name], strict=True):
        assert getattr(getattr(recipes, recipe.upper()), name) == value
        assert name == "consistency" or read(recipe=recipe) == value
        for other in FIELDS[name]:
            assert read(**{"recipe": recipe, name: other}) == other


def test_recipes__options_that_are_compared_otherwise() -> None:
    training = build(class_weights=[1, 2, 3, *[1] * (C - 3)])
    assert torch.equal(training.mix.class_weights[:3], torch.tensor([1.0, 2.0, 3.0]))
    assert build("classmix", ratio=0.25).mix.ratio == 0.25
    assert build("alignment", momentum=0.5).align.momentum == 0.5
    assert build("alignment", prior=[1.0] * C).align.fixed_prior
    assert build(augment=None, consistency=True).consistency_augment is None
    assert "buffers='average'" in repr(build(buffers="average").teacher)
    network = confident_network()
    assert build(network=network, start=1).teacher.module is network
    assert build("source", augment=tint, label_smoothing=0.1).source_criterion.label_smoothing == 0.1
    assert build("pseudo-label", recipe="mic", ignore_top=0, ignore_bottom=7).ignore_bottom == 7
    assert build(recipe=recipes.PAPER).weigh == "mixed"


def test_recipes__settings_of_the_released_code() -> None:
    training = build(sync=True)
    assert training.criterion.normalizer == "all"
    assert training.criterion.sync
    assert training.source_criterion.sync
    assert training.teacher.warmup
    assert (training.augment.jitter_p, training.augment.blur_p, training.augment.hue) == (0.8, 0.5, 0.25)
    assert training.mix.ratio == 0.5
    assert "weigh='target', upsample=False, align_corners=True, num_classes=5, ignore_index=255" in repr(training)


def test_recipes__consistency_is_on_or_off_or_ones_own_in_each() -> None:
    own = MaskedImages(8)
    for recipe in ("released", "paper", "mic"):
        assert (build(recipe=recipe).consistency is None) == (recipe != "mic")
        assert build(recipe=recipe, consistency=own).consistency is own
        for off in (None, False):
            training = build(recipe=recipe, consistency=off)
            assert training.consistency is training.consistency_augment is None
        training = build(recipe=recipe, consistency=True)
        assert training.consistency_augment is not training.augment
        assert repr(training.consistency_augment) == repr(training.augment)
        assert build("source", recipe=recipe).consistency is None


def test_recipes__an_augmentation_of_ones_own_changes_mixed_and_hidden_images() -> None:
    seen: list[torch.Tensor] = []
    training = build(augment=tint, consistency=lambda images: seen.append(images) or images)
    source, labels, target = batch(2)
    draw = training.sample(N, generator=seeded(1))
    output = training(source, labels, target, draw=draw)
    plain = build(augment=None)(source, labels, target, draw=draw)
    torch.testing.assert_close(output.mixed.images, 0.5 * plain.mixed.images, rtol=0, atol=0)
    torch.testing.assert_close(seen[0], 0.5 * target, rtol=0, atol=0)


def test_recipes__images_that_are_normalised_have_an_augmentation_of_ones_own() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    source, labels, target = normalised(batch(2), mean, std)
    for options in ({"augment": None}, {"augment": tint}, {"augment": StrongAugment(mean=mean, std=std)}, {}):
        training = build(recipe="mic", mean=mean, std=std, **options)
        fill = [(v - m) / s for v, m, s in zip(MEAN, mean, std, strict=True)]
        assert training.consistency.fill == pytest.approx(fill)  # the mean colour
        assert training(source, labels, target, generator=seeded(0)).loss.isfinite()
        with pytest.raises(ValueError, match="before they are normalised by mean="):
            training(source, labels, target * 255)
    ours = StrongAugment(mean=mean, std=std)
    compiled = torch.compile(ours, backend="eager")
    for options in ({"augment": ours}, {"augment": compiled}, {"augment": tint, "consistency_augment": ours}):
        training = build(recipe="mic", **options)  # the augmentation alone says how images are normalised
        assert (training.consistency.fill, training.mean) == (pytest.approx(fill), None)
        assert training(source, labels, target, generator=seeded(0)).loss.isfinite()
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got"):
        build(augment=tint)(source, labels, target)


TEACHER = MeanTeacher(nn.Conv2d(3, C, 1))
OTHER_MEAN = {"augment": StrongAugment(), "mean": (0.5, 0.5, 0.5), "std": (1.0, 1.0, 1.0)}
LEFT_OUT: dict[str, tuple[dict[str, object], str]] = {
    "given mix": ({"mix": None, "ratio": 0.5}, "`ratio` must be left out if `mix` is given"),
    "given augment": ({"augment": None, "flavor": "additive"}, "`flavor` must be left out if `augment`"),
    "given teacher": ({"teacher": TEACHER, "decay": 0.9}, "`decay` must be left out"),
    "given loss": ({"source_criterion": nn.MSELoss(), "label_smoothing": 0.1}, "`label_smoothing` must be"),
    "given alignment": (
        {"method": "alignment", "align": DistributionAlignment(C), "prior": [1 / C] * C},
        "`prior` must be left out if `align` is given",
    ),
    "no mix": ({"method": "pseudo-label", "ratio": 0.5}, "left out for method='pseudo-label'"),
    "no teacher": ({"method": "source", "warmup": False}, "`warmup` must be left out for method='source'"),
    "no alignment": ({"momentum": 0.5}, "`momentum` must be left out for method='dacs'"),
    "source's teacher": ({"method": "source", "teacher": TEACHER}, "use method='pseudo-label'"),
    "no augmentation": ({"method": "source", "hue": 0.1}, "`hue` must be left out for method='source'"),
    "no mixed loss": ({"method": "source", "normalizer": "valid"}, "`normalizer` must be left out for"),
    "no consistency": ({"consistency_augment": StrongAugment()}, "if there is no `consistency`; pass both"),
    "given consistency": (
        {"consistency": MaskedImages(8), "consistency_block": 16},
        "`consistency_block` must be left out if `consistency` is a module",
    ),
    "given masks": ({"masks": BoxMasks(), "ratio": 0.3}, "`ratio` must be left out if `masks` is given"),
    "mean": ({"mean": (0.5, 0.5, 0.5)}, "`mean` and `std` belong together"),
    "another mean": (OTHER_MEAN, "`augment` must have the mean=.* of SelfTraining, got None"),
    "both kinds of masks": ({"masks": BoxMasks(), "class_weights": [1.0] * C}, "must not both be given"),
    "value": ({"rounding": "up"}, "`rounding` must be one of 'ceil', 'floor', got 'up'"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_recipes__refuse_what_would_have_no_effect(name: str) -> None:
    options, message = LEFT_OUT[name]
    with pytest.raises(ValueError, match=message):
        recipes.self_training(nn.Conv2d(3, C, 1), C, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lamda": 1}, r"unknown option 'lamda'; the options are weigh, .*rounding, .*augment, .*std\.$"),
        ({"target_weights": torch.ones(2)}, "given with each batch, when the result is called"),
        ({"augment": 0.5}, "`augment` must be callable, got float"),
        ({"same_on_batch": 1}, "`same_on_batch` must be True or False, got 1"),
    ],
)
def test_recipes__refuse_what_they_do_not_know(options: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        build(**options)


def test_recipes__take_every_field_of_a_recipe_with_every_method() -> None:
    for method in recipes.METHODS:  # so that methods can be compared
        assert build(method, **vars(recipes.MIC)).source_criterion.normalizer == "valid"


def test_recipes__know_every_argument_of_their_parts() -> None:
    """So that none is forgotten when a part gets a new one."""
    elsewhere = {"num_classes", "student"}
    with pytest.raises(TypeError) as error:
        build(unknown=0)
    known = set(re.findall(r"\w+", str(error.value).partition("options are")[2]))
    for part in (CrossDomainMix, MeanTeacher, StrongAugment, ConfidenceWeightedCE, DistributionAlignment, SelfTraining):
        assert set(inspect.signature(part).parameters) <= known | elsewhere, part


class Drawn:
    """An augmentation with a draw that is no module."""

    def sample(self, n: int, *, generator: torch.Generator | None = None, device: torch.device | None = None) -> Tensor:
        return torch.rand(n, generator=generator, device=device)

    def __call__(self, images: Tensor, *, draw: Tensor | None = None) -> Tensor:
        return images if draw is None else images * draw[:, None, None, None]


def test_augment__with_a_draw_may_be_any_callable() -> None:
    training = build(augment=Drawn())
    draw = training.sample(2, size=(8, 9))
    assert isinstance(draw.augment, Tensor)
    assert draw.augment.shape == (2,)
