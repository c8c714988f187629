"""Train DeepLab-v2 from GTA5 or SYNTHIA to Cityscapes with DACS or a method that the paper compares it with.

    python examples/dacs_gta5.py --demo                                        minutes on a laptop
    python examples/dacs_gta5.py --gta5 DIR --cityscapes DIR --weights FILE    the paper's main result
    python examples/dacs_gta5.py --synthia DIR --cityscapes DIR ...            its Table 2
    python examples/dacs_gta5.py --source DIR --target DIR --classes FILE ...  your own images
    python examples/dacs_gta5.py ... --recipe mic                              today's training, see docs/recipes.md
    torchrun --nproc_per_node 2 examples/dacs_gta5.py ... --batch 1            two GPUs, and the paper's batch in total
    python examples/dacs_gta5.py ... --out runs/dacs --resume                  resume a run

The demo renders two small domains (`crossmix.datasets.StreetScenes`), writes them to disk in the folder layouts of GTA5
and Cityscapes, trains a small DeepLab-v2 from scratch, once on the source alone and once with DACS, and compares them.

OUT holds config.json (all options), log.jsonl (one object per logged step), metrics.json (all evaluations), report/ and
checkpoints/: the last two, best.pt, and best_unsupervised.pt, the step chosen without labels. Data and randomness are a
pure function of (seed, step), so a resumed run equals an uninterrupted one, bit for bit on a CPU with the same number
of threads. On SIGTERM or Ctrl-C the trainer finishes the step, saves and exits with 0.

DACS: Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702
"""

from signals import Stopped, end_early, end_undisturbed, ended_by_signals, hear

if __name__ == "__main__":
    end_early()  # the imports take seconds

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, fields, replace
from inspect import signature
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import domains
from crossmix import SelfTraining, SelfTrainingOutput, recipes
from crossmix.datasets import DataError, class_counts
from crossmix.diagnostics import UnsupervisedScores
from crossmix.engine import BusyError, CheckpointError, CheckpointStore, FiniteGuard, FolderLock, NonFiniteError
from crossmix.evaluation import evaluate
from crossmix.models import WeightsError, load_weights
from crossmix.optim import RepeatedSGD, parameter_groups, poly_lr
from networks import AUTOCAST, NetworkError, is_ours, set_float32_products, small_logits
from options import MIXING, Config, Request, label_sizes, read_options, size
from plan import empty_network, has_begun, head_of, plan, problems
from processes import Ranks, expected_ranks, leave, reason, start_ranks
from scores import finite, percent, summary
from training_run import (
    Record,
    Run,
    conclude,
    could_not_load,
    crops,
    drawn_rows,
    finish,
    goes_on,
    keep_scores,
    miou,
    opened,
    recorded,
    save,
    saved_at_any_end,
    seed_network,
    stopped,
)

