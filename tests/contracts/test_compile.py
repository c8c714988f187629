"""Every function but the sampler with a generator compiles in one graph and gives what eager gives."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

from checks import channels_last
from crossmix import (
    BoxMasks,
    ClassMix,
    ConfidenceWeightedCE,
    CowMasks,
    CrossDomainMix,
    DistributionAlignment,
    MeanTeacher,
    Mixed,
    SelfTraining,
    SelfTrainingOutput,
    StrongAugment,
    recipes,
)
from crossmix import functional as F
from crossmix.optim import poly_lr
from crossmix.self_training import SelfTrainingDraw
from oracles import SlowNetwork, seeded, small_network

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


def ema_update(averaged: Tensor, current: Tensor) -> Tensor:
    averaged = averaged.clone()
    F.ema_update_([averaged], [current], 0.9)
    return averaged


FUNCTIONS: dict[str, Callable[[dict[str, Tensor], int], object]] = {
    "sample_classes": lambda x, c: F.sample_classes(x["labels"], c, scores=x["scores"], include_ignored=True),
    "sample_classes uint8": lambda x, c: F.sample_classes(x["labels"].to(torch.uint8), c, scores=x["scores"]),
    "sample_classes with odds": lambda x, c: F.sample_classes(
        x["labels"], c, scores=x["scores"], class_weights=x["prior"], rounding="floor", whole_batch=True),
    "class_mask": lambda x, c: F.class_mask(x["labels"], x["scores"] < 0.5),
    "mix": lambda x, c: F.mix(x["images"], x["images"].flip(0), x["labels"] == 1),
    "mix of no channels": lambda x, c: F.mix(x["images"][:, :0], x["images"][:, :0], x["labels"] == 1),
    "pseudo_label": lambda x, c: tuple(F.pseudo_label(x["logits"])),
    "confidence_weight": lambda x, c: [
        F.confidence_weight(x["weights"], 0.4, scope=s) for s in ("image", "batch", "pixel")],
    "weighted_cross_entropy": lambda x, c: [
        F.weighted_cross_entropy(x["logits"], x["labels"], x["weights"], normalizer=n)
        for n in ("all", "valid", "weights")],
    "upsampled_cross_entropy": lambda x, c: F.upsampled_cross_entropy(
        x["logits"][..., :3, :4], x["labels"], x["weights"]),
    "align_distribution": lambda x, c: F.align_distribution(x["logits"].softmax(1), x["prior"], x["running"]),
    "ema_update_": lambda x, c: ema_update(x["prior"], x["running"]),
    "ClassMix": lambda x, c: tuple(ClassMix(c)(x["images"], x["labels"], x["weights"], scores=x["scores"])),
    "ClassMix of boxes": lambda x, c: tuple(
        ClassMix(c, masks=BoxMasks())(x["images"], x["labels"], x["weights"], scores=x["scores"][:, :4])),
    "CrossDomainMix": lambda x, c: tuple(
        CrossDomainMix(c)(x["images"], x["labels"], x["images"].flip(0), x["labels"].flip(0), scores=x["scores"])),
    "CrossDomainMix of a mask": lambda x, c: tuple(
        CrossDomainMix(c)(x["images"], x["labels"], x["images"].flip(0), x["labels"].flip(0), mask=x["labels"] > 2)),
    "ConfidenceWeightedCE": lambda x, c: ConfidenceWeightedCE()(x["logits"], x["labels"], x["weights"]),
}  # fmt: skip


@pytest.mark.parametrize("num_classes", [C, pytest.param(40, marks=pytest.mark.slow)])
def test_functional__all_in_one_graph_equal_eager(num_classes: int) -> None:
    align = DistributionAlignment(num_classes)

    def everything(values: dict[str, Tensor]) -> dict[str, object]:
        called = {name: call(values, num_classes) for name, call in FUNCTIONS.items()}
        return {**called, "DistributionAlignment": align(values["logits"].softmax(1))}

    torch.compiler.reset()
    values = inputs(num_classes)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values), everything(values))


def test_mixing__compiled_under_another_default_device() -> None:
    torch.compiler.reset()
    values = inputs()
    arguments = (values["images"], values["labels"], values["images"].flip(0), values["labels"].flip(0))
    compiled = torch.compile(CrossDomainMix(C), fullgraph=True, backend="aot_eager")
    want = CrossDomainMix(C)(*arguments, scores=values["scores"])
    with torch.device("meta"):
        got = compiled(*arguments, scores=values["scores"])
    torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0)


@pytest.mark.parametrize(
    "mixer",
    [
        pytest.param(
            CrossDomainMix(C, class_weights=[1, 2, 3, 4, 5], include_ignored=True), id="odds", marks=pytest.mark.slow
        ),
        pytest.param(CrossDomainMix(C, masks=BoxMasks()), id="boxes"),
        pytest.param(CrossDomainMix(C, masks=CowMasks(sigma=(1.0, 3.0))), id="blobs", marks=pytest.mark.slow),
    ],
)
def test_mixing__options_by_one_graph_of_any_batch_and_image_size(mixer: CrossDomainMix) -> None:
    torch.compiler.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="eager", dynamic=True)
    for n, height, width in ((2, 12, 17), (3, 20, 24), (5, 9, 30)):
        labels = torch.randint(0, C, (n, height, width), generator=seeded(n))
        images = torch.rand(n, 3, height, width, generator=seeded(n))
        scores = mixer.sample_scores(n, (height, width), generator=seeded(n))
        arguments = (images, labels, images.flip(0), labels.flip(0))
        torch.testing.assert_close(compiled(*arguments, scores=scores), mixer(*arguments, scores=scores))


class Twins:
    """A training whose step is compiled, or in part, beside one that is not; both learn from the same."""

    def __init__(self, training: SelfTraining) -> None:
        torch.compiler.reset()
        self.compiled: Callable[..., SelfTrainingOutput] = training
        self.trainings = (training.train(), copy.deepcopy(training))
        self.optimizers = [torch.optim.SGD(one.student.parameters(), 0.01, momentum=0.9) for one in self.trainings]

    def steps(self, batches: Sequence[int] = (2,) * 8, *, dynamic: bool = False) -> None:
        """Make steps by one graph."""
        for number, batch in enumerate(batches):
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                self.step(number, batch=batch, dynamic=dynamic and not number)

    def step(self, number: int, *, batch: int, dynamic: bool) -> None:
        """Make a step of both and compare it."""
        generator = seeded(number)
        source_images, target_images = torch.rand(2, batch, 3, 8, 9, generator=generator)
        source_labels = torch.randint(0, C, (batch, 8, 9), generator=generator, dtype=torch.uint8)
        data = (source_images.clone(), source_labels, target_images.clone())
        allowed = torch.rand(batch, 8, 9, generator=generator)
        draw = self.trainings[0].sample(batch, (8, 9), generator=generator)
        if dynamic:
            for value in tree_leaves((data, allowed, draw)):
                if value is not None:
                    torch._dynamo.mark_dynamic(value, 0)
        outputs = []
        for one, step, optimizer in zip(
            self.trainings, (self.compiled, self.trainings[1]), self.optimizers, strict=True
        ):
            if one.align is not None:
                one.align.update_prior(source_labels)
            for group in optimizer.param_groups:
                group["lr"] = poly_lr(number, 40, 0.01)
            outputs.append(step(*data, target_weights=allowed, draw=draw))
            optimizer.zero_grad()
            outputs[-1].loss.backward()
            optimizer.step()
            one.update()
        torch.testing.assert_close(*map(tree_leaves, outputs), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*(dict(one.state_dict()) for one in self.trainings), rtol=1e-4, atol=1e-5)


slow = pytest.mark.slow
KEEPING = replace(recipes.MIC, consistency_running_stats=False)
CASES = [
    ("dacs", False, "released", "aot_eager"),
    *(pytest.param(name, False, "released", "aot_eager", marks=slow) for name in recipes.METHODS if name != "dacs"),
    *(pytest.param(name, False, "paper", "dynamic", marks=slow) for name in recipes.METHODS),
    *(pytest.param("dacs", True, recipe, "aot_eager", marks=slow) for recipe in ("released", "mic")),
    *(pytest.param("dacs", True, recipe, "dynamic", marks=slow) for recipe in ("paper", "mic")),
    pytest.param("dacs", True, KEEPING, "dynamic", marks=slow, id="mic that keeps statistics"),
    pytest.param("dacs", True, "released", "inductor", marks=slow),
]


@pytest.mark.parametrize(("method", "upsample", "recipe", "backend"), CASES)
def test_self_training__many_steps_by_one_graph(method: str, upsample: bool, recipe: Any, backend: str) -> None:
    student = small_network(C, stride=2 if upsample else 1)
    training = recipes.self_training(student, C, method=method, recipe=recipe, upsample=upsample, threshold=0.25)
    twins = Twins(training)
    dynamic = backend == "dynamic"  # any batch size
    twins.compiled = torch.compile(training, fullgraph=True, backend="eager" if dynamic else backend)
    twins.steps((2, 3, 5, 2) if dynamic else (2,) * 8, dynamic=dynamic)


def boxes(images: Tensor, labels: Tensor, base: Tensor, pseudo: Tensor, weights: Tensor, *, scores: Tensor) -> Mixed:
    """A mix of one's own: what lies left of a column that is drawn for each image."""
    mask = (torch.arange(labels.shape[-1]) < scores[:, :1] * labels.shape[-1])[:, None].expand(labels.shape)
    return Mixed(F.mix(images, base, mask), F.mix(labels, pseudo, mask), F.mix(weights * 0 + 1, weights, mask), mask)


