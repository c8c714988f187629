"""Comparable training runs: a single run as a pure function of its options, and resumable sets of runs.

Data and randomness are keyed by (seed, step), the initial weights by the seed, and arithmetic uses one thread, so the
result of a run on a CPU is bit-identical regardless of what else runs. Each run writes one JSON file, and from ImageNet
weights the label maps that it ends with on a few test images; finished runs are skipped, and an interrupted one goes on
from the last time that it was scored.
"""

import contextlib
import json
import math
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from benchmarks.speed.common import commit, machine
from benchmarks.study.collected import best, compact
from benchmarks.study.network import PretrainedPyramid
from benchmarks.study.pairs import PAIRS, Domains, Pair, class_shares, load
from crossmix import ClassMix, CrossDomainMix, Mixed, SelfTraining, SelfTrainingOutput, StrongAugment, recipes
from crossmix import functional as F
from crossmix.datasets import RareClassSampler, Sample, class_counts, write_png
from crossmix.diagnostics import PseudoLabelMonitor, UnsupervisedScores
from crossmix.engine import CheckpointStore, FolderLock, KeyedCrops, keyed_generator
from crossmix.evaluation import evaluate
from crossmix.models import deeplab_v2_tiny
from crossmix.optim import parameter_groups, poly_lr

SOURCE, TARGET, STEP = 0, 1, 2  # streams of randomness, as in the trainer
LOOKS = 20  # how often a run is scored and its pseudo-labels are compared with the truth
LOOKED_AT = 48  # number of target training images used for that comparison
PICTURED, PICTURED_BY_DAY = 3, 1  # number of test images whose predicted label maps are kept
RARE_PIXELS = 3000 / (1052 * 1914)  # pixels of a class that rare-class sampling needs, as a share of a GTA5 image


@dataclass(frozen=True)
class Variant:
    """A method and all options in which rows differ. Defaults are those of the released recipe."""

    method: recipes.Method = "dacs"
    recipe: Literal["released", "mic"] = "released"  # options that have no field here
    train_on: Literal["source", "target"] = "source"  # the labels to train on; the target's for an oracle
    jitter_source: bool = False  # apply the colour jitter and blur of mixed images to source images
    threshold: float | None = None  # None: the pair's
    decay: float | None = None  # None: the pair's
    scope: str = recipes.RELEASED.scope
    include_ignored: bool = recipes.RELEASED.include_ignored
    ratio: float = 0.5
    mode: Literal["train", "eval"] = "train"
    aspp_branches: int = 2
    boxes: bool = False  # CutMix: paste a box instead of classes
    prior: Literal["target", "source"] = "target"  # whose class shares alignment knows; the target's are an oracle
    rare_classes: bool = False  # rare-class sampling of source images
    consistency: bool | int = False  # masked image consistency; a number is the size of the blocks
    consistency_running_stats: bool = True  # whether hidden images change the running statistics too


