"""Every function but the sampler with a generator compiles in one graph and gives what eager gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from crossmix import ClassMix, ConfidenceWeightedCE, CrossDomainMix, DistributionAlignment, MeanTeacher, recipes
from crossmix import functional as F
from oracles import seeded

C = 5


def inputs(num_classes: int = C) -> dict[str, Tensor]:
    g = seeded(0)
    labels = torch.randint(0, num_classes, (2, 8, 9), generator=g)
    labels[0, :2] = 255
    return {
        "labels": labels,
        "logits": torch.randn(2, num_classes, 8, 9, generator=g),
        "images": torch.rand(2, 3, 8, 9, generator=g),
        "scores": torch.rand(2, num_classes + 1, generator=g),
        "weights": torch.rand(2, 8, 9, generator=g),
        "prior": torch.rand(num_classes, generator=g).softmax(0),
        "running": torch.rand(num_classes, generator=g).softmax(0),
    }


FUNCTIONS: dict[str, Callable[[dict[str, Tensor], int], object]] = {
    "sample_classes": lambda x, c: F.sample_classes(x["labels"], c, scores=x["scores"], include_ignored=True),
    "sample_classes uint8": lambda x, c: F.sample_classes(x["labels"].to(torch.uint8), c, scores=x["scores"]),
    "class_mask": lambda x, c: F.class_mask(x["labels"], x["scores"] < 0.5),
    "mix": lambda x, c: F.mix(x["images"], x["images"].flip(0), x["labels"] == 1),
    "pseudo_label": lambda x, c: tuple(F.pseudo_label(x["logits"])),
    "confidence_weight": lambda x, c: [
        F.confidence_weight(x["weights"], 0.4, scope=s) for s in ("image", "batch", "pixel")
    ],
    "weighted_cross_entropy": lambda x, c: [
        F.weighted_cross_entropy(x["logits"], x["labels"], x["weights"], normalizer=n)
        for n in ("all", "valid", "weights")
    ],
    "upsampled_cross_entropy": lambda x, c: F.upsampled_cross_entropy(
        x["logits"][..., :3, :4], x["labels"], x["weights"]
    ),
    "align_distribution": lambda x, c: F.align_distribution(x["logits"].softmax(1), x["prior"], x["running"]),
    "ClassMix": lambda x, c: tuple(ClassMix(c)(x["images"], x["labels"], x["weights"], scores=x["scores"])),
    "CrossDomainMix": lambda x, c: tuple(
        CrossDomainMix(c)(x["images"], x["labels"], x["images"].flip(0), x["labels"].flip(0), scores=x["scores"])
    ),
    "ConfidenceWeightedCE": lambda x, c: ConfidenceWeightedCE()(x["logits"], x["labels"], x["weights"]),
}


@pytest.mark.parametrize("num_classes", [C, 40])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functional__compiled_equals_eager(name: str, num_classes: int) -> None:
    torch.compiler.reset()
    values = inputs(num_classes)
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values, num_classes), FUNCTIONS[name](values, num_classes))


def test_ema_update__compiled_equals_eager() -> None:
    averaged, current = [torch.rand(3, generator=seeded(0)) for _ in range(2)], [torch.ones(3), torch.zeros(3)]
    want = [0.9 * a + 0.1 * c for a, c in zip(averaged, current, strict=True)]
    torch.compile(F.ema_update_, fullgraph=True, backend="aot_eager")(averaged, current, 0.9)
    torch.testing.assert_close(averaged, want)


@pytest.mark.parametrize("method", recipes.METHODS)
def test_self_training__compiled_equals_eager_without_recompiling(method: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, C, 1))
    training = recipes.self_training(student, C, method=method).train()
    values = inputs()
    draws = [training.sample(2, generator=seeded(k)) for k in range(6)]
    data = (values["images"], values["labels"], values["images"].flip(0))
    want = [training(*data, draw=draw).loss.detach() for draw in draws[:1]]
    if training.align is not None:
        training.align.running_count.zero_()
    compiled = torch.compile(training, fullgraph=True, backend="aot_eager")
    got = compiled(*data, draw=draws[0]).loss
    torch.testing.assert_close(got.detach(), want[0], rtol=1e-5, atol=1e-6)
    got.backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for draw in draws[1:]:
            compiled(*data, draw=draw)
            training.update()


def test_self_training__of_small_logits_compiles() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    student = nn.Conv2d(3, C, 3, stride=2)
    training = recipes.self_training(student, C, upsample=True).train()
    values = inputs()
    data, draw = (values["images"], values["labels"], values["images"].flip(0)), training.sample(2)
    gradients = [
        torch.autograd.grad(step(*data, draw=draw).loss, list(student.parameters()))
        for step in (training, torch.compile(training, fullgraph=True, backend="aot_eager"))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_teacher_and_alignment__compile() -> None:
    torch.compiler.reset()
    student = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C))
    teacher = MeanTeacher(student, mode="train")
    images = inputs()["images"]
    compiled = torch.compile(teacher, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), teacher(images))
    teacher.update(student)
    align = DistributionAlignment(C)
    probs = inputs()["logits"].softmax(1)
    torch.testing.assert_close(torch.compile(align, fullgraph=True, backend="aot_eager")(probs), align(probs))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while it loads the compiler
@pytest.mark.parametrize(
    ("mixer", "labels", "images", "channels", "layout"),
    [
        (CrossDomainMix(C), torch.int64, torch.float32, 3, torch.contiguous_format),
        (ClassMix(C, include_ignored=True), torch.uint8, torch.float32, 3, torch.channels_last),
        (ClassMix(C), torch.int16, torch.bfloat16, 5, torch.contiguous_format),
        (CrossDomainMix(C, include_ignored=True), torch.int32, torch.float64, 1, torch.contiguous_format),
    ],
)
def test_mixing__inductor_equals_eager(
    mixer: ClassMix | CrossDomainMix,
    labels: torch.dtype,
    images: torch.dtype,
    channels: int,
    layout: torch.memory_format,
) -> None:
    torch.compiler.reset()
    values = inputs()
    source = torch.rand(2, channels, 8, 9, generator=seeded(3)).to(images, memory_format=layout)
    ids = values["labels"].to(labels)
    other = () if isinstance(mixer, ClassMix) else (source.flip(0), ids.flip(0))
    compiled = torch.compile(mixer, fullgraph=True)
    for weights in (values["weights"], values["weights"][:, 0, 0], None):
        got = compiled(source, ids, *other, weights, scores=values["scores"])
        want = mixer(source, ids, *other, weights, scores=values["scores"])
        torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0)
