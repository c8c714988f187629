"""The forms of a DACS training step that `step.py` measures: networks, batch, and the step itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from benchmarks.speed.augment import one_by_one
from benchmarks.speed.common import is_cuda
from benchmarks.speed.mixing import CLASSES, per_image_loop, street_like
from benchmarks.speed.teacher import released as released_average
from crossmix import SelfTraining, recipes
from crossmix.engine import FiniteGuard
from crossmix.models import deeplab_v2_resnet101, deeplab_v2_tiny
from crossmix.optim import RepeatedSGD, parameter_groups

LR, MOMENTUM, DECAY = 2.5e-4, 0.9, 5e-4  # of the optimizer; the head learns ten times as fast
THRESHOLD = 0.13  # random weights never reach the recipe's 0.968, so no pseudo-label would count
NETWORKS = {"resnet101": deeplab_v2_resnet101, "tiny": deeplab_v2_tiny}

Draw = Any  # what `SelfTraining.sample` returns


@dataclass(frozen=True, kw_only=True)
class Size:
    network: str = "tiny"
    crop: tuple[int, int] = (64, 128)
    batch: int = 4
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Form:
    released: bool = False
    small_logits: bool = False
    channels_last: bool = False
    optimizer: str = "loop"  # or "repeated", or "once"
    precision: str = "fp32"  # or "tf32", or "bf16"
    compiled: str = ""  # or "networks", or "step"
    graph: bool = False
    recipe: Literal["released", "mic"] = "released"

    @property
    def passes(self) -> int:
        return 3 if self.recipe == "mic" else 2


def forms(device: str) -> dict[str, Form]:
    """All forms by name; see the docstring of `step.py`."""
    plain = Form()
    small = replace(plain, small_logits=True)
    last = replace(small, channels_last=True)
    fused = replace(last, optimizer="repeated")
    half = replace(fused, precision="bf16")
    cuda = is_cuda(device)
    base = half if cuda else fused
    found = {
        "released style": Form(released=True),
        "plain": plain,
        "small logits": small,
        "channels last": last,
        "RepeatedSGD": fused,
        "mic": replace(fused, recipe="mic"),
        "updated once": replace(fused, optimizer="once"),
        "bf16": half,
        "networks compiled": replace(base, compiled="networks"),
        "step compiled": replace(base, compiled="step"),
    }
    if cuda:
        found["tf32"] = replace(fused, precision="tf32")
        found["bf16, mic"] = replace(half, recipe="mic")
        found["graph"] = replace(half, graph=True)
        found["graph, networks compiled"] = replace(half, graph=True, compiled="networks")
    return found


class Batch(NamedTuple):
    source_images: Tensor
    source_labels: Tensor
    target_images: Tensor


@dataclass
class Training:
    """The state of one form."""

    form: Form
    batch: Batch
    training: SelfTraining
    optimizer: torch.optim.Optimizer
    guard: FiniteGuard
    forward: Callable[..., Any]
    steps: int = 0
    momentum: dict[Tensor, Tensor] = field(default_factory=dict)  # of the released style's loop

    def sample(self) -> Draw:
        images = self.batch.target_images
        return self.training.sample(len(images), (images.shape[2], images.shape[3]), device=images.device)


def build(form: Form, size: Size) -> Training:
    """Build networks with random weights, the same in every form, and everything else that a step needs."""
    torch.manual_seed(0)
    torch.backends.cudnn.deterministic = torch.are_deterministic_algorithms_enabled()  # as the trainer has it
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
    layout = torch.channels_last if form.channels_last else torch.contiguous_format
    student = NETWORKS[size.network](CLASSES, aspp_branches=2, upsample=not form.small_logits)
    student = student.to(size.device, memory_format=layout)  # type: ignore[call-overload]
    options: dict[str, Any] = {"recipe": form.recipe, "threshold": THRESHOLD}
    training = recipes.self_training(student, CLASSES, upsample=form.small_logits, **options).to(size.device).train()
    source_images, source_labels, target_images, _, _ = street_like(size.batch, size.crop, torch.uint8, size.device)
    batch = Batch(
        source_images.contiguous(memory_format=layout), source_labels, target_images.contiguous(memory_format=layout)
    )
    optimizer: torch.optim.Optimizer
    if form.optimizer == "once":
        groups = parameter_groups(student, LR)
        optimizer = torch.optim.SGD(groups, LR, momentum=MOMENTUM, weight_decay=DECAY, fused=True)
    else:
        groups = parameter_groups(student, LR, repeated=True)
        optimizer = RepeatedSGD(groups, LR, momentum=MOMENTUM, weight_decay=DECAY)
    if form.compiled == "networks" and training.teacher is not None:
        student.compile()
        training.teacher.module.compile()
    whole = torch.compile(training, fullgraph=True) if form.compiled == "step" else training
    return Training(form, batch, training, optimizer, FiniteGuard(training.children(), optimizer), whole)


@contextmanager
def precision(form: Form, device: str) -> Iterator[None]:
    tf32 = form.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=form.precision == "bf16"):
        yield


Step = Callable[[Draw], Tensor]


def stepper(form: Form, size: Size) -> tuple[Training, Step]:
    """A form's training step, which takes a draw and returns the loss."""
    work = build(form, size)
    if form.released:
        return work, lambda draw: released_step(work, draw)
    gradients = captured(work, size) if form.graph else lambda draw: forward_backward(work, draw, size)

    def step(draw: Draw) -> Tensor:
        loss = gradients(draw)
        work.guard.check(loss, work.steps)
        move(work)
        work.training.update()
        work.guard.restore()
        work.steps += 1
        return loss

    return work, step