# DDP's argument for sending buffers before each forward pass: since PyTorch 2.13, and before.
NEW, OLD = "forward_sync_buffers", "broadcast_buffers"
NO_BUFFERS: dict[str, Any] = {NEW if NEW in signature(DistributedDataParallel).parameters else OLD: False}
ERRORS = (DataError, WeightsError, NetworkError, NonFiniteError, BusyError, CheckpointError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    request = read_options(argv, __doc__ or "")
    if request.dry_run:
        if (ranks := expected_ranks()).first:
            planned = plan(request, ranks.world)
            print(json.dumps({"options": asdict(request.config), "plan": planned}, indent=2), flush=True)
            folders = [folder for _, folder in trainings(request, request.out)] if request.out else []
            refuse(problems(request, folders, ranks.world))
        return 0
    with ExitStack() as stack:
        stack.enter_context(ended_by_signals())
        ranks, out = Ranks(), request.out
        try:
            try:
                ranks = start_ranks(request.config.device, stack)
                out = ranks.once(lambda: begin(request, ranks, stack))
                if request.demo:
                    request = request._replace(
                        config=ranks.once(lambda: domains.with_rendered_data(request.config, out / "data"))
                    )
                run_all(request, out, ranks)
                end_undisturbed()  # all is done, and a signal while processes part must not make it a failure
            except RuntimeError as error:
                # A collective fails if a launcher's signal has ended another process first.
                if "RANK" in os.environ and not isinstance(error, ERRORS):
                    print(f"{type(error).__name__}: {error}", file=sys.stderr)
                    hear()
                raise
        except Stopped as stop:
            end_undisturbed()
            begun = out is not None and any(has_begun(folder) for _, folder in trainings(request, out))
            how = f"the same command with --resume --out {out} continues" if begun else "nothing was trained yet"
            if ranks.first:
                print(f"stopped{stop}; {how}")
        except ERRORS as error:
            end_undisturbed()
            raise SystemExit(f"error: {reason(error)}") from error
    return 0


def begin(request: Request, ranks: Ranks, stack: ExitStack) -> Path:
    """Check for anything that would stop the run, then lock its folder until the stack is closed."""
    folders = [folder for _, folder in trainings(request, request.out)] if request.out else []
    refuse(problems(request, folders, ranks.world))
    out = request.out or new_folder("demo" if request.demo else request.config.method)
    stack.enter_context(FolderLock(out))
    return out


def refuse(found: list[str]) -> None:
    """Exit with the problems, if any."""
    if found:
        raise SystemExit("\n".join(f"error: {problem}" for problem in found))


def new_folder(title: str) -> Path:
    """Create a folder of its own, even for jobs that start in the same second."""
    name = time.strftime(f"%Y%m%d-%H%M%S-{title}")
    for number in count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def trainings(request: Request, out: Path) -> Iterator[tuple[Config, Path]]:
    """List the requested seeds and methods, each with its folder."""
    for seed in range(request.config.seed, request.config.seed + request.runs):
        for method in request.methods:
            folder = out / f"seed-{seed}" if request.runs > 1 else out
            yield (
                replace(request.config, method=method, seed=seed),
                folder / method if len(request.methods) > 1 else folder,
            )


def run_all(request: Request, out: Path, ranks: Ranks) -> None:
    """Train all that was requested and compare the results."""
    results: dict[str, list[dict[str, Any]]] = {}
    folders: dict[str, list[Path]] = {}
    for config, folder in trainings(request, out):
        if ranks.first:
            print(f"{config.method}, seed {config.seed}: {steps(config, ranks)}, into {folder}", flush=True)
        results.setdefault(config.method, []).append(train(config, folder, out, ranks, resume=request.resume))
        folders.setdefault(config.method, []).append(folder)
    if ranks.first:
        conclude(results, folders, request.config, out / "report")


def steps(config: Config, ranks: Ranks) -> str:
    """Describe the steps of a training, with the batch where `--batch` is only a part of it."""
    text, whole = f"{config.steps} steps on {config.device}", domains.whole_batch(config, ranks.world)
    if whole == config.batch:
        return text
    made_of = f"{ranks.world} processes x --batch {config.batch} x --accumulate {config.accumulate}"
    return f"{text} of {whole} source and {whole} target images ({made_of})"


# ---------------------------------------------------------------------------------------------------- the algorithm


def train(config: Config, folder: Path, out: Path, ranks: Ranks, *, resume: bool = False) -> dict[str, Any]:
    """Train with one method and seed; return the contents of metrics.json."""
    set_up_arithmetic(config)
    run = build(config, folder, out, ranks, resume=resume)
    batches = zip(crops(run, domains.SOURCE, run.done), crops(run, domains.TARGET, run.done), strict=True)
    with run.stop, recorded(run) as record, saved_at_any_end(run):
        evaluate_if_due(run, record)  # in case the last run ended before it could
        while run.done < config.steps:
            for group in run.optimizer.param_groups:
                group["lr"] = poly_lr(
                    run.done, config.steps, group["initial_lr"], power=config.power, warmup=config.warmup
                )
            parts = fetch(run, batches, record)
            run.whole = False
            output = train_step(run, parts)
            run.whole, run.done = True, run.done + 1
            if run.due(config.log_every):
                record.step(run, output)
            if run.due(config.save_every) or run.due(config.eval_every):
                save(run)
            evaluate_if_due(run, record)
        if run.stop.agreed():
            raise stopped(run)
    finish(run)
    return run.metrics


def train_step(run: Run, parts: list[domains.Batch]) -> SelfTrainingOutput:
    """Run one iteration of Algorithm 1 on this process's rows of the whole batch.

    With `--accumulate`, the output that is returned is that of the last part.
    """
    config, training, scaler = run.config, run.training, run.scaler
    run.optimizer.zero_grad(set_to_none=True)
    seed_network(run)
    losses = []
    for number, batch in enumerate(parts, run.done * config.accumulate):
        (source_images, source_labels), (target_images, target_labels) = batch
        if training.align is not None and config.prior == "source":
            training.align.update_prior(source_labels)
        with autocast(config):
            output: SelfTrainingOutput = training(
                source_images, source_labels, target_images,
                target_weights=(target_labels != 255).float() if config.pad else None,
                draw=drawn_rows(run, number),
            )  # fmt: skip
        scaler.scale(output.loss / config.accumulate).backward()  # type: ignore[no-untyped-call]
        losses.append(output.loss.detach())
    run.guard.check(torch.stack(losses).sum(), run.done, gradients=not scaler.is_enabled())
    scale = scaler.get_scale()
    scaler.step(run.optimizer)
    scaler.update()
    share_buffers(run.student, run.ranks)
    if scaler.get_scale() >= scale:
        training.update()
    else:  # the scaler skipped the step, as it does until it has found its scale
        run.metrics["overflowed_steps"] = run.metrics.get("overflowed_steps", 0) + 1
    run.guard.restore()
    return output


def fetch(run: Run, batches: Iterator[domains.Batch], record: Record) -> list[domains.Batch]:
    """Load the batches of the next step; if a process was asked to stop or cannot load its own, save and stop."""
    parts, failure = [], None
    try:
        with record.progress.waiting():
            parts = [next(batches) for _ in range(run.config.accumulate)]
    except (ValueError, OSError, RuntimeError) as error:
        failure = None if run.stop.requested else error  # the signal may have ended a worker too
        run.stop.requested = True
    if not run.stop.agreed():
        return parts
    if run.done > run.saved:
        save(run)
    raise stopped(run) if failure is None else could_not_load(run, failure) from failure


# ------------------------------------------------------------------------------------------------------------- parts


def build(config: Config, folder: Path, out: Path, ranks: Ranks, *, resume: bool) -> Run:
    """Build a run from its options, and restore its newest checkpoint when resuming."""
    torch.manual_seed(config.seed)  # for the initial weights; everything else is keyed by the step
    data, classes = domains.open_data(config), domains.class_names(config)
    rare = ranks.once(lambda: domains.rare_class_sampler(config, data, out)) if config.rare_classes else None
    saved = CheckpointStore(folder / "checkpoints").load_newest() if resume else None
    student = build_network(config, ranks, fresh=saved is None)
    training = build_training(student, config, ranks, fresh=saved is None)
    scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.precision == "fp16")
    optimizer = build_optimizer(student, config)
    guard = FiniteGuard(training.children(), optimizer, skip=config.skip_steps)
    run = Run(config, folder, ranks, data, classes, student, training, optimizer, scaler, guard, rare)
    return opened(run, saved, resume=resume)


