"""Training runs that can be compared: one of them as a pure function of its options, and many of them, resumable.

Data and randomness are keyed by (seed, step), the initial weights by the seed, and arithmetic is done by one thread, so
that a run gives the same bits wherever and next to whatever it runs. It ends in one JSON file; a finished one is not
run again.
"""

import json
import math
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.study.pairs import PAIRS, Pair, class_shares, load
from crossmix import ClassMix, CrossDomainMix, Mixed, SelfTraining, SelfTrainingOutput, StrongAugment, recipes
from crossmix import functional as F
from crossmix.datasets import Sample
from crossmix.diagnostics import PseudoLabelMonitor
from crossmix.engine import FolderLock, KeyedCrops, keyed_generator
from crossmix.evaluation import evaluate
from crossmix.models import DeepLabV2, deeplab_v2_tiny
from crossmix.optim import parameter_groups, poly_lr

SOURCE, TARGET, STEP = 0, 1, 2  # streams of randomness, next to the seed; those of the trainer
LOOKS = 20  # times that a run is scored and its pseudo-labels are held against the truth
LOOKED_AT = 48  # training images of the target that are looked at


@dataclass(frozen=True)
class Variant:
    """What is trained: a method, and every option in which a row may differ. Defaults are the released recipe's."""

    method: recipes.Method = "dacs"
    train_on: Literal["source", "target"] = "source"  # the labels that are used; the target's for an oracle
    jitter_source: bool = False  # the colour jitter and blur that other methods apply to mixed images alone
    threshold: float | None = None  # the pair's
    decay: float | None = None  # the pair's
    scope: str = recipes.RELEASED.scope
    include_ignored: bool = recipes.RELEASED.include_ignored
    ratio: float = 0.5
    mode: Literal["train", "eval"] = "train"
    aspp_branches: int = 2
    boxes: bool = False  # CutMix: paste a box in place of classes


@dataclass(frozen=True)
class Job:
    """One run."""

    pair: str
    row: str  # the name that tables have for the variant
    variant: Variant
    seed: int
    steps: int
    camvid: str = ""  # folder of the data; where it is does not matter to the result

    @property
    def file(self) -> str:
        """The file's name."""
        return f"{re.sub('[^a-z0-9.]+', '-', self.row.lower()).strip('-')}--seed-{self.seed}.json"

    def options(self) -> dict[str, Any]:
        """All that the result depends on."""
        fixed = asdict(PAIRS[self.pair])
        return {"pair": fixed, "variant": asdict(self.variant), "seed": self.seed, "steps": self.steps, "looks": LOOKS}


class BoxMix(nn.Module):
    """CutMix across domains: a box of half the image instead of half the classes.

    The box has random position and proportions, as in French et al., BMVC 2020, https://arxiv.org/abs/1906.01916.
    """

    def __init__(self, area: float) -> None:
        super().__init__()
        self.area = area

    def forward(
        self,
        source_images: Tensor,
        source_labels: Tensor,
        target_images: Tensor,
        target_labels: Tensor,
        target_weights: Tensor,
        *,
        scores: Tensor,
    ) -> Mixed:
        """Paste a box of each source image; `scores` (N, C + 1) give its place by their first three columns."""
        mask = box_mask(scores, self.area, *source_labels.shape[-2:])
        return Mixed(
            F.mix(source_images, target_images, mask),
            F.mix(source_labels, target_labels, mask),
            F.mix(torch.ones_like(target_weights), target_weights, mask),
            mask,
        )


def box_mask(scores: Tensor, area: float, height: int, width: int) -> Tensor:
    """(N, H, W) bool: boxes of a share of the image, from uniform numbers for their shape and place."""
    shape, y, x = (column[:, None] for column in scores[:, :3].unbind(1))
    tall = area**shape  # from the whole height to the whole width
    wide = area / tall
    top, left = y * (1 - tall), x * (1 - wide)
    rows = (torch.arange(height) + 0.5) / height
    columns = (torch.arange(width) + 0.5) / width
    inside_rows = (rows >= top) & (rows < top + tall)
    inside_columns = (columns >= left) & (columns < left + wide)
    return inside_rows[:, :, None] & inside_columns[:, None, :]


# ---------------------------------------------------------------------------------------------------------- one run