def forward_backward(work: Training, draw: Draw, size: Size) -> Tensor:
    work.optimizer.zero_grad(set_to_none=True)
    with precision(work.form, size.device):
        loss: Tensor = work.forward(*work.batch, draw=draw).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def move(work: Training) -> None:
    if work.form.optimizer == "loop":
        one_by_one_sgd(work)
    else:
        work.optimizer.step()


@torch.no_grad()
def one_by_one_sgd(work: Training) -> None:
    """Update the entries of the released code's list one by one, as torch's optimizer did at the time."""
    for group in work.optimizer.param_groups:
        repeats = group.get("repeats", [1] * len(group["params"]))
        for parameter, count in zip(group["params"], repeats, strict=True):
            if parameter.grad is None:
                continue
            for _ in range(count):
                gradient = parameter.grad.add(parameter, alpha=DECAY)
                if parameter not in work.momentum:
                    work.momentum[parameter] = torch.zeros_like(parameter)
                parameter.add_(work.momentum[parameter].mul_(MOMENTUM).add_(gradient), alpha=-group["lr"])


def captured(work: Training, size: Size) -> Step:
    """Capture everything up to the gradients as a CUDA graph; a draw is copied in before each replay."""
    still = work.sample()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_backward(work, still, size)
    torch.cuda.current_stream().wait_stream(stream)
    work.optimizer.zero_grad(set_to_none=True)  # the graph allocates its own gradients and fills them on each replay
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = forward_backward(work, still, size)

    def replay(draw: Draw) -> Tensor:
        for kept, new in zip(tree_leaves(still), tree_leaves(draw), strict=True):
            if kept is not None:
                kept.copy_(new)
        graph.replay()
        return loss

    return replay


def released_step(work: Training, draw: Draw) -> Tensor:
    """The released code's step, with the same draw as the other forms."""
    training, (source_images, source_labels, target_images) = work.training, work.batch
    teacher, scores, augment = training.teacher, draw.scores, draw.augment
    if teacher is None or scores is None or augment is None:
        raise TypeError("the released step has a teacher, a mix and an augmentation")
    labels = source_labels.long()
    work.optimizer.zero_grad(set_to_none=True)
    with precision(work.form, source_images.device.type):
        source_loss = functional.cross_entropy(training.student(source_images), labels, ignore_index=255)
        confidence, pseudo_labels = teacher(target_images).softmax(1).max(1)
        share = float((confidence >= THRESHOLD).sum()) / confidence.numel()
        weights = torch.full_like(confidence, share)
        images, labels, weights = per_image_loop(
            (source_images, labels, target_images, pseudo_labels, weights), choose=chosen_by(scores)
        )
        logits = training.student(one_by_one(images, augment))
        mixed_loss = (functional.cross_entropy(logits, labels, ignore_index=255, reduction="none") * weights).mean()
        loss = source_loss + mixed_loss
    loss.backward()  # type: ignore[no-untyped-call]
    one_by_one_sgd(work)
    decay = min(1 - 1 / (work.steps + 1), teacher.decay)
    released_average(list(teacher.module.parameters()), list(training.student.parameters()), decay)
    work.steps += 1
    return loss.detach()


def chosen_by(scores: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Choose the half of the classes with the lowest scores, rounded up, instead of a random choice on the host."""

    def choose(classes: Tensor, image: int) -> Tensor:
        order = scores[image, classes.clamp(max=CLASSES)].argsort()
        return classes[order[: (len(classes) + 1) // 2]]

    return choose


def losses(form: Form, size: Size, steps: int) -> list[float]:
    """The losses of the first steps, with draws that depend only on the step."""
    work, step = stepper(form, size)
    found = []
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        draw = work.training.sample(size.batch, size.crop, generator=generator, device=size.device)
        found.append(float(step(draw)))
    return found
