"""What each stateful part computes after its state is loaded; `python tests/old_states.py` keeps the present states.

The files in tests/states are those of released versions: add one with each release, and never rewrite one.
"""

import contextlib
import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import crossmix
from crossmix import ConfidenceWeightedCE, CrossDomainMix, DistributionAlignment, MeanTeacher, SelfTraining
from crossmix.datasets import write_png
from crossmix.diagnostics import PseudoLabelMonitor, UnsupervisedScores
from crossmix.metrics import ConfusionMatrix
from crossmix.optim import RepeatedSGD

STATES = Path(__file__).with_name("states")
CLASSES, SHAPE = 3, (2, 6, 8)


class Part(NamedTuple):
    """A stateful part: how it is built and used, and numbers that its state decides."""

    build: Callable[[], Any]
    use: Callable[[Any], object]
    numbers: Callable[[Any], Any]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Numbers in [0, 1), the same with every version of torch."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count, dtype=torch.int64) * 7919 + seed * 104_729) % 10_007).reshape(shape) / 10_007


def labels(seed: int = 0) -> Tensor:
    found = (numbers(*SHAPE, seed=seed) * (CLASSES + 1)).long()
    return found.masked_fill(found == CLASSES, 255)


def images(seed: int = 0) -> Tensor:
    return numbers(SHAPE[0], 3, *SHAPE[1:], seed=seed)


def logits(seed: int = 0) -> Tensor:
    return 6 * numbers(SHAPE[0], CLASSES, *SHAPE[1:], seed=seed)


def network(classes: int = CLASSES) -> nn.Module:
    """A small network, whose weights are known."""
    found = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, classes, 1))
    with torch.no_grad():
        for i, parameter in enumerate(found.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=i) - 0.3)
    return found


def moved(student: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1)
    return student


def training() -> SelfTraining:
    student = network()
    return SelfTraining(
        student, MeanTeacher(student), mix=CrossDomainMix(CLASSES), num_classes=CLASSES,
        criterion=ConfidenceWeightedCE(0.5), align=DistributionAlignment(CLASSES),
    )  # fmt: skip


def step(one: SelfTraining, seed: int = 0) -> Tensor:
    """A step of a training, without its optimizer; the draw is the same with every version of torch."""
    draw = one.sample(SHAPE[0], SHAPE[1:])
    draw = draw._replace(scores=numbers(*draw.scores.shape, seed=seed))
    loss: Tensor = one(images(seed), labels(seed), images(seed + 1), draw=draw).loss
    moved(one.student)
    one.update()
    return loss.detach()


def optimizer() -> RepeatedSGD:
    weights = list(network().parameters())
    return RepeatedSGD([*weights, *weights[:2]], lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)


def optimized(one: RepeatedSGD) -> list[Tensor]:
    for i, parameter in enumerate(one.param_groups[0]["params"]):
        parameter.grad = numbers(*parameter.shape, seed=i)
    one.step()
    return [parameter.detach() for parameter in one.param_groups[0]["params"]]


def used_teacher(teacher: MeanTeacher) -> None:
    student = network()
    for _ in range(3):
        teacher.update(moved(student))


def used_alignment(align: DistributionAlignment) -> None:
    for seed in range(3):
        align.update(logits(seed).softmax(1))
        align.update_prior(labels(seed))


def aligned(align: DistributionAlignment) -> list[Tensor]:
    first: Tensor = align(logits().softmax(1))
    align.update(logits(4).softmax(1))
    align.update_prior(labels(4))
    return [first, align(logits().softmax(1))]


def teaches(teacher: MeanTeacher) -> list[Tensor]:
    first: Tensor = teacher(images())
    teacher.update(network())
    return [first, teacher(images())]


PARTS: dict[str, Part] = {
    "MeanTeacher": Part(lambda: MeanTeacher(network()), used_teacher, teaches),
    "DistributionAlignment": Part(lambda: DistributionAlignment(CLASSES), used_alignment, aligned),
    "SelfTraining": Part(training, step, lambda one: [step(one, 5), step(one, 6)]),
    "ConfusionMatrix": Part(
        lambda: ConfusionMatrix(CLASSES),
        lambda one: one.update(logits().argmax(1), labels()),
        lambda one: one.compute(),
    ),
    "PseudoLabelMonitor": Part(
        lambda: PseudoLabelMonitor(CLASSES, threshold=0.5),
        lambda one: one.update(labels(), numbers(*SHAPE), truth=labels(1), student=labels(2)),
        lambda one: one.compute(),
    ),
    "UnsupervisedScores": Part(
        lambda: UnsupervisedScores(CLASSES, pixels=50),
        lambda one: one.update(logits()),
        lambda one: one.compute(),
    ),
    "RepeatedSGD": Part(optimizer, optimized, optimized),
}


def plain(value: Any) -> Any:
    """What `torch.load(weights_only=True)` reads."""
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    return value.clone() if isinstance(value, Tensor) else value


# ------------------------------------------------------------------------------------------------------ the trainer


def data(root: Path) -> list[str]:
    """A tiny data set, the same with every version, and the flags that train on it from its folder."""
    for i in range(4):
        for domain in ("source", "target"):
            for kind in ("images", "labels"):
                (root / domain / kind).mkdir(parents=True, exist_ok=True)
            picture = (numbers(3, 24, 32, seed=i) * 255).byte()
            write_png(root / domain / "images" / f"{i}.png", picture)
            write_png(root / domain / "labels" / f"{i}.png", (numbers(24, 32, seed=i + 9) * CLASSES).byte())
    (root / "classes.json").write_text('["a", "b", "c"]')
    return [
        "--source", "source", "--target", "target", "--classes", "classes.json", "--random-init", "--workers", "0",
        "--network", "old_states:network", "--device", "cpu", "--crop", "16", "--steps", "4", "--threshold", "0.5",
        "--method", "alignment", "--save-every", "2", "--eval-every", "4", "--log-every", "1",
    ]  # fmt: skip


def kept(part: Part) -> dict[str, Any]:
    """The state of a part that was used, and its numbers."""
    used, fresh = part.build(), part.build()
    part.use(used)
    state = copy.deepcopy(used.state_dict())
    fresh.load_state_dict(copy.deepcopy(state))
    return {"state": state, "numbers": plain(part.numbers(fresh))}


def kept_training() -> dict[str, Any]:
    """The trainer's checkpoint halfway, and the weights at the end."""
    import dacs_gta5

    with tempfile.TemporaryDirectory() as root, contextlib.chdir(root):
        flags = data(Path())
        dacs_gta5.main([*flags, "--out", "run"])
        half, end = (torch.load(f"run/checkpoints/step-000000{step}.pt", weights_only=True) for step in (2, 4))
    del half["data"]  # with the sizes of files, which the writer of PNG files decides
    return {"state": half, "numbers": end["student"]}


def main() -> None:
    """Keep the states of this version, unless they are kept already."""
    path = STATES / f"{crossmix.__version__}.pt"
    if path.exists():
        sys.exit(f"{path} exists: it is what users of that version have")
    torch.set_num_threads(1)
    contents = {name: kept(part) for name, part in PARTS.items()}
    torch.save({**contents, "the trainer": kept_training()}, path)


if __name__ == "__main__":
    main()
