"""Train DeepLab-v2 from GTA5 to Cityscapes by DACS, as the paper does, or by one of the methods it compares with.

    python examples/dacs_gta5.py --demo                                        minutes on a laptop
    python examples/dacs_gta5.py --gta5 DIR --cityscapes DIR --weights FILE    the paper's main row
    python examples/dacs_gta5.py ... --out runs/dacs --resume                  go on where a run stopped

The demo renders a small pair of domains (`crossmix.datasets.StreetScenes`), writes it to disk in the folder layouts of
GTA5 and Cityscapes, trains a small DeepLab-v2 from scratch on the source alone and by DACS, and prints both rows.

OUT holds config.json (every option as it was), log.jsonl (one object per logged step), metrics.json (every evaluation),
checkpoints/ and report/. Data and randomness are a pure function of (seed, step), so a resumed run equals one that
never stopped, bit for bit on a CPU.

DACS: Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as tf
from torch.utils.data import DataLoader

import crossmix
from crossmix import SelfTraining, SelfTrainingOutput, recipes
from crossmix.datasets import GTA5, Cityscapes, DataError, StreetScenes, write_png
from crossmix.datasets.classes import CLASS_NAMES, CLASSES_13, CLASSES_16
from crossmix.engine import CheckpointStore, KeyedCrops, RunLog, keyed_generator
from crossmix.evaluation import evaluate
from crossmix.metrics import ConfusionMatrix
from crossmix.models import DeepLabV2, deeplab_v2_resnet101, deeplab_v2_tiny, load_weights
from crossmix.optim import RepeatedSGD, parameter_groups, poly_lr
from crossmix.visualize import colorize, gallery

try:
    from tqdm import tqdm
except ImportError:  # the bar is an extra; the lines of a log file need nothing
    tqdm = None

NUM_CLASSES = len(CLASS_NAMES)
Batch = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # source and target, each images and labels
SOURCE, TARGET, STEP = 0, 1, 2  # streams of randomness, next to the seed
PAPER_MIOU = {"source": 32.85, "pseudo-label": 22.97, "classmix": 35.08, "alignment": 48.04, "dacs": 52.14}


@dataclass(frozen=True)
class Config:
    """Every option of a run, resolved: flags over --config file over recipe over these defaults."""

    method: recipes.Method = "dacs"  # a row of the paper's Table 3
    recipe: str = "released"  # sets the options of the second block
    gta5: str = ""  # folder with images/ and labels/
    cityscapes: str = ""  # folder with leftImg8bit/ and gtFine/
    eval_split: str = "val"
    weights: str = ""  # initialisation: a file or URL; the head may be another one
    network: str = "resnet101"
    prior: str = "oracle"  # of method alignment
    crop: str = "512x512"  # H x W, pixels
    batch: int = 2  # source images, and as many target images
    steps: int = 250_000
    lr: float = 2.5e-4  # of the backbone; the head learns ten times as fast
    weight_decay: float = 5e-4
    momentum: float = 0.9
    power: float = 0.9  # of the polynomial decay
    target_size: str = "512x1024"  # Cityscapes images are resized to this, for training and for evaluation
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    precision: str = "fp32"
    workers: int = min(4, os.cpu_count() or 1)  # processes per data set
    eval_every: int = 5000  # steps
    save_every: int = 5000  # steps
    log_every: int = 100  # steps

    mixed_loss_weights: str = recipes.RELEASED.mixed_loss_weights
    lambda_scope: str = recipes.RELEASED.lambda_scope
    source_loss_mean: str = recipes.RELEASED.source_loss_mean
    classes_drawn: str = recipes.RELEASED.classes_drawn
    teacher: str = recipes.RELEASED.teacher
    jitter: str = recipes.RELEASED.jitter
    threshold: float = recipes.RELEASED.threshold  # a pixel counts for lambda from this confidence on
    decay: float = recipes.RELEASED.decay  # share of the teacher that a step keeps
    aspp_branches: int = 2
    nesterov: bool = False
    backbone_updates: str = "repeated"  # each parameter as often as the released code lists it, or "once"
    source_size: str = "720x1280"  # GTA5 images are resized to this
    evaluation: str = "512x1024"  # the label size that decides the best step; both are always reported


CHOICES = {
    "method": recipes.METHODS,
    "recipe": ("released", "paper"),
    "prior": ("oracle", "source"),
    "network": ("resnet101", "tiny"),
    "precision": ("fp32", "bf16"),
    "aspp_branches": (2, 4),
    "backbone_updates": ("repeated", "once"),
}

PAPER_OPTIONS = {
    **asdict(recipes.PAPER),
    "aspp_branches": 4,
    "nesterov": True,
    "backbone_updates": "once",
    "source_size": "760x1280",
    "evaluation": "1024x2048",
}

# The demo: what the paper does, scaled to a laptop. Sizes are those of the rendered images. A small network from random
# weights wants a higher learning rate and is less sure of itself (hardly a pixel would reach 0.968), and a teacher that
# averages over a hundred steps lags behind in a short run.
DEMO_OPTIONS = {
    "network": "tiny",
    "crop": "64x128",
    "source_size": "native",
    "target_size": "native",
    "evaluation": "native",
    "batch": 4,
    "steps": 2400,
    "lr": 0.002,
    "threshold": 0.5,
    "backbone_updates": "once",
    "decay": 0.9,
    "workers": 0,
    "eval_every": 1200,
    "save_every": 1200,
    "log_every": 50,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args, given = parse(argv)
    config = resolve(given, demo=args.demo, file=args.config)
    if args.dry_run:
        print(json.dumps(asdict(config), indent=2))
        return 0
    out = Path(args.out or time.strftime(f"runs/%Y%m%d-%H%M%S-{'demo' if args.demo else config.method}"))
    methods = [config.method]
    if args.demo:
        config = with_rendered_data(config, out / "data")
        methods = [config.method] if "method" in given else ["source", "dacs"]
    folders = {method: out if len(methods) == 1 else out / method for method in methods}
    results: dict[str, dict[str, Any]] = {}
    for method in methods:
        print(f"{method}: training for {config.steps} steps on {config.device}, into {folders[method]}", flush=True)
        try:
            results[method] = train(replace(config, method=method), folders[method], resume=args.resume)
        except DataError as error:
            raise SystemExit(f"error: {error}") from error
    print("\n" + table(results, config))
    return 0


# ---------------------------------------------------------------------------------------------------- the algorithm


def train(config: Config, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train one method; return what metrics.json holds."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)  # the network's initial weights; all else is keyed
    data = read_data(config)
    student = build_network(config)
    training = build_training(student, config).to(config.device).train()
    optimizer = build_optimizer(student, config)
    store, log = CheckpointStore(out / "checkpoints"), RunLog(out / "log.jsonl")
    start, metrics = restore(store, log, config, training, optimizer) if resume else (0, new_metrics())
    if start == 0:
        refuse_to_overwrite(out, resume=resume)
    write_json(out / "config.json", {**asdict(config), "versions": versions()})

    batches = zip(crops(data.source, config, SOURCE, start), crops(data.target, config, TARGET, start), strict=True)
    progress = Progress(config, start)
    for step in range(start, config.steps):
        with progress.waiting():
            batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = poly_lr(step, config.steps, group["initial_lr"], power=config.power)
        output = train_step(training, optimizer, batch, step, config)

        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            log.write(progress.record(done, optimizer.param_groups[0]["lr"], output))
        if done % config.eval_every == 0 or done == config.steps:
            add_evaluation(metrics, done, training, data.validation, config)
            progress.say(f"step {done}: student mIoU {percent(metrics['last'], config):.2f} %")
            write_json(out / "metrics.json", metrics)
        if done % config.save_every == 0 or done == config.steps:
            best = metrics["best"] is not None and metrics["best"]["step"] == done
            store.save(done, state(done, training, optimizer, metrics, config), best=best)
    progress.close()
    write_report(out / "report", training, data, metrics, config)
    return metrics


def train_step(
    training: SelfTraining, optimizer: torch.optim.Optimizer, batch: Batch, step: int, config: Config
) -> SelfTrainingOutput:
    """One iteration of Algorithm 1."""
    (source_images, source_labels), (target_images, _) = batch
    draw = training.sample(config.batch, generator=keyed_generator(config.seed, STEP, step), device=config.device)
    if training.align is not None and config.prior == "source":
        training.align.update_prior(source_labels)
    with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.precision == "bf16"):
        output: SelfTrainingOutput = training(source_images, source_labels, target_images, draw=draw)
    optimizer.zero_grad(set_to_none=True)
    output.loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    training.update()
    return output


# ------------------------------------------------------------------------------------------------------------- parts


def build_network(config: Config) -> DeepLabV2:
    """DeepLab-v2, from the given weights or from random ones."""
    build = deeplab_v2_resnet101 if config.network == "resnet101" else deeplab_v2_tiny
    network = build(NUM_CLASSES, aspp_branches=config.aspp_branches)
    if config.weights:
        report = load_weights(network, config.weights, strict=False)  # COCO and ImageNet files have another head
        print(
            f"{config.weights}: {len(report.matched)} tensors taken, {len(report.mismatched)} of another shape",
            flush=True,
        )
    return network


def build_training(student: DeepLabV2, config: Config) -> SelfTraining:
    """The method in the recipe, with every switch where the configuration has it."""
    prior = None
    if config.method == "alignment" and config.prior == "oracle":
        prior = class_counts(read_target(config, labels=True))
    return recipes.self_training(
        student,
        NUM_CLASSES,
        method=config.method,
        recipe=recipes.Recipe(**{field.name: getattr(config, field.name) for field in fields(recipes.Recipe)}),
        prior=prior,
    )


def build_optimizer(student: DeepLabV2, config: Config) -> torch.optim.SGD:
    """SGD with ten times the learning rate in the head, and the released code's repeated updates where asked."""
    repeated = config.backbone_updates == "repeated"
    optimizer = RepeatedSGD if repeated else torch.optim.SGD
    return optimizer(
        parameter_groups(student, config.lr, repeated=repeated),
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


class Data(NamedTuple):
    """Source, unlabelled target, and labelled validation images at their own size."""

    source: GTA5
    target: Cityscapes
    validation: Cityscapes


def read_data(config: Config) -> Data:
    """Open the folders, before anything else can fail."""
    return Data(
        source=GTA5(config.gta5, size=size(config.source_size)),
        target=read_target(config, labels=False),
        validation=Cityscapes(config.cityscapes, config.eval_split),
    )


def read_target(config: Config, *, labels: bool) -> Cityscapes:
    """The target's training images; their labels are read for the oracle prior alone."""
    return Cityscapes(config.cityscapes, "train", size=size(config.target_size), labels=labels)


def crops(samples: GTA5 | Cityscapes, config: Config, stream: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of crops on the device, images in [0, 1], from a step on."""
    loader = DataLoader(
        KeyedCrops(samples, height_and_width(config.crop), seed=config.seed, stream=stream),
        batch_size=config.batch,
        sampler=range(start * config.batch, config.steps * config.batch),
        num_workers=config.workers,
        pin_memory=config.device.startswith("cuda"),
        generator=torch.Generator(),  # or each loader would draw from the global one
    )
    for images, labels in loader:
        on_device = images.to(config.device, non_blocking=True)
        yield on_device.float() / 255, labels.to(config.device, non_blocking=True)


def class_counts(samples: Cityscapes) -> Tensor:
    """Pixels of each class in labelled images."""
    counts = torch.zeros(256, dtype=torch.int64)
    for i in range(len(samples)):
        label = samples[i].label
        if label is not None:
            counts += torch.bincount(label.flatten(), minlength=256)
    return counts[:NUM_CLASSES].double()


# -------------------------------------------------------------------------------------------------------- evaluation


def add_evaluation(
    metrics: dict[str, Any], step: int, training: SelfTraining, validation: Cityscapes, config: Config
) -> None:
    """Evaluate student and teacher on all of the validation images, and keep last and best apart."""
    entry: dict[str, Any] = {"step": step, "student": scores(training.student, validation, config)}
    if training.teacher is not None:
        entry["teacher"] = scores(training.teacher.module, validation, config)
    metrics["evaluations"].append(entry)
    metrics["last"] = entry
    if metrics["best"] is None or miou(entry, config) > miou(metrics["best"], config):
        metrics["best"] = entry


def scores(network: nn.Module, validation: Cityscapes, config: Config) -> dict[str, Any]:
    """Scores at half and at full resolution, or at the images' own in the demo."""
    if not isinstance(network, DeepLabV2):
        raise TypeError(f"expected a DeepLabV2, got {type(network).__name__}.")
    matrices = evaluate(
        network,
        validation,
        num_classes=NUM_CLASSES,
        image_size=size(config.target_size),
        label_sizes=label_sizes(config),
        forward=network.forward_features,
        device=config.device,
    )
    return {key: summary(matrix) for key, matrix in matrices.items()}


def label_sizes(config: Config) -> list[tuple[int, int] | None]:
    """The sizes that labels are scored at: that of the images and twice it, or their own."""
    image_size = size(config.target_size)
    return [None] if image_size is None else [image_size, (2 * image_size[0], 2 * image_size[1])]


def summary(matrix: ConfusionMatrix) -> dict[str, Any]:
    """IoU as fractions; None for a class that is in neither labels nor predictions."""
    iou = matrix.compute()
    return {
        "miou": number(iou.mean),
        "miou_16": number(matrix.compute(CLASSES_16).mean),
        "miou_13": number(matrix.compute(CLASSES_13).mean),
        "pixel_accuracy": number(iou.pixel_accuracy),
        "per_class": {name: number(value) for name, value in zip(CLASS_NAMES, iou.per_class.tolist(), strict=True)},
    }


def miou(entry: dict[str, Any], config: Config) -> float:
    """The student's mean IoU at the size that decides."""
    value = entry["student"][config.evaluation]["miou"]
    return -math.inf if value is None else float(value)


def percent(entry: dict[str, Any], config: Config) -> float:
    """The same in percent, for people."""
    return 100 * miou(entry, config)


def number(value: float) -> float | None:
    """A float as JSON can hold it."""
    return None if math.isnan(value) else float(value)


# ------------------------------------------------------------------------------------------------ checkpoints, report


def state(
    step: int,
    training: SelfTraining,
    optimizer: torch.optim.Optimizer,
    metrics: dict[str, Any],
    config: Config,
) -> dict[str, Any]:
    """All that a run is, as plain tensors, numbers and strings."""
    return {
        "step": step,
        "student": training.student.state_dict(),
        "teacher": None if training.teacher is None else training.teacher.state_dict(),
        "align": None if training.align is None else training.align.state_dict(),
        "optimizer": optimizer.state_dict(),
        "metrics": metrics,
        "config": asdict(config),
        "versions": versions(),
    }


def restore(
    store: CheckpointStore,
    log: RunLog,
    config: Config,
    training: SelfTraining,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, dict[str, Any]]:
    """Go on from the newest whole checkpoint; return its step and the metrics so far."""
    saved = store.load_newest()
    if saved is None:
        print(f"nothing was saved in {store.folder}: starting at step 0", flush=True)
        return 0, new_metrics()
    changed = [name for name, value in asdict(config).items() if name not in FREE and value != saved["config"][name]]
    if changed:
        was = ", ".join(f"{name} {saved['config'][name]!r} is now {getattr(config, name)!r}" for name in changed)
        raise SystemExit(f"cannot resume with other options: {was}; give the old ones, or another --out.")
    training.student.load_state_dict(saved["student"])
    if training.teacher is not None:
        training.teacher.load_state_dict(saved["teacher"])
    if training.align is not None:
        training.align.load_state_dict(saved["align"])
    optimizer.load_state_dict(saved["optimizer"])
    log.cut(saved["step"])
    print(f"resumed at step {saved['step']}", flush=True)
    return int(saved["step"]), saved["metrics"]


FREE = {"device", "workers", "eval_every", "save_every", "log_every"}
"""Options that a resumed run may change: they move no parameter."""


def new_metrics() -> dict[str, Any]:
    """metrics.json before the first evaluation."""
    return {"evaluations": [], "last": None, "best": None}


def refuse_to_overwrite(out: Path, *, resume: bool) -> None:
    """A new run never writes over another one."""
    if not resume and (out / "config.json").exists():
        raise SystemExit(f"{out} holds a run already; go on with --resume, or give another --out.")


def write_report(folder: Path, training: SelfTraining, data: Data, metrics: dict[str, Any], config: Config) -> None:
    """The table, and a gallery: source, target, mixed image, mixed label, then image, prediction, ground truth."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table({config.method: metrics}, config), encoding="utf-8")
    rows = [
        [*mixed, *predicted]
        for mixed, predicted in zip(
            mixed_row(training, data, config), predicted_row(training, data, config), strict=False
        )
    ]
    write_png(folder / "gallery.png", gallery(rows))


@torch.no_grad()
def mixed_row(training: SelfTraining, data: Data, config: Config) -> list[list[Tensor]]:
    """Source, target, mixed image and mixed label of the last step, without moving any state."""
    last = config.steps - 1
    source_images, source_labels = next(crops(data.source, config, SOURCE, last))
    target_images, _ = next(crops(data.target, config, TARGET, last))
    training.eval()
    draw = training.sample(config.batch, generator=keyed_generator(config.seed, STEP, last), device=config.device)
    mixed = training(source_images, source_labels, target_images, draw=draw).mixed
    training.train()
    images, labels = (source_images, source_labels) if mixed is None else (mixed.images, mixed.labels)
    return [
        [source, target, image, colorize(label)]
        for source, target, image, label in zip(source_images, target_images, images, labels, strict=True)
    ]


@torch.no_grad()
def predicted_row(training: SelfTraining, data: Data, config: Config) -> list[list[Tensor]]:
    """Validation image, prediction and ground truth, at the size of a crop."""
    shape = height_and_width(config.crop)
    rows = []
    training.eval()
    for i in range(min(config.batch, len(data.validation))):
        image, label, _ = data.validation[i]
        small = tf.interpolate(image[None], size=shape, mode="bilinear", antialias=True)
        prediction = training.student(small.to(config.device).float() / 255)[0].argmax(0)
        truth = (
            tf.interpolate(label[None, None], size=shape, mode="nearest-exact")[0, 0]
            if label is not None
            else prediction
        )
        rows.append([small[0], colorize(prediction), colorize(truth)])
    training.train()
    return rows


def table(results: dict[str, dict[str, Any]], config: Config) -> str:
    """Per-class IoU of each method's last step, in percent, beside the paper's mean."""
    header = ["class", *results]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * len(results) + "|"]
    entries = [metrics["last"]["student"][config.evaluation] for metrics in results.values()]
    for name in CLASS_NAMES:
        values = [entry["per_class"][name] for entry in entries]
        cells = ["-" if value is None else f"{100 * value:.2f}" for value in values]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    means = [f"{100 * entry['miou']:.2f}" for entry in entries]
    lines.append("| " + " | ".join(["mIoU", *means]) + " |")
    if config.network == "resnet101":
        paper = [f"{PAPER_MIOU[method]:.2f}" for method in results]
        lines.append("| " + " | ".join(["mIoU in the paper", *paper]) + " |")
    return "\n".join(lines) + "\n"


class Progress:
    """A bar on a terminal, a line per interval in a file."""

    def __init__(self, config: Config, start: int) -> None:
        self.config = config
        self.bar = None
        if tqdm is not None and sys.stderr.isatty():
            self.bar = tqdm(total=config.steps, initial=start, desc=config.method, unit="it")
        self.mark = (start, time.perf_counter())
        self.waited = 0.0

    def waiting(self) -> "Waiting":
        """Time the data takes, for `with`."""
        return Waiting(self)

    def record(self, done: int, lr: float, output: SelfTrainingOutput) -> dict[str, Any]:
        """One object for log.jsonl: this is where the host waits for the device."""
        step, then = self.mark
        now = time.perf_counter()
        speed = (done - step) / (now - then)
        record = {
            "step": done,
            "loss": output.loss.item(),
            "source_loss": output.source_loss.item(),
            "mixed_loss": output.mixed_loss.item(),
            "lr": lr,
            "it_per_s": round(speed, 3),
            "data_wait": round(self.waited / (now - then), 3),
        }
        if output.confidence is not None:
            record["confident"] = float((output.confidence >= self.config.threshold).float().mean())
        line = " ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
        left = (self.config.steps - done) / speed
        self.say(f"step {done}/{self.config.steps} {line} left {left:.0f} s", quiet=self.bar is not None)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{record['loss']:.3f}", mixed=f"{record['mixed_loss']:.3f}")
            self.bar.update(done - step)
        self.mark, self.waited = (done, now), 0.0
        return record

    def say(self, text: str, *, quiet: bool = False) -> None:
        """A line for people."""
        if not quiet:
            print(text, flush=True) if self.bar is None else self.bar.write(text)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()


class Waiting:
    """Adds the time spent inside to a `Progress`."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.progress.waited += time.perf_counter() - self.start


# ------------------------------------------------------------------------------------------------------ command line


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line: what is about the command itself, and the options that were given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--demo", action="store_true", help="render a small pair of domains and train on it")
    parser.add_argument("--out", help="folder of the run (default: runs/<time>-<method>)")
    parser.add_argument("--resume", action="store_true", help="go on where the run in --out stopped")
    parser.add_argument("--config", help="options from a JSON file, such as a run's own config.json")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved options and stop")
    parser.add_argument("--random-init", action="store_true", help="start from random weights, without --weights")
    for field in fields(Config):
        flag = "--" + field.name.replace("_", "-")
        if field.type == "bool" or field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        else:
            kind = field.type if field.type in {int, float} else str
            parser.add_argument(flag, type=kind, choices=CHOICES.get(field.name), default=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = {field.name for field in fields(Config)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if not args.demo and args.config is None:
        for name in ("gta5", "cityscapes"):
            if name not in given:
                parser.error(f"--{name} DIR is needed, or --demo")
        if ("weights" in given) == args.random_init:
            parser.error("give either --weights FILE or --random-init")
    return args, given


def resolve(given: dict[str, Any], *, demo: bool, file: str | None) -> Config:
    """Flags over file over recipe over defaults."""
    from_file = {}
    if file is not None:
        from_file = json.loads(Path(file).read_text(encoding="utf-8"))
        from_file.pop("versions", None)
        unknown = sorted(from_file.keys() - {field.name for field in fields(Config)})
        if unknown:
            raise SystemExit(f"{file}: unknown option {unknown[0]!r}; --help lists them.")
    chosen = {**from_file, **given}
    options: dict[str, Any] = PAPER_OPTIONS if chosen.get("recipe") == "paper" else {}
    if demo:
        options = {**options, **DEMO_OPTIONS}
    config = Config(**{**options, **chosen})
    if config.evaluation not in (names := [size_name(scored) for scored in label_sizes(config)]):
        raise SystemExit(
            f"--evaluation must be one of the scored sizes, {' or '.join(names)}, got {config.evaluation!r}."
        )
    return config


def with_rendered_data(config: Config, root: Path) -> Config:
    """Render the demo's two domains into the folder layouts of GTA5 and Cityscapes, once."""
    gta5, cityscapes = root / "gta5", root / "cityscapes"
    if not (root / "complete").exists():
        print(f"rendering StreetScenes into {root}", flush=True)
        StreetScenes(400, domain="source", seed=0).write(gta5, layout="gta5")
        StreetScenes(400, domain="target", seed=1).write(cityscapes, layout="cityscapes", split="train")
        StreetScenes(100, domain="target", seed=2).write(cityscapes, layout="cityscapes", split="val")
        (root / "complete").touch()
    return replace(config, gta5=str(gta5), cityscapes=str(cityscapes))


def size(text: str) -> tuple[int, int] | None:
    """'512x1024' as (512, 1024), '512' as a square, 'native' as None."""
    return None if text == "native" else height_and_width(text)


def size_name(value: tuple[int, int] | None) -> str:
    """The reverse: what metrics.json calls it."""
    return "native" if value is None else f"{value[0]}x{value[1]}"


def height_and_width(text: str) -> tuple[int, int]:
    """'512x1024' as (512, 1024), '512' as a square."""
    height, _, width = text.partition("x")
    try:
        return int(height), int(width or height)
    except ValueError:
        raise SystemExit(f"expected a size such as 512x1024 or 512, got {text!r}.") from None


def versions() -> dict[str, str]:
    """What a number depends on."""
    return {"crossmix": crossmix.__version__, "torch": str(torch.__version__)}


def write_json(path: Path, value: object) -> None:
    """Write aside, then rename: a reader never sees half a file."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