@dataclass(frozen=True)
class Job:
    pair: str
    row: str  # the variant's name in tables
    variant: Variant
    seed: int
    steps: int
    camvid: str = ""  # data folder; its location does not affect the result
    device: str = "cpu"  # recorded with the result, which differs by rounding, and on a GPU from run to run

    @property
    def file(self) -> str:
        return f"{re.sub('[^a-z0-9.]+', '-', self.row.lower()).strip('-')}--seed-{self.seed}.json"

    def options(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        fixed, variant = asdict(PAIRS[self.pair]), asdict(self.variant)
        if variant["consistency_running_stats"]:  # as in runs that are older than this option
            del variant["consistency_running_stats"]
        return {"pair": fixed, "variant": variant, "seed": self.seed, "steps": self.steps, "looks": LOOKS}

    def as_json(self) -> dict[str, Any]:
        """The options as they are read back from a file."""
        read: dict[str, Any] = json.loads(json.dumps(self.options()))
        return read


class Boxes(nn.Module):
    """Masks of CutMix: a box that covers a share `area` of each image, with a random position and aspect ratio.

    As in French et al., BMVC 2020, https://arxiv.org/abs/1906.01916. Draws as many numbers as for classes.
    """

    def __init__(self, area: float, num_classes: int) -> None:
        super().__init__()
        self.area = area
        self.numbers = num_classes + 1

    def sample(
        self,
        n: int,
        size: object,
        /,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        del size
        return torch.rand(n, self.numbers, generator=generator).to(device)  # by a generator of the CPU, as all draws

    def forward(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """The first three of the uniform numbers (N, C + 1) give shape and position of the box: (N, H, W) bool."""
        shape, y, x = (column[:, None] for column in scores[:, :3].unbind(1))
        tall = self.area**shape  # from full height to full width
        inside = []
        for position, length, pixels in zip((y, x), (tall, self.area / tall), size, strict=True):
            centers = (torch.arange(pixels, device=scores.device) + 0.5) / pixels
            begin = position * (1 - length)
            inside.append((centers >= begin) & (centers < begin + length))
        rows, columns = inside
        return rows[:, :, None] & columns[:, None, :]


# ---------------------------------------------------------------------------------------------------------- one run


def run(job: Job, begun: CheckpointStore | None = None) -> tuple[dict[str, Any], Tensor | None]:
    """The run's document, and the label maps of `pictured` images from ImageNet weights, (N, H, W) uint8.

    With `begun`, the run goes on from the checkpoint there, and saves one each time that it is scored.
    """
    pair, variant = PAIRS[job.pair], job.variant
    torch.backends.cudnn.allow_tf32 = False  # convolutions in float32 as on a CPU; on by default
    domains = load(job.pair, job.camvid)
    torch.manual_seed(job.seed)  # for the initial weights; everything else is keyed
    student = network_of(pair, variant)
    student.to(memory_format=layout(job.device))  # type: ignore[call-overload]
    known = domains.source if variant.prior == "source" else domains.target
    training = build(student, pair, variant, class_shares(known, len(pair.classes))).to(job.device)
    jitter = StrongAugment(flavor="additive", same_on_batch=True)  # as in the released recipe
    optimizer = optimizer_of(student, pair)
    rare = rare_classes(domains.source, len(pair.classes)) if variant.rare_classes else None
    source = KeyedCrops(domains.source, pair.crop, seed=job.seed, stream=SOURCE, rare=rare)
    target = KeyedCrops(domains.target, pair.crop, seed=job.seed, stream=TARGET)
    looked_at = {math.ceil(job.steps * (i + 1) / LOOKS) for i in range(LOOKS)}
    looks, seconds = ([], 0.0) if begun is None else resumed(begun, job, training, optimizer)
    noted: list[dict[str, float]] = []
    training.train()
    for step in range(looks[-1]["step"] if looks else 0, job.steps):
        begin = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = poly_lr(step, job.steps, group["initial_lr"])
        target_images, target_labels = batch(target, step, pair.batch, job.device)
        source_images, source_labels = (
            batch(source, step, pair.batch, job.device)
            if variant.train_on == "source"
            else (target_images, target_labels)
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
            looks.append({"step": step + 1, **means(noted), **look(training, domains, pair, variant)})
            noted.clear()
            if begun is not None:
                states = {"training": training.state_dict(), "optimizer": optimizer.state_dict()}
                begun.save(step + 1, {"options": job.as_json(), "looks": looks, "seconds": seconds, **states})
    ran = {"commit": commit(), "machine": machine(job.device), "cpu_seconds": seconds}
    document: dict[str, Any] = {"options": job.options(), **ran, "looks": looks}
    if not pair.pretrained:
        return document, None
    document |= {"looks": compact(looks), "pictures": [sample.name for sample in pictured(domains)]}
    return document, label_maps(student, pictured(domains))


def resumed(
    begun: CheckpointStore, job: Job, training: SelfTraining, optimizer: torch.optim.Optimizer
) -> tuple[list[dict[str, Any]], float]:
    """Load the newest checkpoint of this run; return its looks and CPU seconds, none if it is new."""
    found = begun.load_newest()
    if found is None:
        return [], 0.0
    if found["options"] != job.as_json():
        raise SystemExit(f"{begun.folder}: is a run with other options; pass another --out, or delete it.")
    training.load_state_dict(found["training"])
    optimizer.load_state_dict(found["optimizer"])
    return found["looks"], found["seconds"]


def network_of(pair: Pair, variant: Variant) -> nn.Module:
    """The student; its logits are smaller than the images."""
    if pair.pretrained:
        return PretrainedPyramid(len(pair.classes))
    return deeplab_v2_tiny(len(pair.classes), aspp_branches=variant.aspp_branches, upsample=False)


def optimizer_of(student: nn.Module, pair: Pair) -> torch.optim.Optimizer:
    if pair.pretrained:
        return torch.optim.AdamW(parameter_groups(student, pair.lr, head="pyramid"), pair.lr)
    return torch.optim.SGD(parameter_groups(student, pair.lr), pair.lr, momentum=0.9, weight_decay=5e-4)


def rare_classes(samples: list[Sample], num_classes: int) -> RareClassSampler:
    """Rare-class sampling as in DAFormer, with the number of pixels scaled to the size of the images."""
    counts = class_counts(cast("Dataset[Sample]", samples))[:, :num_classes]
    return RareClassSampler(counts, min_pixels=round(RARE_PIXELS * samples[0].image[0].numel()))


def build(student: nn.Module, pair: Pair, variant: Variant, prior: Tensor) -> SelfTraining:
    """Build the method in the variant's recipe and with its options."""
    num_classes = len(pair.classes)
    training = recipes.self_training(
        student,
        num_classes,
        method=variant.method,
        recipe=variant.recipe,
        prior=prior if variant.method == "alignment" else None,
        threshold=pair.threshold if variant.threshold is None else variant.threshold,
        decay=pair.decay if variant.decay is None else variant.decay,
        mode=variant.mode,
        scope=variant.scope,
        include_ignored=variant.include_ignored,
        consistency=variant.consistency is not False,
        consistency_block=None if isinstance(variant.consistency, bool) else variant.consistency,
        consistency_running_stats=variant.consistency_running_stats,
        upsample=True,  # in blocks, by the loss
    )
    if isinstance(training.mix, CrossDomainMix):
        training.mix = CrossDomainMix(
            num_classes,
            ratio=variant.ratio,
            include_ignored=training.mix.include_ignored,
            masks=Boxes(variant.ratio, num_classes) if variant.boxes else None,
        )
    return training


def batch(crops: KeyedCrops, step: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels of a step."""
    images, labels = zip(*(crops[step * size + i] for i in range(size)), strict=True)
    return as_input(torch.stack(images), device), torch.stack(labels).to(device)


def as_input(images: Tensor, device: str | torch.device) -> Tensor:
    return (images.to(device).float() / 255).contiguous(memory_format=layout(device))


def layout(device: str | torch.device) -> torch.memory_format:
    """channels_last on a CPU, where it is faster, as in the trainer's demo; torch's own layout on a GPU."""
    return torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format


def look(training: SelfTraining, domains: Domains, pair: Pair, variant: Variant) -> dict[str, Any]:
    """Score the networks, with labels and without, and compare the pseudo-labels with the truth."""
    found = scores(training, domains.test, len(pair.classes))
    if domains.by_day:
        found["by_day"] = scores(training, domains.by_day, len(pair.classes))
    if pair.pretrained or training.teacher is not None:
        found |= watch(training, domains.target[:LOOKED_AT], pair, variant)
    return found


def scores(training: SelfTraining, test: Sequence[Sample], num_classes: int) -> dict[str, Any]:
    """IoU of student and teacher on the test images, as fractions."""
    networks = {"student": training.student}
    if training.teacher is not None:
        networks["teacher"] = training.teacher.module
    on_gpu = next(training.parameters()).is_cuda
    found = {}
    for name, trained in networks.items():
        iou = evaluate(trained, in_batches(test) if on_gpu else test, num_classes=num_classes)["native"].compute()
        found[name] = {"miou": iou.mean, "per_class": [none_if_nan(value) for value in iou.per_class.tolist()]}
    return found


def in_batches(samples: Sequence[Sample]) -> Iterable[tuple[Tensor, Tensor]]:
    """Images and labels, for a GPU, which one image at a time would leave idle."""
    for i in range(0, len(samples), 32):
        group = samples[i : i + 32]
        labels = [sample.label for sample in group if sample.label is not None]
        yield torch.stack([sample.image for sample in group]), torch.stack(labels)


@torch.no_grad()
def watch(training: SelfTraining, samples: list[Sample], pair: Pair, variant: Variant) -> dict[str, Any]:
    """On target images: scores to choose a step by, and the truth about the pseudo-labels that training would use."""
    num_classes = len(pair.classes)
    threshold = pair.threshold if variant.threshold is None else variant.threshold
    device = next(training.student.parameters()).device
    monitor = PseudoLabelMonitor(num_classes, threshold=threshold).to(device)
    unsupervised = UnsupervisedScores(num_classes).to(device)
    training.student.eval()  # keeps these images out of BatchNorm's running statistics
    for i in range(0, len(samples), pair.batch):
        group = samples[i : i + pair.batch]
        images = as_input(torch.stack([sample.image for sample in group]), device)
        truth = torch.stack([sample.label for sample in group if sample.label is not None]).to(device)
        logits = training.student(images)
        if pair.pretrained:
            unsupervised.update(logits)
        if training.teacher is not None:
            probs = upsampled(training.teacher(images), truth).softmax(1)
            if training.align is not None:
                probs = training.align(probs)
            student = upsampled(logits, truth).argmax(1)
            monitor.update(*F.pseudo_label_from_probs(probs), truth=truth, student=student)
    training.student.train()
    found: dict[str, Any] = {}
    if pair.pretrained:
        found["unsupervised"] = {name: none_if_nan(value) for name, value in unsupervised.compute()._asdict().items()}
    if training.teacher is not None:
        quality = monitor.compute()
        found["pseudo_labels"] = {
            "lambda": quality.confident_share,
            "agreement": quality.agreement,
            "divergence": quality.divergence,
            "precision": [none_if_nan(value) for value in quality.precision.tolist()],
            "recall": [none_if_nan(value) for value in quality.recall.tolist()],
            "share": quality.share.tolist(),
            "true_share": quality.expected_share.tolist(),
        }
    return found


def upsampled(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=True)


def pictured(domains: Domains) -> list[Sample]:
    """The test images of the figure of predictions, spread evenly over the drives."""
    return evenly(domains.test, PICTURED) + (evenly(domains.by_day, PICTURED_BY_DAY) if domains.by_day else [])


def evenly(samples: Sequence[Sample], count: int) -> list[Sample]:
    return [samples[(2 * i + 1) * len(samples) // (2 * count)] for i in range(count)]


@torch.no_grad()
def label_maps(student: nn.Module, samples: list[Sample]) -> Tensor:
    """Predicted classes, (N, H, W) uint8."""
    student.eval()
    images = as_input(torch.stack([sample.image for sample in samples]), next(student.parameters()).device)
    return upsampled(student(images), images).argmax(1).to(torch.uint8).cpu()


def note(
    training: SelfTraining, output: SelfTrainingOutput, source_labels: Tensor, target_labels: Tensor
) -> dict[str, float]:
    """The record of a step: its losses, and the share of correct labels in the mixed batch."""
    noted = {"source_loss": output.source_loss.item(), "mixed_loss": output.mixed_loss.item()}
    if output.mixed is not None:
        truth = true_mixed_labels(training, output.mixed, source_labels, target_labels)
        noted["mixed_accuracy"] = (output.mixed.labels == truth)[truth != 255].double().mean().item()
    return noted


def true_mixed_labels(training: SelfTraining, mixed: Mixed, source_labels: Tensor, target_labels: Tensor) -> Tensor:
    """The labels that a mixed batch would have with true target labels."""
    if training.mix is None:
        return target_labels
    if isinstance(training.mix, ClassMix):
        return F.mix(target_labels, target_labels.roll(-1, 0), mixed.mask)
    return F.mix(source_labels, target_labels, mixed.mask)


def means(noted: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(step[name] for step in noted) / len(noted) for name in noted[0]}


def none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


# -------------------------------------------------------------------------------------------------------- many runs


def run_all(jobs: Sequence[Job], out: Path, workers: int) -> list[dict[str, Any]]:
    """Run all unfinished jobs, `workers` at a time, and return the documents of all jobs in order."""
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
    """Whether the run's file exists; a file with other options is an error."""
    try:
        found = json.loads((out / job.file).read_text(encoding="utf-8"))["options"]
    except FileNotFoundError:
        return False
    if found != job.as_json():
        raise SystemExit(f"{out / job.file}: is a run with other options; pass another --out, or delete it.")
    return True


def completed(jobs: Sequence[Job], out: Path, workers: int) -> Iterable[Job]:
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
            pool.shutdown(wait=True, cancel_futures=True)  # if one failed, do not start the others


def one_thread() -> None:
    """Use one thread: results then do not depend on how sums are split, and parallel processes are faster anyway."""
    torch.set_num_threads(1)


def run_to_file(job: Job, out: Path) -> Job:
    """Run the job and write its files atomically, the JSON file last: it says that the run is finished."""
    path = out / job.file
    begun = CheckpointStore(out / "begun" / path.stem)
    document, maps = run(job, begun)
    if maps is not None:
        write_stack(path.with_suffix(".png"), maps)
    aside = path.with_suffix(".json.tmp")
    aside.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")
    aside.replace(path)
    shutil.rmtree(begun.folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # other runs are in it
        begun.folder.parent.rmdir()
    return job


def write_stack(path: Path, pictures: Tensor) -> None:
    """Write images (N, 3, H, W) or label maps (N, H, W) of uint8 into one PNG file, one below the other; atomically."""
    aside = path.with_suffix(".png.tmp")
    write_png(aside, torch.cat(list(pictures), dim=-2))
    aside.replace(path)