def set_up_arithmetic(config: Config) -> None:
    """Set the precision of float32 products on GPUs, and whether results are reproducible there."""
    set_float32_products(config.precision)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires this
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    torch.backends.cudnn.benchmark = config.device.startswith("cuda") and not config.deterministic


def autocast(config: Config) -> torch.autocast:
    """Use half precision if requested; softmax, losses and averages stay in float32."""
    device = torch.device(config.device).type
    return torch.autocast(device, AUTOCAST.get(config.precision), enabled=config.precision in AUTOCAST)


def build_network(config: Config, ranks: Ranks, *, fresh: bool) -> nn.Module:
    """Build the student; `fresh` loads the initial weights, which a resumed run does not need."""
    network = empty_network(config)
    if config.weights and fresh:
        report = load_weights(network, config.weights, strict=False)  # COCO and ImageNet files have another head
        if ranks.first:
            taken, other = len(report.matched), len(report.mismatched)
            print(f"{config.weights}: {taken} tensors taken, {other} of another shape", flush=True)
    if config.device.startswith("cuda") and ranks.world > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return network.to(config.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]


def build_training(student: nn.Module, config: Config, ranks: Ranks, *, fresh: bool) -> SelfTraining:
    """Build the method, with the recipe's options as the configuration has them."""
    prior = None
    if config.method == "alignment" and config.prior == "oracle" and fresh:
        counts = class_counts(domains.target_labels(config), workers=config.workers)
        prior = counts.sum(0)[: len(domains.class_names(config))].double()
    mixing: dict[str, Any] = {"rounding": config.rounding} if config.method in MIXING else {}
    training = recipes.self_training(
        student,
        len(domains.class_names(config)),
        method=config.method,
        **{one.name: getattr(config, one.name) for one in fields(recipes.Recipe)},
        **mixing,
        prior=prior,
        sync=ranks.world > 1,
        upsample=True,
        align_corners=is_ours(config.network),
    )
    if config.compile:
        student.compile()
        if training.teacher is not None:
            training.teacher.module.compile()
    if ranks.world > 1:  # two of four branches get no gradient; buffers are shared after the step
        training.student = DistributedDataParallel(
            student,
            **NO_BUFFERS,
            find_unused_parameters=config.aspp_branches < 4 or not is_ours(config.network),
        )
    return training.to(config.device).train()