def test_self_training__of_others_parts_by_one_graph() -> None:
    student = nn.Sequential(small_network(C, stride=2), nn.Identity())
    training = SelfTraining(
        student,
        AveragedModel(student).eval(),
        mix=boxes,
        num_classes=C,
        augment=lambda images: images.sqrt(),
        source_criterion=nn.CrossEntropyLoss(),
        upsample=True,
        align_corners=False,
        logits=lambda out: out,
    )
    twins = Twins(training)
    twins.compiled = torch.compile(training, fullgraph=True, backend="aot_eager")
    twins.steps((2,) * 4)


def light(mix: CrossDomainMix | None = CrossDomainMix(C)) -> SelfTraining:  # noqa: B008 - has no state
    """Without an augmentation, which takes longest to compile."""
    student = small_network(C)
    return SelfTraining(student, MeanTeacher(student), mix=mix, num_classes=C).train()


def test_self_training__draws_anew_from_the_global_generator() -> None:
    torch.compiler.reset()
    training = light()
    values = inputs()
    data = (values["images"], values["labels"], values["images"].flip(0))
    images = []
    for step in (torch.compile(training, fullgraph=True, backend="aot_eager"), copy.deepcopy(training)):
        torch.manual_seed(1)
        images.append([step(*data).mixed.images for _ in range(3)])
    torch.testing.assert_close(*images)
    assert not torch.equal(images[0][0], images[0][1])


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, where the graph breaks
@pytest.mark.parametrize("module", [pytest.param("SelfTraining", marks=slow), "StrongAugment"])
def test_generator__is_refused_in_one_graph_and_used_outside_of_one(module: str) -> None:
    values = inputs()
    data = (values["images"], values["labels"], values["images"].flip(0))
    step = light() if module == "SelfTraining" else StrongAugment(blur_p=0)

    def draws(generator: torch.Generator) -> Tensor:
        if module == "SelfTraining":
            return step(*data, generator=generator).mixed.images
        return step(data[0], generator=generator)

    torch.compiler.reset()
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"cannot trace a torch\.Generator; draw outside with `sample`"
    ):
        torch.compile(draws, fullgraph=True, backend="eager")(seeded(0))
    torch.compiler.reset()
    compiled = torch.compile(draws, backend="eager")
    for seed in (1, 2):
        torch.testing.assert_close(compiled(seeded(seed)), draws(seeded(seed)))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, where the graph breaks
