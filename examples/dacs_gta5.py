"""Train DeepLab-v2 from GTA5 or SYNTHIA to Cityscapes by DACS, as the paper does, or by a method it compares with.

    python examples/dacs_gta5.py --demo                                        minutes on a laptop
    python examples/dacs_gta5.py --gta5 DIR --cityscapes DIR --weights FILE    the paper's main row
    python examples/dacs_gta5.py --synthia DIR --cityscapes DIR ...            its Table 2
    torchrun --nproc_per_node 4 examples/dacs_gta5.py ...                      several GPUs
    python examples/dacs_gta5.py ... --out runs/dacs --resume                  go on where a run stopped

The demo renders a small pair of domains (`crossmix.datasets.StreetScenes`), writes it to disk in the folder layouts of
GTA5 and Cityscapes, trains a small DeepLab-v2 from scratch on the source alone and by DACS, and prints both rows.

OUT holds config.json (every option as it was), log.jsonl (one object per logged step), metrics.json (every evaluation),
checkpoints/ and report/. Data and randomness are a pure function of (seed, step), so a resumed run equals one that
never stopped, bit for bit on a CPU with as many threads. SIGTERM and Ctrl-C finish the step, save, and exit with 0.

DACS: Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702
"""

import argparse
import difflib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import crossmix
from crossmix import SelfTraining, SelfTrainingOutput, recipes
from crossmix.datasets import GTA5, CachedSamples, Cityscapes, DataError, StreetScenes, Synthia, class_counts, write_png
from crossmix.datasets.classes import CLASS_NAMES
from crossmix.engine import (
    BusyError,
    CheckpointError,
    CheckpointStore,
    FiniteGuard,
    FolderLock,
    KeyedCrops,
    NonFiniteError,
    Progress,
    RunLog,
    StopRequest,
    keyed_generator,
    resident,
)
from crossmix.evaluation import evaluate
from crossmix.models import DeepLabV2, WeightsError, deeplab_v2_resnet101, deeplab_v2_tiny, load_weights
from crossmix.optim import RepeatedSGD, parameter_groups, poly_lr
from crossmix.visualize import gallery
from evaluate import summary
from pages import comparison_page, run_page
from reporting import first, mixed_rows, predicted_rows, table, write_events, write_pictures

NUM_CLASSES = len(CLASS_NAMES)
Batch = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # source and target, each images and labels
SOURCE, TARGET, STEP = 0, 1, 2  # streams of randomness, next to the seed


@dataclass(frozen=True)
class Config:
    """Every option of a run, resolved: flags over --config file over recipe over these defaults."""

    method: recipes.Method = "dacs"  # a row of the paper's Table 3
    recipe: str = "released"  # sets the options of the third block
    gta5: str = ""  # folder with images/ and labels/
    synthia: str = ""  # folder with RGB/ and GT/LABELS/, in place of gta5
    cityscapes: str = ""  # folder with leftImg8bit/ and gtFine/
    eval_split: str = "val"
    weights: str = ""  # initialisation: a file or URL; the head may be another one
    network: str = "resnet101"
    prior: str = "oracle"  # of method alignment
    crop: str = "512x512"  # H x W, pixels
    batch: int = 2  # source images, and as many target images, of each process
    accumulate: int = 1  # batches whose gradients are averaged for one step
    steps: int = 250_000
    lr: float = 2.5e-4  # of the backbone; the head learns ten times as fast
    weight_decay: float = 5e-4
    momentum: float = 0.9
    power: float = 0.9  # of the polynomial decay
    target_size: str = "512x1024"  # Cityscapes images are resized to this, for training and for evaluation
    seed: int = 0

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    precision: str = "fp32"
    compile: bool = False  # student and teacher by torch.compile
    channels_last: bool = False
    deterministic: bool = False  # on a GPU too, and slower
    workers: int = min(4, os.cpu_count() or 1)  # processes per data set
    cache: str = ""  # folder for decoded and resized images, made when first used
    resident: bool = False  # keep both data sets in the device's memory
    skip_files: int = 0  # broken files that are left out before one is an error
    skip_steps: int = 0  # steps with a loss or gradient that is not finite that are undone before one is an error
    eval_every: int = 5000  # steps
    save_every: int = 5000  # steps
    log_every: int = 100  # steps
    tensorboard: bool = False  # write event files too

    weigh: str = recipes.RELEASED.weigh
    scope: str = recipes.RELEASED.scope
    source_normalizer: str = recipes.RELEASED.source_normalizer
    include_ignored: bool = recipes.RELEASED.include_ignored
    threshold: float = recipes.RELEASED.threshold  # a pixel counts for lambda from this confidence on
    decay: float = recipes.RELEASED.decay  # share of the teacher that a step keeps
    mode: str = recipes.RELEASED.mode  # of the teacher's BatchNorm
    flavor: str = recipes.RELEASED.flavor
    same_on_batch: bool = recipes.RELEASED.same_on_batch
    aspp_branches: int = 2
    nesterov: bool = False
    repeated: bool = True  # update each backbone parameter as often as the released code lists it
    source_size: str = "720x1280"  # source images are resized to this
    evaluation: str = "512x1024"  # the label size that decides the best step; both are always reported