def share_buffers(student: nn.Module, ranks: Ranks) -> None:
    """Copy the first process's BatchNorm statistics to all; on GPUs they are equal already."""
    buffers = [buffer for buffer in student.buffers() if buffer.is_floating_point()]
    if ranks.world > 1 and buffers:
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(flat, 0)
        shared = torch.split(flat, [buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(shared, buffers, strict=True)])


def build_optimizer(student: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Build the optimizer; SGD repeats updates as the released code does, if requested."""
    groups = parameter_groups(
        student,
        config.lr,
        head=head_of(config),
        head_factor=config.head_factor,
        no_decay=tuple(filter(None, config.no_decay.split(","))),  # type: ignore[arg-type]
        repeated=config.repeated,
    )
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay)
    sgd = RepeatedSGD if config.repeated else torch.optim.SGD
    return sgd(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov)


# -------------------------------------------------------------------------------------------------------- evaluation


def evaluate_if_due(run: Run, record: Record) -> None:
    """Evaluate student and teacher on all validation images, unless this step has been evaluated."""
    last = run.metrics["last"]
    if not run.due(run.config.eval_every) or (last is not None and last["step"] == run.done):
        return
    networks = {"student": run.student}
    if run.training.teacher is not None:
        networks["teacher"] = run.training.teacher.module
    try:
        found = {who: scores(run, network) for who, network in networks.items()}
    except (ValueError, OSError) as error:
        repair = "" if "scores are NaN" in str(error) else "Repair it; "  # NaN is no fault of the images
        raise DataError(f"{reason(error)} {repair}{goes_on(run)}.") from error
    entry: dict[str, Any] = {"step": run.done, **{who: by_size for who, (by_size, _) in found.items()}}
    entry["unsupervised"] = {who: without_labels for who, (_, without_labels) in found.items()}
    save(run, names=keep_scores(run, entry))
    now = miou(entry, run.config)
    words = "no pixel of the validation images counts" if now is None else f"student mIoU {percent(now)} %"
    record.progress.say(f"step {run.done}: {words}")


def scores(run: Run, network: nn.Module) -> tuple[dict[str, Any], dict[str, float | None]]:
    """Score a network by label size, and without labels."""
    config, validation = run.config, run.data.validation
    labelled = validation.files[0].label is not None  # your own target may have no labels at all
    unsupervised = UnsupervisedScores(len(run.classes)).to(config.device)
    matrices = evaluate(
        network,
        validation if labelled else domains.Unlabelled(validation, 255),
        num_classes=len(run.classes),
        image_size=size(config.target_size),
        label_sizes=label_sizes(config),
        forward=watched(run, small_logits(network), unsupervised),
        align_corners=is_ours(config.network),
        device=config.device,
        dtype=AUTOCAST.get(config.precision),
        workers=config.workers,
        sync=True,
    )
    unsupervised.merge()
    by_size = {key: summary(matrix, run.classes) for key, matrix in matrices.items()}
    return by_size, {name: finite(value) for name, value in unsupervised.compute()._asdict().items()}


def watched(
    run: Run, forward: Callable[[Tensor], Tensor], unsupervised: UnsupervisedScores
) -> Callable[[Tensor], Tensor]:
    """Wrap a forward pass so that its logits are scored without labels and a signal stops it between images.

    All processes ask together before each image whether to stop, except before one that only some of them have.
    """
    left = len(run.data.validation) // run.ranks.world

    def forward_unless_stopped(images: Tensor) -> Tensor:
        nonlocal left
        if left > 0 and run.stop.agreed():
            raise stopped(run)
        left -= 1
        logits = forward(images)
        unsupervised.update(logits)
        return logits

    return forward_unless_stopped


if __name__ == "__main__":
    leave(main)