def test_update__runs_eagerly_and_compiles_nothing_anew() -> None:
    torch.compiler.reset()
    training = light(None)
    images, labels = inputs()["images"], inputs()["labels"]
    eager = copy.deepcopy(training)

    def whole(training: SelfTraining, draw: SelfTrainingDraw) -> Tensor:
        loss = training(images, labels, images.flip(0), draw=draw).loss
        training.update()
        return loss

    with pytest.raises(torch._dynamo.exc.Unsupported, match="update"):
        torch.compile(lambda draw: whole(training, draw), fullgraph=True, backend="eager")(training.sample(2))
    torch.compiler.reset()
    compiled = torch.compile(lambda draw: whole(training, draw), backend="eager")
    draws = [training.sample(2, generator=seeded(k)) for k in range(12)]
    compiled(draws[0]), whole(eager, draws[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for draw in draws[1:]:
            with torch.no_grad():
                for parameters in zip(training.student.parameters(), eager.student.parameters(), strict=True):
                    for parameter in parameters:
                        parameter.mul_(0.9)
            torch.testing.assert_close(compiled(draw), whole(eager, draw))
    assert training.teacher is not None
    assert training.teacher.num_updates == 12
    torch.testing.assert_close(dict(training.state_dict()), dict(eager.state_dict()))


def test_networks_compiled_in_place__as_the_trainer_does() -> None:
    torch.manual_seed(0)
    student = SlowNetwork(C)
    training = recipes.self_training(student, C)
    twins, names = Twins(training), list(training.state_dict())
    assert training.teacher is not None
    for part in (student, training.teacher.module):
        part.compile(fullgraph=True, backend="aot_eager")
    twins.steps()
    assert list(training.state_dict()) == names
    again = MeanTeacher(student)  # of a compiled student
    again.update(student)
    torch.testing.assert_close(again.module.state_dict(), student.state_dict())


@pytest.mark.parametrize(("mode", "dtype"), [("train", torch.float32), ("eval", torch.bfloat16)])
@pytest.mark.parametrize("compiled", ["the teacher", "its network"])
def test_teacher__compiled_once_whatever_modes_others_set(compiled: str, mode: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    student = SlowNetwork(C).to(dtype)
    teacher = MeanTeacher(student, mode=mode)
    eager = copy.deepcopy(teacher)
    images = inputs()["images"].to(dtype)
    run: Callable[[Tensor], Tensor] = teacher
    if compiled == "its network":
        teacher.module.compile(fullgraph=True, backend="aot_eager")
    else:
        run = torch.compile(teacher, fullgraph=True, backend="aot_eager")
    run(images)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step, set_mode in enumerate((teacher.module.train, teacher.module.eval, eager.train)):
            set_mode()
            flags = [part.training for part in teacher.module.modules()]
            torch.testing.assert_close(run(images), eager(images))
            assert [part.training for part in teacher.module.modules()] == flags
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.mul_(0.9 + 0.01 * step)
            for one in (teacher, eager):
                one.update(student)
    torch.testing.assert_close(dict(teacher.state_dict()), dict(eager.state_dict()))


VALUES = inputs()
IMAGES, WEIGHTS = torch.rand(2, 5, 8, 9, generator=seeded(3)), VALUES["weights"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "labels", "images", "weights"),
    [
        (CrossDomainMix(C), torch.int64, IMAGES[:, :3].contiguous(), WEIGHTS),
        (ClassMix(C, include_ignored=True), torch.uint8, channels_last(IMAGES[:, :3]), WEIGHTS[:, 0, 0]),
        (ClassMix(C), torch.int16, IMAGES.bfloat16(), None),
        (CrossDomainMix(C, include_ignored=True), torch.int32, IMAGES[:, :1].double(), WEIGHTS[:, 0, 0]),
    ],
)
def test_mixing__inductor_equals_eager(
    mixer: ClassMix | CrossDomainMix, labels: torch.dtype, images: Tensor, weights: Tensor | None
) -> None:
    torch.compiler.reset()
    ids = VALUES["labels"].to(labels)
    other = () if isinstance(mixer, ClassMix) else (images.flip(0), ids.flip(0))
    arguments = (images, ids, *other, weights)
    got = torch.compile(mixer, fullgraph=True)(*arguments, scores=VALUES["scores"])
    torch.testing.assert_close(tuple(got), tuple(mixer(*arguments, scores=VALUES["scores"])), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_forms_for_the_compiler__are_what_they_replace(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called without the compiler, and so exactly; in `stored` a mask of another dtype stands for its bools."""
    values = inputs()
    images, labels = values["images"], values["labels"].to(dtype)
    mask = F.class_mask(labels, F.sample_classes(labels, C, generator=seeded(1)))
    mixer, classes = ClassMix(C), F.sample_classes(labels, C, generator=seeded(1))
    augment = StrongAugment(jitter_p=0, blur_p=1)
    draw = augment.sample(len(images), generator=seeded(2))

    def results() -> list[Tensor]:
        flipped = images.flip(0)
        return [
            F.class_mask(labels, F.sample_classes(labels, C, scores=torch.rand(2, C + 1, generator=seeded(3)))),
            F.mix(images, flipped, mask),
            F.mix(images.mT.contiguous().mT, flipped, mask),
            F.mix(images[:, None], flipped[:, None], mask),
            F.mix(labels, labels.flip(0), mask),
            augment(images, draw=draw),
            *mixer(images, labels, classes=classes),
        ]

    want = results()
    assert want[0].any()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for got, expected in zip(results(), want, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)
    with pytest.raises(TypeError, match="must be None inside a compiled function"):
        F.sample_classes(labels, C, generator=seeded(1))