FREE = {
    "device", "workers", "cache", "resident", "eval_every", "save_every", "log_every", "tensorboard", "compile",
    "channels_last", "deterministic", "batch",
}  # fmt: skip
"""Options that a resumed run may change: they choose no data and no arithmetic. (The batch of all processes together is
compared apart.)"""

CHOICES = {
    "method": recipes.METHODS,
    "recipe": ("released", "paper"),
    "prior": ("oracle", "source"),
    "network": ("resnet101", "tiny"),
    "precision": ("fp32", "tf32", "bf16", "fp16"),
    "aspp_branches": (2, 4),
}

PAPER_OPTIONS = {
    **asdict(recipes.PAPER),
    "aspp_branches": 4,
    "nesterov": True,
    "repeated": False,
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
    "steps": 1700,
    "lr": 0.002,
    "threshold": 0.5,
    "repeated": False,
    "decay": 0.9,
    "workers": 0,
    "channels_last": True,  # a sixth faster on a CPU
    "eval_every": 850,
    "save_every": 850,
    "log_every": 50,
}


class Ranks(NamedTuple):
    """The processes of a run."""

    rank: int = 0
    world: int = 1
    control: dist.ProcessGroup | None = None  # for what is decided on the host

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0


class Data(NamedTuple):
    """Source, unlabelled target, and labelled validation images at their own size."""

    source: GTA5 | Synthia
    target: Cityscapes
    validation: Cityscapes


class Run(NamedTuple):
    """All that one training works with."""

    config: Config
    ranks: Ranks
    data: Data
    student: DeepLabV2
    training: SelfTraining
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler


