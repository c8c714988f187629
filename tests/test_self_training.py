"""The algorithm: whole steps against slow restatements, and every configuration."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crossmix import (
    ClassMix,
    ConfidenceWeightedCE,
    CrossDomainMix,
    DistributionAlignment,
    MeanTeacher,
    SelfTraining,
    StrongAugment,
    recipes,
)
from crossmix import functional as F
from crossmix.models import deeplab_v2_tiny
from oracles import (
    SlowNetwork,
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


@pytest.mark.parametrize("custom", [False, True])
def test_upsample__is_the_upsampled_network(custom: bool) -> None:
    torch.manual_seed(0)
    small = Quarter().double()

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(small)

        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.interpolate(
                self.inner(images), size=images.shape[-2:], mode="bilinear", align_corners=True
            )

    source, target = torch.rand(2, N, 3, 16, 12, dtype=torch.float64, generator=seeded(0))
    labels = torch.randint(0, C, (N, 16, 12), generator=seeded(1))

    class Doubled(ConfidenceWeightedCE):
        pass

    class Other:
        def weights(self, confidence: Tensor) -> Tensor:
            return F.confidence_weight(confidence, 0.3)

        def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
            return F.weighted_cross_entropy(logits, labels, weights)

    options = {"criterion": Other(), "source_criterion": F.weighted_cross_entropy} if custom else {}
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


@pytest.mark.parametrize("method", recipes.METHODS)
def test_degenerate__all_ignored_and_empty_batches(method: str) -> None:
    training = recipes.self_training(nn.Conv2d(3, C, 1), C, method=method).train()
    images = torch.rand(2, 3, 4, 4)
    output = training(images, torch.full((2, 4, 4), 255), images)
    assert float(output.source_loss.detach()) == 0
    assert bool(output.loss.isfinite())
    empty = torch.rand(0, 3, 4, 4)
    for student in (nn.Conv2d(3, C, 1), SlowNetwork(C)):
        training = recipes.self_training(student, C, method=method).train()
        output = training(empty, torch.zeros(0, 4, 4, dtype=torch.uint8), empty)
        assert float(output.loss.detach()) == 0
        output.loss.backward()
        assert not any(p.grad.any() for p in training.student.parameters())
        assert all(value.isfinite().all() for value in training.state_dict().values())


@pytest.mark.parametrize("method", recipes.METHODS)
def test_autocast__losses_are_float32(method: str) -> None:
    training = recipes.self_training(confident_network(torch.float32), C, method=method).train()
    data = batch(0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = training(*data, generator=seeded(0))
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    full = training(*data, generator=seeded(0))
    assert float(output.source_loss.detach()) == pytest.approx(float(full.source_loss.detach()), rel=0.05)


@pytest.mark.parametrize("method", recipes.METHODS)
def test_state_dict__resumes_bit_for_bit(method: str) -> None:
    runs = [build(method) for _ in range(2)]
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
    assert "weigh='target', upsample=False" in repr(training)
    assert build("alignment", prior=[1.0] * C).align.fixed_prior
    assert not math.isnan(float(build("alignment")(*batch(0)).loss.detach()))
    assert recipes.self_training(confident_network(), C, recipe=recipes.PAPER).weigh == "mixed"
    assert build("dacs", decay=0.9).teacher.decay == 0.9
    assert build("dacs", mode="eval").teacher.mode == "eval"