def run(job: Job) -> dict[str, Any]:
    """Train, and return what the run's file holds."""
    pair, variant = PAIRS[job.pair], job.variant
    domains = load(job.pair, job.camvid)
    torch.manual_seed(job.seed)  # the network's initial weights; all else is keyed
    student = deeplab_v2_tiny(len(pair.classes), aspp_branches=variant.aspp_branches, upsample=False)
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as the trainer's demo: faster
    training = build(student, pair, variant, class_shares(domains.target, len(pair.classes)))
    jitter = StrongAugment(flavor="additive", same_on_batch=True)  # of the released recipe
    optimizer = torch.optim.SGD(parameter_groups(student, pair.lr), pair.lr, momentum=0.9, weight_decay=5e-4)
    source = KeyedCrops(domains.source, pair.crop, seed=job.seed, stream=SOURCE)
    target = KeyedCrops(domains.target, pair.crop, seed=job.seed, stream=TARGET)
    looked_at = {math.ceil(job.steps * (i + 1) / LOOKS) for i in range(LOOKS)}
    looks: list[dict[str, Any]] = []
    noted: list[dict[str, float]] = []
    seconds = 0.0
    training.train()
    for step in range(job.steps):
        begin = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = poly_lr(step, job.steps, group["initial_lr"])
        target_images, target_labels = batch(target, step, pair.batch)
        source_images, source_labels = (
            batch(source, step, pair.batch) if variant.train_on == "source" else (target_images, target_labels)
        )
        generator = keyed_generator(job.seed, STEP, step)
        if variant.jitter_source:
            source_images = jitter(source_images, generator=generator)
        output = training(source_images, source_labels, target_images, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        training.update()
        seconds += time.process_time() - begin
        noted.append(note(training, output, source_labels, target_labels))
        if step + 1 in looked_at:
            look = {"step": step + 1, **means(noted), **scores(training, domains.test, len(pair.classes))}
            if training.teacher is not None:
                look["pseudo_labels"] = watch(training, domains.target[:LOOKED_AT], pair, variant)
            looks.append(look)
            noted.clear()
    return {"options": job.options(), "torch": str(torch.__version__), "cpu_seconds": seconds, "looks": looks}


def build(student: DeepLabV2, pair: Pair, variant: Variant, target_shares: Tensor) -> SelfTraining:
    """The method in the released recipe, with every option where the variant has it."""
    num_classes = len(pair.classes)
    training = recipes.self_training(
        student,
        num_classes,
        method=variant.method,
        prior=target_shares if variant.method == "alignment" else None,  # the oracle of the paper's experiment
        threshold=pair.threshold if variant.threshold is None else variant.threshold,
        decay=pair.decay if variant.decay is None else variant.decay,
        mode=variant.mode,
        scope=variant.scope,
        include_ignored=variant.include_ignored,
        upsample=True,  # the loss does it, in blocks
    )
    if isinstance(training.mix, CrossDomainMix):
        training.mix = (
            BoxMix(variant.ratio)
            if variant.boxes
            else CrossDomainMix(num_classes, ratio=variant.ratio, include_ignored=training.mix.include_ignored)
        )
    return training


def batch(crops: KeyedCrops, step: int, size: int) -> tuple[Tensor, Tensor]:
    """The images, in [0, 1], and labels of a step."""
    images, labels = zip(*(crops[step * size + i] for i in range(size)), strict=True)
    return as_input(torch.stack(images)), torch.stack(labels)


def as_input(images: Tensor) -> Tensor:
    """Bytes as the network wants them."""
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)


def scores(training: SelfTraining, test: list[Sample], num_classes: int) -> dict[str, Any]:
    """IoU of student and teacher on the test images, as fractions."""
    networks = {"student": training.student}
    if training.teacher is not None:
        networks["teacher"] = training.teacher.module
    found = {}
    for name, network in networks.items():
        iou = evaluate(network, test, num_classes=num_classes)["native"].compute()
        found[name] = {"miou": iou.mean, "per_class": [none_if_nan(value) for value in iou.per_class.tolist()]}
    return found


@torch.no_grad()
def watch(training: SelfTraining, samples: list[Sample], pair: Pair, variant: Variant) -> dict[str, Any]:
    """What the labels that training would use are like on target images, held against the truth."""
    teacher, num_classes = training.teacher, len(pair.classes)
    if teacher is None:
        raise ValueError("there are no pseudo-labels without a teacher")
    threshold = pair.threshold if variant.threshold is None else variant.threshold
    monitor = PseudoLabelMonitor(num_classes, threshold=threshold)
    training.student.eval()  # or BatchNorm would average these images into its statistics
    for i in range(0, len(samples), pair.batch):
        group = samples[i : i + pair.batch]
        images = as_input(torch.stack([sample.image for sample in group]))
        truth = torch.stack([sample.label for sample in group if sample.label is not None])
        probs = upsampled(teacher(images), truth).softmax(1)
        if training.align is not None:
            probs = training.align(probs)
        student = upsampled(training.student(images), truth).argmax(1)
        monitor.update(*F.pseudo_label_from_probs(probs), truth=truth, student=student)
    training.student.train()
    quality = monitor.compute()
    return {
        "lambda": quality.confident_share,
        "agreement": quality.agreement,
        "divergence": quality.divergence,
        "precision": [none_if_nan(value) for value in quality.precision.tolist()],
        "recall": [none_if_nan(value) for value in quality.recall.tolist()],
        "share": quality.share.tolist(),
        "true_share": quality.expected_share.tolist(),
    }