class Stopped(Exception):  # noqa: N818 - it is none
    """A signal ended the run after this many steps, which are saved."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args, given = parse(argv)
    config = resolve(given, demo=args.demo, file=args.config)
    if args.dry_run:
        print(json.dumps({"options": asdict(config), "plan": plan(config)}, indent=2))
        return 0
    out = Path(args.out or time.strftime(f"runs/%Y%m%d-%H%M%S-{'demo' if args.demo else config.method}"))
    with ExitStack() as stack:
        ranks = start_ranks(config, stack)
        stop = stack.enter_context(StopRequest(ranks.control))
        try:
            if ranks.first:
                stack.enter_context(FolderLock(out))
            if args.demo:
                config = with_rendered_data(config, out / "data")
            results: dict[str, list[dict[str, Any]]] = {}
            folders: dict[str, list[Path]] = {}
            for one, folder in trainings(config, out, args, given):
                if ranks.first:
                    print(
                        f"{one.method}, seed {one.seed}: {one.steps} steps on {one.device}, into {folder}", flush=True
                    )
                results.setdefault(one.method, []).append(train(one, folder, ranks, stop, resume=args.resume))
                folders.setdefault(one.method, []).append(folder)
            if ranks.first:
                conclude(results, folders, config, out / "report")
        except Stopped as stopped:
            if ranks.first:
                print(
                    f"stopped after step {stopped}, which is saved; the same command with --resume --out {out} goes on"
                )
        except (DataError, WeightsError, NonFiniteError, BusyError, CheckpointError, OSError) as error:
            raise SystemExit(f"error: {error}") from error
    return 0


def trainings(
    config: Config, out: Path, args: argparse.Namespace, given: dict[str, Any]
) -> Iterator[tuple[Config, Path]]:
    """Every seed and method that was asked for, with its folder."""
    methods: Sequence[recipes.Method] = ("source", "dacs") if args.demo and "method" not in given else (config.method,)
    for seed in range(config.seed, config.seed + args.runs):
        for method in methods:
            folder = out / f"seed-{seed}" if args.runs > 1 else out
            yield replace(config, method=method, seed=seed), folder / method if len(methods) > 1 else folder


# ---------------------------------------------------------------------------------------------------- the algorithm


def train(config: Config, out: Path, ranks: Ranks, stop: StopRequest, *, resume: bool = False) -> dict[str, Any]:
    """Train one method; return what metrics.json holds."""
    set_up_arithmetic(config)
    run = build(config, ranks)
    store, log = CheckpointStore(out / "checkpoints"), RunLog(out / "log.jsonl")
    start, metrics = restore(run, store, log) if resume else (0, new_metrics())
    begin_folder(out, config, ranks, fresh=not resume)
    guard = FiniteGuard(run.training.children(), run.optimizer, skip=config.skip_steps)
    progress = Progress(config.steps, start=start, title=config.method, shown=ranks.first)
    batches = zip(crops(run, SOURCE, start), crops(run, TARGET, start), strict=True)
    for step in range(start, config.steps):
        for group in run.optimizer.param_groups:
            group["lr"] = poly_lr(step, config.steps, group["initial_lr"], power=config.power)
        try:
            output = train_step(run, guard, batches, step, progress)
        except NonFiniteError as error:
            raise NonFiniteError(
                error.step, f"{error} Its samples: {', '.join(sample_names(run, error.step))}."
            ) from error

        done, stopping = step + 1, stop.agreed()
        last = done == config.steps
        if done % config.log_every == 0 or last:
            log_step(run, log, done, output, progress)
        if evaluated := done % config.eval_every == 0 or last:
            add_evaluation(run, metrics, done)
            progress.say(f"step {done}: student mIoU {100 * miou(metrics['last'], config):.2f} %")
        best = evaluated and metrics["best"]["step"] == done
        if ranks.first and (best or last or stopping or done % config.save_every == 0):
            store.save(done, state(run, done, metrics), best=best)
        if ranks.first and (evaluated or stopping):
            write_json(out / "metrics.json", metrics)
        if stopping and not last:
            progress.close()
            raise Stopped(done)
    progress.close()
    if ranks.first:
        write_report(run, out, metrics, log.read())
    return metrics


def train_step(
    run: Run, guard: FiniteGuard, batches: Iterator[Batch], step: int, progress: Progress
) -> SelfTrainingOutput:
    """One iteration of Algorithm 1, on the rows of the whole batch that are this process's."""
    config, ranks, _, student, training, optimizer, scaler = run
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for part in range(step * config.accumulate, (step + 1) * config.accumulate):
        with progress.waiting():
            (source_images, source_labels), (target_images, _) = next(batches)
        generator = keyed_generator(config.seed, STEP, part)
        draw = training.sample(config.batch * ranks.world, generator=generator, device=config.device)
        if training.align is not None and config.prior == "source":
            training.align.update_prior(source_labels)
        with autocast(config):
            output: SelfTrainingOutput = training(
                source_images, source_labels, target_images, draw=draw.rows(own_rows(config, ranks))
            )
        scaler.scale(output.loss / config.accumulate).backward()  # type: ignore[no-untyped-call]
        losses.append(output.loss.detach())
    guard.check(torch.stack(losses).sum(), step, gradients=not scaler.is_enabled())
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    share_buffers(student, ranks)
    if scaler.get_scale() >= scale:  # otherwise the scaler left the step out
        training.update()
    guard.restore()
    return output


# ------------------------------------------------------------------------------------------------------------- parts


def build(config: Config, ranks: Ranks) -> Run:
    """Everything that a run works with, from its options alone."""
    torch.manual_seed(config.seed)  # the network's initial weights; all else is keyed
    data = read_data(config, ranks)
    student = build_network(config, ranks)
    training = build_training(student, config, ranks)
    scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.precision == "fp16")
    return Run(config, ranks, data, student, training, build_optimizer(student, config), scaler)


def own_rows(config: Config, ranks: Ranks) -> slice:
    """Which images of the batch of all processes are this one's."""
    return slice(config.batch * ranks.rank, config.batch * (ranks.rank + 1))


def start_ranks(config: Config, stack: ExitStack) -> Ranks:
    """Join the other processes, where torchrun has started this one."""
    check_device(config.device)
    if "RANK" not in os.environ:
        return Ranks()
    on_gpu = config.device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    stack.callback(dist.destroy_process_group)
    control = dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD
    return Ranks(dist.get_rank(), dist.get_world_size(), control)


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(
            f"--device {device} cannot be used: {str(error).splitlines()[0]}; try --device cpu."
        ) from error


def set_up_arithmetic(config: Config) -> None:
    """How exact float32 products are on a GPU, and whether every run gives the same bits there."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA's matrix products ask for
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    torch.backends.cudnn.benchmark = config.device.startswith("cuda") and not config.deterministic


def autocast(config: Config) -> torch.autocast:
    """Half precision where asked; softmax, losses and averages are in float32 all the same."""
    dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(config.device).type, dtype, enabled=config.precision in {"bf16", "fp16"})


def build_network(config: Config, ranks: Ranks) -> DeepLabV2:
    """DeepLab-v2, from the given weights or from random ones."""
    build = deeplab_v2_resnet101 if config.network == "resnet101" else deeplab_v2_tiny
    network = build(NUM_CLASSES, aspp_branches=config.aspp_branches, upsample=False)  # the loss does it, in blocks
    if config.weights:
        report = load_weights(network, config.weights, strict=False)  # COCO and ImageNet files have another head
        if ranks.first:
            taken, other = len(report.matched), len(report.mismatched)
            print(f"{config.weights}: {taken} tensors taken, {other} of another shape", flush=True)
    if config.device.startswith("cuda") and ranks.world > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return network.to(config.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]


def build_training(student: DeepLabV2, config: Config, ranks: Ranks) -> SelfTraining:
    """The method in the recipe, with every switch where the configuration has it."""
    prior = None
    if config.method == "alignment" and config.prior == "oracle":
        counts = class_counts(Cityscapes(config.cityscapes, "train", images=False), workers=config.workers)
        prior = counts.sum(0)[:NUM_CLASSES].double()
    training = recipes.self_training(
        student,
        NUM_CLASSES,
        method=config.method,
        recipe=recipes.Recipe(**{field.name: getattr(config, field.name) for field in fields(recipes.Recipe)}),
        prior=prior,
        sync=ranks.world > 1,
        upsample=True,
    )
    if config.compile:
        student.compile()
        if training.teacher is not None:
            training.teacher.module.compile()
    if ranks.world > 1:  # two of four branches get no gradient; buffers are shared after the step
        training.student = DistributedDataParallel(
            student, broadcast_buffers=False, find_unused_parameters=config.aspp_branches < 4
        )
    return training.to(config.device).train()


def share_buffers(student: nn.Module, ranks: Ranks) -> None:
    """BatchNorm's running statistics of the first process for all; on GPUs they are equal already."""
    buffers = [buffer for buffer in student.buffers() if buffer.is_floating_point()]
    if ranks.world > 1 and buffers:
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(flat, 0)
        shared = torch.split(flat, [buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(shared, buffers, strict=True)])