def upsampled(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits at the labels' size, as in training."""
    return functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=True)


def note(
    training: SelfTraining, output: SelfTrainingOutput, source_labels: Tensor, target_labels: Tensor
) -> dict[str, float]:
    """What is kept of a step: its losses, and the share of right labels in the mixed batch."""
    noted = {"source_loss": output.source_loss.item(), "mixed_loss": output.mixed_loss.item()}
    if output.mixed is not None:
        truth = true_mixed_labels(training, output.mixed, source_labels, target_labels)
        noted["mixed_accuracy"] = (output.mixed.labels == truth)[truth != 255].double().mean().item()
    return noted


def true_mixed_labels(training: SelfTraining, mixed: Mixed, source_labels: Tensor, target_labels: Tensor) -> Tensor:
    """What the labels of a mixed batch would be if the truth about the target were known."""
    if training.mix is None:
        return target_labels
    if isinstance(training.mix, ClassMix):
        return F.mix(target_labels, target_labels.roll(-1, 0), mixed.mask)
    return F.mix(source_labels, target_labels, mixed.mask)


def means(noted: Sequence[dict[str, float]]) -> dict[str, float]:
    """The means over the steps since the last look."""
    return {name: sum(step[name] for step in noted) / len(noted) for name in noted[0]}


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def best(looks: Sequence[dict[str, Any]], network: str = "student") -> dict[str, Any]:
    """The look at which a network scored best."""
    return max(looks, key=lambda look: float(look[network]["miou"]))


# -------------------------------------------------------------------------------------------------------- many runs


def run_all(jobs: Sequence[Job], out: Path, workers: int) -> list[dict[str, Any]]:
    """Run what is not finished, `workers` at a time, and return the documents of all jobs in order."""
    with FolderLock(out):
        left = [job for job in jobs if not is_finished(job, out)]
        print(f"{len(jobs) - len(left)} of {len(jobs)} runs are finished in {out}", flush=True)
        begin = time.perf_counter()
        for count, job in enumerate(completed(left, out, workers), 1):
            document = json.loads((out / job.file).read_text(encoding="utf-8"))
            last, top = document["looks"][-1], best(document["looks"])
            speed = job.steps / document["cpu_seconds"]
            minutes = (time.perf_counter() - begin) / count * (len(left) - count) / 60
            print(
                f"[{len(jobs) - len(left) + count}/{len(jobs)}] {job.row}, seed {job.seed}: mIoU "
                f"{100 * last['student']['miou']:.2f} %, best {100 * top['student']['miou']:.2f} % at step "
                f"{top['step']}, {speed:.1f} it/s of CPU time, about {minutes:.0f} min left",
                flush=True,
            )
    return [json.loads((out / job.file).read_text(encoding="utf-8")) for job in jobs]


def is_finished(job: Job, out: Path) -> bool:
    """Whether the run's file is there; one of other options is an error."""
    try:
        found = json.loads((out / job.file).read_text(encoding="utf-8"))["options"]
    except FileNotFoundError:
        return False
    if found != json.loads(json.dumps(job.options())):
        raise SystemExit(f"{out / job.file}: is a run with other options; give another --out, or delete it.")
    return True


def completed(jobs: Sequence[Job], out: Path, workers: int) -> Iterable[Job]:
    """Jobs as they end."""
    if workers == 1:
        one_thread()
        for job in jobs:
            yield run_to_file(job, out)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=one_thread) as pool:
        futures = [pool.submit(run_to_file, job, out) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # where one failed, the others need not start


def one_thread() -> None:
    """Sums depend on how they are split; processes side by side are faster than threads anyway."""
    torch.set_num_threads(1)


def run_to_file(job: Job, out: Path) -> Job:
    """Run, and write the file in one go."""
    document = run(job)
    aside = out / f"{job.file}.tmp"
    aside.write_text(json.dumps(document) + "\n", encoding="utf-8")
    aside.replace(out / job.file)
    return job