def build_optimizer(student: DeepLabV2, config: Config) -> torch.optim.SGD:
    """SGD with ten times the learning rate in the head, and the released code's repeated updates where asked."""
    optimizer = RepeatedSGD if config.repeated else torch.optim.SGD
    return optimizer(
        parameter_groups(student, config.lr, repeated=config.repeated),
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


# -------------------------------------------------------------------------------------------------------------- data


def open_data(config: Config) -> Data:
    """Open the folders."""
    source = size(config.source_size)
    return Data(
        source=Synthia(config.synthia, size=source) if config.synthia else GTA5(config.gta5, size=source),
        target=Cityscapes(config.cityscapes, "train", size=size(config.target_size), labels=False),
        validation=Cityscapes(config.cityscapes, config.eval_split),
    )


def read_data(config: Config, ranks: Ranks) -> Data:
    """Open the folders and look at the first image of each, before anything else can fail."""
    data = open_data(config)
    height, width = height_and_width(config.crop)
    whole = config.batch * ranks.world
    for name, samples in (("source", data.source), ("target", data.target)):
        if len(samples) < whole:
            raise SystemExit(f"error: the {name} has {len(samples)} images, fewer than the {whole} of a batch.")
        image = samples[0].image
        if image.shape[1] < height or image.shape[2] < width:
            raise SystemExit(
                f"error: --crop {config.crop} is larger than the {name} images, {image.shape[1]}x{image.shape[2]}; "
                f"crop smaller, or give a larger --{name}-size."
            )
    return data


class Draws:
    """Numbers of the draws of one process: its rows of each batch, from a step on, to the end."""

    def __init__(self, config: Config, start: int, ranks: Ranks) -> None:
        self.batch = config.batch
        self.every = config.batch * ranks.world
        self.first = config.batch * ranks.rank
        self.parts = range(start * config.accumulate, config.steps * config.accumulate)

    def __len__(self) -> int:
        return self.batch * len(self.parts)

    def __iter__(self) -> Iterator[int]:
        for part in self.parts:
            begin = part * self.every + self.first
            yield from range(begin, begin + self.batch)


def crops(run: Run, stream: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of crops on the device, images in [0, 1], from a step on."""
    config = run.config
    samples: Any = run.data.source if stream == SOURCE else run.data.target
    if config.cache:
        folder = Path(config.cache) / ("source" if stream == SOURCE else "target")
        samples = CachedSamples(samples, folder, workers=config.workers, progress=run.ranks.first)
    if config.resident:
        samples = resident(samples, config.device)
    loader = DataLoader(
        KeyedCrops(
            samples,
            height_and_width(config.crop),
            seed=config.seed,
            stream=stream,
            skip=config.skip_files,
        ),
        batch_size=config.batch,
        sampler=Draws(config, start, run.ranks),
        num_workers=0 if config.resident else config.workers,
        pin_memory=config.device.startswith("cuda") and not config.resident,
        generator=torch.Generator(),  # or each loader would draw from the global one
    )
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    for images, labels in loader:
        on_device = images.to(config.device, non_blocking=True).float() / 255
        yield on_device.contiguous(memory_format=layout), labels.to(config.device, non_blocking=True)


def sample_names(run: Run, step: int) -> list[str]:
    """What a step trains on, by all processes."""
    draws = range(step * whole_batch(run), (step + 1) * whole_batch(run))
    names = []
    for stream, samples in ((SOURCE, run.data.source), (TARGET, run.data.target)):
        keyed = KeyedCrops(samples, (1, 1), seed=run.config.seed, stream=stream)
        names += [samples.files[keyed.index(draw)].name for draw in draws]
    return names


# -------------------------------------------------------------------------------------------------------- evaluation


def add_evaluation(run: Run, metrics: dict[str, Any], step: int) -> None:
    """Evaluate student and teacher on all of the validation images, and keep last and best apart."""
    entry: dict[str, Any] = {"step": step, "student": scores(run, run.student)}
    if run.training.teacher is not None:
        entry["teacher"] = scores(run, run.training.teacher.module)
    metrics["evaluations"].append(entry)
    metrics["last"] = entry
    if metrics["best"] is None or miou(entry, run.config) > miou(metrics["best"], run.config):
        metrics["best"] = entry


def scores(run: Run, network: nn.Module) -> dict[str, Any]:
    """Scores at half and at full resolution, or at the images' own in the demo."""
    config = run.config
    matrices = evaluate(
        network,
        run.data.validation,
        num_classes=NUM_CLASSES,
        image_size=size(config.target_size),
        label_sizes=label_sizes(config),
        forward=network.forward_features,  # type: ignore[arg-type]
        device=config.device,
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision),
        workers=config.workers,
        sync=run.ranks.world > 1,
    )
    return {key: summary(matrix) for key, matrix in matrices.items()}


def label_sizes(config: Config) -> list[tuple[int, int] | None]:
    """The sizes that labels are scored at: that of the images and twice it, or their own."""
    image_size = size(config.target_size)
    return [None] if image_size is None else [image_size, (2 * image_size[0], 2 * image_size[1])]


def miou(entry: dict[str, Any], config: Config) -> float:
    """The student's mean IoU at the size that decides, over the classes that the source has."""
    value = entry["student"][config.evaluation][mean_of(config)]
    return -math.inf if value is None else float(value)


def mean_of(config: Config) -> str:
    """Which mean decides: SYNTHIA labels 16 of the classes."""
    return "miou_16" if config.synthia else "miou"


# ------------------------------------------------------------------------------------------- checkpoints, log, report


def state(run: Run, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """All that a run is, as plain tensors, numbers and strings."""
    teacher, align = run.training.teacher, run.training.align
    return {
        "step": step,
        "student": run.student.state_dict(),
        "teacher": None if teacher is None else teacher.state_dict(),
        "align": None if align is None else align.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "metrics": metrics,
        "config": asdict(run.config),
        "whole_batch": whole_batch(run),
        "versions": versions(),
    }


def restore(run: Run, store: CheckpointStore, log: RunLog) -> tuple[int, dict[str, Any]]:
    """Go on from the newest whole checkpoint; return its step and the metrics so far."""
    saved = store.load_newest()
    if saved is None:
        if run.ranks.first:
            print(f"nothing was saved in {store.folder}: starting at step 0", flush=True)
            log.cut(0)
        return 0, new_metrics()
    refuse_other_options(run, saved)
    run.student.load_state_dict(saved["student"])
    for name, module in (("teacher", run.training.teacher), ("align", run.training.align)):
        if module is not None:
            module.load_state_dict(saved[name])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scaler.load_state_dict(saved["scaler"])
    if run.ranks.first:
        log.cut(saved["step"])
        print(f"resumed at step {saved['step']}", flush=True)
    return int(saved["step"]), saved["metrics"]


def refuse_other_options(run: Run, saved: dict[str, Any]) -> None:
    """A resumed run is the same run."""
    old, new = saved["config"], asdict(run.config)
    changed = [f"{name} {old.get(name)!r} is now {new[name]!r}" for name in sorted(new.keys() - FREE)
               if new[name] != old.get(name)]  # fmt: skip
    if whole_batch(run) != saved["whole_batch"]:
        changed.append(f"the batch of all processes {saved['whole_batch']} is now {whole_batch(run)}")
    if changed:
        raise SystemExit(
            f"cannot resume with other options: {', '.join(changed)}; give the old ones, or another --out."
        )


def whole_batch(run: Run) -> int:
    """Source images of one step."""
    return run.config.batch * run.config.accumulate * run.ranks.world


def new_metrics() -> dict[str, Any]:
    """metrics.json before the first evaluation."""
    return {"evaluations": [], "last": None, "best": None}


def begin_folder(out: Path, config: Config, ranks: Ranks, *, fresh: bool) -> None:
    """Make the folder and write the options; a new run never writes over another one."""
    if fresh and (out / "config.json").exists():
        raise SystemExit(f"{out} holds a run already; go on with --resume, or give another --out.")
    if ranks.world > 1:
        dist.barrier(ranks.control)  # everybody has looked before anybody writes
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "config.json", {**asdict(config), "versions": versions()})


def log_step(run: Run, log: RunLog, done: int, output: SelfTrainingOutput, progress: Progress) -> None:
    """One object for log.jsonl, and a line for people: this is where the host waits for the device."""
    record = {
        "step": done,
        "loss": output.loss.item(),
        "source_loss": output.source_loss.item(),
        "mixed_loss": output.mixed_loss.item(),
        "lr": run.optimizer.param_groups[0]["lr"],
    }
    if output.confidence is not None and output.mixed is not None:
        record["confident"] = float((output.confidence >= run.config.threshold).float().mean())
        target = torch.logical_not(output.mixed.mask)
        record["lambda"] = float((output.mixed.weights * target).sum() / target.sum().clamp(min=1))
    record |= progress.measured(done)
    if run.ranks.first:
        log.write(record)
        progress.show(record)


def write_report(run: Run, out: Path, metrics: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """A page, and its parts: the table, and source, target, mixed image, mixed label, then image, prediction, truth."""
    config, folder = run.config, out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", metrics)  # a run that died after its last step has saved them, but not here
    (folder / "table.md").write_text(shown({config.method: [metrics]}, config), encoding="utf-8")
    last = run._replace(config=replace(config, resident=False, workers=0), ranks=Ranks())
    (source_images, source_labels), (target_images, _) = (
        next(crops(last, stream, config.steps - 1)) for stream in (SOURCE, TARGET)
    )
    draw = run.training.sample(
        config.batch, generator=keyed_generator(config.seed, STEP, config.steps - 1), device=config.device
    )
    mixed = mixed_rows(run.training, run.student, (source_images, source_labels, target_images), draw)
    samples = first(run.data.validation, config.batch)
    predicted = predicted_rows(run.student, samples, height_and_width(config.crop), config.device)
    write_png(folder / "gallery.png", gallery([[*m, *p] for m, p in zip(mixed, predicted, strict=False)]))
    write_pictures(folder / "pictures", {"mixed": mixed, "predicted": predicted})
    run_page(out)
    if config.tensorboard:
        write_events(folder, records)


def conclude(
    results: dict[str, list[dict[str, Any]]], folders: dict[str, list[Path]], config: Config, report: Path
) -> None:
    """Print the table of all trainings; of several, write it and a page that compares them."""
    print("\n" + shown(results, config))
    if sum(map(len, folders.values())) > 1:
        comparison_page(folders, report)
        (report / "table.md").write_text(shown(results, config), encoding="utf-8")
    print(f"report: {report / 'index.html'}")


def shown(results: dict[str, list[dict[str, Any]]], config: Config) -> str:
    """The table that people see."""
    source = "synthia" if config.synthia else "gta5"
    return table(results, source=source, evaluation=config.evaluation, beside_paper=config.network == "resnet101")


# ------------------------------------------------------------------------------------------------------ command line


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line: what is about the command itself, and the options that were given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--demo", action="store_true", help="render a small pair of domains and train on it")
    parser.add_argument("--out", help="folder of the run (default: runs/<time>-<method>)")
    parser.add_argument("--resume", action="store_true", help="go on where the run in --out stopped")
    parser.add_argument("--runs", type=int, default=1, help="train so many seeds, report mean and standard deviation")
    parser.add_argument("--config", help="options from a JSON file, such as a run's own config.json")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved options and the plan, and stop")
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
    if args.runs < 1:
        parser.error(f"--runs must be at least 1, got {args.runs}")
    if not args.demo and args.config is None:
        if ("gta5" in given) == ("synthia" in given):
            parser.error("give --gta5 DIR or --synthia DIR, or --demo")
        if "cityscapes" not in given:
            parser.error("--cityscapes DIR is needed, or --demo")
        if ("weights" in given) == args.random_init:
            parser.error(
                "give --weights FILE: the paper starts from weights trained on COCO, and ResNet-101 from random ones "
                "comes nowhere near its numbers; or --random-init, to go on all the same"
            )
    return args, given


def resolve(given: dict[str, Any], *, demo: bool, file: str | None) -> Config:
    """Flags over file over recipe over defaults."""
    from_file: dict[str, Any] = {}
    if file is not None:
        try:
            from_file = json.loads(Path(file).read_text(encoding="utf-8"))
            from_file.pop("versions", None)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise SystemExit(f"{file}: is no JSON object of options ({error}).") from error
        known = [field.name for field in fields(Config)]
        for name in from_file.keys() - set(known):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else "--help lists them."
            raise SystemExit(f"{file}: unknown option {name!r}; {hint}")
    chosen = {**from_file, **given}
    options: dict[str, Any] = PAPER_OPTIONS if chosen.get("recipe") == "paper" else {}
    if chosen.get("synthia"):
        options = {**options, "source_size": "760x1280"}  # its own size
    if demo:
        options = {**options, **DEMO_OPTIONS}
    config = Config(**{**options, **chosen})
    for name in ("batch", "accumulate", "steps", "eval_every", "save_every", "log_every"):
        if getattr(config, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}.")
    if config.evaluation not in (names := [size_name(scored) for scored in label_sizes(config)]):
        raise SystemExit(
            f"--evaluation must be one of the scored sizes, {' or '.join(names)}, got {config.evaluation!r}."
        )
    return config


def plan(config: Config) -> dict[str, Any]:
    """What a run would do, read and need, without doing it."""
    with torch.device("meta"):
        build = deeplab_v2_resnet101 if config.network == "resnet101" else deeplab_v2_tiny
        network = build(NUM_CLASSES, aspp_branches=config.aspp_branches, upsample=False).train()
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # each once, however often it is saved
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(torch.empty(config.batch, 3, *height_and_width(config.crop), device="meta"))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    copies = 2 if config.method == "source" else 3  # student, momentum, teacher
    try:
        data: Any = dict(zip(Data._fields, map(len, open_data(config)), strict=True))
    except DataError as error:
        data = f"not there yet: {error}"
    return {
        "images": data,
        "evaluations": -(-config.steps // config.eval_every),
        "checkpoints_mb": round(3 * copies * weights / 1e6),  # the last two and the best
        "memory_mb_computed_fp32": round(
            ((copies + 3) * weights + 2 * sum(storage.nbytes() for storage in saved.values())) / 1e6
        ),
    }


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
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"crossmix": crossmix.__version__, "torch": str(torch.__version__), "gpu": gpu}


def write_json(path: Path, value: object) -> None:
    """Write aside, then rename: a reader never sees half a file."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
